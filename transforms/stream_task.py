"""`RunStreamTask`: Samza's stream tasks inside the loop that reads.

A task could be a DoFn behind a source, but then a runner may put a shuffle between them (the order of a shard is lost),
a claimed batch can't be ended where a task asks for a commit, and a window without messages needs timers that the
DirectRunner does not have. So the loop of `ReadShards` is Samza's RunLoop here: it claims one record, gives it to the
task of its shard, lets windows and callbacks have their turns, and ends the bundle for a commit.

    PlanShards ─► task loop (SDF) ─► take apart ─┬─► serialize ─► WriteToKinesis      (all of it one stage)
                                                 └─► outputs["system.stream"]

A container is what one worker process runs of one `RunStreamTask`; a host holds the task instances of one restriction.
An instance is kept from bundle to bundle as long as the restriction comes back with the number of claims that the last
bundle ended with. Any other number means that a bundle failed, or that another worker or attempt went on: then the
instance's memory does not fit the position, and a new one is made.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import os
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import apache_beam as beam
import msgspec
from apache_beam.metrics import Metrics
from apache_beam.transforms.window import GlobalWindow, TimestampedValue
from apache_beam.utils.timestamp import Duration, Timestamp
from apache_beam.utils.windowed_value import WindowedValue

from samza_kinesis_io import metrics
from samza_kinesis_io.checkpointing import Checkpointing, FrontierRows, SaveRows, nothing_to_save
from samza_kinesis_io.checkpoints import (
    CheckpointStore,
    DynamoDBCheckpointStore,
    FileCheckpointStore,
    MemoryCheckpointStore,
)
from samza_kinesis_io.client import ClientFactory
from samza_kinesis_io.clock import Clock, SystemClock
from samza_kinesis_io.consumer import Attachment, Batch, GroupKey, shared_consumer
from samza_kinesis_io.dynamodb import DynamoDBConfig
from samza_kinesis_io.errors import ConfigurationError, StaleAttachment
from samza_kinesis_io.job_config import InputStream, JobConfig, Serdes, StoreConfig, read_job
from samza_kinesis_io.positions import StartingPosition, StopPosition
from samza_kinesis_io.records import KinesisRecord, OutgoingRecord
from samza_kinesis_io.restriction import Advance, Claim, ShardFrontier, ShardKey, ShardState
from samza_kinesis_io.runners import check_checkpoints, check_read, restriction_count
from samza_kinesis_io.serdes import SerdeError
from samza_kinesis_io.sink import WriteToKinesis
from samza_kinesis_io.source import (
    BoundedFrontiers,
    DataLossPolicy,
    Frontiers,
    FrontierWatermark,
    PlanShards,
    ReadFromKinesis,
    ReadingLoop,
    ReadPlan,
    ShardGroup,
    advance,
    group_key,
)
from samza_kinesis_io.stores import ChangelogStore, StateTag
from samza_kinesis_io.task import (
    AsyncStreamTask,
    KinesisIncomingMessageEnvelope,
    Operation,
    OutgoingMessageEnvelope,
    RequestScope,
    StreamTask,
    SystemStream,
    SystemStreamPartition,
    TaskContext,
    TaskOptions,
    TaskRunner,
    Timers,
)
from samza_kinesis_io.watermark import WatermarkPolicy

_log = logging.getLogger(__name__)

#: Hosts that nobody asked for in this time are closed: their restriction went to another worker.
_IDLE_SECONDS: Final = 60.0
#: What tasks sent is handed on in batches of this many messages.
_BATCH_MESSAGES: Final = 200
#: How long one wait for an asynchronous task lasts until its deadlines are looked at again.
_LOOK_AGAIN_SECONDS: Final = 0.2

Task = StreamTask | AsyncStreamTask


@dataclass(frozen=True, slots=True)
class TaskPlan:
    """Everything that workers must know of a job's inputs in one read. Holds no secret.

    Attributes:
        container: Names the job's containers: tasks of one name in one process are one container's.
        read: How the streams are read, and where their checkpoints are kept.
        system_streams: The streams as tasks know them, by their index.
        factory: Makes an instance for a shard.
    """

    container: str
    read: ReadPlan
    system_streams: tuple[SystemStream, ...]
    factory: Callable[[], Task]
    options: TaskOptions
    serdes: Serdes
    stores: tuple[StoreConfig, ...]
    config: Mapping[str, str]
    drop_deserialization_errors: bool


class SentBatch(msgspec.Struct, frozen=True):
    """What tasks sent, and when; one element."""

    messages: list[OutgoingMessageEnvelope]
    timestamps_micros: list[int]


# --- Instances ------------------------------------------------------------------------------------------------------


class _Host:
    """The task instances of one restriction. Used by one attempt at a time."""

    def __init__(self, container: _Container, key: GroupKey) -> None:
        self.container = container
        self.key = key
        self.claims: int | None = None
        self.busy = False
        self.used_at = 0.0
        self.runners: dict[ShardKey, TaskRunner] = {}
        self.stores: dict[ShardKey, tuple[ChangelogStore, ...]] = {}
        self.last_micros: dict[ShardKey, int] = {}
        self.due_seconds = 0.0
        self.rows = FrontierRows()
        self.messages: list[OutgoingMessageEnvelope] = []
        self.timestamps_micros: list[int] = []

    @property
    def in_flight(self) -> int:
        return sum(runner.in_flight for runner in self.runners.values())

    def collect(self, key: ShardKey, runner: TaskRunner, floor_micros: int) -> None:
        """Take over what a task sent. Never earlier than the watermark that was reported."""
        for sent in runner.take_sent():
            micros = (
                sent.timestamp_micros if sent.timestamp_micros is not None else self.last_micros.get(key, floor_micros)
            )
            self.messages.extend(sent.messages)
            self.timestamps_micros.extend([max(micros, floor_micros)] * len(sent.messages))
        if runner.commit_all_requested:
            runner.commit_all_requested = False
            self.container.request_commit()
        if runner.shutdown_vote is not None:
            self.container.is_voting = True

    def look_at(self, runner: TaskRunner, now: float) -> None:
        due = runner.due_seconds()
        if due is not None:
            self.due_seconds = min(self.due_seconds, now + due)

    def look_at_all(self, now: float) -> None:
        self.due_seconds = float("inf")
        for runner in self.runners.values():
            self.look_at(runner, now)

    def close(self) -> None:
        """Close the tasks, in good order or after a failure."""
        for runner in self.runners.values():
            try:
                runner.close()
            except Exception:
                _log.exception("%s: close() failed", runner.context.task_name)
        self.runners = {}


class _Container:
    """What one process runs of one `RunStreamTask`."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.hosts: dict[GroupKey, _Host] = {}
        self.timers: dict[tuple[str, ShardKey], Timers] = {}
        self.is_voting = False
        self.is_shut_down = False

    def acquire(self, key: GroupKey, frontier: ShardFrontier, now: float) -> _Host:
        """Return the host of a restriction: the one that its last bundle left, or a new one."""
        leftover: list[_Host] = []
        with self.lock:
            for other in list(self.hosts.values()):
                if not other.busy and now - other.used_at > _IDLE_SECONDS:
                    leftover.append(self.hosts.pop(other.key))
            host = self.hosts.get(key)
            if host is None or host.busy or host.claims != frontier.claims:
                if host is not None and not host.busy:
                    leftover.append(host)
                host = self.hosts[key] = _Host(self, key)
            host.busy = True
            host.used_at = now
        for other in leftover:
            other.close()
        return host

    def release(self, host: _Host, claims: int | None, now: float) -> None:
        """An attempt is over. Without `claims` it failed, and its instances with it."""
        with self.lock:
            host.busy = False
            host.claims = claims
            host.used_at = now
            current = self.hosts.get(host.key) is host
            if claims is None and current:
                del self.hosts[host.key]
        if claims is None or not current:
            host.close()

    def request_commit(self) -> None:
        with self.lock:
            runners = [r for host in self.hosts.values() for r in host.runners.values()]
            for host in self.hosts.values():
                host.due_seconds = 0.0
        for runner in runners:
            runner.request_commit()

    def has_voted(self) -> bool:
        """Whether a task shut all down, or all of them voted for it."""
        if self.is_shut_down:
            return True
        with self.lock:
            votes = [r.shutdown_vote for host in self.hosts.values() for r in list(host.runners.values())]
        self.is_shut_down = RequestScope.ALL_TASKS_IN_CONTAINER in votes or (bool(votes) and None not in votes)
        return self.is_shut_down


