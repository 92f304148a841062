"""Rows as requests: each is asked for with all of its ids, and goes on behind a result as a new request."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from midstream.engines.base import Handle, RowRequest, Update, sample_seed
from midstream.engines.rows import RowKeeper
from midstream.engines.server.asks import Ask
from midstream.engines.server.link import Delta, Link
from midstream.errors import CapabilityError, ConfigurationError
from midstream.types import Media, Sampling


@dataclass(slots=True, eq=False)
class RequestRow:
    """``request`` names what samples for the row now, behind its first ``asked_from`` ids; None where nothing does."""

    handle: Handle
    ids: list[int]
    sampling: Sampling
    seed: int
    limit: int
    stop_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]
    running: bool = True
    ended: bool = False
    request: int | None = None
    asked_from: int = 0

    @property
    def full(self) -> bool:
        return len(self.ids) >= self.limit


class RequestEngine(RowKeeper[RequestRow]):
    """What engines share that ask for rows through a :class:`~midstream.engines.server.link.Link`.

    ``asks_stop_ids``, ``asks_stop_strings``: whether requests name what ends their answers; where an answer runs on
    instead, what lies behind is cut by its ids. ``stream``: whether answers are to come piece by piece.
    """

    def __init__(
        self,
        tokenizer: Any,
        link: Link,
        *,
        context_length: int | None,
        eos_ids: Iterable[int],
        weight_version: int,
        vocabulary_size: int,
        asks_stop_ids: bool = True,
        asks_stop_strings: bool = True,
        stream: bool = True,
    ) -> None:
        super().__init__(
            tokenizer,
            context_length=context_length,
            eos_ids=eos_ids,
            weight_version=weight_version,
            vocabulary_size=vocabulary_size,
        )
        self._link = link
        self._asks_stop_ids = asks_stop_ids
        self._asks_stop_strings = asks_stop_strings
        self._stream = stream
        self._requests = count()
        self._by_request: dict[int, RequestRow] = {}
        self._closed = False

    @abstractmethod
    def _unsupported(self, sampling: Sampling) -> str | None:
        """Why rows cannot be sampled so, or None."""

    @property
    def unfinished(self) -> int:
        """How many requests of this engine are under way."""
        return self._link.under_way

    def open(self, request: RowRequest, n: int = 1) -> list[Handle]:
        """Open ``n`` rows, each a request of its own; they share the prompt through the server's prefix cache.

        Raises :class:`~midstream.errors.PromptError` for ids that are none of the tokenizer's, none at all, or more
        than the context holds; :class:`~midstream.errors.CapabilityError` for media and for sampling that the server
        does otherwise; :class:`~midstream.errors.ConfigurationError` where nothing bounds the row.
        """
        self._check_open(request, n)
        reason = self._unsupported(request.sampling)
        if reason is not None:
            raise CapabilityError(f"{request.sampling}: {reason}")
        limit = self._limit(request)
        if limit is None:
            raise ConfigurationError(
                "context_length=None: the server does not say how many ids a row may hold; give context_length, "
                "Limits.max_total_tokens or Limits.max_new_tokens"
            )
        return [
            self._add(
                RequestRow(
                    handle=self._next_handle(),
                    ids=list(request.ids),
                    sampling=request.sampling,
                    seed=sample_seed(request.seed, request.first_sample + sample),
                    limit=limit,
                    stop_ids=request.stop_ids,
                    stop_strings=request.stop_strings,
                )
            )
            for sample in range(n)
        ]

    def step(self) -> list[Update]:
        """Ask for the rows that run, and take what has come. Waits a moment where nothing has."""
        if self._paused:
            return []
        updates = []
        for row in [row for row in self._rows.values() if row.running and row.request is None]:
            if row.full:
                self._end(row)
                updates.append(Update(row.handle, (), (), self._weight_version, exhausted=True))
            else:
                self._ask(row)
        if any(row.running for row in self._rows.values()):
            for delta in self._link.poll():
                asked_for = self._by_request.get(delta.request)
                if asked_for is not None:
                    updates += self._take(asked_for, delta)
        return updates

    def extend(self, handle: Handle, ids: Sequence[int], media: Sequence[Media] = ()) -> None:
        row = self._extend(handle, ids, media)
        row.ids.extend(ids)
        row.running = True

    def rollback(self, handle: Handle, k: int) -> None:
        self._drop(self._roll_back(handle, k))

    def fork(self, handle: Handle, seed: int) -> Handle:
        """A new held row with the same ids; what the server has cached of them serves both."""
        source = self._row(handle)
        return self._add(
            RequestRow(
                handle=self._next_handle(),
                ids=list(source.ids),
                sampling=source.sampling,
                seed=seed,
                limit=source.limit,
                stop_ids=source.stop_ids,
                stop_strings=source.stop_strings,
                running=False,
            )
        )

    def close(self, handle: Handle) -> None:
        self._drop(self._row(handle))
        del self._rows[handle]

    def pause(self) -> None:
        """Nothing is sampled until ``resume``: the rows' requests are given up, and made anew from their ids then."""
        super().pause()
        for row in self._rows.values():
            self._drop(row)

    def shutdown(self) -> None:
        """Give up all requests and close the connections. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self._rows.clear()
        self._by_request.clear()
        self._link.shutdown()

    def _ask(self, row: RequestRow) -> None:
        ask = Ask(
            tuple(row.ids),
            row.sampling,
            None if row.sampling.greedy else _request_seed(row.seed, len(row.ids)),
            row.limit - len(row.ids),
            stop_ids=row.stop_ids if self._asks_stop_ids else (),
            stop_strings=row.stop_strings if self._asks_stop_strings else (),
            stream=self._stream,
            weight_version=self._weight_version,
            row=row.handle,
        )
        row.request, row.asked_from = next(self._requests), len(row.ids)
        self._by_request[row.request] = row
        self._link.submit(row.request, ask)

    def _take(self, row: RequestRow, delta: Delta) -> list[Update]:
        version = self._weight_version if delta.version is None else delta.version
        highest = max(delta.ids, default=0)
        if highest >= (self._vocabulary_size or 0):
            self._end(row)
            message = f"the server gave id {highest}; the tokenizer's ids are under {self._vocabulary_size}"
            return [Update(row.handle, (), (), version, error=message)]
        row.ids.extend(delta.ids)
        if delta.finish is not None or delta.error is not None:
            self._by_request.pop(delta.request)
            row.request = None
        ended = Update(row.handle, delta.ids, delta.logprobs, version)
        if delta.error is not None:
            ended = replace(ended, error=delta.error)
        elif row.full or delta.finish == "length" or (delta.finish is not None and len(row.ids) == row.asked_from):
            ended = replace(ended, exhausted=True)  # without ids, asking again would go on for ever
        elif delta.finish == "own":
            ended = replace(ended, finished=True)
        else:
            return [ended] if delta.ids else []
        self._end(row)
        return [ended]

    def _end(self, row: RequestRow) -> None:
        row.running, row.ended = False, True
        self._drop(row)

    def _drop(self, row: RequestRow) -> None:
        """Nothing is to sample for the row any more."""
        if row.request is not None:
            self._by_request.pop(row.request, None)
            self._link.abort(row.request)
            row.request = None


def _request_seed(seed: int, position: int) -> int:
    """Of a request that begins at ``position``. Under 2**62: servers' seeds are signed, and a row may add to it."""
    digest = hashlib.blake2b(f"server:{seed}:{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2
