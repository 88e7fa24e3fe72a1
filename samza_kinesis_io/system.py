"""Samza's system API over Kinesis: consumer, producer and admin, usable without Beam.

    system = KinesisSystem("kinesis", ClientConfig(region="eu-west-1"))
    consumer = system.consumer()
    for partition in system.admin().metadata("flights"):
        consumer.register(partition, OLDEST)
    consumer.start()
    while consumer.partitions:
        for partition, envelopes in consumer.poll(dict.fromkeys(consumer.partitions, 100), timeout_seconds=1.0).items():
            ...
    consumer.stop()

The protocols are Samza's contracts; the Kinesis classes here are thin faces of what the source and the sink stand on:
every partition is a restriction of one shard in a `KinesisSystemConsumer`, every source of messages a source of a
`KinesisSystemProducer`. What Samza has no word for is how shards are replaced: `partitions` follows it.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

from apache_beam.utils.timestamp import Timestamp

from samza_kinesis_io.client import ClientConfig, ClientFactory, StreamId
from samza_kinesis_io.clock import Clock, SystemClock
from samza_kinesis_io.consumer import Attachment, Batch, KinesisSystemConsumer, SourceConfig
from samza_kinesis_io.errors import ConfigurationError
from samza_kinesis_io.positions import Position, PositionKind
from samza_kinesis_io.producer import KinesisSystemProducer
from samza_kinesis_io.records import OutgoingRecord
from samza_kinesis_io.restriction import Advance, Claim, FrontierTracker, ShardFrontier, ShardState, adopted
from samza_kinesis_io.sink import Routing
from samza_kinesis_io.task import (
    IncomingMessageEnvelope,
    KinesisIncomingMessageEnvelope,
    OutgoingMessageEnvelope,
    SystemStreamPartition,
    parse_offset,
)

#: The offset of the oldest record that is left.
OLDEST: Final = "TRIM_HORIZON"
#: The offset of the next record to be written; it is pinned to the time at which it is registered.
UPCOMING: Final = "LATEST"
_AT_TIMESTAMP: Final = "AT_TIMESTAMP/"
END_OF_STREAM_OFFSET: Final = "END_OF_STREAM"


class EndOfStreamEnvelope(IncomingMessageEnvelope, frozen=True, kw_only=True):
    """Behind a shard's last message. From now on the consumer gives its children too.

    Attributes:
        children: Those that this consumer took over. Of a merge only one parent's reader takes the child.
    """

    children: tuple[SystemStreamPartition, ...] = ()


@dataclass(frozen=True, slots=True)
class PartitionMetadata:
    """The offsets of a partition. `newest` is None: Kinesis does not tell it."""

    oldest: str
    newest: str | None
    upcoming: str


class SystemConsumer(Protocol):
    """Messages in. register, then start, then poll; stop ends it. Of one thread."""

    def register(self, partition: SystemStreamPartition, offset: str) -> None:
        """Read a partition from this offset on, the message at it included. Once for each partition, before start."""
        ...

    def start(self) -> None: ...

    def poll(
        self, partitions: Mapping[SystemStreamPartition, int], timeout_seconds: float
    ) -> dict[SystemStreamPartition, list[IncomingMessageEnvelope]]:
        """Return the next messages of these partitions, of each at most as many as said; without keys for empty ones.

        Waits for the first of them at most this long; 0: not at all; less: until one comes or all of them are read to
        their tip. Of partitions that are not asked for nothing is returned, and little is kept.

        Raises:
            KinesisIOError: reading ended, after everything before it was returned.
        """
        ...

    def stop(self) -> None: ...


class SystemProducer(Protocol):
    """Messages out. Sources share it, from any threads; one source is of one thread at a time."""

    def register(self, source: Hashable) -> None: ...

    def start(self) -> None: ...

    def send(self, source: Hashable, envelope: OutgoingMessageEnvelope) -> None:
        """Hand over a serialized message. May return before it is sent.

        Raises:
            KinesisIOError: the message can never be sent, or an earlier one of the source was not.
        """
        ...

    def flush(self, source: Hashable) -> None:
        """Return when everything this source sent is durable.

        Raises:
            KinesisIOError: something could not be delivered. The source takes nothing more.
        """
        ...

    def stop(self) -> None: ...


class SystemAdmin(Protocol):
    """Questions about offsets."""

    def metadata(self, stream: str) -> dict[SystemStreamPartition, PartitionMetadata]:
        """Return a stream's partitions; those that are closed and still hold messages too."""
        ...

    def offsets_after(self, offsets: Mapping[SystemStreamPartition, str]) -> dict[SystemStreamPartition, str]:
        """Return where to register partitions whose message at this offset was processed last."""
        ...

    def compare(self, a: str, b: str) -> int | None:
        """Return -1, 0 or 1 as offset `a` lies before, at or behind `b`; None: that can't be said."""
        ...


