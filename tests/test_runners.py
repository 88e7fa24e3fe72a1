"""What is refused when the pipeline is built, each time with the option, its value and the alternative."""

from __future__ import annotations

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.utils.timestamp import Timestamp

from samza_kinesis_io.errors import ConfigurationError
from samza_kinesis_io.positions import StartingPosition, StopPosition
from samza_kinesis_io.runners import restriction_count
from samza_kinesis_io.source import ReadFromKinesis
from samza_kinesis_io.testing import FakeKinesis

FLINK = ["--runner=FlinkRunner"]
FLINK_FLAGS = ["--streaming", "--checkpointing_interval=1000", "--finish_bundle_before_checkpointing"]
FUTURE = StopPosition.at_timestamp(Timestamp(4_000_000_000))


def build(*arguments: str, stop_at: StopPosition | None = None, **options: object) -> beam.Pipeline:
    """Build a pipeline, which reaches no service and no runner."""
    pipeline = beam.Pipeline(options=PipelineOptions(list(arguments)))
    _ = pipeline | ReadFromKinesis(
        "flights",
        starting_position=StartingPosition.trim_horizon(),
        stop_at=stop_at,
        client=FakeKinesis().factory(),
        **options,  # type: ignore[arg-type]
    )
    return pipeline


@pytest.mark.parametrize(
    "runner",
    [
        ["--runner=FnApiRunner"],
        ["--runner=DirectRunner"],
        ["--runner=PortableRunner", "--job_endpoint=embed"],
    ],
    ids=lambda runner: " ".join(runner),
)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop_at", [None, StopPosition.now()], ids=["unbounded", "bounded"])
def test_several_workers_of_the_fn_api_runner_are_refused(
    runner: list[str], workers: int, stop_at: StopPosition | None
) -> None:
    """It would drop what a bundle left to be read, and report DONE."""
    with pytest.raises(ConfigurationError, match=f"direct_num_workers must be 1 .*, got {workers}.*--runner=Prism"):
        build(*runner, f"--direct_num_workers={workers}", stop_at=stop_at)


def test_prism_ignores_the_number_of_workers_and_so_do_we() -> None:
    build("--runner=PrismRunner", "--direct_num_workers=2")


def test_an_unbounded_read_on_spark_is_refused() -> None:
    with pytest.raises(
        ConfigurationError, match=r"Spark runner cannot run an unbounded read.*stop_at=StopPosition\.now"
    ):
        build("--runner=SparkRunner")


def test_a_bounded_read_on_spark_is_refused_with_streaming() -> None:
    with pytest.raises(ConfigurationError, match="streaming must not be set .*, got --streaming.*Remove it"):
        build("--runner=SparkRunner", "--streaming", stop_at=StopPosition.now())


def test_a_stop_in_the_future_on_spark_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"stop_at must lie in the past .*, got 2096-10-02.*StopPosition\.now"):
        build("--runner=SparkRunner", stop_at=FUTURE)


def test_a_bounded_read_on_spark_is_accepted() -> None:
    build("--runner=SparkRunner", stop_at=StopPosition.now())


@pytest.mark.parametrize("left_out", FLINK_FLAGS)
def test_an_unbounded_read_on_flink_names_the_option_that_is_missing(left_out: str) -> None:
    given = [flag for flag in FLINK_FLAGS if flag != left_out]
    with pytest.raises(ConfigurationError) as refused:
        build(*FLINK, *given)
    needs = str(refused.value).split(":")[0]
    assert left_out.split("=")[0] in needs
    assert not [flag for flag in given if flag.split("=")[0] in needs]


def test_an_unbounded_read_on_flink_names_all_options_that_are_missing() -> None:
    with pytest.raises(ConfigurationError) as refused:
        build(*FLINK)
    assert [flag for flag in FLINK_FLAGS if flag.split("=")[0] in str(refused.value)] == FLINK_FLAGS


def test_a_checkpointing_interval_of_nothing_is_none() -> None:
    with pytest.raises(ConfigurationError, match="--checkpointing_interval"):
        build(*FLINK, "--streaming", "--checkpointing_interval=-1", "--finish_bundle_before_checkpointing")


def test_reads_on_flink_are_accepted_with_these_options_and_a_bounded_one_without() -> None:
    build(*FLINK, *FLINK_FLAGS)
    build(*FLINK, stop_at=StopPosition.now())


@pytest.mark.parametrize(
    "runner",
    ["--runner=FnApiRunner", "--runner=DirectRunner", "--runner=PrismRunner"],
)
def test_several_restrictions_are_refused_where_they_would_lose_records_as_late(runner: str) -> None:
    with pytest.raises(ConfigurationError, match="restrictions must be 1 .*, got 2"):
        build(runner, restrictions=2)


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        (["--runner=FnApiRunner"], 1),
        (["--runner=DirectRunner"], 1),
        (["--runner=PrismRunner"], 1),
        (["--runner=PortableRunner", "--job_endpoint=embed"], 1),
        (["--runner=PortableRunner", "--job_endpoint=somewhere:8099"], 1),
        ([*FLINK, "--parallelism=3"], 12),
        (FLINK, 16),
        (["--runner=SparkRunner"], 16),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_there_are_several_restrictions_only_where_they_are_read_side_by_side(arguments: list[str], count: int) -> None:
    options = PipelineOptions(arguments)
    assert restriction_count(beam.Pipeline(options=options).runner, options, None) == count


def test_the_word_of_the_user_counts_on_an_endpoint_that_is_not_known() -> None:
    options = PipelineOptions(["--runner=PortableRunner", "--job_endpoint=somewhere:8099"])
    assert restriction_count(beam.Pipeline(options=options).runner, options, 8) == 8
