"""What the trainer is given is what was sampled: ids, mask and logprobs, through real steps of training."""

from __future__ import annotations

import functools
import gc
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="TRL is not installed with what it needs: make test-trl")
pytest.importorskip("datasets", reason="TRL is not installed with what it needs: make test-trl")
pytest.importorskip("trl", reason="TRL is not installed: make test-trl")

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import midstream as ms
from midstream.errors import ConfigurationError, ProtocolError
from midstream.integrations.trl import CodeEnvironment, Rollouts, SandboxFault, recorded_reward
from midstream.records import read_records, verify

pytestmark = [
    pytest.mark.slow,
    # TRL says that rollout_func is experimental, and torch that there is no accelerator to pin memory for.
    pytest.mark.filterwarnings("ignore:.*rollout_func:UserWarning", "ignore:.*pin_memory:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
MODEL = Path(ms.__file__).parent / "demo"
QUESTIONS = ["Q: Compute 68 - 64.\nA:", "Q: Compute 12 * 13.\nA:", "Q: Compute 5 + 777.\nA:", "Q: Compute 9 * 9.\nA:"]


@pytest.fixture(scope="module")
def pool() -> Iterator[ms.SandboxPool]:
    with ms.SandboxPool(preload=[]) as pool:
        yield pool


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trainer_of(
    folder: Path, rollouts: Any, reward: Callable[..., list[float]] | None = None, **options: Any
) -> GRPOTrainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 48,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "beta": 0.0,
    }
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(MODEL),
        reward_funcs=reward or length_reward,
        args=GRPOConfig(**(settings | options)),
        train_dataset=Dataset.from_dict({"prompt": QUESTIONS * 2, "number": list(range(len(QUESTIONS) * 2))}),
        rollout_func=rollouts,
    )


def length_reward(completions: list[str], **_columns: Any) -> list[float]:
    """Something that differs between samples, so that there is a gradient."""
    return [len(completion) / 100 for completion in completions]


def test_training_on_rollouts_with_code(tmp_path: Path, pool: ms.SandboxPool) -> None:
    given: list[dict[str, Any]] = []
    batches: list[dict[str, Any]] = []

    def reward(completions: list[str], **columns: Any) -> list[float]:
        given.append({"completions": completions, **columns})
        return length_reward(completions)

    with Rollouts(pool=pool, save_to=tmp_path / "rollouts.jsonl") as rollouts:
        trainer = trainer_of(tmp_path, rollouts, reward)
        scored = trainer._generate_and_score_completions

        def watched(inputs: Any) -> Any:
            batches.append(scored(inputs))
            return batches[-1]

        trainer._generate_and_score_completions = watched
        before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
        trainer.train()
        after = dict(trainer.model.named_parameters())
        assert trainer.model.training

    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert len(batches) == len(given) == 2
    for step, (batch, columns) in enumerate(zip(batches, given, strict=True)):
        trajectories = columns["trajectory"]
        assert len(trajectories) == 8
        assert {len(columns[name]) for name in ("calls", "stop_reason", "number")} == {8}
        for row, trajectory in enumerate(trajectories):
            start, count = len(trajectory.prompt_ids), trajectory.generation_length
            assert batch["completion_ids"][row][:count].tolist() == trajectory.ids[start:]
            assert batch["completion_mask"][row].sum() == count
            assert batch["tool_mask"][row][:count].tolist() == trajectory.mask[start:]
            prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
            assert prompt.tolist() == list(trajectory.prompt_ids)
            versions = {v for v, bit in zip(trajectory.weight_versions, trajectory.mask, strict=True) if bit}
            assert versions == {step}
            assert columns["completions"][row] == trainer.processing_class.decode(
                trajectory.ids[start:], skip_special_tokens=True
            )
        # Every prompt has its four samples, which differ as samples do.
        assert {trajectory.sample for trajectory in trajectories} == {0, 1, 2, 3}
    assert sum(sum(columns["calls"]) for columns in given) > 0
    records = list(read_records(tmp_path / "rollouts.jsonl"))
    assert len(records) == 16
    assert [violation for record in records for violation in verify(record)] == []
    assert len({tuple(record.trajectory.ids) for record in records}) > 8


def test_a_reward_of_the_rollouts_is_in_their_records_and_the_trainers(tmp_path: Path, pool: ms.SandboxPool) -> None:
    async def reward(trajectory: ms.Trajectory) -> float:
        return len(trajectory.text) / 100

    with Rollouts(pool=pool, reward=reward, save_to=tmp_path / "rollouts.jsonl") as rollouts:
        trainer = trainer_of(tmp_path, rollouts, recorded_reward, max_steps=1)
        trainer.train()
    records = list(read_records(tmp_path / "rollouts.jsonl"))
    assert [record.reward for record in records] == [len(record.trajectory.text) / 100 for record in records]
    (told,) = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert told == pytest.approx(sum(record.reward or 0.0 for record in records) / len(records))


def test_a_reward_that_is_missing_ends_the_training(tmp_path: Path, pool: ms.SandboxPool) -> None:
    def fails(trajectory: ms.Trajectory) -> float:
        raise ZeroDivisionError("by nothing")

    with (
        Rollouts(pool=pool, reward=fails) as rollouts,
        pytest.raises(ConfigurationError, match="ZeroDivisionError: by nothing"),
    ):
        trainer_of(tmp_path, rollouts, recorded_reward, max_steps=1).train()
    with Rollouts(pool=pool) as rollouts, pytest.raises(ConfigurationError, match="given none"):
        trainer_of(tmp_path, rollouts, recorded_reward, max_steps=1).train()
    with pytest.raises(ConfigurationError, match="reward=1"):
        Rollouts(reward=1)  # type: ignore[arg-type]


