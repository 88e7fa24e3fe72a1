"""`KinesisSystemConsumer`: prefetch, warm reuse, memory and threads."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from samza_kinesis_io import metrics
from samza_kinesis_io.aggregation import Aggregate
from samza_kinesis_io.client import ClientConfig, KinesisClient, StreamId
from samza_kinesis_io.clock import SystemClock
from samza_kinesis_io.consumer import (
    IDLE_SECONDS,
    Attachment,
    Batch,
    KinesisSystemConsumer,
    SourceConfig,
    shared_consumer,
)
from samza_kinesis_io.errors import AccessRefused, KinesisIOError, StaleAttachment
from samza_kinesis_io.limits import KIB, MIB
from samza_kinesis_io.polling import ReadLimits
from samza_kinesis_io.positions import Position
from samza_kinesis_io.restriction import Advance, Claim, FrontierTracker, ShardFrontier, ShardState
from samza_kinesis_io.testing import FakeKinesis, LocalKinesis, SimulatedClock
from tiers import ROOT

UNLIMITED = ReadLimits(calls_per_second=None, bytes_per_second=None)
FLIGHTS = (StreamId("flights"),)


def frontier_of(fake: FakeKinesis) -> ShardFrontier:
    return ShardFrontier(
        tuple(ShardState(0, s.shard_id, s.hash_key_range, Position.trim_horizon()) for s in fake.shards("flights"))
    )


def config_of(fake: FakeKinesis, **options: Any) -> SourceConfig:
    options = {"uid": "a source", "streams": FLIGHTS, "factory": fake.factory(), "limits": UNLIMITED} | options
    return SourceConfig(**options)


@dataclass
class Reading:
    """What a bundle does, without Beam: poll, claim, emit, commit."""

    consumer: KinesisSystemConsumer
    config: SourceConfig
    tracker: FrontierTracker
    index: int = 0
    emitted: list[bytes] = field(default_factory=list)
    keep: bool = True

    def __post_init__(self) -> None:
        self.attachment = self.attach()

    def attach(self) -> Attachment:
        return self.consumer.attach((self.config.uid, self.index, b""), self.config, self.tracker.current_restriction())

    def take(self, max_records: int = 10_000) -> Batch | None:
        self.attachment.take_evidence()
        batch = self.attachment.poll(max_records)
        if batch is not None:
            self.claim(batch)
            if self.keep:
                self.emitted += [r.data for r in batch.records]
            self.attachment.commit(batch, self.tracker.current_restriction())
        return batch

    def claim(self, batch: Batch) -> None:
        advance = Advance(batch.key, batch.position, 0, batch.read_until_micros)
        ended = batch.key if batch.children is not None else None
        assert self.tracker.try_claim(Claim((advance,), ended))

    def read(self, count: int, *, max_records: int = 10_000) -> None:
        """Read until `count` records are emitted; waits for them."""
        deadline = time.monotonic() + 60
        while len(self.emitted) < count:
            if self.take(max_records) is None:
                assert time.monotonic() < deadline, f"{len(self.emitted)} of {count} records after a minute"
                self.attachment.wait(1.0)


def reading(consumer: KinesisSystemConsumer, fake: FakeKinesis, *, index: int = 0, **options: Any) -> Reading:
    return Reading(consumer, config_of(fake, **options), FrontierTracker(frontier_of(fake)), index)


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait until other threads have made something true."""
    never = threading.Event()
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, f"still not after 30 s: {what}"
        never.wait(0.002)


# In the caller's thread, on a simulated clock.


class Inline:
    def __init__(self, shards: int = 1, **options: Any) -> None:
        self.clock = SimulatedClock()
        self.fake = FakeKinesis(clock=self.clock, log_calls=True, **options)
        self.fake.create_stream("flights", shards=shards)
        self.consumer = KinesisSystemConsumer(clock=self.clock, max_threads=0, seed=0)

    def put(self, *data: bytes, shard_id: str | None = None) -> None:
        for one in data:
            self.fake.put("flights", one, partition_key=one.decode(), shard_id=shard_id)

    def iterators(self) -> int:
        return self.fake.calls["GetShardIterator"]


