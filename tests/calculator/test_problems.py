"""The problems are right, and the two sides of the split never meet."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

import pytest

from problems import (
    HELD_OUT_COUNTS,
    HELD_OUT_FILE,
    KINDS,
    is_correct,
    is_held_out,
    load_held_out,
    make_held_out,
    make_problem,
    parse_answer,
    prompt_text,
    save_problems,
    training_problems,
)
from tests.calculator.blocks import shown_by
from train import RECIPES, SEED


def test_the_held_out_file_is_what_its_program_writes(tmp_path: Any) -> None:
    save_problems(make_held_out(), tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == HELD_OUT_FILE.read_bytes()
    assert load_held_out() == make_held_out()


def test_held_out_problems_are_distinct_and_of_every_kind() -> None:
    problems = load_held_out()
    assert Counter(problem.kind for problem in problems) == HELD_OUT_COUNTS
    assert len({problem.id for problem in problems}) == len(problems)
    assert len({problem.question for problem in problems}) == len(problems)


def test_held_out_problems_all_fall_on_the_held_out_side() -> None:
    assert all(is_held_out(problem.operands) for problem in load_held_out())


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_training_never_meets_held_out_operands(name: str) -> None:
    """The very stream that training draws from, over its first problems."""
    held_out = {tuple(sorted(problem.operands)) for problem in load_held_out()}
    drawn = list(itertools.islice(training_problems(SEED, dict(RECIPES[name].shares)), 20_000))
    assert not any(is_held_out(problem.operands) for problem in drawn)
    assert held_out.isdisjoint(tuple(sorted(problem.operands)) for problem in drawn)
    assert {problem.question for problem in drawn}.isdisjoint(problem.question for problem in load_held_out())


def test_the_split_ignores_the_order_of_operands() -> None:
    pairs = [(str(a), str(b)) for a in range(10, 60) for b in range(10, 60)]
    assert all(is_held_out(pair) == is_held_out(pair[::-1]) for pair in pairs)
    share = sum(map(is_held_out, pairs)) / len(pairs)
    assert 0.03 < share < 0.1


def test_the_operands_are_all_that_the_question_gives() -> None:
    rng = random.Random(5)
    for kind, side in itertools.product(KINDS, (True, False)):
        for _ in range(200):
            problem = make_problem(rng, kind, held_out=side)
            assert is_held_out(problem.operands) is side
            assert all(operand in problem.question for operand in problem.operands)


def test_the_same_seed_gives_the_same_problems() -> None:
    shares = dict.fromkeys(KINDS, 1.0)
    first, again, other = (list(itertools.islice(training_problems(seed, shares), 300)) for seed in (7, 7, 8))
    assert first == again
    assert first != other


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_what_the_code_shows(kind: str) -> None:
    rng = random.Random(11)
    for _ in range(1500):
        problem = make_problem(rng, kind, held_out=False)
        namespace: dict[str, Any] = {}
        assert [shown_by(step.code, namespace) for step in problem.steps] == [step.shown for step in problem.steps]
        assert problem.steps[-1].shown == problem.answer


def test_numbers_stay_within_the_digits_asked_for() -> None:
    rng = random.Random(2)
    lengths = {
        len(operand)
        for _ in range(500)
        for operand in make_problem(rng, "arithmetic", held_out=False, maximum_digits=3).operands
    }
    assert lengths == {2, 3}


def test_two_step_problems_use_a_name_of_the_first_block_in_the_second() -> None:
    rng = random.Random(3)
    for _ in range(200):
        first, second = make_problem(rng, "two_step", held_out=False).steps
        assert second.code.split()[0] == first.code.split()[0]


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (" <code>6 * 7</code><result>42</result> The answer is 42.", "42"),
        ("\nThe answer is 'abc'.\n", "'abc'"),
        (" The answer is [12, 7].", "[12, 7]"),
        (" The answer is 1. The answer is 2.", "1. The answer is 2"),
        (" The answer is 42", None),
        (" The answer is 42. Or so", None),
        ("", None),
    ],
)
def test_parse_answer_reads_the_closing_sentence(completion: str, answer: str | None) -> None:
    assert parse_answer(completion) == answer


def test_only_the_exact_answer_is_correct() -> None:
    assert is_correct(" The answer is 42.", "42")
    assert not is_correct(" The answer is 042.", "42")
    assert not is_correct(" <result>42</result>", "42")


def test_prompt_ends_where_the_model_goes_on() -> None:
    assert prompt_text("Compute 6 * 7.") == "Q: Compute 6 * 7.\nA:"
