"""Where the calls of all rows meet: batches, shared and remembered answers, bounds, deadlines, faults."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import pytest

from midstream import ToolContext, ToolSet, tool
from midstream.crossing import to_json
from midstream.errors import EngineError, MidstreamError, ProtocolError
from midstream.tools import RowTools, Tool, ToolHost
from midstream.tools.memory import Memory
from midstream.types import ExecutionError, ToolAnswer
from tests.rollouts import LONG, Gate


@asynccontextmanager
async def hosting(*tools: Any, **options: Any) -> AsyncIterator[ToolHost]:
    host = ToolHost(ToolSet(tools), **options)
    try:
        yield host
    finally:
        await asyncio.to_thread(host.close)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LONG):
        while not condition():
            await asyncio.sleep(0.001)


class Counting:
    """A tool that notes its calls and how many run at a time."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seen: list[Any] = []
        self.running = self.most = 0
        self.seconds = seconds
        self.lock = threading.Lock()

    def __call__(self, x: Any) -> Any:
        with self.lock:
            self.seen.append(x)
            self.running += 1
            self.most = max(self.most, self.running)
        time.sleep(self.seconds)
        with self.lock:
            self.running -= 1
        return [x]


class AsyncCounting(Counting):
    async def __call__(self, x: Any) -> Any:
        self.seen.append(x)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.running -= 1
        return [x]


