"""Where reading starts, where it stops, and where it stands.

`StartingPosition` and `StopPosition` are what a user says of a whole stream; `Position` is where the reading of one
shard stands. Sequence numbers travel as strings outside this package and as integers inside: they are 186-bit numbers,
and comparing them as text is wrong.
"""

from __future__ import annotations

import datetime
import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from apache_beam.utils.timestamp import Timestamp

from samza_kinesis_io.errors import ConfigurationError

#: A sub-sequence number behind every sub-record of an aggregated record: "the whole record".
WHOLE_RECORD: Final = (1 << 63) - 1

#: What users may write for a sequence number: the decimal string, or the string and a sub-sequence number.
SequenceNumberLike = str | tuple[str, int]


def time_text(timestamp: Timestamp) -> str:
    """Return a time for a message, as RFC 3339 where it lies in the years 1 to 9999.

    Else a number of milliseconds was taken for seconds, as happens; then the text says so.
    """
    try:
        return str(timestamp.to_rfc3339())
    except OverflowError:
        return f"Timestamp({timestamp.micros / 1e6:.0f}), which is after the year 9999: were milliseconds meant?"


def arrival_seconds_of(sequence_number: int) -> float | None:
    """Return when the service made a sequence number, in seconds since the epoch; None if it does not tell.

    Reads the undocumented version-2 layout (186 bits: ... time, shard index, version), which real numbers and the
    better emulators share; use it as a hint only.
    """
    if sequence_number.bit_length() != 186 or sequence_number & 0xF != 2:
        return None
    return float((sequence_number >> 36) & ((1 << 36) - 1))


class PositionKind(enum.Enum):
    """How a `Position` is meant; the names are those of the API's ShardIteratorType."""

    TRIM_HORIZON = "TRIM_HORIZON"
    AT_TIMESTAMP = "AT_TIMESTAMP"
    AT_SEQUENCE_NUMBER = "AT_SEQUENCE_NUMBER"
    AFTER_SEQUENCE_NUMBER = "AFTER_SEQUENCE_NUMBER"


@dataclass(frozen=True, slots=True)
class Position:
    """Where the reading of one shard stands: the next record is the first one not excluded by it.

    AFTER_SEQUENCE_NUMBER is behind the last record emitted, (sequence number, sub-sequence number); a sub-sequence
    number of `WHOLE_RECORD` is behind all sub-records. AT_SEQUENCE_NUMBER is before that record and sub-record.
    """

    kind: PositionKind
    sequence_number: int = 0
    sub_sequence_number: int = 0
    timestamp_micros: int = 0

    @classmethod
    def trim_horizon(cls) -> Position:
        return cls(PositionKind.TRIM_HORIZON)

    @classmethod
    def at_timestamp(cls, timestamp: Timestamp) -> Position:
        return cls(PositionKind.AT_TIMESTAMP, timestamp_micros=timestamp.micros)

    @classmethod
    def at(cls, sequence_number: int, sub_sequence_number: int = 0) -> Position:
        return cls(PositionKind.AT_SEQUENCE_NUMBER, sequence_number, sub_sequence_number)

    @classmethod
    def after(cls, sequence_number: int, sub_sequence_number: int = WHOLE_RECORD) -> Position:
        return cls(PositionKind.AFTER_SEQUENCE_NUMBER, sequence_number, sub_sequence_number)

    @property
    def is_sequence(self) -> bool:
        """Whether it names a record; such a position can fall out of the stream's retention."""
        return self.kind in (PositionKind.AT_SEQUENCE_NUMBER, PositionKind.AFTER_SEQUENCE_NUMBER)

    def excludes(self, sequence_number: int, sub_sequence_number: int) -> bool:
        """Return whether a record lies before this position and must be skipped.

        Only sequence positions exclude anything: of the other kinds the service starts exactly there.
        """
        at = (sequence_number, sub_sequence_number)
        if self.kind is PositionKind.AFTER_SEQUENCE_NUMBER:
            return at <= (self.sequence_number, self.sub_sequence_number)
        if self.kind is PositionKind.AT_SEQUENCE_NUMBER:
            return at < (self.sequence_number, self.sub_sequence_number)
        return False

    def __str__(self) -> str:
        if self.kind is PositionKind.TRIM_HORIZON:
            return "TRIM_HORIZON"
        if self.kind is PositionKind.AT_TIMESTAMP:
            return f"AT_TIMESTAMP({time_text(Timestamp(micros=self.timestamp_micros))})"
        sub = "" if self.sub_sequence_number in (0, WHOLE_RECORD) else f"/{self.sub_sequence_number}"
        return f"{self.kind.value}({self.sequence_number}{sub})"


