"""The KPL's aggregate format: bytes as the KPL writes them, and nothing that is not one taken for one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from samza_kinesis_io.aggregation import (
    AGGREGATE_PARTITION_KEY,
    MAGIC,
    Aggregate,
    HashFilter,
    UserRecords,
    _parse,
    deaggregate,
    hash_key_of,
    is_aggregated,
)
from samza_kinesis_io.limits import MAX_HASH_KEY
from samza_kinesis_io.records import KinesisRecord
from samza_kinesis_io.shards import FULL_RANGE, HashKeyRange

User = tuple[str, "str | None", bytes]

#: kinesis_api.md §2.1: (pk0,-,d0), (pk1,"12345",d1), (pk0,-,d2), byte-identical from two other encoders.
GOLDEN = bytes.fromhex(
    "f3899ac2 0a03706b30 0a03706b31 12053132333435 1a0608001a026430 1a08080110001a026431 1a0608001a026432"
    "289db008ede93bad1f07c7c353c749a8"
)
GOLDEN_USERS: list[User] = [("pk0", None, b"d0"), ("pk1", "12345", b"d1"), ("pk0", None, b"d2")]
HASH_OF_PK0 = 11294728369706777121983075228687880902

TABLE = b"\x0a\x01k"  # partition_key_table: "k"
RECORD = b"\x1a\x05\x08\x00\x1a\x01d"  # records: key 0, data "d"


def outer(data: bytes) -> KinesisRecord:
    return KinesisRecord(data, "4956", "a", 1_700_000_000.123, "KMS", shard_id="shardId-000000000007", stream="flights")


def framed(message: bytes) -> KinesisRecord:
    """The record a producer would write for this protobuf, right or wrong."""
    return outer(MAGIC + message + hashlib.md5(message).digest())


def aggregate_of(users: list[User]) -> Aggregate:
    aggregate = Aggregate(max_bytes=1 << 30)
    for user in users:
        assert aggregate.add(*user)
    return aggregate


def users_in(taken: UserRecords | None) -> list[User] | None:
    return None if taken is None else [(r.partition_key or "", r.explicit_hash_key, r.data) for r in taken.records]


def varint(n: int) -> bytes:
    out = b""
    while n > 0x7F:
        out += bytes([n & 0x7F | 0x80])
        n >>= 7
    return out + bytes([n])


class TestTheFormat:
    def test_the_golden_aggregate_is_written_byte_for_byte(self) -> None:
        assert aggregate_of(GOLDEN_USERS).encode() == (GOLDEN, "a", str(HASH_OF_PK0))

    def test_the_golden_aggregate_is_taken_apart(self) -> None:
        assert users_in(deaggregate(outer(GOLDEN))) == GOLDEN_USERS

    def test_index_zero_and_empty_data_are_written(self) -> None:
        """A proto3 encoder leaves them out, and the KCL then takes the aggregate for a plain record."""
        data, _, _ = aggregate_of([("k", None, b""), ("k", None, b"")]).encode()
        assert data[4:-16] == bytes.fromhex("0a016b 1a0408001a00 1a0408001a00")

    def test_user_records_carry_the_place_and_time_of_the_record_they_came_in(self) -> None:
        taken = deaggregate(outer(GOLDEN))
        assert taken is not None
        assert taken.records[1] == KinesisRecord(
            b"d1", "4956", "pk1", 1_700_000_000.123, "KMS", 1, "12345", "shardId-000000000007", "flights"
        )

    def test_sub_sequence_numbers_count_from_zero(self) -> None:
        taken = deaggregate(outer(GOLDEN))
        assert taken is not None
        assert [r.sub_sequence_number for r in taken.records] == [0, 1, 2]

    def test_an_explicit_hash_key_is_given_only_to_the_records_that_have_one(self) -> None:
        """The published Python decoder gives table entry 0 to every record as soon as there is a table."""
        taken = deaggregate(outer(GOLDEN))
        assert taken is not None
        assert [r.explicit_hash_key for r in taken.records] == [None, "12345", None]


class TestHashKeys:
    def test_a_partition_key_hashes_to_its_md5(self) -> None:
        assert hash_key_of("pk0", None) == HASH_OF_PK0
        assert hash_key_of("a", None) == 16955237001963240173058271559858726497

    def test_an_explicit_hash_key_overrides_the_partition_key(self) -> None:
        assert hash_key_of("a", "12345") == 12345
        assert hash_key_of("a", str(MAX_HASH_KEY)) == MAX_HASH_KEY

    @pytest.mark.parametrize(
        "wrong", ["", "-1", "+1", " 1", "1_0", "0x1", "one", "١", str(MAX_HASH_KEY + 1), "9" * 5000]
    )
    def test_an_explicit_hash_key_that_is_no_hash_key_is_refused_by_name(self, wrong: str) -> None:
        with pytest.raises(ValueError, match="explicit_hash_key must be a decimal number from 0 to 2\\^128-1, got"):
            hash_key_of("a", wrong)
        with pytest.raises(ValueError, match="explicit_hash_key"):
            Aggregate().add("a", wrong, b"")


class TestPlainRecords:
    """None means: pass it on as it is."""

    @pytest.mark.parametrize(
        "data",
        [
            pytest.param(b"", id="empty"),
            pytest.param(b"{}", id="short"),
            pytest.param(MAGIC, id="magic alone"),
            pytest.param(MAGIC[:3] + bytes(50), id="most of the magic"),
            pytest.param(MAGIC + b"a plain record that merely starts with the magic", id="look-alike"),
            pytest.param(MAGIC + hashlib.md5(b"").digest(), id="magic and MD5 of nothing"),
            pytest.param(GOLDEN[:-1], id="truncated"),
            pytest.param(GOLDEN + b"\n", id="with something behind it"),
            pytest.param(b"\n" + GOLDEN, id="with something before it"),
            pytest.param(GOLDEN[:-1] + bytes([GOLDEN[-1] ^ 1]), id="bad MD5"),
        ],
    )
    def test_what_is_not_framed_as_an_aggregate_is_a_plain_record(self, data: bytes) -> None:
        assert deaggregate(outer(data)) is None

    @pytest.mark.parametrize(
        "message",
        [
            pytest.param(RECORD, id="no table"),
            pytest.param(TABLE, id="no records"),
            pytest.param(b"\x20\x01", id="nothing but an unknown field"),
            pytest.param(TABLE + b"\x1a\x05\x08\x01\x1a\x01d", id="key index behind the table"),
            pytest.param(TABLE + RECORD + b"\x1a\x05\x08\x01\x1a\x01d", id="bad index in the second record"),
            pytest.param(TABLE + b"\x1a\x07\x08\x00\x10\x00\x1a\x01d", id="hash key index without a table"),
            pytest.param(TABLE + b"\x1a\x0e\x08" + b"\xff" * 9 + b"\x01\x1a\x01d", id="index 2^64-1"),
            pytest.param(TABLE + b"\x1a\x03\x1a\x01d", id="no key index"),
            pytest.param(TABLE + b"\x1a\x02\x08\x00", id="no data"),
            pytest.param(TABLE + b"\x1a\x00", id="empty record"),
            pytest.param(TABLE + b"\x1a\x06\x08\x00\x1a\x01d", id="record longer than the message"),
            pytest.param(TABLE + b"\x1a\x04\x08\x00\x1a\x01d", id="data longer than its record"),
            pytest.param(TABLE + b"\x1a\x06\x08\x00\x1a\x02d", id="record that reaches into the MD5"),
            pytest.param(TABLE + RECORD + b"\x0a\x02k", id="table entry that reaches into the MD5"),
            pytest.param(TABLE + RECORD + b"\x1a", id="ends in a tag"),
            pytest.param(TABLE + RECORD + b"\x80", id="ends in a varint"),
            pytest.param(TABLE + RECORD + b"\x80" * 10 + b"\x01\x00", id="varint of eleven bytes"),
            pytest.param(TABLE + RECORD + b"\x00\x00", id="field number 0"),
            pytest.param(TABLE + RECORD + b"\x26\x00", id="wire type 6"),
            pytest.param(TABLE + RECORD + b"\x27\x00", id="wire type 7"),
            pytest.param(TABLE + RECORD + b"\x2b\x08\x00", id="group without an end"),
            pytest.param(TABLE + RECORD + b"\x2c", id="end of no group"),
            pytest.param(TABLE + RECORD + b"\x2b\x34", id="end of another group"),
            pytest.param(TABLE + RECORD + b"\x2b" * 101 + b"\x2c" * 101, id="groups nested too deep"),
            pytest.param(TABLE + RECORD + b"\x29\x00\x00", id="fixed64 cut short"),
            pytest.param(TABLE + RECORD + b"\x2d\x00\x00", id="fixed32 cut short"),
            pytest.param(TABLE + b"\x1a\x09\x08\x00\x1a\x01d\x22\x02\x12\x00", id="tag without a key"),
        ],
    )
    def test_a_wrong_message_in_a_right_frame_is_a_plain_record(self, message: bytes) -> None:
        """Also where part of it could be read: there is no half-taken-apart record."""
        assert deaggregate(framed(message)) is None

    def test_the_first_test_is_certain_when_it_says_no(self) -> None:
        assert is_aggregated(GOLDEN)
        assert not is_aggregated(b"plain")
        assert not is_aggregated(MAGIC + bytes(16))


class TestLegalShapes:
    """protobuf allows more than anybody writes; the KCL takes it, so we do."""

    @pytest.mark.parametrize(
        ("message", "users"),
        [
            pytest.param(RECORD + TABLE, [("k", None, b"d")], id="table behind the records"),
            pytest.param(
                TABLE + b"\x1a\x05\x08\x01\x1a\x01d" + b"\x0a\x01m", [("m", None, b"d")], id="table in two pieces"
            ),
            pytest.param(TABLE + b"\x1a\x05\x1a\x01d\x08\x00", [("k", None, b"d")], id="fields in another order"),
            pytest.param(
                TABLE + b"\x1a\x0a\x08\x09\x08\x00\x1a\x01x\x1a\x01d",
                [("k", None, b"d")],
                id="the last of repeated fields counts",
            ),
            pytest.param(TABLE + b"\x1a\x07\x08\x80\x00\x1a\x81\x00d", [("k", None, b"d")], id="overlong varints"),
            pytest.param(TABLE + b"\x9a\x80\x80\x00\x05\x08\x00\x1a\x01d", [("k", None, b"d")], id="overlong tag"),
            pytest.param(
                TABLE + b"\x1a\x10\x08" + b"\x80" * 9 + b"\x7e\x1a\x01d" + b"\x28\x00",
                [("k", None, b"d")],
                id="bits beyond the 64th",
            ),
            pytest.param(
                TABLE + b"\x1a\x07\x08\x00\x1a\x01d\x28\x05", [("k", None, b"d")], id="unknown field in a record"
            ),
            pytest.param(
                b"\x28\x96\x01" + TABLE + b"\x29" + bytes(8) + b"\x32\x02xx" + b"\x2d" + bytes(4) + RECORD,
                [("k", None, b"d")],
                id="unknown fields of every wire type",
            ),
            pytest.param(TABLE + RECORD + b"\x2b\x33\x08\x01\x34\x2c", [("k", None, b"d")], id="unknown nested groups"),
            pytest.param(TABLE + b"\x08\x05" + RECORD, [("k", None, b"d")], id="known field, other wire type"),
            pytest.param(TABLE + b"\x1a\x0c\x08\x00\x1a\x01d\x22\x05\x0a\x01t\x12\x00", [("k", None, b"d")], id="tags"),
            pytest.param(b"\x0a\x00" + RECORD, [("", None, b"d")], id="empty partition key"),
            pytest.param(
                b"\x0a\x02\xff\xfe" + RECORD, [("\ufffd\ufffd", None, b"d")], id="partition key that is not UTF-8"
            ),
            pytest.param(
                TABLE + b"\x12\x01x" + b"\x1a\x07\x08\x00\x10\x00\x1a\x01d",
                [("k", "x", b"d")],
                id="hash key that is no number",
            ),
        ],
    )
    def test_it_is_taken_apart(self, message: bytes, users: list[User]) -> None:
        assert users_in(deaggregate(framed(message))) == users

    @pytest.mark.parametrize("size", [0, 1, 120, 127, 128, 16_370, 16_383, 16_384, 70_000, 2_100_000])
    def test_data_of_every_length_comes_back(self, size: int) -> None:
        """Each crosses the border of a varint's length, of the data or of the record around it."""
        users: list[User] = [("k", None, b"\x1a" * size), ("k", "7", b"\x08" * size)]
        assert users_in(deaggregate(outer(aggregate_of(users).encode()[0]))) == users

    @pytest.mark.parametrize("count", [128, 129, 16_385, 17_000])
    def test_tables_of_every_length_come_back(self, count: int) -> None:
        """Each crosses the border of an index's length; 16,384 and above take three bytes."""
        users: list[User] = [(f"key-{i}", str(i), b"") for i in range(count)]
        assert users_in(deaggregate(outer(aggregate_of(users).encode()[0]))) == users


