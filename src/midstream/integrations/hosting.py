"""Rollouts of trainers that have a task for each: their rows meet in one generator for the whole process."""

from __future__ import annotations

import asyncio
import atexit
import itertools
import os
import socket
import threading
from collections.abc import Callable, Hashable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from midstream.decoding import decode
from midstream.engines.base import Engine
from midstream.errors import ConfigurationError, EngineError
from midstream.generation import Generator
from midstream.markup import CODE_TAGS, Markup
from midstream.records import RecordWriter
from midstream.sandbox import SandboxPool
from midstream.types import Limits, Prompt, Sampling, StopKind, Trajectory
from midstream.vocabulary import Vocabulary

_FILES = itertools.count(1)


class RolloutSettings:
    """What a subclass says of its rollouts.

    - ``tools``, ``markup``, ``limits``: as :class:`~midstream.Generator` takes them.
    - ``sandbox``: options of :class:`~midstream.SandboxPool`.
    - ``save_to``: a folder in which each host has a file that every trajectory is appended to, as ``midstream view``
      and ``check`` read it. None keeps none.
    """

    tools: Any = ()
    markup: Markup | None = CODE_TAGS
    limits: Limits = Limits()
    sandbox: Mapping[str, Any] = {}
    save_to: str | os.PathLike[str] | None = None


class Host:
    """A generator of this process, with the engine, the sandboxes and the file that are its own."""

    def __init__(self, engine: Engine, settings: type[RolloutSettings]) -> None:
        self.engine = engine
        self._stack = ExitStack()
        self._stack.callback(engine.shutdown)
        self._writing = threading.Lock()
        try:
            pool = self._stack.enter_context(SandboxPool(**settings.sandbox))
            self.generator = self._stack.enter_context(
                Generator(engine, tools=settings.tools, markup=settings.markup, limits=settings.limits, pool=pool)
            )
            self._writer = None if settings.save_to is None else self._stack.enter_context(_writer(settings.save_to))
        except BaseException:
            self._stack.close()
            raise

    async def rollout(self, prompt: Prompt, sampling: Sampling) -> Trajectory:
        """One row. Raises :class:`~midstream.errors.EngineError` where the engine failed, whatever came before.

        Cancelled, it gives the row up, and its session is closed.
        """
        trajectory = await asyncio.wrap_future(self.generator.submit(prompt, sampling=sampling))
        if self._writer is not None:
            await asyncio.to_thread(self._append, trajectory)
        if trajectory.stop.kind in (StopKind.ENGINE_FAILURE, StopKind.CANCELLED):
            raise EngineError(str(trajectory.stop))
        return trajectory

    def close(self) -> None:
        """End its rows, sandboxes and threads. May be called twice."""
        self._stack.close()

    @property
    def filler(self) -> int:
        """An id that can stand, masked, where a row has none."""
        return min(self.engine.eos_ids, default=0)

    def said(self, trajectory: Trajectory) -> str:
        """The text after the prompt, without the token that ended it."""
        if trajectory.stop.kind is not StopKind.END_OF_SEQUENCE:
            return trajectory.text
        return trajectory.text.removesuffix(decode(Vocabulary.of(self.engine.tokenizer), trajectory.ids[-1:]))

    def _append(self, trajectory: Trajectory) -> None:
        assert self._writer is not None
        with self._writing:
            self._writer.append(self.generator.record(trajectory))


class Hosts:
    """The hosts of this process by what they are for. They are closed when the process ends."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a host whose server is collected is closed wherever that happens
        self._hosts: dict[Hashable, Host] = {}
        atexit.register(self.close)

    async def get(self, key: Hashable, make: Callable[[], Host]) -> Host:
        """The host under ``key``; made, beside the event loop, where there is none."""
        host = self._hosts.get(key)
        return await asyncio.to_thread(self._get_or_make, key, make) if host is None else host

    def close(self, key: Hashable = None) -> None:
        """Close the host under ``key``, or all of them."""
        with self._lock:
            keys = list(self._hosts) if key is None else [key]
            hosts = [self._hosts.pop(key) for key in keys if key in self._hosts]
        for host in hosts:
            host.close()

    def _get_or_make(self, key: Hashable, make: Callable[[], Host]) -> Host:
        with self._lock:
            if key not in self._hosts:
                self._hosts[key] = make()
            return self._hosts[key]


def sampling_of(parameters: Mapping[str, Any], *, known: frozenset[str] = frozenset()) -> Sampling:
    """What a trainer wants sampled, from its parameters' usual names. ``None`` leaves one as it is by default.

    ``known``: parameters that mean something else. Raises :class:`~midstream.errors.ConfigurationError` for one that
    would be ignored.
    """
    given = {name: value for name, value in parameters.items() if value is not None and name not in known}
    for name in ("repetition_penalty", "frequency_penalty", "presence_penalty"):
        neutral = 1.0 if name == "repetition_penalty" else 0.0
        if given.pop(name, neutral) != neutral:
            raise ConfigurationError(f"{name}={parameters[name]!r}: must be {neutral}, there is no such sampling here")
    if given.get("top_k") == -1:  # vLLM's word for off
        del given["top_k"]
    unknown = sorted(given.keys() - {"temperature", "top_k", "top_p", "min_p"})
    if unknown:
        raise ConfigurationError(
            f"{unknown[0]}={parameters[unknown[0]]!r}: is no sampling that rows have; they have temperature, top_k, "
            "top_p and min_p"
        )
    return Sampling(**given)


def _writer(folder: str | os.PathLike[str]) -> RecordWriter:
    Path(folder).mkdir(parents=True, exist_ok=True)
    name = f"rollouts-{socket.gethostname()}-{os.getpid()}-{next(_FILES)}.jsonl"  # one process may have several hosts
    return RecordWriter(Path(folder) / name)
