"""How a source with nothing to read waits, what splits of the runner do to it, and how it ends when it is told to."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from portable.pipelines import Read
from portable.runners import Feature, Job
from portable.stream import Flights

from samza_kinesis_io.restriction import FrontierTracker
from samza_kinesis_io.source import ReadShards

Start = Callable[..., Job]


@pytest.mark.needs(Feature.UNBOUNDED, Feature.DRIVER_IS_WORKER)
def test_an_idle_read_begins_a_bundle_no_oftener_than_its_delay_says(
    flights: Flights, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the runner ignores the delay: the wait is then inside the bundle. 75 ms: 13 bundles a second."""
    bundles = 0
    process = ReadShards._read

    def count(*args: Any) -> Any:
        nonlocal bundles
        bundles += 1
        return process(*args)

    monkeypatch.setattr(ReadShards, "_read", count)
    flights.put(20)
    job = start("copy")
    job.wait_until("the first records came", flights.all_seen)
    began, before = time.monotonic(), bundles
    job.wait_until("three seconds passed", lambda: time.monotonic() - began > 3)
    assert 1 <= (bundles - before) / (time.monotonic() - began) < 20
    flights.put(20)
    job.wait_until("the records after the silence came", flights.all_seen)
    flights.check_each_seen_once_and_in_order()


@pytest.mark.needs(Feature.UNBOUNDED, Feature.RUNNER_SPLITS, Feature.DRIVER_IS_WORKER)
def test_splits_by_the_runner_lose_and_repeat_nothing(
    flights: Flights, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prism splits a bundle in which nothing moves; on a progress it cannot read, or an exception, the job would fail.

    So bundles are long here, and after a burst (past which Beam measures outputs only now and then) come few records.
    """
    fractions: list[float] = []
    try_split = FrontierTracker.try_split

    def note(tracker: FrontierTracker, fraction: float) -> Any:
        fractions.append(fraction)
        return try_split(tracker, fraction)

    monkeypatch.setattr(FrontierTracker, "try_split", note)
    flights.put(300)
    job = start("copy_slowly", Read(options={"bundle_seconds": 2.0}))
    job.wait_until("the runner had split", lambda: any(f > 0 for f in fractions))
    for _ in range(5):
        flights.put(1)
        job.wait_until("it was read", flights.all_seen)
        flights.put_slowly(0.5, per_second=4)
    job.wait_until("all were seen", flights.all_seen)
    flights.check_each_seen_once_and_in_order()
    assert job.is_running


@pytest.mark.needs(Feature.UNBOUNDED, Feature.CANCEL)
def test_a_cancelled_job_stops_reading(flights: Flights, start: Start) -> None:
    flights.put(100)
    job = start("copy")
    job.wait_until("all were seen", flights.all_seen)
    job.result.cancel()
    with pytest.raises(Exception, match="CANCELLED"):
        job.wait_for_end()
    flights.put_slowly(1.0)
    assert len(flights.seen()) == 100
