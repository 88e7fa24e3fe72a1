"""A Kinesis that costs next to nothing: canned answers over raw sockets, in a process and on a core of its own.

    python benchmarks/stub.py --shards 64 --record-bytes 200 --core 1

For measuring clients: no stream is kept, every shard is endless and full, every write succeeds. Answers are made once
and only their sequence numbers and iterators are written over, digit by digit, with fixed width; they grow within each
shard, as readers demand. It prints its port.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email.utils import formatdate
from pathlib import Path

MAX_HASH_KEY = (1 << 128) - 1
#: As real ones: 56 digits, of which we move eight (the answer's number) and five (the record's place in it).
SEQUENCE_PREFIX = "4965" + "0" * 39
ANSWER_DIGITS, INDEX_DIGITS = 8, 5
STREAM = "bench"
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_TARGET = re.compile(rb"x-amz-target: *Kinesis_20131202\.(\w+)", re.IGNORECASE)
_ITERATOR = re.compile(rb'"ShardIterator": *"(\d{6})-(\d{8})-')
_SHARD = re.compile(rb'"ShardId": *"shardId-(\d{12})"')
# Iterators of the service have about this length, and every request carries one.
_PAD = "A" * 200


def records_per_answer(record_bytes: int) -> int:
    """As many as the service gives a reader that lags behind: 10,000, or 10 MiB with the cost of the encoding."""
    return min(10_000, 7_168_000 // record_bytes)


class Template:
    """The body of a GetRecords answer, and where the digits are that change from one answer to the next."""

    def __init__(self, payload: bytes, count: int, *, silent: bool = False) -> None:
        lag = 0 if silent else 60_000
        head = f'{{"NextShardIterator":"000000-00000000-{_PAD}","MillisBehindLatest":{lag},"Records":['
        arrival = round(time.time()) - 60
        data = base64.b64encode(payload).decode()
        prefix = SEQUENCE_PREFIX + "0" * ANSWER_DIGITS
        texts = [
            f'{{"SequenceNumber":"{prefix}{i:05d}","ApproximateArrivalTimestamp":{arrival}.{i % 1000:03d},'
            f'"Data":"{data}","PartitionKey":"key-{i:05d}"}}'
            for i in range(0 if silent else count)
        ]
        body = head + ",".join(texts) + "]}"
        self.body = body.encode()
        self.shard_at = head.index("000000-")
        self.next_at = self.shard_at + 7
        self.stride = len(texts[0]) + 1 if texts else 0
        self.digits_at = len(head) + len('{"SequenceNumber":"') + len(SEQUENCE_PREFIX)
        self.count = len(texts)


class Answer:
    """One connection's own copy of the body, written over for each answer."""

    def __init__(self, template: Template) -> None:
        self._template = template
        self.body = bytearray(template.body)
        self._shown = b"0" * ANSWER_DIGITS

    def show(self, shard: bytes, number: int) -> bytearray:
        template, body = self._template, self.body
        body[template.shard_at : template.shard_at + 6] = shard
        body[template.next_at : template.next_at + 8] = b"%08d" % (number + 1)
        shown = b"%08d" % number
        for place in range(ANSWER_DIGITS):
            if template.count and shown[place] != self._shown[place]:
                # A strided slice: the same digit of all records at once, in C.
                first = template.digits_at + place
                last = first + (template.count - 1) * template.stride + 1
                body[first : last : template.stride] = shown[place : place + 1] * template.count
        self._shown = shown
        return body


