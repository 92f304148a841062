"""Finished trajectories together, and the tensors that a trainer takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from midstream import checks
from midstream.errors import ConfigurationError
from midstream.records import Record, RecordWriter, Violation, verify
from midstream.types import Trajectory
from midstream.verifying import compare_with_model

if TYPE_CHECKING:
    import torch


class TrajectoryBatch(Sequence[Trajectory]):
    """Trajectories in the order of their prompts, the samples of one prompt side by side."""

    def __init__(
        self, trajectories: Sequence[Trajectory], to_record: Callable[[Trajectory], Record] | None = None
    ) -> None:
        self._trajectories = tuple(trajectories)
        self._to_record = to_record

    @overload
    def __getitem__(self, index: int) -> Trajectory: ...
    @overload
    def __getitem__(self, index: slice) -> TrajectoryBatch: ...
    def __getitem__(self, index: int | slice) -> Trajectory | TrajectoryBatch:
        if isinstance(index, slice):
            return TrajectoryBatch(self._trajectories[index], self._to_record)
        return self._trajectories[index]

    def __len__(self) -> int:
        return len(self._trajectories)

    def __iter__(self) -> Iterator[Trajectory]:
        return iter(self._trajectories)

    def __repr__(self) -> str:
        return f"TrajectoryBatch({len(self)} trajectories)"

    @property
    def rewards(self) -> list[float | None]:
        return [trajectory.reward for trajectory in self]

    @property
    def unfinished(self) -> list[Trajectory]:
        """Those that were paused: a later ``generate`` goes on from them."""
        return [trajectory for trajectory in self if trajectory.stop.resumable]

    @property
    def records(self) -> list[Record]:
        """The trajectories as they stand in a file. Only a generator's batches know how they were made.

        Raises :class:`~midstream.errors.ConfigurationError` for a batch that no generator made.
        """
        if self._to_record is None:
            raise ConfigurationError("records: this batch was not made by a generator; use midstream.records.Record.of")
        return [self._to_record(trajectory) for trajectory in self]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Append the trajectories to a file of records, one line each, durable when this returns.

        Raises :class:`~midstream.errors.RecordError` where the file cannot be written, or holds a record of
        the same prompt id and sample already.
        """
        records = self.records
        with RecordWriter(path) as writer:
            for record in records:
                writer.append(record)

    def verify(self, *, model: Any = None, tolerance: float | None = None) -> list[list[Violation]]:
        """What the certificate finds wrong with each trajectory: empty lists where all is well."""
        records = self.records
        violations = [verify(record) for record in records]
        if model is None:
            return violations
        comparisons = compare_with_model(records, model, tolerance=tolerance)
        return [found + compared.violations for found, compared in zip(violations, comparisons, strict=True)]

    def to_tensors(
        self,
        *,
        pad_id: int = 0,
        prompt_side: Literal["right", "left"] = "right",
        length: int | None = None,
        prompt_length: int | None = None,
        allow_unfit: bool = False,
    ) -> dict[str, torch.Tensor]:
        """The batch as tensors of one width ``S``.

        With ``prompt_side="right"`` each row is its prompt, then what was generated, then padding. With
        ``"left"`` prompts are padded on their left to one width (``prompt_length``, by default the longest
        prompt's), so that every generation starts at the same column. ``length`` is the width ``S``; by
        default the longest row's.

        Returns, for ``B`` trajectories:

        - ``output_ids`` int64 ``[B, S]``, padded with ``pad_id``;
        - ``mask`` int64 ``[B, S]``: 1 on generated ids, 0 on the prompt, injected ids and padding;
        - ``attention_mask`` int64 ``[B, S]``: 0 on padding;
        - ``logprobs`` float32 ``[B, S]``: the engine's on generated ids, 0.0 elsewhere;
        - ``generation_lengths`` int64 ``[B]``: ids after the prompt, injected ones included;
        - ``unpadded_sequence_lengths`` int64 ``[B]``: all ids of the row;
        - ``truncated`` bool ``[B]``: something other than the model ended the row.

        Raises :class:`~midstream.errors.ConfigurationError` where ``length`` or ``prompt_length`` is too
        small: rows are never cut; and for trajectories that are not fit for training (their engine gave no
        logprobs, or only text), unless ``allow_unfit``.
        """
        import torch

        if prompt_side not in ("right", "left"):
            raise ConfigurationError(f"prompt_side={prompt_side!r}: must be 'right' or 'left'")
        pad_id = checks.integer("pad_id", pad_id)
        length = checks.integer("length", length, 0, optional=True)
        prompt_length = checks.integer("prompt_length", prompt_length, 0, optional=True)
        if prompt_length is not None and prompt_side == "right":
            raise ConfigurationError(f"prompt_length={prompt_length}: only with prompt_side='left'")
        unfit = [index for index, trajectory in enumerate(self) if not trajectory.fit_for_training]
        if unfit and not allow_unfit:
            raise ConfigurationError(
                f"to_tensors: trajectories {unfit[:8]} of this batch are not fit for training: their engine gave no "
                "logprobs, or only text; allow_unfit=True takes them all the same"
            )
        longest_prompt = max((len(t.prompt_ids) for t in self), default=0)
        prompt_width = longest_prompt if prompt_length is None else prompt_length
        if prompt_width < longest_prompt:
            raise ConfigurationError(f"prompt_length={prompt_length}: the longest prompt has {longest_prompt} ids")
        offsets = [prompt_width - len(t.prompt_ids) if prompt_side == "left" else 0 for t in self]
        longest = max((offset + t.total_length for offset, t in zip(offsets, self, strict=True)), default=0)
        width = longest if length is None else length
        if width < longest:
            raise ConfigurationError(f"length={length}: the longest row needs {longest}")

        def padded(rows: list[list[Any]], fill: float, dtype: torch.dtype) -> torch.Tensor:
            out = torch.full((len(rows), width), fill, dtype=dtype)
            for index, (offset, row) in enumerate(zip(offsets, rows, strict=True)):
                out[index, offset : offset + len(row)] = torch.tensor(row, dtype=dtype)
            return out

        return {
            "output_ids": padded([t.ids for t in self], pad_id, torch.int64),
            "mask": padded([t.mask for t in self], 0, torch.int64),
            "attention_mask": padded([[1] * t.total_length for t in self], 0, torch.int64),
            "logprobs": padded([t.logprobs for t in self], 0.0, torch.float32),
            "generation_lengths": torch.tensor([t.generation_length for t in self], dtype=torch.int64),
            "unpadded_sequence_lengths": torch.tensor([t.total_length for t in self], dtype=torch.int64),
            "truncated": torch.tensor([t.truncated for t in self], dtype=torch.bool),
        }
