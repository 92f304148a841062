"""What is told of rows as they come is what their trajectories hold in the end: each id once, each character once."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import pytest

from midstream import Delta, Generator, Limits, Prompt, SandboxPool, ScriptedEngine, StopKind, Trajectory, errors
from tests.rollouts import LONG, Gate, rollouts, scripted
from tests.synthetic import Cutter

SCRIPTS: dict[str, Any] = {
    "plain": "No code at all, but 日本語 and 👩‍👩‍👧 and é.",
    "code": "a<code>x = 6</code> then <code>x * 7</code>b<code>'猫' * 3</code> 終",
    "silent": "<code>a=1</code><code>a+1</code>.",
    "tail": "the end <code>1</code>",
}


async def deltas_of(generator: Generator, prompts: Sequence[Any], n: int = 1, **options: Any) -> list[Delta]:
    return [delta async for delta in generator.stream_deltas(prompts, n, **options)]


def by_row(deltas: Sequence[Delta]) -> dict[tuple[str, int], list[Delta]]:
    rows: dict[tuple[str, int], list[Delta]] = {}
    for delta in deltas:
        rows.setdefault((delta.prompt_id, delta.sample), []).append(delta)
    return rows


def check(deltas: Sequence[Delta], earlier: Trajectory | None = None) -> Trajectory:
    """The trajectory of a row's deltas, which together hold just what it holds (behind ``earlier``)."""
    trajectory = deltas[-1].trajectory
    assert trajectory is not None
    assert [delta.trajectory for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    before = len(trajectory.prompt_ids) if earlier is None else earlier.total_length
    assert [i for delta in deltas for i in delta.ids] == trajectory.ids[before:]
    assert [x for delta in deltas for x in delta.logprobs] == trajectory.logprobs[before:]
    assert [x for delta in deltas for x in delta.weight_versions] == trajectory.weight_versions[before:]
    assert [int(delta.origin == "generated") for delta in deltas for _ in delta.ids] == trajectory.mask[before:]
    if earlier is None:
        assert "".join(delta.text for delta in deltas) == trajectory.text
    for origin in ("generated", "injected"):
        told = "".join(delta.text for delta in deltas if delta.origin == origin)
        held = "".join(segment.text for segment in trajectory.segments if segment.origin == origin)
        assert held.endswith(told)
    return trajectory


@pytest.mark.parametrize("name", ["o200k", "qwen", "llama3", "tekken", "mistral3"])
@pytest.mark.parametrize("tokens_per_step", [1, 5])
async def test_deltas_together_are_the_trajectory(sandboxes: SandboxPool, name: str, tokens_per_step: int) -> None:
    engine = scripted(SCRIPTS, name, tokens_per_step=tokens_per_step)
    whole = rollouts(SCRIPTS, sandboxes, n=2, name=name, engine={"tokens_per_step": tokens_per_step})
    with Generator(engine, pool=sandboxes) as generator:
        rows = by_row(await deltas_of(generator, [Prompt(text=text, id=text) for text in SCRIPTS], 2))
    assert len(rows) == 2 * len(SCRIPTS)
    for row in whole:
        told = check(rows[str(row.prompt.id), row.sample])
        assert (told.ids, told.logprobs, told.stop) == (row.ids, row.logprobs, row.stop)
    if tokens_per_step == 1:
        assert all(len(delta.ids) <= 1 for row in rows.values() for delta in row if delta.origin == "generated")


async def test_results_come_where_they_were_injected(sandboxes: SandboxPool) -> None:
    with Generator(scripted(SCRIPTS), pool=sandboxes) as generator:
        deltas = await deltas_of(generator, [Prompt(text="code")])
    trajectory = check(deltas)
    results = [delta for delta in deltas if delta.origin == "injected"]
    assert [delta.text for delta in results] == [s.text for s in trajectory.segments if s.origin == "injected"]
    assert all(set(delta.logprobs) == {0.0} for delta in results)
    before = "".join(delta.text for delta in deltas[: deltas.index(results[0])])
    assert before.startswith("a<code>x = 6</code> then <code>x * 7</code>")


async def test_a_result_behind_which_the_row_stops_is_told(sandboxes: SandboxPool) -> None:
    limits = Limits(stop_strings=("x",))  # "</code>x" ends with the token ">x": the block runs, then the row stops
    with Generator(scripted({"p": "<code>5</code>x"}), pool=sandboxes, limits=limits) as generator:
        deltas = await deltas_of(generator, [Prompt(text="p")])
    trajectory = check(deltas)
    assert trajectory.stop.kind is StopKind.STOP_STRING
    assert [delta.text for delta in deltas if delta.origin == "injected"] == ["<result>5</result>"]


CUT_SHORT: dict[str, Any] = {
    "at the end": ["x", b"\xf0\x9f", b"\x99"],
    "amid": [b"\xf0\x9f", "y"],
    "before a result": ["<code>1</code>\xf0\x9f".encode("latin-1"), "z"],
    "finished": [b"\xf0\x9f", b"\x99\x82", b"\xe6", b"\x95\xb0!"],
}


async def test_a_character_is_told_when_it_is_whole_or_nothing_can_finish_it(sandboxes: SandboxPool) -> None:
    cutter = Cutter()
    scripts = {name: cutter.cut(*pieces) for name, pieces in CUT_SHORT.items()}
    engine = ScriptedEngine(cutter.vocabulary, scripts)
    with Generator(engine, pool=sandboxes, limits=Limits(max_new_tokens=30)) as generator:
        rows = by_row(await deltas_of(generator, [Prompt(text=text, id=text) for text in scripts]))
    told = {name: [delta.text for delta in row if delta.text] for (name, _), row in rows.items()}
    for row in rows.values():
        check(row)
    assert told["at the end"] == ["x", "\ufffd<eos>"]
    assert told["amid"] == ["\ufffdy", "<eos>"]
    assert told["before a result"] == ["<code>1</code>", "\ufffd", "<result>1</result>", "z", "<eos>"]
    assert told["finished"] == ["🙂", "数!", "<eos>"]


async def test_a_character_is_told_with_the_last_id_where_that_leaves_it_unfinished(sandboxes: SandboxPool) -> None:
    cutter = Cutter()
    engine = ScriptedEngine(cutter.vocabulary, cutter.cut("x", b"\xf0\x9f", b"\x99", "y"))
    with Generator(engine, pool=sandboxes, limits=Limits(max_new_tokens=3)) as generator:
        deltas = await deltas_of(generator, ["p"])
    assert [delta.text for delta in deltas] == ["x", "", "\ufffd"]
    assert check(deltas).stop.kind is StopKind.LENGTH


async def test_what_a_resumed_row_holds_is_not_told_again(sandboxes: SandboxPool) -> None:
    gate = Gate()
    gate.opened.set()
    scripts = {"p": "a<code>x = 6</code> then <code>x * 7</code>b 日本語 " + "word " * 20}
    with Generator(scripted(scripts), pool=sandboxes, limits=Limits()) as generator:
        earlier = None
        async with aclosing(generator.stream_deltas([Prompt(text="p")])) as deltas:
            told = 0
            async for delta in deltas:
                told += len(delta.ids)
                if told > 30 and earlier is None:
                    generator.interrupt()
                earlier = delta.trajectory
        assert earlier is not None
        assert earlier.stop.kind is StopKind.PAUSED
        rest = await deltas_of(generator, [earlier])
    trajectory = check(rest, earlier)
    assert trajectory.ids[: earlier.total_length] == earlier.ids


async def test_rewards_are_in_the_last_delta_and_failed_rows_have_one(sandboxes: SandboxPool) -> None:
    engine = scripted({"good": "x", "bad": "word " * 9}, fail={"bad": 3})
    with Generator(engine, pool=sandboxes) as generator:
        prompts = [Prompt(text=text, id=text) for text in ("good", "bad")]
        rows = by_row(await deltas_of(generator, prompts, reward=lambda t: 0.5))
    assert [check(row).reward for row in rows.values()] == [0.5, 0.5]
    assert check(rows["bad", 0]).stop.kind is StopKind.ENGINE_FAILURE


async def test_copies_tell_what_comes_behind_the_fork(sandboxes: SandboxPool) -> None:
    gate = Gate()
    scripts = {"p": "a <code>hold()</code> and " + "word " * 10}
    with SandboxPool(preload=[], forkable=True) as pool:
        with Generator(scripted(scripts), pool=pool, tools={"hold": gate}) as generator:
            rows: dict[int, list[Delta]] = {}
            async for delta in generator.stream_deltas([Prompt(text="p", id="p")]):
                rows.setdefault(delta.sample, []).append(delta)
                if not gate.opened.is_set() and delta.text.endswith(">"):
                    copies = generator.fork("p", n=2)
                    gate.opened.set()
        assert sorted(copies.result(LONG)) == [1, 2]
    first = check(rows[0])
    for sample in (1, 2):
        trajectory = rows[sample][-1].trajectory
        assert trajectory is not None
        point = trajectory.lineage[-1].length
        assert [i for delta in rows[sample] for i in delta.ids] == trajectory.ids[point:]
        assert trajectory.ids == first.ids


async def test_leaving_early_frees_the_generator(sandboxes: SandboxPool) -> None:
    threads = set(threading.enumerate())
    with Generator(scripted({"p": "word " * 300}), pool=sandboxes) as generator:
        async with aclosing(generator.stream_deltas([Prompt(text="p")])) as deltas:
            await anext(deltas)
        assert generator.engine.open_rows == 0  # type: ignore[attr-defined]
        (delta, *_) = await deltas_of(generator, [Prompt(text="p")])
        assert delta.ids
    assert {t.name for t in threading.enumerate() if t not in threads and t.name.startswith("midstream")} == set()


async def test_bad_prompts_are_refused_when_the_stream_is_begun(sandboxes: SandboxPool) -> None:
    with Generator(scripted(""), pool=sandboxes) as generator:
        with pytest.raises(errors.PromptError):
            await deltas_of(generator, [""])
        with pytest.raises(errors.ConfigurationError, match="min_finished=3"):
            await deltas_of(generator, ["x"], min_finished=3)


# --- of rows that come one by one


def test_a_submitted_row_is_told_to_its_listener(sandboxes: SandboxPool) -> None:
    told: dict[str, list[Delta]] = {text: [] for text in SCRIPTS}
    with Generator(scripted(SCRIPTS), pool=sandboxes) as generator:
        futures = {text: generator.submit(text, listener=told[text].append) for text in SCRIPTS}
        rows = {text: future.result(LONG) for text, future in futures.items()}
    for text, row in rows.items():
        assert check(told[text]) is row


def test_the_end_of_a_row_that_is_given_up_is_told(sandboxes: SandboxPool) -> None:
    gate, ended = Gate(), threading.Event()
    told: list[Delta] = []

    def listen(delta: Delta) -> None:
        told.append(delta)
        if delta.trajectory is not None:
            ended.set()

    scripts = {"waits": "a <code>hold()</code>", "x": "y"}
    with Generator(scripted(scripts), pool=sandboxes, tools={"hold": gate}, max_open_rows=1) as generator:
        running = generator.submit("waits", listener=listen)
        assert gate.reached.wait(LONG)
        queued: list[Delta] = []
        generator.submit("x", listener=queued.append).cancel()
        running.cancel()
        assert ended.wait(LONG)
        generator.submit("x").result(LONG)
        gate.opened.set()
    assert check(told).stop.kind is StopKind.CANCELLED
    assert check(queued).generation_length == 0


def test_the_seed_of_a_submitted_row_is_what_keys_its_noise(sandboxes: SandboxPool) -> None:
    with Generator(scripted("some words"), pool=sandboxes) as generator:
        first, again, other = (generator.submit("p", seed=seed).result(LONG) for seed in (7, 7, 8))
    assert first.seed == 7
    assert first.prompt.id != again.prompt.id
    assert first.logprobs == again.logprobs != other.logprobs
