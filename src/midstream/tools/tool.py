"""A tool: a Python callable under a name that a model may use, and how its calls are run."""

from __future__ import annotations

import inspect
import keyword
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, overload, runtime_checkable

from midstream.crossing import Offer
from midstream.errors import ConfigurationError
from midstream.tools.interface import Interface, interface_of, parameters_of

if TYPE_CHECKING:
    from midstream.markup import Markup

Batched = bool | Callable[..., Sequence[Any]]
Style = Literal["text", "stubs", "json"]
Place = Literal["caller", "sandbox"]


@dataclass(frozen=True, kw_only=True)
class Tool:
    """``function``, sync or async, callable as ``name`` from the code that a model writes.

    Its signature, annotations and docstring are what the model is told. A parameter annotated with
    :class:`~midstream.tools.ToolContext` is given the row that calls, and the model is not told of it.

    - ``description``: in place of the docstring's text.
    - ``batched``: calls that come close together are answered at once. True: ``function`` takes a list for
      each of its parameters, one item a call (defaults are of one call), and returns as many answers. Or a
      function that does so, with ``function`` giving the signature of one call. An answer that is an exception
      is raised in its own call alone.
    - ``batch_size``: calls of one batch at most; ``batch_window``: seconds that the first of them waits for more.
    - ``pure``: equal arguments have equal values: they are remembered, and asked for once. Where a batch of a
      pure tool fails, its calls are tried one by one.
    - ``deadline``: seconds from a call to its answer, waiting and retries included; then it is a TimeoutError.
    - ``concurrency``: executions at a time; for batched tools 1 by default, for others no bound of its own.
    - ``retries``: how often an execution is tried again after one of the exceptions ``retry_on``.
    - ``calls_per_row``: calls that one row may make.
    - ``per_row``: ``function`` is a factory, such as a class: each row gets what it returns, called with the
      row's ToolContext if it takes an argument. What it made is closed with the row if it has ``close``.
    - ``place``: where calls are run: ``"caller"``, in the process that generates; or ``"sandbox"``, beside the sandbox
      and outside of it, on the node where that is. On a cluster each node has a copy of the function then, which
      must be one that can be pickled, and what is counted or remembered is so for each node by itself. On one
      machine it is the same.
    - ``parameters``: the JSON schema of the arguments, in place of the one that the annotations give.
    - ``argument_names``: from properties of that schema to the parameters that they are, where the two have not
      one name (``{"from": "from_"}``): calls in JSON may use either.

    Raises :class:`~midstream.errors.ConfigurationError` naming the option that cannot work.
    """

    name: str = field(kw_only=False)
    function: Callable[..., Any] = field(kw_only=False)
    description: str | None = None
    batched: Batched = False
    batch_size: int = 256
    batch_window: float = 0.002
    pure: bool = False
    deadline: float | None = None
    concurrency: int | None = None
    retries: int = 0
    retry_on: tuple[type[Exception], ...] = (OSError,)
    calls_per_row: int | None = None
    per_row: bool = False
    place: Place = "caller"
    parameters: Mapping[str, Any] | None = None
    argument_names: Mapping[str, str] | None = None
    interface: Interface = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier() or keyword.iskeyword(self.name):
            raise ConfigurationError(f"tool name={self.name!r}: must be a Python identifier")
        if not callable(self.function):
            raise ConfigurationError(f"tool {self.name!r}: {self.function!r} is not callable")
        self._check_options()
        interface = interface_of(
            self.name,
            self.function,
            listed=self.batched is True,
            description=self.description,
            per_row=self.per_row,
        )
        object.__setattr__(self, "interface", interface)
        self._check_interface(interface)
        object.__setattr__(self, "__name__", self.name)
        object.__setattr__(self, "__doc__", self.function.__doc__)
        object.__setattr__(self, "__wrapped__", self.function)

    def _check_options(self) -> None:
        for option in ("pure", "per_row"):
            self._require(isinstance(getattr(self, option), bool), option, "must be True or False")
        self._require(
            isinstance(self.batched, bool) or callable(self.batched), "batched", "must be a bool or a function"
        )
        self._require(self.place in ("caller", "sandbox"), "place", "must be 'caller' or 'sandbox'")
        for option, least in (("batch_size", 1), ("concurrency", 1), ("retries", 0), ("calls_per_row", 1)):
            value = getattr(self, option)
            fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
            optional = value is None and option in ("concurrency", "calls_per_row")
            self._require(fits or optional, option, f"must be an integer of at least {least}")
        self._require(is_seconds(self.batch_window, 0), "batch_window", "must be a number of seconds of at least 0")
        known = self.deadline is None or (is_seconds(self.deadline, 0) and self.deadline > 0)
        self._require(known, "deadline", "must be a number of seconds over 0, or None")
        kinds = self.retry_on if isinstance(self.retry_on, tuple) else ()
        fit = bool(kinds) and all(isinstance(kind, type) and issubclass(kind, Exception) for kind in kinds)
        self._require(fit, "retry_on", "must be a tuple of exception classes")
        shown = self.description is None or isinstance(self.description, str)
        self._require(shown, "description", "must be a string")
        self._require(
            self.parameters is None or isinstance(self.parameters, Mapping), "parameters", "must be a mapping"
        )
        alone = not (self.per_row and (self.batched is not False or self.pure))
        self._require(alone, "per_row", "calls of different rows cannot share anything: no batched, no pure")

    def _check_interface(self, interface: Interface) -> None:
        if self.batched is not False:
            parameters = interface.signature.parameters.values() if interface.signature is not None else ()
            known = interface.signature is not None and not any(
                one.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD) for one in parameters
            )
            self._require(known, "batched", "needs a function with a signature, without *args and **kwargs")
        names = {} if self.argument_names is None else self.argument_names
        known = isinstance(names, Mapping) and (
            interface.signature is None or all(name in interface.signature.parameters for name in names.values())
        )
        self._require(known, "argument_names", "must be a mapping from properties to parameters of the function")

    @property
    def takes_contexts(self) -> bool:
        """Whether a batch is given the ToolContext of each of its calls, as a list."""
        return self.batched is True or self.interface.context in parameters_of(self.batched)

    @property
    def factory_takes_context(self) -> bool:
        return self.per_row and bool(parameters_of(self.function))

    def _require(self, condition: bool, option: str, wanted: str) -> None:
        if not condition:
            raise ConfigurationError(f"tool {self.name!r}: {option}={getattr(self, option)!r}: {wanted}")

    def __call__(self, *arguments: Any, **keyword_arguments: Any) -> Any:
        """Call the function as if it were no tool."""
        return self.function(*arguments, **keyword_arguments)

    def __get__(self, instance: object | None, owner: type | None = None) -> Self:
        """A decorated method is a tool of its object."""
        if instance is None:
            return self
        batched = self.batched if isinstance(self.batched, bool) else self.batched.__get__(instance, owner)
        return replace(self, function=self.function.__get__(instance, owner), batched=batched)

    @property
    def schema(self) -> dict[str, Any]:
        """As chat templates take a tool: ``{"type": "function", "function": {name, description, parameters}}``."""
        parameters = self.interface.parameters_schema if self.parameters is None else dict(self.parameters)
        text = self.interface.docstring.text
        return {"type": "function", "function": {"name": self.name, "description": text, "parameters": parameters}}

    def bind_json(self, arguments: Mapping[str, Any]) -> inspect.BoundArguments:
        """The arguments of a call in JSON, by parameter. Raises TypeError where they do not fit."""
        named: dict[str, Any] = {}
        names = self.argument_names or {}
        for name, value in arguments.items():
            parameter = names.get(name, name)
            if parameter in named:
                raise TypeError(f"{self.name}() got multiple values for argument {parameter!r}")
            named[parameter] = value
        parameters = self.interface.signature.parameters.values() if self.interface.signature else ()
        unnamed = [
            one.name for one in parameters if one.kind is inspect.Parameter.POSITIONAL_ONLY and one.name in named
        ]
        positional = [named.pop(name) for name in unnamed]
        return self.interface.bind(positional, named, from_json=True)

    @cached_property
    def offer(self) -> Offer:
        """As the code in a sandbox is told of it."""
        return self.interface.offer


