"""How rows share places, prefill and steps."""

import threading

import pytest
import torch
from small_models import (
    CONTEXT,
    GREEDY,
    RAGGED,
    Event,
    Played,
    Script,
    check_exact,
    fresh_model,
    play,
    random_ids,
    small_model,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from midstream.engines import model_runners, packing
from midstream.engines.base import RowRequest, sample_seed
from midstream.engines.grouping import LEAST_FRESH
from midstream.engines.huggingface import HuggingFaceEngine
from midstream.engines.packing import packed
from midstream.errors import ConfigurationError
from midstream.types import Sampling

PROMPT = random_ids(40, 1)
SAMPLED = Sampling(temperature=1.2)
WITH_GAPS = [
    Script(random_ids(10 + seed, seed), (Event(2, random_ids(4, seed), wait=40),) if seed % 3 else (), tail=60)
    for seed in range(8)
]
"""Rows 0, 3 and 6 go on while the five between them wait."""


class Batches:
    """The shapes ``(rows, ids)`` of all that goes through a model, idle rows and padding included."""

    def __init__(self, model):
        self.shapes = []
        self._hook = model.get_input_embeddings().register_forward_pre_hook(
            lambda _, arguments: self.shapes.append(tuple(arguments[0].shape))
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._hook.remove()


def request(ids=PROMPT, **options):
    return RowRequest(tuple(ids), **({"sampling": GREEDY} | options))


def gather(engine, handles, count):
    """Step until each handle has ``count`` ids: ``{handle: (ids, logprobs)}``. The rows are held then."""
    found = {handle: ([], []) for handle in handles}
    while any(len(ids) < count for ids, _ in found.values()):
        for update in engine.step():
            ids, logprobs = found[update.handle]
            ids += update.ids
            logprobs += update.logprobs
            if len(ids) == count:
                engine.rollback(update.handle, 0)
    return found


def test_samples_of_a_prompt_share_its_prefill():
    model = small_model("llama")
    engine = HuggingFaceEngine(model, None, max_batch_size=8)
    with Batches(model) as batches:
        handles = engine.open(request(sampling=SAMPLED, seed=5), n=8)
        found = gather(engine, handles, 1)
    assert engine.statistics.computed == len(PROMPT) + 7
    assert engine.statistics.shared == 7 * (len(PROMPT) - 1)
    assert sum(rows * ids for rows, ids in batches.shapes) == len(PROMPT) + 7
    for sample, handle in enumerate(handles):
        alone = HuggingFaceEngine(model, None)
        (again,) = alone.open(request(sampling=SAMPLED, seed=5, first_sample=sample))
        assert gather(alone, [again], 1)[again][0] == found[handle][0]
    assert len({tuple(ids) for ids, _ in found.values()}) > 1


def test_samples_that_wait_for_a_place_take_over_the_prompt_of_those_that_left():
    engine = HuggingFaceEngine(small_model("llama"), None, max_batch_size=2, max_cached_rows=2, evict_waiting=False)
    handles = engine.open(request(sampling=SAMPLED), n=6)
    for first in range(0, 6, 2):
        gather(engine, handles[first : first + 2], 3)
        for handle in handles[first : first + 2]:
            engine.close(handle)
    # The prompt once; its last id again for five rows; two more ids put back in for each row.
    assert engine.statistics.computed == len(PROMPT) + 5 + 6 * 2


def test_prompts_that_begin_alike_compute_the_common_part_once():
    engine = HuggingFaceEngine(small_model("llama"), None)
    first, second = PROMPT + random_ids(10, 2), PROMPT + random_ids(10, 3)
    handles = engine.open(request(first)) + engine.open(request(second))
    gather(engine, handles, 1)
    assert engine.statistics.computed == len(PROMPT) + 10 + 10


def test_the_best_that_is_computed_is_copied_not_what_a_held_row_may_never_compute():
    engine = HuggingFaceEngine(small_model("llama"), None, prefill_chunk=16)
    whole = random_ids(60, 1)
    (held,) = engine.open(request(whole))
    engine.step()
    engine.rollback(held, 0)
    (other,) = engine.open(request((*whole[:50], 1, 2)))
    gather(engine, [other], 1)
    before = engine.statistics.computed
    gather(engine, engine.open(request(whole)), 1)
    assert engine.statistics.computed == before + 10


def test_a_resumed_row_finds_what_its_closed_row_left():
    engine = HuggingFaceEngine(small_model("llama"), None)
    (handle,) = engine.open(request())
    ids, _ = gather(engine, [handle], 5)[handle]
    engine.close(handle)
    before = engine.statistics.computed
    (handle,) = engine.open(request((*PROMPT, *ids)))
    more, _ = gather(engine, [handle], 1)[handle]
    assert engine.statistics.computed == before + 1
    assert more[0] == play(HuggingFaceEngine(small_model("llama"), None), [Script(PROMPT, tail=6)])[0].ids[-1]


def test_a_result_is_computed_as_one_chunk_in_the_pass_in_which_the_other_rows_decode():
    model = small_model("llama")
    engine = HuggingFaceEngine(model, None)
    handles = [engine.open(request(random_ids(30, seed)))[0] for seed in range(4)]
    for _ in range(3):
        engine.step()
    engine.rollback(handles[1], 0)
    assert {update.handle for update in engine.step()} == set(handles) - {handles[1]}
    engine.extend(handles[1], random_ids(9, 9))
    before = engine.statistics.computed
    with Batches(model) as batches:
        assert {update.handle for update in engine.step()} == set(handles)
    assert engine.statistics.computed == before + 1 + 9 + 3
    assert batches.shapes == [(1, 10 + 3)]  # one pass for both: the chunk, and the others on both sides of it


@pytest.mark.parametrize("name", RAGGED)
def test_decoding_and_results_share_a_pass_where_attention_can_be_computed_apart(name):
    model = fresh_model(name)
    engine = HuggingFaceEngine(model, None)
    handles = [engine.open(request(random_ids(20, seed)))[0] for seed in range(3)]
    gather(engine, handles, 2)
    engine.extend(handles[0], random_ids(5, 4))
    engine.extend(handles[1], ())
    engine.extend(handles[2], random_ids(9, 5))
    before = engine.statistics.forwards
    engine.step()
    assert engine.statistics.forwards - before == (1 if model.config._attn_implementation == "sdpa" else 2)
    assert model.config._attn_implementation in ("sdpa", "eager")


def test_another_thread_may_use_the_model_while_a_pass_is_packed():
    model = small_model("llama")
    ids = torch.tensor([random_ids(12, 3)])
    found = []
    plain = model(input_ids=ids).logits
    with packed(model.config, [None]):
        thread = threading.Thread(target=lambda: found.append(model(input_ids=ids).logits))
        thread.start()
        thread.join()
    assert torch.equal(found[0], plain)
    assert model.config._attn_implementation == "sdpa"


def test_a_long_prompt_is_computed_in_chunks_while_others_decode():
    model = small_model("llama")
    engine = HuggingFaceEngine(model, None, prefill_chunk=16)
    (short,) = engine.open(request(random_ids(10, 5)))
    engine.step()
    (long,) = engine.open(request(random_ids(60, 6)))
    with Batches(model) as batches:
        steps = [[update.handle for update in engine.step()] for _ in range(4)]
    assert steps == [[short], [short], [short], [long, short]]
    assert batches.shapes == [(1, 16 + 1), (1, 16 + 1), (1, 16 + 1), (1, 12 + 1)]


def test_a_long_beginning_attends_to_itself_alone_in_a_pass_of_its_own():
    model = small_model("llama")
    engine = HuggingFaceEngine(model, None)
    engine.open(request(random_ids(10, 5)))
    engine.step()
    for seed in (6, 7):
        engine.open(request(random_ids(LEAST_FRESH, seed)))
    engine.open(request(random_ids(LEAST_FRESH + 1, 8)))
    with Batches(model) as batches:
        engine.step()
    assert sorted(batches.shapes) == [(1, 1), (1, LEAST_FRESH + 1), (2, LEAST_FRESH)]


def test_filling_the_batch_comes_before_decoding_the_few_that_are_ready():
    engine = HuggingFaceEngine(small_model("llama"), None, prefill_chunk=40)
    handles = [engine.open(request(random_ids(40, seed)))[0] for seed in range(5)]
    steps = [{update.handle for update in engine.step()} for _ in range(5)]
    # In turn, until as many rows decode as still wait; then those that are ready go on.
    assert steps[0] == {handles[0]}
    assert steps[1] == {handles[1]}
    assert steps[2] == {handles[2], handles[0], handles[1]}


def test_more_rows_than_places_wait_their_turn_and_places_are_used_again():
    model = small_model("llama")
    engine = HuggingFaceEngine(model, None, max_batch_size=2, max_cached_rows=3)
    with Batches(model) as batches:
        rows = play(engine, [Script(random_ids(5 + seed, seed), tail=4) for seed in range(9)])
    assert all(check_exact(model, row) == 4 for row in rows)
    assert max(rows for rows, _ in batches.shapes) <= 3


def test_rows_that_wait_for_results_leave_their_turn_to_others():
    engine = HuggingFaceEngine(small_model("llama"), None, max_batch_size=1, max_cached_rows=2)
    first, second = (engine.open(request(random_ids(8, seed)))[0] for seed in (1, 2))
    assert [update.handle for update in engine.step()] == [first]
    engine.rollback(first, 0)
    assert [update.handle for update in engine.step()] == [second]
    engine.extend(first, random_ids(3, 3))
    assert [update.handle for update in engine.step()] == [first]


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "qwen3-next", "mamba"])
def test_rows_that_wait_long_give_their_places_to_rows_that_can_go_on_and_are_exact_all_the_same(name):
    model = small_model(name)
    engine = HuggingFaceEngine(model, None, max_batch_size=2, max_cached_rows=3)
    scripts = [
        Script(
            random_ids(20 + seed, seed),
            (Event(2, random_ids(4, seed), wait=5 * seed), Event(1, random_ids(3, seed), rollback=1, wait=4)),
            sampling=SAMPLED,
            seed=seed,
        )
        for seed in range(8)
    ]
    rows = play(engine, scripts)
    assert all(check_exact(model, row) >= 6 for row in rows)
    assert engine.statistics.evicted > 3
    alone = [play(HuggingFaceEngine(model, None), [script])[0] for script in scripts]
    assert [row.ids for row in rows] == [row.ids for row in alone]


