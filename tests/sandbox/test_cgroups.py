"""Memory really in use, bounded by a cgroup for each session: where one can be made, and where not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from midstream.errors import ConfigurationError
from midstream.sandbox import SandboxLimits, SandboxPool
from midstream.sandbox.isolation import cgroups
from tests.sandbox.hosts import as_ordinary_user, environment, run_program
from tests.sandbox.leftovers import eventually

LIMITS = SandboxLimits(resident_memory=64 << 20, wall_time=60.0)
_HELD = "import os, signal\nfrom midstream.sandbox.isolation import cgroups\n"


def why_none() -> str | None:
    """Why no memory cgroup can be made here, as another process finds."""
    program = _HELD + "try: cgroups.open_groups().close()\nexcept cgroups.NotDelegated as error: print(error)"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=True
    )
    return done.stdout.strip() or None


@pytest.fixture(scope="module")
def delegated() -> str:
    """The group in which groups can be made."""
    reason = why_none()
    if reason is not None:
        pytest.skip(f"no memory cgroup can be made here: {reason}")
    return next(path for _, path in cgroups._candidates())


def ours(parent: str) -> set[str]:
    return {name for name in os.listdir(parent) if name.startswith("midstream-")}


class TestSessions:
    def test_more_than_it_may_have_ends_it_and_that_is_said(self, level: str, delegated: str) -> None:
        with SandboxPool(isolation=level, preload=[], limits=LIMITS) as pool, pool.session() as session:  # type: ignore[arg-type]
            session.run("x = 41")
            result = session.run("kept = bytearray(200 << 20)")
            assert (result.breached, result.state_lost, result.timed_out) == ("memory", True, False)
            assert result.text.startswith("Killed: the interpreter was ended, since there was no more memory for it.")
            assert session.run("x + 1").text == "42"
            assert session.run("kept = bytearray(16 << 20)\nlen(kept)").text == str(16 << 20)

    def test_only_that_one(self, level: str, delegated: str) -> None:
        pool = SandboxPool(isolation=level, preload=[], limits=LIMITS)  # type: ignore[arg-type]
        with pool, pool.session() as one, pool.session() as other:
            other.run("kept = bytearray(30 << 20)")
            assert one.run("kept = bytearray(200 << 20)").breached == "memory"
            assert other.run("len(kept)").text == str(30 << 20)

    def test_files_in_memory_count(self, delegated: str) -> None:
        with SandboxPool(isolation="full", preload=[], limits=LIMITS) as pool, pool.session() as session:
            result = session.run("for n in range(4): open(f'f{n}', 'wb').write(b'x' * (20 << 20))")
            assert result.breached == "memory"

    def test_nothing_is_left(self, level: str, delegated: str) -> None:
        before = ours(delegated)
        pool = SandboxPool(isolation=level, preload=[], limits=LIMITS).start()  # type: ignore[arg-type]
        with pool:
            (own,) = ours(delegated) - before
            for _ in range(20):
                with pool.session() as session:
                    assert session.run("1").text == "1"
            with pool.session():
                folder = os.path.join(delegated, own)
                assert eventually(lambda: len([e for e in os.scandir(folder) if e.is_dir()]) == 1)
        assert ours(delegated) == before

    def test_the_report_says_it(self, delegated: str) -> None:
        with SandboxPool(isolation="container", preload=[], limits=LIMITS) as pool:
            (layer,) = [layer for layer in pool.report.layers if layer.name == "memory"]
        assert (layer.holds, layer.required) == (True, False)
        assert layer.made_of.endswith("a memory cgroup for each session")

    def test_what_those_who_were_killed_left_is_swept(self, delegated: str) -> None:
        program = (
            _HELD + "g = cgroups.open_groups()\nh = g.make('1', 1 << 26)\nprint(g.name, flush=True)\n"
            "if os.fork() == 0:\n    h.enter(); os.close(g.folder); print('in', flush=True); signal.pause()\n"
            "signal.pause()"
        )
        with subprocess.Popen([sys.executable, "-c", program], env=environment(), stdout=subprocess.PIPE) as killed:
            assert killed.stdout is not None
            name = killed.stdout.readline().decode().strip()
            assert killed.stdout.readline() == b"in\n"
            own = Path(delegated, name)
            survivor = int((own / "1" / "cgroup.procs").read_text())
            killed.send_signal(signal.SIGKILL)
            killed.wait()
        os.utime(own)
        SandboxPool(preload=[]).start().close()
        assert own.is_dir()  # it might be one that is just being made
        os.utime(own, (0, 0))
        SandboxPool(preload=[]).start().close()
        assert not own.exists()
        assert eventually(lambda: not os.path.exists(f"/proc/{survivor}"))

    def test_what_is_alive_is_not_swept(self, delegated: str) -> None:
        before = ours(delegated)
        with SandboxPool(preload=[], limits=LIMITS) as pool, pool.session() as session:
            (own,) = ours(delegated) - before
            os.utime(os.path.join(delegated, own), (0, 0))
            SandboxPool(preload=[]).start().close()
            assert session.run("1").text == "1"
            assert own in ours(delegated)


class TestWithout:
    def test_an_ordinary_user_is_refused_by_name(self) -> None:
        prefix = as_ordinary_user() if os.geteuid() == 0 else None
        if prefix is None:
            pytest.skip("this machine's root cannot become another user that can read Python")
        done = run_program(
            "from midstream.errors import IsolationError\nfrom midstream.sandbox import SandboxLimits, SandboxPool\n"
            "pool = SandboxPool(preload=[])\n"
            "with pool: print([layer.tried for layer in pool.report.layers if layer.name == 'memory'])\n"
            "try: SandboxPool(preload=[], limits=SandboxLimits(resident_memory=1 << 28)).start()\n"
            "except IsolationError as error: print(error)",
            prefix=prefix,
        )
        assert done.returncode == 0, done.stderr
        told, refused = done.stdout.splitlines()
        assert "none can be made" in told
        assert refused.startswith("resident_memory: no memory cgroup can be made here")

    def test_sessions_that_can_be_cloned_are_refused(self) -> None:
        with pytest.raises(ConfigurationError, match="resident_memory"):
            SandboxPool(isolation="full", forkable=True, limits=LIMITS)

    @pytest.fixture
    def fake(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(cgroups, "_PROCESS", str(tmp_path))
        (tmp_path / "cgroup").write_text("0::/user/app/own\n")
        (tmp_path / "mountinfo").write_text(
            f"30 1 0:26 / {tmp_path}/cpu rw - cgroup cgroup rw,cpu\n"
            f"41 31 0:38 / {tmp_path}/all rw - cgroup2 cgroup2 rw\n"
        )
        (tmp_path / "all/user/app/own").mkdir(parents=True)
        return tmp_path

    def test_version_2_takes_the_nearest_group_that_hands_memory_down(self, fake: Path) -> None:
        for folder, handed in (
            ("", "cpu memory"),
            ("user", "memory pids"),
            ("user/app", "memory"),
            ("user/app/own", ""),
        ):
            (fake / "all" / folder / "cgroup.subtree_control").write_text(handed + "\n")
        assert list(cgroups._candidates()) == [(cgroups.V2, f"{fake}/all/user/app")]

    def test_version_2_that_hands_none_down(self, fake: Path) -> None:
        (fake / "all/cgroup.subtree_control").write_text("cpu\n")
        with pytest.raises(cgroups.NotDelegated, match="no cgroups that count memory are mounted"):
            cgroups.open_groups()

    def test_what_cannot_be_made_is_said_for_each(self, fake: Path) -> None:
        (fake / "all/cgroup.subtree_control").write_text("memory\n")  # a folder, but no cgroup
        with pytest.raises(cgroups.NotDelegated, match=f"v2, {fake}/all: No such file or directory"):
            cgroups.open_groups()
        assert not [name for name in os.listdir(fake / "all") if name.startswith("midstream-")]

    def test_a_part_of_the_hierarchy_that_is_mounted_elsewhere(self, fake: Path) -> None:
        (fake / "cgroup").write_text("4:memory:/pods/one/own\n0::/\n")
        (fake / "mountinfo").write_text(f"35 31 0:32 /pods/one {fake}/mem rw - cgroup cgroup rw,memory\n")
        (fake / "mem/own").mkdir(parents=True)
        assert list(cgroups._candidates()) == [(cgroups.V1, f"{fake}/mem/own")]
        (fake / "cgroup").write_text("4:memory:/elsewhere\n")
        assert list(cgroups._candidates()) == []
