"""`ReadFromKinesis(checkpoints=...)`: which rows a read writes, when, and how a new job goes on from them."""

from __future__ import annotations

import inspect
import logging
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.sdf_utils import RestrictionTrackerView
from miniature_runner import Attempt, MiniatureRunner
from numbered_stream import Stream

from samza_kinesis_io import checkpointing
from samza_kinesis_io.checkpoints import (
    CheckpointStore,
    FileCheckpointStore,
    MemoryCheckpointStore,
    SaveReport,
    ShardCheckpoint,
)
from samza_kinesis_io.errors import CheckpointError, ConfigurationError
from samza_kinesis_io.positions import Position, StartingPosition, StopPosition
from samza_kinesis_io.records import KinesisRecord
from samza_kinesis_io.runners import check_checkpoints
from samza_kinesis_io.sink import WriteToKinesis
from samza_kinesis_io.source import ReadFromKinesis, reading_loop
from samza_kinesis_io.testing import FakeKinesis

HORIZON = StartingPosition.trim_horizon()
FIRST = "shardId-000000000000"


class FinalizingRunner(MiniatureRunner):
    """The same, and it tells bundles when they are committed; unless it is to lose that."""

    loses_finalization = False

    def _new_dofn(self) -> Any:
        return reading_loop(self.plan, self.clock)

    def register(self, callback: Callable[[], None]) -> None:
        self.callbacks.append(callback)

    def begin(self, index: int = 0) -> Attempt:
        attempt = super().begin(index)
        self.callbacks: list[Callable[[], None]] = []
        view = RestrictionTrackerView(attempt.tracker)
        attempt.generator = self.dofn.process(self.elements[index], self, view, attempt.estimator)
        return attempt

    def finish(self, attempt: Attempt, split: Any = None) -> None:
        super().finish(attempt, split)
        assert self.callbacks, "Prism logs an error for every bundle that registered none"
        if not self.loses_finalization:
            for callback in self.callbacks:
                callback()

    def new_process(self) -> None:
        checkpointing._kept.clear()
        checkpointing._stores.clear()
        super().new_process()


class CheckpointedStream(Stream):
    def job(self, store: CheckpointStore, *, restrictions: int = 1, **options: Any) -> FinalizingRunner:
        options = {"starting_position": HORIZON, "checkpoint_interval_seconds": 1.0} | options
        read = ReadFromKinesis("flights", client=self.fake.factory(), clock=self.clock, checkpoints=store, **options)
        return FinalizingRunner(self.clock, read, restrictions=restrictions)

    def merge(self) -> None:
        shards = sorted(
            (s for s in self.fake.shards("flights") if not s.is_closed), key=lambda s: s.hash_key_range.start
        )
        self.fake.merge("flights", shards[0].shard_id, shards[1].shard_id)

    def position_of(self, number: int) -> Position:
        return Position.after(int(self.sequence_number_of(number)), 0)

    def sequence_number_of(self, number: int) -> str:
        return next(r.sequence_number for r in self.fake.records("flights") if int(r.data) == number)


@pytest.fixture
def store(tmp_path: Path) -> MemoryCheckpointStore:
    return MemoryCheckpointStore(str(tmp_path))


