"""What the example's page tells of its runs is what their figures say."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

from curve import draw

FOLDER = Path(__file__).parents[2] / "examples" / "learn_to_use_code"
RESULTS: list[dict[str, Any]] = json.loads((FOLDER / "results.json").read_text())
ROW = re.compile(r"^\| (is|is not) run \| (\d+) \|(.*)\|$", re.MULTILINE)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def test_every_run_is_told_as_it_was() -> None:
    told = {(run, int(seed)): cells.split("|") for run, seed, cells in ROW.findall((FOLDER / "README.md").read_text())}
    assert len(told) == len(RESULTS)
    for result in RESULTS:
        first, last = result["evaluations"][0], result["evaluations"][-1]
        assert [cell.strip() for cell in told["is" if result["execution"] else "is not", result["seed"]]] == [
            f"{percent(first['sampled']['reward'])} → {percent(last['sampled']['reward'])}",
            f"{percent(first['greedy']['reward'])} → {percent(last['greedy']['reward'])}",
            f"{percent(first['sampled']['writes_code'])} → {percent(last['sampled']['writes_code'])}",
            f"{result['processor_seconds']['training']:.0f} s",
            f"{(result['seconds']['training'] + result['seconds']['evaluation']) / 60:.0f} min",
        ]


def test_runs_are_whole_and_differ_in_execution_and_seed_alone() -> None:
    assert all(result["finished"] for result in RESULTS)
    assert len({json.dumps(result["plan"]) for result in RESULTS}) == 1
    assert {(result["execution"], result["seed"]) for result in RESULTS} == set(
        itertools.product([True, False], [0, 1, 2])
    )
    for result in RESULTS:
        plan = result["plan"]
        assert [entry["step"] for entry in result["training"]] == list(range(1, plan["steps"] + 1))
        assert [entry["step"] for entry in result["evaluations"]] == list(
            range(0, plan["steps"] + 1, plan["evaluate_every"])
        )


def test_it_is_learnt_with_execution_and_not_without() -> None:
    for result in RESULTS:
        last = result["evaluations"][-1]["sampled"]["reward"]
        assert (last >= 0.95) if result["execution"] else (last < 0.1)


def test_the_picture_can_be_drawn_again(tmp_path: Path) -> None:
    draw(RESULTS, tmp_path / "first.svg")
    draw(RESULTS, tmp_path / "again.svg")
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "again.svg").read_bytes()
