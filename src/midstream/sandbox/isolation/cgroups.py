"""Memory that a session really has in use, bounded by a memory cgroup of its own, where one may be made.

Whether it may is found by making one, moving a process into it, and taking it away again. Version 2 is tried first:
there the nearest group above this process's own that hands its memory controller down; then version 1.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

_PROCESS = "/proc/self"
_PREFIX = "midstream-"
_STALE_SECONDS = 60.0
_TRIAL_BYTES = 64 << 20


class NotDelegated(Exception):
    """No memory cgroup can be made here. The message says why."""


@dataclass(frozen=True, slots=True)
class Files:
    """What a version of cgroups calls its files. ``swap_limit`` is the limit of memory and swap where ``joint``."""

    version: int
    limit: str
    swap_limit: str
    joint: bool
    events: str


V2 = Files(2, "memory.max", "memory.swap.max", joint=False, events="memory.events")
V1 = Files(1, "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", joint=True, events="memory.oom_control")


class Group:
    """A session's cgroup. Works by descriptors alone: its path may be out of sight."""

    def __init__(self, parent: int, name: str, files: Files, limit: int) -> None:
        self._parent = parent
        self._name = name
        self._files = files
        os.mkdir(name, dir_fd=parent)
        try:
            self._folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=parent)
            try:
                _write(self._folder, files.limit, str(limit))
                with contextlib.suppress(FileNotFoundError):  # a kernel that does not count swap
                    _write(self._folder, files.swap_limit, str(limit if files.joint else 0))
            except OSError:
                os.close(self._folder)
                raise
        except OSError:
            os.rmdir(name, dir_fd=parent)
            raise

    def enter(self) -> None:
        """Move the calling process into it."""
        _write(self._folder, "cgroup.procs", "0")

    def kills(self) -> int:
        """How many of its processes the kernel has killed for want of memory."""
        with contextlib.suppress(OSError, ValueError):
            for line in _read(self._folder, self._files.events).splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
        return 0

    def remove(self) -> bool:
        """Whether it is gone: not while a process is still on its way out of it."""
        try:
            os.rmdir(self._name, dir_fd=self._parent)
        except FileNotFoundError:
            pass
        except OSError:
            return False
        os.close(self._folder)
        return True


@dataclass(slots=True)
class Groups:
    """The groups of one fork server's sessions, in a group of their own."""

    files: Files
    parent: int
    name: str
    folder: int
    _leaving: list[Group] = field(default_factory=list)

    def make(self, name: str, limit: int) -> Group:
        return Group(self.folder, name, self.files, limit)

    def remove(self, group: Group) -> None:
        """Remove a group whose process has ended, at once or as soon as it can be."""
        self._leaving = [left for left in (*self._leaving, group) if not left.remove()]

    def close(self) -> None:
        """Remove everything. All processes must have ended."""
        for group in self._leaving:
            group.remove()
        os.close(self.folder)
        with contextlib.suppress(OSError):
            os.rmdir(self.name, dir_fd=self.parent)
        os.close(self.parent)


def open_groups() -> Groups:
    """Make a group for a fork server's sessions. Raises :class:`NotDelegated`."""
    reasons = []
    for files, path in _candidates():
        try:
            return _open_in(path, files)
        except OSError as error:
            reasons.append(f"v{files.version}, {path}: {error.strerror}")
    raise NotDelegated("; ".join(reasons) or "no cgroups that count memory are mounted")


def _open_in(path: str, files: Files) -> Groups:
    _sweep(path)
    parent = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    name = f"{_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
    try:
        os.mkdir(name, dir_fd=parent)
    except OSError:
        os.close(parent)
        raise
    folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=parent)
    groups = Groups(files, parent, name, folder)
    try:
        # Held for life: who gets the lock knows that nobody lives here any more.
        fcntl.flock(folder, fcntl.LOCK_EX)
        if files.version == 2:
            _write(folder, "cgroup.subtree_control", "+memory")
        _try_out(groups)
    except OSError:
        groups.close()
        raise
    return groups


