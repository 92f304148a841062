"""A service over HTTP, in a thread of its own, whose model is a server that says what it is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest

from midstream import (
    Generator,
    Limits,
    Prompt,
    Sampling,
    SandboxPool,
    ScriptedEngine,
    ServerEngine,
    Trajectory,
    Vocabulary,
)
from midstream.records import RecordWriter
from midstream.serve import ApiKeys, ServiceLimits
from tests.rollouts import LONG
from tests.serve.served import Served
from tests.serving import FakeServer
from tests.tokenizer_files import save_tokenizer

GREEDY = Sampling(temperature=0)
TEXTS = ["Let <code>6 * 7</code><result>42</result> be.", "No code."]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, TEXTS)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder)


Says = Mapping[str, str] | Sequence[tuple[Any, str]]
Serve = Callable[..., Served]


@pytest.fixture
def serve(tokenizer: Any, sandboxes: SandboxPool) -> Iterator[Serve]:
    """``serve({prompt: reply, ...}, ...)``: options of the service, and ``upstream``, those of the server behind."""
    with ExitStack() as stack:

        def make(
            says: Says = (),
            *,
            tools: Any = (),
            upstream: Mapping[str, Any] | None = None,
            limits: Limits | None = None,
            bounds: ServiceLimits | None = None,
            pool: SandboxPool = sandboxes,
            record: Path | None = None,
            engine: Mapping[str, Any] | None = None,
            **options: Any,
        ) -> Served:
            rows = expected(tokenizer, says, pool, tools)
            behind = FakeServer(Vocabulary.of(tokenizer), rows, **(upstream or {}))
            stack.callback(behind.close)
            over = ServerEngine(behind.url, tokenizer, **(engine or {}))
            stack.callback(over.shutdown)
            bounds = bounds or ServiceLimits()
            generator = Generator(
                over,
                pool=pool,
                tools=tools,
                limits=limits or Limits(max_new_tokens=400),
                sampling=GREEDY,
                max_open_rows=bounds.rows,
                hold_sessions=LONG,
            )
            stack.callback(generator.close)
            if record is not None:
                options["record"] = stack.enter_context(RecordWriter(record))
            served = Served(generator, behind, limits=bounds, **options)
            stack.callback(served.close)
            return served

        yield make


def expected(tokenizer: Any, says: Says, pool: SandboxPool, tools: Any = ()) -> list[Trajectory]:
    """The rows of prompts (texts, or chats) that say their replies and have what they ran."""
    rows = []
    for asked, reply in says.items() if isinstance(says, Mapping) else says:
        prompt = Prompt(text=asked) if isinstance(asked, str) else Prompt(messages=asked)
        with Generator(ScriptedEngine(tokenizer, reply), pool=pool, tools=tools) as generator:
            rows += generator.generate([prompt])
    return rows


Connect = Callable[..., openai.OpenAI]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """``connect(served)``: the real client of OpenAI's. ``key``: its API key."""
    with ExitStack() as stack:

        def make(served: Served, key: str = "none", **options: Any) -> openai.OpenAI:
            options = {"max_retries": 0, "timeout": LONG, **options}
            return stack.enter_context(openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, **options))

        yield make


def keys_of(*names: str) -> ApiKeys:
    return ApiKeys({f"key of {name}": name for name in names})
