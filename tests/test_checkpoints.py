"""Checkpoints outside of the runner: what every store promises, how a new job goes on, and the KCL's table."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.client
import pytest
from apache_beam.utils.timestamp import Timestamp
from hypothesis import given
from hypothesis import strategies as st
from moto import mock_aws

from samza_kinesis_io import checkpoints as checkpoints_module
from samza_kinesis_io.checkpoints import (
    CheckpointStore,
    DynamoDBCheckpointStore,
    FileCheckpointStore,
    LeaseWatch,
    MemoryCheckpointStore,
    Ownership,
    ShardCheckpoint,
    from_lease_item,
    lease_item,
    resume,
)
from samza_kinesis_io.dynamodb import DynamoDBConfig
from samza_kinesis_io.errors import CheckpointError, ConfigurationError
from samza_kinesis_io.limits import MAX_HASH_KEY
from samza_kinesis_io.positions import WHOLE_RECORD, Position, StartingPosition
from samza_kinesis_io.shards import FULL_RANGE, HashKeyRange, Shard
from samza_kinesis_io.testing.clock import SimulatedClock
from tiers import dynalite

HALF = (MAX_HASH_KEY + 1) // 2
LOW, HIGH = HashKeyRange(0, HALF - 1), HashKeyRange(HALF, MAX_HASH_KEY)
T0 = Timestamp(1_700_000_000)


def shard_id(number: int) -> str:
    return f"shardId-{number:012d}"


def row(number: int, position: Position | None, **more: Any) -> ShardCheckpoint:
    return ShardCheckpoint(shard_id(number), position, **more)


def end(number: int, **more: Any) -> ShardCheckpoint:
    return row(number, None, ended=True, **more)


@contextlib.contextmanager
def dynamodb_on_moto() -> Iterator[None]:
    """Moto checks a condition and writes in two steps that threads can come between; DynamoDB in one."""
    lock = threading.Lock()
    call = botocore.client.BaseClient._make_api_call

    def one_at_a_time(self: Any, operation: str, arguments: Any) -> Any:
        with lock:
            return call(self, operation, arguments)

    with mock_aws(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(botocore.client.BaseClient, "_make_api_call", one_at_a_time)
        yield


@pytest.fixture(params=["memory", "file", "dynamodb"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[CheckpointStore]:
    if request.param == "memory":
        yield MemoryCheckpointStore(str(tmp_path))
    elif request.param == "file":
        yield FileCheckpointStore(str(tmp_path / "checkpoints"))
    else:
        with dynamodb_on_moto():
            yield DynamoDBCheckpointStore("job-1-{stream}")


positions = st.one_of(
    st.builds(Position.trim_horizon),
    st.builds(lambda s: Position.at_timestamp(Timestamp(s)), st.integers(0, 2_000_000_000)),
    st.builds(Position.after, st.integers(0, 2**186), st.sampled_from([0, 1, 7, WHOLE_RECORD])),
)
rows = st.builds(
    lambda n, position, parents, children: ShardCheckpoint(
        shard_id(n), position, position is None, tuple(parents), tuple(children), HashKeyRange(n, MAX_HASH_KEY - n)
    ),
    st.integers(0, 5),
    st.none() | positions,
    st.lists(st.integers(0, 9).map(shard_id), max_size=2, unique=True).map(sorted),
    st.lists(st.integers(10, 19).map(shard_id), max_size=2, unique=True).map(sorted),
)


class TestEveryStore:
    def test_a_stream_without_checkpoints_is_empty(self, store: CheckpointStore) -> None:
        assert store.load("flights") == {}
        assert store.load_state("task", "seen") == {}

    def test_what_is_saved_is_loaded(self, store: CheckpointStore) -> None:
        saved = [
            row(0, Position.trim_horizon(), hash_key_range=LOW),
            row(1, Position.at_timestamp(T0), hash_key_range=HIGH),
            row(2, Position.after(2**185, 3), parents=(shard_id(0), shard_id(1)), hash_key_range=FULL_RANGE),
            row(3, Position.after(2**185)),
            end(4, children=(shard_id(5), shard_id(6))),
        ]
        report = store.save("flights", saved)
        assert (report.written, report.kept, report.deferred) == (5, 0, ())
        assert store.load("flights") == {r.shard_id: r for r in saved}

    def test_an_older_position_never_overwrites_a_newer_one(self, store: CheckpointStore) -> None:
        ordered = [
            row(0, Position.trim_horizon()),
            row(0, Position.after(9)),
            row(0, Position.after(10, 0)),
            row(0, Position.after(10, 4)),
            row(0, Position.after(10)),
            row(0, Position.after(1000)),
            end(0, children=(shard_id(1),)),
        ]
        for i, new in enumerate(ordered):
            assert store.save("flights", [new]).written == 1
            for old in ordered[: i + 1]:
                assert store.save("flights", [old]).kept == 1
            assert store.load("flights")[shard_id(0)] == new

    def test_a_row_keeps_what_only_its_older_self_knew_of_the_shard(self, store: CheckpointStore) -> None:
        store.save("flights", [row(2, Position.trim_horizon(), parents=(shard_id(0),), hash_key_range=LOW)])
        store.save("flights", [row(2, Position.after(5))])
        got = store.load("flights")[shard_id(2)]
        assert (got.position, got.parents, got.hash_key_range) == (Position.after(5), (shard_id(0),), LOW)

    def test_streams_do_not_mix(self, store: CheckpointStore) -> None:
        store.save("flights", [row(0, Position.after(1))])
        store.save("air.ports", [row(0, Position.after(2))])
        assert store.load("flights")[shard_id(0)].position == Position.after(1)
        assert store.load("air.ports")[shard_id(0)].position == Position.after(2)

    def test_a_pickled_copy_is_the_same_store(self, store: CheckpointStore) -> None:
        store.save("flights", [row(0, Position.after(1))])
        copy = pickle.loads(pickle.dumps(store))
        copy.save("flights", [row(0, Position.after(2))])
        assert store.load("flights")[shard_id(0)].position == Position.after(2)
        assert store.save("flights", [row(0, Position.after(1))]).kept == 1

    def test_of_two_writers_at_once_the_newest_position_stays(self, store: CheckpointStore) -> None:
        copies = [store, pickle.loads(pickle.dumps(store))]
        store.save("flights", [row(n, Position.trim_horizon()) for n in range(2)])

        def write(who: int) -> None:
            for number in range(who, 40, 2):
                copies[who].save("flights", [row(n, Position.after(number)) for n in range(2)])

        threads = [threading.Thread(target=write, args=(who,)) for who in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {r.position for r in store.load("flights").values()} == {Position.after(39)}

    def test_a_tasks_state_is_kept_by_task_and_store(self, store: CheckpointStore) -> None:
        store.save_state("t/1", "seen", {b"a": b"1", b"b": b"2", b"e": b""})
        store.save_state("t/1", "seen", {b"a": None, b"c": b"3", b"gone": None})
        store.save_state("t/1", "other", {b"x": b"y"})
        assert store.load_state("t/1", "seen") == {b"b": b"2", b"c": b"3", b"e": b""}
        assert store.load_state("t/1", "other") == {b"x": b"y"}
        assert store.load_state("t/2", "seen") == {}

    def test_more_changes_at_once_than_the_service_takes_in_a_request(self, store: CheckpointStore) -> None:
        store.save_state("t", "s", {b"%d" % i: b"v" for i in range(60)})
        assert len(store.load_state("t", "s")) == 60


class TestOrder:
    @given(rows, rows, rows)
    def test_newer_is_an_order(self, a: ShardCheckpoint, b: ShardCheckpoint, c: ShardCheckpoint) -> None:
        assert not (a.is_newer_than(b) and b.is_newer_than(a))
        if a.is_newer_than(b) and b.is_newer_than(c):
            assert a.is_newer_than(c)

    @given(st.lists(rows, max_size=20), st.integers(0, 3))
    def test_the_result_does_not_depend_on_the_order_of_saving(self, saved: list[ShardCheckpoint], turn: int) -> None:
        orders: list[dict[str, tuple[int, ...]]] = []
        for i, given_rows in enumerate((saved, saved[turn:] + saved[:turn], saved[::-1])):
            store = MemoryCheckpointStore(f"order-{i}-{os.urandom(8).hex()}")
            store.save("s", given_rows)
            orders.append({r.shard_id: r._order() for r in store.load("s").values()})
        assert orders[0] == orders[1] == orders[2]

    def test_numbers_compare_as_integers(self) -> None:
        assert row(0, Position.after(10)).is_newer_than(row(0, Position.after(9)))

    def test_a_pinned_start_of_ours_is_newer_than_a_place_only_the_kcl_knows(self) -> None:
        assert row(0, Position.at_timestamp(T0)).is_newer_than(row(0, None))


class TestResume:
    def shards(self) -> list[Shard]:
        """0 was split into 1 and 2; these were merged into 3."""
        return [
            Shard(shard_id(0), FULL_RANGE, ending_sequence_number=10),
            Shard(shard_id(1), LOW, shard_id(0), ending_sequence_number=20),
            Shard(shard_id(2), HIGH, shard_id(0), ending_sequence_number=20),
            Shard(shard_id(3), FULL_RANGE, shard_id(1), shard_id(2)),
        ]

    def plan(self, *saved: ShardCheckpoint, start: StartingPosition | None = None) -> dict[str, Position | None]:
        start = start or StartingPosition.latest().pinned(T0)
        plan = resume(self.shards(), {r.shard_id: r for r in saved}, start)
        return {s.shard_id: plan.positions.get(s.shard_id) for s in self.shards()}

    def test_without_rows_everything_starts_at_the_sources_start(self) -> None:
        start = Position.at_timestamp(T0)
        assert set(self.plan().values()) == {start}

    def test_a_shard_goes_on_behind_its_row_and_its_descendants_at_their_beginning(self) -> None:
        """Not at the start of the new job, which for LATEST lies behind what came between the two jobs."""
        horizon = Position.trim_horizon()
        assert list(self.plan(row(0, Position.after(5))).values()) == [Position.after(5), horizon, horizon, horizon]

    def test_a_shard_behind_its_end_is_done(self) -> None:
        got = self.plan(end(0), row(1, Position.after(12)), row(2, Position.trim_horizon()))
        assert list(got.values()) == [None, Position.after(12), Position.trim_horizon(), Position.trim_horizon()]

    def test_a_child_without_a_row_starts_at_its_beginning(self) -> None:
        got = self.plan(end(0), row(1, Position.after(12)))
        assert got[shard_id(2)] == Position.trim_horizon()

    def test_a_parent_whose_row_the_kcl_deleted_is_done_if_rows_of_its_descendants_hold_all_its_keys(self) -> None:
        got = self.plan(row(1, Position.after(12)), row(2, Position.after(13)))
        assert got[shard_id(0)] is None

    def test_a_child_that_only_waits_does_not_prove_its_other_parent_done(self) -> None:
        """1 ended, so its merged child 3 has a row; 2 is not known yet, for 0 is still being read on its side."""
        got = self.plan(row(0, Position.after(5)), row(3, Position.trim_horizon()))
        assert got[shard_id(2)] == Position.trim_horizon()

    def test_nor_does_one_that_is_read_elsewhere_while_an_ancestor_is_left(self) -> None:
        got = self.plan(row(0, Position.after(5)), row(3, Position.after(30)))
        assert got[shard_id(2)] == Position.trim_horizon()

    def test_a_parent_without_a_row_is_read_if_a_part_of_its_keys_has_no_row(self) -> None:
        got = self.plan(row(1, Position.after(12)), start=StartingPosition.trim_horizon())
        assert got[shard_id(0)] == Position.trim_horizon()

    def test_a_parent_that_was_dropped_by_the_service_is_known_as_an_ancestor_from_its_row(self) -> None:
        listed = [Shard(shard_id(7), LOW, shard_id(3)), Shard(shard_id(8), HIGH, shard_id(3))]
        plan = resume(listed, {shard_id(3): end(3, hash_key_range=FULL_RANGE)}, StartingPosition.latest().pinned(T0))
        assert set(plan.positions.values()) == {Position.trim_horizon()}

    def test_without_hash_keys_in_the_row_parents_are_followed(self) -> None:
        listed = [Shard(shard_id(7), LOW, shard_id(3))]
        plan = resume(listed, {shard_id(3): end(3)}, StartingPosition.latest().pinned(T0))
        assert plan.positions == {shard_id(7): Position.trim_horizon()}

    def test_a_pinned_start_is_inherited_while_nothing_was_read(self) -> None:
        old = Position.at_timestamp(T0)
        plan = resume(
            self.shards(), {shard_id(0): row(0, old)}, StartingPosition.latest().pinned(Timestamp(1_800_000_000))
        )
        assert set(plan.positions.values()) == {old}
        assert plan.child_position == old

    def test_shards_not_listed_yet_start_at_their_beginning_as_soon_as_anything_was_read(self) -> None:
        rows = {shard_id(0): row(0, Position.at_timestamp(T0)), shard_id(1): row(1, Position.after(3))}
        assert (
            resume(self.shards(), rows, StartingPosition.latest().pinned(T0)).child_position == Position.trim_horizon()
        )

    def test_a_place_only_the_kcl_knows_is_the_sources_start(self) -> None:
        assert self.plan(row(0, None))[shard_id(0)] == Position.at_timestamp(T0)

    @given(st.lists(rows, max_size=6))
    def test_every_listed_shard_is_either_done_or_has_a_position(self, saved: list[ShardCheckpoint]) -> None:
        plan = resume(self.shards(), {r.shard_id: r for r in saved}, StartingPosition.trim_horizon())
        assert set(plan.positions) | plan.done == {s.shard_id for s in self.shards()}
        assert not set(plan.positions) & plan.done


class TestFile:
    def test_the_file_is_what_the_documentation_says(self, tmp_path: Path) -> None:
        """Pinned: a release reads what an older one wrote."""
        FileCheckpointStore(str(tmp_path)).save(
            "flights", [row(0, Position.after(495, 2), parents=(shard_id(9),), hash_key_range=LOW), end(1)]
        )
        assert json.loads((tmp_path / "flights.json").read_text()) == {
            "version": 1,
            "stream": "flights",
            "shards": {
                "shardId-000000000000": {
                    "ended": False,
                    "position": "AFTER_SEQUENCE_NUMBER",
                    "sequence_number": "495",
                    "sub_sequence_number": 2,
                    "parents": ["shardId-000000000009"],
                    "hash_key_range": ["0", str(HALF - 1)],
                },
                "shardId-000000000001": {"ended": True},
            },
        }

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}', '{"version": 9, "shards": {}}'])
    def test_a_file_that_is_no_checkpoint_is_an_error_that_names_it(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "flights.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"flights\.json"):
            FileCheckpointStore(str(tmp_path)).load("flights")

    @given(st.data())
    def test_a_changelog_cut_at_any_byte_holds_its_whole_batches(
        self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
    ) -> None:
        directory = tmp_path_factory.mktemp("cut")
        store = FileCheckpointStore(str(directory))
        states: list[dict[bytes, bytes]] = [{}]
        sizes = [0]
        for i in range(4):
            store.save_state("t", "s", {b"key": b"%d" % i, b"k%d" % i: b"v" * i, b"k%d" % (i - 2): None})
            states.append(store.load_state("t", "s"))
            sizes.append((directory / "state/t/s.log").stat().st_size)
        cut = data.draw(st.integers(0, sizes[-1]))
        with open(directory / "state/t/s.log", "r+b") as file:
            file.truncate(cut)
        whole = max(i for i, size in enumerate(sizes) if size <= cut)
        assert store.load_state("t", "s") == states[whole]
        store.save_state("t", "s", {b"after": b"x"})
        assert store.load_state("t", "s") == {**states[whole], b"after": b"x"}

    def test_a_changelog_is_rewritten_when_it_is_mostly_history(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(checkpoints_module, "_COMPACT_BYTES", 1000)
        store = FileCheckpointStore(str(tmp_path))
        for i in range(200):
            store.save_state("t", "s", {b"key": b"%d" % i})
        assert store.load_state("t", "s") == {b"key": b"199"}
        assert (tmp_path / "state/t/s.log").stat().st_size < 1100

    def test_kill_9_at_any_moment_leaves_a_whole_file_that_never_goes_back(self, tmp_path: Path) -> None:
        """A process that only saves is killed in the middle of it, 5 times; what it reported as saved is there."""
        program = (
            "import sys, itertools\n"
            "from samza_kinesis_io.checkpoints import FileCheckpointStore, ShardCheckpoint\n"
            "from samza_kinesis_io.positions import Position\n"
            "store = FileCheckpointStore(sys.argv[1])\n"
            "begin = max([r.position.sequence_number for r in store.load('s').values()], default=0)\n"
            "for n in itertools.count(begin + 1):\n"
            "    store.save('s', [ShardCheckpoint(f'shardId-{i:012d}', Position.after(n)) for i in range(50)])\n"
            "    store.save_state('t', 's', {b'n': b'%d' % n})\n"
            "    print(n, flush=True)\n"
        )
        store = FileCheckpointStore(str(tmp_path))
        reported = 0
        for _ in range(5):
            with subprocess.Popen(
                [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
            ) as process:
                assert process.stdout is not None
                for _ in range(3):
                    reported = int(process.stdout.readline())
                process.send_signal(signal.SIGKILL)
                for line in process.stdout:
                    if line.endswith("\n"):
                        reported = int(line)
            loaded = store.load("s")
            assert len(loaded) == 50
            (at,) = {r.position.sequence_number for r in loaded.values() if r.position is not None}
            assert at >= reported
            assert int(store.load_state("t", "s")[b"n"]) >= reported

    def test_an_empty_directory_name_is_refused(self) -> None:
        with pytest.raises(ConfigurationError, match=r"task\.checkpoint\.path"):
            FileCheckpointStore("")


class TestLeaseTable:
    def test_a_row_has_every_attribute_the_kcl_requires(self) -> None:
        """Pinned against KCL 3's DynamoDBLeaseSerializer."""
        got = lease_item(row(2, Position.after(495, 7), parents=(shard_id(0), shard_id(1)), hash_key_range=LOW))
        assert got == {
            "leaseKey": {"S": "shardId-000000000002"},
            "leaseCounter": {"N": "0"},
            "ownerSwitchesSinceCheckpoint": {"N": "0"},
            "checkpoint": {"S": "495"},
            "checkpointSubSequenceNumber": {"N": "7"},
            "parentShardId": {"SS": ["shardId-000000000000", "shardId-000000000001"]},
            "startingHashKey": {"S": "0"},
            "endingHashKey": {"S": str(HALF - 1)},
        }

    def test_a_table_of_several_streams_has_the_stream_in_its_keys(self) -> None:
        got = lease_item(row(2, Position.trim_horizon()), "123456789012:flights:1700000000")
        assert got["leaseKey"] == {"S": "123456789012:flights:1700000000:shardId-000000000002"}
        assert got["streamName"] == {"S": "123456789012:flights:1700000000"}
        assert got["shardId"] == {"S": "shardId-000000000002"}
        assert from_lease_item(got) == row(2, Position.trim_horizon())

    def test_a_shards_end_names_its_children(self) -> None:
        got = lease_item(end(0, children=(shard_id(2), shard_id(1))))
        assert got["checkpoint"] == {"S": "SHARD_END"}
        assert got["childShardIds"] == {"SS": [shard_id(1), shard_id(2)]}

    def test_a_pinned_start_is_an_attribute_of_ours_and_trim_horizon_for_the_kcl(self) -> None:
        got = lease_item(row(0, Position.at_timestamp(T0)))
        assert got["checkpoint"] == {"S": "TRIM_HORIZON"}
        assert from_lease_item(got) == row(0, Position.at_timestamp(T0))

    @given(rows)
    def test_a_row_survives_the_table(self, saved: ShardCheckpoint) -> None:
        assert from_lease_item(lease_item(saved)) == saved

    @pytest.mark.parametrize(
        "item",
        [
            {"leaseKey": {"S": "Leader"}, "entityType": {"S": "LEADER"}, "checkpoint": {"S": "1"}},
            {"leaseKey": {"S": "worker-1"}, "entityType": {"S": "WORKER_METRIC_STATS"}},
            {"leaseKey": {"S": "Migration3.0"}, "cv": {"S": "3"}},
        ],
    )
    def test_rows_that_are_no_leases_are_passed_over(self, item: Any) -> None:
        assert from_lease_item(item) is None

    def test_the_table_that_a_kcl_left_behind_is_where_a_job_goes_on(self) -> None:
        """Written by the KCL 3.0.1 (tests/kcl/test_round_trip.py): one parent ended, one child amid an aggregate."""
        path = Path(__file__).with_name("kcl_lease_table.json")
        found = {item["leaseKey"]["S"]: from_lease_item(item) for item in json.loads(path.read_text())}
        half, quarter = (MAX_HASH_KEY + 1) // 2, (MAX_HASH_KEY + 1) // 4
        second = Position.after(49680557649490263611988862327668122852878642294007267346, 0)
        third = Position.after(49680557649869376280363882921063349731137132777036578850, 8)
        fourth = Position.after(49680557649891677025562413544208512226868625026066677810, 0)
        assert found == {
            shard_id(0): end(0, children=(shard_id(2), shard_id(3)), hash_key_range=HashKeyRange(0, half - 1)),
            shard_id(1): row(1, second, hash_key_range=HashKeyRange(half, MAX_HASH_KEY)),
            shard_id(2): row(2, third, parents=(shard_id(0),), hash_key_range=HashKeyRange(0, quarter - 1)),
            shard_id(3): row(3, fourth, parents=(shard_id(0),), hash_key_range=HashKeyRange(quarter, half - 1)),
        }
        listed = [
            Shard(shard_id(0), HashKeyRange(0, half - 1)),
            Shard(shard_id(1), HashKeyRange(half, MAX_HASH_KEY)),
            Shard(shard_id(2), HashKeyRange(0, quarter - 1), shard_id(0)),
            Shard(shard_id(3), HashKeyRange(quarter, half - 1), shard_id(0)),
        ]
        plan = resume(listed, {k: v for k, v in found.items() if v}, StartingPosition.trim_horizon())
        assert plan.positions == {shard_id(1): second, shard_id(2): third, shard_id(3): fourth}
        assert plan.done == {shard_id(0)}

    def test_a_kcls_row_is_read_with_everything_it_may_carry(self) -> None:
        """As KCL 3 writes it, the number in pendingCheckpointState by its bug included."""
        item = {
            "leaseKey": {"S": shard_id(0)}, "leaseOwner": {"S": "worker-1"}, "leaseCounter": {"N": "4711"},
            "ownerSwitchesSinceCheckpoint": {"N": "2"}, "checkpoint": {"S": str(2**185)},
            "checkpointSubSequenceNumber": {"N": "3"}, "pendingCheckpoint": {"S": str(2**185 + 1)},
            "pendingCheckpointState": {"N": "0"}, "throughputKBps": {"N": "1.5"}, "entityType": {"S": "LEASE"},
            "startingHashKey": {"S": "0"}, "endingHashKey": {"S": str(MAX_HASH_KEY)},
        }  # fmt: skip
        assert from_lease_item(item) == row(0, Position.after(2**185, 3), hash_key_range=FULL_RANGE)

    @pytest.mark.parametrize("word", ["LATEST", "AT_TIMESTAMP"])
    def test_the_kcls_starts_have_no_place(self, word: str) -> None:
        assert from_lease_item({"leaseKey": {"S": shard_id(0)}, "checkpoint": {"S": word}}) == row(0, None)

    def test_a_row_that_is_nonsense_is_an_error_that_names_it(self) -> None:
        with pytest.raises(CheckpointError, match="shardId-000000000000 has the checkpoint 'x1'"):
            from_lease_item({"leaseKey": {"S": shard_id(0)}, "checkpoint": {"S": "x1"}})


