"""Who a session is: a user id of its own where the process may give one away, and no capabilities.

A user id of its own is what lets the kernel count a session's threads alone, and keeps sessions from each
other's files and processes a second time. It has a trap: a Python below a folder that only its owner may
enter (``/root/.pyenv`` under a 0700 ``/root``) cannot be read by another user, and modules are read long
after the session has started. Then the session keeps ``CAP_DAC_READ_SEARCH``, which passes over read
permissions, and Landlock decides what is read. Without that capability, or without Landlock to fence it,
the session keeps the user id it has, with no capability at all.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from midstream.sandbox.isolation import kernel

CAP_SETGID = 6
CAP_SETUID = 7
_POWERS_OVER_OTHERS = (kernel.CAP_SYS_PTRACE, kernel.CAP_SYS_RESOURCE)

# Far above what distributions give to people and services; each fork server takes a stretch of its own.
_FIRST_ID = 0x60000000
_STRETCH = 1 << 16
_STRETCHES = 1 << 12
# In a container whose ids are mapped, only these few are likely to be there and unused.
_SMALL_FIRST_ID = 20_000
_SMALL_COUNT = 30_000

Kind = Literal["own", "own, reading as root", "shared"]


@dataclass(frozen=True, slots=True)
class Identity:
    """How sessions get their user ids here.

    ``kind`` is ``own`` (an id per session), ``own, reading as root`` (the same, with
    CAP_DAC_READ_SEARCH), or ``shared`` (that of the process that started the pool).
    """

    kind: Kind
    first: int = 0
    count: int = 0
    detail: str = ""

    @property
    def own(self) -> bool:
        return self.kind != "shared"

    def number(self, index: int) -> int | None:
        """The user and group id of session number ``index``, or None where it keeps the present one."""
        return self.first + index % self.count if self.own else None


def choose(span: tuple[int, int] | None, needed: Iterable[str], entered: str | None, *, landlock: bool) -> Identity:
    """Find out, by trying in a child, who the sessions can be.

    ``span``: what :func:`free_ids` gave. ``needed``: what they must be able to read; ``entered``: a folder
    that they must be able to pass through, if any.
    """
    if os.geteuid() != 0:
        return Identity("shared", detail="only root can give each session a user id of its own")
    if span is None or not kernel.succeeds_in_child(lambda: become(span[0])):
        return Identity("shared", detail="this process may not change its user id")
    first, count = span
    paths = list(needed)
    if kernel.succeeds_in_child(lambda: _become_and_look(first, paths, entered, reading=False)):
        return Identity("own", first, count)
    private = _private_folder([*paths, *([] if entered is None else [os.path.dirname(entered)])])
    if landlock and kernel.succeeds_in_child(lambda: _become_and_look(first, paths, entered, reading=True)):
        return Identity("own, reading as root", first, count, f"{private} is closed to other users")
    return Identity("shared", detail=f"{private}, which sessions need, is closed to other users")


def become(number: int | None, *, reading: bool = False, dormant: frozenset[int] = frozenset()) -> None:
    """Take this user and group id for good, and drop every capability (but reading, where asked).

    ``dormant``: capabilities that are not in effect, but that it could bring into effect.
    """
    if number is not None:
        if reading or dormant:
            kernel.prctl(kernel.PR_SET_KEEPCAPS, 1)
        os.setgroups([])
        os.setresgid(number, number, number)
        os.setresuid(number, number, number)
    kernel.set_capabilities(effective(reading), dormant)


def effective(reading: bool) -> frozenset[int]:
    """The capabilities that a session has in effect."""
    return frozenset({kernel.CAP_DAC_READ_SEARCH}) if reading else frozenset()


@contextlib.contextmanager
def acting_as(number: int | None) -> Iterator[None]:
    """Look into processes of this user id, and change their limits, as if this process had that id too.

    Root that lacks CAP_SYS_PTRACE and CAP_SYS_RESOURCE, as in most containers, may do neither to others.
    Descriptors and capabilities stay what they are.
    """
    had = kernel.effective_capabilities()
    if number is None or all(had >> capability & 1 for capability in _POWERS_OVER_OTHERS):
        yield
        return
    os.setresgid(number, -1, -1)
    os.setresuid(number, -1, -1)
    _set_file_system_ids(number)
    try:
        kernel.put_in_effect(had)  # the last step has taken some
        yield
    finally:
        os.setresuid(0, -1, -1)
        os.setresgid(0, -1, -1)
        _set_file_system_ids(0)


def _set_file_system_ids(number: int) -> None:
    kernel.libc().setfsgid(ctypes.c_uint(number))
    kernel.libc().setfsuid(ctypes.c_uint(number))


def free_ids() -> tuple[int, int] | None:
    """A stretch of ids that root can give away here and that are hardly in use, as (first, count)."""
    if os.geteuid() != 0:
        return None
    with open("/proc/self/uid_map", encoding="ascii") as table:
        mapped = [(int(inside), int(count)) for inside, _, count in (line.split() for line in table)]
    first = _FIRST_ID + os.getpid() % _STRETCHES * _STRETCH
    for wanted, count in ((first, _STRETCH), (_SMALL_FIRST_ID, _SMALL_COUNT)):
        if any(inside <= wanted and wanted + count <= inside + length for inside, length in mapped):
            return wanted, count
    return None


def _become_and_look(number: int, paths: list[str], entered: str | None, *, reading: bool) -> None:
    become(number, reading=reading)
    if entered is not None:
        os.stat(os.path.join(entered, "."))
    for path in paths:
        if os.path.isdir(path):
            os.listdir(path)
        else:
            with open(path, "rb"):
                pass


def _private_folder(paths: Iterable[str]) -> str:
    """The outermost folder on the way to ``paths`` that others may not enter."""
    for path in paths:
        resolved = os.path.realpath(path)
        parts = resolved.split("/")
        for depth in range(2, len(parts) + 1):
            folder = "/".join(parts[:depth])
            if os.path.isdir(folder) and os.stat(folder).st_mode & 0o005 != 0o005:
                return folder
    return ", ".join(paths)
