"""Every way over vLLM passes the public suite: inside this process, and over its server."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from midstream import ServerEngine
from midstream.engines.vllm import VLLMEngine
from midstream.sandbox import SandboxPool
from midstream.testing import Steering, check_engine, write_steered_model
from tests.vllm.conftest import VLLM_OPTIONS
from tests.vllm.served import served

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` installs it apart")

CHECKS = 24
ROWS = 64


@pytest.mark.parametrize("mode", ["resubmission", "forced", "streaming"])
def test_each_way_passes(mode: Any, sandboxes: SandboxPool) -> None:
    def make(steering: Steering) -> VLLMEngine:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # vLLM's own
            return VLLMEngine.from_pretrained(
                str(steering.folder), mode=mode, **(VLLM_OPTIONS | {"max_num_seqs": ROWS})
            )

    assert len(check_engine(make, pool=sandboxes)) == CHECKS


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a vLLM server over the steered model."""
    folder = tmp_path_factory.mktemp("served")
    model = write_steered_model(folder / "steered")
    # Prompts in one piece: vLLM dies on the CPU where a row with a seed has its prompt cut in two.
    with served(model, folder, max_model_len=512, max_num_seqs=ROWS, max_num_batched_tokens=ROWS * 512) as address:
        yield address


@pytest.mark.parametrize("route", ["vllm-completions", "vllm-generate"])
def test_a_server_passes(server: str, sandboxes: SandboxPool, route: Any) -> None:
    from transformers import AutoTokenizer

    def make(steering: Steering) -> ServerEngine:
        return ServerEngine(server, AutoTokenizer.from_pretrained(steering.folder), route=route)

    assert len(check_engine(make, pool=sandboxes)) == CHECKS
