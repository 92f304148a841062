"""``midstream run`` with a real model: results, going on after a kill, Ctrl-C, and what it says of it all."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from midstream.cli import main
from midstream.cli import progress as progress_module
from midstream.errors import RecordError
from midstream.records import Record, RecordWriter, read_records, verify
from tests.cli.conftest import command, environment
from tests.cli.runs import here, say, write_prompts

CommandLine = Callable[..., "subprocess.CompletedProcess[str]"]


def records_of(path: Path) -> dict[tuple[str | None, int], Record]:
    records = list(read_records(path))
    by_key = {record.key: record for record in records}
    assert len(by_key) == len(records), "nothing is there twice"
    return by_key


def ids_of(record: Record) -> list[int]:
    return [token_id for segment in record.segments for token_id in segment.ids]


def test_a_run_from_prompts_to_checked_records(model_folder: Path, tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [{"text": f"Q{number}:", "metadata": {"number": number}} for number in range(6)]
    lines += [
        {"messages": [{"role": "user", "content": "Q7"}], "id": "chat", "group": "g"},
        {"ids": [49, 24, 26], "id": "ids", "seed": 5},
        {"text": "Q9:", "id": "short", "limits": {"max_new_tokens": 2}},
        {"text": "Q1: <code>10 ** 3", "id": "open", "open_block": True},
    ]
    prompts, out = write_prompts(tmp_path / "p.jsonl", lines), tmp_path / "out.jsonl"
    arguments = ["run", "--model", model_folder, "--prompts", prompts, "--out", out, "--temperature", "0"]
    arguments += ["--max-new-tokens", "40"]
    done = here(*arguments)
    assert done.exit_code == 0, done.stderr
    assert f"{out}: 10 of 10 trajectories, 10 of them now" in done.stdout
    records = records_of(out)
    assert {key for key, _ in records} == {*map(str, range(6)), "chat", "ids", "short", "open"}
    assert [verify(record) for record in records.values()] == [[]] * 10
    for number in range(6):
        text = "".join(segment.text for segment in records[str(number), 0].segments)
        assert text == f" <code>{number} + 1</code><result>{number + 1}</result> So it is {number + 1}.<eos>"
        assert records[str(number), 0].prompt.metadata == {"number": number}
    assert records["chat", 0].prompt_text == "Q7: "
    assert records["chat", 0].prompt.group == "g"
    assert records["ids", 0].prompt_ids == [49, 24, 26]
    assert (records["short", 0].stop.detail, len(ids_of(records["short", 0]))) == ("new_tokens", 2)
    provenance = records["0", 0].provenance
    assert provenance["engine"] == "HuggingFaceEngine"
    assert provenance["isolation"] in ("full", "container", "weak")
    assert provenance["settings"]["temperature"] == 0
    assert set(provenance) >= {"midstream", "torch", "transformers", "seed"}

    before = out.read_bytes()
    again = here(*arguments)
    assert (again.exit_code, again.stdout) == (0, f"{out}: all 10 trajectories are there already\n")
    for change, message in [
        (["--temperature", "0.5"], "its records were made with --temperature 0.0, not 0.5; give the same, or another"),
        (["--max-tool-calls", "3"], "its records were made with --max-tool-calls unset, not 3"),
        (["--stop", "a", "--stop", "b"], "its records were made with --stop none, not a b"),
    ]:
        refused = here(*arguments, *change)
        assert refused.exit_code == 2
        assert message in refused.stderr
        assert refused.stderr.count("\n") == 1
    lines[3]["text"] = "Q8:"
    write_prompts(prompts, lines)
    refused = here(*arguments)
    assert refused.exit_code == 2
    assert "its prompt '3' is another than that of --prompts" in refused.stderr
    assert out.read_bytes() == before

    checked = here("check", out)
    assert (checked.exit_code, "10 trajectories, all sound" in checked.stdout) == (0, True)


def test_missing_samples_come_out_as_they_would_have(model_folder: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl", [{"text": f"Q{number}:"} for number in range(3)])
    arguments = ["run", "--model", model_folder, "--prompts", prompts, "--max-new-tokens", "24", "--dtype", "float32"]
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    assert here(*arguments, "--num-samples", "4", "--out", whole).exit_code == 0
    expected = records_of(whole)
    assert len(expected) == 12
    kept = [line for line in whole.read_bytes().splitlines(True) if b'"id":"2"' not in line][::2]
    parts.write_bytes(b"".join(kept))
    done = here(*arguments, "--num-samples", "4", "--out", parts)
    assert done.exit_code == 0, done.stderr
    assert f"going on after {len(kept)} of 12 trajectories" in done.stderr
    found = records_of(parts)
    assert found.keys() == expected.keys()
    assert {key: ids_of(record) for key, record in found.items()} == {
        key: ids_of(record) for key, record in expected.items()
    }
    assert all(found[key].seed == expected[key].seed for key in expected)


def test_a_run_that_is_killed_goes_on_where_it_stopped(
    model_folder: Path, tmp_path: Path, midstream: CommandLine
) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl", [{"text": f"Q{n % 10}:", "id": f"p{n}"} for n in range(100)])
    out = tmp_path / "out.jsonl"
    arguments = ["run", "--model", model_folder, "--prompts", prompts, "--out", out, "--num-samples", "2"]
    arguments += ["--batch-size", "2", "--max-new-tokens", "40"]
    seen: list[bytes] = []
    for kill in range(2):
        _wait_for_lines(_start(arguments), out, 10 * (kill + 1)).kill()
        now = out.read_bytes()
        whole = now[: now.rfind(b"\n") + 1]
        assert all(whole.startswith(before) for before in seen), "what was finished stays as it was"
        seen.append(whole)
        assert len(whole.splitlines()) < 200, "killed before its end"
    out.write_bytes(out.read_bytes() + b'{"schema":1,"prompt":{"id":"p9')  # as the kill may leave it, at its worst
    done = midstream(*arguments)
    assert done.returncode == 0, done.stderr
    assert "cut off an unfinished record" in done.stderr
    records = records_of(out)
    assert records.keys() == {(f"p{n}", sample) for n in range(100) for sample in range(2)}
    assert all(not verify(record) for record in records.values())
    assert all(out.read_bytes().startswith(before) for before in seen)


def test_ctrl_c_keeps_what_is_finished(model_folder: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl", [{"text": f"Q{n % 10}:", "id": f"p{n}"} for n in range(120)])
    out = tmp_path / "out.jsonl"
    arguments = ["run", "--model", model_folder, "--prompts", prompts, "--out", out, "--batch-size", "1"]
    arguments += ["--max-new-tokens", "40"]
    process = _wait_for_lines(_start(arguments), out, 5, leave=True)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "interrupted; the same command goes on from here" in stderr
    assert "Traceback" not in stderr
    records = records_of(out)
    assert 5 <= len(records) < 120
    assert f"{len(records)} of 120 trajectories" in stdout
    assert all(record.stop.kind.value not in ("cancelled", "paused") for record in records.values())
    assert all(not verify(record) for record in records.values())


def test_ctrl_c_before_anything_is_finished(model_folder: Path, tmp_path: Path) -> None:
    prompts, out = write_prompts(tmp_path / "p.jsonl", [{"text": "Q1:"}]), tmp_path / "out.jsonl"
    process = _start(["run", "--model", model_folder, "--prompts", prompts, "--out", out])
    while not out.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert "Traceback" not in stderr
    assert process.returncode == 130, stderr


def _start(arguments: list[Any]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )


def _wait_for_lines(
    process: subprocess.Popen[str], out: Path, lines: int, *, leave: bool = False
) -> subprocess.Popen[str]:
    while not out.exists() or out.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    if not leave:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    return process


# --- on the scripted engine ------------------------------------------------------------------------------


def test_failed_rows_are_told_and_kept(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, fail={"Q1:": 3})
    prompts = write_prompts(tmp_path / "p.jsonl", [{"text": "Q1:"}, {"text": "Q2:"}])
    out = tmp_path / "out.jsonl"
    result = CliRunner().invoke(
        main, ["run", "--model", str(model_folder), "--prompts", str(prompts), "--out", str(out)]
    )
    assert result.exit_code == 1, result.output
    assert "midstream run: 1 rows failed; the first: prompt '0' sample 0: engine_failure: " in result.stderr
    records = records_of(out)
    assert records["0", 0].stop.kind.value == "engine_failure"
    assert "<result>42</result>" in "".join(segment.text for segment in records["1", 0].segments)
    assert all(not verify(record) for record in records.values())
    # The next run tries the failed row again, and keeps the finished one.
    kept = next(line for line in out.read_bytes().splitlines(keepends=True) if b"<result>42</result>" in line)
    say(monkeypatch)
    result = here("run", "--model", model_folder, "--prompts", prompts, "--out", out)
    assert result.exit_code == 0, result.output
    assert "going on after 1 of 2 trajectories" in result.stderr
    assert "1 rows that failed are tried again" in result.stderr
    assert kept in out.read_bytes()
    records = records_of(out)
    assert [records[name, 0].stop.kind.value for name in "01"] == ["end_of_sequence"] * 2
    assert all(not verify(record) for record in records.values())


def test_a_record_that_cannot_be_written_is_an_error(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch)

    def full(self: RecordWriter, record: Record) -> None:
        raise RecordError(f"{self.path}: a record could not be written (No space left on device)")

    monkeypatch.setattr(RecordWriter, "append", full)
    prompts = write_prompts(tmp_path / "p.jsonl", [{"text": "Q1:"}])
    result = CliRunner().invoke(
        main, ["run", "--model", str(model_folder), "--prompts", str(prompts), "--out", str(tmp_path / "o.jsonl")]
    )
    assert result.exit_code == 2
    assert result.stderr.endswith("o.jsonl: a record could not be written (No space left on device)\n")


def test_without_a_terminal_progress_is_lines(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch)
    monkeypatch.setattr(progress_module, "LINE_EVERY", 0.0)
    prompts = write_prompts(tmp_path / "p.jsonl", [{"text": "Q1:"}, {"text": "Q2:"}])
    result = CliRunner().invoke(
        main, ["run", "--model", str(model_folder), "--prompts", str(prompts), "--out", str(tmp_path / "o.jsonl")]
    )
    assert result.exit_code == 0
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("2/2 rows, ")
    assert "tokens/s, " in lines[-1]
    assert lines[-1].endswith(" calls/s, 0 failed")


def test_no_markup_runs_no_code(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch)
    prompts, out = write_prompts(tmp_path / "p.jsonl", [{"text": "Q1:"}]), tmp_path / "o.jsonl"
    arguments = ["run", "--model", str(model_folder), "--prompts", str(prompts), "--out", str(out), "--markup", "none"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    (record,) = read_records(out)
    assert (record.markup, record.calls, len(record.segments)) == (None, [], 1)
    assert verify(record) == []


def test_arguments_that_are_no_unicode_do_not_break_records(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch)
    prompts, out = write_prompts(tmp_path / "p.jsonl", [{"text": "Q1:"}]), tmp_path / "o.jsonl"
    arguments = ["run", "--model", model_folder, "--prompts", prompts, "--out", out, "--stop", "\udcff"]
    assert here(*arguments).exit_code == 0
    (record,) = read_records(out)
    assert record.provenance["settings"]["stop"] == ["\ufffd"]
    assert here(*arguments).stdout == f"{out}: all 1 trajectories are there already\n"
