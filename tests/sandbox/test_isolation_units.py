"""Pieces of the isolation that can be looked at alone: filters of both architectures, folders, identities."""

from __future__ import annotations

import errno
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from midstream.sandbox.inside import folders
from midstream.sandbox.isolation import identity, kernel, landlock, seccomp


class Machine:
    """Runs classic BPF, as far as the filters here use it."""

    def __init__(self, program: bytes) -> None:
        self.instructions = list(struct.iter_unpack("=HBBI", program))

    def answer(self, architecture: int, number: int, *arguments: int) -> int:
        filled = [*arguments, *[0] * (6 - len(arguments))]
        data = struct.pack("=iIQ6Q", number, architecture, 0, *[argument & (1 << 64) - 1 for argument in filled])
        accumulator, position = 0, 0
        while True:
            code, if_true, if_false, value = self.instructions[position]
            position += 1
            if code == 0x20:
                (accumulator,) = struct.unpack_from("=I", data, value)
            elif code == 0x54:
                accumulator &= value
            elif code == 0x06:
                return int(value)
            else:
                tests = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}
                position += if_true if tests[code] else if_false


@pytest.fixture(params=["x86_64", "aarch64"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(kernel, "machine", lambda: request.param)
    return str(request.param)


class Filter:
    def __init__(self, machine: str, landlock_abi: int = 7) -> None:
        self.calls = kernel.SYSTEM_CALLS[machine]
        self.architecture = kernel.AUDIT_ARCHITECTURES[machine]
        self.machine = Machine(seccomp.session_filter(1234, landlock_abi))

    def __call__(self, name: str, *arguments: int) -> int:
        return self.machine.answer(self.architecture, self.calls[name], *arguments)


ALLOWED = seccomp.ALLOW
REFUSED = seccomp.refuse(errno.EPERM)


class TestFilter:
    def test_allowed_calls(self, machine: str) -> None:
        ask = Filter(machine)
        for name in ("read", "write", "mmap", "futex", "clock_gettime", "exit_group", "getrandom", "unlinkat"):
            assert ask(name) == ALLOWED

    def test_other_calls_and_architectures(self, machine: str) -> None:
        ask = Filter(machine)
        assert ask.machine.answer(ask.architecture, 9999) == REFUSED
        for other in (0x40000003, 0x40000028, 0, *kernel.AUDIT_ARCHITECTURES.values()):
            if other != ask.architecture:
                assert ask.machine.answer(other, ask.calls["read"]) == seccomp.KILL_PROCESS
        if machine == "x86_64":
            assert ask.machine.answer(ask.architecture, 0x40000000) == seccomp.KILL_PROCESS

    def test_threads_but_no_processes(self, machine: str) -> None:
        ask = Filter(machine)
        assert ask("clone", 0x3D0F00) == ALLOWED  # what pthread_create asks for
        assert ask("clone", 0x1200011) == seccomp.refuse(errno.EAGAIN)  # what fork asks for
        assert ask("clone", 0x3D0F00 | 1 << 32) == REFUSED
        assert ask("clone", 0x3D0F00 | 0x10000000) == REFUSED
        assert ask("clone3") == seccomp.refuse(errno.ENOSYS)

    def test_signals_go_to_itself_only(self, machine: str) -> None:
        ask = Filter(machine)
        for name in ("kill", "tgkill"):
            assert ask(name, 1234) == ALLOWED
            for target in (0, 1, -1, 1235, -1234):
                assert ask(name, target) == REFUSED

    def test_limits_can_be_read_only(self, machine: str) -> None:
        ask = Filter(machine)
        assert ask("prlimit64", 0, 7, 0, 0x1000) == ALLOWED
        assert ask("prlimit64", 0, 7, 0x1000, 0) == REFUSED
        assert ask("prlimit64", 0, 7, 1 << 32, 0) == REFUSED

    def test_opening_for_reading_does_not_empty(self, machine: str) -> None:
        ask = Filter(machine)
        assert ask("openat", 0, 0, os.O_RDONLY) == ALLOWED
        assert ask("openat", 0, 0, os.O_WRONLY | os.O_TRUNC | os.O_CREAT) == ALLOWED
        assert ask("openat", 0, 0, os.O_RDONLY | os.O_TRUNC) == REFUSED

    def test_truncating_by_name_where_landlock_sees_it(self, machine: str) -> None:
        assert Filter(machine, landlock_abi=3)("truncate") == ALLOWED
        assert Filter(machine, landlock_abi=2)("truncate") == REFUSED

    def test_pairs_of_streams_only(self, machine: str) -> None:
        ask = Filter(machine)
        assert ask("socketpair", 1, 1 | 0o2000000) == ALLOWED
        assert ask("socketpair", 1, 2) == REFUSED
        assert ask("socketpair", 2, 1) == REFUSED
        assert ask("sendto", 3, 0, 0, 0, 0) == ALLOWED
        assert ask("sendto", 3, 0, 0, 0, 1 << 40) == REFUSED

    def test_questions_to_descriptors(self, machine: str) -> None:
        ask = Filter(machine)
        assert ask("ioctl", 1, 0x5401) == seccomp.refuse(errno.ENOTTY)
        assert ask("ioctl", 1, 0x541B) == ALLOWED
        assert ask("ioctl", 1, 0x5412) == REFUSED  # TIOCSTI
        assert ask("fcntl", 1, 3) == ALLOWED
        assert ask("fcntl", 1, 8) == REFUSED

    def test_a_template_gives_the_same(self, machine: str) -> None:
        template = seccomp.filter_template(5)
        assert seccomp.filter_from(template, 77) == seccomp.session_filter(77, 5)

    def test_it_is_short_enough_for_the_kernel(self, machine: str) -> None:
        assert len(seccomp.session_filter(1, 7)) // 8 < 4096


class TestLandlock:
    def test_each_abi_asks_for_what_it_knows(self) -> None:
        assert [landlock.handled(version).bit_count() for version in (1, 2, 3, 4, 5, 6, 7, 9)] == [
            13,
            14,
            15,
            15,
            *[16] * 4,
        ]

    def test_there_is_an_answer(self) -> None:
        assert landlock.abi() >= 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has user ids to give away")
class TestIdentity:
    """A Python that lies where only root may look is found out before any session is started."""

    @pytest.fixture
    def private(self) -> Iterator[str]:
        with tempfile.TemporaryDirectory() as folder:  # that only its owner may enter
            path = Path(folder, "lib", "python", "os.py")
            path.parent.mkdir(parents=True)
            path.write_text("pass")
            yield str(path)

    def test_what_all_may_read(self, private: str) -> None:
        os.chmod(Path(private).parents[2], 0o755)
        found = identity.choose(identity.free_ids(), [private], None, landlock=False)
        assert (found.kind, found.detail) == ("own", "")
        assert found.number(3) == found.first + 3

    def test_what_only_root_may_read(self, private: str) -> None:
        told = f"{Path(private).parents[2]} is closed to other users"
        found = identity.choose(identity.free_ids(), [private], None, landlock=True)
        assert (found.kind, found.detail) == ("own, reading as root", told)

    def test_without_landlock_that_would_be_too_much(self, private: str) -> None:
        found = identity.choose(identity.free_ids(), [private], None, landlock=False)
        assert (found.kind, found.number(3)) == ("shared", None)
        assert found.detail == f"{Path(private).parents[2]}, which sessions need, is closed to other users"


class TestFolders:
    def test_deep_and_closed_trees_and_links(self, tmp_path: Path) -> None:
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "kept").write_text("kept")
        tree = tmp_path / "tree"
        tree.mkdir()
        here = os.open(tree, os.O_RDONLY)
        for _ in range(1100):  # deeper than any stack
            os.mkdir("d", dir_fd=here)
            deeper = os.open("d", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = deeper
            os.close(os.open("file", os.O_CREAT, dir_fd=here))
        os.close(here)
        (tree / "link").symlink_to(outside)
        (tree / "d" / "link").symlink_to(outside)
        (tree / "closed").mkdir(0)
        (tree / "d" / "closed").mkdir(0)
        (tree / "many").mkdir()
        for number in range(200):
            (tree / "many" / str(number)).mkdir()
            (tree / "many" / str(number) / "file").write_text("x")
        folders.remove_tree(str(tree))
        assert not tree.exists()
        assert (outside / "kept").read_text() == "kept"

    def test_what_is_not_there_is_no_error(self, tmp_path: Path) -> None:
        folders.remove_tree(str(tmp_path / "none"))


def test_errors_of_the_kernel_are_raised() -> None:
    with pytest.raises(OSError, match=r"\[Errno \d+\]"):
        kernel.system_call("capget", 0, 0)
    assert kernel.effective_capabilities() >= 0
