"""How fast sandboxes start and answer and what they weigh, beside comparable things in the same run.

Beside ``python -c pass``, an IPython kernel, smolagents' local executor and pydantic-monty (where
``make bench-sandbox`` has installed them in ``.venv-bench``), and beside the bare operations of the machine, in C.
Starts and round trips are taken in turns, several times over; a row says the best of the turns' medians, which the
rest of the machine disturbs least. Prints tables and, with ``--json FILE``, writes the figures. Nothing here fails
for being slow.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.bare import Bare, compiled
from benchmarks.data import REPOSITORY
from benchmarks.peers.drive import Peer, timed
from benchmarks.processes import family, lives, own_mib
from benchmarks.reaches import Reach, reaches
from midstream.errors import IsolationError, SandboxError
from midstream.sandbox import SandboxPool, Session

PEERS = ("ipython", "smolagents", "monty")
PEER_PYTHON = REPOSITORY / ".venv-bench" / "bin" / "python"
DRIVER = REPOSITORY / "benchmarks" / "peers" / "drive.py"
FORKS_OF_ONE = 10
"""Without namespaces a session can be forked a few more times than that."""

HUNDRED_MB = "import numpy\ndata = numpy.ones(100_000_000 // 8)"

Figures = dict[str, Any]


class Ours(Peer):
    """A pool of ours at one level, with a session open."""

    def __init__(self, level: str) -> None:
        start = time.perf_counter()
        self.pool = SandboxPool(isolation=level).start()  # type: ignore[arg-type]
        self.pool_start = (time.perf_counter() - start) * 1000
        before = set(family(os.getpid()))
        self._session = self.pool.session()
        self._processes = sorted(set(family(os.getpid())) - before)

    def start(self) -> None:
        self.pool.session().close()

    def run(self, code: str) -> str:
        return self._session.run(code).text

    def mib(self) -> float:
        return own_mib(self._processes)

    def close(self) -> None:
        self._session.close()
        self.pool.close()


class Elsewhere:
    """A peer in its own environment, driven through a pipe."""

    def __init__(self, name: str) -> None:
        self._process = subprocess.Popen(
            [PEER_PYTHON, DRIVER, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
        )

    def ask(self, measure: str, times: int = 1) -> Any:
        """Milliseconds, mebibytes, or None where it cannot do that."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"measure": measure, "times": times}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline() or '{"failed": "it ended"}')
        if "failed" in answer:
            print(f"  {measure}: {answer['failed']}", file=sys.stderr)
            return None
        return answer.get("milliseconds", answer.get("mib"))

    def close(self) -> None:
        self._process.communicate()


def ask_ours(ours: Ours, measure: str, times: int = 1) -> Any:
    if measure == "starts":
        return ours.time_starts(times)
    if measure == "calls":
        return ours.time_calls(times)
    return ours.time_imports() if measure == "imports" else ours.mib()