class TestLeaseWatch:
    def item(self, counter: int, owner: str = "worker-1") -> Any:
        return {"leaseKey": {"S": shard_id(0)}, "leaseOwner": {"S": owner}, "leaseCounter": {"N": str(counter)}}

    def test_an_owner_lives_if_its_counter_moves(self) -> None:
        watch = LeaseWatch(10)
        assert watch.see(self.item(1), 0) is Ownership.UNKNOWN
        assert watch.see(self.item(2), 3) is Ownership.LIVE

    def test_an_owner_is_dead_when_its_counter_stood_still_for_the_failover_time(self) -> None:
        watch = LeaseWatch(10)
        watch.see(self.item(1), 0)
        assert watch.see(self.item(1), 9.9) is Ownership.UNKNOWN
        assert watch.see(self.item(1), 10) is Ownership.DEAD

    def test_another_owner_lives(self) -> None:
        watch = LeaseWatch(10)
        watch.see(self.item(1), 0)
        assert watch.see(self.item(1, "worker-2"), 20) is Ownership.LIVE


class DynamoDBAndKCL:
    """A table that a KCL application and we share."""

    def __init__(self, config: DynamoDBConfig) -> None:
        self.config = config
        self.clock = SimulatedClock()
        self.store = DynamoDBCheckpointStore("app", config=config, clock=self.clock)
        self.table = config.lease_table("app")

    def kcl_row(self, number: int, checkpoint: str, *, owner: str | None, counter: int) -> None:
        item = lease_item(row(number, Position.trim_horizon(), hash_key_range=FULL_RANGE))
        item |= {"checkpoint": {"S": checkpoint}, "leaseCounter": {"N": str(counter)}}
        if owner:
            item["leaseOwner"] = {"S": owner}
        assert self.table.put_if_absent(item)

    def heartbeat(self, number: int) -> None:
        item = self.table.get(shard_id(number))
        assert item is not None
        counter = int(item["leaseCounter"]["N"])
        assert self.table.update(shard_id(number), {"leaseCounter": {"N": str(counter + 1)}}, [], {})


