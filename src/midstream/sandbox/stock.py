"""Interpreters that are started before anybody asks for them."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import deque

from midstream.errors import SandboxError
from midstream.sandbox.fork_server import ForkServer
from midstream.sandbox.process import SessionProcess, wait_for_start, wait_for_start_async


class Stock:
    """Starts interpreters on one fork server, and keeps ``count`` of them started ahead.

    They are nobody's until they are taken: without tools, without a seed, and nothing has run in them.
    """

    def __init__(self, server: ForkServer, count: int) -> None:
        self.server = server
        self._count = count
        self._lock = threading.Lock()
        self._channels: deque[socket.socket] = deque()
        self._closed = False

    def start(self) -> SessionProcess:
        """An interpreter: the one that was started longest ago, else a new one."""
        while (channel := self._oldest()) is not None:
            try:
                process = wait_for_start(channel)
            except SandboxError:
                if self.server.ends():
                    raise
                continue  # it ended by itself while it waited
            if self._fit(process):
                return self._ours(process)
        process = wait_for_start(self.server.request())
        self.fill()
        return self._ours(process)

    async def start_async(self) -> SessionProcess:
        """The same for asyncio."""
        while (channel := self._oldest()) is not None:
            try:
                process = await wait_for_start_async(channel)
            except SandboxError:
                if self.server.ends():
                    raise
                continue
            if self._fit(process):
                return self._ours(process)
        process = await wait_for_start_async(await self.server.request_async())
        self.fill()
        return self._ours(process)

    def fill(self) -> None:
        """Ask for as many as are missing, as far as that can be done without waiting."""
        with self._lock, contextlib.suppress(SandboxError):  # who needs one is told what is wrong
            while not self._closed and len(self._channels) < self._count:
                channel = self.server.request_if_idle()
                if channel is None:
                    return
                self._channels.append(channel)

    def _oldest(self) -> socket.socket | None:
        with self._lock:
            return self._channels.popleft() if self._channels else None

    def _fit(self, process: SessionProcess) -> bool:
        self.fill()
        if process.disturbed():
            process.close()
            return False
        return True

    def _ours(self, process: SessionProcess) -> SessionProcess:
        # Not of the pool: by the time a session asks, another may have started a new server.
        process.orphaned = self.server.ends
        return process

    def close(self) -> None:
        """End them, and the fork server with them. May be called twice."""
        with self._lock:
            self._closed = True
            while self._channels:
                self._channels.popleft().close()  # at the end of its channel an interpreter ends
        self.server.close()
