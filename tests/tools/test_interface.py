"""What is read off a function: what the model is told of it, and what is done with arguments."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import functools
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, NotRequired, Optional, TypedDict, Union

import jsonschema
import numpy as np
import pytest

import midstream
from midstream import CODE_TAGS, FENCED_PYTHON, ToolContext, ToolSet, tool
from midstream.crossing import Offer, checker
from midstream.errors import ConfigurationError
from midstream.tools import Tool
from midstream.tools.annotations import converter, schema_of, text_of
from midstream.tools.docstrings import Docstring, parse

if TYPE_CHECKING:
    from somewhere_else import Unknown


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass
class Point:
    x: float
    y: float = 0.0
    colour: Colour = Colour.RED


@dataclasses.dataclass
class Tree:
    name: str
    parts: list[Tree]


class Options(TypedDict):
    size: int
    deep: NotRequired[bool]


class Span(NamedTuple):
    start: int
    end: int = 9


# --- annotations


STRING, INTEGER, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}


@pytest.mark.parametrize(
    ("annotation", "text", "schema"),
    [
        (str, "str", STRING),
        (int, "int", INTEGER),
        (float, "float", NUMBER),
        (bool, "bool", {"type": "boolean"}),
        (None, "None", {"type": "null"}),
        (bytes, "bytes", {"type": "string", "contentEncoding": "base64"}),
        (datetime.datetime, "datetime.datetime", {"type": "string", "format": "date-time"}),
        (datetime.date, "datetime.date", {"type": "string", "format": "date"}),
        (Any, "Any", {}),
        (list, "list", {"type": "array"}),
        (list[str], "list[str]", {"type": "array", "items": STRING}),
        (list[Any], "list[Any]", {"type": "array"}),
        (Sequence[int], "list[int]", {"type": "array", "items": INTEGER}),
        (Iterable[list[int]], "list[list[int]]", {"type": "array", "items": {"type": "array", "items": INTEGER}}),
        (set[int], "set[int]", {"type": "array", "items": INTEGER, "uniqueItems": True}),
        (dict, "dict", {"type": "object"}),
        (dict[str, float], "dict[str, float]", {"type": "object", "additionalProperties": NUMBER}),
        (Mapping[str, Any], "dict[str, Any]", {"type": "object"}),
        (tuple[int, ...], "tuple[int, ...]", {"type": "array", "items": INTEGER}),
        (
            tuple[int, str],
            "tuple[int, str]",
            {"type": "array", "prefixItems": [INTEGER, STRING], "minItems": 2, "maxItems": 2},
        ),
        (int | None, "int | None", {"type": ["integer", "null"]}),
        (Optional[str], "str | None", {"type": ["string", "null"]}),  # noqa: UP045
        (Union[int, list[int]], "int | list[int]", {"anyOf": [INTEGER, {"type": "array", "items": INTEGER}]}),  # noqa: UP007
        (Literal["a", "b"], "Literal['a', 'b']", {"type": "string", "enum": ["a", "b"]}),
        (Literal["a", 1], "Literal['a', 1]", {"enum": ["a", 1]}),
        (Literal[True, 1], "Literal[True, 1]", {"enum": [True, 1]}),
        (Colour, "Literal['red', 'blue']", {"type": "string", "enum": ["red", "blue"]}),
        (Annotated[int, "how many"], "int", {"type": "integer", "description": "how many"}),
        (np.ndarray, "numpy.ndarray", {"type": "array"}),
        (Callable[[int], str], "Callable", {}),
        ("Unknown", "Unknown", {}),
        (
            Options,
            "{'size': int, 'deep': bool}",
            {"type": "object", "properties": {"size": INTEGER, "deep": {"type": "boolean"}}, "required": ["size"]},
        ),
        (
            Span,
            "{'start': int, 'end': int}",
            {"type": "object", "properties": {"start": INTEGER, "end": INTEGER}, "required": ["start"]},
        ),
        (
            Point,
            "{'x': float, 'y': float, 'colour': Literal['red', 'blue']}",
            {
                "type": "object",
                "properties": {"x": NUMBER, "y": NUMBER, "colour": {"type": "string", "enum": ["red", "blue"]}},
                "required": ["x"],
            },
        ),
        (
            Tree,
            "{'name': str, 'parts': list[dict]}",
            {
                "type": "object",
                "properties": {"name": STRING, "parts": {"type": "array", "items": {"type": "object"}}},
                "required": ["name", "parts"],
            },
        ),
    ],
    ids=str,
)
def test_annotations_as_text_and_schema(annotation: Any, text: str, schema: Any) -> None:
    assert text_of(annotation) == text
    assert schema_of(annotation) == schema
    jsonschema.Draft202012Validator.check_schema(schema)


def test_what_is_returned_is_an_object() -> None:
    assert text_of(list[Point], returned=True) == ("list[Point(x: float, y: float, colour: Literal['red', 'blue'])]")
    assert text_of(Tree, returned=True) == "Tree(name: str, parts: list[Tree])"
    assert text_of(Options, returned=True) == "{'size': int, 'deep': bool}"


IMAGE = "PIL.Image.Image"


def test_images() -> None:
    image = pytest.importorskip("PIL.Image").Image
    assert (text_of(image), schema_of(image)) == ("PIL.Image.Image", {})


@pytest.mark.parametrize(
    ("annotation", "value", "in_code", "from_json"),
    [
        (int, 3, 3, 3),
        (int, "x", "x", ValueError),
        (int, True, True, ValueError),
        (float, 3, 3.0, 3.0),
        (str, 3, 3, ValueError),
        (int, np.int64(3), 3, 3),
        (float, np.float32(0.5), 0.5, 0.5),
        (list[float], np.arange(2.0), [0.0, 1.0], [0.0, 1.0]),
        (list[int], (1, 2), [1, 2], [1, 2]),
        (tuple[int, str], [1, "a"], (1, "a"), (1, "a")),
        (set[int], [1, 1], {1}, {1}),
        (bytes, "YWI=", "YWI=", b"ab"),
        (datetime.date, "2024-01-02", datetime.date(2024, 1, 2), datetime.date(2024, 1, 2)),
        (datetime.date, datetime.date(2024, 1, 2), datetime.date(2024, 1, 2), datetime.date(2024, 1, 2)),
        (Colour, "red", Colour.RED, Colour.RED),
        (Colour, "green", "green", ValueError),
        (Literal["a"], "b", "b", ValueError),
        (Point, {"x": 1, "colour": "blue"}, Point(1.0, 0.0, Colour.BLUE), Point(1.0, 0.0, Colour.BLUE)),
        (Point, {"y": 1}, {"y": 1}, ValueError),
        (Options, {"size": 1}, {"size": 1}, {"size": 1}),
        (complex, "1+2j", 1 + 2j, 1 + 2j),
        (int | None, None, None, None),
        (Point | Tree, {"x": 1}, {"x": 1}, {"x": 1}),  # which of the two nobody can say
        (Any, {"x": 1}, {"x": 1}, {"x": 1}),
        ("Unknown", 5, 5, 5),
        (inspect.Parameter.empty, 5, 5, 5),
    ],
    ids=str,
)
def test_values_become_what_the_annotation_means(annotation: Any, value: Any, in_code: Any, from_json: Any) -> None:
    convert = converter(annotation)
    assert convert(value, False) == in_code
    assert type(convert(value, False)) is type(in_code)
    if from_json is ValueError:
        with pytest.raises(ValueError, match=r"Expected|Invalid|Object"):
            convert(value, True)
    else:
        assert convert(value, True) == from_json
        assert type(convert(value, True)) is type(from_json)


def test_lists_become_arrays_where_arrays_are_meant() -> None:
    for annotation in (np.ndarray, np.typing.NDArray[np.float64]):
        assert converter(annotation)([[1.0], [2.0]], True).shape == (2, 1)
        array = np.arange(3)
        assert converter(annotation)(array, False) is array


# --- docstrings


GOOGLE = """Search the documents.

    Note: in this line a colon.

    Args:
        query (str): What to look for,
            in plain words.
        *more: Others.

        k: How many.

    Returns:
        list of str: The texts.

    Raises:
        KeyError: If not.

    Example:
        search("x")
    """
NUMPY = """Search the documents.

    Parameters
    ----------
    query : str
        What to look for,
        in plain words.
    k, n : int, optional
        How many.

    Returns
    -------
    list of str
        The texts.

    Notes
    -----
    Slow.
    """
SPHINX = """Search the documents.

    :param str query: What to look for,
        in plain words.
    :param k: How many.
    :type k: int
    :raises KeyError: If not.
    :return: The texts.
    :rtype: list
    """


@pytest.mark.parametrize(
    ("docstring", "parsed"),
    [
        (
            GOOGLE,
            Docstring(
                'Search the documents.\n\nNote: in this line a colon.\n\nExample:\n    search("x")',
                {"query": "What to look for, in plain words.", "more": "Others.", "k": "How many."},
                "list of str: The texts.",
            ),
        ),
        (
            NUMPY,
            Docstring(
                "Search the documents.\n\nNotes\n-----\nSlow.",
                {"query": "What to look for, in plain words.", "k": "How many.", "n": "How many."},
                "The texts.",
            ),
        ),
        (
            SPHINX,
            Docstring(
                "Search the documents.", {"query": "What to look for, in plain words.", "k": "How many."}, "The texts."
            ),
        ),
        (None, Docstring()),
        ("", Docstring()),
        ("One line.", Docstring("One line.")),
        ("Args: are what it takes.", Docstring("Args: are what it takes.")),
        ("Returns\n---", Docstring("", {}, "")),
    ],
)
def test_docstrings_of_three_styles(docstring: str | None, parsed: Docstring) -> None:
    assert parse(docstring) == parsed


# --- signatures


def retrieve(query: str, k: int = 3, *, mode: Literal["fast", "exact"] = "fast") -> list[str]:
    """Search the documents.

    Args:
        query: What to look for.
        k: How many.

    Returns:
        The texts, the best first.
    """
    return [query] * k


class Adder:
    """Adds."""

    def __call__(self, a: int, b: int = 1) -> int:
        return a + b

    def method(self, a: int) -> int:
        """A method."""
        return a

    @tool(name="decorated", pure=True)
    def decorated_method(self, a: int) -> int:
        """Decorated."""
        return a

    @classmethod
    def of_class(cls, a: int) -> int:
        return a

    @staticmethod
    def static(a: int) -> int:
        return a


def shown(function: Any, **options: Any) -> str:
    return str(Tool("f", function, **options).offer.signature)


async def waits(a: int) -> int:
    return a


@functools.wraps(retrieve)
def wrapped(*arguments: Any, **keywords: Any) -> Any:
    return retrieve(*arguments, **keywords)


def of_unknown(a: Unknown, b: int, c: midstream.Media) -> Unknown: ...


def all_kinds(a, /, b: int, *args: int, c=(1, 2), d: float = 1.0, **kwargs: str): ...


@pytest.mark.parametrize(
    ("function", "signature"),
    [
        (retrieve, "(query: str, k: int = 3, *, mode: Literal['fast', 'exact'] = 'fast') -> list[str]"),
        (wrapped, "(query: str, k: int = 3, *, mode: Literal['fast', 'exact'] = 'fast') -> list[str]"),
        (waits, "(a: int) -> int"),
        (Adder(), "(a: int, b: int = 1) -> int"),
        (Adder().method, "(a: int) -> int"),
        (Adder().__call__, "(a: int, b: int = 1) -> int"),
        (Adder.of_class, "(a: int) -> int"),
        (Adder.static, "(a: int) -> int"),
        (functools.partial(waits, a=5), "(*, a: int = 5) -> int"),
        (functools.partial(retrieve, "q"), "(k: int = 3, *, mode: Literal['fast', 'exact'] = 'fast') -> list[str]"),
        (lambda a, b=2: a, "(a, b=2)"),
        (len, "(obj, /)"),
        (max, "None"),
        (of_unknown, "(a: Unknown, b: int, c: {'mime': str, 'data': bytes}) -> Unknown"),
        (all_kinds, "(a, /, b: int, *args: int, c=(1, 2), d: float = 1.0, **kwargs: str)"),
    ],
)  # fmt: skip
def test_signatures_of_callables_of_every_kind(function: Any, signature: str) -> None:
    assert shown(function) == signature
    offer = Tool("f", function).offer
    again = Offer.from_json(json.loads(json.dumps(offer.as_json())))
    assert str(again.signature) == signature
    assert again.description == offer.description


def test_a_default_that_cannot_cross_is_told_without_its_value() -> None:
    offer = Tool("f", lambda a=print, b=frozenset({1}): a).offer
    assert str(Offer.from_json(offer.as_json()).signature) == "(a=..., b=frozenset({1}))"


@pytest.mark.parametrize(
    ("arguments", "keywords"),
    [
        ((), {}),
        ((1, 2, 3), {}),
        ((1,), {"a": 1}),
        ((1,), {"z": 1}),
        ((1, 2), {"c": 1}),
        ((1, 2, 3, 4), {"d": 1}),
        ((), {"a": 1, "b": 2}),
    ],
)
def test_bad_calls_are_worded_by_python(arguments: Any, keywords: Any) -> None:
    def f(a, b=2, *, c=1): ...
    def g(a, /, b, *args, d, **more): ...
    def h(a, /): ...

    for function in (f, g, h):
        function.__qualname__ = "tool"
        outcomes = []
        for called in (function, checker("tool", inspect.signature(function))):
            try:
                called(*arguments, **keywords)
                outcomes.append(None)
            except TypeError as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]


def test_what_annotations_say_of_arguments_is_told_as_docstrings_are() -> None:
    def search(query: Annotated[str, "What to look for."], k: Annotated[int, "Unused."] = 3) -> str:
        """Search.

        Args:
            k: How many.
        """
        return query * k

    made = Tool("search", search)
    assert made.offer.description == "Search.\n\nArgs:\n    query: What to look for.\n    k: How many."
    properties = made.schema["function"]["parameters"]["properties"]
    assert [each["description"] for each in properties.values()] == ["What to look for.", "How many."]


# --- contexts


def with_context(query: str, who: ToolContext, k: int = 3) -> str:
    """Ask.

    Args:
        query: What.
        who: The row.
        k: How many.
    """
    return f"{query} {who.prompt_id} {k}"


def test_the_model_is_not_told_of_the_context() -> None:
    made = Tool("ask", with_context)
    assert str(made.offer.signature) == "(query: str, k: int = 3) -> str"
    assert "who" not in made.offer.description
    assert list(made.schema["function"]["parameters"]["properties"]) == ["query", "k"]
    assert made.interface.context == "who"
    optional = Tool("ask", lambda a, who: a)
    assert optional.interface.context is None


@pytest.mark.parametrize("annotation", ["ToolContext", "ms.ToolContext", "ToolContext | None", ToolContext | None])
def test_contexts_are_known_by_annotations_of_every_kind(annotation: Any) -> None:
    def ask(a: int, *, who=None): ...

    ask.__annotations__["who"] = annotation
    assert Tool("ask", ask).interface.context == "who"


@pytest.mark.parametrize(
    "source",
    [
        "def f(who: ToolContext, /): ...",
        "def f(a: ToolContext, b: ToolContext): ...",
        "def f(who: ToolContext, *a): ...",
    ],
)
def test_contexts_that_cannot_be_given_are_refused(source: str) -> None:
    exec(source, namespace := {"ToolContext": ToolContext})
    with pytest.raises(ConfigurationError, match="ToolContext"):
        Tool("f", namespace["f"])


# --- tools


def test_the_decorator() -> None:
    plain = tool(retrieve)
    assert (plain.name, plain("x", k=2), plain.__doc__) == ("retrieve", ["x", "x"], retrieve.__doc__)
    assert inspect.signature(plain) == inspect.signature(retrieve)
    options = tool(name="find", pure=True, deadline=2.0, concurrency=3, retries=1, calls_per_row=4, description="D.")(
        retrieve
    )
    assert (options.name, options.pure, options.deadline, options.concurrency) == ("find", True, 2.0, 3)
    assert (options.retries, options.calls_per_row, options.interface.docstring.text) == (1, 4, "D.")
    assert options.interface.docstring.parameters["query"] == "What to look for."


def test_a_decorated_method_is_a_tool_of_its_object() -> None:
    bound = Adder().decorated_method
    assert isinstance(bound, Tool)
    assert (bound.name, bound.pure, bound(3)) == ("decorated", True, 3)
    assert str(bound.offer.signature) == "(a: int) -> int"
    assert ToolSet([bound]).names == ("decorated",)


class Search:
    def __call__(self, query: str) -> list[str]:
        return [query]

    def many(self, queries: Sequence[str]) -> list[list[str]]:
        return [[query] for query in queries]

    def as_tool(self) -> Tool:
        return Tool("search", self, batched=self.many, pure=True)


def test_objects_may_say_what_tool_they_are() -> None:
    assert ToolSet([Search()]).names == ("search",)
    renamed = ToolSet({"find": Search()})["find"]
    assert (renamed.name, renamed.pure, callable(renamed.batched)) == ("find", True, True)
    assert ToolSet({"find": tool(retrieve)}).names == ("find",)

    class Wrong:
        as_tool = staticmethod(lambda: 3)
        __call__ = as_tool

    with pytest.raises(ConfigurationError, match="which is no Tool"):
        ToolSet({"wrong": Wrong()})


def test_batched_tools_show_one_call() -> None:
    def many(queries: list[str], k: Sequence[int] = 3, what: Any = None) -> list[list[str]]:  # type: ignore[assignment]
        return []

    assert str(Tool("many", many, batched=True).offer.signature) == "(queries: str, k: int = 3, what=None) -> list[str]"
    assert str(Tool("one", retrieve, batched=many).offer.signature).startswith("(query: str, k: int = 3")


@pytest.mark.parametrize(
    "options",
    [
        {"name": "a b"},
        {"name": "class"},
        {"function": 3},
        {"pure": 1},
        {"batched": 3},
        {"batched": True, "function": max},
        {"batched": True, "function": lambda *a: a},
        {"batched": True, "function": lambda **a: a},
        {"batch_size": 0},
        {"batch_size": True},
        {"batch_window": -1},
        {"batch_window": float("nan")},
        {"deadline": 0},
        {"deadline": "1"},
        {"concurrency": 0},
        {"concurrency": 1.5},
        {"retries": -1},
        {"retries": None},
        {"retry_on": ()},
        {"retry_on": ValueError},
        {"retry_on": (KeyboardInterrupt,)},
        {"calls_per_row": 0},
        {"description": 3},
        {"parameters": []},
        {"per_row": True},
        {"per_row": True, "function": Adder, "pure": True},
        {"per_row": True, "function": Adder, "batched": True},
    ],
)
def test_impossible_options_are_refused_by_name(options: dict[str, Any]) -> None:
    given = {"name": "f", "function": retrieve} | options
    field = next(name for name in (*options, "function") if name != "function" or options == {"function": 3})
    with pytest.raises(ConfigurationError, match=field if field != "function" else "callable"):
        Tool(given.pop("name"), given.pop("function"), **given)


def test_per_row_tools_are_known_by_what_the_factory_makes() -> None:
    def make(context: ToolContext) -> Adder:
        return Adder()

    for factory in (Adder, make):
        made = Tool("add", factory, per_row=True)
        assert (str(made.offer.signature), made.offer.description) == ("(a: int, b: int = 1) -> int", "Adds.")
    with pytest.raises(ConfigurationError, match="annotated as returning"):
        Tool("add", lambda: Adder(), per_row=True)


# --- descriptions


TEXT = """\
You can run Python code. Python code between <code> and </code> is run, and its result follows between <result> and \
</result>. Names, imports and files stay for later code. These functions are there to be called from it:

