"""The real client of OpenAI's gets answers whose code has run, from a client's view with nothing changed."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from midstream import Generator, KeptSession, Limits, SandboxPool, ScriptedEngine, ServerConnection
from midstream.errors import SandboxError
from midstream.records import read_records, verify
from midstream.serve import ServiceLimits
from tests.rollouts import LONG, Gate
from tests.serve.conftest import Connect, Serve, keys_of
from tests.serving import Trouble

SAYS: dict[str, str] = {
    "Q1:": "Let <code>6 * 7</code> be.",
    "Q2:": "No code, but 日本語 and 🙂.",
    "Q3:": "a<code>x = 3</code> b <code>x + 1</code> c <code>1/0</code> d",
}
TEXTS = {
    "Q1:": "Let <code>6 * 7</code><result>42</result> be.",
    "Q2:": "No code, but 日本語 and 🙂.",
    "Q3:": "a<code>x = 3</code> b <code>x + 1</code><result>4</result> c <code>1/0</code>"
    "<result>ZeroDivisionError('division by zero')</result> d",
}


def chat(*turns: str) -> list[dict[str, str]]:
    """A chat of a user and an assistant, in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[place % 2], "content": text} for place, text in enumerate(turns)]


# --- answers


@pytest.mark.parametrize("prompt", SAYS)
def test_a_completion(serve: Serve, connect: Connect, prompt: str) -> None:
    client = connect(serve(SAYS))
    answer = client.completions.create(model="small", prompt=prompt)
    (choice,) = answer.choices
    assert choice.text == TEXTS[prompt]
    assert (choice.finish_reason, choice.index, choice.logprobs) == ("stop", 0, None)
    assert answer.id.startswith("cmpl-")
    assert answer.model == "small"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_chat(serve: Serve, connect: Connect, tokenizer: Any) -> None:
    messages = chat("Hello.", "Hello?", "What is 6 * 7?")
    client = connect(serve([(messages, "It is <code>6 * 7</code>, so.")]))
    answer = client.chat.completions.create(model="small", messages=messages)  # type: ignore[arg-type]
    (choice,) = answer.choices
    assert choice.message.content == "It is <code>6 * 7</code><result>42</result>, so."
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert answer.usage is not None
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert answer.usage.prompt_tokens == len(rendered)


def test_parts_of_a_message_are_joined(serve: Serve, connect: Connect) -> None:
    client = connect(serve([(chat("What is it?"), "This.")]))
    parts = [{"type": "text", "text": "What "}, {"type": "text", "text": "is it?"}]
    answer = client.chat.completions.create(model="small", messages=[{"role": "user", "content": parts}])  # type: ignore[list-item,misc]
    assert answer.choices[0].message.content == "This."


def test_instructions_are_the_first_that_a_chat_says(serve: Serve, connect: Connect) -> None:
    told = [{"role": "system", "content": "Use <code>."}, *chat("What is it?")]
    client = connect(serve([(told, "<code>1</code>")], instructions="Use <code>."))
    answer = client.chat.completions.create(model="small", messages=chat("What is it?"))  # type: ignore[arg-type]
    assert answer.choices[0].message.content == "<code>1</code><result>1</result>"


def test_a_chat_may_be_rendered_otherwise(serve: Serve, connect: Connect, tokenizer: Any) -> None:
    def render(messages: list[dict[str, str]]) -> list[int]:
        return list(tokenizer.encode("tools: f\n" + "".join(message["content"] for message in messages)))

    client = connect(serve({"tools: f\nWhat?": "<code>1</code>"}, render=render))
    answer = client.chat.completions.create(model="small", messages=chat("What?"))  # type: ignore[arg-type]
    assert answer.choices[0].message.content == "<code>1</code><result>1</result>"


def test_a_template_that_refuses_is_the_clients_fault(serve: Serve, connect: Connect) -> None:
    def render(messages: list[dict[str, str]]) -> list[int]:
        raise RuntimeError("roles must alternate")

    served = serve(render=render)
    with pytest.raises(openai.BadRequestError, match="roles must alternate") as refused:
        connect(served).chat.completions.create(model="small", messages=chat("What?"))  # type: ignore[arg-type]
    assert refused.value.param == "messages"
    assert served.service.admission.rows == 0


