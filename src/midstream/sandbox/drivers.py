"""Move the bytes of a conversation: one driver that blocks, one for asyncio, the same rules in both."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import logging
import select
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from midstream.crossing import CrossingError, describe_exception, from_json, to_json
from midstream.crossing.texts import TooLarge
from midstream.crossing.values import MAXIMUM_BYTES
from midstream.errors import MidstreamError, SandboxError, SandboxProtocolError
from midstream.sandbox.conversation import Alarm, Conversation, Ending, Event, Finished, StaleFrame, ToolRequested
from midstream.sandbox.meter import Meter
from midstream.sandbox.process import SessionProcess
from midstream.types import ExecutionError, ToolAnswer

_T = TypeVar("_T")

CallTool = Callable[[str, list[Any], dict[str, Any]], Any]
"""``call_tool(name, arguments, keyword_arguments)``: the value, or (for the async driver) an awaitable of it."""

Answer = Callable[[ToolRequested], "Answered | None"]
"""Answers a request from a record; None where the tool itself is to be called."""

_log = logging.getLogger(__name__)

_READ_BYTES = 1 << 16
_SMALL_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Answered:
    """What a tool gave: a value in JSON, or an exception's type and message.

    ``breached``: the limit that it comes from. The rest is as in :class:`~midstream.types.ToolAnswer`.
    """

    value: Any = None
    error: ExecutionError | None = None
    breached: str | None = None
    cached: bool = False
    batched: int = 1

    @classmethod
    def by(cls, name: str, given: Any) -> Answered:
        """From what ``call_tool`` returned."""
        if isinstance(given, ToolAnswer):
            return cls(given.value, given.error, cached=given.cached, batched=given.batched)
        try:
            return cls(to_json(given))
        except CrossingError as error:
            return cls(error=ExecutionError("TypeError", f"{name}() returned what cannot be passed on: {error}"))

    @classmethod
    def unreadable(cls, name: str, error: CrossingError) -> Answered:
        return cls(error=ExecutionError("TypeError", f"the arguments of {name}() cannot be read: {error}"))

    def deliver(self, conversation: Conversation, now: float) -> bytes:
        error = self.error
        if error is not None:
            return conversation.fail(error.type, error.message, now, self.breached, error.base, self.batched)
        return conversation.answer(self.value, now, self.cached, self.batched)


class _Exchange:
    """What the two drivers share: bytes still to be sent, and what events and alarms mean."""

    def __init__(self, process: SessionProcess, conversation: Conversation) -> None:
        self.process = process
        self.conversation = conversation
        self.outgoing = process.unsent + conversation.opening()
        process.unsent = b""
        self.meter = Meter(process.processor_time, conversation.cpu_time_left, conversation.now)
        self.quota = process.quota if conversation.code else None
        if self.quota is not None:
            self.quota.begin(conversation.now)

    def send(self) -> None:
        try:
            while self.outgoing:
                self.outgoing = self.outgoing[self.process.channel.send(self.outgoing) :]
        except BlockingIOError:
            pass
        except OSError:
            self.outgoing = b""  # the interpreter is gone; reading tells how

    def receive(self) -> Event | None:
        try:
            data = self.process.channel.recv(_READ_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        if not data:
            return self.conversation.end_of_stream()
        try:
            event = self.conversation.receive(data, time.monotonic())
        except SandboxProtocolError as error:
            _log.warning("session %d was killed, for it sent %s", self.process.number, error)
            self.process.kill()
            return Finished(Ending.VIOLATION, stale=isinstance(error, StaleFrame))
        if isinstance(event, Finished):
            self.conversation.took(self.meter.spent())
            return self._within_quota(event)
        return event

    def _within_quota(self, finished: Finished) -> Finished:
        if self.quota is None or finished.ending is Ending.PAUSED:
            return finished
        limit, stubborn = self.quota.end()
        self.conversation.over_quota = limit
        if stubborn:
            self.process.kill()
            return Finished(Ending.KILLED, breached=limit)
        return finished

    def ring(self) -> Finished | None:
        """Do what is due. The conversation's end, if that is what is due."""
        now = self._look_at_meter()
        limit = None if self.quota is None else self.quota.look_if_due(now)
        if limit is not None:
            self.conversation.exceed_quota(limit, now)
        due = self.conversation.alarm(now)
        for_cpu_time = self.conversation.exhausted == "block_cpu_time"
        if due is Alarm.INTERRUPT:
            self.process.interrupt(signal.SIGXCPU if for_cpu_time else signal.SIGINT)
        elif due is Alarm.KILL:
            self.conversation.took(self.meter.spent())
            self.process.kill()
            return Finished(Ending.KILLED, breached=self.conversation.exhausted)
        return None

    def deliver(self, answered: Answered) -> None:
        """Give the code what its tool gave."""
        now = self._look_at_meter()
        self.outgoing += answered.deliver(self.conversation, now)
        self.send()

    def _look_at_meter(self) -> float:
        now = time.monotonic()
        if self.meter.exhausted(now):
            self.conversation.exhaust_cpu_time(now)
        return now

    def wait_milliseconds(self) -> float | None:
        due = [self.conversation.deadline, self.meter.next_look, None if self.quota is None else self.quota.next_look]
        first = min((moment for moment in due if moment is not None), default=None)
        return None if first is None else max(0.0, first - time.monotonic()) * 1000 + 1

    def over_budget(self) -> Answered | None:
        most = self.conversation.limits.tool_calls
        if len(self.conversation.tool_calls) >= most:
            message = f"a block may call tools at most {most} times"
            return Answered(error=ExecutionError("RuntimeError", message), breached="tool_calls")
        return None

    def too_slow(self, request: ToolRequested) -> Answered:
        seconds = self.conversation.limits.tool_time
        message = f"{request.name}() gave no answer within {seconds:g} seconds"
        return Answered(error=ExecutionError("TimeoutError", message), breached="tool_time")


