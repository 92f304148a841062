"""Records of rows with calls: what the certificate finds where one was changed."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from midstream.families import QWEN_TOOL_CALLS
from midstream.markup import CODE_TAGS, Markup
from midstream.records import Record
from midstream.records.certificate import verify
from midstream.records.schema import decode_record
from midstream.types import ExecutionResult
from tests.rows import drive, new_row
from tests.spoken import spoken
from tests.vocabularies import vocabulary

BOTH = Markup.either(CODE_TAGS, QWEN_TOOL_CALLS)


def record() -> Record:
    known = vocabulary("qwen")
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    end = known.added_id("<|im_end|>")
    said = [*spoken("qwen", f"<code>1</code>{call}{call}"), end, *known.encode_text("So."), end]
    row = new_row(known, markup=BOTH)
    drive(row, said, lambda one: ExecutionResult(str(one.index)))
    return decode_record(Record.of(row.trajectory, known, markup=BOTH).encode())


def changed(change: Callable[[Record], None]) -> list[str]:
    one = record()
    assert verify(one) == []
    change(one)
    return [violation.rule for violation in verify(msgspec.convert(msgspec.to_builtins(one), Record))]


def set_call(place: int, name: str, value: object) -> Callable[[Record], None]:
    return lambda one: setattr(one.calls[place].call, name, value)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (set_call(1, "kind", "code"), "calls"),
        (set_call(1, "form", 0), "calls"),
        (set_call(1, "form", 7), "calls"),
        (set_call(2, "form", -1), "calls"),
        (set_call(2, "code", "{}"), "calls"),
        (set_call(1, "position", 3), "calls"),
        (lambda one: one.calls.pop(), "calls"),
        (lambda one: setattr(one.calls[2], "injected", "2"), "results"),
        (lambda one: one.closing_ids.clear(), "calls"),
        (lambda one: setattr(one.markup.others[0], "turn", None), "calls"),
        (lambda one: setattr(one.markup.others[0], "closing_tokens", []), "markup"),
        (lambda one: one.markup.others.clear(), "calls"),
    ],
)
def test_a_record_whose_calls_were_changed_is_found_out(change: Callable[[Record], None], rule: str) -> None:
    assert rule in changed(change)
