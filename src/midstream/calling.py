"""Calls of tools that a model writes as JSON: from the call's text to its result.

They run on the host, not in the sandbox, through the same tools as the calls that code makes, with the same
limits and the same record. Whatever is wrong with one is its result: the model is told, and the row goes on.
"""

from __future__ import annotations

import difflib
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from midstream.call_text import CallFault, read_call
from midstream.crossing import CrossingError, images_in, plain_json
from midstream.crossing.values import LONGEST_ANSWER
from midstream.tools import RowTools, ToolSet
from midstream.types import Call, ExecutionError, ExecutionResult, ToolCall

_MOST_NAMES = 20
"""Names of tools that a model is told of where it asked for one that there is not."""

_MOST_CHARACTERS = 64


async def run_tool_call(call: Call, tools: RowTools, known: ToolSet) -> ExecutionResult:
    """What a call of a tool gave. Raises only what the machinery itself fails with."""
    if call.declined:
        return ExecutionResult(call.declined)
    began = time.monotonic()
    try:
        request = read_call(call.kind, call.code)
    except CallFault as fault:
        return _failed(ExecutionError("InvalidCall", str(fault)), time.monotonic() - began)
    if request.name not in known:
        error = ExecutionError("UnknownTool", _unknown(request.name, known.names))
        return _failed(error, time.monotonic() - began)
    made = await tools.call_json(request.name, request.arguments)
    if made.error is not None:
        return _failed(made.error, made.duration, made)
    try:
        if _is_too_long(made.value):
            error = ExecutionError("ValueError", f"{made.name}() returned more than {LONGEST_ANSWER} bytes")
            return _failed(error, made.duration, replace(made, value=None, error=error))
        text, images = _shown(made), tuple(images_in(made.value))
    except CrossingError as fault:  # it would be larger unpacked, say: what a tool returns is the tool's
        error = ExecutionError("TypeError", f"{made.name}() returned what cannot be shown: {fault}")
        return _failed(error, made.duration, replace(made, value=None, error=error))
    return ExecutionResult(text, value=text, duration=made.duration, tool_calls=(made,), media=images)


def _failed(error: ExecutionError, duration: float, made: ToolCall | None = None) -> ExecutionResult:
    # What is wrong with the call itself is told without a type: the model did not ask for an exception.
    text = f"Error: {error.message}" if made is None else f"Error: {error.type}: {error.message}".rstrip(" :")
    return ExecutionResult(text, error=error, duration=duration, tool_calls=() if made is None else (made,))


def _is_too_long(value: Any) -> bool:
    """Whether it has more JSON than an answer to code may have."""
    return (isinstance(value, str) and len(value) > LONGEST_ANSWER) or len(json.dumps(value)) > LONGEST_ANSWER


def _shown(made: ToolCall) -> str:
    """A text as it is, any other value as JSON."""
    plain = plain_json(made.value)
    return plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)


def _unknown(name: str, names: Sequence[str]) -> str:
    asked = name if len(name) <= _MOST_CHARACTERS else f"{name[:_MOST_CHARACTERS]}…"
    if not names:
        return f"there is no tool {asked!r}; there are no tools at all"
    near = difflib.get_close_matches(name[:_MOST_CHARACTERS], names, n=3)
    if near:
        return f"there is no tool {asked!r}; did you mean {' or '.join(near)}?"
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return f"there is no tool {asked!r}; the tools are {', '.join(names[:_MOST_NAMES])}{more}"
