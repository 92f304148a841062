"""``midstream doctor`` tells what a pool on this machine would hold, and fails where that is too little."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner

from midstream.cli import main
from midstream.errors import IsolationError, SandboxError
from midstream.sandbox import IsolationReport, Layer, SandboxPool


def test_it_tells_what_a_pool_holds() -> None:
    told = CliRunner().invoke(main, ["doctor", "--json"])
    report = json.loads(told.output)
    if report["level"] == "weak":
        assert told.exit_code == 1
        with pytest.raises(IsolationError):
            SandboxPool(preload=[]).start()
        return
    assert told.exit_code == 0
    with SandboxPool(preload=[]) as pool:
        assert report == pool.report.as_dict()


def test_the_table_names_each_layer() -> None:
    told = CliRunner().invoke(main, ["doctor"])
    for layer in ("filesystem", "network", "processes", "signals", "namespaces"):
        assert layer in told.output


def test_a_missing_layer_is_named_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = (Layer("filesystem", False, "code read a file of the host", "nothing: this kernel has no Landlock"),)
    monkeypatch.setattr(SandboxPool, "report", property(lambda _: IsolationReport("weak", layers)))
    told = CliRunner().invoke(main, ["doctor"])
    assert told.exit_code == 1
    assert "refuse to start without filesystem" in " ".join(told.output.split())


def test_a_machine_where_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise SandboxError("sandboxes need Linux")

    monkeypatch.setattr(SandboxPool, "start", refuse)
    told = CliRunner().invoke(main, ["doctor", "--json"])
    assert told.exit_code == 1
    assert json.loads(told.output) == {"level": None, "error": "sandboxes need Linux"}
