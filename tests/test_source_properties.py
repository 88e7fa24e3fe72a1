"""What must hold for all reshardings, crashes and faults: a state machine drives stream, runner and failures.

Invariants, checked after every run of rules:
- nothing lost: every record put is in the runner's books, but for those that the service trimmed;
- nothing repeated: the books are exactly once whatever failed, for the runner strikes out what failed bundles emitted;
- order: the records of a shard are in sequence order, and behind those of its ancestors;
- time: no record is older than a watermark reported before it.
"""

from __future__ import annotations

import random

import pytest
from apache_beam.utils.timestamp import Timestamp
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from miniature_runner import Attempt, Books, MiniatureRunner

from samza_kinesis_io.aggregation import Aggregate, deaggregate
from samza_kinesis_io.consumer import IDLE_SECONDS
from samza_kinesis_io.errors import StaleAttachment
from samza_kinesis_io.positions import StartingPosition, StopPosition
from samza_kinesis_io.records import KinesisRecord
from samza_kinesis_io.source import DataLossPolicy, ReadFromKinesis
from samza_kinesis_io.testing import FakeKinesis, SimulatedClock
from samza_kinesis_io.watermark import ArrivalTimeWatermark, EventTimeWatermark

EVENT_LAG_SECONDS = 120
STREAMS = ("flights", "weather")


def event_time(record: KinesisRecord) -> Timestamp:
    """Events arrive up to two minutes after they happened, each with a delay of its own."""
    lag_micros = int(record.data) * 7_919_000 % (EVENT_LAG_SECONDS * 1_000_000)
    return Timestamp(micros=record.approximate_arrival_micros - lag_micros)


#: One record may be as much older than the one before it as their delays differ.
BY_EVENT_TIME = EventTimeWatermark(event_time, out_of_orderness_seconds=EVENT_LAG_SECONDS)


#: A stream's name and a shard's id: ids repeat between streams.
Key = tuple[str, str]


def key_of(record: KinesisRecord) -> Key:
    return record.stream, record.shard_id


def is_reading(machine: SourceMachine) -> bool:
    return hasattr(machine, "runner") and not machine.runner.is_done


