"""Ways to put ids through a Hugging Face decoder and get the logits after them.

A runner keeps what its model needs to go on from (keys and values, mostly) for rows at numbered *places*.
Three of them, from the fastest to the one that serves any model:

- :class:`RaggedRunner`: all rows in one :class:`~midstream.engines.ragged_cache.RaggedCache`. Full and
  sliding-window attention with explicit positions.
- :class:`RowCacheRunner`: a ``DynamicCache`` a row, each row on its own. Hybrid and linear attention.
- :class:`WholeRunner`: no cache, the whole sequence at every step.

:func:`midstream.engines.runner_choice.choose_runner` finds the one for a model.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from midstream.engines.grouping import LEAST_FRESH, Chunk, ReadingCost, padded_groups, runs
from midstream.engines.packing import packed
from midstream.engines.ragged_cache import Pass, RaggedCache

_WIDTH_STEP = 8  # attention kernels on GPUs want masks whose rows are aligned
_GROUP_BYTES = 1 << 19  # of keys and values: reading them takes a processor about as long as one more group does


@dataclass(frozen=True, slots=True)
class _Group:
    """Chunks as one batch: ``ids`` and ``positions`` ``[rows, queries]``, where they go and what they may see.

    ``rows`` are those that hold a chunk (others are idle), ``indices`` the places of these chunks among all.
    """

    ids: Tensor
    positions: Tensor
    now: Pass
    rows: list[int]
    indices: list[int]

    @property
    def fresh(self) -> bool:
        return self.now.width == 0


class Runner(Protocol):
    """What the decode loop asks of a model.

    ``decodes``: one id may be fed behind what is cached; without it every chunk starts at position 0. Only a
    :class:`RaggedRunner` takes several ids there, and lets rows be cut short, copied and moved. ``passes`` counts
    how often the model was called.
    """

    decodes: bool
    passes: int

    @property
    def memory(self) -> int:
        """Bytes that a cache shared by all rows takes now; 0 where there is none."""

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """Put the chunks through the model, all in different places: the logits ``[chunks, vocabulary]``
        after the last id of each, in the order of the chunks."""

    def reserve(self, places: int, length: int) -> None:
        """Have room for ``places`` rows of ``length`` ids."""

    def clear(self, place: int) -> None:
        """Forget a place."""

    def release(self) -> None:
        """Give back all memory."""


def input_device(model: Any) -> torch.device:
    """The device that a model takes ids on."""
    device: torch.device = model.get_input_embeddings().weight.device
    return device


def last_only(model: Any) -> dict[str, int]:
    """The arguments that spare a model the logits of all but the last id, where it can be spared them."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # adapters pass everything on
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(inner.forward).parameters else {}


