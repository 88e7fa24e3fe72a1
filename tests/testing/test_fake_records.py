"""FakeKinesis: records written and read, positions, shard ends, retention and limits."""

from __future__ import annotations

import datetime
import hashlib
from typing import Any

import pytest
from testing.calls import call, refused

from samza_kinesis_io.limits import KIB, MAX_HASH_KEY, MIB
from samza_kinesis_io.testing import FakeKinesis, FakeServiceError, SimulatedClock

START = 1_700_000_000.0
SHARD = "shardId-000000000000"


@pytest.fixture
def clock() -> SimulatedClock:
    return SimulatedClock(START)


@pytest.fixture
def fake(clock: SimulatedClock) -> FakeKinesis:
    fake = FakeKinesis(clock=clock)
    fake.create_stream("s")
    return fake


@pytest.fixture
def limited(clock: SimulatedClock) -> FakeKinesis:
    fake = FakeKinesis(clock=clock, enforce_limits=True)
    fake.create_stream("s", max_record_kib=10 * KIB)
    return fake


def iterator(fake: FakeKinesis, kind: str = "TRIM_HORIZON", shard_id: str = SHARD, **params: Any) -> str:
    answer = call(fake, "GetShardIterator", StreamName="s", ShardId=shard_id, ShardIteratorType=kind, **params)
    return str(answer["ShardIterator"])


def data(answer: dict[str, Any]) -> list[bytes]:
    return [record["Data"] for record in answer["Records"]]


def put_many(fake: FakeKinesis, *entries: dict[str, Any]) -> dict[str, Any]:
    return call(fake, "PutRecords", StreamName="s", Records=list(entries))


def entry(payload: bytes = b"x", key: str = "k", **more: Any) -> dict[str, Any]:
    return {"Data": payload, "PartitionKey": key, **more}


