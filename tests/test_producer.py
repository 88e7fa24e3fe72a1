"""`KinesisSystemProducer` on a fake Kinesis: by one thread with a simulated clock, then with its own threads."""

from __future__ import annotations

import gc
import itertools
import os
import random
import signal
import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from samza_kinesis_io.client import KinesisClient, PutEntry, PutOutcome, StreamId
from samza_kinesis_io.errors import (
    AccessRefused,
    ConfigurationError,
    DeliveryFailed,
    RecordRefused,
    StreamNotFound,
)
from samza_kinesis_io.limits import MIB
from samza_kinesis_io.producer import Delivery, KinesisSystemProducer, ProducerOptions, shared_producer
from samza_kinesis_io.retry import BackoffPolicy
from samza_kinesis_io.shards import Shard
from samza_kinesis_io.testing import FakeClientFactory, FakeKinesis, SimulatedClock

FLIGHTS = StreamId("flights")
INLINE = ProducerOptions(request_threads=0)


class Rig:
    """A fake Kinesis and a producer without threads, both on one simulated clock."""

    def __init__(self, *, shards: int = 2, enforce_limits: bool = False, options: ProducerOptions = INLINE) -> None:
        self.clock = SimulatedClock()
        self.fake = FakeKinesis(clock=self.clock, enforce_limits=enforce_limits, log_calls=True)
        self.fake.create_stream("flights", shards=shards)
        self.producer = KinesisSystemProducer(
            self.fake.factory(), options=options, clock=self.clock, rng=random.Random(3)
        )

    def send(self, source: str, *data: bytes, key: str = "k", ordered: bool = False) -> None:
        for d in data:
            self.producer.send(source, FLIGHTS, PutEntry(d, key), d, turn_key=key if ordered else None)

    def written(self) -> list[bytes]:
        return [r.data for r in self.fake.records("flights")]

    def requests(self) -> list[list[bytes]]:
        """The data of each PutRecords so far, failed ones too."""
        return [[r["Data"] for r in call.params["Records"]] for call in self.fake.log if call.operation == "PutRecords"]


@pytest.fixture
def rig() -> Rig:
    return Rig()


class TestFlush:
    def test_everything_sent_is_in_the_stream_when_flush_returns(self, rig: Rig) -> None:
        rig.producer.register("bundle")
        data = [b"%d" % i for i in range(1234)]
        rig.send("bundle", *data)
        deliveries = rig.producer.flush("bundle")
        assert sorted(rig.written()) == sorted(data)
        assert sorted(d.token for d in deliveries) == sorted(data)
        assert rig.producer.in_flight_bytes == 0

    def test_a_delivery_says_where_the_record_is(self, rig: Rig) -> None:
        rig.producer.register("bundle")
        rig.send("bundle", b"a")
        (delivery,) = rig.producer.flush("bundle")
        (record,) = rig.fake.records("flights")
        assert delivery == Delivery(b"a", FLIGHTS, record.shard_id, record.sequence_number, None, None, 1)

    def test_a_second_flush_sends_nothing(self, rig: Rig) -> None:
        rig.producer.register("bundle")
        rig.send("bundle", b"a")
        rig.producer.flush("bundle")
        assert rig.producer.flush("bundle") == []
        assert rig.fake.calls["PutRecords"] == 1

    def test_an_empty_bundle_makes_no_call(self, rig: Rig) -> None:
        rig.producer.register("bundle")
        assert rig.producer.flush("bundle") == []
        assert not rig.fake.calls

    def test_flush_waits_for_its_own_records_only(self, rig: Rig) -> None:
        """The other source's record is throttled for ever; it is none of our business."""
        rig.fake.faults.fail_entries(entry_where=lambda e: e["Data"] == b"other", code="InternalFailure", times=None)
        for source in ("bundle", "other"):
            rig.producer.register(source)
            rig.send(source, source.encode())
        assert [d.token for d in rig.producer.flush("bundle")] == [b"bundle"]
        assert rig.producer.in_flight_bytes > 0
        rig.producer.purge("other")
        assert rig.producer.in_flight_bytes == 0

    def test_bundles_share_a_request(self, rig: Rig) -> None:
        for i in range(20):
            rig.producer.register(f"bundle {i}")
            rig.send(f"bundle {i}", b"%d" % i)
        for i in range(20):
            assert [d.token for d in rig.producer.flush(f"bundle {i}")] == [b"%d" % i]
        assert rig.fake.calls["PutRecords"] == 1

    def test_what_has_ended_can_be_collected_before_the_flush(self, rig: Rig) -> None:
        rig.producer.register("bundle")
        rig.producer.register("other")
        rig.send("bundle", b"a")
        rig.send("other", b"b")
        rig.producer.flush("other")
        assert [d.token for d in rig.producer.settled("bundle")] == [b"a"]
        assert rig.producer.flush("bundle") == [], "each delivery is given once"

    def test_streams_do_not_mix(self, rig: Rig) -> None:
        rig.fake.create_stream("delays")
        rig.producer.register("bundle")
        rig.producer.send("bundle", FLIGHTS, PutEntry(b"flight", "k"))
        rig.producer.send("bundle", StreamId("delays"), PutEntry(b"delay", "k"))
        rig.producer.flush("bundle")
        assert [r.data for r in rig.fake.records("flights")] == [b"flight"]
        assert [r.data for r in rig.fake.records("delays")] == [b"delay"]

    def test_an_unregistered_source_is_an_error(self, rig: Rig) -> None:
        with pytest.raises(ValueError, match="not registered"):
            rig.send("nobody", b"a")
        with pytest.raises(ValueError, match="not registered"):
            rig.producer.flush("nobody")

    def test_registering_twice_is_an_error(self, rig: Rig) -> None:
        rig.producer.register("bundle")
        with pytest.raises(ValueError, match="registered already"):
            rig.producer.register("bundle")