class TestRows:
    def test_the_first_committed_bundle_writes_one_for_every_shard_with_its_pinned_start(
        self, store: MemoryCheckpointStore
    ) -> None:
        stream = CheckpointedStream(shards=3)
        pinned = Position.at_timestamp(stream.now)
        stream.job(store, starting_position=StartingPosition.latest()).bundle()
        rows = store.load("flights")
        assert len(rows) == 3
        assert {r.position for r in rows.values()} == {pinned}

    def test_a_bundle_that_is_not_committed_writes_none(self, store: MemoryCheckpointStore) -> None:
        stream = CheckpointedStream()
        stream.put(20)
        stream.job(store).failing_bundle()
        assert store.load("flights") == {}

    def test_they_move_with_the_interval(self, store: MemoryCheckpointStore) -> None:
        stream = CheckpointedStream()
        stream.put(10)
        job = stream.job(store, checkpoint_interval_seconds=60.0)
        job.bundle()
        first = store.load("flights")[FIRST].position
        stream.put(10)
        job.run(idle_rounds=10)
        assert store.load("flights")[FIRST].position == first
        stream.clock.advance(60)
        job.bundle()
        assert store.load("flights")[FIRST].position == stream.position_of(19)

    def test_a_failed_bundle_does_not_count_and_its_records_come_again(self, store: MemoryCheckpointStore) -> None:
        stream = CheckpointedStream()
        stream.put(10)
        job = stream.job(store, checkpoint_interval_seconds=1e-6)
        job.run(idle_rounds=3)
        stream.put(10)
        stream.clock.advance(1)
        job.failing_bundle()
        assert store.load("flights")[FIRST].position == stream.position_of(9)
        job.run(idle_rounds=10)
        assert job.numbers == list(range(20))
        assert store.load("flights")[FIRST].position == stream.position_of(19)

    def test_a_bundle_that_the_runner_splits_has_rows_of_what_it_emitted(self, store: MemoryCheckpointStore) -> None:
        stream = CheckpointedStream()
        stream.put(10)
        job = stream.job(store, checkpoint_interval_seconds=1e-6)
        while not job.books.emitted:
            stream.clock.advance(1)
            job.split_bundle(after_batches=1)
        assert store.load("flights")[FIRST].position == stream.position_of(len(job.numbers) - 1)

    def test_the_end_of_a_shard_is_written_at_once_and_after_its_childrens_rows(self) -> None:
        stream = CheckpointedStream()
        store = Recording("order")
        stream.put(5)
        job = stream.job(store, checkpoint_interval_seconds=3600.0)
        job.run(idle_rounds=5)
        children = stream.fake.split("flights", FIRST)
        job.run(idle_rounds=20)
        rows = store.load("flights")
        assert rows[FIRST].ended
        assert set(rows[FIRST].children) == set(children)
        for child in children:
            assert rows[child].parents == (FIRST,)
            assert rows[child].hash_key_range is not None
        assert [row.shard_id for row in store.saves[-1]] == [*children, FIRST]

    def test_an_end_whose_lease_may_have_an_owner_is_saved_again_later(self, store: MemoryCheckpointStore) -> None:
        stream = CheckpointedStream()
        stream.put(5)
        slow = Deferring(store.name)
        job = stream.job(slow)
        job.run(idle_rounds=3)
        stream.fake.split("flights", FIRST)
        slow.refusals.append(FIRST)
        job.run(idle_rounds=5)
        assert not store.load("flights")[FIRST].ended
        slow.refusals.clear()
        job.run(idle_rounds=5)
        assert store.load("flights")[FIRST].ended

    def test_the_last_rows_of_a_read_wait_until_their_leases_are_known_to_be_free(
        self, store: MemoryCheckpointStore
    ) -> None:
        """No later bundle would save them."""
        stream = CheckpointedStream()
        stream.put(5)
        slow = Deferring(store.name)
        slow.refusals.append(FIRST)
        job = stream.job(slow, stop_at=StopPosition.at_timestamp(stream.now))
        with pytest.raises(CheckpointError, match="lower the store's failover_seconds"):
            job.run()
        slow.refusals.clear()

    def test_rows_that_cannot_be_saved_fail_the_next_bundle(self) -> None:
        """A runner may swallow what a callback raises."""
        stream = CheckpointedStream()
        job = stream.job(Broken("broken"))
        with pytest.raises(CheckpointError, match="no disk"):
            job.bundle()
        with pytest.raises(CheckpointError, match="no disk"):
            job.bundle()

    def test_nothing_is_registered_without_checkpoints(self) -> None:
        """The finalizer's mere presence costs on Flink and fails on Spark."""
        stream = CheckpointedStream()
        for stop in (None, StopPosition.at_timestamp(stream.now)):
            plain = stream.read(stop_at=stop)
            assert beam.DoFn.BundleFinalizerParam not in _defaults(plain.dofn)
            kept = stream.job(MemoryCheckpointStore("unused"), stop_at=stop)
            assert beam.DoFn.BundleFinalizerParam in _defaults(kept.dofn)


def _defaults(dofn: Any) -> list[Any]:
    return [p.default for p in inspect.signature(type(dofn).process).parameters.values()]


class Recording(MemoryCheckpointStore):
    saves: list[list[ShardCheckpoint]] = []

    def save(self, stream: str, checkpoints: Iterable[ShardCheckpoint]) -> SaveReport:
        rows = list(checkpoints)
        self.saves.append(rows)
        return MemoryCheckpointStore.save(self, stream, rows)


class Deferring(MemoryCheckpointStore):
    """As DynamoDB's store does with a lease of which it is not known yet whether its owner lives."""

    refusals: list[str] = []

    def save(self, stream: str, checkpoints: Iterable[ShardCheckpoint]) -> SaveReport:
        rows = [row for row in checkpoints if row.shard_id not in self.refusals]
        report = MemoryCheckpointStore.save(self, stream, rows)
        return SaveReport(report.written, report.kept, tuple(self.refusals))