@pytest.mark.parametrize("stream", [False, True])
def test_sampling_that_the_upstream_cannot_do_is_refused(serve: Serve, connect: Connect, stream: bool) -> None:
    client = connect(serve(SAYS))
    with pytest.raises(openai.BadRequestError, match="min_p before top_p"):
        client.completions.create(model="small", prompt="Q1:", top_p=0.5, extra_body={"min_p": 0.1}, stream=stream)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_the_queue_is_not_waited_for(serve: Serve, connect: Connect, stream: bool) -> None:
    gate = Gate()
    gate.opened.set()
    served = serve({**SAYS, "Q:": "<code>hold()</code>"}, tools={"hold": gate}, bounds=ServiceLimits(rows=1))
    gate.opened.clear()
    gate.reached.clear()
    client = connect(served)
    with ThreadPoolExecutor(1) as threads:
        slow = threads.submit(client.completions.create, model="small", prompt="Q:")
        assert gate.reached.wait(LONG)
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.3).completions.create(model="small", prompt="Q1:", stream=stream)
        _until(lambda: served.service.admission.rows == 1)
        assert not slow.done()
        gate.opened.set()
        slow.result()


@pytest.mark.parametrize("prompt", SAYS)
def test_a_streamed_completion(serve: Serve, connect: Connect, prompt: str) -> None:
    client = connect(serve(SAYS))
    stream = client.completions.create(model="small", prompt=prompt, stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == TEXTS[prompt]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all("�" not in chunk.choices[0].text for chunk in chunks)
    assert len(chunks) >= 2


def test_a_streamed_chat_with_usage(serve: Serve, connect: Connect) -> None:
    messages = chat("What is 6 * 7?")
    client = connect(serve([(messages, "It is <code>6 * 7</code>, so.")]))
    whole = client.chat.completions.create(model="small", messages=messages)  # type: ignore[arg-type]
    stream = client.chat.completions.create(
        model="small",
        messages=messages,  # type: ignore[arg-type]
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert [chunk.usage for chunk in chunks] == [None] * len(chunks)
    assert last.choices == []
    assert last.usage == whole.usage
    origins = [(c.choices[0].delta.content, c.choices[0].model_extra["midstream"]) for c in chunks[1:-1]]  # type: ignore[index]
    assert [text for text, extra in origins if extra["origin"] == "injected"] == ["<result>42</result>"]


def test_results_come_when_they_are_there_not_at_the_end(serve: Serve, connect: Connect) -> None:
    gate = Gate()
    gate.opened.set()
    served = serve({"Q:": "a<code>hold()</code>b"}, tools={"hold": gate})
    gate.opened.clear()
    text = ""
    for chunk in connect(served).completions.create(model="small", prompt="Q:", stream=True):
        text += chunk.choices[0].text
        if text == "a<code>hold()</code>":
            gate.opened.set()  # what comes before the block has come before its result is there
    assert text == "a<code>hold()</code><result>'through'</result>b"


def test_several_prompts_and_samples(serve: Serve, connect: Connect) -> None:
    client = connect(serve(SAYS))
    answer = client.completions.create(model="small", prompt=list(SAYS), n=2)
    assert [choice.text for choice in answer.choices] == [TEXTS[prompt] for prompt in SAYS for _ in range(2)]
    assert [choice.index for choice in answer.choices] == list(range(6))
    one = client.completions.create(model="small", prompt=list(SAYS))
    assert answer.usage is not None
    assert one.usage is not None
    assert answer.usage.prompt_tokens == one.usage.prompt_tokens
    assert answer.usage.completion_tokens == 2 * one.usage.completion_tokens
    texts = [""] * 6
    for chunk in client.completions.create(model="small", prompt=list(SAYS), n=2, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in answer.choices]


def test_prompts_of_ids(serve: Serve, connect: Connect, tokenizer: Any) -> None:
    client = connect(serve(SAYS))
    ids = [tokenizer.encode(prompt) for prompt in SAYS]
    one = client.completions.create(model="small", prompt=ids[0], extra_body={"midstream": {"include": ["ids"]}})
    assert one.choices[0].text == TEXTS["Q1:"]
    assert one.choices[0].model_extra["midstream"]["prompt_ids"] == ids[0]  # type: ignore[index]
    both = client.completions.create(model="small", prompt=ids[:2])
    assert [choice.text for choice in both.choices] == [TEXTS["Q1:"], TEXTS["Q2:"]]


def test_samples_differ_and_a_seed_repeats_them(serve: Serve, connect: Connect) -> None:
    client = connect(serve(SAYS))

    def sampled(**options: Any) -> list[str]:
        answer = client.completions.create(
            model="small", prompt=["Q1:", "Q2:"], n=2, temperature=1, max_tokens=12, **options
        )
        return [choice.text for choice in answer.choices]

    first, again, other, unseeded = sampled(seed=5), sampled(seed=5), sampled(seed=6), sampled()
    assert first == again
    assert len({*first, *other, *unseeded}) == 12


# --- where answers end


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("</code>", "Let <code>6 * 7"),  # the block has run, which nobody is shown
        ("be", "Let <code>6 * 7</code><result>42</result> "),
        ([" be.", "nowhere"], "Let <code>6 * 7</code><result>42</result>"),
        ("42", "Let <code>6 * 7</code><result>42</result> be."),  # results stop nothing
        ("bee", "Let <code>6 * 7</code><result>42</result> be."),
    ],
)
def test_stop_strings(serve: Serve, connect: Connect, stop: Any, text: str, stream: bool) -> None:
    client = connect(serve(SAYS))
    answer = client.completions.create(model="small", prompt="Q1:", stop=stop, stream=stream)
    got = "".join(chunk.choices[0].text for chunk in answer) if stream else answer.choices[0].text
    assert got == text
    if not stream:
        assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_length(serve: Serve, connect: Connect, field: str) -> None:
    messages = chat("Q")
    client = connect(serve([(messages, "word " * 30)]))
    answer = client.chat.completions.create(model="small", messages=messages, **{field: 7})  # type: ignore[arg-type,call-overload]
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 7