def converse(process: SessionProcess, conversation: Conversation, recorded: Answer, call_tool: CallTool) -> Finished:
    """Run a block to its end. Whatever is raised here, the session's process is dead then."""
    exchange = _Exchange(process, conversation)
    try:
        exchange.send()
        while True:
            if exchange.outgoing:
                process.poll.modify(process.channel, select.POLLIN | select.POLLOUT)
                ready = process.poll.poll(exchange.wait_milliseconds())
                process.poll.modify(process.channel, select.POLLIN)
                exchange.send()
            else:
                ready = process.poll.poll(exchange.wait_milliseconds())
            event = exchange.receive() if ready else None
            if isinstance(event, ToolRequested):
                answered = exchange.over_budget() or recorded(event) or _call(exchange, event, call_tool)
                exchange.deliver(answered)
                continue
            finished = event or exchange.ring()
            if finished is not None:
                return finished
    except BaseException:
        process.kill()
        raise


def _call(exchange: _Exchange, request: ToolRequested, call_tool: CallTool) -> Answered:
    seconds = exchange.conversation.limits.tool_time
    return in_time(seconds, request.name, lambda: _outcome(call_tool, request)) or exchange.too_slow(request)


def in_time(seconds: float | None, name: str, work: Callable[[], _T]) -> _T | None:
    """What the work for a tool gives; None where that takes longer than so many seconds.

    It is done in a thread of its own where its time is bounded, since nothing else could end the wait. Raises
    SandboxError where there is no such thread to be had.
    """
    if seconds is None:
        return work()
    outcome: list[Callable[[], _T]] = []

    def do() -> None:
        try:
            given = work()
        except BaseException as error:  # noqa: BLE001  # raised again where the caller waits
            outcome.append(functools.partial(_raise, error))
        else:
            outcome.append(lambda: given)

    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(do,), name=f"tool {name}", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise _not_started(name, error) from error
    thread.join(seconds)
    return outcome[0]() if outcome else None


def _raise(error: BaseException) -> NoReturn:
    raise error


async def _in_thread(name: str, function: Callable[..., _T], *arguments: Any) -> _T:
    """What the function for a tool gives, called in a thread of the loop's. Raises SandboxError where that cannot be.

    So that "cannot start new thread", or an executor that was shut down, is not taken for what a tool raised.
    """
    work = functools.partial(contextvars.copy_context().run, function, *arguments)
    try:
        future = asyncio.get_running_loop().run_in_executor(None, work)
    except RuntimeError as error:
        raise _not_started(name, error) from error
    return await future


