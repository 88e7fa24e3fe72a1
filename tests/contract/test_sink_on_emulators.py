"""What `WriteToKinesis` wrote, as others see it: kept by a service of other authors, read back by unmodified boto3."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from contract.kinesis import Kinesis
from contract.targets import OverHttp

from samza_kinesis_io.aggregation import deaggregate, is_aggregated
from samza_kinesis_io.client import ClientConfig
from samza_kinesis_io.records import KinesisRecord
from samza_kinesis_io.sink import WriteToKinesis

pytestmark = pytest.mark.targets("LocalKinesis", "kinesis-local")

SHARDS = 4
PARTS = 8
KEYS_PER_PART = 5
#: In all, kept small: an emulator takes no more than a shard does.
RECORDS = 2_800


def _records(part: int) -> Iterator[tuple[str, int]]:
    for number in range(RECORDS // PARTS):
        yield f"é{part}-{number % KEYS_PER_PART}", number


def _key(element: tuple[str, int]) -> str:
    return element[0]


def _serialize(element: tuple[str, int]) -> bytes:
    return b"%s %d %s" % (element[0].encode(), element[1], b"x" * 150)


def _read_back(kinesis: Kinesis, stream: str) -> list[KinesisRecord]:
    """Return every record of the stream, shard by shard, aggregates as they are."""
    return [
        KinesisRecord(r["Data"], r["SequenceNumber"], r["PartitionKey"], shard_id=shard_id)
        for shard_id in kinesis.shard_ids(stream)
        for r in kinesis.read(stream, shard_id)
    ]


def _user_records(record: KinesisRecord) -> list[KinesisRecord]:
    aggregate = deaggregate(record)
    return [record] if aggregate is None else aggregate.records


@pytest.mark.parametrize(
    ("ordered", "aggregate"),
    [(False, False), (True, False), (False, True), (True, True)],
    ids=["plain", "ordered", "aggregated", "ordered and aggregated"],
)
def test_what_was_written_is_read_back_and_decoded(kinesis: Kinesis, ordered: bool, aggregate: bool) -> None:
    """Each record once and with its key; those of a key in order, where that was asked for."""
    assert isinstance(kinesis.target, OverHttp)
    stream = kinesis.stream(SHARDS)
    with beam.Pipeline(runner="FnApiRunner", options=PipelineOptions(["--direct_num_workers=1"])) as p:
        (
            p
            | beam.Create(range(PARTS))
            | beam.FlatMap(_records)
            | WriteToKinesis(
                stream,
                partition_key=_key,
                serializer=_serialize,
                ordered=ordered,
                aggregate=aggregate,
                client=ClientConfig(region="us-east-1", endpoint_url=kinesis.target.endpoint_url),
            )
        )

    records = _read_back(kinesis, stream)
    assert all(is_aggregated(r.data) == aggregate for r in records)
    users = [user for record in records for user in _user_records(record)]
    numbers: defaultdict[str | None, list[int]] = defaultdict(list)
    for user in users:
        key, number, _ = user.data.split(b" ")
        assert user.partition_key == key.decode()
        numbers[user.partition_key].append(int(number))
    expected = [element for part in range(PARTS) for element in _records(part)]
    assert sorted((key, n) for key, ns in numbers.items() for n in ns) == sorted(expected)
    if ordered:
        assert all(ns == sorted(ns) for ns in numbers.values())
