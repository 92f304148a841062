"""A thread in which asks are followed, and a queue from which an engine's steps collect what came."""

from __future__ import annotations

import asyncio
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from midstream.engines.server.asking import Asking
from midstream.engines.server.asks import Ask, Fault, Finish, Piece
from midstream.engines.server.client import Client

PATIENCE = 0.02
"""Seconds that a step waits for something to come: so long may a result wait before its row goes on."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new of a request. ``error``: why it failed, behind these ids."""

    request: int
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    version: int | None = None
    finish: Finish | None = None
    error: str | None = None

    def joins(self, later: Delta) -> bool:
        return not later.ids or not self.ids or self.version == later.version

    def then(self, later: Delta) -> Delta:
        """Both in one."""
        version = self.version if self.ids else later.version
        return Delta(
            self.request, self.ids + later.ids, self.logprobs + later.logprobs, version, later.finish, later.error
        )


class Link(ABC):
    """Follows asks in an event loop, and keeps what comes until it is polled, from another thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._deltas: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        self._later: list[Delta] = []
        self._tasks: dict[int, asyncio.Task[None]] = {}

    @abstractmethod
    def _pieces(self, ask: Ask) -> AsyncGenerator[Piece, None]:
        """The answer to an ask, the last piece with its finish reason. Raises :class:`Fault`."""

    @abstractmethod
    def shutdown(self) -> None:
        """End the requests. May be called twice."""

    @property
    def under_way(self) -> int:
        """Requests that were not answered or given up yet."""
        return len(self._tasks)

    def submit(self, request: int, ask: Ask) -> None:
        self._loop.call_soon_threadsafe(self._start, request, ask)

    def abort(self, request: int) -> None:
        """Give a request up, so that the server stops computing."""
        self._loop.call_soon_threadsafe(self._cancel, request)

    def poll(self) -> list[Delta]:
        """What has come, as one delta for each request, whose ids have one version of the weights."""
        merged: dict[int, Delta] = {}
        arrived, self._later = self._later, []
        with suppress(queue.Empty):
            if not arrived:
                arrived.append(self._deltas.get(timeout=PATIENCE))
            while True:
                arrived.append(self._deltas.get_nowait())
        behind: set[int] = set()
        for delta in arrived:
            earlier = merged.get(delta.request)
            if delta.request in behind or (earlier is not None and not earlier.joins(delta)):
                behind.add(delta.request)
                self._later.append(delta)
            else:
                merged[delta.request] = delta if earlier is None else earlier.then(delta)
        return list(merged.values())

    # --- in the loop

    def _start(self, request: int, ask: Ask) -> None:
        task = self._loop.create_task(self._follow(request, ask))
        self._tasks[request] = task
        task.add_done_callback(lambda _: self._tasks.pop(request, None))

    def _cancel(self, request: int) -> None:
        task = self._tasks.get(request)
        if task is not None:
            task.cancel()

    async def _follow(self, request: int, ask: Ask) -> None:
        try:
            async with aclosing(self._pieces(ask)) as pieces:
                async for piece in pieces:
                    self._deltas.put(Delta(request, piece.ids, piece.logprobs, piece.version, piece.finish))
        except Fault as fault:
            self._deltas.put(Delta(request, error=str(fault)))
        except Exception as error:  # noqa: BLE001  # the row is told, whatever it was
            self._deltas.put(Delta(request, error=f"{type(error).__name__}: {error}"))


class ServerLink(Link):
    """An event loop in a thread of its own, with the one client in it."""

    def __init__(self, make_client: Callable[[], Client]) -> None:
        super().__init__(asyncio.new_event_loop())
        self._thread = threading.Thread(target=self._loop.run_forever, name="midstream-server", daemon=True)
        self._thread.start()
        self._closed = False
        self._beside: set[asyncio.Task[Any]] = set()
        self.asking: Asking | None = None
        try:
            self.client = self.within(_called(make_client))
        except BaseException:
            self._stop()
            raise

    def _pieces(self, ask: Ask) -> AsyncGenerator[Piece, None]:
        assert self.asking is not None
        return self.asking.pieces(ask)

    def within(self, work: Coroutine[Any, Any, _T]) -> _T:
        """What ``work`` gives, done in the link's loop."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def beside(self, work: Coroutine[Any, Any, _T]) -> _T:
        """What ``work`` gives, done in the link's loop while another waits. To give up waiting ends it."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._kept(work), self._loop))

    async def _kept(self, work: Coroutine[Any, Any, _T]) -> _T:
        task = asyncio.current_task()
        assert task is not None
        self._beside.add(task)
        try:
            return await work
        finally:
            self._beside.discard(task)

    def shutdown(self) -> None:
        """End the requests, close the connections, end the thread. May be called twice."""
        if self._closed:
            return
        self._closed = True
        try:
            self.within(self._end())
        finally:
            self._stop()

    async def _end(self) -> None:
        tasks = [*self._tasks.values(), *self._beside]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.client.close()
        await self._loop.shutdown_asyncgens()
        for _ in range(3):  # transports close their sockets in the turn of the loop that follows
            await asyncio.sleep(0)

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _called(make: Callable[[], _T]) -> _T:
    return make()
