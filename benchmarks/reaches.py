"""What the figures of ``benchmarks.sandbox`` come to, beside what was set out for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Reach:
    """``wanted``: what was set out for. ``told``: what was measured, and the ratio."""

    what: str
    against: str
    wanted: str
    told: str
    met: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def reaches(figures: Figures) -> list[Reach]:
    """All that can be said from what was measured."""
    beside = figures["side by side"]
    told: list[Reach] = []
    for level in ("container", "full"):
        if beside.get(level):
            told += _beside(level, beside)
    for level, copies in figures.get("copies", {}).items():
        took, copying = copies["fork, with 100 MB, ms"]["p50"], copies["pickling 100 MB and back ms"]["p50"]
        told.append(
            Reach(
                f"fork of a session with 100 MB, {level}",
                "copying its state",
                "≤ 20 ms",
                f"{took:.1f} ms; copying {copying:.0f} ms, {copying / took:.1f}×",
                took <= 20,
            )
        )
    for level, killed in figures.get("killed", {}).items():
        took = killed["all gone after kill -9 ms"]["p50"]
        what = f"{killed['sessions']} sessions gone after kill -9 of their host, {level}"
        told.append(Reach(what, "-", "≤ 1 s", f"{took:.0f} ms", took <= 1000))
    for level, many in figures.get("many", {}).items():
        took, mean = many["calls in s"], many["mean from dispatch ms"]
        told.append(
            Reach(
                f"{many['calls']:,} calls of {many['sessions']:,} sessions, {level}",
                "-",
                "≤ 10 s, mean ≤ 20 ms",
                f"{took:.1f} s, mean {mean:.1f} ms with {many['at once']} in flight",
                took * 45_000 / many["calls"] <= 10 and mean <= 20,
            )
        )
    return told


def _beside(level: str, beside: dict[str, Figures]) -> Iterator[Reach]:
    ours = beside[level]
    start, call, memory = ours["start ms"]["p50"], ours["x + y ms"]["p50"], ours["own memory MiB"]

    def ratio(what: str, mine: float, other: str, key: str, least: float) -> Iterator[Reach]:
        row = beside.get(other, {}).get(key)
        if row is not None:
            value = row["p50"] / mine
            wanted = "faster" if least == 1 and "start" in what else "as fast" if least == 1 else f"≥ {least:g}× faster"
            times = f"{value:.0f}" if value >= 10 else f"{value:.1f}"
            told = f"{mine:.3g} ms to {row['p50']:.3g}, {times}×"
            yield Reach(f"{what}, {level}", other, wanted, told, value >= least)

    yield from ratio("start", start, "python -c pass", "start ms", 1)
    yield from ratio("start", start, "ipython", "start ms", 100)
    yield from ratio("x + y", call, "smolagents", "x + y ms", 1)
    yield from ratio("x + y", call, "ipython", "x + y ms", 20)
    kernel = beside.get("ipython", {}).get("own memory MiB")
    if kernel is not None:
        share = memory / kernel
        told = f"{memory:.1f} MiB to {kernel:.0f}, 1/{1 / share:.0f}"
        met = share <= 0.1 and memory * 1.048576 <= 5
        yield Reach(f"memory of its own, {level}", "ipython", "≤ 1/10, ≤ 5 MB", told, met)
