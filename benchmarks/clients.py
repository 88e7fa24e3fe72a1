"""The clients that are measured: each moves records until it has moved enough, and prints what that cost.

    python benchmarks/clients.py read-ours http://127.0.0.1:PORT --record-bytes 200 --small 300000 --large 1300000

One client per process. The figure is the slope between two points of the run, so that imports, planning and the first
answers do not count: CPU seconds (user and system, all threads of this process) per million records.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

STREAM = "bench"
CREDENTIALS = {"region_name": "us-east-1", "aws_access_key_id": "test", "aws_secret_access_key": "test"}


class Meter:
    """Counts records, and ends the process when there have been enough: some of what is measured never ends by itself.

    `seen` is added to by whoever counts, record by record, which must cost as little as it can; at `next_at` they call.
    """

    def __init__(self, small: int, large: int, record_bytes: int) -> None:
        self.seen = 0
        self.next_at = small
        self._large = large
        self._record_bytes = record_bytes
        self._small: tuple[int, float, float] | None = None

    def reached(self, data: bytes) -> None:
        assert len(data) == self._record_bytes, (len(data), self._record_bytes)
        now = (self.seen, time.process_time(), time.perf_counter())
        if self._small is None:
            self._small = now
            self.next_at = self._large
            return
        self.done(self._small, now)

    def done(self, small: tuple[int, float, float], large: tuple[int, float, float]) -> NoReturn:
        records, cpu, wall = (b - a for a, b in zip(small, large, strict=True))
        result = {
            "cpu_seconds_per_million": cpu / records * 1e6,
            "wall_seconds_per_million": wall / records * 1e6,
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "records": records,
            "threads": threading.active_count(),
        }
        print(json.dumps(result), flush=True)
        os._exit(0)


#: Of this process. Beam's copies of a DoFn find it here.
METER: Meter


def count_all(records: list[Any], data: Callable[[Any], bytes]) -> None:
    METER.seen += len(records)
    if METER.seen >= METER.next_at:
        METER.reached(data(records[0]))


# Reading


def _boto3(endpoint: str) -> Any:
    import boto3

    return boto3.client("kinesis", endpoint_url=endpoint, **CREDENTIALS)


def read_boto3(endpoint: str, args: argparse.Namespace) -> None:
    """What one writes first: GetRecords in a loop, records thrown away."""
    client = _boto3(endpoint)
    shard_ids = [s["ShardId"] for s in client.list_shards(StreamName=STREAM)["Shards"]]
    horizon = {"StreamName": STREAM, "ShardIteratorType": "TRIM_HORIZON"}
    iterators = [client.get_shard_iterator(ShardId=s, **horizon)["ShardIterator"] for s in shard_ids]
    while True:
        for i, iterator in enumerate(iterators):
            answer = client.get_records(ShardIterator=iterator, Limit=10_000)
            iterators[i] = answer["NextShardIterator"]
            count_all(answer["Records"], lambda record: record["Data"])


def _client_answers(endpoint: str) -> Iterator[Any]:
    from samza_kinesis_io.client import ClientConfig, StreamId
    from samza_kinesis_io.positions import Position

    stream = StreamId(STREAM)
    client = ClientConfig(region="us-east-1", endpoint_url=endpoint).connect(stream)
    iterator = client.get_shard_iterator(stream, "shardId-000000000000", Position.trim_horizon())
    while True:
        answer = client.get_records(stream, iterator, 10_000)
        iterator = answer.next_shard_iterator
        yield answer


def read_client(endpoint: str, args: argparse.Namespace) -> None:
    """Our client without anything behind it: HTTP, signature, fast decoder, records. The ceiling."""
    for answer in _client_answers(endpoint):
        count_all(answer.records, lambda record: record.data)


def read_consumer(endpoint: str, args: argparse.Namespace) -> None:
    """Our consumer without Beam: threads, buffers, de-aggregation, positions."""
    from samza_kinesis_io import StartingPosition
    from samza_kinesis_io.client import ClientConfig, StreamId
    from samza_kinesis_io.consumer import KinesisSystemConsumer, SourceConfig
    from samza_kinesis_io.polling import ReadLimits
    from samza_kinesis_io.restriction import Advance, Claim, FrontierTracker, ShardFrontier, planned

    stream = StreamId(STREAM)
    factory = ClientConfig(region="us-east-1", endpoint_url=endpoint)
    shards = factory.connect(stream).list_shards(stream)
    tracker = FrontierTracker(ShardFrontier(planned(0, shards, StartingPosition.trim_horizon(), None, 0)))
    config = SourceConfig("bench", (stream,), factory, limits=ReadLimits(None, None))
    attachment = KinesisSystemConsumer().attach(("bench", 0, b""), config, tracker.current_restriction())
    while True:
        batch = attachment.poll(10_000)
        if batch is None:
            attachment.wait(1.0)
        elif batch.records:
            assert tracker.try_claim(Claim((Advance(batch.key, batch.position, 0, batch.read_until_micros),)))
            count_all(batch.records, lambda record: record.data)
            attachment.commit(batch, tracker.current_restriction())


def read_ours(endpoint: str, args: argparse.Namespace) -> None:
    """The whole pipeline: ReadFromKinesis on the FnApiRunner into a fused count."""
    import apache_beam as beam

    from samza_kinesis_io import ClientConfig, ReadFromKinesis, StartingPosition
    from samza_kinesis_io.polling import ReadLimits

    read = ReadFromKinesis(
        STREAM,
        starting_position=StartingPosition.trim_horizon(),
        client=ClientConfig(region="us-east-1", endpoint_url=endpoint),
        limits=ReadLimits() if args.client == "read-nothing" else ReadLimits(None, None),
    )
    with beam.Pipeline("FnApiRunner", options=_streaming()) as pipeline:
        pipeline | read | beam.FlatMap(count_one)


def read_async_kinesis(endpoint: str, args: argparse.Namespace) -> None:
    from kinesis import Consumer
    from kinesis.processors import Processor

    async def run() -> None:
        consumer = Consumer(
            STREAM, endpoint_url=endpoint, region_name="us-east-1", processor=_bytes_processor(Processor),
            use_list_shards=True, shard_fetch_rate=1000, iterator_type="TRIM_HORIZON",
        )  # fmt: skip
        async with consumer:
            while True:
                async for record in consumer:
                    METER.seen += 1
                    if METER.seen >= METER.next_at:
                        METER.reached(record)

    asyncio.run(run())


def _bytes_processor(base: Any) -> Any:
    from kinesis.aggregators import SimpleAggregator
    from kinesis.serializers import Serializer

    class Bytes(Serializer):
        def serialize(self, item: bytes) -> bytes:
            return item

        def deserialize(self, data: bytes) -> bytes:
            return data

    class Plain(base, SimpleAggregator, Bytes):  # type: ignore[misc]
        pass

    return Plain()


def _streaming() -> Any:
    from apache_beam.options.pipeline_options import PipelineOptions

    return PipelineOptions(["--streaming"])


def count_one(record: Any) -> None:
    """The fused transform: for `beam.FlatMap`, which takes None for nothing."""
    METER.seen += 1
    if METER.seen >= METER.next_at:
        METER.reached(record.data if hasattr(record, "data") else record.element.data)


def read_nothing(endpoint: str, args: argparse.Namespace) -> None:
    """The pipeline with nobody writing: for what idling costs. Prints CPU seconds per second and ends after a while."""

    def watch() -> None:
        time.sleep(args.warm_seconds)
        cpu, wall = time.process_time(), time.perf_counter()
        time.sleep(args.seconds)
        share = (time.process_time() - cpu) / (time.perf_counter() - wall)
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"cpu_share": share, "peak_rss_mib": rss, "threads": threading.active_count()}), flush=True)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
    read_ours(endpoint, args)


# Writing


def write_boto3(endpoint: str, args: argparse.Namespace) -> None:
    """What one writes first: PutRecords of 500 in a loop."""
    client = _boto3(endpoint)
    data = b"x" * args.record_bytes
    records = [{"Data": data, "PartitionKey": f"key-{i:05d}"} for i in range(500)]
    while True:
        answer = client.put_records(StreamName=STREAM, Records=records)
        assert answer["FailedRecordCount"] == 0
        count_all(records, lambda record: record["Data"])


def write_client(endpoint: str, args: argparse.Namespace) -> None:
    """Our client without anything before it: the ceiling."""
    from samza_kinesis_io.client import ClientConfig, PutEntry, StreamId

    stream = StreamId(STREAM)
    client = ClientConfig(region="us-east-1", endpoint_url=endpoint).connect(stream)
    entries = [PutEntry(b"x" * args.record_bytes, f"key-{i:05d}") for i in range(500)]
    while True:
        outcomes = client.put_records(stream, entries)
        assert outcomes[-1].error_code is None
        count_all(entries, lambda entry: entry.data)


def _sink(endpoint: str, *, aggregate: bool = False) -> Any:
    from samza_kinesis_io import ClientConfig, WriteToKinesis

    return WriteToKinesis(STREAM, client=ClientConfig(region="us-east-1", endpoint_url=endpoint), aggregate=aggregate)


def _messages(args: argparse.Namespace, keys: int = 500) -> list[Any]:
    from samza_kinesis_io.records import OutgoingRecord

    data = b"x" * args.record_bytes
    return [OutgoingRecord(data, f"key-{i:05d}") for i in range(keys)]


def counted(messages: list[Any]) -> Iterator[Any]:
    for message in itertools.cycle(messages):
        count_one(message)
        yield message


def write_ours(endpoint: str, args: argparse.Namespace, *, aggregate: bool = False, written: bool = False) -> None:
    """The whole pipeline: an endless bundle into WriteToKinesis on the FnApiRunner.

    Counted before the sink, which blocks while too much is in flight; or, with `written`, what it acknowledged.
    """
    import apache_beam as beam

    messages = _messages(args, 1 if aggregate else 500)
    source = itertools.cycle if written else counted
    with beam.Pipeline("FnApiRunner", options=_streaming()) as pipeline:
        elements = pipeline | beam.Impulse() | beam.FlatMap(lambda _: source(messages))
        result = elements | _sink(endpoint, aggregate=aggregate)
        if written:
            result.written | beam.FlatMap(count_one)


def write_ours_counted(endpoint: str, args: argparse.Namespace) -> None:
    write_ours(endpoint, args, written=True)


def write_ours_aggregated(endpoint: str, args: argparse.Namespace) -> None:
    write_ours(endpoint, args, aggregate=True)


def write_bundles(endpoint: str, args: argparse.Namespace) -> None:
    """The sink's DoFn in eight threads with bundles of `--bundle` records; no runner."""
    from apache_beam.transforms.window import GlobalWindow
    from apache_beam.utils.timestamp import Timestamp
    from apache_beam.utils.windowed_value import WindowedValue

    from samza_kinesis_io.sink import _WriteFn

    settings = _sink(endpoint)._settings
    values = [WindowedValue(m, Timestamp(0), (GlobalWindow(),)) for m in _messages(args)]
    lock = threading.Lock()

    def run() -> None:
        write = _WriteFn(settings)
        write.setup()
        source = itertools.cycle(values)
        while True:
            write.start_bundle()
            outputs = 0
            for value in itertools.islice(source, args.bundle):
                outputs += len(write.process(value.value, value))
            outputs += len(write.finish_bundle())
            assert outputs == args.bundle
            with lock:
                METER.seen += outputs
                if METER.seen >= METER.next_at:
                    METER.reached(value.value.data)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    threads[0].join()