def test_the_servers_own_limits_hold(serve: Serve, connect: Connect) -> None:
    client = connect(serve({"Q": "word " * 30}, limits=Limits(max_new_tokens=5)))
    answer = client.completions.create(model="small", prompt="Q", max_tokens=50)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5


# --- what is told besides


def test_provenance(serve: Serve, connect: Connect) -> None:
    def search(query: str) -> list[str]:
        return [query.upper()]

    served = serve({"Q:": "<code>search('a')</code> and <code>1/0</code>!"}, tools=[search])
    answer = connect(served).completions.create(
        model="small", prompt="Q:", extra_body={"midstream": {"include": ["ids"]}}
    )
    (choice,) = answer.choices
    told = choice.model_extra["midstream"]  # type: ignore[index]
    assert told["stop"]["kind"] == "end_of_sequence"
    assert [call["code"] for call in told["calls"]] == ["search('a')", "1/0"]
    assert told["calls"][0]["tools"][0]["name"] == "search"
    assert told["calls"][0]["tools"][0]["value"] == ["A"]
    assert told["calls"][1]["error"]["type"] == "ZeroDivisionError"
    pieces = [(span["origin"], choice.text[span["start"] : span["end"]]) for span in told["spans"]]
    assert pieces == [
        ("generated", "<code>search('a')</code>"),
        ("injected", "<result>['A']</result>"),
        ("generated", " and <code>1/0</code>"),
        ("injected", "<result>ZeroDivisionError('division by zero')</result>"),
        ("generated", "!"),
    ]
    assert len(told["ids"]) == len(told["mask"]) == len(told["logprobs"]) == answer.usage.completion_tokens  # type: ignore[union-attr]
    injected = answer.usage.model_extra["midstream"]["injected_tokens"]  # type: ignore[union-attr,index]
    assert told["mask"].count(0) == injected


