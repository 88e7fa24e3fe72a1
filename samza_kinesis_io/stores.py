"""Key-value stores of tasks: in memory, with a changelog in a `CheckpointStore`.

What survives what: with a changelog, the contents as of the last commit, or a little later, come back after every
restart, since the changelog is written *before* the position moves. After a failure the state may therefore hold the
effects of messages that are processed once more: as in Samza without transactional restore, at least once.
Without a changelog the contents live as long as the task's instance: after a failed bundle, after a restart and on
another worker a store begins empty.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import Any, Final

from samza_kinesis_io.checkpoints import CheckpointStore
from samza_kinesis_io.errors import ConfigurationError, KinesisIOError
from samza_kinesis_io.serdes import Serde

#: All keys and values of one store together. It is held in memory, in every worker that runs the task.
MAX_STORE_BYTES: Final = 64 * 1024 * 1024
#: One key with its value. DynamoDB: "The maximum item size in DynamoDB is 400 KB", attribute names included.
MAX_ENTRY_BYTES: Final = 390 * 1024


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
        max_bytes: The limit of all keys and values together.
    """

    def __init__(
        self,
        task: str,
        name: str,
        *,
        key_serde: Serde,
        value_serde: Serde,
        changelog: CheckpointStore | None,
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
        self._contents: dict[bytes, bytes] = changelog.load_state(task, name) if changelog is not None else {}
        self._keys: list[bytes] = sorted(self._contents)
        self._size_bytes = sum(len(k) + len(v) for k, v in self._contents.items())
        self._changes: dict[bytes, bytes | None] = {}

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
        if old is None:
            bisect.insort(self._keys, key_bytes)
        self._contents[key_bytes] = data
        self._size_bytes = size
        self._changed(key_bytes, data)

    def delete(self, key: Any) -> None:
        key_bytes = self._key(key)
        old = self._contents.pop(key_bytes, None)
        if old is not None:
            del self._keys[bisect.bisect_left(self._keys, key_bytes)]
            self._size_bytes -= len(key_bytes) + len(old)
            self._changed(key_bytes, None)

    def range(self, from_key: Any, to_key: Any) -> Iterator[tuple[Any, Any]]:
        low = bisect.bisect_left(self._keys, self._key(from_key))
        high = bisect.bisect_left(self._keys, self._key(to_key))
        return self._entries(self._keys[low:high])

    def all(self) -> Iterator[tuple[Any, Any]]:
        return self._entries(list(self._keys))

    def flush(self) -> None:
        if self._changelog is not None and self._changes:
            self._changelog.save_state(self._task, self._name, self._changes)
            self._changes = {}

    def _entries(self, keys: list[bytes]) -> Iterator[tuple[Any, Any]]:
        entries = [(key, self._contents[key]) for key in keys]
        return ((self._key_serde.from_bytes(k), self._value_serde.from_bytes(v)) for k, v in entries)

    def _key(self, key: Any) -> bytes:
        if key is None:
            raise ValueError(f"the store {self._name} has no key None")
        return self._key_serde.to_bytes(key)

    def _changed(self, key: bytes, value: bytes | None) -> None:
        if self._changelog is not None:
            self._changes[key] = value