class TestHashFilter:
    LOW = HashKeyRange(0, HASH_OF_PK0)  # holds pk0 and 12345; not "k", not "m"

    def test_everything_is_emitted_and_what_is_outside_is_counted(self) -> None:
        users: list[User] = [
            ("pk0", None, b"in"),
            ("k", None, b"out"),
            ("k", "12345", b"in"),
            ("pk0", "9" * 38, b"out"),
        ]
        taken = deaggregate(outer(aggregate_of(users).encode()[0]), hash_key_range=self.LOW)
        assert users_in(taken) == users
        assert taken is not None
        assert taken.outside_count == 2

    def test_records_without_explicit_hash_keys_are_counted_too(self) -> None:
        users: list[User] = [("pk0", None, b""), ("k", None, b""), ("m", None, b""), ("k", None, b"")]
        taken = deaggregate(outer(aggregate_of(users).encode()[0]), hash_key_range=self.LOW)
        assert users_in(taken) == users
        assert taken is not None
        assert taken.outside_count == 3

    def test_on_request_one_record_outside_drops_the_whole_aggregate_as_the_kcl_does(self) -> None:
        users: list[User] = [("pk0", None, b"in"), ("k", None, b"out")]
        record = outer(aggregate_of(users).encode()[0])
        assert deaggregate(record, hash_key_range=self.LOW, hash_filter=HashFilter.KCL) == ([], 1)
        assert users_in(deaggregate(record, hash_key_range=FULL_RANGE, hash_filter=HashFilter.KCL)) == users
        assert users_in(deaggregate(record, hash_filter=HashFilter.KCL)) == users

    def test_both_ends_of_the_range_are_inside(self) -> None:
        exact = HashKeyRange(HASH_OF_PK0, HASH_OF_PK0)
        record = outer(aggregate_of([("pk0", None, b"x"), ("pk0", None, b"y")]).encode()[0])
        assert deaggregate(record, hash_key_range=exact, hash_filter=HashFilter.KCL) == deaggregate(record)

    def test_an_explicit_hash_key_that_is_no_number_counts_as_outside(self) -> None:
        record = framed(TABLE + b"\x12\x01x" + b"\x1a\x07\x08\x00\x10\x00\x1a\x01d")
        taken = deaggregate(record, hash_key_range=self.LOW)
        assert users_in(taken) == [("k", "x", b"d")]
        assert taken is not None
        assert taken.outside_count == 1