class Stub:
    def __init__(self, payload: bytes, count: int, shards: int, *, silent: bool) -> None:
        self._template = Template(payload, count, silent=silent)
        self._shards = shards
        self._put_answers: dict[int, bytes] = {}
        width = (MAX_HASH_KEY + 1) // shards
        listed = [
            {
                "ShardId": f"shardId-{i:012d}",
                "HashKeyRange": {
                    "StartingHashKey": str(i * width),
                    "EndingHashKey": str(MAX_HASH_KEY if i == shards - 1 else (i + 1) * width - 1),
                },
                "SequenceNumberRange": {"StartingSequenceNumber": SEQUENCE_PREFIX + "0" * 13},
            }
            for i in range(shards)
        ]
        summary = {
            "StreamName": STREAM,
            "StreamARN": f"arn:aws:kinesis:us-east-1:000000000000:stream/{STREAM}",
            "StreamStatus": "ACTIVE",
            "RetentionPeriodHours": 24,
            "StreamCreationTimestamp": time.time() - 7200,
            "OpenShardCount": shards,
            "EnhancedMonitoring": [],
        }
        description = {**summary, "Shards": listed, "HasMoreShards": False}
        self._pages = [listed[i : i + 1000] for i in range(0, shards, 1000)]
        self._fixed = {
            b"DescribeStreamSummary": json.dumps({"StreamDescriptionSummary": summary}).encode(),
            b"DescribeStream": json.dumps({"StreamDescription": description}).encode(),
            b"ListTagsForStream": b'{"Tags":[],"HasMoreTags":false}',
        }

    def serve(self, connection: socket.socket) -> None:
        answer: Answer | None = None
        received = bytearray()
        with connection, suppress(ConnectionError):  # clients end when they have enough
            while True:
                while (end := received.find(b"\r\n\r\n")) < 0:
                    if not (part := connection.recv(1 << 18)):
                        return
                    received += part
                head = bytes(received[: end + 2])
                length = int(_LENGTH.search(head)[1])  # type: ignore[index]
                total = end + 4 + length
                if b"100-continue" in head and len(received) < total:
                    connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                while len(received) < total:
                    if not (part := connection.recv(1 << 18)):
                        return
                    received += part
                request = bytes(received[end + 4 : total])
                del received[:total]
                operation = _TARGET.search(head)[1]  # type: ignore[index]
                if operation == b"GetRecords":
                    if answer is None:
                        answer = Answer(self._template)
                    asked = _ITERATOR.search(request)
                    assert asked is not None, request
                    body: bytes | bytearray = answer.show(asked[1], int(asked[2]))
                elif operation == b"PutRecords":
                    body = self._put_answer(request.count(b'"Data"'))
                elif operation == b"GetShardIterator":
                    number = int(_SHARD.search(request)[1])  # type: ignore[index]
                    body = f'{{"ShardIterator":"{number:06d}-00000001-{_PAD}"}}'.encode()
                elif operation == b"ListShards":
                    token = json.loads(request).get("NextToken")
                    page = int(token or 0)
                    more = {"NextToken": str(page + 1)} if page + 1 < len(self._pages) else {}
                    body = json.dumps({"Shards": self._pages[page], **more}).encode()
                else:
                    body = self._fixed[operation]
                connection.sendall(
                    b"HTTP/1.1 200 OK\r\nDate: %s\r\nx-amzn-RequestId: 00000000-0000-0000-0000-000000000000\r\n"
                    b"Content-Type: application/x-amz-json-1.1\r\nContent-Length: %d\r\n\r\n"
                    % (formatdate(usegmt=True).encode(), len(body))
                )
                connection.sendall(body)

    def _put_answer(self, count: int) -> bytes:
        answer = self._put_answers.get(count)
        if answer is None:
            result = {"SequenceNumber": SEQUENCE_PREFIX + "0" * 13, "ShardId": f"shardId-{0:012d}"}
            body = {"FailedRecordCount": 0, "EncryptionType": "NONE", "Records": [result] * count}
            answer = self._put_answers[count] = json.dumps(body, separators=(",", ":")).encode()
        return answer


@contextmanager
def running(
    *, shards: int = 64, record_bytes: int = 200, aggregated: int = 0, silent: bool = False, core: int | None = None
) -> Iterator[str]:
    """Run a stub in a process of its own; gives its endpoint URL."""
    command = [sys.executable, __file__, "--shards", str(shards), "--record-bytes", str(record_bytes)]
    command += ["--aggregated", str(aggregated)]
    command += ["--silent"] if silent else []
    command += ["--core", str(core)] if core is not None else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far. Linux only."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def aggregate_of(count: int, record_bytes: int) -> bytes:
    from samza_kinesis_io.aggregation import Aggregate

    aggregate = Aggregate()
    for _ in range(count):
        assert aggregate.add("one-key", None, b"x" * record_bytes)
    return aggregate.encode()[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=64)
    parser.add_argument("--record-bytes", type=int, default=200)
    parser.add_argument("--aggregated", type=int, default=0, help="each record is an aggregate of so many")
    parser.add_argument("--silent", action="store_true", help="no records: every answer is empty and up to date")
    parser.add_argument("--core", type=int, help="the only core to run on")
    args = parser.parse_args()
    if args.core is not None:
        os.sched_setaffinity(0, {args.core})
    payload = aggregate_of(args.aggregated, args.record_bytes) if args.aggregated else b"x" * args.record_bytes
    stub = Stub(payload, records_per_answer(len(payload)), args.shards, silent=args.silent)
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    print(listener.getsockname()[1], flush=True)
    while True:
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=stub.serve, args=(connection,), daemon=True).start()


if __name__ == "__main__":
    main()
