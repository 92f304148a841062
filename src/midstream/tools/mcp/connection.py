"""A connection to one MCP server, kept by a thread of its own and made again when the server is gone.

The client library wants a connection closed by the task that opened it, on one event loop. Tools are called from
many loops and threads, so each connection has a loop in a thread, and calls are handed to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from midstream.errors import ConfigurationError, ProtocolError

logger = logging.getLogger(__name__)

Value = TypeVar("Value")
Connect = Callable[["Said", Callable[[], None]], contextlib.AbstractAsyncContextManager[Any]]
"""Opens a client, given where the server's error output goes and what to call when the server has ended."""


_TRIES = 2
"""How often one call is made of a server that refuses it unread, each time over a new connection."""

_SECONDS_TO_READ = 1.0


class Connection:
    """``connect`` opens a client; it is called again when the server was lost. ``name`` is for messages."""

    def __init__(self, name: str, connect: Connect, start_timeout: float) -> None:
        self.name = name
        self._connect = connect
        self._start_timeout = start_timeout
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"midstream-mcp-{name}", daemon=True)
        self._thread.start()
        self._opening = asyncio.Lock()
        self._said = Said(name)
        self._client: asyncio.Future[Any] | None = None
        self._leave = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def run(self, work: Coroutine[Any, Any, Value]) -> Value:
        """The value of ``work``, run on the connection's loop. For threads that have no loop of their own."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def list_tools(self) -> list[Any]:
        """All tools of the server, on the connection's loop.

        Raises ConfigurationError where it cannot be reached, or does not tell its tools, within ``start_timeout``.
        """
        began = self._loop.time()
        client = await self._connected()
        tools, cursor = [], None
        try:
            async with asyncio.timeout_at(began + self._start_timeout):
                while True:
                    page = await client.list_tools(cursor=cursor)
                    tools += page.tools
                    cursor = page.next_cursor
                    if cursor is None:
                        return tools
        except Exception as error:
            why = "no answer in time" if isinstance(error, TimeoutError) else _innermost(error)
            raise ConfigurationError(
                f"MCP server {self.name!r}: does not tell its tools ({why}){self._said.tail()}"
            ) from error

    async def call(self, tool: str, arguments: Mapping[str, Any]) -> Any:
        """The server's answer to one call, from any event loop.

        Raises ConnectionError where the server is gone: a call that it may have begun is not made again, the
        next one finds a new connection. It says no more than that, since a model may read it; why is logged.
        Raises ProtocolError once closed.
        """
        self._check_open()
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._call(tool, arguments), self._loop))

    def close(self) -> None:
        """End the connection, the server if it is a process of ours, and the thread. Twice is once."""
        if self._closed:
            return
        self._closed = True
        self.run(self._left())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _call(self, tool: str, arguments: Mapping[str, Any]) -> Any:
        from mcp import MCPError

        for _ in range(_TRIES):
            try:
                client = await self._connected()
            except ConfigurationError as error:
                self._check_open()
                logger.warning("%s", error)
                break
            try:
                return await client.call_tool(tool, dict(arguments))
            except MCPError as error:
                if _is_session_unknown(error):
                    # The server began anew and refused the call unread: it is safe to make it again.
                    self._lost(client)
                    continue
                if error.code != _connection_closed():
                    raise
            except Exception as error:
                if not _is_transport_fault(error):
                    raise
                logger.warning("the MCP server %r went away during a call: %s", self.name, _innermost(error))
            self._lost(client)
            self._check_open()
            raise ConnectionError(f"the MCP server {self.name!r} went away during the call")
        raise ConnectionError(f"the MCP server {self.name!r} cannot be reached")

    def _check_open(self) -> None:
        if self._closed:
            raise ProtocolError(f"the MCP server {self.name!r} is closed")

    async def _connected(self) -> Any:
        async with self._opening:
            if self._leave.is_set() and self._task is not None:
                await asyncio.shield(self._task)
            if self._task is None or self._task.done():
                self._leave.clear()
                self._said = Said(self.name)
                self._client = self._loop.create_future()
                self._task = self._loop.create_task(self._keep(self._client, self._said))
            opened = self._client
        assert opened is not None
        return await asyncio.shield(opened)

    async def _keep(self, opened: asyncio.Future[Any], said: Said) -> None:
        """Open the client, keep it until it is to leave, close it: all in one task, as the library asks."""
        try:
            async with said, contextlib.AsyncExitStack() as stack:
                async with asyncio.timeout(self._start_timeout):
                    client = await stack.enter_async_context(self._connect(said, self._leave.set))
                opened.set_result(client)
                await self._leave.wait()
        except asyncio.CancelledError:
            opened.set_exception(ConfigurationError(f"MCP server {self.name!r}: closed while it was being reached"))
        except Exception as error:  # noqa: BLE001  # whatever a transport fails with is told, in one form
            if opened.done():
                logger.warning("the connection to the MCP server %r ended badly: %r", self.name, error)
                return
            why = "no answer in time" if isinstance(error, TimeoutError) else _innermost(error)
            opened.set_exception(
                ConfigurationError(f"MCP server {self.name!r}: cannot be reached ({why}){said.tail()}")
            )

    def _lost(self, client: Any) -> None:
        """Let go of ``client``, unless another call has done so already."""
        opened = self._client
        if opened is not None and opened.done() and not opened.exception() and opened.result() is client:
            self._leave.set()

    async def _left(self) -> None:
        self._leave.set()
        if self._task is not None:
            if self._client is not None and not self._client.done():
                self._task.cancel()
            await asyncio.wait([self._task])


class Said:
    """What a server's process writes to its error output: logged line by line, the last lines kept for a message."""

    KEPT = 10

    def __init__(self, name: str) -> None:
        self._logger = logger.getChild(name)
        self._lines: deque[str] = deque(maxlen=self.KEPT)
        self._transport: asyncio.ReadTransport | None = None
        self._write_end: Any = None

    async def __aenter__(self) -> Said:
        read, write = os.pipe()
        self._write_end = os.fdopen(write, "w")
        reader = asyncio.StreamReader(limit=2**16)
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read, "rb")
        )
        self._reading = loop.create_task(self._read(reader))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._write_end.close()
        # What a process said last, it said to explain its end. One that it left behind may hold the other end open.
        await asyncio.wait([self._reading], timeout=_SECONDS_TO_READ)
        assert self._transport is not None
        self._transport.close()
        self._reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reading

    @property
    def file(self) -> Any:
        """The file that a process is given as its error output."""
        return self._write_end

    def tail(self) -> str:
        return "".join(f"\n  {line}" for line in self._lines)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        async for line in _lines(reader):
            self._lines.append(line)
            self._logger.info("%s", line)


async def _lines(reader: asyncio.StreamReader) -> AsyncIterator[str]:
    while data := await reader.read(2**14):
        for line in data.decode(errors="replace").splitlines():
            if line.strip():
                yield line.rstrip()


def _is_session_unknown(error: Any) -> bool:
    """Whether a server over HTTP says that it has never heard of this session: it was started again."""
    from mcp.types import INVALID_REQUEST

    return error.code == INVALID_REQUEST and str(error).lower() in ("session terminated", "session not found")


def _connection_closed() -> int:
    from mcp.types import CONNECTION_CLOSED

    return CONNECTION_CLOSED


def _is_transport_fault(error: BaseException) -> bool:
    """Whether the way to the server broke, rather than the server having said no."""
    import anyio
    import httpx2

    if isinstance(error, BaseExceptionGroup):
        return all(_is_transport_fault(each) for each in error.exceptions)
    return isinstance(
        error, anyio.ClosedResourceError | anyio.BrokenResourceError | httpx2.TransportError | ConnectionError
    )


def _innermost(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"
