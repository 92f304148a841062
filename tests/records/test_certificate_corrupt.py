"""Every corruption of a sound record is caught, by the rule that it breaks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import msgspec
import pytest

from midstream.markup import FENCED_PYTHON
from midstream.records import Record, verify
from midstream.records.schema import decode_record
from midstream.types import Limits, Prompt, StopKind, StopReason
from tests.records.trajectories import SPECIAL_RESULT, Scenario, by_code, drive
from tests.vocabularies import vocabulary

Fields = dict[str, Any]
Corruption = Callable[[Fields], None]


def _eos(name: str) -> int:
    return min(vocabulary(name).eos_ids)


_SCENARIOS: dict[str, Callable[[], Scenario]] = {
    "answered": lambda: Scenario(
        ["Let me see. <code>x = 3; y = 4</code>\n", "So <code>x + y</code>\n", "and <code>\nlines\n</code>\n",
         "Bye 🙂.", _eos("o200k")],
        by_code,
        prompt=Prompt(ids=(40, 41, 42, 43), id="p"),
        limits=Limits(max_new_tokens=500, max_total_tokens=600, max_tool_calls=7, stop_strings=("HALT",)),
    ),
    "cut": lambda: Scenario(
        ["<code>long</code> fine", _eos("o200k")], by_code, limits=Limits(max_result_tokens=60, reserve_tokens=8)
    ),
    "stop_string": lambda: Scenario(["One <code>1</code> two STOP"], by_code, limits=Limits(stop_strings=("STOP",))),
    "stop_id": lambda: Scenario(["One <code>1</code> two!"], by_code,
                                limits=Limits(stop_ids=tuple(vocabulary("o200k").encode_text("!")))),
    "new_tokens": lambda: Scenario(["One two three four five six seven eight"], limits=Limits(max_new_tokens=5)),
    "total_tokens": lambda: Scenario(["One two three four five six seven eight"], context_length=9),
    "unrun": lambda: Scenario(["<code>1</code> and more"], by_code, limits=Limits(max_new_tokens=7)),
    "call_limit": lambda: Scenario(
        ["<code>1</code>, <code>2</code>, <code>3</code>"], by_code,
        limits=Limits(max_tool_calls=2, at_tool_call_limit="stop"),
    ),
    "declined": lambda: Scenario(
        ["<code>1</code>, <code>2</code>, <code>3</code> so", _eos("o200k")], by_code, limits=Limits(max_tool_calls=2)
    ),
    "no_room": lambda: Scenario(["<code>lines</code>"], by_code, limits=Limits(max_new_tokens=9)),
    "waiting": lambda: Scenario(["<code>1</code> and <code>2</code>"], lambda c: None if c.index else by_code(c)),
    "time_limit": lambda: Scenario(
        ["Hm"], limits=Limits(time_limit=0.25), outside=StopReason(StopKind.TIME_LIMIT, "0.25 s")
    ),
    "unclosed": lambda: Scenario(["<code>1</code> and <code>2 + ", _eos("o200k")], by_code),
    "fenced": lambda: Scenario(["Go:\n```python\nlines\n```\n", "Done."], by_code, markup=FENCED_PYTHON),
    "special": lambda: Scenario(
        ["Go <code>lines</code> and <code>1", vocabulary("tagged").added_id("<|eom|>"), " done"],
        by_code, "tagged", SPECIAL_RESULT,
    ),
    "versions": lambda: Scenario(["One <code>1</code> two three"], by_code, versions=(3, 4)),
}  # fmt: skip


@cache
def sound(name: str) -> Record:
    return drive(_SCENARIOS[name]())


@pytest.mark.parametrize("name", _SCENARIOS)
def test_each_starting_point_is_sound(name: str) -> None:
    assert [str(violation) for violation in verify(sound(name))] == []


def test_the_starting_points_are_what_they_are_called() -> None:
    ends = {name: (sound(name).stop.kind.value, sound(name).stop.detail) for name in _SCENARIOS}
    assert ends["answered"][0] == "end_of_sequence"
    assert ends["stop_string"] == ("stop_string", "STOP")
    assert ends["stop_id"][0] == "stop_id"
    assert ends["new_tokens"] == ends["unrun"] == ("length", "new_tokens")
    assert ends["total_tokens"] == ("length", "total_tokens")
    assert ends["call_limit"] == ("tool_call_limit", "2")
    assert ends["no_room"] == ("length", "no_room_for_result")
    assert sound("cut").calls[0].cut_characters > 0
    assert sound("unrun").calls == []
    assert "</code>" in sound("unrun").segments[0].text
    assert [bool(block.call.declined) for block in sound("declined").calls] == [False, False, True]
    assert sound("waiting").calls[1].result is None
    assert len(sound("special").calls) == 2
    assert sound("special").special_ids


def corrupted(name: str, corrupt: Corruption) -> Record:
    fields = msgspec.json.decode(sound(name).encode())
    before = copy.deepcopy(fields)
    corrupt(fields)
    assert fields != before, "the corruption must change something"
    return decode_record(msgspec.json.encode(fields))


# --- by hand ---------------------------------------------------------------------------------------------


def _set(path: str, value: Any) -> Corruption:
    """Put ``value`` (or what it makes of the old one, if it can be called) at ``segments.0.ids.3``."""

    def corrupt(fields: Fields) -> None:
        *parents, last = [int(step) if step.lstrip("-").isdigit() else step for step in path.split(".")]
        at: Any = fields
        for step in parents:
            at = at[step]
        at[last] = value(at[last]) if callable(value) else value

    return corrupt


def _delete(*paths: str) -> Corruption:
    def corrupt(fields: Fields) -> None:
        for path in paths:
            *parents, last = [int(step) if step.lstrip("-").isdigit() else step for step in path.split(".")]
            at: Any = fields
            for step in parents:
                at = at[step]
            del at[last]

    return corrupt


def _reshape(fields: Fields) -> None:
    """Make the mask, the length and the pieces agree with the segments again, so that other rules must see it."""
    runs: list[list[int]] = [[0, len(fields["prompt_ids"])]]
    for segment in fields["segments"]:
        bit = int(segment["origin"] == "generated")
        if runs[-1][0] == bit:
            runs[-1][1] += len(segment["ids"])
        else:
            runs.append([bit, len(segment["ids"])])
    fields["mask"] = runs
    fields["total_length"] = sum(length for _, length in runs)
    seen = {str(i) for ids in (fields["prompt_ids"], *(s["ids"] for s in fields["segments"])) for i in ids}
    for name in ("pieces", "partial_pieces"):
        fields[name] = {i: piece for i, piece in fields[name].items() if i in seen}
    fields["special_ids"] = [i for i in fields["special_ids"] if str(i) in seen]


def _then_reshape(corrupt: Corruption) -> Corruption:
    def both(fields: Fields) -> None:
        corrupt(fields)
        _reshape(fields)

    return both


def _swap_segments(a: int, b: int) -> Corruption:
    def corrupt(fields: Fields) -> None:
        segments = fields["segments"]
        segments[a], segments[b] = segments[b], segments[a]

    return corrupt


def _retell(segment: int, text: str, name: str = "o200k") -> Corruption:
    """Another text for a segment, with ids, numbers and pieces that fit it."""

    def corrupt(fields: Fields) -> None:
        entry = fields["segments"][segment]
        ids = vocabulary(name).encode_text(text)
        injected = entry["origin"] == "injected"
        entry.update(
            ids=ids,
            text=text,
            logprobs=[0.0 if injected else -1.0] * len(ids),
            weight_versions=[-1 if injected else 0] * len(ids),
        )
        for token_id in ids:
            fields["pieces"][str(token_id)] = vocabulary(name).piece(token_id).decode()
        _reshape(fields)

    return corrupt


def _all(*corruptions: Corruption) -> Corruption:
    def corrupt(fields: Fields) -> None:
        for one in corruptions:
            one(fields)

    return corrupt


def _cut_tail(segments: int) -> Corruption:
    def corrupt(fields: Fields) -> None:
        del fields["segments"][-segments:]
        _reshape(fields)

    return corrupt


def _split_segment(index: int) -> Corruption:
    def corrupt(fields: Fields) -> None:
        entry = fields["segments"][index]
        head = {**entry, "text": fields["pieces"][str(entry["ids"][0])]}
        tail = {**entry, "text": entry["text"][len(head["text"]) :]}
        for name in ("ids", "logprobs", "weight_versions"):
            head[name], tail[name] = entry[name][:1], entry[name][1:]
        fields["segments"][index : index + 1] = [head, tail]

    return corrupt


def _move_id_over(index: int) -> Corruption:
    """The first id of segment ``index + 1`` goes to the end of segment ``index``, numbers and text with it."""

    def corrupt(fields: Fields) -> None:
        left, right = fields["segments"][index : index + 2]
        for name in ("ids", "logprobs", "weight_versions"):
            left[name].append(right[name].pop(0))
        piece = fields["pieces"][str(left["ids"][-1])]
        left["text"], right["text"] = left["text"] + piece, right["text"][len(piece) :]
        left["logprobs"][-1] = -1.0 if left["origin"] == "generated" else 0.0
        left["weight_versions"][-1] = 0 if left["origin"] == "generated" else -1
        _reshape(fields)

    return corrupt


def _empty_segment(fields: Fields) -> None:
    empty = {"origin": "injected", "ids": [], "logprobs": [], "weight_versions": [], "text": ""}
    fields["segments"].append(empty)


def _stop(kind: str, detail: str = "") -> Corruption:
    return _set("stop", {"kind": kind, "detail": detail})


# of "answered": segment 0 generated, 1 injected (the second call's), 2 generated, 3 injected (the third's), 4 generated
_BY_HAND: dict[str, tuple[str, Corruption, str]] = {
    # lengths, mask, segments
    "a logprob is missing": ("answered", _delete("segments.0.logprobs.0"), "lengths"),
    "a logprob too many": ("answered", _set("segments.0.logprobs", lambda x: [*x, -1.0]), "lengths"),
    "a version is missing": ("answered", _delete("segments.4.weight_versions.0"), "lengths"),
    "an injected id is dropped": ("answered", _delete("segments.1.ids.1"), "lengths"),
    "the total is off by one": ("answered", _set("total_length", lambda n: n + 1), "lengths"),
    "a run of the mask is longer": ("answered", _set("mask.1.1", lambda n: n + 1), "mask"),
    "the mask's bits are flipped": ("answered", _set("mask", lambda m: [[1 - b, n] for b, n in m]), "mask"),
    "the mask is empty": ("answered", _set("mask", []), "mask"),
    "an endless run": ("answered", _set("mask.-1.1", 2**70), "mask"),
    "a run of less than nothing": ("answered", _set("mask", lambda m: [[0, -(2**70)], *m]), "mask"),
    "the mask has a run more": ("answered", _set("mask", lambda m: [*m, [0, 3]]), "mask"),
    "an injected segment is called generated": (
        "answered", _then_reshape(_set("segments.1.origin", "generated")), "segments"),
    "a generated segment is called injected": (
        "answered", _then_reshape(_set("segments.2.origin", "injected")), "segments"),
    "an empty segment": ("answered", _empty_segment, "segments"),
    "the first segment is dropped": ("answered", _then_reshape(_delete("segments.0")), "segments"),
    "a segment is split": ("answered", _split_segment(2), "segments"),
    "an injected segment is split": ("answered", _split_segment(3), "segments"),
    "a generated and an injected one are swapped": ("answered", _then_reshape(_swap_segments(0, 1)), "segments"),
    "two generated segments are swapped": ("answered", _then_reshape(_swap_segments(0, 2)), "calls"),
    "two injected segments are swapped": ("answered", _then_reshape(_swap_segments(1, 3)), "results"),
    # numbers
    "an injected id has a logprob": ("answered", _set("segments.1.logprobs.0", -0.5), "logprobs"),
    "logprobs are shifted by one": (
        "answered", _all(_set("segments.1.logprobs", lambda x: [-0.1, *x[1:]]),
                         _set("segments.0.logprobs", lambda x: [*x[1:], 0.0])), "logprobs"),
    "a logprob over 0": ("answered", _set("segments.0.logprobs.2", 0.5), "logprobs"),
    "a logprob with its sign lost": (
        "answered", _set("segments.4.logprobs", lambda xs: [abs(x) for x in xs]), "logprobs"),
    "an injected id has a version": ("answered", _set("segments.1.weight_versions.0", 0), "versions"),
    "a generated id has no version": ("versions", _set("segments.0.weight_versions.0", -1), "versions"),
    "a negative duration": ("answered", _set("duration", -1.0), "numbers"),
    "a negative count of discarded ids": ("answered", _set("discarded", -1), "numbers"),
    "a negative sample": ("answered", _set("sample", -1), "numbers"),
    # prompt
    "the prompt has no ids": (
        "answered", _then_reshape(_set("prompt_ids", [])), "prompt"),
    "a prompt id is changed": ("answered", _set("prompt_ids.0", 41), "prompt"),
    "a prompt id is changed in both places": (
        "answered", _then_reshape(_all(_set("prompt_ids.0", 41), _set("prompt.ids.0", 41))), "text"),
    "the prompt's limits are others": (
        "answered", lambda f: f["prompt"].update(limits={**f["limits"], "max_tool_calls": 8}), "prompt"),
    "a block is said to be open": ("answered", _set("prompt.open_block", True), "prompt"),
    "the prompt's text is altered": ("answered", _set("prompt_text", lambda t: t + "!"), "text"),
    # texts and pieces
    "a generated text is altered": ("answered", _set("segments.0.text", lambda t: t.replace("see", "sea")), "text"),
    "an injected text is altered": ("answered", _set("segments.1.text", lambda t: t.replace("5", "6")), "text"),
    "a text is empty": ("answered", _set("segments.4.text", ""), "text"),
    "a character is given up": ("answered", _set("segments.4.text", lambda t: t.replace("🙂", "\ufffd")), "text"),
    "a piece is missing": ("answered", lambda f: f["pieces"].pop(str(f["segments"][0]["ids"][0])), "pieces"),
    "a piece too many": ("answered", lambda f: f["pieces"].update({"77777": "x"}), "pieces"),
    "a piece given twice": (
        "answered", lambda f: f["partial_pieces"].update({str(f["prompt_ids"][0]): "61"}), "pieces"),
    "a piece is no hexadecimal": (
        "answered", lambda f: f["partial_pieces"].update({f["pieces"].popitem()[0]: "zz"}), "pieces"),
    "a piece is altered": (
        "answered", lambda f: f["pieces"].update({str(f["segments"][0]["ids"][0]): "Get"}), "text"),
    # rules
    "a markup that cannot work": ("answered", _set("markup.end", ""), "markup"),
    "limits that cannot be": ("answered", _set("limits.max_new_tokens", 0), "limits"),
    "no markup": ("answered", _set("markup", None), "calls"),
    "another markup's start": ("answered", _set("markup.start", "<python>"), "calls"),
    "another markup's result": ("answered", _set("markup.inline.before", ["<out>"]), "results"),
    # special tokens
    "a result's plain tag is a special id": (
        "special", lambda f: f["markup"].update(SPECIAL_AS_TEXT), "special"),
    "an end of sequence is put into a result": (
        "special", _set("segments.1.ids.1", lambda _: vocabulary("tagged").added_id("<|eom|>")), "special"),
    # calls
    "a call is dropped": ("answered", _delete("calls.1"), "calls"),
    "the last call is dropped": ("answered", _delete("calls.2"), "calls"),
    "all calls are dropped": ("answered", _set("calls", []), "calls"),
    "a call is doubled": ("answered", _set("calls", lambda c: [*c, c[-1]]), "calls"),
    "two calls are swapped": ("answered", _set("calls", lambda c: [c[1], c[0], c[2]]), "calls"),
    "a call is moved on": ("answered", _set("calls.1.call.position", lambda n: n + 1), "calls"),
    "a call is moved back": ("answered", _set("calls.0.call.position", lambda n: n - 1), "calls"),
    "a call's code is altered": ("answered", _set("calls.1.call.code", "x - y"), "calls"),
    "a space is lost from a code": ("answered", _set("calls.0.call.code", lambda c: c.replace(" ", "", 1)), "calls"),
    "a call's number is wrong": ("answered", _set("calls.1.call.index", 5), "calls"),
    "a lookahead is lost": ("answered", _set("calls.2.call.lookahead", ""), "calls"),
    "a lookahead is made up": ("answered", _set("calls.2.call.lookahead", "\n\n"), "calls"),
    "a call is said to be declined": ("answered", _set("calls.1.call.declined", "No."), "calls"),
    "a declined call was run": ("declined", _set("calls.2.call.declined", ""), "calls"),
    "a declined call shows a value": ("declined", _set("calls.2.result.text", "[1]"), "calls"),
    "a limit of calls that was not held": ("answered", _set("limits.max_tool_calls", 1), "calls"),
    "a limit of calls that was never there": ("declined", _set("limits.max_tool_calls", None), "calls"),
    "an unclosed block has a call": (
        "unclosed", _set("calls", lambda c: [*c, {**c[0], "call": {**c[0]["call"], "index": 1, "code": "2 + "}}]),
        "calls"),
    "a block on the last id of the budget has a call": (
        "unrun", _set("calls", [{"call": {"index": 0, "code": "1", "position": 10, "lookahead": "", "declined": ""},
                                 "result": None, "injected": "", "cut_characters": 0}]), "calls"),
    # results
    "a result is altered": ("answered", _set("calls.1.result.text", "[6]"), "results"),
    "a result's text, record and ids are altered": (
        "answered", _all(_retell(1, "<result>[6]</result>"), _set("calls.1.injected", "<result>[6]</result>")),
        "results"),
    "a result has lost its newline": (
        "answered", _all(_retell(3, "<result>\none\ntwo\n  three</result>"),
                         _set("calls.2.injected", "<result>\none\ntwo\n  three</result>")), "results"),
    "a result is not trimmed by its lookahead": (
        "answered", _all(_retell(3, "\n\n<result>\none\ntwo\n  three\n</result>"),
                         _set("calls.2.injected", "\n\n<result>\none\ntwo\n  three\n</result>")), "results"),
    "a result is trimmed twice": (
        "answered", _all(_retell(3, "<result>\none\ntwo\n  three\n</result>"),
                         _set("calls.2.injected", "<result>\none\ntwo\n  three\n</result>")), "results"),
    "a silent block shows something": ("answered", _set("calls.0.result.text", "3"), "results"),
    "a silent block has something injected": ("answered", _set("calls.0.injected", "x"), "results"),
    "something else is injected than said": ("answered", _set("calls.1.injected", "<result>[5] </result>"), "results"),
    "a result is taken out": (
        "answered", _all(_set("calls.1.result.text", ""), _set("calls.1.injected", "")), "results"),
    "a result is said to be cut": ("answered", _set("calls.1.cut_characters", 1), "results"),
    "a cut of less than nothing": ("answered", _set("calls.1.cut_characters", -1), "results"),
    "a cut of more than there was": ("cut", _set("calls.0.cut_characters", 10**6), "results"),
    "a cut that is denied": ("cut", _set("calls.0.cut_characters", 0), "results"),
    "a cut of another length": ("cut", _set("calls.0.cut_characters", lambda n: n - 1), "results"),
    "another head": ("cut", _set("calls.0.result.text", lambda t: "L" + t[1:]), "results"),
    "another tail": ("cut", _set("calls.0.result.text", lambda t: t[:-1] + "T"), "results"),
    "the result is longer than was looked at": ("cut", _set("limits.max_result_characters", 10), "results"),
    "a block waits and the row goes on": (
        "answered", _all(_set("calls.0.result", None)), "results"),
    "one waits and something was injected": ("waiting", _set("calls.1.injected", "x"), "results"),
    "one waits behind another that waits": ("waiting", _set("calls.0.result", None), "results"),
    "an id moves from the result to the model": ("answered", _move_id_over(0), "results"),
    "an id moves from the model to the result": ("answered", _move_id_over(1), "results"),
    "an id moves from a result behind": ("answered", _move_id_over(2), "results"),
    "something is injected where no block closes": (
        "answered", _set("segments", lambda s: [*s, s[1]]), "results"),
    "another fence": ("fenced", _set("markup.block.before", ["\n```text\n"]), "results"),
    # budgets and limits
    "a result over its budget": ("answered", _set("limits.max_result_tokens", 3), "budget"),
    "a result that leaves no room": ("answered", _set("limits.reserve_tokens", 590), "budget"),
    "more new ids than allowed": ("answered", _set("limits.max_new_tokens", 20), "limits"),
    "more ids than allowed": ("answered", _set("limits.max_total_tokens", 20), "limits"),
    "more ids than the context": ("answered", _set("context_length", 20), "limits"),
    "a prompt that fills the context": ("answered", _set("context_length", 4), "limits"),
    # the end
    "the end of sequence is dropped": (
        "answered", _then_reshape(_delete(*(f"segments.4.{f}.-1" for f in ("ids", "logprobs", "weight_versions")))),
        "text"),
    "another end of sequence": ("answered", _set("stop.detail", "7"), "stop"),
    "no such end of sequence": ("answered", _set("eos_ids", [7]), "stop"),
    "ends of sequence do not count": ("answered", _set("limits.ignore_eos", True), "stop"),
    "an end of sequence in the middle": (
        "answered", lambda f: f["eos_ids"].append(f["segments"][0]["ids"][1]), "stop"),
    "a stop id in the middle": (
        "answered", lambda f: f["limits"]["stop_ids"].append(f["segments"][2]["ids"][1]), "stop"),
    "a stop string in the middle": ("answered", _set("limits.stop_strings", ["Let"]), "stop"),
    "a stop string over two ids": ("answered", _set("limits.stop_strings", [" me see. "]), "stop"),
    "stopped for length instead": ("answered", _stop("length", "new_tokens"), "stop"),
    "stopped for the total instead": ("answered", _stop("length", "total_tokens"), "stop"),
    "stopped for a string that was not asked for": ("answered", _stop("stop_string", "Bye"), "stop"),
    "paused at an end of sequence": ("answered", _stop("paused"), "stop"),
    "cancelled at an end of sequence": ("answered", _stop("cancelled"), "stop"),
    "no room, though there was": ("answered", _stop("length", "no_room_for_result"), "stop"),
    "a limit of calls that was not reached": ("answered", _stop("tool_call_limit", "7"), "stop"),
    "the stop string is not there": ("stop_string", _set("limits.stop_strings", ["WAIT"]), "stop"),
    "the stop string's name is another": ("stop_string", _set("stop.detail", "STO"), "stop"),
    "an end of sequence at a stop string": ("stop_string", _stop("end_of_sequence", "199999"), "stop"),
    "a stop string is now a stop id": ("stop_string", _stop("stop_id", "1"), "stop"),
    "the stop id is another": ("stop_id", _set("stop.detail", "5"), "stop"),
    "a stop id is a stop string": ("stop_id", _stop("stop_string", "!"), "stop"),
    "the length was not reached": ("new_tokens", _set("limits.max_new_tokens", 6), "stop"),
    "nothing bounds the length": ("new_tokens", _set("limits.max_new_tokens", None), "stop"),
    "injected ids do not count, so it was not reached": (
        "no_room", _all(_set("limits.count_injected", False), _set("limits.max_new_tokens", 50)), "stop"),
    "the wrong length": ("new_tokens", _stop("length", "total_tokens"), "stop"),
    "paused at the limit": ("new_tokens", _stop("paused"), "stop"),
    "the total was not reached": ("total_tokens", _set("context_length", 10), "stop"),
    "nothing bounds the total": ("total_tokens", _set("context_length", None), "stop"),
    "the limit of calls was not reached": ("call_limit", _set("limits.max_tool_calls", 3), "calls"),
    "the limit of calls does not stop": ("call_limit", _set("limits.at_tool_call_limit", "tell"), "calls"),
    "the limit of calls is another": ("call_limit", _set("stop.detail", "3"), "stop"),
    "at the limit of calls it was paused": ("call_limit", _stop("paused"), "stop"),
    "calls beyond the limit that stops": (
        "declined", _all(_set("limits.at_tool_call_limit", "stop"), _delete("calls.2")), "stop"),
    "there was room": ("no_room", _set("limits.max_new_tokens", 500), "stop"),
    "there was something else than no room": ("no_room", _stop("paused"), "results"),
    "no room for what shows nothing": ("no_room", _set("calls.0.result.text", ""), "stop"),
    "the row stopped by itself though a block waits": ("waiting", _stop("end_of_sequence", "199999"), "stop"),
    "a time limit that was not set": ("time_limit", _set("limits.time_limit", None), "stop"),
    "a time limit that was not reached": ("time_limit", _set("duration", 0.1), "stop"),
    "a reason out of nowhere": ("time_limit", _stop("length", "new_tokens"), "stop"),
    "an unknown length": ("time_limit", _stop("length", "whatever"), "stop"),
    "an end of sequence out of nowhere": ("time_limit", _stop("end_of_sequence", "199999"), "stop"),
}  # fmt: skip

SPECIAL_AS_TEXT = {
    "inline": {"before": ["<result>"], "after": ["</result>"]},
    "block": {"before": ["\n<result>\n"], "after": ["\n</result>"]},
}


@pytest.mark.parametrize("what", _BY_HAND)
def test_a_corruption_is_caught_by_its_rule(what: str) -> None:
    name, corrupt, rule = _BY_HAND[what]
    found = verify(corrupted(name, corrupt))
    assert rule in {violation.rule for violation in found}, [str(violation) for violation in found]


# --- everywhere ------------------------------------------------------------------------------------------


def _places(name: str) -> list[tuple[int, int]]:
    return [(s, i) for s, segment in enumerate(sound(name).segments) for i in range(len(segment.ids))]


@pytest.mark.parametrize("name", ["answered", "cut", "fenced", "special"])
def test_any_id_changed_or_dropped_is_caught(name: str) -> None:
    other = 65 if name != "special" else 70
    piece = vocabulary("tagged" if name == "special" else "o200k").piece(other).decode()
    for segment, index in _places(name):
        if sound(name).segments[segment].ids[index] == other:
            continue

        def change(fields: Fields, segment: int = segment, index: int = index) -> None:
            fields["segments"][segment]["ids"][index] = other
            fields["pieces"][str(other)] = piece
            _reshape(fields)

        def drop(fields: Fields, segment: int = segment, index: int = index) -> None:
            for field in ("ids", "logprobs", "weight_versions"):
                del fields["segments"][segment][field][index]
            _reshape(fields)

        assert verify(corrupted(name, change)), (segment, index)
        assert verify(corrupted(name, drop)), (segment, index)


@pytest.mark.parametrize("name", ["answered", "cut", "fenced"])
def test_any_injected_id_changed_with_all_that_is_said_of_it_is_caught(name: str) -> None:
    """Text, pieces and the record of the call agree with the new id; the result itself does not."""
    for segment, index in _places(name):
        entry = sound(name).segments[segment]
        if entry.origin == "generated":
            continue
        pieces = [vocabulary("o200k").piece(token_id) for token_id in entry.ids]
        pieces[index] = b"~"
        text = b"".join(pieces).decode("utf-8", "replace")

        def corrupt(fields: Fields, segment: int = segment, index: int = index, text: str = text) -> None:
            ids = fields["segments"][segment]["ids"]
            ids[index] = 93  # "~"
            fields["pieces"]["93"] = "~"
            for block in fields["calls"]:
                if block["injected"] == fields["segments"][segment]["text"]:
                    block["injected"] = text
            fields["segments"][segment]["text"] = text
            _reshape(fields)

        assert {violation.rule for violation in verify(corrupted(name, corrupt))} & {"results"}, (segment, index)


def test_the_row_cut_short_anywhere_is_caught() -> None:
    for segments in range(1, 5):
        assert verify(corrupted("answered", _cut_tail(segments)))


def test_a_violation_says_where() -> None:
    first = len(sound("answered").prompt_ids)
    (violation,) = verify(corrupted("answered", _set("segments.0.logprobs.2", 0.5)))
    assert (violation.rule, violation.position) == ("logprobs", first + 2)
    assert str(violation) == f"logprobs at id {first + 2}: logprob 0.5 must be finite and not over 0"
