"""Exact bounds: where a read starts and stops, also in the middle of an aggregate, on every kind of shard."""

from __future__ import annotations

import pytest
from apache_beam.utils.timestamp import Duration, Timestamp
from numbered_stream import Stream

from samza_kinesis_io.aggregation import Aggregate, HashFilter
from samza_kinesis_io.errors import ConfigurationError
from samza_kinesis_io.positions import StartingPosition, StopPosition
from samza_kinesis_io.records import KinesisRecord


def sequence_numbers(stream: Stream) -> list[str]:
    """Of the stream's records, in the order of their putting."""
    return [r.sequence_number for r in sorted(stream.fake.records("flights"), key=lambda r: int(r.data))]


def seconds(value: float) -> Duration:
    return Duration(micros=round(value * 1e6))


# Starts.


def test_reading_goes_on_behind_a_sequence_number() -> None:
    stream = Stream()
    stream.put(10)
    numbers = sequence_numbers(stream)
    runner = stream.read(starting_position=StartingPosition.after_sequence_numbers({stream.open_shards[0]: numbers[3]}))
    runner.run()
    assert runner.numbers == list(range(4, 10))


def test_reading_begins_at_a_sequence_number() -> None:
    stream = Stream()
    stream.put(10)
    numbers = sequence_numbers(stream)
    runner = stream.read(starting_position=StartingPosition.at_sequence_numbers({stream.open_shards[0]: numbers[3]}))
    runner.run()
    assert runner.numbers == list(range(3, 10))


@pytest.mark.parametrize(
    ("how", "sub", "first"),
    [("after", None, 15), ("after", 0, 11), ("after", 3, 14), ("after", 4, 15), ("at", None, 10), ("at", 2, 12)],
)
def test_a_start_may_lie_inside_an_aggregate(how: str, sub: int | None, first: int) -> None:
    """The aggregate holds 10 to 14."""
    stream = Stream()
    stream.put(10)
    number = stream.put_aggregate(5)
    stream.put(5)
    make = StartingPosition.after_sequence_numbers if how == "after" else StartingPosition.at_sequence_numbers
    value = number if sub is None else (number, sub)
    runner = stream.read(starting_position=make({stream.open_shards[0]: value}))
    runner.run()
    assert runner.numbers == list(range(first, 20))


def test_a_start_timestamp_inside_an_aggregates_time_takes_it_whole() -> None:
    """Its user records arrived together."""
    stream = Stream()
    stream.put(3)
    start = stream.now
    stream.put_aggregate(5)
    stream.put(2)
    runner = stream.read(starting_position=StartingPosition.at_timestamp(start))
    runner.run()
    assert runner.numbers == list(range(3, 10))


def test_shards_without_a_name_start_at_otherwise() -> None:
    stream = Stream(shards=2)
    named, other = stream.open_shards
    stream.put(5, shard_id=named)
    stream.put(5, shard_id=other)
    number = sequence_numbers(stream)[2]
    start = StartingPosition.after_sequence_numbers({named: number}, otherwise=StartingPosition.trim_horizon())
    runner = stream.read(starting_position=start)
    runner.run()
    assert sorted(runner.numbers) == [3, 4, 5, 6, 7, 8, 9]
    late = StartingPosition.after_sequence_numbers({named: number}, otherwise=StartingPosition.latest())
    stream.clock.advance(1)
    runner = stream.read(starting_position=late)
    stream.put(2, shard_id=other)
    runner.run()
    assert sorted(runner.numbers) == [3, 4, 10, 11]


def test_a_shard_without_a_name_and_without_otherwise_is_an_error() -> None:
    stream = Stream(shards=2)
    stream.put(2, shard_id=stream.open_shards[0])
    start = StartingPosition.after_sequence_numbers({stream.open_shards[0]: sequence_numbers(stream)[0]})
    with pytest.raises(ConfigurationError, match=r"names no sequence number for the shards \['shardId-000000000001'\]"):
        stream.read(starting_position=start)


def test_a_named_shard_that_is_not_listed_is_an_error() -> None:
    stream = Stream()
    start = StartingPosition.after_sequence_numbers({"shardId-000000000007": "1"})
    with pytest.raises(ConfigurationError, match=r"starting_position names shards that the stream does not list"):
        stream.read(starting_position=start)