class TestAggregate:
    def test_a_single_record_stays_plain(self) -> None:
        assert aggregate_of([("k", "7", b"data")]).encode() == (b"data", "k", "7")
        assert aggregate_of([("k", None, b"data")]).encode() == (b"data", "k", None)

    def test_the_aggregate_goes_where_its_first_record_belongs(self) -> None:
        _, partition_key, hash_key = aggregate_of([("k", "7", b"1"), ("m", None, b"2")]).encode()
        assert (partition_key, hash_key) == (AGGREGATE_PARTITION_KEY, "7")

    def test_nothing_cannot_be_encoded(self) -> None:
        assert len(Aggregate()) == 0
        assert Aggregate().size_bytes == 0
        with pytest.raises(ValueError, match="add\\(\\) one before encode\\(\\)"):
            Aggregate().encode()

    def test_the_first_record_always_fits(self) -> None:
        aggregate = Aggregate(max_bytes=100)
        assert aggregate.add("k", None, bytes(1000))
        assert not aggregate.add("k", None, b"")
        assert aggregate.encode() == (bytes(1000), "k", None)

    def test_a_record_that_does_not_fit_leaves_nothing_behind(self) -> None:
        aggregate = Aggregate(max_bytes=100)
        assert aggregate.add("k", None, b"1")
        assert aggregate.add("k", "5", b"2")
        before = (aggregate.encode(), len(aggregate), aggregate.size_bytes)
        assert not aggregate.add("another key", "123456", bytes(60))
        assert (aggregate.encode(), len(aggregate), aggregate.size_bytes) == before

    def test_it_can_be_filled_to_the_last_byte(self) -> None:
        full = aggregate_of([("k", None, b"1"), ("m", "5", bytes(300))])
        assert len(full.encode()[0]) + 1 == full.size_bytes
        exact, short = Aggregate(full.size_bytes), Aggregate(full.size_bytes - 1)
        for aggregate in (exact, short):
            aggregate.add("k", None, b"1")
        assert exact.add("m", "5", bytes(300))
        assert not short.add("m", "5", bytes(300))


