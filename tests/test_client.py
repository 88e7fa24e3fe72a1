"""`ClientConfig` and `Boto3KinesisClient`, against an HTTP server of our own that answers what a test tells it to."""

from __future__ import annotations

import base64
import contextlib
import datetime
import http.server
import json
import pickle
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from apache_beam.utils.timestamp import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from samza_kinesis_io import client as client_module
from samza_kinesis_io.client import (
    Boto3KinesisClient,
    ClientConfig,
    PutEntry,
    PutOutcome,
    ShardFilter,
    ShardFilterKind,
    StreamDescription,
    StreamId,
    StreamStatus,
)
from samza_kinesis_io.errors import (
    AccessRefused,
    ConfigurationError,
    EndpointUnreachable,
    InvalidArgument,
    IteratorExpired,
    KinesisIOError,
    ResourceNotFound,
    ServiceError,
    StreamNotFound,
    Throttled,
    TransientServiceError,
)
from samza_kinesis_io.limits import MAX_HASH_KEY
from samza_kinesis_io.positions import Position
from samza_kinesis_io.records import KinesisRecord
from samza_kinesis_io.shards import ChildShard, HashKeyRange, Shard

FLIGHTS = StreamId("flights")
ARN = "arn:aws:kinesis:eu-west-1:123456789012:stream/flights"
#: Tue, 14 Nov 2023 22:13:20 GMT
DATE_SECONDS = 1_700_000_000
EMPTY: dict[str, Any] = {"Records": [], "NextShardIterator": "next", "MillisBehindLatest": 0}

Answer = tuple[int, bytes]


