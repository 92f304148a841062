"""Any object with ``generate(batch)`` as an engine, in rounds that end at stop strings.

The contract is NeMo-RL's: everything is right-padded. In: ``input_ids`` ``[B, S]``, ``input_lengths`` ``[B]``
and ``stop_strings``, a list per row. Out: ``output_ids`` ``[B, S']`` (prompt and generation),
``generation_lengths`` ``[B]``, ``unpadded_sequence_lengths`` ``[B]``, and where the policy has them
``logprobs`` ``[B, S']`` (0.0 on prompt and padding) and ``truncated`` ``[B]``. Lengths are taken from these
counts alone, never from where an EOS or a pad id stands, nor from logprobs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from midstream import checks
from midstream.engines.base import Capabilities, Handle, RowRequest, Update
from midstream.engines.rows import RowKeeper, completes_stop_string
from midstream.errors import CapabilityError, ConfigurationError, EngineError, PromptError
from midstream.types import Media
from midstream.vocabulary import Vocabulary

_OWN_KEYS = ("input_ids", "input_lengths", "stop_strings")


@dataclass(slots=True)
class _PolicyRow:
    handle: Handle
    order: int
    ids: list[int]
    stop_strings: tuple[str, ...]
    running: bool = True
    ended: bool = False
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class _Round:
    """What one call of the policy gave, as lists: new ids and logprobs for each row, and what it says of them."""

    ids: list[list[int]]
    logprobs: list[list[float]]
    truncated: list[bool] | None
    has_logprobs: bool


class PolicyEngine(RowKeeper[_PolicyRow]):
    """Samples by calling ``policy.generate(batch, *args, **kwargs)`` again and again.

    - ``input_batch``: the batch whose kind (a plain dict, NeMo-RL's ``BatchedDataDict``) and other keys each
      call gets. The row that is opened k-th gets the k-th entry of those keys, and no more rows can be opened than
      it has. None: a plain dict.
    - ``pad_id``: pads ``input_ids``; by default the tokenizer's pad id, its EOS id, or 0.
    - ``args``, ``kwargs``: of every call.

    A round may end a row at another row's stop string (policies union them over a shard): the row then goes
    on. A row that the policy ended for length is ``exhausted``; where the policy says nothing of
    truncation, a row that ends at none of the stop strings and no EOS id counts as such.
    """

    def __init__(
        self,
        policy: Any,
        tokenizer: Any,
        *,
        input_batch: Any = None,
        pad_id: int | None = None,
        eos_ids: frozenset[int] | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if not callable(getattr(policy, "generate", None)):
            raise ConfigurationError(f"policy={policy!r}: must have a method generate(batch)")
        checks.instance("input_batch", input_batch, Mapping, optional=True)
        self._policy = policy
        self._vocabulary = Vocabulary.of(tokenizer)
        super().__init__(
            tokenizer, context_length=None, eos_ids=self._vocabulary.eos_ids if eos_ids is None else eos_ids
        )
        self._input_batch = {} if input_batch is None else input_batch
        self._pad_id = pad_id if pad_id is not None else default_pad_id(tokenizer)
        self._args = tuple(args)
        self._kwargs = dict(kwargs or {})
        self._context = _TorchContext.current()
        self._opened = 0
        self.gives_logprobs = True
        """Whether the policy's output had logprobs so far."""
        self.truncated_rows: set[int] = set()
        """The rows, counted in the order of opening, of which the policy said in any round that it truncated them."""
        self.failure: Exception | None = None
        """What the policy raised, or what was wrong with what it gave; rows that were open then have stopped."""

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            logprobs="raw" if self.gives_logprobs else None, sampling=False, set_weights=True, rounds=True
        )

    def open(self, request: RowRequest, n: int = 1) -> list[Handle]:
        self._check_open(request, n)
        like = self._input_batch.get("input_ids")
        if like is not None and self._opened + n > len(like):
            raise PromptError(
                f"input_batch: has {len(like)} rows, and {self._opened + n} were opened, each of which gets one in "
                "order; give another PolicyEngine to another batch, and each sample a row of its own"
            )
        handles = []
        for _ in range(n):
            row = _PolicyRow(self._next_handle(), self._opened, list(request.ids), request.stop_strings)
            handles.append(self._add(row))
            self._opened += 1
        return handles

    def step(self) -> list[Update]:
        rows = [row for row in self._rows.values() if row.running]
        if self._paused or not rows:
            return []
        batch = self._batch(rows)
        try:
            with self._context.entered():
                output = self._policy.generate(batch, *self._args, **self._kwargs)
            result = _read(output, rows)
        except Exception as error:
            self.failure = error
            raise
        self.gives_logprobs = self.gives_logprobs and result.has_logprobs
        shared = {stop_string for row in rows for stop_string in row.stop_strings}
        return [self._update(row, result, index, shared) for index, row in enumerate(rows)]

    def extend(self, handle: Handle, ids: Sequence[int], media: Sequence[Media] = ()) -> None:
        row = self._extend(handle, ids, media)
        row.ids.extend(ids)
        row.running = True

    def rollback(self, handle: Handle, k: int) -> None:
        self._roll_back(handle, k)

    def fork(self, handle: Handle, seed: int) -> Handle:
        del seed
        self._row(handle)
        raise CapabilityError(f"fork: a policy cannot fork row {handle}; the Hugging Face engine can")

    def close(self, handle: Handle) -> None:
        self._row(handle)
        del self._rows[handle]

    def set_weights(self, version: int, *, keep_cache: bool) -> None:
        del keep_cache  # each round prefills anew
        self._weight_version = version

    def shutdown(self) -> None:
        self._rows.clear()

    def _batch(self, rows: Sequence[_PolicyRow]) -> Any:
        import torch

        width = max(len(row.ids) for row in rows)
        like = self._input_batch.get("input_ids")
        device = like.device if isinstance(like, torch.Tensor) else None
        input_ids = torch.full((len(rows), width), self._pad_id, dtype=torch.int64)
        for index, row in enumerate(rows):
            input_ids[index, : len(row.ids)] = torch.tensor(row.ids, dtype=torch.int64)
        lengths = torch.tensor([len(row.ids) for row in rows], dtype=torch.int64)
        size = None if like is None else len(like)
        batch = {key: _select(value, rows, size) for key, value in self._input_batch.items() if key not in _OWN_KEYS}
        batch["input_ids"] = input_ids.to(device)
        batch["input_lengths"] = lengths.to(device)
        batch["stop_strings"] = [list(row.stop_strings) for row in rows]
        return type(self._input_batch)(batch)

    def _update(self, row: _PolicyRow, result: _Round, index: int, shared: set[str]) -> Update:
        ids = result.ids[index]
        before = tuple(row.ids)
        row.ids.extend(ids)
        truncated = None if result.truncated is None else result.truncated[index]
        exhausted = finished = False
        if truncated:
            self.truncated_rows.add(row.order)
        if not ids or truncated:
            exhausted = True  # without ids, asking again would go on for ever
        elif not completes_stop_string(self._vocabulary, before, ids, shared):
            finished = truncated is False or ids[-1] in self._eos_ids
            exhausted = not finished
        if exhausted or finished:
            row.running, row.ended = False, True
        return Update(
            row.handle, ids, result.logprobs[index], self._weight_version, exhausted=exhausted, finished=finished
        )


