"""Every Python sample of README.md and docs/*.md runs and gives what stands there, or says here why it does not run."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import midstream as ms
from midstream.cli import main
from tests.docs.samples import ROOT, compiled, fences, run_samples
from tests.drop_in import EOS, ids_of
from tests.policies import ScriptedPolicy, input_batch
from tests.rollouts import VOCABULARY
from tests.serving import FakeServer
from tests.vocabularies import tokenizer

DEMO = Path(ms.__file__).parent / "demo"
TESTED = {
    "README.md",
    "command-line.md",
    "concepts.md",
    "extending.md",
    "metrics.md",
    "records.md",
    "rollouts.md",
    "sandbox.md",
    "servers.md",
    "start.md",
}
TESTED_ELSEWHERE = {
    "engines.md": "tests/test_docs_engines.py",
    "markups.md": "tests/families/test_docs.py",
    "serve.md": "tests/serve/test_docs.py",
    "tools.md": "tests/tools/test_docs.py",
}
NOT_RUN = {
    "ray.md": "needs a Ray cluster; tests/ray does the same on one",
    "trainers.md": "needs each trainer, in an environment of its own; tests/trl, tests/verl and so on do the same",
}


def page(name: str) -> Path:
    return ROOT / name if name == "README.md" else ROOT / "docs" / name


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where samples are run. ``path/to/model`` is the demo's model, and ``python`` is this one."""
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "model").symlink_to(DEMO)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


@pytest.fixture
def scripted() -> ms.ScriptedEngine:
    from transformers import AutoTokenizer

    return ms.ScriptedEngine(AutoTokenizer.from_pretrained(DEMO), "<code>1 + 1</code> is it.")


@pytest.fixture
def server() -> Iterator[FakeServer]:
    from transformers import AutoTokenizer

    serving = FakeServer(ms.Vocabulary.of(AutoTokenizer.from_pretrained(DEMO)), context_length=64, api_key=None)
    yield serving
    serving.close()


def test_every_page_with_samples_is_accounted_for() -> None:
    pages = [page("README.md"), *(ROOT / "docs").glob("*.md")]
    with_samples = {each.name for each in pages if any(kind == "python" for kind, _ in fences(each))}
    assert with_samples == TESTED | TESTED_ELSEWHERE.keys() | NOT_RUN.keys()
    for name, test in TESTED_ELSEWHERE.items():
        assert name in (ROOT / test).read_text()


@pytest.mark.parametrize("name", NOT_RUN)
def test_what_is_not_run_is_python(name: str) -> None:
    for kind, text in fences(page(name)):
        if kind == "python":
            compiled(text, page(name))


def test_readme(folder: Path) -> None:
    (folder / "documents.jsonl").write_text('{"text": "Paris is in France."}\n{"text": "Rome is in Italy."}\n')
    shutil.copy(ROOT / "tests" / "tools" / "mcp_server.py", folder / "server.py")
    said = "<code>retrieve('x')</code> so"
    names: dict[str, Any] = {
        "__name__": "sample",
        "policy": ScriptedPolicy(tokenizer(VOCABULARY), {"only": [*ids_of(said), EOS]}),
        "input_batch": input_batch(dict, [ids_of("Q only")], pad_id=EOS, name=["only"]),
        "tokenizer": tokenizer(VOCABULARY),
        "search_index": lambda query: [f"found {query}"],
    }
    try:
        run_samples(page("README.md"), names)
    finally:
        for tool in names.get("tools", ())[1:]:
            tool.stop()
    assert {"token_mask", "truncated"} <= names["out"].keys()
    assert int(names["out"]["token_mask"].sum()) == len(ids_of(said)) + 1
    assert len(names["batch"]) == 8
    assert (folder / "rollouts.jsonl").exists()


def test_start(folder: Path) -> None:
    kinds = run_samples(page("start.md"), {"__name__": "sample"})
    assert kinds == ["python", "text", "python", "text", "sh", "sh"]
    commands = "".join(text for kind, text in fences(page("start.md")) if kind == "sh")
    ran = subprocess.run(
        ["bash", "-euc", commands], capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"}
    )
    assert ran.returncode == 0, ran.stderr
    assert "2 trajectories, all sound" in ran.stdout
    assert "logprobs compared with the model" in ran.stdout
    assert "2 blocks of 2 trajectories: all as recorded" in ran.stdout
    assert (folder / "rollouts.html").stat().st_size > 10_000


