"""Namespaces: processes, files and networks of the host that a session cannot even name.

They are entered once, by the fork server: user, process, network, IPC, UTS and mount namespaces, and a root
file system, read-only, in which there is nothing but what Python needs. Each session then gets a process
namespace and a working directory in memory of its own, so that it is process 1 of a world in which there is
nobody else.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import struct
from collections.abc import Callable, Sequence
from typing import NoReturn

from midstream.sandbox.isolation import kernel

WORKING_DIRECTORY = "/sandbox"
"""Not a path that a host is likely to have its Python below: what lies there is not to be seen in a session."""

FAMILY = "/family"
"""An empty folder of the root, for whoever needs to mount something in a namespace of its own."""

_NEWNS = 0x00020000
_NEWUTS = 0x04000000
_NEWIPC = 0x08000000
_NEWUSER = 0x10000000
_NEWPID = 0x20000000
_NEWNET = 0x40000000

_MS_RDONLY = 1
_MS_NOSUID = 2
_MS_NODEV = 4
_MS_NOEXEC = 8
_MS_BIND = 4096
_MS_REC = 16384
_MS_PRIVATE = 1 << 18

_MOUNT_ATTR_RDONLY = 1
_MOUNT_ATTR_NOSUID = 2
_MOUNT_ATTR_NODEV = 4
_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000
_MNT_DETACH = 2
_OPEN_TREE_CLONE = 1


def enter(folder: str, paths: Sequence[str], ids: tuple[int, int] | None, at_end: Callable[[], None]) -> None:
    """Enter the namespaces, in a new process: this call returns there, as process 1.

    The calling process stays behind to wait for it, calls ``at_end`` and exits.

    - ``folder``: an empty folder, to build the root on.
    - ``paths``: what may be read. Its owner and permissions are those of the host.
    - ``ids``: (first, count) of user ids to have in there beside the present one, for which the caller
      needs to be root; or None.

    Raises :class:`OSError` where the kernel, or what this process already runs in, does not allow it.
    """
    uid, gid = os.getuid(), os.getgid()
    mapper = _Mapper(os.getpid(), uid, gid, ids) if ids is not None else None
    _unshare(_NEWUSER | _NEWPID | _NEWNET | _NEWIPC | _NEWUTS)
    if mapper is not None:
        mapper.finish()
    else:
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{uid} {uid} 1")
        _write("/proc/self/gid_map", f"{gid} {gid} 1")
    failed_source, failed_sink = os.pipe()
    child = os.fork()
    if child:
        os.close(failed_sink)
        failure = os.read(failed_source, 4096)
        if failure:
            os.waitpid(child, 0)
            raise OSError(failure.decode())
        _guard(child, at_end)
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        kernel.checked(kernel.libc().sethostname(b"sandbox", 7))
        _unshare(_NEWNS)
        _build_root(folder, paths)
    except OSError as error:
        os.write(failed_sink, str(error).encode())
        os._exit(1)
    os.close(failed_sink)
    os.close(failed_source)


def works(folder: str, paths: Sequence[str], ids: tuple[int, int] | None) -> str | None:
    """Try all of it in processes that end at once: None where it works, else what does not."""
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(source)
        try:
            enter(folder, paths, ids, lambda: None)
            session = fork_apart(os.pidfd_open(os.getpid()))
            if session == 0:
                enter_session(None, 1 << 20, 100)
                os.write(sink, b"works")
                os._exit(0)
            os.waitpid(session, 0)
        except BaseException as error:  # noqa: BLE001  # whatever it is, it is the answer
            os.write(sink, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(sink)
    with os.fdopen(source, "rb") as answers:
        answer = answers.read(4096).decode()
    os.waitpid(child, 0)
    return None if answer == "works" else answer or "a process ended without a word"


def fork_apart(own: int) -> int:
    """Fork a child that is process 1 of a new process namespace. ``own``: a pidfd of the calling process."""
    _unshare(_NEWPID)
    child = -1
    try:
        child = os.fork()
    finally:
        if child != 0:  # later children are the caller's own again
            kernel.checked(kernel.libc().setns(ctypes.c_int(own), ctypes.c_int(_NEWPID)))
    return child


def enter_session(number: int | None, size: int, files: int) -> None:
    """In a session's process: a working directory and a ``/proc`` that nobody else sees.

    ``number``: the user and group that own it, or None for the present ones. ``size`` in bytes, ``files``
    the number of files and folders that it can hold.
    """
    unshare_mounts()
    mount_working_directory(WORKING_DIRECTORY, number, size, files)
    try:
        mount_processes("/proc")
    except OSError:
        # Refused where the host's own /proc is partly hidden, as in many containers. Nothing needs it; but
        # the fork server's, which shows all sessions, must not be seen.
        mount_memory("/proc", "size=4k,nr_inodes=1", _MS_RDONLY)


def unshare_mounts() -> None:
    """Enter a mount namespace of the process's own."""
    _unshare(_NEWNS)


