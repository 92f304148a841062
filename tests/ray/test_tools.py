"""Tools that code on a cluster calls run where the caller is, or beside the code, as they say."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import midstream as ms
from midstream.distributed.ray import RayPool
from midstream.errors import ConfigurationError
from tests.ray.conftest import eventually
from tests.ray.tokens import bytes_tokenizer


@pytest.fixture(scope="module")
def pool(cluster: Any) -> Iterator[RayPool]:
    with RayPool(preload=[], watch_interval=0.2, start_timeout=300) as pool:
        yield pool


def test_tools_run_where_the_caller_is(pool: RayPool) -> None:
    seen: list[Any] = []

    def call_tool(name: str, arguments: list[Any], keyword_arguments: dict[str, Any]) -> Any:
        seen.append((os.getpid(), name, arguments, keyword_arguments))
        if arguments == ["bad"]:
            raise KeyError("bad")
        return {"pair": (1, b"two"), "given": arguments}

    with pool.session(tools=["look"], call_tool=call_tool) as session:
        assert session.run("look((1, {2}), key=b'3')").text == "{'given': [(1, {2})], 'pair': (1, b'two')}"
        assert session.run("try: look('bad')\nexcept KeyError as error: print(repr(error))").text == "KeyError('bad')"
        assert session.run("[look(i)['given'] for i in range(3)]").text == "[[0], [1], [2]]"
    assert {entry[0] for entry in seen} == {os.getpid()}
    assert seen[0][1:] == ("look", [(1, {2})], {"key": b"3"})


async def test_asyncio_and_tools_that_are_coroutines(pool: RayPool) -> None:
    async def call_tool(name: str, arguments: list[Any], keyword_arguments: dict[str, Any]) -> Any:
        await asyncio.sleep(0.01)
        return arguments[0] * 2

    sessions = [await pool.session_async(tools=["double"], call_tool=call_tool, seed=n) for n in range(20)]
    results = await asyncio.gather(*(s.run_async(f"double({n}) + 1") for n, s in enumerate(sessions)))
    assert [result.text for result in results] == [str(2 * n + 1) for n in range(20)]
    for session in sessions:
        session.close()


async def test_a_tool_that_takes_too_long_holds_up_nobody(cluster: Any) -> None:
    """Neither its block, which is told so, nor the event loop, though it is no coroutine function."""
    released = threading.Event()

    def call_tool(name: str, arguments: list[Any], keyword_arguments: dict[str, Any]) -> Any:
        return released.wait(300)

    code = "try: wait()\nexcept TimeoutError as error: print(error)"
    limits, node = ms.SandboxLimits(tool_time=0.5), cluster.head_node.node_id
    with RayPool(preload=[], limits=limits, node_ids=[node], start_timeout=300) as pool:
        session = pool.session(tools=["wait"], call_tool=call_tool)
        try:
            by_loop = await session.run_async(code)
            by_thread = await asyncio.to_thread(session.run, code)
            assert not released.is_set()
        finally:
            released.set()
        session.close()
    assert [by_loop.text, by_thread.text] == ["wait() gave no answer within 0.5 seconds"] * 2
    assert [call.error is not None for call in (*by_loop.tool_calls, *by_thread.tool_calls)] == [True, True]


# --- tools beside the sandbox


class Store:
    """Of one row's own. What it says of the process that it is in is the node's."""

    def __init__(self, context: ms.ToolContext) -> None:
        self.whose = context.prompt_id
        self.kept: list[Any] = []

    def __call__(self, value: Any) -> tuple[int, str | None, list[Any]]:
        """Keep a value; all that were kept."""
        self.kept.append(value)
        return os.getpid(), self.whose, self.kept


def test_a_tool_runs_where_it_says(pool: RayPool) -> None:
    """In this process, or in one copy beside the sandboxes of each host, which does not come back here."""
    eventually(lambda: len(pool.nodes) >= 3)
    here: list[int] = []

    def at_home(value: int) -> int:
        """Here."""
        here.append(value)
        return os.getpid()

    @ms.tool(place="sandbox")
    def away(value: int) -> int:
        """There."""
        here.append(value)
        if value < 0:
            raise LookupError("under 0")
        return os.getpid()

    store = ms.Tool("store", Store, place="sandbox", per_row=True)
    code = """
store('a')
print(at_home(1), away(2), store('b'))
try:
    away(-1)
except LookupError as error:
    print(repr(error))
"""
    said = {f"{n}": f"<code>{code}</code>" for n in range(6)}
    engine = ms.ScriptedEngine(bytes_tokenizer(), said)
    with ms.Generator(engine, pool=pool, tools=[at_home, away, store]) as generator:
        batch = generator.generate([ms.Prompt(text=text, id=f"p{text}") for text in said])
    hosts = {host.process_id for host in pool.hosts}
    found = set()
    for number, trajectory in enumerate(batch):
        result = trajectory.calls[0].result
        assert result is not None
        first, error = result.text.splitlines()
        own, host, rest = first.split(" ", 2)
        assert int(own) == os.getpid()
        assert rest == f"({host}, 'p{number}', ['a', 'b'])"
        assert error == "LookupError('under 0')"
        assert [call.name for call in result.tool_calls] == ["store", "at_home", "away", "store", "away"]
        found.add(int(host))
    assert here == [1] * 6
    assert found <= hosts
    assert len(found) > 1


def test_a_tool_that_cannot_be_sent_is_refused_before_anything_runs(pool: RayPool) -> None:
    lock = threading.Lock()

    @ms.tool(place="sandbox")
    def locked(value: int) -> int:
        """Holds what no other process can have."""
        with lock:
            return value

    engine = ms.ScriptedEngine(bytes_tokenizer(), "never")
    refused = pytest.raises(ConfigurationError, match=r"tools locked: place='sandbox': cannot be sent")
    with ms.Generator(engine, pool=pool, tools=[locked]) as generator, refused:
        generator.generate(["0"])
