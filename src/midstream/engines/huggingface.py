"""An engine over any decoder-only ``AutoModelForCausalLM`` of transformers, with a decode loop of its own.

``model.generate`` cannot take ids in the middle of a sequence without computing the rest anew. This loop
keeps each row's keys and values while the row waits for a result, computes the result as one chunk behind
them, and meanwhile goes on with the other rows. Rows come and go at any step.

Logprobs are raw: the float32 log-softmax of the model's own logits at the sampled id, before temperature
and filters. Noise is a function of the row's seed and the position of the id in the row
(:mod:`midstream.engines.noise`), so batch-mates, their order, held rows and rollbacks do not shift it. What
remains is the arithmetic of the model, which may round differently in batches of other shapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from midstream.engines.base import Capabilities, Handle, RowRequest, Update, sample_seed
from midstream.engines.model_facts import check_decoder, context_bound, end_of_sequence_ids
from midstream.engines.noise import uniform
from midstream.engines.rows import RowKeeper, check_integer
from midstream.engines.runner_choice import choose_runner
from midstream.engines.sampling import draw
from midstream.engines.scheduling import EngineRow, Places, Plan, plan
from midstream.errors import ConfigurationError, EngineError
from midstream.types import Media

_CAPABILITIES = Capabilities(logprobs="raw", fork=True, set_weights=True, keyed_noise=True)


@dataclass(slots=True)
class Statistics:
    """Counts since the engine was made.

    - ``steps``: calls of ``step`` that computed something; ``forwards``: calls of the model.
    - ``computed``: ids put through the model (padding not counted); ``shared``: ids whose keys and values
      were copied from another row instead.
    - ``sampled``: ids sampled.
    - ``evicted``: rows that waited for results and lost their cached keys and values to others meanwhile.
    - ``cache_bytes``: memory that keys and values take now, where all rows share one cache (else 0).
    """

    steps: int = 0
    forwards: int = 0
    computed: int = 0
    shared: int = 0
    sampled: int = 0
    evicted: int = 0
    cache_bytes: int = 0


class HuggingFaceEngine(RowKeeper[EngineRow]):
    """Samples from ``model`` for many rows at once.

    - ``model``: a decoder-only model with a language-modelling head; it is put into eval mode, on the device
      and in the dtype it comes with.
    - ``tokenizer``: handed on to whoever asks; the engine itself works on ids alone.
    - ``max_batch_size``: the most rows that decode together; others wait for their turn.
    - ``max_cached_rows``: the most rows whose keys and values are kept, rows that wait for results included
      (by default twice ``max_batch_size``). It bounds the cache's memory, which is this many times the longest
      row's. Where rows that could decode find no place, the row that has waited longest for its result loses
      its own, and is computed anew when it goes on.
    - ``evict_waiting``: off, rows that wait for results keep their places, however long that takes, and rows
      beyond ``max_cached_rows`` wait until one is closed.
    - ``context_length``: the most ids of a row, if fewer than the model has positions for.
    - ``prefill_chunk``: the most ids of prompts and results that one step computes. Larger is faster for the
      whole, smaller lets rows that decode wait less.
    - ``eos_ids``: by default those of the model's generation config, its config or the tokenizer, the first
      that has any.
    - ``weight_version``: of the weights that the model comes with.

    Models with full or sliding-window attention share one ragged cache. For others a warning is logged, and
    their rows are decoded one by one (:mod:`midstream.engines.runner_choice`).

    Raises :class:`ConfigurationError` for a model or an option that cannot work.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_batch_size: int = 16,
        max_cached_rows: int | None = None,
        context_length: int | None = None,
        evict_waiting: bool = True,
        prefill_chunk: int = 2048,
        eos_ids: Iterable[int] | None = None,
        weight_version: int = 0,
    ) -> None:
        check_integer("max_batch_size", max_batch_size, 1)
        check_integer("prefill_chunk", prefill_chunk, 1)
        if context_length is not None:
            check_integer("context_length", context_length, 2)
        if max_cached_rows is not None:
            check_integer("max_cached_rows", max_cached_rows, max_batch_size)
        if not isinstance(evict_waiting, bool):
            raise ConfigurationError(f"evict_waiting={evict_waiting!r}: must be True or False")
        check_decoder(model)
        model.eval()
        super().__init__(
            tokenizer,
            context_length=context_bound(model, context_length),
            eos_ids=end_of_sequence_ids(model, tokenizer) if eos_ids is None else eos_ids,
            weight_version=weight_version,
            vocabulary_size=model.get_input_embeddings().weight.shape[0],
        )
        self._model = model
        self._max_batch_size = max_batch_size
        self._evict_waiting = evict_waiting
        self._prefill_chunk = prefill_chunk
        with torch.inference_mode():
            runner = choose_runner(model, limit=self._context_length)
        self._runner = runner
        self._places = Places(runner, max_cached_rows or 2 * max_batch_size)
        self._statistics = Statistics()
        self._holds = 0

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        attention: str | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> Self:
        """Load model and tokenizer from a folder or a hub name, and make an engine of them.

        ``device``: by default CUDA where there is one, else the CPU. ``dtype``: ``"auto"`` is the
        checkpoint's own. ``attention``: transformers' ``attn_implementation``. ``options``: those of the
        engine itself.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        attention_option = {} if attention is None else {"attn_implementation": attention}
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, trust_remote_code=trust_remote_code, **attention_option
            )
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"path={path!r}: no causal language model can be loaded from it: {error}"
            ) from error
        return cls(model.to(device), tokenizer, **options)

    @property
    def model(self) -> Any:
        return self._model

    @property
    def capabilities(self) -> Capabilities:
        return _CAPABILITIES

    @property
    def statistics(self) -> Statistics:
        self._statistics.shared = self._places.shared
        self._statistics.evicted = self._places.evicted
        self._statistics.cache_bytes = self._runner.memory
        self._statistics.forwards = self._runner.passes
        return self._statistics

    def open(self, request: RowRequest, n: int = 1) -> list[Handle]:
        """Open ``n`` rows. Any number may be opened: rows that find no place wait for one.

        Raises :class:`PromptError` for ids that are none of the model's, none at all, or more than the
        context holds; :class:`CapabilityError` for media.
        """
        self._check_open(request, n)
        return [
            self._add(
                EngineRow(
                    handle=self._next_handle(),
                    ids=list(request.ids),
                    sampling=request.sampling,
                    seed=sample_seed(request.seed, request.first_sample + sample),
                    limit=self._limit(request),
                )
            )
            for sample in range(n)
        ]

    def step(self) -> list[Update]:
        """Compute one chunk of prompts and results, and one id for each row that decodes."""
        if self._paused:
            return []
        if self._model.training:
            self._model.eval()
        with torch.inference_mode():
            updates = self._end_full_rows()
            work = self._plan()
            if work.chunks or work.decode:
                rows, logits = self._forward(work)
                self._statistics.steps += 1
                if rows:
                    updates += self._sample(rows, logits)
        return updates

    def extend(self, handle: Handle, ids: Sequence[int], media: Sequence[Media] = ()) -> None:
        row = self._extend(handle, ids, media)
        row.ids.extend(ids)
        row.running = True
        row.started = True

    def rollback(self, handle: Handle, k: int) -> None:
        row = self._roll_back(handle, k)
        self._holds += 1
        row.held_since = self._holds
        if not row.sound:
            if row.place is not None:
                self._runner.clear(row.place)
            row.cached, row.sound = 0, True
        if row.cached >= len(row.ids):
            row.cached = len(row.ids) - 1 if self._places.appends else 0

    def fork(self, handle: Handle, seed: int) -> Handle:
        """A new held row with the same ids. It copies the row's cache if a place is free, else computes it anew."""
        source = self._row(handle)
        forked = EngineRow(
            handle=self._next_handle(),
            ids=list(source.ids),
            sampling=source.sampling,
            seed=seed,
            limit=source.limit,
            running=False,
            started=source.started,
        )
        self._add(forked)
        if source.place is not None and self._places.give(forked):
            with torch.inference_mode():
                self._places.reserve(source.cached)
                self._places.copy(source, forked)
        return forked.handle

    def close(self, handle: Handle) -> None:
        row = self._row(handle)
        with torch.inference_mode():
            self._places.leave(row, sound=row.sound)
        del self._rows[handle]

    def set_weights(self, version: int, *, keep_cache: bool) -> None:
        """Take note that the model's weights were changed, in place.

        With ``keep_cache`` open rows go on over what the old weights computed of them; else it is computed
        anew. What closed rows left, and what other rows' prompts would share, is forgotten in either case.
        """
        self._weight_version = version
        self._places.renew(keep_cache=keep_cache)

    def shutdown(self) -> None:
        """Close all rows and give back the cache's memory. The model is the caller's and stays."""
        self._rows.clear()
        places = self._places
        self._places = Places(self._runner, places.most, shared=places.shared, evicted=places.evicted)
        self._runner.release()

    def _end_full_rows(self) -> list[Update]:
        """Rows that are as long as they may be, with no id sampled for them to say so."""
        full = [row for row in self._rows.values() if row.running and row.full]
        for row in full:
            row.running, row.ended = False, True
        return [Update(row.handle, (), (), self._weight_version, exhausted=True) for row in full]

    def _plan(self) -> Plan:
        self._give_places()
        rows = [row for row in self._places.rows() if row.running][: self._max_batch_size]
        if not rows:
            return Plan([], [])
        self._places.reserve(max(len(row.ids) for row in rows))
        self._places.compact([row for row in rows if row.pending == 1])
        return plan(rows, self._places, self._prefill_chunk)

    def _give_places(self) -> None:
        """Places for the rows that want one, the oldest first; from rows that wait, while the batch is not full."""
        running = [row for row in self._rows.values() if row.running]
        placed = sum(row.place is not None for row in running)
        for row in running:
            if row.place is not None:
                continue
            if not self._places.give(row):
                if not self._evict_waiting or placed >= self._max_batch_size or not self._places.evict():
                    return
                self._places.give(row)
            placed += 1

    def _forward(self, work: Plan) -> tuple[list[EngineRow], Tensor]:
        """Compute what is planned: the rows that now want an id, and the logits to sample it from."""
        computed = [*work.chunks, *work.decode]
        try:
            logits = self._runner.forward([chunk for _, chunk in computed])
        except BaseException as error:
            if not self._places.appends:
                # Caches that the pass had begun to change are gone.
                for row, _ in computed:
                    row.cached = 0
            if isinstance(error, RuntimeError):
                raise EngineError(f"the model's forward pass failed: {error}") from error
            raise
        for row, chunk in computed:
            row.cached = chunk.end if self._runner.decodes else 0
            self._statistics.computed += len(chunk.ids)
        ready = [index for index, (row, chunk) in enumerate(computed) if chunk.end == len(row.ids)]
        if len(ready) < len(computed):
            logits = logits[torch.tensor(ready, dtype=torch.long).to(logits.device)]
        return [computed[index][0] for index in ready], logits

    def _sample(self, rows: Sequence[EngineRow], logits: Tensor) -> list[Update]:
        settings = [row.sampling for row in rows]
        noise = [0.5 if row.sampling.greedy else uniform(row.seed, len(row.ids)) for row in rows]
        ids, logprobs = draw(logits, settings, noise)
        return [self._accept(*drawn) for drawn in zip(rows, ids, logprobs, strict=True)]

    def _accept(self, row: EngineRow, token_id: int, logprob: float) -> Update:
        if not math.isfinite(logprob):
            row.running, row.ended, row.sound = False, True, False
            message = f"the model's logits after {len(row.ids)} ids are not finite"
            return Update(row.handle, (), (), self._weight_version, error=message)
        row.ids.append(token_id)
        row.started = True
        self._statistics.sampled += 1
        if row.full:
            row.running, row.ended = False, True
        return Update(row.handle, (token_id,), (logprob,), self._weight_version, exhausted=row.ended)
