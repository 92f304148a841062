"""Replicas of an engine are one engine: the same trajectories, wherever they are sampled, whatever dies."""

from __future__ import annotations

import functools
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray

import midstream as ms
from midstream.distributed.ray import RayEngine, RayGenerator, RayPool
from midstream.engines.base import RowRequest
from midstream.errors import CapabilityError, EngineError
from midstream.observing import Observation, SessionClosed, SessionRan
from midstream.testing import check_engine
from tests.ray.conftest import STORE, eventually
from tests.ray.tokens import bytes_tokenizer

LIGHT = {"num_cpus": 0}
SAID = {
    f"{n}": f"<code>x = {n}</code> so <code>x = ten_times(x)</code> and then <code>x + 1</code>" + " on" * n
    for n in range(8)
}
PROMPTS = [ms.Prompt(text=text, id=text) for text in SAID]


def goes_on(text: str) -> str:
    """What a row says whose whole text is this: as a model does, whichever engine has begun it."""
    said = re.sub("<result>.*?</result>", "", text[1:])
    return SAID[text[0]].removeprefix(said)


def make_engine() -> ms.Engine:
    return ms.ScriptedEngine(bytes_tokenizer(), lambda request, sample: goes_on)


def ten_times(value: int) -> int:
    """Ten times."""
    return value * 10


def length(trajectory: ms.Trajectory) -> float:
    return trajectory.generation_length


def told(trajectory: ms.Trajectory) -> tuple[Any, ...]:
    """All that must not depend on where it was sampled."""
    kept = (trajectory.ids, trajectory.mask, trajectory.logprobs, trajectory.stop, trajectory.sample)
    results = tuple(record.result.text for record in trajectory.calls if record.result is not None)
    return (trajectory.prompt.id, *map(repr, kept), results, trajectory.reward)


@functools.cache
def expected(n: int) -> list[tuple[Any, ...]]:
    with ms.SandboxPool(preload=[]) as pool, ms.Generator(make_engine(), tools=[ten_times], pool=pool) as generator:
        return [told(trajectory) for trajectory in generator.generate(PROMPTS, n, reward=length)]


@pytest.fixture(scope="module")
def pool(cluster: Any) -> Iterator[RayPool]:
    with RayPool(preload=[], start_timeout=300) as pool:
        yield pool


