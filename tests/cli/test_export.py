"""``midstream export``: a table that other programs read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from midstream.cli import main
from midstream.records import Record, read_records
from midstream.records.table import write_table
from tests.records.trajectories import RICH_RESULT, Scenario, by_code, drive

parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")


def export(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["export", *arguments])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    plain = drive(Scenario(["Grüße 你好."], by_code))
    rich = drive(Scenario(["A <code>rich</code> b <code>1 + 1</code> c"], by_code, versions=(0, 3)))
    records = [plain, msgspec.structs.replace(rich, sample=0, reward=None), rich]
    path = tmp_path / "r.jsonl"
    path.write_bytes(b"".join(record.encode() + b"\n" for record in records))
    return path


def test_a_row_has_all_of_its_record(file: Path, tmp_path: Path) -> None:
    result = export(str(file), "-o", str(tmp_path / "t.parquet"))
    assert (result.exit_code, result.stderr) == (0, "")
    rows = parquet.read_table(tmp_path / "t.parquet").to_pylist()
    for row, record in zip(rows, read_records(file), strict=True):
        trajectory = record.trajectory
        assert row["ids"] == trajectory.ids
        assert row["mask"] == trajectory.mask
        assert row["logprobs"] == pytest.approx(trajectory.logprobs, rel=1e-6)
        assert row["weight_versions"] == trajectory.weight_versions
        assert row["prompt_length"] == len(trajectory.prompt_ids)
        assert (row["prompt_text"], row["text"]) == (record.prompt_text, trajectory.text)
        assert (row["prompt_id"], row["group"], row["sample"]) == ("p", "p", record.sample)
        assert (int(row["seed"]), row["reward"]) == (record.seed, record.reward)
        assert (row["stop_kind"], row["duration"]) == ("paused", record.duration)
        assert json.loads(row["sampling"])["temperature"] == 0.7
        assert json.loads(row["provenance"]) == record.provenance
        assert [block["code"] for block in row["blocks"]] == [entry.call.code for entry in record.calls]
    blocks = rows[2]["blocks"]
    assert [block["error"] for block in blocks] == ["ZeroDivisionError", None]
    assert [image["bytes"] for image in blocks[0]["images"]] == [each.data for each in RICH_RESULT.media]
    assert [call["name"] for call in json.loads(blocks[0]["tool_calls"])] == ["search", "search"]


def test_the_name_is_the_files(file: Path) -> None:
    assert export(str(file)).exit_code == 0
    assert file.with_suffix(".parquet").exists()
    refused = export(str(file), "-o", str(file))
    assert (refused.exit_code, "is one of the files to read" in refused.stderr) == (2, True)


def test_many_rows_are_written_in_groups(file: Path, tmp_path: Path) -> None:
    records = list(read_records(file)) * 1000
    assert write_table(iter(records), tmp_path / "t.parquet") == 3000
    read = parquet.ParquetFile(tmp_path / "t.parquet")
    assert (read.metadata.num_rows, read.metadata.num_row_groups) == (3000, 3)
    assert read.schema_arrow.metadata[b"midstream.schema"] == b"1"


def test_a_failure_leaves_what_was_there(file: Path, tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_text("old")

    def failing() -> Iterator[Record]:
        yield from read_records(file)
        raise KeyError

    with pytest.raises(KeyError):
        write_table(failing(), tmp_path / "t.parquet")
    assert (tmp_path / "t.parquet").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["r.jsonl", "t.parquet"]


def test_no_records_are_a_table_without_rows(tmp_path: Path) -> None:
    assert write_table([], tmp_path / "t.parquet") == 0
    assert parquet.read_table(tmp_path / "t.parquet").num_rows == 0
