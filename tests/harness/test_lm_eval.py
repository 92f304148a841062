"""lm_eval as it is, through ``midstream serve``: answers are the rows, and scores those of the server behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm_eval is not installed: make test-harness")

import lm_eval
import uvicorn
from lm_eval.tasks import TaskManager

import midstream as ms
from midstream.serve.running import address_of, bound_socket
from tests.docs.samples import ROOT, fences
from tests.harness.tasks import PROBLEMS, write_tasks
from tests.harness.upstream import NAME, Upstream
from tests.rollouts import LONG

DEMO = Path(ms.__file__).parent / "demo"
CONTEXT = 512
JOINED = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tasks, and the model's folder with a chat template, at ``path/to/model``."""
    folder = tmp_path_factory.mktemp("harness")
    write_tasks(folder)
    model = folder / "path" / "to" / "model"
    model.mkdir(parents=True)
    for file in DEMO.iterdir():
        (model / file.name).symlink_to(file)
    (model / "chat_template.jinja").write_text(JOINED)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> str:
    return str(folder / "path" / "to" / "model")


@contextmanager
def listening(app: Any) -> Iterator[str]:
    socket = bound_socket("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", ws="none", http="h11"))
    thread = threading.Thread(target=server.run, args=([socket],))
    thread.start()
    try:
        yield address_of(socket)
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def behind(model: str) -> Upstream:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    weights = AutoModelForCausalLM.from_pretrained(model).eval()
    return Upstream(weights, AutoTokenizer.from_pretrained(model), CONTEXT)


@pytest.fixture(scope="module")
def upstream(behind: Upstream) -> Iterator[str]:
    with listening(behind.app) as address:
        yield address


@pytest.fixture(scope="module")
def served(upstream: str, model: str) -> Iterator[str]:
    """The address of the command itself, a process of its own."""
    command = [sys.executable, "-c", "from midstream.cli import main; main(prog_name='midstream')", "serve"]
    options = ["--upstream", upstream, "--model", model, "--name", NAME, "--port", "0", "--preload", "json"]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split(" at ")[1].split("/v1")[0]
        process.send_signal(signal.SIGTERM)
        assert process.wait(LONG) == 0


@pytest.fixture(scope="module")
def said(model: str, folder: Path, sandboxes: Any) -> list[str]:
    """What the rows of transformers say to the problems."""
    problems = json.loads((folder / "problems.json").read_text())
    engine = ms.HuggingFaceEngine.from_pretrained(model)
    greedy = ms.Sampling(temperature=0)
    with ms.Generator(engine, limits=ms.Limits(256), sampling=greedy, pool=sandboxes) as generator:
        rows = list(generator.generate([f"Q: {problem['question']}\nA:" for problem in problems]))
    assert all(row.stop.finished and row.calls for row in rows)
    return [row.text.removesuffix(engine.tokenizer.eos_token) for row in rows]


def evaluated(
    folder: Path, url: str, task: str, *, model: str = "local-completions", batch: int = 1, **options: Any
) -> tuple[float, list[Any]]:
    """The task's metric, and what was answered to each of its problems, in their order."""
    chat = model == "local-chat-completions"
    generation = options.pop("gen_kwargs", None)
    arguments = {"model": NAME, "base_url": f"{url}/v1/{'chat/' if chat else ''}completions", **options}
    found = lm_eval.simple_evaluate(
        model=model,
        model_args={**arguments, "max_retries": 1, "max_length": CONTEXT},
        tasks=[task],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=batch,
        apply_chat_template=chat,
        gen_kwargs=generation,
        bootstrap_iters=0,
    )
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    assert len(samples) == PROBLEMS
    metrics = {name: value for name, value in found["results"][task].items() if isinstance(value, float | int)}
    wanted = ("exact_match,", "acc,", "word_perplexity,")
    (metric,) = [value for name, value in metrics.items() if name.startswith(wanted)]
    return metric, [sample["resps"] for sample in samples]


WAYS: dict[str, dict[str, Any]] = {
    "batches of ids": {"tokenizer": "MODEL", "batch": 4},
    "many ids at a time": {"tokenizer": "MODEL", "num_concurrent": 8},
    "batches of texts": {"tokenizer": "MODEL", "tokenized_requests": False, "batch": 4},
    "texts without a tokenizer": {"tokenizer_backend": "none", "num_concurrent": 8},
    "chats": {"model": "local-chat-completions", "num_concurrent": 8},
}


@pytest.mark.parametrize("way", WAYS)
def test_answers_are_the_rows(folder: Path, served: str, model: str, said: list[str], way: str) -> None:
    options = {name: model if value == "MODEL" else value for name, value in WAYS[way].items()}
    accuracy, answers = evaluated(folder, served, "calculator", **options)
    assert answers == [[[text]] for text in said]
    assert accuracy > 0.9


def test_without_code_the_answers_are_wrong(folder: Path, upstream: str, model: str) -> None:
    """What midstream does: the same model, task and client, at the server behind."""
    accuracy, answers = evaluated(folder, upstream, "calculator", tokenizer=model, batch=4)
    assert accuracy < 0.2
    assert all("<code>" in answer[0][0] for answer in answers)


def test_stops_and_seeds(folder: Path, served: str, model: str, said: list[str]) -> None:
    _, stopped = evaluated(folder, served, "calculator", tokenizer=model, gen_kwargs={"until": ["</code>"]})
    assert stopped == [[[text.partition("</code>")[0]]] for text in said]
    sampling = {"until": [], "do_sample": True, "temperature": 2.0, "max_gen_toks": 40}
    draws = [
        evaluated(folder, served, "calculator", tokenizer=model, gen_kwargs=dict(sampling), seed=seed)[1]
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("task", ["choice", "perplexity"])
@pytest.mark.parametrize(
    "options", [{"batch": 4}, {"num_concurrent": 8}, {"tokenized_requests": False, "num_concurrent": 8}], ids=str
)
def test_scores_are_those_of_the_server_behind(
    folder: Path, upstream: str, served: str, model: str, task: str, options: dict[str, Any]
) -> None:
    through = evaluated(folder, served, task, tokenizer=model, **options)
    assert through == evaluated(folder, upstream, task, tokenizer=model, **options)
    if task == "choice":
        assert through[0] > 0.8


def test_the_lines_of_the_page(folder: Path, served: str) -> None:
    (command,) = (text for kind, text in fences(ROOT / "docs" / "serve.md") if kind == "sh")
    command = command.replace("http://localhost:8080", served)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ran = subprocess.run(
        ["bash", "-euc", command], capture_output=True, text=True, cwd=folder, env={**os.environ, "PATH": path}
    )
    assert ran.returncode == 0, ran.stderr
    (line,) = [line for line in ran.stdout.splitlines() if "exact_match" in line]
    assert line.replace(" ", "").startswith("|calculator|Yaml|answer|0|exact_match|")
    assert float(line.split("|")[7]) > 0.9
