"""The source in a process of its own that is killed again and again while shards split and merge and calls fail.

The child keeps a runner's books in a file, which it replaces after every bundle. Two rounds in every run, ten in
`make soak`; there the state machine of `test_source_properties.py` runs its 10,000 examples too.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from lineages import assert_parents_first
from miniature_runner import MiniatureRunner

from samza_kinesis_io.client import ClientConfig
from samza_kinesis_io.clock import SystemClock
from samza_kinesis_io.polling import ReadLimits
from samza_kinesis_io.positions import StartingPosition
from samza_kinesis_io.source import ReadFromKinesis
from samza_kinesis_io.testing import LocalKinesis

ROOT = Path(__file__).resolve().parents[2]


class Job:
    """The child's side of the books: what it has written last."""

    def __init__(self, kinesis: LocalKinesis, directory: Path, restrictions: int) -> None:
        self._kinesis = kinesis
        self.books = directory / "books"
        self._restrictions = restrictions
        self._worker: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._worker = subprocess.Popen(
            [sys.executable, __file__, self._kinesis.endpoint_url, str(self.books), str(self._restrictions)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        )

    def kill(self) -> None:
        assert self._worker is not None
        self._worker.kill()
        assert self._worker.wait(timeout=60) == -signal.SIGKILL, "it ended by itself before it was killed"
        self._worker = None

    def runner(self) -> MiniatureRunner:
        return MiniatureRunner.resumed(SystemClock(), self.books.read_bytes())

    def numbers(self) -> list[int]:
        return self.runner().numbers if self.books.exists() else []

    def until(self, condition: Callable[[], bool], what: str) -> None:
        assert self._worker is not None
        deadline = time.monotonic() + 120
        while not condition():
            assert self._worker.poll() is None, f"the worker ended with {self._worker.returncode}"
            assert time.monotonic() < deadline, f"still not after two minutes: {what}"
            time.sleep(0.01)  # another process: there is nothing to wait on

    def close(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker.wait(timeout=60)


def _reshard(kinesis: LocalKinesis, rng: random.Random) -> None:
    shards = [s for s in kinesis.fake.shards("flights") if not s.is_closed]
    shards.sort(key=lambda s: s.hash_key_range)
    at = rng.randrange(len(shards))
    if len(shards) > 8 or (len(shards) > 1 and rng.random() < 0.5):
        at = min(at, len(shards) - 2)
        kinesis.fake.merge("flights", shards[at].shard_id, shards[at + 1].shard_id)
    else:
        kinesis.fake.split("flights", shards[at].shard_id)


def _let_it_fail(kinesis: LocalKinesis) -> None:
    faults = kinesis.fake.faults
    for operation in ("GetRecords", "GetShardIterator", "ListShards"):
        faults.internal_failure(operation, times=None, probability=0.03)
        faults.drop_connection(operation, times=None, probability=0.02)
    faults.throttle("GetRecords", times=None, probability=0.02)
    faults.expire_iterators(times=None, probability=0.03)
    faults.end_without_children(times=20)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL here")
@pytest.mark.parametrize("restrictions", [1, 3])
@pytest.mark.parametrize("rounds", [2, pytest.param(10, marks=[pytest.mark.soak, pytest.mark.timeout(1200)])])
def test_a_worker_killed_in_every_round_of_resharding_leaves_every_record_in_the_books_once(
    rounds: int, restrictions: int, tmp_path: Path
) -> None:
    rng = random.Random(rounds)
    count = 0
    with LocalKinesis() as kinesis:
        kinesis.fake.create_stream("flights", shards=3)

        def put(records: int) -> None:
            nonlocal count
            for _ in range(records):
                kinesis.fake.put("flights", b"%d" % count, partition_key=f"key-{count % 97}")
                count += 1

        put(100)
        _let_it_fail(kinesis)
        job = Job(kinesis, tmp_path, restrictions)
        try:
            for _ in range(rounds):
                before = len(job.numbers())
                put(150)
                job.start()
                job.until(lambda before=before: len(job.numbers()) > before, "it reads")  # type: ignore[misc]
                for _ in range(2):
                    _reshard(kinesis, rng)
                    put(150)
                    time.sleep(rng.random() * 0.3)  # kill it anywhere
                job.kill()
            kinesis.fake.faults.clear()
            job.start()
            job.until(lambda: len(job.numbers()) >= count, "it has read everything")
            time.sleep(0.5)  # for what it would read twice
            job.kill()
        finally:
            job.close()
        runner = job.runner()
        assert sorted(runner.numbers) == list(range(count))
        assert not [e for e in runner.books.emitted if e.arrived_late]
        last: dict[str, int] = {}
        for e in runner.books.emitted:
            number = int(e.record.sequence_number)
            assert number > last.get(e.record.shard_id, 0)
            last[e.record.shard_id] = number
        if restrictions == 1:
            assert_parents_first(kinesis.fake.shards("flights"), [e.record.shard_id for e in runner.books.emitted])


def _work(endpoint_url: str, books: Path, restrictions: int) -> None:
    clock = SystemClock()
    if books.exists():
        runner = MiniatureRunner.resumed(clock, books.read_bytes())
    else:
        read = ReadFromKinesis(
            "flights",
            starting_position=StartingPosition.trim_horizon(),
            client=ClientConfig(region="us-east-1", endpoint_url=endpoint_url),
            poll_interval_seconds=0.05,
            max_records_per_get=10,
            bundle_records=25,
            limits=ReadLimits(calls_per_second=None, bytes_per_second=None),
        )
        runner = MiniatureRunner(clock, read, restrictions=restrictions)
    while True:
        for index in list(runner.books.restrictions):
            runner.bundle(index)
            fresh = books.with_suffix(".new")
            fresh.write_bytes(runner.saved())
            fresh.replace(books)


if __name__ == "__main__":
    _work(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
