"""How fast sessions start and answer here, beside a bare interpreter and the bare channel below a session."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from midstream.bench.figures import Figure, in_turns
from midstream.errors import SandboxError
from midstream.sandbox import SandboxPool, Session
from midstream.tools import Tool, ToolHost, ToolSet

_ECHO = "import sys\nfor line in sys.stdin.buffer:\n    sys.stdout.buffer.write(line)\n    sys.stdout.buffer.flush()"
_CALLS = 100
"""Calls of a tool that one block makes."""


def measure(*, quick: bool = False) -> Iterator[Figure]:
    """Starts, round trips, calls of tools, copies, and many sessions at once, at the best level that holds here."""
    turns, times = (2, 20) if quick else (5, 200)
    with SandboxPool() as pool:
        level = pool.report.level
        yield from _starts(pool, level, turns, times)
        yield from _round_trips(pool, turns, times)
        yield from _many(pool, 20 if quick else 200, 1_000 if quick else 20_000)
    yield from _copies()


def _starts(pool: SandboxPool, level: str, turns: int, times: int) -> Iterator[Figure]:
    taken = in_turns(
        {
            "python": lambda: subprocess.run([sys.executable, "-c", "pass"], check=True),
            "session": lambda: pool.session().close(),
        },
        turns=turns,
        times=max(5, times // 10),
    )
    ratio = taken["session"] / taken["python"]
    yield Figure(f"session: start and close ({level})", taken["session"] * 1e3, "ms", "python -c pass", ratio)


def _round_trips(pool: SandboxPool, turns: int, times: int) -> Iterator[Figure]:
    host = ToolHost(ToolSet([Tool("nothing", _nothing)]))
    calls = f"for number in range({_CALLS}):\n    nothing(number)"
    try:
        with pool.session() as session, _echoing() as echo:
            session.run("x = 3\ny = 4")
            taken = in_turns({"pipe": echo, "block": lambda: session.run("x + y")}, turns=turns, times=times)
            yield Figure("block: x + y", taken["block"] * 1e6, "µs", "a line through a pipe and back",
                         taken["block"] / taken["pipe"])  # fmt: skip

        async def call() -> float:
            session = await pool.session_async(tools=host.tools.offers, call_tool=host.row().call)
            try:
                await session.run_async(calls)  # sees to threads and the like
                start = time.perf_counter()
                result = await session.run_async(calls)
                assert result.error is None, result.error
                return (time.perf_counter() - start) / _CALLS
            finally:
                session.close()

        best = min(asyncio.run(call()) for _ in range(turns))
        yield Figure("call of a tool from code", best * 1e6, "µs", "block: x + y", best / taken["block"])
    finally:
        host.close()


def _many(pool: SandboxPool, alive: int, calls: int) -> Iterator[Figure]:
    async def all_at_once() -> float:
        sessions = [await pool.session_async() for _ in range(alive)]
        left = iter(range(calls))

        async def work(session: Session) -> None:
            for number in left:
                await session.run_async(f"{number}")

        start = time.perf_counter()
        try:
            await asyncio.gather(*map(work, sessions))
            return calls / (time.perf_counter() - start)
        finally:
            for session in sessions:
                session.close()

    async def one_by_one() -> float:
        session = await pool.session_async()
        start = time.perf_counter()
        for number in range(few := max(100, calls // 20)):
            await session.run_async(f"{number}")
        rate = few / (time.perf_counter() - start)
        session.close()
        return rate

    alone = asyncio.run(one_by_one())
    together = asyncio.run(all_at_once())
    yield Figure(f"blocks of {alive} sessions at once", together, "a second", "those of one session", together / alone)


def _copies() -> Iterator[Figure]:
    try:
        with SandboxPool(forkable=True) as pool, pool.session() as session:
            session.run("x = 3")
            actions = {"fork": lambda: session.fork()[0].close(), "start": lambda: pool.session().close()}
            # At the level container a session can be forked only so often.
            taken = in_turns(actions, turns=2, times=5)
    except SandboxError:
        return
    yield Figure(
        "fork of a session", taken["fork"] * 1e3, "ms", "session: start and close", taken["fork"] / taken["start"]
    )


def _nothing(number: int) -> int:
    return number


@contextmanager
def _echoing() -> Iterator[Callable[[], None]]:
    child = subprocess.Popen([sys.executable, "-c", _ECHO], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None
    assert child.stdout is not None
    given, back = child.stdin, child.stdout

    def echo() -> None:
        given.write(b"x + y\n")
        given.flush()
        back.readline()

    try:
        yield echo
    finally:
        child.communicate()