keys = st.one_of(st.sampled_from(["", "k", "m", "ключ", "a" * 256]), st.text(max_size=20))
hash_keys = st.one_of(st.none(), st.sampled_from(["0", "007"]), st.integers(0, MAX_HASH_KEY).map(str))
users_strategy = st.lists(st.tuples(keys, hash_keys, st.binary(max_size=300)), min_size=2, max_size=30)


@given(users_strategy)
def test_what_is_put_in_comes_out(users: list[User]) -> None:
    aggregate = aggregate_of(users)
    data, partition_key, hash_key = aggregate.encode()
    assert len(aggregate) == len(users)
    assert aggregate.size_bytes == len(data) + len(partition_key)
    assert hash_key == str(hash_key_of(*users[0][:2]))
    assert users_in(deaggregate(outer(data))) == users


@given(users_strategy, st.integers(0, 2000))
def test_an_aggregate_never_grows_over_its_limit_and_loses_nothing(users: list[User], max_bytes: int) -> None:
    written: list[Aggregate] = [Aggregate(max_bytes)]
    for user in users:
        if not written[-1].add(*user):
            written.append(Aggregate(max_bytes))
            assert written[-1].add(*user)
    read: list[User] = []
    for aggregate in written:
        data, partition_key, hash_key = aggregate.encode()
        if len(aggregate) > 1:
            assert len(data) + len(partition_key.encode()) == aggregate.size_bytes <= max_bytes
            read += users_in(deaggregate(outer(data))) or []
        else:
            assert len(data) + len(partition_key.encode()) == aggregate.size_bytes
            read.append((partition_key, hash_key, data))
    assert read == users


