"""The frontier: its wire form, its tracker, and which shard may be read when."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
from apache_beam.runners.sdf_utils import RestrictionTrackerView, ThreadsafeRestrictionTracker
from apache_beam.utils.timestamp import Duration, Timestamp
from hypothesis import given
from hypothesis import strategies as st
from shard_histories import TOP, histories, shard

from samza_kinesis_io.errors import ConfigurationError, DataLoss, IncompleteShardList
from samza_kinesis_io.limits import MAX_HASH_KEY
from samza_kinesis_io.positions import Position, StartingPosition, StopPosition
from samza_kinesis_io.restriction import (
    MAX_MICROS,
    MIN_MICROS,
    Advance,
    Claim,
    FrontierTracker,
    ShardFrontier,
    ShardFrontierCoder,
    ShardState,
    adopted,
    after_loss,
    blocked,
    planned,
)
from samza_kinesis_io.shards import FULL_RANGE, ChildShard, HashKeyRange, Shard

HORIZON = Position.trim_horizon()
FROM_THE_HORIZON = StartingPosition.trim_horizon()
NOW = Timestamp(1_700_000_000)


def name(number: int) -> str:
    return f"shardId-{number:012d}"


def state(
    number: int, start: int, end: int, position: Position = HORIZON, *, stream: int = 0, watermark: int = 0
) -> ShardState:
    return ShardState(stream, name(number), HashKeyRange(start, end), position, None, watermark)


def state_of(listed: Shard) -> ShardState:
    return ShardState(0, listed.shard_id, listed.hash_key_range, HORIZON)


def child_of(listed: Shard) -> ChildShard:
    return ChildShard(listed.shard_id, listed.parents, listed.hash_key_range)


def ids(states: object) -> list[int]:
    return [int(s.shard_id[-12:]) for s in states]  # type: ignore[attr-defined]


# The wire form lies in runners' checkpoints: these bytes must decode for ever.

FRONTIER = ShardFrontier(
    (
        ShardState(0, "shardId-000000000000", HashKeyRange(0, 255), Position.trim_horizon(), None, MIN_MICROS),
        ShardState(1, "s-1", HashKeyRange(256, MAX_HASH_KEY), Position.at_timestamp(NOW), 5, -7),
        ShardState(0, "s-2", FULL_RANGE, Position.at(3, 4), 6, 8),
        ShardState(0, "s-3", FULL_RANGE, Position.after(1 << 185), 6, 8),
    ),
    claims=300,
    nonce=b"\x01\x02",
    event_lag_micros=9,
)
VERSION_1 = bytes.fromhex(
    "0194cd012cc402010209949a00b4736861726449642d303030303030303030303030c4100000000000000000000000000000"
    "0000c410000000000000000000000000000000ff00a1300000c0d380000000000003289a01a3732d31c41000000000000000"
    "000000000000000100c410ffffffffffffffffffffffffffffffff01a13000cf00060a24181e400005f99a00a3732d32c410"
    "00000000000000000000000000000000c410ffffffffffffffffffffffffffffffff02a133040006089a00a3732d33c41000"
    "000000000000000000000000000000c410ffffffffffffffffffffffffffffffff03d9383439303339383537333037373038"
    "343433343637343637313034383638383039383933383735373939363531393039383735323639363332cf7fffffffffffff"
    "ff000608"
)


def test_the_bytes_of_version_1_are_pinned() -> None:
    assert ShardFrontierCoder().encode(FRONTIER) == VERSION_1


def test_the_bytes_of_version_1_decode() -> None:
    assert ShardFrontierCoder().decode(VERSION_1) == FRONTIER


def test_a_frontier_without_shards_or_lag_has_its_bytes() -> None:
    assert ShardFrontierCoder().encode(ShardFrontier(())) == b"\x01\x94\x00\xc4\x00\xc0\x90"


def test_a_version_of_the_future_is_refused_with_advice() -> None:
    with pytest.raises(ValueError, match=r"unknown version b'\\x02'.*newer release of samza-kinesis-io, so run that"):
        ShardFrontierCoder().decode(b"\x02" + VERSION_1[1:])


@pytest.mark.parametrize("broken", [b"", VERSION_1[:-1], VERSION_1 + b"\x00", b"\x01", b"\x01\xc0"])
def test_bytes_that_are_missing_or_left_over_are_refused(broken: bytes) -> None:
    with pytest.raises(ValueError):
        ShardFrontierCoder().decode(broken)


def test_every_cut_of_the_bytes_is_refused() -> None:
    for length in range(len(VERSION_1)):
        with pytest.raises(ValueError):
            ShardFrontierCoder().decode(VERSION_1[:length])


positions = st.one_of(
    st.just(HORIZON),
    st.integers(0, 1 << 50).map(lambda micros: Position.at_timestamp(Timestamp(micros=micros))),
    st.tuples(st.integers(0, 1 << 186), st.integers(0, 1 << 62)).map(lambda t: Position.at(*t)),
    st.tuples(st.integers(0, 1 << 186), st.integers(0, 1 << 62)).map(lambda t: Position.after(*t)),
    st.integers(0, 1 << 186).map(Position.after),
)
micros = st.integers(MIN_MICROS, MAX_MICROS)
keys = st.tuples(st.integers(0, MAX_HASH_KEY), st.integers(0, MAX_HASH_KEY)).map(lambda t: HashKeyRange(min(t), max(t)))
states = st.builds(ShardState, st.integers(0, 9), st.text(max_size=30), keys, positions, st.none() | micros, micros)
frontiers = st.builds(
    ShardFrontier,
    st.lists(states, max_size=5).map(tuple),
    st.integers(0, 1 << 40),
    st.binary(max_size=16),
    st.none() | st.integers(0, 1 << 50),
)


@given(frontiers)
def test_every_frontier_survives_its_bytes(frontier: ShardFrontier) -> None:
    encoded = ShardFrontierCoder().encode(frontier)
    assert ShardFrontierCoder().decode(encoded) == frontier
    assert ShardFrontierCoder().encode(ShardFrontierCoder().decode(encoded)) == encoded


def test_the_coder_travels_and_is_deterministic() -> None:
    coder = pickle.loads(pickle.dumps(ShardFrontierCoder()))
    assert coder == ShardFrontierCoder()
    assert hash(coder) == hash(ShardFrontierCoder())
    assert coder.is_deterministic()
    assert coder.to_type_hint() is ShardFrontier


# The frontier itself.


def test_an_empty_frontier_is_true_for_the_sdk_drops_residuals_that_are_not() -> None:
    assert ShardFrontier(())
    assert ShardFrontier(()).is_done


def test_the_watermark_is_the_least_of_all_shards_the_waiting_ones_too() -> None:
    frontier = ShardFrontier((state(0, 0, 31, watermark=50), state(1, 0, 15, watermark=40)))
    assert frontier.watermark_micros == 40
    assert ShardFrontier(()).watermark_micros == MAX_MICROS


def test_every_restriction_gets_a_nonce_of_its_own() -> None:
    frontier = ShardFrontier((state(0, 0, TOP),))
    assert frontier.with_nonce().nonce != frontier.with_nonce().nonce


# Who waits for whom.


def test_children_wait_for_their_parents() -> None:
    frontier = ShardFrontier((state(1, 0, 31), state(0, 0, 63), state(2, 32, 63)))
    assert ids(frontier.ready()) == [0]


def test_a_merge_child_waits_for_either_parent() -> None:
    assert blocked([state(1, 32, 63), state(2, 0, 63)]) == {(0, name(2))}


def test_grandchildren_wait_while_the_generation_between_is_not_known_yet() -> None:
    assert blocked([state(0, 0, 63), state(5, 40, 41)]) == {(0, name(5))}


def test_a_parent_that_is_not_there_counts_as_read() -> None:
    assert blocked([state(3, 0, 31), state(4, 32, 63)]) == set()


def test_shards_of_different_streams_do_not_wait_for_each_other() -> None:
    assert blocked([state(0, 0, 63, stream=0), state(1, 0, 63, stream=1)]) == set()


@given(histories(), st.data())
def test_a_shard_waits_exactly_while_an_older_one_shares_a_key(history: list[Shard], data: st.DataObject) -> None:
    held = data.draw(st.lists(st.sampled_from(history), unique=True))
    expected = {
        (0, s.shard_id)
        for s in held
        if any(o.shard_id < s.shard_id and o.hash_key_range.overlaps(s.hash_key_range) for o in held)
    }
    assert blocked([state_of(s) for s in held]) == expected


@given(histories(), st.data())
def test_something_can_always_be_read(history: list[Shard], data: st.DataObject) -> None:
    """Waiting never becomes a circle."""
    held = data.draw(st.lists(st.sampled_from(history), unique=True, min_size=1))
    assert ShardFrontier(tuple(state_of(s) for s in held)).ready()


# Who reads a child.


def test_a_split_shard_is_followed_by_both_children() -> None:
    parent = state(0, 0, 63, watermark=77)
    children = [child_of(shard(1, 0, 31, 0)), child_of(shard(2, 32, 63, 0))]
    taken = adopted(parent, children, {}, HORIZON)
    assert ids(taken) == [1, 2]
    assert [s.watermark_micros for s in taken] == [77, 77], "a child is never behind what its parent emitted"


def test_a_merge_child_belongs_to_the_parent_that_holds_its_first_hash_key() -> None:
    child = child_of(shard(2, 0, 63, 0, 1))
    assert ids(adopted(state(0, 0, 31), [child], {}, HORIZON)) == [2]
    assert adopted(state(1, 32, 63), [child], {}, HORIZON) == ()


def test_an_only_restriction_takes_a_merge_child_when_the_first_parent_ends() -> None:
    """Else its half of the hash keys is held by nobody until the other parent ends, and is lost if that one is."""
    child = child_of(shard(2, 0, 63, 0, 1))
    assert ids(adopted(state(1, 32, 63), [child], {}, HORIZON, is_only_restriction=True)) == [2]


def test_a_named_child_starts_at_its_name_and_others_at_the_start() -> None:
    children = [child_of(shard(1, 0, 31, 0)), child_of(shard(2, 32, 63, 0))]
    start = Position.at_timestamp(NOW)
    taken = adopted(state(0, 0, 63), children, {name(2): Position.after(9)}, start)
    assert [s.position for s in taken] == [start, Position.after(9)]


@given(histories(), st.integers(0, 20), st.data())
def test_every_shard_of_any_history_is_read_by_exactly_one_restriction(
    history: list[Shard], gone: int, data: st.DataObject
) -> None:
    """Plan what is listed, deal it out at random, read to the end: each shard once, and none before its ancestors."""
    listed = history[min(gone, len(history) - 1) :]
    by_id = {s.shard_id: s for s in listed}
    try:
        plan = planned(0, scaled(listed), FROM_THE_HORIZON, None, 0)
    except IncompleteShardList:
        return  # the trimmed ones were still open, which no service does
    roots = [state_of(by_id[s.shard_id]) for s in plan]
    # Families may be dealt out in any way that keeps a shard with the one it waits for.
    waiting = {key[1] for key in blocked(roots)}
    frontiers: list[dict[str, ShardState]] = [{}, {}, {}]
    for root in roots:
        with_it = [f for f in frontiers if any(o.hash_key_range.overlaps(root.hash_key_range) for o in f.values())]
        assert len(with_it) <= 1 or root.shard_id in waiting
        chosen = with_it[0] if with_it else frontiers[data.draw(st.integers(0, 2))]
        if len(with_it) > 1:
            for other in with_it[1:]:
                chosen.update(other)
                other.clear()
        chosen[root.shard_id] = root
    read: list[str] = []
    while any(frontiers):
        ready = [(f, s) for f in frontiers for s in ShardFrontier(tuple(f.values())).ready()]
        frontier, ended = data.draw(st.sampled_from(ready))
        read.append(ended.shard_id)
        del frontier[ended.shard_id]
        children = [child_of(s) for s in listed if ended.shard_id in s.parents]
        for successor in adopted(ended, children, {}, HORIZON):
            frontier.setdefault(successor.shard_id, successor)
    assert sorted(read) == sorted(by_id)


def scaled(listed: list[Shard]) -> list[Shard]:
    """The same shards over the whole hash space, which planning insists on."""
    width = (MAX_HASH_KEY + 1) // (TOP + 1)
    return [
        replace(s, hash_key_range=HashKeyRange(s.hash_key_range.start * width, (s.hash_key_range.end + 1) * width - 1))
        for s in listed
    ]


# Planning.


def plan(
    listed: list[Shard], start: StartingPosition = FROM_THE_HORIZON, stop: StopPosition | None = None
) -> tuple[ShardState, ...]:
    return planned(0, scaled(listed), start, stop, 5)


def test_a_hole_in_the_list_is_named() -> None:
    with pytest.raises(IncompleteShardList, match="the 1 listed shards leave hash keys to nobody, the first are"):
        plan([shard(0, 0, 31)])


def test_planned_shards_start_where_the_read_starts() -> None:
    (planned_,) = plan([shard(0, 0, 63)], StartingPosition.at_timestamp(NOW))
    assert planned_.position == Position.at_timestamp(NOW)
    assert planned_.watermark_micros == 5


def test_an_unknown_shard_is_named() -> None:
    start = StartingPosition.after_sequence_numbers({"shardId-000000000009": "1"})
    with pytest.raises(ConfigurationError, match=r"starting_position names shards .*\['shardId-000000000009'\]"):
        plan([shard(0, 0, 63)], start)
    with pytest.raises(ConfigurationError, match="stop_at names shards that the stream does not list"):
        plan([shard(0, 0, 63)], stop=StopPosition.at_sequence_numbers({"no": "1"}))


HISTORY = [shard(0, 0, 63), shard(1, 0, 31, 0), shard(2, 32, 63, 0), shard(3, 0, 63, 1, 2)]


def test_ancestors_that_named_descendants_cover_count_as_read() -> None:
    start = StartingPosition.after_sequence_numbers({name(1): "5", name(2): "6"})
    assert [(s.shard_id, s.position) for s in plan(HISTORY, start)] == [
        (name(1), Position.after(5)),
        (name(2), Position.after(6)),
        (name(3), HORIZON),  # waits for both
    ]


def test_an_ancestor_that_is_covered_in_part_is_read() -> None:
    start = StartingPosition.after_sequence_numbers({name(1): "5"}, otherwise=StartingPosition.trim_horizon())
    assert ids(plan(HISTORY, start)) == [0]


def test_an_ancestor_that_is_named_itself_is_read_from_its_name() -> None:
    start = StartingPosition.at_sequence_numbers({name(0): "3", name(1): "5", name(2): "6"})
    assert [(s.shard_id, s.position) for s in plan(HISTORY, start)] == [(name(0), Position.at(3))]


def test_what_counts_as_read_between_shards_that_do_not_is_passed_at_its_end() -> None:
    """The first shard is read whole; its child that the named one covers has nothing left, but leads on."""
    history = [
        shard(0, 0, 63),
        replace(shard(1, 0, 31, 0), ending_sequence_number=99),
        shard(2, 32, 63, 0),
        shard(3, 0, 15, 1),
        shard(4, 16, 31, 1),
    ]
    start = StartingPosition.at_sequence_numbers(
        {name(3): "5", name(4): "6"}, otherwise=StartingPosition.trim_horizon()
    )
    assert [(s.shard_id, s.position) for s in plan(history, start)] == [
        (name(0), HORIZON),
        (name(1), Position.after(99)),
        (name(2), HORIZON),
        (name(3), Position.at(5)),
        (name(4), Position.at(6)),
    ]


def test_the_merge_child_alone_stands_for_all_its_ancestors() -> None:
    start = StartingPosition.at_sequence_numbers({name(3): "7"})
    assert ids(plan(HISTORY, start)) == [3]


def test_a_shard_that_nobody_names_needs_otherwise() -> None:
    start = StartingPosition.at_sequence_numbers({name(1): "5"})
    with pytest.raises(ConfigurationError, match="names no sequence number for the shards.*or give otherwise="):
        plan(HISTORY, start)
    start = StartingPosition.at_sequence_numbers({name(0): "5"})
    with pytest.raises(ConfigurationError, match="names no sequence number for the shards"):
        plan([shard(0, 0, 31), shard(1, 32, 63)], start)


def test_descendants_of_a_named_shard_need_no_otherwise() -> None:
    start = StartingPosition.at_sequence_numbers({name(0): "5"})
    assert ids(plan(HISTORY, start)) == [0]


def test_a_stop_by_sequence_numbers_names_all_that_is_read() -> None:
    stop = StopPosition.at_sequence_numbers({name(2): "9"})
    assert ids(plan(HISTORY, stop=stop)) == [2]


def test_a_shard_that_starts_behind_its_stop_is_not_read() -> None:
    stop = StopPosition.at_sequence_numbers({name(1): "5", name(2): "9"})
    start = StartingPosition.after_sequence_numbers({name(1): "5", name(2): "8"})
    assert ids(plan(HISTORY, start, stop)) == [2]


def test_a_shard_that_starts_at_its_stop_is_read() -> None:
    stop = StopPosition.at_sequence_numbers({name(1): "5"})
    start = StartingPosition.at_sequence_numbers({name(1): "5"})
    assert ids(plan(HISTORY, start, stop)) == [1]


# After a loss.


def test_the_oldest_listed_descendants_take_the_place_of_a_shard_that_is_gone() -> None:
    lost = state(0, 0, 63, watermark=8)
    listed = [shard(5, 0, 15), shard(6, 16, 31), shard(2, 32, 63), shard(7, 0, 31, 5, 6)]
    found = after_loss(lost, listed, [lost], {}, Position.at_timestamp(NOW), is_only_restriction=True)
    assert ids(found) == [2, 5, 6]
    assert {(s.position, s.watermark_micros) for s in found} == {(Position.at_timestamp(NOW), 8)}


def test_shards_that_the_frontier_holds_are_not_taken_twice() -> None:
    lost, held = state(1, 0, 31), state(3, 0, 63)
    assert after_loss(lost, [shard(3, 0, 63)], [lost, held], {}, HORIZON, is_only_restriction=True) == ()


def test_a_named_descendant_starts_at_its_name() -> None:
    listed = [shard(5, 0, 31), shard(6, 32, 63)]
    starts = {name(6): Position.after(9)}
    found = after_loss(state(0, 0, 63), listed, [], starts, HORIZON, is_only_restriction=True)
    assert [s.position for s in found] == [HORIZON, Position.after(9)]


@pytest.mark.parametrize(
    "listed",
    [
        [shard(3, 0, 63, 1, 2)],  # reaches beyond it
        [shard(4, 0, 31, 3)],  # does not, but the merge before it did, and its other half may be nobody's
    ],
)
def test_a_descendant_of_others_too_fails_with_the_way_out(listed: list[Shard]) -> None:
    lost = state(1, 0, 31)
    with pytest.raises(DataLoss, match="did not come from it alone.*restrictions=1"):
        after_loss(lost, listed, [], {}, HORIZON, is_only_restriction=False)
    assert len(after_loss(lost, listed, [], {}, HORIZON, is_only_restriction=True)) == 1


def test_the_parts_of_a_shard_that_is_gone_follow_it_in_any_restriction() -> None:
    listed = [shard(5, 0, 15, 1), shard(6, 16, 31, 1)]
    assert ids(after_loss(state(1, 0, 31), listed, [], {}, HORIZON, is_only_restriction=False)) == [5, 6]


def test_a_loss_that_leaves_nothing_is_an_error() -> None:
    """Never just an empty frontier."""
    with pytest.raises(IncompleteShardList, match="is gone and the listed shards leave its hash keys"):
        after_loss(state(1, 0, 31), [shard(2, 32, 63)], [], {}, HORIZON, is_only_restriction=True)


@given(histories(), st.integers(0, 20), st.data())
def test_after_a_loss_every_key_of_the_lost_shard_is_read_on(
    history: list[Shard], gone: int, data: st.DataObject
) -> None:
    lost = data.draw(st.sampled_from(history))
    listed = [s for s in history[gone:] if s.shard_id > lost.shard_id]
    try:
        found = after_loss(state_of(lost), listed, [], {}, HORIZON, is_only_restriction=True)
    except IncompleteShardList:
        return
    covered = {k for s in found for k in range(s.hash_key_range.start, s.hash_key_range.end + 1)}
    assert set(range(lost.hash_key_range.start, lost.hash_key_range.end + 1)) <= covered


# The tracker, in Beam's own wrapping.


def tracked(*shards: ShardState, bounded: bool = False) -> ThreadsafeRestrictionTracker:
    return ThreadsafeRestrictionTracker(FrontierTracker(ShardFrontier(tuple(shards)), bounded=bounded))


def claim(number: int, position: Position | None, watermark: int = 0, read_until: int | None = None) -> Claim:
    return Claim((Advance((0, name(number)), position, watermark, read_until),))


def test_a_claim_moves_its_shard_alone_and_is_counted() -> None:
    tracker = tracked(state(0, 0, 31), state(1, 32, 63))
    assert tracker.try_claim(claim(1, Position.after(9), watermark=4, read_until=3))
    frontier = tracker.current_restriction()
    assert frontier.shards == (
        state(0, 0, 31),
        ShardState(0, name(1), HashKeyRange(32, 63), Position.after(9), 3, 4),
    )
    assert frontier.claims == 1


def test_a_claim_without_records_moves_the_watermark_alone() -> None:
    tracker = tracked(state(0, 0, 31, Position.after(5)))
    assert tracker.try_claim(claim(0, None, watermark=4))
    (moved,) = tracker.current_restriction().shards
    assert (moved.position, moved.watermark_micros) == (Position.after(5), 4)
    assert tracker.current_restriction().claims == 1


def test_watermarks_and_evidence_never_fall() -> None:
    tracker = tracked(state(0, 0, 31))
    tracker.try_claim(claim(0, None, watermark=9, read_until=9))
    tracker.try_claim(claim(0, None, watermark=4, read_until=4))
    (moved,) = tracker.current_restriction().shards
    assert (moved.watermark_micros, moved.read_until_micros) == (9, 9)


def test_the_end_of_a_shard_puts_its_children_in_its_place() -> None:
    tracker = tracked(state(0, 0, 63))
    end = Claim(claim(0, Position.after(9)).advances, (0, name(0)), (state(1, 0, 31), state(2, 32, 63)))
    assert tracker.try_claim(end)
    assert ids(tracker.current_restriction().shards) == [1, 2]


def test_a_child_that_is_there_already_stays_as_it_is() -> None:
    tracker = tracked(state(0, 0, 31), state(2, 0, 63, Position.after(5)))
    assert tracker.try_claim(Claim((), (0, name(0)), (state(2, 0, 63),)))
    assert tracker.current_restriction().shards == (state(2, 0, 63, Position.after(5)),)


def test_the_rest_of_a_shard_can_follow_itself() -> None:
    """After a loss the shard goes on at its horizon."""
    tracker = tracked(state(0, 0, 63, Position.after(5)))
    assert tracker.try_claim(Claim((), (0, name(0)), (state(0, 0, 63),)))
    assert tracker.current_restriction().shards == (state(0, 0, 63),)


def test_the_largest_event_lag_is_kept() -> None:
    tracker = tracked(state(0, 0, 63))
    for lag in (5, 9, 2, None):
        tracker.try_claim(Claim((), event_lag_micros=lag))
    assert tracker.current_restriction().event_lag_micros == 9


def test_a_claim_of_a_shard_that_is_not_held_is_a_defect_and_changes_nothing() -> None:
    tracker = tracked(state(0, 0, 63))
    for wrong in (claim(7, Position.after(1)), Claim((), (0, name(7)))):
        with pytest.raises(ValueError, match="which this restriction does not hold"):
            tracker.try_claim(wrong)
    assert tracker.current_restriction().claims == 0


def test_a_checkpoint_leaves_what_was_claimed_and_gives_away_the_rest() -> None:
    tracker = tracked(state(0, 0, 31), state(1, 32, 63))
    tracker.try_claim(claim(0, Position.after(9)))
    primary, residual = tracker.try_split(0.0)
    assert primary.is_done
    assert residual.shards == (state(0, 0, 31, Position.after(9)), state(1, 32, 63))
    assert residual.claims == 1
    assert tracker.try_claim(claim(0, Position.after(10))) is False
    tracker.check_done()


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_a_frontier_is_not_divided_while_it_is_read(fraction: float) -> None:
    assert tracked(state(0, 0, 63)).try_split(fraction) is None


def test_nothing_is_left_to_split_after_the_last_shard_and_after_a_split() -> None:
    tracker = tracked(state(0, 0, 63))
    tracker.try_claim(Claim((), (0, name(0))))
    assert tracker.try_split(0.0) is None
    tracker = tracked(state(0, 0, 63))
    assert tracker.try_split(0.0) is not None
    assert tracker.try_split(0.0) is None


def test_shards_that_were_neither_read_nor_deferred_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"1 shards are unread and were not deferred: \['shardId-000000000000'\]"):
        tracked(state(0, 0, 63)).check_done()


def test_a_deferred_remainder_is_the_unclaimed_rest() -> None:
    tracker = tracked(state(0, 0, 31), state(1, 32, 63))
    view = RestrictionTrackerView(tracker)
    assert view.try_claim(claim(1, Position.after(3)))
    view.defer_remainder(Duration(micros=50_000))
    residual, _ = tracker.deferred_status()
    assert residual.shards == (state(0, 0, 31), state(1, 32, 63, Position.after(3)))
    tracker.check_done()


def test_progress_is_a_fraction() -> None:
    """With completed= and remaining= Prism fails the job on a NaN."""
    tracker = tracked(state(0, 0, 63))
    assert tracker.current_progress().fraction_completed == 0.0
    tracker.try_claim(Claim((), (0, name(0))))
    assert tracker.current_progress().fraction_completed == 1.0


def test_a_tracker_says_whether_its_read_ends() -> None:
    assert [tracked(state(0, 0, 63), bounded=b).is_bounded() for b in (True, False)] == [True, False]