_containers: Final[dict[str, _Container]] = {}
_containers_lock = threading.Lock()


def _container(uid: str) -> _Container:
    with _containers_lock:
        return _containers.setdefault(uid, _Container())


def _forget_after_fork() -> None:
    """The parent's tasks are not the child's, and its lock may have been held."""
    global _containers_lock
    _containers_lock = threading.Lock()
    _containers.clear()


os.register_at_fork(after_in_child=_forget_after_fork)


class _BeamMetrics:
    """A task's own metrics, as Beam's; to be used on the thread that calls the task."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace

    def counter(self, name: str, amount: int = 1) -> None:
        Metrics.counter(self._namespace, name).inc(amount)

    def gauge(self, name: str, value: int) -> None:
        Metrics.gauge(self._namespace, name).set(value)


# --- The loop -------------------------------------------------------------------------------------------------------


class _Refused(Exception):
    """A claim was refused: the runner has split the restriction, and this bundle ends."""


class _TaskLoop(ReadingLoop):
    """Samza's RunLoop over the shards of a restriction.

    The orders of `ReadingLoop` hold here too: claim, process, emit, commit to the consumer, advance the watermark.
    What tasks send is gathered and emitted in batches; the watermark does not move before that, nor while an envelope
    is in flight. (Committing to the consumer before the batch is emitted is no harm: a bundle that fails in between
    comes back with fewer claims, which makes reader and tasks start anew.)
    """

    def __init__(self, plan: TaskPlan, clock: Clock) -> None:
        super().__init__(plan.read, clock)
        self._tasks = plan
        self._save: Callable[[], None] = nothing_to_save

    def _loop(self, element: ShardGroup, tracker: Any, estimator: Any, attachment: Attachment) -> Iterator[Any]:
        container = _container(self._tasks.container)
        self._save = nothing_to_save
        clock = self._clock
        frontier: ShardFrontier = tracker.current_restriction()
        host = container.acquire(group_key(element, frontier), frontier, clock.monotonic_seconds())
        claims: int | None = None
        try:
            try:
                host.rows.check()
                yield from self._turns(element, tracker, estimator, attachment, host)
            except StaleAttachment:
                # If the tracker was split, everything claimed counts as emitted: so it must be.
                self._join(host, estimator)
                yield from self._emit(host)
                raise
            claims = tracker.current_restriction().claims
        finally:
            container.release(host, claims, clock.monotonic_seconds())

    def _turns(
        self, element: ShardGroup, tracker: Any, estimator: Any, attachment: Attachment, host: _Host
    ) -> Iterator[Any]:
        plan, clock = self._plan, self._clock
        budget_seconds = plan.bundle_seconds / attachment.sharers
        deadline = clock.monotonic_seconds() + budget_seconds
        records_left, bytes_left = plan.bundle_records, plan.bundle_bytes
        evidence: dict[ShardKey, Advance] = {}
        progressed = polled = False
        frontier: ShardFrontier = tracker.current_restriction()
        self._open_tasks(host, frontier)
        commit = False
        try:
            while True:
                now = clock.monotonic_seconds()
                if now >= host.due_seconds:
                    commit = self._run_due(host, tracker, estimator) or commit
                    frontier = self._latest(tracker)
                if host.container.is_voting and host.container.has_voted():
                    yield from self._shut_down(host, tracker, attachment, estimator, frontier)
                    return
                # Not before the first look for messages: with an interval shorter than a bundle takes, one bundle after
                # the other would commit and none would read.
                if polled and (commit or now >= deadline or records_left <= 0 or bytes_left <= 0):
                    yield from self._end_bundle(host, tracker, attachment, estimator, frontier, commit)
                    tracker.defer_remainder()
                    return
                for proof in attachment.take_evidence():
                    self._observe_lag(proof)
                    bound = self._proved(proof, frontier)
                    evidence[proof.key] = Advance(proof.key, None, bound, proof.read_until_micros)
                batch = attachment.poll(1)
                polled = True
                if batch is None:
                    if host.in_flight:
                        self._wait_for_completion(host, estimator)
                        continue
                    yield from self._emit(host)
                    advance(estimator, frontier.watermark_micros)
                    if not self._claim_evidence(evidence, tracker, estimator, attachment):
                        raise _Refused
                    frontier = self._latest(tracker)
                    due = host.due_seconds - clock.monotonic_seconds()
                    if due <= 0:
                        continue
                    if not progressed and self._stop_is_past() and element.group_count == 1:
                        attachment.wait(min(due, max(budget_seconds, plan.source.poll_interval_seconds)))
                        deadline = clock.monotonic_seconds() + budget_seconds
                        continue
                    yield from self._end_bundle(host, tracker, attachment, estimator, frontier, commit)
                    defer_seconds = min(plan.defer_seconds, due)
                    shared_consumer(clock).set_resume_at(element.uid, clock.monotonic_seconds() + defer_seconds)
                    tracker.defer_remainder(Duration(micros=round(defer_seconds * 1e6)))
                    return
                self._observe_lag(batch)
                runner = host.runners[batch.key]
                if batch.records and not self._make_ready(batch.key, runner, host, tracker, estimator):
                    attachment.push_back(batch)
                    commit = True
                    continue
                state = next(s for s in frontier.shards if s.key == batch.key)
                claim, assigned = self._claim(element, batch, state, frontier, evidence)
                if not tracker.try_claim(claim):
                    attachment.push_back(batch)
                    raise _Refused
                evidence.clear()
                for record, micros in zip(batch.records, assigned, strict=True):
                    self._process(host, batch.key, runner, record, micros, estimator)
                self._report_in_flight(host)
                is_over = claim.replaced is not None
                if is_over and all(s.key != batch.key for s in claim.successors):
                    commit = self._end_shard(host, batch, state, estimator) or commit
                left: ShardFrontier = tracker.current_restriction()
                attachment.commit(batch, left)
                self._count_records(batch)
                if left.is_done and not tracker.try_claim(Claim(())):
                    raise _Refused  # not done but split: the rest, of which the tracker knows no more, is the residual
                frontier = left
                if frontier.is_done:
                    yield from self._end_bundle(host, tracker, attachment, estimator, frontier, commit)
                    return
                if is_over:
                    self._open_tasks(host, frontier)
                if len(host.messages) >= _BATCH_MESSAGES:
                    yield from self._emit(host)
                    if not host.in_flight:
                        advance(estimator, frontier.watermark_micros)
                progressed = True
                records_left -= len(batch.records)
                bytes_left -= batch.size_bytes
        except _Refused:
            yield from self._end_bundle(host, tracker, attachment, estimator, frontier, False)

    def _latest(self, tracker: Any) -> ShardFrontier:
        """Return the frontier of a restriction that is not done. A split leaves the tracker an empty one."""
        frontier: ShardFrontier = tracker.current_restriction()
        if frontier.is_done:
            raise _Refused
        return frontier

    # Tasks' turns.

    def _open_tasks(self, host: _Host, frontier: ShardFrontier) -> None:
        """Make a task for every shard that may be read and has none."""
        now = self._clock.monotonic_seconds()
        for state in frontier.ready():
            if state.key not in host.runners:
                host.runners[state.key] = self._new_runner(host, frontier, state)
        host.look_at_all(now)

    def _new_runner(self, host: _Host, frontier: ShardFrontier, state: ShardState) -> TaskRunner:
        plan = self._tasks
        stream = plan.system_streams[state.stream]
        partition = SystemStreamPartition(stream.system, stream.stream, state.shard_id)
        name = str(partition)
        checkpoints = plan.read.checkpointing.stores[state.stream]
        stores = {
            s.name: ChangelogStore(
                name,
                s.name,
                key_serde=s.key_serde,
                value_serde=s.value_serde,
                changelog=checkpoints if s.changelog else None,
                at=StateTag(frontier.nonce, frontier.claims, state.position),
                max_bytes=s.max_bytes,
            )
            for s in plan.stores
        }
        task = plan.factory()
        namespace = f"{type(task).__module__}.{type(task).__qualname__}"
        context = TaskContext(
            task_name=name,
            system_stream_partitions=frozenset({partition}),
            config=plan.config,
            metrics=_BeamMetrics(namespace),
            stores=stores,
        )
        timers = host.container.timers.get((host.key[0], state.key))
        runner = TaskRunner(task, context, plan.options, clock=self._clock, timers=timers)
        host.container.timers[(host.key[0], state.key)] = runner.timers
        host.stores[state.key] = tuple(stores.values())
        runner.start()
        return runner

    def _run_due(self, host: _Host, tracker: Any, estimator: Any) -> bool:
        """Let windows and callbacks that are due have their turns; return whether a commit is wanted."""
        commit = False
        for key, runner in host.runners.items():
            commit = self._run_urgent(key, runner, host, tracker, estimator) or commit
        host.look_at_all(self._clock.monotonic_seconds())
        if commit:
            host.due_seconds = 0.0
        return commit

    def _run_urgent(
        self, key: ShardKey, runner: TaskRunner, host: _Host, tracker: Any, estimator: Any, *, at_end: bool = False
    ) -> bool:
        """Run what comes before the next message, if it need not wait for what is in flight.

        Returns whether a commit is wanted, which is for the caller.
        """
        while True:
            operation = runner.next_operation(at_end=at_end)
            if operation is Operation.COMMIT:
                return True
            if operation is None:
                return False
            # A claim, though it takes nothing: a bundle that fails after it must not find this instance again.
            if not at_end and not tracker.try_claim(Claim(())):
                raise _Refused
            if operation is Operation.WINDOW:
                runner.window()
            elif operation is Operation.CALLBACK:
                runner.callback()
            else:
                runner.end_of_stream()
            host.collect(key, runner, estimator.current_watermark().micros)

    def _make_ready(self, key: ShardKey, runner: TaskRunner, host: _Host, tracker: Any, estimator: Any) -> bool:
        """Wait until the task can take a message. False: it wants a commit first."""
        while True:
            operation = runner.next_operation(has_message=True)
            if operation is Operation.PROCESS:
                return True
            if operation is Operation.COMMIT:
                return False
            if operation is None:
                runner.wait(_LOOK_AGAIN_SECONDS)
                host.collect(key, runner, estimator.current_watermark().micros)
            elif self._run_urgent(key, runner, host, tracker, estimator):
                return False

    def _process(
        self, host: _Host, key: ShardKey, runner: TaskRunner, record: KinesisRecord, micros: int, estimator: Any
    ) -> None:
        host.last_micros[key] = micros
        envelope = self._envelope(key, record)
        if envelope is not None:
            runner.process(envelope, micros)
            host.collect(key, runner, estimator.current_watermark().micros)
        host.look_at(runner, self._clock.monotonic_seconds())

    def _envelope(self, key: ShardKey, record: KinesisRecord) -> KinesisIncomingMessageEnvelope | None:
        """Return the record's envelope; None: it can't be deserialized and such are dropped."""
        stream = self._tasks.system_streams[key[0]]
        key_serde, message_serde = self._tasks.serdes.key(stream), self._tasks.serdes.message(stream)
        message_key: Any = record.partition_key
        message: Any = record.data
        try:
            if key_serde is not None and message_key is not None:
                message_key = key_serde.from_bytes(message_key.encode())
            if message_serde is not None:
                message = message_serde.from_bytes(message)
        except SerdeError as error:
            if self._tasks.drop_deserialization_errors:
                _count("deserialization error", 1)
                return None
            raise SerdeError(
                f"record {record.sequence_number} of {stream}, shard {key[1]}: {error}; correct its serde, or set "
                "task.drop.deserialization.errors=true to pass such records over"
            ) from error
        partition = SystemStreamPartition(stream.system, stream.stream, key[1])
        return KinesisIncomingMessageEnvelope.of(record, partition, key=message_key, message=message)

    def _end_shard(self, host: _Host, batch: Batch, state: ShardState, estimator: Any) -> bool:
        """A shard is over: tell its task, before its children's tasks begin. Return whether a commit is wanted."""
        runner = host.runners.pop(batch.key)
        while runner.in_flight:
            runner.next_operation()
            runner.wait(_LOOK_AGAIN_SECONDS)
        host.collect(batch.key, runner, estimator.current_watermark().micros)
        commit = False
        if batch.children is not None:
            while self._run_urgent(batch.key, runner, host, None, estimator, at_end=True):
                commit = True
                runner.committed()
            host.rows.end(state, batch)
        host.stores.pop(batch.key, None)
        runner.close()
        self._report_counts(runner)
        host.container.timers.pop((host.key[0], batch.key), None)
        host.last_micros.pop(batch.key, None)
        return commit or bool(batch.children)

    # The end of a bundle.

    def _end_bundle(
        self,
        host: _Host,
        tracker: Any,
        attachment: Attachment,
        estimator: Any,
        frontier: ShardFrontier,
        commit: bool,
    ) -> Iterator[Any]:
        self._join(host, estimator)
        yield from self._emit(host)
        advance(estimator, frontier.watermark_micros)
        # In every bundle, since the position moves with each: state must never be behind it.
        self._flush(host, attachment, frontier, tracker.current_restriction().claims)
        for runner in host.runners.values():
            if commit:
                runner.committed()
            self._report_counts(runner)
        now = self._clock.monotonic_seconds()
        checkpointing = self._plan.checkpointing
        if checkpointing.is_on and (commit or not host.rows.is_taken or frontier.is_done):
            rows = host.rows.take(frontier, now)
            self._save = SaveRows(
                self._plan.source, checkpointing, host.rows, rows, is_last=frontier.is_done, clock=self._clock
            )
        host.look_at_all(now)

    def _flush(self, host: _Host, attachment: Attachment, frontier: ShardFrontier, claims: int) -> None:
        if not self._tasks.stores:
            return
        attachment.commit(None, frontier)  # raises if a newer attempt writes the changelogs now
        positions = {state.key: state.position for state in frontier.shards}
        for key, stores in host.stores.items():
            if key in positions:
                tag = StateTag(frontier.nonce, claims, positions[key])
                for store in stores:
                    store.flush(tag)
                _count("flush-calls", 1)

    def _shut_down(
        self, host: _Host, tracker: Any, attachment: Attachment, estimator: Any, frontier: ShardFrontier
    ) -> Iterator[Any]:
        """The tasks want to stop: commit, and read no more. A new job goes on from the checkpoints."""
        yield from self._end_bundle(host, tracker, attachment, estimator, frontier, True)
        for state in frontier.shards:
            if not tracker.try_claim(Claim((), replaced=state.key)):
                return
        host.close()

    def _join(self, host: _Host, estimator: Any) -> None:
        """Wait for everything in flight: what is claimed belongs to this bundle."""
        for key, runner in host.runners.items():
            while runner.in_flight:
                runner.next_operation()
                runner.wait(_LOOK_AGAIN_SECONDS)
            runner.next_operation()  # raises what failed last
            host.collect(key, runner, estimator.current_watermark().micros)

    def _wait_for_completion(self, host: _Host, estimator: Any) -> None:
        key, runner = next((k, r) for k, r in host.runners.items() if r.in_flight)
        runner.next_operation()
        runner.wait(0.01)
        host.collect(key, runner, estimator.current_watermark().micros)
        host.look_at(runner, self._clock.monotonic_seconds())

    def _emit(self, host: _Host) -> Iterator[Any]:
        if host.messages:
            batch = SentBatch(host.messages, host.timestamps_micros)
            host.messages, host.timestamps_micros = [], []
            yield TimestampedValue(batch, Timestamp(micros=min(batch.timestamps_micros)))

    def _report_in_flight(self, host: _Host) -> None:
        Metrics.gauge(metrics.NAMESPACE, "messages-in-flight").set(host.in_flight)

    def _report_counts(self, runner: TaskRunner) -> None:
        counts, runner.counts = runner.counts, Counter()
        for name, value in counts.items():
            _count(name, value)

    def _observe_lag(self, batch: Batch) -> None:
        super()._observe_lag(batch)
        if batch.millis_behind_latest is not None:
            Metrics.gauge(metrics.NAMESPACE, "millisBehindLatest").set(batch.millis_behind_latest)

    def _count_records(self, batch: Batch) -> None:
        super()._count_records(batch)
        now = self._clock.now_seconds()
        for record in batch.records:
            latency_millis = max(0, round((now - record.approximate_arrival_seconds) * 1000))
            Metrics.distribution(metrics.NAMESPACE, "readLatency").update(latency_millis)

    def _finalize(self, finalizer: Any) -> None:
        """Have this bundle's rows saved when the runner has committed it. In every path: Prism wants a callback."""
        save, self._save = self._save, nothing_to_save
        finalizer.register(save)


