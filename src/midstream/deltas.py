"""What is new of a row, as it comes: for those who show rows while they are generated."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from midstream.decoding import TextDecoder, decode
from midstream.row import Row, Stretch
from midstream.types import Trajectory
from midstream.vocabulary import Vocabulary

if TYPE_CHECKING:
    from midstream.driving import Drive


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new of one row, or that it is over.

    ``ids``, ``logprobs`` and ``weight_versions`` have equal lengths and are as in a
    :class:`~midstream.types.Segment`; all of them have the one ``origin``. ``text`` is what they complete: a
    character whose tokens have not all come yet is left for a later delta, so that the texts of a row's deltas
    joined together are its ``Trajectory.text``, as its ids joined are the trajectory's. ``trajectory`` is None but
    in the row's last delta, which may bring ids too.
    """

    prompt_id: str
    sample: int
    origin: Literal["generated", "injected"] = "generated"
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    weight_versions: tuple[int, ...] = ()
    text: str = ""
    trajectory: Trajectory | None = None


Listener = Callable[[Delta], object]
"""Called in the event loop that generates, between two steps; it must return at once."""


class RowWatch:
    """Tells a listener of one row, id by id, from where the row stands when the watch begins."""

    def __init__(self, listener: Listener, vocabulary: Vocabulary, row: Row, *, told: bool = False) -> None:
        """``told``: what the row holds already was told by another watch, such as that of the row it was copied from.

        Of a row that is resumed, whoever listens has the trajectory.
        """
        self._listener = listener
        self._vocabulary = vocabulary
        self._row = row
        self._decoder = TextDecoder(vocabulary)
        self._told = len(row.prompt_ids)
        if told:
            stretches = row.new_since(self._told)
            self._told = row.length
            if stretches and stretches[-1].origin == "generated":
                for token_id in stretches[-1].ids:  # its last character may be unfinished
                    self._decoder.feed(token_id)

    def look(self) -> None:
        """Tell what is new."""
        for delta in self._news():
            self._listener(delta)

    def end(self, trajectory: Trajectory) -> None:
        """Tell what is new, and that the row is over: ``trajectory`` is all of it."""
        *earlier, last = self._news() or [self._delta(Stretch("generated"), "")]
        if (rest := self._decoder.flush()) and last.origin == "injected":
            earlier, last, rest = [*earlier, last], self._delta(Stretch("generated"), rest), ""
        for delta in earlier:
            self._listener(delta)
        self._listener(
            Delta(
                last.prompt_id,
                last.sample,
                last.origin,
                last.ids,
                last.logprobs,
                last.weight_versions,
                last.text + rest,
                trajectory,
            )
        )

    def _news(self) -> list[Delta]:
        news = []
        for stretch in self._row.new_since(self._told):
            self._told += len(stretch.ids)
            if stretch.origin == "generated":
                text = "".join(map(self._decoder.feed, stretch.ids))
            else:
                if rest := self._decoder.flush():
                    news.append(self._delta(Stretch("generated"), rest))
                self._decoder = TextDecoder(self._vocabulary)
                text = decode(self._vocabulary, stretch.ids)
            news.append(self._delta(stretch, text))
        return news

    def _delta(self, stretch: Stretch, text: str) -> Delta:
        return Delta(
            str(self._row.prompt.id),
            self._row.sample,
            stretch.origin,
            stretch.ids,
            stretch.logprobs,
            stretch.weight_versions,
            text,
        )


async def deltas_of(drive: Drive, told: asyncio.Queue[Delta | None]) -> AsyncGenerator[Delta, None]:
    """Run a drive whose jobs' listener puts into ``told``, and give what comes there until its rows are over."""

    async def run() -> None:
        try:
            async with aclosing(drive.run()) as rows:
                async for index, _ in rows:
                    del drive.delivery.done[index]
        finally:
            told.put_nowait(None)

    running = asyncio.create_task(run())
    try:
        while (delta := await told.get()) is not None:
            yield delta
        await running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
