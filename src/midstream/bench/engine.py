"""How fast a model of one's own decodes in midstream's loop, beside ``model.generate`` of transformers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from midstream.bench.figures import Figure
from midstream.engines.base import Engine
from midstream.generation import Generator
from midstream.markup import CODE_TAGS, Markup
from midstream.types import Limits, Prompt
from midstream.vocabulary import Vocabulary

_TEXT = "What is the sum of the squares of the first ten numbers? "


def measure(engine: Engine, model: Any = None, *, rows: int = 8, quick: bool = False) -> Iterator[Figure]:
    """Ids a second of ``rows`` rows that decode together, ends of sequence ignored.

    ``model``: the engine's, of transformers, to be measured beside it in turns.
    """
    room = engine.context_length or 4096
    prompt = Vocabulary.of(engine.tokenizer).encode_text(_TEXT * 4)[: room // 2]
    count = min(32 if quick else 128, room - len(prompt))
    rates: dict[str, list[float]] = {"plain": [], "looking": [], "generate": []}
    for _ in range(2 if quick else 3):
        rates["plain"].append(_generated(engine, prompt, rows, count, None))
        rates["looking"].append(_generated(engine, prompt, rows, count, CODE_TAGS))
        if model is not None:
            rates["generate"].append(_transformers(model, prompt, rows, count))
    best = {name: max(taken) for name, taken in rates.items() if taken}
    if model is None:
        yield Figure(f"ids of {rows} rows", best["plain"], "a second")
    else:
        ratio = best["plain"] / best["generate"]
        yield Figure(f"ids of {rows} rows", best["plain"], "a second", "model.generate of transformers", ratio)
    ratio = best["looking"] / best["plain"]
    yield Figure(f"ids of {rows} rows, looking for code", best["looking"], "a second", f"ids of {rows} rows", ratio)


def _generated(engine: Engine, prompt: list[int], rows: int, count: int, markup: Markup | None) -> float:
    limits = Limits(max_new_tokens=count, ignore_eos=True)
    with Generator(engine, markup=markup, limits=limits) as generator:
        if markup is not None:
            generator.generate([Prompt(ids=tuple(prompt), limits=Limits(max_new_tokens=1))])  # starts the sandboxes
        start = time.perf_counter()
        batch = generator.generate([Prompt(ids=tuple(prompt))], rows)
        taken = time.perf_counter() - start
    return sum(sum(row.mask) for row in batch) / taken


def _transformers(model: Any, prompt: list[int], rows: int, count: int) -> float:
    import torch

    ids = torch.tensor([prompt] * rows, device=model.device)
    start = time.perf_counter()
    with torch.inference_mode():
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            max_new_tokens=count,
            min_new_tokens=count,
            pad_token_id=0,
        )
    return float((made.shape[1] - ids.shape[1]) * rows / (time.perf_counter() - start))
