"""What a cluster costs: calls through Ray beside the local pool, and ids through replicas beside a local engine.

A Ray cluster of one node and of several, all on this machine, so that their processor time is shared: what can be
seen here is the overhead of a call and of an id, and whether it grows with the nodes; not how throughput grows.

- *calls*: 256 sessions that are alive each run ``x + 1`` at the same moment, again and again; arms take turns.
  ``ms a call``: wall time of a batch by its calls. ``driver``: processor time of this process, a call. ``all``: of this
  process and of all that belong to the sandboxes.
- *latency*: one call at a time.
- *ids*: 64 rows a replica that say so many ids, over a scripted engine whose steps take 20 ms.
- *costs*: what the simulation of ``benchmarks.scale`` takes from here.

    python -m benchmarks.cluster [--json benchmarks/results/FILE.json]    # make bench-ray
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import midstream as ms
from benchmarks.machine import description, load
from benchmarks.processes import family

SESSIONS = 256
STORE = 100 << 20
STEP_TIME = 0.02
ROWS = 64
Figures = dict[str, Any]


@contextmanager
def cluster() -> Iterator[Any]:
    """One node; more can be added."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ |= {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_memory_monitor_refresh_ms": "0"}
    home = os.environ.get("HOME", "/")
    with tempfile.TemporaryDirectory(prefix="mr", ignore_cleanup_errors=True) as folder:
        os.environ["HOME"] = folder
        one = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 2, "include_dashboard": False, "object_store_memory": STORE},
        )
        ray.init(address=one.address, log_to_driver=False, logging_level=logging.ERROR)
        try:
            yield one
        finally:
            ray.shutdown()
            one.shutdown()
            os.environ["HOME"] = home


def processor_seconds(processes: list[int]) -> float:
    """Used so far by these, and by those of their children that have ended."""
    ticks = 0
    for process in processes:
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


# --- calls


class Arm:
    """A pool with sessions that are alive."""

    def __init__(self, name: str, pool: Any, nodes: int) -> None:
        self.name, self.pool, self.nodes = name, pool, nodes
        self.wall: list[float] = []
        self.driver: list[float] = []
        self.everything: list[float] = []
        self.latency: list[float] = []
        self.driver_alone: list[float] = []
        begin = time.perf_counter()
        self.sessions = asyncio.run(self._open())
        self.opened = (time.perf_counter() - begin) / SESSIONS

    async def _open(self) -> list[Any]:
        sessions = [await self.pool.session_async(seed=number) for number in range(SESSIONS)]
        await asyncio.gather(*(session.run_async("x = 1") for session in sessions))
        return sessions

    def processes(self) -> list[int]:
        hosts = [host.process_id for host in self.pool.hosts] if hasattr(self.pool, "hosts") else [os.getpid()]
        return sorted({os.getpid(), *hosts, *(child for host in hosts for child in family(host))})

    async def batches(self, count: int) -> None:
        """All sessions at once, ``count`` times."""
        for _ in range(count):
            begin, own = time.perf_counter(), time.process_time()
            results = await asyncio.gather(*(session.run_async("x + 1") for session in self.sessions))
            self.wall.append((time.perf_counter() - begin) / SESSIONS)
            self.driver.append((time.process_time() - own) / SESSIONS)
            if {result.text for result in results} != {"2"}:
                raise RuntimeError(f"{self.name}: {results[0]}")

    async def one_by_one(self, count: int) -> None:
        own = time.process_time()
        for number in range(count):
            begin = time.perf_counter()
            await self.sessions[number % SESSIONS].run_async("x + 1")
            self.latency.append(time.perf_counter() - begin)
        self.driver_alone.append((time.process_time() - own) / count)

    def round(self, batches: int) -> None:
        processes = self.processes()
        before = processor_seconds(processes)
        asyncio.run(self.batches(batches))
        self.everything.append((processor_seconds(processes) - before) / batches / SESSIONS)
        asyncio.run(self.one_by_one(20 * batches))

    def figures(self) -> Figures:
        return {
            "arm": self.name,
            "nodes": self.nodes,
            "calls a second": 1 / statistics.median(self.wall),
            "ms a call, median": statistics.median(self.wall) * 1e3,
            "ms a call, best": min(self.wall) * 1e3,
            "driver ms a call": statistics.median(self.driver) * 1e3,
            "all processor ms a call": statistics.median(self.everything) * 1e3,
            "driver ms a call, alone": statistics.median(self.driver_alone) * 1e3,
            "latency ms, median": statistics.median(self.latency) * 1e3,
            "latency ms, p99": statistics.quantiles(self.latency, n=100)[98] * 1e3,
            "ms to open a session": self.opened * 1e3,
        }


