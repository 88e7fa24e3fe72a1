"""From bytes to values: `DecodeJson` and `DecodeAvro`, behind `ReadFromKinesis`.

flights = records | DecodeJson(Flight)
flights, failed = records | DecodeJson(Flight, dead_letters=True)
flights = records | DecodeAvro.glue(reader_schema=SCHEMA, into=beam.Row)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import apache_beam as beam
import msgspec
from apache_beam import pvalue

from samza_kinesis_io.errors import ConfigurationError
from samza_kinesis_io.records import KinesisRecord
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
from samza_kinesis_io.transforms.rows import AVRO_TYPES, from_plain, row_type_of, shape_of

#: Counter: elements that could not be decoded.
DECODE_ERRORS: Final = "decode_errors"


class Decoded(NamedTuple):
    """What decoding gives with `dead_letters=True`.

    Both with the windows and timestamps of the elements they come from.
    """

    decoded: pvalue.PCollection[Any]
    failed: pvalue.PCollection[FailedElement]


class _Decode(CodecTransform):
    _result = Decoded
    _error_counter = DECODE_ERRORS


class DecodeJson(_Decode):
    """Decode `KinesisRecord`s, or bytes, that hold JSON.

    Args:
        into: What each becomes. None: dicts, lists, strings, numbers as they come. A type: NamedTuples and Beam's row
            types (from objects, by field name), Structs, dataclasses, TypedDicts, list[...] and whatever else
            msgspec knows; the JSON is checked against it. Members the type does not name are ignored.
        dead_letters: Give a pair (`Decoded`): the values, and the elements that hold none. False: one of those
            fails the pipeline.

    Raises:
        ConfigurationError: `into` is nothing JSON can be decoded to.
    """

    def __init__(self, into: Any = None, *, dead_letters: bool = False) -> None:
        if into is not None:
            shape_of(into)
        super().__init__(_JsonDecoding(into), Any if into is None else into, dead_letters)


@dataclass(frozen=True, slots=True)
class _JsonDecoding:
    into: Any

    def open(self) -> Callable[[Any], Any]:
        plain, build = shape_of(Any if self.into is None else self.into)
        decode = msgspec.json.Decoder(plain, dec_hook=from_plain).decode
        if build is None:
            return lambda element: decode(_data(element))
        return lambda element: build(decode(_data(element)))


class DecodeAvro(_Decode):
    """Decode `KinesisRecord`s, or bytes, that hold Avro. Made by its named constructors, one per way Avro travels.

    What they share:
        reader_schema: What the values become, by Avro's rules of schema resolution: new fields get their defaults,
            removed ones are left out. None: what the writer wrote.
        into: None: dicts and so on, as fastavro gives them. beam.Row: rows of the reader schema's fields (of the
            writer's, where there is one only), with Beam Timestamps for timestamps. Or a type, as for `DecodeJson`.
        dead_letters: Give a pair (`Decoded`): the values, and the elements that hold none. False: one of those
            fails the pipeline.

    Bytes left behind the value fail an element: another schema wrote it.
    """

    def __init__(
        self,
        framing: Framing,
        *,
        reader_schema: AvroSchema | None,
        into: Any,
        dead_letters: bool,
        only_schema: str | None,
    ) -> None:
        fastavro()
        reader = as_text(reader_schema, "reader_schema") if reader_schema is not None else None
        if into is beam.Row:
            known = reader if reader is not None else only_schema
            if known is None:
                raise ConfigurationError("into=beam.Row needs a reader_schema: a PCollection's rows have one type")
            into = row_type_of(parsed(known))
        if into is not None:
            shape_of(into)
        super().__init__(_AvroDecoding(framing, reader, into), Any if into is None else into, dead_letters)

    @classmethod
    def schemaless(
        cls,
        writer_schema: AvroSchema,
        *,
        reader_schema: AvroSchema | None = None,
        into: Any = None,
        dead_letters: bool = False,
    ) -> DecodeAvro:
        """The value alone, written with `writer_schema`.

        Raises:
            ConfigurationError: an option is wrong, or fastavro is not installed.
        """
        text = as_text(writer_schema, "writer_schema")
        return cls(
            Schemaless(text), reader_schema=reader_schema, into=into, dead_letters=dead_letters, only_schema=text
        )

    @classmethod
    def single_object(
        cls,
        writer_schemas: Sequence[AvroSchema],
        *,
        reader_schema: AvroSchema | None = None,
        into: Any = None,
        dead_letters: bool = False,
    ) -> DecodeAvro:
        """Avro's single-object encoding: each element names by fingerprint which of `writer_schemas` wrote it.

        Raises:
            ConfigurationError: an option is wrong, or fastavro is not installed.
        """
        if isinstance(writer_schemas, str) or not isinstance(writer_schemas, Sequence) or not writer_schemas:
            raise ConfigurationError(f"writer_schemas must be a list of schemas, at least one, got {writer_schemas!r}")
        texts = tuple(as_text(schema, f"writer_schemas[{i}]") for i, schema in enumerate(writer_schemas))
        return cls(
            SingleObject(texts),
            reader_schema=reader_schema,
            into=into,
            dead_letters=dead_letters,
            only_schema=texts[0] if len(texts) == 1 else None,
        )

    @classmethod
    def glue(
        cls,
        registry: SchemaRegistry | None = None,
        *,
        reader_schema: AvroSchema | None = None,
        into: Any = None,
        dead_letters: bool = False,
    ) -> DecodeAvro:
        """AWS Glue Schema Registry's framing, plain or zlib; each schema version is fetched once per process.

        `registry` None: `GlueSchemaRegistry()`. A version it does not know fails the element; one it cannot give now
        fails the bundle, which is tried again.

        Raises:
            ConfigurationError: an option is wrong, or fastavro is not installed.
        """
        framing = Glue(registry if registry is not None else GlueSchemaRegistry())
        return cls(framing, reader_schema=reader_schema, into=into, dead_letters=dead_letters, only_schema=None)


@dataclass(frozen=True, slots=True)
class _AvroDecoding:
    framing: Framing
    reader_schema: str | None
    into: Any

    def open(self) -> Callable[[Any], Any]:
        read_frame = self.framing.reader()
        read = fastavro().schemaless_reader
        reader_schema = parsed(self.reader_schema) if self.reader_schema is not None else None

        def decode(element: Any) -> Any:
            writer_schema, stream = read_frame(_data(element))
            value = read(stream, writer_schema, reader_schema)
            if stream.read(1):
                left = len(stream.getvalue()) - stream.tell() + 1
                raise ValueError(f"bytes are left behind the value ({left}): another schema wrote it")
            return value

        if self.into is None:
            return decode
        plain, build = shape_of(self.into)

        def convert(value: Any) -> Any:
            return msgspec.convert(value, plain, builtin_types=AVRO_TYPES, dec_hook=from_plain)

        if build is None:
            return lambda element: convert(decode(element))
        return lambda element: build(convert(decode(element)))


def _data(element: Any) -> bytes:
    if type(element) is KinesisRecord:
        return element.data
    if isinstance(element, bytes):
        return element
    raise TypeError(f"a KinesisRecord or bytes can be decoded, got {type(element).__name__}")
