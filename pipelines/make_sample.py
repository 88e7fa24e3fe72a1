"""Make the flights that ship with the demo: the first days of a year of departures, as Avro.

    python -m samza_kinesis_io.pipelines.make_sample flights-2013.csv.gz pipelines/flights-sample.avro

The flights are those that left New York City's three airports in 2013, out of the nycflights13 data set, which is in
the public domain (CC0 1.0); its source is the US Bureau of Transportation Statistics, "On-Time Performance" (RITA).
"""

from __future__ import annotations

import argparse
import datetime
import itertools
from typing import Any

import fastavro
import msgspec

from samza_kinesis_io.transforms.flight_delays import read_flights

_MAYBE_INT = ["null", "int"]

SCHEMA: dict[str, Any] = {
    "type": "record",
    "name": "Flight",
    "namespace": "samza_kinesis_io",
    "doc": (
        "Departures from New York City's airports (EWR, JFK, LGA) in January 2013, from the nycflights13 data set "
        "(CC0 1.0, public domain); source: US Bureau of Transportation Statistics, On-Time Performance."
    ),
    "fields": [
        {
            "name": "scheduled_departure",
            "type": "string",
            "doc": "ISO 8601, the airport's own time, without a zone.",
        },
        {"name": "carrier", "type": "string", "doc": "IATA code."},
        {"name": "flight", "type": "int"},
        {"name": "tail_number", "type": ["null", "string"], "default": None},
        {"name": "origin", "type": "string"},
        {"name": "destination", "type": "string"},
        {"name": "departure_delay_minutes", "type": "int", "doc": "Below zero: early."},
        {"name": "arrival_delay_minutes", "type": _MAYBE_INT, "default": None, "doc": "null: it never arrived."},
        {"name": "air_time_minutes", "type": _MAYBE_INT, "default": None},
        {"name": "distance_miles", "type": _MAYBE_INT, "default": None},
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("flights", help="the year's flights, sorted by scheduled departure")
    parser.add_argument("output")
    parser.add_argument("--days", type=int, default=5)
    args = parser.parse_args()

    flights = read_flights(args.flights)
    first = next(flights)
    end = datetime.datetime.combine(first.scheduled_departure, datetime.time()) + datetime.timedelta(days=args.days)
    chosen = itertools.takewhile(lambda f: f.scheduled_departure < end, itertools.chain([first], flights))
    rows = [msgspec.to_builtins(f) for f in chosen]
    with open(args.output, "wb") as out:
        # A fixed marker: the same flights give the same bytes.
        fastavro.writer(out, fastavro.parse_schema(SCHEMA), rows, codec="deflate", sync_marker=b"samza-kinesis-io")
    print(f"{len(rows)} flights in {args.output}")


if __name__ == "__main__":
    main()
