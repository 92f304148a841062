"""Requests of an ``AsyncLLM``, which runs by itself: an event loop follows them, and steps collect what came."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from midstream.engines.vllm.rows import Delta, TokenInput
from midstream.errors import EngineError, ProtocolError

PATIENCE = 0.05
"""Seconds that a step waits for something to come."""

_RESET_TRIES = 100
_T = TypeVar("_T")
_Input = tuple[TokenInput, Any]


class LoopLink:
    """``AsyncLLM`` belongs to the event loop in which it serves first: a running one, or one of this link's own.

    ``make`` gives the ``AsyncLLM``; called in the loop, where it is to be shut down with the link (``owned``).
    """

    def __init__(self, make: Callable[[], Any], *, owned: bool, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._owned = owned
        self._thread: threading.Thread | None = None
        if loop is None:
            loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=loop.run_forever, name="midstream-vllm", daemon=True)
            self._thread.start()
        self._loop = loop
        self._deltas: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._inputs: dict[str, asyncio.Queue[_Input]] = {}
        self._closed = False
        try:
            self.llm = self._within(_called(make)) if owned else make()
        except BaseException:
            self._stop_loop()
            raise

    @property
    def unfinished(self) -> int:
        """Requests that vLLM still has, those of others included."""
        self._settle()
        return int(self.llm.output_processor.get_num_unfinished_requests())

    def submit(self, request: str, prompt: TokenInput, params: Any) -> None:
        self._loop.call_soon_threadsafe(self._start, request, prompt, params)

    def open_session(self, request: str, prompt: TokenInput, params: Any) -> None:
        """A request that takes further inputs (:meth:`feed`) when a turn of it is over."""
        self._loop.call_soon_threadsafe(self._start_session, request, prompt, params)

    def feed(self, request: str, prompt: TokenInput, params: Any) -> None:
        self._loop.call_soon_threadsafe(self._put, request, (prompt, params))

    def poll(self) -> list[Delta]:
        """What has come, as one delta for each request: a row that is told to hold takes no second one."""
        merged: dict[str, Delta] = {}
        with suppress(queue.Empty):
            delta = self._deltas.get(timeout=PATIENCE)
            while True:
                earlier = merged.get(delta.request)
                merged[delta.request] = delta if earlier is None else earlier.then(delta)
                delta = self._deltas.get_nowait()
        return list(merged.values())

    def abort(self, request: str) -> None:
        self._loop.call_soon_threadsafe(self._cancel, request)

    def reset_cache(self) -> None:
        self._settle()
        for _ in range(_RESET_TRIES):
            if self._within(self.llm.reset_prefix_cache()):
                return
            time.sleep(0.02)  # blocks of requests that have just ended may be given back a step later
        raise EngineError("vLLM could not reset its prefix cache: requests of others hold blocks of it")

    def shutdown(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            for request in list(self._tasks):
                self.abort(request)
            if not self._here():
                self._settle()
            if self._owned:
                self._within(_called(self.llm.shutdown))
        finally:
            self._stop_loop()

    # --- in the loop

    def _start(self, request: str, prompt: Any, params: Any) -> None:
        task = self._loop.create_task(self._follow(request, prompt, params))
        self._tasks[request] = task
        task.add_done_callback(lambda _: self._forget(request))

    def _start_session(self, request: str, prompt: TokenInput, params: Any) -> None:
        self._inputs[request] = asyncio.Queue()
        self._put(request, (prompt, params))
        self._start(request, self._session(self._inputs[request]), params)

    def _put(self, request: str, item: _Input) -> None:
        inputs = self._inputs.get(request)
        if inputs is not None:  # else the session has failed meanwhile, and said so
            inputs.put_nowait(item)

    async def _session(self, inputs: asyncio.Queue[_Input]) -> AsyncGenerator[Any, None]:
        from vllm.engine.protocol import StreamingInput

        while True:
            prompt, params = await inputs.get()
            yield StreamingInput(prompt=prompt, sampling_params=params)

    async def _follow(self, request: str, prompt: Any, params: Any) -> None:
        try:
            async with aclosing(self.llm.generate(prompt, params, request)) as outputs:
                async for output in outputs:
                    self._deltas.put(Delta.of(output))
        except Exception as error:  # noqa: BLE001  # the row is told, whatever it was
            cause = error.__cause__ or error
            self._deltas.put(Delta(request, error=f"{type(cause).__name__}: {cause}"))

    def _forget(self, request: str) -> None:
        self._tasks.pop(request, None)
        self._inputs.pop(request, None)

    def _cancel(self, request: str) -> None:
        task = self._tasks.get(request)
        if task is not None:
            task.cancel()

    # --- between the threads

    def _settle(self) -> None:
        """Wait until the requests that were given up have left vLLM."""

        async def gone() -> None:
            ending = [task for task in self._tasks.values() if task.cancelling()]
            await asyncio.gather(*ending, return_exceptions=True)

        self._within(gone())

    def _within(self, work: Coroutine[Any, Any, _T]) -> _T:
        if self._here():
            work.close()
            raise ProtocolError("called on the event loop that vLLM runs on, it would wait for itself")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _here(self) -> bool:
        try:
            return asyncio.get_running_loop() is self._loop
        except RuntimeError:
            return False

    def _stop_loop(self) -> None:
        if self._thread is None:
            return
        self._within(_cancel_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _called(function: Callable[[], _T]) -> _T:
    return function()


async def _cancel_all() -> None:
    """What vLLM itself has left running in the loop."""
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
