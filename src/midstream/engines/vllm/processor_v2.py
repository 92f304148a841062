"""midstream's logits processor for vLLM's second model runner; what it does is as in :mod:`.processor_v1`."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

from midstream.engines.vllm.drawing import RowDraw, choose, keep_only


class RowProcessor(LogitsProcessor):  # type: ignore[misc]  # vLLM is not seen by the type checker
    """Rows are found by the slot of their request, since the runner reorders its batch at every step."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        super().__init__(vllm_config, req_states)
        self._slots: dict[int, RowDraw] = {}

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        RowDraw.of(sampling_params)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        draw = RowDraw.of(sampling_params)
        if draw is None:
            self._slots.pop(req_idx, None)  # of a request that had the slot before
            return False
        self._slots[req_idx] = draw
        return True

    def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
        """Without speculative decoding, each request has one row of logits and its length is known on the host."""
        slots = ctx.idx_mapping_np.tolist()
        if len(slots) != logits.shape[0]:
            raise RuntimeError(
                f"{logits.shape[0]} rows of logits for {len(slots)} requests: speculative decoding is on"
            )
        lengths = ctx.seq_lens_upper_bound_np.tolist()
        wanted = (
            (row, self._slots[slot], length)
            for row, (slot, length) in enumerate(zip(slots, lengths, strict=False))
            if slot in self._slots
        )
        return keep_only(logits, choose(logits, wanted))
