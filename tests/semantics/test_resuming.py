"""Rule 25: a row is paused at any token, and goes on later or elsewhere as if nothing had happened."""

from __future__ import annotations

from typing import Any

import pytest

from midstream.errors import ProtocolError
from midstream.markup import CODE_TAGS, FENCED_PYTHON, Markup
from midstream.row import Row, RowState
from midstream.types import ExecutionResult, Limits, Prompt, Sampling, StopKind, StopReason, Trajectory
from tests.rows import Answers, drive, new_row
from tests.spoken import spoken
from tests.synthetic import EOM, EOS, Cutter
from tests.vocabularies import vocabulary

PAUSED = StopReason(StopKind.PAUSED)
CALLS = Markup.tags("<|call|>", "<result>", end="<|call|end>", closing_tokens=("<|eom|>",))


def shape(trajectory: Trajectory) -> Any:
    """All of a trajectory but how many ids an engine said in vain, which depends on its chunks."""
    fields = ("prompt", "prompt_ids", "segments", "calls", "stop", "sample", "seed", "sampling", "logprob_kind")
    return [getattr(trajectory, field) for field in fields]


SCENES: dict[str, tuple[list[str | int], Markup, dict[str, Any], dict[str, str]]] = {
    "blocks": (
        ["a", "<co", "de>1</", "code>\n", "b<code>", "x", "</code><", "code>2\n", "</code>\n", "so", EOS],
        CODE_TAGS,
        {},
        {"1": "1", "2\n": "2"},
    ),
    "inside one another": (["<code>1</code><code>x", "y</co", "de>", EOS], CODE_TAGS, {}, {"1": "1"}),
    "characters": ([b"\xf0\x9f", b"\x99\x82<code>\xe6", b"\x95\xb0</code>\xc3", b"\xa9", EOS], CODE_TAGS, {}, {}),
    "stop string behind a block": (
        ["<code>1", "</code>STOP", "never"],
        CODE_TAGS,
        {"stop_strings": ("STOP",)},
        {"1": "1"},
    ),
    "stop string in parts": (["ST", "<code>1</code>S", "TO", "ST", "OP"], CODE_TAGS, {"stop_strings": ("STOP",)}, {}),
    "limit of calls": (
        ["<code>1</code>", "<code>2</code>", "a", "<code>3</code>", EOS],
        CODE_TAGS,
        {"max_tool_calls": 2},
        {"1": "1"},
    ),
    "limit of calls within a token": (
        ["a", "<code>1</code><code>2</code>", "b"],
        CODE_TAGS,
        {"max_tool_calls": 1, "at_tool_call_limit": "stop"},
        {"1": "1"},
    ),
    "several in a token": (["<code>1</code><code>2</code>", "b", EOS], CODE_TAGS, {}, {"2": "2"}),
    "length": (["<code>1</code>", *"abcdefgh"], CODE_TAGS, {"max_new_tokens": 24}, {"1": "1"}),
    "no room": (["a", "<code>1</code>", *"abcdefgh"], CODE_TAGS, {"max_new_tokens": 10}, {"1": "1"}),
    "fences": (["```python\n", "1\n", "``", "`\n", "```python\n", "2\n```", "x"], FENCED_PYTHON, {}, {"1\n": "1"}),
    "closing tokens": (["<|call|>", "1", EOM, "a", "<|call|>", "2", EOM, "b", EOM, EOS], CALLS, {}, {"1": "1"}),
    "ignored eos": (["a<co", EOS, "de>", "<code>", EOS, "1</code>", EOS], CODE_TAGS, {"ignore_eos": True}, {}),
    "stop ids": (["<code>1</code>", "a", EOM, "b"], CODE_TAGS, {"stop_ids": (EOM,)}, {"1": "1"}),
}


def resumed(row: Row, tokenizer: Any, markup: Markup, limits: dict[str, Any]) -> Row:
    return Row.resume(row.trajectory, tokenizer, markup, Limits(**limits))


def branches(row: Row, tokenizer: Any, markup: Markup, limits: dict[str, Any]) -> list[Row]:
    """The row again, by each of the ways in which there may be one more."""
    stopped = row.fork()
    stopped.stop(PAUSED)
    return [resumed(row, tokenizer, markup, limits), resumed(stopped, tokenizer, markup, limits), row.fork()]


def check_every_token(ids: list[int], tokenizer: Any, markup: Markup, limits: dict[str, Any], answers: Answers) -> None:
    whole = drive(new_row(tokenizer, markup=markup, **limits), ids, answers).trajectory
    row = new_row(tokenizer, markup=markup, **limits)
    place = 0
    while row.state is not RowState.STOPPED and place <= len(ids):
        for branch in branches(row, tokenizer, markup, limits):
            assert branch.state is row.state
            assert branch.pending == row.pending
            assert shape(branch.trajectory) == shape(row.trajectory)
            assert shape(drive(branch, ids, answers, place=place).trajectory) == shape(whole), f"resumed at {place}"
        if row.state is RowState.EXECUTING:
            drive(row, [], answers)
        elif place < len(ids):
            place = drive(row, ids[: place + 1], None, place=place).place
        else:
            break
    assert shape(row.trajectory) == shape(whole)


@pytest.mark.parametrize("scene", SCENES)
def test_rule_25_resumed_at_every_token_and_while_calls_wait(scene: str) -> None:
    pieces, markup, limits, answers = SCENES[scene]
    cutter = Cutter()
    check_every_token(cutter.cut(*pieces), cutter.vocabulary, markup, limits, answers)


