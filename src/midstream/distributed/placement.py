"""Which host a session goes to, and who waits while all are full."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, Protocol, TypeVar

from midstream.errors import ProtocolError


class Place(Protocol):
    """``sessions``: how many it has. ``cores``: of the machine's, its share."""

    node_id: str
    cores: float
    sessions: int


HostT = TypeVar("HostT", bound=Place)


class Placement(Generic[HostT]):
    """Gives each session the host that has the fewest for its cores, in the order in which they are asked for.

    ``most``: sessions of one host; None is any number. Usable from any thread, and from what ends an object.
    """

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._hosts: list[HostT] = []
        self._waiting: deque[Future[HostT]] = deque()
        # A session may end in the middle of anything that its thread does, the holding of the lock included. So what
        # is to change comes through here, where nobody has to wait.
        self._changes: deque[Callable[[], None]] = deque()
        self._closed = False

    @property
    def hosts(self) -> list[HostT]:
        return list(self._hosts)

    @property
    def free(self) -> int | None:
        """How many sessions would be placed at once; None is any number."""
        if self._most is None:
            return None
        self._settle()
        with self._lock:
            free = sum(max(0, self._most - host.sessions) for host in self._hosts)
            waiting = sum(not ticket.cancelled() for ticket in self._waiting)
        self._settle()
        return max(0, free - waiting)

    def add(self, host: HostT) -> None:
        """A host is ready."""
        self._change(lambda: self._hosts.append(host))

    def remove(self, host: HostT) -> None:
        """A host is gone. Its sessions leave it one by one."""
        self._change(lambda: self._hosts.remove(host) if host in self._hosts else None)

    def ask(self) -> Future[HostT]:
        """A place, which counts as taken as soon as it is there. Raises ProtocolError once this is closed."""
        ticket: Future[HostT] = Future()
        if self._closed:
            raise _closed()
        self._change(lambda: self._waiting.append(ticket))
        return ticket

    def withdraw(self, ticket: Future[HostT]) -> None:
        """Wait no more; a place that was given at that very moment goes to the next."""
        if not ticket.cancel() and ticket.exception() is None:
            self.leave(ticket.result())

    def join(self, host: HostT, count: int) -> None:
        """Sessions that are at a host already, such as copies."""
        self._change(lambda: setattr(host, "sessions", host.sessions + count))

    def leave(self, host: HostT) -> None:
        """One session of a host has ended. Never waits."""
        self._change(lambda: setattr(host, "sessions", host.sessions - 1))

    def close(self) -> None:
        """Turn away all who wait, and all who will come."""
        self._closed = True
        self._change(lambda: None)

    def _change(self, change: Callable[[], None]) -> None:
        self._changes.append(change)
        self._settle()

    def _settle(self) -> None:
        # Whoever holds the lock meanwhile comes here after.
        while self._changes and self._lock.acquire(blocking=False):
            try:
                while self._changes:
                    self._changes.popleft()()
                granted = self._hand_out()
                turned_away = (
                    [one for one in self._waiting if one.set_running_or_notify_cancel()] if self._closed else []
                )
                if self._closed:
                    self._waiting.clear()
            finally:
                self._lock.release()
            for ticket, host in granted:
                ticket.set_result(host)
            for ticket in turned_away:
                ticket.set_exception(_closed())

    def _hand_out(self) -> list[tuple[Future[HostT], HostT]]:
        granted = []
        while self._waiting and not self._closed:
            open_hosts = [host for host in self._hosts if self._most is None or host.sessions < self._most]
            if not open_hosts:
                break
            ticket = self._waiting.popleft()
            if ticket.set_running_or_notify_cancel():
                host = min(open_hosts, key=lambda one: (one.sessions / one.cores, one.node_id))
                host.sessions += 1
                granted.append((ticket, host))
        return granted


def _closed() -> ProtocolError:
    return ProtocolError("the pool is closed")
