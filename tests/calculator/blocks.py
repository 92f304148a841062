"""Runs blocks of the example's own code in this process: they are arithmetic on literals, nothing else."""

from __future__ import annotations

import ast
import contextlib
import io
import pprint
from typing import Any


def shown_by(code: str, namespace: dict[str, Any]) -> str:
    """What a block shows: its prints, then the value of its last expression unless None."""
    tree = ast.parse(code.strip())
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "<code>", "exec"), namespace)
        value = None
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "<code>", "eval"), namespace)
    if value is not None:
        printed.write(pprint.pformat(value))
    return printed.getvalue().rstrip("\n")
