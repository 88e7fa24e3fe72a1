"""`WriteToKinesis`: a PCollection into a stream, and what became of each element.

    result = messages | WriteToKinesis("delays", partition_key=lambda m: m.carrier, serializer=encode)
    result.written     # a WrittenRecord for every element that Kinesis has taken
    result.failed      # with dead_letters=True: a FailedRecord for every element that it never will

At least once: a bundle ends well only after Kinesis has acknowledged everything in it; a bundle that is run again
writes its records again.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Final

import apache_beam as beam
import msgspec
from apache_beam import coders, pvalue
from apache_beam.metrics import Metrics
from apache_beam.utils.windowed_value import WindowedValue

from samza_kinesis_io import metrics
from samza_kinesis_io.batching import Aggregated, Aggregator
from samza_kinesis_io.client import ClientConfig, ClientFactory, PutEntry, StreamId
from samza_kinesis_io.clock import Clock, SystemClock
from samza_kinesis_io.errors import ConfigurationError, KinesisIOError, RecordRefused
from samza_kinesis_io.limits import (
    DEFAULT_MAX_RECORD_BYTES,
    MAX_HASH_KEY,
    MAX_PARTITION_KEY_CHARACTERS,
    MAX_RECORD_BYTES,
    MAX_RECORDS_PER_PUT,
    MIB,
)
from samza_kinesis_io.producer import (
    DEFAULT_DELIVERY_TIMEOUT_SECONDS,
    Delivery,
    KinesisSystemProducer,
    ProducerOptions,
    shared_producer,
)
from samza_kinesis_io.records import OutgoingRecord

_FAILED: Final = "failed"
#: `process` hands on what has been acknowledged so far whenever this many have; the rest in `finish_bundle`.
_EMIT_RECORDS: Final = 500
_MAX_PARTITION_KEY_BYTES: Final = 4 * MAX_PARTITION_KEY_CHARACTERS
#: A bundle's records are handed to the producer when they fill a request, are so many bytes, or wait for so long.
_GATHERED_BYTES: Final = 1 * MIB
_GATHERING_SECONDS: Final = 0.1
_MAX_HASH_KEY_DIGITS: Final = len(str(MAX_HASH_KEY))


class WrittenRecord(msgspec.Struct, frozen=True, gc=False):
    """An element that Kinesis has taken.

    Attributes:
        element: The element as it came into the sink.
        stream: The stream's name.
        shard_id, sequence_number: Where it is.
        sub_sequence_number: Its place in an aggregate, from 0; 0 for a plain record.
    """

    element: Any
    stream: str
    shard_id: str
    sequence_number: str
    sub_sequence_number: int = 0


class FailedRecord(msgspec.Struct, frozen=True, gc=False):
    """An element that Kinesis will never take.

    Attributes:
        element: The element as it came into the sink.
        stream: The stream's name; empty if even that could not be found out.
        code: "RecordTooLarge", "InvalidPartitionKey", "InvalidExplicitHashKey", "InvalidData", "InvalidStream" and
            "SerializationFailed" are ours, found before sending; others are the service's.
        message: Why, in words.
        attempts: Requests it was part of; 0: it was not sent.
    """

    element: Any
    stream: str
    code: str
    message: str
    attempts: int


class _OutcomeCoder(coders.Coder):
    """Wire form: a tuple of the fields, by Beam's own coder for primitives, which pickles what it does not know."""

    outcome: type[WrittenRecord] | type[FailedRecord]

    def __init__(self) -> None:
        self._tuples = coders.FastPrimitivesCoder()

    def encode(self, value: WrittenRecord | FailedRecord) -> bytes:
        encoded: bytes = self._tuples.encode(msgspec.structs.astuple(value))
        return encoded

    def decode(self, encoded: bytes) -> WrittenRecord | FailedRecord:
        return self.outcome(*self._tuples.decode(encoded))

    def is_deterministic(self) -> bool:
        return False

    def to_type_hint(self) -> type[WrittenRecord] | type[FailedRecord]:
        return self.outcome

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), ())

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    def __hash__(self) -> int:
        return hash(type(self))


class WrittenRecordCoder(_OutcomeCoder):
    outcome = WrittenRecord