def test_concepts(folder: Path) -> None:
    assert run_samples(page("concepts.md"), {"__name__": "sample"}) == ["python", "text"]


def test_command_line(folder: Path) -> None:
    (example,) = [text for kind, text in fences(page("command-line.md")) if kind == "python"]
    (folder / "tools.py").write_text(example)
    told = CliRunner().invoke(main, ["tools", "tools.py"])
    assert told.exit_code == 0, told.output
    assert "retrieve(query: str) -> list[str]" in told.stdout


def test_metrics(folder: Path) -> None:
    from prometheus_client import REGISTRY
    from transformers import AutoTokenizer

    engine = ms.ScriptedEngine(AutoTokenizer.from_pretrained(DEMO), "<code>2 + 3</code> is it.")
    names: dict[str, Any] = {"__name__": "sample", "engine": engine}
    before, handlers = set(REGISTRY._collector_to_names), logging.getLogger("midstream").handlers[:]
    try:
        kinds = run_samples(page("metrics.md"), names)
        assert kinds == ["python", "text", "python", "text", "python", "python"]
    finally:
        logging.getLogger("midstream").handlers = handlers
        for collector in set(REGISTRY._collector_to_names) - before:
            REGISTRY.unregister(collector)


def test_extending(folder: Path) -> None:
    from transformers import AutoTokenizer

    names = {"__name__": "sample", "tokenizer": AutoTokenizer.from_pretrained(DEMO)}
    assert run_samples(page("extending.md"), names) == ["python", "text", "python"]


def test_records(folder: Path, scripted: ms.ScriptedEngine, sandboxes: ms.SandboxPool) -> None:
    with ms.Generator(scripted, pool=sandboxes) as generator:
        generator.generate(["Question?"], n=2).save("rollouts.jsonl")
    names: dict[str, Any] = {"__name__": "sample"}
    run_samples(page("records.md"), names)
    assert names["trajectory"].sample in (0, 1)


def test_rollouts(folder: Path, scripted: ms.ScriptedEngine, sandboxes: ms.SandboxPool) -> None:
    trained: list[ms.Trajectory] = []
    loaded: list[int] = []
    names: dict[str, Any] = {
        "__name__": "sample",
        "ms": ms,
        "engine": scripted,
        "pool": sandboxes,
        "prompts": [f"Question {number}?" for number in range(26)],
        "more_prompts": [f"One more, {number}?" for number in range(200)],
        "train": trained.extend,
        "load": lambda: loaded.append(1),
    }
    run_samples(page("rollouts.md"), names)
    names["pool"].close()
    assert [row.prompt.text for row in names["rows"]] == ["Question 1?", "Question 2?"]
    assert len(trained) + len(names["batch"].unfinished) == 26 * 8
    assert len(trained) >= 200
    assert loaded == [1]


def test_sandbox(folder: Path) -> None:
    with ms.SandboxPool(forkable=True, preload=[]) as pool, pool.session() as session:
        session.run("load = lambda: [1, 2]")
        names: dict[str, Any] = {
            "__name__": "sample",
            "SandboxPool": ms.SandboxPool,
            "Guardrails": ms.Guardrails,
            "MyRemotePool": ms.SandboxPool,
        }
        # The samples about feeding begin with a session that there is.
        given = {"session.feed": "fed.feed", "session.commit": "fed.commit"}
        run_samples(page("sandbox.md"), {**names, "fed": session}, given)
        assert session.run("total").text == "3"


def test_servers(folder: Path, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    names: dict[str, Any] = {"__name__": "sample", "prompts": ["Question?"], "os": os}
    try:
        run_samples(
            page("servers.md"),
            names,
            {"http://localhost:8000": server.url, "https://models.example.org": server.url},
        )
    finally:
        names["engine"].shutdown()
    assert len(names["batch"]) == 8
    assert all(row.total_length <= 64 for row in names["batch"])
    assert any(headers.get("x-team") == "blue" for headers in server.headers)
