"""What results in the middle of a sequence cost on a Hugging Face model.

A random 20M-parameter Llama, 16 rows, prompts of 1,024 ids, 256 sampled ids a row, greedy, four results of
32 ids each. Side by side, prefill included:

- ``engine``: midstream's own loop, without tools and with the results fed in; in turns, several times over,
  and the median of the ratios.
- ``generate``: ``model.generate`` without tools; and in rounds: until every row of the round has stopped, then
  again over the whole prefix with the results appended, the usual way to add tools. Rows are stopped by
  counts here, which costs nothing, where real ones look for strings. Once.

The results come at the same step in all rows ("together"), or at steps of each row's own ("apart"). The code
that makes them takes no time: what is measured is the engine.

    python -m benchmarks.engines_huggingface [--threads 1] [--small] [--json benchmarks/results/FILE.json]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from benchmarks.machine import description
from midstream.engines.base import RowRequest
from midstream.engines.huggingface import HuggingFaceEngine
from midstream.types import Sampling

GREEDY = Sampling(temperature=0)


@dataclass(frozen=True)
class Shape:
    rows: int = 16
    prompt: int = 1024
    sampled: int = 256
    calls: int = 4
    result: int = 32
    vocabulary: int = 8192
    layers: int = 8
    hidden: int = 384


@dataclass
class Measurement:
    schedule: str
    arm: str
    cpu_seconds: float
    wall_seconds: float
    note: str = ""


class Workload:
    """The model, and for each row its prompt, its results and where they come."""

    def __init__(self, shape: Shape) -> None:
        torch.manual_seed(0)
        self.shape = shape
        config = transformers.LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.hidden * 8 // 3,
            num_hidden_layers=shape.layers,
            num_attention_heads=6,
            num_key_value_heads=6,
            max_position_embeddings=8192,
            initializer_range=0.05,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
        )
        self.model = transformers.LlamaForCausalLM(config).eval()
        generator = random.Random(1)
        self.prompts = [self._ids(generator, shape.prompt) for _ in range(shape.rows)]
        self.results = [[self._ids(generator, shape.result) for _ in range(shape.calls)] for _ in range(shape.rows)]
        even = [shape.sampled // (shape.calls + 1) * call for call in range(1, shape.calls + 1)]
        self.calls_at = {
            "together": [even for _ in range(shape.rows)],
            "apart": [sorted(generator.sample(range(1, shape.sampled), shape.calls)) for _ in range(shape.rows)],
        }

    def _ids(self, generator: random.Random, count: int) -> list[int]:
        return [generator.randrange(3, self.shape.vocabulary) for _ in range(count)]


def run_engine(work: Workload, calls_at: list[list[int]] | None) -> tuple[list[list[int]], str]:
    """The engine's own loop; ``calls_at`` says after how many sampled ids each row gets its results."""
    engine = HuggingFaceEngine(work.model, None, max_batch_size=work.shape.rows)
    handles = [engine.open(RowRequest(tuple(prompt), sampling=GREEDY))[0] for prompt in work.prompts]
    rows = {handle: index for index, handle in enumerate(handles)}
    sequences = [list(prompt) for prompt in work.prompts]
    sampled = [0] * len(rows)
    while rows:
        for update in engine.step():
            row = rows[update.handle]
            sequences[row].extend(update.ids)
            sampled[row] += len(update.ids)
            if sampled[row] == work.shape.sampled:
                engine.close(update.handle)
                del rows[update.handle]
            elif calls_at is not None and sampled[row] in calls_at[row]:
                result = work.results[row][calls_at[row].index(sampled[row])]
                engine.rollback(update.handle, 0)
                engine.extend(update.handle, result)
                sequences[row].extend(result)
    counts = engine.statistics
    engine.shutdown()
    return sequences, f"{counts.steps} steps, {counts.forwards} forward passes"


class StopAfter(transformers.StoppingCriteria):
    """Each row of the batch stops after its own number of new ids."""

    def __init__(self, start: int, counts: list[int]) -> None:
        self._start = start
        self._counts = torch.tensor(counts)

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return (input_ids.shape[1] - self._start) >= self._counts


