"""From logits to ids: filters, the draw, and the logprob of what was drawn.

The filters are those of Hugging Face's logits warpers (temperature, top-k, top-p, min-p, in that order),
with settings of its own for each row. The draw inverts the cumulative distribution, summed in float64
in the order of the vocabulary, at a number the caller supplies (:func:`midstream.engines.noise.uniform`):
which id comes out depends on the row's logits and that number alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from midstream.types import Sampling

_Filter = Callable[[Tensor, Sequence[float]], Tensor]


def draw(logits: Tensor, settings: Sequence[Sampling], uniforms: Sequence[float]) -> tuple[list[int], list[float]]:
    """One id for each row of ``logits``, and its logprob.

    ``logits`` is ``[rows, vocabulary]``, any float dtype; ``settings`` and ``uniforms`` have one item a row
    (greedy rows ignore theirs). The logprobs are raw: the log-softmax, in float32, of the logits as the
    model gave them, whatever the temperature and the filters. A row whose logits hold a NaN, or +inf, has
    a logprob that is not finite. One transfer from the device brings ids and logprobs.
    """
    logits = logits.float()
    ids = logits.argmax(dim=-1)
    sampled = [row for row, setting in enumerate(settings) if not setting.greedy]
    if sampled:
        everyone = len(sampled) == len(settings)
        index = None if everyone else _on(logits, sampled, torch.long)
        scores = filtered(logits if index is None else logits[index], [settings[row] for row in sampled])
        drawn = _invert(scores, [uniforms[row] for row in sampled])
        ids = drawn if index is None else ids.index_copy(0, index, drawn)
    logprobs = logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(dim=-1)
    # float64 holds every id and every float32 exactly.
    both: list[list[float]] = torch.stack((ids.double(), logprobs.double())).tolist()
    return [int(token_id) for token_id in both[0]], both[1]


def filtered(logits: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """The logits ``[rows, vocabulary]``, float32, after each row's temperature and filters: -inf is left out.

    No row may be greedy. Ties at the top-k threshold all stay, as in Hugging Face's warper.
    """
    scores = logits
    if any(setting.temperature != 1 for setting in settings):
        scores = _tempered(scores, [setting.temperature for setting in settings])
    if any(setting.top_k for setting in settings):
        scores = _top_k(scores, [setting.top_k for setting in settings])
    rows = [row for row, setting in enumerate(settings) if setting.top_p < 1]
    if rows:
        scores = _on_rows(_top_p, scores, rows, [settings[row].top_p for row in rows])
    rows = [row for row, setting in enumerate(settings) if setting.min_p > 0]
    if rows:
        scores = _on_rows(_min_p, scores, rows, [settings[row].min_p for row in rows])
    return scores


def _tempered(scores: Tensor, temperatures: Sequence[float]) -> Tensor:
    """Each row over its temperature, as the warper divides it, wherever that gives numbers.

    Rows that are so cold that the quotients, or the temperature itself, may not be float32 any more are counted from
    their largest logit, which softmax and filters are blind to: it stays at 0, and what is below it falls to -inf.
    """
    cold = [row for row, temperature in enumerate(temperatures) if temperature < _COLD]
    tempered = scores / _column(scores, [max(temperature, _COLD) for temperature in temperatures])
    if not cold:
        return tempered
    index = _on(scores, cold, torch.long)
    # In float64, of which every temperature over 0 is a number.
    below = (scores[index] - scores[index].amax(dim=-1, keepdim=True)).double()
    below = below / _column(below, [temperatures[row] for row in cold])
    return tempered.index_copy(0, index, below.to(scores.dtype))


_COLD = 1e-12
"""From here on, logits of up to 1e26 are divided without overflow."""


def _top_k(scores: Tensor, ks: Sequence[int]) -> Tensor:
    most = min(max(ks), scores.shape[-1])
    highest = scores.topk(most, dim=-1).values
    thresholds = highest.gather(1, _column(scores, [(min(k, most) or most) - 1 for k in ks], torch.long))
    on = _column(scores, [k > 0 for k in ks], torch.bool)
    return scores.masked_fill((scores < thresholds) & on, -torch.inf)


def _top_p(scores: Tensor, ps: Sequence[float]) -> Tensor:
    ordered, order = scores.sort(dim=-1)
    cumulative = ordered.softmax(dim=-1).cumsum(dim=-1)
    out = cumulative <= _column(scores, [1 - p for p in ps])
    out[:, -1] = False
    return scores.masked_fill(out.scatter(1, order, out), -torch.inf)


def _min_p(scores: Tensor, ps: Sequence[float]) -> Tensor:
    probabilities = scores.softmax(dim=-1)
    top = probabilities.amax(dim=-1, keepdim=True)
    return scores.masked_fill(probabilities < _column(scores, ps) * top, -torch.inf)


def _on_rows(what: _Filter, scores: Tensor, rows: Sequence[int], values: Sequence[float]) -> Tensor:
    if len(rows) == scores.shape[0]:
        return what(scores, values)
    index = _on(scores, rows, torch.long)
    return scores.index_copy(0, index, what(scores[index], values))


def _invert(scores: Tensor, uniforms: Sequence[float]) -> Tensor:
    cumulative = scores.double().softmax(dim=-1).cumsum(dim=-1)
    total = cumulative[:, -1:]
    # Rounding may carry u * total up to the total itself, past which there is no id.
    target = torch.minimum(_column(cumulative, uniforms) * total, total.nextafter(torch.zeros_like(total)))
    # The first place where the sum exceeds the target has a probability above 0: it is never a filtered id.
    found = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return found.clamp_(max=scores.shape[-1] - 1)  # NaNs alone lead beyond the end; the logprob tells of them


def _column(like: Tensor, values: Sequence[float], dtype: torch.dtype | None = None) -> Tensor:
    return _on(like, values, dtype or like.dtype)[:, None]


def _on(like: Tensor, values: Sequence[float], dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype).to(like.device, non_blocking=True)
