"""Tools on the host: names, threads, and what they may raise."""

from __future__ import annotations

import asyncio
import threading
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest

from midstream import ExecutionError, Generator, Prompt, SandboxPool, Tool, ToolContext, ToolSet, tool
from midstream.errors import ProtocolError
from midstream.records import read_records
from midstream.records.schema import decode_record
from midstream.tools import CallThreads, ToolHost, call
from tests.rollouts import LONG, Gate, Stepping, one, rollouts, scripted, shown


class Adder:
    name = "add"

    def __call__(self, a: int, b: int = 10) -> int:
        return a + b


class AsyncAdder:
    async def __call__(self, a: int, b: int = 10) -> int:
        await asyncio.sleep(0)
        return a + b


async def async_add(a: int, b: int = 10) -> int:
    await asyncio.sleep(0)
    return a + b


@pytest.mark.parametrize(
    "tools",
    [
        {"add": lambda a, b=10: a + b},
        {"add": async_add},
        {"add": Adder()},
        {"add": AsyncAdder()},
        {"add": partial(async_add)},
        {"add": lambda a, b=10: async_add(a, b)},
        [Adder()],
        [Tool("add", async_add)],
        {"add": Adder().__call__},
    ],
)
def test_tools_are_callables_of_any_kind(sandboxes: SandboxPool, tools: Any) -> None:
    row = one("<code>add(1), add(1, b=2), add(b=3, a=4)</code>", sandboxes, tools=tools)
    assert shown(row) == ["(11, 3, 7)"]


def test_values_cross(sandboxes: SandboxPool) -> None:
    given: list[Any] = []
    value = {"a": [1, 2.5, None, True, "é€🙂"], "b": {}}
    tools = {"give": lambda *arguments, **more: given.append((arguments, more)) or value}
    row = one("<code>give([1, (2, 3)], k={'x': None}) == " + repr(value) + "</code>", sandboxes, tools=tools)
    assert shown(row) == ["True"]
    assert given == [(([1, (2, 3)],), {"k": {"x": None}})]


def test_a_name_that_is_no_tool_is_none(sandboxes: SandboxPool) -> None:
    row = one("<code>subtract(1)</code>", sandboxes, tools=[Adder()])
    assert shown(row) == ["NameError(\"name 'subtract' is not defined\")"]


def test_slow_tools_of_many_rows_run_at_the_same_time(sandboxes: SandboxPool) -> None:
    together = threading.Barrier(12)
    scripts = {f"{i}": "<code>meet()</code>" for i in range(12)}
    batch = rollouts(scripts, sandboxes, tools={"meet": lambda: together.wait(LONG) >= 0})
    assert [shown(row) for row in batch] == [["True"]] * 12  # none could pass before all had come


def test_a_tool_set_knows_its_tools() -> None:
    tools = ToolSet([Adder(), len])
    assert (tools.names, len(tools), "add" in tools, "sub" in tools) == (("add", "len"), 2, True, False)
    assert [tool.name for tool in tools] == ["add", "len"]
    assert tools["len"].function is len


async def test_an_unknown_tool_is_a_name_error() -> None:
    host = ToolHost(ToolSet([len]))
    answer = await host.row().call("nothing", [], {})
    assert answer.error == ExecutionError("NameError", "name 'nothing' is not defined")
    host.close()


# --- threads


def raises(error: BaseException) -> Any:
    raise error


@pytest.mark.parametrize(
    ("error", "becomes"),
    [
        (ValueError("v"), (ValueError, "v")),
        (StopIteration("s"), (RuntimeError, "it raised StopIteration")),
        (SystemExit(1), (RuntimeError, r"it raised SystemExit\(1\)")),
        (KeyboardInterrupt(), (RuntimeError, "it raised KeyboardInterrupt")),
        (asyncio.CancelledError(), (RuntimeError, "it was cancelled")),
        (TimeoutError("t"), (TimeoutError, "t")),
    ],
)
@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_what_a_call_raises_cannot_harm_the_event_loop(
    kind: str, error: BaseException, becomes: tuple[type[Exception], str]
) -> None:
    async def raises_later() -> None:
        await asyncio.sleep(0)
        raise error

    if kind == "async" and isinstance(error, StopIteration):
        becomes = RuntimeError, "coroutine raised StopIteration"
    threads = CallThreads(2, "test")
    with pytest.raises(becomes[0], match=becomes[1]):
        await call(threads, raises_later if kind == "async" else partial(raises, error))
    assert await call(threads, lambda: 5) == 5
    threads.close()


async def test_a_cancellation_from_outside_passes_through_a_call() -> None:
    gate = Gate()
    threads = CallThreads(1, "test")
    task = asyncio.create_task(call(threads, gate))
    await asyncio.to_thread(gate.reached.wait, LONG)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.opened.set()
    threads.close()


