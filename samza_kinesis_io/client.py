"""The way to Kinesis: the `KinesisClient` protocol and its implementation on boto3.

The only file of the package that knows boto3. Signing, credentials, endpoint rules and connections stay boto3's;
requests and answers are encoded and decoded here, because botocore's own walk over a full GetRecords answer costs
25 times as much as msgspec's.
"""

from __future__ import annotations

import email.utils
import enum
import os
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

import boto3
import botocore.config
import botocore.credentials
import botocore.exceptions
import botocore.parsers
import botocore.session
import botocore.utils
import msgspec

from samza_kinesis_io.clock import Clock, SystemClock
from samza_kinesis_io.errors import (
    AccessRefused,
    ConfigurationError,
    EndpointUnreachable,
    KinesisIOError,
    ServiceError,
    StreamNotFound,
    TransientServiceError,
    classify,
)
from samza_kinesis_io.limits import DEFAULT_MAX_RECORD_BYTES, KIB
from samza_kinesis_io.positions import WHOLE_RECORD, Position, PositionKind
from samza_kinesis_io.records import KinesisRecord
from samza_kinesis_io.shards import ChildShard, HashKeyRange, Shard

_STREAM_NAME: Final = re.compile(r"[a-zA-Z0-9_.-]{1,128}")
_STREAM_ARN: Final = re.compile(
    r"arn:aws(?:-cn|-us-gov)?:kinesis:[a-z0-9-]+:[0-9]{12}:stream/(?P<name>[a-zA-Z0-9_.-]{1,128})"
)
_ROLE_ARN: Final = re.compile(r"arn:aws(?:-cn|-us-gov)?:iam::[0-9]{12}:role/[\w+=,.@/-]{1,576}")
_ROLE_SESSION_NAME: Final = re.compile(r"[\w+=,.@-]{2,64}")
_EXTERNAL_ID: Final = re.compile(r"[\w+=,.@:/-]{2,1224}")
_REGION: Final = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")

#: How often a listing whose token expired is begun again before its error is the caller's.
_MAX_LISTINGS: Final = 3


@dataclass(frozen=True, slots=True)
class StreamId:
    """A stream by name or by ARN. With an ARN its account and region are part of the identity."""

    name: str
    arn: str | None = None

    @classmethod
    def parse(cls, value: str, option: str = "stream") -> StreamId:
        """Return the stream that a user's string names.

        Raises:
            ConfigurationError: empty, or neither a stream name (1-128 of a-z A-Z 0-9 _ . -) nor a stream ARN.
        """
        if isinstance(value, str):
            value = str(value)  # of a subclass, as NumPy's, the encoder of requests knows nothing
            if _STREAM_NAME.fullmatch(value):
                return cls(value)
            if arn := _STREAM_ARN.fullmatch(value):
                return cls(arn["name"], value)
        raise ConfigurationError(
            f"{option} must be a stream name (1-128 of a-z A-Z 0-9 _ . -) or a stream ARN "
            f"(arn:aws:kinesis:REGION:ACCOUNT:stream/NAME), got {value!r}"
        )

    @property
    def region(self) -> str | None:
        """The ARN's region; None for a name."""
        return self.arn.split(":")[3] if self.arn else None

    def __str__(self) -> str:
        return self.arn or self.name


class StreamStatus(enum.Enum):
    CREATING = "CREATING"
    DELETING = "DELETING"
    ACTIVE = "ACTIVE"
    UPDATING = "UPDATING"


@dataclass(frozen=True, slots=True)
class StreamDescription:
    """What DescribeStreamSummary says."""

    name: str
    arn: str
    status: StreamStatus
    retention_hours: int
    creation_seconds: float
    open_shard_count: int
    max_record_bytes: int
    key_based_distribution: bool = True
    """False on streams with automatic distribution (RecordDistributionStrategy AUTO)."""


class ShardFilterKind(enum.Enum):
    AT_LATEST = "AT_LATEST"
    AT_TRIM_HORIZON = "AT_TRIM_HORIZON"
    FROM_TRIM_HORIZON = "FROM_TRIM_HORIZON"
    AT_TIMESTAMP = "AT_TIMESTAMP"
    FROM_TIMESTAMP = "FROM_TIMESTAMP"


@dataclass(frozen=True, slots=True)
class ShardFilter:
    kind: ShardFilterKind
    timestamp_micros: int | None = None


