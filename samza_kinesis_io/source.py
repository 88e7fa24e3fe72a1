"""`ReadFromKinesis`: Kinesis streams as a splittable DoFn.

    Impulse ─► PlanShards ─► ReadShards (SDF) ─► TakeBatchesApart (fused) ─► records

`PlanShards` lists the shards once and makes one element per restriction. `ReadShards` reads a restriction through the
process-wide `KinesisSystemConsumer`, claims whole batches and emits them as single elements; the DoFn behind it gives
every record its own timestamp, which costs half of emitting them one by one and is right where fusion breaks, too.
"""

from __future__ import annotations

import enum
import logging
import random
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any, Final

import apache_beam as beam
import msgspec
from apache_beam import coders
from apache_beam.io.watermark_estimators import ManualWatermarkEstimator
from apache_beam.metrics import Metrics
from apache_beam.transforms.core import RestrictionProvider, WatermarkEstimatorProvider
from apache_beam.transforms.window import GlobalWindow, TimestampedValue
from apache_beam.utils.timestamp import Duration, Timestamp
from apache_beam.utils.windowed_value import WindowedValue, create

from samza_kinesis_io import metrics
from samza_kinesis_io.aggregation import HashFilter
from samza_kinesis_io.checkpointing import (
    Checkpointing,
    FrontierRows,
    SaveRows,
    acquire_rows,
    nothing_to_save,
    release_rows,
    resumed,
)
from samza_kinesis_io.checkpoints import CheckpointStore
from samza_kinesis_io.client import (
    ClientConfig,
    ClientFactory,
    KinesisClient,
    ShardFilter,
    ShardFilterKind,
    StreamDescription,
    StreamId,
    StreamStatus,
)
from samza_kinesis_io.clock import Clock, SystemClock
from samza_kinesis_io.consumer import Attachment, Batch, GroupKey, SourceConfig, shared_consumer
from samza_kinesis_io.errors import (
    ConfigurationError,
    IncompleteShardList,
    InvalidArgument,
    KinesisIOError,
    StaleAttachment,
)
from samza_kinesis_io.limits import MAX_RECORDS_PER_GET, MIB
from samza_kinesis_io.polling import ReadLimits
from samza_kinesis_io.positions import StartingPosition, StartKind, StopKind, StopPosition, time_text
from samza_kinesis_io.records import KinesisRecord, KinesisRecordCoder
from samza_kinesis_io.restriction import (
    Advance,
    Claim,
    FrontierTracker,
    ShardFrontier,
    ShardFrontierCoder,
    ShardKey,
    ShardState,
    adopted,
    after_loss,
    planned,
)
from samza_kinesis_io.retry import BackoffPolicy
from samza_kinesis_io.runners import check_checkpoints, check_read, restriction_count
from samza_kinesis_io.shards import Shard, groups
from samza_kinesis_io.watermark import ArrivalTimeWatermark, WatermarkPolicy

_log = logging.getLogger(__name__)


class DataLossPolicy(enum.Enum):
    """What to do when Kinesis has dropped records before they were read."""

    FAIL = "FAIL"
    """Fail the bundle, naming shard and position."""

    CONTINUE = "CONTINUE"
    """Go on with the oldest record that is left; log and count what was skipped."""


# Elements and their coders.


@dataclass(frozen=True, slots=True)
class ShardGroup:
    """The element behind one restriction. Unique in the pipeline, and its bytes never change: Flink keys state by them.

    `frontier` is the encoded initial `ShardFrontier`, without nonce: a block of bytes, so that encoding the element
    again with every residual costs nothing.
    """

    uid: str
    index: int
    group_count: int
    frontier: bytes


class ShardGroupCoder(coders.Coder):
    """Wire form: byte 0x01, then the MessagePack array [uid, index, group count, frontier]. Deterministic."""

    def encode(self, value: ShardGroup) -> bytes:
        return b"\x01" + msgspec.msgpack.encode((value.uid, value.index, value.group_count, value.frontier))

    def decode(self, encoded: bytes) -> ShardGroup:
        if encoded[:1] != b"\x01":
            raise ValueError(f"unknown version {encoded[:1]!r} of an encoded ShardGroup; a newer release wrote it")
        return ShardGroup(*msgspec.msgpack.decode(encoded[1:], type=tuple[str, int, int, bytes]))

    def is_deterministic(self) -> bool:
        return True

    def to_type_hint(self) -> type[ShardGroup]:
        return ShardGroup

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    def __hash__(self) -> int:
        return hash(type(self))


class RecordBatch(msgspec.Struct, frozen=True):
    """Records of one shard and their timestamps, as one element."""

    records: list[KinesisRecord]
    timestamps_micros: list[int]


