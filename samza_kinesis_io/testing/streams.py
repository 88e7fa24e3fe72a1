"""What the fake service keeps: streams, their shards, and the records in them.

Records lie in their shard as pieces of JSON, as GetRecords gives them, so that an answer is one join however many
records it has; sequence numbers, arrival times and running sizes lie beside them in sorted lists to be bisected.
A place in a shard is its *ordinal*: how many records were put before it, whether they are still kept or not.
"""

from __future__ import annotations

import binascii
import random
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec

from samza_kinesis_io.limits import (
    DEFAULT_MAX_RECORD_BYTES,
    MAX_BYTES_PER_GET,
    MAX_GET_RECORDS_PER_SECOND_PER_SHARD,
    MAX_HASH_KEY,
    MAX_READ_BYTES_PER_SECOND_PER_SHARD,
    MAX_WRITE_BYTES_PER_SECOND_PER_SHARD,
    MAX_WRITE_RECORDS_PER_SECOND_PER_SHARD,
)
from samza_kinesis_io.records import KinesisRecord
from samza_kinesis_io.shards import HashKeyRange
from samza_kinesis_io.testing.sequence_numbers import LAST_NUMBER, SequenceNumber

_encode_text = msgspec.json.Encoder().encode
_decode_records = msgspec.json.Decoder(list[KinesisRecord]).decode


def decode_records(pieces: Iterable[bytes]) -> list[KinesisRecord]:
    """Return the records that pieces of JSON are."""
    return _decode_records(b"[" + b",".join(pieces) + b"]")


class Budget:
    """How much of a rate is left: one second's worth at most."""

    __slots__ = ("_at", "_per_second", "left")

    def __init__(self, per_second: float) -> None:
        self._per_second = per_second
        self._at = 0.0
        self.left = per_second

    def refill(self, now: float) -> float:
        """Return what is left at `now`."""
        self.left = min(self._per_second, self.left + (now - self._at) * self._per_second)
        self._at = now
        return self.left


