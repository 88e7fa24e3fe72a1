"""`WriteToKinesis`: its options, its DoFn driven by hand, and whole pipelines on the FnApiRunner."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterable
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.internal import pickler
from apache_beam.metrics.metric import MetricsFilter
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.pvalue import TaggedOutput
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.transforms import window
from apache_beam.transforms.error_handling import ErrorHandler
from apache_beam.transforms.util import WaitOn
from apache_beam.utils.timestamp import Timestamp
from apache_beam.utils.windowed_value import WindowedValue

from samza_kinesis_io import metrics
from samza_kinesis_io.aggregation import deaggregate, is_aggregated
from samza_kinesis_io.client import ClientConfig, StreamId
from samza_kinesis_io.errors import (
    AccessRefused,
    ConfigurationError,
    DeliveryFailed,
    EndpointUnreachable,
    RecordRefused,
    StreamNotFound,
    Throttled,
    TransientServiceError,
)
from samza_kinesis_io.limits import MAX_HASH_KEY, MIB
from samza_kinesis_io.producer import shared_producer
from samza_kinesis_io.records import KinesisRecord, OutgoingRecord
from samza_kinesis_io.sink import (
    FailedRecord,
    FailedRecordCoder,
    WriteToKinesis,
    WrittenRecord,
    WrittenRecordCoder,
    _WriteFn,
)
from samza_kinesis_io.testing import FakeKinesis, LocalKinesis, SimulatedClock

KEY_OF_257_CHARACTERS = "x" * 257


@pytest.fixture
def clock() -> SimulatedClock:
    return SimulatedClock()


@pytest.fixture
def fake(clock: SimulatedClock) -> FakeKinesis:
    fake = FakeKinesis(clock=clock)
    fake.create_stream("delays", shards=2)
    return fake


class Worker:
    """One DoFn instance as a runner drives it, without threads."""

    def __init__(self, fake: FakeKinesis, stream: Any = "delays", **options: Any) -> None:
        sink = WriteToKinesis(stream, client=fake.factory(), clock=fake.clock, request_threads=0, **options)
        self.fn: _WriteFn = pickler.loads(pickler.dumps(_WriteFn(sink._settings)))
        self.producer = shared_producer(sink._settings.client, sink._settings.options, fake.clock)
        self.fn.setup()

    def process(self, element: Any, seconds: int = 0) -> list[Any]:
        value = WindowedValue(element, Timestamp(seconds), (window.GlobalWindow(),))
        return list(self.fn.process(element, value) or ())

    def bundle(self, *elements: Any) -> list[Any]:
        self.fn.start_bundle()
        outputs = [o for element in elements for o in self.process(element)]
        return [*outputs, *self.fn.finish_bundle()]


def written(outputs: Iterable[Any]) -> list[Any]:
    return [o.value.element for o in outputs if not isinstance(o, TaggedOutput)]


def failed(outputs: Iterable[Any]) -> list[FailedRecord]:
    """From `process` as they are, and in their windows from `finish_bundle`."""
    values = [o.value for o in outputs if isinstance(o, TaggedOutput)]
    return [v.value if isinstance(v, WindowedValue) else v for v in values]


def data_of(fake: FakeKinesis, stream: str = "delays") -> list[bytes]:
    return [r.data for r in fake.records(stream)]


class TestOptions:
    @pytest.mark.parametrize(
        ("stream", "options", "message"),
        [
            ("", {}, r"stream must be a stream name .* got ''"),
            ("no spaces", {}, r"stream must be a stream name .* got 'no spaces'"),
            (7, {}, r"stream must be a stream name .* got 7"),
            ("s", {"partition_key": ""}, "partition_key must have 1-256 characters, got 0"),
            ("s", {"partition_key": KEY_OF_257_CHARACTERS}, "partition_key must have 1-256 characters, got 257"),
            ("s", {"partition_key": 7}, "partition_key must be a str, got int"),
            ("s", {"partition_key": "\ud800"}, "partition_key must be valid Unicode"),
            ("s", {"explicit_hash_key": -1}, r"explicit_hash_key must be between 0 and 2\^128-1, got -1"),
            ("s", {"explicit_hash_key": 2**128}, "explicit_hash_key must be between"),
            ("s", {"explicit_hash_key": "abc"}, "explicit_hash_key must be between .* got 'abc'"),
            ("s", {"serializer": "json"}, "serializer must be a function of the element, got 'json'"),
            ("s", {"ordered": 1}, "ordered must be True or False, got 1"),
            ("s", {"aggregate": "yes"}, "aggregate must be True or False, got 'yes'"),
            ("s", {"dead_letters": None}, "dead_letters must be True or False, got None"),
            ("s", {"client": {"connect": 1}}, "client must be a ClientConfig"),
            ("s", {"client": "us-east-1"}, "client must be a ClientConfig .* got 'us-east-1'"),
            ("s", {"max_record_bytes": 11 * MIB}, "max_record_bytes must be between 1 and 10485760"),
            ("s", {"max_in_flight_bytes": 0}, "max_in_flight_bytes must be >= 1, got 0"),
            ("s", {"linger_seconds": -1}, "linger_seconds must be between 0 and 60, got -1"),
            ("s", {"delivery_timeout_seconds": 0}, "delivery_timeout_seconds must be > 0, got 0"),
        ],
    )
    def test_a_wrong_option_is_named_with_its_value_when_the_pipeline_is_built(
        self, stream: Any, options: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ConfigurationError, match=message):
            WriteToKinesis(stream, **options)

    def test_a_stream_may_be_an_arn(self, fake: FakeKinesis) -> None:
        arn = fake.factory().connect().describe_stream(StreamId("delays")).arn
        assert written(Worker(fake, arn).bundle(b"a")) == [b"a"]

    def test_failed_without_dead_letters_says_what_to_do(self, fake: FakeKinesis) -> None:
        result = beam.Pipeline() | beam.Create([b"a"]) | WriteToKinesis("delays", client=fake.factory())
        with pytest.raises(ConfigurationError, match="dead_letters=True"):
            _ = result.failed


class TestRouting:
    def test_bytes_get_a_random_key_each(self, fake: FakeKinesis) -> None:
        Worker(fake, rng=random.Random(1)).bundle(*[b"x"] * 100)
        keys = {r.partition_key for r in fake.records("delays")}
        assert len(keys) == 100
        assert {r.shard_id for r in fake.records("delays")} == {"shardId-000000000000", "shardId-000000000001"}

    def test_a_constant_key(self, fake: FakeKinesis) -> None:
        Worker(fake, partition_key="AA").bundle(b"a", b"b")
        assert {r.partition_key for r in fake.records("delays")} == {"AA"}

    def test_functions_of_the_element(self, fake: FakeKinesis) -> None:
        fake.create_stream("other", shards=2)
        worker = Worker(
            fake,
            stream=lambda e: e["stream"],
            partition_key=lambda e: e["carrier"],
            explicit_hash_key=lambda e: e["hash"],
            serializer=lambda e: e["carrier"].encode(),
        )
        worker.bundle(
            {"stream": "delays", "carrier": "AA", "hash": 0},
            {"stream": "other", "carrier": "UA", "hash": str(MAX_HASH_KEY)},
        )
        (aa,), (ua,) = fake.records("delays"), fake.records("other")
        assert (aa.data, aa.partition_key, aa.shard_id) == (b"AA", "AA", "shardId-000000000000")
        assert (ua.data, ua.partition_key, ua.shard_id) == (b"UA", "UA", "shardId-000000000001")

    def test_an_outgoing_record_goes_before_the_options(self, fake: FakeKinesis) -> None:
        fake.create_stream("other")
        Worker(fake, partition_key="option").bundle(
            OutgoingRecord(b"a"), OutgoingRecord(b"b", partition_key="own"), OutgoingRecord(b"c", stream="other")
        )
        assert {(r.data, r.partition_key) for r in fake.records("delays")} == {(b"a", "option"), (b"b", "own")}
        assert data_of(fake, "other") == [b"c"]

    def test_a_serializer_may_give_an_outgoing_record(self, fake: FakeKinesis) -> None:
        Worker(fake, serializer=lambda e: OutgoingRecord(str(e).encode(), partition_key="k")).bundle(7)
        assert [(r.data, r.partition_key) for r in fake.records("delays")] == [(b"7", "k")]

    @pytest.mark.parametrize("key", ["x", "x" * 256, "\u20ac" * 256, "\U0001f6eb" * 256, "0"])
    def test_keys_of_1_to_256_characters_of_any_alphabet(self, fake: FakeKinesis, key: str) -> None:
        Worker(fake, partition_key=lambda e: key).bundle(b"a")
        assert fake.records("delays")[0].partition_key == key

    def test_kinds_of_str_and_bytes_are_what_they_say(self, fake: FakeKinesis) -> None:
        """numpy's, say, of a column of keys. A client encodes the classes themselves only."""

        class Key(str):
            pass

        class Data(bytes):
            pass

        with LocalKinesis(fake) as kinesis:
            sink = WriteToKinesis(
                "delays",
                client=ClientConfig(region="us-east-1", endpoint_url=kinesis.endpoint_url),
                partition_key=lambda e: Key("k"),
                serializer=Data,
                request_threads=0,
            )
            fn = _WriteFn(sink._settings)
            fn.setup()
            fn.start_bundle()
            fn.process(b"a", WindowedValue(b"a", Timestamp(0), (window.GlobalWindow(),)))
            assert written(fn.finish_bundle()) == [b"a"]
        assert [(r.data, r.partition_key) for r in fake.records("delays")] == [(b"a", "k")]

    @pytest.mark.parametrize("given", [0, "0", "00", 5, MAX_HASH_KEY, str(MAX_HASH_KEY)])
    def test_hash_keys_from_end_to_end(self, fake: FakeKinesis, given: str | int) -> None:
        Worker(fake, explicit_hash_key=given).bundle(b"a")
        Worker(fake, explicit_hash_key=lambda e: given).bundle(b"b")
        assert len({r.shard_id for r in fake.records("delays")}) == 1

    def test_ordered_without_a_key_is_refused(self, fake: FakeKinesis) -> None:
        with pytest.raises(ConfigurationError, match="ordered=True .* give partition_key="):
            Worker(fake, ordered=True, dead_letters=True).bundle(b"a")


