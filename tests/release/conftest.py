"""The package as it is released: built once, installed into environments that hold nothing else."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Built:
    """The two files of a release."""

    wheel: Path
    sdist: Path


@dataclass(frozen=True)
class Environment:
    """A virtual environment. Programs run in an empty folder, where nothing of the checkout can be found."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def work(self) -> Path:
        """Where its programs run."""
        folder = self.folder / "work"
        folder.mkdir(exist_ok=True)
        return folder

    def install(self, *requirements: str, constrained: bool = True) -> None:
        """In the versions that the other tests are run with, unless not ``constrained``."""
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(self.python),
            "--disable-pip-version-check",
            "install",
            "--no-compile",
        ]
        constraints = ["--constraint", str(ROOT / "constraints.txt")] if constrained else []
        done = subprocess.run([*pip, "--quiet", *constraints, *requirements], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def run(self, *command: str, code: int = 0) -> str:
        """What a command of the environment prints; it must end with ``code``."""
        program = [str(self.folder / "bin" / command[0]), *command[1:]]
        done = subprocess.run(program, cwd=self.work, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
        assert done.returncode == code, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Built as for a release: the wheel is made from the source distribution, not from the checkout."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return Built(wheel, sdist)


def environment(folder: Path) -> Environment:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    return Environment(folder)


@pytest.fixture(scope="session")
def bare(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The package with no extra."""
    made = environment(tmp_path_factory.mktemp("bare"))
    made.install(str(built.wheel))
    return made


@pytest.fixture(scope="session")
def rollouts(bare: Environment) -> Path:
    """Rollouts that the package made with no extra."""
    bare.run("python", "-W", "error", str(Path(__file__).with_name("core.py")))
    return bare.work / "rollouts.jsonl"
