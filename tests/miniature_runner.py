"""A runner in miniature: it drives the SDF of `ReadFromKinesis` as a generator, mostly on a simulated clock.

It keeps what a runner keeps (a restriction and an estimator state per element, as bytes) and can fail in the ways in
which runners fail. Output is exactly once *in its own books*: what a failed bundle emitted is struck out, and
restoring a checkpoint strikes out all that came after it. So a source is right if the books at the end hold every
record exactly once, in order.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from apache_beam.io.iobase import RestrictionProgress
from apache_beam.io.watermark_estimators import ManualWatermarkEstimator
from apache_beam.runners.sdf_utils import (
    RestrictionTrackerView,
    ThreadsafeRestrictionTracker,
    ThreadsafeWatermarkEstimator,
)
from apache_beam.utils.timestamp import Timestamp

from samza_kinesis_io import consumer as consumer_module
from samza_kinesis_io.clock import Clock
from samza_kinesis_io.records import KinesisRecord
from samza_kinesis_io.restriction import ShardFrontier, ShardFrontierCoder
from samza_kinesis_io.source import (
    BoundedFrontiers,
    Frontiers,
    PlanShards,
    ReadFromKinesis,
    ReadPlan,
    ReadShards,
    ReadShardsToStop,
    RecordBatchCoder,
    ShardGroup,
    ShardGroupCoder,
)


@dataclass(frozen=True)
class Emitted:
    """A record in the books, and the watermark that had been reported before its bundle."""

    record: KinesisRecord
    timestamp_micros: int
    watermark_micros: int
    element: int

    @property
    def arrived_late(self) -> bool:
        return self.timestamp_micros < self.watermark_micros


@dataclass
class Books:
    """What a runner's checkpoint holds."""

    restrictions: dict[int, bytes] = field(default_factory=dict)
    watermarks: dict[int, int] = field(default_factory=dict)
    emitted: list[Emitted] = field(default_factory=list)

    def copy(self) -> Books:
        return Books(dict(self.restrictions), dict(self.watermarks), list(self.emitted))


class Downstream(Exception):
    """A transform behind the source failed."""


@dataclass
class Attempt:
    """One execution of one element: a generator that is somewhere in its middle."""

    element: int
    generator: Iterator[Any]
    tracker: ThreadsafeRestrictionTracker
    estimator: ThreadsafeWatermarkEstimator
    emitted: list[Emitted] = field(default_factory=list)


