"""The ids and logprobs of every way are those of vLLM without tools, of transformers, and of the noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from small_models import GREEDY, Event, Script, check_exact, play, teacher_forced

from midstream.decoding import decode
from midstream.engines.base import RowRequest
from midstream.engines.huggingface import HuggingFaceEngine
from midstream.generation import Generator
from midstream.types import Limits, Sampling, StopKind
from midstream.vocabulary import Vocabulary
from problems import load_held_out, prompt_text
from tests.vllm.conftest import random_ids, sample

TOLERANCE = 1e-4
"""Of logprobs. float32 on the CPU, vLLM's attention against transformers': 4e-5 is the worst that was seen."""


def script(number: int, **options: Any) -> Script:
    events = (
        Event(5, random_ids(7, 100 + number), rollback=number % 3, wait=number % 4),
        Event(3, random_ids(9, 200 + number)),
        Event(4),
    )
    return Script(random_ids(30 + 5 * number, number), events, **{"tail": 20, "seed": number} | options)


def test_without_tools_greedy_ids_are_those_of_vllm_alone(engine, llm):
    from vllm import SamplingParams

    prompts = [random_ids(20 + 7 * number, number) for number in range(6)]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=0)
    expected = llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], params, use_tqdm=False)
    played = play(engine, [Script(prompt, tail=40) for prompt in prompts])
    for row, one in zip(played, expected, strict=True):
        (completion,) = one.outputs
        ids = [*row.script.ids, *completion.token_ids]  # several may come at a time, the last of them beyond these
        assert row.ids[: len(ids)] == ids
        logprobs = [among[i].logprob for i, among in zip(completion.token_ids, completion.logprobs, strict=True)]
        assert row.logprobs[len(row.script.ids) : len(ids)] == pytest.approx(logprobs, abs=TOLERANCE)


def test_rows_that_come_wait_take_back_and_go_on_are_exact(engine, model):
    scripts = [script(number, opened_at=number % 5) for number in range(8)]
    assert sum(check_exact(model, row, TOLERANCE) for row in play(engine, scripts)) > 8 * 27


SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.7, top_k=5),
    Sampling(temperature=1.3, top_p=0.8),
    Sampling(temperature=1.1, min_p=0.05),
    Sampling(temperature=1.2, top_k=40, top_p=0.95, min_p=0.02),
    GREEDY,
]


def test_drawn_ids_are_those_that_the_noise_names(engine, model):
    assert engine.capabilities.keyed_noise
    scripts = [script(number, sampling=sampling) for number, sampling in enumerate(SAMPLINGS)]
    for row in play(engine, scripts):
        assert check_exact(model, row, TOLERANCE) >= 27


def test_noise_is_the_same_in_every_batch_and_on_the_hugging_face_engine(make_engine, model):
    numbers = range(4)

    def rows(engine: Any, numbers: Sequence[int]) -> list[list[int]]:
        requests = [RowRequest(random_ids(30, n), sampling=Sampling(temperature=1.1), seed=n) for n in numbers]
        handles = [engine.open(request)[0] for request in requests]
        ids: list[list[int]] = [[] for _ in numbers]
        for turn, count in enumerate((7, 1, 12)):
            for known, (new, _) in zip(ids, sample(engine, handles, count), strict=True):
                known += new
            for number, handle in zip(numbers, handles, strict=True):
                engine.extend(handle, random_ids(5 * turn, number))
        for handle in handles:
            engine.close(handle)
        return ids

    together = rows(make_engine(), numbers)
    alone = [rows(make_engine(), [number])[0] for number in numbers]
    assert together == alone == rows(HuggingFaceEngine(model, None), numbers)


def test_samples_of_a_prompt_differ_and_keep_their_numbers(engine):
    request = RowRequest(random_ids(30, 1), sampling=Sampling(temperature=1.2), seed=3)
    samples = [ids for ids, _ in sample(engine, engine.open(request, n=4), 12)]
    assert len(set(map(tuple, samples))) == 4
    third = replace(request, first_sample=2)
    assert sample(engine, engine.open(third), 12)[0][0] == samples[2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_trajectories_with_code_are_those_of_the_hugging_face_engine(engine, model, sandboxes, temperature):
    prompts = [prompt_text(problem.question) for problem in load_held_out()[::30]]
    options = {"sampling": Sampling(temperature=temperature), "limits": Limits(max_new_tokens=200), "pool": sandboxes}
    with Generator(engine, **options) as generator:
        ours = generator.generate(prompts)
    with Generator(HuggingFaceEngine(model, engine.tokenizer), **options) as generator:
        theirs = generator.generate(prompts)
    assert sum(len(row.calls) for row in ours) >= len(prompts)
    assert sum(sum(segment.origin == "injected" for segment in row.segments) for row in ours) >= len(prompts)
    for row, other in zip(ours, theirs, strict=True):
        assert row.ids == other.ids
        assert row.mask == other.mask
        assert row.stop == other.stop
        assert row.discarded == 0
        assert row.logprobs == pytest.approx(other.logprobs, abs=TOLERANCE)
        forced = teacher_forced(model, row.ids).log_softmax(-1)
        for position, (token_id, mask, logprob) in enumerate(zip(row.ids, row.mask, row.logprobs, strict=True)):
            expected = forced[position - 1, token_id].item() if mask else 0.0
            assert logprob == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("at_vllm", [False, True])
def test_stop_strings_inside_tokens_and_across_them_end_rows(make_engine, mode, at_vllm):
    if at_vllm and mode == "streaming":
        pytest.skip("sessions take no stop strings")
    engine = make_engine(stop_strings=at_vllm)
    prompts = [f"Question: What is {number} plus 19?\nAnswer:" for number in range(3)]
    plain = Limits(max_new_tokens=60)
    with Generator(engine, sampling=GREEDY, limits=plain, markup=None) as generator:
        whole = generator.generate(prompts)
    for row in whole:
        (segment,) = row.segments
        text = segment.text
        stop_string = text[7:10]  # wherever tokens may begin and end
        with Generator(engine, sampling=GREEDY, limits=Limits(60, stop_strings=(stop_string,)), markup=None) as once:
            (cut,) = once.generate([row.prompt])
        assert cut.stop.kind is StopKind.STOP_STRING
        assert cut.stop.detail == stop_string
        length = len(cut.segments[0].ids)
        assert cut.segments[0].ids == segment.ids[:length]
        assert stop_string in cut.segments[0].text
        before = decode(Vocabulary.of(engine.tokenizer), cut.segments[0].ids[:-1])
        assert stop_string not in before


def test_a_stop_string_of_vllm_that_ends_nothing_lets_the_row_go_on(make_engine, mode):
    """An end tag outside any block is text, though vLLM ends the request at it."""
    text_of = "Question: What is 4 plus 19?\nAnswer:"
    engine = make_engine()
    with Generator(engine, sampling=GREEDY, limits=Limits(30), markup=None) as generator:
        (plain,) = generator.generate([text_of])
    prompt_ids = plain.prompt_ids
    stop_string = plain.segments[0].text[3:5]
    stopping = make_engine(stop_strings=mode != "streaming")
    (handle,) = stopping.open(RowRequest(prompt_ids, sampling=GREEDY, stop_strings=(stop_string,)))
    ids: list[int] = []
    while len(ids) < len(plain.segments[0].ids):
        for update in stopping.step():
            assert update.handle == handle
            assert not update.exhausted
            ids += update.ids
    assert tuple(ids[: len(plain.segments[0].ids)]) == plain.segments[0].ids


def test_end_of_sequence_ends_rows_unless_ignored(engine):
    prompt = "Question: What is 4 plus 19?\nAnswer:"
    with Generator(engine, sampling=GREEDY, limits=Limits(200), markup=None) as generator:
        (row,) = generator.generate([prompt])
    assert row.stop.kind is StopKind.END_OF_SEQUENCE
    assert row.ids[-1] in engine.eos_ids
    with Generator(engine, sampling=GREEDY, limits=Limits(200, ignore_eos=True), markup=None) as generator:
        (longer,) = generator.generate([prompt])
    assert longer.stop.kind is StopKind.LENGTH
    assert longer.ids[: len(row.ids)] == row.ids
    assert longer.total_length == len(row.prompt_ids) + 200


def test_a_row_ends_where_its_context_is_full(make_engine):
    engine = make_engine(context_length=64)
    (row,) = play(engine, [Script(random_ids(60, 1), tail=100)])
    assert row.exhausted
    assert len(row.ids) == 64
    full = play(engine, [Script(random_ids(64, 1), tail=100)])[0]
    assert full.exhausted
    assert len(full.ids) == 64
