"""What the contract is run against: our fake in process, our fake over HTTP, and two emulators by other people.

All take the same calls, as boto3 takes them, and give the same answers, as boto3 gives them, except that timestamps
may be numbers (seconds since the epoch).
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol
from urllib.error import HTTPError
from urllib.request import urlopen

import boto3
import botocore.config
import botocore.exceptions
import botocore.utils
import pytest

from samza_kinesis_io.testing import FakeKinesis, FakeServiceError, LocalKinesis, SimulatedClock
from tiers import kinesis_local

#: Where the fakes and kinesis-local stay in CREATING and UPDATING; long enough to be seen, short enough to wait for.
_TRANSITION_SECONDS = 0.05


class ServiceError(Exception):
    """The target answered with an error."""

    def __init__(self, operation: str, code: str, message: str, status: int) -> None:
        super().__init__(f"{operation}: HTTP {status}, {code}: {message}")
        self.code = code
        self.message = message
        self.status = status


class Target(Protocol):
    name: str

    def call(self, operation: str, params: dict[str, Any]) -> dict[str, Any]:
        """Raises ServiceError."""
        ...

    def let_pass(self, seconds: float) -> None:
        """Let time pass, the target's own."""
        ...


class InProcess:
    """FakeKinesis, called directly."""

    name = "FakeKinesis"

    def __init__(self) -> None:
        self.clock = SimulatedClock()
        self._fake = FakeKinesis(clock=self.clock, transition_seconds=_TRANSITION_SECONDS)

    def call(self, operation: str, params: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._fake.call(operation, params)
        except FakeServiceError as exc:
            raise ServiceError(operation, exc.code, exc.message, exc.status) from exc

    def let_pass(self, seconds: float) -> None:
        self.clock.advance(seconds)


class OverHttp:
    """Anything with an endpoint, through an unmodified boto3 client."""

    def __init__(self, name: str, endpoint_url: str, let_pass: Callable[[float], None] = time.sleep) -> None:
        self.name = name
        self.endpoint_url = endpoint_url
        self.let_pass = let_pass
        self._client = boto3.Session(
            aws_access_key_id="test", aws_secret_access_key="test", region_name="us-east-1"
        ).client(
            "kinesis",
            endpoint_url=endpoint_url,
            # What the service refuses must reach the target, and each call once.
            config=botocore.config.Config(parameter_validation=False, retries={"total_max_attempts": 1}),
        )

    def call(self, operation: str, params: dict[str, Any]) -> dict[str, Any]:
        try:
            return dict(getattr(self._client, botocore.xform_name(operation))(**params))
        except botocore.exceptions.ClientError as exc:
            error = exc.response["Error"]
            status = exc.response["ResponseMetadata"]["HTTPStatusCode"]
            raise ServiceError(operation, error.get("Code", ""), error.get("Message", ""), status) from exc


@contextlib.contextmanager
def in_process() -> Iterator[Target]:
    yield InProcess()


@contextlib.contextmanager
def local_kinesis() -> Iterator[Target]:
    clock = SimulatedClock()
    with LocalKinesis(FakeKinesis(clock=clock, transition_seconds=_TRANSITION_SECONDS)) as server:
        yield OverHttp("LocalKinesis", server.endpoint_url, clock.advance)


@contextlib.contextmanager
def kinesis_local_process() -> Iterator[Target]:
    command = kinesis_local()
    plain, tls = _free_port(), _free_port()
    durations = ("CREATE_STREAM", "DELETE_STREAM", "SPLIT_SHARD", "MERGE_SHARDS", "UPDATE_SHARD_COUNT")
    environment = {
        **os.environ,
        **{f"{name}_DURATION": "50ms" for name in durations},
        "KINESIS_MOCK_PLAIN_PORT": str(plain),
        "KINESIS_MOCK_TLS_PORT": str(tls),
        "KINESIS_MOCK_CERT_PATH": str(os.path.join(os.path.dirname(command[1]), "server.json")),
        "SHARD_LIMIT": "1000",
        "LOG_LEVEL": "ERROR",
    }
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_until_it_answers(f"http://127.0.0.1:{plain}/healthcheck", process)
        yield OverHttp("kinesis-local", f"http://127.0.0.1:{plain}")
    finally:
        process.kill()  # it has no state, and on SIGTERM it waits for its clients to leave
        process.wait()


@contextlib.contextmanager
def moto_server() -> Iterator[Target]:
    server_module = pytest.importorskip("moto.server", reason="pip install 'moto[server]'")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # one line per request
    try:
        host, port = server.get_host_and_port()
        yield OverHttp("moto", f"http://{host}:{port}")
    finally:
        server.stop()


#: By name; the first two need Python alone and nothing that listens outside this process.
TARGETS: dict[str, Callable[[], contextlib.AbstractContextManager[Target]]] = {
    "FakeKinesis": in_process,
    "LocalKinesis": local_kinesis,
    "kinesis-local": kinesis_local_process,
    "moto": moto_server,
}


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _wait_until_it_answers(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while not _answers(url):
        assert process.poll() is None, f"kinesis-local ended with status {process.returncode} before it answered"
        assert time.monotonic() < deadline, f"kinesis-local does not answer at {url} after 30 s"
        time.sleep(0.05)


def _answers(url: str) -> bool:
    try:
        urlopen(url, timeout=5).close()
    except HTTPError:
        return True  # any answer will do
    except OSError:
        return False
    return True
