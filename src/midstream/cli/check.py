"""``midstream check``: is every trajectory of a file what the rules of generation allow, and what its model says?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import click

from midstream.cli.frame import WRONG, command
from midstream.cli.model import load_model, open_model
from midstream.cli.options import check_readable
from midstream.errors import ConfigurationError, RecordError
from midstream.records import Record, Violation, read_records, verify
from midstream.records.store import Key
from midstream.verifying import compare_with_model, verify_with_tokenizer

_AT_A_TIME = 64
"""Records that are held against a model together."""


@dataclass(frozen=True, slots=True)
class _Model:
    """What records are held against."""

    model: Any
    tokenizer: Any
    tolerance: float | None
    weight_version: int | None


@command("check")
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path())
@click.option("--model", default=None, metavar="PATH", help="The model that sampled: compare logprobs with it.")
@click.option("--tolerance", type=float, default=None, help="Of logprobs.  [default: 0.001; 0.25 in half precision]")
@click.option("--weight-version", type=int, default=None, help="Compare only ids of these weights.  [default: all]")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Of the weights; auto is the checkpoint's own.",
)
@click.option("--device", default=None, help="Such as cpu or cuda:1.  [default: CUDA where there is one]")
def check_command(
    files: tuple[str, ...],
    model: str | None,
    tolerance: float | None,
    weight_version: int | None,
    dtype: str,
    device: str | None,
) -> int:
    """Verify every trajectory of FILE..., from the records alone.

    Segments join, lengths agree, the mask matches the segments, ids decode to the recorded text, each result
    follows its block and is what the block showed, and the row stopped for a reason that fits. Neither model
    nor tokenizer is needed. Each violation is a line with the file, the line, the prompt, the sample, the rule
    and the place; then there is a summary for each file.

    With --model, ids are also held against its tokenizer, and the logprob of every generated id against what the
    model gives it when it reads the row at once: the first that differs is told, with both.

    \b
    Examples:
      midstream check rollouts.jsonl
      midstream check --model ./model runs/*.jsonl
    """
    if model is None and (tolerance, weight_version, dtype, device) != (None, None, "auto", None):
        raise ConfigurationError("--tolerance, --weight-version, --dtype and --device are of a model; give --model too")
    if tolerance is not None and not 0 <= tolerance < float("inf"):
        raise ConfigurationError(f"--tolerance {tolerance:g}: must be a number of at least 0")
    for name in files:
        check_readable(name)
    against = None
    if model is not None:
        opened = open_model(model, dtype, device)
        against = _Model(load_model(opened), opened.tokenizer, tolerance, weight_version)
    found = [_check_file(name, against) for name in files]
    empty = [name for name, (trajectories, _) in zip(files, found, strict=True) if not trajectories]
    if empty:  # nothing was found to be sound
        raise RecordError(f"{', '.join(empty)}: no trajectory is in it; give a file of records that holds some")
    return WRONG if any(wrong for _, wrong in found) else 0


def _check_file(name: str, against: _Model | None) -> tuple[int, int]:
    """How many trajectories a file has, and how many of them are wrong."""
    counts: Counter[str] = Counter()
    wrong = 0
    worst = 0.0
    lines: dict[Key, int] = {}
    numbered = enumerate(read_records(name), start=1)
    while batch := list(islice(numbered, 1 if against is None else _AT_A_TIME)):
        compared = _compared([record for _, record in batch], against)
        for (number, record), (more, ids, left_out, difference, reason) in zip(batch, compared, strict=True):
            prompt = "a prompt without id" if record.prompt.id is None else f"prompt {record.prompt.id!r}"
            place = f"{name}:{number}: {prompt} sample {record.sample}"
            violations = [*verify(record), *_doubled(record, number, lines), *more]
            for violation in violations:
                click.echo(f"{place}: {violation}")
            if reason:
                click.echo(f"{place}: not compared with the model: {reason}")
            wrong += bool(violations)
            worst = max(worst, difference)
            counts["compared"] += ids
            counts["left out"] += left_out
            counts["trajectories"] += 1
            counts["unfit"] += not record.fit_for_training
            counts["calls"] += len(record.calls)
            for segment in record.segments:
                counts[segment.origin] += len(segment.ids)
    if counts["trajectories"]:
        click.echo(_summary(name, counts, wrong, worst if against is not None else None))
    return counts["trajectories"], wrong


def _compared(records: list[Record], against: _Model | None) -> Iterable[tuple[list[Violation], int, int, float, str]]:
    """For each record what is wrong with it beside the model, how many ids were compared and left out, their worst
    difference, and why there were none."""
    if against is None:
        return [([], 0, 0, 0.0, "")] * len(records)
    comparisons = compare_with_model(
        records, against.model, tolerance=against.tolerance, weight_version=against.weight_version
    )
    return [
        (
            [*verify_with_tokenizer(record, against.tokenizer), *one.violations],
            one.compared,
            one.left_out,
            one.worst,
            one.reason,
        )
        for record, one in zip(records, comparisons, strict=True)
    ]


def _summary(name: str, counts: Counter[str], wrong: int, worst: float | None) -> str:
    verdict = f"{wrong} wrong" if wrong else "all sound"
    if counts["unfit"]:
        verdict += f", {counts['unfit']:,} not fit for training"
    text = (
        f"{name}: {_count(counts['trajectories'], 'trajectory', 'trajectories')}, {verdict} "
        f"({counts['generated']:,} ids generated, {counts['injected']:,} injected, "
        f"{_count(counts['calls'], 'call', 'calls')})"
    )
    if worst is not None:
        text += f"; {counts['compared']:,} logprobs compared with the model, {worst:.2g} apart at most"
    if counts["left out"]:
        text += f"; {counts['left out']:,} left out, sampled over what older weights had computed"
    return text


def _doubled(record: Record, number: int, lines: dict[Key, int]) -> list[Violation]:
    if record.prompt.id is None:
        return []
    first = lines.setdefault(record.key, number)
    return [] if first == number else [Violation("unique", f"the same prompt and sample as line {first}")]


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"