class Tool:
    """The tool, at whose call number ``at`` something happens."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.at(0, lambda: None)

    def at(self, call: int, action: Callable[[], None]) -> None:
        self._calls, self._at, self._action = 0, call, action

    def ten_times(self, value: int) -> int:
        """Ten times."""
        with self._lock:
            self._calls += 1
            if self._calls == self._at:
                self._action()
        return value * 10


@pytest.fixture(scope="module")
def tool() -> Tool:
    return Tool()


@pytest.fixture(scope="module")
def shared(pool: RayPool, tool: Tool) -> Iterator[RayGenerator]:
    with RayGenerator(
        make_engine,
        replicas=2,
        resources=LIGHT,
        pool=pool,
        tools=[tool.ten_times],
        rows_per_replica=4,
        samples_together=2,
    ) as generator:
        yield generator


@pytest.fixture
def generator(shared: RayGenerator, tool: Tool) -> RayGenerator:
    """With all of its replicas, and a tool at which nothing happens yet."""
    tool.at(0, lambda: None)
    eventually(lambda: len(shared.engine.replicas) == 2)
    return shared


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)


# --- an engine like any other


def test_it_is_an_engine_like_any_other(cluster: Any) -> None:
    """The public checks that every engine is held to."""

    def make() -> ms.Engine:
        from midstream.testing.steering import VOCABULARY, script

        return ms.ScriptedEngine(VOCABULARY, script, tokens_per_step=3)

    with ms.SandboxPool(preload=[]) as pool:
        outcomes = check_engine(
            lambda _: RayEngine(make, replicas=2, resources=LIGHT, rows_per_replica=4, samples_together=2),
            tolerance=None,
            pool=pool,
        )
    assert all(outcome.passed for outcome in outcomes)
    assert len(outcomes) >= 16


def test_trajectories_are_those_of_one_engine(generator: RayGenerator) -> None:
    batch = generator.generate(PROMPTS, 4, reward=length)
    assert [told(trajectory) for trajectory in batch] == expected(4)
    assert not any(batch.verify())
    assert len({report.process_id for report in generator.engine.replicas}) == 2


async def test_a_stream_gives_each_as_it_ends(generator: RayGenerator) -> None:
    streamed = [told(trajectory) async for trajectory in generator.stream(PROMPTS, 2, reward=length)]
    assert sorted(streamed) == sorted(expected(2))


def test_rows_are_spread_and_bounded(generator: RayGenerator, tool: Tool) -> None:
    """No replica has more than it may, all have some, and the rest waits."""
    seen: list[tuple[list[int], int]] = []
    tool.at(1, lambda: seen.append((generator.engine.loads, generator.engine.rows_waiting)))
    batch = generator.generate(PROMPTS, 4, reward=length)
    assert [told(trajectory) for trajectory in batch] == expected(4)
    loads, waiting = seen[0]
    assert sorted(loads) == [4, 4]
    assert waiting == 24
    assert generator.engine.loads == [0, 0]


# --- what dies


def test_a_replica_that_dies_costs_nothing(generator: RayGenerator, tool: Tool) -> None:
    """Finished rows are there, the others go on elsewhere, and a replica comes in its place."""
    finished: list[str] = []

    def reward(trajectory: ms.Trajectory) -> float:
        finished.append(str(trajectory.prompt.id))
        return length(trajectory)

    before = {report.process_id for report in generator.engine.replicas}
    tool.at(7, lambda: kill(generator.engine.replicas[0].process_id))
    batch = generator.generate(PROMPTS, 4, reward=reward)
    assert [told(trajectory) for trajectory in batch] == expected(4)
    assert len(finished) == 32
    assert not any(batch.verify())
    eventually(lambda: len(generator.engine.replicas) == 2)
    assert len(before & {report.process_id for report in generator.engine.replicas}) == 1
    again = generator.generate(PROMPTS, 4, reward=length)
    assert [told(trajectory) for trajectory in again] == expected(4)


@pytest.mark.parametrize("ahead", [0, 4])
def test_the_only_replica_dies(pool: RayPool, ahead: int) -> None:
    """However far it was ahead of what its rows had been told."""
    tool = Tool()
    with RayGenerator(make_engine, resources=LIGHT, pool=pool, tools=[tool.ten_times], steps_ahead=ahead) as generator:
        tool.at(3, lambda: kill(generator.engine.replicas[0].process_id))
        batch = generator.generate(PROMPTS, 2, reward=length)
    assert [told(trajectory) for trajectory in batch] == expected(2)


def test_a_node_that_is_taken_away_with_replica_and_sandboxes(cluster: Any, pool: RayPool) -> None:
    nodes = [cluster.add_node(num_cpus=2, resources={"leaving": 2}, object_store_memory=STORE) for _ in range(2)]
    eventually(lambda: {node.node_id for node in nodes} <= set(pool.nodes))
    asked, tool = {"num_cpus": 0, "resources": {"leaving": 1}}, Tool()

    def take_away() -> None:
        there = generator.engine.replicas[0].node_id
        cluster.remove_node(next(node for node in nodes if node.node_id == there), allow_graceful=False)

    with RayGenerator(make_engine, replicas=2, resources=asked, pool=pool, tools=[tool.ten_times]) as generator:
        tool.at(5, take_away)
        batch = generator.generate(PROMPTS, 4, reward=length)
        assert [told(trajectory) for trajectory in batch] == expected(4)
        # Two again, on the node that is left: that one was lost may be noticed after its rows are done.
        eventually(lambda: len(on := [each.node_id for each in generator.engine.replicas]) == 2 and len(set(on)) == 1)
    for node in nodes:
        if node in cluster.worker_nodes:
            cluster.remove_node(node, allow_graceful=False)


def test_copies_of_rows_outlive_their_replica(cluster: Any) -> None:
    """Logprobs of the scripted engine are made of the row's key and the position, as noise is."""
    engine = RayEngine(make_engine, replicas=2, resources=LIGHT)
    alone = make_engine()
    try:
        request = RowRequest(tuple(bytes_tokenizer().encode("7")), seed=5)
        found, wanted = (_forked(one, request) for one in (engine, alone))
        assert found == wanted
        assert engine.open_rows == 0
    finally:
        engine.shutdown()


def _forked(engine: Any, request: RowRequest) -> list[list[tuple[int, float]]]:
    """What two copies of a row say, whose replica is killed once they are made, if it has one."""
    (source,) = engine.open(request)
    while not (first := engine.step()):
        pass
    engine.rollback(source, len(first[0].ids) - 1)  # a replica may have given several by then
    copies = [engine.fork(source, seed) for seed in (11, 12)]
    engine.close(source)
    if isinstance(engine, RayEngine):
        busy = next(replica for replica in engine._placed if replica.rows)
        kill(busy.report.process_id)
    said: dict[int, list[tuple[int, float]]] = {copy: [] for copy in copies}
    for copy in copies:
        engine.extend(copy, [1, 2, 3])
    while any(len(one) < 20 for one in said.values()):
        for update in engine.step():
            said[update.handle] += zip(update.ids, update.logprobs, strict=True)
    for copy in copies:
        engine.close(copy)
    return [one[:20] for one in said.values()]


class Fragile(ms.ScriptedEngine):
    """Fails, all of it, at a row whose prompt is "5"."""

    def open(self, request: RowRequest, n: int = 1) -> list[int]:
        self.poisoned = getattr(self, "poisoned", False) or bytes_tokenizer().decode(request.ids) == "5"
        return super().open(request, n)

    def step(self) -> list[ms.Update]:
        if self.poisoned:
            raise RuntimeError("out of memory")
        return super().step()


