"""Sessions on a cluster are sessions: the same results, wherever they are, whatever dies."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import midstream as ms
from midstream.distributed.host import SandboxHost
from midstream.distributed.messages import HostReport
from midstream.distributed.ray import RayPool
from midstream.errors import ConfigurationError, IsolationError, ProtocolError, SandboxError, SandboxFileError
from midstream.testing import check_sandbox
from midstream.types import ExecutionResult
from tests.ray.conftest import eventually
from tests.ray.tokens import bytes_tokenizer


@pytest.fixture(scope="module")
def pool(cluster: Any) -> Iterator[RayPool]:
    with RayPool(preload=[], watch_interval=0.2, start_timeout=300) as pool:
        eventually(lambda: len(pool.nodes) == 3)
        yield pool


def test_it_is_a_sandbox_like_any_other(cluster: Any) -> None:
    """The public checks that the local pool is held to."""
    outcomes = check_sandbox(lambda limits: RayPool(preload=[], limits=limits, start_timeout=300))
    assert all(outcome.passed for outcome in outcomes)
    assert len(outcomes) >= 16


def test_blocks_share_a_state_and_sessions_none(pool: RayPool) -> None:
    with pool.session(seed=1) as first, pool.session(seed=1) as second:
        first.run("x = 4\ndef f(n): return n * x")
        assert first.run("f(3)").text == "12"
        assert "NameError" in second.run("x").text
        assert first.run("import random; random.random()").text == second.run("import random; random.random()").text


def test_sessions_are_spread_over_the_nodes_and_stay(pool: RayPool) -> None:
    eventually(lambda: len(pool.nodes) == 3)
    sessions = [pool.session() for _ in range(6)]
    for number, session in enumerate(sessions):
        session.run(f"n = {number}")
    nodes = [session.node_id for session in sessions]
    assert sorted(nodes.count(node) for node in pool.nodes) == [2, 2, 2]
    assert [session.run("n").text for session in sessions] == [str(number) for number in range(6)]
    assert [session.node_id for session in sessions] == nodes
    for session in sessions:
        session.close()


def test_files_and_forks(cluster: Any) -> None:
    node = cluster.head_node.node_id
    with RayPool(preload=[], forkable=True, start_timeout=300, node_ids=[node]) as pool:
        assert pool.nodes == [node]
        if pool.report.level != "full":
            pytest.skip(f"forking needs namespaces, and this machine has the level {pool.report.level!r}")
        with pool.session() as session:
            session.put("data.txt", b"hello")
            assert session.run("x = 1; open('data.txt').read()").text == "'hello'"
            session.run("open('out.bin', 'wb').write(b'12')")
            assert session.get("out.bin") == b"12"
            with pytest.raises(SandboxFileError) as raised:
                session.get("missing")
            assert raised.value.errno is not None
            copies = session.fork(2)
            assert [copy.node_id for copy in copies] == [session.node_id] * 2
            copies[0].run("x += 10")
            assert [each.run("x").text for each in (session, *copies)] == ["1", "11", "1"]
            for copy in copies:
                assert copy.get("data.txt") == b"hello"
                copy.close()


# --- what dies


def killed(session: Any, pool: RayPool) -> int:
    """The process of the session's host, killed."""
    host = next(host for host in pool.hosts if host.node_id == session.node_id)
    os.kill(host.process_id, signal.SIGKILL)
    return host.process_id


def test_a_host_that_dies_between_two_blocks(pool: RayPool) -> None:
    calls: list[Any] = []

    def call_tool(name: str, arguments: list[Any], keyword_arguments: dict[str, Any]) -> Any:
        calls.append(arguments)
        return len(calls)

    with pool.session(seed=3, tools=["count"], call_tool=call_tool) as session, pool.session() as other:
        session.run("import random; x = random.random(); n = count()")
        session.put("a.txt", b"kept")
        session.run("x += 1; open('b.txt', 'w').write('made')")
        before = session.run("x, n").text
        other.run("y = 5")
        elsewhere = other.node_id
        killed(session, pool)
        after = session.run("x, n, open('a.txt').read(), open('b.txt').read()")
        assert after.text == before[:-1] + ", 'kept', 'made')"
        assert not after.state_lost
        assert calls == [[]]  # what the tool said once is not asked again
        assert other.run("y").text == "5"
        if elsewhere != session.node_id:
            assert other.node_id == elsewhere


def test_a_host_that_dies_in_the_middle_of_a_block(pool: RayPool) -> None:
    calls: list[Any] = []
    reached = threading.Event()

    def call_tool(name: str, arguments: list[Any], keyword_arguments: dict[str, Any]) -> Any:
        calls.append(arguments[0])
        if len(calls) == 2:
            reached.set()
            gone.wait(30)
        return arguments[0] * 10

    gone = threading.Event()
    with pool.session(tools=["f"], call_tool=call_tool) as session:
        session.run("x = 7")
        results: list[ExecutionResult] = []
        running = threading.Thread(
            target=lambda: results.append(session.run("a = f(1); b = f(2); c = f(3); x, a, b, c"))
        )
        running.start()
        assert reached.wait(300)
        process = killed(session, pool)
        eventually(lambda: not os.path.exists(f"/proc/{process}"))
        gone.set()
        running.join(300)
    assert [result.text for result in results] == ["(7, 10, 20, 30)"]
    # The first call had its answer; whoever answered the second was told too late, so it may be made again.
    assert calls.count(1) == 1
    assert calls.count(3) == 1


