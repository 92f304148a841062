"""Drives rows over an engine while their code runs elsewhere.

One coroutine holds everything together: it asks the engine for a step (in a thread of its own), hands each
row its ids, starts the code of blocks that closed, and puts results back as they come. A row that waits for
its code is held, and the others go on decoding.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar

from midstream.control import Control, RowName
from midstream.delivery import Delivery, RowIndex
from midstream.ending import Ends
from midstream.engines.base import Engine, Handle, Update
from midstream.errors import EngineError, SandboxError
from midstream.executing import run_calls
from midstream.forking import Forks
from midstream.jobs import Job, Settings, request_of, row_of, watch_of
from midstream.leases import SessionLeases
from midstream.live import LiveRow, observed_row
from midstream.observing import FirstToken, ResultsInjected, RowsQueued, Stepped
from midstream.row import Inject, RowState, Stopped
from midstream.submitting import Inbox
from midstream.types import Call, ExecutionResult, StopKind, StopReason, Trajectory, WeightChange

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

LINGER = 0.05
"""Seconds that an engine which works in rounds waits for code that is running, before its next round."""


class Drive:
    """One batch over one engine. ``run`` gives each trajectory with its index, as it finishes.

    ``inbox``: where more jobs come from, until there are neither jobs nor rows.
    """

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        control: Control,
        leases: SessionLeases,
        jobs: Sequence[Job],
        inbox: Inbox | None = None,
    ) -> None:
        self.engine = engine
        self.settings = settings
        self.control = control
        self.leases = leases
        self.jobs = jobs
        self.inbox = inbox
        self._observers = settings.observers
        self.delivery = Delivery(settings)
        self._waiting: deque[tuple[Job, int]] = deque()  # with the sample to open next
        self._live: dict[Handle, LiveRow] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._executed: deque[LiveRow] = deque()
        self._ends = Ends(engine, settings, control, leases, self.delivery, self._live)
        self._forks = Forks(engine, settings, control, jobs, self._live, self._start, self._tell)
        self._unwanted: list[RowName] = []
        self._awake = asyncio.Event()

    def check(self) -> None:
        """Raise what a job's row would raise on being made, before any of them starts."""
        for job in self.jobs:
            row_of(job, job.first, self.settings, self.engine)

    async def run(self) -> AsyncGenerator[tuple[RowIndex, Trajectory], None]:
        loop = asyncio.get_running_loop()

        def wake() -> None:
            loop.call_soon_threadsafe(self._awake.set)

        self.control.attach(wake)
        if self.inbox is not None:
            self.inbox.changed = self.control.look
        self._take_jobs(self.jobs)
        deadline = self.settings.deadline
        timer = None if deadline is None else loop.call_later(deadline, self.control.end, StopKind.PAUSED)
        producer = asyncio.create_task(self._produce())
        try:
            async with aclosing(self.delivery.items()) as items:
                async for item in items:
                    yield item
            await producer
        finally:
            self.control.detach()  # first: where the event loop itself is ending, what follows may be cut short
            if timer is not None:
                timer.cancel()
            producer.cancel()
            await asyncio.gather(producer, return_exceptions=True)

    async def _produce(self) -> None:
        with ThreadPoolExecutor(1, thread_name_prefix="midstream-engine") as engine_thread:
            try:
                await self._loop(engine_thread)
                self.control.sampled_all()
                await self.delivery.all_rewarded()
            finally:
                await self._abandon()
                self.delivery.end()

    async def _loop(self, engine_thread: ThreadPoolExecutor) -> None:
        while True:
            self._awake.clear()
            await self._rest_if_asked()
            self._take_inbox()
            if self.control.ending is not None:
                self._end_all(self.control.ending)
                return
            self._open_waiting()
            self._cancel_rows()
            self._take_executed()
            self._enforce_time_limits()
            self._forks.settle(self._waiting)
            running = sum(1 for live in self._live.values() if not live.held)
            if not running:
                if self._live:
                    await self._wait(self._until_deadline())
                elif not self._waiting and (self.inbox is None or self.inbox.close_if_empty()):
                    return
                continue
            if self.engine.capabilities.rounds and running < len(self._live) and await self._linger():
                continue
            began = time.monotonic()
            updates = await self._step(engine_thread)
            seconds = time.monotonic() - began
            tokens = sum([self._take_update(update) for update in updates])
            self._observers(Stepped(seconds, running, tokens))

    # --- beginnings

    def _take_jobs(self, jobs: Sequence[Job]) -> None:
        self._waiting.extend((job, job.first) for job in jobs)
        if jobs:
            self._observers(RowsQueued(sum(job.rows for job in jobs)))

    def _take_inbox(self) -> None:
        """Jobs that have come meanwhile, and rows that are not wanted any more."""
        if self.inbox is None:
            return
        jobs, left = self.inbox.take()
        self._take_jobs(jobs)
        if left:
            reason = StopReason(StopKind.CANCELLED)
            for live in [live for live in self._live.values() if live.job.index in left]:
                self._ends.retire(live, reason)
            for job, first in [item for item in self._waiting if item[0].index in left]:
                self._waiting.remove((job, first))
                self._ends.stop_unopened(job, first, reason)

    def _open_waiting(self) -> None:
        most = self.settings.max_open_rows
        while self._waiting and (most is None or len(self._live) < most):
            job, first = self._waiting.popleft()
            count = job.n - first if most is None else min(job.n - first, most - len(self._live))
            if first + count < job.n:
                self._waiting.appendleft((job, first + count))
            self._open(job, range(first, first + count))

    def _open(self, job: Job, samples: range) -> None:
        rows = {(job.index, sample): row_of(job, sample, self.settings, self.engine) for sample in samples}
        first = rows[job.index, samples[0]]
        if first.state is RowState.STOPPED:  # a resumed row that is at its limits already
            self._ends.deliver_unopened(job, 0, first)
            return
        request = request_of(job, first, self.settings, self.engine)
        try:
            handles = self.engine.open(request, len(rows))
            if len(handles) != len(rows):
                raise EngineError(f"open: {len(handles)} handles came back for {len(rows)} rows")
        except Exception as error:
            logger.exception("the engine could not open prompt %r", job.prompt.id, extra={"prompt_id": job.prompt.id})
            for (_, sample), row in rows.items():
                row.stop(_failure_of_engine(error))
                self._ends.deliver_unopened(job, sample, row)
            return
        for (index, row), handle in zip(rows.items(), handles, strict=True):
            live = LiveRow(job, index, row, handle, time.monotonic() - job.spent)
            live.watch = watch_of(job, row, self.engine)
            if job.session is not None:
                live.session = self.leases.take(job.session)
            if job.paused is not None:
                live.lineage = live.observed.lineage = job.paused.lineage
                live.weight_changes = job.paused.weight_changes
                if live.weight_changes and live.weight_changes[-1].cache_kept:  # what was kept is gone
                    live.weight_changes += (WeightChange(row.length, self.engine.weight_version, cache_kept=False),)
                live.session = live.session or self.leases.take(job.paused)
                live.first_token_due = not row.pending
            self._live[handle] = live
            self._observers.move(live.observed, "decoding")
            if row.pending and self._tell(live, partial(self.engine.rollback, handle, 0)):
                self._execute(live, row.pending)

    # --- ids

    async def _step(self, engine_thread: ThreadPoolExecutor) -> list[Update]:
        """One step of the engine. Where it fails, its open rows stop here."""
        loop = asyncio.get_running_loop()
        # The step's thread has what the caller keeps in context variables.
        work = loop.run_in_executor(engine_thread, contextvars.copy_context().run, _guarded_step, self.engine)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            # An engine is driven from one thread at a time: no row may be closed while it samples.
            while not work.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([work])
            raise
        except Exception as error:
            logger.exception("the engine failed in a step; its open rows stop here")
            for live in list(self._live.values()):
                self._ends.retire(live, _failure_of_engine(error))
            return []

    def _take_update(self, update: Update) -> int:
        """Hand a row its ids. How many of them count."""
        live = self._live.get(update.handle)
        if live is None:
            return 0
        row = live.row
        try:
            if any(token_id < 0 for token_id in update.ids):
                raise EngineError(f"the engine returned ids {list(update.ids)}; ids are not negative")
            received = row.receive(update.ids, update.logprobs, update.weight_version)
        except Exception as error:
            logger.exception("row %s: the engine broke its contract", row.prompt.id, extra=live.observed.log_fields)
            self._ends.retire(live, _failure_of_engine(error))
            return 0
        if live.first_token_due and received.accepted:
            live.first_token_due = False
            self._observers(FirstToken(live.observed, time.monotonic() - live.started - live.job.spent))
        self._act_on(live, update, len(update.ids) - received.accepted)
        if live.watch is not None and row.state is not RowState.STOPPED:
            live.watch.look()
        return received.accepted

    def _act_on(self, live: LiveRow, update: Update, beyond: int) -> None:
        """What becomes of a row behind new ids. ``beyond``: how many of the update's do not count."""
        row = live.row
        if row.state is RowState.STOPPED:
            self._ends.retire(live, None)
        elif update.error is not None:
            self._ends.retire(live, StopReason(StopKind.ENGINE_FAILURE, update.error))
        elif row.state is RowState.EXECUTING:
            # What else the engine says of the row's end stands behind ids that do not count.
            if self._tell(live, partial(self.engine.rollback, live.handle, beyond)):
                self._execute(live, row.pending)
        elif update.exhausted:
            self._ends.retire(live, StopReason(StopKind.LENGTH, "engine"))
        elif update.finished:
            self._ends.retire(live, StopReason(StopKind.STOP_ID, str(row.ids[-1])))

    def _tell(self, live: LiveRow, told: Callable[[], object]) -> bool:
        """Tell the engine something of one row. Where it fails at that, the row stops."""
        try:
            told()
        except Exception as error:
            logger.exception("row %s: the engine failed", live.row.prompt.id, extra=live.observed.log_fields)
            self._ends.retire(live, _failure_of_engine(error))
            return False
        return True

    # --- code

    def _execute(self, live: LiveRow, calls: Sequence[Call]) -> None:
        def ended(task: asyncio.Task[Sequence[ExecutionResult]]) -> None:
            if not task.cancelled():
                task.exception()  # a row that has stopped meanwhile never asks for it
            self._executed.append(live)

        self._observers.move(live.observed, "executing")
        live.execution = self._start(run_calls(live, calls, self.settings))
        live.execution.add_done_callback(ended)

    def _start(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """Work beside the steps. The loop looks again when it is done."""

        def ended(task: asyncio.Task[_T]) -> None:
            self._tasks.discard(task)
            self._awake.set()

        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(ended)
        return task

    def _take_executed(self) -> None:
        while self._executed:
            live = self._executed.popleft()
            if self._live.get(live.handle) is live:
                self._take_results(live)

    def _take_results(self, live: LiveRow) -> None:
        task, live.execution = live.execution, None
        try:
            if task is None or task.cancelled():
                raise SandboxError("running the code was cancelled")
            outcome = live.row.inject(*task.result())
        except Exception as error:
            # Whatever it was, the row ends where it is valid, and the others go on.
            if self.control.ending is StopKind.CANCELLED:  # the tools may be gone before it is: no fault of theirs
                self._ends.retire(live, StopReason(StopKind.CANCELLED))
                return
            fields = live.observed.log_fields
            logger.warning("row %s: its code could not be run", live.row.prompt.id, exc_info=error, extra=fields)
            self._ends.retire(live, StopReason(StopKind.SANDBOX_FAILURE, f"{type(error).__name__}: {error}"))
            return
        if isinstance(outcome, Stopped):
            self._ends.retire(live, None)
            return
        ids, media = (outcome.ids, outcome.media) if isinstance(outcome, Inject) else ((), ())
        self._observers(ResultsInjected(live.observed, len(ids)))
        if live.watch is not None:
            live.watch.look()
        if not self.engine.capabilities.media:
            media = ()  # the record has them all the same
        if self._tell(live, partial(self.engine.extend, live.handle, ids, media)):
            self._observers.move(live.observed, "decoding")

    # --- waiting

    async def _rest_if_asked(self) -> None:
        if not self.control.rest_requested:
            return
        rested_from = time.monotonic()
        self.engine.pause()
        while self.control.rest():
            await self._awake.wait()
            self._awake.clear()
        self.engine.resume()
        for version, cache_kept in self.control.take_weight_changes():
            for live in self._live.values():
                live.weight_changes += (WeightChange(live.row.length, version, cache_kept),)
        for live in self._live.values():  # time limits do not run while nothing may be sampled
            live.started += time.monotonic() - rested_from

    async def _linger(self) -> bool:
        """Wait a little for code that is about to be done. True where something else must come before a round."""
        until = time.monotonic() + LINGER
        while any(live.held for live in self._live.values()):
            if self.control.ending is not None or self.control.rest_requested:
                return True
            left = until - time.monotonic()
            if left <= 0:
                return False
            await self._wait(left)
            self._awake.clear()
            self._take_executed()
        return not self._live

    async def _wait(self, seconds: float | None) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._awake.wait()
        except TimeoutError:
            pass

    def _until_deadline(self) -> float | None:
        deadlines = [live.deadline for live in self._live.values() if live.deadline is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    # --- ends

    def _enforce_time_limits(self) -> None:
        now = time.monotonic()
        for live in list(self._live.values()):
            if live.deadline is not None and now >= live.deadline:
                self._ends.retire(live, StopReason(StopKind.TIME_LIMIT, f"{live.row.limits.time_limit:g} s"))

    def _end_all(self, kind: StopKind) -> None:
        self._take_executed()
        if self.inbox is not None:
            self.inbox.close()
            self._take_inbox()
        for live in list(self._live.values()):
            self._ends.retire(live, StopReason(kind))
        for job, first in self._waiting:
            self._ends.stop_unopened(job, first, StopReason(kind))
        self._waiting.clear()

    def _cancel_rows(self) -> None:
        """End the rows that are not wanted any more. One that waits for its place ends when it has got it."""
        self._unwanted += self.control.take_unwanted()
        if not self._unwanted:
            return
        reason = StopReason(StopKind.CANCELLED)
        for live in list(self._live.values()):
            if any(name.names(live.row.prompt.id, live.row.sample) for name in self._unwanted):
                self._ends.retire(live, reason)
        whole = {name.prompt_id for name in self._unwanted if name.sample is None}
        for job, first in [item for item in self._waiting if item[0].prompt.id in whole]:
            self._waiting.remove((job, first))
            self._ends.stop_unopened(job, first, reason)
        still_to_come = {job.prompt.id for job, _ in self._waiting}
        self._unwanted = [name for name in self._unwanted if name.prompt_id in still_to_come]

    async def _abandon(self) -> None:
        """Give back what is still held: after a failure here, or when nobody waits for the rest."""
        for live in list(self._live.values()):
            self._ends.release(live)
            self._observers.move(live.observed, "done")
        for job, first in self._waiting:
            for sample in range(first, job.n):
                self._observers.move(observed_row(job, sample), "done")
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._forks.abandon()
        await self.delivery.abandon()


def _guarded_step(engine: Engine) -> list[Update]:
    try:
        return engine.step()
    except StopIteration as error:  # which no future can carry: whoever waits would wait for ever
        raise EngineError(f"step: {error!r}") from error


def _failure_of_engine(error: Exception) -> StopReason:
    return StopReason(StopKind.ENGINE_FAILURE, f"{type(error).__name__}: {error}")