def test_no_gradient_comes_from_injected_ids(tmp_path: Path, pool: ms.SandboxPool) -> None:
    """The loss does not move with the logprob of any injected id, and does with that of every other; and the logprobs
    that training computes are those that were recorded when the ids were sampled."""
    recorded: list[ms.Trajectory] = []

    def reward(completions: list[str], trajectory: list[ms.Trajectory], **columns: Any) -> list[float]:
        recorded.extend(trajectory)
        return length_reward(completions)

    with Rollouts(pool=pool) as rollouts:
        trainer = trainer_of(tmp_path, rollouts, reward)
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        kept: list[torch.Tensor] = []

        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            output.log_probs.retain_grad()
            kept.append(output.log_probs)

        hook = trainer.model.register_forward_hook(keep)
        trainer.compute_loss(trainer.model, inputs).backward()
        hook.remove()
    (logprobs,) = kept
    assert logprobs.grad is not None
    width = inputs["completion_ids"].shape[1]
    gradient = logprobs.grad[:, -width:]
    injected = inputs["completion_mask"].bool() & ~inputs["tool_mask"].bool()
    sampled = inputs["completion_mask"].bool() & inputs["tool_mask"].bool() & (inputs["advantages"] != 0).unsqueeze(1)
    assert injected.any()
    assert (gradient[injected] == 0).all()
    assert (gradient[sampled] != 0).all()
    for row, ids in enumerate(inputs["completion_ids"]):
        count = int(inputs["completion_mask"][row].sum())
        trajectory = next(t for t in recorded if t.ids[len(t.prompt_ids) :] == ids[:count].tolist())
        mask = inputs["tool_mask"][row][:count].bool()
        then = torch.tensor(trajectory.logprobs[len(trajectory.prompt_ids) :])
        torch.testing.assert_close(logprobs[row, -width:][:count][mask].detach(), then[mask], atol=2e-4, rtol=1e-4)


def test_tools_and_conversations(tmp_path: Path, pool: ms.SandboxPool) -> None:
    asked: list[int] = []

    def double(x: int) -> int:
        """Twice x."""
        asked.append(x)
        return 2 * x

    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ '\\n' }}A:{% endif %}"

    engine = ms.ScriptedEngine(AutoTokenizer.from_pretrained(MODEL), ["<code>double(21)</code> it is", ""])
    with Rollouts(pool=pool, tools=[double], engine=lambda trainer: engine) as rollouts:
        trainer = trainer_of(tmp_path, rollouts)
        trainer.processing_class.chat_template = template
        output = rollouts([[{"role": "user", "content": "Q: Compute 1 + 1."}]] * 2, trainer)
    assert asked == [21]
    text = trainer.processing_class.decode(output["prompt_ids"][0])
    assert text == "Q: Compute 1 + 1.\nA:"
    assert "<result>42</result>" in trainer.processing_class.decode(output["completion_ids"][0])
    assert 0 < sum(output["env_mask"][0]) < len(output["env_mask"][0])
    # The trainer reads the last id of each: none may be empty.
    assert all(len(ids) >= 1 for ids in output["completion_ids"])
    for ids, logprobs, mask in zip(output["completion_ids"], output["logprobs"], output["env_mask"], strict=True):
        assert len(ids) == len(logprobs) == len(mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2"),
        ({"generation_kwargs": {"num_beams": 2}}, "generation_kwargs"),
    ],
)
def test_what_would_be_ignored_is_refused(
    tmp_path: Path, pool: ms.SandboxPool, options: dict[str, Any], message: str
) -> None:
    with Rollouts(pool=pool) as rollouts:
        trainer = trainer_of(tmp_path, rollouts, **options)
        with pytest.raises(ConfigurationError, match=message):
            rollouts(QUESTIONS, trainer)


def test_closed_rollouts_leave_nothing_and_refuse(tmp_path: Path) -> None:
    gc.collect()
    threads = set(threading.enumerate())
    rollouts = Rollouts()
    trainer = trainer_of(tmp_path, rollouts)
    rollouts(QUESTIONS[:1], trainer)
    rollouts.close()
    rollouts.close()
    assert not [t for t in threading.enumerate() if t not in threads and "midstream" in t.name]
    with pytest.raises(ConfigurationError, match="closed"):
        rollouts(QUESTIONS[:1], trainer)


def test_an_interpreter_for_the_trainers_own_loop(pool: ms.SandboxPool) -> None:
    before = len(os.listdir("/proc/self/fd"))
    factory = functools.partial(CodeEnvironment, pool)
    first, second = factory(), factory()
    first.reset(prompt="p", number=1)
    second.reset()
    first.run_python("x = 4")
    assert first.run_python("x + 1") == "5"
    assert "NameError" in second.run_python("x")
    first.reset()
    assert "NameError" in first.run_python("x")
    first.close()
    second.close()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_that_loop_shows_the_model_what_its_call_got_wrong_and_no_fault_of_the_sandbox() -> None:
    pool = ms.SandboxPool(preload=[])
    environment = CodeEnvironment(pool)
    with pytest.raises(TypeError, match="must be a string"):
        environment.run_python(code=5)  # type: ignore[arg-type]
    pool.close()
    trainer: Any = SimpleNamespace(
        max_tool_calling_iterations=1,
        _sync_tool_dicts=[{"run_python": environment.run_python}],
        _async_tool_dicts=[{}],
    )
    call = {"type": "function", "function": {"name": "run_python", "arguments": {"code": "1"}}}
    said = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(SandboxFault, match="closed") as raised:
        GRPOTrainer._tool_call_loop(trainer, [[]], [[1]], [[2]], [said], None, None, {})
    assert isinstance(raised.value.__cause__, ProtocolError)
