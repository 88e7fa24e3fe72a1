"""Reshards of every kind: every record once, parents before children, whoever listed what when."""

from __future__ import annotations

import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lineages import assert_parents_first
from miniature_runner import MiniatureRunner
from numbered_stream import Stream

from samza_kinesis_io.client import ClientConfig, KinesisClient, ShardFilter, StreamId
from samza_kinesis_io.errors import DataLoss, IncompleteShardList, StreamNotFound
from samza_kinesis_io.positions import StartingPosition
from samza_kinesis_io.shards import Shard, uncovered
from samza_kinesis_io.source import DataLossPolicy, ReadFromKinesis
from samza_kinesis_io.testing import FakeKinesis, SimulatedClock


def shards_read(runner: MiniatureRunner) -> list[str]:
    return [e.record.shard_id for e in runner.books.emitted]


def reshard(stream: Stream, rng: random.Random) -> None:
    """Split a shard or merge two, at random."""
    shards = [s for s in stream.fake.shards("flights") if not s.is_closed]
    shards.sort(key=lambda s: s.hash_key_range)
    at = rng.randrange(len(shards))
    if len(shards) > 1 and rng.random() < 0.5:
        at = min(at, len(shards) - 2)
        stream.fake.merge("flights", shards[at].shard_id, shards[at + 1].shard_id)
    else:
        stream.fake.split("flights", shards[at].shard_id)


class RetoldLists:
    """A client factory whose ListShards tells what the service said in another way."""

    def __init__(self, fake: FakeKinesis, retell: Any) -> None:
        self.fake = fake
        self.retell = retell

    def connect(self, stream: StreamId | None = None) -> KinesisClient:
        client: Any = self.fake.factory().connect(stream)
        list_shards = client.list_shards

        def told(stream: StreamId, shard_filter: ShardFilter | None = None) -> list[Shard]:
            retold: list[Shard] = self.retell(list_shards(stream, shard_filter))
            return retold

        client.list_shards = told
        return client  # type: ignore[no-any-return]

    def __reduce__(self) -> Any:
        return (_Kept(self), ())


class _Kept:
    """Pickles a factory of these tests as a reference within this process."""

    kept: dict[int, RetoldLists] = {}

    def __init__(self, factory: RetoldLists) -> None:
        self.key = id(factory)
        _Kept.kept[self.key] = factory

    def __call__(self) -> RetoldLists:
        return _Kept.kept[self.key]


def read_of(stream: Stream, factory: object, **options: Any) -> MiniatureRunner:
    options.setdefault("starting_position", StartingPosition.trim_horizon())
    read = ReadFromKinesis("flights", client=factory, clock=stream.clock, **options)
    return MiniatureRunner(stream.clock, read)


def test_shards_without_parents_are_all_read_at_once() -> None:
    stream = Stream(shards=4)
    stream.put(40)
    runner = stream.read(max_records_per_get=2)
    while len(runner.books.emitted) < 16:
        runner.bundle()
    assert len(set(shards_read(runner))) == 4


def test_a_stream_resharded_before_the_start_is_read_in_the_order_of_its_generations() -> None:
    stream = Stream(shards=2)
    rng = random.Random(1)
    for _ in range(8):
        stream.put(10)
        reshard(stream, rng)
    stream.put(10)
    runner = stream.read(max_records_per_get=3)
    runner.run()
    assert sorted(runner.numbers) == list(range(90))
    assert_parents_first(stream.fake.shards("flights"), shards_read(runner))


def test_ten_rounds_of_resharding_while_it_reads() -> None:
    stream = Stream(shards=3)
    rng = random.Random(2)
    runner = stream.read(max_records_per_get=3, bundle_records=5)
    for _ in range(10):
        stream.put(12)
        reshard(stream, rng)
        for _ in range(rng.randrange(8)):
            runner.bundle()
    runner.run()
    assert sorted(runner.numbers) == list(range(120))
    assert_parents_first(stream.fake.shards("flights"), shards_read(runner))