class Broken(MemoryCheckpointStore):
    def save(self, stream: str, checkpoints: Iterable[ShardCheckpoint]) -> SaveReport:
        raise CheckpointError("no disk")


class TestGoingOn:
    def test_a_new_job_reads_what_the_old_one_did_not(self, store: MemoryCheckpointStore) -> None:
        stream = CheckpointedStream(shards=2)
        stream.put(20)
        stream.job(store, checkpoint_interval_seconds=1e-6).run(idle_rounds=20)
        stream.put(20)
        new = stream.job(store, starting_position=StartingPosition.latest())
        new.run()
        assert sorted(new.numbers) == list(range(20, 40))

    def test_also_from_the_middle_of_an_aggregate(self, store: MemoryCheckpointStore) -> None:
        stream = CheckpointedStream()
        stream.put_aggregate(10)
        job = stream.job(store, checkpoint_interval_seconds=1e-6, bundle_records=4)
        while not job.books.emitted:
            stream.clock.advance(1)
            job.bundle()
        assert job.numbers == list(range(4))
        job.new_process()
        new = stream.job(store)
        new.run()
        assert new.numbers == list(range(4, 10))

    def test_what_came_between_two_jobs_that_read_from_latest_is_read(self, store: MemoryCheckpointStore) -> None:
        """Also from shards that began and ended in between."""
        stream = CheckpointedStream()
        old = stream.job(store, starting_position=StartingPosition.latest())
        old.bundle()
        old.new_process()
        stream.put(10)
        low, _ = stream.fake.split("flights", FIRST)
        stream.put(10)
        stream.fake.split("flights", low)
        stream.put(10)
        stream.clock.advance(5)
        new = stream.job(store, starting_position=StartingPosition.latest())
        new.run()
        assert sorted(new.numbers) == list(range(30))

    def test_a_bounded_read_goes_on_behind_the_stop_of_the_one_before(self, store: MemoryCheckpointStore) -> None:
        stream = CheckpointedStream(shards=4)
        read: list[int] = []
        for _ in range(3):
            stream.put(40)
            stream.clock.advance(1)
            job = stream.job(store, stop_at=StopPosition.at_timestamp(stream.now))
            job.run()
            assert job.is_done
            read += sorted(job.numbers)
            job.new_process()
        assert read == list(range(120))

    def test_a_stop_by_sequence_numbers_is_still_all_there_is_to_read(self, store: MemoryCheckpointStore) -> None:
        stream = CheckpointedStream(shards=2)
        for number in range(20):
            stream.put(1, shard_id=stream.open_shards[number % 2])
        stop = StopPosition.at_sequence_numbers({FIRST: stream.sequence_number_of(12)})
        stream.job(store, stop_at=stop).run()
        again = stream.job(store, stop_at=stop)
        again.run()
        assert again.numbers == []
        all_else = stream.job(store)
        all_else.run()
        assert sorted(all_else.numbers) == [*range(1, 13, 2), 13, 14, 15, 16, 17, 18, 19]

    def test_shards_without_rows_start_where_they_are_named(self, store: MemoryCheckpointStore) -> None:
        stream = CheckpointedStream(shards=2)
        first, second = stream.open_shards
        for number in range(20):
            stream.put(1, shard_id=(first, second)[number % 2])
        store.save("flights", [ShardCheckpoint(first, stream.position_of(4))])
        named = StartingPosition.after_sequence_numbers({second: stream.sequence_number_of(15)}, otherwise=HORIZON)
        job = stream.job(store, starting_position=named)
        job.run()
        assert sorted(job.numbers) == [6, 8, 10, 12, 14, 16, 17, 18, 19]

    def test_a_done_shard_is_not_read_again_behind_a_parent_whose_end_was_not_saved(
        self, store: MemoryCheckpointStore
    ) -> None:
        stream = CheckpointedStream()
        stream.put(10)
        low, high = stream.fake.split("flights", FIRST)
        for _ in range(5):
            stream.put(1, shard_id=low)
            stream.put(1, shard_id=high)
        stream.fake.split("flights", low)
        stream.put(10)
        ranges = {s.shard_id: s.hash_key_range for s in stream.fake.shards("flights")}
        store.save("flights", [ShardCheckpoint(FIRST, stream.position_of(7), hash_key_range=ranges[FIRST])])
        store.save("flights", [ShardCheckpoint(low, None, ended=True, hash_key_range=ranges[low])])
        job = stream.job(store)
        job.run()
        assert sorted(job.numbers) == [8, 9, *range(11, 20, 2), *range(20, 30)]

    @pytest.mark.parametrize("seed", range(10))
    def test_jobs_that_are_killed_and_started_anew_while_shards_split_and_merge_lose_nothing(
        self, store: MemoryCheckpointStore, seed: int
    ) -> None:
        rng = random.Random(seed)
        stream = CheckpointedStream(shards=rng.choice([1, 2, 4]))
        restrictions = rng.choice([1, 3])
        read: list[int] = []
        for life in range(8):
            start = StartingPosition.latest() if life else HORIZON
            job = stream.job(store, restrictions=restrictions, starting_position=start, checkpoint_interval_seconds=0.3)
            # The first rows must be there: a job without any begins at its own start.
            job.loses_finalization = life > 0 and rng.random() < 0.2
            for _ in range(rng.randrange(1, 25)):
                stream.put(rng.randrange(8))
                if rng.random() < 0.1:
                    stream.fake.split("flights", rng.choice(stream.open_shards))
                elif rng.random() < 0.1 and len(stream.open_shards) > 1:
                    stream.merge()
                for index in list(job.books.restrictions):
                    if rng.random() < 0.1:
                        job.failing_bundle(index)
                    elif rng.random() < 0.1:
                        job.split_bundle(index, after_batches=rng.randrange(2))
                    else:
                        job.bundle(index)
            assert len(set(job.numbers)) == len(job.numbers), "within one job nothing comes twice"
            read += job.numbers
            job.new_process()
        last = stream.job(store, restrictions=restrictions, starting_position=StartingPosition.latest())
        last.run()
        assert set(range(stream.count)) - {*read, *last.numbers} == set()


