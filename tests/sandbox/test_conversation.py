"""The host's side of the protocol, driven by anything that a session could send."""

from __future__ import annotations

import base64
import json
import struct
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from midstream.errors import SandboxProtocolError
from midstream.sandbox import SandboxLimits, protocol
from midstream.sandbox.conversation import Alarm, Conversation, Ending, Finished, StaleFrame, ToolRequested, death
from midstream.sandbox.replay import RecordedAnswers, comparable
from midstream.sandbox.results import compose
from midstream.sandbox.text import cut_middle, printable
from midstream.types import ExecutionError, Media, ToolCall

LIMITS = SandboxLimits(wall_time=10.0, grace=1.0, tool_time=5.0, output_characters=1000)
NONCE = "0" * 16


def conversation(**changes: Any) -> Conversation:
    return Conversation("x", LIMITS, {"good"}, now=100.0, nonce=NONCE, **changes)


def framed(value: Any) -> bytes:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return struct.pack("<I", len(body)) + body


def done(**fields: Any) -> bytes:
    return framed({"nonce": NONCE, "stdout": "", "value": None, "error": None} | fields)


PNG = b"\x89PNG\r\n\x1a\n"


def picture(data: bytes = PNG, mime: str = "image/png") -> dict[str, str]:
    return {"mime": mime, "data": base64.b64encode(data).decode()}


def call(**fields: Any) -> bytes:
    return framed({"nonce": NONCE, "call": 1, "tool": "good", "arguments": "[[1], {}]"} | fields)


