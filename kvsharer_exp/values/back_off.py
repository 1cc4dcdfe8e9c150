"""When to ask a server again that did not answer: 1, 2, 4 … 60 seconds after each failure.

The study's storage (`search.served_study`) and MLflow (`tracking.patience`) are asked by it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

LONGEST = 60.0
"""The most seconds between two tries."""


class BackOff:
    """Knows when the next try is due; the first one always is.

    Args:
        clock: gives the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._delay, self._next = 0.0, clock()

    @property
    def left(self) -> float:
        """The seconds until the next try; 0 when it is due."""
        return max(0.0, self._next - self._clock())

    def failed(self) -> None:
        """Wait for twice as long as before."""
        self._delay = min(LONGEST, 2 * self._delay or 1.0)
        self._next = self._clock() + self._delay

    def answered(self) -> None:
        """Begin with the shortest wait again."""
        self._delay, self._next = 0.0, self._clock()