class RecordsAnswer:
    """The answer to one GetRecords.

    Attributes:
        records: As decoded; sub_sequence_number, explicit_hash_key, shard_id and stream are not filled in yet.
        next_shard_iterator: None: the shard is closed and this was its last answer (if the children say so too).
        millis_behind_latest: None where the service did not say.
        child_shards: Announced with a shard's last answer; else empty.
        server_time_seconds: The service's own time of the answer, in seconds since the epoch, whole seconds
            rounded *down* as the Date header gives them; the local clock where there is no such header.
        size_bytes: Sum of the records' data.
    """

    __slots__ = (
        "child_shards",
        "millis_behind_latest",
        "next_shard_iterator",
        "records",
        "server_time_seconds",
        "size_bytes",
    )

    def __init__(
        self,
        *,
        records: list[KinesisRecord],
        next_shard_iterator: str | None,
        millis_behind_latest: int | None,
        child_shards: tuple[ChildShard, ...],
        server_time_seconds: float,
        size_bytes: int,
    ) -> None:
        self.records = records
        self.next_shard_iterator = next_shard_iterator
        self.millis_behind_latest = millis_behind_latest
        self.child_shards = child_shards
        self.server_time_seconds = server_time_seconds
        self.size_bytes = size_bytes


class PutEntry(
    msgspec.Struct,
    frozen=True,
    gc=False,
    omit_defaults=True,
    rename={"data": "Data", "partition_key": "PartitionKey", "explicit_hash_key": "ExplicitHashKey"},
):
    """One record of a PutRecords request, checked already. `partition_key` is None on AUTO streams only.

    Encoded straight into the request, hence a Struct.
    """

    data: bytes
    partition_key: str | None = None
    explicit_hash_key: str | None = None

    @property
    def size_bytes(self) -> int:
        """What counts against the limits of a record and a request: the data and the partition key in UTF-8."""
        key = self.partition_key
        if key is None:
            return len(self.data)
        return len(self.data) + (len(key) if key.isascii() else len(key.encode()))


class PutOutcome(
    msgspec.Struct,
    frozen=True,
    gc=False,
    rename={
        "shard_id": "ShardId",
        "sequence_number": "SequenceNumber",
        "error_code": "ErrorCode",
        "error_message": "ErrorMessage",
    },
):
    """What became of one entry: either shard and sequence number, or an error code and message."""

    shard_id: str | None = None
    sequence_number: str | None = None
    error_code: str | None = None
    error_message: str | None = None


class KinesisClient(Protocol):
    """The calls the package makes; each is one request (ListShards: as many as there are pages).

    Nothing is retried here and nothing is paced; every failure is raised as one of `samza_kinesis_io.errors`.
    Safe to call from many threads.
    """

    def describe_stream(self, stream: StreamId) -> StreamDescription: ...

    def list_shards(self, stream: StreamId, shard_filter: ShardFilter | None = None) -> list[Shard]:
        """Return every page. A page's token that expired starts the listing again."""
        ...

    def get_shard_iterator(self, stream: StreamId, shard_id: str, position: Position) -> str:
        """Return an iterator at `position`.

        AFTER_SEQUENCE_NUMBER with a sub-sequence number short of `WHOLE_RECORD` becomes an iterator AT the
        record; the caller skips what `position.excludes`.
        """
        ...

    def get_records(self, stream: StreamId, shard_iterator: str, limit: int) -> RecordsAnswer: ...

    def put_records(self, stream: StreamId, entries: Sequence[PutEntry]) -> list[PutOutcome]:
        """Return one outcome per entry, in order."""
        ...

    def close(self) -> None:
        """Close the connections. Idempotent; later calls fail."""
        ...


