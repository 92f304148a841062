"""Docstrings as Markdown: references and literal blocks are written for Sphinx, and the site is made without it."""

from __future__ import annotations

import inspect
import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|meth|func|mod|attr|data|exc|obj):`~?([^`]+)`")
SHORTENED = re.compile(r":(?:class|meth|func|mod|attr|data|exc|obj):`~(?:[\w.]+\.)?(\w+)`")


class PlainDocstrings(griffe.Extension):
    """Turns roles into code, and ``::`` before an indented block into what stands before it."""

    def on_instance(self, *, obj: griffe.Object, **_others: Any) -> None:
        """Called for each object once it has been read; nothing of it is imported."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(docstring: str) -> str:
    """The text without what only Sphinx reads."""
    text = ROLE.sub(r"`\1`", SHORTENED.sub(r"`\1`", inspect.cleandoc(docstring)))
    lines = []
    for line in text.split("\n"):
        if line.strip() == "::":
            continue
        lines.append(line.removesuffix(":") if line.endswith("::") else line)
    return "\n".join(lines)
