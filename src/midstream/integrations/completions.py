"""What a trainer is given of a trajectory: what stands after the prompt, and what of it is trained on."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Self

from midstream.types import StopKind, Trajectory

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Completion:
    """The ids after the prompt, at least one, with ``mask`` (1 on sampled ids, 0 on injected ones) and ``logprobs``,
    which are 0.0 where ``mask`` was 0. All of one length.
    """

    ids: list[int]
    mask: list[int]
    logprobs: list[float]

    @classmethod
    def of(cls, trajectory: Trajectory, filler: int) -> Self:
        """Nothing is trained on in a row that a fault of the sandbox ended: its whole mask is 0, and a warning says so.

        ``filler`` stands, masked, for a row without ids, which trainers do not take.
        """
        start = len(trajectory.prompt_ids)
        ids, mask, logprobs = trajectory.ids[start:], trajectory.mask[start:], trajectory.logprobs[start:]
        if not ids:
            ids, mask, logprobs = [filler], [0], [0.0]
        if trajectory.stop.kind is StopKind.SANDBOX_FAILURE:
            logger.warning("a sandbox failed, and its row is not trained on: %s", trajectory.stop.detail)
            mask = [0] * len(mask)
        return cls(ids, mask, logprobs)
