"""Transcripts that a real model wrote, said again by the scripted engine, their code really run.

1,319 transcripts of ToRA-70B over the GSM8K test set (github.com/microsoft/ToRA, MIT). The scripted model
says each one without its ```` ```output ```` blocks; midstream finds the code, runs it in a sandboxed
session and puts the result in. A row agrees if its whole text is then the recorded one, to the character.

What was recorded is the last line that a program printed, or the last line of its traceback, so a row may
differ for reasons that are not faults; each one that does is listed with its :class:`Difference`.

    python -m benchmarks.transcripts [--tokenizers o200k qwen ...] [--json benchmarks/results/transcripts.json]
"""

from __future__ import annotations

import argparse
import enum
import json
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

import midstream as ms
from benchmarks import machine
from benchmarks.data import DataMissing, data_file
from tests.vocabularies import tokenizer

FILE = "tir_gsm8k_tora70b.jsonl"
TOKENIZERS = ("o200k", "qwen", "llama3", "tekken", "mistral3")
LIMITS = ms.SandboxLimits(wall_time=3.0)
"""One program never ends; it must not be what a pass takes its time from."""

_OUTPUT = re.compile(r"^```output\n(.*?)\n?```\n?", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"^```python\n", re.MULTILINE)


class Difference(enum.StrEnum):
    """Why what is injected may differ from what was recorded."""

    NOTHING_RECORDED = "nothing recorded: the transcript ends with its code"
    ERROR_DISPLAY = "an error, recorded as the last line of a traceback, shown as the exception's repr"
    TIME_LIMIT = "a time limit, recorded in another library's words"
    UNEXPLAINED = "unexplained"


@dataclass(frozen=True, slots=True)
class Transcript:
    """One recorded row. ``said`` is what the model wrote, cut where the recorded ``outputs`` stood."""

    index: int
    question: str
    text: str
    said: tuple[str, ...]
    outputs: tuple[str, ...]

    @classmethod
    def of(cls, index: int, question: str, text: str) -> Transcript:
        pieces = _OUTPUT.split(text)
        return cls(index, question, text, tuple(pieces[::2]), tuple(pieces[1::2]))

    @property
    def id(self) -> str:
        return f"gsm8k-test-{self.index}"

    @property
    def prompt(self) -> ms.Prompt:
        """In the form that the model was trained on."""
        return ms.Prompt(text=f"<|user|>\n{self.question}\n<|assistant|>\n", id=self.id)

    @property
    def blocks(self) -> int:
        return len(_CODE.findall("".join(self.said)))

    def speak(self, so_far: str) -> str:
        """What the model goes on to say behind ``so_far``, taking no notice of results that are still to come."""
        return "".join(self.said[len(_OUTPUT.findall(so_far)) :])


@dataclass(frozen=True, slots=True)
class Outcome:
    """A transcript and the trajectory that became of it. ``difference`` is None where they agree."""

    transcript: Transcript
    trajectory: ms.Trajectory
    difference: Difference | None

    @property
    def shown(self) -> tuple[str, ...]:
        return tuple(record.result.text for record in self.trajectory.calls if record.result is not None)


def load() -> list[Transcript]:
    """All transcripts, in their order. Raises :class:`~benchmarks.data.DataMissing` where the file is not there."""
    lines = data_file(FILE).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [Transcript.of(index, row["question"], row["transcript"]) for index, row in enumerate(rows)]


def replay(
    tokenizer: Any,
    transcripts: Sequence[Transcript],
    pool: ms.SandboxPool,
    *,
    markup: ms.Markup | None = ms.FENCED_PYTHON,
    open_rows: int = 64,
    tokens_per_step: int = 1,
) -> ms.TrajectoryBatch:
    """Have a scripted model say the transcripts, their code run in sessions of ``pool``."""
    said = [transcript.speak for transcript in transcripts]  # rows are opened in the order of their prompts
    engine = ms.ScriptedEngine(tokenizer, said, tokens_per_step=tokens_per_step)
    with ms.Generator(engine, markup=markup, pool=pool, max_open_rows=open_rows) as generator:
        return generator.generate([transcript.prompt for transcript in transcripts])


def compare(tokenizer: Any, transcripts: Sequence[Transcript], batch: Sequence[ms.Trajectory]) -> list[Outcome]:
    """Each transcript beside its trajectory, with why they differ if they do."""
    vocabulary = ms.Vocabulary.of(tokenizer)
    return [
        Outcome(transcript, trajectory, difference(transcript, trajectory, text_before_eos(vocabulary, trajectory)))
        for transcript, trajectory in zip(transcripts, batch, strict=True)
    ]


def text_before_eos(vocabulary: ms.Vocabulary, trajectory: ms.Trajectory) -> str:
    """What stands after the prompt, without the end-of-sequence id, which a trajectory's text shows too."""
    if trajectory.stop.kind is not ms.StopKind.END_OF_SEQUENCE:
        return trajectory.text
    return trajectory.text.removesuffix(vocabulary.piece(int(trajectory.stop.detail)).decode())


def difference(transcript: Transcript, trajectory: ms.Trajectory, text: str) -> Difference | None:
    """Why ``text``, a trajectory's, is not the recorded one, or None where it is, to the character."""
    if text == transcript.text:
        return None
    results = [record.result for record in trajectory.calls if record.result is not None]
    if len(results) != transcript.blocks:
        return Difference.UNEXPLAINED
    if len(transcript.outputs) < len(results) and text.startswith(transcript.text):
        return Difference.NOTHING_RECORDED
    for result, recorded in zip(results, transcript.outputs, strict=False):
        if result.text == recorded:
            continue
        if result.timed_out and "TimeoutError" in recorded:
            return Difference.TIME_LIMIT
        if result.error is not None and result.error.traceback.rstrip().endswith(recorded):
            return Difference.ERROR_DISPLAY
        return Difference.UNEXPLAINED
    return Difference.UNEXPLAINED


