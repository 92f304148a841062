"""The pool as a whole: interpreters started ahead, bounded numbers, fair waiting, and nothing left of any of it."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import select
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from midstream.errors import ConfigurationError, ProtocolError, SandboxError
from midstream.sandbox import SandboxPool, Session
from midstream.sandbox.places import Places
from tests.sandbox.leftovers import NOTHING, Held, children_of, eventually, lives, own_temporary_folder
from tests.sandbox.test_lifecycle import kill_fork_server

__all__ = ["own_temporary_folder"]  # each test here has a temporary folder of its own, as there


@pytest.fixture
def warm_pool(level: str) -> Iterator[SandboxPool]:
    with SandboxPool(isolation=level, preload=["numpy"], warm=3) as pool:  # type: ignore[arg-type]
        yield pool


@pytest.fixture
def small_pool(level: str) -> Iterator[SandboxPool]:
    with SandboxPool(isolation=level, preload=[], max_sessions=2) as pool:  # type: ignore[arg-type]
        yield pool


def in_stock(pool: SandboxPool) -> int:
    assert pool._stock is not None
    return len(pool._stock._channels)


def below_server(pool: SandboxPool) -> set[int]:
    assert pool._server is not None
    assert pool._server._process is not None
    return {process for process in children_of(pool._server._process.pid) if lives(process)}


def settled(pool: SandboxPool) -> bool:
    """Whether the stock is full, all in it have been started, and no other process is still on its way out."""
    assert pool._stock is not None
    channels = list(pool._stock._channels)
    started, _, _ = select.select(channels, [], [], 0)
    return len(started) == pool._warm and len(below_server(pool)) <= pool._warm + 1


def over(pool: SandboxPool) -> int:
    """How many in the stock have ended, and the host was told so: that the process is gone comes first."""
    assert pool._stock is not None
    hung_up = select.poll()
    for channel in pool._stock._channels:
        hung_up.register(channel, 0)
    return len(hung_up.poll(0))


class TestWarm:
    CODE = (
        "import random, numpy, tempfile\n"
        "random.random(), numpy.random.rand(), numpy.random.default_rng().random(), hash('a'), sorted(globals())"
    )

    def test_a_warm_session_is_like_any_other(self, warm_pool: SandboxPool, level: str) -> None:
        def call(_name: str, arguments: list[int], _keywords: dict[str, int]) -> int:
            return 2 * arguments[0]

        tools = {"double": "Twice a number."}
        with SandboxPool(isolation=level, preload=["numpy"]) as cold:  # type: ignore[arg-type]
            texts = []
            for pool in (cold, warm_pool):
                assert in_stock(pool) == pool._warm
                with pool.session(tools=tools, call_tool=call, seed=7) as session:
                    texts.append(session.run(self.CODE).text)
                    assert session.run("double(21), double.__doc__").text == "(42, 'Twice a number.')"
            assert texts[0] == texts[1]

    def test_two_warm_ones_draw_different_numbers(self, warm_pool: SandboxPool) -> None:
        with warm_pool.session() as one, warm_pool.session() as other:
            assert one.run(self.CODE).text != other.run(self.CODE).text

    def test_the_stock_is_filled_again_and_ends_with_the_pool(self, level: str) -> None:
        before = Held.now()
        with SandboxPool(isolation=level, preload=[], warm=3) as pool:  # type: ignore[arg-type]
            sessions = [pool.session() for _ in range(10)]
            assert [session.run("1 + 1").text for session in sessions] == ["2"] * 10
            assert in_stock(pool) == 3
            for session in sessions:
                session.close()
            assert in_stock(pool) == 3
        assert before.new() == NOTHING

    def test_a_pool_that_nobody_holds_ends_with_its_stock(self, level: str) -> None:
        before = Held.now()
        pool: SandboxPool | None = SandboxPool(isolation=level, preload=[], warm=2)  # type: ignore[arg-type]
        assert pool is not None
        pool.session().close()
        del pool
        assert eventually(lambda: before.new() == NOTHING), before.new()

    def test_one_that_died_while_it_waited_is_passed_over(self, warm_pool: SandboxPool) -> None:
        assert eventually(lambda: settled(warm_pool))
        # Not what they are forked from: with that, all of them would go.
        waiting = {process for process in below_server(warm_pool) if not children_of(process)}
        assert len(waiting) == 3
        for process in waiting:
            os.kill(process, signal.SIGKILL)
        assert eventually(lambda: over(warm_pool) == 3)
        with warm_pool.session() as session:
            assert session.run("1 + 1").text == "2"
        assert in_stock(warm_pool) == 3

    def test_they_die_with_their_fork_server(self, warm_pool: SandboxPool) -> None:
        with warm_pool.session(seed=1) as session:
            session.run("x = 1")
            kill_fork_server(warm_pool)
            assert session.run("x").text == "1"
            assert in_stock(warm_pool) == 3

    async def test_the_same_for_asyncio(self, warm_pool: SandboxPool) -> None:
        sessions = await asyncio.gather(*(warm_pool.session_async(seed=3) for _ in range(8)))
        texts = {(await session.run_async(self.CODE)).text for session in sessions}
        for session in sessions:
            session.close()
        assert len(texts) == 1
        kill_fork_server(warm_pool)
        with await warm_pool.session_async() as session:
            assert (await session.run_async("5")).text == "5"

    def test_sessions_that_are_rebuilt_take_one_too(self, warm_pool: SandboxPool) -> None:
        with warm_pool.session() as session:
            session.run("x = 6")
            assert session.run("import os; os._exit(3)").state_lost
            assert session.run("x").text == "6"
        assert in_stock(warm_pool) == 3


def test_sessions_do_not_take_the_processor_from_their_host(pool: SandboxPool) -> None:
    with pool.session() as session:
        session.run("import threading; threading.Thread(target=threading.Event().wait).start()")
        process = session._interpreter.living._number_here()
        assert session.leftover_threads == 1
        policies = {os.sched_getscheduler(int(thread)) for thread in os.listdir(f"/proc/{process}/task")}
        assert policies == {os.SCHED_BATCH}
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


async def in_line(pool: SandboxPool, number: int) -> None:
    while pool.waiting != number:
        await asyncio.sleep(0.01)


class TestBounded:
    def test_who_comes_first_is_served_first(self, small_pool: SandboxPool) -> None:
        held = [small_pool.session() for _ in range(2)]
        served: list[int] = []
        turn = threading.Semaphore(0)

        def row(number: int) -> None:
            with small_pool.session():
                served.append(number)
                turn.acquire()

        threads = []
        for number in range(6):
            threads.append(threading.Thread(target=row, args=(number,)))
            threads[-1].start()
            assert eventually(lambda expected=number + 1: small_pool.waiting == expected)  # type: ignore[misc]
        held[0].close()
        for number in range(6):
            assert eventually(lambda expected=number + 1: len(served) == expected)  # type: ignore[misc]
            turn.release()
        for thread in threads:
            thread.join()
        assert served == list(range(6))
        held[1].close()

    def test_threads_and_tasks_stand_in_one_line(self, small_pool: SandboxPool) -> None:
        held = [small_pool.session() for _ in range(2)]
        served: list[str] = []

        def row(name: str) -> None:
            with small_pool.session():
                served.append(name)

        async def row_async(name: str) -> None:
            with await small_pool.session_async() as session:
                served.append(name)
                assert (await session.run_async("1")).text == "1"

        async def main() -> None:
            threads = []
            tasks = []
            for number in range(3):
                threads.append(threading.Thread(target=row, args=(f"thread {number}",)))
                threads[-1].start()
                while small_pool.waiting != 2 * number + 1:
                    await asyncio.sleep(0.01)
                tasks.append(asyncio.create_task(row_async(f"task {number}")))
                while small_pool.waiting != 2 * number + 2:
                    await asyncio.sleep(0.01)
            held[0].close()
            await asyncio.gather(*tasks)
            for thread in threads:
                await asyncio.to_thread(thread.join)

        asyncio.run(main())
        assert served == ["thread 0", "task 0", "thread 1", "task 1", "thread 2", "task 2"]
        held[1].close()

    async def test_who_gives_up_leaves_the_line(self, small_pool: SandboxPool) -> None:
        held = [await small_pool.session_async() for _ in range(2)]
        tasks = [asyncio.create_task(small_pool.session_async()) for _ in range(3)]
        await in_line(small_pool, 3)
        tasks[0].cancel()
        await asyncio.sleep(0)
        assert small_pool.waiting == 2
        held[0].close()
        (await tasks[1]).close()
        (await tasks[2]).close()
        held[1].close()
        assert small_pool._places._free == 2

    async def test_who_gives_up_as_the_turn_comes_passes_it_on(self, small_pool: SandboxPool) -> None:
        held = [await small_pool.session_async() for _ in range(2)]
        first, second = (asyncio.create_task(small_pool.session_async()) for _ in range(2))
        await in_line(small_pool, 2)
        held[0].close()  # it is the first one's turn, who does not know it yet
        first.cancel()
        (await second).close()
        assert first.cancelled()
        held[1].close()
        assert small_pool._places._free == 2

    def test_closing_the_pool_turns_away_who_waits(self, level: str) -> None:
        pool = SandboxPool(isolation=level, preload=[], max_sessions=1)  # type: ignore[arg-type]
        held = pool.session()
        raised: list[BaseException] = []

        def wait() -> None:
            try:
                pool.session()
            except ProtocolError as error:
                raised.append(error)

        async def wait_async() -> None:
            with pytest.raises(ProtocolError, match="this pool is closed"):
                await pool.session_async()

        async def main() -> None:
            thread = threading.Thread(target=wait)
            thread.start()
            task = asyncio.create_task(wait_async())
            while pool.waiting < 2:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(pool.close)
            await task
            await asyncio.to_thread(thread.join)

        asyncio.run(main())
        assert [str(error) for error in raised] == ["this pool is closed"]
        with pytest.raises(ProtocolError, match="closed"):
            held.run("1")

    def test_a_session_that_nobody_holds_gives_its_place_back(self, small_pool: SandboxPool) -> None:
        for _ in range(5):
            session: Session | None = small_pool.session()
            assert session is not None
            session.run("1")
            del session
            gc.collect()
        assert small_pool._places._free == 2

    def test_what_cannot_start_takes_no_place(self, small_pool: SandboxPool, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ConfigurationError):
            small_pool.session(tools=["f"])

        def fail(*_: object, **__: object) -> object:
            raise SandboxError("no more of them")

        monkeypatch.setattr(small_pool, "start_process", fail)
        for _ in range(5):
            with pytest.raises(SandboxError, match="no more"):
                small_pool.session()
        monkeypatch.undo()
        assert small_pool._places._free == 2
        small_pool.session().close()

    def test_a_session_that_loses_its_interpreter_keeps_its_place(self, small_pool: SandboxPool) -> None:
        with small_pool.session() as one, small_pool.session():
            one.run("import os; os._exit(1)")
            assert small_pool._places._free == 0
            assert one.run("1").text == "1"
        one.close()
        assert small_pool._places._free == 2

    @pytest.mark.parametrize(
        ("settings", "named"),
        [
            ({"warm": -1}, "warm=-1"),
            ({"warm": True}, "warm=True"),
            ({"warm": 1.0}, "warm=1.0"),
            ({"max_sessions": 0}, "max_sessions=0"),
            ({"max_sessions": "3"}, "max_sessions='3'"),
        ],
    )
    def test_impossible_numbers_are_refused(self, settings: dict[str, object], named: str) -> None:
        with pytest.raises(ConfigurationError, match=named):
            SandboxPool(**settings)  # type: ignore[arg-type]


class TestPlaces:
    def test_never_more_than_there_are_and_none_gets_lost(self) -> None:
        places = Places(3)
        taken, most = 0, 0
        lock = threading.Lock()

        def count(change: int) -> None:
            nonlocal taken, most
            with lock:
                taken += change
                most = max(most, taken)

        def thread(seed: int) -> None:
            pauses = random.Random(seed)
            for _ in range(200):
                (place,) = places.take()
                count(1)
                if pauses.random() < 0.1:
                    time.sleep(0.0002)
                count(-1)
                place.release()

        async def task(seed: int) -> None:
            pauses = random.Random(seed)
            for _ in range(200):
                try:
                    async with asyncio.timeout(pauses.choice((None, 0.0002, 0.002))):
                        (place,) = await places.take_async()
                        count(1)
                        try:
                            await asyncio.sleep(0)
                        finally:
                            count(-1)
                            place.release()
                except TimeoutError:
                    pass

        async def main() -> None:
            threads = [threading.Thread(target=thread, args=(seed,)) for seed in range(4)]
            for worker in threads:
                worker.start()
            await asyncio.gather(*(task(seed) for seed in range(8)))
            for worker in threads:
                await asyncio.to_thread(worker.join)

        asyncio.run(main())
        assert most == 3
        gc.collect()
        assert (places.waiting, places._free) == (0, 3)

    def test_a_place_that_comes_back_while_the_lock_is_held(self) -> None:
        places = Places(1)
        held = places.take()
        with places._lock:  # as where the collector runs in the middle of take()
            held.clear()
            assert places._free == 0
        assert places.waiting == 0
        places.take()[0].release()

    def test_several_are_had_at_once_and_none_is_held_meanwhile(self) -> None:
        async def main() -> None:
            places = Places(4)
            held = places.take(4)
            pairs = [asyncio.create_task(places.take_async(2)) for _ in range(2)]
            single = asyncio.create_task(places.take_async())
            await asyncio.sleep(0)
            assert (places.waiting, places.free) == (3, 0)
            held.pop().release()
            await asyncio.sleep(0)
            assert (places.waiting, places._free) == (3, 1)  # the one that is free is for the first in the line
            held.pop().release()
            first = await asyncio.wait_for(pairs[0], 60)
            held.pop().release()
            pairs[1].cancel()  # and whoever stands behind it takes the one that it was too few for
            held.extend(await asyncio.wait_for(single, 60))
            for place in (*first, *held):
                place.release()
            assert (places.waiting, places._free) == (0, 4)

        asyncio.run(main())

    def test_without_a_number_nobody_waits(self) -> None:
        places = Places(None)
        held = places.take(1000)
        places.close()
        for place in held:
            place.release()
            place.release()
        with pytest.raises(ProtocolError):
            places.take()


@pytest.mark.slow
def test_nothing_is_left_of_two_thousand_sessions(level: str) -> None:
    """One in ten dies, one in ten is left to the collector, one in fifty loses the race against its start."""
    outside = Held.now()
    with SandboxPool(isolation=level, preload=[], warm=4, max_sessions=8) as pool:  # type: ignore[arg-type]

        def row(number: int) -> None:
            session = pool.session(seed=number)
            assert session.run("open('file', 'w').write('x')").text == "1"
            if number % 10 == 3:
                assert session.run("import os; os.abort()").state_lost
            if number % 10 != 7:
                session.close()

        async def row_async(number: int) -> None:
            try:
                async with asyncio.timeout(0.001 if number % 50 == 9 else None):
                    with await pool.session_async(seed=number) as session:
                        assert (await session.run_async("2 + 2")).text == "4"
            except TimeoutError:
                assert number % 50 == 9

        async def rows(numbers: range) -> None:
            limit = asyncio.Semaphore(12)

            async def one(number: int) -> None:
                async with limit:
                    await row_async(number)

            await asyncio.gather(*(one(number) for number in numbers))

        for number in range(20):
            row(number)
        assert eventually(lambda: settled(pool))
        inside = outside.new()
        for number in range(1000):
            row(number)
        asyncio.run(rows(range(1000)))

        def nothing_more() -> bool:
            """The four in stock are others by now, and as many."""
            new = outside.new()
            return new.within(
                processes=len(inside.processes),
                descriptors=len(inside.descriptors),
                threads=len(inside.threads),
                folders=len(inside.folders),
            )

        assert eventually(nothing_more), (outside.new(), inside)
        assert pool._places._free == 8
    assert outside.new() == NOTHING
