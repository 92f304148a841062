"""Rules 22 to 25: rows of one batch do not depend on each other, and each can be paused and gone on with."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from midstream import Generator, Limits, Prompt, SandboxPool, ScriptedEngine, StopKind, Trajectory, errors
from midstream.engines.base import Handle, RowRequest, Update
from midstream.types import Media
from tests.rollouts import (
    LONG,
    Gate,
    Replaying,
    Stepping,
    essence,
    injected,
    one,
    rollouts,
    scripted,
    shown,
)

SCRIPTS = {
    "plain": "Nothing but text, with a < and a </code> in it.",
    "silent then shown": "<code>x = 3; y = 4</code>\nThis is some regular text.\n<code>x + y</code> so 7.",
    "adjacent": "<code>a=1</code><code>a+1</code><code>a+2</code>.",
    "block": "<code>\ndef f(x):\n    return x * x\n\nf(2)\n</code>\nand then\n<code>f(3)</code>",
    "tools": "<code>echo(1)</code> and <code>[echo(i) for i in range(3)]</code> and <code>echo(echo(2))</code>",
    "random": "<code>import random; random.random()</code> <code>random.random()</code>",
    "errors": "<code>1/0</code><code>x = </code><code>echo(oops)</code> over",
    "unfinished": "<code>x = 1</code> and <code>echo(5)",
    "long": "<code>print('ab' * 4000)</code> then <code>1</code>",
}
LIMITS = Limits(max_result_tokens=60, max_new_tokens=300)


# --- rule 22


@cache
def alone(pool: SandboxPool, name: str, sample: int, vocabulary: str) -> Trajectory:
    batch = rollouts({name: SCRIPTS[name]}, pool, n=2, tools={"echo": lambda x: x}, limits=LIMITS, name=vocabulary)
    return essence(batch[sample])


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    names=st.lists(st.sampled_from(sorted(SCRIPTS)), min_size=2, max_size=6, unique=True),
    vocabulary=st.sampled_from(["o200k", "qwen", "llama4", "mistral3"]),
    tokens_per_step=st.integers(1, 12),
    max_open_rows=st.none() | st.integers(1, 4),
    delays=st.lists(st.integers(0, 4), min_size=1, max_size=5),
)
def test_rule_22_trajectories_are_equal_to_the_bit_whatever_else_is_in_the_batch(
    sandboxes: SandboxPool,
    names: Sequence[str],
    vocabulary: str,
    tokens_per_step: int,
    max_open_rows: int | None,
    delays: Sequence[int],
) -> None:
    calls = iter(range(1_000_000))

    def echo(value: object) -> object:
        time.sleep(delays[next(calls) % len(delays)] / 1000)
        return value

    batch = rollouts(
        {name: SCRIPTS[name] for name in names},
        sandboxes,
        n=2,
        tools=[echo],
        limits=LIMITS,
        name=vocabulary,
        max_open_rows=max_open_rows,
        engine={"tokens_per_step": tokens_per_step},
    )
    expected = [alone(sandboxes, name, sample, vocabulary) for name in names for sample in (0, 1)]
    assert [essence(row) for row in batch] == expected


def test_rule_22_results_come_back_in_the_order_of_the_prompts(sandboxes: SandboxPool) -> None:
    scripts = {f"p{length}": "word " * length for length in (9, 1, 5, 0, 7)}
    finished: list[str] = []
    batch = rollouts(scripts, sandboxes, n=2, reward=lambda row: finished.append(str(row.prompt.id)) or 1)
    assert [(row.prompt.id, row.sample) for row in batch] == [(name, k) for name in scripts for k in (0, 1)]
    assert finished[:2] == ["p0", "p0"]  # though the shortest were done first


# --- rule 23


def test_rule_23_a_row_that_fails_in_the_engine_fails_alone(sandboxes: SandboxPool) -> None:
    batch = rollouts(
        {"good": SCRIPTS["silent then shown"], "bad": SCRIPTS["tools"], "other": SCRIPTS["block"]},
        sandboxes,
        tools={"echo": lambda x: x},
        engine={"fail": {"bad": 15}},
    )
    assert [row.stop.kind for row in batch] == [
        StopKind.END_OF_SEQUENCE,
        StopKind.ENGINE_FAILURE,
        StopKind.END_OF_SEQUENCE,
    ]
    assert batch.verify() == [[], [], []]
    assert batch[1].generation_length >= 15


class Faulty(ScriptedEngine):
    """Breaks its contract for the row whose prompt is ``bad``, in the way that it is told."""

    def __init__(self, pool: SandboxPool, how: str) -> None:
        base = scripted({"good": "<code>1 + 1</code> fine", "bad": "some <code>2 + 2</code> words", "last": "<code>3"})
        self.__dict__.update(base.__dict__)
        self._how = how
        self._bad: Handle | None = None

    def open(self, request: RowRequest, n: int = 1) -> list[Handle]:
        handles = super().open(request, n)
        if self._bad is None and request.seed == Faulty.bad_seed:
            self._bad = handles[0]
            if self._how == "open":
                raise RuntimeError("cannot open")
            if self._how == "no handles":
                return []
        return handles

    bad_seed = 0

    def step(self) -> list[Update]:
        updates = super().step()
        for place, update in enumerate(updates):
            if update.handle == self._bad:
                match self._how:
                    case "lengths":
                        updates[place] = Update(update.handle, update.ids, [*update.logprobs, 0.0])
                    case "negative":
                        updates[place] = Update(update.handle, [-1], [0.0])
                    case "unknown handle":
                        updates.append(Update(10**9, [1], [0.0]))
                    case "error with ids":
                        updates[place] = Update(update.handle, update.ids, update.logprobs, error="gone")
        return updates

    def rollback(self, handle: Handle, k: int) -> None:
        if handle == self._bad and self._how == "rollback":
            raise RuntimeError("cannot roll back")
        super().rollback(handle, k)

    def extend(self, handle: Handle, ids: Sequence[int], media: Sequence[Media] = ()) -> None:
        if handle == self._bad and self._how == "extend":
            raise RuntimeError("cannot extend")
        super().extend(handle, ids, media)

    def close(self, handle: Handle) -> None:
        super().close(handle)
        if handle == self._bad and self._how == "close":
            raise RuntimeError("cannot close")


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ("open", StopKind.ENGINE_FAILURE),
        ("no handles", StopKind.ENGINE_FAILURE),
        ("lengths", StopKind.ENGINE_FAILURE),
        ("negative", StopKind.ENGINE_FAILURE),
        ("error with ids", StopKind.ENGINE_FAILURE),
        ("rollback", StopKind.ENGINE_FAILURE),
        ("extend", StopKind.ENGINE_FAILURE),
        ("unknown handle", StopKind.END_OF_SEQUENCE),
        ("close", StopKind.END_OF_SEQUENCE),
    ],
)
def test_rule_23_an_engine_that_breaks_its_contract_for_one_row_ends_that_row_alone(
    sandboxes: SandboxPool, monkeypatch: pytest.MonkeyPatch, how: str, kind: StopKind
) -> None:
    engine = Faulty(sandboxes, how)
    with Generator(engine, pool=sandboxes) as generator:
        prompts = [Prompt(text=text, id=text) for text in ("good", "bad", "last")]
        monkeypatch.setattr(Faulty, "bad_seed", generator._seed_of(prompts[1]))
        batch = generator.generate(prompts)
    assert [row.stop.kind for row in batch] == [StopKind.END_OF_SEQUENCE, kind, StopKind.END_OF_SEQUENCE]
    assert injected(batch[0]) == ["<result>2</result>"]
    assert batch.verify() == [[], [], []]


def test_rule_23_a_step_that_fails_ends_the_open_rows_and_no_other(sandboxes: SandboxPool) -> None:
    class Stumbling(Stepping):
        def step(self) -> list[Update]:
            if self.steps == 4:
                self.steps += 1
                raise StopIteration("even this, which no future can carry")
            return super().step()

    whole = rollouts(dict.fromkeys(("a", "b", "c"), SCRIPTS["block"]), sandboxes)
    with Generator(Stumbling(whole), pool=sandboxes, max_open_rows=2) as generator:
        batch = generator.generate([row.prompt for row in whole])
    assert [row.stop.kind for row in batch] == [StopKind.ENGINE_FAILURE] * 2 + [StopKind.END_OF_SEQUENCE]
    assert "StopIteration" in batch[0].stop.detail
    assert essence(batch[2]) == essence(whole[2])


class Hostile:
    """A tool that fails as it is told to."""

    def __call__(self, how: str) -> object:
        match how:
            case "exception":
                raise ValueError("no")
            case "exit":
                raise SystemExit(3)
            case "interrupt":
                raise KeyboardInterrupt
            case "stop iteration":
                raise StopIteration("nothing left")
            case "no json":
                return object()
        return None


async def hostile_async(how: str) -> object:
    import asyncio

    if how == "cancelled":
        raise asyncio.CancelledError
    return Hostile()(how)


@pytest.mark.parametrize("tool", [Hostile(), hostile_async])
@pytest.mark.parametrize("how", ["exception", "exit", "interrupt", "stop iteration", "no json", "cancelled"])
def test_rule_23_whatever_a_tool_raises_is_seen_by_its_caller_alone(
    sandboxes: SandboxPool, tool: object, how: str
) -> None:
    scripts = {"a": f"<code>fail({how!r})</code> and <code>1</code>", "b": "<code>2</code>"}
    batch = rollouts(scripts, sandboxes, tools={"fail": tool})
    assert [row.stop.kind for row in batch] == [StopKind.END_OF_SEQUENCE] * 2
    said = str(shown(batch[0])[0])
    if how == "cancelled" and isinstance(tool, Hostile):
        assert said == ""
    else:
        assert "Error" in said
    assert (shown(batch[0])[1], shown(batch[1])) == ("1", ["2"])


def test_rule_23_a_tool_that_raises_an_error_of_the_library_ends_its_row_alone(sandboxes: SandboxPool) -> None:
    def broken() -> None:
        raise errors.ConfigurationError("not the code's fault")

    scripts = {"a": "<code>1</code> <code>broken()</code> more", "b": "<code>2</code>"}
    batch = rollouts(scripts, sandboxes, tools=[broken])
    assert batch[0].stop.kind is StopKind.SANDBOX_FAILURE
    assert "not the code's fault" in batch[0].stop.detail
    assert shown(batch[0]) == ["1", None]
    assert (batch[1].stop.kind, shown(batch[1])) == (StopKind.END_OF_SEQUENCE, ["2"])
    assert batch.verify() == [[], []]


def kill_fork_server(pool: SandboxPool) -> None:
    server = pool._server
    assert server is not None
    assert server._process is not None
    os.kill(server._process.pid, signal.SIGKILL)


@pytest.mark.parametrize("others", [0, 3])
def test_rule_23_sandboxes_that_die_are_replaced_and_their_state_made_again(others: int) -> None:
    asked: list[int] = []
    died = threading.Event()

    def ask() -> int:
        asked.append(1)
        return 6

    def die() -> str:
        if not died.is_set():
            kill_fork_server(pool)
            died.set()
        return "done"

    def hold() -> None:
        assert died.wait(LONG)

    with SandboxPool(preload=[]) as pool:
        scripts = {"dies": "<code>x = ask()</code> <code>die()</code> <code>x * 7</code>"}
        scripts |= {f"holds {i}": f"<code>y = {i}</code> <code>hold()</code> <code>y + 1</code>" for i in range(others)}
        batch = rollouts(scripts, pool, tools={"ask": ask, "die": die, "hold": hold})
    assert [row.stop.kind for row in batch] == [StopKind.END_OF_SEQUENCE] * (1 + others)
    assert [shown(row) for row in batch] == [["", "'done'", "42"], *(["", "", str(i + 1)] for i in range(others))]
    assert len(asked) == 1


def test_rule_23_where_no_sandbox_can_be_had_only_the_rows_that_need_one_stop() -> None:
    pool = SandboxPool(preload=[])
    with Generator(scripted({"a": "<code>1</code> no", "b": "just text"}), pool=pool.start()) as generator:
        generator._start_sandboxes()
        generator._start_sandboxes = lambda: pool.close()  # type: ignore[method-assign]  # it goes away right after
        batch = generator.generate([Prompt(text="a"), Prompt(text="b")])
    assert [row.stop.kind for row in batch] == [StopKind.SANDBOX_FAILURE, StopKind.END_OF_SEQUENCE]
    assert "closed" in batch[0].stop.detail
    assert batch.verify() == [[], []]


@pytest.mark.parametrize("error", [ValueError("bad"), SystemExit(2), StopIteration("none"), KeyError("k")])
def test_rule_23_a_reward_that_fails_is_told_in_its_trajectory_alone(
    sandboxes: SandboxPool, error: BaseException
) -> None:
    def reward(row: Trajectory) -> float:
        if row.prompt.id == "b":
            raise error
        return 2.5

    batch = rollouts({"a": "x", "b": "<code>1</code>", "c": "y"}, sandboxes, reward=reward)
    assert batch.rewards == [2.5, None, 2.5]
    assert type(error).__name__ in batch[1].reward_error
    assert [row.reward_error for row in batch if row.prompt.id != "b"] == ["", ""]
    assert shown(batch[1]) == ["1"]


# --- rule 24


def test_rule_24_a_row_that_waits_for_its_code_does_not_hold_the_others(sandboxes: SandboxPool) -> None:
    gate = Gate()
    order: list[str] = []

    def reward(row: Trajectory) -> float:
        order.append(str(row.prompt.id))
        if len(order) == 2:
            gate.opened.set()  # so this can only pass if the two others end while the first still waits
        return 0

    scripts = {"waits": "<code>hold()</code> x", "text": "word " * 40, "code": "<code>1 + 1</code>" * 5}
    batch = rollouts(scripts, sandboxes, tools={"hold": gate}, reward=reward)
    assert order[2] == "waits"
    assert [row.prompt.id for row in batch] == ["waits", "text", "code"]
    assert shown(batch[0]) == ["'through'"]


def test_rule_24_the_engine_keeps_stepping_for_the_others(sandboxes: SandboxPool) -> None:
    gate = Gate()
    whole = rollouts({"waits": "<code>hold()</code> x", "goes on": "word " * 60}, sandboxes, tools={"hold": lambda: 1})
    engine = Stepping(whole)
    closing = whole[0].calls[0].call.position - len(whole[0].prompt_ids)
    seen: list[int] = []

    def at_step(step: int) -> None:
        if step > closing:
            assert gate.reached.wait(LONG)
            seen.append(step)
            if len(seen) == 20:
                gate.opened.set()

    engine.at_step = at_step
    with Generator(engine, pool=sandboxes, tools={"hold": gate}) as generator:
        batch = generator.generate([row.prompt for row in whole])
    assert len(seen) >= 20  # twenty steps while the first row's code waited
    assert [row.stop.kind for row in batch] == [StopKind.END_OF_SEQUENCE] * 2


def test_rule_24_a_row_that_waits_too_long_stops_for_time(sandboxes: SandboxPool) -> None:
    gate = Gate()
    limits = Limits(time_limit=0.2)
    try:
        batch = rollouts({"w": "<code>hold()</code>", "t": "text"}, sandboxes, tools={"hold": gate}, limits=limits)
    finally:
        gate.opened.set()
    assert [row.stop.kind for row in batch] == [StopKind.TIME_LIMIT, StopKind.END_OF_SEQUENCE]
    assert (shown(batch[0]), batch[0].stop.detail) == ([None], "0.2 s")
    assert batch.verify() == [[], []]


# --- rule 25


def test_rule_25_rows_can_be_paused_after_any_step_and_go_on_exactly(sandboxes: SandboxPool) -> None:
    scripts = {name: SCRIPTS[name] for name in ("silent then shown", "adjacent", "tools", "random")}
    counts: list[int] = []
    tools = {"echo": lambda x: counts.append(1) or x}
    whole = rollouts(scripts, sandboxes, tools=tools, n=2)
    calls_of_tools = len(counts)
    longest = max(row.mask.count(1) for row in whole)
    for stop_after in range(2, longest, 13):
        engine = Stepping(whole)
        with Generator(engine, pool=sandboxes, tools=tools) as generator:
            engine.at_step = lambda step: generator.interrupt() if step % stop_after == 0 else None  # noqa: B023
            counts.clear()
            rows: list[Trajectory] = list(generator.generate([Prompt(text=t, id=t) for t in scripts], n=2))
            rounds = 1
            while unfinished := [row for row in rows if row.stop.resumable]:
                rounds += 1
                assert rounds < 200
                gone_on = iter(generator.generate(unfinished))
                rows = [next(gone_on) if row.stop.resumable else row for row in rows]
        assert [essence(row) for row in rows] == [essence(row) for row in whole]
        # Of earlier blocks tools are not called again; one that was interrupted itself is run anew.
        assert len(counts) <= calls_of_tools * rounds


def test_rule_25_a_row_paused_while_its_code_runs_goes_on_elsewhere_with_its_state(sandboxes: SandboxPool) -> None:
    gate = Gate()
    asked: list[int] = []

    def ask(number: int) -> int:
        asked.append(number)
        return number * 10

    script = "<code>x = ask(1)</code> so <code>y = x + ask(2); y</code> then <code>hold(); x + y</code> end"
    gate.opened.set()
    whole = one(script, sandboxes, tools={"ask": ask, "hold": gate})
    asked.clear()
    gate.opened.clear()
    gate.reached.clear()
    engine = Replaying([whole])
    with Generator(engine, pool=sandboxes, tools={"ask": ask, "hold": gate}) as generator:
        interrupter = threading.Thread(target=lambda: (gate.reached.wait(LONG), generator.interrupt()))
        interrupter.start()
        paused = generator.generate([whole.prompt])[0]
        interrupter.join()
    gate.opened.set()
    assert paused.stop.kind is StopKind.PAUSED
    assert shown(paused) == ["", "30", None]
    assert paused.reward is None
    assert asked == [1, 2]

    with SandboxPool(preload=[]) as elsewhere, Generator(
        Replaying([whole]), pool=elsewhere, tools={"ask": ask, "hold": gate}
    ) as generator:  # fmt: skip
        resumed = generator.generate([paused])[0]
    assert essence(resumed) == essence(whole)
    assert asked == [1, 2]  # answered from the record
    assert resumed.duration >= paused.duration


def test_rule_25_a_block_that_killed_its_interpreter_is_not_run_again_for_a_resumed_row() -> None:
    ran: list[int] = []
    script = "<code>x = 1</code> <code>import os; ran(); os._exit(3)</code> so <code>x + 1</code> <code>x + 2</code>"
    with SandboxPool(preload=[]) as pool:
        tools = {"ran": lambda: ran.append(1)}
        whole = one(script, pool, tools=tools)
        assert shown(whole)[2:] == ["2", "3"]
        ran.clear()
        engine = Stepping([whole])
        with Generator(engine, pool=pool, tools=tools) as generator:
            place = sum(whole.mask[: whole.calls[2].call.position]) - 2  # inside the block behind the killing one
            engine.at_step = lambda step: generator.interrupt() if step == place else None
            paused = generator.generate([whole.prompt])[0]
            engine.at_step = lambda step: None
            assert paused.stop.resumable
            resumed = generator.generate([paused])[0]
    assert essence(resumed) == essence(whole)
    assert ran == [1]


def test_rule_25_each_token_carries_the_version_of_the_weights_that_sampled_it(sandboxes: SandboxPool) -> None:
    whole = rollouts({"a": "word " * 12 + "<code>1 + 1</code> and more", "b": "text " * 30}, sandboxes)
    engine = Stepping(whole)
    threads: list[threading.Thread] = []
    updated: list[int] = []
    with Generator(engine, pool=sandboxes) as generator:

        def at_step(step: int) -> None:
            if step % 8 == 0:
                version = step // 8
                work = lambda: generator.update_weights(lambda: updated.append(version), version)  # noqa: E731
                threads.append(threading.Thread(target=work))
                threads[-1].start()
                deadline = time.monotonic() + LONG
                while not generator._control.rest_requested:
                    assert time.monotonic() < deadline
                    time.sleep(0.001)

        engine.at_step = at_step
        batch = generator.generate([row.prompt for row in whole])
        for thread in threads:
            thread.join(LONG)
            assert not thread.is_alive()
    assert updated == list(range(1, len(threads) + 1))
    for row, before in zip(batch, whole, strict=True):
        assert (row.ids, row.logprobs) == (before.ids, before.logprobs)
        for version, own in zip(row.weight_versions, row.mask, strict=True):
            assert (version >= 0) == bool(own)
        sampled = [version for version, own in zip(row.weight_versions, row.mask, strict=True) if own]
        assert sampled == sorted(sampled)
    # The row without code gets one id each step, so the versions are known to the token.
    text = [version for version, own in zip(batch[1].weight_versions, batch[1].mask, strict=True) if own]
    assert text == [place // 8 for place in range(len(text))]
