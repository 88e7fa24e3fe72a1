"""Shards, their places in the hash space, and who reads which: pure rules, no I/O.

Two rules, which everything else follows from:

1. At every moment the shards of a stream tile the hash space, so the shards that ever held one hash key form
   a chain in time. Two shards whose ranges overlap are therefore ancestor and descendant, and the one with
   the smaller id is the older: Kinesis numbers shards in the order of their creation.
2. A child belongs to whoever reads the parent that holds the child's first hash key. There is exactly one,
   it is known without asking anybody, and both parents of a merge agree on it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from samza_kinesis_io.limits import MAX_HASH_KEY


@dataclass(frozen=True, slots=True, order=True)
class HashKeyRange:
    """The hash keys from `start` to `end`, both included."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end <= MAX_HASH_KEY:
            raise ValueError(
                f"hash key range must lie in [0, 2^128-1] and start <= end, got [{self.start}, {self.end}]"
            )

    def contains(self, key: int) -> bool:
        return self.start <= key <= self.end

    def covers(self, other: HashKeyRange) -> bool:
        return self.start <= other.start and other.end <= self.end

    def overlaps(self, other: HashKeyRange) -> bool:
        return self.start <= other.end and other.start <= self.end


FULL_RANGE = HashKeyRange(0, MAX_HASH_KEY)


@dataclass(frozen=True, slots=True)
class ChildShard:
    """A shard as the end of its parent announces it."""

    shard_id: str
    parents: tuple[str, ...]
    hash_key_range: HashKeyRange


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard as ListShards knows it. `ending_sequence_number` is None while it is open."""

    shard_id: str
    hash_key_range: HashKeyRange
    parent_shard_id: str | None = None
    adjacent_parent_shard_id: str | None = None
    starting_sequence_number: int | None = None
    ending_sequence_number: int | None = None

    @property
    def parents(self) -> tuple[str, ...]:
        return tuple(p for p in (self.parent_shard_id, self.adjacent_parent_shard_id) if p)

    @property
    def is_closed(self) -> bool:
        return self.ending_sequence_number is not None


def age_key(shard_id: str) -> tuple[int, str]:
    """Return a key that sorts shard ids by creation: by number where the id ends in one, then as text.

    A total order, so that waiting for older shards can never become a circle.
    """
    digits = shard_id.rpartition("-")[2]
    return (int(digits), shard_id) if digits.isascii() and digits.isdigit() else (-1, shard_id)


def uncovered(target: HashKeyRange, ranges: Iterable[HashKeyRange]) -> tuple[HashKeyRange, ...]:
    """Return the parts of `target` that none of `ranges` covers, in order. Empty: covered completely."""
    holes: list[HashKeyRange] = []
    at = target.start
    for r in sorted(ranges):
        if r.end < at or r.start > target.end:
            continue
        if r.start > at:
            holes.append(HashKeyRange(at, r.start - 1))
        at = max(at, r.end + 1)
        if at > target.end:
            return tuple(holes)
    holes.append(HashKeyRange(at, target.end))
    return tuple(holes)


def oldest_covering(shards: Iterable[Shard], target: HashKeyRange = FULL_RANGE) -> tuple[Shard, ...]:
    """Return the listed shards with which reading of `target` must begin, oldest first.

    For every hash key that is the oldest listed shard that holds it; so roots, and also a merge child whose
    one parent is listed and whose other is not (it must wait for the first, by the overlap rule).
    Shards that older listed shards cover completely are left out: their parents lead to them.
    """
    chosen: list[Shard] = []
    # What the chosen ones cover, as disjoint ranges of which no two touch: a stream has thousands of shards.
    starts: list[int] = []
    ends: list[int] = []
    for shard in sorted(shards, key=lambda s: age_key(s.shard_id)):
        if not shard.hash_key_range.overlaps(target):
            continue
        start, end = max(shard.hash_key_range.start, target.start), min(shard.hash_key_range.end, target.end)
        at = bisect_right(starts, start) - 1
        if at >= 0 and end <= ends[at]:
            continue
        chosen.append(shard)
        first = at if at >= 0 and ends[at] >= start - 1 else at + 1
        last = bisect_right(starts, end + 1)  # behind the ranges that the new one touches
        if first < last:
            start, end = min(start, starts[first]), max(end, ends[last - 1])
        starts[first:last], ends[first:last] = [start], [end]
        if start == target.start and end == target.end:
            break
    return tuple(chosen)


def holes(shards: Iterable[Shard], target: HashKeyRange = FULL_RANGE) -> tuple[HashKeyRange, ...]:
    """Return the parts of `target` that no listed shard holds."""
    return uncovered(target, (s.hash_key_range for s in shards))


def children_of(shard_id: str, shards: Iterable[Shard]) -> tuple[ChildShard, ...]:
    """Return the listed children of a shard."""
    return tuple(
        ChildShard(s.shard_id, s.parents, s.hash_key_range)
        for s in sorted(shards, key=lambda s: age_key(s.shard_id))
        if shard_id in s.parents
    )


def groups(shards: Sequence[Shard], count: int) -> list[tuple[Shard, ...]]:
    """Deal the shards that reading begins with to at most `count` groups of neighbours by hash range.

    Shards that overlap (one waits for the other) always share a group. Groups differ by at most one such family.
    """
    if count < 1:
        raise ValueError(f"count must be >= 1, got {count}")
    families: list[list[Shard]] = []
    end = -1
    for shard in sorted(shards, key=lambda s: (s.hash_key_range.start, age_key(s.shard_id))):
        if families and shard.hash_key_range.start <= end:
            families[-1].append(shard)
        else:
            families.append([shard])
        end = max(end, shard.hash_key_range.end)
    count = min(count, len(families))
    out: list[tuple[Shard, ...]] = []
    for i in range(count):
        part = families[i * len(families) // count : (i + 1) * len(families) // count]
        out.append(tuple(s for family in part for s in family))
    return out