class SourceMachine(RuleBasedStateMachine):
    """One or two streams, one read of them, one runner, and everything that can go wrong between them."""

    trims = False

    @initialize(
        shards=st.integers(1, 4),
        restrictions=st.integers(1, 3),
        per_get=st.sampled_from([1, 3, 10_000]),
        per_bundle=st.sampled_from([1, 4, 10_000]),
        start=st.sampled_from(["horizon", "latest"]),
        stop_after=st.sampled_from([None, None, None, None, 20.0, 400.0]),
        streams=st.sampled_from([1, 1, 2]),
        by_event_time=st.booleans(),
        seed=st.integers(0, 1 << 16),
    )
    def set_up(
        self,
        shards: int,
        restrictions: int,
        per_get: int,
        per_bundle: int,
        start: str,
        stop_after: float | None,
        streams: int,
        by_event_time: bool,
        seed: int,
    ) -> None:
        self.clock = SimulatedClock()
        self.fake = FakeKinesis(clock=self.clock)
        self.streams = STREAMS[:streams]
        for stream in self.streams:
            self.fake.create_stream(stream, shards=shards)
        self.rng = random.Random(seed)
        self.behind_stop: set[int] = set()
        self.count = 0
        self.may_be_lost: set[int] = set()
        self.parents: dict[Key, tuple[Key, ...]] = {}
        self.zombies: list[Attempt] = []
        self.clock.advance(1)
        self.stop_seconds = None if stop_after is None else self.clock.now_seconds() + stop_after
        stop = None
        if self.stop_seconds is not None:
            stop = StopPosition.at_timestamp(Timestamp(micros=round(self.stop_seconds * 1e6)))
        read = ReadFromKinesis(
            list(self.streams),
            starting_position=StartingPosition.latest() if start == "latest" else StartingPosition.trim_horizon(),
            stop_at=stop,
            client=self.fake.factory(),
            clock=self.clock,
            max_records_per_get=per_get,
            bundle_records=per_bundle,
            watermark=BY_EVENT_TIME if by_event_time else ArrivalTimeWatermark(),
            on_data_loss=DataLossPolicy.CONTINUE,
        )
        self.restrictions = 1 if self.trims else restrictions
        self.runner = MiniatureRunner(self.clock, read, restrictions=self.restrictions)
        self.checkpoints: list[Books] = [self.runner.books.copy()]
        self._learn_parents()

    def _learn_parents(self) -> None:
        for stream in self.streams:
            for shard in self.fake.shards(stream):
                self.parents[stream, shard.shard_id] = tuple((stream, parent) for parent in shard.parents)

    def _stream(self) -> str:
        return self.rng.choice(self.streams)

    def _open(self, stream: str) -> list[str]:
        shards = [s for s in self.fake.shards(stream) if not s.is_closed]
        return [s.shard_id for s in sorted(shards, key=lambda s: s.hash_key_range.start)]

    def _element(self) -> int:
        return self.rng.choice(list(self.runner.books.restrictions))

    # The stream.

    def _number(self) -> bytes:
        """Return the next record's data, and know whether it arrives too late for the stop."""
        if self.stop_seconds is not None and round(self.clock.now_seconds(), 3) >= round(self.stop_seconds, 6):
            self.behind_stop.add(self.count)
        self.count += 1
        return str(self.count - 1).encode()

    @rule(count=st.integers(1, 6))
    def put(self, count: int) -> None:
        for _ in range(count):
            self.fake.put(self._stream(), self._number(), partition_key=f"k{self.rng.randrange(50)}")
            self.clock.advance(0.001)

    @rule(count=st.integers(2, 6))
    def put_aggregate(self, count: int) -> None:
        aggregate = Aggregate()
        key = f"k{self.rng.randrange(50)}"
        for _ in range(count):
            assert aggregate.add(key, None, self._number())
        data, partition_key, explicit_hash_key = aggregate.encode()
        self.fake.put(self._stream(), data, partition_key=partition_key, explicit_hash_key=explicit_hash_key)
        self.clock.advance(0.001)

    @rule()
    def split_shard(self) -> None:
        stream = self._stream()
        if len(self._open(stream)) < 12:
            self.fake.split(stream, self.rng.choice(self._open(stream)))
            self._learn_parents()

    @rule()
    def merge_shards(self) -> None:
        stream = self._stream()
        shards = self._open(stream)
        if len(shards) > 1:
            at = self.rng.randrange(len(shards) - 1)
            self.fake.merge(stream, shards[at], shards[at + 1])
            self._learn_parents()

    @rule()
    def update_shard_count(self) -> None:
        """Opens and closes shards that never hold anything."""
        stream = self._stream()
        count = len(self._open(stream))
        target = self.rng.randint((count + 1) // 2, min(2 * count, 8) if count < 8 else count)
        params = {"StreamName": stream, "TargetShardCount": target, "ScalingType": "UNIFORM_SCALING"}
        self.fake.call("UpdateShardCount", params)
        self._learn_parents()

    @rule(seconds=st.sampled_from([0.05, 0.6, 5.0, 61.0, 400.0]))
    def let_time_pass(self, seconds: float) -> None:
        self.clock.advance(seconds)

    # The runner.

    @precondition(lambda self: is_reading(self))
    @rule(bundles=st.integers(1, 6))
    def run_bundles(self, bundles: int) -> None:
        for _ in range(bundles):
            if not self.runner.is_done:
                self.runner.bundle(self._element())

    @precondition(lambda self: is_reading(self))
    @rule(after=st.integers(0, 3))
    def downstream_fails(self, after: int) -> None:
        attempt = self._begun()
        for _ in range(after):
            if not self.runner.step(attempt):
                break
        attempt.generator.close()  # what Python does to it when the consumer of its output raises

    def _begun(self) -> Attempt:
        """Return an attempt that stands behind its first batch, if there is anything to read."""
        self.put(2)
        for _ in range(4):
            attempt = self.runner.begin(self._element())
            if self.runner.step(attempt):
                break
            self.runner.finish(attempt)
            if self.runner.is_done:
                break
        return attempt

    @precondition(lambda self: is_reading(self))
    @rule(after=st.integers(0, 3))
    def runner_splits(self, after: int) -> None:
        self.runner.split_bundle(self._element(), after_batches=after)

    @precondition(lambda self: is_reading(self))
    @rule(steps=st.integers(0, 2))
    def attempt_is_abandoned(self, steps: int) -> None:
        attempt = self._begun()
        for _ in range(steps):
            self.runner.step(attempt)
        if attempt.element in self.runner.books.restrictions:
            self.zombies.append(attempt)
            # A new attempt takes over at once, as after a cancellation.
            self.runner.bundle(attempt.element)

    @precondition(lambda self: getattr(self, "zombies", None))
    @rule()
    def abandoned_attempt_goes_on(self) -> None:
        attempt = self.zombies.pop()
        try:
            while self.runner.step(attempt):
                pass
        except StaleAttachment:
            pass

    @precondition(lambda self: len(getattr(self, "zombies", ())) > 1)
    @rule(steps=st.integers(1, 6))
    def abandoned_attempts_go_on_side_by_side(self, steps: int) -> None:
        for _ in range(steps):
            zombie = self.rng.choice(self.zombies)
            try:
                if self.rng.random() < 0.2:
                    zombie.tracker.try_split(0.0)
                self.runner.step(zombie)
            except StaleAttachment:
                self.zombies.remove(zombie)
                if not self.zombies:
                    return

    @rule()
    def checkpoint(self) -> None:
        self.checkpoints.append(self.runner.books.copy())

    @rule()
    def restore_in_the_same_process(self) -> None:
        self.runner.restore(self.rng.choice(self.checkpoints[-3:]))

    @rule(restore=st.booleans())
    def worker_dies(self, restore: bool) -> None:
        self.zombies.clear()
        self.runner.new_process()
        if restore:
            self.runner.restore(self.rng.choice(self.checkpoints[-3:]))

    # The faults.

    @rule(times=st.integers(1, 4), operation=st.sampled_from(["GetRecords", "GetShardIterator", "ListShards"]))
    def throttle(self, times: int, operation: str) -> None:
        self.fake.faults.throttle(operation, times=times)

    @rule(times=st.integers(1, 3), operation=st.sampled_from(["GetRecords", "GetShardIterator", "ListShards"]))
    def service_fails(self, times: int, operation: str) -> None:
        self.fake.faults.internal_failure(operation, times=times)

    @rule(times=st.integers(1, 3))
    def connection_drops(self, times: int) -> None:
        self.fake.faults.drop_connection("GetRecords", times=times)

    @rule(times=st.integers(1, 2))
    def iterators_expire(self, times: int) -> None:
        self.fake.faults.expire_iterators(times=times)

    @rule(times=st.integers(1, 5))
    def shard_ends_name_no_children(self, times: int) -> None:
        self.fake.faults.end_without_children(times=times)

    @rule(times=st.integers(1, 3))
    def answers_are_empty(self, times: int) -> None:
        self.fake.faults.empty_answers(times=times)

    # What must hold.

    @invariant()
    def books_are_in_order_and_in_time(self) -> None:
        if not hasattr(self, "runner"):
            return
        emitted = self.runner.books.emitted
        numbers = [int(e.record.data) for e in emitted]
        assert len(set(numbers)) == len(numbers), "a record was repeated"
        assert not [e for e in emitted if e.arrived_late], "the watermark passed a record that was still to come"
        assert not self.behind_stop.intersection(numbers), "a record behind the stop was read"
        last: dict[Key, tuple[int, int]] = {}
        for e in emitted:
            at = (int(e.record.sequence_number), e.record.sub_sequence_number)
            assert at > last.get(key_of(e.record), (0, -1)), "a shard's records are out of order"
            last[key_of(e.record)] = at
        if self.restrictions == 1:
            self._check_lineage()

    def _check_lineage(self) -> None:
        first: dict[Key, int] = {}
        final: dict[Key, int] = {}
        for place, e in enumerate(self.runner.books.emitted):
            first.setdefault(key_of(e.record), place)
            final[key_of(e.record)] = place
        for shard, place in first.items():
            for ancestor in self._ancestors(shard):
                assert final.get(ancestor, -1) < place, f"{shard} was read before the end of {ancestor}"

    def _ancestors(self, shard: Key) -> set[Key]:
        found: set[Key] = set()
        left = list(self.parents.get(shard, ()))
        while left:
            parent = left.pop()
            if parent not in found:
                found.add(parent)
                left.extend(self.parents.get(parent, ()))
        return found

    def teardown(self) -> None:
        if not hasattr(self, "runner"):
            return
        self.fake.faults.clear()
        left = 0.0 if self.stop_seconds is None else self.stop_seconds - self.clock.now_seconds()
        self.clock.advance(30 + max(0.0, left))
        self.runner.run(idle_rounds=150)
        # What an abandoned attempt was still reading holds a merge child until its buffers are dropped.
        self.clock.advance(IDLE_SECONDS)
        self.runner.run(idle_rounds=150)
        self.books_are_in_order_and_in_time()
        if self.stop_seconds is not None:
            assert self.runner.is_done, "a bounded read must end"
        missing = set(range(self.count)) - set(self.runner.numbers) - self.may_be_lost - self.behind_stop
        assert not missing, f"lost: {sorted(missing)}"
        self.runner.new_process()


class TrimmingMachine(SourceMachine):
    """The same with retention at work: records, and whole generations of shards, vanish while nobody reads."""

    trims = True

    @rule()
    def records_are_trimmed(self) -> None:
        self._everything_may_be_lost()
        for stream in self.streams:
            self.fake.trim(stream)
        self.clock.advance(0.01)

    @rule()
    def a_day_passes(self) -> None:
        self._everything_may_be_lost()
        self.clock.advance(25 * 3600)

    def _everything_may_be_lost(self) -> None:
        for stream in self.streams:
            for record in self.fake.records(stream):
                self._lose(record)

    def _lose(self, record: KinesisRecord) -> None:
        apart = deaggregate(record)
        for user in [record] if apart is None else apart.records:
            self.may_be_lost.add(int(user.data))


TestSource = pytest.mark.filterwarnings("ignore")(SourceMachine.TestCase)
TestTrimming = pytest.mark.filterwarnings("ignore")(TrimmingMachine.TestCase)
