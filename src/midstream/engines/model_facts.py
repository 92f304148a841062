"""What a transformers model says of itself: whether it is a decoder, its context, its ends of sequence."""

from __future__ import annotations

import logging
from typing import Any

from midstream.errors import ConfigurationError

_logger = logging.getLogger(__name__)
_POSITION_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


def check_decoder(model: Any) -> None:
    """Raise :class:`ConfigurationError` for what is plainly no decoder-only model of transformers."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_input_embeddings"):
        raise ConfigurationError(f"model={type(model).__name__}: is no transformers model")
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigurationError(
            f"model={type(model).__name__}: has an encoder; a decoder-only AutoModelForCausalLM is wanted"
        )


def context_bound(model: Any, wanted: int | None) -> int | None:
    """The most ids a row may hold: the model's positions, and ``wanted`` where that is less; None is no bound."""
    config = model.config.get_text_config(decoder=True)
    found = (getattr(config, name, None) for name in _POSITION_FIELDS)
    bounds = [next((bound for bound in found if isinstance(bound, int) and bound > 0), None), wanted]
    length = min((bound for bound in bounds if bound is not None), default=None)
    rescaled = _rescaled_beyond(config)
    if rescaled is not None and (length is None or length > rescaled):
        _logger.warning(
            "%s changes the rotary positions of all ids once there are more than %d (longrope), so that nothing "
            "computed before would hold: the context is bounded to %d",
            type(model).__name__,
            rescaled,
            rescaled,
        )
        return rescaled
    return length


def _rescaled_beyond(config: Any) -> int | None:
    """The length beyond which LongRoPE has other frequencies for a sequence's every position."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    lengths = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    return min(lengths, default=None)


def end_of_sequence_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Of the generation config, the config or the tokenizer: the first that names any."""
    for source in (getattr(model, "generation_config", None), model.config.get_text_config(decoder=True), tokenizer):
        found = getattr(source, "eos_token_id", None)
        if isinstance(found, int):
            return frozenset((found,))
        if found:
            return frozenset(found)
    return frozenset()
