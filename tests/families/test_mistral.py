"""Mistral's calls, against mistral-common, version by version of its tokenizers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from midstream.errors import MarkupError
from midstream.families import MISTRAL_TOOL_CALLS, mistral_tool_calls
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
    as_json,
    package_file,
)
from tests.rows import drive, new_row

MODELS = {3: "mistral_instruct_tokenizer_240323.model.v3", 7: "mistral_instruct_tokenizer_241114.model.v7"}
LATER = ("[TOOL_CONTENT]", "[ARGS]", "[CALL_ID]")


@cache
def instruct(version: int, sentencepiece: bool) -> Any:
    """mistral-common's tokenizer of conversations. Tekken of versions that it does not ship has version 3's pieces."""
    module = pytest.importorskip("mistral_common.tokens.tokenizers.instruct")
    from mistral_common.tokens.tokenizers.base import TokenizerVersion
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    kind = getattr(module, f"InstructTokenizerV{version}")
    if sentencepiece:
        return kind(SentencePieceTokenizer(package_file("mistral_common", f"data/{MODELS[version]}")))
    path = str(package_file("mistral_common", "data/tekken_240911.json"))
    made = Tekkenizer.from_file(path)
    if version > 3:
        listed = made._all_special_tokens
        special = [{**one, "token_str": getattr(one["token_str"], "value", one["token_str"])} for one in listed]
        there = {one["token_str"] for one in special}
        free = [one for one in special if one["token_str"].startswith("<SPECIAL_")]
        for one, text in zip(free, [text for text in LATER if text not in there], strict=False):
            one["token_str"] = text
        made = Tekkenizer(
            json.loads(Path(path).read_text())["vocab"],
            special_tokens=special,
            pattern=made._model._pat_str,
            vocab_size=made.n_words,
            num_special_tokens=made.num_special_tokens,
            version=TokenizerVersion(f"v{version}"),
        )
    return kind(made)


def family(version: int, sentencepiece: bool = False) -> Family:
    made = instruct(version, sentencepiece)
    from mistral_common.protocol.instruct.request import ChatCompletionRequest, InstructRequest

    def rendering(messages: Sequence[Message], prompt: bool) -> list[int]:
        request = ChatCompletionRequest(messages=as_json(messages), tools=TOOLS)
        converted = InstructRequest(messages=request.messages, available_tools=request.tools)
        return list(made.encode_instruct(converted).tokens)

    markup = mistral_tool_calls(version, sentencepiece=sentencepiece)  # type: ignore[arg-type]
    return Family(made.tokenizer, markup, rendering)


VERSIONS = pytest.mark.parametrize(
    ("version", "sentencepiece"), [(3, False), (3, True), (7, False), (7, True), (11, False), (13, False)]
)


@VERSIONS
@pytest.mark.parametrize("messages", [ONE_EACH, SEVERAL, TRICKY], ids=["one each", "several", "tricky"])
def test_the_ids_are_those_of_mistral_common(version: int, sentencepiece: bool, messages: list[Message]) -> None:
    if (version, sentencepiece) == (7, True):  # the difference that is told below
        messages = [{**one, "content": one["content"] or ("-" if "name" in one else "")} for one in messages]
    family(version, sentencepiece).check(messages)


@pytest.mark.parametrize(("version", "sentencepiece"), [(7, False), (7, True), (11, False), (13, False)])
def test_the_ids_are_those_of_mistral_common_where_something_is_said_before_the_call(
    version: int, sentencepiece: bool
) -> None:
    family(version, sentencepiece).check(SPOKEN)


def test_an_empty_result_of_version_7_with_sentencepiece_has_the_space_of_any_other() -> None:
    """mistral-common writes no space before nothing; the one that stands before every other result is ours too."""
    made = family(7, sentencepiece=True)
    known = Vocabulary.of(made.tokenizer)
    messages = [*SEVERAL[:1], SEVERAL[5], SEVERAL[6]]
    row = new_row(known, Prompt(ids=tuple(made.rendering(messages[:1], True))), made.markup)
    drive(row, made.spoken(messages, 1), lambda call: ExecutionResult(""))
    theirs = made.rendering(messages, True)
    content = theirs.index(known.added_id("[TOOL_CONTENT]")) + 1
    assert theirs[content] == known.added_id("[/TOOL_RESULTS]")
    assert row.ids == [*theirs[:content], *known.encode_text(" "), *theirs[content:]]


@pytest.mark.parametrize("version", [3, 13])
def test_calls_that_are_broken_are_answered_too(version: int) -> None:
    made = family(version)
    known = Vocabulary.of(made.tokenizer)
    said = [known.added_id("[TOOL_CALLS]"), *known.encode_text('[{"name": "weather", '), known.added_id("</s>")]
    run = drive(new_row(known, markup=made.markup), said, lambda call: ExecutionResult(INJECTION))
    (record,) = run.row.records
    assert record.call.code == '[{"name": "weather", '
    injected = run.trajectory.segments[-1].ids
    ends = [known.added_id("[TOOL_RESULTS]"), known.added_id("[/TOOL_RESULTS]")]
    assert [i for i in injected if i in known.added_ids] == ends


def test_a_result_has_the_id_that_the_model_gave_its_call_or_one_made_for_it() -> None:
    made = family(3)
    known = Vocabulary.of(made.tokenizer)
    calls = '[{"name": "a", "arguments": {}, "id": "AbCdEfGh1"}, {"name": "b", "arguments": {}}]'
    said = [known.added_id("[TOOL_CALLS]"), *known.encode_text(calls), known.added_id("</s>")]
    run = drive(new_row(known, markup=made.markup), said, lambda call: ExecutionResult(str(call.index)))
    assert [record.injected for record in run.row.records] == [
        '[TOOL_RESULTS]{"content": 0, "call_id": "AbCdEfGh1"}[/TOOL_RESULTS]',
        '[TOOL_RESULTS]{"content": 1, "call_id": "call00001"}[/TOOL_RESULTS]',
    ]


@pytest.mark.parametrize(("version", "sentencepiece"), [(4, False), ("3", False), (11, True), (13, True)])
def test_versions_that_there_are_not_are_refused(version: Any, sentencepiece: bool) -> None:
    with pytest.raises(MarkupError, match="version"):
        mistral_tool_calls(version, sentencepiece=sentencepiece)


def test_the_one_that_is_called_mistrals_is_that_of_the_newest_tokenizers() -> None:
    assert mistral_tool_calls(13) == MISTRAL_TOOL_CALLS