class RaggedRunner:
    """Rows of any lengths together, over a ragged cache.

    ``windows`` names the masks that the model's layers ask for and the positions each lets an id see (its
    own included; None is all of them). With one name the model gets a mask, with several a mapping of masks.
    ``additive``: masks are added to attention scores (eager attention), not boolean. ``packs``: chunks of
    different lengths go through the model in one pass (:mod:`midstream.engines.packing`; sdpa attention only, and a
    model that can be asked for the logits of chosen ids).

    ``splits``: rows share a batch only where it costs nothing (:func:`midstream.engines.grouping.runs`), so that it
    matters little how their lengths differ and which places lie between theirs.
    """

    decodes = True

    def __init__(
        self,
        model: Any,
        *,
        limit: int | None,
        windows: Mapping[str, int | None],
        additive: bool = False,
        packs: bool = False,
    ) -> None:
        self._model = model
        self._cache = RaggedCache(limit)
        self._windows = dict(windows)
        self._mask_dtype: torch.dtype = model.dtype if additive else torch.bool
        self._device = input_device(model)
        self._options = last_only(model)
        self._packs = packs
        self.splits = packs and self._device.type == "cpu"
        self._config = model.config.get_text_config(decoder=True)
        self.passes = 0

    @property
    def memory(self) -> int:
        return self._cache.memory

    def reserve(self, places: int, length: int) -> None:
        self._cache.reserve(places, length)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy what is cached of the first ``length`` ids of one place to another."""
        self._cache.copy(source, target, length)

    def swap(self, first: int, second: int, length: int) -> None:
        """Exchange two places, of which the first ``length`` ids matter."""
        self._cache.swap(first, second, length)

    def clear(self, place: int) -> None:
        self._cache.clear(place)

    def release(self) -> None:
        self._cache = RaggedCache(self._cache.limit)

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        together = runs(chunks, self._reading_cost()) if self.splits else padded_groups(chunks)
        least = LEAST_FRESH if self._packs and len(together) > 1 else 2
        groups = [self._lay_out([chunks[index] for index in indices], indices, least) for indices in together]
        begun = [group for group in groups if not group.fresh]
        passes = [[group] for group in groups]
        if self._packs and len(begun) > 1:
            passes = [[group] for group in groups if group.fresh] + [begun]
        logits = [self._forward(one) for one in passes]
        self.passes += len(passes)
        order = [index for one in passes for group in one for index in group.indices]
        if order == list(range(len(chunks))):
            return logits[0] if len(logits) == 1 else torch.cat(logits)
        found = torch.cat(logits)
        return found[torch.tensor(order).argsort().to(found.device)]

    def _reading_cost(self) -> ReadingCost:
        group = _GROUP_BYTES / max(1, self._cache.position_bytes)
        return ReadingCost(group, getattr(self._config, "num_attention_heads", 1), torch.get_num_threads())

    def _lay_out(self, chunks: Sequence[Chunk], indices: Sequence[int], least_fresh: int) -> _Group:
        """Chunks of similar lengths, as one batch; shorter ones are padded in front, so that all end together.

        Padding sits at position 0, sees position 0, writes to scratch, and is seen by nothing.
        """
        queries = max(len(chunk.ids) for chunk in chunks)
        laid = _lay_out(chunks, fill=queries == 1 and not self.splits)
        rows = [chunk or Chunk(place, 0, ()) for place, chunk in laid]
        padding = [queries - len(row.ids) for row in rows]
        start = rows[0].start if not any(padding) and len({row.start for row in rows}) == 1 else None
        ids = torch.tensor([[0] * pad + list(row.ids) for pad, row in zip(padding, rows, strict=True)])
        first = torch.tensor([row.start - pad for pad, row in zip(padding, rows, strict=True)])
        offsets = torch.arange(queries)
        real = offsets >= torch.tensor(padding)[:, None]
        positions = first[:, None] + offsets
        targets = positions.where(real, torch.tensor(self._cache.scratch))
        # Rows that begin here together attend to themselves alone: the model's own causal mask is the fast one.
        fresh = start == 0 and queries >= least_fresh
        width = 0 if fresh else min(_aligned(max(row.end for row in rows)), self._cache.capacity)
        neighbours = [row.place for row in rows] == list(range(rows[0].place, rows[0].place + len(rows)))
        extent = slice(rows[0].place, rows[0].place + len(rows)) if neighbours else None
        places = torch.tensor([row.place for row in rows])
        order = {chunk.place: index for chunk, index in zip(chunks, indices, strict=True)}
        wanted = [(row, order[place]) for row, (place, chunk) in enumerate(laid) if chunk is not None]
        now = Pass(places, extent, targets, start, width)
        return _Group(ids, positions * real, now, [row for row, _ in wanted], [index for _, index in wanted])

    def _forward(self, groups: Sequence[_Group]) -> Tensor:
        """The logits after each chunk of the groups, in the order of their ``indices``."""
        # All that is needed, in one transfer.
        together = torch.stack([torch.cat([part.flatten() for part in parts]) for parts in _columns(groups)])
        ids, positions, targets, places = together.to(self._device, non_blocking=True)
        ends = [0, *accumulate(group.now.targets.numel() for group in groups)]
        passes = [
            replace(
                group.now,
                targets=targets[begin:end].view(group.now.targets.shape),
                places=places[begin:end].view(group.now.targets.shape)[:, 0],
            )
            for group, begin, end in zip(groups, ends, ends[1:], strict=False)
        ]
        shape = (1, -1) if len(groups) > 1 else tuple(groups[0].ids.shape)
        ids, positions = ids.view(shape), positions.view(shape)
        width = max(now.width for now in passes)
        options: dict[str, Any] = dict(self._options)
        if len(groups) > 1:
            options["logits_to_keep"] = torch.tensor(
                [
                    begin + (row + 1) * group.ids.shape[1] - 1
                    for group, begin in zip(groups, ends, strict=False)
                    for row in group.rows
                ]
            ).to(self._device, non_blocking=True)
        self._cache.now, self._cache.where = passes, (places, targets)
        try:
            with packed(self._config, passes) if len(groups) > 1 else nullcontext():
                logits: Tensor = self._model(
                    input_ids=ids,
                    position_ids=positions,
                    attention_mask=self._masks(positions, width) if width else None,
                    past_key_values=self._cache,
                    use_cache=True,
                    **options,
                ).logits
        finally:
            self._cache.now = self._cache.where = ()
        if len(groups) > 1:
            return logits[0]
        rows = groups[0].rows
        logits = logits[:, -1]
        return logits if len(rows) == logits.shape[0] else logits[torch.tensor(rows).to(logits.device)]

    def _masks(self, positions: Tensor, width: int) -> Tensor | dict[str, Tensor]:
        """What each id may see, ``[rows, 1, queries, width]``, for each kind of layer."""
        slots = torch.arange(width, device=positions.device)
        at = positions[:, None, :, None]
        masks = {}
        for kind, window in self._windows.items():
            seen = slots <= at
            if window is not None:
                seen &= slots > at - window
            if self._mask_dtype is not torch.bool:
                nothing = torch.zeros((), dtype=self._mask_dtype, device=seen.device)
                seen = nothing.where(seen, torch.finfo(self._mask_dtype).min)
            masks[kind] = seen
        return masks if len(masks) > 1 else next(iter(masks.values()))


def _columns(groups: Sequence[_Group]) -> tuple[list[Tensor], ...]:
    """Of each id of each group: what it is, its position, where it is kept, and at which place."""
    return (
        [group.ids for group in groups],
        [group.positions for group in groups],
        [group.now.targets for group in groups],
        [group.now.places[:, None].expand(group.ids.shape) for group in groups],
    )


class RowCacheRunner:
    """Each row on its own, with the model's own kind of cache. What cannot be appended is computed anew."""

    decodes = True
    memory = 0

    def __init__(self, model: Any) -> None:
        self._model = model
        self._caches: dict[int, DynamicCache] = {}
        self.passes = 0
        self._device = input_device(model)
        self._options = last_only(model)

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        return torch.cat([self._forward_one(chunk) for chunk in chunks])

    def _forward_one(self, chunk: Chunk) -> Tensor:
        self.passes += 1
        # Taken out while it is changed: a failed pass leaves no half-written cache behind.
        cache = self._caches.pop(chunk.place, None)
        if chunk.start == 0:
            cache = DynamicCache(config=self._model.config)
        elif cache is None:
            raise RuntimeError(f"nothing is cached at place {chunk.place} to go on from")
        output = self._model(
            input_ids=torch.tensor([list(chunk.ids)]).to(self._device),
            attention_mask=torch.ones(1, chunk.end, dtype=torch.long, device=self._device),
            past_key_values=cache,
            use_cache=True,
            **self._options,
        )
        self._caches[chunk.place] = cache
        logits: Tensor = output.logits[:, -1]
        return logits

    def reserve(self, places: int, length: int) -> None:
        pass  # caches grow by themselves

    def clear(self, place: int) -> None:
        self._caches.pop(place, None)

    def release(self) -> None:
        self._caches.clear()


