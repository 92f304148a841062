"""Which rows hold a place in the cache, and what each step puts through the model.

Rows that wait for a place get one in the order they were opened. A place is kept while its row is held, so
a result is all that must be computed when it comes; and what a closed row leaves behind serves a later row
that begins with the same ids. A row whose first ids are being computed, or lie, in another place copies
them: samples of one prompt, forks and resumed rows are all this one case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from midstream.engines.grouping import Chunk
from midstream.engines.model_runners import RaggedRunner, Runner
from midstream.types import Sampling

_WORTH_COPYING = 16
"""Ids. Fewer are computed sooner than waited for and copied."""

_LEAST_PART = 64
"""Ids. A smaller part of a chunk is put off to the next step, where it makes a better batch."""

# In units of what a decode step spends on one idle row: attention over its place and its share of the rest.
_COST_OF_MOVE = 2
_COST_OF_SWAP = 3


@dataclass(slots=True, eq=False)
class EngineRow:
    """One open row. ``cached`` counts its first ids that need not be put through the model again.

    At least one id is never counted as cached: the logits after the last one are what a step is for.
    ``limit`` is the most ids it may hold. ``started``: ids were sampled or appended since it was opened.
    ``ended``: full, or failed; nothing is sampled unless it is rolled back. ``sound``: its cache holds numbers.
    ``held_since`` orders held rows by how long they have waited.
    """

    handle: int
    ids: list[int]
    sampling: Sampling
    seed: int
    limit: int | None
    cached: int = 0
    place: int | None = None
    running: bool = True
    started: bool = False
    ended: bool = False
    sound: bool = True
    held_since: int = 0

    @property
    def pending(self) -> int:
        return len(self.ids) - self.cached

    @property
    def full(self) -> bool:
        return self.limit is not None and len(self.ids) >= self.limit


@dataclass(frozen=True, slots=True)
class Plan:
    """What one step computes: ``chunks`` of prompts and results, then one id for each row of ``decode``."""

    chunks: list[tuple[EngineRow, Chunk]]
    decode: list[tuple[EngineRow, Chunk]]


@dataclass(slots=True)
class _Place:
    """One row's share of the cache: whose it is, or the ids that its last row left there.

    ``epoch`` counts changes of weights: only what the present weights computed is shared.
    """

    row: EngineRow | None = None
    remains: Sequence[int] = ()
    epoch: int = 0

    @property
    def cached(self) -> int:
        return self.row.cached if self.row is not None else len(self.remains)

    @property
    def ids(self) -> Sequence[int]:
        return self.row.ids if self.row is not None else self.remains


@dataclass(slots=True)
class Places:
    """The places of a runner's cache. ``most``: how many there may be.

    ``shared`` counts ids copied, ``evicted`` rows that lost their place while they waited.
    """

    runner: Runner
    most: int
    shared: int = 0
    evicted: int = 0
    _places: list[_Place] = field(default_factory=list)
    _reserved: int = 0
    _epoch: int = 0
    _idle: int = 0

    @property
    def _ragged(self) -> RaggedRunner | None:
        return self.runner if isinstance(self.runner, RaggedRunner) else None

    @property
    def appends(self) -> bool:
        """Whether several ids can be computed behind what is cached, and rows be cut short."""
        return self._ragged is not None

    def reserve(self, length: int) -> None:
        """Have memory for ``length`` ids at each place that was given. Grows in steps: growing copies."""
        if len(self._places) > self._reserved:
            self._reserved = min(self.most, max(len(self._places), self._reserved * 3 // 2))
        self.runner.reserve(self._reserved, length)

    def rows(self) -> list[EngineRow]:
        """The rows that hold a place, in the order they were opened."""
        held = [place.row for place in self._places if place.row is not None]
        return sorted(held, key=lambda row: row.handle)

    def give(self, row: EngineRow) -> bool:
        """Give ``row`` a place, if one can be had; one that holds its first ids already, if there is one."""
        free = [index for index, place in enumerate(self._places) if place.row is None]
        if not free and len(self._places) >= self.most:
            return False
        best = self._best_source(row.ids)
        if best is not None and best in free:
            index = best
            row.cached = min(_common(self._places[best].remains, row.ids), len(row.ids) - 1)
            self.shared += row.cached
        elif free:
            index = min(free, key=lambda index: (len(self._places[index].remains) > 0, index))
        else:
            index = len(self._places)
            self._places.append(_Place())
        self._places[index] = _Place(row, epoch=self._epoch)
        row.place = index
        return True

    def evict(self) -> bool:
        """Take the place of the row that has waited longest for its result. False where none waits.

        The row is computed anew when it goes on, unless nobody has needed its place by then.
        """
        waiting = [place.row for place in self._places if place.row is not None and not place.row.running]
        if not waiting:
            return False
        row = min(waiting, key=lambda row: (row.held_since, row.handle))
        self.leave(row, sound=row.sound)
        row.cached = 0
        self.evicted += 1
        return True

    def leave(self, row: EngineRow, *, sound: bool = True) -> None:
        """Take the row's place from it. What it leaves there may serve another, unless it is not ``sound``."""
        if row.place is None:
            return
        place = self._places[row.place]
        if self._ragged is not None and sound:
            self._places[row.place] = _Place(remains=row.ids[: row.cached], epoch=place.epoch)
        else:
            self.runner.clear(row.place)
            self._places[row.place] = _Place()
        row.place = None

    def copy(self, source: EngineRow, target: EngineRow) -> None:
        """Copy all that is cached of ``source`` to ``target``, whose ids begin with it, if both hold places."""
        if self._ragged is None or source.place is None or target.place is None:
            return
        self._ragged.copy(source.place, target.place, source.cached)
        self._places[target.place].epoch = self._places[source.place].epoch
        target.cached = source.cached
        self.shared += source.cached

    def share(self, row: EngineRow, leaders: set[int]) -> bool:
        """Copy to ``row``, of which nothing is cached, what another place holds of its first ids.

        False: the best of them is still being computed, for one of ``leaders`` (handles); to wait is cheaper.
        """
        assert row.place is not None
        best = None if self._ragged is None else self._best_source(row.ids, besides=row.place)
        if best is None or self._ragged is None:
            return True
        source = self._places[best]
        goal = min(_common(source.ids, row.ids), len(row.ids) - 1)
        if source.cached < goal and source.row is not None and source.row.handle in leaders:
            return False
        length = min(goal, source.cached)
        if length >= _WORTH_COPYING:
            self._ragged.copy(best, row.place, length)
            row.cached = length
            self.shared += length
        return True

    def _best_source(self, ids: Sequence[int], besides: int | None = None) -> int | None:
        """The place that shares the most first ids with ``ids``, worth copying and under the present weights."""
        best, most = None, _WORTH_COPYING - 1
        for index, place in enumerate(self._places):
            if index == besides or place.epoch != self._epoch:
                continue
            # What a held row has not computed may never be.
            theirs = place.ids if place.row is not None and place.row.running else place.ids[: place.cached]
            common = _common(theirs, ids)
            if common > most or (common == most and best is not None and place.cached > self._places[best].cached):
                best, most = index, common
        return best

    def compact(self, decoding: Sequence[EngineRow]) -> None:
        """Move rows together, once the idle rows between them have cost as much as moving does."""
        if self._ragged is None or self._ragged.splits or not decoding:
            return
        taken = {row.place: row for row in decoding if row.place is not None}
        while True:
            low, high = min(taken), max(taken)
            gaps = [index for index in range(low, high) if index not in taken]
            if not gaps:
                return
            gap = min(gaps, key=lambda index: (self._places[index].row is not None, index))
            if not self._paid(len(gaps), self._places[gap].row is not None):
                return
            self._exchange(high, gap)
            taken[gap] = taken.pop(high)

    def _paid(self, gaps: int, swap: bool) -> bool:
        cost = _COST_OF_SWAP if swap else _COST_OF_MOVE
        if self._idle < cost:
            self._idle += gaps
            return False
        self._idle -= cost
        return True

    def _exchange(self, first: int, second: int) -> None:
        """Exchange a row's place with a free one, or with another row's."""
        assert self._ragged is not None
        one, other = self._places[first], self._places[second]
        if other.row is None:
            self._ragged.copy(first, second, one.cached)
            self._places[first] = _Place()
        else:
            self._ragged.swap(first, second, max(one.cached, other.cached))
            self._places[first] = other
            other.row.place = first
        self._places[second] = one
        if one.row is not None:
            one.row.place = second

    def renew(self, *, keep_cache: bool) -> None:
        """The weights have changed: what the old ones computed is shared no more, and kept only if asked."""
        self._epoch += 1
        for place in self._places:
            if place.row is None:
                place.remains = ()
            elif not keep_cache:
                place.row.cached = 0
            if place.row is None or place.row.cached == 0:
                place.epoch = self._epoch


