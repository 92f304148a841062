"""Streams, leaving them early, and Ctrl-C: what is finished is kept, and nothing else is left behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from midstream import Generator, Prompt, SandboxPool, Trajectory, errors
from midstream.engines.base import Handle, Update
from tests.rollouts import (
    LONG,
    Gate,
    Replaying,
    descendants,
    essence,
    open_descriptors,
    rollouts,
    scripted,
    shown,
)

CODE = "<code>x = 3; y = 4</code> and <code>x + y</code>"
ROOT = Path(__file__).parents[2]


async def test_a_stream_gives_each_trajectory_as_it_finishes(sandboxes: SandboxPool) -> None:
    gate = Gate()
    scripts = {"waits": "<code>hold()</code>", "short": "a", "code": CODE}
    order: list[str] = []
    with Generator(scripted(scripts), pool=sandboxes, tools={"hold": gate}) as generator:
        async for row in generator.stream([Prompt(text=text, id=text) for text in scripts]):
            order.append(str(row.prompt.id))
            if len(order) == 2:
                gate.opened.set()  # only now can the first row go on
    assert sorted(order[:2]) == ["code", "short"]
    assert order[2] == "waits"


async def test_a_stream_refuses_bad_prompts_when_it_is_begun(sandboxes: SandboxPool) -> None:
    with Generator(scripted(""), pool=sandboxes) as generator:
        with pytest.raises(errors.PromptError):
            async for _ in generator.stream([""]):
                pass
        assert [row.generation_length async for row in generator.stream(["x"])] == [1]


class Watched(Replaying):
    """Refuses to be driven from two threads at a time."""

    def __init__(self, rows: Any, **options: Any) -> None:
        super().__init__(rows, **options)
        self.inside = threading.Lock()
        self.clashes = 0
        self.hold_step: Callable[[], None] = lambda: None

    def step(self) -> list[Update]:
        with self.inside:
            self.hold_step()
            return super().step()

    def close(self, handle: Handle) -> None:
        self.clashes += self.inside.locked()
        super().close(handle)


async def test_leaving_a_stream_early_leaves_nothing_behind() -> None:
    gate = Gate()
    scripts = {"short": "a", "waits": "<code>hold()</code>", "long": "word " * 300, "code": CODE * 10}
    with SandboxPool(preload=[]) as pool:
        whole = rollouts(scripts, pool, n=3, tools={"hold": lambda: 1})
        with Generator(Watched(whole), pool=pool, tools={"hold": gate}) as generator:
            # What asyncio, the pool and the tools keep between batches is there already.
            gate.opened.set()
            await generator.generate_async([whole[3].prompt])
            gate.opened.clear()
            gate.reached.clear()
            descriptors, threads = open_descriptors(), set(threading.enumerate())
            processes = descendants(os.getpid())
            for _ in range(3):
                async with aclosing(generator.stream([Prompt(text=t, id=t) for t in scripts], n=3)) as stream:
                    async for row in stream:
                        assert row.prompt.id == "short"
                        await asyncio.to_thread(gate.reached.wait, LONG)
                        break
                assert asyncio.all_tasks() == {asyncio.current_task()}
                assert isinstance(generator.engine, Watched)
                assert generator.engine.open_rows == 0
                assert generator.engine.clashes == 0
                assert open_descriptors() == descriptors
            gate.opened.set()
            started = {thread for thread in threading.enumerate() if thread not in threads}
            # The tool has a thread for each call that waits in it at a time, and keeps them.
            assert all(thread.name.startswith(("tool-hold", "asyncio")) for thread in started), started
            await _until(lambda: descendants(os.getpid()) <= processes)
            # And the generator is free for the next batch.
            batch = await generator.generate_async([row.prompt for row in whole if row.sample == 0], n=3)
            assert [essence(row).ids for row in batch if row.prompt.id != "waits"] == [
                row.ids for row in whole if row.prompt.id != "waits"
            ]
        await _until(lambda: not any(t.name.startswith("midstream") for t in threading.enumerate()))


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LONG):
        while not condition():
            await asyncio.sleep(0.01)


async def test_rows_are_not_closed_while_the_engine_samples(sandboxes: SandboxPool) -> None:
    whole = rollouts({"a": "x", "b": "word " * 50}, sandboxes)
    engine = Watched(whole)
    in_step, go_on = threading.Event(), threading.Event()

    def hold_step() -> None:
        if engine.steps == 10:
            in_step.set()
            assert go_on.wait(LONG)

    engine.hold_step = hold_step
    with Generator(engine, pool=sandboxes) as generator:
        stream = generator.stream([row.prompt for row in whole])
        assert (await anext(stream)).prompt.id == "a"
        await asyncio.to_thread(in_step.wait, LONG)
        leaving = asyncio.create_task(stream.aclose())
        await asyncio.sleep(0.01)
        assert not leaving.done()
        assert engine.open_rows == 1
        go_on.set()
        await leaving
    assert (engine.open_rows, engine.clashes) == (0, 0)


async def test_a_stream_that_is_left_by_break_is_closed_by_the_event_loop(sandboxes: SandboxPool) -> None:
    with Generator(scripted({"a": "x", "b": "word " * 300}), pool=sandboxes) as generator:
        async for _ in generator.stream([Prompt(text="a"), Prompt(text="b")]):
            break
        await _until(lambda: len(asyncio.all_tasks()) == 1)
        assert len(await generator.generate_async([Prompt(text="a")])) == 1


def test_a_stream_whose_reader_fails_ends_with_its_event_loop(sandboxes: SandboxPool) -> None:
    async def read() -> None:
        async for _ in generator.stream([Prompt(text="a"), Prompt(text="b")]):
            raise ValueError("the reader's own")

    engine = scripted({"a": "x", "b": "word " * 300})
    with Generator(engine, pool=sandboxes) as generator:
        for _ in range(3):
            with pytest.raises(ValueError, match="the reader's own"):
                asyncio.run(read())
            assert engine.open_rows == 0
        generator.cancel()  # knows of no event loop that is gone
        assert len(generator.generate([Prompt(text="a")])) == 1


async def test_a_batch_whose_task_is_cancelled_leaves_nothing_behind(sandboxes: SandboxPool) -> None:
    gate = Gate()
    engine = scripted("<code>hold()</code>")
    with Generator(engine, pool=sandboxes, tools={"hold": gate}) as generator:
        task = asyncio.create_task(generator.generate_async(["p", "q"]))
        await asyncio.to_thread(gate.reached.wait, LONG)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert engine.open_rows == 0
        gate.opened.set()
        assert shown((await generator.generate_async(["p"]))[0]) == ["'through'"]


async def test_an_async_tool_of_a_left_batch_is_cancelled(sandboxes: SandboxPool) -> None:
    waiting, cancelled = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        waiting.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    with Generator(scripted({"a": "x", "b": "<code>wait()</code>"}), pool=sandboxes, tools=[wait]) as generator:
        async with aclosing(generator.stream([Prompt(text="a"), Prompt(text="b")])) as stream:
            async for row in stream:
                assert row.generation_length == 2
                await waiting.wait()
                break
        assert cancelled.is_set()


# --- Ctrl-C, which only a process of its own can be sent

PROGRAM = """
import asyncio, json, os, sys, threading
from midstream import Generator, Prompt, SandboxPool
from tests.rollouts import Gate, descendants, scripted

