"""A vLLM that was started here ends with this process, also where that is killed: vLLM does not see to that.

Its core, a process of its own, would wait for requests for ever, and keep the memory of its device.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from multiprocessing.process import BaseProcess

_PROGRAM = """
import os, select, signal, sys
host, *guarded = map(int, sys.argv[1:])
poll = select.poll()
for descriptor in (host, *guarded):
    poll.register(descriptor, select.POLLIN)
while guarded:
    ended = {descriptor for descriptor, _ in poll.poll()}
    if host in ended:
        for descriptor in guarded:
            try:
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            except ProcessLookupError:
                pass
        break
    for descriptor in ended:
        poll.unregister(descriptor)
        guarded.remove(descriptor)
"""
_SECONDS = 30.0


class Guard:
    """Watches over processes from one of its own, which ends when they do."""

    def __init__(self) -> None:
        self._watching: list[subprocess.Popen[bytes]] = []

    @contextlib.contextmanager
    def over_new_children(self) -> Iterator[None]:
        """Watch over the processes that ``multiprocessing`` starts meanwhile, as vLLM's core is."""
        before = set(multiprocessing.active_children())
        yield
        started = [child for child in multiprocessing.active_children() if child not in before]
        if started and hasattr(os, "pidfd_open"):  # where there is none, nothing can be held on to by its process id
            self._watch(started)

    def _watch(self, children: list[BaseProcess]) -> None:
        with ExitStack() as closing:
            descriptors = []
            for number in (os.getpid(), *(child.pid for child in children)):
                if number is not None:
                    descriptors.append(os.pidfd_open(number))
                    closing.callback(os.close, descriptors[-1])
            self._watching.append(
                subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _PROGRAM, *map(str, descriptors)],
                    pass_fds=descriptors,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    start_new_session=True,  # Ctrl-C is not for it
                )
            )

    def close(self) -> None:
        """Wait until what was guarded has ended. May be called twice."""
        while self._watching:
            watching = self._watching.pop()
            try:
                watching.wait(_SECONDS)
            except subprocess.TimeoutExpired:  # it lives on, as others see it
                watching.kill()
                watching.wait()