def flip(data: bytes, at: int, bit: int) -> bytes:
    at %= len(data)
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


@given(users_strategy, st.integers(0), st.integers(0, 7))
def test_a_flipped_bit_makes_it_a_plain_record(users: list[User], at: int, bit: int) -> None:
    assert deaggregate(outer(flip(aggregate_of(users).encode()[0], at, bit))) is None


@given(users_strategy, st.integers(1))
def test_a_truncated_one_is_a_plain_record(users: list[User], cut: int) -> None:
    data, _, _ = aggregate_of(users).encode()
    assert deaggregate(outer(data[: -(cut % len(data)) or -1])) is None


@given(st.binary(max_size=400))
@example(b"\x1a\x80\x01" + b"\x08\x80\x01")
def test_no_message_makes_it_raise_or_lose_a_record(message: bytes) -> None:
    taken = deaggregate(framed(message), hash_key_range=HashKeyRange(0, 1 << 127))
    assert taken is None or taken.records


def cut_out(data: bytes, at: int, count: int) -> bytes:
    at %= len(data)
    return data[:at] + data[at + count :]


@given(
    users_strategy,
    st.lists(st.tuples(st.sampled_from([flip, cut_out]), st.integers(0), st.integers(0, 7)), min_size=1, max_size=4),
)
def test_no_damaged_message_makes_it_raise_or_lose_a_record(
    users: list[User], damages: list[tuple[Callable[[bytes, int, int], bytes], int, int]]
) -> None:
    """The MD5 is right, as if a buggy producer wrote it, so that the damage reaches the parser."""
    message = aggregate_of(users).encode()[0][4:-16]
    for damage, at, n in damages:
        message = damage(message, at, n) or b"\x00"
    taken = deaggregate(framed(message), hash_key_range=HashKeyRange(0, 1 << 127))
    assert taken is None or taken.records