@pytest.mark.parametrize("script", range(4))
def test_stop_and_restart_after_each_step_of_a_random_script(script: int) -> None:
    """Each restart has nothing but the runner's checkpoint."""
    stream = Stream(shards=2)
    rng = random.Random(script)
    runner = stream.read()
    expected = 0
    for _ in range(6):
        reshard(stream, rng)
        stream.put(10)
        expected += 10
        runner.new_process()
        runner.run()
        assert sorted(runner.numbers) == list(range(expected))
    assert_parents_first(stream.fake.shards("flights"), shards_read(runner))


def test_children_listed_before_their_parents_still_wait_for_them() -> None:
    stream = Stream(shards=2)
    stream.put(20)
    child = stream.fake.merge("flights", *stream.open_shards)
    stream.put(10)
    runner = read_of(stream, RetoldLists(stream.fake, lambda listed: listed[::-1]), max_records_per_get=3)
    runner.run()
    assert sorted(runner.numbers) == list(range(30))
    assert set(shards_read(runner)[20:]) == {child}


def test_a_shard_listed_twice_is_read_once() -> None:
    stream = Stream(shards=2)
    stream.put(20)
    runner = read_of(stream, RetoldLists(stream.fake, lambda listed: listed + listed))
    runner.run()
    assert sorted(runner.numbers) == list(range(20))


def test_a_list_with_a_hole_is_asked_for_again() -> None:
    """Paging raced a reshard: neither the parent nor a child is in it."""
    stream = Stream(shards=3)
    stream.put(30)
    answers = iter([slice(1, None), slice(0, 2)])
    retell = RetoldLists(stream.fake, lambda listed: listed[next(answers, slice(None))])
    runner = read_of(stream, retell)
    runner.run()
    assert sorted(runner.numbers) == list(range(30))


def test_a_list_whose_hole_stays_fails_and_names_it() -> None:
    stream = Stream(shards=2)
    retell = RetoldLists(stream.fake, lambda listed: listed[1:])
    with pytest.raises(IncompleteShardList, match="leave hash keys to nobody, the first are 0 to 1701411834604692317"):
        read_of(stream, retell)


def test_a_reshard_between_planning_and_reading() -> None:
    stream = Stream(shards=2)
    stream.put(20)
    runner = stream.read(restrictions=2)
    stream.fake.merge("flights", *stream.open_shards)
    stream.put(20)
    stream.fake.split("flights", stream.open_shards[0])
    stream.put(20)
    runner.run()
    assert sorted(runner.numbers) == list(range(60))


@pytest.mark.parametrize("restrictions", [1, 2])
def test_a_reshard_while_a_bundle_is_replayed(restrictions: int) -> None:
    stream = Stream(shards=2)
    stream.put(40)
    runner = stream.read(max_records_per_get=5, restrictions=restrictions)
    runner.bundle(0)
    for _ in range(3):
        runner.failing_bundle(0)
        stream.put(5)
        stream.fake.split("flights", stream.open_shards[0])
        stream.put(5)
        runner.failing_bundle(restrictions - 1, after_batches=1)
    runner.run()
    assert sorted(runner.numbers) == list(range(70))


def test_a_shard_that_closes_between_the_last_read_and_a_restart_is_read_to_its_end() -> None:
    stream = Stream()
    stream.put(10)
    runner = stream.read()
    runner.run()
    stream.put(10)
    stream.fake.split("flights", stream.open_shards[0])
    stream.put(10)
    runner.new_process()
    runner.run()
    assert sorted(runner.numbers) == list(range(30))


def test_a_restart_from_a_checkpoint_exactly_at_a_shards_end() -> None:
    """The parent is not read again and the children start."""
    stream = Stream()
    stream.put(10)
    parent = stream.open_shards[0]
    children = stream.fake.split("flights", parent)
    stream.put(10)
    runner = stream.read(bundle_records=1)
    while any(s.shard_id == parent for s in runner.frontier().shards):
        runner.bundle()
    runner.new_process()
    assert {s.shard_id for s in runner.frontier().shards} == set(children)
    runner.run()
    assert sorted(runner.numbers) == list(range(20))


