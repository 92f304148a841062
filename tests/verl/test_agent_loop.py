"""verl's own worker over our agent loop: what training is given is what its server sampled."""

from __future__ import annotations

import asyncio
import copy
import gc
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("verl", reason="verl is not installed: make test-verl")

import hydra
import torch
import verl
from omegaconf import DictConfig, open_dict
from verl.experimental.agent_loop import agent_loop
from verl.experimental.agent_loop.agent_loop import AgentLoopWorker
from verl.protocol import DataProto

import midstream as ms
from midstream.errors import ConfigurationError, EngineError, ProtocolError
from midstream.integrations import verl as integration
from midstream.integrations.verl import CodeAgentLoop
from midstream.records import read_records, verify
from tests.rollouts import LONG, Gate
from tests.verl.served import ServedRows

pytestmark = pytest.mark.slow
MODEL = Path(ms.__file__).parent / "demo"
PROMPT_LENGTH, RESPONSE_LENGTH = 32, 64
GATE = Gate()


class Loop(CodeAgentLoop):
    tools = (ms.tool(GATE, name="gate"),)
    limits = ms.Limits(max_tool_calls=3)
    sandbox: Mapping[str, Any] = {"preload": []}

    async def score(self, trajectory: ms.Trajectory, columns: Mapping[str, Any]) -> float | None:
        return float(columns["answer"] in trajectory.text)


class Unscored(CodeAgentLoop):
    sandbox: Mapping[str, Any] = {"preload": []}


@pytest.fixture(scope="module")
def config() -> DictConfig:
    """verl's defaults, for a model and a server as small as they can be."""
    folder = str(Path(verl.__file__).parent / "trainer" / "config")
    with hydra.initialize_config_dir(folder, version_base=None):
        config = hydra.compose("ppo_trainer")
    with open_dict(config):
        model, rollout = config.actor_rollout_ref.model, config.actor_rollout_ref.rollout
        model.path = str(MODEL)
        model.custom_chat_template = (
            "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}{{ '\\nA:' }}{% endif %}"
        )
        rollout.name = "vllm"
        rollout.prompt_length, rollout.response_length = PROMPT_LENGTH, RESPONSE_LENGTH
        rollout.calculate_log_probs = True
    return config


@pytest.fixture(autouse=True)
def _loops() -> Iterator[None]:
    """The loops are registered, and leave neither threads nor rows."""
    before = set(threading.enumerate())
    registry = dict(agent_loop._agent_loop_registry)
    agent_loop.register("midstream")(Loop)
    agent_loop.register("unscored")(Unscored)
    GATE.opened.clear()
    GATE.reached.clear()
    yield
    GATE.opened.set()
    integration.shutdown()
    agent_loop._agent_loop_registry.clear()
    agent_loop._agent_loop_registry.update(registry)
    assert not [t for t in set(threading.enumerate()) - before if t.name.startswith("midstream")]


def worker_of(config: DictConfig, texts: Mapping[str, Sequence[str]], **options: Any) -> tuple[Any, ServedRows]:
    worker = AgentLoopWorker(config, None)
    worker.llm_client = served = ServedRows(
        worker.tokenizer, {f"{question}\nA:": said for question, said in texts.items()}, **options
    )
    return worker, served


def batch_of(questions: Sequence[str], name: str = "midstream", **meta: Any) -> DataProto:
    conversations = np.empty(len(questions), dtype=object)
    conversations[:] = [[{"role": "user", "content": question}] for question in questions]
    return DataProto.from_dict(
        tensors={"dummy": torch.zeros(len(questions), 1)},
        non_tensors={
            "raw_prompt": conversations,
            "agent_name": np.array([name] * len(questions), dtype=object),
            "answer": np.array(["41"] * len(questions), dtype=object),
            "uid": np.array([f"u{place}" for place in range(len(questions))], dtype=object),
        },
        meta_info=meta,
    )


SAID = {
    f"Compute {n}.": [f" <code>x = {n}; x + 1</code>", " and <code>x * 10</code>", f" so {n}."] for n in range(36, 44)
}


