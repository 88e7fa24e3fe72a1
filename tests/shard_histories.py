"""Small streams and everything that splits and merges can make of them."""

from __future__ import annotations

from hypothesis import strategies as st

from samza_kinesis_io.shards import HashKeyRange, Shard

TOP = 63  # the last hash key of the small hash spaces below
SMALL = HashKeyRange(0, TOP)


def shard(number: int, start: int, end: int, *parents: int) -> Shard:
    names = [f"shardId-{p:012d}" for p in parents]
    return Shard(f"shardId-{number:012d}", HashKeyRange(start, end), *names)


@st.composite
def histories(draw: st.DrawFn) -> list[Shard]:
    """Every shard that a small stream ever had, after some splits and merges, in the order of creation."""
    step = draw(st.sampled_from([16, 32, 64]))
    made = [shard(i, low, low + step - 1) for i, low in enumerate(range(0, TOP + 1, step))]
    open_ = list(made)
    for at, split in draw(st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=12)):
        open_.sort(key=lambda s: s.hash_key_range)
        at %= len(open_)
        mine = open_[at].hash_key_range
        if split and mine.end > mine.start:
            middle = (mine.start + mine.end + 1) // 2
            parent = int(open_[at].shard_id[-12:])
            children = [
                shard(len(made), mine.start, middle - 1, parent),
                shard(len(made) + 1, middle, mine.end, parent),
            ]
            open_[at : at + 1] = children
        elif not split and at + 1 < len(open_):
            other = open_[at + 1]
            parents = int(open_[at].shard_id[-12:]), int(other.shard_id[-12:])
            children = [shard(len(made), mine.start, other.hash_key_range.end, *parents)]
            open_[at : at + 2] = children
        else:
            continue
        made += children
    return made