def test_logprobs(serve: Serve, connect: Connect) -> None:
    messages = chat("Q")
    client = connect(serve([(messages, "a <code>2</code> ü.")]))
    include = {"midstream": {"include": ["ids"]}}
    answer = client.chat.completions.create(model="small", messages=messages, logprobs=True, extra_body=include)  # type: ignore[arg-type]
    (choice,) = answer.choices
    told = choice.model_extra["midstream"]  # type: ignore[index]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    sampled = [value for value, own in zip(told["logprobs"], told["mask"], strict=True) if own]
    assert [entry.logprob for entry in choice.logprobs.content] == sampled
    assert (
        b"".join(bytes(entry.bytes or []) for entry in choice.logprobs.content).decode() == "a <code>2</code> ü.<eos>"
    )
    stream = client.chat.completions.create(model="small", messages=messages, logprobs=True, stream=True)  # type: ignore[arg-type]
    streamed = [e for c in stream if c.choices[0].logprobs for e in c.choices[0].logprobs.content or []]
    assert streamed == choice.logprobs.content


def test_logprobs_of_a_completion(serve: Serve, connect: Connect) -> None:
    client = connect(serve(SAYS))
    answer = client.completions.create(model="small", prompt="Q1:", logprobs=0)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.text_offset is not None
    text = answer.choices[0].text + "<eos>"
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert text[offset : offset + len(token)] == token
    assert len(logprobs.token_logprobs or []) == len(logprobs.tokens)


