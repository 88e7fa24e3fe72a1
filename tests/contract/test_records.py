"""The contract: writing and reading records."""

from __future__ import annotations

import hashlib

import pytest
from contract.kinesis import Kinesis, hash_keys, seconds

from samza_kinesis_io.limits import MAX_HASH_KEY

#: Where a test can move the target's time.
moves_the_clock = pytest.mark.targets("FakeKinesis", "LocalKinesis")
_INVALID = ("InvalidArgumentException", "ValidationException")
_MIB = 1024 * 1024


# --- writing


def test_results_come_in_the_order_of_the_entries(kinesis: Kinesis) -> None:
    stream = kinesis.stream(4)
    results = kinesis.put_records(stream, *({"Data": f"{n}".encode(), "PartitionKey": f"key-{n}"} for n in range(20)))
    by_number = {r["SequenceNumber"]: f"{n}".encode() for n, r in enumerate(results)}
    for shard_id in kinesis.shard_ids(stream):
        for record in kinesis.read(stream, shard_id):
            assert by_number.pop(record["SequenceNumber"]) == record["Data"]
    assert by_number == {}


def test_a_partition_key_leads_to_the_shard_that_holds_its_md5(kinesis: Kinesis) -> None:
    stream = kinesis.stream(4)
    shards = kinesis.shards(stream)
    keys = [f"key-{n}" for n in range(30)] + ["\u00e9\u00df\U0001f600"]
    results = kinesis.put_records(stream, *({"Data": b"x", "PartitionKey": k} for k in keys))
    for key, result in zip(keys, results, strict=True):
        hash_key = int.from_bytes(hashlib.md5(key.encode()).digest(), "big")
        (expected,) = (s["ShardId"] for s in shards if hash_keys(s)[0] <= hash_key <= hash_keys(s)[1])
        assert result["ShardId"] == expected


def test_an_explicit_hash_key_leads_to_its_shard_up_to_the_edges(kinesis: Kinesis) -> None:
    stream = kinesis.stream(3)
    for shard in kinesis.shards(stream):
        for edge in hash_keys(shard):
            (result,) = kinesis.put(stream, b"x", ExplicitHashKey=str(edge))
            assert result["ShardId"] == shard["ShardId"]


def test_an_explicit_hash_key_outside_the_hash_space_is_refused(kinesis: Kinesis) -> None:
    stream = kinesis.stream()
    for key in (str(MAX_HASH_KEY + 1), "-1", "x"):
        with kinesis.refuses(*_INVALID):
            kinesis.put(stream, b"x", ExplicitHashKey=key)


def test_sequence_numbers_grow_within_a_shard(kinesis: Kinesis) -> None:
    stream = kinesis.stream()
    (shard,) = kinesis.shards(stream)
    written = [int(r["SequenceNumber"]) for r in kinesis.put(stream, *(b"x" for _ in range(12)))]
    assert written == sorted(set(written))
    assert [int(r["SequenceNumber"]) for r in kinesis.read(stream, shard["ShardId"])] == written
    assert written[0] > int(shard["SequenceNumberRange"]["StartingSequenceNumber"])


def test_sequence_numbers_are_186_bits_long_and_differ_between_shards(kinesis: Kinesis) -> None:
    """Shorter ones, or ones that start at 1 in each shard, hide mistakes of comparing them as text or across shards."""
    stream = kinesis.stream(2)
    edges = [hash_keys(s)[0] for s in kinesis.shards(stream)]
    numbers = [r["SequenceNumber"] for edge in edges for r in kinesis.put(stream, b"x", ExplicitHashKey=str(edge))]
    assert len(set(numbers)) == 2
    assert {int(n).bit_length() for n in numbers} == {186}


def test_more_than_500_entries_are_refused(kinesis: Kinesis) -> None:
    stream = kinesis.stream()
    entry = {"Data": b"x", "PartitionKey": "k"}
    kinesis.put_records(stream, *[entry] * 500)
    with kinesis.refuses(*_INVALID):
        kinesis.put_records(stream, *[entry] * 501)


def test_no_entries_are_refused(kinesis: Kinesis) -> None:
    stream = kinesis.stream()
    with kinesis.refuses(*_INVALID):
        kinesis.put_records(stream)


