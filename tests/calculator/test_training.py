"""The training program's pieces: what is learnt from, in what order, and that it learns."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from problems import MAXIMUM_DIGITS
from train import RECIPES, batch_loss, batches, examples, learning_rate_factor, model_config, save, train
from transcripts import START_TAG, Example
from vocabulary import PADDING

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Tokenizer


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_only_written_ids_are_learnt_and_padding_changes_nothing(tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(model_config(tokenizer))
    padding = tokenizer.token_to_id(PADDING)
    short, long = Example([40, 41, 42, 43], [0, 1, 0, 1]), Example([50, 51, 52, 53, 54, 55], [0, 0, 0, 1, 1, 1])
    logits = {id(e): model(input_ids=torch.tensor([e.ids])).logits[0].log_softmax(-1) for e in (short, long)}
    terms = [
        -logits[id(example)][position - 1, example.ids[position]]
        for example in (short, long)
        for position in range(1, len(example.ids))
        if example.mask[position]
    ]
    expected = torch.stack(terms).mean()
    torch.testing.assert_close(batch_loss(model, [short, long], padding), expected)


def test_batches_hold_every_example_once_and_like_lengths_together() -> None:
    recipe = replace(RECIPES["with code"], batch_size=4)
    lengths = [1 + (index * 37) % 128 for index in range(128)]
    stream = iter([Example([0] * length, [1] * length) for length in lengths])
    drawn = list(itertools.islice(batches(recipe, stream, seed=3), 32))
    assert sorted(len(example.ids) for batch in drawn for example in batch) == sorted(lengths)
    assert all(max(len(e.ids) for e in batch) - min(len(e.ids) for e in batch) <= 4 for batch in drawn)
    firsts = [len(batch[0].ids) for batch in drawn]
    assert firsts != sorted(firsts)


def test_numbers_grow_to_their_full_length(tokenizer: Tokenizer) -> None:
    recipe = replace(RECIPES["with code"], shares=(("arithmetic", 1.0),))

    def longest_number(steps_done: int) -> int:
        drawn = itertools.islice(examples(recipe, tokenizer, 4, lambda: steps_done), 200)
        questions = [tokenizer.decode(example.ids).split("\nA:")[0] for example in drawn]
        return max(len(word.strip("().?")) for question in questions for word in question.split() if word[-1:] in ".?")

    assert longest_number(0) == 3
    assert longest_number(recipe.short_number_steps) == MAXIMUM_DIGITS


@pytest.mark.parametrize(("share", "least", "most"), [(0.0, 0, 0), (0.4, 80, 160), (1.0, 300, 300)])
def test_the_share_of_transcripts_with_code(tokenizer: Tokenizer, share: float, least: int, most: int) -> None:
    recipe = replace(RECIPES["with code"], code_share=share)
    drawn = [tokenizer.decode(e.ids) for e in itertools.islice(examples(recipe, tokenizer, 6, lambda: 0), 300)]
    assert least <= sum(START_TAG in text for text in drawn) <= most


def test_the_learning_rate_warms_up_and_falls_to_nothing() -> None:
    recipe = RECIPES["with code"]
    factors = [learning_rate_factor(recipe, step) for step in range(recipe.steps + 1)]
    assert factors[0] == pytest.approx(1 / recipe.warm_up_steps)
    assert max(factors) == max(factors[: recipe.warm_up_steps + 1])
    assert factors[-1] == pytest.approx(0.0)


def test_training_learns_and_is_reproducible(tokenizer: Tokenizer, tmp_path: Path) -> None:
    recipe = replace(RECIPES["direct"], steps=40, batch_size=8, warm_up_steps=10)
    first, again = (train(recipe, tokenizer, 9, lambda line: None) for _ in range(2))
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    padding = tokenizer.token_to_id(PADDING)
    fresh = list(itertools.islice(examples(recipe, tokenizer, 77, lambda: 0), 16))
    torch.manual_seed(9)
    untrained = LlamaForCausalLM(model_config(tokenizer))
    assert batch_loss(first, fresh, padding) < 0.7 * batch_loss(untrained, fresh, padding)

    save(first, tokenizer, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, first.lm_head.weight)
    assert AutoTokenizer.from_pretrained(tmp_path).encode("A: 12") == tokenizer.encode("A: 12").ids
