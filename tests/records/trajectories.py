"""Sound trajectories for tests: rows driven over given ids with given results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import strategies as st

from midstream.markup import CODE_TAGS, FENCED_PYTHON, Frame, Markup, Special
from midstream.records import Record
from midstream.row import Row, RowState
from midstream.types import (
    Call,
    ExecutionError,
    ExecutionResult,
    Limits,
    Media,
    Prompt,
    Sampling,
    StopKind,
    StopReason,
    ToolCall,
)
from tests.vocabularies import tokenizer, vocabulary

SPECIAL_RESULT = Markup(
    start="<code>",
    end="</code>",
    inline=Frame((Special("<result>"),), (Special("</result>"),)),
    block=Frame(("\n", Special("<result>"), "\n"), ("\n", Special("</result>"))),
    closing_tokens=("<|eom|>",),
)
EMPTY_TOO = Markup.tags(inject_empty=True)

Answer = Callable[[Call], ExecutionResult | None]
"""What a block shows; None leaves it waiting, and the row is stopped from outside."""


@dataclass
class Scenario:
    """All that a row is driven by. ``chunks`` are texts (each encoded on its own) and ids."""

    chunks: Sequence[str | int]
    answer: Answer = field(default=lambda call: ExecutionResult(""))
    name: str = "o200k"
    markup: Markup | None = CODE_TAGS
    limits: Limits = field(default_factory=Limits)
    prompt: Prompt = field(default_factory=lambda: Prompt(text="Say it.", id="p"))
    context_length: int | None = None
    eos_ids: frozenset[int] | None = None
    outside: StopReason = field(default_factory=lambda: StopReason(StopKind.PAUSED))
    versions: Sequence[int] = (0,)


def ids_of(scenario: Scenario) -> list[int]:
    ids: list[int] = []
    for chunk in scenario.chunks:
        ids += [chunk] if isinstance(chunk, int) else vocabulary(scenario.name).encode_text(chunk)
    return ids


def drive(scenario: Scenario, provenance: dict[str, Any] | None = None) -> Record:
    """The record of the row that ``scenario`` gives."""
    row = Row(
        scenario.prompt,
        tokenizer(scenario.name),
        scenario.markup,
        scenario.limits,
        context_length=scenario.context_length,
        eos_ids=scenario.eos_ids,
        sample=2,
        seed=2**64 - 1,
        sampling=Sampling(temperature=0.7, top_k=5),
    )
    ids = ids_of(scenario)
    place = 0
    while row.state is not RowState.STOPPED:
        if row.state is RowState.EXECUTING:
            results = [
                ExecutionResult(call.declined) if call.declined else scenario.answer(call) for call in row.pending
            ]
            if any(result is None for result in results):
                row.stop(scenario.outside)
            else:
                row.inject(*[result for result in results if result is not None])
        elif place == len(ids):
            row.stop(scenario.outside)
        else:
            step = ids[place : place + 3]  # several ids at once, as speculative decoding gives them
            logprobs = [-(((place + i) * 37) % 101) / 7 for i in range(len(step))]
            version = scenario.versions[place % len(scenario.versions)]
            place += row.receive(step, logprobs, version).accepted
    trajectory = replace(row.trajectory, duration=0.1 + 0.2, reward=1 / 3)
    return Record.of(
        trajectory,
        tokenizer(scenario.name),
        markup=scenario.markup,
        limits=scenario.limits,
        eos_ids=scenario.eos_ids,
        context_length=scenario.context_length,
        provenance=provenance or {"midstream": "0.1.0"},
    )


RICH_RESULT = ExecutionResult(
    text="out\nZeroDivisionError('x')",
    stdout="out",
    value=None,
    error=ExecutionError("ZeroDivisionError", "x", 3, "Traceback"),
    duration=0.125,
    timed_out=True,
    state_lost=True,
    truncated=True,
    breached="memory",
    media=(Media("image/png", b"\x89PNG\r\n\x00\xff"),),
    tool_calls=(
        ToolCall("search", ("q", [1, {"k": None}]), {"limit": 2**70}, {"hits": [1.5, True]}, None, 0.1, 0.2),
        ToolCall("search", (), {}, None, ExecutionError("KeyError", "'a'"), 1e-9, 5e-324),
    ),
)


def by_code(call: Call) -> ExecutionResult:
    """Silent, short, of several lines, long, or rich, as the code says."""
    if "silent" in call.code or "=" in call.code:
        return ExecutionResult("")
    if "long" in call.code:
        return ExecutionResult("\n".join(f"line {i} of a long output" for i in range(200)))
    if "rich" in call.code:
        return RICH_RESULT
    if "lines" in call.code:
        return ExecutionResult("one\ntwo\n  three")
    return ExecutionResult(f"[{len(call.code)}]")


# --- random ones -----------------------------------------------------------------------------------------

_FRAGMENTS = [
    "<code>", "</code>", "<code>", "</code>", "</code>\n", "</code><", "</code><code>x = 1</code>", "<", ">", "</",
    "co", "```python\n", "\n```", "```", "\n", "\n\n", " ", "x = 3", "silent", "lines", "long", "rich", "1 + 1", "STOP",
    "ST", "OP",
    "<result>", "</result>", "naïve café", "数学", "🙂", "e\u0301", "<|eom|>", "</code>STOP", "the answer is 42.",
]  # fmt: skip

_MARKUPS = {
    "o200k": [CODE_TAGS, FENCED_PYTHON, EMPTY_TOO, None],
    "llama3": [CODE_TAGS, Markup.tags(closing_tokens=("<|eom_id|>", "<|end_of_text|>"))],
    "tagged": [CODE_TAGS, SPECIAL_RESULT, FENCED_PYTHON],
    "mistral3": [CODE_TAGS, FENCED_PYTHON],
    "metaspace": [CODE_TAGS],
    "anthropic": [CODE_TAGS],
}


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    name = draw(st.sampled_from(sorted(_MARKUPS)))
    markup = draw(st.sampled_from(_MARKUPS[name]))
    vocab = vocabulary(name)
    controls = sorted(vocab.eos_ids | {vocab.added_id(text) for text in (markup.closing_tokens if markup else ())})
    any_id = st.integers(0, min(vocab.size, 3000) - 1).filter(lambda i: vocab.piece(i) != b"")
    start, end = (markup.start, markup.end) if markup is not None else ("<code>", "</code>")
    codes = st.sampled_from(["x = 3", "silent", "lines", "long", "rich", "1 + 1", "\nlines\n", "1\n"])
    tails = st.sampled_from(["", "\n", "<", "\n\n", "STOP", f"{start}x = 1{end}", f"{start}1{end}", " and"])
    block = st.tuples(codes, tails).map(lambda pair: f"{start}{pair[0]}{end}{pair[1]}")
    if markup is not None and markup.at_line_start:
        block = st.tuples(codes, tails).map(lambda pair: f"\n{start}{pair[0]}\n{end}{pair[1]}")
    kinds = (
        [block] * 6
        + [st.sampled_from(_FRAGMENTS)] * 4
        + [st.text(max_size=3).map(lambda t: t.replace("\x00", "")), any_id]
    )
    if controls:
        kinds.append(st.sampled_from(controls))
    chunks = draw(st.lists(st.one_of(kinds), min_size=draw(st.sampled_from([0, 4, 10])), max_size=30))
    if draw(st.booleans()):  # as one text: the tokenizer's own way to cut it
        runs: list[str | int] = []
        for chunk in chunks:
            if isinstance(chunk, str) and runs and isinstance(runs[-1], str):
                runs[-1] += chunk
            else:
                runs.append(chunk)
        chunks = runs
    small = st.none() | st.none() | st.integers(1, 200)
    limits = Limits(
        max_new_tokens=draw(small),
        max_total_tokens=draw(st.none() | st.none() | st.integers(30, 300)),
        max_tool_calls=draw(st.none() | st.integers(0, 3)),
        at_tool_call_limit=draw(st.sampled_from(["tell", "stop"])),
        max_result_tokens=draw(st.sampled_from([1, 8, 20, 60, 1024])),
        max_result_characters=draw(st.sampled_from([1, 40, 32_768])),
        reserve_tokens=draw(st.integers(0, 4)),
        count_injected=draw(st.booleans()),
        stop_strings=tuple(draw(st.lists(st.sampled_from(["STOP", "OP", ">S", "</code>", "42."]), max_size=2))),
        stop_ids=tuple(draw(st.lists(st.sampled_from(vocab.encode_text("!the")), max_size=1))),
        ignore_eos=draw(st.booleans()),
    )
    open_block = markup is not None and draw(st.integers(0, 4)) == 0
    text = f"Go: {markup.start}y = 2" if open_block and markup is not None else "Go: "
    waits_at = draw(st.none() | st.none() | st.integers(0, 4))
    return Scenario(
        chunks,
        lambda call: None if call.index == waits_at else by_code(call),
        name,
        markup,
        limits,
        Prompt(ids=tuple(vocab.encode_text(text)), id="p", open_block=open_block),
        context_length=draw(st.none() | st.none() | st.integers(20, 400)),
        eos_ids=frozenset(vocab.encode_text("EOS")[:1]) if draw(st.integers(0, 5)) == 0 else None,
        outside=StopReason(draw(st.sampled_from([StopKind.PAUSED, StopKind.CANCELLED, StopKind.SANDBOX_FAILURE]))),
        versions=(0, 7),
    )