class FailedRecordCoder(_OutcomeCoder):
    outcome = FailedRecord


coders.registry.register_coder(WrittenRecord, WrittenRecordCoder)
coders.registry.register_coder(FailedRecord, FailedRecordCoder)


class WriteResult:
    """What `WriteToKinesis` gives. For `beam.transforms.util.WaitOn` wait on `written`."""

    def __init__(
        self,
        written: pvalue.PCollection[WrittenRecord],
        failed: pvalue.PCollection[FailedRecord] | None,
        tell: Callable[[], None] = lambda: None,
    ) -> None:
        self._written = written
        self._failed = failed
        self._tell = tell

    @property
    def written(self) -> pvalue.PCollection[WrittenRecord]:
        """One element per acknowledged element, in the element's windows and with its timestamp.

        Ask before the pipeline runs: it is made only if somebody asks, since it costs as much as the writing.
        """
        self._tell()
        return self._written

    @property
    def failed(self) -> pvalue.PCollection[FailedRecord]:
        """One element per element that Kinesis will never take, in its windows and with its timestamp.

        Raises:
            ConfigurationError: the sink was built without `dead_letters=True`: such an element fails the pipeline.
        """
        if self._failed is None:
            raise ConfigurationError(
                "result.failed needs WriteToKinesis(..., dead_letters=True); with dead_letters=False "
                "a record that cannot be sent fails the pipeline"
            )
        return self._failed


