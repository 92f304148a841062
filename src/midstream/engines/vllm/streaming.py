"""The way that keeps a row's keys and values in vLLM while its code runs: one session for the whole row.

A turn of a session ends at a stop id. Which ids those are is decided here: the row's own, and every id that
could complete its end tag. Where such an id closed no block, the session just goes on. vLLM never computes
the last id of a turn, and drops it when the next input comes; so each input begins with that id.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from midstream.engines.vllm.facts import Facts
from midstream.engines.vllm.looped import LoopLink
from midstream.engines.vllm.resubmission import Resubmission
from midstream.engines.vllm.rows import Delta, EngineRow, sampling_params, token_input
from midstream.vocabulary import Vocabulary


class Streaming(Resubmission):
    """Where a session cannot go on from a row as it is (ids were taken back), another takes its place."""

    def __init__(self, link: LoopLink, facts: Facts, vocabulary: Vocabulary) -> None:
        super().__init__(link, facts, stop_strings=False)
        self._sessions = link
        self._vocabulary = vocabulary
        self._completing: dict[str, frozenset[int]] = {}

    def go_on(self, row: EngineRow) -> None:
        if row.request is None:
            self.begin(row)
        elif row.turn_over:
            self._sessions.feed(row.request, token_input(row.ids[row.known :], row.salt), self._params(row))
            row.turn_over = False

    def expects(self, row: EngineRow) -> bool:
        return row.request is not None and not row.turn_over

    def take(self, row: EngineRow, delta: Delta) -> tuple[Sequence[int], Sequence[float]]:
        row.ids.extend(delta.ids)
        if delta.finish == "stop":
            row.turn_over = True
            row.known = len(row.ids) - 1
        elif delta.finish is not None:
            self.drop(row)
        return delta.ids, delta.logprobs

    def hold(self, row: EngineRow, taken_back: int) -> None:
        if taken_back or not row.turn_over:
            self.drop(row)

    def rest(self, rows: Iterable[EngineRow]) -> None:
        super().rest(row for row in rows if self.expects(row))

    def submit(self, row: EngineRow) -> None:
        self._sessions.open_session(str(row.request), token_input(row.ids, row.salt), self._params(row))

    def _params(self, row: EngineRow) -> object:
        stop_ids = frozenset(row.stop_ids).union(*map(self._ids_completing, row.stop_strings))
        return sampling_params(row, keyed=self.facts.has_processor, stop_ids=tuple(sorted(stop_ids)), stop_strings=())

    def _ids_completing(self, text: str) -> frozenset[int]:
        """The ids with which ``text`` may become complete: they hold it, or begin with an end of it."""
        known = self._completing.get(text)
        if known is None:
            whole = text.encode()
            ids = range(min(self._vocabulary.size, self.facts.vocabulary_size))
            known = frozenset(i for i in ids if _may_complete(whole, self._vocabulary.piece(i)))
            self._completing[text] = known
        return known


def _may_complete(whole: bytes, piece: bytes) -> bool:
    if whole[-1] not in piece:
        return False
    return whole in piece or any(whole.endswith(piece[:size]) for size in range(1, min(len(piece), len(whole)) + 1))
