"""Rules 6-11: where blocks begin and end."""

from __future__ import annotations

from dataclasses import replace

import pytest

from midstream.errors import PromptError
from midstream.markup import FENCED_PYTHON, Markup
from midstream.row import BlockOpened, CodeDelta, Execute, Row, RowState, Stopped
from midstream.types import ExecutionResult, Prompt, StopKind, StopReason
from midstream.vocabulary import TokenizerSource, Vocabulary
from tests.rows import drive, new_row
from tests.spoken import spoken
from tests.synthetic import EOM, EOS, Cutter
from tests.vocabularies import ALL, vocabulary


@pytest.fixture
def cutter() -> Cutter:
    return Cutter()


# --- rule 6


@pytest.mark.parametrize("name", ALL)
def test_rule_06_tags_in_the_prompt_never_count(name: str) -> None:
    row = new_row(vocabulary(name), "Use <code>1</code>, and <code>like this")
    run = drive(row, spoken(name, "</code> is no end. <code>2</code>"), {"2": "2", "like this": "wrong"})
    assert run.codes == ["2"]


def test_rule_06_a_tag_does_not_begin_in_the_prompt(cutter: Cutter) -> None:
    run = drive(new_row(cutter.vocabulary, "Q: <co"), cutter.cut("de>1</code>"))
    assert run.codes == []


@pytest.mark.parametrize("result", ["<code>2</code>", "</code>", "<code>", "STOP", "a\n<code>\n2\n</code>\nSTOP"])
def test_rule_06_tags_and_stop_strings_in_a_result_never_count(cutter: Cutter, result: str) -> None:
    row = new_row(cutter.vocabulary, stop_strings=("STOP",))
    run = drive(row, cutter.cut("<code>1</code>", "3</code>"), {"1": result})
    assert run.codes == ["1"]
    assert run.row.state is RowState.GENERATING
    assert result in run.injected[0]


def test_rule_06_a_tag_does_not_begin_in_a_result_nor_go_on_behind_it(cutter: Cutter) -> None:
    markup = Markup.tags("<code>", "<r>", result_end="<co")
    run = drive(new_row(cutter.vocabulary, markup=markup), cutter.cut("<code>1</code>", "de>2</code>"), {"1": "1"})
    assert run.text == "<code>1</code><r>1<code>2</code>"
    assert run.codes == ["1"]


@pytest.mark.parametrize("name", ALL)
def test_rule_06_a_prompt_may_end_inside_an_open_block(name: str) -> None:
    prompt = Prompt(ids=tuple(spoken(name, "Try <code>1</code> and then\n<code>x = 3\n")), open_block=True)
    run = drive(new_row(vocabulary(name), prompt), spoken(name, "x + 4</code>"), {"x = 3\nx + 4": "7"})
    assert run.codes == ["x = 3\nx + 4"]
    assert run.text == "x + 4</code>\n\n<result>\n7\n</result>"
    assert "".join(event.text for event in run.events if isinstance(event, CodeDelta)) == "x = 3\nx + 4"


def test_rule_06_an_open_block_is_where_its_line_is(cutter: Cutter) -> None:
    prompt = Prompt(text="```python\nx = 1", open_block=True)
    run = drive(new_row(cutter.vocabulary, prompt, FENCED_PYTHON), cutter.cut("```", "\n", "```", "\n"))
    assert run.codes == ["x = 1```\n"]
    prompt = Prompt(text="```python\n", open_block=True)
    assert drive(new_row(cutter.vocabulary, prompt, FENCED_PYTHON), cutter.cut("```")).codes == [""]


