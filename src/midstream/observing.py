"""What happens while rows are generated and sessions run, told to whoever wants to know.

An *observer* is any callable that takes one observation: one of the dataclasses below. Metrics, spans and the
command line's live view are observers, and a generator's own counts are one. Observers are called where things
happen, on the event loop that generates or in the thread that uses a session, so they return at once and may be
called from several threads. Whatever one raises is logged and harms nobody.

What begins and ends is told in two observations, in one thread and one context, and the second has the first in
it: an observer that sets a context variable at the first finds it at the second, and what runs between sees it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from midstream import checks
from midstream.errors import ConfigurationError
from midstream.types import Call, ExecutionResult, ForkPoint, ToolAnswer, Trajectory

__all__ = [
    "BlockBegan",
    "BlockEnded",
    "FirstToken",
    "InterpreterStarted",
    "Observation",
    "ObservedRow",
    "Observer",
    "Observers",
    "Outcome",
    "ResultsInjected",
    "RowMoved",
    "RowsQueued",
    "SessionAsked",
    "SessionClosed",
    "SessionGranted",
    "SessionOpened",
    "SessionRan",
    "Stage",
    "Stepped",
    "ToolBegan",
    "ToolEnded",
    "outcome_of",
]

logger = logging.getLogger(__name__)

Stage = Literal["waiting", "decoding", "executing", "rewarding", "done"]
"""Where a row is: not given to the engine yet; sampled for; held for its code, its calls or its copies; over, and its
reward being computed; over."""

Outcome = Literal["ok", "error", "timeout", "limit", "declined", "failed", "cancelled"]
"""What became of a block or of a call: it gave something; it raised; its time was up; it hit another limit; it was
not to be run; the machinery failed; its row was over before it."""


@dataclass(slots=True, eq=False)
class ObservedRow:
    """One row. The same object in all observations of it, and never equal to another row's.

    ``prompt_tokens``: ids that the engine has to compute before the first new one: 0 for rows that go on
    (``resumed``) and for copies, whose ``lineage`` says of what.
    """

    prompt_id: str | None
    group: str | None
    sample: int
    seed: int
    prompt_tokens: int = 0
    resumed: bool = False
    lineage: tuple[ForkPoint, ...] = ()
    stage: Stage = "waiting"

    @property
    def log_fields(self) -> dict[str, object]:
        """What a log record of the row has as ``extra`` fields."""
        return {"prompt_id": self.prompt_id, "sample": self.sample}


@dataclass(frozen=True, slots=True)
class RowsQueued:
    """Rows that are to be generated, waiting so far."""

    count: int


@dataclass(frozen=True, slots=True)
class RowMoved:
    """A row is in another stage than before. ``trajectory``: of one that is over; None where nobody will get it."""

    row: ObservedRow
    before: Stage
    after: Stage
    trajectory: Trajectory | None = None


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The engine gave the first ids of a row, ``seconds`` after the row was given to it."""

    row: ObservedRow
    seconds: float


@dataclass(frozen=True, slots=True)
class Stepped:
    """The engine made a step over ``rows`` rows, which took ``seconds`` and gave ``tokens`` ids that count."""

    seconds: float
    rows: int
    tokens: int


@dataclass(frozen=True, slots=True)
class ResultsInjected:
    """Results stand in a row, ``tokens`` ids of them."""

    row: ObservedRow
    tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class BlockBegan:
    """A block of a row is run: code in its session, or a call that was written as JSON on the host."""

    row: ObservedRow
    call: Call


@dataclass(frozen=True, slots=True)
class BlockEnded:
    """It has its ``result``, or the ``error`` that the machinery failed with. ``seconds``: starting a session, and
    running its past again, included."""

    began: BlockBegan
    seconds: float
    result: ExecutionResult | None = None
    error: BaseException | None = None

    @property
    def outcome(self) -> Outcome:
        if self.result is None:
            return _failure(self.error)
        return "declined" if self.began.call.declined else outcome_of(self.result)


