"""Batches that come back before all rows are done, and rows that go on in a later one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from midstream import ExecutionResult, Generator, SandboxPool, Session, StopKind, Trajectory, errors
from midstream.leases import SessionLeases
from midstream.records import verify
from midstream.records.schema import decode_record
from tests.rollouts import LONG, Gate, Replaying, Stepping, essence, one, rollouts, scripted, shown

CODE = "<code>x = 3; y = 4</code>\nThis is some regular text.\n<code>x + y</code> so."
CLOCK = "<code>import time; born = time.time_ns(); born</code> then <code>born</code> end"
"""The second block shows what the first one did, if it finds the very interpreter of the first one."""


@pytest.fixture
def counting() -> Iterator[tuple[SandboxPool, list[int]]]:
    """A pool, and for each session that it opened how many blocks that had to run again first."""
    opened: list[int] = []

    class Counting(SandboxPool):
        async def session_async(self, **options: Any) -> Session:
            opened.append(len(options["history"]))
            return await super().session_async(**options)

    with Counting(preload=[]) as pool:
        yield pool, opened


# --- when it comes back


def test_a_batch_comes_back_once_enough_rows_have_stopped(sandboxes: SandboxPool) -> None:
    whole = rollouts({"a": "word", "b": "word " * 40, "c": "two words", "d": CODE * 3}, sandboxes)
    prompts = [row.prompt for row in whole]
    with Generator(Replaying(whole), pool=sandboxes) as generator:
        batch = generator.generate(prompts, min_finished=2)
        kinds = [row.stop.kind for row in batch]
        assert kinds == [StopKind.END_OF_SEQUENCE, StopKind.PAUSED, StopKind.END_OF_SEQUENCE, StopKind.PAUSED]
        assert [row.prompt.id for row in batch.unfinished] == ["b", "d"]
        rest = generator.generate(batch.unfinished)
    assert [essence(row) for row in (*batch[0:1], rest[0], *batch[2:3], rest[1])] == [essence(row) for row in whole]


def test_rows_that_fail_are_not_the_ones_that_were_waited_for(sandboxes: SandboxPool) -> None:
    whole = rollouts({"bad": "word " * 9, "good": "word " * 20, "long": "word " * 60}, sandboxes)
    engine = Replaying(whole, fail={"bad": 3})
    with Generator(engine, pool=sandboxes) as generator:
        batch = generator.generate([row.prompt for row in whole], min_finished=1)
    kinds = [row.stop.kind for row in batch]
    assert kinds == [StopKind.ENGINE_FAILURE, StopKind.END_OF_SEQUENCE, StopKind.PAUSED]


def test_a_batch_comes_back_at_its_deadline_though_nothing_moves(sandboxes: SandboxPool) -> None:
    gate = Gate()
    whole = rollouts({"stuck": "<code>hold()</code> x", "done": "word"}, sandboxes, tools={"hold": lambda: "through"})
    try:
        with Generator(Replaying(whole), pool=sandboxes, tools={"hold": gate}, hold_sessions=LONG) as generator:
            batch = generator.generate([row.prompt for row in whole], deadline=0.5)
            assert len(generator._leases) == 0  # what the block has done by now, no other run of it would do
            assert gate.reached.is_set()
            assert [row.stop.kind for row in batch] == [StopKind.PAUSED, StopKind.END_OF_SEQUENCE]
            assert shown(batch[0]) == [None]
            gate.opened.set()
            rest = generator.generate(batch.unfinished)
    finally:
        gate.opened.set()
    assert essence(rest[0]).segments == essence(whole[0]).segments
    assert gate.calls == 2  # the block that was cut short ran again


def test_a_deadline_counts_from_the_call_also_while_paused(sandboxes: SandboxPool) -> None:
    with Generator(scripted(CODE), pool=sandboxes) as generator:
        generator.pause()
        batch = generator.generate(["p"], deadline=0.2)
        generator.resume()
    assert [row.stop.kind for row in batch] == [StopKind.PAUSED]


def test_a_deadline_that_is_not_reached_changes_nothing(sandboxes: SandboxPool) -> None:
    whole = one(CODE, sandboxes)
    with Generator(Replaying([whole]), pool=sandboxes) as generator:
        first = generator.generate([whole.prompt], deadline=LONG, min_finished=1)
        again = generator.generate([whole.prompt])
    assert [essence(first[0]), essence(again[0])] == [essence(whole)] * 2


def test_what_was_cancelled_is_not_paused_by_a_deadline(sandboxes: SandboxPool) -> None:
    whole = rollouts({"a": "word", "b": "word " * 40}, sandboxes)
    engine = Stepping(whole)
    with Generator(engine, pool=sandboxes) as generator:

        def at_step(step: int) -> None:
            if step == 2:
                generator.cancel()
                generator.interrupt()

        engine.at_step = at_step
        batch = generator.generate([row.prompt for row in whole], min_finished=1)
    assert batch[1].stop.kind is StopKind.CANCELLED


async def test_a_stream_ends_early_too_and_gives_the_unfinished_rows(sandboxes: SandboxPool) -> None:
    whole = rollouts({"a": "word", "b": "word " * 40}, sandboxes)
    with Generator(Replaying(whole), pool=sandboxes) as generator:
        rows = [row async for row in generator.stream([row.prompt for row in whole], min_finished=1)]
        batch = await generator.generate_async([row.prompt for row in whole], min_finished=1)
    assert [(row.prompt.id, row.stop.resumable) for row in rows] == [("a", False), ("b", True)]
    assert [row.stop.resumable for row in batch] == [False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_finished": 0}, r"min_finished=0: must be an integer from 1 to the batch's 4 rows"),
        ({"min_finished": 5}, r"min_finished=5"),
        ({"min_finished": 1.5}, r"min_finished=1\.5"),
        ({"deadline": 0}, r"deadline=0: must be a number of seconds over 0"),
        ({"deadline": float("nan")}, r"deadline=nan"),
        ({"deadline": "1"}, r"deadline='1'"),
    ],
)
def test_impossible_ends_are_refused(sandboxes: SandboxPool, options: dict[str, Any], message: str) -> None:
    with (
        Generator(scripted(CODE), pool=sandboxes) as generator,
        pytest.raises(errors.ConfigurationError, match=message),
    ):
        generator.generate(["a", "b"], n=2, **options)


@pytest.mark.parametrize("seconds", [-1, float("inf"), "5", True])
def test_impossible_leases_are_refused(sandboxes: SandboxPool, seconds: Any) -> None:
    with pytest.raises(errors.ConfigurationError, match="hold_sessions="):
        Generator(scripted(CODE), pool=sandboxes, hold_sessions=seconds)


# --- across the join


def paused_after(generator: Generator, engine: Stepping, whole: Trajectory, steps: int) -> Trajectory:
    """The row of ``whole``, paused after so many steps of the engine."""
    until = engine.steps + steps
    engine.at_step = lambda step: generator.interrupt() if step == until else None
    paused = generator.generate([whole.prompt])[0]
    engine.at_step = lambda step: None
    assert paused.stop.kind is StopKind.PAUSED
    return paused


def test_a_held_session_is_the_one_that_the_row_goes_on_in(counting: tuple[SandboxPool, list[int]]) -> None:
    pool, opened = counting
    whole = one(CLOCK, pool)
    opened.clear()
    engine = Stepping([whole])
    with Generator(engine, pool=pool, hold_sessions=LONG) as generator:
        paused = paused_after(generator, engine, whole, whole.calls[0].call.position - len(whole.prompt_ids) + 2)
        assert len(paused.calls) == 1
        # It is found by what the trajectory holds, be it another object that came from a file.
        row = generator.generate([decode_record(generator.record(paused).encode()).trajectory])[0]
        assert opened == [0]
        assert shown(row)[1] == shown(row)[0]
        assert row.stop.kind is StopKind.END_OF_SEQUENCE
        assert verify(generator.record(row)) == []


def test_a_session_serves_one_row_and_the_next_one_is_rebuilt(counting: tuple[SandboxPool, list[int]]) -> None:
    pool, opened = counting
    whole = one(CODE, pool)
    opened.clear()
    engine = Stepping([whole])
    with Generator(engine, pool=pool, hold_sessions=LONG) as generator:
        paused = paused_after(generator, engine, whole, whole.calls[0].call.position - len(whole.prompt_ids) + 2)
        rows = generator.generate([paused, paused])
    assert opened == [0, 1]
    assert [essence(row) for row in rows] == [essence(whole)] * 2


def test_without_a_lease_or_elsewhere_the_session_is_rebuilt(counting: tuple[SandboxPool, list[int]]) -> None:
    pool, opened = counting
    whole = one(CODE, pool)
    opened.clear()
    steps = whole.calls[0].call.position - len(whole.prompt_ids) + 2
    engine = Stepping([whole])
    with Generator(engine, pool=pool) as generator:
        paused = paused_after(generator, engine, whole, steps)
        here = generator.generate([paused])[0]
        assert opened == [0, 1]
    with Generator(Replaying([whole]), pool=pool, hold_sessions=LONG) as generator:
        elsewhere = generator.generate([paused])[0]
    assert opened == [0, 1, 1]
    assert [essence(here), essence(elsewhere)] == [essence(whole)] * 2


def test_a_lease_ends_and_closing_the_generator_ends_all(sandboxes: SandboxPool) -> None:
    whole = one(CODE, sandboxes)
    engine = Stepping([whole])
    steps = whole.calls[0].call.position - len(whole.prompt_ids) + 2
    with Generator(engine, pool=sandboxes, hold_sessions=0.3) as generator:
        paused = paused_after(generator, engine, whole, steps)
        assert len(generator._leases) == 1
        until = time.monotonic() + LONG
        while len(generator._leases):
            assert time.monotonic() < until
            time.sleep(0.01)
        assert essence(generator.generate([paused])[0]) == essence(whole)
    with Generator(engine, pool=sandboxes, hold_sessions=LONG) as generator:
        paused_after(generator, engine, whole, steps)
        leases = generator._leases
        assert len(leases) == 1
    assert len(leases) == 0
    assert not [thread for thread in threading.enumerate() if thread.name == "midstream-leases"]


def test_held_sessions_give_way_to_rows_that_need_one() -> None:
    with SandboxPool(preload=[], max_sessions=1) as pool:
        whole = one(CODE, pool)
        engine = Stepping([whole])
        with Generator(engine, pool=pool, hold_sessions=LONG) as generator:
            paused = paused_after(generator, engine, whole, whole.calls[0].call.position - len(whole.prompt_ids) + 2)
            assert pool.free_sessions == 0
            row = generator.generate([whole.prompt])[0]  # would wait for ever for the one session that is held
            assert essence(row) == essence(whole)
            assert essence(generator.generate([paused])[0]) == essence(whole)


def test_a_row_goes_on_from_every_token_with_new_weights_in_between(sandboxes: SandboxPool) -> None:
    whole = one(CODE, sandboxes)
    engine = Stepping([whole])
    with Generator(engine, pool=sandboxes, hold_sessions=LONG) as generator:
        row, version = paused_after(generator, engine, whole, 1), 0
        expected = [0]
        while row.stop.resumable:
            version += 1
            generator.update_weights(lambda: None, version)
            until = engine.steps + 1
            engine.at_step = lambda step, until=until: generator.interrupt() if step == until else None
            before = sum(row.mask)
            row = generator.generate([row])[0]
            expected += [version] * (sum(row.mask) - before)
            assert verify(generator.record(row)) == []
    assert len(expected) > 20
    own = [version for version, generated in zip(row.weight_versions, row.mask, strict=True) if generated]
    assert own == expected
    versionless = replace(
        row,
        segments=tuple(
            replace(s, weight_versions=w.weight_versions) for s, w in zip(row.segments, whole.segments, strict=True)
        ),
    )
    assert essence(versionless) == essence(whole)


# --- leases by themselves


class Stub:
    """A session that notes when it is closed."""

    def __init__(self) -> None:
        self.closed = threading.Event()

    async def run_async(self, code: str) -> ExecutionResult:
        raise NotImplementedError(code)

    async def fork_async(self, n: int) -> list[Stub]:
        raise NotImplementedError(n)

    def close(self) -> None:
        self.closed.set()


def test_leases_that_end_in_any_order_all_end(sandboxes: SandboxPool) -> None:
    row = one("word", sandboxes)
    rows = [replace(row, sample=sample) for sample in range(4)]
    sessions = [Stub() for _ in range(6)]
    leases = SessionLeases(0.2)
    for row, session in zip(rows, sessions, strict=False):
        leases.hold(row, session)
    assert leases.take(rows[0]) is sessions[0]
    assert leases.take(rows[0]) is None
    leases.hold(rows[1], sessions[4])  # in place of the one before
    assert sessions[1].closed.is_set()
    assert leases.give_up_oldest()
    assert sessions[2].closed.is_set()
    assert sessions[3].closed.wait(LONG)
    assert sessions[4].closed.wait(LONG)
    assert not sessions[0].closed.is_set()
    assert not leases.give_up_oldest()
    leases.hold(rows[2], sessions[2])
    leases.close()
    leases.hold(rows[0], sessions[5])
    assert sessions[5].closed.is_set()
