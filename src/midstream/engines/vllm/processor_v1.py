"""midstream's logits processor for vLLM's first model runner: draws with keyed noise, forces planned ids.

Noise that is looked up by (seed, position) makes a row's ids independent of when it was resubmitted. The
draw replaces the row's logits by one finite value, which vLLM's greedy sampling then picks; raw logprobs were
taken before that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from midstream.engines.vllm.drawing import RowDraw, choose, keep_only


@dataclass(frozen=True, slots=True)
class _BatchRow:
    draw: RowDraw
    prompt_length: int
    outputs: list[int]
    """vLLM's own list of the request's ids, which grows."""


class RowProcessor(LogitsProcessor):  # type: ignore[misc]  # vLLM is not seen by the type checker
    """For ``vllm.LLM(logits_processors=[RowProcessor])`` and the like; leaves other requests alone."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        del vllm_config, device, is_pin_memory
        self._rows: dict[int, _BatchRow] = {}

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        RowDraw.of(sampling_params)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        process_dict_updates(self._rows, batch_update, _batch_row)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        wanted = ((index, row.draw, row.prompt_length + len(row.outputs)) for index, row in self._rows.items())
        return keep_only(logits, choose(logits, wanted))


def _batch_row(params: Any, prompt_ids: list[int] | None, outputs: list[int]) -> _BatchRow | None:
    draw = RowDraw.of(params)
    return None if draw is None else _BatchRow(draw, len(prompt_ids or ()), outputs)