def test_a_node_that_is_taken_away_and_one_that_joins(cluster: Any, pool: RayPool) -> None:
    node = cluster.add_node(num_cpus=2)
    eventually(lambda: node.node_id in pool.nodes)
    sessions = [pool.session(seed=n) for n in range(8)]
    for number, session in enumerate(sessions):
        session.run(f"n = {number}")
    assert any(session.node_id == node.node_id for session in sessions)

    async def through() -> list[ExecutionResult]:
        running = [
            asyncio.create_task(session.run_async("import time; time.sleep(1.0); n * 10")) for session in sessions
        ]
        await asyncio.sleep(0.3)
        await asyncio.to_thread(cluster.remove_node, node, False)
        return list(await asyncio.gather(*running))

    results = asyncio.run(through())
    assert [result.text for result in results] == [str(number * 10) for number in range(8)]
    assert not any(result.state_lost for result in results)
    # A block may have ended before its node did; the next one finds the session elsewhere.
    eventually(lambda: node.node_id not in pool.nodes)
    assert [session.run("n").text for session in sessions] == [str(number) for number in range(8)]
    assert node.node_id not in {session.node_id for session in sessions}
    for session in sessions:
        session.close()


def test_whole_batches_survive(cluster: Any, pool: RayPool) -> None:
    """A generator over the pool, a host killed while its rows run: all trajectories are what they would have been."""
    said = {f"{n}": f"<code>x = {n}</code> a <code>x = slow(x)</code> b <code>x</code> end" for n in range(12)}
    lock, calls, victims = threading.Lock(), [], []

    def slow(value: int) -> int:
        """Ten times."""
        with lock:
            calls.append(value)
            if victims and len(calls) == 6:
                os.kill(victims.pop().process_id, signal.SIGKILL)
        return value * 10

    def texts(sandboxes: Any) -> list[str]:
        engine = ms.ScriptedEngine(bytes_tokenizer(), said)
        with ms.Generator(engine, pool=sandboxes, tools=[slow]) as generator:
            return [trajectory.text for trajectory in generator.generate([ms.Prompt(text=text) for text in said])]

    with ms.SandboxPool(preload=[]) as local:
        expected = texts(local)
    calls.clear()
    victims.append(pool.hosts[0])
    assert texts(pool) == expected
    assert not victims
    assert all(f"<result>{n * 10}</result>" in text for n, text in enumerate(expected))


# --- messages


def test_calls_of_many_sessions_go_in_one_message(pool: RayPool) -> None:
    """What is said while the link is busy goes together, both ways."""
    count = 60
    sessions = [pool.session(seed=number) for number in range(count)]

    async def all_at_once(code: str) -> list[ExecutionResult]:
        tasks = [asyncio.create_task(session.run_async(code)) for session in sessions]
        released = threading.Event()
        assert pool._thread is not None
        pool._thread.call(released.wait, 300)  # nothing leaves before all have said what they want
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(0, released.set)
        return list(await asyncio.gather(*tasks))

    asyncio.run(all_at_once("x = 1"))
    before = sum(host.messages for host in pool.hosts)
    results = asyncio.run(all_at_once("x + 1"))
    assert [result.text for result in results] == ["2"] * count
    assert sum(host.messages for host in pool.hosts) - before <= count // 3
    for session in sessions:
        session.close()


def test_a_node_has_a_host_for_so_many_cores(cluster: Any) -> None:
    with RayPool(preload=[], cores_per_host=1, start_timeout=300, watch_interval=0.2) as pool:
        eventually(lambda: len(pool.hosts) == 2 * len(pool.nodes) >= 6)
        hosts = pool.hosts
        sessions = [pool.session() for _ in hosts]
        for number, session in enumerate(sessions):
            session.run(f"x = {number}")
        assert [host.sessions for host in hosts] == [1] * len(sessions)
        victim = next(host for host in hosts if host is sessions[0]._host)
        os.kill(victim.process_id, signal.SIGKILL)
        assert [session.run("x").text for session in sessions] == [str(number) for number in range(len(sessions))]
        eventually(lambda: len(pool.hosts) == len(sessions))  # the node has not gone: another host is in its place
        for session in sessions:
            session.close()


# --- bounds and ends


