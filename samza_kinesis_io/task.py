"""Samza's low-level task API, word for word, and the rules by which one task's calls take turns.

A job writes a class::

    class DelayTask(StreamTask, InitableTask, WindowableTask):
        def init(self, context): ...
        def process(self, envelope, collector, coordinator): ...
        def window(self, collector, coordinator): ...

and the reading loop drives one `TaskRunner` per shard. Two rules, which everything in `TaskRunner` follows from
(Samza's RunLoop has the same):

1. One thing at a time. Window, scheduled callback, end of stream and commit run only while no envelope is in flight;
   envelopes run beside each other only up to `max_concurrency`.
2. What is most urgent goes first: COMMIT > WINDOW > CALLBACK > END_OF_STREAM > PROCESS. Something urgent that must
   wait for envelopes in flight also holds back the next envelope, so that its turn comes.

This file does not know of Beam's runners, of boto3 or of threads that read; time comes from a `Clock`.
"""

from __future__ import annotations

import asyncio
import enum
import heapq
import inspect
import itertools
import json
import logging
import os
import threading
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import msgspec
from apache_beam.utils.timestamp import Timestamp

from samza_kinesis_io.clock import Clock
from samza_kinesis_io.errors import ConfigurationError, KinesisIOError
from samza_kinesis_io.positions import Position
from samza_kinesis_io.records import KinesisRecord

_LOG = logging.getLogger(__name__)


class TaskFailed(KinesisIOError):
    """A task broke a rule of its API: a callback completed twice, or not in time."""


# --- Nouns ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, order=True)
class SystemStream:
    """A stream and the system it belongs to; written `system.stream`."""

    system: str
    stream: str

    def __post_init__(self) -> None:
        if not self.system or "." in self.system or not self.stream:
            raise ConfigurationError(
                "a system stream is written system.stream, the system without a dot; "
                f"got {self.system!r} and {self.stream!r}"
            )

    @classmethod
    def parse(cls, value: str, option: str = "system.stream") -> SystemStream:
        """Split at the *first* dot, as Samza does: stream names may hold dots, system names may not."""
        system, dot, stream = value.strip().partition(".")
        if not dot or not system or not stream:
            raise ConfigurationError(f"{option} must be written system.stream, such as kinesis.flights; got {value!r}")
        return cls(system, stream)

    def __str__(self) -> str:
        return f"{self.system}.{self.stream}"


@dataclass(frozen=True, slots=True, order=True)
class SystemStreamPartition:
    """A shard of a stream. The partition is the shard's id: it names the same records on every run."""

    system: str
    stream: str
    partition: str

    @property
    def system_stream(self) -> SystemStream:
        return SystemStream(self.system, self.stream)

    def __str__(self) -> str:
        return f"SystemStreamPartition [{self.system}, {self.stream}, {self.partition}]"


def format_offset(sequence_number: str | int, sub_sequence_number: int = 0) -> str:
    """Return the offset of a record: its sequence number, and "/sub" behind it for all but an aggregate's first."""
    return f"{sequence_number}/{sub_sequence_number}" if sub_sequence_number else str(sequence_number)


def parse_offset(offset: str) -> Position:
    """Return the position behind the record at `offset`: what `offsets_after` starts from.

    Reads our own form and that of Samza's connector, `{"shardId": ..., "seqNumber": ...}`; the latter has no
    sub-sequence number and stands, as there, for the first user record of an aggregate.

    Raises:
        ConfigurationError: it is neither.
    """
    text = offset.strip()
    sub = "0"
    if text.startswith("{"):
        try:
            fields = json.loads(text)
            text, sub = str(fields["seqNumber"]), str(fields.get("subSeqNumber", 0))
        except (ValueError, KeyError, TypeError):
            text = ""
    elif "/" in text:
        text, _, sub = text.partition("/")
    if not (text.isascii() and text.isdigit() and sub.isascii() and sub.isdigit()):
        raise ConfigurationError(f"an offset must be a sequence number, or number/sub-sequence number; got {offset!r}")
    return Position.after(int(text), int(sub))


