"""The KPL's aggregate format: many user records in one Kinesis record. Bytes in, values out; no I/O.

The format (https://github.com/awslabs/amazon-kinesis-producer/blob/master/aggregation-format.md):

    F3 89 9A C2 | protobuf AggregatedRecord | MD5 of the protobuf, 16 bytes

    message AggregatedRecord {
      repeated string partition_key_table     = 1;
      repeated string explicit_hash_key_table = 2;
      repeated Record records                 = 3;
    }
    message Record {
      required uint64 partition_key_index     = 1;
      optional uint64 explicit_hash_key_index = 2;
      required bytes  data                    = 3;
      repeated Tag    tags                    = 4;   // required string key = 1; optional string value = 2
    }

Two rules, which everything else follows from:

1. What is not an aggregate beyond doubt is a plain record, and stays what it was. Magic, MD5, protobuf,
   required fields and table indices must all fit; there is no half-taken-apart record, and nothing raises.
2. It is proto*2*: required fields are written also where they are 0 or empty (08 00, 1A 00). The KCL takes an
   aggregate without them for a plain record.

Written by hand because the hot path is per user record, and because a generated parser answers the wrong
question: upb does not check required fields, so it accepts what the KCL refuses.
"""

from __future__ import annotations

import enum
import hashlib
from functools import lru_cache
from itertools import repeat
from typing import Final, NamedTuple

from samza_kinesis_io.limits import DEFAULT_MAX_RECORD_BYTES, MAX_HASH_KEY
from samza_kinesis_io.records import KinesisRecord
from samza_kinesis_io.shards import FULL_RANGE, HashKeyRange

#: An aggregate's first bytes. Few plain records share them: test `data.startswith(MAGIC)` first.
MAGIC: Final = b"\xf3\x89\x9a\xc2"
#: The partition key of a record that holds an aggregate; where it goes is said by its explicit hash key.
AGGREGATE_PARTITION_KEY: Final = "a"

_MAGIC_BYTES: Final = len(MAGIC)
_MD5_BYTES: Final = 16
_MAX_HASH_KEY_DIGITS: Final = len(str(MAX_HASH_KEY))
# protobuf-java's default; deeper nesting is refused by the KCL too.
_MAX_GROUP_DEPTH: Final = 100


class HashFilter(enum.Enum):
    """What to do with an aggregate that holds user records from outside the shard's hash key range.

    A KPL that sees an aggregate arrive in another shard than predicted writes it again, and the KCL drops the
    misplaced copy: together they neither lose nor repeat. An aggregate that anything but the KPL wrote has no
    second copy.
    """

    KEEP = "KEEP"
    """Emit every user record and count those outside: nothing is lost; what a KPL wrote twice is read twice."""

    KCL = "KCL"
    """Drop the whole aggregate, as the KCL does. Right only if every producer is a KPL."""


class UserRecords(NamedTuple):
    """What an aggregate held.

    Attributes:
        records: In order. Empty only where `HashFilter.KCL` dropped the aggregate.
        outside_count: How many lie outside the shard's hash key range; 0 where no range was given.
    """

    records: list[KinesisRecord]
    outside_count: int


def is_aggregated(data: bytes) -> bool:
    """Tell whether `data` may be an aggregate; False is certain, True wants `deaggregate`."""
    return data.startswith(MAGIC) and len(data) > _MAGIC_BYTES + _MD5_BYTES


def deaggregate(
    record: KinesisRecord,
    *,
    hash_key_range: HashKeyRange | None = None,
    hash_filter: HashFilter = HashFilter.KEEP,
) -> UserRecords | None:
    """Return the user records that `record` holds; None: it is a plain record, to be passed on as it is.

    Never raises, whatever the bytes. User records carry partition key and explicit hash key of their own (the latter
    only where it was given), are numbered 0, 1, 2, ... by `sub_sequence_number`, and have everything else
    from `record`. Keys that are not UTF-8 are decoded with replacement characters, as the KCL does.

    With `hash_key_range` (the shard's) user records outside it are counted, and with `HashFilter.KCL` none
    is returned if one is outside. The KCL keeps what precedes a bad table index and drops the rest, and drops
    an aggregate of no records; both are plain records here.
    """
    data = record.data
    if not is_aggregated(data):
        return None
    view = memoryview(data)
    if hashlib.md5(view[_MAGIC_BYTES:-_MD5_BYTES], usedforsecurity=False).digest() != data[-_MD5_BYTES:]:
        return None
    try:
        partition_keys, hash_keys, key_indices, hash_key_indices, payloads = _parse(data)
        keys: list[str] = [partition_keys[i] for i in key_indices]
        explicit: list[str | None] | None = None
        if hash_key_indices is not None:
            explicit = [None if i is None else hash_keys[i] for i in hash_key_indices]
    except (_Malformed, IndexError):
        return None
    if not payloads:
        return None  # nothing to emit in its place: dropping it would lose what somebody wrote

    outside = 0
    if hash_key_range is not None and hash_key_range != FULL_RANGE:
        outside = _count_outside(hash_key_range, keys, explicit)
        if outside and hash_filter is HashFilter.KCL:
            return UserRecords([], outside)
    # One pass in C over whole columns: twice as fast as a constructor call per turn of a Python loop.
    columns = map(
        KinesisRecord,
        payloads,
        repeat(record.sequence_number),
        keys,
        repeat(record.approximate_arrival_seconds),
        repeat(record.encryption_type),
        range(len(payloads)),
        repeat(None) if explicit is None else explicit,
        repeat(record.shard_id),
        repeat(record.stream),
    )
    return UserRecords(list(columns), outside)