def calls(one: Any, node_counts: list[int], rounds: int, batches: int) -> list[Figures]:
    """The local pool and Ray's, taking turns, for each number of nodes."""
    from midstream.distributed.ray import RayPool

    found = []
    nodes = 1
    for wanted in node_counts:
        for _ in range(wanted - nodes):
            one.add_node(num_cpus=2, object_store_memory=STORE)
        nodes = wanted
        one.wait_for_nodes()
        with ExitStack() as stack:
            local = Arm("local pool", stack.enter_context(ms.SandboxPool(preload=[])), 0)
            pool = stack.enter_context(RayPool(preload=[], start_timeout=600, watch_interval=0.2))
            until = time.monotonic() + 600
            while len(pool.nodes) < nodes:
                if time.monotonic() > until:
                    raise RuntimeError(f"{len(pool.nodes)} of {nodes} nodes have hosts")
                time.sleep(0.1)
            arms = [local, Arm("through Ray", pool, nodes)]
            for arm in arms:
                arm.round(2)  # what is done once
                for taken in (arm.wall, arm.driver, arm.everything, arm.latency, arm.driver_alone):
                    taken.clear()
            for _ in range(rounds):
                for arm in arms:
                    arm.round(batches)
            local.nodes = nodes
            found += [arm.figures() for arm in arms]
    return found


# --- ids


def make_engine(length: int, step_time: float) -> ms.Engine:
    from tests.ray.tokens import bytes_tokenizer

    return ms.ScriptedEngine(bytes_tokenizer(), "a" * length, step_time=step_time)


def ids(replica_counts: list[int], length: int) -> list[Figures]:
    """Rows over a local engine, and over replicas."""
    from midstream.distributed.ray import RayGenerator

    def timed(name: str, replicas: int, rows: int, generator: ms.Generator) -> Figures:
        prompts = [ms.Prompt(text=f"{number}") for number in range(rows)]
        with generator:
            generator.generate(prompts[:1])
            begin, own = time.perf_counter(), time.process_time()
            batch = generator.generate(prompts)
            seconds, driver = time.perf_counter() - begin, time.process_time() - own
        count = sum(trajectory.generation_length for trajectory in batch)
        steps = replicas * (length + 1)
        return {
            "arm": name,
            "replicas": replicas,
            "rows": rows,
            "ids": count,
            "steps": steps,
            "ids a second": count / seconds,
            "ms a step": seconds / (length + 1) * 1e3,
            "driver seconds": driver,
            "driver µs an id": driver / count * 1e6,
        }

    def local(rows: int) -> Figures:
        return timed("local engine", 1, rows, ms.Generator(make_engine(length, STEP_TIME), markup=None))

    def remote(replicas: int, rows: int) -> Figures:
        generator = RayGenerator(
            lambda: make_engine(length, STEP_TIME), replicas=replicas, resources={"num_cpus": 0}, markup=None
        )
        return timed("through Ray", replicas, rows, generator)

    return [local(ROWS), remote(1, 1), remote(4, 4), *(remote(count, count * ROWS) for count in replica_counts)]


# --- costs


