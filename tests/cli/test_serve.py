"""``midstream serve`` as a process: it starts, answers OpenAI's client, and ends as it is told."""

from __future__ import annotations

import json
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest
from click.testing import CliRunner

from midstream import Generator, Limits, SandboxPool, ScriptedEngine, Vocabulary
from midstream.cli import main
from midstream.records import read_records, verify
from tests.cli.conftest import command, environment
from tests.rollouts import LONG, descendants
from tests.serving import FakeServer

SAYS = {"Q1:": "Let <code>6 * 7</code> be.", "wait": "word " * 12, "stuck": "<code>while True: pass</code>"}


@pytest.fixture
def tokenizer(model_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture
def upstream(tokenizer: Any, sandboxes: SandboxPool) -> Iterator[FakeServer]:
    with Generator(ScriptedEngine(tokenizer, SAYS), markup=None, limits=Limits(100)) as generator:
        rows = list(generator.generate(["wait", "stuck"]))
    with Generator(ScriptedEngine(tokenizer, SAYS), pool=sandboxes) as generator:
        rows += generator.generate(["Q1:"])
    server = FakeServer(Vocabulary.of(tokenizer), rows, context_length=128, api_key="up")
    yield server
    server.close()


class Process:
    def __init__(self, process: subprocess.Popen[str], url: str, line: str) -> None:
        self.process, self.url, self.line = process, url, line

    def client(self, key: str = "-") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=LONG)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=LONG) as answer:
            return str(answer.read().decode())

    def end(self, *signals: signal.Signals) -> tuple[int, str]:
        for number in signals:
            self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=LONG)
        return self.process.returncode, errors


@pytest.fixture
def serve(model_folder: Path, upstream: FakeServer) -> Iterator[Callable[..., Process]]:
    with ExitStack() as stack:

        def start(*options: object) -> Process:
            arguments = ["--upstream", upstream.url, "--upstream-key-env", "UP", "--model", model_folder, "--port", 0]
            process = subprocess.Popen(
                command("serve", *map(str, [*arguments, "--temperature", 0, "--preload", "json", *options])),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**environment(), "UP": "up"},
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, process.communicate()[1]
            return Process(process, line.split(" at ")[1].split("/v1")[0], line)

        yield start


def test_it_answers_records_and_ends(serve: Callable[..., Process], tmp_path: Path, model_folder: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# who may ask\nann key-of-ann\n")
    out = tmp_path / "served.jsonl"
    served = serve("--api-keys", keys, "--out", out, "--name", "calculator")
    assert "calculator at http://127.0.0.1:" in served.line
    with served.client("key-of-ann") as client:
        answer = client.completions.create(model="calculator", prompt="Q1:", max_tokens=60)
        assert answer.choices[0].text == "Let <code>6 * 7</code><result>42</result> be."
        chunks = client.completions.create(model="calculator", prompt="Q1:", max_tokens=60, stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text
    with served.client("key-of-eve") as eve, pytest.raises(openai.AuthenticationError):
        eve.completions.create(model="calculator", prompt="Q1:")
    health = json.loads(served.get("/health"))
    assert (health["status"], health["rows"], health["unrecorded"]) == ("ok", 0, 0)
    metrics = served.get("/metrics")
    assert 'midstream_requests_total{route="/v1/completions",status="200"} 2.0' in metrics
    assert 'midstream_requests_total{route="/v1/completions",status="401"} 1.0' in metrics
    assert 'midstream_rows_finished_total{stop="end_of_sequence"} 2.0' in metrics
    below = descendants(served.process.pid)
    assert below  # the sandboxes
    code, errors = served.end(signal.SIGTERM)
    assert (code, errors) == (0, "")
    assert not any(Path(f"/proc/{process}").exists() for process in below)
    records = list(read_records(out))
    assert [verify(record) for record in records] == [[], []]
    assert {record.provenance["served_model"] for record in records} == {"calculator"}
    assert "key-of-ann" not in out.read_text()


def test_tools_from_a_file_are_told_and_called(
    serve: Callable[..., Process], upstream: FakeServer, tokenizer: Any, sandboxes: SandboxPool, tmp_path: Path
) -> None:
    (tmp_path / "tools.py").write_text('def half(n: int) -> float:\n    """Half of a number."""\n    return n / 2\n')
    told = "You can run Python code."
    (tmp_path / "told").write_text(told + "\n")
    chat = [{"role": "system", "content": told}, {"role": "user", "content": "Q"}]
    script = ScriptedEngine(tokenizer, "<code>half(3)</code>.")
    with Generator(script, pool=sandboxes, tools={"half": lambda n: n / 2}) as generator:
        upstream.rows += generator.generate([{"messages": chat}])
    served = serve("--tools", tmp_path / "tools.py", "--instructions", tmp_path / "told")
    with served.client() as client:
        answer = client.chat.completions.create(model=_only(client), messages=[{"role": "user", "content": "Q"}])
    assert answer.choices[0].message.content == "<code>half(3)</code><result>1.5</result>."
    assert served.end(signal.SIGTERM) == (0, "")


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_what_is_under_way_is_finished(
    serve: Callable[..., Process], upstream: FakeServer, stop: signal.Signals
) -> None:
    served = serve("--markup", "none")
    upstream.behaviour.pace = 0.02
    with served.client() as client:
        stream = iter(client.completions.create(model=_only(client), prompt="wait", stream=True))
        text = next(stream).choices[0].text
        served.process.send_signal(stop)
        text += "".join(chunk.choices[0].text for chunk in stream)
    assert text == SAYS["wait"]
    assert served.end() == (0, "")


def test_what_is_not_finished_in_time_is_told_so(serve: Callable[..., Process]) -> None:
    served = serve("--grace", 0.1, "--wall-time", 300)
    with served.client() as client:
        stream = iter(client.completions.create(model=_only(client), prompt="stuck", stream=True))
        assert next(stream).choices[0].text
        served.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="the server is stopping"):
            list(stream)
    code, errors = served.end()
    assert code == 0
    assert "1 requests were not done after 0.1 s" in errors


def test_a_second_signal_ends_it_at_once(serve: Callable[..., Process]) -> None:
    served = serve("--grace", 10_000, "--wall-time", 300)
    with served.client() as client:
        stream = iter(client.completions.create(model=_only(client), prompt="stuck", stream=True))
        assert next(stream).choices[0].text
        served.process.send_signal(signal.SIGTERM)
        assert not _gone(served)
        served.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="the server is stopping"):
            list(stream)
    assert served.end()[0] == 0