lengths = st.one_of(st.integers(0, 40_000), st.sampled_from([0, 127, 128, 16_383, 16_384]))


@given(st.lists(st.tuples(lengths, st.none() | lengths, lengths), min_size=1, max_size=5))
@example([(26 << 14, None, 25)])  # the third byte of the index looks like the tag of the data
@example([(0, 26 << 14, 25)])
def test_the_quick_way_reads_what_the_careful_way_reads(shapes: list[tuple[int, int | None, int]]) -> None:
    """An unknown field at the end of each record forces the careful way; without it the quick way is free to try."""
    quick = careful = b""
    for index, explicit, size in shapes:
        fields = b"\x08" + varint(index)
        fields += b"" if explicit is None else b"\x10" + varint(explicit)
        fields += b"\x1a" + varint(size)
        for filler in (b"\x1a", b"\x08", b"\x80"):
            body = fields + filler * size
            quick += b"\x1a" + varint(len(body)) + body
            careful += b"\x1a" + varint(len(body) + 2) + body + b"\x28\x00"
    assert _parse(framed(quick).data) == _parse(framed(careful).data)


def test_the_third_byte_of_a_records_length_is_not_taken_for_its_first_field() -> None:
    """Record length 80 80 08, key index 16 and data whose start looks like a length that fits: the quick way's trap."""
    payload = b"\xf9\x7f" + bytes(24)
    fields = b"\x08\x10" + b"\x1a" + varint(len(payload)) + payload
    unknown = (8 << 14) - len(fields) - 4
    body = fields + b"\x2a" + varint(unknown) + bytes(unknown)
    assert varint(len(body)) == b"\x80\x80\x08"
    message = b"".join(b"\x0a\x02k" + bytes([65 + i]) for i in range(17)) + b"\x1a" + varint(len(body)) + body
    assert users_in(deaggregate(framed(message))) == [("kQ", None, payload)]
