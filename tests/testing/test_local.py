"""LocalKinesis: an unmodified boto3 client cannot tell it from the service."""

from __future__ import annotations

import contextlib
import datetime
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import boto3
import botocore.exceptions
import pytest
from botocore.config import Config
from testing.calls import assert_could_be_the_services

from samza_kinesis_io.testing import FakeKinesis, LocalKinesis, SimulatedClock

START = 1_700_000_000.0
SHARD = "shardId-000000000000"


@pytest.fixture
def local() -> Iterator[LocalKinesis]:
    with LocalKinesis(clock=SimulatedClock(START)) as local:
        local.fake.create_stream("s")
        yield local


def connect(local: LocalKinesis, attempts: int = 1) -> Any:
    return boto3.client(
        "kinesis", **local.client_kwargs(), config=Config(retries={"total_max_attempts": attempts}, read_timeout=10)
    )


@pytest.fixture
def client(local: LocalKinesis) -> Any:
    return connect(local)


def post(local: LocalKinesis, body: bytes, target: str = "Kinesis_20131202.ListStreams", **headers: str) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", int(local.endpoint_url.rpartition(":")[2]), timeout=10)
    connection.request("POST", "/", body, {"X-Amz-Target": target, **headers})
    answer = connection.getresponse()
    return answer, answer.read()


def test_records_go_in_and_come_out_as_bytes(local: LocalKinesis, client: Any) -> None:
    records = [{"Data": bytes(range(256)) * (i % 3), "PartitionKey": f'k"\\ü{i}'} for i in range(500)]
    put = client.put_records(StreamName="s", Records=records)
    assert_could_be_the_services("PutRecords", put)
    at = client.get_shard_iterator(StreamName="s", ShardId=SHARD, ShardIteratorType="TRIM_HORIZON")["ShardIterator"]
    answer = client.get_records(ShardIterator=at)
    assert_could_be_the_services("GetRecords", answer)
    assert [(r["Data"], r["PartitionKey"]) for r in answer["Records"]] == [
        (r["Data"], r["PartitionKey"]) for r in records
    ]
    assert [r["SequenceNumber"] for r in answer["Records"]] == [o["SequenceNumber"] for o in put["Records"]]
    arrived = answer["Records"][0]["ApproximateArrivalTimestamp"]
    assert arrived == datetime.datetime.fromtimestamp(START, datetime.timezone.utc)


def test_every_operation_answers_over_http_as_it_does_in_process(local: LocalKinesis, client: Any) -> None:
    arn = "arn:aws:kinesis:us-east-1:123456789012:stream/s"
    for operation, method, params in (
        ("CreateStream", "create_stream", {"StreamName": "t", "ShardCount": 2}),
        ("ListStreams", "list_streams", {}),
        ("PutRecord", "put_record", {"StreamName": "s", "Data": b"", "PartitionKey": "k"}),
        ("SplitShard", "split_shard", {"StreamName": "s", "ShardToSplit": SHARD, "NewStartingHashKey": "9"}),
        ("DescribeStream", "describe_stream", {"StreamARN": arn}),
        ("DescribeStreamSummary", "describe_stream_summary", {"StreamARN": arn}),
        ("ListShards", "list_shards", {"StreamName": "s"}),
        (
            "UpdateShardCount",
            "update_shard_count",
            {"StreamName": "t", "TargetShardCount": 3, "ScalingType": "UNIFORM_SCALING"},
        ),
        ("UpdateMaxRecordSize", "update_max_record_size", {"StreamARN": arn, "MaxRecordSizeInKiB": 2048}),
        ("DeleteStream", "delete_stream", {"StreamName": "t"}),
    ):
        assert_could_be_the_services(operation, getattr(client, method)(**params))
    assert [s.hash_key_range.start for s in local.fake.shards("s")] == [0, 0, 9]


def test_the_end_of_a_shard_reaches_the_client(local: LocalKinesis, client: Any) -> None:
    local.fake.put("s", b"x")
    local.fake.split("s", SHARD)
    at = client.get_shard_iterator(StreamName="s", ShardId=SHARD, ShardIteratorType="TRIM_HORIZON")["ShardIterator"]
    answer = client.get_records(ShardIterator=at)
    assert [r["Data"] for r in answer["Records"]] == [b"x"]
    assert "NextShardIterator" not in answer
    assert len(answer["ChildShards"]) == 2


