"""Copies of a session's working directory, whatever its code has put there."""

from __future__ import annotations

import os
import stat

_DEEPEST = 200
_STEP = 1 << 24


class CannotCopy(Exception):
    """It is not what is copied. The message says why."""


class Room:
    """``size`` in bytes, and a number of files and folders, that a copy may take."""

    def __init__(self, size: int, files: int) -> None:
        self._size, self._files = size, files

    def take(self, size: int) -> None:
        """Room for one file or folder that takes ``size`` bytes. Raises :class:`CannotCopy`."""
        self._size -= size
        self._files -= 1
        if self._size < 0 or self._files < 0:
            raise CannotCopy("its working directory holds more than it may")


def copy_tree(source: str, target: str, owner: int | None, room: Room) -> None:
    """Copy what lies in the folder ``source`` into the empty folder ``target``.

    Files and folders are all there is; holes in files stay holes. Modes are kept, and ``owner`` is given
    everything. Raises :class:`CannotCopy`, and :class:`OSError` where the target has no room.
    """
    opened = os.open(source, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        made = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _copy_folder(opened, made, owner, room, _DEEPEST)
        finally:
            os.close(made)
    finally:
        os.close(opened)


def _copy_folder(source: int, target: int, owner: int | None, room: Room, depth: int) -> None:
    if depth == 0:
        raise CannotCopy("its code has made too many folders inside one another")
    with os.scandir(source) as entries:
        for entry in entries:
            found = entry.stat(follow_symlinks=False)
            room.take(512 * found.st_blocks)
            if stat.S_ISDIR(found.st_mode):
                _copy_subfolder(entry.name, source, target, owner, room, depth)
            elif stat.S_ISREG(found.st_mode):
                _copy_file(entry.name, source, target)
            else:
                continue
            if owner is not None:
                os.chown(entry.name, owner, owner, dir_fd=target, follow_symlinks=False)
            os.chmod(entry.name, stat.S_IMODE(found.st_mode) & 0o777, dir_fd=target)
            os.utime(entry.name, ns=(found.st_atime_ns, found.st_mtime_ns), dir_fd=target, follow_symlinks=False)


def _copy_subfolder(name: str, source: int, target: int, owner: int | None, room: Room, depth: int) -> None:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    os.mkdir(name, 0o700, dir_fd=target)
    opened = _open(name, flags, source)
    try:
        made = os.open(name, flags, dir_fd=target)
        try:
            _copy_folder(opened, made, owner, room, depth - 1)
        finally:
            os.close(made)
    finally:
        os.close(opened)


def _open(name: str, flags: int, folder: int) -> int:
    """Open it though its mode may forbid that to its owner, as whom this may run."""
    try:
        return os.open(name, flags, dir_fd=folder)
    except PermissionError:
        handle = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        try:
            mode = stat.S_IMODE(os.fstat(handle).st_mode)
            os.chmod(f"/proc/self/fd/{handle}", mode | 0o500)
            try:
                return os.open(name, flags, dir_fd=folder)
            finally:
                os.chmod(f"/proc/self/fd/{handle}", mode)
        finally:
            os.close(handle)


def _copy_file(name: str, source: int, target: int) -> None:
    opened = _open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, source)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        made = os.open(name, flags, 0o600, dir_fd=target)
        try:
            size = os.fstat(opened).st_size
            os.truncate(made, size)
            position = 0
            while position < size:
                try:
                    position = os.lseek(opened, position, os.SEEK_DATA)
                except OSError:  # nothing but a hole is left
                    break
                end = os.lseek(opened, position, os.SEEK_HOLE)
                os.lseek(made, position, os.SEEK_SET)
                while position < end:
                    sent = os.sendfile(made, opened, position, min(_STEP, end - position))
                    if sent == 0:
                        return
                    position += sent
        finally:
            os.close(made)
    finally:
        os.close(opened)
