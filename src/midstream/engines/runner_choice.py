"""Which runner serves a model: by its config first, then by trying it against a plain forward pass.

The trial is small (a few dozen ids). Where the results differ by more than rounding, or the model raises,
the next runner is tried; the last of them, the plain forward pass itself, is exact by definition.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from midstream.engines.grouping import Chunk
from midstream.engines.model_runners import (
    RaggedRunner,
    RowCacheRunner,
    Runner,
    WholeRunner,
    input_device,
    last_only,
)
from midstream.errors import ConfigurationError

_logger = logging.getLogger(__name__)
_TRIAL_IDS = 24
_LONGEST_TRIAL = 96
_FEWEST_IDS = 6
_MASKED_KINDS = frozenset({"full_attention", "sliding_attention"})
_ADDITIVE = {"sdpa": False, "eager": True}


def choose_runner(model: Any, *, limit: int | None) -> Runner:
    """The fastest runner that is exact for ``model`` (in eval mode) on rows of at most ``limit`` ids.

    A warning is logged for a model that the ragged cache does not serve. :class:`ConfigurationError` for a
    model that gives no logits for a plain ``model(input_ids=...)``.
    """
    trial = _Trial(model, limit)
    reason = _unfit(model)
    if reason is None:
        windows = _windows(model, limit)
        additive = _ADDITIVE[model.config._attn_implementation]
        for packs in (True, False) if _packable(model) else (False,):

            def ragged(packs: bool = packs) -> RaggedRunner:
                return RaggedRunner(model, limit=limit, windows=windows, additive=additive, packs=packs)

            reason = trial.fault(ragged, trial.ragged)
            if reason is None:
                return ragged()  # a fresh one: the trial's ids must not be left behind in a cache that is read
    name = type(model).__name__
    if trial.fault(lambda: RowCacheRunner(model), trial.one_row) is None:
        _logger.warning(
            "%s is not served by the ragged KV cache (%s): its rows are decoded one by one, and computed anew "
            "whenever something is appended to them; exact, but slower",
            name,
            reason,
        )
        return RowCacheRunner(model)
    _logger.warning(
        "%s is served by no KV cache (%s): each step computes its rows from their first id on; exact, but slow",
        name,
        reason,
    )
    return WholeRunner(model)


def _unfit(model: Any) -> str | None:
    """Why the ragged cache cannot serve the model, as far as its config and signature tell."""
    config = model.config.get_text_config(decoder=True)
    parameters = inspect.signature(model.forward).parameters
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for name in ("attention_mask", "past_key_values", "position_ids"):
        if name not in parameters and not passes_on:
            return f"its forward pass takes no {name}"
    if model.config._attn_implementation not in _ADDITIVE:
        return f"its attention is {model.config._attn_implementation!r}, not 'sdpa' or 'eager'"
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _MASKED_KINDS)
    if others:
        return f"it has layers of the kind {', '.join(others)}"
    if not getattr(config, "layer_types", None) and getattr(config, "attention_chunk_size", None):
        return "its attention is chunked"
    return None


def _packable(model: Any) -> bool:
    """Whether the model takes attention functions of others, and gives the logits of chosen ids."""
    return model.config._attn_implementation == "sdpa" and bool(last_only(model))


def _windows(model: Any, limit: int | None) -> dict[str, int | None]:
    """The kinds of mask that the model's layers ask for, and the window of each."""
    config = model.config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)
    if window is not None and limit is not None and limit <= window:
        window = None  # no row ever outgrows it
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds:
        return {"every layer": window}
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(kinds)}