def test_a_row_that_engines_die_of_is_given_up(pool: RayPool) -> None:
    with RayGenerator(
        lambda: Fragile(bytes_tokenizer(), lambda request, sample: goes_on),
        replicas=2,
        resources=LIGHT,
        pool=pool,
        rows_per_replica=1,
    ) as generator:
        batch = generator.generate([prompt for prompt in PROMPTS if prompt.id in ("4", "5")])
    sound, given_up = batch
    assert sound.stop.kind is ms.StopKind.END_OF_SEQUENCE
    assert given_up.stop.kind is ms.StopKind.ENGINE_FAILURE
    assert "4 replicas were lost" in str(given_up.stop)
    assert "out of memory" in str(given_up.stop)


# --- weights


def shift(engine: Any) -> None:
    """New weights: it says something else."""
    engine._script = dict.fromkeys(SAID, "new")


def own_versions(batch: ms.TrajectoryBatch) -> set[int]:
    """Which weights have sampled something."""
    return {
        version
        for trajectory in batch
        for version, own in zip(trajectory.weight_versions, trajectory.mask, strict=True)
        if own
    }


def test_weights_change_in_the_middle_of_a_batch(generator: RayGenerator, tool: Tool) -> None:
    """Rows go on with the ids that they have; later ids carry the new version."""
    changed = threading.Event()

    def update() -> None:
        generator.update_weights(lambda engine: None, 3)
        changed.set()

    def change() -> None:
        changer.start()
        changed.wait(300)

    changer = threading.Thread(target=update)
    before = generator.engine.weight_version
    tool.at(3, change)
    batch = generator.generate(PROMPTS, 2, reward=length)
    changer.join()
    assert [told(trajectory) for trajectory in batch] == expected(2)
    assert own_versions(batch) == {before, 3}


def test_an_update_that_fails_leaves_no_replica_with_half_of_it(generator: RayGenerator) -> None:
    def broken(engine: Any) -> None:
        engine._script = "half"
        raise OSError("no such weights")

    before = generator.engine.weight_version
    with pytest.raises(EngineError, match="no such weights"):
        generator.update_weights(broken, 4)
    batch = generator.generate(PROMPTS, 2, reward=length)
    assert [told(trajectory) for trajectory in batch] == expected(2)
    assert own_versions(batch) == {before}
    with pytest.raises(CapabilityError, match=r"RayGenerator\.update_weights"):
        generator.engine.set_weights(4, keep_cache=False)


def test_weights_are_updated_on_all_replicas_and_on_those_that_come_later(generator: RayGenerator) -> None:
    eventually(lambda: len(generator.engine.replicas) == 2)
    generator.update_weights(shift, 7)
    assert generator.engine.weight_version == 7
    gone = generator.engine.replicas[1].process_id
    kill(gone)
    eventually(lambda: gone not in {report.process_id for report in generator.engine.replicas})
    eventually(lambda: len(generator.engine.replicas) == 2)
    batch = generator.generate(PROMPTS, 3)
    assert {trajectory.segments[-1].text for trajectory in batch} == {"new<|endoftext|>"}
    assert own_versions(batch) == {7}


# --- many drivers


def test_a_generator_in_an_actor_of_its_own_with_nodes_of_its_own(cluster: Any) -> None:
    """As where one driver is not enough."""
    driver = ray.remote(num_cpus=0)(Driver).remote()
    node = cluster.head_node.node_id
    try:
        assert ray.get(driver.generate.remote([node])) == (expected(2), [node])
    finally:
        ray.kill(driver)


class Driver:
    """An actor that generates."""

    def generate(self, node_ids: list[str]) -> tuple[list[tuple[Any, ...]], list[str]]:
        with (
            RayPool(preload=[], node_ids=node_ids, start_timeout=300) as pool,
            RayGenerator(make_engine, replicas=2, resources=LIGHT, tools=[ten_times], pool=pool) as generator,
        ):
            batch = generator.generate(PROMPTS, 2, reward=length)
            return [told(trajectory) for trajectory in batch], pool.nodes


# --- the end


def test_nothing_is_left_when_the_generator_is_closed(cluster: Any) -> None:
    threads = set(threading.enumerate())
    seen: list[Observation] = []
    generator = RayGenerator(make_engine, replicas=2, resources=LIGHT, tools=[ten_times], observers=[seen.append])
    processes = [report.process_id for report in generator.engine.replicas]
    batch = generator.generate(PROMPTS[:2], reward=length)
    assert [told(trajectory) for trajectory in batch] == expected(1)[:2]
    generator.close()
    generator.close()
    assert sum(isinstance(one, SessionRan) for one in seen) == sum(len(trajectory.calls) for trajectory in batch) == 6
    assert sum(isinstance(one, SessionClosed) for one in seen) == 2
    eventually(lambda: not any(os.path.exists(f"/proc/{process}") for process in processes))
    assert not [thread for thread in threading.enumerate() if thread not in threads and "midstream" in thread.name]
