"""What msgspec learns of classes it learns before threads meet over them: two that are first at once crash."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from midstream.records import RecordWriter
from tests.records.trajectories import Scenario, by_code, drive

LEARNT = """
import dataclasses, sys

def learns_nothing(work):
    learning = set()
    def watch(frame, _event, _argument):
        if "msgspec" in frame.f_code.co_filename:  # it has Python code for nothing else
            learning.add(frame.f_code.co_name)
    sys.setprofile(watch)
    work()
    sys.setprofile(None)
    assert not learning, learning
"""
RECORDS = """
from midstream.records import read_records
record = next(iter(read_records(sys.argv[1])))
learns_nothing(lambda: (record.trajectory, record.row_markup, record.row_limits, record.encode()))
"""
TOOLS = """
from midstream import ToolSet

@dataclasses.dataclass
class Inner:
    x: int

@dataclasses.dataclass
class Outer:
    inner: Inner
    more: list[Inner]

def take(outer: Outer) -> int:
    return outer.inner.x

interface = ToolSet([take])["take"].interface
bound = []
learns_nothing(lambda: bound.append(interface.bind(({"inner": {"x": 1}, "more": [{"x": 2}]},), {})))
assert bound[0].arguments["outer"] == Outer(Inner(1), [Inner(2)])
"""


@pytest.mark.parametrize("use", [RECORDS, TOOLS], ids=["records", "tools"])
def test_first_uses_learn_nothing(use: str, tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "rollouts.jsonl") as writer:
        writer.append(drive(Scenario(["Let <code>rich</code> be."], by_code)))
    program = [sys.executable, "-c", LEARNT + use, str(tmp_path / "rollouts.jsonl")]
    ran = subprocess.run(program, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
