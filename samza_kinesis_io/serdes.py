"""Samza's serdes, by Samza's names: what a job's configuration calls `json` makes here the bytes it makes there."""

from __future__ import annotations

import importlib
import io
import json
import struct
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

from samza_kinesis_io.errors import ConfigurationError, KinesisIOError


class SerdeError(KinesisIOError, ValueError):
    """A key or message is not what its serde can turn into bytes, or back."""


class Serde(Protocol):
    """Turns objects into bytes and back. Can be pickled. None stays None and is given to no serde."""

    def to_bytes(self, value: Any) -> bytes:
        """Return the bytes of a value.

        Raises:
            SerdeError: it has another type, or does not fit.
        """
        ...

    def from_bytes(self, data: bytes) -> Any:
        """Return the value of the bytes.

        Raises:
            SerdeError: they are no such value.
        """
        ...


def _mismatch(serde: str, value: Any, wanted: str) -> SerdeError:
    return SerdeError(f"the {serde} serde takes {wanted}, got {type(value).__qualname__} {value!r:.80}")


class BytesSerde:
    """`byte` and `bytebuffer`: the bytes as they are."""

    def to_bytes(self, value: Any) -> bytes:
        if not isinstance(value, (bytes, bytearray, memoryview)):
            raise _mismatch("byte", value, "bytes")
        return bytes(value)

    def from_bytes(self, data: bytes) -> bytes:
        return data


class StringSerde:
    """`string`: text, in UTF-8 if nothing else is configured."""

    def __init__(self, encoding: str = "utf-8") -> None:
        try:
            "".encode(encoding)
        except LookupError:
            raise ConfigurationError(f"the string serde's encoding must be known to Python, got {encoding!r}") from None
        self._encoding = encoding

    def to_bytes(self, value: Any) -> bytes:
        if not isinstance(value, str):
            raise _mismatch("string", value, "str")
        try:
            return value.encode(self._encoding)
        except UnicodeError as error:
            raise SerdeError(f"the string serde cannot write {value!r:.80}: {error}") from error

    def from_bytes(self, data: bytes) -> str:
        try:
            return data.decode(self._encoding)
        except UnicodeError as error:
            raise SerdeError(f"no {self._encoding} text of {len(data)} bytes: {error}") from error


class JsonSerde:
    """`json`: dictionaries, lists, text, numbers, true, false. Keys stay as they are written; NaN is no JSON."""

    def to_bytes(self, value: Any) -> bytes:
        try:
            return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
        except (TypeError, ValueError) as error:
            raise SerdeError(f"no JSON of {type(value).__qualname__} {value!r:.80}: {error}") from error

    def from_bytes(self, data: bytes) -> Any:
        try:
            return json.loads(data)
        except ValueError as error:
            raise SerdeError(f"no JSON of {len(data)} bytes {data[:40]!r}: {error}") from error


class StructSerde:
    """`integer`, `long` and `double`: 4, 8 and 8 bytes, the most significant first, as Java's."""

    def __init__(self, name: str, form: str, kind: type) -> None:
        self._name = name
        self._form = form
        self._kind = kind

    def to_bytes(self, value: Any) -> bytes:
        # A whole number is a fine double, but true is no integer.
        if isinstance(value, bool) or not isinstance(value, (self._kind, int)):
            raise _mismatch(self._name, value, self._kind.__name__)
        try:
            return struct.pack(self._form, value)
        except (struct.error, OverflowError) as error:
            raise SerdeError(f"{value} does not fit the {self._name} serde: {error}") from error

    def from_bytes(self, data: bytes) -> Any:
        try:
            return struct.unpack(self._form, data)[0]
        except struct.error as error:
            raise SerdeError(f"no {self._name} of {len(data)} bytes: {error}") from error


class UuidSerde:
    """`uuid`: 16 bytes, the most significant first."""

    def to_bytes(self, value: Any) -> bytes:
        if not isinstance(value, uuid.UUID):
            raise _mismatch("uuid", value, "uuid.UUID")
        return value.bytes

    def from_bytes(self, data: bytes) -> uuid.UUID:
        try:
            return uuid.UUID(bytes=bytes(data))
        except ValueError as error:
            raise SerdeError(f"no UUID of {len(data)} bytes: {error}") from error


