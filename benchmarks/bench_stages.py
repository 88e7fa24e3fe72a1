"""What each stage of reading and writing costs, in nanoseconds per record; nothing else runs, no network.

python benchmarks/bench_stages.py [--records 10000] [--record-bytes 200]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
import stub
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.timestamp import Timestamp
from apache_beam.utils.windowed_value import WindowedValue

from samza_kinesis_io.aggregation import Aggregate, deaggregate
from samza_kinesis_io.batching import Budget, Outbox, Parcel, PendingRecord, SourceLedger
from samza_kinesis_io.client import _FAST_DECODERS, PutEntry, PutOutcome, StreamId
from samza_kinesis_io.consumer import SourceConfig, _cut, _Reader
from samza_kinesis_io.polling import Fetched
from samza_kinesis_io.positions import Position, StartingPosition
from samza_kinesis_io.records import KinesisRecord, KinesisRecordCoder, OutgoingRecord
from samza_kinesis_io.restriction import Advance, Claim, FrontierTracker, ShardFrontier, ShardFrontierCoder, planned
from samza_kinesis_io.retry import BackoffPolicy
from samza_kinesis_io.shards import FULL_RANGE, HashKeyRange, Shard
from samza_kinesis_io.sink import Routing
from samza_kinesis_io.source import RecordBatch, TakeBatchesApart
from samza_kinesis_io.watermark import ArrivalTimeWatermark

REPETITIONS = 7


def measure(stage: str, records: int, run: Callable[[], Any]) -> None:
    """Print the median and the least of some runs."""
    times = []
    for _ in range(REPETITIONS):
        began = time.process_time()
        run()
        times.append((time.process_time() - began) / records * 1e9)
    print(f"| {stage} | {statistics.median(times):,.0f} | {min(times):,.0f} |", flush=True)


def reading(count: int, record_bytes: int) -> None:
    body = stub.Template(b"x" * record_bytes, count).body
    decode = _FAST_DECODERS["GetRecords"].decode
    measure("decode an answer into records (msgspec)", count, lambda: decode(body))
    measure("the same with the standard library, dicts, data left in base64", count, lambda: json.loads(body))
    records = decode(body).Records
    measure(
        "of that, construction of the records",
        count,
        lambda: [KinesisRecord(r.data, r.sequence_number, r.partition_key, 0.0) for r in records],
    )
    config = SourceConfig("bench", (StreamId("bench"),), factory=None)  # type: ignore[arg-type]

    def unpack(of: list[KinesisRecord], most: int) -> Any:
        reader = _Reader.__new__(_Reader)
        reader.key, reader.stream, reader.hash_key_range = (0, "shardId-000000000000"), StreamId("bench"), FULL_RANGE
        reader.skip, reader.head_index, reader.unpacked = None, 0, deque()
        reader.buffer = deque([Fetched(records=of)])
        return _cut(reader, config, most)

    measure("unpack: shard, stream, test for aggregates, position", count, lambda: unpack(records, count))
    aggregate = KinesisRecord(stub.aggregate_of(400, 100), "1", "a")
    measure("take an aggregate of 400 apart", 400 * 25, lambda: [deaggregate(aggregate) for _ in range(25)])
    policy = ArrivalTimeWatermark()
    measure("timestamps and watermark (arrival time)", count, lambda: policy.assign(records, 0))

    batch = RecordBatch(records, policy.assign(records, 0).timestamps_micros)
    apart = TakeBatchesApart()
    measure("emit: windowed values of a batch", count, lambda: deque(apart.process(batch), maxlen=0))
    windows = (GlobalWindow(),)
    measure(
        "instead: WindowedValue(record, Timestamp(...)) in a loop",
        count,
        lambda: [
            WindowedValue(r, Timestamp(micros=m), windows)
            for r, m in zip(records, batch.timestamps_micros, strict=True)
        ],
    )
    coder = KinesisRecordCoder()
    measure("encode a record for a shuffle", count, lambda: [coder.encode(r) for r in records])
    encoded = coder.encode(records[0])
    measure("decode it again", count, lambda: [coder.decode(encoded) for _ in range(count)])


def claiming() -> None:
    """Per batch, not per record: what grows with the number of shards."""
    for shards in (1, 64, 1000, 5000):
        width = (1 << 128) // shards
        listed = [
            Shard(
                f"shardId-{i:012d}",
                HashKeyRange(i * width, (1 << 128) - 1 if i == shards - 1 else (i + 1) * width - 1),
                None,
                None,
                1,
                None,
            )
            for i in range(shards)
        ]
        frontier = ShardFrontier(planned(0, listed, StartingPosition.trim_horizon(), None, 0))
        tracker = FrontierTracker(frontier)
        keys = [s.key for s in frontier.shards]

        def claim(tracker: FrontierTracker = tracker, keys: Any = keys) -> None:
            for i in range(20):
                position = Position.after(10**55 + i, 0)
                assert tracker.try_claim(Claim((Advance(keys[i % len(keys)], position, 1000 + i, 1000 + i),)))
                frontier = tracker.current_restriction()
                assert frontier.watermark_micros >= 0

        measure(f"claim a batch, {shards} shards", 20, claim)
        coder = ShardFrontierCoder()
        measure(
            f"checkpoint: encode and decode the frontier, {shards} shards",
            1,
            lambda coder=coder, frontier=frontier: coder.decode(coder.encode(frontier)),
        )


def writing(count: int, record_bytes: int) -> None:
    data = b"x" * record_bytes
    messages = [OutgoingRecord(data, f"key-{i:05d}") for i in range(count)]
    routing = Routing.checked(
        stream="bench", partition_key=None, explicit_hash_key=None, serializer=None, ordered=False
    )
    rng = random.Random(0)
    measure("route an element", count, lambda: [routing.route(m, rng, {}) for m in messages])
    plain = [data] * count
    measure("the same with a random key", count, lambda: [routing.route(d, rng, {}) for d in plain])
    entries = [PutEntry(data, f"key-{i:05d}") for i in range(500)]
    encode = msgspec.json.Encoder().encode
    measure("encode a request", 500, lambda: encode({"StreamName": "bench", "Records": entries}))
    outcome = {"SequenceNumber": "4" * 56, "ShardId": "shardId-000000000000"}
    answer = json.dumps({"FailedRecordCount": 0, "Records": [outcome] * 500}).encode()
    measure("decode its answer", 500, lambda: _FAST_DECODERS["PutRecords"].decode(answer))
    aggregate = Aggregate(1 << 20)
    measure("pack: add to an aggregate", count, lambda: [aggregate.add("key", None, data) for _ in range(count)])

    outcomes = [PutOutcome("shardId-000000000000", "4" * 56)] * 500

    def outbox() -> tuple[Outbox, SourceLedger]:
        made = Outbox(
            StreamId("bench"),
            Budget(1 << 40),
            linger_seconds=0,
            backoff=BackoffPolicy(initial_seconds=0.1, max_seconds=5),
            rng=rng,
        )
        return made, SourceLedger("bundle", delivery_timeout_seconds=60, report_failed=False)

    def one_by_one() -> None:
        box, ledger = outbox()
        for serial, entry in enumerate(entries):
            box.add(PendingRecord(entry, None, ledger, box, None), serial, 0.0)
        box.answered(box.take(0.0), outcomes, 0.0)  # type: ignore[arg-type]

    def as_parcel() -> None:
        box, ledger = outbox()
        box.add_parcel(Parcel(entries, [None] * 500, ledger, box, 100_000), 1, 0.0)
        box.delivered(box.take(0.0), outcomes, 0.0)  # type: ignore[arg-type]

    measure("pack and settle a request, record by record", 500, one_by_one)
    measure("the same as a parcel", 500, as_parcel)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--record-bytes", type=int, default=200)
    args = parser.parse_args()
    for title, run in (
        (f"Reading, {args.record_bytes} bytes: ns per record", lambda: reading(args.records, args.record_bytes)),
        ("Claims: ns per batch", claiming),
        (f"Writing, {args.record_bytes} bytes: ns per record", lambda: writing(args.records, args.record_bytes)),
    ):
        print(f"\n### {title}\n\n| stage | median | least |\n|-|-|-|")
        run()


if __name__ == "__main__":
    main()
