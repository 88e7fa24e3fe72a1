"""`ReadFromKinesis` in whole pipelines on the FnApiRunner, Beam's embedded engine."""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.transforms.trigger import AccumulationMode, AfterWatermark
from apache_beam.transforms.window import FixedWindows
from apache_beam.utils.timestamp import Timestamp

from samza_kinesis_io import metrics
from samza_kinesis_io.aggregation import Aggregate
from samza_kinesis_io.client import ClientConfig
from samza_kinesis_io.positions import StartingPosition, StopPosition
from samza_kinesis_io.records import KinesisRecord
from samza_kinesis_io.restriction import ShardFrontier
from samza_kinesis_io.source import BoundedFrontiers, Frontiers, ReadFromKinesis
from samza_kinesis_io.testing import FakeKinesis, LocalKinesis
from samza_kinesis_io.watermark import EventTimeWatermark

HORIZON = StartingPosition.trim_horizon()
SEEN: dict[str, list[Any]] = defaultdict(list)
SEEN_LOCK = threading.Lock()


def keep(element: Any, where: str) -> None:
    with SEEN_LOCK:
        SEEN[where].append(element)


@pytest.fixture
def where(request: pytest.FixtureRequest) -> str:
    """Where the elements of this test's pipelines are kept; the runner's worker is a thread of this process."""
    return str(request.node.nodeid)


def pipeline() -> beam.Pipeline:
    return beam.Pipeline(runner="FnApiRunner", options=PipelineOptions([]))


def filled(
    records: int = 200, *, shards: int = 4, stream: str = "flights", fake: FakeKinesis | None = None
) -> FakeKinesis:
    fake = fake if fake is not None else FakeKinesis()
    fake.create_stream(stream, shards=shards)
    for i in range(records):
        fake.put(stream, b"%d" % i, partition_key=f"key-{i % 31}")
    return fake


def read(stream: str | list[str], fake: Any, **options: Any) -> ReadFromKinesis:
    options = {"starting_position": HORIZON, "stop_at": StopPosition.now()} | options
    return ReadFromKinesis(stream, client=fake if isinstance(fake, ClientConfig) else fake.factory(), **options)


def numbers(where: str) -> list[int]:
    return sorted(int(r.data) for r in SEEN[where])


def counter(result: Any, name: str) -> int:
    found = result.metrics().query(beam.metrics.MetricsFilter().with_namespace(metrics.NAMESPACE).with_name(name))
    return sum(c.committed or 0 for c in found["counters"])


def distribution(result: Any, name: str) -> Any:
    found = result.metrics().query(beam.metrics.MetricsFilter().with_namespace(metrics.NAMESPACE).with_name(name))
    (one,) = found["distributions"]
    return one.committed


def test_a_bounded_read_of_a_stream_that_is_resharded_before_and_after_its_start(where: str) -> None:
    fake = filled(200)
    open_shards = [s.shard_id for s in fake.shards("flights")]
    fake.merge("flights", open_shards[0], open_shards[1])
    fake.split("flights", open_shards[2])
    for i in range(200, 300):
        fake.put("flights", b"%d" % i, partition_key=f"key-{i % 31}")
    with pipeline() as p:
        _ = p | read("flights", fake) | beam.Map(keep, where)
    assert numbers(where) == list(range(300))


def test_records_carry_their_arrival_as_timestamp(where: str) -> None:
    fake = filled(20)
    with pipeline() as p:
        _ = (
            p
            | read("flights", fake)
            | beam.Map(lambda r, t=beam.DoFn.TimestampParam: (r.approximate_arrival_timestamp, t))
            | beam.Map(keep, where)
        )
    assert len(SEEN[where]) == 20
    assert all(arrival == timestamp for arrival, timestamp in SEEN[where])


def test_several_streams_by_name_and_by_arn_over_http(where: str) -> None:
    with LocalKinesis() as server:
        filled(50, stream="flights", fake=server.fake)
        filled(50, stream="weather", shards=2, fake=server.fake)
        arn = server.fake.call("DescribeStreamSummary", {"StreamName": "weather"})["StreamDescriptionSummary"][
            "StreamARN"
        ]
        client = ClientConfig(region="us-east-1", endpoint_url=server.endpoint_url)
        with pipeline() as p:
            _ = p | read(["flights", arn], client) | beam.Map(keep, where)
    by_stream = {name: sorted(int(r.data) for r in SEEN[where] if r.stream == name) for name in ("flights", "weather")}
    assert by_stream == {"flights": list(range(50)), "weather": list(range(50))}


def test_two_regions_in_one_pipeline_share_nothing_by_name(where: str) -> None:
    """The streams have one name, and their shards the same ids."""
    ireland, ohio = FakeKinesis(region="eu-west-1"), FakeKinesis(region="us-east-2")
    for fake, first in ((ireland, 0), (ohio, 1000)):
        fake.create_stream("flights", shards=2)
        for i in range(100):
            fake.put("flights", b"%d" % (first + i), partition_key=str(i))
    with pipeline() as p:
        for name, fake in (("Ireland", ireland), ("Ohio", ohio)):
            _ = p | f"Read {name}" >> read("flights", fake) | f"Keep {name}" >> beam.Map(keep, where)
    assert numbers(where) == [*range(100), *range(1000, 1100)]


