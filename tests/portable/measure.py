"""Latency from a put to the transform fused with the reader, and what an idle source costs. Prints; asserts nothing.

    PYTHONPATH=tests python -m portable.measure

The service runs in this process, the pipeline in one of its own. Linux only.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from pathlib import Path

from portable.pipelines import Read
from portable.runners import Runner, _prism
from portable.stream import Flights

from samza_kinesis_io.testing import LocalKinesis

_TICKS = os.sysconf("SC_CLK_TCK")


def _no_home(_: Path) -> None:
    pass


RUNNERS = (
    Runner("FnApiRunner", frozenset(), lambda _: ["--runner=FnApiRunner"], home=_no_home),
    Runner("Prism", frozenset(), _prism, home=_no_home),
)


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def latency(runner: Runner, *, shards: int, seconds: float) -> None:
    with LocalKinesis() as kinesis, contextlib.ExitStack() as stack:
        flights = Flights(kinesis, shards=shards)
        flights.put(shards)
        job = runner.start(stack, "copy", kinesis.endpoint_url, Read())
        job.wait_until("the first records came", flights.all_seen)
        warm_up = flights.count
        flights.put_slowly(seconds, per_second=10 * shards)
        job.wait_until("all records were seen", flights.all_seen)
        millis = [(s.seen_ns - s.put_ns) / 1e6 for s in flights.seen() if s.number >= warm_up]
        cuts = statistics.quantiles(millis, n=100)
        print(
            f"{runner.name}, {shards} shards, polls every 0.5 s: put -> fused transform "
            f"p50 {cuts[49]:.0f} ms, p99 {cuts[98]:.0f} ms, {len(millis)} records",
            flush=True,
        )
        kinesis.fake.faults.deny_access("GetRecords")
        job.abandon()


def idle(runner: Runner, *, shards: int, seconds: float) -> None:
    with LocalKinesis() as kinesis, contextlib.ExitStack() as stack:
        flights = Flights(kinesis, shards=shards)
        flights.put(1)
        job = runner.start(stack, "copy", kinesis.endpoint_url, Read())
        job.wait_until("the first record came", flights.all_seen)
        worker = flights.seen()[0].pid
        processes = {"worker": worker, **{Path(f"/proc/{p}/comm").read_text().strip(): p for p in _children(worker)}}
        time.sleep(3)
        before = {name: _cpu_seconds(pid) for name, pid in processes.items()}
        calls, began = kinesis.fake.calls["GetRecords"], time.monotonic()
        time.sleep(seconds)
        passed = time.monotonic() - began
        used = {name: (_cpu_seconds(pid) - before[name]) / passed for name, pid in processes.items()}
        print(
            f"{runner.name}, {shards} silent shards: "
            + ", ".join(f"{name} {share:.1%} of a core" for name, share in used.items())
            + f", {(kinesis.fake.calls['GetRecords'] - calls) / passed / shards:.2f} GetRecords per shard and second",
            flush=True,
        )
        kinesis.fake.faults.deny_access("GetRecords")
        job.abandon()


if __name__ == "__main__":
    for _runner in RUNNERS:
        latency(_runner, shards=16, seconds=15)
        idle(_runner, shards=64, seconds=20)