class TestReading:
    def test_a_record_comes_back_as_it_was_put(self, fake: FakeKinesis) -> None:
        put = call(fake, "PutRecord", StreamName="s", Data=b"\x00\xff\n", PartitionKey='"ключ"\u2028')
        (record,) = call(fake, "GetRecords", ShardIterator=iterator(fake))["Records"]
        assert record == {
            "Data": b"\x00\xff\n",
            "PartitionKey": '"ключ"\u2028',
            "SequenceNumber": put["SequenceNumber"],
            "ApproximateArrivalTimestamp": START,
        }

    def test_arrival_times_have_milliseconds(self, fake: FakeKinesis, clock: SimulatedClock) -> None:
        clock.advance(0.1234)
        fake.put("s", b"")
        (record,) = call(fake, "GetRecords", ShardIterator=iterator(fake))["Records"]
        assert record["ApproximateArrivalTimestamp"] == START + 0.123

    def test_a_record_is_found_at_the_very_time_it_says(self, fake: FakeKinesis, clock: SimulatedClock) -> None:
        clock.advance(0.1236)
        fake.put("s", b"")
        (record,) = call(fake, "GetRecords", ShardIterator=iterator(fake))["Records"]
        clock.advance(1)
        at = iterator(fake, "AT_TIMESTAMP", Timestamp=record["ApproximateArrivalTimestamp"])
        assert call(fake, "GetRecords", ShardIterator=at)["Records"] == [record]

    def test_the_five_kinds_of_iterators_start_where_they_say(self, fake: FakeKinesis, clock: SimulatedClock) -> None:
        numbers = []
        for i in range(4):
            clock.advance(1)
            numbers.append(fake.put("s", b"%d" % i)[1])

        def read(kind: str, **params: Any) -> list[bytes]:
            return data(call(fake, "GetRecords", ShardIterator=iterator(fake, kind, **params)))

        assert read("TRIM_HORIZON") == [b"0", b"1", b"2", b"3"]
        assert read("LATEST") == []
        assert read("AT_SEQUENCE_NUMBER", StartingSequenceNumber=numbers[2]) == [b"2", b"3"]
        assert read("AFTER_SEQUENCE_NUMBER", StartingSequenceNumber=numbers[2]) == [b"3"]
        assert read("AT_TIMESTAMP", Timestamp=START + 3) == [b"2", b"3"]
        assert read("AT_TIMESTAMP", Timestamp=START + 3.001) == [b"3"]
        assert read("AT_TIMESTAMP", Timestamp=0) == [b"0", b"1", b"2", b"3"]
        utc = datetime.datetime.fromtimestamp(START + 4, datetime.timezone.utc)
        assert read("AT_TIMESTAMP", Timestamp=utc) == [b"3"]

    def test_the_number_that_a_shard_starts_with_is_before_its_first_record(self, fake: FakeKinesis) -> None:
        fake.put("s", b"0")
        start = str(fake.shards("s")[0].starting_sequence_number)
        for kind in ("AT_SEQUENCE_NUMBER", "AFTER_SEQUENCE_NUMBER"):
            at = iterator(fake, kind, StartingSequenceNumber=start)
            assert data(call(fake, "GetRecords", ShardIterator=at)) == [b"0"]

    def test_an_iterator_of_latest_sees_what_comes_after_it(self, fake: FakeKinesis) -> None:
        fake.put("s", b"before")
        latest = iterator(fake, "LATEST")
        fake.put("s", b"after")
        assert data(call(fake, "GetRecords", ShardIterator=latest)) == [b"after"]

    def test_the_same_iterator_gives_the_same_records_again(self, fake: FakeKinesis) -> None:
        fake.put("s", b"0")
        first = iterator(fake)
        assert data(call(fake, "GetRecords", ShardIterator=first)) == data(
            call(fake, "GetRecords", ShardIterator=first)
        )

    def test_limit_and_next_iterator_page_through_a_shard(self, fake: FakeKinesis) -> None:
        for i in range(5):
            fake.put("s", b"%d" % i)
        at, pages = iterator(fake), []
        for _ in range(4):
            answer = call(fake, "GetRecords", ShardIterator=at, Limit=2)
            pages.append(data(answer))
            at = answer["NextShardIterator"]
        assert pages == [[b"0", b"1"], [b"2", b"3"], [b"4"], []]

    def test_an_answer_has_at_most_10_mib_but_one_record_at_least(self, clock: SimulatedClock) -> None:
        fake = FakeKinesis(clock=clock)
        fake.create_stream("s", max_record_kib=10 * KIB)
        sizes = [4 * MIB, 4 * MIB, 4 * MIB, 10 * MIB - 1, 1]
        for size in sizes:
            fake.put("s", b"x" * (size - 1), partition_key="k")
        at, seen = iterator(fake), []
        while len(seen) < 4:
            answer = call(fake, "GetRecords", ShardIterator=at)
            seen.append([len(d) + 1 for d in data(answer)])
            at = answer["NextShardIterator"]
        assert seen == [[4 * MIB, 4 * MIB], [4 * MIB], [10 * MIB - 1, 1], []]

    def test_lag_is_the_age_of_the_oldest_record_not_given_yet(self, fake: FakeKinesis, clock: SimulatedClock) -> None:
        fake.put("s", b"0")
        clock.advance(2.5)
        fake.put("s", b"1")
        clock.advance(1.5)
        first = call(fake, "GetRecords", ShardIterator=iterator(fake), Limit=1)
        assert first["MillisBehindLatest"] == 1500
        clock.advance(0.0004)
        # Rounded up: the time of the answer minus its lag is never later than a record still to come.
        assert call(fake, "GetRecords", ShardIterator=iterator(fake), Limit=1)["MillisBehindLatest"] == 1501
        assert call(fake, "GetRecords", ShardIterator=first["NextShardIterator"])["MillisBehindLatest"] == 0

    def test_a_record_that_came_just_now_still_counts_as_lag(self, fake: FakeKinesis) -> None:
        fake.put("s", b"0")
        fake.put("s", b"1")
        assert call(fake, "GetRecords", ShardIterator=iterator(fake), Limit=1)["MillisBehindLatest"] == 1

    def test_an_iterator_lives_300_seconds_and_each_answer_brings_a_young_one(
        self, fake: FakeKinesis, clock: SimulatedClock
    ) -> None:
        first = iterator(fake)
        clock.advance(300)
        second = call(fake, "GetRecords", ShardIterator=first)["NextShardIterator"]
        clock.advance(0.001)
        error = refused(fake, "GetRecords", ShardIterator=first)
        assert error.code == "ExpiredIteratorException"
        assert "tolerated delay of 300000 milliseconds" in error.message
        call(fake, "GetRecords", ShardIterator=second)

    @pytest.mark.parametrize("text", ["garbage", "AAAAAAAAAA", "AAAAAAAAAAeHx5", "AAAAAAAAAA!!"])
    def test_an_iterator_it_did_not_give_is_refused(self, fake: FakeKinesis, text: str) -> None:
        assert refused(fake, "GetRecords", ShardIterator=text).code == "InvalidArgumentException"

    @pytest.mark.parametrize("limit", [0, 10_001])
    def test_a_limit_out_of_range_is_refused(self, fake: FakeKinesis, limit: int) -> None:
        assert refused(fake, "GetRecords", ShardIterator=iterator(fake), Limit=limit).code == "ValidationException"

    def test_positions_that_make_no_sense_are_refused_in_the_services_words(
        self, fake: FakeKinesis, clock: SimulatedClock
    ) -> None:
        fake.split("s", SHARD)
        _, foreign = fake.put("s", b"", shard_id="shardId-000000000001")

        def message(kind: str, **params: Any) -> str:
            error = refused(fake, "GetShardIterator", StreamName="s", ShardId=SHARD, ShardIteratorType=kind, **params)
            assert error.code == "InvalidArgumentException"
            return error.message

        assert message("AT_SEQUENCE_NUMBER", StartingSequenceNumber=foreign) == (
            "Invalid StartingSequenceNumber. It encodes shardId-000000000001, while it was used in a call to a shard "
            "with shardId-000000000000"
        )
        assert message("AT_TIMESTAMP", Timestamp=START + 1) == (
            "The timestampInMillis parameter cannot be greater than the currentTimestampInMillis. "
            "timestampInMillis: 1700000001000, currentTimestampInMillis: 1700000000000"
        )
        assert "is invalid." in message("AFTER_SEQUENCE_NUMBER", StartingSequenceNumber="1")
        assert "Must either specify" in message("AFTER_SEQUENCE_NUMBER")
        assert "Must either specify" in message("TRIM_HORIZON", StartingSequenceNumber=foreign)
        assert "Must specify timestampInMillis" in message("AT_TIMESTAMP")

    def test_an_unknown_shard_and_an_unknown_kind_are_refused(self, fake: FakeKinesis) -> None:
        params = {"StreamName": "s", "ShardId": "shardId-000000000009", "ShardIteratorType": "LATEST"}
        error = refused(fake, "GetShardIterator", **params)
        assert (error.code, error.message) == (
            "ResourceNotFoundException",
            "Shard shardId-000000000009 in stream s under account 123456789012 does not exist",
        )
        params |= {"ShardId": SHARD, "ShardIteratorType": "NEWEST"}
        assert refused(fake, "GetShardIterator", **params).code == "ValidationException"

    def test_an_iterator_does_not_reach_into_a_later_stream_of_the_same_name(self, fake: FakeKinesis) -> None:
        at = iterator(fake)
        fake.call("DeleteStream", {"StreamName": "s"})
        fake.create_stream("s")
        assert refused(fake, "GetRecords", ShardIterator=at).code == "ResourceNotFoundException"

    def test_a_dry_run_reads_and_writes_nothing(self, fake: FakeKinesis) -> None:
        at = iterator(fake)
        for operation, params in (
            ("GetRecords", {"ShardIterator": at}),
            ("PutRecord", {"StreamName": "s", "Data": b"", "PartitionKey": "k"}),
            ("PutRecords", {"StreamName": "s", "Records": [entry()]}),
            ("GetShardIterator", {"StreamName": "s", "ShardId": SHARD, "ShardIteratorType": "LATEST"}),
        ):
            assert refused(fake, operation, **params, DryRun=True).code == "DryRunOperationException"
        assert fake.records("s") == []


