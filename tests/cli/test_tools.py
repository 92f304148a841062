"""Tools from Python files: ``midstream run --tools`` and ``midstream tools``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from midstream.records import read_records, verify
from tests.cli.runs import here, say, write_prompts

FILE = '''
from dataclasses import dataclass
from json import loads
from beside import BASE

@dataclass
class Thing:
    pass

def twice(number: int) -> int:
    """Two times a number."""
    return 2 * number + BASE

def _hidden() -> None:
    pass
'''


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("BASE = 100\n")
    path = tmp_path / "my tools.py"
    path.write_text(FILE)
    return path


def test_a_run_with_tools(model_folder: Path, tmp_path: Path, tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, "So <code>twice(4)</code> and <code>hidden()</code>.")
    more = tmp_path / "more.py"
    more.write_text("TOOLS = {'hidden': lambda: 'seen'}\n")
    prompts, out = write_prompts(tmp_path / "p.jsonl", [{"text": "Q1:"}]), tmp_path / "o.jsonl"
    arguments = ["run", "--model", model_folder, "--prompts", prompts, "--out", out, "--tools", tools, "--tools", more]
    done = here(*arguments)
    assert done.exit_code == 0, done.output
    (record,) = read_records(out)
    assert [call.result and call.result.text for call in record.calls] == ["108", "'seen'"]
    assert [[made.name for made in call.result.tool_calls] for call in record.calls if call.result] == [
        ["twice"],
        ["hidden"],
    ]
    assert record.provenance["tools"] == record.provenance["settings"]["tools"] == ["twice", "hidden"]
    assert verify(record) == []
    refused = here(*arguments[:-2])
    assert refused.exit_code == 2
    assert "its records were made with --tools twice hidden, not twice" in refused.stderr


def test_what_tells_a_model_of_them(tools: Path) -> None:
    told = here("tools", tools)
    assert told.exit_code == 0, told.output
    assert "twice(number: int) -> int" in told.stdout
    assert "Two times a number." in told.stdout
    assert "hidden" not in told.stdout
    assert "loads" not in told.stdout
    schemas = json.loads(here("tools", tools, "--style", "json").stdout)
    assert [schema["function"]["name"] for schema in schemas] == ["twice"]
    calls = here("tools", tools, "--markup", "qwen").stdout
    assert "Python code" not in calls
    assert "<tool_call>" in calls


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no such file"),
        ("def broken(:\n", "SyntaxError: invalid syntax"),
        ("import nothing_of_this_name\n", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("raise SystemExit(3)\n", "SystemExit: 3"),
        ("from json import loads\nx = 3\n", "defines no tools; it must hold public functions, or a list TOOLS"),
        ("TOOLS = 'twice'\n", "TOOLS='twice': must be a list of functions, or a mapping"),
        ("TOOLS = [3]\n", "tool"),
        ("def f(): ...\nTOOLS = [f, f]\n", "tool name='f': given twice"),
        ("import midstream as ms\n@ms.tool(batch_size=0)\ndef f(x): ...\n", "batch_size=0"),
    ],
)
def test_files_that_are_none_of_tools(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "tools.py"
    if text is not None:
        path.write_text(text)
    refused = here("tools", path)
    assert refused.exit_code == 2, refused.output
    assert refused.stderr.startswith(f"midstream: --tools {path}: ")
    assert message in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_a_file_that_is_not_python(tmp_path: Path) -> None:
    path = tmp_path / "tools.json"
    path.write_text("[]")
    assert "must be a Python file, with a name that ends in .py" in here("tools", path).stderr


def test_without_a_markup_nothing_could_call_them(tools: Path, model_folder: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl", [{"text": "Q1:"}])
    run = ["run", "--model", model_folder, "--prompts", prompts, "--out", tmp_path / "o.jsonl", "--tools", tools]
    for arguments in (["tools", tools, "--markup", "none"], [*run, "--markup", "none"]):
        refused = here(*arguments)
        assert refused.exit_code == 2
        assert "nothing that could call" in refused.stderr
