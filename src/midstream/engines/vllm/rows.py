"""A row as this engine sees it, and what vLLM is asked for on its behalf."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from midstream.engines.base import Handle
from midstream.engines.vllm.plans import Plan
from midstream.types import Sampling

ROW_ARGUMENT = "midstream"
"""The key of ``SamplingParams.extra_args`` under which a request brings what the logits processor needs."""


@dataclass(slots=True, eq=False)
class EngineRow:
    """``request`` names what samples for the row in vLLM now; None where nothing does.

    ``salt``: what its keys and values are kept under in the prefix cache; only rows with the same find them. A
    streaming session whose turn is over (``turn_over``) holds the first ``known`` ids of the row. ``plan``:
    what the logits processor is to force next, ``forced`` ids of which have come.
    """

    handle: Handle
    ids: list[int]
    sampling: Sampling
    seed: int
    limit: int
    stop_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]
    running: bool = True
    ended: bool = False
    request: str | None = None
    turn_over: bool = False
    known: int = 0
    plan: Plan | None = None
    forced: int = 0
    salt: str | None = None

    @property
    def full(self) -> bool:
        return len(self.ids) >= self.limit


@dataclass(frozen=True, slots=True)
class Delta:
    """What vLLM newly says of a request. ``finish`` is its finish reason, ``error`` what it raised."""

    request: str
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish: str | None = None
    error: str | None = None

    def then(self, later: Delta) -> Delta:
        """Both in one."""
        return Delta(
            self.request, self.ids + later.ids, self.logprobs + later.logprobs, later.finish, self.error or later.error
        )

    @classmethod
    def of(cls, output: Any) -> Delta:
        """Of a ``RequestOutput`` that holds what is new alone."""
        (completion,) = output.outputs
        ids = tuple(completion.token_ids)
        logprobs = completion.logprobs or ()
        if len(logprobs) != len(ids):
            return cls(output.request_id, error=f"vLLM gave {len(ids)} ids but {len(logprobs)} logprobs")
        return cls(
            output.request_id,
            ids,
            tuple(float(among[token_id].logprob) for token_id, among in zip(ids, logprobs, strict=True)),
            completion.finish_reason,
        )


TokenInput = dict[str, Any]
"""A prompt as vLLM takes it."""


def token_input(ids: Sequence[int], salt: str | None) -> TokenInput:
    """With a copy of the ids, since vLLM extends the list that it is given."""
    prompt: TokenInput = {"type": "token", "prompt_token_ids": list(ids)}
    return prompt if salt is None else prompt | {"cache_salt": salt}


def sampling_params(row: EngineRow, *, keyed: bool, stop_ids: tuple[int, ...], stop_strings: tuple[str, ...]) -> Any:
    """The ``SamplingParams`` of a request that goes on from the row's ids.

    ``keyed``: midstream's processor draws the ids. Otherwise vLLM does, from a generator of the request's own
    whose seed is made from the row's and the position at which the request begins.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = row.sampling
    if sampling.greedy or keyed:
        drawn: dict[str, Any] = {"temperature": 0.0}
    else:
        drawn = {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "seed": _request_seed(row.seed, len(row.ids)),
        }
    return SamplingParams(
        **drawn,
        max_tokens=row.limit - len(row.ids),
        logprobs=0,  # of the sampled id alone
        ignore_eos=True,  # the row decides what an end of sequence means
        stop_token_ids=list(stop_ids),
        stop=list(stop_strings),
        include_stop_str_in_output=True,
        skip_special_tokens=False,  # else a stop string made of special tokens is never seen
        detokenize=bool(stop_strings),
        output_kind=RequestOutputKind.DELTA,
        extra_args={ROW_ARGUMENT: _row_argument(row)} if keyed else None,
    )


def _row_argument(row: EngineRow) -> dict[str, Any]:
    sampling = row.sampling
    return {
        "row": row.request,
        "seed": row.seed,
        "sampling": [sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p],
    }


def _request_seed(seed: int, position: int) -> int:
    """Under 2**63: vLLM's seeds are signed."""
    digest = hashlib.blake2b(f"vllm:{seed}:{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