# --- Kinesis --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KinesisSystem:
    """Makes what reads and writes the streams of one system."""

    name: str = "kinesis"
    client: ClientFactory = ClientConfig()
    clock: Clock = SystemClock()

    def consumer(self, consumer: KinesisSystemConsumer | None = None) -> KinesisConsumer:
        return KinesisConsumer(self, consumer or KinesisSystemConsumer(clock=self.clock))

    def producer(self, producer: KinesisSystemProducer | None = None) -> KinesisProducer:
        return KinesisProducer(self, producer or KinesisSystemProducer(self.client, clock=self.clock))

    def admin(self) -> KinesisAdmin:
        return KinesisAdmin(self)

    def check(self, partition: SystemStreamPartition) -> None:
        if partition.system != self.name:
            raise ConfigurationError(f"{partition} is of another system than {self.name}")


def position_at(offset: str, now: Timestamp) -> Position:
    """Return the position before the message at an offset: what `register` starts from.

    Raises:
        ConfigurationError: it is no offset.
    """
    if offset == OLDEST:
        return Position.trim_horizon()
    if offset == UPCOMING:
        return Position.at_timestamp(now)
    if offset.startswith(_AT_TIMESTAMP) and offset.removeprefix(_AT_TIMESTAMP).isdecimal():
        return Position(PositionKind.AT_TIMESTAMP, timestamp_micros=int(offset.removeprefix(_AT_TIMESTAMP)))
    return replace(parse_offset(offset), kind=PositionKind.AT_SEQUENCE_NUMBER)


class _Partition:
    """A shard under its own restriction, so that it can be polled alone."""

    def __init__(self, state: ShardState, attachment: Attachment, first: Position) -> None:
        self.state = state
        self.tracker = FrontierTracker(ShardFrontier((state,)))
        self.attachment = attachment
        self.first = first
        self.is_at_tip = False


