"""Time as an argument.

Nothing below the edge reads the clock of the machine: it takes a `Clock`. In production that is
`SystemClock`; tests pass `samza_kinesis_io.testing.SimulatedClock`, whose time moves only when it is told to.
"""

from __future__ import annotations

import threading
import time
from typing import Protocol


class Clock(Protocol):
    """What the package knows of time."""

    def now_seconds(self) -> float:
        """Return wall-clock time, in seconds since the epoch (UTC)."""
        ...

    def monotonic_seconds(self) -> float:
        """Return a time that never goes back; only differences mean something."""
        ...

    def sleep(self, seconds: float) -> None:
        """Let `seconds` pass. Zero or less returns at once."""
        ...

    def wait(self, condition: threading.Condition, timeout_seconds: float) -> None:
        """Wait on `condition`, whose lock the caller holds, for at most `timeout_seconds`.

        Returns when notified, when the time is over, or without a reason: the caller looks again.
        """
        ...


class SystemClock:
    """The machine's own clock. Has no state, so it can be pickled into a DoFn."""

    def now_seconds(self) -> float:
        return time.time()

    def monotonic_seconds(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        if seconds > 0:
            time.sleep(seconds)

    def wait(self, condition: threading.Condition, timeout_seconds: float) -> None:
        if timeout_seconds > 0:
            condition.wait(timeout_seconds)
