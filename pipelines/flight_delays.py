"""Delays per carrier and hour, from a stream of flights to a stream of results: the demo's job on your own streams.

    python -m samza_kinesis_io.pipelines.flight_delays --input=flights --output=delays --starting-position=trim_horizon

Flights and results are JSON objects, `Flight` and `CarrierHour` of samza_kinesis_io.transforms.flight_delays. Without
--stop-at it runs for ever. Options that are not listed go to Beam.
"""

from __future__ import annotations

import sys

import apache_beam as beam

from samza_kinesis_io import (
    ClientConfig,
    EventTimeWatermark,
    ReadFromKinesis,
    StartingPosition,
    StopPosition,
    WriteToKinesis,
)
from samza_kinesis_io.pipelines import options
from samza_kinesis_io.transforms.flight_delays import (
    CarrierHour,
    Flight,
    HourlyDelays,
    decode_record,
    encode_carrier_hour,
    scheduled_departure,
)


def read_flights(
    pipeline: beam.Pipeline,
    stream: str,
    *,
    starting_position: StartingPosition,
    stop_at: StopPosition | None,
    client: ClientConfig,
    out_of_orderness_seconds: float,
) -> beam.PCollection[Flight]:
    """Return the flights of a stream, timestamped with their scheduled departure."""
    return (
        pipeline
        | "ReadFlights"
        >> ReadFromKinesis(
            stream,
            starting_position=starting_position,
            stop_at=stop_at,
            client=client,
            watermark=EventTimeWatermark(scheduled_departure, out_of_orderness_seconds=out_of_orderness_seconds),
        )
        | "Decode" >> beam.Map(decode_record)
    )


def write_delays(delays: beam.PCollection[CarrierHour], stream: str, *, client: ClientConfig) -> None:
    """Write results to a stream; one carrier's stay together."""
    _ = delays | "WriteDelays" >> WriteToKinesis(
        stream, partition_key=_carrier, serializer=encode_carrier_hour, client=client
    )


def _carrier(row: CarrierHour) -> str:
    return row.carrier


def main(arguments: list[str] | None = None) -> int:
    parser = options.parser(__doc__)
    parser.add_argument("--input", required=True, metavar="STREAM", help="name or ARN of the stream of flights")
    parser.add_argument("--output", required=True, metavar="STREAM", help="name or ARN of the stream of results")
    parser.add_argument(
        "--out-of-orderness-seconds",
        type=float,
        default=3600.0,
        metavar="SECONDS",
        help="how much earlier a flight may be scheduled than one before it in its shard (default: an hour)",
    )
    options.add_read_options(parser)
    options.add_client_options(parser)
    args, beam_arguments = parser.parse_known_args(arguments)
    client = options.client_config(args)
    with beam.Pipeline(options=options.beam_options(beam_arguments)) as pipeline:
        flights = read_flights(
            pipeline,
            args.input,
            starting_position=args.starting_position,
            stop_at=args.stop_at,
            client=client,
            out_of_orderness_seconds=args.out_of_orderness_seconds,
        )
        write_delays(flights | HourlyDelays(), args.output, client=client)
    return 0


if __name__ == "__main__":
    sys.exit(main())
