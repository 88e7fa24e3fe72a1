"""The way to Kinesis: the `KinesisClient` protocol and its implementation on boto3.

The only file of the package that knows boto3.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from samza_kinesis_io.positions import Position
from samza_kinesis_io.records import KinesisRecord
from samza_kinesis_io.shards import ChildShard, Shard


@dataclass(frozen=True, slots=True)
class StreamId:
    """A stream by name or by ARN. With an ARN its account and region are part of the identity."""

    name: str
    arn: str | None = None

    @classmethod
    def parse(cls, value: str, option: str = "stream") -> StreamId:
        """Return the stream that a user's string names.

        Raises:
            ConfigurationError: empty, or neither a stream name (1-128 of a-z A-Z 0-9 _ . -) nor a stream ARN.
        """
        raise NotImplementedError

    @property
    def region(self) -> str | None:
        """The ARN's region; None for a name."""
        return self.arn.split(":")[3] if self.arn else None


class StreamStatus(enum.Enum):
    CREATING = "CREATING"
    DELETING = "DELETING"
    ACTIVE = "ACTIVE"
    UPDATING = "UPDATING"


@dataclass(frozen=True, slots=True)
class StreamDescription:
    """What DescribeStreamSummary says."""

    name: str
    arn: str
    status: StreamStatus
    retention_hours: int
    creation_seconds: float
    open_shard_count: int
    max_record_bytes: int
    key_based_distribution: bool = True
    """False on streams with automatic distribution (RecordDistributionStrategy AUTO)."""


class ShardFilterKind(enum.Enum):
    AT_LATEST = "AT_LATEST"
    AT_TRIM_HORIZON = "AT_TRIM_HORIZON"
    FROM_TRIM_HORIZON = "FROM_TRIM_HORIZON"
    AT_TIMESTAMP = "AT_TIMESTAMP"
    FROM_TIMESTAMP = "FROM_TIMESTAMP"


@dataclass(frozen=True, slots=True)
class ShardFilter:
    kind: ShardFilterKind
    timestamp_micros: int | None = None


class RecordsAnswer:
    """The answer to one GetRecords.

    Attributes:
        records: As decoded; sub_sequence_number, explicit_hash_key, shard_id and stream are not filled in yet.
        next_shard_iterator: None: the shard is closed and this was its last answer (if the children say so too).
        millis_behind_latest: None where the service did not say.
        child_shards: Announced with a shard's last answer; else empty.
        server_time_seconds: The service's own time of the answer, in seconds since the epoch, whole seconds
            rounded *down* as the Date header gives them; the local clock where there is no such header.
        size_bytes: Sum of the records' data.
    """

    __slots__ = ("records", "next_shard_iterator", "millis_behind_latest", "child_shards", "server_time_seconds", "size_bytes")

    def __init__(
        self,
        *,
        records: list[KinesisRecord],
        next_shard_iterator: str | None,
        millis_behind_latest: int | None,
        child_shards: tuple[ChildShard, ...],
        server_time_seconds: float,
        size_bytes: int,
    ) -> None:
        self.records = records
        self.next_shard_iterator = next_shard_iterator
        self.millis_behind_latest = millis_behind_latest
        self.child_shards = child_shards
        self.server_time_seconds = server_time_seconds
        self.size_bytes = size_bytes


@dataclass(frozen=True, slots=True)
class PutEntry:
    """One record of a PutRecords request, checked already. `partition_key` is None on AUTO streams only."""

    data: bytes
    partition_key: str | None
    explicit_hash_key: str | None = None

    @property
    def size_bytes(self) -> int:
        """What counts against the limits of a record and a request: the data and the partition key in UTF-8."""
        return len(self.data) + (len(self.partition_key.encode()) if self.partition_key is not None else 0)


@dataclass(frozen=True, slots=True)
class PutOutcome:
    """What became of one entry: either shard and sequence number, or an error code and message."""

    shard_id: str | None
    sequence_number: str | None
    error_code: str | None = None
    error_message: str | None = None


class KinesisClient(Protocol):
    """The calls the package makes; each is one request (ListShards: as many as there are pages).

    Nothing is retried here and nothing is paced; every failure is raised as one of `samza_kinesis_io.errors`.
    Safe to call from many threads.
    """

    def describe_stream(self, stream: StreamId) -> StreamDescription: ...

    def list_shards(self, stream: StreamId, shard_filter: ShardFilter | None = None) -> list[Shard]:
        """Return every page. A page's token that expired starts the listing again."""
        ...

    def get_shard_iterator(self, stream: StreamId, shard_id: str, position: Position) -> str:
        """Return an iterator at `position`.

        AFTER_SEQUENCE_NUMBER with a sub-sequence number short of `WHOLE_RECORD` becomes an iterator AT the
        record; the caller skips what `position.excludes`.
        """
        ...

    def get_records(self, stream: StreamId, shard_iterator: str, limit: int) -> RecordsAnswer: ...

    def put_records(self, stream: StreamId, entries: Sequence[PutEntry]) -> list[PutOutcome]:
        """Return one outcome per entry, in order."""
        ...

    def close(self) -> None:
        """Close the connections. Idempotent; later calls fail."""
        ...


class ClientFactory(Protocol):
    """What `client=` takes: something picklable and hashable that opens a client on the worker.

    Equal factories share one client in a process, so equality must mean "the same account and endpoint".
    """

    def connect(self, stream: StreamId | None = None) -> KinesisClient:
        """Open a client for `stream` (its ARN's region is used), or for the configured region."""
        ...
