"""The part of the certificate that needs to know where blocks close: calls, results, lengths and the row's end."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from itertools import groupby, zip_longest

from midstream.markup import Markup, text_of
from midstream.records.entries import BlockEntry, SegmentEntry
from midstream.records.reference import Closing, Reading
from midstream.records.schema import Record
from midstream.records.violations import Violation, starts
from midstream.rendering import render_results
from midstream.types import Call, StopKind, StopReason

_FROM_OUTSIDE = (
    StopKind.TIME_LIMIT,
    StopKind.SANDBOX_FAILURE,
    StopKind.ENGINE_FAILURE,
    StopKind.CANCELLED,
    StopKind.PAUSED,
)
"""Reasons that no id explains."""


class BlockRules:
    """The rules that need to know where blocks close."""

    def __init__(self, record: Record, markup: Markup | None, reading: Reading) -> None:
        self._record = record
        self._markup = markup
        self._limits = record.limits
        self._reading = reading
        self._ending = reading.ending
        self._injected = {at: segment for at, segment in starts(record) if segment.origin == "injected"}
        generated = [at + len(segment.ids) for at, segment in starts(record) if segment.origin == "generated"]
        self._last = max(generated, default=None)  # the count of ids up to and with the last generated one
        self._total = len(record.prompt_ids) + sum(len(segment.ids) for segment in record.segments)
        bounds = [n for n in (record.context_length, record.limits.max_total_tokens) if n is not None]
        self._max_total = min(bounds, default=None)

    def check(self) -> Iterator[Violation]:
        yield from self._check_calls()
        yield from self._check_results()
        yield from self._check_lengths()
        yield from self._check_end()

    # calls

    def _beyond_limit(self, index: int) -> bool:
        return self._limits.max_tool_calls is not None and index >= self._limits.max_tool_calls

    def _to_be_called(self) -> list[Closing]:
        """The closings that must have a call: not one that used up the budget, nor one that ended the row."""
        closings = list(enumerate(self._reading.closings))
        if self._last is not None and self._length_reached(self._last) is not None:
            closings = [(i, closing) for i, closing in closings if closing.position != self._last]
        if self._limits.at_tool_call_limit == "stop":
            closings = [(i, closing) for i, closing in closings if not self._beyond_limit(i)]
        return [closing for _, closing in closings]

    def _check_calls(self) -> Iterator[Violation]:
        for index, (closing, block) in enumerate(zip_longest(self._to_be_called(), self._record.calls)):
            if block is None:
                yield Violation("calls", "a block closes here and has no call", closing.position - 1)
                return
            call = block.call
            at = call.position - 1
            if closing is None:
                yield Violation("calls", f"call {index} has no block that closes in generated text", at)
                return
            if call.position != closing.position:
                yield Violation("calls", f"call {index} stands here, its block closes at id {closing.position - 1}", at)
                return
            if call.index != index:
                yield Violation("calls", f"call {index} says that it is call {call.index}", at)
            if call.code != closing.code:
                yield Violation("calls", f"the code of call {index} is not what stands in its block", at)
            if call.lookahead != closing.lookahead:
                yield Violation(
                    "calls", f"call {index} has lookahead {call.lookahead!r}, not {closing.lookahead!r}", at
                )
            if (call.kind, call.form) != (closing.kind, closing.form):
                said, meant = (f"{one.kind!r} of form {one.form}" for one in (call, closing))
                yield Violation("calls", f"call {index} is recorded as {said}, its block holds {meant}", at)
            if (call.declined != "") != self._beyond_limit(index):
                word = "run beyond" if self._beyond_limit(index) else "declined within"
                yield Violation("calls", f"call {index} was {word} the limit of {self._limits.max_tool_calls}", at)
            if call.declined and block.result is not None and block.result.text != call.declined:
                yield Violation("calls", f"call {index} was declined and shows something else", at)

    # results

    def _check_results(self) -> Iterator[Violation]:
        explained = set()
        groups = [(at, list(group)) for at, group in groupby(self._record.calls, lambda block: block.call.position)]
        for place, (position, group) in enumerate(groups):
            explained.add(position)
            yield from self._check_group(position, group, last=place == len(groups) - 1)
        for position in sorted(self._injected.keys() - explained):
            yield Violation("results", "an injected segment does not stand directly behind a block", position)

    def _check_group(self, position: int, group: list[BlockEntry], *, last: bool) -> Iterator[Violation]:
        """The results of the blocks that one id closed."""
        segment = self._injected.get(position)
        if any(block.result is None for block in group):
            if not last or self._last != position or any(block.result is not None for block in group):
                yield Violation("results", "a block waits for its result and the row went on", position - 1)
            if segment is not None or any(block.injected or block.cut_characters for block in group):
                yield Violation("results", "something is injected for a block that has no result", position)
            return
        if self._markup is None:
            return
        shown = self._shown(group)
        for block in group:
            if block not in shown and (block.injected or block.cut_characters):
                yield Violation(
                    "results", f"call {block.call.index} shows nothing and has something injected", position
                )
        expected = "".join(block.injected for block in shown)
        if segment is None:
            if not expected and self._no_room(position):
                return
            if expected or any(block.injected not in self._renderings(shown, block) for block in shown):
                yield Violation("results", "a block that shows something has no result behind it", position - 1)
            return
        if not _same_text(segment.text, expected):
            yield Violation("results", "the injected text is not that of its blocks' results", position)
        for block in shown:
            if block.injected not in self._renderings(shown, block):
                message = f"what is injected for call {block.call.index} is not its result as the markup renders it"
                yield Violation("results", message, position)
        yield from self._check_budget(position, segment, len(shown))

    def _no_room(self, position: int) -> bool:
        stop = self._record.stop
        return (stop.kind, stop.detail) == (StopKind.LENGTH, "no_room_for_result") and position == self._total

    def _renderings(self, shown: list[BlockEntry], block: BlockEntry) -> list[str]:
        """The texts that may stand for a block, given how many characters of its result are cut."""
        markup, text = self._markup, block.result.text if block.result is not None else ""
        keep = len(text) - block.cut_characters
        if markup is None or block.cut_characters < 0 or not 0 <= keep <= self._limits.max_result_characters:
            return []
        if block.cut_characters == 0:
            bodies = [text]
        else:
            tail = text[len(text) - keep // 2 :] if keep > 1 else ""
            bodies = [f"{text[: keep - keep // 2]}…[{block.cut_characters} characters cut]…{tail}"]
            if keep == 0:
                bodies.append("")  # where there is not even room for the notice
        return [self._rendered(shown, block, body) for body in bodies]

    def _rendered(self, shown: list[BlockEntry], block: BlockEntry, body: str) -> str:
        """What stands for a block of these that are shown together, if ``body`` is shown of its result."""
        if self._markup is None or not all(self._form(one) for one in shown):
            return ""
        calls = [Call(**{name: getattr(one.call, name) for name in one.call.__struct_fields__}) for one in shown]
        bodies = [body if one is block else "" for one in shown]
        return text_of(render_results(self._markup, calls, bodies)[shown.index(block)])

    def _shown(self, group: list[BlockEntry]) -> list[BlockEntry]:
        """Those of the blocks that one id closed for which something is injected, be it an empty result."""
        return [
            block
            for block in group
            if block.result
            and (form := self._form(block)) is not None
            and (block.result.text or form.inject_empty or form.turn is not None)
        ]

    def _form(self, block: BlockEntry) -> Markup | None:
        forms = () if self._markup is None else self._markup.forms
        return forms[block.call.form] if 0 <= block.call.form < len(forms) else None

    def _check_budget(self, position: int, segment: SegmentEntry, results: int) -> Iterator[Violation]:
        count = len(segment.ids)
        if count > self._limits.max_result_tokens * results:
            message = f"{count} ids for {results} results of at most {self._limits.max_result_tokens}"
            yield Violation("budget", message, position)
        reserve = self._limits.reserve_tokens
        if any(n is not None and used > n - reserve for n, used in self._bounds(position + count)):
            yield Violation("budget", f"a result leaves less than the {reserve} ids that are reserved", position)

    # lengths

    def _new_tokens(self, end: int) -> int:
        """How many ids up to ``end`` count towards ``max_new_tokens``."""
        return sum(
            max(0, min(end, at + len(segment.ids)) - at)
            for at, segment in starts(self._record)
            if segment.origin == "generated" or self._limits.count_injected
        )

    def _length_reached(self, end: int) -> StopReason | None:
        if self._limits.max_new_tokens is not None and self._new_tokens(end) >= self._limits.max_new_tokens:
            return StopReason(StopKind.LENGTH, "new_tokens")
        if self._max_total is not None and end >= self._max_total:
            return StopReason(StopKind.LENGTH, "total_tokens")
        return None

    def _check_lengths(self) -> Iterator[Violation]:
        new = self._new_tokens(self._total)
        if self._limits.max_new_tokens is not None and new > self._limits.max_new_tokens:
            yield Violation("limits", f"{new} new ids, {self._limits.max_new_tokens} are allowed")
        if self._max_total is not None and self._total > self._max_total:
            yield Violation("limits", f"{self._total} ids in all, {self._max_total} are allowed")
        if self._max_total is not None and len(self._record.prompt_ids) >= self._max_total:
            yield Violation("limits", f"the prompt has {len(self._record.prompt_ids)} of {self._max_total} ids")

    # the end

    def _check_end(self) -> Iterator[Violation]:
        if self._ending is not None and self._ending[1] != self._last:
            yield Violation("stop", f"the row goes on after its end ({self._ending[0]})", self._ending[1] - 1)
            return
        beyond = [c for i, c in enumerate(self._reading.closings) if self._beyond_limit(i)]
        if self._limits.at_tool_call_limit == "stop" and beyond and beyond[0].position != self._last:
            yield Violation("stop", "the row goes on after its limit of calls", beyond[0].position - 1)
            return
        recorded = StopReason(self._record.stop.kind, self._record.stop.detail)
        at = self._total - 1
        if self._waiting():
            if recorded.kind not in _FROM_OUTSIDE:
                yield Violation("stop", f"a block waits for its result and the row stopped for {recorded}", at)
            return
        if self._record.calls and recorded == StopReason(StopKind.LENGTH, "no_room_for_result"):
            yield from self._check_no_room(at)
            return
        demanded = self._demanded()
        if demanded is not None and recorded != demanded:
            yield Violation("stop", f"the row must have stopped for {demanded}, not for {recorded}", at)
        elif demanded is None and not self._may_stop_for(recorded):
            yield Violation("stop", f"nothing here explains that the row stopped for {recorded}", at)

    def _waiting(self) -> bool:
        return bool(self._record.calls) and self._record.calls[-1].result is None

    def _check_no_room(self, at: int) -> Iterator[Violation]:
        position = self._record.calls[-1].call.position
        group = [block for block in self._record.calls if block.call.position == position]
        if self._markup is None or position != self._total:
            yield Violation("stop", "the row does not end behind a block whose result had no room", at)
            return
        shown = self._shown(group)
        # An id stands for at least one byte, so an empty result takes at most as many ids as it has bytes.
        most = [len(self._rendered([block], block, "").encode()) for block in shown]
        rooms = [n - used for n, used in self._bounds(position) if n is not None]
        no_room = bool(rooms) and min(rooms) - self._limits.reserve_tokens < sum(most)
        if not shown or not (no_room or self._limits.max_result_tokens < max(most)):
            yield Violation("stop", "there was room for a result, at least for an empty one", at)

    def _bounds(self, end: int) -> list[tuple[int | None, int]]:
        """Each bound on the row's length, with what the ids up to ``end`` use of it."""
        new = self._limits.max_new_tokens if self._limits.count_injected else None
        return [(self._max_total, end), (new, self._new_tokens(end))]

    def _demanded(self) -> StopReason | None:
        """Why the row must have stopped where it did, if its ids say so."""
        ending = self._ending[0] if self._ending is not None else None
        if self._last is None:
            return None
        reached = self._length_reached(self._last)
        if reached is not None:
            return ending or reached
        limit = self._limits.max_tool_calls
        beyond = [
            closing
            for index, closing in enumerate(self._reading.closings)
            if closing.position == self._last and self._beyond_limit(index)
        ]
        if beyond and self._limits.at_tool_call_limit == "stop":
            return StopReason(StopKind.TOOL_CALL_LIMIT, str(limit))
        return ending or self._length_reached(self._total)

    def _may_stop_for(self, reason: StopReason) -> bool:
        limits = self._limits
        match reason.kind:
            case StopKind.TIME_LIMIT:
                return limits.time_limit is not None and self._record.duration >= limits.time_limit * (1 - 1e-6)
            case StopKind.LENGTH:
                return reason.detail == "engine"  # a limit of the engine's own, which no record knows
            case StopKind.STOP_ID:  # a stop id of the engine's own
                ids = self._record.segments[-1].ids if self._last == self._total and self._record.segments else []
                return bool(ids) and reason.detail == str(ids[-1])
            case kind:
                return kind in _FROM_OUTSIDE


def _same_text(found: str, wanted: str) -> bool:
    """Whether two texts agree, up to what a tokenizer's normalisation may have done to one of them."""
    if found == wanted:
        return True
    return any(unicodedata.normalize(form, found) == unicodedata.normalize(form, wanted) for form in ("NFC", "NFKC"))
