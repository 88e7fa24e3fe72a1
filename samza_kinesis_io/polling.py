"""What to ask Kinesis about one shard next, and what an answer means: a state machine without I/O.

This file knows no thread, no lock and no clock: it is told the time and says when it wants to be asked again.

States of a `ShardPoller`:

    checking ──► seeking ──► reading ──► ended
    (only for a  (wants an    │  ▲
     very old     iterator)   │  └── an expired iterator, an unbelievable shard end: seek again, behind
     position)        ▲       │      the last record *fetched*
                      └───────┘
    listing: ListShards must say what became of the shard (missing, or closed without believable children)
"""

from __future__ import annotations

import enum
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from samza_kinesis_io import metrics
from samza_kinesis_io.client import RecordsAnswer, StreamDescription
from samza_kinesis_io.errors import (
    DataLoss,
    IncompleteShardList,
    InvalidArgument,
    IteratorExpired,
    KinesisIOError,
    ResourceNotFound,
    ServiceError,
    StreamNotFound,
    StreamRecreated,
    Throttled,
)
from samza_kinesis_io.limits import (
    MAX_BYTES_PER_GET,
    MAX_GET_RECORDS_PER_SECOND_PER_SHARD,
    MAX_READ_BYTES_PER_SECOND_PER_SHARD,
    MAX_RECORDS_PER_GET,
)
from samza_kinesis_io.positions import WHOLE_RECORD, Position, PositionKind, arrival_seconds_of
from samza_kinesis_io.records import KinesisRecord
from samza_kinesis_io.retry import BackoffPolicy
from samza_kinesis_io.shards import ChildShard, HashKeyRange, Shard, children_of, uncovered

#: No stream has a shorter retention, so a younger position needs no look at the stream's own.
MIN_RETENTION_SECONDS = 24 * 3600.0
#: How often a shard end is asked again before ListShards decides.
MAX_UNBELIEVABLE_ENDS = 3
#: After how many empty answers whose lag does not fall an iterator is renewed.
STUCK_LAG_ANSWERS = 4
#: How many fresh iterators, and how long, it takes until such a lag counts as none. A lag that grows with the clock may
#: be that of a record which the service will yet deliver, so it takes longer.
STUCK_LAG_ITERATORS = 3
STUCK_LAG_SECONDS = 60.0
GROWING_LAG_SECONDS = 600.0
#: For how long a stream's retention is known once asked.
RETENTION_KNOWN_SECONDS = 600.0
#: How often an answer that makes no sense (a listed shard "not found", a hole in the list) is asked again.
MAX_CONTRADICTIONS = 5


@dataclass(frozen=True, slots=True)
class ReadLimits:
    """How fast one shard may be read. The defaults are the service's; None switches a limit off."""

    calls_per_second: float | None = float(MAX_GET_RECORDS_PER_SECOND_PER_SHARD)
    bytes_per_second: float | None = float(MAX_READ_BYTES_PER_SECOND_PER_SHARD)


class ShardPacer:
    """When a shard may be asked again. Outlives its readers: the service counts per shard, not per reader."""

    __slots__ = ("next_call_seconds",)

    def __init__(self) -> None:
        self.next_call_seconds = float("-inf")

    def on_call(self, now: float, limits: ReadLimits) -> None:
        if limits.calls_per_second is not None:
            self.next_call_seconds = max(self.next_call_seconds, now) + 1 / limits.calls_per_second

    def on_bytes(self, called_at: float, size_bytes: int, limits: ReadLimits) -> None:
        # "If a call to GetRecords returns this amount of data (10 MiB), subsequent calls made within the next 5
        # seconds throw an exception."
        if limits.bytes_per_second is not None:
            self.next_call_seconds = max(self.next_call_seconds, called_at + size_bytes / limits.bytes_per_second)


def _counted_bytes(answer: RecordsAnswer) -> int:
    """Return about what the service counts: partition keys too. A full answer counts as full, whatever is missing."""
    if answer.size_bytes > 0.9 * MAX_BYTES_PER_GET:
        return MAX_BYTES_PER_GET
    keys = [len(r.partition_key or "") for r in (answer.records[:1] + answer.records[-1:])]
    return answer.size_bytes + len(answer.records) * max(keys, default=0)


class Call(enum.Enum):
    """What a poller wants to be asked of the service."""

    DESCRIBE_STREAM = "DescribeStreamSummary"
    GET_SHARD_ITERATOR = "GetShardIterator"
    GET_RECORDS = "GetRecords"
    LIST_SHARDS = "ListShards"


