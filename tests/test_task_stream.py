"""`RunStreamTask` by what its tasks are told and what comes out, bundle by bundle, on a simulated clock."""

from __future__ import annotations

import json
import pickle
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.utils.timestamp import Timestamp
from miniature_runner import Attempt, Books, MiniatureRunner

from samza_kinesis_io.checkpoints import MemoryCheckpointStore
from samza_kinesis_io.clock import Clock, SystemClock
from samza_kinesis_io.errors import CheckpointError, ConfigurationError
from samza_kinesis_io.positions import Position, StartingPosition, StopPosition
from samza_kinesis_io.records import KinesisRecord
from samza_kinesis_io.serdes import SerdeError
from samza_kinesis_io.source import BoundedFrontiers, Frontiers, PlanShards, ShardGroupCoder
from samza_kinesis_io.task import (
    AsyncStreamTask,
    ClosableTask,
    EndOfStreamListenerTask,
    InitableTask,
    OutgoingMessageEnvelope,
    RequestScope,
    StreamTask,
    SystemStream,
    TaskContext,
    WindowableTask,
)
from samza_kinesis_io.testing import FakeKinesis, SimulatedClock
from samza_kinesis_io.transforms import stream_task
from samza_kinesis_io.transforms.stream_task import RunStreamTask

OUT = SystemStream("kinesis", "delays")
JSON = {"systems.kinesis.streams.flights.samza.msg.serde": "json", "task.commit.ms": "-1"}


class MiniatureTaskRunner(MiniatureRunner):
    """The same, around the tasks' loop. `sent` is what the books hold."""

    def __init__(self, clock: SimulatedClock, transform: RunStreamTask) -> None:
        (self.tasks,) = pickle.loads(pickle.dumps(transform.plans(1)))
        self.clock = clock
        self.plan = self.tasks.read
        coder = ShardGroupCoder()
        planner = PlanShards(self.plan, clock)
        self.elements = [coder.decode(coder.encode(group)) for group in planner.process(None)]
        self.frontiers = BoundedFrontiers() if self.plan.is_bounded else Frontiers()
        self.books = Books()
        for index, element in enumerate(self.elements):
            frontier = self.frontiers.initial_restriction(element)
            self._keep(index, frontier, frontier.watermark_micros)
        self.dofn = self._new_dofn()
        self.callbacks: list[Any] = []
        self.lose_finalization = False

    def _new_dofn(self) -> Any:
        return stream_task.task_loop(self.tasks, self.clock)

    def register(self, callback: Any) -> None:
        self.callbacks.append(callback)

    def begin(self, index: int = 0) -> Attempt:
        attempt = super().begin(index)
        self.callbacks = []
        if self.plan.checkpointing.is_on:
            from apache_beam.runners.sdf_utils import RestrictionTrackerView

            view = RestrictionTrackerView(attempt.tracker)
            attempt.generator = self.dofn.process(self.elements[index], self, view, attempt.estimator)
        return attempt

    def step(self, attempt: Attempt) -> bool:
        for element in attempt.generator:
            batch = element.value
            watermark = attempt.estimator.current_watermark().micros
            assert min(batch.timestamps_micros) >= watermark
            attempt.emitted.extend(zip(batch.messages, batch.timestamps_micros, strict=True))  # type: ignore[arg-type]
            return True
        return False

    def finish(self, attempt: Attempt, split: Any = None) -> None:
        super().finish(attempt, split)
        for callback in self.callbacks if not self.lose_finalization else ():
            callback()

    def first(self) -> Attempt:
        """Run bundles up to the first that sends something, and that one to the point where it has sent it."""
        while not self.step(attempt := self.begin()):
            self.finish(attempt)
        return attempt

    def finish_attempt(self, attempt: Attempt) -> None:
        while self.step(attempt):
            pass
        self.finish(attempt)

    @property
    def sent(self) -> list[Any]:
        return [message.message for message, _ in self.books.emitted]  # type: ignore[misc,attr-defined]

    def new_process(self) -> None:
        stream_task._containers.clear()
        super().new_process()


#: What tasks were told, by task name: (call, offset or None). Filled by `Everything`.
CALLS: dict[str, list[str]] = defaultdict(list)
ORDER: list[str] = []


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    CALLS.clear()
    ORDER.clear()