def test_an_entry_without_partition_key_is_refused(kinesis: Kinesis) -> None:
    stream = kinesis.stream()
    with kinesis.refuses(*_INVALID):
        kinesis.put_records(stream, {"Data": b"x"})


def test_a_partition_key_has_1_to_256_characters(kinesis: Kinesis) -> None:
    """Characters, not bytes: 256 of them may be 1,024 bytes."""
    stream = kinesis.stream()
    kinesis.put(stream, b"x", key="\U0001f600" * 128)
    kinesis.put(stream, b"x", key="\u00e9" * 256)
    for key in ("", "k" * 257):
        with kinesis.refuses(*_INVALID):
            kinesis.put(stream, b"x", key=key)


def test_a_record_of_one_mib_with_its_key_is_accepted(kinesis: Kinesis) -> None:
    kinesis.put(kinesis.stream(), bytes(_MIB - 3), key="key")


def test_a_record_of_more_than_one_mib_is_refused(kinesis: Kinesis) -> None:
    stream = kinesis.stream()
    with kinesis.refuses(*_INVALID):
        kinesis.put(stream, bytes(_MIB + 1), key="key")


def test_the_partition_key_counts_against_the_one_mib(kinesis: Kinesis) -> None:
    stream = kinesis.stream()
    with kinesis.refuses(*_INVALID):
        kinesis.put(stream, bytes(_MIB - 2), key="key")


def test_one_impossible_entry_refuses_the_request_and_nothing_is_written(kinesis: Kinesis) -> None:
    stream = kinesis.stream()
    (shard_id,) = kinesis.shard_ids(stream)
    with kinesis.refuses(*_INVALID):
        kinesis.put_records(stream, {"Data": b"good", "PartitionKey": "k"}, {"Data": b"bad", "PartitionKey": "k" * 257})
    assert kinesis.data(stream, shard_id) == []


def test_an_empty_record_is_a_record(kinesis: Kinesis) -> None:
    stream = kinesis.stream()
    (shard_id,) = kinesis.shard_ids(stream)
    kinesis.put(stream, b"")
    assert kinesis.data(stream, shard_id) == [b""]


# --- reading


def test_a_record_comes_back_as_it_was_put(kinesis: Kinesis) -> None:
    stream = kinesis.stream()
    (shard_id,) = kinesis.shard_ids(stream)
    data = bytes(range(256))
    (result,) = kinesis.put(stream, data, key="\u00e9")
    (record,) = kinesis.read(stream, shard_id)
    assert record["Data"] == data
    assert record["PartitionKey"] == "\u00e9"
    assert record["SequenceNumber"] == result["SequenceNumber"]
    assert seconds(record["ApproximateArrivalTimestamp"]) > 1_600_000_000


def test_limit_cuts_an_answer_and_the_next_goes_on(kinesis: Kinesis) -> None:
    stream = kinesis.stream()
    (shard_id,) = kinesis.shard_ids(stream)
    kinesis.put(stream, *(b"%d" % n for n in range(5)))
    answers = list(kinesis.answers(kinesis.iterator(stream, shard_id), Limit=2))
    assert [[r["Data"] for r in a["Records"]] for a in answers if a["Records"]] == [[b"0", b"1"], [b"2", b"3"], [b"4"]]


def test_limit_must_be_1_to_10_000(kinesis: Kinesis) -> None:
    stream = kinesis.stream()
    iterator = kinesis.iterator(stream, kinesis.shard_ids(stream)[0])
    kinesis.call("GetRecords", ShardIterator=iterator, Limit=10_000)
    for limit in (0, 10_001):
        with kinesis.refuses(*_INVALID):
            kinesis.call("GetRecords", ShardIterator=iterator, Limit=limit)


def test_an_open_shard_always_has_a_next_iterator(kinesis: Kinesis) -> None:
    stream = kinesis.stream()
    answer = kinesis.call("GetRecords", ShardIterator=kinesis.iterator(stream, kinesis.shard_ids(stream)[0]))
    assert answer["Records"] == []
    assert answer["NextShardIterator"]
    assert "ChildShards" not in answer


