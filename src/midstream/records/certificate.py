"""Checks a trajectory from its record alone: is this what the rules of generation allow?

The rules are those of docs/semantics.md. Nothing is needed but the record: no tokenizer, no model, no
sandbox. What cannot be seen without them (that the tokenizer would encode a result into these very ids, that
the model gave an id this logprob) is not claimed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import zip_longest

from midstream.errors import RecordError
from midstream.markup import Markup
from midstream.records.block_rules import BlockRules
from midstream.records.reference import decode, read_generated
from midstream.records.schema import Record
from midstream.records.violations import Violation, starts

LOGPROB_TOLERANCE = 1e-3
"""How far over 0 rounding may take a logprob."""

INJECTED_VERSION = -1


def verify(record: Record) -> list[Violation]:
    """Every rule that the record breaks, in the order in which they are looked at; none for a sound one."""
    violations = [*_shape(record), *_numbers(record), *_prompt(record)]
    unreadable = [*_pieces(record), *_rules(record)]
    violations += unreadable
    if unreadable:  # what follows would be noise
        return violations
    markup = record.row_markup
    violations += [*_texts(record), *_special_ids(record, markup)]
    reading = read_generated(record, markup)
    violations += BlockRules(record, markup, reading).check()
    return violations


def _shape(record: Record) -> Iterator[Violation]:
    bits = [0] * len(record.prompt_ids)
    before = "injected"
    for position, segment in starts(record):
        count = len(segment.ids)
        bits += [int(segment.origin == "generated")] * count
        for name in ("logprobs", "weight_versions"):
            other = len(getattr(segment, name))
            if other != count:
                yield Violation("lengths", f"a segment has {count} ids and {other} {name}", position)
        if count == 0:
            yield Violation("segments", "a segment is empty", position)
        if segment.origin == before:
            what = "the first segment is injected" if position == len(record.prompt_ids) else f"two {before} in a row"
            yield Violation("segments", f"generated and injected segments must alternate: {what}", position)
        before = segment.origin
    if record.total_length != len(bits):
        yield Violation("lengths", f"total_length is {record.total_length} and there are {len(bits)} ids")
    mask: list[int] = []
    for bit, length in record.mask:
        if length < 1:
            yield Violation("mask", f"a run of the mask has length {length}, it must be at least 1")
            return
        mask += [bit] * min(length, len(bits) + 1)
        if len(mask) > len(bits):
            break
    if mask != bits:
        pairs = zip_longest(mask, bits)
        wrong = next(index for index, (said, meant) in enumerate(pairs) if said != meant)
        yield Violation("mask", "the mask is not 1 on generated ids and 0 elsewhere", wrong)


def _numbers(record: Record) -> Iterator[Violation]:
    for position, segment in starts(record):
        injected = segment.origin == "injected"
        for index, logprob in enumerate(segment.logprobs, start=position):
            if injected and logprob != 0.0:
                yield Violation("logprobs", f"an injected id has logprob {logprob}, it must be 0.0", index)
            elif not math.isfinite(logprob) or logprob > LOGPROB_TOLERANCE:
                yield Violation("logprobs", f"logprob {logprob} must be finite and not over 0", index)
        for index, version in enumerate(segment.weight_versions, start=position):
            if (version != INJECTED_VERSION) if injected else (version < 0):
                yield Violation("versions", f"an {segment.origin} id has weight version {version}", index)
    for name in ("sample", "discarded", "duration"):
        value = getattr(record, name)
        if value < 0:
            yield Violation("numbers", f"{name} is {value}, it must not be negative")
    at = len(record.prompt_ids)
    for point in record.lineage:
        if point.sample < 0 or not at <= point.length <= record.total_length:
            message = f"forked from sample {point.sample} at length {point.length}: lengths rise from {at} to the row's"
            yield Violation("lineage", message)
        at = max(at, point.length)
    at = len(record.prompt_ids)
    for change in record.weight_changes:
        if change.version < 0 or not at <= change.length <= record.total_length:
            message = f"weights {change.version} at length {change.length}: lengths rise from {at} to the row's"
            yield Violation("versions", message)
        at = max(at, change.length)
    if record.discarded and not record.segments:
        yield Violation("numbers", f"discarded is {record.discarded} and nothing was generated")


def _prompt(record: Record) -> Iterator[Violation]:
    if not record.prompt_ids:
        yield Violation("prompt", "the prompt has no ids")
    if record.prompt.ids is not None and record.prompt.ids != record.prompt_ids:
        yield Violation("prompt", "the prompt's ids are not those that the caller gave")
    if record.prompt.limits is not None and record.prompt.limits != record.limits:
        yield Violation("prompt", "the row's limits are not the prompt's own")
    starts = [] if record.markup is None else [form.start for form in (record.markup, *record.markup.others)]
    if record.prompt.open_block and not any(start in record.prompt_text for start in starts):
        yield Violation("prompt", "the prompt is said to end inside a block and holds no start tag")


def _pieces(record: Record) -> Iterator[Violation]:
    seen: set[int] = set()
    for position, ids in [(0, record.prompt_ids), *((at, segment.ids) for at, segment in starts(record))]:
        for index, token_id in enumerate(ids, start=position):
            if token_id not in seen and record.piece(token_id) is None:
                yield Violation("pieces", f"the record has no bytes for id {token_id}", index)
            seen.add(token_id)
    for token_id in sorted((record.pieces.keys() | record.partial_pieces.keys()) - seen):
        yield Violation("pieces", f"the record has bytes for id {token_id}, which does not occur")
    for token_id in sorted(record.pieces.keys() & record.partial_pieces.keys()):
        yield Violation("pieces", f"the record has bytes for id {token_id} twice")


def _rules(record: Record) -> Iterator[Violation]:
    for name in ("row_markup", "row_limits", "trajectory"):
        try:
            getattr(record, name)
        except RecordError as error:
            if name != "trajectory":  # that one's faults are told better above
                yield Violation(name.removeprefix("row_"), str(error))


def _decoded(record: Record, ids: Sequence[int]) -> str:
    return decode([record.piece(token_id) or b"" for token_id in ids])


def _texts(record: Record) -> Iterator[Violation]:
    if _decoded(record, record.prompt_ids) != record.prompt_text:
        yield Violation("text", "the prompt's ids do not decode to the recorded text", 0)
    for position, segment in starts(record):
        if _decoded(record, segment.ids) != segment.text:
            yield Violation("text", f"the ids of this {segment.origin} segment do not decode to its text", position)


def _special_ids(record: Record, markup: Markup | None) -> Iterator[Violation]:
    meant = set() if markup is None else set(markup.special_texts)
    special = set(record.special_ids)
    for position, segment in starts(record):
        if segment.origin == "generated":
            continue
        for index, token_id in enumerate(segment.ids, start=position):
            if token_id in special and record.pieces.get(token_id) not in meant:
                text = record.pieces.get(token_id)
                yield Violation("special", f"a result holds the special token {text!r} ({token_id}) as its id", index)
