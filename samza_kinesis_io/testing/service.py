"""The operations of the service: one region of one account.

Everything takes the time as an argument and nothing here locks, waits or fails on purpose: that is `fake.py`'s part.
Where the API reference is silent this follows kinesalite, whose authors compared it with the service. What nobody
knows of the service is said at its line.
"""

from __future__ import annotations

import email.utils
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from samza_kinesis_io.limits import (
    DEFAULT_MAX_RECORD_BYTES,
    DEFAULT_RETENTION_HOURS,
    ITERATOR_LIFETIME_SECONDS,
    KIB,
    LIST_SHARDS_TOKEN_LIFETIME_SECONDS,
    MAX_BYTES_PER_PUT,
    MAX_RECORD_BYTES,
    MAX_RECORDS_PER_GET,
    MAX_RECORDS_PER_PUT,
    MAX_SHARDS_PER_PAGE,
)
from samza_kinesis_io.testing.faults import FakeServiceError, Plan
from samza_kinesis_io.testing.sequence_numbers import SequenceNumber
from samza_kinesis_io.testing.streams import FakeShard, FakeStream, Transition, decode_records
from samza_kinesis_io.testing.tokens import ListShardsToken, ShardIterator
from samza_kinesis_io.testing.validation import (
    SEQUENCE_NUMBER,
    STREAM_NAME,
    CheckedEntry,
    check_entry,
    hash_key_of,
    invalid,
    seconds_of,
    whole_number,
)

#: A call's parameters and answer are what boto3 takes and gives: as varied as JSON.
Params = Mapping[str, Any]
Answer = dict[str, Any]

_MAX_RETENTION_HOURS: Final = 8760
_ON_DEMAND_SHARDS: Final = 4


@dataclass(frozen=True, slots=True)
class EncodedRecords:
    """The answer to a GetRecords, its records still pieces of JSON."""

    pieces: list[bytes]
    rest: Answer

    def decoded(self) -> Answer:
        """Return it as boto3 gives it, except that timestamps are float seconds."""
        records = []
        for record in decode_records(self.pieces):
            entry: Answer = {
                "SequenceNumber": record.sequence_number,
                "ApproximateArrivalTimestamp": record.approximate_arrival_seconds,
                "Data": record.data,
            }
            if record.partition_key is not None:
                entry["PartitionKey"] = record.partition_key
            records.append(entry)
        return {"Records": records, **self.rest}


