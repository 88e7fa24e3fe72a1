"""`ReadFromKinesis` by what comes out of it, bundle by bundle, on a simulated clock."""

from __future__ import annotations

import pytest
from apache_beam.utils.timestamp import Timestamp
from numbered_stream import Stream

from samza_kinesis_io.errors import AccessRefused, DataLoss, StaleAttachment, StreamRecreated
from samza_kinesis_io.positions import StartingPosition, StopPosition
from samza_kinesis_io.restriction import MAX_MICROS
from samza_kinesis_io.source import DataLossPolicy


@pytest.mark.parametrize("shards", [1, 4])
def test_every_record_is_read_once(shards: int) -> None:
    stream = Stream(shards=shards)
    stream.put(500)
    runner = stream.read()
    runner.run()
    assert sorted(runner.numbers) == list(range(500))


def test_records_that_come_while_it_reads_are_read() -> None:
    stream = Stream(shards=2)
    runner = stream.read()
    for _ in range(5):
        stream.put(20)
        runner.run()
    assert sorted(runner.numbers) == list(range(100))


def test_a_bounded_read_ends_by_itself_with_what_arrived_before_its_stop() -> None:
    stream = Stream(shards=3)
    stream.put(100)
    stop = Timestamp(micros=round(stream.clock.now_seconds() * 1e6))
    stream.put(50)
    runner = stream.read(stop_at=StopPosition.at_timestamp(stop))
    runner.run()
    assert runner.is_done
    assert sorted(runner.numbers) == list(range(100))


def test_a_bounded_read_of_an_empty_stream_ends() -> None:
    stream = Stream(shards=3)
    runner = stream.read(stop_at=StopPosition.now())
    runner.run()
    assert runner.is_done
    assert runner.numbers == []


def test_a_bounded_read_follows_children_that_began_before_its_stop() -> None:
    stream = Stream()
    stream.put(10)
    stream.fake.split("flights", stream.open_shards[0])
    stream.put(10)
    runner = stream.read(stop_at=StopPosition.now())
    stream.put(10)
    runner.run()
    assert runner.is_done
    assert sorted(runner.numbers) == list(range(20))


def test_latest_is_fixed_when_the_pipeline_is_built() -> None:
    """Records that arrive between the building and the first bundle are read, also by a second worker."""
    stream = Stream()
    stream.put(10)
    stream.clock.advance(5)
    runner = stream.read(starting_position=StartingPosition.latest())
    stream.put(10)
    runner.new_process()
    runner.run()
    assert sorted(runner.numbers) == list(range(10, 20))


def test_a_start_timestamp_reads_what_arrived_at_it_or_later() -> None:
    stream = Stream(shards=2)
    stream.put(10)
    start = Timestamp(micros=round(stream.clock.now_seconds() * 1e6))
    stream.put(10)
    runner = stream.read(starting_position=StartingPosition.at_timestamp(start))
    runner.run()
    assert sorted(runner.numbers) == list(range(10, 20))


def test_a_start_older_than_the_retention_reads_from_the_horizon() -> None:
    stream = Stream()
    stream.put(10)
    stream.clock.advance(30 * 3600)
    stream.put(10)
    start = Timestamp(micros=round((stream.clock.now_seconds() - 28 * 3600) * 1e6))
    runner = stream.read(starting_position=StartingPosition.at_timestamp(start))
    runner.run()
    assert runner.numbers == list(range(10, 20))


def test_children_are_read_after_their_parent() -> None:
    stream = Stream()
    stream.put(30)
    parent = stream.open_shards[0]
    stream.fake.split("flights", parent)
    stream.put(30)
    runner = stream.read()
    runner.run()
    shards = [e.record.shard_id for e in runner.books.emitted]
    assert sorted(runner.numbers) == list(range(60))
    assert shards[:30] == [parent] * 30
    assert parent not in shards[30:]


def test_a_merge_child_waits_for_both_parents() -> None:
    stream = Stream(shards=2)
    stream.put(40)
    first, second = stream.open_shards
    child = stream.fake.merge("flights", first, second)
    stream.put(20)
    runner = stream.read(bundle_records=5, max_records_per_get=5)
    runner.run()
    shards = [e.record.shard_id for e in runner.books.emitted]
    assert sorted(runner.numbers) == list(range(60))
    assert child not in shards[:40]


