"""Rows that come one by one: beside one another, in no one's way, and gone when nobody waits for them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait

import pytest

from midstream import Generator, Limits, Prompt, Sampling, SandboxPool, StopKind, Trajectory, errors
from tests.rollouts import LONG, Gate, Replaying, essence, open_descriptors, scripted, shown

CALLS = {f"prompt {number}": f"<code>{number} * 10</code> said" for number in range(6)}


def test_rows_are_those_of_a_batch(sandboxes: SandboxPool) -> None:
    """Ids, results and logprobs are the same to the bit, whichever way the rows came."""
    prompts = [Prompt(text=text, id=text) for text in CALLS]
    with Generator(scripted(CALLS), pool=sandboxes) as generator:
        futures = [generator.submit(prompt, sample=sample) for prompt in prompts for sample in (0, 1)]
        submitted = [future.result(LONG) for future in futures]
        # No row is under way, so the generator is free.
        batch = generator.generate(prompts, n=2)
    assert [essence(row) for row in submitted] == [essence(row) for row in batch]
    assert [shown(row) for row in submitted[::2]] == [[str(number * 10)] for number in range(6)]
    assert [row.sample for row in submitted] == [0, 1] * 6


def test_a_row_that_waits_keeps_no_other_waiting(sandboxes: SandboxPool) -> None:
    gate = Gate()
    engine = scripted({"slow": "<code>gate()</code>", **CALLS})
    with Generator(engine, pool=sandboxes, tools={"gate": gate}) as generator:
        slow = generator.submit("slow")
        assert gate.reached.wait(LONG)
        for text in CALLS:  # each comes while the first row waits for its tool
            assert generator.submit(text).result(LONG).calls
        assert not slow.done()
        gate.opened.set()
        assert shown(slow.result(LONG)) == ["'through'"]
    assert engine.open_rows == 0


async def test_from_many_tasks_and_threads(sandboxes: SandboxPool) -> None:
    with Generator(scripted(CALLS), pool=sandboxes, max_open_rows=3) as generator:

        async def row(text: str) -> Trajectory:
            return await asyncio.wrap_future(generator.submit(text))

        def rows(_thread: int) -> list[Trajectory]:
            return [generator.submit(text).result(LONG) for text in CALLS]

        of_tasks, *of_threads = await asyncio.gather(
            asyncio.gather(*(row(text) for text in [*CALLS] * 5)), *(asyncio.to_thread(rows, i) for i in range(4))
        )
    for got, texts in [(of_tasks, [*CALLS] * 5), *((each, [*CALLS]) for each in of_threads)]:
        assert [shown(row) for row in got] == [[str(int(text.split()[1]) * 10)] for text in texts]
    assert len({row.prompt.id for row in of_tasks}) == len(of_tasks)  # so each has noise of its own


def test_a_row_that_is_given_up_leaves_nothing(sandboxes: SandboxPool) -> None:
    gate = Gate()
    engine = scripted({"slow": "<code>gate()</code>", **CALLS})
    before = open_descriptors()
    with Generator(engine, pool=sandboxes, tools={"gate": gate}, max_open_rows=1) as generator:
        running, queued = generator.submit("slow"), generator.submit("prompt 1")
        assert gate.reached.wait(LONG)
        assert queued.cancel()
        assert running.cancel()
        # The only place is free again, and nothing is left of either.
        assert generator.submit("prompt 2").result(LONG).stop.finished
        assert engine.open_rows == 0
        gate.opened.set()
    assert open_descriptors() == before


async def test_a_task_that_is_cancelled_gives_its_row_up(sandboxes: SandboxPool) -> None:
    gate = Gate()
    engine = scripted({"slow": "<code>gate()</code>", **CALLS})
    with Generator(engine, pool=sandboxes, tools={"gate": gate}, max_open_rows=1) as generator:
        task = asyncio.ensure_future(asyncio.wrap_future(generator.submit("slow")))
        assert await asyncio.to_thread(gate.reached.wait, LONG)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # The only place is free again.
        await asyncio.wrap_future(generator.submit("prompt 1"))
        gate.opened.set()
    assert engine.open_rows == 0


@pytest.fixture
def held(sandboxes: SandboxPool) -> Iterator[tuple[Generator, Future[Trajectory]]]:
    """A generator with a row that waits for its tool."""
    gate = Gate()
    engine = scripted({"slow": "<code>gate()</code>", **CALLS})
    with Generator(engine, pool=sandboxes, tools={"gate": gate}, hold_sessions=LONG) as generator:
        future = generator.submit("slow")
        assert gate.reached.wait(LONG)
        yield generator, future
        gate.opened.set()


def test_one_way_at_a_time(held: tuple[Generator, Future[Trajectory]]) -> None:
    generator, _ = held
    with pytest.raises(errors.ProtocolError, match="generating already"):
        generator.generate(["prompt 1"])
    with pytest.raises(errors.ProtocolError, match="submitted cannot be copied"):
        generator.fork("submitted-0", replay=True)


def test_closing_cancels_what_is_under_way(held: tuple[Generator, Future[Trajectory]]) -> None:
    generator, future = held
    generator.close()
    assert future.result(LONG).stop.kind is StopKind.CANCELLED
    assert not [thread for thread in threading.enumerate() if thread.name == "midstream-submitted"]
    with pytest.raises(errors.ProtocolError, match="closed"):
        generator.submit("prompt 1")


def test_an_interrupted_row_is_gone_on_with(sandboxes: SandboxPool) -> None:
    prompt = Prompt(text="slow", id="slow")
    script = {"slow": "<code>x = 1; gate()</code> and <code>x + 1</code>"}
    gate = Gate()
    gate.opened.set()
    with Generator(scripted(script), pool=sandboxes, tools={"gate": gate}) as generator:
        whole = generator.submit(prompt).result(LONG)
    gate = Gate()
    with Generator(Replaying([whole]), pool=sandboxes, tools={"gate": gate}) as generator:
        future = generator.submit(prompt)
        assert gate.reached.wait(LONG)
        generator.interrupt()
        paused = future.result(LONG)
        assert paused.stop.kind is StopKind.PAUSED
        gate.opened.set()
        assert essence(generator.submit(paused).result(LONG)) == essence(whole)
    assert shown(whole) == ["'through'", "2"]


@pytest.mark.parametrize(
    ("prompt", "options", "error", "says"),
    [
        (7, {}, errors.PromptError, "prompt=7"),
        ("", {}, errors.PromptError, "empty"),
        (Prompt(ids=(10**9,)), {}, errors.PromptError, "ids are under"),
        (Prompt(text="far too long a prompt"), {}, errors.PromptError, "no room is left"),
        ("fine", {"sample": -1}, errors.ConfigurationError, "sample=-1"),
        ("fine", {"sample": True}, errors.ConfigurationError, "sample=True"),
    ],
)
def test_bad_prompts_are_refused_at_once(
    sandboxes: SandboxPool, prompt: object, options: dict[str, object], error: type[Exception], says: str
) -> None:
    engine = scripted("said", context_length=4)
    with Generator(engine, pool=sandboxes) as generator:
        with pytest.raises(error, match=says):
            generator.submit(prompt, **options)  # type: ignore[arg-type]
        assert engine.steps == 0
        assert generator.submit("fine").result(LONG).stop


def test_each_row_has_its_own_sampling_and_limits(sandboxes: SandboxPool) -> None:
    with Generator(scripted(CALLS), pool=sandboxes, sampling=Sampling(temperature=0.5)) as generator:
        greedy = generator.submit("prompt 1", sampling=Sampling(temperature=0))
        short = generator.submit(Prompt(text="prompt 2", limits=Limits(max_new_tokens=2)))
        wait([greedy, short], LONG)
    assert greedy.result().sampling == Sampling(temperature=0)
    assert short.result().sampling == Sampling(temperature=0.5)
    assert (short.result().generation_length, short.result().stop.kind) == (2, StopKind.LENGTH)


def test_what_the_drive_fails_with_is_in_every_future(sandboxes: SandboxPool) -> None:
    class Broken(RuntimeError):
        pass

    def refuse() -> None:
        raise Broken

    with Generator(scripted(CALLS), pool=sandboxes) as generator:
        generator._start_sandboxes = refuse  # type: ignore[method-assign]  # as where isolation does not hold
        futures = [generator.submit(text) for text in CALLS]
        for future in futures:
            with pytest.raises(Broken):
                future.result(LONG)
        del generator._start_sandboxes  # type: ignore[misc]
        assert generator.submit("prompt 1").result(LONG).stop.finished