class IncomingMessageEnvelope(msgspec.Struct, frozen=True, kw_only=True):
    """A message and where it came from.

    Attributes:
        system_stream_partition: The shard.
        offset: See `format_offset`.
        key: The partition key; deserialized if the stream has a key serde.
        message: The payload; deserialized if the stream has a message serde.
        size_bytes: Of the payload as it came.
        arrival_time: When the service took it.
    """

    system_stream_partition: SystemStreamPartition
    offset: str
    key: Any
    message: Any
    size_bytes: int = 0
    arrival_time: Timestamp | None = None


class KinesisIncomingMessageEnvelope(IncomingMessageEnvelope, frozen=True, kw_only=True):
    """An envelope with what only Kinesis knows. Kept also where a serde decoded the message.

    Attributes:
        sequence_number: Decimal digits; compare as integers.
        sub_sequence_number: The place in an aggregated record; 0 for a plain one.
        explicit_hash_key: Known of records out of an aggregate only.
        encryption_type: "NONE", "KMS" or None.
    """

    sequence_number: str
    sub_sequence_number: int = 0
    explicit_hash_key: str | None = None
    encryption_type: str | None = None

    @property
    def shard_id(self) -> str:
        return self.system_stream_partition.partition

    @property
    def approximate_arrival_timestamp(self) -> Timestamp | None:
        """The same as `arrival_time`, by Kinesis' name."""
        return self.arrival_time

    @classmethod
    def of(
        cls, record: KinesisRecord, partition: SystemStreamPartition, *, key: Any = None, message: Any = None
    ) -> KinesisIncomingMessageEnvelope:
        """Return the envelope of a record, with the key and message that serdes made of it."""
        return cls(
            system_stream_partition=partition,
            offset=format_offset(record.sequence_number, record.sub_sequence_number),
            key=key,
            message=message,
            size_bytes=len(record.data),
            arrival_time=record.approximate_arrival_timestamp,
            sequence_number=record.sequence_number,
            sub_sequence_number=record.sub_sequence_number,
            explicit_hash_key=record.explicit_hash_key,
            encryption_type=record.encryption_type,
        )


class OutgoingMessageEnvelope(msgspec.Struct, frozen=True):
    """A message to send.

    Attributes:
        system_stream: Where to.
        message: The payload, before its serde.
        key: Its key, before its serde; becomes the partition key where `partition_key` is None.
        partition_key: Never serialized. None without a key: a random one.
        key_serializer, message_serializer: Serdes by name for this envelope alone; they go before the stream's.
    """

    system_stream: SystemStream
    message: Any
    key: Any = None
    partition_key: Any = None
    key_serializer: str | None = None
    message_serializer: str | None = None


class RequestScope(enum.Enum):
    """Whom a request is for. A container is a worker process."""

    CURRENT_TASK = "CURRENT_TASK"
    ALL_TASKS_IN_CONTAINER = "ALL_TASKS_IN_CONTAINER"


class TaskCoordinator:
    """Takes a task's requests. They are heard after the call returned, and only if it succeeded.

    Each holds one request: a second call of the same method within one `process()` replaces the first.
    Do not keep it beyond the call.
    """

    __slots__ = ("commit_request", "shutdown_request")

    def __init__(self) -> None:
        self.commit_request: RequestScope | None = None
        self.shutdown_request: RequestScope | None = None

    def commit(self, scope: RequestScope = RequestScope.CURRENT_TASK) -> None:
        """Ask for a commit: outputs are flushed and the position, this message included, kept before the next one."""
        self.commit_request = scope

    def shutdown(self, scope: RequestScope = RequestScope.CURRENT_TASK) -> None:
        """Ask for an end. CURRENT_TASK is a vote, irrevocable: the container stops when all its tasks voted.

        The commit that Samza leaves out is made here.
        """
        self.shutdown_request = scope


class MessageCollector(Protocol):
    """Takes a task's output."""

    def send(self, envelope: OutgoingMessageEnvelope) -> None:
        """Send a message. Only within the call that this collector was given to; order is kept."""
        ...


class KeyValueStore(Protocol):
    """A task's own state: ordered by the serialized bytes of the keys, as in Samza."""

    def get(self, key: Any) -> Any:
        """Return the value, or None."""
        ...

    def put(self, key: Any, value: Any) -> None:
        """Set the value. Neither may be None."""
        ...

    def delete(self, key: Any) -> None:
        """Remove the key, if it is there."""
        ...

    def range(self, from_key: Any, to_key: Any) -> Iterator[tuple[Any, Any]]:
        """Iterate over `from_key` <= key < `to_key`, in order, as they are at the call."""
        ...

    def all(self) -> Iterator[tuple[Any, Any]]:
        """Iterate over everything, in order, as it is at the call."""
        ...


