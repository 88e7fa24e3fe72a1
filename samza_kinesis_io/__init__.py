"""Amazon Kinesis Data Streams for Apache Beam, in Python alone."""

from samza_kinesis_io.aggregation import HashFilter
from samza_kinesis_io.checkpoints import (
    CheckpointStore,
    DynamoDBCheckpointStore,
    FileCheckpointStore,
    MemoryCheckpointStore,
)
from samza_kinesis_io.client import ClientConfig
from samza_kinesis_io.dynamodb import DynamoDBConfig
from samza_kinesis_io.errors import (
    AccessRefused,
    CheckpointError,
    ConfigurationError,
    DataLoss,
    DeliveryFailed,
    EndpointUnreachable,
    IncompleteShardList,
    InvalidArgument,
    IteratorExpired,
    KinesisIOError,
    RecordRefused,
    ResourceNotFound,
    ServiceError,
    StaleAttachment,
    StreamNotFound,
    StreamNotReady,
    StreamRecreated,
    Throttled,
    TransientServiceError,
)
from samza_kinesis_io.positions import StartingPosition, StopPosition
from samza_kinesis_io.records import KinesisRecord, OutgoingRecord
from samza_kinesis_io.sink import FailedRecord, WriteResult, WriteToKinesis, WrittenRecord
from samza_kinesis_io.source import DataLossPolicy, ReadFromKinesis
from samza_kinesis_io.watermark import ArrivalTimeWatermark, EventTimeWatermark, ProcessingTimeWatermark

__all__ = [
    "AccessRefused",
    "ArrivalTimeWatermark",
    "CheckpointError",
    "CheckpointStore",
    "ClientConfig",
    "ConfigurationError",
    "DataLoss",
    "DataLossPolicy",
    "DeliveryFailed",
    "DynamoDBCheckpointStore",
    "DynamoDBConfig",
    "EndpointUnreachable",
    "EventTimeWatermark",
    "FailedRecord",
    "FileCheckpointStore",
    "HashFilter",
    "IncompleteShardList",
    "InvalidArgument",
    "IteratorExpired",
    "KinesisIOError",
    "KinesisRecord",
    "MemoryCheckpointStore",
    "OutgoingRecord",
    "ProcessingTimeWatermark",
    "ReadFromKinesis",
    "RecordRefused",
    "ResourceNotFound",
    "ServiceError",
    "StaleAttachment",
    "StartingPosition",
    "StopPosition",
    "StreamNotFound",
    "StreamNotReady",
    "StreamRecreated",
    "Throttled",
    "TransientServiceError",
    "WriteResult",
    "WriteToKinesis",
    "WrittenRecord",
]
