"""What all commands share: examples, options for logs, errors in one line, completion in shells."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from midstream.cli import main
from midstream.cli.frame import BAD_INPUT, EXIT_CODES, Command
from tests.cli.runs import here

COMMANDS = sorted(main.commands)
BIN = Path(sys.executable).parent


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_of_one_style(name: str) -> None:
    command = main.commands[name]
    assert isinstance(command, Command)
    assert command.epilog == EXIT_CODES
    told = here(name, "--help")
    assert told.exit_code == 0
    examples = told.stdout.split("Examples:\n", 1)[1].split("\n\n", 1)[0]
    assert re.search(rf"^    midstream {name}\b", examples, re.MULTILINE)
    assert here(name, "-h").stdout == told.stdout
    for option in ("--log-level", "--log-format", "--help"):
        assert option in told.stdout
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.opts}: says nothing of itself"


@pytest.mark.parametrize("name", COMMANDS)
def test_unknown_options_are_one_line(name: str) -> None:
    refused = here(name, "--nothing-of-this-name")
    assert refused.exit_code == BAD_INPUT
    assert refused.stderr.startswith(f"midstream {name}: ")
    assert refused.stderr.endswith(f"(see midstream {name} --help)\n")
    assert refused.stderr.count("\n") == 1


def test_the_help_of_all_names_every_command() -> None:
    told = CliRunner().invoke(main, ["--help"], prog_name="midstream").stdout
    assert set(re.findall(r"^  (\w+)  ", told.split("Commands:\n", 1)[1], re.MULTILINE)) == set(COMMANDS)


def complete(line: str) -> list[str]:
    """What bash would offer at the end of a line, as its own completion runs."""
    words = line.split(" ")
    script = (
        'eval "$(midstream completion bash)"\n'
        f"COMP_WORDS=({' '.join(repr(word) for word in words)}); COMP_CWORD={len(words) - 1}\n"
        '_midstream_completion midstream\nprintf "%s\\n" "${COMPREPLY[@]}"'
    )
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_options_and_choices() -> None:
    assert complete("midstream re") == ["replay"]
    assert complete("midstream run --num") == ["--num-samples"]
    assert complete("midstream run --isolation co") == ["container"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells(shell: str) -> None:
    told = here("completion", shell)
    assert told.exit_code == 0
    assert f"_MIDSTREAM_COMPLETE={shell}_complete" in told.stdout
    if shutil.which(shell) is not None:
        assert subprocess.run([shell, "-n"], input=told.stdout, text=True, capture_output=True).returncode == 0
    assert here("completion", "tcsh").exit_code == BAD_INPUT
