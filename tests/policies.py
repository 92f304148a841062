"""Policies for tests: objects with ``generate(batch)``, as trainers hand them over."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from midstream.decoding import decode
from midstream.vocabulary import Vocabulary

PAD = 0


class BatchedDataDict(UserDict[str, Any]):
    """Stands in for NeMo-RL's: a ``UserDict`` of tensors and lists that have one entry for each row."""

    def __init__(self, *arguments: Any, **items: Any) -> None:
        super().__init__(*arguments, **items)
        self.micro_batch_indices = None

    @property
    def size(self) -> int:
        return len(next(iter(self.data.values())))

    def select_indices(self, indices: Sequence[int]) -> BatchedDataDict:
        chosen = list(indices)
        return BatchedDataDict(
            {k: v[chosen] if isinstance(v, torch.Tensor) else [v[i] for i in chosen] for k, v in self.data.items()}
        )

    def slice(self, start: int, end: int) -> BatchedDataDict:
        return self.select_indices(range(start, end))

    @classmethod
    def from_batches(
        cls, batches: Sequence[Mapping[str, Any]], pad_value_dict: Mapping[str, float] | None = None
    ) -> BatchedDataDict:
        stacked = cls()
        for key in batches[0]:
            values = [batch[key] for batch in batches]
            if isinstance(values[0], list):
                stacked[key] = [item for value in values for item in value]
            elif values[0].ndim == 1:
                stacked[key] = torch.cat(values)
            else:
                rows = [row for value in values for row in value]
                fill = (pad_value_dict or {}).get(key, 0)
                stacked[key] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
        return stacked


def input_batch(
    kind: Callable[[dict[str, Any]], Any], prompts: Sequence[Sequence[int]], *, pad_id: int = PAD, **extra: Any
) -> Any:
    """Right-padded prompts as a trainer's batch."""
    width = max(len(ids) for ids in prompts)
    rows = [[*ids, *[pad_id] * (width - len(ids))] for ids in prompts]
    lengths = torch.tensor([len(ids) for ids in prompts])
    return kind({"input_ids": torch.tensor(rows), "input_lengths": lengths, **extra})


def padded_output(
    kind: Callable[[dict[str, Any]], Any],
    prompts: Sequence[Sequence[int]],
    new: Sequence[Sequence[int]],
    logprobs: Sequence[Sequence[float]],
    *,
    pad_id: int,
    truncated: Sequence[bool] | None = None,
) -> Any:
    """What a policy gives for rows that went on from ``prompts`` by ``new``."""
    width = max(len(a) + len(b) for a, b in zip(prompts, new, strict=True)) + 1  # a column more than is needed
    ids = torch.full((len(new), width), pad_id)
    all_logprobs = torch.zeros(len(new), width)
    for row, (a, b, c) in enumerate(zip(prompts, new, logprobs, strict=True)):
        ids[row, : len(a) + len(b)] = torch.tensor([*a, *b])
        all_logprobs[row, len(a) : len(a) + len(b)] = torch.tensor(c)
    output = {
        "output_ids": ids,
        "generation_lengths": torch.tensor([len(b) for b in new]),
        "unpadded_sequence_lengths": torch.tensor([len(a) + len(b) for a, b in zip(prompts, new, strict=True)]),
        "logprobs": all_logprobs,
    }
    if truncated is not None:
        output["truncated"] = torch.tensor(truncated)
    return kind(output)


@dataclass
class ScriptedPolicy:
    """Says the ids of ``scripts``, row by row, until a stop string of *any* row in the batch is complete.

    Which row is which it is told by the key ``name``. The token that completes a stop string stays whole, and
    ``overshoot`` more ids follow it. EOS is the padding. Some logprobs are exactly 0.0.
    """

    tokenizer: Any
    scripts: Mapping[str, Sequence[int]]
    kind: type = dict
    tells_truncated: bool = True
    gives_logprobs: bool = True
    overshoot: int = 0
    max_new_tokens: int = 10_000
    """Of one call."""
    calls: list[Any] = field(default_factory=list)
    options: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    _said: dict[str, tuple[int, list[int]]] = field(default_factory=dict)
    _place: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.vocabulary = Vocabulary.of(self.tokenizer)
        (self.eos_id,) = self.vocabulary.eos_ids

    def generate(self, batch: Any, *arguments: Any, **options: Any) -> Any:
        assert isinstance(batch, self.kind), "batch must be of the policy's own kind"
        assert batch["input_ids"].dtype == batch["input_lengths"].dtype == torch.int64
        rows = len(batch["input_lengths"])
        assert all(len(value) == rows for value in batch.values())
        self.calls.append(batch)
        self.options.append((arguments, options))
        stops = {stop for strings in batch.get("stop_strings") or [] for stop in strings or []}
        prompts, new, logprobs, truncated = [], [], [], []
        for index, name in enumerate(batch["name"]):
            length = int(batch["input_lengths"][index])
            line = batch["input_ids"][index].tolist()
            assert set(line[length:]) <= {self.eos_id}
            ids, cut = self._row(name, line[:length], stops)
            prompts.append(line[:length])
            new.append(ids)
            logprobs.append([policy_logprob(length + place) for place in range(len(ids))])
            truncated.append(cut)
        told = truncated if self.tells_truncated else None
        output = padded_output(self.kind, prompts, new, logprobs, pad_id=self.eos_id, truncated=told)
        if not self.gives_logprobs:
            del output["logprobs"]
        return output

    def _row(self, name: str, prompt: list[int], stops: set[str]) -> tuple[list[int], bool]:
        start, said = self._said.get(name, (len(prompt), []))
        kept = 0  # how many of the ids that were said last were kept
        for mine, theirs in zip(said, prompt[start:], strict=False):
            if mine != theirs:
                break
            kept += 1
        place = self._place.get(name, 0) - len(said) + kept
        script = self.scripts[name]
        ids: list[int] = []
        beyond = None
        while place < len(script) and len(ids) < self.max_new_tokens and beyond != 0:
            ids.append(script[place])
            place += 1
            if ids[-1] == self.eos_id:
                break
            if beyond is not None:
                beyond -= 1
            elif any(stop in decode(self.vocabulary, ids) for stop in stops):
                beyond = self.overshoot
        self._said[name], self._place[name] = (len(prompt), ids), place
        return ids, len(ids) == self.max_new_tokens and beyond is None and ids[-1] != self.eos_id


def policy_logprob(place: int) -> float:
    """What :class:`ScriptedPolicy` gives for the id at a place of its row."""
    return -(place % 4) / 4
