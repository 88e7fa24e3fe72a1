"""Where reading starts, where it stops, and where it stands."""

from __future__ import annotations

import datetime

import pytest
from apache_beam.utils.timestamp import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from samza_kinesis_io.errors import ConfigurationError
from samza_kinesis_io.positions import (
    WHOLE_RECORD,
    Position,
    PositionKind,
    StartingPosition,
    StartKind,
    StopKind,
    StopPosition,
    arrival_seconds_of,
    as_timestamp,
)
from samza_kinesis_io.testing import FakeKinesis, SimulatedClock

NOW = Timestamp(1_700_000_000)
LONG = "4959" + "0" * 51 + "7"  # 56 digits, as real ones have


@pytest.mark.parametrize(
    ("position", "sequence_number", "sub_sequence_number", "excluded"),
    [
        (Position.after(10), 10, 0, True),
        (Position.after(10), 10, 5000, True),
        (Position.after(10), 11, 0, False),
        (Position.after(10, 3), 10, 3, True),
        (Position.after(10, 3), 10, 4, False),
        (Position.after(10, 3), 9, 99, True),
        (Position.at(10), 10, 0, False),
        (Position.at(10), 9, 99, True),
        (Position.at(10, 3), 10, 2, True),
        (Position.at(10, 3), 10, 3, False),
        (Position.trim_horizon(), 0, 0, False),
        (Position.at_timestamp(NOW), 0, 0, False),
    ],
)
def test_a_position_excludes_what_lies_before_it(
    position: Position, sequence_number: int, sub_sequence_number: int, excluded: bool
) -> None:
    assert position.excludes(sequence_number, sub_sequence_number) is excluded


@given(st.tuples(st.integers(0, 5), st.integers(0, 5)), st.tuples(st.integers(0, 5), st.integers(0, 5)), st.booleans())
def test_after_is_at_but_for_the_record_itself(record: tuple[int, int], at: tuple[int, int], same: bool) -> None:
    record = at if same else record
    assert Position.after(*at).excludes(*record) == (Position.at(*at).excludes(*record) or record == at)


def test_sequence_numbers_are_compared_as_numbers() -> None:
    """As texts "9" is behind "10"."""
    assert Position.after(9).excludes(10, 0) is False
    start = StartingPosition.after_sequence_numbers({"shardId-000000000000": LONG})
    assert start.named_positions()["shardId-000000000000"].sequence_number == int(LONG)


def test_positions_say_what_they_are() -> None:
    assert str(Position.trim_horizon()) == "TRIM_HORIZON"
    assert str(Position.at_timestamp(NOW)) == "AT_TIMESTAMP(2023-11-14T22:13:20Z)"
    assert str(Position.after(7)) == "AFTER_SEQUENCE_NUMBER(7)"
    assert str(Position.after(7, 3)) == "AFTER_SEQUENCE_NUMBER(7/3)"
    assert str(Position.at(7)) == "AT_SEQUENCE_NUMBER(7)"


def test_only_sequence_positions_can_fall_out_of_the_retention() -> None:
    assert [Position.at(1).is_sequence, Position.after(1).is_sequence] == [True, True]
    assert [Position.trim_horizon().is_sequence, Position.at_timestamp(NOW).is_sequence] == [False, False]


def test_a_real_sequence_number_tells_when_it_was_made() -> None:
    clock = SimulatedClock(1_700_000_123.4)
    fake = FakeKinesis(clock=clock)
    fake.create_stream("flights")
    _, sequence_number = fake.put("flights", b"x")
    assert arrival_seconds_of(int(sequence_number)) == 1_700_000_123


@pytest.mark.parametrize("foreign", [0, 1, 42, (1 << 185) + 3, 1 << 200])
def test_a_number_of_another_form_tells_nothing(foreign: int) -> None:
    """moto counts 1, 2, 3."""
    assert arrival_seconds_of(foreign) is None


# Time as users give it.


def test_a_datetime_with_a_zone_is_a_timestamp() -> None:
    cest = datetime.timezone(datetime.timedelta(hours=2))
    assert as_timestamp(datetime.datetime(2023, 11, 15, 0, 13, 20, tzinfo=cest), "stop_at") == NOW


def test_a_datetime_without_a_zone_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="stop_at must say its time zone.*add tzinfo=datetime.timezone.utc"):
        as_timestamp(datetime.datetime(2023, 11, 15), "stop_at")


@pytest.mark.parametrize("bare", [1_700_000_000, 1_700_000_000_000, 1.7e9, "2023-11-15", None])
def test_a_bare_number_is_refused_for_its_unit_is_anybodys_guess(bare: object) -> None:
    with pytest.raises(ConfigurationError, match=r"starting_position timestamp must be .* write Timestamp\(seconds\)"):
        StartingPosition.at_timestamp(bare)  # type: ignore[arg-type]


# Starts.


