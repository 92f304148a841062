"""Code that runs between the turns of NeMo-RL's rollouts, in our sandboxes."""

from __future__ import annotations

import ast
import asyncio
import math
import re
import threading
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NotRequired, Self, TypedDict, TypeVar

from midstream.errors import ConfigurationError, ProtocolError
from midstream.integrations.nemo_rl.interface import (
    EnvironmentReturn,
    MessageLog,
    checked_config,
    environment_return,
    last_messages,
)
from midstream.integrations.nemo_rl.sessions import KeptSessions
from midstream.integrations.nemo_rl.state import SessionState, history_of, remembered, state_of
from midstream.markup import CODE_TAGS, text_of, trim_lookahead
from midstream.sandbox import Guardrails, SandboxLimits, SandboxPool
from midstream.types import ExecutionResult

_T = TypeVar("_T")

_BLOCK = re.compile(r"<code>(.*?)</code>", re.DOTALL)
_STOP = "</code>"


class CodeEnvConfig(TypedDict):
    """NeMo-RL's own two, and what it has no word for.

    - ``num_workers``: how many blocks may run at the same time, whatever batches they came in.
    - ``terminate_on_evaluation``: whether a rollout is over once a block has ended with an expression.
    - ``sandbox``: options of :class:`~midstream.SandboxPool`; its ``limits`` may be a mapping. Guardrails are on
      unless ``guardrails`` is False.
    - ``every_node``: whether the sandboxes are on every node of the Ray cluster, in place of this one alone.
    - ``kept_sessions``: how many interpreters wait for their rows' next steps, 256 by default; those of others are
      rebuilt. ``lease_seconds``: for how long each waits, 600 by default.
    """

    num_workers: int
    terminate_on_evaluation: bool
    sandbox: NotRequired[dict[str, Any]]
    every_node: NotRequired[bool]
    kept_sessions: NotRequired[int]
    lease_seconds: NotRequired[float]


@dataclass(frozen=True, slots=True)
class _Outcome:
    content: str
    metadata: dict[str, Any]
    terminated: bool = False


