"""Calls of tools as models write them: taking the text of a block apart, and reading one call.

Models of several families write calls as JSON, alike but for details: ``arguments`` or ``parameters``; one
object, a list of them, or several in a row; Mistral's ``name[ARGS]{…}``; Llama's ``name.call(query="…")``.
What a call means is read here and nowhere else; what is wrong with one is said so that a model can mend it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from midstream.strict_json import JSONFault, read_value, skip_space, where
from midstream.types import CallKind

Holds = Literal["code", "json", "json_answer", "named", "code_or_json"]
"""What the blocks of a markup hold.

- ``code``: Python. ``json``: calls: an object, a list of objects, or objects one after the other.
- ``json_answer``: the same, where the block may be an answer in JSON as well: then it is no call at all.
- ``named``: ``name[ARGS]{…}``, several of them with ``[TOOL_CALLS]`` in between.
- ``code_or_json``: calls if it begins as they do, else Python.
"""

_BETWEEN = "[TOOL_CALLS]"
_ARGUMENTS = "[ARGS]"
_ID = "[CALL_ID]"
_MOST_SHOWN = 64
"""Characters of a call's name or id that its result repeats: both are the model's own text."""

_BEGINNING = re.compile(r'\s*\[?\s*\{\s*("type"\s*:\s*"function"\s*,\s*)?"(name|function)"\s*:')
_NAME_OF_CALL = re.compile(r'"name"\s*:')
_ARGUMENTS_OF_CALL = re.compile(r'"(parameters|arguments)"\s*:')
_NAME = re.compile(r'"name"\s*:\s*"([^"\\]*)"')
_BUILTIN = re.compile(r'\s*([A-Za-z_]\w*)\.call\(\s*((?:\w+\s*=\s*"[^"]*"\s*(?:,\s*)?)*)\)\s*')
_BUILTIN_ARGUMENT = re.compile(r'(\w+)\s*=\s*"([^"]*)"')


@dataclass(frozen=True, slots=True)
class ToolRequest:
    """A call that could be read. ``id``: the model's own for it, or ""."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""


class CallFault(Exception):
    """Why a call cannot be read, in words for the model that wrote it."""


def split_block(holds: Holds, text: str) -> list[tuple[CallKind, str]]:
    """The calls that a block holds, in order: how each is to be read, and its own text.

    A block that is not well-formed as a whole is one call, which :func:`read_call` then says the fault of:
    nothing of a broken block is run.
    """
    match holds:
        case "code":
            return [("code", text)]
        case "named":
            return [("named", part) for part in _named_parts(text)]
        case "json_answer" if not _means_calls(text):
            return []
        case "code_or_json" if _BUILTIN.fullmatch(text):
            return [("builtin", text)]
        case "code_or_json" if not _means_calls(text):
            return [("code", text)]
        case _:
            return [("json", part) for part in _json_parts(text)]


def read_call(kind: CallKind, text: str) -> ToolRequest:
    """The call that ``text`` is. Raises :class:`CallFault`."""
    try:
        match kind:
            case "named":
                request, end = _read_named(text, 0)
                if skip_space(text, end) < len(text):
                    raise JSONFault(f"expected {_BETWEEN} or the end behind the arguments", skip_space(text, end))
                return request
            case "builtin":
                match = _BUILTIN.fullmatch(text)
                if match is None:
                    raise CallFault('a built-in tool is called as name.call(argument="value")')
                return ToolRequest(match[1], dict(_BUILTIN_ARGUMENT.findall(match[2])))
            case _:
                return _request_of(_only_value(text))
    except JSONFault as fault:
        raise CallFault(f"this call is not valid JSON: {fault.message}, at {where(text, fault.offset)}") from None


def shown_name_and_id(kind: CallKind, text: str, index: int) -> tuple[str, str]:
    """What a result says of the call that it answers: its name, and its id or one made from ``index``."""
    try:
        request = ToolRequest("") if kind == "code" else read_call(kind, text)
    except CallFault:
        match = _NAME.search(text)
        request = ToolRequest(match[1] if match else "")
    # Nine letters and digits, as Mistral's formats have it.
    return request.name[:_MOST_SHOWN], request.id[:_MOST_SHOWN] or f"call{index:05d}"


