"""Blocks that can be taken back: what they do to a session when they live, and that it is nothing when they die."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from midstream.errors import ConfigurationError, MidstreamError
from midstream.sandbox import Guardrails, SandboxLimits, SandboxPool, Session
from midstream.testing import check_sandbox
from tests.sandbox.leftovers import eventually

SHORT = SandboxLimits(wall_time=1.0, grace=0.6, memory=768 << 20, threads=24)
UNDONE = "What this block did is undone: all names and files are as they were before it."

DEATHS = {
    "a loop in C": ("sum(range(10**13))", "ran longer than 1 seconds and could not be interrupted"),
    "an exit": ("import os; os._exit(3)", "exited with status 3"),
    "an abort": ("import os; os.abort()", "SIGABRT"),
    "a null pointer": ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
    "a kill": ("import os; os.kill(os.getpid(), 9)", "SIGKILL"),
    "garbage on the channel": ("import os; os.write(3, b'garbage' * 10); import time; time.sleep(9)", "interfered"),
    "a closed channel": ("import os; os.close(3)", "exited with status 1"),
}


@pytest.fixture(scope="module")
def pool(level: str) -> Iterator[SandboxPool]:
    with SandboxPool(isolation=level, forkable=True, checkpoint=True, limits=SHORT, preload=["numpy"]) as pool:
        yield pool


@pytest.fixture
def session(pool: SandboxPool) -> Iterator[Session]:
    with pool.session(seed=0) as session:
        yield session


BEFORE = (
    "import os, random, numpy\n"
    "home = os.getcwd(); where = lambda: os.path.relpath(os.getcwd(), home)\n"
    "x = [1, 2]; random.random(); numpy.random.random()\n"
    "os.makedirs('a/b'); open('a/b/kept', 'w').write('kept'); open('gone', 'w').write('still here')\n"
    "log = open('log', 'w+'); log.write('0123456789'); log.flush(); log.seek(4)\n"
    "raw = os.open('raw', os.O_RDWR | os.O_CREAT); os.write(raw, b'abcdef'); os.lseek(raw, 2, 0); twin = os.dup(raw)\n"
    "handle = os.open('.', os.O_PATH); os.chdir('a')"
)
HARM = (
    "x.append(3); y = 1; random.seed(5); numpy.random.seed(5)\n"
    "open('b/kept', 'w').write('overwritten'); os.unlink('../gone'); os.makedirs('b/c/d')\n"
    "open('b/c/new', 'w').close()\n"
    "log.write('HARM'); log.flush(); log.truncate(2); os.read(raw, 3); os.close(twin); os.chdir('/')\n"
)
LOOK = (
    "print(x, 'y' in globals(), where())\n"
    "print(sorted(os.listdir('.')), sorted(os.listdir('b')), sorted(os.listdir('..')))\n"
    "print(open('b/kept').read(), open('../gone').read(), open('../log').read(), log.tell(), log.read(3))\n"
    "print(os.fstat(handle).st_mode)\n"
    "print(os.read(raw, 1), os.read(twin, 1), os.lseek(raw, 0, 1))\n"
    "random.random(), float(numpy.random.random())"
)


@pytest.mark.parametrize("death", DEATHS)
def test_a_block_that_is_killed_is_undone(pool: SandboxPool, death: str) -> None:
    code, told = DEATHS[death]
    with pool.session(seed=0) as session, pool.session(seed=0) as untouched:
        session.run(BEFORE)
        untouched.run(BEFORE, checkpoint=False)
        number = session.process_id
        result = session.run(HARM + code)
        assert result.error is not None
        assert result.error.type == "Killed"
        assert told in result.text
        assert result.text.endswith(UNDONE)
        assert (result.rolled_back, result.state_lost, result.no_checkpoint) == (True, False, None)
        assert result.timed_out == (result.breached == "wall_time") == (death == "a loop in C")
        assert session.process_id == number  # no other had to take its place
        assert session.run(LOOK).text == untouched.run(LOOK, checkpoint=False).text


def test_a_block_that_lives_is_as_any_other(pool: SandboxPool) -> None:
    blocks = [
        BEFORE,
        LOOK,
        HARM,
        "x, y, os.getcwd(), os.path.exists(f'{home}/gone'), open(f'{home}/log').read()",
        "print('out'); os.write(2, b'raw\\n'); 1/0",
        "import sys; sys.exit(3)",
        "def f(n): return n and 1 + f(n - 1)\nf(10**6)",
        "import inspect; len(inspect.stack(0))",
        "def syntax(",
        "def deep(n):\n    try: return deep(n + 1)\n    except RecursionError: return n\ndeep(0)",
        "open('never', 'w').close(); os.path.exists('never')",
        "os.lseek(raw, 0, 1), log.tell(), random.random()",
    ]
    with pool.session(seed=7) as protected, pool.session(seed=7) as plain:
        for block in blocks:
            with_it, without = protected.run(block), plain.run(block, checkpoint=False)
            assert with_it.text == without.text, block
            assert with_it.error == without.error
            assert (with_it.no_checkpoint, with_it.rolled_back) == (None, False)


def test_the_same_for_asyncio(pool: SandboxPool) -> None:
    async def run() -> None:
        session = await pool.session_async(seed=0)
        with session:
            await session.run_async("x = 1; open('f', 'w').write('one')")
            result = await session.run_async("x = 2; open('f', 'w').write('two'); import os; os.abort()")
            assert result.rolled_back
            assert (await session.run_async("x, open('f').read()")).text == "(1, 'one')"

    asyncio.run(run())


def test_a_block_that_is_interrupted_keeps_its_state(session: Session) -> None:
    session.run("x = 1")
    result = session.run("x = 2; open('f', 'w').close()\nwhile True: pass")
    assert (result.timed_out, result.rolled_back, result.state_lost) == (True, False, False)
    assert session.run("import os; x, os.listdir('.')").text == "(2, ['f'])"


def test_a_block_that_is_cancelled_is_undone(pool: SandboxPool) -> None:
    async def run() -> None:
        session = await pool.session_async(seed=0)
        with session:
            await session.run_async("x = 1")
            number = session.process_id
            running = asyncio.create_task(session.run_async("x = 2; open('f', 'w').close()\nwhile True: pass"))
            while session._interpreter.checkpoint is None:
                await asyncio.sleep(0.01)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            assert session.process_id == number
            assert (await session.run_async("import os; x, os.listdir('.')")).text == "(1, [])"

    asyncio.run(run())


def test_a_fault_of_the_hosts_in_a_tool_undoes_the_block(pool: SandboxPool) -> None:
    def call(_name: str, _arguments: list[object], _keywords: dict[str, object]) -> object:
        raise MidstreamError("the host's own fault")

    with pool.session(tools=["tool"], call_tool=call) as session:
        session.run("x = 1")
        with pytest.raises(MidstreamError, match="own fault"):
            session.run("x = 2\ntool()")
        assert session.run("x").text == "1"


def test_tools_are_called_from_a_copy_as_from_any(pool: SandboxPool) -> None:
    calls = []

    def call(name: str, arguments: list[object], _keywords: dict[str, object]) -> object:
        calls.append((name, arguments))
        if arguments == ["bad"]:
            raise ValueError("no")
        return len(calls)

    with pool.session(tools=["tool"], call_tool=call) as session:
        result = session.run("kept = tool('a'), tool('b')\nkept")
        assert result.text == "(1, 2)"
        assert [item.value for item in result.tool_calls] == [1, 2]
        assert session.run("tool('bad')").text == "ValueError('no')"
        result = session.run("kept = tool('c')\nimport os; os.abort()")
        assert (result.rolled_back, [item.value for item in result.tool_calls]) == (True, [4])
        assert session.run("kept").text == "(1, 2)"


def test_files_and_forks_after_checkpoints(session: Session) -> None:
    session.run("x = 1")
    session.run("import os; os.abort()")
    session.put("data/in", b"put")
    session.run("open('data/in', 'a').write(' and more'); x += 1")
    assert session.run("import os; os._exit(1)").rolled_back
    assert session.get("data/in") == b"put and more"
    one, two = session.fork(2)
    assert one.run("x += 1; import os; os.abort()").rolled_back
    assert one.run("x += 1; x").text == "3"
    assert two.run("x, open('data/in').read()").text == "(2, 'put and more')"
    session.close()
    assert two.run("x += 5; x").text == "7"


def test_a_killed_block_is_no_past(session: Session) -> None:
    """What is rebuilt after a death without a checkpoint is the session without the blocks that were undone."""
    session.run("x = 1")
    session.run("x = 2; import os; os.abort()")
    session.run("x += 1; x")
    result = session.run("import os; os.abort()", checkpoint=False)
    assert (result.rolled_back, result.state_lost) == (False, True)
    result = session.run("x")
    assert (result.text, result.state_lost) == ("2", False)


def test_a_killed_block_of_a_history_is_not_run_again(pool: SandboxPool) -> None:
    with pool.session(seed=0) as session:
        codes = ("x = 1", "x = 2; import os; os.abort()", "x += 1; x")
        history = [(code, session.run(code)) for code in codes]
    assert [result.rolled_back for _, result in history] == [False, True, False]
    with pool.session(seed=0, history=history) as session:
        result = session.run("x")
        assert (result.text, result.state_lost) == ("2", False)


def test_bad_code_costs_nothing(session: Session) -> None:
    session.run("x = 1")
    number = session.process_id
    with pytest.raises(ConfigurationError, match="code=5"):
        session.run(5)  # type: ignore[arg-type]
    assert session.process_id == number


def test_guardrails_hold_in_copies(level: str) -> None:
    settings = {"isolation": level, "forkable": True, "checkpoint": True, "preload": [], "guardrails": Guardrails()}
    with SandboxPool(**settings) as pool, pool.session() as session:  # type: ignore[arg-type]
        for _ in range(2):
            assert session.run("import os").text.endswith("Importing system and network modules is blocked')")
            assert session.run("open('/etc/passwd')").text.endswith("temporary working directory is blocked')")
            assert session.run("open('f', 'w').write('x'); open('f').read()").text == "'x'"


def test_timers_go_on_in_the_copy(session: Session) -> None:
    session.run(
        "import signal, time\nrung = []\nsignal.signal(signal.SIGALRM, lambda *_: rung.append(1))\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.2)"
    )
    assert session.run("time.sleep(0.4); rung").text == "[1]"


REFUSED = {
    "threads": (
        "import threading; e = threading.Event(); t = threading.Thread(target=e.wait); t.start()",
        "threads running",
        "e.set(); t.join()",
    ),
    "shared memory": ("import mmap; m = mmap.mmap(-1, 4096)", "shared between processes", "m.close()"),
    "a deleted file": ("import os; f = open('f', 'w'); os.unlink('f')", "has been deleted", "f.close()"),
    "a pipe": ("import os; r, w = os.pipe()", "pipes or sockets", "os.close(r); os.close(w)"),
    "an event loop": ("import asyncio; l = asyncio.new_event_loop()", "pipes or sockets", "l.close()"),
    "what cannot be reopened": (
        "import os; f = os.open('f', os.O_CREAT | os.O_RDWR, 0)",
        "cannot be opened again",
        "os.close(f); os.unlink('f')",
    ),
}


def test_signals_that_come_as_the_copy_is_made(session: Session) -> None:
    session.run(
        "import signal\nrung = 0\ndef ring(*_):\n    global rung\n    rung += 1\n\n"
        "signal.signal(signal.SIGALRM, ring)\nsignal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)"
    )
    results = [session.run("rung") for _ in range(20)]
    assert {result.no_checkpoint for result in results} == {None}
    rung = [int(result.text) for result in results]
    assert rung == sorted(rung)
    assert eventually(lambda: int(session.run("rung").text) > rung[-1])


def test_a_timer_that_rings_as_the_copy_is_made_rings_in_the_copy_and_goes_on(session: Session) -> None:
    session.run(
        "import signal, time\nrung = []\nsignal.signal(signal.SIGALRM, lambda *_: rung.append(1))\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)\n"
        "while not signal.sigpending(): pass"
    )
    result = session.run("signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])\nlen(rung) > 0")
    assert (result.text, result.no_checkpoint) == ("True", None)
    assert session.run("while len(rung) < 5: time.sleep(0.001)").error is None


@pytest.mark.parametrize("what", REFUSED)
def test_where_there_can_be_no_copy_it_says_so(session: Session, what: str) -> None:
    code, reason, cure = REFUSED[what]
    session.run("x = 1")
    assert session.run(code).error is None
    result = session.run("x += 1; x")
    assert result.text == "2"
    assert reason in (result.no_checkpoint or "")
    assert not result.rolled_back
    result = session.run(cure)
    assert result.error is None
    result = session.run("x")
    assert (result.text, result.no_checkpoint) == ("2", None)
    session.run(code)
    result = session.run("import os; os.abort()")
    assert (result.state_lost, result.rolled_back) == (True, False)
    assert reason in (result.no_checkpoint or "")
    assert session.run("x").text == "2"  # rebuilt


def test_it_must_be_asked_for_in_a_pool_that_can() -> None:
    with pytest.raises(ConfigurationError, match="checkpoint=1"):
        SandboxPool(forkable=True, checkpoint=1)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="forkable=True"):
        SandboxPool(checkpoint=True)
    with SandboxPool(preload=[]) as pool, pool.session() as session:
        with pytest.raises(ConfigurationError, match="forkable=True"):
            session.run("1", checkpoint=True)
        with pytest.raises(ConfigurationError, match="checkpoint='yes'"):
            session.run("1", checkpoint="yes")  # type: ignore[arg-type]
        assert session.run("1", checkpoint=False).text == "1"


def test_a_pool_with_checkpoints_is_a_sandbox_like_any(level: str) -> None:
    settings = {"isolation": level, "forkable": True, "checkpoint": True, "preload": []}
    outcomes = check_sandbox(lambda limits: SandboxPool(**settings, limits=limits))  # type: ignore[arg-type]
    assert all(outcome.passed for outcome in outcomes)
