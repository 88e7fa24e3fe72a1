"""The service's checks of what a call gives, and the words in which it refuses.

ValidationException is the constraint of a model that is broken, SerializationException a value of the wrong type,
InvalidArgumentException what only the service itself can know.
"""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Mapping
from typing import Any, Final

from samza_kinesis_io.limits import MAX_HASH_KEY, MAX_PARTITION_KEY_CHARACTERS
from samza_kinesis_io.testing.faults import FakeServiceError

STREAM_NAME: Final = re.compile(r"[a-zA-Z0-9_.-]{1,128}")
SEQUENCE_NUMBER: Final = re.compile(r"0|[1-9]\d{0,128}")
_HASH_KEY: Final = re.compile(r"0|[1-9]\d{0,38}")


class CheckedEntry:
    """A record to put. `hash_key` is None on streams with automatic distribution."""

    __slots__ = ("data", "hash_key", "partition_key", "size_bytes")

    def __init__(self, data: bytes, partition_key: str | None, hash_key: int | None, size_bytes: int) -> None:
        self.data = data
        self.partition_key = partition_key
        self.hash_key = hash_key
        self.size_bytes = size_bytes


def invalid(member: str, value: object, constraint: str) -> FakeServiceError:
    """Return the error for a value that breaks a constraint of the model."""
    shown = "null" if value is None else f"'{value}'"
    return FakeServiceError(
        "ValidationException",
        f"1 validation error detected: Value {shown} at '{member}' failed to satisfy constraint: {constraint}",
    )


def whole_number(member: str, value: object, low: int, high: int) -> int:
    """Return `value` if it is a number from `low` to `high`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise FakeServiceError("SerializationException", f"{member} must be a number, got {value!r}")
    if value < low:
        raise invalid(member, value, f"Member must have value greater than or equal to {low}")
    if value > high:
        raise invalid(member, value, f"Member must have value less than or equal to {high}")
    return value


def seconds_of(timestamp: object) -> float:
    """Return a timestamp, as boto3 or JSON gives it, in seconds since the epoch."""
    if isinstance(timestamp, datetime.datetime):
        return timestamp.timestamp()
    if isinstance(timestamp, (int, float)) and not isinstance(timestamp, bool):
        return float(timestamp)
    raise FakeServiceError("SerializationException", f"a timestamp must be a number of seconds, got {timestamp!r}")


def hash_key_of(member: str, value: object) -> int:
    if not isinstance(value, str) or not _HASH_KEY.fullmatch(value):
        name = member[0].lower() + member[1:]
        raise invalid(name, value, "Member must satisfy regular expression pattern: 0|([1-9]\\d{0,38})")
    if int(value) > MAX_HASH_KEY:
        raise FakeServiceError(
            "InvalidArgumentException",
            f"Invalid {member}. {member} must be in the range: [0, 2^128-1]. Specified value was {value}",
        )
    return int(value)


def check_entry(entry: Mapping[str, Any], number: int, *, auto_distribution: bool, max_bytes: int) -> CheckedEntry:
    """Return an entry with its size and hash key.

    Args:
        entry: As PutRecords or PutRecord has it.
        number: Its place in a PutRecords, from 1; 0 for a PutRecord.
        auto_distribution, max_bytes: Of the stream.
    """
    data = entry.get("Data")
    if isinstance(data, bytearray):
        data = bytes(data)
    place = f"records.{number}.member." if number else ""
    if data is None:
        raise invalid(f"{place}data", None, "Member must not be null")
    if not isinstance(data, bytes):
        raise FakeServiceError("SerializationException", f"Data must be bytes, got {type(data).__name__}.")
    key = entry.get("PartitionKey")
    size = len(data)
    hash_key: int | None = None
    if key is not None:
        if not isinstance(key, str) or not 1 <= len(key) <= MAX_PARTITION_KEY_CHARACTERS:
            raise invalid(f"{place}partitionKey", key, "Member must have length from 1 to 256")
        encoded = key.encode()
        size += len(encoded)
        if not auto_distribution:
            hash_key = int.from_bytes(hashlib.md5(encoded, usedforsecurity=False).digest(), "big")
    elif not auto_distribution:
        # Not known of the service, whose model lets the key be absent; every emulator refuses it.
        raise invalid(f"{place}partitionKey", None, "Member must not be null")
    explicit = entry.get("ExplicitHashKey")
    if explicit is not None:
        explicit_hash_key = hash_key_of("ExplicitHashKey", explicit)
        if not auto_distribution:
            hash_key = explicit_hash_key
    if size > max_bytes:
        raise invalid(f"{place}data", f"{size} bytes", f"Member must have length less than or equal to {max_bytes}")
    return CheckedEntry(data, key, hash_key, size)
