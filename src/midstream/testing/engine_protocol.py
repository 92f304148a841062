"""What an engine does in the hands of its driver, call by call (:mod:`midstream.engines.base`)."""

from __future__ import annotations

from collections.abc import Callable

from midstream.engines.base import RowRequest
from midstream.errors import ConfigurationError, MidstreamError
from midstream.generation import Generator
from midstream.testing.checked_engine import CheckedEngine, expect, refused
from midstream.testing.remains import Remains
from midstream.testing.steering import CHOICE, EOS, Shown, ids_of, steered
from midstream.types import Media, Prompt, Sampling

_RESULT = "<result>"
_BEFORE, _BEHIND = "0123456789", "abcdefghijklmnop"
_ROW = steered(*_BEFORE, Shown(_RESULT * 2), *_BEHIND)
"""Its result is sixteen times one id."""

_INJECTED = ids_of(Shown(_RESULT * 2))


def ids_are_taken_back_and_results_go_in_their_place(subject: CheckedEngine) -> None:
    """However many ids came beyond the end of a block, and however many were taken back."""
    count = len(_BEFORE)
    for beyond in (0, 1, 2, 5):
        handles = subject.open(_ROW, 2)
        for ids in subject.advance(handles, count, beyond):
            _expect_text(ids, _BEFORE)
        for handle in handles:
            subject.engine.extend(handle, _INJECTED)
        for ids in subject.advance(handles, 6):
            _expect_text(ids, _BEHIND[:6])
        subject.close(handles)


def a_row_that_was_taken_back_says_the_same_again(subject: CheckedEngine) -> None:
    (handle,) = subject.open(_ROW)
    _expect_text(subject.advance([handle], 7)[0], _BEFORE[:7])
    subject.engine.rollback(handle, 3)
    subject.engine.extend(handle, ())
    _expect_text(subject.advance([handle], 5)[0], _BEFORE[4:9])
    subject.close([handle])


def a_held_row_gets_nothing(subject: CheckedEngine) -> None:
    held, running = (subject.open(_ROW)[0] for _ in range(2))
    subject.advance([held, running], 4)
    subject.engine.extend(running, ())
    _expect_text(subject.advance([running], 6)[0], _BEFORE[4:])  # which fails at an update for the other row
    subject.engine.extend(held, ())
    _expect_text(subject.advance([held], 6)[0], _BEFORE[4:])
    subject.close([held, running])


def a_row_that_starts_with_more_than_its_prompt(subject: CheckedEngine) -> None:
    """As one that is gone on with elsewhere."""
    ids = (*_ROW.prompt, *_BEFORE.encode(), *_INJECTED, *_BEHIND[:3].encode())
    (handle,) = subject.engine.open(RowRequest(ids, stop_ids=(EOS,)), 1)
    _expect_text(subject.advance([handle], 6)[0], _BEHIND[3:9])
    subject.close([handle])


def samples_keep_their_numbers(subject: CheckedEngine) -> None:
    if not subject.capabilities.keyed_noise:
        return
    free = steered(*[CHOICE] * 16)
    handles = subject.open(free, 4, seed=9)
    samples = subject.advance(handles, 16)
    subject.close(handles)
    expect(len(set(map(tuple, samples))) > 1, "all samples of a prompt are the same")
    (alone,) = subject.open(free, first_sample=2, seed=9)
    expect(subject.advance([alone], 16)[0] == samples[2], "a sample opened by its number is another one")
    subject.close([alone])


def forks_share_a_past_and_no_more(subject: CheckedEngine) -> None:
    (source,) = subject.open(steered(*_BEFORE, *[CHOICE] * 16))
    subject.advance([source], 6)
    if not subject.capabilities.fork:
        refused(lambda: subject.engine.fork(source, 1), "fork")
        subject.close([source])
        return
    forks = [subject.engine.fork(source, seed) for seed in (1, 2)]
    subject.engine.close(source)
    for fork in forks:
        subject.engine.extend(fork, ())
    one, other = subject.advance(forks, 20)
    for ids in (one, other):
        _expect_text(ids[:4], _BEFORE[6:])
    if subject.tolerance is not None:  # one that runs no model says what its script does
        expect(one != other, "forks with two seeds sampled the same")
    subject.close(forks)


def what_it_cannot_do_is_refused_in_words(subject: CheckedEngine) -> None:
    able = subject.capabilities
    media = (Media("image/png", b"\x89PNG"),)
    if not able.media:
        refused(lambda: subject.engine.open(RowRequest(_ROW.prompt, media=media)), "media")
        with subject.generator() as generator:
            refused(lambda: generator.generate([Prompt(ids=_ROW.prompt, media=media)]), "media")
        (handle,) = subject.open(_ROW)
        subject.advance([handle], 1)
        refused(lambda: subject.engine.extend(handle, (), media), "media in a result")
        subject.engine.close(handle)
    if not able.sampling:
        refused(lambda: Generator(subject.engine, sampling=Sampling(temperature=0.5)), "sampling")
    if not able.set_weights:
        refused(lambda: subject.engine.set_weights(1, keep_cache=False), "set_weights")
    subject.hold_nothing_open()


def a_row_driven_out_of_turn_is_refused(subject: CheckedEngine) -> None:
    engine = subject.engine
    first, second = subject.open(_ROW, 2)
    expect(first != second, "two rows have one handle")
    refused(lambda: engine.extend(first, _INJECTED), "extending a row that runs", MidstreamError)
    engine.rollback(first, 0)
    refused(lambda: engine.rollback(first, len(_ROW.prompt) + 1), "taking back more than there is", MidstreamError)
    subject.close([first, second])
    for call in (
        lambda: engine.extend(first, ()),
        lambda: engine.rollback(first, 0),
        lambda: engine.close(first),
    ):
        refused(call, "a row that was closed", MidstreamError)
    refused(lambda: engine.open(RowRequest(())), "a row without ids", ConfigurationError)
    third = subject.open(_ROW)
    expect(not {first, second} & set(third), "a handle was used again")
    subject.close(third)


def shutting_down_leaves_nothing(subject: CheckedEngine) -> None:
    """Though rows are open; a second time too. It is the last check."""
    subject.open(_ROW, 3)
    subject.engine.shutdown()
    subject.engine.shutdown()
    left = Remains.since(subject.before)
    expect(not left, f"it leaves behind: {', '.join(left)}")


def _expect_text(ids: list[int], text: str) -> None:
    wanted = list(text.encode())
    expect(ids == wanted, f"the ids {ids} came where {wanted} must")


PROTOCOL: tuple[Callable[[CheckedEngine], None], ...] = (
    ids_are_taken_back_and_results_go_in_their_place,
    a_row_that_was_taken_back_says_the_same_again,
    a_held_row_gets_nothing,
    a_row_that_starts_with_more_than_its_prompt,
    samples_keep_their_numbers,
    forks_share_a_past_and_no_more,
    what_it_cannot_do_is_refused_in_words,
    a_row_driven_out_of_turn_is_refused,
)
