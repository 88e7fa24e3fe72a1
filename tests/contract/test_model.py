"""The judge is judged first: `model.assert_valid_output` finds what it is there to find."""

from __future__ import annotations

import pytest
from contract.model import assert_valid_output, error_codes

_RECORD = {"Data": b"", "SequenceNumber": "1", "PartitionKey": "k", "ApproximateArrivalTimestamp": 1.5}


def test_a_right_answer_is_accepted() -> None:
    assert_valid_output("GetRecords", {"Records": [_RECORD], "MillisBehindLatest": 0, "ResponseMetadata": {}})


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ({}, "Records is missing"),
        ({"Records": [], "Shards": []}, "Shards is unknown"),
        ({"Records": [{**_RECORD, "SequenceNumber": 1}]}, r"Records\[0\].SequenceNumber must be string"),
        ({"Records": [{**_RECORD, "Data": "text"}]}, "must be blob"),
        ({"Records": [{**_RECORD, "SequenceNumber": "01"}]}, "must match"),
        ({"Records": [{**_RECORD, "EncryptionType": "ROT13"}]}, "must be one of"),
        ({"Records": [], "MillisBehindLatest": -1}, "value must be 0"),
        ({"Records": [], "MillisBehindLatest": True}, "must be long"),
        ({"Records": [], "NextShardIterator": None}, "must be string"),
    ],
)
def test_a_wrong_answer_is_refused_with_its_fault(answer: dict, fault: str) -> None:
    with pytest.raises(AssertionError, match=fault):
        assert_valid_output("GetRecords", answer)


def test_an_operation_without_an_answer_takes_an_empty_one_only() -> None:
    assert_valid_output("SplitShard", {})
    with pytest.raises(AssertionError):
        assert_valid_output("SplitShard", {"StreamName": "x"})


def test_the_models_error_codes_are_known() -> None:
    assert "ExpiredIteratorException" in error_codes("GetRecords")
    assert "ExpiredIteratorException" not in error_codes("ListShards")
