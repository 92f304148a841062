"""Runs of the command line in this process, on a scripted engine with a real tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from midstream.cli import main
from midstream.cli import run as run_module
from midstream.engines.scripted import ScriptedEngine


def write_prompts(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def here(*arguments: str | Path) -> Result:
    """The command line in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="midstream")


def say(monkeypatch: pytest.MonkeyPatch, script: Any = "Let <code>6 * 7</code> be.", **options: Any) -> None:
    """Have the models of runs say this."""

    def load(files: Any, batch_size: int) -> ScriptedEngine:
        return ScriptedEngine(files.tokenizer, script, **options)

    monkeypatch.setattr(run_module, "load_engine", load)
