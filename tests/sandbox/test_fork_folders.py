"""Forks without namespaces: folders that move, Landlock that narrows, and nobody left when somebody dies."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator

import pytest

from midstream.errors import SandboxError
from midstream.sandbox import SandboxLimits, SandboxPool, Session
from tests.sandbox.conftest import why_not
from tests.sandbox.leftovers import children_of, eventually, folders, lives, own_temporary_folder
from tests.sandbox.test_fork_abuse import RAW, SHORT

__all__ = ["own_temporary_folder"]  # for every test here


@pytest.fixture(scope="module")
def pool() -> Iterator[SandboxPool]:
    reason = why_not("container")
    if reason is not None:
        pytest.skip(f"this machine cannot hold the level container: {reason}")
    with SandboxPool(isolation="container", forkable=True, limits=SHORT, preload=[]) as pool:
        yield pool


@pytest.fixture
def session(pool: SandboxPool) -> Iterator[Session]:
    with pool.session(seed=0) as session:
        session.run(RAW + "home = os.getcwd()")
        yield session


def home(session: Session) -> str:
    folder = session.run("os.getcwd()").text.strip("'")
    assert folder.startswith("/")
    return folder


def test_a_parent_stays_where_it_is_and_clones_are_elsewhere(session: Session) -> None:
    before = home(session)
    session.run("import tempfile; name = tempfile.NamedTemporaryFile(delete=False).name")
    one, two = session.fork(2)
    (three,) = one.fork()
    places = [home(each) for each in (session, one, two, three)]
    assert places[0] == before
    assert len(set(places)) == 4
    for each, place in zip((session, one, two, three), places, strict=True):
        told = (
            f"{{os.environ[n] for n in ('HOME', 'TMPDIR', 'PWD')}} == {{{place!r}}}, tempfile.gettempdir() == {place!r}"
        )
        assert each.run(told).text == "(True, True)"
        assert each.run("tempfile.NamedTemporaryFile().name.startswith(os.getcwd())").text == "True"
        each.run("open(os.path.abspath('absolute'), 'w').write('x')")
        assert each.get("absolute") == b"x"


def test_the_old_path_is_denied_and_the_error_says_where_to_look(session: Session) -> None:
    session.run("path = os.path.abspath('f'); open(path, 'w').write('x')")
    (clone,) = session.fork()
    assert session.run("open(path).read()").text == "'x'"
    for code in ("open(path)", "open(path, 'w')", "os.remove(path)", "open(home + '/new', 'w')"):
        text = clone.run(code).text
        assert text.startswith("PermissionError(13, ")
        assert f"it is now {home(clone)};" in text
    assert "moved" not in clone.run("open('/etc/passwd')").text
    assert clone.run("open('f').read()").text == "'x'"


ATTEMPTS = (
    "open({0!r} + '/secret').read()",
    "open({0!r} + '/secret', 'w')",
    "open({0!r} + '/secret', 'a')",
    "open({0!r} + '/new', 'w')",
    "os.listdir({0!r})",
    "os.mkdir({0!r} + '/new')",
    "os.remove({0!r} + '/secret')",
    "os.rename({0!r} + '/secret', 'stolen')",
    "os.rename({0!r} + '/secret', {0!r} + '/moved')",
    "os.rename('mine', {0!r} + '/mine')",
    "os.rename({0!r}, {0!r} + '-moved')",
    "os.rmdir({0!r} + '/empty')",
    "os.truncate({0!r} + '/secret', 0)",
    "os.chmod({0!r} + '/secret', 0o777)",
    "os.utime({0!r} + '/secret')",
    "os.symlink({0!r} + '/secret', 'link')",
    "os.link({0!r} + '/secret', 'link')",
    "(os.chdir({0!r}), open('secret'))",
    "(os.chdir({0!r}), os.listdir('.'))",
    "os.open('secret', os.O_RDONLY, dir_fd=os.open({0!r}, os.O_PATH))",
    "os.listdir(os.path.dirname({0!r}))",
    "os.open({0!r}, os.O_RDONLY | os.O_DIRECTORY)",
)


def test_files_of_parents_siblings_and_clones_are_out_of_reach(session: Session) -> None:
    session.run("open('secret', 'w').write('inherited'); open('mine', 'w').close(); os.mkdir('empty')")
    one, two = session.fork(2)
    (three,) = one.fork()
    (late,) = session.fork()
    family = (session, one, two, three, late)
    places = {each: home(each) for each in family}
    for each in family:
        for other, place in places.items():
            if other is each:
                continue
            for attempt in ATTEMPTS:
                result = each.run(attempt.format(place))
                assert result.error is not None, attempt
                assert result.error.type in ("PermissionError", "OSError", "FileNotFoundError"), attempt
                each.run(f"os.chdir({places[each]!r})")
    for each in family:
        assert each.run("sorted(os.listdir('.')), open('secret').read()").text == str(
            (["empty", "mine", "secret"], "inherited")
        )


def test_folders_above_can_be_neither_listed_nor_changed(session: Session) -> None:
    (clone,) = session.fork()
    for each in (session, clone):
        above = home(each)
        while above != "/":
            above = os.path.dirname(above)
            for code in (
                f"open({above + '/x'!r}, 'w')",
                f"os.mkdir({above + '/x'!r})",
                f"os.rename(home, {above + '/x'!r})",
            ):
                assert each.run(code).error is not None, code
            if "midstream" in above and os.getuid() != 0:
                assert each.run(f"os.listdir({above!r})").error is not None


def test_folders_opened_before_do_not_give_away_where_clones_are(session: Session) -> None:
    code = "above = os.path.dirname(home); top = home[:home.index('/top') + 4]\n"
    session.run(code + "held = [os.open(p, os.O_PATH) for p in (above, top, home)]")
    (clone,) = session.fork()
    token = home(clone).split("/top/")[1].split("/")[0]
    assert session.run(f"os.stat({token!r}, dir_fd=held[1])").error is not None
    assert session.run("os.listdir(held[2]), os.fstat(held[1]).st_rdev != 0").error is not None  # it is O_PATH
    assert session.run("os.path.samestat(os.fstat(held[2]), os.stat('.'))").text == "True"
    assert session.run("[os.path.samestat(os.fstat(n), os.stat('/dev/null')) for n in held[:2]]").text == "[True, True]"


def test_how_often(session: Session) -> None:
    """A parent and its clones share what Landlock allows; who has used it up goes on."""
    line, forks = session, 0
    while forks < 15:
        (clone,) = line.fork()
        forks += 1
        line = clone if forks % 2 else line
    with pytest.raises(SandboxError, match="can be forked 15 times together"):
        line.fork()
    assert line.run("40 + 2").text == "42"
    assert line.run("open('f', 'w').write('x')").error is None
    (other,) = session.fork()
    assert other.run("40 + 2").text == "42"


def test_what_is_too_large_is_not_copied() -> None:
    if why_not("container"):
        pytest.skip("this machine cannot hold the level container")
    limits = SandboxLimits(working_directory=1 << 20, files=50)
    with SandboxPool(isolation="container", forkable=True, limits=limits, preload=[]) as pool:
        session = pool.session()
        for code, cure in (
            ("open('f', 'wb').write(bytes(2 << 20))", "import os; os.remove('f')"),
            ("for n in range(60): open(str(n), 'w').close()", "for n in range(60): os.remove(str(n))"),
        ):
            session.run(code)
            with pytest.raises(SandboxError, match="holds more than it may"):
                session.fork(2)
            session.run(cure)
            assert [each.run("1").text for each in session.fork(2)] == ["1", "1"]


def living() -> set[int]:
    return {number for number in children_of(os.getpid()) if lives(number)}


# -- clones and parents that do not play along

HOOKS = {
    "its way is not to its folder": (
        "after_in_child",
        "lambda: (call('capget', 1, 0), call('capget', 2, 0))",
        "a place of",
    ),
    "no fence": (
        "after_in_child",
        "lambda: (os.fchdir(call('capget', 1, 0)), call('capget', 2, 0))",
        "a place of",
    ),
    "a fence of its own making": (
        "after_in_child",
        "lambda: (os.fchdir(call('capget', 1, 0)), call('landlock', 99, 0), call('capget', 2, 0))",
        "descriptor",
    ),
    "flags to its fence": (
        "after_in_child",
        "lambda: (os.fchdir(call('capget', 1, 0)), call('landlock', 5, 1), call('capget', 2, 0))",
        "a place of",
    ),
    "a thread at its fence": (
        "after_in_child",
        "lambda: __import__('_thread').start_new_thread(pause, ())",
        "threads running",
    ),
}


@pytest.mark.parametrize("what", HOOKS)
def test_a_clone_that_is_not_fenced_does_not_live(session: Session, what: str) -> None:
    hook, function, reason = HOOKS[what]
    session.run(f"pause = lambda: __import__('time').sleep(60)\nos.register_at_fork({hook}={function})")
    before = children_of(os.getpid())
    with pytest.raises(SandboxError, match=reason):
        session.fork(2)
    assert eventually(lambda: living() <= before)
    assert session.run("40 + 2, os.listdir('.')").text == "(42, [])"


PARENTS = {
    "it never comes back": "lambda: __import__('time').sleep(60)",
    "it is done, and takes no fence": "lambda: (call('capget', 4, 0), call('capget', 2, 0))",
    "it has a thread": "lambda: __import__('_thread').start_new_thread(pause, ())",
    "it dies": "lambda: os._exit(3)",
}


@pytest.mark.parametrize("what", PARENTS)
def test_a_parent_that_is_not_fenced_dies_before_its_clones_have_files(session: Session, what: str) -> None:
    session.run("x = 1; open('f', 'w').write('x')")
    session.run(f"pause = lambda: __import__('time').sleep(60)\nos.register_at_fork(after_in_parent={PARENTS[what]})")
    (clone,) = session.fork()
    assert clone.run("x, open('f').read()").text == "(1, 'x')"
    assert session.run("x").state_lost
    assert session.run("x").text == "1"  # in a new process


def test_a_clone_that_nobody_was_told_of_is_killed(session: Session) -> None:
    """The parent forks once more than it is to; that one would have all that the parent had."""
    session.run(
        "made = []\n"
        "def twice():\n"
        "    if not made:\n"
        "        made.append(call('clone', 0x1200011, 0, 0, 0, 0))\n"
        "        if made == [0]: __import__('time').sleep(60)\n"
        "os.register_at_fork(after_in_parent=twice)"
    )
    before = children_of(os.getpid())
    with pytest.raises(SandboxError, match="did not report"):
        session.fork(2)
    assert session.run("made[0] > 0 if isinstance(made[0], int) else made").text in ("True", "['EAGAIN']")
    assert eventually(lambda: living() <= before)


# -- who dies leaves nobody


def wardens_of(session: Session) -> int:
    assert session.process_id is not None
    with open(f"/proc/{session.process_id}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])


def test_a_warden_that_is_killed_takes_its_family_along(pool: SandboxPool) -> None:
    bystander = pool.session()
    gc.collect()
    session = pool.session()
    (clone,) = session.fork()
    (grandchild,) = clone.fork()
    numbers = [each.process_id for each in (session, clone, grandchild)]
    os.kill(wardens_of(session), signal.SIGKILL)
    assert eventually(lambda: not any(os.path.exists(f"/proc/{number}") for number in numbers))
    assert bystander.run("1").text == "1"
    for each in (session, clone, grandchild):
        assert each.run("40 + 2").text == "42"  # in processes of their own
        each.close()
    bystander.close()


def test_a_fork_server_that_is_killed_takes_all_families_along() -> None:
    before, others = folders(), children_of(os.getpid())
    pool = SandboxPool(isolation="container", forkable=True, limits=SHORT, preload=[]).start()
    session = pool.session()
    (clone,) = session.fork()
    (grandchild,) = clone.fork()
    session.close()  # the clone's parent is gone first
    numbers = children_of(os.getpid()) - others
    assert len(numbers) >= 4
    assert pool._server is not None
    assert pool._server._process is not None
    os.kill(pool._server._process.pid, signal.SIGKILL)
    assert eventually(lambda: not living() & numbers)
    assert grandchild.run("40 + 2").text == "42"
    assert clone.run("40 + 2").text == "42"
    pool.close()
    assert folders() <= before


def test_closing_leaves_no_process_and_no_folder() -> None:
    before = folders()
    with SandboxPool(isolation="container", forkable=True, limits=SHORT, preload=[]) as pool:
        (folder,) = folders() - before
        session = pool.session()
        session.run("import os\nfor n in range(200): os.makedirs(f'{n}/closed', 0)")
        clones = session.fork(3)
        (grandchild,) = clones[0].fork()
        for each in (session, *clones):
            each.close()
        assert grandchild.run("len(os.listdir('.'))").text == "200"
        grandchild.close()
        del session, clones, grandchild, each
        gc.collect()
        assert eventually(lambda: [name for name in os.listdir(folder) if name != ".lock"] == [], seconds=60)
    assert folders() <= before
