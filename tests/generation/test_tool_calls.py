"""Calls of tools in JSON, through the generator: run on the host side by side, recorded, and told what is wrong."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from PIL import Image

from midstream import Generator, Limits, PolicyEngine, Prompt, SandboxPool, ScriptedEngine, Trajectory, tool
from midstream.engines.base import RowRequest
from midstream.errors import MidstreamError
from midstream.families import LLAMA3_TOOL_CALLS, QWEN_TOOL_CALLS
from midstream.markup import CODE_TAGS, Markup
from midstream.records.certificate import verify
from midstream.records.schema import decode_record
from midstream.types import StopKind
from tests.policies import padded_output
from tests.vocabularies import tokenizer, vocabulary

KNOWN = vocabulary("qwen")
END = KNOWN.added_id("<|im_end|>")


def weather(city: str, days: int = 1) -> dict[str, Any]:
    """The weather."""
    if city == "Atlantis":
        raise LookupError("Atlantis has sunk; see /tmp/secret/map.txt")
    return {"city": city, "days": days}


def said(*turns: str) -> list[int]:
    """The ids of turns of the model's, each ended; the tags of calls are the tokens that Qwen has for them."""
    ids: list[int] = []
    for turn in turns:
        for piece in (
            turn.replace("<tool_call>", "\0<tool_call>\0").replace("</tool_call>", "\0</tool_call>\0").split("\0")
        ):
            ids += [KNOWN.added_id(piece)] if KNOWN.has_added(piece) else KNOWN.encode_text(piece)
        ids.append(END)
    return ids


def call(tool_name: str, /, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': tool_name, 'arguments': arguments})}\n</tool_call>"


def run(ids: Sequence[int], *, tools: Any = (weather,), markup: Markup = QWEN_TOOL_CALLS, **options: Any) -> Trajectory:
    engine = ScriptedEngine(tokenizer("qwen"), list(ids), tokens_per_step=3)
    with Generator(engine, tools=tools, markup=markup, **options) as generator:
        (row,) = generator.generate([Prompt(text="Q", id="p")])
        record = generator.record(row)
    assert verify(record) == []
    assert decode_record(record.encode()).trajectory == row
    return row


def answers(row: Trajectory) -> list[str]:
    return [record.result.text if record.result else "?" for record in row.calls]


def test_calls_of_a_turn_are_answered_in_order_and_the_row_goes_on() -> None:
    row = run(said(call("weather", city="Rome") + call("weather", city="Oslo", days=3), "Well."))
    assert answers(row) == ['{"city": "Rome", "days": 1}', '{"city": "Oslo", "days": 3}']
    assert row.stop.kind is StopKind.END_OF_SEQUENCE
    assert row.text.endswith("</tool_response><|im_end|>\n<|im_start|>assistant\nWell.<|im_end|>")
    (made,) = row.calls[1].result.tool_calls if row.calls[1].result else ()
    assert (made.name, dict(made.keyword_arguments), made.value) == (
        "weather",
        {"city": "Oslo", "days": 3},
        {"city": "Oslo", "days": 3},
    )


def test_calls_of_a_turn_run_side_by_side() -> None:
    there: list[str] = []
    both = asyncio.Event()

    async def meet(name: str) -> list[str]:
        there.append(name)
        if len(there) == 2:
            both.set()
        await both.wait()  # for ever, if they came one after the other
        return there

    row = run(said(call("meet", name="a") + call("meet", name="b"), ""), tools=[meet], limits=Limits(time_limit=20))
    assert answers(row) == ['["a", "b"]'] * 2


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (call("wether", city="Rome"), "Error: there is no tool 'wether'; did you mean weather?"),
        (call("shell", command="ls"), "Error: there is no tool 'shell'; the tools are weather"),
        (call("weather"), "weather() missing 1 required positional argument: 'city'"),
        (call("weather", city="Rome", nights=2), "unexpected keyword argument 'nights'"),
        (call("weather", city="Rome", days="two"), "argument 'days'"),
        (call("weather", city="Atlantis"), "Error: LookupError: Atlantis has sunk; see map.txt"),
        ("<tool_call>{'name': 'weather'}</tool_call>", "names stand in double quotes, not in single ones, at line 1"),
        ('<tool_call>\n{"name": "weather",\n "arguments": {"city": Rome}}\n</tool_call>', "at line 3 column 24:"),
        ('<tool_call>{"name": "weather", "arguments": {"city": "a", "city": "b"}}</tool_call>', "stands twice"),
        ('<tool_call>{"name": "weather", "arguments": {"city": "a", "days": NaN}}</tool_call>', "JSON has no NaN"),
        ('<tool_call>{"name": "weather", "arguments": ' + "[" * 5000 + "</tool_call>", "deeper than 32 levels"),
        ('<tool_call>{"name": "weather", "arguments": [1]}</tool_call>', '"arguments" must be a JSON object'),
        ('<tool_call>{"arguments": {}}</tool_call>', 'this call has no "name"'),
        ("<tool_call>weather</tool_call>", "expected a value, not weather"),
        ("<tool_call></tool_call>", "this call is empty"),
    ],
)
def test_what_is_wrong_with_a_call_is_told_to_the_model_and_the_row_goes_on(written: str, text: str) -> None:
    row = run(said(written, "Oh."))
    (answer,) = answers(row)
    assert answer.startswith("Error: ")
    assert text in answer
    assert len(answer) < 400
    assert row.calls[0].result is not None
    assert row.calls[0].result.error is not None
    assert row.text.endswith("Oh.<|im_end|>")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.zeros(3_000_000), "ValueError: give() returned more than 16777216 bytes"),
        ("x" * (16 << 20) + "x", "ValueError: give() returned more than 16777216 bytes"),
        (["é" * (3 << 20)], "ValueError: give() returned more than 16777216 bytes"),
        (np.zeros((0, 1 << 25)), "TypeError: give() returned what cannot be shown: an array whose shape"),
        (Decimal("1" * 20_000), "TypeError: give() returned what cannot be shown: "),
        (Image.new("RGB", (4000, 4000)), "TypeError: give() returned what cannot be shown: its arrays and images are"),
        (Image.new("F", (2, 2)), "TypeError: give() returned what cannot be shown: an image that cannot be made a"),
    ],
    ids=["array", "text", "escapes", "shape", "decimal", "image", "mode"],
)
def test_what_a_tool_returns_that_cannot_be_shown_is_the_tools_error(value: object, text: str) -> None:
    def give() -> object:
        return value

    row = run(said(call("give") + call("weather", city="Rome"), "Well."), tools=[give, weather])
    (first, second) = answers(row)
    assert first.startswith(f"Error: {text}")
    assert second == '{"city": "Rome", "days": 1}'
    assert row.calls[0].result is not None
    (made,) = row.calls[0].result.tool_calls
    assert made.value is None
    assert made.error == row.calls[0].result.error
    assert row.stop.kind is StopKind.END_OF_SEQUENCE


