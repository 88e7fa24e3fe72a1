"""`ShardPoller`, rule by rule: what it asks, when, and what an answer means. Values in, values out."""

from __future__ import annotations

import random
from typing import Any

import pytest
from apache_beam.utils.timestamp import Timestamp

from samza_kinesis_io import metrics, polling
from samza_kinesis_io.client import RecordsAnswer, StreamDescription, StreamStatus
from samza_kinesis_io.errors import (
    AccessRefused,
    DataLoss,
    IncompleteShardList,
    InvalidArgument,
    IteratorExpired,
    KinesisIOError,
    ResourceNotFound,
    ServiceError,
    StreamNotFound,
    StreamRecreated,
    Throttled,
    TransientServiceError,
)
from samza_kinesis_io.limits import MIB
from samza_kinesis_io.polling import Call, Fetched, ReadLimits, ShardPacer, ShardPoller
from samza_kinesis_io.positions import Position
from samza_kinesis_io.records import KinesisRecord
from samza_kinesis_io.shards import ChildShard, HashKeyRange, Shard
from samza_kinesis_io.testing.sequence_numbers import SequenceNumber

NOW = 1_700_000_000.0
SHARD = "shardId-000000000000"
RANGE = HashKeyRange(0, 63)
HORIZON = Position.trim_horizon()
UNLIMITED = ReadLimits(calls_per_second=None, bytes_per_second=None)
HALVES = (
    ChildShard("shardId-000000000001", (SHARD,), HashKeyRange(0, 31)),
    ChildShard("shardId-000000000002", (SHARD,), HashKeyRange(32, 63)),
)


def number(seconds: float, count: int = 1) -> int:
    """A sequence number of the real form, made at `seconds`."""
    return SequenceNumber(int(NOW) - 10**6, 0, count, int(seconds)).encode()


class Driver:
    """A poller and the time; every method is one call and its answer."""

    def __init__(self, position: Position = HORIZON, *, read_until_micros: int | None = None, **options: Any) -> None:
        self.now = 1000.0
        options = {"limits": UNLIMITED, "poll_interval_seconds": 0.5, "pacer": ShardPacer()} | options
        self.poller = ShardPoller(
            SHARD,
            RANGE,
            position,
            read_until_micros=read_until_micros,
            rng=random.Random(0),
            now_monotonic=self.now,
            now_epoch=self.epoch,
            **options,
        )

    @property
    def epoch(self) -> float:
        return NOW + self.now - 1000

    def wait(self) -> float:
        """Let the time come at which the poller wants its call; return how long that was."""
        waited = max(0.0, self.poller.due_seconds - self.now)
        self.now += waited
        self.poller.on_call(self.now)
        return waited

    def iterator(self) -> None:
        self.wait()
        assert self.poller.call is Call.GET_SHARD_ITERATOR
        self.poller.on_iterator("iterator", self.now)

    def seek(self) -> Driver:
        while self.poller.call is not Call.GET_RECORDS:
            self.iterator()
        return self

    def answer(
        self,
        *numbers: int,
        lag: int | None = 0,
        ended: bool = False,
        children: tuple[ChildShard, ...] = (),
        size_bytes: int = 10,
    ) -> Fetched | None:
        self.seek()
        self.wait()
        records = [KinesisRecord(b"x", str(n), "key", self.epoch) for n in numbers]
        return self.poller.on_answer(
            RecordsAnswer(
                records=records,
                next_shard_iterator=None if ended else "next",
                millis_behind_latest=lag,
                child_shards=children,
                server_time_seconds=float(int(self.epoch)),
                size_bytes=size_bytes if numbers else 0,
            ),
            self.now,
        )

    def error(self, error: KinesisIOError) -> Fetched | None:
        self.wait()
        return self.poller.on_error(error, self.now, self.epoch)

    def shards(self, *listed: Shard) -> Fetched | None:
        self.wait()
        assert self.poller.call is Call.LIST_SHARDS
        return self.poller.on_shards(listed, self.now)

    def description(self, *, retention_hours: int = 24, created: float = NOW - 10**7) -> Fetched | None:
        self.wait()
        assert self.poller.call is Call.DESCRIBE_STREAM
        description = StreamDescription(
            "flights", "arn", StreamStatus.ACTIVE, retention_hours, created, open_shard_count=1, max_record_bytes=MIB
        )
        return self.poller.on_description(description, self.now, self.epoch)