def main(where):
    gate = Gate()
    done = threading.Event()
    scripts = {"done": "<code>6 * 7</code> so", "waits": "<code>x = 1</code> and <code>hold()</code>"}
    def reward(row):
        done.set()
        return 1.0
    def tell():
        gate.reached.wait(); done.wait()
        while generator.progress.finished < 1: pass
        print("ready", flush=True)
    with Generator(scripted(scripts), tools={"hold": gate}) as generator:
        threading.Thread(target=tell, daemon=True).start()
        prompts = [Prompt(text=text, id=text) for text in scripts]
        try:
            if where == "sync":
                generator.generate(prompts, reward=reward)
            else:
                asyncio.run(generator.generate_async(prompts, reward=reward))
        except KeyboardInterrupt:
            batch = generator.interrupted
            kept = None if batch is None else [
                (row.prompt.id, row.stop.kind, row.reward, [c.result and c.result.text for c in row.calls])
                for row in batch
            ]
            print(json.dumps({"kept": kept, "rows": generator.engine.open_rows}), flush=True)
    names = sorted(t.name for t in threading.enumerate() if t.name.startswith("midstream") and "tool" not in t.name)
    print(json.dumps({"threads": names, "processes": sorted(descendants(os.getpid()))}), flush=True)

main(sys.argv[1])
"""


@pytest.mark.parametrize("to_group", [False, True])
@pytest.mark.parametrize("where", ["sync", "async"])
def test_ctrl_c_keeps_what_is_finished_and_leaves_nothing_behind(where: str, to_group: bool) -> None:
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", PROGRAM, where],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}/src:{ROOT}"},
        start_new_session=True,  # a process group of its own, as a terminal gives it
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        # A terminal sends Ctrl-C to the whole group, sandboxes included were they in it; kill sends it to one.
        (os.killpg if to_group else os.kill)(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=LONG)  # the tool that never returns does not keep it
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, err
    told, left = (json.loads(line) for line in out.splitlines())
    finished, cancelled = ["done", "end_of_sequence", 1.0, ["42"]], ["waits", "cancelled", None, ["", None]]
    assert told["kept"] == ([finished, cancelled] if where == "sync" else [finished])
    assert told["rows"] == 0
    assert left == {"threads": [], "processes": []}


def test_reward_functions_that_still_run_when_a_stream_is_left_hold_nobody(sandboxes: SandboxPool) -> None:
    gate = Gate()

    def reward(row: Trajectory) -> float:
        if row.prompt.id == "b":
            gate()
        return 1.0

    async def leave_early() -> None:
        stream = generator.stream([Prompt(text="a", id="a"), Prompt(text="b", id="b")], reward=reward)
        async with aclosing(stream):
            assert (await anext(stream)).reward == 1.0
            await asyncio.to_thread(gate.reached.wait, LONG)

    with Generator(scripted("x"), pool=sandboxes) as generator:
        asyncio.run(leave_early())
    assert not gate.opened.is_set()
    gate.opened.set()
