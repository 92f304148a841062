"""An engine over vLLM: rows come and go at any step, and every id is vLLM's own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Self
from uuid import uuid4

from midstream import checks
from midstream.engines.base import Capabilities, Handle, RowRequest, Update, sample_seed
from midstream.engines.rows import RowKeeper, checked_eos_ids
from midstream.engines.vllm.facts import facts_of
from midstream.engines.vllm.opening import Connection, connect, make
from midstream.engines.vllm.rows import Delta, EngineRow
from midstream.engines.vllm.ways import Mode, check_mode, way_of
from midstream.errors import CapabilityError, EngineError
from midstream.types import Media, Sampling


class VLLMEngine(RowKeeper[EngineRow]):
    """Samples with vLLM.

    - ``llm``: a ``vllm.LLM``, ``LLMEngine`` or ``AsyncLLM``. It stays the caller's; while rows are open, nothing
      else may step an ``LLM``. An ``AsyncLLM`` that serves in an event loop already is used there; one that does
      not gets a loop that ends with this engine, and serves nobody afterwards.
    - ``tokenizer``: by default the one that vLLM has.
    - ``mode``: how a row goes on after a result; every way gives the same trajectories.
      ``"resubmission"``: as a new request with all of its ids, which finds them in the prefix cache. Works
      with everything, and rows that wait for code take no place in vLLM.
      ``"streaming"``: as the next input of a session, whose keys and values stay in vLLM while code runs.
      Needs an ``AsyncLLM``. Rows that wait keep their places: let ``max_num_seqs`` and the cache be large enough.
      ``"forced"``: in the same request, midstream's logits processor forcing the result's ids. Needs an ``LLM``
      whose core runs in this process (``VLLM_ENABLE_V1_MULTIPROCESSING=0``), with that processor and without
      asynchronous scheduling. A result that comes too late goes on by resubmission.
    - ``patience``: seconds for which a forced result is waited for before the next step of all rows.
    - ``stop_strings``: vLLM itself ends requests at the row's end tag and stop strings. Nothing depends on it.
    - ``context_length``: the most ids of a row, if fewer than vLLM's ``max_model_len``.
    - ``eos_ids``: by default those of the model's generation config, its config or the tokenizer.
    - ``weight_version``: of the weights that the engine has now.

    Logprobs are of the kind that vLLM's ``logprobs_mode`` names. Where midstream's logits processor is in the
    engine (``from_pretrained`` puts it there; else ``vllm.LLM(logits_processors=[PROCESSOR_V1])``), noise is
    keyed by the row's seed and the position of the id; otherwise it is vLLM's own, with a seed for each request.

    Raises :class:`ConfigurationError` for what cannot be, :class:`CapabilityError` for what vLLM cannot do
    exactly.
    """

    def __init__(
        self,
        llm: Any,
        tokenizer: Any = None,
        *,
        mode: Mode = "resubmission",
        patience: float = 0.005,
        stop_strings: bool = False,
        context_length: int | None = None,
        eos_ids: Iterable[int] | None = None,
        weight_version: int = 0,
    ) -> None:
        _check_options(mode, patience, stop_strings, context_length, eos_ids, weight_version)
        self._connect(
            connect(llm, tokenizer),
            mode=mode,
            patience=patience,
            stop_strings=stop_strings,
            context_length=context_length,
            eos_ids=eos_ids,
            weight_version=weight_version,
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        mode: Mode = "resubmission",
        patience: float = 0.005,
        stop_strings: bool = False,
        context_length: int | None = None,
        eos_ids: Iterable[int] | None = None,
        weight_version: int = 0,
        **options: Any,
    ) -> Self:
        """Start vLLM on a folder or a hub name. ``options``: vLLM's engine arguments (``dtype``, …).

        ``shutdown`` ends it. Prefix caching is on, and midstream's logits processor is in it where vLLM
        allows one (not with speculative decoding).
        """
        _check_options(mode, patience, stop_strings, context_length, eos_ids, weight_version)
        engine = cls.__new__(cls)
        engine._connect(
            make(path, mode, options),
            mode=mode,
            patience=patience,
            stop_strings=stop_strings,
            context_length=context_length,
            eos_ids=eos_ids,
            weight_version=weight_version,
        )
        return engine

    def _connect(
        self,
        connection: Connection,
        *,
        mode: Mode,
        patience: float,
        stop_strings: bool,
        context_length: int | None,
        eos_ids: Iterable[int] | None,
        weight_version: int,
    ) -> None:
        try:
            self._llm = connection.llm
            self._connection = connection
            self._link = connection.link
            self._facts = facts_of(connection.config, connection.tokenizer)
            super().__init__(
                connection.tokenizer,
                context_length=_bounded(self._facts.context_length, context_length),
                eos_ids=self._facts.eos_ids if eos_ids is None else eos_ids,
                weight_version=weight_version,
                vocabulary_size=self._facts.vocabulary_size,
            )
            self._way = way_of(connection, self._facts, mode, stop_strings=stop_strings, patience=patience)
        except BaseException:
            connection.shutdown()
            raise
        self._salt: str | None = None
        self._closed = False

    @property
    def llm(self) -> Any:
        """vLLM's own object, such as for ``collective_rpc`` when weights change."""
        return self._llm

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            logprobs=self._facts.logprobs, fork=True, set_weights=True, keyed_noise=self._facts.has_processor
        )

    @property
    def unfinished(self) -> int:
        """How many requests vLLM still has, whoever asked for them."""
        return self._link.unfinished

    def open(self, request: RowRequest, n: int = 1) -> list[Handle]:
        """Open ``n`` rows; vLLM queues what it has no place for. They share the prompt through the prefix cache.

        Raises :class:`PromptError` for ids that are none of the model's, none at all, or more than the context
        holds; :class:`CapabilityError` for media, and for sampling that vLLM does otherwise.
        """
        self._check_open(request, n)
        if not self._facts.has_processor:
            _check_sampling(request.sampling)
        return [
            self._add(
                EngineRow(
                    handle=self._next_handle(),
                    ids=list(request.ids),
                    sampling=request.sampling,
                    seed=sample_seed(request.seed, request.first_sample + sample),
                    limit=self._limit(request) or self._facts.context_length,
                    stop_ids=request.stop_ids,
                    stop_strings=request.stop_strings,
                    salt=self._salt,
                )
            )
            for sample in range(n)
        ]

    def step(self) -> list[Update]:
        """Ask vLLM for what comes next. Blocks until something comes, at most a moment where vLLM runs by itself."""
        if self._paused or not any(row.running for row in self._rows.values()) or self._way.put_off():
            return []
        updates = []
        for row in [row for row in self._rows.values() if row.running]:
            if row.full:
                self._end(row)
                updates.append(Update(row.handle, (), (), self._weight_version, exhausted=True))
                continue
            try:
                self._way.go_on(row)
            except Exception as error:  # noqa: BLE001  # vLLM refuses this request, in errors of many kinds
                self._end(row)
                message = f"{type(error).__name__}: {error}"
                updates.append(Update(row.handle, (), (), self._weight_version, error=message))
        if any(row.running and self._way.expects(row) for row in self._rows.values()):
            for delta in self._link.poll():
                sampled_for = self._way.by_request.get(delta.request)
                if sampled_for is not None:
                    updates += self._take(sampled_for, delta)
        return updates

    def extend(self, handle: Handle, ids: Sequence[int], media: Sequence[Media] = ()) -> None:
        row = self._extend(handle, ids, media)
        self._way.extend(row, ids)
        row.running = True

    def rollback(self, handle: Handle, k: int) -> None:
        row = self._roll_back(handle, k)
        self._way.hold(row, k)

    def fork(self, handle: Handle, seed: int) -> Handle:
        """A new held row with the same ids; what vLLM has cached of them serves both."""
        source = self._row(handle)
        return self._add(
            EngineRow(
                handle=self._next_handle(),
                ids=list(source.ids),
                sampling=source.sampling,
                seed=seed,
                limit=source.limit,
                stop_ids=source.stop_ids,
                stop_strings=source.stop_strings,
                running=False,
                salt=source.salt,
            )
        )

    def close(self, handle: Handle) -> None:
        self._way.drop(self._row(handle))
        del self._rows[handle]

    def pause(self) -> None:
        """Nothing is sampled until ``resume``: the rows' requests are ended, and begun anew from their ids then."""
        super().pause()
        self._way.rest(self._rows.values())

    def set_weights(self, version: int, *, keep_cache: bool) -> None:
        """Take note that the weights in vLLM were changed.

        With ``keep_cache`` what the old weights computed serves the rows that are open, and none that is opened later;
        otherwise vLLM's prefix cache is emptied. Raises :class:`EngineError` where requests of others keep it from
        being emptied.
        """
        self._weight_version = version
        if keep_cache:
            self._salt = f"midstream-{uuid4().hex}"
            return
        for row in self._rows.values():
            self._way.drop(row)
            row.salt = None
        self._link.reset_cache()
        self._salt = None

    def shutdown(self) -> None:
        """End the rows' requests, and vLLM itself if ``from_pretrained`` started it. May be called twice."""
        if self._closed:
            return
        self._closed = True
        try:
            for row in self._rows.values():
                self._way.drop(row)
            self._rows.clear()
        finally:
            self._connection.shutdown()

    def _take(self, row: EngineRow, delta: Delta) -> list[Update]:
        if delta.error is not None or delta.finish not in (None, "stop", "length"):
            self._way.gone(row)
            self._end(row)
            message = delta.error or f"vLLM ended the request with {delta.finish!r}"
            return [Update(row.handle, (), (), self._weight_version, error=message)]
        if delta.finish is not None and not delta.ids:
            self._way.gone(row)
            self._end(row)
            return [Update(row.handle, (), (), self._weight_version, exhausted=True)]
        try:
            ids, logprobs = self._way.take(row, delta)
        except EngineError as error:
            self._end(row)
            return [Update(row.handle, (), (), self._weight_version, error=str(error))]
        if not ids:
            return []
        if not all(map(math.isfinite, logprobs)):
            self._end(row)
            message = f"the model's logits after {len(row.ids) - len(ids)} ids are not finite"
            return [Update(row.handle, (), (), self._weight_version, error=message)]
        if row.full:
            self._end(row)
        return [Update(row.handle, ids, logprobs, self._weight_version, exhausted=row.ended)]

    def _end(self, row: EngineRow) -> None:
        row.running, row.ended = False, True
        self._way.drop(row)


def _check_options(
    mode: Mode,
    patience: float,
    stop_strings: bool,
    context_length: int | None,
    eos_ids: Iterable[int] | None,
    weight_version: int,
) -> None:
    """What can be told before vLLM is started, which takes long."""
    check_mode(mode)
    checks.number("patience", patience, lambda value: value >= 0, "must be a number of seconds, 0 or more")
    checks.flag("stop_strings", stop_strings)
    checks.integer("context_length", context_length, 2, optional=True)
    if eos_ids is not None:
        checked_eos_ids(eos_ids)
    checks.integer("weight_version", weight_version, 0)


def _bounded(context: int, wanted: int | None) -> int:
    return context if wanted is None else min(context, wanted)


def _check_sampling(sampling: Sampling) -> None:
    if sampling.min_p > 0 and sampling.top_p < 1:
        raise CapabilityError(
            f"Sampling(top_p={sampling.top_p}, min_p={sampling.min_p}): vLLM applies min_p before top_p, midstream "
            "after it; use one of them, or a vLLM that has midstream's logits processor"
        )