class WriteToKinesis(beam.PTransform[Any, WriteResult]):
    """Write `bytes`, `OutgoingRecord`s, or whatever `serializer` turns into one of them.

    An element is written once whatever the number of its windows. What an `OutgoingRecord` says of key, hash key and
    stream goes before the options.
    """

    def __init__(
        self,
        stream: str | Callable[[Any], str],
        *,
        partition_key: str | Callable[[Any], str] | None = None,
        explicit_hash_key: str | int | Callable[[Any], str | int | None] | None = None,
        serializer: Callable[[Any], bytes | OutgoingRecord] | None = None,
        ordered: bool = False,
        aggregate: bool = False,
        dead_letters: bool = False,
        client: ClientFactory | None = None,
        max_record_bytes: int | None = None,
        max_in_flight_bytes: int = 64 * MIB,
        linger_seconds: float = 0.005,
        request_threads: int = 8,
        delivery_timeout_seconds: float = DEFAULT_DELIVERY_TIMEOUT_SECONDS,
        clock: Clock | None = None,
        rng: random.Random | None = None,
    ) -> None:
        """Check everything that can be checked without asking Kinesis.

        Args:
            stream: A name, an ARN, or a function that gives one for each element.
            partition_key: 1-256 characters, or a function of the element. None: a random key for each record.
            explicit_hash_key: 0 to 2^128-1, or a function of the element (None: none for this one).
            serializer: A function that turns an element into `bytes` or an `OutgoingRecord`.
            ordered: Keep the order of the records of one partition key: a record is sent only after Kinesis has
                acknowledged the one before. Records of different keys travel together as ever. Within a worker
                process, and of elements that arrive in order: a runner may share a PCollection out as it likes.
            aggregate: Put the records of one hash key together, in the KPL's format: many small records then cost as
                few large ones. Readers must know the format, as `ReadFromKinesis`, the KCL and Lambda do. Not on
                streams with automatic distribution. It needs kinesis:DescribeStreamSummary, and keys that recur.
            dead_letters: Send elements that Kinesis can never take to `result.failed`, instead of failing the
                pipeline. What could be taken later (throttles, outages, missing permissions) never goes there.
            client: How to reach Kinesis; see `ClientConfig`.
            max_record_bytes: Data and key together. None: the stream's own limit.
            max_in_flight_bytes, linger_seconds, request_threads: See `ProducerOptions`. Sinks with equal options share
                a producer, so the bound is for all of them together.
            delivery_timeout_seconds: For how long a record is tried before its bundle fails with `DeliveryFailed`.
            clock, rng: Time and chance, for tests.

        Raises:
            ConfigurationError: an option is wrong.
        """
        super().__init__()
        for option, value in (("ordered", ordered), ("aggregate", aggregate), ("dead_letters", dead_letters)):
            if not isinstance(value, bool):
                raise ConfigurationError(f"{option} must be True or False, got {value!r}")
        if serializer is not None and not callable(serializer):
            raise ConfigurationError(f"serializer must be a function of the element, got {serializer!r}")
        if not _is_number(delivery_timeout_seconds) or delivery_timeout_seconds <= 0:
            raise ConfigurationError(f"delivery_timeout_seconds must be > 0, got {delivery_timeout_seconds!r}")
        if max_record_bytes is not None and not (
            isinstance(max_record_bytes, int) and 1 <= max_record_bytes <= MAX_RECORD_BYTES
        ):
            raise ConfigurationError(
                f"max_record_bytes must be between 1 and {MAX_RECORD_BYTES}, or None for the stream's own limit, "
                f"got {max_record_bytes!r}"
            )
        client = ClientConfig() if client is None else client
        if not callable(getattr(client, "connect", None)) or client.__hash__ is None:
            raise ConfigurationError(
                f"client must be a ClientConfig (or have its connect(), and be hashable), got {client!r}"
            )
        self._settings = _Settings(
            routing=Routing.checked(
                stream=stream, partition_key=partition_key, explicit_hash_key=explicit_hash_key, serializer=serializer,
                ordered=ordered,
            ),
            aggregate=aggregate,
            dead_letters=dead_letters,
            client=client,
            options=ProducerOptions(
                max_in_flight_bytes=max_in_flight_bytes, linger_seconds=linger_seconds, request_threads=request_threads
            ),
            delivery_timeout_seconds=float(delivery_timeout_seconds),
            max_record_bytes=max_record_bytes,
            clock=clock,
            rng=rng,
        )  # fmt: skip
        self._error_handler: Any = None

    def with_error_handler(self, error_handler: Any) -> WriteToKinesis:
        """Give failed records to a `beam` error handler (see `apache_beam.transforms.error_handling`); None: do not."""
        self._error_handler = error_handler
        return self

    def expand(self, input_or_inputs: pvalue.PCollection[Any]) -> WriteResult:
        settings = replace(self._settings, dead_letters=self._settings.dead_letters or self._error_handler is not None)
        if not settings.dead_letters:
            write = beam.ParDo(_SilentWriteFn(settings)).with_output_types(WrittenRecord)

            def tell() -> None:
                # The pipeline is made into its portable form when it is run, so the DoFn can still be another one.
                write.fn = _WriteFn(settings)

            return WriteResult(input_or_inputs | "PutRecords" >> write, None, tell)
        write = beam.ParDo(_WriteFn(settings)).with_output_types(WrittenRecord)
        outputs = input_or_inputs | "PutRecords" >> write.with_outputs(_FAILED, main="written")
        failed = outputs[_FAILED]
        failed.element_type = FailedRecord
        if self._error_handler is not None:
            self._error_handler.add_error_pcollection(failed)
        return WriteResult(outputs["written"], failed)

    def display_data(self) -> dict[str, Any]:
        settings = self._settings
        return {
            "stream": settings.routing.describe_stream(),
            "ordered": settings.routing.ordered,
            "aggregate": settings.aggregate,
            "dead_letters": settings.dead_letters,
        }


