"""Event time: what a record's timestamp is, and how far it is certain that no earlier one is still to come.

A watermark is kept per shard and moves on two kinds of evidence only: records that were emitted, and the service's
word that everything before some time has been delivered ("read until" = the service's time of an answer minus its
MillisBehindLatest). Errors, throttles and a slow downstream give no evidence and so hold it.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
from apache_beam.utils.timestamp import MAX_TIMESTAMP, MIN_TIMESTAMP, Timestamp

from samza_kinesis_io.errors import ConfigurationError
from samza_kinesis_io.limits import ARRIVAL_SLACK_SECONDS
from samza_kinesis_io.positions import as_timestamp
from samza_kinesis_io.records import KinesisRecord

_SLACK_MICROS = int(ARRIVAL_SLACK_SECONDS * 1_000_000)


class Assigned(msgspec.Struct, frozen=True):
    """The timestamps of a batch, and what the batch proves.

    Attributes:
        timestamps_micros: One per record.
        watermark_micros: A bound for the shard's later records; may lie behind the shard's present watermark.
        event_lag_micros: The largest (arrival - event time), at least 0; None where the policy does not use it.
    """

    timestamps_micros: list[int]
    watermark_micros: int
    event_lag_micros: int | None = None


class WatermarkPolicy(Protocol):
    """How records get their timestamps and shards their watermarks. Picklable."""

    def initial_micros(self, start_micros: int | None) -> int:
        """Return a watermark not after any record of a read that starts at `start_micros` (None: at the horizon)."""
        ...

    def assign(self, records: Sequence[KinesisRecord], now_micros: int) -> Assigned:
        """Return what a batch of one shard's records (at least one) proves."""
        ...

    def after_answer(self, read_until_micros: int, *, was_empty: bool, event_lag_micros: int | None) -> int:
        """Return the bound that an answer proves once all its records are emitted; `MIN_TIMESTAMP` for nothing.

        Args:
            read_until_micros: Everything that arrived before it has been delivered.
            was_empty: The answer held no record: the shard is idle up to that time.
            event_lag_micros: The largest (arrival - event time) seen in this restriction.
        """
        ...


def _check_seconds(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 10**9:
        raise ConfigurationError(f"{name} must be a number of seconds >= 0, got {value!r}")


@dataclass(frozen=True, slots=True)
class ArrivalTimeWatermark:
    """Records carry the time at which Kinesis took them (the default).

    Kinesis does not promise that arrival times increase within a shard; a record may be up to
    `out_of_orderness_seconds` older than one before it without being late.
    """

    out_of_orderness_seconds: float = ARRIVAL_SLACK_SECONDS

    def __post_init__(self) -> None:
        _check_seconds("out_of_orderness_seconds", self.out_of_orderness_seconds)

    def initial_micros(self, start_micros: int | None) -> int:
        return int(MIN_TIMESTAMP.micros) if start_micros is None else start_micros - self._slack_micros

    @property
    def _slack_micros(self) -> int:
        return int(self.out_of_orderness_seconds * 1_000_000)

    def assign(self, records: Sequence[KinesisRecord], now_micros: int) -> Assigned:
        timestamps = [round(r.approximate_arrival_seconds * 1000) * 1000 for r in records]
        return Assigned(timestamps, max(timestamps) - self._slack_micros)

    def after_answer(self, read_until_micros: int, *, was_empty: bool, event_lag_micros: int | None) -> int:
        return read_until_micros - self._slack_micros


@dataclass(frozen=True, slots=True)
class EventTimeWatermark:
    """Records carry the time that `timestamp_fn` finds in them.

    The watermark follows the largest event time of each shard, `out_of_orderness_seconds` behind; a record
    counts as no later than its arrival, so that one dated 2099 does not make the others late.

    An idle shard says only that nothing *arrived*. What that means for event times depends on how far events lag
    behind their arrival: the largest lag seen so far in the restriction, or `idle_lag_seconds` where it is given.
    Before the first record, and without `idle_lag_seconds`, an idle shard holds the watermark: nothing is known.
    And one record dated 1970 tells of events that may come half a century late: where such records are errors and
    not history, give `idle_lag_seconds`, or let `timestamp_fn` correct them.

    Args:
        timestamp_fn: From a record to a Beam Timestamp, or a datetime with a time zone. If it raises, the
            bundle fails: decode defensively there, or behind the read.
        out_of_orderness_seconds: How much older than an earlier one of its shard a record may be.
        idle_lag_seconds: How far events may lag behind their arrival when a shard has been idle.
    """

    timestamp_fn: Callable[[KinesisRecord], Timestamp | datetime.datetime]
    out_of_orderness_seconds: float = 0.0
    idle_lag_seconds: float | None = None

    def __post_init__(self) -> None:
        if not callable(self.timestamp_fn):
            raise ConfigurationError(f"timestamp_fn must be a function of a KinesisRecord, got {self.timestamp_fn!r}")
        _check_seconds("out_of_orderness_seconds", self.out_of_orderness_seconds)
        if self.idle_lag_seconds is not None:
            _check_seconds("idle_lag_seconds", self.idle_lag_seconds)

    def initial_micros(self, start_micros: int | None) -> int:
        return int(MIN_TIMESTAMP.micros)

    def assign(self, records: Sequence[KinesisRecord], now_micros: int) -> Assigned:
        timestamps: list[int] = []
        newest = int(MIN_TIMESTAMP.micros)
        lag = 0
        for record in records:
            micros = min(max(self._event_micros(record), MIN_TIMESTAMP.micros), MAX_TIMESTAMP.micros)
            timestamps.append(micros)
            arrival = record.approximate_arrival_micros
            newest = max(newest, min(micros, arrival))
            lag = max(lag, arrival - micros)
        bound = max(newest - int(self.out_of_orderness_seconds * 1_000_000), int(MIN_TIMESTAMP.micros))
        return Assigned(timestamps, bound, lag)

    def _event_micros(self, record: KinesisRecord) -> int:
        value = self.timestamp_fn(record)
        return value.micros if isinstance(value, Timestamp) else as_timestamp(value, "timestamp_fn's result").micros

    def after_answer(self, read_until_micros: int, *, was_empty: bool, event_lag_micros: int | None) -> int:
        if not was_empty:
            return int(MIN_TIMESTAMP.micros)
        if self.idle_lag_seconds is not None:
            lag = int(self.idle_lag_seconds * 1_000_000)
        elif event_lag_micros is not None:
            lag = event_lag_micros + int(self.out_of_orderness_seconds * 1_000_000)
        else:
            return int(MIN_TIMESTAMP.micros)
        return max(read_until_micros - _SLACK_MICROS - lag, int(MIN_TIMESTAMP.micros))


@dataclass(frozen=True, slots=True)
class ProcessingTimeWatermark:
    """Records carry the time at which they are emitted; nothing is ever late, and nothing says when it happened."""

    def initial_micros(self, start_micros: int | None) -> int:
        return int(MIN_TIMESTAMP.micros)

    def assign(self, records: Sequence[KinesisRecord], now_micros: int) -> Assigned:
        return Assigned([now_micros] * len(records), now_micros)

    def after_answer(self, read_until_micros: int, *, was_empty: bool, event_lag_micros: int | None) -> int:
        return read_until_micros - _SLACK_MICROS
