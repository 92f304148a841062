"""A cluster of 1,000 nodes and a million sessions, simulated with what ``benchmarks.cluster`` has measured.

Discrete events (simpy): replicas step; each step's ids are a message to the driver, which handles one thing at a time;
blocks that close are calls, which go to hosts in messages, as many as wait for one; hosts have so many cores; results
come back the same way, and the row is sampled for again. A replica is at most two steps ahead of its driver's answers,
as in midstream. Sessions that are alike are counted, not told apart: how many rows of a replica run, and how many wait.

What is assumed of models, code and machines is in ``Assumed``, and stands with the results. What midstream and Ray
take is measured.

    python -m benchmarks.scale --costs benchmarks/results/cluster.json [--json benchmarks/results/FILE.json]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import defaultdict
from collections.abc import Generator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import description

Figures = dict[str, Any]
Process = Generator[Any, Any, None]


@dataclass(frozen=True)
class Assumed:
    """Of each node: one replica, ``rows`` sessions, ``cores``. ``step_time``: seconds that a model takes for one id
    of every row. ``block_every``: ids between two blocks; ``code_time``: processor seconds of a block's code;
    ``length``: ids of a trajectory. Numbers drawn are geometric and exponential with these means."""

    rows: int = 1000
    cores: int = 16
    step_time: float = 0.05
    block_every: int = 200
    code_time: float = 0.005
    length: int = 1000
    seconds: float = 3.0
    settle: float = 1.0


@dataclass(frozen=True)
class Costs:
    """Processor seconds, as measured."""

    call: float
    message: float
    host_call: float
    id: float
    step: float
    place: float
    round_trip: float

    @classmethod
    def of(cls, measured: Figures) -> Costs:
        return cls(
            call=measured["driver, a call in a batch"],
            message=measured["driver, the messages of a call alone"],
            host_call=measured["host, a call"],
            id=measured["driver, an id"],
            step=measured["driver, a step of a replica"],
            place=measured["driver, placing a session among 1,000 hosts"] / 1000,
            round_trip=measured["round trip of a call"],
        )


@dataclass
class Counts:
    """What happened after the cluster had settled. Busy: seconds of all drivers, cores and engines together."""

    ids: int = 0
    calls: int = 0
    messages: int = 0
    waited: float = 0.0
    driver: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    cores: float = 0.0
    engines: float = 0.0


class Driver:
    """One process that does one thing at a time, with a group of nodes."""

    def __init__(self, cluster: Cluster, nodes: int) -> None:
        import simpy

        self.cluster = cluster
        self.queue: Any = simpy.Store(cluster.time)
        self.nodes = [Node(cluster, self) for _ in range(nodes)]
        cluster.time.process(self.work())

    def work(self) -> Process:
        """Things to do are (seconds by kind, what then)."""
        while True:
            seconds, then = yield self.queue.get()
            yield self.cluster.time.timeout(sum(seconds.values()))
            if self.cluster.settled:
                for kind, each in seconds.items():
                    self.cluster.counts.driver[kind] += each
            then()


class Node:
    """A replica, and a host of sandboxes. Sessions of a driver's rows are spread over all of its nodes."""

    def __init__(self, cluster: Cluster, driver: Driver) -> None:
        import simpy

        self.cluster, self.driver = cluster, driver
        self.running = cluster.assumed.rows
        self.credit: Any = simpy.Container(cluster.time, init=2)
        self.cores: Any = simpy.Resource(cluster.time, cluster.assumed.cores)
        self.outgoing: list[tuple[Node, float]] = []
        self.sending = False
        self.returning: list[tuple[Node, float]] = []
        self.collecting = False
        cluster.time.process(self.sample())

    def sample(self) -> Process:
        cluster, assumed = self.cluster, self.cluster.assumed
        yield cluster.time.timeout(cluster.random.random() * assumed.step_time)
        while True:
            yield self.credit.get(1)
            yield cluster.time.timeout(assumed.step_time)
            count = self.running
            if cluster.settled:
                cluster.counts.engines += assumed.step_time if count else 0.0
            seconds = {"messages of steps": cluster.costs.step, "ids": cluster.costs.id * count}
            self.driver.queue.put((seconds, lambda count=count: self.sampled(count)))

    def sampled(self, count: int) -> None:
        """A step's ids have been handled: some rows have closed a block, some are over and others begin."""
        cluster, assumed = self.cluster, self.cluster.assumed
        self.credit.put(1)
        if cluster.settled:
            cluster.counts.ids += count
        ended = cluster.drawn(count, 1 / assumed.length)
        if ended:
            placing = {"placing": ended * cluster.costs.place * len(self.driver.nodes)}
            self.driver.queue.put((placing, lambda: None))
        closed = min(self.running, cluster.drawn(count, 1 / assumed.block_every))
        self.running -= closed
        for _ in range(closed):
            host = cluster.random.choice(self.driver.nodes)
            host.outgoing.append((self, cluster.time.now))
            host.send()

    # --- the host

    def send(self) -> None:
        """One message with calls is under way at a time; all that wait go with the next."""
        if self.outgoing and not self.sending:
            self.sending = True
            half = self.cluster.costs.message / 2
            self.driver.queue.put(({"messages of calls": half}, self.sent))

    def sent(self) -> None:
        calls, self.outgoing = self.outgoing, []
        self.cluster.count_message()
        for call in calls:
            self.cluster.time.process(self.run(call))
        self.cluster.time.process(self.arrive())

    def arrive(self) -> Process:
        yield self.cluster.time.timeout(self.cluster.costs.round_trip / 2)
        self.sending = False
        self.send()

    def run(self, call: tuple[Node, float]) -> Process:
        cluster = self.cluster
        yield cluster.time.timeout(cluster.costs.round_trip / 2)
        with self.cores.request() as core:
            yield core
            seconds = cluster.costs.host_call + cluster.random.expovariate(1 / cluster.assumed.code_time)
            yield cluster.time.timeout(seconds)
            if cluster.settled:
                cluster.counts.cores += seconds
        self.returning.append(call)
        self.give_back()

    def give_back(self) -> None:
        if self.returning and not self.collecting:
            self.collecting = True
            self.cluster.time.process(self.return_all())

    def return_all(self) -> Process:
        yield self.cluster.time.timeout(self.cluster.costs.round_trip / 2)
        calls, self.returning = self.returning, []
        self.cluster.count_message()
        seconds = {"messages of calls": self.cluster.costs.message / 2, "calls": self.cluster.costs.call * len(calls)}
        self.driver.queue.put((seconds, lambda: self.returned(calls)))

    def returned(self, calls: list[tuple[Node, float]]) -> None:
        self.collecting = False
        self.give_back()
        for replica, since in calls:
            replica.running += 1
            if self.cluster.settled:
                self.cluster.counts.calls += 1
                self.cluster.counts.waited += self.cluster.time.now - since