class Endpoint:
    """An HTTP server: answers from a list (the last one for ever), keeps the requests."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, Any, dict[str, str]]] = []
        self.answers: list[Answer] = []
        self.sts_answers: list[Answer] = []
        self.headers: dict[str, str] = {"Date": "Tue, 14 Nov 2023 22:13:20 GMT"}
        self.cut_after: int | None = None
        """How many bytes of a body are sent before the connection is closed."""
        endpoint = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 30
            wbufsize = 65536  # headers and body in one packet: two wait for a delayed acknowledgement

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                target = self.headers.get("X-Amz-Target", "").rpartition(".")[2]
                endpoint.requests.append((target, body.decode(), dict(self.headers)))
                answers = endpoint.answers if target else endpoint.sts_answers
                status, answer = answers.pop(0) if len(answers) > 1 else answers[0]
                self.send_response_only(status)
                for name, value in endpoint.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer[: endpoint.cut_after])
                if endpoint.cut_after is not None:
                    self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def will_answer(self, *bodies: Any) -> None:
        self.answers = [(200, json.dumps(body).encode()) for body in bodies]

    def will_fail(self, code: str, message: str = "said the service", status: int = 400) -> None:
        self.answers = [error(code, message, status)]

    def bodies(self) -> list[Any]:
        return [json.loads(body) for _, body, _ in self.requests]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def error(code: str, message: str = "said the service", status: int = 400) -> Answer:
    return status, json.dumps({"__type": code, "message": message}).encode()


@pytest.fixture(scope="module")
def _endpoint() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    yield endpoint
    endpoint.close()


@pytest.fixture
def endpoint(_endpoint: Endpoint) -> Endpoint:
    _endpoint.requests.clear()
    _endpoint.answers, _endpoint.sts_answers = [], []
    _endpoint.cut_after = None
    _endpoint.headers = {"Date": "Tue, 14 Nov 2023 22:13:20 GMT"}
    return _endpoint


@pytest.fixture(scope="module")
def boto(_endpoint: Endpoint) -> Any:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ACCESS_KEY_ID", "test")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "test")
        return ClientConfig(region="eu-west-1", endpoint_url=_endpoint.url).connect()._boto


@pytest.fixture
def client(endpoint: Endpoint, boto: Any) -> Boto3KinesisClient:
    """A client of its own for each test around one boto3 client, whose making takes longer than a test."""
    return Boto3KinesisClient(boto, "eu-west-1")


def without_fast_decoding(client: Boto3KinesisClient) -> Boto3KinesisClient:
    """As on a botocore that does not know the before-parse hook."""
    for operation in client_module._FAST_DECODERS:
        event = f"before-parse.kinesis.{operation}"
        client._boto.meta.events.unregister(event, unique_id=f"{client_module.__name__}.{event}")
    return client


# --- naming a stream


def test_a_stream_is_named_by_its_name_or_by_its_arn() -> None:
    assert StreamId.parse("flights-2_a.b") == StreamId("flights-2_a.b")
    assert StreamId.parse(ARN) == StreamId("flights", ARN)
    assert StreamId.parse(ARN).region == "eu-west-1"
    assert StreamId.parse("flights").region is None
    assert StreamId.parse("arn:aws-cn:kinesis:cn-north-1:123456789012:stream/x").region == "cn-north-1"
    assert StreamId.parse("arn:aws-us-gov:kinesis:us-gov-west-1:123456789012:stream/x").name == "x"


@pytest.mark.parametrize(
    "value",
    [
        "",
        "a b",
        "x" * 129,
        "flights\n",
        "arn:aws:sqs:eu-west-1:123456789012:flights",
        "arn:aws:kinesis:eu-west-1:1234:stream/flights",
        "arn:aws:kinesis:eu-west-1:123456789012:stream/flights/consumer/c:1",
        None,
    ],
)
def test_what_names_no_stream_is_refused_with_option_and_value(value: Any) -> None:
    with pytest.raises(ConfigurationError) as error:
        StreamId.parse(value, "input")
    assert str(error.value).startswith("input must be")
    assert repr(value) in str(error.value)


# --- the options


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"region": ""}, "region"),
        ({"region": "eu west"}, "region"),
        ({"endpoint_url": "localhost:4567"}, "endpoint_url"),
        ({"endpoint_url": "ftp://localhost"}, "endpoint_url"),
        ({"endpoint_url": "http://"}, "endpoint_url"),
        ({"endpoint_url": "http://localhost:99999"}, "endpoint_url"),
        ({"profile": ""}, "profile"),
        ({"role_arn": "reader"}, "role_arn"),
        ({"external_id": "x1"}, "external_id"),
        ({"role_session_name": "two words"}, "role_session_name"),
        ({"connect_timeout_seconds": 0}, "connect_timeout_seconds"),
        ({"read_timeout_seconds": float("nan")}, "read_timeout_seconds"),
        ({"read_timeout_seconds": True}, "read_timeout_seconds"),
        ({"max_connections": 0}, "max_connections"),
        ({"max_connections": 1.5}, "max_connections"),
    ],
)
def test_an_impossible_option_is_refused_at_construction(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{named}"):
        ClientConfig(**options)


def test_a_password_in_endpoint_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigurationError) as error:
        ClientConfig(endpoint_url="http://me:hunter2@localhost")
    assert "hunter2" not in str(error.value)


def test_equal_configurations_are_one_key() -> None:
    one, two = ClientConfig(region="eu-west-1"), ClientConfig(region="eu-west-1")
    assert one == two
    assert len({one, two, ClientConfig(region="eu-west-2")}) == 2


def test_a_pickled_configuration_carries_no_credential(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIASECRETSECRET")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "verysecretverysecret")
    config = ClientConfig(region="eu-west-1", role_arn="arn:aws:iam::123456789012:role/reader")
    before = pickle.dumps(config)
    config.connect()
    pickled = pickle.dumps(config)
    assert pickled == before
    assert b"verysecret" not in pickled
    assert b"AKIASECRET" not in pickled
    assert pickle.loads(pickled) == config


# --- where the requests go


def test_the_region_comes_from_the_option_then_the_arn_then_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "sa-east-1")
    assert ClientConfig().connect().region == "sa-east-1"
    monkeypatch.setenv("AWS_REGION", "us-west-2")
    assert ClientConfig().connect().region == "us-west-2"
    assert ClientConfig().connect(StreamId.parse(ARN)).region == "eu-west-1"
    assert ClientConfig(region="ap-south-1").connect(FLIGHTS).region == "ap-south-1"
    assert ClientConfig(region="eu-west-1").connect(StreamId.parse(ARN)).region == "eu-west-1"


def test_a_region_against_the_arns_own_is_refused_with_both_named() -> None:
    with pytest.raises(ConfigurationError, match=r"us-east-1.*eu-west-1"):
        ClientConfig(region="us-east-1").connect(StreamId.parse(ARN))


def test_an_arn_of_another_region_is_not_sent_to_this_clients_region(
    client: Boto3KinesisClient, endpoint: Endpoint
) -> None:
    with pytest.raises(ConfigurationError, match="us-east-1"):
        client.list_shards(StreamId.parse(ARN.replace("eu-west-1", "us-east-1")))
    assert endpoint.requests == []


def test_no_region_anywhere_names_the_option_and_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    with pytest.raises(ConfigurationError, match=r"region=.*AWS_REGION"):
        ClientConfig().connect(FLIGHTS)


def test_the_environments_endpoint_is_used(monkeypatch: pytest.MonkeyPatch, endpoint: Endpoint) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_KINESIS", endpoint.url)
    endpoint.will_answer({"Shards": []})
    assert ClientConfig().connect().list_shards(FLIGHTS) == []


def test_a_bad_endpoint_in_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_KINESIS", "localhost:4567")
    with pytest.raises(ConfigurationError, match="AWS_ENDPOINT_URL_KINESIS"):
        ClientConfig().connect()


def test_a_stream_is_addressed_by_arn_if_there_is_one(client: Boto3KinesisClient, endpoint: Endpoint) -> None:
    endpoint.will_answer({"Shards": []}, EMPTY, {"Shards": []}, EMPTY)
    for stream in (FLIGHTS, StreamId.parse(ARN)):
        client.list_shards(stream)
        client.get_records(stream, "iterator", 10)
    assert endpoint.bodies() == [
        {"StreamName": "flights"},
        {"ShardIterator": "iterator", "Limit": 10},
        {"StreamARN": ARN},
        {"StreamARN": ARN, "ShardIterator": "iterator", "Limit": 10},
    ]


def test_many_threads_may_connect_at_once() -> None:
    clients: list[Boto3KinesisClient] = []
    threads = [threading.Thread(target=lambda: clients.append(ClientConfig().connect())) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(clients) == 8


# --- credentials


def sts_answer(key: str, valid_seconds: float) -> Answer:
    until = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=valid_seconds)
    return 200, (
        '<AssumeRoleResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleResult><Credentials>'
        f"<AccessKeyId>{key}</AccessKeyId><SecretAccessKey>s</SecretAccessKey><SessionToken>t</SessionToken>"
        f"<Expiration>{until:%Y-%m-%dT%H:%M:%SZ}</Expiration>"
        "</Credentials></AssumeRoleResult></AssumeRoleResponse>"
    ).encode()


@pytest.fixture
def role_client(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> Boto3KinesisClient:
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", endpoint.url)
    return ClientConfig(
        region="eu-west-1",
        endpoint_url=endpoint.url,
        role_arn="arn:aws:iam::123456789012:role/reader",
        external_id="partner-7",
    ).connect()


def test_a_role_is_assumed_and_its_credentials_are_renewed_before_they_expire(
    role_client: Boto3KinesisClient, endpoint: Endpoint
) -> None:
    endpoint.will_answer({"Shards": []})
    # Five minutes is less than botocore's mandatory ten: the next use asks for new ones, and those last.
    endpoint.sts_answers = [sts_answer("ASIAFIRST", 300), sts_answer("ASIASECOND", 3600)]
    for _ in range(3):
        role_client.list_shards(FLIGHTS)
    assumed = [body for target, body, _ in endpoint.requests if not target]
    assert len(assumed) == 2
    assert "ExternalId=partner-7" in assumed[0]
    assert "RoleSessionName=samza-kinesis-io" in assumed[0]
    assert "Credential=ASIASECOND/" in endpoint.requests[-1][2]["Authorization"]


def test_a_role_that_may_not_be_assumed_refuses_access(role_client: Boto3KinesisClient, endpoint: Endpoint) -> None:
    endpoint.sts_answers = [
        (403, b"<ErrorResponse><Error><Code>AccessDenied</Code><Message>no trust</Message></Error></ErrorResponse>")
    ]
    with pytest.raises(AccessRefused, match=r"AssumeRole.*no trust"):
        role_client.list_shards(FLIGHTS)


def test_no_credentials_at_all_says_where_to_give_them(monkeypatch: pytest.MonkeyPatch, endpoint: Endpoint) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(AccessRefused, match="environment, profile, role"):
        ClientConfig(endpoint_url=endpoint.url).connect().list_shards(FLIGHTS)
    with pytest.raises(AccessRefused, match="environment, profile, role"):
        ClientConfig(role_arn="arn:aws:iam::123456789012:role/reader").connect()


def test_half_of_a_key_pair_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(AccessRefused, match="AWS_SECRET_ACCESS_KEY"):
        ClientConfig().connect()


def test_an_unknown_profile_is_said() -> None:
    with pytest.raises(AccessRefused, match=r"nobody.*profile="):
        ClientConfig(profile="nobody").connect()


def test_a_credential_process_that_fails_is_fatal_at_first_and_passing_later(
    monkeypatch: pytest.MonkeyPatch, endpoint: Endpoint, tmp_path: Any
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    answer = tmp_path / "credentials.json"
    soon = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=300)
    keys = {"Version": 1, "AccessKeyId": "A", "SecretAccessKey": "s", "SessionToken": "t"}
    answer.write_text(json.dumps({**keys, "Expiration": f"{soon:%Y-%m-%dT%H:%M:%SZ}"}))
    config = tmp_path / "config"
    config.write_text(f"[profile p]\ncredential_process = cat {answer}\n[profile q]\ncredential_process = false\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    endpoint.will_answer({"Shards": []})

    with pytest.raises(AccessRefused, match="check the source"):
        ClientConfig(profile="q", endpoint_url=endpoint.url).connect()
    client = ClientConfig(profile="p", endpoint_url=endpoint.url).connect()
    client.list_shards(FLIGHTS)
    answer.unlink()
    with pytest.raises(TransientServiceError, match="CredentialRetrievalError"):
        client.list_shards(FLIGHTS)


# --- errors of the service


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("ProvisionedThroughputExceededException", 400, Throttled),
        ("LimitExceededException", 400, Throttled),
        ("ExpiredIteratorException", 400, IteratorExpired),
        ("InvalidArgumentException", 400, InvalidArgument),
        ("AccessDeniedException", 400, AccessRefused),
        ("InternalFailure", 500, TransientServiceError),
        ("com.amazonaws.kinesis.v20131202#KMSThrottlingException", 400, Throttled),
        ("NeverHeardOfException", 400, ServiceError),
    ],
)
def test_a_service_error_is_classified_once_and_never_retried_here(
    client: Boto3KinesisClient, endpoint: Endpoint, code: str, status: int, kind: type[ServiceError]
) -> None:
    endpoint.will_fail(code, status=status)
    with pytest.raises(ServiceError) as caught:
        client.get_records(FLIGHTS, "iterator", 10)
    assert type(caught.value) is kind
    assert caught.value.code == code.rpartition("#")[2]
    assert caught.value.operation == "GetRecords"
    assert caught.value.service_message == "said the service"
    assert "stream flights in eu-west-1" in str(caught.value)
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.describe_stream(FLIGHTS),
        lambda c: c.list_shards(FLIGHTS),
        lambda c: c.put_records(FLIGHTS, [PutEntry(b"x", "k")]),
    ],
)
def test_a_missing_stream_is_named_with_its_region_and_the_fix(
    client: Boto3KinesisClient, endpoint: Endpoint, call: Callable[[Boto3KinesisClient], object]
) -> None:
    endpoint.will_fail("ResourceNotFoundException")
    with pytest.raises(StreamNotFound, match=r"flights does not exist in region eu-west-1 at http.*create it"):
        call(client)


def test_where_a_shard_may_be_meant_the_stream_is_not_declared_missing(
    client: Boto3KinesisClient, endpoint: Endpoint
) -> None:
    endpoint.will_fail("ResourceNotFoundException")
    with pytest.raises(ResourceNotFound, match="shard s-1 of stream flights") as caught:
        client.get_shard_iterator(FLIGHTS, "s-1", Position.trim_horizon())
    assert not isinstance(caught.value, StreamNotFound)


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_a_proxys_error_page_is_transient(client: Boto3KinesisClient, endpoint: Endpoint, status: int) -> None:
    endpoint.answers = [(status, b"<html>Bad Gateway</html>")]
    with pytest.raises(TransientServiceError):
        client.get_records(FLIGHTS, "iterator", 10)


# --- errors on the way


def closed_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_an_endpoint_that_never_answered_is_unreachable(host: str) -> None:
    url = f"http://{host}:{closed_port()}"
    client = ClientConfig(region="eu-west-1", endpoint_url=url).connect()
    with pytest.raises(EndpointUnreachable) as caught:
        client.list_shards(FLIGHTS)
    for word in (url, "eu-west-1", "endpoint_url", "AWS_ENDPOINT_URL_KINESIS"):
        assert word in str(caught.value)
    assert not caught.value.retryable


def test_an_endpoint_that_answered_before_is_only_away_for_a_while() -> None:
    endpoint = Endpoint()
    client = ClientConfig(region="eu-west-1", endpoint_url=endpoint.url).connect()
    endpoint.will_fail("ProvisionedThroughputExceededException")  # an error is a sign of life too
    with pytest.raises(Throttled):
        client.list_shards(FLIGHTS)
    endpoint.close()
    client._boto._endpoint.http_session.close()  # else the handler's thread still answers on the open connection
    with pytest.raises(TransientServiceError):
        client.list_shards(FLIGHTS)


def test_a_silent_endpoint_is_a_transient_read_timeout() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        client = ClientConfig(
            endpoint_url=f"http://127.0.0.1:{listener.getsockname()[1]}", read_timeout_seconds=0.05
        ).connect()
        with pytest.raises(TransientServiceError, match="ReadTimeoutError"):
            client.get_records(FLIGHTS, "iterator", 1)


@pytest.mark.parametrize("cut_after", [0, 10, 40])
@pytest.mark.parametrize("fast", [True, False])
def test_a_cut_answer_is_transient_and_never_a_shards_end(
    client: Boto3KinesisClient, endpoint: Endpoint, cut_after: int, fast: bool
) -> None:
    """botocore does not compare Content-Length: it hands out half a body under status 200."""
    if not fast:
        without_fast_decoding(client)
    endpoint.will_answer(EMPTY)
    endpoint.cut_after = cut_after
    with pytest.raises(TransientServiceError):
        client.get_records(FLIGHTS, "iterator", 1)


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b"null", b"7", b"\xff", b'{"Records":null}', b'{"Records":7}'])
@pytest.mark.parametrize("fast", [True, False])
def test_an_unreadable_answer_is_transient(
    client: Boto3KinesisClient, endpoint: Endpoint, body: bytes, fast: bool
) -> None:
    if not fast:
        without_fast_decoding(client)
    endpoint.answers = [(200, body)]
    with pytest.raises(TransientServiceError):
        client.get_records(FLIGHTS, "iterator", 1)
    with pytest.raises(TransientServiceError):
        client.put_records(FLIGHTS, [PutEntry(b"x", "k")])
    with pytest.raises(TransientServiceError):
        client.list_shards(FLIGHTS)
    with pytest.raises(TransientServiceError):
        client.describe_stream(FLIGHTS)
    with pytest.raises(TransientServiceError):
        client.get_shard_iterator(FLIGHTS, "s", Position.trim_horizon())


def test_a_closed_client_refuses_to_call(client: Boto3KinesisClient) -> None:
    client.close()
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.list_shards(FLIGHTS)


# --- describe and list


def test_a_description_keeps_what_the_package_asks_for(client: Boto3KinesisClient, endpoint: Endpoint) -> None:
    summary = {
        "StreamName": "flights",
        "StreamARN": ARN,
        "StreamStatus": "UPDATING",
        "RetentionPeriodHours": 48,
        "StreamCreationTimestamp": 1.7e9,
        "EnhancedMonitoring": [],
        "OpenShardCount": 3,
    }
    endpoint.will_answer(
        {"StreamDescriptionSummary": {**summary, "StreamCreationTimestamp": "2023-11-14T22:13:20Z"}},
        {
            "StreamDescriptionSummary": {
                **summary,
                "MaxRecordSizeInKiB": 10240,
                "RecordDistributionStrategy": "AUTO",
            }
        },
    )
    assert client.describe_stream(FLIGHTS) == StreamDescription(
        "flights", ARN, StreamStatus.UPDATING, 48, 1.7e9, 3, 1024 * 1024
    )
    assert client.describe_stream(FLIGHTS) == StreamDescription(
        "flights", ARN, StreamStatus.UPDATING, 48, 1.7e9, 3, 10 * 1024 * 1024, key_based_distribution=False
    )


def wire_shard(n: int, **more: Any) -> dict[str, Any]:
    return {
        "ShardId": f"shardId-{n:012}",
        "HashKeyRange": {"StartingHashKey": "0", "EndingHashKey": str(MAX_HASH_KEY)},
        "SequenceNumberRange": {"StartingSequenceNumber": "100"},
        **more,
    }


def test_every_page_is_listed_with_the_token_alone(client: Boto3KinesisClient, endpoint: Endpoint) -> None:
    merged = wire_shard(
        2,
        ParentShardId="shardId-000000000000",
        AdjacentParentShardId="shardId-000000000001",
        SequenceNumberRange={"StartingSequenceNumber": "100", "EndingSequenceNumber": "200"},
    )
    endpoint.will_answer(
        {"Shards": [wire_shard(0)], "NextToken": "t1"},
        {"Shards": [wire_shard(1)], "NextToken": "t2"},
        {"Shards": [merged], "NextToken": None},
    )
    everything = HashKeyRange(0, MAX_HASH_KEY)
    kind = ShardFilterKind.FROM_TIMESTAMP
    assert client.list_shards(FLIGHTS, ShardFilter(kind, 1_700_000_000_123_999)) == [
        Shard("shardId-000000000000", everything, starting_sequence_number=100),
        Shard("shardId-000000000001", everything, starting_sequence_number=100),
        Shard("shardId-000000000002", everything, "shardId-000000000000", "shardId-000000000001", 100, 200),
    ]
    assert endpoint.bodies() == [
        {"StreamName": "flights", "ShardFilter": {"Type": "FROM_TIMESTAMP", "Timestamp": 1_700_000_000.123}},
        {"NextToken": "t1"},
        {"NextToken": "t2"},
    ]


def test_an_expired_token_starts_the_listing_again(client: Boto3KinesisClient, endpoint: Endpoint) -> None:
    endpoint.will_answer(
        {"Shards": [wire_shard(0)], "NextToken": "t1"}, {}, {"Shards": [wire_shard(0)]}, {"Shards": []}
    )
    endpoint.answers[1] = error("ExpiredNextTokenException")
    assert [s.shard_id for s in client.list_shards(FLIGHTS)] == ["shardId-000000000000"]


def test_tokens_that_always_expire_are_given_back_to_the_caller(client: Boto3KinesisClient, endpoint: Endpoint) -> None:
    endpoint.will_fail("ExpiredNextTokenException")
    with pytest.raises(TransientServiceError):
        client.list_shards(FLIGHTS)
    assert len(endpoint.requests) == 3


# --- iterators


@pytest.mark.parametrize(
    ("position", "sent"),
    [
        (Position.trim_horizon(), {"ShardIteratorType": "TRIM_HORIZON"}),
        (
            Position.at_timestamp(Timestamp(micros=1_700_000_000_123_456)),
            {"ShardIteratorType": "AT_TIMESTAMP", "Timestamp": 1_700_000_000.123},
        ),
        (Position.at(12), {"ShardIteratorType": "AT_SEQUENCE_NUMBER", "StartingSequenceNumber": "12"}),
        (Position.at(12, 3), {"ShardIteratorType": "AT_SEQUENCE_NUMBER", "StartingSequenceNumber": "12"}),
        (Position.after(12), {"ShardIteratorType": "AFTER_SEQUENCE_NUMBER", "StartingSequenceNumber": "12"}),
        (Position.after(12, 3), {"ShardIteratorType": "AT_SEQUENCE_NUMBER", "StartingSequenceNumber": "12"}),
    ],
)
def test_a_position_becomes_an_iterator(
    client: Boto3KinesisClient, endpoint: Endpoint, position: Position, sent: dict[str, Any]
) -> None:
    endpoint.will_answer({"ShardIterator": "AAAA"})
    assert client.get_shard_iterator(FLIGHTS, "s-1", position) == "AAAA"
    assert endpoint.bodies() == [{"StreamName": "flights", "ShardId": "s-1", **sent}]


# --- records


def test_records_come_decoded_with_the_servers_time(client: Boto3KinesisClient, endpoint: Endpoint) -> None:
    child = {
        "ShardId": "shardId-2",
        "ParentShards": ["shardId-0", "shardId-1"],
        "HashKeyRange": {"StartingHashKey": "0", "EndingHashKey": str(MAX_HASH_KEY)},
    }
    endpoint.will_answer(
        {
            "Records": [
                {
                    "Data": base64.b64encode(b"hello").decode(),
                    "SequenceNumber": "4955",
                    "PartitionKey": "k",
                    "ApproximateArrivalTimestamp": 1.700000000123e9,
                    "EncryptionType": "KMS",
                },
                {"Data": "", "SequenceNumber": "4956"},
            ],
            "MillisBehindLatest": 12,
            "ChildShards": [child],
        }
    )
    answer = client.get_records(FLIGHTS, "iterator", 10)
    assert answer.records == [
        KinesisRecord(b"hello", "4955", "k", 1_700_000_000.123, "KMS"),
        KinesisRecord(b"", "4956"),
    ]
    assert answer.next_shard_iterator is None
    assert answer.millis_behind_latest == 12
    assert answer.child_shards == (ChildShard("shardId-2", ("shardId-0", "shardId-1"), HashKeyRange(0, MAX_HASH_KEY)),)
    assert answer.server_time_seconds == DATE_SECONDS
    assert answer.size_bytes == 5


@pytest.mark.parametrize("headers", [{}, {"Date": "yesterday"}])
def test_without_a_date_header_the_local_clock_is_taken(boto: Any, endpoint: Endpoint, headers: dict[str, str]) -> None:
    class Noon:
        def now_seconds(self) -> float:
            return 12.5

    client = Boto3KinesisClient(boto, "eu-west-1", clock=Noon())  # type: ignore[arg-type]
    endpoint.headers = headers
    endpoint.will_answer(EMPTY)
    assert client.get_records(FLIGHTS, "iterator", 10).server_time_seconds == 12.5


def maybe_null(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(strategy, st.none())


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
#: Members that a later version of the API may add.
unknown_members = st.dictionaries(st.from_regex(r"New[A-Z][a-z]{1,5}", fullmatch=True), json_values, max_size=2)
sequence_numbers = st.integers(1, 2**186).map(str)
hash_ranges = st.tuples(st.integers(0, MAX_HASH_KEY), st.integers(0, MAX_HASH_KEY)).map(
    lambda pair: {"StartingHashKey": str(min(pair)), "EndingHashKey": str(max(pair))}
)


@st.composite
def wire_records(draw: st.DrawFn) -> dict[str, Any]:
    record: dict[str, Any] = {
        "Data": base64.b64encode(draw(st.binary(max_size=40))).decode(),
        "SequenceNumber": draw(sequence_numbers),
    }
    seconds = st.integers(0, 2**42).map(lambda ms: ms / 1000) | st.integers(0, 2**33)
    for name, values in {
        "PartitionKey": st.text(min_size=1, max_size=10),
        "ApproximateArrivalTimestamp": seconds,
        "EncryptionType": st.sampled_from(["NONE", "KMS"]),
    }.items():
        if draw(st.booleans()):
            record[name] = draw(maybe_null(values))
    return {**draw(unknown_members), **record}


@st.composite
def wire_answers(draw: st.DrawFn) -> dict[str, Any]:
    answer: dict[str, Any] = {"Records": draw(st.lists(wire_records(), max_size=4))}
    child = st.fixed_dictionaries(
        {
            "ShardId": st.just("shardId-7"),
            "ParentShards": st.lists(st.just("shardId-1"), max_size=2),
            "HashKeyRange": hash_ranges,
        }
    )
    for name, values in {
        "NextShardIterator": st.text(min_size=1, max_size=10),
        "MillisBehindLatest": st.integers(0, 10**9),
        "ChildShards": st.lists(child, max_size=2),
    }.items():
        if draw(st.booleans()):
            answer[name] = draw(maybe_null(values))
    return {**draw(unknown_members), **answer}


def outcome(call: Callable[[], Any]) -> Any:
    """What a call gives, or the kind of error it raises, in a form that can be compared."""
    try:
        answer = call()
    except KinesisIOError as exc:
        return type(exc), getattr(exc, "code", "")
    slots = getattr(type(answer), "__slots__", None)
    return {name: getattr(answer, name) for name in slots} if slots else answer


@pytest.fixture(scope="module")
def both_ways() -> Iterator[tuple[Endpoint, Boto3KinesisClient, Boto3KinesisClient]]:
    endpoint = Endpoint()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ACCESS_KEY_ID", "test")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "test")
        config = ClientConfig(region="eu-west-1", endpoint_url=endpoint.url)
        fast, slow = config.connect(), without_fast_decoding(config.connect())
    yield endpoint, fast, slow
    endpoint.close()


@given(answer=wire_answers())
def test_fast_and_slow_decoding_give_equal_records(
    both_ways: tuple[Endpoint, Boto3KinesisClient, Boto3KinesisClient], answer: dict[str, Any]
) -> None:
    endpoint, fast, slow = both_ways
    endpoint.will_answer(answer)
    fast_outcome = outcome(lambda: fast.get_records(FLIGHTS, "i", 1))
    assert fast_outcome == outcome(lambda: slow.get_records(FLIGHTS, "i", 1))
    assert [r.data for r in fast_outcome["records"]] == [base64.b64decode(r["Data"]) for r in answer["Records"]]
    assert [r.partition_key for r in fast_outcome["records"]] == [r.get("PartitionKey") for r in answer["Records"]]
    assert fast_outcome["next_shard_iterator"] == answer.get("NextShardIterator")
    assert fast_outcome["millis_behind_latest"] == answer.get("MillisBehindLatest")
    assert len(fast_outcome["child_shards"]) == len(answer.get("ChildShards") or ())


@given(answer=wire_answers(), damage=st.data())
def test_damaged_answers_end_alike_both_ways(
    both_ways: tuple[Endpoint, Boto3KinesisClient, Boto3KinesisClient], answer: dict[str, Any], damage: st.DataObject
) -> None:
    """Any member replaced by anything: equal records or a KinesisIOError, never a bare Python error."""
    endpoint, fast, slow = both_ways
    target = damage.draw(st.sampled_from([answer, *answer["Records"]]))
    target[damage.draw(st.sampled_from(sorted(target)))] = damage.draw(json_values)
    endpoint.will_answer(answer)
    assert outcome(lambda: fast.get_records(FLIGHTS, "i", 1)) == outcome(lambda: slow.get_records(FLIGHTS, "i", 1))


@given(
    status=st.sampled_from([400, 403, 413, 429, 500, 503]),
    body=st.one_of(
        st.binary(max_size=20),
        json_values.map(lambda v: json.dumps(v).encode()),
        st.sampled_from(["InternalFailure", "x#AccessDeniedException", ""]).map(lambda c: error(c)[1]),
    ),
)
def test_no_error_body_escapes_as_a_bare_python_error(
    both_ways: tuple[Endpoint, Boto3KinesisClient, Boto3KinesisClient], status: int, body: bytes
) -> None:
    endpoint, fast, slow = both_ways
    endpoint.answers = [(status, body)]
    kind = outcome(lambda: fast.get_records(FLIGHTS, "i", 1))
    assert issubclass(kind[0], KinesisIOError)
    assert kind == outcome(lambda: slow.get_records(FLIGHTS, "i", 1))


# --- writing


@pytest.mark.parametrize("fast", [True, False])
def test_put_records_sends_the_entries_and_answers_in_their_order(
    client: Boto3KinesisClient, endpoint: Endpoint, fast: bool
) -> None:
    if not fast:
        without_fast_decoding(client)
    endpoint.will_answer(
        {
            "FailedRecordCount": 1,
            "EncryptionType": "NONE",
            "Records": [
                {"ShardId": "shardId-0", "SequenceNumber": "1"},
                {"ErrorCode": "ProvisionedThroughputExceededException", "ErrorMessage": "slow down"},
                {"ShardId": "shardId-1", "SequenceNumber": "2", "ErrorCode": None, "ErrorMessage": None},
            ],
        }
    )
    entries = (PutEntry(b"\x00\xff", "k"), PutEntry(b"", "\u00e9\U0001f600", "12"), PutEntry(b"x", None))
    assert client.put_records(FLIGHTS, entries) == [
        PutOutcome("shardId-0", "1"),
        PutOutcome(None, None, "ProvisionedThroughputExceededException", "slow down"),
        PutOutcome("shardId-1", "2"),
    ]
    assert endpoint.bodies() == [
        {
            "StreamName": "flights",
            "Records": [
                {"Data": "AP8=", "PartitionKey": "k"},
                {"Data": "", "PartitionKey": "\u00e9\U0001f600", "ExplicitHashKey": "12"},
                {"Data": "eA=="},
            ],
        }
    ]


@given(
    entries=st.lists(
        st.builds(
            PutEntry,
            st.binary(max_size=50),
            st.text(min_size=1, max_size=20),
            st.none() | st.integers(0, MAX_HASH_KEY).map(str),
        ),
        max_size=5,
    )
)
def test_our_request_says_what_botocores_would(
    both_ways: tuple[Endpoint, Boto3KinesisClient, Boto3KinesisClient], entries: list[PutEntry]
) -> None:
    endpoint, fast, _ = both_ways
    endpoint.requests.clear()
    endpoint.will_answer({"Records": [{"ShardId": "s", "SequenceNumber": "1"}] * len(entries)})
    fast.put_records(FLIGHTS, entries)
    serializer = fast._boto._serializer
    model = fast._boto.meta.service_model.operation_model("PutRecords")
    records = [
        {"Data": e.data, "PartitionKey": e.partition_key}
        | ({"ExplicitHashKey": e.explicit_hash_key} if e.explicit_hash_key is not None else {})
        for e in entries
    ]
    theirs = serializer.serialize_to_request({"StreamName": "flights", "Records": records}, model)
    assert endpoint.bodies() == [json.loads(theirs["body"])]


def test_fewer_results_than_records_is_a_transient_error(client: Boto3KinesisClient, endpoint: Endpoint) -> None:
    endpoint.will_answer({"FailedRecordCount": 0, "Records": [{"ShardId": "s", "SequenceNumber": "1"}]})
    with pytest.raises(TransientServiceError, match="1 results for 2 records"):
        client.put_records(FLIGHTS, [PutEntry(b"x", "k"), PutEntry(b"y", "k")])


def test_an_entrys_size_counts_the_key_in_utf8() -> None:
    assert PutEntry(b"abc", "\u00e9").size_bytes == 5
    assert PutEntry(b"abc", None).size_bytes == 3


def test_one_client_serves_many_threads(client: Boto3KinesisClient, endpoint: Endpoint) -> None:
    """Each thread's body goes with its own request."""
    endpoint.will_answer({"Records": [{"ShardId": "s", "SequenceNumber": "1"}]})
    with contextlib.ExitStack() as stack:
        for n in range(16):
            thread = threading.Thread(target=client.put_records, args=(FLIGHTS, [PutEntry(str(n).encode(), f"k{n}")]))
            thread.start()
            stack.callback(thread.join)
    sent = {(b["Records"][0]["PartitionKey"], base64.b64decode(b["Records"][0]["Data"])) for b in endpoint.bodies()}
    assert sent == {(f"k{n}", str(n).encode()) for n in range(16)}
