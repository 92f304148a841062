"""The same rules for other tags: pairs of one's own, fences in other languages, special tokens."""

from __future__ import annotations

import pytest

from midstream.errors import MarkupError, TokenizerError
from midstream.markup import CODE_TAGS, FENCED_PYTHON, Markup
from tests.rows import drive, new_row
from tests.spoken import spoken
from tests.synthetic import Cutter
from tests.vocabularies import ALL, REAL, vocabulary


@pytest.mark.parametrize(
    ("start", "result", "end", "result_end"),
    [
        ("<code>", "<result>", "</code>", "</result>"),
        ("<python>", "<output>", "</python>", "</output>"),
        ("<|code|>", "<|out|>", "<|/code|>", "<|/out|>"),
        ("[CALL]", "[OUT]", "[/CALL]", "[/OUT]"),
        ("<search>", "<information>", "</search>", "</information>"),
    ],
)
def test_an_end_tag_is_made_from_its_start_tag(start: str, result: str, end: str, result_end: str) -> None:
    markup = Markup.tags(start, result)
    assert markup.end == end
    assert markup.render("1", "7") == (f"{result}7{result_end}",)


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize(("start", "result"), [("<python>", "<output>"), ("<|py|>", "<|out|>"), ("[RUN]", "[OUT]")])
def test_pairs_of_ones_own_with_real_tokens(name: str, start: str, result: str) -> None:
    markup = Markup.tags(start, result)
    ids = spoken(name, f"We run {start}3 + 4{markup.end} and stop.")
    run = drive(new_row(vocabulary(name), markup=markup), ids, {"3 + 4": "7"})
    assert run.codes == ["3 + 4"]
    assert run.row.records[0].injected == f"{result}7{markup.render('', '')[0][len(result) :]}"


@pytest.mark.parametrize("name", ["tagged"])
def test_special_token_pairs_and_special_results(name: str) -> None:
    known = vocabulary(name)
    markup = Markup.tags("<code>", "<result>", special_result=True, closing_tokens=("<|eom|>",))
    ids = [known.added_id("<code>"), *known.encode_text("3 + 4"), known.added_id("<|eom|>")]
    run = drive(new_row(known, markup=markup), ids, {"3 + 4": "</result>"})
    injected = run.trajectory.segments[-1].ids
    assert injected[0] == known.added_id("<result>")
    assert injected[-1] == known.added_id("</result>")
    assert known.added_ids.isdisjoint(injected[1:-1])
    assert list(injected[1:-1]) == known.encode_text("</result>")


def test_user_defined_symbols_of_sentencepiece_are_added_tokens() -> None:
    known = vocabulary("unigram")
    markup = Markup.tags("<code>", "<result>", special_result=True)
    ids = [known.added_id("<code>"), *known.encode_text("f()"), known.added_id("</code>")]
    run = drive(new_row(known, markup=markup), ids, {"f()": "a\nb"})
    injected = run.trajectory.segments[-1]
    assert [i for i in injected.ids if i in known.added_ids] == [
        known.added_id("<result>"),
        known.added_id("</result>"),
    ]
    assert injected.text == "\n\n<result>\na\nb\n</result>"


def test_a_special_token_that_the_tokenizer_lacks_is_refused_when_the_row_begins() -> None:
    with pytest.raises(TokenizerError, match=r"no added token '<\|eom_id\|>'"):
        new_row(Cutter().vocabulary, markup=Markup.tags(closing_tokens=("<|eom_id|>",)))
    with pytest.raises(TokenizerError, match="no added token '<result>'"):
        new_row(Cutter().vocabulary, markup=Markup.tags(special_result=True))


@pytest.mark.parametrize("name", ALL)
def test_fences_of_another_language(name: str) -> None:
    markup = Markup.fenced("tool", "tool_output")
    ids = spoken(name, "```python\nno block\n```\n\n```tool\nf()\n```\n")
    run = drive(new_row(vocabulary(name), markup=markup), ids, {"f()\n": "7"})
    assert run.codes == ["f()\n"]
    assert run.row.records[0].injected.lstrip("\n") == "```tool_output\n7\n```\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": "", "end": "</code>"}, "must be a non-empty string"),
        ({"start": ""}, "give its end tag too"),
        ({"start": "code"}, "give its end tag too"),
        ({"start": "<"}, "give its end tag too"),
        ({"result": "RESULT"}, "give its end tag too"),
        ({"start": "<a>", "end": "<a>"}, "must differ from end"),
        ({"end": ""}, "must be a non-empty string"),
    ],
)
def test_tags_that_cannot_work_are_refused(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(MarkupError, match=message):
        Markup.tags(**arguments)


def test_the_markups_that_have_names() -> None:
    assert (CODE_TAGS.start, CODE_TAGS.end) == ("<code>", "</code>")
    assert (FENCED_PYTHON.start, FENCED_PYTHON.end, FENCED_PYTHON.at_line_start) == ("```python\n", "```", True)
