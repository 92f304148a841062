"""Rows that are copied in the middle of being generated, their sessions with them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from midstream import (
    ForkPoint,
    Generator,
    Limits,
    PolicyEngine,
    SandboxPool,
    StopKind,
    Trajectory,
    errors,
)
from midstream.records import verify
from tests.rollouts import LONG, VOCABULARY, Gate, Stepping, essence, one, rollouts, scripted, shown
from tests.sandbox.conftest import why_not
from tests.vocabularies import tokenizer

STATE = "<code>x = [1]; fork()</code> and <code>x.append(2); x</code> and <code>x</code> end"

THREADS = "import threading, time; threading.Thread(target=time.sleep, args=(30,), daemon=True).start()"
"""An interpreter that has threads running cannot be copied."""


@pytest.fixture(scope="module")
def forkable() -> Iterator[SandboxPool]:
    reason = why_not("full")
    if reason is not None:
        pytest.skip(f"this machine cannot hold the level full: {reason}")
    with SandboxPool(isolation="full", forkable=True, preload=[]) as pool:
        yield pool


class Forking:
    """A tool that has the row of its prompt forked: the copies are made when its block's result is in.

    ``together``: so many calls wait for one another, before any of them asks.
    """

    def __init__(self, prompt_id: str = "0", *, together: int = 1, **options: Any) -> None:
        self._together = threading.Barrier(together, timeout=LONG)
        self.generator: Generator | None = None
        self.futures: list[Future[list[int]]] = []
        self._prompt_id = prompt_id
        self._options = options

    def __call__(self) -> None:
        assert self.generator is not None
        self._together.wait()
        self.futures.append(self.generator.fork(self._prompt_id, **self._options))


def forked(tool: Forking, generator: Generator, **options: Any) -> list[Trajectory]:
    tool.generator = generator
    return list(generator.generate(["p"], **options))


def test_copies_go_their_own_ways_from_the_same_state(forkable: SandboxPool) -> None:
    fork = Forking(n=2)
    engine = scripted(STATE)
    with Generator(engine, pool=forkable, tools={"fork": fork}) as generator:
        rows = forked(fork, generator)
        assert [verify(generator.record(row)) for row in rows] == [[], [], []]
        assert generator.progress.rows == generator.progress.finished == 3
    assert fork.futures[0].result(0) == [1, 2]
    assert [row.sample for row in rows] == [0, 1, 2]
    assert [shown(row) for row in rows] == [["", "[1, 2]", "[1, 2]"]] * 3  # not [1, 2, 2]: nothing is shared
    assert not any(record.result and record.result.state_lost for row in rows for record in row.calls)
    point = rows[0].calls[0].call.position
    assert [row.lineage for row in rows] == [(), (ForkPoint(0, point),), (ForkPoint(0, point),)]
    assert rows[0].ids[:point] == rows[1].ids[:point]
    assert rows[0].logprobs[:point] == rows[1].logprobs[:point] == rows[2].logprobs[:point]
    assert len({tuple(row.logprobs[point:]) for row in rows}) == 3  # each under its own noise
    assert engine.open_rows == 0


def test_a_copy_comes_behind_the_samples_of_its_prompt_and_a_copy_can_be_copied(forkable: SandboxPool) -> None:
    fork = Forking("a", sample=1, together=2)  # or the row might be over before the other sample asks
    engine = scripted({"a": "<code>fork()</code> more", "b": "word"})
    with Generator(engine, pool=forkable, tools={"fork": fork}) as generator:
        fork.generator = generator
        # Both samples of "a" ask for the same row; what asks second finds it as it is then.
        rows = generator.generate([{"text": "a", "id": "a"}, {"text": "b", "id": "b"}], n=2)
    assert [(row.prompt.id, row.sample) for row in rows] == [
        *(("a", sample) for sample in range(4)),
        ("b", 0),
        ("b", 1),
    ]
    assert sorted(sample for future in fork.futures for sample in future.result(0)) == [2, 3]
    assert all(row.lineage[0].sample == 1 for row in rows[2:4])


def test_lineage_names_every_ancestor(forkable: SandboxPool) -> None:
    made: list[int] = []

    def fork() -> None:
        made.append(0)
        if len(made) <= 2:  # the row itself, then its first copy or itself again, whichever is first
            generator.fork("0", 1 if len(made) == 2 else 0)

    engine = scripted("<code>fork()</code> and <code>fork()</code> end")
    with Generator(engine, pool=forkable, tools={"fork": fork}) as generator:
        rows = generator.generate(["p"])
        assert [verify(generator.record(row)) for row in rows] == [[], [], []]
    first, second = (record.call.position for record in rows[2].calls)
    assert rows[1].lineage == (ForkPoint(0, first),)
    assert rows[2].lineage == (ForkPoint(0, first), ForkPoint(1, second))


def test_a_row_without_a_session_is_copied_at_once_from_any_thread(forkable: SandboxPool) -> None:
    whole = one("word " * 30, forkable)
    engine = Stepping([whole])
    futures: list[Future[list[int]]] = []
    with Generator(engine, pool=forkable) as generator:
        engine.at_step = lambda step: futures.append(generator.fork(str(whole.prompt.id))) if step == 5 else None
        rows = generator.generate([whole.prompt])
    assert futures[0].result(0) == [1]
    assert [row.ids for row in rows] == [whole.ids] * 2
    assert rows[1].lineage == (ForkPoint(0, len(whole.prompt_ids) + 5),)


def test_a_copy_is_paused_and_goes_on_as_what_it_is(forkable: SandboxPool) -> None:
    """Its session is built again with the numbers of the ancestor that it was copied from."""
    fork = Forking()
    script = "<code>import random; x = random.random(); fork(); x</code> and <code>x, random.random()</code> end"
    engine = scripted(script)
    with Generator(engine, pool=forkable, tools={"fork": fork}) as generator:
        whole = forked(fork, generator)
        point = whole[1].lineage[0].length
    stepping = Stepping(whole)
    with Generator(stepping, pool=forkable, tools={"fork": fork}) as generator:

        def at_step(step: int) -> None:
            if len(fork.futures) > 1 and fork.futures[1].done():
                generator.interrupt()

        stepping.at_step = at_step
        paused = forked(fork, generator)
        assert [row.stop.kind for row in paused] == [StopKind.PAUSED] * 2
        stepping.at_step = lambda step: None
        rows = generator.generate(paused)
    assert [row.lineage for row in rows] == [(), (ForkPoint(0, point),)]
    assert [essence(row).segments for row in rows] == [essence(row).segments for row in whole]
    assert shown(rows[1]) == shown(whole[1]) == shown(whole[0])


def test_the_number_of_a_copy_is_behind_all_samples_in_the_batch(forkable: SandboxPool) -> None:
    whole = rollouts({"0": "word " * 9}, forkable, n=3)
    engine = Stepping(whole)
    with Generator(engine, pool=forkable) as generator:
        engine.at_step = lambda step: generator.interrupt() if step == 2 else None
        paused = generator.generate([whole[0].prompt], n=3)
        futures: list[Future[list[int]]] = []
        engine.at_step = lambda step: futures.append(generator.fork("0", 1)) if step == 4 else None
        rows = generator.generate([paused[1], paused[2]])
    assert futures[0].result(0) == [3]
    assert [row.sample for row in rows] == [1, 3, 2]


# --- where it cannot be


def test_a_session_that_cannot_be_copied_is_an_error_and_the_row_goes_on(forkable: SandboxPool) -> None:
    fork = Forking()
    script = f"<code>{THREADS}; fork()</code> a <code>1</code>"
    with Generator(scripted(script), pool=forkable, tools={"fork": fork}) as generator:
        rows = forked(fork, generator)
    assert isinstance(fork.futures[0].exception(0), errors.SandboxError)
    assert len(rows) == 1
    assert shown(rows[0])[1] == "1"
    assert rows[0].stop.kind is StopKind.END_OF_SEQUENCE


@pytest.mark.parametrize("kind", ["forkable", "plain"])
def test_with_replay_the_copies_sessions_are_built_again(kind: str, request: pytest.FixtureRequest) -> None:
    pool: SandboxPool = request.getfixturevalue("forkable" if kind == "forkable" else "sandboxes")
    fork = Forking(replay=True)
    threads = THREADS if kind == "forkable" else "pass"
    script = f"<code>{threads}; import random; x = random.random(); fork()</code> a <code>x</code> b"
    with Generator(scripted(script), pool=pool, tools={"fork": fork}) as generator:
        rows = forked(fork, generator)
        assert [verify(generator.record(row)) for row in rows] == [[], []]
    assert fork.futures[0].result(0) == [1]
    assert len(fork.futures) == 1  # what was replayed got its tools' recorded answers
    assert shown(rows[0]) == shown(rows[1])
    assert not any(record.result and record.result.state_lost for row in rows for record in row.calls)


def test_a_pool_that_is_full_is_an_error_rather_than_a_wait_for_ever() -> None:
    reason = why_not("full")
    if reason is not None:
        pytest.skip(f"this machine cannot hold the level full: {reason}")
    fork = Forking()
    with (
        SandboxPool(isolation="full", forkable=True, preload=[], max_sessions=1) as pool,
        Generator(scripted(STATE), pool=pool, tools={"fork": fork}) as generator,
    ):
        rows = forked(fork, generator)
    assert "max_sessions" in str(fork.futures[0].exception(0))
    assert [shown(row) for row in rows] == [["", "[1, 2]", "[1, 2]"]]


def test_an_engine_that_fails_to_copy_leaves_the_row_alone(forkable: SandboxPool) -> None:
    engine = scripted(STATE)
    before = forkable.free_sessions

    def fail(handle: int, seed: int) -> int:
        raise errors.EngineError("no memory for it")

    engine.fork = fail  # type: ignore[method-assign]
    fork = Forking()
    with Generator(engine, pool=forkable, tools={"fork": fork}) as generator:
        rows = forked(fork, generator)
    assert "no memory" in str(fork.futures[0].exception(0))
    assert [shown(row) for row in rows] == [["", "[1, 2]", "[1, 2]"]]
    assert forkable.free_sessions == before


def test_a_row_that_is_not_there_or_stops_before_is_told(sandboxes: SandboxPool) -> None:
    gate = Gate()
    futures: list[Future[list[int]]] = []
    with Generator(
        scripted("<code>hold()</code>"), pool=sandboxes, tools={"hold": gate}, limits=Limits(time_limit=1)
    ) as generator:
        thread = threading.Thread(target=lambda: gate.reached.wait(LONG) and ask(generator, futures))
        thread.start()
        rows = generator.generate(["p"])
        thread.join()
        gate.opened.set()
        assert rows[0].stop.kind is StopKind.TIME_LIMIT
        assert [type(future.exception(LONG)) for future in futures] == [errors.ProtocolError] * 3
        with pytest.raises(errors.ProtocolError, match="nothing is being generated"):
            generator.fork("0", replay=True)


def ask(generator: Generator, futures: list[Future[list[int]]]) -> None:
    wanted = (("0", 7), ("nobody", 0), ("0", 0))
    futures += [generator.fork(prompt_id, sample, replay=True) for prompt_id, sample in wanted]


def test_a_row_that_waits_to_be_opened_is_copied_when_it_is(sandboxes: SandboxPool) -> None:
    whole = rollouts({"first": "word " * 5, "second": "word " * 5}, sandboxes)
    engine = Stepping(whole)
    futures: list[Future[list[int]]] = []
    with Generator(engine, pool=sandboxes, max_open_rows=1) as generator:
        engine.at_step = lambda step: futures.append(generator.fork("second", replay=True)) if step == 1 else None
        rows = generator.generate([row.prompt for row in whole])
    assert futures[0].result(0) == [1]
    assert [(row.prompt.id, row.sample) for row in rows] == [("first", 0), ("second", 0), ("second", 1)]
    assert rows[2].lineage == (ForkPoint(0, len(rows[2].prompt_ids)),)


def test_what_cannot_be_forked_is_refused_at_once(sandboxes: SandboxPool) -> None:
    with Generator(scripted("word"), pool=sandboxes) as generator:
        with pytest.raises(errors.ConfigurationError, match=r"SandboxPool\(forkable=True\)"):
            generator.fork("0")
        with pytest.raises(errors.ConfigurationError, match="n=0"):
            generator.fork("0", n=0, replay=True)

    class Policy:
        def generate(self, batch: Any) -> Any:
            raise NotImplementedError

    with (
        Generator(PolicyEngine(Policy(), tokenizer(VOCABULARY)), pool=sandboxes) as generator,
        pytest.raises(errors.CapabilityError, match="cannot copy rows"),
    ):
        generator.fork("0", replay=True)
