"""What a vLLM engine says of itself: context, ends of sequence, logprobs, how it samples."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from midstream.errors import CapabilityError
from midstream.types import LogprobKind

_logger = logging.getLogger(__name__)

PROCESSOR_V1 = "midstream.engines.vllm.processor_v1:RowProcessor"
PROCESSOR_V2 = "midstream.engines.vllm.processor_v2:RowProcessor"
"""midstream's logits processor for vLLM's two model runners, as vLLM's ``logits_processors`` takes it."""

_LOGPROB_KINDS: dict[str, LogprobKind] = {"raw_logprobs": "raw", "processed_logprobs": "processed"}


@dataclass(frozen=True, slots=True)
class Facts:
    """``has_processor``: midstream's logits processor is in the engine, so that noise can be keyed and ids forced."""

    context_length: int
    vocabulary_size: int
    eos_ids: frozenset[int]
    logprobs: LogprobKind
    has_processor: bool
    speculative: bool
    asynchronous: bool
    detokenizes: bool


def facts_of(config: Any, tokenizer: Any) -> Facts:
    """The facts of a ``VllmConfig``. Raises :class:`CapabilityError` for what gives no usable rows."""
    model = config.model_config
    if model.runner_type != "generate":
        raise CapabilityError(f"llm: its runner is {model.runner_type!r}; a generative model is wanted")
    if model.logprobs_mode not in _LOGPROB_KINDS:
        raise CapabilityError(
            f"llm: logprobs_mode={str(model.logprobs_mode)!r} gives logits in place of logprobs; "
            f"make it with one of {sorted(_LOGPROB_KINDS)}"
        )
    speculative = config.speculative_config is not None
    has_processor = _has_processor(config) and not speculative
    if has_processor and _processed(config):
        raise CapabilityError(
            "llm: midstream's logits processor leaves nothing possible but the id that it draws, so that processed "
            "logprobs would all be 0.0; make it with logprobs_mode='raw_logprobs', or without that processor"
        )
    if not config.cache_config.enable_prefix_caching:
        _logger.warning("vLLM's prefix caching is off: rows that go on by resubmission are computed anew each time")
    return Facts(
        context_length=int(model.max_model_len),
        vocabulary_size=int(model.get_vocab_size()),
        eos_ids=_end_of_sequence_ids(model, tokenizer),
        logprobs=_LOGPROB_KINDS[model.logprobs_mode],
        has_processor=has_processor,
        speculative=speculative,
        asynchronous=bool(config.scheduler_config.async_scheduling),
        detokenizes=not model.skip_tokenizer_init,
    )


def add_processor(config: Any) -> None:
    """Have the engine that is made of ``config`` use midstream's logits processor, where vLLM allows one."""
    if config.speculative_config is not None or _processed(config):
        return
    processor = PROCESSOR_V2 if _uses_second_runner(config) else PROCESSOR_V1
    config.model_config.logits_processors = [*(config.model_config.logits_processors or ()), processor]


def _has_processor(config: Any) -> bool:
    ours = (PROCESSOR_V1, PROCESSOR_V2)
    given = config.model_config.logits_processors or ()
    return any(item in ours or f"{item.__module__}:{item.__qualname__}" in ours for item in given if _known(item))


def _processed(config: Any) -> bool:
    return str(config.model_config.logprobs_mode) == "processed_logprobs"


def _known(item: Any) -> bool:
    return isinstance(item, str) or hasattr(item, "__qualname__")


def _uses_second_runner(config: Any) -> bool:
    return bool(getattr(config, "use_v2_model_runner", False))


def _end_of_sequence_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Of the generation config, the model's config or the tokenizer: the first that names any."""
    named = (
        (model.try_get_generation_config() or {}).get("eos_token_id"),
        getattr(model.hf_text_config, "eos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    )
    for found in named:
        if isinstance(found, int):
            return frozenset((found,))
        if found:
            return frozenset(found)
    return frozenset()
