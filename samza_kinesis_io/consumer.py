"""`KinesisSystemConsumer`: shards in, batches of records out.

It prefetches in the background, in the order in which shards fall due, bounded in bytes and in threads, and keeps
what it fetched while the runner passes a restriction from bundle to bundle. It decides nothing about Kinesis
(`polling.py` does) and nothing about Beam.

Who may do what. A restriction is read through an `Attachment`. A newer attachment of the same restriction revokes
the older one: attempts outlive their cancellation on several runners, and two of them must not share one buffer.

When a buffer may be used again ("warm"). From the moment a batch is handed over until it is committed, its
reader's position is invalid, for the process survives a bundle that failed. A restriction that comes back finds its
buffers only if their readers stand exactly where it stands, and if its counter of claims says that nothing
happened since; else they are built anew from its positions.

Locks. There is one, `KinesisSystemConsumer._lock`; it protects everything that is reachable from the consumer:
groups, readers and their pollers, the heap of due readers, byte counts, clients. No call to Kinesis and no unpacking
is made under it. (`_connecting`, taken before it, lets one thread at a time open a client, which takes a while.) A
reader is used outside the lock only by the one fetch thread that marked it `in_flight` (the call itself) or by the one
attachment that marked it `handed_over` (unpacking its buffer's head).
"""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import random
import threading
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec
from msgspec.structs import force_setattr

from samza_kinesis_io import metrics
from samza_kinesis_io.aggregation import MAGIC, HashFilter, deaggregate
from samza_kinesis_io.client import ClientFactory, KinesisClient, StreamId
from samza_kinesis_io.clock import Clock, SystemClock
from samza_kinesis_io.errors import KinesisIOError, StaleAttachment
from samza_kinesis_io.limits import ARRIVAL_SLACK_SECONDS, MAX_RECORDS_PER_GET, MIB
from samza_kinesis_io.polling import Call, Fetched, Lost, ReadLimits, ShardPacer, ShardPoller
from samza_kinesis_io.positions import Position, StopKind, StopPosition, arrival_seconds_of
from samza_kinesis_io.records import KinesisRecord
from samza_kinesis_io.restriction import ShardFrontier, ShardKey, ShardState
from samza_kinesis_io.shards import ChildShard, age_key

_log = logging.getLogger(__name__)

#: Buffers that nobody asked for in this time are dropped: the restriction went to another worker.
IDLE_SECONDS: Final = 60.0
#: How many readers that wait for memory try again when some is freed; all of them would be a herd.
_UNBLOCKED_AT_ONCE: Final = 8
#: How often the fetch threads look for such buffers.
_SWEEP_SECONDS: Final = 10.0
#: What a record takes in memory beside its data: the object, its sequence number, its key. Ten thousand tiny ones are
#: 3 MiB, which their data does not show.
_RECORD_BYTES: Final = 320
#: Of each shard's first answer nothing is known. So many bytes let a few be under way at the start; the others follow
#: when it is known what answers are like here.
_FIRST_ANSWER_BYTES: Final = 8 * MIB
_LEAST_ANSWER_BYTES: Final = 64 * 1024
_SLACK_MICROS: Final = int(ARRIVAL_SLACK_SECONDS * 1_000_000)


@dataclass(frozen=True, slots=True)
class SourceConfig:
    """What is the same for all shards of a source.

    Attributes:
        uid: Unique per transform and pipeline; nothing is shared between different ones but pace and threads.
        streams: What the stream indices of a frontier mean.
        prefetch_bytes_per_shard: A shard with this much in its buffer is not asked for more. Like the next, it counts
            memory: data and 320 bytes for each record.
        prefetch_bytes: The same for all shards of the process together. Both may be passed by the answers under way
            (at most 10 MiB per thread), and by a restriction that waits and has nothing at all.
    """

    uid: str
    streams: tuple[StreamId, ...]
    factory: ClientFactory
    poll_interval_seconds: float = 0.5
    max_records_per_get: int = MAX_RECORDS_PER_GET
    deaggregate: bool = True
    hash_filter: HashFilter = HashFilter.KEEP
    stop: StopPosition | None = None
    limits: ReadLimits = field(default_factory=ReadLimits)
    prefetch_bytes_per_shard: int = 4 * MIB
    prefetch_bytes: int = 16 * MIB


class Batch(msgspec.Struct):
    """Consecutive records of one shard and what they prove, in this order: records, evidence, end.

    Attributes:
        records: User records; may be empty.
        position: Behind the last of them; None if there are none.
        read_until_micros: Everything that arrived before it is delivered once this batch is emitted; None: unknown.
        was_empty: The answer was empty: the shard was idle up to `read_until_micros`.
        children: None: the shard goes on. Else it is over: its children, or () where a stop position was reached.
        lost: Records were lost here; the shard is over for this reader.
        size_bytes: Of the records' data.
    """

    key: ShardKey
    records: list[KinesisRecord]
    position: Position | None
    read_until_micros: int | None = None
    was_empty: bool = False
    millis_behind_latest: int | None = None
    children: tuple[ChildShard, ...] | None = None
    lost: Lost | None = None
    size_bytes: int = 0


