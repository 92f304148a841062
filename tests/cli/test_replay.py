"""``midstream replay``: blocks run again in fresh sessions, with the tools' recorded answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import midstream as ms
from midstream.cli import main
from midstream.records import Record, read_records
from midstream.replaying import replay
from tests.vocabularies import tokenizer

SAID = {
    "state": "<code>x = [1, 2]; x.append(3)</code> and <code>sum(x), sorted({'b': 1})</code> end",
    "random": "<code>import random; random.random()</code> and <code>random.random()</code> end",
    "tool": "<code>a = find('k', deep={'n': 1}); a</code> and <code>find('other')</code> end",
    "fails": "<code>1 / 0</code> and <code>find('bad')</code> end",
    "plain": "no code at all",
}


def find(key: str, deep: Any = None) -> dict[str, Any]:
    """Look a key up."""
    if key == "bad":
        raise KeyError(key)
    return {"key": key, "deep": deep, "pair": (1, b"two")}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, sandboxes: ms.SandboxPool) -> Path:
    path = tmp_path_factory.mktemp("replay") / "r.jsonl"
    engine = ms.ScriptedEngine(tokenizer("o200k"), SAID)
    with ms.Generator(engine, pool=sandboxes, tools=[find]) as generator:
        generator.generate([ms.Prompt(text=text, id=text) for text in SAID], n=2).save(path)
    return path


def run(path: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["replay", str(path), "--preload", "math", *arguments])


def changed(file: Path, tmp_path: Path, prompt: str, old: str, new: str) -> Path:
    """The records with one of them changed, in its text as it stands in the file."""
    lines = file.read_text().splitlines()
    index = next(i for i, line in enumerate(lines) if f'"id":"{prompt}"' in line)
    assert old in lines[index]
    lines[index] = lines[index].replace(old, new)
    (tmp_path / "changed.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "changed.jsonl"


def test_what_ran_once_runs_the_same_again(file: Path) -> None:
    result = run(file)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "16 blocks of 10 trajectories: all as recorded\n"


def test_tools_are_not_called(file: Path, sandboxes: ms.SandboxPool) -> None:
    """Nobody here could answer, and what they answered comes back with its types."""
    (done,) = [each for each in replay(_records(file, "tool"), lambda _: sandboxes) if each.record.sample == 0]
    assert (done.blocks, done.differences) == (2, ())
    assert "b'two'" in done.record.calls[0].result.text  # type: ignore[union-attr]


def _records(file: Path, prompt: str) -> list[Record]:
    return [record for record in read_records(file) if record.prompt.id == prompt]


@pytest.mark.parametrize(
    ("prompt", "old", "new", "said"),
    [
        ("state", "sorted({'b': 1})\"", "sorted({'c': 1})\"", "block 2: text was \"(6, ['b'])\", is \"(6, ['c'])\""),
        ("tool", "find('other')\"", "find('else')\"", "block 2: a tool's call was find('other'), is find('else')"),
        ("tool", "find('other')\"", "'none'\"", "block 2: a tool's call was find('other'), is not made"),
        ("plain", '"calls":[]', '"calls":[]', ""),
        ("fails", "\"code\":\"1 / 0\"", "\"code\":\"1 / 1\"", "block 1: error was 'ZeroDivisionError', is None"),
        ("state", "x = [1, 2]", "x = [while]", "SyntaxError"),
    ],
)  # fmt: skip
def test_every_difference_is_told(file: Path, tmp_path: Path, prompt: str, old: str, new: str, said: str) -> None:
    result = run(changed(file, tmp_path, prompt, old, new))
    assert said in result.stdout
    assert result.exit_code == (1 if said else 0)
    if said:
        assert f"prompt {prompt!r} sample 0: block" in result.stdout
        assert "16 blocks of 10 trajectories: 1 of them otherwise" in result.stdout


def test_results_come_in_the_order_of_the_records(file: Path, sandboxes: ms.SandboxPool) -> None:
    records = list(read_records(file))
    assert [done.record for done in replay(iter(records), lambda _: sandboxes, at_once=4)] == records


def test_sandboxes_are_as_they_were(tmp_path: Path) -> None:
    """Limits, guardrails and the style of errors decide what a model is shown, so they stand in the record."""
    said = ["<code>1 / 0</code>", "<code>print('x' * 3000)</code>", "<code>import socket</code>"]
    style = '"error_style":"traceback"'
    pool = ms.SandboxPool(
        error_style="traceback",
        preload=["math"],
        limits=ms.SandboxLimits(output_characters=300),
        guardrails=ms.Guardrails(),
    )
    engine = ms.ScriptedEngine(tokenizer("o200k"), dict(zip(said, said, strict=True)))
    with pool, ms.Generator(engine, pool=pool) as generator:
        generator.generate([ms.Prompt(text=name, id=name) for name in said]).save(tmp_path / "r.jsonl")
    settings = next(read_records(tmp_path / "r.jsonl")).provenance["sandbox"]
    assert (settings["preload"], settings["error_style"]) == (["math"], "traceback")
    result = CliRunner().invoke(main, ["replay", str(tmp_path / "r.jsonl")])
    assert (result.stdout, result.exit_code) == ("3 blocks of 3 trajectories: all as recorded\n", 0)
    without = changed(tmp_path / "r.jsonl", tmp_path, "<code>1 / 0</code>", style, style.replace("traceback", "repr"))
    assert "text was" in CliRunner().invoke(main, ["replay", str(without)]).stdout
    wrong = changed(tmp_path / "r.jsonl", tmp_path, "<code>1 / 0</code>", style, style.replace("traceback", "none"))
    refused = CliRunner().invoke(main, ["replay", str(wrong)])
    assert (refused.exit_code, "error_style='none'" in refused.stderr) == (2, True)


def test_a_row_that_went_on_in_another_s_session_is_not_run(file: Path, tmp_path: Path) -> None:
    result = run(changed(file, tmp_path, "state", '"provenance":{', '"provenance":{"earlier_blocks":2,'))
    assert "prompt 'state' sample 0: blocks of other rows had run in its session" in result.stdout
    assert result.stdout.endswith("14 blocks of 10 trajectories: all as recorded, 1 not run\n")
    assert result.exit_code == 0


def test_bad_input_is_told_before_anything_runs(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = run(tmp_path / "missing.jsonl")
    assert (missing.exit_code, "cannot be read" in missing.stderr) == (2, True)
    limit = run(file, "--wall-time", "-1")
    assert (limit.exit_code, "--wall-time: SandboxLimits.wall_time=-1.0" in limit.stderr) == (2, True)
    monkeypatch.setattr(ms.SandboxPool, "start", None)  # nothing is started
    missing = run(tmp_path / "missing.jsonl")
    assert (missing.exit_code, "missing.jsonl: cannot be read" in missing.stderr) == (2, True)
