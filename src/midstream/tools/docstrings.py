"""Reads docstrings in the styles of Google, NumPy and Sphinx: what a function does, takes and gives."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_GOOGLE = re.compile(r"(Args|Arguments|Parameters|Returns?|Yields?|Raises|Keyword Args|Keyword Arguments):[ \t]*")
_GOOGLE_PARAMETER = re.compile(r"\*{0,2}(\w+)[ \t]*(\([^)]*\))?[ \t]*:[ \t]*(.*)")
_NUMPY_TITLE = re.compile(r"(Parameters|Other Parameters|Returns|Yields|Raises)[ \t]*")
_NUMPY_PARAMETER = re.compile(r"(\*{0,2}\w+(?:[ \t]*,[ \t]*\*{0,2}\w+)*)[ \t]*(:.*)?")
_SPHINX = re.compile(
    r":(param|parameter|arg|argument|key|keyword|returns?|rtype|type|raises?)\b[ \t]*([^:]*):[ \t]*(.*)"
)


@dataclass(frozen=True, slots=True)
class Docstring:
    """``text``: what it says of the function as a whole; ``parameters``: of each by name; ``returns``."""

    text: str = ""
    parameters: dict[str, str] = field(default_factory=dict)
    returns: str = ""


def parse(docstring: str | None) -> Docstring:
    """What a docstring says. What is in none of the three styles is all text."""
    lines = inspect.cleandoc(docstring or "").splitlines()
    read = _Reader()
    while lines:
        lines = lines[read.take(lines) :]
    return read.docstring


class _Reader:
    def __init__(self) -> None:
        self._text: list[str] = []
        self._parameters: dict[str, str] = {}
        self._returns: list[str] = []

    @property
    def docstring(self) -> Docstring:
        text = re.sub(r"\n{3,}", "\n\n", "\n".join(self._text).strip())
        return Docstring(text, dict(self._parameters), " ".join(filter(None, self._returns)))

    def take(self, lines: list[str]) -> int:
        """Read from the first line on; how many were taken."""
        google = _GOOGLE.fullmatch(lines[0])
        if google is not None and (len(lines) == 1 or not lines[1].strip() or lines[1][:1].isspace()):
            body = list(_indented(lines[1:]))
            self._section(google[1], body)
            return 1 + len(body)
        numpy = _NUMPY_TITLE.fullmatch(lines[0])
        if numpy is not None and len(lines) > 1 and re.fullmatch(r"-{3,}[ \t]*", lines[1]):
            body = list(_until_title(lines[2:]))
            self._numpy_section(numpy[1], body)
            return 2 + len(body)
        sphinx = _SPHINX.fullmatch(lines[0])
        if sphinx is not None:
            body = list(_indented(lines[1:]))
            self._field(sphinx[1], sphinx[2], _joined([sphinx[3], *body]))
            return 1 + len(body)
        self._text.append(lines[0])
        return 1

    def _section(self, title: str, body: list[str]) -> None:
        if title.startswith(("Return", "Yield")):
            self._returns.append(_joined(body))
        elif title != "Raises":
            for head, rest in _entries(body):
                match = _GOOGLE_PARAMETER.fullmatch(head)
                if match is not None:
                    self._parameters[match[1]] = _joined([match[3], *rest])

    def _numpy_section(self, title: str, body: list[str]) -> None:
        for head, rest in _entries(body):
            match = _NUMPY_PARAMETER.fullmatch(head)
            if title in ("Returns", "Yields"):
                self._returns.append(_joined(rest or [head]))  # the head is its type, where more follows
            elif title != "Raises" and match is not None:
                for name in match[1].split(","):
                    self._parameters[name.strip().lstrip("*")] = _joined(rest)

    def _field(self, kind: str, name: str, text: str) -> None:
        if kind.startswith("return"):
            self._returns.append(text)
        elif kind.startswith(("param", "arg", "key")) and name.split():
            self._parameters[name.split()[-1].lstrip("*")] = text  # ":param int k:" has the type before it


def _indented(lines: list[str]) -> Iterator[str]:
    """The lines of a section: those that are indented, and blank ones among them."""
    last = max((n for n, line in enumerate(lines[: _first_unindented(lines)]) if line.strip()), default=-1)
    yield from lines[: last + 1]


def _first_unindented(lines: list[str]) -> int:
    return next((n for n, line in enumerate(lines) if line.strip() and not line[0].isspace()), len(lines))


def _until_title(lines: list[str]) -> Iterator[str]:
    for number, line in enumerate(lines):
        underlined = number + 1 < len(lines) and re.fullmatch(r"-{3,}[ \t]*", lines[number + 1])
        if underlined and line.strip():
            return
        yield line


def _entries(body: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Entries of a section: a line at its margin, with the lines below it that are indented further."""
    lines = [line for line in body if line.strip()]
    margin = min((len(line) - len(line.lstrip()) for line in lines), default=0)
    while lines:
        rest = []
        for line in lines[1:]:
            if len(line) - len(line.lstrip()) <= margin:
                break
            rest.append(line)
        yield lines[0].strip(), rest
        lines = lines[1 + len(rest) :]


def _joined(lines: list[str]) -> str:
    return " ".join(filter(None, (line.strip() for line in lines)))