def _not_started(name: str, error: RuntimeError) -> SandboxError:
    return SandboxError(f"the call of {name}() could not be given a thread: {error}")


def _values(request: ToolRequested, maximum_bytes: int = MAXIMUM_BYTES) -> tuple[list[Any], dict[str, Any]]:
    keywords = request.keyword_arguments
    arguments, values = from_json([request.arguments, list(keywords.values())], maximum_bytes=maximum_bytes)
    return arguments, dict(zip(keywords, values, strict=True))


def _outcome(call_tool: CallTool, request: ToolRequested) -> Answered:
    try:
        arguments, keywords = _values(request)
    except CrossingError as error:
        return Answered.unreadable(request.name, error)
    try:
        return Answered.by(request.name, call_tool(request.name, arguments, keywords))
    except MidstreamError:
        raise  # not the code's doing, nor the tool's
    except Exception as error:  # noqa: BLE001  # a tool's exception is the code's to handle
        return Answered(error=describe_exception(error))


async def converse_async(
    process: SessionProcess, conversation: Conversation, recorded: Answer, call_tool: CallTool
) -> Finished:
    """The same on the running asyncio loop, without a thread of its own."""
    exchange = _Exchange(process, conversation)
    loop = asyncio.get_running_loop()
    descriptor = process.channel.fileno()
    try:
        exchange.send()
        while True:
            event = await _next_event(exchange, loop, descriptor)
            if isinstance(event, Finished):
                return event
            answered = exchange.over_budget() or recorded(event) or await _call_async(exchange, event, call_tool)
            exchange.deliver(answered)
    except BaseException:
        process.kill()
        raise


async def _next_event(exchange: _Exchange, loop: asyncio.AbstractEventLoop, descriptor: int) -> Event:
    done: asyncio.Future[Event] = loop.create_future()
    timer: asyncio.TimerHandle | None = None

    def settle(event: Event | None) -> None:
        if event is not None and not done.done():
            done.set_result(event)

    def readable() -> None:
        if not done.done():
            settle(exchange.receive())

    def writable() -> None:
        exchange.send()
        if not exchange.outgoing:
            loop.remove_writer(descriptor)

    def ring() -> None:
        settle(exchange.ring())
        set_timer()

    def set_timer() -> None:
        nonlocal timer
        wait = exchange.wait_milliseconds()
        timer = None if wait is None or done.done() else loop.call_later(wait / 1000, ring)

    set_timer()
    loop.add_reader(descriptor, readable)
    unsent = bool(exchange.outgoing)
    if unsent:
        loop.add_writer(descriptor, writable)
    try:
        return await done
    finally:
        loop.remove_reader(descriptor)
        if unsent:
            loop.remove_writer(descriptor)
        if timer is not None:
            timer.cancel()


async def _call_async(exchange: _Exchange, request: ToolRequested, call_tool: CallTool) -> Answered:
    seconds = exchange.conversation.limits.tool_time
    try:
        async with asyncio.timeout(seconds) as limit:
            return await _outcome_async(call_tool, request)
    except TimeoutError:
        if not limit.expired():
            raise
        return exchange.too_slow(request)


async def _outcome_async(call_tool: CallTool, request: ToolRequested) -> Answered:
    try:
        try:
            arguments, keywords = _values(request, _SMALL_BYTES)
        except TooLarge:  # unpacking it would hold up all other sessions
            arguments, keywords = await _in_thread(request.name, _values, request)
    except CrossingError as error:
        return Answered.unreadable(request.name, error)
    try:
        return Answered.by(request.name, await called(call_tool, request.name, arguments, keywords))
    except MidstreamError:
        raise
    except Exception as error:  # noqa: BLE001  # as above
        return Answered(error=describe_exception(error))


async def called(call_tool: CallTool, name: str, arguments: list[Any], keyword_arguments: dict[str, Any]) -> Any:
    """What a tool gives, called in a thread unless it is a coroutine function.

    Raises SandboxError where it could not be called.
    """
    if any(map(inspect.iscoroutinefunction, (call_tool, type(call_tool).__call__))):
        return await call_tool(name, arguments, keyword_arguments)
    value = await _in_thread(name, call_tool, name, arguments, keyword_arguments)
    return await value if isinstance(value, Awaitable) else value