def test_records(serve: Serve, connect: Connect, tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    served = serve(SAYS, record=path, keys=keys_of("ann"), provenance={"served": "yes"})
    client = connect(served, "key of ann")
    answers = [client.completions.create(model="small", prompt=prompt, n=2, user="u1") for prompt in SAYS]
    records = list(read_records(path))
    assert [verify(record) for record in records] == [[]] * 6
    assert {record.prompt.id for record in records} == {answer.id for answer in answers}
    assert {record.prompt.metadata["client"] for record in records} == {"ann"}
    assert {record.prompt.metadata["user"] for record in records} == {"u1"}
    assert {record.provenance["served"] for record in records} == {"yes"}
    assert "key of" not in path.read_text()


def test_a_record_says_what_had_run_in_its_session(serve: Serve, connect: Connect, tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    client = connect(serve(SAYS, record=path))
    named = {"midstream": {"session": "s"}}
    for options in ({}, {"extra_body": named}, {"extra_body": named}):
        client.completions.create(model="small", prompt="Q1:", **options)  # type: ignore[call-overload]
    blocks = [record.provenance.get("earlier_blocks", 0) for record in read_records(path)]
    assert (blocks[0], blocks[1]) == (0, 0)
    assert blocks[2] == len(next(read_records(path)).calls) > 0


def test_a_rollout_is_recorded_though_its_client_has_left(serve: Serve, connect: Connect, tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    served = serve(SAYS, record=path)
    writer = served.service._record
    assert writer is not None
    append, writing, go_on = writer.append, threading.Event(), threading.Event()

    def slow(record: Any) -> None:
        writing.set()
        assert go_on.wait(LONG)
        append(record)

    writer.append = slow  # type: ignore[method-assign]
    client = connect(served)
    streams = [client.completions.create(model="small", prompt="Q1:", stream=True) for _ in range(2)]
    for stream in streams:  # one record is being written, the other waits for its turn
        next(iter(stream))
    assert writing.wait(LONG)
    _until(lambda: served.service.admission.rows == 0)
    for stream in streams:
        stream.close()
    go_on.set()
    _until(lambda: len(list(read_records(path))) == 2)


# --- sessions


def session(name: str) -> dict[str, Any]:
    return {"midstream": {"session": name}}


def test_a_named_session_is_there_for_the_next_request(serve: Serve, connect: Connect) -> None:
    says = {"set": "<code>x = 41</code>", "get": "<code>x + 1</code>"}
    served = serve(keys=keys_of("ann", "bob"))
    served.upstream.rows += _kept(served, says)
    ann, bob = (connect(served, f"key of {name}") for name in ("ann", "bob"))
    first = ann.completions.create(model="small", prompt="set", extra_body=session("s"))
    assert first.model_extra["midstream"]["session"] == {"id": "s", "new": True}  # type: ignore[index]
    second = ann.completions.create(model="small", prompt="get", extra_body=session("s"))
    assert second.choices[0].text == "<code>x + 1</code><result>42</result>"
    assert second.model_extra["midstream"]["session"] == {"id": "s", "new": False}  # type: ignore[index]
    # Neither another client nor another name nor no name has it.
    for client, extra in ((bob, session("s")), (ann, session("t")), (ann, {})):
        other = client.completions.create(model="small", prompt="get", max_tokens=40, extra_body=extra)
        calls = other.choices[0].model_extra["midstream"]["calls"]  # type: ignore[index]
        assert calls[0]["error"]["type"] == "NameError"


def _kept(served: Any, says: dict[str, str]) -> list[Any]:
    """Rows that say ``says``, whose results are those of one session."""
    kept = KeptSession()
    with Generator(
        ScriptedEngine(served.generator.engine.tokenizer, says),
        pool=served.generator._sessions._pool,
        hold_sessions=LONG,
    ) as generator:
        return [generator.submit(text, session=kept).result(LONG) for text in says]


def test_a_session_is_ended_by_its_client(serve: Serve, connect: Connect) -> None:
    served = serve(keys=keys_of("ann", "bob"))
    served.upstream.rows += _kept(served, {"set": "<code>x = 41</code>", "get": "<code>x + 1</code>"})
    ann, bob = (connect(served, f"key of {name}") for name in ("ann", "bob"))
    ann.completions.create(model="small", prompt="set", extra_body=session("a/b"))
    with pytest.raises(openai.NotFoundError):
        bob.delete("/sessions/a/b", cast_to=object)
    ann.delete("/sessions/a/b", cast_to=object)
    answer = ann.completions.create(model="small", prompt="get", max_tokens=40, extra_body=session("a/b"))
    assert answer.choices[0].model_extra["midstream"]["calls"][0]["error"]["type"] == "NameError"  # type: ignore[index]


def test_a_session_in_use_is_refused(serve: Serve, connect: Connect) -> None:
    gate = Gate()
    gate.opened.set()
    served = serve({"Q:": "<code>hold()</code>"}, tools={"hold": gate})
    gate.opened.clear()
    gate.reached.clear()
    client = connect(served)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(client.completions.create, model="small", prompt="Q:", extra_body=session("s"))
        assert gate.reached.wait(LONG)
        with pytest.raises(openai.ConflictError, match="'s' is in use"):
            client.completions.create(model="small", prompt="Q:", extra_body=session("s"))
        with pytest.raises(openai.ConflictError, match="'s' is in use"):
            client.delete("/sessions/s", cast_to=object)
        gate.opened.set()
        assert first.result().choices[0].text == "<code>hold()</code><result>'through'</result>"


# --- refusals


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 10_000}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"seed": 1.5}, "seed"),
        ({"logprobs": 3}, "logprobs"),
        ({"echo": True}, "echo"),
        ({"best_of": 3}, "best_of"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"suffix": "x"}, "suffix"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_everything": True}}, "stream_options"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": "far too long " * 200}, "prompt"),
        ({"extra_body": {"colour": "blue"}}, "colour"),
        ({"extra_body": {"midstream": {"sesion": "s"}}}, "midstream"),
        ({"extra_body": {"midstream": {"session": ""}}}, "midstream"),
        ({"extra_body": {"midstream": {"session": "s"}}, "n": 2}, "midstream.session"),
    ],
    ids=str,
)
def test_a_field_that_cannot_be_is_named(serve: Serve, connect: Connect, options: dict[str, Any], param: str) -> None:
    served = serve()
    with pytest.raises(openai.BadRequestError) as refused:
        connect(served).completions.create(**{"model": "small", "prompt": "Q", **options})
    assert refused.value.param == param
    assert param in refused.value.message
    assert refused.value.type == "invalid_request_error"
    assert served.service.admission.rows == 0


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages[0].name"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True, "top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 3}, "max_tokens"),
    ],
    ids=str,
)
def test_a_field_of_a_chat_that_cannot_be_is_named(
    serve: Serve, connect: Connect, options: dict[str, Any], param: str
) -> None:
    client = connect(serve())
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**{"model": "small", "messages": [{"role": "user", "content": "Q"}], **options})
    assert refused.value.param == param


