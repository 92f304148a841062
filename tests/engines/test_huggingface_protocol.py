"""What the engine says of itself, what it refuses, and how it is made from a folder."""

import gc
import logging
import weakref

import pytest
import torch
import transformers
from small_models import CONFIGS, CONTEXT, GREEDY, VOCABULARY, fresh_model, random_ids, small_model

from midstream.engines.base import Engine, RowRequest
from midstream.engines.huggingface import HuggingFaceEngine
from midstream.errors import CapabilityError, ConfigurationError, EngineError, PromptError, ProtocolError
from midstream.types import Media, Sampling

PROMPT = random_ids(12)


@pytest.fixture
def engine():
    return HuggingFaceEngine(small_model("llama"), "a tokenizer")


def test_it_is_an_engine_and_says_what_it_can(engine):
    assert isinstance(engine, Engine)
    assert engine.tokenizer == "a tokenizer"
    assert engine.capabilities.logprobs == "raw"
    assert engine.capabilities.fork
    assert engine.capabilities.set_weights
    assert engine.capabilities.keyed_noise
    assert not engine.capabilities.media
    assert engine.weight_version == 0


def test_the_context_is_the_lesser_of_the_models_and_the_callers(engine):
    assert engine.context_length == CONTEXT
    assert HuggingFaceEngine(small_model("llama"), None, context_length=50).context_length == 50
    assert HuggingFaceEngine(small_model("llama"), None, context_length=9999).context_length == CONTEXT
    assert HuggingFaceEngine(small_model("gpt2"), None).context_length == CONTEXT
    assert HuggingFaceEngine(small_model("mamba"), None).context_length is None


def test_longrope_bounds_the_context_where_its_positions_change(caplog):
    config = transformers.Phi3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=256,
        original_max_position_embeddings=64,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 64,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
        },
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with caplog.at_level(logging.WARNING, logger="midstream"):
        assert HuggingFaceEngine(model, None).context_length == 64
    assert "longrope" in caplog.text
    caplog.clear()
    assert HuggingFaceEngine(model, None, context_length=60).context_length == 60
    assert not caplog.records


def test_ends_of_sequence_come_from_the_first_that_names_any():
    class Tokenizer:
        eos_token_id = 9

    model = fresh_model("llama")
    assert HuggingFaceEngine(model, None).eos_ids == frozenset()
    assert HuggingFaceEngine(model, Tokenizer()).eos_ids == {9}
    model.config.eos_token_id = 7
    assert HuggingFaceEngine(model, Tokenizer()).eos_ids == {7}
    model.generation_config.eos_token_id = [0, 5]
    assert HuggingFaceEngine(model, Tokenizer()).eos_ids == {0, 5}
    assert HuggingFaceEngine(model, Tokenizer(), eos_ids=(1,)).eos_ids == {1}


def test_an_end_of_sequence_does_not_stop_a_row():
    model = small_model("llama")
    plain = HuggingFaceEngine(model, None)
    plain.open(RowRequest(PROMPT, sampling=GREEDY))
    ids = [update.ids[0] for _ in range(6) for update in plain.step()]
    engine = HuggingFaceEngine(model, None, eos_ids=ids)
    engine.open(RowRequest(PROMPT, sampling=GREEDY))
    updates = [update for _ in range(6) for update in engine.step()]
    assert [update.ids[0] for update in updates] == ids
    assert not any(update.exhausted or update.finished for update in updates)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_batch_size": 0}, "max_batch_size=0"),
        ({"max_batch_size": 2.5}, "max_batch_size=2.5"),
        ({"max_batch_size": 8, "max_cached_rows": 7}, "max_cached_rows=7"),
        ({"context_length": 1}, "context_length=1"),
        ({"prefill_chunk": 0}, "prefill_chunk=0"),
    ],
)
def test_impossible_options_are_refused_by_name_and_value(options, named):
    with pytest.raises(ConfigurationError, match=named):
        HuggingFaceEngine(small_model("llama"), None, **options)


def test_models_that_are_no_decoders_are_refused():
    small = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(ConfigurationError, match="encoder"):
        HuggingFaceEngine(t5, None)
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**small, intermediate_size=48, initializer_range=0.3))
    with pytest.raises(ConfigurationError, match="later ids"):
        HuggingFaceEngine(bert, None)
    headless = transformers.AutoModel.from_config(CONFIGS["llama"]())
    with pytest.raises(ConfigurationError, match="no logits"):
        HuggingFaceEngine(headless, None)
    with pytest.raises(ConfigurationError, match="no transformers model"):
        HuggingFaceEngine(torch.nn.Linear(2, 2), None)


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        ((), "at least one"),
        ((1, VOCABULARY), str(VOCABULARY)),
        ((3, -1), "-1"),
        ((1,) * (CONTEXT + 1), str(CONTEXT)),
    ],
)
def test_prompts_that_cannot_be_generated_from_are_refused(engine, ids, named):
    with pytest.raises(PromptError, match=named):
        engine.open(RowRequest(ids))
    assert engine.step() == []


def test_open_refuses_no_samples_and_media(engine):
    with pytest.raises(ConfigurationError, match="n=0"):
        engine.open(RowRequest(PROMPT), n=0)
    with pytest.raises(CapabilityError, match="media"):
        engine.open(RowRequest(PROMPT, media=(Media("image/png", b""),)))
    (handle,) = engine.open(RowRequest(PROMPT))
    engine.rollback(handle, 0)
    with pytest.raises(CapabilityError, match="media"):
        engine.extend(handle, (), media=(Media("image/png", b""),))


