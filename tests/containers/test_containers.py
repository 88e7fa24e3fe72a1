"""The connector against emulators by other people, in the containers that users can start too."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import boto3
import pytest
from portable import pipelines
from portable.pipelines import FLIGHTS, SEEN, Read

from samza_kinesis_io.checkpoints import DynamoDBCheckpointStore, ShardCheckpoint
from samza_kinesis_io.dynamodb import DynamoDBConfig
from samza_kinesis_io.positions import Position
from tiers import missing

if TYPE_CHECKING:
    from samza_kinesis_io.testing.containers import DynaliteContainer, KinesisLocalContainer

#: What the images are built on; `.ci/docker-base` makes one from local files.
BASE_IMAGE = {"base_image": os.environ["NODE_BASE_IMAGE"]} if "NODE_BASE_IMAGE" in os.environ else {}


def test_without_the_extra_the_error_says_which_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "testcontainers.core.container", None)
    monkeypatch.delitem(sys.modules, "samza_kinesis_io.testing.containers", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'samza-kinesis-io\[containers\]'"):
        importlib.import_module("samza_kinesis_io.testing.containers")


@pytest.fixture(scope="module")
def _docker() -> None:
    docker = pytest.importorskip("docker", reason="pip install 'samza-kinesis-io[containers]'")
    try:
        docker.from_env().ping()
    except docker.errors.DockerException as error:
        missing("a Docker daemon", f"containers run in it ({error})", "start one, or use .ci/with-docker")


@pytest.fixture(scope="module")
def kinesis(_docker: None) -> Iterator[KinesisLocalContainer]:
    from samza_kinesis_io.testing.containers import KinesisLocalContainer

    with KinesisLocalContainer(**BASE_IMAGE) as container:
        yield container


@pytest.fixture(scope="module")
def dynalite(_docker: None) -> Iterator[DynaliteContainer]:
    from samza_kinesis_io.testing.containers import DynaliteContainer

    with DynaliteContainer(**BASE_IMAGE) as container:
        yield container


class Stream:
    """FLIGHTS and SEEN in the emulator, seen through nothing but boto3."""

    def __init__(self, kinesis: KinesisLocalContainer, shards: int) -> None:
        self.endpoint_url = kinesis.endpoint_url
        self._client: Any = boto3.client("kinesis", **kinesis.client_kwargs())
        self.count = 0
        for name, number in ((FLIGHTS, shards), (SEEN, 1)):
            self._client.create_stream(StreamName=name, ShardCount=number)
            self._until_active(name)

    def delete(self) -> None:
        for name in (FLIGHTS, SEEN):
            self._client.delete_stream(StreamName=name)
            self._client.get_waiter("stream_not_exists").wait(StreamName=name, WaiterConfig={"Delay": 1})

    def _until_active(self, name: str) -> None:
        self._client.get_waiter("stream_exists").wait(StreamName=name, WaiterConfig={"Delay": 1})

    def put(self, count: int) -> None:
        entries = [
            {"Data": b"%d,%d" % (n, time.monotonic_ns()), "PartitionKey": f"key-{n}"}
            for n in range(self.count, self.count + count)
        ]
        assert self._client.put_records(StreamName=FLIGHTS, Records=entries)["FailedRecordCount"] == 0
        self.count += count

    def open_shards(self) -> list[dict[str, Any]]:
        shards = self._client.list_shards(StreamName=FLIGHTS)["Shards"]
        is_open = [s for s in shards if "EndingSequenceNumber" not in s["SequenceNumberRange"]]
        return sorted(is_open, key=lambda s: int(s["HashKeyRange"]["StartingHashKey"]))

    def split(self) -> None:
        shard = self.open_shards()[0]
        start, end = (int(shard["HashKeyRange"][k]) for k in ("StartingHashKey", "EndingHashKey"))
        self._client.split_shard(
            StreamName=FLIGHTS, ShardToSplit=shard["ShardId"], NewStartingHashKey=str((start + end) // 2)
        )
        self._until_active(FLIGHTS)

    def merge(self) -> None:
        left, right = self.open_shards()[-2:]
        self._client.merge_shards(
            StreamName=FLIGHTS, ShardToMerge=left["ShardId"], AdjacentShardToMerge=right["ShardId"]
        )
        self._until_active(FLIGHTS)

    def run(self, stop_at: float) -> None:
        arguments = ["--runner=FnApiRunner"]
        pipelines.build("copy", self.endpoint_url, Read(stop_at=stop_at), arguments).run().wait_until_finish()

    def check_each_seen_once(self) -> None:
        shard = self._client.list_shards(StreamName=SEEN)["Shards"][0]["ShardId"]
        iterator = self._client.get_shard_iterator(StreamName=SEEN, ShardId=shard, ShardIteratorType="TRIM_HORIZON")[
            "ShardIterator"
        ]
        seen: list[int] = []
        while records := (answer := self._client.get_records(ShardIterator=iterator))["Records"]:
            seen += [int(record["Data"].split(b",")[0]) for record in records]
            iterator = answer["NextShardIterator"]
        assert Counter(seen) == Counter(range(self.count))


@pytest.fixture
def make_stream(kinesis: KinesisLocalContainer) -> Iterator[Callable[[int], Stream]]:
    made: list[Stream] = []

    def make(shards: int) -> Stream:
        made.append(Stream(kinesis, shards))
        return made[-1]

    yield make
    for stream in made:
        stream.delete()


@pytest.mark.containers
def test_what_is_written_to_kinesis_local_is_read_from_it(make_stream: Callable[[int], Stream]) -> None:
    stream = make_stream(3)
    stream.put(300)
    stream.run(stop_at=time.time() + 1)
    stream.check_each_seen_once()


@pytest.mark.containers
def test_splits_and_merges_on_kinesis_local_before_a_read(make_stream: Callable[[int], Stream]) -> None:
    stream = make_stream(3)
    stream.put(100)
    stream.split()
    stream.put(100)
    stream.merge()
    stream.put(100)
    stream.split()
    stream.put(100)
    stream.run(stop_at=time.time() + 1)
    stream.check_each_seen_once()


@pytest.mark.containers
def test_splits_and_merges_on_kinesis_local_during_a_read(make_stream: Callable[[int], Stream]) -> None:
    import threading

    stream = make_stream(3)
    stream.put(100)

    def reshard() -> None:
        for change in (stream.split, stream.merge, stream.split):
            threading.Event().wait(1.5)
            change()
            stream.put(100)

    changing = threading.Thread(target=reshard)
    changing.start()
    stream.run(stop_at=time.time() + 15)
    changing.join()
    stream.check_each_seen_once()


@pytest.mark.containers
def test_checkpoints_written_to_dynalite_are_loaded_from_it(dynalite: DynaliteContainer) -> None:
    config = DynamoDBConfig(region="us-east-1", endpoint_url=dynalite.endpoint_url)
    rows = [
        ShardCheckpoint("shardId-000000000000", Position.after(10**55)),
        ShardCheckpoint("shardId-000000000001", None, ended=True),
    ]
    DynamoDBCheckpointStore("leases", config=config).save("flights", rows)
    loaded = DynamoDBCheckpointStore("leases", config=config).load("flights")
    assert loaded["shardId-000000000000"].position == Position.after(10**55)
    assert loaded["shardId-000000000001"].ended
