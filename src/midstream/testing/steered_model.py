"""The steered model as a folder: a Llama of one layer, and its tokenizer, written by hand and not trained.

Its one layer's attention looks at one place alone, :data:`~midstream.testing.steering.PERIOD` - 1 ids back, and
copies the id that stands there to the output. Queries and keys are constants; the rotary embedding of their positions
alone decides: the score of a place that is ``d`` ids back is the sum of ``cos(f * (d - PERIOD + 1))`` over all rotary
frequencies ``f``, which has its largest value, by far, where all of the angles are 0. So everything that the
model says depends on every position's being right.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from midstream.testing.steering import (
    CHOICE,
    CHOICES,
    CONTEXT,
    EOS,
    FIRST_DIGIT,
    PERIOD,
    SIZE,
    SPECIAL,
    SURE,
    piece,
)

if TYPE_CHECKING:
    import torch

_HEAD = 64
_HEADS = -(-SIZE // _HEAD)
_CODE = _HEADS * _HEAD
"""An id is one of these dimensions: first of what came in, then of what is copied."""

_HIDDEN = 3 * _CODE
"""Dimension 0 is a constant; the two codes are in the second and the last third."""

_EPSILON = 1e-6
_THETA = 500.0
_SHARPNESS = 21.0
"""The length of queries and keys: a neighbour's score is 80 less than that of the right place."""


def write_steered_model(folder: str | Path) -> Path:
    """Write the steered model into ``folder``, which is made: 8 MB, float32, as ``save_pretrained`` would.

    Needs torch and safetensors. Returns the folder.
    """
    from safetensors.torch import save_file

    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("config.json", _config()),
        ("generation_config.json", {"eos_token_id": EOS, "pad_token_id": EOS}),
        ("tokenizer.json", _tokenizer()),
        ("tokenizer_config.json", _tokenizer_config()),
    ):
        (path / name).write_text(json.dumps(content, indent=1))
    save_file(_weights(), path / "model.safetensors", metadata={"format": "pt"})
    return path


def _config() -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": SIZE,
        "hidden_size": _HIDDEN,
        "intermediate_size": _HEAD,
        "num_hidden_layers": 1,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS,
        "head_dim": _HEAD,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": _EPSILON,
        "rope_parameters": {"rope_type": "default", "rope_theta": _THETA},
        "tie_word_embeddings": False,
        "attention_bias": False,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
        "dtype": "float32",
    }


def _weights() -> dict[str, torch.Tensor]:
    import torch

    codes = torch.eye(_CODE)
    embeddings = torch.zeros(SIZE, _HIDDEN)
    embeddings[:, 0] = 1
    embeddings[:, _CODE : 2 * _CODE] = codes[:SIZE]
    # What a norm makes of each one in a vector that has so many of them, and zeros.
    normed = {ones: 1 / math.sqrt(ones / _HIDDEN + _EPSILON) for ones in (2, 3)}
    turn = torch.tensor([(PERIOD - 1) * _THETA ** (-place / (_HEAD // 2)) for place in range(_HEAD // 2)])
    query, key = torch.zeros(_CODE, _HIDDEN), torch.zeros(_CODE, _HIDDEN)
    query[:, 0] = torch.cat((turn.cos(), -turn.sin())).repeat(_HEADS) * _SHARPNESS / normed[2]
    key[:, 0] = torch.cat((torch.ones(_HEAD // 2), torch.zeros(_HEAD // 2))).repeat(_HEADS) * _SHARPNESS / normed[2]
    value, output = torch.zeros(_CODE, _HIDDEN), torch.zeros(_HIDDEN, _CODE)
    value[:, _CODE : 2 * _CODE] = codes / normed[2]
    output[2 * _CODE :] = codes
    head = torch.zeros(SIZE, _HIDDEN)
    head[:, 2 * _CODE :] = codes[:SIZE] * SURE / normed[3]
    copied_choice = 2 * _CODE + CHOICE
    head[CHOICE, copied_choice] = 0
    for place in range(CHOICES):
        head[FIRST_DIGIT + place, copied_choice] = (SURE + place / 4) / normed[3]
    layer = "model.layers.0"
    return {
        "model.embed_tokens.weight": embeddings,
        f"{layer}.input_layernorm.weight": torch.ones(_HIDDEN),
        f"{layer}.self_attn.q_proj.weight": query,
        f"{layer}.self_attn.k_proj.weight": key,
        f"{layer}.self_attn.v_proj.weight": value,
        f"{layer}.self_attn.o_proj.weight": output,
        f"{layer}.post_attention_layernorm.weight": torch.ones(_HIDDEN),
        f"{layer}.mlp.gate_proj.weight": torch.zeros(_HEAD, _HIDDEN),
        f"{layer}.mlp.up_proj.weight": torch.zeros(_HEAD, _HIDDEN),
        f"{layer}.mlp.down_proj.weight": torch.zeros(_HIDDEN, _HEAD),
        "model.norm.weight": torch.ones(_HIDDEN),
        "lm_head.weight": head,
    }


def _tokenizer() -> dict[str, object]:
    """Byte-level, with no merges: text becomes bytes, and the ids of several bytes are only ever said."""
    characters = _characters()
    pieces = {"".join(characters[byte] for byte in piece(i)): i for i in range(SIZE - len(SPECIAL))}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [
            {
                "id": i,
                "content": text,
                "special": True,
                "normalized": False,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
            }
            for text, i in SPECIAL.items()
        ],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": pieces, "merges": []},
    }


def _tokenizer_config() -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "pad_token": "<eos>",
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }


def _characters() -> list[str]:
    """The printable stand-ins of GPT-2's vocabulary for the 256 bytes (openai/gpt-2, ``src/encoder.py``)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256))
    return [chr(byte) if byte in printable else chr(256 + next(others)) for byte in range(256)]
