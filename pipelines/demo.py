"""The main job on real input: flights through a stream that is resharded meanwhile, every one accounted for.

    python -m samza_kinesis_io.pipelines.demo
    python -m samza_kinesis_io.pipelines.demo --flights flights-2013.csv.gz --runner=PrismRunner

Starts an embedded Kinesis, puts the flights in the order of their schedule, and meanwhile runs the pipeline of
`pipelines.flight_delays` on them; a shard is split and two are merged while it reads. At the end the results are read
back with a plain boto3 client and compared with the same figures computed straight from the file. The exit status is 1,
and the difference is printed, if one flight is missing or counted twice.

The read has to end, or a runner that passes nothing through a shuffle before the source's end (FnApiRunner) would never
show a result: it stops at a time fixed when the pipeline is built. So loading is paced to take --load-seconds, the stop
lies --margin-seconds behind its end, and a load that was not finished by then fails the demo, loudly.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import apache_beam as beam
import boto3
from apache_beam.utils.timestamp import Timestamp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from samza_kinesis_io import ClientConfig, StartingPosition, StopPosition
from samza_kinesis_io.pipelines import flight_delays, options
from samza_kinesis_io.testing import LocalKinesis
from samza_kinesis_io.transforms.flight_delays import (
    CarrierHour,
    Flight,
    HourlyDelays,
    decode_carrier_hour,
    differences,
    encode_flight,
    hourly_delays,
    read_flights,
)

FLIGHTS_STREAM = "flights"
DELAYS_STREAM = "delays"
SHARDS = 4
_SAMPLE = Path(__file__).with_name("flights-sample.avro")
_PUTS_PER_SECOND = 20
_MAX_PUT = 500
_BAR_WIDTH = 18
_SHOWN_DIFFERENCES = 20


class DemoFailed(Exception):
    """The demo could not come to a verdict; the message says why and what to do."""


#: How far it is, for the progress bars only. One process: both local runners run their workers in it.
_seen = {"put": 0, "read": 0, "results": 0}


class _Count(beam.DoFn):
    def __init__(self, what: str) -> None:
        self._what = what

    def process(self, element: Any) -> Iterator[Any]:
        _seen[self._what] += 1
        yield element


class Loader:
    """Puts flights into the stream, paced, and reshards it at a third and at two thirds of them."""

    def __init__(self, client: Any, flights: Sequence[Flight], *, seconds: float, say: Callable[[str], None]) -> None:
        self._client = client
        self._flights = flights
        self._seconds = seconds
        self._say = say
        self.stop = threading.Event()

    def run(self) -> float:
        """Return the time at which the last flight was acknowledged, in seconds since the epoch.

        Raises:
            DemoFailed: `stop` was set before.
        """
        size = min(_MAX_PUT, max(1, round(len(self._flights) / (self._seconds * _PUTS_PER_SECOND))))
        changes = [(len(self._flights) // 3, self._split), (len(self._flights) * 2 // 3, self._merge)]
        started = time.monotonic()
        for at in range(0, len(self._flights), size):
            while changes and at >= changes[0][0]:
                changes.pop(0)[1]()
            self._put(self._flights[at : at + size])
            _seen["put"] = min(at + size, len(self._flights))
            due = started + self._seconds * _seen["put"] / len(self._flights)
            if self.stop.wait(max(0.0, due - time.monotonic())):
                raise DemoFailed("loading was stopped, since the pipeline failed")
        return time.time()

    def _put(self, flights: Sequence[Flight]) -> None:
        entries = [{"Data": encode_flight(f), "PartitionKey": f.partition_key} for f in flights]
        while entries:
            answer = self._client.put_records(StreamName=FLIGHTS_STREAM, Records=entries)
            entries = [e for e, told in zip(entries, answer["Records"], strict=True) if "ErrorCode" in told]
            if entries and self.stop.wait(0.1):
                return

    def _split(self) -> None:
        shard = self._open_shards()[0]
        start, end = (int(shard["HashKeyRange"][k]) for k in ("StartingHashKey", "EndingHashKey"))
        self._client.split_shard(
            StreamName=FLIGHTS_STREAM, ShardToSplit=shard["ShardId"], NewStartingHashKey=str((start + end) // 2)
        )
        wait_until_active(self._client, FLIGHTS_STREAM)
        self._say(f"split {shard['ShardId']} after {_seen['put']:,} flights")

    def _merge(self) -> None:
        left, right = self._open_shards()[-2:]
        self._client.merge_shards(
            StreamName=FLIGHTS_STREAM, ShardToMerge=left["ShardId"], AdjacentShardToMerge=right["ShardId"]
        )
        wait_until_active(self._client, FLIGHTS_STREAM)
        self._say(f"merged {left['ShardId']} and {right['ShardId']} after {_seen['put']:,} flights")

    def _open_shards(self) -> list[dict[str, Any]]:
        shards = self._client.list_shards(StreamName=FLIGHTS_STREAM)["Shards"]
        still_open = [s for s in shards if "EndingSequenceNumber" not in s["SequenceNumberRange"]]
        return sorted(still_open, key=lambda s: int(s["HashKeyRange"]["StartingHashKey"]))


def wait_until_active(client: Any, stream: str, *, timeout_seconds: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_seconds
    while True:
        summary = client.describe_stream_summary(StreamName=stream)["StreamDescriptionSummary"]
        if summary["StreamStatus"] == "ACTIVE":
            return
        if time.monotonic() > deadline:
            raise DemoFailed(f"{stream} is {summary['StreamStatus']} after {timeout_seconds:.0f} s")
        time.sleep(0.05)


def read_back(client: Any, stream: str) -> list[CarrierHour]:
    """Return everything in a stream, with nothing but boto3."""
    rows = []
    for shard in client.list_shards(StreamName=stream)["Shards"]:
        iterator = client.get_shard_iterator(
            StreamName=stream, ShardId=shard["ShardId"], ShardIteratorType="TRIM_HORIZON"
        )["ShardIterator"]
        while iterator:
            answer = client.get_records(ShardIterator=iterator, Limit=10_000)
            rows += [decode_carrier_hour(r["Data"]) for r in answer["Records"]]
            iterator = answer.get("NextShardIterator")
            if not answer["Records"] and answer["MillisBehindLatest"] == 0:
                break
    return rows


def run_pipeline(endpoint_url: str, stop_at: float, beam_arguments: list[str]) -> None:
    """Run the job until everything that arrived before `stop_at` (seconds since the epoch) has been read."""
    client = ClientConfig(region="us-east-1", endpoint_url=endpoint_url)
    pipeline = beam.Pipeline(options=options.beam_options(beam_arguments))
    flights = flight_delays.read_flights(
        pipeline,
        FLIGHTS_STREAM,
        starting_position=StartingPosition.trim_horizon(),
        stop_at=StopPosition.at_timestamp(Timestamp(stop_at)),
        client=client,
        # The loader puts them in order; a put that is tried again may still pass a later one.
        out_of_orderness_seconds=3600.0,
    )
    delays = flights | "CountRead" >> beam.ParDo(_Count("read")) | HourlyDelays()
    delays = delays | "CountResults" >> beam.ParDo(_Count("results"))
    flight_delays.write_delays(delays, DELAYS_STREAM, client=client)
    pipeline.run().wait_until_finish()


def carriers_table(rows: Sequence[CarrierHour]) -> Table:
    """Return a line per carrier, the latest on average first, with a bar of its mean departure delay."""
    by_carrier: dict[str, list[CarrierHour]] = defaultdict(list)
    for row in rows:
        by_carrier[row.carrier].append(row)
    lines = []
    for carrier, hours in by_carrier.items():
        flights = sum(h.flights for h in hours)
        arrived = sum(h.arrived for h in hours)
        lines.append(
            (
                sum(h.departure_delay_minutes for h in hours) / flights,
                carrier,
                flights,
                sum(h.late for h in hours) / flights,
                sum(h.arrival_delay_minutes for h in hours) / arrived if arrived else 0.0,
                max(h.worst_departure_delay_minutes for h in hours),
            )
        )
    longest = max(1.0, *(abs(mean) for mean, *_ in lines)) if lines else 1.0
    # Narrow enough for 80 columns.
    table = Table(title="Departures from New York City: mean and worst delays in minutes")
    table.add_column("carrier", no_wrap=True)
    for name in ("flights", "late", "worst", "arrival", "departure"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for mean, carrier, flights, late, arrival, worst in sorted(lines, reverse=True):
        bar = "█" * max(1, round(_BAR_WIDTH * abs(mean) / longest))
        colour = "red" if mean > 0 else "green"
        table.add_row(
            carrier, f"{flights:,}", f"{late:.0%}", f"{worst:,}", f"{arrival:.1f}", f"{mean:.1f}", f"[{colour}]{bar}[/]"
        )
    return table


def run(args: Any, beam_arguments: list[str], console: Console) -> int:
    try:
        flights = sorted(read_flights(args.flights), key=lambda f: f.scheduled_departure)
    except (OSError, ValueError) as error:
        raise DemoFailed(f"--flights: {error}") from error
    if not flights:
        raise DemoFailed(f"--flights: {args.flights} holds no flight")
    expected = hourly_delays(flights)
    load_seconds = args.load_seconds or max(6.0, len(flights) / 6_000)
    _seen.update(put=0, read=0, results=0)
    with (
        LocalKinesis() as kinesis,
        Progress(
            TextColumn("{task.description:<8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        ) as progress,
        ThreadPoolExecutor(1, thread_name_prefix="loader") as executor,
    ):
        client = boto3.client("kinesis", region_name="us-east-1", endpoint_url=kinesis.endpoint_url)
        for stream, shards in ((FLIGHTS_STREAM, SHARDS), (DELAYS_STREAM, 2)):
            client.create_stream(StreamName=stream, ShardCount=shards)
            wait_until_active(client, stream)
        loader = Loader(client, flights, seconds=load_seconds, say=progress.console.print)
        stop_at = time.time() + load_seconds + args.margin_seconds
        ended = threading.Event()
        loading = executor.submit(loader.run)
        totals = {"put": len(flights), "read": len(flights), "results": len(expected)}
        bars = {name: progress.add_task(name, total=total) for name, total in totals.items()}

        def show() -> None:
            over = False
            while not over:
                over = ended.wait(0.1)
                for name, bar in bars.items():
                    progress.update(bar, completed=_seen[name])

        shower = threading.Thread(target=show, daemon=True)
        shower.start()
        try:
            run_pipeline(kinesis.endpoint_url, stop_at, beam_arguments)
        except BaseException:
            loader.stop.set()
            raise
        finally:
            ended.set()
            shower.join()
        loaded_at = loading.result()
        if loaded_at >= stop_at:
            raise DemoFailed(
                f"loading ended {loaded_at - stop_at:.1f} s after the read's stop, so nothing can be said of the rest; "
                f"this machine needs more than --load-seconds={load_seconds:.0f}"
            )
        found = read_back(client, DELAYS_STREAM)
        shards = client.list_shards(StreamName=FLIGHTS_STREAM)["Shards"]

    wrong = differences(expected, found)
    console.print(carriers_table(found))
    counted = sum(row.flights for row in found)
    console.print(
        f"{len(flights):,} flights put, {counted:,} counted in {len(found):,} results ({len(expected):,} expected); "
        f"the stream had {len(shards)} shards."
    )
    if wrong:
        console.print(f"[red]{len(wrong)} differences from the file:[/]")
        for line in wrong[:_SHOWN_DIFFERENCES]:
            console.print("  " + line, markup=False)
        if len(wrong) > _SHOWN_DIFFERENCES:
            console.print(f"  ... and {len(wrong) - _SHOWN_DIFFERENCES} more")
        return 1
    console.print("[green]Every flight was counted exactly once.[/]")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = options.parser(__doc__)
    parser.add_argument("--flights", default=_SAMPLE, metavar="FILE", help=".csv, .csv.gz, .avro; default: a sample")
    parser.add_argument(
        "--runner", default="FnApiRunner", help="FnApiRunner (default) or PrismRunner (see --prism_location)"
    )
    parser.add_argument("--load-seconds", type=float, metavar="SECONDS", help="default: 6, or more for many flights")
    parser.add_argument(
        "--margin-seconds", type=float, default=3.0, metavar="SECONDS", help="from the load's end to the stop (3)"
    )
    args, beam_arguments = parser.parse_known_args(arguments)
    if args.runner in ("DirectRunner", "SwitchingDirectRunner"):
        parser.error(
            "--runner=DirectRunner may try one runner and silently run the job again on another; "
            "name FnApiRunner or PrismRunner"
        )
    # The embedded service takes any credentials; the user's own have no business here.
    os.environ.update(AWS_ACCESS_KEY_ID="demo", AWS_SECRET_ACCESS_KEY="demo", AWS_EC2_METADATA_DISABLED="true")
    for name in ("AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_KINESIS"):
        os.environ.pop(name, None)
    console = Console()
    try:
        return run(args, [f"--runner={args.runner}", *beam_arguments], console)
    except DemoFailed as error:
        console.print(str(error), style="red", markup=False)
        return 1


if __name__ == "__main__":
    # Under the name that workers import: what belongs to __main__ is pickled by value, the progress counter too.
    from samza_kinesis_io.pipelines import demo

    sys.exit(demo.main())
