"""`KinesisSystemProducer`: records in, acknowledgements out. Samza's SystemProducer on PutRecords.

    producer.register(source)
    producer.send(source, stream, entry, token)   # as often as you like; blocks while too much is in flight
    deliveries = producer.flush(source)           # returns when Kinesis has taken everything this source sent

One per process and destination (`shared_producer`), used by many sources at the same time: their records share
requests. What is sent when is decided in `batching.py`; here are the lock, the threads and the calls.
"""

from __future__ import annotations

import copy
import itertools
import os
import random
import threading
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Final

import msgspec

from samza_kinesis_io.batching import (
    RECORD_OVERHEAD_BYTES,
    Budget,
    Outbox,
    Parcel,
    PendingRecord,
    ShardMap,
    SourceLedger,
)
from samza_kinesis_io.client import (
    ClientFactory,
    KinesisClient,
    PutEntry,
    ShardFilter,
    ShardFilterKind,
    StreamDescription,
    StreamId,
)
from samza_kinesis_io.clock import Clock, SystemClock
from samza_kinesis_io.errors import ConfigurationError, DeliveryFailed, KinesisIOError, TransientServiceError
from samza_kinesis_io.limits import MAX_BYTES_PER_PUT, MAX_RECORDS_PER_PUT, MIB
from samza_kinesis_io.metrics import SinkTally
from samza_kinesis_io.retry import BackoffPolicy

DEFAULT_DELIVERY_TIMEOUT_SECONDS: Final = 300.0
#: A description is asked for again after this long: a stream's record limit can be raised while we run.
_DESCRIPTION_LIFETIME_SECONDS: Final = 60.0
#: Waiting threads look again after this long even if nobody wakes them.
_LONGEST_WAIT_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class ProducerOptions:
    """How a producer works. Sources with equal options, clients and clocks share one.

    Attributes:
        max_in_flight_bytes: Accepted and not acknowledged at most, about 512 bytes of bookkeeping per record
            included; `send` waits beyond it. A record larger than this goes alone.
        linger_seconds: How long a request that is not full may wait for more records. While others are in flight, one
            that nobody flushes waits for the first of them instead.
        request_threads: PutRecords requests in flight at most. 0: no threads; `send` and `flush` make the requests
            themselves, one after the other, and waiting moves the clock: for tests with a simulated one.
        backoff: Between tries.
    """

    max_in_flight_bytes: int = 64 * MIB
    linger_seconds: float = 0.005
    request_threads: int = 8
    backoff: BackoffPolicy = BackoffPolicy(initial_seconds=0.1, max_seconds=5.0)

    def __post_init__(self) -> None:
        if self.max_in_flight_bytes < 1:
            raise ConfigurationError(f"max_in_flight_bytes must be >= 1, got {self.max_in_flight_bytes!r}")
        if not 0 <= self.linger_seconds <= 60:
            raise ConfigurationError(f"linger_seconds must be between 0 and 60, got {self.linger_seconds!r}")
        if not 0 <= self.request_threads <= 64:
            raise ConfigurationError(f"request_threads must be between 0 and 64, got {self.request_threads!r}")


class Delivery(msgspec.Struct, frozen=True, gc=False):
    """The end of one record: acknowledged (`sequence_number` is set) or given up (`error_code` is).

    `token` is what the sender gave with it. `attempts` counts the requests it was part of.
    """

    token: object
    stream: StreamId
    shard_id: str | None
    sequence_number: str | None
    error_code: str | None
    error_message: str | None
    attempts: int


class _Source:
    """A source's ledger, and where its `flush` waits."""

    __slots__ = ("done", "ledger")

    def __init__(self, ledger: SourceLedger, lock: threading.Lock) -> None:
        self.ledger = ledger
        self.done = threading.Condition(lock)


