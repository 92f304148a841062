"""How a run is going: a live view on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from midstream.jobs import Progress
from midstream.observing import BlockBegan, BlockEnded, Observation, ToolBegan, ToolEnded

LINE_EVERY = 10.0
"""Seconds between two lines where there is no terminal."""

_RATE_OVER = 10.0
"""Seconds over which the rates of now are taken."""

_MOST_TOOLS = 5


@dataclass(slots=True)
class _ToolTimes:
    """Calls of one tool that have ended, and those in flight."""

    calls: int = 0
    faults: int = 0
    seconds: float = 0.0
    longest: float = 0.0
    running: int = 0

    def end(self, ended: ToolEnded) -> None:
        self.calls += 1
        self.faults += ended.outcome != "ok"
        self.seconds += ended.seconds
        self.longest = max(self.longest, ended.seconds)
        self.running -= 1


class ProgressView:
    """Shows how a run goes of which ``done`` of ``total`` rows were done before. A context manager, and an observer."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        self._console = console
        self._total = total
        self._before = done
        self._started = self._last_line = time.monotonic()
        self._tools: dict[str, _ToolTimes] = {}
        self._blocks = 0
        self._earlier: deque[tuple[float, int, int]] = deque()  # when, with the counts of tokens and calls then
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __call__(self, observation: Observation) -> None:
        match observation:
            case ToolBegan():
                self._tools.setdefault(observation.name, _ToolTimes()).running += 1
            case ToolEnded():
                self._tools[observation.began.name].end(observation)
            case BlockBegan():
                self._blocks += 1
            case BlockEnded():
                self._blocks -= 1

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, progress: Progress, written: int) -> None:
        """``written``: rows of this run that are in the file."""
        now = time.monotonic()
        if self._live is not None:
            self._earlier.append((now, progress.generated_tokens, progress.calls))
            while now - self._earlier[0][0] > _RATE_OVER:
                self._earlier.popleft()
            self._live.update(self._picture(progress, written), refresh=True)
        elif now - self._last_line >= LINE_EVERY:
            self._last_line = now
            done = f"{self._before + written}/{self._total} rows"
            self._console.print(f"{done}, {self._stages(progress)}, {self.rates(progress)}", soft_wrap=True)

    def rates(self, progress: Progress) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        tokens, calls = progress.generated_tokens / seconds, progress.calls / seconds
        return f"{tokens:,.0f} tokens/s, {calls:,.1f} calls/s, {progress.failed} failed"

    def _stages(self, progress: Progress) -> str:
        stages = {
            "waiting": progress.waiting,
            "decoding": progress.running,
            "executing": progress.executing,
            "rewarding": progress.rewarding,
        }
        return ", ".join(f"{count} {name}" for name, count in stages.items() if count or name != "rewarding")

    # --- on a terminal

    def _picture(self, progress: Progress, written: int) -> RenderableType:
        there = self._before + written
        facts = Table.grid(padding=(0, 2))
        facts.add_row("rows", self._bar(there))
        facts.add_row("", self._stages(progress))
        stops = Counter({kind.value: count for kind, count in progress.stops.items()})
        facts.add_row("done", ", ".join(f"{count} {kind}" for kind, count in stops.most_common()) or "none yet")
        facts.add_row("rates", self._rates_now(progress))
        in_flight = sum(times.running for times in self._tools.values())
        facts.add_row("in flight", f"{self._blocks} blocks, {in_flight} calls of tools")
        return Group(facts, self._slowest()) if self._tools else facts

    def _bar(self, there: int) -> RenderableType:
        row = Table.grid(padding=(0, 1))
        text = f"{there:,} of {self._total:,}"
        seconds = time.monotonic() - self._started
        if self._before < there < self._total:
            left = seconds / (there - self._before) * (self._total - there)
            text += f", about {_clock(left)} to go"
        row.add_row(ProgressBar(self._total, there, width=40), Text(f"{text}, after {_clock(seconds)}"))
        return row

    def _rates_now(self, progress: Progress) -> str:
        then, tokens, calls = self._earlier[0]
        seconds = max(self._earlier[-1][0] - then, 1e-9)
        if len(self._earlier) < 2:
            return self.rates(progress)
        now = f"{(progress.generated_tokens - tokens) / seconds:,.0f} tokens/s"
        return f"{now}, {(progress.calls - calls) / seconds:,.1f} calls/s now; {self.rates(progress)} in all"

    def _slowest(self) -> RenderableType:
        table = Table("slowest tools", box=None, padding=(0, 2, 0, 0))
        for name in ("calls", "faults", "mean s", "longest s", "in flight"):
            table.add_column(name, justify="right")

        def mean(times: _ToolTimes) -> float:
            return times.seconds / times.calls if times.calls else 0.0

        for name, times in sorted(self._tools.items(), key=lambda item: -mean(item[1]))[:_MOST_TOOLS]:
            counts = (f"{times.calls:,}", f"{times.faults:,}", f"{mean(times):.3f}", f"{times.longest:.3f}")
            table.add_row(Text(name), *counts, str(times.running))
        return table


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
