"""Between plain values (dicts, lists, scalars) and what Beam counts as a row: NamedTuples and `beam.Row`s.

msgspec does the conversion and its checks. It takes a NamedTuple for an array, though, while JSON, Avro and Beam's
schemas agree that it has named fields; so each NamedTuple is converted by way of a Struct of the same fields.
"""

from __future__ import annotations

import datetime
import decimal
import functools
import inspect
import numbers
import operator
import types
import typing
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import apache_beam as beam
import msgspec
from apache_beam.typehints.row_type import RowTypeConstraint
from apache_beam.utils.timestamp import Timestamp

from samza_kinesis_io.errors import ConfigurationError

#: What Avro values may hold beside what JSON has; kept as they are.
AVRO_TYPES: Final = (bytes, datetime.datetime, datetime.date, datetime.time, decimal.Decimal, uuid.UUID)

_EPOCH: Final = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)
_MICROSECOND: Final = datetime.timedelta(microseconds=1)
_SCALARS: Final = frozenset({str, int, float, bool, bytes, type(None)})


class Shape(NamedTuple):
    """How a type is read.

    Attributes:
        plain: The type that msgspec converts to.
        build: From a value of `plain` to one of the type; None: it is the same.
    """

    plain: Any
    build: Callable[[Any], Any] | None = None


def shape_of(into: Any) -> Shape:
    """Return how values of the type `into` are read.

    NamedTuples and Beam's row types are taken apart wherever they stand; whatever else msgspec knows (Structs,
    dataclasses, TypedDicts, datetimes, ...) is its own. Fields of a row that may be None may be missing.

    Raises:
        ConfigurationError: msgspec does not know the type, or a row is one alternative of several.
    """
    shape = _shape(into)
    try:
        msgspec.json.Decoder(shape.plain, dec_hook=from_plain)
    except TypeError as exc:
        raise ConfigurationError(f"into={into!r} cannot be decoded to: {exc}") from exc
    return shape


def _shape(kind: Any) -> Shape:
    if kind is beam.Row:
        raise ConfigurationError(
            "into=beam.Row does not say which fields; use a NamedTuple class or RowTypeConstraint.from_fields([...])"
        )
    if isinstance(kind, RowTypeConstraint):
        kind = kind.user_type
    if inspect.isclass(kind) and issubclass(kind, tuple) and hasattr(kind, "_fields"):
        return _row_shape(kind)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _union_shape(kind, args)
    if inspect.isclass(origin) and len(args) == 1 and issubclass(list, origin):
        item = _shape(args[0])
        return Shape(list[item.plain], item.build and _each(item.build))  # type: ignore[name-defined]
    if inspect.isclass(origin) and len(args) == 2 and issubclass(dict, origin):
        key, item = _shape(args[0]), _shape(args[1])
        return Shape(dict[key.plain, item.plain], item.build and _each_value(item.build))  # type: ignore[name-defined]
    # Beam's generated row types say numpy.int64 and numpy.float64 where they mean int and float.
    if inspect.isclass(kind) and kind.__module__ == "numpy" and issubclass(kind, numbers.Real):
        return Shape(int if issubclass(kind, numbers.Integral) else float)
    return Shape(kind)


def _row_shape(kind: Any) -> Shape:
    hints = typing.get_type_hints(kind)
    defaults = dict(getattr(kind, "_field_defaults", {}))
    builds: list[tuple[Callable[[Any], Any] | None, Any]] = []
    fields: list[Any] = []
    for name in kind._fields:
        hint = hints.get(name, Any)
        if name not in defaults and type(None) in typing.get_args(hint):
            defaults[name] = None
        plain, build = _shape(hint)
        builds.append((build, defaults.get(name)))
        # A default is a value of the row's type and not of the plain one, so it is put in behind.
        fields.append((name, plain, msgspec.UNSET) if name in defaults else (name, plain))
    struct = msgspec.defstruct(kind.__name__, fields, kw_only=True)
    values, make = msgspec.structs.astuple, kind._make
    if not defaults and not any(build for build, _ in builds):
        return Shape(struct, lambda value: make(values(value)))

    def row(value: Any) -> Any:
        return make(
            default if v is msgspec.UNSET else v if build is None else build(v)
            for (build, default), v in zip(builds, values(value), strict=True)
        )

    return Shape(struct, row)


def _union_shape(kind: Any, args: tuple[Any, ...]) -> Shape:
    shapes = [_shape(arg) for arg in args]
    builds = [shape.build for shape in shapes if shape.build is not None]
    plain: Any = functools.reduce(operator.or_, (shape.plain for shape in shapes))
    if not builds:
        return Shape(plain)
    if len(args) == 2 and type(None) in args:
        build = builds[0]
        return Shape(plain, lambda value: None if value is None else build(value))
    raise ConfigurationError(f"{kind} cannot be decoded to: a row may be optional, but not one alternative of several")


