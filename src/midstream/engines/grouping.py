"""Which chunks of a pass make a batch: where rows have different lengths, padding and idle rows are work as well.

- :func:`padded_groups`: few batches, at the price of some padding. What a launch costs counts for more than what is
  computed in vain.
- :func:`runs`: as many batches as it takes to read nothing in vain, where attention is computed batch by batch within
  one pass (:mod:`midstream.engines.packing`). On processors, reading what rows hold is most of what decoding costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_LARGEST_PADDED_SHARE = 1.25

LEAST_FRESH = 64
"""Ids. As many at the beginning of a row are worth a pass of their own, in which they see themselves alone."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """``ids`` (at least one) that stand in the row at ``place`` from position ``start`` on."""

    place: int
    start: int
    ids: Sequence[int]

    @property
    def end(self) -> int:
        return self.start + len(self.ids)


@dataclass(frozen=True, slots=True)
class ReadingCost:
    """What it takes to read what rows hold, in positions that one thread reads of one row.

    ``heads``: of one row, which ``threads`` share. ``group``: what one more batch takes.
    """

    group: float
    heads: int = 1
    threads: int = 1

    def of(self, rows: int, width: int) -> float:
        return -(-rows * self.heads // self.threads) * width / self.heads


def padded_groups(chunks: Sequence[Chunk]) -> list[list[int]]:
    """Indices of chunks that make a batch with little padding: one group where all have one id."""
    order = sorted(range(len(chunks)), key=lambda index: (len(chunks[index].ids), chunks[index].start))
    groups: list[list[int]] = []
    total = 0
    for index in order:
        length = len(chunks[index].ids)
        if groups and length * (len(groups[-1]) + 1) <= _LARGEST_PADDED_SHARE * (total + length):
            groups[-1].append(index)
            total += length
        else:
            groups.append([index])
            total = length
    return [sorted(group) for group in groups]


def runs(chunks: Sequence[Chunk], cost: ReadingCost) -> list[list[int]]:
    """Indices of chunks that make a batch without padding.

    Long beginnings of rows go together wherever they lie, other chunks only with neighbours that hold about as much.
    """
    fresh: dict[int, list[int]] = {}
    found: list[list[int]] = []
    width = 0
    for index in sorted(range(len(chunks)), key=lambda index: chunks[index].place):
        chunk = chunks[index]
        if chunk.start == 0 and len(chunk.ids) >= LEAST_FRESH:
            fresh.setdefault(len(chunk.ids), []).append(index)
            continue
        wider = max(width, chunk.end)
        last = chunks[found[-1][-1]] if found else None
        if last is not None and last.place + 1 == chunk.place and len(last.ids) == len(chunk.ids):
            rows = len(found[-1])
            if cost.of(rows + 1, wider) <= cost.of(rows, width) + cost.group + cost.of(1, chunk.end):
                found[-1].append(index)
                width = wider
                continue
        found.append([index])
        width = chunk.end
    return [*fresh.values(), *found]
