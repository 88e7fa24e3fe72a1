"""The pipelines' command lines."""

from __future__ import annotations

import pytest
from apache_beam.utils.timestamp import Timestamp

from samza_kinesis_io import StartingPosition, StopPosition
from samza_kinesis_io.client import ClientConfig
from samza_kinesis_io.pipelines import options


def parsed(*arguments: str) -> tuple[object, list[str]]:
    parser = options.parser("A pipeline.")
    options.add_client_options(parser)
    options.add_read_options(parser)
    return parser.parse_known_args(list(arguments))


def test_without_options_everything_is_left_to_the_aws_chain() -> None:
    args, _ = parsed()
    assert options.client_config(args) == ClientConfig()
    assert args.starting_position == StartingPosition.latest()
    assert args.stop_at is None


def test_beams_own_options_are_left_to_beam() -> None:
    """Its `--region` is Google's, so ours is `--aws-region`; and nothing of Beam's is taken for an abbreviation."""
    args, rest = parsed("--aws-region=eu-west-1", "--region=us-central1", "--st")
    assert args.aws_region == "eu-west-1"
    assert rest == ["--region=us-central1", "--st"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trim_horizon", StartingPosition.trim_horizon()),
        ("LATEST", StartingPosition.latest()),
        ("2026-01-31T12:00:00Z", StartingPosition.at_timestamp(Timestamp.from_rfc3339("2026-01-31T12:00:00Z"))),
        ("2026-01-31T14:00:00+02:00", StartingPosition.at_timestamp(Timestamp.from_rfc3339("2026-01-31T12:00:00Z"))),
    ],
)
def test_a_starting_position_is_a_word_or_a_time(text: str, expected: StartingPosition) -> None:
    assert options.starting_position(text) == expected


def test_a_stop_is_now_or_a_time() -> None:
    assert options.stop_position("now") == StopPosition.now()
    assert options.stop_position("2026-01-31T12:00:00Z") == StopPosition.at_timestamp(
        Timestamp.from_rfc3339("2026-01-31T12:00:00Z")
    )


@pytest.mark.parametrize("text", ["2026-01-31T12:00:00", "yesterday", ""])
def test_a_time_without_its_zone_is_refused_with_an_example(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--stop-at", text)
    assert "a time with its zone such as 2026-01-31T12:00:00Z" in capsys.readouterr().err