def test_polling_never_waits() -> None:
    inline = Inline()
    inline.put(b"1")
    attached = reading(inline.consumer, inline.fake)
    start = inline.clock.monotonic_seconds()
    assert attached.attachment.poll(10) is None
    assert inline.clock.monotonic_seconds() == start


def test_a_batch_is_cut_to_what_is_asked_for() -> None:
    inline = Inline()
    inline.put(*[b"%d" % i for i in range(10)])
    attached = reading(inline.consumer, inline.fake)
    attached.attachment.wait(1)
    sizes = []
    while (batch := attached.take(4)) is not None:
        sizes.append(len(batch.records))
    assert sizes == [4, 4, 2]
    assert attached.emitted == [b"%d" % i for i in range(10)]


def test_the_evidence_of_an_answer_comes_with_its_last_records() -> None:
    inline = Inline()
    inline.put(b"1", b"2", b"3")
    attached = reading(inline.consumer, inline.fake)
    attached.attachment.wait(1)
    first, second = attached.take(2), attached.take(2)
    assert first is not None
    assert first.read_until_micros is None
    assert second is not None
    assert second.read_until_micros is not None


def test_a_batch_that_was_pushed_back_is_the_next_one() -> None:
    inline = Inline()
    inline.put(b"1", b"2", b"3")
    attached = reading(inline.consumer, inline.fake)
    attached.attachment.wait(1)
    batch = attached.attachment.poll(2)
    assert batch is not None
    attached.attachment.push_back(batch)
    attached.read(3)
    assert attached.emitted == [b"1", b"2", b"3"]


def test_buffers_stay_warm_from_bundle_to_bundle() -> None:
    inline = Inline(shards=4)
    inline.put(*[b"%d" % i for i in range(100)])
    attached = reading(inline.consumer, inline.fake)
    attached.attachment.wait(1)
    while len(attached.emitted) < 100:
        if attached.take(3) is None:
            attached.attachment.wait(1)
        attached.attachment.detach()
        attached.attachment = attached.attach()
    assert inline.iterators() == 4
    assert inline.fake.calls["GetRecords"] < 100


def test_a_batch_handed_over_and_never_committed_is_read_again() -> None:
    """The bundle failed between; the process and its buffers live on."""
    inline = Inline()
    inline.put(b"1", b"2", b"3")
    attached = reading(inline.consumer, inline.fake)
    attached.attachment.wait(1)
    assert attached.attachment.poll(2) is not None
    attached.attachment.detach()
    attached.attachment = attached.attach()
    attached.read(3)
    assert attached.emitted == [b"1", b"2", b"3"]


def test_a_frontier_whose_claims_differ_finds_no_warm_buffer() -> None:
    """Its positions are the same, but something was claimed since."""
    inline = Inline()
    inline.put(b"1", b"2")
    attached = reading(inline.consumer, inline.fake)
    attached.attachment.wait(1)
    before = inline.iterators()
    assert attached.tracker.try_claim(Claim(()))
    attached.attachment = attached.attach()
    attached.read(2)
    assert inline.iterators() == before + 1


def test_a_frontier_that_is_further_on_than_the_buffer_is_believed() -> None:
    """Another worker read on meanwhile and the restriction came back."""
    inline = Inline()
    inline.put(b"1", b"2", b"3")
    attached = reading(inline.consumer, inline.fake)
    attached.attachment.wait(1)
    second = inline.fake.records("flights")[1].sequence_number
    key = attached.tracker.current_restriction().shards[0].key
    assert attached.tracker.try_claim(Claim((Advance(key, Position.after(int(second)), 0, None),)))
    attached.attachment = attached.attach()
    attached.read(1)
    assert attached.emitted == [b"3"]


def test_a_newer_attachment_revokes_the_older_one() -> None:
    inline = Inline()
    inline.put(b"1", b"2")
    old = reading(inline.consumer, inline.fake)
    old.attachment.wait(1)
    batch = old.attachment.poll(1)
    assert batch is not None
    new = reading(inline.consumer, inline.fake)
    for call in (
        lambda: old.attachment.poll(1),
        lambda: old.attachment.commit(batch, old.tracker.current_restriction()),
        lambda: old.attachment.push_back(batch),
        lambda: old.attachment.wait(1),
        old.attachment.take_evidence,
    ):
        with pytest.raises(StaleAttachment, match="another attempt reads this restriction now"):
            call()
    old.attachment.detach()  # never raises, and is not the new one's end
    new.read(2)
    assert new.emitted == [b"1", b"2"]