class Everything(StreamTask, InitableTask, WindowableTask, ClosableTask, EndOfStreamListenerTask):
    def init(self, context: TaskContext) -> None:
        self.name = context.task_name.rpartition("-")[2].strip("0]") or "0"
        self.seen = 0
        self.note("init")

    def note(self, call: str) -> None:
        CALLS[self.name].append(call)
        ORDER.append(f"{self.name} {call}")

    def process(self, envelope: Any, collector: Any, coordinator: Any) -> None:
        self.seen += 1
        self.note(f"{envelope.message}")
        collector.send(OutgoingMessageEnvelope(OUT, envelope.message))
        if envelope.message in (13, "13"):
            coordinator.commit()

    def window(self, collector: Any, coordinator: Any) -> None:
        self.note("window")
        collector.send(OutgoingMessageEnvelope(OUT, f"{self.name}: {self.seen}"))

    def on_end_of_stream(self, collector: Any, coordinator: Any) -> None:
        self.note("end of stream")
        collector.send(OutgoingMessageEnvelope(OUT, f"end of {self.name}"))

    def close(self) -> None:
        self.note("close")


class Echo(StreamTask):
    def process(self, envelope: Any, collector: Any, coordinator: Any) -> None:
        collector.send(OutgoingMessageEnvelope(OUT, envelope.message, key=envelope.key))


class Deduplicate(StreamTask, InitableTask):
    """What it must not do: lose the first of its kind because state was kept and output was not."""

    def init(self, context: TaskContext) -> None:
        self.store = context.get_store("seen")

    def process(self, envelope: Any, collector: Any, coordinator: Any) -> None:
        if self.store.get(str(envelope.message)) is None:
            self.store.put(str(envelope.message), 1)
            collector.send(OutgoingMessageEnvelope(OUT, envelope.message))


class Counting(StreamTask, InitableTask):
    def init(self, context: TaskContext) -> None:
        self.store = context.get_store("count")

    def process(self, envelope: Any, collector: Any, coordinator: Any) -> None:
        count = (self.store.get("n") or 0) + 1
        self.store.put("n", count)
        collector.send(OutgoingMessageEnvelope(OUT, (envelope.message, count)))


class Coroutines(AsyncStreamTask):
    async def process_async(self, envelope: Any, collector: Any, coordinator: Any, callback: Any) -> None:
        import asyncio

        # Later ones overtake.
        for _ in range((7 - envelope.message % 7) * 3):
            await asyncio.sleep(0)
        collector.send(OutgoingMessageEnvelope(OUT, envelope.message))


class Failing(Echo):
    fail_at: int | None = None

    def process(self, envelope: Any, collector: Any, coordinator: Any) -> None:
        if envelope.message == Failing.fail_at:
            Failing.fail_at = None
            raise RuntimeError("once")
        super().process(envelope, collector, coordinator)


class Stopping(Echo):
    scope = RequestScope.ALL_TASKS_IN_CONTAINER

    def process(self, envelope: Any, collector: Any, coordinator: Any) -> None:
        super().process(envelope, collector, coordinator)
        if envelope.message == 10:
            coordinator.shutdown(Stopping.scope)


class Stream:
    def __init__(self, *, shards: int = 1, clock: Clock | None = None) -> None:
        self.clock: Any = clock or SimulatedClock()
        self.fake = FakeKinesis(clock=self.clock)
        self.fake.create_stream("flights", shards=shards)
        if not isinstance(self.clock, SimulatedClock):
            # The fake rounds arrival times to milliseconds, and drops what then lies before the stream's first shards.
            self.clock.sleep(0.002)
        self.count = 0

    def put(self, count: int, *, shard_id: str | None = None, data: bytes | None = None) -> None:
        for _ in range(count):
            self.fake.put(
                "flights", data or str(self.count).encode(), partition_key=f"key-{self.count % 97}", shard_id=shard_id
            )
            self.count += 1
            if isinstance(self.clock, SimulatedClock):
                self.clock.advance(0.001)

    @property
    def open_shards(self) -> list[str]:
        return [s.shard_id for s in self.fake.shards("flights") if not s.is_closed]

    def run(self, task: Any, config: dict[str, str] | None = None, **options: Any) -> MiniatureTaskRunner:
        options.setdefault("starting_position", StartingPosition.trim_horizon())
        transform = RunStreamTask(
            task,
            inputs=["kinesis.flights"],
            config={**JSON, **(config or {})},
            client=self.fake.factory(),
            clock=self.clock,
            **options,
        )
        return MiniatureTaskRunner(self.clock, transform)