async def test_sessions_wait_for_a_place(cluster: Any) -> None:
    with RayPool(preload=[], max_sessions=2, start_timeout=300) as pool:
        eventually(lambda: len(pool.nodes) >= 3)
        count = 2 * len(pool.nodes)
        sessions = [pool.session() for _ in range(count + 1)]
        await asyncio.gather(*(session.run_async("x = 1") for session in sessions[:count]))
        assert pool.free_sessions == 0
        late = asyncio.create_task(sessions[-1].run_async("2 + 2"))
        await asyncio.sleep(0.5)
        assert not late.done()
        assert sessions[-1].node_id is None  # it waits here, for whichever host has a place first
        sessions[0].close()
        for session in sessions[1:count]:
            session.close()
        assert (await late).text == "4"
        sessions[-1].close()


async def test_a_block_that_is_cancelled_ends(pool: RayPool) -> None:
    session = await pool.session_async()
    await session.run_async("x = 1")
    running = asyncio.create_task(session.run_async("while True: pass"))
    await asyncio.sleep(0.3)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert (await session.run_async("x + 1")).text == "2"
    session.close()


def test_wrong_options_are_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigurationError, match="isolation='none'"):
        RayPool(isolation="none")
    with pytest.raises(ConfigurationError, match="start_timeout=0"):
        RayPool(start_timeout=0)
    with pytest.raises(ConfigurationError, match="cores_per_host=0"):
        RayPool(cores_per_host=0)
    with pytest.raises(ConfigurationError, match="num_cpus=-1"):
        RayPool(num_cpus=-1)
    with pytest.raises(ConfigurationError, match="node_ids="):
        RayPool(node_ids="a-node")
    with pytest.raises(TypeError, match="colour"):
        RayPool(colour="red")


def test_where_no_node_can_isolate_it_says_why() -> None:
    pool = RayPool(start_timeout=0.1)
    pool._wanted = frozenset({"a-node"})
    pool._refused["a-node"] = "landlock: this kernel has none"
    with pytest.raises(IsolationError, match="this kernel has none"):
        pool.place()
    pool._wanted |= {"another"}  # which has lost its host, or is starting one
    with pytest.raises(SandboxError, match=r"no host of sandboxes was ready within 0\.1 s$"):
        pool.place()
    pool._failure = "; on node a-node: ModuleNotFoundError: No module named 'midstream'"
    with pytest.raises(SandboxError, match=r"within 0\.1 s; on node a-node: ModuleNotFoundError"):
        pool.place()


def test_who_has_waited_for_a_place_waits_for_a_host_in_place_of_the_last_one() -> None:
    pool = RayPool(start_timeout=200.0)
    long_ago = time.monotonic() - 1000
    pool._last_lost = time.monotonic()
    pool._check_hope(long_ago)
    pool._last_lost = long_ago
    with pytest.raises(SandboxError, match="no host of sandboxes was ready"):
        pool._check_hope(long_ago)
    pool.close()


def test_a_start_that_fails_is_tried_again(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short of something for a moment, a node is not one that cannot isolate."""
    tried = tmp_path / "tried"

    class Short(SandboxHost):
        async def start(self) -> HostReport:
            try:
                tried.touch(exist_ok=False)
            except FileExistsError:
                return await super().start()
            raise OSError("too many open files")

    monkeypatch.setattr("midstream.distributed.pool.SandboxHost", Short)
    with RayPool(preload=[], watch_interval=0.2, start_timeout=300) as pool, pool.session() as session:
        assert session.run("1 + 1").text == "2"
        eventually(lambda: len(pool.nodes) == len(pool._wanted) > 0)
        assert pool._refused == {}
        assert "OSError: too many open files" in pool._failure


@pytest.mark.parametrize("level", ["weak", "container", "full"])
def test_the_level_is_the_weakest_of_all(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = RayPool()
    monkeypatch.setattr(pool, "start", lambda: pool)
    hosts = [SimpleNamespace(level=one) for one in ("full", level)]
    monkeypatch.setattr(pool, "_placement", SimpleNamespace(hosts=hosts))
    assert pool.report.level == level


def test_use_out_of_turn_is_refused(pool: RayPool) -> None:
    session = pool.session()
    session.close()
    with pytest.raises(ProtocolError, match="closed"):
        session.run("1")
    with pytest.raises(ConfigurationError, match="code=5"):
        pool.session().run(5)  # type: ignore[arg-type]


def test_nothing_is_left_when_the_pool_is_closed(cluster: Any) -> None:
    threads = set(threading.enumerate())
    pool = RayPool(preload=[], start_timeout=300).start()
    eventually(lambda: len(pool.nodes) >= 3)
    session = pool.session()
    session.run("x = 1")
    hosts = [host.process_id for host in pool.hosts]
    children = {child for host in hosts for child in descendants(host)}
    assert children
    pool.close()
    pool.close()
    eventually(lambda: not any(os.path.exists(f"/proc/{process}") for process in (*hosts, *children)))
    assert not [thread for thread in threading.enumerate() if thread not in threads and "midstream" in thread.name]
    with pytest.raises(ProtocolError, match="closed"):
        pool.session()


def descendants(process: int) -> set[int]:
    """All processes below one, whichever of its threads started them."""
    children = set()
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            children |= {int(child) for child in path.read_text().split()}
        except OSError:
            continue
    return children | {each for child in children for each in descendants(child)}
