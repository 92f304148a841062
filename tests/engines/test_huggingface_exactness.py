"""What is sampled, and its logprob, against plain passes of the model, whatever happens to the rows."""

import logging

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import (
    GREEDY,
    NO_CACHE,
    RAGGED,
    ROW_CACHES,
    VOCABULARY,
    Event,
    Script,
    check_exact,
    fresh_model,
    play,
    random_ids,
    small_model,
    teacher_forced,
)

from midstream.engines.huggingface import HuggingFaceEngine
from midstream.engines.model_runners import RaggedRunner, RowCacheRunner, WholeRunner
from midstream.types import Sampling

SAMPLED = Sampling(temperature=0.9, top_k=20)
EVENTFUL = [
    Script(random_ids(17, 1), (Event(3, random_ids(9, 2)), Event(4, random_ids(2, 3), wait=3)), seed=1),
    Script(random_ids(1, 4), (Event(6, (), rollback=2, wait=1), Event(1, random_ids(20, 5))), seed=2, sampling=SAMPLED),
    Script(random_ids(40, 6), (Event(2, random_ids(1, 7), rollback=1),), seed=3, sampling=Sampling(temperature=1.3)),
    Script(random_ids(9, 8), (), tail=20, seed=4, sampling=SAMPLED),
    Script(random_ids(17, 1), (Event(1, random_ids(30, 9), rollback=1, wait=6),), seed=5, opened_at=4),
]


@pytest.mark.parametrize("name", RAGGED + ROW_CACHES + NO_CACHE)
def test_greedy_ids_are_those_of_generate_for_prompts_of_mixed_lengths(name):
    model = small_model(name)
    prompts = [random_ids(length, length) for length in (1, 7, 30, 12, 3)]
    rows = play(HuggingFaceEngine(model, None, max_batch_size=3), [Script(ids, tail=16) for ids in prompts])
    for ids, row in zip(prompts, rows, strict=True):
        generated = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=16,
        )[0].tolist()
        for position, (ours, theirs) in enumerate(zip(row.ids, generated, strict=True)):
            if ours != theirs:
                top = teacher_forced(model, generated[:position])[-1].topk(2).values
                assert (top[0] - top[1]).item() <= 1e-4
                break


@pytest.mark.parametrize("name", RAGGED + ROW_CACHES + NO_CACHE)
def test_one_plain_pass_reproduces_ids_and_logprobs_of_eventful_rows(name):
    model = small_model(name)
    engine = HuggingFaceEngine(model, None, max_batch_size=3, prefill_chunk=16)
    assert sum(check_exact(model, row) for row in play(engine, EVENTFUL)) == 53


@pytest.mark.parametrize(
    ("names", "runner"), [(RAGGED, RaggedRunner), (ROW_CACHES, RowCacheRunner), (NO_CACHE, WholeRunner)]
)
def test_each_model_gets_its_runner_and_a_line_says_so_where_it_is_a_slow_one(names, runner, caplog):
    for name in names:
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="midstream"):
            engine = HuggingFaceEngine(small_model(name), None)
        assert type(engine._runner) is runner
        assert len(caplog.records) == (0 if runner is RaggedRunner else 1)
        if runner is not RaggedRunner:
            assert type(small_model(name)).__name__ in caplog.text
            assert "exact" in caplog.text


IDS = st.lists(st.integers(0, VOCABULARY - 1), max_size=12).map(tuple)
EVENT = st.builds(Event, after=st.integers(1, 6), result=IDS, rollback=st.integers(0, 6), wait=st.integers(0, 5))
SCRIPT = st.builds(
    Script,
    ids=st.builds(lambda common, own: random_ids(common, 99) + own, st.sampled_from([0, 1, 16, 30]), IDS.filter(len)),
    events=st.lists(EVENT, max_size=3).map(tuple),
    tail=st.integers(1, 8),
    sampling=st.sampled_from([GREEDY, SAMPLED, Sampling(), Sampling(min_p=0.05)]),
    seed=st.integers(0, 2**64 - 1),
    opened_at=st.integers(0, 12),
)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    scripts=st.lists(SCRIPT, min_size=1, max_size=7),
    batch=st.integers(1, 4),
    extra=st.integers(0, 3),
    chunk=st.sampled_from([1, 5, 64, 2048]),
    name=st.sampled_from(["llama", "gemma3", "qwen3-next"]),
)
def test_rows_stay_exact_through_random_results_rollbacks_and_waits(scripts, batch, extra, chunk, name):
    model = small_model(name)
    engine = HuggingFaceEngine(model, None, max_batch_size=batch, max_cached_rows=batch + extra, prefill_chunk=chunk)
    for row in play(engine, scripts):
        assert check_exact(model, row) > 0


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    scripts=st.lists(SCRIPT, min_size=2, max_size=6),
    batch=st.integers(1, 6),
    chunk=st.sampled_from([3, 64, 2048]),
    order=st.randoms(use_true_random=False),
)
def test_a_row_is_the_same_whatever_its_mates_their_order_and_the_time_its_results_take(scripts, batch, chunk, order):
    model = small_model("llama")
    alone = [
        play(HuggingFaceEngine(model, None), [Script(s.ids, s.events, s.tail, s.sampling, s.seed)])[0] for s in scripts
    ]
    slower = [
        Script(
            script.ids,
            tuple(Event(e.after, e.result, e.rollback, wait=order.randrange(8)) for e in script.events),
            script.tail,
            script.sampling,
            script.seed,
            opened_at=order.randrange(10),
        )
        for script in scripts
    ]
    places = list(range(len(scripts)))
    order.shuffle(places)
    engine = HuggingFaceEngine(model, None, max_batch_size=batch, prefill_chunk=chunk)
    for place, row in zip(places, play(engine, [slower[place] for place in places]), strict=True):
        assert row.ids == alone[place].ids
        assert row.logprobs == pytest.approx(alone[place].logprobs, abs=1e-4)


def test_a_resumed_row_goes_on_as_if_it_had_never_stopped():
    model = small_model("llama")
    script = Script(random_ids(20), tail=30, sampling=SAMPLED, seed=8)
    whole = play(HuggingFaceEngine(model, None), [script])[0]
    for cut in (1, 13, 29):
        rest = Script(tuple(whole.ids[: 20 + cut]), tail=30 - cut, sampling=SAMPLED, seed=8)
        assert play(HuggingFaceEngine(model, None), [rest])[0].ids == whole.ids


def test_a_model_that_ignores_positions_is_found_out_and_served_all_the_same(caplog):
    model = fresh_model("llama")
    forward = model.forward

    def without_positions(input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **rest):
        return forward(input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values, **rest)

    model.forward = without_positions
    with caplog.at_level(logging.WARNING, logger="midstream"):
        engine = HuggingFaceEngine(model, None)
    assert isinstance(engine._runner, RowCacheRunner)
    assert "standard deviations" in caplog.text
    for row in play(engine, EVENTFUL):
        check_exact(model, row)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_served_by_the_ragged_cache(dtype):
    model = fresh_model("llama").to(dtype)
    engine = HuggingFaceEngine(model, None, max_batch_size=3, prefill_chunk=16)
    assert isinstance(engine._runner, RaggedRunner)
    for row in play(engine, EVENTFUL):
        logprobs = teacher_forced(model, row.ids).log_softmax(-1)
        errors = [
            abs(logprobs[position - 1, row.ids[position]].item() - logprob)
            for position, logprob in enumerate(row.logprobs)
            if logprob is not None
        ]
        assert sum(errors) / len(errors) < 0.1
