"""Sandboxes on every node of a Ray cluster, behind the face of one pool.

On each node there is one host, an actor, or one for so many cores, with a fork server of its own. Sessions are placed
where the fewest are for the cores there, and stay. A host that dies, or whose node does, takes no row with it: the
sessions are rebuilt elsewhere from their earlier blocks. Nodes that join are used.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import secrets
import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from midstream.crossing import Offer
from midstream.distributed.actors import CLUSTER_GONE, RayThread, asked, end_actor, sent, start_fault
from midstream.distributed.host import SandboxHost
from midstream.distributed.hosts import Host, HostName
from midstream.distributed.messages import Beside, HostReport
from midstream.distributed.placement import Placement
from midstream.distributed.session import RaySession
from midstream.errors import ConfigurationError, IsolationError, ProtocolError, SandboxError
from midstream.observing import Observer, Observers
from midstream.sandbox import SandboxPool
from midstream.sandbox.drivers import CallTool
from midstream.sandbox.open_sessions import OpenSessions
from midstream.sandbox.replay import History, past_blocks
from midstream.sandbox.session import tool_offers
from midstream.tools import Tool

logger = logging.getLogger(__name__)

_TOOL_SETS = itertools.count()
_WEAKEST_FIRST = ("weak", "container", "full")
_LOOK_AGAIN = 1.0  # seconds that a session waits for a place before it looks whether any can come


@dataclass(frozen=True, slots=True)
class RayReport:
    """What holds on all nodes: the weakest ``level`` of any of them, and how many hosts there are."""

    level: str
    hosts: int


class RayPool:
    """Sessions on the nodes of a cluster. The caller has called ``ray.init``.

    - ``cores_per_host``: a node has one host for so many of its cores, as Ray counts them; None is one a node.
    - ``options``: of each host's :class:`~midstream.SandboxPool` (``isolation``, ``limits``, ``preload``, ``warm``,
      ``max_sessions`` of a host, …). Where all hosts are full, sessions wait here, first come, first served.
    - ``node_ids``: the nodes that are used, as Ray names them; None is all. Several pools can share a cluster so.
    - ``num_cpus``: what a host asks of Ray's scheduler; 0 leaves the accounting to whoever uses the cores.
    - ``start_timeout``: seconds that the first host may take to start.
    - ``watch_interval``: seconds between two looks for nodes that joined.
    - ``observers``: are told here, as those of a :class:`~midstream.SandboxPool`, of sessions and of what they run on
      any node (:mod:`midstream.observing`). A session is open from its first block on, and moving it opens no other.

    A node that cannot isolate as was asked is left out, with a warning; where none can, it is an IsolationError.
    """

    forkable: bool

    def __init__(
        self,
        *,
        cores_per_host: int | None = None,
        node_ids: Collection[str] | None = None,
        num_cpus: float = 0.0,
        start_timeout: float = 60.0,
        watch_interval: float = 2.0,
        observers: Iterable[Observer] = (),
        **options: Any,
    ) -> None:
        for name, value in (("start_timeout", start_timeout), ("watch_interval", watch_interval)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ConfigurationError(f"{name}={value!r}: must be a number of seconds over 0")
        if cores_per_host is not None and (
            isinstance(cores_per_host, bool) or not isinstance(cores_per_host, int) or cores_per_host < 1
        ):
            raise ConfigurationError(f"cores_per_host={cores_per_host!r}: must be an integer of at least 1, or None")
        if isinstance(num_cpus, bool) or not isinstance(num_cpus, int | float) or num_cpus < 0:
            raise ConfigurationError(f"num_cpus={num_cpus!r}: must be a number of CPUs, 0 or more")
        if node_ids is not None and (isinstance(node_ids, str) or not node_ids):
            raise ConfigurationError(f"node_ids={node_ids!r}: must be several ids of nodes, or None")
        local = SandboxPool(**options)  # never started: it says what is wrong with the options
        self.limits, self.forkable, self.checkpoint = local.limits, local.forkable, local.checkpoint
        self.settings = local.settings
        local.close()
        self.observers = Observers(observers)
        self.open_sessions: OpenSessions[RaySession] = OpenSessions(self.observers)
        self._options = options
        self._cores_per_host = cores_per_host
        self._node_ids = None if node_ids is None else frozenset(node_ids)
        self._num_cpus = num_cpus
        self._start_timeout = start_timeout
        self._watch_interval = watch_interval
        self._max_sessions: int | None = options.get("max_sessions")
        self._lock = threading.Lock()
        self._placement: Placement[Host] = Placement(self._max_sessions)
        self._tools: list[tuple[tuple[Tool, ...], Beside]] = []
        self._thread: RayThread | None = None
        self._closed = False
        # On the loop's thread.
        self._hosts: dict[HostName, Host] = {}
        self._wanted: frozenset[str] = frozenset()  # the nodes that are to have hosts, when they were last looked at
        self._refused: dict[str, str] = {}
        self._failure = ""
        self._last_lost = -math.inf
        self._starting: set[HostName] = set()

    # --- the face of a pool

    def start(self) -> RayPool:
        """Start hosts on every node. Returns when the first of them is ready.

        Raises :class:`~midstream.errors.ConfigurationError` without a cluster, and
        :class:`~midstream.errors.IsolationError` where no node holds what was asked for.
        """
        import ray

        with self._lock:
            if self._closed:
                raise ProtocolError("the pool is closed")
            if self._thread is None:
                if not ray.is_initialized():
                    raise ConfigurationError("RayPool: there is no cluster yet; call ray.init(...) first")
                self._thread = RayThread()
                self._thread.call(self._thread.spawn, self._watch)
        since = time.monotonic()
        while not self._placement.hosts:
            self._check_hope(since)
            time.sleep(0.02)
        return self

    @property
    def report(self) -> RayReport:
        """What holds, after :meth:`start`."""
        self.start()
        hosts = self._placement.hosts
        return RayReport(min((host.level for host in hosts), key=_WEAKEST_FIRST.index), len(hosts))

    @property
    def nodes(self) -> list[str]:
        """The ids of the nodes that have hosts which are ready."""
        return list(dict.fromkeys(host.node_id for host in self._placement.hosts))

    @property
    def hosts(self) -> list[Host]:
        """The hosts that are ready."""
        return self._placement.hosts

    @property
    def free_sessions(self) -> int | None:
        """How many more can be opened without waiting; None is any number."""
        return self._placement.free

    def session(
        self,
        *,
        tools: Mapping[str, str | Offer] | Sequence[str] = (),
        call_tool: CallTool | None = None,
        seed: int | None = None,
        history: History = (),
    ) -> RaySession:
        """A new interpreter somewhere, as :meth:`midstream.SandboxPool.session`. It is opened with its first block."""
        self.start()
        return RaySession(
            self,
            tools=tool_offers(tools, call_tool),
            call_tool=call_tool or _no_tool,
            seed=secrets.randbits(63) if seed is None else seed,
            past=past_blocks(history),
        )

    async def session_async(self, **options: Any) -> RaySession:
        """The same for asyncio."""
        if self._thread is None:
            await asyncio.to_thread(self.start)
        return self.session(**options)

    def send_tools(self, tools: tuple[Tool, ...]) -> Beside:
        """Have copies of tools beside the sandboxes of every node, for those whose ``place`` is ``"sandbox"``.

        Raises :class:`~midstream.errors.ConfigurationError` for a function that cannot be pickled.
        """
        with self._lock:
            known = next((beside for given, beside in self._tools if given is tools), None)
            if known is None:
                names = tuple(tool.name for tool in tools)
                reference = sent(f"tools {', '.join(names)}: place='sandbox'", tools)
                known = Beside(next(_TOOL_SETS), names, [reference])
                self._tools.append((tools, known))
            return known

    def close(self) -> None:
        """End all hosts and their sessions. May be called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            thread = self._thread
        self._placement.close()
        if thread is not None:
            thread.run(self._stop()).result()
            thread.close()
        for session in self.open_sessions:
            session.close()
        self.open_sessions.tell()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # --- for its sessions

    def place(self) -> Host:
        """The host with the least load, for one session more; waits while there is none, or all are full."""
        with self.open_sessions.asked():
            ticket, since = self._placement.ask(), time.monotonic()
            try:
                while True:
                    with contextlib.suppress(TimeoutError):
                        return ticket.result(_LOOK_AGAIN)
                    self._check_hope(since)
            except BaseException:
                self._placement.withdraw(ticket)
                raise

    async def place_async(self) -> Host:
        """The same for asyncio."""
        with self.open_sessions.asked():
            ticket, since = self._placement.ask(), time.monotonic()
            try:
                while not ticket.done():
                    await asyncio.wait([asyncio.wrap_future(ticket)], timeout=_LOOK_AGAIN)
                    self._check_hope(since)
                return ticket.result()
            except BaseException:
                self._placement.withdraw(ticket)
                raise

    def join(self, host: Host, count: int) -> None:
        """Sessions were made at a host by copying."""
        self._placement.join(host, count)

    def leave(self, host: Host) -> None:
        """A session has left its host."""
        self._placement.leave(host)

    def _check_hope(self, since: float) -> None:
        """While there is no host: raise, unless one may come."""
        import ray

        if self._closed:
            raise ProtocolError("the pool is closed")
        if self._thread is not None and not ray.is_initialized():
            raise SandboxError(CLUSTER_GONE)
        if self._placement.hosts:
            return
        if self._wanted and self._wanted <= self._refused.keys():
            raise IsolationError("; ".join(self._refused[node] for node in sorted(self._wanted)))
        # Whoever has waited for long already waits for a host in place of the last one no less.
        if time.monotonic() - max(since, self._last_lost) > self._start_timeout:
            raise SandboxError(f"no host of sandboxes was ready within {self._start_timeout:g} s{self._failure}")

    # --- on the loop

    def _lost(self, host: Host, error: Exception) -> None:
        if self._hosts.get(host.name) is host:
            del self._hosts[host.name]
        self._placement.remove(host)
        self._last_lost = time.monotonic()
        if not self._closed:
            logger.warning("sandboxes of node %s are lost (%s); their sessions are rebuilt", host.node_id, error)
        end_actor(host.actor)

    async def _watch(self) -> None:
        """Start hosts on every node that has too few, now and whenever one joins."""
        import ray

        assert self._thread is not None
        while True:
            try:
                nodes = await asyncio.to_thread(ray.nodes) if ray.is_initialized() else []
            except Exception as error:  # noqa: BLE001  # the cluster may be away for a moment
                logger.warning("the cluster's nodes are not to be had: %s", error)
                nodes = []
            alive = frozenset(node["NodeID"] for node in nodes if node["Alive"])
            self._wanted = alive if self._node_ids is None else alive & self._node_ids
            for node in nodes:
                node_id = node["NodeID"]
                if node_id not in self._wanted or node_id in self._refused:
                    continue
                cores = int(node["Resources"].get("CPU", 0))
                count = 1 if self._cores_per_host is None else max(1, cores // self._cores_per_host)
                for name in ((node_id, number) for number in range(count)):
                    if name not in self._hosts and name not in self._starting:
                        self._starting.add(name)
                        self._thread.spawn(self._start_host, name, count)
            await asyncio.sleep(self._watch_interval)

    async def _start_host(self, name: HostName, of: int) -> None:
        """Start one of a node's ``of`` hosts."""
        import ray
        from ray.exceptions import RayError, RayTaskError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        assert self._thread is not None
        node_id = name[0]
        kind = ray.remote(SandboxHost).options(
            num_cpus=self._num_cpus,
            max_concurrency=1000,
            max_restarts=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node_id, soft=False),
        )
        actor = None
        try:
            actor = kind.remote(self._options)
            report: HostReport = await asked(actor, "start")
            host = Host(self._thread, actor, self, name, report.cores / of, report.level)
            host.process_id = report.process_id
            self._hosts[name] = host
            self._placement.add(host)
            host.begin()
        except RayTaskError as error:
            cause = error.cause
            logger.warning("node %s has no sandboxes: %s", node_id, cause)
            if isinstance(cause, IsolationError | ConfigurationError):
                self._refused[node_id] = str(cause)
            else:  # it may have been short of something for a moment; the next look at the nodes tries it again
                self._failure = f"; on node {node_id}: {type(cause).__name__}: {cause}"
            end_actor(actor)
        except RayError as error:
            why = start_fault(error)
            logger.warning("no host of sandboxes could be started on node %s: %s", node_id, why)
            self._failure = f"; on node {node_id}: {why}"
            end_actor(actor)
        except asyncio.CancelledError:
            end_actor(actor)
            raise
        finally:
            self._starting.discard(name)

    async def _stop(self) -> None:
        from ray.exceptions import RayError

        async def end(host: Host) -> None:
            host.lost = True
            with contextlib.suppress(RayError, TimeoutError):
                await asyncio.wait_for(asked(host.actor, "stop"), 10.0)
            end_actor(host.actor)
            host.fail_all("the pool was closed")

        await asyncio.gather(*map(end, self._hosts.values()))
        self._hosts.clear()


def _no_tool(name: str, _arguments: list[Any], _keyword_arguments: dict[str, Any]) -> Any:
    raise NameError(f"name {name!r} is not defined")
