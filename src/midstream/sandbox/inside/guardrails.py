"""The built-in functions as code under guardrails sees them.

Only the namespace of blocks has these: modules that it imports have Python's own, and work as ever.
"""

from __future__ import annotations

import builtins
import os
import types
from collections.abc import Callable, Sequence
from typing import Any

_IMPORT_BLOCKED = "Importing system and network modules is blocked"
_PATH_BLOCKED = "Access beyond the temporary working directory is blocked"


def guarded_builtins(terms: dict[str, Any], folder: Callable[[], str]) -> types.ModuleType:
    """A copy of ``builtins`` whose imports and ``open`` are guarded. ``folder``: gives the working directory."""
    module = types.ModuleType("builtins", builtins.__doc__)
    module.__dict__.update(builtins.__dict__)
    if terms["blocked_modules"]:
        module.__dict__["__import__"] = _guarded_import(frozenset(terms["blocked_modules"]))
    if terms["working_directory_only"]:
        module.__dict__["open"] = _guarded_open(folder)
    return module


def _guarded_import(blocked: frozenset[str]) -> Callable[..., Any]:
    plain = builtins.__import__

    def is_blocked(name: str) -> bool:
        while name:
            if name in blocked:
                return True
            name = name.rpartition(".")[0]
        return False

    def guarded(
        name: str,
        globals: Any = None,  # noqa: A002  # their names in Python's own
        locals: Any = None,  # noqa: A002
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        if level == 0:
            asked = [name, *(f"{name}.{item}" for item in fromlist or ())]
            if any(is_blocked(each) for each in asked):
                raise PermissionError(_IMPORT_BLOCKED)
        return plain(name, globals, locals, fromlist or (), level)

    guarded.__name__ = guarded.__qualname__ = "__import__"
    return guarded


def _guarded_open(folder: Callable[[], str]) -> Callable[..., Any]:
    plain = builtins.open

    def guarded(file: Any, *arguments: Any, **keyword_arguments: Any) -> Any:
        if isinstance(file, str | bytes | os.PathLike):
            own = os.path.realpath(folder())
            path = os.path.realpath(os.fsdecode(file))
            if path != own and not path.startswith(own + "/"):
                raise PermissionError(_PATH_BLOCKED)
        return plain(file, *arguments, **keyword_arguments)

    guarded.__name__ = guarded.__qualname__ = "open"
    guarded.__doc__ = plain.__doc__
    return guarded