retrieve(query: str, k: int = 3, *, mode: Literal['fast', 'exact'] = 'fast') -> list[str]
    Search the documents.

    Args:
        query: What to look for.
        k: How many.

    Returns:
        The texts, the best first.

add(a: int, b: int = 1) -> int
    Adds."""


def test_the_text_of_tools() -> None:
    tools = ToolSet({"retrieve": retrieve, "add": Adder()})
    assert tools.describe() == TEXT
    calls = tools.describe(code=False)
    assert calls.startswith(
        "You can call these functions. A call is written between <code> and </code>, and its result"
    )
    assert "Python" not in calls
    assert calls.partition(":\n")[2] == TEXT.partition(":\n")[2]
    fenced = tools.describe(markup=FENCED_PYTHON)
    assert "between ```python and ```" in fenced
    assert "<code>" not in fenced


def test_the_text_without_tools() -> None:
    assert ToolSet().describe().startswith("You can run Python code. Python code between")
    assert ToolSet().describe(code=False) == ""
    assert ToolSet().describe("json") == "[]"
    with pytest.raises(ConfigurationError, match="style='prose'"):
        ToolSet().describe("prose")  # type: ignore[arg-type]


def test_stubs_are_python_that_says_the_same() -> None:
    quotes = Tool("quotes", lambda a: a, description='A "\\""" in\nit.')
    tools = ToolSet([tool(retrieve), Tool("add", Adder()), quotes, Tool("bare", lambda a: a)])
    stubs = tools.describe("stubs", markup=CODE_TAGS).partition("```python\n")[2].removesuffix("```")
    exec(stubs, namespace := {"Literal": Literal})
    for made in tools:
        stub = namespace[made.name]
        assert inspect.getdoc(stub) == (made.offer.description or None)
        assert list(inspect.signature(stub).parameters) == list(made.interface.signature.parameters)


