"""Processes of a family that ask their warden for leave: who is heard, who waits, and who is refused."""

from __future__ import annotations

import contextlib
import errno
import select
import time
from collections.abc import Callable, Mapping

from midstream.sandbox.inside import inspection
from midstream.sandbox.inside.cloning import Hello
from midstream.sandbox.inside.grounds import Refused
from midstream.sandbox.inside.kin import Member
from midstream.sandbox.isolation.supervision import Listener, Waiting

SECONDS = 2.0
"""How long the warden waits for what a process has to do next."""


class Asking:
    """Answers supervised system calls that nobody has asked for, and finds those that somebody has."""

    def __init__(self, listener: Listener, members: Mapping[int, Member]) -> None:
        self._listener = listener
        self._members = members
        self._held: list[Waiting] = []

    @property
    def anybody(self) -> bool:
        """Whether somebody has been heard and not been answered yet."""
        return bool(self._held)

    def hear(self) -> None:
        """Take in one who asks now."""
        waiting = self._listener.receive(0)
        if waiting is not None:
            self.hold(waiting)

    def hold(self, waiting: Waiting) -> None:
        """Let this one wait."""
        self._held.append(waiting)

    def decide(self, waiting: Waiting) -> None:
        """Answer a call that nobody has asked for: a process may signal itself, and nothing else."""
        if waiting.calls("clone"):
            self._listener.answer(waiting, error=errno.EAGAIN)
        elif (waiting.calls("kill") or waiting.calls("tgkill")) and _is_of(waiting, waiting.arguments[0]):
            self._listener.proceed(waiting)
        else:
            self._listener.answer(waiting, error=errno.EPERM)

    def decide_held(self) -> None:
        """Answer those who asked leave while another was cloned, and for whom no request has come."""
        held, self._held = self._held, []
        for waiting in held:
            self.decide(waiting)

    def next(self, wanted: Callable[[Waiting], bool], parent: int, what: str) -> Waiting:
        """The next call that is ``wanted``. Others are decided, but who may be next to be cloned has to wait.

        Raises :class:`Refused`, which says ``what`` has not come, or that ``parent`` is gone.
        """
        end = time.monotonic() + SECONDS
        while True:
            for waiting in self._held:
                if wanted(waiting):
                    self._held.remove(waiting)
                    return waiting
            left = end - time.monotonic()
            if left <= 0:
                raise Refused(f"{what} within {SECONDS:g} seconds")
            waiting_now = self._listener.receive(left)
            if waiting_now is None:
                member = self._members.get(parent)
                if member is None or readable(member.pidfd):
                    raise Refused("its process is gone")
            elif wanted(waiting_now):
                return waiting_now
            elif waiting_now.process in self._members and _may_be_next(waiting_now):
                self._held.append(waiting_now)
            else:
                self.decide(waiting_now)


def says(waiting: Waiting, what: Hello) -> bool:
    """Whether this is what a process says by its call."""
    return waiting.calls("capget") and waiting.arguments[0] == what


def readable(descriptor: int) -> bool:
    """Whether there is something to read, or somebody has ended."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def _may_be_next(waiting: Waiting) -> bool:
    return waiting.calls("clone") or says(waiting, Hello.DONE)


def _is_of(waiting: Waiting, target: int) -> bool:
    with contextlib.suppress(OSError, KeyError):
        return int(inspection.status(waiting.process)["Tgid"]) == target & 0xFFFFFFFF
    return False
