"""Runs tools outside the sandbox, for the code inside that calls them, and for calls that are written as JSON."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any

from midstream.crossing import CrossingError, describe_exception, to_json
from midstream.errors import MidstreamError, ProtocolError
from midstream.observing import ObservedRow, Observers, ToolBegan, ToolEnded
from midstream.tools.interface import ToolContext
from midstream.tools.lanes import Asked, Lane
from midstream.tools.memory import Memory
from midstream.tools.threads import CallThreads, call
from midstream.tools.tool import Tool, ToolSet
from midstream.types import ExecutionError, ToolAnswer, ToolCall

logger = logging.getLogger(__name__)

_SECONDS_TO_CLOSE = 5.0
_NONE = Observers()


class ToolHost:
    """Where the calls of all rows meet. Async tools run on the caller's event loop, sync ones in threads.

    - ``max_threads``: of each tool, where it has no ``concurrency`` of its own; so a slow tool delays no other.
    - ``memory_entries``, ``memory_characters``: bounds of what is remembered of all pure tools together.
    - ``observers``: are told of each call (:mod:`midstream.observing`).
    """

    def __init__(
        self,
        tools: ToolSet,
        *,
        max_threads: int = 64,
        memory_entries: int = 65_536,
        memory_characters: int = 256 << 20,
        observers: Observers = _NONE,
    ) -> None:
        self.tools = tools
        self.observers = observers
        with contextlib.ExitStack() as started:
            for source in tools.sources:
                source.start()
                started.callback(source.stop)
            self._sources = started.pop_all()
        self.beside_sandbox = tuple(tool for tool in tools if tool.place == "sandbox")
        """Those whose place is beside the sandbox, for pools whose sandboxes are elsewhere."""
        self._memory = Memory(memory_entries, memory_characters)
        self._threads = {
            tool.name: CallThreads(
                tool.concurrency or (max_threads if tool.batched is False else 1), f"tool-{tool.name}"
            )
            for tool in tools
        }
        self._lanes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, Lane]]
        self._lanes = weakref.WeakKeyDictionary()
        self._withdrawn: set[str] = set()
        self._closing: set[Future[Any]] = set()

    def row(self, context: ToolContext | None = None, observed: ObservedRow | None = None) -> RowTools:
        """The tools as one row has them. Close it with the row. ``observed``: what observers know the row by."""
        return RowTools(self, context or ToolContext(), observed)

    def withdraw(self, name: str) -> None:
        """From now on calls of this tool raise a RuntimeError, as when its server has gone."""
        self._withdrawn.add(name)

    def close(self) -> None:
        """Give back the threads. Calls that still run are not waited for; what rows' tools close, is for a moment."""
        wait(self._closing, _SECONDS_TO_CLOSE)
        for threads in self._threads.values():
            threads.close()
        self._sources.close()

    # --- for RowTools

    def tool(self, name: str) -> Tool:
        """Raises what a call of a name that is no tool, or is none any more, raises in the code."""
        if name not in self.tools:
            raise NameError(f"name {name!r} is not defined")
        if name in self._withdrawn:
            raise RuntimeError(f"{name}() is no longer available")
        return self.tools[name]

    def lane(self, tool: Tool) -> Lane:
        lanes = self._lanes.setdefault(asyncio.get_running_loop(), {})
        lane = lanes.get(tool.name)
        if lane is None:
            lane = lanes[tool.name] = Lane(tool, self.threads(tool), self._memory)
        return lane

    def threads(self, tool: Tool) -> CallThreads:
        return self._threads[tool.name]

    def run_last(self, tool: Tool, function: Callable[[], object]) -> None:
        """Run what a row's tool has to do at its end, in a thread of the tool's."""
        try:
            future = self.threads(tool).submit(function)
        except ProtocolError:  # closed meanwhile
            return
        except MidstreamError as error:
            logger.warning("a row's tool could not be closed: %s", error)
            return
        self._closing.add(future)
        future.add_done_callback(self._closed_one)

    def _closed_one(self, future: Future[Any]) -> None:
        self._closing.discard(future)
        if future.cancelled() or future.exception() is not None:  # the host was closed before its turn came
            return
        if future.result()[1] is not None:
            logger.warning("a row's tool could not be closed", exc_info=future.result()[1])


