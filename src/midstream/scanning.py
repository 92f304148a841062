"""Finds tags and stop strings in text that arrives piece by piece.

Each piece costs time in its own length and that of the longest pattern, however long the text already is:
only as much of it is kept as a pattern that is not complete yet could need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from midstream.errors import PromptError
from midstream.markup import Markup


@dataclass(frozen=True, slots=True)
class Opened:
    """A start tag is complete. ``form``: of which of the markup's forms."""

    form: int = 0


@dataclass(frozen=True, slots=True)
class Code:
    """More of the open block's code: characters that can no longer be part of its end tag."""

    text: str


@dataclass(frozen=True, slots=True)
class Closed:
    """The open block's end tag is complete. ``after``: how many characters of the piece it took."""

    code: str
    after: int
    form: int = 0


@dataclass(frozen=True, slots=True)
class Matched:
    """A stop string is complete. Nothing is looked for after it."""

    stop_string: str


Found = Opened | Code | Closed | Matched


class Scanner:
    """The state of one row's search: inside a block or not, and what may be the beginning of a pattern."""

    __slots__ = (
        "_blank",
        "_code",
        "_code_from",
        "_forms",
        "_held",
        "_keep",
        "_line_start",
        "_tag_from",
        "_window",
        "form",
        "stop_strings",
    )

    def __init__(self, markup: Markup | None, stop_strings: tuple[str, ...] = ()) -> None:
        self._forms = () if markup is None else markup.forms
        self.stop_strings = stop_strings  # may be emptied for a while, to look for tags alone
        tags = [tag for form in self._forms for tag in (form.start, form.end) if tag is not None]
        self._keep = max((len(pattern) - 1 for pattern in (*tags, *stop_strings)), default=0)
        self.form: int | None = None  # that of the open block, if there is one
        self._window = ""  # the end of the text so far, as much as an unfinished pattern may need
        self._line_start = True  # whether the window begins where a line begins
        self._blank = True  # whether nothing but whitespace stands between the turn's begin and the window
        self._tag_from = 0  # where in the window the next tag may begin: tags never overlap
        self._code_from = 0  # where in the window code that is not reported yet begins
        self._code: list[str] = []  # the open block's code, reported already
        self._held = ""  # more of it, from before a reset, to be reported with the next piece

    @property
    def inside(self) -> bool:
        """Whether a block is open."""
        return self.form is not None

    def open(self, code: str, form: int = 0) -> None:
        """Be inside a block whose code so far is ``code`` (a prompt that ends inside one)."""
        self.form = form
        self._held = code
        self._line_start = not code or code.endswith("\n")
        self._blank = False

    def feed(self, text: str) -> list[Found]:
        """What ``text`` completes, in order. Ends at the first stop string.

        Of a tag and a stop string that the same character completes, the tag comes first.
        """
        if not text:
            return []
        seen = len(self._window)
        self._window += text
        found = self._report_held()
        stop = self._find_stop(seen)
        limit = len(self._window) if stop is None else stop[0]
        if self._forms:
            self._find_tags(seen, limit, found)
        if stop is not None:
            found.append(Matched(stop[1]))
        self._forget()
        return found

    def close(self) -> list[Found]:
        """Close the open block here, at a closing token that is no text."""
        found = self._report_held()
        self._report(len(self._window), found)
        found.append(Closed("".join(self._code), 0, self.form or 0))
        self._leave()
        self.reset(line_start=False)
        return found

    def abandon(self) -> None:
        """Leave the open block, if there is one, as if it had never been opened."""
        self._leave()
        self.reset(line_start=False)

    def reset(self, *, line_start: bool, turn_start: bool = False) -> None:
        """Something else was put after the text so far: nothing unfinished goes on matching."""
        if self.inside:
            self._held += self._window[self._code_from :]
        self._window = ""
        self._line_start = line_start
        self._blank = turn_start
        self._tag_from = self._code_from = 0

    def copy(self) -> Scanner:
        other = object.__new__(Scanner)
        for name in Scanner.__slots__:
            setattr(other, name, getattr(self, name))
        other._code = list(self._code)
        return other

    def _find_tags(self, seen: int, limit: int, found: list[Found]) -> None:
        while True:
            if self.form is None:
                begin, after, form = self._find_start(seen, limit)
                if begin < 0:
                    return
                found.append(Opened(form))
                self.form = form
                self._code_from = begin if self._forms[form].at_turn_start else after
            else:
                end = self._forms[self.form].end
                at = -1 if end is None else self._find_tag(end, self._forms[self.form].at_line_start, seen, limit)
                if end is None or at < 0:
                    break
                after = at + len(end)
                self._report(at, found)
                found.append(Closed("".join(self._code), after - seen, self.form))
                self._leave()
            self._tag_from = after
        self._report(max(self._code_from, len(self._window) - self._unfinished(end)), found)

    def _find_start(self, seen: int, limit: int) -> tuple[int, int, int]:
        """Where the start tag that is complete first begins and ends, and its form; -1 where there is none."""
        best = (-1, -1, -1)
        for index, form in enumerate(self._forms):
            if form.at_turn_start and not self._blank:
                continue
            at = self._find_tag(form.start, form.at_line_start, seen, limit)
            if at < 0 or (form.at_turn_start and self._window[:at].strip()):
                continue
            after = at + len(form.start)
            if best[0] < 0 or (after, at) < (best[1], best[0]):
                best = at, after, index
        return best

    def _find_tag(self, tag: str, at_line_start: bool, seen: int, limit: int) -> int:
        at = self._window.find(tag, max(self._tag_from, seen - len(tag) + 1), limit)
        if at_line_start:
            while (at > 0 and self._window[at - 1] != "\n") or (at == 0 and not self._line_start):
                at = self._window.find(tag, at + 1, limit)
        return at

    def _find_stop(self, seen: int) -> tuple[int, str] | None:
        best: tuple[int, str] | None = None
        for stop_string in self.stop_strings:
            at = self._window.find(stop_string, max(0, seen - len(stop_string) + 1))
            if at >= 0 and (best is None or at + len(stop_string) < best[0]):
                best = at + len(stop_string), stop_string
        return best

    def _unfinished(self, tag: str | None) -> int:
        """How many characters at the end of the window may be the beginning of ``tag``."""
        if tag is None:
            return 0
        for length in range(min(len(tag) - 1, len(self._window)), 0, -1):
            if self._window.endswith(tag[:length]):
                return length
        return 0

    def _report_held(self) -> list[Found]:
        if not self._held:
            return []
        held, self._held = self._held, ""
        self._code.append(held)
        return [Code(held)]

    def _report(self, end: int, found: list[Found]) -> None:
        if end > self._code_from:
            delta = self._window[self._code_from : end]
            self._code.append(delta)
            found.append(Code(delta))
            self._code_from = end

    def _leave(self) -> None:
        self.form = None
        self._code = []
        self._held = ""

    def _forget(self) -> None:
        keep_from = len(self._window) - self._keep  # never beyond code that is not reported: it may be the end tag
        if keep_from > 0:
            self._line_start = self._window[keep_from - 1] == "\n"
            self._blank = self._blank and not self._window[:keep_from].strip()
            self._window = self._window[keep_from:]
            self._tag_from = max(0, self._tag_from - keep_from)
            self._code_from = max(0, self._code_from - keep_from)


def block_left_open(forms: Sequence[Markup], text: str) -> tuple[str, int]:
    """The code so far of the block that is open where a prompt's text ends, and its form.

    Raises :class:`~midstream.errors.PromptError` where none is open there.
    """
    places = [(text.rfind(form.start), index) for index, form in enumerate(forms) if not form.at_turn_start]
    at, index = max(places, default=(-1, 0))
    if at < 0:
        raise PromptError("Prompt.open_block: the prompt holds no start tag, so no block is open at its end")
    code = text[at + len(forms[index].start) :]
    scanner = Scanner(forms[index])
    scanner.open("")
    if any(isinstance(item, Closed) for item in scanner.feed(code)):
        raise PromptError("Prompt.open_block: the prompt's last block is closed, so none is open at its end")
    return code, index