class ClientFactory(Protocol):
    """What `client=` takes: something picklable and hashable that opens a client on the worker.

    Equal factories share one client in a process, so equality must mean "the same account and endpoint".
    """

    def connect(self, stream: StreamId | None = None) -> KinesisClient:
        """Open a client for `stream` (its ARN's region is used), or for the configured region."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """How workers reach Kinesis. Holds no secret: credentials come from AWS's usual chain, on the worker.

    What is None is resolved on the worker too: environment (AWS_REGION, AWS_ENDPOINT_URL_KINESIS, AWS_PROFILE, ...),
    profile, container or instance role.

    Attributes:
        region: None: the stream ARN's region, else AWS_REGION, AWS_DEFAULT_REGION or the profile's.
        endpoint_url: Where to send requests, "http://localhost:4567" for an emulator; the region still signs them.
        profile: A profile of the worker's own AWS configuration files.
        role_arn: A role to assume with the credentials of the chain. Its credentials are renewed before they expire.
        external_id: What the role's trust policy asks for.
        role_session_name: Under which name the role's use appears in CloudTrail.
        connect_timeout_seconds: How long to wait for a connection.
        read_timeout_seconds: How long to wait for bytes of an answer.
        max_connections: How many connections are kept open. More threads than that are served, at the price of a
            new TLS handshake for each surplus call.

    Raises:
        ConfigurationError: an option has an impossible value, or one that only makes sense with another.
    """

    region: str | None = None
    endpoint_url: str | None = None
    profile: str | None = None
    role_arn: str | None = None
    external_id: str | None = None
    role_session_name: str = "samza-kinesis-io"
    connect_timeout_seconds: float = 10.0
    read_timeout_seconds: float = 30.0
    max_connections: int = 64

    def __post_init__(self) -> None:
        if self.region is not None:
            _check_text("region", self.region, _REGION, "an AWS region such as eu-west-1")
        if self.endpoint_url is not None:
            _check_endpoint(self.endpoint_url)
        if self.profile is not None and (not isinstance(self.profile, str) or not self.profile):
            raise ConfigurationError(f"profile must be a profile's name, got {self.profile!r}")
        if self.role_arn is not None:
            _check_text("role_arn", self.role_arn, _ROLE_ARN, "arn:aws:iam::ACCOUNT:role/NAME")
        if self.external_id is not None:
            _check_text("external_id", self.external_id, _EXTERNAL_ID, "2-1224 letters, digits or + = , . @ : / -")
            if self.role_arn is None:
                raise ConfigurationError("external_id needs role_arn, the role whose trust policy asks for it")
        _check_text(
            "role_session_name", self.role_session_name, _ROLE_SESSION_NAME, "2-64 letters, digits or + = , . @ -"
        )
        for option in ("connect_timeout_seconds", "read_timeout_seconds"):
            seconds = getattr(self, option)
            if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < float("inf"):
                raise ConfigurationError(f"{option} must be a number > 0, got {seconds!r}")
        connections = self.max_connections
        if isinstance(connections, bool) or not isinstance(connections, int) or connections < 1:
            raise ConfigurationError(f"max_connections must be a whole number >= 1, got {connections!r}")

    def connect(self, stream: StreamId | None = None) -> Boto3KinesisClient:
        """Open a client for `stream` (its ARN's region is used), or for the configured region. Asks Kinesis nothing.

        Raises:
            ConfigurationError: no region is known, or `region` and the stream's ARN contradict each other.
            AccessRefused: the profile or its credentials cannot be loaded.
        """
        try:
            # One at a time: botocore loads its models and asks the credential sources here, and twenty threads
            # that start together would do both twenty times at once.
            with _creation:
                session = _session(self.profile)
                region = self._region(stream, session)
                if self.role_arn is not None:
                    self._assume_role(session, self.role_arn, region)
                return Boto3KinesisClient(self._boto_client(session, region), region)
        except botocore.exceptions.BotoCoreError as exc:
            raise _client_side_error(exc, "connect", f"region {self.region}", answered=False) from exc

    def _region(self, stream: StreamId | None, session: Any) -> str:
        own = stream.region if stream is not None else None
        if own is not None and self.region is not None and own != self.region:
            raise ConfigurationError(
                f"region is {self.region}, but the stream's ARN {stream} is in {own}; drop region= or correct either"
            )
        # botocore reads AWS_DEFAULT_REGION only; containers on ECS and EKS set AWS_REGION.
        region = own or self.region or os.environ.get("AWS_REGION") or session.get_config_variable("region")
        if not region:
            raise ConfigurationError(
                "no AWS region is known: give ClientConfig(region=...), set AWS_REGION on the worker, "
                "or name the stream by its ARN"
            )
        return str(region)

    def _assume_role(self, session: Any, role_arn: str, region: str) -> None:
        source = _session(self.profile)
        credentials = source.get_credentials()
        if credentials is None:
            raise AccessRefused(
                f"no AWS credentials to assume {role_arn} with (AWS's usual chain: environment, profile, role)",
                operation="AssumeRole",
                code="NoCredentialsError",
            )

        def sts(service: str, **kwargs: Any) -> Any:
            return source.create_client(service, region_name=region, **kwargs)

        extra = {"RoleSessionName": self.role_session_name}
        if self.external_id is not None:
            extra["ExternalId"] = self.external_id
        fetcher = botocore.credentials.AssumeRoleCredentialFetcher(
            client_creator=sts, source_credentials=credentials, role_arn=role_arn, extra_args=extra
        )
        session.register_component("credential_provider", _OneProvider(fetcher.fetch_credentials))

    def _boto_client(self, session: Any, region: str) -> Any:
        config = botocore.config.Config(
            connect_timeout=self.connect_timeout_seconds,
            read_timeout=self.read_timeout_seconds,
            max_pool_connections=self.max_connections,
            # The callers pace and retry: botocore's retries would block a shard's thread, burn its five reads a
            # second, and share one quota between all shards.
            retries={"total_max_attempts": 1},
            parameter_validation=False,
            tcp_keepalive=True,
            user_agent_extra="samza-kinesis-io",
        )
        try:
            return boto3.Session(botocore_session=session).client(
                "kinesis", region_name=region, endpoint_url=self.endpoint_url, config=config
            )
        except ValueError as exc:
            raise ConfigurationError(
                f"no client for region {region}: {exc}; check region, endpoint_url and AWS_ENDPOINT_URL_KINESIS"
            ) from exc


_creation = threading.Lock()


def _renew_creation_lock() -> None:
    """A fork while another thread creates a client would leave the child's copy of the lock taken for ever."""
    global _creation
    _creation = threading.Lock()


os.register_at_fork(after_in_child=_renew_creation_lock)


class _OneProvider:
    """A botocore credential resolver that knows one source: an assumed role, asked at the first request."""

    def __init__(self, fetch: Any) -> None:
        self._fetch = fetch

    def load_credentials(self) -> Any:
        return botocore.credentials.DeferredRefreshableCredentials(refresh_using=self._fetch, method="assume-role")


def _check_text(option: str, value: object, pattern: re.Pattern[str], form: str) -> None:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ConfigurationError(f"{option} must be {form}, got {value!r}")


def _check_endpoint(value: object) -> None:
    try:
        url = urlsplit(value) if isinstance(value, str) else None
        good = url is not None and url.scheme in ("http", "https") and bool(url.hostname) and (url.port or 1) > 0
    except ValueError:
        url, good = None, False
    if url is not None and url.username is not None:
        # Not repeated in the message: it would carry the password into logs.
        raise ConfigurationError("endpoint_url must not carry a user or password; credentials come from AWS's chain")
    if not good:
        raise ConfigurationError(f"endpoint_url must be http(s)://HOST[:PORT], got {value!r}")


def _session(profile: str | None) -> Any:
    """Return a session of our own: what is set on it reaches nobody else's clients in this process."""
    session: Any = botocore.session.Session(profile=profile)
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_parse_timestamp)
    return session


