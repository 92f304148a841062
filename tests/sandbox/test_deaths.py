"""Of which limit a session died, as who waits for it tells the host."""

from __future__ import annotations

import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from midstream.sandbox import SandboxLimits
from midstream.sandbox.inside import deaths
from midstream.sandbox.inside.deaths import Deaths
from midstream.sandbox.protocol import FrameReader


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "vmstat"
    path.write_text("pgfault 5\noom_kill 3\nswap_ra 0\n")
    monkeypatch.setattr(deaths, "_TABLE", str(path))
    return path


def told(reporter: Deaths, status: int, seconds: float = 0.1, kills: int = 0, **more: bool) -> dict[str, Any]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        reporter.tell(theirs, status, seconds, kills, **more)
        reader = FrameReader(1000)
        reader.feed(ours.recv(1000))
        frame = reader.next_frame()
    assert frame is not None
    return frame


@pytest.mark.parametrize(
    ("status", "seconds", "limit"),
    [
        (0, 0.1, None),
        (7 << 8, 10.0, None),
        (signal.SIGSEGV, 10.0, None),
        (signal.SIGXCPU, 1.0, "cpu_time"),
        (signal.SIGKILL, 4.9, None),
        (signal.SIGKILL, 5.0, "cpu_time"),
    ],
)
@pytest.mark.usefixtures("table")
def test_processor_time(status: int, seconds: float, limit: str | None) -> None:
    reporter = Deaths(SandboxLimits(cpu_time=5.0).as_dict())
    assert told(reporter, status, seconds) == {"exited": status, "breached": limit}


def test_the_kernels_count_of_those_it_killed_for_memory(table: Path) -> None:
    reporter = Deaths(SandboxLimits().as_dict())
    assert told(reporter, signal.SIGKILL)["breached"] is None
    table.write_text("pgfault 5\noom_kill 4\nswap_ra 0\n")
    assert told(reporter, signal.SIGSEGV)["breached"] is None
    assert told(reporter, signal.SIGKILL)["breached"] == "memory"
    assert told(reporter, signal.SIGKILL)["breached"] is None


def test_who_was_born_after_a_kill_was_not_killed_by_it(table: Path) -> None:
    reporter = Deaths(SandboxLimits().as_dict())
    table.write_text("pgfault 5\noom_kill 4\nswap_ra 0\n")
    assert told(reporter, signal.SIGKILL, kills=reporter.kills())["breached"] is None
    assert told(reporter, signal.SIGKILL, kills=3)["breached"] is None  # by the same kill, which is told of by now
    table.write_text("pgfault 5\noom_kill 5\nswap_ra 0\n")
    assert told(reporter, signal.SIGKILL, kills=3)["breached"] == "memory"


@pytest.mark.parametrize("text", ["", "oom_kill", "pgfault 1\noom_kill x\n"])
def test_a_table_that_says_nothing(table: Path, text: str) -> None:
    table.write_text(text)
    assert told(Deaths(SandboxLimits().as_dict()), signal.SIGKILL)["breached"] is None


def test_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deaths, "_TABLE", "/nonexistent/vmstat")
    reporter = Deaths(SandboxLimits().as_dict())
    assert told(reporter, signal.SIGKILL)["breached"] is None
    assert told(reporter, signal.SIGKILL, out_of_memory=True)["breached"] == "memory"


def test_a_host_that_has_gone_is_told_nothing() -> None:
    ours, theirs = socket.socketpair()
    ours.close()
    with theirs:
        Deaths(SandboxLimits().as_dict()).tell(theirs, signal.SIGKILL, 0.0, 0)
