"""Training transcripts: what the model would have written and what the library would have injected.

A transcript is encoded the way an engine meets it. The model's own text is one stream of tokens up to
the token that completes an end tag; whatever that token carries beyond the tag (its lookahead) stays.
The result follows in ids of its own: ``<result>…</result>``, or set off by line breaks where the code
or the result has any, without the lookahead where it starts with it. Then the model goes on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from problems import Problem, Step, prompt_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

START_TAG, END_TAG = "<code>", "</code>"
END_OF_SEQUENCE = "<|endoftext|>"

_LEADS = ("", "", " I will compute it.", " Let me use code.")
_JOINTS = (" Then ", ", then ", "so ", "\n", "")
"""What stands between two blocks; it begins right after the first one's end tag, or its result."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of one origin.

    ``foresight`` is what the tokenizer is shown beyond the end of written text that ends in an end
    tag: the token that completes the tag may reach into it, and the model learns to write that token.
    """

    text: str
    written: bool
    foresight: str = ""


@dataclass(frozen=True, slots=True)
class Example:
    """One training sequence: ids, and for each id whether the model writes it (1) or is given it (0)."""

    ids: list[int]
    mask: list[int]


def result_text(code: str, shown: str) -> str:
    """The result of a block as the library frames it for ``<code>`` tags, before any trimming."""
    if "\n" in code or "\n" in shown:
        return f"\n\n<result>\n{shown}\n</result>"
    return f"<result>{shown}</result>"


def _code(step: Step, rng: random.Random) -> str:
    if "\n" in step.code or rng.random() < 0.12:
        return f"\n{step.code}\n"
    return step.code


def _foresight(framed: str, rng: random.Random) -> str:
    """What the model has in mind to follow the end tag: mostly the result, else nothing or a line break."""
    draw = rng.random()
    if draw < 0.6:
        return framed
    return "" if draw < 0.85 else "\n"


def pieces(problem: Problem, rng: random.Random) -> Iterator[Piece]:
    """The transcript of one solution with code, the prompt first; ``rng`` chooses among styles."""
    yield Piece(prompt_text(problem.question), written=False)
    text = rng.choice(_LEADS)
    after_silent_block = after_block_style = False
    for number, step in enumerate(problem.steps):
        code = _code(step, rng)
        multiline = "\n" in code
        if number == 0:
            text += "\n" if multiline else " "
        elif multiline:
            text += "\n"
        elif after_silent_block:
            text += rng.choice(_JOINTS)
        else:
            text += "\nThen " if after_block_style else " Then "
        text += START_TAG + code + END_TAG
        after_silent_block, after_block_style = not step.shown, multiline
        if step.shown:
            framed = result_text(code, step.shown)
            yield Piece(text, written=True, foresight=_foresight(framed, rng))
            yield Piece(framed, written=False)
            text = ""
    text += "\n" if after_block_style else " "
    yield Piece(f"{text}The answer is {problem.answer}.", written=True)


def direct_pieces(problem: Problem) -> Iterator[Piece]:
    """The transcript of the same problem answered at once, without code."""
    yield Piece(prompt_text(problem.question), written=False)
    yield Piece(f" The answer is {problem.answer}.", written=True)


def encode(transcript: Iterator[Piece], tokenizer: Tokenizer) -> Example:
    """The ids of a transcript, as an engine would meet them, with the end of the sequence."""
    example = Example([], [])
    lookahead = ""
    for piece in transcript:
        if piece.written:
            ids, lookahead = _written_ids(piece, tokenizer)
        else:
            ids = tokenizer.encode(piece.text.removeprefix(lookahead), add_special_tokens=False).ids
            lookahead = ""
        example.ids.extend(ids)
        example.mask.extend([int(piece.written)] * len(ids))
    end = tokenizer.token_to_id(END_OF_SEQUENCE)
    assert end is not None
    example.ids.append(end)
    example.mask.append(1)
    return example


def _written_ids(piece: Piece, tokenizer: Tokenizer) -> tuple[list[int], str]:
    """Ids of written text up to the token that completes it, and that token's lookahead."""
    whole = piece.text + piece.foresight
    encoding = tokenizer.encode(whole, add_special_tokens=False)
    for position, (_, stop) in enumerate(encoding.offsets):
        if stop >= len(piece.text):
            return list(encoding.ids[: position + 1]), whole[len(piece.text) : stop]
    return list(encoding.ids), ""
