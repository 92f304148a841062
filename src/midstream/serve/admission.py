"""Who may ask, how much at a time, and how often."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from midstream.errors import ConfigurationError
from midstream.serve.refusals import Refused

_FORGET_OVER = 1024
"""Clients that are remembered before those that ask nothing are forgotten."""

_SOON = 1.0
"""Seconds after which a place may be free, as far as is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceLimits:
    """What bounds a service and each of its clients.

    - ``rows``: answers that are generated at a time; ``queue``: those that may wait besides, before more are refused
      with 503. A request for ``n`` answers counts ``n`` times.
    - ``rows_per_client``, ``requests_per_minute``, ``sessions_per_client``: of one client, else 429; None is no bound.
      A client's sessions are those that it names; one more takes the place of the one that was idle for longest.
    - ``body``: bytes of a request, else 413.

    Raises :class:`~midstream.errors.ConfigurationError` for bounds that are none.
    """

    rows: int = 64
    queue: int = 256
    rows_per_client: int | None = None
    requests_per_minute: float | None = None
    sessions_per_client: int = 16
    body: int = 8 * 2**20

    def __post_init__(self) -> None:
        least = {"rows": 1, "queue": 0, "rows_per_client": 1, "sessions_per_client": 1, "body": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if name == "rows_per_client" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < bound:
                raise ConfigurationError(f"ServiceLimits.{name}={value!r}: must be an integer of at least {bound}")
        rate = self.requests_per_minute
        if rate is not None and not (isinstance(rate, int | float) and math.isfinite(rate) and rate > 0):
            raise ConfigurationError(f"ServiceLimits.requests_per_minute={rate!r}: must be over 0, or None")


class ApiKeys:
    """Names of clients by their keys. Only digests of keys are held, and compared."""

    def __init__(self, names: Mapping[str, str]) -> None:
        """``names``: from key to name. Raises :class:`ConfigurationError` where a key is empty."""
        if "" in names:
            raise ConfigurationError(f"the key of client {names['']!r} is empty")
        self._names = {_digest(key): name for key, name in names.items()}

    def __repr__(self) -> str:
        return f"ApiKeys(of {sorted(self._names.values())})"

    def client(self, authorization: str | None) -> str:
        """The client whose key an ``Authorization`` header holds. Raises :class:`Refused`."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Refused(401, "no API key was given (Authorization: Bearer KEY)", code="missing_api_key")
        name = self._names.get(_digest(key.strip()))
        if name is None:
            raise Refused(401, "this API key is not known", code="invalid_api_key")
        return name


@dataclass(slots=True)
class _Client:
    rows: int = 0
    allowance: float = 0.0
    at: float = 0.0


@dataclass(slots=True)
class Admission:
    """Counts what is under way. Used in one event loop."""

    limits: ServiceLimits
    clock: Callable[[], float] = time.monotonic
    rows: int = 0
    _clients: dict[str, _Client] = field(default_factory=dict)

    def count_request(self, client: str) -> None:
        """A client asks once more; a minute's worth may come at once. Raises :class:`Refused` for what is too often."""
        rate = self.limits.requests_per_minute
        if rate is None:
            return
        most = max(1.0, rate)
        known = self._known(client)
        now = self.clock()
        known.allowance = min(most, known.allowance + (now - known.at) * rate / 60)
        known.at = now
        if known.allowance < 1:
            wait = (1 - known.allowance) * 60 / rate
            raise Refused(429, f"{rate:g} requests a minute are the most", code="rate_limit_exceeded", retry_after=wait)
        known.allowance -= 1

    def enter(self, client: str, rows: int) -> Callable[[], None]:
        """Take places for ``rows`` answers; what is returned gives one of them back. Raises :class:`Refused`."""
        limits = self.limits
        most = limits.rows + limits.queue
        if rows > most:
            raise Refused(400, f"{rows} answers in one request; {most} are the most", param="n", code="invalid_value")
        known = self._known(client)
        of_client = limits.rows_per_client
        if of_client is not None and rows > of_client:
            raise Refused(
                400, f"{rows} answers in one request; {of_client} are the most", param="n", code="invalid_value"
            )
        if of_client is not None and known.rows + rows > of_client:
            message = f"{of_client} answers at a time are the most for one client, and {known.rows} are under way"
            raise Refused(429, message, code="rate_limit_exceeded", retry_after=_SOON)
        if self.rows + rows > most:
            raise Refused(503, "all places are taken, and the queue is full", code="overloaded", retry_after=_SOON)
        self.rows += rows
        known.rows += rows

        def leave() -> None:
            self.rows -= 1
            known.rows -= 1

        return leave

    def _known(self, client: str) -> _Client:
        if client not in self._clients:
            if len(self._clients) >= _FORGET_OVER:
                self._forget_idle()
            self._clients[client] = _Client(0, max(1.0, self.limits.requests_per_minute or 0.0), self.clock())
        return self._clients[client]

    def _forget_idle(self) -> None:
        """A client without rows that has not asked for a minute is as one that never did."""
        now = self.clock()
        for name, client in list(self._clients.items()):
            if not client.rows and now - client.at >= 60:
                del self._clients[name]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
