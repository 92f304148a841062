"""Bytes in JSON, and the error of what cannot cross."""

from __future__ import annotations

import base64
import binascii
from typing import Any


class CrossingError(ValueError):
    """A value that cannot cross: of a type that has no JSON form here, nested too deeply, or forged."""


class TooLarge(CrossingError):
    """A value that takes more room, unpacked, than it may."""


def encoded(data: bytes | bytearray | memoryview) -> str:
    return base64.b64encode(data).decode("ascii")


def text_of(value: Any, longest: int | None = None) -> str:
    text = value["text"]
    if not isinstance(text, str) or (longest is not None and len(text) > longest):
        raise CrossingError("a value with a malformed text")
    return text


def data_of(value: Any) -> bytes:
    try:
        return base64.b64decode(text_of(value).encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise CrossingError("bytes that are not base64") from None
