"""The KCL's own AggregatorUtil reads what we write, and reads what we read: same bytes, same user records.

Where we differ on purpose a test says so; everything else must be the same, whatever the bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samza_kinesis_io.aggregation import MAGIC, Aggregate, HashFilter, _Malformed, _parse, deaggregate, hash_key_of
from samza_kinesis_io.limits import MAX_HASH_KEY
from samza_kinesis_io.records import KinesisRecord
from samza_kinesis_io.shards import HashKeyRange

pytestmark = pytest.mark.kcl

User = tuple[str, "str | None", bytes]
#: The quick profile's examples are too few to mutate well, and one costs a fraction of a millisecond here.
thoroughly = settings(max_examples=max(500, settings().max_examples))


class Kcl:
    """The KCL as a function: a request in, an answer out."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        assert "raised" not in answer, answer["raised"]
        return answer

    def deaggregate(self, data: bytes, shard: HashKeyRange | None = None) -> list[User] | None:
        """None: a plain record."""
        request = {"deaggregate": base64.b64encode(data).decode()}
        if shard is not None:
            request |= {"start": str(shard.start), "end": str(shard.end)}
        records = self._ask(request)["records"]
        if [r["aggregated"] for r in records] == [False]:
            assert base64.b64decode(records[0]["data"]) == data
            return None
        assert [r["sub_sequence_number"] for r in records] == list(range(len(records)))
        return [(r["partition_key"], r["explicit_hash_key"], base64.b64decode(r["data"])) for r in records]

    def write(self, users: list[User]) -> bytes:
        """The AggregatedRecord of these user records, as protobuf-java writes it."""
        keys = list(dict.fromkeys(key for key, _, _ in users))
        hash_keys = list(dict.fromkeys(hash_key for _, hash_key, _ in users if hash_key is not None))
        message = {
            "partition_key_table": keys,
            "explicit_hash_key_table": hash_keys,
            "records": [
                (keys.index(key), None if hash_key is None else hash_keys.index(hash_key), base64.b64encode(d).decode())
                for key, hash_key, d in users
            ],
        }
        return base64.b64decode(self._ask({"message": message})["bytes"])


