"""Which sessions are open, and how many rows run at a time: with sessions that a test can watch."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

import pytest

from midstream.errors import SandboxError
from midstream.integrations.nemo_rl import CodeEnvironment
from midstream.integrations.nemo_rl.sessions import KeptSessions
from midstream.sandbox import SandboxLimits
from midstream.types import ExecutionResult

from .standing_in import code, contents

WAIT = 60.0
"""A bound on waiting for what never comes; nothing is measured by it."""


class Session:
    def __init__(self, pool: Pool, history: Sequence[Any]) -> None:
        self._pool = pool
        self.ran = [block.code for block in history]
        self.closed = False

    async def run_async(self, code: str) -> ExecutionResult:
        self._pool.running += 1
        self._pool.most = max(self._pool.most, self._pool.running)
        try:
            await self._pool.while_running(code)
        finally:
            self._pool.running -= 1
        self.ran.append(code)
        return ExecutionResult(text=" ".join(self.ran))

    def close(self) -> None:
        self.closed = True


class Pool:
    """Opens sessions that show all that they have run."""

    limits = SandboxLimits()
    free_sessions = None

    def __init__(self) -> None:
        self.sessions: list[Session] = []
        self.running = self.most = 0
        self.meet = 0
        self._met: asyncio.Event | None = None

    def start(self) -> Pool:
        return self

    async def session_async(self, *, seed: int, history: Sequence[Any]) -> Session:
        self.sessions.append(Session(self, history))
        return self.sessions[-1]

    @property
    def open(self) -> int:
        return sum(not session.closed for session in self.sessions)

    async def while_running(self, code: str) -> None:
        """Block ``meet`` ends once so many run as ``self.meet`` says; ``fail`` fails; others end at once."""
        if code == "fail":
            raise SandboxError("broken")
        if code == "hang":
            await asyncio.Event().wait()
        if code == "meet":
            self._met = self._met or asyncio.Event()
            if self.running >= self.meet:
                self._met.set()
            await asyncio.wait_for(self._met.wait(), WAIT)
        await asyncio.sleep(0)


def environment_of(pool: Pool, **changed: Any) -> CodeEnvironment:
    config = {"num_workers": 4, "terminate_on_evaluation": False, "lease_seconds": 600.0, **changed}
    return CodeEnvironment(config, pool=pool)


def test_rows_of_one_step_run_at_the_same_time() -> None:
    pool = Pool()
    pool.meet = 4
    with environment_of(pool) as environment:
        assert contents(environment.step(code(*["meet"] * 4), [None] * 4)) == ["<result>meet</result>"] * 4


def test_steps_of_one_row_each_run_at_the_same_time() -> None:
    pool = Pool()
    pool.meet = 4
    with environment_of(pool) as environment, ThreadPoolExecutor(4) as threads:
        steps = [threads.submit(environment.step, code("meet"), [None]) for _ in range(4)]
        assert [contents(step.result()) for step in steps] == [["<result>meet</result>"]] * 4


async def test_a_step_does_not_keep_the_event_loop() -> None:
    pool = Pool()
    pool.meet = 4
    with environment_of(pool) as environment:
        steps = await asyncio.gather(*(environment.step_async(code("meet"), [None]) for _ in range(4)))
    assert [contents(step) for step in steps] == [["<result>meet</result>"]] * 4


def test_no_more_blocks_run_at_a_time_than_there_are_workers() -> None:
    pool = Pool()
    with environment_of(pool, num_workers=3) as environment:
        environment.step(code(*["any"] * 20), [None] * 20)
    assert pool.most == 3


def test_more_sessions_than_are_kept_are_closed_and_built_again() -> None:
    pool = Pool()
    with environment_of(pool, kept_sessions=2, num_workers=1) as environment:
        first = environment.step(code("a", "b", "c", "d"), [None] * 4)
        assert pool.open == environment.kept_sessions == 2
        second = environment.step(code("1", "2", "3", "4"), first.metadata)
        assert contents(second) == [f"<result>{each}</result>" for each in ("a 1", "b 2", "c 3", "d 4")]
        assert pool.open == 2
    assert pool.open == 0


def test_a_session_that_is_kept_is_used_and_no_other_is_opened() -> None:
    pool = Pool()
    with environment_of(pool) as environment:
        known: list[Any] = [None]
        for block in "abc":
            known = environment.step(code(block), known).metadata
        assert len(pool.sessions) == 1


def test_nothing_is_kept_where_none_are_to_be() -> None:
    pool = Pool()
    with environment_of(pool, kept_sessions=0) as environment:
        first = environment.step(code("a"), [None])
        assert pool.open == 0
        assert contents(environment.step(code("b"), first.metadata)) == ["<result>a b</result>"]


def test_a_lease_that_ends_closes_its_session() -> None:
    pool = Pool()
    with environment_of(pool, lease_seconds=0.05) as environment:
        first = environment.step(code("a", "b"), [None] * 2)
        until = threading.Event()
        for _ in range(int(WAIT / 0.05)):
            if pool.open == 0:
                break
            until.wait(0.05)
        assert pool.open == environment.kept_sessions == 0
        assert contents(environment.step(code("c"), first.metadata[1:])) == ["<result>b c</result>"]


async def test_each_lease_ends_on_its_own() -> None:
    kept = KeptSessions(8, 0.05)
    sessions = [Session(Pool(), []) for _ in range(3)]
    for session in sessions:
        kept.keep(session)
        await asyncio.sleep(0.02)
    for _ in range(int(WAIT / 0.05)):
        if all(session.closed for session in sessions):
            break
        await asyncio.sleep(0.05)
    assert len(kept) == 0
    assert all(session.closed for session in sessions)


def test_a_fault_of_the_sandbox_is_raised_and_leaves_no_session_open() -> None:
    pool = Pool()
    with environment_of(pool) as environment:
        first = environment.step(code("a", "b"), [None] * 2)
        with pytest.raises(SandboxError, match="broken"):
            environment.step(code("fail", "c"), first.metadata)
        assert pool.open == environment.kept_sessions == 0
        again = environment.step(code("d", "e"), first.metadata)
        assert contents(again) == ["<result>a d</result>", "<result>b e</result>"]


async def test_a_step_that_is_cancelled_leaves_no_session_open() -> None:
    pool = Pool()
    with environment_of(pool) as environment:
        step = asyncio.create_task(environment.step_async(code("hang"), [None]))
        while not pool.running:
            await asyncio.sleep(0.01)
        step.cancel()
        with pytest.raises(asyncio.CancelledError):
            await step
        while pool.running or pool.open:
            await asyncio.sleep(0.01)
        assert environment.kept_sessions == 0


def test_shutdown_ends_what_runs() -> None:
    pool = Pool()
    environment = environment_of(pool)
    with ThreadPoolExecutor(1) as threads:
        step = threads.submit(environment.step, code("hang"), [None])
        while not pool.running:
            threading.Event().wait(0.01)
        environment.shutdown()
        with pytest.raises(CancelledError):
            step.result(WAIT)
    assert pool.open == 0