def test_arguments_may_be_json_within_json_and_texts_are_shown_as_they_are() -> None:
    def shout(text: str) -> str:
        return text.upper()

    inner = json.dumps({"name": "shout", "arguments": json.dumps({"text": "</tool_call>é"})})
    row = run(said(f"<tool_call>{inner.replace('</', '<' + chr(92) + '/')}</tool_call>", ""), tools=[shout])
    assert answers(row) == ["</TOOL_CALL>É"]


def test_code_and_calls_share_the_tools_and_what_a_row_may_call_of_them(sandboxes: SandboxPool) -> None:
    counted: list[int] = []

    @tool(calls_per_row=3)
    def count() -> int:
        """Count."""
        counted.append(len(counted))
        return len(counted)

    row = run(
        said(
            f"<code>x = count()</code>{call('count')}",
            "<code>x</code> and <code>count()</code>",
        )[:-1]
        + said(call("count"), "<code>x</code>"),
        tools=[count],
        markup=Markup.either(CODE_TAGS, QWEN_TOOL_CALLS),
        pool=sandboxes,
    )
    kinds = [(record.call.kind, record.result.text if record.result else None) for record in row.calls]
    assert kinds[:4] == [("code", ""), ("json", "2"), ("code", "1"), ("code", "3")]
    assert kinds[4][0] == "json"
    assert "RuntimeError: count() may be called at most 3 times" in str(kinds[4][1])
    assert kinds[5] == ("code", "1")


def test_a_paused_row_is_rebuilt_from_its_code_and_not_from_its_calls(sandboxes: SandboxPool) -> None:
    calls: list[str] = []

    def note(text: str) -> str:
        calls.append(text)
        if text == "stop" and calls.count("stop") == 1:
            generator.interrupt()
        return text

    markup = Markup.either(CODE_TAGS, QWEN_TOOL_CALLS)
    ids = [
        *said(f"<code>x = 5</code>{call('note', text='once')}"),
        *said(call("note", text="stop"), "<code>x + 1</code>"),
    ]
    engine = ScriptedEngine(tokenizer("qwen"), ids)
    with Generator(engine, tools=[note], markup=markup, pool=sandboxes) as generator:
        (paused,) = generator.generate([Prompt(text="Q", id="p")])
    assert paused.stop.kind is StopKind.PAUSED
    rest = ids[len([i for segment in paused.segments if segment.origin == "generated" for i in segment.ids]) :]
    with Generator(ScriptedEngine(tokenizer("qwen"), rest), tools=[note], markup=markup, pool=sandboxes) as generator:
        (row,) = generator.generate([paused])
    assert answers(row)[-1] == "6"
    assert calls.count("once") == 1


