"""What is read off a function to make a tool of it: its parameters, their types, and what its docstring says."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import Parameter, Signature
from types import MappingProxyType
from typing import Any, get_args, get_origin

from midstream.crossing import Offer, checker
from midstream.crossing.signatures import Text
from midstream.errors import ConfigurationError
from midstream.tools.annotations import converter, description_of, hints_of, schema_of, text_of
from midstream.tools.docstrings import Docstring, parse


@dataclass(frozen=True, slots=True)
class ToolContext:
    """Whose call it is. A parameter annotated with this class is given it, and the model is not told of it.

    ``prompt_id``, ``group``, ``metadata``: the prompt's; ``sample``: which of its samples; ``seed``: the
    prompt's seed. Outside of a row they are empty.
    """

    prompt_id: str | None = None
    group: str | None = None
    sample: int = 0
    seed: int = 0
    metadata: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class Interface:
    """A tool's signature as the model sees it, with annotations as objects, and what is done with arguments.

    ``context``: the parameter that takes the :class:`ToolContext`, or None.
    """

    name: str
    signature: Signature | None
    docstring: Docstring
    context: str | None
    check: Callable[..., None]
    converters: Mapping[str, Callable[[Any, bool], Any]]

    def bind(
        self, arguments: Sequence[Any], keyword_arguments: Mapping[str, Any], *, from_json: bool = False
    ) -> inspect.BoundArguments:
        """The arguments by parameter, converted as the annotations say, defaults left out.

        Raises TypeError, worded as Python would, for arguments that do not fit the signature, and where they
        came ``from_json``, for values that do not fit the annotations.
        """
        self.check(*arguments, **keyword_arguments)
        signature = self.signature or _ANYTHING
        bound = signature.bind(*arguments, **keyword_arguments)
        for name, value in bound.arguments.items():
            bound.arguments[name] = self._converted(signature.parameters[name], value, from_json)
        return bound

    def _converted(self, parameter: Parameter, value: Any, from_json: bool) -> Any:
        convert = self.converters.get(parameter.name)
        if convert is None:
            return value
        try:
            if parameter.kind is Parameter.VAR_POSITIONAL:
                return tuple(convert(item, from_json) for item in value)
            if parameter.kind is Parameter.VAR_KEYWORD:
                return {key: convert(item, from_json) for key, item in value.items()}
            return convert(value, from_json)
        except ValueError as error:
            raise TypeError(f"{self.name}() argument {parameter.name!r}: {error}") from None

    @property
    def text_signature(self) -> Signature | None:
        """With annotations as texts, for whoever only calls it."""
        if self.signature is None:
            return None
        parameters = [
            parameter.replace(annotation=_text(parameter.annotation))
            for parameter in self.signature.parameters.values()
        ]
        return Signature(parameters, return_annotation=_text(self.signature.return_annotation, returned=True))

    @property
    def documentation(self) -> str:
        """What it does, takes and gives, in the style of Google."""
        shown = self.signature.parameters if self.signature is not None else self.docstring.parameters
        arguments = [
            f"    {name}: {text}" for name, text in self.docstring.parameters.items() if name in shown and text
        ]
        parts = [self.docstring.text] if self.docstring.text else []
        if arguments:
            parts.append("\n".join(["Args:", *arguments]))
        if self.docstring.returns:
            parts.append(f"Returns:\n    {self.docstring.returns}")
        return "\n\n".join(parts)

    @property
    def offer(self) -> Offer:
        return Offer(self.documentation, self.text_signature)

    @property
    def parameters_schema(self) -> dict[str, Any]:
        """The JSON schema of the arguments by name, as one object."""
        if self.signature is None:
            return {"type": "object", "properties": {}}
        properties, required, more = {}, [], False
        for name, parameter in self.signature.parameters.items():
            if parameter.kind is Parameter.VAR_KEYWORD:
                more = True
            elif parameter.kind is not Parameter.VAR_POSITIONAL:
                properties[name] = self._property(name, parameter)
                if parameter.default is Parameter.empty:
                    required.append(name)
        schema = {"type": "object", "properties": properties, "required": required}
        return {**schema, "additionalProperties": True} if more else schema

    def _property(self, name: str, parameter: Parameter) -> dict[str, Any]:
        schema = {} if parameter.annotation is Parameter.empty else schema_of(parameter.annotation)
        if self.docstring.parameters.get(name):
            schema["description"] = self.docstring.parameters[name]
        if parameter.default is None or type(parameter.default) in (str, int, float, bool):
            schema["default"] = parameter.default
        return schema


_ANYTHING = Signature([Parameter("args", Parameter.VAR_POSITIONAL), Parameter("kwargs", Parameter.VAR_KEYWORD)])


def interface_of(
    name: str, function: Any, *, listed: bool = False, description: str | None = None, per_row: bool = False
) -> Interface:
    """Read a callable. ``listed``: it takes and gives lists, one item a call. ``per_row``: it makes the tool.

    Raises :class:`~midstream.errors.ConfigurationError` where it cannot be called as a tool is.
    """
    target = _product_of(name, function) if per_row else function
    source = _source_of(target)
    hints = hints_of(source)
    signature = _signature_of(target, drop_self=per_row)
    context = None
    if signature is not None:
        signature, context = _split_context(name, signature, hints)
        signature = _annotated(signature, hints, listed)
    docstring = parse(_documentation_of(target, source))
    if description is not None:
        docstring = Docstring(description, docstring.parameters, docstring.returns)
    parameters = signature.parameters if signature is not None else {}
    annotated = {one.name: description_of(one.annotation) for one in parameters.values()}
    told = {**{each: text for each, text in annotated.items() if text}, **docstring.parameters}
    docstring = replace(docstring, parameters=told)
    converters = {one.name: converter(one.annotation) for one in parameters.values()}
    return Interface(name, signature, docstring, context, checker(name, signature), converters)


def parameters_of(function: Any) -> tuple[str, ...]:
    """The names of a callable's parameters; none where it does not say."""
    try:
        return tuple(inspect.signature(function).parameters)
    except (ValueError, TypeError):
        return ()