def _parse_timestamp(value: Any) -> Any:
    """Leave the numbers of Kinesis as they are: botocore makes local-time datetimes of them at 60 % of its whole cost.

    Texts stay datetimes, since STS's expiry times come this way too.
    """
    return value if isinstance(value, (int, float)) else botocore.utils.parse_timestamp(value)


class _HashKeyRange(msgspec.Struct, gc=False):
    StartingHashKey: str
    EndingHashKey: str


class _ChildShard(msgspec.Struct):
    ShardId: str
    ParentShards: list[str]
    HashKeyRange: _HashKeyRange


class _RecordsWire(msgspec.Struct):
    Records: list[KinesisRecord]
    NextShardIterator: str | None = None
    MillisBehindLatest: int | None = None
    ChildShards: list[_ChildShard] | None = None


class _PutWire(msgspec.Struct):
    Records: list[PutOutcome]


class _Summary(msgspec.Struct):
    StreamName: str
    StreamARN: str
    StreamStatus: str
    RetentionPeriodHours: int
    StreamCreationTimestamp: float
    OpenShardCount: int
    # Older botocores do not know these two and would drop them: another reason to decode by ourselves.
    MaxRecordSizeInKiB: int | None = None
    RecordDistributionStrategy: str | None = None


class _SummaryWire(msgspec.Struct):
    StreamDescriptionSummary: _Summary


