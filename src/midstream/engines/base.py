"""What an engine is: the smallest protocol that an own decode loop, vLLM, stop-string rounds and servers share.

An engine samples ids for open rows and knows nothing of blocks, tags or sandboxes. The driver
(``midstream.generation``) opens rows, calls ``step`` again and again, and tells the engine what became of
the ids: the rows of midstream decide which ids count.

A handle is in one of two states. *Running*: every ``step`` may sample ids for it. *Held*: nothing is
sampled until ``extend``. ``open`` gives running handles; ``rollback`` holds; ``extend`` lets go on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from midstream.types import LogprobKind, Media, Sampling

Handle = int
"""Names one open row of an engine. Never used again after ``close``."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine can do. What it lacks is refused with an error that says so, before work starts.

    - ``logprobs``: the kind it returns, or None (then trajectories are not fit for training).
    - ``exact_ids``: ids in, ids out (False for text-only servers).
    - ``greedy``, ``top_k``, …: whether :class:`~midstream.types.Sampling` is honoured (False where the
      object behind the engine samples by settings of its own; then only the default is accepted).
    - ``fork``: ``fork`` works. ``media``: images may be given. ``set_weights``: versions are tracked.
    - ``keyed_noise``: sampling noise is keyed by (seed, position), so that nothing shifts it.
    - ``rounds``: a step samples many ids a row before it returns, so that it pays to let rows whose code is
      almost done join the next one.
    """

    logprobs: LogprobKind | None = "raw"
    exact_ids: bool = True
    sampling: bool = True
    fork: bool = False
    media: bool = False
    set_weights: bool = False
    keyed_noise: bool = False
    rounds: bool = False


@dataclass(frozen=True, slots=True)
class RowRequest:
    """What an engine needs to know to sample for one row.

    - ``ids``: all ids so far (a resumed row brings more than its prompt).
    - ``seed``: 64-bit key of the prompt's sampling noise. Sample number ``k`` of the prompt is keyed by
      :func:`sample_seed` of it and ``k``; with the position of an id in the row, that determines the noise
      that samples the id. ``first_sample``: the number of the first sample that is opened (a resumed row
      keeps its number).
    - ``max_total_tokens``: the row never holds more ids than this; an engine may size its cache by it.
    - ``stop_strings``: texts at which an engine that works in rounds should hand back (end tags, and the
      row's own stop strings). Others may ignore them: rows find them in the ids.
    - ``stop_ids``: ids at which an engine that works in rounds should hand back, EOS included.
    """

    ids: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    first_sample: int = 0
    max_total_tokens: int | None = None
    stop_strings: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    media: tuple[Media, ...] = ()


@dataclass(frozen=True, slots=True)
class Update:
    """New ids of one row, in order.

    ``logprobs`` has one value per id (0.0 where ``Capabilities.logprobs`` is None).
    An update with one of these is the row's last: ``error``: it failed in the engine. ``exhausted``: no
    more ids will come though nothing ended the row (its context is full, or a limit of the engine's own is
    reached). ``finished``: the engine ended the row at its last id, by a stop id of the engine's own.
    """

    handle: Handle
    ids: Sequence[int]
    logprobs: Sequence[float]
    weight_version: int = 0
    error: str | None = None
    exhausted: bool = False
    finished: bool = False


@runtime_checkable
class Engine(Protocol):
    """Where tokens come from. Driven from one thread at a time."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of its vocabulary: anything that :meth:`midstream.decoding.Vocabulary.of` takes."""

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def context_length(self) -> int | None:
        """The most ids that a row may hold, or None where nothing bounds it."""

    @property
    def eos_ids(self) -> frozenset[int]:
        """The ids that end a sequence for this model."""

    @property
    def weight_version(self) -> int:
        """The version of the weights that sample now."""

    def open(self, request: RowRequest, n: int = 1) -> list[Handle]:
        """Open ``n`` rows that start from the same ids, and return their handles.

        They are samples ``request.first_sample`` and on, and share the prefill where the engine can.
        """

    def step(self) -> list[Update]:
        """Sample for the running rows and return what is new. Blocks for about one decode step.

        Without running rows it returns at once with an empty list.
        """

    def extend(self, handle: Handle, ids: Sequence[int], media: Sequence[Media] = ()) -> None:
        """Append ``ids`` (there may be none) to a held row and let it run."""

    def rollback(self, handle: Handle, k: int) -> None:
        """Forget the row's last ``k`` ids (there may be none) and hold it."""

    def fork(self, handle: Handle, seed: int) -> Handle:
        """A new held row with the same ids, whose noise is keyed by ``seed``."""

    def close(self, handle: Handle) -> None:
        """Forget the row, running or held."""

    def pause(self) -> None:
        """Come to rest between two steps, so that weights may change."""

    def set_weights(self, version: int, *, keep_cache: bool) -> None:
        """The weights were changed (by the caller) to ``version``; recompute the cache unless kept."""

    def resume(self) -> None:
        """Go on after ``pause``."""

    def shutdown(self) -> None:
        """Give back what the engine holds. May be called twice."""


def sample_seed(seed: int, sample: int) -> int:
    """The 64-bit key of sample number ``sample`` of a prompt whose key is ``seed``."""
    return _digest(f"sample:{seed}:{sample}")


def prompt_seed(seed: int, prompt_id: str) -> int:
    """The 64-bit key of the prompt named ``prompt_id`` under a generator's ``seed``."""
    return _digest(f"prompt:{seed}:{prompt_id}")


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
