"""Reads and writes files of the working directory for the host.

The host asks for nothing but plain relative paths. Symbolic links are not followed, on no part of a path.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import os
import stat
from typing import Any


def answer(folder: str, question: dict[str, Any]) -> dict[str, Any]:
    """What the host asked for, or the number of the error that stood in the way."""
    try:
        if "put" in question:
            _write(folder, question["put"], question["offset"], base64.b64decode(question["data"]))
            return {}
        data, at_end = _read(folder, question["get"], question["offset"], question["size"])
        return {"data": base64.b64encode(data).decode("ascii"), "end": at_end}
    except MemoryError:
        return {"errno": errno.ENOMEM}
    except OSError as error:
        return {"errno": error.errno or errno.EIO}


def _write(folder: str, path: str, offset: int, data: bytes) -> None:
    parent = _open_parent(folder, path, make=True)
    name = path.rpartition("/")[2]
    try:
        flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | (0 if offset else os.O_CREAT | os.O_TRUNC)
        file = os.open(name, flags, 0o600, dir_fd=parent)
        try:
            while data:
                written = os.pwrite(file, data, offset)
                offset, data = offset + written, data[written:]
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=parent)  # half a file is worse than none
            raise
        finally:
            os.close(file)
    finally:
        os.close(parent)


def _read(folder: str, path: str, offset: int, size: int) -> tuple[bytes, bool]:
    parent = _open_parent(folder, path, make=False)
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file = os.open(path.rpartition("/")[2], flags, dir_fd=parent)
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL, "not a file")
            data = os.pread(file, size, offset)
            return data, offset + len(data) >= status.st_size
        finally:
            os.close(file)
    finally:
        os.close(parent)


def _open_parent(folder: str, path: str, *, make: bool) -> int:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    here = os.open(folder, flags)
    try:
        for name in path.split("/")[:-1]:
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o700, dir_fd=here)
            below = os.open(name, flags, dir_fd=here)
            os.close(here)
            here = below
    except BaseException:
        os.close(here)
        raise
    return here
