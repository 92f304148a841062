"""Watch a small language model run code in the middle of its answers.

Answers the held-out problems with a model that writes code, whose blocks run in sandboxed interpreters, and
with one of the same size and training that answers at once; prints some transcripts in colour, how many
answers are right, how fast it went, and what ``midstream check`` says of the file that was written.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from rich.text import Text

import midstream as ms
from problems import KINDS, FixedProblem, is_correct, load_held_out, prompt_text

MODELS = Path(ms.__file__).parent / "demo"
END_OF_SEQUENCE = "<|endoftext|>"


@dataclass(frozen=True, slots=True)
class Outcome:
    """Trajectories in the order of the problems, which of them are right, and what it took."""

    trajectories: list[ms.Trajectory]
    right: list[bool]
    seconds: float

    @property
    def accuracy(self) -> float:
        return sum(self.right) / len(self.right)


async def answer(
    generator: ms.Generator, problems: list[FixedProblem], out: Path | None, console: Console, title: str
) -> Outcome:
    """Answer each problem once, greedily; each trajectory is in ``out`` as soon as it is finished."""
    from midstream.records import RecordWriter

    answers = {problem.id: problem.answer for problem in problems}
    prompts = [
        ms.Prompt(text=prompt_text(p.question), id=p.id, metadata={"kind": p.kind, "answer": p.answer})
        for p in problems
    ]

    def reward(trajectory: ms.Trajectory) -> float:
        text = trajectory.text.removesuffix(END_OF_SEQUENCE)
        return float(is_correct(text, answers[str(trajectory.prompt.id)]))

    started = time.monotonic()
    done: dict[str, ms.Trajectory] = {}
    writer = RecordWriter(out) if out is not None else None
    with console.status(title) as status:
        async for trajectory in generator.stream(prompts, reward=reward):
            done[str(trajectory.prompt.id)] = trajectory
            if writer is not None:
                writer.append(generator.record(trajectory))
            status.update(f"{title}: {len(done)} of {len(prompts)}")
    if writer is not None:
        writer.close()
    trajectories = [done[problem.id] for problem in problems]
    return Outcome(trajectories, [t.reward == 1.0 for t in trajectories], time.monotonic() - started)


def show(trajectory: ms.Trajectory, right: bool, console: Console) -> None:
    """One transcript: the prompt dim, what the model wrote plain with its code blue, results green."""
    text = Text(trajectory.prompt.text or "", style="dim")
    for segment in trajectory.segments:
        if segment.origin == "injected":
            text.append(segment.text, style="bold green")
            continue
        written = Text(segment.text.removesuffix(END_OF_SEQUENCE))
        written.highlight_regex(r"(?s)<code>.*?(</code>|$)", "blue")
        text.append_text(written)
    text.append("   ✓" if right else "   ✗", style="bold green" if right else "bold red")
    console.print(text)
    console.print()


def some_of_each_kind(problems: list[FixedProblem], count: int) -> list[int]:
    taken: Counter[str] = Counter()
    places = []
    for place, problem in enumerate(problems):
        if taken[problem.kind] < count:
            taken[problem.kind] += 1
            places.append(place)
    return places


def accuracy_table(problems: list[FixedProblem], with_code: Outcome, direct: Outcome) -> Table:
    table = Table(title="Held-out problems answered right", title_justify="left")
    for column, justify in (("kind", "left"), ("problems", "right"), ("with code", "right"), ("without", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for kind in (*KINDS, "all"):
        places = [i for i, problem in enumerate(problems) if kind in ("all", problem.kind)]
        shares = [sum(outcome.right[i] for i in places) / len(places) for outcome in (with_code, direct)]
        table.add_row(kind, str(len(places)), *(f"{share:.1%}" for share in shares))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/calculator.jsonl"), help="where the rollouts go")
    parser.add_argument("--problems", type=int, help="how many held-out problems (default: all)")
    parser.add_argument("--show", type=int, default=2, help="transcripts of each kind to print (default: 2)")
    parser.add_argument("--picture", type=Path, help="save what is printed as an SVG file, too")
    arguments = parser.parse_args()
    console = Console(highlight=False, record=arguments.picture is not None)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # the model is small: a second thread would only wait for the first
    problems = load_held_out()[: arguments.problems]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.unlink(missing_ok=True)
    limits = ms.Limits(max_new_tokens=256)
    greedy = ms.Sampling(temperature=0)

    engine = ms.HuggingFaceEngine.from_pretrained(str(MODELS), max_batch_size=64)
    with ms.Generator(engine, limits=limits, sampling=greedy) as generator:
        with_code = asyncio.run(answer(generator, problems, arguments.out, console, "answering with code"))
        isolation = generator.provenance["isolation"]
    direct_engine = ms.HuggingFaceEngine.from_pretrained(str(MODELS / "direct"), max_batch_size=64)
    with ms.Generator(direct_engine, markup=None, limits=limits, sampling=greedy) as generator:
        direct = asyncio.run(answer(generator, problems, None, console, "answering without code"))

    for place in some_of_each_kind(problems, arguments.show):
        show(with_code.trajectories[place], with_code.right[place], console)
    console.print(accuracy_table(problems, with_code, direct))
    generated = sum(sum(t.mask) for t in with_code.trajectories)
    calls = sum(len(t.calls) for t in with_code.trajectories)
    console.print(
        f"{generated:,} tokens sampled and {calls:,} blocks of code run in {with_code.seconds:.1f} s: "
        f"{generated / with_code.seconds:,.0f} tokens/s, {calls / with_code.seconds:,.0f} calls/s; "
        f"isolation: {isolation}"
    )
    if arguments.picture is not None:
        console.save_svg(str(arguments.picture), title="make demo")
    console.print(f"midstream check {arguments.out}:")
    sys.stdout.flush()
    sys.exit(subprocess.run([sys.executable, "-m", "midstream", "check", str(arguments.out)], check=False).returncode)


if __name__ == "__main__":
    main()
