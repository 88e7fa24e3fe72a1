"""Tasks' key-value stores and their changelog."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from samza_kinesis_io.checkpoints import CheckpointStore, FileCheckpointStore, MemoryCheckpointStore
from samza_kinesis_io.errors import ConfigurationError
from samza_kinesis_io.serdes import serde
from samza_kinesis_io.stores import MAX_ENTRY_BYTES, ChangelogStore, StoreFull
from samza_kinesis_io.task import KeyValueStore


def open_store(changelog: CheckpointStore | None = None, **options: Any) -> ChangelogStore:
    return ChangelogStore(
        "task", "delays", key_serde=serde("string"), value_serde=serde("json"), changelog=changelog, **options
    )


def test_a_store_is_what_a_task_is_promised() -> None:
    store: KeyValueStore = open_store()
    store.put("AA", 5)
    assert store.get("AA") == 5
    assert store.get("LH") is None
    store.delete("AA")
    store.delete("never there")
    assert list(store.all()) == []


def test_a_range_is_in_the_order_of_the_serialized_keys_and_without_its_end() -> None:
    store = open_store()
    for key in ("b", "d", "a", "ü", "c"):
        store.put(key, key)
    assert [k for k, _ in store.range("a", "c")] == ["a", "b"]
    assert [k for k, _ in store.all()] == ["a", "b", "c", "d", "ü"]


def test_a_range_is_as_the_store_was_at_the_call() -> None:
    store = open_store()
    store.put("a", 1)
    found = store.all()
    store.put("a", 2)
    store.put("b", 2)
    assert list(found) == [("a", 1)]


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.none() | st.integers(), st.booleans()), max_size=40))
def test_what_was_flushed_is_what_a_new_instance_finds(changes: list[tuple[str, int | None, bool]]) -> None:
    changelog = MemoryCheckpointStore(f"{id(changes)}")
    changelog._memory().state.clear()
    store = open_store(changelog)
    model: dict[str, int] = {}
    flushed: dict[str, int] = {}
    for key, value, flush in changes:
        if value is None:
            store.delete(key)
            model.pop(key, None)
        else:
            store.put(key, value)
            model[key] = value
        assert dict(store.all()) == model
        if flush:
            store.flush()
            flushed = dict(model)
    again = open_store(changelog)
    assert dict(again.all()) == flushed
    assert again.size_bytes == sum(len(k) + len(str(v)) for k, v in flushed.items())


def test_a_flush_without_changes_writes_nothing(tmp_path: Path) -> None:
    store = open_store(FileCheckpointStore(str(tmp_path)))
    store.put("a", 1)
    store.flush()
    (log,) = tmp_path.glob("state/*/*.log")
    size = log.stat().st_size
    store.flush()
    assert log.stat().st_size == size


def test_without_a_changelog_a_new_instance_is_empty() -> None:
    store = open_store()
    store.put("a", 1)
    store.flush()
    assert list(open_store().all()) == []


def test_a_store_that_would_pass_its_limit_refuses_the_entry_and_keeps_the_rest() -> None:
    store = open_store(max_bytes=10)
    store.put("a", 12345678)
    with pytest.raises(StoreFull, match=r"would have 12 bytes, its limit is 10; .*stores\.delays\.max\.bytes"):
        store.put("b", 12)
    store.put("a", 1)
    store.put("b", 12)
    assert store.size_bytes == 5


def test_an_entry_larger_than_an_item_of_dynamodb_is_refused() -> None:
    with pytest.raises(StoreFull) as caught:
        open_store().put("a", "x" * MAX_ENTRY_BYTES)
    assert caught.value.limit_bytes == MAX_ENTRY_BYTES


def test_none_is_neither_a_key_nor_a_value() -> None:
    with pytest.raises(ValueError, match="use delete"):
        open_store().put("a", None)
    with pytest.raises(ValueError, match="no key None"):
        open_store().get(None)


def test_a_limit_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="max_bytes of the store delays must be >= 1"):
        open_store(max_bytes=0)
