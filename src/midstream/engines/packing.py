"""Groups of rows of different shapes in one forward pass: many with one id each, and a few with a result.

A pass costs what its weights cost to read, however few ids it has. So the ids of all groups are laid side by side
as one long row, ``[1, ids]``, for everything that looks at one id at a time; attention alone, where an id sees
its own row's past, is computed group by group. For that a model is given an attention function of ours while such a
pass runs, which calls transformers' own for each group.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from midstream.engines.ragged_cache import Pass

NAME = "midstream_packed"


class _Now(threading.local):
    """The groups of the pass that this thread is in, and of each mask that the model gave (by its ``id``) their own."""

    def __init__(self) -> None:
        self.groups: Sequence[Pass] = ()
        self.masks: dict[int, list[Tensor]] = {}


_now = _Now()


def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """``query`` is ``[1, heads, ids, head size]``, ``key`` and ``value`` are the whole cache's of the layer.

    ``attention_mask``, ``[1, 1, ids, width]``, says for each id what it may see at its own place.
    """
    if not _now.groups or attention_mask is None:  # another thread's pass, while this one has the model changed
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return found
    masks = _now.masks.get(id(attention_mask))
    if masks is None:
        masks = _now.masks[id(attention_mask)] = list(_masks_of_groups(attention_mask, _now.groups, query.dtype))
    outputs = []
    rows = query[0].transpose(0, 1)
    begin = 0
    for group, mask in zip(_now.groups, masks, strict=True):
        end = begin + group.targets.numel()
        queries = rows[begin:end].unflatten(0, group.targets.shape).transpose(1, 2)
        output, _ = sdpa_attention_forward(module, queries, group.read(key), group.read(value), mask, **options)
        outputs.append(output.flatten(0, 1))
        begin = end
    return torch.cat(outputs)[None], None


def _masks_of_groups(mask: Tensor, groups: Sequence[Pass], dtype: torch.dtype) -> Iterator[Tensor]:
    """What is added to the scores of each group, ``[rows, 1, queries, width]``.

    Made once for all layers that share a mask: of a boolean one, attention would make such numbers in each.
    """
    begin = 0
    for group in groups:
        end = begin + group.targets.numel()
        seen = mask[0, 0, begin:end, : group.width].unflatten(0, group.targets.shape)[:, None]
        yield torch.zeros(seen.shape, dtype=dtype, device=mask.device).masked_fill_(~seen, -torch.inf)
        begin = end


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)


@contextmanager
def packed(config: Any, groups: Sequence[Pass]) -> Iterator[None]:
    """Within, the model of ``config`` (with sdpa attention) computes attention by ``groups``."""
    before = config._attn_implementation
    config._attn_implementation = NAME
    _now.groups = groups
    try:
        yield
    finally:
        _now.groups = ()
        _now.masks.clear()
        config._attn_implementation = before