class TestProcess:
    @pytest.mark.parametrize("shards", [1, 4])
    def test_every_record_is_processed_once_by_its_shards_task(self, shards: int) -> None:
        stream = Stream(shards=shards)
        stream.put(300)
        runner = stream.run(Everything)
        runner.run()
        assert sorted(runner.sent) == list(range(300))
        assert len(CALLS) == shards
        for calls in CALLS.values():
            assert calls[0] == "init"
            assert calls.count("init") == 1
            numbers = [int(c) for c in calls[1:]]
            assert numbers == sorted(numbers)

    def test_an_envelope_keeps_kinesis_fields_beside_the_decoded_message(self) -> None:
        stream = Stream()
        stream.put(1)
        seen: list[Any] = []
        SEEN.append(seen)
        stream.run(Keeping).run()
        (envelope,) = seen
        assert (envelope.message, envelope.key, envelope.shard_id) == (0, "key-0", "shardId-000000000000")
        assert envelope.offset == envelope.sequence_number
        assert envelope.approximate_arrival_timestamp is not None

    def test_a_commit_ends_the_bundle_after_this_very_record(self) -> None:
        stream = Stream()
        stream.put(30)
        runner = stream.run(Everything)
        runner.finish_attempt(runner.first())
        assert runner.sent == list(range(14))
        runner.run()
        assert runner.sent == list(range(30))

    def test_asynchronous_messages_come_out_in_order_and_once(self) -> None:
        stream = Stream(shards=2)
        stream.put(200)
        runner = stream.run(Coroutines, {"task.max.concurrency": "5"})
        runner.run()
        assert sorted(runner.sent) == list(range(200))

    def test_a_message_that_cannot_be_decoded_fails_the_bundle_with_its_place(self) -> None:
        stream = Stream()
        stream.put(1, data=b"{")
        with pytest.raises(SerdeError, match=r"of kinesis\.flights, shard shardId-000000000000: .*task\.drop\.deser"):
            stream.run(Echo).run()

    def test_or_is_dropped_if_the_job_says_so(self) -> None:
        stream = Stream()
        stream.put(1, data=b"{")
        stream.put(1)
        runner = stream.run(Echo, {"task.drop.deserialization.errors": "true"})
        runner.run()
        assert runner.sent == [1]


SEEN: list[list[Any]] = []


class Keeping(StreamTask):
    def process(self, envelope: Any, collector: Any, coordinator: Any) -> None:
        SEEN[-1].append(envelope)


class TestWindows:
    def test_windows_come_without_messages_and_their_output_is_not_late(self) -> None:
        stream = Stream()
        stream.put(5)
        runner = stream.run(Everything, {"task.window.ms": "1000"})
        runner.run(idle_rounds=5)
        begin = stream.clock.now_seconds()
        while stream.clock.now_seconds() < begin + 10:
            runner.bundle()
        windows = CALLS["0"].count("window")
        assert 9 <= windows <= 11
        assert runner.sent[5:] == ["0: 5"] * (len(runner.sent) - 5)

    def test_windows_go_on_in_their_phase_when_every_bundle_begins_anew(self) -> None:
        stream = Stream()
        runner = stream.run(Everything, {"task.window.ms": "1000"})
        begin = stream.clock.now_seconds()
        while stream.clock.now_seconds() < begin + 5:
            runner.failing_bundle()
        assert 4 <= CALLS["0"].count("window") <= 6

    def test_a_window_does_not_wait_for_the_end_of_a_backlog(self) -> None:
        stream = Stream()
        stream.put(2000)
        runner = stream.run(Slow, {"task.window.ms": "100"})
        Slow.clock = stream.clock
        runner.run()
        assert CALLS["0"].count("window") >= 15


class Slow(Everything):
    clock: SimulatedClock

    def process(self, envelope: Any, collector: Any, coordinator: Any) -> None:
        Slow.clock.advance(0.001)
        super().process(envelope, collector, coordinator)