class Lost(msgspec.Struct, frozen=True):
    """Records that Kinesis dropped before they were read.

    Attributes:
        reason: For the error or the log.
        from_micros: The time up to which the shard had been read; None if unknown.
        restart: Where the rest of this shard begins; None if the shard is gone.
        listed: The stream's shards now, where the shard is gone.
        error: What to raise where the policy is FAIL.
    """

    reason: str
    from_micros: int | None
    restart: Position | None
    listed: tuple[Shard, ...]
    error: DataLoss


class Fetched(msgspec.Struct):
    """What one answer brought, in the order in which it must be handed on: records, then what they prove, then the end.

    Attributes:
        records: As the service sent them: aggregates not yet taken apart.
        read_until_micros: Everything that arrived before it has been delivered once these records are.
        was_empty: There were no records in the answer.
        millis_behind_latest: As the service said it.
        children: None: the shard goes on. Else it ends here, and these are its children.
        lost: Records were lost before this point. The shard goes on at `lost.restart`, or not at all.
        error: Reading failed for good here; raised when everything before it has been handed out.
    """

    records: Sequence[KinesisRecord] = ()
    size_bytes: int = 0
    read_until_micros: int | None = None
    was_empty: bool = False
    millis_behind_latest: int | None = None
    children: tuple[ChildShard, ...] | None = None
    lost: Lost | None = None
    error: KinesisIOError | None = None


class _State(enum.Enum):
    CHECKING = enum.auto()
    SEEKING = enum.auto()
    READING = enum.auto()
    LISTING = enum.auto()
    ENDED = enum.auto()


_TRANSIENT_BACKOFF = BackoffPolicy(initial_seconds=0.2, max_seconds=10.0)
_THROTTLE_BACKOFF = BackoffPolicy(initial_seconds=1.0, max_seconds=20.0)
_CONTRADICTION_SECONDS = 1.0