def _count(name: str, value: int) -> None:
    if value:
        Metrics.counter(metrics.NAMESPACE, name).inc(value)


class _RunTasks(_TaskLoop):
    """Without end, without checkpoints."""

    @beam.DoFn.unbounded_per_element()
    def process(
        self,
        element: ShardGroup,
        tracker: Any = beam.DoFn.RestrictionParam(Frontiers()),  # noqa: B008 (Beam's way)
        estimator: Any = beam.DoFn.WatermarkEstimatorParam(FrontierWatermark()),  # noqa: B008
    ) -> Iterator[Any]:
        yield from self._read(element, tracker, estimator)


class _RunTasksToStop(_TaskLoop):
    """To a stop position, without checkpoints."""

    def process(
        self,
        element: ShardGroup,
        tracker: Any = beam.DoFn.RestrictionParam(BoundedFrontiers()),  # noqa: B008
        estimator: Any = beam.DoFn.WatermarkEstimatorParam(FrontierWatermark()),  # noqa: B008
    ) -> Iterator[Any]:
        yield from self._read(element, tracker, estimator)


class _RunTasksWithCheckpoints(_TaskLoop):
    """Without end, with checkpoints. A class of its own: the finalizer's mere presence costs on some runners."""

    @beam.DoFn.unbounded_per_element()
    def process(
        self,
        element: ShardGroup,
        finalizer: Any = beam.DoFn.BundleFinalizerParam,
        tracker: Any = beam.DoFn.RestrictionParam(Frontiers()),  # noqa: B008
        estimator: Any = beam.DoFn.WatermarkEstimatorParam(FrontierWatermark()),  # noqa: B008
    ) -> Iterator[Any]:
        yield from self._read(element, tracker, estimator)
        self._finalize(finalizer)


