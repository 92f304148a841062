"""Code between turns: what the model is shown, and whose state is whose."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from midstream.errors import ConfigurationError, ProtocolError
from midstream.integrations.nemo_rl import CodeEnvironment
from midstream.sandbox import Guardrails, SandboxLimits, SandboxPool
from midstream.testing.remains import Remains

from .standing_in import Actor, asks, code, contents, metadata, rollout, rollout_async

CONFIG = {"num_workers": 4, "terminate_on_evaluation": False, "lease_seconds": 600.0}


@pytest.fixture(scope="module")
def pool() -> Iterator[SandboxPool]:
    with SandboxPool(preload=[], guardrails=Guardrails(), limits=SandboxLimits(wall_time=5.0)) as pool:
        yield pool


@pytest.fixture
def environment(pool: SandboxPool) -> Iterator[CodeEnvironment]:
    with CodeEnvironment(CONFIG, pool=pool) as environment:
        yield environment


def one_by_one(environment: CodeEnvironment, *blocks: str, known: Any = None) -> list[str]:
    """What the blocks of one row show, a step each."""
    shown = []
    for block in blocks:
        returned = environment.step(code(block), [known])
        known = returned.metadata[0]
        shown += contents(returned)
    return shown


# --- what the model is shown


def test_guardrails_speak_to_the_letter(environment: CodeEnvironment, tmp_path: Path) -> None:
    blocks = (
        "with open('notes', 'w') as notes:\n    notes.write('kept')\nopen('notes').read()",
        "open('/etc/hostname')",
        "open('../outside', 'w')",
        "import subprocess",
        "from os import path",
        "__import__('socket')",
    )
    returned = environment.step(code(*blocks), [metadata(str(tmp_path)) for _ in blocks])
    beyond = "PermissionError('Access beyond the temporary working directory is blocked')"
    blocked = "PermissionError('Importing system and network modules is blocked')"
    assert contents(returned) == [
        "\n\n<result>\n'kept'\n</result>",
        f"<result>{beyond}</result>",
        f"<result>{beyond}</result>",
        f"<result>{blocked}</result>",
        f"<result>{blocked}</result>",
        f"<result>{blocked}</result>",
    ]
    assert list(tmp_path.iterdir()) == []


def test_guardrails_are_on_unless_they_are_taken_off() -> None:
    options = {"preload": [], "limits": {"wall_time": 5.0}}
    for guardrails, shown in ((True, "PermissionError"), (False, "'posix'")):
        config = {**CONFIG, "sandbox": {**options, "guardrails": guardrails}}
        with CodeEnvironment(config) as environment:
            assert shown in contents(environment.step(code("import os\nos.name"), [None]))[0]
    with CodeEnvironment({**CONFIG, "sandbox": options}) as environment:
        assert "PermissionError" in contents(environment.step(code("import os\nos.name"), [None]))[0]


def test_each_row_is_framed_by_its_own_code_and_result(environment: CodeEnvironment) -> None:
    returned = environment.step(code("1 + 1", "x = 2\nx + 1", "print('a\\nb')", "y = 1"), [None] * 4)
    assert contents(returned) == [
        "<result>2</result>",
        "\n\n<result>\n3\n</result>",
        "\n\n<result>\na\nb\n</result>",
        "",
    ]
    assert [observation["role"] for observation in returned.observations] == ["environment"] * 4


def test_what_the_model_wrote_of_the_result_is_not_written_again(environment: CodeEnvironment) -> None:
    texts = ("<code>x = 1\nx</code>\n", "<code>x = 1\nx</code>\n\n", "<code>7</code> ", "<code>7</code>\n")
    assert contents(environment.step(asks(*texts), [None] * 4)) == [
        "\n<result>\n1\n</result>",
        "<result>\n1\n</result>",
        "<result>7</result>",
        "<result>7</result>",
    ]


def test_what_is_printed_is_shown(environment: CodeEnvironment) -> None:
    assert contents(environment.step(code("print(5)"), [None])) == ["<result>5</result>"]


def test_two_blocks_in_a_message_run_one_after_the_other(environment: CodeEnvironment) -> None:
    text = "<code>x = 20</code> and <code>x + 1</code> and <code>x + 2</code>"
    assert contents(environment.step(asks(text), [None])) == ["<result>21</result><result>22</result>"]


@pytest.mark.parametrize("text", ["no code", "<code>open for ever", "</code> closed <code>"])
def test_a_message_without_a_block_is_answered_with_nothing(environment: CodeEnvironment, text: str) -> None:
    given = metadata("/somewhere", x=1)
    returned = environment.step(asks(text), [given])
    assert contents(returned) == [""]
    assert returned.metadata == [given]
    assert not returned.terminateds.any()
    assert environment.kept_sessions == 0


# --- what one row does is its own affair


@pytest.mark.parametrize(
    ("bad", "shown"),
    [
        ("def", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit(3)"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("while True:\n    pass", "Timeout"),
        ("while True:\n    try:\n        while True: pass\n    except BaseException: pass", "Timeout"),
        ("'\\ud800'", "\\ud800"),
        ("\0", "null bytes"),  # a ValueError before Python 3.11.4, a SyntaxError since
    ],
)
def test_no_code_reaches_another_row(bad: str, shown: str) -> None:
    options = {"preload": [], "limits": {"wall_time": 1.0, "grace": 0.5}}
    with CodeEnvironment({**CONFIG, "sandbox": options}) as environment:
        first = environment.step(code("x = 41", "x = 1", "x = 41"), [None] * 3)
        second = environment.step(code("x + 1", bad, "x + 1"), first.metadata)
        assert contents(second)[::2] == ["<result>42</result>"] * 2
        assert shown in contents(second)[1]
        third = environment.step(code("x"), second.metadata[1:2])
        assert "1" in contents(third)[0]


def test_global_names_are_the_rows_own(environment: CodeEnvironment) -> None:
    setting = "def remember():\n    global leaked\n    leaked = 'mine'\nremember()"
    first = environment.step(code(setting, "leaked = 'other'", "0"), [None] * 3)
    second = environment.step(code("leaked", "leaked", "leaked"), first.metadata)
    assert contents(second)[:2] == ["<result>'mine'</result>", "<result>'other'</result>"]
    assert "NameError" in contents(second)[2]


@pytest.mark.parametrize(
    ("first", "second", "shown"),
    [
        ("import math", "math.floor(2.5)", "2"),
        ("import math\ndef half(x):\n    return math.floor(x / 2)", "half(9)", "4"),
        ("def fact(n):\n    return 1 if n < 2 else n * fact(n - 1)", "fact(5)", "120"),
        ("def a():\n    return 1\ndef b():\n    return a() + 1", "b()", "2"),
        ("g = (n * n for n in range(9)); next(g), next(g)", "next(g)", "4"),
        ("r = range(2, 9, 3)", "list(r)", "[2, 5, 8]"),
        ("from collections import defaultdict\nd = defaultdict(list)", "d['k'].append(1); dict(d)", "{'k': [1]}"),
        ("from collections import namedtuple\nP = namedtuple('P', 'x y')\np = P(1, 2)", "p", "P(x=1, y=2)"),
        ("class C:\n    def __init__(self): self.n = 7\nc = C()", "c.n, type(c) is C", "(7, True)"),
        ("f = open('log', 'w+'); _ = f.write('ab')", "f.seek(0); f.read()", "'ab'"),
    ],
)
def test_state_stays_as_it_is_from_step_to_step(
    environment: CodeEnvironment, first: str, second: str, shown: str
) -> None:
    assert one_by_one(environment, first, second)[1] == f"<result>{shown}</result>"


# --- what a rollout goes by


def test_a_rollout_ends_with_an_evaluation_only_where_that_is_asked(pool: SandboxPool) -> None:
    blocks = ("1", "x = 1", "print(5)", "1 / 0", "None", "raise ValueError", "def", "x = 1; x")
    with CodeEnvironment({**CONFIG, "terminate_on_evaluation": True}, pool=pool) as environment:
        returned = environment.step(code(*blocks), [None] * 8)
        assert returned.terminateds.tolist() == [True, False, True, False, True, False, False, True]
        assert environment.kept_sessions == 4
    with CodeEnvironment(CONFIG, pool=pool) as environment:
        assert not environment.step(code(*blocks), [None] * 8).terminateds.any()
        assert environment.kept_sessions == 8


def test_what_a_step_gives_has_nemo_rls_shapes(environment: CodeEnvironment) -> None:
    returned = environment.step(code("1", "2"), [None, None])
    names = ("observations", "metadata", "next_stop_strings", "rewards", "terminateds", "answers")
    assert returned._fields == names
    assert returned.rewards.dtype == torch.float32
    assert returned.rewards.tolist() == [0.0, 0.0]
    assert returned.terminateds.dtype == torch.bool
    assert returned.answers is None
    assert returned.next_stop_strings == [["</code>"], ["</code>"]]
    returned.next_stop_strings[0].append("changed")
    assert returned.next_stop_strings[1] == ["</code>"]
    nothing = environment.step([], [])
    assert nothing.observations == []
    assert nothing.rewards.shape == nothing.terminateds.shape == (0,)


SCRIPT = [
    ["<code>x = 3; y = 4</code>", "so <code>x + y</code>", "seven"],
    ["<code>def f(n):\n    return n * n\n</code>", "hm", "<code>f(2)</code>"],
    ["<code>1 / 0</code>", "<code>import sys</code>", "<code>'no'</code>"],
]
SAID = [
    ["", "<result>7</result>", ""],
    ["", "", "<result>4</result>"],
    [
        "<result>ZeroDivisionError('division by zero')</result>",
        "<result>PermissionError('Importing system and network modules is blocked')</result>",
        "<result>'no'</result>",
    ],
]


def fresh_batch() -> dict[str, list[Any]]:
    logs = [[{"role": "user", "content": f"question {row}"}] for row in range(3)]
    return {"message_log": logs, "extra_env_info": [metadata() for _ in logs]}


def environment_says(batch: dict[str, list[Any]]) -> list[list[str]]:
    return [[each["content"] for each in log if each["role"] == "environment"] for log in batch["message_log"]]


def test_a_rollout_in_step(environment: CodeEnvironment) -> None:
    batch = fresh_batch()
    with Actor(environment) as actor:
        rollout(actor, batch, SCRIPT, 3)
    assert environment_says(batch) == SAID
    after, metrics = environment.global_post_process_and_metrics(batch)
    assert after is batch
    assert metrics == {}
    assert environment.kept_sessions == 0


def test_a_rollout_that_its_evaluations_end(pool: SandboxPool) -> None:
    batch = fresh_batch()
    with CodeEnvironment({**CONFIG, "terminate_on_evaluation": True}, pool=pool) as environment:
        with Actor(environment) as actor:
            ended = rollout(actor, batch, SCRIPT, 3)
        assert ended.all()
        assert environment.kept_sessions == 0
    assert environment_says(batch) == [SAID[0][:2], SAID[1], SAID[2]]


async def test_a_rollout_of_rows_on_their_own(environment: CodeEnvironment) -> None:
    batch = fresh_batch()
    with Actor(environment) as actor:
        await rollout_async(actor, batch, SCRIPT, 3)
    assert environment_says(batch) == SAID
    environment.global_post_process_and_metrics(batch)
    assert environment.kept_sessions == 0


# --- metadata


def test_metadata_crosses_as_plain_values(environment: CodeEnvironment) -> None:
    import json

    known = environment.step(code("import math\nf = lambda: math.pi"), [metadata(n=1)]).metadata[0]
    known = json.loads(json.dumps(pickle.loads(pickle.dumps(known))))
    assert known["context"] == {"n": 1}
    assert contents(environment.step(code("round(f(), 2)"), [known])) == ["<result>3.14</result>"]


def test_copies_of_metadata_go_their_own_ways(environment: CodeEnvironment) -> None:
    first = environment.step(code("x = [1]"), [None]).metadata[0]
    copies = [first, copy.deepcopy(first), dict(first)]
    second = environment.step(code(*(f"x.append({n}); x" for n in (2, 3, 4))), copies)
    assert contents(second) == [f"<result>[1, {n}]</result>" for n in (2, 3, 4)]
    third = environment.step(code("x", "x", "x"), second.metadata)
    assert contents(third) == contents(second)


def test_a_step_that_is_taken_again_gives_the_same(environment: CodeEnvironment) -> None:
    known = environment.step(code("import random\nn = 0"), [None]).metadata[0]
    block = code("n += 1; n, random.random()")
    first = environment.step(block, [known])
    again = environment.step(block, [known])
    assert contents(first) == contents(again)
    assert contents(environment.step(code("n"), again.metadata)) == ["<result>1</result>"]


def test_another_environment_goes_on_where_one_died(pool: SandboxPool) -> None:
    with CodeEnvironment(CONFIG, pool=pool) as before:
        known = before.step(code("import random\ndraw = random.random\nfirst = draw()"), [metadata(base=10)]).metadata[
            0
        ]
        expected = contents(before.step(code("base, first, draw()"), [copy.deepcopy(known)]))
    with CodeEnvironment(CONFIG, pool=pool) as after:
        assert contents(after.step(code("base, first, draw()"), [known])) == expected


def test_what_was_killed_is_not_run_again(pool: SandboxPool) -> None:
    setting = "x = 1\nclasses = ().__class__.__base__.__subclasses__()"
    killer = "[c for c in classes if c.__name__ == '_wrap_close'][0].__init__.__globals__['_exit'](1)"
    with CodeEnvironment(CONFIG, pool=pool) as environment:
        known = environment.step(code(setting), [None]).metadata[0]
        killed = environment.step(code(killer), [known])
        assert "Killed" in contents(killed)[0]
        known = killed.metadata[0]
        assert [block["code"] for block in known["session"]["past"]] == [setting]
    with CodeEnvironment(CONFIG, pool=pool) as after:
        assert contents(after.step(code("x"), [known])) == ["<result>1</result>"]


def test_metadata_that_was_changed_is_refused(environment: CodeEnvironment) -> None:
    for session in ("gone", {"handle": "a"}, {"handle": "a", "seed": "b", "past": []}, {"past": [1], "seed": 1}):
        with pytest.raises(ConfigurationError, match=r"metadata\['session'\]"):
            environment.step(code("1"), [{**metadata(), "session": session}])
    with pytest.raises(ConfigurationError, match="metadata: is list"):
        environment.step(code("1"), [[]])


# --- what a row begins with


def test_names_of_the_context_are_there(environment: CodeEnvironment) -> None:
    given = metadata(n=3, words=["a", "b"], nested={"k": (1, None, True)}, text="it's\n")
    shown = one_by_one(environment, "n, words, nested, text", "n", known=given)
    assert shown == ["<result>(3, ['a', 'b'], {'k': (1, None, True)}, \"it's\\n\")</result>", "<result>3</result>"]


@pytest.mark.parametrize("context", [{"f": print}, {"x": float("nan")}, {"not a name": 1}, {"class": 1}, {3: 1}])
def test_a_context_that_cannot_go_into_a_sandbox_is_refused(environment: CodeEnvironment, context: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"metadata\['context'\]\["):
        environment.step(code("1"), [{"context": context, "working_dir": ""}])


def test_files_of_the_working_folder_are_there_and_stay_as_they_are(
    environment: CodeEnvironment, tmp_path: Path
) -> None:
    folder = tmp_path / "given"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "table.csv").write_text("a,b\n")
    (tmp_path / "secret").write_text("hidden")
    (folder / "link").symlink_to(tmp_path / "secret")
    shown = one_by_one(
        environment,
        "open('deep/table.csv').read()",
        "open('deep/table.csv', 'w').write('changed')",
        "open('deep/table.csv').read()",
        "open('link').read()",
        known=metadata(str(folder)),
    )
    assert shown[0] == "<result>'a,b\\n'</result>"
    assert shown[2] == "<result>'changed'</result>"
    assert "FileNotFoundError" in shown[3]
    assert (folder / "deep" / "table.csv").read_text() == "a,b\n"


def test_a_working_folder_that_is_not_here_is_told_of(
    environment: CodeEnvironment, caplog: pytest.LogCaptureFixture
) -> None:
    assert contents(environment.step(code("1"), [metadata("/no/such/folder")])) == ["<result>1</result>"]
    assert "/no/such/folder" in caplog.text


def test_a_working_folder_that_is_too_large_is_refused(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(200_000))
    options = {"preload": [], "limits": {"working_directory": 100_000}}
    with (
        CodeEnvironment({**CONFIG, "sandbox": options}) as environment,
        pytest.raises(ConfigurationError, match="100000 bytes"),
    ):
        environment.step(code("1"), [metadata(str(tmp_path))])


# --- what is refused, and what remains


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"num_workers": 0}, "num_workers=0"),
        ({"num_workers": True}, "num_workers=True"),
        ({"terminate_on_evaluation": "yes"}, "terminate_on_evaluation='yes'"),
        ({"kept_sessions": -1}, "kept_sessions=-1"),
        ({"lease_seconds": 0}, "lease_seconds=0"),
        ({"lease_seconds": float("inf")}, "lease_seconds=inf"),
        ({"sandbox": 1}, "sandbox=1"),
        ({"sandbox": {"limits": {"wall": 1}}}, "limits"),
        ({"sandbox": {"no_such": 1}}, "no_such"),
        ({"sandbox": {"max_sessions": 8}}, "max_sessions: 8 are free"),
        ({"every_node": 1}, "every_node=1"),
        ({"workers": 2}, "workers: unknown"),
    ],
)
def test_a_wrong_configuration_is_refused_by_name(changed: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigurationError, match=field.replace("[", r"\[")):
        CodeEnvironment({**CONFIG, **changed})


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigurationError, match="no 'num_workers'"):
        CodeEnvironment({"terminate_on_evaluation": True})
    with pytest.raises(ConfigurationError, match="must be a mapping"):
        CodeEnvironment(None)  # type: ignore[arg-type]


def test_a_step_that_cannot_be_taken_is_refused(environment: CodeEnvironment) -> None:
    with pytest.raises(ConfigurationError, match="has 1 entries for 2 message logs"):
        environment.step(code("1", "2"), [None])
    with pytest.raises(ConfigurationError, match=r"message_log_batch\[1\]: is empty"):
        environment.step([*code("1"), []], [None, None])
    with pytest.raises(ConfigurationError, match="is list; it must be a text"):
        environment.step([[{"role": "user", "content": []}]], [None])
    with pytest.raises(ConfigurationError, match="return_extracted_answer"):
        environment.step(code("1"), [None], return_extracted_answer=True)


def test_nothing_remains_after_shutdown() -> None:
    before = Remains.now()
    environment = CodeEnvironment({**CONFIG, "sandbox": {"preload": []}})
    environment.step(code("1", "2", "3"), [None] * 3)
    environment.shutdown()
    environment.shutdown()
    assert Remains.since(before) == []
    with pytest.raises(ProtocolError, match="shut down"):
        environment.step(code("1"), [None])
