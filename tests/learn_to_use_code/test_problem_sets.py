"""The problems to learn from and those that are held out are fixed, and never meet."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from problem_sets import (
    KINDS,
    TRAINING_COUNT,
    TRAINING_FILE,
    load_held_out_set,
    load_training_set,
    make_training_set,
)
from problems import HELD_OUT_COUNTS, is_held_out, save_problems


def test_the_training_file_is_what_its_program_writes(tmp_path: Path) -> None:
    save_problems(make_training_set(), tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == TRAINING_FILE.read_bytes()
    assert load_training_set() == make_training_set()


def test_no_problem_is_on_both_sides() -> None:
    training, held_out = load_training_set(), load_held_out_set()
    assert not any(is_held_out(problem.operands) for problem in training)
    assert all(is_held_out(problem.operands) for problem in held_out)
    assert {tuple(sorted(problem.operands)) for problem in training}.isdisjoint(
        tuple(sorted(problem.operands)) for problem in held_out
    )


def test_what_is_on_each_side() -> None:
    training, held_out = load_training_set(), load_held_out_set()
    assert len({problem.question for problem in training}) == len(training) == TRAINING_COUNT
    kinds = Counter(problem.kind for problem in training)
    assert set(kinds) == set(KINDS)
    assert min(kinds.values()) > TRAINING_COUNT / 4
    assert Counter(problem.kind for problem in held_out) == {kind: HELD_OUT_COUNTS[kind] for kind in KINDS}
    assert Counter(problem.kind for problem in load_held_out_set(5)) == dict.fromkeys(KINDS, 5)
