"""What is particular to each way, and what is refused."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from small_models import GREEDY

from midstream.engines.base import RowRequest
from midstream.engines.noise import uniform
from midstream.engines.sampling import draw
from midstream.engines.vllm import VLLMEngine
from midstream.engines.vllm import engine as engine_module
from midstream.engines.vllm.facts import Facts
from midstream.engines.vllm.forced import Forced
from midstream.engines.vllm.looped import LoopLink
from midstream.engines.vllm.plans import Plan, plans
from midstream.engines.vllm.rows import EngineRow, sampling_params
from midstream.engines.vllm.streaming import Streaming
from midstream.engines.vllm.ways import way_of
from midstream.errors import CapabilityError, ConfigurationError
from midstream.generation import Generator
from midstream.types import Limits, Sampling
from problems import load_held_out, prompt_text
from tests.vllm.conftest import random_ids, sample

ANY = Facts(
    context_length=512,
    vocabulary_size=448,
    eos_ids=frozenset({0}),
    logprobs="raw",
    has_processor=True,
    speculative=False,
    asynchronous=False,
    detokenizes=True,
)


def test_importing_the_engine_imports_no_vllm():
    code = "import sys, midstream, midstream.engines.vllm; assert 'vllm' not in sys.modules; print('ok')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "ok\n"


def test_a_session_keeps_what_it_has_computed(async_llm):
    engine = VLLMEngine(async_llm, mode="streaming")
    probe = random_ids(40, 21)
    (handle,) = engine.open(RowRequest(probe, sampling=GREEDY))
    ids, _ = sample(engine, [handle], 12)[0]
    engine.close(handle)
    # A row whose fifth id is a stop id: its turn is over there, and the session waits.
    (handle,) = engine.open(RowRequest(probe, sampling=GREEDY, stop_ids=(ids[4],)))
    place = ids.index(ids[4]) + 1
    assert sample(engine, [handle], place)[0][0] == ids[:place]
    assert engine.unfinished == 1
    (row,) = engine._rows.values()
    request = row.request
    assert request is not None
    engine.extend(handle, random_ids(6, 22))
    continued = sample(engine, [handle], 1)[0][0]
    assert row.request in (request, None)
    fresh = engine.open(RowRequest((*probe, *ids[:place], *random_ids(6, 22)), sampling=GREEDY))
    assert sample(engine, fresh, 1)[0][0] == continued
    engine.shutdown()


def test_a_session_goes_on_past_ids_that_only_might_have_closed_a_block(async_llm):
    engine = VLLMEngine(async_llm, mode="streaming")
    prompt = random_ids(40, 23)
    expected = sample(engine, engine.open(RowRequest(prompt, sampling=GREEDY)), 30)[0][0]
    handles = engine.open(RowRequest(prompt, sampling=GREEDY, stop_ids=tuple(range(0, 448, 3))))
    (row,) = [row for row in engine._rows.values() if row.handle == handles[0]]
    requests = set()
    ids: list[int] = []
    while len(ids) < 30:
        for update in engine.step():
            ids += update.ids
        requests.add(row.request)
    assert ids[:30] == expected
    assert len(requests) == 1
    engine.shutdown()


def test_a_result_that_is_there_in_time_is_forced_in_the_same_request(llm):
    engine = VLLMEngine(llm, mode="forced", patience=0)
    prompt, result = random_ids(40, 31), random_ids(9, 32)
    (handle,) = engine.open(RowRequest(prompt, sampling=GREEDY))
    first, _ = sample(engine, [handle], 8)[0]
    (row,) = engine._rows.values()
    request = row.request
    assert request is not None
    engine.extend(handle, result)
    seen = [update for _ in range(9 + 1) for update in engine.step()]
    assert row.request == request
    (update,) = seen
    engine.rollback(handle, 0)
    assert row.ids == [*prompt, *first, *result, *update.ids]
    whole = engine.open(RowRequest((*prompt, *first, *result), sampling=GREEDY))
    again, logprobs = sample(engine, whole, 1)[0]
    assert list(update.ids) == again
    assert list(update.logprobs) == pytest.approx(logprobs, abs=1e-4)
    engine.shutdown()
    assert plans == {}


@pytest.mark.parametrize(("way", "name"), [(Streaming, "async_llm"), (Forced, "llm")])
def test_every_block_of_a_batch_stays_in_its_row_s_request(request, sandboxes, monkeypatch, way, name):
    begun: list[int] = []
    begin = way.begin

    def counted(self: Any, row: Any) -> None:
        begun.append(row.handle)
        begin(self, row)

    monkeypatch.setattr(way, "begin", counted)
    prompts = [prompt_text(problem.question) for problem in load_held_out()[::40]]
    engine = VLLMEngine(request.getfixturevalue(name), mode=way.__name__.lower(), patience=60)
    with Generator(engine, sampling=GREEDY, limits=Limits(200), pool=sandboxes) as generator:
        rows = generator.generate(prompts)
    engine.shutdown()
    assert all(row.calls for row in rows)
    assert sorted(begun) == list(range(1, len(prompts) + 1))


def test_what_vllm_samples_beyond_a_block_is_no_part_of_the_row(llm, async_llm, sandboxes, monkeypatch):
    """An ``AsyncLLM`` runs ahead of whoever is slow to look: requests that know no end tag overshoot it."""
    prompts = [prompt_text(problem.question) for problem in load_held_out()[::60]]
    found = []
    poll = LoopLink.poll
    looked: list[bool] = []

    def poll_late(link: Any) -> Any:
        until = time.monotonic() + 600
        link._settle()  # what was submitted has begun in the loop
        while link._tasks and not looked:  # the first requests go on as far as they may before anybody looks
            assert time.monotonic() < until
            time.sleep(0.005)
        found = poll(link)
        looked.extend([True] * bool(found))
        return found

    monkeypatch.setattr(LoopLink, "poll", poll_late)
    for one in (llm, async_llm):
        engine = VLLMEngine(one)
        with Generator(engine, sampling=GREEDY, limits=Limits(200), pool=sandboxes) as generator:
            found.append(generator.generate(prompts))
        engine.shutdown()
        assert engine.unfinished == 0
    exact, ahead = found
    assert sum(row.discarded for row in exact) == 0
    assert sum(row.discarded for row in ahead) > 0
    for row, other in zip(exact, ahead, strict=True):
        assert row.ids == other.ids
        assert row.mask == other.mask
        assert row.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_a_result_that_comes_too_late_goes_on_by_resubmission(llm):
    engine = VLLMEngine(llm, mode="forced", patience=0)
    prompt, result = random_ids(40, 33), random_ids(9, 34)
    slow, other = engine.open(RowRequest(prompt, sampling=GREEDY))[0], engine.open(RowRequest(prompt))[0]
    engine.rollback(other, 0)
    first, _ = sample(engine, [slow], 8)[0]
    row = engine._rows[slow]
    request = row.request
    engine.extend(other, ())
    assert {update.handle for _ in range(3) for update in engine.step()} == {other}
    assert row.request is None
    assert row.ids == [*prompt, *first]
    engine.rollback(other, 0)
    engine.extend(slow, result)
    found = sample(engine, [slow], 5)[0][0]
    assert row.request != request
    expected = sample(engine, engine.open(RowRequest((*prompt, *first, *result), sampling=GREEDY)), 5)[0][0]
    assert found == expected
    engine.shutdown()
    assert plans == {}


def test_a_result_may_hold_ids_at_which_the_request_ends(llm):
    engine = VLLMEngine(llm, mode="forced", patience=0)
    prompt, result = random_ids(40, 35), (5, 0, 7)
    (handle,) = engine.open(RowRequest(prompt, sampling=GREEDY, stop_ids=(0,)))
    first, _ = sample(engine, [handle], 3)[0]
    engine.extend(handle, result)
    found = sample(engine, [handle], 2)[0][0]
    expected = sample(engine, engine.open(RowRequest((*prompt, *first, *result), sampling=GREEDY)), 2)[0][0]
    assert found == expected
    engine.shutdown()


def test_a_plan_depends_on_the_position_alone():
    plan = Plan(start=10, stop_id=3, until=0.0)
    assert plan.forced(10) == 3
    plan.ids = (7, 8)
    assert [plan.forced(place) for place in (9, 10, 10, 11, 12)] == [None, 7, 7, 8, None]


def test_the_processor_of_the_second_runner_draws_and_forces_by_slot(llm):
    """That runner needs a GPU; its batch is laid out here as its interface says."""
    from midstream.engines.vllm.processor_v2 import RowProcessor

    def params(number: int, sampling: Sampling) -> Any:
        row = EngineRow(number, [1, 2], sampling, 70 + number, 512, (0,), (), request=f"second-{number}")
        return sampling_params(row, keyed=True, stop_ids=(0,), stop_strings=())

    drawn = Sampling(temperature=1.5, top_k=30)
    processor = RowProcessor(None, None)
    assert processor.add_request(4, params(1, drawn))
    assert processor.add_request(2, params(2, GREEDY))
    assert processor.add_request(9, params(3, GREEDY))
    assert not processor.add_request(9, SimpleNamespace(extra_args=None))  # the slot has another request now
    processor.apply_staged_writes()
    logits = torch.randn(3, 448, generator=torch.Generator().manual_seed(1))
    given = logits.clone()
    layout = SimpleNamespace(
        idx_mapping_np=numpy.array([9, 2, 4]), seq_lens_upper_bound_np=numpy.array([11, 12, 13, 0])
    )
    plans["second-2"] = Plan(start=12, stop_id=0, until=0.0, ids=(33,))
    try:
        result = processor.apply(logits, layout)
    finally:
        del plans["second-2"]
    assert torch.equal(result[0], given[0])
    assert result[1].isfinite().nonzero().flatten().tolist() == [33]
    (expected,), _ = draw(given[2:], [drawn], [uniform(71, 13)])
    assert result[2].isfinite().nonzero().flatten().tolist() == [expected]
    with pytest.raises(RuntimeError, match="speculative decoding"):
        processor.apply(torch.zeros(4, 448), layout)


def test_arguments_that_are_not_midstream_s_are_refused_at_the_door(llm):
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    bad = SamplingParams(extra_args={"midstream": {"row": "x"}}, max_tokens=1)
    with pytest.raises(VLLMValidationError, match="is not what midstream sends"):
        llm.generate({"prompt_token_ids": [5]}, bad, use_tqdm=False)


def test_processed_logprobs_are_refused_with_the_processor_and_made_without_it(llm, monkeypatch):
    from midstream.engines.vllm.facts import add_processor

    monkeypatch.setattr(llm.llm_engine.vllm_config.model_config, "logprobs_mode", "processed_logprobs")
    with pytest.raises(CapabilityError, match=r"would all be 0\.0"):
        VLLMEngine(llm)
    for kind, expected in (
        ("processed_logprobs", None),
        ("raw_logprobs", ["midstream.engines.vllm.processor_v1:RowProcessor"]),
    ):
        model = SimpleNamespace(logprobs_mode=kind, logits_processors=None)
        add_processor(SimpleNamespace(speculative_config=None, model_config=model))
        assert model.logits_processors == expected


def test_without_the_processor_vllm_draws_with_a_seed_for_each_request(llm, monkeypatch):
    facts_of = engine_module.facts_of
    monkeypatch.setattr(engine_module, "facts_of", lambda *given: replace(facts_of(*given), has_processor=False))
    request = RowRequest(random_ids(40, 41), sampling=Sampling(temperature=1.2), seed=5)
    engine = VLLMEngine(llm)
    assert not engine.capabilities.keyed_noise
    first, second, third = (
        [ids for ids, _ in sample(engine, engine.open(one, n=3), 10)]
        for one in (request, request, replace(request, seed=6))
    )
    assert first == second
    assert len({tuple(ids) for ids in (*first, *third)}) == 6
    with pytest.raises(CapabilityError, match="min_p"):
        engine.open(replace(request, sampling=Sampling(top_p=0.5, min_p=0.1)))
    engine.shutdown()
    with pytest.raises(CapabilityError, match="logits processor is not in"):
        VLLMEngine(llm, mode="forced")


@dataclass
class _Connection:
    link: Any = None
    tokenizer: Any = None


@pytest.mark.parametrize(
    ("facts", "mode", "stop_strings", "message"),
    [
        (replace(ANY, detokenizes=False), "resubmission", True, "skip_tokenizer_init"),
        (ANY, "streaming", True, "sessions take none"),
        (ANY, "streaming", False, "AsyncLLM"),
        (replace(ANY, speculative=True), "forced", False, "speculative"),
        (ANY, "forced", False, "in this process"),
    ],
)
def test_what_cannot_be_exact_is_refused(facts, mode, stop_strings, message):
    with pytest.raises(CapabilityError, match=message):
        way_of(_Connection(), facts, mode, stop_strings=stop_strings, patience=0.0)


def test_forcing_refuses_a_vllm_that_samples_ahead(llm, monkeypatch):
    facts_of = engine_module.facts_of
    monkeypatch.setattr(engine_module, "facts_of", lambda *given: replace(facts_of(*given), asynchronous=True))
    with pytest.raises(CapabilityError, match="async_scheduling=False"):
        VLLMEngine(llm, mode="forced")


def test_a_session_refuses_an_llm_and_forcing_an_async_llm(llm, async_llm):
    with pytest.raises(CapabilityError, match="AsyncLLM"):
        VLLMEngine(llm, mode="streaming")
    with pytest.raises(CapabilityError, match="in this process"):
        VLLMEngine(async_llm, mode="forced")


def test_options_that_are_none_are_refused(llm):
    with pytest.raises(ConfigurationError, match="mode='rounds'"):
        VLLMEngine(llm, mode="rounds")
    with pytest.raises(ConfigurationError, match="context_length=1"):
        VLLMEngine(llm, context_length=1)
    with pytest.raises(ConfigurationError, match="patience=-1"):
        VLLMEngine(llm, mode="forced", patience=-1)
    with pytest.raises(ConfigurationError, match="llm=str"):
        VLLMEngine("a path")
    with pytest.raises(ConfigurationError, match="cannot be started"):
        VLLMEngine.from_pretrained("/nowhere/at/all")


def test_an_async_llm_whose_loop_has_ended_is_refused(llm):
    from vllm.v1.engine.async_llm import AsyncLLM

    ended = AsyncLLM.__new__(AsyncLLM)
    ended.output_handler = SimpleNamespace(done=lambda: True)
    with pytest.raises(ConfigurationError, match="event loop"):
        VLLMEngine(ended)


def test_a_vllm_without_prefix_caching_is_warned_of(llm, monkeypatch, caplog):
    monkeypatch.setattr(llm.llm_engine.vllm_config.cache_config, "enable_prefix_caching", False)
    VLLMEngine(llm)
    assert "prefix caching is off" in caplog.text


def test_resubmission_works_over_an_async_llm_too(async_llm, llm):
    prompt = random_ids(50, 51)
    rows = []
    for one in (async_llm, llm):
        engine = VLLMEngine(one)
        (handle,) = engine.open(RowRequest(prompt, sampling=Sampling(temperature=1.1), seed=9))
        ids, _ = sample(engine, [handle], 10)[0]
        engine.extend(handle, random_ids(5, 52))
        rows.append(ids + sample(engine, [handle], 10)[0][0])
        engine.shutdown()
        assert engine.unfinished == 0
    assert rows[0] == rows[1]
