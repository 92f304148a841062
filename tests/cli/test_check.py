"""``midstream check``: what it says, and what it exits with."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from midstream.cli import main
from midstream.records import Record
from midstream.types import Prompt
from tests.records.trajectories import Scenario, by_code, drive


def record(prompt_id: str = "p", sample: int = 0) -> Record:
    made = drive(Scenario(["Let <code>1</code> be."], by_code, prompt=Prompt(text="Say it.", id=prompt_id)))
    return msgspec.structs.replace(made, sample=sample)


def write(path: Path, *records: Record | bytes) -> Path:
    lines = [item if isinstance(item, bytes) else item.encode() for item in records]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def check(*paths: Path) -> Result:
    return CliRunner().invoke(main, ["check", *map(str, paths)])


def test_a_sound_file(tmp_path: Path) -> None:
    result = check(write(tmp_path / "r.jsonl", record("a"), record("b")))
    assert result.exit_code == 0
    assert result.stdout == (
        f"{tmp_path}/r.jsonl: 2 trajectories, all sound (20 ids generated, 14 injected, 2 calls)\n"
    )
    assert result.stderr == ""


def test_of_an_empty_file_nothing_is_said_to_be_sound(tmp_path: Path) -> None:
    result = check(write(tmp_path / "r.jsonl", record("a")), write(tmp_path / "empty.jsonl"))
    assert (result.exit_code, result.stdout.count("\n")) == (2, 1)
    assert "r.jsonl: 1 trajectory, all sound" in result.stdout
    assert "empty.jsonl: no trajectory is in it" in result.stderr


def test_files_and_options_are_looked_at_before_a_model_is_loaded(tmp_path: Path) -> None:
    file = str(write(tmp_path / "r.jsonl", record("a")))
    for arguments, message in [
        ([str(tmp_path / "none.jsonl")], "none.jsonl: cannot be read (No such file or directory)"),
        ([str(tmp_path)], "cannot be read (Is a directory)"),
        ([file, "--tolerance", "-1"], "--tolerance -1: must be a number of at least 0"),
        ([file, "--tolerance", "nan"], "--tolerance nan: must be a number of at least 0"),
    ]:
        result = CliRunner().invoke(main, ["check", "--model", str(tmp_path / "nowhere"), *arguments])
        assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


def test_a_wrong_trajectory_is_named_with_rule_and_place(tmp_path: Path) -> None:
    wrong = record("b", 3)
    wrong.segments[0].logprobs[2] = 0.5
    result = check(write(tmp_path / "r.jsonl", record("a"), wrong, record("c")))
    assert result.exit_code == 1
    first, summary = result.stdout.splitlines()
    place = len(wrong.prompt_ids) + 2
    message = "logprob 0.5 must be finite and not over 0"
    assert first == f"{tmp_path}/r.jsonl:2: prompt 'b' sample 3: logprobs at id {place}: {message}"
    assert "3 trajectories, 1 wrong" in summary


def test_the_same_trajectory_twice_is_wrong(tmp_path: Path) -> None:
    result = check(write(tmp_path / "r.jsonl", record("a"), record("a", 1), record("a")))
    assert result.exit_code == 1
    assert ":3: prompt 'a' sample 0: unique: the same prompt and sample as line 1" in result.stdout


def test_every_file_is_checked(tmp_path: Path) -> None:
    wrong = record("b")
    wrong.total_length += 1
    first, second = write(tmp_path / "1.jsonl", wrong), write(tmp_path / "2.jsonl", record())
    result = check(first, second)
    assert result.exit_code == 1
    assert "1.jsonl: 1 trajectory, 1 wrong" in result.stdout
    assert "2.jsonl: 1 trajectory, all sound" in result.stdout


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "r.jsonl:2: not JSON"),
        (b'{"text": "hello"}', "r.jsonl:2: schema: missing"),
        (b"", "r.jsonl:2: not JSON"),
    ],
)
def test_what_cannot_be_read_is_one_line_on_stderr(tmp_path: Path, line: bytes, message: str) -> None:
    result = check(write(tmp_path / "r.jsonl", record(), line))
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_unfinished_line_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", record())
    path.write_bytes(path.read_bytes() + record("b").encode()[:100])
    result = check(path)
    assert result.exit_code == 2
    assert result.stderr.endswith(
        "r.jsonl:2: the last line is unfinished: its writer was stopped, or is still writing\n"
    )


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    result = check(tmp_path / "none.jsonl")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "none.jsonl: cannot be read (No such file or directory)" in result.stderr


@pytest.mark.parametrize("arguments", [["check"], ["check", "--colour"], ["chekc"], ["--nothing"]])
def test_wrong_usage_is_one_line_that_says_where_to_look(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, arguments, prog_name="midstream")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "--help)" in result.stderr


@pytest.mark.parametrize("command", [[], ["run"], ["check"]])
def test_help_has_examples_and_exit_codes(command: list[str]) -> None:
    result = CliRunner().invoke(main, [*command, "--help"], prog_name="midstream")
    assert result.exit_code == 0
    assert "Examples:" in result.stdout
    assert f"midstream {' '.join(command) or 'check'} " in result.stdout
    assert "Exit codes:" in result.stdout
    assert "  130  interrupted" in result.stdout


def test_the_version() -> None:
    result = CliRunner().invoke(main, ["--version"])
    assert (result.exit_code, result.stdout.startswith("midstream, version ")) == (0, True)