def test_ancestors_of_named_shards_count_as_read_and_their_children_are_followed() -> None:
    stream = Stream()
    stream.put(5)
    lower, upper = stream.fake.split("flights", stream.open_shards[0])
    stream.put(5, shard_id=lower)
    stream.put(5, shard_id=upper)
    child = stream.fake.merge("flights", lower, upper)
    stream.put(5, shard_id=child)
    numbers = sequence_numbers(stream)
    start = StartingPosition.after_sequence_numbers({lower: numbers[7], upper: numbers[13]})
    runner = stream.read(starting_position=start)
    runner.run()
    assert sorted(runner.numbers) == [8, 9, 14, 15, 16, 17, 18, 19]


def test_a_named_child_starts_at_its_name_when_its_parent_has_ended() -> None:
    stream = Stream()
    stream.put(5)
    parent = stream.open_shards[0]
    lower, upper = stream.fake.split("flights", parent)
    stream.put(5, shard_id=lower)
    stream.put(5, shard_id=upper)
    numbers = sequence_numbers(stream)
    start = StartingPosition.at_sequence_numbers({parent: numbers[3], lower: numbers[7]})
    runner = stream.read(starting_position=start)
    runner.run()
    assert sorted(runner.numbers) == [3, 4, 7, 8, 9, 10, 11, 12, 13, 14]


def test_children_that_open_later_are_read_from_their_beginning_though_the_start_was_latest() -> None:
    stream = Stream()
    stream.put(5)
    stream.clock.advance(1)
    runner = stream.read(starting_position=StartingPosition.latest())
    stream.put(5)
    stream.fake.split("flights", stream.open_shards[0])
    stream.put(5)
    runner.run()
    assert sorted(runner.numbers) == list(range(5, 15))


def test_a_start_between_two_reshardings_reads_only_what_arrived_since() -> None:
    stream = Stream()
    stream.put(5)
    children = stream.fake.split("flights", stream.open_shards[0])
    stream.put(5)
    start = stream.now
    stream.put(5)
    stream.fake.merge("flights", *children)
    stream.put(5)
    runner = stream.read(starting_position=StartingPosition.at_timestamp(start))
    runner.run()
    assert sorted(runner.numbers) == list(range(10, 20))


def test_a_start_by_a_clock_that_is_ahead_of_the_services_waits_for_its_moment() -> None:
    """The service calls such a timestamp future, for iterators and for the list of shards."""
    stream = Stream()
    stream.put(5)
    stream.clock.advance(1)
    future = "The timestampInMillis parameter cannot be greater than the currentTimestampInMillis."
    stream.fake.faults.fail("ListShards", "InvalidArgumentException", message=future, times=2)
    stream.fake.faults.fail("GetShardIterator", "InvalidArgumentException", message=future, times=3)
    runner = stream.read(starting_position=StartingPosition.latest())
    stream.put(5)
    runner.run()
    assert runner.numbers == list(range(5, 10))


# Resuming inside an aggregate.


@pytest.mark.parametrize("per_bundle", [1, 2, 3, 7])
def test_bundles_that_end_inside_an_aggregate_lose_and_repeat_nothing(per_bundle: int) -> None:
    stream = Stream()
    for _ in range(4):
        stream.put(3)
        stream.put_aggregate(5)
    runner = stream.read(bundle_records=per_bundle)
    for _ in range(40):
        runner.bundle()
        runner.new_process()
    runner.run()
    assert runner.numbers == list(range(32))


def test_a_bundle_that_fails_inside_an_aggregate_is_read_again_from_there() -> None:
    stream = Stream()
    stream.put_aggregate(10)
    runner = stream.read(bundle_records=3)
    while not runner.bundle():
        pass
    for _ in range(3):
        runner.failing_bundle(after_batches=0)
    runner.run()
    assert runner.numbers == list(range(10))


def test_user_records_have_their_places_and_their_aggregates_number() -> None:
    stream = Stream()
    number = stream.put_aggregate(3, key="a key of its own")
    runner = stream.read()
    runner.run()
    found: list[KinesisRecord] = [e.record for e in runner.books.emitted]
    assert [(r.sequence_number, r.sub_sequence_number) for r in found] == [(number, 0), (number, 1), (number, 2)]
    assert {r.partition_key for r in found} == {"a key of its own"}


@pytest.mark.parametrize(("hash_filter", "expected"), [(HashFilter.KEEP, [0, 1]), (HashFilter.KCL, [])])
def test_user_records_outside_their_shards_range_are_kept_unless_the_kcls_way_is_asked_for(
    hash_filter: HashFilter, expected: list[int]
) -> None:
    """A split fell between the packing of the aggregate and its putting."""
    stream = Stream(shards=2)
    ranges = sorted(s.hash_key_range for s in stream.fake.shards("flights"))
    aggregate = Aggregate()
    for n, range_ in enumerate(ranges):
        assert aggregate.add("key", str(range_.start), b"%d" % n)
    data, key, _ = aggregate.encode()
    stream.fake.put("flights", data, partition_key=key, explicit_hash_key=str(ranges[0].start))
    runner = stream.read(hash_filter=hash_filter)
    runner.run()
    assert runner.numbers == expected


