"""Every sample of docs/markups.md runs and gives what stands there."""

from __future__ import annotations

from typing import Any

from midstream import SandboxPool
from tests.docs.samples import ROOT, run_samples
from tests.vocabularies import tokenizer


def test_the_samples_run(sandboxes: SandboxPool) -> None:
    names: dict[str, Any] = {"tokenizer": tokenizer("qwen"), "sandboxes": sandboxes, "__name__": "sample"}
    kinds = run_samples(ROOT / "docs" / "markups.md", names)
    assert kinds == ["python", "python", "text", "python", "python", "text"]
