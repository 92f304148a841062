"""What a row's closed blocks ask for, run beside the steps: code in its session, calls of tools on the host."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from midstream.calling import run_tool_call
from midstream.jobs import Settings
from midstream.live import LiveRow
from midstream.observing import BlockBegan, BlockEnded
from midstream.tools import RowTools
from midstream.types import Call, ExecutionResult


async def run_calls(live: LiveRow, calls: Sequence[Call], settings: Settings) -> Sequence[ExecutionResult]:
    """The results of ``calls``, in their order.

    Calls of tools run side by side, and beside the blocks of code, which run one after the other. Raises what the
    machinery fails with, and leaves nothing running then.
    """
    tools, known = _tools_of(live, settings), settings.tools.tools
    asked = {
        call.index: asyncio.ensure_future(_observed(live, call, settings, partial(run_tool_call, call, tools, known)))
        for call in calls
        if call.kind != "code"
    }
    try:
        results = []
        for call in calls:
            task = asked.get(call.index)
            if task is None:
                results.append(await _observed(live, call, settings, partial(_run_code, live, call, settings)))
            else:
                results.append(await task)
        return results
    finally:
        for task in asked.values():
            task.cancel()
        await asyncio.gather(*asked.values(), return_exceptions=True)


async def _observed(
    live: LiveRow, call: Call, settings: Settings, run: Callable[[], Awaitable[ExecutionResult]]
) -> ExecutionResult:
    observers = settings.observers
    started = time.monotonic()
    began = BlockBegan(live.observed, call)
    observers(began)
    try:
        result = await run()
    except BaseException as error:
        observers(BlockEnded(began, time.monotonic() - started, error=error))
        raise
    observers(BlockEnded(began, time.monotonic() - started, result))
    return result


async def _run_code(live: LiveRow, call: Call, settings: Settings) -> ExecutionResult:
    if call.declined:
        return ExecutionResult(call.declined)
    if live.session is None:
        live.session = await settings.open_session(live.session_seed, live.history)
    live.session.serve(_tools_of(live, settings))
    return await live.session.run_async(call.code)


def _tools_of(live: LiveRow, settings: Settings) -> RowTools:
    if live.tools is None:
        live.tools = settings.tools.row(live.tool_context, live.observed)
    return live.tools
