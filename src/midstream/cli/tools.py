"""``midstream tools``: the text that tells a model of tools."""

from __future__ import annotations

from typing import Literal

import click

from midstream.cli.frame import command
from midstream.cli.plan import markup_of
from midstream.cli.tool_files import load_tools
from midstream.errors import ConfigurationError
from midstream.tools import ToolSet


@command("tools")
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path())
@click.option(
    "--style",
    type=click.Choice(["text", "stubs", "json"]),
    default="text",
    show_default=True,
    help="Signatures with what they do, Python functions without bodies, or schemas as chat templates write them.",
)
@click.option("--markup", default="code", show_default=True, metavar="NAME", help="As midstream run takes it.")
def tools_command(files: tuple[str, ...], style: Literal["text", "stubs", "json"], markup: str) -> int:
    """Print the text that tells a model of the tools in FILE..., to be put into prompts.

    A file of tools is Python: each public function that it defines is a tool, told to the model by its name,
    annotations and docstring. Where the file has a list TOOLS, the tools are those of the list; it may hold all
    that midstream.Generator takes as tools, such as midstream.tool with options, searches and MCP servers. They run
    here, outside the sandbox.

    \b
    Examples:
      midstream tools tools.py
      midstream tools tools.py --style json
      midstream run --tools tools.py --model ./model --prompts prompts.jsonl --out rollouts.jsonl
    """
    chosen = markup_of(markup)
    if chosen is None:
        raise ConfigurationError("--markup none: with it there is nothing that could call tools")
    tools = ToolSet(load_tools(files))
    try:
        click.echo(tools.describe(style, code=chosen.runs_code, markup=chosen))
    finally:
        for source in tools.sources:
            source.stop()
    return 0
