"""Trains the model that learning starts from: it can write code, but seldom does.

    python examples/learn_to_use_code/starting_model.py

The calculator's model always writes code. Here it is trained on from its weights for a while, on transcripts of which
only some are with code; the others answer at once, which it cannot do well. It ends in ``start/``, ready for
``from_pretrained``. Seed and steps are fixed, not the time.

Two in five of the transcripts are with code, and the model then writes code in one answer of six or so: batches are of
like lengths, the loss is a mean over ids, so an answer of few ids counts for more.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from problem_sets import KINDS  # first: it says where the calculator's modules are
from train import DEMO_FOLDER, Recipe, save, train

FOLDER = Path(__file__).with_name("start")
SEED = 4321
RECIPE = Recipe(
    code_share=0.4,
    steps=600,
    matrix_learning_rate=0.002,
    other_learning_rate=5e-4,
    warm_up_steps=50,
    short_number_steps=0,
    shares=tuple((kind, 1.0) for kind in KINDS),
)


def train_starting_model(recipe: Recipe = RECIPE, seed: int = SEED, out: Path = FOLDER) -> None:
    """Trains on from the calculator's weights, on one core, and saves the model and its tokenizer in ``out``."""
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_file(str(DEMO_FOLDER / "tokenizer.json"))
    model = LlamaForCausalLM.from_pretrained(DEMO_FOLDER, dtype=torch.float32)
    train(recipe, tokenizer, seed, lambda line: print(line, flush=True), model)
    save(model, tokenizer, out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the model that seldom writes code.")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the model (default: start/ beside this)")
    train_starting_model(out=parser.parse_args().out)


if __name__ == "__main__":
    main()