class KCLTableContract:
    """Runs on moto in the default tier and on dynalite with the emulators."""

    def test_rows_of_a_live_worker_are_refused(self, kcl: DynamoDBAndKCL) -> None:
        kcl.kcl_row(0, "100", owner="worker-1", counter=7)
        kcl.store.load("flights")
        kcl.heartbeat(0)
        with pytest.raises(CheckpointError, match="belongs to the live KCL worker worker-1; stop that application"):
            kcl.store.save("flights", [row(0, Position.after(200))])
        assert kcl.store.load("flights")[shard_id(0)].position == Position.after(100, 0)

    def test_rows_of_a_dead_worker_are_taken_after_the_failover_time(self, kcl: DynamoDBAndKCL) -> None:
        kcl.kcl_row(0, "100", owner="worker-1", counter=7)
        kcl.store.load("flights")
        kcl.clock.advance(9)
        assert kcl.store.save("flights", [row(0, Position.after(200))]).deferred == (shard_id(0),)
        kcl.clock.advance(1)
        assert kcl.store.save("flights", [row(0, Position.after(200))]).written == 1
        item = kcl.table.get(shard_id(0))
        assert item is not None
        assert (item["checkpoint"], item["leaseCounter"]) == ({"S": "200"}, {"N": "8"})
        assert "leaseOwner" not in item

    def test_a_worker_that_comes_back_just_then_is_not_overwritten(self, kcl: DynamoDBAndKCL) -> None:
        kcl.kcl_row(0, "100", owner="worker-1", counter=7)
        kcl.store.load("flights")
        kcl.clock.advance(10)
        kcl.heartbeat(0)
        with pytest.raises(CheckpointError, match="live KCL worker"):
            kcl.store.save("flights", [row(0, Position.after(200))])

    def test_a_pending_checkpoint_and_the_pinned_start_go_with_the_first_position(self, kcl: DynamoDBAndKCL) -> None:
        kcl.store.save("flights", [row(0, Position.at_timestamp(T0))])
        assert kcl.table.update(shard_id(0), {"pendingCheckpoint": {"S": "5"}}, [], {})
        kcl.store.save("flights", [row(0, Position.after(9))])
        item = kcl.table.get(shard_id(0))
        assert item is not None
        assert set(item) == {
            "leaseKey", "leaseCounter", "ownerSwitchesSinceCheckpoint", "checkpoint", "checkpointSubSequenceNumber",
        }  # fmt: skip

    def test_an_end_is_written_after_the_childrens_rows(self, kcl: DynamoDBAndKCL) -> None:
        """What if the process dies between two rows: the parent must not be done before its children are known."""
        kcl.kcl_row(1, "5", owner="worker-1", counter=1)
        kcl.store.load("flights")
        kcl.heartbeat(1)
        children = [row(1, Position.after(6)), row(2, Position.trim_horizon())]
        with pytest.raises(CheckpointError):
            kcl.store.save("flights", [end(0, children=(shard_id(1), shard_id(2))), *children])
        assert shard_id(0) not in kcl.store.load("flights")

    def test_two_streams_in_one_single_stream_table_are_refused(self, kcl: DynamoDBAndKCL) -> None:
        kcl.store.load("flights")
        with pytest.raises(ConfigurationError, match=r"holds the stream flights and can't hold delays too"):
            kcl.store.load("delays")

    def test_several_streams_share_a_table_by_their_identifiers(self, kcl: DynamoDBAndKCL) -> None:
        identifiers = {"flights": "123456789012:flights:1", "delays": "123456789012:delays:2"}
        store = DynamoDBCheckpointStore("app", config=kcl.config, stream_identifiers=identifiers)
        store.save("flights", [row(0, Position.after(1))])
        store.save("delays", [row(0, Position.after(2))])
        assert store.load("flights") == {shard_id(0): row(0, Position.after(1))}
        assert store.load("delays") == {shard_id(0): row(0, Position.after(2))}

    def test_two_processes_race_for_every_row_and_the_newest_stays(self, kcl: DynamoDBAndKCL) -> None:
        stores = [DynamoDBCheckpointStore("app", config=kcl.config) for _ in range(2)]
        failures: list[BaseException] = []

        def write(who: int) -> None:
            try:
                for number in range(who, 30, 2):
                    stores[who].save("flights", [row(n, Position.after(number)) for n in range(3)])
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=write, args=(who,)) for who in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert {r.position for r in kcl.store.load("flights").values()} == {Position.after(29)}

    def test_more_rows_than_a_page_are_all_read(self, kcl: DynamoDBAndKCL) -> None:
        padding = "x" * 300_000  # a page is 1 MiB
        for n in range(8):
            kcl.store.save("flights", [row(n, Position.after(n))])
            assert kcl.table.update(shard_id(n), {"padding": {"S": padding}}, [], {})
        assert len(kcl.store.load("flights")) == 8


