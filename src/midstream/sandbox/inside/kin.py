"""The processes of a family as their warden knows them, and the limits that they have together."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import socket
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from midstream.sandbox.inside import inspection
from midstream.sandbox.inside.grounds import Ground, Place
from midstream.sandbox.isolation.supervision import Waiting

_MILLISECONDS_TO_DIE = 2000


@dataclass(slots=True)
class Member:
    """``spent``: seconds of processor time that those took that it goes on from, or that were to go on from it.

    ``standing``: what it waits for while it stands still. Then ``copy`` is the process that runs in its place,
    and ``plan`` what it may have to open again when it goes on. ``kills``: see
    :meth:`~midstream.sandbox.inside.deaths.Deaths.kills`, at its birth.
    """

    process: int
    pidfd: int
    channel: socket.socket
    place: Place
    standing: Waiting | None = None
    copy: int | None = None
    plan: dict[str, Any] | None = None
    spent: float = 0.0
    kills: int = 0


@dataclass(slots=True)
class Newborn:
    """A clone that has moved and waits until everybody has.

    ``still``: its parent's place from now on. ``fresh``: which one of the two has been made for this.
    """

    waiting: Waiting
    place: Place
    still: Place
    fresh: Place
    plan: dict[str, Any]
    channel: socket.socket


@dataclass(frozen=True, slots=True)
class Settings:
    """``number``: the user id of the family. ``effective``, ``permitted``: masks of what its processes may."""

    number: int | None
    limits: dict[str, Any]
    effective: int
    permitted: int


class Allowance:
    """What the processes of a family may use."""

    def __init__(self, settings: Settings, ground: Ground[Any]) -> None:
        self._ground = ground
        self._own_number = settings.number is not None
        self._threads: int | None = settings.limits["threads"]
        self._seconds: float | None = settings.limits["cpu_time"]

    def make_room_for_threads(self, members: Collection[Member], clones: int, *, checkpoint: bool) -> None:
        """The kernel counts a family's processes and threads together, by their user id."""
        if self._threads is None or not self._own_number:
            return
        still = sum(member.standing is not None for member in members) + checkpoint
        wanted = self._threads * (len(members) + clones - still) + still
        with self._ground.acting():
            for member in members:
                with contextlib.suppress(ProcessLookupError):
                    soft, hard = resource.prlimit(member.process, resource.RLIMIT_NPROC)
                    if soft < wanted:
                        resource.prlimit(member.process, resource.RLIMIT_NPROC, (min(wanted, hard), hard))

    def spent(self, member: Member) -> float:
        """Seconds of processor time that a session has taken."""
        return member.spent + inspection.processor_seconds(member.process)

    def is_spent(self, member: Member) -> bool:
        """Whether there is none left."""
        return self._seconds is not None and self.spent(member) >= self._seconds

    def bound_processor_time(self, member: Member) -> None:
        """The limit is the session's; the kernel counts for each process from its birth."""
        if self._seconds is not None:
            with contextlib.suppress(ProcessLookupError), self._ground.acting():
                _, hard = resource.prlimit(member.process, resource.RLIMIT_CPU)
                soft = max(1, round(self._seconds - member.spent))
                resource.prlimit(member.process, resource.RLIMIT_CPU, (min(soft, hard), hard))


def end(process: int) -> bool:
    """Kill a process and see it dead; whether it is."""
    try:
        pidfd = os.pidfd_open(process)
    except ProcessLookupError:
        return True
    try:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(_MILLISECONDS_TO_DIE))
    finally:
        os.close(pidfd)
