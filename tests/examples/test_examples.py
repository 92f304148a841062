"""Each example that needs no model of one's own, as a program, with warnings as errors."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import midstream
from midstream.records import read_records, verify

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", *arguments], cwd=EXAMPLES, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_answers_from_documents(tmp_path: Path) -> None:
    out = run("retrieval/ask.py", "--out", str(tmp_path / "rollouts.jsonl"))
    found = re.search(r"(\d) of 5 answers hold the right word", out)
    assert found is not None
    assert int(found[1]) >= 3, "the topics differ between versions of Python, but not by so much"
    records = list(read_records(tmp_path / "rollouts.jsonl"))
    assert len(records) == 5
    assert all(not verify(record) for record in records)
    calls = [call for record in records for entry in record.calls if entry.result for call in entry.result.tool_calls]
    assert [call.name for call in calls] == ["retrieve"] * 5


def test_answers_of_a_model_of_ones_own(tmp_path: Path) -> None:
    demo = Path(midstream.__file__).parent / "demo"
    run("retrieval/ask.py", "--model", str(demo), "--out", str(tmp_path / "rollouts.jsonl"))
    assert len(list(read_records(tmp_path / "rollouts.jsonl"))) == 5


def test_tools_of_an_mcp_server() -> None:
    out = run("mcp/shop.py")
    assert "(['apple', 'bread', 'date'], 3.05)" in out
    assert "no: McpToolError" in out
    assert "price('date', pieces=10) -> 1.5" in out
