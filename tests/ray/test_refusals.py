"""What cannot work on a cluster is said, and why, as soon as that is known."""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import midstream as ms
from midstream.distributed.ray import RayEngine, RayGenerator
from midstream.errors import ConfigurationError, EngineError
from tests.clusters import PATIENT
from tests.ray.tokens import bytes_tokenizer

LIGHT = {"num_cpus": 0}


def make_engine() -> ms.Engine:
    return ms.ScriptedEngine(bytes_tokenizer(), "never")


def test_what_cannot_work_is_said_before_it_starts(cluster: Any) -> None:
    with pytest.raises(ConfigurationError, match="replicas=0"):
        RayGenerator(make_engine, replicas=0)
    with pytest.raises(ConfigurationError, match="rows_per_replica=0"):
        RayGenerator(make_engine, rows_per_replica=0)
    with pytest.raises(ConfigurationError, match="make_engine='gpt'"):
        RayGenerator("gpt")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="start_timeout=0"):
        RayGenerator(make_engine, start_timeout=0)
    with pytest.raises(ConfigurationError, match="make_engine"):
        RayGenerator(make_engine, engine=make_engine())
    with pytest.raises(TypeError, match="colour"):
        RayGenerator(make_engine, resources=LIGHT, colour="red")


def test_what_cannot_be_sent_is_refused_before_anything_changes(cluster: Any) -> None:
    lock = threading.Lock()
    refused = "cannot be sent to other machines"
    with pytest.raises(ConfigurationError, match=f"make_engine=(.|\n)*{refused}"):
        RayGenerator(lambda: lock, resources=LIGHT)  # type: ignore[arg-type, return-value]
    engine = RayEngine(make_engine, resources=LIGHT)
    with pytest.raises(ConfigurationError, match=f"update=(.|\n)*{refused}"):
        engine.update_weights(lambda engine: lock, 1)
    assert engine.weight_version == 0
    engine.update_weights(lambda engine: None, 1)
    assert engine.weight_version == 1
    engine.shutdown()
    with pytest.raises(ConfigurationError, match="resources='gpu'"):
        RayGenerator(make_engine, resources="gpu")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"resources=.*'gpu': 1.*Invalid option"):
        RayGenerator(make_engine, resources={"gpu": 1})


def test_what_no_node_has_is_said(cluster: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with pytest.raises(EngineError, match=r"within 0\.5 s; each asks for .*'nothing': 1.* the cluster has .*'CPU'"):
        RayGenerator(make_engine, resources={**LIGHT, "resources": {"nothing": 1}}, start_timeout=0.5)
    assert "no node of the cluster has what a replica asks for, {'nothing': 1}" in caplog.text


def test_a_module_that_no_node_has_is_named(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "only_here.py").write_text("def make(): ...")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(EngineError, match=r"No module named 'only_here'; every node needs it.*runtime_env"):
        RayGenerator(importlib.import_module("only_here").make, resources=LIGHT)


def test_an_engine_that_cannot_be_made_says_why(cluster: Any, caplog: pytest.LogCaptureFixture) -> None:
    def make() -> ms.Engine:
        raise FileNotFoundError("no model in path/to/model")

    caplog.set_level(logging.WARNING)
    with pytest.raises(EngineError, match="no model in path/to/model"):
        RayGenerator(make, resources=LIGHT)
    assert "could not be started" in caplog.text


# --- a cluster that is left before its pools and generators are closed


LEFT = """
import logging
import ray
import midstream as ms
from midstream.distributed.ray import RayGenerator, RayPool
from tests.ray.tokens import bytes_tokenizer

def make_engine():
    return ms.ScriptedEngine(bytes_tokenizer(), {"0": "<code>1 + 1</code>"})

options = {"include_dashboard": False, "object_store_memory": 100 << 20, "log_to_driver": False}
ray.init(address="local", num_cpus=1, logging_level=logging.ERROR, **options)
pool = RayPool(preload=[], start_timeout=300).start()
generator = RayGenerator(make_engine, resources={"num_cpus": 0}, pool=pool)
assert generator.generate(["0"])[0].calls[0].result.text == "2"
session = pool.session()
session.run("x = 1")
other = pool.session()
other.run("x = 2")
ray.shutdown()
session.close()
generator.close()
try:
    other.run("x")
except ms.errors.SandboxError as error:
    print(error)
pool.close()
print("a cluster" if ray.is_initialized() else "no cluster")
"""


def test_closing_after_the_cluster_was_left_starts_no_other() -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, **PATIENT, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", LEFT]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["the cluster is gone: ray.shutdown() was called", "no cluster"]
    assert "never retrieved" not in done.stderr
