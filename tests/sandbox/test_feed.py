"""Blocks that arrive piece by piece: they give what they would have given whole, and nothing before they are closed."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from midstream.errors import ConfigurationError, MidstreamError, ProtocolError
from midstream.sandbox import SandboxLimits, SandboxPool, Session
from midstream.types import ExecutionResult

SHORT = SandboxLimits(wall_time=1.0, grace=0.6, memory=768 << 20, threads=24, output_characters=2000)


@pytest.fixture(scope="module")
def pool(level: str) -> Iterator[SandboxPool]:
    with SandboxPool(isolation=level, forkable=True, limits=SHORT, preload=["numpy"]) as pool:  # type: ignore[arg-type]
        yield pool


@pytest.fixture(scope="module")
def bounded_pool(level: str) -> Iterator[SandboxPool]:
    """One that bounds the processor time of blocks."""
    limits = replace(SHORT, wall_time=30.0, block_cpu_time=0.6)
    with SandboxPool(isolation=level, forkable=True, limits=limits, preload=[]) as pool:  # type: ignore[arg-type]
        yield pool


@pytest.fixture
def session(pool: SandboxPool) -> Iterator[Session]:
    with pool.session(seed=0) as session:
        yield session


def plain(result: ExecutionResult) -> ExecutionResult:
    """Without what differs from run to run."""
    calls = tuple(replace(call, started=0.0, duration=0.0) for call in result.tool_calls)
    text, error = re.sub("0x[0-9a-f]+", "0x", result.text), result.error
    return replace(result, text=text, value=None, error=error, duration=0.0, cpu_time=None, tool_calls=calls)


def by_lines(block: str) -> list[str]:
    return block.splitlines(keepends=True)


BLOCKS = {
    "a value": ("x = 1\ny = 2\nx + y", True),
    "no value": ("x = 1\ny = 2", True),
    "values in between": ("1\n2\n'three'\n4", True),
    "only text": ("'documentation'", True),
    "text and more": ("'documentation'\nx = 1\n__doc__, x", True),
    "text in between": ("x = 1\n'not documentation'\n__doc__, x", True),
    "output": ("print('one')\nimport os; os.write(1, b'raw\\n')\nprint('two')\n3", True),
    "an error": ("x = 1\n\n\n1/0\nx = 2\nx", True),
    "an error in a function": ("def f(n):\n    return 1 / n\n\nx = 5\nf(0)\nx", True),
    "an error of a value": ("class A:\n    def __repr__(self): return 1/0\nA()", True),
    "a syntax error": ("open('f', 'w').close()\nx = 1\ny = = 2\nz", False),
    "a late syntax error": ("x = 1\nprint(x)\nreturn x", False),
    "a syntax error of the whole": ("g = 1\nprint(g)\nglobal g\ng", False),
    "an open bracket": ("x = 1\nprint((x\n", False),
    "compound statements": ("t = 0\nfor i in range(3):\n    t += i\n    t *= 2\nif t:\n    t += 1\nt", False),
    "an else": ("x = 0\nif x:\n    print('no')\nelse:\n    print('yes')\nx", False),
    "an exit": ("import sys\nprint('before')\nsys.exit(3)\nprint('after')", True),
    "an import from the future": ("from __future__ import annotations\ndef f(x: y): pass\nf.__annotations__", True),
    "a late import from the future": ("x = 1\nfrom __future__ import annotations\nx", False),
    "annotations first": ("x: int = 1\ny = 2\nx, y, __annotations__", True),
    "annotations later": ("y = '__annotations__' in globals()\nx: int = 1\ny, __annotations__", False),
    "a warning": ("print('first')\nx = '\\d'\nx is 'a'\nx", False),
    "indentation": ("    x = 1\n    if x:\n        y = 2\n    x + y\n", False),
    "blank lines around": ("\n\nx = 1\n1/0\n\n", True),
    "comments": ("# one\nx = 1  # two\n# three\nx # four\n# five", True),
    "several on a line": ("a = 1; b = 2; c = 3\na + b; b + c", True),
    "a decorator": ("def d(f): return f\n@d\ndef g(): return 4\ng()", False),
    "text over lines": ("x = '''one\ntwo\n'''\nx", False),
    "a line that goes on": ("x = 1 + \\\n    2\nx", False),
    "zero bytes": ("x = 1\ny = '\0'\nx", False),
    "much output": ("for i in range(3): print('x' * 900)\n'y' * 3000", True),
    "a deep value": ("x = []\nfor _ in range(300): x = [x]\nx", True),
    "recursion": ("def f(n):\n    try: return f(n + 1)\n    except RecursionError: return n\nf(0)", False),
    "the stack": ("import traceback\nx = len(traceback.extract_stack())\nx, len(traceback.extract_stack())", True),
    "its own source": ("import inspect, linecache\ndef f():\n    return 5\nprint(inspect.getsource(f))\nf()", False),
    "nothing": ("", True),
    "a comment alone": ("# nothing\n", True),
    "equal constants": (
        "a = 1000; b = 1000\nc = 1000\nd = (1000, 'x y'); e = 'x y'\n[a is b, b is c, d[0] is a, d[1] is e]",
        True,
    ),
    "constants of the value": ("a = 1000\nb = [a is 1000 for _ in (1,)]\na is b, (a is 1000)", False),
    "a constant that is shared after all": ("a = 1000\nx = []\nx.append(a is min(1000, 2000))\nx", True),
    "constants of functions": (
        "a = 1.5\ndef f(): return 1.5\ng = lambda: (1.5, 'a b')\nf() is a, g()[0] is a, g()[1]",
        True,
    ),
    "equal numbers apart": ("a = 1.0\nb = 1\nc = True\nd = -0.0; e = 0.0\n[a, b, c, d, e, a is b, d is e]", True),
    "random numbers": ("import random\nx = random.random()\nx, random.random()", True),
    "threads": (
        "from threading import *\nt = Thread(target=lambda: e.wait())\ne = Event(); t.start()\ne.set(); t.join()\n5",
        False,
    ),
    "a redirected output": (
        "import io, sys\nsys.stdout = io.StringIO()\nprint('kept')\nv = sys.stdout.getvalue()\nv",
        True,
    ),
    "deleted names": ("x = 1\ndel x\nx", True),
    "an object that ends": ("class A:\n    def __del__(self): print('gone')\n\nA()\nprint('next')\nA()", False),
    "an interrupt": ("x = 1\nwhile True: pass\nx", True),
    "an abort": ("x = 1\nimport os; os.abort()\nx = 2", True),
    "an abort and then a syntax error": ("x = 1\nimport os; os.abort()\nx = = 2", False),
    "an abort as it is shown": ("import os\nclass A:\n    def __repr__(self): os.abort()\nA()", False),
}
"""Each with whether a session would run all of it ahead, or at least up to its end."""


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("cut", [by_lines, list, lambda block: [block]], ids=["lines", "characters", "whole"])
def test_a_fed_block_gives_what_it_gives_whole(pool: SandboxPool, name: str, cut: object) -> None:
    block, _ = BLOCKS[name]
    after = "import os, sys\nsorted(n for n in globals() if n[0] != '_'), sorted(os.listdir('.')), sys.stdout.name"
    with pool.session(seed=3) as fed, pool.session(seed=3) as whole:
        for each in (fed, whole):
            each.run("x = 'before'", checkpoint=True)
        for piece in cut(block) or [""]:  # type: ignore[operator]
            fed.feed(piece)
        assert plain(fed.commit()) == plain(whole.run(block, checkpoint=True))
        assert fed.run(after).text == whole.run(after).text
        assert fed.run("x").text == whole.run("x").text


@pytest.mark.parametrize("name", [name for name, (_, ahead) in BLOCKS.items() if ahead])
def test_what_can_runs_ahead(pool: SandboxPool, name: str) -> None:
    """So that the above is not just blocks that ran twice: what the copy has run is what the session goes on from."""
    block, _ = BLOCKS[name]
    with pool.session(seed=3) as session:
        for piece in by_lines(block) or [""]:
            session.feed(piece)
        copy = session.process_id
        result = session.commit()
        assert result.rolled_back == ("abort" in block)
        if not result.rolled_back:
            assert session.process_id == copy


def test_statements_run_as_they_come(session: Session) -> None:
    assert session.feed("import time, os\n")
    moments = [time.monotonic()]  # the same clock in there as here
    for name in ("first", "second"):
        assert session.feed(f"{name} = time.monotonic()\n")
        moments.append(time.monotonic())
    assert session.feed("open('f', 'w').write('x')\n")
    assert session.commit().text == "1"
    first, second = (float(session.run(name).text) for name in ("first", "second"))
    assert moments[0] < first < moments[1] < second < moments[2]
    assert session.run("os.listdir('.')").text == "['f']"


def test_an_aborted_block_leaves_no_trace(session: Session) -> None:
    session.run("import os, random; x = [1]; f = open('f', 'w+'); f.write('before'); f.flush()")
    expected = session.run("random.getstate() == random.getstate(), x, f.tell(), os.listdir('.')").text
    number, past = session.process_id, len(session._interpreter.past)
    session.feed("x.append(2); random.random()\n")
    session.feed("f.write('more'); f.flush(); open('g', 'w').close(); os.unlink('f')\n")
    session.abort()
    assert session.process_id == number
    assert len(session._interpreter.past) == past
    assert session.run("random.getstate() == random.getstate(), x, f.tell(), os.listdir('.')").text == expected
    session.feed("x.append(2)\nimport os; os.abort()\n")
    session.feed("x.append(3)\n")
    session.abort()
    assert session.run("x").text == "[1]"


class Tools:
    def __init__(self) -> None:
        self.calls: list[object] = []

    def __call__(self, name: str, arguments: list[object], _keywords: dict[str, object]) -> object:
        self.calls.append((name, *arguments))
        if arguments == ["bad"]:
            raise ValueError("no")
        if arguments == ["fault"]:
            raise MidstreamError("the host's own")
        return len(self.calls)


def test_a_tool_is_called_when_the_block_is_closed(pool: SandboxPool) -> None:
    tools = Tools()
    with pool.session(tools=["tool"], call_tool=tools) as session:
        assert session.feed("print('first')\n")
        assert not session.feed("a = tool(1)\n")
        assert not session.feed("b = tool(2); print(a, b)\n")
        assert not session.feed("try: tool('bad')\nexcept ValueError as e: c = e\n")
        session.feed("a, b, c")
        assert tools.calls == []
        copy = session.process_id
        result = session.commit()
        assert result.text == "first\n1 2\n(1, 2, ValueError('no'))"
        assert [call.arguments for call in result.tool_calls] == [(1,), (2,), ("bad",)]
        assert session.process_id == copy
        assert session.run("a + b").text == "3"
        assert len(tools.calls) == 3


def test_a_tool_of_an_aborted_block_is_never_called(pool: SandboxPool) -> None:
    tools = Tools()
    with pool.session(tools=["tool"], call_tool=tools) as session:
        session.feed("x = 1; tool(1)\n")
        session.abort()
        session.feed("tool(2)\n")
        session.feed("x = = 5\n")
        assert "SyntaxError" in session.commit().text
        assert tools.calls == []
        assert session.run("'x' in globals()").text == "False"


def test_a_tool_of_a_block_that_has_to_run_again_is_called_once(pool: SandboxPool) -> None:
    tools = Tools()
    with pool.session(tools=["tool"], call_tool=tools) as session:
        session.feed("a = tool(1)\n")
        session.feed("b: int = tool(2)\n")
        session.feed("a, b, '\\d'")
        assert session.commit().text.endswith("(1, 2, '\\\\d')")
        assert tools.calls == [("tool", 1), ("tool", 2)]


def test_a_fault_in_a_tool_takes_the_block_back(pool: SandboxPool) -> None:
    with pool.session(tools=["tool"], call_tool=Tools()) as session:
        session.run("x = 1")
        session.feed("x = 2\ntool('fault')\n")
        with pytest.raises(MidstreamError, match="own"):
            session.commit()
        assert session.run("x").text == "1"


def test_waiting_for_the_next_piece_takes_none_of_its_time(level: str) -> None:
    limits = replace(SHORT, wall_time=3.0)
    pool = SandboxPool(isolation=level, forkable=True, limits=limits, preload=[])  # type: ignore[arg-type]
    with pool, pool.session() as session:
        session.feed("import time; time.sleep(0.2)\n")
        time.sleep(3.0)
        session.feed("time.sleep(0.2)\n")
        result = session.commit()
        assert (result.error, result.timed_out) == (None, False)
        assert 0.4 <= result.duration < 3.0
        session.feed("time.sleep(1.6)\n")
        session.feed("time.sleep(1.6)\n")
        result = session.commit()
        assert (result.timed_out, result.breached, result.state_lost) == (True, "wall_time", False)


def test_processor_time_is_that_of_the_whole_block(bounded_pool: SandboxPool) -> None:
    with bounded_pool.session(seed=0) as session:
        burn = "import time; end = time.process_time() + {}\nwhile time.process_time() < end: pass\n"
        session.run("x = 1")
        session.feed(burn.format(0.2))
        session.feed(burn.format(0.2))
        result = session.commit()
        assert (result.error, result.breached) == (None, None)
        assert result.cpu_time is not None
        assert result.cpu_time >= 0.4
        session.feed(burn.format(0.4))
        session.feed(burn.format(0.6))
        result = session.commit()
        assert (result.breached, result.timed_out, result.state_lost) == ("block_cpu_time", False, False)
        assert "more than 0.6 seconds of processor time" in result.text
        assert session.run("x").text == "1"


def test_a_loop_in_c_is_killed_and_undone(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    session.run("x = 1")
    assert session.feed("x = 2\n")
    assert not session.feed("sum(range(10**13))\n")
    assert not session.feed("x = 3\n")
    monkeypatch.setattr(session._interpreter, "run", lambda *_, **__: pytest.fail("it was run again to find that out"))
    result = session.commit()
    monkeypatch.undo()
    assert (result.rolled_back, result.timed_out, result.breached) == (True, True, "wall_time")
    assert session.run("x").text == "1"


def test_where_there_can_be_no_copy_it_runs_when_it_is_closed(session: Session) -> None:
    session.run("import os; r, w = os.pipe(); x = 1")
    assert not session.feed("x += 1\n")
    assert not session.feed("x")
    result = session.commit()
    assert (result.text, result.no_checkpoint) == ("2", "its code has pipes or sockets open")


def test_one_thing_at_a_time(session: Session) -> None:
    for action in (session.commit, session.abort):
        with pytest.raises(ProtocolError, match="no block is open"):
            action()
    session.feed("x = 1\n")
    for forbidden in (
        lambda: session.run("1"),
        lambda: session.put("f", b""),
        lambda: session.get("f"),
        lambda: session.fork(),
    ):
        with pytest.raises(ProtocolError, match=r"commit\(\) or abort\(\) comes first"):
            forbidden()
    session.abort()
    assert session.run("'x' in globals()").text == "False"
    with pytest.raises(ConfigurationError, match="piece=5"):
        session.feed(5)  # type: ignore[arg-type]
    assert session.run("1").text == "1"
    session.feed("x = 1\n")
    session.close()
    with pytest.raises(ProtocolError, match="closed"):
        session.commit()


def test_it_needs_a_pool_that_can() -> None:
    with SandboxPool(preload=[]) as pool, pool.session() as session:
        with pytest.raises(ConfigurationError, match="forkable=True"):
            session.feed("1")
        assert session.run("1").text == "1"


def test_the_same_for_asyncio(pool: SandboxPool) -> None:
    async def run() -> None:
        tools = Tools()
        session = await pool.session_async(seed=0, tools=["tool"], call_tool=tools)
        with session:
            assert await session.feed_async("x = 1\n")
            assert not await session.feed_async("y = tool(x)\n")
            assert (await session.commit_async()).error is None
            assert (await session.run_async("x, y")).text == "(1, 1)"
            await session.feed_async("x = 2\n")
            session.abort()
            assert (await session.run_async("x")).text == "1"
            await session.feed_async("x = 5\n")
            feeding = asyncio.create_task(session.feed_async("while True: pass\n"))
            await asyncio.sleep(0.2)
            feeding.cancel()
            with pytest.raises(asyncio.CancelledError):
                await feeding
            result = await session.commit_async()
            assert (result.timed_out, result.state_lost) == (True, False)
            assert (await session.run_async("x")).text == "5"

    asyncio.run(run())


def test_a_session_that_dies_between_two_pieces(session: Session) -> None:
    session.run("x = 1")
    session.feed("x += 1\n")
    session.kill()
    assert not session.feed("x += 1\n")
    session.feed("x")
    result = session.commit()
    assert (result.text, result.state_lost) == ("3", False)  # rebuilt, and run as a whole


def test_copies_that_forge_answers_harm_themselves(session: Session) -> None:
    session.run("x = 1; import json, os, struct, sys")
    forge = "def send(**f):\n    b = json.dumps(f).encode(); os.write(3, struct.pack('<I', len(b)) + b)\n\n"
    session.run(forge)
    for lie in ("fed='running'", "checked=True", "stdout='', value='7'", "fed=[1]", "call=1, tool='no'"):
        session.feed(f"x = 2; send(nonce='0', {lie}); import time; time.sleep(0.3)\n")
        result = session.commit()
        assert result.rolled_back
        assert "interfered" in result.text
        assert session.run("x").text == "1"
