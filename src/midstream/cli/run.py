"""``midstream run``: trajectories of a file of prompts, each durable as soon as it is finished."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from contextlib import ExitStack, aclosing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console

from midstream.cli import config_file, tool_files
from midstream.cli.config_file import write_config
from midstream.cli.frame import WRONG, command, errors_console
from midstream.cli.model import load_engine
from midstream.cli.observers import METRICS_OPTION, SPANS_OPTION, check_observers, start_observers
from midstream.cli.plan import Options, Plan, make_plan
from midstream.cli.progress import ProgressView
from midstream.engines.base import Engine
from midstream.generation import Generator
from midstream.jobs import FAILURES
from midstream.observing import Observer
from midstream.records import Record, RecordWriter
from midstream.tools import ToolSet
from midstream.types import Prompt, StopKind, Trajectory


@command("run")
@config_file.OPTION
@click.option(
    "--model",
    required=True,
    metavar="PATH",
    type=click.Path(),
    help="Folder of a transformers model, or its name on the hub.",
)
@click.option(
    "--server",
    metavar="URL",
    help="A vLLM or SGLang server that serves the model: of --model only the tokenizer and configuration are read.",
)
@click.option("--served-model", metavar="NAME", help="The model's name on the server.  [default: the only one it has]")
@click.option("--text-only", is_flag=True, help="For servers that give only text: evaluation, not training.")
@click.option("--api-key-env", metavar="NAME", help="The environment variable that holds the server's key.")
@click.option("--prompts", required=True, metavar="FILE", type=click.Path(), help="JSON Lines, one prompt a line.")
@click.option(
    "--out", required=True, metavar="FILE", type=click.Path(), help="Records are appended here, one line a trajectory."
)
@tool_files.OPTION
@click.option("--num-samples", type=click.IntRange(min=1), default=1, show_default=True, help="Samples of a prompt.")
@click.option("--temperature", type=float, default=1.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=int, default=0, help="Keep the k likeliest ids; 0 is off.  [default: 0]")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Keep the likeliest ids up to mass p.")
@click.option(
    "--min-p", type=float, default=0.0, show_default=True, help="Keep ids at least p times as likely as the best."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Keys all random numbers, with each prompt's id.")
@click.option("--max-new-tokens", type=int, default=None, help="Ids after the prompt, results included.")
@click.option("--max-total-tokens", type=int, default=None, help="All ids of a row.  [default: the model's context]")
@click.option("--max-tool-calls", type=int, default=None, help="Blocks that are run; later ones are answered so.")
@click.option("--time-limit", type=float, default=None, help="Seconds of a row, waiting for its code included.")
@click.option("--result-tokens", type=int, default=1024, show_default=True, help="Ids of a result; longer are cut.")
@click.option("--stop", "stop_strings", multiple=True, metavar="TEXT", help="Ends a row; may be given again.")
@click.option(
    "--markup",
    default="code",
    show_default=True,
    metavar="code|fenced|none|qwen|hermes|llama3|mistral|TAG",
    help="How blocks look: <code>, ```python, none at all, a family's calls of tools, or a tag such as '<python>'. "
    "code+qwen is both (docs/markups.md).",
)
@click.option(
    "--isolation",
    type=click.Choice(["auto", "full", "container"]),
    default="auto",
    show_default=True,
    help="What sandboxes must hold; auto is the best that this machine can.",
)
@click.option("--wall-time", type=float, default=10.0, show_default=True, help="Seconds that a block may run.")
@click.option(
    "--preload",
    multiple=True,
    metavar="MODULE",
    help="Sandboxes find it imported; may be given again.  [default: numpy and sympy, where installed]",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Rows decoded together.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Of the weights; auto is the checkpoint's own.",
)
@click.option("--device", default=None, help="Such as cpu or cuda:1.  [default: CUDA where there is one]")
@METRICS_OPTION
@SPANS_OPTION
@click.pass_context
def run_command(
    ctx: click.Context, /, config: str | None, metrics: tuple[str, int] | None, spans: str | None, **options: Any
) -> int:
    """Generate trajectories for a file of prompts, running the model's code on the way.

    A line of the prompts is a JSON object with one of "text", "messages" (rendered through the model's chat
    template) and "ids"; and, as one likes, "id", "group", "metadata", "seed", "open_block" and "limits" (which go
    before those of the command line, field by field).

    Each finished trajectory is on disk before the run goes on. After Ctrl-C or even kill -9, the same command goes
    on where it stopped: nothing is lost, nothing is done twice. Rows that the engine or a sandbox failed are kept
    as they are until then, and tried again. The options of the run stand in a file beside that of --out, which
    --config takes: with it the run can be made again.

    On a terminal it shows how it goes: rows by what they do and how they stopped, rates, calls in flight, the slowest
    tools. Elsewhere a line tells of that now and then.

    \b
    Examples:
      midstream run --model ./model --prompts prompts.jsonl --out rollouts.jsonl
      midstream run --model Qwen/Qwen2.5-0.5B-Instruct --prompts chats.jsonl --out rollouts.jsonl \\
          --num-samples 8 --temperature 0.8 --max-new-tokens 1024 --markup fenced
      midstream run --server http://localhost:8000 --model ./model --prompts prompts.jsonl --out rollouts.jsonl
      midstream run --config run.toml --tools tools.py --seed 1
    """
    console = errors_console(ctx)
    check_observers(metrics, spans)
    plan = make_plan(Options(**options))
    with RecordWriter(plan.out, known=plan.known, again=_failed) as writer:
        work = plan.work(writer)
        done = plan.total - sum(plan.num_samples if isinstance(item, Prompt) else 1 for item in work)
        if not work:
            click.echo(f"{plan.out}: all {plan.total} trajectories are there already")
            return 0
        if done:
            console.print(f"{plan.out}: going on after {done} of {plan.total} trajectories", soft_wrap=True)
        if writer.taken_out:
            console.print(f"{plan.out}: {len(writer.taken_out)} rows that failed are tried again", soft_wrap=True)
        _echo(ctx, plan, config)
        with ExitStack() as stack:
            observers = start_observers(metrics, spans, stack, console)
            return _generate(plan, work, done, writer, console, observers)


def _echo(ctx: click.Context, plan: Plan, config: str | None) -> None:
    """Put the run's options beside its records."""
    path = Path(f"{plan.out}.toml")
    if config is not None and path.exists() and path.samefile(config):
        return  # it is what this run was made with
    versions = ", ".join(
        f"{name} {each}" for name, each in {"midstream": version("midstream"), **plan.files.versions}.items()
    )
    given = {name: value for name, value in ctx.params.items() if name not in ("config", "metrics", "spans")}
    write_config(
        ctx.command, given, path, f"What made {Path(plan.out).name}: {versions}.\nmidstream run --config does it again."
    )