class TestFrames:
    def test_a_result_byte_by_byte(self) -> None:
        talk = conversation()
        data = done(stdout="out", value="5", threads=2)
        events = [talk.receive(data[i : i + 1], 101.0) for i in range(len(data))]
        assert events[:-1] == [None] * (len(data) - 1)
        assert events[-1] == Finished(Ending.RESULT, stdout="out", value="5", threads=2)

    def test_a_result_with_images(self) -> None:
        finished = conversation().receive(done(images=[picture(PNG + b"1"), picture(b"GIF89a", "image/gif")]), 101.0)
        assert isinstance(finished, Finished)
        assert finished.images == (Media("image/png", PNG + b"1"), Media("image/gif", b"GIF89a"))

    def test_as_many_bytes_of_images_as_allowed_fit_a_frame(self) -> None:
        finished = conversation().receive(done(images=[picture(PNG + bytes(LIMITS.image_bytes - 8))]), 101.0)
        assert isinstance(finished, Finished)
        assert len(finished.images[0].data) == LIMITS.image_bytes

    @pytest.mark.parametrize(
        "data",
        [
            struct.pack("<I", LIMITS.frame_bytes + 1),
            framed(b"{}"),
            framed(b"[]"),
            framed(b"3"),
            framed(b""),
            framed(b"\xff"),
            framed(b'{"nonce": NaN}'),
            framed(b'{"nonce": "' + NONCE.encode() + b'", "stdout": 1, "error": null}'),
            framed(b"[" * 100_000),
            framed(b'{"a":' * 100_000),
            framed(b'{"n": ' + b"9" * 100_000 + b"}"),
            done(value=5),
            done(error=5),
            done(error={"type": None}),
            done(images={}),
            done(images=[5]),
            done(images=[{"mime": "image/png"}]),
            done(images=[picture(b"GIF89a")]),
            done(images=[picture(b"<svg onload='alert(1)'/>", mime="image/svg+xml")]),
            done(images=[picture() | {"mime": ["image/png"]}]),
            done(images=[picture() | {"data": "***"}]),
            done(images=[picture(PNG + bytes(LIMITS.image_bytes // 2))] * 2),
            done() + b"x",
            done() + done(),
            call(tool="bad"),
            call(tool=None),
            call(call="1"),
            call(arguments=[[], {}]),
            call(arguments="[]"),
            call(arguments="[1, {}]"),
            call(arguments="[[], []]"),
            call(arguments="[[NaN], {}]"),
            call(arguments="[[" + "[" * 200 + "]" * 200 + "], {}]"),
            call(arguments='[[], {}], "nonce": [1'),
            call(arguments=" " * (LIMITS.argument_characters + 1)),
            call() + call(),
            call() + done(),
        ],
    )
    def test_what_may_not_be_sent_is_refused(self, data: bytes) -> None:
        with pytest.raises(SandboxProtocolError):
            conversation().receive(data, 101.0)

    def test_another_requests_answer_is_stale(self) -> None:
        with pytest.raises(StaleFrame):
            conversation().receive(framed({"nonce": "1" * 16, "stdout": "", "error": None}), 101.0)

    def test_brackets_in_strings_are_not_depth(self) -> None:
        assert conversation().receive(done(stdout="[{" * 300 + '\\"' * 10), 101.0) is not None

    @given(st.binary(max_size=300))
    @settings(max_examples=300, deadline=None)
    def test_any_bytes_give_events_or_a_protocol_error(self, data: bytes) -> None:
        talk = conversation()
        try:
            event = talk.receive(data, 101.0)
        except SandboxProtocolError:
            return
        assert event is None or isinstance(event, Finished | ToolRequested)

    JSON = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just(NONCE),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
        max_leaves=12,
    )
    FIELDS = st.sampled_from(
        ["nonce", "stdout", "value", "error", "call", "tool", "arguments", "exited", "interrupted", "type", "line"]
    )
    VALUES = JSON | st.dictionaries(FIELDS, JSON, max_size=6) | st.sampled_from(["good", "[[], {}]", NONCE])

    @given(st.lists(st.dictionaries(FIELDS, VALUES, max_size=7), max_size=4), st.booleans())
    @settings(max_examples=250, deadline=None)
    def test_any_frames_give_events_or_a_protocol_error(self, frames: list[dict[str, Any]], with_nonce: bool) -> None:
        talk = conversation()
        for frame in frames:
            try:
                event = talk.receive(framed(frame | ({"nonce": NONCE} if with_nonce else {})), 101.0)
            except SandboxProtocolError:
                return
            if isinstance(event, ToolRequested):
                assert event.name == "good"
                assert protocol.parse(talk.answer([1], 102.0)[4:]) == {"value": [1]}
            elif event is not None:
                assert isinstance(event.stdout, str)
                event.stdout.encode()
                return

    @given(JSON)
    @settings(max_examples=200, deadline=None)
    def test_what_a_tool_gives_crosses_or_is_an_error(self, value: Any) -> None:
        talk = conversation()
        talk.receive(call(), 101.0)
        answer = protocol.parse(talk.answer(value, 102.0)[4:])
        if "error" in answer:
            assert answer["error"]["type"] == "TypeError"
        else:
            assert answer == {"value": value}
            assert talk.tool_calls[0].value == value

    def test_parsing_needs_no_depth_of_stack(self) -> None:
        limit = sys.getrecursionlimit()
        with pytest.raises(SandboxProtocolError, match="nested"):
            protocol.parse(b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}")
        assert sys.getrecursionlimit() == limit


class TestTime:
    def test_interrupts_then_a_kill(self) -> None:
        talk = conversation()
        assert talk.deadline == 110.0
        assert talk.alarm(109.9) is None
        alarms = []
        while talk.deadline is not None:
            alarms.append(talk.alarm(talk.deadline))
        assert alarms == [Alarm.INTERRUPT] * 4 + [Alarm.KILL]

    def test_the_time_of_tools_does_not_count(self) -> None:
        talk = conversation()
        talk.receive(call(), 104.0)
        assert talk.deadline == 109.0  # that of the tool
        talk.answer(1, 108.0)
        assert talk.deadline == 114.0
        assert talk.seconds_in_sandbox(110.0) == 6.0

    def test_a_slow_tool_is_due_to_fail(self) -> None:
        talk = conversation()
        talk.receive(call(), 104.0)
        assert talk.alarm(109.0) is Alarm.TOOL
        assert protocol.parse(talk.fail("TimeoutError", "slow", 109.0)[4:])["error"]["type"] == "TimeoutError"
        assert talk.tool_calls[0].error == ExecutionError("TimeoutError", "slow")

    def test_code_that_calls_a_tool_when_its_time_is_up_is_told_so(self) -> None:
        talk = conversation()
        assert talk.alarm(110.0) is Alarm.INTERRUPT
        talk.receive(call(), 110.1)
        assert protocol.parse(talk.answer(1, 110.2)[4:]) == {"time_is_up": "wall_time"}

    def test_an_interruption_counts_only_if_there_was_one(self) -> None:
        finished = conversation().receive(done(interrupted=True), 101.0)
        assert isinstance(finished, Finished)
        assert finished.ending is Ending.RESULT
        talk = conversation()
        talk.alarm(110.0)
        finished = talk.receive(done(interrupted=True), 110.1)
        assert isinstance(finished, Finished)
        assert (finished.ending, finished.breached) == (Ending.INTERRUPTED, "wall_time")


class TestEnds:
    def test_the_end_of_the_stream(self) -> None:
        talk = conversation()
        assert talk.receive(framed({"exited": 11}), 101.0) is None
        assert talk.end_of_stream() == Finished(Ending.DIED, exit_status=11)
        assert conversation().end_of_stream().exit_status is None

    @pytest.mark.parametrize("status", [-1, 1 << 20, "x", None, [1]])
    def test_a_forged_status_is_no_status(self, status: Any) -> None:
        talk = conversation()
        talk.receive(framed({"exited": status}), 101.0)
        assert talk.exit_status is None

    def test_every_status_has_words(self) -> None:
        assert all(death(status) for status in range(1 << 16))

    def test_words(self) -> None:
        assert death(None) == "ended"
        assert death(3 << 8) == "exited with status 3"
        assert death(11) == "was ended by SIGSEGV (segmentation fault)"


class TestReplay:
    CALLS = (
        ToolCall("a", (1,), {}, value="one"),
        ToolCall("b", (), {"k": 2}, error=ExecutionError("ValueError", "no")),
    )

    def test_recorded_answers_in_order(self) -> None:
        answers = RecordedAnswers(self.CALLS)
        first, second = answers(ToolRequested("a", [1], {})), answers(ToolRequested("b", [], {"k": 2}))
        assert first is not None
        assert second is not None
        assert (first.value, second.error) == ("one", ExecutionError("ValueError", "no"))
        assert not answers.diverged
        assert answers(ToolRequested("c", [], {})) is not None
        assert answers.diverged

    def test_another_call_than_the_recorded_one(self) -> None:
        answers = RecordedAnswers(self.CALLS)
        answered = answers(ToolRequested("a", [2], {}))
        assert answered is not None
        assert answered.error is not None
        assert answers.diverged

    def test_beyond_the_record_tools_can_be_live(self) -> None:
        answers = RecordedAnswers(self.CALLS[:1], then_live=True)
        assert answers(ToolRequested("a", [1], {})) is not None
        assert answers(ToolRequested("a", [1], {})) is None

    def test_addresses(self) -> None:
        assert comparable("<C object at 0x7f00aa>, <f at 0x1>") == "<C object at 0x>, <f at 0x>"


class TestText:
    @given(st.text(max_size=300), st.integers(2, 300))
    def test_cutting_keeps_head_and_tail(self, text: str, characters: int) -> None:
        cut = cut_middle(text, characters)
        if len(text) <= characters:
            assert cut is text
        else:
            head, tail = characters // 2, characters - characters // 2
            assert cut == f"{text[:head]}\n[... {len(text) - characters} characters left out ...]\n{text[-tail:]}"

    @given(st.text(st.characters(codec=None, exclude_categories=())))
    def test_what_is_shown_can_be_encoded(self, text: str) -> None:
        printable(text).encode()

    def test_order_and_lines(self) -> None:
        error = ExecutionError("E", "m")
        result = compose(stdout="a", value=None, error=error, shown_error="E('m')\n\n", maximum_characters=100)
        assert result.text == "a\nE('m')"
        assert compose(stdout="a\n\n", maximum_characters=100).text == "a"
        assert compose(notice="[n]", maximum_characters=100).text == "[n]"
        long = compose(stdout="x" * 500, maximum_characters=100)
        assert long.truncated
        assert len(long.text) < 150
