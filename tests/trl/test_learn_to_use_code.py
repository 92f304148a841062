"""The example that teaches a model to use code, as a program, on a tiny budget: its files say what its rollouts say."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

pytest.importorskip("datasets", reason="TRL is not installed with what it needs: make test-trl")
pytest.importorskip("trl", reason="TRL is not installed: make test-trl")

import torch
from transformers import AutoModelForCausalLM

from midstream.records import Record, read_records, verify
from problem_sets import load_training_set
from problems import is_correct, prompt_text
from transcripts import END_OF_SEQUENCE, START_TAG

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.slow
RUNS = ("with-execution-5", "without-execution-5")
STEPS, ROWS = 2, 4 * 4
BUDGET = f"--seeds 5 --steps {STEPS} --prompts 4 --samples 4 --evaluate-every 1 --held-out-per-kind 2 --processes 1"


def evaluations_made(out: Path) -> int:
    """Runs the program to its end; how many evaluations it tells of."""
    program = [sys.executable, str(EXAMPLES / "learn_to_use_code" / "learn.py")]
    command = [*program, *BUDGET.split(), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.count("greedy")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("learn") / "out"
    assert evaluations_made(out) == len(RUNS) * (STEPS + 1)
    return out


def figures(out: Path, run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / f"{run}.json").read_text())
    return found


def records(out: Path, run: str) -> list[Record]:
    return list(read_records(out / f"{run}.jsonl"))


@pytest.mark.parametrize("run", RUNS)
def test_every_rollout_is_kept_and_sound(out: Path, run: str) -> None:
    kept = records(out, run)
    assert len(kept) == STEPS * ROWS
    assert [violation for record in kept for violation in verify(record)] == []
    assert run == RUNS[0] or not any(record.calls for record in kept)


@pytest.mark.parametrize("run", RUNS)
def test_rewards_are_what_the_records_say(out: Path, run: str) -> None:
    answers = {prompt_text(problem.question): problem.answer for problem in load_training_set()}
    rewards, coded = defaultdict[int, list[float]](list), defaultdict[int, list[float]](list)
    for record in records(out, run):
        trajectory = record.trajectory
        prompt = str(trajectory.prompt.text)
        right = is_correct(trajectory.text.removesuffix(END_OF_SEQUENCE), answers[prompt])
        assert record.reward == float(right)
        (step,) = {v for v, bit in zip(trajectory.weight_versions, trajectory.mask, strict=True) if bit}
        rewards[step].append(float(right))
        coded[step].append(float(START_TAG in trajectory.text))
    told = figures(out, run)["training"]
    assert [entry["step"] for entry in told] == [step + 1 for step in sorted(rewards)]
    for step, entry in enumerate(told):
        assert entry["reward"] == pytest.approx(sum(rewards[step]) / ROWS, abs=1e-4)
        assert entry["writes_code"] == pytest.approx(sum(coded[step]) / ROWS, abs=1e-4)


@pytest.mark.parametrize("run", RUNS)
def test_the_figures_of_a_run(out: Path, run: str) -> None:
    found = figures(out, run)
    assert found["finished"] is True
    assert found["execution"] is (run == RUNS[0])
    assert found["seed"] == 5
    assert found["machine"]["cores"] >= 1
    assert [evaluation["step"] for evaluation in found["evaluations"]] == [0, 1, 2]
    assert set(found["processor_seconds"]) == {"training", "evaluation", "sandboxes"}


@pytest.mark.parametrize("run", RUNS)
def test_the_model_that_comes_out_has_been_trained(out: Path, run: str) -> None:
    trained = AutoModelForCausalLM.from_pretrained(out / run).state_dict()
    start = AutoModelForCausalLM.from_pretrained(EXAMPLES / "learn_to_use_code" / "start").state_dict()
    assert set(trained) == set(start)
    assert any(not torch.equal(trained[name], start[name]) for name in start)


def test_all_figures_together_and_their_curves(out: Path) -> None:
    assert json.loads((out / "results.json").read_text()) == [figures(out, run) for run in RUNS]
    picture = ElementTree.parse(out / "curve.svg").getroot()
    lines = [group for group in picture.iter("{http://www.w3.org/2000/svg}g") if group.get("id", "").startswith("run")]
    # Reward and use of code: on held-out problems, sampled and greedy, and of the rollouts, of each run.
    assert len(lines) == 2 * 3 * len(RUNS)


def test_finished_runs_are_not_made_again(out: Path) -> None:
    before = {file: file.read_bytes() for file in out.iterdir() if file.is_file()}
    assert evaluations_made(out) == 0
    assert {file: file.read_bytes() for file in out.iterdir() if file.is_file()} == before
