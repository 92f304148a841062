"""Rows that come one by one, each beside whatever others are being generated then."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, aclosing
from dataclasses import replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

from midstream.errors import EngineError
from midstream.jobs import Job
from midstream.types import Trajectory

if TYPE_CHECKING:
    from midstream.driving import Drive


class Inbox:
    """What reaches a drive while it runs: jobs of one row, and rows that nobody waits for any more.

    Any thread puts, the drive takes. Once it is closed, nothing more can be put.
    """

    def __init__(self) -> None:
        self.changed: Callable[[], None] = _nobody_looks
        self._lock = threading.Lock()
        self._jobs: list[Job] = []
        self._left: set[int] = set()
        self._futures: dict[int, Future[Trajectory]] = {}
        self._closed = False

    def put(self, job: Job, future: Future[Trajectory]) -> bool:
        """False where it is closed."""
        with self._lock:
            if self._closed:
                return False
            self._jobs.append(job)
            self._futures[job.index] = future
        self.changed()
        return True

    def leave(self, index: int) -> None:
        """Nobody waits for the job's row any more."""
        with self._lock:
            if index not in self._futures:
                return
            self._left.add(index)
        self.changed()

    def take(self) -> tuple[list[Job], set[int]]:
        """What has come since the last time: new jobs, and the indices of those that were left."""
        if not (self._jobs or self._left):  # as at most steps
            return [], set()
        with self._lock:
            jobs, self._jobs = self._jobs, []
            left, self._left = self._left, set()
            return jobs, left

    def close_if_empty(self) -> bool:
        """Whether there is nothing in it, and will not be."""
        with self._lock:
            self._closed = self._closed or not (self._jobs or self._left)
            return self._closed

    def close(self) -> None:
        with self._lock:
            self._closed = True

    def deliver(self, index: int, trajectory: Trajectory) -> None:
        with self._lock:
            future = self._futures.pop(index)
        if future.set_running_or_notify_cancel():
            future.set_result(trajectory)

    def fail(self, error: BaseException) -> None:
        """The rows that are left will never come."""
        with self._lock:
            self._closed = True
            futures, self._futures = self._futures, {}
        for future in futures.values():
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

    @property
    def waited_for(self) -> int:
        """Rows that were put and not delivered."""
        return len(self._futures)


class Submissions:
    """Gives each job to the drive that runs, or starts one, in a thread and an event loop of its own.

    ``open_drive`` claims the generator for a drive over an inbox. The drive ends when its last row does.
    """

    def __init__(self, open_drive: Callable[[Inbox], AbstractContextManager[Drive]]) -> None:
        self._open_drive = open_drive
        self._lock = threading.Lock()
        self._inbox: Inbox | None = None
        self._thread: threading.Thread | None = None
        self._indices = count()

    @property
    def active(self) -> bool:
        """Whether rows are under way."""
        return self._inbox is not None and self._inbox.waited_for > 0

    def submit(self, job: Job) -> Future[Trajectory]:
        job = replace(job, index=next(self._indices))
        future: Future[Trajectory] = Future()
        with self._lock:
            inbox = self._inbox
            if inbox is None or not inbox.put(job, future):
                self._inbox = inbox = Inbox()
                inbox.put(job, future)
                self._start(inbox)
        future.add_done_callback(partial(_left, inbox, job.index))
        return future

    def settle(self) -> None:
        """Where no row is under way, wait until the last drive has let go of the generator."""
        thread = self._thread
        if thread is not None and not self.active and thread is not threading.current_thread():
            thread.join()

    def close(self) -> None:
        """Wait for the drive, which has been told to end."""
        with self._lock:
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _start(self, inbox: Inbox) -> None:
        target = contextvars.copy_context().run
        # A daemon: a program that is over does not wait for rows that nobody will read.
        self._thread = threading.Thread(
            target=target, args=(self._work, inbox, self._thread), name="midstream-submitted", daemon=True
        )
        self._thread.start()

    def _work(self, inbox: Inbox, previous: threading.Thread | None) -> None:
        if previous is not None:
            previous.join()
        failure: BaseException = EngineError("the drive ended before its row did")
        try:
            with self._open_drive(inbox) as drive:
                asyncio.run(_deliver(drive, inbox))
        except BaseException as error:  # noqa: BLE001  # raised where the row is waited for
            failure = error
        finally:
            inbox.fail(failure)


async def _deliver(drive: Drive, inbox: Inbox) -> None:
    async with aclosing(drive.run()) as running:
        async for index, trajectory in running:
            del drive.delivery.done[index]
            inbox.deliver(index[0], trajectory)


def _left(inbox: Inbox, index: int, future: Future[Trajectory]) -> None:
    if future.cancelled():
        inbox.leave(index)


def _nobody_looks() -> None:
    """Before the drive runs, and after."""