class KinesisSystemProducer:
    """Writes records of many sources to many streams through shared requests.

    At least once: what `flush` returned as delivered, Kinesis has taken; after a failure the same record may be in the
    stream although nobody said so.

    Safe to use from many threads; one source belongs to one thread at a time.
    """

    def __init__(
        self,
        client: ClientFactory,
        *,
        options: ProducerOptions = ProducerOptions(),
        clock: Clock | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._factory = client
        self._options = options
        self._clock: Clock = clock or SystemClock()
        self._rng = rng or random.Random()

        # The lock protects everything below it in this constructor, and all that hangs on it: outboxes, their records,
        # ledgers, budget. It is never held during a call to Kinesis, nor while time passes.
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # idle request threads wait here
        self._room = threading.Condition(self._lock)  # senders wait here for in-flight bytes
        self._sources: dict[Hashable, _Source] = {}
        self._outboxes: dict[StreamId, Outbox] = {}
        self._active: dict[StreamId, Outbox] = {}
        self._budget = Budget(options.max_in_flight_bytes)
        self._queueing: deque[object] = deque()
        self._serials = itertools.count(1)
        self._threads: list[threading.Thread] = []
        self._idle_threads = 0
        self._alarm: float | None = None
        self._stopped = False

        # Appended to without the lock: a finalizer may run in a thread that holds it.
        self._abandoned: deque[Hashable] = deque()

        # A lock of their own: opening a client and describing a stream are calls, and slow.
        self._clients_lock = threading.Lock()
        self._clients: dict[str | None, KinesisClient] = {}
        self._descriptions: dict[StreamId, tuple[float, StreamDescription]] = {}

    # For sources

    def register(
        self,
        source: Hashable,
        *,
        delivery_timeout_seconds: float = DEFAULT_DELIVERY_TIMEOUT_SECONDS,
        report_failed: bool = False,
    ) -> None:
        """Open a source: anything hashable that names a bundle or a task.

        With `report_failed` a record that Kinesis refuses for itself comes back among the deliveries with its error;
        otherwise it fails the source.

        Raises:
            ValueError: it is registered already.
        """
        with self._lock:
            self._bury()
            if source in self._sources:
                raise ValueError(f"source {source!r} is registered already; purge it first")
            ledger = SourceLedger(
                source, delivery_timeout_seconds=delivery_timeout_seconds, report_failed=report_failed
            )
            self._sources[source] = _Source(ledger, self._lock)

    def send(
        self, source: Hashable, stream: StreamId, entry: PutEntry, token: object = None, *, turn_key: str | None = None
    ) -> None:
        """Hand over a record. Returns before it is sent; blocks while `max_in_flight_bytes` are on their way.

        Of the records with one `turn_key`, its partition key as a rule, each is sent only after the one before was
        acknowledged, purged or failed for good. None: no order.

        Raises:
            KinesisIOError: the source has failed already; there is no point in sending more.
        """
        self._accept(source, stream, lambda ledger, outbox: PendingRecord(entry, token, ledger, outbox, turn_key))

    def send_many(
        self,
        source: Hashable,
        stream: StreamId,
        entries: list[PutEntry],
        tokens: list[object],
        size_bytes: int,
        *,
        flush_follows: bool = False,
    ) -> None:
        """Hand over records without order among them, at most as many as a request takes. Else as `send`.

        A full request's worth costs hardly more than one record; the lists are the producer's from now on.

        Args:
            size_bytes: The sum of the entries' own.
            flush_follows: The caller flushes next, and no thread need be woken that looks after the linger.
        """
        charged = size_bytes + RECORD_OVERHEAD_BYTES * len(entries)
        # Two have to fit, or the next one is not on its way while the first is.
        if len(entries) == MAX_RECORDS_PER_PUT and size_bytes <= MAX_BYTES_PER_PUT:
            if 2 * charged <= self._options.max_in_flight_bytes:
                self._accept(source, stream, lambda ledger, outbox: Parcel(entries, tokens, ledger, outbox, size_bytes))
                return
        taken = self._accept_at_once(source, stream, entries, tokens, flush_follows)
        for entry, token in zip(entries[taken:], tokens[taken:], strict=True):
            self.send(source, stream, entry, token)

    def _accept_at_once(
        self,
        source: Hashable,
        stream: StreamId,
        entries: list[PutEntry],
        tokens: list[object],
        flush_follows: bool,
    ) -> int:
        """Take what there is room for now, under one lock; return how many that are."""
        with self._lock:
            now = self._clock.monotonic_seconds()
            self._bury()
            ledger = self._source(source).ledger
            self._raise_failure(ledger)
            if self._queueing:
                return 0
            outbox = self._active[stream] = self._outbox(stream)
            changed = False
            taken = 0
            for entry, token in zip(entries, tokens, strict=True):
                record = PendingRecord(entry, token, ledger, outbox, None)
                if not self._budget.admits(record.charged_bytes):
                    break
                changed |= outbox.add(record, next(self._serials), now)
                taken += 1
            if changed and not flush_follows:
                self._call_worker(now)
            return taken

    def _accept(
        self,
        source: Hashable,
        stream: StreamId,
        item_of: Callable[[SourceLedger, Outbox], PendingRecord | Parcel],
    ) -> None:
        waiting: object | None = None
        try:
            while True:
                with self._lock:
                    now = self._clock.monotonic_seconds()
                    self._bury()
                    ledger = self._source(source).ledger
                    self._raise_failure(ledger)
                    outbox = self._outbox(stream)
                    item = item_of(ledger, outbox)
                    # First come, first admitted: else a large record would wait for ever behind small ones. But who
                    # waits for one stream, and not for bytes, must not keep out those who write to others.
                    useful = self._has_use_for(item, outbox)
                    if not useful and waiting is not None:
                        self._queueing.remove(waiting)
                        self._room.notify_all()
                        waiting = None
                    first = not self._queueing or self._queueing[0] is waiting
                    if first and useful and self._budget.admits(item.charged_bytes):
                        self._active[stream] = outbox
                        if isinstance(item, Parcel):
                            outbox.add_parcel(item, next(self._serials), now)
                            next(itertools.islice(self._serials, len(item) - 2, None))  # one for each of its records
                            self._call_worker(now)
                        elif outbox.add(item, next(self._serials), now):
                            self._call_worker(now)
                        return
                    if useful and waiting is None:
                        waiting = object()
                        self._queueing.append(waiting)
                    # What moves will make room, and more of it than a request that leaves half empty now.
                    if not any(outbox.is_moving for outbox in self._active.values()):
                        for pressed in self._active.values():
                            pressed.urge(now)
                    if self._options.request_threads:
                        self._call_worker(now)
                        self._clock.wait(self._room, _LONGEST_WAIT_SECONDS)
                        continue
                self._step()
        finally:
            if waiting is not None:
                with self._lock:
                    self._queueing.remove(waiting)
                    self._room.notify_all()

    def _has_use_for(self, item: PendingRecord | Parcel, outbox: Outbox) -> bool:
        """Say no to a parcel while so many wait that all threads are busy for two rounds.

        More would only be memory, which the garbage collector walks through again and again.
        """
        return not isinstance(item, Parcel) or outbox.parcels_waiting < max(2, 2 * self._options.request_threads)

    def settled(self, source: Hashable) -> list[Delivery]:
        """Return what has ended since the last time, without waiting. Raises nothing that `flush` would raise."""
        with self._lock:
            return self._collect(self._source(source).ledger)

    def flush(self, source: Hashable) -> list[Delivery]:
        """Wait until everything this source sent has ended, and return what was not returned before.

        With nothing outstanding it returns at once and makes no request.

        Raises:
            KinesisIOError: something could not be delivered. The source takes nothing more until it is purged.
        """
        try:
            while True:
                with self._lock:
                    now = self._clock.monotonic_seconds()
                    self._bury()
                    current = self._source(source)
                    ledger = current.ledger
                    self._raise_failure(ledger)
                    if not ledger.outstanding:
                        ledger.flushing = False
                        return self._collect(ledger)
                    if not ledger.flushing:
                        ledger.flushing = True
                        for outbox in self._active.values():
                            outbox.urge(now)
                    if self._options.request_threads:
                        # With nothing in flight the next request is ours (or nearly): this thread makes it, which
                        # saves the way to another thread and back. With something in flight it might be a slow one
                        # for others.
                        request = None
                        if not any(outbox.requests_in_flight for outbox in self._active.values()):
                            request = self._take(now)
                        self._call_worker(now)
                        if request is None:
                            self._clock.wait(current.done, _LONGEST_WAIT_SECONDS)
                            continue
                    else:
                        request = self._take(now)
                if request is not None:
                    self._perform(request)
                else:
                    self._pass_time()
        except BaseException:
            with self._lock:
                left = self._sources.get(source)
                if left is not None:
                    left.ledger.flushing = False
            raise

    def tally(self, source: Hashable) -> SinkTally:
        """Return what was counted for this source since the last time."""
        with self._lock:
            ledger = self._source(source).ledger
            counted, ledger.tally = ledger.tally, SinkTally()
            return counted

    def purge(self, source: Hashable) -> None:
        """Close a source: what is not in a request is dropped, the rest is not tried again. Never fails."""
        with self._lock:
            self._bury()
            self._drop(source)

    def abandon(self, source: Hashable) -> None:
        """Have the source purged soon. Takes no lock, so that a finalizer can call it."""
        self._abandoned.append(source)

    def stop(self) -> None:
        """End the producer: requests in flight are waited for, everything else is reported as failed to its source."""
        with self._lock:
            self._stopped = True
            now = self._clock.monotonic_seconds()
            for source in self._sources.values():
                if source.ledger.outstanding:
                    source.ledger.fail(
                        DeliveryFailed(
                            f"the producer was stopped with {source.ledger.outstanding_count} records not acknowledged",
                            counts_by_code={"stopped": source.ledger.outstanding_count},
                        ),
                        now,
                    )
                source.done.notify_all()
            self._work.notify_all()
            self._room.notify_all()
            threads = list(self._threads)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join()
        with self._lock:
            # Those that a flush makes in its own thread. Nobody tells us of their end, which is near.
            while any(outbox.requests_in_flight for outbox in self._outboxes.values()):
                self._clock.wait(self._room, 0.05)
        with self._clients_lock:
            for client in self._clients.values():
                client.close()
            self._clients.clear()

    def describe(self, stream: StreamId, *, patience_seconds: float = 0.0) -> StreamDescription:
        """Return the stream's description, at most a minute old.

        A call that fails for the moment is made again, for `patience_seconds`: an account has 20 of them per second,
        and the workers of a pipeline start together.
        """
        started = now = self._clock.monotonic_seconds()
        failures = 0
        while True:
            known = self._descriptions.get(stream)
            if known is not None and now - known[0] <= _DESCRIPTION_LIFETIME_SECONDS:
                return known[1]
            try:
                self._descriptions[stream] = (now, self._client_for(stream).describe_stream(stream))
            except KinesisIOError as error:
                if not error.retryable or now - started >= patience_seconds or self._stopped:
                    raise
                failures += 1
                self._clock.sleep(self._options.backoff.wait_seconds(failures, self._rng))
            now = self._clock.monotonic_seconds()

    @property
    def in_flight_bytes(self) -> int:
        """Accepted and not done yet; a gauge, and zero once every source is flushed or purged and answered."""
        return self._budget.used_bytes

    # Under the lock

    def _source(self, source: Hashable) -> _Source:
        try:
            return self._sources[source]
        except KeyError:
            raise ValueError(f"source {source!r} is not registered; call register() first") from None

    def _outbox(self, stream: StreamId) -> Outbox:
        outbox = self._outboxes.get(stream)
        if outbox is None:
            outbox = self._outboxes[stream] = Outbox(
                stream,
                self._budget,
                linger_seconds=self._options.linger_seconds,
                backoff=self._options.backoff,
                rng=self._rng,
            )
        return outbox

    def _raise_failure(self, ledger: SourceLedger) -> None:
        if ledger.failure is not None:
            raise _own_copy(ledger.failure)
        if self._stopped:
            raise DeliveryFailed("the producer was stopped")

    def _collect(self, ledger: SourceLedger) -> list[Delivery]:
        settled, ledger.settled = ledger.settled, []
        deliveries: list[Delivery] = []
        for r in settled:
            stream = r.outbox.stream
            if isinstance(r, Parcel):
                deliveries += [
                    Delivery(token, stream, o.shard_id, o.sequence_number, None, None, 1)
                    for token, o in zip(r.tokens, r.outcomes, strict=True)
                ]
            elif r.sequence_number is not None:
                deliveries.append(Delivery(r.token, stream, r.shard_id, r.sequence_number, None, None, r.attempts))
            else:
                deliveries.append(
                    Delivery(r.token, stream, r.shard_id, None, r.error_code, r.error_message, r.attempts)
                )
        return deliveries

    def _bury(self) -> None:
        while self._abandoned:
            self._drop(self._abandoned.popleft())

    def _drop(self, source: Hashable) -> None:
        dropped = self._sources.pop(source, None)
        if dropped is not None:
            dropped.ledger.drop(self._clock.monotonic_seconds())
            dropped.ledger.settled = []  # they point back at it, and the garbage collector does not see them
            dropped.done.notify_all()
            self._room.notify_all()
            self._call_worker(self._clock.monotonic_seconds())  # others' records may have got their key's turn by that

    def _take(self, now: float) -> list[PendingRecord] | Parcel | None:
        for stream, outbox in list(self._active.items()):
            request = outbox.take(now)
            if request is not None:
                # To the end of the line: a busy stream must not keep the others waiting.
                self._active.pop(stream)
                self._active[stream] = outbox
                return request
            if outbox.is_idle:
                del self._active[stream]
        return None

    def _due(self) -> float | None:
        times = [due for outbox in self._active.values() if (due := outbox.due()) is not None]
        return min(times) if times else None

    def _call_worker(self, now: float) -> None:
        """See to it that a thread wakes up for whatever is due next."""
        if not self._options.request_threads:
            return
        due = self._due()
        if due is None or (now < due and self._alarm is not None and self._alarm <= due):
            return
        if self._idle_threads:
            self._work.notify()
        elif len(self._threads) < self._options.request_threads and not self._stopped:
            # A daemon: an interpreter that ends while a request hangs has nobody left to wait for its answer.
            thread = threading.Thread(target=self._make_requests, name=f"kinesis-put-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()

    # The threads

    def _make_requests(self) -> None:
        while True:
            with self._lock:
                while True:
                    if self._stopped:
                        return
                    now = self._clock.monotonic_seconds()
                    self._bury()
                    request = self._take(now)
                    if request is not None:
                        self._call_worker(now)  # there may be more than one due
                        break
                    self._sleep_until_due(now)
            self._perform(request)

    def _sleep_until_due(self, now: float) -> None:
        """Wait for work. One idle thread keeps the time for all: `_alarm` is when it wakes."""
        due = self._due()
        keeps_time = due is not None and (self._alarm is None or due < self._alarm)
        if keeps_time:
            self._alarm = due
        self._idle_threads += 1
        self._clock.wait(self._work, max(0.0, due - now) if due is not None and keeps_time else _LONGEST_WAIT_SECONDS)
        self._idle_threads -= 1
        if keeps_time and self._alarm == due:
            self._alarm = None

    def _perform(self, request: list[PendingRecord] | Parcel) -> None:
        """Make one request and hand its answer to the outbox. Called without the lock."""
        parcel = request if isinstance(request, Parcel) else None
        outbox = parcel.outbox if parcel is not None else request[0].outbox  # type: ignore[index]
        entries = parcel.entries if parcel is not None else [r.entry for r in request]  # type: ignore[union-attr]
        error: BaseException | None = None
        try:
            outcomes = self._client_for(outbox.stream).put_records(outbox.stream, entries)
            if len(outcomes) != len(request):
                raise TransientServiceError(
                    f"PutRecords for stream {outbox.stream.name} answered {len(outcomes)} of {len(request)} records",
                    operation="PutRecords",
                    code="IncompleteAnswer",
                )
        except BaseException as failure:  # handed to those whose records these are; nobody else would hear of it
            error = failure
        if parcel is not None:
            with self._lock:
                now = self._clock.monotonic_seconds()
                if error is None and all([o.sequence_number and o.error_code is None for o in outcomes]):  # noqa: C419 (faster)
                    outbox.delivered(parcel, outcomes, now)
                    self._tell(parcel.owner)
                    self._call_worker(now)
                    return
                request = outbox.open(parcel, now)
        assert not isinstance(request, Parcel)
        shard_map = None
        if error is None:
            with self._lock:
                wanted = outbox.wants_shard_map(outcomes, self._clock.monotonic_seconds())
            if wanted:
                shard_map = self._ask_shard_map(outbox.stream)
        with self._lock:
            now = self._clock.monotonic_seconds()
            if shard_map is not None:
                outbox.learn(shard_map, now)
            if error is not None:
                outbox.refused(request, error, now)
            else:
                outbox.answered(request, outcomes, now)
            for ledger in {id(r.owner): r.owner for r in request}.values():
                self._tell(ledger)
            self._call_worker(now)
        if error is not None and not isinstance(error, Exception):
            raise error

    def _tell(self, ledger: SourceLedger) -> None:
        """Wake whoever waits for this source's end, or for room."""
        if ledger.failure is not None or not ledger.outstanding:
            waiter = self._sources.get(ledger.name)
            if waiter is not None:
                waiter.done.notify_all()
        self._room.notify_all()

    def _ask_shard_map(self, stream: StreamId) -> ShardMap | None:
        """Return where keys lead; empty where they lead nowhere in particular; None if we are not told."""
        try:
            if not self.describe(stream).key_based_distribution:
                return ShardMap()
            return ShardMap.of(self._client_for(stream).list_shards(stream, ShardFilter(ShardFilterKind.AT_LATEST)))
        # Any error, a client's own too: this is between a request and its answer, which must reach its senders. And
        # prediction only keeps throttles of one shard away from the others; writing goes on without.
        except Exception:
            return None

    def _client_for(self, stream: StreamId) -> KinesisClient:
        client = self._clients.get(stream.region)
        if client is None:
            with self._clients_lock:
                client = self._clients.get(stream.region)
                if client is None:
                    client = self._clients[stream.region] = self._factory.connect(stream)
        return client

    # Without threads

    def _step(self) -> None:
        """Do one thing that is due, or let time pass until something is."""
        with self._lock:
            request = self._take(self._clock.monotonic_seconds())
        if request is not None:
            self._perform(request)
        else:
            self._pass_time()

    def _pass_time(self) -> None:
        with self._lock:
            due = self._due()
            now = self._clock.monotonic_seconds()
        if due is None:
            raise RuntimeError("records are outstanding, but nothing will ever be due: a request of another thread?")
        self._clock.sleep(max(due - now, 1e-6))  # a clock may tick coarser than floats do


def _own_copy(error: BaseException) -> BaseException:
    """Return a copy to raise: one exception raised in many threads would gather all their tracebacks."""
    try:
        own = copy.copy(error)
    except Exception:  # somebody else's exception, which may not be made to be copied: raise it as it is
        return error
    own.__cause__ = error.__cause__
    return own


_shared_lock = threading.Lock()
_shared: dict[tuple[ClientFactory, Clock | None, ProducerOptions], KinesisSystemProducer] = {}


def shared_producer(
    client: ClientFactory, options: ProducerOptions = ProducerOptions(), clock: Clock | None = None
) -> KinesisSystemProducer:
    """Return this process's producer for these options; `clock` None is the machine's own."""
    key = (client, clock, options)
    with _shared_lock:
        producer = _shared.get(key)
        if producer is None:
            producer = _shared[key] = KinesisSystemProducer(client, options=options, clock=clock)
        return producer


def _forget_after_fork() -> None:
    """A forked child has our memory but not our threads, and perhaps a lock nobody will release."""
    global _shared_lock
    _shared_lock = threading.Lock()
    _shared.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