@pytest.mark.parametrize("overshoot", [0, 4])
async def test_a_batch_of_verls_worker(config: DictConfig, tmp_path: Path, overshoot: int) -> None:
    worker, served = worker_of(config, SAID, overshoot=overshoot)
    Loop.save_to = tmp_path
    try:
        output = await worker.generate_sequences(batch_of(list(SAID)))
    finally:
        Loop.save_to = None
        integration.shutdown()  # which closes the file
    (path,) = tmp_path.iterdir()
    records = {record.trajectory.prompt.metadata["uid"]: record for record in read_records(path)}
    assert [violation for record in records.values() for violation in verify(record)] == []
    for row, question in enumerate(SAID):
        trajectory = records[f"u{row}"].trajectory
        start, count = len(trajectory.prompt_ids), trajectory.generation_length
        n = int(question.split()[1].rstrip("."))
        said = f" <code>x = {n}; x + 1</code><result>{n + 1}</result> and <code>x * 10</code><result>{n * 10}</result>"
        assert worker.tokenizer.decode(output.batch["prompts"][row][-start:]) == f"{question}\nA:"
        assert output.batch["prompts"][row][-start:].tolist() == list(trajectory.prompt_ids)
        assert trajectory.text.startswith(said)
        assert output.batch["responses"][row][:count].tolist() == trajectory.ids[start:]
        assert output.batch["attention_mask"][row].sum() == start + count
        mask = output.batch["response_mask"][row]
        assert mask[:count].tolist() == trajectory.mask[start:]
        assert mask[count:].sum() == 0
        logprobs = output.batch["rollout_log_probs"][row]
        # Ids and logprobs are those that the server gave, at the places that it gave them for.
        for answer in served.answers[f"{question}\nA:"]:
            place = answer.position - start
            kept = mask[place : place + len(answer.ids)].tolist()
            for offset, (token_id, logprob) in enumerate(zip(answer.ids, answer.logprobs, strict=True)):
                if not all(kept[: offset + 1]):
                    break
                assert output.batch["responses"][row][place + offset] == token_id
                assert logprobs[place + offset] == pytest.approx(logprob)
        assert (logprobs[mask == 0] == 0).all()
        assert (
            int(mask.sum())
            == len(served.vocabulary.encode_text(SAID[question][0]))
            + sum(len(served.vocabulary.encode_text(text)) for text in SAID[question][1:])
            + 1
        )
        assert output.batch["rm_scores"][row].sum() == float("41" in trajectory.text)
    assert output.non_tensor_batch["calls"].tolist() == [2] * len(SAID)
    assert output.non_tensor_batch["stop_reason"].tolist() == ["end_of_sequence"] * len(SAID)
    assert output.non_tensor_batch["__num_turns__"].tolist() == [6] * len(SAID)
    metrics = output.meta_info["metrics"]
    assert all(row["generate_sequences"] > 0 and row["tool_calls"] > 0 for row in metrics)
    # Each row asks under one name, so that its prefix is where it was computed.
    assert len(served.sessions) == len(SAID)
    assert served.parameters[0]["stop"] == ["</code>"]
    assert served.under_way == 0


async def test_no_row_waits_for_another_nor_the_event_loop_for_any(config: DictConfig) -> None:
    """The slow row's tool returns only when all others are done, which takes the loop and the other rows to go on."""
    texts = {"Slow.": ["<code>gate()</code>", " done"], **SAID}
    worker, _ = worker_of(config, texts)
    slow = asyncio.create_task(worker.generate_sequences(batch_of(["Slow."])))
    assert await asyncio.to_thread(GATE.reached.wait, LONG)
    output = await worker.generate_sequences(batch_of(list(SAID)))
    assert output.non_tensor_batch["calls"].tolist() == [2] * len(SAID)
    assert not slow.done()
    GATE.opened.set()
    assert (await slow).non_tensor_batch["calls"].tolist() == [1]


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (["x" * 400], "length"),
        (["<code>'y' * 1000</code>", "z" * 400], "length"),
        (["<code>print('w' * 60)</code>" * 4, ""], "length"),
    ],
)
async def test_a_response_has_at_most_its_length(config: DictConfig, texts: list[str], reason: str) -> None:
    worker, _ = worker_of(config, {"Long.": texts})
    output = await worker.generate_sequences(batch_of(["Long."]))
    assert output.batch["responses"].shape == (1, RESPONSE_LENGTH)
    response = output.batch["attention_mask"][0][PROMPT_LENGTH:]
    assert response.sum() <= RESPONSE_LENGTH
    assert output.non_tensor_batch["stop_reason"].tolist() == [reason]
    if "code" not in texts[0]:
        assert response.sum() == RESPONSE_LENGTH


async def test_answers_that_a_server_aborts_are_gone_on_with(
    config: DictConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integration, "AFTER_ABORT", 0.0)
    question = "Compute 40."
    worker, served = worker_of(config, {question: SAID[question]}, abort_at={0: 3, 1: 0, 3: 1})
    output = await worker.generate_sequences(batch_of([question]))
    count = int(output.batch["attention_mask"][0][PROMPT_LENGTH:].sum())
    text = worker.tokenizer.decode(output.batch["responses"][0][: count - 1])
    assert text == (" <code>x = 40; x + 1</code><result>41</result> and <code>x * 10</code><result>400</result> so 40.")
    assert served.version == 3
    assert output.non_tensor_batch["min_global_steps"].tolist() == [0]
    assert output.non_tensor_batch["max_global_steps"].tolist() == [3]


