"""Resource limits of the session's own process, set once and, hard limits being hard, for good."""

from __future__ import annotations

import resource
from collections.abc import Iterable, Mapping

_NEVER = {"RLIMIT_CORE": 0, "RLIMIT_MEMLOCK": 0, "RLIMIT_MSGQUEUE": 0, "RLIMIT_RTPRIO": 0, "RLIMIT_NICE": 0}

# Where the host's stack is unlimited, runaway recursion in C would eat memory for minutes before it dies.
_STACK_BYTES = 16 << 20

_MANY_THREADS = 1 << 20

# Soft limit first: at it the process gets SIGXCPU and can still say what happened.
_CPU_GRACE_SECONDS = 2


def address_space_in_use() -> int:
    """Bytes of address space that this process has mapped already."""
    with open("/proc/self/statm", encoding="ascii") as status:
        return int(status.read().split()[0]) * resource.getpagesize()


def of_session(
    limits: Mapping[str, int | float | None], *, base_memory: int, own_identity: bool, family: bool = False
) -> list[tuple[int, tuple[int, int]]]:
    """For :func:`enforce`: ``memory``, ``cpu_time``, ``open_files``, ``file_size``, ``threads`` of a session's limits.

    None is higher than the calling process's own, which its children have too. ``base_memory``: address space that
    the interpreter and its preloaded modules take, on top of which ``memory`` is the code's.
    ``own_identity``: the process has a user id that no other process has; only then can the kernel count its threads
    alone. ``family``: processes that share the id may come, for whom the limit of threads will be raised, from outside.
    """
    wanted: dict[str, tuple[int, int]] = {name: (value, value) for name, value in _NEVER.items()}
    wanted["RLIMIT_STACK"] = (_STACK_BYTES, _STACK_BYTES)
    memory, cpu_time = limits["memory"], limits["cpu_time"]
    if memory is not None:
        total = base_memory + int(memory)
        wanted["RLIMIT_AS"] = (total, total)
    if cpu_time is not None:
        seconds = max(1, round(cpu_time))
        wanted["RLIMIT_CPU"] = (seconds, seconds + _CPU_GRACE_SECONDS)
    for field, name in (("open_files", "RLIMIT_NOFILE"), ("file_size", "RLIMIT_FSIZE")):
        value = limits[field]
        if value is not None:
            wanted[name] = (int(value), int(value))
    threads = limits["threads"]
    if threads is not None and own_identity:
        wanted["RLIMIT_NPROC"] = (int(threads), _MANY_THREADS if family else int(threads))
    found = []
    for name, (soft, hard) in wanted.items():
        kind = getattr(resource, name, None)
        if kind is not None:
            ceiling = resource.getrlimit(kind)[1]
            if ceiling != resource.RLIM_INFINITY:
                soft, hard = min(soft, ceiling), min(hard, ceiling)
            found.append((kind, (soft, hard)))
    return found


def enforce(found: Iterable[tuple[int, tuple[int, int]]]) -> None:
    """Put these on the calling process."""
    for kind, bounds in found:
        resource.setrlimit(kind, bounds)
