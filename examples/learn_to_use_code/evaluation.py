"""How a model does on the held-out problems, and what a run has come to, kept in a file as it goes."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

import midstream as ms
from problem_sets import KINDS
from problems import FixedProblem, is_correct, prompt_text
from transcripts import END_OF_SEQUENCE, START_TAG

SAMPLED = ms.Sampling(temperature=1.0)
GREEDY = ms.Sampling(temperature=0.0)
EVALUATION_SEED = 7
"""The same noise at every evaluation of every run: what changes is the model."""


@dataclass(frozen=True, slots=True)
class AnswerReward:
    """1 for a trajectory that states exactly the right answer and ends there, else 0.

    It is computed here, from the trajectory; nothing in the sandbox that ran the model's code has a part in it.
    """

    answers: Mapping[str, str]

    @classmethod
    def of(cls, problems: Sequence[FixedProblem]) -> AnswerReward:
        return cls({prompt_text(problem.question): problem.answer for problem in problems})

    def __call__(self, trajectory: ms.Trajectory) -> float:
        completion = trajectory.text.removesuffix(END_OF_SEQUENCE)
        return float(is_correct(completion, self.answers[str(trajectory.prompt.text)]))


def writes_code(trajectory: Sequence[ms.Trajectory], **_columns: Any) -> list[float]:
    """1 for each trajectory whose model began a block of code, else 0; in the form of TRL's reward functions."""
    return [float(START_TAG in t.text) for t in trajectory]


def evaluate(generator: ms.Generator, problems: Sequence[FixedProblem]) -> dict[str, Any]:
    """One answer to each problem: mean reward in all and by kind, and the share of answers with code."""
    prompts = [ms.Prompt(text=prompt_text(problem.question), id=problem.id) for problem in problems]
    batch = generator.generate(prompts, reward=AnswerReward.of(problems))
    rewards = [float(trajectory.reward or 0.0) for trajectory in batch]
    by_kind = {
        kind: [reward for reward, problem in zip(rewards, problems, strict=True) if problem.kind == kind]
        for kind in KINDS
    }
    return {
        "reward": mean(rewards),
        "writes_code": mean(writes_code(list(batch))),
        "by_kind": {kind: mean(of_kind) for kind, of_kind in by_kind.items()},
    }


def mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)


class Progress(TrainerCallback):
    """Evaluates before training and every ``every`` steps, and writes all figures of the run to ``file`` each time.

    ``facts`` are what the file says of the run besides. ``pool`` has the sandboxes; without one no code is run.
    Seconds are of the wall clock and of this process's processor time, those of training apart from those of
    evaluation.
    """

    def __init__(
        self,
        file: Path,
        facts: Mapping[str, Any],
        problems: Sequence[FixedProblem],
        every: int,
        limits: ms.Limits,
        pool: ms.SandboxPool | None,
    ) -> None:
        self.file = file
        self.problems = problems
        self.every = every
        self.limits = limits
        self.pool = pool
        self.seconds = {"training": 0.0, "evaluation": 0.0}
        self.processor_seconds = {"training": 0.0, "evaluation": 0.0}
        self.last = (time.monotonic(), time.process_time())
        self.figures: dict[str, Any] = {**facts, "machine": machine(), "evaluations": [], "training": []}

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **objects: Any) -> None:
        self.last = (time.monotonic(), time.process_time())
        self._evaluate(state.global_step, **objects)

    def on_step_end(self, _args: Any, state: Any, _control: Any, **objects: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._evaluate(state.global_step, **objects)

    def on_log(
        self,
        _args: Any,
        state: Any,
        _control: Any,
        logs: dict[str, float] | None = None,
        **_objects: Any,
    ) -> None:
        """What TRL tells of each step: its rollouts' reward, how many wrote code, how long they were."""
        if logs is not None and "reward" in logs:
            self.figures["training"].append(
                {
                    "step": state.global_step,
                    "reward": round(logs["reward"], 4),
                    "writes_code": round(logs["rewards/writes_code/mean"], 4),
                    "mean_length": round(logs["completions/mean_length"], 1),
                }
            )
            self._save()

    def finish(self) -> None:
        """The run is over, and its sandboxes, whose processor time is known from then on, are closed."""
        spent = os.times()
        self.figures["finished"] = True
        self.processor_seconds["sandboxes"] = spent.children_user + spent.children_system
        self._save()

    def _evaluate(self, step: int, model: Any, processing_class: Any, **_objects: Any) -> None:
        self._clock("training")
        was_training = model.training
        model.eval()
        engine = ms.HuggingFaceEngine(model, processing_class, max_batch_size=64)
        found: dict[str, Any] = {"step": step}
        for name, sampling in (("sampled", SAMPLED), ("greedy", GREEDY)):
            with ms.Generator(
                engine,
                markup=None if self.pool is None else ms.CODE_TAGS,
                limits=self.limits,
                sampling=sampling,
                pool=self.pool,
                seed=EVALUATION_SEED,
            ) as generator:
                found[name] = evaluate(generator, self.problems)
        model.train(was_training)
        self._clock("evaluation")
        self.figures["evaluations"].append(found | {"training_seconds": round(self.seconds["training"], 1)})
        self._save()
        print(
            f"{self.file.stem}, step {step}: reward {found['sampled']['reward']:.1%} sampled, "
            f"{found['greedy']['reward']:.1%} greedy; {found['sampled']['writes_code']:.1%} write code; "
            f"{self.processor_seconds['training']:.0f} processor seconds of training",
            flush=True,
        )

    def _clock(self, spent_on: str) -> None:
        now = (time.monotonic(), time.process_time())
        self.seconds[spent_on] += now[0] - self.last[0]
        self.processor_seconds[spent_on] += now[1] - self.last[1]
        self.last = now

    def _save(self) -> None:
        """Never half a file: whoever reads it finds the figures up to some step."""
        self.figures["seconds"] = {name: round(spent, 1) for name, spent in self.seconds.items()}
        self.figures["processor_seconds"] = {name: round(spent, 1) for name, spent in self.processor_seconds.items()}
        beside = self.file.with_suffix(".new")
        beside.write_text(json.dumps(self.figures, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, self.file)


def machine() -> dict[str, Any]:
    """What a run was made on."""
    return {
        "processor": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "trl": version("trl"),
        "midstream": version("midstream"),
    }
