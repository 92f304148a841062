"""Rule 16: tools are names in the namespace, run outside, and believed in nothing."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from midstream.errors import ConfigurationError, EngineError, ProtocolError, SandboxError, SandboxFileError
from midstream.sandbox import SandboxLimits, SandboxPool, Session
from tests.sandbox.inner import FIND_WORKER
from tests.sandbox.leftovers import eventually


class Host:
    """Tools that do what tests need."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[Any], dict[str, Any]]] = []

    def __call__(self, name: str, arguments: list[Any], keyword_arguments: dict[str, Any]) -> Any:
        self.calls.append((name, arguments, keyword_arguments))
        if name == "echo":
            return [arguments, keyword_arguments]
        if name == "fail":
            raise {"KeyError": KeyError, "ValueError": ValueError, "Odd": OddError}[arguments[0]]("why")
        if name == "slow":
            time.sleep(arguments[0])
        if name == "engine":
            raise EngineError("the engine broke")
        return object() if name == "unspeakable" else None


class OddError(Exception):
    pass


TOOLS = {"echo": "Gives back what it got.", "fail": "", "slow": "", "unspeakable": "", "engine": ""}


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def tooled(short_pool: SandboxPool, host: Host) -> Iterator[Session]:
    with short_pool.session(tools=TOOLS, call_tool=host) as session:
        yield session


def test_values_cross_both_ways(tooled: Session, host: Host) -> None:
    result = tooled.run("echo(1, 'é', None, (2.5,), k={'a': [True]})")
    assert result.text == "[[1, 'é', None, (2.5,)], {'k': {'a': [True]}}]"
    assert host.calls == [("echo", [1, "é", None, (2.5,)], {"k": {"a": [True]}})]
    assert result.tool_calls[0].arguments == (1, "é", None, {"$type": "tuple", "items": [2.5]})


def test_they_can_be_called_from_nested_functions_and_threads(tooled: Session, host: Host) -> None:
    code = (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "def f(n):\n    return (lambda: echo(n)[0][0])()\n"
        "with ThreadPoolExecutor(8) as e: r = list(e.map(f, range(50)))\nsum(r)"
    )
    assert tooled.run(code).text == "1225"
    assert len(host.calls) == 50


def test_they_look_like_functions(tooled: Session) -> None:
    assert tooled.run("echo.__name__, echo.__doc__").text == "('echo', 'Gives back what it got.')"


def test_every_call_is_recorded(tooled: Session) -> None:
    result = tooled.run("echo(1)\ntry:\n    fail('ValueError')\nexcept ValueError: pass")
    first, second = result.tool_calls
    assert (first.name, first.arguments, first.value, first.error) == ("echo", (1,), [[1], {}], None)
    assert second.error is not None
    assert (second.error.type, second.error.message) == ("ValueError", "why")
    assert 0 <= first.started <= second.started


@pytest.mark.parametrize(
    ("kind", "text"), [("KeyError", "KeyError('why')"), ("ValueError", "ValueError('why')"), ("Odd", "OddError('why')")]
)
def test_exceptions_cross_as_name_and_message(tooled: Session, kind: str, text: str) -> None:
    assert tooled.run(f"fail({kind!r})").text == text
    assert tooled.run(
        f"try:\n    fail({kind!r})\nexcept Exception as e:\n    print(type(e).__mro__[1].__name__)"
    ).text in (
        "LookupError",
        "Exception",
        "RuntimeError",
    )
    traceback = tooled.run(f"import traceback\ntry: fail({kind!r})\nexcept Exception: traceback.print_exc()").text
    assert "/" not in traceback  # no path of the host


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("echo(i for i in [])", "TypeError('echo() cannot take these arguments: a generator cannot cross')"),
        (
            "class E:\n    def __reduce__(self): return print, ('unpickled',)\necho(E())",
            "TypeError('echo() cannot take these arguments: an E cannot cross')",
        ),
        ("l = []; l.append(l)\necho(l)", "TypeError('echo() cannot take these arguments: it is nested deeper than"),
        (
            "x = []\nfor _ in range(500): x = [x]\necho(x)",
            "TypeError('echo() cannot take these arguments: it is nested deeper than",
        ),
        ("echo('x' * 10**6)", "ValueError('the arguments of echo() are longer than"),
        ("unspeakable()", "TypeError('unspeakable() returned what cannot be passed on: an object cannot cross')"),
    ],
)
def test_29_what_cannot_cross_is_a_clean_error(tooled: Session, code: str, text: str) -> None:
    result = tooled.run(code)
    assert result.text.startswith(text)
    assert not result.state_lost
    assert tooled.run("echo(1)").text == "[[1], {}]"