class MiniatureRunner:
    """Plans a read and runs its restrictions, one bundle at a time.

    Args:
        clock: If it is simulated, every wait of the source moves it.
        read: The transform. `restrictions` is what a runner would give it.
    """

    def __init__(self, clock: Clock, read: ReadFromKinesis, *, restrictions: int = 1) -> None:
        plan = pickle.loads(pickle.dumps(read.plan(restrictions)))
        coder = ShardGroupCoder()
        groups = [coder.decode(coder.encode(group)) for group in PlanShards(plan, clock).process(None)]
        self._begin(clock, plan, groups, Books())
        for index, element in enumerate(self.elements):
            frontier = self.frontiers.initial_restriction(element)
            self._keep(index, frontier, frontier.watermark_micros)

    def _begin(self, clock: Clock, plan: ReadPlan, elements: list[ShardGroup], books: Books) -> None:
        self.clock = clock
        self.plan = plan
        self.elements = elements
        self.books = books
        self.frontiers = BoundedFrontiers() if plan.is_bounded else Frontiers()
        self.dofn = self._new_dofn()

    def saved(self) -> bytes:
        """Return everything a runner keeps of a job."""
        return pickle.dumps((self.plan, self.elements, self.books))

    @classmethod
    def resumed(cls, clock: Clock, saved: bytes) -> MiniatureRunner:
        """Go on, in another process maybe, with a job that was saved."""
        runner = cls.__new__(cls)
        runner._begin(clock, *pickle.loads(saved))
        return runner

    def _new_dofn(self) -> Any:
        cls = ReadShardsToStop if self.plan.is_bounded else ReadShards
        return cls(self.plan, self.clock)

    def _keep(self, index: int, frontier: ShardFrontier, watermark_micros: int) -> None:
        self.books.restrictions[index] = ShardFrontierCoder().encode(frontier)
        self.books.watermarks[index] = watermark_micros

    @property
    def is_done(self) -> bool:
        return not self.books.restrictions

    @property
    def watermark_micros(self) -> int:
        return min(self.books.watermarks.values(), default=1 << 62)

    def frontier(self, index: int = 0) -> ShardFrontier:
        return ShardFrontierCoder().decode(self.books.restrictions[index])

    # Bundles.

    def begin(self, index: int = 0) -> Attempt:
        tracker = ThreadsafeRestrictionTracker(self.frontiers.create_tracker(self.frontier(index)))
        watermark = Timestamp(micros=self.books.watermarks[index])
        estimator = ThreadsafeWatermarkEstimator(ManualWatermarkEstimator(watermark))
        generator = self.dofn.process(self.elements[index], RestrictionTrackerView(tracker), estimator)
        return Attempt(index, generator, tracker, estimator)

    def step(self, attempt: Attempt) -> bool:
        """Run an attempt up to its next batch; False: its generator is exhausted."""
        coder = RecordBatchCoder()
        for element in attempt.generator:
            batch = coder.decode(coder.encode(element.value))
            assert element.timestamp.micros == min(batch.timestamps_micros)
            # Downstream may see the estimator's watermark at any time, so each batch is held to the one it meets.
            watermark = attempt.estimator.current_watermark().micros
            for record, micros in zip(batch.records, batch.timestamps_micros, strict=True):
                attempt.emitted.append(Emitted(record, micros, watermark, attempt.element))
            progress = attempt.tracker.current_progress()
            assert isinstance(progress, RestrictionProgress)
            return True
        return False

    def finish(self, attempt: Attempt, split: Any = None) -> None:
        """The bundle succeeded: write its output and its residual into the books."""
        attempt.tracker.check_done()
        deferred = attempt.tracker.deferred_status()
        residual = split[1] if split is not None else deferred[0] if deferred is not None else None
        self.books.emitted.extend(attempt.emitted)
        if residual is None:
            del self.books.restrictions[attempt.element], self.books.watermarks[attempt.element]
        else:
            self._keep(attempt.element, residual, attempt.estimator.current_watermark().micros)

    def bundle(self, index: int = 0) -> int:
        """Run one bundle to its end; return how many records it emitted."""
        attempt = self.begin(index)
        while self.step(attempt):
            pass
        self.finish(attempt)
        return len(attempt.emitted)

    def failing_bundle(self, index: int = 0, *, after_batches: int = 0) -> None:
        """A bundle whose downstream raises at its (after_batches+1)-th batch, in this same process."""
        attempt = self.begin(index)
        for _ in range(after_batches + 1):
            if not self.step(attempt):
                break
        attempt.generator.close()  # what Python does to it when the consumer of its output raises

    def split_bundle(self, index: int = 0, *, after_batches: int = 0) -> None:
        """A bundle that the runner checkpoints in its middle, or before its first claim."""
        attempt = self.begin(index)
        going_on = True
        for _ in range(after_batches):
            if not (going_on := self.step(attempt)):
                break
        split = attempt.tracker.try_split(0.0) if going_on else None
        assert attempt.tracker.try_split(0.5) is None
        while self.step(attempt):
            pass
        self.finish(attempt, split)

    def run(self, *, rounds: int = 10_000, idle_rounds: int = 60) -> None:
        """Run bundles of all restrictions in turn until nothing came for `idle_rounds` rounds, or all is read."""
        idle = 0
        for _ in range(rounds):
            if self.is_done or idle >= idle_rounds:
                return
            emitted = sum(self.bundle(index) for index in list(self.books.restrictions))
            idle = 0 if emitted else idle + 1
        raise AssertionError(f"still not idle after {rounds} rounds")

    # Failures that are larger than a bundle.

    def new_process(self) -> None:
        """The worker is gone, with every buffer; a new one goes on."""
        entry = consumer_module._shared.pop(id(self.clock), None)
        if entry is not None:
            entry[1].stop()
        self.dofn = self._new_dofn()

    def restore(self, books: Books) -> None:
        self.books = books.copy()

    @property
    def numbers(self) -> list[int]:
        """The payloads in the books, for records whose data is a number."""
        return [int(e.record.data) for e in self.books.emitted]
