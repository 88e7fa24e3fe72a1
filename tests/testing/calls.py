"""Calls of a fake service whose answers are checked against botocore's model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from contract.model import assert_valid_output

from samza_kinesis_io.testing import FakeKinesis, FakeServiceError


def call(fake: FakeKinesis, operation: str, **params: Any) -> dict[str, Any]:
    """Return the answer, which is one that the service could give."""
    answer = fake.call(operation, params)
    assert_could_be_the_services(operation, answer)
    return answer


def refused(fake: FakeKinesis, operation: str, **params: Any) -> FakeServiceError:
    """Return the error with which the call is refused."""
    with pytest.raises(FakeServiceError) as caught:
        fake.call(operation, params)
    return caught.value


def assert_could_be_the_services(operation: str, answer: dict[str, Any]) -> None:
    """Check an answer against the model, except where the service itself breaks it.

    The model demands FailedRecordCount >= 1 and one ShardLevelMetric at least; the service answers 0 and none.
    """
    answer = copy.deepcopy(answer)
    if answer.get("FailedRecordCount") == 0:
        del answer["FailedRecordCount"]
    for description in ("StreamDescription", "StreamDescriptionSummary"):
        if description in answer:
            assert answer[description]["EnhancedMonitoring"] == [{"ShardLevelMetrics": []}]
            answer[description]["EnhancedMonitoring"] = []
    assert_valid_output(operation, answer)
