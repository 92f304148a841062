"""What goes between a pool and its hosts: orders there, news back. Both carry data that the trusted side made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from midstream import errors
from midstream.crossing import Offer
from midstream.errors import MidstreamError, SandboxError
from midstream.observing import Observation
from midstream.sandbox.replay import PastBlock
from midstream.tools import ToolContext
from midstream.types import ToolAnswer


@dataclass(frozen=True, slots=True)
class Open:
    """A session by the name ``session``, in which ``past`` has happened."""

    number: int
    session: str
    tools: Mapping[str, Offer]
    seed: int
    past: tuple[PastBlock, ...]


@dataclass(frozen=True, slots=True)
class Beside:
    """Tools that are called where the sandbox is. ``tools``: in a list, a reference to them in Ray's store, which each
    host fetches once for each ``key``."""

    key: int
    names: tuple[str, ...]
    tools: list[Any]


@dataclass(frozen=True, slots=True)
class Run:
    """``context``: of the row whose block it is, for the tools ``beside`` it."""

    number: int
    session: str
    code: str
    checkpoint: bool | None
    beside: Beside | None = None
    context: ToolContext | None = None


@dataclass(frozen=True, slots=True)
class Put:
    number: int
    session: str
    path: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Get:
    number: int
    session: str
    path: str


@dataclass(frozen=True, slots=True)
class Fork:
    """Copies of a session, by these names."""

    number: int
    session: str
    copies: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the tool gave to the call ``call``."""

    call: int
    answer: ToolAnswer


@dataclass(frozen=True, slots=True)
class Close:
    """End a session, whatever it does."""

    session: str


Order = Open | Run | Put | Get | Fork | Answer | Close
Numbered = Open | Run | Put | Get | Fork


@dataclass(frozen=True, slots=True)
class Asked:
    """The code of order ``number`` calls a tool. Arguments are JSON, as :mod:`midstream.crossing` makes it."""

    number: int
    call: int
    name: str
    arguments: tuple[Any, ...]
    keyword_arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Done:
    """``observed``: what observers are to be told of it."""

    number: int
    value: Any = None
    observed: tuple[Observation, ...] = ()


@dataclass(frozen=True, slots=True)
class Failed:
    """The order could not be carried out. ``kind`` is the name of one of :mod:`midstream.errors`' errors."""

    number: int
    kind: str
    message: str
    errno: int | None = None
    filename: str | None = None
    observed: tuple[Observation, ...] = ()

    @classmethod
    def by(cls, number: int, error: Exception, observed: tuple[Observation, ...] = ()) -> Failed:
        kind = type(error).__name__
        if isinstance(error, OSError):
            return cls(number, kind, error.strerror or str(error), error.errno, error.filename, observed)
        if isinstance(error, MidstreamError):
            return cls(number, kind, str(error), observed=observed)
        return cls(number, "SandboxError", f"the sandbox's host failed: {error!r}", observed=observed)

    @property
    def error(self) -> Exception:
        kind: Any = getattr(errors, self.kind, SandboxError)
        if self.errno is not None:
            raised: Exception = kind(self.errno, self.message, self.filename)
        else:
            raised = kind(self.message)
        return raised


@dataclass(frozen=True, slots=True)
class Lost:
    """The host is gone, and with it what order ``number`` was doing. Made on the pool's side."""

    number: int


News = Asked | Done | Failed | Lost


@dataclass(slots=True)
class HostReport:
    """What a host says of itself when it has started."""

    level: str
    cores: int
    process_id: int = field(default=0)
