"""The drop-in over transformers' own ``generate`` with stop strings, beside the engine with its own decode loop.

A random model writes no tags, so the tags are taken from what it writes: then blocks open and close wherever
the tokens happen to be cut, and what is in them is mostly a syntax error, whose message is injected.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
import transformers

from midstream import Generator, HuggingFaceEngine, Limits, Markup, Prompt, Sampling, SandboxPool, StopKind
from midstream import generate_with_code_and_tools as drop_in
from midstream.markup import Frame
from tests.policies import input_batch, padded_output
from tests.vocabularies import tokenizer as vocabulary_tokenizer

PROMPTS = ["The sum of 3 and 4 is", "x = 3; y", "We try"]
NEW = 90
GREEDY = Sampling(temperature=0)


@cache
def hf_tokenizer() -> Any:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=vocabulary_tokenizer("tagged"), eos_token="<eos>", pad_token="<eos>"
    )


@cache
def model() -> Any:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=len(hf_tokenizer()),
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=1024,
        initializer_range=0.35,
        bos_token_id=None,
        eos_token_id=hf_tokenizer().eos_token_id,
        pad_token_id=hf_tokenizer().eos_token_id,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class GeneratingPolicy:
    """``model.generate`` with the stop strings of all rows, row by row, so that no id needs to be guessed padding."""

    def __init__(self) -> None:
        self.rounds = 0

    @torch.no_grad()
    def generate(self, batch: Any, greedy: bool = False) -> Any:
        assert greedy
        self.rounds += 1
        stops = sorted({stop for strings in batch["stop_strings"] for stop in strings})
        prompts, new, logprobs, truncated = [], [], [], []
        for ids, length in zip(batch["input_ids"], batch["input_lengths"].tolist(), strict=True):
            prompt = ids[None, :length]
            output = model().generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=NEW,
                stop_strings=stops or None,
                tokenizer=hf_tokenizer(),
                output_logits=True,
                return_dict_in_generate=True,
            )
            said = output.sequences[0, length:].tolist()
            raw = torch.cat(output.logits).log_softmax(-1)
            prompts.append(prompt[0].tolist())
            new.append(said)
            logprobs.append(raw[range(len(said)), said].tolist())
            truncated.append(len(said) == NEW)
        return padded_output(dict, prompts, new, logprobs, pad_id=hf_tokenizer().eos_token_id, truncated=truncated)


def prompt_ids() -> list[list[int]]:
    return [hf_tokenizer().encode(text, add_special_tokens=False) for text in PROMPTS]


def own_loop(pool: SandboxPool | None, markup: Markup | None, limits: Limits) -> Any:
    engine = HuggingFaceEngine(model(), hf_tokenizer(), max_batch_size=2)
    with Generator(engine, pool=pool, markup=markup, limits=limits, sampling=GREEDY) as generator:
        return generator.generate([Prompt(ids=tuple(ids)) for ids in prompt_ids()])


def tags_out_of(text: str, seed: int) -> Markup | None:
    """A start tag and an end tag that stand in ``text`` one behind the other."""
    draw = random.Random(seed)
    for _ in range(200):
        a = draw.randrange(max(1, len(text) // 2))
        start = text[a : a + 3]
        c = text.find(start) + 3 + draw.randrange(2, 12)
        end = text[c : c + draw.randrange(2, 4)]
        plain = (start + end).isascii() and (start + end).isprintable() and "<" not in start + end
        if plain and len(start) == 3 and len(end) >= 2 and start != end:
            return Markup(start, end, Frame(("{",), ("}",)), Frame(("\n{",), ("}\n",)))
    return None


@pytest.mark.parametrize("seed", range(8))
def test_rounds_of_generate_give_what_the_own_decode_loop_gives(sandboxes: SandboxPool, seed: int) -> None:
    limits = Limits(max_new_tokens=NEW, max_result_tokens=40)
    texts = [row.text for row in own_loop(None, None, limits)]
    markup = tags_out_of(texts[seed % len(texts)], seed)
    assert markup is not None
    expected = own_loop(sandboxes, markup, limits)
    assert any(row.calls for row in expected)
    policy = GeneratingPolicy()
    given = input_batch(dict, prompt_ids(), pad_id=hf_tokenizer().eos_token_id)
    output = drop_in(policy, given, hf_tokenizer(), markup=markup, limits=limits, pool=sandboxes, greedy=True)
    for index, row in enumerate(expected):
        total = row.total_length
        assert int(output["unpadded_sequence_lengths"][index]) == total
        assert output["output_ids"][index, :total].tolist() == row.ids
        assert output["token_mask"][index, :total].tolist() == row.mask
        assert torch.allclose(output["logprobs"][index, :total], torch.tensor(row.logprobs), atol=1e-4)
        assert bool(output["truncated"][index]) == row.truncated
    went_on = any(len(row.segments) > 2 for row in expected)  # generated, injected, generated
    assert policy.rounds > 1 or not went_on


def test_without_code_it_is_one_call_of_the_policy() -> None:
    policy = GeneratingPolicy()
    given = input_batch(dict, prompt_ids(), pad_id=hf_tokenizer().eos_token_id)
    output = drop_in(policy, given, hf_tokenizer(), execute_code=False, greedy=True)
    expected = own_loop(None, None, Limits(max_new_tokens=NEW))
    for index, row in enumerate(expected):
        assert output["output_ids"][index, : row.total_length].tolist() == row.ids
        assert bool(output["truncated"][index]) == (row.stop.kind is StopKind.LENGTH)
    assert policy.rounds == 1
