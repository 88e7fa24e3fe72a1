"""Key-value stores of tasks: in memory, with a changelog in a `CheckpointStore`.

The changelog is written at the end of each bundle, when it is not known yet whether the bundle's output will get
through and its position be kept. So every entry carries its last two values, and the newer one the `StateTag` of its
bundle; whoever restores says where it stands, and takes the newer value only if that bundle counts. Thus state is never
behind the position, and what it is ahead by has its output delivered (where the sink is in the same stage).

What survives what: with a changelog, everything committed survives restarts, failures and the move to another worker;
a runner that goes back by more than a bundle (Flink, to its last checkpoint) finds state that is ahead of the position,
as Samza does without transactional restore. Without a changelog a store lives as long as the task's instance: after a
failed bundle, after a restart and on another worker it begins empty.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from samza_kinesis_io.checkpoints import CheckpointStore
from samza_kinesis_io.errors import CheckpointError, ConfigurationError, KinesisIOError
from samza_kinesis_io.positions import Position
from samza_kinesis_io.serdes import Serde

#: All keys and values of one store together. It is held in memory, in every worker that runs the task.
MAX_STORE_BYTES: Final = 64 * 1024 * 1024
#: One key with its value. DynamoDB: "The maximum item size in DynamoDB is 400 KB", and an item holds two values.
MAX_ENTRY_BYTES: Final = 190 * 1024


@dataclass(frozen=True, slots=True)
class StateTag:
    """How far a bundle got, or where a task stands.

    Attributes:
        nonce, claims: Of its restriction: comparable within one.
        position: Of its shard: what is comparable between jobs.
    """

    nonce: bytes
    claims: int
    position: Position

    def includes(self, bundle: StateTag) -> bool:
        """Return whether who stands here has that bundle behind it."""
        if self.nonce == bundle.nonce:
            return self.claims >= bundle.claims
        return _place(self.position) >= _place(bundle.position)


def _place(position: Position) -> tuple[int, int]:
    return (position.sequence_number, position.sub_sequence_number) if position.is_sequence else (-1, -1)


_Entry = tuple[int, bytes, int, str, int, bytes | None, bytes | None]
"""Wire form of an entry's value: version 1, nonce, claims, sequence number ("" for none), sub-sequence number, the
value after the bundle and the value before it (None: there was none)."""
_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(_Entry).decode


def _pack(tag: StateTag, new: bytes | None, old: bytes | None) -> bytes:
    place = _place(tag.position)
    return _encode((1, tag.nonce, tag.claims, "" if place[0] < 0 else str(place[0]), max(place[1], 0), new, old))


def _unpack(task: str, data: bytes) -> tuple[StateTag, bytes | None, bytes | None]:
    try:
        version, nonce, claims, number, sub, new, old = _decode(data)
    except msgspec.MsgspecError as error:
        raise CheckpointError(f"the changelog of {task} holds what is no entry of it: {error}") from error
    if version != 1:
        raise CheckpointError(f"the changelog of {task} has version {version}; a newer release wrote it")
    position = Position.after(int(number), sub) if number else Position.trim_horizon()
    return StateTag(nonce, claims, position), new, old


class StoreFull(KinesisIOError):
    """An entry or a whole store is larger than its limit.

    Attributes:
        size_bytes, limit_bytes: What it would be, and what it may be.
    """

    def __init__(self, message: str, size_bytes: int = 0, limit_bytes: int = 0) -> None:
        super().__init__(message)
        self.size_bytes = size_bytes
        self.limit_bytes = limit_bytes


class ChangelogStore:
    """One task's store. Ordered by the serialized bytes of its keys. Not for several threads.

    Args:
        task: The task's name.
        name: The store's name.
        key_serde, value_serde: Of its keys and values.
        changelog: Where changes are kept; None: nowhere.
        at: Where the task stands; says what of the changelog counts.
        max_bytes: The limit of all keys and values together.
    """

    def __init__(
        self,
        task: str,
        name: str,
        *,
        key_serde: Serde,
        value_serde: Serde,
        changelog: CheckpointStore | None = None,
        at: StateTag | None = None,
        max_bytes: int = MAX_STORE_BYTES,
    ) -> None:
        if max_bytes < 1:
            raise ConfigurationError(f"max_bytes of the store {name} must be >= 1, got {max_bytes}")
        self._task = task
        self._name = name
        self._key_serde = key_serde
        self._value_serde = value_serde
        self._changelog = changelog
        self._max_bytes = max_bytes
        self._contents: dict[bytes, bytes] = {}
        self._flushed: dict[bytes, bytes | None] = {}
        """The values that changed keys had at the last flush."""
        self._deleted: set[bytes] = set()
        """Keys whose entries in the changelog say only that they are gone."""
        if changelog is not None:
            if at is None:
                raise ValueError(f"the store {name} has a changelog, so it must be told where the task stands")
            self._restore(changelog, at)
        self._keys: list[bytes] = sorted(self._contents)
        self._size_bytes = sum(len(k) + len(v) for k, v in self._contents.items())

    def _restore(self, changelog: CheckpointStore, at: StateTag) -> None:
        for key, data in changelog.load_state(self._task, self._name).items():
            tag, new, old = _unpack(self._task, data)
            counts = at.includes(tag)
            value = new if counts else old
            if value is not None:
                self._contents[key] = value
            if not counts:
                # Written again with the next flush: else a later bundle would find this one's value behind it.
                self._flushed[key] = value
            elif value is None:
                self._deleted.add(key)

    @property
    def size_bytes(self) -> int:
        """The keys and values together."""
        return self._size_bytes

    def get(self, key: Any) -> Any:
        data = self._contents.get(self._key(key))
        return None if data is None else self._value_serde.from_bytes(data)

    def put(self, key: Any, value: Any) -> None:
        if value is None:
            raise ValueError(f"the store {self._name} takes no None; use delete({key!r})")
        key_bytes, data = self._key(key), self._value_serde.to_bytes(value)
        entry = len(key_bytes) + len(data)
        if entry > MAX_ENTRY_BYTES:
            raise StoreFull(
                f"the entry {key!r:.80} of the store {self._name} has {entry} bytes, the limit is {MAX_ENTRY_BYTES}",
                entry,
                MAX_ENTRY_BYTES,
            )
        old = self._contents.get(key_bytes)
        size = self._size_bytes + (entry if old is None else len(data) - len(old))
        if size > self._max_bytes:
            raise StoreFull(
                f"the store {self._name} of {self._task} would have {size} bytes, its limit is {self._max_bytes}; "
                f"delete what is old, or raise stores.{self._name}.max.bytes",
                size,
                self._max_bytes,
            )
        self._note(key_bytes, old)
        if old is None:
            bisect.insort(self._keys, key_bytes)
        self._contents[key_bytes] = data
        self._size_bytes = size

    def delete(self, key: Any) -> None:
        key_bytes = self._key(key)
        old = self._contents.pop(key_bytes, None)
        if old is not None:
            self._note(key_bytes, old)
            del self._keys[bisect.bisect_left(self._keys, key_bytes)]
            self._size_bytes -= len(key_bytes) + len(old)

    def range(self, from_key: Any, to_key: Any) -> Iterator[tuple[Any, Any]]:
        low = bisect.bisect_left(self._keys, self._key(from_key))
        high = bisect.bisect_left(self._keys, self._key(to_key))
        return self._entries(self._keys[low:high])

    def all(self) -> Iterator[tuple[Any, Any]]:
        return self._entries(list(self._keys))

    def flush(self, tag: StateTag) -> None:
        """Write the changes since the last flush to the changelog, as those of the bundle `tag`."""
        if self._changelog is None or not (self._flushed or self._deleted):
            return
        changes: dict[bytes, bytes | None] = {key: None for key in self._deleted if key not in self._flushed}
        for key, old in self._flushed.items():
            changes[key] = _pack(tag, self._contents.get(key), old)
        self._changelog.save_state(self._task, self._name, changes)
        self._deleted = {key for key in self._flushed if key not in self._contents}
        self._flushed = {}

    def _entries(self, keys: list[bytes]) -> Iterator[tuple[Any, Any]]:
        entries = [(key, self._contents[key]) for key in keys]
        return ((self._key_serde.from_bytes(k), self._value_serde.from_bytes(v)) for k, v in entries)

    def _key(self, key: Any) -> bytes:
        if key is None:
            raise ValueError(f"the store {self._name} has no key None")
        return self._key_serde.to_bytes(key)

    def _note(self, key: bytes, old: bytes | None) -> None:
        if self._changelog is not None:
            self._flushed.setdefault(key, old)