@overload
def tool(function: Callable[..., Any], /) -> Tool: ...


@overload
def tool(
    *,
    name: str | None = None,
    description: str | None = None,
    batched: Batched = False,
    batch_size: int = 256,
    batch_window: float = 0.002,
    pure: bool = False,
    deadline: float | None = None,
    concurrency: int | None = None,
    retries: int = 0,
    retry_on: tuple[type[Exception], ...] = (OSError,),
    calls_per_row: int | None = None,
    per_row: bool = False,
    place: Place = "caller",
    parameters: Mapping[str, Any] | None = None,
    argument_names: Mapping[str, str] | None = None,
) -> Callable[[Callable[..., Any]], Tool]: ...


def tool(function: Callable[..., Any] | None = None, /, *, name: str | None = None, **options: Any) -> Any:
    """Make a function (or a method, or with ``per_row`` a class) a :class:`Tool`; the options are the tool's.

    ::

        @midstream.tool(pure=True, deadline=5.0)
        def retrieve(query: str, k: int = 3) -> list[str]:
            '''Search the documents.'''
    """

    def make(function: Callable[..., Any]) -> Tool:
        return Tool(_name_of(function) if name is None else name, function, **options)

    return make if function is None else make(function)


@runtime_checkable
class ToolSource(Protocol):
    """Several tools with a life of their own, such as those of a server.

    Whoever uses them starts it before and stops it after; it lives from the first start to the last stop.
    """

    def __iter__(self) -> Iterator[Tool]: ...

    def start(self) -> None: ...

    def stop(self) -> None: ...


