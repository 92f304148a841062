"""One replica of an engine. Runs inside an actor; one thread has the engine to itself, and steps it.

A replica does not wait for an answer to each step: it may be ``steps_ahead`` of them further than what its rows have
been told. What it samples beyond the end of a block is taken back, as ids that come behind an end always are.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from midstream.distributed.replica_messages import (
    CloseRow,
    Collected,
    ExtendRow,
    ForkRow,
    HoldRow,
    OpenRows,
    ReplicaReport,
    RowOrder,
    Sampled,
)
from midstream.engines.base import Engine, Handle, Update
from midstream.errors import EngineError

UpdateWeights = Callable[[Any], object]
"""Changes the weights of the engine that it is given."""


@dataclass(slots=True)
class _Row:
    """``name``: its handle at the face; ``handle``: the engine's. ``length``: of its ids, all of them."""

    name: Handle
    handle: Handle
    length: int
    epoch: int
    running: bool


class EngineReplica:
    """``make_engine`` is called here, in the thread that steps the engine."""

    def __init__(self, make_engine: Callable[[], Engine], steps_ahead: int) -> None:
        self._make_engine = make_engine
        self._steps_ahead = steps_ahead
        self._engine: Engine
        self._names: dict[Handle, _Row] = {}
        self._handles: dict[Handle, _Row] = {}
        self._changed = threading.Condition()
        self._orders: deque[RowOrder] = deque()
        self._work: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._carried_out = 0
        self._stepped = 0
        self._answered = 0
        self._claimed = (0, 0)  # what is answered, once so many orders are carried out
        self._resting = False
        self._stopping = False
        self._broken: str | None = None
        self._sampled: list[Sampled] = []
        self._arrived = asyncio.Event()
        self._ended = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._live, name="midstream-replica", daemon=True)

    # --- the actor's methods

    async def start(self, update: UpdateWeights | None, version: int) -> ReplicaReport:
        """Make the engine, with the weights that the others have. Raises what ``make_engine`` does."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        report: ReplicaReport = await self._do(lambda: self._started(update, version))
        return report

    async def submit(self, orders: Sequence[RowOrder]) -> None:
        """Take orders; they are carried out between two steps."""
        with self._changed:
            self._orders.extend(orders)
            self._changed.notify()

    async def collect(self, answered: int, after: int) -> Collected:
        """What was sampled since the last call; waits until there is something.

        All that came of step number ``answered`` and before has been answered, by the first ``after`` orders.
        """
        with self._changed:
            self._claimed = answered, after
            self._changed.notify()
        await self._arrived.wait()
        with self._changed:
            if self._broken is not None:
                raise EngineError(self._broken)
            self._arrived.clear()
            sampled, self._sampled = self._sampled, []
            return Collected(self._stepped, sampled)

    async def end(self) -> None:
        """Waits until the replica is stopped. Whoever waits is told of its death, with nothing else under way."""
        await self._ended.wait()

    async def rest(self) -> None:
        """Returns when nothing is sampled any more."""
        await self._do(self._rest)

    async def go_on(self) -> None:
        """Sample again."""
        await self._do(self._go_on)

    async def update(self, update: UpdateWeights, version: int, keep_cache: bool) -> None:
        """Change the weights. Raises what ``update`` does."""
        await self._do(lambda: self._updated(update, version, keep_cache))

    async def stop(self) -> None:
        """Shut the engine down."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join)
        self._ended.set()

    async def _do(self, work: Callable[[], Any]) -> Any:
        """Have the thread do something between two steps."""
        done: Future[Any] = Future()
        with self._changed:
            self._work.append((work, done))
            self._changed.notify()
        return await asyncio.wrap_future(done)

    # --- in the thread that has the engine

    def _live(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._has_something_to_do)
                if self._stopping:
                    break
                work, orders = list(self._work), list(self._orders)
                self._work.clear()
                self._orders.clear()
            for each, done in work:
                try:
                    done.set_result(each())
                except BaseException as error:  # noqa: BLE001  # raised again where it is waited for
                    done.set_exception(error)
            for order in orders:
                self._carry_out(order)
            if self._may_step():
                self._step()
        if hasattr(self, "_engine"):
            self._engine.shutdown()

    def _has_something_to_do(self) -> bool:
        return bool(self._stopping or self._work or self._orders) or self._may_step()

    def _may_step(self) -> bool:
        if self._resting or self._broken or not any(row.running for row in self._names.values()):
            return False
        answered, after = self._claimed
        if self._carried_out >= after:
            self._answered = answered
        return self._stepped - self._answered <= self._steps_ahead

    def _step(self) -> None:
        try:
            updates = self._engine.step()
        except Exception as error:  # noqa: BLE001  # whatever it is, the engine is not to be used any more
            self._broken = f"the engine failed in a step: {type(error).__name__}: {error}"
            self._tell([])
            return
        sampled = []
        for update in updates:
            row = self._handles.get(update.handle)
            if row is None:
                continue
            row.length += len(update.ids)
            if update.error is not None or update.exhausted or update.finished:
                row.running = False
            plain = replace(update, handle=row.name, ids=list(update.ids), logprobs=list(update.logprobs))
            sampled.append(Sampled(row.epoch, plain))
        if sampled:
            self._stepped += 1
            self._tell(sampled)

    def _tell(self, sampled: list[Sampled]) -> None:
        assert self._loop is not None
        with self._changed:
            self._sampled += sampled
        self._loop.call_soon_threadsafe(self._arrived.set)

    def _carry_out(self, order: RowOrder) -> None:
        names = order.handles if isinstance(order, OpenRows) else (order.handle,)
        epoch = order.epoch if isinstance(order, OpenRows | HoldRow) else None
        if isinstance(order, ForkRow):
            names = (order.copy,)
        try:
            self._done(order)
        except Exception as error:  # noqa: BLE001  # the rows that it was for are told
            for name in names:
                row = self._names.get(name)
                if row is not None:
                    row.running = False
                known = epoch if epoch is not None else 0 if row is None else row.epoch
                failed = Update(name, (), (), error=f"{type(error).__name__}: {error}")
                self._tell([Sampled(known, failed)])
        self._carried_out += 1

    def _done(self, order: RowOrder) -> None:
        engine = self._engine
        match order:
            case OpenRows():
                self._open(order)
            case HoldRow(name, length, epoch):
                row = self._names[name]
                row.epoch, row.running = epoch, False
                engine.rollback(row.handle, row.length - length)
                row.length = length
            case ExtendRow(name, ids, media):
                row = self._names[name]
                engine.extend(row.handle, ids, media)
                row.length += len(ids)
                row.running = True
            case ForkRow(name, copy, length, noise):
                row = self._names[name]
                handle = engine.fork(row.handle, noise)
                engine.rollback(handle, row.length - length)
                self._add(_Row(copy, handle, length, epoch=0, running=False))
            case CloseRow(name):
                closed = self._names.pop(name, None)
                if closed is not None:
                    del self._handles[closed.handle]
                    engine.close(closed.handle)

    def _open(self, order: OpenRows) -> None:
        engine, length = self._engine, len(order.request.ids)
        handles = engine.open(order.request, len(order.handles))
        if len(handles) != len(order.handles):
            raise EngineError(f"open: {len(handles)} handles came back for {len(order.handles)} rows")
        for name, opened in zip(order.handles, handles, strict=True):
            handle = opened
            if order.held or order.noise is not None:
                engine.rollback(opened, 0)
            if order.noise is not None:
                handle = engine.fork(opened, order.noise)
                engine.close(opened)
                if not order.held:
                    engine.extend(handle, ())
            self._add(_Row(name, handle, length, order.epoch, running=not order.held))

    def _add(self, row: _Row) -> None:
        self._names[row.name] = self._handles[row.handle] = row

    def _started(self, update: UpdateWeights | None, version: int) -> ReplicaReport:
        import ray

        engine = self._engine = self._make_engine()
        if engine.capabilities.rounds:
            self._steps_ahead = 0  # a round is long, and a row whose block has ended must not go on in the next
        if update is not None:
            self._updated(update, version, keep_cache=False)
        return ReplicaReport(
            engine.tokenizer,
            engine.capabilities,
            engine.context_length,
            engine.eos_ids,
            engine.weight_version,
            ray.get_runtime_context().get_node_id(),
            os.getpid(),
        )

    def _updated(self, update: UpdateWeights, version: int, keep_cache: bool) -> None:
        update(self._engine)
        self._engine.set_weights(version, keep_cache=keep_cache)

    def _rest(self) -> None:
        if not self._resting:
            self._resting = True
            self._engine.pause()

    def _go_on(self) -> None:
        if self._resting:
            self._resting = False
            self._engine.resume()