def test_shards_take_turns_and_a_hot_one_starves_none() -> None:
    inline = Inline(shards=20)
    shards = [s.shard_id for s in inline.fake.shards("flights")]
    for i in range(5000):
        inline.put(b"hot %d" % i, shard_id=shards[0])
    for shard in shards[1:]:
        inline.put(b"calm", shard_id=shard)
    attached = reading(inline.consumer, inline.fake, max_records_per_get=100)
    attached.read(5019, max_records=100)
    last_calm = max(i for i, data in enumerate(attached.emitted) if data == b"calm")
    assert last_calm < 1000


def test_a_shard_that_fails_holds_no_other() -> None:
    inline = Inline(shards=3)
    shards = [s.shard_id for s in inline.fake.shards("flights")]
    inline.fake.faults.throttle("GetShardIterator", times=None, where=lambda p: p["ShardId"] == shards[0])
    for shard in shards:
        inline.put(b"1", b"2", shard_id=shard)
    attached = reading(inline.consumer, inline.fake)
    attached.read(4)
    attached.attachment.wait(60)
    assert attached.take() is None
    inline.fake.faults.clear()
    attached.read(6)


def test_max_records_per_get_is_what_is_asked_for() -> None:
    inline = Inline()
    inline.put(*[b"%d" % i for i in range(10)])
    attached = reading(inline.consumer, inline.fake, max_records_per_get=4)
    attached.read(10)
    assert {c.params["Limit"] for c in inline.fake.log if c.operation == "GetRecords"} == {4}


def test_a_finished_shard_is_gone_from_the_gauges() -> None:
    inline = Inline(shards=2)
    shards = [s.shard_id for s in inline.fake.shards("flights")]
    inline.put(b"1", b"2", shard_id=shards[0])
    inline.clock.advance(100)
    attached = reading(inline.consumer, inline.fake, max_records_per_get=1)
    attached.read(1)
    lag = attached.attachment.max_millis_behind_latest()
    assert lag is not None
    assert lag >= 100_000
    assert attached.attachment.shards_open() == 2
    inline.fake.split("flights", shards[0])
    attached.read(2)
    while attached.attachment.shards_open() > 1:
        attached.attachment.wait(1)
        attached.take()
    attached.attachment.wait(1)
    assert attached.attachment.max_millis_behind_latest() == 0


def test_the_lag_of_an_idle_stream_stays_zero() -> None:
    inline = Inline()
    attached = reading(inline.consumer, inline.fake)
    for _ in range(5):
        attached.attachment.wait(600)
        assert attached.attachment.max_millis_behind_latest() == 0


def test_the_backlog_is_lag_by_rate() -> None:
    """What an autoscaling runner sees as the restriction's size."""
    inline = Inline(enforce_limits=True)
    for _ in range(200):
        inline.fake.put("flights", b"x" * KIB)
        inline.clock.advance(1)
    attached = reading(inline.consumer, inline.fake, limits=ReadLimits(), max_records_per_get=10)
    key = (attached.config.uid, 0, b"")
    assert inline.consumer.backlog_bytes(key, attached.tracker.current_restriction()) is None, "nothing is known"
    attached.read(100)
    backlog = inline.consumer.backlog_bytes(key, attached.tracker.current_restriction())
    assert backlog is not None
    # Half of the records lie behind; they are read at 50 KiB/s, and the lag is about 100 s.
    assert backlog == pytest.approx(100 * 50 * KIB, rel=0.3)


def test_idle_shards_leave_one_piece_of_evidence_however_long_nobody_asks() -> None:
    inline = Inline(shards=1)
    attached = reading(inline.consumer, inline.fake, poll_interval_seconds=0.5)
    attached.attachment.wait(300)
    assert inline.fake.calls["GetRecords"] > 500
    (evidence,) = attached.attachment.take_evidence()
    assert evidence.read_until_micros is not None
    assert evidence.read_until_micros / 1e6 > inline.clock.now_seconds() - 2
    assert attached.attachment.take_evidence() == []


