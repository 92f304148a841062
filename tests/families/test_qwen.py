"""Qwen's and Hermes's calls, against the chat templates that transformers renders."""

from __future__ import annotations

import copy
import json
from functools import cache
from typing import Any

import pytest

from midstream.decoding import decode
from midstream.families import HERMES_TOOL_CALLS, QWEN_TOOL_CALLS, qwen_tool_calls
from midstream.markup import Markup
from midstream.types import ExecutionResult, Prompt
from midstream.vocabulary import Vocabulary
from tests.families.conversations import (
    INJECTION,
    ONE_EACH,
    SEVERAL,
    SPOKEN,
    TOOLS,
    TRICKY,
    Family,
    Message,
    package_file,
)
from tests.rows import drive, new_row
from tests.vocabularies import tokenizer

# As the model cards of Hermes 2 Pro and Hermes 3 show it; their results are JSON with the tool's name.
HERMES = """\
{% for message in messages %}\
{% if message.role == 'tool' %}\
{% if messages[loop.index0 - 1].role != 'tool' %}<|im_start|>tool
{% endif %}<tool_response>
{"name": {{ message.name | tojson }}, "content": {{ message.payload }}}
</tool_response>
{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>
{% endif %}\
{% else %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls %}{% if not loop.first or message.content %}
{% endif %}<tool_call>
{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@cache
def qwen(name: str) -> Any:
    """Qwen's tokenizer as that model has it: in Qwen 3's the tags of results and thoughts are tokens too."""
    made = copy.deepcopy(tokenizer("qwen"))
    if name.startswith("qwen3"):
        made.add_tokens(["<tool_response>", "</tool_response>", "<think>", "</think>"])
    return made


def family(name: str, template: str, markup: Markup, **options: Any) -> Family:
    made = qwen(name)

    def rendering(messages: list[Message], prompt: bool) -> list[int]:
        text = made.apply_chat_template(
            messages, tools=TOOLS, chat_template=template, add_generation_prompt=prompt, tokenize=False, **options
        )
        return list(made.encode(text, add_special_tokens=False))

    return Family(made, markup, rendering, behind=list(made.encode("\n", add_special_tokens=False)))


def qwen_family(name: str, markup: Markup = QWEN_TOOL_CALLS, **options: Any) -> Family:
    return family(name, package_file("trl", f"chat_templates/{name}.jinja").read_text(), markup, **options)


def thoughtful(messages: list[Message]) -> list[Message]:
    """The same where the model thinks before it says anything."""
    return [
        {**message, "reasoning_content": "Which tool, and how?\n\nWell."} if message["role"] == "assistant" else message
        for message in messages
    ]


CONVERSATIONS = pytest.mark.parametrize("messages", [ONE_EACH, SEVERAL, SPOKEN], ids=["one each", "several", "spoken"])


@CONVERSATIONS
def test_the_ids_are_those_of_qwen_2_5s_chat_template(messages: list[Message]) -> None:
    qwen_family("qwen2_5").check(messages)


@CONVERSATIONS
def test_the_ids_are_those_of_qwen_3s_chat_template_where_the_model_thinks(messages: list[Message]) -> None:
    qwen_family("qwen3").check(thoughtful(messages))


@CONVERSATIONS
def test_the_ids_are_those_of_qwen_3s_template_for_models_that_do_not_think(messages: list[Message]) -> None:
    qwen_family("qwen3_instruct_2507").check(messages)


def test_qwen_3s_template_forgets_that_a_turn_began_with_an_empty_thought() -> None:
    """With ``enable_thinking=False`` it opens each turn with an empty thought, and leaves it out of past turns.

    A row keeps what the model was given: its ids are those that it sampled from, not those of the template.
    """
    off = qwen_family("qwen3", qwen_tool_calls(thinking=False), enable_thinking=False)
    messages = ONE_EACH[:3]
    prompt, thought = off.rendering(messages[:1], True), "<think>\n\n</think>\n\n"
    known = Vocabulary.of(off.tokenizer)
    assert decode(known, prompt).endswith("assistant\n" + thought)
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>'
    said = known.encode_prompt(Prompt(text=call))
    row = new_row(known, Prompt(ids=tuple(prompt)), off.markup)
    drive(row, said, lambda call: ExecutionResult(messages[2]["content"]))
    ours, theirs = decode(known, row.ids), decode(known, off.rendering(messages, True))
    assert ours.count(thought) == 2
    assert theirs.count(thought) == 1
    assert ours.replace(thought, "") == theirs.replace(thought, "")


@CONVERSATIONS
def test_the_ids_are_those_of_hermess_format(messages: list[Message]) -> None:
    def payload(message: Message) -> str:
        """What tools give as JSON stands there as that."""
        try:
            return json.dumps(json.loads(message.get("content", "")), ensure_ascii=False)
        except ValueError:
            return json.dumps(message.get("content", ""), ensure_ascii=False)

    hermes = family("qwen", HERMES, HERMES_TOOL_CALLS)
    hermes.check([{**message, "payload": payload(message)} for message in messages])


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3_instruct_2507"])
def test_a_template_parses_what_a_tool_gave_and_a_row_does_not(name: str) -> None:
    """Rendered by the template, a result can end its turn and speak for the user. In a row it is text."""
    made = qwen_family(name)
    known = Vocabulary.of(made.tokenizer)
    row = new_row(known, Prompt(ids=tuple(made.rendering(TRICKY[:1], True))), made.markup)
    drive(row, made.spoken(TRICKY, 1), lambda call: ExecutionResult(INJECTION))
    theirs = made.rendering(TRICKY[:3], True)
    assert decode(known, row.ids) == decode(known, theirs)
    end = known.added_id("<|im_end|>")
    assert row.ids.count(end) == theirs.count(end) - 1
    assert row.ids.count(known.added_id("<tool_call>")) == theirs.count(known.added_id("<tool_call>")) - 1
