"""Rows that are over, on their way out: their rewards, and whoever waits for them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace

from midstream.deltas import RowWatch
from midstream.jobs import Reward, Settings
from midstream.observing import ObservedRow
from midstream.tools import call
from midstream.types import StopKind, Trajectory

logger = logging.getLogger(__name__)

RowIndex = tuple[int, int]
"""A row's prompt among the batch's, and the row among that prompt's: the order in which results come back."""


@dataclass(slots=True)
class Delivery:
    """Takes trajectories as their rows stop, has rewards computed beside the other rows, and gives them out."""

    settings: Settings

    done: dict[RowIndex, Trajectory] = field(default_factory=dict)
    """What is finished so far: it is here also where the iteration is ended before it comes to it."""

    _rewarding: set[asyncio.Task[None]] = field(default_factory=set)
    _output: asyncio.Queue[tuple[RowIndex, Trajectory] | None] = field(default_factory=asyncio.Queue)

    def take(self, index: RowIndex, trajectory: Trajectory, row: ObservedRow, watch: RowWatch | None = None) -> None:
        """A row is over. Paused and cancelled ones get no reward. ``watch`` is told of its end."""
        if self.settings.reward is None or trajectory.stop.kind in (StopKind.PAUSED, StopKind.CANCELLED):
            self._finish(index, trajectory, row, watch)
            return
        self.settings.observers.move(row, "rewarding", trajectory)
        task = asyncio.create_task(self._add_reward(self.settings.reward, index, trajectory, row, watch))
        self._rewarding.add(task)
        task.add_done_callback(self._rewarding.discard)

    async def items(self) -> AsyncGenerator[tuple[RowIndex, Trajectory], None]:
        """Each trajectory as it is finished, until :meth:`end`."""
        while (item := await self._output.get()) is not None:
            yield item

    async def all_rewarded(self) -> None:
        """Wait for the rewards that are under way."""
        while self._rewarding:
            await asyncio.gather(*self._rewarding)

    async def abandon(self) -> None:
        """Wait for no reward any more: those under way are cancelled."""
        for task in self._rewarding:
            task.cancel()
        await asyncio.gather(*self._rewarding, return_exceptions=True)

    def end(self) -> None:
        """Nothing more will come."""
        self._output.put_nowait(None)

    async def _add_reward(
        self, reward: Reward, index: RowIndex, trajectory: Trajectory, row: ObservedRow, watch: RowWatch | None
    ) -> None:
        try:
            value = await call(self.settings.reward_threads, reward, [trajectory])
            trajectory = replace(trajectory, reward=float(value))
        except Exception as error:
            # The trajectory is finished and must not be lost to a fault of the reward function.
            logger.exception("the reward function failed for prompt %r", trajectory.prompt.id, extra=row.log_fields)
            trajectory = replace(trajectory, reward_error=f"{type(error).__name__}: {error}")
        except asyncio.CancelledError:
            self._finish(index, replace(trajectory, reward_error="cancelled"), row, watch)
            raise
        self._finish(index, trajectory, row, watch)

    def _finish(self, index: RowIndex, trajectory: Trajectory, row: ObservedRow, watch: RowWatch | None) -> None:
        self.settings.observers.move(row, "done", trajectory)
        if watch is not None:
            watch.end(trajectory)
        self.done[index] = trajectory
        self._output.put_nowait((index, trajectory))
