"""From values to records to write: `EncodeJson` and `EncodeAvro`, before `WriteToKinesis`.

delays | EncodeJson(partition_key=lambda delay: delay.carrier) | WriteToKinesis("delays")
records, failed = delays | EncodeAvro.single_object(SCHEMA, dead_letters=True)
"""

from __future__ import annotations

import io
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import msgspec
from apache_beam import pvalue

from samza_kinesis_io.errors import ConfigurationError
from samza_kinesis_io.records import OutgoingRecord
from samza_kinesis_io.transforms.avro_schemas import (
    AvroSchema,
    Framing,
    Glue,
    Schemaless,
    SchemaRegistry,
    SingleObject,
    as_text,
    fastavro,
    parsed,
)
from samza_kinesis_io.transforms.dead_letters import CodecTransform, FailedElement
from samza_kinesis_io.transforms.glue import GlueSchemaRegistry
from samza_kinesis_io.transforms.rows import avro_plain, plain_rows, to_plain

#: Counter: elements that could not be encoded.
ENCODE_ERRORS: Final = "encode_errors"

#: A constant, or a function of the element; None: none.
Key = str | Callable[[Any], str | None] | None


class Encoded(NamedTuple):
    """What encoding gives with `dead_letters=True`.

    Both with the windows and timestamps of the elements they come from.
    """

    encoded: pvalue.PCollection[OutgoingRecord]
    failed: pvalue.PCollection[FailedElement]


class _Encode(CodecTransform):
    _result = Encoded
    _error_counter = ENCODE_ERRORS


class EncodeJson(_Encode):
    """Encode elements to `OutgoingRecord`s that hold JSON.

    NamedTuples and `beam.Row`s become objects, as do Structs, dataclasses and dicts; Timestamps and datetimes
    RFC 3339 text, bytes base64, and NaN null.

    Args:
        partition_key, explicit_hash_key: The record's, a constant or a function of the element. None: the sink
            chooses a random partition key.
        dead_letters: Give a pair (`Encoded`): the records, and the elements that could not be encoded. False: one of
            those fails the pipeline.
    """

    def __init__(self, *, partition_key: Key = None, explicit_hash_key: Key = None, dead_letters: bool = False) -> None:
        keys = _Keys.checked(partition_key, explicit_hash_key)
        super().__init__(_JsonEncoding(keys), OutgoingRecord, dead_letters)


@dataclass(frozen=True, slots=True)
class _Keys:
    partition_key: Key
    explicit_hash_key: Key

    @classmethod
    def checked(cls, partition_key: Key, explicit_hash_key: Key) -> _Keys:
        for option, value in (("partition_key", partition_key), ("explicit_hash_key", explicit_hash_key)):
            if not (value is None or isinstance(value, str) or callable(value)):
                raise ConfigurationError(f"{option} must be a string, a function of the element or None, got {value!r}")
        return cls(partition_key, explicit_hash_key)

    def records(self, encode: Callable[[Any], bytes]) -> Callable[[Any], OutgoingRecord]:
        key, hash_key = self.partition_key, self.explicit_hash_key

        def record(element: Any) -> OutgoingRecord:
            return OutgoingRecord(
                encode(element),
                key(element) if callable(key) else key,
                hash_key(element) if callable(hash_key) else hash_key,
            )

        return record


@dataclass(frozen=True, slots=True)
class _JsonEncoding:
    keys: _Keys

    def open(self) -> Callable[[Any], Any]:
        encode = msgspec.json.Encoder(enc_hook=to_plain).encode
        return self.keys.records(lambda element: encode(plain_rows(element)))


