"""What a million records cost: ours, a bare boto3 loop and others, side by side in one run.

    python benchmarks/bench_throughput.py [--repetitions 3] [--only read-200] [--quick] [--no-guard]

Every client runs in a process of its own on one core, the stub on another. CPU is that of the client's process (user
and system, all threads), as the slope between two points of its run; see clients.py. The clients take turns, so that
what else the machine does hits all of them; "x boto3" is the median of the ratios within each turn.

Fails if a ratio falls below its guard: a change made us slower, whatever machine this is.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import stub

HERE = Path(__file__).parent
PEERS = HERE.parent / ".cache" / "bench-peers"


@dataclass(frozen=True)
class Row:
    """A client in a table.

    Attributes:
        cost: Thousands of records that take about a CPU second, as a guess: a run takes a few of them.
        guard: The least ratio to boto3.
        extra: More arguments of clients.py.
    """

    label: str
    client: str
    cost: int
    guard: float | None = None
    extra: tuple[str, ...] = ()
    peer: bool = False


@dataclass(frozen=True)
class Table:
    name: str
    title: str
    record_bytes: int
    rows: tuple[Row, ...]
    aggregated: int = 0


def reading(slowdown: float) -> tuple[Row, ...]:
    def cost(thousands: int) -> int:
        return round(thousands / slowdown)

    return (
        Row("bare boto3 loop", "read-boto3", cost(50)),
        Row("ours: pipeline, fused count", "read-ours", cost(400), 4.5 if slowdown == 1 else 3.0),
        Row("ours: consumer, no Beam", "read-consumer", cost(700)),
        Row("ours: client alone (ceiling)", "read-client", cost(900)),
        Row("async-kinesis Consumer", "read-async-kinesis", cost(25), peer=True),
    )


def writing(slowdown: float) -> tuple[Row, ...]:
    def cost(thousands: int) -> int:
        return round(thousands / slowdown)

    return (
        Row("bare boto3 loop", "write-boto3", cost(80)),
        Row("ours: pipeline, endless bundle", "write-ours", cost(200), 1.8),
        Row("ours: and `written` counted", "write-ours-counted", cost(150)),
        Row("ours: bundles of 500, 8 at once", "write-bundles", cost(150), extra=("--bundle", "500")),
        Row("ours: bundles of 100, 8 at once", "write-bundles", cost(150), extra=("--bundle", "100")),
        Row("ours: bundles of 10, 8 at once", "write-bundles", cost(100), extra=("--bundle", "10")),
        Row("ours: bundles of 1, 8 at once", "write-bundles", cost(30), extra=("--bundle", "1")),
        Row("ours: client alone (ceiling)", "write-client", cost(400)),
        Row("async-kinesis Producer, no throttle", "write-async-kinesis", cost(50), peer=True),
    )


TABLES = (
    Table("read-200", "Reading, 200-byte records, 64 shards", 200, reading(1)),
    Table("read-1k", "Reading, 1 KiB records, 64 shards", 1024, reading(1.5)),
    Table(
        "read-aggregated",
        "Reading, 400 user records of 100 bytes in each record",
        100,
        (
            Row("ours: pipeline, fused count", "read-ours", 400),
            Row("ours: consumer, no Beam", "read-consumer", 1000),
        ),
        aggregated=400,
    ),
    Table("write-200", "Writing, 200-byte records, 500 per request", 200, writing(1)),
    Table("write-1k", "Writing, 1 KiB records, 500 per request", 1024, writing(1.5)),
    Table(
        "write-aggregated",
        "Writing 100-byte records, aggregated",
        100,
        (Row("ours: pipeline, endless bundle", "write-ours-aggregated", 200),),
    ),
)


def peers_python() -> str | None:
    """Return a Python that has the other clients: their botocore is not ours. None: they cannot be had here."""
    python = PEERS / "bin" / "python"
    if not python.exists():
        try:
            subprocess.run([sys.executable, "-m", "venv", str(PEERS)], check=True)
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", "async-kinesis==3.0.1"], check=True)
        except subprocess.CalledProcessError as error:
            print(f"(no peers: {error})", file=sys.stderr)
            return None
    return str(python)


def run(row: Row, table: Table, endpoint: str, python: str, cores: tuple[int, int], seconds: float) -> dict[str, Any]:
    small = max(row.cost * 1000 // 2, 20_000)
    command = [python, str(HERE / "clients.py"), row.client, endpoint, "--core", str(cores[0])]
    command += ["--record-bytes", str(table.record_bytes), "--small", str(small)]
    command += ["--large", str(small + round(row.cost * 1000 * seconds)), *row.extra]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    if done.returncode or not done.stdout:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(table: Table, args: argparse.Namespace, python: str | None) -> bool:
    """Print the table; tell whether every guard held."""
    rows = [r for r in table.rows if python is not None or not r.peer]
    results: dict[str, list[dict[str, Any]]] = {row.label: [] for row in rows}
    with stub.running(record_bytes=table.record_bytes, aggregated=table.aggregated, core=args.cores[1]) as endpoint:
        for _ in range(args.repetitions):
            for row in rows:
                own = python if row.peer and python is not None else sys.executable
                results[row.label].append(run(row, table, endpoint, own, args.cores, args.seconds))
    print(f"\n### {table.title}\n")
    print("| client | CPU s/M (min-max) | records / CPU s | x boto3 | peak RSS MiB | threads |")
    print("|-|-|-|-|-|-|")
    good = True
    for row in rows:
        costs = [r["cpu_seconds_per_million"] for r in results[row.label]]
        base = [r["cpu_seconds_per_million"] for r in results.get("bare boto3 loop", [])]
        ratio = statistics.median(b / c for b, c in zip(base, costs, strict=True)) if base else None
        held = row.guard is None or ratio is None or ratio >= row.guard
        good = good and held
        middle = statistics.median(costs)
        print(
            f"| {row.label} | {middle:.2f} ({min(costs):.2f}-{max(costs):.2f}) | {1e3 / middle:,.0f}k "
            f"| {'' if ratio is None else f'{ratio:.1f}'}{'' if held else f' (guard {row.guard})'} "
            f"| {max(r['peak_rss_mib'] for r in results[row.label]):.0f} | {results[row.label][0]['threads']} |",
            flush=True,
        )
    return good


def machine() -> str:
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
    packages = ", ".join(f"{p} {version(p)}" for p in ("apache-beam", "boto3", "botocore", "msgspec"))
    load = os.getloadavg()[0]
    return f"{model}, {os.cpu_count()} cores, load {load:.1f}; Python {platform.python_version()}, {packages}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="CPU seconds to spend on each run, roughly")
    parser.add_argument("--only", action="append", choices=[t.name for t in TABLES])
    parser.add_argument("--cores", type=int, nargs=2, default=(0, 1), help="of the client and of the stub")
    parser.add_argument("--quick", action="store_true", help="one short repetition: says that it works, not how fast")
    parser.add_argument("--no-guard", action="store_true")
    parser.add_argument("--no-peers", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.repetitions, args.seconds = 1, 1.0
    print(machine())
    python = None if args.no_peers else peers_python()
    held = [measure(table, args, python) for table in TABLES if not args.only or table.name in args.only]
    if not all(held) and not args.no_guard:
        raise SystemExit("a ratio is below its guard")


if __name__ == "__main__":
    main()
