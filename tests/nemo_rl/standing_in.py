"""Rollouts as NeMo-RL drives them, at the size of a test: turns of a script, an environment between them."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from midstream.integrations.nemo_rl import EnvironmentReturn

Batch = dict[str, list[Any]]
Script = Sequence[Sequence[str]]
"""What the model says in each turn, row by row."""


def metadata(working_dir: str = "", **context: Any) -> dict[str, Any]:
    return {"context": context, "working_dir": working_dir}


def asks(*texts: str) -> list[list[dict[str, str]]]:
    """Message logs whose last messages are these."""
    return [[{"role": "user", "content": "?"}, {"role": "assistant", "content": text}] for text in texts]


def code(*blocks: str) -> list[list[dict[str, str]]]:
    return asks(*(f"<code>{block}</code>" for block in blocks))


def contents(returned: EnvironmentReturn) -> list[str]:
    return [observation["content"] for observation in returned.observations]


class Actor:
    """An environment behind ``step.remote(...)``: what goes in and out is pickled, and calls come from any thread."""

    def __init__(self, environment: Any, calls: int = 16) -> None:
        self._environment = environment
        self._threads = ThreadPoolExecutor(calls)
        self.step = self

    def remote(self, logs: Any, rows: Any) -> Future[EnvironmentReturn]:
        sent = pickle.dumps((logs, rows))

        def call() -> EnvironmentReturn:
            returned = self._environment.step(*pickle.loads(sent))
            back: EnvironmentReturn = pickle.loads(pickle.dumps(returned))
            return back

        return self._threads.submit(call)

    def __enter__(self) -> Actor:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()


def rollout(actor: Actor, batch: Batch, script: Script, turns: int) -> torch.Tensor:
    """One batch in step: every row that still goes says its turn, then all are answered. Which rows have ended."""
    rows = len(batch["message_log"])
    ended = torch.zeros(rows, dtype=torch.bool)
    for turn in range(turns):
        active = [row for row in range(rows) if not ended[row]]
        if not active:
            break
        for row in active:
            batch["message_log"][row].append({"role": "assistant", "content": script[row][turn]})
        given = actor.remote(
            [batch["message_log"][row] for row in active], [batch["extra_env_info"][row] for row in active]
        ).result()
        observations, after, _stops, rewards, terminateds, answers = given
        assert rewards.dtype == torch.float32
        assert answers is None
        for place, row in enumerate(active):
            batch["message_log"][row].append(observations[place])
            if not terminateds[place] and after[place] is not None:
                batch["extra_env_info"][row] = after[place]
            ended[row] = terminateds[place]
    return ended


async def rollout_async(actor: Actor, batch: Batch, script: Script, turns: int) -> None:
    """Every row on its own, one call of the environment for each of its turns."""

    async def row(number: int) -> None:
        log = batch["message_log"][number]
        known = copy.deepcopy(batch["extra_env_info"][number])
        for turn in range(turns):
            log.append({"role": "assistant", "content": script[number][turn]})
            given = await asyncio.wrap_future(actor.remote([log], [known]))
            log.append(given.observations[0])
            if given.terminateds[0].item():
                break
            known = given.metadata[0]
        batch["extra_env_info"][number] = known

    await asyncio.gather(*(row(number) for number in range(len(batch["message_log"]))))