class ShardPoller:
    """The reading of one shard, from `position` on, as a series of calls and answers.

    The caller alternates: `call` and `due_seconds` say what to ask and when; exactly one of the `on_` methods takes
    what came back. An `on_` method returns what there is to hand on, or None. After an end, a loss without restart or
    an error, `is_ended` is true.
    """

    def __init__(
        self,
        shard_id: str,
        hash_key_range: HashKeyRange,
        position: Position,
        *,
        read_until_micros: int | None,
        pacer: ShardPacer,
        limits: ReadLimits,
        poll_interval_seconds: float,
        max_records_per_get: int = MAX_RECORDS_PER_GET,
        rng: random.Random,
        now_monotonic: float,
        now_epoch: float,
    ) -> None:
        self.shard_id = shard_id
        self._range = hash_key_range
        self._position = position
        self._read_until_micros = read_until_micros
        self._pacer = pacer
        self._limits = limits
        self._poll_interval = poll_interval_seconds
        self.limit = max_records_per_get
        self._rng = rng
        self._due = now_monotonic
        self._iterator: str | None = None
        self._renewed_after_invalid = False
        self._failures = 0
        self._throttles = 0
        self._unbelievable_ends = 0
        self._contradictions = 0
        self._missing = False
        self._lowest_lag: int | None = None
        self._unfallen_lags = 0
        self._unfallen_since = now_monotonic
        self._fresh_iterators = 0
        self._renew_iterator = False
        self._retention_seconds: float | None = None
        self._retention_asked = now_monotonic
        # A read that begins at the horizon races with it, and has lost nothing that it was promised.
        self._left_horizon = position.is_sequence or read_until_micros is not None
        self._called_at = now_monotonic
        #: As the service said it last.
        self.millis_behind_latest: int | None = None
        #: What happened since somebody last took it, by the names of `metrics.py`.
        self.counts: Counter[str] = Counter()
        self._state = _State.SEEKING
        self._seek(now_monotonic, now_epoch)

    # What to ask, and when.

    @property
    def is_ended(self) -> bool:
        return self._state is _State.ENDED

    @property
    def call(self) -> Call:
        if self._state is _State.CHECKING:
            return Call.DESCRIBE_STREAM
        if self._state is _State.LISTING:
            return Call.LIST_SHARDS
        return Call.GET_RECORDS if self._iterator is not None else Call.GET_SHARD_ITERATOR

    @property
    def due_seconds(self) -> float:
        """The monotonic time before which `call` must not be made."""
        return max(self._due, self._pacer.next_call_seconds) if self.call is Call.GET_RECORDS else self._due

    @property
    def position(self) -> Position:
        """Where a new iterator would start: behind the last record fetched."""
        return self._position

    @property
    def iterator(self) -> str:
        assert self._iterator is not None
        return self._iterator

    def on_call(self, now: float) -> None:
        """The call is about to be made."""
        self._called_at = now
        if self.call is Call.GET_RECORDS:
            self.counts[metrics.GET_RECORDS_CALLS] += 1
            self._pacer.on_call(now, self._limits)

    # What came back.

    def on_description(self, description: StreamDescription, now: float, now_epoch: float) -> Fetched | None:
        """Is a very old sequence position still inside the retention, and of this very stream?"""
        self._failures = 0
        self._state = _State.SEEKING if self._iterator is None else _State.READING
        self._retention_seconds = description.retention_hours * 3600.0
        self._retention_asked = now
        time = self._record_seconds
        if time is not None and description.creation_seconds > time + 60:
            return self._fail(
                StreamRecreated(
                    f"stream {description.name} was created at {description.creation_seconds:.0f} (epoch seconds), "
                    f"after the record at which the reading of shard {self.shard_id} stands ({self._position}): it "
                    "was deleted and created again. Start a new job, without the old checkpoint."
                )
            )
        if self._is_older_than(self._retention_seconds, now_epoch):
            return self._lose_to_retention()
        return None

    def on_iterator(self, iterator: str, now: float) -> None:
        self._iterator = iterator
        self._state = _State.READING
        self._failures = 0
        self._due = now

    def on_answer(self, answer: RecordsAnswer, now: float) -> Fetched | None:
        self._pacer.on_bytes(self._called_at, _counted_bytes(answer), self._limits)
        self._failures = self._throttles = 0
        if self._is_older_than(MIN_RETENTION_SECONDS, answer.server_time_seconds):
            # Whatever lies behind a position that left the retention may be gone, and the iterator jumped over it.
            if self._retention_seconds is None or now - self._retention_asked > RETENTION_KNOWN_SECONDS:
                self._state = _State.CHECKING  # and then asks with this same iterator again
                self._due = now
                return None
            if self._left_horizon and self._is_older_than(self._retention_seconds, answer.server_time_seconds):
                return self._lose_to_retention()
        self._renewed_after_invalid = False
        if answer.records:
            self._position = Position.after(int(answer.records[-1].sequence_number), WHOLE_RECORD)
            self._contradictions = 0
        else:
            self.counts[metrics.EMPTY_POLLS] += 1
        self.millis_behind_latest = answer.millis_behind_latest
        fetched = Fetched(
            records=answer.records,
            size_bytes=answer.size_bytes,
            read_until_micros=self._read_until(answer, now),
            was_empty=not answer.records,
            millis_behind_latest=answer.millis_behind_latest,
        )
        if answer.next_shard_iterator is None or answer.child_shards:
            if answer.next_shard_iterator is None and self._covers(answer.child_shards):
                return self._end(fetched, answer.child_shards)
            # Not a believable end (the KCL's rule: no iterator and children, or an iterator and none). Ask again,
            # behind the records just delivered; after a few times the list of shards decides.
            self.counts[metrics.SHARD_END_RETRIES] += 1
            self._unbelievable_ends = 1 if answer.records else self._unbelievable_ends + 1
            self._iterator = None
            self._due = now + _TRANSIENT_BACKOFF.wait_seconds(self._unbelievable_ends, self._rng)
            # An answer that says it lags behind is not the last one, whatever it says of the shard.
            most = MAX_UNBELIEVABLE_ENDS * (10 if answer.millis_behind_latest else 1)
            self._state = _State.LISTING if self._unbelievable_ends >= most else _State.SEEKING
            # What such an answer says of the lag is not to be trusted either.
            fetched.read_until_micros = None
            return fetched if fetched.records else None
        self._unbelievable_ends = 0
        if self._renew_iterator:
            self._iterator = None
            self._state = _State.SEEKING
            self._due = self._called_at + self._poll_interval
        else:
            self._iterator = answer.next_shard_iterator
            more = bool(answer.millis_behind_latest) or (answer.millis_behind_latest is None and bool(answer.records))
            # A lag that does not fall promises nothing, so the shard is asked at the usual interval.
            at_once = more and self._unfallen_lags < STUCK_LAG_ANSWERS and self._fresh_iterators == 0
            self._due = now if at_once else self._called_at + self._poll_interval
        self._renew_iterator = False
        return fetched

    def on_shards(self, listed: Sequence[Shard], now: float) -> Fetched | None:
        """ListShards has the last word about an end that could not be believed, and about a shard that is not found."""
        self._failures = 0
        mine = next((s for s in listed if s.shard_id == self.shard_id), None)
        if mine is None:
            return self._lose(
                f"shard {self.shard_id} is gone: its last records left the retention before they were read",
                restart=None,
                listed=tuple(listed),
            )
        if self._missing:
            return self._contradiction(f"shard {self.shard_id} is listed, but GetRecords does not find it", now)
        if not mine.is_closed:
            return self._contradiction(f"shard {self.shard_id} has no next iterator, but is listed as open", now)
        children = children_of(self.shard_id, listed)
        if self._covers(children):
            return self._end(Fetched(was_empty=True), children)
        return self._contradiction(
            f"shard {self.shard_id} is closed, but its listed children {[c.shard_id for c in children]} leave hash "
            f"keys {self._holes(children)} to nobody",
            now,
        )

    def on_error(self, error: KinesisIOError, now: float, now_epoch: float) -> Fetched | None:
        """Retry, renew, look closer, or give up; the only place where the source decides about errors."""
        call = self.call
        if isinstance(error, Throttled):
            self.counts[metrics.READ_THROTTLES] += 1
            self._throttles += 1
            self._due = now + _THROTTLE_BACKOFF.wait_seconds(self._throttles, self._rng)
            return None
        if isinstance(error, IteratorExpired):
            self.counts[metrics.EXPIRED_ITERATORS] += 1
            self._seek(now, now_epoch)
            return None
        if isinstance(error, StreamNotFound):
            return self._fail(error)
        if isinstance(error, ResourceNotFound):
            self._missing = True
            self._iterator = None
            self._state = _State.LISTING
            self._due = now
            return None
        if isinstance(error, InvalidArgument):
            return self._on_invalid_argument(error, call, now, now_epoch)
        if error.retryable:
            self._failures += 1
            self._count_retry(error)
            self._due = now + _TRANSIENT_BACKOFF.wait_seconds(self._failures, self._rng)
            return None
        return self._fail(error)

    def on_defect(self, error: KinesisIOError) -> Fetched:
        """Something failed that no rule knows; the shard is not read on."""
        return self._fail(error)

    def _on_invalid_argument(self, error: InvalidArgument, call: Call, now: float, now_epoch: float) -> Fetched | None:
        words = error.service_message.lower()
        if call is Call.GET_RECORDS:
            if not self._renewed_after_invalid:
                self._renewed_after_invalid = True
                self._count_retry(error)
                self._seek(now, now_epoch)
                return None
            return self._fail(error)
        if self._position.kind is PositionKind.AT_TIMESTAMP and ("greater" in words or "future" in words):
            # The service's clock is behind ours: the moment comes.
            self._failures += 1
            self._count_retry(error)
            self._due = now + min(1.0, self._poll_interval)
            return None
        if "did not come from this stream" in words:
            return self._fail(
                StreamRecreated(
                    f"shard {self.shard_id} stands at {self._position}, a record of another stream of the same name: "
                    f"the stream was deleted and created again. Start a new job without the old checkpoint. ({error})"
                )
            )
        if self._position.is_sequence and ("trim" in words or "expired" in words or "retention" in words):
            return self._lose(
                f"shard {self.shard_id} stands at {self._position}, which is trimmed ({error})",
                restart=Position.trim_horizon(),
            )
        return self._fail(error)

    # The pieces of the above.

    def _seek(self, due: float, now_epoch: float) -> None:
        self._iterator = None
        old = self._is_older_than(MIN_RETENTION_SECONDS, now_epoch)
        self._state = _State.CHECKING if old else _State.SEEKING
        self._due = due

    @property
    def _record_seconds(self) -> float | None:
        return arrival_seconds_of(self._position.sequence_number) if self._position.is_sequence else None

    def _lose_to_retention(self) -> Fetched:
        hours = (self._retention_seconds or 0) / 3600
        return self._lose(
            f"shard {self.shard_id} stands at {self._position}, older than the stream's retention of {hours:g} h",
            restart=Position.trim_horizon(),
        )

    def _is_older_than(self, seconds: float, now_epoch: float) -> bool:
        """Whether the position may have left a retention of `seconds`.

        Both its record and the time up to which the shard was read must be that old: a quiet shard that was
        read to its tip has lost nothing, however old its last record is; nor has a start that was never read from.
        """
        read_until = self._read_until_micros
        known = [t for t in (self._record_seconds, None if read_until is None else read_until / 1e6) if t is not None]
        return bool(known) and max(known) < now_epoch - seconds

    def _count_retry(self, error: KinesisIOError) -> None:
        code = error.code if isinstance(error, ServiceError) and error.code else type(error).__name__
        self.counts[f"{metrics.READ_RETRIES}.{code}"] += 1

    def _covers(self, children: Sequence[ChildShard]) -> bool:
        return bool(children) and not self._holes(children)

    def _holes(self, children: Sequence[ChildShard]) -> tuple[HashKeyRange, ...]:
        return uncovered(self._range, (c.hash_key_range for c in children))

    def _end(self, fetched: Fetched, children: Sequence[ChildShard]) -> Fetched:
        self._state = _State.ENDED
        fetched.children = tuple(children)
        # It has delivered everything, but what was put since went to its children: it proves nothing of them.
        fetched.read_until_micros = None
        return fetched

    def _fail(self, error: KinesisIOError) -> Fetched:
        self._state = _State.ENDED
        return Fetched(error=error)

    def _lose(self, reason: str, *, restart: Position | None, listed: tuple[Shard, ...] = ()) -> Fetched:
        # Reading goes on only when the policy has spoken: the loop rebuilds the reader at `restart`.
        self._state = _State.ENDED
        error = DataLoss(
            f"{reason}. Records were lost. To go on with the oldest that is left, and count what was skipped, "
            "set on_data_loss=DataLossPolicy.CONTINUE; to avoid it, raise the stream's retention."
        )
        return Fetched(lost=Lost(reason, self._read_until_micros, restart, listed, error))

    def _contradiction(self, what: str, now: float) -> Fetched | None:
        self._contradictions += 1
        self.counts[metrics.CONTRADICTIONS] += 1
        if self._contradictions >= MAX_CONTRADICTIONS:
            return self._fail(IncompleteShardList(f"{what}, after {self._contradictions} tries"))
        self._missing = False
        self._unbelievable_ends = 0
        self._state = _State.SEEKING
        self._iterator = None
        self._due = now + _CONTRADICTION_SECONDS
        return None

    # The lag: how far MillisBehindLatest can be believed.

    def _read_until(self, answer: RecordsAnswer, now: float) -> int | None:
        """Return the time before which everything has been delivered, in µs; None if the answer does not say.

        Kinesis sometimes reports a lag on an idle stream for ever. A lag that does not fall for a minute, over several
        fresh iterators, counts as none; one that grows with the clock only after ten minutes.
        """
        lag = answer.millis_behind_latest
        if lag is None:
            return None
        if answer.records or lag == 0 or self._lowest_lag is None or lag < self._lowest_lag:
            self._unfallen_lags = self._fresh_iterators = 0
            self._unfallen_since = now
            self._lowest_lag = None if answer.records or lag == 0 else lag
        else:
            self._unfallen_lags += 1
            elapsed = now - self._unfallen_since
            grows = lag - self._lowest_lag > elapsed * 500
            if self._fresh_iterators >= STUCK_LAG_ITERATORS and elapsed >= (
                GROWING_LAG_SECONDS if grows else STUCK_LAG_SECONDS
            ):
                self.counts[metrics.STUCK_LAGS] += 1
                lag = 0
            elif self._unfallen_lags >= STUCK_LAG_ANSWERS:
                self._unfallen_lags = 0
                self._fresh_iterators += 1
                self._renew_iterator = True
        until = round((answer.server_time_seconds * 1000 - lag) * 1000)
        if answer.records and (lag > 0 or len(answer.records) >= self.limit):
            # More is to come, and emulators count the lag from the newest record, not from now: one behind these may
            # be hardly younger than they are.
            until = min(until, answer.records[-1].approximate_arrival_micros)
        self._read_until_micros = until if self._read_until_micros is None else max(until, self._read_until_micros)
        retention = self._retention_seconds or MIN_RETENTION_SECONDS
        if not self._is_older_than(retention - 300, answer.server_time_seconds):
            self._left_horizon = True
        return until
