"""A Samza Kinesis job as its users write it, run from its properties file against Kinesis over HTTP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from samza_kinesis_io.checkpoints import FileCheckpointStore
from samza_kinesis_io.pipelines import run_task
from samza_kinesis_io.task import InitableTask, OutgoingMessageEnvelope, StreamTask, SystemStream, WindowableTask
from samza_kinesis_io.testing import LocalKinesis

DELAYS = SystemStream("kinesis", "delays")

JOB = """
app.name=delays
job.factory.class=org.apache.samza.job.local.ThreadJobFactory
job.systemstreampartition.grouper.factory=org.apache.samza.container.grouper.stream.AllSspToSingleTaskGrouperFactory

systems.kinesis.samza.factory=org.apache.samza.system.kinesis.KinesisSystemFactory
systems.kinesis.aws.region=us-east-1
systems.kinesis.aws.kcl.KinesisEndpoint={endpoint}
systems.kinesis.aws.kcl.InitialPositionInStream=TRIM_HORIZON
systems.kinesis.aws.kcl.IdleTimeBetweenReadsInMillis=250
systems.kinesis.streams.flights.aws.kcl.TableName=delays-flights
systems.kinesis.streams.flights.aws.accessKey=test
sensitive.systems.kinesis.streams.flights.aws.secretKey=test

serializers.registry.json.class=org.apache.samza.serializers.JsonSerdeFactory
serializers.registry.text.class=org.apache.samza.serializers.StringSerdeFactory
systems.kinesis.streams.flights.samza.msg.serde=json
systems.kinesis.streams.airports.samza.msg.serde=text
systems.kinesis.streams.delays.samza.msg.serde=json

task.class={task}
task.inputs=kinesis.flights,kinesis.airports
task.window.ms=100
task.commit.ms=200
task.checkpoint.factory=org.apache.samza.checkpoint.file.FileSystemCheckpointManagerFactory
task.checkpoint.path={path}
"""


class DelayTask(StreamTask, InitableTask, WindowableTask):
    """Flights that are late go on; airports are only counted."""

    def init(self, context: Any) -> None:
        self.name = context.task_name
        assert context.config["app.name"] == "delays"
        assert not any("secretKey" in key for key in context.config)

    def process(self, envelope: Any, collector: Any, coordinator: Any) -> None:
        if envelope.system_stream_partition.stream == "flights" and envelope.message["delay"] > 0:
            collector.send(OutgoingMessageEnvelope(DELAYS, envelope.message, key=envelope.key))

    def window(self, collector: Any, coordinator: Any) -> None:
        collector.send(OutgoingMessageEnvelope(DELAYS, {"window of": self.name}))


def put(kinesis: LocalKinesis, numbers: range) -> None:
    for n in numbers:
        message = json.dumps({"flight": n, "delay": n % 2}).encode()
        kinesis.fake.put("flights", message, partition_key=f"carrier-{n % 7}")
    kinesis.fake.put("airports", b"ZRH", partition_key="ZRH")


def flights(kinesis: LocalKinesis) -> list[int]:
    messages = [json.loads(r.data) for r in kinesis.fake.records("delays")]
    return sorted(m["flight"] for m in messages if "flight" in m)


def test_a_job_runs_from_its_file_and_a_second_run_goes_on_from_its_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with LocalKinesis() as kinesis:
        for stream in ("flights", "airports", "delays"):
            kinesis.fake.create_stream(stream, shards=2)
        path = tmp_path / "job.properties"
        path.write_text(
            JOB.format(
                endpoint=kinesis.endpoint_url,
                path=tmp_path / "checkpoints",
                task=f"{__name__}.{DelayTask.__qualname__}",
            )
        )
        arguments = [f"--config-path={path}", "--stop-at=now", "--runner=FnApiRunner"]
        put(kinesis, range(40))
        with caplog.at_level("INFO"):
            assert run_task.main([*arguments, "--config", "task.window.ms=50"]) == 0
        assert flights(kinesis) == list(range(1, 40, 2))
        assert "'sensitive.systems.kinesis.streams.flights.aws.secretKey': '********'" in caplog.text

        rows = FileCheckpointStore(str(tmp_path / "checkpoints/delays-1")).load("flights")
        assert len(rows) == 2
        put(kinesis, range(40, 60))
        assert run_task.main(arguments) == 0
        assert flights(kinesis) == list(range(1, 60, 2)), "nothing twice: the first run committed all of it"