class FakeShard:
    """A shard. Everything here takes the time as an argument and is called under the service's lock."""

    def __init__(
        self,
        *,
        index: int,
        hash_key_range: HashKeyRange,
        parents: tuple[FakeShard, ...],
        opened_seconds: float,
        created_seconds: int,
    ) -> None:
        self.index = index
        self.shard_id = f"shardId-{index:012d}"
        self.hash_key_range = hash_key_range
        self.parents = tuple(parent.shard_id for parent in parents)
        self.children: tuple[FakeShard, ...] = ()
        self.opened_seconds = opened_seconds
        self.closed_seconds: float | None = None
        #: What its sequence numbers carry. May run ahead of `opened_seconds`: a child's is later than its parents'.
        self.created_seconds = created_seconds
        self.starting_sequence_number = SequenceNumber(created_seconds, index, 0, created_seconds).encode()
        self._number_base = SequenceNumber(created_seconds, index, 0, 0).encode()
        self.ending_sequence_number: int | None = None
        self.get_calls: deque[float] = deque(maxlen=MAX_GET_RECORDS_PER_SECOND_PER_SHARD)
        self.iterator_calls: deque[float] = deque(maxlen=MAX_GET_RECORDS_PER_SECOND_PER_SHARD)
        self._read_bytes = Budget(MAX_READ_BYTES_PER_SECOND_PER_SHARD)
        self._write_bytes = Budget(MAX_WRITE_BYTES_PER_SECOND_PER_SHARD)
        self._write_records = Budget(MAX_WRITE_RECORDS_PER_SECOND_PER_SHARD)
        self._forgotten = 0  # records no longer in the lists
        self._forgotten_bytes = 0
        self._first = 0  # the first kept one in the lists
        self._count = 0  # records ever put
        self._sequence_numbers: list[int] = []
        self._arrivals: list[float] = []
        self._ends: list[int] = []  # sum of the sizes of all records ever put, up to and with this one
        self._pieces: list[bytes] = []
        self._put_bytes = 0
        self._trimmed = False

    @property
    def is_open(self) -> bool:
        return self.closed_seconds is None

    def append(self, now: float, data: bytes, partition_key: str | None, size_bytes: int) -> str:
        """Put a record; return its sequence number."""
        # The arrival time is accurate to milliseconds. Time of one shard never goes back: the lists are bisected.
        arrival = round(now, 3)
        if self._arrivals and arrival < self._arrivals[-1]:
            arrival = self._arrivals[-1]
        self._count += 1
        # As SequenceNumber(...).encode(), without the object: this is the hot line of every put.
        number = self._number_base | self._count << 80 | int(arrival) << 36
        text = str(number)
        key = b"" if partition_key is None else b',"PartitionKey":' + _encode_text(partition_key)
        self._put_bytes += size_bytes
        self._sequence_numbers.append(number)
        self._arrivals.append(arrival)
        self._ends.append(self._put_bytes)
        self._pieces.append(
            b'{"SequenceNumber":"%s","ApproximateArrivalTimestamp":%.3f,"Data":"%s"%s}'
            % (text.encode(), arrival, binascii.b2a_base64(data, newline=False), key)
        )
        return text

    def close(self, now: float, children: tuple[FakeShard, ...]) -> None:
        self.closed_seconds = now
        self.children = children
        self.ending_sequence_number = SequenceNumber(
            self.created_seconds, self.index, LAST_NUMBER, max(int(now), self.created_seconds)
        ).encode()

    @property
    def end(self) -> int:
        """The ordinal behind the last record."""
        return self._forgotten + len(self._pieces)

    def horizon(self, oldest_seconds: float) -> int:
        """Drop what arrived before `oldest_seconds`; return the ordinal of the first record still kept."""
        if self._first < len(self._arrivals) and self._arrivals[self._first] < oldest_seconds:
            self._first = bisect_left(self._arrivals, oldest_seconds, self._first)
            self._forget()
        return self._forgotten + self._first

    def trim(self, before_seconds: float | None) -> None:
        """Drop what arrived before then (None: everything), and a closed shard with it if it was closed before then."""
        if before_seconds is None:
            self._first = len(self._arrivals)
            self._forget()
        else:
            self.horizon(before_seconds)
        if self.closed_seconds is not None and (before_seconds is None or self.closed_seconds < before_seconds):
            self._trimmed = True

    def is_gone(self, oldest_seconds: float) -> bool:
        """Whether it is closed and nothing of it can be kept any more."""
        return self._trimmed or (self.closed_seconds is not None and self.closed_seconds < oldest_seconds)

    def _forget(self) -> None:
        # Only when half of the lists is dead: dropping from the front of a list costs its whole length.
        if self._first * 2 > len(self._pieces):
            self._forgotten_bytes = self._ends[self._first - 1]
            for column in (self._sequence_numbers, self._arrivals, self._ends, self._pieces):
                del column[: self._first]
            self._forgotten += self._first
            self._first = 0

    def ordinal_of_sequence(self, sequence_number: int, *, after: bool) -> int:
        find = bisect_right if after else bisect_left
        return self._forgotten + find(self._sequence_numbers, sequence_number)

    def ordinal_of_time(self, seconds: float) -> int:
        """Return the ordinal of the first record that arrived at `seconds` or later."""
        return self._forgotten + bisect_left(self._arrivals, round(seconds, 3))

    def read(self, ordinal: int, limit: int) -> list[bytes]:
        """Return the records from `ordinal` on: at most `limit`, at most 10 MiB. No record is longer than that."""
        start = ordinal - self._forgotten
        before = self._ends[start - 1] if start else self._forgotten_bytes
        stop = bisect_right(self._ends, before + MAX_BYTES_PER_GET, start, min(start + limit, len(self._ends)))
        return self._pieces[start:stop]

    def size_of(self, start: int, stop: int) -> int:
        """Return the bytes of the records between two ordinals."""
        ends, first = self._ends, start - self._forgotten
        return (
            0
            if start == stop
            else ends[stop - self._forgotten - 1] - (ends[first - 1] if first else self._forgotten_bytes)
        )

    def arrival_of(self, ordinal: int) -> float:
        return self._arrivals[ordinal - self._forgotten]

    def kept(self, oldest_seconds: float) -> list[bytes]:
        self.horizon(oldest_seconds)
        return self._pieces[self._first :]

    def may_read(self, now: float) -> bool:
        """Whether the shard's read limits let a GetRecords through now; counts it if so."""
        if not _one_more_call(self.get_calls, now):
            return False
        if self._read_bytes.refill(now) < 0:
            return False
        self.get_calls.append(now)
        return True

    def was_read(self, size_bytes: int) -> None:
        """Take an answer's bytes from the read budget: 10 MiB close the shard for five seconds."""
        if size_bytes >= MAX_READ_BYTES_PER_SECOND_PER_SHARD:
            self._read_bytes.left = -size_bytes
        else:
            self._read_bytes.left -= size_bytes

    def may_give_iterator(self, now: float) -> bool:
        if not _one_more_call(self.iterator_calls, now):
            return False
        self.iterator_calls.append(now)
        return True

    def may_write(self, now: float, size_bytes: int) -> bool:
        """Whether the shard's write limits let a record through now; counts it if so.

        A record larger than a second's worth passes when the budget is full.
        """
        if self._write_records.refill(now) < 1:
            return False
        if self._write_bytes.refill(now) < min(size_bytes, MAX_WRITE_BYTES_PER_SECOND_PER_SHARD):
            return False
        self._write_records.left -= 1
        self._write_bytes.left -= size_bytes
        return True


def _one_more_call(calls: deque[float], now: float) -> bool:
    # A microsecond of grace: seconds since the epoch are no exact floats.
    return len(calls) < MAX_GET_RECORDS_PER_SECOND_PER_SHARD or now - calls[0] >= 1.0 - 1e-6


@dataclass(slots=True)
class Transition:
    """What a stream is on the way to: at `due_seconds` it becomes ACTIVE, after `apply` (given that time)."""

    due_seconds: float
    apply: Callable[[float], object]