def test_aggregates_can_be_left_whole() -> None:
    stream = Stream()
    stream.put_aggregate(3)
    runner = stream.read(deaggregate=False)
    runner.run()
    (whole,) = [e.record for e in runner.books.emitted]
    assert whole.data.startswith(b"\xf3\x89\x9a\xc2")


def test_plain_records_that_look_like_aggregates_are_passed_on() -> None:
    aggregate = Aggregate()
    aggregate.add("k", None, b"1")
    data, _, _ = aggregate.encode()
    look_alikes = [data[:4], data[:4] + b"plain", data[:-1] + bytes([data[-1] ^ 1]), data]
    stream = Stream()
    for one in look_alikes:
        stream.fake.put("flights", one, partition_key="k")
    runner = stream.read()
    runner.run()
    assert [e.record.data for e in runner.books.emitted] == [*look_alikes[:3], b"1"]


# Stops.


@pytest.mark.parametrize("shards", [1, 3])
def test_a_stop_ends_with_the_last_record_before_it(shards: int) -> None:
    stream = Stream(shards=shards)
    stream.put(30)
    stop = stream.now
    stream.put(200)
    runner = stream.read(stop_at=StopPosition.at_timestamp(stop))
    runner.run()
    assert runner.is_done
    assert sorted(runner.numbers) == list(range(30))


def test_a_record_that_arrives_at_the_stop_is_not_read() -> None:
    stream = Stream()
    stream.put(1)
    stop = stream.now
    stream.fake.put("flights", b"1")  # at this very moment
    stream.clock.advance(5)
    runner = stream.read(stop_at=StopPosition.at_timestamp(stop))
    runner.run()
    assert runner.numbers == [0]


def test_a_stop_in_the_future_waits_for_it() -> None:
    stream = Stream(shards=2)
    stream.put(10)
    runner = stream.read(stop_at=StopPosition.at_timestamp(stream.now + seconds(20)))
    runner.run(idle_rounds=50)
    assert not runner.is_done
    stream.put(10)
    stream.clock.advance(30)
    stream.put(10)
    runner.run(idle_rounds=500)
    assert runner.is_done
    assert sorted(runner.numbers) == list(range(20))


def test_an_idle_shard_ends_at_the_stop() -> None:
    stream = Stream(shards=2)
    stream.put(10, shard_id=stream.open_shards[0])
    runner = stream.read(stop_at=StopPosition.now())
    runner.run()
    assert runner.is_done
    assert runner.numbers == list(range(10))


def test_closed_shards_end_with_their_records_and_children_born_after_the_stop_bring_nothing() -> None:
    stream = Stream()
    stream.put(10)
    stop = stream.now
    stream.put(10)
    stream.fake.split("flights", stream.open_shards[0])
    stream.put(20)
    runner = stream.read(stop_at=StopPosition.at_timestamp(stop))
    runner.run()
    assert runner.is_done
    assert runner.numbers == list(range(10))


def test_a_stop_among_reshardings_reads_every_generation_up_to_it() -> None:
    stream = Stream(shards=2)
    stream.put(20)
    child = stream.fake.merge("flights", *stream.open_shards)
    stream.put(20)
    stream.fake.split("flights", child)
    stream.put(20)
    stop = stream.now
    stream.put(20)
    runner = stream.read(stop_at=StopPosition.at_timestamp(stop), bundle_records=7)
    runner.run()
    assert runner.is_done
    assert sorted(runner.numbers) == list(range(60))


def test_an_aggregate_is_on_one_side_of_a_stop_timestamp() -> None:
    stream = Stream()
    stream.put_aggregate(5)
    stop = stream.now
    stream.put_aggregate(5)
    runner = stream.read(stop_at=StopPosition.at_timestamp(stop), bundle_records=2)
    runner.run()
    assert runner.numbers == list(range(5))


def test_a_stop_sequence_number_is_included() -> None:
    stream = Stream()
    stream.put(10)
    number = sequence_numbers(stream)[6]
    runner = stream.read(stop_at=StopPosition.at_sequence_numbers({stream.open_shards[0]: number}))
    runner.run()
    assert runner.is_done
    assert runner.numbers == list(range(7))