_BODY: Final = "samza_kinesis_io.body"
_DECODED: Final = "samza_kinesis_io.decoded"
_encode: Final = msgspec.json.Encoder().encode
_FAST_DECODERS: Final[Mapping[str, msgspec.json.Decoder[Any]]] = {
    "GetRecords": msgspec.json.Decoder(_RecordsWire),
    "PutRecords": msgspec.json.Decoder(_PutWire),
    "DescribeStreamSummary": msgspec.json.Decoder(_SummaryWire),
}


def _take_body(params: dict[str, Any], context: dict[str, Any], **_: Any) -> None:
    context[_BODY] = params.pop(_BODY)


def _put_body(params: dict[str, Any], context: dict[str, Any], **_: Any) -> None:
    params["body"] = context.pop(_BODY)


def _decode_answer(
    operation_model: Any, response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any
) -> None:
    """Decode a good answer before botocore does; one that does not fit (nulls, texts for numbers) is left to botocore.

    botocore calls this from 1.35.99 on; older ones always take the slow way, with equal results.
    """
    if response_dict["status_code"] != 200:
        return
    try:
        customized_response_dict[_DECODED] = _FAST_DECODERS[operation_model.name].decode(response_dict["body"])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return
    response_dict["body"] = b"{}"


class Boto3KinesisClient:
    """`KinesisClient` on a boto3 client. Made by `ClientConfig.connect`.

    Requests are encoded here and handed to botocore as bytes; it adds endpoint, headers and signature.
    """

    def __init__(self, boto_client: Any, region: str, *, clock: Clock | None = None) -> None:
        # Any: boto3's stubs are no run-time dependency, and they know neither `_BODY` nor `_DECODED`.
        self._boto = boto_client
        self._clock = clock or SystemClock()
        self._answered = False
        self._closed = False
        self.region = region
        """Where its requests go."""
        hooks: dict[str, Any] = {"before-parameter-build.kinesis": _take_body, "before-call.kinesis": _put_body}
        hooks |= {f"before-parse.kinesis.{operation}": _decode_answer for operation in _FAST_DECODERS}
        for event, hook in hooks.items():
            # By a unique id a client that is wrapped twice still has each hook once.
            boto_client.meta.events.register(event, hook, unique_id=f"{__name__}.{event}")

    @property
    def endpoint_url(self) -> str:
        """Where its requests go; with a stream ARN, botocore puts the account's own host in its place."""
        return str(self._boto.meta.endpoint_url)

    def describe_stream(self, stream: StreamId) -> StreamDescription:
        answer = self._stream_call("DescribeStreamSummary", stream, _address(stream))
        try:
            wire: _SummaryWire = answer.get(_DECODED) or _slow_summary(answer)
            summary = wire.StreamDescriptionSummary
            return StreamDescription(
                name=summary.StreamName,
                arn=summary.StreamARN,
                status=StreamStatus(summary.StreamStatus),
                retention_hours=summary.RetentionPeriodHours,
                creation_seconds=summary.StreamCreationTimestamp,
                open_shard_count=summary.OpenShardCount,
                max_record_bytes=(
                    summary.MaxRecordSizeInKiB * KIB if summary.MaxRecordSizeInKiB else DEFAULT_MAX_RECORD_BYTES
                ),
                key_based_distribution=summary.RecordDistributionStrategy != "AUTO",
            )
        except _MALFORMED as exc:
            raise self._unreadable("DescribeStreamSummary", stream, exc) from exc

    def list_shards(self, stream: StreamId, shard_filter: ShardFilter | None = None) -> list[Shard]:
        for attempt in range(1, _MAX_LISTINGS + 1):
            try:
                return self._list_shards(stream, shard_filter)
            except ServiceError as exc:
                if exc.code != "ExpiredNextTokenException" or attempt == _MAX_LISTINGS:
                    raise
        raise AssertionError("unreachable")

    def _list_shards(self, stream: StreamId, shard_filter: ShardFilter | None) -> list[Shard]:
        body = _address(stream)
        if shard_filter is not None:
            body["ShardFilter"] = {"Type": shard_filter.kind.value}
            if shard_filter.timestamp_micros is not None:
                body["ShardFilter"]["Timestamp"] = _wire_timestamp(shard_filter.timestamp_micros)
        shards: list[Shard] = []
        while True:
            answer = self._stream_call("ListShards", stream, body)
            try:
                shards.extend(map(_shard, answer["Shards"]))
            except _MALFORMED as exc:
                raise self._unreadable("ListShards", stream, exc) from exc
            token = answer.get("NextToken")
            if not token:
                return shards
            # "You cannot specify StreamName and NextToken in the same request"; the token carries the filter too.
            body = {"NextToken": token}

    def get_shard_iterator(self, stream: StreamId, shard_id: str, position: Position) -> str:
        body = {**_address(stream), "ShardId": shard_id, **_iterator_arguments(position)}
        answer = self._call("GetShardIterator", stream, body, shard_id)
        iterator = answer.get("ShardIterator")
        if not iterator:
            raise self._unreadable("GetShardIterator", stream, KeyError("ShardIterator"))
        return str(iterator)

    def get_records(self, stream: StreamId, shard_iterator: str, limit: int) -> RecordsAnswer:
        body: dict[str, Any] = {"ShardIterator": shard_iterator, "Limit": limit}
        if stream.arn is not None:
            body["StreamARN"] = stream.arn
        answer = self._call("GetRecords", stream, body)
        try:
            wire: _RecordsWire = answer.get(_DECODED) or _slow_records(answer)
            children = tuple(map(_child_shard, wire.ChildShards)) if wire.ChildShards else ()
        except _MALFORMED as exc:
            raise self._unreadable("GetRecords", stream, exc) from exc
        return RecordsAnswer(
            records=wire.Records,
            next_shard_iterator=wire.NextShardIterator or None,
            millis_behind_latest=wire.MillisBehindLatest,
            child_shards=children,
            server_time_seconds=self._server_time_seconds(answer),
            size_bytes=sum([len(record.data) for record in wire.Records]),
        )

    def put_records(self, stream: StreamId, entries: Sequence[PutEntry]) -> list[PutOutcome]:
        answer = self._stream_call("PutRecords", stream, {**_address(stream), "Records": list(entries)})
        try:
            wire: _PutWire = answer.get(_DECODED) or msgspec.convert(answer, _PutWire)
        except _MALFORMED as exc:
            raise self._unreadable("PutRecords", stream, exc) from exc
        outcomes = wire.Records
        if len(outcomes) != len(entries):
            raise TransientServiceError(
                f"PutRecords for {self._subject(stream)} answered {len(outcomes)} results for {len(entries)} records; "
                "which were written is not known",
                operation="PutRecords",
                code="ResultCountMismatch",
            )
        return outcomes

    def close(self) -> None:
        self._closed = True
        self._boto.close()

    def _stream_call(self, operation: str, stream: StreamId, body: dict[str, Any]) -> Any:
        """Call where "resource not found" can only mean the stream."""
        try:
            return self._call(operation, stream, body)
        except ServiceError as exc:
            if exc.code != "ResourceNotFoundException":
                raise
            raise StreamNotFound(
                f"{operation} failed: stream {stream} does not exist in region {self.region} at {self.endpoint_url}; "
                f"create it, or correct the stream's name, the region or the account ({exc.service_message})",
                operation=operation,
                code=exc.code,
                service_message=exc.service_message,
            ) from exc

    def _call(self, operation: str, stream: StreamId, body: dict[str, Any], shard_id: str = "") -> Any:
        if self._closed:
            raise RuntimeError(f"{operation}: this client is closed")
        if stream.arn is not None and stream.region != self.region:
            # botocore would send it to the client's own region, where the stream is unknown or another one.
            raise ConfigurationError(f"stream {stream} is not in region {self.region}, where this client's requests go")
        # botocore sees the ARN too: by it, it chooses the account's own host.
        arguments: dict[str, Any] = {_BODY: _encode(body)}
        if stream.arn is not None:
            arguments["StreamARN"] = stream.arn
        try:
            answer = getattr(self._boto, _METHODS[operation])(**arguments)
        except botocore.exceptions.ClientError as exc:
            raise self._service_error(exc, stream, shard_id) from exc
        except (botocore.exceptions.BotoCoreError, botocore.parsers.ResponseParserError, RuntimeError) as exc:
            # botocore raises a bare RuntimeError for one thing: credentials that came back expired.
            if isinstance(exc, RuntimeError) and "expired" not in str(exc):
                raise
            raise _client_side_error(
                exc, operation, self._subject(stream, shard_id), answered=self._answered, endpoint=self.endpoint_url
            ) from exc
        except _MALFORMED as exc:
            raise self._unreadable(operation, stream, exc) from exc
        self._answered = True
        return answer

    def _service_error(self, exc: botocore.exceptions.ClientError, stream: StreamId, shard_id: str) -> ServiceError:
        response: Any = exc.response
        error = response.get("Error", {})
        operation = exc.operation_name
        # STS answers AssumeRole through the same door, before the first request reaches Kinesis.
        self._answered = self._answered or operation in _METHODS
        return classify(
            operation=operation,
            code=str(error.get("Code") or ""),
            message=str(error.get("Message") or ""),
            status=int(response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0),
            subject=self._subject(stream, shard_id),
        )

    def _unreadable(self, operation: str, stream: StreamId, cause: Exception) -> TransientServiceError:
        """A good status with a body that isn't an answer: a cut connection or a proxy in between. Worth another try."""
        return TransientServiceError(
            f"{operation} for {self._subject(stream)} answered something unreadable ({type(cause).__name__}: {cause})",
            operation=operation,
            code="UnreadableAnswer",
        )

    def _subject(self, stream: StreamId, shard_id: str = "") -> str:
        shard = f"shard {shard_id} of " if shard_id else ""
        return f"{shard}stream {stream} in {self.region}"

    def _server_time_seconds(self, answer: Any) -> float:
        date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        if date:
            try:
                return email.utils.parsedate_to_datetime(date).timestamp()
            except (ValueError, TypeError):
                pass  # no date at all: as if there were no header
        return self._clock.now_seconds()


