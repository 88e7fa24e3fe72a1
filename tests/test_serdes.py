"""Samza's serdes: the bytes are those of Samza's own factories."""

from __future__ import annotations

import json
import pickle
import uuid
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from samza_kinesis_io.errors import ConfigurationError
from samza_kinesis_io.serdes import JsonSerde, SerdeError, serde

UUID = uuid.UUID("00112233-4455-6677-8899-aabbccddeeff")
SCHEMA = json.dumps({"type": "record", "name": "Delay", "fields": [{"name": "minutes", "type": "int"}]})


class Upper:
    """A user's serde."""

    def __init__(self, options: Any = None) -> None:
        self.options = options

    def to_bytes(self, value: Any) -> bytes:
        return str(value).upper().encode()

    def from_bytes(self, data: bytes) -> Any:
        return data.decode()


@pytest.mark.parametrize(
    ("name", "value", "data"),
    [
        ("string", "Zürich", b"Z\xc3\xbcrich"),
        ("json", {"delay": 5, "to": "Zürich"}, b'{"delay":5,"to":"Z\xc3\xbcrich"}'),
        ("integer", -2, b"\xff\xff\xff\xfe"),
        ("long", 2**40, b"\x00\x00\x01\x00\x00\x00\x00\x00"),
        ("double", 1.5, b"\x3f\xf8\x00\x00\x00\x00\x00\x00"),
        ("byte", b"\x00\xff", b"\x00\xff"),
        ("bytebuffer", b"abc", b"abc"),
        ("uuid", UUID, bytes.fromhex("00112233445566778899aabbccddeeff")),
    ],
)
def test_a_value_is_the_bytes_that_samza_makes_of_it(name: str, value: Any, data: bytes) -> None:
    assert serde(name).to_bytes(value) == data
    assert serde(name).from_bytes(data) == value


@pytest.mark.parametrize(
    ("java", "name"),
    [
        ("Json", "json"),
        ("String", "string"),
        ("Long", "long"),
        ("UUID", "uuid"),
        ("Byte", "byte"),
        ("JsonSerdeV2", "json"),
    ],
)
def test_javas_factory_classes_are_known(java: str, name: str) -> None:
    suffix = "Factory" if java.endswith("V2") else "SerdeFactory"
    assert type(serde(f"org.apache.samza.serializers.{java}{suffix}")) is type(serde(name))


@pytest.mark.parametrize(
    ("name", "value"),
    [("string", 5), ("integer", "5"), ("integer", True), ("integer", 2**31), ("long", 2**63), ("long", 1.0),
     ("double", "x"), ("uuid", "x"), ("byte", "x"), ("json", {1, 2}), ("json", float("nan"))],
)  # fmt: skip
def test_a_value_of_another_kind_is_refused(name: str, value: Any) -> None:
    with pytest.raises(SerdeError):
        serde(name).to_bytes(value)


@pytest.mark.parametrize(
    ("name", "data"),
    [("string", b"\xff"), ("json", b"{"), ("json", b"\xff"), ("integer", b"123"), ("long", b"1"), ("uuid", b"1")],
)
def test_bytes_that_are_no_such_value_are_refused(name: str, data: bytes) -> None:
    with pytest.raises(SerdeError):
        serde(name).from_bytes(data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(json_values)
def test_json_survives(value: Any) -> None:
    try:
        data = JsonSerde().to_bytes(value)
    except SerdeError:
        return  # lone surrogates have no UTF-8
    assert JsonSerde().from_bytes(data) == value


def test_strings_may_have_another_encoding() -> None:
    assert serde("string", {"encoding": "utf-16-be"}).to_bytes("A") == b"\x00A"
    with pytest.raises(ConfigurationError, match="encoding must be known to Python, got 'klingon'"):
        serde("string", {"encoding": "klingon"})


def test_java_serialization_is_refused_with_the_reason() -> None:
    for name in ("serializable", "org.apache.samza.serializers.SerializableSerdeFactory"):
        with pytest.raises(ConfigurationError, match=r"only the classes that wrote it can read it.*use json or avro"):
            serde(name)


@pytest.mark.parametrize("name", ["jsn", "com.example.MySerdeFactory"])
def test_an_unknown_serde_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"is not known; known are avro, byte,"):
        serde(name)


def test_a_serde_of_the_users_is_found_by_its_path_and_given_its_options() -> None:
    here = f"{__name__}.Upper"
    import sys

    sys.modules.setdefault(__name__, sys.modules[Upper.__module__])
    assert serde(here).to_bytes("a") == b"A"
    made: Any = serde(here, {"x": "y"})
    assert made.options == {"x": "y"}
    with pytest.raises(ConfigurationError, match="cannot be imported"):
        serde("no.such.module.Serde")


class TestAvro:
    def test_a_record_survives_also_with_a_pickled_serde(self) -> None:
        avro = pickle.loads(pickle.dumps(serde("avro", {"schema": SCHEMA})))
        assert avro.to_bytes({"minutes": -3}) == b"\x05"
        assert avro.from_bytes(b"\x05") == {"minutes": -3}

    def test_the_schema_may_stand_in_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "delay.avsc").write_text(SCHEMA)
        assert serde("avro", {"schema.path": str(tmp_path / "delay.avsc")}).from_bytes(b"\x02") == {"minutes": 1}

    @pytest.mark.parametrize("data", [b"", b"\x05\x05"])
    def test_bytes_too_few_or_too_many_are_refused(self, data: bytes) -> None:
        with pytest.raises(SerdeError):
            serde("avro", {"schema": SCHEMA}).from_bytes(data)

    def test_a_value_of_another_form_is_refused(self) -> None:
        with pytest.raises(SerdeError, match="does not fit the avro schema"):
            serde("avro", {"schema": SCHEMA}).to_bytes({"minutes": "many"})

    def test_without_a_schema_the_message_says_where_to_put_it(self) -> None:
        with pytest.raises(ConfigurationError, match=r"serializers\.registry\.NAME\.schema"):
            serde("avro")
        with pytest.raises(ConfigurationError, match="schema is none"):
            serde("avro", {"schema": "{"})
