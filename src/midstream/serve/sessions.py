"""Interpreters that clients name, to find their names and files again in a later request."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from midstream.jobs import KeptSession
from midstream.serve.refusals import Refused


@dataclass(slots=True)
class _Named:
    """``granted``: to a request whose row has not begun, or is not over."""

    session: KeptSession
    idle_since: float
    granted: bool = True

    @property
    def busy(self) -> bool:
        return self.granted or self.session.in_use


@dataclass(slots=True)
class NamedSessions:
    """Each client's sessions, by the names that it gives them. Used in one event loop.

    A session that nothing has run in for ``seconds`` is over. ``end`` ends the interpreter of one that has to go.
    """

    seconds: float
    most_per_client: int
    end: Callable[[KeptSession], object]
    clock: Callable[[], float] = time.monotonic
    _named: OrderedDict[tuple[str, str], _Named] = field(default_factory=OrderedDict)  # idle for longest first

    def __len__(self) -> int:
        return len(self._named)

    def take(self, client: str, name: str) -> tuple[KeptSession, bool]:
        """A client's session, and whether it is new; it is the client's until :meth:`used`.

        Raises :class:`Refused` where it is in use, or one too many.
        """
        self._end_old()
        named = self._named.get((client, name))
        if named is not None:
            if named.busy:
                raise Refused(
                    409, f"midstream.session: {name!r} is in use", param="midstream.session", code="session_in_use"
                )
            named.granted = True
            return named.session, False
        own = [key for key in self._named if key[0] == client]
        if len(own) >= self.most_per_client:
            idle = next((key for key in own if not self._named[key].busy), None)
            if idle is None:
                message = f"{self.most_per_client} sessions are the most for one client, and all are in use"
                raise Refused(429, message, code="rate_limit_exceeded", retry_after=1.0)
            self.end(self._named.pop(idle).session)
        session = KeptSession()
        self._named[client, name] = _Named(session, self.clock())
        return session, True

    def used(self, client: str, name: str) -> None:
        """The row for which the session was taken is over, or never began: from now on it is idle."""
        named = self._named.get((client, name))
        if named is not None:
            named.granted = False
            named.idle_since = self.clock()
            self._named.move_to_end((client, name))

    def drop(self, client: str, name: str) -> None:
        """End a session. Raises :class:`Refused` where there is none, and while it is in use."""
        self._end_old()
        named = self._named.get((client, name))
        if named is None:
            raise Refused(404, f"there is no session {name!r}", code="not_found")
        if named.busy:
            raise Refused(409, f"session {name!r} is in use", code="session_in_use")
        del self._named[client, name]
        self.end(named.session)

    def _end_old(self) -> None:
        until = self.clock() - self.seconds
        for key, named in list(self._named.items()):
            if named.idle_since <= until and not named.busy:
                del self._named[key]
                self.end(named.session)