@pytest.mark.parametrize(("sub", "count"), [(None, 15), (0, 11), (2, 13), (4, 15)])
@pytest.mark.parametrize("per_bundle", [1, 2, 10_000])
def test_a_stop_may_lie_inside_an_aggregate(sub: int | None, count: int, per_bundle: int) -> None:
    """The aggregate holds 10 to 14."""
    stream = Stream()
    stream.put(10)
    number = stream.put_aggregate(5)
    stream.put(5)
    value = number if sub is None else (number, sub)
    stop = StopPosition.at_sequence_numbers({stream.open_shards[0]: value})
    runner = stream.read(stop_at=stop, bundle_records=per_bundle)
    runner.run()
    assert runner.is_done
    assert runner.numbers == list(range(count))


def test_start_and_stop_inside_the_same_aggregate() -> None:
    stream = Stream()
    number = stream.put_aggregate(10)
    shard = stream.open_shards[0]
    runner = stream.read(
        starting_position=StartingPosition.at_sequence_numbers({shard: (number, 2)}),
        stop_at=StopPosition.at_sequence_numbers({shard: (number, 6)}),
    )
    runner.run()
    assert runner.is_done
    assert runner.numbers == [2, 3, 4, 5, 6]


def test_only_the_shards_of_a_stop_map_are_read_and_their_children_are_not_followed() -> None:
    stream = Stream(shards=2)
    named, other = stream.open_shards
    stream.put(5, shard_id=named)
    stream.put(5, shard_id=other)
    number = sequence_numbers(stream)[4]
    stream.fake.split("flights", named)
    stream.put(10)
    runner = stream.read(stop_at=StopPosition.at_sequence_numbers({named: number}))
    runner.run()
    assert runner.is_done
    assert runner.numbers == list(range(5))


def test_a_shard_that_ends_before_its_stop_ends_the_read_of_it() -> None:
    stream = Stream()
    stream.put(5)
    parent = stream.open_shards[0]
    beyond = str(int(sequence_numbers(stream)[4]) + (1 << 90))
    stream.fake.split("flights", parent)
    stream.put(5)
    runner = stream.read(stop_at=StopPosition.at_sequence_numbers({parent: beyond}))
    runner.run()
    assert runner.is_done
    assert runner.numbers == list(range(5))


def test_a_read_that_starts_at_its_stop_is_over_at_once() -> None:
    stream = Stream()
    stream.put(5)
    shard, number = stream.open_shards[0], sequence_numbers(stream)[2]
    runner = stream.read(
        starting_position=StartingPosition.after_sequence_numbers({shard: number}),
        stop_at=StopPosition.at_sequence_numbers({shard: number}),
    )
    assert runner.is_done


def test_an_empty_closed_shard_ends_at_once() -> None:
    stream = Stream()
    stream.fake.split("flights", stream.open_shards[0])
    stream.put(10)
    runner = stream.read(stop_at=StopPosition.now())
    runner.run()
    assert runner.is_done
    assert sorted(runner.numbers) == list(range(10))


@pytest.mark.parametrize("fault", ["throttle", "internal", "expired", "empty"])
def test_a_bounded_read_ends_in_the_same_place_whatever_fails(fault: str) -> None:
    stream = Stream(shards=2)
    stream.put(40)
    stop = stream.now
    stream.put(40)
    faults = stream.fake.faults
    {
        "throttle": lambda: faults.throttle("GetRecords", times=4),
        "internal": lambda: faults.internal_failure("GetRecords", times=6),
        "expired": lambda: faults.expire_iterators(times=4),
        "empty": lambda: faults.empty_answers(times=6),
    }[fault]()
    runner = stream.read(stop_at=StopPosition.at_timestamp(stop), max_records_per_get=7)
    runner.run(idle_rounds=3000)
    assert runner.is_done
    assert sorted(runner.numbers) == list(range(40))


def test_a_bounded_read_advances_its_watermark_and_checkpoints_itself() -> None:
    """Else a runner would hold all of it in memory."""
    stream = Stream()
    stream.put(100)
    runner = stream.read(stop_at=StopPosition.now(), bundle_records=10)
    seen: list[int] = []
    while not runner.is_done:
        seen.append(runner.watermark_micros)
        runner.bundle()
    assert len(seen) >= 10
    assert seen == sorted(seen)
    assert len(set(seen)) >= 9


def test_a_bounded_read_from_a_start_to_a_stop() -> None:
    stream = Stream(shards=3)
    stream.put(20)
    start = stream.now
    stream.put(20)
    stop = stream.now
    stream.put(20)
    assert isinstance(start, Timestamp)
    runner = stream.read(
        starting_position=StartingPosition.at_timestamp(start), stop_at=StopPosition.at_timestamp(stop)
    )
    runner.run()
    assert sorted(runner.numbers) == list(range(20, 40))