def test_fields_that_ask_for_nothing_are_taken(serve: Serve, connect: Connect) -> None:
    messages = chat("Q")
    answer = connect(serve([(messages, "A")])).chat.completions.create(
        model="small",
        messages=messages,  # type: ignore[arg-type]
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        tools=[],
        response_format={"type": "text"},
        store=False,
        seed=None,
        stop=None,
        extra_body={"top_k": -1},
    )
    assert answer.choices[0].message.content == "A"


def test_another_model_and_another_route_are_not_found(serve: Serve, connect: Connect) -> None:
    client = connect(serve())
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").id == "small"
    with pytest.raises(openai.NotFoundError, match="'large' is not served here"):
        client.completions.create(model="large", prompt="Q")
    with pytest.raises(openai.NotFoundError, match="no such route"):
        client.embeddings.create(model="small", input="x")


@pytest.mark.parametrize("key", ["", "key of eve", "KEY OF ANN"])
def test_keys(serve: Serve, connect: Connect, key: str) -> None:
    served = serve(SAYS, keys=keys_of("ann"))
    with pytest.raises(openai.AuthenticationError):
        connect(served, key or "-").completions.create(model="small", prompt="Q1:")
    assert connect(served, "key of ann").completions.create(model="small", prompt="Q1:").choices[0].text == TEXTS["Q1:"]


def test_a_server_that_fails_for_a_moment_is_asked_again(serve: Serve, connect: Connect) -> None:
    served = serve(SAYS)
    served.upstream.troubles = [Trouble("error event", after=3), Trouble("error event", after=3)]
    client = connect(served)
    answer = client.completions.create(model="small", prompt="Q1:")
    assert answer.choices[0].text == TEXTS["Q1:"]  # what is asked again comes out the same


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_fails_for_good(serve: Serve, connect: Connect, stream: bool) -> None:
    once = {"connection": ServerConnection(retries=0, after_break="fail")}
    served = serve(SAYS, engine=once)
    served.upstream.troubles = [Trouble("503")]
    client = connect(served)
    with pytest.raises(openai.InternalServerError, match="the server behind this one failed") as failed:
        list(client.completions.create(model="small", prompt="Q1:", stream=stream))
    assert failed.value.status_code == 502
    served.upstream.troubles = [Trouble("cut", after=5)]
    with pytest.raises(openai.APIError, match="the server behind this one failed"):
        list(client.completions.create(model="small", prompt="Q1:", stream=stream))
    assert served.service.admission.rows == 0
    assert client.completions.create(model="small", prompt="Q1:").choices[0].text == TEXTS["Q1:"]


def test_an_upstream_of_text_alone(serve: Serve, connect: Connect) -> None:
    served = serve(SAYS, upstream={"speaks": "text"}, engine={"text_only": True})
    client = connect(served)
    answer = client.completions.create(model="small", prompt="Q1:")
    assert answer.choices[0].text == TEXTS["Q1:"]
    assert answer.choices[0].model_extra["midstream"]["fit_for_training"] is False  # type: ignore[index]
    with pytest.raises(openai.BadRequestError, match="logprobs: the server behind this one gives none"):
        client.completions.create(model="small", prompt="Q1:", logprobs=0)


# --- many at once


def test_a_slow_block_stalls_no_other_request(serve: Serve, connect: Connect) -> None:
    gate = Gate()
    gate.opened.set()
    served = serve({**SAYS, "slow": "<code>hold()</code>"}, tools={"hold": gate})
    gate.opened.clear()
    gate.reached.clear()
    client = connect(served)
    with ThreadPoolExecutor(1) as threads:
        slow = threads.submit(client.completions.create, model="small", prompt="slow")
        assert gate.reached.wait(LONG)
        for prompt in SAYS:
            assert client.completions.create(model="small", prompt=prompt).choices[0].text == TEXTS[prompt]
        assert not slow.done()
        gate.opened.set()
        assert slow.result().choices[0].text == "<code>hold()</code><result>'through'</result>"