class _Trial:
    """Random ids, what a plain forward pass says of them, and what a runner says."""

    def __init__(self, model: Any, limit: int | None) -> None:
        window = getattr(model.config.get_text_config(decoder=True), "sliding_window", None) or 0
        wanted = window + _TRIAL_IDS if window < _LONGEST_TRIAL else _TRIAL_IDS  # past the window, if it is near
        length = max(min(wanted, limit or wanted), _FEWEST_IDS)
        generator = torch.Generator().manual_seed(0)
        vocabulary = model.get_input_embeddings().weight.shape[0]
        self._rows = torch.randint(vocabulary, (2, length), generator=generator).tolist()
        self._plain = [self._reference(model, row) for row in self._rows]
        # Rounding differs between batch shapes; a wrong mask or position shows at a percent or more.
        self._tolerance = max(1e-3, 16 * torch.finfo(model.dtype).eps)
        self._check_causal(model)

    def _check_causal(self, model: Any) -> None:
        half = len(self._rows[0]) // 2
        alone = self._reference(model, self._rows[0][:half])[-1]
        error = _difference(alone, self._plain[0][half - 1])
        if error > 10 * self._tolerance:
            raise ConfigurationError(
                f"model={type(model).__name__}: what it says of an id depends on later ids; a decoder-only "
                "AutoModelForCausalLM is wanted"
            )

    @staticmethod
    def _reference(model: Any, ids: list[int]) -> Tensor:
        device = input_device(model)
        try:
            output = model(input_ids=torch.tensor([ids]).to(device), use_cache=False)
            logits: Tensor = output.logits[0].float()
        except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
            raise ConfigurationError(
                f"model={type(model).__name__}: gives no logits for plain input_ids ({error}); "
                "a decoder-only AutoModelForCausalLM is wanted"
            ) from error
        return logits

    def fault(self, make: Callable[[], Runner], chunks: Callable[[], Iterator[list[tuple[int, Chunk]]]]) -> str | None:
        """Why the runner is not exact on the trial's ids, or None if it is."""
        try:
            runner = make()
            runner.reserve(2, len(self._rows[0]))
            for batch in chunks():
                logits = runner.forward([chunk for _, chunk in batch])
                for (row, chunk), found in zip(batch, logits, strict=True):
                    error = _difference(found.float(), self._plain[row][chunk.end - 1])
                    if not error <= self._tolerance:
                        return f"its logits differ from a plain forward pass by {error:.1g} standard deviations"
        except Exception as error:  # noqa: BLE001  whatever a model does not support, it says in its own way
            return f"{type(error).__name__}: {error}".splitlines()[0]
        return None

    def _chunk(self, row: int, start: int, end: int, place: int | None = None) -> tuple[int, Chunk]:
        return row, Chunk(row if place is None else place, start, self._rows[row][start:end])

    def ragged(self) -> Iterator[list[tuple[int, Chunk]]]:
        """Prefill with and without padding, a chunk on one row, decoding both, rows cut short, one of each."""
        last = len(self._rows[0])
        half = last // 2
        yield [self._chunk(0, 0, half - 1), self._chunk(1, 0, half - 1)]
        yield [self._chunk(0, 0, half), self._chunk(1, 0, half - 1)]
        yield [self._chunk(1, half - 1, last - 2)]
        yield [self._chunk(0, half, half + 1), self._chunk(1, last - 2, last - 1)]
        yield [self._chunk(0, half - 2, last - 1), self._chunk(1, half, last)]
        yield [self._chunk(0, last - 1, last), self._chunk(1, half - 1, last)]  # decoding beside a chunk
        yield [self._chunk(0, last - 1, last)]

    def one_row(self) -> Iterator[list[tuple[int, Chunk]]]:
        """Prefill and a few single steps, of each row."""
        last = len(self._rows[0])
        yield [self._chunk(0, 0, last // 2), self._chunk(1, 0, last - 2)]
        for step in range(last // 2, last - 1):
            yield [self._chunk(0, step, step + 1)]
        yield [self._chunk(0, last - 1, last), self._chunk(1, last - 2, last - 1)]


def _difference(found: Tensor, wanted: Tensor) -> float:
    """The mean difference of two rows of logits, in standard deviations of the wanted ones."""
    return float(((found - wanted).abs().mean() / wanted.std()).item())
