"""A service that listens, in a thread and an event loop of its own."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import uvicorn

from midstream import Generator
from midstream.serve import Service, application
from midstream.serve.running import address_of, bound_socket
from tests.rollouts import LONG


class Served:
    """``upstream``: the server behind it, for tests that look at that. ``options``: of the service."""

    def __init__(self, generator: Generator, upstream: Any = None, **options: Any) -> None:
        self.generator = generator
        self.upstream = upstream
        self.service: Service
        self.loop: asyncio.AbstractEventLoop
        self._listening = bound_socket("127.0.0.1", 0)
        self.url = address_of(self._listening)
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(options)), name="served")
        self._thread.start()
        assert self._started.wait(LONG)

    async def _serve(self, options: dict[str, Any]) -> None:
        self.loop = asyncio.get_running_loop()
        self.service = Service(self.generator, model="small", **options)
        config = uvicorn.Config(application(self.service), log_config=None, lifespan="off", ws="none", http="h11")
        self._server = uvicorn.Server(config)
        serving = asyncio.create_task(self._server.serve([self._listening]))
        while not self._server.started:
            await asyncio.sleep(0.01)
        self._started.set()
        await serving
        await self.service.drain(0.0)

    def within(self, work: Any) -> Any:
        """What a coroutine gives, run in the service's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(LONG)

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()
