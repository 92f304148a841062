"""Which commands a sandbox that runs Python alone can run, and what they come to."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from midstream.integrations.inspect import inside

FILE_COMMANDS = tuple(inside.FILE_COMMANDS)
"""Commands that are done in Python, by their usual names."""

_SHELLS = ("bash", "dash", "sh")
_SHELL_FLAGS = ("-l", "--login")
_NO_SHELL_NEEDED = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 -_./,:+@%^='\"")
_IDLE_FLAGS = ("-u", "-B", "-s", "-E", "-I", "-P")
"""Flags of Python\'s that make no difference here."""


@dataclass(frozen=True, slots=True)
class Command:
    """``kind``: how :mod:`~midstream.integrations.inspect.inside` runs it; ``arguments``: ``sys.argv`` or the like."""

    kind: str
    source: str = ""
    arguments: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "source": self.source, "arguments": self.arguments}


def parse(words: Sequence[str]) -> Command:
    """What a command comes to. Raises :class:`NotImplementedError` for what would take a shell or another program."""
    if not words:
        raise ValueError("cmd=[]: must name a command")
    name = PurePosixPath(words[0]).name
    if name in _SHELLS:
        return parse(_simple(words))
    if re.fullmatch(r"python(3(\.\d+)?)?", name):
        return _python(words)
    if name in FILE_COMMANDS:
        return Command("file", name, list(words[1:]))
    raise NotImplementedError(
        f"cmd={words[0]!r}: this sandbox runs Python alone: python, and in Python {', '.join(FILE_COMMANDS)}; "
        "for other programs choose another sandbox"
    )


def _simple(words: Sequence[str]) -> list[str]:
    """The words of a shell\'s script that is one plain command, which needs no shell."""
    rest = [word for word in words[1:] if word not in _SHELL_FLAGS]
    if len(rest) == 2 and rest[0] == "-c" and set(rest[1]) <= _NO_SHELL_NEEDED:
        plain = shlex.split(rest[1])
        if plain and "=" not in plain[0]:
            return plain
    raise NotImplementedError(
        f"cmd={words[0]!r}: this sandbox runs Python alone, and has no shell; use Inspect's python tool instead of "
        "bash, or choose another sandbox"
    )


def _python(words: Sequence[str]) -> Command:
    rest = list(words[1:])
    while rest and rest[0] in _IDLE_FLAGS:
        del rest[0]
    if not rest or rest[0] == "-":
        return Command("stdin", arguments=["-", *rest[1:]] if rest else [""])
    if rest[0] == "-c" and len(rest) > 1:
        return Command("code", rest[1], ["-c", *rest[2:]])
    if rest[0] == "-m" and len(rest) > 1:
        return Command("module", rest[1], ["-m", *rest[2:]])
    if rest[0].startswith("-"):
        raise NotImplementedError(
            f"cmd={list(words)[:3]}: of Python's options there are -c, -m and -, and {_IDLE_FLAGS}"
        )
    return Command("script", rest[0], rest)
