"""The engine over servers on a real vLLM server, over loopback: rows are those of transformers and of vLLM itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from small_models import GREEDY, teacher_forced

from midstream import Generator, Limits, Sampling, ServerEngine, StopKind
from midstream.engines.base import RowRequest
from midstream.errors import CapabilityError, ConfigurationError, TokenizerError
from problems import load_held_out, prompt_text
from tests.vllm.conftest import MODEL, random_ids, sample
from tests.vllm.served import served
from tests.vocabularies import tokenizer


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the package's own small model, with the route for ids alone."""
    pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` installs it apart")
    folder = tmp_path_factory.mktemp("server")
    with served(MODEL, folder, served_model_name="small", max_model_len=512, max_num_seqs=16) as address:
        yield address


@pytest.fixture(scope="module")
def small_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return [prompt_text(problem.question) for problem in load_held_out()[::10]]


@pytest.fixture(scope="module")
def expected(prompts: list[str], sandboxes: Any) -> list[Any]:
    """The rows of the Hugging Face engine."""
    from midstream import HuggingFaceEngine

    with Generator(
        HuggingFaceEngine.from_pretrained(str(MODEL)), limits=Limits(120), sampling=GREEDY, pool=sandboxes
    ) as generator:
        return list(generator.generate(prompts))


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("route", ["auto", "vllm-generate"])
def test_rows_are_those_of_transformers(
    url: str, small_tokenizer: Any, prompts: list[str], expected: list[Any], sandboxes: Any, route: Any, stream: bool
) -> None:
    engine = ServerEngine(url, small_tokenizer, route=route, stream=stream)
    assert (engine.capabilities.logprobs, engine.context_length) == ("raw", 512)
    with Generator(engine, limits=Limits(120), sampling=GREEDY, pool=sandboxes) as generator:
        rows = list(generator.generate(prompts))
    assert len(rows) >= 20
    assert [row.ids for row in rows] == [row.ids for row in expected]
    assert [row.mask for row in rows] == [row.mask for row in expected]
    assert [row.stop for row in rows] == [row.stop for row in expected]
    assert sum(len(row.calls) for row in rows) >= len(rows)
    for row, other in zip(rows, expected, strict=True):
        assert row.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert row.discarded == 0  # the server ends an answer at the tag
    engine.shutdown()


def test_rows_are_those_of_vllm_in_this_process(url: str, small_tokenizer: Any, llm: Any, model: Any) -> None:
    from midstream.engines.vllm import VLLMEngine

    # With the EOS among the ids to stop at, neither engine takes it for an end that is not the row's to decide.
    requests = [RowRequest(random_ids(20 + number, number), GREEDY, stop_ids=(0,)) for number in range(20)]
    found = []
    for engine in (VLLMEngine(llm), ServerEngine(url, small_tokenizer)):
        handles = [engine.open(request)[0] for request in requests]
        found.append(sample(engine, handles, 24))
        for handle in handles:
            engine.close(handle)
        engine.shutdown()
    for request, (ids, logprobs), (other_ids, other_logprobs) in zip(requests, *found, strict=True):
        assert ids == other_ids
        assert logprobs == pytest.approx(other_logprobs, abs=1e-4)
        whole = [*request.ids, *other_ids]
        forced = teacher_forced(model, whole).log_softmax(-1)
        raw = [forced[place - 1, whole[place]].item() for place in range(len(request.ids), len(whole))]
        assert other_logprobs == pytest.approx(raw, abs=1e-3)


def test_sampled_rows_are_repeatable(url: str, small_tokenizer: Any, prompts: list[str], sandboxes: Any) -> None:
    engine = ServerEngine(url, small_tokenizer)
    sampling = Sampling(temperature=1.4, top_k=40, top_p=0.97)
    with Generator(engine, limits=Limits(40), sampling=sampling, pool=sandboxes) as generator:
        first, second = (generator.generate(prompts[:4], n=4) for _ in range(2))
    assert [row.ids for row in first] == [row.ids for row in second]
    assert len({tuple(row.ids) for row in first}) > 4
    engine.shutdown()


def test_closed_rows_leave_the_server_free(url: str, small_tokenizer: Any) -> None:
    engine = ServerEngine(url, small_tokenizer)
    for _ in range(3):
        handles = [engine.open(RowRequest(random_ids(9, number), GREEDY))[0] for number in range(30)]
        while len({update.handle for update in engine.step()}) < 2:
            pass
        for handle in handles:
            engine.close(handle)
    (handle,) = engine.open(RowRequest(random_ids(9, 1), GREEDY))
    assert len(sample(engine, [handle], 5)[0][0]) == 5
    engine.shutdown()


def test_text_only(url: str, small_tokenizer: Any, prompts: list[str], expected: list[Any], sandboxes: Any) -> None:
    engine = ServerEngine(url, small_tokenizer, text_only=True)
    with Generator(engine, limits=Limits(120), sampling=GREEDY, pool=sandboxes) as generator:
        rows = list(generator.generate(prompts[:8]))
    assert [row.text for row in rows] == [row.text for row in expected[:8]]
    assert {row.stop.kind for row in rows} == {StopKind.END_OF_SEQUENCE}
    assert not any(row.fit_for_training for row in rows)
    engine.shutdown()


def test_what_cannot_be_is_refused(url: str, small_tokenizer: Any) -> None:
    with pytest.raises(TokenizerError, match="is another than that of the model"):
        ServerEngine(url, tokenizer("tagged"))
    with pytest.raises(ConfigurationError, match="the server has 'small'"):
        ServerEngine(url, small_tokenizer, model="large")
    with pytest.raises(CapabilityError, match="POST /generate: 404"):
        ServerEngine(url, small_tokenizer, route="sglang")
    engine = ServerEngine(url, small_tokenizer)
    with pytest.raises(CapabilityError, match="min_p before top_p"):
        engine.open(RowRequest((5,), Sampling(top_p=0.5, min_p=0.1)))
    engine.shutdown()
