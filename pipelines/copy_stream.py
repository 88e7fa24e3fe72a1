"""Copy a stream into another one, with partition keys kept.

    python -m samza_kinesis_io.pipelines.copy_stream --input=flights --output=flights-copy --stop-at=now \\
        --starting-position=trim_horizon

Aggregated records arrive as the user records they hold. An explicit hash key is kept where Kinesis gives it back, which
it does for aggregated records only. Without --stop-at it runs for ever. Options that are not listed go to Beam.
"""

from __future__ import annotations

import sys

import apache_beam as beam

from samza_kinesis_io import KinesisRecord, OutgoingRecord, ReadFromKinesis, WriteToKinesis
from samza_kinesis_io.pipelines import options


def outgoing(record: KinesisRecord) -> OutgoingRecord:
    return OutgoingRecord(
        data=record.data, partition_key=record.partition_key, explicit_hash_key=record.explicit_hash_key
    )


def main(arguments: list[str] | None = None) -> int:
    parser = options.parser(__doc__)
    parser.add_argument("--input", required=True, metavar="STREAM", help="name or ARN of the stream to read")
    parser.add_argument("--output", required=True, metavar="STREAM", help="name or ARN of the stream to write")
    options.add_read_options(parser)
    options.add_client_options(parser)
    args, beam_arguments = parser.parse_known_args(arguments)
    client = options.client_config(args)
    with beam.Pipeline(options=options.beam_options(beam_arguments)) as pipeline:
        _ = (
            pipeline
            | "Read"
            >> ReadFromKinesis(
                args.input, starting_position=args.starting_position, stop_at=args.stop_at, client=client
            )
            | "Outgoing" >> beam.Map(outgoing)
            | "Write" >> WriteToKinesis(args.output, client=client)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
