"""The replicas of an engine, as those who use them see them: started, replaced, told all at once, and their news."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from midstream.distributed.actors import CLUSTER_GONE, Link, RayThread, asked, end_actor, start_fault
from midstream.distributed.replica import EngineReplica
from midstream.distributed.replica_messages import Collected, ReplicaReport
from midstream.errors import ConfigurationError, EngineError

logger = logging.getLogger(__name__)

START_ATTEMPTS = 3
"""Times in a row that making an engine may fail before no more are started."""

LOST_ATTEMPTS = 10
"""As many for actors that are lost while they start, as on a node that is going."""

_PAUSE = 1.0  # seconds before another attempt


class Replica(Link):
    """A replica's actor."""

    def __init__(self, thread: RayThread, actor: Any, replicas: Replicas, report: ReplicaReport) -> None:
        super().__init__(thread, actor)
        self.report = report
        self.rows = 0
        self.sent = 0
        self.delivered: int | None = None
        self._replicas = replicas
        self._answered = (0, 0)
        self._wanted = asyncio.Event()
        self._wanted.set()

    def begin(self) -> None:
        super().begin()
        self._thread.spawn(self._watch)

    async def _watch(self) -> None:
        """A replica is noticed to have died though nothing is wanted of it."""
        from ray.exceptions import RayError

        try:
            await asked(self.actor, "end")
        except RayError as error:
            self.lose(error)

    def tell(self, order: Any) -> None:
        self.sent += 1
        self.send([order])

    def answer(self) -> None:
        """All that was delivered has been answered by what was sent until now."""
        if self.delivered is not None:
            self._answered, self.delivered = (self.delivered, self.sent), None
            self._thread.call(self._wanted.set)

    def _arrived(self, batch: Collected) -> None:
        self._wanted.clear()
        self._replicas.notice((self, batch))

    def _gone(self, error: Exception) -> None:
        self._replicas.lost(self, error)

    async def _collecting(self) -> Sequence[Any]:
        await self._wanted.wait()
        return self._answered


News = tuple[Replica, Collected | Exception | None]
"""Of a replica: what it has sampled, why it is gone, or None: it is ready."""


