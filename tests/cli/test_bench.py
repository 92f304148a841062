"""``midstream bench``: what it measures and how it says so. No figure is held to anything."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

import midstream as ms
from midstream.bench import detection
from tests.cli.runs import here

DEMO = Path(ms.__file__).parent / "demo"


def test_detection(tmp_path: Path) -> None:
    done = here("bench", "detection", "--quick", "--json", tmp_path / "b.json")
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "b.json").read_text())
    figures = told["figures"]["detection"]
    assert len(figures) == 2 * len(detection.TEXTS)
    for figure in figures:
        assert figure["unit"] == "µs"
        assert figure["value"] > 0
        assert math.isfinite(figure["ratio"])
        assert figure["name"].split(":")[0] in done.stdout
    assert set(told) == {"machine", "load", "figures"}
    assert told["machine"]["cores"] >= 1


def test_the_words_of_the_texts_become_ids_that_give_them_back() -> None:
    vocabulary = detection.words()
    for text in detection.TEXTS.values():
        ids = vocabulary.encode_text(text)
        assert len(ids) < len(text)
        assert b"".join(vocabulary.piece(one) for one in ids).decode() == text


@pytest.mark.slow
def test_the_sandbox() -> None:
    done = here("bench", "sandbox", "--quick", "--json", "-")
    assert done.exit_code == 0, done.output
    figures = {figure["name"]: figure for figure in json.loads(done.stdout)["figures"]["sandbox"]}
    for name in ("block: x + y", "call of a tool from code", "blocks of 20 sessions at once"):
        assert figures[name]["ratio"] > 0
        assert figures[name]["beside"]
    assert any(name.startswith("session: start and close (") for name in figures)
    assert "x + y" in done.stderr  # the table, out of the way of what a program reads


def test_a_model_of_ones_own() -> None:
    done = here("bench", "engine", "--quick", "--model", DEMO, "--device", "cpu", "--json", "-")
    assert done.exit_code == 0, done.output
    plain, looking = json.loads(done.stdout)["figures"]["engine"]
    assert plain["beside"] == "model.generate of transformers"
    assert looking["beside"] == plain["name"]
    assert min(plain["value"], looking["value"], plain["ratio"], looking["ratio"]) > 0


def test_what_cannot_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("midstream.cli.bench._figures", None)  # nothing is measured
    (tmp_path / "file").write_text("")
    for arguments, message in [
        (["engine"], "engine: needs a model to measure; give its --model"),
        (["nothing"], "'nothing' is not one of 'sandbox', 'detection', 'engine'"),
        (["detection", "--quick", "--json", str(tmp_path)], "cannot be written (Is a directory)"),
        (["detection", "--json", str(tmp_path / "no" / "x")], "cannot be written (No such file or directory)"),
        (["detection", "--json", str(tmp_path / "file" / "x")], "cannot be written (Not a directory)"),
    ]:
        refused = here("bench", *arguments)
        assert refused.exit_code == 2
        assert message in refused.stderr
