"""Llama 3's calls, against Meta's own code and against the chat template of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest

from midstream.families import LLAMA3_TOOL_CALLS, llama3_tool_calls
from midstream.row import RowState
from midstream.types import ExecutionResult, StopKind
from midstream.vocabulary import Vocabulary
from tests.families.conversations import ONE_EACH, TOOLS, TRICKY, Family, Message, package_file
from tests.rows import drive, new_row
from tests.vocabularies import tokenizer

EOT, EOM = "<|eot_id|>", "<|eom_id|>"


@cache
def meta() -> Any:
    chat_format = pytest.importorskip("llama_models.llama3.chat_format")
    from llama_models.llama3.tokenizer import Tokenizer

    return chat_format.ChatFormat(Tokenizer.get_instance())


def metas_rendering(messages: Sequence[Message], prompt: bool) -> list[int]:
    from llama_models.datatypes import RawMessage, StopReason, ToolCall, ToolPromptFormat

    def raw(message: Message) -> Any:
        calls = [
            ToolCall(call_id=call["id"], tool_name=call["function"]["name"], arguments=call["function"]["arguments"])
            for call in message.get("tool_calls", ())
        ]
        reason = StopReason.end_of_turn if message["role"] == "assistant" else None
        return RawMessage(role=message["role"], content=message["content"], tool_calls=calls, stop_reason=reason)

    if prompt:
        return list(meta().encode_dialog_prompt([raw(message) for message in messages]).tokens)
    ids = [meta().tokenizer.special_tokens["<|begin_of_text|>"]]
    for message in messages:
        ids += meta().encode_message(raw(message), ToolPromptFormat.json)[0]
    return ids


@pytest.mark.parametrize("messages", [ONE_EACH, TRICKY], ids=["one each", "tricky"])
def test_the_ids_are_those_of_metas_own_code(messages: list[Message]) -> None:
    Family(meta().tokenizer.model, LLAMA3_TOOL_CALLS, metas_rendering).check(messages)


@pytest.mark.parametrize("name", ["llama3_1", "llama3_2"])
def test_the_ids_are_those_of_the_hubs_template_with_results_as_json_strings(name: str) -> None:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    template = _compile_jinja_template(package_file("trl", f"chat_templates/{name}.jinja").read_text())
    encoding = meta().tokenizer.model

    def rendering(messages: Sequence[Message], prompt: bool) -> list[int]:
        text = template.render(
            messages=messages,
            tools=TOOLS,
            add_generation_prompt=prompt,
            bos_token="<|begin_of_text|>",
            date_string="26 Jul 2024",
        )
        return list(encoding.encode(text, allowed_special="all"))

    Family(encoding, llama3_tool_calls(payload="string"), rendering).check(ONE_EACH)


def say(*parts: str) -> list[int]:
    """Ids of texts, each encoded on its own; special tokens by their texts."""
    encoding = tokenizer("llama3")
    return [i for part in parts for i in encoding.encode(part, allowed_special="all")]


def show(call: Any) -> ExecutionResult:
    return ExecutionResult(f"{call.kind}: {call.code}")


@pytest.mark.parametrize("end", [EOT, EOM])
@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ('{"name": "f", "parameters": {"x": 1}}', ['json: {"name": "f", "parameters": {"x": 1}}']),
        (' \n{"type": "function", "name": "f", "parameters": {}}', None),
        ('{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}', ["f", "g"]),
        ('<|python_tag|>{"name": "f", "parameters": {}}', ['json: {"name": "f", "parameters": {}}']),
        ('<|python_tag|>search.call(query="a b")', ['builtin: search.call(query="a b")']),
        ("<|python_tag|>print(1)\nx = {2: 3}", ["code: print(1)\nx = {2: 3}"]),
        ("I run it.<|python_tag|>{1: 2}", ["code: {1: 2}"]),
        ('{"name": "f", "parameters": {"x": ', ['json: {"name": "f", "parameters": {"x": ']),
        ('{"function": "f", "parameters": {"x": 1}}', ['json: {"function": "f", "parameters": {"x": 1}}']),
    ],
)
def test_a_turn_that_is_a_call_is_answered_by_a_turn_of_ipythons(said: str, shown: list[str] | None, end: str) -> None:
    known = Vocabulary.of(tokenizer("llama3"))
    run = drive(new_row(known, markup=LLAMA3_TOOL_CALLS), say(said, end), show)
    assert run.row.state is RowState.GENERATING
    (injected,) = run.injected
    assert injected.startswith("<|start_header_id|>ipython<|end_header_id|>\n\n")
    assert injected.endswith("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
    assert injected.count("ipython") == len(run.row.records)
    for text in shown or []:
        assert text in injected


@pytest.mark.parametrize(
    "said",
    [
        '{"city": "Paris", "sky": "clear"}',
        '{"name": "Paris", "sky": "clear"}',
        '{"name": 3, "parameters": {}}',
        "{1, 2}",
        "{",
        '{"city": "Par',
        'It is {"name": "f", "parameters": {}}',
        "",
    ],
)
def test_an_answer_in_json_is_no_call_and_ends_the_row(said: str) -> None:
    known = Vocabulary.of(tokenizer("llama3"))
    ends = frozenset([known.added_id(EOT)])
    run = drive(new_row(known, markup=LLAMA3_TOOL_CALLS, eos_ids=ends), say(said, EOT, "never"), show)
    assert run.trajectory.stop.kind is StopKind.END_OF_SEQUENCE
    assert not run.trajectory.calls


def test_a_call_may_begin_each_turn_and_nothing_else_of_it() -> None:
    known = Vocabulary.of(tokenizer("llama3"))
    call = '{"name": "f", "parameters": {}}'
    said = say(call, EOT, "So: ", call, "<|python_tag|>", call, EOM, "\n", call, EOT, call[:5], "\n", EOT)
    ends = frozenset([known.added_id(EOT)])
    run = drive(new_row(known, markup=LLAMA3_TOOL_CALLS, eos_ids=ends), said, show)
    assert [(record.call.code, record.call.form) for record in run.trajectory.calls] == [
        (call, 1),
        (call, 0),
        (call, 1),
    ]
    assert run.trajectory.stop.kind is StopKind.END_OF_SEQUENCE
