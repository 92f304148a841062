"""The sandboxes of one node. Runs inside an actor; every method returns at once, or when there is news.

Blocks take from microseconds to minutes, so no call of the actor waits for one: orders come in batches, each is a task,
and what came of them is collected in batches by one call that is always waiting.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from midstream.crossing import to_json
from midstream.distributed.messages import (
    Answer,
    Asked,
    Beside,
    Close,
    Done,
    Failed,
    Fork,
    Get,
    HostReport,
    News,
    Numbered,
    Open,
    Order,
    Put,
    Run,
)
from midstream.errors import SandboxError
from midstream.observing import InterpreterStarted, Observation, SessionAsked, SessionGranted
from midstream.sandbox import SandboxPool, Session
from midstream.tools import RowTools, ToolContext, ToolHost, ToolSet
from midstream.types import ToolAnswer

_OBSERVED: ContextVar[tuple[Numbered, list[Observation]] | None] = ContextVar("observed", default=None)


def _observe(observation: Observation) -> None:
    """What is seen here alone goes back with the news of its order. Sessions and blocks are told where the caller is,
    who has asked the pool for a place already; but a copy's place is this host's to give."""
    if (under_way := _OBSERVED.get()) is None:
        return
    order, observed = under_way
    asked = isinstance(order, Fork) and isinstance(observation, SessionAsked | SessionGranted)
    if asked or isinstance(observation, InterpreterStarted):
        observed.append(observation)


class SandboxHost:
    """``options`` are those of :class:`~midstream.SandboxPool`."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._pool = SandboxPool(**options, observers=[_observe])
        self._sessions: dict[str, Session] = {}
        self._orders: dict[str, list[asyncio.Task[None]]] = {}
        self._running: dict[str, int] = {}
        self._calls = itertools.count()
        self._tool_hosts: dict[int, asyncio.Task[ToolHost]] = {}
        self._row_tools: dict[str, tuple[int, ToolContext, RowTools]] = {}
        self._asked: dict[int, asyncio.Future[ToolAnswer]] = {}
        self._news: list[News] = []
        self._arrived = asyncio.Event()

    async def start(self) -> HostReport:
        """Start the fork server. Raises what :meth:`midstream.SandboxPool.start` does."""
        await asyncio.to_thread(self._pool.start)
        return HostReport(self._pool.report.level, len(os.sched_getaffinity(0)), os.getpid())

    async def submit(self, orders: Sequence[Order]) -> None:
        """Take orders. Those of one session are carried out in their order."""
        for order in orders:
            if isinstance(order, Answer):
                asked = self._asked.pop(order.call, None)
                if asked is not None and not asked.done():
                    asked.set_result(order.answer)
            elif isinstance(order, Close):
                self._close(order.session)
            else:
                tasks = self._orders.setdefault(order.session, [])
                task = asyncio.create_task(self._carry_out(order, tasks[-1] if tasks else None))
                tasks.append(task)
                task.add_done_callback(tasks.remove)

    async def collect(self) -> list[News]:
        """What has come of the orders since the last call; waits until there is something."""
        await self._arrived.wait()
        self._arrived.clear()
        news, self._news = self._news, []
        return news

    async def stop(self) -> None:
        """End all sessions and the fork server."""
        for session in {*self._sessions, *self._orders}:
            self._close(session)
        for task in self._tool_hosts.values():
            if task.done() and not task.cancelled() and task.exception() is None:
                task.result().close()
        await asyncio.to_thread(self._pool.close)

    def _tell(self, news: News) -> None:
        self._news.append(news)
        self._arrived.set()

    async def _carry_out(self, order: Numbered, earlier: asyncio.Task[None] | None) -> None:
        if earlier is not None:
            await asyncio.wait([earlier])
        observed: list[Observation] = []
        _OBSERVED.set((order, observed))  # each order is a task, so in a context, of its own
        try:
            value = await self._done(order)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001  # whatever it is, whoever waits is told
            self._tell(Failed.by(order.number, error, tuple(observed)))
        else:
            self._tell(Done(order.number, value, tuple(observed)))

    async def _done(self, order: Numbered) -> Any:
        if isinstance(order, Open):
            self._sessions[order.session] = await self._pool.session_async(
                tools=order.tools, call_tool=self._caller(order.session), seed=order.seed, history=order.past
            )
            return None
        session = self._sessions.get(order.session)
        if session is None:
            raise SandboxError(f"the session {order.session} is not open on this host")
        match order:
            case Run():
                self._running[order.session] = order.number
                if order.beside is not None:
                    await self._have_tools(order.session, order.beside, order.context or ToolContext())
                return await session.run_async(order.code, checkpoint=order.checkpoint)
            case Put():
                return await session.put_async(order.path, order.data)
            case Get():
                return await session.get_async(order.path)
            case Fork():
                copies = await session.fork_async(len(order.copies))
                for name, copy in zip(order.copies, copies, strict=True):
                    copy.serve(self._caller(name))
                    self._sessions[name] = copy
                return None

    async def _have_tools(self, session: str, beside: Beside, context: ToolContext) -> None:
        """Have the tools that are called here ready for a session's row."""
        own = self._row_tools.get(session)
        if own is not None and own[:2] == (beside.key, context):
            return
        if beside.key not in self._tool_hosts:
            self._tool_hosts[beside.key] = asyncio.create_task(_tool_host(beside))
        tools = await asyncio.shield(self._tool_hosts[beside.key])
        if own is not None:
            own[2].close()
        self._row_tools[session] = beside.key, context, tools.row(context)

    def _caller(self, session: str) -> Any:
        async def call_tool(name: str, arguments: list[Any], keyword_arguments: dict[str, Any]) -> ToolAnswer:
            own = self._row_tools.get(session)
            if own is not None and name in own[2].names:
                return await own[2].call(name, arguments, keyword_arguments)
            call = next(self._calls)
            answer: asyncio.Future[ToolAnswer] = asyncio.get_running_loop().create_future()
            self._asked[call] = answer
            given = tuple(map(to_json, arguments))
            named = {key: to_json(value) for key, value in keyword_arguments.items()}
            self._tell(Asked(self._running[session], call, name, given, named))
            try:
                return await answer
            finally:
                self._asked.pop(call, None)

        return call_tool

    def _close(self, name: str) -> None:
        tasks = self._orders.pop(name, [])
        session = self._sessions.pop(name, None)
        self._running.pop(name, None)
        own = self._row_tools.pop(name, None)
        if own is not None:
            own[2].close()
        for task in tasks:
            task.cancel()
            task.add_done_callback(lambda _: self._close(name))  # it may have opened the session meanwhile
        if session is not None:
            session.kill()
            session.close()


async def _tool_host(beside: Beside) -> ToolHost:
    return ToolHost(ToolSet(await beside.tools[0]))
