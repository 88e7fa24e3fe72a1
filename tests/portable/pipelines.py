"""The pipelines that every runner runs; `python -m portable.pipelines` runs one in a process of its own.

What they saw goes back into streams, since a worker may be another process or another machine. Workers import this
module by its name, so it must be importable wherever they run.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.transforms.window import FixedWindows
from apache_beam.utils.timestamp import Timestamp

from samza_kinesis_io import (
    ClientConfig,
    KinesisRecord,
    ReadFromKinesis,
    StartingPosition,
    StopPosition,
    WriteToKinesis,
)

FLIGHTS = "flights"
SEEN = "seen"
COUNTS = "counts"


@dataclass(frozen=True)
class Read:
    """How to read FLIGHTS, in words that fit on a command line."""

    stop_at: float | None = None
    """Seconds since the epoch; None: without end."""
    options: dict[str, Any] = field(default_factory=dict)
    """More options of ReadFromKinesis."""

    def transform(self, endpoint_url: str) -> ReadFromKinesis:
        return ReadFromKinesis(
            FLIGHTS,
            starting_position=StartingPosition.trim_horizon(),
            stop_at=None if self.stop_at is None else StopPosition.at_timestamp(Timestamp(self.stop_at)),
            client=ClientConfig(region="us-east-1", endpoint_url=endpoint_url),
            **self.options,
        )


class _Observe(beam.DoFn):
    """Says when, where and after what a record came out of the reader: it must be fused with it."""

    def process(self, record: KinesisRecord) -> Iterator[bytes]:
        number, put_at = record.data.split(b",")
        # The monotonic clock is the same for all processes of a machine.
        yield b"%s,%s,%d,%d,%s,%s" % (
            number,
            put_at,
            time.monotonic_ns(),
            os.getpid(),
            record.shard_id.encode(),
            record.sequence_number.encode(),
        )


#: The pipelines, by a name of their own, whose `_Raise` has raised in this process.
RAISED: set[str] = set()


class _Raise(beam.DoFn):
    """Fails at the 51st record: the first time in each process, or every time."""

    def __init__(self, *, every_time: bool) -> None:
        self._every_time = every_time
        self._name = uuid.uuid4().hex

    def process(self, record: KinesisRecord) -> Iterator[KinesisRecord]:
        number = int(record.data.split(b",")[0])
        if number >= 50 and (self._every_time or self._name not in RAISED):
            RAISED.add(self._name)
            raise ValueError(f"flight {number} is one too many")
        yield record


class _Dawdle(beam.DoFn):
    """Stands still for a second at every 50th record: long enough for a runner to notice."""

    def process(self, record: KinesisRecord) -> Iterator[KinesisRecord]:
        yield record
        if int(record.data.split(b",")[0]) % 50 == 0:
            time.sleep(1.0)


class _Describe(beam.DoFn):
    def process(
        self,
        counted: tuple[str, int],
        window: Any = beam.DoFn.WindowParam,
        pane: Any = beam.DoFn.PaneInfoParam,
    ) -> Iterator[bytes]:
        key, count = counted
        yield json.dumps([key, float(window.start), count, pane.timing, time.monotonic_ns()]).encode()


def _write(records: beam.PCollection[bytes], stream: str, endpoint_url: str) -> None:
    _ = records | f"Write {stream}" >> WriteToKinesis(
        stream, client=ClientConfig(region="us-east-1", endpoint_url=endpoint_url)
    )


def _copy(records: beam.PCollection[KinesisRecord], endpoint_url: str) -> None:
    _write(records | "Observe" >> beam.ParDo(_Observe()).with_output_types(bytes), SEEN, endpoint_url)


def copy(pipeline: beam.Pipeline, endpoint_url: str, read: Read) -> None:
    """Every record, as it comes out of the reader, into SEEN."""
    _copy(pipeline | read.transform(endpoint_url), endpoint_url)


def copy_and_count(pipeline: beam.Pipeline, endpoint_url: str, read: Read) -> None:
    """The same, and the number of records of each partition key in each second into COUNTS. What is late is dropped."""
    records = pipeline | read.transform(endpoint_url)
    _copy(records, endpoint_url)
    counted = (
        records
        | "Keys" >> beam.Map(lambda record: (record.partition_key, 1)).with_output_types(tuple[str, int])
        | "Seconds" >> beam.WindowInto(FixedWindows(1))
        | "Count" >> beam.CombinePerKey(sum)
        | "Describe" >> beam.ParDo(_Describe()).with_output_types(bytes)
    )
    _write(counted, COUNTS, endpoint_url)


def copy_slowly(pipeline: beam.Pipeline, endpoint_url: str, read: Read) -> None:
    """50 records a second, so that a bundle lasts; nothing moves in most of that time."""
    records = pipeline | read.transform(endpoint_url) | "Dawdle" >> beam.ParDo(_Dawdle())
    _copy(records, endpoint_url)


def copy_with_an_exception(pipeline: beam.Pipeline, endpoint_url: str, read: Read) -> None:
    """Fails at the 51st record, and at every one after it."""
    records = pipeline | read.transform(endpoint_url) | "Raise" >> beam.ParDo(_Raise(every_time=True))
    _copy(records, endpoint_url)


def copy_with_one_exception(pipeline: beam.Pipeline, endpoint_url: str, read: Read) -> None:
    """Fails once, in the middle of a batch, in each worker process."""
    records = pipeline | read.transform(endpoint_url) | "Raise" >> beam.ParDo(_Raise(every_time=False))
    _copy(records, endpoint_url)


PIPELINES: dict[str, Callable[[beam.Pipeline, str, Read], None]] = {
    build.__name__: build
    for build in (copy, copy_and_count, copy_slowly, copy_with_an_exception, copy_with_one_exception)
}


def build(name: str, endpoint_url: str, read: Read, arguments: list[str]) -> beam.Pipeline:
    pipeline = beam.Pipeline(options=PipelineOptions(arguments))
    PIPELINES[name](pipeline, endpoint_url, read)
    return pipeline


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=sorted(PIPELINES))
    parser.add_argument("endpoint_url")
    parser.add_argument("read", type=json.loads, help="the fields of Read, as JSON")
    args, beam_arguments = parser.parse_known_args(arguments)
    build(args.name, args.endpoint_url, Read(**args.read), beam_arguments).run().wait_until_finish()


if __name__ == "__main__":
    # Under the name that workers import: what belongs to __main__ is pickled by value.
    from portable import pipelines

    pipelines.main()