@dataclass(frozen=True)
class Routing:
    """From an element to a stream and an entry. Pure, but for the user's own functions and the random key."""

    stream: StreamId | Callable[[Any], str]
    partition_key: str | Callable[[Any], str] | None
    explicit_hash_key: str | Callable[[Any], str | int | None] | None
    serializer: Callable[[Any], bytes | OutgoingRecord] | None
    ordered: bool

    @classmethod
    def checked(
        cls,
        *,
        stream: object,
        partition_key: object,
        explicit_hash_key: object,
        serializer: Callable[[Any], bytes | OutgoingRecord] | None,
        ordered: bool,
    ) -> Routing:
        """Return the routing, with every constant checked.

        Raises:
            ConfigurationError: a constant is wrong.
        """
        if partition_key is not None and not callable(partition_key) and (problem := _key_problem(partition_key)):
            raise ConfigurationError(f"partition_key {problem}")
        constant_hash_key: Any = explicit_hash_key
        if explicit_hash_key is not None and not callable(explicit_hash_key):
            constant_hash_key = _hash_key_text(explicit_hash_key)
            if constant_hash_key is None:
                raise ConfigurationError(f"explicit_hash_key must be between 0 and 2^128-1, got {explicit_hash_key!r}")
        return cls(
            stream if callable(stream) else StreamId.parse(stream),  # type: ignore[arg-type]  # parse() says what is wrong
            partition_key,  # type: ignore[arg-type]
            constant_hash_key,
            serializer,
            ordered,
        )

    def describe_stream(self) -> str:
        return self.stream.arn or self.stream.name if isinstance(self.stream, StreamId) else "a function of the element"

    def route(self, element: Any, rng: random.Random, known_streams: dict[str, StreamId]) -> tuple[StreamId, PutEntry]:
        """Return where an element goes and as what.

        Raises:
            RecordRefused: it is nothing that Kinesis takes, or a function of the user's failed on it.
            ConfigurationError: `ordered`, and it has no key.
        """
        record: Any = element
        if self.serializer is not None:
            record = _apply(self.serializer, element, "serializer", "SerializationFailed")
        key: Any = None
        hash_key: Any = None
        stream: Any = None
        if isinstance(record, OutgoingRecord):
            data, key, hash_key, stream = record.data, record.partition_key, record.explicit_hash_key, record.stream
        else:
            data = record
        if not isinstance(data, bytes):
            raise RecordRefused(
                f"WriteToKinesis takes bytes and OutgoingRecord, got {type(data).__name__}"
                + ("; give serializer=" if self.serializer is None else " from serializer"),
                code="InvalidData",
            )
        if stream is None:
            stream = self.stream
        if not isinstance(stream, StreamId):
            if callable(stream):
                stream = _apply(stream, element, "stream", "InvalidStream")
            known = known_streams.get(stream) if isinstance(stream, str) else None
            if known is None:
                try:
                    known = StreamId.parse(stream)
                except ConfigurationError as error:
                    raise RecordRefused(str(error), code="InvalidStream") from error
                known_streams[stream] = known
            stream = known
        if key is None:
            key = self.partition_key
            if callable(key):
                key = _apply(key, element, "partition_key", "InvalidPartitionKey")
        if key is None:
            if self.ordered:
                raise ConfigurationError(
                    "ordered=True keeps the order of the records of a partition key, but this record has none; "
                    "give partition_key="
                )
            key = f"{rng.getrandbits(128):032x}"
        elif problem := _key_problem(key):
            raise RecordRefused(f"partition key {problem}", code="InvalidPartitionKey")
        if hash_key is None:
            hash_key = self.explicit_hash_key
            if callable(hash_key):
                hash_key = _apply(hash_key, element, "explicit_hash_key", "InvalidExplicitHashKey")
        if hash_key is not None and hash_key is not self.explicit_hash_key:
            given, hash_key = hash_key, _hash_key_text(hash_key)
            if hash_key is None:
                raise RecordRefused(
                    f"explicit hash key must be between 0 and 2^128-1, got {given!r}", code="InvalidExplicitHashKey"
                )
        # Subclasses, such as numpy's, would not be encoded: found in the request only, with other bundles' records.
        if type(data) is not bytes:
            data = bytes(data)
        if type(key) is not str:
            key = str.__str__(key)
        return stream, PutEntry(data, key, hash_key)


@dataclass(frozen=True)
class _Settings:
    routing: Routing
    aggregate: bool
    dead_letters: bool
    client: ClientFactory
    options: ProducerOptions
    delivery_timeout_seconds: float
    max_record_bytes: int | None
    clock: Clock | None
    rng: random.Random | None


