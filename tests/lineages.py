"""The order of a stream's records, as far as it is promised."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from samza_kinesis_io.shards import Shard


def assert_parents_first(shards: Iterable[Shard], order: Sequence[str]) -> None:
    """No record of a shard comes before the last one of any of its ancestors.

    Args:
        shards: Listed, so that trimmed ancestors are not known.
        order: The shard of every record that was read, in the order in which they were.
    """
    parents = {s.shard_id: s.parents for s in shards}
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for place, shard in enumerate(order):
        first.setdefault(shard, place)
        last[shard] = place
    for shard, place in first.items():
        left = list(parents.get(shard, ()))
        while left:
            parent = left.pop()
            assert last.get(parent, -1) < place, f"{shard} before the end of {parent}"
            left.extend(parents.get(parent, ()))
