"""What midstream's own work takes for each sampled id of a row: decoding, looking for tags, keeping the row.

One row takes 100,000 ids, one at a time, as from an engine, over real tokenizers: what is measured of them is said in
``midstream.bench.detection``.

    python -m benchmarks.detection [--ids 100000] [--json benchmarks/results/FILE.json]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from benchmarks.machine import description, load
from midstream.bench.detection import POINTS, Measurement, measurements, points_up_to
from tests.vocabularies import tokenizer

TOKENIZERS = ("o200k", "qwen", "llama3", "tekken", "mistral3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ids", type=int, default=POINTS[-1], help="of the row")
    parser.add_argument("--tokenizers", nargs="+", default=list(TOKENIZERS), metavar="NAME")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    measured: list[Measurement] = []
    for name in options.tokenizers:
        try:
            loaded = tokenizer(name)
        except pytest.skip.Exception as missing:
            print(f"{name} skipped: {missing}")
            continue
        measured += measurements(name, loaded, options.ids, options.repeats)
    points = points_up_to(options.ids)
    table = Table("vocabulary", "text", "", *(f"µs an id, first {point:,}" for point in points))
    for one in measured:
        table.add_row(one.tokenizer, one.text, one.what, *(f"{one.microseconds[point]:.2f}" for point in points))
    Console().print(table)
    if options.json is not None:
        last, first = points[-1], points[0]
        detection = [one for one in measured if one.what == "detect"]
        record = {
            "benchmark": "detection",
            "machine": description(),
            "load": load(),
            "measurements": [asdict(one) for one in measured],
            "comparisons": {
                "detection, most microseconds an id": max(one.microseconds[last] for one in detection),
                "detection, longest row / shortest, at most": round(
                    max(one.microseconds[last] / one.microseconds[first] for one in detection), 2
                ),
            },
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
