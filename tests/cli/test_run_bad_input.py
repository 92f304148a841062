"""``midstream run`` refuses what cannot work in one line, before any weights are loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from midstream.cli import main
from midstream.records import RecordWriter
from midstream.types import Prompt
from tests.records.trajectories import Scenario, drive


@pytest.fixture
def no_weights(model_folder: Path, tmp_path: Path) -> Path:
    """The model's tokenizer and configuration alone: whoever loads its weights fails otherwise."""
    folder = tmp_path / "no-weights"
    shutil.copytree(model_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def run(folder: Path, model: Path | str, lines: list[object] | bytes, *options: str) -> Result:
    prompts = folder / "prompts.jsonl"
    prompts.write_bytes(
        lines if isinstance(lines, bytes) else b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    )
    arguments = ["run", "--model", str(model), "--prompts", str(prompts), "--out", str(folder / "out.jsonl"), *options]
    return CliRunner().invoke(main, arguments, prog_name="midstream")


def refused(result: Result, message: str) -> None:
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stdout == ""


GOOD: list[object] = [{"text": "Q1:"}]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b"", "prompts.jsonl: is empty"),
        (b'{"text": "Q1:"}\n\n{"text": "Q2:"}\n', "prompts.jsonl:2: the line is empty"),
        (b'{"text": "Q1:"}\n{"text": "Q2:"\n', "prompts.jsonl:2: not JSON"),
        (b'{"text": "Q\xff"}\n', "prompts.jsonl:1: not JSON"),
        (b"[" * 100_000, "prompts.jsonl:1: "),
        (b'["Q1:"]', "prompts.jsonl:1: Expected `object`, got `array`"),
        (
            [{"text": "Q1:", "promt": 1}],
            "prompts.jsonl:1: Object contains unknown field `promt` (a prompt's fields are",
        ),
        ([{}], "prompts.jsonl:1: Prompt=[]: give exactly one of ids, text and messages"),
        ([{"text": "a", "ids": [1]}], "give exactly one of ids, text and messages"),
        ([{"text": 5}], "prompts.jsonl:1: text: Expected `str | null`, got `int`"),
        ([{"ids": [1, "x"]}], "prompts.jsonl:1: ids[1]: Expected `int`, got `str`"),
        ([{"ids": [1, 5000]}], "prompts.jsonl:1: prompt '0' holds id 5000"),
        ([{"ids": [-1]}], "prompts.jsonl:1: prompt '0' holds id -1"),
        ([{"ids": []}], "prompts.jsonl:1: prompt '0' is empty"),
        ([{"text": ""}], "prompts.jsonl:1: prompt '0' is empty"),
        ([{"messages": []}], "prompts.jsonl:1: Prompt.messages"),
        ([{"messages": [{"role": "user"}]}], "prompts.jsonl:1: Prompt.messages[].content=None: must be a string"),
        ([{"messages": [{"role": "robot", "content": ""}]}], "Prompt.messages[].role='robot'"),
        ([{"text": "a", "id": "x"}, {"text": "b", "id": "x"}], "prompts.jsonl:2: id 'x' is that of"),
        ([{"text": "a", "id": 1}, {"text": "b"}], "prompts.jsonl:2: id '1' is that of"),
        ([{"text": "a", "limits": {"max_tokens": 1}}], "prompts.jsonl:1: limits: Object contains unknown field"),
        ([{"text": "a", "limits": {"max_new_tokens": 0}}], "prompts.jsonl:1: Limits.max_new_tokens=0"),
        ([{"text": "Q1: " * 60}], "prompts.jsonl:1: prompt '0' has"),
        ([{"text": "Q1:", "limits": {"max_total_tokens": 2}}], "prompts.jsonl:1: prompt '0' has 3 ids"),
        ([{"text": "Q1:", "open_block": True}], "prompts.jsonl:1: Prompt.open_block"),
    ],
)
def test_prompts_that_cannot_be(no_weights: Path, tmp_path: Path, lines: list[object] | bytes, message: str) -> None:
    refused(run(tmp_path, no_weights, lines), message)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-new-tokens", "0"], "Limits.max_new_tokens=0: must be an integer of at least 1, or None"),
        (["--max-new-tokens", "many"], "'--max-new-tokens'"),
        (["--max-total-tokens", "3"], "no room is left to generate"),
        (["--max-tool-calls", "-1"], "Limits.max_tool_calls=-1"),
        (["--time-limit", "0"], "Limits.time_limit=0.0"),
        (["--time-limit", "inf"], "--time-limit inf: must be a finite number"),
        (["--result-tokens", "0"], "Limits.max_result_tokens=0"),
        (["--stop", ""], "Limits.stop_strings"),
        (["--temperature", "-1"], "Sampling.temperature=-1.0"),
        (["--temperature", "nan"], "--temperature nan: must be a finite number"),
        (["--top-p", "0"], "Sampling.top_p=0.0"),
        (["--min-p", "1"], "Sampling.min_p=1.0"),
        (["--num-samples", "0"], "'--num-samples'"),
        (["--batch-size", "0"], "'--batch-size'"),
        (["--markup", "python"], "Markup.tags(start='python')"),
        (["--markup", "qwem"], "markup='qwem': no tag, and none of code, fenced, qwen"),
        (["--markup", "code+qwen"], "this tokenizer has no added token '<|im_end|>'"),
        (["--wall-time", "0"], "--wall-time: SandboxLimits.wall_time=0.0"),
        (["--preload", "no_such_module"], "preload='no_such_module': no such module"),
        (["--isolation", "none"], "'--isolation'"),
        (["--dtype", "int8"], "'--dtype'"),
        (["--device", "toaster"], "--device toaster: no such kind of device"),
        (["--warp", "9"], "--warp"),
    ],
)
def test_options_that_cannot_be(no_weights: Path, tmp_path: Path, options: list[str], message: str) -> None:
    refused(run(tmp_path, no_weights, GOOD, *options), message)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    refused(run(tmp_path, tmp_path / "nowhere", GOOD), "nowhere: there is no such folder")
    refused(run(tmp_path, "./nowhere", GOOD), "./nowhere: there is no such folder")
    refused(run(tmp_path, tmp_path, GOOD), "the folder holds no config.json")
    refused(run(tmp_path, tmp_path / "prompts.jsonl", GOOD), "is a file; it must be the folder of a model")