def test_a_restart_with_one_child_begun_reads_neither_the_parent_nor_that_child_again() -> None:
    stream = Stream()
    stream.put(10)
    lower, upper = stream.fake.split("flights", stream.open_shards[0])
    stream.put(10, shard_id=lower)
    stream.put(10, shard_id=upper)
    runner = stream.read(bundle_records=3, max_records_per_get=3)
    while len(set(shards_read(runner))) < 2:
        runner.bundle()
    runner.new_process()
    runner.run()
    assert sorted(runner.numbers) == list(range(30))


def test_a_bundle_that_fails_behind_a_shards_end_reads_that_end_again() -> None:
    stream = Stream()
    stream.put(3)
    stream.fake.split("flights", stream.open_shards[0])
    stream.put(20)
    runner = stream.read(max_records_per_get=2)
    for after in range(5):
        runner.failing_bundle(after_batches=after)
        runner.bundle()
    runner.run()
    assert sorted(runner.numbers) == list(range(23))


def test_update_shard_count_leaves_shards_that_never_held_anything() -> None:
    """Between two and three shards lie some that are opened and closed at once."""
    stream = Stream(shards=2)
    runner = stream.read(max_records_per_get=4)
    for count in (3, 5, 4, 2):
        stream.put(20)
        stream.fake.call(
            "UpdateShardCount",
            {"StreamName": "flights", "TargetShardCount": count, "ScalingType": "UNIFORM_SCALING"},
        )
        runner.bundle()
    stream.put(20)
    runner.run()
    assert sorted(runner.numbers) == list(range(100))
    assert_parents_first(stream.fake.shards("flights"), shards_read(runner))


def test_a_parent_that_was_trimmed_before_the_start_is_not_waited_for() -> None:
    stream = Stream()
    children = stream.fake.split("flights", stream.open_shards[0])
    stream.clock.advance(25 * 3600)
    stream.put(20)
    runner = stream.read()
    assert {s.shard_id for s in runner.frontier().shards} == set(children)
    runner.run()
    assert sorted(runner.numbers) == list(range(20))


def test_a_merge_child_with_one_trimmed_parent_waits_for_the_other() -> None:
    stream = Stream(shards=2)
    first, second = stream.open_shards
    lower, upper = stream.fake.split("flights", first)
    stream.clock.advance(25 * 3600)
    stream.put(20)
    child = stream.fake.merge("flights", upper, second)
    stream.put(20)
    stream.fake.trim("flights", upper)
    listed = {s.shard_id for s in stream.fake.shards("flights")}
    assert upper not in listed
    left = [int(r.data) for r in stream.fake.records("flights")]
    runner = stream.read(max_records_per_get=3)
    assert {s.shard_id for s in runner.frontier().shards} == {lower, second, child}
    runner.run()
    assert sorted(runner.numbers) == sorted(left)
    assert_parents_first(stream.fake.shards("flights"), shards_read(runner))


def test_several_restrictions_and_a_trimmed_generation_need_one_restriction_and_say_so() -> None:
    stream = Stream(shards=2)
    stream.put(10)
    runner = stream.read(restrictions=2, on_data_loss=DataLossPolicy.CONTINUE)
    runner.run(idle_rounds=5)
    child = stream.fake.merge("flights", *stream.open_shards)
    stream.clock.advance(25 * 3600)
    stream.put(10)
    assert [s.shard_id for s in stream.fake.shards("flights")] == [child]
    runner.new_process()
    with pytest.raises(DataLoss, match="restrictions=1"):
        runner.run()


