"""One row's interpreter on some machine of a cluster, rebuilt on another when that one is lost."""

from __future__ import annotations

import asyncio
import itertools
import os
import queue
import secrets
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from midstream.crossing import CrossingError, Offer, from_json
from midstream.distributed.messages import (
    Answer,
    Asked,
    Beside,
    Close,
    Done,
    Failed,
    Fork,
    Get,
    News,
    Open,
    Order,
    Put,
    Run,
)
from midstream.distributed.tool_calls import AnsweredCalls, ToolRequest, answered, answered_async
from midstream.errors import ConfigurationError, ProtocolError, SandboxError
from midstream.observing import InterpreterStarted, Observation, SessionRan
from midstream.sandbox.drivers import CallTool
from midstream.sandbox.files import checked_data, checked_path
from midstream.sandbox.replay import PastBlock
from midstream.tools import RowTools, ToolContext
from midstream.types import ExecutionError, ExecutionResult, ToolAnswer

if TYPE_CHECKING:
    from midstream.distributed.hosts import Host
    from midstream.distributed.pool import RayPool

_T = TypeVar("_T")
_NUMBERS = itertools.count()
MOVES = 5
"""Times that one block may lose its host before it is given up."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Do: find a host."""


@dataclass(frozen=True, slots=True)
class _Wait:
    """Do: wait for news."""


_Steps = Generator[_Place | _Wait | ToolRequest, Any, _T]


