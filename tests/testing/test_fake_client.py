"""FakeKinesisClient: the package's own protocol on a fake service."""

from __future__ import annotations

import pickle

import pytest
from apache_beam.utils.timestamp import Timestamp

from samza_kinesis_io.client import (
    ClientFactory,
    KinesisClient,
    PutEntry,
    ShardFilter,
    ShardFilterKind,
    StreamId,
    StreamStatus,
)
from samza_kinesis_io.errors import (
    AccessRefused,
    InvalidArgument,
    IteratorExpired,
    ResourceNotFound,
    StreamNotFound,
    StreamNotReady,
    Throttled,
    TransientServiceError,
)
from samza_kinesis_io.positions import Position
from samza_kinesis_io.testing import FakeClientFactory, FakeKinesis, SimulatedClock

START = 1_700_000_000.0
S = StreamId("s")
SHARD = "shardId-000000000000"


@pytest.fixture
def clock() -> SimulatedClock:
    return SimulatedClock(START)


@pytest.fixture
def fake(clock: SimulatedClock) -> FakeKinesis:
    fake = FakeKinesis(clock=clock)
    fake.create_stream("s", shards=2)
    return fake


@pytest.fixture
def client(fake: FakeKinesis) -> KinesisClient:
    return fake.factory().connect(S)


def test_a_factory_pickles_and_equal_factories_share_a_fake(fake: FakeKinesis) -> None:
    factory: ClientFactory = fake.factory()
    again = pickle.loads(pickle.dumps(factory))
    assert again == factory == FakeClientFactory(fake)
    assert hash(again) == hash(factory)
    assert again.fake is fake
    assert FakeKinesis().factory() != factory


def test_a_stream_is_described(client: KinesisClient) -> None:
    found = client.describe_stream(StreamId("s", "arn:aws:kinesis:us-east-1:123456789012:stream/s"))
    assert (found.name, found.status, found.open_shard_count) == ("s", StreamStatus.ACTIVE, 2)
    assert (found.creation_seconds, found.retention_hours, found.max_record_bytes) == (START, 24, 1 << 20)
    assert found.key_based_distribution


def test_every_page_of_shards_is_listed(fake: FakeKinesis, client: KinesisClient) -> None:
    fake.create_stream("many", shards=2500)
    assert client.list_shards(StreamId("many")) == fake.shards("many")
    assert fake.calls["ListShards"] == 3


def test_a_listing_whose_token_expired_begins_again(fake: FakeKinesis, client: KinesisClient) -> None:
    fake.create_stream("many", shards=1500)
    fake.faults.delay("ListShards", 301, after=1)
    assert len(client.list_shards(StreamId("many"))) == 1500
    assert fake.calls["ListShards"] == 4


def test_shards_are_filtered(fake: FakeKinesis, client: KinesisClient, clock: SimulatedClock) -> None:
    clock.advance(10)
    fake.merge("s", SHARD, "shardId-000000000001")
    at = ShardFilter(ShardFilterKind.AT_TIMESTAMP, timestamp_micros=int((START + 9.999) * 1e6))
    assert len(client.list_shards(S, at)) == 2
    assert len(client.list_shards(S, ShardFilter(ShardFilterKind.AT_LATEST))) == 1


def test_records_are_read_from_a_position(fake: FakeKinesis, client: KinesisClient, clock: SimulatedClock) -> None:
    numbers = []
    for i in range(3):
        numbers.append(int(fake.put("s", b"%d" % i, shard_id=SHARD)[1]))
        clock.advance(0.5)

    def read(position: Position) -> list[bytes]:
        answer = client.get_records(S, client.get_shard_iterator(S, SHARD, position), 10_000)
        return [r.data for r in answer.records]

    assert read(Position.trim_horizon()) == [b"0", b"1", b"2"]
    assert read(Position.at_timestamp(Timestamp(START + 0.5))) == [b"1", b"2"]
    assert read(Position.at_timestamp(Timestamp(START + 0.501))) == [b"2"]
    assert read(Position.at(numbers[1])) == [b"1", b"2"]
    assert read(Position.after(numbers[1])) == [b"2"]
    # Its later sub-records are still to be read: the record comes again and the caller skips.
    assert read(Position.after(numbers[1], 3)) == [b"1", b"2"]