def test_shards_that_nobody_has_parents_of_are_dealt_out_by_hash_range() -> None:
    stream = Stream(shards=8)
    runner = stream.read(restrictions=4)
    dealt = [[s.hash_key_range for s in runner.frontier(i).shards] for i in range(4)]
    assert [len(part) for part in dealt] == [2, 2, 2, 2]
    flat = [r for part in dealt for r in part]
    assert flat == sorted(flat)


def test_a_stream_that_does_not_exist_fails_at_once_and_is_named() -> None:
    stream = Stream()
    with pytest.raises(StreamNotFound, match="stream missing"):
        MiniatureRunner(
            stream.clock,
            ReadFromKinesis(
                "missing",
                starting_position=StartingPosition.trim_horizon(),
                client=stream.fake.factory(),
                clock=stream.clock,
            ),
        )
    assert stream.clock.now_seconds() < 1_700_000_001


def test_a_stream_that_is_being_created_is_waited_for() -> None:
    clock = SimulatedClock()
    fake = FakeKinesis(clock=clock, transition_seconds=20)
    fake.call("CreateStream", {"StreamName": "flights", "ShardCount": 2})
    read = ReadFromKinesis(
        "flights", starting_position=StartingPosition.trim_horizon(), client=fake.factory(), clock=clock
    )
    runner = MiniatureRunner(clock, read)
    assert len(runner.frontier().shards) == 2
    assert clock.now_seconds() >= 1_700_000_020


@pytest.mark.parametrize("operation", ["ListShards", "DescribeStreamSummary"])
def test_planning_survives_throttles_and_failures(operation: str) -> None:
    stream = Stream(shards=2)
    stream.put(10)
    stream.fake.faults.throttle(operation, times=2)
    stream.fake.faults.internal_failure(operation, times=2)
    stream.fake.faults.drop_connection(operation, times=1)
    runner = stream.read()
    runner.run()
    assert sorted(runner.numbers) == list(range(10))


def test_a_listing_in_mid_run_that_fails_a_few_times_delays_only() -> None:
    stream = Stream()
    stream.put(10)
    stream.fake.split("flights", stream.open_shards[0])
    stream.put(10)
    stream.fake.faults.end_without_children(times=100)
    stream.fake.faults.throttle("ListShards", after=1, times=2)
    stream.fake.faults.internal_failure("ListShards", after=1, times=2)
    runner = stream.read()
    runner.run(idle_rounds=2000)
    assert sorted(runner.numbers) == list(range(20))


def test_a_shard_that_is_listed_but_never_found_fails_and_does_not_hang() -> None:
    stream = Stream()
    stream.put(10)
    stream.fake.faults.fail("GetRecords", "ResourceNotFoundException", times=None)
    runner = stream.read()
    with pytest.raises(IncompleteShardList, match="is listed, but GetRecords does not find it, after 5 tries"):
        runner.run(idle_rounds=3000)


def test_a_shard_that_is_not_found_for_a_moment_is_asked_again() -> None:
    stream = Stream()
    stream.put(10)
    stream.fake.faults.fail("GetRecords", "ResourceNotFoundException", times=2)
    runner = stream.read()
    runner.run(idle_rounds=500)
    assert runner.numbers == list(range(10))


@pytest.mark.parametrize("said", ["", ', "NextShardIterator": null', ', "NextShardIterator": ""'])
def test_every_way_to_say_that_there_is_no_next_iterator(said: str) -> None:
    body = b'{"Records": [], "MillisBehindLatest": 0%s}' % said.encode()

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = ClientConfig(endpoint_url=f"http://127.0.0.1:{server.server_port}").connect()
        try:
            assert client.get_records(StreamId("flights"), "iterator", 10).next_shard_iterator is None
        finally:
            client.close()
            server.shutdown()


def test_a_stream_deleted_while_it_is_read_is_named() -> None:
    stream = Stream()
    stream.put(10)
    runner = stream.read()
    runner.run(idle_rounds=5)
    stream.fake.call("DeleteStream", {"StreamName": "flights"})
    with pytest.raises(StreamNotFound, match="stream flights"):
        runner.run()


