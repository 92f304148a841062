"""What is wrong with a record, and where."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from midstream.records.entries import SegmentEntry
from midstream.records.schema import Record


@dataclass(frozen=True, slots=True)
class Violation:
    """A rule that a record breaks. ``position`` is the index of the id (from 0, the prompt's included), or None."""

    rule: str
    message: str
    position: int | None = None

    def __str__(self) -> str:
        place = "" if self.position is None else f" at id {self.position}"
        return f"{self.rule}{place}: {self.message}"


def starts(record: Record) -> Iterator[tuple[int, SegmentEntry]]:
    """The segments, each with the index of its first id."""
    position = len(record.prompt_ids)
    for segment in record.segments:
        yield position, segment
        position += len(segment.ids)
