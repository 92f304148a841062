"""``midstream bench``: how fast is it on this machine?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from midstream.bench import Figure, description, detection, engine, load, sandbox
from midstream.cli.frame import command, errors_console
from midstream.cli.model import load_engine, open_model
from midstream.cli.options import check_writable
from midstream.errors import ConfigurationError, RecordError

NAMES = ("sandbox", "detection", "engine")


@command("bench")
@click.argument("names", nargs=-1, metavar="[NAME]...", type=click.Choice(NAMES))
@click.option("--model", metavar="PATH", type=click.Path(), help="A transformers model: its tokenizer, and its loop.")
@click.option("--device", default=None, help="Of the model.  [default: CUDA where there is one]")
@click.option("--quick", is_flag=True, help="Fewer repetitions: to see that it runs.")
@click.option(
    "--json", "json_file", metavar="FILE", type=click.Path(), help="Also write the figures there; - is stdout."
)
def bench_command(
    names: tuple[str, ...], model: str | None, device: str | None, quick: bool, json_file: str | None
) -> int:
    """Measure how fast midstream is here, each figure beside something comparable in the same run.

    \b
    sandbox    starts of sessions, round trips, calls of tools, many at once, copies
    detection  what looking for code costs for each sampled id
    engine     ids a second of a model, beside model.generate; needs --model

    All of them by default, engine where there is a model. A ratio is the figure over what it stands beside; times
    are the best of several turns' medians. Measurements against other libraries are in the repository, in
    benchmarks/.

    \b
    Examples:
      midstream bench
      midstream bench sandbox --json sandbox.json
      midstream bench engine --model ./model
    """
    wanted = names or tuple(name for name in NAMES if name != "engine" or model is not None)
    if "engine" in wanted and model is None:
        raise ConfigurationError("engine: needs a model to measure; give its --model")
    if json_file not in (None, "-"):
        check_writable("--json", str(json_file))
    before = load()
    measured: dict[str, list[Figure]] = {}
    console = Console(stderr=json_file == "-", highlight=False)
    for name in wanted:
        with errors_console().status(f"measuring {name}"):
            measured[name] = list(_figures(name, model, device, quick))
        console.print(_table(name, measured[name]))
    told = {
        "machine": description(),
        "load": {"before": before, "after": load()},
        "figures": {name: [asdict(figure) for figure in figures] for name, figures in measured.items()},
    }
    if json_file is not None:
        _write(json_file, json.dumps(told, indent=2))
    return 0


def _figures(name: str, model: str | None, device: str | None, quick: bool) -> Iterator[Figure]:
    if name == "sandbox":
        yield from sandbox.measure(quick=quick)
        return
    files = None if model is None else open_model(model, "auto", device, weights=name == "engine")
    if name == "detection":
        yield from detection.measure(None if files is None else files.tokenizer, quick=quick)
    elif files is not None:
        loaded: Any = load_engine(files, 8)
        try:
            yield from engine.measure(loaded, loaded.model, quick=quick)
        finally:
            loaded.shutdown()


def _table(name: str, figures: list[Figure]) -> Table:
    table = Table("", title=name, title_justify="left")
    for column in ("", "", "ratio"):
        table.add_column(column, justify="right")
    table.add_column("beside")
    for figure in figures:
        ratio = "" if figure.ratio is None else f"{figure.ratio:.2f} ×"
        table.add_row(figure.name, f"{figure.value:,.2f}", figure.unit, ratio, figure.beside)
    return table


def _write(file: str, text: str) -> None:
    if file == "-":
        click.echo(text)
        return
    try:
        Path(file).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise RecordError(f"--json {file}: cannot be written ({error.strerror})") from error
