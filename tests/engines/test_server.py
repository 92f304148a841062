"""The engine over servers: each route gives the rows that the scripted engine gives, and what lacks is named."""

from __future__ import annotations

import gc
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from midstream import Generator, Limits, Media, Prompt, Sampling, ServerConnection, ServerEngine, StopKind, Trajectory
from midstream.engines.base import RowRequest, Update
from midstream.errors import (
    CapabilityError,
    ConfigurationError,
    EngineError,
    PromptError,
    ProtocolError,
    TokenizerError,
)
from midstream.testing import check_engine
from midstream.testing.steering import CONTEXT
from midstream.testing.steering import VOCABULARY as STEERED
from tests.rollouts import VOCABULARY, essence, open_descriptors, rollouts
from tests.serving import FakeServer
from tests.vocabularies import tokenizer, vocabulary

GREEDY = Sampling(temperature=0.0)
KNOWN = vocabulary(VOCABULARY)
SCRIPTS = {
    "two blocks": "<code>x = 3; y = 4</code>\nThis is text.\n<code>x + y</code> So it is 7.",
    "overhang": "It is <code>6 * 7</code>The end.",
    "no code": "An end tag </code> alone is text.",
    "fails": "<code>1 / 0</code> so it goes.",
    "stops": "<code>print('HALT')</code> then HALT and more",
    "endless": "word " * 80,
}
LIMITS = Limits(max_new_tokens=60, stop_strings=("HALT",))
SPOKEN = ["completions", "generate", "sglang", "sglang incremental"]

MakeServer = Callable[..., FakeServer]
MakeEngine = Callable[..., ServerEngine]


@pytest.fixture(scope="session")
def expected(sandboxes: Any) -> list[Trajectory]:
    """The rows of :data:`SCRIPTS` on the scripted engine."""
    return list(rollouts(SCRIPTS, sandboxes, limits=LIMITS, sampling=GREEDY))


@pytest.fixture
def serve(expected: list[Trajectory]) -> Iterator[MakeServer]:
    made = []

    def make(**behaviour: Any) -> FakeServer:
        made.append(FakeServer(KNOWN, expected, **behaviour))
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.fixture
def connect() -> Iterator[MakeEngine]:
    made = []

    def make(server: FakeServer | str, **options: Any) -> ServerEngine:
        url = server if isinstance(server, str) else server.url
        options.setdefault("connection", ServerConnection(first_wait=0.001, retries=2))
        engine = ServerEngine(url, tokenizer(VOCABULARY), **options)
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.shutdown()
    assert not [thread for thread in threading.enumerate() if thread.name == "midstream-server"]
    made.clear()
    with warnings.catch_warnings():
        # Connections that are given up in the middle are collected here, not in whichever test comes later.
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def generate(engine: ServerEngine, pool: Any, **options: Any) -> list[Trajectory]:
    with Generator(engine, pool=pool, limits=LIMITS, **({"sampling": GREEDY} | options)) as generator:
        return list(generator.generate([Prompt(text=text, id=text) for text in SCRIPTS]))


def step_until(engine: ServerEngine, wanted: Callable[[list[Update]], bool]) -> list[Update]:
    seen: list[Update] = []
    until = time.monotonic() + 60
    while not wanted(seen):
        assert time.monotonic() < until, seen
        seen += engine.step()
    return seen


def ids_of(updates: list[Update]) -> list[int]:
    return [i for update in updates for i in update.ids]


# --- exactness


