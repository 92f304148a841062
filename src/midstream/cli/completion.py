"""``midstream completion``: what makes a shell complete midstream's commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from midstream.cli.frame import command


@command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion_command(ctx: click.Context, /, shell: str) -> int:
    """Print what makes SHELL complete midstream's commands, options and files.

    \b
    Examples:
      midstream completion bash >> ~/.bashrc
      midstream completion zsh >> ~/.zshrc
      midstream completion fish > ~/.config/fish/completions/midstream.fish
    """
    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"{shell}: click knows no completion for it")
    click.echo(kind(ctx.find_root().command, {}, "midstream", "_MIDSTREAM_COMPLETE").source())
    return 0
