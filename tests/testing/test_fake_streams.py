"""FakeKinesis: streams and shards, their states, resharding and listing."""

from __future__ import annotations

from typing import Any

import pytest
from testing.calls import call, refused

from samza_kinesis_io.limits import MAX_HASH_KEY
from samza_kinesis_io.shards import FULL_RANGE, Shard, uncovered
from samza_kinesis_io.testing import FakeKinesis, SimulatedClock
from samza_kinesis_io.testing.sequence_numbers import SequenceNumber

START = 1_700_000_000.0
HALF = (MAX_HASH_KEY + 1) // 2


@pytest.fixture
def clock() -> SimulatedClock:
    return SimulatedClock(START)


@pytest.fixture
def fake(clock: SimulatedClock) -> FakeKinesis:
    return FakeKinesis(clock=clock)


def status(fake: FakeKinesis, name: str = "s") -> str:
    return call(fake, "DescribeStreamSummary", StreamName=name)["StreamDescriptionSummary"]["StreamStatus"]


def listed(fake: FakeKinesis, **params: Any) -> list[str]:
    return [shard["ShardId"] for shard in call(fake, "ListShards", StreamName="s", **params)["Shards"]]


def shard_id(index: int) -> str:
    return f"shardId-{index:012d}"


class TestStreams:
    def test_a_new_stream_is_active_at_once_without_transition_time(self, fake: FakeKinesis) -> None:
        call(fake, "CreateStream", StreamName="s", ShardCount=2)
        assert status(fake) == "ACTIVE"
        assert [s.hash_key_range.start for s in fake.shards("s")] == [0, HALF]

    def test_a_new_stream_is_creating_for_the_transition_time(self, clock: SimulatedClock) -> None:
        fake = FakeKinesis(clock=clock, transition_seconds=10)
        call(fake, "CreateStream", StreamName="s", ShardCount=1)
        assert status(fake) == "CREATING"
        assert refused(fake, "ListShards", StreamName="s").code == "ResourceInUseException"
        assert (
            refused(fake, "PutRecord", StreamName="s", Data=b"", PartitionKey="k").code == "ResourceNotFoundException"
        )
        clock.advance(10)
        assert status(fake) == "ACTIVE"
        assert listed(fake) == [shard_id(0)]

    def test_a_deleted_stream_is_deleting_then_gone(self, clock: SimulatedClock) -> None:
        fake = FakeKinesis(clock=clock, transition_seconds=10)
        fake.create_stream("s")
        call(fake, "DeleteStream", StreamName="s")
        assert status(fake) == "DELETING"
        clock.advance(10)
        assert refused(fake, "DescribeStreamSummary", StreamName="s").code == "ResourceNotFoundException"

    def test_a_name_is_taken_once(self, fake: FakeKinesis) -> None:
        fake.create_stream("s")
        assert refused(fake, "CreateStream", StreamName="s", ShardCount=1).code == "ResourceInUseException"

    def test_a_stream_is_found_by_its_arn_in_its_own_account_and_region_only(self, fake: FakeKinesis) -> None:
        fake.create_stream("s")
        arn = "arn:aws:kinesis:us-east-1:123456789012:stream/s"
        assert call(fake, "DescribeStream", StreamARN=arn)["StreamDescription"]["StreamName"] == "s"
        other = arn.replace("us-east-1", "eu-west-1")
        assert refused(fake, "DescribeStream", StreamARN=other).code == "ResourceNotFoundException"

    def test_a_provisioned_stream_needs_a_shard_count_and_an_on_demand_one_refuses_it(self, fake: FakeKinesis) -> None:
        assert refused(fake, "CreateStream", StreamName="s").code == "ValidationException"
        on_demand = {"StreamMode": "ON_DEMAND"}
        error = refused(fake, "CreateStream", StreamName="s", ShardCount=1, StreamModeDetails=on_demand)
        assert error.code == "ValidationException"
        call(fake, "CreateStream", StreamName="s", StreamModeDetails=on_demand)
        assert len(fake.shards("s")) == 4

    def test_streams_are_listed_by_name_page_by_page(self, fake: FakeKinesis) -> None:
        for name in ("c", "a", "b"):
            fake.create_stream(name)
        first = call(fake, "ListStreams", Limit=2)
        assert (first["StreamNames"], first["HasMoreStreams"]) == (["a", "b"], True)
        second = call(fake, "ListStreams", NextToken=first["NextToken"])
        assert (second["StreamNames"], second["HasMoreStreams"]) == (["c"], False)
        assert call(fake, "ListStreams", ExclusiveStartStreamName="b")["StreamNames"] == ["c"]

    def test_describe_stream_pages_its_shards(self, fake: FakeKinesis) -> None:
        fake.create_stream("s", shards=3)
        first = call(fake, "DescribeStream", StreamName="s", Limit=2)["StreamDescription"]
        assert first["HasMoreShards"]
        last = first["Shards"][-1]["ShardId"]
        rest = call(fake, "DescribeStream", StreamName="s", ExclusiveStartShardId=last)["StreamDescription"]
        assert [s["ShardId"] for s in rest["Shards"]] == [shard_id(2)]
        assert not rest["HasMoreShards"]

    def test_the_longest_record_of_a_stream_can_be_set(self, fake: FakeKinesis) -> None:
        call(fake, "CreateStream", StreamName="s", ShardCount=1, MaxRecordSizeInKiB=2048)
        arn = call(fake, "DescribeStreamSummary", StreamName="s")["StreamDescriptionSummary"]["StreamARN"]
        call(fake, "UpdateMaxRecordSize", StreamARN=arn, MaxRecordSizeInKiB=10240)
        summary = call(fake, "DescribeStreamSummary", StreamName="s")["StreamDescriptionSummary"]
        assert summary["MaxRecordSizeInKiB"] == 10240
        assert (
            refused(fake, "UpdateMaxRecordSize", StreamARN=arn, MaxRecordSizeInKiB=10241).code == "ValidationException"
        )

    def test_retention_can_only_be_increased_upwards_and_decreased_downwards(self, fake: FakeKinesis) -> None:
        fake.create_stream("s")
        call(fake, "IncreaseStreamRetentionPeriod", StreamName="s", RetentionPeriodHours=48)
        for operation, hours in (
            ("IncreaseStreamRetentionPeriod", 47),
            ("IncreaseStreamRetentionPeriod", 8761),
            ("DecreaseStreamRetentionPeriod", 49),
            ("DecreaseStreamRetentionPeriod", 23),
        ):
            assert (
                refused(fake, operation, StreamName="s", RetentionPeriodHours=hours).code == "InvalidArgumentException"
            )
        call(fake, "DecreaseStreamRetentionPeriod", StreamName="s", RetentionPeriodHours=24)

    def test_what_it_does_not_know_it_says(self, fake: FakeKinesis) -> None:
        assert refused(fake, "CreateQueue").code == "UnknownOperationException"


