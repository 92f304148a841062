"""Imports point one way, and importing the package loads nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import midstream

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "midstream"
HEAVY = ("torch", "transformers", "ray", "vllm", "numpy")

# Each room may import from itself, and from the rooms of the layers above its own.
LAYERS = [
    {"errors", "checks", "types", "crossing", "observing"},
    {
        "tokenizer_kinds",
        "vocabulary",
        "decoding",
        "markup",
        "scanning",
        "rendering",
        "events",
        "budget",
        "turns",
        "resuming",
        "row",
        "strict_json",
        "call_text",
        "families",
    },
    {"sandbox", "tools", "engines", "records"},
    {
        *("prompting", "calling", "jobs", "leases", "delivery", "live", "control", "executing", "forking", "driving"),
        *("submitting", "deltas", "sessions", "ending"),
        *("generation", "batch", "drop_in", "verifying", "teacher_forcing", "viewer", "replaying"),
    },
    {"distributed", "telemetry", "bench"},
    {"serve"},
    {"", "cli", "demo", "integrations", "testing"},
]
TOGETHER = [LAYERS[0], LAYERS[1], LAYERS[3]]
"""Layers whose files may import one another; the rooms of the others stand side by side."""


def room_of(module: str) -> str:
    """The room that a module of the package belongs to; "" for the package itself."""
    return module.removeprefix("midstream").removeprefix(".").partition(".")[0]


def imports_of(path: Path) -> list[tuple[int, str]]:
    """Every module of the package that a file imports, in functions and for type checkers too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are written in full"
            module = node.module or ""
            if module == "midstream":  # from midstream import errors
                found += [(node.lineno, f"midstream.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, module))
    return [(line, name) for line, name in found if name == "midstream" or name.startswith("midstream.")]


def files() -> list[Path]:
    return sorted(path for path in SOURCE.rglob("*.py"))


def layer_of(room: str) -> int:
    return next(place for place, rooms in enumerate(LAYERS) if room in rooms)


def test_every_file_is_in_a_room_that_has_a_layer() -> None:
    rooms = {path.relative_to(SOURCE).parts[0].removesuffix(".py") for path in files()}
    rooms = {"" if room in ("__init__", "__main__") else room for room in rooms}
    assert rooms <= set().union(*LAYERS), "give the new room a layer here and in docs/architecture.md"
    assert len(files()) > 40


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_one_way(path: Path) -> None:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    room = "" if parts in (("__init__",), ("__main__",)) else parts[0]
    allowed = set().union(*LAYERS[: layer_of(room)]) | {room}
    for together in TOGETHER:
        if room in together:
            allowed |= together
    if room == "":
        allowed |= {"cli"}
    for line, name in imports_of(path):
        assert room_of(name) in allowed, f"{path}:{line}: {room or 'the package'} must not import {name}"


def test_the_inside_of_a_sandbox_needs_the_standard_library_alone() -> None:
    for path in (SOURCE / "sandbox" / "inside").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                root = name.partition(".")[0]
                optional = root in ("numpy", "sympy")  # preloaded where installed
                assert root in sys.stdlib_module_names or root == "midstream" or optional, f"{path}: imports {name}"


def test_importing_the_package_loads_nothing_heavy() -> None:
    program = (
        "import sys, midstream, midstream.cli\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


# --- the public names


def test_public_names_are_complete_sorted_and_there() -> None:
    for name in midstream.__all__:
        assert getattr(midstream, name) is not None
    exec("from midstream import *", namespace := {})
    assert set(midstream.__all__) <= set(namespace)
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("midstream")
        for alias in node.names
    }
    assert imported - {"errors"} <= set(midstream.__all__)
    assert len(set(midstream.__all__)) == len(midstream.__all__)
    # As ruff's RUF022 sorts: constants, then classes, then the rest.
    assert list(midstream.__all__) == sorted(midstream.__all__, key=_ruffs_order)


def _ruffs_order(name: str) -> tuple[int, str]:
    if name.isupper() and len(name) > 1:
        return 0, name
    return (1, name) if name[0].isupper() else (2, name)


def test_names_that_are_none_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        midstream.nothing  # noqa: B018


def test_the_version_is_the_projects() -> None:
    """It stands in one place, from which the project's is read."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert ROOT / project["tool"]["hatch"]["version"]["path"] == SOURCE / "__init__.py"
    assert version("midstream") == midstream.__version__
