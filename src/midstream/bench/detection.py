"""What midstream's own work takes for each sampled id of a row: decoding, looking for tags, keeping the row.

Of every id, on average over the row so far:

- ``detect``: the decoder and the scanner alone, which say where a block opens and closes;
- ``row``: ``Row.receive``, all that happens to an id between the engine and the next step.

Texts: ``prose`` without tags; ``nearly``, full of beginnings of tags; ``inside``, one long open block; and ``blocks``,
a block every 60 ids or so, whose result is put in. Times are of this thread's processor time, the best of several
rows; flat means that an id late in a row costs no more than an early one.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from midstream.bench.figures import Figure
from midstream.decoding import TextDecoder
from midstream.markup import CODE_TAGS
from midstream.row import Row, RowState
from midstream.scanning import Scanner
from midstream.types import ExecutionResult, Limits, Prompt
from midstream.vocabulary import TokenizerSource, Vocabulary

STOP_STRINGS = ("</answer>",)
PROSE = "The sum of the squares of the first ten numbers is three hundred and eighty-five, so we go on.\n"
TEXTS = {
    "prose": PROSE,
    "nearly": "if a < b: <co <cod </cod </ <result </answer nothing of it is whole.\n",
    "inside": "<code>",
    "blocks": PROSE * 2 + "<code>total = sum(n * n for n in range(11))</code>\n",
}
_PIECES = re.compile(r" ?\w+|\s|[^\w\s]")
POINTS = (1_000, 10_000, 100_000)
"""Counts of ids at which the average so far is read off."""


@dataclass
class Measurement:
    """Microseconds an id, on average over the first 1,000 ids of the row, the first 10,000, and so on."""

    tokenizer: str
    text: str
    what: str
    microseconds: dict[int, float]


def ids_of(vocabulary: Vocabulary, kind: str, count: int) -> list[int]:
    """``count`` ids of a text, repeated as often as it takes."""
    start = vocabulary.encode_text(TEXTS["inside"]) if kind == "inside" else []
    once = vocabulary.encode_text(PROSE if kind == "inside" else TEXTS[kind])
    return (start + once * (count // len(once) + 1))[:count]


def points_up_to(count: int) -> list[int]:
    return [point for point in POINTS if point <= count] or [count]


def time_at_points(feed: Iterator[None], points: list[int]) -> dict[int, float]:
    """Run ``feed`` an id at a time, and read the clock at each point only."""
    found = {}
    taken, begin = 0, time.thread_time()
    for point in points:
        for _ in range(point - taken):
            next(feed)
        taken = point
        found[point] = (time.thread_time() - begin) / point * 1e6
    return found


def detect(loaded: Any, ids: list[int]) -> Iterator[None]:
    decoder = TextDecoder(Vocabulary.of(loaded))
    scanner = Scanner(CODE_TAGS, STOP_STRINGS)
    for token_id in ids:
        scanner.feed(decoder.feed(token_id))
        yield


def keep_row(loaded: Any, ids: list[int]) -> Iterator[None]:
    row = Row(Prompt(text="Q:"), loaded, CODE_TAGS, Limits(stop_strings=STOP_STRINGS))
    result = ExecutionResult("385")
    logprobs = (-0.5,)
    for token_id in ids:
        row.receive((token_id,), logprobs)
        if row.state is RowState.EXECUTING:
            row.inject(*(result for _ in row.pending))
        yield


WHAT: dict[str, Callable[[Any, list[int]], Iterator[None]]] = {"detect": detect, "row": keep_row}


def measurements(name: str, loaded: Any, count: int, repeats: int) -> Iterator[Measurement]:
    vocabulary = Vocabulary.of(loaded)
    points = points_up_to(count)
    for kind in TEXTS:
        ids = ids_of(vocabulary, kind, points[-1])
        for what, feed in WHAT.items():
            runs = [time_at_points(feed(loaded, ids), points) for _ in range(repeats)]
            best = {point: round(min(run[point] for run in runs), 2) for point in points}
            yield Measurement(name, kind, what, best)


def words() -> Vocabulary:
    """A vocabulary that needs no tokenizer: an id for each word and mark of the texts, and for each byte."""
    pieces = [bytes((byte,)) for byte in range(256)]
    found = {piece for text in TEXTS.values() for piece in _PIECES.findall(text)}
    pieces += sorted(piece.encode() for piece in found if len(piece.encode()) > 1)
    ids = {piece: place for place, piece in enumerate(pieces)}

    def encode(text: str) -> list[int]:
        known = [ids.get(piece.encode(), piece) for piece in _PIECES.findall(text)]
        return [one for each in known for one in ([each] if isinstance(each, int) else each.encode())]

    return Vocabulary(TokenizerSource(len(pieces), pieces.__getitem__, encode, encode))


def measure(tokenizer: Any = None, *, quick: bool = False) -> Iterator[Figure]:
    """Microseconds an id late in a long row, beside those early in it. By default with a vocabulary of words."""
    for one in measurements(
        "", words() if tokenizer is None else tokenizer, 10_000 if quick else POINTS[-1], 2 if quick else 3
    ):
        (first, early), *_, (last, late) = one.microseconds.items()
        name = f"{one.what}: an id of {one.text}, first {last:,} of a row"
        yield Figure(name, late, "µs", f"of the first {first:,}", late / early)
