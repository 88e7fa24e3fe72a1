"""`SimulatedClock`: time that moves only when it is told to."""

from __future__ import annotations

import threading

from samza_kinesis_io.testing.process_local import ProcessLocal


class SimulatedClock(ProcessLocal):
    """A `samza_kinesis_io.clock.Clock` for tests.

    With `autojump` (the default) `sleep` and `wait` return at once and move the time themselves: right for code that
    one thread runs. Every thread that sleeps moves the time of all, so for code with threads of its own give
    `autojump=False`: then `sleep` and `wait` really block, until another thread calls `advance` far enough.

    Monotonic time begins at 1000, so that a mix-up of the two times shows.
    Pickles as a reference, within this process only.
    """

    def __init__(self, start_seconds: float = 1_700_000_000.0, *, autojump: bool = True) -> None:
        self._start = float(start_seconds)
        # Whole nanoseconds: ten steps of 0.1 make 1, which they do not as floats of this size.
        self._elapsed_nanos = 0
        self._autojump = autojump
        self._moved = threading.Condition()
        self._waiting: list[tuple[int, threading.Condition]] = []

    def now_seconds(self) -> float:
        return self._start + self._elapsed_nanos / 1e9

    def monotonic_seconds(self) -> float:
        return 1000.0 + self._elapsed_nanos / 1e9

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass, and wake who waited for it. Call it without holding a lock that a waiter needs.

        Raises:
            ValueError: `seconds` is negative; time does not go back.
        """
        if seconds < 0:
            raise ValueError(f"time cannot go back: advance() got {seconds} seconds")
        with self._moved:
            self._elapsed_nanos += round(seconds * 1e9)
            due = [condition for deadline, condition in self._waiting if deadline <= self._elapsed_nanos]
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
            deadline = self._elapsed_nanos + round(seconds * 1e9)
            self._moved.wait_for(lambda: self._elapsed_nanos >= deadline)

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
            entry = (self._elapsed_nanos + round(timeout_seconds * 1e9), condition)
            self._waiting.append(entry)
        try:
            # advance() takes the condition's lock, which we hold until the wait releases it: no wake-up is missed.
            condition.wait()
        finally:
            with self._moved:
                self._waiting.remove(entry)
