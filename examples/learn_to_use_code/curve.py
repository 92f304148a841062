"""Draws the curves of runs.

    python examples/learn_to_use_code/curve.py results.json curve.svg

``learn.py`` does it at its end; from other figures than its last ones, this does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

COLOURS = {True: "#1f6feb", False: "#bf8700"}
LABELS = {True: "code is run", False: "code is not run"}
PANELS = (("reward", "answered right"), ("writes_code", "answered with code"))
STYLES: dict[str, dict[str, Any]] = {
    "sampled": {"linestyle": "-", "linewidth": 1.6},
    "greedy": {"linestyle": ":", "linewidth": 1.6},
    "rollouts": {"linestyle": "-", "linewidth": 0.8, "alpha": 0.35},
}
STYLE_LABELS = {
    "sampled": "held-out problems, sampled",
    "greedy": "held-out problems, greedy",
    "rollouts": "training problems, sampled",
}


def points(result: dict[str, Any], name: str, quantity: str) -> tuple[list[int], list[float]]:
    """Updates that the model has had, and the quantity then."""
    if name == "rollouts":  # those of a step are sampled before its update
        return [entry["step"] - 1 for entry in result["training"]], [entry[quantity] for entry in result["training"]]
    evaluations = result["evaluations"]
    return [entry["step"] for entry in evaluations], [entry[name][quantity] for entry in evaluations]


def draw(results: Sequence[dict[str, Any]], file: Path) -> None:
    """One panel for the reward and one for the use of code, with three lines a run in each."""
    matplotlib.rcParams["svg.hashsalt"] = "midstream"  # the same figures make the same file
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for (quantity, title), axis in zip(PANELS, axes, strict=True):
        for number, result in enumerate(results):
            for name, style in STYLES.items():
                (line,) = axis.plot(*points(result, name, quantity), color=COLOURS[result["execution"]], **style)
                line.set_gid(f"run-{number}-{quantity}-{name}")
        axis.set(title=title, xlabel="steps of GRPO", ylim=(-0.02, 1.02))
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        axis.grid(alpha=0.3)
    colours = [Line2D([], [], color=colour, label=LABELS[execution]) for execution, colour in COLOURS.items()]
    styles = [Line2D([], [], color="#57606a", label=STYLE_LABELS[name], **style) for name, style in STYLES.items()]
    axes[0].legend(handles=[*colours, *styles], loc="center right", fontsize="small")
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
