"""From what a session reports to the text that a model is shown."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Literal

from midstream.sandbox.conversation import QUOTAS, Conversation, Ending, Finished, death, quota_message
from midstream.sandbox.text import cut_middle
from midstream.types import ExecutionError, ExecutionResult, Media, ToolCall

ErrorStyle = Literal["repr", "traceback"]

_AFTER_ROLLBACK = "What this block did is undone: all names and files are as they were before it."
_AFTER_DEATH = "What this block did is lost."
_AFTER_DEATH_WITH_PAST = "What this block did is lost; the earlier blocks will be run again before the next one."


def result_of(
    conversation: Conversation,
    finished: Finished,
    *,
    error_style: ErrorStyle,
    notice: str = "",
    has_past: bool,
    rolled_back: bool = False,
    no_checkpoint: str | None = None,
) -> ExecutionResult:
    """The result of a block.

    ``has_past``: there are blocks that a new interpreter would run again. ``rolled_back``: none is needed, as
    the old one is there as it was before the block.
    """
    error, shown = finished.error, finished.shown_error
    if not finished.alive:
        after = _AFTER_ROLLBACK if rolled_back else _AFTER_DEATH_WITH_PAST if has_past else _AFTER_DEATH
        error = ExecutionError("Killed", f"{_cause(conversation, finished)}. {after}")
        shown = f"{error.type}: {error.message}"
    elif error is not None and error_style == "traceback" and error.traceback:
        shown = error.traceback
    over_quota = conversation.over_quota if finished.alive else None
    if over_quota is not None:
        told = f"[{quota_message(over_quota, conversation.limits)}: remove some before you write more.]"
        told = told[:1] + told[1].upper() + told[2:]
        text_before = f"{notice}\n{told}" if notice else told
    else:
        text_before = notice
    stopped = finished.ending in (Ending.INTERRUPTED, Ending.KILLED)
    timed_out = stopped and finished.breached == "wall_time"
    if finished.ending is Ending.INTERRUPTED and timed_out and error is not None:
        error = replace(error, type="Timeout")
    return compose(
        stdout=finished.stdout,
        value=finished.value,
        error=error,
        shown_error=shown,
        maximum_characters=conversation.limits.output_characters,
        truncated=finished.truncated,
        duration=conversation.seconds_in_sandbox(time.monotonic()),
        timed_out=timed_out,
        state_lost=bool(notice) or not (finished.alive or rolled_back),
        rolled_back=rolled_back,
        no_checkpoint=no_checkpoint,
        breached=finished.breached or over_quota,
        cpu_time=conversation.cpu_time,
        media=finished.images,
        tool_calls=tuple(conversation.tool_calls),
        notice=text_before,
    )


def _cause(conversation: Conversation, finished: Finished) -> str:
    """In words, what ended an interpreter."""
    if finished.ending is Ending.KILLED and finished.breached in QUOTAS:
        return f"{quota_message(finished.breached, conversation.limits)}, as they did after the block before"
    if finished.ending is Ending.KILLED and finished.breached == "block_cpu_time":
        seconds = conversation.limits.block_cpu_time
        return f"the code used more than {seconds:g} seconds of processor time and could not be interrupted"
    if finished.ending is Ending.KILLED:
        seconds = conversation.limits.wall_time
        return f"the code ran longer than {seconds:g} seconds and could not be interrupted"
    if finished.ending is Ending.VIOLATION:
        return "the code interfered with the interpreter's connection to the outside"
    return f"the interpreter {death(finished.exit_status, finished.breached)}"


def compose(
    *,
    stdout: str = "",
    value: str | None = None,
    error: ExecutionError | None = None,
    shown_error: str = "",
    maximum_characters: int,
    truncated: bool = False,
    duration: float = 0.0,
    timed_out: bool = False,
    state_lost: bool = False,
    rolled_back: bool = False,
    no_checkpoint: str | None = None,
    breached: str | None = None,
    cpu_time: float | None = None,
    media: tuple[Media, ...] = (),
    tool_calls: tuple[ToolCall, ...] = (),
    notice: str = "",
) -> ExecutionResult:
    """Put a result together: output first, then the value or the error on a line of its own.

    ``notice`` is a word of the library's own and comes before all.
    """
    text = stdout
    for part in (value, shown_error if error is not None else None):
        if part is not None:
            if text and not text.endswith("\n"):
                text += "\n"
            text += part
    text = text.rstrip("\n")
    shown = cut_middle(text, maximum_characters)
    cut, text = shown is not text, shown
    if notice:
        text = f"{notice}\n{text}".rstrip("\n")
    return ExecutionResult(
        text=text,
        stdout=stdout,
        value=value,
        error=error,
        duration=duration,
        timed_out=timed_out,
        state_lost=state_lost,
        rolled_back=rolled_back,
        no_checkpoint=no_checkpoint,
        truncated=truncated or cut,
        breached=breached or ("output_characters" if truncated or cut else None),
        cpu_time=cpu_time,
        media=media,
        tool_calls=tool_calls,
    )