def test_the_row_that_has_waited_longest_is_the_one_that_gives_its_place():
    engine = HuggingFaceEngine(small_model("llama"), None, max_batch_size=2, max_cached_rows=2)
    first, second = (engine.open(request(random_ids(30, seed)))[0] for seed in (1, 2))
    gather(engine, [first, second], 2)
    engine.rollback(second, 0)
    engine.rollback(first, 0)
    (third,) = engine.open(request(random_ids(30, 3)))
    assert {update.handle for update in engine.step()} == {third}
    assert engine.statistics.evicted == 1
    engine.rollback(third, 0)
    computed = engine.statistics.computed
    engine.extend(first, random_ids(2, 4))  # it kept what it has
    gather(engine, [first], 1)
    assert engine.statistics.computed == computed + 1 + 2
    engine.close(first)
    engine.close(third)
    computed = engine.statistics.computed
    engine.extend(second, random_ids(2, 5))
    gather(engine, [second], 1)
    assert engine.statistics.computed == computed + 30 + 2 + 2


def test_a_row_whose_place_nobody_has_taken_since_is_not_computed_again():
    engine = HuggingFaceEngine(small_model("llama"), None, max_batch_size=2, max_cached_rows=2)
    first, second = (engine.open(request(random_ids(30, seed)))[0] for seed in (1, 2))
    gather(engine, [first, second], 2)
    engine.rollback(first, 0)
    engine.rollback(second, 0)
    places = engine._places
    assert places.evict()
    computed = engine.statistics.computed
    engine.extend(first, random_ids(2, 4))
    gather(engine, [first], 1)
    assert engine.statistics.computed == computed + 1 + 2
    assert engine.statistics.evicted == 1


