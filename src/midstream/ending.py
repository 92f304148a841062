"""What becomes of a row that is over: what it held is given back, and its trajectory delivered."""

from __future__ import annotations

import logging
import time
from collections.abc import MutableMapping
from dataclasses import replace

from midstream.control import Control
from midstream.delivery import Delivery, RowIndex
from midstream.deltas import RowWatch
from midstream.engines.base import Engine, Handle
from midstream.jobs import FAILURES, Job, Settings, row_of, watch_of
from midstream.leases import SessionLeases
from midstream.live import LiveRow, observed_row
from midstream.observing import ObservedRow
from midstream.row import Row
from midstream.types import StopKind, StopReason, Trajectory

logger = logging.getLogger(__name__)


class Ends:
    """Takes rows out of ``rows``, those that the drive has open, and ends rows that never were. Called between two
    steps of the engine."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        control: Control,
        leases: SessionLeases,
        delivery: Delivery,
        rows: MutableMapping[Handle, LiveRow],
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._control = control
        self._leases = leases
        self._delivery = delivery
        self._rows = rows
        self._sound = 0  # rows that stopped by themselves

    def retire(self, live: LiveRow, reason: StopReason | None) -> None:
        """The row is over, for ``reason`` unless it has stopped by itself."""
        if reason is not None:
            live.row.stop(reason)
        trajectory = self._finished(live.job, live.row, time.monotonic() - live.started, live)
        # A session whose block is cut short is none that the row could go on with.
        keeper = live.job.session or (trajectory if trajectory.stop.resumable else None)
        if keeper is not None and live.session is not None and not live.held:
            self._leases.hold(keeper, live.session)
            live.session = None
        self.release(live)
        self._deliver(live.job, live.index, trajectory, live.observed, live.watch)

    def release(self, live: LiveRow) -> None:
        """Give back what the row holds; nothing is delivered."""
        self._rows.pop(live.handle, None)
        for task in (live.execution, live.copying):
            if task is not None:
                task.cancel()
        if live.session is not None:
            live.session.close()
        if live.tools is not None:
            live.tools.close()
        try:
            self._engine.close(live.handle)
        except Exception:
            logger.exception("the engine could not close a row", extra=live.observed.log_fields)

    def deliver_unopened(self, job: Job, sample: int, row: Row) -> None:
        """A row that the engine never had has stopped."""
        trajectory, watch = self._finished(job, row, job.spent), watch_of(job, row, self._engine)
        self._deliver(job, (job.index, sample), trajectory, observed_row(job, sample), watch)

    def stop_unopened(self, job: Job, first: int, reason: StopReason) -> None:
        """The job's samples from number ``first`` on are not to be opened any more."""
        for sample in range(first, job.n):
            row = row_of(job, sample, self._settings, self._engine)
            row.stop(reason)
            self.deliver_unopened(job, sample, row)

    def _finished(self, job: Job, row: Row, duration: float, live: LiveRow | None = None) -> Trajectory:
        fit = self._engine.capabilities.logprobs is not None and self._engine.capabilities.exact_ids
        if job.paused is not None:
            fit = fit and job.paused.fit_for_training
        known = job.paused if live is None else live
        lineage, changes = (known.lineage, known.weight_changes) if known is not None else ((), ())
        return replace(row.trajectory, duration=duration, fit_for_training=fit, lineage=lineage, weight_changes=changes)

    def _deliver(
        self, job: Job, index: RowIndex, trajectory: Trajectory, observed: ObservedRow, watch: RowWatch | None
    ) -> None:
        if job.session is not None:
            job.session.release(trajectory.calls)
        if trajectory.stop.kind not in (StopKind.PAUSED, StopKind.CANCELLED, *FAILURES):
            self._sound += 1
            if self._sound == self._settings.min_finished:
                self._control.end(StopKind.PAUSED)
        self._delivery.take(index, trajectory, observed, watch)