def test_rows_driven_out_of_turn_are_refused(engine):
    (handle,) = engine.open(RowRequest(PROMPT, max_total_tokens=len(PROMPT) + 3))
    with pytest.raises(ProtocolError, match="not held"):
        engine.extend(handle, (1,))
    with pytest.raises(ProtocolError, match="cannot be taken back"):
        engine.rollback(handle, len(PROMPT))
    with pytest.raises(ProtocolError, match="cannot be taken back"):
        engine.rollback(handle, -1)
    engine.rollback(handle, 0)
    with pytest.raises(ProtocolError, match="limit"):
        engine.extend(handle, (1, 2, 3, 4))
    with pytest.raises(ProtocolError, match="vocabulary"):
        engine.extend(handle, (VOCABULARY,))
    engine.extend(handle, (1, 2, 3))
    (update,) = engine.step()
    assert update.exhausted
    with pytest.raises(ProtocolError, match="not held"):
        engine.extend(handle, ())


def test_a_closed_row_is_gone_and_its_handle_is_never_used_again(engine):
    (handle,) = engine.open(RowRequest(PROMPT))
    engine.step()
    engine.close(handle)
    assert engine.step() == []
    for call in (
        lambda: engine.close(handle),
        lambda: engine.rollback(handle, 0),
        lambda: engine.extend(handle, ()),
        lambda: engine.fork(handle, 0),
    ):
        with pytest.raises(ProtocolError, match=str(handle)):
            call()
    assert engine.open(RowRequest(PROMPT)) != [handle]


def test_held_queued_and_running_rows_can_all_be_closed(engine):
    engine = HuggingFaceEngine(small_model("llama"), None, max_batch_size=1, max_cached_rows=1)
    running, queued, held = engine.open(RowRequest(PROMPT), n=3)
    engine.rollback(held, 0)
    engine.step()
    for handle in (queued, held, running):
        engine.close(handle)
    assert engine.step() == []


def test_ids_are_taken_back_before_anything_was_computed(engine):
    (handle,) = engine.open(RowRequest(PROMPT, sampling=GREEDY))
    engine.rollback(handle, 5)
    assert engine.step() == []
    engine.extend(handle, PROMPT[-5:])
    (update,) = engine.step()
    (other,) = engine.open(RowRequest(PROMPT, sampling=GREEDY))
    assert [found.ids for found in engine.step() if found.handle == other] == [update.ids]


def test_the_model_samples_in_eval_mode_even_where_a_trainer_left_it_training():
    model = fresh_model("gpt2")
    model.config.attn_pdrop = model.config.resid_pdrop = 0.5
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    engine = HuggingFaceEngine(model, None)
    engine.open(RowRequest(PROMPT, sampling=GREEDY))
    first = [engine.step()[0] for _ in range(4)]
    model.train()
    again = HuggingFaceEngine(model, None)
    again.open(RowRequest(PROMPT, sampling=GREEDY))
    model.train()
    assert [again.step()[0].logprobs for _ in range(4)] == [update.logprobs for update in first]


def test_a_failed_forward_pass_is_the_engines_fault_and_can_be_tried_again():
    for name in ("llama", "qwen3-next"):
        model = fresh_model(name)
        engine = HuggingFaceEngine(model, None)
        (handle,) = engine.open(RowRequest(PROMPT, sampling=GREEDY))
        reference = HuggingFaceEngine(model, None)
        reference.open(RowRequest(PROMPT, sampling=GREEDY))
        expected = [reference.step()[0].ids for _ in range(5)]
        found = [engine.step()[0].ids for _ in range(2)]
        layer = model.get_output_embeddings()

        def fail(*_):
            raise RuntimeError("out of memory")

        hook = layer.register_forward_pre_hook(fail)
        with pytest.raises(EngineError, match="out of memory"):
            engine.step()
        hook.remove()
        found += [engine.step()[0].ids for _ in range(3)]
        assert found == expected
        engine.close(handle)


def test_shutdown_closes_all_rows_gives_back_the_cache_and_may_come_twice(engine):
    handles = engine.open(RowRequest(PROMPT), n=2)
    engine.step()
    memory = weakref.ref(engine._runner._cache)
    engine.shutdown()
    engine.shutdown()
    gc.collect()
    assert memory() is None
    assert engine.step() == []
    with pytest.raises(ProtocolError):
        engine.close(handles[0])


@pytest.fixture
def folder(tmp_path):
    from tokenizers import Tokenizer, models

    vocabulary = {f"<{token_id}>": token_id for token_id in range(VOCABULARY)}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<0>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<3>").save_pretrained(tmp_path)
    small_model("llama").save_pretrained(tmp_path)
    return tmp_path


def test_from_a_folder_with_options_of_the_engine(folder):
    engine = HuggingFaceEngine.from_pretrained(str(folder), device="cpu", attention="eager", max_batch_size=3)
    assert engine.tokenizer.eos_token_id == 3
    assert engine.eos_ids == {3}
    assert engine.model.config._attn_implementation == "eager"
    reference = HuggingFaceEngine(small_model("llama"), None)
    for each in (engine, reference):
        each.open(RowRequest(PROMPT, sampling=Sampling(), seed=4))
    assert [engine.step()[0].ids for _ in range(5)] == [reference.step()[0].ids for _ in range(5)]
    half = HuggingFaceEngine.from_pretrained(str(folder), device="cpu", dtype=torch.bfloat16)
    assert half.model.dtype == torch.bfloat16


def test_no_such_folder_and_unknown_options_are_refused(folder, tmp_path):
    with pytest.raises(ConfigurationError, match="nowhere"):
        HuggingFaceEngine.from_pretrained(str(tmp_path / "nowhere"))
    with pytest.raises(TypeError, match="batch_sise"):
        HuggingFaceEngine.from_pretrained(str(folder), device="cpu", batch_sise=3)
