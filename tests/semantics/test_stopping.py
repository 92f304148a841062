"""Rules 20 and 21: why a row stops, and what its lengths count."""

from __future__ import annotations

import pytest

from midstream.errors import ConfigurationError, PromptError
from midstream.markup import Markup
from midstream.row import Nothing, RowState, Stopped
from midstream.types import ExecutionResult, Limits, StopKind, StopReason
from tests.rows import drive, new_row
from tests.spoken import spoken
from tests.synthetic import EOM, EOS, Cutter
from tests.vocabularies import ALL, vocabulary

BLOCK = "<code>1</code>"
RESULT = "<result>1</result>"


@pytest.fixture
def cutter() -> Cutter:
    return Cutter()


# --- rule 20


def test_rule_20_the_reasons_are_a_closed_list() -> None:
    assert sorted(kind.value for kind in StopKind) == [
        "cancelled",
        "end_of_sequence",
        "engine_failure",
        "length",
        "paused",
        "sandbox_failure",
        "stop_id",
        "stop_string",
        "time_limit",
        "tool_call_limit",
    ]
    finished = [kind for kind in StopKind if StopReason(kind).finished]
    assert finished == [StopKind.END_OF_SEQUENCE, StopKind.STOP_STRING, StopKind.STOP_ID]
    assert [kind for kind in StopKind if StopReason(kind).resumable] == [StopKind.PAUSED]


@pytest.mark.parametrize("name", ALL)
def test_rule_20_the_token_that_completes_a_stop_string_is_kept(name: str) -> None:
    ids = spoken(name, "The answer is 7.</answer> And so on.")
    run = drive(new_row(vocabulary(name), stop_strings=("</answer>",)), ids, chunks=[3])
    assert run.trajectory.stop == StopReason(StopKind.STOP_STRING, "</answer>")
    kept = list(run.trajectory.segments[0].ids)
    assert kept == ids[: len(kept)]
    assert "</answer>" in run.text
    assert "</answer>" not in drive(new_row(vocabulary(name)), kept[:-1]).text


def test_rule_20_eos_and_stop_ids_are_kept_and_named(cutter: Cutter) -> None:
    assert drive(new_row(cutter.vocabulary), [*b"a", EOS]).trajectory.stop == StopReason(
        StopKind.END_OF_SEQUENCE, str(EOS)
    )
    run = drive(new_row(cutter.vocabulary, stop_ids=(EOM,)), [*b"a", EOM, *b"b"])
    assert run.trajectory.stop == StopReason(StopKind.STOP_ID, str(EOM))
    assert run.trajectory.ids[-1] == EOM


def test_rule_20_the_engine_may_say_which_ids_end_a_sequence(cutter: Cutter) -> None:
    row = new_row(cutter.vocabulary, eos_ids=frozenset([EOM]))
    assert drive(row, [*b"a", EOS, *b"b", EOM]).text == "a<eos>b<|eom|>"


def test_rule_20_eos_ids_in_prompts_and_results_do_not_count(cutter: Cutter) -> None:
    markup = Markup.tags("<code>", "<eos>", result_end="<|eom|>", special_result=True)
    row = new_row(cutter.vocabulary, "<eos>STOP", markup, stop_strings=("STOP",), stop_ids=(EOM,))
    run = drive(row, cutter.cut(BLOCK, "x"), {"1": "STOP"})
    assert run.text == f"{BLOCK}<eos>STOP<|eom|>x"
    assert EOS in run.trajectory.segments[1].ids
    assert row.state is RowState.GENERATING


@pytest.mark.parametrize("is_eos", [True, False])
def test_rule_20_a_closing_token_closes_the_turn_and_not_the_row(cutter: Cutter, is_eos: bool) -> None:
    markup = Markup.tags("<|call|>", "<result>", end="<|call|end>", closing_tokens=("<|eom|>",))
    eos_ids = frozenset([EOS, EOM]) if is_eos else frozenset([EOS])
    row = new_row(cutter.vocabulary, markup=markup, eos_ids=eos_ids, stop_ids=() if is_eos else (EOM,))
    run = drive(row, cutter.cut("<|call|>", "1", EOM, "so", "<|call|>2<|call|end>", EOM), {"1": "1"}, chunks=[9])
    assert run.codes == ["1", "2"]
    assert [record.call.lookahead for record in run.row.records] == ["", ""]
    assert run.text == f"<|call|>1<|eom|>{RESULT}so<|call|>2<|call|end><|eom|>"
    # … and where no block is open it ends the row as it would without the markup
    assert run.trajectory.stop.kind is (StopKind.END_OF_SEQUENCE if is_eos else StopKind.STOP_ID)