def test_resharding_while_it_reads_loses_nothing() -> None:
    stream = Stream(shards=2)
    runner = stream.read(bundle_records=7)
    for turn in range(6):
        stream.put(15)
        shards = stream.open_shards
        if turn % 2:
            by_range = sorted(
                (s for s in stream.fake.shards("flights") if not s.is_closed), key=lambda s: s.hash_key_range.start
            )
            stream.fake.merge("flights", by_range[0].shard_id, by_range[1].shard_id)
        else:
            stream.fake.split("flights", shards[-1])
        stream.put(15)
        runner.bundle()
    runner.run()
    assert sorted(runner.numbers) == list(range(180))


def test_several_restrictions_read_every_record_once() -> None:
    stream = Stream(shards=8)
    stream.put(200)
    runner = stream.read(restrictions=3)
    assert len(runner.elements) == 3
    by_range = sorted((s for s in stream.fake.shards("flights")), key=lambda s: s.hash_key_range.start)
    # A merge across the border of two restrictions.
    for left, right in zip(by_range[::2], by_range[1::2], strict=True):
        stream.fake.merge("flights", left.shard_id, right.shard_id)
    stream.put(100)
    runner.run()
    assert sorted(runner.numbers) == list(range(300))


def test_merge_parents_in_two_restrictions_are_both_read_before_the_child() -> None:
    stream = Stream(shards=2)
    runner = stream.read(restrictions=2, bundle_records=5)
    assert len(runner.elements) == 2
    runner.bundle(1)  # from here on this process reads both
    stream.put(40)
    first, second = stream.open_shards
    child = stream.fake.merge("flights", first, second)
    stream.put(20)
    runner.bundle(1)
    for _ in range(60):  # the first parent ends; the second one's reader is there and has got nowhere
        runner.bundle(0)
    assert len(runner.books.emitted) < 40
    runner.run()
    shards = [e.record.shard_id for e in runner.books.emitted]
    assert sorted(runner.numbers) == list(range(60))
    assert child not in shards[:40]


def test_a_bundle_that_fails_in_mid_batch_is_read_again_by_the_same_process() -> None:
    """The process survives the failure, and so do its buffers: a batch that was handed over must not be skipped."""
    stream = Stream(shards=2)
    stream.put(100)
    runner = stream.read(bundle_records=10)
    for after in (0, 1, 0, 2):
        runner.bundle()
        runner.failing_bundle(after_batches=after)
    runner.run()
    assert sorted(runner.numbers) == list(range(100))


@pytest.mark.parametrize("after_batches", [0, 1, 2])
def test_the_batch_in_whose_middle_a_bundle_failed_is_the_next_one(after_batches: int) -> None:
    stream = Stream()
    stream.put(100)
    runner = stream.read(bundle_records=40, max_records_per_get=100)
    while not runner.bundle():
        pass
    attempt = runner.begin()
    runner.dofn._seconds_per_record = 0.015  # ten records in a bundle's time, so that a bundle has several batches
    for _ in range(after_batches + 1):
        assert runner.step(attempt)
    attempt.generator.close()
    runner.run()
    assert runner.numbers == list(range(100))


def test_a_checkpoint_restored_in_the_same_process_is_read_again_from_there() -> None:
    stream = Stream(shards=2)
    stream.put(100)
    runner = stream.read(bundle_records=10)
    runner.bundle()
    books = runner.books.copy()
    runner.bundle()
    runner.bundle()
    runner.restore(books)
    runner.run()
    assert sorted(runner.numbers) == list(range(100))


@pytest.mark.parametrize("after_batches", [0, 1, 2])
def test_a_split_by_the_runner_loses_and_repeats_nothing(after_batches: int) -> None:
    stream = Stream(shards=3)
    stream.put(120)
    runner = stream.read(max_records_per_get=10)
    for _ in range(4):
        runner.split_bundle(after_batches=after_batches)
    runner.run()
    assert sorted(runner.numbers) == list(range(120))


def test_an_attempt_that_outlived_its_cancellation_fails_and_disturbs_nobody() -> None:
    stream = Stream(shards=1)
    stream.put(60)
    runner = stream.read(max_records_per_get=10, bundle_records=10)
    zombie = runner.begin()
    while not runner.step(zombie):
        runner.finish(zombie)
        zombie = runner.begin()
    runner.bundle()
    with pytest.raises(StaleAttachment):
        list(iter(lambda: runner.step(zombie), False))
    runner.run()
    assert sorted(runner.numbers) == list(range(60))


