"""The sandboxes of one node, without the cluster: what is closed leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from midstream.distributed.host import SandboxHost
from midstream.distributed.messages import Close, Done, Fork, News, Open, Order, Run
from midstream.distributed.ray import RayPool


async def news_of(host: SandboxHost, number: int) -> News:
    """What comes of an order."""
    while True:
        for news in await host.collect():
            if news.number == number:
                return news


@pytest.fixture
async def host() -> Any:
    host = SandboxHost({"preload": [], "max_sessions": 2, "forkable": True})
    await host.start()
    yield host
    await host.stop()


async def test_a_session_that_is_closed_while_it_opens_takes_no_place(host: SandboxHost) -> None:
    for number in range(6):
        name = f"closed-{number}"
        await host.submit([Open(number, name, {}, 0, ()), Run(100 + number, name, "1", None, None, None)])
        await asyncio.sleep(0)  # it is being opened
        await host.submit([Close(name)])
    await host.submit([Open(10, "open", {}, 0, ()), Run(11, "open", "1 + 1", None, None, None)])
    found = await news_of(host, 11)
    assert isinstance(found, Done)
    assert found.value.text == "2"
    assert (list(host._sessions), list(host._orders)) == (["open"], ["open"])
    assert host._pool.free_sessions == 1


async def test_sessions_that_are_being_opened_end_with_their_host() -> None:
    host = SandboxHost({"preload": []})
    await host.start()
    await host.submit([Open(1, "s", {}, 0, ()), Run(2, "s", "while True: pass", None, None, None)])
    await asyncio.sleep(0)
    await host.stop()
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (host._sessions, host._orders) == ({}, {})


async def test_what_is_given_up_while_it_is_copied_is_closed_before_its_copies(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other way round, they could be made in between, and stay."""
    with RayPool(preload=[], forkable=True, start_timeout=300) as pool:
        session = await pool.session_async()
        await session.run_async("x = 1")
        host = session._host
        assert host is not None
        given: list[Order] = []
        order = host.order

        def noted(orders: Sequence[Order], post: Any) -> None:
            given.extend(orders)
            if not any(isinstance(each, Fork) for each in orders):  # that one never gets there
                order(orders, post)

        monkeypatch.setattr(host, "order", noted)
        task = asyncio.create_task(session.fork_async(2))
        while not given:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([task])
        (fork,) = [each for each in given if isinstance(each, Fork)]
        assert [each.session for each in given if isinstance(each, Close)] == [fork.session, *fork.copies]
        assert (await session.run_async("x")).text == "1"
        session.close()


def test_copies_that_nobody_waits_for_any_more_are_closed(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with RayPool(preload=[], forkable=True, start_timeout=300) as pool, pool.session() as session:
        session.run("x = 1")
        host = session._host
        assert host is not None
        given: list[Order] = []
        order = host.order

        def noted(orders: Sequence[Order], post: Any) -> None:
            given.extend(orders)
            order(orders, post)

        monkeypatch.setattr(host, "order", noted)
        session._post = lambda _: None
        steps = session._fork(2)
        next(steps)
        steps.close()
        assert isinstance(given[0], Fork)
        assert [each.session for each in given[1:] if isinstance(each, Close)] == list(given[0].copies)
        assert session.run("x").text == "1"