def test_an_iterator_can_be_used_again(kinesis: Kinesis) -> None:
    """A call whose answer was lost is made again with the same iterator."""
    stream = kinesis.stream()
    kinesis.put(stream, b"x")
    iterator = kinesis.iterator(stream, kinesis.shard_ids(stream)[0])
    for _ in range(2):
        assert [r["Data"] for r in kinesis.call("GetRecords", ShardIterator=iterator)["Records"]] == [b"x"]


def test_an_answer_holds_at_most_ten_mib(kinesis: Kinesis) -> None:
    stream = kinesis.stream()
    for _ in range(12):
        kinesis.put(stream, bytes(_MIB - 10))
    answers = list(kinesis.answers(kinesis.iterator(stream, kinesis.shard_ids(stream)[0])))
    sizes = [sum(len(r["Data"]) for r in a["Records"]) for a in answers]
    assert sum(sizes) == 12 * (_MIB - 10)
    assert max(sizes) <= 10 * _MIB


def test_lag_is_none_at_the_tip_and_some_behind_it(kinesis: Kinesis) -> None:
    stream = kinesis.stream()
    kinesis.put(stream, b"1", b"2")
    kinesis.let_pass(0.05)
    iterator = kinesis.iterator(stream, kinesis.shard_ids(stream)[0])
    behind = kinesis.call("GetRecords", ShardIterator=iterator, Limit=1)
    assert behind["MillisBehindLatest"] > 0
    at_tip = kinesis.call("GetRecords", ShardIterator=behind["NextShardIterator"])
    assert len(at_tip["Records"]) == 1
    assert at_tip["MillisBehindLatest"] == 0


def test_latest_gives_what_comes_after_it(kinesis: Kinesis) -> None:
    stream = kinesis.stream()
    (shard_id,) = kinesis.shard_ids(stream)
    kinesis.put(stream, b"before")
    iterator = kinesis.iterator(stream, shard_id, "LATEST")
    kinesis.put(stream, b"after")
    assert [r["Data"] for r in kinesis.call("GetRecords", ShardIterator=iterator)["Records"]] == [b"after"]


def test_sequence_number_iterators_start_at_or_after_the_record(kinesis: Kinesis) -> None:
    stream = kinesis.stream()
    (shard_id,) = kinesis.shard_ids(stream)
    number = kinesis.put(stream, b"1", b"2", b"3")[1]["SequenceNumber"]
    at = kinesis.data(stream, shard_id, "AT_SEQUENCE_NUMBER", StartingSequenceNumber=number)
    after = kinesis.data(stream, shard_id, "AFTER_SEQUENCE_NUMBER", StartingSequenceNumber=number)
    assert at == [b"2", b"3"]
    assert after == [b"3"]


def test_the_shards_own_starting_sequence_number_is_before_every_record(kinesis: Kinesis) -> None:
    stream = kinesis.stream()
    (shard,) = kinesis.shards(stream)
    kinesis.put(stream, b"1", b"2")
    start = shard["SequenceNumberRange"]["StartingSequenceNumber"]
    for kind in ("AT_SEQUENCE_NUMBER", "AFTER_SEQUENCE_NUMBER"):
        assert kinesis.data(stream, shard["ShardId"], kind, StartingSequenceNumber=start) == [b"1", b"2"]


def test_after_the_last_record_of_a_closed_shard_is_its_end(kinesis: Kinesis) -> None:
    stream = kinesis.stream()
    (root,) = kinesis.shards(stream)
    (last,) = kinesis.put(stream, b"1")
    kinesis.split(stream, root)
    iterator = kinesis.iterator(
        stream, root["ShardId"], "AFTER_SEQUENCE_NUMBER", StartingSequenceNumber=last["SequenceNumber"]
    )
    answer = kinesis.call("GetRecords", ShardIterator=iterator)
    assert answer["Records"] == []
    assert "NextShardIterator" not in answer


