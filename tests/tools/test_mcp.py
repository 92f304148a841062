"""Tools of a real MCP server, over its standard streams, over HTTP and in this process."""

from __future__ import annotations

import asyncio
import gc
import inspect
import keyword
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mcp.server import Server
from mcp.types import CallToolResult, ListToolsResult
from mcp.types import Tool as ServersTool

import midstream as ms
from midstream.errors import ConfigurationError, ProtocolError
from midstream.tools import ToolHost
from midstream.tools.mcp import McpToolError, McpTools, from_mcp
from midstream.tools.mcp.connection import Connection
from midstream.tools.mcp.schema import annotation_of, parameters, python_identifier
from tests.rollouts import LONG
from tests.tools.mcp_server import PICTURE, server
from tests.vocabularies import tokenizer

SERVER = str(Path(__file__).with_name("mcp_server.py"))
COMMAND = [sys.executable, SERVER]


@contextmanager
def over_http(port: int | None = None) -> Iterator[int]:
    """A server process on a port, ready to be called."""
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", port or 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([*COMMAND, str(port)], stderr=subprocess.DEVNULL)
    try:
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None
            time.sleep(0.05)
        yield port
    finally:
        process.kill()
        process.wait()


@contextmanager
def connected(way: str, **options: Any) -> Iterator[McpTools]:
    if way == "http":
        with over_http() as port, from_mcp(f"http://127.0.0.1:{port}/mcp", **options) as tools:
            yield tools
    else:
        with from_mcp(COMMAND if way == "stdio" else server, **options) as tools:
            yield tools


def caller(tools: McpTools) -> Callable[..., Any]:
    """Calls a tool by name, each time from an event loop of its own."""
    by_name = {tool.name: tool for tool in tools}
    return lambda name, *arguments, **named: asyncio.run(by_name[name](*arguments, **named))


@pytest.fixture(scope="module", params=["stdio", "http", "in process"])
def tools(request: pytest.FixtureRequest) -> Iterator[McpTools]:
    with connected(request.param) as connection:
        yield connection


def test_values_come_as_python_has_them(tools: McpTools) -> None:
    call = caller(tools)
    assert call("add", 1, b=5) == 6
    assert call("add", 1) == 3
    assert call("list_things", {"x": 5}) == ["thing 5"] * 3
    assert call("list_things", place={"x": 5, "y": 1}, label="é") == ["é 5"]
    assert call("where") == {"x": 1, "y": 3}
    assert call("text") == "grüße\n"
    assert call("plain_text") == "plain"
    assert call("picture") == ms.Media("image/png", PICTURE)
    assert call("several")[-1] == ms.Media("image/png", PICTURE)


def test_signatures_and_documentation_are_those_of_the_schemas(tools: McpTools) -> None:
    by_name = {tool.name: tool for tool in tools}
    add = inspect.signature(by_name["add"].function)
    assert str(add) == "(a: int, b: int = 2, mode: Literal['plain', 'loud'] = 'plain') -> int"
    listed = by_name["list_things"]
    assert list(inspect.signature(listed.function).parameters) == ["place", "label"]
    assert inspect.signature(listed.function).return_annotation == list[str]
    assert "Things at a place." in (listed.function.__doc__ or "")
    assert "label: What to call them" in (listed.function.__doc__ or "")
    assert listed.schema["function"]["parameters"]["properties"]["place"]
    assert {"add", "list_things", "picture"} <= by_name.keys()


def test_what_fails_is_an_exception(tools: McpTools) -> None:
    call = caller(tools)
    with pytest.raises(McpToolError, match="Error executing tool fail") as raised:
        call("fail")
    assert "keeps to itself" not in str(raised.value)
    with pytest.raises(McpToolError, match="valid integer"):
        call("add", "x")
    with pytest.raises(TypeError, match="missing a required argument: 'a'"):
        call("add")


