"""Rows that are cancelled by name while others go on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import count

import pytest

from midstream import Generator, SandboxPool, ScriptedEngine, StopKind, Update, errors
from midstream.observing import BlockBegan, BlockEnded
from midstream.records import verify
from tests.rollouts import LONG, Gate, Stepping, essence, rollouts, scripted
from tests.sandbox.leftovers import eventually

LONG_TEXT = "word " * 30


def test_one_row_is_cancelled_and_the_others_are_as_they_would_have_been(sandboxes: SandboxPool) -> None:
    whole = rollouts({"a": LONG_TEXT, "b": LONG_TEXT, "c": "<code>1</code> end"}, sandboxes)
    engine = Stepping(whole)
    with Generator(engine, pool=sandboxes) as generator:
        engine.at_step = lambda step: generator.cancel("b") if step == 4 else None
        rows = generator.generate([row.prompt for row in whole])
        assert verify(generator.record(rows[1])) == []
    assert rows[1].stop.kind is StopKind.CANCELLED
    assert 0 < len(rows[1].ids) - len(rows[1].prompt_ids) < len(whole[1].ids) - len(whole[1].prompt_ids)
    assert rows[1].ids == whole[1].ids[: len(rows[1].ids)]
    assert [essence(rows[0]), essence(rows[2])] == [essence(whole[0]), essence(whole[2])]
    assert engine.open_rows == 0


def test_one_sample_or_all_of_a_prompt(sandboxes: SandboxPool) -> None:
    engine = scripted({"a": LONG_TEXT, "b": LONG_TEXT})
    with Generator(engine, pool=sandboxes) as generator:

        def second() -> None:
            generator.cancel("a", 1)
            generator.cancel("b")
            generator.cancel("nobody")

        _at_step(engine, 2, second)
        rows = generator.generate([{"text": name, "id": name} for name in "ab"], n=2)
    cancelled = [row.stop.kind is StopKind.CANCELLED for row in rows]
    assert cancelled == [False, True, True, True]


@pytest.mark.parametrize("sample", [None, 1])
def test_a_row_that_waits_for_its_place_is_cancelled_too(sandboxes: SandboxPool, sample: int | None) -> None:
    engine = scripted({"a": LONG_TEXT, "b": LONG_TEXT})
    with Generator(engine, pool=sandboxes, max_open_rows=1) as generator:
        _at_step(engine, 1, lambda: generator.cancel("b", sample))
        rows = generator.generate([{"text": name, "id": name} for name in "ab"], n=2)
    kinds = [row.stop.kind is StopKind.CANCELLED for row in rows]
    assert kinds == [False, False, sample is None, True]
    assert not rows[3].segments


def test_a_row_whose_code_runs_is_cancelled_at_once_and_its_session_closed() -> None:
    gate = Gate()

    def stop() -> None:
        assert gate.reached.wait(LONG)
        generator.cancel("a")

    engine = scripted({"a": "<code>wait()</code> end", "b": "<code>stop()</code> end"})
    with (
        SandboxPool(preload=[], max_sessions=2) as pool,
        Generator(engine, pool=pool, tools={"wait": gate, "stop": stop}) as generator,
    ):
        rows = generator.generate([{"text": name, "id": name} for name in "ab"])  # or this would wait for the gate
        assert eventually(lambda: pool.free_sessions == 2)
        gate.opened.set()
    assert rows[0].stop.kind is StopKind.CANCELLED
    assert rows[1].stop.kind is StopKind.END_OF_SEQUENCE


def test_what_was_cancelled_in_one_batch_is_not_in_the_next(sandboxes: SandboxPool) -> None:
    whole = rollouts({"a": "word", "b": LONG_TEXT}, sandboxes)
    engine = Stepping(whole)
    with Generator(engine, pool=sandboxes) as generator:
        generator.cancel("a")
        rows = generator.generate([row.prompt for row in whole])
    assert [essence(row) for row in rows] == [essence(row) for row in whole]


def test_a_sample_is_one_of_a_prompt(sandboxes: SandboxPool) -> None:
    with (
        Generator(scripted("x"), pool=sandboxes) as generator,
        pytest.raises(errors.ConfigurationError, match="sample=1 needs the prompt_id"),
    ):
        generator.cancel(sample=1)


def _at_step(engine: ScriptedEngine, number: int, act: Callable[[], None]) -> None:
    """``act`` is called in the engine's thread, after its step of that number."""
    step, numbers = engine.step, count(1)

    def stepped() -> list[Update]:
        updates = step()
        if next(numbers) == number:
            act()
        return updates

    engine.step = stepped  # type: ignore[method-assign]


def test_a_generator_that_is_closed_tells_the_model_nothing_of_it(sandboxes: SandboxPool) -> None:
    """Its tools are gone before its rows are, and code that runs beside a step may still call them."""
    began, ended = threading.Event(), threading.Event()

    def observe(event: object) -> None:
        if isinstance(event, BlockBegan):
            began.set()
        elif isinstance(event, BlockEnded):
            ended.set()

    code = "<code>\nleave()\ntry:\n    other()\nexcept BaseException as error:\n    print(error)\n</code> end"
    engine = scripted({"a": code, "b": LONG_TEXT * 50})
    step = engine.step

    def held() -> list[Update]:
        assert not began.is_set() or ended.wait(LONG)
        return step()

    engine.step = held  # type: ignore[method-assign]
    tools = {"leave": lambda: generator.close(), "other": lambda: 2}
    generator = Generator(engine, pool=sandboxes, tools=tools, observers=[observe])
    rows = generator.generate([{"text": name, "id": name} for name in "ab"])
    assert ended.is_set()
    assert [row.stop.kind for row in rows] == [StopKind.CANCELLED] * 2
    assert "closed" not in rows[0].text