class RecordBatchCoder(coders.Coder):
    """Wire form: byte 0x01, then the MessagePack array [[record as `KinesisRecordCoder` writes it, ...], [µs, ...]]."""

    def __init__(self) -> None:
        self._record = KinesisRecordCoder()

    def encode(self, value: RecordBatch) -> bytes:
        encode = self._record.encode
        return b"\x01" + msgspec.msgpack.encode(([encode(r) for r in value.records], value.timestamps_micros))

    def decode(self, encoded: bytes) -> RecordBatch:
        if encoded[:1] != b"\x01":
            raise ValueError(f"unknown version {encoded[:1]!r} of an encoded RecordBatch; a newer release wrote it")
        records, timestamps = msgspec.msgpack.decode(encoded[1:], type=tuple[list[bytes], list[int]])
        decode = self._record.decode
        return RecordBatch([decode(r) for r in records], timestamps)

    def estimate_size(self, value: RecordBatch) -> int:
        # By its first record: Beam asks for the first ten elements of each bundle, which are all of ours, and encoding
        # them would be a tenth of the whole read.
        first = len(self._record.encode(value.records[0])) if value.records else 0
        return 8 + len(value.records) * (first + 9 + 5)  # 9: a timestamp; 5: how MessagePack says a length

    def is_deterministic(self) -> bool:
        return True

    def to_type_hint(self) -> type[RecordBatch]:
        return RecordBatch

    def __reduce__(self) -> tuple[Any, ...]:
        return (RecordBatchCoder, ())

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    def __hash__(self) -> int:
        return hash(type(self))


coders.registry.register_coder(ShardGroup, ShardGroupCoder)
coders.registry.register_coder(RecordBatch, RecordBatchCoder)


# What a read is.


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """Everything a read was told, fixed when the pipeline is built. Travels in the pipeline; holds no secret."""

    source: SourceConfig
    start: StartingPosition
    stop: StopPosition | None
    watermark: WatermarkPolicy
    on_data_loss: DataLossPolicy
    restrictions: int
    bundle_seconds: float
    bundle_records: int
    bundle_bytes: int
    defer_seconds: float
    checkpointing: Checkpointing = Checkpointing()

    @property
    def is_bounded(self) -> bool:
        return self.stop is not None


_PLANNING_BACKOFF: Final = BackoffPolicy(initial_seconds=0.5, max_seconds=10.0)
_PLANNING_SECONDS: Final = 600.0
_INCOMPLETE_LISTS: Final = 5


class PlanShards(beam.DoFn):
    """Lists the shards and emits a `ShardGroup` per restriction. Goes on from checkpoints where there are any."""

    def __init__(self, plan: ReadPlan, clock: Clock) -> None:
        self._plan = plan
        self._clock = clock

    def process(self, _: Any) -> Iterator[ShardGroup]:
        plan = self._plan
        families: list[tuple[ShardState, ...]] = []
        states_by_stream: list[tuple[ShardState, ...]] = []
        for index, stream in enumerate(plan.source.streams):
            client = plan.source.factory.connect(stream)
            try:
                states_by_stream.append(self._plan_stream(client, index, stream))
            finally:
                client.close()
        total = sum(len(states) for states in states_by_stream)
        _count(metrics.SHARDS_PLANNED, total)
        if plan.restrictions == 1:
            families = [tuple(state for states in states_by_stream for state in states)]
        else:
            for states in states_by_stream:
                share = max(1, round(plan.restrictions * len(states) / max(1, total)))
                families.extend(_dealt(states, share))
        families = [f for f in families if f]
        coder = ShardFrontierCoder()
        for index, family in enumerate(families):
            yield ShardGroup(plan.source.uid, index, len(families), coder.encode(ShardFrontier(family)))

    def _plan_stream(self, client: KinesisClient, index: int, stream: StreamId) -> tuple[ShardState, ...]:
        plan, clock = self._plan, self._clock
        deadline = clock.monotonic_seconds() + _PLANNING_SECONDS
        rng = random.Random(f"{plan.source.uid}/{index}")
        failures = incomplete = 0
        while True:
            try:
                description = client.describe_stream(stream)
                if description.status in (StreamStatus.ACTIVE, StreamStatus.UPDATING):
                    rows = plan.checkpointing.load(index, stream.name)
                    if rows:
                        # Unfiltered: what ended before this job's start may not be read yet.
                        every, micros = client.list_shards(stream), plan.watermark.initial_micros(None)
                        states = resumed(index, every, rows, plan.start, plan.stop, micros)
                        where = {s.shard_id: str(s.position) for s in states}
                        _log.info("stream %s goes on from checkpoints: %s", stream.name, where)
                        return states
                    listed = client.list_shards(stream, self._filter(description))
                    return planned(index, listed, plan.start, plan.stop, self._initial_watermark())
                if description.status is StreamStatus.DELETING:
                    raise KinesisIOError(f"stream {stream.name} is being deleted; read another one")
                what = f"stream {stream.name} is still {description.status.value}"
                wait = 1.0
            except IncompleteShardList as error:
                incomplete += 1
                if incomplete >= _INCOMPLETE_LISTS:
                    raise
                what, wait = str(error), 1.0
            except KinesisIOError as error:
                skewed = isinstance(error, InvalidArgument) and error.operation == "ListShards" and plan.start.timestamp
                if not error.retryable and not skewed:
                    raise
                failures += 1
                what, wait = str(error), _PLANNING_BACKOFF.wait_seconds(failures, rng)
            if clock.monotonic_seconds() + wait > deadline:
                raise KinesisIOError(f"planning gave up after {_PLANNING_SECONDS:.0f} s: {what}")
            _log.info("ReadFromKinesis waits: %s", what)
            clock.sleep(wait)

    def _filter(self, description: StreamDescription) -> ShardFilter | None:
        """Leave out shards that ended before the start. An optimisation only: emulators ignore filters."""
        start = self._plan.start
        if start.timestamp is None or (self._plan.stop is not None and self._plan.stop.sequence_positions):
            return None
        horizon = self._clock.now_seconds() - description.retention_hours * 3600
        if start.timestamp.micros < horizon * 1e6:
            if description.creation_seconds < horizon:
                _count(metrics.STARTS_BEFORE_HORIZON, 1)
                _log.warning(
                    "ReadFromKinesis: starting_position %s is older than the retention of stream %s (%d h); reading "
                    "begins at the oldest record that is left",
                    time_text(start.timestamp),
                    description.name,
                    description.retention_hours,
                )
            return None
        if start.timestamp.micros < description.creation_seconds * 1e6:
            return None
        return ShardFilter(ShardFilterKind.FROM_TIMESTAMP, start.timestamp.micros)

    def _initial_watermark(self) -> int:
        start = self._plan.start
        return self._plan.watermark.initial_micros(None if start.timestamp is None else start.timestamp.micros)


