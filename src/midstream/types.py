"""The values that the rooms of midstream pass to one another: prompts in, trajectories out."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal, get_args

from midstream import checks

LogprobKind = Literal["raw", "processed"]
"""``raw``: under the model as it is. ``processed``: after temperature and filters."""

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Media:
    """An image or another non-text part of a prompt or a result.

    ``mime`` is its media type (``image/png``), ``data`` its bytes.
    """

    mime: str
    data: bytes

    def __repr__(self) -> str:
        return f"Media({self.mime!r}, {len(self.data)} bytes)"


IMAGE_SIGNATURES: Mapping[str, bytes] = {
    "image/png": b"\x89PNG\r\n\x1a\n",
    "image/jpeg": b"\xff\xd8\xff",
    "image/gif": b"GIF8",
    "image/webp": b"RIFF",
}
"""The media types of images that code may show, and what the bytes of each begin with."""


class StopKind(enum.StrEnum):
    """The closed list of reasons for which a row stops."""

    END_OF_SEQUENCE = "end_of_sequence"
    STOP_STRING = "stop_string"
    STOP_ID = "stop_id"
    LENGTH = "length"
    TOOL_CALL_LIMIT = "tool_call_limit"
    TIME_LIMIT = "time_limit"
    SANDBOX_FAILURE = "sandbox_failure"
    ENGINE_FAILURE = "engine_failure"
    CANCELLED = "cancelled"
    PAUSED = "paused"


@dataclass(frozen=True, slots=True)
class StopReason:
    """Why a row stopped.

    ``detail`` says more: the stop string; the stop id or EOS id in decimal; for ``LENGTH`` one of
    ``new_tokens``, ``total_tokens``, ``no_room_for_result`` and ``engine`` (a limit of the engine's own);
    for failures, the message.
    """

    kind: StopKind
    detail: str = ""

    @property
    def finished(self) -> bool:
        """Whether the model itself ended the row (EOS, a stop string, a stop id)."""
        return self.kind in (StopKind.END_OF_SEQUENCE, StopKind.STOP_STRING, StopKind.STOP_ID)

    @property
    def resumable(self) -> bool:
        """Whether a later call may go on from here."""
        return self.kind is StopKind.PAUSED

    def __str__(self) -> str:
        return f"{self.kind.value}: {self.detail}" if self.detail else self.kind.value


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds one row.

    Lengths are counts of token ids, times are seconds. ``None`` means no bound of its own (the
    engine's context always bounds the total).

    - ``max_new_tokens``: ids after the prompt; injected ones count unless ``count_injected`` is off.
    - ``max_total_tokens``: prompt, generated and injected ids together.
    - ``max_tool_calls``: blocks that are run. A block beyond it is answered with a result that says
      so (``at_tool_call_limit="tell"``), or ends the row (``"stop"``).
    - ``max_result_tokens``: ids of one result, its tags included; longer ones are cut in the middle.
    - ``max_result_characters``: what is looked at before a result is tokenised at all.
    - ``reserve_tokens``: room that a result leaves for the model to go on.
    - ``time_limit``: wall time of the row, waiting for code included.
    - ``stop_strings``, ``stop_ids``: end the row where the model writes them.
    - ``ignore_eos``: go on past end-of-sequence ids, to the length limits (for benchmarks).
    """

    max_new_tokens: int | None = None
    max_total_tokens: int | None = None
    max_tool_calls: int | None = None
    at_tool_call_limit: Literal["tell", "stop"] = "tell"
    max_result_tokens: int = 1024
    max_result_characters: int = 32_768
    reserve_tokens: int = 0
    count_injected: bool = True
    time_limit: float | None = None
    stop_strings: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name, (least, optional) in _COUNTS.items():
            count = checks.integer(f"Limits.{name}", getattr(self, name), least, optional=optional)
            object.__setattr__(self, name, count)
        if self.time_limit is not None:
            wanted = "must be a number of seconds over 0, or None"
            seconds = checks.number("Limits.time_limit", self.time_limit, lambda value: value > 0, wanted)
            object.__setattr__(self, "time_limit", seconds)
        checks.require(
            self.at_tool_call_limit in ("tell", "stop"),
            "Limits.at_tool_call_limit",
            self.at_tool_call_limit,
            "must be 'tell' or 'stop'",
        )
        checks.flag("Limits.count_injected", self.count_injected)
        checks.flag("Limits.ignore_eos", self.ignore_eos)
        stop_strings = checks.items("Limits.stop_strings", self.stop_strings, "strings")
        for text in stop_strings:
            fits = isinstance(text, str) and text != ""
            checks.require(fits, "Limits.stop_strings", stop_strings, "must hold non-empty strings")
        object.__setattr__(self, "stop_strings", stop_strings)
        stop_ids = [
            checks.integer("Limits.stop_ids[]", item, 0)
            for item in checks.items("Limits.stop_ids", self.stop_ids, "token ids")
        ]
        object.__setattr__(self, "stop_ids", tuple(stop_ids))


# The least that each may be, and whether it may be None.
_COUNTS = {
    "max_new_tokens": (1, True),
    "max_total_tokens": (1, True),
    "max_tool_calls": (0, True),
    "max_result_tokens": (1, False),
    "max_result_characters": (1, False),
    "reserve_tokens": (0, False),
}


@dataclass(frozen=True, slots=True)
class Sampling:
    """How ids are drawn from the model's distribution.

    ``temperature=0`` is greedy. Filters are applied after the temperature, in the order top-k, top-p,
    min-p, as Hugging Face and vLLM do. ``top_k=0``, ``top_p=1`` and ``min_p=0`` are off.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for name, (fits, wanted) in _RANGES.items():
            value = checks.number(f"Sampling.{name}", getattr(self, name), fits, wanted)
            object.__setattr__(self, name, value)
        object.__setattr__(self, "top_k", checks.integer("Sampling.top_k", self.top_k, 0))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


_RANGES: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda value: value >= 0, "must be a number of at least 0 (greedy)"),
    "top_p": (lambda value: 0 < value <= 1, "must be a number over 0 and at most 1 (off)"),
    "min_p": (lambda value: 0 <= value < 1, "must be a number from 0 (off) to under 1"),
}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat prompt, rendered through the model's own chat template."""

    role: Role
    content: str

    def __post_init__(self) -> None:
        for name in ("role", "content"):
            checks.instance(f"Prompt.messages[].{name}", getattr(self, name), str)
        known = self.role in get_args(Role)
        checks.require(known, "Prompt.messages[].role", self.role, "must be 'system', 'user', 'assistant' or 'tool'")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a row starts from: exactly one of ``ids``, ``text`` and ``messages``.

    - ``ids``: token ids; used as they are.
    - ``text``: encoded once, as the tokenizer encodes a prompt (special tokens included).
    - ``messages``: rendered once through the tokenizer's chat template, with a generation prompt.
    - ``id``: names the prompt in records and keys its sampling noise; by default its place in the batch.
    - ``group``: prompts (or samples) that belong together, such as for GRPO; by default the id.
    - ``metadata``: any JSON; carried to rewards, tools and records, never shown to the model.
    - ``seed``: of this prompt's sampling and sandbox; by default the generator's.
    - ``limits``: in place of the generator's.
    - ``media``: images that belong to the prompt, for engines that take them.
    - ``open_block``: the prompt ends inside an open block (a prefilled answer): what follows its last
      start tag is the beginning of the block's code.
    """

    ids: tuple[int, ...] | None = None
    text: str | None = None
    messages: tuple[Message, ...] | None = None
    id: str | None = None
    group: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    limits: Limits | None = None
    media: tuple[Media, ...] = ()
    open_block: bool = False

    def __post_init__(self) -> None:
        given = [name for name in ("ids", "text", "messages") if getattr(self, name) is not None]
        checks.require(len(given) == 1, "Prompt", given, "give exactly one of ids, text and messages")
        if self.ids is not None:
            object.__setattr__(self, "ids", checks.token_ids("Prompt.ids", self.ids))
        for name in ("text", "id", "group"):
            checks.instance(f"Prompt.{name}", getattr(self, name), str, optional=True)
        if self.messages is not None:
            messages = checks.items("Prompt.messages", self.messages, "messages")
            object.__setattr__(self, "messages", tuple(_message(item) for item in messages))
            checks.require(len(messages) > 0, "Prompt.messages", self.messages, "must not be empty")
        checks.instance("Prompt.metadata", self.metadata, Mapping)
        checks.json_value("Prompt.metadata", self.metadata)
        object.__setattr__(self, "seed", checks.integer("Prompt.seed", self.seed, optional=True))
        checks.instance("Prompt.limits", self.limits, Limits, optional=True)
        object.__setattr__(self, "media", checks.items("Prompt.media", self.media, "Media"))
        for item in self.media:
            checks.instance("Prompt.media[]", item, Media)
        checks.flag("Prompt.open_block", self.open_block)


def _message(item: Message | Mapping[str, str]) -> Message:
    if isinstance(item, Message):
        return item
    checks.instance("Prompt.messages[]", item, Mapping)
    unknown = sorted(map(str, set(item) - {"role", "content"}))
    checks.require(not unknown, "Prompt.messages", unknown, "a message has just 'role' and 'content'")
    return Message(role=item.get("role"), content=item.get("content"))  # type: ignore[arg-type]  # it looks itself


@dataclass(frozen=True, slots=True)
class ExecutionError:
    """What went wrong in a block, as its code would see it.

    ``type`` is the exception's class name (``ZeroDivisionError``; ``Timeout`` and ``Killed`` where no
    exception says it), ``message`` its text, ``line`` the block's line (from 1) that was running,
    ``traceback`` a short traceback of the block's own frames. ``base``: of a tool's exception whose type is not
    built in, the nearest type that is.
    """

    type: str
    message: str
    line: int | None = None
    traceback: str = ""
    base: str = ""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool by a block.

    ``arguments`` and ``keyword_arguments`` as they crossed (JSON; what it lacks is typed as
    :mod:`midstream.crossing` says, whose ``from_json`` makes Python's values of it), then the value or the error.
    ``started`` is in seconds from the start of the block, ``duration`` in seconds. ``cached``: another call had
    the value found; ``batched``: calls that were answered at once with it, itself included.
    """

    name: str
    arguments: Sequence[Any] = ()
    keyword_arguments: Mapping[str, Any] = field(default_factory=dict)
    value: Any = None
    error: ExecutionError | None = None
    started: float = 0.0
    duration: float = 0.0
    cached: bool = False
    batched: int = 1