class FakeStream:
    """A stream and the lineage of its shards."""

    def __init__(
        self,
        *,
        name: str,
        arn: str,
        generation: int,
        created_seconds: float,
        sequence_epoch_seconds: int,
        retention_hours: int,
        on_demand: bool,
        auto_distribution: bool,
        max_record_bytes: int = DEFAULT_MAX_RECORD_BYTES,
    ) -> None:
        self.name = name
        self.arn = arn
        self.generation = generation
        self.created_seconds = created_seconds
        self.retention_hours = retention_hours
        self.on_demand = on_demand
        self.auto_distribution = auto_distribution
        self.max_record_bytes = max_record_bytes
        self.status = "CREATING"
        self.transition: Transition | None = None
        #: The latest creation time that a sequence number of this stream carries.
        self.last_created_seconds = sequence_epoch_seconds
        self._shards: dict[str, FakeShard] = {}
        self._next_index = 0
        # Arrival times are whole milliseconds and may be rounded to before the creation.
        self._oldest_seconds = created_seconds - 0.001
        self._open: list[FakeShard] = []
        self._open_starts: list[int] = []

    @property
    def open_shards(self) -> list[FakeShard]:
        """The open shards, by hash key range."""
        return self._open

    def oldest_seconds(self, now: float) -> float:
        """Return the trim horizon: when the oldest record that may still be read arrived. It never goes back."""
        self._oldest_seconds = max(self._oldest_seconds, now - self.retention_hours * 3600)
        return self._oldest_seconds

    def trim(self, before_seconds: float) -> None:
        self._oldest_seconds = max(self._oldest_seconds, before_seconds)

    def shards(self, now: float) -> list[FakeShard]:
        """Return the shards that still exist, in the order of their creation."""
        oldest = self.oldest_seconds(now)
        gone = [shard_id for shard_id, shard in self._shards.items() if shard.is_gone(oldest)]
        for shard_id in gone:
            del self._shards[shard_id]
        return list(self._shards.values())

    def find(self, shard_id: str, now: float) -> FakeShard | None:
        shard = self._shards.get(shard_id)
        return None if shard is None or shard.is_gone(self.oldest_seconds(now)) else shard

    def route(self, hash_key: int) -> FakeShard:
        return self._open[bisect_right(self._open_starts, hash_key) - 1]

    def any_open(self, rng: random.Random) -> FakeShard:
        return rng.choice(self._open)

    def open_initial(self, count: int, now: float) -> None:
        """Open `count` shards that divide the hash space evenly."""
        for low, high in _even_ranges(count):
            self._open_shard(HashKeyRange(low, high), (), now)
        # Nothing can be older than the first shards, though the stream was being created before.
        self.trim(round(now, 3))
        self._route()

    def split(self, shard: FakeShard, at: int, now: float) -> tuple[FakeShard, FakeShard]:
        """Close `shard`; the upper child begins at hash key `at`."""
        whole = shard.hash_key_range
        lower = self._open_shard(HashKeyRange(whole.start, at - 1), (shard,), now)
        upper = self._open_shard(HashKeyRange(at, whole.end), (shard,), now)
        shard.close(now, (lower, upper))
        self._route()
        return lower, upper

    def merge(self, shard: FakeShard, adjacent: FakeShard, now: float) -> FakeShard:
        a, b = shard.hash_key_range, adjacent.hash_key_range
        child = self._open_shard(HashKeyRange(min(a.start, b.start), max(a.end, b.end)), (shard, adjacent), now)
        shard.close(now, (child,))
        adjacent.close(now, (child,))
        self._route()
        return child

    def scale(self, count: int, now: float) -> None:
        """Reshard to `count` even shards as UpdateShardCount does: splits first, then merges of the pieces.

        Where the counts do not divide each other, shards between the two live for no time at all: opened and closed.
        """
        targets = _even_ranges(count)
        for low, _ in targets:
            shard = self.route(low)
            if shard.hash_key_range.start != low:
                self.split(shard, low, now)
        for low, high in targets:
            shard = self.route(low)
            while shard.hash_key_range.end < high:
                shard = self.merge(shard, self.route(shard.hash_key_range.end + 1), now)

    def _open_shard(self, hash_key_range: HashKeyRange, parents: tuple[FakeShard, ...], now: float) -> FakeShard:
        # Roots share their creation time; a child's lies a second behind its parents', as its numbers must be higher.
        created = max(
            [self.last_created_seconds if not parents else int(now), *(p.created_seconds + 1 for p in parents)]
        )
        shard = FakeShard(
            index=self._next_index,
            hash_key_range=hash_key_range,
            parents=parents,
            opened_seconds=now,
            created_seconds=created,
        )
        self._next_index += 1
        self.last_created_seconds = max(self.last_created_seconds, created)
        self._shards[shard.shard_id] = shard
        return shard

    def _route(self) -> None:
        self._open = sorted((s for s in self._shards.values() if s.is_open), key=lambda s: s.hash_key_range.start)
        self._open_starts = [s.hash_key_range.start for s in self._open]


def _even_ranges(count: int) -> list[tuple[int, int]]:
    size = (MAX_HASH_KEY + 1) // count
    starts = [i * size for i in range(count)]
    return list(zip(starts, [s - 1 for s in starts[1:]] + [MAX_HASH_KEY], strict=True))