def _dealt(states: Sequence[ShardState], count: int) -> list[tuple[ShardState, ...]]:
    by_id = {s.shard_id: s for s in states}
    dealt = groups([Shard(s.shard_id, s.hash_key_range) for s in states], count)
    return [tuple(by_id[s.shard_id] for s in part) for part in dealt]


# The splittable DoFn.


class Frontiers(RestrictionProvider):
    """No I/O here: runners call it on copies of the DoFn that were never set up."""

    bounded = False

    def initial_restriction(self, element: ShardGroup) -> ShardFrontier:
        return ShardFrontierCoder().decode(element.frontier).with_nonce()

    def create_tracker(self, restriction: ShardFrontier) -> FrontierTracker:
        return FrontierTracker(restriction, bounded=self.bounded)

    def split(self, element: ShardGroup, restriction: ShardFrontier) -> Iterator[ShardFrontier]:
        yield restriction

    def restriction_size(self, element: ShardGroup, restriction: ShardFrontier) -> float:
        """Return the estimated backlog in bytes (at least 1), from what this process has seen of the restriction."""
        backlog = shared_consumer(SystemClock()).backlog_bytes(group_key(element, restriction), restriction)
        return max(1.0, backlog or 0.0)

    def restriction_coder(self) -> ShardFrontierCoder:
        return ShardFrontierCoder()

    def truncate(self, element: ShardGroup, restriction: ShardFrontier) -> ShardFrontier | None:
        """On drain: a bounded read's rest is read, an unbounded one's is dropped."""
        return restriction if self.bounded else None


class BoundedFrontiers(Frontiers):
    bounded = True


class FrontierWatermark(WatermarkEstimatorProvider):
    def initial_estimator_state(self, element: ShardGroup, restriction: ShardFrontier) -> Timestamp:
        # Never None: runners read that as the beginning of time or fail.
        return Timestamp(micros=restriction.watermark_micros)

    def create_watermark_estimator(self, estimator_state: Timestamp) -> ManualWatermarkEstimator:
        return ManualWatermarkEstimator(estimator_state)

    def estimator_state_coder(self) -> coders.Coder:
        return coders.TimestampCoder()


def group_key(element: ShardGroup, frontier: ShardFrontier) -> GroupKey:
    return (element.uid, element.index, frontier.nonce)