class _Bundle:
    """A bundle's handle on the producer. If nobody ends it, the garbage collector does."""

    __slots__ = (
        "__weakref__", "_entries", "_since_seconds", "_size_bytes", "_stream", "_tokens", "producer", "source",
    )  # fmt: skip

    def __init__(self, producer: KinesisSystemProducer, settings: _Settings) -> None:
        self.producer = producer
        self.source = object()
        self._stream: StreamId | None = None
        self._entries: list[PutEntry] = []
        self._tokens: list[object] = []
        self._size_bytes = 0
        self._since_seconds = 0.0
        producer.register(
            self.source,
            delivery_timeout_seconds=settings.delivery_timeout_seconds,
            report_failed=settings.dead_letters,
        )
        # abandon() takes no lock: the collector may run us in the middle of anything.
        weakref.finalize(self, producer.abandon, self.source).atexit = False

    def gather(self, stream: StreamId, entry: PutEntry, token: object, now: float) -> None:
        """Send a record with others: the producer's lock costs as much as all the rest, so it is taken once for many.

        None waits here for long, provided that more come or the bundle ends.
        """
        if stream is not self._stream:
            self.hand_over()
            self._stream = stream
        entries = self._entries
        if not entries:
            self._since_seconds = now
        entries.append(entry)
        self._tokens.append(token)
        self._size_bytes += entry.size_bytes
        if (
            len(entries) == MAX_RECORDS_PER_PUT
            or self._size_bytes >= _GATHERED_BYTES
            or now - self._since_seconds > _GATHERING_SECONDS
        ):
            self.hand_over()

    def hand_over(self, *, flush_follows: bool = False) -> None:
        """Let the producer have what was gathered."""
        if self._entries and self._stream is not None:
            entries, tokens, size_bytes = self._entries, self._tokens, self._size_bytes
            self._entries, self._tokens, self._size_bytes = [], [], 0
            self.producer.send_many(self.source, self._stream, entries, tokens, size_bytes, flush_follows=flush_follows)


class _Windows(tuple[Any, ...]):
    """Windows that stay what they are.

    Beam multiplies the windows of a WindowedValue that `process` returns by the number of the current element's own
    (`windows *= n` in `_OutputHandler`), which would give a result of another element n times.
    """

    __slots__ = ()

    def __imul__(self, number: object) -> _Windows:
        return self


