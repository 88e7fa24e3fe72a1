"""Kinesis' answers against botocore's own model of the service.

An emulator, ours included, that answers with a member the service does not have, or with a number where the service
sends a text, teaches its users something wrong. The model lies on disk with every boto3.
"""

from __future__ import annotations

import datetime
import functools
import re
from collections.abc import Iterator
from typing import Any

import botocore.session


@functools.cache
def _service() -> Any:
    return botocore.session.Session().get_service_model("kinesis")


def assert_valid_output(operation: str, answer: dict[str, Any]) -> None:
    """Raise AssertionError where `answer`, as boto3 returns it, is none that the service could give.

    Checked: unknown and missing members, types, enumerations, lengths, ranges, patterns. boto3's ResponseMetadata
    is ignored; None counts as a wrong type, since botocore leaves out members that are null.
    """
    shape = _service().operation_model(operation).output_shape
    body = {k: v for k, v in answer.items() if k != "ResponseMetadata"}
    if shape is None:
        assert not body, f"{operation} has no answer but {body!r}"
        return
    _assert_fits(operation, "an answer", shape, body)


def assert_valid_input(operation: str, params: dict[str, Any]) -> None:
    """Raise AssertionError where `params` is no request of the operation by the model."""
    _assert_fits(operation, "a request", _service().operation_model(operation).input_shape, params)


def error_codes(operation: str) -> frozenset[str]:
    """Return the error codes that the model lists for an operation."""
    return frozenset(shape.name for shape in _service().operation_model(operation).error_shapes)


def _assert_fits(operation: str, what: str, shape: Any, value: Any) -> None:
    faults = list(_faults(shape, value, ""))
    assert not faults, f"not {what} of {operation} by botocore's model:\n  " + "\n  ".join(faults)


#: Shapes whose bounds are those of requests: the service itself says "FailedRecordCount": 0 and describes a stream
#: with an empty list of metrics
#: (the examples of API_PutRecords.html and API_DescribeStreamSummary.html in the API reference).
_UNBOUND = frozenset({"MetricsNameList", "PositiveIntegerObject"})

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "long": (int,),
    "float": (int, float),
    "double": (int, float),
    "boolean": (bool,),
    "blob": (bytes,),
    "timestamp": (datetime.datetime, int, float),
    "list": (list, tuple),
    "map": (dict,),
    "structure": (dict,),
}


def _faults(shape: Any, value: Any, path: str) -> Iterator[str]:
    kind = shape.type_name
    if not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "boolean"):
        yield f"{path or '(whole)'} must be {kind}, is {value!r}"
        return
    if kind == "structure":
        for name in sorted(set(shape.required_members) - value.keys()):
            yield f"{path}.{name} is missing"
        for name, member in value.items():
            if name not in shape.members:
                yield f"{path}.{name} is unknown"
            else:
                yield from _faults(shape.members[name], member, f"{path}.{name}")
    elif kind == "list":
        yield from _bounds(shape, len(value), path, "length")
        for i, item in enumerate(value):
            yield from _faults(shape.member, item, f"{path}[{i}]")
    elif kind == "map":
        for key, item in value.items():
            yield from _faults(shape.key, key, f"{path} key")
            yield from _faults(shape.value, item, f"{path}[{key!r}]")
    elif kind == "blob":
        yield from _bounds(shape, len(value), path, "length")
    elif kind == "string":
        yield from _bounds(shape, len(value), path, "length")
        if shape.enum and value not in shape.enum:
            yield f"{path} must be one of {shape.enum}, is {value!r}"
        pattern = shape.metadata.get("pattern")
        if pattern and not re.fullmatch(pattern, value):
            yield f"{path} must match {pattern}, is {value!r}"
    elif kind in ("integer", "long"):
        yield from _bounds(shape, value, path, "value")


def _bounds(shape: Any, number: int, path: str, what: str) -> Iterator[str]:
    if shape.name in _UNBOUND:
        return
    low, high = shape.metadata.get("min"), shape.metadata.get("max")
    if (low is not None and number < low) or (high is not None and number > high):
        yield f"{path}: {what} must be {low}..{high}, is {number}"
