"""What Prometheus is told: every family that there is, with the numbers of a real batch and of real sessions."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from midstream import Generator, Limits, Prompt, SandboxPool, errors
from midstream.observing import outcome_of
from midstream.telemetry import Metrics
from midstream.telemetry.metrics import METRICS
from tests.docs.samples import ROOT
from tests.rollouts import rollouts, scripted


def twice(number: int) -> int:
    return 2 * number


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CollectorRegistry())


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"midstream_{name}", labels)


def families(metrics: Metrics) -> Mapping[str, str]:
    text, _ = metrics.exposition()
    found = text_string_to_metric_families(text.decode())
    # The client says of each when it was made, as a gauge of its own.
    return {family.name: family.type for family in found if not family.name.endswith("_created")}


def test_a_batch(sandboxes: SandboxPool, metrics: Metrics) -> None:
    script = "a <code>twice(4)</code> b <code>1/0</code> c <code>twice(None)</code> d <code>2</code>"
    batch = rollouts(
        {"p": script, "q": "plain"}, sandboxes, n=2, tools=[twice], observers=[metrics],
        limits=Limits(max_tool_calls=3), reward=lambda t: 1 / 0 if t.prompt.id == "q" else 1.0,
    )  # fmt: skip
    assert value(metrics, "rows_finished_total", stop="end_of_sequence") == 4
    assert {
        stage: value(metrics, "rows", stage=stage) for stage in ("waiting", "decoding", "executing", "rewarding")
    } == {
        "waiting": 0,
        "decoding": 0,
        "executing": 0,
        "rewarding": 0,
    }
    assert value(metrics, "tokens_total", origin="prompt") == sum(len(row.prompt_ids) for row in batch)
    assert value(metrics, "tokens_total", origin="generated") == sum(sum(row.mask) for row in batch)
    injected = sum(len(s.ids) for row in batch for s in row.segments if s.origin == "injected")
    assert value(metrics, "tokens_total", origin="injected") == injected
    assert value(metrics, "discarded_tokens_total") == sum(row.discarded for row in batch)
    assert value(metrics, "row_seconds_count") == 4
    assert value(metrics, "row_blocks_sum") == 8
    assert value(metrics, "first_token_seconds_count") == 4
    assert value(metrics, "reward_errors_total") == 2
    steps = value(metrics, "step_seconds_count")
    assert steps is not None
    assert steps > 0
    outcomes = {o: value(metrics, "blocks_total", kind="code", outcome=o) for o in ("ok", "error", "declined")}
    assert outcomes == {"ok": 2, "error": 4, "declined": 2}
    assert value(metrics, "block_seconds_count", kind="code") == 6
    assert value(metrics, "blocks_running", kind="code") == 0
    assert value(metrics, "tool_calls_total", tool="twice", outcome="ok") == 2
    assert value(metrics, "tool_calls_total", tool="twice", outcome="error") == 2
    assert value(metrics, "tool_call_seconds_count", tool="twice") == 4
    assert value(metrics, "tool_calls_running", tool="twice") == 0


def test_sessions(metrics: Metrics) -> None:
    with SandboxPool(preload=[], max_sessions=2, observers=[metrics]) as pool, pool.session() as session:
        session.run("1")
        session.run("import os; os._exit(1)")
        session.run("1/0")
        assert value(metrics, "sessions_open") == 1
    assert value(metrics, "sessions_open") == 0
    assert value(metrics, "sessions_opened_total") == 1
    assert value(metrics, "sessions_waiting") == 0
    assert value(metrics, "session_wait_seconds_count") == 1
    assert value(metrics, "interpreters_started_total") == 2
    assert value(metrics, "interpreters_replaced_total") == 1
    assert value(metrics, "interpreter_start_seconds_count") == 2
    assert value(metrics, "session_blocks_total", outcome="ok") == 1
    assert value(metrics, "session_blocks_total", outcome="error") == 2
    assert value(metrics, "session_block_seconds_count") == 3


def test_what_is_exposed_is_what_is_listed(metrics: Metrics) -> None:
    exposed = families(metrics)
    assert exposed == {metric.name.removesuffix("_total"): metric.kind for metric in METRICS}
    text, kind = metrics.exposition()
    assert kind.startswith("text/plain")
    for metric in METRICS:
        assert f"# HELP {metric.name} {metric.help}\n".encode() in text


def test_generators_and_pools_share_one(metrics: Metrics) -> None:
    with SandboxPool(preload=[], observers=[metrics]) as pool:
        for _ in range(2):
            with Generator(scripted({"p": "<code>1</code>"}), pool=pool, observers=[metrics]) as generator:
                generator.generate([Prompt(text="p", id="p")])
    assert value(metrics, "rows_finished_total", stop="end_of_sequence") == 2
    assert value(metrics, "session_blocks_total", outcome="ok") == 2


def test_a_registry_has_them_once() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    with pytest.raises(errors.ConfigurationError, match="registry: holds metrics of midstream already"):
        Metrics(registry)
    assert len(families(metrics)) == len(METRICS)
    taken = CollectorRegistry()
    from prometheus_client import Counter

    other = Counter("midstream_step_seconds", "somebody else's", registry=taken)
    with pytest.raises(errors.ConfigurationError, match="registry: holds"):
        Metrics(taken)
    taken.unregister(other)
    assert list(taken.collect()) == []  # the refused ones left nothing behind


def test_output_that_was_cut_is_no_failure(sandboxes: SandboxPool) -> None:
    with sandboxes.session() as session:
        cut = session.run(f"'x' * {10 * sandboxes.limits.output_characters}")
        assert cut.breached == "output_characters"
        assert outcome_of(cut) == "ok"


def test_nothing_is_loaded_that_is_not_used() -> None:
    program = (
        "import sys, midstream, midstream.telemetry, midstream.cli\n"
        "loaded = [name for name in ('prometheus_client', 'opentelemetry') if name in sys.modules]\n"
        "assert not loaded, loaded\n"
        "sys.modules['prometheus_client'] = None\n"
        "try:\n    midstream.telemetry.Metrics()\n"
        "except midstream.errors.ConfigurationError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Metrics: needs prometheus-client: pip install 'midstream[metrics]'\n"


def test_the_table_of_the_page() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    rows = re.findall(r"^\| `(midstream_\w+)` \| (\w+) \| ([^|]*) \| ([^|]*) \|$", page, re.MULTILINE)
    listed = [(name, kind, tuple(re.findall(r"`(\w+)`", labels)), text) for name, kind, labels, text in rows]
    assert listed == [(metric.name, metric.kind, metric.labels, metric.help) for metric in METRICS]