def test_slow_calls_do_not_wait_for_each_other(tools: McpTools) -> None:
    by_name = {tool.name: tool for tool in tools}

    async def all_at_once() -> list[float]:
        slow = asyncio.create_task(by_name["sleep"](30.0))
        quick = await asyncio.gather(*(by_name["add"](index) for index in range(20)))
        assert not slow.done()
        slow.cancel()
        with pytest.raises(asyncio.CancelledError):
            await slow
        return list(quick)

    assert asyncio.run(all_at_once()) == [index + 2 for index in range(20)]
    assert caller(tools)("add", 1) == 3


@pytest.mark.parametrize("way", ["stdio", "http"])
def test_a_model_calls_them_from_its_code(way: str, sandboxes: ms.SandboxPool) -> None:
    codes = ("add(1, b=4), list_things({'x': 3, 'y': 1})", "fail()", "picture().data[:4]", "picture()")
    said = "".join(f"<code>{code}</code> then " for code in codes)
    engine = ms.ScriptedEngine(tokenizer("o200k"), {"Go": said})
    with connected(way) as tools, ms.Generator(engine, pool=sandboxes, tools=[tools]) as generator:
        (trajectory,) = generator.generate([ms.Prompt(text="Go")])
    assert [entry.result.text for entry in trajectory.calls if entry.result] == [
        "(5, ['thing 3'])",
        "McpToolError('Error executing tool fail')",
        repr(PICTURE[:4]),
        "<image>",
    ]
    assert trajectory.calls[-1].result.media == (ms.Media("image/png", PICTURE),)
    assert [call.name for entry in trajectory.calls if entry.result for call in entry.result.tool_calls] == [
        "add",
        "list_things",
        "fail",
        "picture",
        "picture",
    ]


# --- the server's life


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def eventually(condition: Callable[[], bool]) -> bool:
    for _ in range(400):
        if condition():
            return True
        time.sleep(0.025)
    return False


def test_a_server_that_dies_is_started_again() -> None:
    with connected("stdio") as tools:
        call = caller(tools)
        first = call("pid")
        with pytest.raises(ConnectionError, match="went away during the call"):
            call("die")
        second = call("pid")
        assert first != second
        os.kill(second, signal.SIGKILL)
        assert eventually(lambda: not alive(second))
        time.sleep(0.3)  # for the end of its output to be read
        # It died between two calls: none was lost, so none fails.
        assert call("pid") not in (first, second)


def test_a_server_that_was_started_again_elsewhere_is_found_again() -> None:
    with over_http() as port:
        tools = from_mcp(f"http://127.0.0.1:{port}/mcp")
    with tools:
        with pytest.raises(ConnectionError):
            caller(tools)("add", 1)
        with over_http(port):
            assert eventually(lambda: _answers(tools))


def _answers(tools: McpTools) -> bool:
    try:
        return bool(caller(tools)("add", 1) == 3)
    except ConnectionError:
        return False


@pytest.mark.parametrize("refusals", [1, 1000])
def test_an_unknown_session_is_asked_for_again_once(refusals: int) -> None:
    """What a server says that was started again and has never heard of this session: the call was not begun."""
    from types import SimpleNamespace

    from mcp import MCPError
    from mcp.types import INVALID_REQUEST

    opened: list[int] = []

    @asynccontextmanager
    async def connect(_said: Any, _ended: Any) -> Any:
        opened.append(len(opened))
        number = opened[-1]

        async def call_tool(name: str, arguments: dict[str, Any]) -> Any:
            if number < refusals:
                raise MCPError(code=INVALID_REQUEST, message="Session terminated")
            return (name, arguments, number)

        yield SimpleNamespace(call_tool=call_tool)

    connection = Connection("fake", connect, LONG)
    try:
        if refusals == 1:
            assert asyncio.run(connection.call("add", {"a": 1})) == ("add", {"a": 1}, 1)
        else:
            with pytest.raises(ConnectionError, match=r"^the MCP server 'fake' cannot be reached$"):
                asyncio.run(connection.call("add", {"a": 1}))
    finally:
        connection.close()
    assert opened == [0, 1]


