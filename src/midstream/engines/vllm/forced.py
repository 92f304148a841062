"""The way that stays in one request: the logits processor forces the result's ids, one at each decode step.

No code runs inside the processor. While a row's result is not there yet, and the others go on, the processor
forces a stop id; that ends the request, is no part of the row, and the row goes on as a new request. Where the
result is there in time, nothing is computed twice.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from midstream.engines.vllm.facts import Facts
from midstream.engines.vllm.plans import Plan, plans
from midstream.engines.vllm.resubmission import Link, Resubmission
from midstream.engines.vllm.rows import Delta, EngineRow
from midstream.errors import EngineError

_PAUSE = 0.0005
"""Seconds between two looks whether a result is there."""


class Forced(Resubmission):
    """``patience``: seconds for which all rows wait, once, for the result of a row that is newly held."""

    def __init__(self, link: Link, facts: Facts, *, stop_strings: bool, patience: float) -> None:
        super().__init__(link, facts, stop_strings=stop_strings)
        self._patience = patience

    def stop_ids(self, row: EngineRow) -> tuple[int, ...]:
        return row.stop_ids or (self._stop_id(row),)

    def hold(self, row: EngineRow, taken_back: int) -> None:
        if taken_back or row.request is None or row.plan is not None:
            self.drop(row)
            return
        row.plan = Plan(len(row.ids), self._stop_id(row), time.monotonic() + self._patience)
        row.forced = 0
        plans[row.request] = row.plan

    def extend(self, row: EngineRow, ids: Sequence[int]) -> None:
        row.ids.extend(ids)
        if row.plan is not None:
            row.plan.ids = tuple(ids)
            self._settle(row)

    def take(self, row: EngineRow, delta: Delta) -> tuple[Sequence[int], Sequence[float]]:
        plan = row.plan
        if plan is None:
            return super().take(row, delta)
        expected = (plan.stop_id,) if plan.ids is None else plan.ids[row.forced : row.forced + len(delta.ids)]
        if delta.ids != expected:
            raise EngineError(f"vLLM sampled {list(delta.ids)} where {list(expected)} were forced")
        row.forced += len(delta.ids)
        if delta.finish is not None:
            self.gone(row)
        elif plan.ids is None:
            raise EngineError(f"vLLM went on past the stop id {plan.stop_id}")
        else:
            self._settle(row)
        return (), ()

    def gone(self, row: EngineRow) -> None:
        plans.pop(str(row.request), None)
        row.plan = None
        super().gone(row)

    def put_off(self) -> bool:
        now = time.monotonic()
        if any(plan.ids is None and now < plan.until for plan in map(self._plan, self.by_request) if plan):
            time.sleep(_PAUSE)
            return True
        return False

    def _plan(self, request: str) -> Plan | None:
        return self.by_request[request].plan

    def _settle(self, row: EngineRow) -> None:
        """Once all that was planned is forced, the row's ids are sampled again."""
        if row.plan is not None and row.forced == len(row.plan.ids or ()):
            plans.pop(str(row.request), None)
            row.plan = None

    def _stop_id(self, row: EngineRow) -> int:
        """An id that ends the row's requests."""
        return row.stop_ids[0] if row.stop_ids else self.facts.vocabulary_size - 1
