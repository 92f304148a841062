"""Steering an engine: prompts that say what comes after them, for a model that copies.

A conformance suite must know what an engine is going to say. So its prompts hold it, and the model says again,
id by id, what stands :data:`PERIOD` ids before: a prompt of that length is written out once more behind itself.
Where the text holds the result of a block, the prompt holds as many :data:`GAP` ids: an engine that puts
the result anywhere else, loses an id, or has another row's keys and values, goes on with the wrong text.

:mod:`midstream.testing.steered_model` is that model for transformers, vLLM and servers. :func:`next_logprobs`
says the same without one, and :func:`script` has a :class:`~midstream.engines.scripted.ScriptedEngine` say it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from midstream.engines.base import RowRequest, sample_seed
from midstream.engines.noise import uniform
from midstream.errors import ConfigurationError
from midstream.vocabulary import TokenizerSource, Vocabulary

PERIOD = 160
"""How many ids before its place in a row an id is copied from. Prompts have at least as many ids."""

CONTEXT = 1024
"""The most ids of a row of the steered model."""

CHOICES = 8
"""How many ids may come where a prompt says :data:`CHOICE`: the digits from 0."""

SURE = 32.0
"""The logit of the id that is copied; all others have 0, and so its logprob is exactly 0.0 in float32."""

_TAGS = ("<code>", "</code>")
_INSIDE_TAGS = {tag[i:j] for tag in _TAGS for i in range(len(tag)) for j in range(i + 2, len(tag) + 1)}
_ACROSS_TAGS = (
    *(f">{after}" for after in ("x", "<", "\n", "\n\n", " ", ".", "STOP", "1")),
    *(f"{before}</" for before in (")", "1", "2")),
    *(
        "1</code>",
        "<code>1",
        "</code>STOP",
        "</code><code>",
        "<code>1</code>",
        "</code><code>2</code>",
        " <code>",
        "><code>",
    ),
)
_WORDS = (
    "STOP",
    "ST",
    "OP",
    "aSTOPb",
    "TOPx",
    "is",
    " the",
    " and so",
    "\n\n",
    "x = 3",
    "print(",
    "<result>",
    "</result>",
)
_PIECES = (
    *(bytes([byte]) for byte in range(256)),
    *(text.encode() for text in (*sorted(_INSIDE_TAGS), *_ACROSS_TAGS, *_WORDS)),
)
_IDS = {piece: token_id for token_id, piece in enumerate(_PIECES)}
SPECIAL = {"<eos>": len(_PIECES), "<gap>": len(_PIECES) + 1, "<choice>": len(_PIECES) + 2}
EOS, GAP, CHOICE = SPECIAL.values()
SIZE = len(_PIECES) + len(SPECIAL)
FIRST_DIGIT = ord("0")


def piece(token_id: int) -> bytes:
    """The bytes of an id of the steered model's vocabulary."""
    if token_id < len(_PIECES):
        return _PIECES[token_id]
    return next((text.encode() for text, i in SPECIAL.items() if i == token_id), b"")


VOCABULARY = Vocabulary(
    TokenizerSource(
        size=SIZE,
        piece=piece,
        encode_text=lambda text: list(text.encode()),
        encode_prompt=lambda text: list(text.encode()),
        added=SPECIAL,
        eos_ids=frozenset((EOS,)),
    )
)
"""The steered model's tokenizer. It encodes a text into one id a byte; its other ids hold tags in all their parts."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A result, as it stands behind its block."""

    text: str


Part = str | int | Shown
"""A part of what a row is to become: a token by its text (a text that is none is cut into bytes); an id; a result."""


@dataclass(frozen=True, slots=True)
class Steered:
    """A prompt, and what its row becomes: ids behind the prompt and their mask. :data:`CHOICE` stands for any digit."""

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    mask: tuple[int, ...]

    def agrees(self, ids: Sequence[int], mask: Sequence[int]) -> int | None:
        """None where these are the first ids behind the prompt and their mask, else the first place that differs."""
        for place, (found, own) in enumerate(zip(ids, mask, strict=True)):
            if place >= len(self.ids) or own != self.mask[place] or not self._allows(place, found):
                return place
        return None

    def _allows(self, place: int, found: int) -> bool:
        if self.ids[place] == CHOICE:
            return FIRST_DIGIT <= found < FIRST_DIGIT + CHOICES
        return found == self.ids[place]


def steered(*parts: Part, before: Sequence[int] = (), end: bool = True) -> Steered:
    """A prompt whose row becomes ``parts``, with an end of sequence behind them if ``end``.

    ``before``: ids that the prompt begins with, so that it is longer than others. Raises
    :class:`~midstream.errors.ConfigurationError` where the parts are more ids than :data:`PERIOD`.
    """
    ids: list[int] = []
    mask: list[int] = []
    for part in (*parts, *((EOS,) if end else ())):
        new = ids_of(part)
        ids += new
        mask += [int(not isinstance(part, Shown))] * len(new)
    if len(ids) > PERIOD:
        raise ConfigurationError(f"parts: they are {len(ids)} ids, and a prompt can say {PERIOD}")
    said = [token_id if own else GAP for token_id, own in zip(ids, mask, strict=True)]
    filler = [FIRST_DIGIT] * (PERIOD - len(said))
    return Steered((*before, *said, *filler), tuple(ids), tuple(mask))


def ids_of(part: Part) -> list[int]:
    """The ids of a part, as the steered model says it, or as it is injected."""
    if isinstance(part, int):
        return [part]
    if isinstance(part, Shown):
        return VOCABULARY.encode_text(part.text)
    token_id = _IDS.get(part.encode())
    return VOCABULARY.encode_text(part) if token_id is None else [token_id]


def next_logprobs(ids: Sequence[int], temperature: float = 1.0) -> Mapping[int, float]:
    """What the steered model may say after ``ids``, at least :data:`PERIOD` of them, and with which logprobs."""
    copied = ids[len(ids) - PERIOD]
    if copied != CHOICE:
        return {copied: 0.0}
    logits = [place / 4 / temperature for place in range(CHOICES)]
    total = math.log(sum(map(math.exp, logits)))
    return {FIRST_DIGIT + place: logit - total for place, logit in enumerate(logits)}


def next_id(ids: Sequence[int], noise: float) -> int:
    """What the steered model says after ``ids`` where the noise, between 0 and 1, is this."""
    left = noise
    likely = next_logprobs(ids)
    for token_id, logprob in likely.items():
        left -= math.exp(logprob)
        if left < 0:
            return token_id
    return max(likely)


def script(request: RowRequest, sample: int) -> list[int]:
    """What the steered model says for a row, as a ``ScriptedEngine``'s script: results are where they belong."""
    ids = list(request.ids)
    seed = sample_seed(request.seed, sample)
    said = []
    for _ in range(PERIOD):
        token_id = next_id(ids, uniform(seed, len(ids)))
        if token_id != GAP:
            said.append(token_id)
        ids.append(token_id)
    return said