def _each(build: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda values: [build(value) for value in values]


def _each_value(build: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda values: {key: build(value) for key, value in values.items()}


def from_plain(kind: Any, value: Any) -> Any:
    """msgspec's `dec_hook`: Beam's Timestamps, from RFC 3339 text or a datetime with time zone."""
    if kind is Timestamp:
        if isinstance(value, str):
            return Timestamp.from_rfc3339(value)
        if isinstance(value, datetime.datetime) and value.tzinfo is not None:
            return Timestamp(micros=(value - _EPOCH) // _MICROSECOND)
        raise ValueError(f"expected a timestamp such as 2013-01-01T05:15:00Z, got {value!r}")
    if isinstance(kind, type) and isinstance(value, kind):
        return value
    raise NotImplementedError(f"{kind} is unknown")


def to_plain(value: Any) -> Any:
    """msgspec's `enc_hook`: what it does not know by itself."""
    if isinstance(value, Timestamp):
        return value.to_rfc3339()
    if isinstance(value, beam.Row):
        return value.as_dict()
    if hasattr(value, "item"):
        return value.item()  # a scalar of numpy
    raise NotImplementedError(f"{type(value)} is unknown")


def _to_avro_plain(value: Any) -> Any:
    """The same for Avro, whose time stamps are written from datetimes."""
    if isinstance(value, Timestamp):
        return value.to_utc_datetime(has_tz=True)
    return to_plain(value)


def plain_rows(value: Any) -> Any:
    """Return the value with each NamedTuple and `beam.Row` in it, in lists and dicts too, as a dict."""
    kind = type(value)
    if kind in _SCALARS:
        return value
    if kind is beam.Row or (isinstance(value, tuple) and hasattr(value, "_asdict")):
        return {name: plain_rows(v) for name, v in value._asdict().items()}
    if isinstance(value, Mapping):
        return {key: plain_rows(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_rows(v) for v in value]
    return value


def avro_plain(value: Any) -> Any:
    """Return the value as fastavro writes it: rows, Structs and dataclasses as dicts, Timestamps as datetimes."""
    return msgspec.to_builtins(plain_rows(value), builtin_types=AVRO_TYPES, enc_hook=_to_avro_plain)


# --- Avro's types as Beam's ---------------------------------------------------------------------------------------

_PRIMITIVES: Final[Mapping[str, Any]] = {
    "boolean": bool,
    "int": int,
    "long": int,
    "float": float,
    "double": float,
    "bytes": bytes,
    "string": str,
    "fixed": bytes,
    "enum": str,
    "null": type(None),
}
_LOGICAL: Final[Mapping[str, Any]] = {
    "timestamp-millis": Timestamp,
    "timestamp-micros": Timestamp,
    "decimal": decimal.Decimal,
}


def row_type_of(schema: Any) -> RowTypeConstraint:
    """Return Beam's row type for an Avro record, parsed by fastavro. ints are 64 bits wide, floats double.

    Raises:
        ConfigurationError: it is no record, or a field has a type that Beam's schemas lack (a union of several,
            a date, a record inside itself); the message names it.
    """
    if not isinstance(schema, dict) or schema.get("type") != "record":
        raise ConfigurationError("into=beam.Row needs a schema that is a record")
    return typing.cast(RowTypeConstraint, _beam_type(schema, {}, schema["name"]))


def _beam_type(schema: Any, named: dict[str, Any], where: str) -> Any:
    if isinstance(schema, list):
        others = [s for s in schema if s != "null"]
        if len(others) != 1:
            raise ConfigurationError(f"{where} is a union of several types, which Beam's schemas lack; use into=None")
        inner = _beam_type(others[0], named, where)
        return typing.Optional[inner] if len(others) < len(schema) else inner  # noqa: UP045 (Beam wants it so)
    if isinstance(schema, str):
        found = _PRIMITIVES.get(schema) or named.get(schema)
        if found is None:
            raise ConfigurationError(f"{where} has the type {schema}, which Beam's schemas lack here; use into=None")
        return found
    if "logicalType" in schema and schema["logicalType"] != "uuid":
        if schema["logicalType"] not in _LOGICAL:
            raise ConfigurationError(f"{where} is a {schema['logicalType']}, which Beam's schemas lack; use into=None")
        return _LOGICAL[schema["logicalType"]]
    kind = schema["type"]
    if kind == "record":
        fields = [(f["name"], _beam_type(f["type"], named, f"{where}.{f['name']}")) for f in schema["fields"]]
        found = RowTypeConstraint.from_fields(fields)
    elif kind == "array":
        found = Sequence[_beam_type(schema["items"], named, where)]  # type: ignore[misc]
    elif kind == "map":
        found = Mapping[str, _beam_type(schema["values"], named, where)]  # type: ignore[misc]
    else:
        found = _beam_type(kind, named, where)
    if "name" in schema:
        named[schema["name"]] = found
    return found
