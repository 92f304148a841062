"""Finds out what isolation holds by trying, in a real session, what a session must not be able to do."""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import replace
from typing import Any

from midstream.errors import SandboxError
from midstream.sandbox.conversation import Conversation, Finished
from midstream.sandbox.drivers import converse
from midstream.sandbox.fork_server import ForkServer
from midstream.sandbox.isolation.report import LAYERS, IsolationReport, Layer, Level
from midstream.sandbox.limits import SandboxLimits
from midstream.sandbox.process import wait_for_start
from midstream.sandbox.replay import live

_SECONDS = 30.0

# Each attempt gives None where it was refused, and else what it managed to do.
_ATTEMPTS = """
import json, os, signal, socket
def attempt(action):
    try:
        action()
    except OSError:
        return None
    return True
def fork():
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
def look_at_neighbours():
    if not any(name.isdigit() for name in os.listdir(os.path.dirname(os.getcwd()))):
        raise OSError("there are none")
def look_around():
    if os.getpid() == 1 or not os.path.isdir("/proc/1"):
        raise OSError("there is nobody else")
def read(path):
    with open(path) as file:
        file.read()
def write(path):
    with open(path, "a") as file:
        file.write("x")
done = {}
for layer, what, action in [
    ("filesystem", "read a file of the host", lambda: read(CANARY)),
    ("filesystem", "wrote a file of the host", lambda: write(CANARY)),
    ("filesystem", "listed the folder of other sessions", look_at_neighbours),
    ("filesystem", "read /etc/passwd", lambda: read("/etc/passwd")),
    ("filesystem", "read a file of /proc", lambda: read("/proc/1/environ")),
    ("network", "opened a socket", lambda: socket.socket()),
    ("network", "opened a local socket", lambda: socket.socket(socket.AF_UNIX)),
    ("processes", "forked", fork),
    ("processes", "started a program", lambda: os.posix_spawn("/bin/true", ["true"], {})),
    ("namespaces", "saw that a file of the host exists", lambda: os.stat(CANARY)),
    ("namespaces", "saw other processes", look_around),
    ("signals", "reached another session", lambda: os.kill(NEIGHBOUR if NEIGHBOUR != os.getpid() else 1, 0)),
    ("signals", "reached its parent", lambda: os.kill(os.getppid() or -1, 0)),
]:
    if attempt(action):
        done.setdefault(layer, []).append(what)
print(json.dumps(done))
"""

_TRIED = {
    "filesystem": "reading and writing outside of the working directory was refused",
    "network": "opening sockets was refused",
    "processes": "starting processes was refused",
    "signals": "reaching other processes was refused",
    "namespaces": "files and processes of the host were not to be seen",
}


def examine(server: ForkServer, limits: SandboxLimits) -> IsolationReport:
    """Try out a fork server's sessions. Raises :class:`~midstream.errors.SandboxError` if they do not work."""
    with tempfile.NamedTemporaryFile(prefix="midstream-canary-") as canary:
        canary.write(b"canary")
        canary.flush()
        os.chmod(canary.name, 0o666)  # noqa: S103  # permissions alone must not be what protects it
        done = _try(server, limits, canary.name)
    made_of = _made_of(server)
    layers = [Layer(name, holds=name not in done, tried=_told(name, done), made_of=made_of[name]) for name in LAYERS]
    ready = server.report["ready"]
    identity = ready["identity"]
    layers.append(
        Layer(
            "identity",
            holds=identity != "shared",
            tried=ready["identity_detail"] or "each session has a user id of its own",
            made_of=identity,
            required=False,
        )
    )
    layers.append(_memory_layer(ready))
    namespaces = Layer(
        "namespaces",
        holds="namespaces" not in done,
        tried=_told("namespaces", done),
        made_of=ready["no_namespaces"] or "user, mount, process, network, IPC and UTS namespaces, a root of its own",
        required=False,
    )
    layers.append(namespaces)
    level: Level = "full" if namespaces.holds else "container"
    if any(layer.required and not layer.holds for layer in layers):
        level = "weak"
    return IsolationReport(level, tuple(layers))


def _memory_layer(ready: dict[str, Any]) -> Layer:
    why_not = ready["no_memory_cgroup"]
    used = "for each session" if ready["memory_cgroups"] else "where resident_memory is given"
    return Layer(
        "memory",
        holds=not why_not,
        tried=why_not or "a cgroup was made, a process moved into it, and it was taken away again",
        made_of="limits of address space" + ("" if why_not else f"; a memory cgroup {used}"),
        required=False,
    )


def _try(server: ForkServer, limits: SandboxLimits, canary: str) -> dict[str, list[str]]:
    neighbour = wait_for_start(server.request())
    try:
        process = wait_for_start(server.request())
        try:
            code = _ATTEMPTS.replace("CANARY", repr(canary)).replace("NEIGHBOUR", str(neighbour.number))
            patient = replace(limits, wall_time=max(limits.wall_time, _SECONDS))
            conversation = Conversation(code, patient, (), time.monotonic())
            finished = converse(process, conversation, live, _no_tool)
        finally:
            process.close()
    finally:
        neighbour.close()
    return _parsed(finished)


def _parsed(finished: Finished) -> dict[str, list[str]]:
    if not finished.stdout or finished.error is not None:
        why = finished.error.message if finished.error is not None else finished.ending.value
        raise SandboxError(f"a session could not try out its isolation: {why}")
    done: dict[str, list[str]] = json.loads(finished.stdout)
    return done


def _no_tool(name: str, _arguments: object, _keyword_arguments: object) -> object:
    raise SandboxError(f"{name}: no tools here")


def _told(name: str, done: dict[str, list[str]]) -> str:
    return "code " + ", ".join(done[name]) if name in done else _TRIED[name]


def _made_of(server: ForkServer) -> dict[str, str]:
    ready = server.report["ready"]
    version = ready["landlock"]
    landlock = f"Landlock, ABI {version}" if version else "no Landlock"
    filtered = "system call filter" if ready["filter"] else "no system call filter"
    namespaces = "; namespaces" if ready["namespaces"] else ""
    return {
        "filesystem": f"{landlock}; {filtered}{namespaces}",
        "network": filtered + namespaces,
        "processes": filtered,
        "signals": filtered + namespaces,
    }