class RaySession:
    """As :class:`~midstream.sandbox.Session`, made by :meth:`RayPool.session`."""

    def __init__(
        self,
        pool: RayPool,
        *,
        tools: Mapping[str, Offer],
        call_tool: CallTool,
        seed: int,
        past: Sequence[PastBlock] = (),
    ) -> None:
        self._pool = pool
        self._host: Host | None = None  # before what may fail: what ends looks at it
        self.tools = tools
        self.seed = seed
        self.serve(call_tool)
        self._past = list(past)
        self._name = ""
        self._had_interpreter = False
        self._busy = threading.Lock()
        self._closed = False

    def serve(self, call_tool: CallTool) -> None:
        """Have calls of tools run by another function, from the next block on.

        A generator's row has tools whose place is beside the sandbox (:class:`~midstream.tools.Tool`): their calls
        do not come back here.
        """
        self._call_tool = call_tool
        self._beside: Beside | None = None
        self._context: ToolContext | None = None
        if isinstance(call_tool, RowTools) and call_tool.beside_sandbox:
            self._beside, self._context = self._pool.send_tools(call_tool.beside_sandbox), call_tool.context

    @property
    def alive(self) -> bool:
        """Whether it has an interpreter somewhere now. Without one the next block gets a new one."""
        return self._host is not None and not self._host.lost and not self._closed

    @property
    def node_id(self) -> str | None:
        """The node whose host has it."""
        return None if self._host is None else self._host.node_id

    # --- what can be done

    def run(self, code: str, *, checkpoint: bool | None = None) -> ExecutionResult:
        """Run a block, as :meth:`midstream.sandbox.Session.run`. A host that is lost meanwhile is replaced: the earlier
        blocks are run again elsewhere, and then this one, with the tool results that it has had already."""
        return self._drive(self._run(code, checkpoint))

    async def run_async(self, code: str, *, checkpoint: bool | None = None) -> ExecutionResult:
        """The same on the running asyncio loop. Cancelled, it ends the interpreter; the next block rebuilds it."""
        return await self._drive_async(self._run(code, checkpoint))

    def put(self, path: str | os.PathLike[str], data: bytes | bytearray | memoryview) -> None:
        """As :meth:`midstream.sandbox.Session.put`."""
        self._drive(self._put(path, data))

    async def put_async(self, path: str | os.PathLike[str], data: bytes | bytearray | memoryview) -> None:
        """The same for asyncio."""
        await self._drive_async(self._put(path, data))

    def get(self, path: str | os.PathLike[str]) -> bytes:
        """As :meth:`midstream.sandbox.Session.get`."""
        return self._drive(self._get(path))

    async def get_async(self, path: str | os.PathLike[str]) -> bytes:
        """The same for asyncio."""
        return await self._drive_async(self._get(path))

    def fork(self, n: int = 1) -> list[RaySession]:
        """As :meth:`midstream.sandbox.Session.fork`; the copies are on the same host."""
        return self._drive(self._fork(n))

    async def fork_async(self, n: int = 1) -> list[RaySession]:
        """The same for asyncio."""
        return await self._drive_async(self._fork(n))

    def close(self) -> None:
        """End the interpreter, whatever it does. May be called twice."""
        self._closed = True
        self._leave()
        self._pool.open_sessions.remove(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self._leave()

    # --- the work, written once

    def _run(self, code: str, checkpoint: bool | None) -> _Steps[ExecutionResult]:
        if not isinstance(code, str):
            raise ConfigurationError(f"code={code!r}: must be a string")
        told = AnsweredCalls()

        def order(number: int) -> Order:
            told.place = 0
            return Run(number, self._name, code, checkpoint, self._beside, self._context)

        result: ExecutionResult = yield from self._carried_out(order, told)
        ended = result.state_lost or result.rolled_back
        if not (ended and result.error is not None and result.error.type == "Killed"):
            self._past.append(PastBlock.of(code, result))
        if isinstance(self._call_tool, RowTools) and self._beside is not None:
            made = result.tool_calls[: self._pool.limits.tool_calls]  # the code was refused those beyond
            self._call_tool.tell(call for call in made if call.name in self._beside.names)
        self._pool.observers(SessionRan(result))
        return result

    def _put(self, path: str | os.PathLike[str], data: bytes | bytearray | memoryview) -> _Steps[None]:
        name, content = checked_path(path), checked_data(data, self._pool.limits)
        yield from self._carried_out(lambda number: Put(number, self._name, name, content))
        self._past.append(PastBlock.of_file(name, content))

    def _get(self, path: str | os.PathLike[str]) -> _Steps[bytes]:
        name = checked_path(path)
        data: bytes = yield from self._carried_out(lambda number: Get(number, self._name, name))
        return data

    def _fork(self, n: int) -> _Steps[list[RaySession]]:
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ConfigurationError(f"n={n!r}: must be an integer of at least 1")
        names: list[str] = []
        host: Host | None = None

        def order(number: int) -> Order:
            nonlocal host
            host, names[:] = self._host, [secrets.token_hex(8) for _ in range(n)]
            return Fork(number, self._name, tuple(names))

        try:
            yield from self._carried_out(order)
        except BaseException:  # also where nobody waits for the copies any more
            if host is not None:
                host.order([Close(name) for name in names], None)
            raise
        copies = []
        if self._host is not None:
            self._pool.join(self._host, n)
        for name in names:
            copy = RaySession(self._pool, tools=self.tools, call_tool=self._call_tool, seed=self.seed, past=self._past)
            assert self._host is not None
            copy._host, copy._name, copy._had_interpreter = self._host, name, True
            self._pool.open_sessions.add(copy)
            copies.append(copy)
        return copies

    def _carried_out(self, order_of: Callable[[int], Order], told: AnsweredCalls | None = None) -> _Steps[Any]:
        """What comes of an order; given again, to another host, where one is lost on the way."""
        for _ in range(MOVES):
            number = next(_NUMBERS)
            host = self._host
            if host is None or host.lost:
                self._forget()
                host = yield _Place()
                self._host, self._name = host, secrets.token_hex(8)
                self._pool.open_sessions.add(self)
                opening = [Open(next(_NUMBERS), self._name, self.tools, self.seed, tuple(self._past))]
            else:
                opening = []
            assert host is not None
            expected = {number, *(order.number for order in opening)}
            host.order([*opening, order_of(number)], self._post)
            while True:
                news: News = yield _Wait()
                if news.number not in expected:
                    continue  # a host that was lost says so of each of its orders
                if isinstance(news, Done | Failed):
                    self._tell(news.observed)
                if isinstance(news, Asked):
                    yield from self._answer(news, told or AnsweredCalls())
                elif isinstance(news, Done):
                    if news.number == number:
                        return news.value
                elif isinstance(news, Failed):
                    if news.number != number:
                        self._leave()
                    raise news.error
                else:
                    break
            self._forget()
        raise SandboxError(f"the hosts of a session were lost {MOVES} times in a row while it ran one block")

    def _tell(self, observed: Sequence[Observation]) -> None:
        """What a host has seen; it cannot know of an interpreter that was elsewhere."""
        for observation in observed:
            if isinstance(observation, InterpreterStarted):
                observation = replace(observation, replacement=observation.replacement or self._had_interpreter)
                self._had_interpreter = True
            self._pool.observers(observation)

    def _answer(self, asked: Asked, told: AnsweredCalls) -> _Steps[None]:
        answer = told.known(asked)
        if answer is None:
            try:
                arguments = [from_json(value) for value in asked.arguments]
                named = {key: from_json(value) for key, value in asked.keyword_arguments.items()}
            except CrossingError as error:
                answer = ToolAnswer(error=ExecutionError("TypeError", f"arguments that cannot be read: {error}"))
            else:
                answer = yield ToolRequest(asked.name, arguments, named)
            if answer is None:
                return
            told.learn(asked, answer)
        if self._host is not None:
            self._host.order([Answer(asked.call, answer)], self._post)

    # --- where it is

    def _forget(self) -> None:
        host, self._host = self._host, None
        if host is not None:
            self._pool.leave(host)

    def _leave(self) -> None:
        host = self._host
        if host is not None:
            host.order([Close(self._name)], None)
            self._forget()

    # --- two drivers

    def _begin_turn(self) -> None:
        if self._closed:
            raise ProtocolError("the session is closed")
        if not self._busy.acquire(blocking=False):
            raise ProtocolError("the session runs another block")

    def _drive(self, steps: _Steps[_T]) -> _T:
        self._begin_turn()
        news: queue.SimpleQueue[News] = queue.SimpleQueue()
        self._post: Callable[[News], None] = news.put
        try:
            step = next(steps)
            while True:
                if isinstance(step, _Place):
                    step = steps.send(self._pool.place())
                elif isinstance(step, _Wait):
                    step = steps.send(news.get())
                else:
                    step = steps.send(answered(self._call_tool, step, self._pool.limits.tool_time))
        except StopIteration as end:
            value: _T = end.value
            return value
        except BaseException as error:
            self._recover(error)  # first: a session that is still being copied must not be when its copies are closed
            steps.close()
            raise
        finally:
            self._busy.release()

    async def _drive_async(self, steps: _Steps[_T]) -> _T:
        self._begin_turn()
        news: asyncio.Queue[News] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        self._post = lambda item: _post(loop, news, item)
        try:
            step = next(steps)
            while True:
                if isinstance(step, _Place):
                    step = steps.send(await self._pool.place_async())
                elif isinstance(step, _Wait):
                    step = steps.send(await news.get())
                else:
                    step = steps.send(await answered_async(self._call_tool, step, self._pool.limits.tool_time))
        except StopIteration as end:
            value: _T = end.value
            return value
        except BaseException as error:
            self._recover(error)  # first: a session that is still being copied must not be when its copies are closed
            steps.close()
            raise
        finally:
            self._busy.release()

    def _recover(self, error: BaseException) -> None:
        """After a fault that left a block running, the interpreter is given up; the next block rebuilds it."""
        if not isinstance(error, OSError | ConfigurationError):
            self._leave()


def _post(loop: asyncio.AbstractEventLoop, news: asyncio.Queue[News], item: News) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(news.put_nowait, item)