def test_no_place_is_taken_while_the_batch_is_full_or_where_rows_are_to_keep_theirs():
    for options, expected in (({}, 0), ({"evict_waiting": False, "max_batch_size": 2}, 0), ({"max_batch_size": 2}, 1)):
        engine = HuggingFaceEngine(small_model("llama"), None, **{"max_batch_size": 1, "max_cached_rows": 2} | options)
        first, second, third = (engine.open(request(random_ids(8, seed)))[0] for seed in (1, 2, 3))
        found = set()
        for _ in range(3):
            for update in engine.step():
                found.add(update.handle)
                if update.handle == first:
                    engine.rollback(first, 0)
        assert engine.statistics.evicted == expected, options
        assert (third in found) == bool(expected)
        assert second in found
    with pytest.raises(ConfigurationError, match="evict_waiting=1"):
        HuggingFaceEngine(small_model("llama"), None, evict_waiting=1)


def test_the_memory_of_the_cache_is_told_and_given_back():
    engine = HuggingFaceEngine(small_model("llama"), None, max_batch_size=2)
    assert engine.statistics.cache_bytes == 0
    gather(engine, engine.open(request(random_ids(70)), n=2), 1)
    # 2 layers, keys and values, 2 places or more, 2 heads, 128 positions, 8 numbers, 4 bytes
    assert engine.statistics.cache_bytes % (2 * 2 * 2 * 128 * 8 * 4) == 0
    assert engine.statistics.cache_bytes >= 2 * 2 * 2 * 2 * 128 * 8 * 4
    engine.shutdown()
    assert engine.statistics.cache_bytes == 0


