"""The three policies: timestamps, and what records and answers prove."""

from __future__ import annotations

import datetime
import pickle

import pytest
from apache_beam.utils.timestamp import MAX_TIMESTAMP, MIN_TIMESTAMP, Timestamp
from hypothesis import given
from hypothesis import strategies as st

from samza_kinesis_io.errors import ConfigurationError
from samza_kinesis_io.records import KinesisRecord
from samza_kinesis_io.watermark import (
    ArrivalTimeWatermark,
    EventTimeWatermark,
    ProcessingTimeWatermark,
    WatermarkPolicy,
)

SECOND = 1_000_000
NOTHING = MIN_TIMESTAMP.micros


def record(arrival_seconds: float, event_seconds: float | None = None) -> KinesisRecord:
    data = b"" if event_seconds is None else str(event_seconds).encode()
    return KinesisRecord(data, "1", approximate_arrival_seconds=arrival_seconds)


def event_time(of: KinesisRecord) -> Timestamp:
    return Timestamp(float(of.data))


def test_records_carry_their_arrival() -> None:
    assigned = ArrivalTimeWatermark().assign([record(100.25), record(101)], 0)
    assert assigned.timestamps_micros == [100_250_000, 101_000_000]
    assert assigned.event_lag_micros is None


def test_the_arrival_watermark_stays_behind_the_newest_record() -> None:
    """Arrival times are approximate, so a record may be a little older than the one before it."""
    records = [record(101), record(100.5)]
    assert ArrivalTimeWatermark().assign(records, 0).watermark_micros == 100 * SECOND
    assert ArrivalTimeWatermark(out_of_orderness_seconds=0).assign(records, 0).watermark_micros == 101 * SECOND


@pytest.mark.parametrize("was_empty", [True, False])
def test_an_answer_proves_arrivals_up_to_its_time(was_empty: bool) -> None:
    policy = ArrivalTimeWatermark(out_of_orderness_seconds=2)
    assert policy.after_answer(100 * SECOND, was_empty=was_empty, event_lag_micros=None) == 98 * SECOND


def test_a_read_from_a_timestamp_begins_there_and_one_from_the_horizon_anywhere() -> None:
    policy = ArrivalTimeWatermark()
    assert policy.initial_micros(100 * SECOND) == 99 * SECOND
    assert policy.initial_micros(None) == NOTHING


@pytest.mark.parametrize("start", [None, 100 * SECOND])
def test_events_and_processing_begin_at_the_beginning_of_time(start: int | None) -> None:
    """A record that arrives after a start timestamp may have happened long before it."""
    for policy in (EventTimeWatermark(event_time), ProcessingTimeWatermark()):
        assert policy.initial_micros(start) == NOTHING


def test_records_carry_the_time_that_is_found_in_them() -> None:
    assigned = EventTimeWatermark(event_time).assign([record(100, 40), record(101, 60)], 0)
    assert assigned.timestamps_micros == [40 * SECOND, 60 * SECOND]
    assert assigned.watermark_micros == 60 * SECOND
    assert assigned.event_lag_micros == 60 * SECOND


def test_a_record_from_the_future_does_not_make_the_others_late() -> None:
    """One dated 2099 counts as no later than its arrival."""
    assigned = EventTimeWatermark(event_time).assign([record(100, 4_070_908_800), record(101, 99)], 0)
    assert assigned.timestamps_micros[0] == 4_070_908_800 * SECOND
    assert assigned.watermark_micros == 100 * SECOND


def test_an_event_lag_is_never_negative() -> None:
    assert EventTimeWatermark(event_time).assign([record(100, 200)], 0).event_lag_micros == 0


def test_out_of_orderness_holds_the_event_watermark_back() -> None:
    policy = EventTimeWatermark(event_time, out_of_orderness_seconds=30)
    assert policy.assign([record(100, 60), record(101, 40)], 0).watermark_micros == 30 * SECOND


def test_datetimes_with_a_zone_are_event_times_too() -> None:
    policy = EventTimeWatermark(lambda r: datetime.datetime(1970, 1, 1, 0, 1, tzinfo=datetime.timezone.utc))
    assert policy.assign([record(100)], 0).timestamps_micros == [60 * SECOND]


