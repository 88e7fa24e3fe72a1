"""The demo's job without Kinesis: decoding, the figures, and that two independent ways to them agree."""

from __future__ import annotations

import datetime
from pathlib import Path

import apache_beam as beam
import pytest
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.transforms.window import TimestampedValue
from apache_beam.utils.timestamp import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from samza_kinesis_io.records import KinesisRecord
from samza_kinesis_io.transforms.flight_delays import (
    Flight,
    HourlyDelays,
    decode_carrier_hour,
    decode_flight,
    decode_record,
    differences,
    encode_carrier_hour,
    encode_flight,
    hourly_delays,
    read_flights,
    scheduled_departure,
)
from tiers import ROOT

SAMPLE = ROOT / "pipelines" / "flights-sample.avro"


def flight(
    time: str = "2013-01-01T05:15:00", *, carrier: str = "UA", delay: int = 2, arrival: int | None = 11
) -> Flight:
    return Flight(
        scheduled_departure=datetime.datetime.fromisoformat(time),
        carrier=carrier,
        flight=1545,
        origin="EWR",
        destination="IAH",
        departure_delay_minutes=delay,
        arrival_delay_minutes=arrival,
    )


def record(data: bytes) -> KinesisRecord:
    return KinesisRecord(data=data, sequence_number="17", shard_id="shardId-000000000003", stream="flights")


flights = st.builds(
    flight,
    time=st.datetimes(datetime.datetime(2013, 1, 1), datetime.datetime(2013, 1, 2)).map(datetime.datetime.isoformat),
    carrier=st.sampled_from(["AA", "UA", "B6"]),
    delay=st.integers(-60, 1500),
    arrival=st.none() | st.integers(-90, 1500),
)


@given(flights)
def test_a_flight_survives_encoding(flown: Flight) -> None:
    assert decode_flight(encode_flight(flown)) == flown


def test_an_hours_figures_are_sums_over_its_flights() -> None:
    """Early departures count below zero; a flight that never arrived counts among the departures only."""
    rows = hourly_delays(
        [
            flight("2013-01-01T05:00:00", delay=-5, arrival=-20),
            flight("2013-01-01T05:59:59", delay=15, arrival=None),
            flight("2013-01-01T06:00:00", delay=14, arrival=3),
        ]
    )
    assert [(r.hour.hour, r.flights, r.late) for r in rows] == [(5, 2, 1), (6, 1, 0)]
    assert [(r.departure_delay_minutes, r.worst_departure_delay_minutes) for r in rows] == [(10, 15), (14, 14)]
    assert [(r.arrived, r.arrival_delay_minutes) for r in rows] == [(1, -20), (1, 3)]


@given(st.lists(flights, max_size=30))
def test_a_result_survives_encoding(flown: list[Flight]) -> None:
    rows = hourly_delays(flown)
    assert [decode_carrier_hour(encode_carrier_hour(row)) for row in rows] == rows


def test_the_transform_gives_the_same_figures_as_the_plain_function() -> None:
    some = list(read_flights(SAMPLE))[:2000]
    with beam.Pipeline("FnApiRunner") as p:
        found = (
            p
            | beam.Create(some)
            | beam.Map(lambda f: TimestampedValue(f, scheduled_departure(record(encode_flight(f)))))
            | HourlyDelays()
        )
        assert_that(found, equal_to(hourly_delays(some)))


def test_the_event_time_is_the_scheduled_departure() -> None:
    assert scheduled_departure(record(encode_flight(flight("2013-06-30T23:59:00")))) == Timestamp.from_rfc3339(
        "2013-06-30T23:59:00Z"
    )


def test_a_record_that_is_no_flight_is_named_by_shard_and_sequence_number() -> None:
    with pytest.raises(ValueError, match=r"record 17 of flights, shardId-000000000003, is not a flight"):
        decode_record(record(b'{"carrier": "UA"}'))


def test_equal_figures_have_no_differences() -> None:
    rows = hourly_delays([flight(), flight(carrier="AA")])
    assert differences(rows, reversed(rows)) == []


def test_each_kind_of_difference_is_told() -> None:
    """One flight missing from an hour, a whole hour missing, one that nobody put, and one counted twice."""
    expected = hourly_delays([flight(), flight(delay=20), flight(carrier="AA"), flight(carrier="B6")])
    found = hourly_delays([flight(), flight(carrier="B6"), flight(carrier="DL")])
    twice = [row for row in found if row.carrier == "B6"]
    told = "\n".join(differences(expected, found + twice))
    assert "UA 2013-01-01 05:00: flights 1, expected 2; late 0, expected 1" in told
    assert "AA 2013-01-01 05:00: missing, with 1 flights" in told
    assert "DL 2013-01-01 05:00: 1 flights that nobody put" in told
    assert "B6 2013-01-01 05:00: result number 2" in told


def test_the_sample_is_five_days_in_scheduled_order() -> None:
    sample = list(read_flights(SAMPLE))
    assert len(sample) == 4303
    assert sample == sorted(sample, key=lambda f: f.scheduled_departure)
    assert {f.scheduled_departure.day for f in sample} == {1, 2, 3, 4, 5}
    assert SAMPLE.stat().st_size < 300_000


HEADER = "scheduled_departure,carrier,flight,origin,destination,departure_delay_minutes,arrival_delay_minutes\n"


def test_an_empty_cell_of_a_csv_is_a_value_that_is_not_known(tmp_path: Path) -> None:
    path = tmp_path / "flights.csv"
    path.write_text(HEADER + "2013-01-01T05:15:00,UA,1545,EWR,IAH,2,\n")
    assert list(read_flights(path)) == [flight(arrival=None)]


def test_a_line_that_holds_no_flight_is_named(tmp_path: Path) -> None:
    path = tmp_path / "flights.csv"
    path.write_text(HEADER + "2013-01-01T05:15:00,UA,1545,EWR,IAH,2,\n" + "2013-01-01T05:15:00,UA,many,EWR,IAH,2,\n")
    with pytest.raises(ValueError, match=r"flights.csv, line 3: .*flight"):
        list(read_flights(path))


def test_a_file_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"flights.parquet must be a .csv, .csv.gz or .avro file"):
        list(read_flights(tmp_path / "flights.parquet"))
