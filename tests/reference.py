"""What a row must be, said again from the rules: slowly, over whole strings, with nothing shared with the row.

Blocks that hold calls are taken apart by the certificate's reader, which shares nothing with the row either.

At every id, the whole stretch of text since the last injection is decoded and searched again from its
beginning. No state is kept but what the rules themselves speak of.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from midstream.markup import Frame, Markup, Slot, Special
from midstream.records.call_reference import calls_of
from midstream.types import Limits
from midstream.vocabulary import Vocabulary


@dataclass(frozen=True)
class Block:
    """A call of a closed block: its code, what its closing id holds behind the tag, and the count of ids up to that
    id, or to the one that ended the turn."""

    code: str
    lookahead: str
    position: int
    declined: bool = False
    kind: str = "code"
    form: int = 0


@dataclass
class Expected:
    """What the rules make of the ids that an engine says."""

    segments: list[tuple[str, list[int]]] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    injected: list[str] = field(default_factory=list)
    stop: tuple[str, str] | None = None
    """Kind and detail; None while the row could go on."""
    taken: int = 0
    """How many of the engine's ids count."""


@dataclass(frozen=True)
class Stretch:
    """Generated ids that are read as one text, and what was so where they begin."""

    ids: tuple[int, ...] = ()
    form: int | None = None
    code: str = ""
    line_start: bool = True
    blank: bool = True


def complete_text(vocabulary: Vocabulary, ids: Sequence[int]) -> str:
    """The characters that ids complete; the beginning of one at the end is not there yet."""
    raw = b"".join(vocabulary.piece(token_id) for token_id in ids)
    return codecs.getincrementaldecoder("utf-8")("replace").decode(raw)


def whole_text(vocabulary: Vocabulary, ids: Sequence[int]) -> str:
    return b"".join(vocabulary.piece(token_id) for token_id in ids).decode(errors="replace")


def positions(text: str, tag: str) -> list[int]:
    return [at for at in range(len(text)) if text.startswith(tag, at)]


@dataclass(frozen=True)
class Tag:
    """A tag that counts: where it begins and ends, and the form that it opens or closes."""

    begin: int
    end: int
    form: int


def counts(form: Markup, tag: str, at: int, text: str, stretch: Stretch) -> bool:
    if form.at_turn_start and tag == form.start:
        return stretch.blank and text[:at].strip() == ""
    line_start = text[at - 1] == "\n" if at > 0 else stretch.line_start
    return line_start or not form.at_line_start


def tags(markup: Markup, text: str, stretch: Stretch) -> list[Tag]:
    """Each tag that counts, in order: in turn the next start tag of any form and the next end tag of that form."""
    found: list[Tag] = []
    opened, behind = stretch.form, 0
    while True:
        looked_for = {index: form.start for index, form in enumerate(markup.forms)}
        if opened is not None:
            end = markup.forms[opened].end
            looked_for = {} if end is None else {opened: end}
        here = [
            (at + len(tag), at, index)
            for index, tag in looked_for.items()
            for at in positions(text, tag)
            if at >= behind and counts(markup.forms[index], tag, at, text, stretch)
        ]
        if not here:
            return found
        behind, begin, form = min(here)
        found.append(Tag(begin, behind, form))
        opened = form if opened is None else None


def codes(markup: Markup, text: str, stretch: Stretch) -> tuple[list[tuple[int, str, int]], str, int | None]:
    """Each closed block's form and code, with the end of its end tag; then the open block's code and form."""
    closed = []
    opened, code, behind = stretch.form, stretch.code, 0
    for tag in tags(markup, text, stretch):
        if opened is not None:
            closed.append((opened, code + text[behind : tag.begin], tag.end))
            opened = None
        else:
            opened = tag.form
        code = ""
        behind = tag.begin if opened is not None and markup.forms[opened].at_turn_start else tag.end
    return closed, code + text[behind:] if opened is not None else "", opened


def rendered(markup: Markup, block: Block, index: int, text: str) -> list[str | Special]:
    form = markup.forms[block.form]
    inline = form.inline is not None and "\n" not in block.code + text
    frame: Frame = form.inline if inline and form.inline is not None else form.block
    payload = text if form.payload == "text" else json.dumps(text)
    parts: list[str | Special] = []
    for part in [*frame.before, payload, *frame.after]:
        if isinstance(part, Slot):
            part = name_and_id(block, index)[part.holds]
            part = part if form.payload == "text" else json.dumps(part)
        parts.append(part)
    return parts


def name_and_id(block: Block, index: int) -> dict[str, str]:
    """Those in a call as these tests write calls: ``"name": "…"``, or before the arguments or ``.call``."""
    name = block.code.partition('"name": "')[2].partition('"')[0]
    head, _, arguments = block.code.partition("[ARGS]")
    if block.kind == "builtin":
        name = head.partition(".call")[0].strip()
    own = ""
    if block.kind == "named" and head.strip() and is_object(arguments):
        name, _, own = head.partition("[CALL_ID]")
    return {"name": name.strip(), "id": own.strip() or f"call{index:05d}"}


