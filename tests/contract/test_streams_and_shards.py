"""The contract: streams, their shards and resharding."""

from __future__ import annotations

from itertools import pairwise

import pytest
from contract.kinesis import Kinesis, hash_keys, is_open

from samza_kinesis_io.limits import MAX_HASH_KEY

#: Where a test can move the target's time.
moves_the_clock = pytest.mark.targets("FakeKinesis", "LocalKinesis")
_INVALID = ("InvalidArgumentException", "ValidationException")


# --- streams


def test_a_new_stream_is_creating_and_then_active(kinesis: Kinesis) -> None:
    name = kinesis.name()
    kinesis.call("CreateStream", StreamName=name, ShardCount=1)
    assert kinesis.summary(name)["StreamStatus"] == "CREATING"
    kinesis.settle(name)
    assert kinesis.summary(name)["OpenShardCount"] == 1


def test_a_second_stream_of_a_name_is_refused(kinesis: Kinesis) -> None:
    stream = kinesis.stream()
    with kinesis.refuses("ResourceInUseException"):
        kinesis.call("CreateStream", StreamName=stream, ShardCount=1)


def test_a_missing_stream_is_not_found(kinesis: Kinesis) -> None:
    for operation, params in {
        "DescribeStreamSummary": {},
        "DescribeStream": {},
        "ListShards": {},
        "GetShardIterator": {"ShardId": "shardId-000000000000", "ShardIteratorType": "LATEST"},
        "PutRecord": {"Data": b"x", "PartitionKey": "k"},
        "PutRecords": {"Records": [{"Data": b"x", "PartitionKey": "k"}]},
        "SplitShard": {"ShardToSplit": "shardId-000000000000", "NewStartingHashKey": "1"},
        "DeleteStream": {},
    }.items():
        with kinesis.refuses("ResourceNotFoundException"):
            kinesis.call(operation, StreamName="contract-nowhere", **params)


def test_a_deleted_stream_is_gone(kinesis: Kinesis) -> None:
    stream = kinesis.stream()
    kinesis.call("DeleteStream", StreamName=stream)
    kinesis.let_pass(0.2)
    with kinesis.refuses("ResourceNotFoundException"):
        kinesis.summary(stream)


def test_a_stream_is_described_with_the_defaults_of_the_service(kinesis: Kinesis) -> None:
    summary = kinesis.summary(kinesis.stream(2))
    assert summary["RetentionPeriodHours"] == 24
    assert summary["OpenShardCount"] == 2
    assert summary["EncryptionType"] == "NONE"
    assert summary["StreamModeDetails"] == {"StreamMode": "PROVISIONED"}


def test_the_largest_record_of_a_stream_is_described_and_can_be_raised(kinesis: Kinesis) -> None:
    stream = kinesis.stream()
    assert kinesis.summary(stream).get("MaxRecordSizeInKiB") == 1024
    arn = kinesis.summary(stream)["StreamARN"]
    kinesis.call("UpdateMaxRecordSize", StreamARN=arn, MaxRecordSizeInKiB=2048)
    kinesis.settle(stream)
    assert kinesis.summary(stream)["MaxRecordSizeInKiB"] == 2048
    kinesis.put(stream, bytes(1_500_000))


def test_retention_can_be_raised_and_lowered(kinesis: Kinesis) -> None:
    stream = kinesis.stream()
    kinesis.call("IncreaseStreamRetentionPeriod", StreamName=stream, RetentionPeriodHours=48)
    assert kinesis.summary(stream)["RetentionPeriodHours"] == 48
    kinesis.call("DecreaseStreamRetentionPeriod", StreamName=stream, RetentionPeriodHours=24)
    assert kinesis.summary(stream)["RetentionPeriodHours"] == 24


def test_a_stream_is_addressed_by_its_arn(kinesis: Kinesis) -> None:
    stream = kinesis.stream()
    arn = kinesis.summary(stream)["StreamARN"]
    assert arn.endswith(f":stream/{stream}")
    shard = kinesis.call("ListShards", StreamARN=arn)["Shards"][0]["ShardId"]
    kinesis.call("PutRecord", StreamARN=arn, Data=b"one", PartitionKey="k")
    kinesis.call("PutRecords", StreamARN=arn, Records=[{"Data": b"two", "PartitionKey": "k"}])
    answer = kinesis.call("GetShardIterator", StreamARN=arn, ShardId=shard, ShardIteratorType="TRIM_HORIZON")
    records = kinesis.call("GetRecords", StreamARN=arn, ShardIterator=answer["ShardIterator"])["Records"]
    assert [r["Data"] for r in records] == [b"one", b"two"]
    assert kinesis.call("DescribeStreamSummary", StreamARN=arn)["StreamDescriptionSummary"]["StreamName"] == stream


