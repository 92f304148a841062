"""Rows come, wait, fail and go without another row noticing, and leave nothing behind."""

from __future__ import annotations

import asyncio
import copy
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_models import GREEDY, teacher_forced

from midstream.engines.base import RowRequest
from midstream.errors import CapabilityError, ConfigurationError, PromptError, ProtocolError
from midstream.generation import Generator
from midstream.sessions import Sessions
from midstream.types import Limits, Media, Sampling, StopKind
from problems import load_held_out, prompt_text
from tests.vllm.conftest import random_ids, sample

QUESTION = "Question: What is left when 267 is divided by 10078?\nAnswer:"


def request(number: int = 1, **options: Any) -> RowRequest:
    return RowRequest(random_ids(30, number), **({"sampling": GREEDY} | options))


def step_until(engine: Any, wanted: Any, most: int = 3000) -> list[Any]:
    seen: list[Any] = []
    for _ in range(most):
        seen += engine.step()
        if wanted(seen):
            return seen
    raise AssertionError(f"{most} steps gave {seen}")


def test_a_held_row_stops_no_other_and_gets_nothing(engine):
    held, other = engine.open(request(1))[0], engine.open(request(2))[0]
    sample(engine, [held, other], 4)
    engine.extend(other, ())
    seen = step_until(engine, lambda updates: sum(len(update.ids) for update in updates) >= 40)
    assert {update.handle for update in seen} == {other}


def test_without_running_rows_a_step_returns_at_once(engine):
    assert engine.step() == []
    (handle,) = engine.open(request())
    sample(engine, [handle], 3)
    for _ in range(3):
        assert engine.step() == []
    engine.extend(handle, random_ids(3, 9))
    assert len(sample(engine, [handle], 3)[0][0]) == 3


def test_slow_code_of_one_row_lets_the_others_finish(engine, sandboxes, monkeypatch):
    """The first session is held back until another row has ended: if that had to wait for it, neither would end."""
    prompts = [prompt_text(problem.question) for problem in load_held_out()[::60]]
    ended = threading.Event()
    waited: list[bool] = []
    open_session = Sessions.open

    async def open_slowly(self: Sessions, seed: int, history: Any) -> Any:
        if not waited:
            waited.append(False)
            waited[0] = await asyncio.to_thread(ended.wait, 600)
        return await open_session(self, seed, history)

    with Generator(engine, sampling=GREEDY, limits=Limits(150), pool=sandboxes) as generator:
        expected = generator.generate(prompts)
        monkeypatch.setattr(Sessions, "open", open_slowly)
        rows = generator.generate(prompts, reward=lambda _: ended.set() or 1.0)
    assert waited == [True]
    assert [row.ids for row in rows] == [row.ids for row in expected]


def test_a_request_that_vllm_refuses_ends_its_row_alone(engine, monkeypatch):
    good, bad = engine.open(request(1))[0], engine.open(request(2))[0]
    submit = engine._way.submit

    def refusing(row: Any) -> None:
        if row.handle == bad:
            from vllm.exceptions import VLLMValidationError

            raise VLLMValidationError("not this one")
        submit(row)

    monkeypatch.setattr(engine._way, "submit", refusing)
    seen = step_until(engine, lambda updates: sum(len(update.ids) for update in updates) >= 5)
    (failed,) = [update for update in seen if update.error]
    assert (failed.handle, failed.error) == (bad, "VLLMValidationError: not this one")
    assert {update.handle for update in seen if update.ids} == {good}
    engine.close(bad)


def test_closed_rows_leave_no_request(engine):
    handles = [engine.open(request(number))[0] for number in range(4)]
    step_until(engine, lambda updates: {update.handle for update in updates} == set(handles))
    engine.rollback(handles[0], 0)
    for handle in handles:
        engine.close(handle)
    assert engine.unfinished == 0
    with pytest.raises(ProtocolError, match="no row"):
        engine.close(handles[0])


def test_time_limits_and_cancelling_leave_no_request(engine):
    endless = Limits(max_new_tokens=450, ignore_eos=True, time_limit=0.3)
    with Generator(engine, sampling=Sampling(), limits=endless, markup=None) as generator:
        rows = generator.generate([QUESTION] * 4, n=3)
    assert StopKind.TIME_LIMIT in {row.stop.kind for row in rows}
    assert engine.unfinished == 0


def test_rows_can_be_forked(engine):
    (handle,) = engine.open(request(3, sampling=Sampling(temperature=1.3), seed=5))
    sample(engine, [handle], 6)
    twin = engine.fork(handle, 99)
    for one in (handle, twin):
        engine.extend(one, random_ids(4, 8))
    first, second = (ids for ids, _ in sample(engine, [handle, twin], 12))
    assert first != second


