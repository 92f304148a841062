"""Random texts, cut at random and as real vocabularies cut them, through the row and through the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from midstream.markup import CODE_TAGS, FENCED_PYTHON, Markup
from midstream.row import BlockOpened, CodeDelta, Execute, Row, RowState
from midstream.types import ExecutionResult, Limits, Prompt, Trajectory
from midstream.vocabulary import Vocabulary
from tests.properties import examples
from tests.reference import Expected, ManyResultsTooLong, Reference, whole_text
from tests.rows import Run, drive, logprob_at
from tests.spoken import spoken
from tests.synthetic import EOM, EOS, Cutter
from tests.vocabularies import ALL, vocabulary

PROMPT = Prompt(ids=(1, 2, 3))
MARKUPS = {
    "tags": CODE_TAGS,
    "empty results": Markup.tags(inject_empty=True),
    "fenced": FENCED_PYTHON,
    "specials": Markup.tags("<code>", "<|result|>", special_result=True, closing_tokens=("<|eom|>",)),
    "overlapping": Markup.tags("aba", "<r>", end="aca", result_end="ab"),
}
SNIPPETS = {
    "tags": ["<code>", "</code>", "<co", "de>", "</", "code>", "<result>", "</code><", "><", "</code>\n"],
    "fenced": ["```python\n", "```", "\n```", "```\n", "``", "`", "python\n", "```output\n", "\n"],
    "overlapping": ["aba", "aca", "a", "b", "c", "ab", "ca"],
}
ANYTHING = ["x", "1 + 1", "\n", "\n\n", " ", "é", "数", "🙂", "STOP", "ST", "OP", "TOP", "😀😀", "\r\n", "\x00"]
SHOWN = ["", "7", "a\nb", "</code>", "<code>", "```\n", "STOP", "aba", "\n", "é"]


def texts(markup: str, most: int = 14) -> st.SearchStrategy[str]:
    own = SNIPPETS.get(markup, SNIPPETS["tags"])
    return st.lists(st.sampled_from(own * 2 + ANYTHING), max_size=most).map("".join)


@st.composite
def limits(draw: st.DrawFn, longest: int, *, tight: bool) -> Limits:
    """Limits that are reached now and then by a row of about ``longest`` ids; by results only if ``tight``."""
    return Limits(
        max_new_tokens=draw(st.none() | st.integers(1, longest)),
        max_total_tokens=draw(st.integers(4, longest + 4)) if tight and draw(st.booleans()) else None,
        max_tool_calls=draw(st.none() | st.integers(0, 3)),
        at_tool_call_limit=draw(st.sampled_from(["tell", "stop"])),
        max_result_tokens=draw(st.sampled_from([1024, 50])) if tight else 1024,
        reserve_tokens=draw(st.sampled_from([0, 0, 1, 5])),
        count_injected=tight and draw(st.booleans()),
        stop_strings=tuple(draw(st.lists(st.sampled_from(["STOP", "TOP", "code>x", "\n\n\n", "🙂x"]), max_size=2))),
        stop_ids=draw(st.sampled_from([(), (), (EOM,)])),
        ignore_eos=draw(st.booleans()),
    )


@dataclass
class Scene:
    """A row to be driven: what its engine says and what its blocks show."""

    known: Vocabulary
    markup: Markup
    limits: Limits
    said: list[int]
    shown: list[str]
    context: int | None = None

    def show(self, code: str) -> str:
        return self.shown[sum(code.encode()) % len(self.shown)]

    def row(self) -> Row:
        return Row(PROMPT, self.known, self.markup, self.limits, context_length=self.context)

    def drive(self, row: Row, chunks: list[int], place: int = 0) -> Run:
        answers = lambda call: ExecutionResult(self.show(call.code))  # noqa: E731  # one line, as it reads
        return drive(row, self.said, answers, chunks=chunks, place=place)

    def expected(self) -> Expected:
        assert PROMPT.ids is not None
        reference = Reference(self.known, self.markup, self.limits, len(PROMPT.ids), self.show, context=self.context)
        try:
            return reference.read(self.said)
        except ManyResultsTooLong:
            reject()


def check(scene: Scene, run: Run) -> None:
    expected = scene.expected()
    trajectory = run.trajectory
    assert [(segment.origin, list(segment.ids)) for segment in trajectory.segments] == expected.segments
    assert [
        (record.call.code, record.call.lookahead, record.call.position, record.call.declined != "")
        for record in trajectory.calls
    ] == [(block.code, block.lookahead, block.position, block.declined) for block in expected.blocks]
    stop = (trajectory.stop.kind.value, trajectory.stop.detail)
    assert stop == (expected.stop or ("paused", ""))
    assert run.place == expected.taken
    assert [record.injected for record in trajectory.calls if record.injected] == [
        text for text in _split(expected, trajectory) if text
    ]
    check_numbers(scene, trajectory)
    if all(form.holds == "code" for form in scene.markup.forms):  # there a block is a call
        check_deltas(run)


def _split(expected: Expected, trajectory: Trajectory) -> list[str]:
    """The injected texts, which the reference knows together for the blocks of one id."""
    records = [record.injected for record in trajectory.calls]
    assert "".join(records) == "".join(expected.injected)
    return records


def check_numbers(scene: Scene, trajectory: Trajectory) -> None:
    lengths = {len(x) for x in (trajectory.ids, trajectory.mask, trajectory.logprobs, trajectory.weight_versions)}
    assert lengths == {trajectory.total_length}
    generated = [x for x, bit in zip(trajectory.logprobs, trajectory.mask, strict=True) if bit]
    assert generated == [logprob_at(place) for place in range(len(generated))]
    assert not any(x for x, bit in zip(trajectory.logprobs, trajectory.mask, strict=True) if not bit)
    for segment in trajectory.segments:
        assert segment.text == whole_text(scene.known, segment.ids)
    if scene.limits.max_total_tokens is not None:
        assert trajectory.total_length <= scene.limits.max_total_tokens


def check_deltas(run: Run) -> None:
    """The deltas behind each start tag are a block's code, and calls come in the order in which blocks opened."""
    opened: list[str] = []
    calls = 0
    for event in run.events:
        match event:
            case BlockOpened():
                opened.append("")
            case CodeDelta():
                opened[-1] += event.text
            case Execute():
                for call in event.calls:
                    assert opened[calls] == call.code
                    calls += 1