class _Reader:
    """One shard's poller and buffer."""

    __slots__ = (
        "key",
        "stream",
        "hash_key_range",
        "group",
        "poller",
        "position",
        "skip",
        "buffer",
        "buffered_bytes",
        "head_index",
        "unpacked",
        "returned",
        "in_flight",
        "handed_over",
        "closed",
        "queued_data",
        "queued_evidence",
        "blocked",
        "answer_bytes",
        "reserved_bytes",
    )

    def __init__(self, state: ShardState, stream: StreamId, group: _Group, poller: ShardPoller) -> None:
        self.key = state.key
        self.stream = stream
        self.hash_key_range = state.hash_key_range
        self.group = group
        self.poller = poller
        self.position = state.position  # committed: what a restriction must say to find this buffer warm
        self.skip: Position | None = state.position if state.position.is_sequence else None
        self.buffer: deque[Fetched] = deque()
        self.buffered_bytes = 0
        self.head_index = 0  # records of the buffer's head that were handed over
        self.unpacked: deque[KinesisRecord] = deque()  # of an aggregate that was cut
        self.returned: Batch | None = None
        self.in_flight = False
        self.handed_over = False
        self.closed = False
        self.queued_data = False
        self.queued_evidence = False
        self.blocked = False
        self.answer_bytes: int | None = None  # what the next answer is expected to take while it is under way
        self.reserved_bytes = 0

    @property
    def has_data(self) -> bool:
        """Whether there is more than the evidence that the shard is idle."""
        return bool(self.returned or self.unpacked) or any(not _is_evidence(f) for f in self.buffer)


def _memory_bytes(fetched: Fetched) -> int:
    return fetched.size_bytes + _RECORD_BYTES * len(fetched.records)


def _is_evidence(fetched: Fetched) -> bool:
    return not (fetched.records or fetched.children is not None or fetched.lost or fetched.error)


GroupKey = tuple[str, int, bytes]
"""The source's uid, the index of the restriction's element, the restriction's nonce."""


class _Group:
    """The readers of one restriction."""

    def __init__(self, key: GroupKey, config: SourceConfig) -> None:
        self.key = key
        self.config = config
        self.epoch = 0
        self.claims = -1
        self.readers: dict[ShardKey, _Reader] = {}
        self.held: tuple[ShardState, ...] = ()
        self.ready: deque[_Reader] = deque()  # readers with data, in the order of their turns
        self.idle: deque[_Reader] = deque()  # readers with evidence only
        self.attached = False
        self.starving = False
        self.gave_way = False
        self.detached_at = 0.0
        self.counts: Counter[str] = Counter()
        self.bytes_per_second = 0.0
        self.rate_since: float | None = None
        self.rate_bytes = 0


class Attachment:
    """One attempt's right to read a restriction. Every method raises StaleAttachment once a newer one exists."""

    def __init__(self, consumer: KinesisSystemConsumer, group: _Group, epoch: int) -> None:
        self._consumer = consumer
        self._group = group
        self._epoch = epoch

    def poll(self, max_records: int) -> Batch | None:
        """Return the next batch of some shard, of at most `max_records` records; None: nothing is there now.

        Never blocks. Shards take turns; those that have only proved to be idle are left to `take_evidence`. The batch
        must be committed or pushed back before the next call.
        Raises what ended the reading of a shard, after everything before it has been handed out.
        """
        return self._consumer._poll(self._group, self._epoch, max_records)

    def take_evidence(self) -> list[Batch]:
        """Return what idle shards have proved since the last call: batches without records, one per shard.

        They need no commit: evidence moves no position.
        """
        return self._consumer._take_evidence(self._group, self._epoch)

    def commit(self, batch: Batch | None, frontier: ShardFrontier) -> None:
        """The batch was claimed and emitted, and `frontier` is what is left.

        Also starts the readers of shards that became ready. With None only the claims are noted.
        """
        self._consumer._commit(self._group, self._epoch, batch, frontier)

    def push_back(self, batch: Batch) -> None:
        """The claim was refused; the batch is the next one of its shard again."""
        self._consumer._push_back(self._group, self._epoch, batch)

    def wait(self, timeout_seconds: float) -> bool:
        """Wait until there is something to poll. False: the time is over, or another restriction has news.

        Another restriction's news end the wait only if they came during it, and only once until this one had a turn
        of its own: else two of them would give way to each other for ever.
        """
        return self._consumer._wait(self._group, self._epoch, timeout_seconds)

    def take_counts(self) -> Counter[str]:
        """Return what was counted since the last call, by the names of `metrics.py`."""
        return self._consumer._take_counts(self._group)

    def prefetched_bytes(self) -> int:
        return self._consumer._group_bytes(self._group)

    def shards_open(self) -> int:
        """Return how many shards are being read now."""
        return len(self._group.readers)

    def max_millis_behind_latest(self) -> int | None:
        """Return the largest lag that the service reported last, over the shards read now; None: none yet."""
        return self._consumer._max_millis_behind_latest(self._group)

    @property
    def sharers(self) -> int:
        """How many restrictions of this source are read by this process, this one included."""
        return self._consumer._sharers(self._group)

    def detach(self) -> None:
        """The attempt is over. Buffers stay for the next one, for a minute. Never raises."""
        self._consumer._detach(self._group, self._epoch)


