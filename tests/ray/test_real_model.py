"""Replicas with a real model in them sample what one engine samples, whatever dies, and take new weights together."""

from __future__ import annotations

import functools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray

import midstream as ms
from midstream.distributed.ray import RayGenerator, RayPool
from midstream.observing import BlockBegan, FirstToken, Observation
from tests.ray.conftest import eventually

MODEL = Path(ms.__file__).parent / "demo"
HELD_OUT = Path(__file__).parents[2] / "examples" / "calculator" / "held_out.jsonl"
QUESTIONS = [json.loads(line)["question"] for line in HELD_OUT.read_text().splitlines()[::64]]
PROMPTS = [ms.Prompt(text=f"Q: {question}\nA:", id=question) for question in QUESTIONS]
LIMITS = ms.Limits(max_new_tokens=120)
GREEDY, SEEDED = ms.Sampling(temperature=0), ms.Sampling()
SAMPLES = 3
HELD_AT = 12
NEW = 5
"""The version of the weights that come later."""


def make_engine() -> Any:
    """In double precision, so that what a batch's shape does to the last bits cannot turn an id."""
    import torch

    torch.set_num_threads(1)
    return ms.HuggingFaceEngine.from_pretrained(str(MODEL), device="cpu", dtype="float64")


def make_held_engine() -> Any:
    """One that makes no more than ``HELD_AT`` steps with the weights that it comes with."""

    class HeldEngine(ms.HuggingFaceEngine):
        def step(self) -> list[ms.Update]:
            if self.weight_version == 0 and self.statistics.steps >= HELD_AT:
                time.sleep(0.01)
                return []
            return super().step()

    model = make_engine()
    return HeldEngine(model.model, model.tokenizer)


def new_weights() -> dict[str, Any]:
    """Of a model that says much the same, less sure of it."""
    return {name: weight * 0.97 for name, weight in make_engine().model.state_dict().items()}


def load(reference: Any, engine: Any) -> None:
    """As a trainer's would: it is in Ray's store, and fetched by each replica."""
    engine.model.load_state_dict(ray.get(reference))


@pytest.fixture(scope="module")
def update(cluster: Any) -> Callable[[Any], None]:
    return functools.partial(load, ray.put(new_weights()))


class AtBlock:
    """An observer that does something as block number ``at`` of a batch begins."""

    def __init__(self) -> None:
        self.at(0, lambda: None)

    def at(self, block: int, action: Callable[[], None]) -> None:
        self._blocks, self._at, self._action = 0, block, action

    def __call__(self, observation: Observation) -> None:
        if isinstance(observation, BlockBegan):
            self._blocks += 1
            if self._blocks == self._at:
                self._action()


@pytest.fixture(scope="module")
def pool(cluster: Any) -> Iterator[RayPool]:
    with RayPool(preload=[], start_timeout=300) as pool:
        yield pool


@pytest.fixture(scope="module")
def at_block() -> AtBlock:
    return AtBlock()


@pytest.fixture(scope="module", params=[GREEDY, SEEDED], ids=["greedy", "seeded"])
def generator(request: pytest.FixtureRequest, pool: RayPool, at_block: AtBlock) -> Iterator[RayGenerator]:
    with RayGenerator(
        make_engine,
        replicas=2,
        resources={"num_cpus": 0},
        rows_per_replica=4,
        samples_together=2,
        pool=pool,
        limits=LIMITS,
        sampling=request.param,
        observers=[at_block],
    ) as generator:
        yield generator


@functools.cache
def expected(sampling: ms.Sampling, version: int) -> ms.TrajectoryBatch:
    """What one engine in this process says."""
    engine = make_engine()
    if version == NEW:
        engine.model.load_state_dict(new_weights())
        engine.set_weights(NEW, keep_cache=False)
    pool = ms.SandboxPool(preload=[])
    with pool, ms.Generator(engine, pool=pool, limits=LIMITS, sampling=sampling) as generator:
        return generator.generate(PROMPTS, SAMPLES)


def check(batch: ms.TrajectoryBatch, generator: RayGenerator) -> None:
    """It is the batch of one engine with the generator's weights, and is sound."""
    version = generator.engine.weight_version
    wanted = expected(generator.sampling, version)
    assert [told(trajectory) for trajectory in batch] == [told(trajectory) for trajectory in wanted]
    for trajectory, one in zip(batch, wanted, strict=True):
        assert own(trajectory, trajectory.logprobs) == pytest.approx(own(one, one.logprobs), abs=1e-6)
        assert set(own(trajectory, trajectory.weight_versions)) == {version}
    assert not any(batch.verify())


