"""Pools at every level of isolation that this machine can hold."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest

from midstream.errors import IsolationError
from midstream.sandbox import SandboxLimits, SandboxPool, Session

LEVELS = ("container", "full")
SHORT = SandboxLimits(wall_time=1.0, grace=2.0, tool_time=2.0, memory=768 << 20, output_characters=4096, threads=24)


@functools.cache
def why_not(level: str) -> str | None:
    """Why this machine cannot hold ``level``, or None where it can."""
    try:
        with SandboxPool(isolation=level, preload=[]):  # type: ignore[arg-type]
            return None
    except IsolationError as error:
        return str(error)


@pytest.fixture(scope="session", params=LEVELS)
def level(request: pytest.FixtureRequest) -> str:
    reason = why_not(request.param)
    if reason is not None:
        pytest.skip(f"this machine cannot hold the level {request.param}: {reason}")
    return str(request.param)


@pytest.fixture(scope="session")
def pool(level: str) -> Iterator[SandboxPool]:
    """The defaults."""
    with SandboxPool(isolation=level) as pool:  # type: ignore[arg-type]
        yield pool


@pytest.fixture(scope="session")
def short_pool(level: str) -> Iterator[SandboxPool]:
    """Little time, memory and output, and nothing preloaded."""
    with SandboxPool(isolation=level, limits=SHORT, preload=[]) as pool:  # type: ignore[arg-type]
        yield pool


@pytest.fixture
def session(pool: SandboxPool) -> Iterator[Session]:
    with pool.session(seed=0) as session:
        yield session


@pytest.fixture
def short(short_pool: SandboxPool) -> Iterator[Session]:
    with short_pool.session(seed=0) as session:
        yield session


@pytest.fixture
def shown(session: Session) -> Callable[[str], str]:
    """Run a block and give the text that a model is shown."""
    return lambda code: session.run(code).text