def test_five_thousand_shards_are_planned_in_seconds_with_one_pass_of_list_shards() -> None:
    """Five pages, and every page but the first asked for by NextToken alone."""
    clock = SimulatedClock()
    fake = FakeKinesis(clock=clock, log_calls=True)
    fake.create_stream("flights", shards=5000)
    read = ReadFromKinesis(
        "flights", starting_position=StartingPosition.trim_horizon(), client=fake.factory(), clock=clock
    )
    began = time.perf_counter()
    runner = MiniatureRunner(clock, read, restrictions=16)
    elapsed = time.perf_counter() - began
    pages = [call.params for call in fake.log if call.operation == "ListShards"]
    assert [sorted(p) for p in pages] == [["StreamName"], *[["NextToken"]] * 4]
    assert sum(len(runner.frontier(i).shards) for i in range(16)) == 5000
    assert elapsed < 15, "it takes a second; this bound leaves room for a busy machine"


def test_records_on_the_last_page_of_shards_are_read() -> None:
    stream = Stream(shards=1200)
    last = stream.open_shards[-1]
    stream.put(5, shard_id=last)
    runner = stream.read()
    for _ in range(200):
        if runner.bundle():
            break
    assert runner.numbers == list(range(5))


@given(st.integers(0, 1 << 32), st.integers(1, 3))
def test_any_history_is_read_once_and_in_order_from_its_end(seed: int, restrictions: int) -> None:
    """Everything happened before the read starts; some generations of it are gone."""
    rng = random.Random(seed)
    stream = Stream(shards=rng.randint(1, 3))
    for _ in range(rng.randint(0, 6)):
        stream.put(rng.randint(0, 5))
        reshard(stream, rng)
        if rng.random() < 0.2:
            stream.clock.advance(25 * 3600)
    stream.put(3)
    expected = sorted(int(r.data) for r in stream.fake.records("flights"))
    runner = stream.read(restrictions=restrictions, max_records_per_get=rng.choice([1, 3, 10_000]))
    runner.run()
    assert sorted(runner.numbers) == expected
    if restrictions == 1:
        assert_parents_first(stream.fake.shards("flights"), shards_read(runner))


@given(st.integers(0, 1 << 32), st.booleans())
def test_named_starts_of_any_history_read_what_was_not_read(seed: int, behind: bool) -> None:
    """Each shard is named, or counts as read because named descendants cover it, or is read whole."""
    rng = random.Random(seed)
    stream = Stream(shards=rng.randint(1, 3))
    for _ in range(rng.randint(0, 6)):
        stream.put(rng.randint(1, 6))
        reshard(stream, rng)
    stream.put(rng.randint(1, 10))
    listed = stream.fake.shards("flights")
    records = {s.shard_id: stream.fake.records("flights", s.shard_id) for s in listed}
    holding = [s for s in listed if records[s.shard_id]]
    named = {
        s.shard_id: rng.randrange(len(records[s.shard_id])) for s in rng.sample(holding, rng.randint(1, len(holding)))
    }
    numbers = {shard: records[shard][at].sequence_number for shard, at in named.items()}
    make = StartingPosition.after_sequence_numbers if behind else StartingPosition.at_sequence_numbers
    runner = stream.read(
        starting_position=make(numbers, otherwise=StartingPosition.trim_horizon()),
        restrictions=rng.randint(1, 3),
        max_records_per_get=rng.choice([1, 10_000]),
    )
    runner.run()
    expected: list[int] = []
    for shard in listed:
        found = [int(r.data) for r in records[shard.shard_id]]
        if shard.shard_id in named:
            expected += found[named[shard.shard_id] + behind :]
        elif uncovered(
            shard.hash_key_range,
            [s.hash_key_range for s in listed if s.shard_id in named and s.shard_id > shard.shard_id],
        ):
            expected += found
    assert sorted(runner.numbers) == sorted(expected)