def told(trajectory: ms.Trajectory) -> tuple[Any, ...]:
    results = [record.result.text for record in trajectory.calls if record.result is not None]
    return trajectory.prompt.id, trajectory.sample, trajectory.ids, trajectory.mask, trajectory.stop, results


def own(trajectory: ms.Trajectory, values: Sequence[Any]) -> list[Any]:
    """Those of the ids that were sampled."""
    return [value for value, sampled in zip(values, trajectory.mask, strict=True) if sampled]


def test_replicas_sample_what_one_engine_samples(generator: RayGenerator) -> None:
    batch = generator.generate(PROMPTS, SAMPLES)
    check(batch, generator)
    assert len({report.process_id for report in generator.engine.replicas}) == 2
    assert sum(len(trajectory.calls) for trajectory in batch) >= len(batch)
    different = {tuple(trajectory.ids) for trajectory in batch}
    assert len(different) == len(PROMPTS) if generator.sampling.greedy else len(different) > len(PROMPTS)


def test_new_weights_are_on_every_replica_and_on_the_one_that_replaces_a_killed_one(
    generator: RayGenerator, at_block: AtBlock, update: Callable[[Any], None]
) -> None:
    generator.update_weights(update, NEW)
    after = generator.generate(PROMPTS, SAMPLES)
    check(after, generator)
    for old, new in zip(expected(generator.sampling, 0), after, strict=True):
        assert own(old, old.logprobs) != pytest.approx(own(new, new.logprobs), abs=1e-3)

    killed: list[int] = []

    def kill() -> None:
        killed.append(generator.engine.replicas[0].process_id)
        os.kill(killed[0], signal.SIGKILL)

    at_block.at(3, kill)  # most rows wait for a place then, and every replica has as many as it may
    check(generator.generate(PROMPTS, SAMPLES), generator)
    assert len(killed) == 1
    eventually(lambda: killed[0] not in {report.process_id for report in generator.engine.replicas})
    eventually(lambda: len(generator.engine.replicas) == 2)
    check(generator.generate(PROMPTS, SAMPLES), generator)


def test_weights_that_change_in_the_middle_of_a_batch(pool: RayPool, update: Callable[[Any], None]) -> None:
    """Each id carries the version that it was sampled with, and has the logprob that those weights give it."""
    begun, batches = threading.Event(), []

    def observe(observation: Observation) -> None:
        if isinstance(observation, FirstToken):
            begun.set()

    with RayGenerator(
        make_held_engine,
        replicas=2,
        resources={"num_cpus": 0},
        pool=pool,
        limits=LIMITS,
        observers=[observe],
    ) as generator:
        running = threading.Thread(target=lambda: batches.append(generator.generate(PROMPTS, SAMPLES)))
        running.start()
        assert begun.wait(300)
        generator.update_weights(update, NEW)
        running.join()
    (batch,) = batches
    assert len(batch) == len(PROMPTS) * SAMPLES
    assert not any(batch.verify())
    versions = [own(trajectory, trajectory.weight_versions) for trajectory in batch]
    assert all(each == sorted(each) for each in versions)
    assert {version for each in versions for version in each} == {0, NEW}
    old, new = (logprobs_of(weights, batch) for weights in (None, new_weights()))
    for trajectory, by_old, by_new in zip(batch, old, new, strict=True):
        wanted = [
            second if version == NEW else first
            for first, second, version in zip(by_old, by_new, trajectory.weight_versions, strict=True)
        ]
        assert own(trajectory, trajectory.logprobs) == pytest.approx(own(trajectory, wanted), abs=1e-5)


def logprobs_of(weights: dict[str, Any] | None, batch: ms.TrajectoryBatch) -> list[list[float]]:
    """Each id's logprob in one pass of the model over the whole row; the first id has none."""
    import torch

    model = make_engine().model
    if weights is not None:
        model.load_state_dict(weights)
    found = []
    for trajectory in batch:
        ids = torch.tensor([trajectory.ids])
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1)
        found.append([0.0, *logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist()])
    return found
