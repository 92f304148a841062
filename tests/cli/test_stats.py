"""``midstream stats``: counts and spreads, for people and for programs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from midstream.cli import main
from midstream.records.statistics import Numbers, percentile
from tests.records.trajectories import Scenario, by_code, drive


def stats(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["stats", *arguments])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    plain = drive(Scenario(["No code."]))
    worked = drive(Scenario(["A <code>rich</code> b <code>1 + 1</code> c"], by_code))
    records = [
        msgspec.structs.replace(plain, reward=0.0, sample=0, discarded=2),
        msgspec.structs.replace(plain, reward=None, sample=1, fit_for_training=False),
        msgspec.structs.replace(worked, reward=1.0, sample=2, duration=2.0),
    ]
    path = tmp_path / "r.jsonl"
    path.write_bytes(b"".join(record.encode() + b"\n" for record in records))
    return path


def test_everything_is_counted(file: Path) -> None:
    result = stats(str(file), "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    counted = json.loads(result.stdout)
    records = [json.loads(line) for line in file.read_text().splitlines()]
    ids = {
        origin: sum(len(s["ids"]) for record in records for s in record["segments"] if s["origin"] == origin)
        for origin in ("generated", "injected")
    }
    assert counted["tokens"] == {"prompt": sum(len(record["prompt_ids"]) for record in records), **ids}
    assert (counted["trajectories"], counted["prompts"]) == (3, 1)
    assert counted["discarded_tokens"] == sum(record["discarded"] for record in records) >= 2
    assert counted["unfit_for_training"] == 1
    assert counted["stopped"] == {"paused": 3}
    assert counted["errors"] == {"ZeroDivisionError": 1}
    assert counted["breached"] == {"memory": 1}
    assert counted["blocks"]["all"] == 2
    assert (counted["blocks"]["timed out"], counted["blocks"]["state lost"], counted["blocks"]["output cut"]) == (
        1,
        1,
        1,
    )
    assert counted["reward"]["count"] == 2
    assert (counted["reward"]["mean"], counted["reward"]["std"]) == (0.5, 0.5)
    assert counted["calls"] == {"count": 3, "mean": 2 / 3, "std": pytest.approx(math.sqrt(8 / 9)), "min": 0} | {
        "p50": 0, "p90": 2, "p99": 2, "max": 2,
    }  # fmt: skip
    assert counted["seconds"]["max"] == 2.0
    assert counted["tools"]["search"]["calls"] == 2
    assert counted["tools"]["search"]["errors"] == 1
    assert counted["tools"]["search"]["seconds"]["max"] == 0.2


def test_the_table_says_the_same(file: Path) -> None:
    shown = stats(str(file), str(file)).stdout
    for words in ("6 trajectories of 1 prompts", "paused 6", "ZeroDivisionError 2", "search", "p99"):
        assert words in shown


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text("")
    assert stats(str(tmp_path / "r.jsonl")).exit_code == 0
    counted = json.loads(stats(str(tmp_path / "r.jsonl"), "--json").stdout)
    assert (counted["trajectories"], counted["reward"]) == (0, {"count": 0})


def test_plots(file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert stats(str(file), "--plots", str(tmp_path / "plots")).exit_code == 0
    drawn = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert drawn == [
        "calls.png", "generated_tokens.png", "reward.png", "seconds_of_a_block.png", "seconds_of_a_trajectory.png",
    ]  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "plots").iterdir())
    (tmp_path / "taken").write_text("")
    for folder in (tmp_path / "taken", tmp_path / "taken" / "below"):
        refused = stats(str(tmp_path / "not looked at"), "--plots", str(folder))
        assert (refused.exit_code, "cannot be written (Not a directory)" in refused.stderr) == (2, True)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.sampled_from([1, 50, 90, 99, 100]))
def test_percentiles(values: list[float], share: int) -> None:
    found = percentile(sorted(values), share)
    assert found in values
    assert sum(value <= found for value in values) >= share / 100 * len(values)
    assert sum(value < found for value in values) < share / 100 * len(values)
    spread = Numbers(values).as_dict()
    assert spread["min"] == min(values)
    assert spread["max"] == max(values)
    assert spread["mean"] == pytest.approx(math.fsum(values) / len(values))
