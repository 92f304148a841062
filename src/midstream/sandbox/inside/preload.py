"""Imports what sessions will want, and uses it once: the first call of much in sympy costs ten times the second."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import random
import traceback
from collections.abc import Sequence

_DEFAULT = ("numpy", "sympy")

_STANDARD_LIBRARY = """
fractions decimal itertools functools collections random statistics datetime re string heapq bisect cmath math
textwrap dataclasses typing copy operator json ast pprint traceback linecache tokenize io abc enum calendar
numbers array struct hashlib contextlib threading queue tempfile shutil asyncio inspect pickle warnings
"""

_WARM_UP = {
    "numpy": """
import numpy, numpy.linalg, numpy.random
numpy.linalg.inv(numpy.eye(3)); numpy.random.rand(2); repr(numpy.arange(3.0)); numpy.random.default_rng(0).random()
""",
    "sympy": """
import sympy
t = sympy.Symbol("t")
sympy.integrate(sympy.sin(t) ** 2, t); sympy.solve(t ** 2 - 2, t); sympy.simplify(sympy.sin(t) ** 2 + sympy.cos(t) ** 2)
sympy.diff(t ** 3, t); sympy.factorint(360); sympy.Rational(1, 3).evalf(); str(sympy.sqrt(8))
sympy.expand((t + 1) ** 2)
""",
}


class PreloadError(Exception):
    """A module that was asked for by name cannot be imported."""


def preloaded(names: Sequence[str] | None) -> list[str]:
    """What is imported for sessions that ask for ``names``."""
    return [name for name in _DEFAULT if importlib.util.find_spec(name)] if names is None else list(names)


def load(names: list[str] | None) -> list[str]:
    """Import ``names``, or by default what of numpy and sympy is installed. Returns what was imported."""
    wanted = preloaded(names)
    for name in _STANDARD_LIBRARY.split():
        importlib.import_module(name)
    for name in wanted:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise PreloadError(f"{name!r} cannot be imported: {error}") from None
        except Exception as error:  # noqa: BLE001  # a module may fail in any way
            raise PreloadError(f"{name!r} fails to import: {type(error).__name__}: {error}") from None
        if name in _WARM_UP:
            exec(_WARM_UP[name], {})  # noqa: S102  # fixed text, above
    _warm_the_interpreter()
    random.seed(0)
    return wanted


def _warm_the_interpreter() -> None:
    try:
        exec(compile("1/0", "<warm>", "exec"), {})  # noqa: S102
    except ZeroDivisionError:
        traceback.format_exc()
    with contextlib.suppress(SyntaxError):
        compile("x x", "<warm>", "exec")
