"""Every way to ask for an impossible read: each error names the option, its value and the fix."""

from __future__ import annotations

import base64
import bz2
import os
import pickle
import re
import zlib
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.utils.timestamp import Timestamp

from samza_kinesis_io.client import ClientConfig
from samza_kinesis_io.errors import (
    AccessRefused,
    ConfigurationError,
    EndpointUnreachable,
    KinesisIOError,
    StreamNotFound,
)
from samza_kinesis_io.positions import StartingPosition, StopPosition
from samza_kinesis_io.source import PlanShards, ReadFromKinesis
from samza_kinesis_io.testing import FakeKinesis, LocalKinesis, SimulatedClock

HORIZON = StartingPosition.trim_horizon()
IRELAND = "arn:aws:kinesis:eu-west-1:123456789012:stream/flights"
NOW = Timestamp(1_700_000_000)


def read(stream: Any = "flights", **options: Any) -> ReadFromKinesis:
    options = {"starting_position": HORIZON, "clock": SimulatedClock()} | options
    return ReadFromKinesis(stream, **options)


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ("", "stream must be a stream name .* got ''"),
        ("fl ights", "stream must be a stream name .* got 'fl ights'"),
        ("x" * 129, "stream must be a stream name"),
        ("arn:aws:kinesis:eu-west-1:12:stream/flights", "or a stream ARN .* got 'arn:aws:kinesis:eu-west-1:12"),
        ("arn:aws:s3:::bucket", "or a stream ARN"),
        ([], r"stream must be a name, an ARN, or a list of them that is not empty, got \[\]"),
        (None, "stream must be a name, an ARN, or a list of them that is not empty, got None"),
        (["flights", ""], "stream must be a stream name .* got ''"),
        (["flights", 5], "stream must be a stream name .* got 5"),
        (["a", "b", "a"], "stream lists a twice: every record would be read twice; name it once"),
        ([IRELAND, IRELAND], "stream lists arn:aws:kinesis:eu-west-1.* twice"),
    ],
)
def test_streams(stream: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read(stream)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"starting_position": "TRIM_HORIZON"},
            r"starting_position must be like StartingPosition.trim_horizon\(\), got 'TR",
        ),
        ({"starting_position": None}, "starting_position must be like StartingPosition.trim_horizon"),
        ({"stop_at": NOW}, r"stop_at must be like StopPosition.now\(\), got Timestamp"),
        ({"on_data_loss": "FAIL"}, "on_data_loss must be like DataLossPolicy.FAIL, got 'FAIL'"),
        ({"hash_filter": "KEEP"}, "hash_filter must be like HashFilter.KEEP, got 'KEEP'"),
        ({"deaggregate": 1}, "deaggregate must be like True, got 1"),
        ({"poll_interval_seconds": 0}, "poll_interval_seconds must be > 0 and <= 3600, got 0"),
        ({"poll_interval_seconds": -1}, "poll_interval_seconds must be > 0 and <= 3600, got -1"),
        ({"poll_interval_seconds": float("nan")}, "poll_interval_seconds must be > 0 and <= 3600, got nan"),
        ({"poll_interval_seconds": "1"}, "poll_interval_seconds must be > 0 and <= 3600, got '1'"),
        ({"bundle_seconds": 0}, "bundle_seconds must be > 0 and <= 3600, got 0"),
        ({"bundle_seconds": True}, "bundle_seconds must be > 0 and <= 3600, got True"),
        ({"max_records_per_get": 0}, "max_records_per_get must be a whole number >= 1 and <= 10000, got 0"),
        ({"max_records_per_get": 10_001}, "max_records_per_get must be a whole number >= 1 and <= 10000, got 10001"),
        ({"prefetch_bytes": 0}, "prefetch_bytes must be a whole number >= 1, got 0"),
        ({"prefetch_bytes_per_shard": 1.5}, "prefetch_bytes_per_shard must be a whole number >= 1, got 1.5"),
        ({"bundle_records": True}, "bundle_records must be a whole number >= 1, got True"),
        ({"bundle_bytes": -5}, "bundle_bytes must be a whole number >= 1, got -5"),
        ({"client": "eu-west-1"}, r"client must be a ClientConfig \(or another ClientFactory\), got 'eu-west-1'"),
        ({"watermark": "arrival"}, r"watermark must be ArrivalTimeWatermark\(\).* got 'arrival'"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read(**options)


def test_a_start_in_the_future() -> None:
    with pytest.raises(
        ConfigurationError, match=r"must not lie in the future, got at_timestamp\(.*use StartingPosition.l"
    ):
        read(starting_position=StartingPosition.at_timestamp(NOW + 60))


def test_the_future_is_one_of_the_transforms_own_clock_when_it_is_built() -> None:
    clock = SimulatedClock()
    later = Timestamp(micros=round((clock.now_seconds() + 60) * 1e6))
    clock.advance(120)
    read(starting_position=StartingPosition.at_timestamp(later), clock=clock)


def test_a_stop_before_the_start() -> None:
    with pytest.raises(ConfigurationError, match="stop_at must not lie before starting_position, got .* and"):
        read(starting_position=StartingPosition.at_timestamp(NOW), stop_at=StopPosition.at_timestamp(NOW - 1))


def test_a_stop_by_sequence_numbers_needs_a_start_before_it() -> None:
    stop = StopPosition.at_sequence_numbers({"shardId-000000000000": "5"})
    with pytest.raises(
        ConfigurationError, match=r"stop_at by sequence numbers needs a start before them, got latest\(\)"
    ):
        read(starting_position=StartingPosition.latest(), stop_at=stop)


@pytest.mark.parametrize("option", ["starting_position", "stop_at"])
def test_sequence_numbers_of_several_streams(option: str) -> None:
    position: Any = StartingPosition if option == "starting_position" else StopPosition
    with pytest.raises(ConfigurationError, match=f"{option} by sequence numbers needs a single stream .* got 2"):
        read(["a", "b"], **{option: position.at_sequence_numbers({"shardId-000000000000": "5"})})


def test_a_region_that_contradicts_the_arn() -> None:
    with pytest.raises(
        ConfigurationError, match=r"client.region is 'us-east-1', but the ARN .* is in 'eu-west-1'; leave r"
    ):
        read(["other", IRELAND], client=ClientConfig(region="us-east-1"))


def test_the_same_region_twice_is_no_contradiction() -> None:
    read(IRELAND, client=ClientConfig(region="eu-west-1"))


# What only the service can tell; planning fails at once.


def plan(stream: str, client: Any) -> None:
    transform = ReadFromKinesis(stream, starting_position=HORIZON, client=client)
    list(PlanShards(transform.plan(1), SimulatedClock()).process(None))


def test_a_stream_that_does_not_exist_is_named_with_its_region() -> None:
    with (
        LocalKinesis() as server,
        pytest.raises(
            StreamNotFound, match="stream nowhere does not exist in region us-east-1.*correct the stream's name"
        ),
    ):
        plan("nowhere", ClientConfig(region="us-east-1", endpoint_url=server.endpoint_url))


def test_an_arn_of_another_account_or_region_does_not_find_the_stream() -> None:
    with LocalKinesis() as server:
        server.fake.create_stream("flights")
        client = ClientConfig(endpoint_url=server.endpoint_url)
        with pytest.raises(KinesisIOError, match="flights"):
            plan("arn:aws:kinesis:eu-west-1:999999999999:stream/flights", client)


def test_an_endpoint_where_nobody_listens_is_named() -> None:
    with pytest.raises(EndpointUnreachable, match="http://127.0.0.1:9"):
        plan("flights", ClientConfig(region="us-east-1", endpoint_url="http://127.0.0.1:9"))


def test_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with LocalKinesis() as server, pytest.raises(AccessRefused, match="credentials"):
        plan("flights", ClientConfig(region="us-east-1", endpoint_url=server.endpoint_url))


def test_no_region(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    with pytest.raises(
        ConfigurationError, match=r"no AWS region is known: give ClientConfig\(region=...\), set AWS_REGION"
    ):
        plan("flights", ClientConfig())


def test_a_region_that_does_not_exist_is_named() -> None:
    with pytest.raises((EndpointUnreachable, ConfigurationError), match="mars-north-1"):
        plan("flights", ClientConfig(region="mars-north-1", connect_timeout_seconds=2))


@pytest.mark.parametrize("code", ["AccessDeniedException", "UnrecognizedClientException", "ExpiredTokenException"])
def test_refused_access_fails_at_once_and_says_what_to_do(code: str) -> None:
    fake = FakeKinesis()
    fake.create_stream("flights")
    fake.faults.fail("DescribeStreamSummary", code, times=None)
    with pytest.raises(AccessRefused, match=r"stream flights in us-east-1.*\((grant|check|renew) "):
        plan("flights", fake.factory())
    assert fake.calls["DescribeStreamSummary"] == 1


def test_a_stream_that_is_being_deleted() -> None:
    clock = SimulatedClock()
    fake = FakeKinesis(clock=clock, transition_seconds=100)
    fake.create_stream("flights")
    fake.call("DeleteStream", {"StreamName": "flights"})
    with pytest.raises(KinesisIOError, match="stream flights is being deleted"):
        plan("flights", fake.factory())


# What a runner would silently break.


def apply(runner: str, *arguments: str, **options: Any) -> None:
    pipeline = beam.Pipeline(runner=None, options=PipelineOptions([*arguments]))
    pipeline.runner = type(runner, (), {})()
    transform = ReadFromKinesis("flights", **({"starting_position": HORIZON} | options))
    transform.expand(beam.pvalue.PBegin(pipeline))


@pytest.mark.parametrize("runner", ["DirectRunner", "FnApiRunner", "SwitchingDirectRunner", "BundleBasedDirectRunner"])
def test_several_workers_of_the_direct_runner(runner: str) -> None:
    with pytest.raises(
        ConfigurationError, match=f"direct_num_workers must be 1 with ReadFromKinesis on {runner}, got 4"
    ):
        apply(runner, "--direct_num_workers=4")


def test_the_embedded_job_service_counts_as_what_it_is() -> None:
    with pytest.raises(ConfigurationError, match="direct_num_workers must be 1"):
        apply("PortableRunner", "--job_endpoint=embed", "--direct_num_workers=2")


def test_an_unbounded_read_on_spark() -> None:
    with pytest.raises(ConfigurationError, match=r"cannot run an unbounded read.*Give stop_at=StopPosition.now\(\)"):
        apply("SparkRunner")


def test_a_streaming_flag_on_spark() -> None:
    with pytest.raises(ConfigurationError, match="streaming must not be set with a bounded read on the Spark runner"):
        apply("SparkRunner", "--streaming", stop_at=StopPosition.now())


def test_a_stop_in_the_future_on_spark() -> None:
    with pytest.raises(
        ConfigurationError, match=r"stop_at must lie in the past on the Spark runner.*use StopPosition.now"
    ):
        apply("SparkRunner", stop_at=StopPosition.at_timestamp(Timestamp.now() + 3600))


def test_an_unbounded_read_on_flink_names_every_option_that_it_lacks() -> None:
    with pytest.raises(
        ConfigurationError,
        match="needs --streaming, --checkpointing_interval=MILLISECONDS, --finish_bundle_before_checkpointing",
    ):
        apply("FlinkRunner")
    with pytest.raises(ConfigurationError, match="needs --finish_bundle_before_checkpointing:"):
        apply("FlinkRunner", "--streaming", "--checkpointing_interval=1000")


def test_several_restrictions_where_they_run_one_after_the_other() -> None:
    for runner in ("FnApiRunner", "PrismRunner"):
        with pytest.raises(ConfigurationError, match=rf"restrictions must be 1 \(or left out\) on {runner}, got 4"):
            apply(runner, restrictions=4)


@pytest.mark.parametrize("restrictions", [0, -1, True, "4"])
def test_restrictions_are_a_whole_number(restrictions: Any) -> None:
    with pytest.raises(ConfigurationError, match="restrictions must be a whole number >= 1, got"):
        apply(
            "FlinkRunner",
            "--streaming",
            "--checkpointing_interval=1000",
            "--finish_bundle_before_checkpointing",
            restrictions=restrictions,
        )


# No secret travels.


def test_no_secret_is_in_the_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {
        "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
        "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
        "AWS_SESSION_TOKEN": "a-session-token-of-this-test",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    client = ClientConfig(
        region="us-east-1", role_arn="arn:aws:iam::123456789012:role/reader", external_id="not-a-secret-by-aws"
    )
    pipeline = beam.Pipeline(runner="FnApiRunner")
    _ = (
        pipeline
        | ReadFromKinesis("flights", starting_position=StartingPosition.latest(), client=client)
        | beam.Map(len)
    )
    proto = pipeline.to_runner_api().SerializeToString()
    assert b"arn:aws:iam::123456789012:role/reader" in _unpacked(proto), "or nothing would have been found anyway"
    for value in secrets.values():
        assert value.encode() not in _unpacked(proto)
        assert value.encode() not in pickle.dumps(client)
    assert os.environ["AWS_ACCESS_KEY_ID"] == secrets["AWS_ACCESS_KEY_ID"]


def _unpacked(proto: bytes) -> bytes:
    """Return a pipeline's bytes and everything that is packed in them: pickles are compressed and in base64."""
    found = [proto]
    for text in re.findall(rb"[A-Za-z0-9+/=]{40,}", proto):
        for start in range(4):
            try:
                raw = base64.b64decode(text[start : start + (len(text) - start) // 4 * 4])
            except ValueError:
                continue
            for unpack in (zlib.decompress, bz2.decompress):
                try:
                    found.append(unpack(raw))
                except (OSError, ValueError, zlib.error):
                    continue
    return b"".join(found)
