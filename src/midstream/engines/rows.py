"""The open rows of an engine, and what every engine refuses: shared by the engines that keep rows themselves."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from itertools import count
from typing import Any, Generic, Protocol, TypeVar

from midstream import checks
from midstream.decoding import decode
from midstream.engines.base import Handle, RowRequest
from midstream.errors import CapabilityError, PromptError, ProtocolError
from midstream.types import Media
from midstream.vocabulary import Vocabulary


class OpenRow(Protocol):
    """What is shared of a row. ``ids``: all of them, the prompt's first. ``ended``: it samples nothing more unless it
    is rolled back. ``limit``: the most ids that it may hold, or None."""

    handle: Handle
    ids: list[int]
    running: bool
    ended: bool

    @property
    def limit(self) -> int | None: ...


RowT = TypeVar("RowT", bound=OpenRow)


class RowKeeper(Generic[RowT]):
    """Rows by their handles, and the properties that say what an engine is.

    ``vocabulary_size``: ids that are not under it are refused; None refuses none. ``takes_media``: whether images
    may be given.
    """

    takes_media = False

    def __init__(
        self,
        tokenizer: Any,
        *,
        context_length: int | None,
        eos_ids: Iterable[int],
        weight_version: int = 0,
        vocabulary_size: int | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._eos_ids = checked_eos_ids(eos_ids)
        self._weight_version: int = checks.integer("weight_version", weight_version, 0)
        self._vocabulary_size = vocabulary_size
        self._rows: dict[Handle, RowT] = {}
        self._handles = count(1)
        self._paused = False

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    @property
    def context_length(self) -> int | None:
        return self._context_length

    @property
    def eos_ids(self) -> frozenset[int]:
        return self._eos_ids

    @property
    def weight_version(self) -> int:
        return self._weight_version

    @property
    def open_rows(self) -> int:
        """Rows that were opened and not closed."""
        return len(self._rows)

    def pause(self) -> None:
        """Until ``resume``, nothing is sampled and steps return at once."""
        self._paused = True

    def resume(self) -> None:
        self._paused = False

    def _next_handle(self) -> Handle:
        return next(self._handles)

    def _add(self, row: RowT) -> Handle:
        self._rows[row.handle] = row
        return row.handle

    def _row(self, handle: Handle) -> RowT:
        row = self._rows.get(handle)
        if row is None:
            raise ProtocolError(f"no row {handle} is open")
        return row

    def _limit(self, request: RowRequest) -> int | None:
        """The most ids that a row of the request may hold."""
        bounds = [bound for bound in (self._context_length, request.max_total_tokens) if bound is not None]
        return min(bounds, default=None)

    # --- what is refused

    def _check_open(self, request: RowRequest, n: int) -> None:
        check_integer("n", n, 1)
        self._refuse_media(request.media)
        if not request.ids:
            raise PromptError("ids=(): a row needs at least one id to start from")
        self._check_ids("ids", request.ids, PromptError)
        if self._context_length is not None and len(request.ids) > self._context_length:
            raise PromptError(f"ids: {len(request.ids)} of them do not fit a context of {self._context_length}")

    def _extend(self, handle: Handle, ids: Sequence[int], media: Sequence[Media]) -> RowT:
        """The held row that ``ids`` may be appended to, which is left to the engine."""
        row = self._row(handle)
        self._refuse_media(media)
        if row.running or row.ended:
            raise ProtocolError(f"row {handle} is not held: only a held row can be extended")
        self._check_ids("ids", ids, ProtocolError)
        if row.limit is not None and len(row.ids) + len(ids) > row.limit:
            raise ProtocolError(f"row {handle}: {len(row.ids)} ids and {len(ids)} more are over its limit {row.limit}")
        return row

    def _roll_back(self, handle: Handle, k: int) -> RowT:
        """The row, held, without its last ``k`` ids."""
        row = self._row(handle)
        if not 0 <= k < len(row.ids):
            raise ProtocolError(f"row {handle} has {len(row.ids)} ids: {k} of them cannot be taken back")
        if k:
            del row.ids[-k:]
        row.running = row.ended = False
        return row

    def _check_ids(self, name: str, ids: Sequence[int], error: type[PromptError | ProtocolError]) -> None:
        for item in ids:
            try:
                operator.index(item)
            except TypeError:
                raise error(f"{name}: holds {item!r}; token ids are integers") from None
        size = self._vocabulary_size
        if size is None or not ids:
            return
        for extreme in (min(ids), max(ids)):
            if not 0 <= extreme < size:
                raise error(f"{name}: {extreme} is no id of a vocabulary of {size}")

    def _refuse_media(self, media: Sequence[Media]) -> None:
        if media and not self.takes_media:
            raise CapabilityError("this engine takes no media: text models only")


def check_integer(name: str, value: int, least: int) -> None:
    """Raise :class:`ConfigurationError` unless ``value`` is an integer of at least ``least``."""
    checks.integer(name, value, least)


def checked_eos_ids(eos_ids: Iterable[int]) -> frozenset[int]:
    """An engine's ids that end a sequence. Raises :class:`ConfigurationError` for what are no ids."""
    return frozenset(
        checks.integer("eos_ids[]", token_id, 0) for token_id in checks.items("eos_ids", eos_ids, "token ids")
    )


def completes_stop_string(
    vocabulary: Vocabulary, before: Sequence[int], ids: Sequence[int], stop_strings: Iterable[str]
) -> bool:
    """Whether ``ids``, which a row with the ids ``before`` was given, complete one of the texts."""
    before = before[-_CARRY:]
    text = decode(vocabulary, (*before, *ids))
    new = len(decode(vocabulary, before))
    return any(text.find(stop, max(0, new - len(stop) + 1)) >= 0 for stop in stop_strings)


_CARRY = 64
"""Ids before those that are new in which a stop string may have begun."""
