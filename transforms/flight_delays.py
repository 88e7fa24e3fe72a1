"""Delays per carrier and hour of scheduled departure: the job of the demo, and of `pipelines.flight_delays`.

`HourlyDelays` is the Beam side, a windowed combine. `hourly_delays` gives the same figures from an iterable in plain
Python; it shares nothing with the transform but the names, so that each checks the other.
"""

from __future__ import annotations

import csv
import datetime
import gzip
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import apache_beam as beam
import msgspec
from apache_beam.transforms.window import FixedWindows
from apache_beam.utils.timestamp import Timestamp

from samza_kinesis_io.records import KinesisRecord

#: A departure counts as late from this delay on, as in the statistics the data comes from.
LATE_FROM_MINUTES: Final = 15

_HOUR_SECONDS: Final = 3600
_EPOCH: Final = datetime.datetime(1970, 1, 1)
_MICROSECOND: Final = datetime.timedelta(microseconds=1)


class Flight(msgspec.Struct, frozen=True, omit_defaults=True):
    """One departure.

    Attributes:
        scheduled_departure: The airport's own time, without a zone, and used as if it were UTC: an hour here is an
            hour on the airport's clock.
        carrier: IATA code, such as "UA".
        arrival_delay_minutes, air_time_minutes: None where the flight never arrived at its destination.
    """

    scheduled_departure: datetime.datetime
    carrier: str
    flight: int
    origin: str
    destination: str
    departure_delay_minutes: int
    tail_number: str | None = None
    arrival_delay_minutes: int | None = None
    air_time_minutes: int | None = None
    distance_miles: int | None = None

    @property
    def partition_key(self) -> str:
        """One flight number's departures stay together and in order."""
        return f"{self.carrier}{self.flight}"


class CarrierHour(msgspec.Struct, frozen=True, order=True):
    """What one carrier's departures scheduled within one hour came to.

    `departure_delay_minutes` is the sum over the flights (early departures count below zero),
    `arrival_delay_minutes` the sum over the `arrived` ones.
    """

    hour: datetime.datetime
    carrier: str
    flights: int
    late: int
    departure_delay_minutes: int
    worst_departure_delay_minutes: int
    arrived: int
    arrival_delay_minutes: int


class _Departure(msgspec.Struct):
    """As much of a flight as its timestamp needs; the rest is not decoded."""

    scheduled_departure: datetime.datetime


_encode = msgspec.json.Encoder().encode
_decode_flight = msgspec.json.Decoder(Flight).decode
_decode_carrier_hour = msgspec.json.Decoder(CarrierHour).decode
_decode_departure = msgspec.json.Decoder(_Departure).decode


# Functions, not the bound methods themselves: those cannot be pickled into a pipeline.
def encode_flight(flight: Flight) -> bytes:
    return _encode(flight)


def decode_flight(data: bytes) -> Flight:
    return _decode_flight(data)


def encode_carrier_hour(row: CarrierHour) -> bytes:
    return _encode(row)


def decode_carrier_hour(data: bytes) -> CarrierHour:
    return _decode_carrier_hour(data)


