"""What a process looks like from outside: whether it can be cloned, and what it has open.

Everything is read from ``/proc``, of a process that is stopped in a system call. Names in there are chosen by
the code that runs in it.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable
from typing import Any

from midstream.sandbox.isolation import kernel

_NULL = "/dev/null"
_DELETED = " (deleted)"
_KCMP_FILE = 0
_LEAVING_SECONDS = 0.1


def status(process: int) -> dict[str, str]:
    """The fields of ``/proc/PID/status``."""
    with open(f"/proc/{process}/status", encoding="utf-8", errors="replace") as file:
        return {name: value.strip() for name, _, value in (line.partition(":") for line in file)}


def processes() -> set[int]:
    """All processes of this namespace but the calling one."""
    return {int(name) for name in os.listdir("/proc") if name.isdigit()} - {os.getpid()}


def children(process: int) -> set[int]:
    """Processes that its first thread has started and that nobody has waited for, or that it has inherited.

    Complete only where none of them is waited for meanwhile.
    """
    try:
        with open(f"/proc/{process}/task/{process}/children", encoding="ascii") as file:
            return {int(number) for number in file.read().split()}
    except (FileNotFoundError, ProcessLookupError):
        return set()


def exit_status(process: int) -> int:
    """How a process ended that nobody has waited for, as of ``waitpid``."""
    with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
        return int(file.read().rpartition(")")[2].split()[49])


def processor_seconds(process: int) -> float:
    """The processor time that it has taken, also once it has ended."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:  # somebody has waited for it
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def await_leaving_threads(process: int) -> None:
    """A thread that was joined is the kernel's for a moment more. One that stays is waited for in vain, not long."""
    until = time.monotonic() + _LEAVING_SECONDS
    while int(status(process)["Threads"]) > 1 and time.monotonic() < until:
        time.sleep(0.001)


def why_not_cloned(process: int, is_written_to: Callable[[int, str], bool]) -> str | None:
    """What a process shares with its clone beyond what can be taken apart, or None.

    ``is_written_to``: whether processes of its family write to the file at a path on a device.
    """
    threads = int(status(process)["Threads"])
    if threads > 1:
        return f"its code has threads running ({threads - 1})"
    with open(f"/proc/{process}/maps", encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            _, permissions, _, device, _, *path = line.rstrip("\n").split(maxsplit=5)
            major, _, minor = device.partition(":")
            if is_written_to(os.makedev(int(major, 16), int(minor, 16)), path[0] if path else ""):
                return "its code has a file of its working directory mapped into memory"
            # Shared for reading are the C library's tables, which nobody here can write.
            unwritable = permissions == "r--s" and path and not path[0].endswith(_DELETED)
            if permissions.endswith("s") and not unwritable:
                return "its code has memory that is shared between processes"
    return None


def open_files(process: int) -> list[int]:
    """The numbers of its open descriptors."""
    return sorted(int(name) for name in os.listdir(f"/proc/{process}/fd"))


def plan(process: int, channel: int) -> dict[str, Any] | None:
    """What to open again in a clone, as the process itself would name it, whose root is mounted nowhere.

    ``files``: number, path, flags, offset, and the number of a descriptor before it that is the same open
    file, or None. Pipes, sockets and the like are left out. None where a file is open that has no name any
    more.
    """
    files: list[list[Any]] = []
    for number in open_files(process):
        link = f"/proc/{process}/fd/{number}"
        target = os.readlink(link)
        if number == channel or target == _NULL or not target.startswith("/"):
            continue
        found = os.stat(link)
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode) or stat.S_ISCHR(found.st_mode)):
            continue
        if found.st_nlink == 0:
            return None
        with open(f"/proc/{process}/fdinfo/{number}", encoding="ascii", errors="replace") as file:
            told = dict(line.split(":", 1) for line in file if ":" in line)
        entry = [target, int(told["flags"], 8), int(told["pos"])]
        twin = next((file[0] for file in files if file[1:4] == entry and _same(process, file[0], number)), None)
        files.append([number, *entry, twin])
    folder = "/"
    with contextlib.suppress(OSError):
        folder = os.readlink(f"/proc/{process}/cwd")
    return {"folder": folder, "files": files}


def dead_ends(process: int, channel: int) -> list[int]:
    """Descriptors that would lead nowhere in a clone, but for those that the worker makes anew for itself."""
    links = {}
    for number in open_files(process):
        with contextlib.suppress(OSError):
            links[number] = os.readlink(f"/proc/{process}/fd/{number}")
    # The reading end of the pipe behind 1 and 2 has the pipe's name too.
    own = {links.get(1), links.get(2)}
    return [
        number
        for number, target in links.items()
        if number != channel and not target.startswith("/") and target not in own
    ]


def _same(process: int, first: int, second: int) -> bool:
    """Whether two descriptors are one open file, with one offset."""
    try:
        return kernel.system_call("kcmp", process, process, _KCMP_FILE, first, second) == 0
    except OSError:  # a kernel without it
        return False
