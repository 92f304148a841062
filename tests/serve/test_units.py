"""What stands between HTTP and rows, without either: texts of answers, who may ask, and sessions by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from midstream import Generator, KeptSession, Limits, Message, SandboxPool, ScriptedEngine, errors
from midstream.serve.admission import Admission, ApiKeys, ServiceLimits
from midstream.serve.choices import Choice
from midstream.serve.refusals import Refused
from midstream.serve.service import instructed
from midstream.serve.sessions import NamedSessions
from tests.rollouts import LONG
from tests.synthetic import Cutter

# --- texts


def parts_of(
    pieces: Sequence[str | bytes], pool: SandboxPool, stops: tuple[str, ...], limits: Limits | None = None
) -> tuple[list[tuple[str, str]], Choice]:
    """What is shown of a row that says ``pieces``, an id each."""
    cutter = Cutter()
    choice = Choice(cutter.vocabulary, stops)
    deltas: list[Any] = []
    with Generator(ScriptedEngine(cutter.vocabulary, cutter.cut(*pieces)), pool=pool) as generator:
        limits = limits or Limits(stop_strings=stops)
        generator.submit({"text": "p", "limits": limits}, listener=deltas.append).result(LONG)
    return [(part.text, part.origin) for delta in deltas for part in choice.take(delta)], choice


@pytest.mark.parametrize(
    ("pieces", "stops", "shown"),
    [
        (["a", "b"], (), ["a", "b"]),
        (["a", "EN", "D", "b"], ("END",), ["a"]),
        (["a", "EN", "b"], ("END",), ["a", "ENb"]),
        (["aEN", "Db"], ("END",), ["a"]),
        (["aE", "E", "N", "x"], ("END",), ["a", "E", "ENx"]),
        (["xE", "ND"], ("END", "ND"), ["x"]),
        (["one", "EN"], ("END",), ["one", "EN"]),  # at the end of the sequence it is known to be none
        (["E", "N"], ("END", "EX"), ["EN"]),
        (["x", b"\xf0\x9f", b"\x99\x82", "END"], ("END",), ["x", "🙂"]),
    ],
    ids=str,
)
def test_what_may_become_a_stop_string_waits(
    sandboxes: SandboxPool, pieces: list[str | bytes], stops: tuple[str, ...], shown: list[str]
) -> None:
    parts, choice = parts_of(pieces, sandboxes, stops)
    assert "".join(text for text, _ in parts) == "".join(shown)
    assert [text for text, _ in parts] == shown
    assert choice.spans[-1].end == len("".join(shown))


def test_a_stop_string_does_not_go_on_behind_a_result(sandboxes: SandboxPool) -> None:
    parts, choice = parts_of(["<code>1</code>E", "ND"], sandboxes, ("END",))
    assert "".join(text for text, _ in parts) == "<code>1</code>E<result>1</result>ND"
    assert [span.origin for span in choice.spans] == ["generated", "injected", "generated"]


def test_a_result_behind_a_stop_string_is_not_shown(sandboxes: SandboxPool) -> None:
    """One id ends the block and the row: the block has run, and the answer ends before the stop string."""
    parts, choice = parts_of(["<code>1</code>END"], sandboxes, ("END",))
    assert "".join(text for text, _ in parts) == "<code>1</code>"
    assert choice.trajectory is not None
    assert choice.trajectory.text.endswith("<result>1</result>")
    assert choice.finish_reason == "stop"


def test_the_end_of_the_sequence_is_not_shown(sandboxes: SandboxPool) -> None:
    parts, _ = parts_of(["a<eos>", "b"], sandboxes, ())  # as text it is part of the answer
    assert "".join(text for text, _ in parts) == "a<eos>b"
    parts, choice = parts_of(["abc", "def"], sandboxes, (), Limits(max_new_tokens=1))
    assert parts == [("abc", "generated")]
    assert choice.finish_reason == "length"


# --- who may ask


def test_keys_are_held_as_digests_alone() -> None:
    keys = ApiKeys({"s3cret": "ann", "other": "bob"})
    assert keys.client("Bearer s3cret") == "ann"
    assert keys.client("bearer other") == "bob"
    assert "s3cret" not in repr(keys) + repr(vars(keys))
    for wrong in (None, "", "s3cret", "Basic s3cret", "Bearer", "Bearer s3cre", "Bearer s3crett", "Bearer ann"):
        with pytest.raises(Refused) as refused:
            keys.client(wrong)
        assert refused.value.status == 401
        assert refused.value.headers == {"www-authenticate": "Bearer"}
    with pytest.raises(errors.ConfigurationError, match="'eve' is empty"):
        ApiKeys({"": "eve"})


def test_places_are_given_back_one_by_one() -> None:
    admission = Admission(ServiceLimits(rows=2, queue=1, rows_per_client=2))
    leave = admission.enter("ann", 2)
    with pytest.raises(Refused) as refused:
        admission.enter("ann", 1)
    assert (refused.value.status, refused.value.headers["retry-after"]) == (429, "1")
    admission.enter("bob", 1)
    with pytest.raises(Refused) as refused:
        admission.enter("eve", 1)
    assert (refused.value.status, refused.value.headers["retry-after"]) == (503, "1")
    leave()
    admission.enter("eve", 1)
    assert admission.rows == 3
    with pytest.raises(Refused) as refused:
        admission.enter("dan", 4)
    assert (refused.value.status, refused.value.param) == (400, "n")


def test_an_allowance_grows_back_and_no_further() -> None:
    now = 0.0
    admission = Admission(ServiceLimits(requests_per_minute=3), clock=lambda: now)

    def asked() -> int:
        count = 0
        while True:
            try:
                admission.count_request("ann")
            except Refused:
                return count
            count += 1

    assert asked() == 3
    now = 20.0
    assert asked() == 1
    now = 10_000.0
    assert asked() == 3
    with pytest.raises(Refused) as refused:
        admission.count_request("ann")
    assert refused.value.headers["retry-after"] == "20"


def test_less_than_a_request_a_minute() -> None:
    admission = Admission(ServiceLimits(requests_per_minute=0.5), clock=lambda: 0.0)
    admission.count_request("ann")
    with pytest.raises(Refused) as refused:
        admission.count_request("ann")
    assert refused.value.headers["retry-after"] == "120"


def test_clients_that_ask_nothing_are_forgotten() -> None:
    now = 0.0
    admission = Admission(ServiceLimits(requests_per_minute=1), clock=lambda: now)
    stays = admission.enter("stays", 1)
    for number in range(5000):
        now += 1
        admission.count_request(f"client {number}")
    assert len(admission._clients) < 2000
    assert "stays" in admission._clients
    stays()
    assert admission.rows == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rows", 0),
        ("rows", True),
        ("queue", -1),
        ("rows_per_client", 0),
        ("sessions_per_client", 0),
        ("body", 0),
        ("requests_per_minute", 0),
        ("requests_per_minute", float("nan")),
    ],
)
def test_bounds_that_are_none(name: str, value: Any) -> None:
    with pytest.raises(errors.ConfigurationError, match=f"ServiceLimits.{name}="):
        ServiceLimits(**{name: value})


# --- sessions by name


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_sessions_by_name() -> None:
    ended: list[KeptSession] = []
    clock = Clock()
    sessions = NamedSessions(60.0, 2, ended.append, clock)
    first, new = sessions.take("ann", "a")
    assert new
    sessions.used("ann", "a")
    assert sessions.take("ann", "a") == (first, False)
    assert sessions.take("bob", "a")[0] is not first
    sessions.used("bob", "a")
    with pytest.raises(Refused) as refused:  # granted, and its row has not begun
        sessions.take("ann", "a")
    assert refused.value.status == 409
    with pytest.raises(Refused) as refused:
        sessions.drop("ann", "a")
    assert refused.value.status == 409
    first.in_use = True
    sessions.used("ann", "a")
    with pytest.raises(Refused) as refused:
        sessions.take("ann", "a")
    assert refused.value.status == 409
    clock.now = 61.0
    second, _ = sessions.take("ann", "b")  # what is in use does not grow old, bob's has
    assert len(ended) == 1
    with pytest.raises(Refused) as refused:  # the one is in use, the other granted
        sessions.take("ann", "c")
    assert refused.value.status == 429
    sessions.used("ann", "b")
    third, _ = sessions.take("ann", "c")  # in place of the one that was idle for longest
    assert ended[1:] == [second]
    third.in_use = True
    sessions.used("ann", "c")
    with pytest.raises(Refused) as refused:
        sessions.take("ann", "d")
    assert refused.value.status == 429
    first.in_use = third.in_use = False
    sessions.used("ann", "a")
    clock.now = 100.0
    sessions.used("ann", "c")
    clock.now = 122.0
    assert sessions.take("ann", "a")[0] is not first
    assert sessions.take("ann", "c")[0] is third
    sessions.used("ann", "c")
    with pytest.raises(Refused) as refused:
        sessions.drop("bob", "c")
    assert refused.value.status == 404
    sessions.drop("ann", "c")
    assert ended[-1] is third
    assert len(sessions) == 1


def test_instructions_stand_before_what_the_system_says() -> None:
    user = Message("user", "Q")
    assert instructed((user,), "Use code.") == (Message("system", "Use code."), user)
    told = (Message("system", "Be kind."), user)
    assert instructed(told, "Use code.") == (Message("system", "Use code.\n\nBe kind."), user)
