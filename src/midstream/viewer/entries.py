"""What the page is told of each record: a line for the list, and everything else for when it is opened."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import msgspec

from midstream.records import Record, Violation

EXCERPT = 200
"""Characters of a prompt's end that the list shows and searches."""

SUMMARY_COLUMNS = (
    "id", "group", "sample", "reward", "prompt", "generated", "injected", "calls", "errors", "toolCalls",
    "stop", "seconds", "violations", "excerpt",
)  # fmt: skip


def summary(record: Record, violations: Sequence[Violation]) -> list[Any]:
    """The record's line, in the order of :data:`SUMMARY_COLUMNS`."""
    generated, injected = _lengths(record)
    results = [entry.result for entry in record.calls if entry.result is not None]
    return [
        record.prompt.id,
        _group(record),
        record.sample,
        record.reward,
        len(record.prompt_ids),
        generated,
        injected,
        len(record.calls),
        sum(result.error is not None for result in results),
        sum(len(result.tool_calls) for result in results),
        record.stop.kind,
        round(record.duration, 6),
        len(violations),
        _excerpt(_question(record)),
    ]


def detail(record: Record, violations: Sequence[Violation]) -> dict[str, Any]:
    """All that is shown of an opened rollout.

    ``texts[i]`` is what token ``i`` adds to the text: nothing while it leaves a character unfinished.
    ``origins`` and ``versions`` are runs ``[what, length]``; ``logprobs`` are those of generated ids, in order.
    """
    ids = [*record.prompt_ids, *(i for segment in record.segments for i in segment.ids)]
    origins = [("prompt", len(record.prompt_ids)), *((part.origin, len(part.ids)) for part in record.segments)]
    generated = [segment for segment in record.segments if segment.origin == "generated"]
    versions = groupby(version for segment in generated for version in segment.weight_versions)
    return {
        "id": record.prompt.id,
        "group": _group(record),
        "sample": record.sample,
        "reward": record.reward,
        "ids": ids,
        "texts": _texts(record, ids),
        "origins": origins,
        "logprobs": [round(logprob, 5) for segment in generated for logprob in segment.logprobs],
        "versions": [(version, len(list(run))) for version, run in versions],
        "calls": [msgspec.to_builtins(entry) for entry in record.calls],
        "violations": [str(violation) for violation in violations],
        "facts": _facts(record),
        "duration": record.duration,
    }


def _facts(record: Record) -> dict[str, Any]:
    """What stands in the table over the text: names to values that JSON can hold."""
    sampling = msgspec.to_builtins(record.sampling)
    limits = msgspec.to_builtins(record.limits)
    facts: dict[str, Any] = {
        "stopped": f"{record.stop.kind}: {record.stop.detail}" if record.stop.detail else record.stop.kind,
        "reward error": record.reward_error,
        "seed": record.seed,
        "sampling": ", ".join(f"{name}={value:g}" for name, value in sampling.items()),
        "limits": ", ".join(f"{name}={value}" for name, value in limits.items() if value not in (None, [], False)),
        "logprobs": record.logprob_kind,
        "fit for training": "yes" if record.fit_for_training else "no: text only",
        "discarded ids": record.discarded,
        "metadata": record.prompt.metadata,
        **{f"provenance: {name}": value for name, value in record.provenance.items()},
    }
    return {name: value for name, value in facts.items() if value not in ("", {}, [], None)}


def _lengths(record: Record) -> tuple[int, int]:
    generated = sum(len(segment.ids) for segment in record.segments if segment.origin == "generated")
    return generated, sum(len(segment.ids) for segment in record.segments) - generated


def _group(record: Record) -> str:
    """What samples of one prompt have in common, also where nobody named it."""
    return record.prompt.group or record.prompt.id or record.prompt_text


def _question(record: Record) -> str:
    if record.prompt.messages:
        return record.prompt.messages[-1].content
    return record.prompt.text or record.prompt_text


def _excerpt(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= EXCERPT else f"…{line[-EXCERPT:]}"


def _texts(record: Record, ids: Iterable[int]) -> list[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = [decoder.decode(record.piece(token_id) or b"") for token_id in ids]
    rest = decoder.decode(b"", final=True)
    if texts and rest:
        texts[-1] += rest
    return texts
