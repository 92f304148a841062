"""Rules 17-19: how a result looks, and how much of it."""

from __future__ import annotations

import re

import pytest

from midstream.markup import CODE_TAGS, FENCED_PYTHON, Frame, Markup, Special
from midstream.row import Inject, Nothing
from midstream.types import ExecutionResult, Media
from tests.rows import drive, new_row
from tests.spoken import spoken
from tests.synthetic import CLOSE, OPEN, Cutter
from tests.vocabularies import ALL, vocabulary

NOTICE = re.compile(r"…\[(\d+) characters cut\]…")


@pytest.fixture
def cutter() -> Cutter:
    return Cutter()


# --- rule 17


@pytest.mark.parametrize(
    ("code", "shown", "injected"),
    [
        ("1", "1", "<result>1</result>"),
        ("\n1", "1", "\n\n<result>\n1\n</result>"),
        ("1\n", "1", "\n\n<result>\n1\n</result>"),
        ("1", "1\n2", "\n\n<result>\n1\n2\n</result>"),
        ("\n", "1\n2", "\n\n<result>\n1\n2\n</result>"),
    ],
)
def test_rule_17_inline_where_neither_has_a_newline(cutter: Cutter, code: str, shown: str, injected: str) -> None:
    run = drive(new_row(cutter.vocabulary), cutter.cut(f"<code>{code}</code>"), {code: shown})
    assert run.injected == [injected]


@pytest.mark.parametrize(
    ("lookahead", "shown", "injected"),
    [
        ("\n", "1\n2", "\n<result>\n1\n2\n</result>"),
        ("\n\n", "1\n2", "<result>\n1\n2\n</result>"),
        ("\n\n<", "1\n2", "result>\n1\n2\n</result>"),
        ("<", "1", "result>1</result>"),
        ("<result>", "1", "1</result>"),
        ("<result>1</result>", "1", None),
        ("x", "1", "<result>1</result>"),
        ("\n", "1", "<result>1</result>"),
        ("\n\n\n", "1\n2", "\n\n<result>\n1\n2\n</result>"),
        ("<results", "1", "<result>1</result>"),
        (" ", "1\n2", "\n\n<result>\n1\n2\n</result>"),
    ],
)
def test_rule_17_what_the_model_wrote_of_the_result_is_left_out(
    cutter: Cutter, lookahead: str, shown: str, injected: str | None
) -> None:
    run = drive(new_row(cutter.vocabulary), cutter.cut(f"<code>f()</code>{lookahead}", "x"), {"f()": shown})
    assert run.row.records[0].call.lookahead == lookahead
    assert run.injected == ([] if injected is None else [injected])
    assert run.text == f"<code>f()</code>{lookahead}{injected or ''}x"


@pytest.mark.parametrize("name", ALL)
def test_rule_17_a_model_that_writes_the_result_itself_goes_on_inside_it(name: str) -> None:
    ids = spoken(name, "<code>f()</code><result>")
    run = drive(new_row(vocabulary(name)), ids, {"f()": "7"})
    lookahead = run.row.records[0].call.lookahead
    assert lookahead in ("", "<", "<result>")  # metaspace has learnt the whole tag
    assert run.injected == ["<result>7</result>"[len(lookahead) :]]


def test_rule_17_what_is_injected_is_recorded_as_it_stands(cutter: Cutter) -> None:
    run = drive(new_row(cutter.vocabulary), cutter.cut("<code>\nf()</code>\n"), {"\nf()": "7"})
    (record,) = run.row.records
    assert record.injected == run.injected[0] == "\n<result>\n7\n</result>"
    assert record.cut_characters == 0


def test_rule_17_fences_count_at_the_start_of_a_line_only(cutter: Cutter) -> None:
    text = "Write ```python\nno\n``` so:\n```python\nx = '```'\n ```\nx\n```\n"
    run = drive(new_row(cutter.vocabulary, markup=FENCED_PYTHON), cutter.bytewise(text), {})
    assert run.codes == ["x = '```'\n ```\nx\n"]


def test_rule_17_generation_starts_at_the_start_of_a_line(cutter: Cutter) -> None:
    run = drive(new_row(cutter.vocabulary, markup=FENCED_PYTHON), cutter.bytewise("```python\n```"), {})
    assert run.codes == [""]