class CodeEnvironment:
    """Runs the code in each row's last message, in an interpreter that the row keeps from step to step.

    - ``config``: :class:`CodeEnvConfig`.
    - ``pool``: sandboxes to use in place of ``config["sandbox"]``; they stay the caller's to close.

    Every complete ``<code>…</code>`` of the message runs, one after the other. The observation is their results, as
    :data:`midstream.CODE_TAGS` has them, or the empty text. What code does (errors of syntax, ``SystemExit``, endless
    loops, death) is in its own row's result and nowhere else; a fault of the sandbox's machinery is raised.

    A row's metadata carries a handle, and the blocks that have run. The handle leads to the live session as long as
    that is in this state; else the session is rebuilt, with the same seed, by running the blocks again. So copies of
    metadata go their own ways from where they were made, a step that is taken again gives the same, and metadata is
    good in another environment and after a restart. Sessions are closed when their rollout is over, when its batch is
    post-processed, or when their lease ends.

    To be closed with :meth:`shutdown`, or used in a ``with`` statement. Usable from any threads, and from asyncio.
    """

    def __init__(self, config: CodeEnvConfig | Mapping[str, Any], *, pool: Any = None) -> None:
        settings = checked_config(
            "CodeEnvConfig",
            config,
            ("num_workers", "terminate_on_evaluation"),
            ("sandbox", "every_node", "kept_sessions", "lease_seconds"),
        )
        workers = _checked_count("num_workers", settings["num_workers"], 1)
        self._terminates = _checked_flag("terminate_on_evaluation", settings["terminate_on_evaluation"])
        count = _checked_count("kept_sessions", settings.get("kept_sessions", 256), 0)
        seconds = settings.get("lease_seconds", 600.0)
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
            raise ConfigurationError(f"CodeEnvConfig.lease_seconds={seconds!r}: must be a number of seconds over 0")
        self._pool: Any = _pool_of(settings) if pool is None else pool
        self._owns_pool = pool is None
        try:
            _check_room(self._pool.free_sessions, workers, count)
            self._pool.start()
        except BaseException:
            self._close_own_pool()
            raise
        self._kept = KeptSessions(count, seconds)
        self._workers = asyncio.Semaphore(workers)
        self._lock = threading.Lock()
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="midstream-environment", daemon=True)
        self._thread.start()

    # --- what the rollouts call

    def step(
        self,
        message_log_batch: Sequence[MessageLog],
        metadata: Sequence[Any],
        return_extracted_answer: bool = False,
    ) -> EnvironmentReturn:
        """Run each row's code, all rows together.

        ``metadata``: one :class:`CodeEnvMetadata` a row; None for a row without. Raises
        :class:`~midstream.errors.ConfigurationError` for what cannot be a step, and
        :class:`~midstream.errors.SandboxError` where the sandbox itself failed.
        """
        texts = last_messages(message_log_batch, metadata, return_extracted_answer)
        return self._returned(self._on_loop(self._rows(texts, metadata)).result())

    async def step_async(
        self,
        message_log_batch: Sequence[MessageLog],
        metadata: Sequence[Any],
        return_extracted_answer: bool = False,
    ) -> EnvironmentReturn:
        """The same for asyncio. Cancelled, it ends the sessions of the rows that still run."""
        texts = last_messages(message_log_batch, metadata, return_extracted_answer)
        return self._returned(await asyncio.wrap_future(self._on_loop(self._rows(texts, metadata))))

    def global_post_process_and_metrics(self, batch: Any) -> tuple[Any, dict[str, Any]]:
        """The batch as it is, and no metrics. Its rollouts are over: their sessions are closed."""
        handles = []
        for metadata in batch.get("extra_env_info") or ():
            session = metadata.get("session") if isinstance(metadata, Mapping) else None
            if isinstance(session, Mapping):
                handles.append(str(session.get("handle", "")))
        self._on_loop(self._end(handles)).result()
        return batch, {}

    def shutdown(self) -> None:
        """End all sessions. May be called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._close_own_pool()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    @property
    def kept_sessions(self) -> int:
        """How many interpreters wait for their rows' next steps."""
        return len(self._kept)

    def _close_own_pool(self) -> None:
        if self._owns_pool:
            self._pool.close()

    # --- on the loop

    def _on_loop(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        with self._lock:
            if self._closed:
                work.close()
                raise ProtocolError("the environment is shut down")
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _rows(self, texts: Sequence[str], metadata: Sequence[Any]) -> list[_Outcome]:
        rows = [self._row(text, each) for text, each in zip(texts, metadata, strict=True)]
        outcomes = await asyncio.gather(*rows, return_exceptions=True)
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if not failures:
            return [outcome for outcome in outcomes if isinstance(outcome, _Outcome)]
        # Nobody will be told the new handles: the rows' metadata still tells of the states before.
        for outcome in outcomes:
            if isinstance(outcome, _Outcome) and "session" in outcome.metadata:
                await self._end([outcome.metadata["session"]["handle"]])
        raise failures[0]

    async def _row(self, text: str, metadata: Any) -> _Outcome:
        known = _checked_metadata(metadata)
        blocks = list(_BLOCK.finditer(text))
        if not blocks:
            return _Outcome("", known)
        state = state_of(known)
        async with self._workers:
            session = self._kept.take(state["handle"]) or await self._opened(known, state)
            try:
                results = await self._run(session, [block.group(1) for block in blocks], state["past"])
            except BaseException:
                session.close()
                raise
            evaluated = any(
                _is_evaluation(block.group(1), result) for block, result in zip(blocks, results, strict=True)
            )
            terminated = evaluated and self._terminates
            if terminated:
                session.close()
                handle = ""
            else:
                handle = self._kept.keep(session)
        content = _observation(text, blocks, results)
        after = SessionState(handle=handle, seed=state["seed"], past=state["past"])
        return _Outcome(content, {**known, "session": after}, terminated)

    async def _opened(self, metadata: Mapping[str, Any], state: SessionState) -> Any:
        history = await asyncio.to_thread(history_of, metadata, state, self._pool.limits)
        return await self._pool.session_async(seed=state["seed"], history=history)

    async def _run(self, session: Any, codes: Sequence[str], past: list[Any]) -> list[ExecutionResult]:
        """Run blocks one after the other, and add to ``past`` what leads to the state after them."""
        results = []
        for code in codes:
            result: ExecutionResult = await session.run_async(code)
            results.append(result)
            ran = remembered(code, result)
            if ran is not None:
                past.append(ran)
        return results

    async def _end(self, handles: Sequence[str]) -> None:
        for handle in handles:
            session = self._kept.take(handle)
            if session is not None:
                session.close()

    async def _stop(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        self._kept.close()
        await self._loop.shutdown_default_executor()

    def _returned(self, outcomes: Sequence[_Outcome]) -> EnvironmentReturn:
        return environment_return(
            [outcome.content for outcome in outcomes],
            [outcome.metadata for outcome in outcomes],
            stop=_STOP,
            terminated=[outcome.terminated for outcome in outcomes],
        )


def _observation(text: str, blocks: Sequence[re.Match[str]], results: Sequence[ExecutionResult]) -> str:
    """The results of all blocks, one after another, without what the model wrote of it itself."""
    shown = [
        text_of(CODE_TAGS.render(block.group(1), result.text))
        for block, result in zip(blocks, results, strict=True)
        if result.text
    ]
    # "</code>\n" may end in one token, so that the model wrote the first newline of the result.
    return text_of(trim_lookahead(("".join(shown),), text[blocks[-1].end() :]))


def _is_evaluation(code: str, result: ExecutionResult) -> bool:
    """Whether a block ran through and ended with an expression, one that is None too."""
    if result.error is not None:
        return False
    if result.value is not None:
        return True
    try:
        statements = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return bool(statements) and isinstance(statements[-1], ast.Expr)


def _checked_metadata(metadata: Any) -> dict[str, Any]:
    if metadata is None:
        return {"context": {}, "working_dir": ""}
    if not isinstance(metadata, Mapping):
        raise ConfigurationError(f"metadata: is {type(metadata).__name__}; it must be CodeEnvMetadata, or None")
    return dict(metadata)


def _pool_of(settings: Mapping[str, Any]) -> Any:
    given = settings.get("sandbox", {})
    if not isinstance(given, Mapping):
        raise ConfigurationError(f"CodeEnvConfig.sandbox={given!r}: must be a mapping of SandboxPool's options")
    options = dict(given)
    if isinstance(options.get("limits"), Mapping):
        options["limits"] = _called("CodeEnvConfig.sandbox['limits']", SandboxLimits, dict(options["limits"]))
    guardrails = options.get("guardrails", True)
    if isinstance(guardrails, bool):
        options["guardrails"] = Guardrails() if guardrails else None
    if _checked_flag("every_node", settings.get("every_node", False)):
        from midstream.distributed.ray import RayPool

        return _called("CodeEnvConfig.sandbox", RayPool, options)
    return _called("CodeEnvConfig.sandbox", SandboxPool, options)


def _check_room(free: int | None, workers: int, kept: int) -> None:
    if free is not None and free < workers + kept:
        raise ConfigurationError(
            f"max_sessions: {free} are free; num_workers={workers} and kept_sessions={kept} take {workers + kept}"
        )


def _called(field: str, kind: Any, options: dict[str, Any]) -> Any:
    try:
        return kind(**options)
    except TypeError as error:
        raise ConfigurationError(f"{field}: {error}") from error


def _checked_count(field: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigurationError(f"CodeEnvConfig.{field}={value!r}: must be an integer of at least {least}")
    return value


def _checked_flag(field: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigurationError(f"CodeEnvConfig.{field}={value!r}: must be True or False")
    return value
