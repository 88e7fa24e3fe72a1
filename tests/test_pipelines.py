"""The ready-made pipelines, from their command lines."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from samza_kinesis_io.pipelines import copy_stream, demo, flight_delays
from samza_kinesis_io.testing import LocalKinesis
from samza_kinesis_io.transforms.flight_delays import (
    decode_carrier_hour,
    encode_flight,
    hourly_delays,
    read_flights,
)
from tiers import ROOT

SAMPLE = Path(demo.__file__).with_name("flights-sample.avro")


def common(kinesis: LocalKinesis) -> list[str]:
    return [
        "--runner=FnApiRunner",
        "--starting-position=trim_horizon",
        "--stop-at=now",
        "--aws-region=us-east-1",
        f"--aws-endpoint-url={kinesis.endpoint_url}",
    ]


def test_copying_keeps_data_and_partition_keys() -> None:
    with LocalKinesis() as kinesis:
        kinesis.fake.create_stream("flights", shards=2)
        kinesis.fake.create_stream("copy", shards=3)
        for i in range(100):
            kinesis.fake.put("flights", b"%d" % i, partition_key=f"key {i % 7}")
        assert copy_stream.main(["--input=flights", "--output=copy", *common(kinesis)]) == 0
        copied, original = (kinesis.fake.records(name) for name in ("copy", "flights"))
    assert sorted((r.partition_key, r.data) for r in copied) == sorted((r.partition_key, r.data) for r in original)


def test_delays_of_a_users_own_stream() -> None:
    flights = list(itertools.islice(read_flights(SAMPLE), 300))
    with LocalKinesis() as kinesis:
        kinesis.fake.create_stream("flights", shards=2)
        kinesis.fake.create_stream("delays", shards=1)
        for flight in flights:
            kinesis.fake.put("flights", encode_flight(flight), partition_key=flight.partition_key)
        assert flight_delays.main(["--input=flights", "--output=delays", *common(kinesis)]) == 0
        found = kinesis.fake.records("delays")
    assert sorted(decode_carrier_hour(r.data) for r in found) == hourly_delays(flights)
    assert {r.partition_key for r in found} == {f.carrier for f in flights}


PROGRAMS = sorted(path.stem for path in (ROOT / "pipelines").glob("*.py") if '"__main__"' in path.read_text())


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_pipeline_says_how_it_is_used(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"samza_kinesis_io.pipelines.{name}", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