@pytest.mark.parametrize("stop_strings", [True, False])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("speaks", SPOKEN)
def test_every_route_gives_the_rows_of_the_scripted_engine(
    serve: MakeServer,
    connect: MakeEngine,
    expected: list[Trajectory],
    sandboxes: Any,
    speaks: str,
    stream: bool,
    stop_strings: bool,
) -> None:
    server = serve(speaks=speaks)
    engine = connect(server, stream=stream, stop_strings=stop_strings)
    rows = generate(engine, sandboxes)
    assert [row.ids for row in rows] == [row.ids for row in expected]
    assert [row.mask for row in rows] == [row.mask for row in expected]
    assert [row.stop for row in rows] == [row.stop for row in expected]
    assert [row.text for row in rows] == [row.text for row in expected]
    for row in rows:
        assert row.fit_for_training
        assert row.logprob_kind == "raw"
        given = server._logprobs((), row.ids, row.total_length, 0.0)
        assert row.logprobs == [value if own else 0.0 for value, own in zip(given, row.mask, strict=True)]
    if not stream:
        assert any(row.discarded for row in rows) is not stop_strings
    assert {
        len(request.get("stop", request.get("sampling_params", {}).get("stop", ()))) for request in server.requests[3:]
    } == {2 if stop_strings else 0}
    step_until(engine, lambda _: engine.unfinished == 0)


def test_ids_are_read_from_names_where_an_older_vllm_gives_no_others(
    serve: MakeServer, connect: MakeEngine, expected: list[Trajectory], sandboxes: Any
) -> None:
    engine = connect(serve(lacks=frozenset({"token_ids", "prompt_token_ids"})))
    assert [row.ids for row in generate(engine, sandboxes)] == [row.ids for row in expected]


def test_sampled_rows_are_repeatable_and_samples_differ(serve: MakeServer, connect: MakeEngine, sandboxes: Any) -> None:
    engine = connect(serve())
    with Generator(engine, pool=sandboxes, limits=Limits(12), sampling=Sampling(0.9, top_k=7, top_p=0.8)) as generator:
        first, second = (list(map(essence, generator.generate(["a", "b"], n=3))) for _ in range(2))
    assert first == second
    assert len({tuple(row.ids) for row in first}) == 6


@pytest.mark.parametrize("speaks", SPOKEN)
def test_sampling_is_sent_in_full(serve: MakeServer, connect: MakeEngine, speaks: str) -> None:
    server = serve(speaks=speaks)
    engine = connect(server)
    engine.open(
        RowRequest((5, 6), Sampling(0.7, 11, 0.9), seed=3, max_total_tokens=9, stop_ids=(8,), stop_strings=("ab",))
    )
    step_until(engine, lambda updates: any(update.exhausted for update in updates))
    sent = server.requests[-1]
    params = sent.get("sampling_params", sent)
    assert [params[name] for name in ("temperature", "top_k", "top_p", "min_p")] == [0.7, 11, 0.9, 0.0]
    assert [params[f"{kind}_penalty"] for kind in ("repetition", "presence", "frequency")] == [1.0, 0.0, 0.0]
    assert params.get("max_tokens", params.get("max_new_tokens")) == 7
    assert (params["stop"], params["stop_token_ids"], params["skip_special_tokens"]) == (["ab"], [8], False)
    assert isinstance(params.get("seed", params.get("sampling_seed")), int)


def test_an_end_of_the_servers_own_ends_the_row(
    serve: MakeServer, connect: MakeEngine, expected: Any, sandboxes: Any
) -> None:
    own = expected[2].ids[len(expected[2].prompt_ids) + 3]
    rows = generate(connect(serve(own_stop=own)), sandboxes)
    assert (rows[2].stop.kind, rows[2].stop.detail, rows[2].generation_length) == (StopKind.STOP_ID, str(own), 4)


def test_an_eos_that_the_row_ignores_is_gone_on_from(serve: MakeServer, connect: MakeEngine, sandboxes: Any) -> None:
    with Generator(connect(serve()), pool=sandboxes, limits=Limits(30, ignore_eos=True), sampling=GREEDY) as generator:
        (row,) = generator.generate([Prompt(text="no code", id="no code")])
    (eos,) = KNOWN.eos_ids
    assert eos in row.ids[:-1]
    assert (row.generation_length, row.stop.kind) == (30, StopKind.LENGTH)


