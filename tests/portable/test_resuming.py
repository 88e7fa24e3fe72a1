"""A new job that goes on where an old one was: retained checkpoints and savepoints, on Flink."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from portable.flink import Cluster
from portable.runners import Feature, Job, rest_api
from portable.stream import Flights

Start = Callable[..., Job]


@pytest.fixture
def cluster() -> Cluster:
    # The job server must have this cluster as its master: with [local] it ignores --savepoint_path, silently.
    return Cluster(rest_api())


def _started(cluster: Cluster, start: Start, flights: Flights, *more_arguments: str) -> tuple[Job, str]:
    before = cluster.running_jobs()
    job = start("copy", more_arguments=more_arguments)
    job.wait_until("the cluster runs it", lambda: bool(cluster.running_jobs() - before))
    (job_id,) = cluster.running_jobs() - before
    job.wait_until("all records were seen", flights.all_seen)
    return job, job_id


@pytest.mark.needs(Feature.SAVEPOINTS, Feature.UNBOUNDED)
@pytest.mark.parametrize("parallelism", [2, 4])
def test_a_job_goes_on_from_the_last_checkpoint_of_one_that_was_cancelled(
    cluster: Cluster, flights: Flights, start: Start, parallelism: int
) -> None:
    """Shards split and merge between. What came after the checkpoint comes again, what came before it does not."""
    flights.put(200)
    job, job_id = _started(cluster, start, flights)
    flights.put_with_reshards(3.0)
    job.wait_until("all records were seen", flights.all_seen)
    begun = cluster.last_checkpoint(job_id)
    number = begun[0] if begun is not None else 0
    # Two more: the next one may have begun before the last record was seen.
    job.wait_until("they are in a checkpoint", lambda: (cluster.last_checkpoint(job_id) or (0, ""))[0] >= number + 2)
    in_checkpoint = flights.count
    flights.put(50)
    job.wait_until("all records were seen", flights.all_seen)
    cluster.cancel(job_id)
    last = cluster.last_checkpoint(job_id)
    assert last is not None
    flights.split()
    flights.put(200)
    _started(cluster, start, flights, f"--savepoint_path={last[1]}", f"--parallelism={parallelism}")
    times = Counter(s.number for s in flights.seen())
    assert [n for n in range(in_checkpoint) if times[n] != 1] == []


@pytest.mark.needs(Feature.SAVEPOINTS, Feature.UNBOUNDED)
def test_a_job_stopped_with_a_savepoint_is_followed_without_a_seam(
    cluster: Cluster, flights: Flights, start: Start, tmp_path: Path
) -> None:
    flights.put(200)
    job, job_id = _started(cluster, start, flights)
    flights.put_with_reshards(3.0)
    job.wait_until("all records were seen", flights.all_seen)
    savepoint = cluster.stop_with_savepoint(job_id, tmp_path)
    flights.merge()
    flights.put(200)
    _started(cluster, start, flights, f"--savepoint_path={savepoint}")
    flights.check_each_seen_once_and_in_order()
