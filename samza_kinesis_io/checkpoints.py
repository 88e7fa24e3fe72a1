"""Checkpoints that outlive the job: where each shard was read to, kept outside of the runner.

A runner's own checkpoint goes on where it stood; these are for what it cannot do: a new job (another version, another
runner) that goes on where the old one stopped, and the way from and to the KCL. Three places to keep them: memory,
a directory, and DynamoDB in the layout of the KCL's lease table.

Two rules:

1. A position never goes back: `save` keeps what is there where it is newer. The order is the KCL's: starts, then
   sequence numbers, then the shard's end.
2. A shard is done only where a row says so. Everything else is read again: duplicates are cheaper than a loss.
"""

from __future__ import annotations

import contextlib
import enum
import json
import os
import struct
import threading
import urllib.parse
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from samza_kinesis_io.clock import Clock, SystemClock
from samza_kinesis_io.dynamodb import DynamoDBConfig, Item, LeaseTable, StateTable
from samza_kinesis_io.errors import CheckpointError, ConfigurationError
from samza_kinesis_io.positions import Position, PositionKind, StartingPosition
from samza_kinesis_io.shards import HashKeyRange, Shard, age_key, uncovered


@dataclass(frozen=True, slots=True)
class ShardCheckpoint:
    """Where one shard was read to: a row.

    Attributes:
        position: Where reading goes on. None: behind the shard's end, if `ended`; else a place that only the
            application that wrote the row knows (the KCL's LATEST and AT_TIMESTAMP): the source's start is taken.
        ended: All of its records were read and its children are known.
        parents, children: Shard ids, as far as they are known.
        hash_key_range: None where a row does not say.
    """

    shard_id: str
    position: Position | None
    ended: bool = False
    parents: tuple[str, ...] = ()
    children: tuple[str, ...] = ()
    hash_key_range: HashKeyRange | None = None

    def __post_init__(self) -> None:
        if self.ended and self.position is not None:
            raise ValueError(f"a checkpoint behind the end of {self.shard_id} has no position, got {self.position}")

    def is_newer_than(self, other: ShardCheckpoint) -> bool:
        return self._order() > other._order()

    def _order(self) -> tuple[int, int, int, int]:
        if self.ended:
            return (3, 0, 0, 0)
        if self.position is None:
            return (0, 0, 0, 0)  # older than a start of ours, which is pinned
        if not self.position.is_sequence:
            return (1, 0, 0, 0)
        behind = self.position.kind is PositionKind.AFTER_SEQUENCE_NUMBER
        return (2, self.position.sequence_number, self.position.sub_sequence_number, int(behind))


@dataclass(frozen=True, slots=True)
class SaveReport:
    """What became of the rows given to `save`.

    Attributes:
        written: How many were written.
        kept: How many were not newer than what is there.
        deferred: Shards whose rows a KCL worker owns of which it is not known yet whether it lives; save them again.
    """

    written: int = 0
    kept: int = 0
    deferred: tuple[str, ...] = ()


class CheckpointStore(Protocol):
    """Where checkpoints are kept. Can be pickled; safe to use from many threads and processes at once."""

    def load(self, stream: str) -> dict[str, ShardCheckpoint]:
        """Return the rows of a stream by shard id; empty if there are none.

        Raises:
            CheckpointError: they can't be read.
        """
        ...

    def save(self, stream: str, checkpoints: Iterable[ShardCheckpoint]) -> SaveReport:
        """Write rows, each where it is newer than what is there; ends of shards last, after their children's rows.

        When it returns the rows are durable.

        Raises:
            CheckpointError: they can't be written, or a live KCL application owns them.
        """
        ...

    def load_state(self, task: str, store: str) -> dict[bytes, bytes]:
        """Return the contents of a task's key-value store."""
        ...

    def save_state(self, task: str, store: str, changes: Mapping[bytes, bytes | None]) -> None:
        """Write changes of a task's key-value store; None deletes. Durable when it returns."""
        ...


