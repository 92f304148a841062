"""Tools from a user's Python file: ``--tools``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import click

from midstream.errors import ConfigurationError, MidstreamError
from midstream.tools import Tool, ToolSet

OPTION = click.option(
    "--tools",
    "tool_files",
    multiple=True,
    type=click.Path(),
    metavar="FILE",
    help="A Python file whose functions the model may call; may be given again (see midstream tools --help).",
)
"""``--tools``, for every command that generates."""


def load_tools(files: Sequence[str]) -> list[Any]:
    """The tools of Python files, as :class:`midstream.Generator` takes them.

    What a file calls ``TOOLS``, a list or a mapping of names to functions; else its public functions and its tools,
    those that it imports left out. Raises :class:`~midstream.errors.ConfigurationError` for files that cannot be
    read or run, or hold no tools, and for names that are there twice.
    """
    tools = [tool for file in files for tool in _tools_of(_loaded(file), file)]
    try:
        ToolSet(tools)
    except ConfigurationError as error:
        raise ConfigurationError(f"--tools {' '.join(files)}: {error}") from error
    return tools


def _loaded(file: str) -> ModuleType:
    path = Path(file)
    if not path.is_file():
        raise ConfigurationError(f"--tools {file}: there is no such file; it must be a Python file that defines tools")
    name = f"midstream_tools_{path.resolve().as_posix().encode().hex()}"
    spec = spec_from_file_location(name, path) if path.suffix == ".py" else None
    if spec is None or spec.loader is None:
        raise ConfigurationError(f"--tools {file}: must be a Python file, with a name that ends in .py")
    module = module_from_spec(spec)
    sys.modules[name] = module  # annotations are looked up there
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)  # as of a script: what stands beside it can be imported
    try:
        spec.loader.exec_module(module)
    except MidstreamError as error:
        raise ConfigurationError(f"--tools {file}: {error}") from error
    except (Exception, SystemExit) as error:
        raise ConfigurationError(f"--tools {file}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(folder)
    return module


def _tools_of(module: ModuleType, file: str) -> list[Any]:
    given = getattr(module, "TOOLS", None)
    if isinstance(given, Mapping):
        found = list(ToolSet(given))
    elif given is not None:
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise ConfigurationError(f"--tools {file}: TOOLS={given!r}: must be a list of functions, or a mapping")
        return list(given)
    else:
        found = [value for name, value in vars(module).items() if not name.startswith("_") and _own(value, module)]
    if not found:
        raise ConfigurationError(f"--tools {file}: defines no tools; it must hold public functions, or a list TOOLS")
    return found


def _own(value: object, module: ModuleType) -> bool:
    if isinstance(value, Tool):
        return True
    function: Callable[..., Any] | None = value if callable(value) and not isinstance(value, type) else None
    return function is not None and getattr(function, "__module__", None) == module.__name__