@pytest.mark.parametrize(
    ("end", "injected"),
    [
        ("```", "\n```output\n7\n```\n"),
        ("```\n", "```output\n7\n```\n"),
        ("```\n\n", "\n```output\n7\n```\n"),
        ("```\n```", "output\n7\n```\n"),
    ],
)
def test_rule_17_fenced_results_are_trimmed_likewise(cutter: Cutter, end: str, injected: str) -> None:
    ids = cutter.cut("```python\n", "f()\n", end)
    run = drive(new_row(cutter.vocabulary, markup=FENCED_PYTHON), ids, {"f()\n": "7"})
    assert run.injected == [injected]


@pytest.mark.parametrize("silent", [True, False])
def test_rule_17_a_fence_may_stand_directly_behind_a_result(cutter: Cutter, silent: bool) -> None:
    ids = cutter.cut("```python\n", "f()\n", "```", "```python\n", "g()\n", "```")
    run = drive(new_row(cutter.vocabulary, markup=FENCED_PYTHON), ids, {} if silent else {"f()\n": "7"})
    # Behind the result a line begins; behind the bare end fence none does.
    assert run.codes == (["f()\n"] if silent else ["f()\n", "g()\n"])


@pytest.mark.parametrize("name", ALL)
def test_rule_17_fences_with_real_tokens(name: str) -> None:
    text = "We add.\n```python\nx = 3 + 4\nprint(x)\n```\nSo 7.\n\n```python\nx\n```\n"
    run = drive(new_row(vocabulary(name), markup=FENCED_PYTHON), spoken(name, text), {"x = 3 + 4\nprint(x)\n": "7"})
    assert run.codes == ["x = 3 + 4\nprint(x)\n", "x\n"]
    # Tokens that end before the newline behind the fence leave the model to write it once more.
    assert run.text.replace("```\n\nSo", "```\nSo") == text.replace("```\nSo", "```\n```output\n7\n```\nSo")


def test_rule_17_special_frames_are_trimmed_of_text_and_never_of_a_special_token(cutter: Cutter) -> None:
    markup = Markup.tags("<code>", "<|result|>", special_result=True)
    for lookahead, expected in [
        ("", [*b"\n\n", OPEN, *b"\n7\n", CLOSE]),
        ("\n", [*b"\n", OPEN, *b"\n7\n", CLOSE]),
        ("\n\n", [OPEN, *b"\n7\n", CLOSE]),
        ("\n\n<", [*b"\n\n", OPEN, *b"\n7\n", CLOSE]),
    ]:
        run = drive(new_row(cutter.vocabulary, markup=markup), cutter.cut(f"<code>\n</code>{lookahead}"), {"\n": "7"})
        assert list(run.trajectory.segments[-1].ids) == expected
        assert run.row.records[0].injected == run.injected[0]


# --- rule 18


def test_rule_18_a_block_that_shows_nothing_injects_nothing(cutter: Cutter) -> None:
    run = drive(new_row(cutter.vocabulary), cutter.cut("<code>x = 1</code>", "so"), {})
    assert run.outcomes == [Nothing()]
    assert len(run.trajectory.segments) == 1
    assert run.row.records[0].result == ExecutionResult("")


def test_rule_18_or_an_empty_result(cutter: Cutter) -> None:
    markup = Markup.tags(inject_empty=True)
    run = drive(new_row(cutter.vocabulary, markup=markup), cutter.cut("<code>x</code>", "<code>\n</code>\n"), {})
    assert run.injected == ["<result></result>", "\n<result>\n\n</result>"]


def test_rule_18_an_image_is_something_to_show(cutter: Cutter) -> None:
    image = Media("image/png", b"...")
    row = new_row(cutter.vocabulary)
    row.receive(cutter.cut("<code>1</code>"), [0.0])
    assert row.inject(ExecutionResult("", media=(image,))) == Inject((), (image,))
    row.receive(cutter.cut("<code>1</code>"), [0.0])
    assert row.inject(ExecutionResult("1", media=(image,))) == Inject(tuple(b"<result>1</result>"), (image,))


# --- rule 19


