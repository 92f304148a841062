"""What can be seen of a run while it goes: the live view, metrics, spans and logs."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from midstream.cli import progress as progress_module
from midstream.cli.progress import ProgressView
from midstream.jobs import Progress
from midstream.observing import ObservedRow, RowMoved, RowsQueued, Stepped, ToolBegan, ToolEnded
from midstream.types import ExecutionError, Prompt, StopKind, StopReason, ToolAnswer, Trajectory
from tests.cli.conftest import command, environment
from tests.cli.runs import here, say, write_prompts

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def run(model_folder: Path, tmp_path: Path) -> list[Any]:
    prompts = write_prompts(tmp_path / "p.jsonl", [{"text": f"Q{number}:"} for number in range(4)])
    return ["run", "--model", model_folder, "--prompts", prompts, "--out", tmp_path / "o.jsonl"]


def test_the_view_of_a_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None, legacy_windows=False)
    progress = Progress()
    trajectory = Trajectory(Prompt(text="p"), (1,), (), (), StopReason(StopKind.END_OF_SEQUENCE))
    rows = [ObservedRow(None, None, sample, 0) for sample in range(5)]
    with ProgressView(console, 12, 2) as view:

        def tell(*observations: Any) -> None:
            for one in observations:
                progress(one)
                view(one)

        tell(RowsQueued(10), *(RowMoved(row, "waiting", "decoding") for row in rows), Stepped(0.1, 5, 1234))
        tell(RowMoved(rows[0], "decoding", "executing"), RowMoved(rows[1], "decoding", "rewarding"))
        tell(RowMoved(rows[2], "decoding", "done", trajectory))
        slow, fast, under_way = ToolBegan(rows[0], "slow"), ToolBegan(rows[0], "fast"), ToolBegan(rows[0], "fast")
        failed = ToolAnswer(error=ExecutionError("ValueError", ""))
        tell(slow, fast, under_way, ToolEnded(slow, 2.5, failed), ToolEnded(fast, 0.25, ToolAnswer(1)))
        view.show(progress, 1)
        view.show(progress, 1)
    shown = ESCAPES.sub("", console.file.getvalue())  # type: ignore[attr-defined]
    for text in (
        "3 of 12",
        "5 waiting, 2 decoding, 1 executing, 1 rewarding",
        "1 end_of_sequence",
        "tokens/s",
        "0 blocks, 1 calls of tools",
    ):
        assert text in shown
    tools = [line.split() for line in shown.splitlines() if line.startswith(("slow ", "fast "))][-2:]
    assert tools == [["slow", "1", "1", "2.500", "2.500", "0"], ["fast", "1", "0", "0.250", "0.250", "1"]]


def test_a_run_on_a_real_terminal_and_elsewhere(run: list[Any], tmp_path: Path) -> None:
    """Through the real entry point, with stderr a terminal: the view is live on it, and stdout has the summary."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command(*run), stdout=subprocess.PIPE, stderr=theirs, text=True,
                               env={**environment(), "TERM": "xterm"})  # fmt: skip
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # what a terminal says when its other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    stdout, _ = process.communicate()
    assert process.returncode == 0, shown.decode()
    text = ESCAPES.sub("", shown.decode())
    assert "4 of 4" in text
    assert "0 waiting, 0 decoding, 0 executing" in text
    assert "\x1b[" in shown.decode()
    assert f"{tmp_path / 'o.jsonl'}: 4 of 4 trajectories, 4 of them now" in stdout
    assert "\x1b[" not in stdout


def test_lines_without_a_terminal(run: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch)
    monkeypatch.setattr(progress_module, "LINE_EVERY", 0.0)
    done = here(*run)
    assert done.exit_code == 0
    last = done.stderr.splitlines()[-1]
    assert last.startswith("4/4 rows, 0 waiting, 0 decoding, 0 executing, ")
    assert "\x1b" not in done.stderr


def test_metrics_while_it_runs(run: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []
    say(monkeypatch, "<code>look()</code>")
    (tmp_path / "tools.py").write_text("import builtins\ndef look():\n    return builtins.looking()\n")
    stderr = io.StringIO()
    monkeypatch.setattr(Console, "print", lambda self, *texts, **more: stderr.write(" ".join(map(str, texts)) + "\n"))

    def looking() -> int:
        (url,) = re.findall(r"metrics: (http://127\.0\.0\.1:\d+/metrics)", stderr.getvalue())
        with urllib.request.urlopen(url, timeout=60) as answer:
            found.append(answer.read().decode())
        return 1

    monkeypatch.setattr("builtins.looking", looking, raising=False)
    done = here(*run, "--metrics", "0", "--tools", tmp_path / "tools.py")
    assert done.exit_code == 0, done.output
    families = {family.name: family for family in text_string_to_metric_families(found[-1])}
    running = {sample.labels["tool"]: sample.value for sample in families["midstream_tool_calls_running"].samples}
    assert running["look"] >= 1
    assert families["midstream_sessions_open"].samples[0].value >= 1
    (url,) = re.findall(r"metrics: (\S+)", stderr.getvalue())
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url, timeout=60)


@pytest.mark.parametrize("address", ["x", "70000", ":9400", "localhost:", "1:2:x"])
def test_addresses_that_are_none(run: list[Any], address: str) -> None:
    refused = here(*run, "--metrics", address)
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert f"{address!r} must be a port, or HOST:PORT" in refused.stderr


def test_spans_in_a_file(run: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch)
    spans = tmp_path / "spans.jsonl"
    assert here(*run, "--spans", spans).exit_code == 0
    told = [json.loads(line) for line in spans.read_text().splitlines()]
    assert sorted(span["name"] for span in told) == ["decode"] * 8 + ["execute_block"] * 4 + ["row"] * 4
    assert len({span["context"]["trace_id"] for span in told}) == 4
    assert {span["resource"]["attributes"]["service.name"] for span in told} == {"midstream"}
    refused = here(*run[:-1], tmp_path / "other.jsonl", "--spans", tmp_path / "no" / "folder")
    assert refused.exit_code == 2
    assert "no/folder: cannot be written (No such file or directory)" in refused.stderr
    missing = here(*run, "--spans", "otlp")
    assert "--spans otlp: needs its exporter: pip install opentelemetry-exporter-otlp-proto-http" in missing.stderr


def test_logs_as_json(run: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, fail={"Q1:": 3})
    failed = here(*run, "--log-format", "json")
    assert failed.exit_code == 1
    told = [json.loads(line) for line in failed.stderr.splitlines() if line.startswith("{")]
    assert told == []  # an engine that says how a row failed is no news for the log; the summary tells of it
    Path(run[-1]).write_bytes(Path(run[-1]).read_bytes() + b'{"schema":1')
    again = here(*run, "--log-format", "json")
    (line,) = [json.loads(line) for line in again.stderr.splitlines() if line.startswith("{")]
    assert (line["level"], line["logger"]) == ("warning", "midstream.records.store")
    assert "cut off an unfinished record" in line["message"]
    assert here(*run, "--log-level", "loud").exit_code == 2