def test_rows_are_moved_together_when_gaps_between_them_last():
    model = small_model("llama-eager")  # whose attention takes all rows of a pass together
    engine = HuggingFaceEngine(model, None, max_batch_size=8, max_cached_rows=8)
    with Batches(model) as batches:
        rows = play(engine, WITH_GAPS)
    assert all(check_exact(model, row) >= 60 for row in rows)
    # Three rows decode at places 0, 3 and 6 while five wait: seven rows wide at first, three before long.
    widths = [rows for rows, ids in batches.shapes if ids == 1]
    assert widths.count(3) > 20


def test_gaps_cost_nothing_where_attention_can_be_computed_apart():
    model = small_model("llama")
    engine = HuggingFaceEngine(model, None, max_batch_size=8, max_cached_rows=8)
    with Batches(model) as batches:
        rows = play(engine, WITH_GAPS)
    assert all(check_exact(model, row) >= 60 for row in rows)
    # Each id goes through the model once, but for the last of each row, which nothing follows.
    assert sum(rows * ids for rows, ids in batches.shapes) == sum(len(row.ids) - 1 for row in rows)


def test_a_short_row_reads_no_more_than_it_holds_beside_a_long_one(monkeypatch):
    monkeypatch.setattr(model_runners, "_GROUP_BYTES", 0)
    read = []

    def watched(module, query, key, value, mask, **options):
        read.append((query.shape[0], key.shape[2]))
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    model = small_model("llama")
    scripts = [Script(random_ids(length, seed), tail=12) for seed, length in enumerate((20, 20, 90))]
    engine = HuggingFaceEngine(model, None)
    monkeypatch.setattr(packing, "sdpa_attention_forward", watched)
    rows = play(engine, scripts)
    assert all(check_exact(model, row) == 12 for row in rows)
    assert (2, 24) in read
    assert (1, 96) in read
    assert (3, 96) not in read


def test_a_fork_goes_on_from_the_same_ids_with_noise_of_its_own_and_computes_nothing_again():
    model = small_model("llama")
    engine = HuggingFaceEngine(model, None)
    (handle,) = engine.open(request(sampling=SAMPLED, seed=3))
    ids, _ = gather(engine, [handle], 4)[handle]
    forks = [engine.fork(handle, seed=sample_seed(77, sample)) for sample in range(3)]
    assert engine.step() == []
    before = engine.statistics.computed
    for each in (handle, *forks):
        engine.extend(each, ())
    found = gather(engine, [handle, *forks], 12)
    assert engine.statistics.computed == before + 4 * 12
    assert len({tuple(ids) for ids, _ in found.values()}) == 4
    script = Script((*PROMPT, *ids), sampling=SAMPLED, seed=77)  # whose noise is that of the first fork
    row = Played(script, [*script.ids, *found[forks[0]][0]], [None] * len(script.ids) + found[forks[0]][1])
    assert check_exact(model, row) == 12
    whole = play(HuggingFaceEngine(model, None), [Script(PROMPT, tail=16, sampling=SAMPLED, seed=3)])[0]
    assert whole.ids[len(PROMPT) :] == ids + found[handle][0]


@pytest.mark.parametrize("name", ["llama", "qwen3-next", "mamba"])
def test_a_fork_that_finds_no_place_is_computed_anew(name):
    model = small_model(name)
    engine = HuggingFaceEngine(model, None, max_batch_size=1, max_cached_rows=1)
    (handle,) = engine.open(request())
    ids, _ = gather(engine, [handle], 4)[handle]
    fork = engine.fork(handle, seed=0)
    engine.close(handle)
    engine.extend(fork, random_ids(3, 1))
    found, logprobs = gather(engine, [fork], 5)[fork]
    start = [*PROMPT, *ids, *random_ids(3, 1)]
    assert check_exact(model, Played(Script(PROMPT), start + found, [None] * len(start) + logprobs)) == 5


