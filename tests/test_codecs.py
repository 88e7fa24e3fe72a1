"""Codecs: JSON and Avro in and out, rows and plain values, and what becomes of elements that cannot be converted."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import io
import json
import sys
import threading
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Optional

import apache_beam as beam
import boto3
import fastavro
import msgspec
import pytest
from apache_beam import coders
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.transforms.error_handling import CollectingErrorHandler
from apache_beam.transforms.window import TimestampedValue
from apache_beam.typehints.row_type import RowTypeConstraint
from apache_beam.utils.timestamp import Timestamp
from hypothesis import given
from hypothesis import strategies as st
from moto import mock_aws

from samza_kinesis_io import ConfigurationError, KinesisRecord, OutgoingRecord
from samza_kinesis_io.metrics import NAMESPACE
from samza_kinesis_io.transforms import (
    CodecFailed,
    DecodeAvro,
    DecodeJson,
    EncodeAvro,
    EncodeJson,
    FailedElement,
    GlueSchemaRegistry,
    SchemaUnavailable,
    UnknownSchema,
)
from samza_kinesis_io.transforms.avro_schemas import Glue, fingerprint, parsed
from samza_kinesis_io.transforms.dead_letters import Codec, CodecTransform, FailedElementCoder, _CodecFn


class Leg(NamedTuple):
    origin: str
    miles: int | None = 7


class Flight(NamedTuple):
    carrier: str
    delay: int
    legs: Sequence[Leg] = ()
    landed: Timestamp | None = None
    notes: Mapping[str, Leg] | None = None


class Gated(NamedTuple):
    carrier: str
    delay: int
    gate: str


class Delay(msgspec.Struct, frozen=True):
    carrier: str
    minutes: int = 0


@dataclasses.dataclass
class Carrier:
    code: str
    name: str


WRITER = {
    "type": "record",
    "name": "Flight",
    "namespace": "test",
    "fields": [
        {"name": "carrier", "type": "string"},
        {"name": "delay", "type": "int"},
        {"name": "gate", "type": "string"},
    ],
}
READER = {
    "type": "record",
    "name": "Flight",
    "namespace": "test",
    "fields": [
        {"name": "carrier", "type": "string"},
        {"name": "delay", "type": "long"},
        {"name": "tail", "type": ["null", "string"], "default": None},
    ],
}
UA: dict[str, Any] = {"carrier": "UA", "delay": 5, "gate": "B4"}
VERSION = uuid.UUID("b7b4a7f0-9c96-4e4a-a687-fb5de9ef0c63")


def avro(value: Any, schema: Any = WRITER) -> bytes:
    out = io.BytesIO()
    fastavro.schemaless_writer(out, fastavro.parse_schema(schema, named_schemas={}), value)
    return out.getvalue()


def record(data: bytes) -> KinesisRecord:
    return KinesisRecord(data, "4956", "k", shard_id="shardId-000000000007", stream="flights")


def codec_of(transform: CodecTransform) -> Codec:
    return transform._codec


def convert(transform: CodecTransform, element: Any) -> Any:
    """What a worker makes of one element: its own copy of the configuration, opened."""
    codec = beam.internal.pickler.loads(beam.internal.pickler.dumps(codec_of(transform)))
    return codec.open()(element)


def error_of(transform: CodecTransform, element: Any) -> str:
    with pytest.raises(Exception) as caught:
        convert(transform, element)
    return f"{type(caught.value).__name__}: {caught.value}"


class TestDecodeJson:
    def test_plain_values_come_as_they_are(self) -> None:
        assert convert(DecodeJson(), record(b'{"a": [1, null, "x"]}')) == {"a": [1, None, "x"]}

    def test_bytes_are_taken_as_well_as_records(self) -> None:
        assert convert(DecodeJson(), b"[1]") == [1]

    def test_a_named_tuple_is_read_from_an_object_with_rows_inside(self) -> None:
        data = b"""{"carrier": "UA", "delay": 5, "legs": [{"origin": "EWR", "miles": null}, {"origin": "IAH"}],
            "landed": "2013-01-01T13:15:00Z", "notes": {"x": {"origin": "JFK"}}, "unknown": 1}"""
        flight = convert(DecodeJson(Flight), record(data))
        assert type(flight) is Flight
        assert flight == Flight(
            "UA",
            5,
            [Leg("EWR", None), Leg("IAH", 7)],
            Timestamp.from_rfc3339("2013-01-01T13:15:00Z"),
            {"x": Leg("JFK")},
        )
        assert all(type(leg) is Leg for leg in flight.legs)

    def test_fields_that_may_be_none_may_be_missing(self) -> None:
        row = RowTypeConstraint.from_fields([("carrier", str), ("delay", Optional[int])])  # noqa: UP045 (Beam: else Any)
        assert convert(DecodeJson(row), b'{"carrier": "UA"}') == row.user_type("UA", None)

    def test_a_default_stands_in_for_a_missing_field(self) -> None:
        assert convert(DecodeJson(Flight), b'{"carrier": "UA", "delay": 5}') == Flight("UA", 5)

    @pytest.mark.parametrize(
        ("into", "data", "value"),
        [
            (Delay, b'{"carrier": "UA"}', Delay("UA")),
            (Carrier, b'{"code": "UA", "name": "United"}', Carrier("UA", "United")),
            (list[Leg], b'[{"origin": "EWR"}]', [Leg("EWR")]),
            (dict[str, int], b'{"a": 1}', {"a": 1}),
            (Leg | None, b"null", None),
            (Leg | None, b'{"origin": "EWR"}', Leg("EWR")),
            (datetime.date, b'"2013-01-01"', datetime.date(2013, 1, 1)),
        ],
    )
    def test_other_types_are_read_too(self, into: Any, data: bytes, value: Any) -> None:
        assert convert(DecodeJson(into), data) == value

    @pytest.mark.parametrize(
        ("into", "data", "error"),
        [
            (None, b"{", "DecodeError: Input data was truncated"),
            (None, b"", "DecodeError: Input data was truncated"),
            (None, b"\xff", "DecodeError: JSON is malformed: invalid character (byte 0)"),
            (Flight, b'["UA", 5]', "ValidationError: Expected `object`, got `array`"),
            (Flight, b'{"carrier": "UA"}', "ValidationError: Object missing required field `delay`"),
            (Flight, b'{"carrier": 1, "delay": 5}', "ValidationError: Expected `str`, got `int` - at `$.carrier`"),
            (
                Flight,
                b'{"carrier": "UA", "delay": 5, "landed": "noon"}',
                "ValidationError: Could not parse RFC3339 string: noon - at `$.landed`",
            ),
        ],
    )
    def test_what_does_not_fit_is_said_with_its_place(self, into: Any, data: bytes, error: str) -> None:
        assert error_of(DecodeJson(into), data).startswith(error.split(":")[0])
        if "RFC3339" not in error:  # Beam's own words
            assert error_of(DecodeJson(into), data) == error

    @pytest.mark.parametrize(
        ("into", "words"),
        [
            (beam.Row, "into=beam.Row does not say which fields"),
            (Leg | str, "a row may be optional, but not one alternative of several"),
            (5, "into=5 cannot be decoded to"),
        ],
    )
    def test_a_type_that_cannot_be_decoded_to_is_refused_when_the_pipeline_is_built(
        self, into: Any, words: str
    ) -> None:
        with pytest.raises(ConfigurationError, match=words):
            DecodeJson(into)

    def test_something_else_than_bytes_is_said(self) -> None:
        assert error_of(DecodeJson(), "text") == "TypeError: a KinesisRecord or bytes can be decoded, got str"


class TestEncodeJson:
    def test_a_record_carries_the_keys_it_is_given(self) -> None:
        transform = EncodeJson(partition_key=lambda d: d.carrier, explicit_hash_key="5")
        assert convert(transform, Delay("UA", 3)) == OutgoingRecord(b'{"carrier":"UA","minutes":3}', "UA", "5")

    def test_without_keys_the_sink_chooses(self) -> None:
        assert convert(EncodeJson(), {"a": 1}) == OutgoingRecord(b'{"a":1}', None, None)

    @pytest.mark.parametrize(
        ("element", "text"),
        [
            (Leg("EWR", 5), '{"origin":"EWR","miles":5}'),
            (beam.Row(a=1, leg=Leg("EWR", None)), '{"a":1,"leg":{"origin":"EWR","miles":null}}'),
            ([Leg("EWR"), {"x": beam.Row(b=2)}], '[{"origin":"EWR","miles":7},{"x":{"b":2}}]'),
            (Carrier("UA", "United"), '{"code":"UA","name":"United"}'),
            ({"at": Timestamp(1357046100.5)}, '{"at":"2013-01-01T13:15:00.500000Z"}'),
            ({"data": b"\x00\xff"}, '{"data":"AP8="}'),
            ("text", '"text"'),
        ],
    )
    def test_rows_become_objects(self, element: Any, text: str) -> None:
        assert convert(EncodeJson(), element).data.decode() == text

    def test_what_was_encoded_is_decoded_to_the_same(self) -> None:
        flight = Flight("UA", 5, [Leg("EWR", None)], Timestamp(1357046100.25), {"x": Leg("JFK")})
        assert convert(DecodeJson(Flight), convert(EncodeJson(), flight).data) == flight

    def test_what_cannot_be_encoded_is_said(self) -> None:
        assert error_of(EncodeJson(), {"a": object()}) == "NotImplementedError: <class 'object'> is unknown"

    def test_keys_are_checked_when_the_pipeline_is_built(self) -> None:
        with pytest.raises(
            ConfigurationError, match="partition_key must be a string, a function of the element or None"
        ):
            EncodeJson(partition_key=5)  # type: ignore[arg-type]


class TestSchemalessAvro:
    def test_the_value_is_what_the_writer_wrote(self) -> None:
        assert convert(DecodeAvro.schemaless(WRITER), record(avro(UA))) == UA

    def test_the_reader_schema_says_what_it_becomes(self) -> None:
        """A wider number, a new field with its default, and a field that is gone."""
        decode = DecodeAvro.schemaless(json.dumps(WRITER), reader_schema=READER)
        assert convert(decode, avro(UA)) == {"carrier": "UA", "delay": 5, "tail": None}

    def test_a_type_can_be_asked_for(self) -> None:
        class Both(NamedTuple):
            carrier: str
            delay: int

        assert convert(DecodeAvro.schemaless(WRITER, into=Both), avro(UA)) == Both("UA", 5)

    def test_rows_have_the_fields_of_the_reader_schema(self) -> None:
        decode = DecodeAvro.schemaless(WRITER, reader_schema=READER, into=beam.Row)
        row = convert(decode, avro(UA))
        assert row._asdict() == {"carrier": "UA", "delay": 5, "tail": None}

    def test_it_is_written_as_fastavro_writes_it(self) -> None:
        encode = EncodeAvro.schemaless(WRITER, partition_key=lambda f: f["carrier"])
        assert convert(encode, UA) == OutgoingRecord(avro(UA), "UA", None)

    @pytest.mark.parametrize("row", [beam.Row(**UA), Gated(**UA)])
    def test_rows_are_written_like_dicts(self, row: Any) -> None:
        codec = codec_of(EncodeAvro.schemaless(WRITER))
        assert codec.open()(row).data == avro(UA)

    @pytest.mark.parametrize(
        ("element", "words"),
        [
            ({"carrier": "UA", "delay": 5}, "gate"),
            ({**UA, "more": 1}, "more"),
            ({**UA, "delay": "late"}, "delay"),
        ],
    )
    def test_an_element_that_does_not_fit_the_schema_names_the_field(self, element: Any, words: str) -> None:
        assert words in error_of(EncodeAvro.schemaless(WRITER), element)

    def test_bytes_left_behind_the_value_are_an_error(self) -> None:
        """Else data of another schema would be decoded to nonsense, in silence."""
        message = error_of(DecodeAvro.schemaless(WRITER), avro(UA) + b"xyz")
        assert message == "ValueError: bytes are left behind the value (3): another schema wrote it"

    def test_a_value_cut_short_is_an_error(self) -> None:
        assert error_of(DecodeAvro.schemaless(WRITER), avro(UA)[:-1])

    def test_a_schema_of_one_primitive_will_do(self) -> None:
        assert convert(DecodeAvro.schemaless("string"), avro("x", "string")) == "x"
        assert convert(EncodeAvro.schemaless('"string"'), "x").data == avro("x", "string")

    @pytest.mark.parametrize("schema", [{"type": "record"}, "{", {"type": "no such type"}])
    def test_a_wrong_schema_is_refused_by_option(self, schema: Any) -> None:
        with pytest.raises(ConfigurationError, match="writer_schema must be an Avro schema"):
            DecodeAvro.schemaless(schema)
        with pytest.raises(ConfigurationError, match="reader_schema must be an Avro schema"):
            DecodeAvro.schemaless(WRITER, reader_schema=schema)
        with pytest.raises(ConfigurationError, match="schema must be an Avro schema"):
            EncodeAvro.schemaless(schema)

    def test_without_fastavro_the_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "fastavro", None)
        with pytest.raises(ConfigurationError, match=r"pip install 'samza-kinesis-io\[avro\]'"):
            DecodeAvro.schemaless(WRITER)


NESTED = {
    "type": "record",
    "name": "N",
    "fields": [
        {"name": "at", "type": {"type": "long", "logicalType": "timestamp-micros"}},
        {"name": "price", "type": {"type": "bytes", "logicalType": "decimal", "precision": 9, "scale": 2}},
        {"name": "kind", "type": {"type": "enum", "name": "E", "symbols": ["A", "B"]}},
        {"name": "again", "type": ["null", "E"]},
        {"name": "legs", "type": {"type": "array", "items": {"type": "record", "name": "L", "fields": [
            {"name": "origin", "type": "string"}]}}},
        {"name": "best", "type": ["null", "L"]},
        {"name": "counts", "type": {"type": "map", "values": "int"}},
        {"name": "hash", "type": {"type": "fixed", "name": "F", "size": 2}},
        {"name": "ratio", "type": "float"},
        {"name": "yes", "type": "boolean"},
    ],
}  # fmt: skip


class TestAvroRows:
    def test_every_type_beam_has_survives_the_way_through_its_coder(self) -> None:
        at = datetime.datetime(2013, 1, 1, 13, 15, 0, 250, tzinfo=datetime.timezone.utc)
        value = {
            "at": at, "price": decimal.Decimal("12.34"), "kind": "A", "again": "B", "legs": [{"origin": "EWR"}],
            "best": {"origin": "JFK"}, "counts": {"a": 1}, "hash": b"\x01\x02", "ratio": 0.5, "yes": True,
        }  # fmt: skip
        decode = DecodeAvro.schemaless(NESTED, into=beam.Row)
        row = codec_of(decode).open()(avro(value, NESTED))
        assert row.at == Timestamp.from_rfc3339("2013-01-01T13:15:00.000250Z")
        assert row.price == decimal.Decimal("12.34")
        assert row.legs[0].origin == "EWR"
        assert row.best.origin == "JFK"
        coder = coders.registry.get_coder(decode._output_type)
        assert isinstance(coder, coders.RowCoder)
        assert coder.decode(coder.encode(row)) == row
        assert codec_of(EncodeAvro.schemaless(NESTED)).open()(row).data == avro(value, NESTED)

    @pytest.mark.parametrize(
        ("kind", "words"),
        [
            (["int", "string"], "N.x is a union of several types"),
            ({"type": "int", "logicalType": "date"}, "N.x is a date"),
            (["null", "N"], "N.x has the type N"),
        ],
    )
    def test_what_beams_schemas_lack_is_named(self, kind: Any, words: str) -> None:
        schema = {"type": "record", "name": "N", "fields": [{"name": "x", "type": kind}]}
        with pytest.raises(ConfigurationError, match=words):
            DecodeAvro.schemaless(schema, into=beam.Row)
        DecodeAvro.schemaless(schema)

    def test_rows_need_to_know_their_fields(self) -> None:
        with pytest.raises(ConfigurationError, match="into=beam.Row needs a reader_schema"):
            DecodeAvro.glue(into=beam.Row)
        with pytest.raises(ConfigurationError, match="a schema that is a record"):
            DecodeAvro.schemaless("string", into=beam.Row)


class TestSingleObjectAvro:
    def test_the_fingerprint_is_the_specifications(self) -> None:
        """The CRC-64-AVRO of "null" is 0x63dd24e7cc258f8a; little-endian on the wire."""
        assert fingerprint(parsed('"null"')) == (0x63DD24E7CC258F8A).to_bytes(8, "little")

    def test_each_element_is_read_with_the_schema_it_names(self) -> None:
        decode = DecodeAvro.single_object([WRITER, READER], reader_schema=READER)
        old = convert(EncodeAvro.single_object(WRITER), UA).data
        new = convert(EncodeAvro.single_object(READER), {"carrier": "DL", "delay": 1, "tail": "N1"}).data
        assert old[:2] == new[:2] == b"\xc3\x01"
        assert convert(decode, old) == {"carrier": "UA", "delay": 5, "tail": None}
        assert convert(decode, new) == {"carrier": "DL", "delay": 1, "tail": "N1"}

    @pytest.mark.parametrize("data", [b"", b"\xc3", b"\xc3\x01", b"\xc3\x02" + bytes(20), b'{"carrier": "UA"}'])
    def test_without_the_header_it_is_no_single_object(self, data: bytes) -> None:
        assert error_of(DecodeAvro.single_object([WRITER]), data).startswith("ValueError: no single-object header")

    def test_an_unknown_fingerprint_is_named(self) -> None:
        data = convert(EncodeAvro.single_object(READER), {"carrier": "DL", "delay": 1}).data
        message = error_of(DecodeAvro.single_object([WRITER]), data)
        assert message == f"UnknownSchema: none of the 1 writer_schemas has the fingerprint {data[2:10].hex()}"

    @pytest.mark.parametrize("schemas", [[], json.dumps(WRITER), WRITER])
    def test_the_schemas_are_a_list(self, schemas: Any) -> None:
        with pytest.raises(ConfigurationError, match="writer_schemas must be a list"):
            DecodeAvro.single_object(schemas)


class Registry:
    """A registry in memory that counts what it is asked. Equal only to itself."""

    def __init__(self, definitions: dict[uuid.UUID, str], fails: Exception | None = None) -> None:
        self.definitions = definitions
        self.fails = fails
        self.asked = 0

    def definition(self, version_id: uuid.UUID) -> str:
        self.asked += 1
        if self.fails is not None:
            raise self.fails
        if version_id not in self.definitions:
            raise UnknownSchema(str(version_id))
        return self.definitions[version_id]

    def version_id(self, schema_name: str, definition: str) -> uuid.UUID:
        return next(version for version, text in self.definitions.items() if text == definition)


class Hand:
    """A clock moved by hand; only the monotonic time is looked at here."""

    seconds = 0.0

    def monotonic_seconds(self) -> float:
        return self.seconds

    def now_seconds(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        raise AssertionError("nothing sleeps here")

    def wait(self, condition: threading.Condition, timeout_seconds: float) -> None:
        raise AssertionError("nothing waits here")


PLAIN_HEADER = b"\x03\x00" + VERSION.bytes
ZLIB_HEADER = b"\x03\x05" + VERSION.bytes


class TestGlueAvro:
    def test_plain_and_zlib_frames_are_read(self) -> None:
        registry = Registry({VERSION: json.dumps(WRITER)})
        decode = codec_of(DecodeAvro.glue(registry, reader_schema=READER)).open()
        expected = {"carrier": "UA", "delay": 5, "tail": None}
        assert decode(PLAIN_HEADER + avro(UA)) == expected
        assert decode(record(ZLIB_HEADER + zlib.compress(avro(UA)))) == expected

    def test_plain_and_zlib_frames_are_written(self) -> None:
        plain = EncodeAvro.glue(WRITER, schema_version_id=str(VERSION), partition_key="k")
        assert convert(plain, UA) == OutgoingRecord(PLAIN_HEADER + avro(UA), "k", None)
        zipped = convert(EncodeAvro.glue(WRITER, schema_version_id=VERSION, compressed=True), UA).data
        assert zipped[:18] == ZLIB_HEADER
        assert zlib.decompress(zipped[18:]) == avro(UA)

    def test_a_version_is_fetched_once_for_all_threads_and_workers_of_a_process(self) -> None:
        registry = Registry({VERSION: json.dumps(WRITER)})
        barrier = threading.Barrier(8)

        def work() -> None:
            decode = codec_of(DecodeAvro.glue(registry)).open()
            barrier.wait()
            for _ in range(20):
                assert decode(PLAIN_HEADER + avro(UA)) == UA

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert registry.asked == 1

    def test_an_unknown_version_fails_the_element_and_is_asked_for_again_a_minute_later(self) -> None:
        registry, clock = Registry({}), Hand()
        read = Glue(registry, clock=clock).reader()
        for seconds, asked in ((0, 1), (59, 1), (60, 2), (61, 2)):
            clock.seconds = seconds
            with pytest.raises(UnknownSchema, match=str(VERSION)):
                read(PLAIN_HEADER)
            assert registry.asked == asked
        registry.definitions[VERSION] = json.dumps(WRITER)
        clock.seconds = 120
        assert read(PLAIN_HEADER + b"x")[1].read() == b"x"

    def test_a_registry_that_does_not_answer_fails_the_bundle_and_not_the_element(self) -> None:
        registry = Registry({VERSION: json.dumps(WRITER)}, fails=OSError("no route"))
        fn = _CodecFn(codec_of(DecodeAvro.glue(registry)), "decode_errors", sets_aside=True)
        fn.setup()
        with pytest.raises(SchemaUnavailable, match=f"{VERSION} cannot be fetched: no route"):
            fn.process(PLAIN_HEADER + avro(UA))
        registry.fails = None
        assert fn.process(PLAIN_HEADER + avro(UA)) == [UA]

    @pytest.mark.parametrize(
        ("data", "error"),
        [
            (b"", "ValueError: no Glue header: 0 bytes that begin with nothing"),
            (b'{"a": 1}', "ValueError: no Glue header: 8 bytes that begin with 7b 22, not with 03 00 or 03 05"),
            (PLAIN_HEADER[:-1], "ValueError: no Glue header: 17 bytes that begin with 03 00"),
            (b"\x03\x01" + VERSION.bytes, "ValueError: unknown compression 01"),
            (ZLIB_HEADER + b"xx", "error: "),
            (ZLIB_HEADER + zlib.compress(avro(UA))[:-1], "ValueError: the compressed value is cut short"),
        ],
    )
    def test_a_wrong_frame_is_said(self, data: bytes, error: str) -> None:
        registry = Registry({VERSION: json.dumps(WRITER)})
        assert error_of(DecodeAvro.glue(registry), data).startswith(error)

    def test_a_value_that_would_fill_the_memory_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("samza_kinesis_io.transforms.avro_schemas._MAX_UNCOMPRESSED_BYTES", 1000)
        data = ZLIB_HEADER + zlib.compress(bytes(1001))
        assert error_of(DecodeAvro.glue(Registry({})), data) == "ValueError: more than 1000 bytes when uncompressed"

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({}, "either schema_name or schema_version_id"),
            ({"schema_name": "s", "schema_version_id": VERSION}, "either schema_name or schema_version_id"),
            ({"schema_version_id": "7"}, "schema_version_id must be a UUID, got '7'"),
            ({"schema_name": "s", "compressed": "zlib"}, "compressed must be True or False, got 'zlib'"),
        ],
    )
    def test_a_wrong_option_is_refused(self, options: dict[str, Any], words: str) -> None:
        with pytest.raises(ConfigurationError, match=words):
            EncodeAvro.glue(WRITER, **options)


class TestGlueSchemaRegistry:
    """Through boto3, against moto."""

    @pytest.fixture
    def version(self) -> Iterator[uuid.UUID]:
        with mock_aws():
            glue = boto3.client("glue", region_name="us-east-1")
            glue.create_registry(RegistryName="ours")
            made = glue.create_schema(
                RegistryId={"RegistryName": "ours"},
                SchemaName="flights",
                DataFormat="AVRO",
                Compatibility="NONE",
                SchemaDefinition=json.dumps(WRITER),
            )
            yield uuid.UUID(made["SchemaVersionId"])

    def test_what_is_written_by_name_is_read_by_version(self, version: uuid.UUID) -> None:
        registry = GlueSchemaRegistry("ours")
        written = convert(EncodeAvro.glue(WRITER, schema_name="flights", registry=registry), UA).data
        assert written[2:18] == version.bytes
        assert convert(DecodeAvro.glue(registry), written) == UA

    def test_a_version_that_does_not_exist_is_unknown(self, version: uuid.UUID) -> None:
        with pytest.raises(UnknownSchema):
            GlueSchemaRegistry().definition(uuid.uuid4())

    def test_a_definition_nobody_registered_says_what_to_do(self, version: uuid.UUID) -> None:
        with pytest.raises(UnknownSchema, match=r"no version of schema flights in registry ours .* register it first"):
            GlueSchemaRegistry("ours").version_id("flights", json.dumps(READER))


def counted(result: Any, name: str) -> int:
    found = result.metrics().query(beam.metrics.MetricsFilter().with_namespace(NAMESPACE).with_name(name))["counters"]
    return sum(counter.committed for counter in found)


class TestPipelines:
    OPTIONS = PipelineOptions(["--runner=FnApiRunner"])

    def test_failed_elements_are_set_aside_counted_and_keep_their_time(self) -> None:
        good, bad = record(b'{"carrier": "UA", "delay": 5}'), record(b"{")
        p = beam.Pipeline(options=self.OPTIONS)
        elements = p | beam.Create([TimestampedValue(good, 10), TimestampedValue(bad, 20)])
        decoded, failed = elements | DecodeJson(Flight, dead_letters=True)
        stamped = failed | beam.Map(lambda f, t=beam.DoFn.TimestampParam: (f, t))
        assert_that(decoded, equal_to([Flight("UA", 5)]), label="decoded")
        assert_that(
            stamped, equal_to([(FailedElement(bad, "DecodeError", "Input data was truncated"), 20)]), label="failed"
        )
        result = p.run()
        result.wait_until_finish()
        assert counted(result, "decode_errors") == 1

    def test_an_error_handler_gets_the_failed_elements(self) -> None:
        with beam.Pipeline(options=self.OPTIONS) as p:
            handler = CollectingErrorHandler()
            with handler:
                encoded = p | beam.Create([{"a": 1}, {"a": object}]) | EncodeJson().with_error_handler(handler)
            assert_that(encoded, equal_to([OutgoingRecord(b'{"a":1}')]), label="encoded")
            kinds = handler.output() | beam.Map(lambda f: f.error_type)
            assert_that(kinds, equal_to(["NotImplementedError"]), label="failed")

    def test_by_default_a_failed_element_fails_the_pipeline_and_is_named(self) -> None:
        with pytest.raises(
            Exception, match=r"record 4956 .* of shard shardId-000000000007 of stream flights: Input data was truncated"
        ):
            with beam.Pipeline(options=self.OPTIONS) as p:
                p | beam.Create([record(b"{")]) | DecodeJson()

    def test_avro_rows_reach_sql_like_transforms_by_field_name(self) -> None:
        with beam.Pipeline(options=self.OPTIONS) as p:
            sums = (
                p
                | beam.Create([avro(UA), avro({**UA, "delay": 7})])
                | DecodeAvro.schemaless(WRITER, reader_schema=READER, into=beam.Row)
                | beam.GroupBy("carrier").aggregate_field("delay", sum, "delay")
                | beam.Map(lambda row: (row.carrier, row.delay))
            )
            assert_that(sums, equal_to([("UA", 12)]))

    def test_rows_of_a_beam_schema_are_encoded(self) -> None:
        with beam.Pipeline(options=self.OPTIONS) as p:
            rows = p | beam.Create([3]) | beam.Map(lambda x: beam.Row(carrier="UA", delay=x, gate="B"))
            outgoing = rows | beam.Reshuffle() | EncodeAvro.schemaless(WRITER, partition_key=lambda row: row.carrier)
            expected = OutgoingRecord(avro({"carrier": "UA", "delay": 3, "gate": "B"}), "UA")
            assert_that(outgoing, equal_to([expected]))


class TestDeadLetters:
    def test_the_coder_keeps_the_class_and_the_element(self) -> None:
        coder = coders.registry.get_coder(FailedElement)
        assert type(coder) is FailedElementCoder
        for element in (record(b"{"), b"{", {"a": Flight("UA", 5)}):
            failed = FailedElement(element, "DecodeError", "truncated")
            assert coder.decode(coder.encode(failed)) == failed

    def test_the_error_of_a_failed_element_carries_its_cause(self) -> None:
        fn = _CodecFn(codec_of(DecodeJson()), "decode_errors", sets_aside=False)
        fn.setup()
        with pytest.raises(
            CodecFailed, match="element b'{': Input data was truncated. Use dead_letters=True"
        ) as caught:
            fn.process(b"{")
        assert isinstance(caught.value.__cause__, msgspec.DecodeError)

    def test_dead_letters_is_a_yes_or_a_no(self) -> None:
        with pytest.raises(ConfigurationError, match="dead_letters must be True or False, got 'yes'"):
            DecodeJson(dead_letters="yes")  # type: ignore[arg-type]


@given(st.binary(max_size=100))
def test_no_bytes_do_more_than_fail_their_element(data: bytes) -> None:
    registry = Registry({VERSION: json.dumps(NESTED)})
    transforms: list[CodecTransform] = [
        DecodeJson(Flight),
        DecodeAvro.schemaless(NESTED, into=beam.Row),
        DecodeAvro.single_object([NESTED]),
        DecodeAvro.glue(registry),
    ]
    for transform in transforms:
        fn = _CodecFn(codec_of(transform), "decode_errors", sets_aside=True)
        fn.setup()
        for framed in (data, PLAIN_HEADER + data, b"\xc3\x01" + fingerprint(parsed(json.dumps(NESTED))) + data):
            assert len(fn.process(framed)) == 1
