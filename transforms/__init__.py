"""Transforms for what surrounds a stream: codecs, and stream tasks."""

from samza_kinesis_io.transforms.avro_schemas import SchemaRegistry, UnknownSchema
from samza_kinesis_io.transforms.dead_letters import CodecFailed, FailedElement, SchemaUnavailable
from samza_kinesis_io.transforms.decode import DecodeAvro, Decoded, DecodeJson
from samza_kinesis_io.transforms.encode import EncodeAvro, Encoded, EncodeJson
from samza_kinesis_io.transforms.glue import GlueSchemaRegistry

__all__ = [
    "CodecFailed",
    "DecodeAvro",
    "DecodeJson",
    "Decoded",
    "EncodeAvro",
    "EncodeJson",
    "Encoded",
    "FailedElement",
    "GlueSchemaRegistry",
    "SchemaRegistry",
    "SchemaUnavailable",
    "UnknownSchema",
]