class Replicas:
    """``count`` of them, wherever Ray finds ``resources``. One that dies is replaced.

    ``make_engine``, and what changes weights: references to such functions in Ray's store.
    """

    def __init__(
        self,
        make_engine: Any,
        count: int,
        resources: Mapping[str, Any],
        steps_ahead: int,
        start_timeout: float,
    ) -> None:
        self._make_engine = make_engine
        self._count = count
        self._resources = resources
        self._kind = _kind(resources)
        self._steps_ahead = steps_ahead
        self._start_timeout = start_timeout
        self._news = threading.Condition()
        self._inbox: deque[News] = deque()
        self._given_up: str | None = None
        # On the loop's thread.
        self._alive: list[Replica] = []
        self._starting = 0
        self._failures = 0
        self._weights: tuple[Any, int] | None = None
        self._closed = False
        _warn_of_what_no_node_has(resources)
        self._thread = RayThread()
        self._thread.call(self._start_missing)

    def first_report(self) -> ReplicaReport:
        """Wait until all are ready, or have had their time. Raises EngineError, and closes, where none is."""
        until = time.monotonic() + self._start_timeout
        try:
            with self._news:
                while len(self._alive) < self._count and self._given_up is None and time.monotonic() < until:
                    self._news.wait(0.1)
                if not self._alive:
                    raise EngineError(self._given_up or self._too_late())
                if len(self._alive) < self._count:
                    logger.warning("%d of %d replicas of the engine are ready", len(self._alive), self._count)
                return self._alive[0].report
        except BaseException:
            self.close()
            raise

    @property
    def reports(self) -> list[ReplicaReport]:
        return [replica.report for replica in list(self._alive)]

    def take(self) -> tuple[list[News], str | None]:
        """What has come, in its order; and why no replica will be started any more, where none will."""
        with self._news:
            news = list(self._inbox)
            self._inbox.clear()
            return news, self._given_up

    def wait(self, seconds: float) -> None:
        """Wait for something to take."""
        with self._news:
            self._news.wait_for(lambda: self._inbox or self._given_up, seconds)

    def tell_all(self, method: str) -> None:
        """Call a method of every replica, and wait for it."""
        if not self._closed:
            self._thread.run(self._on_all(method)).result()

    def _too_late(self) -> str:
        import ray

        asked, there = dict(self._resources), ray.cluster_resources()
        late = f"no replica was ready within {self._start_timeout:g} s"
        return f"{late}; each asks for {asked}, and the cluster has {there}, what is in use included"

    def update(self, update: Any, version: int, keep_cache: bool) -> None:
        """As :meth:`midstream.distributed.ray.RayGenerator.update_weights`, while nothing is sampled."""
        self._thread.run(self._update_all(update, version, keep_cache)).result()

    def close(self) -> None:
        """End all. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self._thread.run(self._stop_all()).result()
        self._thread.close()

    # --- on the loop

    def notice(self, news: tuple[Replica, Collected | Exception | None]) -> None:
        with self._news:
            self._inbox.append(news)
            self._news.notify()

    def lost(self, replica: Replica, error: Exception) -> None:
        self._alive.remove(replica)
        if not self._closed:
            logger.warning("a replica of the engine is lost (%s); its rows go on elsewhere", error)
        end_actor(replica.actor)
        self.notice((replica, error))
        self._failures, self._given_up = 0, None
        self._start_missing()

    def _start_missing(self) -> None:
        import ray

        if not ray.is_initialized():
            self._give_up(CLUSTER_GONE)
        while not self._closed and self._given_up is None and len(self._alive) + self._starting < self._count:
            self._starting += 1
            self._thread.spawn(self._start_one)

    async def _start_one(self) -> None:
        from ray.exceptions import RayActorError, RayError

        actor: Any = None
        try:
            actor = self._kind.remote(self._make_engine, self._steps_ahead)
            weights = self._weights
            update, version = weights or (None, 0)
            starting = asked(actor, "start", update, version)
            report: ReplicaReport = await asyncio.wait_for(starting, self._start_timeout)
            while weights is not self._weights:  # changed while it started
                weights = self._weights
                if weights is None:
                    raise EngineError("its weights were to be changed and then were not")
                await asked(actor, "update", *weights, False)
        except asyncio.CancelledError:
            end_actor(actor)
            raise
        except Exception as error:  # noqa: BLE001  # whatever it is, whoever waits is told
            self._failures += 1
            late = isinstance(error, TimeoutError) and not isinstance(error, RayError)  # not one of make_engine's
            why = f"it was not ready within {self._start_timeout:g} s" if late else start_fault(error)
            lost = isinstance(error, RayActorError) and not error.actor_init_failed
            most = LOST_ATTEMPTS if lost else START_ATTEMPTS
            logger.warning("a replica of the engine could not be started: %s", why)
            end_actor(actor)
            if self._failures >= most:
                self._give_up(why)
            else:
                await asyncio.sleep(_PAUSE)
            self._starting -= 1
            self._start_missing()
            return
        self._starting -= 1
        self._failures = 0
        replica = Replica(self._thread, actor, self, report)
        self._alive.append(replica)
        self.notice((replica, None))
        replica.begin()

    def _give_up(self, why: str) -> None:
        with self._news:
            self._given_up = f"no replica of the engine could be started: {why}"
            self._news.notify()

    async def _on_all(self, method: str) -> None:
        from ray.exceptions import RayError

        async def one(replica: Replica) -> None:
            try:
                await asked(replica.actor, method)
            except RayError as error:
                replica.lose(error)

        await asyncio.gather(*map(one, list(self._alive)))

    async def _update_all(self, update: Any, version: int, keep_cache: bool) -> None:
        replicas, before = list(self._alive), self._weights
        self._weights = (update, version)
        outcomes = await asyncio.gather(
            *(asked(replica.actor, "update", update, version, keep_cache) for replica in replicas),
            return_exceptions=True,
        )
        failures = [(one, error) for one, error in zip(replicas, outcomes, strict=True) if error is not None]
        if len(failures) == len(replicas):
            self._weights = before
            failures += [
                (one, EngineError("it has weights that were taken back")) for one in self._alive if one not in replicas
            ]
        for replica, error in failures:
            replica.lose(error if isinstance(error, Exception) else EngineError(repr(error)))
        if self._weights is before:
            why = "no replica is alive" if not failures else getattr(failures[0][1], "cause", None) or failures[0][1]
            raise EngineError(f"update_weights: it failed on every replica: {why}")

    async def _stop_all(self) -> None:
        from ray.exceptions import RayError

        async def one(replica: Replica) -> None:
            replica.lost = True
            with contextlib.suppress(RayError, TimeoutError):
                await asyncio.wait_for(asked(replica.actor, "stop"), 10.0)
            end_actor(replica.actor)

        await asyncio.gather(*map(one, self._alive))
        self._alive.clear()


def _kind(resources: Mapping[str, Any]) -> Any:
    """A replica's actor, not made yet."""
    import ray

    try:
        return ray.remote(EngineReplica).options(max_concurrency=100, max_restarts=0, **resources)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"resources={dict(resources)!r}: {error}") from error


def _warn_of_what_no_node_has(resources: Mapping[str, Any]) -> None:
    """Ray waits for it in silence: a node that has it may join."""
    import ray

    own = resources.get("resources")
    named = {
        "CPU": resources.get("num_cpus"),
        "GPU": resources.get("num_gpus"),
        **(own if isinstance(own, Mapping) else {}),
    }
    wanted = {name: amount for name, amount in named.items() if isinstance(amount, int | float) and amount > 0}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(node.get(name, 0) >= amount for name, amount in wanted.items()) for node in nodes):
        logger.warning("no node of the cluster has what a replica asks for, %s: they wait for one that joins", wanted)
