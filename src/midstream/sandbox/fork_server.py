"""The host's hold on one fork server: starts it, asks it for sessions, ends it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import glob
import json
import logging
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any

from midstream.errors import ConfigurationError, IsolationError, SandboxDied, SandboxError
from midstream.sandbox.inside import folders
from midstream.sandbox.limits import SandboxLimits

_log = logging.getLogger(__name__)

_FOLDER_PREFIX = "midstream-sandbox-"
_START_SECONDS = 300.0
_END_SECONDS = 30.0
_DYING_MILLISECONDS = 500
_MESSAGE_BYTES = 1 << 18
_STALE_SECONDS = 60.0

# What a fork server's environment holds, and nothing else. Hashes are fixed, so that sets come out in the
# same order in every session. One thread per session: many sessions share the cores.
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "TZ": "UTC",
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",
}
# Without these some builds of Python cannot start at all.
_PASSED_ON = ("LD_LIBRARY_PATH", "PYTHONHOME")


@dataclass(frozen=True, slots=True)
class ForkServerSettings:
    """What a fork server is started with."""

    limits: SandboxLimits
    preload: tuple[str, ...] | None
    environment: Mapping[str, str]
    readable: tuple[str, ...]
    allow_missing: frozenset[str]
    isolation: str
    clones: bool


class ForkServer:
    """A running fork server. Usable from any thread; :meth:`close` ends it and all of its sessions."""

    def __init__(self, settings: ForkServerSettings) -> None:
        if sys.platform != "linux":
            raise SandboxError(f"sandboxes need Linux; this is {sys.platform}")
        if not sys.executable:
            raise SandboxError("sys.executable is empty: there is no Python to start sandboxes with")
        _remove_stale_folders()
        self._owner = os.getpid()
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed in close()
        self.folder = tempfile.mkdtemp(prefix=_FOLDER_PREFIX)
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process: subprocess.Popen[bytes] | None = None
        try:
            os.chmod(self.folder, 0o711)  # noqa: S103  # sessions with a user id of their own pass through
            with theirs:
                self._process = self._start(theirs, settings.environment)
            self.report: dict[str, Any] = self._handshake(settings)
        except BaseException:
            self.close()
            raise
        self._control.setblocking(False)

    def _start(self, theirs: socket.socket, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        program = os.path.join(os.path.dirname(folders.__file__), "bootstrap.py")
        host = os.pidfd_open(os.getpid())
        try:
            return subprocess.Popen(
                [sys.executable, "-P", "-s", program, str(theirs.fileno()), str(host)],
                pass_fds=(theirs.fileno(), host),
                env={**_ENVIRONMENT, **_passed_on(), **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            raise SandboxError(f"the fork server cannot be started: {error}") from error
        finally:
            os.close(host)

    def _handshake(self, settings: ForkServerSettings) -> dict[str, Any]:
        message = {
            "limits": settings.limits.as_dict(),
            "preload": None if settings.preload is None else list(settings.preload),
            "readable": list(settings.readable),
            "allow_missing": sorted(settings.allow_missing),
            "isolation": settings.isolation,
            "clones": settings.clones,
            "folder": self.folder,
        }
        self._control.settimeout(_START_SECONDS)
        try:
            self._control.send(json.dumps(message).encode())
            data = self._control.recv(_MESSAGE_BYTES)
        except TimeoutError:
            raise SandboxError(f"the fork server did not start within {_START_SECONDS:g} seconds") from None
        except OSError:
            data = b""
        if not data:
            raise SandboxError(f"the fork server ended while it started: {self._last_words()}")
        answer: dict[str, Any] = json.loads(data)
        if "failed" not in answer:
            return answer
        if answer["failed"] == "isolation":
            raise IsolationError(answer["message"])
        if answer["failed"] == "clones":
            raise SandboxError(f"forkable=True: {answer['message']}")
        if answer["failed"] == "preload":
            raise ConfigurationError(f"preload: {answer['message']}")
        raise SandboxError(f"the fork server failed to start:\n{answer['message']}")

    def _last_words(self) -> str:
        self._errors.seek(0)
        text = self._errors.read()[-2000:].decode("utf-8", "replace").strip()
        return text or "it said nothing"

    @property
    def gone(self) -> bool:
        """Whether it has ended, or belongs to the process that this one was forked from."""
        return self._ended_within(0)

    def ends(self) -> bool:
        """Whether it has ended, or does so now: for who has lost a session without a word.

        A session that it had just forked may hold its descriptors a moment longer than others live.
        """
        return self._ended_within(_DYING_MILLISECONDS)

    def _ended_within(self, milliseconds: int) -> bool:
        if self._control.fileno() < 0 or os.getpid() != self._owner:
            return True
        hung_up = select.poll()
        hung_up.register(self._control, 0)
        return bool(hung_up.poll(milliseconds))

    # -- asking for sessions

    def request(self) -> socket.socket:
        """Ask for a session; the host's end of its channel, on which the start will be told."""
        ours, theirs = new_channel()
        with theirs:
            try:
                while not self._try_send(theirs):
                    poll = select.poll()
                    poll.register(self._control, select.POLLOUT)
                    poll.poll(10)
            except BaseException:
                ours.close()
                raise
        return ours

    async def request_async(self) -> socket.socket:
        """The same for asyncio."""
        ours, theirs = new_channel()
        with theirs:
            try:
                while not self._try_send(theirs):
                    await asyncio.sleep(0.002)
            except BaseException:
                ours.close()
                raise
        return ours

    def request_if_idle(self) -> socket.socket | None:
        """The same without waiting: None where too many have been asked for already."""
        ours, theirs = new_channel()
        sent = False
        try:
            with theirs:
                sent = self._try_send(theirs)
        finally:
            if not sent:
                ours.close()
        return ours if sent else None

    def _try_send(self, theirs: socket.socket) -> bool:
        try:
            socket.send_fds(self._control, [b"session"], [theirs.fileno()])
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno == errno.ETOOMANYREFS:  # descriptors on their way, more than one may have open
                return False
            raise SandboxDied(f"the fork server is gone: {error}") from None
        return True

    def close(self) -> None:
        """End it, its sessions and their folders. May be called twice."""
        self._control.close()
        self._errors.close()
        if self._process is None or os.getpid() != self._owner:
            return
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        # Only where it was killed, or never came so far, is anything left here.
        if os.path.isdir(self.folder):
            folders.remove_tree(self.folder)


