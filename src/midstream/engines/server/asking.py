"""An ask, until it is answered: what is asked again after a fault, and when."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any, TypeVar

from midstream.engines.server.asks import Ask, Fault, FaultKind, GaveUp, Piece
from midstream.engines.server.client import Client
from midstream.engines.server.connection import ServerConnection
from midstream.engines.server.routes import Route

_logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class Asking:
    """Asks one route of one server. In one event loop, since it bounds how much is under way."""

    def __init__(self, client: Client, route: Route, connection: ServerConnection) -> None:
        self._client = client
        self._route = route
        self._connection = connection
        self._places = asyncio.Semaphore(connection.max_requests)

    async def pieces(self, ask: Ask) -> AsyncGenerator[Piece, None]:
        """The answer to ``ask``, each id of it once, the last piece with its finish reason.

        Raises :class:`Fault` for what asking again does not mend; what was given before stays true.
        """
        given: list[int] = []
        patience = Patience(self._connection)
        current, replayed = ask, _Replayed(())
        while True:
            try:
                async with aclosing(self._once(current)) as answer:
                    async for piece in answer:
                        new = replayed.beyond(piece)
                        if new.ids:
                            given += new.ids
                            patience.renew()
                        if new.ids or new.finish is not None:
                            yield new
                        if new.finish is not None:
                            return
                raise Fault(FaultKind.LOST, "the answer ended before it was finished")
            except Fault as fault:
                if fault.kind is FaultKind.LOST:
                    if len(given) == ask.most:  # what was lost is the word that this was all
                        yield Piece(finish="length")
                        return
                    current, replayed = self._again(ask, given, fault)
                wait = patience.wait_after(fault)
                _logger.info("asking %s again in %.1f s: %s", self._client.url, wait, fault)
                await asyncio.sleep(wait)

    async def whole(self, path: str, body: Mapping[str, Any], read: Callable[[Any], _T]) -> _T:
        """What ``read`` makes of an answer in one piece to a request whose answer is the same whenever it is asked."""
        patience = Patience(self._connection)
        while True:
            try:
                async with self._places, aclosing(self._client.events(path, body)) as events:
                    async for event in events:
                        return _read(read, event)
                raise Fault(FaultKind.LOST, "the answer is empty")
            except Fault as fault:
                if fault.kind is FaultKind.LOST and self._connection.after_break == "fail":
                    raise GaveUp(f"{fault} (not asked again: after_break='fail')") from fault
                wait = patience.wait_after(fault)
                _logger.info("asking %s again in %.1f s: %s", self._client.url, wait, fault)
                await asyncio.sleep(wait)

    async def _once(self, ask: Ask) -> AsyncGenerator[Piece, None]:
        reader = self._route.reader(ask)
        async with self._places, aclosing(self._client.events(self._route.path, self._route.body(ask))) as events:
            async for event in events:
                for piece in _read(reader.read, event):
                    if piece.finish is not None:
                        await _drained(events)
                    yield piece

    def _again(self, ask: Ask, given: list[int], fault: Fault) -> tuple[Ask, _Replayed]:
        """How to ask once more, so that what comes goes on from what was given. Raises the fault where it may not be.

        Ids that came are final: behind a greedy row's the same ids follow whoever asks. A sampled row's come again
        only under the seed and from the place that they were first asked with.
        """
        after_break = self._connection.after_break
        if after_break == "continue" or (after_break == "replay" and ask.sampling.greedy):
            seed = None if ask.seed is None else ask.seed + len(given)
            return replace(ask.behind(given), seed=seed), _Replayed(())
        if after_break == "replay" and self._route.seeded:
            return ask, _Replayed(tuple(given))
        reason = (
            "after_break='fail'"
            if after_break == "fail"
            else "this server keeps to no seeds, so that asking again would give another answer: after_break='continue'"
        )
        raise GaveUp(f"{fault} (not asked again: {reason})")


def _read(read: Callable[[Any], _T], event: Any) -> _T:
    try:
        return read(event)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        message = f"the answer has an unknown shape ({type(error).__name__}: {error})"
        raise Fault(FaultKind.FINAL, message) from error


async def _drained(events: AsyncGenerator[Any, None]) -> None:
    """Read an answer to its end behind its last piece, so that its connection can be used again."""
    with suppress(TimeoutError, Fault):
        async with asyncio.timeout(_DRAIN):
            async for _ in events:
                pass


_DRAIN = 0.5
"""Seconds."""


class _Replayed:
    """Leaves out of an answer what had come before, and holds it to be the same."""

    def __init__(self, ids: tuple[int, ...]) -> None:
        self._ids = ids

    def beyond(self, piece: Piece) -> Piece:
        known, self._ids = self._ids[: len(piece.ids)], self._ids[len(piece.ids) :]
        if piece.ids[: len(known)] != known or (self._ids and piece.finish is not None):
            raise Fault(
                FaultKind.FINAL,
                "an answer that broke off was asked for again with the same seed, and came out otherwise: this server "
                "does not keep to seeds; after_break='continue' goes on behind the ids that came",
            )
        return replace(piece, ids=piece.ids[len(known) :], logprobs=piece.logprobs[len(known) :])


class Patience:
    """How often and for how long one ask may go without an id."""

    def __init__(self, connection: ServerConnection) -> None:
        self._connection = connection
        self._faults = 0
        self._since = time.monotonic()

    def renew(self) -> None:
        self._faults = 0
        self._since = time.monotonic()

    def wait_after(self, fault: Fault) -> float:
        """Seconds until the next try. Raises a fault where there is none to be."""
        connection = self._connection
        if fault.kind is FaultKind.FINAL:
            raise fault
        if self._faults >= connection.retries:
            raise GaveUp(f"{fault} (after {self._faults} retries)")
        wait: float = min(connection.longest_wait, connection.first_wait * 2**self._faults)
        wait *= random.uniform(0.5, 1.0)  # noqa: S311  # so that rows that failed together do not return together
        wait = max(wait, fault.retry_after or 0.0)
        self._faults += 1
        if time.monotonic() + wait - self._since > connection.give_up_after:
            asked = "" if fault.retry_after is None else f", and {fault.retry_after:g} s are to be waited"
            raise GaveUp(f"{fault} (no id within give_up_after={connection.give_up_after:g} s{asked})")
        return wait
