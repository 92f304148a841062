"""What observers are told of rows, blocks, calls and sessions, and that none of them can harm a row."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from typing import Any

import pytest

from midstream import HERMES_TOOL_CALLS, Generator, Limits, Prompt, SandboxPool, StopKind, errors
from midstream.observing import (
    BlockBegan,
    BlockEnded,
    FirstToken,
    InterpreterStarted,
    Observation,
    Observers,
    ResultsInjected,
    RowMoved,
    RowsQueued,
    SessionAsked,
    SessionClosed,
    SessionGranted,
    SessionOpened,
    SessionRan,
    Stepped,
    ToolBegan,
    ToolEnded,
)
from midstream.types import Trajectory
from tests.rollouts import essence, rollouts, scripted, shown

CODE = "a <code>x = twice(4); x</code> b <code>1/0</code> c"


def twice(number: int) -> int:
    return 2 * number


class Seen(list[Observation]):
    """Everything that an observer was told."""

    def __call__(self, observation: Observation) -> None:
        self.append(observation)

    def of(self, *kinds: type) -> list[Any]:
        return [one for one in self if isinstance(one, kinds)]

    def stages(self) -> dict[tuple[str | None, int], list[str]]:
        """The stages that each row went through, and that it left each that it was in."""
        gone: dict[tuple[str | None, int], list[str]] = {}
        for moved in self.of(RowMoved):
            stages = gone.setdefault((moved.row.prompt_id, moved.row.sample), ["waiting"])
            assert stages[-1] == moved.before
            stages.append(moved.after)
        return gone


@pytest.fixture
def pool() -> Iterator[SandboxPool]:
    with SandboxPool(preload=[]) as pool:
        yield pool


def test_a_row_from_its_queue_to_its_reward(sandboxes: SandboxPool) -> None:
    seen = Seen()
    batch = rollouts({"p": CODE}, sandboxes, tools=[twice], observers=[seen], reward=lambda t: 1.0)
    assert shown(batch[0]) == ["8", "ZeroDivisionError('division by zero')"]
    assert seen.of(RowsQueued) == [RowsQueued(1)]
    assert seen.stages() == {
        ("p", 0): ["waiting", "decoding", "executing", "decoding", "executing", "decoding", "rewarding", "done"]
    }
    (row,) = {moved.row for moved in seen.of(RowMoved)}
    assert (row.prompt_tokens, row.resumed, row.group) == (len(batch[0].prompt_ids), False, "p")
    assert [first.row for first in seen.of(FirstToken)] == [row]
    assert sum(step.tokens for step in seen.of(Stepped)) == sum(batch[0].mask)
    assert {step.rows for step in seen.of(Stepped)} == {1}
    injected = sum(len(segment.ids) for segment in batch[0].segments if segment.origin == "injected")
    assert sum(one.tokens for one in seen.of(ResultsInjected)) == injected
    assert [(one.began.call.index, one.outcome) for one in seen.of(BlockEnded)] == [(0, "ok"), (1, "error")]
    (called,) = seen.of(ToolEnded)
    assert (called.began.row, called.began.name, called.outcome, called.answer.value) == (row, "twice", "ok", 8)
    kinds = [type(one) for one in seen if isinstance(one, BlockBegan | BlockEnded | ToolBegan | ToolEnded)]
    assert kinds == [BlockBegan, ToolBegan, ToolEnded, BlockEnded, BlockBegan, BlockEnded]
    assert seen.of(RowMoved)[-1].trajectory == batch[0]
    assert batch[0].reward == 1.0


def test_rows_that_never_get_a_turn_are_over_too(sandboxes: SandboxPool) -> None:
    seen = Seen()

    def end(observation: Observation) -> None:
        if isinstance(observation, FirstToken):
            generator.cancel()

    with Generator(scripted("word " * 50), pool=sandboxes, max_open_rows=1, observers=[seen, end]) as generator:
        batch = generator.generate(["a", "b"], n=2)
        assert (generator.progress.finished, generator.progress.stops) == (4, {StopKind.CANCELLED: 4})
        assert generator.progress.waiting == generator.progress.running == 0
    assert [row.stop.kind for row in batch] == [StopKind.CANCELLED] * 4
    stages = sorted(seen.stages().values())
    assert stages == [["waiting", "decoding", "done"], *[["waiting", "done"]] * 3]


async def test_rows_that_nobody_waits_for_are_over_without_a_trajectory(sandboxes: SandboxPool) -> None:
    seen = Seen()
    scripts = {"short": "a", "long": "word " * 300, "later": "word"}
    with Generator(scripted(scripts), pool=sandboxes, max_open_rows=2, observers=[seen]) as generator:
        texts = {"short": "short", "long": "long", "long2": "long", "later": "later"}
        prompts = [Prompt(text=text, id=name) for name, text in texts.items()]
        async with aclosing(generator.stream(prompts)) as stream:
            async for row in stream:
                assert row.prompt.id == "short"
                break
    ends = {moved.row.prompt_id: moved.trajectory for moved in seen.of(RowMoved) if moved.after == "done"}
    assert set(ends) == {"short", "long", "long2", "later"}
    assert ends["long"] is None
    assert ends["later"] is None
    assert all(stages[-1] == "done" for stages in seen.stages().values())


def test_a_row_that_goes_on_is_not_given_its_prompt_again(sandboxes: SandboxPool) -> None:
    seen = Seen()

    def pause(observation: Observation) -> None:
        if isinstance(observation, FirstToken) and not observation.row.resumed:
            generator.interrupt()

    with Generator(scripted({"p": "word " * 40}), pool=sandboxes, observers=[seen, pause]) as generator:
        paused = generator.generate([Prompt(text="p", id="p")])
        assert [row.stop.kind for row in paused] == [StopKind.PAUSED]
        generator.generate(list(paused))
    first, again = list(dict.fromkeys(moved.row for moved in seen.of(RowMoved)))
    assert first.prompt_tokens > 0
    assert (again.resumed, again.prompt_tokens) == (True, 0)


@pytest.mark.parametrize(
    ("call", "tools", "outcome"),
    [
        ('{"name": "twice", "arguments": {"number": 2}}', [twice], ("ok", ["ok"])),
        ('{"name": "twice", "arguments": {"number": "x"}}', [twice], ("error", ["error"])),
        ('{"name": "thrice", "arguments": {}}', [twice], ("error", [])),
    ],
)
def test_calls_that_are_written_as_json(
    sandboxes: SandboxPool, call: str, tools: Sequence[Any], outcome: tuple[str, list[str]]
) -> None:
    seen = Seen()
    script = f"<tool_call>{call}</tool_call>"
    batch = rollouts(
        {"p": script}, sandboxes, tools=tools, observers=[seen], markup=HERMES_TOOL_CALLS, name="qwen",
        limits=Limits(max_tool_calls=1, at_tool_call_limit="stop"),
    )  # fmt: skip
    assert len(batch[0].calls) == 1
    ((began, ended),) = zip(seen.of(BlockBegan), seen.of(BlockEnded), strict=True)
    assert (ended.began, began.call.kind, ended.outcome) == (began, "json", outcome[0])
    assert [one.outcome for one in seen.of(ToolEnded)] == outcome[1]


def test_blocks_beyond_the_limit_are_declined(sandboxes: SandboxPool) -> None:
    seen = Seen()
    rollouts({"p": CODE}, sandboxes, tools=[twice], observers=[seen], limits=Limits(max_tool_calls=1))
    assert [one.outcome for one in seen.of(BlockEnded)] == ["ok", "declined"]


def test_what_is_cut_short_is_cancelled(sandboxes: SandboxPool) -> None:
    seen = Seen()
    script = "<code>wait()</code>"

    async def wait() -> None:
        await asyncio.Event().wait()

    batch = rollouts({"p": script}, sandboxes, tools=[wait], observers=[seen], limits=Limits(time_limit=0.5))
    assert batch[0].stop.kind is StopKind.TIME_LIMIT
    assert [one.outcome for one in seen.of(BlockEnded)] == ["cancelled"]
    assert [one.outcome for one in seen.of(ToolEnded)] == ["cancelled"]
    assert seen.stages()["p", 0] == ["waiting", "decoding", "executing", "done"]


@pytest.mark.parametrize(
    "error", [ValueError("broken"), asyncio.CancelledError(), SystemExit(3), StopIteration(), GeneratorExit()]
)
def test_an_observer_that_raises_harms_no_row(
    sandboxes: SandboxPool, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(observation: Observation) -> None:
        raise error

    seen = Seen()
    expected = rollouts({"p": CODE}, sandboxes, tools=[twice], n=2)
    with caplog.at_level(logging.ERROR, "midstream"):
        batch = rollouts({"p": CODE}, sandboxes, tools=[twice], n=2, observers=[broken, seen])
    assert [essence(row) for row in batch] == [essence(row) for row in expected]
    assert len(seen.of(BlockEnded)) == 4  # the observer behind it was told all the same
    # Two fan-outs, of the batch and of the tools: each tells of the first fault alone.
    assert 1 <= sum("the observer" in record.message for record in caplog.records) <= 2


def test_what_is_no_observer_is_refused() -> None:
    for wrong in (3, Seen):
        with pytest.raises(errors.ConfigurationError, match=r"observers=.*must be callables"):
            Observers([wrong])  # type: ignore[list-item]
    with pytest.raises(errors.ConfigurationError, match="observers="):
        SandboxPool(observers=["metrics"])  # type: ignore[list-item]
    with pytest.raises(errors.ConfigurationError, match="observers="):
        Generator(scripted("a"), observers=[None])  # type: ignore[list-item]


def test_what_runs_between_a_beginning_and_its_end_sees_what_the_observer_sets(sandboxes: SandboxPool) -> None:
    where: contextvars.ContextVar[str] = contextvars.ContextVar("where", default="nowhere")
    tokens: dict[Any, contextvars.Token[str]] = {}
    found: list[str] = []

    def follow(observation: Observation) -> None:
        match observation:
            case BlockBegan():
                tokens[observation] = where.set(f"block {observation.call.index}")
            case ToolBegan():
                tokens[observation] = where.set(f"{where.get()}, {observation.name}")
            case BlockEnded() | ToolEnded():
                where.reset(tokens.pop(observation.began))  # raises in another context

    def look() -> None:
        found.append(where.get())

    async def look_async() -> None:
        found.append(where.get())

    rollouts({"p": "<code>look()</code><code>look_async()</code>"}, sandboxes, tools=[look, look_async],
             observers=[follow])  # fmt: skip
    assert found == ["block 0, look", "block 1, look_async"]
    assert not tokens


# --- sessions


def test_sessions_of_a_pool() -> None:
    seen = Seen()
    with SandboxPool(preload=[], max_sessions=1, observers=[seen]) as pool:
        with pool.session() as session:
            session.run("x = 1")
            assert session.run("import os; os._exit(3)").error is not None
            assert session.run("x").text == "1"
        with pool.session() as other:
            assert other.run("1/0").error is not None
    assert [type(one) for one in seen.of(SessionAsked, SessionGranted, SessionOpened, SessionClosed)] == [
        SessionAsked,
        SessionGranted,
        SessionOpened,
        SessionClosed,
    ] * 2
    assert [one.replacement for one in seen.of(InterpreterStarted)] == [False, True, False]
    assert len(seen.of(SessionRan)) == 4


def test_a_session_with_a_past_has_had_no_interpreter_before(pool: SandboxPool) -> None:
    with pool.session() as session:
        result = session.run("x = 4")
    seen = Seen()
    with SandboxPool(preload=[], observers=[seen]) as observed, observed.session(history=[("x = 4", result)]) as again:
        assert again.run("x").text == "4"
    assert [one.replacement for one in seen.of(InterpreterStarted)] == [False]


async def test_waiting_in_vain_is_told_too() -> None:
    seen = Seen()
    with SandboxPool(preload=[], max_sessions=1, observers=[seen]) as pool:
        session = await pool.session_async()
        waiting = asyncio.create_task(pool.session_async())
        while not pool.waiting:
            await asyncio.sleep(0.001)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        session.close()
    assert [one.refused for one in seen.of(SessionGranted)] == [False, True]
    assert (len(seen.of(SessionAsked)), len(seen.of(SessionOpened)), len(seen.of(SessionClosed))) == (2, 1, 1)


def test_a_session_that_nobody_closed_is_counted_out() -> None:
    seen = Seen()
    with SandboxPool(preload=[], observers=[seen]) as pool:
        pool.session()
        with pool.session():
            pass
    assert (len(seen.of(SessionOpened)), len(seen.of(SessionClosed))) == (2, 2)


def test_a_generators_own_pool_has_its_observers() -> None:
    seen = Seen()
    with Generator(scripted({"p": CODE}), tools=[twice], observers=[seen]) as generator:
        batch = generator.generate([Prompt(text="p", id="p")])
    assert isinstance(batch[0], Trajectory)
    assert (len(seen.of(SessionOpened)), len(seen.of(SessionClosed)), len(seen.of(SessionRan))) == (1, 1, 2)
