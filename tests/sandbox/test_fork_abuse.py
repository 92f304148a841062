"""What code does to be forked when nobody has asked, and to keep a hold on its copies when somebody has."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from midstream.errors import SandboxError
from midstream.sandbox import SandboxLimits, SandboxPool, Session
from tests.sandbox.hosts import environment
from tests.sandbox.leftovers import NOTHING, Held, children_of, eventually, folders, own_temporary_folder

__all__ = ["own_temporary_folder"]  # for every test here

SHORT = SandboxLimits(wall_time=1.0, grace=0.6, memory=768 << 20, threads=24)

# The kernel's own name for each call: what code could use in place of Python's functions.
RAW = """
import ctypes, errno, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    numbers = {
        "x86_64": dict(clone=56, fork=57, clone3=435, capget=125, capset=126, chroot=161, kill=62, seccomp=317,
            link=86, symlink=88, landlock=446),
        "aarch64": dict(clone=220, fork=-1, clone3=435, capget=90, capset=91, chroot=51, kill=129, seccomp=277,
            link=-1, symlink=-1, landlock=446),
    }[os.uname().machine]
    result = libc.syscall(numbers[name], *arguments)
    return result if result >= 0 else errno.errorcode[ctypes.get_errno()]
"""


@pytest.fixture(scope="module")
def pool(level: str) -> Iterator[SandboxPool]:
    with SandboxPool(isolation=level, forkable=True, limits=SHORT, preload=[]) as pool:  # type: ignore[arg-type]
        yield pool


@pytest.fixture
def session(pool: SandboxPool) -> Iterator[Session]:
    with pool.session(seed=0) as session:
        session.run(RAW)
        yield session


REFUSED = {
    "os.fork()": "BlockingIOError",
    "os.posix_spawn('/bin/true', ['true'], {})": "Error",
    "call('clone', 0x1200011, 0, 0, 0, 0)": "'EAGAIN'",
    "call('clone', 17, 0, 0, 0, 0)": "'EAGAIN'",
    "call('clone', 0x8011, 0, 0, 0, 0)": "'EAGAIN'",
    "call('clone', ctypes.c_ulong(0x100000000 | 0x1200011), 0, 0, 0, 0)": "'EPERM'",
    "call('clone', 0x10000011, 0, 0, 0, 0)": "'EPERM'",
    "call('fork') if sys.byteorder and os.uname().machine == 'x86_64' else 'EAGAIN'": "'EAGAIN'",
    "call('clone3', 0, 88)": "'ENOSYS'",
    "[call('capget', n, 0) for n in range(5)]": str(["EPERM"] * 5),
    "call('capset', b'\\x22\\x05\\x08\\x20' + bytes(4), b'\\xff\\xff\\xff\\xff' * 2 + bytes(16))": "'EPERM'",
    "call('capset', b'\\x22\\x05\\x08\\x20' + bytes(4), b'\\0\\0\\4\\0' * 2 + bytes(16))": "'EPERM'",
    "call('chroot', b'.')": "'EPERM'",
    "call('seccomp', 1, 8, 0)": "'EPERM'",
    "[call('kill', n, 0) for n in (1, 0, -1, os.getppid(), os.getpid() + 1, 99)]": str(["EPERM"] * 6),
    "[call('landlock', n, 0) for n in (-1, 0, 3, 63)]": str(["EPERM"] * 4),
    "open('/sandbox/x', 'w')": "Error",
    "open('/sandbox/../family/x', 'w')": "Error",
}


@pytest.mark.parametrize("code", REFUSED)
def test_what_only_the_host_can_ask_for(session: Session, code: str) -> None:
    (clone,) = session.fork()
    (grandchild,) = clone.fork()
    for each in (session, clone, grandchild):
        assert REFUSED[code] in each.run(code).text
        assert each.run("1").text == "1"


def test_processes_may_signal_themselves(session: Session) -> None:
    (clone,) = session.fork()
    code = "import signal\nseen = []\nsignal.signal(10, lambda *_: seen.append(1))\nos.kill(os.getpid(), 10)"
    code += "\nsignal.raise_signal(10)"
    for each in (session, clone):
        assert each.run(code).error is None
        assert each.run("seen").text == "[1, 1]"


def test_nothing_that_was_open_reaches_over(session: Session) -> None:
    session.run(
        "home = os.getcwd(); r, w = os.pipe(); copy = os.dup(3); import socket; a, b = socket.socketpair()\n"
        "open('file', 'w').write('parent'); handle = os.open('.', os.O_PATH); os.mkdir('d'); os.chdir('d')"
    )
    one, two = session.fork(2)
    assert one.run("os.write(w, b'x'), os.write(copy, b'x'), os.write(b.fileno(), b'x')").error is None
    assert two.run("os.read(r, 1), os.read(a.fileno(), 1)").text == "(b'', b'')"
    one.run("open('file', 'w').write('one'); open('../mine', 'w').close()")
    look = "os.listdir('.'), os.path.exists('../mine'), sorted(os.listdir(home))"
    assert session.run(look).text == "([], False, ['d', 'file'])"
    session.run("os.write(w, b'own')")
    assert session.run("os.read(r, 9)").text == "b'own'"


def test_processes_of_a_family_cannot_reach_one_another(session: Session) -> None:
    one, two = session.fork(2)
    numbers = [each.process_id for each in (session, one, two)]
    assert len(set(numbers)) == 3
    for each in (session, one, two):
        for number in numbers:
            if number != each.process_id:
                assert each.run(f"call('kill', {number}, 9)").text == "'EPERM'"
                for what in ("cwd", "fd/3", "exe"):
                    assert "Error" in each.run(f"os.readlink('/proc/{number}/{what}')").text
                for what in ("", "mem", "environ", "maps", "fd"):
                    assert "Error" in each.run(f"os.open('/proc/{number}/{what}', os.O_RDONLY)").text
                reading = f"libc.syscall(310, {number}, 0, 0, 0, 0, 0), ctypes.get_errno()"
                assert each.run(reading).text == "(-1, 1)"
    assert [each.run("1").text for each in (session, one, two)] == ["1", "1", "1"]


RACE = """
import threading
made, stop = [], threading.Event()
def race():
    while not stop.is_set():
        if isinstance(call('clone', 0x1200011, 0, 0, 0, 0), int): made.append(1)
