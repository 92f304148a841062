"""What any engine must do, tried on the engine itself.

::

    check_engine(lambda steering: MyEngine(str(steering.folder)))
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from midstream.engines.base import Engine
from midstream.errors import ConfigurationError
from midstream.sandbox import SandboxPool
from midstream.testing.checked_engine import CheckedEngine
from midstream.testing.engine_batches import BATCHES
from midstream.testing.engine_protocol import PROTOCOL, shutting_down_leaves_nothing
from midstream.testing.engine_texts import TEXTS
from midstream.testing.outcomes import CheckFailed, CheckOutcome, name_of, run_checks
from midstream.testing.remains import Remains
from midstream.testing.steering import VOCABULARY, script
from midstream.vocabulary import Vocabulary

if TYPE_CHECKING:
    from midstream.engines.base import RowRequest

CHECKS: tuple[Callable[[CheckedEngine], None], ...] = (
    *TEXTS,
    *BATCHES,
    *PROTOCOL,
    shutting_down_leaves_nothing,
)


class Steering:
    """What makes an engine say what the checks want (:mod:`midstream.testing.steering`): a model, or a script."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def folder(self) -> Path:
        """The folder of a small Llama and its tokenizer, written when it is first asked for (torch is needed)."""
        from midstream.testing.steered_model import write_steered_model

        return write_steered_model(self._folder)

    @property
    def tokenizer(self) -> Vocabulary:
        """That model's tokenizer, without transformers."""
        return VOCABULARY

    def script(self, request: RowRequest, sample: int) -> Sequence[int]:
        """What that model says for a row, for a :class:`~midstream.engines.scripted.ScriptedEngine`."""
        return script(request, sample)


def check_engine(
    make_engine: Callable[[Steering], Engine],
    *,
    tolerance: float | None = 1e-3,
    pool: SandboxPool | None = None,
    only: Collection[str] = (),
) -> tuple[CheckOutcome, ...]:
    """Hold an engine to what ours are held to; returns what was checked.

    - ``make_engine`` makes an engine that says what ``steering`` wants, over its folder if it runs models; it is
      shut down at the end. What starts before ``make_engine`` is called is not the engine's to stop.
    - ``tolerance``: by how much logprobs may differ from the steered model's. None for engines that run no model.
    - ``pool``: sandboxes for the blocks that rows write; by default some are started.
    - ``only``: names of checks, as outcomes have them, in place of all.

    Raises :class:`~midstream.testing.CheckFailed`, which names every check that failed and how, and
    :class:`~midstream.errors.ConfigurationError` for an engine that these checks do not fit: one that exchanges no
    ids, or has another tokenizer.
    """
    checks = _chosen(only)
    own_pool = SandboxPool(preload=[]) if pool is None else None
    try:
        if own_pool is not None:
            own_pool.start()
        before = Remains.now()
        with tempfile.TemporaryDirectory(prefix="midstream-steered-") as folder:
            engine = make_engine(Steering(Path(folder) / "model"))
            try:
                _check_fits(engine)
                outcomes = run_checks(checks, CheckedEngine(engine, pool or own_pool, tolerance, before))
            finally:
                engine.shutdown()
    finally:
        if own_pool is not None:
            own_pool.close()
    if not all(outcome.passed for outcome in outcomes):
        raise CheckFailed(outcomes)
    return outcomes


def _chosen(only: Collection[str]) -> tuple[Callable[[CheckedEngine], None], ...]:
    known = {name_of(check): check for check in CHECKS}
    unknown = sorted(set(only) - known.keys())
    if unknown:
        raise ConfigurationError(f"only: there is no check {unknown[0]!r}; there are {', '.join(known)}")
    return CHECKS if not only else tuple(check for name, check in known.items() if name in only)


def _check_fits(engine: Engine) -> None:
    if not engine.capabilities.exact_ids:
        raise ConfigurationError("make_engine: this engine exchanges text, not ids, so there is nothing to hold it to")
    vocabulary = Vocabulary.of(engine.tokenizer)
    differing = [i for i in range(VOCABULARY.size) if vocabulary.piece(i) != VOCABULARY.piece(i)]
    if differing or engine.eos_ids != VOCABULARY.eos_ids:
        raise ConfigurationError(
            "make_engine: the engine's tokenizer or its ends of sequence are not the steered model's; "
            "make it over steering.folder, or with steering.tokenizer"
        )
