"""Sessions without end: whether memory, descriptors, processes, threads or folders grow with their number.

    python -m benchmarks.soak --minutes 30 --json soak.json --plot soak.png
    python -m benchmarks.soak --sessions 100000

Rows of every kind come and go, from threads and from asyncio: short and long ones, such as die, such as
time out, such as leave files behind. What there is of each thing is counted as it goes on. At the end a table,
with ``--json FILE`` the figures, and with ``--plot FILE`` curves (for that matplotlib must be installed).
Ends with status 1 if anything is left when the pool is closed.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import glob
import importlib.util
import json
import math
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.processes import family
from midstream.sandbox import SandboxLimits, SandboxPool, Session

PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / (1 << 20)
ROWS = (
    (70, ("x = 3; y = 4", "x + y")),
    (8, ("open('file', 'wb').write(b'x' * 100_000)", "import os; os.path.getsize('file')")),
    (8, ("import math\nsum(math.sqrt(i) for i in range(100_000))", "print('a' * 100_000)")),
    (5, ("1/0", "kept = [bytearray(1 << 20) for _ in range(8)]", "len(kept)")),
    (4, ("x = 1", "import os; os.abort()", "x")),
    (2, ("b = bytearray(8 << 30)", "5")),
    (2, ("import os\nfor n in range(100): os.mkdir('d'); os.chdir('d')",)),
    (1, ("while True: pass", "1")),
)
LIMITS = SandboxLimits(wall_time=0.5, grace=0.5)


@dataclass(frozen=True, slots=True)
class Sample:
    """What there was at a moment; ``seconds`` since the start. Memory is that of this process and all below."""

    seconds: float
    sessions: int
    host_mib: float
    fork_server_mib: float
    processes: int
    descriptors: int
    threads: int
    folders: int


def resident(process: int | None) -> float:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * PAGE_MIB
    except OSError:
        return 0.0


def take_sample(start: float, sessions: int, server: int | None) -> Sample:
    folders = glob.glob(os.path.join(glob.escape(tempfile.gettempdir()), "midstream-sandbox-*"))
    return Sample(
        seconds=round(time.monotonic() - start, 1),
        sessions=sessions,
        host_mib=round(resident(os.getpid()), 1),
        fork_server_mib=round(resident(server), 1),
        processes=len(family(os.getpid())),
        descriptors=len(os.listdir("/proc/self/fd")),
        threads=threading.active_count(),
        folders=sum(len(os.listdir(folder)) for folder in folders),
    )


class Soak:
    """Rows come and go until ``end``, a monotonic time in seconds, or until there have been ``most`` of them."""

    def __init__(self, pool: SandboxPool, end: float, most: float) -> None:
        self._pool = pool
        self._end = end
        self._most = most
        self._begun = 0
        self._lock = threading.Lock()
        self.sessions = 0
        self.outcomes: Counter[str] = Counter()

    def thread(self, seed: int) -> None:
        chance = random.Random(seed)
        while self._another():
            with self._pool.session() as session:
                for code in self._choose(chance):
                    self._count(session.run(code))
            self._finish_row()

    async def task(self, seed: int) -> None:
        chance = random.Random(seed)
        while self._another():
            session: Session = await self._pool.session_async()
            with session:
                for code in self._choose(chance):
                    self._count(await session.run_async(code))
            self._finish_row()

    def _another(self) -> bool:
        with self._lock:
            if time.monotonic() >= self._end or self._begun >= self._most:
                return False
            self._begun += 1
            return True

    def _choose(self, chance: random.Random) -> tuple[str, ...]:
        weights = [weight for weight, _ in ROWS]
        return chance.choices([blocks for _, blocks in ROWS], weights)[0]

    def _count(self, result: Any) -> None:
        kind = result.breached or (result.error.type if result.error is not None else "fine")
        with self._lock:
            self.outcomes[kind] += 1

    def _finish_row(self) -> None:
        with self._lock:
            self.sessions += 1


async def run_tasks(soak: Soak, count: int) -> None:
    await asyncio.gather(*(soak.task(1000 + number) for number in range(count)))


def measure(isolation: str, minutes: float, most: float, at_once: int) -> dict[str, Any]:
    gc.collect()
    start = time.monotonic()
    before = take_sample(start, 0, None)
    samples: list[Sample] = []
    pool = SandboxPool(isolation=isolation, limits=LIMITS, warm=4, max_sessions=at_once)  # type: ignore[arg-type]
    with pool:
        level = pool.report.level
        servers = [child for child in family(os.getpid()) if resident(child)]
        soak = Soak(pool, time.monotonic() + 60 * minutes, most)
        workers = [threading.Thread(target=soak.thread, args=(number,)) for number in range(at_once // 2)]
        workers.append(threading.Thread(target=lambda: asyncio.run(run_tasks(soak, at_once))))
        for worker in workers:
            worker.start()
        pause = 2.0 if math.isinf(minutes) else max(0.5, 60 * minutes / 200)
        while any(worker.is_alive() for worker in workers):
            time.sleep(pause)
            samples.append(take_sample(start, soak.sessions, min(servers, default=None)))
            last = samples[-1]
            if sys.stderr.isatty():
                print(f"\r{last.seconds:8.0f} s {last.sessions:9} sessions", end="", file=sys.stderr)
        for worker in workers:
            worker.join()
    gc.collect()
    after = take_sample(start, soak.sessions, None)
    return {
        "level": level,
        "minutes": round((time.monotonic() - start) / 60, 2),
        "machine": machine.description(),
        "sessions": soak.sessions,
        "outcomes": dict(soak.outcomes.most_common()),
        "before": asdict(before),
        "after": asdict(after),
        "samples": [asdict(sample) for sample in samples],
    }


def growth(samples: list[dict[str, Any]], name: str) -> tuple[float, float]:
    """The means of the second tenth and of the last tenth of a run."""
    tenth = max(1, len(samples) // 10)
    early = [sample[name] for sample in samples[tenth : 2 * tenth] or samples]
    late = [sample[name] for sample in samples[-tenth:]]
    return sum(early) / len(early), sum(late) / len(late)


NAMES = ("host_mib", "fork_server_mib", "processes", "descriptors", "threads", "folders")


def show(figures: dict[str, Any]) -> None:
    print(f"level {figures['level']}: {figures['sessions']} sessions in {figures['minutes']:g} minutes")
    print("  " + ", ".join(f"{kind} {count}" for kind, count in figures["outcomes"].items()))
    print(f"  {'':<18}{'before':>10}{'early':>10}{'late':>10}{'after':>10}")
    for name in NAMES:
        early, late = growth(figures["samples"], name)
        before, after = figures["before"][name], figures["after"][name]
        print(f"  {name:<18}{before:>10.1f}{early:>10.1f}{late:>10.1f}{after:>10.1f}")


def plot(figures: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    samples = figures["samples"]
    sheet, axes = pyplot.subplots(3, 1, sharex=True, figsize=(9, 9))
    groups = (("MiB", ("host_mib", "fork_server_mib")), ("count", NAMES[2:]), ("sessions", ("sessions",)))
    for axis, (unit, names) in zip(axes, groups, strict=True):
        for name in names:
            axis.plot([sample["seconds"] / 60 for sample in samples], [sample[name] for sample in samples], label=name)
        axis.set_ylabel(unit)
        axis.legend(loc="upper left")
    axes[-1].set_xlabel("minutes")
    sheet.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="end after so many; by default 1, or never with --sessions")
    parser.add_argument("--sessions", type=int, help="end after so many")
    parser.add_argument("--isolation", choices=("auto", "full", "container"), default="auto")
    parser.add_argument("--at-once", type=int, default=16, help="sessions open at a time")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--plot", type=Path, help="also draw curves there (needs matplotlib)")
    options = parser.parse_args()
    minutes = options.minutes if options.minutes is not None else math.inf if options.sessions else 1.0
    most = math.inf if options.sessions is None else options.sessions
    if minutes <= 0 or most < 1 or options.at_once < 2:
        parser.error("--minutes must be over 0, --sessions at least 1, --at-once at least 2")
    figures = measure(options.isolation, minutes, most, options.at_once)
    show(figures)
    if options.json:
        options.json.write_text(json.dumps(figures) + "\n")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: no curves", file=sys.stderr)
    elif options.plot:
        plot(figures, options.plot)
    counted = ("processes", "descriptors", "threads", "folders")
    left = {name: figures["after"][name] - figures["before"][name] for name in counted}
    if any(left.values()):
        print(f"left behind: {left}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
