"""The scripted engine keeps to the whole protocol, says what it is told, and fails on command."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from midstream import Capabilities, Engine, Media, RowRequest, ScriptedEngine, Update, errors
from midstream.decoding import decode
from midstream.engines.base import prompt_seed, sample_seed
from midstream.engines.scripted import scripted_logprob
from tests.vocabularies import tokenizer, vocabulary

NAME = "o200k"
EOS = min(vocabulary(NAME).eos_ids)
PROMPT = tuple(vocabulary(NAME).encode_text("Q:"))


def engine(script: Any, **options: Any) -> ScriptedEngine:
    return ScriptedEngine(tokenizer(NAME), script, **options)


def ids_of(text: str) -> list[int]:
    return vocabulary(NAME).encode_text(text)


def run(one: ScriptedEngine, steps: int = 1000) -> dict[int, list[int]]:
    """The ids of every row until each is exhausted or at its EOS."""
    said: dict[int, list[int]] = {}
    for _ in range(steps):
        updates = one.step()
        if not updates:
            break
        for update in updates:
            said.setdefault(update.handle, []).extend(update.ids)
            if EOS in update.ids or update.exhausted or update.error:
                one.rollback(update.handle, 0)
    return said


def test_it_is_an_engine() -> None:
    one = engine("x", context_length=9)
    assert isinstance(one, Engine)
    assert one.capabilities == Capabilities(logprobs="raw", fork=True, media=True, set_weights=True, keyed_noise=True)
    assert (one.context_length, one.eos_ids, one.weight_version, one.step()) == (9, {EOS}, 0, [])


@pytest.mark.parametrize(
    "script",
    [
        "some words",
        {"Q:": "some words"},
        lambda request, sample: "some words",
        ["some words", "never said"],
        ids_of("some words"),
        [*ids_of("some words"), EOS],
        {"Q:": lambda text: " words" if "some" in text else "some words"},
    ],
)
def test_scripts_come_in_many_forms(script: Any) -> None:
    one = engine(script)
    (handle,) = one.open(RowRequest(PROMPT))
    assert run(one) == {handle: [*ids_of("some words"), EOS]}
    one.close(handle)
    assert one.open_rows == 0


def test_replies_are_given_in_the_order_of_opening_and_run_out() -> None:
    one = engine(["first", ids_of("second")])
    handles = [*one.open(RowRequest(PROMPT)), *one.open(RowRequest(PROMPT))]
    assert list(run(one).values()) == [[*ids_of("first"), EOS], [*ids_of("second"), EOS]]
    with pytest.raises(errors.ConfigurationError, match="has 2 replies, and row 3"):
        one.open(RowRequest(PROMPT))
    assert len(handles) == 2


def test_a_prompt_without_a_reply_is_named() -> None:
    with pytest.raises(errors.ConfigurationError, match="no reply for the prompt 'Q:'"):
        engine({"other": "x"}).open(RowRequest(PROMPT))


def test_a_function_of_the_text_is_asked_again_behind_each_result() -> None:
    asked: list[str] = []

    def reply(text: str) -> str:
        asked.append(text)
        return {1: "one two", 2: " three", 3: ""}[len(asked)]

    one = engine(lambda request, sample: reply)
    (handle,) = one.open(RowRequest(PROMPT))
    one.step()
    one.rollback(handle, 0)
    one.extend(handle, ids_of("=R1="))
    said = run(one)[handle]
    one.extend(handle, ids_of("=R2="))
    assert asked == ["Q:", "Q:one=R1=", "Q:one=R1= three<|endoftext|>=R2="]
    assert decode(vocabulary(NAME), said) == " three<|endoftext|>"
    assert run(one) == {handle: [EOS]}  # an empty reply ends the row


def test_tags_can_be_cut_anywhere() -> None:
    one = engine("<code>1</code>", split=lambda text: [i for c in text for i in ids_of(c)])
    one.open(RowRequest(PROMPT))
    assert len(run(one)[1]) == len("<code>1</code>") + 1


@pytest.mark.parametrize("tokens_per_step", [1, 2, 3, 100])
def test_logprobs_are_keyed_by_seed_sample_and_position(tokens_per_step: int) -> None:
    one = engine("some more words to say", tokens_per_step=tokens_per_step)
    handles = one.open(RowRequest(PROMPT, seed=5, first_sample=2), 2)
    seen: dict[int, list[float]] = {handle: [] for handle in handles}
    while updates := one.step():
        for update in updates:
            assert len(update.ids) == len(update.logprobs) <= tokens_per_step
            seen[update.handle].extend(update.logprobs)
            if EOS in update.ids:
                one.rollback(update.handle, 0)
    for sample, handle in zip((2, 3), handles, strict=True):
        places = range(len(PROMPT), len(PROMPT) + len(seen[handle]))
        assert seen[handle] == [scripted_logprob(sample_seed(5, sample), place) for place in places]
    assert seen[handles[0]] != seen[handles[1]]


def test_some_logprobs_are_exactly_zero_and_none_is_positive() -> None:
    values = [scripted_logprob(seed, place) for seed in range(100) for place in range(100)]
    assert max(values) == 0.0
    assert 0.0 in values
    assert min(values) > -4


def test_what_is_rolled_back_is_said_again() -> None:
    one = engine("one two three four", tokens_per_step=3)
    (handle,) = one.open(RowRequest(PROMPT))
    first = one.step()[0]
    one.rollback(handle, 2)
    assert one.step() == []  # held
    one.extend(handle, ids_of("!"))
    again = one.step()[0]
    assert list(again.ids[:2]) == list(first.ids[1:])
    assert again.logprobs[0] == scripted_logprob(sample_seed(0, 0), len(PROMPT) + 2)


def test_a_fork_goes_on_by_itself() -> None:
    one = engine("one two three")
    (handle,) = one.open(RowRequest(PROMPT, seed=1))
    one.step()
    other = one.fork(handle, seed=9)
    assert len(one.step()) == 1  # the fork is held
    one.extend(other, ())
    said = run(one)
    assert said[other] == [*ids_of("one two three")[1:], EOS]
    assert said[handle] == [*ids_of("one two three")[2:], EOS]


def test_weights_have_versions_and_a_paused_engine_does_not_step() -> None:
    one = engine("one two")
    one.open(RowRequest(PROMPT))
    assert one.step()[0].weight_version == 0
    one.pause()
    with pytest.raises(errors.EngineError, match="paused"):
        one.step()
    one.set_weights(3, keep_cache=False)
    one.resume()
    assert (one.step()[0].weight_version, one.weight_version) == (3, 3)


@pytest.mark.parametrize(("request_bound", "context", "length"), [(4, None, 4), (None, 5, 5), (9, 3, 3)])
def test_a_row_never_holds_more_than_it_may(request_bound: int | None, context: int | None, length: int) -> None:
    one = engine("a b c d e f g h i j k", tokens_per_step=2, context_length=context)
    (handle,) = one.open(RowRequest(PROMPT, max_total_tokens=request_bound))
    updates: list[Update] = []
    while not updates or not updates[-1].exhausted:
        updates += one.step()
    assert sum(len(update.ids) for update in updates) + len(PROMPT) == length
    assert one.step() == []
    one.close(handle)


def test_without_an_eos_a_row_that_has_said_all_is_exhausted() -> None:
    one = ScriptedEngine(tokenizer("tagged"), [5, 6])  # this tokenizer names no EOS
    assert one.eos_ids == frozenset()
    one.open(RowRequest((1,)))
    assert [list(one.step()[0].ids) for _ in range(2)] == [[5], [6]]
    assert one.step()[0].exhausted
    other = ScriptedEngine(tokenizer("tagged"), [5, 6], eos_id=0)
    other.open(RowRequest((1,)))
    assert [list(other.step()[0].ids) for _ in range(3)] == [[5], [6], [0]]


def test_a_row_fails_when_it_is_told_to_and_the_others_go_on() -> None:
    one = engine("one two three", fail={"Q:": 2})
    (bad,) = one.open(RowRequest(PROMPT))
    (good,) = one.open(RowRequest((*PROMPT, 5)))
    seen = [one.step() for _ in range(3)]
    assert [update.error for updates in seen for update in updates if update.handle == bad] == [
        None,
        None,
        "the script says that this row fails",
    ]
    assert [update.error for updates in seen for update in updates if update.handle == good] == [None] * 3


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda one, row: one.extend(row, [1]), "not held"),
        (lambda one, row: one.extend(99, [1]), "no row 99 is open"),
        (lambda one, row: one.rollback(99, 0), "no row 99 is open"),
        (lambda one, row: one.rollback(row, 1), "1 ids could be taken back"),
        (lambda one, row: one.rollback(row, -1), "-1 of them cannot"),
        (lambda one, row: one.fork(99, 0), "no row 99 is open"),
        (lambda one, row: one.close(99), "no row 99 is open"),
    ],
)
def test_being_driven_out_of_turn_is_told(call: Any, says: str) -> None:
    one = engine("x")
    (row,) = one.open(RowRequest(PROMPT))
    with pytest.raises(errors.ProtocolError, match=says):
        call(one, row)


def test_options_that_cannot_work_are_refused() -> None:
    with pytest.raises(errors.ConfigurationError, match="tokens_per_step=0"):
        engine("x", tokens_per_step=0)


def test_media_are_taken_and_shutdown_forgets_all() -> None:
    one = engine("x y")
    (row,) = one.open(RowRequest(PROMPT, media=(Media("image/png", b"p"),)))
    one.rollback(row, 0)
    one.extend(row, (), [Media("image/png", b"q")])
    assert one.step()[0].ids
    one.shutdown()
    one.shutdown()
    assert one.open_rows == 0


def test_keys_of_prompts_and_samples_never_change() -> None:
    # Records and resumed rows depend on these numbers: a change would shift all noise.
    def digest(text: str) -> int:
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")

    assert sample_seed(5, 2) == digest("sample:5:2")
    assert prompt_seed(7, "p") == digest("prompt:7:p")
    assert len({sample_seed(seed, sample) for seed in range(50) for sample in range(50)}) == 2500


def test_counts_of_steps_and_tokens() -> None:
    one = engine("a b", tokens_per_step=2)
    one.open(RowRequest(PROMPT), 2)
    run(one)
    assert (one.steps, one.tokens) == (2, 6)
