"""Options of a command from a TOML file, and written to one."""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from midstream.errors import ConfigurationError, RecordError
from midstream.vocabulary import replace_surrogates

_NOT_IN_FILES = ("config", "help")


def _take(ctx: click.Context, _: click.Parameter, path: str | None) -> str | None:
    """Make what the file says the defaults, before the other options are looked at."""
    if path is not None:
        ctx.default_map = {**(ctx.default_map or {}), **read_config(ctx.command, path)}
    return path


OPTION = click.option(
    "--config",
    type=click.Path(),
    metavar="FILE",
    is_eager=True,
    expose_value=True,
    callback=_take,
    help="Options in TOML, by their names without --; those of the command line go before them.",
)
"""``--config``, for commands whose options a file may hold."""


def read_config(command: click.Command, path: str) -> dict[str, Any]:
    """The options of a TOML file, by the names of ``command``'s parameters.

    Raises :class:`~midstream.errors.ConfigurationError` for a file that cannot be read, for keys that are no option
    of the command, and for values of another type than the option's.
    """
    try:
        given = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"--config {path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--config {path}: not TOML: {error}") from error
    options = options_of(command)
    found: dict[str, Any] = {}
    for key, value in given.items():
        option = options.get(key.replace("_", "-"))
        if option is None:
            near = difflib.get_close_matches(key, options, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(options)}"
            raise ConfigurationError(f"--config {path}: {key!r} is no option of midstream {command.name}; {hint}")
        if option.name in found:
            raise ConfigurationError(f"--config {path}: {key!r} is given twice")
        wanted = _wanted(option, value)
        if wanted is not None:
            raise ConfigurationError(f"--config {path}: {key} = {_toml(value)}: must be {wanted}")
        found[str(option.name)] = value
    return found


def options_of(command: click.Command) -> dict[str, click.Option]:
    """The options that a file may hold, by their long names without dashes before them."""
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    named = {max(option.opts, key=len).removeprefix("--"): option for option in options}
    return {name: option for name, option in named.items() if name not in _NOT_IN_FILES}


def _wanted(option: click.Option, value: object) -> str | None:
    """What the value must be, where it is something else."""
    if option.multiple:
        texts = isinstance(value, list) and all(isinstance(item, str) for item in value)
        return None if texts else "a list of texts"
    if option.is_flag:
        return None if isinstance(value, bool) else "true or false"
    if isinstance(option.type, click.types.IntParamType):
        return None if isinstance(value, int) and not isinstance(value, bool) else "an integer"
    if isinstance(option.type, click.types.FloatParamType):
        return None if isinstance(value, int | float) and not isinstance(value, bool) else "a number"
    return None if isinstance(value, str) else "a text"


def write_config(command: click.Command, values: Mapping[str, Any], path: Path, comment: str) -> None:
    """Write ``values``, by the names of the command's parameters, so that :func:`read_config` gives them again.

    Those that are None are named in comments. Raises :class:`~midstream.errors.RecordError`.
    """
    lines = [f"# {line}" for line in comment.splitlines()]
    for key, option in options_of(command).items():
        if option.name in values:
            value = values[option.name]
            lines.append(f"# {key} is not given" if value is None else f"{key} = {_toml(value)}")
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise RecordError(f"{path}: cannot be written ({os.strerror(error.errno or 0)})") from error


def _toml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):  # a text of JSON is one of TOML, but for one character that JSON need not escape
        return json.dumps(replace_surrogates(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value, default=str) if isinstance(value, bool | int | float) else str(value)
