"""Tools of which a few take very long: what they cost the rows that have nothing to do with them.

**Scripted engine**, a fixed 10 ms a step. 256 rows with four blocks each; every block calls a tool that takes a
time drawn from a lognormal distribution (half of them under 50 ms, one in a hundred over 5 s; none over 15 s, as if
a deadline ended it there). Wall time of:

- ``alone``: the row whose tools take longest of all, by itself: no batch can be done sooner;
- ``midstream``: all rows together;
- ``rounds``: all rows together, as loops around ``generate`` do it: decode until every row has stopped, run all
  code that was asked for, wait for all of it, begin again. Same rows, engine and sandboxes.

**Hugging Face engine**, a random 20M-parameter Llama on the CPU, 16 rows of which half call the same tools. The
model is computed for every id; which id comes out is then put in its place by a script, as a random model writes
no tags. Tokens a second of the rows that call nothing, from the first step to the end of the last of them:
``tools`` beside ``none``, where the other half writes as many ids and calls nothing either. In turns, several
times over; a second of this process's processor time, and of the clock, which a machine with other work bends.

    python -m benchmarks.heavy_tails [--rows 256] [--skip-model] [--json benchmarks/results/FILE.json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import midstream as ms
from benchmarks.machine import description, load
from benchmarks.talking import TalkingModel
from midstream.engines.base import RowRequest
from midstream.row import Inject, RowState
from tests.vocabularies import tokenizer

MEDIAN, HUNDREDTH, LONGEST = 0.05, 5.0, 15.0
"""Seconds: half of the calls are shorter than the first, one in a hundred is longer than the second."""

STEP_TIME = 0.01
LIMITS = ms.SandboxLimits(wall_time=600.0)
"""A tool's time counts as the block's."""


@dataclass(frozen=True)
class Shape:
    rows: int = 256
    calls: int = 4
    words_between: int = 24
    seed: int = 1


@dataclass
class Workload:
    """For each row how long its calls take, and the text that its model says."""

    shape: Shape
    seconds: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        generator = random.Random(self.shape.seed)
        sigma = math.log(HUNDREDTH / MEDIAN) / statistics.NormalDist().inv_cdf(0.99)
        self.seconds = [
            [min(LONGEST, generator.lognormvariate(math.log(MEDIAN), sigma)) for _ in range(self.shape.calls)]
            for _ in range(self.shape.rows)
        ]

    @property
    def slowest(self) -> int:
        return max(range(self.shape.rows), key=lambda row: sum(self.seconds[row]))

    def text(self, row: int, *, calling: bool = True) -> str:
        words = "so " * self.shape.words_between
        block = "<code>wait({row}, {call})</code>" if calling else "[code]wait({row}, {call})[/code]"
        return "".join(words + block.format(row=row, call=call) for call in range(self.shape.calls)) + words

    async def wait(self, row: int, call: int) -> str:
        await asyncio.sleep(self.seconds[row][call])
        return "done"


@dataclass
class Measurement:
    arm: str
    seconds: float
    steps: int
    note: str = ""


# --- the scripted engine


def scripted(work: Workload) -> ms.ScriptedEngine:
    return ms.ScriptedEngine(
        tokenizer("o200k"), {f"row {row}": work.text(row) for row in range(work.shape.rows)}, step_time=STEP_TIME
    )


def run_midstream(work: Workload, rows: Sequence[int], pool: ms.SandboxPool, arm: str) -> Measurement:
    engine = scripted(work)
    with ms.Generator(engine, pool=pool, tools={"wait": work.wait}) as generator:
        begin = time.perf_counter()
        batch = generator.generate([ms.Prompt(text=f"row {row}", id=str(row)) for row in rows])
        seconds = time.perf_counter() - begin
    check(work, batch)
    return Measurement(arm, seconds, engine.steps)


def run_rounds(work: Workload, pool: ms.SandboxPool) -> Measurement:
    """Every row decodes until it needs a result; then all results are made; then all rows decode again."""
    engine = scripted(work)

    async def call(name: str, arguments: Sequence[Any], _keywords: dict[str, Any]) -> str:
        assert name == "wait"
        return await work.wait(*arguments)

    async def execute(row: ms.Row, session: ms.Session) -> list[ms.ExecutionResult]:
        return [await session.run_async(one.code) for one in row.pending]

    async def rounds() -> int:
        rows: dict[int, ms.Row] = {}
        sessions: dict[int, ms.Session] = {}
        for index in range(work.shape.rows):
            row = ms.Row(ms.Prompt(text=f"row {index}", id=str(index)), engine.tokenizer, ms.CODE_TAGS)
            rows[engine.open(RowRequest(tuple(row.ids)))[0]] = row
        count = 0
        while rows:
            count += 1
            while updates := engine.step():
                for update in updates:
                    row = rows[update.handle]
                    received = row.receive(update.ids, update.logprobs)
                    if row.state is not RowState.GENERATING:
                        engine.rollback(update.handle, len(update.ids) - received.accepted)
            for handle in [handle for handle, row in rows.items() if row.state is RowState.STOPPED]:
                engine.close(handle)
                sessions.pop(handle).close()
                done.append(rows.pop(handle).trajectory)
            opened = [handle for handle in rows if handle not in sessions]
            options: dict[str, Any] = {"tools": ["wait"], "call_tool": call, "seed": 0}
            made = await asyncio.gather(*(pool.session_async(**options) for _ in opened))
            sessions.update(zip(opened, made, strict=True))
            waiting = list(rows.items())
            results = await asyncio.gather(*(execute(row, sessions[handle]) for handle, row in waiting))
            for (handle, row), shown in zip(waiting, results, strict=True):
                injected = row.inject(*shown)
                assert isinstance(injected, Inject)
                engine.extend(handle, injected.ids)
        return count

    done: list[ms.Trajectory] = []
    begin = time.perf_counter()
    count = asyncio.run(rounds())
    seconds = time.perf_counter() - begin
    check(work, done)
    return Measurement("rounds", seconds, engine.steps, f"{count} rounds")


def check(work: Workload, batch: Sequence[ms.Trajectory]) -> None:
    """A benchmark of rows that did something else measures nothing."""
    for trajectory in batch:
        shown = [record.result.text for record in trajectory.calls if record.result is not None]
        if shown != ["'done'"] * work.shape.calls or not trajectory.stop.finished:
            raise RuntimeError(f"prompt {trajectory.prompt.id}: {trajectory.stop}, {shown}")


# --- the Hugging Face engine


@dataclass
class ModelMeasurement:
    arm: str
    tokens: int
    seconds: float
    cpu_seconds: float
    steps: int


def run_model(work: Workload, talking: TalkingModel, pool: ms.SandboxPool, arm: str) -> ModelMeasurement:
    """Half of the rows call tools (or write as much and call nothing); what is measured is the other half."""
    callers = range(work.shape.rows // 2)
    plain = range(work.shape.rows // 2, work.shape.rows)
    texts = {f"row {row}": work.text(row, calling=arm == "tools") for row in callers}
    texts |= {f"row {row}": work.text(row, calling=False) for row in plain}
    engine = talking.engine(texts, max_batch_size=work.shape.rows)
    ended: list[tuple[float, float, int]] = []

    def note(trajectory: ms.Trajectory) -> float:
        if int(str(trajectory.prompt.id)) in plain:
            ended.append((time.perf_counter(), time.process_time(), engine.statistics.steps))
        return 0.0

    with ms.Generator(engine, pool=pool, tools={"wait": work.wait}) as generator:
        begin, processor = time.perf_counter(), time.process_time()
        batch = generator.generate([ms.Prompt(text=text, id=text.split()[1]) for text in texts], reward=note)
    engine.shutdown()
    if arm == "tools":
        check(work, batch[: len(callers)])
    tokens = sum(row.generation_length for row in batch[len(callers) :])
    clock, processor_time, steps = max(ended)
    return ModelMeasurement(arm, tokens, clock - begin, processor_time - processor, steps)


# --- all of it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=Shape.rows)
    parser.add_argument("--repeats", type=int, default=3, help="of the model's arms, in turns")
    parser.add_argument("--skip-model", action="store_true", help="only the scripted engine")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    work = Workload(Shape(rows=options.rows))
    small = Workload(Shape(rows=16, words_between=60, seed=2))
    by_model: list[ModelMeasurement] = []
    with ms.SandboxPool(preload=[], limits=LIMITS) as pool:
        run_midstream(Workload(Shape(rows=2, calls=1)), [0, 1], pool, "warming up")
        measured = [
            run_midstream(work, [work.slowest], pool, "alone"),
            run_midstream(work, range(work.shape.rows), pool, "midstream"),
            run_rounds(work, pool),
        ]
        if not options.skip_model:
            talking = TalkingModel()
            run_model(Workload(Shape(rows=2, calls=1)), talking, pool, "tools")
            by_model = [
                run_model(small, talking, pool, arm) for _ in range(options.repeats) for arm in ("none", "tools")
            ]
    report(work, measured, by_model, options.json)


def report(work: Workload, measured: list[Measurement], by_model: list[ModelMeasurement], path: Path | None) -> None:
    alone, together, rounds = (one.seconds for one in measured)
    rows = Table("arm", "s", "steps", "against alone", "", title=f"{work.shape.rows} rows, heavy-tailed tools")
    for one in measured:
        rows.add_row(one.arm, f"{one.seconds:.1f}", str(one.steps), f"{one.seconds / alone:.2f}", one.note)
    console = Console()
    console.print(rows)
    comparisons = {"midstream / slowest row alone": together / alone, "rounds / slowest row alone": rounds / alone}
    if by_model:
        table = Table("tools", "tokens a CPU-second", "a second", title="Hugging Face model, rows that call nothing")
        for arm in ("none", "tools"):
            rates = [(one.tokens / one.cpu_seconds, one.tokens / one.seconds) for one in by_model if one.arm == arm]
            table.add_row(arm, *(", ".join(f"{rate:.0f}" for rate in column) for column in zip(*rates, strict=True)))
        pairs = list(zip(by_model[::2], by_model[1::2], strict=True))
        by_processor = statistics.median(
            none.cpu_seconds / tools.cpu_seconds * tools.tokens / none.tokens for none, tools in pairs
        )
        by_clock = statistics.median(none.seconds / tools.seconds * tools.tokens / none.tokens for none, tools in pairs)
        table.add_row("ratio", f"{by_processor:.2f}", f"{by_clock:.2f}")
        comparisons["rows that wait for nothing, with tools / without, tokens a CPU-second"] = by_processor
        comparisons["rows that wait for nothing, with tools / without, tokens a second"] = by_clock
        console.print(table)
    if path is not None:
        record = {
            "benchmark": "heavy_tails",
            "shape": asdict(work.shape),
            "tool_seconds": {"half under": MEDIAN, "one in a hundred over": HUNDREDTH, "at most": LONGEST},
            "step_time": STEP_TIME,
            "machine": description(),
            "load": load(),
            "measurements": [asdict(one) for one in measured],
            "by_model": [asdict(one) for one in by_model],
            "comparisons": comparisons,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
