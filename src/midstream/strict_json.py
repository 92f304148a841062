"""Reads JSON that a model wrote, and says where it is wrong.

Stricter than the standard library's reader, and bounded: no name twice in an object, no ``NaN`` or
``Infinity``, no number that overflows, nothing nested deeper than :data:`MAX_DEPTH`. What is wrong is said in
terms of what models get wrong: single quotes, trailing commas, Python's ``True``, line breaks in strings.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

MAX_DEPTH = 32
"""How many objects and lists may lie inside one another."""

_MAX_DIGITS = 1000

_SPACE = re.compile(r"[ \t\r\n]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_HEX = re.compile(r"[0-9a-fA-F]{4}")
_WORD = re.compile(r"[A-Za-z_][A-Za-z_0-9]*")
_LITERALS = {"true": True, "false": False, "null": None}
_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_MEANT = {"True": "true", "False": "false", "None": "null", "undefined": "null"}
_CONTROL_NAMES = {"\n": "a line break", "\r": "a carriage return", "\t": "a tab"}


class JSONFault(Exception):
    """What is wrong (``message``) with a text at an ``offset``, in characters from 0."""

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.message = message
        self.offset = offset


def skip_space(text: str, at: int) -> int:
    """Where the next character stands that is no JSON whitespace."""
    match = _SPACE.match(text, at)
    return match.end() if match else at


def read_value(text: str, at: int = 0) -> tuple[Any, int]:
    """The JSON value that begins at ``at``, behind whitespace, and where it ends.

    Objects come as dicts, lists as lists, numbers as int or float. Raises :class:`JSONFault`.
    """
    return _Reader(text).read(at)


def where(text: str, offset: int) -> str:
    """An offset as a place that a model can find: line and column from 1, and what stands there."""
    line = text.count("\n", 0, offset) + 1
    column = offset - (text.rfind("\n", 0, offset) + 1) + 1
    begin, end = max(0, offset - 20), min(len(text), offset + 20)
    head = ("…" if begin > 0 else "") + text[begin:offset]
    tail = text[offset:end] + ("…" if end < len(text) else "")
    shown = f"{head}⟨here⟩{tail}".replace("\n", "\\n").replace("\r", "\\r")
    return f"line {line} column {column}: {shown}"


@dataclass(slots=True)
class _Open:
    """An object or a list that is not closed yet. ``name``: of the object's value that comes next."""

    value: dict[str, Any] | list[Any]
    begin: int
    name: str | None = None


