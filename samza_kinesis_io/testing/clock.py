"""`SimulatedClock`: time that moves only when it is told to."""

from __future__ import annotations

import threading

from samza_kinesis_io.testing.process_local import ProcessLocal


class SimulatedClock(ProcessLocal):
    """A `samza_kinesis_io.clock.Clock` for tests.

    With `autojump` (the default) `sleep` and `wait` return at once and move the time themselves: right for code that
    one thread runs. Every thread that sleeps moves the time of all, so for code with threads of its own give
    `autojump=False`: then `sleep` and `wait` really block, until another thread calls `advance` far enough.

    Wall-clock and monotonic time are the same number. Pickles as a reference, within this process only.
    """

    def __init__(self, start_seconds: float = 1_700_000_000.0, *, autojump: bool = True) -> None:
        self._now = float(start_seconds)
        self._autojump = autojump
        self._moved = threading.Condition()
        self._waiting: list[tuple[float, threading.Condition]] = []

    def now_seconds(self) -> float:
        return self._now

    def monotonic_seconds(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass, and wake who waited for it. Call it without holding a lock that a waiter needs.

        Raises:
            ValueError: `seconds` is negative; time does not go back.
        """
        if seconds < 0:
            raise ValueError(f"time cannot go back: advance() got {seconds} seconds")
        with self._moved:
            self._now += seconds
            due = [condition for deadline, condition in self._waiting if deadline <= self._now]
            self._moved.notify_all()
        for condition in due:
            with condition:
                condition.notify_all()

    def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            return
        if self._autojump:
            self.advance(seconds)
            return
        with self._moved:
            deadline = self._now + seconds
            self._moved.wait_for(lambda: self._now >= deadline)

    def wait(self, condition: threading.Condition, timeout_seconds: float) -> None:
        """Wait on `condition`; see `samza_kinesis_io.clock.Clock.wait`.

        With `autojump` nobody is waited for: the time moves by `timeout_seconds` and the caller looks again.
        """
        if timeout_seconds <= 0:
            return
        if self._autojump:
            self.advance(timeout_seconds)
            return
        with self._moved:
            entry = (self._now + timeout_seconds, condition)
            self._waiting.append(entry)
        try:
            # advance() takes the condition's lock, which we hold until the wait releases it: no wake-up is missed.
            condition.wait()
        finally:
            with self._moved:
                self._waiting.remove(entry)