def test_evidence_waits_for_the_records_before_it() -> None:
    inline = Inline()
    attached = reading(inline.consumer, inline.fake)
    inline.put(b"1")
    attached.attachment.wait(1)
    assert attached.attachment.take_evidence() == []
    attached.read(1)
    attached.attachment.wait(1)
    assert len(attached.attachment.take_evidence()) == 1


def test_an_error_comes_behind_everything_that_was_read_before_it() -> None:
    inline = Inline()
    inline.put(*[b"%d" % i for i in range(10)])
    inline.fake.faults.fail("GetRecords", "AccessDeniedException", after=2, times=1)
    attached = reading(inline.consumer, inline.fake, max_records_per_get=3)
    with pytest.raises(AccessRefused):
        attached.read(10)
    assert attached.emitted == [b"%d" % i for i in range(6)]
    attached.attachment.detach()
    attached.attachment = attached.attach()
    attached.read(10)
    assert attached.emitted == [b"%d" % i for i in range(10)]


def test_a_defect_in_the_client_fails_the_bundle_not_the_thread() -> None:
    inline = Inline()

    class Broken:
        def connect(self, stream: StreamId | None = None) -> KinesisClient:
            raise ZeroDivisionError("a defect")

    attached = reading(inline.consumer, inline.fake, factory=Broken())
    attached.attachment.wait(1)
    with pytest.raises(KinesisIOError, match=r"reading shard .* of flights failed: ZeroDivisionError\('a defect'\)"):
        attached.attachment.poll(1)


def test_buffers_that_nobody_asks_for_are_dropped_after_a_minute_and_the_connection_with_them() -> None:
    inline = Inline()
    inline.put(b"1", b"2", b"3")
    clients = Clients(inline.fake)
    attached = reading(inline.consumer, inline.fake, factory=clients)
    attached.attachment.wait(1)
    attached.take(1)
    attached.attachment.detach()
    inline.clock.advance(IDLE_SECONDS - 1)
    inline.consumer.sweep()
    assert clients.open == 1
    attached.attachment = attached.attach()
    assert inline.iterators() == 1, "within the minute it was warm"
    attached.attachment.detach()
    inline.clock.advance(IDLE_SECONDS)
    inline.consumer.sweep()
    assert clients.open == 0
    attached.attachment = attached.attach()
    attached.read(3)
    assert attached.emitted == [b"1", b"2", b"3"]
    assert inline.iterators() == 2


def test_two_sources_of_one_stream_share_its_pace_and_nothing_else() -> None:
    """Five calls per second and shard is what the service allows them together."""
    inline = Inline(enforce_limits=True)
    inline.put(b"1", b"2", b"3")
    one = reading(inline.consumer, inline.fake, uid="one", limits=ReadLimits(), max_records_per_get=1)
    two = reading(inline.consumer, inline.fake, uid="two", limits=ReadLimits(), max_records_per_get=1)
    for _ in range(20):
        for source in (one, two):
            source.attachment.wait(0.3)
            source.take(1)
    assert one.emitted == two.emitted == [b"1", b"2", b"3"]
    assert not inline.fake.errors
    assert calls_in_a_second(inline.fake) <= 5


def calls_in_a_second(fake: FakeKinesis) -> int:
    at = [call.seconds for call in fake.log if call.operation == "GetRecords"]
    return max(sum(1 for other in at if 0 <= other - one < 1 - 1e-6) for one in at)


@pytest.mark.parametrize("record_bytes", [100, 30 * KIB])
def test_the_pace_of_a_busy_shard_is_five_calls_and_two_mib_per_second(record_bytes: int) -> None:
    inline = Inline(enforce_limits=True)
    for _ in range(600):
        inline.fake.put("flights", b"x" * record_bytes)
    start = inline.clock.now_seconds()
    attached = reading(inline.consumer, inline.fake, limits=ReadLimits(), max_records_per_get=50)
    attached.read(600)
    elapsed = inline.clock.now_seconds() - start
    assert not inline.fake.errors
    assert calls_in_a_second(inline.fake) <= 5
    assert 600 * record_bytes <= 2 * MIB * (elapsed + 1.5)
    assert elapsed < max(600 / 50 / 5, 600 * record_bytes / (2 * MIB)) + 2, "and it is not slower than it must be"