@dataclass(slots=True)
class _Reader:
    """Keeps what is open in a list of its own: text may be nested as deeply as it likes."""

    text: str
    _open: list[_Open] = field(default_factory=list)

    def read(self, at: int) -> tuple[Any, int]:
        while True:
            at = skip_space(self.text, at)
            character = self.text[at : at + 1]
            if character in ("{", "["):
                opened = self._enter(character, at)
                at = skip_space(self.text, at + 1)
                if self.text[at : at + 1] != ("}" if character == "{" else "]"):
                    at = self._name(at) if character == "{" else at
                    continue
                self._open.pop()
                value, at = opened.value, at + 1
            else:
                value, at = self._scalar(at)
            value, at, complete = self._place(value, at)
            if complete:
                return value, at

    def _enter(self, character: str, at: int) -> _Open:
        if len(self._open) >= MAX_DEPTH:
            raise JSONFault(f"nested deeper than {MAX_DEPTH} levels", at)
        opened = _Open({} if character == "{" else [], at)
        self._open.append(opened)
        return opened

    def _place(self, value: Any, at: int) -> tuple[Any, int, bool]:
        """Put a value that ends at ``at`` where it belongs, and close what closes behind it."""
        while self._open:
            inner = self._open[-1]
            if isinstance(inner.value, dict):
                inner.value[str(inner.name)] = value
            else:
                inner.value.append(value)
            at = skip_space(self.text, at)
            closing = "}" if isinstance(inner.value, dict) else "]"
            character = self.text[at : at + 1]
            if character == ",":
                behind = skip_space(self.text, at + 1)
                if self.text[behind : behind + 1] == closing:
                    raise JSONFault(f"a comma before {closing!r}: JSON has none there", at)
                return value, self._name(behind) if closing == "}" else behind, False
            if character != closing:
                raise self._unclosed(inner, closing, at)
            self._open.pop()
            value, at = inner.value, at + 1
        return value, at, True

    def _unclosed(self, inner: _Open, closing: str, at: int) -> JSONFault:
        if at >= len(self.text):
            opening = "{" if closing == "}" else "["
            line = self.text.count("\n", 0, inner.begin) + 1
            return JSONFault(f"the text ends, and the {opening!r} of line {line} is not closed by {closing!r}", at)
        after = f" behind the value of {str(inner.name)[:40]!r}" if closing == "}" else ""
        return JSONFault(f"expected ',' or {closing!r}{after}", at)

    def _name(self, at: int) -> int:
        """Read ``"name":`` in an object."""
        if self.text[at : at + 1] != '"':
            if self.text[at : at + 1] == "'":
                raise JSONFault("names stand in double quotes, not in single ones", at)
            raise JSONFault("expected a name in double quotes", at)
        name, behind = self._string(at)
        inner = self._open[-1]
        if name in inner.value:
            raise JSONFault(f"the name {name[:40]!r} stands twice in one object", at)
        inner.name = name
        behind = skip_space(self.text, behind)
        if self.text[behind : behind + 1] != ":":
            raise JSONFault(f"expected ':' behind the name {name[:40]!r}", behind)
        return behind + 1

    def _scalar(self, at: int) -> tuple[Any, int]:
        character = self.text[at : at + 1]
        if character == '"':
            return self._string(at)
        if character == "":
            raise JSONFault("the text ends where a value is expected", at)
        if character == "-" or "0" <= character <= "9":
            return self._number(at)
        word = _WORD.match(self.text, at)
        if word is None:
            quote = "strings stand in double quotes, not in single ones" if character == "'" else "expected a value"
            raise JSONFault(quote, at)
        if word[0] in _LITERALS:
            return _LITERALS[word[0]], word.end()
        if word[0] in _MEANT:
            raise JSONFault(f"{word[0]} is no JSON: write {_MEANT[word[0]]}", at)
        if word[0] in ("NaN", "Infinity"):
            raise JSONFault(f"JSON has no {word[0]}", at)
        raise JSONFault(f"expected a value, not {word[0][:40]}; strings stand in double quotes", at)

    def _number(self, at: int) -> tuple[int | float, int]:
        match = _NUMBER.match(self.text, at)
        if match is None:
            behind = "; JSON has no Infinity" if self.text.startswith("-Infinity", at) else ""
            raise JSONFault(f"expected a digit behind the minus{behind}", at + 1)
        end = match.end()
        if end < len(self.text) and (self.text[end].isalnum() or self.text[end] in "._"):
            raise JSONFault("this is no JSON number", at)
        if end - at > _MAX_DIGITS:
            raise JSONFault(f"a number has more than {_MAX_DIGITS} digits", at)
        if match[1] is None and match[2] is None:
            return int(match[0]), end
        value = float(match[0])
        if math.isinf(value):
            raise JSONFault("a number is too large", at)
        return value, end

    def _string(self, at: int) -> tuple[str, int]:
        begin, at = at, at + 1
        parts: list[str] = []
        while True:
            plain = _PLAIN.match(self.text, at)
            assert plain is not None  # it matches nothing too
            parts.append(plain[0])
            at = plain.end()
            character = self.text[at : at + 1]
            if character == '"':
                return "".join(parts), at + 1
            if character == "":
                raise JSONFault("a string is not closed", begin)
            if character != "\\":
                name = _CONTROL_NAMES.get(character, f"the character {ord(character):#04x}")
                written = character.encode("unicode_escape").decode()
                raise JSONFault(
                    f"a string holds {name}: write it as {written if len(written) == 2 else 'an escape'}", at
                )
            decoded, at = self._escape(at)
            parts.append(decoded)

    def _escape(self, at: int) -> tuple[str, int]:
        character = self.text[at + 1 : at + 2]
        if character in _ESCAPES:
            return _ESCAPES[character], at + 2
        if character != "u":
            raise JSONFault(f"\\{character} is no escape of JSON's", at)
        unit = self._unit(at)
        if 0xD800 <= unit < 0xDC00 and self.text.startswith("\\u", at + 6):
            low = self._unit(at + 6)
            if 0xDC00 <= low < 0xE000:
                return chr(0x10000 + ((unit - 0xD800) << 10) + (low - 0xDC00)), at + 12
        return chr(unit), at + 6

    def _unit(self, at: int) -> int:
        digits = _HEX.match(self.text, at + 2)
        if digits is None:
            raise JSONFault("expected four hexadecimal digits behind \\u", at)
        return int(digits[0], 16)