class KinesisConsumer:
    """`SystemConsumer` of Kinesis.

    A shard that ends gives an `EndOfStreamEnvelope`, leaves `partitions`, and its children come into it, from their
    beginnings. A child of a merge gives nothing before both of its parents that are read here have ended.
    """

    def __init__(self, system: KinesisSystem, consumer: KinesisSystemConsumer) -> None:
        self._system = system
        self._consumer = consumer
        self._registered: dict[SystemStreamPartition, Position] = {}
        self._reading: dict[SystemStreamPartition, _Partition] = {}
        self._opened: set[SystemStreamPartition] = set()
        self._config: SourceConfig

    @property
    def partitions(self) -> Collection[SystemStreamPartition]:
        """What can be polled now: what was registered and has not ended, and children of what has."""
        return tuple(self._reading)

    def register(self, partition: SystemStreamPartition, offset: str) -> None:
        self._system.check(partition)
        if partition in self._registered or self._reading:
            raise ConfigurationError(f"{partition} must be registered once, and before start()")
        now = Timestamp(micros=round(self._system.clock.now_seconds() * 1e6))
        self._registered[partition] = position_at(offset, now)

    def start(self) -> None:
        """Raises: ConfigurationError: a partition is registered that is no shard of its stream, or none is."""
        if not self._registered:
            raise ConfigurationError("no partition is registered; call register() first")
        names = sorted({partition.stream for partition in self._registered})
        streams = tuple(StreamId.parse(name) for name in names)
        self._config = SourceConfig(uuid.uuid4().hex, streams, self._system.client)
        for index, stream in enumerate(streams):
            client = self._system.client.connect(stream)
            try:
                listed = {shard.shard_id: shard for shard in client.list_shards(stream)}
            finally:
                client.close()
            for partition, position in self._registered.items():
                if partition.stream == names[index]:
                    shard = listed.get(partition.partition)
                    if shard is None:
                        raise ConfigurationError(f"{partition} is no shard of its stream; listed are {sorted(listed)}")
                    self._open(partition, ShardState(index, shard.shard_id, shard.hash_key_range, position), position)

    def _open(self, partition: SystemStreamPartition, state: ShardState, first: Position) -> None:
        key = (self._config.uid, len(self._opened), b"")
        attachment = self._consumer.attach(key, self._config, ShardFrontier((state,)))
        self._opened.add(partition)
        self._reading[partition] = _Partition(state, attachment, first)

    def poll(
        self, partitions: Mapping[SystemStreamPartition, int], timeout_seconds: float
    ) -> dict[SystemStreamPartition, list[IncomingMessageEnvelope]]:
        deadline = self._system.clock.monotonic_seconds() + timeout_seconds
        while True:
            found: dict[SystemStreamPartition, list[IncomingMessageEnvelope]] = {}
            for partition, most in partitions.items():
                if partition in self._reading and (envelopes := self._take(partition, most)):
                    found[partition] = envelopes
                elif partition not in self._opened:
                    raise ConfigurationError(f"{partition} is not registered, or start() was not called")
            asked = [reading for p in partitions if (reading := self._reading.get(p)) is not None]
            left = deadline - self._system.clock.monotonic_seconds()
            if found or not asked or (left <= 0 <= timeout_seconds):
                return found
            if timeout_seconds < 0:
                if all(reading.is_at_tip for reading in asked):
                    return found
                left = self._config.poll_interval_seconds  # a tip wakes nobody
            self._consumer.wait_for_any([reading.attachment for reading in asked], left)

    def _take(self, partition: SystemStreamPartition, most: int) -> list[IncomingMessageEnvelope]:
        reading = self._reading[partition]
        envelopes: list[IncomingMessageEnvelope] = []
        while len(envelopes) < most:
            batch = reading.attachment.poll(most - len(envelopes))
            if batch is None:
                for proof in reading.attachment.take_evidence():
                    reading.is_at_tip = proof.was_empty and not proof.millis_behind_latest
                break
            reading.is_at_tip = batch.millis_behind_latest == 0
            if batch.lost is not None:
                raise batch.lost.error
            children = None if batch.children is None else self._children(partition, reading, batch)
            advance = Advance(batch.key, batch.position, reading.state.watermark_micros, batch.read_until_micros)
            reading.tracker.try_claim(Claim((advance,), batch.key if children is not None else None))
            reading.attachment.commit(batch, reading.tracker.current_restriction())
            envelopes += [
                KinesisIncomingMessageEnvelope.of(record, partition, key=record.partition_key, message=record.data)
                for record in batch.records
            ]
            if children is not None:
                reading.attachment.detach()
                del self._reading[partition]
                for child, state in children.items():
                    self._open(child, state, reading.first)
                end = END_OF_STREAM_OFFSET
                envelopes.append(
                    EndOfStreamEnvelope(
                        system_stream_partition=partition, offset=end, key=None, message=None, children=tuple(children)
                    )
                )
                break
        return envelopes

    def _children(
        self, partition: SystemStreamPartition, reading: _Partition, batch: Batch
    ) -> dict[SystemStreamPartition, ShardState]:
        # From the time at which reading was to start, which is their beginning if they are younger.
        start = reading.first if reading.first.kind is PositionKind.AT_TIMESTAMP else Position.trim_horizon()
        children: dict[SystemStreamPartition, ShardState] = {}
        for state in adopted(reading.state, batch.children or (), {}, start):
            child = replace(partition, partition=state.shard_id)
            if child not in self._opened:  # registered by itself, with an offset of its own
                children[child] = state
        return children

    def stop(self) -> None:
        """End reading. Where it stands is in the offsets of the envelopes."""
        self._reading.clear()
        self._consumer.stop()


