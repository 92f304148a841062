"""Texts that are scored: a client gets what the server behind gives, to the value, within its own limits."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from midstream import Generator, Limits, SandboxPool, ScriptedEngine, ServerConnection
from midstream.serve import ServiceLimits
from tests.rollouts import LONG
from tests.serve.conftest import Connect, Serve, keys_of
from tests.serve.served import Served
from tests.serving import Trouble

TEXTS = ["Let <code>6 * 7</code> be.", "No code."]
SCORES = {"scores": True}
ASKED: dict[str, Any] = {"model": "small", "prompt": TEXTS[0], "max_tokens": 1, "logprobs": 1, "echo": True}


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=LONG) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def until(done: Any) -> None:
    end = time.monotonic() + LONG
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("logprobs", [0, 1, 5])
@pytest.mark.parametrize("as_ids", [False, True])
def test_the_scores_are_those_of_the_upstream(
    serve: Serve, tokenizer: Any, max_tokens: int, logprobs: int, as_ids: bool
) -> None:
    served = serve(upstream=SCORES)
    prompts = [tokenizer.encode(text) if as_ids else text for text in TEXTS]
    body = {**ASKED, "max_tokens": max_tokens, "logprobs": logprobs}
    alone = [post(served.upstream.url, {**body, "prompt": prompt}) for prompt in prompts]
    both = post(served.url, {**body, "prompt": prompts})
    assert both["choices"] == [{**one["choices"][0], "index": place} for place, one in enumerate(alone)]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert both["usage"][name] == sum(one["usage"][name] for one in alone)
    assert post(served.url, {**body, "prompt": prompts[0]})["choices"] == alone[0]["choices"]
    assert served.service.admission.rows == 0


def test_the_openai_client_reads_them(serve: Serve, connect: Connect, tokenizer: Any) -> None:
    answer = connect(serve(upstream=SCORES)).completions.create(**ASKED)
    (choice,) = answer.choices
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert choice.text.startswith(TEXTS[0])
    assert len(choice.logprobs.token_logprobs) == len(tokenizer.encode(TEXTS[0])) + 1
    assert choice.logprobs.token_logprobs[0] is None
    assert answer.id.startswith("cmpl-")
    assert answer.model == "small"


def test_what_goes_on_to_the_upstream(serve: Serve, connect: Connect) -> None:
    served = serve(upstream={**SCORES, "models": ("theirs",)})
    before = len(served.upstream.requests)
    connect(served).completions.create(
        **ASKED,
        seed=3,
        temperature=0.5,
        stop=["x"],
        user="ann",
        frequency_penalty=0,
        best_of=1,
        extra_body={"top_k": -1, "metadata": {"run": "1"}},
    )
    assert served.upstream.requests[before:] == [
        {**ASKED, "model": "theirs", "seed": 3, "temperature": 0.5, "stop": ["x"], "top_k": -1}
    ]


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"max_tokens": 2}, "echo"),
        ({"max_tokens": None}, "echo"),
        ({"logprobs": None}, "echo"),
        ({"echo": "yes"}, "echo"),
        ({"stream": True}, "stream"),
        ({"n": 2}, "n"),
        ({"extra_body": {"midstream": {"session": "s"}}}, "midstream"),
        ({"model": "large"}, "model"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": [5, -1]}, "prompt"),
    ],
    ids=str,
)
def test_a_field_that_cannot_be_is_named(serve: Serve, connect: Connect, options: dict[str, Any], param: str) -> None:
    served = serve(upstream=SCORES)
    before = len(served.upstream.requests)
    with pytest.raises(openai.APIStatusError) as refused:
        connect(served).completions.create(**{**ASKED, **options})
    assert refused.value.status_code in (400, 404)
    assert refused.value.param == param  # type: ignore[attr-defined]
    assert served.upstream.requests[before:] == []
    assert served.service.admission.rows == 0


def test_chats_are_not_scored(serve: Serve, connect: Connect) -> None:
    messages: Any = [{"role": "user", "content": "Q"}]
    with pytest.raises(openai.BadRequestError, match="chats are not scored"):
        connect(serve(upstream=SCORES)).chat.completions.create(
            model="small", messages=messages, extra_body={"echo": True}
        )


SAMPLED_ALONE = {"index": 0, "text": "a", "logprobs": {"tokens": ["a"], "token_logprobs": [-0.5]}}


def says(**overrides: Any) -> dict[str, Any]:
    return {**SCORES, "overrides": overrides}


@pytest.mark.parametrize(
    ("upstream", "prompt", "reason"),
    [
        ({}, TEXTS[0], "no count of ids"),
        ({"speaks": "generate", **SCORES}, TEXTS[0], "404"),
        ({"speaks": "sglang", **SCORES}, TEXTS[0], "404"),
        # Servers that do not know echo: what they sampled would be taken for scores.
        (says(choices=[SAMPLED_ALONE]), TEXTS[0], "does not know echo"),
        (says(choices=[SAMPLED_ALONE]), [5], "does not know echo"),
        (says(choices=[{"index": 0, "text": "a", "logprobs": None}]), TEXTS[0], "no logprobs"),
        (says(choices=[{"index": 0, "text": "a", "logprobs": {"content": []}}]), TEXTS[0], "no logprobs"),
        (says(choices=[]), TEXTS[0], "no choices"),
        (says(usage={"prompt_tokens": 3, "completion_tokens": 1}), [5, 6], "they are 2, and it counts 3"),
        (says(usage={"prompt_tokens": "3", "completion_tokens": 1}), TEXTS[0], "no count of ids"),
        (says(error={"message": "too many logprobs", "code": 400}), TEXTS[0], "too many logprobs"),
    ],
    ids=str,
)
def test_an_upstream_that_does_not_score(
    serve: Serve, connect: Connect, upstream: dict[str, Any], prompt: Any, reason: str
) -> None:
    served = serve(upstream=upstream)
    with pytest.raises(openai.BadRequestError, match=reason) as refused:
        connect(served).completions.create(**{**ASKED, "prompt": prompt})
    assert refused.value.param == "echo"
    assert served.service.admission.rows == 0


def test_an_engine_without_a_server_does_not_score(tokenizer: Any, sandboxes: SandboxPool, connect: Connect) -> None:
    with Generator(ScriptedEngine(tokenizer, "x"), pool=sandboxes) as generator:
        served = Served(generator)
        try:
            with pytest.raises(openai.BadRequestError, match="there is none") as refused:
                connect(served).completions.create(**ASKED)
        finally:
            served.close()
    assert refused.value.param == "echo"


def test_an_upstream_of_text_alone_may_score(serve: Serve, connect: Connect) -> None:
    served = serve(upstream={"speaks": "text", **SCORES}, engine={"text_only": True})
    choice = connect(served).completions.create(**ASKED).choices[0]
    assert choice.logprobs is not None


# --- the service's own bounds


def test_keys_and_requests_a_minute_hold(serve: Serve, connect: Connect) -> None:
    served = serve(upstream=SCORES, keys=keys_of("ann"), bounds=ServiceLimits(requests_per_minute=1))
    with pytest.raises(openai.AuthenticationError):
        connect(served, "key of eve").completions.create(**ASKED)
    ann = connect(served, "key of ann")
    ann.completions.create(**ASKED)
    with pytest.raises(openai.RateLimitError):
        ann.completions.create(**ASKED)


def test_texts_count_as_answers(serve: Serve, connect: Connect) -> None:
    served = serve(upstream=SCORES, bounds=ServiceLimits(rows=2, queue=1, rows_per_client=2))
    client = connect(served)
    assert len(client.completions.create(**{**ASKED, "prompt": TEXTS}).choices) == 2
    with pytest.raises(openai.BadRequestError, match="2 are the most") as refused:
        client.completions.create(**{**ASKED, "prompt": [*TEXTS, "third"]})
    assert refused.value.param == "n"
    for other in "abc":
        served.service.admission.enter(other, 1)
    with pytest.raises(openai.InternalServerError) as full:
        client.completions.create(**ASKED)
    assert full.value.status_code == 503


def test_all_ids_of_a_row_are_bounded(serve: Serve, connect: Connect, tokenizer: Any) -> None:
    length = len(tokenizer.encode(TEXTS[0]))
    client = connect(serve(upstream=SCORES, limits=Limits(max_total_tokens=length)))
    client.completions.create(**{**ASKED, "max_tokens": 0})
    for prompt in (TEXTS[0], tokenizer.encode(TEXTS[0])):
        with pytest.raises(openai.BadRequestError, match=f"{length} are the most") as refused:
            client.completions.create(**{**ASKED, "prompt": prompt})
        assert (refused.value.param, refused.value.code) == ("prompt", "context_length_exceeded")


def test_the_upstream_is_asked_for_so_many_at_a_time(serve: Serve, connect: Connect) -> None:
    served = serve(upstream={**SCORES, "pace": 0.01}, engine={"connection": ServerConnection(max_requests=2)})
    connect(served).completions.create(**{**ASKED, "prompt": TEXTS * 8})
    assert served.upstream.most_under_way <= 2


# --- what goes wrong


@pytest.mark.parametrize("kind", ["503", "429", "drop", "cut"])
def test_a_fault_is_asked_again(serve: Serve, connect: Connect, kind: str) -> None:
    served = serve(upstream=SCORES, engine={"connection": ServerConnection(first_wait=0)})
    served.upstream.troubles = [Trouble(kind)]
    assert connect(served).completions.create(**ASKED).choices[0].logprobs is not None
    assert served.upstream.troubles == []


@pytest.mark.parametrize(("kind", "retries"), [("503", 0), ("drop", 8)])
def test_a_server_that_fails_for_good(serve: Serve, connect: Connect, kind: str, retries: int) -> None:
    """An answer that was lost is not asked for again where the connection says so."""
    connection = ServerConnection(retries=retries, after_break="fail")
    served = serve(upstream=SCORES, engine={"connection": connection})
    served.upstream.troubles = [Trouble(kind)]
    client = connect(served)
    with pytest.raises(openai.InternalServerError, match="the server behind this one failed") as failed:
        client.completions.create(**{**ASKED, "prompt": TEXTS})
    assert failed.value.status_code == 502
    until(lambda: served.service.admission.rows == 0)
    assert client.completions.create(**ASKED).choices[0].logprobs is not None


def test_a_client_that_leaves_is_not_scored_for(serve: Serve, connect: Connect) -> None:
    served = serve(upstream=SCORES)
    served.upstream.behaviour.pace = LONG
    with pytest.raises(openai.APITimeoutError):
        connect(served).with_options(timeout=0.3).completions.create(**{**ASKED, "prompt": TEXTS})
    until(lambda: served.service.admission.rows == 0)
    until(lambda: served.upstream.under_way == 0)


def test_scores_take_no_longer_than_an_answer_may(serve: Serve, connect: Connect) -> None:
    served = serve(upstream=SCORES, limits=Limits(time_limit=0.2))
    served.upstream.behaviour.pace = LONG
    with pytest.raises(openai.InternalServerError, match=r"no scores within 0\.2 seconds") as late:
        connect(served).completions.create(**{**ASKED, "prompt": TEXTS})
    assert late.value.status_code == 504
    assert late.value.code == "time_limit"
    assert served.service.admission.rows == 0
    until(lambda: served.upstream.under_way == 0)


def test_a_service_that_stops_waits_and_then_gives_up(serve: Serve, connect: Connect) -> None:
    served = serve(upstream=SCORES)
    served.upstream.behaviour.pace = LONG
    client = connect(served)
    with ThreadPoolExecutor(1) as threads:
        slow = threads.submit(client.completions.create, **ASKED)
        until(lambda: served.upstream.under_way == 1)
        served.within(served.service.drain(0.05))
        with pytest.raises(openai.InternalServerError, match="stopping") as stopped:
            slow.result(LONG)
    assert stopped.value.status_code == 503
    assert served.service.admission.rows == 0
    until(lambda: served.upstream.under_way == 0)


def test_an_engine_that_is_shut_down_gives_scores_up(serve: Serve) -> None:
    served = serve(upstream=SCORES)
    served.upstream.behaviour.pace = LONG
    engine: Any = served.generator.engine

    async def shut_down() -> None:
        scoring = asyncio.create_task(engine.score(TEXTS[0], {"max_tokens": 1, "logprobs": 1}))
        while served.upstream.under_way == 0:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(engine.shutdown)
        await asyncio.wait([scoring], timeout=LONG)
        assert scoring.cancelled()

    asyncio.run(shut_down())
