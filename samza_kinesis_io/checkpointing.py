"""From a frontier to rows and back: when checkpoints are made, when they are saved, and how a new job goes on.

Between the loops that read and `checkpoints.py`, for plain reads and tasks alike. Two rules:

1. A bundle's rows are made at its end and saved when the runner has committed it (bundle finalization). Before that
   the same records may come again, and a new job must not go on behind them.
2. Rows are of whole frontiers. A shard of which nothing was read has its row too, with its start: else a new job
   could not tell it from one that came later.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from samza_kinesis_io.checkpoints import CheckpointStore, SaveReport, ShardCheckpoint, resume
from samza_kinesis_io.clock import Clock
from samza_kinesis_io.consumer import Batch, GroupKey, SourceConfig
from samza_kinesis_io.errors import CheckpointError, IncompleteShardList
from samza_kinesis_io.positions import Position, StartingPosition, StopPosition
from samza_kinesis_io.restriction import ShardFrontier, ShardKey, ShardState
from samza_kinesis_io.shards import Shard, age_key, holes

_log = logging.getLogger(__name__)

#: How often, a second apart, a restriction's last rows are tried until all of them are saved.
_LAST_TRIES: Final = 120
#: What is known of restrictions that nobody asked for in this time is dropped: they went to another worker.
_IDLE_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Checkpointing:
    """Where checkpoints are kept. Travels in the pipeline.

    Attributes:
        stores: For each stream, by its index in the source's list; None: nowhere.
        reset: The streams whose rows are written but not looked at.
        interval_seconds: How often a plain read writes them. (A task's commits say it for tasks.)
    """

    stores: tuple[CheckpointStore | None, ...] = ()
    reset: frozenset[int] = frozenset()
    interval_seconds: float = 10.0

    @property
    def is_on(self) -> bool:
        return any(store is not None for store in self.stores)

    def load(self, stream: int, name: str) -> dict[str, ShardCheckpoint]:
        """Return the rows from which a stream goes on; empty: it begins at its start.

        Raises:
            CheckpointError: they can't be read.
        """
        store = self.stores[stream] if self.stores else None
        return {} if store is None or stream in self.reset else store.load(name)


def resumed(
    stream: int,
    listed: Sequence[Shard],
    rows: Mapping[str, ShardCheckpoint],
    start: StartingPosition,
    stop: StopPosition | None,
    watermark_micros: int,
) -> tuple[ShardState, ...]:
    """Return the shards with which the reading of a stream goes on; what `planned` is without rows.

    Shards that must wait for older ones are there too: their positions are not those that a parent would give them.

    Args:
        listed: Every shard that ListShards gives, without a filter.

    Raises:
        IncompleteShardList: the listed shards leave a hole; the list may be better next time.
    """
    if missing := holes(listed):
        raise IncompleteShardList(
            f"the {len(listed)} listed shards leave hash keys to nobody, the first are {missing[0].start} to "
            f"{missing[0].end}"
        )
    plan = resume(listed, rows, start)
    stops = dict(stop.sequence_positions) if stop is not None else {}
    left = [shard for shard in listed if shard.shard_id in plan.positions]
    states: list[ShardState] = []
    for shard in listed:
        position, end = plan.positions.get(shard.shard_id), stops.get(shard.shard_id)
        if position is None and shard.ending_sequence_number is not None and any(_leads(a, shard) for a in left):
            # Done, but not one of its ancestors, which would adopt it: behind its last record it ends at once.
            position = Position.after(shard.ending_sequence_number)
        if position is None or (stops and end is None):
            continue
        if end is not None and position.excludes(end.sequence_number, end.sub_sequence_number):
            continue  # read up to its stop, or behind it
        states.append(ShardState(stream, shard.shard_id, shard.hash_key_range, position, None, watermark_micros))
    return tuple(states)


def _leads(ancestor: Shard, shard: Shard) -> bool:
    older = age_key(ancestor.shard_id) < age_key(shard.shard_id)
    return older and ancestor.hash_key_range.overlaps(shard.hash_key_range)


class FrontierRows:
    """The rows of one restriction, from bundle to bundle.

    Used by one attempt at a time; `saved` and `failed` are called by whichever thread finalizes bundles.
    """

    def __init__(self) -> None:
        self.claims: int | None = None
        self.busy = False
        self.used_at = 0.0
        self.is_taken = False
        """Rows of the whole frontier were made before, and their store took them if it was asked."""
        self._taken_at = 0.0
        self._lock = threading.Lock()
        self._failure: Exception | None = None
        self._parents: dict[ShardKey, tuple[str, ...]] = {}
        self._over: dict[ShardKey, ShardCheckpoint] = {}
        """Shards that left the frontier and whose rows are not saved yet."""

    def end(self, state: ShardState, batch: Batch) -> None:
        """Note that a shard is over with this batch; `state` is as it was before it.

        A shard that reached a stop position has no end: a later job goes on behind it. One whose rest is lost has
        neither, and its row stays where it is.
        """
        if batch.children is None:
            return
        for child in batch.children:
            self._parents[(state.stream, child.shard_id)] = child.parents
        has_ended = bool(batch.children)
        row = ShardCheckpoint(
            state.shard_id,
            None if has_ended else batch.position or state.position,
            has_ended,
            self._parents.get(state.key, ()),
            tuple(child.shard_id for child in batch.children),
            state.hash_key_range,
        )
        with self._lock:
            self._over[state.key] = row

    def is_due(self, now_seconds: float, interval_seconds: float) -> bool:
        """Whether a plain read should save at the end of this bundle."""
        return not self.is_taken or bool(self._over) or now_seconds - self._taken_at >= interval_seconds

    def take(self, frontier: ShardFrontier, now_seconds: float) -> dict[int, list[ShardCheckpoint]]:
        """Return the rows by stream: every shard that is left, pinned starts too, and those that are over."""
        rows: dict[int, list[ShardCheckpoint]] = {}
        for state in frontier.shards:
            row = ShardCheckpoint(
                state.shard_id,
                state.position,
                parents=self._parents.get(state.key, ()),
                hash_key_range=state.hash_key_range,
            )
            rows.setdefault(state.stream, []).append(row)
        with self._lock:
            for key, row in self._over.items():
                rows.setdefault(key[0], []).append(row)
        self.is_taken = True
        self._taken_at = now_seconds
        return rows

    def saved(self, stream: int, rows: Sequence[ShardCheckpoint], report: SaveReport) -> None:
        with self._lock:
            for row in rows:
                key = (stream, row.shard_id)
                if self._over.get(key) == row and row.shard_id not in report.deferred:
                    del self._over[key]
            if report.deferred:
                self.is_taken = False

    def failed(self, error: Exception) -> None:
        with self._lock:
            self._failure = error

    def check(self) -> None:
        """Raise what kept rows from being saved: runners may swallow what a callback raises, a bundle's error never."""
        if self._failure is not None:
            raise self._failure


class SaveRows:
    """A bundle's rows, to be saved when the runner has committed it. Called once by the runner.

    Args:
        is_last: The restriction is done: what a store defers is tried again here, for nobody else will.
    """

    def __init__(
        self,
        source: SourceConfig,
        checkpointing: Checkpointing,
        origin: FrontierRows,
        rows: Mapping[int, Sequence[ShardCheckpoint]],
        *,
        is_last: bool = False,
        clock: Clock,
    ) -> None:
        self._source = source
        self._checkpointing = checkpointing
        self._origin = origin
        self._rows = rows
        self._is_last = is_last
        self._clock = clock

    def __call__(self) -> None:
        for stream, rows in self._rows.items():
            store = _shared_store(self._source.uid, stream, self._checkpointing.stores[stream])
            if store is None:
                continue
            try:
                report = self._save(store, self._source.streams[stream].name, rows)
            except Exception as error:
                self._origin.failed(error)
                raise
            self._origin.saved(stream, rows, report)
            if report.deferred:
                _log.info("these leases have an owner that may be dead; they are saved later: %s", report.deferred)


    def _save(self, store: CheckpointStore, name: str, rows: Sequence[ShardCheckpoint]) -> SaveReport:
        report = store.save(name, rows)
        if not self._is_last:
            return report
        # No later bundle will save what is deferred. A lease is known to be free or not after its fail-over time.
        for _ in range(_LAST_TRIES):
            if not report.deferred:
                return report
            self._clock.sleep(1.0)
            report = store.save(name, rows)
        raise CheckpointError(
            f"the rows of {list(report.deferred)} of stream {name} are not saved: {_LAST_TRIES} s after the read's end "
            "it is still not known whether the owners of their leases live; lower the store's failover_seconds"
        )


def nothing_to_save() -> None:
    """The callback of a bundle without rows: Prism logs an error for a bundle that could register one and did not."""


# What a process knows. DoFn instances come and go (Flink makes one per bundle), rows and stores must not.

_kept: Final[dict[GroupKey, FrontierRows]] = {}
_stores: Final[dict[tuple[str, int], CheckpointStore]] = {}
_lock = threading.Lock()


def _shared_store(uid: str, stream: int, store: CheckpointStore | None) -> CheckpointStore | None:
    """Return this process's copy of a store: one that remembers what it has written, and which leases stand still."""
    if store is None:
        return None
    with _lock:
        return _stores.setdefault((uid, stream), store)


def acquire_rows(key: GroupKey, claims: int, now_seconds: float) -> FrontierRows:
    """Return what the restriction's last bundle left, if it comes back as that left it; else begin anew.

    Raises:
        CheckpointError: that bundle's rows could not be saved.
    """
    with _lock:
        for other, kept in list(_kept.items()):
            if not kept.busy and now_seconds - kept.used_at > _IDLE_SECONDS:
                del _kept[other]
        rows = _kept.get(key)
        if rows is None or rows.busy or rows.claims != claims:
            rows = _kept[key] = FrontierRows()
        try:
            rows.check()
        except Exception:
            del _kept[key]
            raise
        rows.busy = True
        return rows


def release_rows(key: GroupKey, rows: FrontierRows, claims: int | None, now_seconds: float) -> None:
    """The attempt is over; with `claims` None it failed, and what it knew with it."""
    with _lock:
        rows.busy = False
        rows.claims = claims
        rows.used_at = now_seconds
        if claims is None and _kept.get(key) is rows:
            del _kept[key]


def _forget_after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    _kept.clear()
    _stores.clear()


os.register_at_fork(after_in_child=_forget_after_fork)
