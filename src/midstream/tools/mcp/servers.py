"""The ways to an MCP server: a program that speaks over its standard streams, an address, an object in this process."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from midstream.errors import ConfigurationError
from midstream.tools.mcp.connection import Connect, Said

_PROGRAM = {"command", "args", "env", "cwd"}
_ADDRESS = {"url", "headers"}


def way_to(server: Any) -> tuple[str, Connect]:
    """A name for ``server``, and how a client for it is opened.

    Raises ConfigurationError for what names no server, before anything is started.
    """
    try:
        import mcp
        from mcp.server import MCPServer, Server
    except ImportError as error:
        raise ConfigurationError("tools of MCP servers need mcp: pip install 'midstream[mcp]'") from error
    if isinstance(server, str):
        server = {"url": server}
    elif isinstance(server, Sequence):
        server = {"command": server[0], "args": list(server[1:])} if server else {}
    if isinstance(server, Mapping):
        server = _described(server)
    if isinstance(server, mcp.StdioServerParameters):
        return _base_name(server.command), _program(server)
    if isinstance(server, MCPServer | Server):
        return server.name, _in_process(server)
    if isinstance(server, tuple):
        address, headers = server
        return urlsplit(address).netloc, _address(address, headers)
    raise ConfigurationError(
        f"server={server!r}: must be an address (http://…), a command as a list, a mapping with 'command' or 'url',"
        " StdioServerParameters or an MCPServer"
    )


def _described(server: Mapping[str, Any]) -> Any:
    """A mapping as the configuration files of MCP clients have it."""
    import mcp

    given = set(server)
    if "command" in given and given <= _PROGRAM:
        try:
            return mcp.StdioServerParameters(**server)
        except ValueError as error:
            raise ConfigurationError(f"server={dict(server)!r}: {error}") from error
    if "url" in given and given <= _ADDRESS:
        address = server["url"]
        if not isinstance(address, str) or urlsplit(address).scheme not in ("http", "https"):
            raise ConfigurationError(f"server url={address!r}: must begin with http:// or https://")
        return address, dict(server.get("headers") or {})
    unknown = sorted(given - _PROGRAM - _ADDRESS)
    what = f"unknown options {unknown}" if unknown else f"options {sorted(given)} do not go together"
    raise ConfigurationError(
        f"server: {what}; give {sorted(_PROGRAM)}, of which command is needed, or {sorted(_ADDRESS)}"
    )


def _base_name(command: str) -> str:
    return command.rsplit("/", 1)[-1]


def _in_process(server: Any) -> Connect:
    @contextlib.asynccontextmanager
    async def connect(_said: Said, _ended: Callable[[], None]) -> AsyncIterator[Any]:
        from mcp import Client

        async with Client(server) as client:
            yield client

    return connect


def _program(parameters: Any) -> Connect:
    @contextlib.asynccontextmanager
    async def connect(said: Said, ended: Callable[[], None]) -> AsyncIterator[Any]:
        from mcp import Client, stdio_client

        async with Client(_Watched(stdio_client(parameters, errlog=said.file), ended)) as client:
            yield client

    return connect


def _address(address: str, headers: dict[str, str]) -> Connect:
    @contextlib.asynccontextmanager
    async def connect(_said: Said, ended: Callable[[], None]) -> AsyncIterator[Any]:
        import httpx2
        from mcp import Client
        from mcp.client.streamable_http import streamable_http_client

        # Tools may take long: their deadline is the host's to keep, only the way to the server is timed here.
        timeout = httpx2.Timeout(None, connect=10.0, write=30.0)
        async with httpx2.AsyncClient(headers=headers, timeout=timeout, follow_redirects=True) as http:
            transport = streamable_http_client(address, http_client=http)
            async with Client(_Watched(transport, ended)) as client:
                yield client

    return connect


class _Watched:
    """A transport that tells when the server ends the conversation, so that no call is made into a dead one."""

    def __init__(self, transport: Any, ended: Callable[[], None]) -> None:
        self._transport = transport
        self._ended = ended

    async def __aenter__(self) -> tuple[Any, Any]:
        read, write = await self._transport.__aenter__()
        return _WatchedRead(read, self._ended), write

    async def __aexit__(self, *details: Any) -> Any:
        return await self._transport.__aexit__(*details)


class _WatchedRead:
    def __init__(self, read: Any, ended: Callable[[], None]) -> None:
        self._read = read
        self._ended = ended

    def __getattr__(self, name: str) -> Any:
        return getattr(self._read, name)

    def __aiter__(self) -> _WatchedRead:
        return self

    async def __anext__(self) -> Any:
        try:
            return await self._read.__anext__()
        except StopAsyncIteration:
            self._ended()
            raise

    async def __aenter__(self) -> _WatchedRead:
        await self._read.__aenter__()
        return self

    async def __aexit__(self, *details: Any) -> Any:
        return await self._read.__aexit__(*details)
