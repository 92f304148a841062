"""Frames between the host and a session: four bytes of length, little-endian, then a JSON object in UTF-8.

The session's side is written by whoever wrote the code in it. So the reader here bounds a frame's length
before it is kept and its nesting before it is parsed, takes nothing but JSON, and calls everything else
:class:`~midstream.errors.SandboxProtocolError`.
"""

from __future__ import annotations

import json
import re
import struct
from typing import Any, NoReturn

from midstream.errors import SandboxProtocolError

MAXIMUM_DEPTH = 100
"""How deep lists and objects in a frame may nest; the frame itself is one level, arguments two more."""

_LENGTH = struct.Struct("<I")
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")


def encode(frame: dict[str, Any]) -> bytes:
    """A frame ready to be sent. Raises :class:`ValueError` or :class:`TypeError` for what is not JSON."""
    body = _encoder.encode(frame).encode("ascii")
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Turns bytes as they come into frames."""

    def __init__(self, maximum_bytes: int) -> None:
        self._maximum_bytes = maximum_bytes
        self._buffer = bytearray()

    @property
    def pending(self) -> bool:
        """Whether bytes of an unfinished frame are here."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def next_frame(self) -> dict[str, Any] | None:
        """The next whole frame, or None until more bytes come."""
        if len(self._buffer) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        if length > self._maximum_bytes:
            raise SandboxProtocolError(f"a frame of {length} bytes, where {self._maximum_bytes} are the most")
        end = _LENGTH.size + length
        if len(self._buffer) < end:
            return None
        body = bytes(self._buffer[_LENGTH.size : end])
        del self._buffer[:end]
        return parse(body)


def parse(body: bytes) -> dict[str, Any]:
    """One frame's JSON object."""
    if not _shallow(body):
        raise SandboxProtocolError(f"a frame nested deeper than {MAXIMUM_DEPTH} levels")
    try:
        frame = _decoder.decode(body.decode("utf-8"))
    except ValueError as error:
        raise SandboxProtocolError(f"a frame that is not JSON: {error}") from None
    if not isinstance(frame, dict):
        raise SandboxProtocolError(f"a frame that is a {type(frame).__name__}, not an object")
    return frame


def _shallow(body: bytes) -> bool:
    if body.count(b"[") + body.count(b"{") <= MAXIMUM_DEPTH:
        return True
    depth = 0
    for match in _BRACKET.finditer(_STRING.sub(b"", body)):
        depth += 1 if match[0] in b"[{" else -1
        if depth > MAXIMUM_DEPTH:
            return False
    return True


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_encoder = json.JSONEncoder(allow_nan=False, separators=(",", ":"))
_decoder = json.JSONDecoder(parse_constant=_refuse_constant)