# --- listing shards


@pytest.mark.parametrize("shards", [1, 3, 4])
def test_open_shards_tile_the_hash_space(kinesis: Kinesis, shards: int) -> None:
    ranges = sorted(hash_keys(s) for s in kinesis.shards(kinesis.stream(shards)))
    assert len(ranges) == shards
    assert ranges[0][0] == 0
    assert ranges[-1][1] == MAX_HASH_KEY
    assert all(left[1] + 1 == right[0] for left, right in pairwise(ranges))


def test_shards_are_numbered_and_open_with_a_starting_sequence_number(kinesis: Kinesis) -> None:
    shards = kinesis.shards(kinesis.stream(2))
    assert [s["ShardId"] for s in shards] == ["shardId-000000000000", "shardId-000000000001"]
    for shard in shards:
        assert is_open(shard)
        assert int(shard["SequenceNumberRange"]["StartingSequenceNumber"]) > 0


def test_shards_are_listed_in_pages_by_the_token_alone(kinesis: Kinesis) -> None:
    stream = kinesis.stream(5)
    page = kinesis.call("ListShards", StreamName=stream, MaxResults=2)
    pages = [[s["ShardId"] for s in page["Shards"]]]
    while token := page.get("NextToken"):
        page = kinesis.call("ListShards", NextToken=token, MaxResults=2)
        pages.append([s["ShardId"] for s in page["Shards"]])
    assert [len(p) for p in pages] == [2, 2, 1]
    assert sorted(s for p in pages for s in p) == kinesis.shard_ids(stream)


def test_a_token_beside_the_streams_name_is_refused(kinesis: Kinesis) -> None:
    stream = kinesis.stream(2)
    token = kinesis.call("ListShards", StreamName=stream, MaxResults=1)["NextToken"]
    with kinesis.refuses(*_INVALID):
        kinesis.call("ListShards", StreamName=stream, NextToken=token)


def test_a_token_that_nobody_gave_is_refused(kinesis: Kinesis) -> None:
    with kinesis.refuses(*_INVALID):
        kinesis.call("ListShards", NextToken="bm9ib2R5")


@moves_the_clock
def test_a_token_expires_after_five_minutes(kinesis: Kinesis) -> None:
    stream = kinesis.stream(2)
    token = kinesis.call("ListShards", StreamName=stream, MaxResults=1)["NextToken"]
    kinesis.let_pass(301)
    with kinesis.refuses("ExpiredNextTokenException"):
        kinesis.call("ListShards", NextToken=token)


def test_shards_are_listed_after_a_shard(kinesis: Kinesis) -> None:
    stream = kinesis.stream(3)
    first = kinesis.shard_ids(stream)[0]
    assert kinesis.shard_ids(stream, ExclusiveStartShardId=first) == kinesis.shard_ids(stream)[1:]


def test_the_filter_at_latest_gives_open_shards_only(kinesis: Kinesis) -> None:
    stream = kinesis.stream()
    children = kinesis.split(stream, kinesis.shards(stream)[0])
    assert kinesis.shard_ids(stream, ShardFilter={"Type": "AT_LATEST"}) == [c["ShardId"] for c in children]


def test_the_filter_at_trim_horizon_gives_the_oldest_shards_only(kinesis: Kinesis) -> None:
    stream = kinesis.stream()
    (root,) = kinesis.shards(stream)
    kinesis.split(stream, root)
    assert kinesis.shard_ids(stream, ShardFilter={"Type": "AT_TRIM_HORIZON"}) == [root["ShardId"]]


def test_the_filter_from_trim_horizon_gives_every_shard(kinesis: Kinesis) -> None:
    stream = kinesis.stream()
    kinesis.split(stream, kinesis.shards(stream)[0])
    assert kinesis.shard_ids(stream, ShardFilter={"Type": "FROM_TRIM_HORIZON"}) == kinesis.shard_ids(stream)


