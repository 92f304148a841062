"""The files of a release, and what they do where nothing else is installed: with no extra, and with each."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

pytest.importorskip("build.env", reason="the packages that build a release are not installed: make test-release")

import midstream as ms
from tests.release.conftest import ROOT, Built, Environment, environment

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

LIGHT = {
    "sandbox": """
with ms.SandboxPool() as pool, pool.session() as session:
    told = session.run("import numpy, sympy; int(numpy.arange(5).sum()), sympy.sqrt(8)").text
assert told == "(10, 2*sqrt(2))", told
""",
    "server": """
from midstream.engines.server import ServerEngine
assert ms.ServerEngine is ServerEngine
""",
    "mcp": """
from mcp.server.mcpserver import MCPServer
from midstream.tools import from_mcp
server = MCPServer("shop")
@server.tool()
def price(pieces: int) -> int:
    return 3 * pieces
with from_mcp(server) as tools:
    assert len(tools) == 1
""",
    "retrieval": """
from midstream.tools import Retriever
assert Retriever(["one apple", "two pears"], num_results=1)("pears") == ["two pears"]
""",
    "export": """
from midstream.cli import main
main(["export", "rollouts.jsonl"], standalone_mode=False)
from pyarrow import parquet
assert parquet.read_table("rollouts.parquet").num_rows == 2
""",
    "serve": """
from starlette.applications import Starlette
from midstream.serve import application
import transformers, uvicorn
""",
    "metrics": """
from midstream.telemetry import Metrics
assert b"midstream_" in Metrics().exposition()[0]
""",
    "telemetry": """
from midstream.telemetry import Spans
Spans()
""",
}
"""A program for each extra that is installed here. A new extra has its own here, or stands among the heavy ones."""

HEAVY = {"hf", "vllm", "ray", "trl", "verl", "verifiers", "inspect"}
"""Gigabytes, which other targets install and use: here it is only asked whether they can be resolved (RESOLVE=1)."""


def metadata(built: Built) -> Message:
    with zipfile.ZipFile(built.wheel) as wheel:
        (name,) = (each for each in wheel.namelist() if each.endswith(".dist-info/METADATA"))
        return message_from_bytes(wheel.read(name))


def files_of_the_package() -> Iterator[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "src"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    yield from (name.removeprefix("src/") for name in listed.stdout.splitlines() if (ROOT / name).exists())


def test_the_wheel_holds_the_package_and_nothing_else(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        others = {name.rpartition("/")[2] for name in wheel.namelist() if ".dist-info/" in name}
    assert names == set(files_of_the_package())
    assert {"midstream/py.typed", "midstream/demo/model.safetensors", "midstream/viewer/assets/main.js"} <= names
    assert others == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "LICENSE"}


def test_the_wheel_says_what_it_is(built: Built) -> None:
    told = metadata(built)
    assert (told["Name"], told["Version"]) == ("midstream", ms.__version__)
    assert set(told.get_all("Provides-Extra") or ()) == PROJECT["optional-dependencies"].keys()
    assert "none-any" in built.wheel.name


def test_every_extra_is_tried() -> None:
    assert LIGHT.keys() | HEAVY | {"dev"} == PROJECT["optional-dependencies"].keys()


def test_the_changelog_is_in_order() -> None:
    """Unreleased first, then versions downwards, each with its date; the package's is released or yet to be."""
    titles = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert titles[0] == "Unreleased"
    found = [re.fullmatch(r"(\d+)\.(\d+)\.(\d+) - (\d{4}-\d{2}-\d{2})", title) for title in titles[1:]]
    assert all(found), titles
    versions = [tuple(map(int, each.groups()[:3])) for each in found if each]
    assert versions == sorted(set(versions), reverse=True)
    present = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)\S*", ms.__version__)
    assert present is not None
    assert not versions or tuple(map(int, present.groups())) >= versions[0]


def test_the_sources_hold_what_making_and_testing_take(built: Built) -> None:
    with tarfile.open(built.sdist) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {
        "Makefile",
        "pyproject.toml",
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "LICENSE",
        "mkdocs.yml",
    } <= names
    assert {path.name for path in ROOT.glob("constraints*.txt")} <= names
    assert {"tests/conftest.py", "docs/index.md", "examples/calculator/demo.py", "benchmarks/__main__.py"} <= names
    assert not {name for name in names if "__pycache__" in name or name.startswith((".venv", "build/"))}


# --- with no extra


def test_nothing_more_is_needed(bare: Environment, rollouts: Path) -> None:
    assert "2 trajectories, all sound" in bare.run("midstream", "check", "rollouts.jsonl")
    assert "4 blocks of 2 trajectories: all as recorded" in bare.run("midstream", "replay", "rollouts.jsonl")
    assert "reward" in bare.run("midstream", "stats", "rollouts.jsonl")
    bare.run("midstream", "view", "rollouts.jsonl", "-o", "rollouts.html")
    assert "isolation" in bare.run("midstream", "doctor").lower()
    assert ms.__version__ in bare.run("midstream", "--version")


def test_every_command_has_its_help(bare: Environment) -> None:
    commands = re.findall(r"^  (\w+)  ", bare.run("midstream", "--help").split("Commands:")[1], re.MULTILINE)
    assert {"run", "check", "view", "stats", "replay", "export", "doctor"} <= set(commands)
    for command in commands:
        assert "Usage:" in bare.run("midstream", command, "--help")


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (["run", "--model", ".", "--prompts", "prompts.jsonl", "--out", "out.jsonl"], "hf"),
        (["export", "rollouts.jsonl"], "export"),
    ],
)
def test_what_an_extra_is_missing_for_says_which(
    bare: Environment, rollouts: Path, command: list[str], extra: str
) -> None:
    (bare.work / "prompts.jsonl").write_text('{"text": "Hi"}\n')
    said = bare.run("midstream", *command, code=2)
    assert f"midstream[{extra}]" in said
    assert "Traceback" not in said


def test_public_names_that_an_extra_is_missing_for(bare: Environment) -> None:
    """Each is there, or is refused by the name of what is missing."""
    bare.run(
        "python",
        "-c",
        "import midstream as ms\n"
        "for name in ms.__all__:\n"
        "    try:\n"
        "        getattr(ms, name)\n"
        "    except ImportError as error:\n"
        "        assert name in ('HuggingFaceEngine', 'VLLMEngine', 'ServerEngine'), (name, error)\n",
    )


# --- with each extra


@pytest.mark.skipif("RESOLVE" not in os.environ, reason="takes minutes and gigabytes: make test-release RESOLVE=1")
@pytest.mark.parametrize("extra", sorted(HEAVY))
def test_an_extra_can_be_resolved(extra: str, built: Built, tmp_path: Path) -> None:
    made = environment(tmp_path / "venv")
    made.install("--dry-run", f"midstream[{extra}] @ {built.wheel.as_uri()}", constrained=False)


@pytest.mark.parametrize("extra", LIGHT)
def test_an_extra_brings_what_it_is_for(extra: str, built: Built, rollouts: Path, tmp_path: Path) -> None:
    made = environment(tmp_path / "venv")
    made.install(f"midstream[{extra}] @ {built.wheel.as_uri()}")
    shutil.copy(rollouts, made.work)
    made.run("python", "-c", f"import midstream as ms\n{LIGHT[extra]}")
