"""Nothing is left behind: processes, descriptors, threads, folders, however it ends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator

import pytest

from midstream.errors import ProtocolError, SandboxDied
from midstream.sandbox import SandboxPool, Session
from midstream.sandbox.fork_server import new_channel
from tests.sandbox.hosts import environment
from tests.sandbox.leftovers import NOTHING, Held, children_of, eventually, folders, lives, own_temporary_folder

__all__ = ["own_temporary_folder"]  # for every test here


@pytest.fixture
def own_pool(level: str) -> Iterator[SandboxPool]:
    with SandboxPool(isolation=level, preload=[]) as pool:  # type: ignore[arg-type]
        yield pool


HOSTILE_TREE = """
import os
for _ in range(300):
    os.mkdir('d'); open('f', 'w').close(); os.chdir('d')
os.mkdir('closed', 0)
"""


def test_after_close_all_is_as_before(level: str) -> None:
    before = Held.now()
    pool = SandboxPool(isolation=level, preload=[])  # type: ignore[arg-type]
    with pool:
        sessions = [pool.session() for _ in range(10)]
        for session in sessions:
            session.run("open('a', 'w').write('x')")
        sessions[0].run(HOSTILE_TREE)
        sessions[1].run("import os; os.abort()")
        sessions[2].close()
        sessions[2].close()
    pool.close()
    with pytest.raises(ProtocolError, match="closed"):
        pool.session()
    with pytest.raises(ProtocolError, match="closed"):
        sessions[3].run("1")
    assert before.new() == NOTHING


def test_a_closed_session_takes_its_process_and_folder_with_it(own_pool: SandboxPool) -> None:
    with own_pool.session():  # so that whatever is made once is there
        pass
    before = Held.now()
    for _ in range(20):
        with own_pool.session() as session:
            session.run("open('file', 'w').write('x')")
            session.run(HOSTILE_TREE.replace("300", "5"))
    assert eventually(lambda: before.new() == NOTHING), before.new()


def test_a_session_that_nobody_holds_ends(own_pool: SandboxPool) -> None:
    own_pool.session().close()  # so that whatever is made once is there
    before = Held.now()
    session: Session | None = own_pool.session()
    assert session is not None
    session.run("1")
    assert before.new().processes
    del session
    gc.collect()
    assert eventually(lambda: before.new() == NOTHING), before.new()


def test_a_temporary_folder_that_is_closed_to_others(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    os.chmod(tempfile.gettempdir(), 0o700)
    with SandboxPool(isolation=level, preload=[]) as pool, pool.session() as session:  # type: ignore[arg-type]
        code = "import os\nopen('file', 'w').write('here')\nopen(os.path.join(os.getcwd(), 'file')).read()"
        assert session.run(code).text == "'here'"


HOST = """
import sys, time
from midstream.sandbox import SandboxPool
pool = SandboxPool(isolation=sys.argv[1], preload=[]).start()
sessions = [pool.session() for _ in range(4)]
for session in sessions:
    session.run("open('a', 'w').write('x')")
def call(*_):
    print("up", flush=True)
busy = pool.session(tools=["up"], call_tool=call)
busy.run("import signal; signal.signal(2, signal.SIG_IGN)\\nup()\\nwhile True: pass")
"""


def test_32_a_host_that_is_killed_leaves_nothing(level: str) -> None:
    before = folders()
    with subprocess.Popen([sys.executable, "-c", HOST, level], env=environment(), stdout=subprocess.PIPE) as host:
        assert host.stdout is not None
        assert host.stdout.readline() == b"up\n"
        family = children_of(host.pid)
        assert len(family) >= 6
        host.send_signal(signal.SIGKILL)
        host.wait()
    assert eventually(lambda: not any(os.path.exists(f"/proc/{process}") for process in family))
    assert eventually(lambda: folders() <= before)


def test_32_also_when_a_fork_of_the_host_lives_on(level: str) -> None:
    """A forked data loader holds copies of the host's descriptors."""
    program = HOST.replace("def call", "import os\nif os.fork() == 0: time.sleep(600); os._exit(0)\ndef call")
    with subprocess.Popen([sys.executable, "-c", program, level], env=environment(), stdout=subprocess.PIPE) as host:
        assert host.stdout is not None
        assert host.stdout.readline() == b"up\n"
        below = children_of(host.pid)
        servers = {process for process in below if b"bootstrap.py" in command_line(process)}
        assert len(servers) >= 6
        host.send_signal(signal.SIGKILL)
        host.wait()
        assert eventually(lambda: not any(os.path.exists(f"/proc/{process}") for process in servers))
        (fork,) = (process for process in below if b"SandboxPool" in command_line(process))
        assert lives(fork)
        os.kill(fork, signal.SIGKILL)


