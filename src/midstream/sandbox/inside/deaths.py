"""How sessions end that were not ended by their host, told to it by who waits for them."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
from collections.abc import Mapping

from midstream.sandbox.protocol import encode

_TABLE = "/proc/vmstat"
_TABLE_BYTES = 1 << 16


class Deaths:
    """Says which limit, if any, a session died of."""

    def __init__(self, limits: Mapping[str, int | float | None]) -> None:
        self._cpu_time = limits["cpu_time"]
        try:
            self._table = os.open(_TABLE, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._table = -1
        self._told = self.kills()

    def tell(
        self, channel: socket.socket, status: int | None, seconds: float, kills: int, out_of_memory: bool = False
    ) -> None:
        """Tell the host, if it is still there, how a session ended that took so many seconds of processor time.

        ``kills``: what :meth:`kills` gave when it was born. ``out_of_memory``: its memory cgroup says that it was
        killed for that.
        """
        if _hung_up(channel):
            return
        limit = self._limit_behind(status, seconds, kills, out_of_memory)
        with contextlib.suppress(OSError):
            channel.send(encode({"exited": status, "breached": limit}), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def _limit_behind(self, status: int | None, seconds: float, kills: int, out_of_memory: bool) -> str | None:
        ended_by = None if status is None or os.WIFEXITED(status) else os.WTERMSIG(status)
        if ended_by == signal.SIGXCPU:
            return "cpu_time"
        if ended_by != signal.SIGKILL:
            return None
        if self._cpu_time is not None and seconds >= self._cpu_time:
            return "cpu_time"
        # The kernel says how many processes it has killed for want of memory, and not which: it may have been this one
        # if there is one more since its birth that no other session's death was put down to.
        before, self._told = max(kills, self._told), self.kills()
        return "memory" if out_of_memory or self._told > before else None

    def kills(self) -> int:
        """How many processes the kernel has killed for want of memory so far, whosever they were."""
        if self._table < 0:
            return 0
        with contextlib.suppress(OSError, ValueError, IndexError):
            text = os.pread(self._table, _TABLE_BYTES, 0)
            return int(text.split(b"\noom_kill ", 1)[1].split(b"\n", 1)[0])
        return 0


def _hung_up(channel: socket.socket) -> bool:
    poll = select.poll()
    poll.register(channel, 0)
    return bool(poll.poll(0))
