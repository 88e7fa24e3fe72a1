"""Shards in the hash space: who is whose ancestor, what covers what, and who reads it."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shard_histories import SMALL, TOP, histories, shard

from samza_kinesis_io.limits import MAX_HASH_KEY
from samza_kinesis_io.shards import (
    FULL_RANGE,
    HashKeyRange,
    Shard,
    age_key,
    children_of,
    groups,
    holes,
    oldest_covering,
    uncovered,
)


def numbers(shards: object) -> list[int]:
    return [int(s.shard_id[-12:]) for s in shards]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("start", "end"), [(-1, 5), (6, 5), (0, MAX_HASH_KEY + 1)])
def test_a_range_outside_the_hash_space_cannot_be_made(start: int, end: int) -> None:
    with pytest.raises(ValueError, match=r"must lie in \[0, 2\^128-1\]"):
        HashKeyRange(start, end)


def test_both_ends_of_a_range_belong_to_it() -> None:
    range_ = HashKeyRange(10, 20)
    assert [range_.contains(k) for k in (9, 10, 20, 21)] == [False, True, True, False]
    assert range_.overlaps(HashKeyRange(20, 30))
    assert not range_.overlaps(HashKeyRange(21, 30))
    assert range_.covers(HashKeyRange(10, 20))
    assert not range_.covers(HashKeyRange(10, 21))


def test_shards_are_ordered_by_their_numbers_not_their_names() -> None:
    ids = ["shardId-000000000010", "shardId-000000000009", "shardId-1000000000000", "odd"]
    assert sorted(ids, key=age_key) == ["odd", "shardId-000000000009", "shardId-000000000010", "shardId-1000000000000"]


def test_ids_with_equal_numbers_still_have_an_order() -> None:
    """Waiting for older shards must never become a circle."""
    assert age_key("a-1") != age_key("b-1")


def test_holes_are_what_no_range_covers() -> None:
    ranges = [HashKeyRange(10, 19), HashKeyRange(15, 30), HashKeyRange(40, 50)]
    assert uncovered(HashKeyRange(0, 45), ranges) == (HashKeyRange(0, 9), HashKeyRange(31, 39))
    assert uncovered(HashKeyRange(12, 28), ranges) == ()
    assert uncovered(HashKeyRange(60, 60), ranges) == (HashKeyRange(60, 60),)
    assert uncovered(HashKeyRange(0, 5), []) == (HashKeyRange(0, 5),)


@given(
    st.lists(st.tuples(st.integers(0, TOP), st.integers(0, TOP)).map(lambda t: HashKeyRange(min(t), max(t)))),
    st.tuples(st.integers(0, TOP), st.integers(0, TOP)).map(lambda t: HashKeyRange(min(t), max(t))),
)
def test_holes_agree_with_counting_every_key(ranges: list[HashKeyRange], target: HashKeyRange) -> None:
    keys = {k for k in range(target.start, target.end + 1) if not any(r.contains(k) for r in ranges)}
    found = uncovered(target, ranges)
    assert {k for r in found for k in range(r.start, r.end + 1)} == keys
    assert list(found) == sorted(found)


def test_reading_begins_with_the_roots() -> None:
    listed = [shard(0, 0, 31), shard(1, 32, 63), shard(2, 0, 15, 0), shard(3, 16, 31, 0)]
    assert numbers(oldest_covering(listed, SMALL)) == [0, 1]


def test_reading_begins_with_children_whose_parents_are_trimmed() -> None:
    listed = [shard(2, 0, 15, 0), shard(3, 16, 31, 0), shard(1, 32, 63), shard(4, 0, 31, 2, 3)]
    assert numbers(oldest_covering(listed, SMALL)) == [1, 2, 3]


def test_a_merge_child_fills_the_range_of_its_one_trimmed_parent() -> None:
    """It is chosen although its other parent is listed, for which it then waits."""
    listed = [shard(1, 32, 63), shard(2, 0, 63, 0, 1)]
    assert numbers(oldest_covering(listed, SMALL)) == [1, 2]


def test_order_in_the_list_does_not_matter() -> None:
    listed = [shard(0, 0, 63), shard(1, 0, 31, 0), shard(2, 32, 63, 0)]
    assert numbers(oldest_covering(reversed(listed), SMALL)) == [0]


@given(histories(), st.data())
def test_the_oldest_shards_are_the_oldest_for_every_hash_key(history: list[Shard], data: st.DataObject) -> None:
    """Whatever has been trimmed: each key's oldest listed shard is chosen, and no other shard is."""
    gone = data.draw(st.integers(0, len(history)))
    listed = data.draw(st.permutations(history[gone:]))
    low, high = sorted(data.draw(st.tuples(st.integers(0, TOP), st.integers(0, TOP))))
    expected = set()
    for key in range(low, high + 1):
        holders = [s for s in listed if s.hash_key_range.contains(key)]
        if holders:
            expected.add(min(holders, key=lambda s: age_key(s.shard_id)).shard_id)
    assert [s.shard_id for s in oldest_covering(listed, HashKeyRange(low, high))] == sorted(expected)


@given(histories())
def test_a_complete_history_has_no_holes(history: list[Shard]) -> None:
    assert holes(history, SMALL) == ()


def test_children_are_found_through_either_parent() -> None:
    listed = [shard(0, 0, 31), shard(1, 32, 63), shard(2, 0, 63, 0, 1)]
    for parent in ("shardId-000000000000", "shardId-000000000001"):
        (child,) = children_of(parent, listed)
        assert child.shard_id == "shardId-000000000002"
        assert child.parents == ("shardId-000000000000", "shardId-000000000001")


@pytest.mark.parametrize(("count", "sizes"), [(1, [6]), (2, [3, 3]), (4, [1, 2, 1, 2]), (6, [1] * 6), (9, [1] * 6)])
def test_neighbours_share_a_group_and_groups_are_even(count: int, sizes: list[int]) -> None:
    listed = [shard(i, i * 10, i * 10 + 9) for i in (3, 0, 5, 1, 4, 2)]
    dealt = groups(listed, count)
    assert [len(g) for g in dealt] == sizes
    assert numbers(s for g in dealt for s in g) == list(range(6))


def test_a_shard_and_the_one_it_waits_for_share_a_group() -> None:
    listed = [shard(1, 32, 63), shard(2, 0, 63, 0, 1), shard(3, 64, 80)]
    assert [numbers(g) for g in groups(listed, 9)] == [[2, 1], [3]]


def test_no_groups_cannot_be_asked_for() -> None:
    with pytest.raises(ValueError, match="count must be >= 1, got 0"):
        groups([], 0)


def test_five_thousand_shards_and_their_children_are_planned_in_no_time() -> None:
    """Twice as many shards must not take four times as long; the bound is 50 times what it takes."""
    width = (MAX_HASH_KEY + 1) // 5000
    roots = [shard(i, i * width, (i + 1) * width - 1 if i < 4999 else MAX_HASH_KEY) for i in range(5000)]
    halves = []
    for i, root in enumerate(roots):
        whole = root.hash_key_range
        middle = (whole.start + whole.end) // 2
        halves += [shard(5000 + 2 * i, whole.start, middle, i), shard(5001 + 2 * i, middle + 1, whole.end, i)]
    scattered = sorted(roots, key=lambda s: hash(s.shard_id))
    began = time.perf_counter()
    assert len(oldest_covering([*scattered, *halves], FULL_RANGE)) == 5000
    assert len(oldest_covering(halves, FULL_RANGE)) == 10_000
    assert not holes([*roots, *halves])
    assert time.perf_counter() - began < 5
