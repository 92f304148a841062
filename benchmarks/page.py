"""Puts what was measured into docs/performance.md and docs/scale.md, between their markers.

python -m benchmarks.page                # both
python -m benchmarks.page scale.md       # this one
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.data import REPOSITORY

RESULTS = REPOSITORY / "benchmarks" / "results"
DOCS = REPOSITORY / "docs"
PLOTS = ("scaling.svg", "scale.svg")

Record = dict[str, Any]


def table(headings: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    headings = list(headings)
    lines = [headings, ["---"] * len(headings), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def machine(record: Record) -> str:
    known = record["machine"]
    cores = f"{known['cores']} core{'s' if known['cores'] > 1 else ''}"
    told = f"Measured on {cores} ({known['processor']}), Linux {known['kernel']}, Python {known['python']}"
    versions = "".join(f", {name} {version}" for name, version in record.get("versions", {}).items())
    load = record.get("load", known.get("load_after"))
    busy = f"; {load:g} thread{'' if load == 1 else 's'} wanted to run" if load is not None else ""
    return f"*{told}{versions}{busy}.*"


def engines_huggingface(record: Record) -> str:
    taken: dict[tuple[str, str], list[float]] = {}
    for one in record["measurements"]:
        taken.setdefault((one["schedule"], one["arm"]), []).append(one["cpu_seconds"])
    where = {"none": "no results", "together": "at the same step", "apart": "at steps of each row's own"}
    rows = []
    for schedule, told in where.items():
        engine = statistics.median(taken[schedule, "engine"])
        generate = taken.get((schedule, "generate"))
        ratio = record["comparisons"].get(f"{schedule}: engine with results / without", 1.0)
        beside = ("", "") if generate is None else (f"{generate[0]:.1f}", f"{generate[0] / engine:.1f}×")
        rows.append((told, f"{engine:.1f}", f"{ratio:.2f}×", *beside))
    headings = ("results come", "engine, CPU s", "against no results", "`model.generate`, CPU s", "times the engine's")
    return table(headings, rows)


def heavy_tails(record: Record) -> str:
    alone = record["measurements"][0]["seconds"]
    arms = {
        "alone": "the slowest row by itself",
        "midstream": "all rows, midstream",
        "rounds": "all rows, in rounds",
    }
    rows = [
        (arms[one["arm"]], f"{one['seconds']:.1f}", f"{one['seconds'] / alone:.2f}×") for one in record["measurements"]
    ]
    scripted = table(("scripted engine, 10 ms a step", "s", "against the slowest row"), rows)
    told = {
        name.rpartition(", ")[2]: value for name, value in record["comparisons"].items() if "wait for nothing" in name
    }
    ratios = [(name, f"{value:.2f}×") for name, value in told.items()]
    model = table(("rows that wait for nothing, Hugging Face engine", "with tools / without"), ratios)
    return f"{scripted}\n\n{model}" if told else scripted


def detection(record: Record) -> str:
    points = list(record["measurements"][0]["microseconds"])
    worst: dict[tuple[str, str], dict[str, float]] = {}
    for one in record["measurements"]:
        so_far = worst.setdefault((one["text"], one["what"]), dict.fromkeys(points, 0.0))
        for point in points:
            so_far[point] = max(so_far[point], one["microseconds"][point])
    rows = [(text, what, *(f"{values[point]:.1f}" for point in points)) for (text, what), values in worst.items()]
    return table(("text", "", *(f"first {int(point):,} ids" for point in points)), rows)


def scaling(record: Record) -> str:
    rows = [(name, *(f"{value:.2f}" for value in of.values())) for name, of in record["exponents"].items()]
    return table(("ten times as many", "exponent, wall time", "exponent, processor time"), rows)


def engines_vllm(record: Record) -> str:
    rows = []
    for line in record["arms"]:
        ratios = (f"{line[kind]:.2f}×" if kind in line else "" for kind in ("sampled", "all"))
        alike = "" if line["rows_alike"] is None else f"{line['rows_alike']} of {record['shape']['rows']}"
        rows.append((line["arm"], f"{line['seconds']:.1f}", *ratios, alike))
    shape = record["shape"]
    told = (
        f"{shape['rows']} rows, prompts of {shape['prompt']} ids, {shape['sampled']} sampled ids a row, "
        f"{shape['calls']} results of {shape['result']} ids each:"
    )
    headings = ("", "s", "against vLLM that samples as many", "against vLLM with as many ids in all", "rows alike")
    return f"{told}\n\n{table(headings, rows)}"


def sandbox(record: Record) -> str:
    names = {
        "container": "midstream, container",
        "full": "midstream, full",
        "ipython": "IPython kernel",
        "monty": "pydantic-monty",
    }
    rows = []
    for name, row in record["side by side"].items():
        start, call = (row.get(key, {}).get("p50") for key in ("start ms", "x + y ms"))
        memory = row.get("own memory MiB")
        cells = (start, None if call is None else call * 1000, row.get("import numpy, sympy ms"), memory)
        formats = ("{:.2f}", "{:.0f}", "{:.0f}", "{:.1f}")
        shown = ("" if cell is None else form.format(cell) for cell, form in zip(cells, formats, strict=True))
        rows.append((names.get(name, name), *shown))
    beside = table(("", "start, ms", "`x + y`, µs", "import numpy, sympy, ms", "own memory, MiB"), rows)
    reached = [
        (reach["what"], reach["against"], reach["wanted"], reach["told"], "" if reach["met"] else "missed")
        for reach in record["reaches"]
    ]
    bare = [(name, f"{taken['p50']:.1f}") for name, taken in record["bare, us"].items()]
    return "\n\n".join(
        (
            beside,
            table(("what", "against", "set out for", "measured", ""), reached),
            table(("the same machine, in C", "µs"), bare),
        )
    )


def cluster(record: Record) -> str:
    calls = (
        (
            one["arm"],
            one["nodes"],
            f"{one['calls a second']:,.0f}",
            f"{one['ms a call, median']:.2f}",
            f"{one['ms a call, best']:.2f}",
            f"{one['driver ms a call']:.2f}",
            f"{one['all processor ms a call']:.2f}",
            f"{one['latency ms, median']:.1f}",
            f"{one['latency ms, p99']:.1f}",
        )
        for one in record["calls"]
    )
    headings = (
        "256 calls at once",
        "nodes",
        "calls/s",
        "ms a call",
        "best",
        "driver's CPU ms",
        "all CPU ms",
        "one alone, ms",
        "p99",
    )
    overhead = [(nodes, f"{value:.2f}") for nodes, value in record["overhead"].items()]
    ids = (
        (
            one["arm"],
            one["replicas"],
            one["rows"],
            f"{one['ids a second']:,.0f}",
            f"{one['ms a step']:.1f}",
            f"{one['driver µs an id']:.1f}",
        )
        for one in record["ids"]
    )
    of_ids = ("ids, steps of 20 ms", "replicas", "rows", "ids/s", "ms a step", "driver's CPU µs an id")
    tables = (
        table(headings, calls),
        table(("nodes", "overhead of a call in a batch of 256, ms, best against best"), overhead),
        table(of_ids, ids),
    )
    return "\n\n".join(tables)


def scale(record: Record) -> str:
    def row(one: Record) -> tuple[str, ...]:
        waited, driver = one["ms from block to result"], one["busy driver, by what"]
        first = max(one["busy"], key=lambda name: one["busy"][name] if name != "engines" else 0.0)
        return (
            f"{one['nodes']:,}",
            f"{one['sessions']:,}",
            f"{one['drivers']:,}",
            f"{one['ids a second']:,.0f}",
            f"{one['of what engines can do']:.0%}",
            "-" if waited is None else f"{waited:,.0f}",
            *(f"{value:.0%}" for value in one["busy"].values()),
            f"{first}: {max(driver, key=lambda kind: driver[kind])}" if first == "driver" else first,
        )

    headings = (
        "nodes",
        "sessions",
        "drivers",
        "ids/s",
        "of what engines can do",
        "ms from block to result",
        "driver busy",
        "cores busy",
        "engines busy",
        "busiest beside engines",
    )
    costs = [(name.replace("_", " "), f"{value * 1e6:,.1f}") for name, value in record["costs"].items()]
    return "\n\n".join(
        (
            table(("measured", "µs"), costs),
            table(headings, map(row, record["one driver"])),
            table(headings, map(row, record["many drivers"])),
        )
    )


SECTIONS: dict[str, dict[str, Callable[[Record], str]]] = {
    "performance.md": {
        "engines_huggingface": engines_huggingface,
        "heavy_tails": heavy_tails,
        "detection": detection,
        "scaling": scaling,
        "sandbox": sandbox,
        "engines_vllm": engines_vllm,
    },
    "scale.md": {"cluster": cluster, "scale": scale},
}


def filled(page: str, text: str) -> str:
    """The page with what was measured. Raises ValueError where it has no place for it."""
    for name, section in SECTIONS[page].items():
        result = RESULTS / f"{name}.json"
        if not result.is_file():
            continue
        record = json.loads(result.read_text(encoding="utf-8"))
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
        if begin not in text or end not in text:
            raise ValueError(f"{page}: no place for {name}")
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{section(record)}\n\n{machine(record)}\n\n{end}{rest.partition(end)[2]}"
    return text


def main(wanted: list[str]) -> int:
    unknown = [page for page in wanted if page not in SECTIONS]
    if unknown:
        print(f"{unknown[0]}: no such page; there are {', '.join(SECTIONS)}", file=sys.stderr)
        return 2
    for page in wanted or SECTIONS:
        text = (DOCS / page).read_text(encoding="utf-8")
        try:
            text = filled(page, text)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 1
        (DOCS / page).write_text(text, encoding="utf-8")
    for name in PLOTS:
        if (RESULTS / name).is_file():
            shutil.copyfile(RESULTS / name, DOCS / name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
