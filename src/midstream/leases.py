"""Sessions that are kept for a while: of paused rows, and between rows that share one."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

from midstream.jobs import KeptSession, Session
from midstream.types import Trajectory

_Key = tuple[str | None, int, int, bytes] | int


@dataclass(slots=True)
class _Lease:
    session: Session
    until: float
    owner: Trajectory | KeptSession  # held here, so that no other object gets its place in memory


class SessionLeases:
    """Holds each session for ``seconds``, then closes it. Usable from any thread.

    A session belongs to a trajectory by what that holds, not by which object it is: one that went through a
    file finds its session again. A :class:`~midstream.jobs.KeptSession` is found by which object it is.
    Whoever takes a session has it alone.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._lock = threading.Lock()
        self._leases: OrderedDict[_Key, _Lease] = OrderedDict()  # those that end first stand first
        self._timer: threading.Timer | None = None
        self._closed = False

    def __len__(self) -> int:
        with self._lock:
            return len(self._leases)

    def hold(self, owner: Trajectory | KeptSession, session: Session) -> None:
        """Keep the session in which the owner's blocks ran. Closes it at once where it cannot be kept."""
        key = _key(owner)
        with self._lock:
            refused = session if self._closed or self.seconds <= 0 else None
            if refused is None:
                earlier = self._leases.pop(key, None)
                refused = earlier.session if earlier is not None else None
                self._leases[key] = _Lease(session, time.monotonic() + self.seconds, owner)
                self._set_timer()
        if refused is not None:
            refused.close()

    def take(self, owner: Trajectory | KeptSession) -> Session | None:
        """The owner's session, if it is held still."""
        if not self._leases:
            return None
        with self._lock:
            lease = self._leases.pop(_key(owner), None)
            self._set_timer()
        return None if lease is None else lease.session

    def give_up_oldest(self) -> bool:
        """Close the session that is held longest, so that its place is free. False where none is held."""
        with self._lock:
            if not self._leases:
                return False
            _, lease = self._leases.popitem(last=False)
            self._set_timer()
        lease.session.close()
        return True

    def close(self) -> None:
        """Close all that are held, and whatever comes later. May be called twice."""
        with self._lock:
            self._closed = True
            leases, timer = list(self._leases.values()), self._timer
            self._leases.clear()
            self._set_timer()
        for lease in leases:
            lease.session.close()
        if timer is not None and timer is not threading.current_thread():
            timer.join()

    def _set_timer(self) -> None:
        """Have the first lease end in time; with the lock held."""
        if self._timer is not None and self._leases:
            return  # it runs for a lease that ended no later than those that are left
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        elif self._leases:
            first = next(iter(self._leases.values()))
            self._timer = threading.Timer(max(0.0, first.until - time.monotonic()), self._end_some)
            self._timer.daemon = True
            self._timer.name = "midstream-leases"
            self._timer.start()

    def _end_some(self) -> None:
        ended = []
        with self._lock:
            if threading.current_thread() is not self._timer:
                return  # cancelled while it began
            self._timer = None
            now = time.monotonic()
            while self._leases and next(iter(self._leases.values())).until <= now:
                ended.append(self._leases.popitem(last=False)[1].session)
            self._set_timer()
        for session in ended:
            session.close()


def _key(owner: Trajectory | KeptSession) -> _Key:
    if isinstance(owner, KeptSession):
        return id(owner)
    ids = hashlib.blake2b(",".join(map(str, owner.ids)).encode(), digest_size=16).digest()
    return owner.prompt.id, owner.sample, owner.seed, ids
