"""Rows are exact where vLLM's cache holds fewer of them than are open, and those that wait lose their place in it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from small_models import check_exact, play

from tests.vllm.conftest import MODEL, VLLM_OPTIONS
from tests.vllm.test_exactness import TOLERANCE, script

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` installs it apart")

BLOCKS = 17
"""Of 32 ids each: vLLM wants as many as the longest row takes, and one of them is never used."""


@pytest.fixture(params=["resubmission", "streaming", "forced"])
def engine(request: pytest.FixtureRequest) -> Iterator[Any]:
    from midstream.engines.vllm import VLLMEngine

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's own
        engine = VLLMEngine.from_pretrained(
            str(MODEL), mode=request.param, num_gpu_blocks_override=BLOCKS, **VLLM_OPTIONS
        )
    yield engine
    engine.shutdown()


def test_rows_whose_cache_others_take_while_they_wait_are_exact(engine: Any, model: Any) -> None:
    scripts = []
    for number in range(10):
        plain = script(number, opened_at=2 * number % 7)
        scripts.append(replace(plain, events=tuple(replace(event, wait=12) for event in plain.events)))
    rows = play(engine, scripts)
    assert sum(math.ceil(len(row.ids) / VLLM_OPTIONS["block_size"]) for row in rows) > 2 * (BLOCKS - 1)
    for row in rows:
        assert row.error is None
        assert check_exact(model, row, TOLERANCE) >= 27
