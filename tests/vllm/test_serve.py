"""OpenAI's client, midstream serve, and a real vLLM server: answers are the rows of transformers."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from small_models import GREEDY

from midstream import Generator, Limits, ServerEngine
from midstream.records import RecordWriter, read_records, verify
from midstream.serve import ServiceLimits
from problems import load_held_out, prompt_text
from tests.rollouts import LONG
from tests.serve.served import Served
from tests.vllm.conftest import MODEL
from tests.vllm.served import served

openai = pytest.importorskip("openai", reason="the openai package is not installed here")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` installs it apart")
    folder = tmp_path_factory.mktemp("server")
    with served(MODEL, folder, served_model_name="small", max_model_len=512, max_num_seqs=16) as address:
        yield address


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return [prompt_text(problem.question) for problem in load_held_out()[::10]]


@pytest.fixture(scope="module")
def texts(prompts: list[str], sandboxes: Any) -> list[str]:
    """What the Hugging Face engine's rows say, without what ended them."""
    from midstream import HuggingFaceEngine

    engine = HuggingFaceEngine.from_pretrained(str(MODEL))
    with Generator(engine, limits=Limits(120), sampling=GREEDY, pool=sandboxes) as generator:
        rows = list(generator.generate(prompts))
    assert all(row.stop.finished and row.calls for row in rows)
    end = engine.tokenizer.eos_token
    return [row.text.removesuffix(end) for row in rows]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("records") / "served.jsonl"


@pytest.fixture(scope="module")
def service(url: str, sandboxes: Any, records: Path) -> Iterator[Served]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    engine = ServerEngine(url, tokenizer)
    with (
        RecordWriter(records) as record,
        Generator(engine, pool=sandboxes, limits=Limits(120), sampling=GREEDY, max_open_rows=16) as generator,
    ):
        service = Served(generator, record=record, limits=ServiceLimits(rows=16))
        yield service
        service.close()
    engine.shutdown()


@pytest.fixture(scope="module")
def client(service: Served) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="-", max_retries=0, timeout=LONG) as client:
        yield client


def test_completions(client: Any, prompts: list[str], texts: list[str]) -> None:
    answer = client.completions.create(
        model="small", prompt=prompts, extra_body={"midstream": {"include": ["ids"]}}, logprobs=0
    )
    assert [choice.text for choice in answer.choices] == texts
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    told = [choice.midstream for choice in answer.choices]
    assert answer.usage.completion_tokens == sum(len(each["ids"]) for each in told)
    for choice in answer.choices:
        sampled = [x for x, own in zip(choice.midstream["logprobs"], choice.midstream["mask"], strict=True) if own]
        assert choice.logprobs.token_logprobs == sampled
        assert all(call["error"] is None for call in choice.midstream["calls"])


def test_chats_and_streams_under_load(
    client: Any, service: Served, prompts: list[str], texts: list[str], records: Path
) -> None:
    def ask(number: int) -> str:
        prompt = prompts[number % len(prompts)]
        match number % 4:
            case 0:
                return str(client.completions.create(model="small", prompt=prompt).choices[0].text)
            case 1:
                chunks = client.completions.create(model="small", prompt=prompt, stream=True)
                return "".join(chunk.choices[0].text for chunk in chunks)
        messages = [{"role": "user", "content": prompt}]
        if number % 4 == 2:
            return str(client.chat.completions.create(model="small", messages=messages).choices[0].message.content)
        chunks = client.chat.completions.create(model="small", messages=messages, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with ThreadPoolExecutor(40) as threads:
        answers = list(threads.map(ask, range(160)))
    assert answers == [texts[number % len(prompts)] for number in range(160)]
    assert service.service.admission.rows == 0
    found = list(read_records(records))
    assert len(found) >= 160
    assert [violation for record in found for violation in verify(record)] == []


def test_stops_and_seeds(client: Any, prompts: list[str], texts: list[str]) -> None:
    answer = client.completions.create(model="small", prompt=prompts[0], stop="</code>")
    assert answer.choices[0].text == texts[0].partition("</code>")[0]

    def sampled(seed: int) -> list[str]:
        answer = client.completions.create(model="small", prompt=prompts[0], temperature=2, n=3, seed=seed)
        return [choice.text for choice in answer.choices]

    assert sampled(1) == sampled(1) != sampled(2)


def test_a_client_that_leaves_ends_the_request_behind(client: Any, service: Served, prompts: list[str]) -> None:
    import time

    for _ in range(5):
        stream = client.completions.create(model="small", prompt=prompts[0], n=4, stream=True)
        next(iter(stream))
        stream.close()
    until = time.monotonic() + LONG
    while service.service.admission.rows or service.generator.engine.unfinished:  # type: ignore[attr-defined]
        assert time.monotonic() < until
        time.sleep(0.01)


def test_the_command(url: str, prompts: list[str], texts: list[str]) -> None:
    command = [sys.executable, "-c", "from midstream.cli import main; main(prog_name='midstream')", "serve"]
    options = ["--upstream", url, "--model", str(MODEL), "--port", "0", "--temperature", "0", "--name", "m"]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split(" at ")[1].split(",")[0]
        with openai.OpenAI(base_url=address, api_key="-", timeout=LONG) as client:
            answer = client.completions.create(model="m", prompt=prompts[:5], max_tokens=120)
        process.send_signal(signal.SIGTERM)
        assert process.wait(LONG) == 0
    assert [choice.text for choice in answer.choices] == texts[:5]


def test_scores_are_those_of_the_server_itself(url: str, client: Any, prompts: list[str]) -> None:
    """As text and as ids, with and without an id behind. Several at once are computed in other batches there."""
    from transformers import AutoTokenizer

    ids = [AutoTokenizer.from_pretrained(MODEL).encode(prompt) for prompt in prompts[:3]]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="-", timeout=LONG) as alone:

        def choices(of: Any, **asked: Any) -> list[dict[str, Any]]:
            answer = of.completions.create(model="small", echo=True, temperature=0, **asked)
            return [choice.to_dict() for choice in answer.choices]

        for prompt in (prompts[0], ids[0]):
            for max_tokens, logprobs in ((0, 1), (1, 1), (1, 5)):
                asked = {"prompt": prompt, "max_tokens": max_tokens, "logprobs": logprobs}
                assert choices(client, **asked) == choices(alone, **asked)
        for several in (prompts[:3], ids):
            asked = {"prompt": several, "max_tokens": 1, "logprobs": 1}
            for one, other in zip(choices(client, **asked), choices(alone, **asked), strict=True):
                assert (one["index"], one["text"]) == (other["index"], other["text"])
                assert one["logprobs"]["tokens"] == other["logprobs"]["tokens"]
                first, *values = one["logprobs"]["token_logprobs"]
                assert first is None
                assert values == pytest.approx(other["logprobs"]["token_logprobs"][1:], abs=1e-3)
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.completions.create(model="small", echo=True, prompt=[5] * 600, max_tokens=1, logprobs=1)
