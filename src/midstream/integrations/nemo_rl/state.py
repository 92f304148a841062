"""What a row's metadata holds of its state, so that the state can be had again wherever the metadata goes."""

from __future__ import annotations

import ast
import keyword
import logging
import os
import secrets
from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

from midstream.errors import ConfigurationError
from midstream.sandbox.limits import SandboxLimits
from midstream.sandbox.replay import PastBlock
from midstream.types import ExecutionResult

logger = logging.getLogger(__name__)


class RanBlock(TypedDict):
    """A block that ran: its code, what it showed, and whether it may be run again."""

    code: str
    text: str
    repeatable: bool


class SessionState(TypedDict):
    """Where a row stands: the session that is in this state now (it may be gone), and what leads to it from nothing."""

    handle: str
    seed: int
    past: list[RanBlock]


class CodeEnvMetadata(TypedDict):
    """A row's metadata, of texts, numbers, lists and dicts alone.

    - ``context``: names that the row's code finds at its beginning, with plain values. It stays as it is: what code
      defines is kept in the sandbox.
    - ``working_dir``: a folder of the host whose files the row finds in its working directory, or "". What code writes
      stays in the sandbox.
    - ``session``: put there by the environment.
    """

    context: dict[str, Any]
    working_dir: str
    session: NotRequired[SessionState]


def state_of(metadata: Mapping[str, Any]) -> SessionState:
    """The state that a row's metadata tells of; a new one where it tells of none."""
    state = metadata.get("session")
    if state is None:
        return SessionState(handle="", seed=secrets.randbits(63), past=[])
    try:
        past = [
            RanBlock(code=str(block["code"]), text=str(block["text"]), repeatable=bool(block["repeatable"]))
            for block in state["past"]
        ]
        return SessionState(handle=str(state["handle"]), seed=int(state["seed"]), past=past)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(
            "metadata['session']: is not what the environment put there; give it back as it was, or leave it out"
        ) from error


def remembered(code: str, result: ExecutionResult) -> RanBlock | None:
    """What is to be run again to come to the state after a block, or None if it left none."""
    ended = result.state_lost or result.rolled_back
    if ended and result.error is not None and result.error.type == "Killed":
        return None
    past = PastBlock.of(code, result)
    return RanBlock(code=past.code, text=past.text, repeatable=past.repeatable)


def history_of(metadata: Mapping[str, Any], state: SessionState, limits: SandboxLimits) -> list[PastBlock]:
    """All that leads to a row's state: the files it was given, its first names, and its blocks. Reads files."""
    opening = [PastBlock.of_file(name, data) for name, data in _files(metadata.get("working_dir") or "", limits)]
    first = _assignments(metadata.get("context") or {})
    if first:
        opening.append(PastBlock(first, "", (), repeatable=True))
    return [*opening, *(PastBlock(block["code"], block["text"], (), block["repeatable"]) for block in state["past"])]


def _assignments(context: Mapping[str, Any]) -> str:
    lines = []
    for name, value in context.items():
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
            raise ConfigurationError(f"metadata['context'][{name!r}]: its names must be Python identifiers")
        written = repr(value)
        if not _says_the_same(written, value):
            raise ConfigurationError(
                f"metadata['context'][{name!r}]: is {type(value).__name__}; only values that can be written as Python "
                "literals go into a sandbox"
            )
        lines.append(f"{name} = {written}")
    return "\n".join(lines)


def _says_the_same(written: str, value: object) -> bool:
    try:
        return bool(ast.literal_eval(written) == value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False


def _files(folder: str, limits: SandboxLimits) -> list[tuple[str, bytes]]:
    """The regular files below a folder, by their paths in it; links are left out, as they may lead anywhere."""
    if not folder:
        return []
    if not os.path.isdir(folder):
        logger.warning("metadata['working_dir']=%r: there is no such folder here; the row begins without files", folder)
        return []
    found: list[tuple[str, bytes]] = []
    size = 0
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(place, name)
            if os.path.islink(path) or not os.path.isfile(path):
                continue
            size += os.path.getsize(path)
            if size > limits.working_directory or len(found) >= limits.files:
                raise ConfigurationError(
                    f"metadata['working_dir']={folder!r}: holds more than a session may "
                    f"({limits.working_directory} bytes, {limits.files} files)"
                )
            with open(path, "rb") as file:
                found.append((os.path.relpath(path, folder), file.read()))
    return found
