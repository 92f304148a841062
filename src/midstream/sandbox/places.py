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


class _Ticket(Future[None]):
    """A stand in the line, of somebody who wants ``count`` places."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count


class Places:
    """``count`` places, or any number of them (None), for threads and for asyncio at once."""

    def __init__(self, count: int | None) -> None:
        self._free: float = math.inf if count is None else count
        self._lock = threading.Lock()
        self._waiting: deque[_Ticket] = deque()
        # An object may end, and give its place back, in the middle of anything that this thread does, the
        # holding of the lock included. So places come back through here, where nobody has to wait.
        self._returned: deque[None] = deque()
        self._closed = False

    @property
    def waiting(self) -> int:
        """How many wait for places."""
        with self._lock:
            count = sum(not ticket.cancelled() for ticket in self._waiting)
        self._settle()
        return count

    @property
    def free(self) -> int | None:
        """How many would be given out at once; None is any number."""
        self._settle()
        with self._lock:
            free = self._free + len(self._returned)
            free -= sum(ticket.count for ticket in self._waiting if not ticket.cancelled())
        self._settle()
        return None if math.isinf(free) else max(0, int(free))

    def take(self, count: int = 1) -> list[Place]:
        """So many places at once; blocks until it is one's turn. Raises ProtocolError once this is closed.

        None is held while the others are waited for: two who wait for several would wait for each other.
        """
        ticket = self._queue(count)
        try:
            ticket.result()
        except BaseException:
            self._leave(ticket)
            raise
        return [Place(self) for _ in range(count)]

    async def take_async(self, count: int = 1) -> list[Place]:
        """The same for asyncio."""
        ticket = self._queue(count)
        try:
            if ticket.done():
                ticket.result()
            else:
                await asyncio.wrap_future(ticket)
        except BaseException:
            self._leave(ticket)
            raise
        return [Place(self) for _ in range(count)]

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

    def _queue(self, count: int) -> _Ticket:
        ticket = _Ticket(count)
        with self._lock:
            if self._closed:
                raise _closed()
            self._waiting.append(ticket)
            granted = self._hand_out()
        _grant(granted)
        self._settle()
        return ticket

    def _leave(self, ticket: _Ticket) -> None:
        """Stop waiting; what was granted at the very same time goes to the next."""
        if ticket.cancel():
            with self._lock:
                if ticket in self._waiting:
                    self._waiting.remove(ticket)
                granted = self._hand_out()  # there may be enough for those behind
            _grant(granted)
            self._settle()
        elif ticket.exception() is None:
            for _ in range(ticket.count):
                self.give_back()

    def _settle(self) -> None:
        # Whoever holds the lock meanwhile comes here after.
        while self._returned and self._lock.acquire(blocking=False):
            try:
                granted = self._hand_out()
            finally:
                self._lock.release()
            _grant(granted)

    def _hand_out(self) -> list[_Ticket]:
        while self._returned:
            self._returned.pop()
            self._free += 1
        granted = []
        while self._waiting and self._free >= self._waiting[0].count:
            ticket = self._waiting.popleft()
            if ticket.set_running_or_notify_cancel():
                self._free -= ticket.count
                granted.append(ticket)
        return granted


def _grant(tickets: list[_Ticket]) -> None:
    for ticket in tickets:
        ticket.set_result(None)


def _closed() -> ProtocolError:
    return ProtocolError("this pool is closed")
