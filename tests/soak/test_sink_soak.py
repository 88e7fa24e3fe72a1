"""The sink against a Kinesis that fails all the time: small in every run, a million records in `make soak`."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions

from samza_kinesis_io.aggregation import deaggregate
from samza_kinesis_io.client import ClientConfig
from samza_kinesis_io.sink import WriteToKinesis
from samza_kinesis_io.testing import LocalKinesis

PARTS = 32
KEYS_PER_PART = 40


class _Records(beam.DoFn):
    """The records of one part: (key, number), the numbers of each key rising."""

    def __init__(self, count: int) -> None:
        self._count = count

    def process(self, part: int) -> Iterator[tuple[str, int]]:
        for number in range(self._count):
            yield f"{part}-{number % KEYS_PER_PART}", number


def _key(element: tuple[str, int]) -> str:
    return element[0]


def _serialize(element: tuple[str, int]) -> bytes:
    return b"%d %s" % (element[1], b"x" * 180)


def _write(endpoint_url: str, records_per_part: int, *, workers: int = 1, **options: Any) -> None:
    arguments = [f"--direct_num_workers={workers}", "--direct_running_mode=multi_threading"]
    with beam.Pipeline(runner="FnApiRunner", options=PipelineOptions(arguments)) as p:
        (
            p
            | beam.Create(range(PARTS))
            | beam.Reshuffle()
            | beam.ParDo(_Records(records_per_part))
            | WriteToKinesis(
                "delays",
                partition_key=_key,
                serializer=_serialize,
                client=ClientConfig(region="us-east-1", endpoint_url=endpoint_url),
                **options,
            )
        )


def _let_it_fail(kinesis: LocalKinesis) -> None:
    """5 % of the entries fail, 1 % of the connections drop: half of them before the records are written, half after."""
    chance = random.Random(11)
    faults = kinesis.fake.faults
    for code in ("InternalFailure", "ProvisionedThroughputExceededException"):
        faults.fail_entries(entry_where=lambda e: chance.random() < 0.025, code=code, times=None)
    faults.drop_connection("PutRecords", moment="before", times=None, probability=0.005)
    faults.drop_connection("PutRecords", moment="after", times=None, probability=0.005)


def _numbers_by_key(kinesis: LocalKinesis, *, collapse: bool = False) -> dict[str, list[int]]:
    """Every key's numbers in the order in which a reader sees them.

    With `collapse` a record that repeats the one before it of the same key, as a request does whose answer was lost,
    counts once; an aggregate is one record.
    """
    numbers: dict[str, list[int]] = defaultdict(list)
    before: dict[str, bytes] = {}
    for record in kinesis.fake.records("delays"):
        aggregate = deaggregate(record)
        users = [record] if aggregate is None else aggregate.records
        key = users[0].partition_key
        assert key is not None
        if collapse and before.get(key) == record.data:
            continue
        before[key] = record.data
        # Only one key has a hash key: all of an aggregate is of one partition key.
        numbers[key].extend(int(user.data[: user.data.index(b" ")]) for user in users)
    return numbers


MODES = [{}, {"ordered": True}, {"aggregate": True}, {"aggregate": True, "ordered": True}]


@pytest.mark.parametrize(
    ("records", "shards"),
    [(16_000, 16), pytest.param(1_000_000, 64, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])],
)
@pytest.mark.parametrize("options", MODES, ids=lambda mode: "+".join(mode) or "plain")
def test_nothing_is_missing_and_order_is_kept(records: int, shards: int, options: Mapping[str, bool]) -> None:
    per_part = records // PARTS
    with LocalKinesis(enforce_limits=True) as kinesis:
        kinesis.fake.create_stream("delays", shards=shards)
        _let_it_fail(kinesis)
        started = time.perf_counter()
        _write(kinesis.endpoint_url, per_part, workers=4, **options)
        took = time.perf_counter() - started
        numbers = _numbers_by_key(kinesis)
        collapsed = _numbers_by_key(kinesis, collapse=True)
        calls = kinesis.fake.calls
    read = sum(map(len, numbers.values()))
    print(f"\n{records} records, {read - PARTS * per_part} repeated, {calls['PutRecords']} requests, {took:.1f} s")
    for part in range(PARTS):
        for key in range(KEYS_PER_PART):
            expected = list(range(key, per_part, KEYS_PER_PART))
            assert sorted(set(numbers.pop(f"{part}-{key}"))) == expected
            if options.get("ordered"):
                assert collapsed[f"{part}-{key}"] == expected, "a repeated record follows itself, never its successor"
    assert not numbers


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL here")
@pytest.mark.parametrize("after_requests", [1, 7])
def test_a_worker_killed_in_the_middle_of_a_bundle_and_run_again_leaves_nothing_out(after_requests: int) -> None:
    reached = threading.Event()
    requests = 0

    def count(params: Mapping[str, Any]) -> bool:
        nonlocal requests
        requests += 1
        if requests >= after_requests:
            reached.set()
        return False

    with LocalKinesis() as kinesis:
        kinesis.fake.create_stream("delays", shards=4)
        kinesis.fake.faults.delay("PutRecords", 0.0, times=None, where=count)
        # Slow enough that the bundle cannot end before it is killed.
        slow = kinesis.fake.faults.delay("PutRecords", 0.2, times=None)
        worker = _start_worker(kinesis.endpoint_url)
        assert reached.wait(timeout=60)
        worker.kill()
        assert worker.wait(timeout=60) == -signal.SIGKILL
        slow.cancel()
        before = {k: set(v) for k, v in _numbers_by_key(kinesis).items()}
        assert sum(map(len, before.values())) < PARTS * 500, "it was killed too late to show anything"
        assert _start_worker(kinesis.endpoint_url).wait(timeout=120) == 0
        numbers = _numbers_by_key(kinesis)
    assert {key: set(seen) for key, seen in numbers.items()} == {
        f"{part}-{key}": set(range(key, 500, KEYS_PER_PART)) for part in range(PARTS) for key in range(KEYS_PER_PART)
    }


def _start_worker(endpoint_url: str) -> subprocess.Popen[bytes]:
    root = Path(__file__).resolve().parents[2]
    return subprocess.Popen(
        [sys.executable, __file__, endpoint_url], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}
    )


if __name__ == "__main__":
    _write(sys.argv[1], 500)
