"""Live copies of sessions: what they share at first, and that they share nothing after."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from midstream.errors import ConfigurationError, SandboxError
from midstream.sandbox import SandboxLimits, SandboxPool, Session
from tests.sandbox.conftest import why_not

SHORT = SandboxLimits(wall_time=1.0, grace=0.6, memory=768 << 20, threads=24)


@pytest.fixture(scope="module")
def pool(level: str) -> Iterator[SandboxPool]:
    with SandboxPool(isolation=level, forkable=True) as pool:  # type: ignore[arg-type]
        yield pool


@pytest.fixture(scope="module")
def short_pool(level: str) -> Iterator[SandboxPool]:
    with SandboxPool(isolation=level, forkable=True, limits=SHORT, preload=[]) as pool:  # type: ignore[arg-type]
        yield pool


@pytest.fixture
def session(pool: SandboxPool) -> Iterator[Session]:
    with pool.session(seed=0) as session:
        yield session


@pytest.fixture
def short(short_pool: SandboxPool) -> Iterator[Session]:
    with short_pool.session(seed=0) as session:
        yield session


def test_state_and_files_are_copied_and_then_apart(session: Session) -> None:
    session.run("x = [0]\nimport os\nos.makedirs('a/b')\nopen('a/b/file', 'w').write('first')")
    one, two = session.fork(2)
    for name, each in (("parent", session), ("one", one), ("two", two)):
        assert each.run("x, open('a/b/file').read()").text == "([0], 'first')"
        each.run(f"x.append({name!r})\nopen(os.path.join(os.getcwd(), 'a/b/file'), 'w').write({name!r})")
        each.run(f"open({name!r}, 'w').close()")
    for name, each in (("parent", session), ("one", one), ("two", two)):
        result = each.run("x, open('a/b/file').read(), sorted(os.listdir('.'))")
        assert result.text == str(([0, name], name, sorted(["a", name])))
        assert not result.state_lost


def test_open_files_keep_their_offsets_and_are_apart(session: Session) -> None:
    session.run("import os\nopen('file', 'w').write('0123456789')")
    session.run("number = os.open('file', os.O_RDWR)\nos.read(number, 4)\nlog = open('log', 'a'); log.write('one ')")
    session.run("folder = os.open('.', os.O_RDONLY)\nos.makedirs('deep'); os.chdir('deep')")
    (clone,) = session.fork()
    assert clone.run("os.read(number, 2), os.getcwd().endswith('deep')").text == "(b'45', True)"
    assert session.run("os.read(number, 1), os.getcwd().endswith('deep')").text == "(b'4', True)"
    clone.run("os.write(number, b'clone')\nlog.write('clone'); log.flush()\nopen('../new', 'w').close()")
    session.run("os.write(number, b'PARNT')\nlog.write('parent'); log.flush()")
    assert clone.run("open('../file').read(), open('../log').read()").text == "('012345clone', 'one clone')"
    assert session.run("open('../file').read(), open('../log').read()").text == "('01234PARNT', 'one parent')"
    assert clone.run("sorted(os.listdir(folder))").text == "['deep', 'file', 'log', 'new']"
    assert session.run("sorted(os.listdir(folder))").text == "['deep', 'file', 'log']"


def test_modes_holes_and_times_of_files_are_copied(session: Session) -> None:
    session.run(
        "import os\n"
        "os.mkdir('closed', 0)\nos.close(os.open('secret', os.O_CREAT | os.O_WRONLY, 0o200))\n"
        "with open('sparse', 'wb') as f: f.seek(50 << 20); f.write(b'end')\n"
        "look = lambda: [(s.st_mode, s.st_size, s.st_mtime_ns) for s in map(os.lstat, ('secret', 'sparse'))]"
    )
    (clone,) = session.fork()
    assert clone.run("look()").text == session.run("look()").text
    assert clone.run("os.stat('sparse').st_blocks < 100, open('sparse', 'rb').read()[-3:]").text == "(True, b'end')"
    assert clone.run("oct(os.stat('closed').st_mode)").text == "'0o40000'"


def test_random_goes_on_from_the_same_state(session: Session) -> None:
    session.run("import random, numpy\nrandom.random(); numpy.random.random()")
    clones = session.fork(2)
    drawn = {each.run("random.random(), float(numpy.random.random())").text for each in (session, *clones)}
    assert len(drawn) == 1


def test_output_tools_and_errors_of_a_clone_are_its_own(pool: SandboxPool) -> None:
    calls = []

    def call(name: str, arguments: list[object], _keywords: dict[str, object]) -> object:
        calls.append((name, arguments))
        return len(calls)

    with pool.session(tools=["tool"], call_tool=call) as session:
        session.run("import os")
        (clone,) = session.fork()
        assert clone.run("print('out'); os.write(1, b'raw\\n'); tool('clone')").text == "out\nraw\n1"
        assert session.run("print('out'); os.write(1, b'raw\\n'); tool('parent')").text == "out\nraw\n2"
        assert clone.run("1/0").text == "ZeroDivisionError('division by zero')"
    assert calls == [("tool", ["clone"]), ("tool", ["parent"])]


def test_a_session_that_holds_much_numpy(session: Session) -> None:
    session.run(
        "import numpy\na = numpy.ones(100 * 2**17)\nb = numpy.linalg.inv(numpy.eye(200)) @ numpy.ones((200, 200))"
    )
    clones = session.fork(3)
    clones[0].run("a[:] = 2")
    sums = [each.run("float(a.sum()) / 2**17").text for each in (session, *clones)]
    assert sums == ["100.0", "200.0", "100.0", "100.0"]


def test_each_lives_on_without_the_others(short: Session) -> None:
    short.run("x = 1")
    one, two = short.fork(2)
    short.run("import os; os.abort()")
    assert one.run("x").text == "1"
    result = two.run("import os; os.abort()")
    assert "SIGABRT" in result.text
    assert one.run("x += 1; x").text == "2"
    short.close()
    two.close()
    (three,) = one.fork()
    one.close()
    assert three.run("x").text == "2"


def test_a_clone_of_a_clone_of_a_clone(short: Session) -> None:
    short.run("names = []")
    generation = short
    for number in range(12):
        (generation,) = generation.fork()
        generation.run(f"names.append({number}); open('{number}', 'w').close()")
    assert generation.run("import os\nnames == list(range(12)), len(os.listdir('.'))").text == "(True, 12)"
    assert short.run("import os\nnames, os.listdir('.')").text == "([], [])"


def test_many_clones(short: Session) -> None:
    short.run("import threading")
    clones = short.fork(70)
    assert [clone.run(f"{number}").text for number, clone in enumerate(clones)] == [str(n) for n in range(70)]
    # Threads are counted by user, and all of them are one user.
    started = "ts = [threading.Thread(target=int) for _ in range(5)]\n[t.start() for t in ts]\nlen(ts)"
    assert {clone.run(started).text for clone in clones} == {"5"}


async def test_the_same_for_asyncio(short: Session) -> None:
    await short.run_async("x = 5")
    clones = await short.fork_async(3)
    assert [(await clone.run_async("x")).text for clone in clones] == ["5", "5", "5"]
    assert (await short.run_async("x")).text == "5"
    await short.run_async("import mmap; m = mmap.mmap(-1, 4096)")
    with pytest.raises(SandboxError, match="shared between processes"):
        await short.fork_async(2)
    for clone in clones:
        clone.close()


def test_a_clone_that_is_lost_is_rebuilt_from_its_parents_blocks(short: Session) -> None:
    short.run("x = 1")
    (clone,) = short.fork()
    clone.run("y = x + 1")
    assert clone.run("import os; os._exit(3)").state_lost
    result = clone.run("x, y")
    assert (result.text, result.state_lost) == ("(1, 2)", False)
    assert [each.run("x, y").text for each in clone.fork(2)] == ["(1, 2)", "(1, 2)"]
    short.run("import os; os._exit(3)")
    assert [each.run("x").text for each in short.fork(2)] == ["1", "1"]  # rebuilt first


def test_a_clone_that_loops_is_interrupted_and_killed_as_any_session(short: Session) -> None:
    short.run("x = 1")
    one, two = short.fork(2)
    result = one.run("while True: pass")
    assert (result.timed_out, result.state_lost) == (True, False)
    assert one.run("x").text == "1"
    assert two.run("sum(range(10**13))").state_lost
    assert short.run("x").text == "1"


# -- what cannot be copied is refused, and the session goes on


@pytest.mark.parametrize(
    ("code", "reason", "cure"),
    [
        (
            "import threading; e = threading.Event(); t = threading.Thread(target=e.wait); t.start()",
            "threads running",
            "e.set(); t.join()",
        ),
        ("import mmap; m = mmap.mmap(-1, 4096)", "shared between processes", "m.close()"),
        (
            "import mmap; f = open('f', 'w+b'); f.write(b'x'); f.flush(); m = mmap.mmap(f.fileno(), 1)",
            "mapped into memory",
            "m.close()",
        ),
        (
            "import mmap; f = open('f', 'w+b'); f.write(b'x'); f.flush(); m = mmap.mmap(f.fileno(), 1, 2)",
            "mapped into memory",
            "m.close()",
        ),
        ("import os; f = open('f', 'w'); os.unlink('f')", "has been deleted", "f.close()"),
        (
            "import os; home = os.getcwd()\nfor _ in range(250): os.mkdir('d'); os.chdir('d')",
            "too many folders",
            "os.chdir(home)\nfor _ in range(100): os.rename('d/d', 'e'); os.rmdir('d'); os.rename('e', 'd')",
        ),
    ],
)
def test_what_cannot_be_copied(short: Session, code: str, reason: str, cure: str) -> None:
    assert short.run(code).error is None
    with pytest.raises(SandboxError, match=reason):
        short.fork(2)
    assert short.run("40 + 2").text == "42"
    assert short.run(cure).error is None
    (clone,) = short.fork()
    assert clone.run("40 + 2").text == "42"


def test_a_full_working_directory_is_copied() -> None:
    if why_not("full"):
        pytest.skip("this machine cannot hold the level full")
    limits = SandboxLimits(working_directory=4 << 20, files=200)
    with SandboxPool(isolation="full", forkable=True, limits=limits, preload=[]) as pool, pool.session() as session:
        fill = "try:\n    with open('big', 'wb') as f:\n        while True: f.write(bytes(4096))\nexcept OSError: pass"
        session.run(fill)
        session.run("try:\n    for n in range(1000): open(str(n), 'w').close()\nexcept OSError: pass")
        (clone,) = session.fork()
        look = "import os; len(os.listdir('.')), os.stat('big').st_size"
        assert clone.run(look).text == session.run(look).text
        assert clone.run("open('more', 'w')").error is not None


def test_it_must_be_asked_for(level: str) -> None:
    with SandboxPool(isolation=level, preload=[]) as pool, pool.session() as session:  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="forkable=True"):
            session.fork()
        assert session.run("1").text == "1"


def test_bad_arguments(short: Session) -> None:
    for n in (0, -1, True, 1.5, "2"):
        with pytest.raises(ConfigurationError, match="n="):
            short.fork(n)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="forkable"):
        SandboxPool(forkable=1)  # type: ignore[arg-type]


def test_places_are_taken_and_given_back(level: str) -> None:
    pool = SandboxPool(isolation=level, forkable=True, preload=[], max_sessions=3)  # type: ignore[arg-type]
    with pool, pool.session() as session:
        with pytest.raises(ConfigurationError, match="max_sessions=3"):
            session.fork(3)
        for _ in range(3):
            for clone in session.fork(2):
                assert clone.run("1").text == "1"
                clone.close()
        session.run("import mmap; m = mmap.mmap(-1, 4096)")
        for _ in range(3):
            with pytest.raises(SandboxError):
                session.fork(2)
