"""A real model for the command line: tiny, and taught in seconds to answer with code."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.tokenizer_files import save_tokenizer

TRANSCRIPTS = [
    f"Q{number}: <code>{number} + 1</code><result>{number + 1}</result> So it is {number + 1}.<eos>"
    for number in range(10)
]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of 64 positions' worth of memory for :data:`TRANSCRIPTS`, and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    tokenizer = save_tokenizer(folder, TRANSCRIPTS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),  # type: ignore[arg-type]
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    encoded = tokenizer(TRANSCRIPTS, padding=True, return_tensors="pt")  # type: ignore[operator]
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    labels = ids.masked_fill(mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def midstream() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command line in a process of its own."""

    def call(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(  # type: ignore[call-overload,no-any-return]
            command(*arguments), capture_output=True, text=True, check=False, env=environment(), timeout=120, **options
        )

    return call


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-c", "from midstream.cli import main; main(prog_name='midstream')", *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    package = logging.getLogger("midstream")
    before = package.handlers, package.propagate, package.level
    yield
    package.handlers, package.propagate, level = before
    package.setLevel(level)
