"""What a process has that something may leave behind."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

GRACE = 30.0
"""Seconds in which what was told to end may do so: a process that was killed is there for some time yet."""


@dataclass(frozen=True, slots=True)
class Remains:
    """Threads that are no daemons, and processes below this one."""

    threads: frozenset[threading.Thread]
    processes: frozenset[int]

    @classmethod
    def now(cls) -> Self:
        threads = frozenset(thread for thread in threading.enumerate() if not thread.daemon)
        return cls(threads, frozenset(_below(os.getpid(), frozenset())))

    @classmethod
    def since(cls, before: Self) -> list[str]:
        """What was not there before and does not end, in words.

        What processes that were there have started is theirs.
        """
        until = time.monotonic() + GRACE
        while True:
            threads = {thread for thread in threading.enumerate() if not thread.daemon} - before.threads
            processes = sorted(_below(os.getpid(), before.processes))
            if not (threads or processes) or time.monotonic() > until:
                break
            time.sleep(0.05)
        return [f"thread {thread.name!r}" for thread in threads] + [f"process {_said(number)}" for number in processes]


def _said(process: int) -> str:
    """A process by its number and its command."""
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
    except (FileNotFoundError, ProcessLookupError):
        command = ""
    return f"{process} ({command.strip() or 'it has ended by now'})"


def _below(process: int, known: frozenset[int]) -> set[int]:
    """The processes below one, not those below known ones, helpers of Python's multiprocessing left out."""
    children: dict[int, set[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            helper = b"resource_tracker" in (entry / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z" and not helper:
            children.setdefault(int(parent), set()).add(int(entry.name))
    found: set[int] = set()
    waiting = [process]
    while waiting:
        below = children.get(waiting.pop(), set()) - known
        waiting += below
        found |= below
    return found