def is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def without_lookahead(parts: list[str | Special], lookahead: str) -> list[str | Special]:
    front = ""
    for count, part in enumerate(parts):
        if isinstance(part, Special):
            break
        front += part
        rest = parts[count + 1 :]
        if front.startswith(lookahead):
            return [front[len(lookahead) :], *rest]
    return parts


def encoded(vocabulary: Vocabulary, parts: Sequence[str | Special]) -> list[int]:
    ids: list[int] = []
    text = ""
    for part in [*parts, None]:
        if isinstance(part, Special) and not part.required and not vocabulary.has_added(part.text):
            part = part.text
        if isinstance(part, str):
            text += part
            continue
        ids += vocabulary.encode_text(text) if text else []
        text = ""
        if part is not None:
            ids.append(vocabulary.added_id(part.text))
    return ids


def text_of(parts: Sequence[str | Special]) -> str:
    return "".join(part if isinstance(part, str) else part.text for part in parts)


class ManyResultsTooLong(Exception):
    """Several results of one id do not fit as they are."""


def cut(text: str, keep: int) -> str:
    """``text`` with no more than ``keep`` of its characters, half of them at each end."""
    if keep >= len(text):
        return text
    tail = text[len(text) - keep // 2 :] if keep > 1 else ""
    return f"{text[: keep - keep // 2]}…[{len(text) - keep} characters cut]…{tail}"


class Reference:
    """Reads what an engine says, id by id. Raises :class:`ManyResultsTooLong` where the rules do not say how."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        markup: Markup,
        limits: Limits,
        prompt_length: int,
        show: Callable[[str], str],
        *,
        context: int | None = None,
    ) -> None:
        self.vocabulary = vocabulary
        self.markup = markup
        self.limits = limits
        self.prompt_length = prompt_length
        self.show = show
        self.context = context
        self.closing = {
            (vocabulary.added_id(text), index)
            for index, form in enumerate(markup.forms)
            for text in form.closing_tokens
        }
        self.waiting: list[tuple[int, str, str]] = []
        self.turn_ended = False
        self.stretch = Stretch()
        self.expected = Expected()

    def read(self, said: Sequence[int]) -> Expected:
        for token_id in said:
            self.generate(token_id)
            if self.expected.stop is not None:
                break
        return self.expected

    # --- counting

    def count(self, origin: str) -> int:
        return sum(len(ids) for kind, ids in self.expected.segments if kind == origin)

    def left(self) -> list[tuple[int, str]]:
        """How many ids more each limit allows."""
        generated, injected = self.count("generated"), self.count("injected")
        bounds = []
        if self.limits.max_new_tokens is not None:
            counted = generated + (injected if self.limits.count_injected else 0)
            bounds.append((self.limits.max_new_tokens - counted, "new_tokens"))
        totals = [n for n in (self.limits.max_total_tokens, self.context) if n is not None]
        if totals:
            bounds.append((min(totals) - self.prompt_length - generated - injected, "total_tokens"))
        return bounds

    def length_stop(self) -> tuple[str, str] | None:
        return next((("length", name) for left, name in self.left() if left <= 0), None)

    # --- one id

    def generate(self, token_id: int) -> None:
        if not self.expected.segments or self.expected.segments[-1][0] == "injected":
            self.expected.segments.append(("generated", []))
        self.expected.segments[-1][1].append(token_id)
        self.expected.taken += 1
        position = self.prompt_length + self.count("generated") + self.count("injected")
        before = complete_text(self.vocabulary, self.stretch.ids)
        _, open_code, opened = codes(self.markup, before, self.stretch)
        closed: list[Block] = []
        stop: tuple[str, str] | None = None
        closes = {index for closing_id, index in self.closing if closing_id == token_id}
        ends_turn = any(self.markup.forms[index].turn for index in closes)
        self.turn_ended = False
        if opened in closes or (ends_turn and self.waiting):
            if opened in closes and opened is not None:
                closed = self.asked(opened, open_code, "", position)
            if ends_turn:
                closed += [Block(code, "", position, False, kind, form) for form, kind, code in self.waiting]
                self.turn_ended, self.waiting = bool(self.waiting), []
            self.stretch = Stretch(line_start=False, blank=False)
            if not closed:
                stop = self.stop_at(token_id)
        elif self.stop_at(token_id) is not None:
            stop = self.stop_at(token_id)
        elif token_id in self.vocabulary.eos_ids:
            self.stretch = Stretch(form=opened, code=open_code, line_start=False, blank=False)
        else:
            self.stretch = replace(self.stretch, ids=(*self.stretch.ids, token_id))
            closed, stop = self.completed(len(before), position)
        if self.length_stop() is not None:
            closed = []
            stop = stop or self.length_stop()
        if closed:
            self.run(closed, stop)
        elif stop is not None:
            self.expected.stop = stop

    def stop_at(self, token_id: int) -> tuple[str, str] | None:
        if token_id in self.vocabulary.eos_ids:
            return None if self.limits.ignore_eos else ("end_of_sequence", str(token_id))
        return ("stop_id", str(token_id)) if token_id in self.limits.stop_ids else None

    def asked(self, form: int, code: str, lookahead: str, position: int) -> list[Block]:
        """The calls of a closed block, but for those that wait for the end of their turn."""
        calls = calls_of(self.markup.forms[form].holds, code)
        if self.markup.forms[form].turn is not None:
            self.waiting += [(form, kind, call) for kind, call in calls]
            return []
        return [Block(call, lookahead, position, False, kind, form) for kind, call in calls]

    def completed(self, seen: int, position: int) -> tuple[list[Block], tuple[str, str] | None]:
        """The calls and the stop string that the last id of the stretch completes."""
        text = complete_text(self.vocabulary, self.stretch.ids)
        ends = [
            (at + len(stop_string), order)
            for order, stop_string in enumerate(self.limits.stop_strings)
            for at in positions(text, stop_string)
            if at + len(stop_string) > seen
        ]
        end, order = min(ends, default=(len(text), -1))
        closed, _, _ = codes(self.markup, text, self.stretch)
        blocks = []
        for form, code, behind in closed:
            if seen < behind <= end:
                blocks += self.asked(form, code, text[behind:], position)
        return blocks, ("stop_string", self.limits.stop_strings[order]) if ends else None

    # --- results

    def run(self, closed: list[Block], stop: tuple[str, str] | None) -> None:
        limit = self.limits.max_tool_calls
        blocks = []
        for block in closed:
            beyond = limit is not None and len(self.expected.blocks) + len(blocks) >= limit
            if beyond and self.limits.at_tool_call_limit == "stop":
                stop = ("tool_call_limit", str(limit))
                break
            blocks.append(replace(block, declined=beyond))
        self.expected.blocks += blocks
        texts = [
            f"Not run: the limit of {limit} calls is reached." if block.declined else self.show(block.code)
            for block in blocks
        ]
        first = len(self.expected.blocks) - len(blocks)
        forms = self.markup.forms
        shown = [
            (block, text, index)
            for index, (block, text) in enumerate(zip(blocks, texts, strict=True), start=first)
            if text or forms[block.form].inject_empty or forms[block.form].turn is not None
        ]
        if shown and not self.inject_what_fits(shown):
            stop = ("length", "no_room_for_result")
        self.expected.stop = stop or self.length_stop()

    def inject_what_fits(self, shown: list[tuple[Block, str, int]]) -> bool:
        if self.inject(shown):
            return True
        if len(shown) > 1:
            raise ManyResultsTooLong
        ((block, text, index),) = shown
        longest_first = [cut(text, keep) for keep in range(len(text) - 1, -1, -1)]
        return any(self.inject([(block, shorter, index)]) for shorter in [*longest_first, ""])

    def results(self, shown: list[tuple[Block, str, int]]) -> list[list[str | Special]]:
        results = [rendered(self.markup, block, index, text) for block, text, index in shown]
        turn = self.markup.forms[shown[0][0].form].turn
        if turn is not None:
            results[0] = [*turn.before, *results[0]]
            results[-1] = [*results[-1], *turn.after]
        results[0] = without_lookahead(results[0], shown[0][0].lookahead)
        return results

    def inject(self, shown: list[tuple[Block, str, int]]) -> bool:
        results = self.results(shown)
        ids = encoded(self.vocabulary, [part for parts in results for part in parts])
        room = min((left for left, name in self.left() if self.bounds_results(name)), default=None)
        if room is not None and len(ids) > room - self.limits.reserve_tokens:
            return False
        for place, (block, text, index) in enumerate(shown):
            alone = block if place == 0 else replace(block, lookahead="")
            if len(encoded(self.vocabulary, self.results([(alone, text, index)])[0])) > self.limits.max_result_tokens:
                return False
        if ids:
            text = complete_text(self.vocabulary, self.stretch.ids)
            _, open_code, opened = codes(self.markup, text, self.stretch)
            self.expected.segments.append(("injected", ids))
            line_start = whole_text(self.vocabulary, ids).endswith("\n")
            self.stretch = Stretch(form=opened, code=open_code, line_start=line_start, blank=self.turn_ended)
        self.expected.injected.append("".join(text_of(parts) for parts in results))
        return True

    def bounds_results(self, name: str) -> bool:
        return name == "total_tokens" or self.limits.count_injected