def _failed(record: Record) -> bool:
    """It was the machinery that failed; another time it may not."""
    return record.stop.kind in FAILURES


# --- doing it --------------------------------------------------------------------------------------------


def _generate(
    plan: Plan,
    work: Sequence[Prompt | Trajectory],
    done: int,
    writer: RecordWriter,
    console: Console,
    observers: Sequence[Observer],
) -> int:
    with ExitStack() as stack:
        for source in ToolSet(plan.tools).sources:
            stack.callback(source.stop)  # it was started as its file was read
        pool = None
        if plan.pool is not None:
            pool = stack.enter_context(
                plan.pool(observers=observers)
            )  # a machine that cannot isolate is refused before the model is loaded
        if plan.server is None:
            engine: Engine = load_engine(plan.files, plan.batch_size)
        else:
            engine = plan.server.connect(plan.files, plan.batch_size)
        stack.callback(engine.shutdown)
        view = ProgressView(console, plan.total, done)
        generator = stack.enter_context(
            Generator(
                engine,
                tools=plan.tools,
                observers=[view, *observers],
                markup=plan.markup,
                limits=plan.limits,
                sampling=plan.sampling,
                pool=pool,
                seed=plan.seed,
                # Rows wait here rather than in the engine, where their time limits would run already.
                max_open_rows=2 * plan.batch_size,
            )
        )
        stack.enter_context(view)
        running = _Run(plan, generator, writer, view)
        asyncio.run(running.drive(work))
    return running.summary(plan.total, done)


class _Run:
    """One batch, from the generator into the file."""

    def __init__(self, plan: Plan, generator: Generator, writer: RecordWriter, view: ProgressView) -> None:
        self._plan = plan
        self._generator = generator
        self._writer = writer
        self._view = view
        self._written = 0
        self._signal: int | None = None
        self._failures: list[str] = []

    async def drive(self, work: Sequence[Prompt | Trajectory]) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._interrupt, number)
        watching = asyncio.create_task(self._watch())
        try:
            async with aclosing(self._generator.stream(work, self._plan.num_samples)) as stream:
                async for trajectory in stream:
                    await self._keep(trajectory)
        finally:
            watching.cancel()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
        self._view.show(self._generator.progress, self._written)

    async def _keep(self, trajectory: Trajectory) -> None:
        if trajectory.stop.kind in (StopKind.CANCELLED, StopKind.PAUSED):
            return  # it is not finished: the next run does it anew
        record = self._generator.record(trajectory)
        provenance = {**record.provenance, **self._plan.files.versions, "settings": self._plan.settings}
        # In a thread: the rows go on while the disk takes its time.
        await asyncio.to_thread(self._writer.append, msgspec.structs.replace(record, provenance=provenance))
        self._written += 1
        if trajectory.stop.kind in FAILURES:
            self._failures.append(f"prompt {trajectory.prompt.id!r} sample {trajectory.sample}: {trajectory.stop}")

    async def _watch(self) -> None:
        while True:
            self._view.show(self._generator.progress, self._written)
            await asyncio.sleep(0.2)

    def _interrupt(self, number: int) -> None:
        """The first signal ends the rows and keeps what is finished; the second one is as usual."""
        self._signal = number
        loop = asyncio.get_running_loop()
        loop.remove_signal_handler(number)
        self._generator.cancel()

    def summary(self, total: int, done: int) -> int:
        """Say how it went, and return the exit code."""
        there = done + self._written
        rates = self._view.rates(self._generator.progress)
        click.echo(f"{self._plan.out}: {there} of {total} trajectories, {self._written} of them now ({rates})")
        if self._failures:
            click.echo(f"midstream run: {len(self._failures)} rows failed; the first: {self._failures[0]}", err=True)
        if self._signal is not None:
            click.echo("midstream: interrupted; the same command goes on from here", err=True)
            return 128 + self._signal
        return WRONG if self._failures else 0
