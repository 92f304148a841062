"""Sessions over long and odd histories, against a simple model of what they should hold and be named."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pprint import pformat

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from midstream.sandbox import Guardrails, SandboxLimits, SandboxPool, Session
from tests.properties import examples
from tests.sandbox.conftest import LEVELS, why_not
from tests.sandbox.test_feed import plain

LIMITS = SandboxLimits(wall_time=1.0, grace=0.6, threads=24)
POOLS: list[SandboxPool] = []


@pytest.fixture(scope="module", autouse=True)
def pool(level: str) -> Iterator[SandboxPool]:
    with SandboxPool(isolation=level, forkable=True, limits=LIMITS, preload=[]) as pool:  # type: ignore[arg-type]
        POOLS.append(pool)
        yield pool
        POOLS.clear()


DEATHS = ["import os; os._exit(1)", "import os; os.abort()", "import os; os.kill(os.getpid(), 9)"]
LOOK = "import os\nx, {n: open(n).read() for n in sorted(os.listdir('.'))}, log.tell()"


@dataclass
class Model:
    """What a session should hold. ``name``: equal for those whose key must be equal."""

    session: Session
    numbers: random.Random
    values: list[object] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    logged: int = 0
    name: tuple[object, ...] = ()
    fed: list[tuple[str, int]] = field(default_factory=list)
    """Of an open block: what each piece does, and its number."""

    def copy(self, session: Session) -> Model:
        numbers = random.Random()
        numbers.setstate(self.numbers.getstate())
        return Model(session, numbers, list(self.values), dict(self.files), self.logged, self.name)

    def do(self, kind: str, number: int) -> None:
        if kind == "append":
            self.values.append(number)
        elif kind == "write":
            self.files[f"f{number % 3}"] = str(number)
        elif kind == "log":
            self.files["log"] += "l"
            self.logged += 1
        elif kind == "remove":
            self.files.pop(f"f{number % 3}", None)
        else:
            self.values.append(self.numbers.random())


def code_of(kind: str, number: int) -> str:
    return {
        "append": f"x.append({number})",
        "write": f"with open('f{number % 3}', 'w') as file: file.write('{number}')",
        "log": "log.write('l'); log.flush()",
        "remove": f"import os\nif os.path.exists('f{number % 3}'): os.unlink('f{number % 3}')",
        "draw": "x.append(random.random())",
    }[kind]


KINDS = st.sampled_from(["append", "write", "log", "remove", "draw"])
NUMBERS = st.integers(0, 5)
PICKS = st.integers(0, 10**6)
BEGIN = "import random\nx = []\nlog = open('log', 'w')"


class Sessions(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.models: list[Model] = []
        for _ in range(2):
            session = POOLS[0].session(seed=5)
            session.run(BEGIN)
            self.models.append(Model(session, random.Random(5), files={"log": ""}))
        self.steps = 0

    def teardown(self) -> None:
        for model in self.models:
            model.session.close()

    def pick(self, pick: int, *, feeding: bool = False) -> Model | None:
        """A session that has a block open, or one that has none."""
        able = [model for model in self.models if bool(model.fed) == feeding]
        return able[pick % len(able)] if able else None

    def ran(self, model: Model, *what: object) -> None:
        model.name = (*model.name, what)

    @rule(pick=PICKS, kind=KINDS, number=NUMBERS, checkpoint=st.booleans())
    def run(self, pick: int, kind: str, number: int, checkpoint: bool) -> None:
        if model := self.pick(pick):
            result = model.session.run(code_of(kind, number), checkpoint=checkpoint)
            assert (result.error, result.rolled_back, result.no_checkpoint) == (None, False, None)
            model.do(kind, number)
            self.ran(model, code_of(kind, number))

    @rule(pick=PICKS, kind=KINDS, number=NUMBERS, death=st.sampled_from(DEATHS))
    def run_and_undo(self, pick: int, kind: str, number: int, death: str) -> None:
        if model := self.pick(pick):
            result = model.session.run(f"{code_of(kind, number)}\n{death}", checkpoint=True)
            assert (result.rolled_back, result.state_lost, result.no_checkpoint) == (True, False, None)

    @rule(pick=PICKS, kind=KINDS, number=NUMBERS)
    def run_and_lose(self, pick: int, kind: str, number: int) -> None:
        if model := self.pick(pick):
            result = model.session.run(f"{code_of(kind, number)}\n{DEATHS[0]}", checkpoint=False)
            assert (result.rolled_back, result.state_lost) == (False, True)
            model.name = (object(),)  # from here on its own, and its copies'

    @rule(pick=PICKS, kind=KINDS, number=NUMBERS)
    def feed(self, pick: int, kind: str, number: int) -> None:
        model = self.pick(pick, feeding=bool(pick % 2)) or self.pick(pick)
        if model:
            assert model.session.feed(code_of(kind, number) + "\n")
            model.fed.append((kind, number))

    @rule(pick=PICKS, end=st.sampled_from(["commit", "abort", "death", "nonsense", "kill"]))
    def close(self, pick: int, end: str) -> None:
        model = self.pick(pick, feeding=True)
        if model is None:
            return
        text = "".join(code_of(*piece) + "\n" for piece in model.fed)
        pieces, model.fed = model.fed, []
        if end == "abort":
            model.session.abort()
            return
        if end == "death":
            assert not model.session.feed(DEATHS[0])
            assert model.session.commit().rolled_back
            return
        if end == "nonsense":
            model.session.feed("x = = 1")
            result = model.session.commit()
            assert result.error is not None
            assert result.error.type == "SyntaxError"
            self.ran(model, text + "x = = 1")
            return
        if end == "kill":
            model.session.kill()
        result = model.session.commit()
        assert (result.error, result.state_lost) == (None, False)
        for piece in pieces:
            model.do(*piece)
        self.ran(model, text)

    @precondition(lambda self: len(self.models) < 5)
    @rule(pick=PICKS)
    def fork(self, pick: int) -> None:
        if model := self.pick(pick):
            (session,) = model.session.fork()
            self.models.append(model.copy(session))

    @precondition(lambda self: len(self.models) > 2)
    @rule(pick=PICKS)
    def close_session(self, pick: int) -> None:
        if model := self.pick(pick):
            model.session.close()
            self.models.remove(model)

    @rule(pick=PICKS, number=NUMBERS)
    def put(self, pick: int, number: int) -> None:
        if model := self.pick(pick):
            model.session.put(f"f{number % 3}", str(number).encode())
            model.do("write", number)
            self.ran(model, "put", f"f{number % 3}", number)

    @rule(pick=PICKS)
    def kill(self, pick: int) -> None:
        """From outside: nothing is lost."""
        if model := self.pick(pick):
            model.session.kill()
            assert model.session.run("pass").error is None
            self.ran(model, "pass")

    @rule(pick=PICKS)
    def look(self, pick: int) -> None:
        if model := self.pick(pick):
            result = model.session.run(LOOK)
            assert result.text == pformat((model.values, dict(sorted(model.files.items())), model.logged))
            assert not result.state_lost
            self.ran(model, LOOK)

    @invariant()
    def keys_are_equal_where_they_may_be(self) -> None:
        for one in self.models:
            for other in self.models:
                assert (one.session.snapshot_key() == other.session.snapshot_key()) == (one.name == other.name)


def test_sessions_hold_what_they_should() -> None:
    run_state_machine_as_test(
        Sessions, settings=settings(examples(25), stateful_step_count=30, phases=[Phase.generate])
    )


# -- blocks in pieces

STATEMENTS = [
    "x = x + [1000]\n",
    "y = 1000; x.append(y is min(1000, 2000))\n",
    "'text'\n",
    "print('out', len(x))\n",
    "if len(x) > 3:\n    x = x[1:]\n",
    "else:\n    x.append('else')\n",
    "for i in range(3):\n    x.append(i)\n    print(i)\n",
    "def f(n):\n    return n / (len(x) - 4)\n",
    "f(1.5)\n",
    "x[2.5:]\n",
    "1.5\n",
    "import random; x.append(random.random())\n",
    "try:\n    f(1000)\nexcept ZeroDivisionError as e:\n    x.append(str(e))\n",
    "z: int = 5\n",
    "w = '\\d'\n",
    "\n",
    "# a comment\n",
    "x\n",
    "(1000, 'a b', 1.5)\n",
    "x = = 1\n",
    "import os; os.abort()\n",
]


@examples(60)
@given(st.lists(st.sampled_from(STATEMENTS), min_size=1, max_size=8), st.data())
def test_any_block_in_any_pieces(statements: list[str], data: st.DataObject) -> None:
    block = "".join(statements)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(block)), max_size=6)))
    if data.draw(st.booleans()):
        pieces = statements
    else:
        pieces = [block[a:b] for a, b in zip([0, *cuts], [*cuts, len(block)], strict=True)]
    with POOLS[0].session(seed=1) as fed, POOLS[0].session(seed=1) as whole:
        for each in (fed, whole):
            each.run("x = [1, 2]")
        for piece in pieces:
            fed.feed(piece)
        assert plain(fed.commit()) == plain(whole.run(block, checkpoint=True))
        assert fed.snapshot_key() == whole.snapshot_key()
        look = "sorted(n for n in globals() if n != 'f'), x, globals().get('__doc__')"
        assert fed.run(look).text == whole.run(look).text


# -- keys


def test_what_a_key_depends_on(level: str) -> None:
    def key(blocks: list[str], seed: int = 0, answer: object = 1, **changed: object) -> str:
        if not changed:
            return key_in(POOLS[0], blocks, seed, answer)
        config = {"isolation": level, "limits": LIMITS, "preload": [], **changed}
        with SandboxPool(**config) as pool:  # type: ignore[arg-type]
            return key_in(pool, blocks, seed, answer)

    def key_in(pool: SandboxPool, blocks: list[str], seed: int, answer: object) -> str:
        with pool.session(seed=seed, tools={"tool": "a tool"}, call_tool=lambda *_: answer) as session:
            for block in blocks:
                session.run(block)
            return session.snapshot_key()

    blocks = ["x = 1", "x", "y = tool(x)"]
    base = key(blocks)
    assert len(base) == 64
    assert int(base, 16) >= 0
    assert key(blocks) == base
    assert key(blocks, forkable=True, checkpoint=True) == base
    assert key(blocks, forkable=False, warm=1) == base
    for other in LEVELS:
        if why_not(other) is None:
            assert key(blocks, isolation=other) == base
    others = [
        key(blocks[:-1]),
        key([*blocks, ""]),
        key(["x", "x = 1", "y = tool(x)"]),
        key(["x = 1\nx", "", "y = tool(x)"]),
        key(blocks, seed=1),
        key(blocks, answer=2),
        key(blocks, answer="1"),
        key(blocks, environment={"A": "b"}),
        key(blocks, preload=["decimal"]),
        key(blocks, guardrails=Guardrails()),
        key(blocks, limits=SandboxLimits(wall_time=1.0, grace=0.6, threads=25)),
        key(["import time; time.time()"]),
    ]
    assert len({base, *others}) == len(others) + 1


UNKNOWABLE = {
    "an interrupt": "while True: pass",
    "a death": "import os; os._exit(1)",
    "threads": "import threading, time; threading.Thread(target=time.sleep, args=(60,)).start()",
    "no memory": "x = bytearray(8 << 30)",
}


@pytest.mark.parametrize("what", UNKNOWABLE)
def test_states_that_nobody_knows(pool: SandboxPool, what: str) -> None:
    with pool.session(seed=0) as one, pool.session(seed=0) as two:
        assert one.snapshot_key() == two.snapshot_key()
        for each in (one, two):
            each.run(UNKNOWABLE[what])
        assert one.snapshot_key() != two.snapshot_key()
        assert one.snapshot_key() == one.snapshot_key()
        for each in (one, two):
            each.run("1")
        assert one.snapshot_key() != two.snapshot_key()
        if what != "threads":
            (copy,) = one.fork()
            assert copy.snapshot_key() == one.snapshot_key()


def test_files_and_history(pool: SandboxPool) -> None:
    with pool.session(seed=0) as one, pool.session(seed=0) as two:
        one.put("f", b"1")
        assert one.snapshot_key() != two.snapshot_key()
        two.put("f", b"2")
        assert one.snapshot_key() != two.snapshot_key()
        with pool.session(seed=0) as three:
            three.put("./f", b"1")
            assert one.snapshot_key() == three.snapshot_key()
            one.get("f")
            assert one.snapshot_key() == three.snapshot_key()
    with pool.session(seed=0) as first:
        history = [(code, first.run(code)) for code in ("x = 1", "x")]
        with pool.session(seed=0, history=history) as second, pool.session(seed=0, history=history) as third:
            assert first.snapshot_key() != second.snapshot_key()  # whether it can be repeated nobody knows yet
            assert second.snapshot_key() != third.snapshot_key()
            for each in (first, second):
                each.run("x += 1")
            assert first.snapshot_key() == second.snapshot_key()
        changed = [("x = 1", history[0][1]), ("x + 1", history[1][1])]
        with pool.session(seed=0, history=changed) as one, pool.session(seed=0, history=changed) as two:
            assert one.run("1").state_lost
            assert two.run("1").state_lost
            assert one.snapshot_key() != two.snapshot_key()