# --- taking apart


def _json_parts(text: str) -> list[str]:
    try:
        at = skip_space(text, 0)
        in_list = text[at : at + 1] == "["
        at += int(in_list)
        parts: list[str] = []
        while True:
            begin = skip_space(text, at)
            _, end = read_value(text, begin)
            parts.append(text[begin:end])
            at = skip_space(text, end)
            if in_list:
                if text[at : at + 1] == "]":
                    return parts if skip_space(text, at + 1) == len(text) else [text]
                if text[at : at + 1] != ",":
                    return [text]
                at += 1
            elif at == len(text):
                return parts
            elif text[at] == ";":
                at = skip_space(text, at + 1)
                if at == len(text):
                    return parts
    except JSONFault:
        return [text]


def _named_parts(text: str) -> list[str]:
    try:
        parts: list[str] = []
        at = 0
        while True:
            _, end = _read_named(text, at)
            parts.append(text[at:end])
            at = skip_space(text, end)
            if at == len(text):
                return parts
            if not text.startswith(_BETWEEN, at):
                return [text]
            at += len(_BETWEEN)
    except (JSONFault, CallFault):
        return [text]


def _means_calls(text: str) -> bool:
    """Whether a text that may be an answer, or Python, is calls, be they broken."""
    begin = skip_space(text, 0)
    if text[begin : begin + 1] not in ("{", "["):
        return False
    try:
        value, _ = read_value(text, begin)
    except JSONFault:
        named = _NAME_OF_CALL.search(text)
        return _BEGINNING.match(text) is not None or (
            named is not None and _ARGUMENTS_OF_CALL.search(text, named.end()) is not None
        )
    first = value[0] if isinstance(value, list) and value else value
    return (
        isinstance(first, dict)
        and isinstance(first.get("name", first.get("function")), str | dict)
        and not first.keys().isdisjoint(("arguments", "parameters", "function"))
    )


# --- reading


def _only_value(text: str) -> Any:
    begin = skip_space(text, 0)
    if begin == len(text):
        raise CallFault('this call is empty: it must be a JSON object with "name" and "arguments"')
    value, end = read_value(text, begin)
    behind = skip_space(text, end)
    if behind < len(text):
        raise JSONFault("something stands behind its end", behind)
    return value


def _request_of(value: Any) -> ToolRequest:
    if isinstance(value, list):
        what = "an empty list" if not value else "a list"
        raise CallFault(f'a call is one JSON object with "name" and "arguments", not {what}')
    if not isinstance(value, dict):
        raise CallFault('a call is one JSON object with "name" and "arguments"')
    inner = value.get("function")
    call = inner if isinstance(inner, dict) else value
    name = call.get("name", inner)
    if not isinstance(name, str) or not name:
        raise CallFault('this call has no "name" (a string): it says which tool to call')
    written = next((key for key in ("arguments", "parameters") if key in call), "arguments")
    arguments = call.get(written)
    if isinstance(arguments, str):  # JSON within JSON, as some models have it
        text = arguments
        try:
            arguments = _only_value(text) if text.strip() else {}
        except JSONFault as fault:
            place = where(text, fault.offset)
            raise CallFault(f'"{written}" is not valid JSON: {fault.message}, at {place}') from None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise CallFault(f'"{written}" must be a JSON object, with a value for each argument by its name')
    written_id = value.get("id", value.get("call_id"))
    return ToolRequest(name, arguments, written_id if isinstance(written_id, str) else "")


def _read_named(text: str, at: int) -> tuple[ToolRequest, int]:
    behind = text.find(_ARGUMENTS, at)
    if behind < 0:
        raise CallFault(f"this call has no {_ARGUMENTS} between the tool's name and its arguments")
    name, _, call_id = text[at:behind].partition(_ID)
    value, end = read_value(text, behind + len(_ARGUMENTS))
    if not name.strip():
        raise CallFault(f"this call has no name before {_ARGUMENTS}")
    if not isinstance(value, dict):
        raise CallFault(f"a JSON object must stand behind {_ARGUMENTS}, with a value for each argument by its name")
    return ToolRequest(name.strip(), value, call_id.strip()), end
