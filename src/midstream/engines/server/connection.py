"""How a server is reached: what to send with each request, how long to wait, and what is asked again."""

from __future__ import annotations

import math
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from midstream import checks
from midstream.errors import ConfigurationError

AfterBreak = Literal["replay", "continue", "fail"]


@dataclass(frozen=True, slots=True)
class ServerConnection:
    """How a server is reached. Times are seconds; None is no bound.

    - ``api_key``: sent as ``Authorization: Bearer``; never logged, recorded or shown in an error.
    - ``headers``, ``body``: more headers and more fields of the JSON of every request for ids.
    - ``tls``: in place of the system's certificates, which ``https`` is verified against.
    - ``max_requests``: requests that are under way at a time; further ones wait here, first come, first served.
    - ``connect_timeout``: until a connection stands. ``idle_timeout``: between two pieces of an answer (all of it,
      where it is not streamed). ``request_timeout``: of one request from its first byte to its last.
    - ``retries``: how often in a row a request is made again after a fault; any new id starts the count anew.
      Before retry ``k`` (from 0) lies a wait of ``first_wait`` · 2**k, at most ``longest_wait``, shortened by up to
      a half at random; what the server asks for by ``Retry-After`` is waited for in full.
    - ``give_up_after``: a row that got nothing for so long, faults and waits included, has failed.
    - ``after_break``: what becomes of a request whose answer was lost after it had been sent, so that it may have
      been computed (and billed) already. ``"replay"``: it is made again where that gives the same answer: greedy
      rows go on behind the last id that came; sampled ones are sampled again with the same seed where the server
      keeps to seeds, and what had come must come again; otherwise the row fails. ``"continue"``: any row goes on
      behind the last id that came, with noise of its own. ``"fail"``: the row fails.

    Requests that were never sent, and those answered by 429, 500, 502, 503 and other 5xx but 504, are made again
    whatever ``after_break`` says; 504 counts as a lost answer.

    Raises :class:`~midstream.errors.ConfigurationError` for values that cannot be.
    """

    api_key: str | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: Mapping[str, Any] = field(default_factory=dict)
    tls: ssl.SSLContext | None = None
    max_requests: int = 64
    connect_timeout: float = 10.0
    idle_timeout: float | None = 600.0
    request_timeout: float | None = None
    retries: int = 8
    first_wait: float = 0.5
    longest_wait: float = 30.0
    give_up_after: float = 600.0
    after_break: AfterBreak = "replay"

    def __post_init__(self) -> None:
        # What may be secret is told of by its kind alone.
        if self.api_key is not None and not isinstance(self.api_key, str):
            raise ConfigurationError(f"ServerConnection.api_key: is {_kind(self.api_key)}; must be a string or None")
        if not isinstance(self.headers, Mapping):
            raise ConfigurationError(f"ServerConnection.headers: is {_kind(self.headers)}; must be a mapping")
        for header, value in self.headers.items():
            if not isinstance(header, str) or not isinstance(value, str):
                raise ConfigurationError(
                    f"ServerConnection.headers[{header!r}]: is {_kind(value)}; names and values must be strings"
                )
        checks.instance("ServerConnection.body", self.body, Mapping)
        checks.instance("ServerConnection.tls", self.tls, ssl.SSLContext, optional=True)
        for name, least in (("max_requests", 1), ("retries", 0)):
            checks.integer(f"ServerConnection.{name}", getattr(self, name), least)
        for name in ("connect_timeout", "idle_timeout", "request_timeout", "give_up_after"):
            value = getattr(self, name)
            optional = name in ("idle_timeout", "request_timeout")
            if value is None and optional:
                continue
            if not _is_time(value) or value <= 0:
                wanted = "more than 0 seconds" + (", or None" if optional else "")
                raise ConfigurationError(f"ServerConnection.{name}={value!r}: must be {wanted}")
        for name in ("first_wait", "longest_wait"):
            value = getattr(self, name)
            if not _is_time(value) or value < 0:
                raise ConfigurationError(f"ServerConnection.{name}={value!r}: must be 0 seconds or more")
        if self.after_break not in get_args(AfterBreak):
            wanted = ", ".join(map(repr, get_args(AfterBreak)))
            raise ConfigurationError(f"ServerConnection.after_break={self.after_break!r}: must be one of {wanted}")


def _kind(value: object) -> str:
    return type(value).__name__


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
