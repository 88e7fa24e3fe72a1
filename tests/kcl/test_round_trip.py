"""A KCL application's lease table is where our job goes on, and a table of ours is where a KCL application does.

With the KCL itself, 3.0.1, against LocalKinesis and moto's DynamoDB. (dynalite refuses the index that KCL 3 makes: it
wants a throughput for it, also in a table that is paid per request.)
"""

from __future__ import annotations

import queue
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from moto.server import ThreadedMotoServer

from samza_kinesis_io.aggregation import Aggregate
from samza_kinesis_io.checkpoints import DynamoDBCheckpointStore
from samza_kinesis_io.client import ClientConfig
from samza_kinesis_io.dynamodb import DynamoDBConfig
from samza_kinesis_io.positions import StartingPosition, StopPosition
from samza_kinesis_io.records import KinesisRecord
from samza_kinesis_io.sink import WriteToKinesis
from samza_kinesis_io.source import ReadFromKinesis
from samza_kinesis_io.testing import LocalKinesis

pytestmark = [pytest.mark.kcl, pytest.mark.timeout(400)]

TABLE = "application"
PATIENCE_SECONDS = 120


class Application:
    """One run of the KCL application."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process = process
        self._log = log
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.strip())
        self._lines.put(None)

    def read_to_its_stop(self) -> list[int]:
        """The numbers it read, in its order."""
        found: list[int] = []
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                line = self._lines.get(timeout=max(0.1, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"the KCL read {found} and then nothing: {self._told()}") from None
            assert line is not None, f"the KCL died: {self._told()}"
            kind, *fields = line.split(" ")
            if kind == "stopped":
                self._process.wait(timeout=30)
                return found
            if kind == "record":
                found.append(int(fields[3]))

    def _told(self) -> str:
        return self._log.read_text()[-4000:]


class Scene:
    def __init__(self, kinesis: LocalKinesis, dynamodb_url: str, java: list[str], directory: Path) -> None:
        self.fake = kinesis.fake
        self.fake.create_stream("flights", shards=2)
        self.fake.create_stream("copies", shards=1)
        self.count = 0
        self._kinesis = kinesis
        self._dynamodb_url = dynamodb_url
        self._java = java
        self._directory = directory
        self._client = ClientConfig(region="us-east-1", endpoint_url=kinesis.endpoint_url)
        self._copied = 0

    def put(self, count: int) -> None:
        for _ in range(count):
            self.fake.put("flights", b"%d" % self.count, partition_key=f"key-{self.count}")
            self.count += 1

    def put_aggregate(self, count: int, *, hash_key: int) -> str:
        aggregate = Aggregate()
        for _ in range(count):
            assert aggregate.add("key", str(hash_key), b"%d" % self.count)
            self.count += 1
        data, partition_key, explicit_hash_key = aggregate.encode()
        return self.fake.put("flights", data, partition_key=partition_key, explicit_hash_key=explicit_hash_key)[1]

    def open_shards(self) -> list[str]:
        shards = [s for s in self.fake.shards("flights") if not s.is_closed]
        return [s.shard_id for s in sorted(shards, key=lambda s: s.hash_key_range.start)]

    def kcl(self, *, stop_after: int) -> list[int]:
        log = self._directory / f"kcl-{time.monotonic_ns()}.log"
        arguments = [self._kinesis.endpoint_url, self._dynamodb_url, "flights", TABLE, "CLIENT_VERSION_CONFIG_3X"]
        with log.open("wb") as errors:
            process = subprocess.Popen(
                [*self._java, "KclApplication", *arguments, str(stop_after)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        try:
            return Application(process, log).read_to_its_stop()
        finally:
            process.kill()
            process.wait()

    @property
    def store(self) -> DynamoDBCheckpointStore:
        config = DynamoDBConfig(region="us-east-1", endpoint_url=self._dynamodb_url)
        return DynamoDBCheckpointStore(TABLE, config=config, failover_seconds=2.0)

    def job(self, stop_at: StopPosition | None = None) -> list[int]:
        """Run a bounded job of ours; return the numbers it read."""
        with beam.Pipeline(runner="FnApiRunner", options=PipelineOptions([])) as p:
            _ = (
                p
                | ReadFromKinesis(
                    "flights",
                    starting_position=StartingPosition.trim_horizon(),
                    stop_at=stop_at or StopPosition.now(),
                    client=self._client,
                    checkpoints=self.store,
                )
                | beam.Map(_data)
                | WriteToKinesis("copies", client=self._client)
            )
        copied = [int(r.data) for r in self.fake.records("copies")]
        fresh, self._copied = copied[self._copied :], len(copied)
        return fresh


def _data(record: KinesisRecord) -> bytes:
    return record.data


@pytest.fixture
def scene(kcl_java: list[str], tmp_path: Path) -> Iterator[Scene]:
    dynamodb = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    dynamodb.start()
    try:
        host, port = dynamodb.get_host_and_port()
        # Its tables are the process's, and would be those of the test before.
        urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
        with LocalKinesis() as kinesis:
            yield Scene(kinesis, f"http://{host}:{port}", kcl_java, tmp_path)
    finally:
        dynamodb.stop()


def test_from_the_kcl_to_us_and_back_each_reads_exactly_what_the_other_did_not(scene: Scene) -> None:
    """Though shards split and merge meanwhile, and though the KCL stops inside of an aggregate."""
    scene.put(10)
    scene.put_aggregate(10, hash_key=0)
    scene.fake.split("flights", scene.open_shards()[0])
    scene.put_aggregate(10, hash_key=0)
    scene.put(10)
    by_kcl = scene.kcl(stop_after=33)
    assert len(set(by_kcl)) == 33

    by_us = scene.job()
    assert sorted(by_kcl + by_us) == list(range(40))

    scene.put(10)
    left, right = scene.open_shards()[:2]
    scene.fake.merge("flights", left, right)
    scene.put(15)
    assert sorted(scene.kcl(stop_after=25)) == list(range(40, 65))

    assert scene.job() == []


def test_a_kcl_application_takes_over_in_the_middle_of_an_aggregate(scene: Scene) -> None:
    first, second = scene.open_shards()
    scene.put(6)
    last = scene.put_aggregate(8, hash_key=0)
    scene.put(6)
    of_second = [r.sequence_number for r in scene.fake.records("flights") if r.shard_id == second]
    by_us = scene.job(StopPosition.at_sequence_numbers({first: (last, 4), second: of_second[1]}))
    assert set(by_us) & set(range(6, 14)) == {6, 7, 8, 9, 10}
    by_kcl = scene.kcl(stop_after=20 - len(by_us))
    assert sorted(by_us + by_kcl) == list(range(20))
