"""Each behaviour on each target; a known difference is an expected failure, and one that is gone is a real one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from contract.differences import DIFFERENCES
from contract.kinesis import Kinesis
from contract.targets import TARGETS, ServiceError, Target

_EMULATORS = ("kinesis-local", "moto")
#: How a difference shows: a wrong answer, an error, or the lack of one. A crash of the test itself is none.
_DIFFERS = (AssertionError, ServiceError, pytest.fail.Exception)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "targets(*names): runs on these targets of the contract only")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kinesis" not in metafunc.fixturenames:
        return
    chosen = metafunc.definition.get_closest_marker("targets")
    behaviour = metafunc.function.__name__.removeprefix("test_")
    params = []
    for name in chosen.args if chosen is not None else TARGETS:
        marks: list[pytest.MarkDecorator] = []
        if name in _EMULATORS:
            marks.append(pytest.mark.emulators)
        if reason := DIFFERENCES.get((name, behaviour)):
            # Strict: once the difference is gone, its line must go.
            marks.append(pytest.mark.xfail(raises=_DIFFERS, reason=reason, strict=True))
        params.append(pytest.param(name, marks=marks, id=name))
    metafunc.parametrize("target", params, indirect=True)


@pytest.fixture(scope="session")
def _open_targets() -> Iterator[dict[str, Target]]:
    with contextlib.ExitStack() as stack:
        opened = _Opened(stack)
        yield opened


class _Opened(dict[str, Target]):
    """Targets that are started at the first test that needs them and stopped after the last."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        super().__init__()
        self._stack = stack

    def __missing__(self, name: str) -> Target:
        self[name] = self._stack.enter_context(TARGETS[name]())
        return self[name]


@pytest.fixture
def target(request: pytest.FixtureRequest, _open_targets: dict[str, Target]) -> Target:
    return _open_targets[request.param]


@pytest.fixture
def kinesis(target: Target) -> Iterator[Kinesis]:
    kinesis = Kinesis(target)
    yield kinesis
    kinesis.delete_streams()
