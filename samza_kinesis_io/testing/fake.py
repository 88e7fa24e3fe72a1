"""`FakeKinesis`: the service in this process, with its states, limits and errors, on a clock of the test's choice.

clock = SimulatedClock()
fake = FakeKinesis(clock=clock)
fake.create_stream("flights", shards=2)
fake.put("flights", b"data", partition_key="AA")
records = p | ReadFromKinesis("flights", client=fake.factory(), ...)
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from samza_kinesis_io.clock import Clock, SystemClock
from samza_kinesis_io.limits import DEFAULT_MAX_RECORD_BYTES, DEFAULT_RETENTION_HOURS, KIB
from samza_kinesis_io.records import KinesisRecord
from samza_kinesis_io.shards import Shard
from samza_kinesis_io.testing.faults import FakeServiceError, Faults, Plan
from samza_kinesis_io.testing.process_local import ProcessLocal
from samza_kinesis_io.testing.service import Answer, EncodedRecords, Params, Service
from samza_kinesis_io.testing.streams import FakeShard, FakeStream, decode_records

if TYPE_CHECKING:
    from samza_kinesis_io.testing.client import FakeClientFactory


@dataclass(frozen=True, slots=True)
class Call:
    """One entry of a `FakeKinesis`'s log."""

    seconds: float
    operation: str
    params: Params