@pytest.mark.parametrize("budget", [17, 40, 60, 100, 118])
def test_rule_19_a_result_is_cut_in_the_middle_within_its_budget(cutter: Cutter, budget: int) -> None:
    text = "".join(chr(ord("A") + i % 26) for i in range(104))
    run = drive(new_row(cutter.vocabulary, max_result_tokens=budget), cutter.cut("<code>f()</code>"), {"f()": text})
    (record,) = run.row.records
    assert len(run.trajectory.segments[-1].ids) <= budget
    inside = re.fullmatch(r"<result>(.*)</result>", run.injected[0])
    assert inside
    notice = NOTICE.search(inside[1])
    if notice is None:
        assert inside[1] == ""
        assert record.cut_characters == len(text)
        return
    head, tail = inside[1][: notice.start()], inside[1][notice.end() :]
    assert int(notice[1]) == record.cut_characters == len(text) - len(head) - len(tail) > 0
    assert text.startswith(head)
    assert text.endswith(tail)
    assert len(head) - len(tail) in (0, 1)
    # … and no more than that: one character more would not have fitted
    assert len(run.trajectory.segments[-1].ids) >= budget - 1


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", ["words", "lines", "numbers", "emoji"])
def test_rule_19_every_result_fits_with_real_tokens(name: str, shape: str) -> None:
    known = vocabulary(name)
    text = {
        "words": "the lines go on and on, " * 60,
        "lines": "".join(f"line {i}: {'=' * (i % 30)}\n" for i in range(80)),
        "numbers": " ".join(str(3**i) for i in range(70)),
        "emoji": "🙂数学é " * 200,
    }[shape]
    for budget in (8, 30, 64, 200):
        row = new_row(known, max_result_tokens=budget)
        run = drive(row, spoken(name, "<code>f()</code>"), {"f()": text})
        if not run.injected:  # a vocabulary that spells an empty result with more tokens than that
            assert len(known.encode_text("<result></result>")) > budget
            continue
        assert len(run.trajectory.segments[-1].ids) <= budget
        assert 0 < run.row.records[0].cut_characters <= len(text)
        assert run.injected[0].strip().startswith("<result>")
        assert run.injected[0].endswith("</result>")


def test_rule_19_the_budget_is_the_smaller_of_its_own_and_what_is_left(cutter: Cutter) -> None:
    text = "x" * 200
    for limits, most in [
        ({"max_result_tokens": 90, "max_new_tokens": 500}, 90),
        ({"max_result_tokens": 90, "max_new_tokens": 81}, 80),
        ({"max_result_tokens": 90, "max_total_tokens": 74}, 70),
        ({"max_result_tokens": 90, "max_total_tokens": 84, "reserve_tokens": 10}, 70),
    ]:
        run = drive(new_row(cutter.vocabulary, **limits), cutter.cut("<code>f()</code>"), {"f()": text})
        assert most - 1 <= len(run.trajectory.segments[-1].ids) <= most


def test_rule_19_each_of_several_results_has_its_own_budget(cutter: Cutter) -> None:
    ids = cutter.cut("<code>1</code><code>2</code><code>3</code>")
    run = drive(new_row(cutter.vocabulary, max_result_tokens=60), ids, {"1": "x" * 99, "2": "two", "3": "y" * 99})
    records = run.row.records
    assert records[1].injected == "<result>two</result>"
    assert [record.cut_characters > 0 for record in records] == [True, False, True]
    assert all(len(record.injected.encode()) <= 60 for record in records)
    assert run.injected == ["".join(record.injected for record in records)]


def test_rule_19_text_is_capped_before_it_is_tokenised() -> None:
    longest = 0

    class Watching(Cutter):
        def __init__(self) -> None:
            super().__init__()
            source = self.vocabulary._source
            inner = source.encode_text

            def encode(text: str) -> list[int]:
                nonlocal longest
                longest = max(longest, len(text))
                return inner(text)[:1]

            object.__setattr__(source, "encode_text", encode)

    cutter = Watching()
    row = new_row(cutter.vocabulary, max_result_characters=500)
    run = drive(row, cutter.cut("<code>f()</code>"), {"f()": "x" * 1_000_000})
    assert run.row.records[0].cut_characters == 999_500
    assert longest < 600


def test_rule_19_characters_that_no_text_can_hold_are_replaced(cutter: Cutter) -> None:
    run = drive(new_row(cutter.vocabulary), cutter.cut("<code>f()</code>"), {"f()": "a\ud800b\ud83d\ude42"})
    assert run.injected == ["<result>a\N{REPLACEMENT CHARACTER}b🙂</result>"]


# --- the shape of a rendered result


def test_adjacent_texts_of_a_frame_are_one() -> None:
    assert CODE_TAGS.render("1", "7") == ("<result>7</result>",)
    frame = Frame(("a", "b", Special("<s>")), (Special("</s>"), "", "c"))
    markup = Markup("<x>", "</x>", None, frame)
    assert markup.render("1", "") == ("ab", Special("<s>"), Special("</s>"), "c")
    assert markup.render("1", "7") == ("ab", Special("<s>"), "7", Special("</s>"), "c")
