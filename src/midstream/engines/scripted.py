"""An engine that says what it is told: for tests and benchmarks, without a model.

It keeps to the whole protocol (rollback, fork, pausing, weight versions), can return several ids a step as
engines with speculative decoding do, and fails on command.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from midstream.decoding import decode
from midstream.engines.base import Capabilities, Handle, RowRequest, Update, sample_seed
from midstream.engines.rows import RowKeeper, check_integer
from midstream.errors import ConfigurationError, EngineError, ProtocolError
from midstream.types import Media
from midstream.vocabulary import Vocabulary

Reply = str | Sequence[int] | Callable[[str], str]
"""What a row says: a text; ids; or a function from the row's whole text so far to what comes next.

A function is asked where the row starts and again after each injected result (what is left of its last
answer is then dropped); an empty string ends the row.
"""

Script = Reply | Mapping[str, Reply] | Sequence[Reply] | Callable[[RowRequest, int], Reply]


@dataclass(slots=True)
class _ScriptedRow:
    handle: Handle
    request: RowRequest
    seed: int
    ids: list[int]
    limit: int | None
    reply: Reply
    said: list[int]  # all that the row is to say, so far as it is known
    place: int = 0  # how much of it has been returned
    running: bool = True
    ended: bool = False
    media: list[Media] = field(default_factory=list)


def scripted_logprob(seed: int, position: int) -> float:
    """The logprob that :class:`ScriptedEngine` gives to the id at ``position``: a fixed value in (-4, 0]."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=4).digest()
    return -(int.from_bytes(digest, "little") % 4096) / 1024


class ScriptedEngine(RowKeeper[_ScriptedRow]):
    """Says ``script``, then ends the sequence.

    - ``script``: one reply for all rows; a mapping from a prompt's text to its reply; a function of the
      request and the sample's number; or replies in the order in which rows are opened.
    - ``tokenizer``: any that :meth:`~midstream.vocabulary.Vocabulary.of` takes.
    - ``split``: how a text becomes ids, in place of the tokenizer's own way (to cut tags anywhere).
    - ``tokens_per_step``: ids that each step returns for a row; over 1, they may run past a tag.
    - ``step_time``: seconds that a step takes however many rows run, like a model's.
    - ``fail``: a prompt's text → after how many ids the engine reports an error for its rows.

    Without an EOS id in the tokenizer (or ``eos_id``), a row whose script is over is ``exhausted``.
    """

    takes_media = True

    def __init__(
        self,
        tokenizer: Any,
        script: Script,
        *,
        split: Callable[[str], Sequence[int]] | None = None,
        tokens_per_step: int = 1,
        step_time: float = 0.0,
        context_length: int | None = None,
        eos_id: int | None = None,
        fail: Mapping[str, int] | None = None,
    ) -> None:
        check_integer("tokens_per_step", tokens_per_step, 1)
        self._vocabulary = Vocabulary.of(tokenizer)
        super().__init__(
            tokenizer,
            context_length=context_length,
            eos_ids=self._vocabulary.eos_ids if eos_id is None else (eos_id,),
        )
        self._script = script
        self._split = split or self._vocabulary.encode_text
        self._tokens_per_step = tokens_per_step
        self._step_time = step_time
        self._fail = dict(fail or {})
        self._opened = 0
        self.steps = 0
        self.tokens = 0

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(logprobs="raw", fork=True, media=True, set_weights=True, keyed_noise=True)

    def open(self, request: RowRequest, n: int = 1) -> list[Handle]:
        self._check_open(request, n)
        handles = []
        for sample in range(request.first_sample, request.first_sample + n):
            seed = sample_seed(request.seed, sample)
            reply = self._reply(request, sample)
            row = _ScriptedRow(
                self._next_handle(), request, seed, list(request.ids), self._limit(request), reply, said=[]
            )
            self._ask(row)
            handles.append(self._add(row))
        return handles

    def step(self) -> list[Update]:
        if self._paused:
            raise EngineError("step: the engine is paused")
        running = [(handle, row) for handle, row in self._rows.items() if row.running]
        if not running:
            return []
        if self._step_time:
            time.sleep(self._step_time)
        self.steps += 1
        return [self._advance(handle, row) for handle, row in running]

    def extend(self, handle: Handle, ids: Sequence[int], media: Sequence[Media] = ()) -> None:
        row = self._extend(handle, ids, media)
        row.ids.extend(ids)
        row.media.extend(media)
        row.running = True
        if ids and callable(row.reply):
            del row.said[row.place :]
            self._ask(row)

    def rollback(self, handle: Handle, k: int) -> None:
        if k > len(self._row(handle).ids) - len(self._row(handle).request.ids):
            raise ProtocolError(f"rollback: row {handle} has not said so much that {k} ids could be taken back")
        self._roll_back(handle, k).place -= k

    def fork(self, handle: Handle, seed: int) -> Handle:
        row = self._row(handle)
        return self._add(
            replace(row, handle=self._next_handle(), seed=seed, ids=list(row.ids), said=list(row.said), running=False)
        )

    def close(self, handle: Handle) -> None:
        self._row(handle)
        del self._rows[handle]

    def set_weights(self, version: int, *, keep_cache: bool) -> None:
        del keep_cache  # there is none
        self._weight_version = version

    def shutdown(self) -> None:
        self._rows.clear()

    def _reply(self, request: RowRequest, sample: int) -> Reply:
        script = self._script
        order = self._opened
        self._opened += 1
        if isinstance(script, Mapping):
            text = decode(self._vocabulary, request.ids)
            if text not in script:
                raise ConfigurationError(f"script: holds no reply for the prompt {text!r}")
            return script[text]
        if isinstance(script, str):
            return script
        if callable(script):
            return _asked(script, request, sample)
        if all(isinstance(item, int) for item in script):
            return [item for item in script if isinstance(item, int)]
        if order >= len(script):
            raise ConfigurationError(f"script: has {len(script)} replies, and row {order + 1} was opened")
        return script[order]  # type: ignore[return-value]  # a sequence that is not all ids holds replies

    def _ask(self, row: _ScriptedRow) -> None:
        """Learn what the row says next."""
        reply = row.reply(decode(self._vocabulary, row.ids)) if callable(row.reply) else row.reply
        ids = self._split(reply) if isinstance(reply, str) else reply
        row.said.extend(ids)
        if not ids or ids[-1] not in self._eos_ids:
            row.said.extend(sorted(self._eos_ids)[:1])

    def _advance(self, handle: Handle, row: _ScriptedRow) -> Update:
        failing = self._fail.get(decode(self._vocabulary, row.request.ids)) if self._fail else None
        if failing is not None and len(row.ids) - len(row.request.ids) >= failing:
            row.running, row.ended = False, True
            return Update(handle, (), (), self._weight_version, error="the script says that this row fails")
        ids = row.said[row.place : row.place + self._tokens_per_step]
        if row.limit is not None:
            ids = ids[: max(0, row.limit - len(row.ids))]
        start = len(row.ids)
        row.ids.extend(ids)
        row.place += len(ids)
        self.tokens += len(ids)
        logprobs = [scripted_logprob(row.seed, start + i) for i in range(len(ids))]
        exhausted = not ids
        if exhausted:
            row.running, row.ended = False, True
        return Update(handle, ids, logprobs, self._weight_version, exhausted=exhausted)


def _asked(script: Callable[..., Any], request: RowRequest, sample: int) -> Reply:
    reply: Reply = script(request, sample)
    return reply