class EncodeAvro(_Encode):
    """Encode elements to `OutgoingRecord`s that hold Avro. Made by its named constructors, one per way Avro travels.

    Elements are dicts, NamedTuples, `beam.Row`s, Structs or dataclasses with the schema's fields, or what a schema
    other than a record asks for. A missing field gets the schema's default; one without a default, and one that
    the schema does not know, fail the element.

    What the constructors share:
        partition_key, explicit_hash_key: The record's, a constant or a function of the element. None: the sink
            chooses a random partition key.
        dead_letters: Give a pair (`Encoded`): the records, and the elements that could not be encoded. False: one of
            those fails the pipeline.
    """

    def __init__(
        self, framing: Framing, schema: AvroSchema, *, partition_key: Key, explicit_hash_key: Key, dead_letters: bool
    ) -> None:
        keys = _Keys.checked(partition_key, explicit_hash_key)
        super().__init__(_AvroEncoding(framing, as_text(schema, "schema"), keys), OutgoingRecord, dead_letters)

    @classmethod
    def schemaless(
        cls,
        schema: AvroSchema,
        *,
        partition_key: Key = None,
        explicit_hash_key: Key = None,
        dead_letters: bool = False,
    ) -> EncodeAvro:
        """The value alone: readers must know the schema.

        Raises:
            ConfigurationError: an option is wrong, or fastavro is not installed.
        """
        return cls(
            Schemaless(as_text(schema, "schema")),
            schema,
            partition_key=partition_key,
            explicit_hash_key=explicit_hash_key,
            dead_letters=dead_letters,
        )

    @classmethod
    def single_object(
        cls,
        schema: AvroSchema,
        *,
        partition_key: Key = None,
        explicit_hash_key: Key = None,
        dead_letters: bool = False,
    ) -> EncodeAvro:
        """Avro's single-object encoding: the schema's fingerprint travels with each value.

        Raises:
            ConfigurationError: an option is wrong, or fastavro is not installed.
        """
        return cls(
            SingleObject((as_text(schema, "schema"),)),
            schema,
            partition_key=partition_key,
            explicit_hash_key=explicit_hash_key,
            dead_letters=dead_letters,
        )

    @classmethod
    def glue(
        cls,
        schema: AvroSchema,
        *,
        schema_name: str | None = None,
        schema_version_id: str | uuid.UUID | None = None,
        registry: SchemaRegistry | None = None,
        compressed: bool = False,
        partition_key: Key = None,
        explicit_hash_key: Key = None,
        dead_letters: bool = False,
    ) -> EncodeAvro:
        """AWS Glue Schema Registry's framing; nothing is registered, the schema must be there.

        Its version is `schema_version_id`, or found when a worker starts: the one of `schema_name` with exactly this
        definition, in `registry` (None: `GlueSchemaRegistry()`). `compressed`: by zlib.

        Raises:
            ConfigurationError: an option is wrong, or fastavro is not installed.
            UnknownSchema: on the worker: no version has this definition.
        """
        if (schema_name is None) == (schema_version_id is None):
            raise ConfigurationError(
                "give either schema_name or schema_version_id, got "
                f"schema_name={schema_name!r} and schema_version_id={schema_version_id!r}"
            )
        if not isinstance(compressed, bool):
            raise ConfigurationError(f"compressed must be True or False, got {compressed!r}")
        if isinstance(schema_version_id, str):
            try:
                schema_version_id = uuid.UUID(schema_version_id)
            except ValueError as exc:
                raise ConfigurationError(f"schema_version_id must be a UUID, got {schema_version_id!r}") from exc
        framing = Glue(
            registry if registry is not None else GlueSchemaRegistry(),
            schema_name=schema_name or "",
            schema_version_id=schema_version_id,
            compressed=compressed,
        )
        return cls(
            framing,
            schema,
            partition_key=partition_key,
            explicit_hash_key=explicit_hash_key,
            dead_letters=dead_letters,
        )


@dataclass(frozen=True, slots=True)
class _AvroEncoding:
    framing: Framing
    schema_text: str
    keys: _Keys

    def open(self) -> Callable[[Any], Any]:
        frame = self.framing.writer(self.schema_text)
        schema = parsed(self.schema_text)
        write = fastavro().schemaless_writer

        def encode(element: Any) -> bytes:
            value = io.BytesIO()
            write(value, schema, avro_plain(element), strict_allow_default=True)
            return frame(value.getvalue())

        return self.keys.records(encode)
