"""``midstream export``: trajectories as a table."""

from __future__ import annotations

import os
from itertools import chain
from pathlib import Path

import click

from midstream.cli.frame import command
from midstream.errors import RecordError
from midstream.records import read_records


@command("export")
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path())
@click.option("-o", "--out", metavar="PARQUET", help="By default beside the first FILE, ending in .parquet.")
def export_command(files: tuple[str, ...], out: str | None) -> int:
    """Write the trajectories of FILE... as one Parquet file: a row each, for datasets, pandas, Polars or DuckDB.

    Ids, mask, logprobs and weight versions are lists of one length; blocks are a list of structs; metadata and
    settings are JSON text. Needs pyarrow (pip install 'midstream[export]').

    \b
    Examples:
      midstream export rollouts.jsonl
      midstream export runs/*.jsonl -o runs.parquet
    """
    from midstream.records.table import write_table

    target = Path(out) if out is not None else Path(files[0]).with_suffix(".parquet")
    if target.resolve() in {Path(name).resolve() for name in files}:
        raise click.UsageError(f"--out: {str(target)!r} is one of the files to read; give another name")
    try:
        count = write_table(chain.from_iterable(map(read_records, files)), target)
    except OSError as error:
        raise RecordError(f"{target}: cannot be written ({os.strerror(error.errno or 0)})") from error
    click.echo(f"{target}: {count:,} trajectories, {target.stat().st_size / 2**20:.1f} MiB")
    return 0
