"""Live copies of a session's process."""

from __future__ import annotations

import asyncio
import contextlib
import socket

from midstream.errors import SandboxDied
from midstream.sandbox.family import MOST_CLONES, Family
from midstream.sandbox.fork_server import new_channel
from midstream.sandbox.process import SessionProcess, wait_for_start, wait_for_start_async


def clone(process: SessionProcess, count: int) -> list[SessionProcess]:
    """``count`` copies of an idle process.

    Raises :class:`~midstream.errors.SandboxError` where it cannot be copied; it can go on all the same.
    """
    made: list[SessionProcess] = []
    try:
        while len(made) < count:
            family, channels = _ask(process, count - len(made))
            try:
                while channels:
                    made.append(wait_for_start(channels.pop(), family))
            finally:
                _close(channels)
    except BaseException:
        for copy in made:
            copy.close()
        raise
    return [_like(process, copy) for copy in made]


async def clone_async(process: SessionProcess, count: int) -> list[SessionProcess]:
    """The same for asyncio."""
    made: list[SessionProcess] = []
    try:
        while len(made) < count:
            family, channels = _ask(process, count - len(made))
            try:
                while channels:
                    made.append(await wait_for_start_async(channels.pop(), family))
            finally:
                _close(channels)
            await asyncio.sleep(0)
    except BaseException:
        for copy in made:
            copy.close()
        raise
    return [_like(process, copy) for copy in made]


def freeze(process: SessionProcess) -> SessionProcess:
    """An exact copy of an idle process, which itself stands still from then on, until :func:`roll_back`.

    Raises :class:`~midstream.sandbox.process.CloneRefused` where there can be none; it then goes on as it is.
    """
    family, (channel,) = _ask(process, 1, checkpoint=True)
    try:
        return _like(process, wait_for_start(channel, family))
    except BaseException:
        roll_back(process)
        raise


async def freeze_async(process: SessionProcess) -> SessionProcess:
    """The same for asyncio."""
    family, (channel,) = _ask(process, 1, checkpoint=True)
    try:
        return _like(process, await wait_for_start_async(channel, family))
    except BaseException:
        roll_back(process)
        raise


def roll_back(process: SessionProcess) -> None:
    """Let a process that stands still go on, and see to it that its copy does not."""
    assert process.family is not None
    with contextlib.suppress(OSError):  # the warden is gone, and with it the process
        process.family.roll_back(process.number)


def _ask(process: SessionProcess, count: int, *, checkpoint: bool = False) -> tuple[Family, list[socket.socket]]:
    family = process.family
    assert family is not None  # as in every process of a forkable pool
    ours: list[socket.socket] = []
    theirs: list[socket.socket] = []
    try:
        for _ in range(min(count, MOST_CLONES)):
            mine, its = new_channel()
            ours.append(mine)
            theirs.append(its)
        if checkpoint:
            family.request_checkpoint(process.number, theirs[0])
        else:
            family.request_clones(process.number, theirs)
        process.tell({"clones": len(theirs)})
    except OSError as error:
        _close(ours)
        raise SandboxDied(f"the session is gone: {error}") from None
    except BaseException:
        _close(ours)
        raise
    finally:
        _close(theirs)
    return family, ours


def _like(process: SessionProcess, copy: SessionProcess) -> SessionProcess:
    copy.orphaned = process.orphaned
    if process.quota is not None and copy.folder is not None:
        copy.quota = process.quota.for_copy(copy.folder)
    return copy


def _close(channels: list[socket.socket]) -> None:
    for channel in channels:
        channel.close()
