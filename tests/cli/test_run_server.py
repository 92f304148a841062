"""``midstream run --server``: a model whose weights are elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from midstream import Generator, Limits, SandboxPool, ScriptedEngine, Trajectory, Vocabulary
from midstream.cli import main
from midstream.records import Record, read_records, verify
from tests.serving import FakeServer, Trouble

PROMPTS = {"Q1:": "Let <code>6 * 7</code> be.", "Q2:": "No code."}


@pytest.fixture
def tokenizer(model_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture
def expected(tokenizer: Any, sandboxes: SandboxPool) -> list[Trajectory]:
    with Generator(ScriptedEngine(tokenizer, PROMPTS), pool=sandboxes, limits=Limits(40)) as generator:
        return list(generator.generate(list(PROMPTS)))


@pytest.fixture
def serve(tokenizer: Any, expected: list[Trajectory]) -> Iterator[Callable[..., FakeServer]]:
    made = []

    def make(**behaviour: Any) -> FakeServer:
        made.append(FakeServer(Vocabulary.of(tokenizer), expected, context_length=128, **behaviour))
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.fixture
def run(tmp_path: Path, model_folder: Path) -> Callable[..., Result]:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"text": text}) + "\n" for text in PROMPTS))

    def call(*options: str) -> Result:
        arguments = ["run", "--model", model_folder, "--prompts", prompts, "--out", tmp_path / "out.jsonl"]
        arguments += ["--temperature", "0", "--max-new-tokens", "40", *options]
        return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="midstream")

    return call


def records(folder: Path) -> list[Record]:
    return sorted(read_records(folder / "out.jsonl"), key=lambda record: str(record.prompt.id))


def test_rows_come_from_the_server(
    serve: Callable[..., FakeServer],
    run: Callable[..., Result],
    tmp_path: Path,
    expected: list[Trajectory],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = serve(api_key="s3cret")
    monkeypatch.setenv("SERVER_KEY", "s3cret")
    result = run("--server", server.url, "--served-model", "small", "--api-key-env", "SERVER_KEY")
    assert result.exit_code == 0, result.output
    found = records(tmp_path)
    assert [record.trajectory.ids for record in found] == [row.ids for row in expected]
    assert [verify(record) for record in found] == [[], []]
    assert {record.provenance["engine"] for record in found} == {"ServerEngine"}
    assert "s3cret" not in (tmp_path / "out.jsonl").read_text()


def test_another_start_goes_on_where_the_server_failed(
    serve: Callable[..., FakeServer], run: Callable[..., Result], tmp_path: Path, expected: list[Trajectory]
) -> None:
    server = serve(retry_after="3600")
    server.troubles = [*[Trouble("")] * 3, Trouble(""), Trouble("503")]
    result = run("--server", server.url)
    assert result.exit_code == 1, result.output
    assert "1 rows failed" in result.stderr
    other = serve()  # elsewhere
    assert run("--server", other.url).exit_code == 0
    assert [record.trajectory.ids for record in records(tmp_path)] == [row.ids for row in expected]


def test_text_alone_is_marked(
    serve: Callable[..., FakeServer], run: Callable[..., Result], tmp_path: Path, expected: list[Trajectory]
) -> None:
    server = serve(speaks="text")
    refused = run("--server", server.url)
    assert refused.exit_code == 2
    assert "no token ids" in refused.stderr
    assert run("--server", server.url, "--text-only").exit_code == 0
    assert [record.trajectory.text for record in records(tmp_path)] == [row.text for row in expected]
    assert [record.fit_for_training for record in records(tmp_path)] == [False, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--served-model", "small"], "--served-model: is of a server; give its --server too"),
        (["--text-only"], "--text-only: is of a server"),
        (["--api-key-env", "HOME"], "--api-key-env: is of a server"),
        (["--server", "http://127.0.0.1:1", "--device", "cpu"], "--device: is the server's to choose"),
        (["--server", "http://127.0.0.1:1", "--dtype", "float32"], "--dtype: is the server's to choose"),
        (["--server", "http://127.0.0.1:1", "--api-key-env", "NO_SUCH_KEY"], "no such environment variable"),
        (["--server", "127.0.0.1:1"], "--server: url='127.0.0.1:1': must be a server's"),
        (["--server", "http://127.0.0.1:1"], "http://127.0.0.1:1: ConnectError"),
    ],
)
def test_what_does_not_go_together_is_refused(run: Callable[..., Result], options: list[str], message: str) -> None:
    result = run(*options)
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert "Traceback" not in result.output