def test_nothing_is_sampled_while_paused(engine):
    alone = sample(engine, engine.open(request(4)), 12)[0][0]
    held, other = engine.open(request(1))[0], engine.open(request(2))[0]
    sample(engine, [held, other], 2)
    running = engine.open(request(4))[0]
    engine.extend(other, ())
    before = step_until(engine, lambda updates: any(update.handle == running for update in updates))
    engine.pause()
    assert [engine.step() for _ in range(5)] == [[]] * 5
    engine.resume()
    engine.close(held)
    after = step_until(
        engine, lambda updates: sum(len(one.ids) for one in (*before, *updates) if one.handle == running) >= 12
    )
    assert [i for one in (*before, *after) if one.handle == running for i in one.ids][:12] == alone


@pytest.mark.parametrize("keep_cache", [False, True])
def test_every_id_has_the_version_of_the_weights_that_sampled_it(make_engine, mode, llm, model, keep_cache):
    if mode == "streaming":
        pytest.skip("the weights of this one are in another process; test_versions_are_counted covers it")
    engine = make_engine(weight_version=3)
    (handle,) = engine.open(request(5))
    old, _ = sample(engine, [handle], 10)[0]
    engine.pause()
    changed = _scaled(model, 1.7)
    _load(llm, changed)
    try:
        engine.set_weights(4, keep_cache=keep_cache)
        engine.resume()
        engine.extend(handle, ())
        new, logprobs = sample(engine, [handle], 10)[0]
        assert engine.weight_version == 4
        if not keep_cache:
            ids = [*request(5).ids, *old, *new]
            forced = teacher_forced(changed, ids).log_softmax(-1)
            start = len(ids) - len(new)
            expected = [forced[place - 1, ids[place]].item() for place in range(start, len(ids))]
            assert logprobs == pytest.approx(expected, abs=1e-4)
            before = teacher_forced(model, ids).log_softmax(-1)
            assert abs(before[start - 1, ids[start]].item() - logprobs[0]) > 1e-3
    finally:
        _load(llm, model)
        engine.set_weights(3, keep_cache=False)


def test_rows_that_are_opened_later_find_nothing_that_older_weights_computed(make_engine, mode, llm, model):
    if mode == "streaming":
        pytest.skip("the weights of this one are in another process")
    engine = make_engine()
    ids = random_ids(300, 7)  # several blocks of the prefix cache
    sample(engine, engine.open(RowRequest(ids, sampling=GREEDY)), 3)
    changed = _scaled(model, 1.7)
    engine.pause()
    _load(llm, changed)
    try:
        engine.set_weights(1, keep_cache=True)
        engine.resume()
        new, logprobs = sample(engine, engine.open(RowRequest(ids, sampling=GREEDY)), 3)[0]
        forced = teacher_forced(changed, [*ids, *new]).log_softmax(-1)
        expected = [forced[len(ids) - 1 + place, token_id].item() for place, token_id in enumerate(new)]
        assert logprobs == pytest.approx(expected, abs=1e-4)
    finally:
        _load(llm, model)
        engine.set_weights(0, keep_cache=False)


def test_versions_are_counted(engine):
    expected = sample(engine, engine.open(request(6)), 8)[0][0]
    (handle,) = engine.open(request(6))
    first = step_until(engine, lambda updates: any(update.ids for update in updates))
    for version in (7, 8):
        engine.pause()
        engine.set_weights(version, keep_cache=False)
        engine.resume()
        seen = step_until(engine, lambda updates: any(update.ids for update in updates))
        assert {update.weight_version for update in seen} == {version}
        first += seen
    assert first[0].weight_version == 0
    ids = [i for update in first if update.handle == handle for i in update.ids]
    assert ids[:8] == expected[: len(ids)]


def _scaled(model: Any, factor: float) -> Any:
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for layer in changed.model.layers:
            layer.input_layernorm.weight.mul_(factor)
    return changed


def _load(llm: Any, source: Any) -> None:
    """Put a transformers model's norms into vLLM's model."""
    weights = [layer.input_layernorm.weight.detach() for layer in source.model.layers]

    def copy_in(model: Any) -> None:
        with torch.inference_mode():
            for layer, weight in zip(model.model.layers, weights, strict=True):
                layer.input_layernorm.weight.copy_(weight)

    llm.apply_model(copy_in)


def test_bad_rows_are_refused_before_they_start(engine):
    with pytest.raises(PromptError, match="at least one id"):
        engine.open(RowRequest(()))
    with pytest.raises(PromptError, match="448"):
        engine.open(RowRequest((3, 448)))
    with pytest.raises(PromptError, match="513 of them"):
        engine.open(RowRequest((3,) * 513))
    with pytest.raises(ConfigurationError, match="n=0"):
        engine.open(request(), n=0)
    with pytest.raises(CapabilityError, match="no media"):
        engine.open(replace(request(), media=(Media("image/png", b""),)))


def test_rows_that_are_driven_out_of_turn_are_refused(engine):
    (handle,) = engine.open(request())
    with pytest.raises(ProtocolError, match="not held"):
        engine.extend(handle, (3,))
    with pytest.raises(ProtocolError, match="cannot be taken back"):
        engine.rollback(handle, 30)
    engine.rollback(handle, 0)
    with pytest.raises(ProtocolError, match="448"):
        engine.extend(handle, (448,))
    with pytest.raises(ProtocolError, match="over its limit"):
        engine.extend(handle, (3,) * 500)
