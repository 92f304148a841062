"""The text that tells a model of its tools."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from midstream.crossing import signature_text
from midstream.errors import ConfigurationError
from midstream.markup import CODE_TAGS, Markup

if TYPE_CHECKING:
    from midstream.tools.tool import Style, Tool, ToolSet


def describe(tools: ToolSet, style: Style = "text", *, code: bool = True, markup: Markup | None = None) -> str:
    """See :meth:`~midstream.tools.ToolSet.describe`."""
    if style == "json":
        return json.dumps(tools.schemas, indent=2, ensure_ascii=False)
    if style not in ("text", "stubs"):
        raise ConfigurationError(f"style={style!r}: must be 'text', 'stubs' or 'json'")
    opening = _opening(len(tools), code, markup or CODE_TAGS)
    if style == "text":
        entries = [_entry(tool) for tool in tools]
    else:
        entries = ["```python\n" + "\n\n\n".join(_stub(tool) for tool in tools) + "\n```"] if len(tools) else []
    return "\n\n".join([opening, *entries] if opening else entries)


def _opening(count: int, code: bool, markup: Markup) -> str:
    start, end = markup.start.strip("\n"), (markup.end or "the end of the turn").strip("\n")
    result = _result(markup)
    if code:
        run = (
            f"Python code between {start} and {end} is run, and {result}. Names, imports and files stay for later code."
        )
        if count == 0:
            return f"You can run Python code. {run}"
        these = "This function is" if count == 1 else "These functions are"
        return f"You can run Python code. {run} {these} there to be called from it:"
    if count == 0:
        return ""
    these = "this function" if count == 1 else "these functions"
    return f"You can call {these}. A call is written between {start} and {end}, and {result}:"


def _result(markup: Markup) -> str:
    frame = markup.inline or markup.block
    before, after = _words(frame.before), _words(frame.after)
    return f"its result follows between {before} and {after}" if before and after else "its result follows"


def _words(parts: Sequence[object]) -> str:
    """A frame's text, without what each result puts into it."""
    return "".join(part if isinstance(part, str) else getattr(part, "text", "") for part in parts).strip()


def _entry(tool: Tool) -> str:
    offer = tool.offer
    head = tool.name + signature_text(offer.signature)
    return head + ("\n" + textwrap.indent(offer.description, "    ") if offer.description else "")


def _stub(tool: Tool) -> str:
    offer = tool.offer
    head = f"def {tool.name}{signature_text(offer.signature)}:"
    text = offer.description.replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
    if not text:
        return f"{head} ..."
    if "\n" not in text:
        return f'{head}\n    """{text}"""'
    return f'{head}\n{textwrap.indent(chr(34) * 3 + text, "    ")}\n    """'