class _RunTasksWithCheckpointsToStop(_TaskLoop):
    """To a stop position, with checkpoints."""

    def process(
        self,
        element: ShardGroup,
        finalizer: Any = beam.DoFn.BundleFinalizerParam,
        tracker: Any = beam.DoFn.RestrictionParam(BoundedFrontiers()),  # noqa: B008
        estimator: Any = beam.DoFn.WatermarkEstimatorParam(FrontierWatermark()),  # noqa: B008
    ) -> Iterator[Any]:
        yield from self._read(element, tracker, estimator)
        self._finalize(finalizer)


# --- Behind the tasks -----------------------------------------------------------------------------------------------


class _TakeSentApart(beam.DoFn):
    """Gives every message its own timestamp."""

    def process(self, batch: SentBatch) -> Iterator[WindowedValue]:
        windows = (GlobalWindow(),)
        for message, micros in zip(batch.messages, batch.timestamps_micros, strict=True):
            yield WindowedValue(message, Timestamp(micros=micros), windows)


class _Serialize(beam.DoFn):
    """Turns the messages for one system into records of Kinesis."""

    def __init__(self, system: str, serdes: Serdes, *, drop_errors: bool) -> None:
        self._system = system
        self._serdes = serdes
        self._drop_errors = drop_errors

    def process(self, envelope: OutgoingMessageEnvelope) -> Iterator[OutgoingRecord]:
        if envelope.system_stream.system != self._system:
            return
        try:
            record = outgoing_record(envelope, self._serdes)
        except SerdeError:
            if not self._drop_errors:
                raise
            _count("serialization error", 1)
            return
        yield record


