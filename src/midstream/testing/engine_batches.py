"""What rows of a batch do to each other, which is nothing; and batches that are ended, paused and gone on with."""

from __future__ import annotations

import threading
from collections.abc import Callable

from midstream.batch import TrajectoryBatch
from midstream.testing.checked_engine import Case, CheckedEngine, expect, refused
from midstream.testing.engine_texts import TWO
from midstream.testing.steering import CHOICE, CHOICES, EOS, Part, Shown, Steered, steered
from midstream.types import StopKind, Trajectory

_LONG = 600.0
"""Seconds after which something that is waited for is not going to happen."""


def many_rows_of_every_length(subject: CheckedEngine) -> None:
    """More rows than run at a time, that enter and leave as others go on, in the order of their prompts."""
    cases = [_varied(place) for place in range(40)]
    subject.run(cases)
    subject.run(cases, max_open_rows=7)


def a_fault_of_a_tool_is_a_result(subject: CheckedEngine) -> None:
    def fail() -> None:
        raise ValueError("no")

    cases = [
        Case(steered("<code>", "fail()", "</code>", Shown("<result>ValueError('no')</result>"), " the"), name="raised"),
        Case(steered("<code>", "1+1", "</code>", TWO, " the"), name="another row"),
        Case(steered("<code>", "ask(6)", "</code>", Shown("<result>7</result>"), " the"), name="answered"),
    ]
    subject.run(cases, tools={"fail": fail, "ask": lambda number: number + 1})


def a_slow_tool_holds_no_other_row(subject: CheckedEngine) -> None:
    """It answers once another row, which wrote its block later, has ended."""
    ended = threading.Event()

    def wait() -> str:
        return "through" if ended.wait(_LONG) else "nobody came"

    slow = steered("<code>", "wait()", "</code>", Shown("<result>'through'</result>"), " the")
    quick = steered(*["is"] * 20, "<code>", "1+1", "</code>", TWO, *[" the"] * 20)
    subject.run(
        [Case(slow, name="slow"), Case(quick, name="quick")],
        tools={"wait": wait},
        reward=_setting(ended),
    )


def samples_of_one_prompt(subject: CheckedEngine) -> None:
    """They share their beginning and no more; each is what it would be alone."""
    case = Case(_free("is", before=(EOS,) * 5))
    samples = [row.ids for row in subject.run([case, Case(_free(" the"))], n=6)][:6]
    expect(len(set(map(tuple, samples))) > 1, "all samples of a prompt are the same")
    if subject.capabilities.keyed_noise:
        again = subject.run([case, Case(_free("x"))], n=6, max_open_rows=1)
        expect([row.ids for row in again][:6] == samples, "samples differ where they are opened one at a time")


def rows_do_not_depend_on_their_neighbours(subject: CheckedEngine) -> None:
    """Alone, together, in another order: the same seed gives the same ids. (What is sure must be right in any case.)"""
    cases = [Case(_free("x", before=(EOS,) * place), name=f"row {place}") for place in range(5)]

    def ids(batch: TrajectoryBatch) -> dict[str | None, list[int]]:
        return {row.prompt.id: row.ids for row in batch}

    together, backwards = ids(subject.run(cases, seed=3)), ids(subject.run(cases[::-1], seed=3))
    alone = {name: one for case in cases for name, one in ids(subject.run([case], seed=3)).items()}
    other = ids(subject.run(cases, seed=4))
    if subject.capabilities.keyed_noise:
        expect(together == alone, "rows have other ids alone than in a batch")
        expect(together == backwards, "rows have other ids in another order")
        expect(together != other, "another seed gives the same ids")


def cancelling_keeps_what_is_finished(subject: CheckedEngine) -> None:
    ended = threading.Event()
    cases = [Case(steered("is"), name="short"), Case(steered("is", "<code>", "end()", "</code>", TWO), name="long")]

    def end() -> None:
        if ended.wait(_LONG):
            generator.cancel()

    with subject.generator({"end": end}) as generator:
        short, long = generator.generate(subject.prompts(cases), reward=_setting(ended))
    expect(short.stop == cases[0].stop, f"a row that had ended is said to have stopped for {short.stop}")
    expect(long.stop.kind is StopKind.CANCELLED, f"a cancelled row stopped for {long.stop}")
    _expect_beginning(cases[1], long)
    subject.hold_nothing_open()
    subject.run([_varied(place) for place in range(4)])