def scheduled_departure(record: KinesisRecord) -> Timestamp:
    """Return the event time of an encoded flight: the `timestamp_fn` of `EventTimeWatermark`."""
    return Timestamp(micros=(_decode_departure(record.data).scheduled_departure - _EPOCH) // _MICROSECOND)


def read_flights(path: str | Path) -> Iterator[Flight]:
    """Yield the flights of a file: CSV with a header line (.csv, .csv.gz) or Avro (.avro), in the file's order.

    Raises:
        ValueError: the file's kind is unknown, or a line does not hold a flight; the message names the line.
    """
    path = Path(path)
    if path.suffix == ".avro":
        # Only this format needs fastavro, an extra of the package.
        import fastavro

        with path.open("rb") as binary:
            for row in fastavro.reader(binary):
                yield msgspec.convert(row, Flight)
        return
    if path.name.endswith(".csv.gz"):
        lines: Any = gzip.open(path, "rt", encoding="utf-8", newline="")
    elif path.suffix == ".csv":
        lines = path.open(encoding="utf-8", newline="")
    else:
        raise ValueError(f"{path} must be a .csv, .csv.gz or .avro file")
    with lines:
        for number, row in enumerate(csv.DictReader(lines), start=2):
            try:
                # An empty cell is a value that is not known. strict=False reads numbers out of the CSV's text.
                yield msgspec.convert({k: v for k, v in row.items() if v != ""}, Flight, strict=False)
            except msgspec.ValidationError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error


def hourly_delays(flights: Iterable[Flight]) -> list[CarrierHour]:
    """Return the figures of `flights`, sorted by hour and carrier."""
    rows: dict[tuple[datetime.datetime, str], list[Flight]] = {}
    for flight in flights:
        hour = flight.scheduled_departure.replace(minute=0, second=0, microsecond=0)
        rows.setdefault((hour, flight.carrier), []).append(flight)
    out = []
    for (hour, carrier), group in sorted(rows.items()):
        departures = [f.departure_delay_minutes for f in group]
        arrivals = [f.arrival_delay_minutes for f in group if f.arrival_delay_minutes is not None]
        out.append(
            CarrierHour(
                hour=hour,
                carrier=carrier,
                flights=len(group),
                late=sum(minutes >= LATE_FROM_MINUTES for minutes in departures),
                departure_delay_minutes=sum(departures),
                worst_departure_delay_minutes=max(departures),
                arrived=len(arrivals),
                arrival_delay_minutes=sum(arrivals),
            )
        )
    return out


def differences(expected: Iterable[CarrierHour], found: Iterable[CarrierHour]) -> list[str]:
    """Return a sentence for each carrier and hour that is missing, unexpected, there twice, or has other figures."""
    wanted = {(row.hour, row.carrier): row for row in expected}
    seen: dict[tuple[datetime.datetime, str], int] = {}
    out = []
    for row in found:
        key = (row.hour, row.carrier)
        name = f"{row.carrier} {row.hour:%Y-%m-%d %H:00}"
        seen[key] = seen.get(key, 0) + 1
        if seen[key] > 1:
            out.append(f"{name}: result number {seen[key]} for this hour: {row.flights} flights")
        elif key not in wanted:
            out.append(f"{name}: {row.flights} flights that nobody put")
        elif row != wanted[key]:
            changes = [
                f"{field} {getattr(row, field)}, expected {getattr(wanted[key], field)}"
                for field in row.__struct_fields__
                if getattr(row, field) != getattr(wanted[key], field)
            ]
            out.append(f"{name}: {'; '.join(changes)}")
    for key, row in wanted.items():
        if key not in seen:
            out.append(f"{row.carrier} {row.hour:%Y-%m-%d %H:00}: missing, with {row.flights} flights")
    return out


_Sums = tuple[int, int, int, int, int, int]
_NO_WORST: Final = -(10**9)


class _SumDelays(beam.CombineFn):
    """From flights to the six sums of `CarrierHour`, in its order. Tuples of ints: Beam has a fast coder for them."""

    def create_accumulator(self) -> _Sums:
        return (0, 0, 0, _NO_WORST, 0, 0)

    def add_input(self, sums: _Sums, flight: Flight) -> _Sums:
        flights, late, total, worst, arrived, arrival_total = sums
        delay, arrival = flight.departure_delay_minutes, flight.arrival_delay_minutes
        return (
            flights + 1,
            late + (delay >= LATE_FROM_MINUTES),
            total + delay,
            max(worst, delay),
            arrived + (arrival is not None),
            arrival_total + (arrival or 0),
        )

    def merge_accumulators(self, accumulators: Iterable[_Sums]) -> _Sums:
        flights, late, total, worst, arrived, arrival_total = zip(*accumulators, strict=True)
        return (sum(flights), sum(late), sum(total), max(worst), sum(arrived), sum(arrival_total))

    def extract_output(self, sums: _Sums) -> _Sums:
        return sums


class _ToCarrierHour(beam.DoFn):
    def process(
        self, element: tuple[tuple[str, int], _Sums], window: beam.window.IntervalWindow = beam.DoFn.WindowParam
    ) -> Iterator[CarrierHour]:
        (carrier, _), sums = element
        yield CarrierHour(_EPOCH + window.start.micros * _MICROSECOND, carrier, *sums)


class HourlyDelays(beam.PTransform):
    """PCollection[Flight], timestamped with the scheduled departure, to PCollection[CarrierHour].

    One result per carrier and hour, when the watermark has passed the hour. A flight that comes after that, which the
    read's `out_of_orderness_seconds` should exclude, is dropped by Beam (its counter `dropped_due_to_lateness`).
    """

    def expand(self, flights: beam.PCollection[Flight]) -> beam.PCollection[CarrierHour]:
        return (
            flights
            | "Hours" >> beam.WindowInto(FixedWindows(_HOUR_SECONDS))
            | "ByCarrierAndDay" >> beam.Map(_by_carrier_and_day)
            | "Sum" >> beam.CombinePerKey(_SumDelays())
            | "Result" >> beam.ParDo(_ToCarrierHour())
        )


def _by_carrier_and_day(flight: Flight) -> tuple[tuple[str, int], Flight]:
    # The window has the hour, so the carrier alone would do. But the FnApiRunner's time for a key grows with the square
    # of the key's windows (2,000: 2.6 s, 4,000: 9.9 s), of which a year has thousands; with the day there are 24.
    return (flight.carrier, flight.scheduled_departure.toordinal()), flight


def decode_record(record: KinesisRecord) -> Flight:
    """Return the flight in a record.

    Raises:
        ValueError: it is none; the message names the shard and the sequence number.
    """
    try:
        return decode_flight(record.data)
    except msgspec.MsgspecError as error:
        raise ValueError(
            f"the record {record.sequence_number} of {record.stream}, {record.shard_id}, is not a flight: {error}"
        ) from error