FORGED = """
import json, os, struct
frame = next(cell.cell_contents for cell in echo.__closure__ if hasattr(cell.cell_contents, '_channel'))
def forge(arguments):
    body = json.dumps({"nonce": frame._nonce, "call": 1, "tool": "echo", "arguments": arguments}).encode()
    os.write(3, struct.pack("<I", len(body)) + body)
    return frame._channel.receive()
"""


def test_deeply_nested_forged_arguments_kill_the_session_only(tooled: Session, host: Host) -> None:
    result = tooled.run(FORGED + "forge('[[' + '[' * 500 + ']' * 500 + '],{}]')")
    assert result.state_lost
    assert host.calls == []
    assert tooled.run("echo(1)").text == "[[1], {}]"


def test_numbers_of_numpy_cross(pool: SandboxPool, host: Host) -> None:
    with pool.session(tools=TOOLS, call_tool=host) as session:
        assert (
            session.run("import numpy as np\necho(np.int64(3), np.arange(2.0))").text
            == "[[np.int64(3), array([0., 1.])], {}]"
        )


def test_waiting_for_a_tool_is_not_the_codes_time(tooled: Session) -> None:
    result = tooled.run("slow(1.4)\n'done'")
    assert result.text == "'done'"
    assert not result.timed_out
    assert result.duration < 1.4 <= result.tool_calls[0].duration


def test_a_tool_that_takes_too_long_is_a_timeout_error(tooled: Session) -> None:
    result = tooled.run("try:\n    slow(3.5)\nexcept TimeoutError as e:\n    print(e)\nx = 1")
    assert result.text == "slow() gave no answer within 2 seconds"
    assert tooled.run("x").text == "1"


def test_calls_have_a_budget(level: str, host: Host) -> None:
    limits = SandboxLimits(tool_calls=3)
    with SandboxPool(isolation=level, preload=[], limits=limits) as pool:  # type: ignore[arg-type]
        session = pool.session(tools=TOOLS, call_tool=host)
        assert (
            session.run("for i in range(5): echo(i)").text == "RuntimeError('a block may call tools at most 3 times')"
        )
        assert len(host.calls) == 3
        assert session.run("echo(9)[0][0]").text == "9"


def test_a_fault_of_the_library_is_not_shown_to_the_code(tooled: Session) -> None:
    tooled.run("x = 5")
    with pytest.raises(EngineError, match="the engine broke"):
        tooled.run("try:\n    engine()\nexcept BaseException as e:\n    print(e)")
    assert tooled.run("x").text == "5"


async def test_a_call_that_could_not_be_given_a_thread_is_not_shown_to_the_code(tooled: Session, host: Host) -> None:
    await asyncio.get_running_loop().shutdown_default_executor()
    with pytest.raises(SandboxError, match=r"call of echo\(\) could not be given a thread: Executor shutdown"):
        await tooled.run_async("try:\n    echo(1)\nexcept RuntimeError as error:\n    print(error)")
    assert host.calls == []