@pytest.mark.parametrize(("speaks", "stream"), [("sglang", True), ("completions", False)])
def test_the_public_suite_passes(sandboxes: Any, speaks: str, stream: bool) -> None:
    server = FakeServer(STEERED, speaks=speaks, steered=True, context_length=CONTEXT)
    try:
        outcomes = check_engine(
            lambda steering: ServerEngine(server.url, steering.tokenizer, stream=stream), pool=sandboxes
        )
    finally:
        server.close()
    assert len(outcomes) > 20


# --- the probe


def test_what_a_server_lacks_is_named(serve: MakeServer, connect: MakeEngine) -> None:
    with pytest.raises(CapabilityError, match=r"no logprobs \(choices\[0\].logprobs.token_logprobs\).*404.*text_only"):
        connect(serve(lacks=frozenset({"token_logprobs"})))
    with pytest.raises(CapabilityError, match=r"POST /v1/completions: the answer has no token ids"):
        connect(serve(lacks=frozenset({"token_ids", "tokens"})))
    with pytest.raises(CapabilityError, match=r"choices\[0\]\.token_ids"):
        connect(serve(speaks="generate", lacks=frozenset({"token_ids"})))
    with pytest.raises(CapabilityError, match=r"choices\[0\]\.logprobs\.content"):
        connect(serve(speaks="generate", lacks=frozenset({"logprobs"})))
    with pytest.raises(CapabilityError, match="return_logprob"):
        connect(serve(speaks="sglang", lacks=frozenset({"output_token_logprobs"})))
    with pytest.raises(CapabilityError, match="no token ids"):
        connect(serve(speaks="text"))


@pytest.mark.parametrize("speaks", SPOKEN)
@pytest.mark.parametrize("processed", [False, True])
def test_the_kind_of_logprobs_is_found_out(
    serve: MakeServer, connect: MakeEngine, speaks: str, processed: bool
) -> None:
    assert connect(serve(speaks=speaks, processed=processed)).capabilities.logprobs == (
        "processed" if processed else "raw"
    )


def test_the_kind_of_logprobs_can_be_said(serve: MakeServer, connect: MakeEngine) -> None:
    server = serve(lacks=frozenset({"top_logprobs"}))
    with pytest.raises(CapabilityError, match="say logprobs='raw'"):
        connect(server)
    assert connect(server, logprobs="processed").capabilities.logprobs == "processed"


@pytest.mark.parametrize("speaks", SPOKEN)
def test_another_tokenizer_is_refused(serve: MakeServer, connect: MakeEngine, speaks: str) -> None:
    with pytest.raises(TokenizerError, match="is another than that of the model"):
        connect(serve(speaks=speaks, shift=5))


def test_ids_beyond_the_vocabulary_end_their_row(serve: MakeServer, connect: MakeEngine) -> None:
    server = serve()
    engine = connect(server)
    server.behaviour.overrides = {"token_ids": [KNOWN.size]}
    (handle,) = engine.open(RowRequest((5,), GREEDY))
    (update,) = step_until(engine, bool)
    assert update.error is not None
    assert (update.handle, list(update.ids)) == (handle, [])
    assert f"the server gave id {KNOWN.size}" in update.error


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"token_ids": [5, 6]}, "2 ids but 1 logprobs"),
        ({"token_ids": [-4]}, "ids that are none"),
        ({"token_ids": [True]}, "ids that are none"),
        ({"prompt_token_ids": [5, 7]}, "other prompt ids"),
        ({"logprobs": {"token_logprobs": [-9999.0]}}, "not finite"),
        ({"logprobs": {"token_logprobs": [None]}}, "not finite"),
        ({"logprobs": {"token_logprobs": 4}}, "unknown shape"),
        ({"finish_reason": "abort"}, "ended the answer with 'abort'"),
    ],
)
def test_answers_that_cannot_be_end_their_row(
    serve: MakeServer, connect: MakeEngine, overrides: dict[str, Any], message: str
) -> None:
    server = serve()
    engine = connect(server)
    server.behaviour.overrides = overrides
    engine.open(RowRequest((5, 6), GREEDY))
    (update,) = step_until(engine, bool)
    assert message in str(update.error)
    assert engine.step() == []


