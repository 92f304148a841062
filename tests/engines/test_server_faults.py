"""Whatever goes wrong between an engine and its server, a row is what it would have been, or says why it ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from midstream import Generator, Limits, Prompt, Sampling, ServerConnection, ServerEngine, StopKind, Trajectory
from midstream.engines.base import RowRequest, Update
from midstream.engines.server.asking import Asking
from midstream.engines.server.asks import Ask
from midstream.engines.server.client import Client, retry_after
from midstream.engines.server.routes import VLLMCompletions
from tests.rollouts import VOCABULARY, essence, rollouts
from tests.serving import AMIDST, BEFORE, FakeServer, Trouble
from tests.vocabularies import tokenizer, vocabulary

GREEDY = Sampling(temperature=0.0)
NOISY = Sampling(temperature=0.8)
SCRIPTS = {
    "one": "<code>6 * 7</code>The end.",
    "two": "First <code>x = 2</code> then <code>x + 1</code> so it is 3.",
    "three": "No code in this one, only some words.",
}
LIMITS = Limits(max_new_tokens=40)
QUICK = {"first_wait": 0.001, "retries": 4}
STALLED = 0.5
"""Seconds after which nothing more is expected of a server that stalls."""


@pytest.fixture(scope="session")
def expected(sandboxes: Any) -> list[Trajectory]:
    return list(rollouts(SCRIPTS, sandboxes, limits=LIMITS, sampling=GREEDY))


@pytest.fixture(scope="session")
def servers(expected: list[Trajectory]) -> Iterator[Callable[..., FakeServer]]:
    """One server for each way to be, without troubles."""
    made: dict[str, FakeServer] = {}

    def get(**behaviour: Any) -> FakeServer:
        key = repr(behaviour)
        if key not in made:
            made[key] = FakeServer(vocabulary(VOCABULARY), expected, **behaviour)
        made[key].troubles.clear()
        return made[key]

    yield get
    for server in made.values():
        server.close()


def generate(
    server: FakeServer,
    pool: Any,
    troubles: list[Trouble],
    *,
    sampling: Sampling = GREEDY,
    stream: bool = True,
    **connection: Any,
) -> list[Trajectory]:
    engine = ServerEngine(
        server.url, tokenizer(VOCABULARY), stream=stream, connection=ServerConnection(**(QUICK | connection))
    )
    server.troubles.extend(troubles)
    try:
        with Generator(engine, pool=pool, limits=LIMITS, sampling=sampling) as generator:
            return list(generator.generate([Prompt(text=text, id=text) for text in SCRIPTS]))
    finally:
        engine.shutdown()


def one_row(
    server: FakeServer, troubles: list[Trouble], *, sampling: Sampling = GREEDY, pace: float = 0.0, **connection: Any
) -> list[Update]:
    """All updates of a row of eight new ids."""
    engine = ServerEngine(server.url, tokenizer(VOCABULARY), connection=ServerConnection(**(QUICK | connection)))
    server.troubles.extend(troubles)
    server.behaviour.pace = pace
    try:
        engine.open(RowRequest((5, 6), sampling, seed=9, max_total_tokens=10))
        seen: list[Update] = []
        until = time.monotonic() + 60
        while not any(update.exhausted or update.error for update in seen):
            assert time.monotonic() < until
            seen += engine.step()
        return seen
    finally:
        server.behaviour.pace = 0.0
        engine.shutdown()


def ids_of(updates: list[Update]) -> list[int]:
    return [i for update in updates for i in update.ids]


# --- any schedule of faults


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    troubles=st.lists(
        st.one_of(
            st.sampled_from([*BEFORE, ""]).map(Trouble),
            st.builds(Trouble, st.sampled_from([kind for kind in AMIDST if kind != "stall"]), st.integers(0, 9)),
        ),
        max_size=8,
    ),
    speaks=st.sampled_from(["completions", "generate", "sglang", "sglang incremental"]),
    stream=st.booleans(),
    noisy=st.booleans(),
)
def test_rows_are_those_without_faults(
    servers: Callable[..., FakeServer],
    sandboxes: Any,
    expected: list[Trajectory],
    troubles: list[Trouble],
    speaks: str,
    stream: bool,
    noisy: bool,
) -> None:
    server = servers(speaks=speaks)
    sampling = NOISY if noisy else GREEDY
    rows = generate(server, sandboxes, troubles, sampling=sampling, stream=stream, retries=len(troubles))
    assert list(map(essence, rows)) == list(map(essence, generate(server, sandboxes, [], sampling=sampling)))
    if not noisy:
        assert [row.ids for row in rows] == [row.ids for row in expected]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    troubles=st.lists(st.builds(Trouble, st.sampled_from([*BEFORE, *AMIDST[:4]]), st.integers(0, 9)), max_size=9),
    stream=st.booleans(),
)
def test_where_faults_are_too_many_rows_are_beginnings_and_say_so(
    servers: Callable[..., FakeServer],
    sandboxes: Any,
    expected: list[Trajectory],
    troubles: list[Trouble],
    stream: bool,
) -> None:
    rows = generate(servers(), sandboxes, troubles, stream=stream, retries=1, after_break="fail")
    for row, whole in zip(rows, expected, strict=True):
        if row.stop.kind is StopKind.ENGINE_FAILURE:
            assert row.stop.detail
            assert row.ids == whole.ids[: row.total_length]
            assert row.mask == whole.mask[: row.total_length]
        else:
            assert row.ids == whole.ids


# --- each kind


@pytest.mark.parametrize("kind", BEFORE)
def test_what_happens_before_an_answer_is_mended(servers: Callable[..., FakeServer], kind: str) -> None:
    server = servers()
    plain = ids_of(one_row(server, []))
    assert len(plain) == 8
    server.requests.clear()
    assert ids_of(one_row(server, [Trouble(kind)] * 4)) == plain
    first, *again = server.requests[3:]
    assert again == [first] * 4


@pytest.mark.parametrize("kind", AMIDST)
def test_a_greedy_row_goes_on_behind_what_came(servers: Callable[..., FakeServer], kind: str) -> None:
    server = servers()
    plain = ids_of(one_row(server, []))
    server.requests.clear()
    assert ids_of(one_row(server, [Trouble(kind, 3), Trouble(kind, 2)], idle_timeout=STALLED)) == plain
    assert [request["prompt"] for request in server.requests[3:]] == [
        [5, 6],
        [5, 6, *plain[:3]],
        [5, 6, *plain[:5]],
    ]
    assert [request["max_tokens"] for request in server.requests[3:]] == [8, 5, 3]


@pytest.mark.parametrize("kind", AMIDST)
def test_a_sampled_row_is_sampled_again_with_its_seed(servers: Callable[..., FakeServer], kind: str) -> None:
    server = servers()
    plain = one_row(server, [], sampling=NOISY)
    server.requests.clear()
    seen = one_row(server, [Trouble(kind, 5), Trouble(kind, 2)], sampling=NOISY, idle_timeout=STALLED)
    assert ids_of(seen) == ids_of(plain)
    assert [x for update in seen for x in update.logprobs] == [x for update in plain for x in update.logprobs]
    first, *again = server.requests[3:]
    assert again == [first, first]


def test_a_server_that_forgets_its_seeds_is_found_out(servers: Callable[..., FakeServer]) -> None:
    seen = one_row(servers(forgets_seeds=True), [Trouble("cut", 3)], sampling=NOISY)
    assert len(ids_of(seen)) == 3
    assert "with the same seed, and came out otherwise" in str(seen[-1].error)


def test_where_seeds_are_not_kept_a_sampled_row_fails_unless_told_otherwise(servers: Callable[..., FakeServer]) -> None:
    server = servers(speaks="sglang", deterministic=False)
    seen = one_row(server, [Trouble("cut", 3)], sampling=NOISY)
    assert len(ids_of(seen)) == 3
    assert "keeps to no seeds" in str(seen[-1].error)
    assert "after_break='continue'" in str(seen[-1].error)
    seen = one_row(server, [Trouble("503")], sampling=NOISY)  # nothing was computed
    assert len(ids_of(seen)) == 8
    seen = one_row(server, [Trouble("cut", 3)], sampling=NOISY, after_break="continue")
    assert len(ids_of(seen)) == 8
    assert server.requests[-1]["input_ids"] == [5, 6, *ids_of(seen)[:3]]
    seen = one_row(server, [Trouble("cut", 3)])
    assert len(ids_of(seen)) == 8


@pytest.mark.parametrize("kind", ["cut", "drop", "504", "garbage"])
def test_lost_answers_are_not_asked_for_again_where_that_is_wanted(
    servers: Callable[..., FakeServer], kind: str
) -> None:
    server = servers()
    server.requests.clear()
    seen = one_row(server, [Trouble(kind, 3)], after_break="fail")
    assert "not asked again: after_break='fail'" in str(seen[-1].error)
    assert len(ids_of(seen)) == (3 if kind == "cut" else 0)
    assert len(server.requests) == 4
    assert len(ids_of(one_row(server, [Trouble("500")], after_break="fail"))) == 8


async def test_an_answer_that_lacks_only_its_end_is_whole(servers: Callable[..., FakeServer]) -> None:
    server = servers()
    server.behaviour.overrides = {"finish_reason": None}
    connection = ServerConnection(**QUICK)
    client = Client(server.url, connection)
    ask = Ask((5, 6), GREEDY, None, 8)
    try:
        pieces = [piece async for piece in Asking(client, VLLMCompletions("small"), connection).pieces(ask)]
    finally:
        server.behaviour.overrides = {}
        await client.close()
    assert sum(len(piece.ids) for piece in pieces) == 8
    assert [piece.finish for piece in pieces] == [None] * 8 + ["length"]


def test_retries_are_counted_anew_with_every_id(servers: Callable[..., FakeServer]) -> None:
    troubles = [Trouble("cut", 1), Trouble("503")] * 7
    assert len(ids_of(one_row(servers(), troubles, retries=2))) == 8
    seen = one_row(servers(), [Trouble("503")] * 3, retries=2)
    assert "(after 2 retries)" in str(seen[-1].error)
    assert "trouble 503" in str(seen[-1].error)


def test_requests_that_are_wrong_are_not_made_again(servers: Callable[..., FakeServer]) -> None:
    server = servers(models=("small", "other"))
    engine = ServerEngine(server.url, tokenizer(VOCABULARY), model="small", connection=ServerConnection(**QUICK))
    server.behaviour.models = ("other",)
    before = len(server.headers)
    engine.open(RowRequest((5,), GREEDY))
    updates: list[Update] = []
    while not updates:
        updates += engine.step()
    assert "no such model" in str(updates[0].error)
    assert len(server.headers) == before + 1
    engine.shutdown()


# --- waits and deadlines


def test_what_the_server_asks_to_wait_is_waited(servers: Callable[..., FakeServer]) -> None:
    server = servers(retry_after="0.3")
    started = time.monotonic()
    assert len(ids_of(one_row(server, [Trouble("429")]))) == 8
    assert time.monotonic() - started > 0.3  # a wait is a promise, not a measure of speed
    server = servers(retry_after="3600")
    seen = one_row(server, [Trouble("429")])
    assert "3600 s are to be waited" in str(seen[-1].error)


def test_how_long_to_wait_may_be_a_date() -> None:
    soon = datetime.now(UTC) + timedelta(seconds=100)
    found = retry_after({"retry-after": format_datetime(soon, usegmt=True)})
    assert found is not None
    assert 90 < found <= 100
    assert retry_after({"retry-after": format_datetime(soon - timedelta(hours=1), usegmt=True)}) == 0
    assert retry_after({"retry-after": "-3"}) == 0
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({}) is None


def test_rows_give_up_in_time(servers: Callable[..., FakeServer]) -> None:
    seen = one_row(
        servers(), [Trouble("503")] * 1000, retries=1000, first_wait=0.05, longest_wait=0.05, give_up_after=0.3
    )
    assert "no id within give_up_after=0.3 s" in str(seen[-1].error)


def test_a_request_has_a_deadline_of_its_own(servers: Callable[..., FakeServer]) -> None:
    seen = one_row(servers(), [], pace=0.2, request_timeout=1.0, retries=0)
    assert "longer than request_timeout" in str(seen[-1].error)
    assert 0 < len(ids_of(seen)) < 8


def test_one_rows_fault_ends_no_other(
    servers: Callable[..., FakeServer], sandboxes: Any, expected: list[Trajectory]
) -> None:
    rows = generate(servers(), sandboxes, [Trouble("503")], retries=0)
    assert [row.stop.kind for row in rows].count(StopKind.ENGINE_FAILURE) == 1
    assert sum(row.ids == whole.ids for row, whole in zip(rows, expected, strict=True)) == 2


def test_text_that_breaks_off_is_gone_on_from_by_greedy_rows(
    servers: Callable[..., FakeServer], sandboxes: Any, expected: list[Trajectory]
) -> None:
    server = servers(speaks="text")
    engine = ServerEngine(server.url, tokenizer(VOCABULARY), text_only=True, connection=ServerConnection(**QUICK))
    server.troubles.extend([Trouble("cut", 4), Trouble("drop"), Trouble("unfinished", 2)])
    with Generator(engine, pool=sandboxes, limits=LIMITS, sampling=GREEDY) as generator:
        rows = generator.generate([Prompt(text=text, id=text) for text in SCRIPTS])
    assert [row.text for row in rows] == [row.text for row in expected]
    server.troubles.append(Trouble("cut", 3))
    with Generator(engine, pool=sandboxes, limits=LIMITS, sampling=NOISY) as generator:
        (row,) = generator.generate(["one"])
    assert row.stop.kind is StopKind.ENGINE_FAILURE
    engine.shutdown()
