"""What a server is asked for, what it answers, and what can go wrong between."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from midstream.types import Sampling

Finish = Literal["asked", "own", "length"]
"""Why an answer ended: at a stop id or string that was asked for, at one of the server's own, or for length."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A request to go on from ``ids``.

    ``seed`` is None for greedy rows. ``most``: new ids at most. ``alternatives``: of how many of the likeliest
    ids logprobs are wanted besides. ``weight_version``: the number that ids get where the server tells
    none; None where they get none. ``row``: names the row that asks, for servers that keep what they computed of it.
    """

    ids: tuple[int, ...]
    sampling: Sampling
    seed: int | None
    most: int
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    stream: bool = True
    alternatives: int = 0
    weight_version: int | None = None
    row: int = 0

    def behind(self, ids: Sequence[int]) -> Ask:
        """The request that goes on behind ``ids``, which are the answer's first."""
        return replace(self, ids=(*self.ids, *ids), most=self.most - len(ids))


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer.

    ``text`` is what the server says that the ids stand for, where it says so. ``likeliest``: of the first id of
    the piece, the logprobs that were asked for, in falling order. ``version``: of the weights, where it is told.
    """

    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    text: str | None = None
    finish: Finish | None = None
    version: int | None = None
    likeliest: tuple[float, ...] = ()


class FaultKind(enum.Enum):
    """What a fault leaves open."""

    UNDONE = "nothing was computed"
    LOST = "the answer may have been computed"
    FINAL = "asking again would give the same"


class Fault(Exception):
    """A request that failed. ``retry_after``: seconds for which the server asks to be left alone."""

    def __init__(self, kind: FaultKind, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after = retry_after


class GaveUp(Fault):
    """Asking again did not help, or would take too long."""

    def __init__(self, message: str) -> None:
        super().__init__(FaultKind.FINAL, message)


class Unauthorized(Fault):
    """The server takes no request with the key that it was given, or without one."""

    def __init__(self, message: str) -> None:
        super().__init__(FaultKind.FINAL, message)


class Lacking(Fault):
    """The server answered, but without what rows need. ``missing`` names it."""

    def __init__(self, missing: str) -> None:
        super().__init__(FaultKind.FINAL, f"the answer has no {missing}")
        self.missing = missing


def finish_of(ask: Ask, reason: object, cause: object, last: int | None) -> Finish | None:
    """What a finish reason means, where ``cause`` is the stop id or string that a server names, if it does.

    ``last`` is the answer's last id. Raises :class:`Fault` for an end that is none: the server gave the request up.
    """
    if reason is None:
        return None
    if reason == "length":
        return "length"
    if reason != "stop":
        raise Fault(FaultKind.LOST, f"the server ended the answer with {reason!r}")
    known: set[object] = {*ask.stop_ids, *ask.stop_strings}
    return "asked" if (cause in known if isinstance(cause, int | str) else last in ask.stop_ids) else "own"


def refuse_errors(event: Any) -> None:
    """Raises :class:`Fault` for an error that stands in place of an answer."""
    error = event.get("error") if isinstance(event, dict) else None
    if error:
        code = error.get("code") if isinstance(error, dict) else None
        final = isinstance(code, int) and 400 <= code < 500 and code != 429
        message = error.get("message", error) if isinstance(error, dict) else error
        raise Fault(FaultKind.FINAL if final else FaultKind.LOST, f"the server sent an error: {message}")
