"""Requests of a vLLM engine that is stepped from here (``LLMEngine``, inside every ``LLM``)."""

from __future__ import annotations

from typing import Any

import torch

from midstream.engines.vllm.rows import Delta, TokenInput
from midstream.errors import EngineError


class DirectLink:
    """``llm_engine`` runs its core in this process or in one of its own; either way a step is asked for here."""

    def __init__(self, llm_engine: Any, *, owned: bool) -> None:
        self._engine = llm_engine
        self._owned = owned

    @property
    def in_process(self) -> bool:
        """Whether logits processors run in this process."""
        from vllm.v1.engine.core_client import InprocClient

        parallel = self._engine.vllm_config.parallel_config
        return isinstance(self._engine.engine_core, InprocClient) and parallel.world_size == 1

    @property
    def unfinished(self) -> int:
        """Requests that the engine still has, those of others included."""
        return int(self._engine.get_num_unfinished_requests())

    def submit(self, request: str, prompt: TokenInput, params: Any) -> None:
        self._engine.add_request(request, prompt, params)

    def poll(self) -> list[Delta]:
        """One step of vLLM."""
        # In a new thread torch takes on its number of threads late, at its first parallel work; vLLM's kernels
        # for the CPU count them before and after, and fail where the counts differ.
        torch.get_num_threads()
        return [Delta.of(output) for output in self._engine.step()]

    def abort(self, request: str) -> None:
        self._engine.abort_request([request])

    def reset_cache(self) -> None:
        if not self._engine.reset_prefix_cache():
            raise EngineError("vLLM could not reset its prefix cache: requests of others hold blocks of it")

    def shutdown(self) -> None:
        if self._owned:
            self._engine.engine_core.shutdown()