class Unthrottled:
    """Stands for both of async-kinesis's throttles, and lets everything pass."""

    def __call__(self, **_: Any) -> Unthrottled:
        return self

    async def __aenter__(self) -> None: ...

    async def __aexit__(self, *_: Any) -> None: ...


def write_async_kinesis(endpoint: str, args: argparse.Namespace) -> None:
    """With its throttles off, which cost it most of its time: the bandwidth check alone sums a log for each record."""
    from kinesis import Producer
    from kinesis.processors import Processor

    data = b"x" * args.record_bytes

    async def run() -> None:
        producer = Producer(
            STREAM, endpoint_url=endpoint, region_name="us-east-1", processor=_bytes_processor(Processor),
            use_list_shards=True, put_rate_limit_per_shard=10**9, put_bandwidth_limit_per_shard=1024,
        )  # fmt: skip
        async with producer:
            producer.put_rate_throttle = producer.put_bandwidth_throttle = Unthrottled()
            for i in itertools.cycle(range(500)):
                await producer.put(data, partition_key=f"key-{i:05d}")
                METER.seen += 1
                if METER.seen >= METER.next_at:
                    METER.reached(data)

    asyncio.run(run())


CLIENTS: dict[str, Callable[[str, argparse.Namespace], None]] = {
    "read-boto3": read_boto3,
    "read-client": read_client,
    "read-consumer": read_consumer,
    "read-ours": read_ours,
    "read-async-kinesis": read_async_kinesis,
    "read-nothing": read_nothing,
    "write-boto3": write_boto3,
    "write-client": write_client,
    "write-ours": write_ours,
    "write-ours-counted": write_ours_counted,
    "write-ours-aggregated": write_ours_aggregated,
    "write-bundles": write_bundles,
    "write-async-kinesis": write_async_kinesis,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("client", choices=sorted(CLIENTS))
    parser.add_argument("endpoint")
    parser.add_argument("--record-bytes", type=int, default=200)
    parser.add_argument("--small", type=int, default=300_000)
    parser.add_argument("--large", type=int, default=1_300_000)
    parser.add_argument("--bundle", type=int, default=100, help="write-bundles: records per bundle")
    parser.add_argument("--seconds", type=float, default=20.0, help="read-nothing: for how long")
    parser.add_argument("--warm-seconds", type=float, default=10.0, help="read-nothing: from when on")
    parser.add_argument("--core", type=int, help="the only core to run on")
    args = parser.parse_args()
    if args.core is not None:
        os.sched_setaffinity(0, {args.core})
    os.environ.update(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_EC2_METADATA_DISABLED="true")
    global METER
    METER = Meter(args.small, args.large, args.record_bytes)
    CLIENTS[args.client](args.endpoint, args)


if __name__ == "__main__":
    # Not as __main__: what Beam pickles would get a copy of METER instead of this one.
    import clients

    clients.main()
