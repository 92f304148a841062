"""Reads the blocks and the end of a row out of a record, over whole strings.

This says again, slowly and obviously, what :mod:`midstream.scanning` and :mod:`midstream.row` find while ids
arrive, and shares no code with them, so that each checks the other.
"""

from __future__ import annotations

import codecs
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from midstream.markup import Markup
from midstream.records.call_reference import calls_of
from midstream.records.entries import SegmentEntry
from midstream.records.schema import Record
from midstream.types import StopKind, StopReason


@dataclass(frozen=True, slots=True)
class Closing:
    """A call that generated text makes. ``position``: the count of ids up to and with the one that closes its
    block, or ends its turn."""

    code: str
    lookahead: str
    position: int
    kind: str = "code"
    form: int = 0


@dataclass(frozen=True, slots=True)
class Reading:
    """The closings, in order, up to the first id that must end the row (``ending``, with the count of ids)."""

    closings: tuple[Closing, ...]
    ending: tuple[StopReason, int] | None


@dataclass(frozen=True, slots=True)
class _State:
    """Between two stretches of text: which form's block is open, its code so far, whether a line begins, and
    whether nothing but whitespace stands in the turn so far."""

    form: int | None
    code: str
    line_start: bool
    blank: bool = False


@dataclass(frozen=True, slots=True)
class _Scan:
    """What one stretch held: closed blocks as (index of the id, form, code, lookahead), and the first stop string."""

    closings: list[tuple[int, int, str, str]]
    stop: tuple[int, str] | None
    form: int | None
    code: str


def decode(pieces: Sequence[bytes]) -> str:
    """The text of ids by their bytes; what is no UTF-8 becomes U+FFFD."""
    return b"".join(pieces).decode("utf-8", "replace")


