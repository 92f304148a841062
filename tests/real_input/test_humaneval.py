"""HumanEval's canonical solutions and their tests, each problem in one session: all pass.

The problems are github.com/openai/human-eval's, MIT.
"""

from __future__ import annotations

import gzip
import json

import pytest

import midstream as ms
from benchmarks.data import DataMissing, data_file


@pytest.fixture(scope="session")
def problems() -> list[dict[str, str]]:
    try:
        path = data_file("HumanEval.jsonl.gz")
    except DataMissing as missing:
        pytest.skip(str(missing))
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_every_canonical_solution_passes_its_tests_in_a_session(
    problems: list[dict[str, str]], pool: ms.SandboxPool
) -> None:
    shown = {}
    for problem in problems:
        with pool.session(seed=0) as session:
            blocks = (
                problem["prompt"] + problem["canonical_solution"],
                problem["test"],
                f"check({problem['entry_point']})",
            )
            shown[problem["task_id"]] = [session.run(block).text for block in blocks]
    assert len(shown) == 164
    assert {task: texts for task, texts in shown.items() if any(texts)} == {}


def test_a_wrong_solution_fails_every_one_of_them(problems: list[dict[str, str]], pool: ms.SandboxPool) -> None:
    passed = []
    for problem in problems:
        with pool.session(seed=0) as session:
            session.run(problem["prompt"] + problem["canonical_solution"])
            session.run(problem["test"])
            if session.run("check(lambda *arguments: object())").error is None:
                passed.append(problem["task_id"])
    assert passed == []
