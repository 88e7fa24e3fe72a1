"""How long a record takes from PutRecord to a fused transform, and what silence costs.

    python benchmarks/bench_latency.py [--shards 1 16 64 256] [--runner FnApiRunner] [--runner PrismRunner]

LocalKinesis serves in one process, the pipeline runs in another, and this one writes 20 records a second with the time
in them, to random shards. The default poll interval is 0.5 s and a shard is asked at most five times a second, so half
a second is the worst case by design, a quarter the mean. Then CPU and memory of a pipeline whose shards are silent.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import bench_throughput
import stub

HERE = Path(__file__).parent
PRISM = HERE.parent / ".cache" / "bin" / "prism"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}


def read(args: argparse.Namespace) -> None:
    """The pipeline's process: prints the latency of each record it sees, in seconds."""
    import apache_beam as beam
    import bench_latency
    from apache_beam.options.pipeline_options import PipelineOptions

    from samza_kinesis_io import ClientConfig, ReadFromKinesis, StartingPosition

    options = ["--streaming"]
    if args.read == "PrismRunner":
        options += [f"--prism_location={PRISM}", "--environment_type=LOOPBACK"]
    source = ReadFromKinesis(
        "bench",
        starting_position=StartingPosition.trim_horizon(),
        client=ClientConfig(region="us-east-1", endpoint_url=args.endpoint),
        poll_interval_seconds=args.poll_interval_seconds,
    )
    with beam.Pipeline(args.read, options=PipelineOptions(options)) as pipeline:
        pipeline | source | beam.FlatMap(bench_latency.show)


def show(record: object) -> None:
    print(f"LATENCY {time.time() - float(record.data)}", flush=True)  # type: ignore[attr-defined]


def latencies(runner: str, shards: int, args: argparse.Namespace) -> list[float]:
    import random

    import boto3

    environment = {**os.environ, **CREDENTIALS, "PYTHONPATH": str(HERE.parent)}
    server = subprocess.Popen(
        [sys.executable, "-m", "samza_kinesis_io.testing", "--port", "0", "--stream", f"bench:{shards}"],
        stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    reader = None
    try:
        assert server.stdout is not None
        endpoint = next(
            line.strip().partition("=")[2]
            for line in server.stdout
            if line.startswith("export AWS_ENDPOINT_URL_KINESIS=")
        )
        command = [sys.executable, __file__, "--read", runner, "--endpoint", endpoint]
        command += ["--poll-interval-seconds", str(args.poll_interval_seconds)]
        reader = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        assert reader.stdout is not None
        client = boto3.client(
            "kinesis", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="x"
        )

        def put() -> None:
            key = str(random.getrandbits(127))
            client.put_record(StreamName="bench", Data=str(time.time()).encode(), PartitionKey="k", ExplicitHashKey=key)

        put()
        os.set_blocking(reader.stdout.fileno(), True)
        for line in reader.stdout:  # the first one is of the start
            if line.startswith("LATENCY"):
                break
        time.sleep(3)
        for _ in range(args.records):
            put()
            time.sleep(random.uniform(0.025, 0.075))  # an even pace would beat with the polling
        seen: list[float] = []
        for line in reader.stdout:
            if line.startswith("LATENCY"):
                seen.append(float(line.split()[1]))
                if len(seen) >= args.records:
                    break
        return sorted(seen)
    finally:
        for process in (reader, server):
            if process is not None:
                process.terminate()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()


def idle(shards: int, seconds: float) -> dict[str, float]:
    with stub.running(shards=shards, silent=True) as endpoint:
        command = [sys.executable, str(HERE / "clients.py"), "read-nothing", endpoint, "--seconds", str(seconds)]
        environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--runner", action="append", choices=["FnApiRunner", "PrismRunner"])
    parser.add_argument("--records", type=int, default=300)
    parser.add_argument("--poll-interval-seconds", type=float, default=0.5)
    parser.add_argument("--idle-shards", type=int, nargs="*", default=[256, 1000])
    parser.add_argument("--idle-seconds", type=float, default=20.0)
    parser.add_argument("--read", help=argparse.SUPPRESS)
    parser.add_argument("--endpoint", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        read(args)
        return
    print(bench_throughput.machine())
    runners = args.runner or ["FnApiRunner"] + (["PrismRunner"] if PRISM.exists() else [])
    print("\n### Latency, put to fused transform, ms\n\n| runner | shards | p50 | p90 | p99 | most |\n|-|-|-|-|-|-|")
    for runner in runners:
        for shards in args.shards:
            seen = latencies(runner, shards, args)
            p50, p90, p99 = (seen[min(len(seen) - 1, round(len(seen) * p))] * 1e3 for p in (0.5, 0.9, 0.99))
            print(f"| {runner} | {shards} | {p50:.0f} | {p90:.0f} | {p99:.0f} | {seen[-1] * 1e3:.0f} |", flush=True)
    print("\n### Silent shards, FnApiRunner\n\n| shards | CPU, % of a core | peak RSS MiB | threads |\n|-|-|-|-|")
    for shards in args.idle_shards:
        result = idle(shards, args.idle_seconds)
        print(
            f"| {shards} | {result['cpu_share'] * 100:.0f} | {result['peak_rss_mib']:.0f} | {result['threads']} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
