"""Random calls of tools, broken ones among them, through the row, the reference and the certificate."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from midstream.call_text import Holds, split_block
from midstream.families import LLAMA3_TOOL_CALLS, QWEN_TOOL_CALLS, mistral_tool_calls
from midstream.markup import CODE_TAGS, Frame, Markup, Slot, Special, Turn
from midstream.records import Record
from midstream.records.call_reference import calls_of
from midstream.records.certificate import verify
from midstream.row import Row, RowState
from midstream.strict_json import JSONFault, read_value
from midstream.types import Trajectory
from midstream.vocabulary import Vocabulary
from tests.properties import examples
from tests.properties.test_rows import CHUNKS, Scene, check, limits
from tests.rows import drive
from tests.synthetic import EOM, EOS, Cutter
from tests.vocabularies import vocabulary

TURNS = Markup(
    start="<tool_call>",
    end="</tool_call>",
    inline=None,
    block=Frame((Special("<|result|>"), '{"', Slot("name"), '": '), ("}", Special("<absent>", required=False))),
    closing_tokens=("<|eom|>",),
    holds="json",
    payload="string",
    turn=Turn(("\n", Special("<|call|>"), "user\n"), (Special("<eos>"), "\n")),
)
ANSWER = Markup(
    start="{",
    end=None,
    inline=None,
    block=Frame(("[",), ("]",)),
    closing_tokens=("<eos>", "<|eom|>"),
    at_turn_start=True,
    holds="json_answer",
    turn=Turn(),
)
TAGGED = Markup(
    start="<|py|>",
    end=None,
    inline=None,
    block=Frame(("(", Slot("id"), ")"), ("",)),
    closing_tokens=("<|eom|>",),
    holds="code_or_json",
    turn=Turn((), ("go\n",)),
)
NAMED = Markup(
    start="[TOOL_CALLS]",
    end=None,
    inline=None,
    block=Frame(("[R]", Slot("id")), ("[/R]",)),
    closing_tokens=("<eos>",),
    holds="named",
    turn=Turn(),
)
MARKUPS = {
    "turns": TURNS,
    "answers": Markup.either(ANSWER, TAGGED),
    "named": NAMED,
    "both": Markup.either(CODE_TAGS, TURNS),
    "at once": Markup.tags("<tool_call>", "<result>", holds="json"),
    "all": Markup.either(TURNS, CODE_TAGS, NAMED, TAGGED, Markup.tags("<now>", "<then>", holds="json")),
}

CALLS = [
    '{"name": "f", "arguments": {}}',
    '{"name": "g", "parameters": {"x": [1, {"y": "é\\n"}]}}',
    '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"x": 1}}]',
    '{"name": "f", "arguments": {}}; {"name": "h", "arguments": {}}',
    '{"name": "f", "arguments": {"x": 1, "x": 2}}',
    '{"name": "f", "arguments": ',
    '{"sky": 1}',
    "f[ARGS]{}",
    'f[CALL_ID]abc[ARGS]{"x": 1}[TOOL_CALLS]g[ARGS]{}',
    'g[ARGS]{"x": ',
    'f.call(query="a b")',
    "1 + 1\n",
]
PIECES = ["{", "}", "[", "]", '"name": "f"', ", ", ":", '"', "\\", " ", "\n", "1", "NaN", "x", "😀", ";"]
TAGS = [
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "<|py|>",
    "<code>",
    "</code>",
    "<now>",
    "</now>",
    "</tool",
    "STOP",
]
ENDS = ["<|eom|>", "<eos>"]
SHOWN = ["", "7", "a\nb", "</tool_call>", '{"a": 1}', "é" * 9]


def texts(ends: list[str]) -> st.SearchStrategy[list[str]]:
    """Blocks with calls in them, whole and cut off, among text; special tokens stand alone."""
    block = st.tuples(
        st.sampled_from([*TAGS[:1], "[TOOL_CALLS]", "<|py|>", "<code>", "<now>", "", " \n"]),
        st.sampled_from(CALLS) | st.lists(st.sampled_from(CALLS + PIECES), max_size=4).map("".join),
        st.sampled_from(["</tool_call>", "</code>", "</now>", "", *ends, *ends]),
    ).map(list)
    loose = st.lists(st.sampled_from(TAGS + PIECES + ends), max_size=3)
    return st.lists(block | loose, max_size=6).map(lambda parts: [piece for part in parts for piece in part if piece])


@st.composite
def cut_at_random(draw: st.DrawFn, name: str) -> Scene:
    cutter = Cutter()
    said: list[int] = []
    for piece in draw(texts(ENDS)):
        if piece in ENDS:
            said.append(EOM if piece == "<|eom|>" else EOS)
            continue
        raw = piece.encode()
        cuts = sorted(draw(st.sets(st.integers(1, max(1, len(raw) - 1)), max_size=3)))
        said += cutter.cut(*(raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True) if a < b))
    shown = draw(
        st.lists(st.sampled_from(["", "7", "a\nb", "</tool_call>", '{"a": 1}', "é" * 9]), min_size=1, max_size=4)
    )
    context = draw(st.none() | st.integers(4, 160))
    return Scene(cutter.vocabulary, MARKUPS[name], draw(limits(120, tight=True)), said, shown, context)


def check_record(scene: Scene, trajectory: Trajectory) -> None:
    record = Record.of(trajectory, scene.known, markup=scene.markup, limits=scene.limits, context_length=scene.context)
    assert verify(record) == []
    assert record.row_markup == scene.markup


@pytest.mark.parametrize("name", MARKUPS)
@given(data=st.data(), chunks=CHUNKS)
@examples(120)
def test_any_calls_cut_anywhere_read_as_the_rules_say(name: str, data: st.DataObject, chunks: list[int]) -> None:
    scene = data.draw(cut_at_random(name))
    run = scene.drive(scene.row(), chunks)
    check(scene, run)
    check_record(scene, run.trajectory)


@pytest.mark.parametrize("name", MARKUPS)
@given(data=st.data(), chunks=CHUNKS)
@examples(50)
def test_any_row_with_calls_resumed_or_forked_anywhere_ends_as_it_would_have(
    name: str, data: st.DataObject, chunks: list[int]
) -> None:
    scene = data.draw(cut_at_random(name))
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


REAL: dict[str, tuple[str, Markup, list[str]]] = {
    "qwen": ("qwen", QWEN_TOOL_CALLS, ["<|im_end|>"]),
    "code and qwen": ("qwen", Markup.either(CODE_TAGS, QWEN_TOOL_CALLS), ["<|im_end|>"]),
    "llama3": ("llama3", LLAMA3_TOOL_CALLS, ["<|eot_id|>", "<|eom_id|>", "<|python_tag|>"]),
    "mistral tekken": ("tekken", mistral_tool_calls(3), ["</s>"]),
    "mistral sentencepiece": ("mistral3", mistral_tool_calls(3, sentencepiece=True), ["</s>"]),
}


def really_said(known: Vocabulary, pieces: list[str]) -> list[int]:
    """The ids of pieces: added tokens as theirs, what stands between two of them encoded at once."""
    ids: list[int] = []
    text = ""
    for piece in pieces:
        if not known.has_added(piece):
            text += piece
            continue
        ids += [*known.encode_text(text), known.added_id(piece)]
        text = ""
    return ids + known.encode_text(text)


@pytest.mark.parametrize("name", REAL)
@given(data=st.data(), chunks=CHUNKS)
@examples(40)
def test_any_calls_in_a_familys_own_tokens_read_as_the_rules_say(
    name: str, data: st.DataObject, chunks: list[int]
) -> None:
    tokenizer, markup, ends = REAL[name]
    known = vocabulary(tokenizer)
    said = really_said(known, data.draw(texts(ends)))
    shown = data.draw(st.lists(st.sampled_from(["", "7 up", "a\nb", "</tool_call><|im_end|>"]), min_size=1, max_size=4))
    scene = Scene(known, markup, data.draw(limits(300, tight=False)), said, shown)
    run = scene.drive(scene.row(), chunks)
    if markup.payload != "value":  # the reference writes JSON strings alone
        check(scene, run)
    check_record(scene, run.trajectory)


# --- calls as text


def joined(pieces: list[str], most: int) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(pieces), max_size=most).map("".join)


@pytest.mark.parametrize("holds", ["json", "json_answer", "named", "code_or_json"])
@given(text=joined([*CALLS, *PIECES, "[TOOL_CALLS]", "-", "0", ".5", "e9", "[ARGS]"], 6))
@examples(300)
def test_blocks_are_taken_apart_as_the_certificate_takes_them_apart(holds: Holds, text: str) -> None:
    assert split_block(holds, text) == calls_of(holds, text)


VALUES: Any = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(value=VALUES, ascii_only=st.booleans(), indent=st.sampled_from([None, 2]))
@examples(150)
def test_json_reads_as_the_standard_library_reads_it(value: Any, ascii_only: bool, indent: int | None) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    read, end = read_value(text)
    assert end == len(text)
    assert repr(read) == repr(value)


@given(text=joined([*PIECES, "true", "null", ",", "\t", "\\u00e9", "\\ud83d", "-1", "0", "1.5", "'"], 9))
@examples(400)
def test_what_is_no_json_for_the_standard_library_is_none_here(text: str) -> None:
    theirs = _standard(text)
    try:
        read, end = read_value(text)
    except JSONFault as fault:
        place, ours = fault.offset, _NONE
    else:
        place, ours = end, read if not text[end:].strip(" \t\r\n") else _NONE
    assert 0 <= place <= len(text)
    assert repr(ours) == repr(theirs)


_NONE = object()


def _standard(text: str) -> Any:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(items)) < len(items):
            raise ValueError("a name twice")
        return dict(items)

    def constant(name: str) -> None:
        raise ValueError(name)

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except ValueError:
        return _NONE