def as_timestamp(value: Timestamp | datetime.datetime, option: str) -> Timestamp:
    """Return `value` as a Beam Timestamp.

    Raises:
        ConfigurationError: it is a naive datetime, a bare number (seconds or milliseconds?) or something else.
    """
    if isinstance(value, Timestamp):
        return value
    if isinstance(value, datetime.datetime):
        if value.tzinfo is None:
            raise ConfigurationError(
                f"{option} must say its time zone, got the naive datetime {value!r}; add tzinfo=datetime.timezone.utc"
            )
        return Timestamp.from_utc_datetime(value.astimezone(datetime.timezone.utc))
    raise ConfigurationError(
        f"{option} must be an apache_beam Timestamp or a datetime with a time zone, got {value!r}; "
        "for seconds since the epoch write Timestamp(seconds)"
    )


def _sequence_map(numbers: Mapping[str, SequenceNumberLike], option: str) -> tuple[tuple[str, int, int | None], ...]:
    if not numbers:
        raise ConfigurationError(f"{option} must name at least one shard, got an empty mapping")
    out: list[tuple[str, int, int | None]] = []
    for shard_id, value in sorted(numbers.items()):
        number, sub = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
        if not isinstance(number, str) or not number.isascii() or not number.isdigit():
            raise ConfigurationError(
                f"{option}[{shard_id!r}] must be a decimal sequence number as a string, got {number!r}"
            )
        if sub is not None and (isinstance(sub, bool) or not isinstance(sub, int) or sub < 0):
            raise ConfigurationError(f"{option}[{shard_id!r}] must have a sub-sequence number >= 0, got {sub!r}")
        out.append((shard_id, int(number), sub))
    return tuple(out)


class StartKind(enum.Enum):
    """How a `StartingPosition` is meant."""

    TRIM_HORIZON = "TRIM_HORIZON"
    LATEST = "LATEST"
    AT_TIMESTAMP = "AT_TIMESTAMP"
    SEQUENCE_NUMBERS = "SEQUENCE_NUMBERS"