def new_channel() -> tuple[socket.socket, socket.socket]:
    """The host's end of a new channel, which never blocks, and the session's."""
    try:
        ours, theirs = socket.socketpair()
    except OSError as error:
        if error.errno != errno.EMFILE or not _raise_descriptor_limit():
            raise SandboxError(f"no channel for a session: {error} (each session takes two descriptors)") from error
        ours, theirs = socket.socketpair()
    ours.setblocking(False)
    return ours, theirs


def _raise_descriptor_limit() -> bool:
    """Let this process open as many files as it may; whether that is more than before."""
    import resource  # not on every platform, as little as fcntl below; this package imports on all

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= hard:
        return False
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    _log.info("raised the limit of open files from %d to %d", soft, hard)
    return True


def _passed_on() -> dict[str, str]:
    return {name: os.environ[name] for name in _PASSED_ON if name in os.environ}


def _remove_stale_folders() -> None:
    """Remove what a fork server that was killed together with its host has left."""
    for path in glob.glob(os.path.join(glob.escape(tempfile.gettempdir()), _FOLDER_PREFIX + "*")):
        with contextlib.suppress(OSError):
            status = os.lstat(path)
            if status.st_uid == os.geteuid() and time.time() - status.st_mtime > _STALE_SECONDS and _abandoned(path):
                folders.remove_tree(path)


def _abandoned(path: str) -> bool:
    import fcntl

    try:
        descriptor = os.open(os.path.join(path, folders.LOCK), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