def test_many_requests_at_once(serve: Serve, connect: Connect) -> None:
    served = serve(SAYS, bounds=ServiceLimits(rows=8))
    client = connect(served)
    prompts = [*SAYS] * 20

    def ask(number: int) -> str:
        prompt = prompts[number]
        if number % 2:
            return client.completions.create(model="small", prompt=prompt).choices[0].text
        stream = client.completions.create(model="small", prompt=prompt, stream=True)
        return "".join(chunk.choices[0].text for chunk in stream)

    with ThreadPoolExecutor(20) as threads:
        texts = list(threads.map(ask, range(len(prompts))))
    assert texts == [TEXTS[prompt] for prompt in prompts]
    assert served.upstream.most_under_way <= 8
    assert served.service.admission.rows == 0


def test_the_queue_is_bounded(serve: Serve, connect: Connect) -> None:
    gate = Gate()
    gate.opened.set()
    served = serve({"Q:": "<code>hold()</code>"}, tools={"hold": gate}, bounds=ServiceLimits(rows=1, queue=1))
    gate.opened.clear()
    gate.reached.clear()
    client = connect(served)
    with ThreadPoolExecutor(2) as threads:
        asks = [threads.submit(client.completions.create, model="small", prompt="Q:") for _ in range(2)]
        assert gate.reached.wait(LONG)
        _until(lambda: served.service.admission.rows == 2)
        with pytest.raises(openai.InternalServerError, match="the queue is full") as refused:
            client.completions.create(model="small", prompt="Q:")
        assert refused.value.status_code == 503
        assert int(refused.value.response.headers["retry-after"]) >= 1
        gate.opened.set()
        assert {ask.result().choices[0].finish_reason for ask in asks} == {"stop"}


def _until(condition: Any) -> None:
    waiting = threading.Event()
    for _ in range(int(LONG * 100)):
        if condition():
            return
        waiting.wait(0.01)
    raise AssertionError("it never came to be")


def test_bounds_of_one_client(serve: Serve, connect: Connect) -> None:
    gate = Gate()
    gate.opened.set()
    served = serve(
        {**SAYS, "Q:": "<code>hold()</code>"},
        tools={"hold": gate},
        bounds=ServiceLimits(rows_per_client=1),
        keys=keys_of("ann", "bob"),
    )
    gate.opened.clear()
    gate.reached.clear()
    ann, bob = (connect(served, f"key of {name}") for name in ("ann", "bob"))
    with ThreadPoolExecutor(1) as threads:
        slow = threads.submit(ann.completions.create, model="small", prompt="Q:")
        assert gate.reached.wait(LONG)
        with pytest.raises(openai.RateLimitError, match="1 answers at a time") as refused:
            ann.completions.create(model="small", prompt="Q1:")
        assert refused.value.response.headers["retry-after"] == "1"
        assert bob.completions.create(model="small", prompt="Q1:").choices[0].text == TEXTS["Q1:"]
        gate.opened.set()
        slow.result()
    assert ann.completions.create(model="small", prompt="Q1:").choices[0].text == TEXTS["Q1:"]
    with pytest.raises(openai.BadRequestError, match="1 are the most"):
        ann.completions.create(model="small", prompt="Q1:", n=2)