class Many:
    """A tool for batches."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.gate: asyncio.Event | None = None

    async def __call__(self, x: list[int]) -> list[Any]:
        self.batches.append(list(x))
        if self.gate is not None:
            await self.gate.wait()
        return [[one] for one in x]


# --- one call


async def test_a_call_gives_a_value_in_json_or_an_error() -> None:
    def divide(a: int, b: int) -> tuple[int, int]:
        return divmod(a, b)

    async with hosting(divide) as host:
        row = host.row()
        assert await row.call("divide", [7], {"b": 2}) == ToolAnswer({"$type": "tuple", "items": [3, 1]})
        assert (await row.call("divide", [1, 0])).error == ExecutionError(
            "ZeroDivisionError", "integer division or modulo by zero"
        )
        missing = await row.call("divide", [1])
        assert missing.error == ExecutionError("TypeError", "divide() missing 1 required positional argument: 'b'")


async def test_an_answer_that_cannot_cross_is_told_as_that() -> None:
    async def later() -> Any:
        return object()

    async with hosting(Tool("now", lambda: iter([])), later) as host:
        for name, what in (("now", "a list_iterator"), ("later", "an object")):
            answer = await host.row().call(name)
            assert answer.error == ExecutionError(
                "TypeError", f"the answer of {name}() cannot be passed on: {what} cannot cross"
            )


async def test_faults_of_the_library_are_raised() -> None:
    def broken(x: int) -> int:
        raise EngineError("the engine broke")

    async with hosting(
        broken, Tool("pure", broken, pure=True), Tool("many", lambda x: broken(x), batched=True)
    ) as host:
        for name in ("broken", "pure", "many"):
            with pytest.raises(EngineError):
                await host.row().call(name, [1])


async def test_whose_call_it_is() -> None:
    def ask(query: str, who: ToolContext, k: int = 2) -> Any:
        return [query, who.prompt_id, who.group, who.sample, who.seed, dict(who.metadata), k]

    async def many(query: list[str], who: list[ToolContext]) -> list[Any]:
        return [[text, each.prompt_id] for text, each in zip(query, who, strict=True)]

    def apart(queries: Sequence[str], who: Sequence[ToolContext]) -> list[Any]:
        return [[text, each.sample] for text, each in zip(queries, who, strict=True)]

    def answer(query: str, *, who: ToolContext) -> Any:
        raise AssertionError

    context = ToolContext("p7", "g", 3, 11, {"user": 1})
    async with hosting(ask, Tool("many", many, batched=True), Tool("apart", answer, batched=apart)) as host:
        row, other = host.row(context), host.row(ToolContext("p8"))
        assert (await row.call("ask", ["q", 5])).value == ["q", "p7", "g", 3, 11, {"user": 1}, 5]
        answers = await asyncio.gather(row.call("many", ["a"]), other.call("many", ["b"]))
        assert [(one.value, one.batched) for one in answers] == [(["a", "p7"], 2), (["b", "p8"], 2)]
        assert (await row.call("apart", ["a"])).value == ["a", 3]


async def test_names_that_are_no_tools_any_more() -> None:
    async with hosting(Counting, Tool("gone", len)) as host:
        row = host.row()
        assert (await row.call("gone", [[1]])).value == 1
        host.withdraw("gone")
        assert (await row.call("gone", [[1]])).error == ExecutionError("RuntimeError", "gone() is no longer available")
        assert (await row.call("never")).error == ExecutionError("NameError", "name 'never' is not defined")


async def test_calls_per_row() -> None:
    async with hosting(Tool("few", len, calls_per_row=2), Tool("once", len, calls_per_row=1)) as host:
        for row in (host.row(), host.row()):
            answers = [await row.call("few", [[]]) for _ in range(3)]
            assert [one.value for one in answers[:2]] == [0, 0]
            assert answers[2].error == ExecutionError("RuntimeError", "few() may be called at most 2 times")
            await row.call("once", [[]])
            last = (await row.call("once", [[]])).error
            assert last is not None
            assert last.message == "once() may be called at most once"


# --- batches


async def test_calls_that_come_together_are_one_batch() -> None:
    many = Many()
    async with hosting(Tool("many", many, batched=True, batch_window=0.05)) as host:
        answers = await asyncio.gather(*(host.row().call("many", [i]) for i in range(20)))
    assert [one.value for one in answers] == [[i] for i in range(20)]
    assert {one.batched for one in answers} == {20}
    assert many.batches == [list(range(20))]


async def test_a_batch_has_a_largest_size_and_does_not_wait_when_it_is_full() -> None:
    many = Many()
    async with hosting(Tool("many", many, batched=True, batch_window=1000.0, batch_size=4)) as host:
        answers = await asyncio.gather(*(host.row().call("many", [i]) for i in range(8)))
    assert [len(batch) for batch in many.batches] == [4, 4]
    assert {one.batched for one in answers} == {4}


async def test_calls_that_come_while_a_batch_runs_go_together_after_it() -> None:
    many = Many()
    many.gate = asyncio.Event()
    async with hosting(Tool("many", many, batched=True, batch_window=0.0)) as host:
        first = asyncio.create_task(host.row().call("many", [0]))
        await until(lambda: len(many.batches) == 1)
        rest = [asyncio.create_task(host.row().call("many", [i])) for i in range(1, 6)]
        await asyncio.sleep(0.02)
        assert many.batches == [[0]]
        many.gate.set()
        await asyncio.gather(first, *rest)
    assert many.batches == [[0], [1, 2, 3, 4, 5]]


async def test_as_many_batches_at_a_time_as_allowed() -> None:
    many = Many()
    many.gate = asyncio.Event()
    async with hosting(Tool("many", many, batched=True, batch_window=0.0, batch_size=2, concurrency=3)) as host:
        calls = [asyncio.create_task(host.row().call("many", [i])) for i in range(10)]
        await until(lambda: len(many.batches) == 3)
        await asyncio.sleep(0.02)
        assert len(many.batches) == 3
        many.gate.set()
        await asyncio.gather(*calls)
    assert [len(batch) for batch in many.batches] == [2] * 5


async def test_columns_have_defaults_and_keyword_arguments() -> None:
    def find(query: list[str], k: list[int] = 3, *, mode: list[str] = "fast") -> list[Any]:  # type: ignore[assignment]
        return [list(row) for row in zip(query, k, mode, strict=True)]

    async with hosting(Tool("find", find, batched=True)) as host:
        row = host.row()
        answers = await asyncio.gather(
            row.call("find", ["a"]), row.call("find", ["b", 5]), row.call("find", [], {"mode": "exact", "query": "c"})
        )
    assert [one.value for one in answers] == [["a", 3, "fast"], ["b", 5, "fast"], ["c", 3, "exact"]]


async def test_one_item_of_a_batch_may_fail_by_itself() -> None:
    def some(x: list[int]) -> list[Any]:
        return [ValueError(f"not {one}") if one == 1 else object() if one == 2 else one for one in x]

    async with hosting(Tool("some", some, batched=True)) as host:
        answers = await asyncio.gather(*(host.row().call("some", [i]) for i in range(4)))
    assert [one.value for one in answers] == [0, None, None, 3]
    assert answers[1].error == ExecutionError("ValueError", "not 1")
    assert answers[2].error is not None
    assert answers[2].error.message == "the answer of some() cannot be passed on: an object cannot cross"


@pytest.mark.parametrize("pure", [False, True])
async def test_a_batch_that_fails_is_tried_one_by_one_where_that_does_no_harm(pure: bool) -> None:
    batches: list[list[int]] = []

    def some(x: list[int]) -> list[int]:
        batches.append(list(x))
        if 1 in x:
            raise ValueError("one of them is bad")
        return x

    async with hosting(Tool("some", some, batched=True, pure=pure)) as host:
        answers = await asyncio.gather(*(host.row().call("some", [i]) for i in range(3)))
    failed = [one.error is not None for one in answers]
    assert failed == ([False, True, False] if pure else [True, True, True])
    assert batches == ([[0, 1, 2], [0], [1], [2]] if pure else [[0, 1, 2]])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1], "some() gave 1 answers to a batch of 2 calls"),
        ("ab", "some() gave a str for a batch of calls, which is no list of answers"),
        ({1: 1, 2: 2}, "some() gave a dict for a batch of calls, which is no list of answers"),
        (None, "some() gave a NoneType for a batch of calls, which is no list of answers"),
    ],
)
@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_wrong_answers_to_a_batch_are_told(kind: str, given: Any, message: str) -> None:
    def some(x: list[int]) -> Any:
        return given

    async def some_later(x: list[int]) -> Any:
        return given

    async with hosting(Tool("some", some if kind == "sync" else some_later, batched=True)) as host:
        answers = await asyncio.gather(*(host.row().call("some", [i]) for i in range(2)))
    for one in answers:
        assert one.error is not None
        assert one.error.message == message


# --- pure tools


@pytest.mark.parametrize("kind", [Counting, AsyncCounting])
async def test_equal_calls_of_a_pure_tool_are_one(kind: type[Counting]) -> None:
    counting = kind(0.05)
    async with hosting(Tool("f", counting, pure=True)) as host:
        together = await asyncio.gather(
            *(host.row().call("f", [(1, {2})]) for _ in range(5)), host.row().call("f", [], {"x": (1, {2})})
        )
        later = await host.row().call("f", [(1, {2})])
        other = await host.row().call("f", [[1, {2}]])  # a list is no tuple
    assert len(counting.seen) == 2
    assert [one.cached for one in together] == [False, True, True, True, True, True]
    assert {str(one.value) for one in together} == {str(to_json([(1, {2})]))}
    assert (later.cached, later.value) == (True, together[0].value)
    assert not other.cached


async def test_what_is_remembered_cannot_be_changed() -> None:
    async with hosting(Tool("f", Counting(), pure=True)) as host:
        first = await host.row().call("f", [1])
        first.value.append("changed")
        second = await host.row().call("f", [1])
        second.value.append("changed")
        assert (await host.row().call("f", [1])).value == [1]


async def test_defaults_count_and_failures_are_not_remembered() -> None:
    calls: list[Any] = []

    def f(a: int, b: int = 2) -> int:
        calls.append((a, b))
        if len(calls) == 1:
            raise OSError("for now")
        return a + b

    async with hosting(Tool("f", f, pure=True)) as host:
        row = host.row()
        assert (await row.call("f", [1])).error is not None
        assert [(await row.call("f", *given)).value for given in (([1],), ([1, 2],), ([], {"b": 2, "a": 1}))] == [3] * 3
    assert calls == [(1, 2), (1, 2)]


async def test_rows_share_no_answer_of_a_tool_that_asks_who_calls() -> None:
    def f(x: int, who: ToolContext) -> str:
        return f"{x} {who.prompt_id} {who.sample}"

    async with hosting(Tool("f", f, pure=True)) as host:
        rows = [host.row(ToolContext("p", sample=0)), host.row(ToolContext("p", sample=1))]
        values = [(await row.call("f", [1])).value for row in (*rows, *rows)]
    assert values == ["1 p 0", "1 p 1"] * 2


async def test_batches_of_pure_tools_ask_for_each_thing_once() -> None:
    many = Many()
    async with hosting(Tool("many", many, batched=True, pure=True, batch_window=0.05)) as host:
        answers = await asyncio.gather(*(host.row().call("many", [i % 3]) for i in range(12)))
        again = await host.row().call("many", [1])
    assert [one.value for one in answers] == [[i % 3] for i in range(12)]
    assert many.batches == [[0, 1, 2]]
    assert [one.cached for one in answers] == [False] * 3 + [True] * 9
    assert {one.batched for one in answers} == {3}
    assert (again.cached, again.batched) == (True, 1)


def test_memory_is_bounded_and_forgets_what_was_not_asked_for() -> None:
    memory = Memory(entries=3, characters=100)
    for key in "abc":
        memory.put(key, key * 10)
    assert memory.get("a") == "a" * 10
    memory.put("d", "d" * 10)
    assert [memory.get(key) for key in "abcd"] == ["a" * 10, None, "c" * 10, "d" * 10]
    memory.put("c", "c" * 85)
    assert [memory.get(key) is None for key in "acd"] == [True, False, False]
    memory.put("e", "e" * 101)
    assert len(memory) == 0
    memory.put("f", "f" * 100)
    assert len(memory) == 1


# --- bounds


@pytest.mark.parametrize("kind", [Counting, AsyncCounting])
async def test_as_many_at_a_time_as_allowed(kind: type[Counting]) -> None:
    counting = kind(0.01)
    async with hosting(Tool("f", counting, concurrency=3)) as host:
        await asyncio.gather(*(host.row().call("f", [i]) for i in range(20)))
    assert sorted(counting.seen) == list(range(20))
    assert counting.most == 3


async def test_a_tool_that_hangs_delays_no_other() -> None:
    gate = Gate()
    async with hosting(Tool("gate", gate), Tool("one", len, concurrency=1), max_threads=2) as host:
        hanging = [asyncio.create_task(host.row().call("gate")) for _ in range(5)]
        await until(gate.reached.is_set)
        assert (await asyncio.wait_for(host.row().call("one", [[]]), LONG)).value == 0
        gate.opened.set()
        assert {(await one).value for one in hanging} == {"through"}


async def test_a_deadline_is_a_timeout_error() -> None:
    gate, ended = Gate(), asyncio.Event()

    async def wait() -> None:
        try:
            await asyncio.sleep(LONG)
        finally:
            ended.set()

    async with hosting(Tool("gate", gate, deadline=0.05), Tool("wait", wait, deadline=0.05)) as host:
        for name in ("gate", "wait"):
            answer = await host.row().call(name)
            assert answer.error == ExecutionError("TimeoutError", f"{name}() gave no answer within 0.05 seconds")
        await asyncio.wait_for(ended.wait(), LONG)
        gate.opened.set()


async def test_waiting_for_ones_turn_counts_towards_the_deadline() -> None:
    gate = Gate()
    async with hosting(Tool("gate", gate, deadline=0.1, concurrency=1)) as host:
        answers = await asyncio.gather(*(host.row().call("gate") for _ in range(3)))
        assert [one.error.type for one in answers if one.error] == ["TimeoutError"] * 3
        assert gate.calls == 1  # the others were given up before they began
        gate.opened.set()


async def test_a_tools_own_timeout_error_is_its_own() -> None:
    async def fail() -> None:
        raise TimeoutError("the server is slow")

    async with hosting(Tool("fail", fail, deadline=LONG)) as host:
        assert (await host.row().call("fail")).error == ExecutionError("TimeoutError", "the server is slow")


@pytest.mark.parametrize("kind", ["sync", "async", "batched"])
async def test_retries_are_for_the_faults_that_were_named(kind: str) -> None:
    raised: list[type[Exception]] = []

    def run(faults: list[type[Exception]]) -> str:
        if faults:
            raised.append(faults[0])
            raise faults.pop(0)("fault")
        return "done"

    faults: dict[int, list[type[Exception]]] = {
        0: [ConnectionError, TimeoutError],
        1: [ConnectionError] * 3,
        2: [ValueError],
    }

    async def later(x: int) -> str:
        return run(faults[x])

    functions: dict[str, Any] = {
        "sync": lambda x: run(faults[x]),
        "async": later,
        "batched": lambda x: [run(faults[one]) for one in x],
    }
    async with hosting(Tool("f", functions[kind], retries=2, batched=kind == "batched")) as host:
        answers = [await host.row().call("f", [x]) for x in range(3)]
    assert answers[0].value == "done"
    assert [one.error and one.error.type for one in answers] == [None, "ConnectionError", "ValueError"]
    assert raised == [ConnectionError, TimeoutError, *[ConnectionError] * 3, ValueError]


# --- rows that end


async def test_a_row_that_is_cancelled_cancels_its_call_and_no_other() -> None:
    counting = AsyncCounting(LONG)
    async with hosting(Tool("f", counting), Tool("pure", counting, pure=True)) as host:
        calls = [asyncio.create_task(host.row().call(name, [1])) for name in ("f", "f", "pure", "pure")]
        await until(lambda: counting.running == 3)  # the two pure ones share one
        calls[0].cancel()
        calls[2].cancel()
        await asyncio.gather(calls[0], calls[2], return_exceptions=True)
        await until(lambda: counting.running == 2)
        assert not calls[1].done()
        assert not calls[3].done()
        calls[3].cancel()
        calls[1].cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await until(lambda: counting.running == 0)


@pytest.mark.parametrize("turns", range(4))
async def test_nobody_joins_an_execution_that_is_ending(turns: int) -> None:
    counting = AsyncCounting(0.02)
    async with hosting(Tool("f", counting, pure=True)) as host:
        first = asyncio.create_task(host.row().call("f", [1]))
        await until(lambda: counting.running == 1)
        first.cancel()
        for _ in range(turns):  # at one of them its execution is told to end, and has not ended
            await asyncio.sleep(0)
        assert (await host.row().call("f", [1])).value == [1]


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("turns", range(6))
async def test_an_equal_call_that_comes_as_the_first_is_answered_is_not_made(turns: int, batched: bool) -> None:
    made = 0
    begun, answered = asyncio.Event(), asyncio.Event()

    async def f(x: Any) -> Any:
        nonlocal made
        made += 1
        begun.set()
        await answered.wait()
        return x

    async with hosting(Tool("f", f, pure=True, batched=batched, batch_window=0.0)) as host:
        first = asyncio.create_task(host.row().call("f", [1]))
        await begun.wait()
        answered.set()
        for _ in range(turns):  # at one of them there is an answer, and it is not yet remembered
            await asyncio.sleep(0)
        assert (await host.row().call("f", [1])).value == (await first).value == 1
    assert made == 1


async def test_a_cancelled_call_leaves_its_batch() -> None:
    many = Many()
    many.gate = asyncio.Event()
    async with hosting(Tool("many", many, batched=True, batch_window=0.02)) as host:
        calls = [asyncio.create_task(host.row().call("many", [i])) for i in range(4)]
        await asyncio.sleep(0)
        calls[0].cancel()
        await until(lambda: len(many.batches) == 1)
        assert many.batches == [[1, 2, 3]]
        calls[1].cancel()
        many.gate.set()
        assert [(await one).value for one in calls[2:]] == [[2], [3]]
        many.gate.clear()
        alone = asyncio.create_task(host.row().call("many", [9]))
        await until(lambda: len(many.batches) == 2)
        alone.cancel()  # the batch ends with it, and the lane is free
        await asyncio.gather(alone, return_exceptions=True)
        after = asyncio.create_task(host.row().call("many", [10]))
        await until(lambda: len(many.batches) == 3)
        many.gate.set()
        assert (await after).value == [10]


async def test_a_call_of_a_sync_tool_that_has_not_begun_is_never_made() -> None:
    gate = Gate()
    async with hosting(Tool("gate", gate, concurrency=1)) as host:
        calls = [asyncio.create_task(host.row().call("gate")) for _ in range(3)]
        await until(gate.reached.is_set)
        calls[1].cancel()
        gate.opened.set()
        await asyncio.gather(*calls, return_exceptions=True)
    assert gate.calls == 2


class NoThreads:
    """Lets no thread begin while ``none`` holds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.none = True
        start = threading.Thread.start

        def started(thread: threading.Thread) -> None:
            if self.none and thread.name.startswith("tool-"):
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", started)


