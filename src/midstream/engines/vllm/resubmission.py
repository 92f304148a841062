"""The way that works everywhere: each time a row goes on, a new request with all of its ids.

The prefix cache spares computing the ids again, save those of the last, unfinished block. A row that waits
for its code has no request, so its place in vLLM's batch is free.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import count
from typing import Any, Protocol
from uuid import uuid4

from midstream.engines.vllm.facts import Facts
from midstream.engines.vllm.rows import Delta, EngineRow, TokenInput, sampling_params, token_input


class Link(Protocol):
    """Where requests go and deltas come from. ``abort`` may take effect a little later."""

    @property
    def unfinished(self) -> int: ...
    def submit(self, request: str, prompt: TokenInput, params: Any) -> None: ...
    def poll(self) -> list[Delta]: ...
    def abort(self, request: str) -> None: ...
    def reset_cache(self) -> None: ...
    def shutdown(self) -> None: ...


class Resubmission:
    """What becomes of a row's request when the row goes on, is held, or is over.

    ``stop_strings``: vLLM is told of the row's stop strings too and ends requests there. What counts is
    decided by the row from the ids in either case.
    """

    def __init__(self, link: Link, facts: Facts, *, stop_strings: bool) -> None:
        self.link = link
        self.facts = facts
        self.by_request: dict[str, EngineRow] = {}
        self._stop_strings = stop_strings
        self._prefix = f"midstream-{uuid4().hex[:12]}"
        self._numbers = count()

    def go_on(self, row: EngineRow) -> None:
        """Have vLLM sample for a running row, if it does not already."""
        if row.request is None:
            self.begin(row)

    def expects(self, row: EngineRow) -> bool:
        """Whether something will come for the row."""
        return row.request is not None

    def take(self, row: EngineRow, delta: Delta) -> tuple[Sequence[int], Sequence[float]]:
        """The ids of a delta that are the row's next ones, and their logprobs."""
        row.ids.extend(delta.ids)
        if delta.finish is not None:
            self.gone(row)
        return delta.ids, delta.logprobs

    def hold(self, row: EngineRow, taken_back: int) -> None:
        """The row is held, after that many of its ids were taken back."""
        del taken_back
        self.drop(row)

    def extend(self, row: EngineRow, ids: Sequence[int]) -> None:
        """A held row has got ``ids`` and runs again."""
        row.ids.extend(ids)

    def drop(self, row: EngineRow) -> None:
        """Nothing is to sample for the row any more."""
        if row.request is not None:
            request = row.request
            self.gone(row)
            self.link.abort(request)

    def rest(self, rows: Iterable[EngineRow]) -> None:
        """Nothing is to be sampled for any row until it goes on again."""
        for row in rows:
            self.drop(row)

    def put_off(self) -> bool:
        """Whether the next step should wait a little for a result."""
        return False

    def begin(self, row: EngineRow) -> None:
        row.request = f"{self._prefix}-{next(self._numbers)}"
        try:
            self.submit(row)
        except BaseException:
            row.request = None
            raise
        self.by_request[row.request] = row

    def submit(self, row: EngineRow) -> None:
        """Send the row's request to vLLM."""
        params = sampling_params(
            row,
            keyed=self.facts.has_processor,
            stop_ids=self.stop_ids(row),
            stop_strings=row.stop_strings if self._stop_strings else (),
        )
        self.link.submit(str(row.request), token_input(row.ids, row.salt), params)

    def stop_ids(self, row: EngineRow) -> tuple[int, ...]:
        """The ids at which the row's requests end."""
        return row.stop_ids

    def gone(self, row: EngineRow) -> None:
        """The row's request is over, for vLLM or for us."""
        self.by_request.pop(str(row.request), None)
        row.request = None
        row.turn_over = False