class KinesisSystemConsumer:
    """Reads many shards for many restrictions with few threads.

    Args:
        clock: Time. With `max_threads=0` nothing happens in the background: waiting fetches, in the caller's thread and
            in the order in which shards fall due, so that a simulated clock makes everything repeatable.
        max_threads: Fetch threads at most, whatever the number of shards.
        seed: For the jitter of back-offs.
    """

    def __init__(
        self,
        *,
        clock: Clock | None = None,
        max_threads: int = 32,
        seed: int | None = None,
    ) -> None:
        self._clock: Clock = clock or SystemClock()
        self._max_threads = max_threads
        self._rng = random.Random(seed)
        self._lock = threading.Lock()
        self._connecting = threading.Lock()
        self._data = threading.Condition(self._lock)
        self._leader_wakes = threading.Condition(self._lock)
        self._groups: dict[GroupKey, _Group] = {}
        self._clients: dict[tuple[ClientFactory, str | None], KinesisClient] = {}
        self._pacers: dict[tuple[ClientFactory, StreamId, str], ShardPacer] = {}
        self._due: list[tuple[float, int, _Reader]] = []
        self._tickets = itertools.count()
        self._blocked: deque[_Reader] = deque()
        self._bytes = 0
        self._reserved = 0
        self._usual_answer_bytes: int | None = None  # what the next answer of a new shard is expected to take
        self._resume_at: dict[str, float] = {}
        self._threads = 0
        self._leader_until: float | None = None
        self._followers: list[threading.Condition] = []
        self._arrivals: Counter[str] = Counter()
        self._sweep_at = self._clock.monotonic_seconds() + _SWEEP_SECONDS
        self._stopped = False

    # Restrictions come and go.

    def attach(self, key: GroupKey, config: SourceConfig, frontier: ShardFrontier) -> Attachment:
        """Begin, or go on with, the reading of a restriction; revokes every earlier attachment of it."""
        with self._lock:
            if self._stopped:
                raise KinesisIOError("this KinesisSystemConsumer was stopped")
            group = self._groups.get(key)
            if group is None:
                group = self._groups[key] = _Group(key, config)
            group.epoch += 1
            group.attached = True
            warm = group.claims == frontier.claims
            for reader in list(group.readers.values()):
                if not warm or reader.handed_over:
                    self._close_reader(reader)
            group.claims = frontier.claims
            self._sync(group, frontier)
            self._data.notify_all()
            return Attachment(self, group, group.epoch)

    def resume_at(self, uid: str) -> float:
        """Return the monotonic time until which a source that found nothing waits before it looks again."""
        with self._lock:
            return self._resume_at.get(uid, float("-inf"))

    def set_resume_at(self, uid: str, seconds: float) -> None:
        with self._lock:
            self._resume_at[uid] = seconds

    def backlog_bytes(self, key: GroupKey, frontier: ShardFrontier) -> float | None:
        """Return an estimate of what is left to read now: lag x recent rate; None before anything is known.

        The oldest shard's lag counts for all, so it is an upper estimate.
        """
        with self._lock:
            group = self._groups.get(key)
            known = [s.read_until_micros for s in frontier.shards if s.read_until_micros is not None]
            if group is None or not known or group.bytes_per_second <= 0:
                return None
            lag = max(0.0, self._clock.now_seconds() - min(known) / 1e6)
            return lag * group.bytes_per_second

    def wait_for_any(self, attachments: Sequence[Attachment], timeout_seconds: float) -> bool:
        """Wait until there is something to poll from one of several attachments. False: the time is over."""
        deadline = self._clock.monotonic_seconds() + timeout_seconds
        with self._lock:
            while True:
                for attachment in attachments:
                    self._check(attachment._group, attachment._epoch)
                    if attachment._group.ready:
                        return True
                    self._starve(attachment._group)
                    if attachment._group.held:
                        self._release_held(attachment._group)
                left = deadline - self._clock.monotonic_seconds()
                if left <= 0:
                    return False
                if self._max_threads == 0:
                    self._fetch_inline(deadline)
                else:
                    self._clock.wait(self._data, left)

    def stop(self) -> None:
        """End all reading: threads end, connections close. Idempotent; calls under way are not waited for."""
        with self._lock:
            self._stopped = True
            for group in list(self._groups.values()):
                self._drop(group)
            self._wake_everybody()
            if not self._threads:
                self._close_clients()

    def sweep(self) -> None:
        """Drop the buffers that nobody has asked for in a minute."""
        with self._lock:
            self._sweep()

    # Attachment's side.

    def _check(self, group: _Group, epoch: int) -> None:
        if group.epoch != epoch or self._groups.get(group.key) is not group:
            raise StaleAttachment(
                "another attempt reads this restriction now, so this one stops; the runner has given up this bundle"
            )

    def _poll(self, group: _Group, epoch: int, max_records: int) -> Batch | None:
        fetched = False
        while True:
            with self._lock:
                self._check(group, epoch)
                if group.held:
                    self._release_held(group)
                if self._max_threads == 0 and not fetched:
                    fetched = True  # what a thread would do meanwhile
                    self._fetch_inline(self._clock.monotonic_seconds())
                if not group.ready:
                    self._starve(group)
                    return None
                reader = group.ready.popleft()
                reader.queued_data = False
                if reader.closed or reader.handed_over or not reader.has_data:
                    continue
                group.gave_way = False
                reader.handed_over = True
                if reader.returned is not None:
                    batch, reader.returned = reader.returned, None
                    return batch
            cut = _cut(reader, group.config, max_records)
            with self._lock:
                self._check(group, epoch)
                self._release_bytes(reader, cut.freed_bytes)
                group.counts.update(cut.counts)
                if cut.error is not None:
                    raise cut.error
                batch = cut.batch
                if not batch.records and batch.children is None and batch.lost is None:
                    # Only evidence was left of it (its records lay before the start, or behind the stop).
                    reader.handed_over = False
                    if batch.read_until_micros is not None:
                        proof = Fetched(read_until_micros=batch.read_until_micros, was_empty=batch.was_empty)
                        reader.buffer.appendleft(proof)
                    self._queue(reader)
                    continue
            return batch

    def _take_evidence(self, group: _Group, epoch: int) -> list[Batch]:
        with self._lock:
            self._check(group, epoch)
            found: list[Batch] = []
            while group.idle:
                reader = group.idle.popleft()
                reader.queued_evidence = False
                # What lies behind records must wait for them.
                if reader.closed or reader.handed_over or reader.returned or reader.unpacked:
                    continue
                while reader.buffer and _is_evidence(reader.buffer[0]):
                    proof = reader.buffer.popleft()
                    if proof.read_until_micros is not None:
                        batch = Batch(reader.key, [], None, proof.read_until_micros, proof.was_empty)
                        batch.millis_behind_latest = proof.millis_behind_latest
                        if group.config.stop is not None:
                            _apply_stop(batch, group.config.stop, None)
                        if batch.children is not None:
                            # The stop is reached: that moves the frontier, so it is handed over like data.
                            reader.returned = batch
                            self._queue(reader)
                            break
                        found.append(batch)
            return found

    def _starve(self, group: _Group) -> None:
        """The restriction has nothing; until something comes it may fetch beyond the byte limit."""
        if not group.starving:
            group.starving = True
            self._unblock(len(self._blocked))

    def _commit(self, group: _Group, epoch: int, batch: Batch | None, frontier: ShardFrontier) -> None:
        with self._lock:
            self._check(group, epoch)
            group.claims = frontier.claims
            if batch is None:
                return
            self._count_rate(group, batch.size_bytes)
            reader = group.readers.get(batch.key)
            if reader is not None:
                reader.handed_over = False
                if batch.position is not None:
                    reader.position = batch.position
                if batch.children is not None or batch.lost is not None:
                    self._close_reader(reader)
                else:
                    self._queue(reader)
            if batch.children is not None or batch.lost is not None:
                self._sync(group, frontier)

    def _push_back(self, group: _Group, epoch: int, batch: Batch) -> None:
        with self._lock:
            self._check(group, epoch)
            reader = group.readers.get(batch.key)
            if reader is not None and reader.handed_over:
                reader.returned = batch
                reader.handed_over = False
                self._queue(reader, first=True)

    def _wait(self, group: _Group, epoch: int, timeout_seconds: float) -> bool:
        deadline = self._clock.monotonic_seconds() + timeout_seconds
        with self._lock:
            self._check(group, epoch)
            uid = group.key[0]
            arrivals = self._arrivals[uid]
            while not group.ready:
                self._starve(group)
                if group.held:
                    self._release_held(group)
                over = False
                if self._max_threads == 0:
                    over = not self._fetch_inline(deadline)
                elif (left := deadline - self._clock.monotonic_seconds()) > 0:
                    self._clock.wait(self._data, left)
                self._check(group, epoch)
                if group.ready:
                    break
                if self._arrivals[uid] != arrivals and not group.gave_way and self._sharers_locked(group) > 1:
                    group.gave_way = True
                    return False
                if over or self._clock.monotonic_seconds() >= deadline:
                    return False
            return True

    def _take_counts(self, group: _Group) -> Counter[str]:
        with self._lock:
            for reader in group.readers.values():
                if not reader.in_flight:
                    self._collect_counts(reader)
            counts, group.counts = group.counts, Counter()
            return counts

    def _group_bytes(self, group: _Group) -> int:
        with self._lock:
            return sum(r.buffered_bytes for r in group.readers.values())

    def _max_millis_behind_latest(self, group: _Group) -> int | None:
        with self._lock:
            known = [r.poller.millis_behind_latest for r in group.readers.values()]
            return max((lag for lag in known if lag is not None), default=None)

    def _sharers(self, group: _Group) -> int:
        with self._lock:
            return self._sharers_locked(group)

    def _sharers_locked(self, group: _Group) -> int:
        return sum(1 for g in self._groups.values() if g.key[0] == group.key[0] and (g.readers or g is group))

    def _detach(self, group: _Group, epoch: int) -> None:
        with self._lock:
            if group.epoch != epoch:
                return
            group.attached = False
            group.detached_at = self._clock.monotonic_seconds()
            if not group.readers and not group.held:
                self._drop(group)
            self._sweep()

    # Readers.

    def _sync(self, group: _Group, frontier: ShardFrontier) -> None:
        """Let the group's readers be those of the frontier's ready shards, at the frontier's positions."""
        ready = {s.key: s for s in frontier.ready()}
        for key, reader in list(group.readers.items()):
            state = ready.get(key)
            if state is None or (reader.position != state.position and not reader.handed_over):
                self._close_reader(reader)
        group.held = tuple(s for s in ready.values() if s.key not in group.readers)
        self._release_held(group)

    def _release_held(self, group: _Group) -> None:
        """Start reading shards that are ready here and whose ancestors no other restriction of this process reads."""
        others = [
            r
            for g in self._groups.values()
            if g.key[0] == group.key[0] and g.key[1] != group.key[1]
            for r in g.readers.values()
        ]
        still_held: list[ShardState] = []
        for state in group.held:
            older_elsewhere = any(
                r.key[0] == state.stream
                and r.hash_key_range.overlaps(state.hash_key_range)
                and age_key(r.key[1]) < age_key(state.shard_id)
                for r in others
            )
            if older_elsewhere:
                still_held.append(state)
            else:
                self._open_reader(group, state)
        group.held = tuple(still_held)

    def _open_reader(self, group: _Group, state: ShardState) -> None:
        config = group.config
        stream = config.streams[state.stream]
        pacer = self._pacers.setdefault((config.factory, stream, state.shard_id), ShardPacer())
        poller = ShardPoller(
            state.shard_id,
            state.hash_key_range,
            state.position,
            read_until_micros=state.read_until_micros,
            pacer=pacer,
            limits=config.limits,
            poll_interval_seconds=config.poll_interval_seconds,
            max_records_per_get=config.max_records_per_get,
            rng=self._rng,
            now_monotonic=self._clock.monotonic_seconds(),
            now_epoch=self._clock.now_seconds(),
        )
        reader = _Reader(state, stream, group, poller)
        group.readers[state.key] = reader
        self._schedule(reader)

    def _close_reader(self, reader: _Reader) -> None:
        if not reader.in_flight:  # else its fetch thread is counting; `_fetched` collects
            self._collect_counts(reader)
        reader.closed = True
        reader.group.readers.pop(reader.key, None)
        # The buffer is left alone: a revoked attachment may be unpacking its head just now.
        self._release_bytes(reader, reader.buffered_bytes)

    def _collect_counts(self, reader: _Reader) -> None:
        counts = reader.poller.counts
        if counts:  # seldom, and asked of every shard after each bundle
            reader.group.counts.update(counts)
            counts.clear()

    def _drop(self, group: _Group) -> None:
        for reader in list(group.readers.values()):
            self._close_reader(reader)
        group.held = ()
        self._groups.pop(group.key, None)
        uid = group.key[0]
        if not any(g.key[0] == uid for g in self._groups.values()):
            self._resume_at.pop(uid, None)

    def _sweep(self) -> None:
        now = self._clock.monotonic_seconds()
        for group in list(self._groups.values()):
            if not group.attached and now - group.detached_at >= IDLE_SECONDS:
                self._drop(group)
        if not self._groups:
            self._close_clients()
            for key in [k for k, p in self._pacers.items() if p.next_call_seconds < now]:
                del self._pacers[key]

    def _close_clients(self) -> None:
        for client in self._clients.values():
            client.close()
        self._clients.clear()

    def _queue(self, reader: _Reader, *, first: bool = False) -> None:
        """Put a reader in line for `poll`, at the end: the shards of a restriction take turns."""
        if reader.closed or reader.handed_over:
            return
        if reader.has_data:
            reader.group.starving = False
            if not reader.queued_data:
                reader.queued_data = True
                if first:
                    reader.group.ready.appendleft(reader)
                else:
                    reader.group.ready.append(reader)
        elif reader.buffer and not reader.queued_evidence:
            reader.queued_evidence = True
            reader.group.idle.append(reader)

    def _count_rate(self, group: _Group, size_bytes: int) -> None:
        now = self._clock.monotonic_seconds()
        if group.rate_since is None:
            group.rate_since = now
        group.rate_bytes += size_bytes
        elapsed = now - group.rate_since
        if elapsed >= 1.0:
            rate = group.rate_bytes / elapsed
            group.bytes_per_second = rate if group.bytes_per_second == 0 else (group.bytes_per_second + rate) / 2
            group.rate_since, group.rate_bytes = now, 0

    # Memory.

    def _may_fetch(self, reader: _Reader) -> bool:
        config = reader.group.config
        if reader.poller.call is not Call.GET_RECORDS:
            return True
        if reader.buffered_bytes >= config.prefetch_bytes_per_shard:
            return False
        expected = min(self._expected_bytes(reader), config.prefetch_bytes)
        if self._bytes + self._reserved + expected <= config.prefetch_bytes:
            return True
        # A restriction that waits with empty hands may always fetch, or buffers nobody asks for would starve it.
        return reader.group.starving and self._reserved == 0

    def _expected_bytes(self, reader: _Reader) -> int:
        return reader.answer_bytes or self._usual_answer_bytes or _FIRST_ANSWER_BYTES

    def _learn_bytes(self, reader: _Reader, memory_bytes: int) -> None:
        """Expect the next answer to be like this one; a shard that falls silent holds no room for long."""
        # Twice: while an answer is decoded its text is there too.
        reader.answer_bytes = max(2 * memory_bytes, (reader.answer_bytes or 0) // 2, _LEAST_ANSWER_BYTES)
        self._usual_answer_bytes = max(reader.answer_bytes, (self._usual_answer_bytes or 0) * 7 // 8)

    def _release_bytes(self, reader: _Reader, size_bytes: int) -> None:
        reader.buffered_bytes -= size_bytes
        self._bytes -= size_bytes
        if size_bytes:
            if reader.blocked:
                reader.blocked = False  # its entry among the blocked is skipped when its turn comes
                self._schedule(reader)
            self._unblock(_UNBLOCKED_AT_ONCE)

    def _unblock(self, count: int) -> None:
        """Let `count` readers that waited for memory try again, the one that waited longest first."""
        for _ in range(min(count, len(self._blocked))):
            reader = self._blocked.popleft()
            if reader.blocked:
                reader.blocked = False
                self._schedule(reader)

    # Fetching.

    def _schedule(self, reader: _Reader) -> None:
        if reader.closed or reader.in_flight or reader.blocked or reader.poller.is_ended:
            return
        due = reader.poller.due_seconds
        heapq.heappush(self._due, (due, next(self._tickets), reader))
        self._ensure_threads()
        if self._leader_until is None:
            self._wake_follower()
        elif due < self._leader_until:
            self._leader_wakes.notify()

    def _next_due(self) -> float | None:
        """Return when the first reader in the heap falls due; None if there is none."""
        while self._due:
            due, ticket, reader = self._due[0]
            if reader.closed or reader.in_flight or reader.blocked or reader.poller.is_ended:
                heapq.heappop(self._due)
            elif (now_due := reader.poller.due_seconds) > due:
                heapq.heapreplace(self._due, (now_due, ticket, reader))
            elif not self._may_fetch(reader):
                heapq.heappop(self._due)
                reader.blocked = True
                self._blocked.append(reader)
            else:
                return due
        return None

    def _take_due(self) -> _Reader:
        """Take the first reader, after `_next_due` said that it is due."""
        reader = heapq.heappop(self._due)[2]
        reader.in_flight = True
        reader.reserved_bytes = self._expected_bytes(reader) if reader.poller.call is Call.GET_RECORDS else 0
        self._reserved += reader.reserved_bytes
        reader.poller.on_call(self._clock.monotonic_seconds())
        return reader

    def _client(self, factory: ClientFactory, stream: StreamId) -> KinesisClient:
        key = (factory, stream.region)
        with self._lock:
            client = self._clients.get(key)
        if client is not None:
            return client
        with self._connecting:
            with self._lock:
                client = self._clients.get(key)  # somebody else may have connected meanwhile
            if client is None:
                client = factory.connect(stream)
                with self._lock:
                    self._clients[key] = client
            return client

    def _fetch(self, reader: _Reader) -> Fetched | None:
        """Make one call and tell the poller. Called without the lock, by whoever marked the reader in flight."""
        poller = reader.poller
        try:
            try:
                return self._call(reader)
            except KinesisIOError as error:
                return poller.on_error(error, self._clock.monotonic_seconds(), self._clock.now_seconds())
        except Exception as error:  # a defect of ours or of the client's: the bundle must see it, not this thread
            failure = KinesisIOError(f"reading shard {reader.key[1]} of {reader.stream.name} failed: {error!r}")
            failure.__cause__ = error
            return poller.on_defect(failure)

    def _call(self, reader: _Reader) -> Fetched | None:
        poller, stream, clock = reader.poller, reader.stream, self._clock
        client = self._client(reader.group.config.factory, stream)
        call = poller.call
        if call is Call.GET_RECORDS:
            answer = client.get_records(stream, poller.iterator, poller.limit)
            return poller.on_answer(answer, clock.monotonic_seconds())
        if call is Call.GET_SHARD_ITERATOR:
            iterator = client.get_shard_iterator(stream, reader.key[1], poller.position)
            poller.on_iterator(iterator, clock.monotonic_seconds())
            return None
        if call is Call.LIST_SHARDS:
            return poller.on_shards(client.list_shards(stream), clock.monotonic_seconds())
        description = client.describe_stream(stream)
        return poller.on_description(description, clock.monotonic_seconds(), clock.now_seconds())

    def _fetched(self, reader: _Reader, fetched: Fetched | None) -> None:
        """Take in what `_fetch` brought. Called with the lock."""
        reader.in_flight = False
        self._reserved -= reader.reserved_bytes
        reader.reserved_bytes = 0
        if reader.closed:
            self._collect_counts(reader)
            self._unblock(_UNBLOCKED_AT_ONCE)
            return
        if fetched is not None:
            memory_bytes = _memory_bytes(fetched)
            self._learn_bytes(reader, memory_bytes)
            last = reader.buffer[-1] if reader.buffer else None
            if last is not None and not reader.handed_over and _is_evidence(last) and _is_evidence(fetched):
                # The later evidence says it all, so an idle shard's buffer stays one entry long.
                reader.buffer.pop()
                if fetched.read_until_micros is None:
                    fetched.read_until_micros = last.read_until_micros
            reader.buffer.append(fetched)
            reader.buffered_bytes += memory_bytes
            self._bytes += memory_bytes
            self._queue(reader)
            if not _is_evidence(fetched):
                self._arrivals[reader.group.key[0]] += 1
                self._data.notify_all()
        self._schedule(reader)
        if self._blocked and self._reserved == 0:
            self._unblock(_UNBLOCKED_AT_ONCE)

    def _fetch_inline(self, deadline: float) -> bool:
        """Make the next call that falls due until `deadline`; False: none does, and the time has passed.

        Called with the lock.
        """
        due = self._next_due()
        now = self._clock.monotonic_seconds()
        if due is None or due > max(deadline, now):
            self._clock.sleep(deadline - now)
            return False
        self._clock.sleep(due - now)
        reader = self._take_due()
        self._lock.release()
        try:
            fetched = self._fetch(reader)
        finally:
            self._lock.acquire()
        self._fetched(reader, fetched)
        return True

    # Threads: one leader sleeps until the next reader falls due, the others until somebody calls. So a timer wakes one.

    def _ensure_threads(self) -> None:
        wanted = min(self._max_threads, sum(len(g.readers) for g in self._groups.values()))
        while self._threads < wanted:
            self._threads += 1
            threading.Thread(target=self._run, name=f"kinesis-fetch-{self._threads}", daemon=True).start()

    def _run(self) -> None:
        wakes = threading.Condition(self._lock)
        with self._lock:
            try:
                while not self._stopped:
                    now = self._clock.monotonic_seconds()
                    if now >= self._sweep_at:
                        # Restrictions that moved to another worker: nobody here detaches from them any more.
                        self._sweep_at = now + _SWEEP_SECONDS
                        self._sweep()
                    due = self._next_due()
                    if due is not None and due <= now:
                        reader = self._take_due()
                        if self._leader_until is None:
                            self._wake_follower()
                        self._lock.release()
                        try:
                            fetched = self._fetch(reader)
                        finally:
                            self._lock.acquire()
                        self._fetched(reader, fetched)
                        del fetched, reader  # or a waiting thread would keep its last answer's records alive
                        continue
                    if self._leader_until is None:
                        self._leader_until = now + IDLE_SECONDS if due is None else due
                        try:
                            self._clock.wait(self._leader_wakes, self._leader_until - now)
                        finally:
                            self._leader_until = None
                        if due is None:
                            self._sweep()
                            if not self._groups:
                                return
                    else:
                        self._followers.append(wakes)
                        try:
                            self._clock.wait(wakes, IDLE_SECONDS)
                        finally:
                            if wakes in self._followers:  # nobody called
                                self._followers.remove(wakes)
                        if not self._groups:
                            return
            except Exception:
                _log.exception("a fetch thread ended; its work goes to another")
                raise
            finally:
                self._threads -= 1
                if not self._threads and not self._groups:
                    self._close_clients()  # only now: a thread that was in a call may have opened one since

    def _wake_everybody(self) -> None:
        self._data.notify_all()
        self._leader_wakes.notify_all()
        while self._followers:
            self._wake_follower()

    def _wake_follower(self) -> None:
        """Wake the thread that waits since the shortest time.

        So few threads do all of the work when it is little: what each has in its caches and in its part of the heap (an
        answer's size, freed or not) is used again instead of being there 32 times.
        """
        if self._followers:
            self._followers.pop().notify()


class _Cut(msgspec.Struct):
    batch: Batch
    freed_bytes: int
    counts: Counter[str]
    error: KinesisIOError | None = None


def _cut(reader: _Reader, config: SourceConfig, max_records: int) -> _Cut:
    """Take at most `max_records` user records off the head of a reader's buffer.

    Aggregates are taken apart only here, so that a buffer's bytes bound its memory, and may be cut.
    A batch never spans two answers: evidence belongs behind the records of its own answer.
    """
    counts: Counter[str] = Counter()
    out: list[KinesisRecord] = []
    while reader.unpacked and len(out) < max_records:
        out.append(reader.unpacked.popleft())
    while len(reader.buffer) > 1 and _is_evidence(reader.buffer[0]):
        reader.buffer.popleft()  # what comes behind it proves more
    head = reader.buffer[0]
    if head.error is not None:
        return _Cut(Batch(reader.key, [], None), 0, counts, head.error)
    while len(out) < max_records and reader.head_index < len(head.records):
        _unpack(reader, config, head.records, max_records, out, counts)
    if len(out) > max_records:
        reader.unpacked.extend(out[max_records:])
        del out[max_records:]
    batch = Batch(reader.key, out, None)
    consumed = reader.head_index
    freed = 0
    if reader.head_index >= len(head.records) and not reader.unpacked:
        reader.buffer.popleft()
        reader.head_index = 0
        freed = _memory_bytes(head)
        batch.read_until_micros = head.read_until_micros
        batch.was_empty = head.was_empty
        batch.millis_behind_latest = head.millis_behind_latest
        batch.children = head.children
        batch.lost = head.lost
    if config.stop is not None:
        raw = int(head.records[consumed - 1].sequence_number) if consumed else None
        _apply_stop(batch, config.stop, raw, whole=not reader.unpacked)
    if batch.records:
        last = batch.records[-1]
        batch.position = Position.after(int(last.sequence_number), last.sub_sequence_number)
        batch.size_bytes = sum([len(r.data) for r in batch.records])
    return _Cut(batch, freed, counts)


def _unpack(
    reader: _Reader,
    config: SourceConfig,
    raws: Sequence[KinesisRecord],
    max_records: int,
    out: list[KinesisRecord],
    counts: Counter[str],
) -> None:
    """Append the user records of `raws` from the reader's index on, until there are `max_records` or a few more.

    More only if the last one came out of an aggregate. The reader's index is then behind the last record used.
    """
    shard_id, stream = reader.key[1], reader.stream.name
    part = raws[reader.head_index : reader.head_index + max_records - len(out)]
    for raw in part:
        force_setattr(raw, "shard_id", shard_id)
        force_setattr(raw, "stream", stream)
    if reader.skip is None and not (config.deaggregate and any([r.data[:4] == MAGIC for r in part])):  # noqa: C419 (faster)
        out.extend(part)
        reader.head_index += len(part)
        return
    for raw in part:
        if len(out) >= max_records:
            return
        reader.head_index += 1
        users: list[KinesisRecord] = [raw]
        if config.deaggregate and raw.data[:4] == MAGIC:
            apart = deaggregate(raw, hash_key_range=reader.hash_key_range, hash_filter=config.hash_filter)
            if apart is not None:
                users = apart.records
                counts[metrics.AGGREGATED_RECORDS] += 1
                counts[metrics.OUTSIDE_HASH_RANGE] += apart.outside_count
                counts[metrics.FILTERED_AGGREGATES] += not users
        if reader.skip is not None:
            sequence = int(raw.sequence_number)
            if sequence > reader.skip.sequence_number:
                reader.skip = None
            else:
                skip = reader.skip
                users = [u for u in users if not skip.excludes(sequence, u.sub_sequence_number)]
        out.extend(users)


def _apply_stop(batch: Batch, stop: StopPosition, consumed: int | None, *, whole: bool = True) -> None:
    """Cut the batch where the bounded read ends, and end the shard there.

    Timestamp t: records that arrived before t are kept. Arrival times are not strictly increasing, so the shard
    ends only at a record that arrived `ARRIVAL_SLACK_SECONDS` after t, or when the service has delivered
    everything up to then. Sequence number: included; the shard ends there, or at its own end, or where the service
    has delivered everything up to the time the number was made (its record may be trimmed, or before the start).

    Args:
        consumed: The sequence number of the last record, as the service sent it, that went into the batch or was
            left out of it.
        whole: That record does not go on in the next batch.
    """
    if stop.kind is StopKind.AT_TIMESTAMP:
        assert stop.timestamp is not None
        micros = stop.timestamp.micros
        over = batch.read_until_micros is not None and batch.read_until_micros >= micros + _SLACK_MICROS
        if batch.records:
            arrivals = [r.approximate_arrival_micros for r in batch.records]
            if max(arrivals) >= micros:
                over = over or max(arrivals) >= micros + _SLACK_MICROS
                batch.records = [r for r, a in zip(batch.records, arrivals, strict=True) if a < micros]
        if over and batch.children is None:
            batch.children = ()
        return
    end = dict(stop.sequence_positions).get(batch.key[1])
    if end is None:
        return
    kept = [r for r in batch.records if end.excludes(int(r.sequence_number), r.sub_sequence_number)]
    reached = len(kept) < len(batch.records)
    if consumed is not None:
        reached = reached or consumed > end.sequence_number or (consumed == end.sequence_number and whole)
        if kept and int(kept[-1].sequence_number) == end.sequence_number:
            reached = reached or kept[-1].sub_sequence_number == end.sub_sequence_number
    made = arrival_seconds_of(end.sequence_number)
    if made is not None and batch.read_until_micros is not None:
        # Numbers tell whole seconds.
        reached = reached or batch.read_until_micros >= (made + 1) * 1_000_000 + _SLACK_MICROS
    batch.records = kept
    if reached or batch.children is not None:
        batch.children = ()  # children are not followed


_shared: dict[int, tuple[Clock, KinesisSystemConsumer]] = {}
_system: KinesisSystemConsumer | None = None
_shared_lock = threading.Lock()


def shared_consumer(clock: Clock) -> KinesisSystemConsumer:
    """Return this process's consumer for a clock: DoFn instances come and go, buffers must not.

    With any clock but `SystemClock` it runs without threads.
    """
    global _system
    with _shared_lock:
        if isinstance(clock, SystemClock):
            if _system is None:
                _system = KinesisSystemConsumer(clock=clock)
            return _system
        entry = _shared.get(id(clock))
        if entry is None:
            entry = _shared[id(clock)] = (clock, KinesisSystemConsumer(clock=clock, max_threads=0, seed=0))
        return entry[1]


def _forget_after_fork() -> None:
    # The child has the parent's buffers but not its threads; it starts with none of them.
    global _system, _shared, _shared_lock
    _system = None
    _shared = {}
    _shared_lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_after_fork)