class TestFailure:
    def test_an_instance_is_kept_from_bundle_to_bundle(self) -> None:
        stream = Stream()
        runner = stream.run(Everything)
        for _ in range(5):
            stream.put(10)
            runner.run(idle_rounds=20)
        assert CALLS["0"].count("init") == 1

    def test_a_bundle_that_fails_downstream_takes_its_instance_with_it(self) -> None:
        stream = Stream()
        stream.put(10)
        runner = stream.run(Everything)
        runner.first().generator.close()
        assert CALLS["0"][-1] == "close"
        runner.run()
        assert CALLS["0"].count("init") == 2
        assert runner.sent == list(range(10))

    def test_so_does_one_that_fails_after_process_returned(self) -> None:
        """The sink's finish_bundle comes after: the restriction comes back as it was."""
        stream = Stream()
        stream.put(10)
        runner = stream.run(Everything)
        attempt = runner.first()
        while runner.step(attempt):
            pass
        runner.run()
        assert CALLS["0"].count("init") == 2
        assert runner.sent == list(range(10))

    def test_so_does_one_that_fails_after_a_mere_window(self) -> None:
        stream = Stream()
        runner = stream.run(Everything, {"task.window.ms": "1000"})
        runner.run(idle_rounds=2)
        stream.clock.advance(1)
        attempt = runner.begin()
        while runner.step(attempt):
            pass
        assert CALLS["0"].count("window") == 1
        runner.bundle()
        assert CALLS["0"].count("init") == 2

    def test_what_a_task_raises_fails_the_bundle_and_the_record_comes_again(self) -> None:
        stream = Stream()
        stream.put(20)
        runner = stream.run(Failing)
        Failing.fail_at = 7
        with pytest.raises(RuntimeError, match="once"):
            runner.run()
        runner.run()
        assert runner.sent == list(range(20))

    def test_a_split_in_the_middle_loses_and_repeats_nothing(self) -> None:
        stream = Stream()
        stream.put(1000)
        runner = stream.run(Echo)
        for _ in range(3):
            runner.split_bundle(after_batches=1)
        runner.run()
        assert runner.sent == list(range(1000))


class TestEnds:
    def test_the_end_of_a_shard_is_told_before_its_childrens_tasks_begin(self) -> None:
        stream = Stream()
        stream.put(10)
        stream.fake.split("flights", stream.open_shards[0])
        stream.put(20)
        runner = stream.run(Everything)
        runner.run()
        end = ORDER.index("0 end of stream")
        assert ORDER[end + 1] == "0 close"
        assert min(ORDER.index("1 init"), ORDER.index("2 init")) > end
        assert "end of 0" in runner.sent
        numbers = [m for m in runner.sent if isinstance(m, int)]
        assert sorted(numbers) == list(range(30))

    def test_a_bounded_run_ends_and_tells_its_tasks(self) -> None:
        stream = Stream(shards=2)
        stream.put(50)
        runner = stream.run(Everything, stop_at=StopPosition.now())
        runner.run()
        assert runner.is_done
        assert [calls[-2:] for calls in CALLS.values()] == [["end of stream", "close"]] * 2

    def test_a_task_can_stop_all(self) -> None:
        stream = Stream(shards=1)
        stream.put(50)
        Stopping.scope = RequestScope.ALL_TASKS_IN_CONTAINER
        runner = stream.run(Stopping)
        runner.run()
        assert runner.is_done
        assert runner.sent == list(range(11))

    def test_a_vote_of_one_of_two_stops_nobody(self) -> None:
        stream = Stream(shards=2)
        stream.put(50)
        Stopping.scope = RequestScope.CURRENT_TASK
        runner = stream.run(Stopping)
        runner.run()
        assert not runner.is_done
        assert len(runner.sent) == 50


STORES = {
    "stores.seen.factory": "x", "stores.seen.key.serde": "string", "stores.seen.msg.serde": "json",
    "stores.seen.changelog": "kafka.seen",
    "stores.count.factory": "x", "stores.count.key.serde": "string", "stores.count.msg.serde": "json",
    "stores.count.changelog": "kafka.count",
}  # fmt: skip