class TestKCLTableOnMoto(KCLTableContract):
    @pytest.fixture
    def kcl(self) -> Iterator[DynamoDBAndKCL]:
        with dynamodb_on_moto():
            yield DynamoDBAndKCL(DynamoDBConfig())


@pytest.fixture(scope="module")
def dynalite_endpoint() -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *dynalite(),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--createTableMs",
        "20",
        "--deleteTableMs",
        "20",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "istening" in process.stdout.readline()
        yield f"http://127.0.0.1:{port}"
        process.terminate()


@pytest.mark.emulators
class TestKCLTableOnDynalite(KCLTableContract):
    @pytest.fixture
    def kcl(self, dynalite_endpoint: str) -> Iterator[DynamoDBAndKCL]:
        config = DynamoDBConfig(region="us-east-1", endpoint_url=dynalite_endpoint)
        yield DynamoDBAndKCL(config)
        client = config._client()
        for name in client.list_tables()["TableNames"]:
            client.delete_table(TableName=name)
            client.get_waiter("table_not_exists").wait(TableName=name, WaiterConfig={"Delay": 1})


class TestDynamoDBOptions:
    def test_an_empty_table_name_is_refused(self) -> None:
        with pytest.raises(ConfigurationError, match="needs a table's name"):
            DynamoDBCheckpointStore("")

    def test_an_identifier_of_another_form_is_refused(self) -> None:
        with pytest.raises(ConfigurationError, match="must be account:stream:creationEpoch, got 'flights'"):
            DynamoDBCheckpointStore("app", stream_identifiers={"flights": "flights"})

    def test_an_error_names_the_table(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # botocore's back-off
        config = DynamoDBConfig(region="us-east-1", endpoint_url="http://127.0.0.1:1")
        store = DynamoDBCheckpointStore("app", config=config)
        with pytest.raises(CheckpointError, match="table app failed"):
            store.load("flights")