def hash_key_of(partition_key: str, explicit_hash_key: str | None) -> int:
    """Return the hash key that decides a record's shard.

    Raises:
        ValueError: `explicit_hash_key` is not a decimal number from 0 to 2^128-1.
    """
    if explicit_hash_key is None:
        return int.from_bytes(_md5(partition_key), "big")
    return int.from_bytes(_explicit(explicit_hash_key), "big")


@lru_cache(maxsize=16_384)  # keys recur, and hashing one costs as much as taking its record apart
def _md5(partition_key: str) -> bytes:
    # A lone surrogate has no UTF-8; such a key is refused before it is written and is never the result of a decode.
    return hashlib.md5(partition_key.encode(), usedforsecurity=False).digest()


def _explicit(hash_key: str) -> bytes:
    if hash_key.isascii() and hash_key.isdigit() and len(hash_key) <= _MAX_HASH_KEY_DIGITS:
        number = int(hash_key)
        if number <= MAX_HASH_KEY:
            return number.to_bytes(16, "big")
    raise ValueError(f"explicit_hash_key must be a decimal number from 0 to 2^128-1, got {hash_key[:50]!r}")


def _count_outside(shard: HashKeyRange, keys: list[str], explicit: list[str | None] | None) -> int:
    # Sixteen big-endian bytes compare as the numbers do. Each key is hashed once, however often it is used.
    start, end = shard.start.to_bytes(16, "big"), shard.end.to_bytes(16, "big")
    if explicit is None:
        outside_keys = {key for key in set(keys) if not start <= _md5(key) <= end}
        return sum(key in outside_keys for key in keys) if outside_keys else 0
    seen: dict[tuple[str, str | None], bool] = {}
    count = 0
    for pair in zip(keys, explicit, strict=True):
        outside = seen.get(pair)
        if outside is None:
            key, hash_key = pair
            try:
                outside = not start <= (_md5(key) if hash_key is None else _explicit(hash_key)) <= end
            except ValueError:
                outside = True  # no number is in no range
            seen[pair] = outside
        count += outside
    return count


# --- reading protobuf -------------------------------------------------------------------------------------------


class _Malformed(Exception):
    """Not a protobuf message, or one without its required fields."""


_Parsed = tuple[list[str], list[str], list[int], "list[int | None] | None", list[bytes]]