def outgoing_record(envelope: OutgoingMessageEnvelope, serdes: Serdes) -> OutgoingRecord:
    """Return the record of a message: serdes by the envelope's name, else its stream's, else its system's, else none.

    Raises:
        SerdeError: the message doesn't fit its serde, or there is none and it is no bytes; or its key is no text.
    """
    stream = envelope.system_stream
    serde = serdes.named(envelope.message_serializer) if envelope.message_serializer else serdes.message(stream)
    if serde is not None:
        data = serde.to_bytes(envelope.message)
    elif isinstance(envelope.message, (bytes, bytearray)):
        data = bytes(envelope.message)
    else:
        raise SerdeError(
            f"a message for {stream} is a {type(envelope.message).__qualname__} and there is no serde for it; set "
            f"systems.{stream.system}.streams.{stream.stream}.samza.msg.serde, or send bytes"
        )
    return OutgoingRecord(data=data, partition_key=_partition_key(envelope), stream=stream.stream)


def _partition_key(envelope: OutgoingMessageEnvelope) -> str | None:
    """Kinesis has one key, a text: the partition key, else the key. A key serde has nothing to write to."""
    key = envelope.partition_key if envelope.partition_key is not None else envelope.key
    if key is None or isinstance(key, str):
        return key
    if isinstance(key, (bytes, bytearray)):
        try:
            return bytes(key).decode()
        except UnicodeDecodeError as error:
            raise SerdeError(f"a partition key must be text, got the bytes {bytes(key)!r:.80}") from error
    return str(key)


