"""What results in the middle of a sequence cost on vLLM, in midstream's three ways, side by side.

A random 20M-parameter Llama on vLLM, 16 rows, prompts of 512 ids, 128 sampled ids a row, four results of 32
ids each at steps of each row's own; prefill included, the prefix cache emptied before each run. The code
that makes the results takes no time: what is measured is the engine. Against two uninterrupted runs of vLLM
itself, in the same kind of process: one that samples as many ids ("sampled"), and one that samples as many as
midstream's run has behind its prompts, results included ("all"). Forcing decodes every id of a result, so the
second is what it can reach. Wall time; all arms in turns, several times over, and the median of the ratios.

The three ways must give the same ids; the table says how many of the rows do.

    make bench-vllm, or python -m benchmarks.engines_vllm [--small] [--json benchmarks/results/FILE.json]
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.data import REPOSITORY
from benchmarks.machine import description, load
from midstream.engines.base import RowRequest
from midstream.types import Sampling

SAMPLING = Sampling(temperature=1.0)
"""Drawn with keyed noise, so that every way gives the same ids, and few of them twice."""


@dataclass(frozen=True)
class Shape:
    rows: int = 16
    prompt: int = 512
    sampled: int = 128
    calls: int = 4
    result: int = 32
    vocabulary: int = 8192
    layers: int = 8
    hidden: int = 384


class Workload:
    """For each row its prompt, its results, and after how many sampled ids they come."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        generator = random.Random(1)
        self.prompts = [self._ids(generator, shape.prompt) for _ in range(shape.rows)]
        self.results = [[self._ids(generator, shape.result) for _ in range(shape.calls)] for _ in range(shape.rows)]
        self.calls_at = [sorted(generator.sample(range(1, shape.sampled), shape.calls)) for _ in range(shape.rows)]

    def _ids(self, generator: random.Random, count: int) -> tuple[int, ...]:
        return tuple(generator.randrange(3, self.shape.vocabulary) for _ in range(count))


def save_model(shape: Shape, folder: str) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.hidden * 8 // 3,
        num_hidden_layers=shape.layers,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=4096,
        initializer_range=0.05,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):  # never asked to decode
        shutil.copy(REPOSITORY / "src" / "midstream" / "demo" / name, folder)


def run_midstream(work: Workload, engine: Any, stop_ids: list[tuple[int, ...]], *, calls: bool) -> list[list[int]]:
    """All rows through one of midstream's ways: their sampled ids."""
    rows = {
        engine.open(RowRequest(prompt, sampling=SAMPLING, seed=number, stop_ids=stop_ids[number]))[0]: number
        for number, prompt in enumerate(work.prompts)
    }
    sampled: list[list[int]] = [[] for _ in rows]
    ends = [[*(at if calls else ()), work.shape.sampled] for at in work.calls_at]
    while rows:
        for update in engine.step():
            row = rows[update.handle]
            sampled[row].extend(update.ids)
            if len(sampled[row]) < ends[row][0]:
                continue
            end = ends[row].pop(0)
            surplus = len(sampled[row]) - end
            del sampled[row][end:]
            if not ends[row]:
                engine.close(update.handle)
                del rows[update.handle]
            else:
                engine.rollback(update.handle, surplus)
                engine.extend(update.handle, work.results[row][work.shape.calls - len(ends[row])])
    return sampled


