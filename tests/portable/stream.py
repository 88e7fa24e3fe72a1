"""A stream with numbered records that changes its shards while it is read, and what the pipelines said of it."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from portable.pipelines import COUNTS, FLIGHTS, SEEN

from samza_kinesis_io.shards import Shard
from samza_kinesis_io.testing import Fault, LocalKinesis

KEYS = 7


@dataclass(frozen=True)
class Seen:
    """One record as it came out of a reader."""

    number: int
    put_ns: int
    seen_ns: int
    pid: int
    shard_id: str
    sequence_number: int


class Flights:
    def __init__(self, kinesis: LocalKinesis, *, shards: int, one_restriction: bool = True) -> None:
        self.one_restriction = one_restriction
        self.kinesis = kinesis
        self.fake = kinesis.fake
        self.count = 0
        self.fake.create_stream(FLIGHTS, shards=shards)
        for stream in (SEEN, COUNTS):
            self.fake.create_stream(stream, shards=1)

    # What happens to it.

    def put(self, count: int) -> None:
        for _ in range(count):
            n = self.count
            # The key says which window counts it, the hash key which shard holds it: all of them in turn.
            self.fake.put(
                FLIGHTS,
                b"%d,%d" % (n, time.monotonic_ns()),
                partition_key=f"key-{n % KEYS}",
                explicit_hash_key=str(n * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128),
            )
            self.count += 1

    def put_slowly(self, seconds: float, *, per_second: int = 100) -> None:
        """Put records evenly; never more of them at once than a tenth of a second's, however late this thread is."""
        start = time.monotonic()
        done = 0
        while (passed := time.monotonic() - start) < seconds:
            due = min(round(passed * per_second), done + per_second // 10)
            self.put(due - done)
            done = due
            threading.Event().wait(0.02)

    def open_shards(self) -> list[Shard]:
        return sorted(
            (s for s in self.fake.shards(FLIGHTS) if not s.is_closed), key=lambda shard: shard.hash_key_range.start
        )

    def split(self) -> None:
        self.fake.split(FLIGHTS, self.open_shards()[0].shard_id)

    def merge(self) -> None:
        left, right = self.open_shards()[-2:]
        self.fake.merge(FLIGHTS, left.shard_id, right.shard_id)

    def put_with_reshards(self, seconds: float) -> None:
        """Put records for this long, with a split after a third of it and a merge after two thirds."""
        self.put_slowly(seconds / 3)
        self.split()
        self.put_slowly(seconds / 3)
        self.merge()
        self.put_slowly(seconds / 3)

    def hold_back(self, shard_index: int) -> Fault:
        """Let nobody read this shard (by its place in the order of creation) until the fault is cancelled."""
        from samza_kinesis_io.testing.tokens import ShardIterator

        def is_of_shard(params: Mapping[str, Any]) -> bool:
            return ShardIterator.decode(params["ShardIterator"]).shard_index == shard_index

        return self.fake.faults.throttle("GetRecords", times=None, where=is_of_shard)

    def after_the_last(self) -> float:
        """Return the first millisecond, in seconds since the epoch, before which all records have arrived."""
        return max(r.approximate_arrival_timestamp.micros for r in self.fake.records(FLIGHTS)) / 1e6 + 0.001

    # What the pipelines said.

    def seen(self) -> list[Seen]:
        """Every record as the reader emitted it, in the order of emission."""
        rows = [record.data.decode().split(",") for record in self.fake.records(SEEN)]
        found = [Seen(int(n), int(put), int(at), int(pid), shard, int(seq)) for n, put, at, pid, shard, seq in rows]
        return sorted(found, key=lambda s: s.seen_ns)

    def all_seen(self) -> bool:
        return len({s.number for s in self.seen()}) == self.count

    def counts(self) -> dict[tuple[str, float], list[int]]:
        """The panes of each key and second."""
        panes = defaultdict(list)
        for record in self.fake.records(COUNTS):
            key, start, count, _, _ = json.loads(record.data)
            panes[key, start].append(count)
        return dict(panes)

    def expected_counts(self) -> dict[tuple[str, float], list[int]]:
        counted = Counter(
            (record.partition_key or "", float(record.approximate_arrival_timestamp.micros // 1_000_000))
            for record in self.fake.records(FLIGHTS)
        )
        return {where: [count] for where, count in counted.items()}

    # What must be true of it.

    def check_each_seen_once_and_in_order(self) -> None:
        seen = self.seen()
        numbers = Counter(s.number for s in seen)
        assert sorted(set(range(self.count)) - set(numbers)) == [], f"these of {self.count} were lost"
        assert sorted(n for n, times in numbers.items() if times > 1) == [], "these came more than once"
        self.check_order(seen)

    def check_order(self, seen: list[Seen]) -> None:
        """The records of a shard come in sequence order, and a child's after all of its parents'."""
        by_shard: dict[str, list[Seen]] = defaultdict(list)
        for s in seen:
            by_shard[s.shard_id].append(s)
        for shard_id, records in by_shard.items():
            sequence = [s.sequence_number for s in records]
            assert sequence == sorted(sequence), f"{shard_id} is out of order"
        ranges = {shard.shard_id: shard.hash_key_range for shard in self.fake.shards(FLIGHTS)}
        for child in self.fake.shards(FLIGHTS):
            for parent in child.parents:
                # Which of several restrictions reads a child is decided by its first hash key; its other parent may
                # be read by another one.
                is_owner = ranges[parent].start <= child.hash_key_range.start <= ranges[parent].end
                if by_shard[parent] and by_shard[child.shard_id] and (is_owner or self.one_restriction):
                    assert by_shard[parent][-1].seen_ns < by_shard[child.shard_id][0].seen_ns, (
                        f"{child.shard_id} came before the end of its parent {parent}"
                    )
