"""Which chunks of a pass go together: what is put into one batch, and what is read in vain."""

import hypothesis.strategies as st
from hypothesis import given

from midstream.engines.grouping import LEAST_FRESH, Chunk, ReadingCost, padded_groups, runs


def decoding(*ends, places=None):
    return [Chunk(place, end - 1, [1]) for place, end in zip(places or range(len(ends)), ends, strict=True)]


def test_neighbours_of_one_width_are_one_run_and_gaps_end_it():
    assert runs(decoding(100, 100, 100), ReadingCost(0)) == [[0, 1, 2]]
    assert runs(decoding(100, 100, 100, places=(0, 1, 3)), ReadingCost(0)) == [[0, 1], [2]]
    assert runs(decoding(100, 100, 100, places=(2, 0, 1)), ReadingCost(0)) == [[1, 2, 0]]


def test_rows_of_other_widths_share_a_run_where_a_run_costs_more_than_what_is_read_in_vain():
    chunks = decoding(100, 100, 140)
    assert runs(chunks, ReadingCost(79)) == [[0, 1], [2]]  # two rows would read 40 more each
    assert runs(chunks, ReadingCost(80)) == [[0, 1, 2]]
    assert runs(decoding(140, 100, 100), ReadingCost(39)) == [[0], [1, 2]]
    assert runs(decoding(140, 100, 100), ReadingCost(40)) == [[0, 1, 2]]


def test_threads_read_heads_side_by_side_so_that_small_runs_are_worth_less():
    chunks = decoding(100, 100, 400)
    assert runs(chunks, ReadingCost(100, heads=2, threads=1)) == [[0, 1], [2]]
    assert runs(chunks, ReadingCost(100, heads=2, threads=64)) == [[0, 1, 2]]  # all of it takes as long as one head


def test_chunks_of_other_lengths_and_long_beginnings_are_apart():
    ids = list(range(LEAST_FRESH))
    chunks = [Chunk(0, 0, ids), Chunk(1, 40, ids[:5]), Chunk(2, 40, ids[:5]), Chunk(3, 40, [1]), Chunk(5, 0, ids)]
    assert sorted(runs(chunks, ReadingCost(1000))) == [[0, 4], [1, 2], [3]]


def test_padding_is_bounded():
    assert padded_groups(decoding(10, 200, 30)) == [[0, 1, 2]]
    chunks = [Chunk(0, 5, [1] * 10), Chunk(1, 5, [1] * 11), Chunk(2, 5, [1])]
    assert padded_groups(chunks) == [[2], [0, 1]]


@given(
    st.lists(st.tuples(st.integers(0, 200), st.integers(1, 2 * LEAST_FRESH)), min_size=1, max_size=12),
    st.randoms(use_true_random=False),
    st.floats(0, 1000),
    st.integers(1, 8),
)
def test_each_chunk_is_in_one_run_of_equal_lengths_that_nothing_interrupts(shapes, order, group, threads):
    places = order.sample(range(20), len(shapes))
    chunks = [Chunk(place, start, [1] * ids) for place, (start, ids) in zip(places, shapes, strict=True)]
    found = runs(chunks, ReadingCost(group, heads=4, threads=threads))
    assert sorted(index for run in found for index in run) == list(range(len(chunks)))
    for run in found:
        first = chunks[run[0]]
        assert {len(chunks[index].ids) for index in run} == {len(first.ids)}
        if first.start or len(first.ids) < LEAST_FRESH:
            assert [chunks[index].place for index in run] == list(range(first.place, first.place + len(run)))
