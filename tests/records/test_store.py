"""Records on disk: exact round trips, clear errors, and files that survive a writer's death."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from midstream import types
from midstream.errors import RecordError
from midstream.markup import Frame, Markup, Special, Turn
from midstream.records import SCHEMA, Record, RecordWriter, entries, read_records, verify
from midstream.records.schema import FIRST_BYTES, decode_record
from midstream.row import Row
from midstream.types import Call, CallRecord, ExecutionResult, Limits, Media, Message, Prompt, ToolCall, Trajectory
from tests.records.trajectories import RICH_RESULT, Scenario, by_code, drive, scenarios
from tests.vocabularies import tokenizer


def example_record(prompt_id: str | None = "p", sample: int = 0) -> Record:
    record = drive(Scenario(["Let <code>rich</code> be."], by_code, prompt=Prompt(text="Say it.", id=prompt_id)))
    return msgspec.structs.replace(record, sample=sample)


def simple_trajectory(**changes: Any) -> Trajectory:
    row = Row(Prompt(text="Hi", id="a"), tokenizer("o200k"))
    row.receive([13225, 11], [-0.5, -0.25])
    return replace(row.trajectory, **changes)


# --- round trips -----------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(scenarios())
def test_a_record_comes_back_equal(scenario: Scenario) -> None:
    record = drive(scenario)
    line = record.encode()
    assert b"\n" not in line
    assert line.startswith(FIRST_BYTES)
    again = decode_record(line)
    assert again == record
    assert again.trajectory == record.trajectory
    assert again.row_markup == scenario.markup
    assert again.row_limits == scenario.limits
    assert again.encode() == line


def test_everything_of_a_trajectory_comes_back() -> None:
    prompt = Prompt(
        messages=(Message("system", "Be brief."), Message("user", "2 + 2?")),
        id="p/1",
        group="g",
        metadata={"answer": 4, "nested": [{"a": None, "b": 1.5}], "big": 2**80, "ключ": "🙂"},
        seed=7,
        limits=Limits(max_new_tokens=9, stop_strings=("a", "b"), stop_ids=(1, 2), time_limit=0.1),
        media=(Media("image/png", bytes(range(256))),),
    )
    waiting = CallRecord(Call(1, "y", 12, "l", "d"))
    trajectory = simple_trajectory(
        prompt=prompt,
        calls=(CallRecord(Call(0, "x", 10), RICH_RESULT, "<result>…</result>", 12), waiting),
        sample=3,
        seed=2**64 - 1,
        sampling=types.Sampling(0.1 + 0.2, 5, 0.95, 1e-3),
        logprob_kind="processed",
        discarded=4,
        duration=1e-9,
        reward=0.1 + 0.2,
        reward_error="ValueError: x",
        fit_for_training=False,
    )
    again = decode_record(Record.of(trajectory, tokenizer("o200k")).encode())
    assert again.trajectory == trajectory
    assert again.key == ("p/1", 3)
    assert again.limits == again.prompt.limits


@pytest.mark.parametrize(
    ("value", "entry"),
    [
        (types.Prompt, entries.PromptEntry),
        (types.Media, entries.MediaEntry),
        (types.Limits, entries.LimitsEntry),
        (types.Message, entries.MessageEntry),
        (types.Sampling, entries.SamplingEntry),
        (types.Segment, entries.SegmentEntry),
        (types.Call, entries.CallEntry),
        (types.CallRecord, entries.BlockEntry),
        (types.ExecutionResult, entries.ResultEntry),
        (types.ExecutionError, entries.ErrorEntry),
        (types.ToolCall, entries.ToolCallEntry),
        (types.StopReason, entries.StopEntry),
        (types.ForkPoint, entries.ForkPointEntry),
        (Markup, entries.MarkupEntry),
        (Frame, entries.FrameEntry),
        (Turn, entries.TurnEntry),
        (Special, entries.SpecialEntry),
    ],
)
def test_the_schema_has_every_field_of_a_value(value: type, entry: type[msgspec.Struct]) -> None:
    assert is_dataclass(value)
    assert {field.name for field in fields(value)} == set(entry.__struct_fields__)


def test_the_schema_has_every_field_of_a_trajectory() -> None:
    assert {field.name for field in fields(Trajectory)} <= set(Record.__struct_fields__)


@given(st.lists(st.floats(max_value=0.0, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
@example([-5e-324, -0.0, -1.7976931348623157e308, -0.1 - 0.2])
def test_logprobs_come_back_to_the_bit(logprobs: list[float]) -> None:
    segment = types.Segment("generated", (72,) * len(logprobs), tuple(logprobs), (0,) * len(logprobs), "i")
    record = Record.of(simple_trajectory(segments=(segment,)), tokenizer("o200k"))
    back = decode_record(record.encode()).segments[0].logprobs
    assert [x.hex() for x in back] == [x.hex() for x in logprobs]


# --- what cannot be written ------------------------------------------------------------------------------


def prompt_with(value: Any) -> Prompt:
    """Its metadata became what it may not be after the prompt was made."""
    metadata: dict[str, Any] = {}
    prompt = Prompt(text="Hi", metadata=metadata)
    metadata["a"] = value
    return prompt


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(number: float) -> None:
    segment = types.Segment("generated", (72,), (number,), (0,), "i")
    for changes, place in [
        ({"segments": (segment,)}, "segments"),
        ({"reward": number}, "reward"),
        ({"duration": number}, "duration"),
        ({"prompt": prompt_with([number])}, r"prompt\.metadata\.a\[0\]"),
        ({"calls": (CallRecord(Call(0, "", 1), ExecutionResult("", duration=number)),)}, "duration"),
    ]:
        with pytest.raises(RecordError, match=place):
            Record.of(simple_trajectory(**changes), tokenizer("o200k"))
    with pytest.raises(RecordError, match=r"provenance\.x"):
        Record.of(simple_trajectory(), tokenizer("o200k"), provenance={"x": number})


@pytest.mark.parametrize("value", [b"bytes", {1: 2}, {"a": {3, 4}}, object()])
def test_metadata_that_json_lacks_is_refused(value: Any) -> None:
    with pytest.raises(RecordError, match=r"prompt\.metadata"):
        Record.of(simple_trajectory(prompt=prompt_with(value)), tokenizer("o200k"))


def test_what_a_tool_said_is_never_a_reason_to_lose_a_trajectory() -> None:
    call = ToolCall("t", (math.nan, b"x"), {"k": {1: {2}}}, {"inf": math.inf, "list": (1, 2)})
    result = ExecutionResult("", tool_calls=(call,))
    record = Record.of(simple_trajectory(calls=(CallRecord(Call(0, "", 1), result),)), tokenizer("o200k"))
    entry = decode_record(record.encode()).calls[0].result
    assert entry is not None
    assert entry.tool_calls[0].arguments == ["nan", "b'x'"]
    assert entry.tool_calls[0].keyword_arguments == {"k": {"1": "{2}"}}
    assert entry.tool_calls[0].value == {"inf": "inf", "list": [1, 2]}


def test_lone_surrogates_do_not_break_a_record(tmp_path: Path) -> None:
    lone = "a\ud800b\udfff"
    prompt = Prompt(text="Hi", id=lone, metadata={lone: [lone]})
    scenario = Scenario(["<code>1</code> so"], lambda call: ExecutionResult(lone, stdout=lone), prompt=prompt)
    record = drive(scenario)
    with RecordWriter(tmp_path / "r.jsonl") as writer:
        writer.append(record)
    (back,) = read_records(tmp_path / "r.jsonl")
    assert back == record
    assert back.prompt.metadata == {"a\ufffdb\ufffd": ["a\ufffdb\ufffd"]}
    assert verify(back) == []


# --- reading ---------------------------------------------------------------------------------------------


def _changed(change: Any) -> bytes:
    data = msgspec.json.decode(example_record().encode())
    change(data)
    return json.dumps(data).encode()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"", "not JSON"),
        (b"{}", "schema: missing"),
        (b"[1]", "schema: missing"),
        (b'{"schema": "x"}', "schema: missing"),
        (b'{"schema": 99}', f"schema 99: this midstream reads schema {SCHEMA}"),
        (b'{"text": "a prompt"}', "schema: missing"),
        (b'{"schema":1,"prompt":{"id"', "not JSON"),
        (b'{"schema":1,"logprob_kind":"\xff"}', "not JSON"),
        (b'{"schema":1,"sample":"\\ud800"}', "not JSON"),
        (b'{"schema":1,"provenance":{"a":' + b"[" * 100_000, "nested too deeply"),
        (_changed(lambda d: d["segments"][0]["ids"].__setitem__(1, "x")), r"segments\[0\].ids\[1\]: Expected `int`"),
        (_changed(lambda d: d["segments"][0]["logprobs"].__setitem__(0, None)), r"segments\[0\].logprobs\[0\]"),
        (_changed(lambda d: d.pop("seed")), "`seed`"),
        (_changed(lambda d: d.update(colour="red")), "unknown field `colour`"),
        (_changed(lambda d: d["calls"][0]["call"].update(x=1)), r"calls\[0\].call: .*unknown field `x`"),
        (_changed(lambda d: d["stop"].update(kind="tired")), "stop.kind: "),
        (_changed(lambda d: d["segments"][0].update(origin="found")), r"segments\[0\].origin"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(example_record().encode() + b"\n" + line + b"\n")
    records = read_records(path)
    next(records)
    with pytest.raises(RecordError, match=rf"r\.jsonl:2: .*{message}"):
        next(records)


def test_a_record_that_can_be_no_trajectory_says_which_field() -> None:
    broken = decode_record(_changed(lambda d: d["segments"][0]["logprobs"].pop()))
    with pytest.raises(RecordError, match=r"segments\[0\]: .*differ in length"):
        _ = broken.trajectory


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"none\.jsonl: cannot be read \(No such file"):
        list(read_records(tmp_path / "none.jsonl"))
    with pytest.raises(RecordError, match=r"Is a directory"):
        list(read_records(tmp_path))


def test_lines_of_other_systems_are_read(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(example_record().encode() + b"\r\n" + example_record(sample=1).encode())
    assert [record.sample for record in read_records(path)] == [0, 1]


# --- writing ---------------------------------------------------------------------------------------------


def test_a_writer_appends_and_knows_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with RecordWriter(path) as writer:
        assert writer.done == set()
        writer.append(example_record("a"))
        writer.append(example_record("a", 1))
        assert writer.done == {("a", 0), ("a", 1)}
    seen: list[Record] = []
    with RecordWriter(path, known=seen.append) as writer:
        assert writer.done == {("a", 0), ("a", 1)}
        writer.append(example_record("b"))
    assert [record.key for record in seen] == [("a", 0), ("a", 1)]
    assert [record.key for record in read_records(path)] == [("a", 0), ("a", 1), ("b", 0)]


def test_nothing_is_written_twice(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "r.jsonl") as writer:
        writer.append(example_record("a"))
        with pytest.raises(RecordError, match="prompt 'a' sample 0 is there already"):
            writer.append(example_record("a"))
        writer.append(example_record(None))
        writer.append(example_record(None))  # prompts without an id cannot be told apart
    assert len(list(read_records(tmp_path / "r.jsonl"))) == 3


def test_a_closed_writer_refuses(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path / "r.jsonl")
    writer.close()
    writer.close()
    with pytest.raises(RecordError, match="closed"):
        writer.append(example_record())


def test_a_torn_last_line_is_cut_off_wherever_it_was_torn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)  # thousands of files that need not last
    path = tmp_path / "r.jsonl"
    first, second = (example_record(name).encode() + b"\n" for name in ("a", "b"))
    for length in range(len(second) + 1):
        path.write_bytes(first + second[:length])
        with RecordWriter(path) as writer:
            whole = length >= len(second) - 1
            assert writer.done == ({("a", 0), ("b", 0)} if whole else {("a", 0)})
        assert path.read_bytes() == (first + second if whole else first)


def test_a_torn_first_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    line = example_record().encode()
    for torn in (line[:1], line[:-1], line[:30] + b"\0" * 30, b"\0" * 8):
        path.write_bytes(torn)
        with pytest.raises(RecordError, match=r"r\.jsonl:1: the last line is unfinished"):
            list(read_records(path))
        with RecordWriter(path) as writer:
            assert writer.done == set()
            writer.append(example_record())
        assert path.read_bytes() == line + b"\n"


@pytest.mark.parametrize("content", [b"hello", b'{"text": "a prompt"}', b"hello\n", b"\n", b'{"schema":1}\n'])
def test_a_file_that_holds_something_else_is_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=r"prompts\.jsonl:1: "):
        RecordWriter(path)
    assert path.read_bytes() == content


def test_a_record_that_is_refused_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    content = example_record("a").encode() + b"\n" + FIRST_BYTES
    path.write_bytes(content)

    def refuse(record: Record) -> None:
        raise RecordError("made otherwise")

    with pytest.raises(RecordError, match="made otherwise"):
        RecordWriter(path, known=refuse)
    assert path.read_bytes() == content
    RecordWriter(path).close()  # the lock was given back


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    open_files = len(os.listdir("/proc/self/fd"))
    with RecordWriter(path) as writer:
        with pytest.raises(RecordError, match="another process is writing this file"):
            RecordWriter(path)
        program = f"from midstream.records import RecordWriter; RecordWriter({str(path)!r})"
        other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert other.returncode != 0
        assert "another process is writing this file" in other.stderr
        writer.append(example_record())
    RecordWriter(path).close()
    assert len(os.listdir("/proc/self/fd")) == open_files


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"cannot be written \(No such file"):
        RecordWriter(tmp_path / "no" / "r.jsonl")
    with pytest.raises(RecordError, match=r"cannot be written \(Is a directory"):
        RecordWriter(tmp_path)


def test_a_full_disk_is_an_error_and_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.jsonl"
    write = os.write
    room = [40]

    def full(file: int, data: bytes) -> int:
        if room[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = write(file, data[: room[0]])
        room[0] -= written
        return written

    with RecordWriter(path) as writer:
        writer.append(example_record("a"))
        whole = path.read_bytes()
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", full)
            with pytest.raises(RecordError, match="No space left on device"):
                writer.append(example_record("b"))
        assert path.read_bytes() == whole
        assert writer.done == {("a", 0)}
        writer.append(example_record("b"))
    assert [record.key for record in read_records(path)] == [("a", 0), ("b", 0)]


@pytest.mark.parametrize("written", [0, 40, None])
def test_an_interrupt_in_a_write_leaves_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int | None
) -> None:
    path = tmp_path / "r.jsonl"
    write = os.write

    def interrupted(file: int, data: bytes) -> int:
        write(file, data[:written])
        raise KeyboardInterrupt

    with RecordWriter(path) as writer:
        writer.append(example_record("a"))
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", interrupted)
            with pytest.raises(KeyboardInterrupt):
                writer.append(example_record("b"))
    keys = [record.key for record in read_records(path)]
    assert keys == ([("a", 0), ("b", 0)] if written is None else [("a", 0)])


def test_each_record_is_on_disk_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    write, sync = os.write, os.fsync
    monkeypatch.setattr(os, "write", lambda file, data: (order.append("write"), write(file, data))[1])
    monkeypatch.setattr(os, "fsync", lambda file: (order.append("fsync"), sync(file))[1])
    with RecordWriter(tmp_path / "r.jsonl") as writer:
        order.clear()
        writer.append(example_record("a"))
        writer.append(example_record("b"))
    assert order == ["write", "fsync", "write", "fsync"]


# --- records that are to be made again


def failed(prompt_id: str) -> Record:
    record = example_record(prompt_id)
    return msgspec.structs.replace(record, stop=entries.StopEntry(kind=types.StopKind.ENGINE_FAILURE, detail="x"))


def has_failed(record: Record) -> bool:
    return record.stop.kind is types.StopKind.ENGINE_FAILURE


def three_of_which_one_failed(path: Path) -> list[bytes]:
    with RecordWriter(path) as writer:
        for record in (example_record("a"), failed("b"), example_record("c")):
            writer.append(record)
    return path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("torn", [b"", FIRST_BYTES])
def test_records_to_be_made_again_are_taken_out_and_the_others_stay_to_the_byte(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "records.jsonl"
    lines = three_of_which_one_failed(path)
    path.write_bytes(b"".join(lines) + torn)
    path.chmod(0o640)
    link = tmp_path / "link.jsonl"
    link.symlink_to(path.name)
    with RecordWriter(link, again=has_failed) as writer:
        assert writer.taken_out == {("b", 0)}
        assert writer.done == {("a", 0), ("c", 0)}
        assert path.read_bytes() == lines[0] + lines[2]
        with pytest.raises(RecordError, match="another process is writing"):
            RecordWriter(path)
        writer.append(example_record("b"))
    assert [record.key for record in read_records(path)] == [("a", 0), ("c", 0), ("b", 0)]
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert {item.name for item in tmp_path.iterdir()} == {"records.jsonl", "link.jsonl"}


def test_without_records_to_be_made_again_the_file_is_the_same_one(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    three_of_which_one_failed(path)
    before = path.stat().st_ino
    with RecordWriter(path, again=lambda record: False) as writer:
        assert writer.taken_out == set()
    assert path.stat().st_ino == before


@pytest.mark.parametrize("fault", ["replace", "fsync"])
def test_a_fault_while_records_are_taken_out_leaves_all_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    path = tmp_path / "records.jsonl"
    lines = three_of_which_one_failed(path)

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, fault, fail)
        with pytest.raises(RecordError, match="No space left"):
            RecordWriter(path, again=has_failed)
    assert path.read_bytes() == b"".join(lines)
    assert [item.name for item in tmp_path.iterdir()] == ["records.jsonl"]
    RecordWriter(path).close()  # nothing holds its lock


def test_a_file_that_was_replaced_while_a_writer_came_for_its_lock_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "records.jsonl"
    three_of_which_one_failed(path)
    opened = os.open

    def open_then_replaced(name: Any, *arguments: Any, **options: Any) -> int:
        file = opened(name, *arguments, **options)
        if Path(name) == path:
            monkeypatch.undo()
            RecordWriter(path, again=has_failed).close()
        return file

    monkeypatch.setattr(os, "open", open_then_replaced)
    with pytest.raises(RecordError, match="another process is writing"):
        RecordWriter(path)
