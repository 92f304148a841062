"""What ``generate`` gives, takes and refuses."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable
from typing import Any

import pytest

from midstream import (
    FENCED_PYTHON,
    Generator,
    Limits,
    Prompt,
    Sampling,
    SandboxPool,
    ScriptedEngine,
    StopKind,
    Trajectory,
    errors,
)
from midstream.engines.base import Capabilities, prompt_seed
from midstream.vocabulary import Vocabulary
from tests.rollouts import LONG, Gate, essence, injected, one, rollouts, scripted, shown

FIRST = "<code>x = 3; y = 4</code>\nThis is some regular text.\n<code>x + y</code>"


def test_prompts_are_prompts_texts_or_mappings(sandboxes: SandboxPool) -> None:
    engine = scripted("said")
    with Generator(engine, pool=sandboxes) as generator:
        prompts = ["text", {"text": "mapping", "metadata": {"answer": 1}}, Prompt(ids=(1, 2, 3), id="ids")]
        batch = generator.generate(prompts, n=2)
    assert [(row.prompt.id, row.sample) for row in batch] == [
        (name, sample) for name in ("0", "1", "ids") for sample in (0, 1)
    ]
    assert batch[2].prompt.metadata == {"answer": 1}
    assert batch[4].prompt_ids == (1, 2, 3)
    assert engine.open_rows == 0


@pytest.mark.parametrize(
    ("prompts", "n", "error", "says"),
    [
        ("one text", 1, errors.ConfigurationError, "sequence of prompts"),
        ([Prompt(text="a", id="x"), Prompt(text="b", id="x")], 1, errors.PromptError, "another prompt has this id"),
        (["a"], 0, errors.ConfigurationError, "n=0"),
        (["a"], 1.5, errors.ConfigurationError, "n=1.5"),
        ([{"txt": "a"}], 1, errors.PromptError, "unknown field 'txt'"),
        ([7], 1, errors.PromptError, "prompt=7"),
        ([""], 1, errors.PromptError, "empty"),
        ([Prompt(ids=(10**9,))], 1, errors.PromptError, "ids are under"),
        ([Prompt(text="far too long a prompt")], 1, errors.PromptError, "no room is left"),
    ],
)
def test_bad_prompts_are_refused_before_anything_is_sampled(
    sandboxes: SandboxPool, prompts: Any, n: Any, error: type[Exception], says: str
) -> None:
    engine = scripted("said", context_length=4)
    with Generator(engine, pool=sandboxes) as generator:
        with pytest.raises(error, match=says):
            generator.generate(prompts, n)
        assert engine.steps == 0
        assert len(generator.generate(["fine"])) == 1  # and the generator is free


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"max_open_rows": 0}, errors.ConfigurationError, "max_open_rows=0"),
        ({"max_open_rows": 2.5}, errors.ConfigurationError, "max_open_rows=2.5"),
        ({"tools": len}, errors.ConfigurationError, "several callables"),
        ({"tools": [lambda: 1]}, errors.ConfigurationError, "'<lambda>'"),
        ({"tools": {"for": len}}, errors.ConfigurationError, "'for'"),
        ({"tools": {3: len}}, errors.ConfigurationError, "name=3"),
        ({"tools": {"f": 3}}, errors.ConfigurationError, "not callable"),
        ({"tools": [len, len]}, errors.ConfigurationError, "given twice"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        Generator(scripted("said"), **options)


def test_sampling_that_the_engine_cannot_do_is_refused() -> None:
    class Fixed(ScriptedEngine):
        @property
        def capabilities(self) -> Capabilities:
            return Capabilities(sampling=False)

    engine = Fixed(scripted("").tokenizer, "said")
    with pytest.raises(errors.CapabilityError, match="samples by settings of its own"):
        Generator(engine, sampling=Sampling(temperature=0.5))
    with (
        Generator(engine, markup=None) as generator,
        pytest.raises(errors.CapabilityError, match="does not take new weights"),
    ):
        generator.update_weights(lambda: None, 1)


def test_without_a_markup_nothing_is_run_and_no_sandbox_is_started() -> None:
    with Generator(scripted(FIRST), markup=None) as generator:
        row = generator.generate(["p"])[0]
        assert generator._sessions._own_pool is None
    assert row.calls == ()
    assert FIRST in row.text


def test_a_generators_own_pool_ends_with_it() -> None:
    with Generator(scripted(FIRST)) as generator:
        assert injected(generator.generate(["p"])[0]) == ["<result>7</result>"]
        pool = generator._sessions._own_pool
        assert pool is not None
    with pytest.raises(errors.ProtocolError, match="closed"):
        pool.session()
    with pytest.raises(errors.ProtocolError, match="closed"):
        generator.generate(["p"])
    generator.close()


def test_a_pool_of_the_callers_is_left_open(sandboxes: SandboxPool) -> None:
    with Generator(scripted(FIRST), pool=sandboxes) as generator:
        generator.generate(["p"])
    with sandboxes.session() as session:
        assert session.run("1").text == "1"


def test_other_markups_serve_the_same(sandboxes: SandboxPool) -> None:
    row = one("So:\n```python\n6 * 7\n```\nThat is it.", sandboxes, markup=FENCED_PYTHON)
    assert injected(row) == ["```output\n42\n```\n"]


def test_a_prompts_own_limits_go_before_the_generators(sandboxes: SandboxPool) -> None:
    prompts = [Prompt(text="a", limits=Limits(max_new_tokens=2)), Prompt(text="b")]
    with Generator(scripted("word " * 9), pool=sandboxes, limits=Limits(max_new_tokens=4)) as generator:
        batch = generator.generate(prompts)
    assert [row.generation_length for row in batch] == [2, 4]


def test_noise_and_sandboxes_are_keyed_by_seed_and_prompt(sandboxes: SandboxPool) -> None:
    def rows(own: int, seed: int | None = None) -> list[Trajectory]:
        with Generator(scripted("some words"), pool=sandboxes, seed=own) as generator:
            return [essence(row) for row in generator.generate([Prompt(text="p", id="p", seed=seed)], n=2)]

    assert rows(1) == rows(1)
    assert rows(1)[0].logprobs != rows(1)[1].logprobs
    assert rows(1)[0].logprobs != rows(2)[0].logprobs
    assert [row.logprobs for row in rows(2, seed=1)] == [row.logprobs for row in rows(1)]
    assert rows(3)[0].seed == prompt_seed(3, "p")


def test_no_more_rows_are_open_than_allowed_samples_included(sandboxes: SandboxPool) -> None:
    most: list[int] = []

    class Counting(ScriptedEngine):
        def step(self) -> Any:
            most.append(self.open_rows)
            return super().step()

    engine = Counting(scripted("").tokenizer, FIRST)
    with Generator(engine, pool=sandboxes, max_open_rows=3) as generator:
        batch = generator.generate(["a", "b"], n=4)
    assert max(most) == 3
    assert [(row.prompt.id, row.sample) for row in batch] == [(p, k) for p in ("0", "1") for k in range(4)]
    whole = rollouts({"a": FIRST}, sandboxes, n=8)
    assert len({tuple(row.logprobs) for row in batch}) == 8
    assert len({tuple(row.logprobs) for row in whole}) == 8


# --- rewards


async def async_reward(row: Trajectory) -> float:
    await asyncio.sleep(0)
    return float(row.generation_length)


def _length(row: Trajectory) -> int:
    return row.generation_length


class CallableReward:
    def __call__(self, row: Trajectory) -> int:
        return row.generation_length


class AsyncCallableReward:
    async def __call__(self, row: Trajectory) -> int:
        return row.generation_length


def awaitable_reward(row: Trajectory) -> Awaitable[float]:
    return async_reward(row)


@pytest.mark.parametrize(
    "reward",
    [async_reward, CallableReward(), AsyncCallableReward(), awaitable_reward, lambda row: row.generation_length],
)
def test_rewards_are_sync_or_async(sandboxes: SandboxPool, reward: Any) -> None:
    batch = rollouts({"a": "x", "b": FIRST}, sandboxes, reward=reward)
    assert batch.rewards == [float(row.generation_length) for row in batch]
    assert all(isinstance(value, float) for value in batch.rewards)


def test_a_reward_that_is_no_number_is_told(sandboxes: SandboxPool) -> None:
    batch = rollouts({"a": "x"}, sandboxes, reward=lambda row: None)
    assert (batch[0].reward, batch[0].reward_error.split(":")[0]) == (None, "TypeError")


def test_rewards_are_computed_outside_the_sandbox_and_see_the_whole_trajectory(sandboxes: SandboxPool) -> None:
    seen: list[Trajectory] = []
    batch = rollouts({"a": FIRST}, sandboxes, reward=lambda row: seen.append(row) or 1)
    assert essence(seen[0]).segments == essence(batch[0]).segments
    assert seen[0].stop.kind is StopKind.END_OF_SEQUENCE


# --- where it runs


async def test_generate_works_inside_a_running_event_loop(sandboxes: SandboxPool) -> None:
    with Generator(scripted(FIRST), pool=sandboxes) as generator:
        assert shown(generator.generate(["p"])[0]) == ["", "7"]


async def test_generate_async_gives_the_same(sandboxes: SandboxPool) -> None:
    with Generator(scripted(FIRST), pool=sandboxes) as generator:
        there = await generator.generate_async(["p", "q"], n=2, reward=async_reward)
        here = generator.generate(["p", "q"], n=2, reward=async_reward)
    assert [essence(row) for row in there] == [essence(row) for row in here]
    assert there.verify() == [[]] * 4


async def test_generate_async_leaves_the_event_loop_free(sandboxes: SandboxPool) -> None:
    gate = Gate()
    with Generator(scripted("<code>hold()</code>"), pool=sandboxes, tools={"hold": gate}) as generator:
        task = asyncio.create_task(generator.generate_async(["p"]))
        while not gate.reached.is_set():
            await asyncio.sleep(0.001)  # turns of this loop, on which the batch runs too
        gate.opened.set()
        assert shown((await task)[0]) == ["'through'"]


@pytest.mark.parametrize("way", ["generate_async", "stream", "stream_deltas"])
async def test_prompts_are_encoded_beside_the_event_loop(
    sandboxes: SandboxPool, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """The loop turns once for each prompt that is encoded: on the loop's own thread, that would never end."""
    loop, encode = asyncio.get_running_loop(), Vocabulary.encode_prompt

    def encode_behind_a_turn(self: Vocabulary, prompt: Prompt) -> tuple[int, ...]:
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(LONG)
        return encode(self, prompt)

    monkeypatch.setattr(Vocabulary, "encode_prompt", encode_behind_a_turn)
    with Generator(scripted("said"), pool=sandboxes) as generator:
        begun = getattr(generator, way)(["p", "q"])
        rows = await begun if way == "generate_async" else [row async for row in begun if getattr(row, "text", "")]
    assert len(rows) >= 2