def test_a_model_that_is_broken(no_weights: Path, tmp_path: Path) -> None:
    (no_weights / "tokenizer.json").write_text("{")
    refused(run(tmp_path, no_weights, GOOD), "no-weights: cannot be loaded: ")
    (no_weights / "config.json").write_text("{")
    refused(run(tmp_path, no_weights, GOOD), "no-weights: cannot be loaded: ")


def test_a_model_without_weights_is_one_line_too(no_weights: Path, tmp_path: Path) -> None:
    refused(run(tmp_path, no_weights, GOOD, "--markup", "none"), "no causal language model can be loaded from it")


def test_prompts_that_are_not_there(no_weights: Path, tmp_path: Path) -> None:
    arguments = ["run", "--model", str(no_weights), "--prompts", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    refused(CliRunner().invoke(main, arguments), "none: cannot be read (No such file or directory)")


def test_a_template_that_refuses(no_weights: Path, tmp_path: Path) -> None:
    template = "{{ raise_exception('No turns please') }}"
    (no_weights / "chat_template.jinja").write_text(template)
    lines: list[object] = [{"text": "a"}, {"messages": [{"role": "user", "content": "hi"}]}]
    refused(run(tmp_path, no_weights, lines), "prompts.jsonl:2: TemplateError: No turns please")


def test_an_output_that_cannot_be(no_weights: Path, tmp_path: Path) -> None:
    arguments = ["run", "--model", str(no_weights), "--prompts", str(tmp_path / "p"), "--out"]
    (tmp_path / "p").write_text('{"text": "Q1:"}\n')
    refused(CliRunner().invoke(main, [*arguments, str(tmp_path / "no" / "out")]), "cannot be written (No such file")
    refused(CliRunner().invoke(main, [*arguments, str(tmp_path / "p")]), "p:1: schema: missing")
    assert (tmp_path / "p").read_text() == '{"text": "Q1:"}\n'
    with RecordWriter(tmp_path / "out"):
        refused(CliRunner().invoke(main, [*arguments, str(tmp_path / "out")]), "another process is writing this file")


def test_records_that_were_made_otherwise(no_weights: Path, tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "out.jsonl") as writer:
        writer.append(drive(Scenario(["Hi"], prompt=Prompt(text="Say it.", id="p"))))
    refused(run(tmp_path, no_weights, GOOD), "out.jsonl: its records were not made by midstream run")