class ReadingLoop(beam.DoFn):
    """The loop of `ReadShards`, for bounded and unbounded reads.

    Order matters in three places, and each order has a loss behind it:
    claim, then emit, so that a checkpoint never holds a record it did not see emitted; emit, then commit to the
    consumer, so that a bundle that fails in between reads the batch again; emit, then advance the watermark: a late
    watermark only delays, an early one loses.
    """

    def __init__(self, plan: ReadPlan, clock: Clock) -> None:
        self._plan = plan
        self._clock = clock
        self._seconds_per_record = 0.0

    def _read(self, element: ShardGroup, tracker: Any, estimator: ManualWatermarkEstimator) -> Iterator[Any]:
        frontier = tracker.current_restriction()
        if frontier.is_done:
            return
        consumer = shared_consumer(self._clock)
        attachment = consumer.attach(group_key(element, frontier), self._plan.source, frontier)
        try:
            attachment.wait(max(0.0, consumer.resume_at(element.uid) - self._clock.monotonic_seconds()))
            yield from self._loop(element, tracker, estimator, attachment)
        except StaleAttachment:
            # After a split everything claimed was emitted and the rest belongs to the newer attempt. Else two attempts
            # would emit the same records, and this one must fail.
            if tracker.try_claim(Claim(())):
                raise
        finally:
            try:
                self._report(attachment)
            finally:
                attachment.detach()

    def _loop(
        self, element: ShardGroup, tracker: Any, estimator: ManualWatermarkEstimator, attachment: Attachment
    ) -> Iterator[Any]:
        plan, clock = self._plan, self._clock
        budget_seconds = plan.bundle_seconds / attachment.sharers
        deadline = clock.monotonic_seconds() + budget_seconds
        records_left, bytes_left = plan.bundle_records, plan.bundle_bytes
        progressed = False
        evidence: dict[ShardKey, Advance] = {}
        while True:
            frontier = tracker.current_restriction()
            for proof in attachment.take_evidence():
                self._observe_lag(proof)
                bound = self._proved(proof, frontier)
                evidence[proof.key] = Advance(proof.key, None, bound, proof.read_until_micros)
            batch = attachment.poll(self._batch_records(records_left, budget_seconds))
            if batch is None:
                if not self._claim_evidence(evidence, tracker, estimator, attachment):
                    return
                if not progressed and self._stop_is_past() and element.group_count == 1:
                    # What is left comes at once, and deferring without progress costs a bundle on Spark, which skips
                    # the delay. (With other restrictions it might wait here for what one of them must read first.)
                    attachment.wait(max(budget_seconds, plan.source.poll_interval_seconds))
                    deadline = clock.monotonic_seconds() + budget_seconds
                    continue
                shared_consumer(clock).set_resume_at(element.uid, clock.monotonic_seconds() + plan.defer_seconds)
                tracker.defer_remainder(Duration(micros=round(plan.defer_seconds * 1e6)))
                return
            state = next((s for s in frontier.shards if s.key == batch.key), None)
            if state is None:  # the runner has split: everything is the residual's
                attachment.push_back(batch)
                return
            self._observe_lag(batch)
            claim, assigned = self._claim(element, batch, state, frontier, evidence)
            if not tracker.try_claim(claim):
                attachment.push_back(batch)
                return
            evidence.clear()
            # What the claim left; the runner may split during the yield, and the buffers must fit its residual then.
            frontier = tracker.current_restriction()
            began = clock.monotonic_seconds()
            if batch.records:
                yield TimestampedValue(RecordBatch(batch.records, assigned), Timestamp(micros=min(assigned)))
                self._observe_downstream(len(batch.records), clock.monotonic_seconds() - began)
                self._count_records(batch)
            attachment.commit(batch, frontier)
            self._committed(state, batch, frontier)
            advance(estimator, frontier.watermark_micros)
            if frontier.is_done:
                return
            progressed = True
            records_left -= len(batch.records)
            bytes_left -= batch.size_bytes
            if records_left <= 0 or bytes_left <= 0 or clock.monotonic_seconds() >= deadline:
                tracker.defer_remainder()
                return
            del batch, claim, assigned  # or they would still be there while the next batch is waited for

    def _committed(self, state: ShardState, batch: Batch, frontier: ShardFrontier) -> None:
        """A batch is claimed and emitted; `state` is its shard as it was, `frontier` what is left. For checkpoints."""

    def _stop_is_past(self) -> bool:
        stop = self._plan.stop
        return stop is not None and stop.timestamp is not None and stop.timestamp.micros <= self._now_micros()

    def _now_micros(self) -> int:
        return round(self._clock.now_seconds() * 1e6)

    def _claim_evidence(
        self,
        evidence: dict[ShardKey, Advance],
        tracker: Any,
        estimator: ManualWatermarkEstimator,
        attachment: Attachment,
    ) -> bool:
        """Move the watermarks of idle shards before an idle bundle ends: else resumed bundles start from stale ones."""
        if not evidence:
            return True
        if not tracker.try_claim(Claim(tuple(evidence.values()))):
            return False
        evidence.clear()
        frontier = tracker.current_restriction()
        attachment.commit(None, frontier)
        advance(estimator, frontier.watermark_micros)
        return True

    def _proved(self, batch: Batch, frontier: ShardFrontier) -> int:
        """Return the watermark that the batch's answer proves once all its records are emitted."""
        if batch.read_until_micros is None:
            return self._plan.watermark.initial_micros(None)
        return self._plan.watermark.after_answer(
            batch.read_until_micros, was_empty=batch.was_empty, event_lag_micros=frontier.event_lag_micros
        )

    def _claim(
        self,
        element: ShardGroup,
        batch: Batch,
        state: ShardState,
        frontier: ShardFrontier,
        evidence: dict[ShardKey, Advance],
    ) -> tuple[Claim, list[int]]:
        """Return the claim that stands for a batch of the shard `state`, and its records' timestamps."""
        bound = self._proved(batch, frontier)
        timestamps: list[int] = []
        event_lag: int | None = None
        if batch.records:
            assigned = self._plan.watermark.assign(batch.records, self._now_micros())
            timestamps, event_lag = assigned.timestamps_micros, assigned.event_lag_micros
            bound = max(bound, assigned.watermark_micros)
        advance = Advance(batch.key, batch.position, bound, batch.read_until_micros)
        advances = (*evidence.values(), advance)
        if batch.children is None and batch.lost is None:
            return Claim(advances, event_lag_micros=event_lag), timestamps
        state = replace(state, watermark_micros=max(state.watermark_micros, bound))
        successors = self._successors(element, state, batch, frontier)
        return Claim(advances, batch.key, successors, event_lag), timestamps

    def _successors(
        self, element: ShardGroup, state: ShardState, batch: Batch, frontier: ShardFrontier
    ) -> tuple[ShardState, ...]:
        start = self._plan.start
        if batch.lost is not None:
            return self._after_loss(element, state, batch, frontier)
        assert batch.children is not None
        _count(metrics.SHARDS_FINISHED, 1)
        successors = adopted(
            state,
            batch.children,
            start.named_positions(),
            start.position(),
            is_only_restriction=element.group_count == 1,
        )
        if batch.children:
            _count(metrics.RESHARDINGS, 1)
            _count(metrics.SHARDS_ADOPTED, len(successors))
            _log.info(
                "shard %s ended; its children %s follow here",
                state.shard_id,
                [s.shard_id for s in successors],
            )
        held = {s.shard_id for s in frontier.shards if s.stream == state.stream}
        for child in batch.children:
            others = set(child.parents) - {state.shard_id}
            if element.group_count > 1 and others - held and any(s.shard_id == child.shard_id for s in successors):
                _count(metrics.PARENTS_READ_ELSEWHERE, 1)
        return successors

    def _after_loss(
        self, element: ShardGroup, state: ShardState, batch: Batch, frontier: ShardFrontier
    ) -> tuple[ShardState, ...]:
        lost = batch.lost
        assert lost is not None
        if self._plan.on_data_loss is DataLossPolicy.FAIL:
            raise lost.error
        _count(metrics.SKIPPED_RANGES, 1)
        if lost.from_micros is not None:
            skipped = self._clock.now_seconds() * 1000 - lost.from_micros / 1000
            Metrics.distribution(metrics.NAMESPACE, metrics.SKIPPED_MILLIS).update(max(0, round(skipped)))
        _log.error("ReadFromKinesis skips records: %s (on_data_loss=CONTINUE)", lost.reason)
        if self._plan.stop is not None and self._plan.stop.sequence_positions and lost.restart is None:
            return ()  # the stop's shards are all there is to read
        if lost.restart is not None:
            return (replace(state, position=lost.restart, read_until_micros=None),)
        return after_loss(
            state,
            lost.listed,
            frontier.shards,
            self._plan.start.named_positions(),
            self._plan.start.position(),
            is_only_restriction=element.group_count == 1,
        )

    # How much to hand on at once, and what to say of it.

    def _batch_records(self, records_left: int, budget_seconds: float) -> int:
        """Return how many records downstream has been seen to take in a bundle's time."""
        most = max(1, min(records_left, MAX_RECORDS_PER_GET))
        if self._seconds_per_record <= 0:
            return most
        return max(1, min(most, int(budget_seconds / self._seconds_per_record)))

    def _observe_downstream(self, records: int, seconds: float) -> None:
        rate = seconds / records
        known = self._seconds_per_record
        self._seconds_per_record = rate if known == 0 else known + (rate - known) / 4

    def _count_records(self, batch: Batch) -> None:
        _count(metrics.RECORDS_READ, len(batch.records))
        _count(metrics.BYTES_READ, batch.size_bytes)

    def _observe_lag(self, batch: Batch) -> None:
        if batch.millis_behind_latest is not None:
            Metrics.distribution(metrics.NAMESPACE, metrics.MILLIS_BEHIND_LATEST).update(batch.millis_behind_latest)

    def _report(self, attachment: Attachment) -> None:
        for name, value in attachment.take_counts().items():
            _count(name, value)
        Metrics.gauge(metrics.NAMESPACE, metrics.PREFETCHED_BYTES).set(attachment.prefetched_bytes())
        Metrics.gauge(metrics.NAMESPACE, metrics.SHARDS_OPEN).set(attachment.shards_open())
        lag = attachment.max_millis_behind_latest()
        if lag is not None:
            Metrics.gauge(metrics.NAMESPACE, metrics.MAX_MILLIS_BEHIND_LATEST).set(lag)

    def teardown(self) -> None:
        shared_consumer(self._clock).sweep()