async def test_a_generator_that_is_closed_while_prompts_are_encoded_starts_no_sandbox(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoding, closed, encode = threading.Event(), threading.Event(), Vocabulary.encode_prompt

    def encode_late(self: Vocabulary, prompt: Prompt) -> tuple[int, ...]:
        encoding.set()
        assert closed.wait(LONG)
        return encode(self, prompt)

    monkeypatch.setattr(Vocabulary, "encode_prompt", encode_late)
    engine = scripted(FIRST)
    generator = Generator(engine)
    task = asyncio.create_task(generator.generate_async(["p", "q"]))
    assert await asyncio.to_thread(encoding.wait, LONG)
    generator.close()
    closed.set()
    assert [row.stop.kind for row in await task] == [StopKind.CANCELLED] * 2
    assert generator._sessions._own_pool is None
    assert engine.steps == 0


def test_context_variables_of_the_caller_reach_tools_and_rewards(sandboxes: SandboxPool) -> None:
    import contextvars

    name: contextvars.ContextVar[str] = contextvars.ContextVar("name", default="none")
    name.set("mine")
    batch = rollouts(
        {"a": "<code>who()</code>"}, sandboxes, tools={"who": name.get}, reward=lambda row: len(name.get())
    )
    assert (shown(batch[0]), batch.rewards) == (["'mine'"], [4.0])


def test_two_batches_at_once_are_refused_and_the_first_goes_on(sandboxes: SandboxPool) -> None:
    gate = Gate()
    with Generator(scripted("<code>hold()</code>"), pool=sandboxes, tools={"hold": gate}) as generator:
        done: list[Any] = []
        first = threading.Thread(target=lambda: done.append(generator.generate(["p", "q"])))
        first.start()
        assert gate.reached.wait(LONG)
        with pytest.raises(errors.ProtocolError, match="one batch at a time"):
            generator.generate(["r"])
        with pytest.raises(errors.ProtocolError, match="one batch at a time"):
            asyncio.run(generator.generate_async(["r"]))
        assert generator.progress.rows == 2
        gate.opened.set()
        first.join(LONG)
        assert [shown(row) for row in done[0]] == [["'through'"]] * 2
        assert len(generator.generate(["r"])) == 1


def test_progress_counts_what_is_done(sandboxes: SandboxPool) -> None:
    with Generator(scripted({"a": FIRST, "b": "x"}, fail={"b": 1}), pool=sandboxes) as generator:
        batch = generator.generate([Prompt(text="a"), Prompt(text="b")])
        progress = generator.progress
    assert (progress.rows, progress.finished, progress.failed, progress.calls) == (2, 2, 1, 2)
    assert (progress.running, progress.executing) == (0, 0)
    assert progress.generated_tokens == sum(sum(row.mask) for row in batch)
    assert progress.injected_tokens == sum(row.generation_length for row in batch) - progress.generated_tokens


def test_limits_of_calls_hold_for_the_whole_row(sandboxes: SandboxPool) -> None:
    counts: list[int] = []
    script = "<code>tick()</code> " * 4
    told = one(script, sandboxes, limits=Limits(max_tool_calls=2), tools={"tick": lambda: counts.append(1)})
    assert len(counts) == 2
    assert "limit of 2 calls" in injected(told)[0]
    stopped = one(
        script, sandboxes, limits=Limits(max_tool_calls=2, at_tool_call_limit="stop"), tools={"tick": lambda: 1}
    )
    assert (stopped.stop.kind, shown(stopped)) == (StopKind.TOOL_CALL_LIMIT, ["1", "1"])
