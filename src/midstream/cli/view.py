"""``midstream view``: rollouts as one HTML file to read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import click
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from midstream.cli.frame import command
from midstream.errors import RecordError
from midstream.records import Record, read_records


@command("view")
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path())
@click.option("-o", "--out", metavar="HTML", help="Where to write; by default beside the first FILE, ending in .html.")
@click.option("--title", help="What stands over the page; by default the first FILE's name.")
@click.option("--limit", type=click.IntRange(min=1), help="Show just the first rollouts, this many.")
@click.option("--check/--no-check", default=True, help="Verify each rollout and show what is wrong with it.")
def view_command(files: tuple[str, ...], out: str | None, title: str | None, limit: int | None, check: bool) -> int:
    """Show the rollouts of FILE... in one HTML page, which needs neither server nor network.

    Tokens are coloured by where they came from, with ids, logprobs and positions; blocks stand beside their
    results, tool calls and pictures; samples of one prompt can be read side by side. The page runs nothing
    that a rollout holds.

    \b
    Examples:
      midstream view rollouts.jsonl
      midstream view runs/*.jsonl -o runs.html --limit 1000
    """
    from midstream.viewer import write_page

    target = Path(out) if out is not None else Path(files[0]).with_suffix(".html")
    if target.resolve() in {Path(name).resolve() for name in files}:
        raise click.UsageError(f"--out: {str(target)!r} is one of the files to show; give another name")
    records = islice(chain.from_iterable(map(read_records, files)), limit)
    try:
        with _progress() as progress:
            count = write_page(_counted(records, progress), target, title=title or Path(files[0]).name, check=check)
    except OSError as error:
        raise RecordError(f"{target}: cannot be written ({os.strerror(error.errno or 0)})") from error
    click.echo(f"{target}: {count:,} rollouts, {target.stat().st_size / 2**20:.1f} MiB")
    return 0


def _progress() -> Progress:
    columns = (SpinnerColumn(), TextColumn("reading rollouts"), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _counted(records: Iterator[Record], progress: Progress) -> Iterator[Record]:
    task = progress.add_task("", total=None)
    for record in records:
        yield record
        progress.advance(task)