class FakeKinesis(ProcessLocal):
    """Kinesis Data Streams in memory: one region of one account.

    Safe to call from many threads. Pickles as a reference, within this process only.

    Args:
        clock: Everything that depends on time asks it.
        faults: What shall go wrong; also reachable as `.faults` and changeable at any time.
        enforce_limits: Throttle as the service does: per shard 5 GetRecords, 5 GetShardIterator and 2 MiB read, 1000
            records and 1 MiB written per second. Off by default, so that tests need not be slow.
        transition_seconds: How long a stream is CREATING, UPDATING or DELETING. 0: no state but ACTIVE is ever seen.
        retention_hours: Of new streams.
        seed: Where AUTO streams put their records.
        log_calls: Keep every call with its time and parameters in `.log`.

    Attributes:
        calls: How many calls came, by operation; failed ones too.
        errors: How many calls were answered with an error, by operation and code.
        log: The calls, if asked for.
    """

    def __init__(
        self,
        *,
        clock: Clock | None = None,
        region: str = "us-east-1",
        account_id: str = "123456789012",
        faults: Faults | None = None,
        enforce_limits: bool = False,
        transition_seconds: float = 0.0,
        retention_hours: int = DEFAULT_RETENTION_HOURS,
        seed: int = 0,
        log_calls: bool = False,
    ) -> None:
        if transition_seconds < 0:
            raise ValueError(f"transition_seconds must be >= 0, got {transition_seconds}")
        self.clock: Clock = clock if clock is not None else SystemClock()
        self.faults = faults if faults is not None else Faults()
        self.calls: Counter[str] = Counter()
        self.errors: Counter[tuple[str, str]] = Counter()
        self.log: list[Call] = []
        self._log_calls = log_calls
        self._lock = threading.RLock()
        self._latest = 0.0
        self._service = Service(
            region=region,
            account_id=account_id,
            enforce_limits=enforce_limits,
            transition_seconds=transition_seconds,
            retention_hours=retention_hours,
            seed=seed,
        )

    @property
    def region(self) -> str:
        return self._service.region

    @property
    def account_id(self) -> str:
        return self._service.account_id

    # The service's face.

    def call(self, operation: str, params: Params) -> Answer:
        """Return the answer of an operation, shaped as boto3 gives it; timestamps are float seconds since the epoch.

        Raises:
            FakeServiceError: the service answers with an error.
            DroppedConnection: by an arranged fault.
        """
        plan = self.arrive(operation, params)
        self.clock.sleep(plan.delay_seconds)
        answer = self.perform(operation, params, plan)
        return answer.decoded() if isinstance(answer, EncodedRecords) else answer

    def arrive(self, operation: str, params: Params) -> Plan:
        """Count a call and decide what happens to it; the caller lets `delay_seconds` pass, then calls `perform`."""
        with self._lock:
            self.calls[operation] += 1
            if self._log_calls:
                self.log.append(Call(self._now(), operation, params))
        return self.faults.plan(operation, params)

    def perform(self, operation: str, params: Params, plan: Plan) -> Answer | EncodedRecords:
        """Do what `call` does, after `arrive`, but leave the records of GetRecords encoded."""
        try:
            if plan.error_before is not None:
                raise plan.error_before
            with self._lock:
                answer = self._service.perform(operation, params, self._now(), plan)
            if plan.error_after is not None:
                raise plan.error_after
        except FakeServiceError as error:
            with self._lock:
                self.errors[operation, error.code] += 1
            raise
        return answer

    def factory(self) -> FakeClientFactory:
        """Return what `client=` of the package's transforms takes, for pipelines that run in this process."""
        from samza_kinesis_io.testing.client import FakeClientFactory  # it names this class

        return FakeClientFactory(self)

    # Shorthand for tests. None of it counts as a call, none of it is struck by faults or limits.

    def create_stream(
        self,
        name: str,
        *,
        shards: int = 1,
        auto_distribution: bool = False,
        max_record_kib: int = DEFAULT_MAX_RECORD_BYTES // KIB,
    ) -> None:
        """Create a stream that is ACTIVE at once. With `auto_distribution` it is on-demand, with the strategy AUTO."""
        with self._lock:
            now = self._now()
            stream = self._service.new_stream(
                name,
                now,
                on_demand=auto_distribution,
                auto_distribution=auto_distribution,
                max_record_bytes=max_record_kib * KIB,
            )
            stream.open_initial(shards, now)
            stream.status = "ACTIVE"

    def put(
        self,
        stream: str,
        data: bytes,
        *,
        partition_key: str | None = "key",
        explicit_hash_key: str | None = None,
        shard_id: str | None = None,
    ) -> tuple[str, str]:
        """Write a record; return its shard's id and its sequence number. `shard_id`: into this open shard."""
        with self._lock:
            now = self._now()
            into = self._service.active_stream({"StreamName": stream}, now)
            entry = self._service.check_entry(
                into, {"Data": data, "PartitionKey": partition_key, "ExplicitHashKey": explicit_hash_key}, 1
            )
            shard = (
                self._service.route(into, entry.hash_key)
                if shard_id is None
                else self._service.open_shard(into, shard_id, now)
            )
            return shard.shard_id, shard.append(now, entry.data, entry.partition_key, entry.size_bytes)

    def split(self, stream: str, shard_id: str, at: int | None = None) -> tuple[str, str]:
        """Split an open shard at once; return the children. The upper begins at hash key `at`, or in the middle."""
        with self._lock:
            now = self._now()
            of = self._service.stream({"StreamName": stream}, now)
            shard = self._service.open_shard(of, shard_id, now)
            middle = (shard.hash_key_range.start + shard.hash_key_range.end) // 2 + 1
            lower, upper = of.split(shard, middle if at is None else at, now)
            return lower.shard_id, upper.shard_id

    def merge(self, stream: str, shard_id: str, adjacent_shard_id: str) -> str:
        """Merge two open neighbours at once; return the child."""
        with self._lock:
            now = self._now()
            of = self._service.stream({"StreamName": stream}, now)
            shard, adjacent = self._service.adjacent_shards(of, shard_id, adjacent_shard_id, now)
            return of.merge(shard, adjacent, now).shard_id

    def trim(self, stream: str, shard_id: str | None = None, *, before_seconds: float | None = None) -> None:
        """Drop records as retention does: those that arrived before `before_seconds`, or all that are there now.

        A shard that was closed before then goes with its records. Without `shard_id`: in every shard.
        """
        with self._lock:
            of, shards, now = self._shards_of(stream, shard_id)
            if shard_id is None:
                of.trim(now if before_seconds is None else before_seconds)
            for shard in shards:
                shard.trim(before_seconds)

    def records(self, stream: str, shard_id: str | None = None) -> list[KinesisRecord]:
        """Return the records that are kept: shard by shard in the order of creation, each in sequence order."""
        with self._lock:
            of, shards, now = self._shards_of(stream, shard_id)
            kept = [(shard.shard_id, shard.kept(of.oldest_seconds(now))) for shard in shards]
        return [
            KinesisRecord(
                record.data,
                record.sequence_number,
                record.partition_key,
                record.approximate_arrival_seconds,
                shard_id=of_shard,
                stream=stream,
            )
            for of_shard, pieces in kept
            for record in decode_records(pieces)
        ]

    def shards(self, stream: str) -> list[Shard]:
        """Return the shards that exist, in the order of their creation."""
        with self._lock:
            return [
                Shard(
                    shard_id=shard.shard_id,
                    hash_key_range=shard.hash_key_range,
                    parent_shard_id=shard.parents[0] if shard.parents else None,
                    adjacent_parent_shard_id=shard.parents[1] if len(shard.parents) > 1 else None,
                    starting_sequence_number=shard.starting_sequence_number,
                    ending_sequence_number=shard.ending_sequence_number,
                )
                for shard in self._shards_of(stream, None)[1]
            ]

    def _shards_of(self, stream: str, shard_id: str | None) -> tuple[FakeStream, list[FakeShard], float]:
        """Return a stream, its shards or the one that is named, and the time."""
        now = self._now()
        of = self._service.stream({"StreamName": stream}, now)
        return of, of.shards(now) if shard_id is None else [self._service.shard(of, shard_id, now)], now

    def _now(self) -> float:
        # The machine's clock may be set back; the service's time is not.
        self._latest = max(self._latest, self.clock.now_seconds())
        return self._latest