BAD_ELEMENTS = [
    ({}, 7, "InvalidData", "got int; give serializer="),
    ({"serializer": lambda e: e}, "text", "InvalidData", "got str from serializer"),
    ({"serializer": lambda e: 1 // 0}, b"a", "SerializationFailed", "serializer failed .* ZeroDivisionError"),
    ({"partition_key": lambda e: ""}, b"a", "InvalidPartitionKey", "must have 1-256 characters, got 0"),
    ({"partition_key": lambda e: KEY_OF_257_CHARACTERS}, b"a", "InvalidPartitionKey", "got 257"),
    ({"partition_key": lambda e: 7}, b"a", "InvalidPartitionKey", "must be a str, got int"),
    ({"partition_key": lambda e: e.carrier}, b"a", "InvalidPartitionKey", "partition_key failed .* AttributeError"),
    ({}, OutgoingRecord(b"a", "k", explicit_hash_key="-1"), "InvalidExplicitHashKey", "got '-1'"),
    ({"explicit_hash_key": lambda e: 2**128}, b"a", "InvalidExplicitHashKey", "between 0 and 2"),
    ({"stream": lambda e: "no spaces"}, b"a", "InvalidStream", "got 'no spaces'"),
    ({}, OutgoingRecord(b"a", stream="no spaces"), "InvalidStream", "got 'no spaces'"),
    ({}, bytes(MIB), "RecordTooLarge", "1048[0-9]{3} bytes, key included; stream delays takes 1048576"),
]  # fmt: skip


def test_an_outage_that_the_serializer_meets_is_no_fault_of_the_record(fake: FakeKinesis) -> None:
    """A schema registry that throttles, say: the bundle fails and is run again, and nothing goes to `failed`."""

    def serialize(element: bytes) -> bytes:
        raise Throttled("the registry is throttled")

    with pytest.raises(Throttled):
        Worker(fake, dead_letters=True, serializer=serialize).bundle(b"a")


class TestRecordsKinesisNeverTakes:
    @pytest.mark.parametrize(("options", "element", "code", "message"), BAD_ELEMENTS)
    def test_they_fail_the_bundle(
        self, fake: FakeKinesis, options: dict[str, Any], element: Any, code: str, message: str
    ) -> None:
        with pytest.raises(RecordRefused, match=message) as caught:
            Worker(fake, **options).bundle(element)
        assert caught.value.code == code

    @pytest.mark.parametrize(("options", "element", "code", "message"), BAD_ELEMENTS)
    def test_with_dead_letters_they_alone_go_to_failed(
        self, fake: FakeKinesis, options: dict[str, Any], element: Any, code: str, message: str
    ) -> None:
        outputs = Worker(fake, dead_letters=True, **options).bundle(element)
        (record,) = failed(outputs)
        assert (record.element, record.code, record.attempts) == (element, code, 0)
        assert fake.calls["PutRecords"] == 0

    def test_neighbours_are_not_affected(self, fake: FakeKinesis) -> None:
        outputs = Worker(fake, dead_letters=True).bundle(b"a", bytes(2 * MIB), b"b")
        assert written(outputs) == [b"a", b"b"]
        assert [f.code for f in failed(outputs)] == ["RecordTooLarge"]

    def test_the_limit_is_the_streams_own(self, fake: FakeKinesis) -> None:
        fake.create_stream("large", max_record_kib=10 * 1024)
        outputs = Worker(fake, "large", partition_key="k", dead_letters=True).bundle(
            bytes(2 * MIB), bytes(10 * MIB - 1), bytes(10 * MIB)
        )
        assert [len(e) for e in written(outputs)] == [2 * MIB, 10 * MIB - 1]
        assert [len(f.element) for f in failed(outputs)] == [10 * MIB]

    def test_the_stream_is_not_asked_about_small_records(self, fake: FakeKinesis) -> None:
        Worker(fake, partition_key="k").bundle(b"a", bytes(MIB - 1))
        assert fake.calls["DescribeStreamSummary"] == 0

    def test_a_limit_that_was_raised_is_seen_after_a_minute(self, fake: FakeKinesis, clock: SimulatedClock) -> None:
        worker = Worker(fake, dead_letters=True)
        assert written(worker.bundle(bytes(2 * MIB))) == []
        fake.call("UpdateMaxRecordSize", {"StreamARN": _arn(fake), "MaxRecordSizeInKiB": 4096})
        clock.advance(61)
        assert len(written(worker.bundle(bytes(2 * MIB)))) == 1

    def test_a_limit_of_the_users_own(self, fake: FakeKinesis) -> None:
        outputs = Worker(fake, partition_key="k", dead_letters=True, max_record_bytes=100).bundle(bytes(99), bytes(100))
        assert [len(e) for e in written(outputs)] == [99]
        assert [(f.code, len(f.element)) for f in failed(outputs)] == [("RecordTooLarge", 100)]

    def test_what_the_service_alone_refuses_goes_to_failed_with_its_words(self, fake: FakeKinesis) -> None:
        outputs = Worker(fake, partition_key="k", dead_letters=True, max_record_bytes=10 * MIB).bundle(
            b"a", bytes(2 * MIB), b"b"
        )
        assert written(outputs) == [b"a", b"b"]
        (record,) = failed(outputs)
        assert (record.stream, record.code) == ("delays", "ValidationException")
        assert record.attempts == 3, "in the whole, in its half, alone"
        assert record.message

    def test_outages_and_missing_permissions_are_not_the_records_fault(self, fake: FakeKinesis) -> None:
        fake.faults.deny_access("PutRecords", times=1)
        with pytest.raises(AccessRefused):
            Worker(fake, dead_letters=True).bundle(b"a")
        fake.faults.fail_entries(code="InternalFailure", times=None)
        with pytest.raises(DeliveryFailed):
            Worker(fake, dead_letters=True, delivery_timeout_seconds=5).bundle(b"a")


def _arn(fake: FakeKinesis) -> str:
    return fake.factory().connect().describe_stream(StreamId("delays")).arn


class TestBundles:
    def test_a_small_bundle_needs_no_other_thread(self, live: FakeKinesis) -> None:
        """Waking one costs a tenth of a request, and all it would find is that the flush has made the request."""
        sink = WriteToKinesis("delays", client=live.factory(), linger_seconds=60)
        fn = _WriteFn(sink._settings)
        fn.setup()
        fn.start_bundle()
        fn.process(b"a", WindowedValue(b"a", Timestamp(0), (window.GlobalWindow(),)))
        assert written(fn.finish_bundle()) == [b"a"]
        assert not shared_producer(sink._settings.client, sink._settings.options)._threads

    def test_a_bundle_ends_when_everything_is_acknowledged(self, fake: FakeKinesis) -> None:
        fake.faults.fail_entries(indexes=[0, 2], code="InternalFailure", times=3)
        outputs = Worker(fake).bundle(b"a", b"b", b"c")
        assert sorted(data_of(fake)) == [b"a", b"b", b"c"]
        where = {r.data: (r.shard_id, r.sequence_number) for r in fake.records("delays")}
        assert {o.value.element: (o.value.shard_id, o.value.sequence_number) for o in outputs} == where

    def test_a_failed_bundles_rest_is_not_written_by_the_next(self, fake: FakeKinesis) -> None:
        worker = Worker(fake)
        worker.fn.start_bundle()
        worker.process(b"upstream fails after this one")
        assert written(worker.bundle(b"next")) == [b"next"]
        assert data_of(fake) == [b"next"]
        assert worker.producer.in_flight_bytes == 0

    def test_teardown_purges(self, fake: FakeKinesis) -> None:
        worker = Worker(fake)
        worker.fn.start_bundle()
        worker.process(b"a")
        worker.fn.teardown()
        assert worker.producer.in_flight_bytes == 0

    def test_a_dofn_that_is_thrown_away_purges(self, fake: FakeKinesis) -> None:
        worker = Worker(fake)
        worker.fn.start_bundle()
        worker.process(b"a")
        del worker.fn
        gc.collect()
        Worker(fake).bundle()
        assert worker.producer.in_flight_bytes == 0
        assert data_of(fake) == []

    def test_a_bundle_that_failed_in_finish_can_be_run_again(self, fake: FakeKinesis) -> None:
        worker = Worker(fake)
        fake.faults.deny_access("PutRecords", times=1)
        with pytest.raises(AccessRefused):
            worker.bundle(b"a", b"b")
        worker.bundle(b"a", b"b")
        assert sorted(data_of(fake)) == [b"a", b"b"]

    def test_results_do_not_pile_up_in_a_long_bundle(self, fake: FakeKinesis) -> None:
        worker = Worker(fake, max_in_flight_bytes=50_000)
        worker.fn.start_bundle()
        early = [o for i in range(5000) for o in worker.process(b"%d" % i)]
        assert len(early) > 4000
        late = worker.fn.finish_bundle()
        assert sorted(written([*early, *late])) == sorted(b"%d" % i for i in range(5000))

    @pytest.mark.parametrize("code", ["LimitExceededException", "InternalFailure"])
    def test_a_description_that_fails_for_the_moment_is_asked_for_again(self, fake: FakeKinesis, code: str) -> None:
        fake.faults.fail("DescribeStreamSummary", code, times=3)
        assert written(Worker(fake, aggregate=True, partition_key="k").bundle(b"a")) == [b"a"]
        fake.create_stream("large", max_record_kib=10 * 1024)
        fake.faults.fail("DescribeStreamSummary", code, times=3)
        assert len(written(Worker(fake, "large").bundle(bytes(2 * MIB)))) == 1

    def test_a_description_that_fails_for_too_long_fails_the_bundle(self, fake: FakeKinesis) -> None:
        fake.faults.fail("DescribeStreamSummary", "LimitExceededException", times=None)
        with pytest.raises(Throttled):
            Worker(fake, aggregate=True, partition_key="k", delivery_timeout_seconds=5).bundle(b"a")
        assert fake.calls["DescribeStreamSummary"] > 1

    def test_a_description_that_is_denied_fails_the_bundle_at_once(self, fake: FakeKinesis) -> None:
        fake.faults.deny_access("DescribeStreamSummary", times=1)
        with pytest.raises(AccessRefused):
            Worker(fake, aggregate=True, partition_key="k").bundle(b"a")

    def test_a_missing_stream_is_named(self, fake: FakeKinesis) -> None:
        with pytest.raises(StreamNotFound, match="dealys"):
            Worker(fake, "dealys").bundle(b"a")

    def test_the_options_travel_without_a_connection(self) -> None:
        pickled = pickler.dumps(_WriteFn(WriteToKinesis("delays", partition_key="k")._settings))
        assert not pickler.loads(pickled)._bundle


class TestDestinationsThatCannotWork:
    """Through boto3: each fails at once and says what to do, whatever the retries would allow."""

    def bundle(self, config: ClientConfig, clock: SimulatedClock) -> None:
        sink = WriteToKinesis("delays", client=config, clock=clock, request_threads=0)
        fn = _WriteFn(sink._settings)
        fn.setup()
        fn.start_bundle()
        fn.process(b"a", WindowedValue(b"a", Timestamp(0), (window.GlobalWindow(),)))
        started = clock.monotonic_seconds()
        try:
            fn.finish_bundle()
        finally:
            assert clock.monotonic_seconds() == started, "it was not tried again"

    def test_nobody_listens_at_the_endpoint(self, clock: SimulatedClock) -> None:
        with pytest.raises(EndpointUnreachable, match="http://127.0.0.1:1"):
            self.bundle(ClientConfig(region="us-east-1", endpoint_url="http://127.0.0.1:1"), clock)

    def test_no_region_is_known(self, clock: SimulatedClock, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("AWS_DEFAULT_REGION")
        with pytest.raises(ConfigurationError, match="region"):
            self.bundle(ClientConfig(), clock)

    def test_there_are_no_credentials(self, clock: SimulatedClock, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(AccessRefused, match="credentials"):
            self.bundle(ClientConfig(region="us-east-1", endpoint_url="http://127.0.0.1:1"), clock)

    @pytest.mark.parametrize("code", ["UnrecognizedClientException", "AccessDeniedException", "ExpiredTokenException"])
    def test_the_service_refuses_the_credentials(self, clock: SimulatedClock, code: str) -> None:
        with LocalKinesis() as kinesis:
            kinesis.fake.create_stream("delays")
            kinesis.fake.faults.fail("PutRecords", code, times=None)
            with pytest.raises(AccessRefused, match=code):
                self.bundle(ClientConfig(region="us-east-1", endpoint_url=kinesis.endpoint_url), clock)
            assert kinesis.fake.calls["PutRecords"] == 1

    def test_the_stream_is_missing(self, clock: SimulatedClock) -> None:
        with LocalKinesis() as kinesis:
            with pytest.raises(StreamNotFound, match="delays"):
                self.bundle(ClientConfig(region="us-east-1", endpoint_url=kinesis.endpoint_url), clock)
            assert kinesis.fake.calls["PutRecords"] == 1


class TestAggregation:
    def test_user_records_come_back_out(self, fake: FakeKinesis) -> None:
        elements = [(f"key {i % 3}", b"%d" % i) for i in range(300)]
        worker = Worker(fake, aggregate=True, partition_key=lambda e: e[0], serializer=lambda e: e[1])
        outputs = worker.bundle(*elements)
        records = fake.records("delays")
        assert len(records) == 3
        assert all(is_aggregated(r.data) for r in records)
        users = [u for r in records for u in deaggregate(r).records]
        assert sorted((u.partition_key, u.data) for u in users) == sorted(elements)
        where = {(u.data, u.sequence_number, u.sub_sequence_number) for u in users}
        assert where == {(o.value.element[1], o.value.sequence_number, o.value.sub_sequence_number) for o in outputs}

    def test_order_is_kept_inside_and_across_aggregates(self, fake: FakeKinesis) -> None:
        chance = random.Random(4)
        fake.faults.fail_entries(entry_where=lambda e: chance.random() < 0.4, code="InternalFailure", times=None)
        worker = Worker(
            fake, aggregate=True, ordered=True, partition_key=lambda e: e[0], serializer=lambda e: bytes(999) + e[1]
        )
        worker.bundle(*[("ab"[i % 2], b"%04d" % i) for i in range(1000)])
        users = [u for r in fake.records("delays") for u in deaggregate(r).records]
        for n, key in enumerate("ab"):
            assert [int(u.data[-4:]) for u in users if u.partition_key == key] == list(range(n, 1000, 2))

    def test_a_stream_that_places_records_itself_is_refused(self, fake: FakeKinesis) -> None:
        fake.create_stream("auto", auto_distribution=True)
        with pytest.raises(ConfigurationError, match="aggregate=True cannot be used on stream auto.*aggregate=False"):
            Worker(fake, "auto", aggregate=True, partition_key="k").bundle(b"a")

    def test_an_abandoned_bundles_open_aggregates_are_dropped(self, fake: FakeKinesis) -> None:
        worker = Worker(fake, aggregate=True, partition_key="k")
        worker.fn.start_bundle()
        worker.process(b"gone")
        worker.bundle(b"a", b"b")
        (record,) = fake.records("delays")
        assert [u.data for u in deaggregate(record).records] == [b"a", b"b"]


class TestCoders:
    ELEMENTS = (b"bytes", ("k", 1), {"a": [1.5]}, KinesisRecord(b"d", "7", "k"))

    @pytest.mark.parametrize("element", ELEMENTS)
    def test_outcomes_keep_their_class_across_processes(self, element: Any) -> None:
        record = WrittenRecord(element, "delays", "shardId-000000000000", "49600", 3)
        assert WrittenRecordCoder().decode(WrittenRecordCoder().encode(record)) == record
        refused = FailedRecord(element, "delays", "RecordTooLarge", "why", 0)
        assert FailedRecordCoder().decode(FailedRecordCoder().encode(refused)) == refused

    def test_beam_finds_them(self) -> None:
        assert isinstance(beam.coders.registry.get_coder(WrittenRecord), WrittenRecordCoder)
        assert isinstance(beam.coders.registry.get_coder(FailedRecord), FailedRecordCoder)


# Pipelines: on the machine's clock, with the producer's threads.


@pytest.fixture
def live() -> FakeKinesis:
    fake = FakeKinesis()
    fake.create_stream("delays", shards=2)
    return fake


def fn_api_pipeline(*arguments: str) -> beam.Pipeline:
    return beam.Pipeline(runner="FnApiRunner", options=PipelineOptions(list(arguments)))


class _Describe(beam.DoFn):
    def process(
        self, outcome: Any, timestamp: Any = beam.DoFn.TimestampParam, at: Any = beam.DoFn.WindowParam
    ) -> Iterable[Any]:
        yield outcome.element, int(timestamp), int(at.start)


class TestPipelines:
    @pytest.mark.parametrize("aggregate", [False, True])
    @pytest.mark.parametrize("asked", [False, True])
    def test_results_are_made_only_if_somebody_asks(self, live: FakeKinesis, aggregate: bool, asked: bool) -> None:
        """What is written and counted is the same."""
        data = [b"%d" % i for i in range(1200)]
        p = fn_api_pipeline()
        sink = WriteToKinesis("delays", partition_key="k", client=live.factory(), aggregate=aggregate)
        result = p | beam.Create(data) | sink
        if asked:
            assert_that(result.written | beam.Map(lambda w: w.element), equal_to(data))
        done = p.run()
        done.wait_until_finish()
        written = done.metrics().query(MetricsFilter().with_name("records_written"))["counters"]
        assert [c.committed for c in written] == [1200]
        records = [KinesisRecord(r.data, r.sequence_number, r.partition_key) for r in live.records("delays")]
        apart = [deaggregate(r) for r in records]
        users = [u.data for r, a in zip(records, apart, strict=True) for u in (a.records if a else [r])]
        assert sorted(users) == sorted(data)

    def test_results_are_in_the_elements_window_with_its_timestamp(self, live: FakeKinesis) -> None:
        with fn_api_pipeline() as p:
            result = (
                p
                | beam.Create([3, 14, 25])
                | beam.Map(lambda n: window.TimestampedValue(n, n))
                | beam.WindowInto(window.FixedWindows(10))
                | WriteToKinesis(
                    "delays",
                    client=live.factory(),
                    serializer=lambda n: str(n).encode() if n != 14 else bytes(2 * MIB),
                    dead_letters=True,
                )
            )
            assert_that(
                result.written | "describe written" >> beam.ParDo(_Describe()),
                equal_to([(3, 3, 0), (25, 25, 20)]),
                "written",
            )
            assert_that(
                result.failed | "describe failed" >> beam.ParDo(_Describe()), equal_to([(14, 14, 10)]), "failed"
            )
        assert sorted(data_of(live)) == [b"25", b"3"]

    def test_an_element_of_several_windows_is_written_once(self, live: FakeKinesis) -> None:
        with fn_api_pipeline() as p:
            result = (
                p
                | beam.Create([b"a"])
                | beam.Map(lambda e: window.TimestampedValue(e, 5))
                | beam.WindowInto(window.SlidingWindows(10, 5))
                | WriteToKinesis("delays", client=live.factory())
            )
            assert_that(
                result.written | beam.ParDo(_Describe()), equal_to([(b"a", 5, 5), (b"a", 5, 0)]), reify_windows=False
            )
        assert data_of(live) == [b"a"]

    def test_early_results_of_elements_of_several_windows_are_in_each_window_once(self, live: FakeKinesis) -> None:
        """Those that `process` hands on while the bundle goes on, and what it refuses at once."""
        with fn_api_pipeline() as p:
            result = (
                p
                | beam.Create([0])
                | beam.FlatMap(lambda _: range(2000))
                | beam.Map(lambda n: window.TimestampedValue(n, 5))
                | beam.WindowInto(window.SlidingWindows(10, 5))
                | WriteToKinesis(
                    "delays",
                    client=live.factory(),
                    serializer=lambda n: b"%d" % n if n % 1000 else "text",
                    max_in_flight_bytes=50_000,
                    dead_letters=True,
                )
            )
            assert_that(
                result.written | "describe written" >> beam.ParDo(_Describe()),
                equal_to([(n, 5, start) for n in range(2000) if n % 1000 for start in (0, 5)]),
                "written",
            )
            assert_that(
                result.failed | "describe failed" >> beam.ParDo(_Describe()),
                equal_to([(n, 5, start) for n in (0, 1000) for start in (0, 5)]),
                "failed",
            )

    def test_results_survive_another_stage(self, live: FakeKinesis) -> None:
        with fn_api_pipeline() as p:
            result = p | beam.Create([b"a", b"b"]) | WriteToKinesis("delays", client=live.factory())
            classes = result.written | beam.Reshuffle() | beam.Map(lambda r: (type(r).__name__, r.element, r.stream))
            assert_that(classes, equal_to([("WrittenRecord", b"a", "delays"), ("WrittenRecord", b"b", "delays")]))

    def test_something_can_wait_for_the_write(self, live: FakeKinesis) -> None:
        with fn_api_pipeline() as p:
            result = p | "records" >> beam.Create([b"a", b"b"]) | WriteToKinesis("delays", client=live.factory())
            counts = (
                p
                | "after" >> beam.Create([0])
                | WaitOn(result.written)
                | beam.Map(lambda _, fake=live: len(fake.records("delays")))
            )
            assert_that(counts, equal_to([2]))

    def test_beams_error_handlers_take_what_failed(self, live: FakeKinesis) -> None:
        with fn_api_pipeline() as p:
            with ErrorHandler(beam.Map(lambda f: (f.element, f.code))) as handler:
                (
                    p
                    | beam.Create([b"a", "text"])
                    | WriteToKinesis("delays", client=live.factory()).with_error_handler(handler)
                )
            assert_that(handler.output(), equal_to([("text", "InvalidData")]))
        assert data_of(live) == [b"a"]

    def test_no_error_handler_means_no_dead_letters(self, live: FakeKinesis) -> None:
        with pytest.raises(Exception, match="WriteToKinesis takes bytes"), fn_api_pipeline() as p:
            p | beam.Create(["text"]) | WriteToKinesis("delays", client=live.factory()).with_error_handler(None)

    def test_the_metrics_tell_what_happened(self, live: FakeKinesis) -> None:
        live.faults.fail_entries(indexes=[0], code="InternalFailure")
        p = fn_api_pipeline()
        (
            p
            | beam.Create([b"a", b"bb", "text"], reshuffle=False)
            | WriteToKinesis("delays", client=live.factory(), partition_key="k", dead_letters=True)
        )
        result = p.run()
        result.wait_until_finish()
        found = result.metrics().query(MetricsFilter().with_namespace(metrics.NAMESPACE))
        counters = {m.key.metric.name: m.committed for m in found["counters"]}
        assert counters[metrics.RECORDS_WRITTEN] == 2
        assert counters[metrics.BYTES_WRITTEN] == 5
        assert counters[metrics.RECORDS_FAILED] == 1
        assert counters[metrics.PUT_REQUESTS] >= 2
        assert counters[f"{metrics.PUT_FAILURES}.InternalFailure"] == 1
        distributions = {m.key.metric.name: m.committed for m in found["distributions"]}
        assert distributions[metrics.PUT_BATCH_RECORDS].sum == 3
        assert distributions[metrics.ACKNOWLEDGE_MILLIS].count >= 2

    def test_many_small_bundles_of_a_pipeline(self, live: FakeKinesis) -> None:
        """Threads of the runner write side by side."""
        chance = random.Random(2)
        live.faults.fail_entries(entry_where=lambda e: chance.random() < 0.05, code="InternalFailure", times=None)
        with fn_api_pipeline("--direct_num_workers=1") as p:
            (
                p
                | beam.Create(range(40))
                | beam.Reshuffle()
                | beam.FlatMap(lambda n: [b"%d-%d" % (n, i) for i in range(50)])
                | WriteToKinesis("delays", client=live.factory())
            )
        assert sorted(data_of(live)) == sorted(b"%d-%d" % (n, i) for n in range(40) for i in range(50))


def test_a_transient_error_is_what_the_user_hears_of_only_after_the_timeout(fake: FakeKinesis) -> None:
    fake.faults.fail("PutRecords", "InternalFailure", times=None)
    with pytest.raises(DeliveryFailed) as caught:
        Worker(fake, delivery_timeout_seconds=10).bundle(b"a")
    assert not isinstance(caught.value, TransientServiceError)
    assert caught.value.counts_by_code == {"InternalFailure": 1}