_METHODS: Final[Mapping[str, str]] = {
    "DescribeStreamSummary": "describe_stream_summary",
    "ListShards": "list_shards",
    "GetShardIterator": "get_shard_iterator",
    "GetRecords": "get_records",
    "PutRecords": "put_records",
}


def _address(stream: StreamId) -> dict[str, Any]:
    return {"StreamARN": stream.arn} if stream.arn is not None else {"StreamName": stream.name}


def _wire_timestamp(micros: int) -> float:
    """Seconds, in the service's milliseconds; rounded down, since earlier only repeats and later would lose."""
    return micros // 1000 / 1000


def _iterator_arguments(position: Position) -> dict[str, Any]:
    kind = position.kind
    if kind is PositionKind.AT_TIMESTAMP:
        return {"ShardIteratorType": kind.value, "Timestamp": _wire_timestamp(position.timestamp_micros)}
    if not position.is_sequence:
        return {"ShardIteratorType": kind.value}
    if kind is PositionKind.AFTER_SEQUENCE_NUMBER and position.sub_sequence_number != WHOLE_RECORD:
        kind = PositionKind.AT_SEQUENCE_NUMBER  # the rest of the aggregate is still to come
    return {"ShardIteratorType": kind.value, "StartingSequenceNumber": str(position.sequence_number)}


