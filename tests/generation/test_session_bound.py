"""Rows that share fewer sessions than there are rows: they wait, none of them for ever, and end as they would alone."""

from __future__ import annotations

import pytest

from midstream import Guardrails, Limits, SandboxPool, StopKind
from tests.drop_in import ids_of, run, texts
from tests.rollouts import essence, rollouts, shown

BETWEEN = " and then some words, " * 3
SCRIPTS = {f"row {n}": f"<code>x = {n}</code>{BETWEEN}<code>x + 1</code>{BETWEEN}<code>x + 2</code>" for n in range(6)}


@pytest.mark.parametrize("most", [1, 2])
def test_rows_wait_for_those_that_are_over(most: int, sandboxes: SandboxPool) -> None:
    alone = rollouts(SCRIPTS, sandboxes)
    with SandboxPool(preload=[], max_sessions=most) as pool:
        few = rollouts(SCRIPTS, pool)
        assert pool.free_sessions == most
    assert [shown(row) for row in few] == [["", str(n + 1), str(n + 2)] for n in range(6)]
    assert [essence(row) for row in few] == [essence(row) for row in alone]


def test_waiting_counts_as_the_rows_own_time(sandboxes: SandboxPool) -> None:
    scripts = {
        "long": "<code>import time; time.sleep(3)</code> x",
        "short": "first some words " * 10 + "<code>1</code> x",
    }
    with SandboxPool(preload=[], max_sessions=1) as pool:
        rows = rollouts(scripts, pool, limits=Limits(time_limit=1.0))
        assert [row.stop.kind for row in rows] == [StopKind.TIME_LIMIT, StopKind.TIME_LIMIT]
        assert pool.free_sessions == 1
        assert pool.waiting == 0


def test_the_drop_in_takes_its_sandboxes_settings_from_the_pool() -> None:
    scripts = {
        f"row {n}": ids_of(f"<code>x = {n}</code> so <code>x</code> so <code>import os</code> so") for n in range(4)
    }
    with SandboxPool(preload=[], warm=2, max_sessions=2, guardrails=Guardrails()) as pool:
        output, _ = run(scripts, pool)
        assert pool.free_sessions == 2
    for number, text in enumerate(texts(output)):
        assert f"<result>{number}</result>" in text
        assert "Importing system and network modules is blocked" in text