class Cluster:
    """``nodes`` in groups of equal size, each with a driver."""

    def __init__(self, nodes: int, drivers: int, costs: Costs, assumed: Assumed, seed: int = 0) -> None:
        import numpy
        import simpy

        self.time: Any = simpy.Environment()
        self.costs, self.assumed = costs, assumed
        self.random = random.Random(seed)
        self._drawn = numpy.random.default_rng(seed).binomial
        self.counts = Counts()
        sizes = [nodes // drivers + (number < nodes % drivers) for number in range(drivers)]
        self.nodes = nodes
        self.drivers = [Driver(self, size) for size in sizes]

    def drawn(self, count: int, probability: float) -> int:
        return int(self._drawn(count, probability))

    @property
    def settled(self) -> bool:
        return bool(self.time.now >= self.assumed.settle)

    def count_message(self) -> None:
        if self.settled:
            self.counts.messages += 1

    def run(self) -> Figures:
        assumed, counts = self.assumed, self.counts
        self.time.run(until=assumed.seconds)
        seconds = assumed.seconds - assumed.settle
        driver = {kind: busy / seconds / len(self.drivers) for kind, busy in counts.driver.items()}
        busy = {
            "driver": sum(driver.values()),
            "cores of the hosts": counts.cores / seconds / self.nodes / assumed.cores,
            "engines": counts.engines / seconds / self.nodes,
        }
        return {
            "nodes": self.nodes,
            "drivers": len(self.drivers),
            "sessions": self.nodes * assumed.rows,
            "ids a second": counts.ids / seconds,
            "of what engines can do": counts.ids / seconds / ideal(self.nodes, assumed, self.costs),
            "calls a second": counts.calls / seconds,
            "calls a message": 2 * counts.calls / max(1, counts.messages),
            "ms from block to result": counts.waited / counts.calls * 1e3 if counts.calls else None,
            "busy": busy,
            "busy driver, by what": driver,
        }


def ideal(nodes: int, assumed: Assumed, costs: Costs) -> float:
    """Ids a second where only engines and code take time."""
    cycle = assumed.block_every * assumed.step_time
    waiting = assumed.code_time + costs.host_call
    return nodes * assumed.rows / assumed.step_time * cycle / (cycle + waiting)


def in_ms(one: Figures) -> str:
    """From a block's end to its result; of a driver that never got so far, nothing is known."""
    waited = one["ms from block to result"]
    return "-" if waited is None else f"{waited:,.0f}"


def draw(one_driver: list[Figures], many_drivers: list[Figures], costs: Costs, assumed: Assumed, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "midstream"  # the same numbers give the same file
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    nodes = [one["nodes"] for one in one_driver]
    left.plot(nodes, [ideal(count, assumed, costs) for count in nodes], "--", color="grey", label="engines alone")
    left.plot(nodes, [one["ids a second"] for one in one_driver], "o-", label="with one driver")
    left.set(xscale="log", yscale="log", xlabel="nodes", ylabel="ids a second", title="One driver")
    left.legend()
    drivers = [one["drivers"] for one in many_drivers]
    for name in many_drivers[0]["busy"]:
        right.plot(drivers, [one["busy"][name] for one in many_drivers], "o-", label=f"{name}, busy")
    reached = [one["of what engines can do"] for one in many_drivers]
    right.plot(drivers, reached, "s--", color="black", label="ids, of what engines can do")
    title = f"{many_drivers[0]['nodes']:,} nodes, {many_drivers[0]['sessions']:,} sessions"
    right.set(xscale="log", xlabel="drivers", ylim=(0, 1.05), title=title)
    right.legend()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--costs", type=Path, default=Path("benchmarks/results/cluster.json"))
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    try:
        import simpy
    except ImportError:
        print("simpy is not installed here; `make bench-ray` installs it apart and simulates")
        return 0
    measured = json.loads(options.costs.read_text(encoding="utf-8"))
    costs, assumed = Costs.of(measured["costs"]), Assumed()
    counts = [count for count in (1, 2, 3, 4, 8, 16, 64, 250) if count < options.nodes]
    one_driver = [Cluster(count, 1, costs, assumed).run() for count in [*counts, options.nodes]]
    shares = (1000, 64, 16, 4, 2, 1)  # nodes of one driver
    many = [Cluster(options.nodes, -(-options.nodes // share), costs, assumed).run() for share in shares]
    table = Table("nodes", "drivers", "ids/s", "of ideal", "ms a call", "driver", "cores", "engines", title="Simulated")
    for one in (*one_driver, *many):
        busy = (f"{value:.0%}" for value in one["busy"].values())
        reached, waited = f"{one['of what engines can do']:.0%}", in_ms(one)
        table.add_row(str(one["nodes"]), str(one["drivers"]), f"{one['ids a second']:,.0f}", reached, waited, *busy)
    Console().print(table)
    if options.json is not None:
        record = {
            "benchmark": "scale",
            "machine": measured["machine"] | {"simulated with": description()["python"]},
            "versions": {"simpy": simpy.__version__},
            "assumed": asdict(assumed),
            "costs": asdict(costs),
            "driver bytes, a row of 1,000 ids": measured["costs"]["driver bytes, a row of 1,000 ids"],
            "one driver": one_driver,
            "many drivers": many,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=2) + "\n")
        draw(one_driver, many, costs, assumed, options.json.with_suffix(".svg"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