def placing(hosts: int, sessions: int) -> float:
    """Processor seconds to find a session a host among so many."""
    from midstream.distributed.placement import Placement

    class Fake:
        def __init__(self, number: int) -> None:
            self.node_id, self.cores, self.sessions = f"{number:08}", 16.0, 0

    placement: Placement[Fake] = Placement(None)
    for number in range(hosts):
        placement.add(Fake(number))
    begin = time.process_time()
    for _ in range(sessions):
        placement.ask().result()
    return (time.process_time() - begin) / sessions


def memory_of_a_row(length: int) -> float:
    """Bytes that the driver has for an open row of ``length`` ids."""
    from tests.ray.tokens import bytes_tokenizer

    tokenizer = bytes_tokenizer()
    rows = [ms.Row(ms.Prompt(text="q", id=str(number)), tokenizer) for number in range(9)]
    rows[0].receive([70], [-1.0])
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for row in rows[1:]:
        for position in range(length):
            row.receive([70 + position % 20], [-position / 1000])
    size = (tracemalloc.get_traced_memory()[0] - before) / (len(rows) - 1)
    tracemalloc.stop()
    return size


def fitted(of_ids: list[Figures]) -> tuple[float, float]:
    """Processor seconds of the driver for a step's message and for an id, by least squares over all runs; what a run
    costs once is a third."""
    import numpy

    matrix = numpy.array([[one["steps"], one["ids"], 1.0] for one in of_ids])
    (a_step, an_id, _), *_ = numpy.linalg.lstsq(matrix, numpy.array([one["driver seconds"] for one in of_ids]))
    return max(0.0, float(a_step)), max(0.0, float(an_id))


def costs(of_calls: list[Figures], of_ids: list[Figures]) -> Figures:
    """Seconds of a processor, each."""
    through_ray = [one for one in of_calls if one["arm"] == "through Ray"]
    driver = statistics.median(one["driver ms a call"] for one in through_ray) / 1e3
    everything = statistics.median(one["all processor ms a call"] for one in through_ray) / 1e3
    alone = statistics.median(one["driver ms a call, alone"] for one in through_ray) / 1e3
    a_step, an_id = fitted([one for one in of_ids if one["arm"] == "through Ray"])
    return {
        "driver, a call in a batch": driver,
        "driver, the messages of a call alone": max(0.0, alone - driver),
        "host, a call": everything - driver,
        "driver, an id": an_id,
        "driver, a step of a replica": a_step,
        "driver, placing a session among 1,000 hosts": placing(1000, 2000),
        "round trip of a call": statistics.median(one["latency ms, median"] for one in through_ray) / 1e3,
        "driver bytes, a row of 1,000 ids": memory_of_a_row(1000),
    }


def show(title: str, rows: list[Figures], columns: list[str]) -> None:
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(f"{row[name]:.3g}" if isinstance(row[name], float) else str(row[name]) for name in columns))
    Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--length", type=int, default=200, help="ids of each row")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    try:
        import ray
    except ImportError:
        print("Ray is not installed here: make bench-ray", file=sys.stderr)
        return 1
    with cluster() as one:
        of_calls = calls(one, options.nodes, options.rounds, options.batches)
        of_ids = ids([1, 2, 4], options.length)
    measured = costs(of_calls, of_ids)
    show("Calls", of_calls, [name for name in of_calls[0] if name != "ms to open a session"])
    show("Ids", of_ids, list(of_ids[0]))
    show("Costs", [{"what": name, "value": value} for name, value in measured.items()], ["what", "value"])
    overhead = {
        str(through["nodes"]): through["ms a call, best"] - here["ms a call, best"]
        for here, through in zip(of_calls[::2], of_calls[1::2], strict=True)
    }
    print(f"overhead of a call in a batch of {SESSIONS}, ms, best of all rounds, by nodes: {overhead}")
    if options.json is not None:
        record = {
            "benchmark": "cluster",
            "machine": description(),
            "versions": {"ray": ray.__version__},
            "load": load(),
            "calls": of_calls,
            "overhead": overhead,
            "ids": of_ids,
            "costs": measured,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
