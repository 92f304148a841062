"""What a tool's annotations are to a model: text, JSON schema, and values that JSON brought."""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import datetime
import decimal
import enum
import inspect
import sys
import threading
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec

Empty = inspect.Parameter.empty

_ARRAYS = (
    list,
    collections.abc.Sequence,
    collections.abc.MutableSequence,
    collections.abc.Iterable,
    collections.abc.Collection,
)
_learning = threading.Lock()
_SETS = (set, frozenset, collections.abc.Set, collections.abc.MutableSet)
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)
_NAMES = {
    collections.abc.Sequence: "list",
    collections.abc.MutableSequence: "list",
    collections.abc.Iterable: "list",
    collections.abc.Collection: "list",
    collections.abc.Set: "set",
    collections.abc.MutableSet: "set",
    collections.abc.Mapping: "dict",
    collections.abc.MutableMapping: "dict",
}
_SIMPLE: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    decimal.Decimal: {"type": "number"},
    complex: {"type": "string", "description": "a complex number, as 1+2j"},
    type(None): {"type": "null"},
    bytes: {"type": "string", "contentEncoding": "base64"},
    bytearray: {"type": "string", "contentEncoding": "base64"},
    datetime.datetime: {"type": "string", "format": "date-time"},
    datetime.date: {"type": "string", "format": "date"},
    datetime.time: {"type": "string", "format": "time"},
    datetime.timedelta: {"type": "string", "format": "duration"},
}


def _bare(annotation: Any) -> Any:
    """Without ``Annotated``, ``Required`` and the like."""
    while get_origin(annotation) in (Annotated, typing.Required, typing.NotRequired):
        annotation = get_args(annotation)[0]
    return annotation