def test_threads_start_when_needed_are_used_again_and_end_with_close() -> None:
    threads = CallThreads(3, "counted")

    def alive() -> int:
        return sum(thread.name.startswith("counted") for thread in threading.enumerate())

    assert alive() == 0
    for value in range(10):
        assert threads.submit(lambda value=value: value).result(LONG) == (value, None)  # type: ignore[misc]
    assert 1 <= alive() <= 3
    gates = [Gate() for _ in range(5)]
    futures = [threads.submit(gate) for gate in gates]
    for gate in gates[:3]:
        assert gate.reached.wait(LONG)
    assert alive() == 3  # the most; two calls wait
    gates[0].opened.set()
    assert gates[3].reached.wait(LONG)
    threads.close()
    with pytest.raises(ProtocolError, match="counted: closed"):
        futures[4].result(LONG)
    with pytest.raises(ProtocolError, match="counted: closed"):
        threads.submit(print)
    for gate in gates:
        gate.opened.set()
    assert futures[3].result(LONG) == ("through", None)
    assert not gates[4].reached.is_set()


# --- typed tools in rows


class NotFound(LookupError):
    pass


@tool(batched=True, pure=True, batch_size=3, batch_window=LONG / 2)
def shout(words: list[str]) -> list[Any]:
    """Say it loud."""
    return [NotFound(f"no {word}") if word == "b" else (word.upper(), {1}) for word in words]


def whose(who: ToolContext) -> Any:
    return [who.prompt_id, who.group, who.sample, who.metadata.get("user")]


def test_tools_are_told_whose_call_it_is(sandboxes: SandboxPool) -> None:
    prompts = [
        Prompt(text="one", id="one", metadata={"user": "ann"}),
        Prompt(text="two", id="two", group="g", metadata={"user": "bob"}),
    ]
    script = "<code>whose()</code>"
    with Generator(scripted({"one": script, "two": script}), pool=sandboxes, tools=[whose]) as generator:
        rows = generator.generate(prompts, 2)
    assert [shown(row) for row in rows] == [
        ["['one', 'one', 0, 'ann']"],
        ["['one', 'one', 1, 'ann']"],
        ["['two', 'g', 0, 'bob']"],
        ["['two', 'g', 1, 'bob']"],
    ]


class Counter:
    closed: ClassVar[list[str | None]] = []

    def __init__(self, context: ToolContext) -> None:
        self.context = context
        self.count = 0

    def __call__(self) -> int:
        self.count += 1
        return self.count

    def close(self) -> None:
        self.closed.append(self.context.prompt_id)


def test_a_stateful_tool_lives_as_long_as_its_row(sandboxes: SandboxPool) -> None:
    Counter.closed.clear()
    scripts = dict.fromkeys("ab", "<code>count()</code> <code>count(), count()</code>")
    rows = rollouts(scripts, sandboxes, tools=[tool(per_row=True, name="count")(Counter)])
    assert [shown(row) for row in rows] == [["1", "(2, 3)"]] * 2
    assert sorted(map(str, Counter.closed)) == ["a", "b"]


def test_rows_share_batches_and_answers_and_their_records_say_so(sandboxes: SandboxPool, tmp_path: Path) -> None:
    words = "aabc"
    scripts = {
        f"{place}": f"<code>try:\n    print(shout({word!r}))\nexcept LookupError as e:\n    print(repr(e))</code>"
        for place, word in enumerate(words)
    }
    with Generator(scripted(scripts), pool=sandboxes, tools=[shout]) as generator:
        batch = generator.generate([Prompt(text=name, id=name) for name in scripts])
        batch.save(tmp_path / "rows.jsonl")
    assert [shown(row) for row in batch] == [
        [f"{text}"] for text in ("('A', {1})", "('A', {1})", "NotFound('no b')", "('C', {1})")
    ]
    calls = [row.calls[0].result.tool_calls[0] for row in batch]  # type: ignore[union-attr]
    assert sum(call.cached for call in calls[:2]) == 1
    assert [call.batched for call in calls[2:]] == [3, 3]  # three words, one batch
    assert calls[2].error == ExecutionError("NotFound", "no b", base="LookupError")
    again = [record.trajectory for record in read_records(tmp_path / "rows.jsonl")]
    assert [row.calls for row in again] == [row.calls for row in batch]


def test_a_resumed_rows_blocks_run_again_with_their_typed_answers(sandboxes: SandboxPool) -> None:
    calls: list[Any] = []

    def give(x: Any) -> Any:
        calls.append(x)
        if x == 2:
            raise NotFound("two")
        return (x, {b"1"}, float("nan"), 2**90)

    code = "kept = give((1, frozenset()))\ntry: give(2)\nexcept LookupError as e: fault = e\n'first'"
    script = f"<code>{code}</code> <code>kept, fault</code>"
    whole = one(script, sandboxes, tools=[give])
    assert shown(whole) == [
        "'first'",
        "(((1, frozenset()), {b'1'}, nan, 1237940039285380274899124224), NotFound('two'))",
    ]
    assert len(calls) == 2
    with Generator(Stepping([whole]), pool=sandboxes, tools=[give]) as generator:
        engine = generator.engine
        assert isinstance(engine, Stepping)
        engine.at_step = lambda step: generator.interrupt() if step == len(whole.segments[0].ids) + 3 else None
        paused = generator.generate([whole.prompt])[0]
        assert paused.stop.resumable
        record = decode_record(generator.record(paused).encode())
        calls.clear()
        engine.at_step = lambda step: None
        resumed = generator.generate([record.trajectory])[0]
    assert shown(resumed) == shown(whole)
    assert calls == []  # the answers were those of the record
