"""Tokenizers for tests: real vocabularies out of ordinary packages, and small ones trained on the spot.

Nothing is downloaded: ``litellm``, ``dashscope``, ``llama-models`` and ``mistral-common`` ship vocabularies as
files. They are found without importing those packages (which would load half of the internet); only
mistral-common's own tokenizer class is imported, because it is one that midstream takes. Every tokenizer
is made when a test first asks for it, and then kept for the whole session.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from midstream.vocabulary import Vocabulary

_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
_QWEN_PATTERN = _LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
_O200K_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TRAINING_TEXT = """\
The sum of 3 and 4 is <code>3 + 4</code><result>7</result>, so the answer is 7.
Let us see: <code>x = 3; y = 4</code>\nThis is some regular text.\n<code>x + y</code><result>7</result>.
<code>\ndef f(x):\n    return x * x\n\nf(2)\n</code>\n\n<result>\n4\n</result>\nThat is it.
We try <code>print(5)</code>; then <code>1/0</code> fails, as one sees.\n\n```python\nx = 1\n```\n```output\n1\n```\n
Naïve café: 12 €, 数学 is mathematics, 🙂 is a face. The lines go on and on, with numbers 0 1 2 3 4 5 6 7 8 9.
"""
"""What the small tokenizers are trained on, repeated with some variety."""


# --- where the files are ---------------------------------------------------------------------------------


def _file(package: str, path: str) -> Path:
    """A file of an installed package; the test is skipped, and says so, where it is not installed."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"the vocabulary in {package}/{path} needs the package {package!r} installed")
    return Path(found.submodule_search_locations[0]) / path


@cache
def _ranks(path: Path) -> dict[bytes, int]:
    lines = (line.split() for line in path.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def _litellm_file(name: str) -> Path:
    return _file("litellm", f"litellm_core_utils/tokenizers/{name}")


def _qwen_file() -> Path:
    return _file("dashscope", "resources/qwen.tiktoken")


def mistral_file(version: int) -> Path:
    name = {1: "tokenizer.model.v1", 3: "mistral_instruct_tokenizer_240323.model.v3"}[version]
    return _file("mistral_common", f"data/{name}")


# --- real vocabularies -----------------------------------------------------------------------------------


def _tiktoken(path: Path, pattern: str, special: list[str]) -> Any:
    from tiktoken import Encoding

    ranks = _ranks(path)
    first = max(ranks.values()) + 1
    ids = {text: first + index for index, text in enumerate(special)}
    return Encoding(path.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=ids)


def _o200k() -> Any:
    path = _litellm_file("fb374d419588a4632f3f557e76b4b70aebbca790")
    return _tiktoken(path, _O200K_PATTERN, ["<|endoftext|>", "<|endofprompt|>"])


def _cl100k() -> Any:
    path = _litellm_file("9b5ad71b2ce5302211f9c61530b329a4922fc6a4")
    special = ["<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|endofprompt|>"]
    return _tiktoken(path, _CL100K_PATTERN, special)


def _llama3() -> Any:
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
    special += ["<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
    return _tiktoken(_file("llama_models", "llama3/tokenizer.model"), _LLAMA3_PATTERN, special)


def _llama4() -> Any:
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>"]
    return _tiktoken(_file("llama_models", "llama4/tokenizer.model"), _O200K_PATTERN, special)


def _qwen() -> Any:
    """Qwen's vocabulary as transformers has it, with its added tokens: special ones, and others that are not."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class Converter(TikTokenConverter):
        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:  # tiktoken's own leaves a cache behind
            return _ranks(Path(tiktoken_url))

    backend = Converter(str(_qwen_file()), _QWEN_PATTERN).converted()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend.add_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    backend.add_tokens([AddedToken(text, normalized=False) for text in ("<tool_call>", "</tool_call>")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def _deepseek() -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(_litellm_file("deepseek_tokenizer.json")))


def _anthropic() -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(_litellm_file("anthropic_tokenizer.json")))


def _tekken() -> Any:
    path = _file("mistral_common", "data/tekken_240911.json")
    tekken = pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
    return tekken.Tekkenizer.from_file(path)


def _mistral(version: int) -> Any:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(mistral_file(version)))


def _llama_fast() -> Any:
    """The first Mistral's vocabulary, which is of Llama 2's kind, as transformers has it: ``<s>`` is a piece."""
    from transformers import LlamaTokenizer
    from transformers.tokenization_utils_base import generate_merges

    model = _mistral(1)
    pieces = [model.id_to_piece(token_id) for token_id in range(model.get_piece_size())]
    vocabulary = {piece: token_id for token_id, piece in enumerate(pieces)}
    scores = {piece: model.get_score(token_id) for token_id, piece in enumerate(pieces)}
    merges = generate_merges(vocabulary, scores, skip_tokens=pieces[:3])
    return LlamaTokenizer(vocab=vocabulary, merges=merges)


def _llama_legacy() -> Any:
    """The same as ``tokenizer.json`` files of Llama 2 have it: the space in front is put there by a normaliser."""
    from tokenizers import Tokenizer, normalizers

    backend = Tokenizer.from_str(tokenizer("llama_fast").backend_tokenizer.to_str())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    return backend


# --- small ones, trained here ----------------------------------------------------------------------------


def _training_lines() -> list[str]:
    return [TRAINING_TEXT.replace("7", str(number)).replace("x", name) for number in range(20) for name in "xyab"]


def _tagged() -> Any:
    """Byte-level BPE in which each tag is one special token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[
            AddedToken(text, special=True)
            for text in ("<eos>", "<code>", "</code>", "<result>", "</result>", "<|call|>", "<|eom|>")
        ],
    )
    backend.train_from_iterator(_training_lines(), trainer)
    return backend


def _metaspace() -> Any:
    """BPE with spaces as U+2581, bytes for other characters, and runs of spaces and newlines as added tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_as_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        show_progress=False,
        limit_alphabet=70,
        special_tokens=["<unk>", "<s>", "</s>", *bytes_as_pieces],
    )
    backend.train_from_iterator(_training_lines(), trainer)
    # A trainer's special tokens become added ones; real vocabularies of this kind have the bytes as plain pieces.
    description = json.loads(backend.to_str())
    description["added_tokens"] = description["added_tokens"][:3]
    backend = Tokenizer.from_str(json.dumps(description))
    backend.add_tokens([AddedToken(text, normalized=False) for text in ("\n", "\n\n", "▁▁", "<tool_call>")])
    return backend


@cache
def unigram_model() -> bytes:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(_training_lines()).splitlines()),
        model_writer=model,
        model_type="unigram",
        vocab_size=500,
        byte_fallback=True,
        user_defined_symbols=["<code>", "</code>", "<result>", "</result>", "\n"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


def _unigram() -> Any:
    """SentencePiece's unigram model with the tags as user-defined symbols and bytes for other characters."""
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_proto=unigram_model())