# --- Going on -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ResumePlan:
    """How the listed shards of a stream go on.

    Attributes:
        positions: Where each listed shard starts that is not done; also one that must wait for its parents first.
        done: The listed shards of which nothing is left to read.
        child_position: Where a shard starts that is not listed yet.
    """

    positions: Mapping[str, Position]
    done: frozenset[str]
    child_position: Position


def resume(listed: Sequence[Shard], rows: Mapping[str, ShardCheckpoint], start: StartingPosition) -> ResumePlan:
    """Return where each listed shard starts, from a stream's rows and the source's (pinned) start.

    - A row with a position: there. A row behind the shard's end: done. A row of an unknown place: at `start`.
    - No row, but younger shards that were read hold all of its hash keys, and no ancestor is left to read: done. (The
      KCL deletes the rows of finished parents. A younger shard that only waits proves nothing: the child of a merge
      has its row as soon as one of its parents ended.)
    - No row, but an ancestor has one: at its beginning. Never at `start`, which for LATEST is the moment this job
      was built: what the shard took between the two jobs would be lost.
    - Nothing of this: at `start`.
    """
    ranges: dict[str, HashKeyRange] = {s.shard_id: s.hash_key_range for s in listed}
    ranges.update({r.shard_id: r.hash_key_range for r in rows.values() if r.hash_key_range is not None})
    parents: dict[str, tuple[str, ...]] = {r.shard_id: r.parents for r in rows.values()}
    parents.update({s.shard_id: s.parents for s in listed})
    named = start.named_positions()
    positions: dict[str, Position] = {}
    done: set[str] = set()
    for shard in listed:
        row = rows.get(shard.shard_id)
        if row is not None:
            if row.ended:
                done.add(shard.shard_id)
            else:
                positions[shard.shard_id] = row.position if row.position is not None else start.position()
            continue
        age = age_key(shard.shard_id)
        younger = [ranges[r] for r in rows if r in ranges and age_key(r) > age and _was_read(rows[r])]
        ancestors = [r for r in rows if _is_ancestor(r, shard, ranges, parents)]
        if younger and not uncovered(shard.hash_key_range, younger) and all(rows[a].ended for a in ancestors):
            done.add(shard.shard_id)
            continue
        if not ancestors and shard.shard_id in named:
            positions[shard.shard_id] = named[shard.shard_id]
        else:
            positions[shard.shard_id] = _beginning(ancestors, rows, start)
    return ResumePlan(positions, frozenset(done), _beginning(list(rows), rows, start))


def _was_read(row: ShardCheckpoint) -> bool:
    return row.ended or (row.position is not None and row.position.is_sequence)


def _is_ancestor(
    candidate: str, shard: Shard, ranges: Mapping[str, HashKeyRange], parents: Mapping[str, tuple[str, ...]]
) -> bool:
    """Of two shards whose ranges overlap the older is the ancestor; of a row without a range, who the parents are."""
    if candidate in ranges:
        return age_key(candidate) < age_key(shard.shard_id) and ranges[candidate].overlaps(shard.hash_key_range)
    seen: set[str] = set()
    ahead = list(shard.parents)
    while ahead:
        parent = ahead.pop()
        if parent == candidate:
            return True
        if parent not in seen:
            seen.add(parent)
            ahead.extend(parents.get(parent, ()))
    return False


def _beginning(ancestors: Sequence[str], rows: Mapping[str, ShardCheckpoint], start: StartingPosition) -> Position:
    """Return the beginning of a shard with these ancestors.

    That is TRIM_HORIZON; but the old job's pinned start if no ancestor was read yet: the shard may be older than it.
    """
    if not ancestors:
        return start.position()
    starts: list[Position] = []
    for ancestor in ancestors:
        position = rows[ancestor].position
        if position is None or position.kind is not PositionKind.AT_TIMESTAMP:
            return Position.trim_horizon()
        starts.append(position)
    return min(starts, key=lambda p: p.timestamp_micros)