@pytest.mark.parametrize(("text", "message"), [("no tag", "no start tag"), ("<code>1</code> so", "block is closed")])
def test_rule_06_a_prompt_that_does_not_end_inside_a_block_is_refused(cutter: Cutter, text: str, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        new_row(cutter.vocabulary, Prompt(text=text, open_block=True))


# --- rule 7


def test_rule_07_tags_are_found_however_the_tokens_are_cut(cutter: Cutter) -> None:
    raw = "é<code>🙂 = 1</code>ü".encode()
    for first in range(len(raw)):
        for second in range(first, len(raw)):
            pieces = [piece for piece in (raw[:first], raw[first:second], raw[second:]) if piece]
            run = drive(new_row(cutter.vocabulary), cutter.cut(*pieces))
            assert run.codes == ["🙂 = 1"], pieces
            assert run.row.records[0].call.position == len("Q: ") + len(run.trajectory.segments[0].ids)


def test_rule_07_nothing_is_lost_between_bytes_and_text(cutter: Cutter) -> None:
    broken = [b"<code>'\xf0\x9f", b"\x99", b"\x82", b"\xe6\x95", b"'</code>", b"\xff", b" on"]
    run = drive(new_row(cutter.vocabulary), cutter.cut(*broken), {})
    assert run.codes == ["'🙂\N{REPLACEMENT CHARACTER}'"]
    assert run.text == b"".join(broken).decode(errors="replace")


@pytest.mark.parametrize("name", ["tagged", "unigram", "unigram_fast"])
def test_rule_07_tags_may_be_single_special_tokens(name: str) -> None:
    known = vocabulary(name)
    ids = [known.added_id("<code>"), *known.encode_text("3 + 4"), known.added_id("</code>")]
    run = drive(new_row(known), ids, {"3 + 4": "7"})
    assert run.text == "<code>3 + 4</code><result>7</result>"
    assert run.codes == ["3 + 4"]


def test_rule_07_an_eos_or_stop_id_never_matches_as_text() -> None:
    source = TokenizerSource(
        size=300,
        piece=lambda i: b"</code>" if i > 255 else bytes([i]),
        encode_text=lambda text: list(text.encode()),
        encode_prompt=lambda text: list(text.encode()),
        eos_ids=frozenset([256]),
    )
    known = Vocabulary(source)
    run = drive(new_row(known), [*b"<code>1", 256], {"1": "1"})
    assert run.codes == []
    assert run.trajectory.stop.kind is StopKind.END_OF_SEQUENCE
    run = drive(new_row(known, stop_ids=(257,)), [*b"<code>1", 257], {"1": "1"})
    assert run.codes == []
    assert run.trajectory.stop == StopReason(StopKind.STOP_ID, "257")
    run = drive(new_row(known, ignore_eos=True), [*b"<code>1", 256, *b"2</code>"], {"12": "1"})
    assert run.codes == ["12"]


def test_rule_07_nothing_matches_across_an_ignored_eos(cutter: Cutter) -> None:
    row = new_row(cutter.vocabulary, ignore_eos=True, stop_strings=("STOP",))
    run = drive(row, [*b"<co", EOS, *b"de>1</code>ST", EOS, *b"OP"])
    assert run.codes == []
    assert run.row.state is RowState.GENERATING


# --- rule 8


def test_rule_08_the_first_start_tag_opens_and_the_next_end_tag_closes(cutter: Cutter) -> None:
    run = drive(new_row(cutter.vocabulary), cutter.bytewise("a<code>1</code>b<code>2</code>c"), {})
    assert run.codes == ["1", "2"]


def test_rule_08_a_start_tag_inside_an_open_block_is_code(cutter: Cutter) -> None:
    run = drive(new_row(cutter.vocabulary), cutter.bytewise("<code>s = '<code>'</code>2</code>"), {})
    assert run.codes == ["s = '<code>'"]


@pytest.mark.parametrize("name", ALL)
def test_rule_08_an_end_tag_without_an_open_block_is_text(name: str) -> None:
    ids = spoken(name, "</code> so </code><code>1</code></code>.")
    run = drive(new_row(vocabulary(name)), ids, {})
    assert run.codes == ["1"]
    assert [type(event) for event in run.events if not isinstance(event, CodeDelta)] == [BlockOpened, Execute]
    assert list(run.trajectory.segments[0].ids) == ids


def test_rule_08_a_complete_start_tag_in_the_lookahead_counts(cutter: Cutter) -> None:
    ids = cutter.cut("<code>1</code><code>", "2", "</code>")
    run = drive(new_row(cutter.vocabulary), ids, {"1": "1", "2": "2"})
    # The result of block 1 stands inside block 2, and is no part of its code.
    assert run.codes == ["1", "2"]
    assert run.text == "<code>1</code><code><result>1</result>2</code><result>2</result>"
    assert [record.call.lookahead for record in run.row.records] == ["<code>", ""]


def test_rule_08_code_in_the_lookahead_is_code_though_a_result_stands_behind_it(cutter: Cutter) -> None:
    ids = cutter.cut("<code>1</code><code>a</co", "de>", "b</code>")
    run = drive(new_row(cutter.vocabulary), ids, {"1": "1"})
    assert run.codes == ["1", "a</code>b"]  # half an end tag before the result, half behind it: no end tag


def test_rule_08_several_blocks_may_close_in_one_token(cutter: Cutter) -> None:
    ids = cutter.cut("<code>1</code>a<code>2</code>b<code>3</code>c", "on")
    run = drive(new_row(cutter.vocabulary), ids, {"1": "1", "3": "3"})
    (execute,) = [event for event in run.events if isinstance(event, Execute)]
    assert [call.code for call in execute.calls] == ["1", "2", "3"]
    assert [call.lookahead for call in execute.calls] == ["a<code>2</code>b<code>3</code>c", "b<code>3</code>c", "c"]
    assert {call.position for call in execute.calls} == {len("Q: ") + 1}
    assert run.text == "<code>1</code>a<code>2</code>b<code>3</code>c<result>1</result><result>3</result>on"
    assert [record.injected for record in run.row.records] == ["<result>1</result>", "", "<result>3</result>"]


@pytest.mark.parametrize("cut", range(1, 6))
@pytest.mark.parametrize("silent", [True, False])
def test_rule_08_a_partial_tag_in_the_lookahead_goes_on_only_if_nothing_is_injected(
    cutter: Cutter, cut: int, silent: bool
) -> None:
    start = "<code>"
    ids = cutter.cut("<code>1</code>" + start[:cut], start[cut:], "2", "</code>")
    run = drive(new_row(cutter.vocabulary), ids, {} if silent else {"1": "1"})
    assert run.codes == (["1", "2"] if silent else ["1"])


@pytest.mark.parametrize("cut", range(1, 4))
@pytest.mark.parametrize("silent", [True, False])
def test_rule_08_a_partial_stop_string_in_the_lookahead_goes_on_only_if_nothing_is_injected(
    cutter: Cutter, cut: int, silent: bool
) -> None:
    ids = cutter.cut("<code>1</code>" + "STOP"[:cut], "STOP"[cut:], " and on")
    row = new_row(cutter.vocabulary, stop_strings=("STOP",))
    run = drive(row, ids, {} if silent else {"1": "1"})
    assert (run.row.state is RowState.STOPPED) == silent


@pytest.mark.parametrize("silent", [True, False])
def test_rule_08_a_stop_string_may_span_a_block_that_shows_nothing(cutter: Cutter, silent: bool) -> None:
    row = new_row(cutter.vocabulary, stop_strings=("1</code>\nSo",))
    run = drive(row, cutter.cut("<code>", "1", "</code>", "\n", "So"), {} if silent else {"1": "1"})
    assert (run.row.state is RowState.STOPPED) == silent


def test_rule_08_tags_do_not_share_characters(cutter: Cutter) -> None:
    markup = replace(Markup.tags("<a>", "<r>"), start="aba", end="aca")
    run = drive(new_row(cutter.vocabulary, markup=markup), cutter.bytewise("abaca1acaba2aca"), {})
    assert run.codes == ["ca1"]  # the second start tag would begin in the end tag
    run = drive(new_row(cutter.vocabulary, markup=markup), cutter.cut("abaca1acaba2aca"), {})
    assert run.codes == ["ca1"]


# --- the code as it arrives


@pytest.mark.parametrize("pieces", [1, 2, 3, 5, 8, 100])
def test_deltas_together_are_the_code_and_hold_back_what_may_be_the_end_tag(cutter: Cutter, pieces: int) -> None:
    text = "a<code>x = '</cod'\n< </ </c\ny</code>b<code></code>"
    ids = cutter.cut(*(text[i : i + pieces] for i in range(0, len(text), pieces)))
    run = drive(new_row(cutter.vocabulary), ids, {})
    codes, code, shown = [], "", []
    for event in run.events:
        match event:
            case BlockOpened():
                code = ""
            case CodeDelta():
                code += event.text
                shown.append(code)
            case Execute():
                codes += [call.code for call in event.calls]
                assert code == event.calls[-1].code
    assert codes == ["x = '</cod'\n< </ </c\ny", ""]
    assert all(codes[0].startswith(seen) for seen in shown)


def test_deltas_come_as_soon_as_they_can_be_no_end_tag(cutter: Cutter) -> None:
    row = new_row(cutter.vocabulary)
    seen = [row.receive([i], [0.0]).events for i in cutter.cut("<code>", "x", "y<", "/co", "m", "</code>")]
    assert seen[:5] == [(BlockOpened(),), (CodeDelta("x"),), (CodeDelta("y"),), (), (CodeDelta("</com"),)]


# --- rule 9


@pytest.mark.parametrize("end", ["eos", "stop string", "stop id", "length"])
def test_rule_09_a_row_that_ends_inside_a_block_shows_nothing_of_it(cutter: Cutter, end: str) -> None:
    limits = {
        "stop string": {"stop_strings": ("STOP",)},
        "stop id": {"stop_ids": (EOM,)},
        "length": {"max_new_tokens": 3},
    }
    row = new_row(cutter.vocabulary, **limits.get(end, {}))
    ids = cutter.cut("<code>", "1 + 1", {"eos": EOS, "stop string": "STOP", "stop id": EOM}.get(end, "2"), "</code>")
    run = drive(row, ids, {"1 + 1": "2"})
    assert run.row.state is RowState.STOPPED
    assert run.row.records == ()
    assert not [event for event in run.events if isinstance(event, Execute)]
    assert "<result>" not in run.text


# --- rule 10


def test_rule_10_any_number_of_blocks(cutter: Cutter) -> None:
    blocks = 500
    run = drive(new_row(cutter.vocabulary), cutter.cut(*["<code>1</code>"] * blocks), {"1": "1"})
    assert [record.call.index for record in run.row.records] == list(range(blocks))


def test_rule_10_beyond_the_limit_the_model_is_told(cutter: Cutter) -> None:
    run = drive(
        new_row(cutter.vocabulary, max_tool_calls=1),
        cutter.cut("<code>1</code>", "<code>2</code>", "so"),
        {"1": "1", "2": "2"},
    )
    assert [record.call.declined != "" for record in run.row.records] == [False, True]
    assert run.injected == ["<result>1</result>", "<result>Not run: the limit of 1 calls is reached.</result>"]
    assert run.row.state is RowState.GENERATING


def test_rule_10_or_the_row_stops(cutter: Cutter) -> None:
    row = new_row(cutter.vocabulary, max_tool_calls=1, at_tool_call_limit="stop")
    run = drive(row, cutter.cut("<code>1</code>", "<code>2</code>", "so"), {"1": "1", "2": "2"})
    assert run.codes == ["1"]
    assert run.trajectory.stop == StopReason(StopKind.TOOL_CALL_LIMIT, "1")
    assert run.text == "<code>1</code><result>1</result><code>2</code>"


def test_rule_10_the_limit_may_be_reached_within_one_token(cutter: Cutter) -> None:
    ids = cutter.cut("<code>1</code><code>2</code>", "so")
    told = drive(new_row(cutter.vocabulary, max_tool_calls=1), ids, {"1": "1"})
    assert told.injected == ["<result>1</result><result>Not run: the limit of 1 calls is reached.</result>"]
    stopped = drive(new_row(cutter.vocabulary, max_tool_calls=1, at_tool_call_limit="stop"), ids, {"1": "1"})
    assert stopped.text == "<code>1</code><code>2</code><result>1</result>"
    assert stopped.trajectory.stop == StopReason(StopKind.TOOL_CALL_LIMIT, "1")


def test_rule_10_no_calls_at_all(cutter: Cutter) -> None:
    row = new_row(cutter.vocabulary, max_tool_calls=0, at_tool_call_limit="stop")
    run = drive(row, cutter.cut("<code>1</code>"), {"1": "1"})
    assert run.row.records == ()
    assert run.events[-1] == Stopped(StopReason(StopKind.TOOL_CALL_LIMIT, "0"))


# --- rule 11


def test_rule_11_an_end_tag_and_a_stop_string_in_one_token_the_block_runs_and_the_row_stops(cutter: Cutter) -> None:
    row = new_row(cutter.vocabulary, stop_strings=("STOP",))
    run = drive(row, cutter.cut("<code>1</code> STOP", "never"), {"1": "1"})
    assert run.text == "<code>1</code> STOP<result>1</result>"
    assert run.trajectory.stop == StopReason(StopKind.STOP_STRING, "STOP")
    silent = drive(new_row(cutter.vocabulary, stop_strings=("STOP",)), cutter.cut("<code>1</code> STOP", "never"), {})
    assert silent.text == "<code>1</code> STOP"
    assert silent.trajectory.stop == StopReason(StopKind.STOP_STRING, "STOP")


@pytest.mark.parametrize("stop_string", ["</code>", "code>", ">", "1</code>"])
def test_rule_11_completed_by_one_character_the_block_runs_and_the_row_stops(cutter: Cutter, stop_string: str) -> None:
    row = new_row(cutter.vocabulary, markup=replace(Markup.tags(), start="[["), stop_strings=(stop_string,))
    run = drive(row, cutter.cut("[[1</code>", "never"), {"1": "1"})
    assert run.text == "[[1</code><result>1</result>"
    assert run.trajectory.stop == StopReason(StopKind.STOP_STRING, stop_string)


@pytest.mark.parametrize("together", [True, False])
def test_rule_11_a_stop_string_completed_before_the_end_tag_ends_the_row(cutter: Cutter, together: bool) -> None:
    row = new_row(cutter.vocabulary, stop_strings=("</cod",))
    pieces = ["<code>1", "</code>x"] if together else ["<code>1", "</co", "de>x"]
    run = drive(row, cutter.cut(*pieces), {"1": "1"})
    assert run.row.records == ()
    assert run.trajectory.stop == StopReason(StopKind.STOP_STRING, "</cod")


def test_rule_11_blocks_before_a_stop_string_in_one_token_run_and_those_behind_it_do_not(cutter: Cutter) -> None:
    row = new_row(cutter.vocabulary, stop_strings=("STOP",))
    run = drive(row, cutter.cut("<code>1</code>STOP<code>2</code>"), {"1": "1", "2": "2"})
    assert run.codes == ["1"]
    assert run.text == "<code>1</code>STOP<code>2</code><result>1</result>"


def test_rule_11_the_earliest_of_two_stop_strings_decides(cutter: Cutter) -> None:
    row = new_row(cutter.vocabulary, stop_strings=("abcd", "bc", "d"))
    run = drive(row, cutter.cut("xabcd"))
    assert run.trajectory.stop == StopReason(StopKind.STOP_STRING, "bc")


def test_rule_11_stops_are_live_inside_blocks(cutter: Cutter) -> None:
    for ids, limits, kind in [
        (cutter.cut("<code>a", "STOP", "</code>"), {"stop_strings": ("STOP",)}, StopKind.STOP_STRING),
        (cutter.cut("<code>a", EOM, "</code>"), {"stop_ids": (EOM,)}, StopKind.STOP_ID),
        (cutter.cut("<code>a", EOS, "</code>"), {}, StopKind.END_OF_SEQUENCE),
    ]:
        run = drive(new_row(cutter.vocabulary, **limits), ids, {"a": "1"})
        assert run.trajectory.stop.kind is kind
        assert run.row.records == ()


@pytest.mark.parametrize("limit", ["new", "total", "context"])
def test_rule_11_a_block_whose_last_token_uses_up_the_budget_is_not_run(cutter: Cutter, limit: str) -> None:
    ids = cutter.cut("<code>", "1", "</code>")

    def row(budget: int) -> Row:
        prompt = len("Q: ")
        limits = {"new": {"max_new_tokens": budget}, "total": {"max_total_tokens": prompt + budget}}
        context = prompt + budget if limit == "context" else None
        return new_row(cutter.vocabulary, context=context, **limits.get(limit, {}))

    detail = "new_tokens" if limit == "new" else "total_tokens"
    used_up = drive(row(3), ids, {"1": "1"})
    assert used_up.row.records == ()
    assert used_up.trajectory.stop == StopReason(StopKind.LENGTH, detail)
    one_left = drive(row(4), ids, {"1": "1"})
    assert one_left.codes == ["1"]  # run, though there is no room for its result
    assert one_left.trajectory.stop == StopReason(StopKind.LENGTH, "no_room_for_result")
    silent = drive(row(4), [*ids, *b"x"], {})
    assert silent.text == "<code>1</code>x"


def test_rule_11_a_stop_string_in_the_last_token_of_the_budget_is_why_the_row_stops(cutter: Cutter) -> None:
    row = new_row(cutter.vocabulary, max_new_tokens=2, stop_strings=("STOP",))
    assert drive(row, cutter.cut("a", "STOP")).trajectory.stop.kind is StopKind.STOP_STRING
    row = new_row(cutter.vocabulary, max_new_tokens=2)
    assert drive(row, cutter.cut("a", EOS)).trajectory.stop.kind is StopKind.END_OF_SEQUENCE


def test_an_answer_may_depend_on_the_call(cutter: Cutter) -> None:
    run = drive(
        new_row(cutter.vocabulary), cutter.cut("<code>1</code>"), lambda call: ExecutionResult(str(call.position))
    )
    assert run.injected == ["<result>4</result>"]