class TestShardEnd:
    def test_the_last_answer_of_a_split_shard_carries_records_and_names_both_children(self, fake: FakeKinesis) -> None:
        fake.put("s", b"0")
        fake.put("s", b"1")
        at = iterator(fake)
        fake.split("s", SHARD, at=1000)
        first = call(fake, "GetRecords", ShardIterator=at, Limit=1)
        assert "ChildShards" not in first
        last = call(fake, "GetRecords", ShardIterator=first["NextShardIterator"])
        assert data(last) == [b"1"]
        assert "NextShardIterator" not in last
        assert last["MillisBehindLatest"] == 0
        assert last["ChildShards"] == [
            {
                "ShardId": "shardId-000000000001",
                "ParentShards": [SHARD],
                "HashKeyRange": {"StartingHashKey": "0", "EndingHashKey": "999"},
            },
            {
                "ShardId": "shardId-000000000002",
                "ParentShards": [SHARD],
                "HashKeyRange": {"StartingHashKey": "1000", "EndingHashKey": str(MAX_HASH_KEY)},
            },
        ]

    def test_a_merge_is_told_to_both_parents(self, fake: FakeKinesis) -> None:
        lower, upper = fake.split("s", SHARD)
        child = fake.merge("s", lower, upper)
        for parent in (lower, upper):
            answer = call(fake, "GetRecords", ShardIterator=iterator(fake, "LATEST", parent))
            assert [(c["ShardId"], c["ParentShards"]) for c in answer["ChildShards"]] == [(child, [lower, upper])]

    def test_an_iterator_taken_before_the_split_reads_to_the_end(self, fake: FakeKinesis) -> None:
        at = iterator(fake, "LATEST")
        fake.put("s", b"0")
        fake.split("s", SHARD)
        fake.put("s", b"1")
        answer = call(fake, "GetRecords", ShardIterator=at)
        assert data(answer) == [b"0"]
        assert len(answer["ChildShards"]) == 2

    def test_an_iterator_at_the_ending_number_of_a_closed_shard_is_at_its_end(self, fake: FakeKinesis) -> None:
        fake.put("s", b"0")
        fake.split("s", SHARD)
        ending = str(fake.shards("s")[0].ending_sequence_number)
        at = iterator(fake, "AT_SEQUENCE_NUMBER", StartingSequenceNumber=ending)
        answer = call(fake, "GetRecords", ShardIterator=at)
        assert answer["Records"] == []
        assert "NextShardIterator" not in answer


