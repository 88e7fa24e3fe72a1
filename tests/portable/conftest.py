"""A test of this folder names the features it needs, and runs on every runner that has them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

import pytest
from portable.pipelines import Read
from portable.runners import FN_API, RUNNERS, Feature, Job, Runner
from portable.stream import Flights

from samza_kinesis_io.testing import LocalKinesis


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(*features): runs on the runners that have these features")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "runner" not in metafunc.fixturenames:
        return
    needs = metafunc.definition.get_closest_marker("needs")
    assert needs is not None, f"{metafunc.function.__name__} must say what it needs of a runner"
    wanted = set(needs.args)
    assert all(isinstance(feature, Feature) for feature in wanted)
    metafunc.parametrize(
        "runner",
        [
            # The FnApiRunner is there wherever Beam is.
            pytest.param(runner, id=runner.name, marks=[] if runner is FN_API else [pytest.mark.portable])
            for runner in RUNNERS
            if wanted <= runner.features
        ],
    )


@pytest.fixture(autouse=True, scope="session")
def _quiet_end_of_job_servers() -> None:
    """They are stopped, and say so, after pytest has taken its handlers away."""
    logging.getLogger("apache_beam.utils.subprocess_server").setLevel(logging.ERROR)


@pytest.fixture
def kinesis() -> Iterator[LocalKinesis]:
    with LocalKinesis() as kinesis:
        yield kinesis


@pytest.fixture
def flights(kinesis: LocalKinesis, runner: Runner) -> Flights:
    return Flights(kinesis, shards=4, one_restriction=Feature.OVERLAP not in runner.features)


@pytest.fixture
def stack(kinesis: LocalKinesis) -> Iterator[contextlib.ExitStack]:
    """Closed before the service goes: what still reads would wait for it."""
    with contextlib.ExitStack() as stack:
        yield stack


Start = Callable[..., Job]


@pytest.fixture
def start(runner: Runner, kinesis: LocalKinesis, stack: contextlib.ExitStack) -> Iterator[Start]:
    """Start one of the pipelines on this test's runner."""

    jobs: list[Job] = []

    def start(name: str, read: Read = Read(), **options: object) -> Job:  # noqa: B008 (frozen)
        jobs.append(runner.start(stack, name, kinesis.endpoint_url, read, **options))  # type: ignore[arg-type]
        return jobs[-1]

    yield start
    # Whoever still reads is told to go, in the only way that every runner understands; before the service goes.
    kinesis.fake.faults.clear()
    kinesis.fake.faults.deny_access("GetRecords")
    for job in jobs:
        job.abandon()
