"""Crossed values for readers that know JSON alone."""

from __future__ import annotations

import io
from typing import Any

from midstream.crossing.texts import CrossingError
from midstream.crossing.values import TAG, from_json, to_json
from midstream.types import IMAGE_SIGNATURES, Media


def plain_json(value: Any) -> Any:
    """What :func:`~midstream.crossing.to_json` gave, without types: what a model reads of a JSON call's answer.

    Tuples, sets and arrays become lists, records objects, numbers that JSON lacks (integers beyond 64 bits in
    hexadecimal) and dates texts; images are
    named by their sizes. Raises :class:`~midstream.crossing.CrossingError` for a malformed value.
    """
    if isinstance(value, list):
        return [plain_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    match value.get(TAG):
        case None:
            return {key: plain_json(item) for key, item in value.items()}
        case "tuple" | "set" | "frozenset":
            return [plain_json(item) for item in value["items"]]
        case "record":
            return {key: plain_json(item) for key, item in value["fields"].items()}
        case "dict":
            return {_key(key): plain_json(item) for key, item in value["items"]}
        case "ndarray" | "scalar":
            return plain_json(to_json(from_json(value).tolist()))
        case "image":
            width, height = value["size"]
            return f"<image of {width}x{height} pixels>"
        case "media":
            return f"<{value['mime']}>"
        case "int" | "bytes" | "bytearray" | "float":
            return value["text"]
        case _:
            return str(from_json(value))


def images_in(value: Any) -> list[Media]:
    """The images in what :func:`~midstream.crossing.to_json` gave, in order; pixels as PNG files.

    Raises :class:`~midstream.crossing.CrossingError` for a malformed value, and for an image that is no PNG's.
    """
    if isinstance(value, list):
        return [image for item in value for image in images_in(item)]
    if not isinstance(value, dict):
        return []
    match value.get(TAG):
        case "media":
            media = from_json(value)
            return [media] if media.mime in IMAGE_SIGNATURES else []
        case "image":
            return [_as_file(from_json(value))]
        case _:
            return [image for item in value.values() for image in images_in(item)]


def _as_file(image: Any) -> Media:
    file = io.BytesIO()
    try:
        image.save(file, "PNG")
    except OSError as error:
        raise CrossingError(f"an image that cannot be made a file: {error}") from None
    return Media("image/png", file.getvalue())


def _key(key: Any) -> str:
    key = plain_json(key)
    return key if isinstance(key, str) else str(key)