def test_errors_have_the_services_codes_and_statuses(local: LocalKinesis, client: Any) -> None:
    with pytest.raises(client.exceptions.ResourceNotFoundException) as not_found:
        client.list_shards(StreamName="none")
    assert not_found.value.response["Error"]["Message"] == "Stream none under account 123456789012 not found."
    local.fake.faults.internal_failure("ListShards")
    with pytest.raises(botocore.exceptions.ClientError) as failure:
        client.list_shards(StreamName="s")
    assert failure.value.response["ResponseMetadata"]["HTTPStatusCode"] == 500
    assert failure.value.response["Error"]["Code"] == "InternalFailureException"


def test_the_date_header_is_the_fakes_time_in_whole_seconds(local: LocalKinesis, client: Any) -> None:
    local.fake.clock.sleep(1.9)
    headers = client.list_streams()["ResponseMetadata"]["HTTPHeaders"]
    assert headers["date"] == "Tue, 14 Nov 2023 22:13:21 GMT"
    assert headers["x-amzn-requestid"]


@pytest.mark.parametrize(("moment", "written"), [("before", 0), ("after", 1)])
def test_a_dropped_connection_is_a_closed_socket(local: LocalKinesis, client: Any, moment: Any, written: int) -> None:
    local.fake.faults.drop_connection("PutRecord", moment=moment)
    with pytest.raises(botocore.exceptions.ConnectionClosedError):
        client.put_record(StreamName="s", Data=b"x", PartitionKey="k")
    assert len(local.fake.records("s")) == written
    client.put_record(StreamName="s", Data=b"x", PartitionKey="k")


def test_a_client_that_retries_writes_again_what_was_written_but_not_answered(local: LocalKinesis) -> None:
    local.fake.faults.drop_connection("PutRecord", moment="after")
    connect(local, attempts=2).put_record(StreamName="s", Data=b"x", PartitionKey="k")
    assert len(local.fake.records("s")) == 2


def test_a_delayed_call_keeps_no_other_client_waiting() -> None:
    """The delayed call's time comes only after the other call has its answer."""
    clock = SimulatedClock(START, autojump=False)
    with LocalKinesis(clock=clock) as local:
        local.fake.faults.delay("ListStreams", 5)
        answered: list[Any] = []
        slow = threading.Thread(target=lambda: answered.append(connect(local).list_streams()))
        slow.start()
        while not local.fake.calls["ListStreams"]:
            pass
        with pytest.raises(botocore.exceptions.ClientError, match="Stream none"):
            connect(local).describe_stream_summary(StreamName="none")
        assert not answered
        while slow.is_alive():
            clock.advance(1)
        assert answered


def test_a_connection_stays_open_for_many_requests(local: LocalKinesis) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", int(local.endpoint_url.rpartition(":")[2]), timeout=10)
    ports = set()
    for _ in range(3):
        connection.request("POST", "/", b"{}", {"X-Amz-Target": "Kinesis_20131202.ListStreams"})
        connection.getresponse().read()
        assert connection.sock is not None
        ports.add(connection.sock.getsockname())
    assert len(ports) == 1


def test_a_request_may_arrive_byte_by_byte_and_two_may_arrive_at_once(local: LocalKinesis) -> None:
    request = b'POST / HTTP/1.1\r\nX-Amz-Target: Kinesis_20131202.ListStreams\r\nContent-Length: 11\r\n\r\n{"Limit":1}'
    with socket.create_connection(("127.0.0.1", int(local.endpoint_url.rpartition(":")[2])), timeout=10) as sock:
        for i in range(len(request)):
            sock.sendall(request[i : i + 1])
        sock.sendall(request * 2)
        received = b""
        while received.count(b'"StreamNames":["s"]') < 3:
            received += sock.recv(65536)
    assert received.count(b"HTTP/1.1 200 OK") == 3