class TestStores:
    def test_output_that_failed_is_sent_again_though_state_was_written(self, tmp_path: Path) -> None:
        stream = Stream()
        stream.put(10)
        runner = stream.run(Deduplicate, STORES, checkpoints=MemoryCheckpointStore(str(tmp_path)))
        attempt = runner.first()
        while runner.step(attempt):
            pass
        runner.run()
        assert runner.sent == list(range(10))

    @pytest.mark.parametrize("seed", range(8))
    def test_state_is_exactly_that_of_the_position_whatever_fails(self, tmp_path: Path, seed: int) -> None:
        rng = random.Random(seed)
        stream = Stream()
        runner = stream.run(Counting, STORES, checkpoints=MemoryCheckpointStore(str(tmp_path)))
        for _ in range(30):
            stream.put(rng.randrange(30))
            what = rng.choice(["bundle", "fails", "fails at its end", "new process", "split"])
            if what == "bundle":
                runner.bundle()
            elif what == "fails":
                runner.failing_bundle()
            elif what == "fails at its end":
                attempt = runner.begin()
                while runner.step(attempt):
                    pass
            elif what == "split":
                runner.split_bundle(after_batches=rng.randrange(2))
            else:
                runner.new_process()
        runner.run()
        assert runner.sent == [(n, n + 1) for n in range(stream.count)]


class TestCheckpoints:
    def test_a_row_for_every_shard_with_the_first_bundle_its_pinned_start_included(self, tmp_path: Path) -> None:
        store = MemoryCheckpointStore(str(tmp_path))
        stream = Stream(shards=3)
        runner = stream.run(Echo, checkpoints=store, starting_position=StartingPosition.latest())
        pinned = Position.at_timestamp(Timestamp(stream.clock.now_seconds()))
        runner.bundle()
        assert {r.position for r in store.load("flights").values()} == {pinned}

    def test_rows_move_with_commits_only(self, tmp_path: Path) -> None:
        store = MemoryCheckpointStore(str(tmp_path))
        stream = Stream()
        runner = stream.run(Everything, checkpoints=store)
        runner.bundle()
        stream.put(13)
        runner.run(idle_rounds=20)
        (row,) = store.load("flights").values()
        assert row.position == Position.trim_horizon()
        stream.put(5)
        runner.run(idle_rounds=20)
        (row,) = store.load("flights").values()
        records = stream.fake.records("flights")
        assert row.position == Position.after(int(records[13].sequence_number), 0)

    def test_and_with_the_interval_of_the_job(self, tmp_path: Path) -> None:
        store = MemoryCheckpointStore(str(tmp_path))
        stream = Stream()
        runner = stream.run(Echo, {"task.commit.ms": "5000"}, checkpoints=store)
        stream.put(10)
        runner.run(idle_rounds=20)
        stream.put(10)
        runner.run(idle_rounds=20)
        stream.clock.advance(5)
        runner.run(idle_rounds=20)
        (row,) = store.load("flights").values()
        last = stream.fake.records("flights")[19]
        assert row.position == Position.after(int(last.sequence_number), 0)

    def test_a_failed_bundle_writes_no_row(self, tmp_path: Path) -> None:
        store = MemoryCheckpointStore(str(tmp_path))
        stream = Stream()
        stream.put(20)
        runner = stream.run(Everything, checkpoints=store)
        runner.lose_finalization = True
        runner.first().generator.close()
        assert store.load("flights") == {}

    def test_a_parents_end_is_written_with_its_children(self, tmp_path: Path) -> None:
        store = MemoryCheckpointStore(str(tmp_path))
        stream = Stream()
        stream.put(5)
        runner = stream.run(Echo, checkpoints=store)
        runner.run(idle_rounds=20)
        children = stream.fake.split("flights", stream.open_shards[0])
        runner.run(idle_rounds=20)
        rows = store.load("flights")
        parent = rows["shardId-000000000000"]
        assert parent.ended
        assert set(parent.children) == set(children)
        for child in children:
            assert rows[child].parents == ("shardId-000000000000",)
            assert rows[child].hash_key_range is not None

    def test_a_new_job_goes_on_where_the_old_one_committed(self, tmp_path: Path) -> None:
        store = MemoryCheckpointStore(str(tmp_path))
        stream = Stream()
        stream.put(20)
        old = stream.run(Everything, checkpoints=store)
        old.finish_attempt(old.first())
        again = stream.run(Everything, checkpoints=store, starting_position=StartingPosition.latest())
        again.run()
        assert again.sent == list(range(14, 20))

    def test_also_where_a_bounded_run_reached_its_stop_in_one_shard_before_the_other(self, tmp_path: Path) -> None:
        store = MemoryCheckpointStore(str(tmp_path))
        stream = Stream(shards=4)
        stream.put(40)
        stop = StopPosition.at_timestamp(Timestamp(stream.clock.now_seconds()))
        stream.put(10)
        old = stream.run(Everything, checkpoints=store, stop_at=stop)
        old.run()
        again = stream.run(Echo, checkpoints=store)
        again.run()
        assert sorted(again.sent) == list(range(40, 50))

    def test_unless_it_resets_its_offset(self, tmp_path: Path) -> None:
        store = MemoryCheckpointStore(str(tmp_path))
        stream = Stream()
        stream.put(20)
        old = stream.run(Everything, checkpoints=store)
        old.finish_attempt(old.first())
        reset = {"systems.kinesis.streams.flights.samza.reset.offset": "true"}
        again = stream.run(Everything, reset, checkpoints=store)
        again.run()
        assert again.sent == list(range(20))

    @pytest.mark.parametrize("seed", range(10))
    def test_jobs_that_are_killed_and_started_anew_while_shards_split_and_merge_lose_nothing(
        self, tmp_path: Path, seed: int
    ) -> None:
        rng = random.Random(seed)
        store = MemoryCheckpointStore(str(tmp_path))
        stream = Stream(shards=rng.choice([1, 2]))
        sent: list[int] = []
        config = {"task.commit.ms": "300"}
        for life in range(8):
            runner = stream.run(
                Echo, config, checkpoints=store, starting_position=None if life else StartingPosition.trim_horizon()
            )
            # The first rows must be there: a job without any begins at its own start, which here is LATEST.
            runner.lose_finalization = life > 0 and rng.random() < 0.2
            for _ in range(rng.randrange(1, 25)):
                stream.put(rng.randrange(8))
                if rng.random() < 0.1:
                    stream.fake.split("flights", rng.choice(stream.open_shards))
                elif rng.random() < 0.1 and len(stream.open_shards) > 1:
                    _merge(stream)
                runner.bundle()
            sent += runner.sent
            runner.new_process()
        last = stream.run(Echo, config, checkpoints=store)
        last.run()
        sent += last.sent
        assert set(range(stream.count)) - set(sent) == set()

    def test_a_store_that_fails_fails_the_job(self) -> None:
        stream = Stream()
        stream.put(20)
        runner = stream.run(Everything, checkpoints=Broken())
        with pytest.raises(CheckpointError, match="no disk"):
            runner.bundle()
        with pytest.raises(CheckpointError, match="no disk"):
            runner.bundle()