class TestFailures:
    def test_only_failed_entries_are_sent_again(self, rig: Rig) -> None:
        rig.fake.faults.fail_entries(indexes=[1, 3], code="InternalFailure")
        rig.producer.register("bundle")
        rig.send("bundle", b"0", b"1", b"2", b"3", b"4")
        attempts = {d.token: d.attempts for d in rig.producer.flush("bundle")}
        assert rig.requests() == [[b"0", b"1", b"2", b"3", b"4"], [b"1", b"3"]]
        assert attempts == {b"0": 1, b"1": 2, b"2": 1, b"3": 2, b"4": 1}
        assert Counter(rig.written()) == Counter([b"0", b"1", b"2", b"3", b"4"]), "nothing twice"

    @pytest.mark.parametrize("moment", ["before", "after"])
    def test_a_dropped_connection_is_tried_again(self, rig: Rig, moment: str) -> None:
        rig.fake.faults.drop_connection("PutRecords", moment="before" if moment == "before" else "after", times=2)
        rig.producer.register("bundle")
        rig.send("bundle", b"a", b"b")
        rig.producer.flush("bundle")
        assert set(rig.written()) == {b"a", b"b"}

    def test_failed_calls_are_spaced(self, rig: Rig) -> None:
        rig.fake.faults.fail("PutRecords", "InternalFailure", times=5)
        rig.producer.register("bundle")
        rig.send("bundle", b"a")
        rig.producer.flush("bundle")
        times = [call.seconds for call in rig.fake.log if call.operation == "PutRecords"]
        gaps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
        assert len(gaps) == 5
        assert all(0.05 * 2**n <= gap <= 0.1 * 2**n + 1e-6 for n, gap in enumerate(gaps)), gaps

    def test_a_lasting_failure_ends_in_delivery_failed_with_counts(self, rig: Rig) -> None:
        rig.fake.faults.fail_entries(code="InternalFailure", times=None)
        rig.producer.register("bundle", delivery_timeout_seconds=20)
        rig.send("bundle", *(b"%d" % i for i in range(7)))
        with pytest.raises(DeliveryFailed, match="delivery_timeout_seconds=20") as caught:
            rig.producer.flush("bundle")
        assert caught.value.counts_by_code == {"InternalFailure": 7}
        assert rig.producer.in_flight_bytes == 0

    def test_a_failed_source_takes_nothing_more_until_it_is_purged(self, rig: Rig) -> None:
        rig.fake.faults.deny_access("PutRecords", times=1)
        rig.producer.register("bundle")
        rig.send("bundle", b"a")
        for _ in range(2):
            with pytest.raises(AccessRefused):
                rig.producer.flush("bundle")
        with pytest.raises(AccessRefused):
            rig.send("bundle", b"b")
        rig.producer.purge("bundle")
        rig.producer.register("bundle")
        rig.send("bundle", b"c")
        rig.producer.flush("bundle")
        assert rig.written() == [b"c"]

    def test_fatal_errors_come_at_once(self, rig: Rig) -> None:
        rig.fake.faults.deny_access("PutRecords")
        rig.producer.register("bundle")
        rig.send("bundle", b"a")
        with pytest.raises(AccessRefused, match="AccessDeniedException"):
            rig.producer.flush("bundle")
        assert rig.fake.calls["PutRecords"] == 1

    def test_a_missing_stream_is_named(self, rig: Rig) -> None:
        rig.producer.register("bundle")
        rig.producer.send("bundle", StreamId("fligths"), PutEntry(b"a", "k"))
        with pytest.raises(StreamNotFound, match="fligths"):
            rig.producer.flush("bundle")
        assert rig.fake.calls["PutRecords"] == 1

    def test_a_stream_that_fails_does_not_fail_those_who_do_not_write_to_it(self, rig: Rig) -> None:
        for source in ("good", "bad"):
            rig.producer.register(source)
        rig.send("good", b"a")
        rig.producer.send("bad", StreamId("nowhere"), PutEntry(b"b", "k"))
        with pytest.raises(StreamNotFound):
            rig.producer.flush("bad")
        assert [d.token for d in rig.producer.flush("good")] == [b"a"]

    def test_a_client_that_cannot_be_opened_fails_the_flush(self, rig: Rig) -> None:
        producer = KinesisSystemProducer(BrokenFactory(), options=INLINE, clock=rig.clock)
        producer.register("bundle")
        producer.send("bundle", FLIGHTS, PutEntry(b"a", "k"))
        with pytest.raises(ConfigurationError, match="no region"):
            producer.flush("bundle")

    def test_a_request_refused_as_a_whole_fails_the_culprits_bundle_alone(self, rig: Rig) -> None:
        """The stream takes 1 MiB per record; nobody has checked that before."""
        for i in range(8):
            rig.producer.register(i)
            rig.producer.send(i, FLIGHTS, PutEntry(bytes(MIB + 1) if i == 5 else b"%d" % i, f"key {i}"))
        with pytest.raises(RecordRefused, match="key 5"):
            rig.producer.flush(5)
        for i in (0, 1, 2, 3, 4, 6, 7):
            assert len(rig.producer.flush(i)) == 1
        assert Counter(rig.written()) == Counter(b"%d" % i for i in range(8) if i != 5)

    def test_with_report_failed_the_culprit_is_a_delivery(self, rig: Rig) -> None:
        rig.producer.register("bundle", report_failed=True)
        rig.send("bundle", b"a", bytes(MIB + 1), b"c")
        failed = [d for d in rig.producer.flush("bundle") if d.sequence_number is None]
        assert [(len(d.token), d.error_code) for d in failed if isinstance(d.token, bytes)] == [
            (MIB + 1, "ValidationException")
        ]
        assert failed[0].attempts > 1
        assert rig.written() == [b"a", b"c"]

    @pytest.mark.parametrize("count", [1, 500], ids=["a record", "a request's worth"])
    def test_an_entry_without_sequence_number_and_without_error_is_not_delivered(self, rig: Rig, count: int) -> None:
        """As a proxy or an emulator may answer; nobody has said that the record was written, so it is sent again."""
        producer = KinesisSystemProducer(
            SilentFactory(rig.fake.factory()), options=INLINE, clock=rig.clock, rng=random.Random(3)
        )
        producer.register("bundle")
        producer.send_many("bundle", FLIGHTS, [PutEntry(b"a", "k")] * count, [b"a"] * count, 2 * count)
        deliveries = producer.flush("bundle")
        second_time = {r.sequence_number for r in rig.fake.records("flights")[count:]}
        assert {d.sequence_number for d in deliveries} == second_time
        assert [d.attempts for d in deliveries] == [2] * count

    def test_throttled_records_are_tried_until_the_stream_takes_them(self) -> None:
        """One shard takes 1,000 records a second; five thousand need four seconds and a bit."""
        rig = Rig(shards=1, enforce_limits=True)
        rig.producer.register("bundle")
        start = rig.clock.monotonic_seconds()
        rig.send("bundle", *(b"%d" % i for i in range(5000)))
        rig.producer.flush("bundle")
        took = rig.clock.monotonic_seconds() - start
        assert Counter(rig.written()) == Counter(b"%d" % i for i in range(5000))
        assert 3 < took < 12, took

    def test_a_hot_shard_does_not_hold_the_others(self) -> None:
        """A bundle for the free shard ends while thousands of records wait for the throttled one."""
        rig = Rig(shards=2, enforce_limits=True)
        rig.producer.register("hot")
        rig.producer.register("free")
        for i in range(5000):
            rig.producer.send("hot", FLIGHTS, PutEntry(b"hot", "k", "0"), i)
        start = rig.clock.monotonic_seconds()
        for i in range(500):
            rig.producer.send("free", FLIGHTS, PutEntry(b"free", "k", str(2**128 - 1)), i)
        rig.producer.flush("free")
        assert rig.clock.monotonic_seconds() - start < 0.5
        rig.producer.flush("hot")
        assert Counter(rig.written()) == {b"hot": 5000, b"free": 500}
        requests = rig.fake.calls["PutRecords"]
        assert requests < 60, "no herd: a throttled shard is not asked again and again"

    def test_a_stream_that_places_records_itself_is_not_predicted(self) -> None:
        rig = Rig(enforce_limits=False)
        rig.fake.create_stream("auto", auto_distribution=True)
        rig.fake.faults.fail_entries(code="ProvisionedThroughputExceededException", times=3)
        rig.producer.register("bundle")
        for i in range(20):
            rig.producer.send("bundle", StreamId("auto"), PutEntry(b"%d" % i, "k"))
        assert len(rig.producer.flush("bundle")) == 20
        assert rig.fake.calls["ListShards"] == 0

    def test_throttles_without_permission_to_list_shards_still_end_well(self, rig: Rig) -> None:
        rig.fake.faults.deny_access("DescribeStreamSummary")
        rig.fake.faults.deny_access("ListShards")
        rig.fake.faults.fail_entries(code="ProvisionedThroughputExceededException", times=3)
        rig.producer.register("bundle")
        rig.send("bundle", b"a", b"b")
        assert len(rig.producer.flush("bundle")) == 2

    def test_a_shard_list_that_fails_in_any_way_does_not_keep_the_answer_back(self, rig: Rig) -> None:
        """It is asked for between a request and its answer: what it raises must not leave them waiting."""
        producer = KinesisSystemProducer(
            UnlistedFactory(rig.fake.factory()), options=INLINE, clock=rig.clock, rng=random.Random(3)
        )
        rig.fake.faults.fail_entries(code="ProvisionedThroughputExceededException", times=3)
        producer.register("bundle")
        for i in range(2):
            producer.send("bundle", FLIGHTS, PutEntry(b"%d" % i, "k"))
        assert len(producer.flush("bundle")) == 2
        assert producer.in_flight_bytes == 0

    def test_a_reshard_under_writes_does_not_stall(self) -> None:
        rig = Rig(shards=1, enforce_limits=True)
        rig.producer.register("bundle")
        rig.send("bundle", *(b"%d" % i for i in range(2500)))  # throttled by now, predicted for the first shard
        rig.fake.split("flights", "shardId-000000000000")
        for i in range(2500, 5000):
            rig.producer.send("bundle", FLIGHTS, PutEntry(b"%d" % i, f"key {i}"))
        rig.producer.flush("bundle")
        assert Counter(rig.written()) == Counter(b"%d" % i for i in range(5000))


