"""NeMo-RL's environments as actors: what they keep, what they leave behind, and their sandboxes on every node."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ray

from midstream.integrations import nemo_rl as ours
from tests.ray.conftest import eventually

CONFIG = {"num_workers": 2, "terminate_on_evaluation": False, "sandbox": {"preload": []}}


def processes_below(number: int) -> set[int]:
    """The processes that one has started, and those that they have."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, new = set(), {number}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return found


def alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_an_actor_that_is_killed_leaves_no_process_and_another_goes_on(cluster: Any) -> None:
    first = ours.CodeEnvironmentActor.remote(CONFIG)
    log = [{"role": "assistant", "content": "<code>x = 40</code>"}]
    known = ray.get(first.step.remote([log], [None])).metadata[0]
    process = ray.get(first.__ray_call__.remote(lambda _self: os.getpid()))
    below = processes_below(process)
    assert below
    ray.kill(first)
    second = ours.CodeEnvironmentActor.remote(CONFIG)
    log = [{"role": "assistant", "content": "<code>x + 2</code>"}]
    returned = ray.get(second.step.remote([log], [known]))
    assert returned.observations[0]["content"] == "<result>42</result>"
    ray.kill(second)
    eventually(lambda: not any(map(alive, below)))


def test_sandboxes_on_every_node(cluster: Any) -> None:
    actor = ours.CodeEnvironmentActor.remote({**CONFIG, "every_node": True})
    known = None
    for text, said in (("x = 40", ""), ("x + 2", "<result>42</result>"), ("import os", "PermissionError")):
        log = [{"role": "assistant", "content": f"<code>{text}</code>"}]
        returned = ray.get(actor.step.remote([log], [known]))
        known = returned.metadata[0]
        assert said in returned.observations[0]["content"]
    ray.get(actor.shutdown.remote())
    ray.kill(actor)
