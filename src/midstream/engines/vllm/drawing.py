"""Which id a row's logits become, for the logits processors of both of vLLM's model runners."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from midstream.engines.noise import uniform
from midstream.engines.sampling import draw
from midstream.engines.vllm.plans import plans
from midstream.engines.vllm.rows import ROW_ARGUMENT
from midstream.types import Sampling


@dataclass(frozen=True, slots=True)
class RowDraw:
    """How the ids of a request are drawn, and by which name their plan is found."""

    row: str
    seed: int
    sampling: Sampling

    @classmethod
    def of(cls, params: Any) -> Self | None:
        """What a request's ``SamplingParams`` say; None where it is none of midstream's."""
        argument = (params.extra_args or {}).get(ROW_ARGUMENT)
        if argument is None:
            return None
        try:
            temperature, top_k, top_p, min_p = argument["sampling"]
            return cls(str(argument["row"]), int(argument["seed"]), Sampling(temperature, top_k, top_p, min_p))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"extra_args[{ROW_ARGUMENT!r}]={argument!r}: is not what midstream sends") from error


def choose(logits: torch.Tensor, wanted: Iterable[tuple[int, RowDraw, int]]) -> dict[int, int]:
    """The one id that each row of ``logits`` is to give: those that are drawn with noise, or forced.

    ``wanted`` has for a row: its index, how it is drawn, and the position of the id in the row. Greedy rows
    are left to vLLM.
    """
    chosen: dict[int, int] = {}
    drawn: list[tuple[int, RowDraw, int]] = []
    for index, how, position in wanted:
        plan = plans.get(how.row)
        forced = None if plan is None else plan.forced(position)
        if forced is not None:
            chosen[index] = forced
        elif not how.sampling.greedy:
            drawn.append((index, how, position))
    if drawn:
        rows = torch.tensor([index for index, _, _ in drawn]).to(logits.device)
        noise = [uniform(how.seed, position) for _, how, position in drawn]
        ids, _ = draw(logits[rows], [how.sampling for _, how, _ in drawn], noise)
        chosen.update(zip((index for index, _, _ in drawn), ids, strict=True))
    return chosen


def keep_only(logits: torch.Tensor, chosen: Mapping[int, int]) -> torch.Tensor:
    """``logits``, in place, with nothing possible but the chosen ids."""
    if chosen:
        rows = torch.tensor(list(chosen)).to(logits.device)
        logits[rows] = -torch.inf
        logits[rows, torch.tensor(list(chosen.values())).to(logits.device)] = 0.0
    return logits
