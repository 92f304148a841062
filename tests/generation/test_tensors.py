"""``TrajectoryBatch.to_tensors``: shapes, dtypes, padding on either side, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from midstream import Prompt, Segment, StopKind, StopReason, Trajectory, TrajectoryBatch, errors

PAD = 7


@st.composite
def segments(draw: st.DrawFn) -> Segment:
    ids = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=5)))  # PAD among them
    if draw(st.booleans()):
        logprobs = tuple(draw(st.sampled_from([0.0, -0.5, -3.25])) for _ in ids)
        return Segment("generated", ids, logprobs, (draw(st.integers(0, 3)),) * len(ids), "")
    return Segment("injected", ids, (0.0,) * len(ids), (-1,) * len(ids), "")


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    prompt = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=6)))
    parts = tuple(draw(st.lists(segments(), max_size=4)))
    return Trajectory(Prompt(ids=prompt), prompt, parts, (), StopReason(draw(st.sampled_from(StopKind))))


DTYPES = {
    "output_ids": torch.int64,
    "mask": torch.int64,
    "attention_mask": torch.int64,
    "logprobs": torch.float32,
    "generation_lengths": torch.int64,
    "unpadded_sequence_lengths": torch.int64,
    "truncated": torch.bool,
}


@given(rows=st.lists(trajectories(), max_size=5), side=st.sampled_from(["right", "left"]), more=st.integers(0, 3),
       wider=st.none() | st.integers(0, 4))  # fmt: skip
def test_every_row_stands_whole_in_its_place_and_all_else_is_padding(
    rows: list[Trajectory], side: Any, more: int, wider: int | None
) -> None:
    longest_prompt = max((len(row.prompt_ids) for row in rows), default=0)
    options: dict[str, Any] = {"pad_id": PAD, "prompt_side": side}
    if side == "left" and wider is not None:
        options["prompt_length"] = longest_prompt + wider
    plain = TrajectoryBatch(rows).to_tensors(**options)
    width = plain["output_ids"].shape[1] + more
    tensors = TrajectoryBatch(rows).to_tensors(**options, length=width)
    assert {name: tensor.dtype for name, tensor in tensors.items()} == DTYPES
    for name, tensor in tensors.items():
        whole_rows = name in ("output_ids", "mask", "attention_mask", "logprobs")
        assert tensor.shape == ((len(rows), width) if whole_rows else (len(rows),))
        assert torch.equal(tensor[:, : width - more] if whole_rows else tensor, plain[name])
    for index, row in enumerate(rows):
        column = options.get("prompt_length", longest_prompt) - len(row.prompt_ids) if side == "left" else 0
        for name, values, fill in [
            ("output_ids", row.ids, PAD),
            ("mask", row.mask, 0),
            ("attention_mask", [1] * row.total_length, 0),
            ("logprobs", row.logprobs, 0.0),
        ]:
            line = tensors[name][index].tolist()
            assert line == [fill] * column + values + [fill] * (width - column - len(values)), name
        assert int(tensors["generation_lengths"][index]) == row.total_length - len(row.prompt_ids)
        assert int(tensors["unpadded_sequence_lengths"][index]) == row.total_length
        finished = (StopKind.END_OF_SEQUENCE, StopKind.STOP_STRING, StopKind.STOP_ID)
        assert bool(tensors["truncated"][index]) == (row.stop.kind not in finished)


def batch(*shapes: tuple[int, int]) -> TrajectoryBatch:
    rows = []
    for prompt, new in shapes:
        parts = (Segment("generated", (1,) * new, (-1.0,) * new, (0,) * new, ""),) if new else ()
        ids = (2,) * prompt
        rows.append(Trajectory(Prompt(ids=ids), ids, parts, (), StopReason(StopKind.END_OF_SEQUENCE)))
    return TrajectoryBatch(rows)


def test_right_and_left_by_hand() -> None:
    rows = batch((1, 2), (3, 1))
    right = rows.to_tensors(pad_id=PAD)
    assert right["output_ids"].tolist() == [[2, 1, 1, PAD], [2, 2, 2, 1]]
    left = rows.to_tensors(pad_id=PAD, prompt_side="left")
    assert left["output_ids"].tolist() == [[PAD, PAD, 2, 1, 1], [2, 2, 2, 1, PAD]]
    assert left["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert left["logprobs"].tolist() == [[0, 0, 0, -1, -1], [0, 0, 0, -1, 0]]


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda rows: rows.to_tensors(length=3), "length=3: the longest row needs 4"),
        (lambda rows: rows.to_tensors(length=4, prompt_side="left"), "length=4: the longest row needs 5"),
        (lambda rows: rows.to_tensors(prompt_side="left", prompt_length=2), "the longest prompt has 3 ids"),
        (lambda rows: rows.to_tensors(prompt_length=3), "only with prompt_side='left'"),
        (lambda rows: rows.to_tensors(prompt_side="middle"), "must be 'right' or 'left'"),
    ],
)
def test_rows_are_never_cut(ask: Callable[[TrajectoryBatch], Any], says: str) -> None:
    with pytest.raises(errors.ConfigurationError, match=says):
        ask(batch((1, 2), (3, 1)))


def test_a_batch_is_a_sequence_whose_slices_are_batches() -> None:
    rows = batch((1, 1), (2, 2), (3, 3))
    assert len(rows) == 3
    assert isinstance(rows[1:], TrajectoryBatch)
    assert [row.total_length for row in rows[1:]] == [4, 6]
    assert rows[0].total_length == 2
    assert (rows.rewards, rows.unfinished) == ([None] * 3, [])
    with pytest.raises(errors.ConfigurationError, match="not made by a generator"):
        rows.save("nowhere.jsonl")
