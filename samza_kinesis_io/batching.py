"""How records become PutRecords requests, and what becomes of the answers: pure decisions.

Two rules. Everything that decides what is sent next, what waits and what is tried again lives here. Nothing here
knows how a request is made, what time it is or who else runs: `now` is an argument (monotonic seconds), and the
caller holds the lock.

A record's way through its stream's `Outbox`:

                 add                  take                 answered
    (source) ─┬──────────► READY ─────────────► REQUESTED ───────────► DONE (acknowledged, or failed for good)
              │             ▲ ▲                     │
              └─► TURN ─────┘ └── DELAYED ◄─────────┤ failed for the moment: back-off, then in front of READY
                 ordered=True: an    HELD ◄─────────┤ throttled: waits in the lane of its shard
                 earlier record   SUSPECT ◄─────────┘ the request was refused as a whole: goes again with half of it
                 of its key is
                 on its way

A purge takes a record out of every state but REQUESTED; a purged record in a request is done when that is answered.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import random
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from samza_kinesis_io.aggregation import Aggregate
from samza_kinesis_io.client import PutEntry, PutOutcome, StreamId
from samza_kinesis_io.errors import (
    AccessRefused,
    DeliveryFailed,
    EndpointUnreachable,
    InvalidArgument,
    KinesisIOError,
    RecordRefused,
    Throttled,
    classify,
)
from samza_kinesis_io.limits import MAX_BYTES_PER_PUT, MAX_RECORDS_PER_PUT
from samza_kinesis_io.metrics import SinkTally
from samza_kinesis_io.retry import BackoffPolicy
from samza_kinesis_io.shards import Shard

#: What a queued record takes in memory beside its data and key, so that a bound in bytes also holds for tiny records.
RECORD_OVERHEAD_BYTES: Final = 512
#: While this many requests of a stream are in flight, a further one waits (for `linger_seconds` at most) to be fuller:
#: so a lone bundle is never delayed, and many small concurrent bundles share requests.
EAGER_REQUESTS: Final = 2
#: How often the shard list is asked for at most, when throttles make it worth knowing.
SHARD_MAP_REFRESH_SECONDS: Final = 10.0

#: A throttled shard that took some of the records is tried with at least this many: how many of its records were in
#: that request was chance.
FIRST_WINDOW_RECORDS: Final = 32
#: Throttled shards are tried at multiples of this. Short enough for a window of 20 records to use up the 1,000 records
#: per second that a shard takes.
LANE_TICK_SECONDS: Final = 0.02

_NOTHING: Final = PutEntry(b"")

#: An aggregate's size at most: the KPL's own default. Much more would make throttles coarse.
MAX_AGGREGATE_BYTES: Final = 51_200
#: Aggregates that a source may have open; the oldest is closed for a further one, so that many keys cost no memory.
MAX_OPEN_AGGREGATES: Final = 1_000

TURN: Final = "waits for an earlier record of its key"
READY: Final = "ready"
REQUESTED: Final = "in a request"
DELAYED: Final = "waits to be tried again"
HELD: Final = "waits for its throttled shard"
SUSPECT: Final = "goes again with half of a refused request"
DONE: Final = "done"


class PendingRecord(msgspec.Struct, eq=False, gc=False):
    """A record between `send` and its end. Mutable, and changed by its `Outbox` only.

    Not tracked by the garbage collector, which would walk through all that are on their way again and again: its one
    cycle, through its owner's `outstanding`, is broken when it is done.

    Attributes:
        token: The sender's own; comes back with the delivery.
        turn_key: The partition key whose order is kept; None: no order asked for.
        serial: Grows with every record of the process: the original order.
        attempts: Requests it was part of.
        error_code, error_message: Of the last failure; None: not failed yet.
    """

    entry: PutEntry
    token: object
    owner: SourceLedger
    outbox: Outbox
    turn_key: str | None
    serial: int = 0
    state: str = READY
    size_bytes: int = 0
    lane: Lane | None = None
    attempts: int = 0
    due_seconds: float | None = None
    error_code: str | None = None
    error_message: str | None = None
    shard_id: str | None = None
    sequence_number: str | None = None

    def __post_init__(self) -> None:
        self.size_bytes = self.entry.size_bytes

    @property
    def charged_bytes(self) -> int:
        return self.size_bytes + RECORD_OVERHEAD_BYTES

    def __len__(self) -> int:
        return 1


class Parcel(msgspec.Struct, eq=False, gc=False):
    """A full request's worth of records of one source, with the bookkeeping of one record as long as all goes well.

    Whatever goes wrong, the stream is throttled or one record of it is refused, it is opened: each of its records then
    goes its own way as a `PendingRecord`.

    Attributes:
        serial: Of its first record; those of the others follow.
        outcomes: What Kinesis answered, once all is delivered.
    """

    entries: list[PutEntry]
    tokens: list[object]
    owner: SourceLedger
    outbox: Outbox
    size_bytes: int
    serial: int = 0
    state: str = READY
    due_seconds: float | None = None
    outcomes: Sequence[PutOutcome] = ()
    error_code: str | None = None

    @property
    def charged_bytes(self) -> int:
        return self.size_bytes + RECORD_OVERHEAD_BYTES * len(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


@dataclass(frozen=True, slots=True)
class Aggregated:
    """A record to send, plain or an aggregate, and the tokens of what is in it, in order."""

    entry: PutEntry
    tokens: tuple[object, ...]
    partition_key: str | None
    """Of its user records; the entry's own where it is an aggregate stands for nothing."""