# --- In memory ------------------------------------------------------------------------------------------------------


class _Memory:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.rows: dict[str, dict[str, ShardCheckpoint]] = {}
        self.state: dict[tuple[str, str], dict[bytes, bytes]] = {}


_memories: Final[dict[str, _Memory]] = {}
_memories_lock: Final = threading.Lock()


@dataclass(frozen=True, slots=True)
class MemoryCheckpointStore:
    """Checkpoints that live as long as the process. Stores of one name are one store, pickled copies included."""

    name: str = "default"

    def _memory(self) -> _Memory:
        with _memories_lock:
            return _memories.setdefault(self.name, _Memory())

    def load(self, stream: str) -> dict[str, ShardCheckpoint]:
        memory = self._memory()
        with memory.lock:
            return dict(memory.rows.get(stream, {}))

    def save(self, stream: str, checkpoints: Iterable[ShardCheckpoint]) -> SaveReport:
        memory = self._memory()
        with memory.lock:
            return _merge(memory.rows.setdefault(stream, {}), checkpoints)

    def load_state(self, task: str, store: str) -> dict[bytes, bytes]:
        memory = self._memory()
        with memory.lock:
            return dict(memory.state.get((task, store), {}))

    def save_state(self, task: str, store: str, changes: Mapping[bytes, bytes | None]) -> None:
        memory = self._memory()
        with memory.lock:
            _apply(memory.state.setdefault((task, store), {}), changes)


def _merge(rows: dict[str, ShardCheckpoint], checkpoints: Iterable[ShardCheckpoint]) -> SaveReport:
    written = kept = 0
    for new in checkpoints:
        old = rows.get(new.shard_id)
        if old is None or new.is_newer_than(old):
            rows[new.shard_id] = new if old is None else _joined(old, new)
            written += 1
        else:
            kept += 1
    return SaveReport(written, kept)


def _joined(old: ShardCheckpoint, new: ShardCheckpoint) -> ShardCheckpoint:
    """Return the new row with what only the old one knew of the shard."""
    return ShardCheckpoint(
        new.shard_id,
        new.position,
        new.ended,
        new.parents or old.parents,
        new.children or old.children,
        new.hash_key_range or old.hash_key_range,
    )


def _apply(contents: dict[bytes, bytes], changes: Mapping[bytes, bytes | None]) -> None:
    for key, value in changes.items():
        if value is None:
            contents.pop(key, None)
        else:
            contents[key] = value


# --- In a directory -------------------------------------------------------------------------------------------------

_FILE_VERSION: Final = 1
#: A changelog is rewritten when it is larger than this and than four times its contents.
_COMPACT_BYTES: Final = 1024 * 1024
_FRAME: Final = struct.Struct(">II")  # CRC-32 of the payload, its length
_CHANGE: Final = struct.Struct(">II")  # length of the key, length of the value
_DELETED: Final = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class _Log:
    """What this process knows of a changelog: as long as it has this size, all of it is whole batches."""

    size_bytes: int
    compact_at_bytes: int


_logs: Final[dict[Path, _Log]] = {}