class TestWriting:
    def test_a_partition_key_leads_to_the_shard_of_its_md5(self, fake: FakeKinesis) -> None:
        fake.create_stream("many", shards=7)
        ranges = {s.shard_id: s.hash_key_range for s in fake.shards("many")}
        for key in ("a", "ключ", "x" * 256, *map(str, range(100))):
            shard, _ = fake.put("many", b"", partition_key=key)
            assert ranges[shard].contains(int.from_bytes(hashlib.md5(key.encode()).digest(), "big"))

    @pytest.mark.parametrize("key", [0, 999, 1000, MAX_HASH_KEY])
    def test_an_explicit_hash_key_overrides_it_also_at_the_ends_of_ranges(self, fake: FakeKinesis, key: int) -> None:
        fake.split("s", SHARD, at=1000)
        answer = put_many(fake, entry(ExplicitHashKey=str(key)))
        assert answer["Records"][0]["ShardId"] == ("shardId-000000000001" if key < 1000 else "shardId-000000000002")

    def test_outcomes_come_in_the_order_of_the_entries(self, fake: FakeKinesis) -> None:
        fake.split("s", SHARD)
        answer = put_many(fake, *(entry(b"%d" % i, f"k{i}") for i in range(100)))
        assert answer["FailedRecordCount"] == 0
        stored = {r.sequence_number: (r.data, r.shard_id) for r in fake.records("s")}
        assert [stored[o["SequenceNumber"]] for o in answer["Records"]] == [
            (b"%d" % i, o["ShardId"]) for i, o in enumerate(answer["Records"])
        ]

    @pytest.mark.parametrize(
        ("bad", "code"),
        [
            ({"Data": b"x"}, "ValidationException"),
            (entry(key=""), "ValidationException"),
            (entry(key="k" * 257), "ValidationException"),
            (entry(b"x" * MIB), "ValidationException"),
            (entry("text"), "SerializationException"),  # type: ignore[arg-type]
            (entry(ExplicitHashKey=str(MAX_HASH_KEY + 1)), "InvalidArgumentException"),
            (entry(ExplicitHashKey="01"), "ValidationException"),
            (entry(ExplicitHashKey="-1"), "ValidationException"),
        ],
    )
    def test_one_bad_entry_fails_the_whole_request_and_nothing_is_written(
        self, fake: FakeKinesis, bad: dict[str, Any], code: str
    ) -> None:
        assert refused(fake, "PutRecords", StreamName="s", Records=[entry(), bad]).code == code
        assert refused(fake, "PutRecord", StreamName="s", **bad).code == code
        assert fake.records("s") == []

    def test_a_record_may_be_as_long_as_the_stream_allows_key_included(self, fake: FakeKinesis) -> None:
        put_many(fake, entry(b"x" * (MIB - 2), "кк"[:1]))
        assert refused(fake, "PutRecords", StreamName="s", Records=[entry(b"x" * (MIB - 1), "к")]).code

    def test_a_partition_key_of_256_characters_is_taken_however_many_bytes_it_has(self, fake: FakeKinesis) -> None:
        put_many(fake, entry(key="ж" * 256))

    def test_a_request_has_1_to_500_records_and_10_mib(self, fake: FakeKinesis) -> None:
        put_many(fake, *[entry()] * 500)
        assert refused(fake, "PutRecords", StreamName="s", Records=[entry()] * 501).code == "ValidationException"
        assert refused(fake, "PutRecords", StreamName="s", Records=[]).code == "ValidationException"
        put_many(fake, *[entry(b"x" * (MIB - 1))] * 10)
        error = refused(fake, "PutRecords", StreamName="s", Records=[entry(b"x" * (MIB - 1))] * 10 + [entry(b"")])
        assert error.code == "InvalidArgumentException"

    def test_a_stream_that_does_not_exist_takes_nothing(self, fake: FakeKinesis) -> None:
        error = refused(fake, "PutRecords", StreamName="none", Records=[entry()])
        assert error.message == "Stream none under account 123456789012 not found."
        assert error.code == "ResourceNotFoundException"


