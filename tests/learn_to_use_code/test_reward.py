"""What an answer is worth is decided by the text of its trajectory alone."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

import midstream as ms
from evaluation import AnswerReward, writes_code
from problem_sets import load_training_set
from problems import prompt_text
from train import DEMO_FOLDER

PROBLEM = load_training_set()[0]


@pytest.mark.parametrize(
    ("text", "reward", "code"),
    [
        (f" The answer is {PROBLEM.answer}.", 1.0, 0.0),
        (f" <code>{PROBLEM.answer}</code> The answer is {PROBLEM.answer}.", 1.0, 1.0),
        (f" <code>print('The answer is {PROBLEM.answer}.')</code>", 0.0, 1.0),
        (f" <code>reward = 1.0; answer = {PROBLEM.answer}</code> The answer is {PROBLEM.answer}0.", 0.0, 1.0),
        (f" The answer is {PROBLEM.answer}. Or not.", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_the_reward_is_for_the_closing_sentence(text: str, reward: float, code: float) -> None:
    engine = ms.ScriptedEngine(AutoTokenizer.from_pretrained(DEMO_FOLDER), [text])
    with ms.SandboxPool(preload=[]) as pool, ms.Generator(engine, pool=pool) as generator:
        batch = generator.generate([prompt_text(PROBLEM.question)], reward=AnswerReward.of([PROBLEM]))
    assert [trajectory.reward for trajectory in batch] == [reward]
    assert writes_code(list(batch)) == [code]