def service_error(kind: type[ServiceError], code: str = "Code", message: str = "") -> ServiceError:
    return kind(f"failed: {code}", operation="GetRecords", code=code, service_message=message)


# Reading.


def test_it_asks_for_an_iterator_and_then_for_records() -> None:
    driver = Driver()
    assert driver.poller.call is Call.GET_SHARD_ITERATOR
    assert driver.poller.position == HORIZON
    driver.iterator()
    assert driver.poller.call is Call.GET_RECORDS
    fetched = driver.answer(7, 8)
    assert fetched is not None
    assert [r.sequence_number for r in fetched.records] == ["7", "8"]
    assert driver.poller.position == Position.after(8)


def test_behind_the_tip_it_asks_again_at_once_and_at_the_tip_after_the_interval() -> None:
    driver = Driver()
    driver.answer(7, lag=5000)
    assert driver.wait() == 0
    driver.answer(8, lag=0)
    assert driver.wait() == 0.5
    driver.answer(lag=0)
    assert driver.wait() == 0.5


def test_an_empty_answer_that_lags_behind_is_not_idle() -> None:
    driver = Driver()
    driver.answer(lag=5000)
    assert driver.wait() == 0


def test_an_answer_proves_arrivals_up_to_the_services_time_less_its_lag() -> None:
    driver = Driver()
    fetched = driver.answer(7, lag=2500)
    assert fetched is not None
    assert fetched.read_until_micros == (int(NOW) * 1000 - 2500) * 1000
    assert not fetched.was_empty


@pytest.mark.parametrize(("lag", "limit"), [(300, 10_000), (0, 2)])
def test_while_more_is_to_come_an_answer_proves_no_more_than_its_last_record(lag: int, limit: int) -> None:
    """kinesis-local counts the lag from the newest record, not from now; so it is 0 among records of one moment."""
    driver = Driver(max_records_per_get=limit)
    driver.now += 100
    driver.seek()
    driver.wait()
    old = [KinesisRecord(b"x", str(n), "key", NOW + 40) for n in (7, 8)]
    answer = RecordsAnswer(
        records=old,
        next_shard_iterator="next",
        millis_behind_latest=lag,
        child_shards=(),
        server_time_seconds=driver.epoch,
        size_bytes=2,
    )
    fetched = driver.poller.on_answer(answer, driver.now)
    assert fetched is not None
    assert fetched.read_until_micros == (int(NOW) + 40) * 1_000_000


def test_an_answer_without_a_lag_proves_nothing() -> None:
    fetched = Driver().answer(7, lag=None)
    assert fetched is not None
    assert fetched.read_until_micros is None


# Pace.


def test_five_calls_a_second() -> None:
    driver = Driver(limits=ReadLimits(bytes_per_second=None))
    driver.seek()
    waits = []
    for _ in range(10):
        driver.answer(7, lag=5000)
        waits.append(max(0.0, driver.poller.due_seconds - driver.now))
    assert waits == pytest.approx([0.2] * 10)


def test_two_mib_a_second() -> None:
    driver = Driver(limits=ReadLimits(calls_per_second=None))
    driver.answer(7, lag=5000, size_bytes=6 * MIB)
    assert driver.wait() == pytest.approx(3.0, abs=0.01)


def test_an_answer_near_ten_mib_costs_five_seconds() -> None:
    """Partition keys and the encoding's padding count too, which nobody tells the reader."""
    driver = Driver(limits=ReadLimits())
    driver.answer(7, lag=5000, size_bytes=int(9.2 * MIB))
    assert driver.wait() == pytest.approx(5.0)


def test_two_readers_of_one_shard_share_its_pace() -> None:
    pacer = ShardPacer()
    one, two = (Driver(limits=ReadLimits(), pacer=pacer) for _ in range(2))
    one.answer(7, lag=5000)
    two.seek()
    assert two.poller.due_seconds == pytest.approx(1000.2)


# Errors: retryable, throttle, iterator, access.


def test_the_back_off_of_throttles_grows_and_is_reset_by_success() -> None:
    driver = Driver().seek()
    waits = []
    for _ in range(6):
        driver.error(service_error(Throttled))
        waits.append(driver.poller.due_seconds - driver.now)
    for n, waited in enumerate(waits):
        ceiling = min(20.0, 2.0**n)
        assert ceiling / 2 <= waited <= ceiling
    driver.answer(7)
    driver.error(service_error(Throttled))
    assert driver.poller.due_seconds - driver.now <= 1.0
    assert driver.poller.counts[metrics.READ_THROTTLES] == 7