def test_a_call_in_time_that_could_not_be_given_a_thread_is_a_fault_of_the_sandboxs(
    tooled: Session, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def started(thread: threading.Thread) -> None:
        if thread.name == "tool echo":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", started)
    with pytest.raises(SandboxError, match=r"call of echo\(\) could not be given a thread: can't start new thread"):
        tooled.run("echo(1)")
    assert host.calls == []


def has_file(session: Session, path: str) -> bool:
    try:
        session.get(path)
    except SandboxFileError:
        return False
    return True


def test_tools_after_the_block_has_ended_are_refused(tooled: Session, host: Host) -> None:
    code = (
        FIND_WORKER + "import threading, time\nseen = []\n"
        "def late():\n    while worker._nonce: time.sleep(0.01)\n    try: echo(1)\n"
        "    except RuntimeError as e: seen.append(str(e))\n    open('done', 'w').close()\n"
        "t = threading.Thread(target=late); t.start()"
    )
    tooled.run(code)
    assert tooled.leftover_threads == 1
    assert eventually(lambda: has_file(tooled, "done"))
    assert tooled.run("t.join(); seen").text == "['echo() can be called only while a block runs']"
    assert host.calls == []


def test_a_tool_cannot_run_its_own_session(short_pool: SandboxPool) -> None:
    session: Session

    def call(_name: str, _arguments: list[Any], _keywords: dict[str, Any]) -> Any:
        return session.run("1").text

    session = short_pool.session(tools=["again"], call_tool=call)
    with session, pytest.raises(ProtocolError, match="runs another block"):
        session.run("again()")


@pytest.mark.parametrize("tools", ["one", ["not a name"], ["class"], {"a": 1}, [3]])
def test_bad_tools_are_refused(short_pool: SandboxPool, tools: Any) -> None:
    with pytest.raises(ConfigurationError, match="tools"):
        short_pool.session(tools=tools, call_tool=lambda *_: None)
    with pytest.raises(ConfigurationError, match="call_tool"):
        short_pool.session(tools=["fine"])


class TestAsync:
    async def test_coroutines_and_plain_functions(self, short_pool: SandboxPool, host: Host) -> None:
        async def call(name: str, arguments: list[Any], keywords: dict[str, Any]) -> Any:
            await asyncio.sleep(0.01)
            return host(name, arguments, keywords)

        for call_tool in (call, host):
            with await short_pool.session_async(tools=TOOLS, call_tool=call_tool) as session:
                assert (await session.run_async("echo(1)")).text == "[[1], {}]"
                assert (await session.run_async("fail('KeyError')")).text == "KeyError('why')"
                with pytest.raises(EngineError):
                    await session.run_async("engine()")

    async def test_tool_time_is_bounded(self, short_pool: SandboxPool) -> None:
        async def call(*_: Any) -> Any:
            await asyncio.sleep(60)

        with await short_pool.session_async(tools=["wait"], call_tool=call) as session:
            result = await session.run_async("wait()")
            assert result.text == "TimeoutError('wait() gave no answer within 2 seconds')"

    @pytest.mark.parametrize("kind", ["function", "object"])
    async def test_many_sessions_at_once_need_no_threads(self, short_pool: SandboxPool, kind: str) -> None:
        async def call(_name: str, arguments: list[Any], _keywords: dict[str, Any]) -> Any:
            await asyncio.sleep(0.05)
            threads.update(threading.enumerate())
            return arguments[0]

        class Caller:
            async def __call__(self, name: str, arguments: list[Any], keywords: dict[str, Any]) -> Any:
                return await call(name, arguments, keywords)

        call_tool = call if kind == "function" else Caller()

        async def row(number: int) -> str:
            with await short_pool.session_async(tools=["same"], call_tool=call_tool) as session:
                await session.run_async(f"x = same({number})")
                return (await session.run_async("x")).text

        threads: set[threading.Thread] = set()
        before = set(threading.enumerate())
        texts = await asyncio.gather(*(row(number) for number in range(60)))
        assert texts == [str(number) for number in range(60)]
        assert threads <= before

    async def test_cancelling_a_block_loses_no_state_of_earlier_ones(self, short_pool: SandboxPool) -> None:
        with await short_pool.session_async() as session:
            await session.run_async("x = 1")
            task = asyncio.create_task(session.run_async("x = 2\nimport time; time.sleep(30)"))
            await asyncio.sleep(0.2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await session.run_async("x")).text == "1"

    async def test_timeouts_are_the_same(self, short_pool: SandboxPool) -> None:
        with await short_pool.session_async() as session:
            await session.run_async("x = 1")
            assert (await session.run_async("while True: pass")).timed_out
            killed = await session.run_async("sum(range(10**13))")
            assert killed.timed_out
            assert killed.state_lost
            assert (await session.run_async("x")).text.endswith("\n1")