def test_ids_that_sglang_tells_twice_must_agree(serve: MakeServer, connect: MakeEngine) -> None:
    server = serve(speaks="sglang")
    engine = connect(server)
    server.behaviour.overrides = {"output_ids": [4]}
    engine.open(RowRequest((5, 6), GREEDY))
    (update,) = step_until(engine, bool)
    assert "hold other ids" in str(update.error)


def test_a_server_that_is_not_there(connect: MakeEngine) -> None:
    with pytest.raises(EngineError, match=r"ConnectError.*\(after 2 retries\)"):
        connect("http://127.0.0.1:1")
    assert not [thread for thread in threading.enumerate() if thread.name == "midstream-server"]


def test_keys(serve: MakeServer, connect: MakeEngine) -> None:
    server = serve(api_key="s3cret")
    with pytest.raises(EngineError, match="refuses requests without an API key"):
        connect(server)
    with pytest.raises(EngineError, match="refuses requests with this API key") as caught:
        connect(server, connection=ServerConnection(api_key="wr0ng"))
    assert "wr0ng" not in str(caught.value)
    connection = ServerConnection(api_key="s3cret", headers={"x-team": "blue"}, body={"priority": 3})
    assert "s3cret" not in repr(connection)
    connect(server, connection=connection)
    assert server.requests[-1]["priority"] == 3
    assert server.headers[-1]["x-team"] == "blue"


@pytest.mark.parametrize("field", ["stream", "seed", "prompt"])
def test_what_the_engine_sets_itself_is_not_to_be_set(serve: MakeServer, connect: MakeEngine, field: str) -> None:
    with pytest.raises(ConfigurationError, match=f"ServerConnection.body: holds {field}, which the engine itself sets"):
        connect(serve(), connection=ServerConnection(body={field: 1, "priority": 2}))


def test_models(serve: MakeServer, connect: MakeEngine) -> None:
    server = serve(models=("base", "tuned"))
    with pytest.raises(ConfigurationError, match="model=None: the server has 'base', 'tuned'; name one"):
        connect(server)
    with pytest.raises(ConfigurationError, match="model='other': the server has"):
        connect(server, model="other")
    connect(server, model="tuned")
    assert {request["model"] for request in server.requests} == {"tuned"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000"}, "url='localhost:8000'"),
        ({"url": "ftp://x"}, "url='ftp://x'"),
        ({"url": "http://me:pass@x"}, "holds a user or a password"),
        ({"url": "http://x/?key=1"}, "must end with its path"),
        ({"route": "openai"}, "route='openai': must be one of 'auto'"),
        ({"text_only": True, "stream": False}, "text_only=True"),
        ({"text_only": True, "route": "sglang"}, "text_only=True"),
        ({"logprobs": "cooked"}, "logprobs='cooked'"),
        ({"context_length": 1}, "context_length=1"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        ServerEngine(options.pop("url", "http://127.0.0.1:1"), tokenizer(VOCABULARY), **options)
    assert "pass@" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_requests", 0),
        ("max_requests", True),
        ("retries", -1),
        ("connect_timeout", None),
        ("connect_timeout", 0),
        ("idle_timeout", -1),
        ("request_timeout", "soon"),
        ("give_up_after", float("inf")),
        ("first_wait", -0.1),
        ("after_break", "retry"),
    ],
)
def test_connections_that_cannot_be_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"ServerConnection.{field}={value!r}"):
        ServerConnection(**{field: value})


def test_urls_may_have_the_path_of_the_api(serve: MakeServer, connect: MakeEngine) -> None:
    connect(serve().url + "/v1/")


# --- rows


def test_contexts(serve: MakeServer, connect: MakeEngine) -> None:
    assert connect(serve()).context_length == 1000
    assert connect(serve(), context_length=90).context_length == 90
    unbounded = connect(serve(context_length=None))
    assert unbounded.context_length is None
    with pytest.raises(ConfigurationError, match="give context_length"):
        unbounded.open(RowRequest((5,), GREEDY))
    short = connect(serve(), context_length=5)
    with pytest.raises(PromptError, match="6 of them do not fit"):
        short.open(RowRequest((5,) * 6, GREEDY))
    short.open(RowRequest((5,) * 3, GREEDY))
    updates = step_until(short, lambda updates: any(update.exhausted for update in updates))
    assert len(ids_of(updates)) == 2


