"""`FakeKinesis` as a `samza_kinesis_io.client.KinesisClient`, without HTTP and boto3."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from samza_kinesis_io.client import (
    PutEntry,
    PutOutcome,
    RecordsAnswer,
    ShardFilter,
    StreamDescription,
    StreamId,
    StreamStatus,
)
from samza_kinesis_io.errors import ServiceError, StreamNotFound, TransientServiceError, classify
from samza_kinesis_io.limits import KIB
from samza_kinesis_io.positions import WHOLE_RECORD, Position, PositionKind
from samza_kinesis_io.shards import ChildShard, HashKeyRange, Shard
from samza_kinesis_io.testing.faults import DroppedConnection, FakeServiceError
from samza_kinesis_io.testing.streams import decode_records

if TYPE_CHECKING:
    from samza_kinesis_io.testing.fake import FakeKinesis
    from samza_kinesis_io.testing.service import Answer, EncodedRecords

#: Operations that name a stream and nothing in it: what they don't find is the stream.
_OF_THE_STREAM = frozenset({"DescribeStreamSummary", "ListShards", "PutRecords"})


class FakeKinesisClient:
    """The calls of the package on a fake service. Errors are classified as those of the service are."""

    def __init__(self, fake: FakeKinesis) -> None:
        self._fake = fake
        self._closed = False

    def describe_stream(self, stream: StreamId) -> StreamDescription:
        found = self._call(stream, "DescribeStreamSummary", _named(stream))["StreamDescriptionSummary"]
        return StreamDescription(
            name=found["StreamName"],
            arn=found["StreamARN"],
            status=StreamStatus(found["StreamStatus"]),
            retention_hours=found["RetentionPeriodHours"],
            creation_seconds=found["StreamCreationTimestamp"],
            open_shard_count=found["OpenShardCount"],
            max_record_bytes=found["MaxRecordSizeInKiB"] * KIB,
            key_based_distribution=found["RecordDistributionStrategy"] != "AUTO",
        )

    def list_shards(self, stream: StreamId, shard_filter: ShardFilter | None = None) -> list[Shard]:
        first = _named(stream)
        if shard_filter is not None:
            first["ShardFilter"] = {"Type": shard_filter.kind.value}
            if shard_filter.timestamp_micros is not None:
                first["ShardFilter"]["Timestamp"] = shard_filter.timestamp_micros / 1e6
        while True:
            shards: list[Shard] = []
            params = first
            try:
                while True:
                    page = self._call(stream, "ListShards", params)
                    shards += map(_shard, page["Shards"])
                    if "NextToken" not in page:
                        return shards
                    params = {"NextToken": page["NextToken"]}
            except ServiceError as error:
                if error.code != "ExpiredNextTokenException":
                    raise

    def get_shard_iterator(self, stream: StreamId, shard_id: str, position: Position) -> str:
        params = {**_named(stream), "ShardId": shard_id, "ShardIteratorType": position.kind.value}
        if position.is_sequence:
            params["StartingSequenceNumber"] = str(position.sequence_number)
            if position.kind is PositionKind.AFTER_SEQUENCE_NUMBER and position.sub_sequence_number < WHOLE_RECORD:
                params["ShardIteratorType"] = PositionKind.AT_SEQUENCE_NUMBER.value
        elif position.kind is PositionKind.AT_TIMESTAMP:
            params["Timestamp"] = position.timestamp_micros / 1e6
        iterator: str = self._call(stream, "GetShardIterator", params)["ShardIterator"]
        return iterator

    def get_records(self, stream: StreamId, shard_iterator: str, limit: int) -> RecordsAnswer:
        params: dict[str, Any] = {"ShardIterator": shard_iterator, "Limit": limit}
        if stream.arn is not None:
            params["StreamARN"] = stream.arn
        answer = self._perform(stream, "GetRecords", params)
        assert not isinstance(answer, dict)
        records = decode_records(answer.pieces)
        return RecordsAnswer(
            records=records,
            next_shard_iterator=answer.rest.get("NextShardIterator"),
            millis_behind_latest=answer.rest.get("MillisBehindLatest"),
            child_shards=tuple(
                ChildShard(child["ShardId"], tuple(child["ParentShards"]), _range(child["HashKeyRange"]))
                for child in answer.rest.get("ChildShards", ())
            ),
            # As a Date header has it.
            server_time_seconds=float(math.floor(self._fake.clock.now_seconds())),
            size_bytes=sum(len(record.data) for record in records),
        )

    def put_records(self, stream: StreamId, entries: Sequence[PutEntry]) -> list[PutOutcome]:
        records = []
        for entry in entries:
            record: dict[str, Any] = {"Data": entry.data}
            if entry.partition_key is not None:
                record["PartitionKey"] = entry.partition_key
            if entry.explicit_hash_key is not None:
                record["ExplicitHashKey"] = entry.explicit_hash_key
            records.append(record)
        answer = self._call(stream, "PutRecords", {**_named(stream), "Records": records})
        return [
            PutOutcome(
                shard_id=outcome.get("ShardId"),
                sequence_number=outcome.get("SequenceNumber"),
                error_code=outcome.get("ErrorCode"),
                error_message=outcome.get("ErrorMessage"),
            )
            for outcome in answer["Records"]
        ]

    def close(self) -> None:
        self._closed = True

    def _call(self, stream: StreamId, operation: str, params: dict[str, Any]) -> Answer:
        answer = self._perform(stream, operation, params)
        assert isinstance(answer, dict)
        return answer

    def _perform(self, stream: StreamId, operation: str, params: dict[str, Any]) -> Answer | EncodedRecords:
        if self._closed:
            raise RuntimeError(f"{operation} was called on a closed client")
        try:
            plan = self._fake.arrive(operation, params)
            self._fake.clock.sleep(plan.delay_seconds)
            return self._fake.perform(operation, params, plan)
        except FakeServiceError as error:
            raise _classified(error, operation, stream, self._fake.region) from error
        except DroppedConnection as error:
            raise TransientServiceError(
                f"{operation} for stream {stream.name} failed: {error}",
                operation=operation,
                code="ConnectionClosedError",
                service_message=str(error),
            ) from error


@dataclass(frozen=True)
class FakeClientFactory:
    """What `client=` takes: clients of one `FakeKinesis`, for pipelines whose workers are threads of this process.

    Two factories of the same fake are equal. Unpickled in another process it fails, naming `LocalKinesis`.
    """

    fake: FakeKinesis

    def connect(self, stream: StreamId | None = None) -> FakeKinesisClient:
        """Open a client; the stream makes no difference, since a fake is one region of one account."""
        return FakeKinesisClient(self.fake)


def _classified(error: FakeServiceError, operation: str, stream: StreamId, region: str) -> ServiceError:
    classified = classify(
        operation=operation,
        code=error.code,
        message=error.message,
        status=error.status,
        subject=f"stream {stream.name} in {region}",
    )
    if classified.code == "ResourceNotFoundException" and operation in _OF_THE_STREAM:
        return StreamNotFound(
            classified.args[0],
            operation=operation,
            code=classified.code,
            service_message=classified.service_message,
        )
    return classified


def _named(stream: StreamId) -> dict[str, Any]:
    return {"StreamARN": stream.arn} if stream.arn is not None else {"StreamName": stream.name}


def _range(answer: Answer) -> HashKeyRange:
    return HashKeyRange(int(answer["StartingHashKey"]), int(answer["EndingHashKey"]))


def _shard(answer: Answer) -> Shard:
    numbers = answer["SequenceNumberRange"]
    ending = numbers.get("EndingSequenceNumber")
    return Shard(
        shard_id=answer["ShardId"],
        hash_key_range=_range(answer["HashKeyRange"]),
        parent_shard_id=answer.get("ParentShardId"),
        adjacent_parent_shard_id=answer.get("AdjacentParentShardId"),
        starting_sequence_number=int(numbers["StartingSequenceNumber"]),
        ending_sequence_number=None if ending is None else int(ending),
    )
