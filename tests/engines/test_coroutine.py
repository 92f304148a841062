"""The engine over a coroutine function: the public checks, and what it does when the function or its loop fails."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator

import pytest

from midstream import Generator, Sampling, SandboxPool, StopKind
from midstream.decoding import decode
from midstream.engines.server.asks import Ask, Piece
from midstream.engines.server.coroutine import CoroutineEngine, finish_by_ids
from midstream.errors import CapabilityError, ConfigurationError
from midstream.testing import check_engine
from midstream.testing.steering import PERIOD, VOCABULARY, next_id, next_logprobs
from tests.drop_in import ids_of
from tests.rollouts import LONG
from tests.vocabularies import tokenizer


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop that runs elsewhere, as a trainer's does."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


class Server:
    """The steered model behind a coroutine: an answer ends at a stop, and as many ids late as it is told."""

    def __init__(self, overshoot: int = 0) -> None:
        self._overshoot = overshoot
        self._random = random.Random(0)
        self.under_way = 0

    async def ask(self, ask: Ask) -> Piece:
        self.under_way += 1
        try:
            await asyncio.sleep(0)
            ids, logprobs, left = list(ask.ids), [], PERIOD
            start = len(ids)
            while left and len(ids) - start < ask.most and (len(ids) == start or ids[-1] not in ask.stop_ids):
                left -= 1
                likely = next_logprobs(ids)
                ids.append(next_id(ids, 0.5 if ask.sampling.greedy else self._random.random()))
                logprobs.append(likely[ids[-1]])
                said = decode(VOCABULARY, ids[start:])
                if left > self._overshoot and any(stop in said for stop in ask.stop_strings):
                    left = self._overshoot
            new = tuple(ids[start:])
            return Piece(new, tuple(logprobs), finish=finish_by_ids(VOCABULARY, ask, new))
        finally:
            self.under_way -= 1


@pytest.mark.parametrize("overshoot", [0, 3])
def test_the_public_checks(loop: asyncio.AbstractEventLoop, sandboxes: SandboxPool, overshoot: int) -> None:
    server = Server(overshoot)
    check_engine(
        lambda steering: CoroutineEngine(
            server.ask, steering.tokenizer, logprobs="raw", context_length=4096, loop=loop
        ),
        pool=sandboxes,
    )
    assert server.under_way == 0


def test_a_fault_ends_its_row_alone(loop: asyncio.AbstractEventLoop, sandboxes: SandboxPool) -> None:
    answer = ids_of("fine")

    async def ask(asked: Ask) -> Piece:
        if len(asked.ids) > 1:
            raise ConnectionError("no server is there")
        return Piece(tuple(answer), (0.0,) * len(answer), finish="own")

    engine = CoroutineEngine(ask, tokenizer("o200k"), logprobs="raw", context_length=100, loop=loop)
    with Generator(engine, pool=sandboxes) as generator:
        fine, failed = generator.generate([{"ids": (5,)}, {"ids": (5, 6)}])
    assert (fine.stop.kind, fine.text) == (StopKind.STOP_ID, "fine")
    assert failed.stop.kind is StopKind.ENGINE_FAILURE
    assert "ConnectionError: no server is there" in failed.stop.detail


def test_rows_that_are_given_up_ask_no_more(loop: asyncio.AbstractEventLoop, sandboxes: SandboxPool) -> None:
    asked, given_up = threading.Event(), threading.Event()

    async def ask(asked_for: Ask) -> Piece:
        asked.set()
        try:
            return await asyncio.Future()
        except asyncio.CancelledError:
            given_up.set()
            raise

    engine = CoroutineEngine(ask, tokenizer("o200k"), logprobs=None, context_length=100, loop=loop)
    with Generator(engine, pool=sandboxes) as generator:
        future = generator.submit("prompt")
        assert asked.wait(LONG)
        future.cancel()
        assert given_up.wait(LONG)
    engine.shutdown()
    engine.shutdown()


def test_a_loop_that_is_closed_ends_the_rows(sandboxes: SandboxPool) -> None:
    closed = asyncio.new_event_loop()
    closed.close()

    async def ask(_asked: Ask) -> Piece:
        raise AssertionError("never asked")

    engine = CoroutineEngine(ask, tokenizer("o200k"), logprobs=None, context_length=100, loop=closed)
    with Generator(engine, pool=sandboxes) as generator:
        (row,) = generator.generate(["prompt"])
    assert row.stop.kind is StopKind.ENGINE_FAILURE
    assert "closed" in row.stop.detail
    engine.shutdown()


async def test_the_loop_is_the_one_that_runs(sandboxes: SandboxPool) -> None:
    loops = []

    async def ask(asked: Ask) -> Piece:
        loops.append(asyncio.get_running_loop())
        assert asked.sampling == Sampling(temperature=0)
        return Piece(finish="own")

    engine = CoroutineEngine(ask, tokenizer("o200k"), logprobs=None, context_length=100)
    with Generator(engine, pool=sandboxes) as generator:
        future = generator.submit("prompt", sampling=Sampling(temperature=0))
        row = await asyncio.wrap_future(future)
    assert loops == [asyncio.get_running_loop()]
    assert not row.fit_for_training  # there are no logprobs
    with pytest.raises(CapabilityError, match="set_weights"):
        engine.set_weights(1, keep_cache=False)


def test_what_cannot_be_asked_is_refused(loop: asyncio.AbstractEventLoop) -> None:
    with pytest.raises(ConfigurationError, match="ask=3"):
        CoroutineEngine(3, tokenizer("o200k"), logprobs=None, loop=loop)  # type: ignore[arg-type]
