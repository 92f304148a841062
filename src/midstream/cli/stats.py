"""``midstream stats``: what files of trajectories amount to."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from midstream.cli.frame import command
from midstream.cli.options import check_folder
from midstream.errors import ConfigurationError, RecordError
from midstream.records import read_records
from midstream.records.statistics import Numbers, Statistics


@command("stats")
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
@click.option("--plots", metavar="FOLDER", help="Draw the spreads as PNG files there (needs matplotlib).")
def stats_command(files: tuple[str, ...], as_json: bool, plots: str | None) -> int:
    """Count what is in FILE..., all together: stop reasons, tokens by origin, calls, errors, tools, times, rewards.

    \b
    Examples:
      midstream stats rollouts.jsonl
      midstream stats runs/*.jsonl --json
      midstream stats rollouts.jsonl --plots plots/
    """
    if plots is not None:
        check_folder("--plots", plots)
    statistics = Statistics.of(chain.from_iterable(map(read_records, files)))
    if plots is not None:
        _draw(statistics, Path(plots))
    if as_json:
        click.echo(json.dumps(statistics.as_dict(), indent=1))
    else:
        _print(statistics, Console())
    return 0


def _print(statistics: Statistics, console: Console) -> None:
    counts = statistics.as_dict()
    table = Table(
        title=f"{counts['trajectories']:,} trajectories of {counts['prompts']:,} prompts", title_justify="left"
    )
    table.add_column("count", justify="left")
    table.add_column("")
    for name in ("stopped", "tokens", "blocks", "errors", "breached"):
        if counts[name]:
            table.add_row(name, ", ".join(f"{kind} {count:,}" for kind, count in counts[name].items() if count))
    for name, words in (("discarded_tokens", "discarded tokens"), ("unfit_for_training", "unfit for training")):
        if counts[name]:
            table.add_row(words, f"{counts[name]:,}")
    console.print(table)
    spreads = Table("spread", *(_right(name) for name in ("mean", "std", "min", "p50", "p90", "p99", "max")))
    rows = ("reward", "generated_tokens", "total_tokens", "calls", "seconds", "block_seconds")
    for name in rows:
        _add_spread(spreads, name.replace("_", " "), counts[name])
    for name, tool in counts["tools"].items():
        _add_spread(spreads, f"{name}() seconds", tool["seconds"])
    console.print(spreads)
    if counts["tools"]:
        tools = Table("tool", *(_right(name) for name in ("calls", "errors", "cached", "batched")))
        for name, tool in counts["tools"].items():
            tools.add_row(name, *(f"{tool[each]:,}" for each in ("calls", "errors", "cached", "batched")))
        console.print(tools)


def _right(name: str) -> Any:
    from rich.table import Column

    return Column(name, justify="right")


def _add_spread(table: Table, name: str, spread: dict[str, Any]) -> None:
    if spread["count"]:
        table.add_row(name, *(f"{spread[key]:.4g}" for key in ("mean", "std", "min", "p50", "p90", "p99", "max")))


def _draw(statistics: Statistics, folder: Path) -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigurationError("--plots: needs matplotlib: pip install matplotlib") from error
    from matplotlib.figure import Figure

    spreads: dict[str, tuple[Numbers, bool]] = {
        "reward": (statistics.rewards, False),
        "generated tokens": (statistics.generated, False),
        "calls": (statistics.calls, False),
        "seconds of a trajectory": (statistics.seconds, False),
        "seconds of a block": (statistics.block_seconds, True),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context({"svg.hashsalt": "midstream"}):
            for name, (numbers, logarithmic) in spreads.items():
                if not numbers.values:
                    continue
                figure = Figure(figsize=(6, 3.5), layout="constrained")
                axes = figure.add_subplot()
                axes.hist(numbers.values, bins=40, log=logarithmic)
                axes.set(xlabel=name, ylabel="blocks" if "block" in name else "trajectories")
                figure.savefig(folder / f"{name.replace(' ', '_')}.png", dpi=150)
    except OSError as error:
        raise RecordError(f"--plots {folder}: cannot be written ({error.strerror})") from error
