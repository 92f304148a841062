"""Rows of a real model that writes code: paused, gone on with, forked, and exact all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

import midstream
from midstream import Generator, HuggingFaceEngine, Limits, Sampling, SandboxPool, Trajectory, TrajectoryBatch, Update
from midstream.engines.base import sample_seed
from midstream.engines.noise import uniform
from midstream.engines.sampling import filtered
from tests.generation.test_forking import forkable as forkable
from tests.rollouts import shown

DEMO = Path(midstream.__file__).parent / "demo"
PROMPTS = [
    "Q: What is left when 267 is divided by 10078?\nA:",
    "Q: How many times does 117 go into 49?\nA:",
    "Q: What is 53 times 91754?\nA:",
]
SAMPLED = Sampling(temperature=0.9, top_p=0.98)
LIMITS = Limits(max_new_tokens=90)


class Stepping(HuggingFaceEngine):
    """Calls ``at_step`` after each step, with how many there have been."""

    at_step: Callable[[int], None] = staticmethod(lambda step: None)

    def step(self) -> list[Update]:
        updates = super().step()
        self.at_step(self.statistics.steps)
        return updates


@pytest.fixture
def engine() -> Iterator[Stepping]:
    torch.set_num_threads(1)
    engine = Stepping.from_pretrained(str(DEMO), max_batch_size=4)
    yield engine
    engine.shutdown()


def parts(row: Trajectory) -> Any:
    """What must be equal to the id; versions and logprobs aside."""
    return [(segment.origin, segment.ids) for segment in row.segments], shown(row), row.stop


def check_exact(engine: HuggingFaceEngine, row: Trajectory, key: int, start: int, tolerance: float = 1e-4) -> int:
    """Generated ids from ``start`` on are those that the noise under ``key`` names, with their logprobs."""
    with torch.inference_mode():
        logits = engine.model(input_ids=torch.tensor([row.ids])).logits[0].float()
    checked = 0
    for position, (token_id, own) in enumerate(zip(row.ids, row.mask, strict=True)):
        if not own:
            continue
        before = logits[position - 1]
        assert abs(before.log_softmax(-1)[token_id].item() - row.logprobs[position]) <= tolerance
        if position >= start:
            probabilities = filtered(before[None], [row.sampling])[0].double().softmax(-1)
            above = probabilities[: token_id + 1].sum().item()
            below = above - probabilities[token_id].item()
            assert below - tolerance <= uniform(key, position) <= above + tolerance
            checked += 1
    return checked


@pytest.mark.parametrize("hold", [0.0, 60.0], ids=["rebuilt", "held"])
@pytest.mark.parametrize("sampling", [SAMPLED, Sampling(temperature=0)], ids=["sampled", "greedy"])
def test_rows_joined_over_many_batches_and_weights_are_those_of_one(
    engine: Stepping, sandboxes: SandboxPool, sampling: Sampling, hold: float
) -> None:
    options: dict[str, Any] = {"pool": sandboxes, "limits": LIMITS, "sampling": sampling, "seed": 5}
    with Generator(engine, **options) as generator:
        whole = generator.generate(PROMPTS, n=2)
        assert max(len(row.calls) for row in whole) >= 1
    with Generator(engine, hold_sessions=hold, **options) as generator:
        batch, finished, version = generator.generate(PROMPTS, n=2, min_finished=2), {}, engine.weight_version
        versions = {(row.prompt.id, row.sample): [version] * sum(row.mask) for row in batch}
        while True:
            finished |= {(row.prompt.id, row.sample): row for row in batch if not row.stop.resumable}
            if not batch.unfinished:
                break
            version += 1
            generator.update_weights(lambda: None, version)  # the same ones, so that nothing else changes
            until = engine.statistics.steps + 4
            engine.at_step = lambda step, until=until: generator.interrupt() if step == until else None
            batch = generator.generate(batch.unfinished)
            for row in batch:
                before = versions[row.prompt.id, row.sample]
                before += [version] * (sum(row.mask) - len(before))
        joined = [finished[row.prompt.id, row.sample] for row in whole]
        assert [generator.record(row) for row in joined]
        assert TrajectoryBatch(joined, generator.record).verify() == [[] for _ in joined]
    assert version > 2
    assert [parts(row) for row in joined] == [parts(row) for row in whole]
    for row, alone in zip(joined, whole, strict=True):
        assert row.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
        own = [version for version, generated in zip(row.weight_versions, row.mask, strict=True) if generated]
        assert own == versions[row.prompt.id, row.sample]


def test_a_fork_takes_over_the_cache_and_the_session_and_is_exact(engine: Stepping, forkable: SandboxPool) -> None:
    futures: list[Future[list[int]]] = []
    with Generator(engine, pool=forkable, limits=LIMITS, sampling=SAMPLED, seed=5) as generator:

        def at_step(step: int) -> None:
            """Once the first row's block has run, and then once more in the middle of its answer."""
            if generator.progress.calls and len(futures) < 2:
                futures.append(generator.fork("0", n=2))

        whole = generator.generate(PROMPTS[:1])
        alone = engine.statistics.computed
        engine.at_step = at_step
        rows = generator.generate(PROMPTS[:1])
        assert rows.verify() == [[]] * len(rows)
    assert [future.result(0) for future in futures] == [[1, 2], [3, 4]]
    assert [row.sample for row in rows] == [0, 1, 2, 3, 4]
    assert parts(rows[0]) == parts(whole[0])
    for row in rows[1:]:
        (point,) = row.lineage
        assert row.ids[: point.length] == rows[0].ids[: point.length]
        assert check_exact(engine, row, sample_seed(row.seed, row.sample), point.length) > 0
    assert rows[1].lineage[0].length < rows[3].lineage[0].length
    # Nothing of what came before was computed for the copies: only what each has behind its fork.
    behind = sum(row.total_length - row.lineage[0].length + 1 for row in rows[1:])
    assert engine.statistics.computed - alone <= len(rows[0].ids) + behind
