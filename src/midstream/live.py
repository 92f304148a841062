"""One row while it is being generated: what the engine, its session and its batch know it by."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from midstream.delivery import RowIndex
from midstream.deltas import RowWatch
from midstream.engines.base import Handle, sample_seed
from midstream.jobs import Job, Session
from midstream.observing import ObservedRow
from midstream.row import Row
from midstream.tools import RowTools, ToolContext
from midstream.types import CallRecord, ExecutionResult, ForkPoint, WeightChange


@dataclass(slots=True, eq=False)
class LiveRow:
    """A row that the engine has open. It is held while ``execution`` or ``copying`` is under way."""

    job: Job
    index: RowIndex
    row: Row
    handle: Handle
    started: float
    lineage: tuple[ForkPoint, ...] = ()
    weight_changes: tuple[WeightChange, ...] = ()
    watch: RowWatch | None = None
    session: Session | None = None
    tools: RowTools | None = None
    execution: asyncio.Task[Sequence[ExecutionResult]] | None = None
    copying: asyncio.Task[Sequence[Session]] | None = None
    first_token_due: bool = True
    observed: ObservedRow = field(init=False)

    def __post_init__(self) -> None:
        self.observed = observed_row(self.job, self.row.sample, self.lineage)

    @property
    def held(self) -> bool:
        return self.execution is not None or self.copying is not None

    @property
    def deadline(self) -> float | None:
        limit = self.row.limits.time_limit
        return None if limit is None else self.started + limit

    @property
    def tool_context(self) -> ToolContext:
        """What tools are told of the row that calls them."""
        row = self.observed
        return ToolContext(row.prompt_id, row.group, row.sample, row.seed, self.row.prompt.metadata)

    @property
    def session_seed(self) -> int:
        """A copy's session goes on from its ancestor's, so it is built with the ancestor's numbers too."""
        if self.job.session is not None and self.job.session.seed is not None:
            return self.job.session.seed
        return sample_seed(self.row.seed, self.lineage[0].sample if self.lineage else self.row.sample)

    @property
    def history(self) -> Sequence[CallRecord]:
        """The blocks that the row's session must have run: those of a resumed row, or of rows before this one."""
        before = self.job.session.history if self.job.session is not None else ()
        records = [record for record in (*before, *self.row.records) if record.call.kind == "code"]
        return [record for record in records if record.result is not None and not record.call.declined]


def observed_row(job: Job, sample: int, lineage: tuple[ForkPoint, ...] = ()) -> ObservedRow:
    """A row as observers are told of it."""
    prompt = job.prompt
    return ObservedRow(
        prompt_id=prompt.id,
        group=prompt.id if prompt.group is None else prompt.group,
        sample=sample if job.paused is None else job.paused.sample,
        seed=job.seed,
        prompt_tokens=0 if job.paused is not None or lineage else len(job.prompt_ids),
        resumed=job.paused is not None,
        lineage=lineage,
    )
