"""What arguments are held to before any work starts. Each error names the field, the value and what would be right.

Numbers of numpy's are taken for what they are, and given back as Python's own.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from midstream.errors import ConfigurationError


def require(condition: bool, name: str, value: object, wanted: str) -> None:
    """Raise :class:`ConfigurationError` unless ``condition`` holds."""
    if not condition:
        raise ConfigurationError(f"{name}={value!r}: {wanted}")


def integer(name: str, value: Any, least: int | None = None, *, optional: bool = False) -> Any:
    """``value`` as an int of at least ``least``; None, where that may be, as it is."""
    if value is None and optional:
        return None
    try:
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    if found is None or (least is not None and found < least):
        wanted = "must be an integer" + ("" if least is None else f" of at least {least}")
        raise ConfigurationError(f"{name}={value!r}: {wanted}{', or None' if optional else ''}")
    return found


def is_number(value: object) -> bool:
    """Whether it is a finite number, and neither a bool nor a text of one."""
    return not isinstance(value, bool) and isinstance(value, numbers.Real) and math.isfinite(value)


def number(name: str, value: Any, fits: Callable[[float], bool], wanted: str) -> Any:
    """``value`` as Python's own number. ``fits``: whether a finite number is in range."""
    require(is_number(value) and fits(value), name, value, wanted)
    return value if isinstance(value, int | float) else float(value)


def flag(name: str, value: object) -> None:
    """Raise unless it is True or False."""
    require(isinstance(value, bool), name, value, "must be True or False")


def instance(name: str, value: object, kind: type, *, optional: bool = False) -> None:
    """Raise unless it is a ``kind``, or None where that may be."""
    if not isinstance(value, kind) and not (optional and value is None):
        named = "a string" if kind is str else "a mapping" if kind is Mapping else kind.__name__
        raise ConfigurationError(f"{name}={value!r}: must be {named}{' or None' if optional else ''}")


def items(name: str, value: Any, of: str) -> tuple[Any, ...]:
    """What a sequence holds: of ids, texts and the like, which one text or one mapping is not."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise ConfigurationError(f"{name}={value!r}: must be a sequence of {of}, not one {type(value).__name__}")
    return tuple(value)


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """Token ids as Python's integers."""
    found = []
    for item in items(name, value, "token ids"):
        try:
            found.append(operator.index(item))
        except TypeError:
            raise ConfigurationError(f"{name}: holds {item!r}; token ids are integers") from None
    return tuple(found)


def json_value(name: str, value: object) -> None:
    """Raise where it holds what JSON lacks."""
    match value:
        case None | bool() | int() | str():
            return
        case float():
            require(math.isfinite(value), name, value, "must be finite, as numbers in JSON are")
        case Mapping():
            for key, item in value.items():
                require(isinstance(key, str), name, key, "the keys of a mapping in JSON are strings")
                json_value(f"{name}[{key!r}]", item)
        case list() | tuple():
            for place, item in enumerate(value):
                json_value(f"{name}[{place}]", item)
        case _:
            raise ConfigurationError(f"{name}={value!r}: JSON has no {type(value).__name__}; give what it has")