def test_a_timestamp_iterator_starts_at_the_first_record_not_before_it(kinesis: Kinesis) -> None:
    stream = kinesis.stream()
    (shard_id,) = kinesis.shard_ids(stream)
    for data in (b"1", b"2", b"3"):
        kinesis.put(stream, data)
        kinesis.let_pass(0.02)
    records = kinesis.read(stream, shard_id)
    arrivals = [seconds(r["ApproximateArrivalTimestamp"]) for r in records]
    assert arrivals == sorted(arrivals)
    for start, expected in (
        (arrivals[1], [b"2", b"3"]),
        (arrivals[1] + 0.001, [b"3"]),
        (arrivals[0] - 3600, [b"1", b"2", b"3"]),
    ):
        assert kinesis.data(stream, shard_id, "AT_TIMESTAMP", Timestamp=start) == expected


def test_a_timestamp_in_the_future_is_refused(kinesis: Kinesis) -> None:
    stream = kinesis.stream()
    (shard_id,) = kinesis.shard_ids(stream)
    kinesis.put(stream, b"x")
    now = seconds(kinesis.read(stream, shard_id)[0]["ApproximateArrivalTimestamp"])
    with kinesis.refuses(*_INVALID):
        kinesis.iterator(stream, shard_id, "AT_TIMESTAMP", Timestamp=now + 3600)


def test_an_iterator_of_an_unknown_shard_is_not_found(kinesis: Kinesis) -> None:
    with kinesis.refuses("ResourceNotFoundException"):
        kinesis.iterator(kinesis.stream(), "shardId-000000000007")


def test_a_sequence_number_of_another_shard_is_refused(kinesis: Kinesis) -> None:
    stream = kinesis.stream(2)
    first, second = kinesis.shard_ids(stream)
    (result,) = kinesis.put(stream, b"x", ExplicitHashKey="0")
    assert result["ShardId"] == first
    with kinesis.refuses(*_INVALID):
        kinesis.iterator(stream, second, "AFTER_SEQUENCE_NUMBER", StartingSequenceNumber=result["SequenceNumber"])


def test_a_text_that_is_no_sequence_number_is_refused(kinesis: Kinesis) -> None:
    stream = kinesis.stream()
    with kinesis.refuses(*_INVALID):
        kinesis.iterator(stream, kinesis.shard_ids(stream)[0], "AT_SEQUENCE_NUMBER", StartingSequenceNumber="first")


def test_a_sequence_number_iterator_needs_its_number(kinesis: Kinesis) -> None:
    stream = kinesis.stream()
    with kinesis.refuses(*_INVALID):
        kinesis.iterator(stream, kinesis.shard_ids(stream)[0], "AFTER_SEQUENCE_NUMBER")


def test_an_iterator_that_nobody_gave_is_refused(kinesis: Kinesis) -> None:
    with kinesis.refuses(*_INVALID):
        kinesis.call("GetRecords", ShardIterator="AAAAAAAAAAEnobody")


@moves_the_clock
def test_an_iterator_expires_after_five_minutes(kinesis: Kinesis) -> None:
    stream = kinesis.stream()
    kinesis.put(stream, b"x")
    iterator = kinesis.iterator(stream, kinesis.shard_ids(stream)[0])
    kinesis.let_pass(299)
    assert len(kinesis.call("GetRecords", ShardIterator=iterator)["Records"]) == 1
    kinesis.let_pass(2)
    with kinesis.refuses("ExpiredIteratorException"):
        kinesis.call("GetRecords", ShardIterator=iterator)


@moves_the_clock
def test_records_are_dropped_after_the_retention(kinesis: Kinesis) -> None:
    stream = kinesis.stream()
    (shard_id,) = kinesis.shard_ids(stream)
    kinesis.put(stream, b"old")
    kinesis.let_pass(23 * 3600)
    kinesis.put(stream, b"new")
    kinesis.let_pass(2 * 3600)
    assert kinesis.data(stream, shard_id) == [b"new"]


@moves_the_clock
def test_a_closed_shard_is_dropped_when_its_records_are(kinesis: Kinesis) -> None:
    stream = kinesis.stream()
    (root,) = kinesis.shards(stream)
    kinesis.put(stream, b"old")
    children = kinesis.split(stream, root)
    kinesis.let_pass(25 * 3600)
    assert kinesis.shard_ids(stream) == [c["ShardId"] for c in children]
    assert kinesis.shards(stream)[0]["ParentShardId"] == root["ShardId"]
    with kinesis.refuses("ResourceNotFoundException"):
        kinesis.iterator(stream, root["ShardId"])