def completed_texts(pieces: Sequence[bytes]) -> list[str]:
    """For each id the characters that it completes."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [decoder.decode(piece) for piece in pieces]


def read_generated(record: Record, markup: Markup | None) -> Reading:
    """What the record's generated text says, by the record's own markup and limits.

    Every id must have its piece in the record.
    """
    return _Reader(record, markup).read()


class _Reader:
    def __init__(self, record: Record, markup: Markup | None) -> None:
        self._record = record
        self._forms = () if markup is None else markup.forms
        self._closings: list[Closing] = []
        self._waiting: list[tuple[str, str, int]] = []  # calls that wait for the end of their turn
        self._turn_ended = False
        self._ending: tuple[StopReason, int] | None = None

    def read(self) -> Reading:
        record = self._record
        state = _State(None, "", line_start=True, blank=True)
        if record.prompt.open_block:
            state = self._left_open()
        position = len(record.prompt_ids)
        for segment in record.segments:
            if segment.origin == "injected":
                # Nothing that was unfinished goes on behind it; a block that was open stays open.
                state = _State(state.form, state.code, segment.text.endswith("\n"), self._turn_ended)
                self._turn_ended = False
            elif self._ending is None:
                state = self._read_segment(segment, position, state)
            position += len(segment.ids)
        return Reading(tuple(self._closings), self._ending)

    def _left_open(self) -> _State:
        text = self._record.prompt_text
        begins = [
            (text.rindex(form.start), index)
            for index, form in enumerate(self._forms)
            if form.start in text and not form.at_turn_start
        ]
        if not begins:
            return _State(None, "", line_start=True)
        _, index = max(begins)
        code = text.rpartition(self._forms[index].start)[2]
        return _State(index, code, line_start=not code or code.endswith("\n"))

    def _read_segment(self, segment: SegmentEntry, position: int, state: _State) -> _State:
        """Go through a segment in runs of text, which end at the ids that are no text."""
        limits = self._record.limits
        texts = completed_texts([self._record.piece(token_id) or b"" for token_id in segment.ids])
        begin = 0
        for index, token_id in enumerate(segment.ids):
            ends_row = token_id in self._record.eos_ids or token_id in limits.stop_ids
            closes = self._closes(token_id)
            if not ends_row and not (closes and self._is_closed(closes, texts[begin:index], state)):
                continue  # text; a closing token too, where there is nothing to close
            scan = self._take(texts[begin:index], position + begin, state)
            if self._ending is not None:
                return state
            behind = position + index + 1
            state = _State(scan.form, scan.code, line_start=False)
            if closes and (scan.form in closes or self._waiting):
                state = _State(None, "", line_start=False)
                if self._close(scan, closes, behind):
                    begin = index + 1
                    continue
            if token_id in self._record.eos_ids and limits.ignore_eos:
                begin = index + 1
                continue
            if ends_row:
                kind = StopKind.END_OF_SEQUENCE if token_id in self._record.eos_ids else StopKind.STOP_ID
                self._end(kind, str(token_id), behind)
                return state
            begin = index + 1
        scan = self._take(texts[begin:], position + begin, state)
        return _State(scan.form, scan.code, line_start=False)

    def _closes(self, token_id: int) -> set[int]:
        """The forms whose blocks this id closes."""
        if token_id not in self._record.closing_ids:
            return set()
        text = self._record.pieces.get(token_id)
        return {index for index, form in enumerate(self._forms) if text in form.closing_tokens}

    def _is_closed(self, closes: set[int], texts: list[str], state: _State) -> bool:
        scan = self._scan(texts, state)
        in_turns = any(self._forms[index].turn is not None for index in closes)
        waiting = [form for _, form, code, _ in scan.closings if self._waits(form, code)]
        return scan.form in closes or (in_turns and bool(waiting or self._waiting))

    def _waits(self, form: int, code: str) -> bool:
        markup = self._forms[form]
        return markup.turn is not None and bool(calls_of(markup.holds, code))

    def _close(self, scan: _Scan, closes: set[int], behind: int) -> bool:
        """Close what is open and end the turn, at a closing id. False where there is no call after all."""
        before = len(self._closings)
        if scan.form in closes and scan.form is not None:
            self._found(scan.form, scan.code, "", behind)
        if any(self._forms[index].turn is not None for index in closes):
            self._closings += [Closing(code, "", behind, kind, form) for kind, code, form in self._waiting]
            self._turn_ended = bool(self._waiting)
            self._waiting = []
        return len(self._closings) > before

    def _found(self, form: int, code: str, lookahead: str, position: int) -> None:
        """A block is closed: its calls are made here, or where the turn ends."""
        for kind, call in calls_of(self._forms[form].holds, code):
            if self._forms[form].turn is not None:
                self._waiting.append((kind, call, form))
            else:
                self._closings.append(Closing(call, lookahead, position, kind, form))

    def _take(self, texts: list[str], position: int, state: _State) -> _Scan:
        """Scan a run whose first id stands at ``position``, and note what it closes and whether it ends."""
        scan = self._scan(texts, state)
        for index, form, code, lookahead in scan.closings:
            self._found(form, code, lookahead, position + index + 1)
        if scan.stop is not None:
            index, stop_string = scan.stop
            self._end(StopKind.STOP_STRING, stop_string, position + index + 1)
        return scan

    def _end(self, kind: StopKind, detail: str, position: int) -> None:
        self._ending = StopReason(kind, detail), position

    def _scan(self, texts: list[str], state: _State) -> _Scan:
        text = "".join(texts)
        ends = list(accumulate(len(piece) for piece in texts))
        stop = self._first_stop(text)
        limit = len(text) if stop is None else stop[0]
        closings = []
        open_form, code, begin, search = state.form, state.code, 0, 0
        while True:
            if open_form is None:
                starts = [
                    (at + len(form.start), at, index)
                    for index, form in enumerate(self._forms)
                    if (at := self._find(text, form, form.start, search, limit, state)) >= 0
                ]
                if not starts:
                    break
                search, at, open_form = min(starts)
                begin = at if self._forms[open_form].at_turn_start else search
                continue
            form = self._forms[open_form]
            at = -1 if form.end is None else self._find(text, form, form.end, search, limit, state)
            if form.end is None or at < 0:
                break
            search = at + len(form.end)
            index = bisect_left(ends, search)
            closings.append((index, open_form, code + text[begin:at], text[search : ends[index]]))
            open_form, code, begin = None, "", search
        return _Scan(
            closings,
            None if stop is None else (bisect_left(ends, stop[0]), stop[1]),
            open_form,
            code + text[begin:] if open_form is not None else "",
        )

    def _find(self, text: str, form: Markup, tag: str, start: int, limit: int, state: _State) -> int:
        at = text.find(tag, start, limit)
        if tag == form.start and form.at_turn_start:
            return at if at >= 0 and state.blank and not text[:at].strip() else -1
        while form.at_line_start and at >= 0 and not (text[at - 1] == "\n" if at else state.line_start):
            at = text.find(tag, at + 1, limit)
        return at

    def _first_stop(self, text: str) -> tuple[int, str] | None:
        found = [
            (text.index(stop_string) + len(stop_string), stop_string)
            for stop_string in self._record.limits.stop_strings
            if stop_string in text
        ]
        return min(found, key=lambda item: item[0], default=None)
