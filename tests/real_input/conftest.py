"""Data sets that lie outside the repository: where one is missing, its tests are skipped and say so."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import midstream as ms
from benchmarks import transcripts
from benchmarks.data import DataMissing
from benchmarks.transcripts import Transcript


@pytest.fixture(scope="session")
def recorded() -> list[Transcript]:
    """All transcripts, in their order."""
    try:
        return transcripts.load()
    except DataMissing as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def pool() -> Iterator[ms.SandboxPool]:
    with ms.SandboxPool(limits=transcripts.LIMITS) as pool:
        yield pool
