"""How the calls of one tool are executed: shared, in batches, so many at a time, again after a fault.

All of a lane lives on one event loop. A call waits for an *execution*, which may answer others as well; it ends
early when nobody waits for it any more.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from inspect import BoundArguments, Parameter
from typing import Any

from midstream.crossing import CrossingError, describe_exception, to_json
from midstream.errors import MidstreamError
from midstream.tools.interface import ToolContext
from midstream.tools.memory import Memory
from midstream.tools.threads import CallThreads, call, is_async
from midstream.tools.tool import Tool
from midstream.types import ExecutionError, ToolAnswer

logger = logging.getLogger(__name__)

_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 2.0


@dataclass(frozen=True, slots=True)
class Asked:
    """One call: its bound arguments, who calls, and the function (of a stateful tool, the row's own)."""

    bound: BoundArguments
    context: ToolContext
    function: Callable[..., Any]


@dataclass(slots=True, eq=False)
class _Execution:
    """What calls wait for. ``abandon`` ends it when the last of them has gone."""

    future: asyncio.Future[ToolAnswer]
    abandon: Callable[[], object]
    waiting: int = 0
    abandoned: bool = False


@dataclass(slots=True, eq=False)
class _Item:
    """A call that waits to be part of a batch."""

    asked: Asked
    future: asyncio.Future[ToolAnswer]


@dataclass(slots=True, eq=False)
class _Json:
    """A value that is JSON already."""

    value: Any


@dataclass(slots=True, eq=False)
class Lane:
    """The calls of ``tool`` on one event loop. Sync functions run in ``threads``."""

    tool: Tool
    threads: CallThreads
    memory: Memory
    _running: dict[Any, _Execution] = field(default_factory=dict)
    _waiting: deque[_Item] = field(default_factory=deque)
    _batches: set[asyncio.Task[None]] = field(default_factory=set)
    _timer: asyncio.TimerHandle | None = None
    _permits: asyncio.Semaphore | None = None

    def __post_init__(self) -> None:
        if self.tool.concurrency is not None and self.tool.batched is False:
            self._permits = asyncio.Semaphore(self.tool.concurrency)

    async def answer(self, asked: Asked) -> ToolAnswer:
        """The answer to one call. Raises :class:`~midstream.errors.MidstreamError` where the library failed."""
        key = _key(self.tool, asked) if self.tool.pure else None
        if key is None:
            return await self._wait(self._start(asked))
        known = self.memory.get(key)
        if known is not None:
            return ToolAnswer(json.loads(known), cached=True)
        execution = self._running.get(key)
        # One that is done stays here until its answer is in the memory, a turn of the loop later.
        if execution is not None and not (execution.future.cancelled() or execution.abandoned):
            shared = await self._wait(execution)
            return ToolAnswer(shared.value, shared.error, cached=True, batched=shared.batched)
        execution = self._running[key] = self._start(asked)
        execution.future.add_done_callback(partial(self._settled, key))
        return await self._wait(execution)

    def _settled(self, key: Any, future: asyncio.Future[ToolAnswer]) -> None:
        """A pure call has its answer, whoever still waits for it."""
        execution = self._running.get(key)
        if execution is not None and execution.future is future:
            del self._running[key]
        if not future.cancelled() and future.exception() is None and future.result().error is None:
            self.memory.put(key, json.dumps(future.result().value))

    async def _wait(self, execution: _Execution) -> ToolAnswer:
        execution.waiting += 1
        try:
            return await asyncio.shield(execution.future)
        finally:
            execution.waiting -= 1
            if execution.waiting == 0 and not execution.future.done():
                execution.abandoned = True  # it ends a little later, and nobody may join it until then
                execution.abandon()

    def _start(self, asked: Asked) -> _Execution:
        if self.tool.batched is not False:
            return self._enqueue(asked)
        task = asyncio.create_task(self._single(asked))
        return _Execution(task, task.cancel)

    # --- one call by itself

    async def _single(self, asked: Asked) -> ToolAnswer:
        arguments, keywords = _passed(self.tool.interface.context, asked)
        if self._permits is None:
            return await self._attempt(asked.function, arguments, keywords)
        async with self._permits:
            return await self._attempt(asked.function, arguments, keywords)

    async def _attempt(
        self, function: Callable[..., Any], arguments: Sequence[Any], keywords: Mapping[str, Any]
    ) -> ToolAnswer:
        try:
            return _answer(
                self.tool.name, await self._tried(lambda: call(self.threads, _written(function), arguments, keywords))
            )
        except MidstreamError:
            raise
        except Exception as error:  # a tool's exception is the code's to handle
            logger.debug("tool %s failed", self.tool.name, exc_info=error, extra={"tool": self.tool.name})
            return ToolAnswer(error=describe_exception(error))

    async def _tried(self, attempt: Callable[[], Awaitable[Any]]) -> Any:
        for number in range(self.tool.retries):
            try:
                return await attempt()
            except self.tool.retry_on as error:
                logger.debug("tool %s is tried again", self.tool.name, exc_info=error, extra={"tool": self.tool.name})
                await asyncio.sleep(min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**number))
        return await attempt()

    # --- batches

    def _enqueue(self, asked: Asked) -> _Execution:
        loop = asyncio.get_running_loop()
        item = _Item(asked, loop.create_future())
        self._waiting.append(item)
        if len(self._waiting) >= self.tool.batch_size:
            self._begin_batches()
        elif self._timer is None:
            self._timer = loop.call_later(self.tool.batch_window, self._begin_batches)
        return _Execution(item.future, item.future.cancel)

    def _begin_batches(self) -> None:
        """Begin as many as may run; the calls that are left over go with the next one that ends."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        most = self.tool.concurrency or 1
        while self._waiting and len(self._batches) < most:
            items: list[_Item] = []
            while self._waiting and len(items) < self.tool.batch_size:
                item = self._waiting.popleft()
                if not item.future.done():
                    items.append(item)
            if items:
                self._begin(items)

    def _begin(self, items: list[_Item]) -> None:
        task = asyncio.create_task(self._batch(items))
        self._batches.add(task)
        waiting = len(items)

        def left(_: object) -> None:
            nonlocal waiting
            waiting -= 1
            if not waiting:
                task.cancel()  # nobody waits any more; done already, that changes nothing

        def ended(_: object) -> None:
            self._batches.discard(task)
            for item in items:
                item.future.cancel()
            self._begin_batches()

        for item in items:
            item.future.add_done_callback(left)
        task.add_done_callback(ended)

    async def _batch(self, items: list[_Item]) -> None:
        try:
            answers: Iterable[ToolAnswer] = await self._answers(items)
        except MidstreamError as error:
            for item in items:
                if not item.future.done():
                    item.future.set_exception(error)
            return
        for item, answer in zip(items, answers, strict=True):
            if not item.future.done():
                item.future.set_result(answer)

    async def _answers(self, items: list[_Item]) -> list[ToolAnswer]:
        try:
            values = await self._tried(lambda: self._call_batch(items))
        except MidstreamError:
            raise
        except Exception as error:  # as above
            logger.debug(
                "tool %s failed with a batch of %d",
                self.tool.name,
                len(items),
                exc_info=error,
                extra={"tool": self.tool.name},
            )
            if self.tool.pure and len(items) > 1:
                return [answer for item in items for answer in await self._answers([item])]
            failed = describe_exception(error)
            return [ToolAnswer(error=failed, batched=len(items)) for _ in items]
        return [_answer(self.tool.name, value, len(items)) for value in values]

    async def _call_batch(self, items: list[_Item]) -> list[Any]:
        function = items[0].asked.function if self.tool.batched is True else self.tool.batched
        assert callable(function)
        arguments, keywords = self._columns(items)

        def listed(*arguments: Any, **keywords: Any) -> Any:
            values = function(*arguments, **keywords)
            return values if inspect.isawaitable(values) else _list_of(values, len(items), self.tool.name)

        if is_async(function):
            values = await call(self.threads, function, arguments, keywords)
        else:
            values = await call(self.threads, listed, arguments, keywords)
        return _list_of(values, len(items), self.tool.name)

    def _columns(self, items: list[_Item]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments of all calls, a list for each parameter."""
        arguments: list[Any] = []
        keywords: dict[str, Any] = {}
        interface = self.tool.interface
        rows = []
        for item in items:
            item.asked.bound.apply_defaults()
            rows.append(item.asked.bound.arguments)
        for name, parameter in (interface.signature.parameters if interface.signature else {}).items():
            column = [row[name] for row in rows]
            # The contexts may stand among the others: what can be given by name, then is.
            among = interface.context is not None and parameter.kind is not Parameter.POSITIONAL_ONLY
            if parameter.kind is Parameter.KEYWORD_ONLY or (among and self.tool.batched is True):
                keywords[name] = column
            else:
                arguments.append(column)
        if interface.context is not None and self.tool.takes_contexts:
            keywords[interface.context] = [item.asked.context for item in items]
        return arguments, keywords


