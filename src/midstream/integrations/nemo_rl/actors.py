"""The environments as Ray actors. Importing this needs Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from midstream.integrations.nemo_rl.code import CodeEnvironment
from midstream.integrations.nemo_rl.interface import EnvironmentReturn, MessageLog
from midstream.integrations.nemo_rl.retrieval import RAGEnvironment

# Every method is a coroutine, so that a step never keeps the next one waiting: an async rollout makes one for each row.


class _Environment:
    _inner: CodeEnvironment | RAGEnvironment

    async def step(
        self,
        message_log_batch: Sequence[MessageLog],
        metadata: Sequence[Any],
        return_extracted_answer: bool = False,
    ) -> EnvironmentReturn:
        return await self._inner.step_async(message_log_batch, metadata, return_extracted_answer)

    async def global_post_process_and_metrics(self, batch: Any) -> tuple[Any, dict[str, Any]]:
        return await asyncio.to_thread(self._inner.global_post_process_and_metrics, batch)

    async def shutdown(self) -> None:
        await asyncio.to_thread(self._inner.shutdown)


class _CodeEnvironment(_Environment):
    def __init__(self, config: Mapping[str, Any]) -> None:
        self._inner = CodeEnvironment(config)


class _RAGEnvironment(_Environment):
    def __init__(self, config: Mapping[str, Any]) -> None:
        self._inner = RAGEnvironment(config)


CodeEnvironmentActor = ray.remote(_CodeEnvironment)
"""``CodeEnvironmentActor.remote(config)``: a :class:`CodeEnvironment` in a process of its own."""

RAGEnvironmentActor = ray.remote(_RAGEnvironment)
"""``RAGEnvironmentActor.remote(config)``: a :class:`RAGEnvironment` in a process of its own."""
