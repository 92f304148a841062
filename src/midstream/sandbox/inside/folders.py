"""Working directories of sessions: made, and removed however hostile what lies in them is."""

from __future__ import annotations

import contextlib
import os
import stat
from typing import ClassVar

LOCK = ".lock"
"""The file in a base folder that its fork server holds locked."""

_REMOVE_HERE = 64
"""Entries up to which the fork server removes a folder itself; larger ones are left to a child."""


class Base:
    """The folder that holds the working directories of one fork server's sessions."""

    removers: ClassVar[set[int]] = set()

    def __init__(self, path: str) -> None:
        import fcntl  # the host, too, imports this module, and on every platform

        self._path = path
        # Held for life: who finds the folder and gets the lock knows that nobody lives here any more.
        self._lock = os.open(os.path.join(path, LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def make(self, name: str, owner: int | None) -> str:
        """A new empty folder that nobody but ``owner`` may enter."""
        path = os.path.join(self._path, name)
        os.mkdir(path, 0o700)
        if owner is not None:
            os.chown(path, owner, owner)
        return path

    def make_passage(self, name: str) -> str:
        """A new empty folder that anybody may pass through, and nobody else list or change."""
        path = os.path.join(self._path, name)
        os.mkdir(path, 0o711)
        return path

    def remove(self, path: str) -> None:
        """Remove one working directory, now or in a child, which is added to ``removers``."""
        if _is_small(path):
            remove_tree(path)
            return
        try:
            child = os.fork()
        except OSError:
            remove_tree(path)
            return
        if child == 0:
            try:
                os.closerange(3, 1 << 16)  # the host must not take this for the fork server
                remove_tree(path)
            finally:
                os._exit(0)
        self.removers.add(child)

    def remove_all(self) -> None:
        """Remove everything, the base itself included."""
        remove_tree(self._path)


def _is_small(path: str) -> bool:
    count = 0
    with contextlib.suppress(OSError), os.scandir(path) as entries:
        for entry in entries:
            count += 1
            if count > _REMOVE_HERE or entry.is_dir(follow_symlinks=False):
                return False
    return True


def remove_tree(path: str) -> None:
    """Remove a folder with all in it, without recursion: trees may be deeper than any stack or path.

    What lies in subfolders is moved up to the top, level by level, so that no more than two levels are ever
    open at once. Symbolic links are removed, never followed. What cannot be removed stays.
    """
    try:
        top = _open_folder(path, None)
    except OSError:
        return
    try:
        moved = 0
        while True:
            folders = _remove_files(top)
            if not folders:
                break
            progress = False
            for name in folders:
                with contextlib.suppress(OSError):
                    os.rmdir(name, dir_fd=top)
                    progress = True
                    continue
                try:
                    folder = _open_folder(name, top)
                except OSError:
                    continue
                try:
                    for child in _remove_files(folder):
                        moved += 1
                        os.close(_open_folder(child, folder))  # a folder that cannot be written stays where it is
                        os.rename(child, f".moved-{os.getpid()}-{moved}", src_dir_fd=folder, dst_dir_fd=top)
                        progress = True
                except OSError:
                    pass
                finally:
                    os.close(folder)
                with contextlib.suppress(OSError):
                    os.rmdir(name, dir_fd=top)
                    progress = True
            if not progress:
                break
    finally:
        os.close(top)
    with contextlib.suppress(OSError):
        os.rmdir(path)


def _open_folder(path: str, parent: int | None) -> int:
    handle = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=parent)
    try:
        if stat.S_IMODE(os.fstat(handle).st_mode) & 0o700 != 0o700:
            os.chmod(f"/proc/self/fd/{handle}", 0o700)
        return os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    finally:
        os.close(handle)


def _remove_files(folder: int) -> list[str]:
    """Remove all that is no folder from an open folder; the names of the folders."""
    folders = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.name)
            else:
                with contextlib.suppress(OSError):
                    os.unlink(entry.name, dir_fd=folder)
    return folders
