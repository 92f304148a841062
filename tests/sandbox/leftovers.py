"""What this process and those below it hold, and what of it was not there before.

Tests run one after another in one process, and what others had may still go while these run: a thread that ends, a
socket that is collected. So nothing here compares numbers: only what is new counts.
"""

from __future__ import annotations

import contextlib
import gc
import glob
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

import pytest


def children_of(process: int) -> set[int]:
    """All descendants."""
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    parent = int(file.read().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents.setdefault(parent, []).append(int(entry))
    found: set[int] = set()
    waiting = [process]
    while waiting:
        for child in parents.get(waiting.pop(), []):
            found.add(child)
            waiting.append(child)
    return found


def lives(process: int) -> bool:
    """Whether it is there, and not one that has ended and that nobody has waited for yet."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def folders() -> set[str]:
    return set(glob.glob(os.path.join(tempfile.gettempdir(), "midstream-*")))


def eventually(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return condition()


@pytest.fixture(autouse=True)
def own_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So that what others leave in the common one is not taken for ours."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        monkeypatch.setenv("TMPDIR", folder)
        yield


def _descriptors() -> frozenset[str]:
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found.add(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
    return frozenset(found)


def _working_directories() -> frozenset[str]:
    found = set()
    for folder in folders():
        with contextlib.suppress(FileNotFoundError):
            found.update(os.path.join(folder, name) for name in os.listdir(folder))
        found.add(folder)
    return frozenset(found)


@dataclass(frozen=True, slots=True)
class Held:
    """``descriptors``: each number with what it leads to, so that another thing under the same number is another."""

    processes: frozenset[int]
    descriptors: frozenset[str]
    threads: frozenset[threading.Thread]
    folders: frozenset[str]

    @classmethod
    def now(cls) -> Self:
        gc.collect()
        return cls(
            frozenset(children_of(os.getpid())),
            _descriptors(),
            frozenset(threading.enumerate()),
            _working_directories(),
        )

    def new(self) -> Held:
        """What there is now and was not then."""
        now = Held.now()
        return Held(
            now.processes - self.processes,
            now.descriptors - self.descriptors,
            now.threads - self.threads,
            now.folders - self.folders,
        )

    def within(self, *, processes: int = 0, descriptors: int = 0, threads: int = 0, folders: int = 0) -> bool:
        """Whether it is no more than that."""
        most = (processes, descriptors, threads, folders)
        held = (self.processes, self.descriptors, self.threads, self.folders)
        return all(len(those) <= number for those, number in zip(held, most, strict=True))


NOTHING = Held(frozenset(), frozenset(), frozenset(), frozenset())
