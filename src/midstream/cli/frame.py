"""What all commands share: options for logs, errors in one line, and what exit codes mean."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import click
from rich.console import Console

from midstream.errors import MidstreamError
from midstream.telemetry import JsonFormatter

WRONG = 1
BAD_INPUT = 2
INTERRUPTED = 130

EXIT_CODES = """\b
Exit codes:
  0    all is well
  1    run: rows failed (engine or sandbox); check: a trajectory is wrong;
       replay: a block came out otherwise; doctor: no isolation
  2    bad input or options, or a file that cannot be read or written
  130  interrupted (Ctrl-C; 143 by SIGTERM); what was finished is kept
"""


def command(name: str) -> Callable[[Callable[..., int]], click.Command]:
    """Makes a function one of midstream's commands: it returns the exit code."""

    def make(function: Callable[..., int]) -> click.Command:
        return click.command(name, cls=Command)(function)

    return make


class Command(click.Command):
    """A command with the options that all of them have, and the exit codes below its help."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        settings.setdefault("epilog", EXIT_CODES)
        super().__init__(*args, **settings)
        self.params += [
            click.Option(
                ["--log-level"],
                type=click.Choice(["debug", "info", "warning", "error"]),
                default="warning",
                show_default=True,
                help="Of what is logged, on stderr.",
            ),
            click.Option(
                ["--log-format"],
                type=click.Choice(["text", "json"]),
                default="text",
                show_default=True,
                help="How: for people, or a JSON object a line.",
            ),
        ]

    def invoke(self, ctx: click.Context) -> Any:
        _log(errors_console(ctx), ctx.params.pop("log_level"), ctx.params.pop("log_format"))
        return super().invoke(ctx)


class CommandLine(click.Group):
    """A group whose every error is one line on stderr, and never a traceback for what a user did."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, **extra)
        try:
            result = super().main(args, prog_name, complete_var, False, **extra)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(BAD_INPUT)
        except (click.Abort, KeyboardInterrupt):
            _end("midstream: interrupted", INTERRUPTED)
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx is not None else "midstream"
            _end(f"{command}: {error.format_message()} (see {command} --help)", BAD_INPUT)
        except click.ClickException as error:
            _end(f"midstream: {error.format_message()}", error.exit_code)
        except MidstreamError as error:
            _end(f"midstream: {error}", BAD_INPUT)
        except BrokenPipeError:  # whoever read stdout has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(WRONG)
        sys.exit(result if isinstance(result, int) else 0)


def _end(message: str, code: int) -> NoReturn:
    click.echo(" ".join(message.split()), err=True)
    sys.exit(code)


def errors_console(ctx: click.Context | None = None) -> Console:
    """The one console on stderr of this run of the command line: log lines go above a live view on it."""
    meta = (ctx or click.get_current_context()).meta
    console: Console = meta.setdefault("midstream.console", Console(stderr=True))
    return console


class _ConsoleHandler(logging.Handler):
    """Writes through a console, which knows of the view that is live on it."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._console.print(self.format(record), markup=False, highlight=False, soft_wrap=True)
        except Exception:  # noqa: BLE001  # as every handler of logging
            self.handleError(record)


def _log(console: Console, level: str, form: str) -> None:
    """Have what midstream logs shown on ``console``."""
    handler = _ConsoleHandler(console)
    text = logging.Formatter("%(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if form == "json" else text)
    package = logging.getLogger("midstream")
    package.handlers = [handler]
    package.propagate = False
    package.setLevel(level.upper())
