"""Whole rollouts for tests: the scripted engine on a real vocabulary, real sandboxes, and rows to compare."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from midstream import CallRecord, Generator, Limits, Prompt, SandboxPool, ScriptedEngine, Trajectory, TrajectoryBatch
from midstream.engines.base import RowRequest, Update, sample_seed
from tests.vocabularies import tokenizer

VOCABULARY = "o200k"  # cuts </code>x into "</", "code", ">x"
LONG = 60.0
"""Seconds after which a test that waits for an event has failed. Nothing that passes waits for so long."""


def scripted(script: Any, name: str = VOCABULARY, **options: Any) -> ScriptedEngine:
    return ScriptedEngine(tokenizer(name), script, **options)


def rollouts(
    scripts: Mapping[str, Any],
    pool: SandboxPool,
    *,
    n: int = 1,
    limits: Limits | None = None,
    reward: Callable[[Trajectory], Any] | None = None,
    engine: Mapping[str, Any] | None = None,
    name: str = VOCABULARY,
    **options: Any,
) -> TrajectoryBatch:
    """What becomes of the rows that say ``scripts`` (by the prompt's text, which is its id too)."""
    with Generator(scripted(scripts, name, **(engine or {})), pool=pool, limits=limits, **options) as generator:
        return generator.generate([Prompt(text=text, id=text) for text in scripts], n, reward=reward)


def one(script: Any, pool: SandboxPool, **options: Any) -> Trajectory:
    """The one row that says ``script``."""
    return rollouts({"prompt": script}, pool, **options)[0]


def injected(trajectory: Trajectory) -> list[str]:
    return [segment.text for segment in trajectory.segments if segment.origin == "injected"]


def shown(trajectory: Trajectory) -> list[str | None]:
    """What each block of the row gave; None where it has no result."""
    return [None if record.result is None else record.result.text for record in trajectory.calls]


def essence(trajectory: Trajectory) -> Trajectory:
    """A trajectory without what time and overshoot leave in it: two that are equal are equal to the bit."""
    calls = tuple(_timeless(record) for record in trajectory.calls)
    return replace(trajectory, calls=calls, discarded=0, duration=0.0)


def _timeless(record: CallRecord) -> CallRecord:
    if record.result is None:
        return record
    calls = tuple(replace(call, started=0.0, duration=0.0) for call in record.result.tool_calls)
    return replace(record, result=replace(record.result, duration=0.0, cpu_time=None, tool_calls=calls))


class Replaying(ScriptedEngine):
    """Says again what rows said before, from wherever a row is opened: also a paused one."""

    def __init__(self, rows: Sequence[Trajectory], **options: Any) -> None:
        said = {(row.prompt_ids, sample_seed(row.seed, row.sample)): row for row in rows}

        def script(request: RowRequest, sample: int) -> Sequence[int]:
            for (prompt, seed), row in said.items():
                if request.ids[: len(prompt)] == prompt and seed == sample_seed(request.seed, sample):
                    behind = slice(len(request.ids), None)
                    return [i for i, own in zip(row.ids[behind], row.mask[behind], strict=True) if own]
            raise AssertionError(f"no row begins with {request.ids}")

        super().__init__(tokenizer(options.pop("name", VOCABULARY)), script, **options)


class Stepping(Replaying):
    """Calls ``at_step`` after each step, in the engine's thread, with how many there have been."""

    at_step: Callable[[int], None] = staticmethod(lambda step: None)

    def step(self) -> list[Update]:
        updates = super().step()
        self.at_step(self.steps)
        return updates


class Gate:
    """A tool that holds its caller until it is opened, and says when somebody has come."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        self.reached.set()
        assert self.opened.wait(LONG), "nobody opened the gate"
        return "through"


def open_descriptors() -> list[str]:
    """What this process's file descriptors stand for, apart from the folder that is listed here."""
    targets = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            targets.append(os.readlink(entry))
        except FileNotFoundError:  # the listing's own
            continue
    return sorted(target for target in targets if not target.startswith("/proc/"))


def descendants(process_id: int) -> set[int]:
    """The processes below one, zombies left out."""
    children: dict[int, set[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if state != "Z":
                children.setdefault(int(parent), set()).add(int(entry.name))
    found: set[int] = set()
    waiting = [process_id]
    while waiting:
        below = children.get(waiting.pop(), set())
        waiting += below
        found |= below
    return found
