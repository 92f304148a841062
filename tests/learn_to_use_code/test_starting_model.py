"""The model that learning starts from: made by its program, able to write code, and seldom doing so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import midstream as ms
from evaluation import GREEDY, SAMPLED, AnswerReward, evaluate, writes_code
from problem_sets import load_held_out_set
from problems import prompt_text
from starting_model import FOLDER, RECIPE, SEED, train_starting_model
from train import DEMO_FOLDER

pytestmark = pytest.mark.slow
LIMITS = ms.Limits(max_new_tokens=128, max_tool_calls=4)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def engine() -> ms.HuggingFaceEngine:
    return ms.HuggingFaceEngine.from_pretrained(str(FOLDER), max_batch_size=64)


def test_its_program_makes_the_same_model_every_time(tmp_path: Path) -> None:
    recipe = replace(RECIPE, steps=3, batch_size=4, warm_up_steps=1)
    for name in ("first", "again"):
        train_starting_model(recipe, SEED, tmp_path / name)
    first, again = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("first", "again"))
    before = AutoModelForCausalLM.from_pretrained(DEMO_FOLDER).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], before[name]) for name in first)


def test_what_is_shipped_is_small_and_reads_as_the_calculators_model_does() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 4_000_000
    tokenizers = [json.loads((folder / "tokenizer.json").read_text()) for folder in (FOLDER, DEMO_FOLDER)]
    assert tokenizers[0] == tokenizers[1]


def test_it_can_write_code_and_seldom_does(engine: ms.HuggingFaceEngine) -> None:
    problems = load_held_out_set(16)
    answers = AnswerReward.of(problems)
    with (
        ms.SandboxPool(preload=[]) as pool,
        ms.Generator(engine, limits=LIMITS, sampling=SAMPLED, pool=pool) as generator,
    ):
        batch = generator.generate([prompt_text(problem.question) for problem in problems], n=8, reward=answers)
    coded = [trajectory for trajectory, code in zip(batch, writes_code(list(batch)), strict=True) if code]
    assert 0.1 < len(coded) / len(batch) < 0.4
    assert sum(trajectory.reward or 0.0 for trajectory in coded) > 0.7 * len(coded)
    assert sum(trajectory.reward or 0.0 for trajectory in batch) < 0.4 * len(batch)


def test_without_execution_it_answers_few(engine: ms.HuggingFaceEngine) -> None:
    with ms.Generator(engine, markup=None, limits=LIMITS, sampling=GREEDY) as generator:
        found = evaluate(generator, load_held_out_set(10))
    assert found["reward"] < 0.3
    assert found["reward"] == pytest.approx(sum(found["by_kind"].values()) / 3, abs=1e-3)
