"""Typed tools in the namespace, at every level: what crosses, how they look, what a forging session gets."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from midstream import ToolContext, ToolSet, tool
from midstream.crossing import Offer
from midstream.sandbox import SandboxLimits, SandboxPool, Session
from midstream.tools import Tool, ToolHost
from midstream.types import ExecutionError, ExecutionResult, Media, ToolAnswer
from tests.sandbox.test_tools import FORGED


class NotFound(LookupError):
    pass


@dataclasses.dataclass
class Hit:
    text: str
    score: float


@tool(pure=True)
def retrieve(query: str, k: int = 2, *, who: ToolContext) -> list[Hit]:
    """Search the documents.

    Args:
        query: What to look for.
        who: Who asks.
    """
    return [Hit(f"{query} for {who.prompt_id}", 0.5)] * k


@tool
def same(*values: Any, **more: Any) -> Any:
    return [values, more] if more else list(values)


@tool
def fail(kind: str) -> None:
    kinds: dict[str, Callable[[], Exception]] = {
        "own": lambda: NotFound("nothing of the kind"),
        "file": lambda: FileNotFoundError(2, "No such file or directory", __file__),
        "json": lambda: json.JSONDecodeError("bad", "doc", 0),
        "unicode": lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        "key": lambda: KeyError("k"),
    }
    raise kinds[kind]()


@tool(deadline=0.1)
async def wait() -> None:
    await asyncio.sleep(30)


@tool(calls_per_row=2)
def seldom() -> int:
    return 1


@tool
def picture(width: int) -> Any:
    from PIL import Image

    return Image.new("RGB", (width, 2), (1, 2, 3))


@tool
def media() -> Media:
    return Media("image/png", b"123")


TOOLS = ToolSet([retrieve, same, fail, wait, seldom, picture, media])
Run = Callable[..., ExecutionResult]


@pytest.fixture
def run(pool: SandboxPool) -> Iterator[Run]:
    """Runs blocks of one session on an event loop of their own."""
    host = ToolHost(TOOLS)
    row = host.row(ToolContext("p1"))
    with asyncio.Runner() as runner:
        session = runner.run(pool.session_async(tools=TOOLS.offers, call_tool=row.call, seed=0))
        yield lambda code: runner.run(session.run_async(code))
        session.close()
    host.close()


def test_help_and_signatures(run: Run) -> None:
    assert run("help(retrieve)").text == (
        "Help on function retrieve in module __main__:\n\n"
        "retrieve(query: str, k: int = 2) -> list[Hit(text: str, score: float)]\n"
        "    Search the documents.\n    \n    Args:\n        query: What to look for."
    )
    assert run("import inspect; inspect.signature(retrieve)").text.startswith("<Signature (query: str, k: int = 2) ->")
    assert run("retrieve.__annotations__['k'], retrieve.__name__").text == "(<class 'int'>, 'retrieve')"
    assert run("inspect.signature(same), same.__doc__").text == "(<Signature (*values: Any, **more: Any) -> Any>, None)"


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("retrieve('q', k=1)", "[Hit(text='q for p1', score=0.5)]"),
        ("[hit.text for word in 'ab' for hit in retrieve(word, 1)]", "['a for p1', 'b for p1']"),
        ("(lambda f: f(query='x')[0].score)(retrieve)", "0.5"),
        ("list(map(same, [1, 2]))", "[[1], [2]]"),
        ("sorted(retrieve('x'), key=lambda hit: hit.score)[0] == retrieve('x')[0]", "False"),
    ],
)
def test_calls_of_every_kind(run: Run, code: str, text: str) -> None:
    assert run(code).text == text


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("retrieve()", "retrieve() missing 1 required positional argument: 'query'"),
        ("retrieve('a', 1, 2)", "retrieve() takes from 1 to 2 positional arguments but 3 were given"),
        ("retrieve('a', query='b')", "retrieve() got multiple values for argument 'query'"),
        ("retrieve('a', who=1)", "retrieve() got an unexpected keyword argument 'who'"),
        ("wait(1)", "wait() takes 0 positional arguments but 1 was given"),
    ],
)
def test_bad_calls_are_pythons_type_errors_and_never_reach_the_host(run: Run, code: str, message: str) -> None:
    result = run(code)
    assert (result.error and (result.error.type, result.error.message)) == ("TypeError", message)
    assert result.tool_calls == ()


VALUES = """
import datetime, decimal, fractions, math, numpy as np
values = [
    (1, (2,)), {1, 'a'}, frozenset({b'x'}), b'bytes', bytearray(b'more'), {(1, 2): {None: 3}}, {'$type': 'tuple'},
    2**200, -0.0, math.inf, 1 + 2j, decimal.Decimal('1.50'), fractions.Fraction(1, 3), '\\ud800 é \\0',
    datetime.datetime(2024, 1, 2, tzinfo=datetime.timezone.utc), datetime.date(2024, 1, 2), datetime.timedelta(1, 2, 3),
    np.float32(0.1), np.bool_(True), np.datetime64('2024-01-02'),
]
back = same(*values)
[b for a, b in zip(values, back) if (type(a), repr(a)) != (type(b), repr(b))], len(back)
"""


def test_values_are_the_same_after_going_there_and_back(run: Run) -> None:
    assert run(VALUES).text == "([], 20)"
    arrays = (
        "arrays = [np.arange(6).reshape(2, 3).T, np.array(['a', 'é']), np.zeros((0, 3), 'c8'), np.array([True])]\n"
        "all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(arrays, same(*arrays)))"
    )
    assert run(arrays).text == "True"
    assert run("math.isnan(same(math.nan)[0]), same(**{'$type': 1})[1]").text == "(True, {'$type': 1})"


def test_what_a_tool_gets_is_pythons_own(pool: SandboxPool) -> None:
    got: list[Any] = []

    def take(day: datetime.date, points: list[tuple[int, int]], hit: Hit, count: int, **more: Any) -> None:
        got.extend([day, points, hit, count, more])

    take.__annotations__ = {"day": datetime.date, "points": list[tuple[int, int]], "hit": Hit, "count": int}
    tools = ToolSet([take])
    host = ToolHost(tools)

    async def use() -> ExecutionResult:
        with await pool.session_async(tools=tools.offers, call_tool=host.row().call) as session:
            return await session.run_async(
                "import numpy as np\n"
                "take('2024-01-02', np.array([[1, 2]]), {'text': 't', 'score': 1}, np.int64(3), z={1})"
            )

    assert asyncio.run(use()).error is None
    assert got == [datetime.date(2024, 1, 2), [(1, 2)], Hit("t", 1.0), 3, {"z": {1}}]
    assert type(got[3]) is int
    host.close()


def test_images_cross_both_ways(level: str) -> None:
    pytest.importorskip("PIL")
    host = ToolHost(TOOLS)
    code = (
        "from PIL import Image\nim = picture(300)\nagain = same(im.resize((1000, 1000)))[0]\n"
        "im.size, again.size, again.getpixel((5, 5)), media()"
    )

    async def use() -> ExecutionResult:
        with await pool.session_async(tools=TOOLS.offers, call_tool=host.row().call) as session:
            return await session.run_async(code)

    with SandboxPool(isolation=level, preload=["PIL.Image", "PIL.ImageFile"]) as pool:  # type: ignore[arg-type]
        text = asyncio.run(use()).text
    host.close()
    assert text == "((300, 2), (1000, 1000), (1, 2, 3), Media('image/png', 3 bytes))"


def test_an_image_where_pillow_is_not_is_a_type_error(run: Run) -> None:
    result = run("import sys\nsys.modules['PIL'] = None\ntry: picture(3)\nexcept TypeError as e: print(e)")
    assert result.text == (
        "picture() gave what this interpreter cannot read: an image of Pillow's, which is not installed on this side"
    )


@pytest.mark.parametrize(
    ("kind", "parent", "text"),
    [
        ("own", "LookupError", "NotFound('nothing of the kind')"),
        ("file", "OSError", "FileNotFoundError(\"[Errno 2] No such file or directory: 'test_tool_values.py'\")"),
        ("json", "ValueError", "JSONDecodeError('bad: line 1 column 1 (char 0)')"),
        ("unicode", "UnicodeError", "UnicodeDecodeError(\"'utf-8' codec can't decode byte 0xff in position 0: bad\")"),
        ("key", "KeyError", "KeyError('k')"),
    ],
)
def test_a_tools_exception_keeps_its_type_and_its_place(run: Run, kind: str, parent: str, text: str) -> None:
    code = f"try: fail({kind!r})\nexcept {parent} as e:\n    kept = e\nkept"
    result = run(code)
    assert result.text == text
    again = run("import traceback; traceback.format_exception(kept)")
    assert "site-packages" not in again.text
    assert "/" not in again.text.replace("site-packages", "")
    error = result.tool_calls[0].error
    assert error is not None
    assert error.base in ("", "LookupError", "ValueError")


def test_deadlines_and_budgets_are_exceptions(run: Run) -> None:
    assert run("wait()").text == "TimeoutError('wait() gave no answer within 0.1 seconds')"
    assert run("seldom(); seldom(); seldom()").text == "RuntimeError('seldom() may be called at most 2 times')"
    assert run("same('x' * 10**6)").text == "ValueError('the arguments of same() are longer than 262144 characters')"


def test_how_a_call_was_answered_is_in_the_result(run: Run) -> None:
    calls = run("retrieve('z'); retrieve('z')").tool_calls
    assert [(call.name, call.cached, call.batched) for call in calls] == [("retrieve", False, 1), ("retrieve", True, 1)]
    assert calls[0].value == calls[1].value
    assert calls[0].value[0]["$type"] == "record"


# --- sessions that forge


@pytest.mark.parametrize(
    "arguments",
    [
        '[[{"$type": "ndarray", "dtype": "|O", "shape": [1], "text": "MTIzNDU2Nzg="}], {}]',
        '[[{"$type": "ndarray", "dtype": "<f8", "shape": [1000000000000], "text": ""}], {}]',
        '[[{"$type": "image", "mode": "RGB", "size": [9999999, 9999999], "text": ""}], {}]',
        '[[{"$type": "set", "items": [[]]}], {}]',
        '[[{"$type": "decimal", "text": "1e9999999999"}], {}]',
        '[[], {"k": {"$type": "object", "class": "os.system"}}]',
    ],
)
def test_forged_values_are_refused_and_the_session_goes_on(short_pool: SandboxPool, arguments: str) -> None:
    called: list[Any] = []
    offers = {"echo": Offer("")}
    with short_pool.session(tools=offers, call_tool=lambda *call: called.append(call)) as session:
        result = session.run(FORGED + f"forge({arguments!r})['error']['type']")
        assert result.text == "'TypeError'"
        error = result.tool_calls[0].error
        assert error is not None
        assert error.message.startswith("the arguments of echo() cannot be read: ")
        assert session.run("1 + 1").text == "2"
    assert called == []


def test_forged_calls_are_bound_on_the_host_again(run: Run) -> None:
    forge = FORGED.replace('"echo"', '"retrieve"').replace("echo.", "retrieve.")
    assert run(forge + "forge('[[], {}]')['error']['message']").text == (
        "\"retrieve() missing 1 required positional argument: 'query'\""
    )
    context = 'forge(\'[["q"], {"who": {"prompt_id": "other"}}]\')[\'error\'][\'message\']'
    assert run(context).text == "\"retrieve() got an unexpected keyword argument 'who'\""


# --- rebuilding


def test_typed_answers_are_given_again_when_a_session_is_rebuilt(short_pool: SandboxPool) -> None:
    calls: list[str] = []

    def call_tool(name: str, arguments: list[Any], keywords: dict[str, Any]) -> Any:
        calls.append(name)
        if arguments:
            raise NotFound("none")
        return {"a": (1, {2})}

    with short_pool.session(tools=["f"], call_tool=call_tool) as session:
        session.run("x = f(k=(1, b'2', {3: float('nan')}))\ntry: f(1)\nexcept LookupError as e: kept = e")
        session.kill()
        result = session.run("x, kept, type(kept).__mro__[1].__name__")
        assert result.text == "({'a': (1, {2})}, NotFound('none'), 'LookupError')"
        assert not result.state_lost
    assert calls == ["f", "f"]


def test_answers_may_be_json_already(short_pool: SandboxPool) -> None:
    answers = {
        "value": ToolAnswer({"$type": "tuple", "items": []}, cached=True, batched=7),
        "error": ToolAnswer(error=ExecutionError("Odd", "why", base="KeyError"), batched=3),
        "bad": ToolAnswer(object()),
    }
    with short_pool.session(tools=list(answers), call_tool=lambda name, *_: answers[name]) as session:
        result = session.run("value()")
        assert result.text == "()"
        assert (result.tool_calls[0].cached, result.tool_calls[0].batched) == (True, 7)
        result = session.run("try: error()\nexcept KeyError as e: print(repr(e))")
        assert result.text == "Odd('why')"
        assert (result.tool_calls[0].error, result.tool_calls[0].batched) == (answers["error"].error, 3)
        assert session.run("bad()").text.startswith("TypeError('bad() returned what is not JSON")


def test_others_may_serve_the_calls_from_the_next_block_on(short_pool: SandboxPool) -> None:
    with short_pool.session(tools=["who"], call_tool=lambda *_: "first") as session:
        assert session.run("who()").text == "'first'"
        session.serve(lambda *_: "second")
        assert session.run("who()").text == "'second'"


def test_large_arguments_have_a_bound_of_their_own(level: str) -> None:
    limits = SandboxLimits(argument_characters=1000)
    with SandboxPool(isolation=level, preload=["numpy"], limits=limits) as pool:  # type: ignore[arg-type]
        session: Session
        with pool.session(tools=["f"], call_tool=lambda _name, arguments, _keywords: len(arguments)) as session:
            result = session.run("import numpy as np\nf(np.zeros(1000))")
            assert result.text == "ValueError('the arguments of f() are longer than 1000 characters')"
            assert result.breached == "argument_characters"
            assert session.run("f(np.zeros(10))").text == "1"


def test_tools_of_a_set_are_offered_with_their_names() -> None:
    assert list(TOOLS.offers) == list(TOOLS.names)
    assert isinstance(TOOLS["retrieve"], Tool)
