"""Rules 9 and 12 to 16: what running a row's code does, in whole rollouts with real sandboxes."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from midstream import Limits, SandboxLimits, SandboxPool, StopKind
from midstream.observing import InterpreterStarted, Observation, SessionRan
from tests.rollouts import Gate, injected, one, rollouts, shown


@pytest.fixture(scope="module")
def impatient() -> Iterator[SandboxPool]:
    """Sandboxes whose blocks may take a moment only."""
    with SandboxPool(preload=[], limits=SandboxLimits(wall_time=0.5, grace=0.3)) as pool:
        yield pool


def blocks(*codes: str) -> str:
    """A text with these blocks in it."""
    return "".join(f"Then <code>{code}</code> and" for code in codes)


# --- rule 9


@pytest.mark.parametrize(
    ("limits", "kind"),
    [
        (Limits(), StopKind.END_OF_SEQUENCE),
        (Limits(max_new_tokens=20), StopKind.LENGTH),
        (Limits(stop_strings=("touch",)), StopKind.STOP_STRING),
    ],
)
def test_rule_9_a_row_that_ends_inside_a_block_shows_nothing_of_it(
    sandboxes: SandboxPool, limits: Limits, kind: StopKind
) -> None:
    called: list[int] = []
    script = "<code>x = 1</code> and <code>x = 2\ntouch(x)\nprint('seen') # and more, and more, and more"
    row = one(script, sandboxes, limits=limits, tools={"touch": called.append})
    assert row.stop.kind is kind
    assert called == []
    assert [record.call.code for record in row.calls] == ["x = 1"]
    assert injected(row) == []


def test_rule_9_a_block_whose_last_token_uses_up_the_budget_shows_nothing(sandboxes: SandboxPool) -> None:
    called: list[int] = []
    script = "<code>touch(1)</code>"
    whole = one(script, sandboxes, tools={"touch": called.append})
    assert called == [1]
    budget = whole.calls[0].call.position - len(whole.prompt_ids)
    cut = one(script, sandboxes, tools={"touch": called.append}, limits=Limits(max_new_tokens=budget))
    assert (cut.stop.kind, cut.stop.detail) == (StopKind.LENGTH, "new_tokens")
    assert called == [1]


# --- rule 12


def test_rule_12_everything_a_block_makes_lives_on(sandboxes: SandboxPool) -> None:
    row = one(
        blocks(
            "x = 3; y = 4",
            "import math as m; from collections import Counter",
            "def area(r): return m.floor(m.pi * r * r)",
            "class Point:\n    def __init__(self, x): self.x = x\n    def __repr__(self): return f'Point({self.x})'",
            "numbers = (n * n for n in range(10)); next(numbers); next(numbers)",
            "open('kept.txt', 'w').write('kept')",
            "point = Point(x + y)",
            "x + y, area(2), Counter('aab')['a'], point, next(numbers), open('kept.txt').read()",
        ),
        sandboxes,
    )
    assert shown(row) == ["", "", "", "", "1", "4", "", "(7, 12, 2, Point(7), 4, 'kept')"]


def test_rule_12_a_block_is_run_once_however_many_follow() -> None:
    seen: list[Observation] = []
    count = 20
    script = blocks("ran = []", *(f"ran.append({number}); ran" for number in range(count)))
    with SandboxPool(preload=[], observers=[seen.append]) as pool:
        batch = rollouts({"p": script, "q": script}, pool)
    for row in batch:
        assert shown(row) == ["", *(str(list(range(number + 1))) for number in range(count))]
    assert [one.replacement for one in seen if isinstance(one, InterpreterStarted)] == [False] * 2  # one for each row
    assert sum(isinstance(one, SessionRan) for one in seen) == 2 * (count + 1)


def test_rule_12_nothing_crosses_between_rows(sandboxes: SandboxPool) -> None:
    messy = blocks(
        "global shared\nshared = 1; name = 2\nimport os; os.environ['LEAK'] = '1'; open('leak', 'w').write('x')",
        "import builtins, string; builtins.abs = lambda _: 99; string.digits = ''; abs(-1)",
        "import random; random.seed(0); print('mine')",
    )
    curious = blocks(
        "import os; sorted(n for n in globals() if not n.startswith('_') and n != 'os')",
        "os.environ.get('LEAK'), os.path.exists('leak'), abs(-1)",
        "import string; string.digits",
    )
    batch = rollouts(
        {f"{kind} {i}": text for i in range(3) for kind, text in [("m", messy), ("c", curious)]}, sandboxes
    )
    for row in batch:
        if row.prompt.id is not None and row.prompt.id.startswith("m"):
            assert shown(row) == ["1", "99", "mine"]
        else:
            assert shown(row) == ["[]", "(None, False, 1)", "'0123456789'"]


def test_rule_12_samples_of_one_prompt_are_rows_of_their_own(sandboxes: SandboxPool) -> None:
    batch = rollouts({"p": blocks("seen = globals().get('seen', 0) + 1; seen", "seen += 1; seen")}, sandboxes, n=3)
    assert [shown(row) for row in batch] == [["1", "2"]] * 3


def test_rule_12_random_numbers_differ_between_rows_and_are_the_same_in_every_run(sandboxes: SandboxPool) -> None:
    scripts = {"a": blocks("import random; random.random()"), "b": blocks("import random; random.random()")}
    first, second = rollouts(scripts, sandboxes, n=2, seed=5), rollouts(scripts, sandboxes, n=2, seed=5)
    assert [shown(row) for row in first] == [shown(row) for row in second]
    assert len({shown(row)[0] for row in first}) == 4
    assert shown(rollouts(scripts, sandboxes, seed=6)[0]) != shown(first[0])


# --- rule 13


def test_rule_13_recursion_and_helpers_work_as_in_a_module(sandboxes: SandboxPool) -> None:
    row = one(
        blocks(
            "def fact(n): return 1 if n < 2 else n * fact(n - 1)",
            "def twice(n): return 2 * fact(n)",
            "import math\ndef root(n): return math.isqrt(twice(n))",
            "k = 3\n[k * fact(i) for i in range(4)], root(5)",
            "def outer():\n    def inner(): return k + fact(3)\n    return inner()\nouter()",
        ),
        sandboxes,
    )
    assert shown(row)[3:] == ["([3, 3, 6, 18], 15)", "9"]


@pytest.mark.parametrize("code", ["\n\n  \nx = 1\nx\n\n", "  x = 1; x  ", "\n    x = 1\n    if x:\n        x\n    x\n"])
def test_rule_13_blank_lines_and_uniform_indentation_are_not_part_of_the_code(
    sandboxes: SandboxPool, code: str
) -> None:
    assert shown(one(f"<code>{code}</code>", sandboxes)) == ["1"]


def test_rule_13_tracebacks_call_the_file_code() -> None:
    with SandboxPool(preload=[], error_style="traceback") as pool:
        row = one("<code>\ndef f():\n    return 1 / 0\nf()\n</code>", pool)
    assert 'File "<code>", line 2, in f' in str(shown(row)[0])


# --- rule 14


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("print(5)", "5"),
        ("x = 5", ""),
        ("None", ""),
        ("print('a'); 'b'", "a\n'b'"),
        ("import sys; print('out'); print('err', file=sys.stderr); print('out')", "out\nerr\nout"),
        ("print('a', end=''); 1 / 0", "a\nZeroDivisionError('division by zero')"),
        ("print('a\\n\\n')", "a"),
        ("['x' * 40] * 2", f"['{'x' * 40}',\n '{'x' * 40}']"),
        ("for i in range(2): i", ""),
    ],
)
def test_rule_14_what_is_shown_of_a_block(sandboxes: SandboxPool, code: str, text: str) -> None:
    row = one(f"<code>{code}</code>", sandboxes)
    assert shown(row) == [text]
    assert bool(injected(row)) == bool(text)


def test_rule_14_an_image_is_a_line_where_it_was_shown(sandboxes: SandboxPool) -> None:
    pytest.importorskip("PIL", reason="Pillow is not installed")
    shows = "print('one', end='')\nImage.new('L', (3, 2)).show()\nprint('two')\nImage.new('L', (1, 4))"
    code = f"from PIL import Image\n{shows}"
    row = one(f"<code>{code}</code>", sandboxes)
    assert shown(row) == ["one\n<image of 3x2 pixels>\ntwo\n<image of 1x4 pixels>"]
    assert row.calls[0].result is not None
    assert len(row.calls[0].result.media) == 2


# --- rule 15


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("1/0", "ZeroDivisionError('division by zero')"),
        ("x = (", "SyntaxError"),
        ("import sys; sys.exit(3)", "SystemExit(3)"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt()"),
        ("def f(): return f()\nf()", "RecursionError"),
        ("while True: pass", "0.5 seconds"),
        ("import os; os._exit(7)", "7"),
    ],
)
def test_rule_15_whatever_code_does_becomes_its_result_and_the_row_goes_on(
    impatient: SandboxPool, code: str, says: str
) -> None:
    row = one(blocks("x = 20", code, "x + 1"), impatient)
    assert row.stop.kind is StopKind.END_OF_SEQUENCE
    first, second, third = shown(row)
    assert (first, third) == ("", "21")
    assert says in str(second)


def test_rule_15_after_a_kill_earlier_blocks_run_again_with_the_tool_results_that_they_had(
    impatient: SandboxPool,
) -> None:
    asked: list[int] = []

    def ask(number: int) -> int:
        asked.append(number)
        return 100 * len(asked)

    row = one(blocks("x = ask(1)", "ask(2); sum(range(10**13))", "x", "ask(3)"), impatient, tools=[ask])
    first, killed, third, fourth = shown(row)
    assert (first, third, fourth) == ("", "100", "300")
    assert "Killed" in str(killed)
    assert row.calls[1].result is not None
    assert row.calls[1].result.state_lost
    assert asked == [1, 2, 3]


def test_rule_15_state_that_cannot_be_made_again_is_said_to_be_lost(impatient: SandboxPool) -> None:
    row = one(blocks("import time; t = time.time_ns(); t", "import os; os._exit(1)", "2 + 2"), impatient)
    last = row.calls[2].result
    assert last is not None
    assert last.state_lost
    assert str(shown(row)[2]).endswith("4")
    assert "restarted" in str(shown(row)[2])


# --- rule 16


def test_rule_16_tools_are_names_that_nested_functions_can_call(sandboxes: SandboxPool) -> None:
    row = one(
        blocks("def outer(): return [inner(i) for i in range(3)]", "def inner(i): return add(i, b=1)", "outer()"),
        sandboxes,
        tools={"add": lambda a, b: a + b},
    )
    assert shown(row) == ["", "", "[1, 2, 3]"]


def test_rule_16_tools_run_outside_the_sandbox(sandboxes: SandboxPool) -> None:
    row = one(blocks("import os; os.getpid() == where()"), sandboxes, tools={"where": os.getpid})
    assert shown(row) == ["False"]
    tool_calls = row.calls[0].result.tool_calls if row.calls[0].result is not None else ()
    assert [(call.name, call.value) for call in tool_calls] == [("where", os.getpid())]


def test_rule_16_what_a_tool_raises_is_the_codes_to_handle(sandboxes: SandboxPool) -> None:
    def fail(message: str) -> None:
        raise LookupError(message)

    row = one(blocks("try: fail('gone')\nexcept LookupError as error: print('caught', error)", "fail('again')"),
              sandboxes, tools=[fail])  # fmt: skip
    assert shown(row) == ["caught gone", "LookupError('again')"]


def test_rule_24_a_block_may_wait_in_a_tool_for_another_rows_block(sandboxes: SandboxPool) -> None:
    gate = Gate()

    def let_through() -> str:
        assert gate.reached.wait(60)
        gate.opened.set()
        return "opened"

    scripts = {"waits": blocks("hold()"), "opens": blocks("let_through()")}
    batch = rollouts(scripts, sandboxes, tools={"hold": gate, "let_through": let_through})
    assert [shown(row) for row in batch] == [["'through'"], ["'opened'"]]
