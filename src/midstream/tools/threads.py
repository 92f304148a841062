"""Threads for functions of the user's, which may take for ever and raise anything."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from midstream.errors import MidstreamError, ProtocolError

logger = logging.getLogger(__name__)


class CallThreads:
    """Runs functions in up to ``most`` threads, which start when they are needed and end with :meth:`close`.

    They are daemons: the interpreter's exit waits for every thread of a ``ThreadPoolExecutor``, so one call
    that never returns would keep the process from ending.
    """

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._idle: set[threading.Thread] = set()
        self._threads = 0
        self._closed = False

    def submit(self, function: Callable[[], Any]) -> Future[Any]:
        """Run ``function`` when a thread is free.

        Raises ProtocolError once closed, and MidstreamError where there is no thread and none can be started.
        What is raised here, or by the future itself, is no doing of ``function``'s, which is not called then.
        """
        future: Future[Any] = Future()
        with self._changed:
            if self._closed:
                raise self._is_closed()
            if len(self._waiting) >= len(self._idle) and self._threads < self._most:
                self._start_one()
            self._waiting.append((future, function))
            self._changed.notify()
        return future

    def close(self) -> None:
        """End the idle threads now and the others when their call returns; calls that wait fail with ProtocolError."""
        with self._changed:
            self._closed = True
            waiting = list(self._waiting)
            self._waiting.clear()
            idle = list(self._idle)
            self._changed.notify_all()
        for future, _ in waiting:
            if future.set_running_or_notify_cancel():
                # Not cancelled: who waits could not tell that from a cancellation of its own.
                future.set_exception(self._is_closed())
        for thread in idle:
            thread.join()

    def _is_closed(self) -> ProtocolError:
        return ProtocolError(f"{self._name}: closed")

    def _start_one(self) -> None:
        """One more thread; where the system has none to give, those that there are must do."""
        name = f"{self._name}-{self._threads + 1}"
        try:
            threading.Thread(target=self._serve, name=name, daemon=True).start()
        except (RuntimeError, MemoryError) as error:
            if not self._threads:
                raise MidstreamError(f"{self._name}: no thread could be started ({error})") from error
            logger.warning("%s could not be started (%s): calls wait for %d others", name, error, self._threads)
        else:
            self._threads += 1

    def _serve(self) -> None:
        this = threading.current_thread()
        while True:
            with self._changed:
                self._idle.add(this)
                while not self._waiting and not self._closed:
                    self._changed.wait()
                self._idle.discard(this)
                if not self._waiting:
                    return
                future, function = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                future.set_result(_outcome(function))
            del future, function  # else this thread keeps a call's values alive until its next one


def _outcome(function: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    try:
        return function(), None
    except BaseException as error:  # noqa: BLE001  # raised again by who asked
        return None, error


async def call(
    threads: CallThreads,
    function: Callable[..., Any],
    arguments: Sequence[Any] = (),
    keyword_arguments: Mapping[str, Any] | None = None,
) -> Any:
    """Call a function of the user's: on this event loop if it is async, else in one of ``threads``.

    Raises what it raises where that is an ``Exception``. What would end the event loop (``SystemExit``), could
    not cross a future (``StopIteration``) or would look like a cancellation from outside becomes a RuntimeError.
    Where it could not be called at all, raises what :meth:`CallThreads.submit` does.
    """
    keywords = keyword_arguments or {}
    try:
        if is_async(function):
            return await function(*arguments, **keywords)
        work = partial(contextvars.copy_context().run, partial(function, *arguments, **keywords))
        value, error = await asyncio.wrap_future(threads.submit(work))
        if isinstance(error, StopIteration):
            raise RuntimeError(f"it raised {error!r}") from error
        if error is not None:
            raise error
        return await value if inspect.isawaitable(value) else value
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise RuntimeError("it was cancelled") from None
    except (KeyboardInterrupt, SystemExit) as error:
        raise RuntimeError(f"it raised {error!r}") from error


def is_async(function: Any) -> bool:
    """Whether calling it gives a coroutine."""
    if inspect.iscoroutinefunction(function):
        return True
    return not isinstance(function, type) and inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004
