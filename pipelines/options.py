"""Command-line options that the pipelines share. What they do not know is left to Beam (`--runner` and others).

The AWS ones carry the prefix `aws`, since Beam has a `--region` of its own.
"""

from __future__ import annotations

import argparse
import datetime

from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.utils.timestamp import Timestamp

from samza_kinesis_io import ClientConfig, StartingPosition, StopPosition


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser that shows the module's docstring and leaves abbreviations of Beam's options alone."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def add_client_options(to: argparse.ArgumentParser) -> None:
    group = to.add_argument_group("AWS", "Credentials come from AWS's usual chain, on the workers.")
    group.add_argument("--aws-region", metavar="REGION", help="default: AWS_REGION, or the profile's")
    group.add_argument("--aws-endpoint-url", metavar="URL", help="an emulator or a VPC endpoint")
    group.add_argument("--aws-profile", metavar="NAME", help="a profile of the workers' AWS configuration files")
    group.add_argument("--aws-role-arn", metavar="ARN", help="a role to assume")


def client_config(args: argparse.Namespace) -> ClientConfig:
    return ClientConfig(
        region=args.aws_region,
        endpoint_url=args.aws_endpoint_url,
        profile=args.aws_profile,
        role_arn=args.aws_role_arn,
    )


def add_read_options(to: argparse.ArgumentParser) -> None:
    group = to.add_argument_group("reading")
    group.add_argument(
        "--starting-position",
        type=starting_position,
        default=StartingPosition.latest(),
        metavar="WHERE",
        help="trim_horizon, latest (the default), or a time such as 2026-01-31T12:00:00Z",
    )
    group.add_argument(
        "--stop-at",
        type=stop_position,
        metavar="WHEN",
        help="now, or a time: read what arrived before it, then end. Default: read for ever",
    )


def starting_position(text: str) -> StartingPosition:
    """Return the position an argument names. Raises argparse.ArgumentTypeError."""
    if text.lower() == "trim_horizon":
        return StartingPosition.trim_horizon()
    if text.lower() == "latest":
        return StartingPosition.latest()
    return StartingPosition.at_timestamp(_timestamp(text, "trim_horizon, latest"))


def stop_position(text: str) -> StopPosition:
    """Return the stop an argument names. Raises argparse.ArgumentTypeError."""
    return StopPosition.now() if text.lower() == "now" else StopPosition.at_timestamp(_timestamp(text, "now"))


def _timestamp(text: str, words: str) -> Timestamp:
    try:
        # "Z" is understood by fromisoformat from Python 3.11 on only.
        time = datetime.datetime.fromisoformat(text[:-1] + "+00:00" if text.endswith(("Z", "z")) else text)
    except ValueError:
        time = None
    if time is None or time.tzinfo is None:
        raise argparse.ArgumentTypeError(
            f"must be {words} or a time with its zone such as 2026-01-31T12:00:00Z, got {text!r}"
        )
    return Timestamp.from_utc_datetime(time.astimezone(datetime.timezone.utc))


def beam_options(arguments: list[str]) -> PipelineOptions:
    """Return Beam's options out of what a parser did not know."""
    return PipelineOptions(arguments)
