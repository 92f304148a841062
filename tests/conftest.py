"""What tests of several rooms share."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

from midstream.sandbox import SandboxPool

with contextlib.suppress(ImportError):  # the environments for trainers and servers are without it
    from hypothesis import settings

    # The same examples in every run: tests/properties/__init__.py says why.
    settings.register_profile("midstream", derandomize="MIDSTREAM_EXAMPLES" not in os.environ, database=None)
    settings.load_profile("midstream")


@pytest.fixture(scope="session")
def sandboxes() -> Iterator[SandboxPool]:
    """One pool for all tests that need a sandbox and nothing special of it."""
    with SandboxPool(preload=[]) as pool:
        yield pool
