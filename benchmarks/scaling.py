"""How cost grows with rows, with blocks a row, and with the length of rows: ten times each.

A scripted engine that takes no time, and real sandboxes: what is left is midstream's own work, sessions and code
included. Each series starts from the same batch and makes one thing larger, in steps up to ten times. Wall time
and this process's processor time, the best of several runs. ``exponent``: of the power of the factor that the
times grow with, fitted over all points of a series: 1 is linear, 2 would be quadratic.

    python -m benchmarks.scaling [--json benchmarks/results/FILE.json]    # the plot is beside it, as FILE.svg
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

import midstream as ms
from benchmarks.machine import description, load
from tests.vocabularies import tokenizer

FACTORS = (1, 2, 4, 7, 10)


@dataclass(frozen=True)
class Shape:
    """``words``: between two blocks, and behind the last; each is an id."""

    rows: int = 16
    blocks: int = 4
    words: int = 60

    def times(self, name: str, factor: int) -> Shape:
        return replace(self, **{name: getattr(self, name) * factor})


SERIES = {"rows": "rows", "blocks": "blocks a row", "words": "ids between blocks"}


@dataclass
class Measurement:
    series: str
    factor: int
    shape: Shape
    ids: int
    seconds: float
    cpu_seconds: float


def run(shape: Shape, pool: ms.SandboxPool) -> tuple[float, float, int]:
    """Seconds, processor seconds, and how many ids there are behind the prompts."""
    text = "".join("so " * shape.words + f"<code>x = {block}; x + 1</code>" for block in range(shape.blocks))
    engine = ms.ScriptedEngine(tokenizer("o200k"), text + "so " * shape.words)
    with ms.Generator(engine, pool=pool) as generator:
        begin, processor = time.perf_counter(), time.process_time()
        batch = generator.generate([f"row {row}" for row in range(shape.rows)])
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - processor
    for row in batch:
        shown = [record.result.text for record in row.calls if record.result is not None]
        if shown != [str(block + 1) for block in range(shape.blocks)]:
            raise RuntimeError(f"prompt {row.prompt.id}: {row.stop}, {shown[:3]}")
    return seconds, cpu_seconds, sum(row.generation_length for row in batch)


def exponent(measured: list[Measurement], of: str) -> float:
    """The slope of the logarithms, by least squares."""
    points = [(math.log(one.factor), math.log(getattr(one, of))) for one in measured]
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def draw(measured: list[Measurement], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "midstream"  # the same numbers give the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(SERIES), figsize=(11, 3.6), layout="constrained")
    for axis, (name, title) in zip(axes, SERIES.items(), strict=True):
        own = [one for one in measured if one.series == name]
        factors = [one.factor for one in own]
        axis.plot(factors, [one.seconds / own[0].seconds for one in own], "o-", label="wall time")
        axis.plot(factors, [one.cpu_seconds / own[0].cpu_seconds for one in own], "s-", label="processor time")
        axis.plot(factors, factors, "--", color="grey", label="linear")
        axis.set(title=f"{title} (from {getattr(Shape(), name)})", xlabel="times as many", ylim=(0, None))
        axis.set_xticks(factors)
    axes[0].set_ylabel("times the cost")
    axes[0].legend()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    measured: list[Measurement] = []
    with ms.SandboxPool(preload=[]) as pool:
        run(Shape(rows=2), pool)
        for name in SERIES:
            for factor in FACTORS:
                shape = Shape().times(name, factor)
                runs = [run(shape, pool) for _ in range(options.repeats)]
                seconds, cpu_seconds = min(one[0] for one in runs), min(one[1] for one in runs)
                measured.append(Measurement(name, factor, shape, runs[0][2], seconds, cpu_seconds))
    table = Table("", "times", "ids", "s", "CPU s", "µs CPU an id", title="Cost of ten times as much")
    exponents = {}
    for name, title in SERIES.items():
        own = [one for one in measured if one.series == name]
        for one in own:
            cost = f"{one.cpu_seconds / one.ids * 1e6:.1f}"
            row = (str(one.factor), str(one.ids), f"{one.seconds:.2f}", f"{one.cpu_seconds:.2f}", cost)
            table.add_row(title if one.factor == 1 else "", *row)
        exponents[title] = {of: round(exponent(own, of), 2) for of in ("seconds", "cpu_seconds")}
        by_clock, by_processor = exponents[title].values()
        table.add_row("", "exponent", "", f"{by_clock:.2f}", f"{by_processor:.2f}", "", end_section=True)
    Console().print(table)
    if options.json is not None:
        record = {
            "benchmark": "scaling",
            "machine": description(),
            "load": load(),
            "measurements": [asdict(one) for one in measured],
            "exponents": exponents,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=2) + "\n")
        draw(measured, options.json.with_suffix(".svg"))


if __name__ == "__main__":
    main()