class ReadShards(ReadingLoop):
    """Reads restrictions without end."""

    @beam.DoFn.unbounded_per_element()
    def process(
        self,
        element: ShardGroup,
        tracker: Any = beam.DoFn.RestrictionParam(Frontiers()),  # noqa: B008 (Beam's way)
        estimator: Any = beam.DoFn.WatermarkEstimatorParam(FrontierWatermark()),  # noqa: B008
    ) -> Iterator[Any]:
        yield from self._read(element, tracker, estimator)


class ReadShardsToStop(ReadingLoop):
    """Reads restrictions up to a stop position. The same loop; a class of its own, for it is not marked unbounded."""

    def process(
        self,
        element: ShardGroup,
        tracker: Any = beam.DoFn.RestrictionParam(BoundedFrontiers()),  # noqa: B008 (Beam's way)
        estimator: Any = beam.DoFn.WatermarkEstimatorParam(FrontierWatermark()),  # noqa: B008
    ) -> Iterator[Any]:
        yield from self._read(element, tracker, estimator)


class CheckpointingLoop(ReadingLoop):
    """The same loop; the rows of each bundle are saved when the runner has committed it.

    In classes of its own: the finalizer's mere presence makes Flink build a DoFn per bundle, and Spark fail.
    """

    def __init__(self, plan: ReadPlan, clock: Clock) -> None:
        super().__init__(plan, clock)
        self._rows: FrontierRows
        self._left: ShardFrontier
        self._save: Callable[[], None] = nothing_to_save

    def _loop(
        self, element: ShardGroup, tracker: Any, estimator: ManualWatermarkEstimator, attachment: Attachment
    ) -> Iterator[Any]:
        clock, checkpointing = self._clock, self._plan.checkpointing
        frontier: ShardFrontier = tracker.current_restriction()
        key = group_key(element, frontier)
        self._rows = rows = acquire_rows(key, frontier.claims, clock.monotonic_seconds())
        self._left = frontier
        claims: int | None = None
        try:
            yield from super()._loop(element, tracker, estimator, attachment)
            claims = tracker.current_restriction().claims
        finally:
            release_rows(key, rows, claims, clock.monotonic_seconds())
        now = clock.monotonic_seconds()
        left = self._left
        if left.is_done or rows.is_due(now, checkpointing.interval_seconds):
            taken = rows.take(left, now)
            self._save = SaveRows(self._plan.source, checkpointing, rows, taken, is_last=left.is_done, clock=clock)

    def _committed(self, state: ShardState, batch: Batch, frontier: ShardFrontier) -> None:
        self._rows.end(state, batch)
        self._left = frontier

    def _finalize(self, finalizer: Any) -> None:
        """To be called in every path: Prism wants a callback of each bundle."""
        save, self._save = self._save, nothing_to_save
        finalizer.register(save)


