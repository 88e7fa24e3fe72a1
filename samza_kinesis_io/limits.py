"""The service's limits, each beside the sentence that sets it.

Source, where nothing else is named: the Kinesis Data Streams API reference,
https://docs.aws.amazon.com/kinesis/latest/APIReference/ and
https://docs.aws.amazon.com/streams/latest/dev/service-sizes-and-limits.html
"""

from __future__ import annotations

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * 1024

#: The hash space: "Partition keys are mapped to 128-bit integer values".
MAX_HASH_KEY: Final = (1 << 128) - 1

#: GetRecords: "Each shard can support up to five read transactions per second".
MAX_GET_RECORDS_PER_SECOND_PER_SHARD: Final = 5
#: GetRecords: "up to a maximum total data read rate of 2 MiB per second via GetRecords".
MAX_READ_BYTES_PER_SECOND_PER_SHARD: Final = 2 * MIB
#: GetRecords: "The maximum number of records to return. Specify a value of up to 10,000."
MAX_RECORDS_PER_GET: Final = 10_000
#: GetRecords: "The maximum size of data that GetRecords can return is 10 MiB."
MAX_BYTES_PER_GET: Final = 10 * MIB
#: GetShardIterator: "A shard iterator expires 5 minutes after it is returned to the requester."
ITERATOR_LIFETIME_SECONDS: Final = 300.0
#: ListShards: "Tokens expire after 300 seconds."
LIST_SHARDS_TOKEN_LIFETIME_SECONDS: Final = 300.0
#: ListShards: "The maximum number of shards to return ... The default is 1000."
MAX_SHARDS_PER_PAGE: Final = 1000

#: PutRecords: "Each PutRecords request can support up to 500 records."
MAX_RECORDS_PER_PUT: Final = 500
#: PutRecords: "up to a limit of 10 MiB for the entire request, including partition keys".
MAX_BYTES_PER_PUT: Final = 10 * MIB
#: A stream's MaxRecordSizeInKiB when nobody raised it (data and partition key together).
DEFAULT_MAX_RECORD_BYTES: Final = 1 * MIB
#: The highest MaxRecordSizeInKiB a stream can have.
MAX_RECORD_BYTES: Final = 10 * MIB
#: "Unicode strings, with a maximum length limit of 256 characters for each key."
MAX_PARTITION_KEY_CHARACTERS: Final = 256
#: "Each shard can support writes up to 1,000 records per second, up to a maximum data write total of 1 MiB per second."
MAX_WRITE_RECORDS_PER_SECOND_PER_SHARD: Final = 1000
MAX_WRITE_BYTES_PER_SECOND_PER_SHARD: Final = 1 * MIB

#: A stream's retention when nobody raised it.
DEFAULT_RETENTION_HOURS: Final = 24

#: How far the arrival times of one shard's records may be out of order. The service promises nothing
#: ("approximate", "accurate to milliseconds ... not guaranteed"); we allow a second.
ARRIVAL_SLACK_SECONDS: Final = 1.0