def test_the_back_off_of_failures_grows_and_every_code_is_counted() -> None:
    driver = Driver().seek()
    waits = []
    for _ in range(8):
        assert driver.error(service_error(TransientServiceError, "InternalFailure")) is None
        waits.append(driver.poller.due_seconds - driver.now)
    assert waits[0] <= 0.2
    assert 5.0 <= waits[-1] <= 10.0
    assert driver.poller.counts[f"{metrics.READ_RETRIES}.InternalFailure"] == 8
    assert driver.poller.call is Call.GET_RECORDS, "with the same iterator"


def test_an_expired_iterator_is_renewed_behind_the_last_record_fetched() -> None:
    driver = Driver()
    driver.answer(7, 8)
    assert driver.error(service_error(IteratorExpired)) is None
    assert driver.poller.call is Call.GET_SHARD_ITERATOR
    assert driver.poller.position == Position.after(8)
    assert driver.poller.counts[metrics.EXPIRED_ITERATORS] == 1


@pytest.mark.parametrize(
    "start", [HORIZON, Position.at_timestamp(Timestamp(5)), Position.at(5, 3), Position.after(5, 2)]
)
def test_an_iterator_that_expires_before_the_first_record_starts_where_the_read_starts(start: Position) -> None:
    driver = Driver(start)
    driver.answer(lag=0)
    for _ in range(2):
        driver.seek()
        driver.error(service_error(IteratorExpired))
        assert driver.poller.position == start


def test_an_iterator_that_is_called_invalid_is_renewed_once() -> None:
    driver = Driver()
    driver.answer(7)
    error = service_error(InvalidArgument, "InvalidArgumentException", "Invalid ShardIterator.")
    assert driver.error(error) is None
    assert driver.poller.call is Call.GET_SHARD_ITERATOR
    driver.seek()
    fetched = driver.error(error)
    assert fetched is not None
    assert fetched.error is error
    assert driver.poller.is_ended


def test_an_answer_between_two_invalid_iterators_makes_the_second_the_first() -> None:
    driver = Driver()
    for _ in range(3):
        driver.answer(7)
        assert driver.error(service_error(InvalidArgument, "InvalidArgumentException")) is None


@pytest.mark.parametrize("kind", [AccessRefused, StreamNotFound, ServiceError])
def test_what_nobody_can_retry_ends_the_reading(kind: type[ServiceError]) -> None:
    driver = Driver().seek()
    error = service_error(kind)
    fetched = driver.error(error)
    assert fetched is not None
    assert fetched.error is error
    assert driver.poller.is_ended
    assert fetched.read_until_micros is None


def test_a_timestamp_that_the_service_calls_future_is_asked_for_again_until_it_is_past() -> None:
    driver = Driver(Position.at_timestamp(Timestamp(int(NOW))))
    message = "The timestampInMillis parameter cannot be greater than the currentTimestampInMillis."
    for _ in range(20):
        assert driver.error(service_error(InvalidArgument, "InvalidArgumentException", message)) is None
        assert driver.poller.due_seconds - driver.now <= 1.0
    assert driver.poller.call is Call.GET_SHARD_ITERATOR


# The end of a shard.


def test_a_shard_ends_with_its_last_records_and_its_children() -> None:
    driver = Driver()
    fetched = driver.answer(7, 8, ended=True, children=HALVES)
    assert fetched is not None
    assert len(fetched.records) == 2
    assert fetched.children == HALVES
    assert fetched.read_until_micros is None, "what was put since went to the children"
    assert driver.poller.is_ended


def test_a_merge_child_that_reaches_beyond_the_shard_covers_it() -> None:
    child = ChildShard("shardId-000000000009", (SHARD, "other"), HashKeyRange(0, 200))
    fetched = Driver().answer(ended=True, children=(child,))
    assert fetched is not None
    assert fetched.children == (child,)


@pytest.mark.parametrize(("ended", "children"), [(True, ()), (True, HALVES[:1]), (False, HALVES), (False, HALVES[1:])])
def test_an_end_that_contradicts_itself_is_asked_again_behind_its_records(
    ended: bool, children: tuple[ChildShard, ...]
) -> None:
    driver = Driver()
    fetched = driver.answer(7, ended=ended, children=children)
    assert fetched is not None
    assert fetched.children is None
    assert fetched.read_until_micros is None, "what such an answer says of the lag is not to be trusted either"
    assert driver.poller.call is Call.GET_SHARD_ITERATOR
    assert driver.poller.position == Position.after(7)
    fetched = driver.answer(ended=True, children=HALVES)
    assert fetched is not None
    assert fetched.children == HALVES


