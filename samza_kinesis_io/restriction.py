"""The restriction: which shards are left to read, and where each of them stands.

Rules of this file: it decides and never does. No I/O, no clock, no Beam pipeline: the tracker runs under Beam's lock
and on copies of the DoFn that were never set up.

Life of a shard in a frontier:

    planned / announced by a parent ─► waiting (an older shard of the frontier overlaps it)
                                          │ the last such shard ended
                                          ▼
                                       ready ─► claim, claim, ... ─► claim of its end: its children take its place
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import msgspec
from apache_beam.coders import Coder
from apache_beam.io.iobase import RestrictionProgress, RestrictionTracker
from apache_beam.utils.timestamp import MAX_TIMESTAMP, MIN_TIMESTAMP

from samza_kinesis_io.errors import ConfigurationError, DataLoss, IncompleteShardList
from samza_kinesis_io.positions import Position, PositionKind, StartingPosition, StopPosition
from samza_kinesis_io.shards import (
    ChildShard,
    HashKeyRange,
    Shard,
    age_key,
    holes,
    oldest_covering,
    uncovered,
)

MIN_MICROS: Final[int] = MIN_TIMESTAMP.micros
MAX_MICROS: Final[int] = MAX_TIMESTAMP.micros

#: A shard of a frontier: the index of its stream in the source's list of streams, and its id.
ShardKey = tuple[int, str]


@dataclass(frozen=True, slots=True)
class ShardState:
    """One shard that is still to be read, or waits for older ones.

    Attributes:
        stream: Index into the source's list of streams.
        position: The starting position, or behind the last record emitted.
        read_until_micros: Everything that arrived before this time is emitted; None before the first answer.
        watermark_micros: By the policy, no later record of this shard has an earlier event time.
    """

    stream: int
    shard_id: str
    hash_key_range: HashKeyRange
    position: Position
    read_until_micros: int | None = None
    watermark_micros: int = MIN_MICROS

    @property
    def key(self) -> ShardKey:
        return (self.stream, self.shard_id)


def blocked(shards: Iterable[ShardState]) -> set[ShardKey]:
    """Return the shards that must wait: an older shard of the same stream holds some of their hash keys.

    Shards whose ranges overlap are ancestor and descendant (`shards.py`), so this is "parents before children" for
    any number of generations, and a parent that is not here counts as read.
    """
    waiting: set[ShardKey] = set()
    active: list[ShardState] = []
    for shard in sorted(shards, key=lambda s: (s.stream, s.hash_key_range.start)):
        active = [a for a in active if a.stream == shard.stream and a.hash_key_range.end >= shard.hash_key_range.start]
        for other in active:
            younger = max(shard, other, key=lambda s: age_key(s.shard_id))
            waiting.add(younger.key)
        active.append(shard)
    return waiting


@dataclass(frozen=True, slots=True)
class ShardFrontier:
    """The shards of one restriction that are still to be read. Empty: done.

    Invariant over all restrictions of a source: every hash key is read, or will be, by exactly one of them.

    Attributes:
        claims: Raised by every claim, so that two frontiers with equal positions of which one is older differ.
        nonce: Made with the restriction; a recomputation of it (Spark) gets another.
        event_lag_micros: The largest (arrival - event time) seen; None before the first record. Only an
            event-time policy uses it.
    """

    shards: tuple[ShardState, ...]
    claims: int = 0
    nonce: bytes = b""
    event_lag_micros: int | None = None

    def __bool__(self) -> bool:
        # Beam's SDK tests the truth of a residual to see whether there is one.
        return True

    @property
    def is_done(self) -> bool:
        return not self.shards

    @property
    def watermark_micros(self) -> int:
        """The minimum over all shards, the waiting ones too; the end of time when nothing is left."""
        return min((s.watermark_micros for s in self.shards), default=MAX_MICROS)

    def ready(self) -> tuple[ShardState, ...]:
        """Return the shards that may be read now."""
        waiting = blocked(self.shards)
        return tuple(s for s in self.shards if s.key not in waiting)

    def with_nonce(self) -> ShardFrontier:
        return replace(self, nonce=uuid.uuid4().bytes)


def adopted(
    ended: ShardState,
    children: Iterable[ChildShard],
    starts: Mapping[str, Position],
    start: Position,
    *,
    is_only_restriction: bool = False,
) -> tuple[ShardState, ...]:
    """Return those children of a shard that has ended which belong to the restriction that read it.

    A child belongs to the reader of the parent that holds the child's first hash key; both parents of a merge
    report it, and exactly one of them takes it. An only restriction takes it when the first of its parents ends, and it
    waits there for the other: so no hash key is ever held by nobody, and a loss of the other parent's generation cannot
    take the child with it.

    Args:
        starts: Shards whose starting position the user named.
        start: Where any other child starts: the source's start timestamp, else TRIM_HORIZON; never LATEST.
    """
    return tuple(
        ShardState(
            stream=ended.stream,
            shard_id=child.shard_id,
            hash_key_range=child.hash_key_range,
            position=starts.get(child.shard_id, start),
            watermark_micros=ended.watermark_micros,
        )
        for child in children
        if is_only_restriction or ended.hash_key_range.contains(child.hash_key_range.start)
    )


def planned(
    stream: int,
    listed: Sequence[Shard],
    start: StartingPosition,
    stop: StopPosition | None,
    watermark_micros: int,
) -> tuple[ShardState, ...]:
    """Return the shards with which the reading of a stream begins, and where.

    Named shards (a start or a stop by sequence numbers) change what must be read: ancestors that named
    descendants cover count as read, and a stop's shards are all there is.

    Args:
        stream: The index of the stream.
        listed: Every shard that ListShards gives.
        start: Pinned.
        watermark_micros: Where every shard's watermark begins.

    Raises:
        ConfigurationError: a named shard is not listed, or a shard has no start.
        IncompleteShardList: the listed shards leave a hole; the list may be better next time.
    """
    named = start.named_positions()
    stops = dict(stop.sequence_positions) if stop is not None else {}
    by_id = {s.shard_id: s for s in listed}
    for option, wanted in (("starting_position", named), ("stop_at", stops)):
        if unknown := sorted(set(wanted) - set(by_id)):
            raise ConfigurationError(
                f"{option} names shards that the stream does not list: {unknown[:5]}; listed are "
                f"{sorted(by_id)[:5]}{' ...' if len(by_id) > 5 else ''}"
            )
    read: dict[str, Shard] = {}
    if stops:
        chosen = [by_id[shard_id] for shard_id in sorted(stops, key=age_key)]
    else:
        read = {s.shard_id: s for s in listed if named and s.shard_id not in named and _is_read(s, listed, named)}
        left = [s for s in listed if s.shard_id not in read]
        if missing := holes(left):
            raise IncompleteShardList(
                f"the {len(listed)} listed shards leave hash keys to nobody, the first are {missing[0].start} to "
                f"{missing[0].end}"
            )
        chosen = list(oldest_covering(left))
        if read:
            # Lineage does not lead around shards that count as read, so every shard is planned and waits for its
            # ancestors. Also the read ones that an ancestor would adopt: behind their last record they end at once.
            chosen = list(left)
            for shard in sorted(read.values(), key=lambda s: age_key(s.shard_id)):
                if any(_is_ancestor(other, shard) for other in chosen):
                    chosen.append(shard)
            chosen.sort(key=lambda s: age_key(s.shard_id))
    states: list[ShardState] = []
    orphans: list[str] = []
    for shard in chosen:
        position = named.get(shard.shard_id)
        if shard.shard_id in read and shard.ending_sequence_number is not None:
            position = Position.after(shard.ending_sequence_number)
        if position is None:
            if named and start.otherwise is None and not _descends(shard, listed, named):
                orphans.append(shard.shard_id)
            position = start.position()
        end = stops.get(shard.shard_id)
        if end is not None and position.excludes(end.sequence_number, end.sub_sequence_number):
            continue  # starts behind its stop
        states.append(ShardState(stream, shard.shard_id, shard.hash_key_range, position, None, watermark_micros))
    if orphans:
        raise ConfigurationError(
            f"starting_position names no sequence number for the shards {orphans[:5]}, and no named shard leads to "
            "them; name them too, or give otherwise=StartingPosition.trim_horizon() (or latest(), at_timestamp(t))"
        )
    return tuple(states)


def _is_ancestor(shard: Shard, other: Shard) -> bool:
    return shard.hash_key_range.overlaps(other.hash_key_range) and age_key(shard.shard_id) < age_key(other.shard_id)


def _is_read(shard: Shard, listed: Sequence[Shard], named: Mapping[str, Position]) -> bool:
    """Whether named descendants cover a shard wholly, so that whoever wrote their positions had read it."""
    descendants = [s.hash_key_range for s in listed if s.shard_id in named and _is_ancestor(shard, s)]
    return not uncovered(shard.hash_key_range, descendants)


def _descends(shard: Shard, listed: Sequence[Shard], named: Mapping[str, Position]) -> bool:
    return any(
        s.shard_id in named
        and age_key(s.shard_id) < age_key(shard.shard_id)
        and s.hash_key_range.overlaps(shard.hash_key_range)
        for s in listed
    )


def after_loss(
    lost: ShardState,
    listed: Sequence[Shard],
    held: Iterable[ShardState],
    starts: Mapping[str, Position],
    start: Position,
    *,
    is_only_restriction: bool,
) -> tuple[ShardState, ...]:
    """Return what is read instead of a shard that is gone: the oldest listed shards that hold its hash keys.

    Shards that the frontier holds already are left out. A loss never just empties a frontier.

    Raises:
        DataLoss: there are other restrictions, and what is left are not simply the lost shard's own parts: one of them
            may read it too, or may have left to this one a merge child that is gone as well.
        IncompleteShardList: some of the lost range is held by nobody.
    """
    held_ids = {s.shard_id for s in held if s.stream == lost.stream and s.key != lost.key}
    if missing := holes(listed, lost.hash_key_range):
        raise IncompleteShardList(
            f"shard {lost.shard_id} is gone and the listed shards leave its hash keys {missing[0]} to nobody"
        )
    successors = [s for s in oldest_covering(listed, lost.hash_key_range) if s.shard_id not in held_ids]
    for shard in successors:
        is_own_part = shard.parents == (lost.shard_id,) and lost.hash_key_range.covers(shard.hash_key_range)
        if not is_only_restriction and not is_own_part:
            raise DataLoss(
                f"shard {lost.shard_id} is gone; what is left of its range is shard {shard.shard_id}, which did not "
                "come from it alone, so that another restriction has to do with it. Read with restrictions=1 to go on."
            )
    return tuple(
        ShardState(
            lost.stream, s.shard_id, s.hash_key_range, starts.get(s.shard_id, start), None, lost.watermark_micros
        )
        for s in successors
    )


class Advance(msgspec.Struct, frozen=True, gc=False):
    """How far a claim moves one shard. `position=None` leaves the position and moves the watermark alone."""

    key: ShardKey
    position: Position | None
    watermark_micros: int
    read_until_micros: int | None


class Claim(msgspec.Struct, frozen=True):
    """What `try_claim` takes: some shards move on, and possibly one is replaced.

    Attributes:
        advances: Shards that move.
        replaced: A shard that leaves the frontier: it has ended, or its rest is lost.
        successors: What takes its place; a shard that is there already stays as it is.
    """

    advances: tuple[Advance, ...]
    replaced: ShardKey | None = None
    successors: tuple[ShardState, ...] = ()
    event_lag_micros: int | None = None


class FrontierTracker(RestrictionTracker):
    """Tracks one `ShardFrontier`. Called under Beam's lock, from several threads one after the other.

    `try_split(0)` is a checkpoint: everything unclaimed becomes the residual. Any other fraction is declined:
    a frontier is not divided while it is read.
    """

    def __init__(self, frontier: ShardFrontier, *, bounded: bool = False) -> None:
        self._shards: dict[ShardKey, ShardState] = {s.key: s for s in frontier.shards}
        self._frontier: ShardFrontier | None = frontier
        self._claims = frontier.claims
        self._nonce = frontier.nonce
        self._event_lag_micros = frontier.event_lag_micros
        self._bounded = bounded
        self._split = False

    def current_restriction(self) -> ShardFrontier:
        """Return what is left to claim, not what this tracker began with."""
        if self._frontier is None:
            self._frontier = ShardFrontier(
                tuple(self._shards.values()), self._claims, self._nonce, self._event_lag_micros
            )
        return self._frontier

    def try_claim(self, claim: Claim) -> bool:
        """Take the records that `claim` stands for. False after a split: they belong to the residual."""
        if self._split:
            return False
        for advance in claim.advances:
            shard = self._shards.get(advance.key)
            if shard is None:
                raise ValueError(f"claim of shard {advance.key}, which this restriction does not hold")
            self._shards[advance.key] = replace(
                shard,
                position=shard.position if advance.position is None else advance.position,
                read_until_micros=_latest(shard.read_until_micros, advance.read_until_micros),
                watermark_micros=max(shard.watermark_micros, advance.watermark_micros),
            )
        if claim.replaced is not None:
            if claim.replaced not in self._shards:
                raise ValueError(f"claim of the end of shard {claim.replaced}, which this restriction does not hold")
            del self._shards[claim.replaced]
            for successor in claim.successors:
                self._shards.setdefault(successor.key, successor)
        if claim.event_lag_micros is not None:
            self._event_lag_micros = _latest(self._event_lag_micros, claim.event_lag_micros)
        self._claims += 1
        self._frontier = None
        return True

    def check_done(self) -> bool:
        if self._shards:
            raise ValueError(
                f"{len(self._shards)} shards are unread and were not deferred: {[k[1] for k in list(self._shards)[:5]]}"
            )
        return True

    def current_progress(self) -> RestrictionProgress:
        # A fraction, never completed= and remaining=: with those Prism fails the job on a NaN.
        return RestrictionProgress(fraction=0.0 if self._shards else 1.0)

    def try_split(self, fraction_of_remainder: float) -> tuple[ShardFrontier, ShardFrontier] | None:
        """Split off everything unclaimed at fraction 0; None for any other fraction or when nothing is left."""
        if fraction_of_remainder != 0 or not self._shards:
            return None
        residual = self.current_restriction()
        self._shards = {}
        self._split = True
        self._frontier = None
        return self.current_restriction(), residual

    def is_bounded(self) -> bool:
        return self._bounded


def _latest(a: int | None, b: int | None) -> int | None:
    if a is None:
        return b
    return a if b is None else max(a, b)


_KINDS: Final = (
    PositionKind.TRIM_HORIZON,
    PositionKind.AT_TIMESTAMP,
    PositionKind.AT_SEQUENCE_NUMBER,
    PositionKind.AFTER_SEQUENCE_NUMBER,
)
_KIND_NUMBERS: Final = {kind: number for number, kind in enumerate(_KINDS)}
_WireShard = tuple[int, str, bytes, bytes, int, str, int, int, int | None, int]
_WireFrontier = tuple[int, bytes, int | None, list[_WireShard]]
_VERSION: Final = b"\x01"


class ShardFrontierCoder(Coder):
    """The wire form of a frontier. It lies in the runners' checkpoints, so old versions must decode for ever.

    Byte 0x01 (version), then a MessagePack array:
        [claims, nonce (bin), event lag in µs or nil,
         [[stream, shard id, first hash key (16 bytes, big-endian), last hash key (same),
           kind (0 TRIM_HORIZON, 1 AT_TIMESTAMP, 2 AT_, 3 AFTER_SEQUENCE_NUMBER), sequence number (decimal string),
           sub-sequence number, timestamp µs, read until µs or nil, watermark µs], ...]]
    Deterministic.
    """

    def __init__(self) -> None:
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(_WireFrontier).decode

    def encode(self, value: ShardFrontier) -> bytes:
        return _VERSION + self._encode(
            (
                value.claims,
                value.nonce,
                value.event_lag_micros,
                [
                    (
                        s.stream,
                        s.shard_id,
                        s.hash_key_range.start.to_bytes(16, "big"),
                        s.hash_key_range.end.to_bytes(16, "big"),
                        _KIND_NUMBERS[s.position.kind],
                        str(s.position.sequence_number),
                        s.position.sub_sequence_number,
                        s.position.timestamp_micros,
                        s.read_until_micros,
                        s.watermark_micros,
                    )
                    for s in value.shards
                ],
            )
        )

    def decode(self, encoded: bytes) -> ShardFrontier:
        """Raises ValueError: the version is unknown, or bytes are missing or left over."""
        if encoded[:1] != _VERSION:
            raise ValueError(
                f"unknown version {encoded[:1]!r} of an encoded ShardFrontier; the checkpoint was written by a newer "
                "release of samza-kinesis-io, so run that release"
            )
        claims, nonce, event_lag, shards = self._decode(memoryview(encoded)[1:])
        return ShardFrontier(
            tuple(
                ShardState(
                    stream,
                    shard_id,
                    HashKeyRange(int.from_bytes(start, "big"), int.from_bytes(end, "big")),
                    Position(_KINDS[kind], int(sequence), sub, timestamp),
                    read_until,
                    watermark,
                )
                for stream, shard_id, start, end, kind, sequence, sub, timestamp, read_until, watermark in shards
            ),
            claims,
            nonce,
            event_lag,
        )

    def is_deterministic(self) -> bool:
        return True

    def to_type_hint(self) -> type[ShardFrontier]:
        return ShardFrontier

    def __reduce__(self) -> tuple[Any, ...]:
        return (ShardFrontierCoder, ())

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    def __hash__(self) -> int:
        return hash(type(self))
