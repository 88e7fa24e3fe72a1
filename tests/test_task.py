"""The rules by which a task's calls take turns (Samza's RunLoop), one test each."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from apache_beam.utils.timestamp import Timestamp

from samza_kinesis_io.clock import SystemClock
from samza_kinesis_io.errors import ConfigurationError
from samza_kinesis_io.positions import Position
from samza_kinesis_io.records import KinesisRecord
from samza_kinesis_io.task import (
    AsyncStreamTask,
    ClosableTask,
    EndOfStreamListenerTask,
    InitableTask,
    KinesisIncomingMessageEnvelope,
    Operation,
    OutgoingMessageEnvelope,
    RequestScope,
    StreamTask,
    SystemStream,
    SystemStreamPartition,
    TaskCallback,
    TaskContext,
    TaskFailed,
    TaskOptions,
    TaskRunner,
    Ticks,
    Timers,
    WindowableTask,
    format_offset,
    parse_offset,
)
from samza_kinesis_io.testing.clock import SimulatedClock

SHARD = SystemStreamPartition("kinesis", "flights", "shardId-000000000000")
OUT = SystemStream("kinesis", "delays")


class NoMetrics:
    def counter(self, name: str, amount: int = 1) -> None: ...

    def gauge(self, name: str, value: int) -> None: ...


def context() -> TaskContext:
    return TaskContext(str(SHARD), frozenset({SHARD}), {}, NoMetrics())


def envelope(number: int) -> KinesisIncomingMessageEnvelope:
    record = KinesisRecord(b"%d" % number, str(number), f"key-{number}", 1_700_000_000.0 + number)
    return KinesisIncomingMessageEnvelope.of(record, SHARD, key=record.partition_key, message=record.data)


class Everything(StreamTask, InitableTask, WindowableTask, ClosableTask, EndOfStreamListenerTask):
    """Notes every call; `on_process` adds what a test wants."""

    def __init__(self, on_process: Callable[..., None] = lambda *_: None) -> None:
        self.calls: list[str] = []
        self.on_process = on_process

    def init(self, context: TaskContext) -> None:
        self.calls.append("init")

    def process(self, envelope: Any, collector: Any, coordinator: Any) -> None:
        self.calls.append(f"process {envelope.offset}")
        self.on_process(envelope, collector, coordinator)

    def window(self, collector: Any, coordinator: Any) -> None:
        self.calls.append("window")

    def on_end_of_stream(self, collector: Any, coordinator: Any) -> None:
        self.calls.append("end of stream")

    def close(self) -> None:
        self.calls.append("close")


class Callbacks(AsyncStreamTask, WindowableTask):
    """Keeps the callbacks for the test to complete."""

    def __init__(self) -> None:
        self.callbacks: dict[str, TaskCallback] = {}
        self.windows = 0

    def process_async(self, envelope: Any, collector: Any, coordinator: Any, callback: TaskCallback) -> None:
        collector.send(OutgoingMessageEnvelope(OUT, envelope.offset))
        if envelope.offset == "13":
            coordinator.commit()
        self.callbacks[envelope.offset] = callback

    def window(self, collector: Any, coordinator: Any) -> None:
        self.windows += 1


def runner(task: Any, clock: Any = None, **options: Any) -> TaskRunner:
    return TaskRunner(task, context(), TaskOptions(**options), clock=clock or SimulatedClock())


def sent(run: TaskRunner) -> list[Any]:
    return [m.message for s in run.take_sent() for m in s.messages]


def finish(run: TaskRunner, envelopes: list[KinesisIncomingMessageEnvelope]) -> None:
    """Give the task envelopes side by side and wait until all are done."""
    for each in envelopes:
        run.process(each)
    while run.in_flight:
        run.next_operation()
        run.wait(10)
    run.next_operation()


class TestPriority:
    def test_commit_goes_before_window_before_callback_before_end_before_message(self) -> None:
        clock = SimulatedClock()
        run = runner(Everything(), clock, window_seconds=1, commit_seconds=1)
        run.context.callback_scheduler.schedule_callback("k", Timestamp(0), lambda key, col, coord: None)
        clock.advance(1)
        assert run.next_operation(has_message=True) is Operation.COMMIT
        run.committed()
        assert run.next_operation(has_message=True) is Operation.WINDOW
        run.window()
        assert run.next_operation(has_message=True) is Operation.CALLBACK
        run.callback()
        assert run.next_operation(at_end=True, has_message=True) is Operation.PROCESS
        assert run.next_operation(at_end=True) is Operation.END_OF_STREAM
        run.end_of_stream()
        assert run.next_operation(at_end=True) is None

    def test_a_commit_the_task_asks_for_comes_before_its_next_message(self) -> None:
        run = runner(Everything(lambda env, col, coord: coord.commit()))
        run.process(envelope(1))
        assert run.next_operation(has_message=True) is Operation.COMMIT
        run.committed()
        assert run.next_operation(has_message=True) is Operation.PROCESS

    def test_what_is_urgent_holds_back_the_next_message_while_it_waits_for_those_in_flight(self) -> None:
        clock = SimulatedClock()
        task = Callbacks()
        run = runner(task, clock, window_seconds=1, max_concurrency=2)
        run.process(envelope(1))
        assert run.next_operation(has_message=True) is Operation.PROCESS
        clock.advance(1)
        assert run.next_operation(has_message=True) is None
        task.callbacks["1"].complete()
        assert run.next_operation(has_message=True) is Operation.WINDOW


class TestExclusion:
    def test_no_second_message_while_one_is_in_flight(self) -> None:
        task = Callbacks()
        run = runner(task)
        run.process(envelope(1))
        assert run.next_operation(has_message=True) is None
        task.callbacks["1"].complete()
        assert run.next_operation(has_message=True) is Operation.PROCESS

    def test_as_many_messages_in_flight_as_max_concurrency(self) -> None:
        run = runner(Callbacks(), max_concurrency=3)
        started = 0
        while run.next_operation(has_message=True) is Operation.PROCESS:
            run.process(envelope(started))
            started += 1
        assert started == run.in_flight == 3

    @pytest.mark.parametrize("what", ["commit", "callback", "end"])
    def test_commit_callback_and_end_wait_for_what_is_in_flight(self, what: str) -> None:
        task = Callbacks()
        run = runner(task)
        run.process(envelope(1))
        if what == "commit":
            run.request_commit()
        elif what == "callback":
            run.context.callback_scheduler.schedule_callback("k", Timestamp(0), lambda *_: None)
        assert run.next_operation(at_end=what == "end") is None
        task.callbacks["1"].complete()
        assert run.next_operation(at_end=what == "end") is not None

    def test_concurrency_needs_an_asynchronous_task(self) -> None:
        with pytest.raises(ConfigurationError, match=r"max_concurrency 2 needs an AsyncStreamTask.*Everything"):
            runner(Everything(), max_concurrency=2)


class TestTimers:
    def test_the_first_window_is_a_full_interval_after_the_start(self) -> None:
        clock = SimulatedClock()
        run = runner(Everything(), clock, window_seconds=10)
        clock.advance(9.99)
        assert run.next_operation() is None
        assert run.due_seconds() == pytest.approx(0.01)
        clock.advance(0.01)
        assert run.next_operation() is Operation.WINDOW

    def test_windows_come_without_any_message(self) -> None:
        clock = SimulatedClock()
        task = Everything()
        run = runner(task, clock, window_seconds=10, commit_seconds=None)
        for _ in range(3):
            clock.advance(10)
            assert run.next_operation() is Operation.WINDOW
            run.window()
        assert task.calls == ["window"] * 3

    def test_missed_ticks_become_one_and_the_rate_stays(self) -> None:
        clock = SimulatedClock(0.0)
        run = runner(Everything(), clock, window_seconds=10, commit_seconds=None)
        clock.advance(57)
        assert run.next_operation() is Operation.WINDOW
        run.window()
        assert run.next_operation() is None
        assert run.due_seconds() == pytest.approx(3)

    def test_no_window_without_an_interval(self) -> None:
        clock = SimulatedClock()
        run = runner(Everything(), clock, window_seconds=None, commit_seconds=None)
        clock.advance(1e6)
        assert run.next_operation() is None
        assert run.due_seconds() is None

    def test_an_instance_built_anew_goes_on_in_the_old_phase(self) -> None:
        clock = SimulatedClock()
        options = TaskOptions(window_seconds=10)
        timers = Timers.starting(options, clock.monotonic_seconds())
        for _ in range(3):
            clock.advance(4)
            run = TaskRunner(Everything(), context(), options, clock=clock, timers=timers)
        assert run.next_operation() is Operation.WINDOW

    def test_a_tick_that_falls_on_its_moment_is_taken_once(self) -> None:
        ticks = Ticks(5, 0)
        assert [ticks.take(t) for t in (4.9, 5, 5, 9.9, 10)] == [False, True, False, False, True]

    def test_a_window_slower_than_its_interval_is_warned_about_once(self, caplog: pytest.LogCaptureFixture) -> None:
        clock = SimulatedClock()

        class Slow(Everything):
            def window(self, collector: Any, coordinator: Any) -> None:
                clock.advance(11)

        run = runner(Slow(), clock, window_seconds=10)
        run.window()
        run.window()
        assert len(caplog.records) == 1
        assert "window() takes 11.000 s on average" in caplog.text


class TestScheduledCallbacks:
    def test_the_same_key_replaces_and_delete_forgets(self) -> None:
        clock = SimulatedClock(100.0)
        run = runner(Everything(), clock)
        called: list[str] = []
        scheduler = run.context.callback_scheduler
        scheduler.schedule_callback("a", Timestamp(101), lambda *_: called.append("old"))
        scheduler.schedule_callback("a", Timestamp(105), lambda *_: called.append("new"))
        scheduler.schedule_callback("b", Timestamp(102), lambda *_: called.append("deleted"))
        scheduler.delete_callback("b")
        clock.advance(4)
        assert run.next_operation() is None
        assert run.due_seconds() == pytest.approx(1)
        clock.advance(1)
        assert run.next_operation() is Operation.CALLBACK
        run.callback()
        assert called == ["new"]
        assert run.next_operation() is None

    def test_a_callback_is_given_its_key_and_may_send_and_schedule_itself_again(self) -> None:
        clock = SimulatedClock(100.0)
        run = runner(Everything(), clock)
        scheduler = run.context.callback_scheduler

        def again(key: Any, collector: Any, coordinator: Any) -> None:
            collector.send(OutgoingMessageEnvelope(OUT, key))
            scheduler.schedule_callback(key, Timestamp(clock.now_seconds() + 1), again)

        scheduler.schedule_callback("k", Timestamp(101), again)
        for _ in range(3):
            clock.advance(1)
            assert run.next_operation() is Operation.CALLBACK
            run.callback()
        assert sent(run) == ["k"] * 3


class TestCompletion:
    def test_the_position_moves_over_the_contiguous_prefix_only(self) -> None:
        task = Callbacks()
        run = runner(task, max_concurrency=4)
        for n in (1, 2, 3, 4):
            run.process(envelope(n))
        task.callbacks["3"].complete()
        task.callbacks["2"].complete()
        assert sent(run) == []
        assert run.last_processed is None
        task.callbacks["1"].complete()
        assert sent(run) == ["1", "2", "3"]
        assert run.last_processed is not None
        assert run.last_processed.offset == "3"
        assert run.in_flight == 1

    def test_a_commit_includes_the_message_that_asked_for_it(self) -> None:
        task = Callbacks()
        run = runner(task, max_concurrency=2)
        run.process(envelope(13))
        run.process(envelope(14))
        task.callbacks["13"].complete()
        assert run.next_operation(has_message=True) is None, "the commit waits for 14 in flight"
        task.callbacks["14"].complete()
        assert run.next_operation(has_message=True) is Operation.COMMIT
        assert run.last_processed is not None
        assert run.last_processed.offset == "14"

    def test_completing_twice_fails_the_task(self) -> None:
        task = Callbacks()
        run = runner(task)
        run.process(envelope(1))
        task.callbacks["1"].complete()
        task.callbacks["1"].complete()
        with pytest.raises(TaskFailed, match="completed the callback of offset 1 twice"):
            run.next_operation()

    def test_a_callback_that_comes_too_late_fails_the_task(self) -> None:
        clock = SimulatedClock()
        run = runner(Callbacks(), clock, callback_timeout_seconds=5, commit_seconds=None)
        run.process(envelope(1))
        assert run.due_seconds() == pytest.approx(5)
        clock.advance(5)
        with pytest.raises(TaskFailed, match=r"did not complete offset 1 within task.callback.timeout.ms = 5000"):
            run.next_operation()

    def test_a_failure_from_another_thread_is_raised_to_the_owner_and_the_position_stays(self) -> None:
        task = Callbacks()
        run = runner(task, max_concurrency=2)
        run.process(envelope(1))
        run.process(envelope(2))
        task.callbacks["2"].complete()
        thread = threading.Thread(target=task.callbacks["1"].failure, args=(OSError("gone"),))
        thread.start()
        thread.join()
        with pytest.raises(OSError, match="gone"):
            run.next_operation()
        assert run.last_processed is None

    def test_coroutines_run_beside_each_other_and_their_end_is_completion(self) -> None:
        """The first waits for the second: with one at a time neither would ever end."""
        import asyncio

        class Meeting(AsyncStreamTask):
            async def process_async(self, envelope: Any, collector: Any, coordinator: Any, callback: Any) -> None:
                if envelope.offset == "1":
                    self.second_came = asyncio.Event()
                    await self.second_came.wait()
                else:
                    while not hasattr(self, "second_came"):
                        await asyncio.sleep(0)
                    self.second_came.set()
                collector.send(OutgoingMessageEnvelope(OUT, envelope.offset))

        run = runner(Meeting(), SystemClock(), max_concurrency=2)
        finish(run, [envelope(1), envelope(2)])
        assert sent(run) == ["1", "2"]

    def test_a_coroutine_that_raises_fails_the_task(self) -> None:
        class Bad(AsyncStreamTask):
            async def process_async(self, envelope: Any, collector: Any, coordinator: Any, callback: Any) -> None:
                raise ValueError("no flight number")

        run = runner(Bad(), SystemClock())
        with pytest.raises(ValueError, match="no flight number"):
            finish(run, [envelope(1)])


class TestFailure:
    def test_what_process_raises_reaches_the_owner_with_nothing_sent_and_no_request_heard(self) -> None:
        def bad(env: Any, collector: Any, coordinator: Any) -> None:
            collector.send(OutgoingMessageEnvelope(OUT, "half"))
            coordinator.commit()
            raise KeyError("flight")

        run = runner(Everything(bad), commit_seconds=None)
        with pytest.raises(KeyError):
            run.process(envelope(1))
        assert run.last_processed is None
        assert sent(run) == []

    @pytest.mark.parametrize("names", [{"KeyError"}, {"builtins.KeyError"}, {"*"}])
    def test_an_ignored_exception_counts_as_processed(self, names: set[str]) -> None:
        def bad(env: Any, collector: Any, coordinator: Any) -> None:
            raise KeyError("flight")

        run = runner(Everything(bad), ignored_exceptions=frozenset(names))
        run.process(envelope(1))
        assert run.last_processed is not None
        assert run.counts["exception-ignored-KeyError"] == 1

    def test_exceptions_are_ignored_in_window_too_and_others_are_not(self) -> None:
        class Bad(Everything):
            def window(self, collector: Any, coordinator: Any) -> None:
                raise KeyError

        runner(Bad(), ignored_exceptions=frozenset({"KeyError"})).window()
        with pytest.raises(KeyError):
            runner(Bad(), ignored_exceptions=frozenset({"ValueError"})).window()

    def test_a_collector_kept_beyond_its_call_is_refused(self) -> None:
        kept: list[Any] = []
        run = runner(Everything(lambda env, collector, coord: kept.append(collector)))
        run.process(envelope(1))
        with pytest.raises(TaskFailed, match="use the collector of each call"):
            kept[0].send(OutgoingMessageEnvelope(OUT, "late"))


class TestRequests:
    def test_a_later_request_within_one_call_replaces_the_earlier(self) -> None:
        def both(env: Any, collector: Any, coordinator: Any) -> None:
            coordinator.commit(RequestScope.ALL_TASKS_IN_CONTAINER)
            coordinator.commit(RequestScope.CURRENT_TASK)

        run = runner(Everything(both))
        run.process(envelope(1))
        assert not run.commit_all_requested
        assert run.next_operation() is Operation.COMMIT

    def test_a_commit_of_all_tasks_is_told_to_the_owner(self) -> None:
        run = runner(Everything(lambda env, col, coord: coord.commit(RequestScope.ALL_TASKS_IN_CONTAINER)))
        run.process(envelope(1))
        assert run.commit_all_requested

    def test_a_shutdown_vote_is_kept_while_messages_still_come_and_can_only_be_raised(self) -> None:
        scopes = iter([RequestScope.CURRENT_TASK, None, RequestScope.ALL_TASKS_IN_CONTAINER, RequestScope.CURRENT_TASK])

        def vote(env: Any, collector: Any, coordinator: Any) -> None:
            scope = next(scopes)
            if scope is not None:
                coordinator.shutdown(scope)

        run = runner(Everything(vote))
        votes = []
        for n in range(4):
            assert run.next_operation(has_message=True) is Operation.PROCESS
            run.process(envelope(n))
            votes.append(run.shutdown_vote)
        current, everyone = RequestScope.CURRENT_TASK, RequestScope.ALL_TASKS_IN_CONTAINER
        assert votes == [current, current, everyone, everyone]

    def test_a_commit_asked_for_together_with_a_shutdown_comes_first(self) -> None:
        def last(env: Any, collector: Any, coordinator: Any) -> None:
            coordinator.commit()
            coordinator.shutdown(RequestScope.ALL_TASKS_IN_CONTAINER)

        run = runner(Everything(last))
        run.process(envelope(1))
        assert run.next_operation(has_message=True) is Operation.COMMIT


class TestLifeCycle:
    def test_init_is_first_and_close_is_last(self) -> None:
        clock = SimulatedClock()
        task = Everything()
        run = runner(task, clock, window_seconds=1)
        run.start()
        run.process(envelope(1))
        clock.advance(1)
        run.window()
        run.end_of_stream()
        run.close()
        assert task.calls == ["init", "process 1", "window", "end of stream", "close"]

    def test_the_end_of_the_stream_is_told_once_and_windows_stop(self) -> None:
        clock = SimulatedClock()
        run = runner(Everything(), clock, window_seconds=1, commit_seconds=None)
        assert run.next_operation(at_end=True) is Operation.END_OF_STREAM
        run.end_of_stream()
        clock.advance(10)
        assert run.next_operation(at_end=True) is None
        assert run.due_seconds() is None

    def test_a_task_of_another_kind_is_refused_by_name(self) -> None:
        with pytest.raises(ConfigurationError, match="must be a StreamTask or AsyncStreamTask, got dict"):
            runner({})

    def test_a_store_that_is_not_configured_is_refused_with_the_key_to_add(self) -> None:
        with pytest.raises(ConfigurationError, match=r"'seen', configured: none; add stores.seen.factory"):
            context().get_store("seen")

    def test_calls_are_counted_by_samzas_names(self) -> None:
        run = runner(Everything(lambda env, col, coord: col.send(OutgoingMessageEnvelope(OUT, 1))), window_seconds=1)
        run.process(envelope(1))
        run.window()
        run.committed()
        assert dict(run.counts) == {
            "process-calls": 1, "send-calls": 1, "window-calls": 1, "commit-calls": 1,
        }  # fmt: skip


class TestNouns:
    def test_a_system_stream_is_split_at_the_first_dot(self) -> None:
        assert SystemStream.parse("kinesis.flights.v2") == SystemStream("kinesis", "flights.v2")

    @pytest.mark.parametrize("bad", ["flights", ".flights", "kinesis.", ""])
    def test_a_system_stream_without_two_parts_is_refused(self, bad: str) -> None:
        with pytest.raises(ConfigurationError, match="task.inputs must be written system.stream"):
            SystemStream.parse(bad, "task.inputs")

    def test_a_partition_is_printed_as_samza_prints_it(self) -> None:
        assert str(SHARD) == "SystemStreamPartition [kinesis, flights, shardId-000000000000]"

    def test_an_envelope_keeps_what_only_kinesis_knows(self) -> None:
        record = KinesisRecord(
            b"{}", "495", "AA", 1_700_000_000.123, "KMS", sub_sequence_number=2, explicit_hash_key="7"
        )
        got = KinesisIncomingMessageEnvelope.of(record, SHARD, key="AA", message={})
        assert (got.offset, got.message, got.size_bytes) == ("495/2", {}, 2)
        assert (got.shard_id, got.sequence_number, got.sub_sequence_number) == (SHARD.partition, "495", 2)
        assert (got.explicit_hash_key, got.encryption_type) == ("7", "KMS")
        assert got.approximate_arrival_timestamp == Timestamp(micros=1_700_000_000_123_000)

    @pytest.mark.parametrize(
        ("offset", "position"),
        [
            ("495", Position.after(495, 0)),
            ("495/3", Position.after(495, 3)),
            ('{"shardId": "shardId-000000000000", "seqNumber": "495"}', Position.after(495, 0)),
        ],
    )
    def test_an_offset_is_read_in_our_form_and_in_samzas(self, offset: str, position: Position) -> None:
        assert parse_offset(offset) == position

    def test_an_offset_that_was_formatted_is_read_back(self) -> None:
        assert parse_offset(format_offset("495", 3)) == Position.after(495, 3)

    @pytest.mark.parametrize("bad", ["", "x", "1/", "{}", '["1"]', "-3", "{"])
    def test_anything_else_is_refused(self, bad: str) -> None:
        with pytest.raises(ConfigurationError, match="an offset must be a sequence number"):
            parse_offset(bad)