class _WriteFn(beam.DoFn):
    """Module level, so that it pickles by reference."""

    def __init__(self, settings: _Settings) -> None:
        self._settings = settings
        self._bundle: _Bundle | None = None
        self._aggregators: dict[StreamId, Aggregator] = {}

    def setup(self) -> None:
        self._rng = self._settings.rng or random.Random()
        self._known_streams: dict[str, StreamId] = {}
        self._counted = _Counted()
        self._clock = self._settings.clock or SystemClock()

    def start_bundle(self) -> None:
        self._end_bundle()  # an earlier one of this instance that failed
        producer = shared_producer(self._settings.client, self._settings.options, self._settings.clock)
        self._bundle = _Bundle(producer, self._settings)
        self._aggregators = {}
        self._sent = 0

    # Not WindowParam: with it Beam calls process once per window, and an element of a sliding window would be written
    # several times.
    def process(self, element: Any, windowed_value: Any = beam.DoFn.WindowedValueParam) -> Iterable[Any]:
        return self._write(element, windowed_value)

    def _write(self, element: Any, windowed_value: Any) -> Iterable[Any]:
        """Write an element; `windowed_value` None: nobody wants to hear what became of it."""
        bundle = self._bundle
        assert bundle is not None
        routing = self._settings.routing
        stream: StreamId | None = routing.stream if isinstance(routing.stream, StreamId) else None
        try:
            stream, entry = routing.route(element, self._rng, self._known_streams)
            self._check_size(bundle.producer, stream, entry)
        except RecordRefused as refusal:
            if not self._settings.dead_letters:
                raise
            self._counted.failed.inc()
            failed = FailedRecord(element, stream.name if stream else "", refusal.code, str(refusal), 0)
            return [pvalue.TaggedOutput(_FAILED, failed)]  # Beam gives it the element's windows and timestamp
        if self._settings.aggregate:
            self._send_aggregated(bundle, stream, self._aggregator(bundle, stream).add(entry, windowed_value))
        else:
            if routing.ordered:
                bundle.producer.send(bundle.source, stream, entry, windowed_value, turn_key=entry.partition_key)
            else:
                bundle.gather(stream, entry, windowed_value, self._clock.monotonic_seconds())
        self._sent += 1
        if self._sent % _EMIT_RECORDS:
            return ()
        # A bundle may be endless for our purposes (a batch of millions): results must not pile up until it ends.
        outputs = self._outputs(bundle.producer.settled(bundle.source))
        if outputs and len(windowed_value.windows) != 1:
            for output in outputs:
                settled = output.value if isinstance(output, pvalue.TaggedOutput) else output
                settled.windows = _Windows(settled.windows)
        return outputs

    def finish_bundle(self) -> Iterable[Any]:
        bundle = self._bundle
        assert bundle is not None
        try:
            bundle.hand_over(flush_follows=True)
            for stream, aggregator in self._aggregators.items():
                self._send_aggregated(bundle, stream, aggregator.close())
            outputs = self._outputs(bundle.producer.flush(bundle.source))
        finally:
            # Whatever happens: what was counted is reported by this thread, which is the bundle's.
            self._counted.report(bundle.producer.tally(bundle.source))
            self._counted.in_flight_bytes.set(bundle.producer.in_flight_bytes)
            self._end_bundle()
        return outputs

    def teardown(self) -> None:
        self._end_bundle()

    def _aggregator(self, bundle: _Bundle, stream: StreamId) -> Aggregator:
        aggregator = self._aggregators.get(stream)
        if aggregator is None:
            patience_seconds = self._settings.delivery_timeout_seconds
            if not bundle.producer.describe(stream, patience_seconds=patience_seconds).key_based_distribution:
                raise ConfigurationError(
                    f"aggregate=True cannot be used on stream {stream.name}: it distributes records by itself "
                    "(RecordDistributionStrategy AUTO), and the KCL drops aggregates that are not in the shard of "
                    "their hash key; set aggregate=False, or change the stream's strategy to USER_PARTITION_KEY"
                )
            aggregator = self._aggregators[stream] = Aggregator(ordered=self._settings.routing.ordered)
        return aggregator

    def _send_aggregated(self, bundle: _Bundle, stream: StreamId, complete: list[Aggregated]) -> None:
        for aggregated in complete:
            self._counted.aggregate_records.update(len(aggregated.tokens))
            turn_key = aggregated.partition_key if self._settings.routing.ordered else None
            bundle.producer.send(bundle.source, stream, aggregated.entry, aggregated.tokens, turn_key=turn_key)

    def _end_bundle(self) -> None:
        bundle, self._bundle = self._bundle, None
        if bundle is not None:
            bundle.producer.purge(bundle.source)

    def _check_size(self, producer: KinesisSystemProducer, stream: StreamId, entry: PutEntry) -> None:
        """Refuse a record that is too large for its stream.

        The stream is asked only if it matters: each takes at least 1 MiB.
        """
        limit = self._settings.max_record_bytes
        if limit is None and len(entry.data) <= DEFAULT_MAX_RECORD_BYTES - _MAX_PARTITION_KEY_BYTES:
            return  # nearly always, so it must cost nothing
        size = entry.size_bytes
        if limit is None:
            if size <= DEFAULT_MAX_RECORD_BYTES:
                return
            patience_seconds = self._settings.delivery_timeout_seconds
            limit = producer.describe(stream, patience_seconds=patience_seconds).max_record_bytes
        if size > limit:
            raise RecordRefused(
                f"a record with partition key {entry.partition_key!r} is {size} bytes, key included; "
                f"stream {stream.name} takes {limit}. Make it smaller, raise the stream's MaxRecordSizeInKiB "
                "(up to 10240), or set dead_letters=True",
                code="RecordTooLarge",
                size_bytes=size,
                limit_bytes=limit,
            )

    def _outputs(self, deliveries: list[Delivery]) -> list[Any]:
        outputs: list[Any] = []
        written = 0
        for delivery in deliveries:
            # Ours, given to send(): an element, or the elements of an aggregate.
            token: Any = delivery.token
            if token is None or (type(token) is tuple and token[0] is None):  # of a silent sink
                written += 1 if token is None else len(token)
                continue
            name = delivery.stream.name
            if delivery.sequence_number is not None and type(token) is not tuple:
                record = WrittenRecord(token.value, name, delivery.shard_id or "", delivery.sequence_number)
                outputs.append(token.with_value(record))
                written += 1
                continue
            origins: tuple[WindowedValue, ...] = token if type(token) is tuple else (token,)
            if delivery.sequence_number is not None:
                written += len(origins)
                for place, origin in enumerate(origins):
                    record = WrittenRecord(origin.value, name, delivery.shard_id or "", delivery.sequence_number, place)
                    outputs.append(origin.with_value(record))
                continue
            code, message = delivery.error_code or "", delivery.error_message or ""
            self._counted.failed.inc(len(origins))
            for origin in origins:
                failed = FailedRecord(origin.value, name, code, message, delivery.attempts)
                outputs.append(pvalue.TaggedOutput(_FAILED, origin.with_value(failed)))
        self._counted.records.inc(written)
        return outputs


