"""What can be told of an option's value before any work starts."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from midstream.errors import ConfigurationError, RecordError


@contextmanager
def named_options(**options: str) -> Iterator[None]:
    """Have what is refused within name the option, too, that its field was given by: ``field="--option"``."""
    try:
        yield
    except ConfigurationError as error:
        field = str(error).partition("=")[0].rpartition(".")[2]
        if field not in options:
            raise
        raise ConfigurationError(f"{options[field]}: {error}") from error


def check_readable(file: str) -> None:
    """Raise as reading it would, without opening it: a pipe can be opened but once."""
    try:
        if os.path.isdir(file):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        os.stat(file)
        _check_access(Path(file), os.R_OK)
    except OSError as error:
        raise RecordError(f"{file}: cannot be read ({error.strerror})") from error


def check_writable(option: str, file: str) -> None:
    """Raise where a file cannot be written. None is made."""
    path = Path(file)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists():
            _check_access(path, os.W_OK)
        else:
            os.stat(f"{path.parent}/.")
            _check_access(path.parent, os.W_OK)
    except OSError as error:
        raise RecordError(f"{option} {file}: cannot be written ({error.strerror})") from error


def check_folder(option: str, folder: str) -> None:
    """Raise where files cannot be written to a folder that may have to be made. None is made."""
    path = Path(folder).absolute()
    there = next(place for place in (path, *path.parents) if place.exists())
    try:
        os.stat(f"{there}/.")  # a file is not a folder
        _check_access(there, os.W_OK)
    except OSError as error:
        raise RecordError(f"{option} {folder}: cannot be written ({error.strerror})") from error


def _check_access(path: Path, mode: int) -> None:
    if not os.access(path, mode):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