class TestParcels:
    """A full request's worth, handed over at once."""

    DATA = tuple(b"%d" % i for i in range(500))

    def send(self, rig: Rig, source: str = "bundle", data: Sequence[bytes] = DATA) -> None:
        entries = [PutEntry(d, d.decode()) for d in data]
        rig.producer.send_many(source, FLIGHTS, entries, list(data), sum(e.size_bytes for e in entries))

    def test_it_is_one_request_and_every_record_has_its_own_delivery(self, rig: Rig) -> None:
        rig.producer.register("bundle")
        self.send(rig)
        deliveries = rig.producer.flush("bundle")
        assert rig.requests() == [list(self.DATA)]
        kept = {r.data: r for r in rig.fake.records("flights")}
        assert deliveries == [
            Delivery(d, FLIGHTS, kept[d].shard_id, kept[d].sequence_number, None, None, 1) for d in self.DATA
        ]
        assert rig.producer.in_flight_bytes == 0
        tally = rig.producer.tally("bundle")
        assert tally.records_written == 500
        assert tally.bytes_written == sum(2 * len(d) for d in self.DATA)

    @pytest.mark.parametrize("code", ["InternalFailure", "ProvisionedThroughputExceededException"])
    def test_only_the_records_that_failed_go_again(self, rig: Rig, code: str) -> None:
        rig.fake.faults.fail_entries(entry_where=lambda e: e["Data"] in (b"7", b"300"), code=code, times=2)
        rig.producer.register("bundle")
        self.send(rig)
        deliveries = rig.producer.flush("bundle")
        assert sorted(d.token for d in deliveries) == sorted(self.DATA)  # type: ignore[type-var]
        assert sorted(rig.written()) == sorted(self.DATA)
        assert {d.token for d in deliveries if d.attempts > 1} == {b"7", b"300"}
        assert rig.producer.in_flight_bytes == 0

    def test_a_refused_request_goes_again(self, rig: Rig) -> None:
        rig.fake.faults.throttle("PutRecords", times=1)
        rig.fake.faults.drop_connection("PutRecords", moment="before", times=1)
        rig.producer.register("bundle")
        self.send(rig)
        assert len(rig.producer.flush("bundle")) == 500
        assert sorted(rig.written()) == sorted(self.DATA)

    def test_a_record_that_kinesis_never_takes_is_found_in_it(self, rig: Rig) -> None:
        rig.fake.faults.fail(
            "PutRecords", "InvalidArgumentException", where=lambda p: any(r["Data"] == b"7" for r in p["Records"]),
            times=None,
        )  # fmt: skip
        rig.producer.register("bundle", report_failed=True)
        self.send(rig)
        deliveries = rig.producer.flush("bundle")
        assert [d.token for d in deliveries if d.sequence_number is None] == [b"7"]
        assert sorted(rig.written()) == sorted(set(self.DATA) - {b"7"})

    def test_purged_before_it_left_it_is_never_sent(self, rig: Rig) -> None:
        for source in ("bundle", "other"):
            rig.producer.register(source)
        self.send(rig)
        rig.producer.purge("bundle")
        assert rig.producer.in_flight_bytes == 0
        rig.send("other", b"x")
        rig.producer.flush("other")
        assert rig.written() == [b"x"]

    def test_records_of_others_are_not_kept_waiting_by_many(self, rig: Rig) -> None:
        for source in ("bundle", "other"):
            rig.producer.register(source)
        rig.send("other", b"x")
        for _ in range(2):
            self.send(rig)
        rig.producer.flush("other")
        assert rig.fake.calls["PutRecords"] <= 2
        rig.producer.flush("bundle")
        assert len(rig.written()) == 1001

    def test_a_failure_counts_its_records_and_not_the_parcel(self, rig: Rig) -> None:
        rig.producer.register("bundle")
        self.send(rig)
        rig.producer.stop()
        with pytest.raises(DeliveryFailed, match="500 records"):
            rig.producer.flush("bundle")

    def test_fewer_than_a_request_takes_share_one_with_others(self, rig: Rig) -> None:
        for source in ("bundle", "other"):
            rig.producer.register(source)
            self.send(rig, source, self.DATA[:100])
        rig.producer.flush("bundle")
        assert [len(r) for r in rig.requests()] == [200]

    def test_a_purged_source_with_deliveries_nobody_collected_is_freed(self, rig: Rig) -> None:
        """The garbage collector does not look into parcels, so no cycle may be left."""
        rig.producer.register("bundle")
        self.send(rig)
        rig.producer.register("other")
        rig.send("other", b"x")
        rig.producer.flush("other")

        class Token:
            pass

        token = Token()
        rig.producer.send_many("bundle", FLIGHTS, [PutEntry(b"y", "k")] * 500, [token] * 500, 1000)
        gone = weakref.ref(token)
        del token
        rig.producer.purge("bundle")
        rig.producer.register("bundle")
        rig.producer.flush("bundle")
        gc.collect()
        assert gone() is None


