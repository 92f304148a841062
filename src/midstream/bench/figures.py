"""What a benchmark says, and how two things are measured in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured thing, and what it was measured beside.

    ``ratio``: ``value`` over the value of ``beside``, both of this run; None where there is nothing comparable.
    """

    name: str
    value: float
    unit: str
    beside: str = ""
    ratio: float | None = None


def in_turns(actions: Mapping[str, Callable[[], object]], *, turns: int, times: int) -> dict[str, float]:
    """Seconds of each action: the best of its turns' medians, which the rest of the machine disturbs least.

    Each turn calls each action ``times`` times, so that what slows the machine down slows all of them down.
    """
    medians: dict[str, list[float]] = {name: [] for name in actions}
    for action in actions.values():
        action()
    for _ in range(turns):
        for name, action in actions.items():
            medians[name].append(statistics.median(_seconds(action) for _ in range(times)))
    return {name: min(taken) for name, taken in medians.items()}


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