def test_why_a_server_cannot_be_started_again_is_logged_and_not_told_to_the_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    program = tmp_path / "server.py"
    program.write_text(Path(SERVER).read_text())
    with from_mcp([sys.executable, str(program)], name="figures", start_timeout=LONG) as tools:
        program.write_text("raise RuntimeError('no database with password=hunter2')")
        with pytest.raises(ConnectionError, match=r"^the MCP server 'figures' went away during the call$"):
            caller(tools)("die")
        with pytest.raises(ConnectionError, match=r"^the MCP server 'figures' cannot be reached$") as raised:
            caller(tools)("add", 1)
    assert raised.value.__cause__ is None
    assert any(
        "cannot be reached (" in each.getMessage() and "password=hunter2" in each.getMessage()
        for each in caplog.records
        if each.levelname == "WARNING"
    )


def test_nothing_is_left_when_they_are_stopped() -> None:
    gc.collect()
    threads, descriptors = set(threading.enumerate()), set(os.listdir("/proc/self/fd"))
    with connected("stdio") as tools:
        process = caller(tools)("pid")
        assert alive(process)
    assert not alive(process)
    assert set(threading.enumerate()) <= threads
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= len(descriptors)
    with pytest.raises(ProtocolError, match="is closed"):
        caller(tools)("pid")
    with pytest.raises(ConfigurationError, match="were stopped"):
        tools.start()


def test_generators_keep_the_server_until_the_last_is_closed(sandboxes: ms.SandboxPool) -> None:
    tools = from_mcp(COMMAND)
    process = caller(tools)("pid")
    engine = ms.ScriptedEngine(tokenizer("o200k"), {"Go": "<code>add(1)</code> end"})
    first = ms.Generator(engine, pool=sandboxes, tools=[tools])
    second = ms.Generator(engine, pool=sandboxes, tools=[tools])
    first.close()
    assert alive(process)
    (trajectory,) = second.generate([ms.Prompt(text="Go")])
    assert "<result>3</result>" in trajectory.text
    second.close()
    assert not alive(process)


def test_a_server_that_nobody_uses_any_more_ends() -> None:
    tools = from_mcp(COMMAND)
    process = caller(tools)("pid")
    del tools
    gc.collect()
    assert eventually(lambda: not alive(process))


