"""``midstream doctor``: what isolation holds on this machine?"""

from __future__ import annotations

import json
import warnings

import click
from rich.console import Console
from rich.table import Table

from midstream.cli.frame import WRONG, command
from midstream.errors import SandboxError
from midstream.sandbox import IsolationReport, SandboxPool
from midstream.sandbox.isolation.report import LAYERS


@command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def doctor_command(as_json: bool) -> int:
    """Try out what isolation holds on this machine, layer by layer.

    Starts sandboxes and has code in them attempt what it must not be able to do: read a file of the host, open
    a socket, start a process, reach a neighbour. What is told is what happened then. The level is full
    (namespaces and all), container (Landlock, system call filter, resource limits), or weak: then sandboxes
    refuse to start, unless the missing layer is allowed by name.

    \b
    Examples:
      midstream doctor
      midstream doctor --json
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is missing is in the report
            with SandboxPool(allow_missing=LAYERS, preload=[]) as pool:
                report = pool.report
    except SandboxError as error:
        if as_json:
            click.echo(json.dumps({"level": None, "error": str(error)}))
        else:
            click.echo(f"sandboxes do not start here: {error}", err=True)
        return WRONG
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2))
    else:
        _show(report)
    return WRONG if report.level == "weak" else 0


def _show(report: IsolationReport) -> None:
    console = Console(highlight=False)
    table = Table(title=f"isolation: {report.level}", title_justify="left")
    for column in ("layer", "", "what was tried", "made of"):
        table.add_column(column, overflow="fold")
    for layer in report.layers:
        if layer.holds:
            state = "[green]holds[/green]"
        else:
            state = "[red]missing[/red]" if layer.required else "[yellow]not here[/yellow]"
        table.add_row(layer.name, state, layer.tried, layer.made_of)
    console.print(table)
    if report.missing:
        missing = ", ".join(report.missing)
        console.print(f"Sandboxes refuse to start without {missing}, unless allow_missing names what is missing.")