@dataclass(frozen=True, slots=True)
class StartingPosition:
    """Where reading of a stream starts. Made by its named constructors."""

    kind: StartKind
    timestamp: Timestamp | None = None
    sequence_positions: tuple[tuple[str, Position], ...] = ()
    otherwise: StartingPosition | None = None

    def __post_init__(self) -> None:
        if (self.kind is StartKind.AT_TIMESTAMP) != (self.timestamp is not None):
            raise ConfigurationError("a StartingPosition has a timestamp exactly when it is AT_TIMESTAMP")
        if self.otherwise is not None and self.otherwise.kind is StartKind.SEQUENCE_NUMBERS:
            raise ConfigurationError("otherwise= must be trim_horizon(), latest() or at_timestamp(t)")

    @classmethod
    def trim_horizon(cls) -> StartingPosition:
        """The oldest record the stream still holds."""
        return cls(StartKind.TRIM_HORIZON)

    @classmethod
    def latest(cls) -> StartingPosition:
        """Now: the moment at which the pipeline is *built*, fixed once.

        A runner that plans again reads from the same moment, so records that arrive before the first checkpoint
        are not lost. In a template it means "since the template was built".
        """
        return cls(StartKind.LATEST)

    @classmethod
    def at_timestamp(cls, timestamp: Timestamp | datetime.datetime) -> StartingPosition:
        """The first record that arrived at `timestamp` or later; from the horizon, if it is older than the retention.

        Raises:
            ConfigurationError: not a Timestamp or a datetime with time zone.
        """
        return cls(StartKind.AT_TIMESTAMP, as_timestamp(timestamp, "starting_position timestamp"))

    @classmethod
    def at_sequence_numbers(
        cls, numbers: Mapping[str, SequenceNumberLike], *, otherwise: StartingPosition | None = None
    ) -> StartingPosition:
        """Per shard the record to begin with, as "number" or ("number", sub-sequence number).

        A named shard starts at its name whenever it starts. Its descendants start at their beginning; its ancestors
        count as read if named shards cover them. Any other shard starts at `otherwise`.

        Raises:
            ConfigurationError: no shard is named, or a value is no decimal number. When the pipeline starts:
                a named shard is not listed, or a shard remains and there is no `otherwise`.
        """
        named = _sequence_map(numbers, "at_sequence_numbers")
        return cls(
            StartKind.SEQUENCE_NUMBERS,
            sequence_positions=tuple((shard, Position.at(n, sub or 0)) for shard, n, sub in named),
            otherwise=otherwise,
        )

    @classmethod
    def after_sequence_numbers(
        cls, numbers: Mapping[str, SequenceNumberLike], *, otherwise: StartingPosition | None = None
    ) -> StartingPosition:
        """Per shard the last record *not* to read, as "number" or ("number", sub-sequence number).

        "number" alone is behind the whole record, also where it is an aggregate. Otherwise as `at_sequence_numbers`.
        """
        named = _sequence_map(numbers, "after_sequence_numbers")
        return cls(
            StartKind.SEQUENCE_NUMBERS,
            sequence_positions=tuple(
                (shard, Position.after(n, WHOLE_RECORD if sub is None else sub)) for shard, n, sub in named
            ),
            otherwise=otherwise,
        )

    def pinned(self, now: Timestamp) -> StartingPosition:
        """Return the same start with every LATEST replaced by `now`.

        Raises:
            ConfigurationError: a timestamp lies in the future.
        """
        if self.kind is StartKind.LATEST:
            return StartingPosition(StartKind.AT_TIMESTAMP, now)
        if self.timestamp is not None and self.timestamp > now:
            raise ConfigurationError(
                f"starting_position must not lie in the future, got at_timestamp({time_text(self.timestamp)}) at "
                f"{time_text(now)}; use StartingPosition.latest() to read from now on"
            )
        if self.otherwise is not None:
            return replace(self, otherwise=self.otherwise.pinned(now))
        return self

    def position(self) -> Position:
        """Return where a shard starts that is not named. Only of a pinned start.

        Also where a child starts: at the start's timestamp, which is the child's beginning if it is younger,
        else at TRIM_HORIZON.
        """
        if self.kind is StartKind.SEQUENCE_NUMBERS:
            return self.otherwise.position() if self.otherwise is not None else Position.trim_horizon()
        if self.timestamp is not None:
            return Position.at_timestamp(self.timestamp)
        if self.kind is StartKind.LATEST:
            raise AssertionError("LATEST must be pinned before it becomes a position")
        return Position.trim_horizon()

    def named_positions(self) -> dict[str, Position]:
        return dict(self.sequence_positions)


class StopKind(enum.Enum):
    """How a `StopPosition` is meant."""

    NOW = "NOW"
    AT_TIMESTAMP = "AT_TIMESTAMP"
    SEQUENCE_NUMBERS = "SEQUENCE_NUMBERS"


@dataclass(frozen=True, slots=True)
class StopPosition:
    """Where a bounded read ends. Made by its named constructors."""

    kind: StopKind
    timestamp: Timestamp | None = None
    sequence_positions: tuple[tuple[str, Position], ...] = ()

    @classmethod
    def now(cls) -> StopPosition:
        """The moment at which the pipeline is built: records that arrived before it are read."""
        return cls(StopKind.NOW)

    @classmethod
    def at_timestamp(cls, timestamp: Timestamp | datetime.datetime) -> StopPosition:
        """Records that arrived before `timestamp` are read. It may lie in the future (not on Spark)."""
        return cls(StopKind.AT_TIMESTAMP, as_timestamp(timestamp, "stop_at timestamp"))

    @classmethod
    def at_sequence_numbers(cls, numbers: Mapping[str, SequenceNumberLike]) -> StopPosition:
        """Per shard the last record to read, included; "number" alone includes the whole aggregate.

        The mapping is the complete set of shards that are read; their children are not followed. A shard that ends
        before its number ends the read of it.
        """
        named = _sequence_map(numbers, "stop_at.at_sequence_numbers")
        return cls(
            StopKind.SEQUENCE_NUMBERS,
            sequence_positions=tuple(
                (shard, Position.after(n, WHOLE_RECORD if sub is None else sub)) for shard, n, sub in named
            ),
        )

    def pinned(self, now: Timestamp) -> StopPosition:
        """Return the same stop with NOW replaced by `now`."""
        return StopPosition(StopKind.AT_TIMESTAMP, now) if self.kind is StopKind.NOW else self
