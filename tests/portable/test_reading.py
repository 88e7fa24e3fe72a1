"""The same pipelines give the same records on every runner."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from portable.pipelines import Read
from portable.runners import Feature, Job
from portable.stream import Flights

Start = Callable[..., Job]


@pytest.mark.needs(Feature.BOUNDED)
def test_a_bounded_read_gives_every_record_once_in_the_order_of_the_shards(flights: Flights, start: Start) -> None:
    """What happened before it began: records, a split, a merge."""
    flights.put(200)
    flights.split()
    flights.put(200)
    flights.merge()
    flights.put(200)
    start("copy_and_count", Read(stop_at=flights.after_the_last())).wait_for_end()
    flights.check_each_seen_once_and_in_order()
    assert flights.counts() == flights.expected_counts()


@pytest.mark.needs(Feature.UNBOUNDED)
def test_an_unbounded_read_follows_splits_and_merges(flights: Flights, start: Start) -> None:
    flights.put(50)
    job = start("copy")
    job.wait_until("the first records came", flights.all_seen)
    flights.put_with_reshards(3.0)
    job.wait_until("all records were seen", flights.all_seen)
    flights.check_each_seen_once_and_in_order()


@pytest.mark.needs(Feature.UNBOUNDED, Feature.WINDOWS)
def test_windows_close_while_it_reads_and_none_of_their_records_is_late(flights: Flights, start: Start) -> None:
    """Though shards split and merge meanwhile, and one is read six seconds behind the others."""
    flights.put(50)
    job = start("copy_and_count")
    job.wait_until("the first records came", flights.all_seen)
    fault = flights.hold_back(shard_index=1)
    flights.put_with_reshards(6.0)
    assert fault.hits, "nobody asked for the shard that was held back"
    fault.cancel()
    flights.put_with_reshards(3.0)
    expected = flights.expected_counts()
    job.wait_until("all windows had closed", lambda: flights.counts().keys() >= expected.keys())
    flights.check_each_seen_once_and_in_order()
    assert flights.counts() == expected
    assert job.is_running


@pytest.mark.needs(Feature.BOUNDED, Feature.WINDOWS)
def test_a_bounded_read_is_counted_while_it_runs(flights: Flights, start: Start) -> None:
    """Else a backfill would have to fit in memory."""
    flights.put(200)
    stop_at = time.time() + 20
    job = start("copy_and_count", Read(stop_at=stop_at))
    flights.put_slowly(3.0)
    job.wait_until("the first window had closed", lambda: bool(flights.counts()))
    assert time.time() < stop_at, "the source had ended before its first results came"
    job.wait_for_end()
    flights.check_each_seen_once_and_in_order()
    assert flights.counts() == flights.expected_counts()


@pytest.mark.needs(Feature.BOUNDED, Feature.OVERLAP)
def test_a_bounded_read_with_several_restrictions_reads_them_side_by_side(flights: Flights, start: Start) -> None:
    """The Reshuffle before it shares them out. Without it one thread would read one after the other."""
    flights.put(200)
    flights.fake.faults.delay("GetRecords", 0.5, times=None)
    start("copy_slowly", Read(stop_at=flights.after_the_last(), options={"restrictions": 4})).wait_for_end()
    flights.check_each_seen_once_and_in_order()
    shards = [s.shard_id for s in flights.seen()]
    spans = {shard: (shards.index(shard), len(shards) - 1 - shards[::-1].index(shard)) for shard in shards}
    ordered = sorted(spans.values())
    assert any(end > start for (_, end), (start, _) in zip(ordered, ordered[1:], strict=False))