class ReadShardsWithCheckpoints(CheckpointingLoop):
    """Without end, with checkpoints."""

    @beam.DoFn.unbounded_per_element()
    def process(
        self,
        element: ShardGroup,
        finalizer: Any = beam.DoFn.BundleFinalizerParam,
        tracker: Any = beam.DoFn.RestrictionParam(Frontiers()),  # noqa: B008 (Beam's way)
        estimator: Any = beam.DoFn.WatermarkEstimatorParam(FrontierWatermark()),  # noqa: B008
    ) -> Iterator[Any]:
        yield from self._read(element, tracker, estimator)
        self._finalize(finalizer)


class ReadShardsToStopWithCheckpoints(CheckpointingLoop):
    """To a stop position, with checkpoints."""

    def process(
        self,
        element: ShardGroup,
        finalizer: Any = beam.DoFn.BundleFinalizerParam,
        tracker: Any = beam.DoFn.RestrictionParam(BoundedFrontiers()),  # noqa: B008 (Beam's way)
        estimator: Any = beam.DoFn.WatermarkEstimatorParam(FrontierWatermark()),  # noqa: B008
    ) -> Iterator[Any]:
        yield from self._read(element, tracker, estimator)
        self._finalize(finalizer)


def reading_loop(plan: ReadPlan, clock: Clock) -> ReadingLoop:
    """Return the splittable DoFn that a plan needs."""
    kinds: dict[tuple[bool, bool], type[ReadingLoop]] = {
        (False, False): ReadShards,
        (True, False): ReadShardsToStop,
        (False, True): ReadShardsWithCheckpoints,
        (True, True): ReadShardsToStopWithCheckpoints,
    }
    return kinds[plan.is_bounded, plan.checkpointing.is_on](plan, clock)


class TakeBatchesApart(beam.DoFn):
    """Gives every record its own timestamp. Its input is in the global window, as everything behind an Impulse is."""

    def process(self, batch: RecordBatch) -> Iterator[WindowedValue]:
        records, timestamps = batch.records, batch.timestamps_micros
        if len(records) != len(timestamps):
            raise ValueError(f"the watermark policy gave {len(timestamps)} timestamps for {len(records)} records")
        # Beam stores micros and makes a Timestamp on demand; one pass in C without a frame or a Timestamp per record.
        return map(create, records, timestamps, repeat((GlobalWindow(),)))


def advance(estimator: ManualWatermarkEstimator, watermark_micros: int) -> None:
    # The frontier's minimum can fall back when a shard is read again after a loss; the estimator refuses that.
    watermark = Timestamp(micros=watermark_micros)
    if watermark > estimator.current_watermark():
        estimator.set_watermark(watermark)


def _count(name: str, value: int) -> None:
    if value:
        Metrics.counter(metrics.NAMESPACE, name).inc(value)


# The transform.


