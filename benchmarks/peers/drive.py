"""Drives one comparable thing for ``benchmarks.sandbox``, with the packages of ``.venv-bench``.

Its argument names the thing. It reads lines of JSON, ``{"measure": ..., "times": n}``, and answers each with a line:
``{"milliseconds": [...]}``, ``{"mib": x}`` or ``{"failed": "why"}``.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.processes import family, own_mib

IMPORTS = "import numpy, sympy"


def timed(action: Callable[[], Any], times: int) -> list[float]:
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        action()
        taken.append((time.perf_counter() - start) * 1000)
    return taken


class Peer(ABC):
    """One of the things, with a session of it open from the first call on."""

    @abstractmethod
    def start(self) -> None:
        """Start a session to where it can run code, and end it."""

    @abstractmethod
    def run(self, code: str) -> str:
        """Run code in the open session; the value of its last expression as text."""

    def time_starts(self, times: int) -> list[float]:
        return timed(self.start, times)

    def time_calls(self, times: int) -> list[float]:
        self.run("x = 3\ny = 4")
        for _ in range(max(20, times // 10)):
            assert self.run("x + y") == "7"
        return timed(lambda: self.run("x + y"), times)

    def time_imports(self) -> list[float]:
        return timed(lambda: self.run(IMPORTS), 1)

    def mib(self) -> float:
        """What the processes of the open session have of their own."""
        return own_mib(family(os.getpid()))


class Kernel(Peer):
    """An IPython kernel, by way of jupyter_client."""

    def __init__(self) -> None:
        self._end = contextlib.ExitStack()
        self._client = self._end.enter_context(self._open())

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        from jupyter_client import KernelManager

        manager = KernelManager(kernel_cmd=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"])
        manager.start_kernel(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        client = manager.client()
        client.start_channels()
        try:
            client.wait_for_ready(timeout=60)
            yield client
        finally:
            client.stop_channels()
            manager.shutdown_kernel(now=True)

    def time_starts(self, times: int) -> list[float]:
        taken = []
        for _ in range(times):  # its end is slow, and no part of its start
            start = time.perf_counter()
            with self._open():
                taken.append((time.perf_counter() - start) * 1000)
        return taken

    def start(self) -> None:
        with self._open():
            pass

    def run(self, code: str) -> str:
        values: list[str] = []

        def take(message: dict[str, Any]) -> None:
            if message["msg_type"] == "execute_result":
                values.append(message["content"]["data"]["text/plain"])

        self._client.execute_interactive(code, store_history=False, output_hook=take)
        return "".join(values)


class Smolagents(Peer):
    """smolagents' local executor: an interpreter of Python's syntax tree, in the calling process."""

    def __init__(self) -> None:
        self._executor = self._open()

    def _open(self) -> Any:
        from smolagents.local_python_executor import LocalPythonExecutor

        executor = LocalPythonExecutor(additional_authorized_imports=["numpy", "sympy"])
        executor.send_tools({})
        return executor

    def start(self) -> None:
        self._open()

    def run(self, code: str) -> str:
        return str(self._executor(code).output)

    def mib(self) -> float:
        return 0.0


class Monty(Peer):
    """pydantic-monty: an interpreter written in Rust, of a part of Python, in worker processes."""

    def __init__(self) -> None:
        import pydantic_monty

        self._end = contextlib.ExitStack()
        self._pool = self._end.enter_context(pydantic_monty.Monty())
        self._session = self._end.enter_context(self._pool.checkout())

    def start(self) -> None:
        with self._pool.checkout():
            pass

    def run(self, code: str) -> str:
        return str(self._session.feed_run(code))

    def time_imports(self) -> list[float]:
        raise NotImplementedError("it has no numpy and no sympy")


PEERS: dict[str, type[Peer]] = {"ipython": Kernel, "smolagents": Smolagents, "monty": Monty}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what they print themselves is no answer
    peer: Peer | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            peer = peer or PEERS[sys.argv[1]]()
            if request["measure"] == "memory":
                answer: dict[str, Any] = {"mib": peer.mib()}
            elif request["measure"] == "imports":
                answer = {"milliseconds": peer.time_imports()}
            else:
                measure = {"starts": peer.time_starts, "calls": peer.time_calls}[request["measure"]]
                answer = {"milliseconds": measure(request["times"])}
        except Exception as error:  # noqa: BLE001  # whatever it is, the others are measured all the same
            answer = {"failed": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    os._exit(0)  # a kernel may still be starting threads of its own


if __name__ == "__main__":
    main()