def test_after_ten_mib_it_waits_five_seconds() -> None:
    inline = Inline(enforce_limits=True)
    for _ in range(25):
        inline.fake.put("flights", b"x" * (MIB - 100))
    attached = reading(inline.consumer, inline.fake, limits=ReadLimits(), prefetch_bytes_per_shard=1 << 30)
    attached.read(25)
    calls = [c.seconds for c in inline.fake.log if c.operation == "GetRecords"]
    assert not inline.fake.errors
    assert calls[1] - calls[0] >= 5


def test_counts_go_to_whoever_asks_once() -> None:
    inline = Inline()
    inline.fake.faults.throttle("GetRecords", times=2)
    inline.fake.faults.internal_failure("GetRecords", times=1)
    inline.put(b"1")
    attached = reading(inline.consumer, inline.fake)
    attached.read(1)
    counts = attached.attachment.take_counts()
    assert counts[metrics.READ_THROTTLES] == 2
    assert counts[f"{metrics.READ_RETRIES}.InternalFailureException"] == 1
    assert counts[metrics.GET_RECORDS_CALLS] == 4
    assert not attached.attachment.take_counts()


def test_a_simulated_clock_has_a_consumer_of_its_own() -> None:
    clock = SimulatedClock()
    assert shared_consumer(clock) is shared_consumer(clock)
    assert shared_consumer(clock) is not shared_consumer(SimulatedClock())
    assert shared_consumer(SystemClock()) is shared_consumer(SystemClock())


# With threads.


class Clients:
    """A client factory that knows which of its clients are open."""

    def __init__(self, fake: FakeKinesis) -> None:
        self.fake = fake
        self.made: list[Any] = []

    def connect(self, stream: StreamId | None = None) -> KinesisClient:
        self.made.append(self.fake.factory().connect(stream))
        client: KinesisClient = self.made[-1]
        return client

    @property
    def open(self) -> int:
        return sum(1 for client in self.made if not client._closed)


def fetch_threads() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith("kinesis-fetch")}


@pytest.fixture
def others() -> set[threading.Thread]:
    """Fetch threads of other tests' consumers."""
    return fetch_threads()


@pytest.fixture
def consumer() -> Iterator[KinesisSystemConsumer]:
    consumer = KinesisSystemConsumer()
    yield consumer
    consumer.stop()


def test_a_thousand_shards_need_at_most_32_threads(
    consumer: KinesisSystemConsumer, others: set[threading.Thread]
) -> None:
    fake = FakeKinesis()
    fake.create_stream("flights", shards=1000)
    for shard in fake.shards("flights"):
        fake.put("flights", shard.shard_id.encode(), shard_id=shard.shard_id)
    attached = reading(consumer, fake, poll_interval_seconds=5.0)
    most = 0
    while len(attached.emitted) < 1000:
        if attached.take() is None:
            attached.attachment.wait(1.0)
        most = max(most, len(fetch_threads() - others))
    assert sorted(attached.emitted) == sorted(s.shard_id.encode() for s in fake.shards("flights"))
    assert 0 < most <= 32


def test_one_shard_needs_one_thread(consumer: KinesisSystemConsumer, others: set[threading.Thread]) -> None:
    fake = FakeKinesis()
    fake.create_stream("flights")
    fake.put("flights", b"1")
    attached = reading(consumer, fake)
    attached.read(1)
    assert len(fetch_threads() - others) == 1


def test_order_holds_with_threads(consumer: KinesisSystemConsumer) -> None:
    fake = FakeKinesis()
    fake.create_stream("flights", shards=8)
    for i in range(4000):
        fake.put("flights", b"%d" % i, partition_key=str(i % 50))
    attached = reading(consumer, fake, max_records_per_get=37)
    attached.read(4000, max_records=11)
    by_key: dict[int, list[int]] = {}
    for number in map(int, attached.emitted):
        by_key.setdefault(number % 50, []).append(number)
    assert sorted(map(int, attached.emitted)) == list(range(4000))
    assert all(numbers == sorted(numbers) for numbers in by_key.values())