def _unigram_fast() -> Any:
    """The same pieces as :func:`_unigram` in ``tokenizers``, where ``<unk>`` and ``</s>`` are pieces like any."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    model = _unigram()
    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.get_piece_size())]
    backend = Tokenizer(models.Unigram(pieces, unk_id=model.unk_id(), byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(text, special=True) for text in ("<unk>", "<s>", "</s>")])
    backend.add_tokens([AddedToken(text, normalized=False) for text in ("<code>", "</code>", "<result>", "</result>")])
    return backend


# --- by name ---------------------------------------------------------------------------------------------

_MAKERS: dict[str, Callable[[], Any]] = {
    "o200k": _o200k,
    "cl100k": _cl100k,
    "llama3": _llama3,
    "llama4": _llama4,
    "qwen": _qwen,
    "tekken": _tekken,
    "deepseek": _deepseek,
    "anthropic": _anthropic,
    "mistral1": lambda: _mistral(1),
    "mistral3": lambda: _mistral(3),
    "llama_fast": _llama_fast,
    "llama_legacy": _llama_legacy,
    "tagged": _tagged,
    "metaspace": _metaspace,
    "unigram": _unigram,
    "unigram_fast": _unigram_fast,
}

ALL = tuple(_MAKERS)
BYTE_LEVEL = ("o200k", "cl100k", "llama3", "llama4", "qwen", "tekken", "deepseek", "tagged")
"""Those that hold every text to the byte (anthropic's normalises, SentencePiece's know no U+2581)."""
TRAINED = ("tagged", "metaspace", "unigram", "unigram_fast")
REAL = tuple(name for name in ALL if name not in TRAINED)


@cache
def tokenizer(name: str) -> Any:
    """The tokenizer of that name, made once."""
    return _MAKERS[name]()


@cache
def vocabulary(name: str) -> Vocabulary:
    """What midstream makes of the tokenizer of that name."""
    return Vocabulary.of(tokenizer(name))


def own_decoding(name: str, ids: list[int]) -> str:
    """What the tokenizer itself makes of ids."""
    own: Any = tokenizer(name)
    if name in ("qwen", "llama_fast"):
        return str(own.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    if hasattr(own, "get_added_tokens_decoder"):
        return str(own.decode(ids, skip_special_tokens=False))
    return str(own.decode(ids))
