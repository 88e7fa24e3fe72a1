"""FakeKinesis: what holds for every history of a stream."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from testing.calls import call

from samza_kinesis_io.shards import FULL_RANGE as HASH_SPACE
from samza_kinesis_io.shards import uncovered
from samza_kinesis_io.testing import FakeKinesis, SimulatedClock

#: What happens to a stream; the numbers choose a shard or a target, modulo what there is.
steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(1, 20)),
        st.tuples(st.just("split"), st.integers(0, 10)),
        st.tuples(st.just("merge"), st.integers(0, 10)),
        st.tuples(st.just("scale"), st.integers(0, 10)),
        st.tuples(st.just("advance"), st.integers(0, 3)),
    ),
    max_size=30,
)


def live(history: list[tuple[str, int]], shards: int) -> tuple[FakeKinesis, SimulatedClock, int]:
    """Return a fake whose stream has this history, its clock, and how many records were put."""
    clock = SimulatedClock()
    fake = FakeKinesis(clock=clock)
    fake.create_stream("s", shards=shards)
    written = 0
    for what, n in history:
        opened = sorted((s for s in fake.shards("s") if not s.is_closed), key=lambda s: s.hash_key_range)
        if what == "put":
            records = [{"Data": b"%d" % (written + i), "PartitionKey": str(i)} for i in range(n)]
            call(fake, "PutRecords", StreamName="s", Records=records)
            written += n
        elif what == "split" and len(opened) < 20:
            fake.split("s", opened[n % len(opened)].shard_id)
        elif what == "merge" and len(opened) > 1:
            left = n % (len(opened) - 1)
            fake.merge("s", opened[left].shard_id, opened[left + 1].shard_id)
        elif what == "scale":
            lowest = (len(opened) + 1) // 2
            target = lowest + n % (2 * len(opened) - lowest + 1)
            if target <= 20:
                scaling: dict[str, Any] = {"TargetShardCount": target, "ScalingType": "UNIFORM_SCALING"}
                call(fake, "UpdateShardCount", StreamName="s", **scaling)
        elif what == "advance":
            clock.advance(n)
    return fake, clock, written


@given(history=steps, shards=st.integers(1, 4), limit=st.integers(1, 10))
def test_a_reader_that_follows_the_children_meets_every_record_once_and_in_order(
    history: list[tuple[str, int]], shards: int, limit: int
) -> None:
    fake, _, written = live(history, shards)
    seen: list[bytes] = []
    ended: set[str] = set()
    numbers: dict[str, int] = {}
    ready = [s.shard_id for s in fake.shards("s") if not s.parents]
    while ready:
        shard_id = ready.pop()
        params = {"StreamName": "s", "ShardId": shard_id, "ShardIteratorType": "TRIM_HORIZON"}
        iterator: str | None = call(fake, "GetShardIterator", **params)["ShardIterator"]
        while iterator is not None:
            answer = call(fake, "GetRecords", ShardIterator=iterator, Limit=limit)
            for record in answer["Records"]:
                assert int(record["SequenceNumber"]) > numbers.get(shard_id, 0)
                numbers[shard_id] = int(record["SequenceNumber"])
                seen.append(record["Data"])
            iterator = answer.get("NextShardIterator")
            if iterator is not None and answer["MillisBehindLatest"] == 0:
                break
        else:
            ended.add(shard_id)
            for child in answer["ChildShards"]:
                if ended.issuperset(child["ParentShards"]):
                    last = max(numbers.get(parent, 0) for parent in child["ParentShards"])
                    numbers[child["ShardId"]] = last
                    ready.append(child["ShardId"])
    assert sorted(map(int, seen)) == list(range(written))
    assert ended == {s.shard_id for s in fake.shards("s") if s.is_closed}


@given(history=steps, shards=st.integers(1, 4))
def test_the_shards_of_every_moment_tile_the_hash_space(history: list[tuple[str, int]], shards: int) -> None:
    fake, clock, _ = live(history, shards)
    now = clock.now_seconds()
    ranges = {s.shard_id: s.hash_key_range for s in fake.shards("s")}
    filters: list[dict[str, Any]] = [{"Type": "AT_LATEST"}, {"Type": "AT_TRIM_HORIZON"}]
    filters += [{"Type": "AT_TIMESTAMP", "Timestamp": now - back} for back in (0, 0.5, 1, 2, 5)]
    for shard_filter in filters:
        listed = call(fake, "ListShards", StreamName="s", ShardFilter=shard_filter)["Shards"]
        chosen = [ranges[s["ShardId"]] for s in listed]
        assert not uncovered(HASH_SPACE, chosen)
        assert sum(r.end - r.start + 1 for r in chosen) == HASH_SPACE.end + 1
