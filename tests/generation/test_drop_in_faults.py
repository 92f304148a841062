"""The faults that a first drop-in of this kind had, each as a test that it is not here."""

from __future__ import annotations

from typing import Any

import pytest

from midstream import Limits, SandboxLimits, SandboxPool
from tests.drop_in import EOS, ids_of, run, texts
from tests.policies import policy_logprob
from tests.vocabularies import vocabulary

END = "<|endoftext|>"


def said(pool: SandboxPool, *codes: str, **options: Any) -> list[str]:
    """What is injected for these blocks of one row, inner texts alone."""
    script = ids_of("".join(f"<code>{code}</code> so " for code in codes))
    output, _ = run({"a": script}, pool, **options)
    injected = texts(output, of="injected")[0]
    parts = [part.partition("</result>")[0] for part in injected.split("<result>")[1:]]
    return [part.strip("\n") for part in parts]


def test_execute_code_false_only_warned_and_ran_the_code_all_the_same() -> None:
    called: list[int] = []
    output, _ = run(
        {"a": ids_of("<code>touch()</code> x")}, None, execute_code=False, tool_map={"touch": lambda: called.append(1)}
    )
    assert (texts(output), called) == (["<code>touch()</code> x" + END], [])


def test_stop_strings_were_taken_for_one_flat_list(sandboxes: SandboxPool) -> None:
    scripts = {"a": ids_of("x STOP y"), "b": ids_of("x STOP y"), "c": ids_of("x STOP y HALT")}
    output, _ = run(scripts, sandboxes, batch={"stop_strings": [["STOP"], None, ["HALT"]]})
    assert texts(output) == ["x STOP", "x STOP y" + END, "x STOP y HALT"]


def test_result_tokens_had_a_logprob_of_1000(sandboxes: SandboxPool) -> None:
    output, _ = run({"a": ids_of("<code>6 * 7</code> x")}, sandboxes)
    mask = output["token_mask"].bool()
    assert not output["logprobs"][~mask].any()
    assert output["logprobs"].max() == 0.0
    places = mask[0].nonzero().flatten().tolist()
    assert output["logprobs"][mask].tolist() == [policy_logprob(place) for place in places]


def test_lengths_were_inferred_from_logprobs_and_eos(sandboxes: SandboxPool) -> None:
    # The policy's logprob is 0.0 at every fourth place, and padding is EOS.
    script = ids_of("a b c <code>1</code> d")
    output, _ = run({"a": script, "long": ids_of("word " * 30)}, sandboxes)
    assert int(output["token_mask"][0].sum()) == len(script) + 1
    total = int(output["unpadded_sequence_lengths"][0])
    assert output["output_ids"][0, total - 1] == EOS
    assert set(output["output_ids"][0, total:].tolist()) == {EOS}


def test_there_was_no_truncated(sandboxes: SandboxPool) -> None:
    scripts = {"a": ids_of("word " * 30), "b": ids_of("word")}
    output, _ = run(scripts, sandboxes, policy={"max_new_tokens": 10})
    assert output["truncated"].tolist() == [True, False]


def test_nothing_bounded_the_total_length_nor_the_calls(sandboxes: SandboxPool) -> None:
    script = ids_of("<code>print('x' * 60)</code> so " * 30)
    long, _ = run({"a": script}, sandboxes, limits=Limits(max_total_tokens=120))
    assert int(long["unpadded_sequence_lengths"][0]) <= 120
    assert long["truncated"].tolist() == [True]
    calls: list[int] = []
    many = ids_of("<code>tick()</code> so " * 30)
    limits = Limits(max_tool_calls=3, at_tool_call_limit="stop")
    run({"a": many}, sandboxes, limits=limits, tool_map={"tick": lambda: calls.append(1)})
    assert len(calls) == 3


def test_inline_and_multi_line_rows_were_formatted_with_the_last_rows_code(sandboxes: SandboxPool) -> None:
    scripts = {
        "inline": ids_of("<code>1 + 1</code> x"),
        "lines": ids_of("<code>\n2 + 2\n</code> x"),
        "inline again": ids_of("<code>3 + 3</code> x"),
        "long value": ids_of("<code>['x' * 50] * 2</code> x"),
    }
    output, _ = run(scripts, sandboxes)
    value = f"['{'x' * 50}',\n '{'x' * 50}']"
    assert texts(output, of="injected") == [
        "<result>2</result>",
        "\n\n<result>\n4\n</result>",
        "<result>6</result>",
        f"\n\n<result>\n{value}\n</result>",
    ]


