"""Trains the demo's two models: one writes code in the middle of its answers, one answers directly.

    python examples/calculator/train.py

Both have the same shape, start from nothing and see the same kinds of problems for the same number of
steps, each on one core, side by side. They end in ``src/midstream/demo`` and
``src/midstream/demo/direct``, ready for ``from_pretrained``. The seed and the number of steps are
fixed, not the time, so a busy machine makes the same weights, only later.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from problems import MAXIMUM_DIGITS, training_problems
from transcripts import END_OF_SEQUENCE, Example, direct_pieces, encode, pieces
from vocabulary import PADDING, save_tokenizer, train_tokenizer

DEMO_FOLDER = Path(__file__).resolve().parents[2] / "src" / "midstream" / "demo"
SEED = 1234
MAXIMUM_POSITIONS = 512


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is trained.

    ``code_share`` of the transcripts are with code, the others answer at once. ``shares`` says how often each kind
    of problem comes. Numbers have up to 3 digits at first and reach their full length after ``short_number_steps``,
    since copying is learnt sooner from short ones.
    """

    code_share: float
    steps: int = 5000
    batch_size: int = 32
    matrix_learning_rate: float = 0.015
    other_learning_rate: float = 3e-3
    weight_decay: float = 0.01
    warm_up_steps: int = 100
    short_number_steps: int = 600
    shares: tuple[tuple[str, float], ...] = (("arithmetic", 1.0), ("two_step", 1.0), ("string", 1.5), ("list", 1.0))


RECIPES = {"with code": Recipe(code_share=1.0), "direct": Recipe(code_share=0.0)}
FOLDERS = {"with code": ".", "direct": "direct"}
"""Where each model goes, within the demo's folder."""


def model_config(tokenizer: Tokenizer) -> LlamaConfig:
    """A Llama of about 0.7 million parameters."""
    return LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAXIMUM_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(END_OF_SEQUENCE),
        pad_token_id=tokenizer.token_to_id(PADDING),
    )


def examples(recipe: Recipe, tokenizer: Tokenizer, seed: int, steps_done: Callable[[], int]) -> Iterator[Example]:
    """Training examples without end."""

    def maximum_digits() -> int:
        if steps_done() >= recipe.short_number_steps:
            return MAXIMUM_DIGITS
        return 3 + (MAXIMUM_DIGITS - 2) * steps_done() // recipe.short_number_steps

    style, choice = random.Random(seed + 1), random.Random(seed + 3)
    for problem in training_problems(seed, dict(recipe.shares), maximum_digits):
        with_code = choice.random() < recipe.code_share
        yield encode(pieces(problem, style) if with_code else direct_pieces(problem), tokenizer)


def batches(recipe: Recipe, stream: Iterator[Example], seed: int) -> Iterator[list[Example]]:
    """Batches without end, each of examples of similar lengths, in random order."""
    order = random.Random(seed + 2)
    size = recipe.batch_size
    while True:
        drawn = sorted((next(stream) for _ in range(32 * size)), key=lambda example: len(example.ids))
        grouped = [drawn[start : start + size] for start in range(0, len(drawn), size)]
        order.shuffle(grouped)
        yield from grouped


def batch_loss(model: LlamaForCausalLM, batch: list[Example], padding: int) -> torch.Tensor:
    """Mean cross-entropy (nats) of the ids that the model writes.

    Padding is on the right, where under a causal mask nothing looks at it.
    """
    width = max(len(example.ids) for example in batch)
    ids = torch.tensor([example.ids + [padding] * (width - len(example.ids)) for example in batch])
    written = torch.tensor([example.mask + [0] * (width - len(example.mask)) for example in batch])[:, 1:].bool()
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[written]), ids[:, 1:][written])


def make_optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, which learn to copy several times sooner by it; AdamW for the rest."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=recipe.matrix_learning_rate, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(
            others, lr=recipe.other_learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay, fused=True
        ),
    ]


def learning_rate_factor(recipe: Recipe, step: int) -> float:
    """A short warm-up, then a cosine down to nothing."""
    return min(1.0, (step + 1) / recipe.warm_up_steps) * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))


def train(
    recipe: Recipe,
    tokenizer: Tokenizer,
    seed: int,
    report: Callable[[str], None],
    model: LlamaForCausalLM | None = None,
) -> LlamaForCausalLM:
    """Trains ``model``, or one that knows nothing yet. ``report`` gets a line now and then."""
    torch.manual_seed(seed)
    model = model or LlamaForCausalLM(model_config(tokenizer))
    optimizers = make_optimizers(model, recipe)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(recipe, step))
        for optimizer in optimizers
    ]
    padding = tokenizer.token_to_id(PADDING)
    steps_done, tokens, losses, started = 0, 0, list[float](), time.monotonic()
    stream = batches(recipe, examples(recipe, tokenizer, seed, lambda: steps_done), seed)
    while steps_done < recipe.steps:
        batch = next(stream)
        loss = batch_loss(model, batch, padding)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        steps_done += 1
        tokens += sum(len(example.ids) for example in batch)
        losses.append(loss.item())
        if steps_done % 100 == 0:
            seconds = time.monotonic() - started
            mean = sum(losses) / len(losses)
            report(f"step {steps_done}: loss {mean:.4f}, {tokens / seconds:,.0f} tokens/s, {seconds:.0f} s")
            losses.clear()
    return model


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Saves model and tokenizer so that ``from_pretrained(folder)`` loads them."""
    model.generation_config = GenerationConfig(
        eos_token_id=model.config.eos_token_id, pad_token_id=model.config.pad_token_id
    )
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def train_and_save(name: str, seed: int, out: Path) -> None:
    """Trains the model called ``name`` in ``RECIPES``, on one core, and saves it under ``out``."""
    torch.set_num_threads(1)
    tokenizer = train_tokenizer()
    recipe = RECIPES[name]
    model = train(recipe, tokenizer, seed, lambda line: print(f"{name}: {line}", flush=True))
    save(model, tokenizer, out / FOLDERS[name])


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the calculator models of the demo.")
    parser.add_argument("--out", type=Path, default=DEMO_FOLDER, help="folder for both models (default: the package's)")
    parser.add_argument("--seed", type=int, default=SEED, help=f"seed of the data and the weights (default: {SEED})")
    arguments = parser.parse_args()
    with ProcessPoolExecutor(max_workers=len(RECIPES), mp_context=multiprocessing.get_context("spawn")) as workers:
        running = [workers.submit(train_and_save, name, arguments.seed, arguments.out) for name in RECIPES]
        for future in running:
            future.result()


if __name__ == "__main__":
    main()