def _parse(data: bytes) -> _Parsed:
    """Return both tables, then by record the indices into them (None: no record has an explicit one) and the data.

    Indices are left as they are: tables and records may come in any order and in pieces.
    """
    partition_keys: list[str] = []
    hash_keys: list[str] = []
    key_indices: list[int] = []
    hash_key_indices: list[int | None] = []
    payloads: list[bytes] = []
    any_hash_key = False
    at = _MAGIC_BYTES
    end = len(data) - _MD5_BYTES
    while at < end:
        tag = data[at]
        if tag == 0x1A:
            # A record as everybody writes it: fields in order, lengths and indices of one or two bytes (so below
            # 0x4000; a third byte shows as more). Reads run past `end` into the MD5 at worst; one comparison at
            # the end validates them all. Whatever does not fit is parsed again, with care.
            i = at + 2
            stop = data[at + 1]
            if stop > 0x7F:
                stop += (data[i] << 7) - 0x80
                i += 1
            is_short = stop < 0x4000
            stop += i
            if is_short and data[i] == 0x08 and stop <= end:
                key_index = data[i + 1]
                i += 2
                if key_index > 0x7F:
                    key_index += (data[i] << 7) - 0x80
                    i += 1
                tag = data[i]
                hash_key_index = None
                if tag == 0x10:
                    hash_key_index = data[i + 1]
                    i += 2
                    if hash_key_index > 0x7F:
                        hash_key_index += (data[i] << 7) - 0x80
                        i += 1
                    tag = data[i]
                length = data[i + 1]
                i += 2
                if length > 0x7F:
                    length += (data[i] << 7) - 0x80
                    i += 1
                if (
                    tag == 0x1A
                    and i + length == stop
                    and key_index < 0x4000
                    and (hash_key_index is None or hash_key_index < 0x4000)
                ):
                    key_indices.append(key_index)
                    hash_key_indices.append(hash_key_index)
                    if hash_key_index is not None:
                        any_hash_key = True
                    payloads.append(data[i:stop])
                    at = stop
                    continue
        elif tag == 0x0A or tag == 0x12:
            length = data[at + 1]
            stop = at + 2 + length
            if length < 0x80 and stop <= end:
                (partition_keys if tag == 0x0A else hash_keys).append(data[at + 2 : stop].decode("utf-8", "replace"))
                at = stop
                continue
        tag, at = _varint(data, at, end)
        tag &= 0xFFFFFFFF
        if tag in (0x0A, 0x12, 0x1A):
            at, stop = _delimited(data, at, end)
            if tag == 0x0A:
                partition_keys.append(data[at:stop].decode("utf-8", "replace"))
            elif tag == 0x12:
                hash_keys.append(data[at:stop].decode("utf-8", "replace"))
            else:
                key_index, hash_key_index, payload = _parse_record(data, at, stop)
                key_indices.append(key_index)
                hash_key_indices.append(hash_key_index)
                any_hash_key = any_hash_key or hash_key_index is not None
                payloads.append(payload)
            at = stop
        else:
            at = _skip(data, at, end, tag)
    return partition_keys, hash_keys, key_indices, hash_key_indices if any_hash_key else None, payloads


def _parse_record(data: bytes, at: int, end: int) -> tuple[int, int | None, bytes]:
    """Parse one Record of any legal shape: fields in any order, repeated (the last counts), unknown ones between."""
    key_index = hash_key_index = payload = None
    while at < end:
        tag, at = _varint(data, at, end)
        tag &= 0xFFFFFFFF
        if tag == 0x08:
            key_index, at = _varint(data, at, end)
        elif tag == 0x10:
            hash_key_index, at = _varint(data, at, end)
        elif tag == 0x1A:
            at, stop = _delimited(data, at, end)
            payload, at = data[at:stop], stop
        elif tag == 0x22:
            at, stop = _delimited(data, at, end)
            _check_tag(data, at, stop)
            at = stop
        else:
            at = _skip(data, at, end, tag)
    if key_index is None or payload is None:
        raise _Malformed
    return key_index, hash_key_index, payload


def _check_tag(data: bytes, at: int, end: int) -> None:
    """Tags are not given on; but one without its required key makes the KCL refuse the message."""
    has_key = False
    while at < end:
        tag, at = _varint(data, at, end)
        tag &= 0xFFFFFFFF
        has_key = has_key or tag == 0x0A
        at = _skip(data, at, end, tag)
    if not has_key:
        raise _Malformed


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """At most ten bytes, overlong ones allowed, bits beyond the 64th dropped: as protobuf-java reads them."""
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
        shift += 7
    raise _Malformed


def _delimited(data: bytes, at: int, end: int) -> tuple[int, int]:
    length, at = _varint(data, at, end)
    stop = at + (length & 0xFFFFFFFF)
    if stop > end:
        raise _Malformed
    return at, stop


def _skip(data: bytes, at: int, end: int, tag: int) -> int:
    """Return where the field that begins with `tag` (already read) ends."""
    open_groups: list[int] = []
    while True:
        field, wire = tag >> 3, tag & 7
        if field == 0:
            raise _Malformed
        if wire == 0:
            _, at = _varint(data, at, end)
        elif wire == 1:
            at += 8
        elif wire == 2:
            _, at = _delimited(data, at, end)
        elif wire == 3:
            open_groups.append(field)
            if len(open_groups) > _MAX_GROUP_DEPTH:
                raise _Malformed
        elif wire == 4:
            if not open_groups or open_groups.pop() != field:
                raise _Malformed
        elif wire == 5:
            at += 4
        else:
            raise _Malformed
        if at > end:
            raise _Malformed
        if not open_groups:
            return at
        tag, at = _varint(data, at, end)
        tag &= 0xFFFFFFFF


