import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from midstream.engines.sampling import draw, filtered
from midstream.types import Sampling

SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.5]),
    top_k=st.sampled_from([0, 1, 2, 5, 40, 1000]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.1, 1e-6]),
    min_p=st.sampled_from([0.0, 0.01, 0.2, 0.9]),
)


def warped(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """What Hugging Face's warpers leave of one row, in the order in which ``generate`` applies them."""
    warpers = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    scores = logits[None]
    for warper in warpers:
        scores = warper(None, scores)
    return scores[0]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(SAMPLINGS, min_size=1, max_size=6), st.integers(0, 10**6))
def test_filters_are_those_of_the_warpers_whatever_the_other_rows_ask_for(samplings, seed):
    logits = torch.randn(len(samplings), 50, generator=torch.Generator().manual_seed(seed)) * 3
    found = filtered(logits, samplings)
    for row, sampling in enumerate(samplings):
        assert torch.equal(found[row], warped(logits[row], sampling))


def test_ties_at_the_threshold_of_top_k_stay_as_with_the_warper():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    sampling = Sampling(top_k=2)
    assert filtered(logits, [sampling]).isfinite().tolist() == [[False, True, True, True, False]]
    assert torch.equal(filtered(logits, [sampling])[0], warped(logits[0], sampling))


def test_greedy_rows_take_the_largest_logit_beside_rows_that_sample():
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    ids, _ = draw(logits, [Sampling(temperature=0), Sampling(), Sampling(temperature=0)], [0.5, 1e-9, 0.5])
    assert ids == [logits[0].argmax().item(), 0, logits[2].argmax().item()]


@pytest.mark.parametrize("temperature", [1e-12, 1e-30, 1e-37, 1e-40, 1e-45, 1e-50, 5e-324])
@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_the_limit_of_a_small_temperature_is_the_largest_logit(temperature, filters):
    logits = torch.randn(4, 20, generator=torch.Generator().manual_seed(1)) * 30
    logits[2, 3] = -torch.inf
    cold = Sampling(temperature=temperature, **filters)
    found = filtered(logits, [cold, Sampling(0.7), cold, cold])
    assert not found.isnan().any()
    assert torch.equal(found[1], warped(logits[1], Sampling(0.7)))
    for noise in (0.0, 0.5, 1 - 2**-53):
        ids, logprobs = draw(logits, [cold, Sampling(0.7), cold, cold], [noise] * 4)
        assert [ids[row] for row in (0, 2, 3)] == [logits[row].argmax().item() for row in (0, 2, 3)]
        assert logprobs[0] == (logits[0].max() - logits[0].logsumexp(dim=-1)).item()


def test_equal_logits_share_a_small_temperature():
    ids, _ = draw(torch.tensor([[1.0, 7.0, 7.0, 2.0]] * 2), [Sampling(1e-50)] * 2, [0.25, 0.75])
    assert ids == [1, 2]


def test_the_draw_inverts_the_cumulative_distribution_in_vocabulary_order():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().repeat(6, 1)
    ids, _ = draw(logits, [Sampling()] * 6, [0.05, 0.15, 0.25, 0.35, 0.65, 0.999999])
    assert ids == [0, 1, 1, 2, 3, 3]
    # The stretch of an id begins with its lower end: noise on a border belongs to the id above it.
    assert draw(torch.zeros(1, 2), [Sampling()], [0.5])[0] == [1]


@given(st.floats(2.0**-54, 1 - 2.0**-53), st.integers(0, 100))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_filtered_id_is_never_drawn(noise, seed):
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(seed)) * 4
    sampling = Sampling(top_k=3)
    ids, _ = draw(logits, [sampling], [noise])
    assert filtered(logits, [sampling])[0, ids[0]].isfinite()


@pytest.mark.parametrize("noise", [2.0**-54, 1 - 2.0**-53])
def test_the_ends_of_the_noise_reach_the_first_and_the_last_id_that_is_left(noise):
    logits = torch.full((1, 9), -torch.inf)
    logits[0, 3], logits[0, 5] = 0.0, 0.0
    assert draw(logits, [Sampling()], [noise])[0] == [3 if noise < 0.5 else 5]


def test_draws_follow_the_distribution():
    logits = torch.randn(8, generator=torch.Generator().manual_seed(3))
    ids, _ = draw(logits.repeat(4000, 1), [Sampling()] * 4000, [(i + 0.5) / 4000 for i in range(4000)])
    counts = torch.bincount(torch.tensor(ids), minlength=8) / 4000
    assert torch.allclose(counts, logits.softmax(-1), atol=1e-3)


def test_logprobs_are_raw_whatever_temperature_and_filters():
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(5))
    samplings = [Sampling(temperature=0), Sampling(temperature=0.1), Sampling(top_k=2), Sampling(top_p=0.3, min_p=0.1)]
    ids, logprobs = draw(logits, samplings, [0.3] * 4)
    expected = logits.log_softmax(-1)
    assert logprobs == pytest.approx([expected[row, token_id].item() for row, token_id in enumerate(ids)], abs=1e-6)


def test_logits_in_bf16_give_float32_logprobs():
    logits = (torch.randn(2, 30, generator=torch.Generator().manual_seed(5)) * 5).bfloat16()
    ids, logprobs = draw(logits, [Sampling(temperature=0)] * 2, [0.5] * 2)
    expected = logits.float().log_softmax(-1)
    assert logprobs == pytest.approx([expected[row, token_id].item() for row, token_id in enumerate(ids)], abs=1e-6)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(), Sampling(top_k=2, top_p=0.5, min_p=0.1)])
def test_broken_logits_show_in_the_logprob_of_their_row_alone(poison, sampling):
    logits = torch.randn(3, 12, generator=torch.Generator().manual_seed(2))
    logits[1, 4] = poison
    ids, logprobs = draw(logits, [sampling] * 3, [0.4, 0.4, 0.4])
    assert [math.isfinite(value) for value in logprobs] == [True, False, True]
    assert all(0 <= token_id < 12 for token_id in ids)