def test_the_filters_by_timestamp_leave_out_shards_that_were_closed_before(kinesis: Kinesis) -> None:
    stream = kinesis.stream()
    (root,) = kinesis.shards(stream)
    kinesis.let_pass(1.1)  # sequence numbers, by which some know a shard's age, have whole seconds
    children = [c["ShardId"] for c in kinesis.split(stream, root)]
    kinesis.let_pass(1.1)
    (record,) = kinesis.put(stream, b"now")
    (read,) = kinesis.read(stream, record["ShardId"])
    now = read["ApproximateArrivalTimestamp"]
    for kind in ("AT_TIMESTAMP", "FROM_TIMESTAMP"):
        assert kinesis.shard_ids(stream, ShardFilter={"Type": kind, "Timestamp": now}) == children


# --- resharding


def test_a_split_closes_the_parent_and_opens_two_children(kinesis: Kinesis) -> None:
    stream = kinesis.stream()
    (root,) = kinesis.shards(stream)
    lower, upper = kinesis.split(stream, root)
    parent = kinesis.shards(stream)[0]
    assert not is_open(parent)
    assert hash_keys(lower)[0] == 0
    assert hash_keys(lower)[1] + 1 == hash_keys(upper)[0]
    assert hash_keys(upper)[1] == MAX_HASH_KEY
    ending = int(parent["SequenceNumberRange"]["EndingSequenceNumber"])
    for child in (lower, upper):
        assert child["ParentShardId"] == root["ShardId"]
        assert "AdjacentParentShardId" not in child
        assert is_open(child)
        assert int(child["SequenceNumberRange"]["StartingSequenceNumber"]) > ending
    assert kinesis.summary(stream)["OpenShardCount"] == 2


def test_a_stream_that_splits_is_updating(kinesis: Kinesis) -> None:
    stream = kinesis.stream()
    (root,) = kinesis.shards(stream)
    kinesis.call("SplitShard", StreamName=stream, ShardToSplit=root["ShardId"], NewStartingHashKey="1000")
    assert kinesis.summary(stream)["StreamStatus"] == "UPDATING"
    kinesis.settle(stream)


def test_a_split_outside_the_range_is_refused(kinesis: Kinesis) -> None:
    stream = kinesis.stream(2)
    lower, upper = kinesis.shards(stream)
    for shard, key in ((lower, 0), (lower, hash_keys(upper)[0]), (upper, hash_keys(upper)[0])):
        with kinesis.refuses(*_INVALID):
            kinesis.call("SplitShard", StreamName=stream, ShardToSplit=shard["ShardId"], NewStartingHashKey=str(key))


def test_a_split_of_an_unknown_shard_is_refused(kinesis: Kinesis) -> None:
    stream = kinesis.stream()
    with kinesis.refuses("ResourceNotFoundException"):
        kinesis.call("SplitShard", StreamName=stream, ShardToSplit="shardId-000000000007", NewStartingHashKey="1000")


def test_a_merge_opens_one_child_of_both_parents(kinesis: Kinesis) -> None:
    stream = kinesis.stream(2)
    lower, upper = kinesis.shards(stream)
    child = kinesis.merge(stream, lower, upper)
    assert child["ParentShardId"] == lower["ShardId"]
    assert child["AdjacentParentShardId"] == upper["ShardId"]
    assert hash_keys(child) == (0, MAX_HASH_KEY)
    parents = kinesis.shards(stream)[:2]
    assert not any(is_open(p) for p in parents)
    starting = int(child["SequenceNumberRange"]["StartingSequenceNumber"])
    assert all(int(p["SequenceNumberRange"]["EndingSequenceNumber"]) < starting for p in parents)


def test_a_merge_of_shards_apart_is_refused(kinesis: Kinesis) -> None:
    stream = kinesis.stream(3)
    first, _, third = kinesis.shards(stream)
    with kinesis.refuses(*_INVALID):
        kinesis.call(
            "MergeShards",
            StreamName=stream,
            ShardToMerge=first["ShardId"],
            AdjacentShardToMerge=third["ShardId"],
        )


def test_a_parent_ends_with_its_records_and_its_children(kinesis: Kinesis) -> None:
    stream = kinesis.stream()
    (root,) = kinesis.shards(stream)
    kinesis.put(stream, b"1", b"2")
    children = kinesis.split(stream, root)
    kinesis.put(stream, b"3")
    answers = list(kinesis.answers(kinesis.iterator(stream, root["ShardId"])))
    assert [r["Data"] for a in answers for r in a["Records"]] == [b"1", b"2"]
    assert "NextShardIterator" not in answers[-1]
    assert all("ChildShards" not in a for a in answers[:-1])
    assert sorted(answers[-1]["ChildShards"], key=lambda c: c["ShardId"]) == [
        {"ShardId": c["ShardId"], "ParentShards": [root["ShardId"]], "HashKeyRange": c["HashKeyRange"]}
        for c in children
    ]