class ToolSet:
    """Tools by name.

    Takes a mapping of names to callables, or callables that have a name (functions, and objects with
    ``__name__`` or ``name``). An object with a method ``as_tool``, which returns a :class:`Tool`, is that tool.
    A :class:`ToolSource` stands for all of its tools.
    """

    def __init__(
        self, tools: Mapping[str, Callable[..., Any]] | Iterable[Tool | ToolSource | Callable[..., Any]] = ()
    ) -> None:
        self._tools: dict[str, Tool] = {}
        self.sources: tuple[ToolSource, ...] = ()
        if not hasattr(tools, "__iter__"):
            raise ConfigurationError(f"tools={tools!r}: must be several callables, or a mapping of names to callables")
        if isinstance(tools, Mapping):
            items = [_as_tool(function, name) for name, function in tools.items()]
        else:
            given = list(tools)
            self.sources = tuple(item for item in given if isinstance(item, ToolSource))
            items = [
                each for item in given for each in (item if isinstance(item, ToolSource) else [_as_tool(item, None)])
            ]
        for item in items:
            if item.name in self._tools:
                raise ConfigurationError(f"tool name={item.name!r}: given twice")
            self._tools[item.name] = item

    def __getitem__(self, name: str) -> Tool:
        return self._tools[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tools

    def __iter__(self) -> Iterator[Tool]:
        return iter(self._tools.values())

    def __len__(self) -> int:
        return len(self._tools)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._tools)

    @property
    def offers(self) -> dict[str, Offer]:
        """The tools as the code in a sandbox is told of them."""
        return {item.name: item.offer for item in self}

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """The tools as chat templates take them (``tools=``), and servers that speak OpenAI's protocol."""
        return [item.schema for item in self]

    def describe(self, style: Style = "text", *, code: bool = True, markup: Markup | None = None) -> str:
        """The text that tells a model of its tools.

        - ``style``: ``"text"``: signatures with what they do; ``"stubs"``: Python functions without bodies;
          ``"json"``: the schemas, as chat templates write them, and nothing else.
        - ``code``: whether to say that any Python code can be run, or of the calls alone.
        - ``markup``: the one that is generated with, for the tags to name; by default ``CODE_TAGS``.
        """
        from midstream.tools.describing import describe

        return describe(self, style, code=code, markup=markup)


def _as_tool(item: Any, name: str | None) -> Tool:
    if not isinstance(item, Tool) and not isinstance(item, type) and callable(getattr(item, "as_tool", None)):
        item = item.as_tool()
        if not isinstance(item, Tool):
            raise ConfigurationError(f"tool {name or item!r}: as_tool() gave {item!r}, which is no Tool")
    if isinstance(item, Tool):
        return item if name is None or name == item.name else replace(item, name=name)
    return Tool(_name_of(item) if name is None else name, item)


def _name_of(function: Callable[..., Any]) -> str:
    name = getattr(function, "__name__", None) or getattr(function, "name", None)
    if not isinstance(name, str):
        raise ConfigurationError(f"tool {function!r}: has no name; give a mapping from its name to it")
    return name


def is_seconds(value: object, least: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= least