class AvroSerde:
    """`avro`: a record's Avro binary, without a container or a schema id. Needs `samza-kinesis-io[avro]`.

    Args:
        schema: The schema, as JSON.
    """

    def __init__(self, schema: str) -> None:
        self._schema_json = schema
        self._parse()

    def _parse(self) -> None:
        try:
            import fastavro
        except ImportError:
            raise ConfigurationError("the avro serde needs fastavro; install samza-kinesis-io[avro]") from None
        try:
            self._schema = fastavro.parse_schema(json.loads(self._schema_json))
        except Exception as error:  # fastavro has no common root of its schema errors
            raise ConfigurationError(f"the avro serde's schema is none: {error!r}") from error
        self._write: Callable[..., None] = fastavro.schemaless_writer
        self._read: Callable[..., Any] = fastavro.schemaless_reader

    def __reduce__(self) -> tuple[type[AvroSerde], tuple[str]]:
        return (AvroSerde, (self._schema_json,))

    def to_bytes(self, value: Any) -> bytes:
        out = io.BytesIO()
        try:
            self._write(out, self._schema, value)
        except Exception as error:
            raise SerdeError(f"the value does not fit the avro schema: {error!r}") from error
        return out.getvalue()

    def from_bytes(self, data: bytes) -> Any:
        source = io.BytesIO(data)
        try:
            value = self._read(source, self._schema)
        except Exception as error:
            raise SerdeError(f"{len(data)} bytes are not of the avro schema: {error!r}") from error
        if source.tell() != len(data):
            raise SerdeError(f"{len(data) - source.tell()} bytes are left behind an avro value; another schema?")
        return value


def _avro(options: Mapping[str, str]) -> AvroSerde:
    schema = options.get("schema")
    if schema is None and "schema.path" in options:
        # Read where the pipeline is built: workers need not have the file.
        try:
            with open(options["schema.path"], encoding="utf-8") as file:
                schema = file.read()
        except OSError as error:
            raise ConfigurationError(f"the avro serde's schema.path can't be read: {error}") from error
    if schema is None:
        raise ConfigurationError(
            "the avro serde needs its schema: set serializers.registry.NAME.schema or .schema.path"
        )
    return AvroSerde(schema)


def _refused(options: Mapping[str, str]) -> Serde:
    raise ConfigurationError(
        "the serializable serde is Java's own object serialization: only the classes that wrote it can read it, and "
        "reading foreign bytes with it runs their code; use json or avro"
    )


_FACTORIES: Final[Mapping[str, Callable[[Mapping[str, str]], Serde]]] = {
    "avro": _avro,
    "byte": lambda options: BytesSerde(),
    "bytebuffer": lambda options: BytesSerde(),
    "double": lambda options: StructSerde("double", ">d", float),
    "integer": lambda options: StructSerde("integer", ">i", int),
    "json": lambda options: JsonSerde(),
    "long": lambda options: StructSerde("long", ">q", int),
    "serializable": _refused,
    "string": lambda options: StringSerde(options.get("encoding", "utf-8")),
    "uuid": lambda options: UuidSerde(),
}

_JAVA_PACKAGE: Final = "org.apache.samza.serializers."
_JAVA: Final[Mapping[str, str]] = {
    "ByteSerdeFactory": "byte",
    "ByteBufferSerdeFactory": "bytebuffer",
    "DoubleSerdeFactory": "double",
    "IntegerSerdeFactory": "integer",
    "JsonSerdeFactory": "json",
    "JsonSerdeV2Factory": "json",
    "LongSerdeFactory": "long",
    "NoOpSerdeFactory": "byte",
    "SerializableSerdeFactory": "serializable",
    "StringSerdeFactory": "string",
    "UUIDSerdeFactory": "uuid",
    "AvroSerdeFactory": "avro",
}


def serde(name: str, options: Mapping[str, str] | None = None) -> Serde:
    """Return a serde by Samza's name of it, its Java factory class, or a class of yours by its dotted path.

    Args:
        name: "json", "org.apache.samza.serializers.JsonSerdeFactory", or "my.package.MySerde". The latter is called
            with the options, or without where it takes none.
        options: What stands behind `serializers.registry.NAME.`, such as `encoding` and `schema`.

    Raises:
        ConfigurationError: there is no such serde, or it is one that cannot be.
    """
    options = options or {}
    short = name[len(_JAVA_PACKAGE) :] if name.startswith(_JAVA_PACKAGE) else name
    factory = _FACTORIES.get(_JAVA.get(short, short))
    if factory is not None:
        return factory(options)
    known = ", ".join(sorted(_FACTORIES))
    module, _, attribute = name.rpartition(".")
    if not module or name.startswith(("org.", "com.", "io.")):
        raise ConfigurationError(
            f"the serde {name!r} is not known; known are {known}, their Java factory classes, "
            "and classes in Python by their dotted path"
        )
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"the serde {name!r} cannot be imported: {error}") from error
    made: Any = kind(dict(options)) if options else kind()
    if not (hasattr(made, "to_bytes") and hasattr(made, "from_bytes")):
        raise ConfigurationError(f"the serde {name!r} needs the methods to_bytes and from_bytes")
    result: Serde = made
    return result