# --- writing ----------------------------------------------------------------------------------------------------


class Aggregate:
    """User records on their way into one Kinesis record. Not safe to use from several threads at once.

    The caller chooses what goes in. Only user records of one hash key can never be torn apart by a reshard,
    and so never be dropped by the KCL.
    """

    __slots__ = ("max_bytes", "_bytes", "_first", "_fields", "_partition_keys", "_hash_keys", "_parts")

    def __init__(self, max_bytes: int = DEFAULT_MAX_RECORD_BYTES) -> None:
        self.max_bytes = max_bytes
        self._first: tuple[str, str | None, bytes] | None = None
        self._bytes = _MAGIC_BYTES + _MD5_BYTES + len(AGGREGATE_PARTITION_KEY)
        self._fields: dict[tuple[str, str | None], bytes] = {}
        self._partition_keys: dict[str, tuple[bytes, bytes]] = {}
        self._hash_keys: dict[str, tuple[bytes, bytes]] = {}
        self._parts: list[bytes] = []

    def __len__(self) -> int:
        """How many user records are in."""
        return len(self._parts) // 2

    @property
    def size_bytes(self) -> int:
        """What the encoded record counts against the limits: data, and partition key in UTF-8. 0 while empty."""
        if len(self._parts) > 2:
            return self._bytes
        if self._first is None:
            return 0
        partition_key, _, data = self._first
        return len(data) + len(partition_key.encode())

    def add(self, partition_key: str, explicit_hash_key: str | None, data: bytes) -> bool:
        """Take a user record in. False: it would not fit, and nothing has changed.

        The first one always fits, as it stays a plain record unless another follows; so a record larger than
        `max_bytes` travels alone, and whether the stream takes it is the caller's to know.

        Raises:
            ValueError: `explicit_hash_key` is not a decimal number from 0 to 2^128-1.
        """
        keys = (partition_key, explicit_hash_key)
        indices = self._fields.get(keys)
        added = 0
        new_key = new_hash_key = None
        if indices is None:
            entry = self._partition_keys.get(partition_key)
            if entry is None:
                encoded = partition_key.encode()
                table_entry = b"\x0a" + _to_varint(len(encoded)) + encoded
                entry = new_key = (b"\x08" + _to_varint(len(self._partition_keys)), table_entry)
                added += len(table_entry)
            indices = entry[0]
            if explicit_hash_key is not None:
                entry = self._hash_keys.get(explicit_hash_key)
                if entry is None:
                    _explicit(explicit_hash_key)
                    encoded = explicit_hash_key.encode()
                    table_entry = b"\x12" + _to_varint(len(encoded)) + encoded
                    entry = new_hash_key = (b"\x10" + _to_varint(len(self._hash_keys)), table_entry)
                    added += len(table_entry)
                indices += entry[0]
        length = len(data)
        head = indices + b"\x1a" + (_SHORT[length] if length < _SHORTS else _to_varint(length))
        length += len(head)
        head = b"\x1a" + (_SHORT[length] if length < _SHORTS else _to_varint(length)) + head
        total = self._bytes + added + len(head) + len(data)
        if self._first is None:
            self._first = (partition_key, explicit_hash_key, data)
        elif total > self.max_bytes:
            return False
        if new_key is not None:
            self._partition_keys[partition_key] = new_key
        if explicit_hash_key is not None and new_hash_key is not None:
            self._hash_keys[explicit_hash_key] = new_hash_key
        self._fields[keys] = indices
        self._bytes = total
        self._parts += (head, data)
        return True

    def encode(self) -> tuple[bytes, str, str | None]:
        """Return data, partition key and explicit hash key of the record to write.

        One user record stays as it is. Several become an aggregate, which goes where the first of them belongs.

        Raises:
            ValueError: nothing was added.
        """
        if self._first is None:
            raise ValueError("an aggregate needs at least one user record; add() one before encode()")
        partition_key, explicit_hash_key, data = self._first
        if len(self._parts) == 2:
            return data, partition_key, explicit_hash_key
        message = b"".join(
            [
                *[entry for _, entry in self._partition_keys.values()],
                *[entry for _, entry in self._hash_keys.values()],
                *self._parts,
            ]
        )
        digest = hashlib.md5(message, usedforsecurity=False).digest()
        hash_key = str(hash_key_of(partition_key, explicit_hash_key))
        return MAGIC + message + digest, AGGREGATE_PARTITION_KEY, hash_key


def _to_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


_SHORTS: Final = 2048
_SHORT: Final = [_to_varint(n) for n in range(_SHORTS)]