# --- The transform --------------------------------------------------------------------------------------------------


class TaskOutputs:
    """What the tasks send: `outputs["system.stream"]` is a PCollection of `OutgoingMessageEnvelope`."""

    def __init__(self, everything: beam.PCollection[OutgoingMessageEnvelope]) -> None:
        self.all = everything
        self._selected: dict[SystemStream, beam.PCollection[OutgoingMessageEnvelope]] = {}

    def __getitem__(self, system_stream: str) -> beam.PCollection[OutgoingMessageEnvelope]:
        wanted = SystemStream.parse(system_stream, "an output")
        if wanted not in self._selected:
            self._selected[wanted] = self.all | f"To {wanted}" >> beam.Filter(_is_for, wanted).with_output_types(
                OutgoingMessageEnvelope
            )
        return self._selected[wanted]


def _is_for(envelope: OutgoingMessageEnvelope, wanted: SystemStream) -> bool:
    return envelope.system_stream == wanted


class RunStreamTask(beam.PTransform):
    """Runs a Samza task over Kinesis streams: one instance per shard, in the shard's order.

    What a task sends to a stream of a Kinesis system is written there, in the same stage, so that a commit is: outputs
    flushed, then the position moved. All of it is there as PCollections too, see `TaskOutputs`.

    Args:
        task: A class, or a function of no arguments, that gives a `StreamTask` or `AsyncStreamTask`; or the dotted path
            of one. None: `task.class` of the configuration.
        inputs: The streams, as "system.stream"; instead of `task.inputs`.
        config: A Samza job's keys and values; see docs/samza.md. Without `job.name` no checkpoints are kept.
        client: How to reach Kinesis; instead of what the configuration says of it.
        checkpoints: Where to keep checkpoints; instead of what the configuration says of it.
        starting_position: Where shards without a checkpoint start; instead of what the configuration says of it.
        stop_at: Where to end; makes the run bounded.
        watermark: How outputs get their timestamps.
        on_data_loss: What to do when Kinesis dropped records before they were read.
        restrictions: Into how many containers to deal the shards at most; see `ReadFromKinesis`.
        write: Write what goes to Kinesis systems. False: leave it to the PCollections.

    Raises:
        ConfigurationError: something of it cannot be; when applied, the runner cannot run it.
    """

    def __init__(
        self,
        task: type[Task] | Callable[[], Task] | str | None = None,
        *,
        inputs: Sequence[str] | None = None,
        config: Mapping[str, str] | None = None,
        client: ClientFactory | None = None,
        checkpoints: CheckpointStore | None = None,
        starting_position: StartingPosition | None = None,
        stop_at: StopPosition | None = None,
        watermark: WatermarkPolicy | None = None,
        on_data_loss: DataLossPolicy = DataLossPolicy.FAIL,
        restrictions: int | None = None,
        write: bool = True,
        clock: Clock | None = None,
    ) -> None:
        super().__init__()
        self._job = read_job(_completed(task, inputs, config, has_checkpoints=checkpoints is not None))
        self._factory = _factory(task if task is not None else self._job.task_class)
        self._client = client
        self._checkpoints = checkpoints
        self._starting_position = starting_position
        self._write = write
        self._restrictions = restrictions
        self._stop_at = stop_at
        self._clock: Clock = clock or SystemClock()
        self._options: dict[str, Any] = {
            "stop_at": stop_at,
            "watermark": watermark,
            "on_data_loss": on_data_loss,
            "clock": self._clock,
        }
        self._reads = [(group, self._read(group)) for group in self._groups()]

    def _groups(self) -> list[list[InputStream]]:
        """Return the inputs in groups that one read can hold: of one system, from one start."""

        def kind(stream: InputStream) -> tuple[str, str]:
            return (stream.system_stream.system, repr(stream.starting_position))

        return [list(g) for _, g in itertools.groupby(sorted(self._job.inputs, key=kind), key=kind)]

    def _read(self, group: Sequence[InputStream]) -> ReadFromKinesis:
        system = self._job.systems[group[0].system_stream.system]
        options = dict(self._options)
        if system.max_records_per_get is not None:
            options["max_records_per_get"] = system.max_records_per_get
        if system.poll_interval_seconds is not None:
            options["poll_interval_seconds"] = system.poll_interval_seconds
        return ReadFromKinesis(
            [i.system_stream.stream for i in group],
            starting_position=self._starting_position or group[0].starting_position,
            client=self._client or system.client,
            **options,
        )

    def plans(self, restrictions: int) -> list[TaskPlan]:
        """Return what workers must know, with all bounds fixed now; one plan for each read."""
        job = self._job
        container = uuid.uuid4().hex
        return [
            TaskPlan(
                container=container,
                read=replace(
                    read.plan(restrictions),
                    checkpointing=Checkpointing(
                        tuple(self._store(i) for i in group),
                        frozenset(n for n, i in enumerate(group) if i.reset_offset),
                    ),
                ),
                system_streams=tuple(i.system_stream for i in group),
                factory=self._factory,
                options=job.options,
                serdes=job.serdes,
                stores=job.stores,
                config=job.config.public(),
                drop_deserialization_errors=job.drop_deserialization_errors,
            )
            for group, read in self._reads
        ]

    def _store(self, stream: InputStream) -> CheckpointStore | None:
        job = self._job
        if self._checkpoints is not None:
            return self._checkpoints
        if job.checkpoint_kind == "file":
            return FileCheckpointStore(os.path.join(job.checkpoint_path, f"{job.name}-{job.job_id}"))
        if job.checkpoint_kind == "memory":
            return MemoryCheckpointStore(f"{job.name}-{job.job_id}")
        if job.checkpoint_kind == "dynamodb":
            system = job.systems[stream.system_stream.system]
            config = DynamoDBConfig(region=system.client.region, endpoint_url=system.dynamodb_endpoint_url)
            return DynamoDBCheckpointStore(stream.lease_table, config=config)
        return None

    def expand(self, pbegin: beam.pvalue.PBegin) -> TaskOutputs:
        pipeline = pbegin.pipeline
        bounded = self._stop_at is not None
        check_read(pipeline.runner, pipeline.options, bounded=bounded)
        plans = self.plans(restriction_count(pipeline.runner, pipeline.options, self._restrictions))
        check_checkpoints(pipeline.runner, any(p.read.checkpointing.is_on for p in plans))
        sent: list[beam.PCollection[OutgoingMessageEnvelope]] = []
        for plan in plans:
            name = " and ".join(str(s) for s in plan.system_streams)
            one = pbegin | f"Run {name}" >> _RunPlan(plan, self._clock)
            sent.append(one)
            if self._write:
                self._write_out(one, name)
        return TaskOutputs(sent[0] if len(sent) == 1 else tuple(sent) | beam.Flatten())

    def _write_out(self, sent: beam.PCollection[OutgoingMessageEnvelope], name: str) -> None:
        job = self._job
        for system in job.systems.values():
            result = (
                sent
                | f"Serialize for {system.name}, {name}"
                >> beam.ParDo(
                    _Serialize(system.name, job.serdes, drop_errors=job.drop_serialization_errors)
                ).with_output_types(OutgoingRecord)
                | f"Write to {system.name}, {name}"
                >> WriteToKinesis(
                    _stream_of,
                    client=self._client or system.client,
                    dead_letters=job.drop_producer_errors,
                    clock=self._clock,
                )
            )
            del result  # what is written is not asked for; what failed is counted by the sink