def test_a_timestamp_function_that_returns_a_number_is_named() -> None:
    with pytest.raises(ConfigurationError, match="timestamp_fn's result must be .* got 5"):
        EventTimeWatermark(lambda r: 5).assign([record(100)], 0)  # type: ignore[arg-type, return-value]


def test_times_beyond_beams_range_are_brought_into_it() -> None:
    for value in (MIN_TIMESTAMP, MAX_TIMESTAMP):
        assigned = EventTimeWatermark(lambda r, v=value: v, out_of_orderness_seconds=10).assign([record(100)], 0)
        assert assigned.timestamps_micros == [value.micros]
        assert assigned.watermark_micros >= NOTHING


def test_an_idle_shard_says_nothing_of_event_times_before_any_is_known() -> None:
    policy = EventTimeWatermark(event_time)
    assert policy.after_answer(100 * SECOND, was_empty=True, event_lag_micros=None) == NOTHING


def test_an_idle_shard_advances_event_time_by_the_largest_lag_seen() -> None:
    policy = EventTimeWatermark(event_time, out_of_orderness_seconds=5)
    assert (
        policy.after_answer(100 * SECOND, was_empty=True, event_lag_micros=30 * SECOND) == (100 - 1 - 30 - 5) * SECOND
    )


def test_the_lag_of_idle_shards_can_be_given() -> None:
    policy = EventTimeWatermark(event_time, idle_lag_seconds=7)
    for seen in (None, 30 * SECOND):
        assert policy.after_answer(100 * SECOND, was_empty=True, event_lag_micros=seen) == (100 - 1 - 7) * SECOND


def test_an_answer_with_records_says_nothing_of_event_times_beyond_them() -> None:
    policy = EventTimeWatermark(event_time, idle_lag_seconds=0)
    assert policy.after_answer(100 * SECOND, was_empty=False, event_lag_micros=0) == NOTHING


def test_processing_time_is_when_it_is_emitted() -> None:
    assigned = ProcessingTimeWatermark().assign([record(1), record(2)], 77 * SECOND)
    assert assigned.timestamps_micros == [77 * SECOND] * 2
    assert assigned.watermark_micros == 77 * SECOND


@pytest.mark.parametrize("seconds", [-1, True, "1", None, float("nan"), 10**9])
def test_slacks_are_seconds(seconds: object) -> None:
    for make in (ArrivalTimeWatermark, lambda s: EventTimeWatermark(event_time, out_of_orderness_seconds=s)):
        with pytest.raises(ConfigurationError, match="out_of_orderness_seconds must be a number of seconds >= 0, got"):
            make(seconds)  # type: ignore[operator]


def test_other_options_are_checked_too() -> None:
    with pytest.raises(ConfigurationError, match="timestamp_fn must be a function of a KinesisRecord, got 'when'"):
        EventTimeWatermark("when")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="idle_lag_seconds must be a number of seconds >= 0, got -1"):
        EventTimeWatermark(event_time, idle_lag_seconds=-1)


@pytest.mark.parametrize("policy", [ArrivalTimeWatermark(3), EventTimeWatermark(event_time), ProcessingTimeWatermark()])
def test_policies_travel_to_the_worker(policy: WatermarkPolicy) -> None:
    assert pickle.loads(pickle.dumps(policy)) == policy


@given(
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(-5000, 5000)), min_size=1),
    st.integers(0, 100),
)
def test_the_event_watermark_is_behind_the_newest_event_and_arrival(
    pairs: list[tuple[int, int]], out_of_orderness: int
) -> None:
    policy = EventTimeWatermark(event_time, out_of_orderness_seconds=out_of_orderness)
    bound = policy.assign([record(a, a + delta) for a, delta in pairs], 0).watermark_micros
    assert bound <= max(a for a, _ in pairs) * SECOND - out_of_orderness * SECOND
    assert bound <= max(a + delta for a, delta in pairs) * SECOND - out_of_orderness * SECOND