class RowTools:
    """One row's calls: counted, with its stateful tools, and told who calls. Used on one event loop."""

    def __init__(self, host: ToolHost, context: ToolContext, observed: ObservedRow | None = None) -> None:
        self.context = context
        self._host = host
        self._observed = observed
        self._calls: Counter[str] = Counter()
        self._made: dict[str, asyncio.Task[Any]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return self._host.tools.names

    @property
    def beside_sandbox(self) -> tuple[Tool, ...]:
        """The tools whose calls are run beside the sandbox, where that is on another machine."""
        return self._host.beside_sandbox

    async def __call__(self, name: str, arguments: list[Any], keyword_arguments: dict[str, Any]) -> ToolAnswer:
        """As :meth:`call`: a session serves its code with this."""
        return await self.call(name, arguments, keyword_arguments)

    async def call(
        self, name: str, arguments: Sequence[Any] = (), keyword_arguments: Mapping[str, Any] | None = None
    ) -> ToolAnswer:
        """The answer to a call with Python's values, as code makes it.

        What a tool raises is in the answer; :class:`~midstream.errors.MidstreamError` is raised.
        """
        return await self._answered(name, lambda tool: tool.interface.bind(arguments, keyword_arguments or {}))

    async def call_json(self, name: str, arguments: Mapping[str, Any]) -> ToolCall:
        """A call with arguments by name that came as JSON, and what became of it: all that there is to record.

        The names are those of the parameters, or of the properties of the tool's schema. Values are made what the
        annotations say (texts dates, say), and one that does not fit is a TypeError that says which and why. Never
        raises for what a tool did. ``started`` is left at 0.
        """
        began = time.monotonic()
        answer = await self._answered(name, lambda tool: tool.bind_json(arguments))
        return ToolCall(
            name,
            keyword_arguments=_recorded(arguments),
            value=answer.value,
            error=answer.error,
            duration=time.monotonic() - began,
            cached=answer.cached,
            batched=answer.batched,
        )

    def tell(self, calls: Iterable[ToolCall]) -> None:
        """Tell observers of calls that were run beside the sandbox, on another machine, and are over."""
        for made in calls:
            began = ToolBegan(self._observed, made.name)
            self._host.observers(began)
            answer = ToolAnswer(made.value, made.error, made.cached, made.batched)
            self._host.observers(ToolEnded(began, made.duration, answer))

    def close(self) -> None:
        """The row is over: close what its stateful tools made."""
        for name, task in self._made.items():
            if not task.done():
                task.cancel()
            elif not task.cancelled() and task.exception() is None and callable(getattr(task.result(), "close", None)):
                self._host.run_last(self._host.tools[name], task.result().close)
        self._made.clear()

    async def _answered(self, name: str, bind: Callable[[Tool], Any]) -> ToolAnswer:
        try:
            tool = self._host.tool(name)
        except Exception as error:  # noqa: BLE001  # a call of what is no tool
            return ToolAnswer(error=describe_exception(error))
        observers = self._host.observers
        started = time.monotonic()
        began = ToolBegan(self._observed, name)
        observers(began)
        try:
            answer = await self._made_call(tool, bind)
        except BaseException as error:
            observers(ToolEnded(began, time.monotonic() - started, error=error))
            raise
        observers(ToolEnded(began, time.monotonic() - started, answer))
        return answer

    async def _made_call(self, tool: Tool, bind: Callable[[Tool], Any]) -> ToolAnswer:
        try:
            bound = bind(tool)
            self._count(tool)
        except MidstreamError:
            raise
        except Exception as error:  # noqa: BLE001  # a call that cannot be made; arguments' own code runs in it
            return ToolAnswer(error=describe_exception(error))
        try:
            async with asyncio.timeout(tool.deadline) as limit:
                return await self._executed(tool, bound)
        except TimeoutError:
            if not limit.expired():
                raise
            message = f"{tool.name}() gave no answer within {tool.deadline:g} seconds"
            return ToolAnswer(error=ExecutionError("TimeoutError", message))

    async def _executed(self, tool: Tool, bound: Any) -> ToolAnswer:
        function = tool.function
        if tool.per_row:
            try:
                function = await self._own(tool)
            except MidstreamError:
                raise
            except Exception as error:  # noqa: BLE001  # the factory's
                return ToolAnswer(error=describe_exception(error))
        return await self._host.lane(tool).answer(Asked(bound, self.context, function))

    def _count(self, tool: Tool) -> None:
        if tool.calls_per_row is not None and self._calls[tool.name] >= tool.calls_per_row:
            times = "once" if tool.calls_per_row == 1 else f"{tool.calls_per_row} times"
            raise RuntimeError(f"{tool.name}() may be called at most {times}")
        self._calls[tool.name] += 1

    async def _own(self, tool: Tool) -> Callable[..., Any]:
        """What the factory made for this row; made by its first call, and again if that failed."""
        task = self._made.get(tool.name)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            arguments = [self.context] if tool.factory_takes_context else []
            task = asyncio.ensure_future(call(self._host.threads(tool), tool.function, arguments))
            task.add_done_callback(_seen)
            self._made[tool.name] = task
        made: Callable[..., Any] = await asyncio.shield(task)
        return made


def _seen(task: asyncio.Task[Any]) -> None:
    """Whoever waited for it may have gone: then nobody asks how it failed."""
    if not task.cancelled():
        task.exception()


def _recorded(arguments: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return {str(key): to_json(value) for key, value in arguments.items()}
    except CrossingError:
        return {str(key): repr(value) for key, value in arguments.items()}