class WholeRunner:
    """The whole sequence of each row at every step, through a plain forward pass."""

    decodes = False
    memory = 0

    def __init__(self, model: Any) -> None:
        self._model = model
        self.passes = 0
        self._device = input_device(model)
        self._options = last_only(model)

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        return torch.cat([self._forward_one(chunk) for chunk in chunks])

    def _forward_one(self, chunk: Chunk) -> Tensor:
        self.passes += 1
        ids = torch.tensor([list(chunk.ids)]).to(self._device)
        logits: Tensor = self._model(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **self._options
        ).logits[:, -1]
        return logits

    def reserve(self, places: int, length: int) -> None:
        pass  # nothing is kept

    def clear(self, place: int) -> None:
        pass

    def release(self) -> None:
        pass


def _lay_out(chunks: Sequence[Chunk], *, fill: bool) -> list[tuple[int, Chunk | None]]:
    """The batch's rows in the order of their places; None is an idle row that fills a gap, where ``fill`` allows it.

    Reading neighbouring places copies nothing, reading scattered ones copies all they hold, so a decode
    step rather carries some idle rows along.
    """
    by_place: dict[int, Chunk | None] = {chunk.place: chunk for chunk in sorted(chunks, key=lambda chunk: chunk.place)}
    span = range(min(by_place), max(by_place) + 1)
    if fill and len(span) <= 2 * len(by_place):
        return [(place, by_place.get(place)) for place in span]
    return list(by_place.items())


def _aligned(width: int) -> int:
    return -(-width // _WIDTH_STEP) * _WIDTH_STEP