class ReadFromKinesis(beam.PTransform):
    """Reads Kinesis data streams: PCollection[KinesisRecord], each record with its own timestamp.

    At least once: every record from the starting position on is emitted, across failures, restarts from the runner's
    checkpoint and resharding; without a failure exactly once. The records of a shard come in order, and a child
    shard's after its parents'. Behind a shuffle no order is promised.

    Args:
        stream: A stream's name or ARN, or several. An ARN's own region is used.
        starting_position: Where to start. Required: a silent default loses or repeats somebody's data.
        stop_at: Where to end; makes the result bounded. Without it the read has no end.
        client: How to reach Kinesis: `ClientConfig(...)`, by default AWS's usual chain. Opened on the worker.
        watermark: `ArrivalTimeWatermark` (default), `EventTimeWatermark` or `ProcessingTimeWatermark`.
        deaggregate: Take KPL aggregates apart.
        hash_filter: What to do with user records whose hash key is not their shard's; see `HashFilter`.
        on_data_loss: What to do when Kinesis dropped records before they were read.
        restrictions: Into how many parts to deal the shards at most. Default: one where a runner reads one after the
            other anyway (DirectRunner, Prism), 4 x parallelism on Flink and Dataflow. On a `PortableRunner` endpoint a
            number > 1 is your word that it is not Prism.
        poll_interval_seconds: How often a shard that has been read to its tip is asked again. All readers of a shard
            share five GetRecords calls per second, so leave room for the others.
        max_records_per_get: The Limit of GetRecords, 1 to 10,000.
        prefetch_bytes_per_shard, prefetch_bytes: What may wait in memory for one shard, and for all shards of a worker
            process, with 320 bytes counted for each record beside its data; may be passed by the answers under way, at
            most 10 MiB for each of up to 32 threads. Raise the second for many full shards over a slow line: it also
            bounds how many full answers are under way at once (two, unless they are small).
        bundle_seconds, bundle_records, bundle_bytes: After how much a bundle ends and can be checkpointed. The time
            bounds the latency behind a shuffle, and what a Flink checkpoint barrier waits.
        limits: How fast a shard is read; the service's own limits by default.
        checkpoints: Where to keep each shard's position outside of the runner, so that a *new* job goes on from there:
            `FileCheckpointStore`, `DynamoDBCheckpointStore` (a KCL application's lease table), `MemoryCheckpointStore`.
            Shards that have no row start at `starting_position`. Rows are written after the runner committed a bundle:
            exact where outputs are fused with the reader (the sink right behind it, say), so that nothing is lost and
            what came after the last row is repeated; advisory where a shuffle lies between, for the runner may not have
            carried out what is behind it. Refused on Spark.
        checkpoint_interval_seconds: How often rows are written; also at a shard's end and at the end of a bounded read.

    Raises:
        ConfigurationError: at construction, an option is wrong; when applied, the runner cannot run this read.
    """

    def __init__(
        self,
        stream: str | Sequence[str],
        *,
        starting_position: StartingPosition,
        stop_at: StopPosition | None = None,
        client: ClientFactory | None = None,
        watermark: WatermarkPolicy | None = None,
        deaggregate: bool = True,
        hash_filter: HashFilter = HashFilter.KEEP,
        on_data_loss: DataLossPolicy = DataLossPolicy.FAIL,
        restrictions: int | None = None,
        poll_interval_seconds: float = 0.5,
        max_records_per_get: int = MAX_RECORDS_PER_GET,
        prefetch_bytes_per_shard: int = 4 * MIB,
        prefetch_bytes: int = 16 * MIB,
        bundle_seconds: float = 0.15,
        bundle_records: int = 50_000,
        bundle_bytes: int = 16 * MIB,
        limits: ReadLimits | None = None,
        checkpoints: CheckpointStore | None = None,
        checkpoint_interval_seconds: float = 10.0,
        clock: Clock | None = None,
    ) -> None:
        super().__init__()
        _check_type("starting_position", starting_position, StartingPosition, "StartingPosition.trim_horizon()")
        _check_type("stop_at", stop_at, (StopPosition, type(None)), "StopPosition.now()")
        _check_type("on_data_loss", on_data_loss, DataLossPolicy, "DataLossPolicy.FAIL")
        _check_type("hash_filter", hash_filter, HashFilter, "HashFilter.KEEP")
        _check_type("deaggregate", deaggregate, bool, "True")
        for option, seconds in (
            ("poll_interval_seconds", poll_interval_seconds),
            ("bundle_seconds", bundle_seconds),
            ("checkpoint_interval_seconds", checkpoint_interval_seconds),
        ):
            if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds <= 3600:
                raise ConfigurationError(f"{option} must be > 0 and <= 3600, got {seconds!r}")
        for option, number, most in (
            ("max_records_per_get", max_records_per_get, MAX_RECORDS_PER_GET),
            ("prefetch_bytes_per_shard", prefetch_bytes_per_shard, None),
            ("prefetch_bytes", prefetch_bytes, None),
            ("bundle_records", bundle_records, None),
            ("bundle_bytes", bundle_bytes, None),
        ):
            good = isinstance(number, int) and not isinstance(number, bool) and number >= 1
            if not good or (most is not None and number > most):
                bound = f" and <= {most}" if most is not None else ""
                raise ConfigurationError(f"{option} must be a whole number >= 1{bound}, got {number!r}")
        if stop_at is not None and stop_at.sequence_positions and starting_position.kind is StartKind.LATEST:
            raise ConfigurationError("stop_at by sequence numbers needs a start before them, got latest()")
        self._clock: Clock = clock or SystemClock()
        self._streams = _streams(stream)
        if len(self._streams) > 1:
            for option, position in (("starting_position", starting_position), ("stop_at", stop_at)):
                if position is not None and position.sequence_positions:
                    raise ConfigurationError(
                        f"{option} by sequence numbers needs a single stream (shard ids repeat between streams), "
                        f"got {len(self._streams)}; use one ReadFromKinesis for each"
                    )
        # Not pinned here but in expand(): the pipeline is built there.
        self._start = starting_position
        starting_position.pinned(self._now())  # raises if it lies in the future
        self._stop = stop_at
        if stop_at is not None and stop_at.timestamp is not None and starting_position.timestamp is not None:
            if stop_at.timestamp < starting_position.timestamp:
                raise ConfigurationError(
                    f"stop_at must not lie before starting_position, got {time_text(stop_at.timestamp)} and "
                    f"{time_text(starting_position.timestamp)}"
                )
        self._factory: ClientFactory = client if client is not None else ClientConfig()
        if not callable(getattr(self._factory, "connect", None)):
            raise ConfigurationError(f"client must be a ClientConfig (or another ClientFactory), got {client!r}")
        for parsed in self._streams:
            _check_region(self._factory, parsed)
        self._watermark: WatermarkPolicy = watermark if watermark is not None else ArrivalTimeWatermark()
        if not callable(getattr(self._watermark, "after_answer", None)):
            raise ConfigurationError(
                f"watermark must be ArrivalTimeWatermark(), EventTimeWatermark(...) or ProcessingTimeWatermark(), "
                f"got {watermark!r}"
            )
        self._on_data_loss = on_data_loss
        self._restrictions = restrictions
        self._checkpointing = _checkpointing(self._streams, checkpoints, checkpoint_interval_seconds)
        self._source_options: dict[str, Any] = {
            "poll_interval_seconds": poll_interval_seconds,
            "max_records_per_get": max_records_per_get,
            "deaggregate": deaggregate,
            "hash_filter": hash_filter,
            "prefetch_bytes_per_shard": prefetch_bytes_per_shard,
            "prefetch_bytes": prefetch_bytes,
            "limits": limits or ReadLimits(),
        }
        self._bundle: dict[str, Any] = {
            "bundle_seconds": bundle_seconds,
            "bundle_records": bundle_records,
            "bundle_bytes": bundle_bytes,
            "defer_seconds": min(0.1, max(0.05, bundle_seconds / 2)),
        }

    def _now(self) -> Timestamp:
        return Timestamp(micros=round(self._clock.now_seconds() * 1e6))

    def plan(self, restrictions: int) -> ReadPlan:
        """Return the read with its bounds fixed now; each call is another source."""
        now = self._now()
        stop = None if self._stop is None else self._stop.pinned(now)
        source = SourceConfig(
            uid=uuid.uuid4().hex,
            streams=self._streams,
            factory=self._factory,
            stop=stop,
            **self._source_options,
        )
        return ReadPlan(
            source=source,
            start=self._start.pinned(now),
            stop=stop,
            watermark=self._watermark,
            on_data_loss=self._on_data_loss,
            restrictions=restrictions,
            checkpointing=self._checkpointing,
            **self._bundle,
        )

    def expand(self, pbegin: beam.pvalue.PBegin) -> beam.PCollection[KinesisRecord]:
        pipeline = pbegin.pipeline
        bounded = self._stop is not None
        check_read(pipeline.runner, pipeline.options, bounded=bounded)
        plan = self.plan(restriction_count(pipeline.runner, pipeline.options, self._restrictions))
        check_checkpoints(pipeline.runner, plan.checkpointing.is_on)
        if type(pipeline.runner).__name__ == "SparkRunner":
            _check_past(plan, self._now())
        elements = (
            pbegin
            | "Impulse" >> beam.Impulse()
            | "PlanShards" >> beam.ParDo(PlanShards(plan, self._clock)).with_output_types(ShardGroup)
        )
        if bounded:
            # Spark and batch Flink get their parallelism from it. Not before an unbounded read: nothing would pass it
            # on the FnApiRunner, and it gains nothing on Flink, which keys the elements anyway.
            elements |= "Reshuffle" >> beam.Reshuffle()
        return (
            elements
            | "ReadShards" >> beam.ParDo(reading_loop(plan, self._clock)).with_output_types(RecordBatch)
            | "TakeBatchesApart" >> beam.ParDo(TakeBatchesApart()).with_output_types(KinesisRecord)
        )

    def display_data(self) -> dict[str, Any]:
        return {
            "streams": ", ".join(str(s) for s in self._streams),
            "starting_position": self._start.kind.value,
            "stop_at": "never" if self._stop is None else self._stop.kind.value,
        }


