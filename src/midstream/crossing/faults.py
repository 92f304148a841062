"""Exceptions between the host and code: type and message cross, a traceback and the host's paths never."""

from __future__ import annotations

import builtins
import contextlib
import functools
import os
import re
from typing import Any

from midstream.types import ExecutionError

_LONGEST_MESSAGE = 1 << 20
_PATH = re.compile(r"(?<![\w/.:~-])/[^\s'\"`:,;|<>()\[\]{}]+")


def describe_exception(error: BaseException) -> ExecutionError:
    """A tool's exception, as code gets to see it.

    The message is the exception's own text. Absolute paths in it that lie in a folder that this machine has
    are cut to their last part.
    """
    kind = type(error)
    message = error.args[0] if isinstance(error, KeyError) and len(error.args) == 1 else error
    try:
        text = _PATH.sub(_without_folders, str(message)[:_LONGEST_MESSAGE])
    except Exception:  # noqa: BLE001  # its __str__ is not ours
        text = ""
    return ExecutionError(kind.__name__, text, base="" if is_builtin(kind) else _builtin_base(kind))


def is_builtin(kind: type) -> bool:
    return getattr(builtins, kind.__name__, None) is kind


def _builtin_base(kind: type[BaseException]) -> str:
    base = next(one for one in kind.__mro__ if is_builtin(one))
    return base.__name__ if issubclass(base, Exception) else Exception.__name__


def _without_folders(match: re.Match[str]) -> str:
    path = match[0].rstrip("/")
    first = path.split("/", 2)[1] if path else ""
    return os.path.basename(path) if first and _is_folder("/" + first) else match[0]


@functools.lru_cache(maxsize=256)
def _is_folder(path: str) -> bool:
    return os.path.isdir(path)


def exception_of(name: str, message: str, base: str = "") -> Exception:
    """A described exception again: the built-in one of that name, or one of its own below ``base``."""
    kind: Any = getattr(builtins, name, None)
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        parent: Any = getattr(builtins, base, None)
        known = isinstance(parent, type) and issubclass(parent, Exception)
        kind = _own(name, parent if known else Exception)
    # Some take other arguments than a message, such as UnicodeDecodeError: then one below what it is below.
    for candidate in (kind, *(_own(name, parent) for parent in kind.__mro__[1:])):
        with contextlib.suppress(Exception):
            error = candidate(message)
            if isinstance(error, Exception):
                return error
    return Exception(message)


def _own(name: str, parent: type) -> type:
    return type(name if name.isidentifier() else "ToolError", (parent,), {"__module__": "__main__"})