def exchange(local: LocalKinesis, request: bytes) -> bytes:
    """Send bytes; return what comes back until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", int(local.endpoint_url.rpartition(":")[2])), timeout=10) as sock:
        sock.sendall(request)
        received = b""
        while piece := sock.recv(65536):
            received += piece
    return received


LIST = b"POST / HTTP/1.1\r\nX-Amz-Target: Kinesis_20131202.ListStreams\r\nContent-Length: 2\r\n"


def test_the_connection_is_closed_when_the_client_asks(local: LocalKinesis) -> None:
    received = exchange(local, LIST + b"Connection: close\r\n\r\n{}")
    assert received.startswith(b"HTTP/1.1 200 OK")


def test_a_client_that_waits_to_send_its_body_is_told_to_go_on(local: LocalKinesis) -> None:
    received = exchange(local, LIST + b"Expect: 100-continue\r\nConnection: close\r\n\r\n{}")
    assert received.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK")


def test_a_chunked_body_is_refused(local: LocalKinesis) -> None:
    received = exchange(local, b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 411 ")


def test_a_head_without_end_is_cut_off(local: LocalKinesis) -> None:
    with contextlib.suppress(ConnectionError):
        assert not exchange(local, b"POST / HTTP/1.1\r\nX: " + b"x" * 100_000)


def test_answers_keep_the_order_of_requests_though_the_first_is_delayed(local: LocalKinesis) -> None:
    local.fake.faults.delay("ListStreams", 1)
    second = b"POST / HTTP/1.1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    received = exchange(local, LIST + b"\r\n{}" + second)
    assert received.index(b'"StreamNames"') < received.index(b"UnknownOperationException")


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"StreamName":"s","Records":[{"Data":"!!"}]}', b'{"Records":3}'])
def test_a_body_that_is_no_request_is_refused(local: LocalKinesis, body: bytes) -> None:
    answer, text = post(local, body, "Kinesis_20131202.PutRecords")
    assert answer.status == 400
    assert json.loads(text)["__type"] == "SerializationException"
    assert answer.headers["x-amzn-ErrorType"] == "SerializationException"


def test_an_operation_of_another_service_is_refused(local: LocalKinesis) -> None:
    for target in ("DynamoDB_20120810.ListTables", "Kinesis_20131202.CreateQueue"):
        answer, text = post(local, b"{}", target)
        assert (answer.status, json.loads(text)["__type"]) == (400, "UnknownOperationException")


def test_it_tells_a_browser_that_it_runs(local: LocalKinesis) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", int(local.endpoint_url.rpartition(":")[2]), timeout=10)
    connection.request("GET", "/")
    assert connection.getresponse().status == 200


def test_an_asked_port_is_taken_and_free_again_afterwards() -> None:
    with LocalKinesis() as first:
        port = int(first.endpoint_url.rpartition(":")[2])
        with pytest.raises(OSError, match="ddress already in use"), LocalKinesis(port=port):
            pass
    with LocalKinesis(port=port) as second:
        assert second.endpoint_url == f"http://127.0.0.1:{port}"


def test_closing_drops_connections_and_keeps_the_records(local: LocalKinesis, client: Any) -> None:
    client.put_record(StreamName="s", Data=b"x", PartitionKey="k")
    local.close()
    local.close()
    with pytest.raises(botocore.exceptions.EndpointConnectionError):
        client.list_streams()
    assert [r.data for r in local.fake.records("s")] == [b"x"]
    with pytest.raises(RuntimeError, match="not running"):
        local.endpoint_url  # noqa: B018
    local.start()
    with pytest.raises(RuntimeError, match="running already"):
        local.start()


def test_a_fake_has_its_own_options() -> None:
    with pytest.raises(ValueError, match=r"either a fake or the options .* \['seed'\]"):
        LocalKinesis(FakeKinesis(), seed=1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_it_is_interrupted(number: signal.Signals) -> None:
    command = [sys.executable, "-m", "samza_kinesis_io.testing", "--port", "0", "--stream", "a:2", "--stream", "b"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        settings = {}
        while "AWS_DEFAULT_REGION" not in settings:
            line = process.stdout.readline()
            if line.startswith("export "):
                settings.update(pair.split("=", 1) for pair in line.removeprefix("export ").split())
        client = boto3.client(
            "kinesis",
            endpoint_url=settings["AWS_ENDPOINT_URL_KINESIS"],
            region_name=settings["AWS_DEFAULT_REGION"],
            aws_access_key_id=settings["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=settings["AWS_SECRET_ACCESS_KEY"],
        )
        counts = {
            name: client.describe_stream_summary(StreamName=name)["StreamDescriptionSummary"]["OpenShardCount"]
            for name in client.list_streams()["StreamNames"]
        }
        assert counts == {"a": 2, "b": 1}
    finally:
        process.send_signal(number)
        assert process.wait(20) == 0
        process.stdout.close()


@pytest.mark.parametrize("stream", [":2", "a:0", "a:x"])
def test_the_command_refuses_a_stream_without_name_or_shards(stream: str, capsys: pytest.CaptureFixture[str]) -> None:
    from samza_kinesis_io.testing.__main__ import main

    with pytest.raises(SystemExit):
        main(["--stream", stream])
    assert "must be NAME or NAME:SHARDS" in capsys.readouterr().err
