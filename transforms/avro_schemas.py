"""Which schema wrote these bytes: the three ways in which Avro data travels without its file.

schemaless       the value alone; the reader knows the schema
single object    C3 01 | CRC-64-AVRO of the schema's canonical form, 8 bytes, little-endian | value
                 https://avro.apache.org/docs/1.11.1/specification/#single-object-encoding
Glue             03 | 00, or 05 for zlib | id of the schema's version, 16 bytes | value, possibly compressed
                 as AWS's own serializers write it, https://github.com/awslabs/aws-glue-schema-registry
"""

from __future__ import annotations

import io
import json
import os
import threading
import uuid
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from samza_kinesis_io.clock import Clock, SystemClock
from samza_kinesis_io.errors import ConfigurationError, KinesisIOError
from samza_kinesis_io.transforms.dead_letters import SchemaUnavailable

#: An Avro schema as JSON text, or as what json.loads makes of it.
AvroSchema = str | Mapping[str, Any] | list[Any]
#: What fastavro.parse_schema gives.
ParsedSchema = Any

_SINGLE_OBJECT: Final = b"\xc3\x01"
_FINGERPRINT_BYTES: Final = 8
_GLUE_VERSION: Final = 3
_GLUE_PLAIN: Final = 0
_GLUE_ZLIB: Final = 5
_GLUE_HEADER_BYTES: Final = 18
#: A 10 MiB record of zeros in zlib would be 10 GiB; a worker that unpacks one is gone.
_MAX_UNCOMPRESSED_BYTES: Final = 256 * 1024 * 1024
#: A version the registry does not know is asked for again after this long: it may have been registered since.
_UNKNOWN_FOR_SECONDS: Final = 60.0


class UnknownSchema(KinesisIOError):
    """Nobody knows the schema that wrote an element."""


class SchemaRegistry(Protocol):
    """Where schemas are looked up by the id of their version. Picklable and hashable.

    Equal registries share what was fetched in a process, so equality must mean "the same registry".
    """

    def definition(self, version_id: uuid.UUID) -> str:
        """Return the schema as JSON text. Asked once per version and process.

        Raises:
            UnknownSchema: there is no such version, or it is no Avro schema: the element has failed. Any other error
                fails the bundle.
        """
        ...

    def version_id(self, schema_name: str, definition: str) -> uuid.UUID:
        """Return the id of the version of this schema that has this definition.

        Raises:
            UnknownSchema: there is none.
        """
        ...


def fastavro() -> Any:
    """Import fastavro, which is an extra of this package.

    Raises:
        ConfigurationError: it is not installed.
    """
    try:
        import fastavro
        import fastavro.schema
    except ImportError as exc:
        raise ConfigurationError("Avro needs fastavro: pip install 'samza-kinesis-io[avro]'") from exc
    return fastavro


def as_text(schema: AvroSchema, option: str) -> str:
    """Return the schema as JSON text, checked.

    Raises:
        ConfigurationError: it is no Avro schema.
    """
    text = schema if isinstance(schema, str) else json.dumps(schema)
    try:
        parsed(text)
    except ConfigurationError:
        raise
    except Exception as exc:
        raise ConfigurationError(f"{option} must be an Avro schema, as JSON text or as a dict: {exc}") from exc
    return text


def parsed(text: str) -> ParsedSchema:
    try:
        schema = json.loads(text)
    except ValueError:
        schema = text  # the bare name of a primitive
    return fastavro().parse_schema(schema, named_schemas={})


def fingerprint(schema: ParsedSchema) -> bytes:
    """Return the CRC-64-AVRO of the canonical form, as single-object encoding writes it."""
    avro = fastavro().schema
    return bytes.fromhex(avro.fingerprint(avro.to_parsing_canonical_form(schema), "CRC-64-AVRO"))


class Framing(Protocol):
    """How a value travels: the schema's part in front of it."""

    def reader(self) -> Callable[[bytes], tuple[ParsedSchema, io.BytesIO]]:
        """Return the function from bytes to the schema that wrote them and the value's own bytes."""
        ...

    def writer(self, schema_text: str) -> Callable[[bytes], bytes]:
        """Return the function that frames an encoded value of this schema."""
        ...


@dataclass(frozen=True, slots=True)
class Schemaless:
    """The value alone."""

    schema_text: str

    def reader(self) -> Callable[[bytes], tuple[ParsedSchema, io.BytesIO]]:
        schema = parsed(self.schema_text)
        return lambda data: (schema, io.BytesIO(data))

    def writer(self, schema_text: str) -> Callable[[bytes], bytes]:
        return lambda value: value


