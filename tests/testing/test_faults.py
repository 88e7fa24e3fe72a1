"""Faults: what is arranged happens, as often as arranged, and nothing else does."""

from __future__ import annotations

from typing import Any

import pytest
from testing.calls import call, refused

from samza_kinesis_io.testing import DroppedConnection, FakeKinesis, FakeServiceError, SimulatedClock

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


def iterator(fake: FakeKinesis) -> str:
    params = {"StreamName": "s", "ShardId": SHARD, "ShardIteratorType": "TRIM_HORIZON"}
    return str(call(fake, "GetShardIterator", **params)["ShardIterator"])


def outcomes(fake: FakeKinesis, calls: int, operation: str = "DescribeStreamSummary", **params: Any) -> list[str]:
    """Return "ok" or the code of each of some calls."""
    seen = []
    for _ in range(calls):
        try:
            fake.call(operation, params or {"StreamName": "s"})
            seen.append("ok")
        except FakeServiceError as error:
            seen.append(error.code)
    return seen


THROTTLED = "ProvisionedThroughputExceededException"


def test_a_throttle_strikes_as_often_as_it_says(fake: FakeKinesis) -> None:
    fault = fake.faults.throttle("DescribeStreamSummary", times=2)
    assert outcomes(fake, 4) == [THROTTLED, THROTTLED, "ok", "ok"]
    assert fault.hits == 2


def test_a_fault_lets_some_calls_pass_first(fake: FakeKinesis) -> None:
    fake.faults.throttle("DescribeStreamSummary", after=2)
    assert outcomes(fake, 4) == ["ok", "ok", THROTTLED, "ok"]


def test_a_fault_concerns_its_own_operation_or_all(fake: FakeKinesis) -> None:
    fake.faults.throttle("ListShards", times=None)
    assert outcomes(fake, 1) == ["ok"]
    everywhere = fake.faults.fail("*", "AccessDeniedException", times=None)
    assert outcomes(fake, 1) == ["AccessDeniedException"]
    assert outcomes(fake, 1, "ListShards", StreamName="s") == [THROTTLED]
    everywhere.cancel()
    assert outcomes(fake, 1) == ["ok"]
    fake.faults.clear()
    assert outcomes(fake, 1, "ListShards", StreamName="s") == ["ok"]


def test_a_fault_can_choose_by_the_parameters(fake: FakeKinesis) -> None:
    fake.create_stream("t")
    fake.faults.throttle("DescribeStreamSummary", times=None, where=lambda params: params["StreamName"] == "t")
    assert outcomes(fake, 1) == ["ok"]
    assert outcomes(fake, 1, "DescribeStreamSummary", StreamName="t") == [THROTTLED]


def test_chance_is_seeded(clock: SimulatedClock) -> None:
    seen = []
    for _ in range(2):
        fake = FakeKinesis(clock=clock)
        fake.create_stream("s")
        fake.faults.throttle("DescribeStreamSummary", times=None, probability=0.3)
        seen.append(outcomes(fake, 1000))
    assert seen[0] == seen[1]
    assert 250 < seen[0].count(THROTTLED) < 350


def test_of_two_errors_for_one_call_the_second_waits_for_the_next(fake: FakeKinesis) -> None:
    fake.faults.throttle("DescribeStreamSummary")
    fake.faults.internal_failure("DescribeStreamSummary")
    assert outcomes(fake, 3) == [THROTTLED, "InternalFailureException", "ok"]


def test_an_error_has_a_status_that_fits_its_code(fake: FakeKinesis) -> None:
    fake.faults.internal_failure("ListShards")
    assert refused(fake, "ListShards", StreamName="s").status == 500
    fake.faults.deny_access("ListShards")
    assert refused(fake, "ListShards", StreamName="s").status == 400


def test_any_code_and_message_can_be_had(fake: FakeKinesis) -> None:
    fake.faults.fail("ListShards", "KMSDisabledException", message="off")
    error = refused(fake, "ListShards", StreamName="s")
    assert (error.code, error.message) == ("KMSDisabledException", "off")


def test_an_error_before_the_effect_leaves_nothing_written_and_one_after_it_does(fake: FakeKinesis) -> None:
    put = {"StreamName": "s", "Records": [{"Data": b"x", "PartitionKey": "k"}]}
    fake.faults.internal_failure("PutRecords")
    refused(fake, "PutRecords", **put)
    assert fake.records("s") == []
    fake.faults.internal_failure("PutRecords", moment="after")
    refused(fake, "PutRecords", **put)
    assert len(fake.records("s")) == 1


@pytest.mark.parametrize(("moment", "written"), [("before", 0), ("after", 1)])
def test_a_connection_can_drop_before_or_after_the_effect(fake: FakeKinesis, moment: Any, written: int) -> None:
    fake.faults.drop_connection("PutRecord", moment=moment)
    with pytest.raises(DroppedConnection):
        fake.call("PutRecord", {"StreamName": "s", "Data": b"x", "PartitionKey": "k"})
    assert len(fake.records("s")) == written


