"""``midstream replay``: do the blocks of a file still give what they gave?"""

from __future__ import annotations

import os
from itertools import chain

import click

from midstream.cli.frame import WRONG, command
from midstream.cli.options import check_readable, named_options
from midstream.records import read_records
from midstream.replaying import RecordedPools, Replayed, replay
from midstream.sandbox.pool import Isolation


@command("replay")
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path())
@click.option(
    "--isolation",
    type=click.Choice(["auto", "full", "container"]),
    default="auto",
    show_default=True,
    help="What sandboxes must hold; auto is the best that this machine can.",
)
@click.option(
    "--wall-time", type=float, default=None, help="Seconds that a block may run.  [default: as recorded, else 10]"
)
@click.option(
    "--preload",
    multiple=True,
    metavar="MODULE",
    help="Sandboxes find it imported; may be given again.  [default: as recorded, else numpy and sympy]",
)
@click.option(
    "--at-once", type=click.IntRange(min=1), default=None, help="Trajectories at a time.  [default: the cores]"
)
def replay_command(
    files: tuple[str, ...], isolation: Isolation, wall_time: float | None, preload: tuple[str, ...], at_once: int | None
) -> int:
    """Run the blocks of FILE... again, in fresh sessions, and report each difference.

    Sandboxes have the limits, guardrails and style of errors that are recorded; --isolation is this machine's. Tools
    are not called: what they answered stands in the records. Each difference is a line with the file, the
    prompt, the sample, the block and what was and what is; the exit code is 1 if there is one.

    \b
    Examples:
      midstream replay rollouts.jsonl
      midstream replay rollouts.jsonl --wall-time 60
    """
    # What cannot be is refused before anything starts.
    with named_options(wall_time="--wall-time"):
        pools = RecordedPools(isolation=isolation, wall_time=wall_time, preload=preload or None)
    for file in files:
        check_readable(file)
    trajectories = blocks = different = skipped = 0
    with pools:
        threads = at_once or len(os.sched_getaffinity(0))
        for done in replay(chain.from_iterable(map(read_records, files)), pools, at_once=threads):
            trajectories += 1
            blocks += done.blocks
            different += bool(done.differences)
            skipped += bool(done.skipped)
            _report(done)
    verdict = f"{different:,} of them otherwise" if different else "all as recorded"
    left_out = f", {skipped:,} not run" if skipped else ""
    click.echo(f"{blocks:,} blocks of {trajectories:,} trajectories: {verdict}{left_out}")
    return WRONG if different else 0


def _report(done: Replayed) -> None:
    prompt = "a prompt without id" if done.record.prompt.id is None else f"prompt {done.record.prompt.id!r}"
    for told in (*done.differences, *filter(None, [done.skipped])):
        click.echo(f"{prompt} sample {done.record.sample}: {told}")
