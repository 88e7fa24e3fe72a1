"""Tasks' key-value stores and their changelog."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from samza_kinesis_io.checkpoints import CheckpointStore, FileCheckpointStore, MemoryCheckpointStore
from samza_kinesis_io.errors import CheckpointError, ConfigurationError
from samza_kinesis_io.positions import Position
from samza_kinesis_io.serdes import serde
from samza_kinesis_io.stores import MAX_ENTRY_BYTES, ChangelogStore, StateTag, StoreFull
from samza_kinesis_io.task import KeyValueStore


def tag(claims: int, *, nonce: bytes = b"restriction", number: int = 0) -> StateTag:
    return StateTag(nonce, claims, Position.after(number) if number else Position.trim_horizon())


def open_store(changelog: CheckpointStore | None = None, at: StateTag | None = None, **options: Any) -> ChangelogStore:
    return ChangelogStore(
        "task",
        "delays",
        key_serde=serde("string"),
        value_serde=serde("json"),
        changelog=changelog,
        at=at or tag(0),
        **options,
    )


@pytest.fixture
def changelog(tmp_path: Path) -> CheckpointStore:
    return MemoryCheckpointStore(str(tmp_path))


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


operation = st.tuples(st.sampled_from("abcd"), st.none() | st.integers(0, 9))
#: A bundle: what it does, and whether it counts in the end or fails and is done again from where it began.
bundle = st.tuples(st.lists(operation, max_size=5), st.sampled_from(["counts", "fails", "counts, then a restart"]))


@given(st.lists(bundle, max_size=12))
def test_after_any_failures_the_state_is_that_of_the_bundles_that_count(
    bundles: list[tuple[list[tuple[str, int | None]], str]],
) -> None:
    changelog = MemoryCheckpointStore(uuid.uuid4().hex)
    claims, model = 0, dict[str, int]()
    store = open_store(changelog, tag(claims))
    for operations, outcome in bundles:
        after = dict(model)
        for key, value in operations:
            if value is None:
                store.delete(key)
                after.pop(key, None)
            else:
                store.put(key, value)
                after[key] = value
        assert dict(store.all()) == after
        reached = claims + len(operations) + 1
        store.flush(tag(reached))
        if outcome == "fails":
            store = open_store(changelog, tag(claims))
        else:
            claims, model = reached, after
            if outcome != "counts":
                store = open_store(changelog, tag(claims))
        assert dict(store.all()) == model
        assert store.size_bytes == sum(len(k) + len(str(v)) for k, v in model.items())


def test_a_new_job_takes_what_its_position_has_behind_it(changelog: CheckpointStore) -> None:
    old = open_store(changelog)
    old.put("a", 1)
    old.flush(tag(10, number=100))
    old.put("a", 2)
    old.flush(tag(20, number=200))
    assert dict(open_store(changelog, tag(0, nonce=b"new", number=200)).all()) == {"a": 2}
    assert dict(open_store(changelog, tag(0, nonce=b"new", number=199)).all()) == {"a": 1}


def test_going_back_by_more_than_a_bundle_finds_state_that_is_ahead_never_behind(changelog: CheckpointStore) -> None:
    store = open_store(changelog)
    for n in range(1, 4):
        store.put("a", n)
        store.flush(tag(n))
    assert dict(open_store(changelog, tag(0)).all()) == {"a": 2}


def test_a_failed_bundles_value_does_not_come_back_when_later_bundles_have_passed_it(
    changelog: CheckpointStore,
) -> None:
    """The bundle is tried again and is shorter: it never touches b; then the counter passes the failed one's."""
    store = open_store(changelog)
    store.put("b", "failed")
    store.flush(tag(5))
    store = open_store(changelog, tag(0))
    store.put("a", 1)
    store.flush(tag(2))
    assert dict(open_store(changelog, tag(9)).all()) == {"a": 1}


def test_deleted_keys_leave_the_changelog_with_the_flush_after(changelog: CheckpointStore) -> None:
    store = open_store(changelog)
    store.put("a", 1)
    store.flush(tag(1))
    store.delete("a")
    store.flush(tag(2))
    assert dict(open_store(changelog, tag(1)).all()) == {"a": 1}
    store.flush(tag(3))
    assert changelog.load_state("task", "delays") == {}


def test_a_flush_without_changes_writes_nothing(tmp_path: Path) -> None:
    store = open_store(FileCheckpointStore(str(tmp_path)))
    store.put("a", 1)
    store.flush(tag(1))
    (log,) = tmp_path.glob("state/*/*.log")
    size = log.stat().st_size
    store.flush(tag(2))
    assert log.stat().st_size == size


def test_the_wire_form_of_an_entry_is_what_the_documentation_says(changelog: CheckpointStore) -> None:
    """Pinned: a release reads what an older one wrote."""
    store = open_store(changelog)
    store.put("a", 1)
    store.flush(tag(7, nonce=b"n", number=495))
    (data,) = changelog.load_state("task", "delays").values()
    assert msgspec.msgpack.decode(data) == [1, b"n", 7, "495", 2**63 - 1, b"1", None]


@pytest.mark.parametrize("data", [b"", b"junk", msgspec.msgpack.encode([9, b"", 0, "", 0, None, None])])
def test_a_changelog_of_something_else_is_an_error(changelog: CheckpointStore, data: bytes) -> None:
    changelog.save_state("task", "delays", {b"a": data})
    with pytest.raises(CheckpointError, match="the changelog of task"):
        open_store(changelog)


def test_without_a_changelog_a_new_instance_is_empty() -> None:
    store = open_store()
    store.put("a", 1)
    store.flush(tag(1))
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
