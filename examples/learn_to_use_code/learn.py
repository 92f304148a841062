"""Teaches a small language model to use code, by nothing but whether its answers are right.

    make learn

The model can write code but seldom does. TRL's ``GRPOTrainer`` trains it on midstream's rollouts, with the answer's
correctness as the reward; and, to see that it is the code that does it, once more without running any. Each run is a
process of one thread. What is in the folder ``--out`` then: each run's figures and its final model, every rollout
(``midstream view``, ``check``), all figures together in ``results.json``, and ``curve.svg``. Runs that are finished
already are not made again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from datasets import Dataset, disable_progress_bars
from trl import GRPOConfig, GRPOTrainer

import midstream as ms
from curve import draw
from evaluation import AnswerReward, Progress, writes_code
from midstream.integrations.trl import Rollouts, recorded_reward
from problem_sets import load_held_out_set, load_training_set
from problems import prompt_text

START = Path(__file__).with_name("start")
LIMITS = ms.Limits(max_new_tokens=128, max_tool_calls=4)


@dataclass(frozen=True, slots=True)
class Plan:
    """The budget of a run. Steps are counted, not minutes: a busy machine makes the same model, only later.

    A step samples ``samples`` answers to each of ``prompts`` problems. ``evaluate_every`` is in steps;
    ``held_out_per_kind`` is how many held-out problems of each kind are asked (None: all).
    """

    steps: int = 60
    prompts: int = 16
    samples: int = 8
    learning_rate: float = 6e-4
    evaluate_every: int = 10
    held_out_per_kind: int | None = None


def learn(plan: Plan, seed: int, execution: bool, out: Path) -> None:
    """One run, from the starting model to a trained one in ``out``."""
    name = name_of(seed, execution)
    problems = load_training_set()
    facts = {"execution": execution, "seed": seed, "plan": asdict(plan)}
    tokenizer = transformers.AutoTokenizer.from_pretrained(START)
    (out / f"{name}.jsonl").unlink(missing_ok=True)
    with (
        ms.SandboxPool(preload=[]) if execution else nullcontext() as pool,
        Rollouts(
            markup=ms.CODE_TAGS if execution else None,
            limits=LIMITS,
            pool=pool,
            max_batch_size=plan.prompts * plan.samples,
            reward=AnswerReward.of(problems),
            save_to=out / f"{name}.jsonl",
        ) as rollouts,
    ):
        held_out = load_held_out_set(plan.held_out_per_kind)
        progress = Progress(out / f"{name}.json", facts, held_out, plan.evaluate_every, LIMITS, pool)
        trainer = GRPOTrainer(
            model=transformers.AutoModelForCausalLM.from_pretrained(START, dtype=torch.float32),
            processing_class=tokenizer,
            reward_funcs=[recorded_reward, writes_code],
            args=training_options(plan, seed, out / name),
            train_dataset=Dataset.from_dict({"prompt": [prompt_text(problem.question) for problem in problems]}),
            rollout_func=rollouts,
            callbacks=[progress],
        )
        trainer.remove_callback(transformers.PrinterCallback)  # Progress prints less
        trainer.train()
        trainer.save_model()
    progress.finish()  # the sandboxes are closed, so their processor time is known


def name_of(seed: int, execution: bool) -> str:
    return f"{'with' if execution else 'without'}-execution-{seed}"


def is_finished(file: Path, plan: Plan) -> bool:
    """Whether these are the figures of a whole run on this plan, which need not be made again."""
    if not file.exists():
        return False
    figures = json.loads(file.read_text(encoding="utf-8"))
    return figures.get("finished", False) and figures["plan"] == asdict(plan)


def training_options(plan: Plan, seed: int, folder: Path) -> GRPOConfig:
    """GRPO with one update for each batch of rollouts and no reference model."""
    return GRPOConfig(
        output_dir=str(folder),
        seed=seed,
        max_steps=plan.steps,
        per_device_train_batch_size=plan.prompts * plan.samples,
        num_generations=plan.samples,
        learning_rate=plan.learning_rate,
        reward_weights=[1.0, 0.0],  # whether it wrote code is only watched
        max_completion_length=LIMITS.max_new_tokens,
        temperature=1.0,
        beta=0.0,
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def run(plan: Plan, seed: int, execution: bool, out: Path) -> None:
    """A run in a process of its own: one thread, and quiet."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bars()
    # What TRL says of its own doing: that rollout_func is experimental, and an attribute of transformers deprecated.
    warnings.filterwarnings("ignore", message=".*(rollout_func|is_gradient_checkpointing)")
    learn(plan, seed, execution, out)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/learn_to_use_code"), help="where everything goes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--execution", choices=["with", "without"], nargs="+", default=["with", "without"])
    parser.add_argument("--processes", type=int, default=2, help="runs at a time (default: 2)")
    for field, default in asdict(Plan()).items():
        kind = float if isinstance(default, float) else int
        parser.add_argument(f"--{field.replace('_', '-')}", type=kind, default=default, help=f"default: {default}")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    plan = Plan(**{field: getattr(options, field) for field in asdict(Plan())})
    options.out.mkdir(parents=True, exist_ok=True)
    # Runs beside one another: each has one thread, and none spins while it waits.
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    files: dict[tuple[int, bool], Path] = {}
    for which, seed in itertools.product(options.execution, options.seeds):
        execution = which == "with"
        files[seed, execution] = options.out / f"{name_of(seed, execution)}.json"
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as workers:
        running = [
            workers.submit(run, plan, seed, execution, options.out)
            for (seed, execution), file in files.items()
            if not is_finished(file, plan)
        ]
        for future in running:
            future.result()
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files.values()]
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw(results, options.out / "curve.svg")


if __name__ == "__main__":
    main()