def run_rounds(work: Workload, calls_at: list[list[int]] | None) -> tuple[list[list[int]], str]:
    """``model.generate``, again and again; once where there are no calls."""
    sequences = [list(prompt) for prompt in work.prompts]
    ends = [[*(calls or ()), work.shape.sampled] for calls in (calls_at or [[]] * len(sequences))]
    steps = done = 0
    for call in range(len(ends[0])):
        counts = [row[call] - (row[call - 1] if call else 0) for row in ends]
        width = max(map(len, sequences))
        padded = torch.tensor([[0] * (width - len(row)) + row for row in sequences])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in sequences])
        output = work.model.generate(
            input_ids=padded,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=max(counts),
            stopping_criteria=transformers.StoppingCriteriaList([StopAfter(width, counts)]),
        )
        steps += output.shape[1] - width
        for row, count in enumerate(counts):
            sequences[row].extend(output[row, width : width + count].tolist())
            if call < len(ends[row]) - 1:
                sequences[row].extend(work.results[row][call])
                done += 1
    return sequences, f"{steps} steps, {done} results"


def measure(schedule: str, arm: str, body: Callable[[], tuple[list[list[int]], str]]) -> tuple[Measurement, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    sequences, note = body()
    measured = Measurement(schedule, arm, time.process_time() - cpu, time.perf_counter() - wall, note)
    print(f"{schedule:9} {arm:16} {measured.cpu_seconds:7.1f} CPU s {measured.wall_seconds:7.1f} s  {note}", flush=True)
    return measured, sequences


def rows_alike(work: Workload, first: list[list[int]], second: list[list[int]]) -> int:
    """Rows equal up to ties: where they part, the model's top two logits are within 1e-4."""
    alike = 0
    for one, other in zip(first, second, strict=True):
        place = next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
        if place is None:
            alike += 1
        else:
            with torch.inference_mode():
                logits = work.model(input_ids=torch.tensor([one[:place]])).logits[0, -1]
            top = logits.topk(2).values
            alike += bool(top[0] - top[1] <= 1e-4)
    return alike


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="a quarter of the length, to see that it runs")
    parser.add_argument("--schedules", nargs="+", default=["together", "apart"], choices=["together", "apart"])
    parser.add_argument("--repeats", type=int, default=3, help="of midstream's own arms")
    parser.add_argument("--skip-generate", action="store_true", help="only midstream's own arms")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    work = Workload(Shape(prompt=256, sampled=64) if options.small else Shape())
    run_engine(Workload(Shape(rows=2, prompt=32, sampled=8, calls=1)), None)  # warms up allocator and kernels

    calls = {schedule: work.calls_at[schedule] for schedule in options.schedules}
    measured: list[Measurement] = []
    ids: dict[str, list[list[int]]] = {}
    # In turns: what else the machine does falls on all of them alike.
    for _ in range(options.repeats):
        for schedule, calls_at in {"none": None, **calls}.items():
            one, ids[schedule] = measure(schedule, "engine", lambda at=calls_at: run_engine(work, at))
            measured.append(one)
    engine = {schedule: [one.cpu_seconds for one in measured if one.schedule == schedule] for schedule in ids}
    comparisons: dict[str, float | str] = {
        f"{schedule}: engine with results / without": statistics.median(
            tools / plain for tools, plain in zip(engine[schedule], engine["none"], strict=True)
        )
        for schedule in calls
    }
    if not options.skip_generate:
        for schedule, calls_at in {"none": None, **calls}.items():
            one, others = measure(schedule, "generate", lambda at=calls_at: run_rounds(work, at))
            measured.append(one)
            name = "no results: generate" if calls_at is None else f"{schedule}: rounds of generate"
            comparisons[f"{name} / engine"] = one.cpu_seconds / statistics.median(engine[schedule])
            comparisons[f"{name}, rows alike"] = f"{rows_alike(work, ids[schedule], others)}/{work.shape.rows}"
    report(work, measured, comparisons, options)


def report(
    work: Workload, measured: list[Measurement], comparisons: dict[str, float | str], options: argparse.Namespace
) -> None:
    table = Table("CPU-seconds compared", "ratio", title="Results in the middle of a sequence, Hugging Face model")
    for name, value in comparisons.items():
        table.add_row(name, value if isinstance(value, str) else f"{value:.2f}")
    Console().print(table)
    if options.json is not None:
        record = {
            "benchmark": "engines_huggingface",
            "shape": asdict(work.shape),
            "parameters": sum(parameter.numel() for parameter in work.model.parameters()),
            "threads": options.threads,
            "machine": description(),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "measurements": [asdict(one) for one in measured],
            "comparisons": comparisons,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
