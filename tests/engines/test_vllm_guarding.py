"""What was started for a vLLM of one's own ends with the process that started it, whatever ended that."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from midstream.engines.vllm.guarding import Guard
from tests.sandbox.leftovers import children_of, eventually, lives

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux's pidfd_open")

HOST = """
import multiprocessing, sys, time
from midstream.engines.vllm.guarding import Guard

if __name__ == "__main__":
    with Guard().over_new_children():
        context = multiprocessing.get_context("spawn")
        children = [context.Process(target=time.sleep, args=(600,)) for _ in range(2)]
        for child in children:
            child.start()
    print(*(child.pid for child in children), flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_they_end_with_a_host_that_is_killed(tmp_path: os.PathLike[str], number: signal.Signals) -> None:
    program = os.path.join(tmp_path, "host.py")
    with open(program, "w") as file:
        file.write(HOST)
    with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True) as host:
        assert host.stdout is not None
        started = set(map(int, host.stdout.readline().split()))
        assert len(started) == 2
        below = children_of(host.pid)
        assert started < below
        assert all(map(lives, below))
        host.send_signal(number)
    assert eventually(lambda: not any(map(lives, below)))


def test_it_ends_with_what_it_guards() -> None:
    guard = Guard()
    with guard.over_new_children():
        child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
        child.start()
    (watching,) = guard._watching
    assert watching.poll() is None
    child.kill()
    child.join()
    guard.close()
    guard.close()
    assert watching.returncode == 0


def test_where_nothing_was_started_there_is_none() -> None:
    guard = Guard()
    with guard.over_new_children():
        pass
    assert guard._watching == []
    guard.close()
