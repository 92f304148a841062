"""Places for a bounded number of sessions, given out in the order in which they are asked for."""

from __future__ import annotations

import asyncio
import math
import threading
from collections import deque
from concurrent.futures import Future

from midstream.errors import ProtocolError


class Place:
    """The right to one session. Given back by :meth:`release`, or when nobody holds it any more."""

    def __init__(self, places: Places) -> None:
        self._places: Places | None = places

    def release(self) -> None:
        """Give the place to whoever waits longest. May be called twice."""
        places, self._places = self._places, None
        if places is not None:
            places.give_back()

    def __del__(self) -> None:
        self.release()


class Places:
    """``count`` places, or any number of them (None), for threads and for asyncio at once."""

    def __init__(self, count: int | None) -> None:
        self._free: float = math.inf if count is None else count
        self._lock = threading.Lock()
        self._waiting: deque[Future[None]] = deque()
        # An object may end, and give its place back, in the middle of anything that this thread does, the
        # holding of the lock included. So places come back through here, where nobody has to wait.
        self._returned: deque[None] = deque()
        self._closed = False

    @property
    def waiting(self) -> int:
        """How many wait for a place."""
        with self._lock:
            count = sum(not ticket.cancelled() for ticket in self._waiting)
        self._settle()
        return count

    @property
    def free(self) -> int | None:
        """How many would be given out at once; None is any number."""
        self._settle()
        with self._lock:
            free = self._free + len(self._returned) - sum(not ticket.cancelled() for ticket in self._waiting)
        self._settle()
        return None if math.isinf(free) else max(0, int(free))

    def take(self) -> Place:
        """A place; blocks until it is one's turn. Raises ProtocolError once this is closed."""
        ticket = self._queue()
        try:
            ticket.result()
        except BaseException:
            self._leave(ticket)
            raise
        return Place(self)

    async def take_async(self) -> Place:
        """The same for asyncio."""
        ticket = self._queue()
        try:
            if ticket.done():
                ticket.result()
            else:
                await asyncio.wrap_future(ticket)
        except BaseException:
            self._leave(ticket)
            raise
        return Place(self)

    def give_back(self) -> None:
        """One place is free again. Never waits."""
        self._returned.append(None)
        self._settle()

    def close(self) -> None:
        """Turn away all who wait, and all who will come."""
        with self._lock:
            self._closed = True
            waiting = [ticket for ticket in self._waiting if ticket.set_running_or_notify_cancel()]
            self._waiting.clear()
        for ticket in waiting:
            ticket.set_exception(_closed())

    def _queue(self) -> Future[None]:
        ticket: Future[None] = Future()
        with self._lock:
            if self._closed:
                raise _closed()
            self._waiting.append(ticket)
            granted = self._hand_out()
        _grant(granted)
        self._settle()
        return ticket

    def _leave(self, ticket: Future[None]) -> None:
        """Stop waiting; what was granted at the very same time goes to the next."""
        if ticket.cancel():
            with self._lock:
                if ticket in self._waiting:
                    self._waiting.remove(ticket)
            self._settle()
        elif ticket.exception() is None:
            self.give_back()

    def _settle(self) -> None:
        # Whoever holds the lock meanwhile comes here after.
        while self._returned and self._lock.acquire(blocking=False):
            try:
                granted = self._hand_out()
            finally:
                self._lock.release()
            _grant(granted)

    def _hand_out(self) -> list[Future[None]]:
        while self._returned:
            self._returned.pop()
            self._free += 1
        granted = []
        while self._waiting and self._free >= 1:
            ticket = self._waiting.popleft()
            if ticket.set_running_or_notify_cancel():
                self._free -= 1
                granted.append(ticket)
        return granted


def _grant(tickets: list[Future[None]]) -> None:
    for ticket in tickets:
        ticket.set_result(None)


def _closed() -> ProtocolError:
    return ProtocolError("this pool is closed")
