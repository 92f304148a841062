"""docs/engines.md is true: its engine passes the suite, and its table says what engines say of themselves."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from midstream import PolicyEngine, ScriptedEngine
from midstream.engines.base import Capabilities
from midstream.testing import CheckOutcome
from midstream.testing.engine import CHECKS
from midstream.testing.steering import VOCABULARY

PAGE = (Path(__file__).parents[1] / "docs" / "engines.md").read_text()


def test_the_engine_of_the_page_passes(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(block, "docs/engines.md", "exec", dont_inherit=True), names)
    assert capsys.readouterr().out == f"{len(CHECKS)} checks passed\n"
    assert all(isinstance(outcome, CheckOutcome) for outcome in names["outcomes"])


def table() -> dict[str, dict[str, str]]:
    """The first table of the page: for each engine what stands in each of its rows."""
    lines = [line.strip("|").split("|") for line in PAGE.splitlines() if line.startswith("|")]
    engines = [cell.strip().strip("`") for cell in lines[0][1:]]
    rows = {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines[2:11]}
    return {engine: {name: cells[place] for name, cells in rows.items()} for place, engine in enumerate(engines)}


def capabilities(name: str) -> Capabilities:
    if name == "ScriptedEngine":
        return ScriptedEngine(VOCABULARY, "x").capabilities
    if name == "PolicyEngine":
        return PolicyEngine(SimpleNamespace(generate=len), VOCABULARY).capabilities
    from midstream.engines import huggingface

    return huggingface._CAPABILITIES


@pytest.mark.parametrize("name", ["HuggingFaceEngine", "PolicyEngine", "ScriptedEngine"])
def test_the_table_says_what_engines_say(name: str) -> None:
    told, able = table()[name], capabilities(name)
    assert set(table()) >= {"VLLMEngine", "ServerEngine"}
    assert (told["keyed noise"] == "yes") == able.keyed_noise
    assert (told["fork"] == "yes") == able.fork
    assert (told["`update_weights`"] == "yes") == able.set_weights
    assert (told["images"] == "yes") == able.media
    assert (told["samples in"] == "rounds") == able.rounds
    assert (told["sampling settings"] == "those of the policy") == (not able.sampling)