def test_what_a_server_says_while_it_fails_to_start_is_told() -> None:
    threads = set(threading.enumerate())
    with pytest.raises(ConfigurationError, match=r"cannot be reached(.|\n)*this server refuses to start"):
        from_mcp([*COMMAND, "refuse"])
    with pytest.raises(ConfigurationError, match="cannot be reached"):
        from_mcp(["/no/such/program"])
    with pytest.raises(ConfigurationError, match="cannot be reached"):
        from_mcp("http://127.0.0.1:1/mcp")
    with pytest.raises(ConfigurationError, match=r"cannot be reached \(no answer in time\)"):
        from_mcp([sys.executable, "-c", "import time; time.sleep(60)"], start_timeout=0.3)
    assert set(threading.enumerate()) <= threads


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("localhost:8000", "must begin with http"),
        ({"command": "x", "port": 1}, r"unknown options \['port'\]"),
        ({"command": "x", "url": "http://x"}, "do not go together"),
        ({"args": ["x"]}, "do not go together"),
        ({"command": 5}, "server="),
        ([], "do not go together"),
        (5, "server=5"),
    ],
)
def test_what_names_no_server_is_refused(wrong: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        from_mcp(wrong)


def test_options() -> None:
    with from_mcp(server, only=["add", "list-things"], prefix="figures_", pure=True, deadline=3.0) as tools:
        assert [tool.name for tool in tools] == ["figures_add", "figures_list_things"]
        assert all(tool.pure and tool.deadline == 3.0 for tool in tools)
    with pytest.raises(ConfigurationError, match=r"only=\['subtract'\].*it has add, die"):
        from_mcp(server, only=["subtract"])
    with pytest.raises(ConfigurationError, match="deadline=-1"):
        from_mcp(server, deadline=-1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": 3}, "name=3: must be a text"),
        ({"only": "price"}, "only='price': must be several names"),
        ({"only": [3]}, r"only=\[3\]: must be several names"),
        ({"only": 3}, "only=3: must be several names"),
        ({"prefix": 3}, "prefix=3: must be a text"),
        ({"start_timeout": "x"}, "start_timeout='x': must be a number of seconds over 0"),
        ({"start_timeout": 0}, "start_timeout=0: must be a number of seconds over 0"),
        ({"bogus": 3}, "bogus=3: is no option of tools; they are .*deadline"),
    ],
)
def test_options_that_cannot_work_are_refused_before_the_server_is_started(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        from_mcp(["/no/such/program"], **options)


@pytest.mark.parametrize("kind", ["hangs", "fails", "has no end"])
def test_a_server_that_does_not_tell_its_tools_is_left(kind: str) -> None:
    async def listed(_context: Any, _parameters: Any) -> ListToolsResult:
        if kind == "hangs":
            await asyncio.Event().wait()
        if kind == "fails":
            raise ValueError("not today")
        return ListToolsResult(tools=[], next_cursor="more")

    threads = set(threading.enumerate())
    in_time = kind == "fails"
    message = r"does not tell its tools \(.*MCPError" if in_time else r"\(no answer in time\)"
    with pytest.raises(ConfigurationError, match=f"MCP server 'mute': .*{message}"):
        from_mcp(Server("mute", on_list_tools=listed), start_timeout=LONG if in_time else 0.5)
    assert set(threading.enumerate()) <= threads


# --- schemas


@pytest.mark.parametrize(
    ("schema", "annotation"),
    [
        ({"type": "string"}, str),
        ({"type": "number"}, float),
        ({"type": ["string", "null"]}, str | None),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, int | None),
        ({"oneOf": [{"type": "integer"}, {}]}, Any),
        ({"enum": ["a", 1, None]}, Literal["a", 1, None]),
        ({"enum": [1.5]}, Any),
        ({"const": "x"}, Literal["x"]),
        ({"type": "array", "items": {"type": "boolean"}}, list[bool]),
        ({"type": "array"}, list[Any]),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, dict[str, int]),
        ({"type": "object", "additionalProperties": False}, dict[str, Any]),
        ({"$ref": "#/$defs/name"}, str),
        ({"allOf": [{"$ref": "#/$defs/name"}]}, str),
        ({"$ref": "#/$defs/missing"}, Any),
        ({"$ref": "http://elsewhere"}, Any),
        ({"$ref": "#/$defs/loop"}, Any),
        (True, Any),
        ({}, Any),
    ],
)
def test_types_of_schemas(schema: Any, annotation: Any) -> None:
    root = {"$defs": {"name": {"type": "string"}, "loop": {"$ref": "#/$defs/loop"}}}
    assert annotation_of(schema, root) == annotation


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
keys = st.sampled_from(["type", "enum", "anyOf", "oneOf", "allOf", "items", "$ref", "properties", "const", "default"])
kinds = st.sampled_from(["string", "integer", "array", "object", "null", ["string", "null"]])
schemas = st.dictionaries(keys, json_values | kinds, max_size=4)


