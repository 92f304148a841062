"""Where data sets are looked for, and what is said where one is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.data import DataMissing, data_file


def test_a_missing_file_is_named_with_the_folder_and_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIDSTREAM_DATA", str(tmp_path))
    with pytest.raises(DataMissing) as told:
        data_file("some.jsonl")
    assert str(told.value) == f"some.jsonl is not in {tmp_path} (MIDSTREAM_DATA names the folder)"


def test_the_variable_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some.jsonl").touch()
    monkeypatch.setenv("MIDSTREAM_DATA", str(tmp_path))
    assert data_file("some.jsonl") == tmp_path / "some.jsonl"
