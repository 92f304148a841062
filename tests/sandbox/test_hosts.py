"""What holds on other hosts than this one, emulated; a layer that is missing is refused by its name."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from tests.sandbox.conftest import why_not
from tests.sandbox.hosts import as_ordinary_user, environment, run_program, run_tests

START = """
from midstream.errors import IsolationError
from midstream.sandbox import SandboxPool
"""


def told(program: str, prefix: list[str] | None = None) -> str:
    """The program's output; its error output where it failed."""
    done = run_program(START + textwrap.dedent(program), prefix=prefix)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


SHOW = """
with SandboxPool(preload=[]) as pool, pool.session() as session:
    print(pool.report.level, pool.report.missing)
    session.run("x = 20")
    print(session.run("import json, decimal, xml.dom.minidom\\nx + 1").text)
    print(type(pool.report.as_dict()).__name__, str(pool.report).splitlines()[0])
"""


def test_34_without_landlock_and_namespaces_it_refuses_by_name() -> None:
    text = told(
        """
        no_namespaces(); no_landlock()
        try:
            SandboxPool(preload=[]).start()
        except IsolationError as error:
            print(error)
        """
    )
    assert text.startswith("filesystem: this kernel has no Landlock")


def test_34_a_loss_that_is_allowed_is_warned_of() -> None:
    text = told(
        """
        import warnings
        no_namespaces(); no_landlock()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            with SandboxPool(preload=[], allow_missing={"filesystem"}) as pool, pool.session() as session:
                print(pool.report.level, pool.report.missing)
                print(session.run("import json, xml.dom.minidom\\n1 + 1").text)
                print(session.run("open('/etc/passwd')").error is None)
                print(session.run("import socket; socket.socket()").error.type)
        print([str(warning.message)[:40] for warning in seen])
        """
    )
    assert text.splitlines() == [
        "weak ('filesystem',)",
        "2",
        "True",
        "PermissionError",
        "['sandboxes without the layer filesystem: ']",
    ]


def test_34_without_system_call_filters_it_refuses_by_name() -> None:
    text = told(
        """
        import warnings
        restrict(["seccomp"], errno.ENOSYS)
        try:
            SandboxPool(preload=[]).start()
        except IsolationError as error:
            print(error)
        warnings.simplefilter("ignore")
        pool = SandboxPool(preload=[], isolation="container", allow_missing={"network", "processes", "signals"})
        with pool, pool.session() as session:
            print(pool.report.level, pool.report.missing)
            print(session.run("open('/etc/passwd')").error.type)
        """
    )
    lines = text.splitlines()
    assert lines[0] == "network, processes, signals: this kernel takes no system call filters (seccomp)"
    assert lines[1].startswith("weak (")
    assert "processes" in lines[1]
    assert lines[2] == "PermissionError"


# What the standard library itself takes from the platform is imported before it is another one; so are the
# libraries that look at it.
ELSEWHERE = """
import asyncio, multiprocessing, os, sys, tempfile
import click, rich.console
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
sys.platform = "win32"
import midstream as ms
try:
    ms.SandboxPool().start()
except ms.errors.SandboxError as error:
    print(error)
"""


def test_elsewhere_it_can_be_imported_and_says_what_it_needs() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.stdout == "sandboxes need Linux; this is win32\n", done.stderr


def test_34_what_is_asked_for_and_not_there_is_refused_by_name() -> None:
    text = told(
        """
        no_namespaces()
        try:
            SandboxPool(preload=[], isolation="full").start()
        except IsolationError as error:
            print(error)
        """
    )
    assert text.startswith("namespaces: ")


def test_without_landlock_namespaces_alone_hold() -> None:
    if why_not("full") is not None:
        pytest.skip(f"no namespaces here: {why_not('full')}")
    assert told("no_landlock()\n" + SHOW).splitlines() == ["full ()", "21", "dict isolation: full"]


def test_a_containers_filter_leaves_the_container_level() -> None:
    assert told("no_namespaces()\n" + SHOW).splitlines() == ["container ()", "21", "dict isolation: container"]


def test_an_ordinary_user_in_a_container() -> None:
    """A restricted pod's: no namespaces, and no leave to change the user id."""
    prefix = as_ordinary_user()
    if prefix is None:
        pytest.skip("this machine's root cannot become another user that can read Python")
    lines = told("no_namespaces()\n" + SHOW, prefix).splitlines()
    assert lines == ["container ()", "21", "dict isolation: container"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can play a container's root")
def test_a_containers_root_with_its_few_capabilities() -> None:
    assert told("docker_capabilities(); no_namespaces()\n" + SHOW).splitlines() == [
        "container ()",
        "21",
        "dict isolation: container",
    ]


# All that docs/sandbox.md lists by number, and what was published of others.
ABUSE = tuple(
    f"tests/sandbox/test_{name}.py"
    for name in ("abuse", "limits", "blocks", "tools", "lifecycle", "protocol_fuzz", "published_escapes")
)
SELECTED = "test_0 or test_1 or test_2 or test_3 or abuse or published or writes_to_the_channel"


@pytest.mark.slow
def test_the_suite_of_abuse_as_an_ordinary_user() -> None:
    if os.geteuid() != 0:
        pytest.skip("this is an ordinary user already")
    prefix = as_ordinary_user()
    if prefix is None:
        pytest.skip("this machine's root cannot become another user that can read Python")
    done = run_tests(["-k", SELECTED, *ABUSE], program="import os; assert os.getuid() != 0", prefix=prefix)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "[100%]" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can play a container's root")
def test_the_suite_of_abuse_as_a_containers_root() -> None:
    """Docker's: few capabilities, no namespaces, and a user id for each session all the same."""
    done = run_tests(["-k", f"({SELECTED}) and not full", *ABUSE], program="docker_capabilities(); no_namespaces()")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "[100%]" in done.stdout


def test_an_ordinary_user_whose_python_is_out_of_reach_is_told_at_the_start() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to take rights away")
    text = told(
        """
        import os, sys, tempfile
        from midstream.errors import SandboxError
        sys.executable = "/nonexistent/python"
        try:
            SandboxPool(preload=[]).start()
        except SandboxError as error:
            print(error)
        """
    )
    assert text.startswith("the fork server cannot be started: ")
    assert "/nonexistent/python" in text