class TestOrder:
    def test_a_keys_records_keep_their_order_across_failures(self, rig: Rig) -> None:
        chance = random.Random(5)
        rig.fake.faults.fail_entries(entry_where=lambda e: chance.random() < 0.3, code="InternalFailure", times=None)
        rig.producer.register("bundle")
        for i in range(300):
            key = f"key {i % 7}"
            rig.producer.send("bundle", FLIGHTS, PutEntry(b"%d" % i, key), turn_key=key)
        rig.producer.flush("bundle")
        per_key = defaultdict(list)
        for record in rig.fake.records("flights"):
            per_key[record.partition_key].append(int(record.data))
        assert per_key == {f"key {k}": list(range(k, 300, 7)) for k in range(7)}

    def test_different_keys_travel_together(self, rig: Rig) -> None:
        rig.producer.register("bundle")
        for i in range(5000):
            key = f"key {i % 500}"
            rig.producer.send("bundle", FLIGHTS, PutEntry(b"%d" % i, key), turn_key=key)
        rig.producer.flush("bundle")
        assert rig.fake.calls["PutRecords"] == 10


class TestBackPressure:
    def test_send_makes_room_before_it_takes_more(self) -> None:
        rig = Rig(options=ProducerOptions(request_threads=0, max_in_flight_bytes=10_000))
        rig.producer.register("bundle")
        most = 0
        for _i in range(500):
            rig.send("bundle", bytes(1000))
            most = max(most, rig.producer.in_flight_bytes)
        assert 5_000 < most <= 10_000
        rig.producer.flush("bundle")
        assert len(rig.written()) == 500

    def test_a_record_larger_than_the_bound_goes_alone(self) -> None:
        rig = Rig(options=ProducerOptions(request_threads=0, max_in_flight_bytes=10_000))
        rig.producer.register("bundle")
        rig.send("bundle", b"before", bytes(50_000), b"after")
        rig.producer.flush("bundle")
        assert [len(r) for r in rig.written()] == [6, 50_000, 5]
        assert [len(request) for request in rig.requests()] == [1, 1, 1]

    def test_a_full_bound_does_not_make_requests_small(self) -> None:
        """While records are on their way, which will make room, what there is waits for them to share a request."""
        rig = Rig(options=ProducerOptions(request_threads=0, max_in_flight_bytes=10_000, linger_seconds=1))
        rig.fake.faults.fail_entries(indexes=[0, 1, 2], code="InternalFailure")
        rig.producer.register("bundle")
        for i in range(10):
            rig.send("bundle", b"%d" % i + bytes(1000))
        assert [[data[:1] for data in request] for request in rig.requests()] == [
            [b"0", b"1", b"2", b"3", b"4", b"5"],
            [b"0", b"1", b"2", b"6", b"7", b"8"],
        ]

    def test_a_bound_full_of_abandoned_records_does_not_block(self) -> None:
        rig = Rig(options=ProducerOptions(request_threads=0, max_in_flight_bytes=10_000))
        rig.producer.register("gone")
        rig.send("gone", bytes(9000))
        rig.producer.abandon("gone")
        rig.producer.register("bundle")
        rig.send("bundle", bytes(9000))
        assert rig.fake.calls["PutRecords"] == 0, "its bytes were released without sending it"


