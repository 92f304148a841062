"""The example's modules are scripts that import one another by bare name; the tests import them the same way."""

from __future__ import annotations

import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path[:0] = [str(EXAMPLES / "learn_to_use_code"), str(EXAMPLES / "calculator")]
