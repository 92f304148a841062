"""numpy's arrays and Pillow's images as JSON and back.

Elements and pixels cross as they lie in memory, and images as compressed pixels rather than as a file: no
image format is ever decoded on the side that must not trust the other. Neither library is imported to find
out that a value is none of theirs.
"""

from __future__ import annotations

import math
import re
import sys
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from midstream.crossing.texts import CrossingError, data_of, encoded

if TYPE_CHECKING:
    from midstream.crossing.values import _Reading

# Booleans, integers, floats, complex numbers; texts and bytes of a fixed size; dates and differences of them.
_DTYPE = re.compile(
    r"\|b1|[<|][iu][1248]|<f[248]|<c(8|16)|<U\d{1,7}|\|S\d{1,7}|<[Mm]8\[\d{0,6}(Y|M|W|D|h|m|s|ms|us|ns)\]"
)
_MOST_DIMENSIONS = 32
_LARGEST_SIDE = 1 << 15
_BYTES_OF_A_PIXEL = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "I": 4, "F": 4, "I;16": 2}
_HIGHEST_CHARACTER = 0x10FFFF


def write(value: Any, write_plain: Callable[[Any], Any]) -> Any:
    """The JSON of an array, a scalar of numpy's or an image; None where ``value`` is none of them."""
    numpy = sys.modules.get("numpy")
    # The attribute is looked at since the module may be there half imported.
    if numpy is not None and isinstance(value, getattr(numpy, "generic", ())):
        return _write_scalar(numpy, value, write_plain)
    if numpy is not None and isinstance(value, getattr(numpy, "ndarray", ())):
        return _write_array(numpy, value)
    images = sys.modules.get("PIL.Image")
    if images is not None and isinstance(value, getattr(images, "Image", ())):
        return _write_image(value)
    return None


def _write_scalar(numpy: Any, value: Any, write_plain: Callable[[Any], Any]) -> Any:
    if isinstance(value, numpy.str_):
        return str(value)
    if isinstance(value, numpy.bytes_):
        return write_plain(bytes(value))
    written = _write_array(numpy, numpy.asarray(value))
    return {"$type": "scalar", "dtype": written["dtype"], "text": written["text"]}


def _write_array(numpy: Any, value: Any) -> Any:
    array = numpy.asarray(value)
    if array.dtype.byteorder == ">" or (array.dtype.byteorder == "=" and sys.byteorder == "big"):
        array = array.astype(array.dtype.newbyteorder("<"))
    if not _DTYPE.fullmatch(array.dtype.str):
        raise CrossingError(f"an array of dtype {array.dtype} cannot cross; .tolist() makes a list of it")
    return {"$type": "ndarray", "dtype": array.dtype.str, "shape": list(array.shape), "text": encoded(array.tobytes())}


def _write_image(image: Any) -> Any:
    if image.mode not in _BYTES_OF_A_PIXEL:
        image = image.convert("RGBA" if "transparency" in image.info or image.mode in ("PA", "RGBa") else "RGB")
    pixels = zlib.compress(image.tobytes(), 6)
    return {"$type": "image", "mode": image.mode, "size": list(image.size), "text": encoded(pixels)}


def read_array(reading: _Reading, value: Any) -> Any:
    """A writable array. Every claim of its dtype and shape is held against the bytes that came."""
    shape = value["shape"]
    if not isinstance(shape, list) or len(shape) > _MOST_DIMENSIONS:
        raise CrossingError("an array of a malformed shape")
    if not all(type(side) is int and 0 <= side < 1 << 40 for side in shape):
        raise CrossingError("an array of a malformed shape")
    data = data_of(value)
    numpy, dtype = _checked_dtype(value["dtype"])
    # Sides of an empty array count too: listed, (10**9, 0) has a billion lists.
    if math.prod(shape) * dtype.itemsize != len(data) or math.prod(max(1, side) for side in shape) > 1 << 24:
        raise CrossingError(f"an array whose shape {shape} does not fit its {len(data)} bytes")
    reading.spend(len(data))
    array = numpy.frombuffer(bytearray(data), dtype) if data else numpy.empty(0, dtype)
    _check_elements(numpy, array)
    return array.reshape(shape)


def read_scalar(reading: _Reading, value: Any) -> Any:
    return read_array(reading, {**value, "shape": []})[()]


def _checked_dtype(text: Any) -> tuple[Any, Any]:
    if not isinstance(text, str) or not _DTYPE.fullmatch(text):
        raise CrossingError("an array of a dtype that cannot cross")
    try:
        import numpy
    except ImportError:
        raise CrossingError("an array of numpy's, which is not installed on this side") from None
    return numpy, numpy.dtype(text)


def _check_elements(numpy: Any, array: Any) -> None:
    """Bytes that stand for no value of their dtype would make trouble wherever they are first looked at."""
    if array.dtype.kind == "b" and array.size and array.view("u1").max() > 1:
        raise CrossingError("an array of booleans that are neither true nor false")
    texts = array.dtype.kind == "U" and array.dtype.itemsize and array.size
    if texts and array.view(numpy.dtype("<u4")).max() > _HIGHEST_CHARACTER:
        raise CrossingError("an array of texts that are no characters")


def read_image(reading: _Reading, value: Any) -> Any:
    mode, size = value["mode"], value["size"]
    if not isinstance(mode, str) or mode not in _BYTES_OF_A_PIXEL or not isinstance(size, list) or len(size) != 2:
        raise CrossingError("a malformed image")
    if not all(type(side) is int and 0 < side <= _LARGEST_SIDE for side in size):
        raise CrossingError("an image of a size that cannot cross")
    length = size[0] * size[1] * _BYTES_OF_A_PIXEL[mode]
    reading.spend(length)
    pixels = _unpacked(data_of(value), length)
    try:
        from PIL import Image
    except ImportError:
        raise CrossingError("an image of Pillow's, which is not installed on this side") from None
    return Image.frombytes(mode, (size[0], size[1]), pixels)


def _unpacked(data: bytes, length: int) -> bytes:
    unpacker = zlib.decompressobj()
    try:
        pixels = unpacker.decompress(data, length + 1)
    except zlib.error as error:
        raise CrossingError(f"an image that cannot be unpacked: {error}") from None
    if len(pixels) != length or not unpacker.eof or unpacker.unused_data:
        raise CrossingError(f"an image whose pixels are not the {length} bytes that its size takes")
    return pixels
