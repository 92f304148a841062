"""The model's tokenizer: a small byte-level BPE, trained on transcripts.

Digits are single tokens, and so are the letters of words in quotes, since what the model must do with
them is copy them; for the same reason a minus sign before a digit is one token, never part of another.
Punctuation merges with punctuation and line breaks, and ``>`` with the word after it, so the token that
completes a tag often carries more than the tag: ``><``, ``>\\n``, ``>\\n\\n``, and ``>s`` of ``>so``.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from problems import training_problems
from transcripts import END_OF_SEQUENCE, pieces

VOCABULARY_SIZE = 448
PADDING = "<|pad|>"
SPLIT_PATTERN = "|".join(
    [
        r"\d",
        r" (?=-\d)",
        r"-(?=\d)",
        r"[ >]?[A-Za-z]+(?![A-Za-z'])",
        r"[A-Za-z]",
        r" ?(?:(?!-\d)[^\sA-Za-z\d])+\n*",
        r"\s*\n+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

_TEXTS = 20_000
_SEED = 1
_SHARES = {"arithmetic": 1.0, "two_step": 2.0, "string": 3.0, "list": 1.0}


def _texts() -> Iterator[str]:
    rng = random.Random(_SEED)
    problems = training_problems(_SEED, _SHARES)
    for problem in itertools.islice(problems, _TEXTS):
        yield "".join(piece.text for piece in pieces(problem, rng))


def train_tokenizer() -> Tokenizer:
    """Trains the tokenizer on transcripts of training problems; the same every time."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END_OF_SEQUENCE, PADDING],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Saves the tokenizer so that ``AutoTokenizer.from_pretrained(folder)`` loads it."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_SEQUENCE,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(str(folder))
