"""Runs programs as other hosts would: an ordinary user, a container's root, a kernel without Landlock."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

SOURCE = str(Path(__file__).parents[2] / "src")
ROOT = str(Path(__file__).parents[2])
USER = 12345

# Installed in the program's own process before it starts a pool. A container's runtime refuses much else;
# these are the calls that this package would use.
RESTRICT = """
import errno, sys
from midstream.sandbox.isolation import kernel, seccomp
kernel.SYSTEM_CALLS["x86_64"] |= dict(unshare=272, setns=308, mount=165, umount2=166)
kernel.SYSTEM_CALLS["aarch64"] |= dict(unshare=97, setns=268, mount=40, umount2=39)

def restrict(names, error):
    program = seccomp.Program(default=seccomp.ALLOW)
    program.answer(names, seccomp.refuse(error))
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    seccomp.install(program.assemble())

def no_namespaces():
    restrict(["unshare", "setns", "mount", "umount2", "pivot_root", "mount_setattr"], errno.EPERM)

def no_landlock():
    restrict(["landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self"], errno.ENOSYS)

def docker_capabilities():
    # CHOWN, DAC_OVERRIDE, FOWNER, FSETID, KILL, SETGID, SETUID, SETPCAP, NET_BIND_SERVICE, NET_RAW,
    # SYS_CHROOT, MKNOD, AUDIT_WRITE, SETFCAP: what Docker gives to root.
    for capability in set(range(41)) - {0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31}:
        try: kernel.checked(kernel.libc().prctl(24, capability, 0, 0, 0))
        except OSError: pass
    kernel.set_capabilities(frozenset({0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31}))
"""


def run_program(
    program: str, *, prefix: list[str] | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run Python text with the package importable; nothing is raised for its exit status."""
    return subprocess.run(
        [*(prefix or []), sys.executable, "-W", "error", "-c", RESTRICT + program],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def run_tests(
    arguments: list[str], *, program: str = "", prefix: list[str] | None = None, timeout: float = 1800
) -> subprocess.CompletedProcess[str]:
    """Run tests of this repository in a process that is as ``program`` makes it; one that never ends is ended."""
    arguments = ["-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        [
            *(prefix or []),
            sys.executable,
            "-c",
            f"{RESTRICT}\n{program}\nimport pytest, sys; sys.exit(pytest.main({arguments!r}))",
        ],
        cwd=ROOT,
        env={**environment(), "HOME": "/"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def environment() -> dict[str, str]:
    """This process's own, less the options of the tests that it may be running."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    return {**variables, "PYTHONPATH": SOURCE, "PYTHONDONTWRITEBYTECODE": "1"}


def as_ordinary_user() -> list[str] | None:
    """What to put before a command so that an ordinary user runs it, or None where that cannot be done.

    Where Python lies below a folder that is closed to others, the user gets a view of the file system in
    which just that part is open.
    """
    if os.geteuid() != 0:
        return []
    script = "set -e\n"
    private = _private_folder(os.path.realpath(sys.base_prefix))
    if private is not None:
        python = shlex.quote(os.path.realpath(sys.base_prefix))
        script += (
            "hold=$(mktemp -d)\n"
            f"mount --bind {python} $hold\nmount -t tmpfs -o mode=755 none {shlex.quote(private)}\n"
            f"mkdir -p {python}\nmount --move $hold {python}\nrmdir $hold\n"
        )
    script += f'exec setpriv --reuid {USER} --regid {USER} --clear-groups "$@"'
    prefix = ["unshare", "--mount", "sh", "-c", script, "sh"]
    tried = subprocess.run([*prefix, sys.executable, "-c", "pass"], capture_output=True, check=False)
    return prefix if tried.returncode == 0 else None


def _private_folder(path: str) -> str | None:
    parts = path.split("/")
    for depth in range(2, len(parts) + 1):
        folder = "/".join(parts[:depth])
        if os.stat(folder).st_mode & 0o005 != 0o005:
            return folder
    return None