def test_calls_alone_need_no_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a sandbox was started")

    monkeypatch.setattr(SandboxPool, "start", refuse)
    assert answers(run(said(call("weather", city="Rome"), ""))) == ['{"city": "Rome", "days": 1}']


def test_an_error_of_the_library_in_a_tool_ends_its_row_alone() -> None:
    def broken() -> None:
        raise MidstreamError("the tool's own client failed")

    row = run(said(call("broken") + call("weather", city="Rome"), "never"), tools=[broken, weather])
    assert row.stop.kind is StopKind.SANDBOX_FAILURE
    assert "the tool's own client failed" in row.stop.detail


def test_a_row_over_its_time_does_not_wait_for_its_calls() -> None:
    cancelled = asyncio.Event()

    async def wait() -> None:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    row = run(said(call("wait"), "never"), tools=[wait], limits=Limits(time_limit=0.3))
    assert row.stop.kind is StopKind.TIME_LIMIT
    assert cancelled.is_set()


def test_in_rounds_a_policy_ends_its_round_where_a_turn_ends() -> None:
    """The id that ends the turn is the end of the sequence for the policy, which is then asked to go on behind it."""
    rounds = [said(call("weather", city="Rome")), said(call("weather", city="Oslo")), said("So.")]
    asked: list[list[int]] = []

    class Policy:
        def generate(self, batch: Any) -> Any:
            n = int(batch["input_lengths"][0])
            asked.append(batch["input_ids"][0].tolist()[:n])
            new = rounds[len(asked) - 1]
            return padded_output(dict, asked[-1:], [new], [[-0.5] * len(new)], pad_id=END)

    engine = PolicyEngine(Policy(), tokenizer("qwen"))
    with Generator(engine, tools=[weather], markup=QWEN_TOOL_CALLS) as generator:
        (row,) = generator.generate([Prompt(text="Q")])
    assert answers(row) == ['{"city": "Rome", "days": 1}', '{"city": "Oslo", "days": 1}']
    assert len(asked) == 3
    assert asked[-1] == row.ids[: len(asked[-1])]
    assert row.stop.kind is StopKind.END_OF_SEQUENCE


def test_an_engine_that_works_in_rounds_is_told_of_the_ids_that_end_turns_and_not_of_tags_where_nothing_is_run() -> (
    None
):
    requests: list[RowRequest] = []

    class Asked(ScriptedEngine):
        def open(self, request: RowRequest, n: int = 1) -> list[int]:
            requests.append(request)
            return super().open(request, n)

    other = KNOWN.added_id("<|endoftext|>")
    engine = Asked(tokenizer("qwen"), [other], eos_id=other)
    markup = Markup.either(Markup.tags("<now>", "<then>", holds="json"), QWEN_TOOL_CALLS)
    with Generator(engine, markup=markup, limits=Limits(stop_strings=("STOP",))) as generator:
        generator.generate([Prompt(text="Q")])
    (request,) = requests
    assert request.stop_strings == ("</now>", "STOP")
    assert set(request.stop_ids) == {END, other}


def test_llamas_code_behind_its_tag_runs_in_the_sandbox_and_its_calls_on_the_host(sandboxes: SandboxPool) -> None:
    known = vocabulary("llama3")
    tag, eom, eot = (known.added_id(text) for text in ("<|python_tag|>", "<|eom_id|>", "<|eot_id|>"))
    ids = [
        *[tag, *known.encode_text("x = weather('Bonn')\nx['days'] + 1"), eom],
        *[*known.encode_text('{"name": "weather", "parameters": {"city": "Rome"}}'), eot],
        *[tag, *known.encode_text('weather.call(city="Oslo")'), eom],
        *[*known.encode_text('{"answer": 2}'), eot],
    ]
    engine = ScriptedEngine(tokenizer("llama3"), ids, eos_id=eot)
    with Generator(engine, tools=[weather], markup=LLAMA3_TOOL_CALLS, pool=sandboxes) as generator:
        (row,) = generator.generate([Prompt(text="Q")])
        assert verify(generator.record(row)) == []
    assert [record.call.kind for record in row.calls] == ["code", "json", "builtin"]
    assert answers(row) == ["2", '{"city": "Rome", "days": 1}', '{"city": "Oslo", "days": 1}']
    assert row.text.endswith('{"answer": 2}<|eot_id|>')