class TestAutomaticDistribution:
    @pytest.fixture
    def fake(self, clock: SimulatedClock) -> FakeKinesis:
        fake = FakeKinesis(clock=clock)
        fake.create_stream("s", shards=4, auto_distribution=True)
        return fake

    def test_a_record_needs_no_key_and_has_none_then(self, fake: FakeKinesis) -> None:
        answer = put_many(fake, {"Data": b"x"})
        at = iterator(fake, shard_id=answer["Records"][0]["ShardId"])
        (record,) = call(fake, "GetRecords", ShardIterator=at)["Records"]
        assert "PartitionKey" not in record

    def test_a_key_is_given_back_but_does_not_decide_the_shard(self, fake: FakeKinesis) -> None:
        put_many(fake, *[entry(key="same", ExplicitHashKey="0")] * 100)
        assert {r.partition_key for r in fake.records("s")} == {"same"}
        assert len({r.shard_id for r in fake.records("s")}) == 4

    def test_the_strategy_is_described_and_can_be_changed(self, fake: FakeKinesis) -> None:
        arn = "arn:aws:kinesis:us-east-1:123456789012:stream/s"
        summary = call(fake, "DescribeStreamSummary", StreamName="s")["StreamDescriptionSummary"]
        assert summary["RecordDistributionStrategy"] == "AUTO"
        call(
            fake,
            "UpdateStreamRecordDistributionStrategy",
            StreamARN=arn,
            RecordDistributionStrategy="USER_PARTITION_KEY",
        )
        assert refused(fake, "PutRecord", StreamName="s", Data=b"").code == "ValidationException"