class Aggregator:
    """User records of one source and one stream on their way into aggregates.

    Only user records of one hash key share an aggregate: so no reshard can tear it apart, which would make the KCL
    drop it. Those of one partition key leave in the order in which they came.
    """

    __slots__ = ("_max_bytes", "_open", "_per_key")

    def __init__(self, *, ordered: bool, max_bytes: int = MAX_AGGREGATE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._per_key = ordered
        self._open: dict[tuple[str, str | None], tuple[Aggregate, PutEntry, list[object]]] = {}

    def add(self, entry: PutEntry, token: object) -> list[Aggregated]:
        """Take a user record in; return what is complete now."""
        key, explicit = entry.partition_key, entry.explicit_hash_key
        if key is None:
            raise ValueError("an aggregate needs partition keys")
        complete: list[Aggregated] = []
        # By hash key; but in order every key has an aggregate of its own, whose turn it can wait for. If then its
        # explicit hash key changes, what came before has to leave first.
        group = (key, None) if self._per_key else ("", explicit) if explicit is not None else (key, None)
        found = self._open.get(group)
        if found is not None:
            aggregate, first, tokens = found
            if first.explicit_hash_key == explicit and aggregate.add(key, explicit, entry.data):
                tokens.append(token)
                return complete
            complete.append(self._close(group))
        if len(self._open) >= MAX_OPEN_AGGREGATES:
            complete.append(self._close(next(iter(self._open))))
        aggregate = Aggregate(self._max_bytes)
        aggregate.add(key, explicit, entry.data)
        self._open[group] = (aggregate, entry, [token])
        return complete

    def close(self) -> list[Aggregated]:
        """Return everything that is still open, the oldest first."""
        return [self._close(group) for group in list(self._open)]

    def _close(self, group: tuple[str, str | None]) -> Aggregated:
        aggregate, first, tokens = self._open.pop(group)
        return Aggregated(PutEntry(*aggregate.encode()), tuple(tokens), first.partition_key)


class SourceLedger:
    """What one source (a bundle, a task) has handed over and what became of it.

    Attributes:
        outstanding: Not done yet.
        settled: Done and not collected yet, in the order in which they ended.
        failure: Why the source failed; it takes nothing more then.
        flushing: Its records go out without waiting for company.
        abandoned: Nobody waits for it any more: what is not in a request is dropped, and nothing is tried again.
    """

    __slots__ = (
        "abandoned", "delivery_timeout_seconds", "failure", "flushing", "name", "outstanding", "report_failed",
        "settled", "tally",
    )  # fmt: skip

    def __init__(self, name: Hashable, *, delivery_timeout_seconds: float, report_failed: bool) -> None:
        self.name = name
        self.delivery_timeout_seconds = delivery_timeout_seconds
        self.report_failed = report_failed
        self.outstanding: set[PendingRecord | Parcel] = set()
        self.settled: list[PendingRecord | Parcel] = []
        self.failure: BaseException | None = None
        self.flushing = False
        self.abandoned = False
        self.tally = SinkTally()

    def drop(self, now: float) -> None:
        """Take back what is not in a request; that which is will not be tried again."""
        self.abandoned = True
        # The latest first: so no record gets its key's turn only to be dropped next.
        for record in sorted(self.outstanding, key=_by_serial, reverse=True):
            record.outbox.withdraw(record, now)

    @property
    def outstanding_count(self) -> int:
        """How many records, those in parcels included."""
        return sum(map(len, self.outstanding))

    def fail(self, error: BaseException, now: float) -> None:
        """End the source with an error; the first one stays."""
        if self.failure is None and not self.abandoned:
            self.failure = error
        self.drop(now)


class Budget:
    """Bytes accepted and not done yet."""

    __slots__ = ("limit_bytes", "used_bytes")

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0

    def admits(self, size_bytes: int) -> bool:
        """Say whether a record may enter. One larger than the whole bound may, alone."""
        return self.used_bytes == 0 or self.used_bytes + size_bytes <= self.limit_bytes


@dataclass(frozen=True, slots=True)
class ShardMap:
    """Where a record will go, as far as the last shard list says. Empty: no prediction."""

    starts: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    shard_ids: tuple[str, ...] = ()

    @classmethod
    def of(cls, shards: Iterable[Shard]) -> ShardMap:
        opened = sorted((s for s in shards if not s.is_closed), key=lambda s: s.hash_key_range)
        return cls(
            tuple(s.hash_key_range.start for s in opened),
            tuple(s.hash_key_range.end for s in opened),
            tuple(s.shard_id for s in opened),
        )

    def shard_of(self, entry: PutEntry) -> str | None:
        """Return the id of the shard; None where it is not known, which is a lane of its own."""
        if not self.starts:
            return None
        key = hash_key(entry)
        if key is None:
            return None
        at = bisect_right(self.starts, key) - 1
        return self.shard_ids[at] if at >= 0 and key <= self.ends[at] else None


def hash_key(entry: PutEntry) -> int | None:
    """Return the hash key a record is routed by; None without any key.

    "An MD5 hash function is used to map partition keys to 128-bit integer values and to map associated data records
    to shards." An explicit hash key overrides it.
    """
    if entry.explicit_hash_key is not None:
        return int(entry.explicit_hash_key)
    if entry.partition_key is None:
        return None
    return int.from_bytes(hashlib.md5(entry.partition_key.encode(), usedforsecurity=False).digest(), "big")


class Lane:
    """The records of one throttled shard. Others pass it by; it has one request in flight, of at most `window` records.

    The window is learnt as TCP learns its own: halved by a throttle, doubled by an answer without one.
    """

    __slots__ = ("failures", "in_flight", "paused_until", "queue", "shard_id", "window")

    def __init__(self, shard_id: str | None, window: int) -> None:
        self.shard_id = shard_id
        self.window = window
        self.failures = 0
        self.paused_until = 0.0
        self.in_flight = False
        self.queue: deque[PendingRecord] = deque()

    def pause(self, until: float) -> None:
        """Wait, to the next tick at least: so the lanes of many shards come due together and share a request."""
        self.paused_until = math.ceil(until / LANE_TICK_SECONDS) * LANE_TICK_SECONDS

    def merge(self, records: Iterable[PendingRecord]) -> None:
        self.queue = deque(sorted((*records, *self.queue), key=_by_serial))


class Outbox:
    """The records on their way to one stream.

    All methods take `now` and must be called under one lock. A request is what `take` returns, and comes back
    through exactly one of `answered` and `refused`.
    """

    def __init__(
        self, stream: StreamId, budget: Budget, *, linger_seconds: float, backoff: BackoffPolicy, rng: random.Random
    ) -> None:
        self.stream = stream
        self.requests_in_flight = 0
        self._budget = budget
        self._linger_seconds = linger_seconds
        self._backoff = backoff
        self._rng = rng
        self._ready: deque[PendingRecord] = deque()
        self._ready_count = 0
        self._ready_bytes = 0
        self._ready_since = 0.0
        self._urgent_since: float | None = None
        self._parcels: deque[Parcel] = deque()
        self._parcel_is_next = False
        self._turns: dict[str, deque[PendingRecord]] = {}
        self._delayed: list[tuple[float, int, list[PendingRecord]]] = []
        self._suspects: deque[list[PendingRecord]] = deque()
        self._lanes: dict[str | None, Lane] = {}
        self._paused_until = 0.0
        self._whole_throttles = 0
        self._ever_answered = False
        self._shard_map = ShardMap()
        self._map_due_seconds: float | None = None
        self._map_stale = True

    # Records in

    def add(self, record: PendingRecord, serial: int, now: float) -> bool:
        """Accept a record. Returns whether that changes when there is something to do."""
        record.serial = serial
        record.owner.outstanding.add(record)
        self._budget.used_bytes += record.charged_bytes
        key = record.turn_key
        if key is not None:
            behind = self._turns.get(key)
            if behind is not None:
                record.state = TURN
                behind.append(record)
                return False
            self._turns[key] = deque()
        was_full = self._is_full()
        self._make_ready(record, now)
        return self._ready_count == 1 or (not was_full and self._is_full())

    def add_parcel(self, parcel: Parcel, serial: int, now: float) -> None:
        """Accept a parcel; `serial` is its first record's."""
        parcel.serial = serial
        parcel.owner.outstanding.add(parcel)
        self._budget.used_bytes += parcel.charged_bytes
        self._parcels.append(parcel)

    def open(self, parcel: Parcel, now: float) -> list[PendingRecord]:
        """Return a parcel's records, in the state it is in; it is no more."""
        owner = parcel.owner
        records = [
            PendingRecord(entry, token, owner, self, None, serial, parcel.state)
            for serial, (entry, token) in enumerate(zip(parcel.entries, parcel.tokens, strict=True), parcel.serial)
        ]
        for record in records:
            record.due_seconds = parcel.due_seconds
        owner.outstanding.discard(parcel)
        owner.outstanding.update(records)
        parcel.state = DONE
        return records

    def urge(self, now: float) -> None:
        """Let what is ready go without waiting for company: a source flushes, or a sender waits for room."""
        if self._ready_count and self._urgent_since is None:
            self._urgent_since = now

    def withdraw(self, record: PendingRecord | Parcel, now: float) -> None:
        """Take a record back, unless it is in a request."""
        if record.state not in (REQUESTED, DONE):
            if isinstance(record, Parcel):
                self._parcels.remove(record)
                self._finish_parcel(record)
                return
            if record.state is READY:
                self._forget_ready(record)
            self._finish(record, now)
            # Its shell stays in the queue in which it stood until that comes to it. What it holds must not: its bytes
            # are released, and while a stream takes nothing, bundles that fail and are run again would add up.
            record.entry, record.token = _NOTHING, None

    # Requests out

    def take(self, now: float) -> list[PendingRecord] | Parcel | None:
        """Return the next request to make now; None: nothing is due (see `due`)."""
        self._wake(now)
        if now < self._paused_until:
            return None
        while self._suspects:
            group = [r for r in self._suspects.popleft() if r.state is SUSPECT]
            if group:
                return self._request(group)
        if self._parcels:
            if self._lanes:
                # Some shard is throttled: each record has to look where it goes.
                while self._parcels:
                    for record in self.open(self._parcels.popleft(), now):
                        self._make_ready(record, now)
            elif self._parcel_is_next or not self._is_due(now):
                self._parcel_is_next = False
                return self._request_parcel(self._parcels.popleft(), now)
            self._parcel_is_next = True  # they take turns with what others send
        chosen: list[PendingRecord] = []
        size = 0
        for lane in [lane for lane in self._lanes.values() if not lane.in_flight and lane.paused_until <= now]:
            size = self._take_from_lane(lane, chosen, size)
        if chosen or self._is_due(now):
            self._pack(chosen, size, now)
        return self._request(chosen) if chosen else None

    def due(self) -> float | None:
        """Return when to call `take` again; None: not before something else happens.

        It may then still find nothing, and know better when to be asked next: what is ready can turn out to be for a
        throttled shard.
        """
        if self._suspects or self._parcels:
            return self._paused_until
        times = [lane.paused_until for lane in self._lanes.values() if lane.queue and not lane.in_flight]
        if self._delayed:
            times.append(self._delayed[0][0])
        if self._is_full():
            times.append(self._paused_until)
        else:
            partial = self._partial_due()
            if partial is not None:
                times.append(partial)
        return max(self._paused_until, min(times)) if times else None

    @property
    def parcels_waiting(self) -> int:
        return len(self._parcels)

    @property
    def is_idle(self) -> bool:
        """Nothing is here and nothing is out: the outbox need not be looked at."""
        return not (self._ready_count or self.is_moving)

    @property
    def is_moving(self) -> bool:
        """Something is out, or will go out again whatever happens."""
        return bool(
            self.requests_in_flight
            or self._parcels
            or self._delayed
            or self._suspects
            or any(lane.queue for lane in self._lanes.values())
        )

    # Answers

    def wants_shard_map(self, outcomes: Sequence[PutOutcome], now: float) -> bool:
        """Say whether the shard list should be fetched before `answered`. Claims the fetch: true once in a while."""
        if self._map_due_seconds is not None and now < self._map_due_seconds:
            return False
        if not any(o.error_code is not None and _is_throttle(o.error_code) for o in outcomes):
            return False
        if not self._map_stale:
            return False
        self._map_due_seconds = now + SHARD_MAP_REFRESH_SECONDS
        return True

    def learn(self, shard_map: ShardMap, now: float) -> None:
        """Predict by this map from now on. What waits in the lanes of the old map is sorted anew."""
        self._shard_map = shard_map
        self._map_stale = False
        waiting = [r for lane in self._lanes.values() for r in lane.queue if r.state is HELD]
        self._lanes.clear()
        self._make_ready_first(waiting, now)

    def answered(self, request: Sequence[PendingRecord], outcomes: Sequence[PutOutcome], now: float) -> None:
        """Settle what was acknowledged, and put the rest where it is tried again."""
        self.requests_in_flight -= 1
        request[0].owner.tally.waited(now - (now if request[0].due_seconds is None else request[0].due_seconds))
        self._ever_answered = True
        self._whole_throttles = 0
        failed: list[tuple[PendingRecord, PutOutcome]] = []
        taken_by_shard: Counter[str | None] = Counter()
        probed: dict[int, Lane] = {}
        for record, outcome in zip(request, outcomes, strict=True):
            record.attempts += 1
            lane = record.lane
            if lane is not None:
                probed[id(lane)] = lane
            # Neither error nor sequence number: nobody has said that it was written.
            if outcome.error_code is not None or not outcome.sequence_number:
                failed.append((record, outcome))
                continue
            record.shard_id = outcome.shard_id
            record.sequence_number = outcome.sequence_number
            taken_by_shard[outcome.shard_id] += 1
            if lane is not None and lane.shard_id is not None and lane.shard_id != outcome.shard_id:
                self._map_stale = True
            self._settle(record, now)
        throttled: dict[str | None, list[PendingRecord]] = {}
        delayed: list[PendingRecord] = []
        for record, outcome in failed:
            code = outcome.error_code or "IncompleteAnswer"
            if not self._may_try_again(record, code, outcome.error_message, now):
                continue
            error = classify(
                operation="PutRecords", code=code, message=outcome.error_message or "", status=200,
                subject=f"a record of stream {self.stream.name}",
            )  # fmt: skip
            if isinstance(error, AccessRefused):
                record.owner.fail(error, now)
                self._finish(record, now)
            elif isinstance(error, InvalidArgument):
                self._give_up(record, error, now)
            elif isinstance(error, Throttled):
                record.owner.tally.throttled(self.stream.name)
                throttled.setdefault(self._shard_map.shard_of(record.entry), []).append(record)
            else:
                delayed.append(record)
        self._delay(delayed, now)
        for shard_id, records in throttled.items():
            self._hold(shard_id, records, taken_by_shard, now)
        for lane in probed.values():
            lane.in_flight = False
            if lane.shard_id not in throttled:
                lane.failures = 0
                lane.window = min(lane.window * 2, MAX_RECORDS_PER_PUT)
                lane.pause(now)
        self._expire(request, now)

    def delivered(self, parcel: Parcel, outcomes: Sequence[PutOutcome], now: float) -> None:
        """Settle a parcel of which all was acknowledged."""
        owner = parcel.owner
        self.requests_in_flight -= 1
        self._ever_answered = True
        self._whole_throttles = 0
        if parcel.due_seconds is not None:
            owner.tally.waited(now - parcel.due_seconds)
        if not owner.abandoned:
            parcel.outcomes = outcomes
            owner.settled.append(parcel)
            owner.tally.acknowledged(parcel.size_bytes, len(parcel))
        self._finish_parcel(parcel)

    def refused(self, request: Sequence[PendingRecord], error: BaseException, now: float) -> None:
        """Handle a call that failed as a whole."""
        self.requests_in_flight -= 1
        code = getattr(error, "code", "") or type(error).__name__
        message = getattr(error, "service_message", "") or str(error)
        for lane in {id(r.lane): r.lane for r in request if r.lane is not None}.values():
            lane.in_flight = False
        for record in request:
            record.attempts += 1
        retryable = (isinstance(error, KinesisIOError) and error.retryable) or (
            isinstance(error, EndpointUnreachable) and self._ever_answered
        )
        if not retryable and not isinstance(error, InvalidArgument):
            for owner in {id(r.owner): r.owner for r in request}.values():
                owner.fail(error, now)
            for record in request:
                self._finish(record, now)
            return
        again = [r for r in request if self._may_try_again(r, code, message, now)]
        if isinstance(error, InvalidArgument):
            self._halve(again, len(request), error, now)
        elif isinstance(error, Throttled):
            for record in again:
                record.owner.tally.throttled(self.stream.name)
            if now >= self._paused_until:  # else other requests of the same moment have told us already
                self._whole_throttles += 1
                self._paused_until = now + self._backoff.wait_seconds(self._whole_throttles, self._rng)
            self._make_ready_first(again, now)
        else:
            self._delay(again, now)
        self._expire(request, now)

    # Inside

    def _is_full(self) -> bool:
        return self._ready_count >= MAX_RECORDS_PER_PUT or self._ready_bytes >= MAX_BYTES_PER_PUT

    def _is_due(self, now: float) -> bool:
        if self._is_full():
            return True
        due = self._partial_due()
        return due is not None and due <= now

    def _partial_due(self) -> float | None:
        if self._ready_count == 0:
            return None
        if self._urgent_since is not None:
            return self._urgent_since + (0.0 if self.requests_in_flight < EAGER_REQUESTS else self._linger_seconds)
        return self._ready_since + self._linger_seconds if self.requests_in_flight == 0 else None

    def _make_ready(self, record: PendingRecord, now: float) -> None:
        record.state = READY
        record.lane = None
        if self._ready_count == 0:
            self._ready.clear()  # only withdrawn records are left in it
            self._ready_since = now
            self._urgent_since = None
        self._ready.append(record)
        self._ready_count += 1
        self._ready_bytes += record.size_bytes
        if record.owner.flushing:
            self.urge(now)

    def _make_ready_first(self, records: list[PendingRecord], now: float) -> None:
        """Put records that were tried before in front, in their original order; they wait for nobody."""
        if not records:
            return
        if self._ready_count == 0:
            self._ready.clear()
            self._ready_since = now
            self._urgent_since = None
        records.sort(key=_by_serial)
        for record in records:
            record.state = READY
            record.lane = None
            self._ready_bytes += record.size_bytes
        self._ready_count += len(records)
        self._ready.extendleft(reversed(records))
        self.urge(now)

    def _forget_ready(self, record: PendingRecord) -> None:
        self._ready_count -= 1
        self._ready_bytes -= record.size_bytes

    def _wake(self, now: float) -> None:
        woken: list[PendingRecord] = []
        while self._delayed and self._delayed[0][0] <= now:
            woken += [r for r in heapq.heappop(self._delayed)[2] if r.state is DELAYED]
        self._make_ready_first(woken, now)

    def _pack(self, chosen: list[PendingRecord], size: int, now: float) -> None:
        """Fill a request from the front of what is ready, never past a record that does not fit: order stays."""
        ready = self._ready
        while ready and len(chosen) < MAX_RECORDS_PER_PUT:
            record = ready[0]
            if record.state is not READY:
                ready.popleft()
                continue
            if self._lanes:
                lane = self._lanes.get(self._shard_map.shard_of(record.entry))
                if lane is not None:
                    ready.popleft()
                    self._forget_ready(record)
                    record.state = HELD
                    if record.due_seconds is None:
                        record.due_seconds = now
                    lane.queue.append(record)
                    continue
            if chosen and size + record.size_bytes > MAX_BYTES_PER_PUT:
                break
            ready.popleft()
            self._forget_ready(record)
            size += record.size_bytes
            record.due_seconds = now if record.due_seconds is None else record.due_seconds
            chosen.append(record)

    def _take_from_lane(self, lane: Lane, chosen: list[PendingRecord], size: int) -> int:
        room = lane.window
        while lane.queue and room and len(chosen) < MAX_RECORDS_PER_PUT:
            record = lane.queue[0]
            if record.state is HELD:
                if chosen and size + record.size_bytes > MAX_BYTES_PER_PUT:
                    break
                size += record.size_bytes
                record.lane = lane
                lane.in_flight = True
                chosen.append(record)
                room -= 1
            lane.queue.popleft()
        if not lane.queue and not lane.in_flight:
            del self._lanes[lane.shard_id]  # nothing waits for this shard any more: no reason to single it out
        return size

    def _request(self, records: list[PendingRecord]) -> list[PendingRecord]:
        for record in records:
            record.state = REQUESTED
        self.requests_in_flight += 1
        records[0].owner.tally.requested(len(records), sum(r.size_bytes for r in records))
        return records

    def _request_parcel(self, parcel: Parcel, now: float) -> Parcel:
        parcel.state = REQUESTED
        parcel.due_seconds = now
        self.requests_in_flight += 1
        parcel.owner.tally.requested(len(parcel), parcel.size_bytes)
        return parcel

    def _finish_parcel(self, parcel: Parcel) -> None:
        parcel.state = DONE
        self._budget.used_bytes -= parcel.charged_bytes
        parcel.owner.outstanding.discard(parcel)

    def _may_try_again(self, record: PendingRecord, code: str, message: str | None, now: float) -> bool:
        """Note a failure. An abandoned source's record ends here."""
        record.error_code = code
        record.error_message = message
        record.owner.tally.failed(code)
        if record.owner.abandoned:
            self._finish(record, now)
            return False
        return True

    def _delay(self, records: list[PendingRecord], now: float) -> None:
        records = [r for r in records if r.state is REQUESTED]
        if records:
            for record in records:
                record.state = DELAYED
            wait = self._backoff.wait_seconds(max(r.attempts for r in records), self._rng)
            # The serial makes entries of the heap comparable; no two groups share a record.
            heapq.heappush(self._delayed, (now + wait, records[0].serial, records))

    def _hold(
        self, shard_id: str | None, records: list[PendingRecord], taken_by_shard: Counter[str | None], now: float
    ) -> None:
        records = [r for r in records if r.state is REQUESTED]
        if not records:
            return
        taken = taken_by_shard.total() if shard_id is None else taken_by_shard[shard_id]
        lane = self._lanes.get(shard_id)
        if lane is None:
            lane = self._lanes[shard_id] = Lane(shard_id, max(taken, FIRST_WINDOW_RECORDS) if taken else 1)
            told = True
        else:
            # Requests that left before the lane was paused say nothing new.
            told = any(r.lane is lane for r in records)
            if told:
                lane.window = max(1, taken, lane.window // 2)
        if told:
            # It moves: no reason to wait longer each time.
            lane.failures = 1 if taken else lane.failures + 1
            # A shard's allowance is refilled by the second, so the wait starts at a good part of one; of that the part
            # which was too much: a shard that refused one record of a hundred is hardly over its limit.
            wait = self._backoff.wait_seconds(lane.failures + 2, self._rng)
            lane.pause(now + wait * max(0.1, len(records) / (len(records) + taken)))
        for record in records:
            record.state = HELD
            record.lane = None
        lane.merge(records)

    def _halve(self, again: list[PendingRecord], tried: int, error: InvalidArgument, now: float) -> None:
        if tried == 1:
            for record in again:
                self._give_up(record, error, now)
            return
        middle = (len(again) + 1) // 2
        for record in again:
            record.state = SUSPECT
        for part in (again[middle:], again[:middle]):
            if part:
                self._suspects.appendleft(part)

    def _give_up(self, record: PendingRecord, error: InvalidArgument, now: float) -> None:
        """Kinesis will never take this record."""
        if record.owner.report_failed:
            self._settle(record, now)
            return
        refusal = RecordRefused(
            f"stream {self.stream.name} refuses the record with partition key {record.entry.partition_key!r} "
            f"of {record.size_bytes} bytes: {error.service_message or error} "
            "(dead_letters=True would send it to result.failed instead)",
            code=error.code or "InvalidArgumentException",
            size_bytes=record.size_bytes,
        )
        refusal.__cause__ = error
        record.owner.fail(refusal, now)
        self._finish(record, now)

    def _settle(self, record: PendingRecord, now: float) -> None:
        if not record.owner.abandoned:
            record.owner.settled.append(record)
            if record.sequence_number is not None:
                record.owner.tally.acknowledged(record.size_bytes)
        self._finish(record, now)

    def _finish(self, record: PendingRecord, now: float) -> None:
        """End a record. The only place where its bytes are released and its key's turn goes on."""
        if record.state is DONE:
            return
        had_turn = record.state is not TURN
        record.state = DONE
        record.lane = None
        self._budget.used_bytes -= record.charged_bytes
        record.owner.outstanding.discard(record)
        key = record.turn_key
        if key is None or not had_turn:
            return
        behind = self._turns[key]
        while behind:
            following = behind.popleft()
            if following.state is TURN:
                self._make_ready(following, now)
                return
        del self._turns[key]

    def _expire(self, request: Sequence[PendingRecord], now: float) -> None:
        """Fail the sources whose records have been tried for too long."""
        for record in request:
            owner = record.owner
            if record.state is DONE or record.due_seconds is None:
                continue
            if owner.abandoned:  # it failed while this answer was handled
                self.withdraw(record, now)
            elif now - record.due_seconds >= owner.delivery_timeout_seconds:
                counts: Counter[str] = Counter()
                for waiting in owner.outstanding:
                    counts[waiting.error_code or "not sent yet"] += len(waiting)
                listed = ", ".join(f"{code}: {count}" for code, count in sorted(counts.items()))
                owner.fail(
                    DeliveryFailed(
                        f"{owner.outstanding_count} records for stream {self.stream.name} could not be delivered "
                        f"within delivery_timeout_seconds={owner.delivery_timeout_seconds:g} ({listed}); give the "
                        "stream more shards, spread the partition keys, or raise delivery_timeout_seconds",
                        counts_by_code=counts,
                    ),
                    now,
                )


def _by_serial(record: PendingRecord | Parcel) -> int:
    return record.serial


def _is_throttle(code: str) -> bool:
    return isinstance(classify(operation="PutRecords", code=code, message="", status=200), Throttled)