def plan(rows: Sequence[EngineRow], places: Places, prefill_chunk: int) -> Plan:
    """What to compute for ``rows``, which hold places and run, in the order they were opened.

    At most ``prefill_chunk`` ids of prompts and results are computed in a step, so that the rows that decode
    wait for no long prompt; but while more rows wait for their first id than decode, filling the batch comes
    first. Rows opened first are served first, which puts results before new prompts.
    """
    chunks: list[tuple[EngineRow, Chunk]] = []
    budget = prefill_chunk
    leaders: set[int] = set()
    for row in rows:
        assert row.place is not None
        if row.pending == 1:
            continue
        if not places.appends:
            row.cached = 0
        elif budget <= 0:
            break
        elif row.cached == 0:
            if not places.share(row, leaders):
                continue
            if row.pending == 1:
                continue
        length = min(row.pending, budget) if places.appends else row.pending
        if length < row.pending and chunks and length < _LEAST_PART:
            break
        chunks.append((row, Chunk(row.place, row.cached, row.ids[row.cached : row.cached + length])))
        leaders.add(row.handle)
        budget -= length
    ready = [row for row in rows if row.pending == 1]
    decode = [(row, Chunk(row.place, row.cached, row.ids[-1:])) for row in ready if row.place is not None]
    done = {row.handle for row, chunk in chunks if chunk.end == len(row.ids)}
    unstarted = sum(not row.started and row.pending > 1 and row.handle not in done for row in rows)
    return Plan(chunks, decode if unstarted <= len(decode) else [])


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many first ids two sequences share; 0 where they are too few to matter."""
    if first[:_WORTH_COPYING] != second[:_WORTH_COPYING]:
        return 0
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
