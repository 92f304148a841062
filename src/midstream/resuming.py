"""A row as it was, from the trajectory that it had when it was paused.

The same ids go through the same states again. This is the other half of :mod:`midstream.row`, and works on
what is inside a row.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from midstream.errors import ProtocolError
from midstream.events import RowState
from midstream.scanning import Closed, Matched
from midstream.types import CallRecord, Limits, StopKind, StopReason, Trajectory

if TYPE_CHECKING:
    from midstream.row import Row


def replay(row: Row, trajectory: Trajectory) -> None:
    """Be where ``trajectory`` left off: the same ids through the same states, limits aside."""
    limits, max_total = row.limits, row._budget.max_total
    # What ended nothing then must end nothing now, though the new limits may differ.
    row.limits = replace(limits, max_new_tokens=None, max_tool_calls=None, stop_ids=(), ignore_eos=True)
    row._budget.max_total = None
    row._scanner.stop_strings = ()
    records = iter(trajectory.calls)
    waiting = any(record.result is None for record in trajectory.calls)
    last_place = trajectory.total_length - 1
    for segment in trajectory.segments:
        if segment.origin == "injected":
            row._append_injected(segment.ids)
            continue
        for token_id, logprob, version in zip(segment.ids, segment.logprobs, segment.weight_versions, strict=True):
            waits_here = waiting and row.length == last_place
            stop = _stop_behind_blocks(row, token_id, limits.stop_strings) if waits_here else None
            row.receive([token_id], [logprob], version)
            if row._state is RowState.EXECUTING:
                _replay_calls(row, [next(records, None) for _ in row._pending], limits, stop)
    if [record.call.position for record in row.records] != [record.call.position for record in trajectory.calls]:
        raise ProtocolError("resume: the trajectory's blocks are not where this markup finds them")
    row._discarded = trajectory.discarded
    row.limits, row._budget.max_total = limits, max_total
    row._scanner.stop_strings = limits.stop_strings
    if row._state is RowState.GENERATING:
        row._stop_for_length()


def _stop_behind_blocks(row: Row, token_id: int, stop_strings: tuple[str, ...]) -> StopReason | None:
    """The stop string behind the blocks that an id, not taken yet, closes: it waits for their results."""
    if row._turns.closes(token_id, row._scanner.form):
        return None
    scanner = row._scanner.copy()
    scanner.stop_strings = stop_strings
    found = scanner.feed(row._decoder.copy().feed(token_id))
    last = found[-1] if found else None
    if isinstance(last, Matched) and any(isinstance(item, Closed) for item in found):
        return StopReason(StopKind.STOP_STRING, last.stop_string)
    return None


def _replay_calls(row: Row, records: list[CallRecord | None], limits: Limits, stop: StopReason | None) -> None:
    """Settle the calls that an id closed: done, or waiting at the trajectory's end with ``stop`` behind them."""
    known = [record for record in records if record is not None]
    done = [record for record in known if record.result is not None]
    beyond = len(known) < len(records)  # where the limit of calls ends the row, those beyond it have no record
    if beyond:
        stop = StopReason(StopKind.TOOL_CALL_LIMIT, str(limits.max_tool_calls))
    if len(done) not in (0, len(known)) or not known or (beyond and (done or limits.at_tool_call_limit == "tell")):
        raise ProtocolError("resume: the trajectory's blocks are not where this markup finds them")
    if done:
        row._records.extend(done)
        row._pending = ()
        row._state = RowState.GENERATING
    else:
        row._pending = tuple(record.call for record in known)
        row._stop_after = stop
