"""NeMo-RL's own rollout functions, its batches and its tokenising, with our environments as Ray actors.

The model is a script. ``make test-nemo-rl CHECKOUT=path``; skipped where NeMo-RL is not importable.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import midstream
from midstream.integrations import nemo_rl as ours
from tests.clusters import PATIENT

pytest.importorskip("nemo_rl", reason="NeMo-RL is not importable: make test-nemo-rl CHECKOUT=path")
pytestmark = [
    pytest.mark.slow,
    # Ray's, torch's and NeMo-RL's own warnings, processes and sockets are their affair.
    *(
        pytest.mark.filterwarnings(f"ignore::{kind}")
        for kind in ("ResourceWarning", "DeprecationWarning", "FutureWarning", "UserWarning")
    ),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

DEMO = Path(ours.__file__).parents[2] / "demo"
CONFIG = {"num_workers": 4, "terminate_on_evaluation": False, "sandbox": {"preload": []}}
SCRIPT = [
    ["<code>x = 3; y = 4</code>", "<code>x + y</code>", "<code>[x, y]</code>"],
    ["<code>import math</code>", "<code>math.floor(2.5)</code>", "<code>print(5)</code>"],
    ["<code>import os</code>", "no code", "<code>def</code>"],
    ["<code>raise SystemExit</code>", "<code>a = 1</code> <code>a</code>", "<code>a</code>"],
]
SAID = [
    ["", "<result>7</result>", "<result>[3, 4]</result>"],
    ["", "<result>2</result>", "<result>5</result>"],
    ["<result>PermissionError('Importing system and network modules is blocked')</result>", "", "SyntaxError"],
    ["SystemExit", "<result>1</result>", "<result>1</result>"],
]


@pytest.fixture(scope="module")
def nemo() -> Any:
    """Its modules, by the last parts of their names."""
    names = (
        "nemo_rl.experience.rollouts",
        "nemo_rl.distributed.batched_data_dict",
        "nemo_rl.environments.utils",
        "nemo_rl.environments.interfaces",
    )
    return {name.rpartition(".")[2]: importlib.import_module(name) for name in names}


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    import ray

    with (
        tempfile.TemporaryDirectory(prefix="mn", ignore_cleanup_errors=True) as home,
        pytest.MonkeyPatch.context() as environment,
    ):
        for name, value in {**PATIENT, "HOME": home}.items():
            environment.setenv(name, value)
        # A cluster of its own: without an address, Ray joins any other that this machine has.
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        yield ray
        ray.shutdown()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(DEMO)


class Scripted:
    """A policy that says each row's turns, and tells rows apart by the first word of their prompts."""

    cfg = {"backend": "vllm", "vllm_cfg": {"async_engine": True}}  # noqa: RUF012  # its users read it so

    def __init__(self, kind: Any, tokenizer: Any, script: list[list[str]] = SCRIPT) -> None:
        self._kind = kind
        self._tokenizer = tokenizer
        self._script = script
        self._turns = [0] * len(script)
        self.given: list[tuple[Any, bool]] = []

    def generate(self, data: Any, greedy: bool = False) -> Any:
        self.given.append((type(data), greedy))
        ids, lengths = data["input_ids"], data["input_lengths"].tolist()
        full = []
        for row, length in zip(ids.tolist(), lengths, strict=True):
            number = int(self._tokenizer.decode(row[:length])[0])
            said = self._script[number][self._turns[number]]
            self._turns[number] += 1
            full.append(row[:length] + self._tokenizer(said, add_special_tokens=False).input_ids)
        width = max(map(len, full))
        padded = [row + [self._tokenizer.pad_token_id] * (width - len(row)) for row in full]
        return self._kind(
            {
                "output_ids": torch.tensor(padded),
                "logprobs": torch.zeros(len(full), width),
                "generation_lengths": torch.tensor(
                    [len(row) - length for row, length in zip(full, lengths, strict=True)]
                ),
                "unpadded_sequence_lengths": torch.tensor([len(row) for row in full]),
                "truncated": torch.zeros(len(full), dtype=torch.bool),
            }
        )

    async def generate_async(self, data: Any, greedy: bool = False) -> AsyncIterator[Any]:
        await asyncio.sleep(0)
        yield 0, self.generate(data, greedy)


def batch_of(nemo: Any, tokenizer: Any, texts: list[str], stop: str) -> Any:
    logs = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
        logs.append([{"role": "user", "content": text, "token_ids": ids}])
    return nemo["batched_data_dict"].BatchedDataDict(
        {
            "message_log": logs,
            "extra_env_info": [ours.CodeEnvMetadata(context={}, working_dir="") for _ in texts],
            "task_name": ["task"] * len(texts),
            "stop_strings": [[stop] for _ in texts],
        }
    )


def check(batch: Any, said: list[list[str]]) -> None:
    for log, expected in zip(batch["message_log"], said, strict=True):
        answers = [message for message in log if message["role"] == "environment"]
        assert len(answers) == len(expected)
        for message, text in zip(answers, expected, strict=True):
            if text.startswith("<") or not text:
                assert message["content"] == text
            else:
                assert text in message["content"]


