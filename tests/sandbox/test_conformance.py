"""The public checks: our pools pass them, and a sandbox that is none fails those that it should."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import pytest

from midstream.sandbox import SandboxLimits, SandboxPool
from midstream.testing import CheckFailed, check_sandbox
from midstream.types import ExecutionError, ExecutionResult


def test_our_own_pools_pass(level: str) -> None:
    outcomes = check_sandbox(lambda limits: SandboxPool(isolation=level, limits=limits, preload=[]))  # type: ignore[arg-type]
    assert len(outcomes) == 25
    assert all(outcome.passed for outcome in outcomes)


DANGEROUS = (
    "_exit",
    "while True",
    "10**12",
    "8 << 30",
    "fork",
    "system",
    "unlink",
    "'w'",
    "'wb'",
    "Thread",
    "ptrace",
    "setrlimit",
)
DANGEROUS += ("mkdir", "symlink", "link(", "rename", "chmod", "down()", "sys.stdout =", "os.remove")


class LeakySession:
    """Runs code in this very process, as too many do; what would end or hang the process it only pretends."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.names = names

    def run(self, code: str) -> ExecutionResult:
        if any(word in code for word in DANGEROUS):
            return ExecutionResult(text="1")
        output = io.StringIO()
        head, _, last = code.rpartition("\n")
        try:
            with contextlib.redirect_stdout(output):
                exec(head, self.names)
                value = eval(last, self.names)
        except (Exception, SystemExit) as error:  # noqa: BLE001  # as such sandboxes do
            return ExecutionResult(text=repr(error), error=ExecutionError(type(error).__name__, str(error)))
        return ExecutionResult(text=output.getvalue() + repr(value), stdout=output.getvalue(), value=repr(value))

    def close(self) -> None:
        """Nothing to let go of."""


class LeakyPool:
    def __init__(self, limits: SandboxLimits) -> None:
        self.closed = False

    def session(self, **settings: Any) -> LeakySession:
        return LeakySession({name: lambda *_: None for name in settings.get("tools", ())})

    def close(self) -> None:
        self.closed = True


def test_a_leaky_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIDSTREAM_TEST_SECRET", "a secret of the host")
    made: list[LeakyPool] = []

    def make(limits: SandboxLimits) -> LeakyPool:
        assert limits.wall_time == 1.0
        made.append(LeakyPool(limits))
        return made[0]

    with pytest.raises(CheckFailed) as caught:
        check_sandbox(make)
    failed = {outcome.name for outcome in caught.value.outcomes if not outcome.passed}
    assert failed >= {
        "files of the host are out of reach",
        "the hosts environment is hidden",
        "there is no network",
        "programs cannot be started",
        "others cannot be signalled",
        "others cannot be looked into",
        "limits cannot be raised",
        "files are bounded",
        "descriptors and threads are bounded",
        "what is no plain data reaches no tool",
        "loops are interrupted and state kept",
        "what cannot be interrupted is killed",
        "memory is bounded",
        "output is bounded",
        "a death is said",
        "tools are called and their errors raised",
    }
    assert "files of the host are out of reach: code read a file of the host" in str(caught.value)
    assert f"{len(failed)} of 25 checks failed:" in str(caught.value)
    assert made[0].closed


def test_a_session_that_raises_fails_its_check_and_no_other() -> None:
    class Raising(SandboxPool):
        def session(self, **settings: Any) -> Any:
            if settings.get("seed") is not None:
                raise OSError("no seeds here")
            return super().session(**settings)

    with pytest.raises(CheckFailed) as caught:
        check_sandbox(lambda limits: Raising(limits=limits, preload=[]))
    assert [(outcome.name, outcome.failure) for outcome in caught.value.outcomes if not outcome.passed] == [
        ("a seed gives the same numbers", "OSError: no seeds here")
    ]