def test_latest_is_pinned_to_the_moment_of_building() -> None:
    pinned = StartingPosition.latest().pinned(NOW)
    assert pinned == StartingPosition.at_timestamp(NOW)
    assert pinned.position() == Position.at_timestamp(NOW)


def test_an_unpinned_latest_is_no_position() -> None:
    with pytest.raises(AssertionError, match="must be pinned"):
        StartingPosition.latest().position()


def test_the_latest_of_otherwise_is_pinned_too() -> None:
    start = StartingPosition.at_sequence_numbers({"a": "1"}, otherwise=StartingPosition.latest()).pinned(NOW)
    assert start.otherwise == StartingPosition.at_timestamp(NOW)
    assert start.position() == Position.at_timestamp(NOW)


def test_a_start_in_the_future_is_refused() -> None:
    start = StartingPosition.at_timestamp(NOW + 1)
    with pytest.raises(ConfigurationError, match=r"must not lie in the future.*use StartingPosition.latest\(\)"):
        start.pinned(NOW)
    named = StartingPosition.at_sequence_numbers({"a": "1"}, otherwise=start)
    with pytest.raises(ConfigurationError, match="must not lie in the future"):
        named.pinned(NOW)


def test_a_start_in_milliseconds_is_refused_with_the_guess_that_it_is_one() -> None:
    """Beam takes such a time and cannot write it: it lies after the year 9999."""
    start = StartingPosition.at_timestamp(Timestamp(1_700_000_000_000))
    with pytest.raises(ConfigurationError, match="must not lie in the future.*were milliseconds meant"):
        start.pinned(Timestamp(1_700_000_000))


def test_a_start_at_this_very_moment_is_none_in_the_future() -> None:
    start = StartingPosition.at_timestamp(NOW)
    assert start.pinned(NOW) is start


def test_a_number_alone_is_the_whole_record() -> None:
    after = StartingPosition.after_sequence_numbers({"a": "7", "b": ("7", 2)}).named_positions()
    assert after == {"a": Position.after(7, WHOLE_RECORD), "b": Position.after(7, 2)}
    at = StartingPosition.at_sequence_numbers({"a": "7", "b": ("7", 2)}).named_positions()
    assert at == {"a": Position.at(7, 0), "b": Position.at(7, 2)}


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({}, "must name at least one shard"),
        ({"a": 7}, r"\['a'\] must be a decimal sequence number as a string, got 7"),
        ({"a": "7x"}, r"\['a'\] must be a decimal sequence number as a string, got '7x'"),
        ({"a": "\u0667"}, "must be a decimal sequence number"),
        ({"a": ""}, "must be a decimal sequence number"),
        ({"a": ("7", -1)}, "must have a sub-sequence number >= 0, got -1"),
        ({"a": ("7", True)}, "must have a sub-sequence number >= 0, got True"),
    ],
)
def test_impossible_sequence_numbers_are_refused_by_shard(numbers: dict[str, object], message: str) -> None:
    for make in (
        StartingPosition.at_sequence_numbers,
        StartingPosition.after_sequence_numbers,
        StopPosition.at_sequence_numbers,
    ):
        with pytest.raises(ConfigurationError, match=message):
            make(numbers)  # type: ignore[arg-type]


def test_otherwise_cannot_name_shards_itself() -> None:
    named = StartingPosition.at_sequence_numbers({"a": "1"})
    with pytest.raises(ConfigurationError, match="otherwise= must be trim_horizon"):
        StartingPosition.at_sequence_numbers({"b": "1"}, otherwise=named)


def test_a_timestamp_without_its_kind_cannot_be_made() -> None:
    for kind, timestamp in ((StartKind.AT_TIMESTAMP, None), (StartKind.TRIM_HORIZON, NOW)):
        with pytest.raises(ConfigurationError, match="exactly when it is AT_TIMESTAMP"):
            StartingPosition(kind, timestamp)


def test_without_otherwise_other_shards_start_at_the_horizon() -> None:
    """Only descendants of named shards are left then; they are read whole."""
    assert StartingPosition.at_sequence_numbers({"a": "1"}).position().kind is PositionKind.TRIM_HORIZON


# Stops.


def test_now_is_the_moment_of_building() -> None:
    assert StopPosition.now().pinned(NOW) == StopPosition.at_timestamp(NOW)


def test_other_stops_stay_what_they_are() -> None:
    for stop in (StopPosition.at_timestamp(NOW + 100), StopPosition.at_sequence_numbers({"a": "1"})):
        assert stop.pinned(NOW) is stop


def test_a_stop_includes_its_record() -> None:
    stop = StopPosition.at_sequence_numbers({"a": "7", "b": ("7", 2)})
    assert stop.kind is StopKind.SEQUENCE_NUMBERS
    ends = dict(stop.sequence_positions)
    assert ends["a"].excludes(7, 9)
    assert not ends["a"].excludes(8, 0)
    assert ends["b"].excludes(7, 2)
    assert not ends["b"].excludes(7, 3)