@pytest.mark.parametrize("function", ["run_multi_turn_rollout", "run_async_multi_turn_rollout"])
def test_its_rollouts_take_our_environment(nemo: Any, ray: Any, tokenizer: Any, function: str) -> None:
    batch = batch_of(nemo, tokenizer, [f"{row}+1=" for row in range(len(SCRIPT))], "</code>")
    actor = ours.CodeEnvironmentActor.remote(CONFIG)
    after, metrics = getattr(nemo["rollouts"], function)(
        policy_generation=Scripted(type(batch), tokenizer),
        input_batch=batch,
        tokenizer=tokenizer,
        task_to_env={"task": actor},
        max_seq_len=4096,
        max_rollout_turns=3,
    )
    check(after, SAID)
    assert metrics["total_turns"] == 3 * len(SCRIPT)
    same, found = ray.get(actor.global_post_process_and_metrics.remote(after))
    assert found == {}
    assert list(same["extra_env_info"]) == list(after["extra_env_info"])
    ray.get(actor.shutdown.remote())
    ray.kill(actor)


@pytest.mark.parametrize("function", ["run_multi_turn_rollout", "run_async_multi_turn_rollout"])
def test_an_evaluation_ends_its_rollout(nemo: Any, ray: Any, tokenizer: Any, function: str) -> None:
    batch = batch_of(nemo, tokenizer, [f"{row}+1=" for row in range(len(SCRIPT))], "</code>")
    actor = ours.CodeEnvironmentActor.remote({**CONFIG, "terminate_on_evaluation": True})
    after, _ = getattr(nemo["rollouts"], function)(
        policy_generation=Scripted(type(batch), tokenizer),
        input_batch=batch,
        tokenizer=tokenizer,
        task_to_env={"task": actor},
        max_seq_len=4096,
        max_rollout_turns=3,
    )
    check(after, [SAID[0][:2], SAID[1][:2], SAID[2], SAID[3][:2]])
    ray.kill(actor)


def test_what_a_step_gives_is_read_as_its_own_is(nemo: Any) -> None:
    assert ours.EnvironmentReturn._fields == nemo["interfaces"].EnvironmentReturn._fields


def test_its_registry_finds_them(nemo: Any, ray: Any) -> None:
    ours.register()
    ours.register()
    actor = nemo["utils"].create_env("midstream_code", CONFIG)
    log = [{"role": "assistant", "content": "<code>6 * 7</code>"}]
    assert ray.get(actor.step.remote([log], [None])).observations[0]["content"] == "<result>42</result>"
    ray.kill(actor)


def test_its_rollouts_take_our_search(nemo: Any, ray: Any, tokenizer: Any, tmp_path: Path) -> None:
    from datasets import Dataset

    path = tmp_path / "texts.parquet"
    Dataset.from_dict({"body": ["Cats purr.", "Dogs bark."]}).to_parquet(str(path))
    config = {"dataset_name": str(tmp_path), "dataset_split": "train", "text_column": "body", "num_results": 1}
    actor = ours.RAGEnvironmentActor.remote(config)
    log = [{"role": "assistant", "content": "<retrieve>bark</retrieve>"}]
    returned = ray.get(actor.step.remote([log], [{}]))
    assert returned.observations[0]["content"] == "<result>\n<1>\nDogs bark.\n</1>\n</result>\n"
    assert returned.terminateds.tolist() == [True]
    ray.kill(actor)


def test_the_drop_in_takes_its_batches_and_gives_them(nemo: Any, tokenizer: Any) -> None:
    kind = nemo["batched_data_dict"].BatchedDataDict
    turns = [["<code>x = 41</code>", "<code>x + 1</code>", "42"], ["no code"]]
    prompts = [tokenizer(f"{row}+1=", add_special_tokens=False).input_ids for row in range(2)]
    width = max(map(len, prompts))
    batch = kind(
        {
            "input_ids": torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids in prompts]),
            "input_lengths": torch.tensor([len(ids) for ids in prompts]),
            "stop_strings": [None, None],
        }
    )
    policy = Scripted(kind, tokenizer, turns)
    output = midstream.generate_with_code_and_tools(policy, batch, tokenizer, greedy=True)
    assert type(output) is kind
    assert policy.given == [(kind, True)] * len(policy.given)
    assert len(policy.given) == 3
    texts = [
        tokenizer.decode(ids[start:length])
        for ids, start, length in zip(
            output["output_ids"], batch["input_lengths"], output["unpadded_sequence_lengths"], strict=True
        )
    ]
    assert texts == ["<code>x = 41</code><code>x + 1</code><result>42</result>42", "no code"]
    assert output.select_indices([1])["generation_lengths"].tolist() == [len(tokenizer("no code").input_ids)]
    assert output["logprobs"].shape == output["output_ids"].shape
    assert output["truncated"].dtype == torch.bool
