"""The text of one answer, as it may be shown: piece by piece, without what ended it. It does no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from midstream.decoding import TextDecoder
from midstream.deltas import Delta
from midstream.types import StopKind, StopReason, Trajectory
from midstream.vocabulary import Vocabulary

Origin = Literal["generated", "injected"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A sampled token, its logprob, and where its text begins in the row's."""

    token: str
    piece: bytes
    logprob: float
    offset: int


@dataclass(frozen=True, slots=True)
class Part:
    """Text to show, of one origin, and the tokens that came meanwhile."""

    text: str
    origin: Origin
    tokens: tuple[TokenLogprob, ...] = ()


@dataclass(slots=True)
class Span:
    """Where text of one origin stands in the answer, in characters."""

    origin: Origin
    start: int
    end: int


@dataclass(slots=True)
class Choice:
    """One row's answer.

    What is shown ends before the stop string, and before the id, that ended the row. So the beginning of what may
    become a stop string is held back until it is known not to be one; a result does not lie within one.
    ``logprobs``: whether tokens are told.
    """

    vocabulary: Vocabulary
    stop_strings: tuple[str, ...]
    logprobs: bool = False
    trajectory: Trajectory | None = None
    spans: list[Span] = field(default_factory=list)
    _held: list[tuple[str, Origin]] = field(default_factory=list)
    _matched: bool = False
    _decoder: TextDecoder | None = None
    _offset: int = 0
    _segment: int = 0

    @property
    def finish_reason(self) -> str:
        assert self.trajectory is not None
        return finish_reason(self.trajectory.stop)

    def take(self, delta: Delta) -> list[Part]:
        """What may be shown now that ``delta`` has come."""
        self.trajectory = delta.trajectory
        tokens = self._tokens(delta) if self.logprobs else ()
        shown = self._shown(delta)
        if self.trajectory is not None and self._held and self.trajectory.stop.kind is not StopKind.STOP_STRING:
            shown += self._held
            self._held = []
        if tokens and not shown:
            shown = [("", "generated")]
        parts = [Part(text, origin) for text, origin in shown if text or tokens]
        if tokens:
            parts[-1] = Part(parts[-1].text, parts[-1].origin, tokens)
        for part in parts:
            self._add_span(part)
        return parts

    def _shown(self, delta: Delta) -> list[tuple[str, Origin]]:
        text = self._without_end(delta)
        if self._matched:
            self._held.append((text, delta.origin))
            return []
        if delta.origin == "injected":
            held, self._held = self._held, []
            return [*held, (text, "injected")]
        text = "".join(held for held, _ in self._held) + text
        self._held = []
        places = [place for place in (text.find(stop) for stop in self.stop_strings) if place >= 0]
        self._matched = bool(places)
        shown = min(places) if places else len(text) - _open_end(text, self.stop_strings)
        if shown < len(text):
            self._held.append((text[shown:], "generated"))
        return [(text[:shown], "generated")]

    def _without_end(self, delta: Delta) -> str:
        """The delta's text without that of the id that ended the row."""
        trajectory = delta.trajectory
        ended = trajectory is not None and trajectory.stop.kind in (StopKind.END_OF_SEQUENCE, StopKind.STOP_ID)
        if not ended or not delta.ids:
            return delta.text
        return delta.text.removesuffix(self.vocabulary.piece(delta.ids[-1]).decode(errors="replace"))

    def _tokens(self, delta: Delta) -> tuple[TokenLogprob, ...]:
        start = self._offset
        self._offset += len(delta.text)
        if delta.origin == "injected":
            self._decoder = None
            return ()
        if self._decoder is None:
            self._decoder = TextDecoder(self.vocabulary)
            self._segment = start
        tokens = []
        for token_id, logprob in zip(delta.ids, delta.logprobs, strict=True):
            offset = self._segment + self._decoder.length
            self._decoder.feed(token_id)
            piece = self.vocabulary.piece(token_id)
            tokens.append(TokenLogprob(piece.decode(errors="replace"), piece, logprob, offset))
        return tuple(tokens)

    def _add_span(self, part: Part) -> None:
        end = self.spans[-1].end if self.spans else 0
        if self.spans and self.spans[-1].origin == part.origin:
            self.spans[-1].end = end + len(part.text)
        elif part.text:
            self.spans.append(Span(part.origin, end, end + len(part.text)))


def finish_reason(stop: StopReason) -> str:
    """OpenAI's word for a stop: the model's own end is ``stop``, whatever cut the row off ``length``."""
    return "stop" if stop.finished else "length"


def _open_end(text: str, stop_strings: Sequence[str]) -> int:
    """How many characters at the end of ``text`` are the beginning of a stop string."""
    longest = min(len(text), max((len(stop) - 1 for stop in stop_strings), default=0))
    for length in range(longest, 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stop_strings):
            return length
    return 0
