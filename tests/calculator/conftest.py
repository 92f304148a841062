"""The example's modules are scripts that import one another by bare name; the tests import them the same way."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

EXAMPLE_FOLDER = Path(__file__).resolve().parents[2] / "examples" / "calculator"
sys.path.insert(0, str(EXAMPLE_FOLDER))

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The tokenizer as its program makes it."""
    from vocabulary import train_tokenizer

    return train_tokenizer()