class Service:
    """The streams and what every operation does to them."""

    def __init__(
        self,
        *,
        region: str,
        account_id: str,
        enforce_limits: bool,
        transition_seconds: float,
        retention_hours: int,
        seed: int,
    ) -> None:
        self.region = region
        self.account_id = account_id
        self.enforce_limits = enforce_limits
        self.transition_seconds = transition_seconds
        self.retention_hours = retention_hours
        self._rng = random.Random(seed)
        self._generation = 0
        self._streams: dict[str, FakeStream] = {}
        self._sequence_epochs: dict[str, int] = {}
        self._operations: dict[str, Callable[[Params, float], Answer]] = {
            "CreateStream": self._create_stream,
            "DeleteStream": self._delete_stream,
            "DescribeStream": self._describe_stream,
            "DescribeStreamSummary": self._describe_stream_summary,
            "ListStreams": self._list_streams,
            "ListShards": self._list_shards,
            "GetShardIterator": self._get_shard_iterator,
            "SplitShard": self._split_shard,
            "MergeShards": self._merge_shards,
            "UpdateShardCount": self._update_shard_count,
            "IncreaseStreamRetentionPeriod": self._increase_retention,
            "DecreaseStreamRetentionPeriod": self._decrease_retention,
            "UpdateMaxRecordSize": self._update_max_record_size,
            "PutRecord": self._put_record,
            "UpdateStreamRecordDistributionStrategy": self._update_record_distribution_strategy,
        }

    def perform(self, operation: str, params: Params, now: float, plan: Plan) -> Answer | EncodedRecords:
        """Return an operation's answer, or raise FakeServiceError."""
        if operation == "GetRecords":
            return self._get_records(params, now, plan)
        if operation == "PutRecords":
            return self._put_records(params, now, plan)
        if operation not in self._operations:
            raise FakeServiceError("UnknownOperationException", f"FakeKinesis does not know {operation}.")
        return self._operations[operation](params, now)

    # Streams.

    def _create_stream(self, params: Params, now: float) -> Answer:
        name = params.get("StreamName")
        if not isinstance(name, str) or not STREAM_NAME.fullmatch(name):
            raise invalid("streamName", name, "Member must satisfy regular expression pattern: [a-zA-Z0-9_.-]+")
        mode = (params.get("StreamModeDetails") or {}).get("StreamMode", "PROVISIONED")
        count = params.get("ShardCount")
        if mode == "PROVISIONED" and count is None:
            raise FakeServiceError("ValidationException", "ShardCount must be provided for a PROVISIONED stream.")
        if mode == "ON_DEMAND" and count is not None:
            raise FakeServiceError("ValidationException", "ShardCount cannot be provided for an ON_DEMAND stream.")
        if count is not None:
            whole_number("shardCount", count, 1, 10_000)
        max_bytes = _max_record_bytes(params.get("MaxRecordSizeInKiB", DEFAULT_MAX_RECORD_BYTES // KIB))
        auto = params.get("RecordDistributionStrategy", "USER_PARTITION_KEY") == "AUTO"
        if auto and mode != "ON_DEMAND":
            raise FakeServiceError("ValidationException", "RecordDistributionStrategy AUTO needs an ON_DEMAND stream.")
        self._settle(name, now)
        if name in self._streams:
            raise FakeServiceError(
                "ResourceInUseException", f"Stream {name} under account {self.account_id} already exists."
            )
        stream = self.new_stream(
            name, now, on_demand=mode == "ON_DEMAND", auto_distribution=auto, max_record_bytes=max_bytes
        )
        self._begin(stream, "CREATING", now, lambda at: stream.open_initial(count or _ON_DEMAND_SHARDS, at))
        return {}

    def _delete_stream(self, params: Params, now: float) -> Answer:
        stream = self.stream(params, now)
        self._begin(stream, "DELETING", now, lambda at: self._remove(stream))
        return {}

    def _describe_stream(self, params: Params, now: float) -> Answer:
        stream = self.stream(params, now)
        limit = whole_number("limit", params.get("Limit", 100), 1, 10_000)
        shards = self._after(stream.shards(now), params.get("ExclusiveStartShardId"))
        return {
            "StreamDescription": {
                "StreamName": stream.name,
                "StreamARN": stream.arn,
                "StreamStatus": stream.status,
                "StreamModeDetails": {"StreamMode": _mode(stream)},
                "Shards": [_shard_answer(shard) for shard in shards[:limit]],
                "HasMoreShards": len(shards) > limit,
                "RetentionPeriodHours": stream.retention_hours,
                "StreamCreationTimestamp": stream.created_seconds,
                "EnhancedMonitoring": [{"ShardLevelMetrics": []}],
                "EncryptionType": "NONE",
            }
        }

    def _describe_stream_summary(self, params: Params, now: float) -> Answer:
        stream = self.stream(params, now)
        return {
            "StreamDescriptionSummary": {
                "StreamName": stream.name,
                "StreamARN": stream.arn,
                "StreamStatus": stream.status,
                "StreamModeDetails": {"StreamMode": _mode(stream)},
                "RetentionPeriodHours": stream.retention_hours,
                "StreamCreationTimestamp": stream.created_seconds,
                "EnhancedMonitoring": [{"ShardLevelMetrics": []}],
                "EncryptionType": "NONE",
                "OpenShardCount": len(stream.open_shards),
                "ConsumerCount": 0,
                "MaxRecordSizeInKiB": stream.max_record_bytes // KIB,
                "RecordDistributionStrategy": "AUTO" if stream.auto_distribution else "USER_PARTITION_KEY",
            }
        }

    def _list_streams(self, params: Params, now: float) -> Answer:
        limit = whole_number("limit", params.get("Limit", 100), 1, 10_000)
        start = params.get("NextToken") or params.get("ExclusiveStartStreamName") or ""
        for name in list(self._streams):
            self._settle(name, now)
        streams = [self._streams[name] for name in sorted(self._streams) if name > start]
        page = streams[:limit]
        answer: Answer = {
            "StreamNames": [stream.name for stream in page],
            "HasMoreStreams": len(streams) > limit,
            "StreamSummaries": [
                {
                    "StreamName": stream.name,
                    "StreamARN": stream.arn,
                    "StreamStatus": stream.status,
                    "StreamModeDetails": {"StreamMode": _mode(stream)},
                    "StreamCreationTimestamp": stream.created_seconds,
                }
                for stream in page
            ],
        }
        if len(streams) > limit:
            answer["NextToken"] = page[-1].name
        return answer

    def _increase_retention(self, params: Params, now: float) -> Answer:
        return self._set_retention(params, now, bounds_of=lambda stream: (stream.retention_hours, _MAX_RETENTION_HOURS))

    def _decrease_retention(self, params: Params, now: float) -> Answer:
        return self._set_retention(
            params, now, bounds_of=lambda stream: (DEFAULT_RETENTION_HOURS, stream.retention_hours)
        )

    def _set_retention(self, params: Params, now: float, bounds_of: Callable[[FakeStream], tuple[int, int]]) -> Answer:
        stream = self.active_stream(params, now)
        hours = params.get("RetentionPeriodHours")
        low, high = bounds_of(stream)
        if not isinstance(hours, int) or not low <= hours <= high:
            raise FakeServiceError(
                "InvalidArgumentException",
                f"Requested retention period ({hours} hours) for stream {stream.name} must be from {low} to {high}.",
            )
        # What the old period has dropped stays dropped.
        stream.oldest_seconds(now)
        stream.retention_hours = hours
        return {}

    def _update_max_record_size(self, params: Params, now: float) -> Answer:
        stream = self.active_stream(params, now)
        stream.max_record_bytes = _max_record_bytes(params.get("MaxRecordSizeInKiB"))
        return {}

    def _update_record_distribution_strategy(self, params: Params, now: float) -> Answer:
        stream = self.active_stream(params, now)
        strategy = params.get("RecordDistributionStrategy")
        if strategy not in ("AUTO", "USER_PARTITION_KEY"):
            raise invalid("recordDistributionStrategy", strategy, "Member must be one of [AUTO, USER_PARTITION_KEY]")
        if strategy == "AUTO" and not stream.on_demand:
            raise FakeServiceError("ValidationException", "RecordDistributionStrategy AUTO needs an ON_DEMAND stream.")
        stream.auto_distribution = strategy == "AUTO"
        return {}

    # Shards.

    def _list_shards(self, params: Params, now: float) -> Answer:
        after: str | None
        max_results = whole_number("maxResults", params.get("MaxResults", MAX_SHARDS_PER_PAGE), 1, 10_000)
        if params.get("NextToken") is not None:
            for other in ("StreamName", "StreamARN", "ExclusiveStartShardId", "StreamCreationTimestamp", "ShardFilter"):
                if params.get(other) is not None:
                    raise FakeServiceError(
                        "InvalidArgumentException", f"NextToken and {other} cannot be provided together."
                    )
            begun = ListShardsToken.decode(params["NextToken"])
            if now - begun.issued_seconds > LIST_SHARDS_TOKEN_LIFETIME_SECONDS:
                raise FakeServiceError("ExpiredNextTokenException", "NextToken has expired.")
            stream = self.stream({"StreamName": begun.stream_name}, now)
            if stream.generation != begun.generation:
                raise self._no_stream(begun.stream_name)
            after, shard_filter = begun.after_shard_id, begun.shard_filter
        else:
            stream = self.stream(params, now)
            created = params.get("StreamCreationTimestamp")
            if created is not None and int(seconds_of(created)) != int(stream.created_seconds):
                raise self._no_stream(stream.name)
            after = params.get("ExclusiveStartShardId")
            shard_filter = dict(params.get("ShardFilter") or {})
            if shard_filter.get("Timestamp") is not None:
                shard_filter["Timestamp"] = seconds_of(shard_filter["Timestamp"])
        if stream.status in ("CREATING", "DELETING"):
            raise FakeServiceError(
                "ResourceInUseException",
                f"Stream {stream.name} under account {self.account_id} is in the {stream.status} state.",
            )
        # Each page is taken from the shards of its own moment: a listing can race a reshard, as the service's does.
        shards = self._after(self._filtered(stream, shard_filter, now), after)
        # "The maximum value is 1000; a higher one is treated as 1000."
        page = shards[: min(max_results, MAX_SHARDS_PER_PAGE)]
        answer: Answer = {"Shards": [_shard_answer(shard) for shard in page]}
        if len(shards) > len(page):
            token = ListShardsToken(stream.name, stream.generation, page[-1].shard_id, shard_filter, now)
            answer["NextToken"] = token.encode()
        return answer

    def _filtered(self, stream: FakeStream, shard_filter: Mapping[str, Any], now: float) -> list[FakeShard]:
        """Return the shards that a ShardFilter asks for.

        The model says "end timestamp >= the given timestamp" of AT_TIMESTAMP too; a shard that was closed at that very
        moment is left out here, so that what AT_TIMESTAMP and AT_TRIM_HORIZON give always tiles the hash space.
        """
        shards = stream.shards(now)
        kind = shard_filter.get("Type")
        if not shard_filter or kind == "FROM_TRIM_HORIZON":
            return shards
        if kind == "AT_LATEST":
            return [shard for shard in shards if shard.is_open]
        if kind == "AFTER_SHARD_ID":
            if not shard_filter.get("ShardId"):
                raise FakeServiceError("InvalidArgumentException", "ShardId must be provided with AFTER_SHARD_ID.")
            return self._after(shards, shard_filter["ShardId"])
        at = stream.oldest_seconds(now)
        if kind in ("AT_TIMESTAMP", "FROM_TIMESTAMP"):
            if shard_filter.get("Timestamp") is None:
                raise FakeServiceError("InvalidArgumentException", f"Timestamp must be provided with {kind}.")
            if shard_filter["Timestamp"] > now:
                raise FakeServiceError("InvalidArgumentException", "Timestamp in ShardFilter cannot be in the future.")
            # "A timestamp older than TRIM_HORIZON is corrected to TRIM_HORIZON."
            at = max(at, shard_filter["Timestamp"])
        elif kind != "AT_TRIM_HORIZON":
            raise invalid("shardFilter.type", kind, "Member must satisfy enum value set")
        if kind == "FROM_TIMESTAMP":
            return [s for s in shards if s.closed_seconds is None or s.closed_seconds >= at]
        # The first shards are as old as the stream, whose creation is rounded to milliseconds, perhaps to before them.
        return [
            s
            for s in shards
            if (s.opened_seconds <= at or not s.parents) and (s.closed_seconds is None or s.closed_seconds > at)
        ]

    def _split_shard(self, params: Params, now: float) -> Answer:
        stream = self._provisioned_stream(params, now)
        shard = self.open_shard(stream, str(params.get("ShardToSplit")), now)
        at = hash_key_of("NewStartingHashKey", params.get("NewStartingHashKey"))
        whole = shard.hash_key_range
        if not whole.start + 1 < at < whole.end:
            raise FakeServiceError(
                "InvalidArgumentException",
                f"NewStartingHashKey {at} used in SplitShard() on shard {shard.shard_id} in stream {stream.name} under "
                f"account {self.account_id} is not both greater than one plus the shard's StartingHashKey "
                f"{whole.start} and less than the shard's EndingHashKey {whole.end}.",
            )
        self._begin(stream, "UPDATING", now, lambda when: stream.split(shard, at, when))
        return {}

    def _merge_shards(self, params: Params, now: float) -> Answer:
        stream = self._provisioned_stream(params, now)
        shard, adjacent = self.adjacent_shards(
            stream, str(params.get("ShardToMerge")), str(params.get("AdjacentShardToMerge")), now
        )
        self._begin(stream, "UPDATING", now, lambda when: stream.merge(shard, adjacent, when))
        return {}

    def _update_shard_count(self, params: Params, now: float) -> Answer:
        stream = self._provisioned_stream(params, now)
        target = whole_number("targetShardCount", params.get("TargetShardCount"), 1, 10_000)
        if params.get("ScalingType") != "UNIFORM_SCALING":
            raise invalid(
                "scalingType", params.get("ScalingType"), "Member must satisfy enum value set: [UNIFORM_SCALING]"
            )
        current = len(stream.open_shards)
        if target > 2 * current or 2 * target < current:
            word = "up over double" if target > current else "down below half"
            raise FakeServiceError(
                "LimitExceededException",
                f"UpdateShardCount cannot scale {word} your current open shard count. "
                f"Current open shard count: {current} Target shard count: {target}",
            )
        self._begin(stream, "UPDATING", now, lambda when: stream.scale(target, when))
        return {
            "StreamName": stream.name,
            "CurrentShardCount": current,
            "TargetShardCount": target,
            "StreamARN": stream.arn,
        }

    # Reading.

    def _get_shard_iterator(self, params: Params, now: float) -> Answer:
        stream = self.active_stream(params, now)
        shard = self.shard(stream, str(params.get("ShardId")), now)
        kind = params.get("ShardIteratorType")
        number, timestamp = params.get("StartingSequenceNumber"), params.get("Timestamp")
        needs_number = kind in ("AT_SEQUENCE_NUMBER", "AFTER_SEQUENCE_NUMBER")
        if needs_number != (number is not None) and kind in (
            "AT_SEQUENCE_NUMBER",
            "AFTER_SEQUENCE_NUMBER",
            "TRIM_HORIZON",
            "LATEST",
        ):
            raise FakeServiceError(
                "InvalidArgumentException",
                "Must either specify (1) AT_SEQUENCE_NUMBER or AFTER_SEQUENCE_NUMBER and StartingSequenceNumber or "
                "(2) TRIM_HORIZON or LATEST and no StartingSequenceNumber. Request specified "
                f"{kind} and {'no ' if number is None else 'also a '}StartingSequenceNumber.",
            )
        if kind == "TRIM_HORIZON":
            ordinal = shard.horizon(stream.oldest_seconds(now))
        elif kind == "LATEST":
            ordinal = shard.end
        elif needs_number:
            value = self._sequence_number_of(stream, shard, str(number))
            ordinal = shard.ordinal_of_sequence(value, after=kind == "AFTER_SEQUENCE_NUMBER")
        elif kind == "AT_TIMESTAMP":
            if timestamp is None:
                raise FakeServiceError(
                    "InvalidArgumentException",
                    "Must specify timestampInMillis parameter for iterator of type AT_TIMESTAMP.",
                )
            seconds = seconds_of(timestamp)
            if seconds > now:
                raise FakeServiceError(
                    "InvalidArgumentException",
                    "The timestampInMillis parameter cannot be greater than the currentTimestampInMillis. "
                    f"timestampInMillis: {round(seconds * 1000)}, currentTimestampInMillis: {round(now * 1000)}",
                )
            ordinal = shard.ordinal_of_time(seconds)
        else:
            raise invalid(
                "shardIteratorType",
                kind,
                "Member must satisfy enum value set: "
                "[AFTER_SEQUENCE_NUMBER, LATEST, AT_TIMESTAMP, AT_SEQUENCE_NUMBER, TRIM_HORIZON]",
            )
        if self.enforce_limits and not shard.may_give_iterator(now):
            raise self._rate_exceeded(stream, shard)
        self._refuse_dry_run(params)
        return {"ShardIterator": ShardIterator(stream.name, stream.generation, shard.index, ordinal, now).encode()}

    def _sequence_number_of(self, stream: FakeStream, shard: FakeShard, text: str) -> int:
        """Return the number with which an iterator of this shard can start."""
        if not SEQUENCE_NUMBER.fullmatch(text):
            raise invalid(
                "startingSequenceNumber", text, "Member must satisfy regular expression pattern: 0|([1-9]\\d{0,128})"
            )
        value = int(text)
        where = (
            f"StartingSequenceNumber {text} used in GetShardIterator on shard {shard.shard_id} in stream {stream.name} "
            f"under account {self.account_id} is invalid"
        )
        try:
            said = SequenceNumber.decode(value)
        except ValueError:
            raise FakeServiceError("InvalidArgumentException", f"{where}.") from None
        if said.shard_index != shard.index:
            raise FakeServiceError(
                "InvalidArgumentException",
                f"Invalid StartingSequenceNumber. It encodes shardId-{said.shard_index:012d}, while it was used in a "
                f"call to a shard with {shard.shard_id}",
            )
        if said.shard_created_seconds != shard.created_seconds:
            raise FakeServiceError("InvalidArgumentException", f"{where} because it did not come from this stream.")
        return value

    def _get_records(self, params: Params, now: float, plan: Plan) -> EncodedRecords:
        limit = whole_number("limit", params.get("Limit", MAX_RECORDS_PER_GET), 1, MAX_RECORDS_PER_GET)
        iterator = ShardIterator.decode(params.get("ShardIterator"))
        stream = self.active_stream({"StreamName": iterator.stream_name}, now)
        if stream.generation != iterator.generation:
            raise self._no_stream(stream.name)
        if params.get("StreamARN") not in (None, stream.arn):
            raise FakeServiceError("InvalidArgumentException", "StreamARN does not match the ShardIterator.")
        shard = self.shard(stream, f"shardId-{iterator.shard_index:012d}", now)
        if now - iterator.issued_seconds > ITERATOR_LIFETIME_SECONDS:
            raise FakeServiceError(
                "ExpiredIteratorException",
                f"Iterator expired. The iterator was created at time {_words(iterator.issued_seconds)} while right now "
                f"it is {_words(now)} which is further in the future than the tolerated delay of 300000 milliseconds.",
            )
        if self.enforce_limits and not shard.may_read(now):
            raise self._rate_exceeded(stream, shard)
        self._refuse_dry_run(params)
        # An iterator on data that is gone goes on, silently, with the oldest record that is left.
        ordinal = max(iterator.ordinal, shard.horizon(stream.oldest_seconds(now)))
        pieces = shard.read(ordinal, limit) if ordinal < shard.end else []
        if pieces and plan.twisted("no records"):
            pieces = []
        ordinal += len(pieces)
        at_tip = ordinal >= shard.end
        # How long ago the oldest record arrived that this iterator has not given yet. Rounded up: a reader that takes
        # the server's time minus this is then never ahead of that record.
        behind = 0 if at_tip else max(1, math.ceil(round((now - shard.arrival_of(ordinal)) * 1000, 3)))
        if at_tip and (lag := plan.twisted("lag")):
            behind = lag.millis_behind_latest
        rest: Answer = {"MillisBehindLatest": behind}
        if self.enforce_limits:
            shard.was_read(shard.size_of(ordinal - len(pieces), ordinal))
        if at_tip and not shard.is_open:
            if not plan.twisted("no children"):
                rest["ChildShards"] = [
                    {
                        "ShardId": child.shard_id,
                        "ParentShards": list(child.parents),
                        "HashKeyRange": _range_answer(child),
                    }
                    for child in shard.children
                ]
        else:
            rest["NextShardIterator"] = ShardIterator(
                stream.name, stream.generation, shard.index, ordinal, now
            ).encode()
        return EncodedRecords(pieces, rest)

    # Writing.

    def _put_record(self, params: Params, now: float) -> Answer:
        stream = self.active_stream(params, now)
        entry = self.check_entry(stream, params, 0)
        ordering = params.get("SequenceNumberForOrdering")
        if ordering is not None and not SEQUENCE_NUMBER.fullmatch(str(ordering)):
            raise FakeServiceError("InvalidArgumentException", f"ExclusiveMinimumSequenceNumber {ordering} is invalid.")
        self._refuse_dry_run(params)
        shard = self.route(stream, entry.hash_key)
        if self.enforce_limits and not shard.may_write(now, entry.size_bytes):
            raise self._rate_exceeded(stream, shard)
        return {
            "ShardId": shard.shard_id,
            "SequenceNumber": shard.append(now, entry.data, entry.partition_key, entry.size_bytes),
        }

    def _put_records(self, params: Params, now: float, plan: Plan) -> Answer:
        stream = self.active_stream(params, now)
        records: Sequence[Params] | None = params.get("Records")
        if not records:
            raise invalid("records", records, "Member must have length greater than or equal to 1")
        if len(records) > MAX_RECORDS_PER_PUT:
            raise invalid(
                "records",
                f"{len(records)} records",
                f"Member must have length less than or equal to {MAX_RECORDS_PER_PUT}",
            )
        # Every entry is checked before the first is written: one bad entry fails the whole request.
        entries = [self.check_entry(stream, record, number) for number, record in enumerate(records, 1)]
        if sum(entry.size_bytes for entry in entries) > MAX_BYTES_PER_PUT:
            raise FakeServiceError("InvalidArgumentException", "Records size exceeds 10 MB limit")
        self._refuse_dry_run(params)
        failed = 0
        outcomes: list[Answer] = []
        for index, entry in enumerate(entries):
            shard = self.route(stream, entry.hash_key)
            refusal = plan.refusal(index, records[index]) if plan.entries else None
            if refusal is None and self.enforce_limits and not shard.may_write(now, entry.size_bytes):
                error = self._rate_exceeded(stream, shard)
                refusal = (error.code, error.message)
            if refusal is not None:
                failed += 1
                outcomes.append({"ErrorCode": refusal[0], "ErrorMessage": refusal[1]})
                continue
            outcomes.append(
                {
                    "SequenceNumber": shard.append(now, entry.data, entry.partition_key, entry.size_bytes),
                    "ShardId": shard.shard_id,
                }
            )
        return {"FailedRecordCount": failed, "Records": outcomes}

    @staticmethod
    def check_entry(stream: FakeStream, entry: Params, number: int) -> CheckedEntry:
        return check_entry(entry, number, auto_distribution=stream.auto_distribution, max_bytes=stream.max_record_bytes)

    def route(self, stream: FakeStream, hash_key: int | None) -> FakeShard:
        return stream.any_open(self._rng) if hash_key is None else stream.route(hash_key)

    # Looking things up.

    def new_stream(
        self, name: str, now: float, *, on_demand: bool, auto_distribution: bool, max_record_bytes: int
    ) -> FakeStream:
        if name in self._streams:
            raise ValueError(f"stream {name!r} exists")
        self._generation += 1
        stream = FakeStream(
            name=name,
            arn=f"arn:aws:kinesis:{self.region}:{self.account_id}:stream/{name}",
            generation=self._generation,
            created_seconds=round(now, 3),
            # Sequence numbers of a deleted stream of this name must not fit the new one.
            sequence_epoch_seconds=max(int(now), self._sequence_epochs.get(name, 0)),
            retention_hours=self.retention_hours,
            on_demand=on_demand,
            auto_distribution=auto_distribution,
            max_record_bytes=max_record_bytes,
        )
        self._streams[name] = stream
        return stream

    def _remove(self, stream: FakeStream) -> None:
        self._sequence_epochs[stream.name] = stream.last_created_seconds + 1
        del self._streams[stream.name]

    def _begin(self, stream: FakeStream, status: str, now: float, apply: Callable[[float], object]) -> None:
        stream.status = status
        stream.transition = Transition(now + self.transition_seconds, apply)
        self._settle(stream.name, now)

    def _settle(self, name: str, now: float) -> None:
        """Finish what has become due of a stream's transition, as of the moment it was due."""
        stream = self._streams.get(name)
        if stream is None or stream.transition is None or now < stream.transition.due_seconds:
            return
        transition, stream.transition = stream.transition, None
        stream.status = "ACTIVE"
        transition.apply(transition.due_seconds)

    def stream(self, params: Params, now: float) -> FakeStream:
        name, arn = params.get("StreamName"), params.get("StreamARN")
        if arn is not None:
            prefix = f"arn:aws:kinesis:{self.region}:{self.account_id}:stream/"
            if not arn.startswith(prefix):
                raise FakeServiceError("ResourceNotFoundException", f"Stream {arn} not found.")
            if name is not None and name != arn[len(prefix) :]:
                raise FakeServiceError("InvalidArgumentException", "StreamARN and StreamName name different streams.")
            name = arn[len(prefix) :]
        if name is None:
            raise FakeServiceError("InvalidArgumentException", "Either StreamARN or StreamName must be provided.")
        self._settle(name, now)
        stream = self._streams.get(name)
        if stream is None:
            raise self._no_stream(name)
        return stream

    def active_stream(self, params: Params, now: float) -> FakeStream:
        """Return a stream that can be read and written."""
        stream = self.stream(params, now)
        if stream.status not in ("ACTIVE", "UPDATING"):
            raise self._no_stream(stream.name)
        return stream

    def _provisioned_stream(self, params: Params, now: float) -> FakeStream:
        """Return a stream that can be resharded."""
        stream = self.stream(params, now)
        if stream.status != "ACTIVE":
            raise FakeServiceError(
                "ResourceInUseException",
                f"Stream {stream.name} under account {self.account_id} not ACTIVE, instead in state {stream.status}",
            )
        if stream.on_demand:
            raise FakeServiceError("ValidationException", f"Stream {stream.name} is an ON_DEMAND stream.")
        return stream

    def shard(self, stream: FakeStream, shard_id: str, now: float) -> FakeShard:
        shard = stream.find(shard_id, now)
        if shard is None:
            raise FakeServiceError(
                "ResourceNotFoundException",
                f"Shard {shard_id} in stream {stream.name} under account {self.account_id} does not exist",
            )
        return shard

    def open_shard(self, stream: FakeStream, shard_id: str, now: float) -> FakeShard:
        shard = self.shard(stream, shard_id, now)
        if not shard.is_open:
            raise FakeServiceError(
                "ResourceInUseException",
                f"Shard {shard_id} in stream {stream.name} under account {self.account_id} has already been merged or "
                "split, and thus is not eligible for merging or splitting.",
            )
        return shard

    def adjacent_shards(
        self, stream: FakeStream, shard_id: str, other_id: str, now: float
    ) -> tuple[FakeShard, FakeShard]:
        shard, other = self.open_shard(stream, shard_id, now), self.open_shard(stream, other_id, now)
        a, b = shard.hash_key_range, other.hash_key_range
        if a.end + 1 != b.start and b.end + 1 != a.start:
            raise FakeServiceError(
                "InvalidArgumentException",
                f"Shards {shard_id} and {other_id} in stream {stream.name} under account {self.account_id} are not an "
                "adjacent pair of shards eligible for merging",
            )
        return shard, other

    @staticmethod
    def _after(shards: list[FakeShard], shard_id: str | None) -> list[FakeShard]:
        return shards if shard_id is None else [shard for shard in shards if shard.shard_id > shard_id]

    def _no_stream(self, name: str) -> FakeServiceError:
        return FakeServiceError(
            "ResourceNotFoundException", f"Stream {name} under account {self.account_id} not found."
        )

    def _rate_exceeded(self, stream: FakeStream, shard: FakeShard) -> FakeServiceError:
        return FakeServiceError(
            "ProvisionedThroughputExceededException",
            f"Rate exceeded for shard {shard.shard_id} in stream {stream.name} under account {self.account_id}.",
        )

    @staticmethod
    def _refuse_dry_run(params: Params) -> None:
        if params.get("DryRun"):
            raise FakeServiceError(
                "DryRunOperationException", "Request would have succeeded, but the DryRun flag is set."
            )


def _max_record_bytes(kib: object) -> int:
    return KIB * whole_number("maxRecordSizeInKiB", kib, DEFAULT_MAX_RECORD_BYTES // KIB, MAX_RECORD_BYTES // KIB)


def _mode(stream: FakeStream) -> str:
    return "ON_DEMAND" if stream.on_demand else "PROVISIONED"


def _range_answer(shard: FakeShard) -> Answer:
    return {"StartingHashKey": str(shard.hash_key_range.start), "EndingHashKey": str(shard.hash_key_range.end)}


def _shard_answer(shard: FakeShard) -> Answer:
    answer: Answer = {
        "ShardId": shard.shard_id,
        "HashKeyRange": _range_answer(shard),
        "SequenceNumberRange": {"StartingSequenceNumber": str(shard.starting_sequence_number)},
    }
    if shard.parents:
        answer["ParentShardId"] = shard.parents[0]
    if len(shard.parents) > 1:
        answer["AdjacentParentShardId"] = shard.parents[1]
    if shard.ending_sequence_number is not None:
        answer["SequenceNumberRange"]["EndingSequenceNumber"] = str(shard.ending_sequence_number)
    return answer


def _words(seconds: float) -> str:
    return email.utils.formatdate(seconds)