threads = [threading.Thread(target=race) for _ in range(3)]
for thread in threads: thread.start()
"""


def test_threads_that_race_for_the_leave(session: Session) -> None:
    session.run(RACE)
    for _ in range(5):
        with pytest.raises(SandboxError, match="threads running"):
            session.fork(3)
    assert session.run("made").text == "[]"
    session.run("stop.set()\nfor thread in threads: thread.join()")
    (clone,) = session.fork()
    assert clone.run("made").text == "[]"


HOOKS = {
    "a clone that never reports": ("after_in_child", "lambda: __import__('time').sleep(60)", "did not report"),
    "a clone that dies": ("after_in_child", "lambda: os._exit(0)", "did not report"),
    "one that does not move": ("after_in_child", "lambda: (call('capget', 1, 0), call('capget', 2, 0))", "a place of"),
    "a thread in the clone": ("after_in_child", "lambda: __import__('_thread').start_new_thread(pause, ())", "threads"),
    "shared memory in the clone": ("after_in_child", "lambda: keep.append(__import__('mmap').mmap(-1, 9))", "shared"),
    "the parent's file in the clone": (
        "after_in_child",
        "lambda: keep.append(__import__('mmap').mmap(f, 1))",
        "mapped",
    ),
}


def test_on_its_way_a_clone_finds_no_other_root(session: Session, level: str) -> None:
    """Between its birth and its move it holds its new root, above which there is nothing."""
    if level != "full":
        pytest.skip("there are no roots without namespaces")
    session.run(
        "seen = []\n"
        "def look():\n"
        "    root = call('capget', 1, 0); os.fchdir(root)\n"
        "    for _ in range(4): os.chdir('..')\n"
        "    seen.append((os.stat('.').st_ino == os.fstat(root).st_ino, os.path.exists('family/new'),\n"
        "        os.path.exists('new'), os.path.exists('sandbox/files')))\n"
        "    os.write(log, repr(seen).encode()); os._exit(0)\n"
        "log = os.open('log', os.O_WRONLY | os.O_CREAT)\n"
        "os.register_at_fork(after_in_child=look)"
    )
    with pytest.raises(SandboxError, match="did not move"):
        session.fork()
    assert session.run("open('log').read()").text == repr("[(True, False, False, True)]")


@pytest.mark.parametrize("what", HOOKS)
def test_a_clone_that_does_not_play_along(session: Session, what: str) -> None:
    hook, function, reason = HOOKS[what]
    session.run(
        "keep = []; import time; pause = lambda: time.sleep(60)\n"
        "open('f', 'w').write('x'); f = os.open('f', os.O_RDWR)\n"
        f"os.register_at_fork({hook}={function})"
    )
    with pytest.raises(SandboxError, match=reason):
        session.fork(2)
    assert session.run("40 + 2").text == "42"
    assert session.run("os.listdir('.')").text == "['f']"


def test_a_clone_that_forks_before_it_reports_gets_no_further(session: Session) -> None:
    session.run(
        "seen = []\nos.register_at_fork(after_in_child=lambda: seen.append(call('clone', 0x1200011, 0, 0, 0, 0)))"
    )
    (clone,) = session.fork()
    assert clone.run("seen").text == "['EAGAIN']"


def test_a_parent_that_does_not_come_back_is_killed(session: Session) -> None:
    session.run("x = 1")
    session.run("os.register_at_fork(after_in_parent=lambda: __import__('time').sleep(60))")
    (clone,) = session.fork()
    assert clone.run("x").text == "1"
    assert session.run("x").state_lost
    assert session.run("x").text == "1"  # in a new process


def test_a_dead_family_leaves_nothing(pool: SandboxPool) -> None:
    with pool.session():  # so that whatever is made once is there
        pass
    before = Held.now()
    for _ in range(5):
        session = pool.session()
        clones = session.fork(3)
        clones[0].run("import os; os.abort()")
        for each in (session, *clones):
            each.close()
    del session, clones, each
    assert eventually(lambda: before.new() == NOTHING), before.new()


HOST = """
import sys, time
from midstream.sandbox import SandboxPool
pool = SandboxPool(isolation=sys.argv[1], forkable=True, preload=[]).start()
session = pool.session()
clones = session.fork(4)
print("up", flush=True)
time.sleep(60)
"""


def test_a_host_that_is_killed_leaves_nothing(level: str) -> None:
    before = folders()
    with subprocess.Popen([sys.executable, "-c", HOST, level], env=environment(), stdout=subprocess.PIPE) as host:
        assert host.stdout is not None
        assert host.stdout.readline() == b"up\n"
        family = children_of(host.pid)
        assert len(family) >= 7
        host.send_signal(signal.SIGKILL)
        host.wait()
    assert eventually(lambda: not any(os.path.exists(f"/proc/{process}") for process in family))
    assert eventually(lambda: folders() <= before)