def _product_of(name: str, factory: Any) -> Any:
    """The class whose instances a factory makes."""
    kind = factory if isinstance(factory, type) else hints_of(_source_of(factory)).get("return")
    if not isinstance(kind, type) or not callable(getattr(kind, "__call__", None)):  # noqa: B004
        raise ConfigurationError(
            f"tool {name!r}: per_row needs a class that has __call__, or a function annotated as returning one"
        )
    return kind


def _source_of(function: Any) -> Any:
    """The function that has the annotations and the docstring."""
    while isinstance(function, functools.partial):
        function = function.func
    if inspect.isroutine(function):
        return inspect.unwrap(function)
    return (function if isinstance(function, type) else type(function)).__call__


def _signature_of(target: Any, drop_self: bool) -> Signature | None:
    try:
        if not drop_self:
            return inspect.signature(target)
        signature = inspect.signature(target.__call__)
    except (ValueError, TypeError):  # built-in functions that do not say
        return None
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _documentation_of(target: Any, source: Any) -> str | None:
    if inspect.isroutine(source) and source.__doc__ and getattr(source, "__name__", "") != "__call__":
        return inspect.getdoc(source)
    own = source.__doc__ if inspect.isfunction(source) else None
    kind = target if isinstance(target, type) else type(target)
    return own or (None if kind.__module__ in ("builtins", "functools") else kind.__doc__)


def _split_context(name: str, signature: Signature, hints: Mapping[str, Any]) -> tuple[Signature, str | None]:
    found = [one for one in signature.parameters.values() if _is_context(hints.get(one.name))]
    if not found:
        return signature, None
    if len(found) > 1 or found[0].kind not in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY):
        raise ConfigurationError(f"tool {name!r}: one parameter that can be given by name may be a ToolContext")
    context = found[0].name
    kept, behind = [], False
    for one in signature.parameters.values():
        # What stands behind it can be given by position to the model's function only, and is passed by name.
        if one.name != context:
            behind = behind or one.kind is Parameter.VAR_POSITIONAL
            kept.append(one)
    if behind and found[0].kind is not Parameter.KEYWORD_ONLY:
        raise ConfigurationError(f"tool {name!r}: with *arguments, the ToolContext must be a keyword-only parameter")
    return signature.replace(parameters=kept), context


def _is_context(hint: Any) -> bool:
    if isinstance(hint, str):  # imported for type checkers only
        return hint.rpartition(".")[2].partition("|")[0].strip() == "ToolContext"
    return hint is ToolContext or ToolContext in get_args(hint)


def _annotated(signature: Signature, hints: Mapping[str, Any], listed: bool) -> Signature:
    def of(hint: Any) -> Any:
        arguments = get_args(hint)
        if listed and get_origin(hint) is not None and len(arguments) == 1:
            return arguments[0]
        return Parameter.empty if listed else hint

    parameters = [
        one.replace(annotation=of(hints[one.name]) if one.name in hints else one.annotation)
        for one in signature.parameters.values()
    ]
    returned = hints.get("return", signature.return_annotation)
    if returned is not Signature.empty:
        returned = of(returned)
    return Signature(parameters, return_annotation=returned)


def _text(annotation: Any, returned: bool = False) -> Any:
    return annotation if annotation is Parameter.empty else Text(text_of(annotation, returned=returned))