@dataclass(frozen=True, slots=True)
class FileCheckpointStore:
    """Checkpoints in a directory of a file system that all workers share, and that has locks and atomic renames.

    One JSON file per stream (`<stream>.json`), replaced as a whole by a rename after its contents are on the disk: a
    process killed at any byte leaves the old file or the new one. One changelog per task and store
    (`state/<task>/<store>.log`): batches with a checksum, appended; a batch that was not finished does not count.
    """

    directory: str

    def __post_init__(self) -> None:
        if not self.directory:
            raise ConfigurationError("FileCheckpointStore needs a directory, got ''; set task.checkpoint.path")

    def load(self, stream: str) -> dict[str, ShardCheckpoint]:
        path = self._stream_path(stream)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise CheckpointError(f"the checkpoint file {path} can't be read: {error}") from error
        try:
            document = json.loads(text)
            if document["version"] != _FILE_VERSION:
                raise CheckpointError(f"{path} has version {document['version']!r}; it was written by a newer release")
            return {shard_id: _from_json(shard_id, fields) for shard_id, fields in document["shards"].items()}
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is no checkpoint file: {error!r}; move it away to start anew") from error

    def save(self, stream: str, checkpoints: Iterable[ShardCheckpoint]) -> SaveReport:
        path = self._stream_path(stream)
        try:
            with self._locked():
                rows = self.load(stream)
                report = _merge(rows, checkpoints)
                if report.written:
                    document = {
                        "version": _FILE_VERSION,
                        "stream": stream,
                        "shards": {shard_id: _to_json(rows[shard_id]) for shard_id in sorted(rows, key=age_key)},
                    }
                    _replace(path, json.dumps(document, indent=1).encode())
        except OSError as error:
            raise CheckpointError(f"the checkpoint file {path} can't be written: {error}") from error
        return report

    def load_state(self, task: str, store: str) -> dict[bytes, bytes]:
        path = self._state_path(task, store)
        try:
            return _replay(path.read_bytes())[0]
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise CheckpointError(f"the changelog {path} can't be read: {error}") from error

    def save_state(self, task: str, store: str, changes: Mapping[bytes, bytes | None]) -> None:
        if not changes:
            return
        path = self._state_path(task, store)
        try:
            with self._locked():
                path.parent.mkdir(parents=True, exist_ok=True)
                existed = path.exists()
                with open(path, "r+b" if existed else "w+b") as file:
                    size = file.seek(0, os.SEEK_END)
                    known = _logs.get(path)
                    if known is None or known.size_bytes != size or size > known.compact_at_bytes:
                        file.seek(0)
                        contents, good_bytes = _replay(file.read())
                        live_bytes = sum(len(k) + len(v) for k, v in contents.items())
                        known = _Log(good_bytes, max(_COMPACT_BYTES, 4 * live_bytes))
                        if good_bytes > known.compact_at_bytes:
                            _apply(contents, changes)
                            _replace(path, _framed(contents))
                            _logs.pop(path, None)
                            return
                        # What a killed process began behind the last whole batch must not stay before the next one.
                        file.truncate(good_bytes)
                    file.seek(known.size_bytes)
                    file.write(_framed(changes))
                    file.flush()
                    os.fsync(file.fileno())
                    _logs[path] = _Log(file.tell(), known.compact_at_bytes)
                if not existed:
                    _sync_directory(path.parent)
        except OSError as error:
            raise CheckpointError(f"the changelog {path} can't be written: {error}") from error

    def _stream_path(self, stream: str) -> Path:
        return Path(self.directory) / f"{urllib.parse.quote(stream, safe='')}.json"

    def _state_path(self, task: str, store: str) -> Path:
        quoted = urllib.parse.quote(task, safe="")
        return Path(self.directory) / "state" / quoted / f"{urllib.parse.quote(store, safe='')}.log"

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the directory's lock, against threads and processes. The system frees it when its holder dies."""
        try:
            import fcntl
        except ImportError as error:
            raise ConfigurationError(
                "FileCheckpointStore needs POSIX file locks; use DynamoDBCheckpointStore"
            ) from error
        Path(self.directory).mkdir(parents=True, exist_ok=True)
        with open(Path(self.directory) / ".lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _replace(path: Path, data: bytes) -> None:
    """Put `data` in the place of the file, all of it or nothing, and durably."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    """Make a new name in a directory durable: fsync of the file itself does not."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _framed(changes: Mapping[bytes, bytes] | Mapping[bytes, bytes | None]) -> bytes:
    parts: list[bytes] = []
    for key, value in changes.items():
        parts += (_CHANGE.pack(len(key), _DELETED if value is None else len(value)), key, value or b"")
    payload = b"".join(parts)
    return _FRAME.pack(zlib.crc32(payload), len(payload)) + payload


def _replay(log: bytes) -> tuple[dict[bytes, bytes], int]:
    """Return what a changelog holds, and how many of its bytes are whole batches."""
    contents: dict[bytes, bytes] = {}
    at = 0
    while at + _FRAME.size <= len(log):
        checksum, length = _FRAME.unpack_from(log, at)
        payload = log[at + _FRAME.size : at + _FRAME.size + length]
        if len(payload) < length or zlib.crc32(payload) != checksum or not length:
            break
        i = 0
        while i < length:
            key_length, value_length = _CHANGE.unpack_from(payload, i)
            i += _CHANGE.size
            key = payload[i : i + key_length]
            i += key_length
            if value_length == _DELETED:
                contents.pop(key, None)
            else:
                contents[key] = payload[i : i + value_length]
                i += value_length
        at += _FRAME.size + length
    return contents, at


def _to_json(row: ShardCheckpoint) -> dict[str, Any]:
    fields: dict[str, Any] = {"ended": row.ended}
    if row.position is not None:
        fields["position"] = row.position.kind.value
        if row.position.is_sequence:
            fields["sequence_number"] = str(row.position.sequence_number)
            fields["sub_sequence_number"] = row.position.sub_sequence_number
        if row.position.kind is PositionKind.AT_TIMESTAMP:
            fields["timestamp_micros"] = row.position.timestamp_micros
    if row.parents:
        fields["parents"] = list(row.parents)
    if row.children:
        fields["children"] = list(row.children)
    if row.hash_key_range is not None:
        fields["hash_key_range"] = [str(row.hash_key_range.start), str(row.hash_key_range.end)]
    return fields


def _from_json(shard_id: str, fields: Mapping[str, Any]) -> ShardCheckpoint:
    position = None
    if "position" in fields:
        position = Position(
            PositionKind(fields["position"]),
            int(fields.get("sequence_number", 0)),
            int(fields.get("sub_sequence_number", 0)),
            int(fields.get("timestamp_micros", 0)),
        )
    keys = fields.get("hash_key_range")
    return ShardCheckpoint(
        shard_id,
        position,
        bool(fields["ended"]),
        tuple(fields.get("parents", ())),
        tuple(fields.get("children", ())),
        HashKeyRange(int(keys[0]), int(keys[1])) if keys else None,
    )


# --- In DynamoDB, as the KCL does -----------------------------------------------------------------------------------

#: Ours, beside the KCL's attributes: the pinned start of a shard of which nothing was read. The KCL ignores it.
_PINNED_START: Final = "samzaStartTimestampMicros"
_PENDING: Final = ("pendingCheckpoint", "pendingCheckpointSubSequenceNumber", "pendingCheckpointState")


def lease_item(row: ShardCheckpoint, stream_identifier: str | None = None) -> Item:
    """Return a new row of a KCL lease table, owned by nobody.

    The checkpoint is the last record *processed*; a start is TRIM_HORIZON, also a pinned one: a KCL that takes the
    table over has no timestamp for AT_TIMESTAMP and would fail, and reading more than was asked for loses nothing.

    Args:
        row: The checkpoint.
        stream_identifier: `account:stream:epoch` in a table of several streams.
    """
    shard_id = row.shard_id
    item: Item = {
        "leaseKey": {"S": f"{stream_identifier}:{shard_id}" if stream_identifier else shard_id},
        "leaseCounter": {"N": "0"},
        "ownerSwitchesSinceCheckpoint": {"N": "0"},
        **_checkpoint_attributes(row),
    }
    if row.parents:  # DynamoDB has no empty sets
        item["parentShardId"] = {"SS": sorted(row.parents)}
    if row.hash_key_range is not None:
        item["startingHashKey"] = {"S": str(row.hash_key_range.start)}
        item["endingHashKey"] = {"S": str(row.hash_key_range.end)}
    if stream_identifier:
        item["streamName"] = {"S": stream_identifier}
        item["shardId"] = {"S": shard_id}
    return item


def _checkpoint_attributes(row: ShardCheckpoint) -> Item:
    checkpoint, sub = "TRIM_HORIZON", 0
    position = row.position
    if row.ended:
        checkpoint = "SHARD_END"
    elif position is not None and position.is_sequence:
        if position.kind is PositionKind.AFTER_SEQUENCE_NUMBER:
            checkpoint, sub = str(position.sequence_number), position.sub_sequence_number
        elif position.sub_sequence_number > 0:
            checkpoint, sub = str(position.sequence_number), position.sub_sequence_number - 1
        # Before a whole record there is no row for it: TRIM_HORIZON, until the record is read.
    item: Item = {"checkpoint": {"S": checkpoint}, "checkpointSubSequenceNumber": {"N": str(sub)}}
    if position is not None and position.kind is PositionKind.AT_TIMESTAMP:
        item[_PINNED_START] = {"N": str(position.timestamp_micros)}
    if row.children:
        item["childShardIds"] = {"SS": sorted(row.children)}
    return item


def from_lease_item(item: Item) -> ShardCheckpoint | None:
    """Return the checkpoint of a lease table's row; None for a row of another kind (KCL 3.5 keeps them there too).

    Raises:
        CheckpointError: a lease without a checkpoint, or with one that is no number.
    """
    if item.get("entityType", {}).get("S", "LEASE") != "LEASE":
        return None
    key = item.get("leaseKey", {}).get("S", "")
    if "checkpoint" not in item:
        if "leaseCounter" in item:
            raise CheckpointError(f"the lease {key} has no checkpoint; is this a KCL lease table?")
        return None
    shard_id = item.get("shardId", {}).get("S") or key.rpartition(":")[2]
    checkpoint = item["checkpoint"]["S"]
    position: Position | None
    if checkpoint in ("SHARD_END", "LATEST", "AT_TIMESTAMP"):
        position = None
    elif checkpoint == "TRIM_HORIZON":
        pinned = item.get(_PINNED_START)
        position = (
            Position(PositionKind.AT_TIMESTAMP, timestamp_micros=int(pinned["N"]))
            if pinned
            else Position.trim_horizon()
        )
    elif checkpoint.isascii() and checkpoint.isdigit():
        position = Position.after(int(checkpoint), int(item.get("checkpointSubSequenceNumber", {}).get("N", "0")))
    else:
        raise CheckpointError(f"the lease {key} has the checkpoint {checkpoint!r}, which is no sequence number")
    keys = (item.get("startingHashKey", {}).get("S"), item.get("endingHashKey", {}).get("S"))
    return ShardCheckpoint(
        shard_id,
        position,
        checkpoint == "SHARD_END",
        tuple(sorted(item.get("parentShardId", {}).get("SS", ()))),
        tuple(sorted(item.get("childShardIds", {}).get("SS", ()))),
        HashKeyRange(int(keys[0]), int(keys[1])) if keys[0] and keys[1] else None,
    )


class Ownership(enum.Enum):
    """Whether a KCL worker holds a lease."""

    FREE = "FREE"
    UNKNOWN = "UNKNOWN"
    LIVE = "LIVE"
    DEAD = "DEAD"


class LeaseWatch:
    """Judges, as KCL workers do, whether a lease's owner lives: it does if the counter moved since it was first seen.

    The table holds no times, so a dead owner is known only after watching its lease for the fail-over time.
    """

    def __init__(self, failover_seconds: float) -> None:
        self._failover_seconds = failover_seconds
        self._seen: dict[str, tuple[str, str, float]] = {}

    def see(self, item: Item, now_seconds: float) -> Ownership:
        owner = item.get("leaseOwner", {}).get("S") or item.get("checkpointOwner", {}).get("S")
        key = item["leaseKey"]["S"]
        if not owner:
            self._seen.pop(key, None)
            return Ownership.FREE
        counter = item.get("leaseCounter", {}).get("N", "0")
        first = self._seen.setdefault(key, (owner, counter, now_seconds))
        if first[:2] != (owner, counter):
            return Ownership.LIVE
        return Ownership.DEAD if now_seconds - first[2] >= self._failover_seconds else Ownership.UNKNOWN


class DynamoDBCheckpointStore:
    """Checkpoints in a DynamoDB table laid out as the KCL's lease table.

    A KCL application's table can be where a job starts, and a KCL application can go on from a table written here; not
    both at once: rows that a live KCL worker owns are refused. The table is made if it is missing.

    Args:
        table: Its name; "{stream}" in it stands for the stream's name. A table holds one stream, unless
            `stream_identifiers` says otherwise.
        config: Where DynamoDB is.
        stream_identifiers: For a table of several streams (the KCL's multi-stream mode): per stream its identifier
            `account:stream:creationEpoch`, as the application has it.
        failover_seconds: The KCL application's failoverTimeMillis: how long a lease must stand still until its
            owner counts as dead.
    """

    def __init__(
        self,
        table: str,
        *,
        config: DynamoDBConfig | None = None,
        stream_identifiers: Mapping[str, str] | None = None,
        failover_seconds: float = 10.0,
        clock: Clock | None = None,
    ) -> None:
        if not table:
            raise ConfigurationError("DynamoDBCheckpointStore needs a table's name, got ''; set aws.kcl.TableName")
        if not failover_seconds > 0:
            raise ConfigurationError(f"failover_seconds must be > 0, got {failover_seconds}")
        for stream, identifier in (stream_identifiers or {}).items():
            if identifier.count(":") != 2:
                raise ConfigurationError(
                    f"stream_identifiers[{stream!r}] must be account:stream:creationEpoch, got {identifier!r}"
                )
        self._table = table
        self._config = config or DynamoDBConfig()
        self._stream_identifiers = dict(stream_identifiers or {})
        self._failover_seconds = failover_seconds
        self._clock: Clock = clock or SystemClock()
        self._open()

    def _open(self) -> None:
        self._lock = threading.RLock()
        self._tables: dict[str, LeaseTable] = {}
        self._state: StateTable | None = None
        self._streams: dict[str, str] = {}
        self._items: dict[str, dict[str, Item]] = {}
        self._watch = LeaseWatch(self._failover_seconds)

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: self.__dict__[name]
            for name in ("_table", "_config", "_stream_identifiers", "_failover_seconds", "_clock")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def load(self, stream: str) -> dict[str, ShardCheckpoint]:
        with self._lock:
            table_name, identifier = self._place(stream)
            now = self._clock.monotonic_seconds()
            items: dict[str, Item] = {}
            rows: dict[str, ShardCheckpoint] = {}
            for item in self._lease_table(table_name).scan():
                row = from_lease_item(item)
                key = item.get("leaseKey", {}).get("S", "")
                if row is None or (identifier is not None) != (":" in key):
                    continue
                if identifier is not None and not key.startswith(f"{identifier}:"):
                    continue
                self._watch.see(item, now)
                items[row.shard_id] = item
                rows[row.shard_id] = row
            self._items[stream] = items
            return rows

    def save(self, stream: str, checkpoints: Iterable[ShardCheckpoint]) -> SaveReport:
        with self._lock:
            table_name, identifier = self._place(stream)
            table = self._lease_table(table_name)
            items = self._items.setdefault(stream, {})
            written = kept = 0
            deferred: list[str] = []
            for row in sorted(checkpoints, key=lambda r: (r.ended, age_key(r.shard_id))):
                outcome = self._save_row(table, items, row, identifier)
                written += outcome is _Outcome.WRITTEN
                kept += outcome is _Outcome.KEPT
                if outcome is _Outcome.DEFERRED:
                    deferred.append(row.shard_id)
            return SaveReport(written, kept, tuple(deferred))

    def _save_row(
        self, table: LeaseTable, items: dict[str, Item], row: ShardCheckpoint, identifier: str | None
    ) -> _Outcome:
        fresh = lease_item(row, identifier)
        key = fresh["leaseKey"]["S"]
        for _ in range(20):
            item = items.get(row.shard_id)
            if item is None:
                if table.put_if_absent(fresh):
                    items[row.shard_id] = fresh
                    return _Outcome.WRITTEN
                found = table.get(key)
                if found is None:
                    continue
                items[row.shard_id] = item = found
            old = from_lease_item(item)
            if old is not None and not row.is_newer_than(old):
                return _Outcome.KEPT
            owner = self._watch.see(item, self._clock.monotonic_seconds())
            if owner is Ownership.LIVE:
                name = item.get("leaseOwner", item.get("checkpointOwner", {})).get("S")
                raise CheckpointError(
                    f"the lease {key} belongs to the live KCL worker {name}; stop that application, or give this job "
                    "a table of its own"
                )
            if owner is Ownership.UNKNOWN:
                # Look again the next time; an unchanged counter is the evidence that its owner is dead.
                again = table.get(key)
                if again is None or again.get("leaseCounter") == item.get("leaseCounter"):
                    return _Outcome.DEFERRED
                items[row.shard_id] = again
                continue
            counter = int(item.get("leaseCounter", {}).get("N", "0"))
            values: Item = {
                **_checkpoint_attributes(row),
                "leaseCounter": {"N": str(counter + 1)},
                "ownerSwitchesSinceCheckpoint": {"N": "0"},
            }
            expected = {name: item.get(name) for name in ("leaseCounter", "leaseOwner", "checkpointOwner")}
            remove = [*_PENDING, "leaseOwner", "checkpointOwner", *({_PINNED_START} - values.keys())]
            if table.update(key, values, remove, expected):
                items[row.shard_id] = {**{k: v for k, v in item.items() if k not in remove}, **values}
                return _Outcome.WRITTEN
            found = table.get(key)
            if found is None:
                del items[row.shard_id]
            else:
                items[row.shard_id] = found
        raise CheckpointError(f"the lease {key} is written by others all the time; who else uses this table?")

    def load_state(self, task: str, store: str) -> dict[bytes, bytes]:
        with self._lock:
            return self._state_table().query(f"{task}/{store}")

    def save_state(self, task: str, store: str, changes: Mapping[bytes, bytes | None]) -> None:
        if changes:
            with self._lock:
                self._state_table().write(f"{task}/{store}", changes)

    def _place(self, stream: str) -> tuple[str, str | None]:
        table = self._table.replace("{stream}", stream)
        identifier = self._stream_identifiers.get(stream)
        if identifier is None:
            other = self._streams.setdefault(table, stream)
            if other != stream:
                raise ConfigurationError(
                    f"the table {table} holds the stream {other} and can't hold {stream} too; write {{stream}} into "
                    "the table's name, or give stream_identifiers"
                )
        return table, identifier

    def _lease_table(self, name: str) -> LeaseTable:
        if name not in self._tables:
            self._tables[name] = self._config.lease_table(name)
        return self._tables[name]

    def _state_table(self) -> StateTable:
        if self._state is None:
            self._state = self._config.state_table(self._table.replace("{stream}", "").rstrip("-_.") + "-state")
        return self._state


class _Outcome(enum.Enum):
    WRITTEN = "WRITTEN"
    KEPT = "KEPT"
    DEFERRED = "DEFERRED"
