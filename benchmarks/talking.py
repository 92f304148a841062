"""A Hugging Face model whose every id is computed, and then replaced by what a script has it say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import transformers

from midstream.engines.base import Capabilities, Handle, RowRequest, Update
from midstream.engines.huggingface import HuggingFaceEngine, Statistics
from midstream.types import Media
from midstream.vocabulary import Vocabulary
from tests.vocabularies import tokenizer

_IDS = 8192
"""The model's own vocabulary: small, so that a step is not all output layer."""


class TalkingModel:
    """A random Llama of 20M parameters, and a real tokenizer of many more ids."""

    def __init__(self, *, vocabulary: str = "o200k", threads: int = 1) -> None:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self.tokenizer = tokenizer(vocabulary)
        config = transformers.LlamaConfig(
            vocab_size=_IDS,
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=8,
            num_attention_heads=6,
            num_key_value_heads=6,
            max_position_embeddings=8192,
            initializer_range=0.05,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
        self.model: Any = transformers.LlamaForCausalLM(config).eval()

    def engine(self, texts: Mapping[str, str], **options: Any) -> TalkingEngine:
        """An engine whose rows say ``texts``, by the text of their prompts, and then end the sequence."""
        return TalkingEngine(self, texts, **options)


class TalkingEngine:
    """Every step computes what it would with a model that writes code by itself; the ids alone are the script's.

    The model sees ids folded into its own vocabulary: what it is given to compute on is as much, and nobody looks
    at what it makes of it.
    """

    def __init__(self, talking: TalkingModel, texts: Mapping[str, str], **options: Any) -> None:
        self._vocabulary = Vocabulary.of(talking.tokenizer)
        self._inner = HuggingFaceEngine(talking.model, talking.tokenizer, **options)
        self.eos_ids = self._vocabulary.eos_ids
        encode = self._vocabulary.encode_text
        end = sorted(self.eos_ids)[:1]
        self._said = {tuple(encode(prompt)): [*encode(text), *end] for prompt, text in texts.items()}
        self._rows: dict[Handle, tuple[Sequence[int], int]] = {}  # what it says, and how much of it is said

    @property
    def tokenizer(self) -> Any:
        return self._inner.tokenizer

    @property
    def capabilities(self) -> Capabilities:
        return replace(self._inner.capabilities, fork=False)

    @property
    def context_length(self) -> int | None:
        return self._inner.context_length

    @property
    def weight_version(self) -> int:
        return self._inner.weight_version

    @property
    def statistics(self) -> Statistics:
        return self._inner.statistics

    def open(self, request: RowRequest, n: int = 1) -> list[Handle]:
        handles = self._inner.open(replace(request, ids=_folded(request.ids)), n)
        self._rows.update(dict.fromkeys(handles, (self._said[request.ids], 0)))
        return handles

    def step(self) -> list[Update]:
        return [self._spoken(update) for update in self._inner.step()]

    def _spoken(self, update: Update) -> Update:
        said, place = self._rows[update.handle]
        self._rows[update.handle] = said, place + len(update.ids)
        return replace(update, ids=said[place : place + len(update.ids)])

    def extend(self, handle: Handle, ids: Sequence[int], media: Sequence[Media] = ()) -> None:
        self._inner.extend(handle, _folded(ids), media)

    def rollback(self, handle: Handle, k: int) -> None:
        said, place = self._rows[handle]
        self._rows[handle] = said, place - k
        self._inner.rollback(handle, k)

    def fork(self, handle: Handle, seed: int) -> Handle:
        raise NotImplementedError

    def close(self, handle: Handle) -> None:
        del self._rows[handle]
        self._inner.close(handle)

    def pause(self) -> None:
        self._inner.pause()

    def set_weights(self, version: int, *, keep_cache: bool) -> None:
        self._inner.set_weights(version, keep_cache=keep_cache)

    def resume(self) -> None:
        self._inner.resume()

    def shutdown(self) -> None:
        self._inner.shutdown()


def _folded(ids: Sequence[int]) -> tuple[int, ...]:
    return tuple(token_id % _IDS for token_id in ids)
