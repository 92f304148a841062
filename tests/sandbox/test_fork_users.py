"""Forks as other hosts have them: an ordinary user, a container's root, a process that is watched already."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.sandbox.hosts import as_ordinary_user, run_program, run_tests

SUITES = tuple(f"tests/sandbox/test_{name}.py" for name in ("fork", "fork_abuse", "fork_folders", "checkpoint"))
SELECTED = (
    "state_and_files_are or keep_their_offsets or modes_holes or clone_of_a_clone or many_clones or how_often",
    "out_of_reach or folders_above or folders_opened or nothing_that_was or reach_one_another or takes_no_fence",
    "leaves_nothing or leaves_no or takes or is_undone or block_that_lives",
)


def run_suites(program: str, prefix: list[str]) -> subprocess.CompletedProcess[str]:
    return run_tests(["-k", " or ".join(SELECTED), *SUITES], program=program, prefix=prefix)


@pytest.mark.slow
def test_as_an_ordinary_user() -> None:
    prefix = as_ordinary_user()
    if prefix is None:
        pytest.skip("no ordinary user can run Python here")
    done = run_suites("import os; assert os.getuid() != 0", prefix)
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-3000:])


@pytest.mark.slow
def test_as_a_containers_root() -> None:
    """Docker's: few capabilities, no namespaces."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    done = run_suites("docker_capabilities(); no_namespaces()", [])
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-3000:])


def test_without_leave_to_change_its_user_id() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    done = run_program(
        "kernel.set_capabilities()\nno_namespaces()\nfrom midstream.sandbox import SandboxPool\n"
        "with SandboxPool(preload=[], forkable=True) as pool:\n"
        "    s = pool.session(); s.run('x = 1'); (c,) = s.fork()\n"
        "    print(pool.report.level, pool.report.layers[4].made_of, c.run('x').text)"
    )
    assert done.stdout == "container shared 1\n", (done.stdout, done.stderr)


def test_under_a_listener_already_it_says_so() -> None:
    done = run_program(
        "from midstream.sandbox import SandboxPool\nfrom midstream.sandbox.isolation import supervision\n"
        "program = seccomp.Program(default=seccomp.ALLOW)\nkernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)\n"
        "listener = supervision.supervise(program.assemble())\n"
        "for level in ('container', 'auto'):\n"
        "    try: SandboxPool(isolation=level, preload=[], forkable=True).start()\n"
        "    except Exception as error: print(type(error).__name__, error)\n"
        "with SandboxPool(isolation='container', preload=[]) as pool: print(pool.session().run('1').text)"
    )
    refusal = "SandboxError forkable=True: this process is under a system call filter with a listener already"
    lines = done.stdout.splitlines()
    assert [line[: len(refusal)] for line in lines] == [refusal, refusal, "1"], (done.stdout, done.stderr)


def test_under_other_layers_of_landlock_there_are_fewer_forks() -> None:
    done = run_program(
        "from midstream.errors import SandboxError\nfrom midstream.sandbox import SandboxPool\n"
        "from midstream.sandbox.isolation import landlock\nkernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)\n"
        "no_namespaces()\nleft = landlock.layers_left(landlock.abi())\n"
        "def pile(count):\n"
        "    for _ in range(count):\n"
        "        ruleset = landlock.Ruleset(landlock.abi())\n"
        "        everything = os.open('/', os.O_PATH)\n"
        "        ruleset.allow(everything, landlock.handled(landlock.abi())); ruleset.enforce()\n"
        "import os\npile(left - 3)\n"
        "with SandboxPool(preload=[], forkable=True) as pool:\n"
        "    s = pool.session(); (c,) = s.fork(); (d,) = c.fork()\n"
        "    for each in (s, c, d):\n"
        "        try: each.fork(); print('forked')\n"
        "        except SandboxError as error: print(str(error)[-30:])\n"
        "pile(2)\n"
        "try: SandboxPool(preload=[], forkable=True).start()\n"
        "except SandboxError as error: print(error)"
    )
    refusal = "can be forked 2 times together"
    last = "forkable=True: this process is under too many layers of Landlock already"
    assert done.stdout.splitlines() == ["forked", refusal, refusal, last], (done.stdout, done.stderr)