def unbelievable(driver: Driver) -> None:
    for _ in range(polling.MAX_UNBELIEVABLE_ENDS):
        driver.answer(ended=True)


def listed(number: int, start: int, end: int, *, closed: bool = False, parent: str | None = SHARD) -> Shard:
    return Shard(
        f"shardId-{number:012d}",
        HashKeyRange(start, end),
        parent_shard_id=parent,
        starting_sequence_number=1,
        ending_sequence_number=99 if closed else None,
    )


MINE_CLOSED = listed(0, 0, 63, closed=True, parent=None)
MINE_OPEN = listed(0, 0, 63, parent=None)


def test_after_a_few_of_them_the_list_of_shards_decides() -> None:
    driver = Driver()
    unbelievable(driver)
    fetched = driver.shards(MINE_CLOSED, listed(1, 0, 31), listed(2, 32, 63))
    assert fetched is not None
    assert fetched.children is not None
    assert [c.shard_id for c in fetched.children] == ["shardId-000000000001", "shardId-000000000002"]


def test_an_answer_that_lags_behind_is_no_end_for_a_long_time() -> None:
    driver = Driver()
    for _ in range(2 * polling.MAX_UNBELIEVABLE_ENDS):
        driver.answer(ended=True, lag=9000)
    driver.seek()


def test_a_shard_that_is_listed_as_open_is_read_on() -> None:
    driver = Driver()
    unbelievable(driver)
    assert driver.shards(MINE_OPEN) is None
    fetched = driver.answer(7)
    assert fetched is not None
    assert fetched.records


def test_contradictions_end_after_a_few_tries_with_the_hole_named() -> None:
    driver = Driver()
    fetched = None
    for _ in range(polling.MAX_CONTRADICTIONS):
        assert fetched is None
        unbelievable(driver)
        fetched = driver.shards(MINE_CLOSED, listed(1, 0, 31))
    assert fetched is not None
    assert isinstance(fetched.error, IncompleteShardList)
    assert "HashKeyRange(start=32, end=63)" in str(fetched.error)
    assert driver.poller.counts[metrics.CONTRADICTIONS] == polling.MAX_CONTRADICTIONS


# Losses.


def test_a_shard_that_is_not_found_and_not_listed_is_lost() -> None:
    driver = Driver()
    driver.answer(7, lag=0)
    driver.error(service_error(ResourceNotFound))
    fetched = driver.shards(listed(1, 0, 31), listed(2, 32, 63))
    assert fetched is not None
    lost = fetched.lost
    assert lost is not None
    assert lost.restart is None
    assert [s.shard_id for s in lost.listed] == ["shardId-000000000001", "shardId-000000000002"]
    assert isinstance(lost.error, DataLoss)
    assert lost.from_micros == int(NOW) * 1_000_000


def test_a_shard_that_is_not_found_but_listed_is_asked_again() -> None:
    driver = Driver().seek()
    driver.error(service_error(ResourceNotFound))
    assert driver.shards(MINE_OPEN) is None
    assert driver.wait() <= 1.0
    assert driver.answer(7) is not None


DAY = 86_400.0


def test_a_young_position_is_believed_without_asking() -> None:
    assert Driver(Position.after(number(NOW - DAY + 60))).poller.call is Call.GET_SHARD_ITERATOR


def test_an_old_position_is_checked_against_the_streams_own_retention() -> None:
    driver = Driver(Position.after(number(NOW - 2 * DAY)))
    assert driver.description(retention_hours=72) is None
    assert driver.poller.call is Call.GET_SHARD_ITERATOR


def test_a_position_older_than_the_retention_is_a_loss_that_goes_on_at_the_horizon() -> None:
    driver = Driver(Position.after(number(NOW - 2 * DAY)))
    fetched = driver.description(retention_hours=24)
    assert fetched is not None
    assert fetched.lost is not None
    assert fetched.lost.restart == HORIZON
    assert "older than the stream's retention of 24 h" in fetched.lost.reason
    assert "on_data_loss=DataLossPolicy.CONTINUE" in str(fetched.lost.error)