class TestResharding:
    def test_a_split_closes_the_parent_and_opens_two_children(self, fake: FakeKinesis) -> None:
        fake.create_stream("s")
        call(fake, "SplitShard", StreamName="s", ShardToSplit=shard_id(0), NewStartingHashKey="1000")
        parent, lower, upper = fake.shards("s")
        assert parent.is_closed
        assert (lower.hash_key_range.end, upper.hash_key_range.start) == (999, 1000)
        assert lower.parents == upper.parents == (shard_id(0),)

    def test_a_merge_has_two_parents_and_their_range(self, fake: FakeKinesis) -> None:
        fake.create_stream("s", shards=2)
        call(fake, "MergeShards", StreamName="s", ShardToMerge=shard_id(1), AdjacentShardToMerge=shard_id(0))
        child = fake.shards("s")[-1]
        assert child.parents == (shard_id(1), shard_id(0))
        assert child.hash_key_range == FULL_RANGE

    def test_a_parent_takes_records_until_the_transition_is_over(self, clock: SimulatedClock) -> None:
        fake = FakeKinesis(clock=clock, transition_seconds=10)
        fake.create_stream("s")
        call(fake, "SplitShard", StreamName="s", ShardToSplit=shard_id(0), NewStartingHashKey="1000")
        clock.advance(9)
        assert status(fake) == "UPDATING"
        assert fake.put("s", b"")[0] == shard_id(0)
        clock.advance(1)
        assert status(fake) == "ACTIVE"
        assert fake.put("s", b"")[0] == shard_id(2)

    def test_a_transition_is_over_at_its_time_whenever_somebody_looks(self, clock: SimulatedClock) -> None:
        fake = FakeKinesis(clock=clock, transition_seconds=10)
        fake.create_stream("s")
        call(fake, "SplitShard", StreamName="s", ShardToSplit=shard_id(0), NewStartingHashKey="1000")
        clock.advance(60)
        assert listed(fake, ShardFilter={"Type": "AT_TIMESTAMP", "Timestamp": START + 9}) == [shard_id(0)]
        assert listed(fake, ShardFilter={"Type": "AT_TIMESTAMP", "Timestamp": START + 10}) == [shard_id(1), shard_id(2)]

    def test_a_stream_is_resharded_once_at_a_time(self, clock: SimulatedClock) -> None:
        fake = FakeKinesis(clock=clock, transition_seconds=10)
        fake.create_stream("s", shards=2)
        split = {"StreamName": "s", "NewStartingHashKey": "1000"}
        call(fake, "SplitShard", ShardToSplit=shard_id(0), **split)
        assert refused(fake, "SplitShard", ShardToSplit=shard_id(1), **split).code == "ResourceInUseException"

    def test_impossible_reshardings_are_refused(self, fake: FakeKinesis) -> None:
        fake.create_stream("s", shards=3)

        def split(shard: int, at: int) -> str:
            error = refused(
                fake, "SplitShard", StreamName="s", ShardToSplit=shard_id(shard), NewStartingHashKey=str(at)
            )
            return error.code

        assert split(9, 1000) == "ResourceNotFoundException"
        assert split(0, 1) == "InvalidArgumentException"
        assert split(0, fake.shards("s")[0].hash_key_range.end) == "InvalidArgumentException"
        assert split(0, MAX_HASH_KEY + 1) == "InvalidArgumentException"
        merge = {"StreamName": "s", "ShardToMerge": shard_id(0), "AdjacentShardToMerge": shard_id(2)}
        assert refused(fake, "MergeShards", **merge).code == "InvalidArgumentException"
        fake.split("s", shard_id(0))
        assert split(0, 1000) == "ResourceInUseException"

    @pytest.mark.parametrize(("count", "target"), [(1, 2), (2, 3), (3, 2), (4, 2), (5, 7), (7, 4), (2, 2)])
    def test_update_shard_count_leaves_even_shards_and_an_unbroken_lineage(
        self, fake: FakeKinesis, count: int, target: int
    ) -> None:
        fake.create_stream("s", shards=count)
        answer = call(fake, "UpdateShardCount", StreamName="s", TargetShardCount=target, ScalingType="UNIFORM_SCALING")
        assert (answer["CurrentShardCount"], answer["TargetShardCount"]) == (count, target)
        shards = {s.shard_id: s for s in fake.shards("s")}
        opened = sorted((s for s in shards.values() if not s.is_closed), key=lambda s: s.hash_key_range)
        assert len(opened) == target
        starts = [i * ((MAX_HASH_KEY + 1) // target) for i in range(target)]
        assert [s.hash_key_range.start for s in opened] == starts
        for shard in shards.values():
            assert_born_of_its_parents(shard, shards)

    def test_update_shard_count_from_two_to_three_has_shards_that_live_for_a_moment(self, fake: FakeKinesis) -> None:
        fake.create_stream("s", shards=2)
        call(fake, "UpdateShardCount", StreamName="s", TargetShardCount=3, ScalingType="UNIFORM_SCALING")
        assert [s.shard_id for s in fake.shards("s") if s.is_closed and s.parents] == [shard_id(3), shard_id(4)]

    @pytest.mark.parametrize("target", [9, 1])
    def test_update_shard_count_goes_from_half_to_double(self, fake: FakeKinesis, target: int) -> None:
        fake.create_stream("s", shards=4)
        error = refused(
            fake, "UpdateShardCount", StreamName="s", TargetShardCount=target, ScalingType="UNIFORM_SCALING"
        )
        assert error.code == "LimitExceededException"

    def test_on_demand_streams_are_not_resharded_by_the_caller_but_by_the_service(self, fake: FakeKinesis) -> None:
        fake.create_stream("s", auto_distribution=True)
        split = {"StreamName": "s", "ShardToSplit": shard_id(0), "NewStartingHashKey": "1000"}
        assert refused(fake, "SplitShard", **split).code == "ValidationException"
        assert fake.split("s", shard_id(0)) == (shard_id(1), shard_id(2))


def assert_born_of_its_parents(shard: Shard, shards: dict[str, Shard]) -> None:
    """A child lies within its parents' ranges and its numbers lie above theirs."""
    if not shard.parents:
        return
    parents = [shards[p] for p in shard.parents]
    if len(parents) == 1:
        assert parents[0].hash_key_range.covers(shard.hash_key_range)
    else:
        assert not uncovered(shard.hash_key_range, [p.hash_key_range for p in parents])
    for parent in parents:
        assert parent.ending_sequence_number is not None
        assert shard.starting_sequence_number is not None
        assert parent.ending_sequence_number < shard.starting_sequence_number


class TestListShards:
    def test_pages_follow_each_other_by_token_alone(self, fake: FakeKinesis) -> None:
        fake.create_stream("s", shards=5)
        first = call(fake, "ListShards", StreamName="s", MaxResults=2)
        second = call(fake, "ListShards", NextToken=first["NextToken"], MaxResults=2)
        third = call(fake, "ListShards", NextToken=second["NextToken"])
        ids = [s["ShardId"] for page in (first, second, third) for s in page["Shards"]]
        assert ids == [shard_id(i) for i in range(5)]
        assert "NextToken" not in third

    @pytest.mark.parametrize(
        "other",
        [
            {"StreamName": "s"},
            {"StreamARN": "arn:aws:kinesis:us-east-1:123456789012:stream/s"},
            {"ExclusiveStartShardId": "shardId-000000000000"},
            {"ShardFilter": {"Type": "AT_LATEST"}},
            {"StreamCreationTimestamp": START},
        ],
    )
    def test_a_token_beside_another_argument_is_refused(self, fake: FakeKinesis, other: dict[str, Any]) -> None:
        fake.create_stream("s", shards=2)
        token = call(fake, "ListShards", StreamName="s", MaxResults=1)["NextToken"]
        assert refused(fake, "ListShards", NextToken=token, **other).code == "InvalidArgumentException"

    def test_a_token_lives_300_seconds(self, fake: FakeKinesis, clock: SimulatedClock) -> None:
        fake.create_stream("s", shards=2)
        token = call(fake, "ListShards", StreamName="s", MaxResults=1)["NextToken"]
        clock.advance(300)
        call(fake, "ListShards", NextToken=token)
        clock.advance(0.001)
        assert refused(fake, "ListShards", NextToken=token).code == "ExpiredNextTokenException"

    def test_a_token_it_did_not_give_is_refused(self, fake: FakeKinesis) -> None:
        for token in ("x", "AAAA", "bnVsbA=="):
            assert refused(fake, "ListShards", NextToken=token).code == "InvalidArgumentException"

    def test_a_page_has_at_most_1000_shards_whatever_is_asked(self, fake: FakeKinesis) -> None:
        fake.create_stream("s", shards=1001)
        assert len(listed(fake, MaxResults=5000)) == 1000
        assert refused(fake, "ListShards", StreamName="s", MaxResults=10001).code == "ValidationException"

    def test_a_listing_goes_on_after_a_shard(self, fake: FakeKinesis) -> None:
        fake.create_stream("s", shards=3)
        assert listed(fake, ExclusiveStartShardId=shard_id(0)) == [shard_id(1), shard_id(2)]
        assert listed(fake, ShardFilter={"Type": "AFTER_SHARD_ID", "ShardId": shard_id(1)}) == [shard_id(2)]

    def test_filters_choose_by_when_a_shard_was_open(self, fake: FakeKinesis, clock: SimulatedClock) -> None:
        fake.create_stream("s", shards=2)  # 0 1
        clock.advance(10)
        fake.split("s", shard_id(0))  # 2 3
        clock.advance(10)
        fake.merge("s", shard_id(3), shard_id(1))  # 4

        def at(kind: str, seconds: float | None = None) -> list[int]:
            chosen: dict[str, Any] = {"Type": kind}
            if seconds is not None:
                chosen["Timestamp"] = START + seconds
            return [int(s[-12:]) for s in listed(fake, ShardFilter=chosen)]

        assert at("AT_LATEST") == [2, 4]
        assert at("AT_TRIM_HORIZON") == [0, 1]
        assert at("FROM_TRIM_HORIZON") == [0, 1, 2, 3, 4]
        assert at("AT_TIMESTAMP", 5) == [0, 1]
        assert at("AT_TIMESTAMP", 10) == [1, 2, 3]
        assert at("AT_TIMESTAMP", 20) == [2, 4]
        assert at("FROM_TIMESTAMP", 10) == [0, 1, 2, 3, 4]
        assert at("FROM_TIMESTAMP", 15) == [1, 2, 3, 4]
        assert at("FROM_TIMESTAMP", 20) == [1, 2, 3, 4]
        assert at("AT_TIMESTAMP", -1000) == [0, 1]

    def test_the_trim_horizon_of_a_stream_that_was_creating_for_a_while_has_its_first_shards(
        self, clock: SimulatedClock
    ) -> None:
        fake = FakeKinesis(clock=clock, transition_seconds=10)
        call(fake, "CreateStream", StreamName="s", ShardCount=1)
        clock.advance(20)
        fake.split("s", shard_id(0))
        for at in ({"Type": "AT_TRIM_HORIZON"}, {"Type": "AT_TIMESTAMP", "Timestamp": START}):
            assert listed(fake, ShardFilter=at) == [shard_id(0)]

    def test_so_has_that_of_a_stream_made_between_two_milliseconds(self, clock: SimulatedClock) -> None:
        """Its creation time is rounded down. The KCL asks this way, and died of an empty list."""
        clock.advance(0.0004)
        fake = FakeKinesis(clock=clock)
        fake.create_stream("s", shards=2)
        assert listed(fake, ShardFilter={"Type": "AT_TRIM_HORIZON"}) == [shard_id(0), shard_id(1)]

    def test_a_filter_without_what_it_needs_is_refused(self, fake: FakeKinesis) -> None:
        fake.create_stream("s")
        for shard_filter in (
            {"Type": "AT_TIMESTAMP"},
            {"Type": "AFTER_SHARD_ID"},
            {"Type": "FROM_TIMESTAMP", "Timestamp": START + 1},
        ):
            error = refused(fake, "ListShards", StreamName="s", ShardFilter=shard_filter)
            assert error.code == "InvalidArgumentException"

    def test_a_closed_shard_disappears_when_its_last_record_may_not_be_kept(
        self, fake: FakeKinesis, clock: SimulatedClock
    ) -> None:
        fake.create_stream("s")
        fake.split("s", shard_id(0))
        clock.advance(24 * 3600)
        assert listed(fake) == [shard_id(0), shard_id(1), shard_id(2)]
        clock.advance(1)
        assert listed(fake) == [shard_id(1), shard_id(2)]
        error = refused(fake, "GetShardIterator", StreamName="s", ShardId=shard_id(0), ShardIteratorType="TRIM_HORIZON")
        assert error.code == "ResourceNotFoundException"

    def test_another_creation_time_names_another_stream(self, fake: FakeKinesis) -> None:
        fake.create_stream("s")
        assert listed(fake, StreamCreationTimestamp=START) == [shard_id(0)]
        error = refused(fake, "ListShards", StreamName="s", StreamCreationTimestamp=START - 60)
        assert error.code == "ResourceNotFoundException"


class TestSequenceNumbers:
    def test_a_real_number_says_its_shard_and_time(self) -> None:
        """From Amazon's documentation: shard 0, 2016-03-19T14:23:22Z; its record arrived 14:23:23.342."""
        number = 49559948046087405716686625491085803253240564075691245570
        said = SequenceNumber.decode(number)
        assert (said.shard_index, said.seconds) == (0, 1_458_397_402)
        assert said.encode() == number

    @pytest.mark.parametrize("number", [0, 1, 49559948046087405716686625491085803253240564075691245571, 1 << 186])
    def test_what_has_another_form_is_no_sequence_number(self, number: int) -> None:
        with pytest.raises(ValueError, match="version 2"):
            SequenceNumber.decode(number)

    def test_numbers_of_a_shard_rise_though_the_time_stands_still(self, fake: FakeKinesis) -> None:
        fake.create_stream("s", shards=20)
        numbers = [int(fake.put("s", b"", shard_id=shard_id(17))[1]) for _ in range(1000)]
        assert numbers == sorted(set(numbers))
        assert {SequenceNumber.decode(n).shard_index for n in numbers} == {17}
        assert {n.bit_length() for n in numbers} == {186}

    def test_generations_within_one_second_rise_too(self, fake: FakeKinesis) -> None:
        fake.create_stream("s")
        shard, last = shard_id(0), 0
        for _ in range(5):
            number = int(fake.put("s", b"", shard_id=shard)[1])
            assert number > last
            last = number
            shard = fake.split("s", shard)[0]

    def test_a_stream_of_the_same_name_numbers_differently(self, fake: FakeKinesis) -> None:
        numbers = []
        for _ in range(2):
            fake.create_stream("s")
            numbers.append(fake.put("s", b"")[1])
            fake.call("DeleteStream", {"StreamName": "s"})
        assert numbers[0] != numbers[1]
        fake.create_stream("s")
        error = refused(
            fake,
            "GetShardIterator",
            StreamName="s",
            ShardId=shard_id(0),
            ShardIteratorType="AFTER_SEQUENCE_NUMBER",
            StartingSequenceNumber=numbers[0],
        )
        assert error.code == "InvalidArgumentException"
        assert "did not come from this stream" in error.message
