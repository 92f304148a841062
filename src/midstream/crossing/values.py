"""Python values as JSON and back, typed, and safe to read from whoever wrote them.

What JSON has stands as it is. Everything else is an object with the key ``$type``: ``{"$type": "tuple",
"items": [1, 2]}``. Nothing is ever unpickled and no class is looked up by name: the types below are all that
can come out. Sizes are bounded while reading, so that a short text never becomes a large value.
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import fractions
import json
import keyword
import math
import numbers
import os
import re
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from midstream.crossing import arrays
from midstream.crossing.texts import CrossingError, TooLarge, data_of, encoded, text_of
from midstream.types import Media

TAG = "$type"
MAXIMUM_DEPTH = 90
"""How deep the JSON of one value may nest."""

MAXIMUM_BYTES = 16 << 20
"""Bytes that the arrays and images of one reading may have in all."""

LONGEST_ANSWER = 16 << 20
"""Bytes of the JSON of what a tool gives, to code or to a call that is JSON itself."""

_PLAIN = frozenset({str, bool, type(None)})
_SMALL = 1 << 63
_HEX = re.compile(r"-?0x[0-9a-f]+")
_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,9})?|[+-]?(Infinity|s?NaN\d{0,30})")
_LONGEST_TEXT = 64
_EQUAL_HASHES = 32


def to_json(value: object) -> Any:
    """``value`` as JSON, in new lists and dicts. Raises :class:`CrossingError` where it cannot cross.

    Tuples (named ones too), sets, bytes, dates and times, complex numbers, fractions, decimals, dicts with any
    keys, numpy's arrays and scalars, Pillow's images and :class:`~midstream.types.Media` keep their types. A
    dataclass becomes a record of its fields, a member of an enumeration its value, a path its text.
    """
    return _writing(value, 0)


def from_json(value: Any, *, records: bool = False, maximum_bytes: int = MAXIMUM_BYTES) -> Any:
    """What :func:`to_json` made ``value`` from. Raises :class:`CrossingError` for what it never makes, and its
    subclass :class:`TooLarge` for what takes too much room.

    - ``records``: make a small class for each record, as a sandbox does with what its host sends; otherwise
      a record becomes a dict of its fields.
    - ``maximum_bytes``: of all arrays and images together, unpacked.
    """
    try:
        return _Reading(records, maximum_bytes).value(value, 0)
    except CrossingError:
        raise
    except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError) as error:
        raise CrossingError(f"a malformed value: {error}") from None


# --- writing


def _writing(value: Any, depth: int) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is int:
        return value if -_SMALL <= value < _SMALL else {TAG: "int", "text": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {TAG: "float", "text": repr(value)}
    if depth > MAXIMUM_DEPTH:
        raise CrossingError(f"it is nested deeper than {MAXIMUM_DEPTH} levels, or holds itself")
    if kind is list:
        depth += 1
        return [item if type(item) in _PLAIN else _writing(item, depth) for item in value]
    if kind is dict:
        return _write_dict(value, depth)
    writer = _WRITERS.get(kind)
    if writer is not None:
        return writer(value, depth)
    return _write_other(value, depth)


def _write_dict(value: Mapping[Any, Any], depth: int) -> Any:
    if TAG not in value and all(type(key) is str for key in value):
        return {key: _writing(item, depth + 1) for key, item in value.items()}
    pairs = [[_writing(key, depth + 3), _writing(item, depth + 3)] for key, item in value.items()]
    return {TAG: "dict", "items": pairs}


def _write_items(name: str) -> Callable[[Any, int], Any]:
    return lambda value, depth: {TAG: name, "items": [_writing(item, depth + 2) for item in value]}


def _write_set(name: str) -> Callable[[Any, int], Any]:
    def write(value: Any, depth: int) -> Any:
        # Sorted, so that equal sets have equal JSON.
        return {TAG: name, "items": sorted((_writing(item, depth + 2) for item in value), key=_sorting)}

    return write


def _sorting(item: Any) -> str:
    return json.dumps(item, sort_keys=True)


def _write_text(name: str, text: Callable[[Any], str]) -> Callable[[Any, int], Any]:
    return lambda value, _depth: {TAG: name, "text": text(value)}


def _write_moment(name: str) -> Callable[[Any, int], Any]:
    def write(value: Any, _depth: int) -> Any:
        text = value.isoformat()
        if len(text) > _LONGEST_TEXT:
            raise CrossingError(f"its time zone cannot cross: {text[:100]!r}")
        return {TAG: name, "text": text}

    return write


_WRITERS: dict[type, Callable[[Any, int], Any]] = {
    tuple: _write_items("tuple"),
    set: _write_set("set"),
    frozenset: _write_set("frozenset"),
    bytes: _write_text("bytes", encoded),
    bytearray: _write_text("bytearray", encoded),
    memoryview: _write_text("bytes", lambda value: encoded(value.tobytes())),
    datetime.datetime: _write_moment("datetime"),
    datetime.date: _write_moment("date"),
    datetime.time: _write_moment("time"),
    datetime.timedelta: lambda value, _: {TAG: "timedelta", "items": [value.days, value.seconds, value.microseconds]},
    complex: lambda value, depth: {
        TAG: "complex",
        "items": [_writing(value.real, depth), _writing(value.imag, depth)],
    },
    fractions.Fraction: lambda value, depth: {
        TAG: "fraction",
        "items": [_writing(value.numerator, depth), _writing(value.denominator, depth)],
    },
    decimal.Decimal: _write_text("decimal", str),
    Media: lambda value, _: {TAG: "media", "mime": value.mime, "text": encoded(value.data)},
}


def _write_other(value: Any, depth: int) -> Any:
    """What is of no type above: subclasses, and types of libraries that may not be there."""
    if isinstance(value, enum.Enum):
        return _writing(value.value, depth + 1)
    special = arrays.write(value, lambda item: _writing(item, depth + 1))
    if special is not None:
        return special
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _writing(getattr(value, field.name), depth + 2) for field in dataclasses.fields(value)}
        return {TAG: "record", "name": type(value).__name__, "fields": fields}
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return _write_dict(dict(value), depth)
    if isinstance(value, list | deque):
        return [_writing(item, depth + 1) for item in value]
    for base in _SUBCLASSED:
        if isinstance(value, base):
            return _WRITERS[base](value, depth)
    if isinstance(value, os.PathLike):
        return _writing(os.fspath(value), depth + 1)
    return _write_number(value, depth)


_SUBCLASSED = (
    tuple,
    set,
    frozenset,
    bytes,
    bytearray,
    datetime.datetime,
    datetime.date,
    datetime.time,
    datetime.timedelta,
    fractions.Fraction,
    decimal.Decimal,
)


def _write_number(value: Any, depth: int) -> Any:
    """Numbers of other libraries, such as sympy's, and what can say itself as a list."""
    try:
        if isinstance(value, numbers.Integral):
            return _writing(int(value), depth + 1)
        if isinstance(value, numbers.Rational):
            return _writing(fractions.Fraction(int(value.numerator), int(value.denominator)), depth + 1)
        if isinstance(value, numbers.Real):
            return _writing(float(value), depth + 1)
        if isinstance(value, numbers.Complex):
            return _writing(complex(value), depth + 1)
        if not isinstance(value, type) and callable(getattr(value, "tolist", None)):
            return _writing(value.tolist(), depth + 1)
    except CrossingError:
        raise
    except Exception as error:  # noqa: BLE001  # what others' methods raise
        raise CrossingError(f"{_described(value)} cannot be taken apart ({type(error).__name__}: {error})") from None
    raise CrossingError(f"{_described(value)} cannot cross")