def test_what_a_route_samples_otherwise_is_refused(serve: MakeServer, connect: MakeEngine) -> None:
    request = RowRequest((5,), Sampling(top_p=0.9, min_p=0.1))
    for speaks in ("completions", "generate"):
        with pytest.raises(CapabilityError, match="min_p before top_p"):
            connect(serve(speaks=speaks)).open(request)
    assert connect(serve(speaks="sglang")).open(request)
    with pytest.raises(CapabilityError, match="no media"):
        connect(serve()).open(RowRequest((5,), media=(Media("image/png", b""),)))


def test_rows_are_held_rolled_back_extended_and_forked(serve: MakeServer, connect: MakeEngine, expected: Any) -> None:
    server = serve(pace=0.002)
    engine = connect(server)
    row = expected[5]
    (handle,) = engine.open(RowRequest(row.prompt_ids, GREEDY, max_total_tokens=60))
    first = ids_of(step_until(engine, lambda updates: len(ids_of(updates)) >= 5))
    engine.rollback(handle, len(first) - 3)
    assert engine.step() == []
    twin = engine.fork(handle, 4)
    engine.extend(handle, ())
    engine.extend(twin, [7, 7])
    updates = step_until(engine, lambda updates: sum(update.exhausted for update in updates) == 2)
    ours = [i for update in updates if update.handle == handle for i in update.ids]
    assert [*row.prompt_ids, *first[:3], *ours] == row.ids[:60]
    both = server.requests[-2:]  # they go out together, and may come in in either order
    assert both[0].keys() == both[1].keys()
    assert [*row.prompt_ids, *first[:3], 7, 7] in [request["prompt"] for request in both]
    with pytest.raises(ProtocolError, match="not held"):
        engine.extend(handle, ())
    engine.close(handle)
    with pytest.raises(ProtocolError, match="no row"):
        engine.close(handle)


def test_requests_of_rows_that_are_over_are_given_up(serve: MakeServer, connect: MakeEngine) -> None:
    server = serve(pace=0.01)
    engine = connect(server)
    handles = [engine.open(RowRequest((5, i), GREEDY))[0] for i in range(4)]
    step_until(engine, lambda updates: {update.handle for update in updates} == set(handles))
    engine.close(handles[0])
    engine.pause()
    assert engine.step() == []
    until = time.monotonic() + 60
    while server.under_way or engine.unfinished:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert server.broken_off == 4
    engine.resume()
    after = step_until(engine, lambda updates: {update.handle for update in updates} == set(handles[1:]))
    assert all(update.error is None for update in after)


def test_no_more_requests_are_under_way_than_allowed(
    serve: MakeServer, connect: MakeEngine, expected: Any, sandboxes: Any
) -> None:
    server = serve(pace=0.001)
    rows = generate(connect(server, connection=ServerConnection(max_requests=2)), sandboxes)
    assert [row.ids for row in rows] == [row.ids for row in expected]
    assert server.most_under_way == 2


def test_connections_are_used_again(serve: MakeServer, connect: MakeEngine, sandboxes: Any) -> None:
    server = serve()
    generate(connect(server, connection=ServerConnection(max_requests=1)), sandboxes)
    assert len(server.requests) > 12
    assert server.connections <= 4  # one, and another for each answer that the row's limit ended


def test_slow_rows_hold_up_no_others(serve: MakeServer, connect: MakeEngine) -> None:
    server = serve(pace=0.05)
    engine = connect(server)
    slow, fast = (engine.open(RowRequest((5, i), GREEDY, max_total_tokens=n))[0] for i, n in ((1, 500), (2, 5)))
    updates = step_until(engine, lambda updates: any(update.exhausted for update in updates))
    assert [update.handle for update in updates if update.exhausted] == [fast]
    engine.close(slow)


