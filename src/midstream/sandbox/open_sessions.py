"""How many sessions of a pool are open and wanted, as its observers are told."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

from midstream.observing import Observers, SessionAsked, SessionClosed, SessionGranted, SessionOpened

SessionT = TypeVar("SessionT")


class OpenSessions(Generic[SessionT]):
    """The open sessions of a pool. Usable from any thread.

    One that nobody has any more is open no longer. That is told when the next comes or goes, since an object may end
    in the middle of anything, of what an observer does too.
    """

    def __init__(self, observers: Observers) -> None:
        self._observers = observers
        self._lock = threading.Lock()
        self._sessions: weakref.WeakSet[SessionT] = weakref.WeakSet()
        self._told = 0

    def __iter__(self) -> Iterator[SessionT]:
        with self._lock:
            return iter(list(self._sessions))

    def add(self, session: SessionT) -> None:
        """A session is open, if it was not before."""
        with self._lock:
            ended, new = self._ended(), session not in self._sessions
            self._sessions.add(session)
            self._told += new
        for _ in range(ended):
            self._observers(SessionClosed())
        if new:
            self._observers(SessionOpened())

    def remove(self, session: SessionT) -> None:
        """A session was closed. One that is not open is none to remove."""
        with self._lock:
            self._sessions.discard(session)
        self.tell()

    def tell(self) -> None:
        """Tell of those that have ended since this was last told."""
        with self._lock:
            ended = self._ended()
        for _ in range(ended):
            self._observers(SessionClosed())

    def _ended(self) -> int:
        """How many observers take for open that are not, from now on none."""
        before, self._told = self._told, len(self._sessions)
        return before - self._told

    @contextlib.contextmanager
    def asked(self, count: int = 1) -> Iterator[None]:
        """Tell that somebody wants so many sessions, for as long as this lasts."""
        began = time.monotonic()
        for _ in range(count):
            self._observers(SessionAsked())
        refused = True
        try:
            yield
            refused = False
        finally:
            for _ in range(count):
                self._observers(SessionGranted(time.monotonic() - began, refused=refused))
