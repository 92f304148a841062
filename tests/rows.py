"""Drives a row as an engine and a sandbox would, with ids and results that a test gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from midstream.markup import CODE_TAGS, Markup
from midstream.row import Event, Inject, Nothing, Row, RowState, Stopped
from midstream.types import Call, ExecutionResult, Limits, Prompt, Trajectory

Answers = Mapping[str, str] | Callable[[Call], ExecutionResult]
"""What blocks show, by their code; blocks that are not in it show nothing."""


def logprob_at(place: int) -> float:
    """The logprob of the id at a place of what an engine says; the first is exactly 0."""
    return -(place % 64) / 16


@dataclass
class Run:
    """A row that was driven, and all that it said."""

    row: Row
    events: list[Event] = field(default_factory=list)
    outcomes: list[Inject | Nothing | Stopped] = field(default_factory=list)
    place: int = 0
    """How many of the engine's ids were accepted."""

    @property
    def trajectory(self) -> Trajectory:
        return self.row.trajectory

    @property
    def text(self) -> str:
        return self.trajectory.text

    @property
    def codes(self) -> list[str]:
        return [record.call.code for record in self.row.records]

    @property
    def injected(self) -> list[str]:
        return [segment.text for segment in self.trajectory.segments if segment.origin == "injected"]


def new_row(
    tokenizer: Any,
    prompt: Prompt | str = "Q: ",
    markup: Markup | None = CODE_TAGS,
    *,
    context: int | None = None,
    eos_ids: frozenset[int] | None = None,
    **limits: Any,
) -> Row:
    if isinstance(prompt, str):
        prompt = Prompt(text=prompt)
    return Row(prompt, tokenizer, markup, Limits(**limits), context_length=context, eos_ids=eos_ids)


def result_of(call: Call, answers: Answers) -> ExecutionResult:
    if call.declined:
        return ExecutionResult(call.declined)
    return answers(call) if callable(answers) else ExecutionResult(answers.get(call.code, ""))


def drive(
    row: Row,
    ids: Sequence[int],
    answers: Answers | None = None,
    *,
    chunks: Sequence[int] = (1,),
    versions: Callable[[int], int] = lambda place: 0,
    place: int = 0,
) -> Run:
    """Say ``ids``, in chunks of these sizes in turn, until the row stops or there are no more.

    After a closed block the engine goes on with the id behind the last accepted one, as a script does.
    With ``answers=None`` the first block is left waiting. ``place`` is where in ``ids`` to begin.
    """
    run = Run(row, place=place)
    turn = 0
    if row.state is RowState.EXECUTING and answers is not None:
        run.outcomes.append(row.inject(*(result_of(call, answers) for call in row.pending)))
    while run.place < len(ids) and row.state is RowState.GENERATING:
        size = chunks[turn % len(chunks)]
        turn += 1
        said = ids[run.place : run.place + size]
        logprobs = [logprob_at(run.place + i) for i in range(len(said))]
        received = row.receive(said, logprobs, versions(run.place))
        run.events.extend(received.events)
        run.place += received.accepted
        if row.state is RowState.EXECUTING and answers is not None:
            run.outcomes.append(row.inject(*(result_of(call, answers) for call in row.pending)))
    return run