@given(st.dictionaries(st.text(min_size=1, max_size=6), schemas | json_values, max_size=5), st.data())
def test_any_schema_gives_a_signature_that_takes_its_properties(
    properties: dict[str, Any], data: st.DataObject
) -> None:
    names = list(properties)
    required = data.draw(st.lists(st.sampled_from([*names, "absent"]), unique=True)) if names else []
    taken = parameters({"type": "object", "properties": properties, "required": required})
    assert sorted(taken.properties.values()) == sorted(names)
    given_names = data.draw(st.sets(st.sampled_from(names))) if names else set()
    given_names |= set(required) & set(names)
    values = {name: value for name, value in taken.properties.items() if value in given_names}
    assert taken.arguments((), values) == {name: name for name in given_names}
    for name in set(required) & set(names):
        with pytest.raises(TypeError):
            taken.arguments((), {key: value for key, value in values.items() if value != name})


def test_properties_that_are_allowed_without_a_name_are_keyword_arguments() -> None:
    assert str(parameters({"type": "object"}).signature) == "()"
    assert str(parameters({"type": "object", "additionalProperties": False}).signature) == "()"
    anything = parameters({"type": "object", "additionalProperties": True})
    assert str(anything.signature) == "(**kwargs: Any)"
    assert anything.arguments((), {"a": 1, "max-results": 2}) == {"a": 1, "max-results": 2}
    schema = {
        "properties": {"from": {"type": "string"}, "kwargs": {}},
        "required": ["from"],
        "additionalProperties": {"type": "integer"},
    }
    mixed = parameters(schema)
    assert str(mixed.signature) == "(from_: str, kwargs: Any = Ellipsis, **kwargs_2: int)"
    assert mixed.arguments(("Ann",), {"kwargs": 1, "more": 2}) == {"from": "Ann", "kwargs": 1, "more": 2}
    with pytest.raises(TypeError, match="multiple values for argument 'from'"):
        mixed.arguments(("Ann",), {"from": "Bob"})


@asynccontextmanager
async def row_of_echo(schema: dict[str, Any]) -> Any:
    """A row that has a server's tool of that schema, which gives back what the server was sent."""

    async def listed(_context: Any, _parameters: Any) -> ListToolsResult:
        return ListToolsResult(tools=[ServersTool(name="echo", input_schema={"type": "object", **schema})])

    async def called(_context: Any, given: Any) -> CallToolResult:
        return CallToolResult(content=[], structured_content=given.arguments)

    with from_mcp(Server("echo", on_list_tools=listed, on_call_tool=called)) as tools:
        host = ToolHost(ms.ToolSet([tools]))
        yield host.row()
        await asyncio.to_thread(host.close)


async def test_calls_in_json_name_the_properties_of_the_schema() -> None:
    properties = {"from": {"type": "string"}, "max-results": {"type": "integer"}, "class": {"type": "string"}}
    async with row_of_echo({"properties": properties, "required": ["from"]}) as row:
        sent = {"from": "Ann", "max-results": 2, "class": "long"}
        for arguments in (sent, {"from_": "Ann", "max_results": 2, "class_": "long"}):
            made = await row.call_json("echo", arguments)
            assert (made.value, made.keyword_arguments) == (sent, arguments)
        twice = await row.call_json("echo", {"from": "Ann", "from_": "Bob"})
        assert twice.error == ms.ExecutionError("TypeError", "echo() got multiple values for argument 'from_'")
        assert (await row.call("echo", ["Ann"], {"max_results": 1})).value == {"from": "Ann", "max-results": 1}


async def test_a_tool_of_any_properties_is_called_with_any() -> None:
    async with row_of_echo({"additionalProperties": True}) as row:
        assert (await row.call_json("echo", {"x": 1, "max-results": 2})).value == {"x": 1, "max-results": 2}
        assert (await row.call("echo", (), {"x": 1})).value == {"x": 1}


@given(st.lists(st.text(max_size=8), max_size=6))
def test_names_are_python_names_and_stay_apart(names: list[str]) -> None:
    taken: dict[str, str] = {}
    for name in names:
        found = python_identifier(name, taken)
        assert found.isidentifier()
        assert not keyword.iskeyword(found)
        assert found not in taken
        taken[found] = name