def test_nothing_is_left_behind(serve: MakeServer, expected: Any) -> None:
    server = serve(pace=0.01)
    before = open_descriptors()
    threads = set(threading.enumerate())
    engine = ServerEngine(server.url, tokenizer(VOCABULARY))
    engine.open(RowRequest((5,), GREEDY), 3)
    step_until(engine, lambda updates: len({update.handle for update in updates}) == 3)
    engine.shutdown()
    engine.shutdown()
    until = time.monotonic() + 60
    while open_descriptors() != before and time.monotonic() < until:
        time.sleep(0.01)  # the server's side closes a moment later
    assert open_descriptors() == before
    assert set(threading.enumerate()) == threads


# --- weights


def test_weight_versions_are_the_servers_where_it_tells_numbers(serve: MakeServer, connect: MakeEngine) -> None:
    request = RowRequest((5,), GREEDY, max_total_tokens=6)

    def versions(engine: ServerEngine) -> list[int]:
        engine.open(request)
        updates = step_until(engine, lambda updates: any(update.exhausted for update in updates))
        return [update.weight_version for update in updates for _ in update.ids]

    assert versions(connect(serve(speaks="sglang", versions="12"), weight_version=3)) == [12] * 5
    assert versions(connect(serve(speaks="sglang"), weight_version=3)) == [3] * 5
    assert versions(connect(serve(speaks="generate", versions=("7", "8")), stream=False)) == [7, 7, 8, 8, 8]
    assert versions(connect(serve(speaks="generate", versions="9"), weight_version=3)) == [9] * 5
    engine = connect(serve(speaks="completions"), weight_version=3)
    engine.weight_version = 4
    assert versions(engine) == [4] * 5


def test_a_stream_whose_weights_are_others_than_its_ids_say_fails(serve: MakeServer, connect: MakeEngine) -> None:
    server = serve(speaks="generate")
    engine = connect(server, weight_version=3)
    server.behaviour.versions = "4"
    engine.open(RowRequest((5,), GREEDY, max_total_tokens=6))
    updates = step_until(engine, lambda updates: any(update.error for update in updates))
    assert "are of version 4" in str(updates[-1].error)


def test_new_weights_cannot_be_put_in_from_here(serve: MakeServer, connect: MakeEngine) -> None:
    engine = connect(serve())
    assert not engine.capabilities.set_weights
    with pytest.raises(CapabilityError, match="set this engine's weight_version"):
        engine.set_weights(2, keep_cache=True)


# --- text only


def test_text_only_gives_the_same_texts_and_marks_them(
    serve: MakeServer, connect: MakeEngine, expected: list[Trajectory], sandboxes: Any
) -> None:
    engine = connect(serve(speaks="text"), text_only=True)
    with Generator(engine, pool=sandboxes, limits=LIMITS, sampling=GREEDY) as generator:
        rows = generator.generate([Prompt(text=text, id=text) for text in SCRIPTS])
    assert [row.text for row in rows] == [row.text for row in expected]
    assert [row.stop for row in rows] == [row.stop for row in expected]
    assert not any(row.fit_for_training for row in rows)
    assert engine.capabilities.logprobs is None
    assert not engine.capabilities.exact_ids
    with pytest.raises(ConfigurationError, match=r"trajectories \[0, 1, 2, 3, 4, 5\] of this batch are not fit"):
        rows.to_tensors()
    assert not rows.to_tensors(allow_unfit=True)["logprobs"].any()
    with pytest.raises(CapabilityError, match="temperature and top_p alone"):
        engine.open(RowRequest((5,), Sampling(top_k=3)))


def test_a_server_without_text_is_refused_for_text_only(serve: MakeServer, connect: MakeEngine) -> None:
    with pytest.raises(EngineError, match=r"no text \(choices\[0\].text\)"):
        connect(serve(speaks="text", lacks=frozenset({"text"})), text_only=True)
