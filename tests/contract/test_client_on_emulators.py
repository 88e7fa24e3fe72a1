"""`Boto3KinesisClient` over HTTP: against our own server, and against one that other people wrote."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from apache_beam.utils.timestamp import Timestamp
from contract.kinesis import Kinesis
from contract.targets import OverHttp

from samza_kinesis_io.client import (
    Boto3KinesisClient,
    ClientConfig,
    PutEntry,
    RecordsAnswer,
    ShardFilter,
    ShardFilterKind,
    StreamId,
    StreamStatus,
)
from samza_kinesis_io.errors import InvalidArgument, ResourceNotFound, StreamNotFound
from samza_kinesis_io.positions import Position
from samza_kinesis_io.shards import children_of, holes

pytestmark = pytest.mark.targets("LocalKinesis", "kinesis-local")


@pytest.fixture
def client(kinesis: Kinesis) -> Iterator[Boto3KinesisClient]:
    assert isinstance(kinesis.target, OverHttp)
    client = ClientConfig(region="us-east-1", endpoint_url=kinesis.target.endpoint_url).connect()
    yield client
    client.close()


def read_to_the_end(client: Boto3KinesisClient, stream: StreamId, shard_id: str, position: Position) -> RecordsAnswer:
    """Return the shard's last answer with every record that came before it."""
    iterator: str | None = client.get_shard_iterator(stream, shard_id, position)
    records = []
    for _ in range(20):
        assert iterator is not None
        answer = client.get_records(stream, iterator, 3)
        records += answer.records
        iterator = answer.next_shard_iterator
        if iterator is None:
            answer.records = records
            return answer
    raise AssertionError("the shard does not end")


def test_a_stream_is_described_by_name_and_by_arn(kinesis: Kinesis, client: Boto3KinesisClient) -> None:
    name = kinesis.stream(2)
    by_name = client.describe_stream(StreamId(name))
    assert (by_name.name, by_name.status, by_name.open_shard_count) == (name, StreamStatus.ACTIVE, 2)
    assert (by_name.retention_hours, by_name.max_record_bytes) == (24, 1024 * 1024)
    assert by_name.key_based_distribution
    assert client.describe_stream(StreamId.parse(by_name.arn)) == by_name


def test_shards_are_listed_and_filtered(kinesis: Kinesis, client: Boto3KinesisClient) -> None:
    name = kinesis.stream(2)
    kinesis.split(name, kinesis.shards(name)[0])
    stream = StreamId(name)
    every = client.list_shards(stream)
    opened = client.list_shards(stream, ShardFilter(ShardFilterKind.AT_LATEST))
    assert len(every) == 4
    assert {s.shard_id for s in opened} == {s.shard_id for s in every if not s.is_closed}
    assert holes(opened) == ()


def test_a_shard_is_read_to_its_end_and_names_its_children(kinesis: Kinesis, client: Boto3KinesisClient) -> None:
    name = kinesis.stream()
    stream = StreamId(name)
    (root,) = client.list_shards(stream)
    written = client.put_records(stream, [PutEntry(b"%d" % n, f"key-{n}") for n in range(8)])
    kinesis.split(name, kinesis.shards(name)[0])
    last = read_to_the_end(client, stream, root.shard_id, Position.trim_horizon())
    assert [r.data for r in last.records] == [b"%d" % n for n in range(8)]
    assert [r.sequence_number for r in last.records] == [w.sequence_number for w in written]
    assert [r.partition_key for r in last.records] == [f"key-{n}" for n in range(8)]
    assert sorted(last.child_shards, key=lambda c: c.shard_id) == list(
        children_of(root.shard_id, client.list_shards(stream))
    )
    assert last.millis_behind_latest == 0


def test_reading_goes_on_from_every_kind_of_position(kinesis: Kinesis, client: Boto3KinesisClient) -> None:
    name = kinesis.stream()
    stream = StreamId(name)
    (shard,) = client.list_shards(stream)
    for data in (b"1", b"2", b"3"):
        client.put_records(stream, [PutEntry(data, "key")])
        kinesis.let_pass(0.02)
    first = client.get_records(stream, client.get_shard_iterator(stream, shard.shard_id, Position.trim_horizon()), 10)
    second = first.records[1]
    number = int(second.sequence_number)
    for position, expected in {
        Position.at(number): [b"2", b"3"],
        Position.after(number): [b"3"],
        Position.after(number, 4): [b"2", b"3"],
        Position.at_timestamp(second.approximate_arrival_timestamp): [b"2", b"3"],
        Position.at_timestamp(Timestamp(micros=second.approximate_arrival_micros + 1000)): [b"3"],
    }.items():
        answer = client.get_records(stream, client.get_shard_iterator(stream, shard.shard_id, position), 10)
        assert [r.data for r in answer.records] == expected, str(position)


def test_the_servers_time_is_near_the_records(kinesis: Kinesis, client: Boto3KinesisClient) -> None:
    stream = StreamId(kinesis.stream())
    (shard,) = client.list_shards(stream)
    client.put_records(stream, [PutEntry(b"x", "key")])
    answer = client.get_records(stream, client.get_shard_iterator(stream, shard.shard_id, Position.trim_horizon()), 1)
    arrival = answer.records[0].approximate_arrival_seconds
    assert arrival - 1 <= answer.server_time_seconds <= arrival + 60
    assert answer.size_bytes == 1


def test_what_is_missing_is_named(kinesis: Kinesis, client: Boto3KinesisClient) -> None:
    nowhere = StreamId("contract-nowhere")
    for call in (client.describe_stream, client.list_shards, lambda s: client.put_records(s, [PutEntry(b"x", "k")])):
        with pytest.raises(StreamNotFound, match="contract-nowhere does not exist in region us-east-1"):
            call(nowhere)
    stream = StreamId(kinesis.stream())
    with pytest.raises(ResourceNotFound, match="shardId-000000000007"):
        client.get_shard_iterator(stream, "shardId-000000000007", Position.trim_horizon())
    with pytest.raises(InvalidArgument):
        client.put_records(stream, [PutEntry(b"x", "k" * 257)])
