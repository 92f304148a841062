"""Calls of tools that code on another machine makes, answered where the caller is."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from midstream.crossing import CrossingError, describe_exception, to_json
from midstream.distributed.messages import Asked
from midstream.errors import MidstreamError
from midstream.sandbox.drivers import CallTool, called, in_time
from midstream.types import ExecutionError, ToolAnswer


@dataclass(frozen=True, slots=True)
class ToolRequest:
    """Do: call a tool."""

    name: str
    arguments: list[Any]
    keyword_arguments: dict[str, Any]


@dataclass(slots=True)
class AnsweredCalls:
    """Those of the running block: made again elsewhere, they are answered alike."""

    calls: list[tuple[Any, ToolAnswer]] = field(default_factory=list)
    place: int = 0

    def known(self, asked: Asked) -> ToolAnswer | None:
        if self.place >= len(self.calls):
            return None
        made, answer = self.calls[self.place]
        if made != (asked.name, asked.arguments, dict(asked.keyword_arguments)):
            del self.calls[self.place :]  # it has gone another way
            return None
        self.place += 1
        return answer

    def learn(self, asked: Asked, answer: ToolAnswer) -> None:
        self.calls.append(((asked.name, asked.arguments, dict(asked.keyword_arguments)), answer))
        self.place += 1


def answered(call_tool: CallTool, call: ToolRequest, seconds: float | None) -> ToolAnswer | None:
    """What a tool gives; what it raises is the code's to handle, but a MidstreamError is raised here.

    None where it takes longer than so many seconds: its host has told the code so itself by then.
    """
    return in_time(seconds, call.name, lambda: _outcome(call_tool, call))


async def answered_async(call_tool: CallTool, call: ToolRequest, seconds: float | None) -> ToolAnswer | None:
    """The same for asyncio, where a tool may be a coroutine function."""
    try:
        async with asyncio.timeout(seconds) as limit:
            return await _outcome_async(call_tool, call)
    except TimeoutError:
        if not limit.expired():
            raise
        return None


def _outcome(call_tool: CallTool, call: ToolRequest) -> ToolAnswer:
    try:
        return _as_answer(call.name, call_tool(call.name, call.arguments, call.keyword_arguments))
    except MidstreamError:
        raise
    except Exception as error:  # noqa: BLE001  # a tool's exception is the code's to handle
        return ToolAnswer(error=describe_exception(error))


async def _outcome_async(call_tool: CallTool, call: ToolRequest) -> ToolAnswer:
    try:
        return _as_answer(call.name, await called(call_tool, call.name, call.arguments, call.keyword_arguments))
    except MidstreamError:
        raise
    except Exception as error:  # noqa: BLE001  # as above
        return ToolAnswer(error=describe_exception(error))


def _as_answer(name: str, given: Any) -> ToolAnswer:
    if isinstance(given, ToolAnswer):
        return given
    try:
        return ToolAnswer(to_json(given))
    except CrossingError as error:
        return ToolAnswer(error=ExecutionError("TypeError", f"{name}() returned what cannot be passed on: {error}"))
