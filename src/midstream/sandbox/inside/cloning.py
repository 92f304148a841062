"""What a session's process does to be cloned: the part of it that the process itself must do.

The code that it runs can do all of this just as well, so nothing relies on it: the warden (see
:mod:`midstream.sandbox.inside.warden`) lets a clone live only once it has looked at it from outside.
"""

from __future__ import annotations

import contextlib
import enum
import json
import os
import random
import signal
import stat
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

from midstream.sandbox.isolation import kernel

_TIMERS = {
    signal.ITIMER_REAL: signal.SIGALRM,
    signal.ITIMER_VIRTUAL: signal.SIGVTALRM,
    signal.ITIMER_PROF: signal.SIGPROF,
}


class Hello(enum.IntEnum):
    """What a process tells its warden, as the argument of a system call that sessions have no use for."""

    BORN = 1  # the answer: a descriptor of the clone's new place
    MOVED = 2  # the answer to a clone: a descriptor to read what is to be opened again from
    REOPENED = 3
    # Unanswered for as long as the process is to stand still. The answer: 0, or a descriptor, of a pipe to read
    # from what is to be opened again, or of anything else for the fence that the process is to put on itself.
    DONE = 4


def hello(what: Hello) -> int:
    """Tell the warden, and wait for its answer. Raises :class:`OSError` where it is not wanted."""
    return kernel.system_call("capget", int(what), 0)


class Cloning:
    """Forks the calling process, for its warden.

    ``capabilities``: those that it has in effect. ``rooted``: whether it has a root of its own; else it has a folder.
    """

    def __init__(self, capabilities: Iterable[int], *, rooted: bool) -> None:
        self.home = ""
        """Its working directory."""
        self._former: list[str] = []
        self._capabilities = frozenset(capabilities)
        self._rooted = rooted
        # The code may replace them.
        self._fork: Callable[[], int] = os.fork
        self._wait: Callable[[int, int], tuple[int, int]] = os.waitpid

    def fork(self, count: int) -> bool:
        """Make ``count`` clones; whether this is one of them."""
        # A signal would break off the very calls by which the warden is asked.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            return self._fork_unsignalled(count)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _fork_unsignalled(self, count: int) -> bool:
        self._reap()
        state = random.getstate()  # the module seeds itself anew in children
        # The kernel gives them no timers, and none of the signals that are waiting.
        timers = [(kind, *signal.setitimer(kind, 0)) for kind in _TIMERS]
        rung = signal.sigpending() & set(_TIMERS.values())
        try:
            with contextlib.suppress(OSError):
                for _ in range(count):
                    if self._fork() == 0:
                        self._move()
                        random.setstate(state)
                        for number in rung:
                            signal.raise_signal(number)
                        return True
            with contextlib.suppress(OSError):
                number = hello(Hello.DONE)
                if number:
                    self._follow(number)
            self._reap()
            return False
        finally:
            for kind, left, interval in timers:
                if left or interval:  # one that has rung is set anew only when its signal arrives
                    signal.setitimer(kind, left or interval, interval)

    def _follow(self, number: int) -> None:
        if stat.S_ISFIFO(os.fstat(number).st_mode):
            reopen(_told(number))
            return
        kernel.system_call("landlock_restrict_self", number, 0)
        os.close(number)
        hello(Hello.MOVED)

    def _reap(self) -> None:
        """Let go of clones that have ended: they count as processes until then."""
        with contextlib.suppress(OSError):
            while self._wait(-1, os.WNOHANG)[0]:
                pass

    def _move(self) -> None:
        try:
            place = hello(Hello.BORN)
            os.fchdir(place)
            if self._rooted:
                self._change_root()
            else:  # the warden has its own opinion on what this descriptor is
                kernel.system_call("landlock_restrict_self", place, 0)
            told = hello(Hello.MOVED)
            os.close(place)
            plan = _told(told)
            if plan["home"] != self.home:
                plan = relocated(plan, self.home)
                self._rename_home(plan["home"])
            reopen(plan)
            hello(Hello.REOPENED)
        except BaseException:  # noqa: BLE001  # a clone that failed half-way must not run on as its parent
            os._exit(1)

    def _change_root(self) -> None:
        dormant = frozenset({kernel.CAP_SYS_CHROOT})
        kernel.set_capabilities(self._capabilities | dormant)
        kernel.system_call("chroot", b".\0")
        kernel.set_capabilities(self._capabilities, dormant)
        os.chdir(self.home)

    def _rename_home(self, home: str) -> None:
        """Put the new name of the working directory where the worker has put the old one."""
        for name in ("HOME", "TMPDIR", "PWD"):
            if os.environ.get(name) == self.home:
                os.environ[name] = home
        if tempfile.tempdir == self.home:
            tempfile.tempdir = home
        self._former.append(self.home)
        self.home = home

    def note(self, error: BaseException) -> str:
        """What to add to an error on a path in a folder that was the working directory before it was cloned."""
        if type(error) not in (PermissionError, FileNotFoundError):
            return ""
        path = getattr(error, "filename", None)
        if type(path) is str and any(f"{path}/".startswith(f"{folder}/") for folder in self._former):
            return f" [the working directory has moved: it is now {self.home}; relative paths lead there]"
        return ""


def _told(pipe: int) -> dict[str, Any]:
    with os.fdopen(pipe, "rb") as file:
        plan: dict[str, Any] = json.load(file)
    return plan


def relocated(plan: dict[str, Any], old: str) -> dict[str, Any]:
    """A plan whose paths lie in its ``home``, made from one whose paths lie in ``old``."""

    def moved(path: str) -> str:
        return plan["home"] + path[len(old) :] if f"{path}/".startswith(f"{old}/") else path

    files = [[number, moved(path), *rest] for number, path, *rest in plan["files"]]
    return {**plan, "folder": moved(plan["folder"]), "files": files}


def reopen(plan: dict[str, Any]) -> None:
    """Open files again as they were open before: the same numbers, modes and offsets."""
    with contextlib.suppress(OSError):
        os.chdir(plan["folder"])
    for number, path, flags, offset, twin in plan["files"]:
        # What cannot be opened again, such as a file that may no longer be written, leads nowhere.
        with contextlib.suppress(OSError):
            if twin is not None:
                os.dup2(twin, number, inheritable=False)
                continue
            opened = os.open(path, flags)
            try:
                if offset:
                    os.lseek(opened, offset, os.SEEK_SET)
                os.dup2(opened, number, inheritable=False)
            finally:
                os.close(opened)