@pytest.mark.parametrize("name", ["o200k", "qwen", "mistral1", "tekken", "unigram"])
def test_rule_25_resumed_at_every_real_token(name: str) -> None:
    text = "Naïve: <code>x = 3</code>\n数学 🙂 <code>\nx + 4\n</code>\n\n\nSo <code>x</code>x. END no"
    limits = {"stop_strings": ("END",)}
    check_every_token(spoken(name, text), vocabulary(name), CODE_TAGS, limits, {"\nx + 4\n": "7", "x": "3"})


def test_rule_25_a_call_that_was_declined_stays_declined() -> None:
    cutter = Cutter()
    row = new_row(cutter.vocabulary, max_tool_calls=0)
    row.receive(cutter.cut("<code>1</code>"), [0.0])
    again = Row.resume(row.trajectory, cutter.vocabulary, limits=Limits(max_tool_calls=5))
    assert again.pending == row.pending
    assert again.pending[0].declined


def test_rule_25_what_ended_nothing_then_ends_nothing_now() -> None:
    cutter = Cutter()
    row = new_row(cutter.vocabulary)
    row.receive(cutter.cut("a STOP", "<code>1</code>STOP", *"b"), [0.0] * 3)
    row.inject(ExecutionResult("1"))
    row.receive(cutter.cut("b"), [0.0])
    again = Row.resume(
        row.trajectory, cutter.vocabulary, limits=Limits(stop_strings=("STOP", "b"), stop_ids=(98,), max_tool_calls=0)
    )
    assert again.state is RowState.GENERATING
    assert shape(again.trajectory) == shape(row.trajectory)
    assert drive(again, cutter.cut("a", "STOP")).trajectory.stop == StopReason(StopKind.STOP_STRING, "STOP")


def test_rule_25_limits_may_be_widened_or_be_reached_at_once() -> None:
    cutter = Cutter()
    row = new_row(cutter.vocabulary, max_new_tokens=5)
    row.receive(cutter.cut(*"abcd"), [0.0] * 4)
    wider = Row.resume(row.trajectory, cutter.vocabulary, limits=Limits(max_new_tokens=6))
    assert drive(wider, cutter.cut(*"efgh")).text == "abcdef"
    reached = Row.resume(row.trajectory, cutter.vocabulary, limits=Limits(max_new_tokens=4))
    assert reached.trajectory.stop == StopReason(StopKind.LENGTH, "new_tokens")


def test_rule_25_a_finished_row_does_not_go_on() -> None:
    cutter = Cutter()
    run = drive(new_row(cutter.vocabulary), [EOS])
    with pytest.raises(ProtocolError, match="only a paused one can go on"):
        Row.resume(run.trajectory, cutter.vocabulary)


@pytest.mark.parametrize("pieces", [["<code>1</code>", "a"], ["<code>1</code><code>2</code>"], ["<code>1</code>"]])
def test_rule_25_another_markup_is_noticed(pieces: list[str]) -> None:
    cutter = Cutter()
    answers = {"1": "1"} if len(pieces) == 2 else None
    run = drive(new_row(cutter.vocabulary), cutter.cut(*pieces), answers)
    with pytest.raises(ProtocolError, match="not where this markup finds them"):
        Row.resume(run.trajectory, cutter.vocabulary, FENCED_PYTHON)
    found_by_none = drive(new_row(cutter.vocabulary, markup=None), cutter.cut(*pieces)).trajectory
    with pytest.raises(ProtocolError, match="not where this markup finds them"):
        Row.resume(found_by_none, cutter.vocabulary, CODE_TAGS)


def test_rule_25_each_generated_token_carries_its_weights_version() -> None:
    cutter = Cutter()
    ids = cutter.cut("<code>", "1</code>", "a", "b")
    row = new_row(cutter.vocabulary, "Q")
    drive(row, ids[:1], versions=lambda place: 3)
    again = Row.resume(row.trajectory, cutter.vocabulary)
    run = drive(again, ids, {"1": "1"}, versions=lambda place: 4 if place < 3 else 5, place=1)
    assert run.trajectory.weight_versions == [-1, 3, 4, *[-1] * len("<result>1</result>"), 4, 5]
    assert run.trajectory.segments[0].weight_versions == (3, 4)


def test_rule_25_a_resumed_row_keeps_what_it_is() -> None:
    cutter = Cutter()
    prompt = Prompt(text="Q", id="p", metadata={"k": 1}, open_block=False)
    row = Row(prompt, cutter.vocabulary, sample=3, seed=9, sampling=Sampling(temperature=0.5), logprob_kind="processed")
    row.receive(cutter.cut("<code>1</code>", "over"), [0.0, 0.0])
    again = Row.resume(row.trajectory, cutter.vocabulary)
    assert again.trajectory == row.trajectory
    assert again.trajectory.discarded == 1


def test_rule_25_forks_go_their_own_ways() -> None:
    cutter = Cutter()
    row = new_row(cutter.vocabulary, stop_strings=("STOP",))
    drive(row, cutter.cut("<code>1</code>", "a<co", b"\xc3"), {})
    left, right = row.fork(sample=1, seed=11), row.fork()
    before = shape(row.trajectory)
    drive(left, cutter.cut(b"\xa9", "de>2</code>"), {})
    drive(right, cutter.cut("STOP"))
    assert shape(row.trajectory) == before
    assert left.trajectory.text == "<code>1</code>a<coéde>2</code>"
    assert (left.sample, left.seed) == (1, 11)
    assert right.trajectory.stop.kind is StopKind.STOP_STRING
    assert drive(row, cutter.cut(b"\xa8<code>3</code>"), {"3": "3"}).codes == ["1", "3"]