def _try_out(groups: Groups) -> None:
    """Move a process into a group; raises what that raises."""
    group = groups.make("trial", _TRIAL_BYTES)
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        number = 0
        try:
            group.enter()
        except OSError as error:
            number = error.errno or 1
        finally:
            os.write(tell, bytes([number]))
            os._exit(0)
    os.close(tell)
    with os.fdopen(told, "rb") as pipe:
        number = (pipe.read(1) or b"\1")[0]
    os.waitpid(child, 0)
    groups.remove(group)
    if number:
        raise OSError(number, os.strerror(number))


def _candidates() -> Iterator[tuple[Files, str]]:
    """Groups in which others might be made, the likeliest first."""
    own = {}
    with open(f"{_PROCESS}/cgroup", encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            own[controllers] = path
    for kind, options, root, point in _mounts():
        if kind == "cgroup2" and "" in own:
            above = _nearest_with_memory(_below(point, root, own[""]), point)
            if above is not None:
                yield V2, above
        elif kind == "cgroup" and "memory" in options:
            place = next((path for names, path in own.items() if "memory" in names.split(",")), None)
            itself = None if place is None else _below(point, root, place)
            if itself is not None:
                yield V1, itself


def _nearest_with_memory(path: str | None, top: str) -> str | None:
    """A group, or the nearest above it, whose children can be bounded."""
    while path is not None and "memory" not in _words(path, "cgroup.subtree_control"):
        path = os.path.dirname(path) if path != top else None
    return path


def _mounts() -> list[tuple[str, list[str], str, str]]:
    """Mounted cgroups, version 2 first: kind, options, the group that is mounted, and where."""
    found = []
    with open(f"{_PROCESS}/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            place, _, kind = line.rstrip("\n").partition(" - ")
            root, point = place.split()[3:5]
            name, _, options = [*kind.split(), "", ""][:3]
            if name in ("cgroup", "cgroup2"):
                found.append((name, options.split(","), root, point))
    return sorted(found, key=lambda mount: mount[0] != "cgroup2")


def _below(point: str, root: str, path: str) -> str | None:
    """Where a group is to be seen, if it is."""
    if root != "/" and path != root and not path.startswith(root + "/"):
        return None
    found = os.path.normpath(point + "/" + (path if root == "/" else path[len(root) :]))
    return found if os.path.isdir(found) else None


def _sweep(path: str) -> None:
    """Remove what a fork server that was killed has left."""
    with contextlib.suppress(OSError), os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith(_PREFIX) and time.time() - entry.stat().st_mtime > _STALE_SECONDS:
                with contextlib.suppress(OSError):
                    _remove_abandoned(entry.path)


def _remove_abandoned(path: str) -> None:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with os.scandir(path) as entries:
            below = [entry.path for entry in entries if entry.is_dir()]
        for group in below:
            _kill_all(group)
            os.rmdir(group)
        os.rmdir(path)
    finally:
        os.close(folder)


def _kill_all(path: str) -> None:
    """A session that has outlived its fork server goes now."""
    deadline = time.monotonic() + 1.0
    while (processes := _words(path, "cgroup.procs")) and time.monotonic() < deadline:
        for process in processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(int(process), signal.SIGKILL)
        time.sleep(0.01)


def _words(path: str, name: str) -> list[str]:
    try:
        with open(os.path.join(path, name), encoding="ascii") as file:
            return file.read().split()
    except OSError:
        return []


def _read(folder: int, name: str) -> str:
    descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
    try:
        return os.read(descriptor, 1 << 16).decode("ascii")
    finally:
        os.close(descriptor)


def _write(folder: int, name: str, text: str) -> None:
    descriptor = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=folder)
    try:
        os.write(descriptor, text.encode("ascii"))
    finally:
        os.close(descriptor)