class TestPurge:
    def test_purged_records_are_not_written(self, rig: Rig) -> None:
        rig.producer.register("bundle")
        rig.send("bundle", b"a")
        rig.producer.purge("bundle")
        rig.producer.purge("bundle")
        rig.producer.register("other")
        rig.send("other", b"b")
        rig.producer.flush("other")
        assert rig.written() == [b"b"]
        assert rig.producer.in_flight_bytes == 0

    def test_purged_records_are_not_kept_in_memory(self, rig: Rig) -> None:
        """Wherever they stand: here behind one that cannot be sent for a while, and behind one of their key."""

        class Token:
            pass

        rig.fake.faults.throttle("PutRecords", times=None)
        rig.producer.register("stays", delivery_timeout_seconds=1e9)
        rig.send("stays", b"stays", ordered=True)
        rig.producer.register("gone")
        tokens = [Token(), Token()]
        left = [weakref.ref(token) for token in tokens]
        rig.producer.send("gone", FLIGHTS, PutEntry(b"ready", "other"), tokens[0])
        rig.producer.send("gone", FLIGHTS, PutEntry(b"turn", "k"), tokens[1], turn_key="k")
        tokens.clear()
        rig.producer.purge("gone")
        assert [ref() for ref in left] == [None, None]

    def test_stop_reports_what_is_not_acknowledged(self, rig: Rig) -> None:
        rig.producer.register("bundle")
        rig.send("bundle", b"a", b"b")
        rig.producer.stop()
        with pytest.raises(DeliveryFailed, match="stopped with 2 records"):
            rig.producer.flush("bundle")
        with pytest.raises(DeliveryFailed, match="stopped"):
            rig.send("bundle", b"c")
        assert rig.producer.in_flight_bytes == 0

    def test_the_tally_counts_requests_and_failures_once(self, rig: Rig) -> None:
        rig.fake.faults.fail_entries(indexes=[0], code="InternalFailure")
        rig.producer.register("bundle")
        rig.send("bundle", b"a", b"b")
        rig.producer.flush("bundle")
        tally = rig.producer.tally("bundle")
        assert tally.requests == [(2, 4), (1, 2)]
        assert tally.failures == {"InternalFailure": 1}
        assert tally.bytes_written == 4
        assert len(tally.acknowledge_seconds) == 2
        assert rig.producer.tally("bundle").requests == []


@pytest.mark.parametrize(
    ("option", "value"),
    [("max_in_flight_bytes", 0), ("linger_seconds", -1), ("linger_seconds", 61), ("request_threads", 65)],
)
def test_a_wrong_option_is_named_with_its_value(option: str, value: float) -> None:
    with pytest.raises(ConfigurationError, match=f"{option} must be .* got {value}"):
        ProducerOptions(**{option: value})  # type: ignore[arg-type]


# With threads. Nothing sleeps: a gate in front of the fake says when requests arrive and lets them pass.


@dataclass(frozen=True)
class BrokenFactory:
    def connect(self, stream: StreamId | None = None) -> KinesisClient:
        raise ConfigurationError("no region is known")


@dataclass(frozen=True)
class UnlistedFactory:
    inner: FakeClientFactory

    def connect(self, stream: StreamId | None = None) -> KinesisClient:
        client = self.inner.connect(stream)

        def list_shards(stream: StreamId, shard_filter: object = None) -> list[Shard]:
            raise RuntimeError("this client is closed")

        client.list_shards = list_shards  # type: ignore[method-assign]
        return client


@dataclass(frozen=True)
class SilentFactory:
    """Its first answer says nothing about any record."""

    inner: FakeClientFactory

    def connect(self, stream: StreamId | None = None) -> KinesisClient:
        client = self.inner.connect(stream)
        put_records = client.put_records
        answers: Iterator[Callable[[list[PutOutcome]], list[PutOutcome]]] = itertools.chain(
            [lambda outcomes: [PutOutcome() for _ in outcomes]], itertools.repeat(lambda outcomes: outcomes)
        )
        client.put_records = lambda *request: next(answers)(put_records(*request))  # type: ignore[method-assign]
        return client


@dataclass
class Gate:
    """Requests wait here while it is closed."""

    open: threading.Event = field(default_factory=threading.Event)
    arrivals: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    threads: list[threading.Thread] = field(default_factory=list)

    def wait_for_arrivals(self, count: int) -> None:
        for _ in range(count):
            assert self.arrivals.acquire(timeout=30), "the request never came"


