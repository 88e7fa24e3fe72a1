"""The scenarios of the source through unmodified boto3: against LocalKinesis, and kinesis-local of other authors.

What the fake alone can do (faults, trimming, simulated time) is tested on it; here the same loop meets the answers of
another service. moto is left out: it never ends a shard.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from typing import Any

import pytest
from apache_beam.utils.timestamp import Timestamp
from contract.targets import OverHttp, kinesis_local_process
from lineages import assert_parents_first
from miniature_runner import MiniatureRunner

from samza_kinesis_io.aggregation import Aggregate
from samza_kinesis_io.client import ClientConfig, StreamId
from samza_kinesis_io.clock import SystemClock
from samza_kinesis_io.errors import StreamNotFound
from samza_kinesis_io.polling import ReadLimits
from samza_kinesis_io.positions import StartingPosition, StopPosition
from samza_kinesis_io.source import ReadFromKinesis
from samza_kinesis_io.testing import LocalKinesis

HORIZON = StartingPosition.trim_horizon()
_names = itertools.count()


@contextlib.contextmanager
def local_kinesis() -> Iterator[OverHttp]:
    """With the real clock, unlike the contract's: the consumer's threads run on it."""
    with LocalKinesis(transition_seconds=0.05) as server:
        yield OverHttp("LocalKinesis", server.endpoint_url)


@pytest.fixture(
    scope="module",
    params=["LocalKinesis", pytest.param("kinesis-local", marks=pytest.mark.emulators)],
)
def target(request: pytest.FixtureRequest) -> Iterator[OverHttp]:
    make: Any = local_kinesis if request.param == "LocalKinesis" else kinesis_local_process
    with make() as target:
        yield target


class Stream:
    """A stream of numbered records of its own."""

    def __init__(self, target: OverHttp, shards: int = 1) -> None:
        self.name = f"flights-{next(_names)}"
        self.target = target
        self.client = ClientConfig(region="us-east-1", endpoint_url=target.endpoint_url)
        self.count = 0
        self.call("CreateStream", ShardCount=shards)
        self.settle()

    def call(self, operation: str, **params: Any) -> dict[str, Any]:
        return self.target.call(operation, {"StreamName": self.name} | params)

    def settle(self) -> None:
        deadline = time.monotonic() + 30
        while self.call("DescribeStreamSummary")["StreamDescriptionSummary"]["StreamStatus"] != "ACTIVE":
            assert time.monotonic() < deadline
            self.target.let_pass(0.02)

    def put(self, count: int) -> list[str]:
        """Put the next `count` numbers; return their sequence numbers."""
        numbers = []
        for _ in range(count):
            answer = self.call("PutRecord", Data=b"%d" % self.count, PartitionKey=f"key-{self.count % 31}")
            numbers.append(answer["SequenceNumber"])
            self.count += 1
        return numbers

    def put_aggregate(self, count: int) -> str:
        aggregate = Aggregate()
        for _ in range(count):
            assert aggregate.add("key", None, b"%d" % self.count)
            self.count += 1
        data, key, explicit = aggregate.encode()
        more = {} if explicit is None else {"ExplicitHashKey": explicit}
        number: str = self.call("PutRecord", Data=data, PartitionKey=key, **more)["SequenceNumber"]
        return number

    def open_shards(self) -> list[Any]:
        client = self.client.connect()
        try:
            shards = client.list_shards(StreamId(self.name))
        finally:
            client.close()
        return sorted((s for s in shards if not s.is_closed), key=lambda s: s.hash_key_range)

    def split(self) -> None:
        shard = self.open_shards()[0]
        middle = (shard.hash_key_range.start + shard.hash_key_range.end) // 2 + 1
        self.call("SplitShard", ShardToSplit=shard.shard_id, NewStartingHashKey=str(middle))
        self.settle()

    def merge(self) -> None:
        first, second = self.open_shards()[:2]
        self.call("MergeShards", ShardToMerge=first.shard_id, AdjacentShardToMerge=second.shard_id)
        self.settle()

    def read(self, *, restrictions: int = 1, **options: Any) -> MiniatureRunner:
        options = {
            "starting_position": HORIZON,
            "poll_interval_seconds": 0.05,
            "limits": ReadLimits(calls_per_second=None, bytes_per_second=None),
        } | options
        return MiniatureRunner(
            SystemClock(), ReadFromKinesis(self.name, client=self.client, **options), restrictions=restrictions
        )

    def in_order(self, runner: MiniatureRunner) -> None:
        client = self.client.connect()
        try:
            shards = client.list_shards(StreamId(self.name))
        finally:
            client.close()
        assert_parents_first(shards, [e.record.shard_id for e in runner.books.emitted])
        assert not [e for e in runner.books.emitted if e.arrived_late]


def until(runner: MiniatureRunner, count: int) -> None:
    """Run bundles until `count` records are in the books, and some more for what would be too many."""
    deadline = time.monotonic() + 60
    while len(runner.books.emitted) < count:
        assert time.monotonic() < deadline, f"{len(runner.books.emitted)} of {count} records after a minute"
        for index in list(runner.books.restrictions):
            runner.bundle(index)
    for index in list(runner.books.restrictions) * 3:
        runner.bundle(index)


def to_the_end(runner: MiniatureRunner) -> None:
    deadline = time.monotonic() + 60
    while not runner.is_done:
        assert time.monotonic() < deadline, "a bounded read must end"
        for index in list(runner.books.restrictions):
            runner.bundle(index)


def test_a_stream_resharded_before_the_start(target: OverHttp) -> None:
    stream = Stream(target, shards=2)
    for step in (stream.split, stream.merge, stream.merge, stream.split):
        stream.put(20)
        step()
    stream.put(20)
    runner = stream.read(max_records_per_get=7)
    until(runner, 100)
    assert sorted(runner.numbers) == list(range(100))
    stream.in_order(runner)


@pytest.mark.parametrize("restrictions", [1, 2])
def test_reshards_while_it_reads(target: OverHttp, restrictions: int) -> None:
    stream = Stream(target, shards=2)
    runner = stream.read(bundle_records=10, restrictions=restrictions)
    for step in (stream.split, stream.merge, stream.merge, stream.split):
        stream.put(20)
        step()
        for index in list(runner.books.restrictions):
            runner.bundle(index)
    stream.put(20)
    until(runner, 100)
    assert sorted(runner.numbers) == list(range(100))
    if restrictions == 1:
        stream.in_order(runner)


def test_restarts_from_the_checkpoint_after_every_step(target: OverHttp) -> None:
    stream = Stream(target)
    runner = stream.read()
    for step in (stream.split, stream.merge, stream.split):
        stream.put(15)
        step()
        runner = MiniatureRunner.resumed(SystemClock(), runner.saved())
        until(runner, stream.count)
    assert sorted(runner.numbers) == list(range(45))
    stream.in_order(runner)


def test_a_failed_bundle_is_read_again(target: OverHttp) -> None:
    stream = Stream(target, shards=2)
    stream.put(60)
    runner = stream.read(max_records_per_get=5)
    for after in (0, 1, 0):
        runner.failing_bundle(after_batches=after)
        runner.bundle()
    until(runner, 60)
    assert sorted(runner.numbers) == list(range(60))


def test_latest_is_the_moment_of_building(target: OverHttp) -> None:
    stream = Stream(target)
    stream.put(5)
    target.let_pass(1.1)
    runner = stream.read(starting_position=StartingPosition.latest())
    stream.put(5)
    until(runner, 5)
    assert runner.numbers == list(range(5, 10))


def test_a_start_and_a_stop_by_time(target: OverHttp) -> None:
    stream = Stream(target, shards=2)
    stream.put(10)
    target.let_pass(0.1)
    start = Timestamp.now()
    target.let_pass(0.1)
    stream.put(10)
    target.let_pass(0.1)
    runner = stream.read(starting_position=StartingPosition.at_timestamp(start), stop_at=StopPosition.now())
    target.let_pass(0.1)
    stream.put(10)
    to_the_end(runner)
    assert sorted(runner.numbers) == list(range(10, 20))


def test_a_bounded_read_over_a_reshard_ends(target: OverHttp) -> None:
    stream = Stream(target, shards=2)
    stream.put(20)
    stream.merge()
    stream.put(20)
    target.let_pass(0.1)
    runner = stream.read(stop_at=StopPosition.now())
    to_the_end(runner)
    assert sorted(runner.numbers) == list(range(40))


def test_starts_stops_and_restarts_inside_an_aggregate(target: OverHttp) -> None:
    stream = Stream(target)
    stream.put(3)
    number = stream.put_aggregate(10)
    stream.put(3)
    shard = stream.open_shards()[0].shard_id
    runner = stream.read(
        starting_position=StartingPosition.at_sequence_numbers({shard: (number, 2)}),
        stop_at=StopPosition.at_sequence_numbers({shard: (number, 7)}),
        bundle_records=2,
    )
    while not runner.is_done:
        runner.bundle()
        if not runner.is_done:
            runner = MiniatureRunner.resumed(SystemClock(), runner.saved())
    assert runner.numbers == [5, 6, 7, 8, 9, 10]


def test_after_a_sequence_number(target: OverHttp) -> None:
    stream = Stream(target)
    numbers = stream.put(10)
    shard = stream.open_shards()[0].shard_id
    runner = stream.read(starting_position=StartingPosition.after_sequence_numbers({shard: numbers[3]}))
    until(runner, 6)
    assert runner.numbers == list(range(4, 10))


def test_a_stream_that_is_missing(target: OverHttp) -> None:
    client = ClientConfig(region="us-east-1", endpoint_url=target.endpoint_url)
    with pytest.raises(StreamNotFound, match="nowhere"):
        MiniatureRunner(SystemClock(), ReadFromKinesis("nowhere", starting_position=HORIZON, client=client))