def command_line(process: int) -> bytes:
    try:
        with open(f"/proc/{process}/cmdline", "rb") as file:
            return file.read()
    except OSError:
        return b""


def kill_fork_server(pool: SandboxPool) -> None:
    server = pool._server
    assert server is not None
    assert server._process is not None
    server._process.send_signal(signal.SIGKILL)
    assert eventually(lambda: server.gone)


def test_the_death_of_the_fork_server_is_survived(own_pool: SandboxPool) -> None:
    with own_pool.session(seed=1) as session:
        session.run("import random\nx = random.random()")
        expected = session.run("x").text
        kill_fork_server(own_pool)
        result = session.run("x")
        assert (result.text, result.state_lost) == (expected, False)
        kill_fork_server(own_pool)
        with own_pool.session() as another:
            assert another.run("1").text == "1"


def test_a_block_during_which_the_fork_server_dies_runs_again(own_pool: SandboxPool) -> None:
    calls: list[str] = []

    def call(name: str, _arguments: list[object], _keywords: dict[str, object]) -> int:
        calls.append(name)
        if len(calls) == 2:
            kill_fork_server(own_pool)
        return len(calls)

    with own_pool.session(tools=["count"], call_tool=call) as session:
        session.run("y = 5")
        result = session.run("a = count()\nb = count()\nimport time; time.sleep(0.3)\na, b, y")
        assert result.text == "(1, 2, 5)"
        assert len(calls) == 2