def _seconds(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else float(value.timestamp())


def _shard(wire: Any) -> Shard:
    sequence_numbers = wire.get("SequenceNumberRange", {})
    starting = sequence_numbers.get("StartingSequenceNumber")
    ending = sequence_numbers.get("EndingSequenceNumber")
    hash_keys = wire["HashKeyRange"]
    return Shard(
        wire["ShardId"],
        HashKeyRange(int(hash_keys["StartingHashKey"]), int(hash_keys["EndingHashKey"])),
        wire.get("ParentShardId") or None,
        wire.get("AdjacentParentShardId") or None,
        int(starting) if starting else None,
        int(ending) if ending else None,
    )


def _child_shard(wire: _ChildShard) -> ChildShard:
    hash_keys = HashKeyRange(int(wire.HashKeyRange.StartingHashKey), int(wire.HashKeyRange.EndingHashKey))
    return ChildShard(wire.ShardId, tuple(wire.ParentShards), hash_keys)


def _slow_records(answer: Any) -> _RecordsWire:
    """The same as the fast decoder, out of what botocore parsed: members that were null are absent there."""
    for record in answer["Records"]:
        if "ApproximateArrivalTimestamp" in record:
            record["ApproximateArrivalTimestamp"] = _seconds(record["ApproximateArrivalTimestamp"])
    return msgspec.convert(answer, _RecordsWire, builtin_types=(bytes,))


def _slow_summary(answer: Any) -> _SummaryWire:
    summary = answer["StreamDescriptionSummary"]
    summary["StreamCreationTimestamp"] = _seconds(summary["StreamCreationTimestamp"])
    return msgspec.convert(answer, _SummaryWire)


#: What reading an answer of the wrong shape raises, in our code as in botocore's parsers.
_MALFORMED: Final = (AttributeError, LookupError, TypeError, ValueError, msgspec.DecodeError)

_PASSING: Final = (
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.ConnectionError,
    botocore.exceptions.IncompleteReadError,
    botocore.exceptions.ChecksumError,
    botocore.parsers.ResponseParserError,
)
#: By name, since some of them are younger than the oldest botocore we run on.
_CREDENTIALS: Final[Mapping[str, str]] = {
    "NoCredentialsError": "give credentials (AWS's usual chain: environment, profile, role)",
    "PartialCredentialsError": "set both AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or neither",
    "CredentialRetrievalError": "check the source of the credentials named above",
    "MetadataRetrievalError": "check that the container's or instance's metadata service can be reached",
    "ProfileNotFound": "create the profile in the worker's ~/.aws/config, or correct profile= or AWS_PROFILE",
    "ConfigParseError": "correct the worker's AWS configuration file",
    "ConfigNotFound": "correct AWS_CONFIG_FILE",
    "InvalidConfigError": "correct the profile in the worker's AWS configuration file",
    "InfiniteLoopConfigError": "correct the profile in the worker's AWS configuration file",
    "UnknownCredentialError": "correct credential_source in the worker's AWS configuration file",
    "RefreshWithMFAUnsupportedError": "use credentials that need no MFA token: nobody can type it on a worker",
    "SSOError": "run `aws sso login`; for a long-running pipeline use a role",
    "SSOTokenLoadError": "run `aws sso login`; for a long-running pipeline use a role",
    "UnauthorizedSSOTokenError": "run `aws sso login`; for a long-running pipeline use a role",
    "PendingAuthorizationExpiredError": "run `aws sso login`; for a long-running pipeline use a role",
    "TokenRetrievalError": "renew the token; for a long-running pipeline use a role",
    "NoAuthTokenError": "run `aws sso login`; for a long-running pipeline use a role",
    "LoginError": "run `aws login`; for a long-running pipeline use a role",
    "LoginRefreshRequired": "run `aws login`; for a long-running pipeline use a role",
    "LoginTokenLoadError": "run `aws login`; for a long-running pipeline use a role",
    "LoginInsufficientPermissions": "run `aws login`; for a long-running pipeline use a role",
    "RuntimeError": "the source gives expired credentials; check it, and this machine's clock",
}
#: Sources that fail for a moment on a healthy machine; fatal only while they have never worked.
_PASSING_CREDENTIALS: Final = frozenset({"CredentialRetrievalError", "MetadataRetrievalError", "RuntimeError"})


def _client_side_error(
    exc: Exception, operation: str, subject: str, *, answered: bool, endpoint: str = ""
) -> KinesisIOError:
    """Return our error for one of botocore's that is no answer of the service.

    What may heal by itself is transient once the service has `answered` this client; before, the same failure is
    most likely a wrong option, and waiting would hide it.
    """
    code = type(exc).__name__
    text = f"{operation} for {subject} failed: {code}: {exc}"
    unreachable = isinstance(
        exc,
        (
            botocore.exceptions.EndpointConnectionError,
            botocore.exceptions.ProxyConnectionError,
            botocore.exceptions.SSLError,
        ),
    )
    if unreachable and not answered:
        return EndpointUnreachable(
            f"{text}; check region, endpoint_url ({endpoint}), AWS_ENDPOINT_URL_KINESIS "
            "and the way there (DNS, VPC endpoint, proxy)"
        )
    if isinstance(exc, _PASSING) or (answered and code in _PASSING_CREDENTIALS):
        return TransientServiceError(text, operation=operation, code=code, service_message=str(exc))
    if isinstance(exc, botocore.exceptions.NoRegionError):
        return ConfigurationError(f"{text}; give ClientConfig(region=...) or set AWS_REGION on the worker")
    if code in _CREDENTIALS:
        return AccessRefused(f"{text} ({_CREDENTIALS[code]})", operation=operation, code=code, service_message=str(exc))
    return ServiceError(text, operation=operation, code=code, service_message=str(exc))