def _passed(context: str | None, asked: Asked) -> tuple[Sequence[Any], dict[str, Any]]:
    """The arguments as the function is called with them."""
    bound = asked.bound
    if context is None:
        return bound.args, bound.kwargs
    # The context may stand among them: what can be given by name, is.
    kinds = {one.kind for one in bound.signature.parameters.values()}
    if Parameter.VAR_POSITIONAL in kinds:
        return bound.args, {**bound.kwargs, context: asked.context}
    positional, keywords = [], {context: asked.context}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is Parameter.POSITIONAL_ONLY:
            positional.append(value)
        elif kind is Parameter.VAR_KEYWORD:
            keywords.update(value)
        else:
            keywords[name] = value
    return positional, keywords


def _list_of(values: Any, count: int, name: str) -> list[Any]:
    if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__len__"):
        raise TypeError(f"{name}() gave a {type(values).__name__} for a batch of calls, which is no list of answers")
    if len(values) != count:
        raise RuntimeError(f"{name}() gave {len(values)} answers to a batch of {count} calls")
    return [_as_json(value) for value in values]


def _written(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, with its value made JSON where it runs: large values then hold up no event loop."""
    if is_async(function):
        return function

    def run(*arguments: Any, **keywords: Any) -> Any:
        value = function(*arguments, **keywords)
        return value if inspect.isawaitable(value) else _as_json(value)

    return run


def _as_json(value: Any) -> Any:
    if isinstance(value, _Json | BaseException):
        return value
    try:
        return _Json(to_json(value))
    except CrossingError as error:
        return error


def _answer(name: str, value: Any, batched: int = 1) -> ToolAnswer:
    value = _as_json(value)
    if isinstance(value, CrossingError):
        return ToolAnswer(
            error=ExecutionError("TypeError", f"the answer of {name}() cannot be passed on: {value}"), batched=batched
        )
    if isinstance(value, BaseException):
        return ToolAnswer(error=describe_exception(value), batched=batched)
    return ToolAnswer(value.value, batched=batched)


def _key(tool: Tool, asked: Asked) -> Any:
    """What equal calls have in common; None for arguments that cannot be compared."""
    bound = BoundArguments(asked.bound.signature, asked.bound.arguments.copy())
    bound.apply_defaults()
    who = None
    if tool.interface.context is not None:
        who = (asked.context.prompt_id, asked.context.group, asked.context.sample, asked.context.seed)
    try:
        return tool.name, who, json.dumps(to_json(dict(bound.arguments)), sort_keys=True)
    except CrossingError:
        return None