@pytest.mark.parametrize(
    ("code", "shows"),
    [
        ("x = = 1", "SyntaxError"),
        ("import sys; sys.exit()", "SystemExit()"),
        ("exit()", "exit"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt()"),
    ],
)
def test_syntax_errors_and_system_exit_killed_the_batch(sandboxes: SandboxPool, code: str, shows: str) -> None:
    scripts = {"bad": ids_of(f"<code>y = 1</code> so <code>{code}</code> so <code>y</code> x"),
               "good": ids_of("<code>1</code> x")}  # fmt: skip
    output, _ = run(scripts, sandboxes)
    bad, good = texts(output)
    assert good == "<code>1</code><result>1</result> x" + END
    assert shows in bad
    assert bad.endswith("<code>y</code><result>1</result> x" + END)


def test_while_true_never_returned() -> None:
    with SandboxPool(preload=[], limits=SandboxLimits(wall_time=0.3)) as pool:
        assert "0.3 seconds" in said(pool, "x = 1", "while True: pass", "x")[0]
        assert said(pool, "x = 1", "while True: pass", "x")[1] == "1"


def test_globals_and_locals_were_two_dicts(sandboxes: SandboxPool) -> None:
    tools = {"lookup": lambda name: f"<{name}>"}
    shown = said(
        sandboxes,
        "\ndef fact(n):\n    return 1 if n == 0 else n * fact(n - 1)\nfact(5)\n",
        "def double(n): return 2 * fact(n)",
        "double(4)",
        "import math",
        "def area(r): return math.floor(math.pi * r)",
        "area(2)",
        "def find(name): return lookup(name)",
        "find('x')",
        "[fact(i) for i in range(3)], sorted([3, 1], key=lambda n: -double(n))",
        tool_map=tools,
    )
    assert shown == ["120", "48", "6", "'<x>'", "([1, 1, 2], [3, 1])"]


def test_a_module_imported_in_one_block_was_a_string_in_the_next(sandboxes: SandboxPool) -> None:
    assert said(sandboxes, "import math", "math.sqrt(16), type(math).__name__") == ["(4.0, 'module')"]


def test_state_that_cannot_be_written_as_text_broke_it(sandboxes: SandboxPool) -> None:
    shown = said(
        sandboxes,
        "g = (i * i for i in range(5)); next(g); r = range(3)",
        "from collections import defaultdict, namedtuple; d = defaultdict(list); d['a'].append(1)",
        "Point = namedtuple('Point', 'x y'); p = Point(1, 2)",
        "class Node:\n    def __init__(self, value): self.value = value\nnode = Node(7)",
        "f = open('f.txt', 'w'); f.write('kept'); f.flush()",
        "next(g), list(r), d['a'], d['b'], p.y, node.value, isinstance(node, Node), open('f.txt').read()",
    )
    assert shown[-1] == "(1, [0, 1, 2], [1], [], 2, 7, True, 'kept')"


def test_global_leaked_between_rows(sandboxes: SandboxPool) -> None:
    scripts = {
        "a": ids_of("<code>\ndef f():\n    global x\n    x = 99\nf()\n</code> so <code>x</code> x"),
        "b": ids_of("so <code>'x' in globals()</code> and <code>x</code> x"),
    }
    output, _ = run(scripts, sandboxes)
    first, second = texts(output, of="injected")
    assert first == "<result>99</result>"
    assert second == "<result>False</result><result>NameError(\"name 'x' is not defined\")</result>"


def test_two_blocks_in_one_message_were_a_syntax_error(sandboxes: SandboxPool) -> None:
    output, _ = run({"a": ids_of("<code>a = 1</code> and <code>a + 1</code> x")}, sandboxes)
    assert texts(output) == ["<code>a = 1</code> and <code>a + 1</code><result>2</result> x" + END]


def test_print_gave_nothing(sandboxes: SandboxPool) -> None:
    assert said(sandboxes, "print(5)", "print('a'); print('b')", "for i in range(2): print(i)") == [
        "5",
        "a\nb",
        "0\n1",
    ]


def test_what_is_sampled_is_not_decoded_and_encoded_again(sandboxes: SandboxPool) -> None:
    # One id for each byte: no tokenizer would cut a text so.
    known = vocabulary("o200k")
    bytewise = {known.piece(i): i for i in range(256)}
    script = [bytewise[bytes([byte])] for byte in "é <code>6 * 7</code> ok".encode()]
    output, _ = run({"a": script}, sandboxes)
    mask = output["token_mask"][0].bool()
    assert output["output_ids"][0][mask].tolist() == [*script, EOS]
    assert texts(output) == ["é <code>6 * 7</code><result>42</result> ok" + END]
