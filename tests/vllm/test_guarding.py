"""A vLLM that an engine has started for itself leaves nothing behind, not even where the process is killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.sandbox.leftovers import children_of, eventually, lives
from tests.vllm.conftest import MODEL, VLLM_OPTIONS

HOST = f"""
import time
from midstream.engines.vllm import VLLMEngine

if __name__ == "__main__":
    engine = VLLMEngine.from_pretrained({str(MODEL)!r}, mode="streaming", **{VLLM_OPTIONS!r})
    print("started", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_vllm_ends_with_a_host_that_is_killed(tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` installs it apart")
    program = tmp_path / "host.py"
    program.write_text(HOST)
    with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True) as host:
        assert host.stdout is not None
        assert any(line == "started\n" for line in host.stdout)
        below = {process for process in children_of(host.pid) if lives(process)}
        assert len(below) > 2  # its core, that one's worker, and the guard
        host.kill()
    assert eventually(lambda: not any(map(lives, below)))
