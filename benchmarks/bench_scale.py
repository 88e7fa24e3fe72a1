"""What shards cost: planning, memory, threads, and the cost of a record as they grow.

python benchmarks/bench_scale.py [--shards 1 100 1000 5000] [--repetitions 1]
"""

from __future__ import annotations

import argparse
import sys
import time

import bench_throughput
import stub

from samza_kinesis_io import ClientConfig, ReadFromKinesis, StartingPosition
from samza_kinesis_io.clock import SystemClock
from samza_kinesis_io.restriction import ShardFrontierCoder
from samza_kinesis_io.source import PlanShards


def planning(endpoint: str) -> tuple[float, int]:
    """Return how long planning takes (the boto3 client included), and the bytes of the frontier it makes."""
    read = ReadFromKinesis(
        stub.STREAM,
        starting_position=StartingPosition.trim_horizon(),
        client=ClientConfig(region="us-east-1", endpoint_url=endpoint),
    )
    began = time.perf_counter()
    (group,) = PlanShards(read.plan(1), SystemClock()).process(None)
    seconds = time.perf_counter() - began
    return seconds, len(ShardFrontierCoder().encode(ShardFrontierCoder().decode(group.frontier)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 100, 1000, 5000])
    parser.add_argument("--cores", type=int, nargs=2, default=(0, 1))
    parser.add_argument("--seconds", type=float, default=4.0)
    args = parser.parse_args()
    print(bench_throughput.machine())
    print("\n### Shards in one restriction, 200-byte records, FnApiRunner\n")
    print("| shards | planning s | checkpoint bytes | CPU s/M | peak RSS MiB | threads |\n|-|-|-|-|-|-|")
    row = bench_throughput.Row("ours", "read-ours", 300)
    table = bench_throughput.Table("scale", "", 200, (row,))
    for shards in args.shards:
        with stub.running(shards=shards, core=args.cores[1]) as endpoint:
            seconds, size = planning(endpoint)
            result = bench_throughput.run(row, table, endpoint, sys.executable, args.cores, args.seconds)
        print(
            f"| {shards} | {seconds:.2f} | {size:,} | {result['cpu_seconds_per_million']:.2f} "
            f"| {result['peak_rss_mib']:.0f} | {result['threads']} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