@dataclass(frozen=True, slots=True)
class ToolAnswer:
    """What a tool gave to one call, and how: a ``value`` in JSON, as :func:`midstream.crossing.to_json` makes it,
    or an ``error``. ``cached`` and ``batched`` as in a :class:`ToolCall`.
    """

    value: Any = None
    error: ExecutionError | None = None
    cached: bool = False
    batched: int = 1


@dataclass(frozen=True, slots=True)
class ExecutionResult:
    """What running one block gave. Never raised: whatever the code did is in here.

    - ``text``: all that the model is shown: what was printed (stdout and stderr in order), then the
      value or the error on a line of its own, newlines at the very end dropped.
    - ``stdout``: what was printed alone; ``value``: the last expression's value as text, or None.
    - ``error``: None, or what went wrong.
    - ``duration``: wall seconds in the sandbox. ``cpu_time``: seconds of processor time, all threads together;
      None where they are not known. ``timed_out``: the wall-time limit ended it.
    - ``state_lost``: names that earlier blocks made are gone or may differ.
    - ``rolled_back``: the block was killed, and the session goes on from before it, names and files.
      ``no_checkpoint``: why there was no way back from this block though one was asked for, or None.
    - ``truncated``: output was cut before it came here. ``breached``: the limit that was hit, by its
      name in :class:`SandboxLimits` (``wall_time``, ``memory``, …), or None.
    - ``media``: images that the code showed. ``tool_calls``: calls of tools, in order.
    """

    text: str
    stdout: str = ""
    value: str | None = None
    error: ExecutionError | None = None
    duration: float = 0.0
    timed_out: bool = False
    state_lost: bool = False
    rolled_back: bool = False
    no_checkpoint: str | None = None
    truncated: bool = False
    breached: str | None = None
    media: tuple[Media, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    cpu_time: float | None = None


CallKind = Literal["code", "json", "named", "builtin"]
"""How what a model wrote is to be taken: Python for the sandbox, or one of the forms of a tool's call."""


@dataclass(frozen=True, slots=True)
class Call:
    """What a closed block of a row asks for: its code, or a tool's call, and where it stands.

    ``index`` counts the row's calls from 0. ``position`` is the count of the trajectory's ids, prompt
    included, up to and with the token that completed the end tag; of a call that waits for the end of its
    turn, up to and with the token that ended the turn. ``lookahead`` is what that token holds
    after the end tag. ``declined``: why it is not to be run ("" if it is): then its result is the
    library's own word to the model. ``kind``: what ``code`` is; of a tool's call it is that call's own text.
    ``form``: the block's markup, by its place in :attr:`midstream.Markup.forms`.
    """

    index: int
    code: str
    position: int
    lookahead: str = ""
    declined: str = ""
    kind: CallKind = "code"
    form: int = 0


@dataclass(frozen=True, slots=True)
class CallRecord:
    """A block and what became of it.

    ``injected`` is the text that stands in the trajectory for it, after the lookahead ("" where nothing
    was injected); ``cut_characters`` says how many characters of the result its token budget left out.
    ``result`` is None while the block waits for its result, and where the row ended before it.
    """

    call: Call
    result: ExecutionResult | None = None
    injected: str = ""
    cut_characters: int = 0


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of ids with one origin: ``generated`` by the engine, or ``injected`` here.

    ``ids``, ``logprobs`` and ``weight_versions`` have equal lengths. Injected ids have logprob 0.0 and
    weight version -1. ``text`` is what the ids decode to.
    """

    origin: Literal["generated", "injected"]
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    weight_versions: tuple[int, ...]
    text: str

    def __post_init__(self) -> None:
        lengths = {len(self.ids), len(self.logprobs), len(self.weight_versions)}
        checks.require(
            len(lengths) == 1, "Segment", sorted(lengths), "ids, logprobs and weight_versions differ in length"
        )


@dataclass(frozen=True, slots=True)
class ForkPoint:
    """Where a row was copied: its first ``length`` ids, the prompt's included, are those of ``sample``."""

    sample: int
    length: int


@dataclass(frozen=True, slots=True)
class WeightChange:
    """The weights became those of ``version`` when the row held ``length`` ids, the prompt's included.

    ``cache_kept``: later ids were sampled over what older weights had computed of those before; else it was
    computed anew.
    """

    length: int
    version: int
    cache_kept: bool


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A row's prompt and everything after it, with what a trainer needs.

    ``segments`` alternate freely between generated and injected; ``calls`` are the row's blocks in
    order. ``sample`` counts the samples of one prompt from 0; ``seed`` keys the prompt's sampling noise and
    its sessions. ``discarded`` counts ids that the engine
    returned after a closing token and that were left out. ``logprob_kind`` says what the logprobs are.
    ``duration`` is in seconds. ``reward`` is what the reward function said, and ``reward_error`` why it could
    not. ``fit_for_training`` is off where an engine could not give ids or logprobs (text-only servers).
    ``lineage``: of a row that was forked from another, where; the oldest ancestor comes first. Ids before the
    last of these points are in the trajectory of that sample too, sampled once. ``weight_changes``: those that came
    while the row was open, in order.
    """

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    segments: tuple[Segment, ...]
    calls: tuple[CallRecord, ...]
    stop: StopReason
    sample: int = 0
    seed: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    logprob_kind: LogprobKind = "raw"
    discarded: int = 0
    duration: float = 0.0
    reward: float | None = None
    reward_error: str = ""
    fit_for_training: bool = True
    lineage: tuple[ForkPoint, ...] = ()
    weight_changes: tuple[WeightChange, ...] = ()

    @property
    def ids(self) -> list[int]:
        """All ids, the prompt's first."""
        return [*self.prompt_ids, *(i for segment in self.segments for i in segment.ids)]

    @property
    def mask(self) -> list[int]:
        """1 on generated ids, 0 on the prompt's and injected ones."""
        mask = [0] * len(self.prompt_ids)
        for segment in self.segments:
            mask.extend([int(segment.origin == "generated")] * len(segment.ids))
        return mask

    @property
    def logprobs(self) -> list[float]:
        """The engine's value on generated ids, 0.0 elsewhere."""
        return [0.0] * len(self.prompt_ids) + [x for segment in self.segments for x in segment.logprobs]

    @property
    def weight_versions(self) -> list[int]:
        """The version of the weights that sampled each generated id, -1 elsewhere."""
        return [-1] * len(self.prompt_ids) + [x for segment in self.segments for x in segment.weight_versions]

    @property
    def total_length(self) -> int:
        return len(self.prompt_ids) + self.generation_length

    @property
    def generation_length(self) -> int:
        """Ids after the prompt, injected ones included."""
        return sum(len(segment.ids) for segment in self.segments)

    @property
    def text(self) -> str:
        """What stands after the prompt."""
        return "".join(segment.text for segment in self.segments)

    @property
    def truncated(self) -> bool:
        """Whether something other than the model ended the row."""
        return not self.stop.finished

    def verify(self, tokenizer: Any, **row: Any) -> list[Any]:
        """Every rule that the trajectory breaks, as :class:`~midstream.records.Violation`; none for a sound one.

        - ``tokenizer``: the one that it was made with. What it was made with besides goes by the names of
          :class:`~midstream.row.Row`: ``markup``, ``limits``, ``eos_ids``, ``context_length``.
        - ``model``: a model of transformers to hold the logprobs against
          (:func:`midstream.teacher_forcing.compare`), ``tolerance``: by how much they may differ.

        Raises :class:`~midstream.errors.RecordError` where the trajectory cannot be recorded.
        """
        # Above this file in the order of imports, and wanted by nothing else in it.
        verify: Callable[..., list[Any]] = import_module("midstream.verifying").verify_trajectory
        return verify(self, tokenizer, **row)
