"""Where a generator's rows run their code: sessions of a pool, which is the caller's or the generator's own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

from midstream.errors import ProtocolError, SandboxError
from midstream.jobs import OwnPool, Pool, Session, TakesTools
from midstream.leases import SessionLeases
from midstream.tools import ToolHost
from midstream.types import CallRecord, ExecutionResult


class Sessions:
    """Opens and copies sessions; those that are held for paused rows give way where there is no room.

    ``pool``: the caller's, which is left open; where it is None, ``make_pool`` makes one when it is needed, and
    ``close`` ends it. ``isolation``: the level that held when the sandboxes were last started, and ``settings``:
    the pool's; None before.
    """

    def __init__(
        self, pool: Pool | None, make_pool: Callable[[], OwnPool], leases: SessionLeases, tools: ToolHost
    ) -> None:
        self._pool = pool
        self._make_pool = make_pool
        self._own_pool: OwnPool | None = None
        self._lock = threading.Lock()
        self._closed = False
        self._leases = leases
        self._tools = tools
        self.isolation: str | None = None
        self.settings: dict[str, Any] | None = None

    @property
    def forkable(self) -> bool:
        """Whether sessions can be copied live; a pool that is made here has none that can."""
        return self._pool is not None and self._pool.forkable

    def start(self) -> None:
        """Have sandboxes, with the tools that belong beside them. Raises where this machine cannot isolate."""
        pool = self._started_pool()
        self.isolation, self.settings = pool.report.level, pool.settings
        if self._tools.beside_sandbox and isinstance(pool, TakesTools):
            pool.send_tools(self._tools.beside_sandbox)

    def close(self) -> None:
        """Stop the pool that was made here; no other is made. May be called twice, and from any thread."""
        with self._lock:
            self._closed = True
            pool, self._own_pool = self._own_pool, None
        if pool is not None:
            pool.close()

    async def open(self, seed: int, history: Sequence[CallRecord]) -> Session:
        """A session from a seed and the blocks that it must have run already."""
        pool = self._started_pool()
        # A session that is kept for a paused row must not keep one that is needed now from being opened.
        while pool.free_sessions == 0 and self._leases.give_up_oldest():
            pass
        return await pool.session_async(
            tools=self._tools.tools.offers,
            call_tool=self._tools.row(),  # until it is told whose it is
            seed=seed,
            history=[(record.call.code, record.result) for record in history if _may_run_again(record.result)],
        )

    async def fork(self, session: Session, n: int) -> Sequence[Session]:
        """Copies of a session, at once or not at all: the row holds a place while it waits, and so may others."""
        pool = self._started_pool()
        while pool.free_sessions is not None and pool.free_sessions < n:
            if not self._leases.give_up_oldest():
                raise SandboxError(f"fork: {n} more sessions are not to be had, as the pool's max_sessions are open")
        return await session.fork_async(n)

    def _started_pool(self) -> Pool:
        if self._pool is not None:
            return self._pool
        with self._lock:
            if self._closed:
                raise ProtocolError("this generator is closed")
            if self._own_pool is None:
                pool = self._make_pool()
                pool.start()
                self._own_pool = pool
            return self._own_pool


def _may_run_again(result: ExecutionResult | None) -> TypeGuard[ExecutionResult]:
    """Not a block that ended its interpreter: what it did is gone, and it would do so again."""
    if result is None:
        return False
    ended = result.state_lost or result.rolled_back
    killed = ended and result.error is not None and result.error.type == "Killed"
    return not killed