def a_paused_row_goes_on_as_if_nothing_had_been(subject: CheckedEngine) -> None:
    cases = [_stopping(place, "stop()") for place in range(4)]
    calls = 0

    def stop() -> int:
        nonlocal calls
        calls += 1
        if calls == 2:
            generator.interrupt()
        return 2

    with subject.generator({"stop": lambda: 2}) as generator:
        whole = generator.generate(subject.prompts(cases))
    subject.hold(cases, whole)
    with subject.generator({"stop": stop}) as generator:
        first = generator.generate(subject.prompts(cases))
        expect(len(first.unfinished) > 0, "no row was left to be gone on with")
        for case, row in zip(cases, first, strict=True):
            _expect_beginning(case, row)
        resumed = iter(generator.generate(first.unfinished))
        rows = TrajectoryBatch([next(resumed) if row.stop.resumable else row for row in first], generator.record)
    subject.hold(cases, rows)
    if subject.capabilities.keyed_noise:
        expect([row.ids for row in rows] == [row.ids for row in whole], "rows that were paused have other ids")


def weights_change_between_two_tokens(subject: CheckedEngine) -> None:
    """Ids before the change have the old version, ids behind it the new one; nothing else changes."""
    if not subject.capabilities.set_weights:
        with subject.generator() as generator:
            refused(lambda: generator.update_weights(lambda: None, 1), "update_weights")
        return
    for keep_cache in (False, True):
        old = subject.engine.weight_version
        _change_weights(subject, old, keep_cache)
        expect(subject.engine.weight_version == old + 1, "the engine does not have the version that it was given")


def _change_weights(subject: CheckedEngine, old: int, keep_cache: bool) -> None:
    cases = [_stopping(place, "change()") for place in range(4)]
    changed = threading.Event()
    began: list[bool] = []

    def change() -> int:
        if not began:
            began.append(True)
            generator.update_weights(lambda: None, old + 1, keep_cache=keep_cache)
            changed.set()
        return 2 if changed.wait(_LONG) else -1

    with subject.generator({"change": change}) as generator:
        batch = generator.generate(subject.prompts(cases))
    subject.hold(cases, batch)
    for row in batch:
        versions = [version for version in row.weight_versions if version >= 0]
        expect(
            set(versions) <= {old, old + 1} and versions == sorted(versions), f"an id has a version of {set(versions)}"
        )
        call = row.calls[0].call.position
        behind = {version for version in row.weight_versions[call:] if version >= 0}
        expect(behind == {old + 1}, f"ids behind the change have the versions {behind}")
    expect(any(old in row.weight_versions for row in batch), "no id before the change has the old version")


def _setting(event: threading.Event) -> Callable[[Trajectory], float]:
    """A reward that says that a row has ended."""

    def reward(trajectory: Trajectory) -> float:
        event.set()
        return float(trajectory.generation_length)

    return reward


def _varied(place: int) -> Case:
    """A row whose prompt, text and blocks are as its number says."""
    parts: list[Part] = [" the"] * (place % 5)
    for block in range(place % 4):
        parts += ["<code>", f"{place}+{block}", "</", "code", ">x", Shown(f"<result>{place + block}</result>"), "is"]
    return Case(steered(*parts, *["x"] * (place % 7), before=(EOS,) * (place * 3 % 29)), name=f"row {place}")


def _free(text: str, before: tuple[int, ...] = ()) -> Steered:
    """A row of free choices: 24 of them, on both sides of a block."""
    block: tuple[Part, ...] = ("<code>", "1+1", "</code>", TWO)
    return steered(text, *[CHOICE] * CHOICES * 2, *block, *[CHOICE] * CHOICES, before=before)


def _stopping(place: int, code: str) -> Case:
    """A row that calls a tool, earlier or later."""
    block: tuple[Part, ...] = ("<code>", code, "</code>", TWO)
    return Case(steered(*[CHOICE] * (2 + 3 * place), *block, *[CHOICE] * 9, "<code>", "1+1", "</code>", TWO, CHOICE))


def _expect_beginning(case: Case, row: Trajectory) -> None:
    start = len(row.prompt_ids)
    expect(
        case.steered.agrees(row.ids[start:], row.mask[start:]) is None,
        f"row {row.prompt.id!r}, which was ended early, does not begin as it should",
    )


BATCHES: tuple[Callable[[CheckedEngine], None], ...] = (
    many_rows_of_every_length,
    a_fault_of_a_tool_is_a_result,
    a_slow_tool_holds_no_other_row,
    samples_of_one_prompt,
    rows_do_not_depend_on_their_neighbours,
    cancelling_keeps_what_is_finished,
    a_paused_row_goes_on_as_if_nothing_had_been,
    weights_change_between_two_tokens,
)