class TestRetention:
    def test_records_older_than_the_retention_are_gone(self, fake: FakeKinesis, clock: SimulatedClock) -> None:
        fake.put("s", b"0")
        clock.advance(3600)
        _, second = fake.put("s", b"1")
        clock.advance(23 * 3600)
        assert data(call(fake, "GetRecords", ShardIterator=iterator(fake))) == [b"0", b"1"]
        clock.advance(0.001)
        assert data(call(fake, "GetRecords", ShardIterator=iterator(fake))) == [b"1"]
        assert [r.sequence_number for r in fake.records("s")] == [second]

    def test_an_iterator_on_trimmed_data_silently_goes_on_with_what_is_left(
        self, fake: FakeKinesis, clock: SimulatedClock
    ) -> None:
        _, first = fake.put("s", b"0")
        fake.put("s", b"1")
        clock.advance(1)
        fake.put("s", b"2")
        at = iterator(fake)
        fake.trim("s", before_seconds=START + 1)
        assert data(call(fake, "GetRecords", ShardIterator=at)) == [b"2"]
        after = iterator(fake, "AFTER_SEQUENCE_NUMBER", StartingSequenceNumber=first)
        assert data(call(fake, "GetRecords", ShardIterator=after)) == [b"2"]

    def test_trimming_one_shard_leaves_the_others(self, fake: FakeKinesis) -> None:
        lower, upper = fake.split("s", SHARD)
        fake.put("s", b"l", shard_id=lower)
        fake.put("s", b"u", shard_id=upper)
        fake.trim("s", lower)
        assert [r.data for r in fake.records("s")] == [b"u"]
        assert not [s for s in fake.shards("s") if s.shard_id == lower and s.is_closed]

    def test_trimming_everything_takes_closed_shards_with_it(self, fake: FakeKinesis) -> None:
        fake.put("s", b"0")
        at = iterator(fake)
        children = fake.split("s", SHARD)
        fake.put("s", b"1")
        fake.trim("s")
        assert fake.records("s") == []
        assert [s.shard_id for s in fake.shards("s")] == list(children)
        assert refused(fake, "GetRecords", ShardIterator=at).code == "ResourceNotFoundException"

    def test_what_was_dropped_does_not_come_back_with_a_longer_retention(
        self, fake: FakeKinesis, clock: SimulatedClock
    ) -> None:
        fake.put("s", b"0")
        clock.advance(25 * 3600)
        call(fake, "IncreaseStreamRetentionPeriod", StreamName="s", RetentionPeriodHours=48)
        assert data(call(fake, "GetRecords", ShardIterator=iterator(fake))) == []

    def test_positions_hold_while_old_records_are_dropped_again_and_again(
        self, fake: FakeKinesis, clock: SimulatedClock
    ) -> None:
        """What a reader sees does not depend on how much of the shard's past is kept."""
        at, seen, size = iterator(fake), [], 50 * KIB
        for i in range(300):
            fake.put("s", b"%d" % i + b" " * size)
            clock.advance(1)
            if i % 7 == 0:
                fake.trim("s", before_seconds=START + i - 20)
            if i % 10 == 9:
                answer = call(fake, "GetRecords", ShardIterator=at, Limit=10)
                seen += data(answer)
                at = answer["NextShardIterator"]
        assert [int(d) for d in seen] == list(range(300))
        assert int(fake.records("s")[0].data) == 294 - 20

    def test_an_answer_is_as_large_after_trimming_as_before(self, fake: FakeKinesis) -> None:
        for _ in range(30):
            fake.put("s", b"x" * (MIB - 1), partition_key="k")
        fake.trim("s")
        for _ in range(12):
            fake.put("s", b"x" * (MIB - 1), partition_key="k")
        assert len(call(fake, "GetRecords", ShardIterator=iterator(fake))["Records"]) == 10