@pytest.fixture(scope="module")
def kcl(kcl_java: list[str]) -> Iterator[Kcl]:
    process = subprocess.Popen(
        [*kcl_java, "Kcl"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
    )
    with process:
        yield Kcl(process)
        assert process.stdin is not None
        process.stdin.close()


def framed(message: bytes) -> bytes:
    return MAGIC + message + hashlib.md5(message).digest()


def ours(
    data: bytes, shard: HashKeyRange | None = None, hash_filter: HashFilter = HashFilter.KEEP
) -> list[User] | None:
    taken = deaggregate(KinesisRecord(data, "4956"), hash_key_range=shard, hash_filter=hash_filter)
    return None if taken is None else [(r.partition_key or "", r.explicit_hash_key, r.data) for r in taken.records]


def written(users: list[User]) -> bytes:
    aggregate = Aggregate(max_bytes=1 << 30)
    for user in users:
        assert aggregate.add(*user)
    return aggregate.encode()[0]


keys = st.one_of(st.sampled_from(["", "k", "m", "ключ", "😀", "a" * 256]), st.text(max_size=20))
hash_keys = st.one_of(st.none(), st.sampled_from(["0", "007"]), st.integers(0, MAX_HASH_KEY).map(str))
user_lists = st.lists(st.tuples(keys, hash_keys, st.binary(max_size=200)), min_size=2, max_size=12)


class TestWhatWeWrite:
    @thoroughly
    @given(users=user_lists)
    def test_the_kcl_takes_it_apart(self, kcl: Kcl, users: list[User]) -> None:
        assert kcl.deaggregate(written(users)) == users

    @thoroughly
    @given(users=user_lists)
    def test_it_is_what_protobuf_java_writes(self, kcl: Kcl, users: list[User]) -> None:
        assert written(users) == framed(kcl.write(users))

    @pytest.mark.parametrize("count", [2, 127, 129, 16_385])
    def test_large_tables_and_large_data_too(self, kcl: Kcl, count: int) -> None:
        users: list[User] = [(f"key-{i}", str(i), bytes(3 * i % 20_000)) for i in range(0, count)]
        assert kcl.deaggregate(written(users)) == users

    @given(user=st.tuples(st.text(min_size=1, max_size=20), hash_keys, st.just(b"")), count=st.integers(2, 5))
    def test_records_of_one_hash_key_are_dropped_by_no_reshard(self, kcl: Kcl, user: User, count: int) -> None:
        """Why the sink aggregates only those: whichever shard gets the aggregate gets all that is in it."""
        aggregate = Aggregate()
        for _ in range(count):
            aggregate.add(*user)
        data, _, outer_hash_key = aggregate.encode()
        shard = HashKeyRange(hash_key_of("", outer_hash_key), hash_key_of("", outer_hash_key))
        assert kcl.deaggregate(data, shard) == [user] * count


class TestWhatWeRead:
    @thoroughly
    @given(users=user_lists, splits=st.tuples(st.integers(0, MAX_HASH_KEY), st.integers(0, MAX_HASH_KEY)))
    def test_the_kcl_filter_drops_what_the_kcl_drops(
        self, kcl: Kcl, users: list[User], splits: tuple[int, int]
    ) -> None:
        shard = HashKeyRange(min(splits), max(splits))
        data = written(users)
        assert ours(data, shard, HashFilter.KCL) == kcl.deaggregate(data, shard)

    @given(users=user_lists, split=st.integers(0, MAX_HASH_KEY))
    def test_by_default_what_the_kcl_drops_is_kept(self, kcl: Kcl, users: list[User], split: int) -> None:
        """Deliberate: without a KPL behind it there is no second copy, and the KCL's drop is a silent loss."""
        data = written(users)
        assert ours(data, HashKeyRange(0, split)) == users
        assert kcl.deaggregate(data, HashKeyRange(0, split)) in (users, [])

    @given(data=st.binary(max_size=60), magic=st.booleans())
    def test_plain_records_and_look_alikes_are_plain_to_both(self, kcl: Kcl, data: bytes, magic: bool) -> None:
        data = MAGIC + data if magic else data
        assert ours(data) is None
        assert kcl.deaggregate(data) is None

    @given(users=user_lists, at=st.integers(0), bit=st.integers(0, 7))
    def test_a_damaged_aggregate_is_plain_to_both(self, kcl: Kcl, users: list[User], at: int, bit: int) -> None:
        data = flip(written(users), at, bit)
        assert ours(data) is None
        assert kcl.deaggregate(data) is None

    def test_a_bad_table_index_loses_records_to_the_kcl_and_none_to_us(self, kcl: Kcl) -> None:
        """Deliberate: the KCL keeps what precedes it (on Java 11 and later it dies); here it is a plain record."""
        data = framed(bytes.fromhex("0a016b 1a0508001a0164 1a0508011a0164 1a0508001a0164"))
        assert kcl.deaggregate(data) == [("k", None, b"d")]
        assert ours(data) is None

    def test_an_index_beyond_32_bits_wraps_around_for_the_kcl_only(self, kcl: Kcl) -> None:
        """Deliberate: such an index is a bad index."""
        data = framed(bytes.fromhex("0a016b 1a09 088080808010 1a0164"))
        assert kcl.deaggregate(data) == [("k", None, b"d")]
        assert ours(data) is None

    def test_an_aggregate_of_no_records_vanishes_for_the_kcl_only(self, kcl: Kcl) -> None:
        """Deliberate: nothing may vanish, so it stays a plain record."""
        data = framed(bytes.fromhex("0a016b"))
        assert kcl.deaggregate(data) == []
        assert ours(data) is None

    def test_an_explicit_hash_key_that_is_no_number_loses_records_to_the_kcl_only(self, kcl: Kcl) -> None:
        """Deliberate: it is given on as it is, and counted as outside the shard."""
        data = framed(bytes.fromhex("0a016b 120178 1a0508001a0164 1a07080010001a0165"))
        assert kcl.deaggregate(data) == [("k", None, b"d")]
        assert ours(data) == [("k", None, b"d"), ("k", "x", b"e")]


# --- any message at all: our parser, with the KCL's rules behind it, predicts the KCL ------------------------------


class Parsed(NamedTuple):
    """What `_parse` gives."""

    partition_keys: list[str]
    hash_keys: list[str]
    key_indices: list[int]
    hash_key_indices: list[int | None] | None
    payloads: list[bytes]


def predicted(data: bytes) -> list[User] | None:
    """What AggregatorUtil does behind the parser, bugs and all."""
    try:
        parsed = Parsed(*_parse(data))
    except _Malformed:
        return None
    users: list[User] = []
    explicit = parsed.hash_key_indices or [None] * len(parsed.payloads)
    for key_index, hash_key_index, payload in zip(parsed.key_indices, explicit, parsed.payloads, strict=True):
        key_at, hash_key_at = as_java_int(key_index), as_java_int(hash_key_index or 0)
        if not 0 <= key_at < len(parsed.partition_keys):
            return users
        hash_key = None
        if hash_key_index is not None:
            if not 0 <= hash_key_at < len(parsed.hash_keys):
                return users
            hash_key = parsed.hash_keys[hash_key_at]
            if re.fullmatch(r"[+-]?\d+", hash_key) is None:
                return users
            if not 0 <= int(hash_key) <= MAX_HASH_KEY:
                return []
        users.append((parsed.partition_keys[key_at], hash_key, payload))
    return users


def as_java_int(value: int) -> int:
    return (value & 0xFFFFFFFF ^ 0x80000000) - 0x80000000


def comparable(users: list[User] | None) -> list[User] | None:
    """Python and Java put different numbers of replacement characters for bytes that are not UTF-8."""
    return users and [(re.sub("\ufffd+", "\ufffd", key), hash_key, data) for key, hash_key, data in users]


def flip(data: bytes, at: int, bit: int) -> bytes:
    at %= len(data)
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def cut_out(data: bytes, at: int, count: int) -> bytes:
    at %= len(data)
    return data[:at] + data[at + count :] or b"\x00"


def put_in(data: bytes, at: int, byte: int) -> bytes:
    at %= len(data)
    return data[:at] + bytes([byte]) + data[at:]


Damage = Callable[[bytes, int, int], bytes]


@thoroughly
@given(
    users=user_lists,
    damages=st.lists(
        st.tuples(st.sampled_from([flip, cut_out, put_in]), st.integers(0), st.integers(0, 7)), min_size=1, max_size=4
    ),
)
def test_a_damaged_message_is_the_same_to_both(
    kcl: Kcl, users: list[User], damages: list[tuple[Damage, int, int]]
) -> None:
    message = written(users)[4:-16]
    for damage, at, n in damages:
        message = damage(message, at, n)
    assert comparable(kcl.deaggregate(framed(message))) == comparable(predicted(framed(message)))


def varint(n: int) -> bytes:
    out = b""
    while n > 0x7F:
        out += bytes([n & 0x7F | 0x80])
        n >>= 7
    return out + bytes([n])


def delimited(field: int, body: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(body)) + body


def joined(parts: list[bytes]) -> bytes:
    return b"".join(parts)


numbers = st.one_of(st.integers(0, 3), st.integers(0, (1 << 64) - 1)).map(varint)
stray = st.one_of(
    st.tuples(st.integers(0, 20).map(lambda f: varint(f << 3)), numbers).map(b"".join),
    st.tuples(st.integers(1, 20).map(lambda f: varint(f << 3 | 1)), st.binary(min_size=7, max_size=8)).map(b"".join),
    st.builds(delimited, st.integers(5, 20), st.binary(max_size=5)),
    st.tuples(st.integers(1, 20).map(lambda f: varint(f << 3 | 5)), st.binary(min_size=4, max_size=4)).map(b"".join),
    st.builds(
        lambda f, g, b: varint(f << 3 | 3) + b + varint(g << 3 | 4), st.integers(5, 6), st.integers(5, 6), numbers
    ),
    st.builds(
        lambda f, b: varint(f << 3 | 3) + b + varint(f << 3 | 4), st.integers(1, 9), st.just(b"\x2b\x08\x01\x2c")
    ),
    st.binary(max_size=3),
)
tags = st.lists(
    st.one_of(st.builds(delimited, st.sampled_from([1, 1, 2, 3]), st.binary(max_size=3)), stray), max_size=3
).map(joined)
record_bodies = st.lists(
    st.one_of(
        numbers.map(lambda n: b"\x08" + n),
        st.just(b"\x08\x00"),
        st.builds(delimited, st.just(3), st.binary(max_size=9)),
        numbers.map(lambda n: b"\x10" + n),
        st.builds(delimited, st.just(4), tags),
        stray,
    ),
    max_size=6,
).map(joined)
messages = st.lists(
    st.one_of(
        st.builds(delimited, st.just(1), st.binary(max_size=3)),
        st.builds(delimited, st.just(2), st.sampled_from([b"5", b"77", b"x", b""])),
        st.builds(delimited, st.just(3), record_bodies),
        st.builds(lambda d: delimited(3, b"\x08\x00" + delimited(3, d)), st.binary(max_size=9)),
        stray,
    ),
    max_size=8,
).map(joined)


def overlong(n: int, length: int, last: int) -> bytes:
    """A varint of this length, whatever the number; of ten bytes the last has bits to spare."""
    return b"".join(bytes([n >> 7 * i & 0x7F | 0x80]) for i in range(length - 1)) + bytes([last])


# One oddity in a message that is sound otherwise: where everything is odd, both refuse at the first byte.
odd_records = st.builds(
    lambda oddity, ahead: oddity + b"\x08\x00\x1a\x01d" if ahead else b"\x08\x00\x1a\x01d" + oddity,
    st.one_of(
        stray,
        st.builds(delimited, st.just(4), tags),
        st.sampled_from([b"\x0a", b"\x12", b"\x12\x00", b"\x0a\x00", b"\x0a\x01t\x12\x00", b"\x08\x00"]).map(
            lambda tag: delimited(4, tag)
        ),
        st.builds(overlong, st.just(0), st.integers(2, 11), st.sampled_from([0, 2, 126])).map(lambda n: b"\x08" + n),
        st.builds(overlong, st.just(0x28), st.integers(2, 11), st.sampled_from([0, 16, 126])).map(
            lambda n: n + b"\x00"
        ),
    ),
    st.booleans(),
)
odd_messages = st.builds(
    lambda record, oddity: delimited(1, b"k") + delimited(3, b"\x08\x00\x1a\x01c") + record + oddity,
    odd_records.map(lambda body: delimited(3, body)),
    st.one_of(st.just(b""), stray),
)


@thoroughly
@given(message=st.one_of(odd_messages, messages))
def test_a_strange_message_is_the_same_to_both(kcl: Kcl, message: bytes) -> None:
    """Unknown fields, groups, wrong wire types, fields out of order, twice or missing."""
    assert comparable(kcl.deaggregate(framed(message))) == comparable(predicted(framed(message)) if message else None)
