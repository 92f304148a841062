"""Sessions for many rows, from one fork server."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

from midstream import checks
from midstream.crossing import Offer
from midstream.errors import ConfigurationError, IsolationError, ProtocolError, SandboxDied
from midstream.observing import InterpreterStarted, Observer, Observers
from midstream.sandbox import probe
from midstream.sandbox.drivers import CallTool
from midstream.sandbox.fork_server import ForkServer, ForkServerSettings
from midstream.sandbox.guardrails import Guardrails
from midstream.sandbox.inside.preload import preloaded
from midstream.sandbox.isolation.report import LAYERS, IsolationReport
from midstream.sandbox.limits import SandboxLimits
from midstream.sandbox.open_sessions import OpenSessions
from midstream.sandbox.places import Place, Places
from midstream.sandbox.process import START_SECONDS, SessionProcess
from midstream.sandbox.replay import History
from midstream.sandbox.results import ErrorStyle
from midstream.sandbox.session import Session, check_checkpoint
from midstream.sandbox.stock import Stock

Isolation = Literal["auto", "full", "container"]


class SandboxPool:
    """Gives each row an interpreter of its own, isolated from the host and from the others.

    - ``isolation``: the level to hold, ``"full"`` or ``"container"``; ``"auto"`` takes the best that this
      machine can hold. Every level is tried out when the pool starts, in a real session; below
      *container* it refuses to start, with an :class:`~midstream.errors.IsolationError` that names the
      missing layer.
    - ``allow_missing``: layers (of ``filesystem``, ``network``, ``processes``, ``signals``) without which it
      may start all the same, each with a warning.
    - ``limits``: what bounds each session.
    - ``preload``: modules that sessions find imported; by default numpy and sympy, where installed.
    - ``environment``: environment variables that sessions see, beside a few fixed ones.
    - ``readable``: files and folders that sessions may read, beside Python's own. Their permissions still
      count, and a session may have a user id of its own.
    - ``error_style``: what a model is shown of an exception, its ``repr`` or a short ``traceback``.
    - ``warm``: how many interpreters to keep started ahead, so that a session is there at once.
    - ``max_sessions``: how many sessions may be open at a time, or None. Who asks for one more waits, first
      come, first served, until one is closed; so a thread that waits must not be the one that would close.
    - ``guardrails``: modules and paths that code is plainly told to leave alone, above the isolation.
    - ``forkable``: whether sessions can be forked (:meth:`Session.fork`). It takes a second process for each
      session, which watches over it and its copies.
    - ``checkpoint``: whether each block runs so that the session survives its death, unless :meth:`Session.run`
      is told otherwise. It needs ``forkable``.
    - ``observers``: callables that are told of sessions and of what they run (:mod:`midstream.observing`), such as
      :class:`midstream.telemetry.Metrics`.

    Starts with ``with``, with :meth:`start`, or with the first session. Usable from threads and asyncio.
    """

    def __init__(
        self,
        *,
        isolation: Isolation = "auto",
        limits: SandboxLimits | None = None,
        preload: Sequence[str] | None = None,
        environment: Mapping[str, str] | None = None,
        readable: Sequence[str] = (),
        error_style: ErrorStyle = "repr",
        allow_missing: Collection[str] = frozenset(),
        warm: int = 0,
        max_sessions: int | None = None,
        guardrails: Guardrails | None = None,
        forkable: bool = False,
        checkpoint: bool = False,
        observers: Iterable[Observer] = (),
    ) -> None:
        if isolation not in ("auto", "full", "container"):
            raise ConfigurationError(f"isolation={isolation!r}: must be 'auto', 'full' or 'container'")
        if error_style not in ("repr", "traceback"):
            raise ConfigurationError(f"error_style={error_style!r}: must be 'repr' or 'traceback'")
        if limits is not None and not isinstance(limits, SandboxLimits):
            raise ConfigurationError(f"limits={limits!r}: must be SandboxLimits")
        if guardrails is not None and not isinstance(guardrails, Guardrails):
            raise ConfigurationError(f"guardrails={guardrails!r}: must be Guardrails or None")
        self._guardrails = None if guardrails is None else guardrails.as_dict()
        warm = checks.integer("warm", warm, 0)
        max_sessions = checks.integer("max_sessions", max_sessions, 1, optional=True)
        if not isinstance(forkable, bool):
            raise ConfigurationError(f"forkable={forkable!r}: must be True or False")
        check_checkpoint(checkpoint, forkable)
        self.limits = limits or SandboxLimits()
        if forkable and self.limits.resident_memory is not None:
            raise ConfigurationError(
                f"SandboxLimits.resident_memory={self.limits.resident_memory!r}: must be None with forkable=True, "
                "where a session and its copies are one family of processes"
            )
        self.observers = Observers(observers)
        self.forkable = forkable
        self.checkpoint = checkpoint
        self._max_sessions = max_sessions
        self.error_style: ErrorStyle = error_style
        self._settings = ForkServerSettings(
            limits=self.limits,
            preload=_checked_preload(preload),
            environment=_checked_environment({} if environment is None else environment),
            readable=_checked_paths(readable),
            allow_missing=_checked_layers(allow_missing),
            isolation=isolation,
            clones=forkable,
        )
        self._lock = threading.Lock()
        self._warm = warm
        self._server: ForkServer | None = None
        self._stock: Stock | None = None
        self._report: IsolationReport | None = None
        self._sessions: OpenSessions[Session] = OpenSessions(self.observers)
        self._places = Places(max_sessions)
        self._held_lock = threading.Lock()
        self._held: weakref.WeakKeyDictionary[Session, Place] = weakref.WeakKeyDictionary()
        self._finalizer: weakref.finalize[[Stock], SandboxPool] | None = None
        self._closed = False

    # -- sessions

    def session(
        self,
        *,
        tools: Mapping[str, str | Offer] | Sequence[str] = (),
        call_tool: CallTool | None = None,
        seed: int | None = None,
        history: History = (),
    ) -> Session:
        """A new interpreter, ready to run.

        - ``tools``: names that the code can call, or a mapping from names to descriptions (``help`` shows
          them) or to a :class:`~midstream.crossing.Offer`, which tells the signature too.
          ``call_tool(name, arguments, keyword_arguments)`` runs them on the host, with the values of
          :mod:`midstream.crossing`; for :meth:`Session.run_async` it may be a coroutine function. It returns
          the value, or a :class:`~midstream.types.ToolAnswer`. What it raises is raised in the code, as type
          name and message, except for :class:`~midstream.errors.MidstreamError`, which comes out of ``run``.
        - ``seed``: of ``random`` and ``numpy.random``, 0 or more; None draws one.
        - ``history``: blocks that ran in an earlier session, with their results. Before its first own block
          the session runs them again, with the tool results that they had; where that gives something
          else, the first result says that state was lost.
        """
        session = Session(self, tools=tools, call_tool=call_tool, seed=seed, history=history)
        (place,) = self._take_places(1)
        self.admit(session, place)
        try:
            if not history:
                session.attach(self.start_process(session.tools, session.seed))
        except BaseException:
            session.close()
            raise
        return session

    async def session_async(
        self,
        *,
        tools: Mapping[str, str | Offer] | Sequence[str] = (),
        call_tool: CallTool | None = None,
        seed: int | None = None,
        history: History = (),
    ) -> Session:
        """The same for asyncio. A pool that has not started yet starts first, which blocks for a moment."""
        session = Session(self, tools=tools, call_tool=call_tool, seed=seed, history=history)
        (place,) = await self._take_places_async(1)
        self.admit(session, place)
        try:
            if not history:
                session.attach(await self.start_process_async(session.tools, session.seed))
        except BaseException:
            session.close()
            raise
        return session

    @property
    def waiting(self) -> int:
        """How many wait for a session, since ``max_sessions`` are open."""
        return self._places.waiting

    @property
    def free_sessions(self) -> int | None:
        """How many more can be opened without waiting; None is any number."""
        return self._places.free

    def take_places(self, count: int) -> list[Place]:
        """Places for ``count`` sessions beside one that is open; blocks until there are so many."""
        self._check_places(count)
        return self._take_places(count)

    async def take_places_async(self, count: int) -> list[Place]:
        """The same for asyncio."""
        self._check_places(count)
        return await self._take_places_async(count)

    def _take_places(self, count: int) -> list[Place]:
        with self._sessions.asked(count):
            return self._places.take(count)

    async def _take_places_async(self, count: int) -> list[Place]:
        with self._sessions.asked(count):
            return await self._places.take_async(count)

    def _check_places(self, count: int) -> None:
        if self._max_sessions is not None and count >= self._max_sessions:
            raise ConfigurationError(f"n={count}: with max_sessions={self._max_sessions} there can never be so many")

    def admit(self, session: Session, place: Place) -> None:
        """Count a session in, which has taken a place."""
        with self._held_lock:
            self._held[session] = place
        self._sessions.add(session)

    def start_process(self, tools: Mapping[str, Offer], seed: int, *, replacement: bool = False) -> SessionProcess:
        """Start an interpreter. One that is gone before it is ready, alone or with its fork server, is tried once more.

        ``replacement``: it is for a session that has had one.
        """
        began = time.monotonic()
        for attempt in (1, 2):
            stock = self._live_stock()
            try:
                process = stock.start()
            except SandboxDied:
                if attempt == 2 or not (stock.server.ends() or time.monotonic() - began < START_SECONDS):
                    raise
            else:
                process.lease(tools, seed, self._guardrails, self.limits)
                self.observers(InterpreterStarted(time.monotonic() - began, replacement))
                return process
        raise AssertionError("unreachable")

    async def start_process_async(
        self, tools: Mapping[str, Offer], seed: int, *, replacement: bool = False
    ) -> SessionProcess:
        """The same for asyncio."""
        began = time.monotonic()
        for attempt in (1, 2):
            stock = self._live_stock()
            try:
                process = await stock.start_async()
            except SandboxDied:
                if attempt == 2 or not (stock.server.ends() or time.monotonic() - began < START_SECONDS):
                    raise
            else:
                process.lease(tools, seed, self._guardrails, self.limits)
                self.observers(InterpreterStarted(time.monotonic() - began, replacement))
                return process
        raise AssertionError("unreachable")

    def forget(self, session: Session) -> None:
        """A session was closed."""
        with self._held_lock:
            place = self._held.pop(session, None)
        self._sessions.remove(session)
        if place is not None:
            place.release()

    @property
    def settings(self) -> dict[str, Any]:
        """As JSON, what decides how a block runs here and how its result is told, for a pool like this one.

        Without ``environment``, whose values may be nobody else's business, and ``readable``.
        """
        return {
            "limits": self.limits.as_dict(),
            "preload": None if self._settings.preload is None else list(self._settings.preload),
            "error_style": self.error_style,
            "guardrails": self._guardrails,
        }

    @functools.cached_property
    def beginning(self) -> list[object]:
        """What its sessions begin with, but for what each is given itself and for their isolation."""
        settings = self._settings
        preload = preloaded(settings.preload)
        versions = [sys.version, *(f"{name} {_version(name)}" for name in preload)]
        environment, readable = sorted(settings.environment.items()), sorted(settings.readable)
        return [versions, environment, readable, self.limits.as_dict(), self._guardrails, self.error_style]

    # -- the fork server

    def start(self) -> SandboxPool:
        """Start now, and find out what isolation holds. Raises :class:`~midstream.errors.IsolationError`."""
        self._live_stock()
        return self

    @property
    def report(self) -> IsolationReport:
        """What isolation holds here, layer by layer. Starts the pool."""
        self._live_stock()
        assert self._report is not None
        return self._report

    def _live_stock(self) -> Stock:
        with self._lock:
            if self._closed:
                raise ProtocolError("this pool is closed")
            if self._stock is not None and self._stock.server.gone:
                self._stock.close()  # where this process is a fork of the one that started it: lets go of it
                self._stock = self._server = None
            if self._stock is None:
                self._server = self._start_server()
                self._stock = Stock(self._server, self._warm)
                if self._finalizer is not None:
                    self._finalizer.detach()
                self._finalizer = weakref.finalize(self, Stock.close, self._stock)
                self._stock.fill()
            return self._stock

    def _start_server(self) -> ForkServer:
        server = ForkServer(self._settings)
        try:
            if self._report is None:
                report = probe.examine(server, self.limits)
                self._accept(report)
                self._report = report
        except BaseException:
            server.close()
            raise
        return server

    def _accept(self, report: IsolationReport) -> None:
        if self._settings.isolation == "full" and report.level != "full":
            told = "; ".join(f"{layer.name}: {layer.tried}" for layer in report.layers if not layer.holds)
            raise IsolationError(f"isolation='full' does not hold here: {told}")
        missing = [layer for layer in report.layers if layer.required and not layer.holds]
        refused = [layer for layer in missing if layer.name not in self._settings.allow_missing]
        if refused:
            told = "; ".join(f"{layer.name}: {layer.tried}" for layer in refused)
            raise IsolationError(f"isolation does not hold here: {told}")
        for layer in missing:
            warnings.warn(f"sandboxes without the layer {layer.name}: {layer.tried}", RuntimeWarning, stacklevel=4)

    def close(self) -> None:
        """End all sessions and the fork server; nothing of them is left. May be called twice."""
        self._places.close()  # before the lock, which may be held for a start
        with self._lock:
            self._closed = True
            stock, self._stock, self._server = self._stock, None, None
        for session in self._sessions:
            session.close()
        self._sessions.tell()
        if self._finalizer is not None:
            self._finalizer.detach()
        if stock is not None:
            stock.close()

    def __enter__(self) -> SandboxPool:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _version(module: str) -> str:
    distribution = module.partition(".")[0]
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:  # of the standard library, or of the user's own
        return ""


def _checked_preload(names: Sequence[str] | None) -> tuple[str, ...] | None:
    if names is None:
        return None
    names = checks.items("preload", names, "module names")
    for name in names:
        if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
            raise ConfigurationError(f"preload={name!r}: must be a module's name")
        if importlib.util.find_spec(name.partition(".")[0]) is None:
            raise ConfigurationError(f"preload={name!r}: no such module is installed")
    return names


def _checked_environment(environment: Mapping[str, str]) -> dict[str, str]:
    checks.instance("environment", environment, Mapping)
    for name, value in environment.items():
        if not isinstance(name, str) or not name or "=" in name or "\0" in name:
            raise ConfigurationError(f"environment={name!r}: must be the name of an environment variable")
        if not isinstance(value, str) or "\0" in value:
            raise ConfigurationError(f"environment[{name!r}]={value!r}: must be a string")
    return dict(environment)


def _checked_paths(paths: Iterable[str]) -> tuple[str, ...]:
    paths = checks.items("readable", paths, "paths")
    for path in paths:
        if not isinstance(path, str) or not os.path.isabs(path) or not os.path.exists(path):
            raise ConfigurationError(f"readable={path!r}: must be the absolute path of something that exists")
    return paths


def _checked_layers(names: Collection[str]) -> frozenset[str]:
    names = checks.items("allow_missing", names, "names")
    unknown = [name for name in names if name not in LAYERS]
    if unknown:
        raise ConfigurationError(f"allow_missing={unknown}: the layers are {', '.join(LAYERS)}")
    return frozenset(names)