def test_schemas_are_valid_and_take_what_the_function_takes() -> None:
    schema = ToolSet([retrieve]).schemas[0]
    assert schema == {
        "type": "function",
        "function": {
            "name": "retrieve",
            "description": "Search the documents.",
            "parameters": {
                "type": "object",
                "properties": {
                    "query": {"type": "string", "description": "What to look for."},
                    "k": {"type": "integer", "description": "How many.", "default": 3},
                    "mode": {"type": "string", "enum": ["fast", "exact"], "default": "fast"},
                },
                "required": ["query"],
            },
        },
    }
    assert json.loads(ToolSet([retrieve]).describe("json")) == [schema]
    jsonschema.validate({"query": "x", "k": 2}, schema["function"]["parameters"])
    own = {"type": "object", "properties": {"query": {"type": "string", "maxLength": 5}}}
    assert Tool("f", retrieve, parameters=own).schema["function"]["parameters"] == own
    more = Tool("f", all_kinds).schema["function"]["parameters"]
    assert (more["required"], more["additionalProperties"]) == (["a", "b"], True)
    assert Tool("f", max).schema["function"]["parameters"] == {"type": "object", "properties": {}}


def test_a_chat_template_takes_the_schemas() -> None:
    jinja2 = pytest.importorskip("jinja2")
    template = jinja2.Template("{% for tool in tools %}{{ tool.function.name }}: {{ tool | tojson }}\n{% endfor %}")
    rendered = template.render(tools=ToolSet([retrieve, Adder().decorated_method]).schemas)
    assert [line.partition(":")[0] for line in rendered.splitlines()] == ["retrieve", "decorated"]


@pytest.mark.parametrize("names", [["from"], {"from": "sender"}])
def test_names_of_arguments_are_those_of_the_function(names: Any) -> None:
    def mail(from_: str) -> str:
        return from_

    with pytest.raises(ConfigurationError, match="tool 'mail': argument_names="):
        Tool("mail", mail, argument_names=names)
    assert Tool("mail", mail, argument_names={"from": "from_"}).bind_json({"from": "Ann"}).args == ("Ann",)
