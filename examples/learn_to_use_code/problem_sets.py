"""The problems to learn from and the held-out ones, both fixed in files before any training.

    python examples/learn_to_use_code/problem_sets.py    # writes train.jsonl again, byte for byte

They are the calculator's problems. Which side a problem is on depends on a hash of its operands alone, so no operands
of a held-out problem are ever met in training. Problems with words are left out: half of them are answered right
without any code.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "calculator"))

from problems import FixedProblem, load_held_out, load_problems, save_problems, training_problems

KINDS = ("arithmetic", "two_step", "list")
TRAINING_FILE = Path(__file__).with_name("train.jsonl")
TRAINING_SEED = 20_260_301
TRAINING_COUNT = 1600


def make_training_set() -> list[FixedProblem]:
    """The problems to learn from, made anew: what ``train.jsonl`` holds. No question comes twice."""
    drawn = training_problems(TRAINING_SEED, dict.fromkeys(KINDS, 1.0))
    distinct: dict[str, FixedProblem] = {}
    while len(distinct) < TRAINING_COUNT:
        problem = next(drawn)
        fixed = FixedProblem(
            f"train-{len(distinct):04d}", problem.kind, problem.question, problem.answer, problem.operands
        )
        distinct.setdefault(problem.question, fixed)
    return list(distinct.values())


def load_training_set() -> list[FixedProblem]:
    """The problems to learn from, in the order of their file."""
    return load_problems(TRAINING_FILE)


def load_held_out_set(count_per_kind: int | None = None) -> list[FixedProblem]:
    """The calculator's held-out problems of ``KINDS``; the first ``count_per_kind`` of each, or all."""
    problems = load_held_out()
    sides = ([problem for problem in problems if problem.kind == kind] for kind in KINDS)
    return list(itertools.chain.from_iterable(side[:count_per_kind] for side in sides))


if __name__ == "__main__":
    save_problems(make_training_set(), TRAINING_FILE)
