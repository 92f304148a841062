"""The parts of a record, schema 1: JSON objects whose fields are all present and all known.

They are apart from :mod:`midstream.types` on purpose: those may change, a schema never does.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from midstream.call_text import Holds
from midstream.markup import Payload, Slot
from midstream.types import CallKind, Role, StopKind


class Entry(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A JSON object whose fields are all present and all known."""


class MediaEntry(Entry):
    """``data`` is in base64."""

    mime: str
    data: bytes


class LimitsEntry(Entry):
    max_new_tokens: int | None
    max_total_tokens: int | None
    max_tool_calls: int | None
    at_tool_call_limit: Literal["tell", "stop"]
    max_result_tokens: int
    max_result_characters: int
    reserve_tokens: int
    count_injected: bool
    time_limit: float | None
    stop_strings: list[str]
    stop_ids: list[int]
    ignore_eos: bool


class MessageEntry(Entry):
    role: Role
    content: str


class PromptEntry(Entry):
    """The prompt as the caller gave it: one of ``ids``, ``text`` and ``messages``."""

    id: str | None
    group: str | None
    ids: list[int] | None
    text: str | None
    messages: list[MessageEntry] | None
    metadata: dict[str, Any]
    seed: int | None
    limits: LimitsEntry | None
    media: list[MediaEntry]
    open_block: bool


class SamplingEntry(Entry):
    temperature: float
    top_k: int
    top_p: float
    min_p: float


class SegmentEntry(Entry):
    """``ids``, ``logprobs`` and ``weight_versions`` have equal lengths in a sound record."""

    origin: Literal["generated", "injected"]
    ids: list[int]
    logprobs: list[float]
    weight_versions: list[int]
    text: str


class CallEntry(Entry):
    index: int
    code: str
    position: int
    lookahead: str
    declined: str
    kind: CallKind = "code"
    form: int = 0


class ErrorEntry(Entry):
    type: str
    message: str
    line: int | None
    traceback: str
    base: str = ""


class ToolCallEntry(Entry):
    """Values that JSON lacks stand here typed, as :mod:`midstream.crossing` writes them."""

    name: str
    arguments: list[Any]
    keyword_arguments: dict[str, Any]
    value: Any
    error: ErrorEntry | None
    started: float
    duration: float
    cached: bool = False
    batched: int = 1


class ResultEntry(Entry):
    text: str
    stdout: str
    value: str | None
    error: ErrorEntry | None
    duration: float
    timed_out: bool
    state_lost: bool
    rolled_back: bool
    no_checkpoint: str | None
    truncated: bool
    breached: str | None
    media: list[MediaEntry]
    tool_calls: list[ToolCallEntry]
    cpu_time: float | None = None


class BlockEntry(Entry):
    """A block and what became of it, as :class:`midstream.types.CallRecord`."""

    call: CallEntry
    result: ResultEntry | None
    injected: str
    cut_characters: int


class StopEntry(Entry):
    kind: StopKind
    detail: str


class ForkPointEntry(Entry):
    """The record's first ``length`` ids are those of ``sample``, from which it was forked there."""

    sample: int
    length: int


class WeightChangeEntry(Entry):
    """At ``length`` ids the weights became those of ``version``; ``cache_kept`` is whether what older ones had computed
    of these ids was gone on from."""

    length: int
    version: int
    cache_kept: bool


class SpecialEntry(Entry):
    """A special token of a markup, by its text."""

    text: str
    required: bool = True


class FrameEntry(Entry):
    """Pieces of a result: texts, special tokens, and ``["name"]`` or ``["id"]`` where the call's own stands."""

    before: list[str | SpecialEntry | Slot]
    after: list[str | SpecialEntry | Slot]


class TurnEntry(Entry):
    before: list[str | SpecialEntry]
    after: list[str | SpecialEntry]


class MarkupEntry(Entry):
    start: str
    end: str | None
    inline: FrameEntry | None
    block: FrameEntry
    at_line_start: bool
    closing_tokens: list[str]
    inject_empty: bool
    at_turn_start: bool = False
    holds: Holds = "code"
    payload: Payload = "text"
    turn: TurnEntry | None = None
    others: list[MarkupEntry] = []