def _described(value: object) -> str:
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


# --- reading


class _Reading:
    """One value's reading: what it may still unpack is counted over all of it."""

    def __init__(self, records: bool, maximum_bytes: int) -> None:
        self._records = records
        self._left = maximum_bytes

    def spend(self, size: int) -> None:
        """Count bytes about to be unpacked, before any room is made for them."""
        self._left -= size
        if self._left < 0:
            raise TooLarge("its arrays and images are larger than may cross")

    def value(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if kind is list:
            self._check(depth)
            return [item if type(item) in _PLAIN else self.value(item, depth + 1) for item in value]
        if kind is not dict:
            if kind in _PLAIN or kind is int or kind is float:
                return value
            raise CrossingError(f"a {kind.__name__}, which is not JSON")
        self._check(depth)
        if TAG not in value:
            return {key: self.value(item, depth + 1) for key, item in value.items()}
        tag = value[TAG]
        reader = _READERS.get(tag) if isinstance(tag, str) else None
        if reader is None:
            raise CrossingError(f"{TAG}={tag!r} is no type that crosses" if len(repr(tag)) < 99 else f"a bad {TAG}")
        fields, read = reader
        if value.keys() != fields:
            raise CrossingError(f"a {tag} with fields that it does not have")
        return read(self, value, depth + 1)

    @staticmethod
    def _check(depth: int) -> None:
        if depth > MAXIMUM_DEPTH + 3:  # a key stands three levels below its dict
            raise CrossingError(f"it is nested deeper than {MAXIMUM_DEPTH} levels")

    def items(self, value: Any, depth: int, count: int | None = None) -> list[Any]:
        items = value["items"]
        if not isinstance(items, list) or (count is not None and len(items) != count):
            raise CrossingError("a value with malformed items")
        return [self.value(item, depth + 1) for item in items]

    def hashable(self, items: list[Any]) -> list[Any]:
        """Refuses what was made to collide: a set of it would take time that grows with the square."""
        hashes = sorted(map(hash, items))
        for first, last in zip(hashes, hashes[_EQUAL_HASHES:], strict=False):
            if first == last:
                raise CrossingError("keys that all have one hash")
        return items

    def dict(self, value: Any, depth: int) -> dict[Any, Any]:
        pairs = value["items"]
        if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            raise CrossingError("a dict with malformed items")
        keys = self.hashable([self.value(key, depth + 2) for key, _ in pairs])
        return dict(zip(keys, (self.value(item, depth + 2) for _, item in pairs), strict=True))

    def record(self, value: Any, depth: int) -> Any:
        name, fields = value["name"], value["fields"]
        if not _is_name(name) or not isinstance(fields, dict) or not all(map(_is_name, fields)):
            raise CrossingError("a malformed record")
        read = {key: self.value(item, depth + 1) for key, item in fields.items()}
        if not self._records:
            return read
        kind = dataclasses.make_dataclass(name, list(read), namespace={"__module__": "__main__"})
        return kind(**read)


def _is_name(text: object) -> bool:
    return isinstance(text, str) and text.isidentifier() and not keyword.iskeyword(text)


def _integer(value: Any) -> int:
    text = text_of(value)
    if not _HEX.fullmatch(text):
        raise CrossingError("a malformed integer")
    return int(text, 16)


def _decimal(value: Any) -> decimal.Decimal:
    text = text_of(value, 10_000)
    if not _NUMBER.fullmatch(text):
        raise CrossingError("a malformed decimal")
    return decimal.Decimal(text)


def _exactly(kind: type, items: list[Any], *kinds: type) -> Any:
    if not all(type(item) in kinds for item in items):
        raise CrossingError(f"a {kind.__name__} of malformed parts")
    return kind(*items)


def _media(value: Any) -> Media:
    if not isinstance(value["mime"], str):
        raise CrossingError("a malformed media type")
    return Media(value["mime"][:100], data_of(value))


_Reader = tuple[set[str], Callable[[_Reading, Any, int], Any]]


def _text(read: Callable[[Any], Any]) -> _Reader:
    return {TAG, "text"}, lambda _reading, value, _depth: read(value)


def _items(read: Callable[[_Reading, list[Any]], Any], count: int | None = None) -> _Reader:
    return {TAG, "items"}, lambda reading, value, depth: read(reading, reading.items(value, depth, count))


_READERS: dict[str, _Reader] = {
    "int": _text(_integer),
    "float": _text(lambda value: _FLOATS[text_of(value)]),
    "tuple": _items(lambda _, items: tuple(items)),
    "set": _items(lambda reading, items: set(reading.hashable(items))),
    "frozenset": _items(lambda reading, items: frozenset(reading.hashable(items))),
    "dict": ({TAG, "items"}, _Reading.dict),
    "record": ({TAG, "name", "fields"}, _Reading.record),
    "bytes": _text(data_of),
    "bytearray": _text(lambda value: bytearray(data_of(value))),
    "datetime": _text(lambda value: datetime.datetime.fromisoformat(text_of(value, _LONGEST_TEXT))),
    "date": _text(lambda value: datetime.date.fromisoformat(text_of(value, _LONGEST_TEXT))),
    "time": _text(lambda value: datetime.time.fromisoformat(text_of(value, _LONGEST_TEXT))),
    "timedelta": _items(lambda _, items: _exactly(datetime.timedelta, items, int), 3),
    "complex": _items(lambda _, items: _exactly(complex, items, float), 2),
    "fraction": _items(lambda _, items: _exactly(fractions.Fraction, items, int), 2),
    "decimal": _text(_decimal),
    "media": ({TAG, "mime", "text"}, lambda _reading, value, _depth: _media(value)),
    "ndarray": ({TAG, "dtype", "shape", "text"}, lambda reading, value, _: arrays.read_array(reading, value)),
    "scalar": ({TAG, "dtype", "text"}, lambda reading, value, _: arrays.read_scalar(reading, value)),
    "image": ({TAG, "mode", "size", "text"}, lambda reading, value, _: arrays.read_image(reading, value)),
}
