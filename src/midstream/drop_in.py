"""``policy.generate(batch)`` with code and tools: the same call, the same keys back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from midstream import checks
from midstream.engines.policy import PolicyEngine, default_pad_id
from midstream.errors import ConfigurationError, EngineError
from midstream.generation import Generator
from midstream.markup import Markup
from midstream.types import Limits, Prompt, StopKind

if TYPE_CHECKING:
    from midstream.sandbox import SandboxPool


def generate_with_code_and_tools(
    policy: Any,
    input_batch: Any,
    tokenizer: Any,
    execute_code: bool = True,
    tool_map: Mapping[str, Callable[..., Any]] = MappingProxyType({}),
    tag: str = "<code>",
    result_tag: str = "<result>",
    *args: Any,
    limits: Limits | None = None,
    pool: SandboxPool | None = None,
    markup: Markup | None = None,
    **kwargs: Any,
) -> Any:
    """Generate as ``policy.generate(input_batch, *args, **kwargs)`` does, running the code that the model writes.

    - ``input_batch``: a dict, or NeMo-RL's ``BatchedDataDict``, right-padded: ``input_ids`` int64 ``[B, S]``,
      ``input_lengths`` int64 ``[B]``, and optionally ``stop_strings`` (a list for each row, or None for a row
      without; or one list of strings for all). Other keys go along to every call of the policy, row by row.
    - ``execute_code=False`` runs no code and looks for no tags: it only generates.
    - ``tool_map``: functions that the code may call by these names; they run here, outside the sandbox.
    - ``tag``, ``result_tag``: the start tags of code and of results; ``markup`` in their place for others.
    - ``limits``: bounds of our own; without them, only the policy's bounds hold.
    - ``pool``: sandboxes to use; by default a pool is started for this call.

    Returns a batch of the kind of ``input_batch``, right-padded, with ``output_ids`` int64 ``[B, S']``,
    ``generation_lengths`` and ``unpadded_sequence_lengths`` int64 ``[B]`` (injected ids included),
    ``logprobs`` float32 ``[B, S']`` (0.0 on prompts, injected ids and padding; left out where the policy
    gives none), ``token_mask`` int64 ``[B, S']`` (1 on generated ids) and ``truncated`` bool ``[B]`` (a round
    was truncated, or something other than the model ended the row).

    Raises :class:`~midstream.errors.ConfigurationError` for a batch that is not so, and whatever
    ``policy.generate`` raises.
    """
    if not callable(getattr(policy, "generate", None)):
        raise ConfigurationError(f"policy={policy!r}: must have a method generate(batch)")
    checks.flag("execute_code", execute_code)
    checks.instance("limits", limits, Limits, optional=True)
    checks.instance("tag", tag, str)
    checks.instance("result_tag", result_tag, str)
    chosen = None
    if execute_code:
        chosen = markup if markup is not None else Markup.tags(tag, result_tag)
    prompts = _prompts(input_batch, limits or Limits())
    if not prompts:
        return policy.generate(input_batch, *args, **kwargs)
    engine = PolicyEngine(policy, tokenizer, input_batch=input_batch, args=args, kwargs=kwargs)
    with Generator(engine, tools=tool_map, markup=chosen, limits=limits, pool=pool) as generator:
        batch = generator.generate(prompts)
    if engine.failure is not None:
        raise engine.failure
    for trajectory in batch:
        if trajectory.stop.kind is StopKind.ENGINE_FAILURE:
            raise EngineError(trajectory.stop.detail)
    # What a policy without logprobs gives goes back without them, as it came.
    tensors = batch.to_tensors(pad_id=default_pad_id(tokenizer), allow_unfit=True)
    truncated = tensors["truncated"]
    for row in engine.truncated_rows:
        truncated[row] = True
    output = {
        "output_ids": tensors["output_ids"],
        "generation_lengths": tensors["generation_lengths"],
        "unpadded_sequence_lengths": tensors["unpadded_sequence_lengths"],
        "logprobs": tensors["logprobs"],
        "token_mask": tensors["mask"],
        "truncated": truncated,
    }
    if not engine.gives_logprobs:
        del output["logprobs"]
    device = input_batch["input_ids"].device
    return type(input_batch)({key: value.to(device) for key, value in output.items()})


def _prompts(input_batch: Any, limits: Limits) -> list[Prompt]:
    if not isinstance(input_batch, Mapping):
        raise ConfigurationError(f"input_batch={input_batch!r}: must be a dict, or another mapping of tensors")
    for key in ("input_ids", "input_lengths"):
        if key not in input_batch:
            raise ConfigurationError(f"input_batch: has no {key!r}; it has {sorted(map(str, input_batch))}")
        if not hasattr(input_batch[key], "shape"):
            raise ConfigurationError(f"input_batch.{key}: is {type(input_batch[key]).__name__}; it must be a tensor")
    input_ids, lengths = input_batch["input_ids"], input_batch["input_lengths"]
    if input_ids.ndim != 2 or tuple(lengths.shape) != (input_ids.shape[0],):
        raise ConfigurationError(
            f"input_batch: input_ids has shape {tuple(input_ids.shape)} and input_lengths {tuple(lengths.shape)}; "
            "they must be [B, S] and [B]"
        )
    lengths = lengths.tolist()
    if not all(type(length) is int for length in lengths):
        raise ConfigurationError(f"input_batch.input_lengths: holds {input_batch['input_lengths'].dtype}, not integers")
    prompts = []
    stop_strings = _stop_strings(input_batch.get("stop_strings"), len(lengths))
    for index, (row, length, stops) in enumerate(zip(input_ids.tolist(), lengths, stop_strings, strict=True)):
        if not 1 <= length <= len(row):
            raise ConfigurationError(f"input_batch.input_lengths[{index}]={length}: must be from 1 to {len(row)}")
        own = replace(limits, stop_strings=tuple(dict.fromkeys((*limits.stop_strings, *stops))))
        prompts.append(Prompt(ids=tuple(row[:length]), id=str(index), limits=own))
    return prompts


def _stop_strings(value: Any, rows: int) -> list[Sequence[str]]:
    if value is None or (isinstance(value, list | tuple) and not value):
        return [()] * rows
    if not isinstance(value, list | tuple):
        raise ConfigurationError(f"input_batch.stop_strings={value!r}: must be a list for each row, or one for all")
    if all(isinstance(item, str) for item in value):
        return [value] * rows
    if len(value) != rows:
        raise ConfigurationError(f"input_batch.stop_strings: has {len(value)} entries for {rows} rows")
    for index, item in enumerate(value):
        if isinstance(item, str) or not all(isinstance(text, str) for text in item or ()):
            raise ConfigurationError(f"input_batch.stop_strings[{index}]={item!r}: must be a list of strings or None")
    return [item or () for item in value]