class _SilentWriteFn(_WriteFn):
    """Writes without an output, for a sink whose `written` nobody takes.

    For Beam, handing each element over with its windows is as expensive as writing it.
    """

    def process(self, element: Any) -> Iterable[Any]:  # type: ignore[override]  # Beam looks at the signature
        return self._write(element, None)


class _Counted:
    """The sink's Beam metrics. Made on the worker; used by the bundle's own thread only."""

    def __init__(self) -> None:
        self.records = Metrics.counter(metrics.NAMESPACE, metrics.RECORDS_WRITTEN)
        self.bytes = Metrics.counter(metrics.NAMESPACE, metrics.BYTES_WRITTEN)
        self.failed = Metrics.counter(metrics.NAMESPACE, metrics.RECORDS_FAILED)
        self.requests = Metrics.counter(metrics.NAMESPACE, metrics.PUT_REQUESTS)
        self.batch_records = Metrics.distribution(metrics.NAMESPACE, metrics.PUT_BATCH_RECORDS)
        self.batch_bytes = Metrics.distribution(metrics.NAMESPACE, metrics.PUT_BATCH_BYTES)
        self.aggregate_records = Metrics.distribution(metrics.NAMESPACE, metrics.AGGREGATE_RECORDS)
        self.acknowledge_millis = Metrics.distribution(metrics.NAMESPACE, metrics.ACKNOWLEDGE_MILLIS)
        self.in_flight_bytes = Metrics.gauge(metrics.NAMESPACE, metrics.IN_FLIGHT_BYTES)

    def report(self, tally: metrics.SinkTally) -> None:
        self.bytes.inc(tally.bytes_written)
        self.requests.inc(len(tally.requests))
        for records, size_bytes in tally.requests:
            self.batch_records.update(records)
            self.batch_bytes.update(size_bytes)
        for seconds in tally.acknowledge_seconds:
            self.acknowledge_millis.update(round(seconds * 1000))
        for code, count in tally.failures.items():
            Metrics.counter(metrics.NAMESPACE, f"{metrics.PUT_FAILURES}.{code}").inc(count)
        for stream, count in tally.throttles.items():
            Metrics.counter(metrics.NAMESPACE, f"{metrics.PUT_THROTTLES}.{stream}").inc(count)


def _apply(function: Callable[[Any], Any], element: Any, option: str, code: str) -> Any:
    try:
        return function(element)
    except Exception as error:
        if isinstance(error, KinesisIOError) and error.retryable:
            raise  # an outage that the function met is not the element's fault
        raise RecordRefused(f"{option} failed on an element: {type(error).__name__}: {error}", code=code) from error


def _key_problem(key: object) -> str | None:
    """Return what is wrong with a partition key, as the end of a sentence; None: nothing."""
    if not isinstance(key, str):
        return f"must be a str, got {type(key).__name__}"
    # "Unicode strings, with a maximum length limit of 256 characters for each key": characters, not bytes.
    if not 1 <= len(key) <= MAX_PARTITION_KEY_CHARACTERS:
        return f"must have 1-{MAX_PARTITION_KEY_CHARACTERS} characters, got {len(key)}: {key[:40]!r}"
    if not key.isascii():
        try:
            key.encode()
        except UnicodeEncodeError:
            return f"must be valid Unicode, got a lone surrogate in {key[:40]!r}"
    return None


def _hash_key_text(value: object) -> str | None:
    """Return an explicit hash key as the service takes it, decimal without leading zeros; None: it is none."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= _MAX_HASH_KEY_DIGITS:
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_HASH_KEY:
        return str(value)
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