def _only(client: openai.OpenAI) -> str:
    (model,) = client.models.list()
    return model.id


def _gone(served: Process) -> bool:
    """Whether it is gone; waits until it is, or says that it is stopping."""
    while True:
        try:
            served.get("/health")
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 503:
                return False
        except OSError:
            return True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--upstream", "nowhere"], "--upstream: url='nowhere': must be a server's"),
        (["--upstream-key-env", "NO_SUCH"], "--upstream-key-env NO_SUCH: no such environment variable"),
        (["--host", "0.0.0.0"], "--host 0.0.0.0: others can reach it, and run code here: give --api-keys, or --open"),
        (["--api-keys", "/no/such"], "--api-keys /no/such: cannot be read"),
        (["--api-keys", "{two}"], ":2: this key is that of 'ann' already"),
        (["--api-keys", "{words}"], ":1: must hold a client's name and its key"),
        (["--api-keys", "{none}"], "holds no key"),
        (["--max-rows", "0"], "--max-rows: ServiceLimits.rows=0"),
        (["--max-sessions", "0"], "--max-sessions: max_sessions=0: must be an integer of at least 1"),
        (["--wall-time", "0"], "--wall-time: SandboxLimits.wall_time=0.0"),
        (["--out", "/no/such/out.jsonl"], "--out /no/such/out.jsonl: cannot be written (No such file or directory)"),
        (["--requests-per-minute", "-1"], "requests_per_minute=-1.0: must be over 0"),
        (["--grace", "-1"], "--grace -1: must be 0 seconds or more"),
        (["--instructions", "/no/such"], "--instructions /no/such: must be none, auto, template or a file"),
        (["--instructions", "auto", "--markup", "none"], "there is nothing to tell the model of"),
        (["--instructions", "template"], "there are no tools to tell of; give --tools"),
        (["--tools", "/no/such.py"], "--tools /no/such.py: there is no such file"),
        (["--markup", "no tag"], "markup='no tag'"),
        (["--model", "/no/such"], "--model /no/such"),
        (["--host", "203.0.113.9", "--open"], "--host, --port: host='203.0.113.9'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused(tmp_path: Path, model_folder: Path, options: list[str], message: str) -> None:
    files = {"two": "ann k1\nbob k1\n", "words": "just-a-key\n", "none": "# nobody\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    options = [option.format(**{name: tmp_path / name for name in files}) for option in options]
    arguments = ["serve", "--upstream", "http://127.0.0.1:1", "--model", str(model_folder), "--port", "0", *options]
    result = CliRunner().invoke(main, arguments, prog_name="midstream")
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "k1" not in result.stderr
    assert "Traceback" not in result.output


def test_an_upstream_that_is_not_there(model_folder: Path) -> None:
    arguments = ["serve", "--upstream", "http://127.0.0.1:1", "--model", str(model_folder), "--port", "0"]
    result = CliRunner().invoke(main, arguments, prog_name="midstream")
    assert result.exit_code == 2
    assert "http://127.0.0.1:1: ConnectError" in result.stderr