def parameters(count: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=1.0,
        max_tokens=count,
        ignore_eos=True,
        logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def run_direct(work: Workload, llm: Any, count: int) -> None:
    """vLLM alone, stepped here."""
    for number, prompt in enumerate(work.prompts):
        llm.llm_engine.add_request(f"plain-{number}", {"prompt_token_ids": list(prompt)}, parameters(count))
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()


def run_async(work: Workload, llm: Any, count: int) -> None:
    """vLLM alone, running by itself."""

    async def follow(number: int) -> None:
        prompt = {"prompt_token_ids": list(work.prompts[number])}
        async for _ in llm.generate(prompt, parameters(count), f"plain-{number}"):
            pass

    async def follow_all() -> None:
        await asyncio.gather(*map(follow, range(work.shape.rows)))

    asyncio.run_coroutine_threadsafe(follow_all(), llm.output_handler.get_loop()).result()


def measure(work: Workload, folder: str, repeats: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Wall seconds of each arm, repeat by repeat; and the ids of midstream's."""
    from vllm import LLM

    from midstream.engines.vllm import VLLMEngine
    from midstream.engines.vllm.facts import PROCESSOR_V1

    options: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_model_len": 2048, "max_num_seqs": 16}
    streaming = VLLMEngine.from_pretrained(folder, mode="streaming", **options)
    llm = LLM(folder, logits_processors=[PROCESSOR_V1], disable_log_stats=True, **options)
    resubmission = VLLMEngine(llm, mode="resubmission")
    forced = VLLMEngine(llm, mode="forced")
    nowhere: list[tuple[int, ...]] = [()] * work.shape.rows
    some, everything = work.shape.sampled, work.shape.sampled + work.shape.calls * work.shape.result
    reference = run_midstream(work, resubmission, nowhere, calls=True)
    # Sessions end a turn at stop ids alone: those ids after which the row's results come.
    calling = [tuple({ids[at - 1] for at in places}) for ids, places in zip(reference, work.calls_at, strict=True)]
    arms: dict[str, tuple[Any, Callable[[], Any]]] = {
        "vLLM in process, sampled": (resubmission, lambda: run_direct(work, llm, some)),
        "vLLM in process, all": (resubmission, lambda: run_direct(work, llm, everything)),
        "vLLM apart, sampled": (streaming, lambda: run_async(work, streaming.llm, some)),
        "vLLM apart, all": (streaming, lambda: run_async(work, streaming.llm, everything)),
        "resubmission, no results": (resubmission, lambda: run_midstream(work, resubmission, nowhere, calls=False)),
        "resubmission": (resubmission, lambda: run_midstream(work, resubmission, nowhere, calls=True)),
        "forced": (forced, lambda: run_midstream(work, forced, nowhere, calls=True)),
        "streaming, no results": (streaming, lambda: run_midstream(work, streaming, nowhere, calls=False)),
        "streaming": (streaming, lambda: run_midstream(work, streaming, calling, calls=True)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    ids: dict[str, Any] = {}
    for repeat in range(-1, repeats):  # the first warms up
        for name, (engine, body) in arms.items():
            engine.set_weights(0, keep_cache=False)
            started = time.perf_counter()
            ids[name] = body()
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - started)
                print(f"{name:36} {seconds[name][-1]:6.2f} s", flush=True)
    for engine in (resubmission, forced, streaming):
        engine.shutdown()
    llm.llm_engine.engine_core.shutdown()
    return seconds, ids


AGAINST = {
    "resubmission, no results": "vLLM in process",
    "resubmission": "vLLM in process",
    "forced": "vLLM in process",
    "streaming, no results": "vLLM apart",
    "streaming": "vLLM apart",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a quarter of the length, to see that it runs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if importlib.util.find_spec("vllm") is None:
        print("vLLM is not installed here; `make bench-vllm` installs it apart and measures")
        return 0
    shape = Shape(prompt=128, sampled=32, result=8) if options.small else Shape()
    work = Workload(shape)
    before = load()
    with tempfile.TemporaryDirectory() as folder:
        save_model(shape, folder)
        seconds, ids = measure(work, folder, options.repeats)
    alike = {
        name: sum(one == other for one, other in zip(ids[name], ids["resubmission"], strict=True))
        for name in ("resubmission", "forced", "streaming")
    }
    lines = []
    for name, times in seconds.items():
        against = AGAINST.get(name)
        ratios = {
            kind: round(statistics.median(a / b for a, b in zip(times, seconds[f"{against}, {kind}"], strict=True)), 3)
            for kind in ("sampled", "all")
            if against is not None
        }
        line = {"arm": name, "seconds": round(statistics.median(times), 3), **ratios, "rows_alike": alike.get(name)}
        lines.append(line)
    show(lines, shape)
    if options.json is not None:
        import torch
        import vllm

        record = {
            "benchmark": "engines_vllm",
            "shape": asdict(shape),
            "machine": {**description(), "load_before": before, "load_after": load()},
            "versions": {"torch": torch.__version__, "vllm": vllm.__version__},
            "seconds": {name: [round(one, 3) for one in times] for name, times in seconds.items()},
            "arms": lines,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def show(lines: list[dict[str, Any]], shape: Shape) -> None:
    table = Table(title=f"{shape.rows} rows, {shape.prompt} + {shape.sampled} ids, {shape.calls} x {shape.result} more")
    for column in ("", "seconds", "x vLLM sampling as many", "x vLLM with as many in all", "rows alike"):
        table.add_column(column, justify="left" if not column else "right")
    for line in lines:
        ratios = [f"{line[kind]:.2f}" if kind in line else "" for kind in ("sampled", "all")]
        alike = "" if line["rows_alike"] is None else f"{line['rows_alike']}/{shape.rows}"
        table.add_row(line["arm"], f"{line['seconds']:.2f}", *ratios, alike)
    Console(width=120).print(table)


if __name__ == "__main__":
    sys.exit(main())
