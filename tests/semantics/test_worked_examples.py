"""The worked examples of the rules, to the letter, with every tokenizer and with tokens cut anywhere."""

from __future__ import annotations

from itertools import combinations

import pytest

from midstream.row import RowState
from tests.rows import Run, drive, new_row
from tests.spoken import spoken
from tests.synthetic import Cutter
from tests.vocabularies import ALL, vocabulary

RETRIEVED = (
    "['Nvidia was established in 1993 by Jen-Hsun Huang, Curtis Priem, and Chris '\n"
    " 'Malachowsky. It designs graphics processing units.']"
)

WRITTEN_AND_READ = {
    "silent-then-value": (
        "<code>x = 3; y = 4</code>\nThis is some regular text.\n<code>x + y</code>",
        {"x + y": "7"},
        "<code>x = 3; y = 4</code>\nThis is some regular text.\n<code>x + y</code><result>7</result>",
    ),
    "block-of-lines": (
        "<code>\ndef f(x):\n    return x * x\n\nf(2)\n</code>\n",
        {"\ndef f(x):\n    return x * x\n\nf(2)\n": "4"},
        "<code>\ndef f(x):\n    return x * x\n\nf(2)\n</code>\n\n<result>\n4\n</result>",
    ),
    "result-of-lines": (
        "<code>retrieve('Jen-Hsun Huang')</code>",
        {"retrieve('Jen-Hsun Huang')": RETRIEVED},
        f"<code>retrieve('Jen-Hsun Huang')</code>\n\n<result>\n{RETRIEVED}\n</result>",
    ),
    "printed": (
        "<code>print(5)</code>",
        {"print(5)": "5"},
        "<code>print(5)</code><result>5</result>",
    ),
    "error": (
        "<code>1/0</code>",
        {"1/0": "ZeroDivisionError('division by zero')"},
        "<code>1/0</code><result>ZeroDivisionError('division by zero')</result>",
    ),
}


def check(run: Run, read: str) -> None:
    assert run.row.state is RowState.GENERATING
    # Where the tokens cut cleanly behind the end tag, the newline that the model would write next is not taken
    # yet: then it may still come, once more, behind the result.
    assert run.text in (read, f"{read}\n")
    assert "".join(segment.text for segment in run.trajectory.segments) == run.text


@pytest.mark.parametrize("example", WRITTEN_AND_READ)
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_worked_example(name: str, example: str, chunk: int) -> None:
    written, answers, read = WRITTEN_AND_READ[example]
    ids = spoken(name, written)
    run = drive(new_row(vocabulary(name)), ids, answers, chunks=[chunk])
    check(run, read)
    assert [record.result.text for record in run.row.records if record.result] == [
        answers.get(code, "") for code in run.codes
    ]
    assert [i for s in run.trajectory.segments if s.origin == "generated" for i in s.ids] == ids


@pytest.mark.parametrize("example", WRITTEN_AND_READ)
def test_worked_example_however_the_tokens_are_cut(example: str) -> None:
    written, answers, read = WRITTEN_AND_READ[example]
    cutter = Cutter()
    tag = written.index("</code>")
    places = range(tag - 2, min(len(written), tag + 10))
    for first, second in combinations(places, 2):
        ids = cutter.cut(written[:first], written[first:second], written[second:])
        run = drive(new_row(cutter.vocabulary), [i for i in ids if cutter.vocabulary.piece(i)], answers)
        if example == "silent-then-value":
            assert run.text == read
        else:
            check(run, read)


@pytest.mark.parametrize("name", ["o200k", "cl100k", "llama3", "llama4", "qwen"])
def test_worked_example_where_the_model_writes_the_first_newline(name: str) -> None:
    written, answers, _ = WRITTEN_AND_READ["block-of-lines"]
    ids = spoken(name, written)
    assert vocabulary(name).piece(ids[-1]) == b">\n"
    run = drive(new_row(vocabulary(name)), ids, answers)
    assert run.injected == ["\n<result>\n4\n</result>"]


def test_worked_example_of_blocks_that_share_a_token() -> None:
    written = "<code>a=1</code><code>a+1</code><code>a+2</code>."
    known = vocabulary("o200k")
    ids = spoken("o200k", written)
    pieces = [known.piece(i).decode() for i in ids]
    assert pieces.count("><") == 2  # an end tag and the start tag behind it share a token
    run = drive(new_row(known), ids, {"a+1": "2", "a+2": "3"}, chunks=[4])
    # Block 1 is silent, so its `<` opens block 2. The result of block 2 takes its `<`, and what follows is text.
    assert run.codes == ["a=1", "a+1"]
    assert run.injected == ["result>2</result>"]
    assert run.text == "<code>a=1</code><code>a+1</code><result>2</result>code>a+2</code>."
    assert run.row.state is RowState.GENERATING


@pytest.mark.parametrize("name", ALL)
def test_worked_example_of_blocks_in_a_row(name: str) -> None:
    known = vocabulary(name)
    ids = spoken(name, "<code>a=1</code><code>a+1</code><code>a+2</code>.")
    run = drive(new_row(known), ids, {"a+1": "2", "a+2": "3"})
    shared = run.row.records[1].call.lookahead == "<"
    if shared:
        assert run.text == "<code>a=1</code><code>a+1</code><result>2</result>code>a+2</code>."
    else:  # the token ends with the tag, so the third block is a block as well
        assert run.row.records[1].call.lookahead == ""
        assert run.codes == ["a=1", "a+1", "a+2"]
        assert run.text.startswith("<code>a=1</code><code>a+1</code><result>2</result><code>a+2</code>")
        assert "<result>3</result>" in run.text
