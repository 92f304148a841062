"""What a session remembers of its blocks, to rebuild a lost interpreter from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from midstream import checks
from midstream.errors import ConfigurationError
from midstream.sandbox.conversation import ToolRequested
from midstream.sandbox.drivers import Answered
from midstream.types import ExecutionError, ExecutionResult, ToolCall

_ADDRESS = re.compile(r"\bat 0x[0-9a-f]+")


@dataclass(frozen=True, slots=True)
class PastBlock:
    """A block that ran, and what is needed to run it again. ``repeatable``: it ran to its end.

    ``file``: instead of a block, a file (its path and its content) that the host put there.
    """

    code: str
    text: str
    tool_calls: tuple[ToolCall, ...]
    repeatable: bool
    file: tuple[str, bytes] | None = None

    @classmethod
    def of(cls, code: str, result: ExecutionResult) -> PastBlock:
        # Where code was interrupted is a matter of chance.
        interrupted = result.timed_out or result.breached in ("block_cpu_time", "cpu_time")
        interrupted = interrupted or (result.error is not None and result.error.type == "OutOfSpace")
        return cls(code, comparable(result.text), result.tool_calls, repeatable=not interrupted)

    @classmethod
    def of_file(cls, path: str, data: bytes) -> PastBlock:
        return cls("", "", (), repeatable=True, file=(path, data))


History = Sequence[tuple[str, ExecutionResult] | PastBlock]
"""Blocks that ran before, each with its result; or files that were put there, between them."""


def past_blocks(history: History) -> list[PastBlock]:
    """Blocks with their results as they are remembered, without those that were undone."""
    past = []
    for place, item in enumerate(checks.items("history", history, "blocks")):
        if isinstance(item, PastBlock):
            past.append(item)
            continue
        pair = isinstance(item, tuple | list) and len(item) == 2
        if not pair or not isinstance(item[0], str) or not isinstance(item[1], ExecutionResult):
            raise ConfigurationError(f"history[{place}]={item!r}: must be a block's code and its ExecutionResult")
        if not item[1].rolled_back:
            past.append(PastBlock.of(item[0], item[1]))
    return past


def comparable(text: str) -> str:
    """A result's text without what differs from process to process though the state is the same."""
    return _ADDRESS.sub("at 0x", text)


@dataclass(slots=True)
class RecordedAnswers:
    """Answers tool calls from those of an earlier run, in order.

    A call that is not the recorded one means that the run has gone another way: ``diverged`` is set.
    Beyond the record, ``then_live`` says whether the tool is called or the code gets an error.
    """

    calls: tuple[ToolCall, ...]
    then_live: bool = False
    diverged: bool = False
    _used: int = field(default=0, init=False)

    def __call__(self, request: ToolRequested) -> Answered | None:
        call = self.calls[self._used] if self._used < len(self.calls) else None
        if call is not None and not self.diverged:
            self._used += 1
            same = (call.name, list(call.arguments), dict(call.keyword_arguments)) == (
                request.name,
                request.arguments,
                request.keyword_arguments,
            )
            if same:
                return Answered(call.value, call.error)
        if self.then_live:
            return None
        self.diverged = True
        return Answered(error=ExecutionError("RuntimeError", f"{request.name}() has no recorded result"))


def live(_request: ToolRequested) -> Answered | None:
    """Every call goes to its tool."""
    return None
