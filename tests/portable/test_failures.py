"""What a failure leaves: a job that says why it ended or, where the runner tries again, nothing at all."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest
from portable import pipelines
from portable.pipelines import Read
from portable.runners import Feature, Job
from portable.stream import Flights

Start = Callable[..., Job]


@pytest.mark.needs(Feature.UNBOUNDED, Feature.NO_RETRY)
def test_an_exception_behind_the_reader_ends_the_job_with_its_message(flights: Flights, start: Start) -> None:
    flights.put(200)
    with pytest.raises(Exception, match="flight .* is one too many"):
        start("copy_with_an_exception").wait_for_end()


@pytest.mark.needs(Feature.UNBOUNDED, Feature.NO_RETRY)
def test_a_permission_taken_away_ends_the_job_and_is_named(flights: Flights, start: Start) -> None:
    flights.put(200)
    job = start("copy")
    job.wait_until("the first records came", flights.all_seen)
    flights.fake.faults.deny_access("GetRecords")
    with pytest.raises(Exception, match="GetRecords for stream flights .* AccessDenied"):
        job.wait_for_end()


@pytest.mark.needs(Feature.BOUNDED, Feature.NO_RETRY)
def test_a_stream_that_is_not_there_ends_the_job_and_is_named(flights: Flights, start: Start) -> None:
    flights.put(10)
    stop_at = flights.after_the_last()
    flights.fake.call("DeleteStream", {"StreamName": "flights"})
    with pytest.raises(Exception, match="flights"):
        start("copy", Read(stop_at=stop_at)).wait_for_end()


@pytest.mark.needs(Feature.UNBOUNDED, Feature.BOUNDED, Feature.NOTICES_DEATH)
def test_a_worker_killed_ends_the_job_and_a_new_one_reads_everything(flights: Flights, start: Start) -> None:
    """Killed in mid-bundle. Of a worker that dies between two bundles Prism may never hear."""
    flights.put(500)
    job = start("copy_slowly")
    job.wait_until("the first records came", lambda: bool(flights.seen()))
    pids = {s.pid for s in flights.seen()}
    assert os.getpid() not in pids, "the worker was to be another process"
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(Exception, match="FAILED|disconnected"):
        job.wait_for_end()
    assert len(flights.seen()) < 500, "it was killed too late to show anything"
    flights.put(100)
    start("copy", Read(stop_at=flights.after_the_last())).wait_for_end()
    again = [s for s in flights.seen() if s.pid not in pids]
    assert sorted(s.number for s in again) == list(range(600))
    flights.check_order(again)


@pytest.mark.needs(Feature.UNBOUNDED, Feature.BUNDLE_RETRY)
def test_an_exception_in_the_middle_of_a_batch_loses_nothing(flights: Flights, start: Start) -> None:
    """The worker survives it, and with it what the reader had handed over but the bundle had not emitted."""
    flights.put(200)
    before = set(pipelines.RAISED)
    job = start("copy_with_one_exception")
    job.wait_until("all records were seen", flights.all_seen)
    assert pipelines.RAISED > before
    flights.put_with_reshards(3.0)
    job.wait_until("all records were seen", flights.all_seen)
    # Without the checkpoint that it went back to, all of them would have come twice.
    repeated = len(flights.seen()) - flights.count
    assert repeated < flights.count


@pytest.mark.needs(Feature.BOUNDED, Feature.BUNDLE_RETRY)
def test_a_task_that_is_tried_again_loses_nothing(flights: Flights, start: Start) -> None:
    flights.put(200)
    flights.split()
    flights.put(200)
    before = set(pipelines.RAISED)
    start("copy_with_one_exception", Read(stop_at=flights.after_the_last())).wait_for_end()
    assert flights.all_seen()
    assert pipelines.RAISED > before


@pytest.mark.needs(Feature.UNBOUNDED, Feature.WORKER_RETRY)
def test_a_worker_killed_is_replaced_and_nothing_is_lost(flights: Flights, start: Start) -> None:
    """Duplicates: what had been read since the last checkpoint, a second before."""
    flights.put(100)
    job = start("copy")
    job.wait_until("the first records came", flights.all_seen)
    flights.put_slowly(3.0)  # a checkpoint or two
    job.wait_until("they were read", flights.all_seen)
    killed_at = time.monotonic_ns()
    for pid in {s.pid for s in flights.seen()}:
        os.kill(pid, signal.SIGKILL)
    flights.put_with_reshards(6.0)
    job.wait_until("all records were seen", flights.all_seen)
    first_time: set[int] = set()
    repeated = [s for s in flights.seen() if s.number in first_time or first_time.add(s.number)]  # type: ignore[func-returns-value]
    age_seconds = [(killed_at - s.put_ns) / 1e9 for s in repeated]
    assert max(age_seconds, default=0.0) < 5.0, "more was repeated than a checkpoint interval and its delays explain"