def summary(turns: list[list[float]]) -> Figures:
    """The best of the turns' medians, and what lies around it."""
    turns = [sorted(turn) for turn in turns if turn]
    best = min(turns, key=statistics.median)
    return {
        "p50": statistics.median(best),
        "p10": best[len(best) // 10],
        "p90": best[len(best) * 9 // 10],
        "medians of the turns": [statistics.median(turn) for turn in turns],
    }


def start_python() -> None:
    subprocess.run([sys.executable, "-c", "pass"], check=True)


def measure_side_by_side(subjects: dict[str, Callable[..., Any]], turns: int, quick: bool) -> dict[str, Figures]:
    starts: dict[str, list[list[float]]] = {name: [] for name in ("python -c pass", *subjects)}
    calls: dict[str, list[list[float]]] = {name: [] for name in subjects}
    figures: dict[str, Figures] = {name: {} for name in starts}
    for name, ask in subjects.items():
        imports = ask("imports")
        if imports is not None:
            figures[name]["import numpy, sympy ms"] = imports[0]
        memory = ask("memory")  # before all else: what is asked later keeps what it was asked
        if memory is not None and name != "smolagents":  # which has no process of its own
            figures[name]["own memory MiB"] = memory
    for _ in range(turns):
        starts["python -c pass"].append(timed(start_python, 10))
        for name, ask in subjects.items():
            few = name == "ipython"
            starts[name].append(ask("starts", (1 if quick else 3) if few else 100) or [])
            calls[name].append(ask("calls", (50 if few else 300) if quick else (200 if few else 2000)) or [])
    for name, taken in starts.items():
        if any(taken):
            figures[name]["start ms"] = summary(taken)
    for name, taken in calls.items():
        if any(taken):
            figures[name]["x + y ms"] = summary(taken)
    return figures


def measure_forks(level: str, times: int) -> Figures:
    """Live copies of a session: empty, and holding 100 MB, with what copying that state takes inside it."""
    figures: Figures = {}
    with SandboxPool(isolation=level, forkable=True) as pool:  # type: ignore[arg-type]
        for name, code in (("empty", "x = 3; y = 4"), ("with 100 MB", HUNDRED_MB)):
            turns = []
            for _ in range(times // FORKS_OF_ONE):
                with pool.session() as session:
                    session.run(code)
                    turns.append(timed(lambda s=session: s.fork()[0].close(), FORKS_OF_ONE))  # type: ignore[misc]
            figures[f"fork, {name}, ms"] = summary(turns)
        with pool.session() as session:
            session.run(HUNDRED_MB + "\nimport pickle")
            copying = timed(lambda: session.run("copy = pickle.loads(pickle.dumps(data)); del copy"), 5)
            figures["pickling 100 MB and back ms"] = summary([copying])
    return figures


def measure_checkpoints(level: str, times: int) -> Figures:
    """A block with the session's state kept aside, and one that dies and is undone; a plain one beside them."""
    figures: Figures = {}
    pool = SandboxPool(isolation=level, forkable=True, checkpoint=True)  # type: ignore[arg-type]
    with pool, pool.session() as session:
        session.run("import os; x = 3; y = 4")
        figures["checkpointed block ms"] = summary([timed(lambda: session.run("x + y"), times)])
        figures["the same block without ms"] = summary([timed(lambda: session.run("x + y", checkpoint=False), times)])
        undone = timed(lambda: session.run("os.abort()"), times)
        assert session.run("os.abort()").rolled_back
        assert session.run("x + y").text == "7"
        figures["block that dies, and rollback, ms"] = summary([undone])
    return figures


def measure_many(level: str, alive: int, calls: int, at_once: int) -> Figures:
    with SandboxPool(isolation=level) as pool:  # type: ignore[arg-type]
        before = set(family(os.getpid()))
        start = time.perf_counter()
        sessions = [pool.session() for _ in range(alive)]
        started = time.perf_counter() - start
        processes = sorted(set(family(os.getpid())) - before)
        cpu = os.times()
        took, latency = asyncio.run(_call_all(sessions, calls, at_once))
        spent = os.times()
        memory = own_mib(processes[:50]) / 50
        start = time.perf_counter()
        for session in sessions:
            session.close()
    closed = time.perf_counter() - start
    return {
        "sessions": alive,
        "start each ms": started / alive * 1000,
        "calls": calls,
        "calls in s": took,
        "calls per s": calls / took,
        "at once": at_once,
        "mean from dispatch ms": latency * 1000,
        "host's processor time per call us": (spent.user + spent.system - cpu.user - cpu.system) / calls * 1e6,
        "own memory MiB": memory,
        "close all s": closed,
    }


async def _call_all(sessions: list[Session], calls: int, at_once: int) -> tuple[float, float]:
    waiting = iter(range(calls))
    free = list(sessions)
    latencies: list[float] = []

    async def worker() -> None:
        for number in waiting:
            session = free.pop()
            begun = time.perf_counter()
            result = await session.run_async(f"x = {number}\nx + 1")
            latencies.append(time.perf_counter() - begun)
            assert result.text == str(number + 1), result
            free.insert(0, session)

    start = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(min(at_once, len(sessions)))))
    return time.perf_counter() - start, statistics.mean(latencies)


HOST = """
import sys, time
from midstream.sandbox import SandboxPool
pool = SandboxPool(isolation=sys.argv[1], preload=[]).start()
sessions = [pool.session() for _ in range(int(sys.argv[2]))]
for session in sessions:
    session.run("open('file', 'w').write('x')")
print("up", flush=True)
time.sleep(600)
"""


def measure_kill(level: str, alive: int, times: int) -> Figures:
    """How long after ``kill -9`` of a process that has so many sessions open the last process of theirs is gone."""
    seconds = []
    for _ in range(times):
        with subprocess.Popen([sys.executable, "-c", HOST, level, str(alive)], stdout=subprocess.PIPE) as host:
            assert host.stdout is not None
            host.stdout.readline()
            below = family(host.pid)
            assert len(below) > alive
            start = time.perf_counter()
            host.kill()
            while any(map(lives, below)):
                time.sleep(0.001)
            seconds.append((time.perf_counter() - start) * 1000)
    return {"sessions": alive, "all gone after kill -9 ms": summary([seconds])}


def measure_bare(bare: Bare) -> Figures:
    """What the machine takes for the operations below ours, in microseconds."""
    asked = {
        "100 bytes to another core and back": ("apart", 5000),
        "100 bytes to a process of the same core and back": ("together", 5000),
        "100 bytes to one of 1,000 processes and back, 64 at a time": ("crowd", 20_000, 0),
        "the same, each writing to 300 pages of its own": ("crowd", 20_000, 300),
        "fork, end and reap, 60 MiB touched": ("fork", 200, 60),
        "the same into a new process namespace": ("namespace", 200, 60),
        "fork, end and reap, 160 MiB touched": ("fork", 100, 160),
    }
    taken = {name: bare.microseconds(*words) for name, words in asked.items()}
    return {name: summary([times]) for name, times in taken.items() if times}


@contextlib.contextmanager
def opened(levels: list[str]) -> Iterator[dict[str, Callable[..., Any]]]:
    """Every subject that there is here, by its name: what asks it for a measure."""
    with contextlib.ExitStack() as end:
        subjects: dict[str, Callable[..., Any]] = {}
        for level in levels:
            ours = Ours(level)
            end.callback(ours.close)
            subjects[level] = lambda measure, times=1, ours=ours: ask_ours(ours, measure, times)
        if PEER_PYTHON.exists():
            for name in PEERS:
                peer = Elsewhere(name)
                end.callback(peer.close)
                subjects[name] = peer.ask
        else:
            print("the others are left out: `make bench-sandbox` installs them in .venv-bench", file=sys.stderr)
        yield subjects


def possible_levels() -> list[str]:
    levels = []
    for level in ("container", "full"):
        try:
            SandboxPool(isolation=level, preload=[]).start().close()  # type: ignore[arg-type]
            levels.append(level)
        except IsolationError as error:
            print(f"level {level} does not hold here: {error}", file=sys.stderr)
    return levels


def show_side_by_side(console: Console, figures: dict[str, Figures]) -> None:
    table = Table("", "start ms", "import numpy, sympy ms", "x + y µs", "own memory MiB", title="Side by side")
    for name, row in figures.items():
        cells = [name if name not in ("container", "full") else f"midstream, {name}"]
        cells.append(f"{row['start ms']['p50']:.2f}" if "start ms" in row else "-")
        cells.append(f"{row['import numpy, sympy ms']:.1f}" if "import numpy, sympy ms" in row else "-")
        cells.append(f"{row['x + y ms']['p50'] * 1000:.0f}" if "x + y ms" in row else "-")
        cells.append(f"{row['own memory MiB']:.1f}" if "own memory MiB" in row else "-")
        table.add_row(*cells)
    console.print(table)


def show_flat(console: Console, title: str, figures: Figures) -> None:
    table = Table("", "", title=title)
    for name, value in figures.items():
        if isinstance(value, dict):
            table.add_row(name, f"p50 {value['p50']:.2f}  p10 {value['p10']:.2f}  p90 {value['p90']:.2f}")
        else:
            table.add_row(name, f"{value:.2f}" if isinstance(value, float) else str(value))
    console.print(table)


def show_reaches(console: Console, told: list[Reach]) -> None:
    table = Table("what", "against", "reach", "measured", "", title="Reaches")
    for reach in told:
        table.add_row(reach.what, reach.against, reach.wanted, reach.told, "met" if reach.met else "missed")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--alive", type=int, default=1000, help="sessions alive at once (0: leave that out)")
    parser.add_argument("--calls", type=int, default=45_000)
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions: to see that it runs")
    options = parser.parse_args()
    console = Console(width=120)
    figures: Figures = {"benchmark": "sandbox", "machine": machine.description(), "load before": machine.load()}
    levels = possible_levels()
    with compiled() as bare, opened(levels) as subjects:
        figures["bare, us"] = measure_bare(bare)
        figures["side by side"] = measure_side_by_side(subjects, options.turns, options.quick)
    show_side_by_side(console, figures["side by side"])
    show_flat(console, "The same machine in C, µs", figures["bare, us"])
    figures["copies"] = {}
    for level in levels:
        times = 10 if options.quick else 50
        try:
            figures["copies"][level] = measure_forks(level, times) | measure_checkpoints(level, times)
        except SandboxError as error:
            print(f"no copies of sessions at the level {level}: {error}", file=sys.stderr)
        else:
            show_flat(console, f"Copies, level {level}, ms", figures["copies"][level])
    figures["killed"] = {}
    for level in levels:
        figures["killed"][level] = measure_kill(level, 100, 1 if options.quick else 5)
        show_flat(console, f"A host that is killed, level {level}", figures["killed"][level])
    figures["many"] = {}
    for level in levels if options.alive else ():
        figures["many"][level] = measure_many(level, options.alive, options.calls, options.at_once)
        show_flat(console, f"Many at once, level {level}", figures["many"][level])
    told = reaches(figures)
    figures["reaches"] = [reach.as_dict() for reach in told]
    figures["load after"] = machine.load()
    show_reaches(console, told)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