def test_an_expired_iterator_is_renewed_without_loss_or_repeat() -> None:
    stream = Stream(shards=1)
    runner = stream.read()
    runner.bundle()
    stream.clock.advance(400)  # before the first record
    stream.put(20)
    runner.run()
    stream.clock.advance(400)
    stream.fake.faults.expire_iterators(times=2)  # and twice in a row
    stream.put(20)
    runner.run()
    assert runner.numbers == list(range(40))


def test_a_position_at_latest_survives_an_iterator_that_expires_before_the_first_record() -> None:
    stream = Stream(shards=1)
    stream.put(5)
    stream.clock.advance(1)
    runner = stream.read(starting_position=StartingPosition.latest())
    runner.bundle()
    stream.fake.faults.expire_iterators(times=1)
    stream.put(5)
    runner.run()
    assert runner.numbers == list(range(5, 10))


def test_throttles_delay_and_lose_nothing() -> None:
    stream = Stream(shards=2)
    stream.put(50)
    stream.fake.faults.throttle("GetRecords", times=7)
    runner = stream.read()
    runner.run(idle_rounds=3000)
    assert sorted(runner.numbers) == list(range(50))


def test_a_refused_key_fails_the_bundle_and_says_what_to_do() -> None:
    stream = Stream()
    stream.put(10)
    runner = stream.read()
    runner.run(idle_rounds=20)
    stream.fake.faults.fail("GetRecords", "KMSAccessDeniedException", times=1)
    stream.put(10)
    watermark = runner.watermark_micros
    with pytest.raises(AccessRefused, match="kms:Decrypt"):
        runner.run()
    assert runner.watermark_micros - watermark < 11 * 10_000 + 1_000_000
    runner.run()
    assert runner.numbers == list(range(20))


def test_a_shard_end_without_children_is_asked_again() -> None:
    stream = Stream()
    stream.put(20)
    stream.fake.split("flights", stream.open_shards[0])
    stream.put(20)
    stream.fake.faults.end_without_children(times=2)
    runner = stream.read()
    runner.run(idle_rounds=500)
    assert sorted(runner.numbers) == list(range(40))


def test_shard_ends_that_never_name_children_are_settled_by_the_list_of_shards() -> None:
    stream = Stream()
    stream.put(20)
    stream.fake.split("flights", stream.open_shards[0])
    stream.put(20)
    stream.fake.faults.end_without_children(times=100)
    runner = stream.read()
    runner.run(idle_rounds=500)
    assert sorted(runner.numbers) == list(range(40))


def test_a_position_older_than_the_retention_fails_by_default() -> None:
    stream = Stream()
    stream.put(10)
    runner = stream.read()
    runner.run(idle_rounds=5)
    stream.put(10)
    stream.clock.advance(30 * 3600)
    stream.put(10)
    runner.new_process()
    with pytest.raises(DataLoss, match="on_data_loss=DataLossPolicy.CONTINUE"):
        runner.run()


def test_a_position_older_than_the_retention_can_be_passed_over() -> None:
    stream = Stream()
    stream.put(10)
    runner = stream.read(on_data_loss=DataLossPolicy.CONTINUE)
    runner.run(idle_rounds=5)
    stream.put(10)
    stream.clock.advance(30 * 3600)
    stream.put(10)
    runner.new_process()
    runner.run()
    assert runner.numbers == [*range(10), *range(20, 30)]


def test_a_quiet_shard_that_was_read_to_its_tip_has_lost_nothing() -> None:
    stream = Stream()
    stream.put(10)
    runner = stream.read()
    for _ in range(40):
        stream.clock.advance(3600)
        runner.run(idle_rounds=5)
    runner.new_process()
    stream.put(10)
    runner.run()
    assert runner.numbers == list(range(20))


def test_parents_and_the_generation_between_trimmed_while_nobody_read() -> None:
    """Beam #20563: the position's shard and its children are gone; the grandchildren must be found."""
    stream = Stream()
    stream.put(10)
    runner = stream.read(on_data_loss=DataLossPolicy.CONTINUE)
    runner.run(idle_rounds=5)
    children = stream.fake.split("flights", stream.open_shards[0])
    stream.put(10)
    for child in children:
        stream.fake.split("flights", child)
    stream.clock.advance(30 * 3600)
    stream.put(40)
    runner.new_process()
    runner.run()
    assert sorted(runner.numbers) == [*range(10), *range(20, 60)]
    assert len(runner.frontier().shards) == 4


