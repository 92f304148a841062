"""Running the blocks of finished trajectories again, in fresh sessions, to see whether they give the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Self

from midstream.crossing import to_json
from midstream.engines.base import sample_seed
from midstream.errors import ConfigurationError, RecordError
from midstream.records import Record
from midstream.sandbox import Guardrails, SandboxLimits, SandboxPool
from midstream.sandbox.pool import Isolation
from midstream.sandbox.replay import comparable
from midstream.types import CallRecord, ExecutionError, ExecutionResult, ToolAnswer, ToolCall


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that came out otherwise: of block ``block``, ``what`` (a field of its result), then and now."""

    block: int
    what: str
    recorded: str
    replayed: str

    def __str__(self) -> str:
        return f"block {self.block + 1}: {self.what} was {self.recorded}, is {self.replayed}"


@dataclass(frozen=True, slots=True)
class Replayed:
    """A record whose blocks ran again. ``blocks``: how many did. No ``differences``: all came out the same.

    ``skipped``: why none could, where that is so.
    """

    record: Record
    blocks: int
    differences: tuple[Difference, ...]
    skipped: str = ""


@dataclass(slots=True)
class _RecordedTools:
    """Answers the calls of the block that runs with what they were answered then.

    A call of another tool, or with other arguments, cannot be answered: it is an error in the code and a difference.
    """

    calls: list[ToolCall] = field(default_factory=list)
    place: int = 0
    strayed: str = ""

    def begin(self, calls: Sequence[ToolCall]) -> None:
        self.calls, self.place, self.strayed = list(calls), 0, ""

    def __call__(self, name: str, arguments: list[Any], keyword_arguments: dict[str, Any]) -> ToolAnswer:
        crossed = [to_json(value) for value in arguments], {key: to_json(v) for key, v in keyword_arguments.items()}
        if not self.strayed and self.place < len(self.calls):
            call = self.calls[self.place]
            if (call.name, list(call.arguments), dict(call.keyword_arguments)) == (name, *crossed):
                self.place += 1
                return ToolAnswer(call.value, call.error)
        self.strayed = self.strayed or _shown(name, *crossed)
        return ToolAnswer(error=ExecutionError("RuntimeError", f"{name}() has no recorded result"))


class RecordedPools:
    """Pools with the settings of those in which records were made, each started when it is needed first.

    ``isolation`` is that of all, recorded or not. ``wall_time`` and ``preload`` go before what is recorded, where they
    are not None. Records without settings have a pool's defaults. ``resident_memory`` is not taken over: many machines
    cannot hold it.
    """

    def __init__(
        self, *, isolation: Isolation = "auto", wall_time: float | None = None, preload: Sequence[str] | None = None
    ) -> None:
        self._given: dict[str, Any] = {"isolation": isolation} | ({} if preload is None else {"preload": preload})
        self._limits: dict[str, Any] = {} if wall_time is None else {"wall_time": wall_time}
        self._pools: dict[str, SandboxPool] = {}
        SandboxPool(**self._options(None)).close()  # never started: it says what is wrong with what is given

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self._pools.values():
            pool.close()

    def __call__(self, record: Record) -> SandboxPool:
        """The pool for a record. Raises :class:`~midstream.errors.RecordError` for settings that are none."""
        settings = record.provenance.get("sandbox")
        key = json.dumps(settings, sort_keys=True)
        if key not in self._pools:
            try:
                self._pools[key] = SandboxPool(**self._options(settings))
            except (TypeError, LookupError, ConfigurationError) as error:
                raise RecordError(f"provenance.sandbox={settings!r}: no pool can be made of it: {error}") from error
        return self._pools[key]

    def _options(self, settings: Any) -> dict[str, Any]:
        if settings is None:
            return {"limits": SandboxLimits(**self._limits), **self._given}
        guardrails = settings["guardrails"]
        recorded = {
            "limits": SandboxLimits(**{**settings["limits"], "resident_memory": None, **self._limits}),
            "preload": settings["preload"],
            "error_style": settings["error_style"],
            "guardrails": None if guardrails is None else Guardrails(**guardrails),
        }
        return recorded | self._given