async def test_a_fault_of_the_sandbox_is_not_trained_on_and_not_shown(
    config: DictConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from midstream.sandbox import Session

    async def fail(session: Session, code: str) -> ms.ExecutionResult:
        if "40" in code:
            raise ms.errors.SandboxError("the machine is out of sandboxes")
        return await run(session, code)

    run = Session.run_async
    monkeypatch.setattr(Session, "run_async", fail)
    worker, _ = worker_of(config, SAID)
    output = await worker.generate_sequences(batch_of(list(SAID)))
    reasons = output.non_tensor_batch["stop_reason"].tolist()
    failed = list(SAID).index("Compute 40.")
    assert [place for place, reason in enumerate(reasons) if reason == "sandbox_failure"] == [failed]
    assert output.batch["response_mask"].sum(dim=1).bool().tolist() == [place != failed for place in range(len(SAID))]
    assert "out of sandboxes" not in worker.tokenizer.decode(output.batch["responses"][failed])
    assert "out of sandboxes" in caplog.text


async def test_a_fault_of_the_server_is_raised(config: DictConfig) -> None:
    def fail(prompt: str) -> None:
        if "41" in prompt:
            raise ConnectionError("no server")

    worker, served = worker_of(config, SAID, at_answer=fail)
    with pytest.raises(EngineError, match="no server"):
        await worker.generate_sequences(batch_of(list(SAID)))
    integration.shutdown()
    async with asyncio.timeout(LONG):
        while served.under_way:  # it has been told, on this loop
            await asyncio.sleep(0)


async def test_a_batch_that_is_cancelled_leaves_nothing(config: DictConfig) -> None:
    worker, served = worker_of(config, {"Slow.": ["<code>gate()</code>", " done"], **SAID})
    task = asyncio.create_task(worker.generate_sequences(batch_of(["Slow."])))
    assert await asyncio.to_thread(GATE.reached.wait, LONG)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    (host,) = integration._hosts._hosts.values()
    GATE.opened.set()
    # Another row finds the engine without the one that was given up.
    await worker.generate_sequences(batch_of(["Compute 40."]))
    assert host.engine.open_rows == 0
    assert served.under_way == 0


async def test_sampling_is_verls(config: DictConfig) -> None:
    worker, served = worker_of(config, SAID)
    await worker.generate_sequences(batch_of(["Compute 40."], validate=True))
    assert served.parameters[0]["temperature"] == config.actor_rollout_ref.rollout.val_kwargs.temperature == 0
    output = await worker.generate_sequences(batch_of(["Compute 41."], "unscored"))
    assert served.parameters[-1]["temperature"] == 1.0
    assert served.parameters[-1]["max_tokens"] <= RESPONSE_LENGTH
    assert "rm_scores" not in output.batch  # left to verl's own reward


async def test_without_logprobs(config: DictConfig) -> None:
    silent = copy.deepcopy(config)
    silent.actor_rollout_ref.rollout.calculate_log_probs = False
    worker, _ = worker_of(silent, SAID)
    output = await worker.generate_sequences(batch_of(["Compute 41."]))
    assert "rollout_log_probs" not in output.batch
    assert output.batch["response_mask"].sum() > 0


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2"),
        ({"best_of": 3}, "best_of=3"),
    ],
)
async def test_what_would_be_ignored_is_refused(config: DictConfig, parameters: dict[str, Any], message: str) -> None:
    worker, _ = worker_of(config, SAID)
    loop = Loop(
        trainer_config=agent_loop.DictConfigWrap(config),
        server_manager=worker.llm_client,
        tokenizer=worker.tokenizer,
        processor=None,
        dataset_cls=worker.dataset_cls,
        data_config=agent_loop.DictConfigWrap(config.data),
    )
    with pytest.raises(ConfigurationError, match=message):
        await loop.run(parameters, raw_prompt=[{"role": "user", "content": "Compute 40."}])


async def test_a_server_that_is_gone_takes_its_sandboxes_along(config: DictConfig) -> None:
    worker, served = worker_of(config, SAID)
    await worker.generate_sequences(batch_of(["Compute 41."]))
    (host,) = integration._hosts._hosts.values()
    worker.llm_client = None
    del served
    gc.collect()
    assert not integration._hosts._hosts
    with pytest.raises(ProtocolError, match="closed"):
        host.generator.submit("prompt")
