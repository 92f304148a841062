"""Ways out of other sandboxes for Python that were published, tried here; each names where it was found.

What all of them come to is one of two: code reaches what runs it, or what it leaves behind is believed outside.
"""

from __future__ import annotations

import ast
import asyncio
import base64
import contextlib
import os
import pickle
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from midstream.errors import SandboxError, SandboxFileError
from midstream.sandbox import Guardrails, SandboxLimits, SandboxPool, Session
from tests.sandbox.inner import FIND_WORKER

LIMITS = SandboxLimits(wall_time=30.0, memory=768 << 20, threads=24)


@pytest.fixture(scope="module")
def pool(level: str) -> Iterator[SandboxPool]:
    with SandboxPool(isolation=level, limits=LIMITS, preload=[]) as pool:  # type: ignore[arg-type]
        yield pool


@pytest.fixture(scope="module")
def guarded_pool(level: str) -> Iterator[SandboxPool]:
    with SandboxPool(isolation=level, limits=LIMITS, preload=[], guardrails=Guardrails()) as pool:  # type: ignore[arg-type]
        yield pool


@pytest.fixture
def proof() -> Iterator[Path]:
    """Where a program that got out would leave a file: a folder in which anybody may write."""
    with tempfile.TemporaryDirectory(prefix="escaped-") as folder:
        os.chmod(folder, 0o777)
        yield Path(folder, "proof")


# Each binds ``system`` to os.system, or ``loaded`` to the os module.
GADGETS = {
    # smolagents, CVE-2025-5120: what an allowed module has imported for itself.
    "a private name of an allowed module": "import random\nloaded = random._os",
    "a module's module": "import queue\nloaded = queue.threading._sys.modules['os']",
    "an allowed function's globals": "import random\nsystem = random.choices.__globals__['_os'].system",
    "a function that evaluates for its caller": (
        "import timeit\nfound = []\ntimeit.timeit('found.append(__import__(\"os\"))', globals=globals(), number=1)\n"
        "loaded = found[0]"
    ),
    # smolagents, CVE-2025-9959: up through attributes with two underscores.
    "the subclasses of object": (
        "system = [c for c in ().__class__.__base__.__subclasses__() if c.__name__ == '_wrap_close'][0]"
        ".__init__.__globals__['system']"
    ),
    "the names spelled at run time": (
        "c = getattr((), '_' * 2 + 'class' + '_' * 2)\nb = getattr(c, '_' * 2 + 'base' + '_' * 2)\n"
        "loader = [s for s in getattr(b, '_' * 2 + 'subclasses' + '_' * 2)() if s.__name__ == 'BuiltinImporter'][0]\n"
        "system = loader.load_module('posix').system"
    ),
    # RestrictedPython, GHSA-mjw2-v2hm-wj34 and CVE-2023-37271: the frames of generators and tracebacks.
    "a generator's frame": (
        "g = (g.gi_frame.f_back.f_back for _ in [1])\nframe = [x for x in g][0]\n"
        "while frame and 'os' not in frame.f_globals: frame = frame.f_back\n"
        "loaded = frame.f_globals['os'] if frame else __import__('os')"
    ),
    "a traceback's frames": (
        "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    frame = e.__traceback__.tb_frame\n"
        "while frame and 'os' not in frame.f_globals: frame = frame.f_back\n"
        "loaded = frame.f_globals['os'] if frame else __import__('os')"
    ),
}


@pytest.mark.parametrize("gadget", GADGETS)
def test_what_climbs_out_of_the_language_is_still_inside(pool: SandboxPool, proof: Path, gadget: str) -> None:
    """Nothing here is kept out of code's hands; having it gains nothing."""
    with pool.session() as session:
        assert session.run(GADGETS[gadget]).error is None
        code = f"status = (system if 'system' in globals() else loaded.system)('touch {proof}')\nstatus == 0"
        assert session.run(code).text == "False"
        assert session.run(f"import os\nos.open({str(proof)!r}, os.O_CREAT | os.O_WRONLY)").error is not None
    assert not proof.exists()


