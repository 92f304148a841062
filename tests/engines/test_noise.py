import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from midstream.engines.noise import _mix, uniform


def test_mix_gives_the_published_outputs_of_splitmix64():
    # The reference implementation (Vigna, splitmix64.c), seeded with 1234567.
    state, outputs = 1234567, []
    for _ in range(5):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        outputs.append(_mix(state))
    assert outputs == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**31))
def test_noise_lies_strictly_between_0_and_1_and_is_a_function(seed, position):
    assert 0 < uniform(seed, position) < 1
    assert uniform(seed, position) == uniform(seed, position)


def test_noise_is_even_over_positions_and_over_seeds():
    for values in ([uniform(7, position) for position in range(4000)], [uniform(seed, 7) for seed in range(4000)]):
        assert statistics.fmean(values) == pytest.approx(0.5, abs=0.02)
        assert statistics.pvariance(values) == pytest.approx(1 / 12, abs=0.005)
        tenths = [sum(tenth <= 10 * value < tenth + 1 for value in values) for tenth in range(10)]
        assert min(tenths) > 320
        assert max(tenths) < 480


def test_neighbouring_seeds_share_no_outputs_at_shifted_positions():
    first = {uniform(1, position) for position in range(500)}
    others = {uniform(seed, position) for seed in (2, 3, 1 + 0x9E3779B97F4A7C15) for position in range(500)}
    assert not first & others
