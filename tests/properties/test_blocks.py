"""A block is compiled without its syntax tree where that changes nothing: beside the way over the tree."""

from __future__ import annotations

import contextlib
import io
import linecache
import re
import warnings
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from midstream.sandbox.inside.blocks import Blocks
from tests.properties import examples

LINES = (
    *(
        "",
        "   ",
        "x",
        "x + 1",
        "x = 1",
        "print(x)",
        "x; x",
        "x;",
        "(z := 3)",
        "z",
        "*x, x",
        "*x",
        "x: int = 3",
        "x: int",
    ),
    *("if x:", "    x", "\tx", "else:", "elif x:", "for i in range(2):", "    print(i)", "try:", "    1/0", "    pass"),
    *(
        "except ZeroDivisionError: print('z')",
        "finally: print('f')",
        "match x:",
        "    case 1: x",
        "case (x)",
        "match (x)",
    ),
    *("def f():", "    return 1", "f()", "@f", "f", "class A: pass", "lambda: x", "del x", "global x", "return x"),
    *(
        "yield x",
        "await x",
        "import os",
        "from os import path",
        "from __future__ import annotations",
        "'''",
        "'''doc'''",
    ),
    *("\"a\" 'b'", "(1,", "2)", ")", "[x,", " x]", "{1: 2,", "}", "x = 1 + \\", "x \\", "# note \\", "# note"),
    *('print("a\\n", x)', 'print("\\d")', 'print(f"{x=}")', "1/0", "raise ValueError(3)", "'a'.nope", "x\rx", "x is x"),
    *("print 'a'", "x\0x", "exit(3)", "[i for i in range(3)]", "sum(i for i in [x])", "A.x = 3", "A == 3", "x == 1"),
)


def outcome(code: str, *, over_the_tree: bool) -> tuple[Any, ...]:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    blocks = Blocks(namespace, lambda value: None if value is None else repr(value))
    if over_the_tree:
        blocks._split = lambda code: None  # type: ignore[method-assign]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            gave: Any = blocks.run(code)
        except BaseException as error:  # noqa: BLE001  # whatever a block raises is its outcome
            gave = blocks.describe(error, 5000)
    names = {name: type(value).__name__ for name, value in namespace.items()}
    return re.sub("0x[0-9a-f]+", "0x", f"{gave}"), printed.getvalue(), names, blocks.flags


@pytest.fixture(autouse=True, scope="module")
def the_cache_of_lines_is_put_back() -> Any:
    before = linecache.cache
    yield
    linecache.cache = before


@examples(300)
@given(st.lists(st.sampled_from(LINES), min_size=1, max_size=8))
@example(["x = 1", "x + 1"])
@example(["x = 1 + \\", "2", "x"])
@example(["'''", "x", "'''", "x"])
@example(["# note \\", "2 + 2"])
@example(["def f():", "    return 1/0", "f()"])
def test_the_same_as_over_its_tree(lines: list[str]) -> None:
    code = "\n".join(lines)
    assert outcome(code, over_the_tree=False) == outcome(code, over_the_tree=True)


@pytest.mark.parametrize(
    "code", ["x", "x = 1\nx + 1", "def f():\n    return 'a\\n'\nprint(f())", "if 1:\n    2\n3 == 3"]
)
def test_what_most_blocks_are_takes_no_tree(code: str) -> None:
    assert Blocks({}, repr)._split(code) is not None
