"""A tool's JSON schema, as a Python signature and a docstring.

The schema language is JSON Schema 2020-12, of which an MCP tool's ``inputSchema`` is always an object. What has
no Python annotation of its own (a pattern, a range) is told in the docstring's words, as far as the schema's own
descriptions do; the server checks it.
"""

from __future__ import annotations

import inspect
import keyword
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union

_SIMPLE: Mapping[str, Any] = {"string": str, "integer": int, "number": float, "boolean": bool, "null": None}
DEPTH = 8
"""How deep a type is spelled out; recursive schemas have no end."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """How a tool is called in Python, and which of the schema's properties each argument is."""

    signature: inspect.Signature
    properties: Mapping[str, str]
    """From the parameter's name to the property's: they differ where a property's is no Python name."""
    documentation: Mapping[str, str]
    """A line on each parameter that the schema describes."""
    others: str | None = None
    """The parameter (``**kwargs``) that takes properties which the schema allows without naming them."""

    def arguments(self, positional: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Any]:
        """The object that the server is sent: what was given, and nothing that was left out.

        Raises TypeError, in Python's words, for arguments that do not fit the signature.
        """
        bound = self.signature.bind(*positional, **named)
        others = bound.arguments.pop(self.others, {}) if self.others is not None else {}
        given = {self.properties[name]: value for name, value in bound.arguments.items()}
        for name, value in others.items():
            if name in given:  # such as from_=1, **{"from": 2}
                raise TypeError(f"got multiple values for argument {name!r}")
            given[name] = value
        return given


def parameters(schema: Mapping[str, Any], output_schema: Mapping[str, Any] | None = None) -> Parameters:
    """The parameters of a tool whose input is described by ``schema``: the required ones first.

    A parameter that may be left out has the schema's default, or ``...``. Where the schema says that there may be
    more properties, there is a ``**kwargs`` for them. ``output_schema`` gives what is returned.
    """
    properties: Mapping[str, Any] = schema.get("properties") or {}
    required = [name for name in schema.get("required") or () if name in properties]
    names: dict[str, str] = {}
    found: list[inspect.Parameter] = []
    documentation: dict[str, str] = {}
    for name in [*required, *(name for name in properties if name not in required)]:
        described = properties[name] if isinstance(properties[name], Mapping) else {}
        python_name = python_identifier(name, names)
        names[python_name] = name
        default = inspect.Parameter.empty if name in required else described.get("default", ...)
        annotation = annotation_of(described, schema)
        found.append(
            inspect.Parameter(
                python_name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=annotation
            )
        )
        text = described.get("description")
        if isinstance(text, str) and text.strip():
            documentation[python_name] = " ".join(text.split())
    others = None
    more = schema.get("additionalProperties")
    if more is True or isinstance(more, Mapping):  # where it is not said, none are meant
        others = python_identifier("kwargs", names)
        found.append(inspect.Parameter(others, inspect.Parameter.VAR_KEYWORD, annotation=annotation_of(more, schema)))
    returned = inspect.Signature.empty
    if output_schema is not None:
        returned = annotation_of(wrapped_result(output_schema) or output_schema, output_schema)
    return Parameters(inspect.Signature(found, return_annotation=returned), names, documentation, others)


def wrapped_result(output_schema: Mapping[str, Any] | None) -> Any:
    """The schema of a value that is no object, which servers put under ``result``; None where there is none."""
    described = (output_schema or {}).get("properties")
    return described["result"] if isinstance(described, Mapping) and set(described) == {"result"} else None


def docstring(description: str | None, described: Parameters) -> str:
    """A docstring with the tool's description and a line for each parameter that has one."""
    text = inspect.cleandoc(description or "")
    if not described.documentation:
        return text
    lines = [f"    {name}: {line}" for name, line in described.documentation.items()]
    return "\n".join([text, "", "Args:", *lines] if text else ["Args:", *lines])


def annotation_of(schema: Any, root: Mapping[str, Any], depth: int = 0) -> Any:
    """The Python type that JSON values of ``schema`` arrive as; ``Any`` where it does not say."""
    if not isinstance(schema, Mapping) or depth > DEPTH:
        return Any
    if isinstance(reference := schema.get("$ref"), str):
        return annotation_of(_resolved(reference, root), root, depth + 1)
    if "const" in schema:
        return _literal([schema["const"]])
    if isinstance(values := schema.get("enum"), list) and values:
        return _literal(values)
    for key in ("anyOf", "oneOf"):
        if isinstance(choices := schema.get(key), list) and choices:
            return _union([annotation_of(choice, root, depth + 1) for choice in choices])
    if isinstance(parts := schema.get("allOf"), list) and len(parts) == 1:
        return annotation_of(parts[0], root, depth + 1)
    kind = schema.get("type")
    if isinstance(kind, list) and kind:
        return _union([annotation_of({**schema, "type": one}, root, depth + 1) for one in kind])
    if kind == "array":
        return list[annotation_of(schema.get("items"), root, depth + 1)]  # type: ignore[misc]
    if kind == "object":
        return dict[str, annotation_of(schema.get("additionalProperties"), root, depth + 1)]  # type: ignore[misc]
    return _SIMPLE.get(kind, Any) if isinstance(kind, str) else Any


def python_identifier(name: str, taken: Mapping[str, Any]) -> str:
    """``name`` as a Python name that is not in ``taken``: other characters become underscores."""
    # Python reads names in this normal form, so two that are one in it would be one name.
    normal = unicodedata.normalize("NFKC", name)
    identifier = "".join(character if f"_{character}".isidentifier() else "_" for character in normal) or "_"
    if keyword.iskeyword(identifier):
        identifier = f"{identifier}_"
    elif not identifier.isidentifier():
        identifier = f"_{identifier}"
    free, number = identifier, 2
    while free in taken:
        free, number = f"{identifier}_{number}", number + 1
    return free


def _resolved(reference: str, root: Mapping[str, Any]) -> Any:
    """What a reference within the same schema (``#/$defs/Name``) points at, or nothing."""
    if not reference.startswith("#/"):
        return None
    found: Any = root
    for part in reference[2:].split("/"):
        key = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, Mapping) or key not in found:
            return None
        found = found[key]
    return found


def _literal(values: list[Any]) -> Any:
    if all(value is None or isinstance(value, str | int | bool) for value in values):
        return Literal[tuple(values)]
    return Any


def _union(choices: list[Any]) -> Any:
    return Any if Any in choices else Union[tuple(choices)]  # noqa: UP007  # the number of choices is the schema's
