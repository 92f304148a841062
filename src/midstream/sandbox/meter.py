"""Processor time that a process takes, as its host reads it off the kernel: the code in it has no say in that."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

_SHORTEST_PAUSE = 0.002


class Meter:
    """Processor time from now on, and when it is worth looking whether it has become too much.

    ``clock`` gives the seconds that a process has taken so far, all its threads together, or None where it is
    gone or cannot be seen. ``limit``: seconds, or None.
    """

    def __init__(self, clock: Callable[[], float | None], limit: float | None, now: float) -> None:
        self._clock = clock
        self._limit = limit
        self._start = clock()
        self._last = 0.0
        self.next_look: float | None = None
        if limit is not None:
            self._look_later(now)

    def spent(self) -> float | None:
        """Seconds since the start; None where they are not to be known."""
        present = self._clock()
        if present is None or self._start is None:
            return None
        self._last = max(self._last, present - self._start)
        return self._last

    def exhausted(self, now: float) -> bool:
        """Look, if it is time to. True once, when the limit is reached."""
        if self._limit is None or self.next_look is None or now < self.next_look:
            return False
        spent = self.spent()
        if spent is not None and spent >= self._limit:
            self.next_look = None
            return True
        self._look_later(now)
        return False

    def _look_later(self, now: float) -> None:
        assert self._limit is not None
        # It cannot be reached before: so many cores at once is the most.
        self.next_look = now + max(_SHORTEST_PAUSE, (self._limit - self._last) / _cores())


def _cores() -> int:
    return os.cpu_count() or 1


def clock_of(process: int) -> Callable[[], float | None]:
    """The clock of a process's processor time, by its number; 0 where that is not known."""
    number = ~process << 3 | 2  # as the kernel numbers these clocks: CPUCLOCK_SCHED of a whole process

    def read() -> float | None:
        if process <= 0:  # that would be the caller's own
            return None
        try:
            return time.clock_gettime(number)
        except OSError:
            return None

    return read
