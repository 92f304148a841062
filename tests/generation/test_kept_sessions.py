"""Sessions that rows share, one after the other: names stay, whatever became of the interpreter meanwhile."""

from __future__ import annotations

import pytest

from midstream import Generator, KeptSession, SandboxPool, StopKind, errors
from tests.rollouts import LONG, Gate, scripted, shown
from tests.vocabularies import tokenizer

SCRIPTS = {"set": "<code>x = 41; import math</code>", "get": "<code>x + int(math.sqrt(1))</code>"}


def test_a_kept_session_has_the_names_of_earlier_rows(sandboxes: SandboxPool) -> None:
    session = KeptSession()
    with Generator(scripted(SCRIPTS), pool=sandboxes, hold_sessions=LONG) as generator:
        generator.submit("set", session=session).result(LONG)
        row = generator.submit("get", session=session).result(LONG)
        assert shown(row) == ["42"]
        assert row.calls[0].result is not None
        assert not row.calls[0].result.state_lost
        assert "NameError" in str(shown(generator.submit("get").result(LONG))[0])
    assert row.verify(tokenizer("o200k")) == []
    assert len(row.calls) == 1  # of this row alone
    assert [record.call.code for record in session.history] == ["x = 41; import math", "x + int(math.sqrt(1))"]


@pytest.mark.parametrize("gone", ["not held", "given up"])
def test_a_kept_session_that_is_gone_is_built_again(gone: str) -> None:
    session, calls = KeptSession(), []
    scripts = {"set": "<code>x = note(41)</code>", "get": "<code>x + 1</code>"}

    def note(value: int) -> int:
        calls.append(value)
        return value

    hold = 0.0 if gone == "not held" else LONG
    with (
        SandboxPool(preload=[], max_sessions=1) as pool,
        Generator(scripted(scripts), pool=pool, hold_sessions=hold, tools=[note]) as generator,
    ):
        generator.submit("set", session=session).result(LONG)
        if gone == "given up":  # to a row that needs the only place
            generator.submit("set").result(LONG)
        row = generator.submit("get", session=session).result(LONG)
    assert shown(row) == ["42"]
    assert calls == [41] * (1 if gone == "not held" else 2)  # recorded results stand in for calls


def test_random_numbers_go_on_where_a_session_is_built_again(sandboxes: SandboxPool) -> None:
    scripts = {"set": "<code>import random; random.random()</code>", "get": "<code>random.random()</code>"}
    numbers = []
    for hold in (0.0, LONG):
        session = KeptSession()
        with Generator(scripted(scripts), pool=sandboxes, hold_sessions=hold) as generator:
            rows = [
                generator.submit(text, session=session, seed=seed).result(LONG)
                for text, seed in (("set", 5), ("get", 6))
            ]
        assert rows[1].calls[0].result is not None
        assert not rows[1].calls[0].result.state_lost
        numbers.append([shown(row) for row in rows])
    assert numbers[0] == numbers[1]


def test_a_kept_session_outlives_a_row_that_is_given_up_in_a_block(sandboxes: SandboxPool) -> None:
    session, gate = KeptSession(), Gate()
    scripts = {**SCRIPTS, "waits": "<code>x = 0</code><code>hold()</code>"}
    over = []
    with Generator(scripted(scripts), pool=sandboxes, hold_sessions=LONG, tools={"hold": gate}) as generator:
        generator.submit("set", session=session).result(LONG)
        waits = generator.submit("waits", session=session, listener=lambda delta: over.append(delta.trajectory))
        assert gate.reached.wait(LONG)
        with pytest.raises(errors.ProtocolError, match="another row is using it"):
            generator.submit("get", session=session)
        other = generator.submit("set")
        waits.cancel()
        other.result(LONG)
        gate.opened.set()
        assert over[-1] is not None
        assert over[-1].stop.kind is StopKind.CANCELLED
        row = generator.submit("get", session=session).result(LONG)
    assert shown(row) == ["1"]  # the block that was done counts, the one that was cut short does not


def test_a_session_is_free_again_after_a_row_that_could_not_be(sandboxes: SandboxPool) -> None:
    session = KeptSession()
    with Generator(scripted(SCRIPTS, fail={"bad": 0}), pool=sandboxes) as generator:
        with pytest.raises(errors.PromptError):
            generator.submit("", session=session)
        assert not session.in_use
        failed = generator.submit("not in the script", session=session).result(LONG)
        assert failed.stop.kind is StopKind.ENGINE_FAILURE
        generator.submit("set", session=session).result(LONG)

        def refuse() -> None:
            raise errors.SandboxError("no isolation")

        generator._submissions.settle()
        generator._start_sandboxes = refuse  # type: ignore[method-assign]
        with pytest.raises(errors.SandboxError):
            generator.submit("get", session=session).result(LONG)
        assert not session.in_use