def test_open_rows_go_on_under_new_weights_with_the_cache_computed_anew():
    model, other = fresh_model("llama"), fresh_model("llama", seed=1)
    engine = HuggingFaceEngine(model, None, weight_version=3)
    handles = engine.open(request(sampling=SAMPLED, seed=1), n=3)
    before = gather(engine, handles, 5)
    (queued,) = engine.open(request(random_ids(9, 9)))
    engine.pause()
    assert engine.step() == []
    model.load_state_dict(other.state_dict())
    engine.set_weights(4, keep_cache=False)
    assert engine.step() == []
    engine.resume()
    assert engine.weight_version == 4
    for handle in handles:
        engine.extend(handle, ())
    after = gather(engine, [*handles, queued], 6)
    for handle in handles:
        start = [*PROMPT, *before[handle][0]]
        expected = other(torch.tensor([start + after[handle][0]])).logits[0].log_softmax(-1)
        for offset, (token_id, logprob) in enumerate(zip(*after[handle], strict=True)):
            assert logprob == pytest.approx(expected[len(start) + offset - 1, token_id].item(), abs=1e-4)


def test_updates_carry_the_version_of_the_weights_that_sampled_them():
    engine = HuggingFaceEngine(fresh_model("llama"), None)
    engine.open(request())
    versions = []
    for version in (0, 0, 7, 7, 8):
        if version != engine.weight_version:
            engine.set_weights(version, keep_cache=True)
        versions += [update.weight_version for update in engine.step()]
    assert versions == [0, 0, 7, 7, 8]


def test_a_kept_cache_is_not_computed_anew_and_serves_no_new_row():
    model = fresh_model("llama")
    engine = HuggingFaceEngine(model, None)
    (handle,) = engine.open(request())
    gather(engine, [handle], 2)
    model.load_state_dict(fresh_model("llama", seed=1).state_dict())
    engine.set_weights(1, keep_cache=True)
    engine.extend(handle, ())
    before = engine.statistics.computed
    gather(engine, [handle], 1)
    assert engine.statistics.computed == before + 1
    engine.fork(handle, seed=0)
    engine.close(handle)
    (fresh,) = engine.open(request())
    ids, logprobs = gather(engine, [fresh], 6)[fresh]
    row = Played(Script(PROMPT), [*PROMPT, *ids], [None] * len(PROMPT) + logprobs)
    assert check_exact(model, row) == 6


@pytest.mark.parametrize("name", ["llama", "qwen3-next", "mamba"])
def test_a_row_whose_logits_break_ends_alone_and_its_place_is_clean_again(name):
    model = fresh_model(name)
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        model.get_output_embeddings().weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    engine = HuggingFaceEngine(model, None, max_batch_size=2, max_cached_rows=2)
    with torch.no_grad():
        model.get_input_embeddings().weight[63] = torch.nan
        model.get_output_embeddings().weight[63] = 0  # far from the largest logit: no row samples it
    clean = [tuple(token_id % 63 for token_id in random_ids(10, seed)) for seed in range(4)]
    clean[2:] = [ids[:3] for ids in clean[2:]]  # shorter: what the broken row left lies behind them, masked
    poisoned = Script((63, *clean[0]), tail=5)
    rows = play(engine, [Script(clean[1], tail=3), poisoned, Script(clean[2], tail=3), Script(clean[3], tail=3)])
    assert rows[1].error is not None
    assert "not finite" in rows[1].error
    assert rows[1].ids == list(poisoned.ids)
    for row in (rows[0], rows[2], rows[3]):
        assert row.error is None
        assert check_exact(model, row) == 3


def test_the_context_ends_a_row_at_its_last_id():
    model = small_model("gpt2")
    engine = HuggingFaceEngine(model, None)
    scripts = [Script(random_ids(CONTEXT - 5, 1), tail=50), Script(random_ids(CONTEXT - 1, 2), tail=50)]
    rows = play(engine, scripts)
    assert [len(row.ids) for row in rows] == [CONTEXT, CONTEXT]
    assert all(row.exhausted for row in rows)
    assert [check_exact(model, row) for row in rows] == [5, 1]


def test_a_row_is_exhausted_at_its_own_limit_and_again_when_it_is_filled_up():
    engine = HuggingFaceEngine(small_model("llama"), None)
    (handle,) = engine.open(request(max_total_tokens=len(PROMPT) + 2))
    assert [update.exhausted for _ in range(2) for update in engine.step()] == [False, True]
    assert engine.step() == []
    engine.rollback(handle, 1)
    engine.extend(handle, (5,))
    (update,) = engine.step()
    assert (update.ids, update.logprobs, update.exhausted) == ((), (), True)


def test_a_prompt_that_fills_its_limit_is_exhausted_at_once():
    engine = HuggingFaceEngine(small_model("llama"), None)
    (handle,) = engine.open(request(max_total_tokens=len(PROMPT)))
    (update,) = engine.step()
    assert (update.handle, update.ids, update.exhausted) == (handle, (), True)