def _stream_of(record: OutgoingRecord) -> str:
    assert record.stream is not None
    return record.stream


class _RunPlan(beam.PTransform):
    def __init__(self, plan: TaskPlan, clock: Clock) -> None:
        super().__init__()
        self._plan = plan
        self._clock = clock

    def expand(self, pbegin: beam.pvalue.PBegin) -> beam.PCollection[OutgoingMessageEnvelope]:
        plan = self._plan
        elements = (
            pbegin
            | "Impulse" >> beam.Impulse()
            | "PlanShards" >> beam.ParDo(PlanShards(plan.read, self._clock)).with_output_types(ShardGroup)
        )
        if plan.read.is_bounded:
            elements |= "Reshuffle" >> beam.Reshuffle()
        return (
            elements
            | "RunTasks" >> beam.ParDo(task_loop(plan, self._clock)).with_output_types(SentBatch)
            | "TakeSentApart" >> beam.ParDo(_TakeSentApart()).with_output_types(OutgoingMessageEnvelope)
        )


def task_loop(plan: TaskPlan, clock: Clock) -> beam.DoFn:
    """Return the splittable DoFn that a plan needs."""
    kinds: dict[tuple[bool, bool], type[_TaskLoop]] = {
        (False, False): _RunTasks,
        (True, False): _RunTasksToStop,
        (False, True): _RunTasksWithCheckpoints,
        (True, True): _RunTasksWithCheckpointsToStop,
    }
    return kinds[plan.read.is_bounded, plan.read.checkpointing.is_on](plan, clock)