# --- the benchmark


@dataclass(frozen=True, slots=True)
class Measurement:
    """One pass over all transcripts. ``seconds`` are of generation with its code, not of the checks after it.

    ``processor_seconds``: what this process took of them, its threads together, without the sandboxes.
    ``seconds_without_code``: the same model saying the same, with no markup: what is left is the driving.
    ``certified``: rows with which the certificate finds nothing wrong. ``closed_inside_a_token``: blocks
    whose last token goes on behind the fence. ``load``: the machine's in the last minute of the pass.
    """

    tokenizer: str
    rows: int
    agree: int
    certified: int
    calls: int
    generated_tokens: int
    injected_tokens: int
    closed_inside_a_token: int
    seconds: float
    processor_seconds: float
    seconds_without_code: float
    rows_per_second: float
    calls_per_second: float
    tokens_per_second: float
    load: float


def measure(
    name: str, tokenizer: Any, transcripts: Sequence[Transcript], pool: ms.SandboxPool, open_rows: int
) -> tuple[Measurement, list[Outcome]]:
    replay(tokenizer, transcripts[:8], pool)  # the first rows pay for what is made once
    start = time.perf_counter()
    replay(tokenizer, transcripts, pool, markup=None, open_rows=open_rows)
    between, processor = time.perf_counter(), time.process_time()
    batch = replay(tokenizer, transcripts, pool, open_rows=open_rows)
    seconds, processor = time.perf_counter() - between, time.process_time() - processor
    busy = machine.load()
    outcomes = compare(tokenizer, transcripts, batch)
    calls = [record for trajectory in batch for record in trajectory.calls]
    counts = Counter[str]()
    for trajectory in batch:
        for segment in trajectory.segments:
            counts[segment.origin] += len(segment.ids)
    measured = Measurement(
        tokenizer=name,
        rows=len(batch),
        agree=sum(outcome.difference is None for outcome in outcomes),
        certified=sum(not violations for violations in batch.verify()),
        calls=len(calls),
        generated_tokens=counts["generated"],
        injected_tokens=counts["injected"],
        closed_inside_a_token=sum(record.call.lookahead != "" for record in calls),
        seconds=round(seconds, 2),
        processor_seconds=round(processor, 2),
        seconds_without_code=round(between - start, 2),
        rows_per_second=round(len(batch) / seconds, 1),
        calls_per_second=round(len(calls) / seconds, 1),
        tokens_per_second=round(counts["generated"] / seconds),
        load=busy,
    )
    return measured, outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizers", nargs="+", default=list(TOKENIZERS), metavar="NAME")
    parser.add_argument("--open-rows", type=int, default=64, help="rows generated at a time")
    parser.add_argument("--json", type=Path, help="where the numbers go")
    options = parser.parse_args()
    try:
        transcripts = load()
    except DataMissing as missing:
        print(f"skipped: {missing}")
        return
    measurements: list[Measurement] = []
    differing: dict[str, list[Outcome]] = {}
    with ms.SandboxPool(limits=LIMITS) as pool:
        for name in options.tokenizers:
            try:
                loaded = tokenizer(name)
            except pytest.skip.Exception as missing:
                print(f"{name} skipped: {missing}")
                continue
            measured, outcomes = measure(name, loaded, transcripts, pool, options.open_rows)
            measurements.append(measured)
            for outcome in outcomes:
                if outcome.difference is not None:
                    differing.setdefault(outcome.transcript.id, []).append(outcome)
        level = pool.report.level
    if options.json is not None:
        record = {
            "benchmark": "transcripts",
            "data": f"{FILE}, {len(transcripts)} rows",
            "machine": machine.description(),
            "versions": {name: version(name) for name in ("midstream", "numpy", "sympy")},
            "isolation": level,
            "wall_time_limit": LIMITS.wall_time,
            "open_rows": options.open_rows,
            "measurements": [asdict(measured) for measured in measurements],
            "differences": [described(outcomes) for outcomes in differing.values()],
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    report(measurements, differing)


def described(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """A row that differs, with what was recorded and what was shown; the tokenizer makes no difference there."""
    first = outcomes[0]
    return {
        "row": first.transcript.id,
        "difference": first.difference,
        "recorded": list(first.transcript.outputs),
        "shown": list(first.shown),
        "tokenizers": len(outcomes),
    }


def report(measurements: Sequence[Measurement], differing: dict[str, list[Outcome]]) -> None:
    table = Table(title="Recorded transcripts, their code run again")
    for heading in ("vocabulary", "agree", "certified", "s", "s, no code", "rows/s", "tokens/s"):
        table.add_column(heading, justify="left" if heading == "vocabulary" else "right")
    for one in measurements:
        agree, certified = (f"{count}/{one.rows}" for count in (one.agree, one.certified))
        times = (f"{one.seconds:.1f}", f"{one.seconds_without_code:.1f}", f"{one.rows_per_second:.1f}")
        table.add_row(one.tokenizer, agree, certified, *times, f"{one.tokens_per_second:,.0f}")
    rows = Table("row", "difference", "recorded", "shown", title="Rows that differ")
    for name, outcomes in differing.items():
        first = outcomes[0]
        rows.add_row(name, first.difference, "\n".join(first.transcript.outputs), "\n".join(first.shown))
    console = Console()
    console.print(table)
    console.print(rows)


if __name__ == "__main__":
    main()