def test_a_quiet_shard_that_was_read_to_its_tip_has_lost_nothing() -> None:
    until = round((NOW - 60) * 1e6)
    assert Driver(Position.after(number(NOW - 9 * DAY)), read_until_micros=until).poller.call is Call.GET_SHARD_ITERATOR


@pytest.mark.parametrize("start", [HORIZON, Position.at_timestamp(Timestamp(int(NOW - 9 * DAY)))])
def test_a_start_that_was_never_read_from_has_lost_nothing(start: Position) -> None:
    assert Driver(start).poller.call is Call.GET_SHARD_ITERATOR


def test_a_number_that_tells_no_time_is_believed() -> None:
    """An emulator's."""
    assert Driver(Position.after(42)).poller.call is Call.GET_SHARD_ITERATOR


@pytest.mark.parametrize(
    "words", ["The sequence number is trimmed", "StartingSequenceNumber has expired", "outside the retention period"]
)
def test_the_services_word_for_trimmed_is_a_loss(words: str) -> None:
    driver = Driver(Position.after(number(NOW - 60)))
    fetched = driver.error(service_error(InvalidArgument, "InvalidArgumentException", words))
    assert fetched is not None
    assert fetched.lost is not None
    assert fetched.lost.restart == HORIZON


def test_any_other_invalid_argument_is_an_error_not_a_loss() -> None:
    driver = Driver(Position.after(number(NOW - 60)))
    error = service_error(InvalidArgument, "InvalidArgumentException", "Something else is wrong")
    fetched = driver.error(error)
    assert fetched is not None
    assert fetched.error is error


def test_a_stream_created_after_the_position_is_another_stream() -> None:
    driver = Driver(Position.after(number(NOW - 2 * DAY)))
    fetched = driver.description(created=NOW - DAY)
    assert fetched is not None
    assert isinstance(fetched.error, StreamRecreated)


def test_the_services_word_for_another_stream_is_believed() -> None:
    driver = Driver(Position.after(number(NOW - 60)))
    words = "StartingSequenceNumber 5 is invalid because it did not come from this stream."
    fetched = driver.error(service_error(InvalidArgument, "InvalidArgumentException", words))
    assert fetched is not None
    assert isinstance(fetched.error, StreamRecreated)


# How far MillisBehindLatest is believed.


def idle_for(driver: Driver, seconds: float, lag: int, *, growing: bool = False) -> Fetched | None:
    """Answer emptily with a lag for some time; return the last answer."""
    until, start, fetched = driver.now + seconds, driver.now, None
    while driver.now < until:
        fetched = driver.answer(lag=lag + (round((driver.now - start) * 1000) if growing else 0))
        if driver.poller.due_seconds <= driver.now:
            driver.now += 0.2
    return fetched


def test_a_lag_that_never_falls_on_an_idle_shard_counts_as_none_after_a_minute() -> None:
    driver = Driver()
    fetched = idle_for(driver, 30, 9000)
    assert fetched is not None
    assert fetched.read_until_micros == (int(driver.epoch) * 1000 - 9000) * 1000
    fetched = idle_for(driver, 60, 9000)
    assert fetched is not None
    assert fetched.read_until_micros == int(driver.epoch) * 1_000_000
    assert driver.poller.counts[metrics.STUCK_LAGS]


def test_a_lag_that_grows_with_the_clock_is_believed_longer() -> None:
    """It may be that of a record which the service will yet deliver."""
    driver = Driver()
    fetched = idle_for(driver, 120, 9000, growing=True)
    assert fetched is not None
    assert fetched.read_until_micros is not None
    assert fetched.read_until_micros / 1e6 < NOW
    assert not driver.poller.counts[metrics.STUCK_LAGS]


def test_a_lag_that_falls_is_believed() -> None:
    driver = Driver()
    for lag in range(200_000, 1000, -1000):
        fetched = driver.answer(lag=lag)
        assert fetched is not None
        assert fetched.read_until_micros == (int(driver.epoch) * 1000 - lag) * 1000
        driver.now += 1
    assert not driver.poller.counts[metrics.STUCK_LAGS]


def test_a_record_ends_the_suspicion() -> None:
    driver = Driver()
    idle_for(driver, 120, 9000)
    driver.answer(7, lag=9000)
    fetched = driver.answer(lag=9000)
    assert fetched is not None
    assert fetched.read_until_micros == (int(driver.epoch) * 1000 - 9000) * 1000