def mount_working_directory(path: str, number: int | None, size: int, files: int) -> None:
    """Mount an empty working directory in memory."""
    options = f"size={size},nr_inodes={files},mode=700"
    if number is not None:
        options += f",uid={number},gid={number}"
    mount_memory(path, options)


def mount_memory(path: str, options: str, flags: int = 0) -> None:
    """Mount a file system in memory, from which nothing can be executed."""
    _mount("tmpfs", path, "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC | flags, options)


def mount_processes(path: str) -> None:
    """Mount a ``/proc`` of the present process namespace, with nothing in it but processes."""
    _mount("proc", path, "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, "subset=pid")


def bind(source: str, target: str) -> None:
    """Show a folder, with all that is mounted in it, in a second place too."""
    _mount(source, target, None, _MS_BIND | _MS_REC)


def make_read_only(path: str) -> None:
    """Take the right to write from what is mounted at ``path``."""
    _set_attributes(path, _MOUNT_ATTR_RDONLY, 0)


def detached_copy(path: str) -> int:
    """A descriptor of a copy of what is mounted at ``path``, and in it; the copy is mounted nowhere."""
    flags = _OPEN_TREE_CLONE | _AT_RECURSIVE | os.O_CLOEXEC
    return kernel.system_call("open_tree", _AT_FDCWD, os.fsencode(path) + b"\0", flags)


def unmount(path: str) -> None:
    """Take a mount out of the tree, with all that is mounted in it."""
    kernel.checked(kernel.libc().umount2(os.fsencode(path), _MNT_DETACH))


class _Mapper:
    """Writes the tables of ids from outside, as mapping more than one's own id takes a right out there."""

    def __init__(self, process: int, uid: int, gid: int, ids: tuple[int, int]) -> None:
        first, count = ids
        source, self._go = os.pipe()
        self._child = os.fork()
        if self._child == 0:
            try:
                os.close(self._go)
                os.read(source, 1)
                _write(f"/proc/{process}/uid_map", f"{uid} {uid} 1\n{first} {first} {count}\n")
                _write(f"/proc/{process}/gid_map", f"{gid} {gid} 1\n{first} {first} {count}\n")
            except OSError:
                os._exit(1)
            os._exit(0)
        os.close(source)

    def finish(self) -> None:
        os.close(self._go)
        if os.waitpid(self._child, 0)[1] != 0:
            raise PermissionError("user ids for sessions cannot be mapped")


def _guard(child: int, at_end: Callable[[], None]) -> NoReturn:
    """Wait for process 1 of the namespace, holding nothing of its."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    kernel.system_call("close_range", 0, 0xFFFFFFFF, 0)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(child, 0)
    at_end()
    os._exit(0)


def _build_root(folder: str, paths: Sequence[str]) -> None:
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", folder, "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, "size=4m,nr_inodes=10000,mode=755")
    real = {path: os.path.realpath(path) for path in paths}
    bound: list[str] = []
    for source in sorted(set(real.values())):
        if not any(source.startswith(outer + "/") for outer in bound):
            _bind(source, folder + source)
            bound.append(source)
    for name in (WORKING_DIRECTORY, FAMILY, "/proc"):
        os.makedirs(folder + name, 0o755, exist_ok=True)
    for path, target in real.items():
        alias = folder + path
        if path != target and not os.path.lexists(alias):
            with contextlib.suppress(OSError):
                os.makedirs(os.path.dirname(alias), 0o755, exist_ok=True)
                os.symlink(target, alias)
    # The kernel lets sessions mount one only where one is to be seen already.
    with contextlib.suppress(OSError):
        _mount("proc", folder + "/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    os.chdir(folder)
    # New root over old root in one place, then the old one goes: pivot_root(2), "Notes".
    kernel.system_call("pivot_root", b".\0", b".\0")
    kernel.checked(kernel.libc().umount2(b".", _MNT_DETACH))
    os.chdir("/")
    _set_attributes("/", _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV, 0)


def _bind(source: str, target: str) -> None:
    if os.path.isdir(source):
        os.makedirs(target, 0o755, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), 0o755, exist_ok=True)
        with open(target, "ab"):
            pass
    _mount(source, target, None, _MS_BIND | _MS_REC)
    attributes = _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID
    if not source.startswith("/dev/"):
        attributes |= _MOUNT_ATTR_NODEV
    _set_attributes(target, attributes, _AT_RECURSIVE)


def _set_attributes(path: str, attributes: int, flags: int) -> None:
    settings = struct.pack("=QQQQ", attributes, 0, 0, 0)
    kernel.system_call("mount_setattr", _AT_FDCWD, os.fsencode(path) + b"\0", flags, settings, len(settings))


def _unshare(flags: int) -> None:
    kernel.checked(kernel.libc().unshare(ctypes.c_int(flags)))


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    where, onto, what, how = encoded
    kernel.checked(kernel.libc().mount(where, onto, what, ctypes.c_ulong(flags), how))


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)
