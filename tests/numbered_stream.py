"""A stream whose records are numbers, and reads of it on a miniature runner."""

from __future__ import annotations

from apache_beam.utils.timestamp import Timestamp
from miniature_runner import MiniatureRunner

from samza_kinesis_io.aggregation import Aggregate
from samza_kinesis_io.positions import StartingPosition
from samza_kinesis_io.source import ReadFromKinesis
from samza_kinesis_io.testing import FakeKinesis, SimulatedClock


class Stream:
    """A stream of a FakeKinesis with numbered records."""

    def __init__(self, *, shards: int = 1, **options: object) -> None:
        self.clock = SimulatedClock()
        self.fake = FakeKinesis(clock=self.clock, log_calls=True, **options)  # type: ignore[arg-type]
        self.fake.create_stream("flights", shards=shards)
        self.count = 0

    def put(self, count: int, *, shard_id: str | None = None, seconds_apart: float = 0.01) -> None:
        for _ in range(count):
            key = f"key-{self.count % 97}"
            self.fake.put("flights", str(self.count).encode(), partition_key=key, shard_id=shard_id)
            self.count += 1
            self.clock.advance(seconds_apart)

    @property
    def open_shards(self) -> list[str]:
        return [s.shard_id for s in self.fake.shards("flights") if not s.is_closed]

    def read(self, *, restrictions: int = 1, **options: object) -> MiniatureRunner:
        options.setdefault("starting_position", StartingPosition.trim_horizon())
        read = ReadFromKinesis("flights", client=self.fake.factory(), clock=self.clock, **options)  # type: ignore[arg-type]
        return MiniatureRunner(self.clock, read, restrictions=restrictions)

    def put_aggregate(self, count: int, *, key: str = "key") -> str:
        """Put the next `count` numbers as one aggregate; return its sequence number."""
        aggregate = Aggregate()
        for _ in range(count):
            assert aggregate.add(key, None, str(self.count).encode())
            self.count += 1
        data, partition_key, explicit_hash_key = aggregate.encode()
        _, number = self.fake.put("flights", data, partition_key=partition_key, explicit_hash_key=explicit_hash_key)
        self.clock.advance(0.01)
        return number

    @property
    def now(self) -> Timestamp:
        return Timestamp(micros=round(self.clock.now_seconds() * 1e6))
