"""`LocalKinesis`: a `FakeKinesis` behind HTTP, for unmodified AWS clients in any process of this machine.

    with LocalKinesis(enforce_limits=True) as kinesis:
        kinesis.fake.create_stream("flights", shards=2)
        client = boto3.client("kinesis", **kinesis.client_kwargs())

It speaks what boto3 speaks: JSON 1.1, one request at a time on a connection that stays open. Signatures are not looked
at. It listens on the loopback interface only.
"""

from __future__ import annotations

import asyncio
import email.utils
import http
import re
import threading
import uuid
from types import TracebackType
from typing import Any, Final, TypedDict

import msgspec

from samza_kinesis_io.testing.fake import FakeKinesis
from samza_kinesis_io.testing.faults import DroppedConnection, FakeServiceError, Plan
from samza_kinesis_io.testing.service import Answer, EncodedRecords, Params

_HOST: Final = "127.0.0.1"
_TARGET: Final = re.compile(rb"\r\nx-amz-target:[ \t]*Kinesis_20131202\.(\w+)", re.IGNORECASE)
_LENGTH: Final = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.IGNORECASE)
_CHUNKED: Final = re.compile(rb"\r\ntransfer-encoding:[ \t]*chunked", re.IGNORECASE)
_CLOSE: Final = re.compile(rb"\r\nconnection:[ \t]*close", re.IGNORECASE)
_CONTINUE: Final = re.compile(rb"\r\nexpect:[ \t]*100-continue", re.IGNORECASE)
_MAX_HEAD_BYTES: Final = 64 * 1024


class _EntryBody(TypedDict, total=False):
    """What has bytes in it must be decoded by type: JSON has base64 text for them."""

    Data: bytes
    PartitionKey: str | None
    ExplicitHashKey: str | None


class _PutRecordBody(_EntryBody, total=False):
    StreamName: str | None
    StreamARN: str | None
    SequenceNumberForOrdering: str | None
    DryRun: bool | None


class _PutRecordsBody(TypedDict, total=False):
    Records: list[_EntryBody]
    StreamName: str | None
    StreamARN: str | None
    DryRun: bool | None


_encode = msgspec.json.Encoder().encode
_decoders: Final[dict[str, msgspec.json.Decoder[Any]]] = {
    "PutRecord": msgspec.json.Decoder(_PutRecordBody),
    "PutRecords": msgspec.json.Decoder(_PutRecordsBody),
}
_decoder_of_others: Final = msgspec.json.Decoder(dict[str, Any])