def _members(annotation: Any) -> tuple[Any, ...] | None:
    """The members of a union, or None."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else None


def fields_of(kind: Any) -> dict[str, tuple[Any, bool]] | None:
    """The fields of a dataclass, a TypedDict or a named tuple: annotation, and whether it must be given."""
    if not isinstance(kind, type):
        return None
    if dataclasses.is_dataclass(kind):
        hints = hints_of(kind)
        missing = dataclasses.MISSING
        return {
            field.name: (hints.get(field.name, Any), field.default is missing and field.default_factory is missing)
            for field in dataclasses.fields(kind)
            if field.init
        }
    if typing.is_typeddict(kind):
        required: frozenset[str] = getattr(kind, "__required_keys__", frozenset())
        return {name: (hint, _must_be_given(hint, name in required)) for name, hint in hints_of(kind).items()}
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        hints, defaults = hints_of(kind), getattr(kind, "_field_defaults", {})
        return {name: (hints.get(name, Any), name not in defaults) for name in kind._fields}
    return None


def _must_be_given(hint: Any, otherwise: bool) -> bool:
    # What Python lists as required is wrong where annotations are texts.
    origin = get_origin(hint)
    return otherwise if origin not in (typing.Required, typing.NotRequired) else origin is typing.Required


def hints_of(function: Any) -> dict[str, Any]:
    """Its annotations, evaluated where that is possible and as text where it is not."""
    try:
        return typing.get_type_hints(function, include_extras=True)
    except Exception:  # noqa: BLE001  # names that are there for type checkers only, and faulty annotations
        given = getattr(function, "__annotations__", {})
        module = sys.modules.get(getattr(function, "__module__", None) or "")
        names = getattr(function, "__globals__", None) or getattr(module, "__dict__", {})
        return {name: _evaluated(value, names) for name, value in given.items()}


def _evaluated(annotation: Any, names: Mapping[str, Any]) -> Any:
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, dict(names))  # noqa: S307  # as typing.get_type_hints does
    except Exception:  # noqa: BLE001
        return annotation


# --- text


def text_of(annotation: Any, within: tuple[Any, ...] = (), *, returned: bool = False) -> str:
    """An annotation as a model should read it: without modules' names, and classes of fields written out.

    A dataclass is given as a dict, and ``returned`` as an object with attributes. ``within``: the classes that
    are being written out; one that holds itself is not written again.
    """
    annotation = _bare(annotation)
    if isinstance(annotation, str):
        return annotation
    if annotation in (None, type(None)):
        return "None"
    members = _members(annotation)
    if members is not None:
        return " | ".join(dict.fromkeys(text_of(member, within, returned=returned) for member in members))
    if get_origin(annotation) is Literal:
        return f"Literal[{', '.join(repr(_plain(value)) for value in get_args(annotation))}]"
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return f"Literal[{', '.join(repr(member.value) for member in annotation)}]"
    fields = fields_of(annotation)
    if fields is not None:
        return _fields_text(annotation, fields, within, returned and dataclasses.is_dataclass(annotation))
    origin = get_origin(annotation)
    if origin is collections.abc.Callable or _is_array(origin):
        return text_of(origin)
    if origin is not None:
        arguments = [
            "..." if item is ... else text_of(item, within, returned=returned) for item in get_args(annotation)
        ]
        return f"{_NAMES.get(origin, getattr(origin, '__name__', str(origin)))}[{', '.join(arguments)}]"
    if annotation in _NAMES:
        return _NAMES[annotation]
    if annotation is Any:
        return "Any"
    return _class_text(annotation)


def _fields_text(kind: Any, fields: Mapping[str, tuple[Any, bool]], within: tuple[Any, ...], made: bool) -> str:
    if kind in within:
        return str(kind.__name__) if made else "dict"
    texts = {name: text_of(hint, (*within, kind), returned=made) for name, (hint, _) in fields.items()}
    if made:
        return f"{kind.__name__}({', '.join(f'{name}: {text}' for name, text in texts.items())})"
    return "{" + ", ".join(f"{name!r}: {text}" for name, text in texts.items()) + "}"


def _class_text(annotation: Any) -> str:
    if not isinstance(annotation, type):
        return str(annotation).replace("typing.", "")
    module, name = annotation.__module__, annotation.__qualname__
    if module in ("datetime", "decimal", "fractions", "numpy"):
        return f"{module}.{name}"
    return "PIL.Image.Image" if module == "PIL.Image" else name.rpartition(".")[2]


def _is_array(kind: Any) -> bool:
    return isinstance(kind, type) and kind.__module__ == "numpy" and kind.__name__ == "ndarray"


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, enum.Enum) else value


# --- schema


def schema_of(annotation: Any, within: tuple[Any, ...] = ()) -> dict[str, Any]:
    """The JSON schema of values for an annotation; ``{}``, which is anything, where JSON cannot say it."""
    described = description_of(annotation)
    schema = _schema_of(_bare(annotation), within)
    return {**schema, "description": described} if described else schema


def description_of(annotation: Any) -> str:
    """What ``Annotated[int, "How many."]`` says beside the type, or nothing."""
    return next((item for item in getattr(annotation, "__metadata__", ()) if isinstance(item, str)), "")


def _schema_of(annotation: Any, within: tuple[Any, ...]) -> dict[str, Any]:
    if annotation is None:
        return dict(_SIMPLE[type(None)])
    try:
        simple = _SIMPLE.get(annotation)
    except TypeError:
        simple = None
    if simple is not None:
        return dict(simple)
    members = _members(annotation)
    if members is not None:
        return _union_schema([schema_of(member, within) for member in members])
    if get_origin(annotation) is Literal:
        return _enum_schema([_plain(value) for value in get_args(annotation)])
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return _enum_schema([member.value for member in annotation])
    fields = fields_of(annotation)
    if fields is not None:
        return {"type": "object"} if annotation in within else _object_schema(fields, (*within, annotation))
    origin = get_origin(annotation) or annotation
    if _is_array(origin):
        return {"type": "array"}
    return _container_schema(origin, get_args(annotation), within)


def _container_schema(origin: Any, arguments: tuple[Any, ...], within: tuple[Any, ...]) -> dict[str, Any]:
    if origin is tuple:
        if not arguments or arguments[-1] is ...:
            return {"type": "array", **({"items": schema_of(arguments[0], within)} if arguments else {})}
        parts = [schema_of(item, within) for item in arguments]
        return {"type": "array", "prefixItems": parts, "minItems": len(parts), "maxItems": len(parts)}
    if origin in _ARRAYS or origin in _SETS:
        schema: dict[str, Any] = {"type": "array"}
        items = schema_of(arguments[0], within) if arguments else {}
        if items:
            schema["items"] = items
        return {**schema, "uniqueItems": True} if origin in _SETS else schema
    if origin in _MAPPINGS:
        values = schema_of(arguments[1], within) if len(arguments) == 2 else {}
        return {"type": "object", **({"additionalProperties": values} if values else {})}
    return {}


def _union_schema(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    if any(not schema for schema in schemas):
        return {}
    if all(set(schema) == {"type"} for schema in schemas):
        return {"type": [schema["type"] for schema in schemas]}
    return {"anyOf": schemas}


def _enum_schema(values: list[Any]) -> dict[str, Any]:
    names = {bool: "boolean", str: "string", int: "integer", float: "number"}
    kinds = {names[type(value)] for value in values if type(value) in names}
    one_kind = len(kinds) == 1 and all(type(value) in names for value in values)
    return {"type": kinds.pop(), "enum": values} if one_kind else {"enum": values}


def _object_schema(fields: Mapping[str, tuple[Any, bool]], within: tuple[Any, ...]) -> dict[str, Any]:
    required = [name for name, (_, must) in fields.items() if must]
    properties = {name: schema_of(hint, within) for name, (hint, _) in fields.items()}
    return {"type": "object", "properties": properties, "required": required}


# --- values


def converter(annotation: Any) -> Callable[[Any, bool], Any]:
    """``convert(value, from_json)``: what the annotation means by a value that crossed.

    Where ``from_json``, the value came as JSON alone (texts stand for bytes, say), and one that does not fit
    raises ValueError, which says what was wanted. Otherwise it came from Python, where annotations bind
    nobody: what does not fit stays as it is.
    """
    bare = _bare(annotation)
    if _is_array(get_origin(bare)):
        bare = get_origin(bare)  # of which dtype and shape, nobody can hold it to
    if bare in (Any, Empty, object) or isinstance(bare, str):
        return lambda value, _from_json: value
    _learn(bare)

    def convert(value: Any, from_json: bool) -> Any:
        if type(value) is bare:
            return value
        natives = () if from_json else (bytes, bytearray)
        try:
            return msgspec.convert(_listed(value, bare), bare, dec_hook=_foreign, builtin_types=natives)
        except msgspec.ValidationError as error:
            if from_json:
                raise ValueError(str(error)) from None
        except TypeError:  # an annotation that is beyond msgspec, such as a union of two classes
            pass
        return value

    return convert


def _learn(annotation: Any) -> None:
    """Have msgspec learn its classes now: threads that are first at the same time crash the process."""
    with _learning, contextlib.suppress(TypeError):  # for an annotation that is beyond msgspec
        msgspec.json.Decoder(annotation)


def _listed(value: Any, wanted: Any) -> Any:
    """numpy's values as Python's, where the annotation knows nothing of numpy."""
    if type(value).__module__ != "numpy" or "numpy" in str(wanted):
        return value
    return value.tolist() if hasattr(value, "tolist") else value


def _foreign(wanted: type, value: Any) -> Any:
    if isinstance(value, wanted):
        return value
    if wanted.__module__ == "numpy" and wanted.__name__ == "ndarray" and isinstance(value, list | tuple):
        import numpy

        return numpy.asarray(value)
    if wanted is complex and isinstance(value, str | int | float):
        return complex(value)
    raise ValueError(f"Expected `{text_of(wanted)}`, got `{type(value).__name__}`")