def test_ten_mib_records_are_prefetched_within_the_bounds(consumer: KinesisSystemConsumer) -> None:
    """At most the bound, and what the answers under way may bring."""
    fake = FakeKinesis()
    fake.create_stream("flights", shards=4, max_record_kib=10 * KIB)
    data = b"x" * (10 * MIB - 100)
    for shard in fake.shards("flights"):
        for _ in range(2):
            fake.put("flights", data, shard_id=shard.shard_id)
    bound = 12 * MIB
    attached = reading(consumer, fake, prefetch_bytes=bound)
    attached.keep = False
    seen = most = 0
    while seen < 8:
        most = max(most, attached.attachment.prefetched_bytes())
        batch = attached.take()
        if batch is None:
            attached.attachment.wait(1.0)
        else:
            seen += len(batch.records)
            assert {len(r.data) for r in batch.records} <= {len(data)}
    # The first answers are not known to be so large: each shard's may be under way at once.
    assert most <= bound + 4 * 10 * MIB


def test_aggregates_are_taken_apart_one_at_a_time() -> None:
    """A buffer holds them as they came; unpacked they are a hundred times as many records."""
    inline = Inline()
    for a in range(30):
        aggregate = Aggregate()
        for i in range(2000):
            assert aggregate.add("key", None, b"%d" % (a * 2000 + i))
        data, key, explicit = aggregate.encode()
        inline.fake.put("flights", data, partition_key=key, explicit_hash_key=explicit)
    attached = reading(inline.consumer, inline.fake)
    attached.attachment.wait(1)
    attached.keep = False
    tracemalloc.start()
    count = 0
    while (batch := attached.take(100)) is not None:
        count += len(batch.records)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 60_000
    assert peak < 4 * MIB, "all of them unpacked are 20 MiB"


def test_a_downstream_that_stops_for_ten_minutes_grows_nothing_and_loses_nothing() -> None:
    clock = SimulatedClock(autojump=False)
    fake = FakeKinesis(clock=clock)
    fake.create_stream("flights", shards=4)
    for i in range(2000):
        fake.put("flights", b"%06d" % i + b"x" * KIB, partition_key=str(i))
    consumer = KinesisSystemConsumer(clock=clock)
    attached = reading(
        consumer, fake, prefetch_bytes_per_shard=64 * KIB, prefetch_bytes=200 * KIB, max_records_per_get=20
    )
    try:
        eventually(lambda: attached.attachment.prefetched_bytes() >= 50 * KIB, "a buffer is full")
        bound = 200 * KIB + 4 * 21 * KIB
        for _ in range(60):
            clock.advance(10)
            assert attached.attachment.prefetched_bytes() <= bound
        calls = fake.calls["GetRecords"]
        clock.advance(10)
        assert fake.calls["GetRecords"] <= calls + 1
        deadline = time.monotonic() + 60
        while len(attached.emitted) < 2000:
            assert attached.attachment.prefetched_bytes() <= bound
            if attached.take(50) is None:
                assert time.monotonic() < deadline
                clock.advance(0.1)
                threading.Event().wait(0.001)
        assert sorted(int(d[:6]) for d in attached.emitted) == list(range(2000))
        assert fake.errors["GetRecords", "ExpiredIteratorException"], "it was long enough"
    finally:
        consumer.stop()


def test_restrictions_that_are_not_read_do_not_starve_one_that_is(consumer: KinesisSystemConsumer) -> None:
    """Their buffers fill the process's bytes; whoever waits with empty hands may fetch nevertheless."""
    fake = FakeKinesis()
    fake.create_stream("flights", shards=1)
    for i in range(500):
        fake.put("flights", b"%04d" % i + b"x" * KIB)
    idle = [reading(consumer, fake, index=i, prefetch_bytes=100 * KIB, max_records_per_get=50) for i in range(1, 4)]
    eventually(lambda: sum(r.attachment.prefetched_bytes() for r in idle) >= 50 * KIB, "the others' buffers fill up")
    busy = reading(consumer, fake, prefetch_bytes=100 * KIB, max_records_per_get=50)
    busy.read(500)
    assert [int(d[:4]) for d in busy.emitted] == list(range(500))