class LocalKinesis:
    """A context manager; the server runs in a thread of this process while it is entered.

    Args:
        fake: The service to put behind HTTP; None: a new one, made with `fake_options`.
        port: Where to listen; 0: a free port.

    Attributes:
        fake: The service itself, to create streams, arrange faults and look at records without HTTP.
    """

    def __init__(self, fake: FakeKinesis | None = None, port: int = 0, **fake_options: Any) -> None:
        if fake is not None and fake_options:
            raise ValueError(f"give either a fake or the options of a new one, got both: {sorted(fake_options)}")
        self.fake = fake if fake is not None else FakeKinesis(**fake_options)
        self._asked_port = port
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self._port = 0

    @property
    def endpoint_url(self) -> str:
        if not self._port:
            raise RuntimeError("LocalKinesis is not running; use it as a context manager or call start()")
        return f"http://{_HOST}:{self._port}"

    def client_kwargs(self) -> dict[str, str]:
        """Return what boto3.client("kinesis", ...) needs to come here, whatever AWS settings this machine has."""
        return {
            "endpoint_url": self.endpoint_url,
            "region_name": self.fake.region,
            "aws_access_key_id": "test",
            "aws_secret_access_key": "test",
        }

    def start(self) -> None:
        """Listen, from now on. `with` does it for you.

        Raises:
            OSError: the port is taken.
        """
        if self._loop is not None:
            raise RuntimeError("LocalKinesis is running already")
        loop = asyncio.new_event_loop()
        try:
            server = loop.run_until_complete(
                loop.create_server(lambda: _Connection(self.fake, loop, self._connections), _HOST, self._asked_port)
            )
        except BaseException:
            loop.close()
            raise
        self._server = server
        self._port = server.sockets[0].getsockname()[1]
        self._loop = loop
        self._thread = threading.Thread(target=loop.run_forever, name="LocalKinesis", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening and drop every connection. Idempotent; the fake and its records stay."""
        if self._loop is None or self._thread is None:
            return
        loop, self._loop = self._loop, None
        loop.call_soon_threadsafe(self._drop_everything, loop)
        self._thread.join()
        loop.close()
        self._port = 0

    def _drop_everything(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.abort()
        # Behind the callbacks in which the transports close their sockets.
        loop.call_soon(loop.call_soon, loop.stop)

    def __enter__(self) -> LocalKinesis:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Connection(asyncio.Protocol):
    """One connection: requests are answered in order, the next one only when the one before has its answer."""

    def __init__(self, fake: FakeKinesis, loop: asyncio.AbstractEventLoop, connections: set[_Connection]) -> None:
        self._fake = fake
        self._loop = loop
        self._connections = connections
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._head: bytes | None = None
        self._body_length = 0
        self._delayed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._connections.discard(self)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._received += data
        self._answer_what_is_there()

    def _answer_what_is_there(self) -> None:
        while self._transport is not None and not self._transport.is_closing() and not self._delayed:
            if self._head is None and not self._take_head():
                return
            if len(self._received) < self._body_length:
                return
            assert self._head is not None
            head, self._head = self._head, None
            body = bytes(memoryview(self._received)[: self._body_length])
            del self._received[: self._body_length]
            self._answer(head, body)

    def _take_head(self) -> bool:
        """Take the next request's head off what was received; return whether it is there whole."""
        assert self._transport is not None
        end = self._received.find(b"\r\n\r\n", 0, _MAX_HEAD_BYTES)
        if end < 0:
            if len(self._received) >= _MAX_HEAD_BYTES:
                self._transport.abort()
            return False
        head = bytes(self._received[: end + 2])
        del self._received[: end + 4]
        length = _LENGTH.search(head)
        self._head, self._body_length = head, int(length[1]) if length else 0
        if _CONTINUE.search(head):
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return True

    def _answer(self, head: bytes, body: bytes) -> None:
        target = _TARGET.search(head)
        if _CHUNKED.search(head):
            self._send(head, http.HTTPStatus.LENGTH_REQUIRED, b"", close=True)
            return
        if not head.startswith(b"POST "):
            self._send(head, http.HTTPStatus.OK, b"LocalKinesis is running.\n")
            return
        operation = target[1].decode() if target else ""
        try:
            try:
                params: Params = _decoders.get(operation, _decoder_of_others).decode(body or b"{}")
            except msgspec.MsgspecError as error:
                raise FakeServiceError("SerializationException", str(error)) from None
            plan = self._fake.arrive(operation, params)
        except FakeServiceError as error:
            self._send_error(head, error)
            return
        if plan.delay_seconds > 0:
            self._delayed = True
            # Not in an executor, whose threads the interpreter would wait for at its end.
            threading.Thread(target=self._delay, args=(head, operation, params, plan), daemon=True).start()
        else:
            self._perform(head, operation, params, plan)

    def _delay(self, head: bytes, operation: str, params: Params, plan: Plan) -> None:
        self._fake.clock.sleep(plan.delay_seconds)
        try:
            self._loop.call_soon_threadsafe(self._perform_late, head, operation, params, plan)
        except RuntimeError:
            return  # closed meanwhile

    def _perform_late(self, head: bytes, operation: str, params: Params, plan: Plan) -> None:
        self._delayed = False
        self._perform(head, operation, params, plan)
        self._answer_what_is_there()

    def _perform(self, head: bytes, operation: str, params: Params, plan: Plan) -> None:
        try:
            answer = self._fake.perform(operation, params, plan)
        except FakeServiceError as error:
            self._send_error(head, error)
        except DroppedConnection:
            self.abort()
        except Exception as error:  # an error of ours must not look like a hanging service
            self._send_error(head, FakeServiceError("InternalFailure", f"LocalKinesis failed: {error!r}", 500))
            raise
        else:
            self._send(head, http.HTTPStatus.OK, _body(answer))

    def _send_error(self, head: bytes, error: FakeServiceError) -> None:
        body = _encode({"__type": error.code, "message": error.message})
        self._send(head, http.HTTPStatus(error.status), body, b"x-amzn-ErrorType: %s\r\n" % error.code.encode())

    def _send(
        self, head: bytes, status: http.HTTPStatus, body: bytes, headers: bytes = b"", close: bool = False
    ) -> None:
        if self._transport is None:
            return
        self._transport.write(
            b"HTTP/1.1 %d %s\r\n"
            b"Content-Type: application/x-amz-json-1.1\r\n"
            b"Content-Length: %d\r\n"
            b"Date: %s\r\n"
            b"x-amzn-RequestId: %s\r\n"
            b"%s\r\n%s"
            % (
                status.value,
                status.phrase.encode(),
                len(body),
                # Whole seconds, rounded down.
                email.utils.formatdate(int(self._fake.clock.now_seconds()), usegmt=True).encode(),
                str(uuid.uuid4()).encode(),
                headers,
                body,
            )
        )
        if close or _CLOSE.search(head):
            self._transport.close()


def _body(answer: Answer | EncodedRecords) -> bytes:
    if isinstance(answer, EncodedRecords):
        # The records are JSON already; what else there is follows in the same object.
        return b'{"Records":[%s],%s' % (b",".join(answer.pieces), _encode(answer.rest)[1:])
    return _encode(answer)
