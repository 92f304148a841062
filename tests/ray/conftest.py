"""One cluster for all tests, which may add nodes and take theirs away again."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.clusters import PATIENT

ray = pytest.importorskip("ray", reason="Ray is not installed: make test-ray")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.slow)
        # Ray's own processes, sockets and deprecations are its affair.
        for kind in ("ResourceWarning", "DeprecationWarning", "FutureWarning"):
            item.add_marker(pytest.mark.filterwarnings(f"ignore::{kind}"))
        item.add_marker(pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"))


STORE = 100 << 20
"""Bytes of each node's object store."""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    os.environ |= PATIENT
    with tempfile.TemporaryDirectory(prefix="mr", ignore_cleanup_errors=True) as home:
        before, os.environ["HOME"] = os.environ.get("HOME", "/"), home
        head = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": STORE}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(2):
            cluster.add_node(num_cpus=2, object_store_memory=STORE)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        yield cluster
        ray.shutdown()
        cluster.shutdown()
        os.environ["HOME"] = before


def eventually(condition: Callable[[], Any], seconds: float = 300.0) -> Any:
    """What ``condition`` gives once it is true. Not a measure of time: a bound on waiting for nothing."""
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "it never came true"
        time.sleep(0.05)
    return found
