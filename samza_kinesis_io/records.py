"""Records: what is read (`KinesisRecord`), what is to be written (`OutgoingRecord`), what came of it."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from apache_beam import coders
from apache_beam.utils.timestamp import Timestamp


class KinesisRecord(
    msgspec.Struct,
    frozen=True,
    gc=False,
    rename={
        "data": "Data",
        "sequence_number": "SequenceNumber",
        "partition_key": "PartitionKey",
        "approximate_arrival_seconds": "ApproximateArrivalTimestamp",
        "encryption_type": "EncryptionType",
    },
):
    """One record of a stream, or one user record taken out of an aggregate.

    Decoded straight from the service's answer; the last four attributes are filled in by the consumer.

    Attributes:
        data: The payload.
        sequence_number: Decimal digits; compare as integers. Unique within the shard; all user records of an
            aggregate share it.
        partition_key: None on streams with automatic distribution whose producer gave none.
        approximate_arrival_seconds: When the service took the record, in seconds since the epoch, as it
            was sent; see `approximate_arrival_timestamp`.
        encryption_type: "NONE", "KMS", or None where the service does not say.
        sub_sequence_number: The place in the aggregate, from 0; 0 for a plain record.
        explicit_hash_key: Known of records out of an aggregate only: the service does not give it back.
        shard_id: The shard it was read from.
        stream: The stream's name.
    """

    data: bytes
    sequence_number: str
    partition_key: str | None = None
    approximate_arrival_seconds: float = 0.0
    encryption_type: str | None = None
    sub_sequence_number: int = 0
    explicit_hash_key: str | None = None
    shard_id: str = ""
    stream: str = ""

    @property
    def approximate_arrival_micros(self) -> int:
        """Microseconds since the epoch, rounded to the service's milliseconds."""
        return round(self.approximate_arrival_seconds * 1000) * 1000

    @property
    def approximate_arrival_timestamp(self) -> Timestamp:
        """When the service took the record. Milliseconds; neither unique nor strictly increasing in a shard."""
        return Timestamp(micros=self.approximate_arrival_micros)

    @property
    def size_bytes(self) -> int:
        """What counts against the limits: the data, and the partition key in UTF-8."""
        key = self.partition_key
        return len(self.data) + (len(key.encode()) if key is not None else 0)


_RecordFields = tuple[bytes, str, str | None, float, str | None, int, str | None, str, str]
_RECORD_VERSION: Final = b"\x01"


class KinesisRecordCoder(coders.Coder):
    """Keeps the class across processes, which a RowCoder does not.

    Wire form: byte 0x01 (version), then a MessagePack array of the nine fields in the order of the class.
    Deterministic: equal records have equal bytes.
    """

    def __init__(self) -> None:
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(_RecordFields).decode

    def encode(self, value: KinesisRecord) -> bytes:
        return _RECORD_VERSION + self._encode(
            (
                value.data,
                value.sequence_number,
                value.partition_key,
                value.approximate_arrival_seconds,
                value.encryption_type,
                value.sub_sequence_number,
                value.explicit_hash_key,
                value.shard_id,
                value.stream,
            )
        )

    def decode(self, encoded: bytes) -> KinesisRecord:
        if encoded[:1] != _RECORD_VERSION:
            raise ValueError(
                f"unknown version {encoded[:1]!r} of an encoded KinesisRecord; it was written by a newer release"
            )
        return KinesisRecord(*self._decode(memoryview(encoded)[1:]))

    def is_deterministic(self) -> bool:
        return True

    def to_type_hint(self) -> type[KinesisRecord]:
        return KinesisRecord

    def __reduce__(self) -> tuple[Any, ...]:
        return (KinesisRecordCoder, ())

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    def __hash__(self) -> int:
        return hash(type(self))


coders.registry.register_coder(KinesisRecord, KinesisRecordCoder)


class OutgoingRecord(msgspec.Struct, frozen=True, gc=False):
    """A record to write.

    Attributes:
        data: The payload.
        partition_key: 1-256 characters. None: a random one, so that records spread evenly.
        explicit_hash_key: Decimal digits, 0 to 2^128-1; overrides where the partition key would lead.
        stream: Where to write it; None: the sink's own stream.
    """

    data: bytes
    partition_key: str | None = None
    explicit_hash_key: str | None = None
    stream: str | None = None
