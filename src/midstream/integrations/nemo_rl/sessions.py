"""Sessions of rows between two of their steps."""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class _Kept:
    session: Any
    until: float


class KeptSessions:
    """Keeps up to ``count`` sessions, each for ``seconds``, then closes it. For use on one event loop.

    Every time that a session is kept it gets another handle, so a handle stands for one state and no other. Who takes
    a session has it alone, and the handle is spent.
    """

    def __init__(self, count: int, seconds: float) -> None:
        self._count = count
        self._seconds = seconds
        self._kept: OrderedDict[str, _Kept] = OrderedDict()  # those that end first stand first
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, session: Any) -> str:
        """Keep a session, in place of the one that was kept longest where there are too many. Returns its handle."""
        handle = secrets.token_hex(8)
        until = asyncio.get_running_loop().time() + self._seconds
        self._kept[handle] = _Kept(session, until)
        while len(self._kept) > self._count:
            self._kept.popitem(last=False)[1].session.close()
        self._set_timer()
        return handle

    def take(self, handle: str) -> Any | None:
        """The session that was kept under a handle, if it is there still."""
        kept = self._kept.pop(handle, None)
        self._set_timer()
        return None if kept is None else kept.session

    def close(self) -> None:
        """Close all that are kept."""
        kept = list(self._kept.values())
        self._kept.clear()
        self._set_timer()
        for each in kept:
            each.session.close()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._kept:
            until = next(iter(self._kept.values())).until
            self._timer = asyncio.get_running_loop().call_at(until, self._end_leases)

    def _end_leases(self) -> None:
        now = asyncio.get_running_loop().time()
        while self._kept and next(iter(self._kept.values())).until <= now:
            self._kept.popitem(last=False)[1].session.close()
        self._timer = None
        self._set_timer()
