"""The command line: ``run`` makes trajectories; ``check``, ``view``, ``stats``, ``replay`` and ``export`` read them.

``serve`` answers OpenAI's clients, ``doctor`` tries the sandbox, ``bench`` measures, ``tools`` tells what models are
told, ``completion`` is for shells.
"""

from __future__ import annotations

from importlib.metadata import version

import click

from midstream.cli.bench import bench_command
from midstream.cli.check import check_command
from midstream.cli.completion import completion_command
from midstream.cli.doctor import doctor_command
from midstream.cli.export import export_command
from midstream.cli.frame import EXIT_CODES, CommandLine
from midstream.cli.replay import replay_command
from midstream.cli.run import run_command
from midstream.cli.serve import serve_command
from midstream.cli.stats import stats_command
from midstream.cli.tools import tools_command
from midstream.cli.view import view_command

__all__ = ["main"]


@click.group(cls=CommandLine, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("midstream"), prog_name="midstream")
def main() -> None:
    """Code execution and tools in the middle of an LLM's generation.

    \b
    Examples:
      midstream run --model ./model --prompts prompts.jsonl --out rollouts.jsonl
      midstream check rollouts.jsonl
      midstream view rollouts.jsonl
      midstream stats rollouts.jsonl
      midstream replay rollouts.jsonl
      midstream export rollouts.jsonl
      midstream tools tools.py
      midstream serve --upstream http://localhost:8000 --model ./model
      midstream bench
      midstream doctor
    """


main.add_command(run_command)
main.add_command(check_command)
main.add_command(view_command)
main.add_command(stats_command)
main.add_command(replay_command)
main.add_command(export_command)
main.add_command(tools_command)
main.add_command(serve_command)
main.add_command(bench_command)
main.add_command(doctor_command)
main.add_command(completion_command)