class TestLimits:
    def test_five_reads_a_second(self, limited: FakeKinesis, clock: SimulatedClock) -> None:
        at = iterator(limited)
        for _ in range(5):
            call(limited, "GetRecords", ShardIterator=at)
            clock.advance(0.1)
        error = refused(limited, "GetRecords", ShardIterator=at)
        assert error.code == "ProvisionedThroughputExceededException"
        assert SHARD in error.message
        clock.advance(0.5)
        call(limited, "GetRecords", ShardIterator=at)
        assert refused(limited, "GetRecords", ShardIterator=at).code == "ProvisionedThroughputExceededException"

    def test_an_answer_of_10_mib_closes_the_shard_for_five_seconds(
        self, limited: FakeKinesis, clock: SimulatedClock
    ) -> None:
        limited.put("s", b"x" * (10 * MIB - 1), partition_key="k")
        answer = call(limited, "GetRecords", ShardIterator=iterator(limited))
        clock.advance(4.9)
        at = answer["NextShardIterator"]
        assert refused(limited, "GetRecords", ShardIterator=at).code == "ProvisionedThroughputExceededException"
        clock.advance(0.1)
        call(limited, "GetRecords", ShardIterator=at)

    def test_reading_is_two_mib_a_second_in_the_long_run(self, limited: FakeKinesis, clock: SimulatedClock) -> None:
        for _ in range(40):
            limited.put("s", b"x" * (MIB - 1), partition_key="k")
        at, read = iterator(limited), 0
        for _ in range(50):
            clock.advance(0.2)
            try:
                answer = limited.call("GetRecords", {"ShardIterator": at, "Limit": 1})
            except FakeServiceError:
                continue
            at = answer["NextShardIterator"]
            read += len(answer["Records"])
        assert 19 <= read <= 22

    def test_writes_beyond_a_shards_thousand_records_fail_entry_by_entry(
        self, limited: FakeKinesis, clock: SimulatedClock
    ) -> None:
        for _ in range(2):
            assert put_many(limited, *[entry(b"")] * 500)["FailedRecordCount"] == 0
        clock.advance(0.25)
        answer = put_many(limited, *[entry(b"")] * 500)
        assert answer["FailedRecordCount"] == 250
        failed = answer["Records"][-1]
        assert failed["ErrorCode"] == "ProvisionedThroughputExceededException"
        assert failed["ErrorMessage"] == f"Rate exceeded for shard {SHARD} in stream s under account 123456789012."
        assert len(limited.records("s")) == 1250

    def test_writes_beyond_a_shards_mib_fail_too(self, limited: FakeKinesis) -> None:
        answer = put_many(limited, *[entry(b"x" * (300 * KIB))] * 5)
        assert answer["FailedRecordCount"] == 2
        error = refused(limited, "PutRecord", StreamName="s", **entry(b"x" * (300 * KIB)))
        assert error.code == "ProvisionedThroughputExceededException"

    def test_a_record_longer_than_a_seconds_worth_passes_when_the_shard_has_rested(
        self, limited: FakeKinesis, clock: SimulatedClock
    ) -> None:
        put_many(limited, entry(b"x" * (3 * MIB)))
        clock.advance(2)
        assert refused(limited, "PutRecord", StreamName="s", **entry()).code == "ProvisionedThroughputExceededException"
        clock.advance(1)
        put_many(limited, entry())

    def test_shards_are_limited_each_for_itself(self, limited: FakeKinesis) -> None:
        lower, upper = limited.split("s", SHARD)
        for shard in (lower, upper):
            at = iterator(limited, shard_id=shard)
            for _ in range(5):
                call(limited, "GetRecords", ShardIterator=at)

    def test_nothing_is_limited_unless_asked_for(self, fake: FakeKinesis) -> None:
        at = iterator(fake)
        for _ in range(6):
            call(fake, "GetRecords", ShardIterator=at)
        for _ in range(3):
            assert fake.call("PutRecords", {"StreamName": "s", "Records": [entry()] * 500})["FailedRecordCount"] == 0


class TestObserving:
    def test_calls_are_counted_refused_ones_too(self, fake: FakeKinesis) -> None:
        iterator(fake)
        refused(fake, "GetRecords", ShardIterator="garbage")
        assert fake.calls == {"GetShardIterator": 1, "GetRecords": 1}

    def test_calls_are_logged_with_their_time_if_asked_for(self, clock: SimulatedClock) -> None:
        fake = FakeKinesis(clock=clock, log_calls=True)
        fake.create_stream("s")
        clock.advance(1)
        at = iterator(fake)
        clock.advance(1)
        call(fake, "GetRecords", ShardIterator=at)
        assert [(c.seconds - START, c.operation) for c in fake.log] == [(1, "GetShardIterator"), (2, "GetRecords")]
        assert fake.log[1].params == {"ShardIterator": at}

    def test_records_come_parents_first_with_shard_and_stream(self, fake: FakeKinesis) -> None:
        fake.put("s", b"parent")
        lower, upper = fake.split("s", SHARD)
        fake.put("s", b"upper", shard_id=upper)
        fake.put("s", b"lower", shard_id=lower)
        assert [(r.data, r.shard_id, r.stream) for r in fake.records("s")] == [
            (b"parent", SHARD, "s"),
            (b"lower", lower, "s"),
            (b"upper", upper, "s"),
        ]
        assert [r.data for r in fake.records("s", lower)] == [b"lower"]


def test_a_record_put_in_the_millisecond_in_which_its_stream_was_created_is_kept() -> None:
    """Arrival times are rounded to milliseconds, so it seems to be older than the stream."""
    clock = SimulatedClock(1_700_000_000.1234)
    fake = FakeKinesis(clock=clock)
    fake.create_stream("flights")
    fake.put("flights", b"first")
    assert [r.data for r in fake.records("flights")] == [b"first"]