def test_rule_20_nothing_matches_across_a_closing_token(cutter: Cutter) -> None:
    markup = Markup.tags("<code>", "<result>", closing_tokens=("<|eom|>",))
    row = new_row(cutter.vocabulary, markup=markup, stop_strings=("STOP",))
    run = drive(row, cutter.cut("<code>1<co", EOM, "de>2</code>", "<code>ST", EOM, "OP"), {})
    assert run.codes == ["1<co", "ST"]
    assert run.row.state is RowState.GENERATING


def test_rule_20_a_row_is_stopped_from_outside_once(cutter: Cutter) -> None:
    row = new_row(cutter.vocabulary)
    row.receive(cutter.cut("a"), [-1.0])
    row.stop(StopReason(StopKind.TIME_LIMIT))
    row.stop(StopReason(StopKind.CANCELLED))
    assert row.trajectory.stop == StopReason(StopKind.TIME_LIMIT)
    assert row.trajectory.text == "a"
    assert row.trajectory.truncated


def test_rule_20_a_row_that_stops_while_it_waits_keeps_the_call_without_a_result(cutter: Cutter) -> None:
    row = new_row(cutter.vocabulary)
    row.receive(cutter.cut(BLOCK), [-1.0])
    row.stop(StopReason(StopKind.SANDBOX_FAILURE, "the sandbox is gone"))
    (record,) = row.trajectory.calls
    assert (record.call.code, record.result, record.injected) == ("1", None, "")


# --- rule 21


def test_rule_21_injected_ids_count_towards_new_tokens_by_default(cutter: Cutter) -> None:
    budget = 1 + len(RESULT) + 2
    run = drive(new_row(cutter.vocabulary, max_new_tokens=budget), cutter.cut(BLOCK, "a", "b", "c"), {"1": "1"})
    assert run.text == f"{BLOCK}{RESULT}ab"
    assert run.trajectory.generation_length == budget
    assert run.trajectory.stop == StopReason(StopKind.LENGTH, "new_tokens")


def test_rule_21_or_they_do_not(cutter: Cutter) -> None:
    row = new_row(cutter.vocabulary, max_new_tokens=3, count_injected=False)
    run = drive(row, cutter.cut(BLOCK, "a", "b", "c"), {"1": "1"})
    assert run.text == f"{BLOCK}{RESULT}ab"
    assert row.max_total_tokens is None


def test_rule_21_injected_ids_always_count_towards_the_total(cutter: Cutter) -> None:
    total = len("Q: ") + 1 + len(RESULT) + 1
    row = new_row(cutter.vocabulary, max_total_tokens=total, max_new_tokens=100, count_injected=False)
    run = drive(row, cutter.cut(BLOCK, "a", "b"), {"1": "1"})
    assert run.text == f"{BLOCK}{RESULT}a"
    assert run.trajectory.stop == StopReason(StopKind.LENGTH, "total_tokens")


def test_rule_21_the_total_is_the_context_unless_it_is_less(cutter: Cutter) -> None:
    assert new_row(cutter.vocabulary, context=50).max_total_tokens == 50
    assert new_row(cutter.vocabulary, context=50, max_total_tokens=40).max_total_tokens == 40
    assert new_row(cutter.vocabulary, context=50, max_total_tokens=60).max_total_tokens == 50
    assert new_row(cutter.vocabulary, context=50, max_new_tokens=7).max_total_tokens == 10
    assert new_row(cutter.vocabulary, context=50, max_new_tokens=7, count_injected=False).max_total_tokens == 50


