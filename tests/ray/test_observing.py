"""Observers are told of sessions on any node what they are told of a local pool's, where the pool is."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import midstream as ms
from midstream.distributed.messages import Done, Lost, Order
from midstream.distributed.ray import RayPool
from midstream.distributed.session import RaySession
from midstream.observing import (
    BlockEnded,
    InterpreterStarted,
    Observation,
    SessionAsked,
    SessionClosed,
    SessionGranted,
    SessionOpened,
    SessionRan,
    ToolBegan,
    ToolEnded,
)
from midstream.types import ExecutionResult
from tests.ray.conftest import eventually
from tests.ray.tokens import bytes_tokenizer


class Seen(list[Observation]):
    """Everything that an observer was told, and in which thread the last of it."""

    thread = 0

    def __call__(self, observation: Observation) -> None:
        self.thread = threading.get_ident()
        self.append(observation)

    def of(self, *kinds: type) -> list[Any]:
        return [one for one in self if isinstance(one, kinds)]

    def counts(self, *kinds: type) -> list[int]:
        return [len(self.of(kind)) for kind in kinds]

    def story(self) -> list[Any]:
        """In their order, without what they took."""
        return [
            (type(one), getattr(one, "replacement", None), getattr(getattr(one, "result", None), "text", None))
            for one in self
        ]


@pytest.fixture(scope="module")
def shared() -> Seen:
    return Seen()


@pytest.fixture(scope="module")
def started(cluster: Any, shared: Seen) -> Iterator[RayPool]:
    with RayPool(preload=[], start_timeout=300, watch_interval=0.2, observers=[shared]) as pool:
        eventually(lambda: len(pool.nodes) == 3)
        yield pool


@pytest.fixture
def seen(started: RayPool, shared: Seen) -> Seen:
    """With nothing in it yet."""
    eventually(lambda: len(started.nodes) >= 2)
    shared.clear()
    return shared


@pytest.fixture
def pool(started: RayPool, seen: Seen) -> RayPool:
    return started


def use(pool: Any) -> None:
    """Blocks that give something, that end the interpreter, that raise; a file."""
    with pool.session(seed=1) as session:
        session.run("x = 1")
        session.run("import os; os._exit(3)")
        session.run("x")
    with pool.session(seed=1) as session:
        session.put("a.txt", b"here")
        session.run("open('a.txt').read()")
        session.run("1/0")


async def use_async(pool: Any) -> None:
    session = await pool.session_async(seed=1)
    await session.run_async("x = 1")
    running = asyncio.create_task(session.run_async("while True: pass"))
    await asyncio.sleep(0.3)
    running.cancel()
    await asyncio.wait([running])
    await session.run_async("x")
    session.close()


def test_the_same_is_told_as_of_a_local_pool(pool: RayPool, seen: Seen) -> None:
    local = Seen()
    with ms.SandboxPool(preload=[], observers=[local]) as beside:
        use(beside)
    use(pool)
    assert seen.story() == local.story()
    assert seen.counts(SessionOpened, SessionClosed, InterpreterStarted, SessionRan) == [2, 2, 3, 5]
    assert all(one.seconds > 0 for one in seen.of(InterpreterStarted))
    assert seen.thread == threading.get_ident()


def test_the_same_is_told_with_asyncio_and_of_a_block_that_is_cancelled(pool: RayPool, seen: Seen) -> None:
    local = Seen()
    with ms.SandboxPool(preload=[], observers=[local]) as beside:
        asyncio.run(use_async(beside))
    asyncio.run(use_async(pool))
    # The block that was cancelled took its interpreter with it, and another host may have had a place sooner.
    told = [SessionOpened, InterpreterStarted, SessionRan, SessionClosed]
    of_both = [[one for one in each.story() if one[0] in told] for each in (seen, local)]
    assert of_both[0] == of_both[1]
    assert len(seen.of(SessionAsked)) == len(seen.of(SessionGranted))


def test_a_block_is_told_once_though_its_host_is_lost(pool: RayPool, seen: Seen) -> None:
    def call_tool(name: str, arguments: list[Any], keyword_arguments: dict[str, Any]) -> Any:
        if not killed:
            killed.append(next(host.process_id for host in pool.hosts if host is session._host))
            os.kill(killed[0], signal.SIGKILL)
            eventually(lambda: not os.path.exists(f"/proc/{killed[0]}"))
        return 5

    killed: list[int] = []
    with pool.session(tools=["f"], call_tool=call_tool) as session:
        session.run("x = 7")
        assert session.run("x + f()").text == "12"
        assert session.run("x").text == "7"
    assert len(killed) == 1
    assert [one.result.text for one in seen.of(SessionRan)] == ["", "12", "7"]
    assert [one.replacement for one in seen.of(InterpreterStarted)] == [False, True]
    assert seen.counts(SessionOpened, SessionClosed, SessionAsked, SessionGranted) == [1, 1, 2, 2]
    assert not any(one.refused for one in seen.of(SessionGranted))


def test_a_whole_batch_is_told_though_a_host_is_lost(pool: RayPool, seen: Seen) -> None:
    """Each block of each row once, as it ended; and tools that run beside the sandboxes too."""
    said = {f"{n}": f"<code>x = away({n})</code> a <code>x = slow(x)</code> b <code>x</code> end" for n in range(8)}
    lock, calls, victims = threading.Lock(), [], list(pool.hosts)[:1]

    def slow(value: int) -> int:
        """Ten times."""
        with lock:
            calls.append(value)
            if victims and len(calls) == 4:
                os.kill(victims.pop().process_id, signal.SIGKILL)
        return value * 10

    @ms.tool(place="sandbox")
    def away(value: int) -> int:
        """One more."""
        return value + 1

    told, engine = Seen(), ms.ScriptedEngine(bytes_tokenizer(), said)
    with ms.Generator(engine, pool=pool, tools=[slow, away], observers=[told]) as generator:
        batch = generator.generate([ms.Prompt(text=text) for text in said])
    results = [record.result for trajectory in batch for record in trajectory.calls]
    assert [result.text for result in results if result is not None][2::3] == [str(10 * (n + 1)) for n in range(8)]
    assert not victims
    ran = [id(one.result) for one in seen.of(SessionRan)]
    assert sorted(ran) == sorted(id(one.result) for one in told.of(BlockEnded))
    assert len(set(ran)) == 24
    assert seen.counts(SessionOpened, SessionClosed) == [8, 8]
    assert len(seen.of(SessionAsked)) == len(seen.of(SessionGranted))
    assert [one.replacement for one in seen.of(InterpreterStarted)].count(False) == 8
    ended = [one for one in told.of(ToolEnded) if one.began.name == "away"]
    assert sorted((one.began.row.sample, one.answer.value, one.outcome) for one in ended) == [
        (0, n + 1, "ok") for n in range(8)
    ]
    assert len({id(one.began.row) for one in ended}) == 8
    assert {id(one.began) for one in told.of(ToolEnded)} == {id(one) for one in told.of(ToolBegan)}


def test_copies_wait_for_places_and_are_told_of(cluster: Any) -> None:
    stories = []
    for make in (ms.SandboxPool, lambda **options: RayPool(node_ids=[cluster.head_node.node_id], **options)):
        seen = Seen()
        with make(preload=[], forkable=True, max_sessions=4, observers=[seen]) as pool:
            if pool.report.level != "full":
                pytest.skip(f"forking needs namespaces, and this machine has the level {pool.report.level!r}")
            with pool.session() as session:
                session.run("x = 1")
                for copy in session.fork(2):
                    assert copy.run("x").text == "1"
                    copy.close()
                with pytest.raises(ms.errors.ConfigurationError, match="n=4"):
                    session.fork(4)
        stories.append(seen.story())
    assert stories[0] == stories[1]
    assert stories[0].count((SessionOpened, None, None)) == 3


def test_a_session_that_nobody_closed_is_counted_out(pool: RayPool, seen: Seen) -> None:
    pool.session().run("1")
    pool.session()  # never used: it was not open
    with pool.session() as session:
        session.run("2")
    assert seen.counts(SessionOpened, SessionClosed) == [2, 2]


def test_what_the_pool_is_closed_with_is_told() -> None:
    seen = Seen()
    pool = RayPool(observers=[seen])
    pool.open_sessions.add(session := _session(pool, []))
    pool.close()
    pool.close()
    assert seen.counts(SessionOpened, SessionClosed) == [1, 1]
    with pytest.raises(ms.errors.ProtocolError, match="the session is closed"):
        session.run("1")


# --- a host that is lost while a session is opened there


class FakeHost:
    """``answers``: what comes of orders, of all that have arrived at once."""

    node_id, lost, sessions = "a-node", False, 0

    def __init__(self, answer: Callable[[int], Any]) -> None:
        self.answer = answer
        self.orders: list[Order] = []

    def order(self, orders: list[Order], post: Callable[[Any], None] | None) -> None:
        self.orders += orders
        for order in orders:
            if post is not None:
                post(self.answer(order.number))  # type: ignore[union-attr]


def _session(pool: RayPool, hosts: list[FakeHost]) -> RaySession:
    pool.place = lambda: hosts.pop(0)  # type: ignore[assignment, method-assign, return-value]
    return RaySession(pool, tools={}, call_tool=lambda *_: None, seed=1)


def test_a_host_that_is_lost_with_several_orders_is_lost_once() -> None:
    """Each of its orders is told so; what the next host does for them is not thrown away."""
    seen, result = Seen(), ExecutionResult(text="2")
    lost, sound, idle = FakeHost(Lost), FakeHost(lambda number: Done(number, result)), FakeHost(Lost)
    pool = RayPool(observers=[seen])
    session = _session(pool, [lost, sound, idle])
    assert session.run("1 + 1") is result
    assert (len(lost.orders), len(sound.orders), len(idle.orders)) == (2, 2, 0)
    assert seen.of(SessionRan) == [SessionRan(result)]
    pool.close()
