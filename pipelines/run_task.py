"""Run a Samza job from its properties file.

    python -m samza_kinesis_io.pipelines.run_task --config-path job.properties --config task.window.ms=5000 --runner ...

The file is Samza's: task.class is the dotted path of a task in Python, task.inputs names the streams. Several
--config-path and --config are read in their order; the later wins. What a key means here, and which are refused, is in
docs/samza.md. Options that are not listed go to Beam.
"""

from __future__ import annotations

import logging
import os
import sys

import apache_beam as beam

from samza_kinesis_io import StopPosition
from samza_kinesis_io.job_config import JobConfig, load, read_job
from samza_kinesis_io.pipelines import options
from samza_kinesis_io.transforms.stream_task import RunStreamTask


def main(arguments: list[str] | None = None) -> int:
    parser = options.parser(__doc__)
    parser.add_argument(
        "--config-path", action="append", required=True, metavar="FILE", help="a properties file; may be repeated"
    )
    parser.add_argument(
        "--config", action="append", default=[], metavar="KEY=VALUE", help="a key that overrides the files; repeatable"
    )
    parser.add_argument(
        "--stop-at",
        type=options.stop_position,
        metavar="WHEN",
        help="now, or a time: process what arrived before it, then end. Default: run for ever",
    )
    args, beam_arguments = parser.parse_known_args(arguments)
    logging.basicConfig(level=logging.INFO)
    run(load(args.config_path, args.config, os.environ), args.stop_at, beam_arguments)
    return 0


def run(config: JobConfig, stop_at: StopPosition | None, beam_arguments: list[str]) -> None:
    """Run a job to its end."""
    logging.getLogger(__name__).info("%r", config)
    credentials = read_job(config).credentials
    if credentials is not None:
        logging.getLogger(__name__).warning(
            "the job's accessKey and secretKey go into this process's environment; workers elsewhere need their own "
            "(AWS's usual chain)"
        )
        os.environ["AWS_ACCESS_KEY_ID"] = credentials.access_key
        os.environ["AWS_SECRET_ACCESS_KEY"] = credentials.secret_key
    with beam.Pipeline(options=options.beam_options(beam_arguments)) as pipeline:
        _ = pipeline | "RunStreamTask" >> RunStreamTask(config=config, stop_at=stop_at)


if __name__ == "__main__":
    sys.exit(main())