def test_rule_21_a_result_may_fill_the_row_exactly(cutter: Cutter) -> None:
    for limits in ({"max_new_tokens": 1 + len(RESULT)}, {"max_total_tokens": 4 + len(RESULT)}):
        run = drive(new_row(cutter.vocabulary, **limits), cutter.cut(BLOCK, "a"), {"1": "1"})
        assert run.text == f"{BLOCK}{RESULT}"
        assert run.trajectory.stop.kind is StopKind.LENGTH
        assert isinstance(run.outcomes[-1], Stopped)


def test_rule_21_where_the_whole_result_does_not_fit_an_empty_one_may(cutter: Cutter) -> None:
    run = drive(new_row(cutter.vocabulary, max_new_tokens=len(RESULT)), cutter.cut(BLOCK, "a"), {"1": "1"})
    assert run.text == f"{BLOCK}<result></result>"
    assert run.row.records[0].cut_characters == 1


def test_rule_21_where_not_even_an_empty_result_fits_nothing_is_injected(cutter: Cutter) -> None:
    empty = len("<result></result>")
    run = drive(new_row(cutter.vocabulary, max_new_tokens=1 + empty - 1), cutter.cut(BLOCK, "a"), {"1": "1"})
    assert run.text == BLOCK
    assert run.trajectory.stop == StopReason(StopKind.LENGTH, "no_room_for_result")
    (record,) = run.trajectory.calls
    assert record.result == ExecutionResult("1")
    assert record.injected == ""


def test_rule_21_all_results_of_one_token_fit_or_none(cutter: Cutter) -> None:
    both = cutter.cut("<code>1</code><code>2</code>", "a")
    answers = {"1": "1", "2": "2"}
    fits = drive(new_row(cutter.vocabulary, max_new_tokens=1 + 2 * len(RESULT)), both, answers)
    assert fits.injected == ["<result>1</result><result>2</result>"]
    one_less = drive(new_row(cutter.vocabulary, max_new_tokens=2 * len(RESULT)), both, answers)
    assert one_less.injected == ["<result></result><result></result>"]
    not_even_empty = drive(new_row(cutter.vocabulary, max_new_tokens=2 * len("<result></result>")), both, answers)
    assert not_even_empty.injected == []
    assert not_even_empty.trajectory.stop == StopReason(StopKind.LENGTH, "no_room_for_result")


def test_rule_21_a_result_leaves_the_reserve(cutter: Cutter) -> None:
    needed = 1 + len(RESULT)
    for spare, text in [(4, "<result></result>"), (5, RESULT)]:
        row = new_row(cutter.vocabulary, max_new_tokens=needed + spare, reserve_tokens=5)
        run = drive(row, cutter.cut(BLOCK, *"abcdefgh"), {"1": "1"})
        assert run.injected == [text]
        assert run.trajectory.generation_length == needed + spare
    row = new_row(cutter.vocabulary, max_new_tokens=needed + 3, reserve_tokens=5)
    assert drive(row, cutter.cut(BLOCK), {"1": "1"}).injected == []


def test_rule_21_a_silent_block_needs_no_room(cutter: Cutter) -> None:
    run = drive(new_row(cutter.vocabulary, max_new_tokens=2, reserve_tokens=50), cutter.cut(BLOCK, "a"), {})
    assert run.outcomes == [Nothing()]
    assert run.text == f"{BLOCK}a"


def test_rule_21_a_prompt_that_leaves_no_room_is_refused(cutter: Cutter) -> None:
    for limits in ({"context": 3}, {"max_total_tokens": 3}, {"max_total_tokens": 2}):
        with pytest.raises(PromptError, match="no room is left to generate"):
            new_row(cutter.vocabulary, "Q: ", **limits)
    assert new_row(cutter.vocabulary, "Q: ", context=4).max_total_tokens == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("max_total_tokens", -1),
        ("max_tool_calls", -1),
        ("max_result_tokens", 0),
        ("max_result_characters", 0),
        ("reserve_tokens", -1),
        ("time_limit", 0.0),
        ("at_tool_call_limit", "shout"),
        ("stop_strings", "STOP"),
        ("stop_strings", ("",)),
        ("stop_ids", (-1,)),
    ],
)
def test_rule_21_impossible_limits_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=rf"Limits\.{field}"):
        Limits(**{field: value})
