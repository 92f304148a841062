"""What the machine itself takes: a C program, compiled where there is a compiler."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).with_name("bare.c")


class Bare:
    """The compiled program; without one, nothing can be measured by it."""

    def __init__(self, program: Path | None) -> None:
        self._program = program

    def microseconds(self, *words: object) -> list[float] | None:
        """One run, a number for each repetition; None where it cannot be done here."""
        if self._program is None:
            return None
        done = subprocess.run([self._program, *map(str, words)], capture_output=True, text=True, check=False)
        return [float(line) for line in done.stdout.split()] if done.returncode == 0 else None


@contextlib.contextmanager
def compiled() -> Iterator[Bare]:
    """Compile it, for as long as this is open."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        yield Bare(None)
        return
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "bare"
        subprocess.run([compiler, "-O2", "-o", program, SOURCE], check=True)
        yield Bare(program)