def test_a_delay_lets_time_pass_before_the_call(fake: FakeKinesis, clock: SimulatedClock) -> None:
    fake.faults.delay("PutRecord", 2.5)
    call(fake, "PutRecord", StreamName="s", Data=b"x", PartitionKey="k")
    assert clock.now_seconds() == START + 2.5
    assert fake.records("s")[0].approximate_arrival_seconds == START + 2.5


class TestFailingEntries:
    def put(self, fake: FakeKinesis, count: int) -> list[str]:
        records = [{"Data": b"%d" % i, "PartitionKey": "k"} for i in range(count)]
        answer = call(fake, "PutRecords", StreamName="s", Records=records)
        codes = [o.get("ErrorCode", "") for o in answer["Records"]]
        assert answer["FailedRecordCount"] == sum(map(bool, codes))
        return codes

    def written(self, fake: FakeKinesis) -> list[bytes]:
        return [r.data for r in fake.records("s")]

    def test_chosen_by_place(self, fake: FakeKinesis) -> None:
        fake.faults.fail_entries(indexes={0, 2}, code="InternalFailure", message="no")
        assert self.put(fake, 4) == ["InternalFailure", "", "InternalFailure", ""]
        assert self.written(fake) == [b"1", b"3"]

    def test_every_nth_over_several_requests(self, fake: FakeKinesis) -> None:
        fake.faults.fail_entries(every=3, times=None)
        assert [bool(c) for c in self.put(fake, 4) + self.put(fake, 4)] == [False, False, True, False] + [
            False, True, False, False,
        ]  # fmt: skip

    def test_chosen_by_what_is_in_them(self, fake: FakeKinesis) -> None:
        fake.faults.fail_entries(entry_where=lambda entry: entry["Data"] == b"1")
        assert self.put(fake, 3) == ["", THROTTLED, ""]

    def test_all_of_a_request_and_then_none(self, fake: FakeKinesis) -> None:
        fake.faults.fail_entries()
        assert self.put(fake, 2) == [THROTTLED] * 2
        assert self.put(fake, 2) == [""] * 2

    def test_every_must_be_positive(self, fake: FakeKinesis) -> None:
        with pytest.raises(ValueError, match="every must be >= 1, got 0"):
            fake.faults.fail_entries(every=0)


class TestTwistedAnswers:
    def test_an_expired_iterator(self, fake: FakeKinesis) -> None:
        at = iterator(fake)
        fake.faults.expire_iterators()
        assert outcomes(fake, 2, "GetRecords", ShardIterator=at) == ["ExpiredIteratorException", "ok"]

    def test_an_end_without_children_counts_ends_only(self, fake: FakeKinesis) -> None:
        at = iterator(fake)
        fake.faults.end_without_children(times=1)
        assert "NextShardIterator" in call(fake, "GetRecords", ShardIterator=at)
        fake.split("s", SHARD)
        first, second = (call(fake, "GetRecords", ShardIterator=at) for _ in range(2))
        assert "ChildShards" not in first
        assert "NextShardIterator" not in first
        assert len(second["ChildShards"]) == 2

    def test_an_empty_answer_though_there_are_records(self, fake: FakeKinesis, clock: SimulatedClock) -> None:
        at = iterator(fake)
        fault = fake.faults.empty_answers(times=1)
        call(fake, "GetRecords", ShardIterator=at)
        assert fault.hits == 0
        fake.put("s", b"x")
        clock.advance(2)
        answer = call(fake, "GetRecords", ShardIterator=at)
        assert (answer["Records"], answer["MillisBehindLatest"]) == ([], 2000)
        (record,) = call(fake, "GetRecords", ShardIterator=answer["NextShardIterator"])["Records"]
        assert record["Data"] == b"x"

    def test_an_empty_answer_never_ends_a_shard_that_still_has_records(self, fake: FakeKinesis) -> None:
        fake.put("s", b"x")
        fake.split("s", SHARD)
        fake.faults.empty_answers()
        answer = call(fake, "GetRecords", ShardIterator=iterator(fake))
        assert "NextShardIterator" in answer
        assert "ChildShards" not in answer

    def test_a_lag_that_an_idle_stream_never_loses(self, fake: FakeKinesis) -> None:
        fake.faults.stuck_lag(5000)
        at = iterator(fake)
        assert [call(fake, "GetRecords", ShardIterator=at)["MillisBehindLatest"] for _ in range(3)] == [5000] * 3
        fake.put("s", b"0")
        fake.put("s", b"1")
        assert call(fake, "GetRecords", ShardIterator=at, Limit=1)["MillisBehindLatest"] == 1
