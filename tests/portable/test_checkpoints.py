"""Checkpoints outside of the runner: a new job goes on where a runner had committed the old one."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from portable.pipelines import SEEN, Read, build
from portable.runners import Feature, Job, worker_environment
from portable.stream import Flights

from samza_kinesis_io.checkpoints import FileCheckpointStore
from samza_kinesis_io.testing import LocalKinesis

Start = Callable[..., Job]


def kept_in(directory: Path) -> Read:
    store = FileCheckpointStore(str(directory))
    return Read(options={"checkpoints": store, "checkpoint_interval_seconds": 0.2})


@pytest.mark.needs(Feature.UNBOUNDED, Feature.DRIVER_IS_WORKER)
def test_a_new_job_goes_on_where_the_old_one_was_committed(
    flights: Flights, start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And no bundle of either is one that Prism cannot finalize: it would log an error for each."""
    flights.put(100)
    with caplog.at_level(logging.WARNING):
        old = start("copy", kept_in(tmp_path))
        old.wait_until("the first records were seen", flights.all_seen)
        flights.put_with_reshards(2.0)
        old.wait_until("all records were seen", flights.all_seen)
        wait_until_rows_stand_still(tmp_path)
        denied = flights.fake.faults.deny_access("GetRecords")
        old.abandon()
        assert not old.is_running
        denied.cancel()
        flights.put(100)
        new = start("copy", kept_in(tmp_path))
        new.wait_until("the new job read the rest", flights.all_seen)
        flights.put_with_reshards(1.0)
        new.wait_until("all records were seen", flights.all_seen)
    flights.check_each_seen_once_and_in_order()
    assert "finalizable" not in caplog.text


@pytest.mark.needs(Feature.BOUNDED, Feature.DRIVER_IS_WORKER)
def test_a_bounded_job_reads_what_came_since_the_one_before(flights: Flights, start: Start, tmp_path: Path) -> None:
    """So the last bundle's rows were saved, though nothing came after it."""
    for _ in range(3):
        flights.put(100)
        flights.split()
        start("copy", _bounded(flights, tmp_path)).wait_for_end()
    flights.check_each_seen_once_and_in_order()


def wait_until_rows_stand_still(directory: Path) -> None:
    """A second is five intervals."""
    path = directory / "flights.json"
    before = b""
    while (now := path.read_bytes()) != before:
        before = now
        time.sleep(1)


@pytest.mark.timeout(180)
def test_a_job_killed_with_kill_9_is_started_anew_and_nothing_is_lost(tmp_path: Path) -> None:
    """What came after its last rows is repeated, and only that."""
    with LocalKinesis() as kinesis:
        flights = Flights(kinesis, shards=2)
        for life in range(3):
            flights.put(50)
            with (tmp_path / f"log-{life}").open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, __file__, kinesis.endpoint_url, str(tmp_path)],
                    env=worker_environment(),
                    stdout=log,
                    stderr=log,
                )
            try:
                deadline = time.monotonic() + 50
                while not flights.all_seen():
                    assert process.poll() is None, (tmp_path / f"log-{life}").read_text()[-3000:]
                    assert time.monotonic() < deadline, (tmp_path / f"log-{life}").read_text()[-3000:]
                    time.sleep(0.05)
                flights.split() if life == 0 else flights.merge()
                flights.put_slowly(0.5)
            finally:
                process.kill()
                process.wait()
        assert FileCheckpointStore(str(tmp_path)).load("flights")
        flights.put(20)
        build("copy", kinesis.endpoint_url, _bounded(flights, tmp_path), ["--runner=FnApiRunner"]).run()
        times = Counter(s.number for s in flights.seen())
        assert set(times) == set(range(flights.count))
        assert len(kinesis.fake.records(SEEN)) < 2 * flights.count


def _bounded(flights: Flights, directory: Path) -> Read:
    return Read(stop_at=flights.after_the_last(), options=kept_in(directory).options)


if __name__ == "__main__":
    endpoint_url, directory = sys.argv[1:]
    build("copy", endpoint_url, kept_in(Path(directory)), ["--runner=FnApiRunner"]).run()
