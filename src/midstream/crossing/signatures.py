"""What is told of a function to those who may only call it: its signature and its documentation, as data."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import Parameter, Signature
from typing import Any

from midstream.crossing.texts import CrossingError
from midstream.crossing.values import from_json, to_json

_KINDS = (
    Parameter.POSITIONAL_ONLY,
    Parameter.POSITIONAL_OR_KEYWORD,
    Parameter.VAR_POSITIONAL,
    Parameter.KEYWORD_ONLY,
    Parameter.VAR_KEYWORD,
)


class Text:
    """An annotation or a default value that is told by its text alone."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


@dataclass(frozen=True, slots=True)
class Offer:
    """A tool as code is told of it.

    ``signature`` has annotations that are texts (:class:`Text`, or types), and defaults that are values; None
    where nothing is known of it, and any arguments are taken.
    """

    description: str = ""
    signature: Signature | None = None

    def as_json(self) -> dict[str, Any]:
        if self.signature is None:
            return {"description": self.description, "parameters": None, "returns": None}
        parameters = [_parameter_as_json(parameter) for parameter in self.signature.parameters.values()]
        returns = _text_of(self.signature.return_annotation)
        return {"description": self.description, "parameters": parameters, "returns": returns}

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Offer:
        """The offer that a host has told: nothing is checked."""
        if told["parameters"] is None:
            return cls(told["description"])
        parameters = [
            Parameter(
                one["name"],
                _KINDS[one["kind"]],
                default=from_json(one["default"][0], records=True) if one["default"] else _no_value(one),
                annotation=_annotation(one["annotation"]),
            )
            for one in told["parameters"]
        ]
        return cls(told["description"], Signature(parameters, return_annotation=_annotation(told["returns"])))


def _parameter_as_json(parameter: Parameter) -> dict[str, Any]:
    default: list[Any] | None = None
    if parameter.default is not Parameter.empty:
        try:
            default = [to_json(parameter.default)]
        except CrossingError:
            default = []
    return {
        "name": parameter.name,
        "kind": _KINDS.index(parameter.kind),
        "annotation": _text_of(parameter.annotation),
        "default": default,
    }


def _no_value(told: Mapping[str, Any]) -> Any:
    return Parameter.empty if told["default"] is None else Text("...")


def _text_of(annotation: Any) -> str | None:
    return None if annotation is Parameter.empty else inspect.formatannotation(annotation)


def _annotation(text: str | None) -> Any:
    if text is None:
        return Parameter.empty
    if "{" in text:  # fields of a class, which Python would take for a dict
        return Text(text)
    try:  # by hosts only: see from_json
        value = eval(text, {"__builtins__": _TYPES})  # noqa: S307
    except Exception:  # noqa: BLE001  # a name that is not here
        return Text(text)
    return value if isinstance(value, type | types.GenericAlias | types.UnionType) else Text(text)


_TYPES: dict[str, Any] = {
    kind.__name__: kind
    for kind in (str, int, float, bool, complex, bytes, bytearray, list, tuple, dict, set, frozenset, object)
}


def annotations_of(signature: Signature) -> dict[str, Any]:
    """As a function has them in ``__annotations__``."""
    found = {one.name: one.annotation for one in signature.parameters.values()} | {
        "return": signature.return_annotation
    }
    return {name: annotation for name, annotation in found.items() if annotation is not Parameter.empty}


def checker(name: str, signature: Signature | None) -> Callable[..., None]:
    """A function that takes what ``signature`` takes and does nothing: Python itself words its complaints."""
    if signature is None:
        return lambda *_arguments, **_keywords: None
    parts: list[str] = []
    seen_star = False
    parameters = list(signature.parameters.values())
    for place, parameter in enumerate(parameters):
        if parameter.kind is Parameter.KEYWORD_ONLY and not seen_star:
            parts.append("*")
            seen_star = True
        if parameter.kind is Parameter.VAR_POSITIONAL:
            parts.append("*" + parameter.name)
            seen_star = True
        elif parameter.kind is Parameter.VAR_KEYWORD:
            parts.append("**" + parameter.name)
        else:
            parts.append(parameter.name + ("" if parameter.default is Parameter.empty else "=None"))
        last = place + 1 == len(parameters) or parameters[place + 1].kind is not Parameter.POSITIONAL_ONLY
        if parameter.kind is Parameter.POSITIONAL_ONLY and last:
            parts.append("/")
    namespace: dict[str, Any] = {}
    # Every name in it is an identifier: inspect.Parameter takes no other.
    exec(compile(f"def {name}({', '.join(parts)}): pass", "<sandbox signature>", "exec"), namespace)  # noqa: S102
    made: Callable[..., None] = namespace[name]
    return made


def signature_text(signature: Signature | None) -> str:
    """As Python writes it: ``(query: str, k: int = 5) -> list[str]``."""
    return "(*args, **kwargs)" if signature is None else str(signature)
