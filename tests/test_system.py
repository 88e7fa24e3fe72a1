"""Samza's system API over Kinesis, without Beam."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable

import pytest
from apache_beam.utils.timestamp import Timestamp
from numbered_stream import Stream

from samza_kinesis_io.consumer import KinesisSystemConsumer
from samza_kinesis_io.errors import ConfigurationError, KinesisIOError, RecordRefused, StreamNotFound
from samza_kinesis_io.producer import KinesisSystemProducer, ProducerOptions
from samza_kinesis_io.system import (
    END_OF_STREAM_OFFSET,
    OLDEST,
    UPCOMING,
    EndOfStreamEnvelope,
    KinesisAdmin,
    KinesisConsumer,
    KinesisProducer,
    KinesisSystem,
    PartitionMetadata,
    SystemAdmin,
    SystemConsumer,
    SystemProducer,
)
from samza_kinesis_io.task import OutgoingMessageEnvelope, SystemStream, SystemStreamPartition
from samza_kinesis_io.testing import FakeKinesis

FLIGHTS = SystemStream("kinesis", "flights")


def ssp(shard_id: str | int) -> SystemStreamPartition:
    return SystemStreamPartition(
        "kinesis", "flights", shard_id if isinstance(shard_id, str) else f"shardId-{shard_id:012d}"
    )


class SystemStreamOfNumbers(Stream):
    """A stream, and a system that reads it without threads, so that simulated time makes all of it repeatable."""

    @property
    def system(self) -> KinesisSystem:
        return KinesisSystem("kinesis", self.fake.factory(), self.clock)

    def consumer(self, **offsets: str) -> KinesisConsumer:
        """Of every shard from the oldest message on, or of shards "s3" by their numbers from these offsets on."""
        consumer = self.system.consumer(KinesisSystemConsumer(clock=self.clock, max_threads=0, seed=0))
        if offsets:
            for number, offset in offsets.items():
                consumer.register(ssp(int(number[1:])), offset)
        else:
            for partition in self.system.admin().metadata("flights"):
                consumer.register(partition, OLDEST)
        consumer.start()
        return consumer


def read(consumer: KinesisConsumer, *, polls: int = 40, most: int = 7) -> dict[SystemStreamPartition, list[object]]:
    """Poll everything, in rounds; messages as numbers, ends as their children."""
    found: dict[SystemStreamPartition, list[object]] = defaultdict(list)
    for _ in range(polls):
        if not consumer.partitions:
            break
        for partition, envelopes in consumer.poll(dict.fromkeys(consumer.partitions, most), 0.5).items():
            for envelope in envelopes:
                is_end = isinstance(envelope, EndOfStreamEnvelope)
                found[partition].append(envelope.children if is_end else int(envelope.message))  # type: ignore[attr-defined]
    return dict(found)


def numbers(found: dict[SystemStreamPartition, list[object]]) -> list[int]:
    return sorted(n for values in found.values() for n in values if isinstance(n, int))


class TestConsumer:
    def test_it_is_what_samza_calls_a_system_consumer(self) -> None:
        consumer: SystemConsumer = SystemStreamOfNumbers().consumer()
        consumer.stop()

    def test_every_partition_gives_its_messages_in_order(self) -> None:
        stream = SystemStreamOfNumbers(shards=3)
        stream.put(100)
        found = read(stream.consumer())
        assert set(found) == {ssp(0), ssp(1), ssp(2)}
        assert numbers(found) == list(range(100))
        for values in found.values():
            assert values == sorted(values)  # type: ignore[type-var]

    def test_an_envelope_says_all_that_kinesis_does(self) -> None:
        stream = SystemStreamOfNumbers()
        stream.put(1)
        consumer = stream.consumer()
        ((envelope,),) = consumer.poll({ssp(0): 1}, 1.0).values()
        (record,) = stream.fake.records("flights")
        assert envelope.system_stream_partition == ssp(0)
        assert envelope.offset == record.sequence_number
        assert envelope.key == record.partition_key
        assert envelope.arrival_time == record.approximate_arrival_timestamp

    def test_only_what_is_asked_for_is_given_and_no_more_of_it(self) -> None:
        stream = SystemStreamOfNumbers(shards=2)
        for _ in range(20):
            for shard in stream.open_shards:
                stream.put(1, shard_id=shard)
        consumer = stream.consumer()
        for expected in ([0, 2, 4], [6, 8, 10]):
            found = consumer.poll({ssp(0): 3}, 1.0)
            assert {p: [int(e.message) for e in envelopes] for p, envelopes in found.items()} == {ssp(0): expected}
        assert [int(e.message) for e in consumer.poll({ssp(1): 2}, 1.0)[ssp(1)]] == [1, 3]

    def test_a_partition_that_is_never_polled_does_not_hold_up_the_others(self) -> None:
        stream = SystemStreamOfNumbers(shards=2)
        for _ in range(8):
            stream.fake.put("flights", b"0" * 1_000_000, partition_key="k", shard_id=stream.open_shards[0])
            stream.clock.advance(1)
        stream.put(50, shard_id=stream.open_shards[1])
        consumer = stream.consumer()
        found = [e for _ in range(30) for e in consumer.poll({ssp(1): 5}, 0.5).get(ssp(1), [])]
        assert [int(e.message) for e in found] == list(range(50))

    def test_zero_does_not_wait_and_a_timeout_waits_no_longer_than_it_says(self) -> None:
        stream = SystemStreamOfNumbers()
        consumer = stream.consumer()
        before = stream.clock.monotonic_seconds()
        assert consumer.poll({ssp(0): 1}, 0.0) == {}
        assert stream.clock.monotonic_seconds() == before
        assert consumer.poll({ssp(0): 1}, 3.0) == {}
        assert stream.clock.monotonic_seconds() == pytest.approx(before + 3.0)

    def test_a_negative_timeout_waits_for_a_message_or_until_the_tip_is_read(self) -> None:
        stream = SystemStreamOfNumbers()
        stream.put(1)
        consumer = stream.consumer()
        assert len(consumer.poll({ssp(0): 9}, -1.0)[ssp(0)]) == 1
        assert consumer.poll({ssp(0): 9}, -1.0) == {}

    def test_an_offset_is_inclusive_and_the_one_after_it_is_behind(self) -> None:
        stream = SystemStreamOfNumbers()
        stream.put(3)
        aggregate = stream.put_aggregate(4)
        stream.put(1)
        second = stream.fake.records("flights")[1].sequence_number
        for offset, expected in ((second, 1), (f"{aggregate}", 3), (f"{aggregate}/2", 5)):
            assert numbers(read(stream.consumer(s0=offset), polls=8)) == list(range(expected, 8))
            after = stream.system.admin().offsets_after({ssp(0): offset})[ssp(0)]
            assert numbers(read(stream.consumer(s0=after), polls=8)) == list(range(expected + 1, 8))

    def test_upcoming_is_pinned_to_the_moment_of_registration(self) -> None:
        stream = SystemStreamOfNumbers()
        stream.put(5)
        consumer = stream.system.consumer(KinesisSystemConsumer(clock=stream.clock, max_threads=0, seed=0))
        consumer.register(ssp(0), UPCOMING)
        stream.put(5)
        consumer.start()
        assert numbers(read(consumer, polls=8)) == list(range(5, 10))

    def test_a_time_is_an_offset_too(self) -> None:
        stream = SystemStreamOfNumbers()
        stream.put(5)
        offset = stream.system.admin().offset_at(stream.now)
        stream.put(5)
        assert numbers(read(stream.consumer(s0=offset), polls=8)) == list(range(5, 10))

    def test_a_new_consumer_goes_on_from_the_offsets_of_the_last(self) -> None:
        stream = SystemStreamOfNumbers(shards=2)
        stream.put(60)
        first = stream.consumer()
        last: dict[SystemStreamPartition, str] = {}
        seen: list[int] = []
        for _ in range(4):
            for partition, envelopes in first.poll(dict.fromkeys(first.partitions, 5), 0.5).items():
                seen += [int(e.message) for e in envelopes]
                last[partition] = envelopes[-1].offset
        first.stop()
        after = stream.system.admin().offsets_after(last)
        second = stream.consumer(**{f"s{int(p.partition[-12:])}": offset for p, offset in after.items()})
        assert sorted(seen + numbers(read(second))) == list(range(60))

    def test_threads_prefetch_while_nobody_polls(self) -> None:
        fake = FakeKinesis()
        fake.create_stream("flights", shards=2)
        for i in range(20):
            fake.put("flights", b"%d" % i, partition_key=str(i))
        system = KinesisSystem(client=fake.factory())
        consumer = system.consumer()
        for partition in system.admin().metadata("flights"):
            consumer.register(partition, OLDEST)
        consumer.start()
        found: list[int] = []
        while len(found) < 20:
            for envelopes in consumer.poll(dict.fromkeys(consumer.partitions, 3), 10.0).values():
                found += [int(e.message) for e in envelopes]
        consumer.stop()
        assert sorted(found) == list(range(20))

    @pytest.mark.parametrize(
        ("act", "words"),
        [
            (lambda c: c.register(SystemStreamPartition("kafka", "flights", "0"), OLDEST), "another system"),
            (lambda c: c.register(ssp(0), "soon"), "an offset must be a sequence number"),
            (lambda c: (c.register(ssp(0), OLDEST), c.register(ssp(0), OLDEST)), "registered once"),
            (lambda c: c.start(), "no partition is registered"),
            (lambda c: (c.register(ssp(7), OLDEST), c.start()), "no shard of its stream"),
            (lambda c: (c.register(ssp(0), OLDEST), c.start(), c.poll({ssp(1): 1}, 0)), "is not registered"),
        ],
    )
    def test_misuse_is_named(self, act: Callable[[KinesisConsumer], object], words: str) -> None:
        stream = SystemStreamOfNumbers(shards=2)
        with pytest.raises(ConfigurationError, match=words):
            act(stream.system.consumer(KinesisSystemConsumer(clock=stream.clock, max_threads=0, seed=0)))

    def test_what_ends_reading_comes_behind_what_was_read(self) -> None:
        stream = SystemStreamOfNumbers()
        stream.put(3)
        consumer = stream.consumer()
        assert len(consumer.poll({ssp(0): 9}, 1.0)[ssp(0)]) == 3
        stream.fake.faults.deny_access("GetRecords")
        with pytest.raises(KinesisIOError, match="GetRecords"):
            consumer.poll({ssp(0): 9}, 5.0)


class TestResharding:
    def test_children_come_as_new_partitions_behind_their_parents_end(self) -> None:
        stream = SystemStreamOfNumbers()
        stream.put(10)
        children = [ssp(s) for s in stream.fake.split("flights", "shardId-000000000000")]
        stream.put(10)
        consumer = stream.consumer(s0=OLDEST)
        assert list(consumer.partitions) == [ssp(0)]
        parent = consumer.poll({ssp(0): 100}, 5.0)[ssp(0)]
        while not isinstance(parent[-1], EndOfStreamEnvelope):
            parent += consumer.poll({ssp(0): 100}, 5.0)[ssp(0)]
        assert [int(e.message) for e in parent[:-1]] == list(range(10))
        assert parent[-1].offset == END_OF_STREAM_OFFSET
        assert list(parent[-1].children) == list(consumer.partitions) == children
        found = read(consumer)
        assert set(found) <= set(children)
        assert numbers(found) == list(range(10, 20))
        assert consumer.poll({ssp(0): 1}, 0.0) == {}, "an ended partition may still be asked for"

    def test_a_merges_child_waits_for_both_parents_and_comes_once(self) -> None:
        stream = SystemStreamOfNumbers(shards=2)
        stream.put(20)
        child = ssp(stream.fake.merge("flights", "shardId-000000000000", "shardId-000000000001"))
        stream.put(20)
        consumer = stream.consumer(s0=OLDEST, s1=OLDEST)
        order: list[object] = []
        ends: list[SystemStreamPartition] = []
        for _ in range(40):
            for partition, envelopes in consumer.poll(dict.fromkeys(consumer.partitions, 3), 0.5).items():
                order += [partition] * len(envelopes)
                ends += [partition for e in envelopes if isinstance(e, EndOfStreamEnvelope)]
        assert set(ends) == {ssp(0), ssp(1)}
        first = order.index(child)
        assert set(order[first:]) == {child}
        assert order.count(child) == 20

    def test_a_child_that_is_registered_itself_keeps_its_offset_and_waits(self) -> None:
        stream = SystemStreamOfNumbers()
        stream.put(5)
        low, high = (int(s[-12:]) for s in stream.fake.split("flights", "shardId-000000000000"))
        stream.put(20)
        admin = stream.system.admin()
        of_low = [r for r in stream.fake.records("flights") if r.shard_id == ssp(low).partition]
        offset = admin.offsets_after({ssp(low): of_low[2].sequence_number})[ssp(low)]
        consumer = stream.consumer(s0=OLDEST, **{f"s{low}": offset, f"s{high}": OLDEST})
        assert consumer.poll({ssp(low): 9}, 2.0) == {}, "its parent's messages were not taken yet"
        found = read(consumer)
        assert found[ssp(0)] == [0, 1, 2, 3, 4, ()], "no child is new"
        assert numbers(found) == sorted(set(range(25)) - {int(r.data) for r in of_low[:3]})

    def test_generations_that_came_and_went_are_read_in_order(self) -> None:
        stream = SystemStreamOfNumbers()
        shard = "shardId-000000000000"
        for _ in range(4):
            stream.put(6)
            shard = stream.fake.split("flights", shard)[0]
        stream.put(6)
        found = read(stream.consumer(s0=OLDEST), polls=80)
        assert numbers(found) == list(range(30))
        assert sum(isinstance(v, tuple) for values in found.values() for v in values) == 4

    def test_the_child_of_a_shard_that_ended_before_its_start_is_not_read_from_its_beginning(self) -> None:
        stream = SystemStreamOfNumbers()
        stream.fake.split("flights", "shardId-000000000000")
        stream.put(10)
        consumer = stream.system.consumer(KinesisSystemConsumer(clock=stream.clock, max_threads=0, seed=0))
        consumer.register(ssp(0), UPCOMING)
        consumer.start()
        stream.put(10)
        assert numbers(read(consumer)) == list(range(10, 20))


class TestProducer:
    def producer(self, fake: FakeKinesis, **options: object) -> KinesisProducer:
        system = KinesisSystem(client=fake.factory())
        producer = system.producer(KinesisSystemProducer(fake.factory(), options=ProducerOptions()))
        producer.register("task")
        producer.start()
        return producer

    @pytest.fixture
    def fake(self) -> FakeKinesis:
        fake = FakeKinesis()
        fake.create_stream("flights", shards=2)
        fake.create_stream("delays", shards=1)
        return fake

    def test_flush_returns_when_all_that_the_source_sent_is_in_the_streams(self, fake: FakeKinesis) -> None:
        producer: SystemProducer = self.producer(fake)
        for i in range(100):
            stream = SystemStream("kinesis", "delays" if i % 2 else "flights")
            producer.send("task", OutgoingMessageEnvelope(stream, b"%d" % i, key=f"k{i % 3}"))
        producer.flush("task")
        assert sorted(int(r.data) for r in fake.records("delays")) == list(range(1, 100, 2))
        assert sorted(int(r.data) for r in fake.records("flights")) == list(range(0, 100, 2))
        producer.stop()

    def test_the_messages_of_a_key_keep_their_order_though_some_are_refused_at_first(self, fake: FakeKinesis) -> None:
        fake.faults.fail_entries(every=3, times=5)
        producer = self.producer(fake)
        for i in range(60):
            producer.send("task", OutgoingMessageEnvelope(FLIGHTS, b"%d" % i, partition_key=f"k{i % 3}"))
        producer.flush("task")
        by_key: dict[str | None, list[int]] = defaultdict(list)
        for r in fake.records("flights"):
            by_key[r.partition_key].append(int(r.data))
        assert all(values == sorted(values) for values in by_key.values())
        producer.stop()

    def test_without_a_key_messages_are_spread(self, fake: FakeKinesis) -> None:
        producer = self.producer(fake)
        for i in range(50):
            producer.send("task", OutgoingMessageEnvelope(FLIGHTS, b"%d" % i))
        producer.stop()
        assert len({r.shard_id for r in fake.records("flights")}) == 2

    def test_stop_finishes_what_was_sent(self, fake: FakeKinesis) -> None:
        producer = self.producer(fake)
        producer.send("task", OutgoingMessageEnvelope(FLIGHTS, b"last"))
        producer.stop()
        assert [r.data for r in fake.records("flights")] == [b"last"]

    def test_a_failure_is_told_by_flush_and_stays(self, fake: FakeKinesis) -> None:
        producer = self.producer(fake)
        producer.send("task", OutgoingMessageEnvelope(SystemStream("kinesis", "nowhere"), b"1"))
        with pytest.raises(StreamNotFound):
            producer.flush("task")
        with pytest.raises(StreamNotFound):
            producer.send("task", OutgoingMessageEnvelope(FLIGHTS, b"2"))
        with pytest.raises(StreamNotFound):
            producer.stop()

    def test_several_tasks_share_it(self, fake: FakeKinesis) -> None:
        producer = self.producer(fake)

        def run(name: str) -> None:
            producer.register(name)
            for i in range(50):
                producer.send(name, OutgoingMessageEnvelope(FLIGHTS, f"{name}-{i}".encode(), key=name))
            producer.flush(name)

        threads = [threading.Thread(target=run, args=(f"t{n}",)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({r.data for r in fake.records("flights")}) == 200
        producer.stop()

    def test_what_is_no_record_is_refused(self, fake: FakeKinesis) -> None:
        producer = self.producer(fake)
        with pytest.raises(RecordRefused, match="takes bytes"):
            producer.send("task", OutgoingMessageEnvelope(FLIGHTS, {"not": "serialized"}))
        with pytest.raises(RecordRefused, match="partition key must be a str"):
            producer.send("task", OutgoingMessageEnvelope(FLIGHTS, b"1", key=7))
        with pytest.raises(ConfigurationError, match=r"kafka\.flights can't be sent to the system kinesis"):
            producer.send("task", OutgoingMessageEnvelope(SystemStream("kafka", "flights"), b"1"))
        producer.stop()


class TestAdmin:
    def admin(self) -> KinesisAdmin:
        fake = FakeKinesis()
        fake.create_stream("flights", shards=2)
        return KinesisSystem(client=fake.factory()).admin()

    def test_metadata_names_every_shard_the_closed_ones_too(self) -> None:
        stream = SystemStreamOfNumbers(shards=2)
        stream.put(4)
        stream.fake.split("flights", "shardId-000000000000")
        admin: SystemAdmin = stream.system.admin()
        assert admin.metadata("flights") == dict.fromkeys(
            [ssp(n) for n in range(4)], PartitionMetadata(OLDEST, None, UPCOMING)
        )

    @pytest.mark.parametrize(
        ("a", "b", "order"),
        [
            ("9", "10", -1),
            ("10/1", "10", 1),
            ("10/2", "10/11", -1),
            ("10", "10/0", 0),
            (OLDEST, "0", -1),
            ("0", OLDEST, 1),
            (OLDEST, UPCOMING, -1),
            (UPCOMING, UPCOMING, 0),
            (UPCOMING, "10", None),
            ("AT_TIMESTAMP/5", "10", None),
            ('{"shardId": "s", "seqNumber": "10"}', "10", 0),
        ],
    )
    def test_offsets_compare_as_numbers_and_the_unknown_is_none(self, a: str, b: str, order: int | None) -> None:
        assert self.admin().compare(a, b) == order

    def test_an_offset_after_lies_behind_its_record_and_before_every_other(self) -> None:
        admin = self.admin()
        after = admin.offsets_after({ssp(0): "10", ssp(1): "10/3"})
        assert after == {ssp(0): "10/1", ssp(1): "10/4"}
        assert admin.compare(after[ssp(0)], "10") == 1
        assert admin.compare(after[ssp(0)], "11") == -1

    def test_a_time_has_one_offset(self) -> None:
        assert self.admin().offset_at(Timestamp(micros=1_500_000)) == "AT_TIMESTAMP/1500000"
