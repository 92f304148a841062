"""The tools of MCP servers, as Python functions. https://modelcontextprotocol.io"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from midstream.errors import ConfigurationError
from midstream.tools.mcp.connection import Connection
from midstream.tools.mcp.results import McpToolError, value_of
from midstream.tools.mcp.schema import docstring, parameters, python_identifier
from midstream.tools.mcp.servers import way_to
from midstream.tools.tool import Tool, is_seconds

__all__ = ["McpToolError", "McpTools", "from_mcp"]


def from_mcp(
    server: Any,
    *,
    name: str | None = None,
    only: Collection[str] | None = None,
    prefix: str = "",
    start_timeout: float = 30.0,
    **options: Any,
) -> McpTools:
    """The tools of an MCP server: give the whole to a generator, ``tools=[from_mcp(...), another_tool]``.

    - ``server``: an address (``"http://localhost:8000/mcp"``, streamable HTTP); a command as a list, of a program
      that speaks over its standard streams; a mapping as MCP clients' configuration files have it (``command``,
      ``args``, ``env``, ``cwd``, or ``url``, ``headers``); or an ``MCPServer`` in this process.
    - ``name``: what the server is called in messages.
    - ``only``: take just these of its tools. ``prefix``: stands before each tool's name in Python.
    - ``start_timeout``: seconds that starting the server, reaching it, and hearing of its tools may take.
    - ``options``: of every :class:`~midstream.tools.Tool` (``deadline``, ``pure``, ``calls_per_row``, …).

    The server is started now, since only it knows its tools. A server that dies is started again at the next call.
    The generators that use the tools keep it; when the last of them is closed, it is stopped. Without one, use the
    tools in a ``with`` statement, or :meth:`McpTools.stop` them.

    A tool gives its structured content, or else its text (``str``) and its images (:class:`~midstream.types.Media`);
    what it reports as an error is raised as :class:`McpToolError`. Raises
    :class:`~midstream.errors.ConfigurationError` where the server cannot be reached, lacks a tool of ``only``, or an
    option cannot work.
    """
    known_as, connect = way_to(server)
    _check(name, only, prefix, start_timeout, options)
    connection = Connection(name or known_as, connect, start_timeout)
    try:
        found = connection.run(connection.list_tools())
        return McpTools(connection, _tools(connection, found, only, prefix, options))
    except BaseException:
        connection.close()
        raise


class McpTools(Sequence[Tool]):
    """The tools of one server, by :func:`from_mcp`, and the server's life: it runs from the first start to the last
    stop that match each other."""

    def __init__(self, connection: Connection, tools: Sequence[Tool]) -> None:
        self._connection = connection
        self._tools = tuple(tools)
        self._users = 0
        self._lock = threading.Lock()
        # A server that nobody ever used, or whose user forgot to close, ends with these tools.
        self._finalizer = weakref.finalize(self, connection.close)

    def __getitem__(self, index: Any) -> Any:
        return self._tools[index]

    def __len__(self) -> int:
        return len(self._tools)

    def __iter__(self) -> Iterator[Tool]:
        return iter(self._tools)

    def start(self) -> None:
        """Somebody uses the tools. Raises ConfigurationError where they were stopped for good."""
        with self._lock:
            if not self._finalizer.alive:
                raise ConfigurationError(
                    f"the tools of the MCP server {self._connection.name!r} were stopped: ask from_mcp for them again"
                )
            self._users += 1

    def stop(self) -> None:
        """Somebody who started uses them no longer; after the last, the server is stopped."""
        with self._lock:
            self._users -= 1
            last = self._users <= 0
        if last:
            self._finalizer()

    def __enter__(self) -> McpTools:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


_OPTIONS = {each.name for each in fields(Tool) if each.init} - {"name", "function"}


def _check(name: object, only: Any, prefix: object, start_timeout: object, options: Mapping[str, Any]) -> None:
    if name is not None and not isinstance(name, str):
        raise ConfigurationError(f"name={name!r}: must be a text, or None for the server's own")
    several = isinstance(only, Collection) and not isinstance(only, str | bytes)
    if only is not None and not (several and all(isinstance(each, str) for each in only)):
        raise ConfigurationError(f"only={only!r}: must be several names of tools, such as ['search'], or None for all")
    if not isinstance(prefix, str):
        raise ConfigurationError(f"prefix={prefix!r}: must be a text")
    if not is_seconds(start_timeout, 0) or start_timeout == 0:
        raise ConfigurationError(f"start_timeout={start_timeout!r}: must be a number of seconds over 0")
    for option, value in options.items():
        if option not in _OPTIONS:
            raise ConfigurationError(
                f"{option}={value!r}: is no option of tools; they are {', '.join(sorted(_OPTIONS))}"
            )


def _tools(
    connection: Connection, found: list[Any], only: Collection[str] | None, prefix: str, options: Mapping[str, Any]
) -> list[Tool]:
    missing = sorted(set(only or ()) - {each.name for each in found})
    if missing:
        has = ", ".join(sorted(each.name for each in found))
        raise ConfigurationError(f"only={missing!r}: the MCP server {connection.name!r} has no such tool; it has {has}")
    names: dict[str, str] = {}
    tools = []
    for each in found:
        if only is None or each.name in only:
            python_name = python_identifier(f"{prefix}{each.name}", names)
            names[python_name] = each.name
            tools.append(_tool(connection, python_name, each, options))
    return tools


def _tool(connection: Connection, name: str, described: Any, options: Mapping[str, Any]) -> Tool:
    taken = parameters(described.input_schema, described.output_schema)

    async def function(*arguments: Any, **keyword_arguments: Any) -> Any:
        sent = taken.arguments(arguments, keyword_arguments)
        return value_of(await connection.call(described.name, sent), described.output_schema)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = docstring(described.description, taken)
    function.__annotations__ = {}
    function.__signature__ = taken.signature  # type: ignore[attr-defined]
    names = {each: parameter for parameter, each in taken.properties.items() if each != parameter}
    schema = {"parameters": dict(described.input_schema), "argument_names": names, **options}
    return Tool(name, function, **schema)
