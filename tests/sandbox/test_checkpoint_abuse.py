"""What code does in a block that can be taken back to get at what would be gone back to, and what is left over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from midstream.sandbox import SandboxLimits, SandboxPool, Session
from tests.sandbox.hosts import environment
from tests.sandbox.leftovers import Held, children_of, eventually, folders, lives, own_temporary_folder
from tests.sandbox.test_fork_abuse import RAW

__all__ = ["own_temporary_folder"]  # for every test here

SHORT = SandboxLimits(wall_time=1.0, grace=0.6, memory=768 << 20, threads=24)


@pytest.fixture(scope="module")
def pool(level: str) -> Iterator[SandboxPool]:
    with SandboxPool(isolation=level, forkable=True, checkpoint=True, limits=SHORT, preload=[]) as pool:
        yield pool


@pytest.fixture
def session(pool: SandboxPool) -> Iterator[Session]:
    with pool.session(seed=0) as session:
        session.run(RAW)
        yield session


def test_a_copy_cannot_reach_what_stands_still(session: Session) -> None:
    session.run("x = 1; f = open('f', 'w'); f.write('before'); f.flush(); handle = os.open('.', os.O_PATH)")
    session.run("before = os.getpid()")
    assert session.run("os.getppid() == before").text == "True"
    for reach in (
        "call('kill', other, 9)",
        "call('kill', other, 19)",
        "call('kill', -1, 9)",
        "[call('capget', n, 0) for n in range(6)]",
        "call('chroot', b'.')",
        "call('clone', 0x1200011, 0, 0, 0, 0)",
    ):
        assert "E" in session.run(f"other = os.getppid(); {reach}").text
    reading = "libc.syscall(310, os.getppid(), 0, 0, 0, 0, 0), libc.syscall(101, 16, os.getppid(), 0, 0)"
    assert session.run(reading).text == "(-1, -1)"
    for what in ("environ", "mem", "fd"):
        assert session.run(f"os.open(f'/proc/{{os.getppid()}}/{what}', os.O_RDONLY)").error is not None
    code = "os.fchdir(handle); os.unlink('f'); f.write('HARM'); f.flush(); open('new', 'w').close(); os.abort()"
    assert session.run(code).rolled_back
    assert session.run("os.listdir('.'), open('f').read(), f.tell()").text == "(['f'], 'before', 6)"


def test_a_signal_does_not_wake_what_stands_still(pool: SandboxPool, session: Session) -> None:
    """As a time-out would, were it sent to the wrong process; and timers of its own that run out meanwhile."""
    session.run(
        "import signal, time\nrung = []\nsignal.signal(signal.SIGALRM, lambda *_: rung.append(os.getpid()))\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.3, 0.1)"
    )
    started = threading.Event()

    def call(_name: str, _arguments: list[object], _keywords: dict[str, object]) -> object:
        started.set()
        return None

    with pool.session(tools=["ready"], call_tool=call) as other:
        other.run("x = 1")

        def interrupt() -> None:
            started.wait(10)
            standing = other._interpreter.checkpoint
            assert standing is not None
            for _ in range(5):
                standing.interrupt()
                time.sleep(0.05)

        thread = threading.Thread(target=interrupt)
        thread.start()
        result = other.run("x = 2; ready()\nimport time; time.sleep(0.5); import os; os.abort()")
        thread.join()
        assert result.rolled_back
        assert other.run("x").text == "1"
    result = session.run("signal.setitimer(signal.ITIMER_REAL, 0)\nx = 5\nos.abort()")
    assert result.rolled_back
    assert session.run("signal.setitimer(signal.ITIMER_REAL, 0); 'x' in globals()").text == "False"


HOOKS = {
    "a copy that never reports": ("lambda: __import__('time').sleep(60)", "did not report"),
    "a copy that dies": ("lambda: os._exit(0)", "did not report"),
    "a copy that does not move": ("lambda: (os.chdir('/'), call('capget', 1, 0), call('capget', 2, 0))", "its own"),
    "a thread in the copy": ("lambda: __import__('_thread').start_new_thread(pause, ())", "threads running"),
}


@pytest.mark.parametrize("what", HOOKS)
def test_a_copy_that_does_not_play_along(session: Session, what: str) -> None:
    function, reason = HOOKS[what]
    session.run(
        "x = 1; import time; pause = lambda: time.sleep(60)\n"
        f"os.register_at_fork(after_in_child=lambda: on and ({function})()); on = True"
    )
    result = session.run("x += 1; open('f', 'w').close(); x")
    assert result.text == "2"
    assert reason in (result.no_checkpoint or "")
    result = session.run("on = False; os.listdir('.')")
    assert result.text == "['f']"
    result = session.run("x")
    assert (result.text, result.no_checkpoint) == ("2", None)


def test_an_original_that_does_not_stand_still_is_killed(session: Session) -> None:
    session.run("x = 1")
    session.run("os.register_at_fork(after_in_parent=lambda: __import__('time').sleep(60))", checkpoint=False)
    result = session.run("x")  # what came last was not run again
    assert (result.text.splitlines()[-1], result.state_lost) == ("1", True)
    assert "did not come back" in (result.no_checkpoint or "")
    result = session.run("x")
    assert (result.text, result.no_checkpoint) == ("1", None)


def test_deep_and_sparse_trees(session: Session) -> None:
    session.run(
        "top = os.getcwd()\nfor _ in range(150): os.mkdir('d'); os.chdir('d')\n"
        "with open('sparse', 'wb') as f: f.seek(40 << 20); f.write(b'end')\n"
        "where = os.getcwd(); os.chdir(top)"
    )
    result = session.run("os.unlink(where + '/sparse'); os.abort()")
    assert (result.rolled_back, result.no_checkpoint) == (True, None)
    result = session.run("s = os.stat(where + '/sparse'); s.st_size, s.st_blocks < 100")
    assert result.text == f"({(40 << 20) + 3}, True)"
    session.run("os.chdir(where)\nfor _ in range(100): os.mkdir('d'); os.chdir('d')\nos.chdir(top)")
    result = session.run("1")
    assert (result.text, result.no_checkpoint) == ("1", "its code has made too many folders inside one another")


def test_processor_time_is_that_of_the_session(level: str) -> None:
    limits = SandboxLimits(wall_time=20.0, cpu_time=2.0)
    settings = {"isolation": level, "forkable": True, "checkpoint": True, "limits": limits, "preload": []}
    with SandboxPool(**settings) as pool, pool.session() as session:  # type: ignore[arg-type]
        burn = "import time\nend = time.process_time() + 0.7\nwhile time.process_time() < end: pass"
        results = [session.run(burn) for _ in range(3)] + [session.run(burn.replace("0.7", "9"))]
        assert [result.breached for result in results] == [None, None, None, "cpu_time"]
        assert results[-1].no_checkpoint == "it has used up its processor time"
        assert (results[-1].cpu_time or 0.0) < 2


@pytest.mark.skipif(
    os.geteuid() != 0, reason="threads are counted by user id, of which only root can give each its own"
)
def test_threads_stay_bounded(session: Session) -> None:
    for _ in range(10):
        assert session.run("os.abort()").rolled_back
        assert session.run("1").no_checkpoint is None
    code = (
        "import threading\ndone = threading.Event(); n = 0\ntry:\n"
        "    for n in range(100): threading.Thread(target=done.wait).start()\nexcept RuntimeError: pass\ndone.set()\nn"
    )
    assert int(session.run(code).text) <= 24 + 2


def test_hundreds_of_blocks_leave_nothing(pool: SandboxPool) -> None:
    def memory_file_systems() -> int:
        return sum(" tmpfs " in line for line in Path("/proc/self/mountinfo").read_text().splitlines())

    with pool.session(seed=0) as session:
        session.run("import os; n = 0; open('f', 'w').write('x' * 100)")
        before, mounts = Held.now(), memory_file_systems()
        for number in range(150):
            assert session.run("n += 1").error is None
            assert session.run("n += 1; os.unlink('f'); os._exit(1)").rolled_back
            if number % 50 == 25:
                assert eventually(lambda: len(before.new().processes) <= 1)
        assert session.run("n, os.listdir('.')").text == "(150, ['f'])"
        # The copy that it now is, and what that is held by.
        assert eventually(lambda: before.new().within(processes=1, descriptors=2)), before.new()
        assert memory_file_systems() == mounts
        # The warden's own: what it held for every copy, it has let go of.
        if os.geteuid() == 0:
            wardens = [n for n in children_of(os.getpid()) if len(children_of(n)) >= 1]
            assert wardens
            assert max(len(os.listdir(f"/proc/{n}/fd")) for n in wardens) < 60


def test_a_warden_that_is_killed_takes_all_with_it(pool: SandboxPool) -> None:
    told: list[int] = []

    def call(_name: str, _arguments: list[object], _keywords: dict[str, object]) -> object:
        standing = session._interpreter.checkpoint
        assert standing is not None
        number = int(
            next(
                line.split()[1]
                for line in Path(f"/proc/self/fdinfo/{standing._pidfd}").read_text().splitlines()
                if line.startswith("Pid:")
            )
        )
        status = Path(f"/proc/{number}/status").read_text()
        warden = int(next(line.split()[1] for line in status.splitlines() if line.startswith("PPid:")))
        told.append(warden)
        family = children_of(warden)
        os.kill(warden, signal.SIGKILL)
        assert eventually(lambda: not any(lives(process) for process in family))
        return None

    with pool.session(tools=["tool"], call_tool=call) as session:
        session.run("x = 1")
        session.run("x += 1")
        result = session.run("x += 1; tool()")
        assert result.error is not None
        assert (result.rolled_back, result.state_lost) == (False, True)
        assert eventually(lambda: not os.path.exists(f"/proc/{told[0]}"))
        result = session.run("x")
        assert (result.text, result.state_lost, result.no_checkpoint) == ("2", False, None)


HOST = """
import sys, threading, time
from midstream.sandbox import SandboxPool
pool = SandboxPool(isolation=sys.argv[1], forkable=True, checkpoint=True, preload=[]).start()
def call(*_):
    print("up", flush=True)
    time.sleep(60)
session = pool.session(tools=["tool"], call_tool=call)
session.run("open('f', 'w').write('x'); tool(); sum(range(10**13))")
"""


def test_a_host_that_is_killed_leaves_nothing(level: str) -> None:
    before = folders()
    with subprocess.Popen([sys.executable, "-c", HOST, level], env=environment(), stdout=subprocess.PIPE) as host:
        assert host.stdout is not None
        assert host.stdout.readline() == b"up\n"
        family = children_of(host.pid)
        assert len(family) >= 4  # the fork server, the warden, what stands still and its copy
        host.send_signal(signal.SIGKILL)
        host.wait()
    assert eventually(lambda: not any(lives(process) for process in family))
    assert eventually(lambda: folders() <= before)