class TestOptions:
    def test_two_streams_of_one_name_cannot_share_rows(self, store: MemoryCheckpointStore) -> None:
        arns = [f"arn:aws:kinesis:{region}:123456789012:stream/flights" for region in ("us-east-1", "eu-west-1")]
        with pytest.raises(ConfigurationError, match="several of the name flights"):
            ReadFromKinesis(arns, starting_position=HORIZON, checkpoints=store)

    def test_a_store_must_be_one(self) -> None:
        with pytest.raises(ConfigurationError, match="checkpoints must be like FileCheckpointStore"):
            ReadFromKinesis("flights", starting_position=HORIZON, checkpoints="directory")  # type: ignore[arg-type]

    def test_an_interval_must_be_one(self, store: MemoryCheckpointStore) -> None:
        with pytest.raises(ConfigurationError, match="checkpoint_interval_seconds must be > 0 and <= 3600, got 0"):
            ReadFromKinesis("flights", starting_position=HORIZON, checkpoints=store, checkpoint_interval_seconds=0)

    def test_spark_is_refused_with_the_reason(self) -> None:
        class SparkRunner:
            pass

        check_checkpoints(SparkRunner(), False)
        with pytest.raises(ConfigurationError, match="does not say when a bundle is committed"):
            check_checkpoints(SparkRunner(), True)


def test_two_runs_of_a_pipeline_copy_every_record_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """On the FnApiRunner; reader and sink are fused, so that the rows are exact."""
    fake = FakeKinesis()
    fake.create_stream("flights", shards=3)
    fake.create_stream("copies", shards=1)
    store = FileCheckpointStore(str(tmp_path))
    count = 0
    for _ in range(2):
        for _ in range(100):
            fake.put("flights", b"%d" % count, partition_key=str(count))
            count += 1
        fake.split("flights", next(s.shard_id for s in fake.shards("flights") if not s.is_closed))
        with caplog.at_level(logging.WARNING), beam.Pipeline(runner="FnApiRunner", options=PipelineOptions([])) as p:
            _ = (
                p
                | ReadFromKinesis(
                    "flights",
                    starting_position=HORIZON,
                    stop_at=StopPosition.now(),
                    client=fake.factory(),
                    checkpoints=store,
                )
                | beam.Map(_data)
                | WriteToKinesis("copies", client=fake.factory())
            )
        assert sorted(int(r.data) for r in fake.records("copies")) == list(range(count))
    assert "finaliz" not in caplog.text
    assert len(store.load("flights")) == 7


def _data(record: KinesisRecord) -> bytes:
    return record.data