def replay(
    records: Iterable[Record], pool_for: Callable[[Record], SandboxPool], *, at_once: int = 1
) -> Iterator[Replayed]:
    """Run the blocks of each record again, ``at_once`` records at a time; results in the order of ``records``.

    ``pool_for`` gives the pool in which a record's blocks are to run, such as :class:`RecordedPools`. Each record has
    a session of its own, seeded as its first one was. Tools are not called: what they answered stands in the record.
    Blocks that a limit on time or memory ended are not expected to end at the same place.
    """
    waiting: list[Future[Replayed]] = []
    with ThreadPoolExecutor(at_once, thread_name_prefix="midstream-replay") as threads:
        try:
            for record in records:
                waiting.append(threads.submit(replay_one, record, pool_for(record)))
                if len(waiting) >= 2 * at_once:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()


def replay_one(record: Record, pool: SandboxPool) -> Replayed:
    """Run the blocks of one record again. Raises what the sandbox does where it cannot run."""
    blocks = [entry for entry in record.trajectory.calls if _was_run(entry)]
    if not blocks:
        return Replayed(record, 0, ())
    if record.provenance.get("earlier_blocks"):
        return Replayed(record, 0, (), "blocks of other rows had run in its session, and are not in it")
    tools = _RecordedTools()
    names = sorted({call.name for entry in blocks for call in entry.result.tool_calls if call.name})  # type: ignore[union-attr]
    offered = sorted({*names, *_tool_names(record)})
    differences: list[Difference] = []
    first_sample = record.lineage[0].sample if record.lineage else record.sample
    seed = sample_seed(record.seed, first_sample)
    with pool.session(tools=offered, call_tool=tools, seed=seed) as session:
        for entry in blocks:
            assert entry.result is not None
            tools.begin(entry.result.tool_calls)
            result = session.run(entry.call.code)
            differences += _differences(entry.call.index, entry.result, result, tools)
    return Replayed(record, len(blocks), tuple(differences))


def _was_run(entry: CallRecord) -> bool:
    return entry.call.kind == "code" and not entry.call.declined and entry.result is not None


def _tool_names(record: Record) -> list[str]:
    named = record.provenance.get("tools")
    return [name for name in named if isinstance(name, str)] if isinstance(named, list) else []


def _differences(block: int, then: ExecutionResult, now: ExecutionResult, tools: _RecordedTools) -> list[Difference]:
    found = []

    def compare(what: str, recorded: object, replayed: object) -> None:
        if recorded != replayed:
            found.append(Difference(block, what, repr(recorded), repr(replayed)))

    if tools.strayed:
        found.append(Difference(block, "a tool's call", _recorded_call(tools), tools.strayed))
    elif tools.place < len(tools.calls):
        found.append(Difference(block, "a tool's call", _recorded_call(tools), "not made"))
    compare("ended by a limit", then.breached or then.timed_out, now.breached or now.timed_out)
    if then.timed_out and now.timed_out:
        return found  # where it was by then is up to the clock
    compare("text", comparable(then.text), comparable(now.text))
    compare("error", then.error and then.error.type, now.error and now.error.type)
    compare("pictures", [each.data for each in then.media], [each.data for each in now.media])
    return found


def _recorded_call(tools: _RecordedTools) -> str:
    if tools.place >= len(tools.calls):
        return "none"
    call = tools.calls[tools.place]
    return _shown(call.name, call.arguments, call.keyword_arguments)


def _shown(name: str, arguments: Sequence[Any], keyword_arguments: Mapping[str, Any]) -> str:
    given = [repr(value) for value in arguments] + [f"{key}={value!r}" for key, value in keyword_arguments.items()]
    return f"{name}({', '.join(given)})"
