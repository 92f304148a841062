"""1,319 transcripts of a real model: its code found, run and answered as it was when they were recorded."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import midstream as ms
from benchmarks.transcripts import LIMITS, Difference, Outcome, Transcript, compare, replay
from midstream.records import read_records, verify
from tests.vocabularies import tokenizer

KNOWN: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("known_differences.json").read_text())
"""Every row that may differ from what was recorded, and why."""

ENDLESS = "gsm8k-test-881"
"""The row whose code takes all the time it is given."""

MAIN = "o200k"


@pytest.fixture(scope="module")
def batch(recorded: list[Transcript], pool: ms.SandboxPool) -> ms.TrajectoryBatch:
    """All rows, many at a time."""
    return replay(tokenizer(MAIN), recorded, pool)


@pytest.fixture(scope="module")
def outcomes(recorded: list[Transcript], batch: ms.TrajectoryBatch) -> list[Outcome]:
    return compare(tokenizer(MAIN), recorded, batch)


@pytest.fixture(scope="module")
def sample(recorded: list[Transcript]) -> list[Transcript]:
    """Every eleventh row, those that differ, and those with characters that some vocabularies have only as bytes."""
    chosen = [row for row in recorded if row.index % 11 == 0 or row.id in KNOWN or not row.text.isascii()]
    return [row for row in chosen if row.id != ENDLESS]


def without_times(trajectory: ms.Trajectory) -> ms.Trajectory:
    """A trajectory without what the clock says, which is all that two runs may differ in."""
    calls = tuple(
        replace(record, result=record.result and replace(record.result, duration=0.0, cpu_time=None))
        for record in trajectory.calls
    )
    return replace(trajectory, calls=calls, duration=0.0)


def differing(outcomes: Sequence[Outcome]) -> dict[str, str]:
    return {outcome.transcript.id: outcome.difference.name for outcome in outcomes if outcome.difference is not None}


def test_every_row_is_as_recorded_but_those_that_are_known_to_differ(outcomes: list[Outcome]) -> None:
    assert len(outcomes) == 1319
    assert differing(outcomes) == {name: entry["difference"] for name, entry in KNOWN.items()}
    by_id = {outcome.transcript.id: outcome for outcome in outcomes}
    for name, entry in KNOWN.items():
        assert list(by_id[name].transcript.outputs) == entry["recorded"]
        for shown, beginning in zip(by_id[name].shown, entry["shown_begins"], strict=True):
            assert shown.startswith(beginning)


def test_what_is_injected_is_the_recorded_output_in_its_fence(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        if outcome.difference is not None:
            continue
        (record,) = outcome.trajectory.calls
        (injected,) = (segment for segment in outcome.trajectory.segments if segment.origin == "injected")
        assert outcome.shown == outcome.transcript.outputs
        assert record.call.lookahead + injected.text == f"\n```output\n{outcome.transcript.outputs[0]}\n```\n"
        assert outcome.transcript.said[0] == f"```python\n{record.call.code}```\n"


def test_every_row_ends_as_the_model_ended_it(batch: ms.TrajectoryBatch) -> None:
    assert {trajectory.stop.kind for trajectory in batch} == {ms.StopKind.END_OF_SEQUENCE}


def test_every_trajectory_passes_the_certificate_from_its_record_alone(
    batch: ms.TrajectoryBatch, tmp_path: Path
) -> None:
    batch.save(tmp_path / "transcripts.jsonl")
    violations = [verify(record) for record in read_records(tmp_path / "transcripts.jsonl")]
    assert violations == [[] for _ in batch]


def test_an_output_that_is_not_the_recorded_one_is_not_explained_away(outcomes: list[Outcome]) -> None:
    wrong = []
    for outcome in outcomes[:20]:
        said = outcome.transcript.text.replace("```output\n", "```output\n1")
        wrong.append(Transcript.of(outcome.transcript.index, outcome.transcript.question, said))
    found = compare(tokenizer(MAIN), wrong, [outcome.trajectory for outcome in outcomes[:20]])
    assert {outcome.difference for outcome in found} == {Difference.UNEXPLAINED}


@pytest.mark.parametrize("name", ["qwen", "llama3", "tekken", "mistral3"])
def test_other_vocabularies_agree_as_well(name: str, sample: list[Transcript], pool: ms.SandboxPool) -> None:
    batch = replay(tokenizer(name), sample, pool)
    assert differing(compare(tokenizer(name), sample, batch)) == {
        row.id: KNOWN[row.id]["difference"] for row in sample if row.id in KNOWN
    }
    assert batch.verify() == [[] for _ in sample]
    lookaheads = {record.call.lookahead for trajectory in batch for record in trajectory.calls}
    assert lookaheads <= {"", "\n"}
    assert ("\n" in lookaheads) is (name != "mistral3")  # which alone has no token for a fence and its newline


def test_a_row_alone_is_what_it_is_in_the_batch(
    recorded: list[Transcript], batch: ms.TrajectoryBatch, pool: ms.SandboxPool
) -> None:
    for row in [row for row in recorded if row.index % 60 == 7 and row.id != ENDLESS]:
        (alone,) = replay(tokenizer(MAIN), [row], pool, open_rows=1)
        assert without_times(alone) == without_times(batch[row.index])


def test_order_and_company_change_nothing(
    sample: list[Transcript], batch: ms.TrajectoryBatch, pool: ms.SandboxPool
) -> None:
    shuffled = random.Random(5).sample(sample, len(sample))
    for row, trajectory in zip(shuffled, replay(tokenizer(MAIN), shuffled, pool, open_rows=7), strict=True):
        assert without_times(trajectory) == without_times(batch[row.index])


def test_ids_beyond_a_block_that_an_engine_returns_change_nothing(
    sample: list[Transcript], batch: ms.TrajectoryBatch, pool: ms.SandboxPool
) -> None:
    overshot = replay(tokenizer(MAIN), sample, pool, tokens_per_step=7)
    assert sum(trajectory.discarded for trajectory in overshot) > len(sample)
    for row, trajectory in zip(sample, overshot, strict=True):
        assert without_times(replace(trajectory, discarded=0)) == without_times(batch[row.index])


def test_an_error_shown_as_a_traceback_ends_as_it_was_recorded(recorded: list[Transcript]) -> None:
    row = recorded[587]
    with ms.SandboxPool(limits=LIMITS, error_style="traceback") as pool:
        (trajectory,) = replay(tokenizer(MAIN), [row], pool)
    (record,) = trajectory.calls
    assert record.result is not None
    assert record.result.text.splitlines()[-1:] == list(row.outputs)


# --- no row disturbs another

_PLANT = """\
import builtins, os, sys
{name} = builtins.{name} = sys.{name} = os.environ["{name}"] = "{name}"
open("{name}", "w").close()
"""
_LOOK = """\
import builtins, os, sys
where = {{"globals": globals(), "builtins": vars(builtins), "sys": vars(sys), "environment": os.environ}}
where["files"] = os.listdir(".")
for place, names in where.items():
    print(place, *sorted(name for name in names if name.startswith("canary_")))
"""
PLACES = ("globals", "builtins", "sys", "environment", "files")


def with_canary(row: Transcript) -> Transcript:
    """The same row with a block before its own that leaves a name of its own in many places, and one that looks."""
    name = f"canary_{row.index}"
    first = f"```python\n{_PLANT.format(name=name)}```\n"
    last = f"\n```python\n{_LOOK.format()}```\n"
    seen = "\n".join(f"{place} {name}" for place in PLACES)
    return Transcript.of(row.index, row.question, f"{first}{row.text}{last}```output\n{seen}\n```\nThat is all.")


def test_no_row_sees_anything_of_another(recorded: list[Transcript], pool: ms.SandboxPool) -> None:
    rows = [with_canary(row) for row in recorded if row.index % 4 == 1 and row.id not in KNOWN]
    batch = replay(tokenizer(MAIN), rows, pool)
    assert {len(trajectory.calls) for trajectory in batch} == {3}
    assert differing(compare(tokenizer(MAIN), rows, batch)) == {}
    assert batch.verify() == [[] for _ in rows]