def default_pad_id(tokenizer: Any) -> int:
    """The tokenizer's pad id, else its EOS id, else 0."""
    for attribute in ("pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, attribute, None)
        if isinstance(value, int):
            return value
    return min(Vocabulary.of(tokenizer).eos_ids, default=0)


def _select(value: Any, rows: Sequence[_PolicyRow], size: int | None) -> Any:
    """The rows' entries of a value that has ``size`` of them; anything else goes to every call as it is."""
    orders = [row.order for row in rows]
    if isinstance(value, list | tuple) and len(value) == size:
        return type(value)([value[order] for order in orders])
    if hasattr(value, "shape") and tuple(value.shape[:1]) == (size,):  # a tensor, or an array of numpy's
        return value[orders]
    return value


def _read(output: Any, rows: Sequence[_PolicyRow]) -> _Round:
    """What the policy gave, checked. Raises :class:`EngineError` that names what is wrong."""
    values = {key: _listed(output, key) for key in ("output_ids", "generation_lengths", "unpadded_sequence_lengths")}
    optional = {key: _listed(output, key) for key in ("logprobs", "truncated") if _has(output, key)}
    for key, value in {**values, **optional}.items():
        if len(value) != len(rows):
            raise EngineError(f"policy.generate: its {key} has {len(value)} rows for {len(rows)} that were asked for")
    all_logprobs = optional.get("logprobs")
    new_ids: list[list[int]] = []
    new_logprobs: list[list[float]] = []
    for index, row in enumerate(rows):
        ids = values["output_ids"][index]
        start, new = len(row.ids), int(values["generation_lengths"][index])
        total = int(values["unpadded_sequence_lengths"][index])
        if new < 0 or total != start + new:
            raise EngineError(
                f"policy.generate: row {index} has unpadded_sequence_lengths={total}, but "
                f"input_lengths + generation_lengths = {start} + {new}"
            )
        logprobs = [0.0] * total if all_logprobs is None else all_logprobs[index]
        for key, columns in (("output_ids", ids), ("logprobs", logprobs)):
            if len(columns) < total:
                raise EngineError(
                    f"policy.generate: row {index} has unpadded_sequence_lengths={total}, but {key} has "
                    f"{len(columns)} columns"
                )
        if ids[:start] != row.ids:
            raise EngineError(f"policy.generate: row {index} came back with its input ids changed")
        new_ids.append([int(i) for i in ids[start:total]])
        new_logprobs.append([float(x) for x in logprobs[start:total]])
    truncated = optional.get("truncated")
    return _Round(
        new_ids, new_logprobs, None if truncated is None else [bool(x) for x in truncated], all_logprobs is not None
    )


def _has(output: Any, key: str) -> bool:
    return key in output and output[key] is not None


def _listed(output: Any, key: str) -> list[Any]:
    if not isinstance(output, Mapping):
        raise EngineError(f"policy.generate: gave {type(output).__name__}; it must give a mapping")
    if key not in output:
        raise EngineError(f"policy.generate: its output has no {key!r}; it has {sorted(output)}")
    value = output[key]
    listed: Any = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(listed, list):
        raise EngineError(f"policy.generate: its {key} is {type(value).__name__}; it must be a tensor")
    return listed


@dataclass(frozen=True, slots=True)
class _TorchContext:
    """What torch keeps for each thread: whoever made the engine has it set, and the policy runs in another thread."""

    gradients: bool
    inference: bool
    cuda_device: int | None

    @classmethod
    def current(cls) -> _TorchContext:
        import torch

        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        return cls(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), device)

    @contextmanager
    def entered(self) -> Iterator[None]:
        import torch

        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.gradients))
            if self.cuda_device is not None:
                stack.enter_context(torch.cuda.device(self.cuda_device))
            yield