async def test_a_call_that_no_thread_can_be_had_for_is_not_made_and_no_fault_of_the_tools(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counting = Counting()
    async with hosting(Tool("count", counting, concurrency=1)) as host:
        row, threads = host.row(), NoThreads(monkeypatch)
        with pytest.raises(MidstreamError, match=r"tool-count: no thread could be started \(can't start new thread"):
            await row.call("count", [1])
        threads.none = False
        async with asyncio.timeout(LONG):
            assert (await row.call("count", [2])).value == [2]
    assert counting.seen == [2]


async def test_calls_wait_for_the_threads_there_are_where_no_more_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    async with hosting(Tool("gate", gate)) as host:
        first = asyncio.create_task(host.row().call("gate"))
        await until(gate.reached.is_set)
        NoThreads(monkeypatch)
        second = asyncio.create_task(host.row().call("gate"))
        await asyncio.sleep(0)
        gate.opened.set()
        assert [answer.value for answer in await asyncio.gather(first, second)] == ["through"] * 2


async def test_calls_of_a_host_that_is_closed_are_no_fault_of_the_tools() -> None:
    gate = Gate()
    several = (Tool("gate", gate, concurrency=1), Tool("one", lambda x: x), Tool("many", lambda x: x, batched=True))
    async with hosting(*several) as host:
        running = asyncio.create_task(host.row().call("gate"))
        await until(gate.reached.is_set)
        threads = host.threads(host.tool("gate"))
        waiting = threads.submit(gate)
        await asyncio.to_thread(host.close)
        with pytest.raises(ProtocolError, match="tool-gate: closed"):
            waiting.result(LONG)
        for name in ("one", "many"):
            with pytest.raises(ProtocolError, match=f"tool-{name}: closed"):
                await host.row().call(name, [1])
        gate.opened.set()
        assert (await running).value == "through"
    assert gate.calls == 1


# --- stateful tools


class Notes:
    """Keeps notes."""

    made: ClassVar[list[Notes]] = []

    def __init__(self, context: ToolContext) -> None:
        self.context = context
        self.notes: list[str] = []
        self.closed = threading.Event()
        Notes.made.append(self)

    def __call__(self, note: str) -> list[Any]:
        self.notes.append(note)
        return [self.context.prompt_id, *self.notes]

    def close(self) -> None:
        self.closed.set()


async def test_each_row_has_its_own_stateful_tool() -> None:
    Notes.made.clear()
    async with hosting(tool(per_row=True, name="note")(Notes)) as host:
        rows = [host.row(ToolContext("a")), host.row(ToolContext("b")), host.row(ToolContext("c"))]
        assert [(await row.call("note", ["1"])).value for row in rows[:2]] == [["a", "1"], ["b", "1"]]
        assert (await rows[0].call("note", ["2"])).value == ["a", "1", "2"]
        assert len(Notes.made) == 2  # the third has not called it
        for row in rows:
            row.close()
        await until(lambda: all(one.closed.is_set() for one in Notes.made))


async def test_a_host_that_is_closed_has_closed_what_its_rows_made() -> None:
    Notes.made.clear()
    async with hosting(tool(per_row=True)(Notes)) as host:
        row = host.row()
        await row.call("Notes", ["1"])
        row.close()
    assert Notes.made[0].closed.is_set()


async def test_a_factory_without_arguments_and_one_that_fails_at_first() -> None:
    class Counter:
        def __init__(self) -> None:
            self.count = 0

        async def __call__(self) -> int:
            self.count += 1
            return self.count

    attempts: list[int] = []

    def flaky(context: ToolContext) -> Counter:
        attempts.append(1)
        if len(attempts) == 1:
            raise OSError("not yet")
        return Counter()

    flaky.__annotations__["return"] = Counter
    async with hosting(Tool("count", Counter, per_row=True), Tool("flaky", flaky, per_row=True)) as host:
        row = host.row()
        assert [(await row.call("count")).value for _ in range(3)] == [1, 2, 3]
        assert (await row.call("flaky")).error == ExecutionError("OSError", "not yet")
        assert (await row.call("flaky")).value == 1


async def test_one_instance_for_calls_that_come_together() -> None:
    Notes.made.clear()
    async with hosting(tool(per_row=True, name="note")(Notes)) as host:
        row = host.row()
        await asyncio.gather(*(row.call("note", [str(i)]) for i in range(8)))
    assert len(Notes.made) == 1
    assert len(Notes.made[0].notes) == 8


# --- calls in JSON


def book(day: Any, seats: int = 1, /, *, kind: str = "train") -> Any:
    return [str(day), seats, kind]


async def test_calls_with_arguments_by_name() -> None:
    import datetime

    def reserve(day: datetime.date, seats: int = 1) -> tuple[str, int]:
        return type(day).__name__, seats

    reserve.__annotations__ = {"day": datetime.date, "seats": int, "return": tuple[str, int]}
    async with hosting(reserve, book) as host:
        row = host.row()
        made = await row.call_json("reserve", {"day": "2024-01-02"})
        assert (made.name, made.arguments, made.keyword_arguments) == ("reserve", (), {"day": "2024-01-02"})
        assert (made.value, made.error) == ({"$type": "tuple", "items": ["date", 1]}, None)
        assert made.duration > 0
        wrong = await row.call_json("reserve", {"day": "2024-01-02", "seats": "two"})
        assert wrong.error == ExecutionError("TypeError", "reserve() argument 'seats': Expected `int`, got `str`")
        missing = await row.call_json("reserve", {"seats": 2})
        assert missing.error is not None
        assert missing.error.message == "reserve() missing 1 required positional argument: 'day'"
        unknown = await row.call_json("reserved", {})
        assert unknown.error == ExecutionError("NameError", "name 'reserved' is not defined")
        assert (await row.call_json("book", {"day": "x", "seats": 3, "kind": "bus"})).value == ["x", 3, "bus"]


# --- event loops and ends


def test_a_host_serves_one_event_loop_after_another() -> None:
    counting, many = AsyncCounting(0.001), Many()
    host = ToolHost(
        ToolSet([Tool("f", counting, concurrency=2), Tool("many", many, batched=True), Tool("pure", len, pure=True)])
    )

    async def use() -> list[Any]:
        row = host.row()
        calls = [row.call("f", [i]) for i in range(6)] + [row.call("many", [i]) for i in range(6)]
        return [one.value for one in await asyncio.gather(*calls, row.call("pure", [[1]]))]

    expected = [[i] for i in range(6)] * 2 + [1]
    assert asyncio.run(use()) == expected
    assert asyncio.run(use()) == expected
    host.close()


async def test_no_thread_is_left_behind() -> None:
    before = {thread for thread in threading.enumerate() if thread.name.startswith("tool-")}
    async with hosting(Tool("f", Counting(0.01)), Tool("many", lambda x: x, batched=True)) as host:
        await asyncio.gather(*(host.row().call(name, [1]) for name in ["f"] * 10 + ["many"] * 10))
        assert {thread.name for thread in threading.enumerate()} >= {"tool-f-1", "tool-many-1"}
    assert {thread for thread in threading.enumerate() if thread.name.startswith("tool-")} == before


async def test_the_callers_context_is_the_tools() -> None:
    import contextvars

    variable = contextvars.ContextVar("variable", default="none")
    async with hosting(Tool("read", lambda: variable.get())) as host:
        variable.set("mine")
        assert (await host.row().call("read")).value == "mine"


def test_rows_are_told_apart() -> None:
    host = ToolHost(ToolSet())
    assert isinstance(host.row(), RowTools)
    assert host.row().context == ToolContext()
    host.close()