def _completed(
    task: Any, inputs: Sequence[str] | None, config: Mapping[str, str] | None, *, has_checkpoints: bool
) -> JobConfig:
    """Return a whole configuration out of what the arguments and the given one say."""
    values = dict(config or {})
    if inputs is not None:
        values["task.inputs"] = ",".join(inputs)
    if task is not None:
        values["task.class"] = task if isinstance(task, str) else getattr(task, "__qualname__", type(task).__qualname__)
    for text in values.get("task.inputs", "").split(","):
        system, dot, _ = text.strip().partition(".")
        if system and dot:
            values.setdefault(f"systems.{system}.samza.factory", "kinesis")
    if not values.get("app.name") and not values.get("job.name"):
        values["job.name"] = values.get("task.class", "").rpartition(".")[2]
        # A changelog goes to the checkpoints that are given; without any, a store without a place is refused.
        values.setdefault("task.checkpoint.factory", "memory" if has_checkpoints else "none")
    return JobConfig(values)


def _factory(task: type[Task] | Callable[[], Task] | str) -> Callable[[], Task]:
    if isinstance(task, str):
        module, _, attribute = task.rpartition(".")
        try:
            found: Any = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigurationError(f"task.class {task!r} cannot be imported: {error}") from error
        task = found
    if not callable(task):
        raise ConfigurationError(f"a task must be a class, or a function that gives a task, got {task!r}")
    if isinstance(task, type) and not issubclass(task, (StreamTask, AsyncStreamTask)):
        raise ConfigurationError(f"{task.__qualname__} must be a StreamTask or an AsyncStreamTask")
    return task
