"""The help of each command as docs/command-line.md has it: ``python -m tests.docs.command_line`` puts it there."""

from __future__ import annotations

import re

from click.testing import CliRunner

from midstream.cli import main
from tests.docs.samples import ROOT

PAGE = ROOT / "docs" / "command-line.md"
SECTION = re.compile(r"(^## midstream (\w+)\n.*?^```text\n)(.*?)(^```$)", re.DOTALL | re.MULTILINE)
WIDTH = 100


def help_of(name: str) -> str:
    """What ``--help`` says, without what all commands share."""
    told = CliRunner().invoke(
        main, [name, "--help"], prog_name="midstream", terminal_width=WIDTH, max_content_width=WIDTH
    )
    lines = [line.rstrip() for line in told.stdout.split("\n  Exit codes:\n", 1)[0].splitlines()]
    return "\n".join(lines).strip() + "\n"


def filled(page: str) -> str:
    """The page with the help of each command in its section."""
    return SECTION.sub(lambda found: f"{found[1]}{help_of(found[2])}{found[4]}", page)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