@pytest.mark.parametrize("gadget", GADGETS)
def test_so_it_is_past_the_guardrails(guarded_pool: SandboxPool, proof: Path, gadget: str) -> None:
    """They stand in the way of some of these and not of others: which, is of no account."""
    with guarded_pool.session() as session:
        session.run(GADGETS[gadget])
        session.run(f"(system if 'system' in globals() else loaded.system)('touch {proof}')")
        session.run(f"loaded.close(loaded.open({str(proof)!r}, loaded.O_CREAT | loaded.O_WRONLY))")
        assert session.run("40 + 2").text == "42"
    assert not proof.exists()


# RestrictedPython, CVE-2023-41039: formatting follows attributes that code itself may not.
FORMATS = (
    "'{0.__globals__}'.format(tool)",
    "'{0.__code__.co_filename} {0.__module__}'.format(tool)",
    "'{0.__class__.__init__.__globals__}'.format(ValueError.with_traceback)",
    "import string\nstring.Formatter().get_field('0.__closure__', [tool], {})",
    "import string\nstr(string.Formatter().get_field('0.__globals__', [tool], {})[0].keys())",
    "from string import Template\n'{0.pattern}{0.__module__}'.format(Template)",
    "'%(tool)s' % {**globals(), **vars(__builtins__)}",
    "f'{tool.__globals__}'",
)