class KinesisProducer:
    """`SystemProducer` of Kinesis. The messages of one source with one partition key are written in their order."""

    def __init__(self, system: KinesisSystem, producer: KinesisSystemProducer) -> None:
        self._system = system
        self._producer = producer
        self._sources: list[Hashable] = []
        self._routings: dict[str, Routing] = {}
        self._rng = random.Random()

    def register(self, source: Hashable) -> None:
        self._producer.register(source)
        self._sources.append(source)

    def start(self) -> None:
        """Nothing is to do."""

    def send(self, source: Hashable, envelope: OutgoingMessageEnvelope) -> None:
        to = envelope.system_stream
        if to.system != self._system.name:
            raise ConfigurationError(f"a message for {to} can't be sent to the system {self._system.name}")
        key = envelope.partition_key if envelope.partition_key is not None else envelope.key
        routing = self._routings.get(to.stream)
        if routing is None:
            routing = self._routings[to.stream] = Routing(StreamId.parse(to.stream), None, None, None, False)
        stream, entry = routing.route(OutgoingRecord(envelope.message, key), self._rng, {})
        self._producer.send(source, stream, entry, turn_key=None if key is None else entry.partition_key)

    def flush(self, source: Hashable) -> None:
        self._producer.flush(source)

    def stop(self) -> None:
        """Flush every source, then end.

        Raises:
            KinesisIOError: something could not be delivered.
        """
        try:
            for source in self._sources:
                self._producer.flush(source)
        finally:
            self._producer.stop()


class KinesisAdmin:
    """`SystemAdmin` of Kinesis. An offset is a sequence number, with "/sub-sequence number" inside of aggregates."""

    def __init__(self, system: KinesisSystem) -> None:
        self._system = system

    def metadata(self, stream: str) -> dict[SystemStreamPartition, PartitionMetadata]:
        """Raises: KinesisIOError: the stream can't be asked."""
        stream_id = StreamId.parse(stream)
        client = self._system.client.connect(stream_id)
        try:
            listed = client.list_shards(stream_id)
        finally:
            client.close()
        offsets = PartitionMetadata(OLDEST, None, UPCOMING)
        return {SystemStreamPartition(self._system.name, stream, shard.shard_id): offsets for shard in listed}

    def offsets_after(self, offsets: Mapping[SystemStreamPartition, str]) -> dict[SystemStreamPartition, str]:
        """Raises: ConfigurationError: one of them is no record's offset."""
        # Sequence numbers have gaps, sub-sequence numbers have none: the next offset after a record is its next part,
        # whether there is one or not.
        positions = {partition: parse_offset(offset) for partition, offset in offsets.items()}
        return {at: f"{p.sequence_number}/{p.sub_sequence_number + 1}" for at, p in positions.items()}

    def offset_at(self, timestamp: Timestamp) -> str:
        """Return the offset of the first message that arrived at `timestamp` or later, in any partition."""
        return f"{_AT_TIMESTAMP}{timestamp.micros}"

    def compare(self, a: str, b: str) -> int | None:
        keys: Sequence[tuple[int, int] | str] = [_order(a), _order(b)]
        if keys[0] == keys[1]:
            return 0
        if OLDEST in keys:
            return -1 if keys[0] == OLDEST else 1
        if isinstance(keys[0], tuple) and isinstance(keys[1], tuple):
            return -1 if keys[0] < keys[1] else 1
        return None  # a time, or the tip: only the service knows


def _order(offset: str) -> tuple[int, int] | str:
    if offset in (OLDEST, UPCOMING) or offset.startswith(_AT_TIMESTAMP):
        return offset
    position = parse_offset(offset)
    return (position.sequence_number, position.sub_sequence_number)