def test_where_that_fails_too_it_raises(own_pool: SandboxPool, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more(*_: object, **__: object) -> object:
        raise SandboxDied("no more of them")

    with own_pool.session() as session:
        session.run("x = 1")
        kill_fork_server(own_pool)
        monkeypatch.setattr(own_pool, "start_process", no_more)
        with pytest.raises(SandboxDied, match="no more of them"):
            session.run("x")
        monkeypatch.undo()
        assert session.run("x").text == "1"


@pytest.mark.parametrize("gone", [1, 2])
async def test_a_session_that_is_gone_before_it_is_ready_is_started_once_more(
    own_pool: SandboxPool, monkeypatch: pytest.MonkeyPatch, gone: int
) -> None:
    own_pool.start()
    server = own_pool._server
    assert server is not None

    def untaken(*_: object) -> socket.socket:
        ours, theirs = new_channel()
        theirs.close()
        left.pop()
        if not left:
            monkeypatch.undo()
        return ours

    async def untaken_async(*_: object) -> socket.socket:
        return untaken()

    fails = pytest.raises(SandboxDied, match="gone") if gone == 2 else contextlib.nullcontext()
    left = [None] * gone
    monkeypatch.setattr(server, "request", untaken)
    with fails, own_pool.session() as session:
        assert session.run("1 + 1").text == "2"
    left = [None] * gone
    monkeypatch.setattr(server, "request_async", untaken_async)
    with fails, await own_pool.session_async() as session:
        assert (await session.run_async("1 + 1")).text == "2"
    assert own_pool._server is server


async def test_the_same_for_asyncio(own_pool: SandboxPool) -> None:
    with await own_pool.session_async() as session:
        await session.run_async("x = 1")
        kill_fork_server(own_pool)
        assert (await session.run_async("x")).text == "1"


def test_sessions_from_many_threads(own_pool: SandboxPool) -> None:
    texts: list[str] = []

    def row(number: int) -> None:
        with own_pool.session() as session:
            session.run(f"x = {number}")
            texts.append(session.run("x").text)

    threads = [threading.Thread(target=row, args=(number,)) for number in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(texts, key=int) == [str(number) for number in range(30)]


def test_a_pool_outlives_the_thread_that_started_it(level: str) -> None:
    """The kernel can be asked to end children with their parent, and takes the thread that made them for that."""
    pool = SandboxPool(isolation=level, preload=[])  # type: ignore[arg-type]
    sessions: list[Session] = []

    def start() -> None:
        sessions.append(pool.start().session())
        sessions[0].run("x = 41")

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    with pool:
        server = pool._server
        result = sessions[0].run("x + 1")
        assert (result.text, result.state_lost) == ("42", False)
        with pool.session() as another:
            assert another.run("1").text == "1"
        assert pool._server is server  # nor had another to be started


def test_one_session_runs_one_block_at_a_time(own_pool: SandboxPool) -> None:
    begun, over = threading.Event(), threading.Event()

    def call(*_: object) -> None:
        begun.set()
        over.wait(60)

    with own_pool.session(tools=["wait"], call_tool=call) as session:
        thread = threading.Thread(target=session.run, args=("wait()",))
        thread.start()
        assert begun.wait(60)
        with pytest.raises(ProtocolError, match="runs another block"):
            session.run("1")
        over.set()
        thread.join()
        assert session.run("1").text == "1"


def test_closing_a_session_whose_block_runs(own_pool: SandboxPool) -> None:
    begun = threading.Event()
    session = own_pool.session(tools=["begun"], call_tool=lambda *_: begun.set())
    results: list[str] = []
    thread = threading.Thread(target=lambda: results.append(session.run("begun()\nwhile True: pass").text))
    thread.start()
    assert begun.wait(60)
    session.close()
    thread.join(60)
    assert not thread.is_alive()
    assert results[0].startswith("Killed: the interpreter was ended by SIGKILL")


def test_the_loop_is_free_while_code_runs(own_pool: SandboxPool) -> None:
    async def main() -> int:
        ticks = 0
        with await own_pool.session_async() as session:
            task = asyncio.create_task(session.run_async("import time; time.sleep(1)"))
            while not task.done():
                await asyncio.sleep(0.01)
                ticks += 1
        return ticks

    assert asyncio.run(main()) > 1  # were it held up, the block would be over with the first


def _use_copy(pool: SandboxPool, session: Session, answers: object) -> None:
    with pool.session() as own:
        answers.put(own.run("40 + 2").text)  # type: ignore[attr-defined]
    session.close()
    pool.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_of_the_host_does_not_end_the_originals_sessions(own_pool: SandboxPool) -> None:
    context = multiprocessing.get_context("fork")
    with own_pool.session() as session:
        session.run("x = 1")
        answers = context.SimpleQueue()
        copy = context.Process(target=_use_copy, args=(own_pool, session, answers))
        copy.start()
        copy.join(120)
        assert copy.exitcode == 0
        assert answers.get() == "42"
        assert session.run("x").text == "1"
        answers.close()


def test_leftovers_of_those_killed_together_are_swept(level: str) -> None:
    if level == "full":
        pytest.skip("working directories are in memory at this level")
    pool = SandboxPool(isolation="container", preload=[]).start()
    server = pool._server
    assert server is not None
    assert server._process is not None
    folder = server.folder
    server._process.send_signal(signal.SIGSTOP)  # so that it cannot clean up
    os.kill(server._process.pid, signal.SIGKILL)
    assert eventually(lambda: server.gone)
    assert os.path.isdir(folder)
    os.utime(folder, (0, 0))
    with SandboxPool(isolation="container", preload=[]):
        assert not os.path.exists(folder)
    pool.close()
