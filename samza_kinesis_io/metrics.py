"""Names of the Beam metrics, all in one place, and the plain counters that background threads fill.

Beam counts per thread and per bundle, so what a background thread sees is gathered here and reported by the
bundle's own thread.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

NAMESPACE: Final = "samza_kinesis_io"

# Source

#: Counter: records emitted (user records, where aggregates are taken apart).
RECORDS_READ: Final = "records_read"
#: Counter: bytes of their data.
BYTES_READ: Final = "bytes_read"
#: Counter: aggregates taken apart.
AGGREGATED_RECORDS: Final = "aggregated_records"
#: Counter: user records whose hash key is not their shard's.
OUTSIDE_HASH_RANGE: Final = "outside_hash_range"
#: Counter: aggregates dropped whole by `HashFilter.KCL`.
FILTERED_AGGREGATES: Final = "filtered_aggregates"
#: Counter: GetRecords calls, and those that brought nothing.
GET_RECORDS_CALLS: Final = "get_records_calls"
EMPTY_POLLS: Final = "empty_polls"
#: Counter: calls the service refused because of a limit.
READ_THROTTLES: Final = "read_throttles"
#: Counter prefix: calls made again, by error code: "read_retries.InternalFailure".
READ_RETRIES: Final = "read_retries"
#: Counter: iterators that expired and were replaced.
EXPIRED_ITERATORS: Final = "expired_iterators"
#: Counter: answers whose lag did not fall on an idle shard and was taken for none.
STUCK_LAGS: Final = "stuck_lags"
#: Counter: shard ends that were not believed and asked for again.
SHARD_END_RETRIES: Final = "shard_end_retries"
#: Counter: lists of shards that contradicted the answers.
CONTRADICTIONS: Final = "shard_list_contradictions"
#: Counter: shards with which reading began; shards read to their end; shards that took the place of one that ended.
SHARDS_PLANNED: Final = "shards_planned"
SHARDS_FINISHED: Final = "shards_finished"
SHARDS_ADOPTED: Final = "shards_adopted"
#: Counter: shards that ended with children.
RESHARDINGS: Final = "reshardings"
#: Counter: children of a merge whose other parent this restriction did not read, so that order is not known there.
PARENTS_READ_ELSEWHERE: Final = "parents_read_elsewhere"
#: Counter: losses that `DataLossPolicy.CONTINUE` passed over.
SKIPPED_RANGES: Final = "skipped_ranges"
#: Distribution: milliseconds of arrival time in such a range, where known.
SKIPPED_MILLIS: Final = "skipped_millis"
#: Counter: start timestamps older than the retention, so that reading began at the horizon.
STARTS_BEFORE_HORIZON: Final = "starts_before_horizon"
#: Distribution and gauge: the service's MillisBehindLatest; the gauge is the source's largest.
MILLIS_BEHIND_LATEST: Final = "millis_behind_latest"
MAX_MILLIS_BEHIND_LATEST: Final = "max_millis_behind_latest"
#: Gauge: bytes prefetched for a restriction and not emitted.
PREFETCHED_BYTES: Final = "prefetched_bytes"
#: Gauge: shards of a restriction that are being read.
SHARDS_OPEN: Final = "shards_open"

# Sink

#: Counter: elements that Kinesis acknowledged; of an aggregate, each user record.
RECORDS_WRITTEN: Final = "records_written"
#: Counter: bytes acknowledged, partition keys included.
BYTES_WRITTEN: Final = "bytes_written"
#: Counter: PutRecords requests, tries again included.
PUT_REQUESTS: Final = "put_requests"
#: Distribution: records in a PutRecords request, of at most 500.
PUT_BATCH_RECORDS: Final = "put_batch_records"
#: Distribution: bytes in a PutRecords request.
PUT_BATCH_BYTES: Final = "put_batch_bytes"
#: Counter prefix: failures of an entry or of its whole request, by code: "put_failures.InternalFailure".
PUT_FAILURES: Final = "put_failures"
#: Counter prefix: throttled entries by stream: "put_throttles.flights".
PUT_THROTTLES: Final = "put_throttles"
#: Distribution: milliseconds from a record's first request to its acknowledgement, per request.
ACKNOWLEDGE_MILLIS: Final = "put_acknowledge_millis"
#: Counter: records that went to `result.failed`.
RECORDS_FAILED: Final = "records_failed"
#: Distribution: user records in an aggregate.
AGGREGATE_RECORDS: Final = "aggregate_records"
#: Gauge: bytes accepted by this process's producer and not acknowledged yet.
IN_FLIGHT_BYTES: Final = "put_in_flight_bytes"


class SinkTally:
    """What happened to one source's records since the last time it was asked. Not locked; its owner is."""

    __slots__ = ("acknowledge_seconds", "bytes_written", "failures", "records_written", "requests", "throttles")

    def __init__(self) -> None:
        self.records_written = 0
        self.bytes_written = 0
        self.requests: list[tuple[int, int]] = []
        self.failures: Counter[str] = Counter()
        self.throttles: Counter[str] = Counter()
        self.acknowledge_seconds: list[float] = []

    def requested(self, records: int, size_bytes: int) -> None:
        """Count a request; it is counted for the source of its first record alone, so that the sum is right."""
        self.requests.append((records, size_bytes))

    def acknowledged(self, size_bytes: int, records: int = 1) -> None:
        self.records_written += records
        self.bytes_written += size_bytes

    def waited(self, seconds: float) -> None:
        self.acknowledge_seconds.append(seconds)

    def failed(self, code: str) -> None:
        self.failures[code] += 1

    def throttled(self, stream: str) -> None:
        self.throttles[stream] += 1
