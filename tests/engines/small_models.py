"""Small random models, rows to drive through an engine, and a slow reference for what must come out."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers

from midstream.engines.base import Engine, RowRequest, sample_seed
from midstream.engines.noise import uniform
from midstream.engines.sampling import filtered
from midstream.types import Sampling

torch.set_num_threads(1)

VOCABULARY = 64
CONTEXT = 160
GREEDY = Sampling(temperature=0)

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GROUPED: dict[str, Any] = _SHAPE | {"num_key_value_heads": 2, "intermediate_size": 48}
_MIXED = ["sliding_attention", "full_attention"]
_SPECIAL: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}

CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**_GROUPED),
    "llama-eager": lambda: transformers.LlamaConfig(**_GROUPED, attn_implementation="eager"),
    "qwen2": lambda: transformers.Qwen2Config(**_GROUPED),
    "qwen2-sliding": lambda: transformers.Qwen2Config(
        **_GROUPED, use_sliding_window=True, sliding_window=8, max_window_layers=1
    ),
    "qwen3": lambda: transformers.Qwen3Config(**_GROUPED, head_dim=8),
    "mistral": lambda: transformers.MistralConfig(**_GROUPED, sliding_window=None),
    "mistral-sliding": lambda: transformers.MistralConfig(**_GROUPED, sliding_window=8),
    "mixtral": lambda: transformers.MixtralConfig(**_GROUPED, num_local_experts=4),
    "gemma": lambda: transformers.GemmaConfig(**_GROUPED, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(**_GROUPED, head_dim=8, sliding_window=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_GROUPED, head_dim=8, sliding_window=8, layer_types=_MIXED),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, initializer_range=0.3, **_SPECIAL
    ),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**_SHAPE, intermediate_size=48),
    "bloom": lambda: transformers.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3, **_SPECIAL
    ),
    "llama4-chunked": lambda: transformers.Llama4TextConfig(
        **_GROUPED, head_dim=8, attention_chunk_size=8, num_local_experts=2, intermediate_size_mlp=48
    ),
    "qwen3-next": lambda: transformers.Qwen3NextConfig(
        **_GROUPED,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.3, **_SPECIAL
    ),
}
RAGGED = [name for name in CONFIGS if name not in ("bloom", "llama4-chunked", "qwen3-next", "mamba")]
ROW_CACHES = ["bloom", "llama4-chunked", "qwen3-next"]
NO_CACHE = ["mamba"]


@cache
def small_model(name: str) -> Any:
    """The model of that name, the same weights every time. Shared: a test that changes it makes its own."""
    return fresh_model(name)


def fresh_model(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()


def random_ids(count: int, seed: int = 0) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(VOCABULARY, (count,), generator=generator).tolist())


@dataclass(frozen=True)
class Event:
    """After ``after`` sampled ids (counted from the last event): take back ``rollback`` ids, stay held for
    ``wait`` steps, then append ``result``."""

    after: int
    result: tuple[int, ...] = ()
    rollback: int = 0
    wait: int = 0


@dataclass(frozen=True)
class Script:
    """One row: what it starts from, what happens to it, and how many ids are sampled after the last event."""

    ids: tuple[int, ...]
    events: tuple[Event, ...] = ()
    tail: int = 5
    sampling: Sampling = GREEDY
    seed: int = 0
    opened_at: int = 0


@dataclass
class Played:
    """A row as the driver saw it: all ids, and for each the logprob (None where it was not sampled)."""

    script: Script
    ids: list[int]
    logprobs: list[float | None]
    versions: list[int] = field(default_factory=list)
    exhausted: bool = False
    error: str | None = None

    @property
    def seed(self) -> int:
        return sample_seed(self.script.seed, 0)


def play(engine: Engine, scripts: list[Script], steps: int = 3000) -> list[Played]:
    """Drive each script to its end. Rows are closed as soon as they are done."""
    played = [Played(script, list(script.ids), [None] * len(script.ids)) for script in scripts]
    place = [0] * len(scripts)  # which event is next
    sampled = [0] * len(scripts)  # since the last event
    handles: dict[int, int] = {}
    due: dict[int, list[int]] = {}
    unfinished = set(range(len(scripts)))
    for step in range(steps):
        for row, script in enumerate(scripts):
            if script.opened_at == step:
                request = RowRequest(script.ids, sampling=script.sampling, seed=script.seed)
                handles[engine.open(request)[0]] = row
        for handle in due.pop(step, []):
            row = handles[handle]
            result = scripts[row].events[place[row]].result
            engine.extend(handle, result)
            played[row].ids += result
            played[row].logprobs += [None] * len(result)
            place[row] += 1
            sampled[row] = 0
        for update in engine.step():
            row = handles[update.handle]
            record, script = played[row], scripts[row]
            record.ids += update.ids
            record.logprobs += update.logprobs
            sampled[row] += len(update.ids)
            record.exhausted, record.error = update.exhausted, update.error
            last = place[row] == len(script.events)
            if update.exhausted or update.error or (last and sampled[row] >= script.tail):
                engine.close(update.handle)
                unfinished.discard(row)
            elif not last and sampled[row] >= script.events[place[row]].after:
                event = script.events[place[row]]
                back = min(event.rollback, sampled[row])
                engine.rollback(update.handle, back)
                del record.ids[len(record.ids) - back :], record.logprobs[len(record.logprobs) - back :]
                due.setdefault(step + 1 + event.wait, []).append(update.handle)
        if not unfinished:
            return played
    raise AssertionError(f"rows {sorted(unfinished)} did not end")


def teacher_forced(model: Any, ids: list[int]) -> torch.Tensor:
    """The logits ``[ids, vocabulary]`` of one plain pass over the whole row, float32."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits[0].float()


def check_exact(model: Any, row: Played, tolerance: float = 1e-4) -> int:
    """Every sampled id is the one that the row's settings and noise name, with its logprob; counts them.

    Up to rounding: a greedy id may be within ``tolerance`` of the largest logit, a drawn id's stretch of the
    cumulative distribution may miss the noise by ``tolerance``.
    """
    logits = teacher_forced(model, row.ids)
    checked = 0
    for position, logprob in enumerate(row.logprobs):
        if logprob is None:
            continue
        before, token_id = logits[position - 1], row.ids[position]
        assert abs(before.log_softmax(-1)[token_id].item() - logprob) <= tolerance
        if row.script.sampling.greedy:
            assert (before.max() - before[token_id]).item() <= tolerance
        else:
            probabilities = filtered(before[None], [row.script.sampling])[0].double().softmax(-1)
            above = probabilities[: token_id + 1].sum().item()
            below = above - probabilities[token_id].item()
            assert below - tolerance <= uniform(row.seed, position) <= above + tolerance
        checked += 1
    return checked
