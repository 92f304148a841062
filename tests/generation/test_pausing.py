"""Pausing, new weights, interrupting and cancelling, from other threads, while a batch is generated."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from midstream import Generator, Limits, Prompt, SandboxPool, StopKind, Trajectory, errors
from tests.rollouts import LONG, Gate, Replaying, Stepping, essence, one, rollouts, scripted, shown

CODE = "<code>x = 3; y = 4</code>\nThis is some regular text.\n<code>x + y</code> so."


class Background:
    """Generates in another thread."""

    def __init__(self, generate: Callable[[], object]) -> None:
        self.result: list[object] = []
        self.error: list[BaseException] = []
        self._thread = threading.Thread(target=self._work, args=(generate,))
        self._thread.start()

    def _work(self, generate: Callable[[], object]) -> None:
        try:
            self.result.append(generate())
        except BaseException as error:  # noqa: BLE001  # looked at by the test
            self.error.append(error)

    def join(self) -> None:
        self._thread.join(LONG)
        assert not self._thread.is_alive(), "the batch hangs"
        if self.error:
            raise self.error[0]


def paused_at(generator: Generator, engine: Stepping, step: int) -> threading.Event:
    """Have the generator paused after that step; the event says that it rests."""
    rests = threading.Event()

    def pause() -> None:
        generator.pause()
        rests.set()

    def at_step(count: int) -> None:
        if count == step:
            threading.Thread(target=pause).start()
            until = time.monotonic() + LONG
            while not generator._control.rest_requested:
                assert time.monotonic() < until
                time.sleep(0.001)

    engine.at_step = at_step
    return rests


def test_nothing_is_sampled_while_paused_and_all_goes_on_as_if_nothing_had_been(sandboxes: SandboxPool) -> None:
    whole = rollouts({"a": CODE, "b": "word " * 30}, sandboxes)
    engine = Stepping(whole)
    with Generator(engine, pool=sandboxes) as generator:
        rests = paused_at(generator, engine, 10)
        background = Background(lambda: generator.generate([row.prompt for row in whole]))
        assert rests.wait(LONG)
        assert engine.steps == 10
        # The engine refuses to step while it is paused: a step now would end the rows with an error.
        generator.pause()  # a second time changes nothing
        generator.update_weights(lambda: None, 0)  # nor does this let it go on
        assert engine.steps == 10
        generator.resume()
        background.join()
    rows = background.result[0]
    assert all(row.weight_changes for row in rows)
    assert [essence(replace(row, weight_changes=())) for row in rows] == [essence(row) for row in whole]


def test_code_goes_on_running_while_paused(sandboxes: SandboxPool) -> None:
    gate = Gate()
    whole = one("<code>hold(); 1</code> x", sandboxes, tools={"hold": lambda: 1})
    with Generator(Replaying([whole]), pool=sandboxes, tools={"hold": gate}) as generator:
        background = Background(lambda: generator.generate([whole.prompt]))
        assert gate.reached.wait(LONG)
        generator.pause()
        gate.opened.set()
        until = time.monotonic() + LONG
        while generator.progress.calls == 0:
            assert time.monotonic() < until
            time.sleep(0.001)
        assert generator.progress.injected_tokens == 0  # its result waits for the engine
        generator.resume()
        background.join()
    assert essence(background.result[0][0]).segments == essence(whole).segments  # type: ignore[index]


def test_pausing_again_and_again_from_several_threads_never_hangs(sandboxes: SandboxPool) -> None:
    whole = rollouts({"a": CODE * 4, "b": "word " * 150}, sandboxes, n=2)
    with Generator(Replaying(whole), pool=sandboxes) as generator:

        def pause_and_resume() -> None:
            for _ in range(30):
                generator.pause()
                generator.resume()

        def update() -> None:
            for _ in range(30):
                generator.update_weights(lambda: None, 0)

        others = [Background(work) for work in (pause_and_resume, pause_and_resume, update, update)]
        prompts = [row.prompt for row in whole if row.sample == 0]
        background = Background(lambda: generator.generate(prompts, n=2))
        for other in others:
            other.join()
        background.join()
    assert [essence(row) for row in background.result[0]] == [essence(row) for row in whole]  # type: ignore[attr-defined]


def test_a_pause_that_another_thread_takes_back_waits_no_longer(sandboxes: SandboxPool) -> None:
    whole = one("word " * 10, sandboxes)
    engine = Stepping([whole])
    in_step, go_on = threading.Event(), threading.Event()

    def at_step(step: int) -> None:
        in_step.set()
        assert go_on.wait(2 * LONG)

    engine.at_step = at_step
    with Generator(engine, pool=sandboxes) as generator:
        background = Background(lambda: generator.generate([whole.prompt]))
        assert in_step.wait(LONG)
        pausing = Background(generator.pause)
        until = time.monotonic() + LONG
        while not generator._control.rest_requested:
            assert time.monotonic() < until
            time.sleep(0.001)
        generator.resume()
        pausing.join()  # though the engine is in its step still
        assert not go_on.is_set()
        go_on.set()
        background.join()
    assert background.result[0][0].ids == whole.ids  # type: ignore[index]


def test_a_batch_that_is_started_while_paused_waits(sandboxes: SandboxPool) -> None:
    whole = one(CODE, sandboxes)
    engine = Replaying([whole])
    with Generator(engine, pool=sandboxes) as generator:
        generator.pause()  # returns at once: nothing is sampled
        background = Background(lambda: generator.generate([whole.prompt]))
        generator.update_weights(lambda: None, 7)  # waits until the batch, if it has begun, rests
        assert (engine.steps, engine.open_rows) == (0, 0)
        generator.resume()
        background.join()
    row: Trajectory = background.result[0][0]  # type: ignore[index]
    assert row.ids == whole.ids
    assert {version for version, own in zip(row.weight_versions, row.mask, strict=True) if own} == {7}


def test_new_weights_that_fail_to_load_let_the_batch_go_on(sandboxes: SandboxPool) -> None:
    with Generator(scripted(CODE), pool=sandboxes) as generator:
        with pytest.raises(OSError, match="no file"):
            generator.update_weights(_fails, 3)
        row = generator.generate(["p"])[0]
    assert row.stop.kind is StopKind.END_OF_SEQUENCE
    assert max(row.weight_versions) == 0


def _fails() -> None:
    raise OSError("no file")


async def test_pausing_on_the_loop_that_generates_is_refused_where_it_would_wait_for_itself(
    sandboxes: SandboxPool,
) -> None:
    gate = Gate()
    with Generator(scripted("<code>hold()</code>"), pool=sandboxes, tools={"hold": gate}) as generator:
        task = asyncio.create_task(generator.generate_async(["p"]))
        await asyncio.to_thread(gate.reached.wait, LONG)
        with pytest.raises(errors.ProtocolError, match="from another thread"):
            generator.pause()
        with pytest.raises(errors.ProtocolError, match="from another thread"):
            generator.update_weights(lambda: None, 1)
        await asyncio.to_thread(generator.pause)
        generator.resume()
        gate.opened.set()
        assert (await task)[0].stop.kind is StopKind.END_OF_SEQUENCE
        generator.pause()  # with nothing under way there is nothing to wait for
        generator.resume()


async def test_pausing_on_the_loop_is_refused_while_the_batch_is_about_to_begin(sandboxes: SandboxPool) -> None:
    about_to, going_on = threading.Event(), threading.Event()

    def wait() -> None:
        about_to.set()
        assert going_on.wait(LONG)

    with Generator(scripted(CODE), pool=sandboxes) as generator:
        generator._start_sandboxes = wait  # type: ignore[method-assign]
        task = asyncio.create_task(generator.generate_async(["p"]))
        assert await asyncio.to_thread(about_to.wait, LONG)
        with pytest.raises(errors.ProtocolError, match="from another thread"):
            generator.pause()
        going_on.set()
        assert (await task)[0].stop.kind is StopKind.END_OF_SEQUENCE


def test_time_limits_do_not_run_while_paused(sandboxes: SandboxPool) -> None:
    whole = one("word " * 20, sandboxes)
    engine = Stepping([whole])
    with Generator(engine, pool=sandboxes, limits=Limits(time_limit=0.4)) as generator:
        rests = paused_at(generator, engine, 3)
        background = Background(lambda: generator.generate([whole.prompt]))
        assert rests.wait(LONG)
        time.sleep(0.5)  # longer than the row may take
        generator.resume()
        background.join()
    assert background.result[0][0].stop.kind is StopKind.END_OF_SEQUENCE  # type: ignore[index]


# --- interrupting


def test_interrupting_gives_finished_rows_paused_ones_and_those_that_never_began(sandboxes: SandboxPool) -> None:
    rewarded: list[str] = []
    whole = rollouts({"short": "a", "long": "word " * 40, "never": CODE}, sandboxes)
    engine = Stepping(whole)
    with Generator(engine, pool=sandboxes, max_open_rows=2) as generator:
        engine.at_step = lambda step: generator.interrupt() if step == 2 else None
        prompts = [row.prompt for row in whole]
        batch = generator.generate(prompts, reward=lambda row: rewarded.append(str(row.prompt.id)) or 1)
        assert [row.stop.kind for row in batch] == [StopKind.END_OF_SEQUENCE, StopKind.PAUSED, StopKind.PAUSED]
        assert [row.generation_length for row in batch[1:]] == [2, 0]
        assert rewarded == ["short"]
        assert batch.unfinished == [batch[1], batch[2]]
        engine.at_step = lambda step: None
        rest = generator.generate(batch.unfinished, reward=lambda row: rewarded.append(str(row.prompt.id)) or 1)
    assert [essence(row).segments for row in rest] == [essence(row).segments for row in whole[1:]]
    assert rewarded == ["short", *rewarded[1:]]
    assert sorted(rewarded[1:]) == ["long", "never"]
    assert rest[0].duration >= batch[1].duration > 0


def test_paused_rows_and_new_prompts_make_one_batch(sandboxes: SandboxPool) -> None:
    whole = rollouts({"a": "word " * 20, "b": CODE}, sandboxes, n=2)
    engine = Stepping(whole)
    with Generator(engine, pool=sandboxes) as generator:
        engine.at_step = lambda step: generator.interrupt() if step == 5 else None
        paused = generator.generate([whole[0].prompt], n=2)
        engine.at_step = lambda step: None
        batch = generator.generate([paused[1], whole[2].prompt, paused[0]], n=2)
    assert [essence(row) for row in batch] == [essence(whole[place]) for place in (1, 2, 3, 0)]


def test_an_interruption_before_the_batch_begins_is_of_no_effect(sandboxes: SandboxPool) -> None:
    with Generator(scripted(CODE), pool=sandboxes) as generator:
        generator.interrupt()
        assert generator.generate(["p"])[0].stop.kind is StopKind.END_OF_SEQUENCE


def test_an_interruption_is_not_lost_while_the_batch_is_about_to_begin(sandboxes: SandboxPool) -> None:
    engine = scripted(CODE)
    with Generator(engine, pool=sandboxes) as generator:
        generator._start_sandboxes = generator.interrupt  # type: ignore[method-assign]  # which comes just before
        batch = generator.generate(["p", "q"])
    assert [row.stop.kind for row in batch] == [StopKind.PAUSED] * 2
    assert engine.steps == 0


def test_a_row_that_stopped_cannot_be_gone_on_with(sandboxes: SandboxPool) -> None:
    with Generator(scripted(CODE), pool=sandboxes) as generator:
        row = generator.generate(["p"])[0]
        with pytest.raises(errors.ConfigurationError, match="has stopped"):
            generator.generate([row])


def test_a_row_paused_at_its_limits_stops_when_it_is_gone_on_with(sandboxes: SandboxPool) -> None:
    whole = one("word " * 20, sandboxes)
    engine = Stepping([whole])
    with Generator(engine, pool=sandboxes) as generator:
        engine.at_step = lambda step: generator.interrupt() if step == 5 else None
        paused = generator.generate([whole.prompt])
    with Generator(Replaying([whole]), pool=sandboxes, limits=Limits(max_new_tokens=5)) as generator:
        row = generator.generate(list(paused))[0]
    assert (row.stop.kind, row.generation_length) == (StopKind.LENGTH, 5)
    assert row.duration == paused[0].duration


def test_interrupting_a_paused_batch_ends_it_without_another_step(sandboxes: SandboxPool) -> None:
    whole = one("word " * 30, sandboxes)
    engine = Stepping([whole])
    with Generator(engine, pool=sandboxes) as generator:
        rests = paused_at(generator, engine, 6)
        background = Background(lambda: generator.generate([whole.prompt]))
        assert rests.wait(LONG)
        generator.interrupt()
        background.join()
        generator.resume()
    assert engine.steps == 6
    assert background.result[0][0].generation_length == 6  # type: ignore[index]


def test_interrupting_while_weights_change_waits_for_them(sandboxes: SandboxPool) -> None:
    whole = one("word " * 30, sandboxes)
    engine = Stepping([whole])
    open_rows: list[int] = []
    with Generator(engine, pool=sandboxes) as generator:
        rests = paused_at(generator, engine, 6)
        background = Background(lambda: generator.generate([whole.prompt]))
        assert rests.wait(LONG)

        def change() -> None:
            generator.interrupt()
            time.sleep(0.05)  # time for the batch to close its rows under our hands, if it were to
            open_rows.append(engine.open_rows)

        generator.update_weights(change, 1)
        background.join()
    assert open_rows == [1]
    assert background.result[0][0].stop.kind is StopKind.PAUSED  # type: ignore[index]


def test_cancelling_cancels_what_is_not_finished(sandboxes: SandboxPool) -> None:
    gate = Gate()
    rewarded: list[str] = []
    scripts = {"done": "a", "waits": "<code>hold()</code>", "runs": "word " * 50}
    engine = scripted(scripts)
    try:
        with Generator(engine, pool=sandboxes, tools={"hold": gate}) as generator:

            def reward(row: Trajectory) -> float:
                rewarded.append(str(row.prompt.id))
                gate.reached.wait(LONG)
                generator.cancel()
                return 1

            batch = generator.generate([Prompt(text=text, id=text) for text in scripts], reward=reward)
    finally:
        gate.opened.set()
    assert batch[0].reward == 1
    assert batch[1].stop.kind is StopKind.CANCELLED
    assert shown(batch[1]) == [None]
    assert "waits" not in rewarded  # nobody wants to wait for the rewards of what was given up
    assert not batch[1].stop.resumable
    assert engine.open_rows == 0


def test_closing_the_generator_ends_its_batch(sandboxes: SandboxPool) -> None:
    gate = Gate()
    generator = Generator(scripted("<code>hold()</code>"), pool=sandboxes, tools={"hold": gate})
    background = Background(lambda: generator.generate(["p"]))
    assert gate.reached.wait(LONG)
    generator.close()
    gate.opened.set()
    background.join()
    assert background.result[0][0].stop.kind is StopKind.CANCELLED  # type: ignore[index]


def test_ids_of_the_step_during_which_a_batch_is_interrupted_are_kept(sandboxes: SandboxPool) -> None:
    whole = one("word " * 30, sandboxes)
    engine = Stepping([whole], tokens_per_step=4)
    with Generator(engine, pool=sandboxes) as generator:
        engine.at_step = lambda step: generator.interrupt() if step == 2 else None
        paused = generator.generate([whole.prompt])[0]
    assert paused.ids == whole.ids[: len(paused.prompt_ids) + 8]
