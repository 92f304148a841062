"""The server as a process: its socket, its signals, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from starlette.types import ASGIApp

from midstream.errors import ConfigurationError
from midstream.serve.service import Service

logger = logging.getLogger(__name__)

_CONNECTIONS_WITHIN = 5
"""Seconds that connections may take to close once every answer is given."""


class _Server(uvicorn.Server):
    """uvicorn's, which leaves signals to us: a first one drains, and it knows nothing of that."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bound_socket(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 is any that is free. Raises :class:`~midstream.errors.ConfigurationError`."""
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
        except BaseException:
            listening.close()
            raise
    except OSError as error:
        raise ConfigurationError(f"host={host!r}, port={port}: cannot be listened at ({error.strerror})") from error
    return listening


def address_of(listening: socket.socket) -> str:
    """What clients call it."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if listening.family is socket.AF_INET6 else f"http://{host}:{port}"


async def run(
    app: ASGIApp, service: Service, listening: socket.socket, *, grace: float, ready: Callable[[], object]
) -> None:
    """Serve until SIGTERM or SIGINT comes. Then no more is taken, and what is under way may take ``grace`` seconds.

    A second signal cuts that short. ``ready`` is called once requests are taken.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        http="h11",
        loop="asyncio",
        lifespan="off",
        timeout_graceful_shutdown=_CONNECTIONS_WITHIN,
    )
    server = _Server(config)
    signals = 0
    stopping, hurrying = asyncio.Event(), asyncio.Event()

    def stop() -> None:
        nonlocal signals
        signals += 1
        (stopping if signals == 1 else hurrying).set()

    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, stop)
    serving = asyncio.create_task(server.serve([listening]))
    try:
        while not (server.started or serving.done()):
            await asyncio.sleep(0.01)
        if not serving.done():
            ready()
        stopped = asyncio.create_task(stopping.wait())
        await asyncio.wait([serving, stopped], return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        logger.info("stopping: %d rows are under way", service.admission.rows)
        await _drained(service, grace, hurrying)
    finally:
        server.should_exit = True
        await serving
        for number in numbers:
            loop.remove_signal_handler(number)


async def _drained(service: Service, grace: float, hurrying: asyncio.Event) -> None:
    draining = asyncio.create_task(service.drain(grace))
    hurried = asyncio.create_task(hurrying.wait())
    await asyncio.wait([draining, hurried], return_when=asyncio.FIRST_COMPLETED)
    hurried.cancel()
    if not draining.done():
        draining.cancel()
        await asyncio.gather(draining, return_exceptions=True)
        await service.drain(0.0)