def _streams(value: str | Sequence[str]) -> tuple[StreamId, ...]:
    names: Iterable[str] = [value] if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not names:
        raise ConfigurationError(f"stream must be a name, an ARN, or a list of them that is not empty, got {value!r}")
    parsed = tuple(StreamId.parse(name) for name in names)
    for stream in parsed:
        if parsed.count(stream) > 1:
            raise ConfigurationError(f"stream lists {stream} twice: every record would be read twice; name it once")
    return parsed


def _check_type(option: str, value: object, kind: type | tuple[type, ...], example: str) -> None:
    if not isinstance(value, kind):
        raise ConfigurationError(f"{option} must be like {example}, got {value!r}")


def _check_region(factory: ClientFactory, stream: StreamId) -> None:
    region = getattr(factory, "region", None)
    if region is not None and stream.region is not None and region != stream.region:
        raise ConfigurationError(
            f"client.region is {region!r}, but the ARN {stream.arn} is in {stream.region!r}; leave region out"
        )


def _checkpointing(
    streams: Sequence[StreamId], store: CheckpointStore | None, interval_seconds: float
) -> Checkpointing:
    if store is None:
        return Checkpointing()
    if not callable(getattr(store, "save", None)):
        raise ConfigurationError(f"checkpoints must be like FileCheckpointStore(directory), got {store!r}")
    names = [s.name for s in streams]
    for name in names:
        if names.count(name) > 1:
            raise ConfigurationError(
                f"checkpoints are kept by the stream's name, and there are several of the name {name}; use one "
                "ReadFromKinesis for each, with stores of their own"
            )
    return Checkpointing((store,) * len(streams), interval_seconds=interval_seconds)


def _check_past(plan: ReadPlan, now: Timestamp) -> None:
    stop = plan.stop
    if stop is not None and stop.kind is StopKind.AT_TIMESTAMP and stop.timestamp is not None and stop.timestamp > now:
        raise ConfigurationError(
            f"stop_at must lie in the past on the Spark runner, got {time_text(stop.timestamp)}: its shards are read "
            "one after the other and each would wait; use StopPosition.now()"
        )