class MetricsRegistry(Protocol):
    """Where a task registers its own numbers."""

    def counter(self, name: str, amount: int = 1) -> None:
        """Raise a counter."""
        ...

    def gauge(self, name: str, value: int) -> None:
        """Set a gauge."""
        ...


ScheduledCallback = Callable[[Any, MessageCollector, TaskCoordinator], None]


class CallbackScheduler:
    """A task's timers, by key. In memory only: a task that is built anew has none."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Hashable]] = []
        self._by_key: dict[Hashable, tuple[int, ScheduledCallback]] = {}
        self._serial = itertools.count()

    def schedule_callback(self, key: Hashable, at: Timestamp, callback: ScheduledCallback) -> None:
        """Call `callback(key, collector, coordinator)` at `at` or soon after. The same key replaces what it held."""
        serial = next(self._serial)
        self._by_key[key] = (serial, callback)
        heapq.heappush(self._heap, (at.micros / 1e6, serial, key))

    def delete_callback(self, key: Hashable) -> None:
        """Forget the key's callback, if there is one."""
        self._by_key.pop(key, None)

    def due_at_seconds(self) -> float | None:
        """Return when the next one is due, in seconds since the epoch."""
        while self._heap and not self._is_current(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def pop_due(self, now_seconds: float) -> tuple[Hashable, ScheduledCallback] | None:
        """Take the oldest one that is due."""
        due = self.due_at_seconds()
        if due is None or due > now_seconds:
            return None
        key = heapq.heappop(self._heap)[2]
        return key, self._by_key.pop(key)[1]

    def _is_current(self, entry: tuple[float, int, Hashable]) -> bool:
        held = self._by_key.get(entry[2])
        return held is not None and held[0] == entry[1]


@dataclass(frozen=True, slots=True)
class TaskContext:
    """What a task knows of itself.

    Attributes:
        task_name: `str()` of its partition: the same on every run.
        system_stream_partitions: What it reads.
        config: The job's configuration.
        metrics: For numbers of its own.
        callback_scheduler: For timers of its own.
        stores: The key-value stores of the configuration, restored already.
    """

    task_name: str
    system_stream_partitions: frozenset[SystemStreamPartition]
    config: Mapping[str, str]
    metrics: MetricsRegistry
    callback_scheduler: CallbackScheduler = field(default_factory=CallbackScheduler)
    stores: Mapping[str, KeyValueStore] = field(default_factory=dict)

    def get_store(self, name: str) -> KeyValueStore:
        """Return a store.

        Raises:
            ConfigurationError: no such store is configured.
        """
        try:
            return self.stores[name]
        except KeyError:
            known = ", ".join(sorted(self.stores)) or "none"
            raise ConfigurationError(
                f"task {self.task_name} asks for the store {name!r}, configured: {known}; add stores.{name}.factory"
            ) from None


# --- What a job implements ------------------------------------------------------------------------------------------


class StreamTask(ABC):
    """A task that is done with a message when `process` returns."""

    @abstractmethod
    def process(
        self, envelope: IncomingMessageEnvelope, collector: MessageCollector, coordinator: TaskCoordinator
    ) -> None:
        """Process one message. Called from one thread at a time, in the shard's order.

        Whatever it raises fails the bundle: the message is processed again, by a new instance.
        """


class TaskCallback:
    """How an `AsyncStreamTask` says that a message is done. From any thread, exactly once."""

    __slots__ = ("_finish",)

    def __init__(self, finish: Callable[[BaseException | None], None]) -> None:
        self._finish = finish

    def complete(self) -> None:
        """The message is processed."""
        self._finish(None)

    def failure(self, error: BaseException) -> None:
        """The message could not be processed: the bundle fails."""
        self._finish(error)


class AsyncStreamTask(ABC):
    """A task that is done with a message some time after `process_async` returned."""

    @abstractmethod
    def process_async(
        self,
        envelope: IncomingMessageEnvelope,
        collector: MessageCollector,
        coordinator: TaskCoordinator,
        callback: TaskCallback,
    ) -> Coroutine[Any, Any, None] | None:
        """Begin to process one message; never blocks.

        Either a plain method that sees to `callback` being called, or `async def`: then the end of the coroutine
        completes the callback and what it raises fails it; it does not touch `callback`.
        Up to `task.max.concurrency` messages are in flight; completion may be out of order, the output and the
        position follow the contiguous prefix.
        """


class InitableTask(ABC):
    @abstractmethod
    def init(self, context: TaskContext) -> None:
        """Called once per instance, before anything else. It has no collector: a task can't send here."""


class WindowableTask(ABC):
    @abstractmethod
    def window(self, collector: MessageCollector, coordinator: TaskCoordinator) -> None:
        """Called every `task.window.ms`, also when no message comes. Ticks that were missed become one."""


class ClosableTask(ABC):
    @abstractmethod
    def close(self) -> None:
        """The last call of an orderly end. Not made when the process dies."""


class EndOfStreamListenerTask(ABC):
    @abstractmethod
    def on_end_of_stream(self, collector: MessageCollector, coordinator: TaskCoordinator) -> None:
        """Called once, when the task's shard ended and all its messages are done; before its children's tasks start."""


# --- The turns ------------------------------------------------------------------------------------------------------


class Operation(enum.Enum):
    """What a task may do next; in the order of urgency."""

    COMMIT = "COMMIT"
    WINDOW = "WINDOW"
    CALLBACK = "CALLBACK"
    END_OF_STREAM = "END_OF_STREAM"
    PROCESS = "PROCESS"


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """The keys `task.*` that a runner needs. An interval of None is off.

    Attributes:
        window_seconds: `task.window.ms`.
        commit_seconds: `task.commit.ms`: a commit at least so often.
        max_concurrency: `task.max.concurrency`; more than one for asynchronous tasks only.
        callback_timeout_seconds: `task.callback.timeout.ms`.
        ignored_exceptions: `task.ignored.exceptions`: class names, short or qualified; "*" for all.
    """

    window_seconds: float | None = None
    commit_seconds: float | None = 60.0
    max_concurrency: int = 1
    callback_timeout_seconds: float | None = None
    ignored_exceptions: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for name in ("window_seconds", "commit_seconds", "callback_timeout_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigurationError(f"{name} must be > 0, or None for off; got {value}")
        if self.max_concurrency < 1:
            raise ConfigurationError(f"max_concurrency must be >= 1, got {self.max_concurrency}")

    def ignores(self, error: BaseException) -> bool:
        kind = type(error)
        names = self.ignored_exceptions
        return isinstance(error, Exception) and bool(
            names and ("*" in names or kind.__name__ in names or f"{kind.__module__}.{kind.__qualname__}" in names)
        )


class Ticks:
    """A clock's ticks at a fixed rate, as a flag: however many were missed, they are one.

    Kept apart from the runner so that an instance built anew goes on in the old phase: a task that is rebuilt
    more often than its interval would never come to its window.
    """

    __slots__ = ("_interval", "_next")

    def __init__(self, interval_seconds: float, now_seconds: float) -> None:
        self._interval = interval_seconds
        self._next = now_seconds + interval_seconds

    @property
    def due_seconds(self) -> float:
        """On the monotonic clock."""
        return self._next

    def take(self, now_seconds: float) -> bool:
        """Return whether a tick is due, and take all that are."""
        if now_seconds < self._next:
            return False
        self._next += self._interval * (int((now_seconds - self._next) / self._interval) + 1)
        return True


@dataclass(slots=True)
class Timers:
    """The ticks of one task: window and commit; None where off."""

    window: Ticks | None
    commit: Ticks | None

    @classmethod
    def starting(cls, options: TaskOptions, now_seconds: float) -> Timers:
        """Return timers whose first ticks are a full interval away."""
        return cls(
            Ticks(options.window_seconds, now_seconds) if options.window_seconds else None,
            Ticks(options.commit_seconds, now_seconds) if options.commit_seconds else None,
        )


class _Collector:
    """Keeps what one call sends until the call has succeeded; then, and after a failure, it takes nothing more."""

    __slots__ = ("_open", "sent")

    def __init__(self) -> None:
        self.sent: list[OutgoingMessageEnvelope] = []
        self._open = True

    def send(self, envelope: OutgoingMessageEnvelope) -> None:
        if not self._open:
            raise TaskFailed("a collector was used after the call it was given to; use the collector of each call")
        self.sent.append(envelope)

    def close(self) -> list[OutgoingMessageEnvelope]:
        self._open = False
        return self.sent


class _Flight:
    """An envelope that a task was given and whose end is not yet accounted for."""

    __slots__ = ("collector", "coordinator", "deadline_seconds", "done", "envelope", "error", "timestamp_micros")

    def __init__(
        self, envelope: IncomingMessageEnvelope, timestamp_micros: int, deadline_seconds: float | None
    ) -> None:
        self.envelope = envelope
        self.timestamp_micros = timestamp_micros
        self.collector = _Collector()
        self.coordinator = TaskCoordinator()
        self.deadline_seconds = deadline_seconds
        self.done = False
        self.error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class Sent:
    """What one call sent.

    Attributes:
        messages: In order.
        timestamp_micros: Of the envelope that the call was given; None for window, callback and end of stream.
    """

    messages: tuple[OutgoingMessageEnvelope, ...]
    timestamp_micros: int | None


class TaskRunner:
    """One task instance and its turns.

    Its owner, from one thread: `start()` once; then again and again `next_operation`, which says what may run now, and
    the method of that name; `take_sent()` after each. COMMIT is the owner's: it ends the bundle, calls `committed()`.
    When nothing may run and envelopes are in flight, `wait` returns on the next completion.

    After any exception out of these methods the instance is spent: its memory is ahead of the position. Drop it.
    """

    def __init__(
        self,
        task: StreamTask | AsyncStreamTask,
        context: TaskContext,
        options: TaskOptions,
        *,
        clock: Clock,
        timers: Timers | None = None,
    ) -> None:
        if not isinstance(task, (StreamTask, AsyncStreamTask)):
            raise ConfigurationError(f"a task must be a StreamTask or AsyncStreamTask, got {type(task).__qualname__}")
        if options.max_concurrency > 1 and not isinstance(task, AsyncStreamTask):
            raise ConfigurationError(
                f"max_concurrency {options.max_concurrency} needs an AsyncStreamTask, got the StreamTask "
                f"{type(task).__qualname__}; set task.max.concurrency to 1"
            )
        self.task = task
        self.context = context
        self.options = options
        self.timers = timers or Timers.starting(options, clock.monotonic_seconds())
        self.counts: Counter[str] = Counter()
        """Samza's metrics by their names, to be taken away by the owner."""
        self.last_processed: IncomingMessageEnvelope | None = None
        """The last envelope of the contiguous prefix of completed ones."""
        self.shutdown_vote: RequestScope | None = None
        self.commit_all_requested = False
        """A task asked for a commit of all tasks in the container; the owner tells the others and clears it."""
        self._clock = clock
        self._changed = threading.Condition()
        self._flights: deque[_Flight] = deque()
        self._in_flight = 0
        self._completions = 0
        self._completions_seen = 0
        self._failure: BaseException | None = None
        self._commit_wanted = False
        self._window_wanted = False
        self._ended = False
        self._sent: list[Sent] = []
        self._windows = 0
        self._window_seconds_total = 0.0
        self._window_warned = False

    @property
    def in_flight(self) -> int:
        """How many envelopes the task is busy with."""
        return self._in_flight

    def start(self) -> None:
        """Initialize the task. Its stores are restored already."""
        if isinstance(self.task, InitableTask):
            self.task.init(self.context)

    def request_commit(self) -> None:
        """Commit at the next opportunity: another task of the container asked for it."""
        self._commit_wanted = True

    def next_operation(self, *, has_message: bool = False, at_end: bool = False) -> Operation | None:
        """Return what may run now; None: nothing is to do, or what is must wait for an envelope in flight.

        Args:
            has_message: An envelope is ready to be processed.
            at_end: The shard ended and there will be no more envelopes.
        """
        now = self._clock.monotonic_seconds()
        with self._changed:
            self._check_deadlines(now)
            self._completions_seen = self._completions
            if self._failure is not None:
                raise self._failure
            self._account()
        if self.timers.commit is not None and self.timers.commit.take(now):
            self._commit_wanted = True
        if self.timers.window is not None and self.timers.window.take(now):
            # Samza's windows stop after the end of the stream.
            self._window_wanted = isinstance(self.task, WindowableTask) and not self._ended
        if self._commit_wanted:
            urgent: Operation | None = Operation.COMMIT
        elif self._window_wanted:
            urgent = Operation.WINDOW
        elif self._callback_is_due():
            urgent = Operation.CALLBACK
        elif at_end and not has_message and not self._ended:
            urgent = Operation.END_OF_STREAM
        else:
            urgent = None
        if urgent is not None:
            return urgent if self._in_flight == 0 else None
        if has_message and not self._ended and self._in_flight < self.options.max_concurrency:
            return Operation.PROCESS
        return None

    def process(self, envelope: IncomingMessageEnvelope, timestamp_micros: int = 0) -> None:
        """Give the task an envelope. Returns when it is done, or begun if the task is asynchronous.

        Args:
            timestamp_micros: Of what it sends; handed back with it.
        """
        timeout = self.options.callback_timeout_seconds
        deadline = None if timeout is None else self._clock.monotonic_seconds() + timeout
        flight = _Flight(envelope, timestamp_micros, deadline)
        with self._changed:
            self._flights.append(flight)
            self._in_flight += 1
        self.counts["process-calls"] += 1
        if isinstance(self.task, StreamTask):
            try:
                self.task.process(envelope, flight.collector, flight.coordinator)
            except Exception as error:
                self._finish(flight, error)
                if not self.options.ignores(error):
                    raise
            else:
                self._finish(flight, None)
        else:
            self._begin_async(flight)
        with self._changed:
            if self._failure is not None:
                raise self._failure
            self._account()

    def _begin_async(self, flight: _Flight) -> None:
        assert isinstance(self.task, AsyncStreamTask)
        callback = TaskCallback(lambda error: self._finish(flight, error))
        try:
            began = self.task.process_async(flight.envelope, flight.collector, flight.coordinator, callback)
        except Exception as error:
            # In Samza an ignored exception here leaves the callback open for ever; a failure is what it is.
            callback.failure(error)
            return
        if inspect.iscoroutine(began):
            asyncio.run_coroutine_threadsafe(_completing(began, callback), _event_loop())

    def window(self) -> None:
        """Call the task's window()."""
        self._window_wanted = False
        task = self.task
        assert isinstance(task, WindowableTask)
        begun = self._clock.monotonic_seconds()
        self._call("window-calls", task.window)
        self._window_seconds_total += self._clock.monotonic_seconds() - begun
        self._windows += 1
        average = self._window_seconds_total / self._windows
        interval = self.options.window_seconds
        if interval is not None and average >= interval and not self._window_warned:
            self._window_warned = True
            _LOG.warning(
                "%s: window() takes %.3f s on average, task.window.ms is %.3f s: process() is starved",
                self.context.task_name,
                average,
                interval,
            )

    def callback(self) -> None:
        """Call the oldest scheduled callback that is due."""
        due = self.context.callback_scheduler.pop_due(self._clock.now_seconds())
        if due is not None:
            key, function = due
            self._call("callback-calls", lambda collector, coordinator: function(key, collector, coordinator))

    def end_of_stream(self) -> None:
        """Tell the task that its shard ended. Afterwards nothing but commits and callbacks runs."""
        self._ended = True
        if isinstance(self.task, EndOfStreamListenerTask):
            self._call("end-of-stream-calls", self.task.on_end_of_stream)

    def committed(self) -> None:
        """The owner ended the bundle: requests up to now are served."""
        self._commit_wanted = False
        self.counts["commit-calls"] += 1

    def close(self) -> None:
        """End the task in good order."""
        if isinstance(self.task, ClosableTask):
            self.task.close()

    def take_sent(self) -> list[Sent]:
        """Take what completed calls sent, in the order in which the calls were begun."""
        with self._changed:
            self._account()
            sent, self._sent = self._sent, []
        return sent

    def due_seconds(self) -> float | None:
        """Return how long until something is due without a message; 0 if it is now, None if nothing will be."""
        now = self._clock.monotonic_seconds()
        if self._commit_wanted or self._window_wanted:
            return 0.0
        times: list[float] = []
        if self.timers.window is not None and isinstance(self.task, WindowableTask) and not self._ended:
            times.append(self.timers.window.due_seconds - now)
        if self.timers.commit is not None:
            times.append(self.timers.commit.due_seconds - now)
        callback_at = self.context.callback_scheduler.due_at_seconds()
        if callback_at is not None:
            times.append(callback_at - self._clock.now_seconds())
        with self._changed:
            times.extend(
                f.deadline_seconds - now for f in self._flights if not f.done and f.deadline_seconds is not None
            )
        return max(0.0, min(times)) if times else None

    def wait(self, timeout_seconds: float) -> None:
        """Wait, at most so long, for a completion that the last `next_operation` did not see; if one can come."""
        with self._changed:
            if self._in_flight and self._completions == self._completions_seen and self._failure is None:
                self._clock.wait(self._changed, timeout_seconds)

    def _callback_is_due(self) -> bool:
        at = self.context.callback_scheduler.due_at_seconds()
        return at is not None and at <= self._clock.now_seconds()

    def _call(self, count: str, function: Callable[[MessageCollector, TaskCoordinator], None]) -> None:
        collector, coordinator = _Collector(), TaskCoordinator()
        self.counts[count] += 1
        try:
            function(collector, coordinator)
        except Exception as error:
            if not self.options.ignores(error):
                raise
            self.counts[f"exception-ignored-{type(error).__name__}"] += 1
        self._hear(coordinator)
        self._keep(collector.close(), None)

    def _finish(self, flight: _Flight, error: BaseException | None) -> None:
        """An envelope is done, or failed; on whatever thread."""
        with self._changed:
            if flight.done:
                self._failure = TaskFailed(
                    f"task {self.context.task_name} completed the callback of offset {flight.envelope.offset} twice; "
                    "call complete() or failure() exactly once"
                )
            else:
                flight.done = True
                flight.error = error
                self._completions += 1
                self._in_flight -= 1
                if error is not None and not self.options.ignores(error):
                    _LOG.error("task %s failed at offset %s: %r", self.context.task_name, flight.envelope.offset, error)
                    if self._failure is None:
                        self._failure = error
            self._changed.notify_all()

    def _check_deadlines(self, now: float) -> None:
        for flight in self._flights:
            if not flight.done and flight.deadline_seconds is not None and now >= flight.deadline_seconds:
                self._failure = self._failure or TaskFailed(
                    f"task {self.context.task_name} did not complete offset {flight.envelope.offset} within "
                    f"task.callback.timeout.ms = {round((self.options.callback_timeout_seconds or 0) * 1000)}"
                )

    def _account(self) -> None:
        """Roll over the contiguous prefix of completed envelopes: position, requests and output, in dispatch order."""
        while self._flights and self._flights[0].done and self._failure is None:
            flight = self._flights.popleft()
            self.last_processed = flight.envelope
            if flight.error is not None:
                self.counts[f"exception-ignored-{type(flight.error).__name__}"] += 1
            else:
                self._hear(flight.coordinator)
            # What an ignored exception left half sent stays sent, as in Samza.
            self._keep(flight.collector.close(), flight.timestamp_micros)

    def _hear(self, coordinator: TaskCoordinator) -> None:
        if coordinator.commit_request is not None:
            self._commit_wanted = True
            if coordinator.commit_request is RequestScope.ALL_TASKS_IN_CONTAINER:
                self.commit_all_requested = True
        if coordinator.shutdown_request is not None and self.shutdown_vote is not RequestScope.ALL_TASKS_IN_CONTAINER:
            self.shutdown_vote = coordinator.shutdown_request

    def _keep(self, messages: list[OutgoingMessageEnvelope], timestamp_micros: int | None) -> None:
        if messages:
            self.counts["send-calls"] += len(messages)
            self._sent.append(Sent(tuple(messages), timestamp_micros))


async def _completing(work: Coroutine[Any, Any, None], callback: TaskCallback) -> None:
    try:
        await work
    except BaseException as error:
        callback.failure(error)
        if not isinstance(error, Exception):
            raise
    else:
        callback.complete()


_loop: asyncio.AbstractEventLoop | None = None
_loop_pid = 0
_loop_lock: Final = threading.Lock()


def _event_loop() -> asyncio.AbstractEventLoop:
    """Return the process's event loop for coroutines of tasks; its thread starts with the first one."""
    global _loop, _loop_pid
    with _loop_lock:
        if _loop is None or _loop_pid != os.getpid():  # a fork inherits the loop, not its thread
            _loop = asyncio.new_event_loop()
            _loop_pid = os.getpid()
            threading.Thread(target=_loop.run_forever, name="samza-kinesis-tasks", daemon=True).start()
        return _loop
