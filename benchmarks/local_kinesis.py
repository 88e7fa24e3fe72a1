"""How fast LocalKinesis is: records per second, and per CPU second of its process.

    python benchmarks/local_kinesis.py [--records 1000000] [--record-bytes 200] [--shards 1]

The server runs in a process of its own. A client that costs next to nothing (one socket, the request encoded once)
fills a stream and reads it again, in ten parts: the parts must not become slower as the stream grows. Then the same by
boto3, a tenth as much. Linux only: the CPU time comes from /proc.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3

BATCH = 500
PARTS = 10


class Server:
    """`python -m samza_kinesis_io.testing` and its CPU time."""

    def __init__(self, shards: int) -> None:
        command = [sys.executable, "-m", "samza_kinesis_io.testing", "--port", "0"]
        for stream in ("raw", "boto3"):
            command += ["--stream", f"{stream}:{shards}"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("export AWS_ENDPOINT_URL_KINESIS="):
                self.endpoint_url = line.strip().partition("=")[2]
                return
        raise SystemExit("the server did not start")

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident_mib(self) -> float:
        pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


class RawClient:
    """One connection without any library."""

    def __init__(self, endpoint_url: str) -> None:
        host, _, port = endpoint_url.removeprefix("http://").partition(":")
        self._socket = socket.create_connection((host, int(port)))

    @staticmethod
    def request(operation: str, params: dict[str, Any]) -> bytes:
        body = json.dumps(params).encode()
        head = f"POST / HTTP/1.1\r\nX-Amz-Target: Kinesis_20131202.{operation}\r\nContent-Length: {len(body)}\r\n\r\n"
        return head.encode() + body

    def send(self, request: bytes) -> bytes:
        """Return the body of the answer."""
        self._socket.sendall(request)
        received = bytearray()
        while (end := received.find(b"\r\n\r\n")) < 0:
            received += self._socket.recv(1 << 20)
        head = bytes(received[:end])
        assert head.startswith(b"HTTP/1.1 200"), received
        length = int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0])
        while len(received) < end + 4 + length:
            received += self._socket.recv(1 << 20)
        return bytes(received[end + 4 :])


def raw_put(client: RawClient, record_bytes: int) -> Callable[[], int]:
    records = [
        {"Data": base64.b64encode(os.urandom(record_bytes)).decode(), "PartitionKey": f"key-{i}"} for i in range(BATCH)
    ]
    request = client.request("PutRecords", {"StreamName": "raw", "Records": records})

    def put() -> int:
        assert client.send(request).startswith(b'{"FailedRecordCount":0')
        return BATCH

    return put


def raw_get(client: RawClient, shards: int) -> Callable[[], int]:
    def records() -> Iterator[int]:
        for shard in range(shards):
            params = {"StreamName": "raw", "ShardId": f"shardId-{shard:012d}", "ShardIteratorType": "TRIM_HORIZON"}
            answer = client.send(client.request("GetShardIterator", params))
            iterator = json.loads(answer)["ShardIterator"]
            while True:
                body = client.send(client.request("GetRecords", {"ShardIterator": iterator, "Limit": 10_000}))
                # Not decoded: this process must not be the slower one.
                rest = json.loads(b"{" + body[body.rindex(b'"MillisBehindLatest"') :])
                iterator = rest["NextShardIterator"]
                yield body.count(b'"SequenceNumber"')
                if rest["MillisBehindLatest"] == 0:
                    break

    return records().__next__


def boto3_put(client: Any, record_bytes: int) -> Callable[[], int]:
    records = [{"Data": os.urandom(record_bytes), "PartitionKey": f"key-{i}"} for i in range(BATCH)]

    def put() -> int:
        assert client.put_records(StreamName="boto3", Records=records)["FailedRecordCount"] == 0
        return BATCH

    return put


def boto3_get(client: Any, shards: int) -> Callable[[], int]:
    def records() -> Iterator[int]:
        for shard in range(shards):
            iterator = client.get_shard_iterator(
                StreamName="boto3", ShardId=f"shardId-{shard:012d}", ShardIteratorType="TRIM_HORIZON"
            )["ShardIterator"]
            while True:
                answer = client.get_records(ShardIterator=iterator, Limit=10_000)
                iterator = answer["NextShardIterator"]
                yield len(answer["Records"])
                if answer["MillisBehindLatest"] == 0:
                    break

    return records().__next__


def measure(name: str, server: Server, step: Callable[[], int], records: int) -> None:
    """Repeat `step` until it has moved so many records; print the rates of each tenth."""
    done = 0
    for part in range(1, PARTS + 1):
        start, cpu, before = time.perf_counter(), server.cpu_seconds(), done
        while done < records * part // PARTS:
            done += step()
        if done == before:
            continue
        seconds, cpu = time.perf_counter() - start, max(server.cpu_seconds() - cpu, 0.01)
        moved = done - before
        print(
            f"{name:10} {done:>10,} records {moved / seconds:>12,.0f}/s {moved / cpu:>12,.0f}/s of server CPU"
            f" {server.resident_mib():>8,.0f} MiB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--record-bytes", type=int, default=200)
    parser.add_argument("--shards", type=int, default=1)
    args = parser.parse_args()
    server = Server(args.shards)
    try:
        raw = RawClient(server.endpoint_url)
        measure("raw put", server, raw_put(raw, args.record_bytes), args.records)
        measure("raw get", server, raw_get(raw, args.shards), args.records)
        client = boto3.client(
            "kinesis",
            endpoint_url=server.endpoint_url,
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )
        measure("boto3 put", server, boto3_put(client, args.record_bytes), args.records // 10)
        measure("boto3 get", server, boto3_get(client, args.shards), args.records // 10)
    finally:
        server.close()


if __name__ == "__main__":
    main()