@pytest.mark.parametrize("code", FORMATS)
def test_formatting_finds_nothing_of_the_host(pool: SandboxPool, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = base64.b32encode(os.urandom(20)).decode()
    monkeypatch.setenv("MIDSTREAM_TEST_SECRET", secret)

    def call(*_: object) -> object:
        return len(secret)  # so that the host's side of the tool has it in its closure

    with pool.session(tools={"tool": "A tool."}, call_tool=call) as session:
        assert session.run("tool()").text == "32"
        result = session.run(code)
        assert secret not in result.text
        assert secret not in result.stdout
        assert str(Path(__file__).parent) not in result.text
        assert session.run("import os\nany('SECRET' in name for name in os.environ)").text == "False"


# smolagents, GHSA-q9r5-6hrr-9ph7: the host unpickled what a remote sandbox had printed.
PICKLES = """
import base64, json, os, pickle, struct, sys
class Escape:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.system, (f'touch {self.path}',)
    def __repr__(self): return text
escape = Escape(PROOF)
data = pickle.dumps(escape)
text = base64.b64encode(data).decode()
"""
WAYS_BACK = {
    "printed": "print(text); print('RESULT_PICKLE:' + text, file=sys.stderr); os.write(1, data)",
    "a value": "escape",
    "its bytes as a value": "data",
    "an error's": "raise ValueError(escape, text)",
    "an error that is one": "class E(Exception):\n    __reduce__ = Escape.__reduce__; path = PROOF\nraise E(text)",
    "an argument": "tool(escape)",
    "an argument's bytes": "tool(data, kind=bytearray(data), text=text)",
    "an exception of its own, smuggled as a tool's record": "tool({'$type': 'pickle', 'data': text, 'items': [text]})",
    "a file": "open('result.pkl', 'wb').write(data)",
    "a frame of its own": "os.write(3, struct.pack('<I', len(data)) + data)",
    "a field of a frame": (
        "body = json.dumps({'nonce': '0', 'stdout': '', 'value': text, 'pickle': text, 'error': None}).encode()\n"
        "os.write(3, struct.pack('<I', len(body)) + body)"
    ),
}


@pytest.mark.parametrize("way", WAYS_BACK)
def test_what_comes_back_is_never_unpickled(
    pool: SandboxPool, proof: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        pytest.fail("the host unpickled something")

    for name in ("load", "loads", "Unpickler", "_loads", "_load", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    received: list[Any] = []

    def call(_name: str, arguments: list[Any], keywords: dict[str, Any]) -> None:
        received.extend([*arguments, *keywords.values()])

    with pool.session(tools=["tool"], call_tool=call) as session:
        session.run(PICKLES.replace("PROOF", repr(str(proof))))
        session.run(WAYS_BACK[way].replace("PROOF", repr(str(proof))))
        with contextlib.suppress(SandboxFileError):
            session.get("result.pkl")
        session.kill()  # what is remembered is gone through again
        assert session.run("40 + 2").text.endswith("42")
    assert all(type(value) in (bytes, bytearray, str, dict) for value in received), received
    assert not proof.exists()


# dify-sandbox, issue 27: what code handed in to be loaded first ran before the filter was in place. Here every piece of
# code that is run in some other way than as a block asks for what only an unfiltered process would get.
TRY = """
import os, socket
def attempt(where):
    try: socket.socket()
    except OSError as error: outcome = error.errno
    else: outcome = 'a socket'
    try: os.close(os.open(PROOF, os.O_CREAT | os.O_WRONLY))
    except OSError: pass
    else: outcome = 'a file'
    tried[where] = outcome
"""
SHADOWS = ("sitecustomize", "usercustomize", "json", "random", "numpy", "linecache", "encodings", "midstream", "wave")


def test_nothing_of_the_codes_runs_outside_of_the_filter(level: str, proof: Path) -> None:
    settings: dict[str, Any] = {"isolation": level, "limits": LIMITS, "preload": [], "warm": 1}
    with SandboxPool(forkable=True, checkpoint=True, **settings) as pool, pool.session(seed=0) as session:
        source = "tried = {}\n" + TRY.replace("PROOF", repr(str(proof)))
        for name in SHADOWS:  # there before its first block, in the folder that imports look at first
            session.put(f"{name}.py", f"{source}\nattempt({name!r})".encode())
        session.run("import wave\ntried = wave.tried")  # which no session has loaded before
        session.run(source.partition("\n")[2])
        session.run(
            "import atexit, signal, sys, threading\n"
            "os.register_at_fork(before=lambda: attempt('before'), after_in_child=lambda: attempt('in the child'),\n"
            "    after_in_parent=lambda: attempt('in the parent'))\n"
            "sys.setprofile(lambda *_: None); signal.signal(signal.SIGALRM, lambda *_: attempt('a signal'))\n"
            "class Late:\n    def __del__(self): attempt('the end of an object')\n"
            "sys.excepthook = threading.excepthook = lambda *_: attempt('a hook')"
        )
        assert session.run("sys.setprofile(None)\nimport os; os.abort()").rolled_back
        (copy,) = session.fork()
        for each in (session, copy):
            each.run("signal.setitimer(signal.ITIMER_REAL, 0.001)\nwhile 'a signal' not in tried: pass")
            each.run("late = Late()\ndel late\nt = threading.Thread(target=lambda: 1/0); t.start(); t.join()")
        seen = {**_parsed(session), **_parsed(copy)}
        with pool.session() as other:  # forked from what the first has never touched
            assert other.run("import json, random\njson.dumps([1]), 'tried' in vars(json)").text == "('[1]', False)"
    assert set(seen) >= {"wave", "before", "in the child", "in the parent", "a signal", "the end of an object"}
    assert set(seen.values()) == {1}, seen  # EPERM
    assert not proof.exists()


def _parsed(session: Session) -> dict[str, Any]:
    found = ast.literal_eval(session.run("tried").value or "")
    assert isinstance(found, dict)
    return found


# dify, CVE-2025-3466: code replaced functions that the sandbox's own set-up was going to call.
CLONING = """
import os
cloning = type(worker._cloning)
names = cloning._move.__globals__
plain = names['kernel'].system_call
def skip(*skipped):
    names['kernel'].system_call = lambda name, *rest: 0 if name in skipped else plain(name, *rest)
"""
SABOTAGE = {
    "the change of folder": "os.fchdir = lambda _: None",
    "the change of root": "cloning._change_root = lambda _: None",
    "the call that changes the root": "skip('chroot')",
    "the fence": "skip('landlock_restrict_self')",
    "dropping the privilege": "names['kernel'].set_capabilities = lambda *_: None",
    "reopening": "names['reopen'] = lambda _: None",
    "reopening by number": "os.dup2 = lambda *_, **__: None",
    "the plan": "names['_told'] = lambda n: {'home': '/', 'folder': '/', 'files': []}",
}


@pytest.mark.parametrize("what", SABOTAGE)
def test_a_copy_whose_own_setting_up_was_sabotaged_is_none_or_apart(level: str, proof: Path, what: str) -> None:
    pool = SandboxPool(isolation=level, forkable=True, preload=[], limits=LIMITS)  # type: ignore[arg-type]
    with pool, pool.session() as session:
        session.run("open('mine', 'w').write('kept')\nimport os\nhome = os.getcwd()\nheld = open('mine', 'r+')")
        assert session.run(FIND_WORKER + CLONING + SABOTAGE[what]).error is None
        try:
            copies = session.fork(2)
        except SandboxError:
            copies = []  # the warden has seen it
        for copy in copies:
            copy.run("held.write('HARM'); held.flush()")
            for path in ("'mine'", "home + '/mine'", "'/proc/1/cwd/mine'", "'/sandbox/files/mine'"):
                copy.run(f"open({path}, 'w').write('HARM')")
            copy.run(f"open({str(proof)!r}, 'w').write('x')")
            copy.close()
        assert session.run("open('mine').read(), held.read()").text == "('kept', 'kept')"
    assert not proof.exists()


# SkyRL: a process-wide redirect_stdout, so that one row's output came with another row's result.
SPEAK = "import time\nfor n in range(20):\n    print('row', {0}, n)\n    time.sleep(0.001)\n{0}"


def expected(number: int) -> str:
    return "\n".join(f"row {number} {n}" for n in range(20)) + f"\n{number}"


def test_rows_in_threads_have_their_own_output(pool: SandboxPool, capfd: pytest.CaptureFixture[str]) -> None:
    texts: dict[int, str] = {}
    together = threading.Barrier(12)

    def row(number: int) -> None:
        with pool.session() as session:
            together.wait(60)
            texts[number] = session.run(SPEAK.format(number)).text

    threads = [threading.Thread(target=row, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    sys.stdout.write("the host's own\n")
    for thread in threads:
        thread.join()
    assert texts == {number: expected(number) for number in range(12)}
    assert capfd.readouterr() == ("the host's own\n", "")


async def test_rows_in_tasks_have_their_own_output(pool: SandboxPool, capfd: pytest.CaptureFixture[str]) -> None:
    async def row(number: int) -> str:
        with await pool.session_async() as session:
            return (await session.run_async(SPEAK.format(number))).text

    texts = await asyncio.gather(*(row(number) for number in range(12)))
    assert texts == [expected(number) for number in range(12)]
    assert capfd.readouterr() == ("", "")


# Time limits by SIGALRM, in several: code catches the exception, or takes the signal for itself.
SWALLOWED = {
    "except Exception": "while True:\n    try:\n        while True: pass\n    except Exception: pass",
    "except TimeoutError": "while True:\n    try:\n        while True: pass\n    except TimeoutError: pass",
    "suppress": "import contextlib\nwhile True:\n    with contextlib.suppress(Exception):\n        while True: pass",
    "the alarm taken": (
        "import signal\nsignal.alarm(0); signal.signal(signal.SIGALRM, signal.SIG_IGN)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0)\nwhile True: pass"
    ),
    "all signals that can be": (
        "import signal\nfor n in signal.valid_signals():\n    try: signal.signal(n, lambda *_: None)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass"
    ),
    "finally": "try:\n    while True: pass\nfinally:\n    while True: pass",
    "everything": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "a thread": "import threading\nt = threading.Thread(target=lambda: [0 for _ in iter(int, 1)])\nt.start(); t.join()",
}


@pytest.mark.parametrize("how", SWALLOWED)
def test_a_time_limit_cannot_be_swallowed(short: Session, how: str) -> None:
    short.run("x = 41")
    result = short.run("x += 1\n" + SWALLOWED[how])
    assert (result.timed_out, result.breached) == (True, "wall_time")
    assert short.run("x").text.endswith("41" if result.state_lost else "42")
    if how in ("except Exception", "except TimeoutError", "suppress", "the alarm taken"):
        assert not result.state_lost
