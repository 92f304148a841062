"""Rows that are copied in the middle of being generated: ids, keys and values, and session."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any, Protocol

from midstream.control import Control, ForkRequest
from midstream.engines.base import Engine, Handle, sample_seed
from midstream.errors import ConfigurationError, SandboxError
from midstream.jobs import Job, Session, Settings, watch_of
from midstream.live import LiveRow
from midstream.observing import RowsQueued
from midstream.types import ForkPoint

logger = logging.getLogger(__name__)


class Tell(Protocol):
    """Tells the engine something of a row. False where it failed at that, and the row has stopped."""

    def __call__(self, live: LiveRow, told: Callable[[], object], /) -> bool: ...


class Start(Protocol):
    """Starts work beside the steps; the drive looks again when it is done."""

    def __call__(self, work: Coroutine[Any, Any, Sequence[Session]], /) -> asyncio.Task[Sequence[Session]]: ...


class Forks:
    """What the drive was asked to copy, and how far that is. Called between two steps of the engine."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        control: Control,
        jobs: Sequence[Job],
        rows: MutableMapping[Handle, LiveRow],
        start: Start,
        tell: Tell,
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._control = control
        self._rows = rows
        self._start = start
        self._tell = tell
        self._numbers = _SampleNumbers(jobs)
        self._wanted: list[ForkRequest] = []
        self._copied: deque[tuple[LiveRow, ForkRequest, asyncio.Task[Sequence[Session]]]] = deque()

    def settle(self, waiting: Iterable[tuple[Job, int]]) -> None:
        """Open the copies whose sessions are there, and begin with rows that stand still between two ids.

        ``waiting``: jobs that are not all opened yet; a request for one of their rows waits with it.
        """
        while self._copied:
            self._take_sessions(*self._copied.popleft())
        self._wanted += self._control.take_forks()
        for request in list(self._wanted):
            live = _find(self._rows, request)
            if live is None:
                if not any(job.prompt.id == request.prompt_id for job, _ in waiting):
                    self._wanted.remove(request)
                    request.ended()
            elif not live.held:
                self._wanted.remove(request)
                self._begin(live, request)

    def abandon(self) -> None:
        """Nothing is copied any more; all work that was started has ended."""
        for _, request, task in self._copied:
            request.ended()
            if not task.cancelled() and task.exception() is None:
                _close(task.result())
        for request in self._wanted:
            request.ended()
        self._copied.clear()
        self._wanted.clear()

    def _begin(self, live: LiveRow, request: ForkRequest) -> None:
        session = live.session
        if session is None:
            self._open(live, request, [None] * request.n)
        elif self._tell(live, partial(self._engine.rollback, live.handle, 0)):
            live.copying = self._start(self._settings.fork_session(session, request.n))
            live.copying.add_done_callback(lambda task: self._copied.append((live, request, task)))
            self._settings.observers.move(live.observed, "executing")
        else:
            request.ended()

    def _take_sessions(self, live: LiveRow, request: ForkRequest, task: asyncio.Task[Sequence[Session]]) -> None:
        live.copying = None
        sessions: Sequence[Session | None] = ()
        if task.cancelled():
            request.ended()
        elif isinstance(error := task.exception(), SandboxError | ConfigurationError) and request.replay:
            sessions = [None] * request.n  # the first block of each finds its session built from those before
        elif error is not None:
            request.fail(error)
        else:
            sessions = task.result()
        if self._rows.get(live.handle) is not live:  # it stopped meanwhile, such as for its time limit
            _close(sessions)
            request.ended()
            return
        if sessions:
            self._open(live, request, sessions)
        if self._tell(live, partial(self._engine.extend, live.handle, ())):
            self._settings.observers.move(live.observed, "decoding")

    def _open(self, live: LiveRow, request: ForkRequest, sessions: Sequence[Session | None]) -> None:
        """Open the copies, each with its session."""
        samples: list[int] = []
        for place, session in enumerate(sessions):
            sample, number = self._numbers.take(live.job)
            try:
                handle = self._engine.fork(live.handle, sample_seed(live.row.seed, sample))
            except Exception as error:
                logger.exception(
                    "row %s: the engine could not copy it", live.row.prompt.id, extra=live.observed.log_fields
                )
                _close(sessions[place:])
                request.fail(error)
                return
            lineage = (*live.lineage, ForkPoint(live.row.sample, live.row.length))
            row = live.row.fork(sample=sample)
            copy = LiveRow(live.job, (live.job.index, number), row, handle, live.started, lineage)
            copy.session, copy.first_token_due = session, False
            copy.weight_changes = live.weight_changes
            copy.watch = watch_of(live.job, row, self._engine)
            self._rows[handle] = copy
            self._settings.observers(RowsQueued(1))
            self._settings.observers.move(copy.observed, "decoding")
            samples.append(sample)
            self._tell(copy, partial(self._engine.extend, handle, ()))
        request.succeed(samples)


class _SampleNumbers:
    """Numbers for copies: those behind all samples of the same prompt that the batch has."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._next: dict[str | None, int] = {}
        for job in jobs:
            behind = job.n if job.paused is None else job.paused.sample + 1
            self._next[job.prompt.id] = max(behind, self._next.get(job.prompt.id, 0))
        self._rows = {job.index: job.n for job in jobs}

    def take(self, job: Job) -> tuple[int, int]:
        """The next sample number of the job's prompt, and the number of the row among the job's."""
        sample = self._next[job.prompt.id]
        self._next[job.prompt.id] += 1
        row = self._rows[job.index]
        self._rows[job.index] += 1
        return sample, row


def _find(rows: Mapping[Handle, LiveRow], request: ForkRequest) -> LiveRow | None:
    wanted = (request.prompt_id, request.sample)
    return next((live for live in rows.values() if (live.row.prompt.id, live.row.sample) == wanted), None)


def _close(sessions: Sequence[Session | None]) -> None:
    for session in sessions:
        if session is not None:
            session.close()