def test_parents_trimmed_while_nobody_read_fail_by_default() -> None:
    stream = Stream()
    stream.put(10)
    runner = stream.read()
    runner.run(idle_rounds=5)
    stream.fake.split("flights", stream.open_shards[0])
    stream.clock.advance(30 * 3600)
    runner.new_process()
    with pytest.raises(DataLoss):
        runner.run()


def test_a_stream_that_was_deleted_and_created_again_is_named() -> None:
    stream = Stream()
    stream.put(10)
    runner = stream.read(on_data_loss=DataLossPolicy.CONTINUE)
    runner.run(idle_rounds=5)
    stream.fake.call("DeleteStream", {"StreamName": "flights"})
    stream.clock.advance(3600)
    stream.fake.create_stream("flights")
    stream.put(5)
    runner.new_process()
    with pytest.raises(StreamRecreated, match="deleted and created again"):
        runner.run()


def test_the_watermark_follows_an_idle_stream_and_never_passes_what_comes() -> None:
    stream = Stream(shards=4)
    stream.put(20)
    runner = stream.read()
    runner.run(idle_rounds=100)
    behind = stream.clock.now_seconds() - runner.watermark_micros / 1e6
    assert behind < 4, "idle shards must not hold the watermark"
    stream.put(20)
    runner.run(idle_rounds=100)
    assert not [e for e in runner.books.emitted if e.arrived_late]


def test_a_silent_stream_advances_its_watermark() -> None:
    stream = Stream(shards=2)
    runner = stream.read()
    runner.run(idle_rounds=100)
    assert stream.clock.now_seconds() - runner.watermark_micros / 1e6 < 4


def test_children_that_were_there_before_the_read_are_not_late() -> None:
    """The last answer of a closed shard says that nothing is left of it: that proves nothing of its children."""
    stream = Stream()
    stream.put(10)
    stream.fake.split("flights", stream.open_shards[0])
    stream.put(10)
    stream.clock.advance(6 * 3600)
    runner = stream.read()
    runner.run()
    assert len(runner.books.emitted) == 20
    assert not [e for e in runner.books.emitted if e.arrived_late]


def test_idle_shards_advance_while_another_has_a_backlog() -> None:
    stream = Stream(shards=2)
    busy = stream.open_shards[0]
    stream.put(300, shard_id=busy, seconds_apart=1)
    runner = stream.read(bundle_records=10)
    for _ in range(20):
        runner.bundle()
    assert 0 < len(runner.books.emitted) < 300
    newest = max(e.timestamp_micros for e in runner.books.emitted)
    assert newest - runner.watermark_micros < 30_000_000


def test_a_lag_that_grows_with_the_clock_is_believed_for_minutes() -> None:
    """Eight empty answers, two seconds, once made a bounded read end without its records."""
    stream = Stream()
    stream.put(10)
    stream.fake.faults.empty_answers(times=12)
    runner = stream.read(stop_at=StopPosition.now())
    runner.run(idle_rounds=500)
    assert runner.is_done
    assert runner.numbers == list(range(10))


def test_a_read_that_falls_behind_the_retention_says_so_while_it_reads() -> None:
    """It asks often enough never to need a new iterator, and the service's iterator jumps over what is trimmed."""
    stream = Stream()
    stream.put(400, seconds_apart=120)
    runner = stream.read(bundle_records=1, max_records_per_get=1)

    def read_slower_than_it_is_written() -> None:
        for _ in range(4000):
            runner.bundle()
            stream.put(1, seconds_apart=240)

    with pytest.raises(DataLoss):
        read_slower_than_it_is_written()
    numbers = runner.numbers
    assert numbers == list(range(len(numbers))), "nothing was skipped before it was said"


def test_a_start_restored_after_the_retention_says_so() -> None:
    """The position is still the start, but the shard had been read up to a time that is gone now."""
    stream = Stream()
    runner = stream.read(starting_position=StartingPosition.latest())
    runner.run(idle_rounds=30)
    books = runner.books.copy()
    stream.put(10)
    stream.clock.advance(30 * 3600)
    runner.new_process()
    runner.restore(books)
    with pytest.raises(DataLoss):
        runner.run()


