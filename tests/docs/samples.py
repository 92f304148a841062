"""The fenced samples of a page, and what it means that they run: to the end, printing and giving what stands there."""

from __future__ import annotations

import ast
import contextlib
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
TOLD = re.compile(r"""\S.*?  # ('[^']*'|"[^"]*"|True|False|\d+)(?=$|,)""")
"""A line whose comment begins with the value that it gives."""


def fences(page: Path) -> list[tuple[str, str]]:
    """The language and the text of each fence of the page that has a language and no more."""
    return FENCE.findall(page.read_text())


def run_samples(page: Path, names: dict[str, Any], places: Mapping[str, str] | None = None) -> list[str]:
    """Run the Python samples of a page one after the other, in ``names``; gives the languages of its fences.

    What a sample prints is what the fence of ``text`` behind it holds, where there is one; what a comment says of
    a line's value is so. ``places``: what stands in place of addresses that are examples.
    """
    found = fences(page)
    for place, (kind, text) in enumerate(found):
        if kind != "python":
            continue
        for example, actual in (places or {}).items():
            text = text.replace(example, actual)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compiled(text, page), names)
        if place + 1 < len(found) and found[place + 1][0] == "text":
            assert printed.getvalue() == found[place + 1][1], f"{page.name}: sample {place}"
    assert names.pop("told_otherwise", []) == []
    return [kind for kind, _ in found]


def compiled(text: str, page: Path) -> Any:
    """The code of a sample. It notes each value that is not what its comment says, under ``told_otherwise``."""
    lines = text.splitlines()

    class Held(ast.NodeTransformer):
        def visit_Expr(self, node: ast.Expr) -> ast.AST:
            told = TOLD.match(lines[(node.end_lineno or node.lineno) - 1].strip())
            if told is None:
                return node
            source = ast.unparse(node.value)
            note = f"globals().setdefault('told_otherwise', []).append(({source!r}, _it))"
            held = f"(_it := {source}) == {told[1]} or {note}"
            return ast.copy_location(ast.parse(held).body[0], node)

    return compile(ast.fix_missing_locations(Held().visit(ast.parse(text))), str(page), "exec", dont_inherit=True)
