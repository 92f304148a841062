"""Files into a session's working directory and out of it, through its channel.

The host never opens a path of the session's: what lies there is the code's making. The session opens it, with
no more rights than its code has, and what it says is believed as little as anything else that it sends.
"""

from __future__ import annotations

import base64
import binascii
import errno
import os
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

from midstream.errors import ConfigurationError, SandboxFileError, SandboxProtocolError
from midstream.sandbox import protocol
from midstream.sandbox.conversation import Alarm, Conversation, Ending, Finished
from midstream.sandbox.limits import SandboxLimits

_SECONDS = 30.0
"""What one file may take at least, even where blocks have less."""

_CHUNK_BYTES = 1 << 18
_LONGEST_PATH = 1024
_REFUSALS = {errno.ELOOP: "is a symbolic link, or lies behind one, and none is followed"}


@dataclass(slots=True)
class Transfer(Conversation):
    """A question about a file instead of a block, and the session's answer: ``data``, or an ``error`` number."""

    question: dict[str, Any] = field(default_factory=dict)
    data: bytes = b""
    at_end: bool = False
    error: int | None = None

    def opening(self) -> bytes:
        return protocol.encode({"nonce": self.nonce, "file": self.question})

    def _finished(self, frame: dict[str, Any]) -> Finished:
        told = frame.get("file")
        if not isinstance(told, dict):
            raise SandboxProtocolError("an answer about a file that is none")
        error, text, at_end = told.get("errno"), told.get("data", ""), told.get("end")
        if error is not None and not (isinstance(error, int) and error in errno.errorcode):
            raise SandboxProtocolError("an answer about a file with an error that does not exist")
        if not isinstance(text, str):
            raise SandboxProtocolError("an answer about a file without its content")
        try:
            self.data = base64.b64decode(text, validate=True)
        except (ValueError, binascii.Error):
            raise SandboxProtocolError("an answer about a file whose content is not base64") from None
        if len(self.data) > self.question.get("size", 0):
            raise SandboxProtocolError("an answer about a file with more than was asked for")
        self.error, self.at_end = error, at_end is True
        self._over()
        return Finished(Ending.RESULT)

    def alarm(self, now: float) -> Alarm | None:
        """No code runs that could be interrupted: who does not answer in time is ended."""
        if self.deadline is None or now < self.deadline:
            return None
        self._over()
        return Alarm.KILL


Moves = Generator[Transfer, Finished, bytes]
"""Yields what to ask the session, is sent how that ended; returns the file's content."""


def sending(path: str, data: bytes, limits: SandboxLimits) -> Moves:
    """Write ``data`` to ``path``, piece by piece."""
    deadline = time.monotonic() + max(_SECONDS, limits.wall_time)
    size = _chunk_bytes(limits)
    for offset in range(0, len(data) or 1, size):
        piece = base64.b64encode(data[offset : offset + size]).decode("ascii")
        yield from _ask({"put": path, "offset": offset, "data": piece}, limits, deadline)
    return data


def fetching(path: str, limits: SandboxLimits) -> Moves:
    """Read ``path``, piece by piece, as far as the cap allows."""
    deadline = time.monotonic() + max(_SECONDS, limits.wall_time)
    cap = largest(limits)
    data = bytearray()
    while True:
        question = {"get": path, "offset": len(data), "size": _chunk_bytes(limits)}
        transfer = yield from _ask(question, limits, deadline)
        data += transfer.data
        if len(data) > cap:
            raise SandboxFileError(errno.EFBIG, f"the file is larger than {cap} bytes", path)
        if transfer.at_end or not transfer.data:
            return bytes(data)


def _ask(question: dict[str, Any], limits: SandboxLimits, deadline: float) -> Generator[Transfer, Finished, Transfer]:
    transfer = Transfer("", limits, (), time.monotonic(), question=question)
    transfer.deadline = deadline
    yield transfer
    if transfer.error is not None:
        path = question["put"] if "put" in question else question["get"]
        raise SandboxFileError(transfer.error, _REFUSALS.get(transfer.error) or os.strerror(transfer.error), path)
    return transfer


def largest(limits: SandboxLimits) -> int:
    """Bytes of the largest file that crosses."""
    return limits.working_directory if limits.file_size is None else limits.file_size


def _chunk_bytes(limits: SandboxLimits) -> int:
    return min(_CHUNK_BYTES, (limits.frame_bytes - 4096) * 3 // 4)


def checked_path(path: str | os.PathLike[str]) -> str:
    """A path within the working directory, in its plainest form."""
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else path
    if not isinstance(text, str):
        raise ConfigurationError(f"path={path!r}: must be a string or a path of the pathlib kind")
    if not text or "\0" in text or len(os.fsencode(text)) > _LONGEST_PATH:
        raise ConfigurationError(f"path={text[:100]!r}: must have 1 to {_LONGEST_PATH} bytes, none of them zero")
    parts = [part for part in text.split("/") if part not in ("", ".")]
    if text.startswith("/") or ".." in parts or not parts or text.endswith("/"):
        raise ConfigurationError(
            f"path={text!r}: must name a file in the working directory, relative to it and without '..'"
        )
    return "/".join(parts)


def checked_data(data: bytes | bytearray | memoryview, limits: SandboxLimits) -> bytes:
    """The content of a file that is to be put."""
    if not isinstance(data, bytes | bytearray | memoryview):
        raise ConfigurationError(f"data: must be bytes, not {type(data).__name__}")
    content = bytes(data)
    if len(content) > largest(limits):
        raise ConfigurationError(f"data: {len(content)} bytes, where SandboxLimits allow a file of {largest(limits)}")
    return content