@dataclass(frozen=True, slots=True, eq=False)
class ToolBegan:
    """A tool is called, by code or by a call that was written as JSON. ``row``: None outside of a row."""

    row: ObservedRow | None
    name: str


@dataclass(frozen=True, slots=True)
class ToolEnded:
    """It has its ``answer``, or the ``error`` that the machinery failed with."""

    began: ToolBegan
    seconds: float
    answer: ToolAnswer | None = None
    error: BaseException | None = None

    @property
    def outcome(self) -> Outcome:
        if self.answer is None:
            return _failure(self.error)
        if self.answer.error is None:
            return "ok"
        return "timeout" if self.answer.error.type == "TimeoutError" else "error"


@dataclass(frozen=True, slots=True)
class SessionAsked:
    """Somebody wants a session, and waits where the pool's ``max_sessions`` are open."""


@dataclass(frozen=True, slots=True)
class SessionGranted:
    """The wait is over, after ``seconds``: there may be one more, or the pool was closed (``refused``)."""

    seconds: float
    refused: bool = False


@dataclass(frozen=True, slots=True)
class SessionOpened:
    """A session is open, new or a copy."""


@dataclass(frozen=True, slots=True)
class SessionClosed:
    """A session was closed, or given up by whoever had it."""


@dataclass(frozen=True, slots=True)
class InterpreterStarted:
    """A session has a process that took ``seconds`` to be had. ``replacement``: in place of one that had died."""

    seconds: float
    replacement: bool


@dataclass(frozen=True, slots=True)
class SessionRan:
    """A session has run a block, of a row or of whoever uses the session."""

    result: ExecutionResult


Observation = (
    RowsQueued
    | RowMoved
    | FirstToken
    | Stepped
    | ResultsInjected
    | BlockBegan
    | BlockEnded
    | ToolBegan
    | ToolEnded
    | SessionAsked
    | SessionGranted
    | SessionOpened
    | SessionClosed
    | InterpreterStarted
    | SessionRan
)

Observer = Callable[[Observation], object]


class Observers:
    """Several observers as one that never raises.

    Raises :class:`~midstream.errors.ConfigurationError` for one that cannot be called.
    """

    def __init__(self, observers: Iterable[Observer] = ()) -> None:
        self._observers = checks.items("observers", observers, "callables")
        for observer in self._observers:
            if not callable(observer) or isinstance(observer, type):
                raise ConfigurationError(f"observers={observer!r}: must be callables that take an observation")
        self._lock = threading.Lock()
        self._failed: set[int] = set()

    def __call__(self, observation: Observation) -> None:
        for place, observer in enumerate(self._observers):
            try:
                observer(observation)
            except KeyboardInterrupt:
                raise
            except (Exception, asyncio.CancelledError, SystemExit, GeneratorExit) as error:  # noqa: BLE001  # not the rows' fault
                self._tell(place, observation, error)

    def move(self, row: ObservedRow, after: Stage, trajectory: Trajectory | None = None) -> None:
        """``row`` is in the stage ``after`` from now on."""
        before, row.stage = row.stage, after
        self(RowMoved(row, before, after, trajectory))

    def _tell(self, place: int, observation: Observation, error: BaseException) -> None:
        """The first fault of an observer in full; what fails fails thousands of times."""
        with self._lock:
            first = place not in self._failed
            self._failed.add(place)
        level = logging.ERROR if first else logging.DEBUG
        name = type(observation).__name__
        logger.log(level, "the observer %r failed at %s", self._observers[place], name, exc_info=error)


def outcome_of(result: ExecutionResult) -> Outcome:
    """What became of a block that was run."""
    if result.timed_out:
        return "timeout"
    if result.error is None:  # output that was cut is no failure
        return "ok"
    return "error" if result.breached is None else "limit"


def _failure(error: BaseException | None) -> Outcome:
    return "cancelled" if isinstance(error, asyncio.CancelledError) else "failed"