def test_an_answer_carries_lag_size_children_and_the_services_time(
    fake: FakeKinesis, client: KinesisClient, clock: SimulatedClock
) -> None:
    fake.put("s", b"abc", shard_id=SHARD)
    fake.put("s", b"de", shard_id=SHARD)
    fake.split("s", SHARD)
    clock.advance(1.75)
    answer = client.get_records(S, client.get_shard_iterator(S, SHARD, Position.trim_horizon()), 1)
    assert answer.millis_behind_latest == 1750
    assert answer.server_time_seconds == START + 1
    assert answer.size_bytes == 3
    assert answer.child_shards == ()
    assert answer.next_shard_iterator is not None
    last = client.get_records(S, answer.next_shard_iterator, 1)
    assert last.next_shard_iterator is None
    assert [(c.shard_id, c.parents) for c in last.child_shards] == [
        ("shardId-000000000002", (SHARD,)),
        ("shardId-000000000003", (SHARD,)),
    ]


def test_what_became_of_each_entry_is_said_in_order(fake: FakeKinesis, client: KinesisClient) -> None:
    fake.faults.fail_entries(indexes=[1], code="InternalFailure", message="no")
    good, bad, other = client.put_records(S, [PutEntry(b"0", "k"), PutEntry(b"1", "k"), PutEntry(b"2", "k", "0")])
    assert (bad.error_code, bad.error_message, bad.sequence_number) == ("InternalFailure", "no", None)
    assert other.shard_id == SHARD
    assert {good.sequence_number, other.sequence_number} == {r.sequence_number for r in fake.records("s")}


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("ProvisionedThroughputExceededException", Throttled),
        ("InternalFailureException", TransientServiceError),
        ("ExpiredIteratorException", IteratorExpired),
        ("KMSDisabledException", AccessRefused),
        ("ResourceNotFoundException", ResourceNotFound),
    ],
)
def test_errors_are_classified(fake: FakeKinesis, client: KinesisClient, code: str, kind: type[Exception]) -> None:
    iterator = client.get_shard_iterator(S, SHARD, Position.trim_horizon())
    fake.faults.fail("GetRecords", code)
    with pytest.raises(kind, match="GetRecords for stream s in us-east-1 failed") as caught:
        client.get_records(S, iterator, 1)
    assert type(caught.value) is kind


def test_a_stream_that_is_not_there_is_told_from_a_shard_that_is_not(client: KinesisClient) -> None:
    none = StreamId("none")
    for asked in (
        lambda: client.describe_stream(none),
        lambda: client.list_shards(none),
        lambda: client.put_records(none, [PutEntry(b"", "k")]),
    ):
        with pytest.raises(StreamNotFound):
            asked()
    with pytest.raises(ResourceNotFound) as caught:
        client.get_shard_iterator(S, "shardId-000000000009", Position.trim_horizon())
    assert type(caught.value) is ResourceNotFound


def test_a_dropped_connection_is_transient(fake: FakeKinesis, client: KinesisClient) -> None:
    fake.faults.drop_connection("PutRecords", moment="after")
    with pytest.raises(TransientServiceError) as caught:
        client.put_records(S, [PutEntry(b"", "k")])
    assert caught.value.code == "ConnectionClosedError"
    assert len(fake.records("s")) == 1


def test_a_stream_being_made_is_not_ready(clock: SimulatedClock) -> None:
    fake = FakeKinesis(clock=clock, transition_seconds=1)
    fake.call("CreateStream", {"StreamName": "s", "ShardCount": 1})
    with pytest.raises(StreamNotReady):
        fake.factory().connect().list_shards(S)


def test_a_value_the_service_refuses(client: KinesisClient) -> None:
    with pytest.raises(InvalidArgument, match="Invalid ShardIterator"):
        client.get_records(S, "x", 1)


def test_a_closed_client_is_not_called_again(client: KinesisClient) -> None:
    client.close()
    client.close()
    with pytest.raises(RuntimeError, match="closed client"):
        client.list_shards(S)
