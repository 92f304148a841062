"""10,000 calls of a tool from the code of 1,000 sessions: by themselves, in batches, and remembered.

Four tools: one that does nothing (the floor: sessions, channel and host alone), midstream's own retriever over the
documentation that every installation has, a search among vectors on this machine (a product that reads all of them,
for one query or for many), and a server that takes 10 ms a request, eight at a time. Every session runs one block
that makes its calls one after another. Prints a table and, with ``--json FILE``, writes the figures. Nothing here
fails for being slow.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import description, load
from benchmarks.retrieval import corpus, queries
from midstream import SandboxLimits, SandboxPool, Session, ToolSet
from midstream.tools import Retriever, Tool, ToolHost
from midstream.types import ToolCall

VECTORS, WIDTH, DISTINCT = 20_000, 128, 2_000
SERVER_SECONDS, SERVER_AT_ONCE = 0.010, 8


class Nothing:
    executions = 0

    def one(self, query: str) -> list[str]:
        return self.many([query])[0]

    def many(self, query: Sequence[str]) -> list[list[str]]:
        self.executions += 1
        return [[text] for text in query]


class Words(Nothing):
    """``Retriever``: the passages that hold the words of a query."""

    def __init__(self) -> None:
        documents = corpus()
        self._retriever = Retriever(documents, num_results=3)
        self._queries = queries(documents, DISTINCT)

    def many(self, query: Sequence[str]) -> list[list[str]]:
        self.executions += 1
        return self._retriever.answer([self._queries[int(text.rpartition(" ")[2])] for text in query])


class Vectors(Nothing):
    """The nearest of many vectors, by a product that reads all of them."""

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        self._vectors = generator.standard_normal((VECTORS, WIDTH), dtype=np.float32)
        self._queries = generator.standard_normal((DISTINCT, WIDTH), dtype=np.float32)

    def many(self, query: Sequence[str]) -> list[list[str]]:
        self.executions += 1
        wanted = self._queries[[int(text.rpartition(" ")[2]) for text in query]]
        return [[f"passage {best}"] for best in (wanted @ self._vectors.T).argmax(axis=1)]


class Server(Nothing):
    """Something far away that takes as long for one query as for many."""

    def __init__(self) -> None:
        self._places = threading.Semaphore(SERVER_AT_ONCE)

    def many(self, query: Sequence[str]) -> list[list[str]]:
        with self._places:
            time.sleep(SERVER_SECONDS)
        return super().many(query)


def ways(tool: Any) -> dict[str, Tool]:
    """The same tool by itself, in batches, and in batches with equal calls asked for once."""
    return {
        "by itself": Tool("retrieve", tool.one, concurrency=SERVER_AT_ONCE),
        "batched": Tool("retrieve", tool.one, batched=tool.many, concurrency=2),
        "batched, pure": Tool("retrieve", tool.one, batched=tool.many, concurrency=2, pure=True),
    }


def block(session: int, calls: int) -> str:
    first = session * calls
    return f"for number in range({first}, {first + calls}):\n    retrieve(f'query {{number * 7919 % {DISTINCT}}}')"


async def measure(opened: Sequence[Session], tool: Tool, asked: Nothing, calls: int) -> dict[str, float]:
    host = ToolHost(ToolSet([tool]))
    for session in opened:
        session.serve(host.row().call)
    try:
        executions, processor, began = asked.executions, time.process_time(), time.perf_counter()
        results = await asyncio.gather(*(one.run_async(block(i, calls)) for i, one in enumerate(opened)))
        seconds, processor = time.perf_counter() - began, time.process_time() - processor
        executions = asked.executions - executions
    finally:
        await asyncio.to_thread(host.close)
    made: list[ToolCall] = [call for result in results for call in result.tool_calls]
    faults = [call.error for call in made if call.error is not None]
    if len(made) != len(opened) * calls or faults:
        raise RuntimeError(f"{len(made)} calls of {len(opened) * calls}, {len(faults)} faults: {faults[:1]}")
    latency = sorted(call.duration * 1000 for call in made)
    return {
        "seconds": seconds,
        "calls/s": len(made) / seconds,
        "executions": executions,
        "processor s": processor,
        "p50 ms": statistics.median(latency),
        "p99 ms": latency[len(latency) * 99 // 100],
        "calls/batch": statistics.mean(call.batched for call in made),
        "shared %": 100 * sum(call.cached for call in made) / len(made),
    }


def line(name: str, figures: dict[str, float]) -> str:
    return f"{name:24}" + "".join(f"{figure:16.2f}" for figure in figures.values())


def measured(pool: SandboxPool, sessions: int, calls: int, times: int) -> dict[str, dict[str, dict[str, float]]]:
    """For each tool and way, the best of several measurements."""
    rows: dict[str, dict[str, dict[str, float]]] = {}
    offers = ToolSet(list(ways(Nothing()).values())[:1]).offers
    with asyncio.Runner() as runner:
        opened = [pool.session(tools=offers, call_tool=lambda *_: None) for _ in range(sessions)]
        for name, tool in (
            ("nothing", Nothing()),
            ("retriever", Words()),
            ("vectors", Vectors()),
            ("server", Server()),
        ):
            rows[name] = {}
            for way, made in ways(tool).items():
                runs = [runner.run(measure(opened, made, tool, calls)) for _ in range(times)]
                rows[name][way] = min(runs, key=lambda figures: figures["seconds"])
                if len(rows) == len(rows[name]) == 1:
                    print(f"{'':24}" + "".join(f"{head:>16}" for head in rows[name][way]))
                print(line(f"{name}, {way}", rows[name][way]), flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=1000)
    parser.add_argument("--calls", type=int, default=10, help="of each session")
    parser.add_argument("--times", type=int, default=2, help="each is measured so often; the best counts")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(f"{options.sessions} sessions, {options.calls} calls each")
    with SandboxPool(preload=[], limits=SandboxLimits(wall_time=600.0, tool_time=600.0)) as pool:
        rows = measured(pool, options.sessions, options.calls, options.times)
    if options.json is not None:
        told = {"machine": description(), "load": load(), "sessions": options.sessions, "calls": options.calls}
        options.json.write_text(json.dumps({**told, "tools": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