@st.composite
def cut_at_random(draw: st.DrawFn, name: str) -> Scene:
    """A text as random pieces of its bytes, which may end inside characters."""
    cutter = Cutter()
    raw = draw(texts(name)).encode()
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(raw) - 1)), max_size=len(raw))))
    pieces: list[Any] = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True) if a < b]
    specials = [EOS, EOM, b"\xff", b"\xf0\x9f"] + [EOM] * 4 * len(MARKUPS[name].closing_tokens)
    for special in draw(st.lists(st.sampled_from(specials), max_size=3)):
        pieces.insert(draw(st.integers(0, len(pieces))), special)
    said = cutter.cut(*pieces)
    shown = draw(st.lists(st.sampled_from(SHOWN), min_size=1, max_size=4))
    context = draw(st.none() | st.integers(4, 80))
    return Scene(cutter.vocabulary, MARKUPS[name], draw(limits(60, tight=True)), said, shown, context)


@st.composite
def really_cut(draw: st.DrawFn, name: str, markup: str) -> Scene:
    """A text as the tokens of a real vocabulary."""
    known = vocabulary(name)
    said = spoken(name, draw(texts(markup, 20)))
    shown = draw(st.lists(st.sampled_from(["", "7", "a\nb", "</code>", "```\n"]), min_size=1, max_size=4))
    return Scene(known, MARKUPS[markup], draw(limits(150, tight=False)), said, shown)


CHUNKS = st.lists(st.integers(1, 7), min_size=1, max_size=4)


@pytest.mark.parametrize("markup", MARKUPS)
@given(data=st.data(), chunks=CHUNKS)
@examples(250)
def test_any_text_cut_anywhere_reads_as_the_rules_say(markup: str, data: st.DataObject, chunks: list[int]) -> None:
    scene = data.draw(cut_at_random(markup))
    check(scene, scene.drive(scene.row(), chunks))


@pytest.mark.parametrize("markup", ["tags", "fenced"])
@pytest.mark.parametrize("name", ALL)
@given(data=st.data(), chunks=CHUNKS)
@examples(30)
def test_any_text_in_real_tokens_reads_as_the_rules_say(
    name: str, markup: str, data: st.DataObject, chunks: list[int]
) -> None:
    scene = data.draw(really_cut(name, markup))
    check(scene, scene.drive(scene.row(), chunks))


@pytest.mark.parametrize("markup", MARKUPS)
@given(data=st.data(), chunks=CHUNKS)
@examples(60)
def test_any_row_resumed_or_forked_anywhere_ends_as_it_would_have(
    markup: str, data: st.DataObject, chunks: list[int]
) -> None:
    scene = data.draw(cut_at_random(markup))
    whole = scene.drive(scene.row(), [1]).trajectory
    row = scene.row()
    place = drive(row, scene.said[: data.draw(st.integers(0, len(scene.said)))], None).place
    if row.state is RowState.STOPPED:
        return
    for branch in (
        Row.resume(row.trajectory, scene.known, scene.markup, scene.limits, context_length=scene.context),
        row.fork(),
    ):
        assert branch.pending == row.pending
        trajectory = scene.drive(branch, chunks, place).trajectory
        assert (trajectory.segments, trajectory.calls, trajectory.stop) == (whole.segments, whole.calls, whole.stop)


@given(data=st.data(), sizes=st.tuples(CHUNKS, CHUNKS))
@examples(100)
def test_how_many_ids_an_engine_says_at_once_changes_nothing(
    data: st.DataObject, sizes: tuple[list[int], list[int]]
) -> None:
    scene = data.draw(cut_at_random("tags"))
    one, other = (scene.drive(scene.row(), chunks) for chunks in sizes)
    assert one.trajectory.segments == other.trajectory.segments
    assert one.trajectory.stop == other.trajectory.stop
    assert [event for event in one.events if not isinstance(event, CodeDelta)] == [
        event for event in other.events if not isinstance(event, CodeDelta)
    ]