def test_stop_ends_the_threads_and_closes_the_connections(others: set[threading.Thread]) -> None:
    with LocalKinesis() as server:
        server.fake.create_stream("flights", shards=10)
        for i in range(100):
            server.fake.put("flights", b"%d" % i, partition_key=str(i))
        consumer = KinesisSystemConsumer()
        factory = ClientConfig(region="us-east-1", endpoint_url=server.endpoint_url)
        attached = reading(consumer, server.fake, factory=factory, poll_interval_seconds=0.05)
        attached.read(100)
        assert server._connections
        consumer.stop()
        consumer.stop()
        eventually(lambda: not fetch_threads() - others, "the fetch threads have ended")
        eventually(lambda: not server._connections, "the connections are closed")
        with pytest.raises(KinesisIOError, match="was stopped"):
            reading(consumer, server.fake)
        with pytest.raises(StaleAttachment):
            attached.take()


def test_stop_while_a_call_hangs_does_not_wait_for_it(others: set[threading.Thread]) -> None:
    fake = FakeKinesis(clock=SimulatedClock(autojump=False))
    fake.create_stream("flights")
    fake.faults.delay("GetRecords", 1000.0, times=1)
    clients = Clients(fake)
    consumer = KinesisSystemConsumer()
    reading(consumer, fake, factory=clients)
    eventually(lambda: fake.calls["GetRecords"] == 1, "the call is under way")
    consumer.stop()
    clock: Any = fake.clock
    clock.advance(2000)
    eventually(lambda: not fetch_threads() - others, "the fetch threads have ended")
    assert clients.open == 0


def test_stop_without_any_thread_closes_the_connections() -> None:
    inline = Inline()
    clients = Clients(inline.fake)
    attached = reading(inline.consumer, inline.fake, factory=clients)
    attached.attachment.wait(1)
    assert clients.open == 1
    inline.consumer.stop()
    assert clients.open == 0


def test_threads_end_when_nothing_is_read_any_more() -> None:
    """Also without stop(): a worker that lives on keeps no thread of a source that is gone."""
    before = fetch_threads()
    clock = SimulatedClock(autojump=False)
    fake = FakeKinesis(clock=clock)
    fake.create_stream("flights", shards=3)
    consumer = KinesisSystemConsumer(clock=clock)
    attached = reading(consumer, fake)
    eventually(lambda: fake.calls["GetRecords"] >= 3, "it reads")
    attached.attachment.detach()

    def ended() -> bool:
        clock.advance(20)
        return not fetch_threads() - before

    eventually(ended, "the fetch threads have ended")


FORKING = textwrap.dedent(
    """
    import os, sys
    from samza_kinesis_io.client import ClientConfig, StreamId
    from samza_kinesis_io.clock import SystemClock
    from samza_kinesis_io.consumer import SourceConfig, shared_consumer
    from samza_kinesis_io.positions import Position
    from samza_kinesis_io.restriction import Advance, Claim, FrontierTracker, ShardFrontier, ShardState
    from samza_kinesis_io.shards import FULL_RANGE

    config = SourceConfig(
        uid="a source",
        streams=(StreamId("flights"),),
        factory=ClientConfig(region="us-east-1", endpoint_url=sys.argv[1]),
    )
    tracker = FrontierTracker(
        ShardFrontier((ShardState(0, "shardId-000000000000", FULL_RANGE, Position.trim_horizon()),))
    )

    def read(count):
        frontier = tracker.current_restriction()
        attachment = shared_consumer(SystemClock()).attach((config.uid, 0, b""), config, frontier)
        found = []
        while len(found) < count:
            batch = attachment.poll(10)
            if batch is None:
                attachment.wait(1.0)
                continue
            found += [int(r.data) for r in batch.records]
            tracker.try_claim(Claim((Advance(batch.key, batch.position, 0, None),)))
            attachment.commit(batch, tracker.current_restriction())
        return found

    assert read(30) == list(range(30))
    child = os.fork()
    # Both go on from the same restriction: the child without the parent's threads, locks and connections.
    assert read(70) == list(range(30, 100))
    if child:
        _, status = os.waitpid(child, 0)
        sys.exit(os.waitstatus_to_exitcode(status))
    os._exit(0)
    """
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_worker_forked_after_the_start_reads_on_by_itself() -> None:
    with LocalKinesis() as server:
        server.fake.create_stream("flights")
        for i in range(100):
            server.fake.put("flights", b"%d" % i)
        done = subprocess.run(
            [sys.executable, "-c", FORKING, server.endpoint_url], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 0, done.stderr
