"""The few words in which the contract speaks to a target."""

from __future__ import annotations

import contextlib
import datetime
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from contract.model import assert_valid_output
from contract.targets import ServiceError, Target

_numbers = itertools.count(1)

Shard = dict[str, Any]
Record = dict[str, Any]


class Kinesis:
    """A target, seen by one test: its calls, each answer judged by botocore's model, and the streams it made."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._streams: list[str] = []

    def call(self, operation: str, **params: Any) -> dict[str, Any]:
        answer = self.target.call(operation, params)
        assert_valid_output(operation, answer)
        return answer

    @contextlib.contextmanager
    def refuses(self, *codes: str) -> Iterator[None]:
        """Expect one of these errors, as an error of the caller (4xx)."""
        with pytest.raises(ServiceError) as caught:
            yield
        assert caught.value.code in codes, f"expected {' or '.join(codes)}, got {caught.value}"
        assert 400 <= caught.value.status < 500, f"expected a 4xx status, got {caught.value}"

    def let_pass(self, seconds: float) -> None:
        self.target.let_pass(seconds)

    # Streams.

    def name(self) -> str:
        """Return a name that no other test has, and forget its stream after this one."""
        name = f"contract-{next(_numbers)}"
        self._streams.append(name)
        return name

    def stream(self, shards: int = 1) -> str:
        name = self.name()
        self.call("CreateStream", StreamName=name, ShardCount=shards)
        self.settle(name)
        return name

    def summary(self, stream: str) -> dict[str, Any]:
        summary: dict[str, Any] = self.call("DescribeStreamSummary", StreamName=stream)["StreamDescriptionSummary"]
        return summary

    def settle(self, stream: str) -> None:
        """Let time pass until the stream is ACTIVE."""
        for _ in range(500):
            if self.summary(stream)["StreamStatus"] == "ACTIVE":
                return
            self.let_pass(0.01)
        raise AssertionError(f"{stream} is not ACTIVE after 5 s")

    def delete_streams(self) -> None:
        for name in self._streams:
            with contextlib.suppress(ServiceError):
                self.target.call("DeleteStream", {"StreamName": name})

    # Shards.

    def shards(self, stream: str, **params: Any) -> list[Shard]:
        """Return the listed shards in the order of their creation."""
        listed: list[Shard] = self.call("ListShards", StreamName=stream, **params)["Shards"]
        return sorted(listed, key=lambda shard: shard["ShardId"])

    def shard_ids(self, stream: str, **params: Any) -> list[str]:
        return [shard["ShardId"] for shard in self.shards(stream, **params)]

    def split(self, stream: str, shard: Shard) -> list[Shard]:
        """Split a shard in its middle; return the children."""
        start, end = hash_keys(shard)
        middle = str((start + end) // 2 + 1)
        self.call("SplitShard", StreamName=stream, ShardToSplit=shard["ShardId"], NewStartingHashKey=middle)
        self.settle(stream)
        return [s for s in self.shards(stream) if s.get("ParentShardId") == shard["ShardId"]]

    def merge(self, stream: str, shard: Shard, adjacent: Shard) -> Shard:
        self.call(
            "MergeShards",
            StreamName=stream,
            ShardToMerge=shard["ShardId"],
            AdjacentShardToMerge=adjacent["ShardId"],
        )
        self.settle(stream)
        return next(s for s in self.shards(stream) if s.get("ParentShardId") == shard["ShardId"])

    # Records.

    def put(self, stream: str, *data: bytes, key: str = "key", **params: Any) -> list[dict[str, Any]]:
        """Write records one by one, so that their order is certain; return where each went."""
        return [self.call("PutRecord", StreamName=stream, Data=d, PartitionKey=key, **params) for d in data]

    def put_records(self, stream: str, *entries: dict[str, Any]) -> list[dict[str, Any]]:
        """Write in one request, of which nothing fails."""
        answer = self.call("PutRecords", StreamName=stream, Records=list(entries))
        assert answer.get("FailedRecordCount", 0) == 0
        results: list[dict[str, Any]] = answer["Records"]
        return results

    def iterator(self, stream: str, shard_id: str, kind: str = "TRIM_HORIZON", **params: Any) -> str:
        answer = self.call("GetShardIterator", StreamName=stream, ShardId=shard_id, ShardIteratorType=kind, **params)
        return str(answer["ShardIterator"])

    def read(self, stream: str, shard_id: str, kind: str = "TRIM_HORIZON", **params: Any) -> list[Record]:
        """Read from an iterator until nothing is left now."""
        records: list[Record] = []
        for answer in self.answers(self.iterator(stream, shard_id, kind, **params)):
            records += answer["Records"]
        return records

    def data(self, stream: str, shard_id: str, kind: str = "TRIM_HORIZON", **params: Any) -> list[bytes]:
        return [record["Data"] for record in self.read(stream, shard_id, kind, **params)]

    def answers(self, iterator: str | None, **params: Any) -> Iterator[dict[str, Any]]:
        """Give answer after answer until the shard ends, or an answer is empty and says that nothing is behind it.

        Where the target never ends a shard the last answer has a NextShardIterator.
        """
        for _ in range(50):
            if iterator is None:
                return
            answer = self.call("GetRecords", ShardIterator=iterator, **params)
            yield answer
            iterator = answer.get("NextShardIterator")
            if not answer["Records"] and iterator and not answer.get("MillisBehindLatest"):
                # The end of a closed shard may come an answer later than its last record.
                last = self.call("GetRecords", ShardIterator=iterator, **params)
                yield last
                return
        raise AssertionError("50 answers, and still something behind them")


def hash_keys(shard: Shard) -> tuple[int, int]:
    return int(shard["HashKeyRange"]["StartingHashKey"]), int(shard["HashKeyRange"]["EndingHashKey"])


def is_open(shard: Shard) -> bool:
    return "EndingSequenceNumber" not in shard["SequenceNumberRange"]


def seconds(timestamp: float | datetime.datetime) -> float:
    return timestamp.timestamp() if isinstance(timestamp, datetime.datetime) else float(timestamp)