@dataclass(frozen=True, slots=True)
class SingleObject:
    """Avro's own framing. `schema_texts` are those a reader knows."""

    schema_texts: tuple[str, ...]

    def reader(self) -> Callable[[bytes], tuple[ParsedSchema, io.BytesIO]]:
        schemas = {fingerprint(schema): schema for schema in map(parsed, self.schema_texts)}
        header = len(_SINGLE_OBJECT) + _FINGERPRINT_BYTES

        def read(data: bytes) -> tuple[ParsedSchema, io.BytesIO]:
            if len(data) < header or not data.startswith(_SINGLE_OBJECT):
                raise ValueError(f"no single-object header: {_start_of(data)}, not with c3 01")
            print_ = data[len(_SINGLE_OBJECT) : header]
            schema = schemas.get(print_)
            if schema is None:
                raise UnknownSchema(f"none of the {len(schemas)} writer_schemas has the fingerprint {print_.hex()}")
            return schema, io.BytesIO(data[header:])

        return read

    def writer(self, schema_text: str) -> Callable[[bytes], bytes]:
        header = _SINGLE_OBJECT + fingerprint(parsed(schema_text))
        return lambda value: header + value


@dataclass(frozen=True, slots=True)
class Glue:
    """AWS Glue Schema Registry. `schema_name` and `compressed` are a writer's."""

    registry: SchemaRegistry
    schema_name: str = ""
    schema_version_id: uuid.UUID | None = None
    compressed: bool = False
    clock: Clock = SystemClock()

    def reader(self) -> Callable[[bytes], tuple[ParsedSchema, io.BytesIO]]:
        def read(data: bytes) -> tuple[ParsedSchema, io.BytesIO]:
            if len(data) < _GLUE_HEADER_BYTES or data[0] != _GLUE_VERSION:
                raise ValueError(f"no Glue header: {_start_of(data)}, not with 03 00 or 03 05")
            compression = data[1]
            value = data[_GLUE_HEADER_BYTES:]
            if compression == _GLUE_ZLIB:
                value = _uncompressed(value)
            elif compression != _GLUE_PLAIN:
                raise ValueError(
                    f"unknown compression {compression:02x} in the Glue header; known are 00 and 05 (zlib)"
                )
            version_id = uuid.UUID(bytes=data[2:_GLUE_HEADER_BYTES])
            return _fetched(self.registry, version_id, self.clock), io.BytesIO(value)

        return read

    def writer(self, schema_text: str) -> Callable[[bytes], bytes]:
        version_id = self.schema_version_id
        if version_id is None:
            version_id = self.registry.version_id(self.schema_name, schema_text)
        if self.compressed:
            zipped = bytes([_GLUE_VERSION, _GLUE_ZLIB]) + version_id.bytes
            return lambda value: zipped + zlib.compress(value)
        header = bytes([_GLUE_VERSION, _GLUE_PLAIN]) + version_id.bytes
        return lambda value: header + value


def _start_of(data: bytes) -> str:
    return f"{len(data)} bytes that begin with {data[:2].hex(' ') or 'nothing'}"


def _uncompressed(data: bytes) -> bytes:
    unpacker = zlib.decompressobj()
    value = unpacker.decompress(data, _MAX_UNCOMPRESSED_BYTES)
    if unpacker.unconsumed_tail:
        raise ValueError(f"more than {_MAX_UNCOMPRESSED_BYTES} bytes when uncompressed")
    if not unpacker.eof:
        raise ValueError("the compressed value is cut short")
    return value


# What the registries of this process answered: a schema, or until when a version counts as unknown.
_answers: dict[tuple[SchemaRegistry, uuid.UUID], tuple[ParsedSchema, float]] = {}
_fetching = threading.Lock()


def _renew_lock() -> None:
    global _fetching
    _fetching = threading.Lock()


# A fork while another thread fetches would leave the child a lock that nobody ever releases.
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_renew_lock)


def _fetched(registry: SchemaRegistry, version_id: uuid.UUID, clock: Clock) -> ParsedSchema:
    key = (registry, version_id)
    answer = _answers.get(key)
    if answer is None or answer[0] is None:
        # One thread asks, the others wait for the answer: a registry's limits are a few calls per second.
        with _fetching:
            answer = _answers.get(key)
            if answer is None or (answer[0] is None and answer[1] <= clock.monotonic_seconds()):
                answer = _answers[key] = _ask(registry, version_id, clock)
    if answer[0] is None:
        raise UnknownSchema(f"the registry knows no Avro schema with the version id {version_id}")
    return answer[0]


def _ask(registry: SchemaRegistry, version_id: uuid.UUID, clock: Clock) -> tuple[ParsedSchema, float]:
    try:
        return parsed(registry.definition(version_id)), 0.0
    except UnknownSchema:
        return None, clock.monotonic_seconds() + _UNKNOWN_FOR_SECONDS
    except Exception as exc:
        raise SchemaUnavailable(f"the schema with the version id {version_id} cannot be fetched: {exc}") from exc
