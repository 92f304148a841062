"""Does the model give the recorded ids the recorded logprobs?

The model reads a whole row at once, as a trainer does, and says of each generated id how likely it was behind
what stands before it. ``raw`` logprobs are the float32 log-softmax of its logits; ``processed`` ones that of the
logits behind the row's temperature and filters (a greedy row has none). A greedy row's ids must also be
the likeliest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from midstream.engines.model_facts import check_decoder, context_bound
from midstream.engines.sampling import filtered
from midstream.errors import ConfigurationError
from midstream.records import Record, Violation
from midstream.types import Sampling

EXACT_TOLERANCE = 1e-3
"""By which logprobs may differ where the model computes in float32 or more."""

HALF_TOLERANCE = 0.25
"""The same for bfloat16 and float16, whose logits are steps of 1/16 and more apart."""

_MOST_LOGITS = 1 << 27
"""Of one forward pass: rows times positions times vocabulary."""

_SLICE = 1 << 24
"""Logits that are in float32 at a time."""


@dataclass(slots=True)
class Comparison:
    """One record beside the model. ``compared``: generated ids that were; ``worst``: the largest difference of a
    logprob. ``left_out``: ids that were sampled over what older weights had computed. ``reason``: why nothing was
    compared, or ""."""

    compared: int = 0
    left_out: int = 0
    worst: float = 0.0
    reason: str = ""
    violations: list[Violation] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Row:
    """``places``: of the ids to compare."""

    record: Record
    ids: list[int]
    places: list[int]
    logprobs: list[float]
    comparison: Comparison


def compare(
    records: Sequence[Record], model: Any, *, tolerance: float | None = None, weight_version: int | None = None
) -> list[Comparison]:
    """Hold records against ``model``, a decoder-only model of transformers, on its device and in its dtype.

    ``tolerance``: by how much a logprob may differ; by default :data:`EXACT_TOLERANCE` or :data:`HALF_TOLERANCE`, as
    the model's dtype is. ``weight_version``: compare only ids that these weights sampled; by default all. Ids
    that were sampled over a cache of older weights agree with no weights, and are left out. Records that are not fit
    for training have nothing to compare, and say so.

    Raises :class:`~midstream.errors.ConfigurationError` for a model or a tolerance that cannot be.
    """
    check_decoder(model)
    if tolerance is None:
        tolerance = HALF_TOLERANCE if model.dtype in (torch.bfloat16, torch.float16) else EXACT_TOLERANCE
    if not tolerance >= 0:
        raise ConfigurationError(f"tolerance={tolerance!r}: must be 0 or more")
    size = int(model.get_input_embeddings().weight.shape[0])
    comparisons = [Comparison() for _ in records]
    rows = [
        row
        for record, comparison in zip(records, comparisons, strict=True)
        if (row := _row(record, comparison, size, context_bound(model, None), weight_version)) is not None
    ]
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for batch in _batches(rows, size):
                _compare_batch(batch, model, tolerance)
    finally:
        model.train(training)
    return comparisons


def _row(record: Record, comparison: Comparison, size: int, context: int | None, version: int | None) -> _Row | None:
    """The row to compare, or None where there is nothing, which the comparison says."""
    if not record.fit_for_training:
        comparison.reason = "not fit for training: its engine gave no ids or logprobs of its own"
        return None
    ids, logprobs, places = list(record.prompt_ids), [0.0] * len(record.prompt_ids), []
    mixed = _over_older_weights(record)
    for segment in record.segments:
        if segment.origin == "generated":
            versions = enumerate(segment.weight_versions, start=len(ids))
            wanted = [place for place, one in versions if place and version in (None, one)]
            sound = [place for place in wanted if not any(place in span for span in mixed)]
            comparison.left_out += len(wanted) - len(sound)
            places += sound
        ids += segment.ids
        logprobs += segment.logprobs
    strange = next((place for place, token_id in enumerate(ids) if not 0 <= token_id < size), None)
    if strange is not None:
        message = f"id {ids[strange]} is none of the model's, whose ids are under {size}"
        comparison.violations.append(Violation("model", message, strange))
        return None
    if context is not None and len(ids) > context:
        comparison.violations.append(Violation("model", f"{len(ids)} ids are more than the model's context, {context}"))
        return None
    if not places or len(logprobs) != len(ids):  # the certificate tells of lengths that differ
        comparison.reason = "its lists differ in length" if places else "holds no id that was sampled by these weights"
        if comparison.left_out and not places:
            comparison.reason += " over a cache of theirs"
        return None
    return _Row(record, ids, places, logprobs, comparison)


def _over_older_weights(record: Record) -> list[range]:
    """The places whose ids were sampled over what older weights had computed of those before."""
    spans: list[range] = []
    begin: int | None = None
    for change in record.weight_changes:
        if change.cache_kept:
            begin = change.length if begin is None else begin
        elif begin is not None:
            spans.append(range(begin, change.length))
            begin = None
    return spans if begin is None else [*spans, range(begin, record.total_length)]


def _batches(rows: Sequence[_Row], size: int) -> Iterator[list[_Row]]:
    """Rows of like length together, as many as one forward pass may have."""
    batch: list[_Row] = []
    for row in sorted(rows, key=lambda row: len(row.ids)):
        if batch and (len(batch) + 1) * len(row.ids) * size > _MOST_LOGITS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _compare_batch(rows: Sequence[_Row], model: Any, tolerance: float) -> None:
    width = max(len(row.ids) for row in rows) - 1  # nothing follows the last id
    # On the right of a causal model's rows padding changes nothing, whatever id it is.
    ids = torch.tensor([row.ids[:-1] + [0] * (width + 1 - len(row.ids)) for row in rows])
    device = model.get_input_embeddings().weight.device
    logits = model(input_ids=ids.to(device), use_cache=False).logits
    for row, row_logits in zip(rows, logits, strict=True):
        _compare_row(row, row_logits, tolerance)


def _compare_row(row: _Row, logits: Tensor, tolerance: float) -> None:
    wrong: list[Violation] = []
    at_once = max(1, _SLICE // logits.shape[-1])
    for begin in range(0, len(row.places), at_once):
        wrong += _wrong(row, row.places[begin : begin + at_once], logits, tolerance)
    row.comparison.compared = len(row.places)
    if wrong:
        more = f" ({len(wrong)} of {len(row.places)} ids are wrong)"
        row.comparison.violations.append(replace(wrong[0], message=wrong[0].message + more))


def _wrong(row: _Row, places: Sequence[int], logits: Tensor, tolerance: float) -> Iterator[Violation]:
    """The ids at these places that do not agree with the logits ``[positions, vocabulary]`` of their row."""
    recorded = row.record.sampling
    sampling = Sampling(recorded.temperature, recorded.top_k, recorded.top_p, recorded.min_p)
    chosen = torch.tensor([row.ids[place] for place in places]).to(logits.device)[:, None]
    scores = logits[torch.tensor(places).to(logits.device) - 1].float()
    below = (scores.amax(-1) - scores.gather(1, chosen)[:, 0]).tolist()
    if row.record.logprob_kind == "processed" and not sampling.greedy:
        scores = filtered(scores, [sampling] * len(places))
    expected = (scores.gather(1, chosen)[:, 0] - scores.logsumexp(-1)).tolist()
    for place, wanted, distance in zip(places, expected, below, strict=True):
        found, token_id = row.logprobs[place], row.ids[place]
        difference = abs(wanted - found)
        row.comparison.worst = max(row.comparison.worst, difference)
        if not difference <= tolerance:
            said = f"logprob {found:.6g} is recorded for id {token_id}, the model gives {wanted:.6g}"
            yield Violation("model", said, place)
        elif sampling.greedy and not distance <= tolerance:
            said = f"id {token_id} of a greedy row is behind the likeliest by {distance:.3g}"
            yield Violation("model", said, place)
