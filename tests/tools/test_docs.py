"""Every sample of docs/tools.md runs and gives what stands there."""

from __future__ import annotations

import asyncio
import copy
import doctest
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from midstream import SandboxPool, ToolContext, ToolSet
from midstream.tools import ToolHost
from tests.families.conversations import package_file
from tests.vocabularies import tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "tools.md"
FENCE = re.compile(r"^```(\w+)( model)?\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def samples() -> list[tuple[str, str]]:
    """The kind and the text of each fenced block; the model's code is of the kind ``model``."""
    return [("model" if model else kind, text) for kind, model, text in FENCE.findall(PAGE.read_text())]


@pytest.fixture
def names() -> Iterator[dict[str, Any]]:
    module = types.ModuleType("samples_of_the_page")
    sys.modules[module.__name__] = module
    yield vars(module)
    del sys.modules[module.__name__]


async def shown(pool: SandboxPool, tools: ToolSet, code: str) -> str:
    host = ToolHost(tools)
    row = host.row(ToolContext("the prompt"))
    try:
        with await pool.session_async(tools=tools.offers, call_tool=row.call) as session:
            return (await session.run_async(code)).text
    finally:
        row.close()
        await asyncio.to_thread(host.close)


def qwen() -> Any:
    """A tokenizer whose chat template tells of tools."""
    made = copy.deepcopy(tokenizer("qwen"))
    made.chat_template = package_file("trl", "chat_templates/qwen2_5.jinja").read_text()
    return made


def test_the_samples_run(sandboxes: SandboxPool, names: dict[str, Any]) -> None:
    names["tokenizer"] = qwen()
    found = samples()
    kinds = [kind for kind, _ in found]
    assert {kind: kinds.count(kind) for kind in kinds} == {"python": 10, "pycon": 5, "model": 6, "text": 6}
    for place, (kind, text) in enumerate(found):
        if kind == "python":
            exec(compile(text, str(PAGE), "exec"), names)
        elif kind == "pycon":
            test = doctest.DocTestParser().get_doctest(text, names, f"sample {place}", str(PAGE), 0)
            output: list[str] = []
            doctest.DocTestRunner().run(test, out=output.append, clear_globs=False)
            assert not output, "".join(output)
            names.update(test.globs)
        elif kind == "model":
            expected = found[place + 1][1].rstrip("\n")
            assert found[place + 1][0] == "text"
            assert asyncio.run(shown(sandboxes, names["tools"], text)) == expected
    told = names["tokenizer"].decode(names["prompt"].ids)
    assert '"name": "population"' in told
    assert told.endswith("<|im_start|>assistant\n")
