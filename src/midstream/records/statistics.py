"""What a file of trajectories amounts to: how they ended, how long they are, what their code and tools did."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from midstream.records.schema import Record

PERCENTILES = (50, 90, 99)


def percentile(ordered: Sequence[float], share: float) -> float:
    """The least of ``ordered`` (sorted, not empty) that at least ``share`` percent of them do not exceed."""
    return ordered[max(0, math.ceil(share / 100 * len(ordered)) - 1)]


@dataclass(slots=True)
class Numbers:
    """Numbers of one kind, all kept, for their spread."""

    values: list[float] = field(default_factory=list)

    def add(self, value: float) -> None:
        self.values.append(value)

    def as_dict(self) -> dict[str, float | int | None]:
        """``count``, ``mean``, ``std`` (of the numbers themselves), ``min``, percentiles and ``max``."""
        ordered = sorted(self.values)
        if not ordered:
            return {"count": 0}
        mean = math.fsum(ordered) / len(ordered)
        return {
            "count": len(ordered),
            "mean": mean,
            "std": math.sqrt(math.fsum((value - mean) ** 2 for value in ordered) / len(ordered)),
            "min": ordered[0],
            **{f"p{share}": percentile(ordered, share) for share in PERCENTILES},
            "max": ordered[-1],
        }


@dataclass(slots=True)
class _Tool:
    calls: int = 0
    errors: int = 0
    cached: int = 0
    batched: int = 0
    seconds: Numbers = field(default_factory=Numbers)

    def as_dict(self) -> dict[str, Any]:
        counts = {"calls": self.calls, "errors": self.errors, "cached": self.cached, "batched": self.batched}
        return {**counts, "seconds": self.seconds.as_dict()}


@dataclass(slots=True)
class Statistics:
    """Counts and spreads over records, added one at a time.

    ``tokens`` by origin; ``stopped`` and ``errors`` by kind; ``breached`` by limit; lengths are of one trajectory
    each, seconds of one trajectory, block or call of a tool each.
    """

    trajectories: int = 0
    unfit: int = 0
    prompts: set[str] = field(default_factory=set)
    tokens: Counter[str] = field(default_factory=Counter)
    discarded: int = 0
    stopped: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    breached: Counter[str] = field(default_factory=Counter)
    blocks: Counter[str] = field(default_factory=Counter)
    rewards: Numbers = field(default_factory=Numbers)
    generated: Numbers = field(default_factory=Numbers)
    total: Numbers = field(default_factory=Numbers)
    calls: Numbers = field(default_factory=Numbers)
    seconds: Numbers = field(default_factory=Numbers)
    block_seconds: Numbers = field(default_factory=Numbers)
    tools: defaultdict[str, _Tool] = field(default_factory=lambda: defaultdict(_Tool))

    @classmethod
    def of(cls, records: Iterable[Record]) -> Statistics:
        statistics = cls()
        for record in records:
            statistics.add(record)
        return statistics

    def add(self, record: Record) -> None:
        self.trajectories += 1
        self.unfit += not record.fit_for_training
        self.prompts.add(record.prompt.id or record.prompt_text)
        self.stopped[record.stop.kind] += 1
        self.discarded += record.discarded
        if record.reward is not None:
            self.rewards.add(record.reward)
        self.tokens["prompt"] += len(record.prompt_ids)
        generated = 0
        for segment in record.segments:
            self.tokens[segment.origin] += len(segment.ids)
            generated += len(segment.ids) if segment.origin == "generated" else 0
        self.generated.add(generated)
        self.total.add(record.total_length)
        self.calls.add(len(record.calls))
        self.seconds.add(record.duration)
        for entry in record.calls:
            self._add_block(entry)

    def _add_block(self, entry: Any) -> None:
        self.blocks["all"] += 1
        if entry.call.declined or entry.result is None:
            self.blocks["not run"] += 1
            return
        result = entry.result
        self.block_seconds.add(result.duration)
        for flag, name in (("timed_out", "timed out"), ("state_lost", "state lost"), ("truncated", "output cut")):
            self.blocks[name] += getattr(result, flag)
        self.blocks["undone"] += result.rolled_back
        if result.error is not None:
            self.errors[result.error.type] += 1
        if result.breached is not None:
            self.breached[result.breached] += 1
        for call in result.tool_calls:
            tool = self.tools[call.name]
            tool.calls += 1
            tool.errors += call.error is not None
            tool.cached += call.cached
            tool.batched += call.batched > 1
            tool.seconds.add(call.duration)

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON has it; counts in descending order."""
        return {
            "trajectories": self.trajectories,
            "prompts": len(self.prompts),
            "unfit_for_training": self.unfit,
            "stopped": dict(self.stopped.most_common()),
            "tokens": {origin: self.tokens[origin] for origin in ("prompt", "generated", "injected")},
            "discarded_tokens": self.discarded,
            "blocks": dict(self.blocks.most_common()),
            "errors": dict(self.errors.most_common()),
            "breached": dict(self.breached.most_common()),
            "reward": self.rewards.as_dict(),
            "generated_tokens": self.generated.as_dict(),
            "total_tokens": self.total.as_dict(),
            "calls": self.calls.as_dict(),
            "seconds": self.seconds.as_dict(),
            "block_seconds": self.block_seconds.as_dict(),
            "tools": {name: tool.as_dict() for name, tool in sorted(self.tools.items())},
        }
