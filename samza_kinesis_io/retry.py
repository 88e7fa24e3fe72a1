"""How long to wait before the next try: pure, with chance as an argument."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BackoffPolicy:
    """Exponential back-off with equal jitter: try n waits between half and the whole of min(max, initial * factor**n).

    Half of the wait is fixed, so that a throttled caller never comes back at once; the other half is chance,
    so that callers throttled together do not come back together.
    """

    initial_seconds: float
    max_seconds: float
    factor: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.initial_seconds <= self.max_seconds:
            raise ValueError(
                f"back-off needs 0 < initial_seconds <= max_seconds, got {self.initial_seconds} and {self.max_seconds}"
            )
        if self.factor < 1:
            raise ValueError(f"factor must be >= 1, got {self.factor}")

    def wait_seconds(self, failures: int, rng: random.Random) -> float:
        """Return the wait after `failures` failures in a row (at least 1)."""
        # The exponent is capped so that the power cannot overflow after a long outage.
        ceiling = min(self.max_seconds, self.initial_seconds * self.factor ** min(failures - 1, 60))
        return ceiling / 2 + rng.random() * ceiling / 2
