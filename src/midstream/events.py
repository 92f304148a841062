"""What a row says, and the states that it is in."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from midstream.types import Call, Media, StopReason


@dataclass(frozen=True, slots=True)
class BlockOpened:
    """A start tag is complete; code, or a call, follows. ``form``: which of the markup's forms it has."""

    form: int = 0


@dataclass(frozen=True, slots=True)
class CodeDelta:
    """More of the open block's code, as it arrives. A block's deltas together are its code."""

    text: str


@dataclass(frozen=True, slots=True)
class Execute:
    """Blocks have closed: run ``calls`` in order and give their results to :meth:`Row.inject`.

    A call that is ``declined`` is not to be run; its result is ``ExecutionResult(call.declined)``.
    """

    calls: tuple[Call, ...]


@dataclass(frozen=True, slots=True)
class Stopped:
    """The row has stopped; it takes nothing more."""

    reason: StopReason


Event = BlockOpened | CodeDelta | Execute | Stopped


@dataclass(frozen=True, slots=True)
class Received:
    """``accepted``: how many of the ids count, from the first; the engine forgets the rest."""

    accepted: int
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class Inject:
    """Ids, and images, that the engine must append before it goes on."""

    ids: tuple[int, ...]
    media: tuple[Media, ...] = ()


@dataclass(frozen=True, slots=True)
class Nothing:
    """Nothing to append: the engine goes on where it was."""


class RowState(enum.Enum):
    GENERATING = "generating"
    EXECUTING = "executing"
    STOPPED = "stopped"
