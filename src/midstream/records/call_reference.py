"""Takes the calls of a block apart, with the standard library's JSON reader.

This says again what :mod:`midstream.call_text` does with a reader of its own, and shares no code with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

_SPACE = " \t\r\n"
_DEEPEST = 32
_LONGEST_NUMBER = 1000


def calls_of(holds: str, text: str) -> list[tuple[str, str]]:
    """The kind and the text of each call that a block holds."""
    if holds == "code":
        return [("code", text)]
    if holds == "named":
        return [("named", part) for part in _named(text)]
    if holds == "json_answer" and not _meant(text):
        return []
    if holds == "code_or_json":
        if re.fullmatch(r'\s*[^\W\d]\w*\.call\(\s*(\w+\s*=\s*"[^"]*"\s*(,\s*)?)*\)\s*', text):
            return [("builtin", text)]
        if not _meant(text):
            return [("code", text)]
    return [("json", part) for part in _parts(text)]


def _parts(text: str) -> list[str]:
    """The list's items, or the values that stand one after the other; all of it where anything is wrong."""
    body = text.strip(_SPACE)
    try:
        if body.startswith("["):
            _value(body, 0, whole=True)
            rest, parts = body[1:], []
            while True:
                rest = rest.lstrip(_SPACE)
                end = _value(rest, 0)[1]
                parts.append(rest[:end])
                rest = rest[end:].lstrip(_SPACE)
                if rest[0] == "]":
                    return parts
                rest = rest[1:]
        parts = []
        while body:
            end = _value(body, 0)[1]
            parts.append(body[:end])
            body = body[end:].lstrip(_SPACE)
            if body.startswith(";"):
                body = body[1:].lstrip(_SPACE)
    except ValueError:
        return [text]
    return parts or [text]


def _named(text: str) -> list[str]:
    parts: list[str] = []
    begin = 0
    try:
        while True:
            behind_name = text.index("[ARGS]", begin)
            at = behind_name + len("[ARGS]")
            at += len(text[at:]) - len(text[at:].lstrip(_SPACE))
            value, end = _value(text, at)
            if not isinstance(value, dict) or not text[begin:behind_name].split("[CALL_ID]")[0].strip():
                return [text]
            parts.append(text[begin:end])
            rest = text[end:].lstrip(_SPACE)
            if not rest:
                return parts
            if not rest.startswith("[TOOL_CALLS]"):
                return [text]
            begin = len(text) - len(rest) + len("[TOOL_CALLS]")
    except ValueError:
        return [text]


def _meant(text: str) -> bool:
    body = text.strip(_SPACE)
    if body[:1] not in ("{", "["):
        return False
    try:
        value = _value(body, 0)[0]
    except ValueError:
        if re.match(r'(\[\s*)?\{\s*("type"\s*:\s*"function"\s*,\s*)?"(name|function)"\s*:', body):
            return True
        names = [match.end() for match in re.finditer(r'"name"\s*:', body)]
        return bool(names) and re.search(r'"(arguments|parameters)"\s*:', body[names[0] :]) is not None
    if isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, dict):
        return False
    named = value["name"] if "name" in value else value.get("function")
    return isinstance(named, (str, dict)) and any(key in value for key in ("arguments", "parameters", "function"))


# --- one value


def _refuse(what: str) -> Any:
    raise ValueError(what)


def _number(kind: type) -> Any:
    def read(digits: str) -> Any:
        value = kind(digits) if len(digits) <= _LONGEST_NUMBER else _refuse("too long")
        return value if abs(value) != float("inf") else _refuse("too large")

    return read


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    return dict(pairs) if len({name for name, _ in pairs}) == len(pairs) else _refuse("a name twice")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_float=_number(float), parse_int=_number(int), parse_constant=_refuse
)


def _value(text: str, at: int, *, whole: bool = False) -> tuple[Any, int]:
    try:
        value, end = _DECODER.raw_decode(text, at)
    except (RecursionError, OverflowError) as error:
        raise ValueError from error
    if _depth(value) > _DEEPEST or (whole and end < len(text)):
        raise ValueError("too deep, or not all of it")
    if text[end - 1].isdigit() and re.match(r"[\w.]", text[end:]):
        raise ValueError("no number")
    return value, end


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, (dict, list))]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth
