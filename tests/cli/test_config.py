"""A run's options from TOML, and written beside its records so that it can be made again."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from midstream.cli import main
from midstream.cli.config_file import options_of, read_config, write_config
from midstream.records import read_records
from tests.cli.runs import here, say, write_prompts

RUN = main.commands["run"]


@pytest.fixture
def config(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    say(monkeypatch)
    write_prompts(tmp_path / "p.jsonl", [{"text": "Q1:"}])
    path = tmp_path / "run.toml"
    path.write_text(
        f"model = '{model_folder}'\nprompts = '{tmp_path / 'p.jsonl'}'\nout = '{tmp_path / 'o.jsonl'}'\n"
        "num-samples = 3\ntop_p = 1  # an integer is a number\nstop = ['</answer>', 'STOP']\nseed = 5\n"
    )
    return path


def settings_of(path: Path) -> dict[str, Any]:
    return next(iter(read_records(path))).provenance["settings"]  # type: ignore[no-any-return]


def test_options_come_from_the_file_and_the_command_line_goes_before(config: Path, tmp_path: Path) -> None:
    assert here("run", "--config", config).exit_code == 0
    assert len(list(read_records(tmp_path / "o.jsonl"))) == 3
    settings = settings_of(tmp_path / "o.jsonl")
    assert (settings["stop"], settings["seed"], settings["top_p"]) == (["</answer>", "STOP"], 5, 1.0)
    done = here("run", "--seed", "6", "--config", config, "--stop", "only", "--out", tmp_path / "other.jsonl")
    assert done.exit_code == 0, done.output
    settings = settings_of(tmp_path / "other.jsonl")
    assert (settings["stop"], settings["seed"], settings["top_p"]) == (["only"], 6, 1.0)


def test_the_options_of_a_run_make_it_again(config: Path, tmp_path: Path) -> None:
    assert here("run", "--config", config, "--max-new-tokens", "30", "--text-only", "--help").exit_code == 0
    assert here("run", "--config", config, "--max-new-tokens", "30").exit_code == 0
    echo = tmp_path / "o.jsonl.toml"
    assert here("run", "--config", echo, "--out", tmp_path / "again.jsonl").exit_code == 0
    first, again = (list(read_records(tmp_path / name)) for name in ("o.jsonl", "again.jsonl"))
    ids = [{record.sample: [segment.ids for segment in record.segments] for record in each} for each in (first, again)]
    assert len(ids[0]) == 3
    assert ids[0] == ids[1]
    assert settings_of(tmp_path / "again.jsonl") == settings_of(tmp_path / "o.jsonl")
    before = echo.read_bytes()
    assert here("run", "--config", echo).stdout.endswith("all 3 trajectories are there already\n")
    assert echo.read_bytes() == before
    text = echo.read_text()
    assert text.startswith("# What made o.jsonl: midstream ")
    assert "# time-limit is not given\n" in text
    said = {line.removeprefix("# ").partition(" ")[0] for line in text.splitlines()[2:]}
    elsewhere = {"metrics", "spans", "log-level", "log-format"}
    assert said == set(options_of(RUN)) - elsewhere


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("num-sample = 3", "'num-sample' is no option of midstream run; did you mean 'num-samples'?"),
        ("whatever = 3", "'whatever' is no option of midstream run; the keys are model, server, "),
        ("config = 'x'", "'config' is no option of midstream run"),
        ("[sampling]\ntop_k = 3", "'sampling' is no option of midstream run"),
        ("num-samples = '3'", 'num-samples = "3": must be an integer'),
        ("num-samples = true", "num-samples = true: must be an integer"),
        ("num-samples = 1.5", "num-samples = 1.5: must be an integer"),
        ("temperature = '1'", 'temperature = "1": must be a number'),
        ("text-only = 1", "text-only = 1: must be true or false"),
        ("stop = 'x'", 'stop = "x": must be a list of texts'),
        ("stop = [1]", "stop = [1]: must be a list of texts"),
        ("markup = 3", "markup = 3: must be a text"),
        ("top-p = 0.5\ntop_p = 0.6", "'top_p' is given twice"),
        ("seed =", "not TOML: "),
        ("seed = 1\nseed = 2", "not TOML: "),
    ],
)
def test_what_a_file_may_not_hold(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(line)
    refused = here("run", "--config", path)
    assert refused.exit_code == 2
    assert refused.stderr.startswith(f"midstream: --config {path}: {message}"), refused.stderr
    assert refused.stderr.count("\n") == 1


def test_values_are_checked_as_those_of_the_command_line(config: Path) -> None:
    config.write_text(config.read_text().replace("num-samples = 3", "num-samples = 0"))
    refused = here("run", "--config", config)
    assert refused.exit_code == 2
    assert "--num-samples" in refused.stderr
    assert "0 is not in the range x>=1" in refused.stderr
    missing = here("run", "--config", config.with_name("nothing.toml"))
    assert "nothing.toml: cannot be read (No such file or directory)" in missing.stderr


def test_whatever_can_be_given_can_be_written(tmp_path: Path) -> None:
    values = {
        "model": 'a\\b"c\nd\té\x7f\x00🙂',
        "stop_strings": ("</answer>", "[1]", "#", "'''"),
        "temperature": 1e-05,
        "seed": -(2**62),
        "text_only": True,
        "time_limit": None,
        "preload": (),
    }
    path = tmp_path / "x.toml"
    write_config(RUN, values, path, "one\ntwo")
    assert path.read_text().startswith("# one\n# two\n")
    assert tomllib.loads(path.read_text())["model"] == values["model"]
    expected = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    del expected["time_limit"]
    assert read_config(RUN, str(path)) == expected