def test_a_parents_records_stay_readable_after_a_split(kinesis: Kinesis) -> None:
    stream = kinesis.stream()
    (root,) = kinesis.shards(stream)
    kinesis.put(stream, b"1", b"2")
    children = kinesis.split(stream, root)
    kinesis.put(stream, b"3", ExplicitHashKey="0")
    assert kinesis.data(stream, root["ShardId"]) == [b"1", b"2"]
    assert kinesis.data(stream, children[0]["ShardId"]) == [b"3"]
    assert kinesis.data(stream, children[1]["ShardId"]) == []


def test_both_merged_parents_end_with_the_one_child(kinesis: Kinesis) -> None:
    stream = kinesis.stream(2)
    lower, upper = kinesis.shards(stream)
    kinesis.put(stream, b"low", ExplicitHashKey="0")
    kinesis.put(stream, b"high", ExplicitHashKey=str(MAX_HASH_KEY))
    child = kinesis.merge(stream, lower, upper)
    for parent, data in ((lower, b"low"), (upper, b"high")):
        answers = list(kinesis.answers(kinesis.iterator(stream, parent["ShardId"])))
        assert [r["Data"] for a in answers for r in a["Records"]] == [data]
        assert "NextShardIterator" not in answers[-1]
        (reported,) = answers[-1]["ChildShards"]
        assert reported["ShardId"] == child["ShardId"]
        assert sorted(reported["ParentShards"]) == [lower["ShardId"], upper["ShardId"]]


def test_latest_on_a_closed_shard_is_its_end(kinesis: Kinesis) -> None:
    stream = kinesis.stream()
    (root,) = kinesis.shards(stream)
    kinesis.put(stream, b"1")
    kinesis.split(stream, root)
    answer = kinesis.call("GetRecords", ShardIterator=kinesis.iterator(stream, root["ShardId"], "LATEST"))
    assert answer["Records"] == []
    assert "NextShardIterator" not in answer
    assert len(answer["ChildShards"]) == 2


def test_an_open_iterator_sees_the_end_of_its_shard(kinesis: Kinesis) -> None:
    """A reader that is at the tip when the shard is split learns it from the iterator that it holds."""
    stream = kinesis.stream()
    (root,) = kinesis.shards(stream)
    kinesis.put(stream, b"1")
    iterator = kinesis.call("GetRecords", ShardIterator=kinesis.iterator(stream, root["ShardId"]))["NextShardIterator"]
    kinesis.split(stream, root)
    answer = kinesis.call("GetRecords", ShardIterator=iterator)
    assert answer["Records"] == []
    assert "NextShardIterator" not in answer
    assert len(answer["ChildShards"]) == 2


def test_the_shard_count_can_be_doubled_without_losing_a_record(kinesis: Kinesis) -> None:
    stream = kinesis.stream(2)
    for n in range(20):
        kinesis.put(stream, f"{n}".encode(), key=f"key-{n}")
    kinesis.call("UpdateShardCount", StreamName=stream, TargetShardCount=4, ScalingType="UNIFORM_SCALING")
    kinesis.settle(stream)
    shards = kinesis.shards(stream)
    assert kinesis.summary(stream)["OpenShardCount"] == 4
    ranges = sorted(hash_keys(s) for s in shards if is_open(s))
    assert (ranges[0][0], ranges[-1][1]) == (0, MAX_HASH_KEY)
    assert all(left[1] + 1 == right[0] for left, right in pairwise(ranges))
    read = [data for s in shards for data in kinesis.data(stream, s["ShardId"])]
    assert sorted(read) == sorted(f"{n}".encode() for n in range(20))


def test_the_shard_count_is_not_more_than_doubled_at_once(kinesis: Kinesis) -> None:
    stream = kinesis.stream(2)
    with kinesis.refuses("LimitExceededException", *_INVALID):
        kinesis.call("UpdateShardCount", StreamName=stream, TargetShardCount=5, ScalingType="UNIFORM_SCALING")
