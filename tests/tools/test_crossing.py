"""Values as JSON and back: what crosses comes out as it went in, and nothing that is forged gets further."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import decimal
import enum
import fractions
import json
import math
import pickle
import subprocess
import sys
import tracemalloc
import zlib
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st

from midstream.crossing import CrossingError, describe_exception, exception_of, from_json, plain_json, to_json
from midstream.crossing.texts import TooLarge
from midstream.types import ExecutionError, Media

PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(10**400), max_value=10**400)
    | st.floats()
    | st.text(st.characters(codec=None, exclude_categories=()), max_size=20)
)
HASHABLE = st.deferred(
    lambda: (
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False)
        | st.text(max_size=8)
        | st.binary(max_size=8)
        | st.dates()
        | st.datetimes(timezones=st.none() | st.just(datetime.UTC))
        | st.times()
        | st.timedeltas()
        | st.fractions()
        | st.decimals(allow_nan=False, allow_infinity=True)
        | st.complex_numbers(allow_nan=False)
        | st.tuples(HASHABLE, HASHABLE)
        | st.frozensets(st.integers() | st.text(max_size=3), max_size=3)
    )
)
VALUES = st.recursive(
    PLAIN | HASHABLE | st.binary(max_size=30).map(bytearray) | st.builds(Media, st.text(max_size=9), st.binary()),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=6) | st.just("$type"), inner, max_size=4)
        | st.dictionaries(HASHABLE, inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.sets(HASHABLE, max_size=3)
    ),
    max_leaves=12,
)


def same(one: Any, other: Any) -> bool:
    """Equal, and of the same types all the way down; NaN is itself, and -0.0 is not 0.0."""
    if type(one) is not type(other):
        return False
    match one:
        case float():
            return (math.isnan(one) and math.isnan(other)) or (
                one == other and math.copysign(1, one) == math.copysign(1, other)
            )
        case complex():
            return same(one.real, other.real) and same(one.imag, other.imag)
        case list() | tuple():
            return len(one) == len(other) and all(map(same, one, other))
        case dict():
            return len(one) == len(other) and all(
                same(a, b) and same(one[a], other[b]) for a, b in zip(one, other, strict=True)
            )
        case set() | frozenset():  # in any order
            return one == other or sorted(map(repr, one)) == sorted(map(repr, other))
        case _:  # shown alike, what is never equal to itself is the same
            return repr(one) == repr(other) or bool(one == other)


def crossed(value: Any, **options: Any) -> Any:
    """Through the JSON that really travels, and by one that keeps no object."""
    return from_json(json.loads(json.dumps(to_json(value), allow_nan=False)), **options)


@given(VALUES)
@settings(max_examples=150, deadline=None)
def test_values_come_out_as_they_went_in(value: Any) -> None:
    assert same(crossed(value), value)


@given(
    np_st.arrays(
        np_st.boolean_dtypes()
        | np_st.integer_dtypes()
        | np_st.unsigned_integer_dtypes()
        | np_st.floating_dtypes(sizes=(16, 32, 64))
        | np_st.complex_number_dtypes(sizes=(64, 128))
        | np_st.unicode_string_dtypes(max_len=5)
        | np_st.byte_string_dtypes(max_len=5)
        | np_st.datetime64_dtypes()
        | np_st.timedelta64_dtypes(),
        np_st.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    )
)
@settings(max_examples=100, deadline=None)
def test_arrays_come_out_as_they_went_in(array: np.ndarray) -> None:
    back = crossed(array)
    assert back.dtype == array.dtype.newbyteorder("<")
    assert back.shape == array.shape
    assert back.tobytes() == array.astype(back.dtype).tobytes()
    assert back.flags.writeable
    if array.ndim == 0 and array.dtype.kind not in "US":
        scalar = crossed(array[()])
        assert type(scalar) is type(array[()])
        assert scalar.tobytes() == array.astype(back.dtype).tobytes()


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "I", "F", "I;16"])
def test_images_come_out_as_they_went_in(mode: str) -> None:
    image_of = pytest.importorskip("PIL.Image")
    image = image_of.effect_noise((37, 21), 80).convert("RGBA" if mode == "RGBA" else "L").convert(mode)
    back = crossed([image])[0]
    assert (back.mode, back.size, back.tobytes()) == (image.mode, image.size, image.tobytes())


def test_images_of_other_modes_cross_as_colours() -> None:
    image_of = pytest.importorskip("PIL.Image")
    assert crossed(image_of.new("P", (4, 4))).mode == "RGB"
    assert crossed(image_of.new("CMYK", (4, 4))).mode == "RGB"
    assert crossed(image_of.new("1", (9, 2), 1)).getpixel((8, 1)) == (255, 255, 255)


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class Text(str):
    pass


@dataclasses.dataclass
class Point:
    x: int
    inner: Any = None


Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    ("value", "becomes"),
    [
        (Colour.RED, "red"),
        (Level.HIGH, 3),
        (Text("t"), "t"),
        (Pair(1, 2), (1, 2)),
        (OrderedDict(a=1), {"a": 1}),
        (defaultdict(list, {1: [2]}), {1: [2]}),
        (Counter("aab"), {"a": 2, "b": 1}),
        (deque([1, 2]), [1, 2]),
        (PurePosixPath("a/b"), "a/b"),
        (memoryview(b"abc"), b"abc"),
        (Point(1, (2,)), {"x": 1, "inner": (2,)}),
        (np.str_("s"), "s"),
        (np.bytes_(b"s"), b"s"),
        (True, True),
    ],
)
def test_what_is_like_a_type_that_crosses_crosses_as_that(value: Any, becomes: Any) -> None:
    assert same(crossed(value), becomes)


def test_sympys_numbers_are_numbers() -> None:
    sympy = pytest.importorskip("sympy")
    given_ = [sympy.Integer(3), sympy.Rational(1, 3), sympy.Float(2.5)]
    assert same(crossed(given_), [3, fractions.Fraction(1, 3), 2.5])


def test_records_are_objects_where_the_writer_is_trusted() -> None:
    back = crossed([Point(1, Point(2)), Point(1, Point(2))], records=True)
    assert back[0] == back[0]
    assert repr(back[0]) == "Point(x=1, inner=Point(x=2, inner=None))"
    assert (back[0].x, back[0].inner.x) == (1, 2)


class Reducing:
    def __reduce__(self) -> Any:
        raise AssertionError("pickled")


LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (object(), "an object cannot cross"),
        (Reducing(), "a Reducing cannot cross"),
        (Point, "a type cannot cross"),
        (iter([1]), "a list_iterator cannot cross"),
        (range(3), "a range cannot cross"),
        (print, "a builtin_function_or_method cannot cross"),
        ({"a": [object()]}, "an object cannot cross"),
        (LOOP, "deeper than 90 levels, or holds itself"),
        (np.array([object()]), "dtype object cannot cross"),
        (np.zeros(2, [("a", "i4")]), "cannot cross"),
        (np.zeros(2, np.longdouble), "cannot cross"),
    ],
)
def test_what_cannot_cross_says_so(value: Any, why: str) -> None:
    with pytest.raises(CrossingError, match=why):
        to_json([value])


def test_depth_is_that_of_the_json() -> None:
    deep: Any = 1
    for _ in range(90):
        deep = [deep]
    assert crossed(deep) == deep
    with pytest.raises(CrossingError, match="deeper"):
        to_json([[deep]])
    with pytest.raises(CrossingError, match="deeper"):
        from_json([[[[[[deep]]]]]])


def test_equal_sets_have_equal_json() -> None:
    one, other = {0, 8}, {8, 0}
    assert list(one) != list(other)  # equal, but not in one order
    assert to_json(one) == to_json(other)
    assert to_json(frozenset("abcdefgh")) == {"$type": "frozenset", "items": list("abcdefgh")}


# --- forged values


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


BOMB = b64(zlib.compress(b"\0" * (64 << 20), 9))
COLLIDING = [{"$type": "int", "text": hex(i * (2**61 - 1))} for i in range(1, 3000)]


@pytest.mark.parametrize(
    "forged",
    [
        {"$type": "nothing"},
        {"$type": None},
        {"$type": ["tuple"]},
        {"$type": {"$type": "tuple"}},
        {"$type": "x" * 10_000},
        {"$type": "tuple"},
        {"$type": "tuple", "items": 3},
        {"$type": "tuple", "items": [], "more": 1},
        {"$type": "tuple", "text": "x"},
        {"$type": "set", "items": [[1]]},
        {"$type": "set", "items": COLLIDING},
        {"$type": "frozenset", "items": COLLIDING},
        {"$type": "dict", "items": [[one, 1] for one in COLLIDING]},
        {"$type": "dict", "items": [[[], 1]]},
        {"$type": "dict", "items": [[1]]},
        {"$type": "dict", "items": {"a": 1}},
        {"$type": "int", "text": "12"},
        {"$type": "int", "text": "0x1_0"},
        {"$type": "int", "text": 5},
        {"$type": "float", "text": "1.0"},
        {"$type": "float", "text": []},
        {"$type": "bytes", "text": "%%%"},
        {"$type": "bytes", "text": "é"},
        {"$type": "bytes", "text": "YWI"},
        {"$type": "bytes", "text": None},
        {"$type": "datetime", "text": "yesterday"},
        {"$type": "datetime", "text": "2" * 100_000},
        {"$type": "date", "text": "2024-13-01"},
        {"$type": "timedelta", "items": [10**10, 0, 0]},
        {"$type": "timedelta", "items": [1]},
        {"$type": "timedelta", "items": ["a", 0, 0]},
        {"$type": "timedelta", "items": [{"$type": "float", "text": "nan"}, 0, 0]},
        {"$type": "complex", "items": ["1", "2"]},
        {"$type": "fraction", "items": [1, 0]},
        {"$type": "fraction", "items": [1.5, 1]},
        {"$type": "decimal", "text": "1e99999999999999999999"},
        {"$type": "decimal", "text": "x"},
        {"$type": "decimal", "text": "1" * 100_000},
        {"$type": "set", "items": [{"$type": "decimal", "text": "sNaN"}]},
        {"$type": "record", "name": "os", "fields": []},
        {"$type": "record", "name": "a b", "fields": {}},
        {"$type": "record", "name": "class", "fields": {}},
        {"$type": "record", "name": "R", "fields": {"x): import os": 1}},
        {"$type": "media", "mime": 3, "text": ""},
        {"$type": "ndarray", "dtype": "|O", "shape": [1], "text": b64(b"12345678")},
        {"$type": "ndarray", "dtype": "O8", "shape": [1], "text": b64(b"12345678")},
        {"$type": "ndarray", "dtype": "<f8, <f8", "shape": [1], "text": b64(b"1" * 16)},
        {"$type": "ndarray", "dtype": [["a", "O"]], "shape": [1], "text": b64(b"1" * 8)},
        {"$type": "ndarray", "dtype": "<f8", "shape": [10**12], "text": ""},
        {"$type": "ndarray", "dtype": "<f8", "shape": [0, 10**9], "text": ""},
        {"$type": "ndarray", "dtype": "<f8", "shape": [10**9, 0], "text": ""},
        {"$type": "ndarray", "dtype": "<f8", "shape": [-1], "text": b64(b"1" * 8)},
        {"$type": "ndarray", "dtype": "<f8", "shape": [1.0], "text": b64(b"1" * 8)},
        {"$type": "ndarray", "dtype": "<f8", "shape": [True], "text": b64(b"1" * 8)},
        {"$type": "ndarray", "dtype": "<f8", "shape": [1] * 64, "text": b64(b"1" * 8)},
        {"$type": "ndarray", "dtype": "<f8", "shape": 1, "text": b64(b"1" * 8)},
        {"$type": "ndarray", "dtype": "<f8", "shape": [2], "text": b64(b"1" * 8)},
        {"$type": "ndarray", "dtype": "<f8", "shape": [1], "text": b64(b"1" * 7)},
        {"$type": "ndarray", "dtype": "<U9999999", "shape": [1], "text": ""},
        {"$type": "ndarray", "dtype": "<U0", "shape": [1 << 30], "text": ""},
        {"$type": "ndarray", "dtype": "<U1", "shape": [1], "text": b64(b"\xff\xff\xff\xff")},
        {"$type": "ndarray", "dtype": "|b1", "shape": [1], "text": b64(b"\x02")},
        {"$type": "scalar", "dtype": "<f8", "text": b64(b"1" * 16)},
        {"$type": "scalar", "dtype": "|V8", "text": b64(b"1" * 8)},
        {"$type": "image", "mode": "RGB", "size": [1, 1], "text": b64(b"no zlib")},
        {"$type": "image", "mode": "RGB", "size": [1, 1], "text": b64(zlib.compress(b"12"))},
        {"$type": "image", "mode": "RGB", "size": [1, 1], "text": b64(zlib.compress(b"123") + b"more")},
        {"$type": "image", "mode": "RGB", "size": [1, 1], "text": b64(zlib.compress(b"123"))[:-4]},
        {"$type": "image", "mode": "RGB", "size": [2**14, 2**14], "text": BOMB},
        {"$type": "image", "mode": "L", "size": [2, 2], "text": BOMB},
        {"$type": "image", "mode": "L", "size": [2**40, 0], "text": ""},
        {"$type": "image", "mode": "L", "size": [-1, -1], "text": b64(zlib.compress(b"1"))},
        {"$type": "image", "mode": "../x", "size": [1, 1], "text": b64(zlib.compress(b"1"))},
        {"$type": "image", "mode": ["L"], "size": [1, 1], "text": b64(zlib.compress(b"1"))},
        (1, 2),
        pytest.param(object(), id="object"),
    ],
    ids=lambda forged: str(forged)[:60],
)
def test_forged_values_are_refused_at_once(forged: Any) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(CrossingError):
            from_json([[forged]], records=True)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_many_images_share_one_bound() -> None:
    pytest.importorskip("PIL.Image")
    one = {"$type": "image", "mode": "L", "size": [1000, 1000], "text": b64(zlib.compress(bytes(1_000_000)))}
    assert len(from_json([one] * 16)) == 16
    with pytest.raises(TooLarge):
        from_json([one] * 17)
    with pytest.raises(TooLarge):
        from_json(one, maximum_bytes=999_999)


FORGED = st.recursive(
    PLAIN | st.sampled_from(["<f8", "|O", "RGB", "YWI=", "0x1f", b64(b"12345678")]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["$type", "items", "text", "dtype", "shape", "size", "a"]), inner, max_size=4)
        | st.builds(
            lambda tag, key, value: {"$type": tag, key: value},
            st.sampled_from(["tuple", "set", "dict", "bytes", "int", "decimal", "timedelta", "complex", "fraction"]),
            st.sampled_from(["items", "text"]),
            inner,
        )
        | st.builds(
            lambda dtype, shape, text: {"$type": "ndarray", "dtype": dtype, "shape": shape, "text": text},
            st.sampled_from(["<f8", "<i1", "|u1", "|b1", "<U1", "|S3", "<M8[ns]", "|O", 3]),
            st.lists(st.integers(-1, 9), max_size=3) | inner,
            st.binary(max_size=64).map(b64) | inner,
        )
    ),
    max_leaves=15,
)


@given(FORGED)
@settings(max_examples=200, deadline=None)
def test_whatever_is_forged_is_a_value_or_a_clean_refusal(forged: Any) -> None:
    try:
        value = from_json(forged)
    except CrossingError:
        return
    assert same(from_json(to_json(value)), value)


def test_reading_never_unpickles(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, lambda *_: pytest.fail("unpickled"))
    payload = pickle.dumps(print)
    assert from_json(to_json(payload)) == payload
    with pytest.raises(CrossingError):
        from_json({"$type": "ndarray", "dtype": "|O", "shape": [1], "text": b64(payload)})


def test_neither_numpy_nor_pillow_is_loaded_for_values_without_them() -> None:
    program = (
        "import sys, datetime; from midstream.crossing import from_json, to_json\n"
        "from_json(to_json([1, (2,), {3}, b'', 2**99, datetime.date(2024, 1, 1), {'a': float('nan')}]))\n"
        "assert not {'numpy', 'PIL', 'pickle'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_an_array_where_numpy_is_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    written = to_json(np.arange(3))
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(CrossingError, match="not installed"):
        from_json(written)


# --- without types


@pytest.mark.parametrize(
    ("value", "becomes"),
    [
        ([(1, {2}), frozenset()], [[1, [2]], []]),
        ({1: (2,), (3, 4): None}, {"1": [2], "[3, 4]": None}),
        (Point(1, [Point(2)]), {"x": 1, "inner": [{"x": 2, "inner": None}]}),
        (np.arange(4.0).reshape(2, 2), [[0.0, 1.0], [2.0, 3.0]]),
        (np.array([np.nan]), ["nan"]),
        (np.float32(2), 2.0),
        (datetime.date(2024, 1, 2), "2024-01-02"),
        (1 + 2j, "(1+2j)"),
        (fractions.Fraction(1, 3), "1/3"),
        (decimal.Decimal("1.50"), "1.50"),
        (b"ab", "YWI="),
        (float("inf"), "inf"),
        (2**70, hex(2**70)),
        (Media("image/png", b"1"), "<image/png>"),
        ({"$type": 1}, {"$type": 1}),
    ],
)
def test_plain_json(value: Any, becomes: Any) -> None:
    assert plain_json(to_json(value)) == becomes
    json.dumps(plain_json(to_json(value)), allow_nan=False)


# --- exceptions


class NotFound(LookupError):
    pass


class Silent(Exception):
    def __str__(self) -> str:
        raise ValueError


@pytest.mark.parametrize(
    ("error", "described", "bases"),
    [
        (ValueError("why"), ExecutionError("ValueError", "why"), (ValueError,)),
        (KeyError("k"), ExecutionError("KeyError", "k"), (KeyError,)),
        (NotFound("x"), ExecutionError("NotFound", "x", base="LookupError"), (LookupError,)),
        (
            json.JSONDecodeError("m", "d", 0),
            ExecutionError("JSONDecodeError", "m: line 1 column 1 (char 0)", base="ValueError"),
            (ValueError,),
        ),
        (Silent(), ExecutionError("Silent", "", base="Exception"), (Exception,)),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), None, (UnicodeError, ValueError)),
        (ExceptionGroup("many", [ValueError()]), None, (Exception,)),
        (KeyboardInterrupt("no"), ExecutionError("KeyboardInterrupt", "no"), (Exception,)),
    ],
)
def test_exceptions_keep_type_and_message(error: BaseException, described: Any, bases: tuple[type, ...]) -> None:
    told = describe_exception(error)
    if described is not None:
        assert told == described
    again = exception_of(told.type, told.message, told.base)
    assert type(again).__name__ == type(error).__name__
    assert isinstance(again, bases)
    assert str(again) == (repr(told.message) if isinstance(again, KeyError) else told.message)


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        (f"no file {sys.executable}!", None),
        ("see /usr/lib/python3/x.py: line 3", "see x.py: line 3"),
        ("'/tmp/secret/key.pem'", "'key.pem'"),
        ("/tmp/", "tmp"),
        ("GET https://host/usr/lib", "GET https://host/usr/lib"),
        ("no page /wiki/Foo", "no page /wiki/Foo"),
        ("1/2 and a/usr/b", "1/2 and a/usr/b"),
    ],
)
def test_paths_of_this_machine_are_cut(message: str, shown: str | None) -> None:
    told = describe_exception(OSError(message)).message
    if shown is None:
        assert "/" not in told
    else:
        assert told == shown


@pytest.mark.parametrize("name", ["eval", "print", "type", "SystemExit", "a b", "", "class", "object", "BaseException"])
def test_a_name_that_is_no_exception_becomes_one(name: str) -> None:
    for base in ("", "print", "SystemExit", "ValueError"):
        error = exception_of(name, "m", base)
        assert isinstance(error, Exception)
        assert str(error) == "m"
        assert isinstance(error, ValueError) == (base == "ValueError")