def test_requests_a_minute(serve: Serve, connect: Connect) -> None:
    served = serve(SAYS, bounds=ServiceLimits(requests_per_minute=2), keys=keys_of("ann", "bob"))
    ann, bob = (connect(served, f"key of {name}") for name in ("ann", "bob"))
    served.service.admission.clock = lambda: 0.0
    for _ in range(2):
        ann.completions.create(model="small", prompt="Q1:")
    with pytest.raises(openai.RateLimitError, match="2 requests a minute") as refused:
        ann.completions.create(model="small", prompt="Q1:")
    assert refused.value.response.headers["retry-after"] == "30"
    bob.completions.create(model="small", prompt="Q1:")
    served.service.admission.clock = lambda: 30.0
    ann.completions.create(model="small", prompt="Q1:")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_row_and_its_session(serve: Serve, connect: Connect, stream: bool) -> None:
    gate = Gate()
    gate.opened.set()
    with SandboxPool(preload=[], max_sessions=1) as pool:
        served = serve({**SAYS, "Q:": "a <code>hold()</code>"}, tools={"hold": gate}, pool=pool)
        gate.opened.clear()
        gate.reached.clear()
        client = connect(served)
        if stream:
            answer = client.completions.create(model="small", prompt="Q:", stream=True)
            next(iter(answer))
            assert gate.reached.wait(LONG)
            answer.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                client.with_options(timeout=0.5).completions.create(model="small", prompt="Q:")
        _until(lambda: served.service.admission.rows == 0)
        # Its one session is free for the next.
        answer = client.completions.create(model="small", prompt="Q1:")
        assert answer.choices[0].text == TEXTS["Q1:"]
        gate.opened.set()


def test_a_client_that_leaves_in_the_middle_of_tokens_ends_the_request_behind(serve: Serve, connect: Connect) -> None:
    served = serve({"Q:": "word " * 300}, upstream={"pace": 0.01})
    answer = connect(served).completions.create(model="small", prompt="Q:", stream=True)
    next(iter(answer))
    answer.close()
    _until(lambda: served.service.admission.rows == 0 and served.upstream.under_way == 0)
    assert served.upstream.broken_off == 1


def test_stopping_finishes_what_runs_and_refuses_what_comes(serve: Serve, connect: Connect) -> None:
    gate = Gate()
    gate.opened.set()
    served = serve({**SAYS, "Q:": "<code>hold()</code>"}, tools={"hold": gate})
    gate.opened.clear()
    gate.reached.clear()
    client = connect(served)
    with ThreadPoolExecutor(2) as threads:
        slow = threads.submit(client.completions.create, model="small", prompt="Q:")
        assert gate.reached.wait(LONG)
        draining = threads.submit(served.within, served.service.drain(LONG))
        _until(lambda: served.service.draining)
        with pytest.raises(openai.InternalServerError, match="stopping") as refused:
            client.completions.create(model="small", prompt="Q1:")
        assert (refused.value.status_code, refused.value.response.headers["retry-after"]) == (503, "5")
        assert not draining.done()
        gate.opened.set()
        assert slow.result().choices[0].text == "<code>hold()</code><result>'through'</result>"
        draining.result()


def test_a_generator_that_was_closed_is_no_fault_of_the_client_s(serve: Serve, connect: Connect) -> None:
    served = serve()
    served.generator.close()
    with pytest.raises(openai.InternalServerError, match="stopping") as refused:
        connect(served).completions.create(model="small", prompt="Q1:")
    assert refused.value.status_code == 503
    assert served.service.admission.rows == 0


def test_a_fault_of_ours_before_the_row_begins_is_none_of_the_prompt_s(serve: Serve, connect: Connect) -> None:
    served = serve()

    def submit(*_: Any, **__: Any) -> Any:
        raise SandboxError("the fork server is gone")

    served.generator.submit = submit  # type: ignore[method-assign]
    with pytest.raises(openai.InternalServerError, match="the server failed") as refused:
        connect(served).completions.create(model="small", prompt="Q1:")
    assert refused.value.status_code == 500
    assert "fork server" not in str(refused.value)
    assert served.service.admission.rows == 0


def test_what_is_not_done_in_time_is_cut_off(serve: Serve, connect: Connect) -> None:
    gate = Gate()
    gate.opened.set()
    served = serve({"Q:": "<code>hold()</code>"}, tools={"hold": gate})
    gate.opened.clear()
    gate.reached.clear()
    client = connect(served)
    with ThreadPoolExecutor(1) as threads:
        slow = threads.submit(client.completions.create, model="small", prompt="Q:")
        assert gate.reached.wait(LONG)
        served.within(served.service.drain(0.01))
        with pytest.raises(openai.InternalServerError, match="stopping"):
            slow.result()
        gate.opened.set()
