"""An engine over a coroutine function: for servers that a trainer hands over as an object of its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from typing import Any

from midstream.engines.base import Capabilities
from midstream.engines.rows import completes_stop_string
from midstream.engines.server.asks import Ask, Finish, Piece
from midstream.engines.server.link import Link
from midstream.engines.server.requests import RequestEngine
from midstream.errors import CapabilityError, ConfigurationError
from midstream.types import LogprobKind, Sampling
from midstream.vocabulary import Vocabulary

AskServer = Callable[[Ask], Awaitable[Piece]]
"""Answers an ask with all of its ids, and why they end. What it raises ends the row."""


class CoroutineEngine(RequestEngine):
    """Samples by awaiting ``ask`` for each row, in rounds that end at stop strings.

    It is awaited in ``loop``, the event loop that the server's client belongs to, by default the one that runs where
    the engine is made; the rows are driven from another thread. As many asks are under way as rows want ids.

    - ``tokenizer``: the model's.
    - ``logprobs``: the kind that answers have, or None where they have none.
    - ``context_length``: the most ids of a row.
    - ``eos_ids``: by default the tokenizer's.

    A finish reason of ``"asked"`` lets a row go on unless it has stopped by itself; for a server that does not tell
    at what an answer ended, :func:`finish_by_ids` finds it.
    """

    def __init__(
        self,
        ask: AskServer,
        tokenizer: Any,
        *,
        logprobs: LogprobKind | None,
        context_length: int | None = None,
        eos_ids: Iterable[int] | None = None,
        weight_version: int = 0,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        if not callable(ask):
            raise ConfigurationError(f"ask={ask!r}: must be a coroutine function of an Ask")
        vocabulary = Vocabulary.of(tokenizer)
        super().__init__(
            tokenizer,
            _CoroutineLink(ask, asyncio.get_running_loop() if loop is None else loop),
            context_length=context_length,
            eos_ids=vocabulary.eos_ids if eos_ids is None else eos_ids,
            weight_version=weight_version,
            vocabulary_size=vocabulary.size,
            stream=False,
        )
        self._logprobs = logprobs

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(logprobs=self._logprobs, fork=True, rounds=True)

    def set_weights(self, version: int, *, keep_cache: bool) -> None:
        del keep_cache
        raise CapabilityError(
            f"set_weights: the weights are changed behind this engine; what it asks says which version ({version}) "
            "an answer has (Piece.version)"
        )

    def _unsupported(self, sampling: Sampling) -> str | None:
        del sampling  # what a server cannot do is for ``ask`` to raise
        return None


class _CoroutineLink(Link):
    def __init__(self, ask: AskServer, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._ask = ask

    async def _pieces(self, ask: Ask) -> AsyncGenerator[Piece, None]:
        yield await self._ask(ask)

    def shutdown(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and its tasks with it
            self._loop.call_soon_threadsafe(self._cancel_all)

    def _cancel_all(self) -> None:
        for task in list(self._tasks.values()):
            task.cancel()


def finish_by_ids(vocabulary: Vocabulary, ask: Ask, ids: Sequence[int]) -> Finish:
    """Why an answer ended, for a server that does not tell, or not exactly.

    One that ends at nothing that was asked for was cut for its length.
    """
    if ids and (ids[-1] in ask.stop_ids or completes_stop_string(vocabulary, ask.ids, ids, ask.stop_strings)):
        return "asked"
    return "length"