def test_a_split_before_the_first_claim_leaves_a_shard_end_to_the_residual() -> None:
    stream = Stream()
    stream.put(5)
    runner = stream.read()
    runner.run(idle_rounds=5)
    stream.fake.split("flights", stream.open_shards[0])
    stream.clock.advance(1)
    runner.bundle()
    for _ in range(5):
        runner.split_bundle(after_batches=0)
    stream.put(5)
    runner.run()
    assert sorted(runner.numbers) == list(range(10))


def test_a_bounded_read_in_several_restrictions_does_not_wait_for_itself() -> None:
    """A merge child of one restriction waits for the other's shard, which the same thread must read."""
    stream = Stream(shards=2)
    stream.put(100)
    stream.fake.merge("flights", *stream.open_shards)
    stream.put(20)
    runner = stream.read(restrictions=2, stop_at=StopPosition.now(), bundle_records=10)
    runner.run(rounds=500)
    assert runner.is_done
    assert sorted(runner.numbers) == list(range(120))


@pytest.mark.parametrize("kilobytes", [10, 700])
def test_a_byte_limit_below_one_answer_slows_and_does_not_stop(kilobytes: int) -> None:
    stream = Stream(shards=2)
    for n in range(20):
        stream.fake.put("flights", b"%06d" % n + b"x" * 1000 * kilobytes, partition_key=str(n))
    runner = stream.read(prefetch_bytes=1000, prefetch_bytes_per_shard=1000)
    runner.run(idle_rounds=200)
    assert sorted(int(e.record.data[:6]) for e in runner.books.emitted) == list(range(20))


def test_errors_hold_the_watermark() -> None:
    stream = Stream(shards=2)
    stream.put(10)
    runner = stream.read()
    runner.run(idle_rounds=50)
    before = runner.watermark_micros
    stream.fake.faults.internal_failure("GetRecords", times=None)
    start = stream.clock.now_seconds()
    runner.run(idle_rounds=500)
    assert stream.clock.now_seconds() - start > 20
    assert runner.watermark_micros - before <= 1_000_000


def test_a_lag_that_never_falls_on_an_idle_stream_does_not_hold_the_watermark() -> None:
    stream = Stream(shards=1)
    stream.put(10)
    stream.fake.faults.stuck_lag(90_000)
    runner = stream.read()
    runner.run(idle_rounds=3000)
    assert stream.clock.now_seconds() - runner.watermark_micros / 1e6 < 4


def test_a_finished_read_has_the_last_watermark() -> None:
    stream = Stream(shards=1)
    stream.put(3)
    runner = stream.read(stop_at=StopPosition.now())
    watermark = 0
    while not runner.is_done:
        attempt = runner.begin()
        while runner.step(attempt):
            pass
        runner.finish(attempt)
        watermark = attempt.estimator.current_watermark().micros
    assert watermark == MAX_MICROS


@pytest.mark.parametrize("records_per_get", [20, 10_000])
def test_no_shard_is_read_faster_than_the_service_allows(records_per_get: int) -> None:
    """The fake throttles whoever asks a shard more than five times, or for more than 2 MiB, in a second."""
    stream = Stream(shards=3, enforce_limits=True)
    for n in range(300):
        stream.fake.put("flights", b"%06d" % n + b"x" * 100_000, partition_key=str(n))
        stream.clock.advance(0.2)
    runner = stream.read(max_records_per_get=records_per_get, bundle_bytes=1 << 30)
    runner.run(idle_rounds=200)
    assert sorted(int(e.record.data[:6]) for e in runner.books.emitted) == list(range(300))
    assert not stream.fake.errors


def test_an_idle_shard_is_polled_at_its_interval() -> None:
    stream = Stream(shards=1)
    runner = stream.read(poll_interval_seconds=0.5)
    runner.run(idle_rounds=10)
    calls, start = stream.fake.calls["GetRecords"], stream.clock.now_seconds()
    runner.run(idle_rounds=400)
    elapsed = stream.clock.now_seconds() - start
    assert elapsed > 10
    assert stream.fake.calls["GetRecords"] - calls == pytest.approx(elapsed / 0.5, abs=2)