def test_the_same_stream_read_twice_in_one_pipeline(where: str) -> None:
    fake = filled(100)
    with pipeline() as p:
        for name in ("once", "twice"):
            _ = p | f"Read {name}" >> read("flights", fake) | f"Keep {name}" >> beam.Map(keep, where + name)
    assert numbers(where + "once") == numbers(where + "twice") == list(range(100))


def test_two_pipelines_in_one_process_at_once(where: str) -> None:
    fake = filled(300)

    def run(name: str) -> None:
        with pipeline() as p:
            _ = p | read("flights", fake) | beam.Map(keep, where + name)

    threads = [threading.Thread(target=run, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert numbers(where + "a") == numbers(where + "b") == list(range(300))


def test_the_same_pipeline_run_twice_in_a_minute_reads_everything_twice(where: str) -> None:
    """The second run finds no buffer of the first, though all its names are the same."""
    fake = filled(100)
    p = pipeline()
    _ = p | read("flights", fake) | beam.Map(keep, where)
    p.run().wait_until_finish()
    assert numbers(where) == list(range(100))
    p.run().wait_until_finish()
    assert numbers(where) == sorted([*range(100)] * 2)


def test_metrics_are_the_pipelines(where: str) -> None:
    fake = filled(95, shards=2)
    aggregate = Aggregate()
    for i in range(95, 100):
        assert aggregate.add("key", None, b"%d" % i)
    data, key, explicit = aggregate.encode()
    fake.put("flights", data, partition_key=key, explicit_hash_key=explicit)
    fake.split("flights", fake.shards("flights")[0].shard_id)
    fake.faults.throttle("GetRecords", times=2)
    fake.faults.internal_failure("GetRecords", times=1)
    fake.faults.expire_iterators(times=1)
    p = pipeline()
    _ = p | read("flights", fake) | beam.Map(keep, where)
    result = p.run()
    result.wait_until_finish()
    assert numbers(where) == list(range(100))
    assert counter(result, metrics.RECORDS_READ) == 100
    assert counter(result, metrics.BYTES_READ) == sum(len(str(i)) for i in range(100))
    assert counter(result, metrics.AGGREGATED_RECORDS) == 1
    assert counter(result, metrics.READ_THROTTLES) == 2
    assert counter(result, f"{metrics.READ_RETRIES}.InternalFailureException") == 1
    assert counter(result, metrics.EXPIRED_ITERATORS) == 1
    assert counter(result, metrics.SHARDS_PLANNED) == 2
    assert counter(result, metrics.RESHARDINGS) == 1
    assert counter(result, metrics.SHARDS_ADOPTED) == 2
    assert counter(result, metrics.GET_RECORDS_CALLS) == fake.calls["GetRecords"]
    assert distribution(result, metrics.MILLIS_BEHIND_LATEST).min == 0


def event_time(record: KinesisRecord) -> Timestamp:
    return Timestamp(int(record.data))


def test_event_time_windows_are_complete_before_they_fire(where: str) -> None:
    """Each window fires once, on time, with everything in it: nothing was late."""
    fake = filled(300, shards=3)
    with pipeline() as p:
        _ = (
            p
            | read(
                "flights",
                fake,
                watermark=EventTimeWatermark(event_time, out_of_orderness_seconds=60),
                bundle_records=20,
            )
            | beam.WindowInto(FixedWindows(50), trigger=AfterWatermark(), accumulation_mode=AccumulationMode.DISCARDING)
            | beam.Map(lambda r: ("all", int(r.data)))
            | beam.GroupByKey()
            | beam.Map(lambda kv: sorted(kv[1]))
            | beam.Map(keep, where)
        )
    assert sorted(SEEN[where]) == [list(range(low, low + 50)) for low in range(0, 300, 50)]


def test_a_failing_downstream_fails_the_pipeline_and_the_next_run_reads_everything(where: str) -> None:
    fake = filled(100)

    def fail_once(record: KinesisRecord) -> KinesisRecord:
        if int(record.data) == 57 and not SEEN[where + "failed"]:
            keep(True, where + "failed")
            raise ZeroDivisionError("downstream")
        return record

    def build() -> beam.Pipeline:
        p = pipeline()
        _ = p | read("flights", fake) | beam.Map(fail_once) | beam.Map(keep, where)
        return p

    with pytest.raises(Exception, match="downstream"):
        build().run().wait_until_finish()
    SEEN[where].clear()
    build().run().wait_until_finish()
    assert numbers(where) == list(range(100))


def test_a_fatal_error_fails_the_pipeline_with_the_streams_name() -> None:
    fake = filled(10)
    fake.faults.fail("GetRecords", "KMSDisabledException", times=None)
    p = pipeline()
    _ = p | read("flights", fake)
    with pytest.raises(
        Exception, match=r"stream flights in us-east-1 failed: KMSDisabledException.*enable the stream's KMS"
    ):
        p.run().wait_until_finish()


def test_a_drain_reads_the_rest_of_a_bounded_read_and_drops_that_of_an_unbounded_one() -> None:
    element, restriction = None, ShardFrontier(())
    assert BoundedFrontiers().truncate(element, restriction) is restriction  # type: ignore[arg-type]
    assert Frontiers().truncate(element, restriction) is None  # type: ignore[arg-type, func-returns-value]
