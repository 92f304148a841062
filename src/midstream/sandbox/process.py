"""A session's process as the host holds it: its channel and its pidfd."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from midstream.crossing import Offer
from midstream.errors import SandboxDied, SandboxError, SandboxProtocolError
from midstream.sandbox import protocol
from midstream.sandbox.family import Family
from midstream.sandbox.limits import SandboxLimits
from midstream.sandbox.meter import clock_of
from midstream.sandbox.quota import Quota

_START_BYTES = 1 << 18
START_SECONDS = 60.0
"""How long a fork server may take to start a session, a machine that is all but stopped included."""


class SessionProcess:
    """Owns a channel and a pidfd. ``poll`` waits for the channel to be readable.

    ``quota`` watches its working directory, where nothing else bounds that. ``orphaned`` says whether the fork
    server that it was forked from is gone; ``unsent`` is what the session has to be told before its first block.
    """

    def __init__(self, channel: socket.socket, pidfd: int, number: int, family: Family | None) -> None:
        self.channel = channel
        self.family = family
        self.orphaned: Callable[[], bool] = lambda: False
        self.number = number
        self.folder: str | None = None
        """Its working directory, where that is one of the host's."""
        self.quota: Quota | None = None
        self.unsent = b""
        self._pidfd = pidfd
        self._owner = os.getpid()
        self.poll = select.poll()
        self.poll.register(channel, select.POLLIN)
        self._clock: Callable[[], float | None] | None = None

    @property
    def closed(self) -> bool:
        return self._pidfd < 0

    def lease(
        self, tools: Mapping[str, Offer], seed: int, guardrails: dict[str, Any] | None, limits: SandboxLimits
    ) -> None:
        """Give the session its tools, its seed and what its code is told not to do; from now on its files count."""
        if self.folder is not None:
            self.quota = Quota(self.folder, limits)
        told = {name: offer.as_json() for name, offer in tools.items()}
        terms = {"tools": told, "seed": seed, "guardrails": guardrails}
        self.unsent += protocol.encode({"lease": terms})

    def tell(self, frame: dict[str, Any]) -> None:
        """Send a frame outside of any conversation. Raises :class:`OSError` where nobody takes it."""
        message, self.unsent = self.unsent + protocol.encode(frame), b""
        deadline = time.monotonic() + START_SECONDS
        poll = select.poll()
        poll.register(self.channel, select.POLLOUT)
        while message:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError("the session takes nothing")
            message = message[self.channel.send(message) :]

    def disturbed(self) -> bool:
        """Whether anything came between two blocks: the end of the process, or bytes that nobody asked for."""
        return bool(self.poll.poll(0))

    def interrupt(self, number: signal.Signals = signal.SIGINT) -> None:
        self._signal(number)

    def processor_time(self) -> float | None:
        """Seconds of processor time so far; None where it cannot be seen from here. Ask of the living only."""
        if self._clock is None:
            self._clock = clock_of(self._number_here())
        return self._clock()

    def _number_here(self) -> int:
        """Its number in this process's own namespace, or 0."""
        try:
            with open(f"/proc/self/fdinfo/{self._pidfd}", encoding="ascii") as file:
                return next((int(line.split()[1]) for line in file if line.startswith("Pid:")), 0)
        except OSError:
            return 0

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        # A copy of the host (a forked data loader, say) must not end the sessions of the original.
        if self._pidfd >= 0 and os.getpid() == self._owner:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def close(self) -> None:
        """Kill the process and let go of it."""
        if self._pidfd >= 0:
            self.kill()
            self.channel.close()
            os.close(self._pidfd)
            self._pidfd = -1
            self.family = None  # whose last member takes it along

    def __del__(self) -> None:
        self.close()


class CloneRefused(SandboxError):
    """A process cannot be cloned as it is; it can go on all the same. ``reason`` says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"this session cannot be forked: {reason}")
        self.reason = reason


class Starting:
    """The start of a session: two frames, in either order, with the pidfd beside one of them.

    Until both are here only the library's own code has run on the other side, but for a clone (of a member
    of ``family``), which may say anything from the second frame on.
    """

    def __init__(self, channel: socket.socket, family: Family | None = None) -> None:
        self._channel = channel
        self._family = family
        self._reader = protocol.FrameReader(_START_BYTES)
        self._pidfd = -1
        self._number = 0
        self._folder: str | None = None
        self._ready = False

    def receive(self) -> SessionProcess | None:
        """Read what is there; the process, once it is complete. Raises what went wrong."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._channel, 1 << 16, 2)
        except BlockingIOError:
            return None
        except OSError as error:
            raise SandboxDied(f"the fork server is gone: {error}") from None
        if descriptors:
            self._pidfd = descriptors[0]
        if len(descriptors) > 1:
            self._family = Family(descriptors[1])
        if not data:
            raise SandboxDied("the fork server, or the session that it was starting, is gone")
        self._reader.feed(data)
        while (frame := self._reader.next_frame()) is not None:
            self._take(frame)
        if self._ready and self._pidfd >= 0:
            process = SessionProcess(self._channel, self._pidfd, self._number, self._family)
            process.folder = self._folder
            self._pidfd = -1
            return process
        return None

    def _take(self, frame: dict[str, Any]) -> None:
        if "refused" in frame:
            raise CloneRefused(str(frame["refused"]))
        if "failed" in frame:
            raise SandboxError(f"a session could not be started: {frame['failed']}")
        if "started" in frame and self._number == 0:
            self._number = int(frame["started"])
            self._folder = frame.get("folder")
        elif frame.get("ready") is True:
            self._ready = True
        elif "exited" in frame:
            raise SandboxDied(f"a session ended while it started (status {frame['exited']})")
        else:
            raise SandboxProtocolError("a session that began with something else than its start")

    def abandon(self) -> None:
        """Give back what has come so far."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            os.close(self._pidfd)
            self._pidfd = -1
        self._channel.close()


def wait_for_start(channel: socket.socket, family: Family | None = None) -> SessionProcess:
    """Block until the session that was asked for on the other end of ``channel`` is ready."""
    starting = Starting(channel, family)
    deadline = time.monotonic() + START_SECONDS
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    try:
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                raise SandboxDied(f"a session did not start within {START_SECONDS:g} seconds")
            process = starting.receive()
            if process is not None:
                return process
    except BaseException:
        starting.abandon()
        raise


async def wait_for_start_async(channel: socket.socket, family: Family | None = None) -> SessionProcess:
    """The same for asyncio."""
    starting = Starting(channel, family)
    loop = asyncio.get_running_loop()
    done: asyncio.Future[SessionProcess] = loop.create_future()

    def readable() -> None:
        if done.done():
            return
        try:
            process = starting.receive()
        except Exception as error:  # noqa: BLE001  # handed to who waits
            done.set_exception(error)
        else:
            if process is not None:
                done.set_result(process)

    loop.add_reader(channel, readable)
    try:
        readable()  # it may have been started long ago
        try:
            async with asyncio.timeout(START_SECONDS):
                return await done
        finally:
            loop.remove_reader(channel)
    except BaseException as error:
        if done.done() and not done.cancelled() and done.exception() is None:
            done.result().close()
        starting.abandon()
        if isinstance(error, TimeoutError):
            raise SandboxDied(f"a session did not start within {START_SECONDS:g} seconds") from None
        raise
