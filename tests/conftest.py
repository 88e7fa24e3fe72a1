"""What holds for every test."""

from __future__ import annotations

import logging
import os

import pytest
from hypothesis import HealthCheck, settings

# Deterministic everywhere but in a soak: a red run must be red again, and a developer's bad luck is not a regression.
# Deadlines are off, since machines differ; pytest-timeout ends what hangs.
_common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("quick", max_examples=50, derandomize=True, **_common)
settings.register_profile("ci", max_examples=200, derandomize=True, **_common)
settings.register_profile("thorough", max_examples=2_000, **_common)
settings.register_profile("soak", max_examples=10_000, print_blob=True, **_common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture(autouse=True)
def _no_aws_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reaches, or depends on, the AWS account of whoever runs it."""
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)


@pytest.fixture(autouse=True, scope="session")
def _quiet_beam() -> None:
    """Beam and botocore log each step of a pipeline at INFO, which buries a failure."""
    for name in ("apache_beam", "botocore", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)