class GatedClient:
    def __init__(self, inner: KinesisClient, gate: Gate) -> None:
        self._inner = inner
        self._gate = gate
        self.describe_stream = inner.describe_stream
        self.list_shards = inner.list_shards
        self.get_shard_iterator = inner.get_shard_iterator
        self.get_records = inner.get_records
        self.close = inner.close

    def put_records(self, stream: StreamId, entries: Sequence[PutEntry]) -> list[PutOutcome]:
        self._gate.threads.append(threading.current_thread())
        self._gate.arrivals.release()
        assert self._gate.open.wait(timeout=30)
        return self._inner.put_records(stream, entries)


@dataclass(frozen=True, eq=False)
class GatedFactory:
    inner: FakeClientFactory
    gate: Gate

    def connect(self, stream: StreamId | None = None) -> KinesisClient:
        return GatedClient(self.inner.connect(stream), self.gate)


class Threads:
    """A producer with threads in front of a gate."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.fake = FakeKinesis()
        self.fake.create_stream("flights", shards=2)
        self.producers: list[KinesisSystemProducer] = []

    def producer(self, **options: object) -> KinesisSystemProducer:
        producer = KinesisSystemProducer(
            GatedFactory(self.fake.factory(), self.gate),
            options=ProducerOptions(**options),  # type: ignore[arg-type]
        )
        self.producers.append(producer)
        return producer


@pytest.fixture
def threads() -> Iterator[Threads]:
    rig = Threads()
    yield rig
    rig.gate.open.set()
    for producer in rig.producers:
        producer.stop()


def start(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def join(thread: threading.Thread) -> None:
    thread.join(timeout=30)
    assert not thread.is_alive()


class TestThreads:
    def test_a_lone_bundle_makes_its_request_itself(self, threads: Threads) -> None:
        """No hand-over to another thread and back: a bundle of one costs what a plain PutRecords costs."""
        threads.gate.open.set()
        producer = threads.producer(linger_seconds=60)
        producer.register("bundle")
        producer.send("bundle", FLIGHTS, PutEntry(b"a", "k"))
        producer.flush("bundle")
        assert threads.gate.threads == [threading.current_thread()]

    def test_full_requests_leave_while_the_bundle_still_sends_several_at_a_time(self, threads: Threads) -> None:
        producer = threads.producer(request_threads=4)
        producer.register("bundle")
        for i in range(2000):
            producer.send("bundle", FLIGHTS, PutEntry(b"%d" % i, "k"))
        threads.gate.wait_for_arrivals(4)
        threads.gate.open.set()
        assert len(producer.flush("bundle")) == 2000
        assert len(set(threads.gate.threads)) == 4

    def test_a_record_leaves_after_the_linger_without_a_flush(self, threads: Threads) -> None:
        producer = threads.producer()
        producer.register("bundle")
        producer.send("bundle", FLIGHTS, PutEntry(b"a", "k"))
        threads.gate.wait_for_arrivals(1)

    def test_send_blocks_on_the_bound_and_goes_on_when_bytes_are_released(self, threads: Threads) -> None:
        producer = threads.producer(max_in_flight_bytes=2000, linger_seconds=60)
        producer.register("bundle")

        def send() -> None:
            for _ in range(4):
                producer.send("bundle", FLIGHTS, PutEntry(bytes(1000), "k"))

        sender = start(send)
        threads.gate.wait_for_arrivals(1)  # a full bound sends what is there, whatever the linger
        assert producer.in_flight_bytes <= 2000
        threads.gate.open.set()
        join(sender)
        producer.flush("bundle")
        assert len(threads.fake.records("flights")) == 4

    def test_a_stream_that_takes_nothing_does_not_block_senders_to_others(self, threads: Threads) -> None:
        """Its bundle waits with whole requests, far from the bound in bytes."""
        producer = threads.producer(request_threads=1)
        producer.register("stuck")
        entries = [PutEntry(b"x", "k")] * 500

        def send() -> None:
            for _ in range(6):
                producer.send_many("stuck", FLIGHTS, list(entries), [None] * 500, 1000)

        sender = start(send)
        threads.gate.wait_for_arrivals(1)
        sender.join(timeout=0.2)
        assert sender.is_alive(), "more of it would only be memory"
        threads.fake.create_stream("delays")
        producer.register("bundle")
        join(start(lambda: producer.send("bundle", StreamId("delays"), PutEntry(b"a", "k"))))
        threads.gate.open.set()
        join(sender)
        assert len(producer.flush("stuck")) == 3000

    def test_a_sender_that_is_purged_while_it_waits_is_woken(self, threads: Threads) -> None:
        producer = threads.producer(max_in_flight_bytes=2000, linger_seconds=60)
        producer.register("bundle")
        errors: list[BaseException] = []

        def send() -> None:
            try:
                for _ in range(4):
                    producer.send("bundle", FLIGHTS, PutEntry(bytes(1000), "k"))
            except ValueError as error:
                errors.append(error)

        sender = start(send)
        threads.gate.wait_for_arrivals(1)
        producer.purge("bundle")
        join(sender)
        assert "not registered" in str(errors[0])

    def test_an_abandoned_record_in_a_request_is_released_by_the_answer(self, threads: Threads) -> None:
        producer = threads.producer()
        producer.register("gone")
        producer.send("gone", FLIGHTS, PutEntry(b"gone", "k"))
        threads.gate.wait_for_arrivals(1)
        producer.purge("gone")
        assert producer.in_flight_bytes > 0
        threads.gate.open.set()
        producer.stop()
        assert producer.in_flight_bytes == 0

    def test_a_purge_sends_what_waited_for_its_records_turn(self, threads: Threads) -> None:
        """The purged record waits to be tried again, in ten minutes; the other bundle's need not wait as long."""
        threads.gate.open.set()
        threads.fake.faults.fail("PutRecords", "InternalFailure", times=1)
        producer = threads.producer(backoff=BackoffPolicy(initial_seconds=600, max_seconds=600))
        producer.register("gone")
        producer.send("gone", FLIGHTS, PutEntry(b"gone", "k"), turn_key="k")
        producer.register("bundle")
        producer.send("bundle", FLIGHTS, PutEntry(b"a", "k"), b"a", turn_key="k")
        threads.gate.wait_for_arrivals(1)
        while not producer._outboxes[FLIGHTS]._delayed:  # its failure is handled
            threading.Event().wait(0.001)
        flusher = start(lambda: producer.flush("bundle"))
        while not producer._sources["bundle"].ledger.flushing:
            threading.Event().wait(0.001)
        producer.purge("gone")
        join(flusher)
        assert [r.data for r in threads.fake.records("flights")] == [b"a"]

    def test_a_finalizer_that_runs_under_the_lock_does_not_deadlock(self, threads: Threads) -> None:
        """The collector may run in the middle of anything: here, literally."""
        producer = threads.producer(linger_seconds=60)
        producer.register("gone")
        producer.send("gone", FLIGHTS, PutEntry(b"gone", "k"))

        class Handle:
            pass

        handle = Handle()
        weakref.finalize(handle, producer.abandon, "gone")
        with producer._lock:
            del handle
            gc.collect()
        producer.register("next")
        assert producer.in_flight_bytes == 0

    def test_concurrent_bundles_get_exactly_their_own(self, threads: Threads) -> None:
        threads.gate.open.set()
        chance = random.Random(1)
        threads.fake.faults.fail_entries(
            entry_where=lambda e: chance.random() < 0.05, code="InternalFailure", times=None
        )
        producer = threads.producer(max_in_flight_bytes=60_000, linger_seconds=0.001)
        got: dict[int, list[object]] = {}

        def bundle(number: int) -> None:
            for round_number in range(5):
                source = (number, round_number)
                producer.register(source)
                for i in range(60):
                    producer.send(source, FLIGHTS, PutEntry(b"%d" % i, f"{number}"), (number, round_number, i))
                got.setdefault(number, []).extend(d.token for d in producer.flush(source))
                producer.purge(source)

        workers = [start(lambda n=n: bundle(n)) for n in range(10)]  # type: ignore[misc]
        for worker in workers:
            join(worker)
        assert {n: sorted(tokens) for n, tokens in got.items()} == {  # type: ignore[type-var]
            n: [(n, r, i) for r in range(5) for i in range(60)] for n in range(10)
        }
        assert len(threads.fake.records("flights")) == 3000
        assert producer.in_flight_bytes == 0

    def test_stop_during_a_flush_delivers_or_reports(self, threads: Threads) -> None:
        """What is in a request is waited for; what is not is reported to its source."""
        producer = threads.producer(request_threads=1)
        outcome: list[object] = []
        producer.register("early")
        producer.register("late")

        def flush(source: str) -> None:
            try:
                outcome.append((source, len(producer.flush(source))))
            except DeliveryFailed as error:
                outcome.append((source, str(error)))

        producer.send("early", FLIGHTS, PutEntry(b"early", "k"))
        early = start(lambda: flush("early"))
        threads.gate.wait_for_arrivals(1)
        producer.send("late", FLIGHTS, PutEntry(b"late", "k"))
        stopper = start(producer.stop)
        join(start(lambda: flush("late")))
        threads.gate.open.set()
        join(early)
        join(stopper)
        written = [r.data for r in threads.fake.records("flights")]
        assert b"late" not in written or ("late", 1) in outcome
        assert len(outcome) == 2

    def test_stop_waits_for_the_request_that_a_flush_makes_itself(self, threads: Threads) -> None:
        """Else its connection is closed under it."""
        producer = threads.producer(linger_seconds=60)
        producer.register("bundle")
        producer.send("bundle", FLIGHTS, PutEntry(b"a", "k"))

        def flush() -> None:
            with pytest.raises(DeliveryFailed, match="stopped"):
                producer.flush("bundle")

        flusher = start(flush)
        threads.gate.wait_for_arrivals(1)
        stopper = start(producer.stop)
        stopper.join(timeout=0.2)
        assert stopper.is_alive()
        threads.gate.open.set()
        join(stopper)
        join(flusher)
        assert [r.data for r in threads.fake.records("flights")] == [b"a"]

    def test_equal_options_share_a_producer_and_others_do_not(self, threads: Threads) -> None:
        factory = threads.fake.factory()
        one = shared_producer(factory)
        assert shared_producer(threads.fake.factory()) is one
        assert shared_producer(factory, ProducerOptions(linger_seconds=1)) is not one

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_a_forked_child_starts_with_a_producer_of_its_own(self, threads: Threads) -> None:
        factory = threads.fake.factory()
        inherited = shared_producer(factory)
        with inherited._lock:  # as if another thread were in the middle of something
            child = os.fork()
            if child == 0:
                signal.alarm(20)  # a child that waits for a lock nobody holds must not outlive the test
                own = shared_producer(factory)
                own.register("bundle")
                own.send("bundle", FLIGHTS, PutEntry(b"a", "k"))
                os._exit(0 if own is not inherited and len(own.flush("bundle")) == 1 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# What must hold whatever happens.

KEYS = ("a", "b", "c", "d")


class AnyBundlesAnyFailures(RuleBasedStateMachine):
    """Bundles open, send, flush, fail and are abandoned, while requests fail in every way and shards split and merge.

    Nothing acknowledged is missing, nothing is acknowledged to the wrong bundle, what is sent in order is there in
    order, and the bytes add up.
    """

    MAX_IN_FLIGHT_BYTES = 20_000

    def __init__(self) -> None:
        super().__init__()
        self.clock = SimulatedClock()
        self.fake = FakeKinesis(clock=self.clock)
        self.fake.create_stream("flights", shards=2)
        self.producer = KinesisSystemProducer(
            self.fake.factory(),
            options=ProducerOptions(request_threads=0, max_in_flight_bytes=self.MAX_IN_FLIGHT_BYTES),
            clock=self.clock,
            rng=random.Random(0),
        )
        self.bundles: dict[int, list[bytes]] = {}
        self.opened = 0
        self.serial = 0
        self.acknowledged: set[bytes] = set()

    @rule()
    def open_bundle(self) -> None:
        self.opened += 1
        self.producer.register(self.opened, delivery_timeout_seconds=1e9)
        self.bundles[self.opened] = []

    @precondition(lambda self: self.bundles)
    @rule(data=st.data(), keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=30), ordered=st.booleans())
    def send(self, data: st.DataObject, keys: list[str], ordered: bool) -> None:
        source = data.draw(st.sampled_from(sorted(self.bundles)))
        for key in keys:
            self.serial += 1
            # Ordered and unordered records have keys of their own: mixing them promises nothing.
            key = f"{key}-ordered" if ordered else key
            record = b"%d" % self.serial
            self.bundles[source].append(record)
            self.producer.send(source, FLIGHTS, PutEntry(record, key), record, turn_key=key if ordered else None)

    @precondition(lambda self: self.bundles)
    @rule(data=st.data())
    def flush(self, data: st.DataObject) -> None:
        source = data.draw(st.sampled_from(sorted(self.bundles)))
        delivered = self.producer.flush(source)
        assert sorted(d.token for d in delivered) == sorted(self.bundles[source])  # type: ignore[type-var]
        kept = {r.data: r for r in self.fake.records("flights")}
        assert all(d.token in kept for d in delivered)
        self.acknowledged.update(self.bundles[source])
        self.bundles[source] = []

    @precondition(lambda self: self.bundles)
    @rule(data=st.data(), politely=st.booleans())
    def give_up(self, data: st.DataObject, politely: bool) -> None:
        source = data.draw(st.sampled_from(sorted(self.bundles)))
        (self.producer.purge if politely else self.producer.abandon)(source)
        del self.bundles[source]

    @rule(
        seed=st.integers(0, 1000),
        code=st.sampled_from(["InternalFailure", "ProvisionedThroughputExceededException", "Unheard"]),
        times=st.integers(1, 5),
    )
    def some_entries_will_fail(self, seed: int, code: str, times: int) -> None:
        chance = random.Random(seed)
        self.fake.faults.fail_entries(entry_where=lambda e: chance.random() < 0.5, code=code, times=times)

    @rule(moment=st.sampled_from(["before", "after"]), times=st.integers(1, 3))
    def connections_will_drop(self, moment: str, times: int) -> None:
        self.fake.faults.drop_connection("PutRecords", moment="before" if moment == "before" else "after", times=times)

    @rule(times=st.integers(1, 3))
    def calls_will_be_throttled(self, times: int) -> None:
        self.fake.faults.throttle("PutRecords", times=times)

    @rule(data=st.data())
    def split(self, data: st.DataObject) -> None:
        shards = [s for s in self.fake.factory().connect().list_shards(FLIGHTS) if not s.is_closed]
        if len(shards) < 8:
            self.fake.split("flights", data.draw(st.sampled_from(shards)).shard_id)

    @rule(data=st.data())
    def merge(self, data: st.DataObject) -> None:
        shards = [s for s in self.fake.factory().connect().list_shards(FLIGHTS) if not s.is_closed]
        shards.sort(key=lambda s: s.hash_key_range)
        if len(shards) > 1:
            at = data.draw(st.integers(0, len(shards) - 2))
            self.fake.merge("flights", shards[at].shard_id, shards[at + 1].shard_id)

    @rule(seconds=st.floats(0, 20))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @invariant()
    def bytes_add_up(self) -> None:
        assert 0 <= self.producer.in_flight_bytes <= self.MAX_IN_FLIGHT_BYTES

    def teardown(self) -> None:
        for source, sent in self.bundles.items():
            assert sorted(d.token for d in self.producer.flush(source)) == sorted(sent)  # type: ignore[type-var]
            self.acknowledged.update(sent)
            self.producer.purge(source)
        self.producer.register("last")  # buries the abandoned
        assert self.producer.in_flight_bytes == 0
        records = self.fake.records("flights")
        assert self.acknowledged <= {r.data for r in records}
        # A shard's children are younger than it, so this is the order in which a reader sees a key.
        for key in KEYS:
            read = [int(r.data) for r in records if r.partition_key == f"{key}-ordered"]
            assert read == sorted(read), "a repeated record may follow itself, never its successor"


AnyBundlesAnyFailures.TestCase.settings = settings(stateful_step_count=40)
TestAnyBundlesAnyFailures = AnyBundlesAnyFailures.TestCase


class AnyParcelsAnyFailures(AnyBundlesAnyFailures):
    """The same with a full request's worth at a time among them."""

    MAX_IN_FLIGHT_BYTES = 1_200_000

    @precondition(lambda self: self.bundles)
    @rule(data=st.data())
    def send_parcel(self, data: st.DataObject) -> None:
        source = data.draw(st.sampled_from(sorted(self.bundles)))
        records = [b"%d" % (self.serial + i) for i in range(1, 501)]
        self.serial += 500
        self.bundles[source] += records
        entries = [PutEntry(record, record.decode()) for record in records]
        self.producer.send_many(source, FLIGHTS, entries, list(records), sum(e.size_bytes for e in entries))


AnyParcelsAnyFailures.TestCase.settings = settings(stateful_step_count=20, max_examples=30)
TestAnyParcelsAnyFailures = AnyParcelsAnyFailures.TestCase