class Broken(MemoryCheckpointStore):
    def save(self, stream: str, checkpoints: Any) -> Any:
        raise CheckpointError("no disk")


def _merge(stream: Stream) -> None:
    shards = sorted((s for s in stream.fake.shards("flights") if not s.is_closed), key=lambda s: s.hash_key_range.start)
    stream.fake.merge("flights", shards[0].shard_id, shards[1].shard_id)


class TestOutput:
    def run_pipeline(self, stream: Stream, config: dict[str, str], task: Any = Echo, **options: Any) -> None:
        pipeline = beam.Pipeline("FnApiRunner")
        _ = pipeline | RunStreamTask(
            task,
            inputs=["kinesis.flights"],
            config={**JSON, **config},
            client=stream.fake.factory(),
            starting_position=StartingPosition.trim_horizon(),
            stop_at=StopPosition.at_timestamp(Timestamp(stream.clock.now_seconds() + 0.05)),
            clock=stream.clock,
            **options,
        )
        self.result = pipeline.run()
        self.result.wait_until_finish()

    def test_metrics_have_samzas_names(self) -> None:
        stream = Stream(clock=SystemClock())
        stream.fake.create_stream("delays", shards=1)
        stream.put(10)
        self.run_pipeline(stream, {"task.commit.ms": "200", "systems.kinesis.streams.delays.samza.msg.serde": "json"})
        found = self.result.metrics().query()
        counters = {c.key.metric.name: c.committed for c in found["counters"]}
        assert counters["process-calls"] == counters["send-calls"] == 10
        assert counters["commit-calls"] >= 1
        gauges = {g.key.metric.name: g.committed.value for g in found["gauges"]}
        assert gauges["messages-in-flight"] == 0
        assert gauges["millisBehindLatest"] >= 0
        latency = next(d for d in found["distributions"] if d.key.metric.name == "readLatency")
        assert latency.committed.count == 10
        assert latency.committed.min >= 0

    def test_messages_for_a_kinesis_system_are_written_with_their_serde_and_key(self) -> None:
        stream = Stream(shards=2, clock=SystemClock())
        stream.fake.create_stream("delays", shards=1)
        stream.put(40)
        self.run_pipeline(stream, {"systems.kinesis.streams.delays.samza.msg.serde": "json"})
        written: list[KinesisRecord] = stream.fake.records("delays")
        assert sorted(json.loads(r.data) for r in written) == list(range(40))
        assert {r.partition_key for r in written} == {f"key-{n}" for n in range(40)}

    def test_a_message_without_a_serde_that_is_no_bytes_is_refused_with_the_key_to_set(self) -> None:
        message = OutgoingMessageEnvelope(OUT, 5)
        from samza_kinesis_io.job_config import Serdes

        with pytest.raises(SerdeError, match=r"systems\.kinesis\.streams\.delays\.samza\.msg\.serde, or send bytes"):
            stream_task.outgoing_record(message, Serdes({}, {}, {}))

    @pytest.mark.parametrize(
        ("fields", "key"),
        [
            ({}, None),
            ({"key": "a"}, "a"),
            ({"key": 5}, "5"),
            ({"key": b"a"}, "a"),
            ({"key": "a", "partition_key": "b"}, "b"),
        ],
    )
    def test_the_partition_key_goes_before_the_key(self, fields: dict[str, Any], key: str | None) -> None:
        from samza_kinesis_io.job_config import Serdes

        message = OutgoingMessageEnvelope(OUT, b"x", **fields)
        assert stream_task.outgoing_record(message, Serdes({}, {}, {})).partition_key == key

    def test_all_output_is_there_as_pcollections_too(self) -> None:
        stream = Stream(clock=SystemClock())
        stream.put(10)
        with beam.Pipeline("FnApiRunner") as pipeline:
            outputs = pipeline | RunStreamTask(
                Echo,
                inputs=["kinesis.flights"],
                config=JSON,
                client=stream.fake.factory(),
                starting_position=StartingPosition.trim_horizon(),
                stop_at=StopPosition.at_timestamp(Timestamp(stream.clock.now_seconds() + 0.05)),
                write=False,
                clock=stream.clock,
            )
            from apache_beam.testing.util import assert_that, equal_to

            assert_that(outputs["kinesis.delays"] | beam.Map(lambda e: e.message), equal_to(list(range(10))))
            assert_that(outputs["kinesis.others"], equal_to([]), label="others")

    def test_checkpoints_are_kept_on_the_fn_api_runner(self, tmp_path: Path) -> None:
        store = MemoryCheckpointStore(str(tmp_path))
        stream = Stream(clock=SystemClock())
        stream.fake.create_stream("delays", shards=1)
        stream.put(20)
        self.run_pipeline(
            stream, {"systems.kinesis.streams.delays.samza.msg.serde": "json"}, Everything, checkpoints=store
        )
        (row,) = store.load("flights").values()
        assert row.position is not None
        assert row.position.is_sequence


class TestOptions:
    def test_a_class_that_is_no_task_is_refused(self) -> None:
        with pytest.raises(ConfigurationError, match="dict must be a StreamTask"):
            RunStreamTask(dict, inputs=["kinesis.flights"])  # type: ignore[arg-type]

    def test_a_path_that_leads_nowhere_is_refused(self) -> None:
        with pytest.raises(ConfigurationError, match=r"task\.class 'no\.such\.Task' cannot be imported"):
            RunStreamTask("no.such.Task", inputs=["kinesis.flights"])

    def test_without_inputs_the_message_names_the_key(self) -> None:
        with pytest.raises(ConfigurationError, match=r"task\.inputs is missing"):
            RunStreamTask(Echo)
