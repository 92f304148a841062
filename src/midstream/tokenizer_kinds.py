"""The kinds of tokenizers that midstream reads, and where each keeps the bytes of a token.

Byte-level BPE maps bytes to printable characters (GPT-2's ``bytes_to_unicode``); SentencePiece writes a space as
U+2581 and other bytes as ``<0xAB>``; tiktoken and tekken have bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from midstream.errors import TokenizerError
from midstream.types import Message
from midstream.vocabulary import TokenizerSource


def source_of(tokenizer: Any) -> TokenizerSource:
    """How to read a tokenizer. Raises :class:`~midstream.errors.TokenizerError` where midstream cannot."""
    # By what it offers rather than by its class: importing the libraries to ask would load them.
    if hasattr(tokenizer, "backend_tokenizer"):
        return _from_transformers(tokenizer)
    if hasattr(tokenizer, "sp_model") and hasattr(tokenizer, "added_tokens_decoder"):
        return _from_transformers_sentencepiece(tokenizer)
    if hasattr(tokenizer, "to_str") and hasattr(tokenizer, "get_added_tokens_decoder"):
        return _from_tokenizers(tokenizer)
    if hasattr(tokenizer, "decode_single_token_bytes"):
        return _from_tiktoken(tokenizer)
    if hasattr(tokenizer, "serialized_model_proto"):
        return _from_sentencepiece(tokenizer)
    if hasattr(tokenizer, "id_to_byte_piece") and hasattr(tokenizer, "num_special_tokens"):
        return _from_tekken(tokenizer)
    inner = getattr(tokenizer, "instruct_tokenizer", None)
    if inner is not None:  # mistral_common.MistralTokenizer
        return source_of(inner.tokenizer)
    for attribute in ("_model", "tokenizer"):  # mistral-common's SentencePieceTokenizer; transformers' wrapper
        inner = getattr(tokenizer, attribute, None)
        if inner is not None:
            return source_of(inner)
    raise TokenizerError(
        f"tokenizer={type(tokenizer).__module__}.{type(tokenizer).__qualname__}: not a kind that midstream knows; "
        "give a fast tokenizer of transformers, a tokenizers.Tokenizer, a tiktoken.Encoding, a SentencePieceProcessor, "
        "or a midstream.vocabulary.TokenizerSource"
    )


def _is_plain(text: str) -> bool:
    """Whether an added token stands for plain text: a character, or a run of spaces or newlines.

    Vocabularies such as Gemma's list those as added tokens. There is nothing in them to be parsed, and a model
    that never sees a newline as its own token would be shown results that look like nothing it knows.
    """
    return len(text) == 1 or text.replace("\u2581", " ").isspace()


# --- tokenizers and transformers -------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes, inverted (openai/gpt-2, ``src/encoder.py``)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _byte_level_piece(token: str) -> bytes:
    table = _byte_of_character()
    try:
        return bytes(table[character] for character in token)
    except KeyError:  # a token that was added as text
        return token.encode()


_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _piece_functions(decoder: Any) -> tuple[Callable[[str], bytes], Callable[[str], bytes]]:
    """How the tokenizer's decoder turns a token, and an added token, into bytes in the middle of a text."""
    description = json.loads(decoder.__getstate__()) if decoder is not None else None
    steps = _decoder_steps(description)
    kinds = [step["type"] for step in steps]
    if "ByteLevel" in kinds:
        return _byte_level_piece, str.encode
    replacements: list[tuple[str, str]] = []
    for step in steps:
        if step["type"] == "Metaspace":
            replacements.append((step["replacement"], " "))
        elif step["type"] == "Replace":
            pattern = step["pattern"]
            if "String" not in pattern:
                raise TokenizerError(f"tokenizer: its decoder replaces by a pattern ({pattern}), not by a string")
            replacements.append((pattern["String"], step["content"]))
        elif step["type"] not in ("ByteFallback", "Fuse", "Strip"):
            raise TokenizerError(
                f"tokenizer: its decoder {step['type']!r} makes a token's text depend on its neighbours; "
                "midstream needs byte-level or SentencePiece-style tokens"
            )
    if not replacements:
        raise TokenizerError(
            f"tokenizer: its decoder ({kinds or 'none'}) does not say how tokens join; "
            "midstream needs byte-level or SentencePiece-style tokens"
        )
    byte_fallback = "ByteFallback" in kinds

    def piece(token: str) -> bytes:
        if byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        for old, new in replacements:
            token = token.replace(old, new)
        return token.encode()

    return piece, piece


def _decoder_steps(description: Any) -> list[dict[str, Any]]:
    if description is None:
        return []
    if description["type"] == "Sequence":
        return [step for part in description["decoders"] for step in _decoder_steps(part)]
    return [description]


def _plain_encoder(backend: Any) -> Callable[[str], list[int]]:
    """A copy of a ``tokenizers.Tokenizer`` that takes all text as plain text."""
    description = json.loads(backend.to_str())
    added = {token["content"]: token["id"] for token in description["added_tokens"]}
    description.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
    description["normalizer"] = _without_prefix(description["normalizer"], "normalizers")
    description["pre_tokenizer"] = _without_prefix(description["pre_tokenizer"], "pretokenizers")
    _hide_added_tokens(description["model"], added)
    plain = type(backend).from_str(json.dumps(description))

    def encode(text: str) -> list[int]:
        ids: list[int] = plain.encode(text, add_special_tokens=False).ids
        return ids

    return encode


def _without_prefix(step: Any, parts_key: str) -> Any:
    """A normaliser or pre-tokeniser that puts nothing before a text and strips nothing from its ends."""
    if step is None:
        return None
    kind = step["type"]
    if kind == "Sequence":
        kept = [new for part in step[parts_key] if (new := _without_prefix(part, parts_key)) is not None]
        return {**step, parts_key: kept} if kept else None
    if kind in ("Prepend", "Strip"):
        return None
    if kind == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    if kind == "ByteLevel" and "add_prefix_space" in step:
        return {**step, "add_prefix_space": False}
    return step


def _hide_added_tokens(model: dict[str, Any], added: Mapping[str, int]) -> None:
    """Take added tokens out of the model's own reach: some vocabularies hold them as ordinary pieces too."""
    hidden = {text for text in added if not _is_plain(text)}

    def unreachable(token_id: int) -> str:
        return f"\x00\U0010ffff{token_id}\U0010ffff\x00"

    if model["type"] == "Unigram":
        for index, (piece, score) in enumerate(model["vocab"]):
            if piece in hidden:
                model["vocab"][index] = [unreachable(index), score]
    elif model["type"] == "BPE":
        vocabulary = model["vocab"]
        hidden &= vocabulary.keys()
        if hidden:
            pairs = ((merge, merge if isinstance(merge, list) else merge.split(" ")) for merge in model["merges"])
            model["merges"] = [m for m, pair in pairs if hidden.isdisjoint((*pair, "".join(pair)))]
            for text in hidden:
                token_id = vocabulary.pop(text)
                vocabulary[unreachable(token_id)] = token_id
                if text == model.get("unk_token"):
                    model["unk_token"] = unreachable(token_id)


def _from_tokenizers(backend: Any, encode_prompt: Callable[[str], list[int]] | None = None) -> TokenizerSource:
    added_texts = {int(i): str(token.content) for i, token in backend.get_added_tokens_decoder().items()}
    token_piece, added_piece = _piece_functions(backend.decoder)
    lazy_encoder: list[Callable[[str], list[int]]] = []

    def piece(token_id: int) -> bytes:
        if token_id in added_texts:
            return added_piece(added_texts[token_id])
        token = backend.id_to_token(token_id)
        return b"" if token is None else token_piece(token)

    def encode_text(text: str) -> list[int]:
        if not lazy_encoder:  # copying a large tokenizer takes a moment: only once a result needs it
            lazy_encoder.append(_plain_encoder(backend))
        return lazy_encoder[0](text)

    unknown = _unknown_id(backend)
    return TokenizerSource(
        size=max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1,  # there may be holes
        piece=piece,
        encode_text=encode_text,
        encode_prompt=encode_prompt or (lambda text: list(backend.encode(text).ids)),
        added={text: i for i, text in added_texts.items()},
        plain=frozenset(i for i, text in added_texts.items() if i == unknown or _is_plain(text)),
    )


def _unknown_id(backend: Any) -> int | None:
    """The id that stands for what the model has no token for."""
    if not hasattr(backend.model, "unk_token"):  # a Unigram model, which tells it only where it is written out
        unknown_id = json.loads(backend.model.__getstate__()).get("unk_id")
        return None if unknown_id is None else int(unknown_id)
    unknown = backend.model.unk_token
    found = None if unknown is None else backend.token_to_id(unknown)
    return None if found is None else int(found)


def _from_transformers(tokenizer: Any) -> TokenizerSource:
    source = _from_tokenizers(tokenizer.backend_tokenizer, lambda text: list(tokenizer.encode(text)))
    return _with_transformers_extras(tokenizer, source)


def _with_transformers_extras(tokenizer: Any, source: TokenizerSource) -> TokenizerSource:
    def encode_messages(messages: Sequence[Message]) -> list[int]:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False))

    eos = tokenizer.eos_token_id
    return replace(
        source,
        size=max(source.size, len(tokenizer)),
        encode_messages=encode_messages if getattr(tokenizer, "chat_template", None) else None,
        eos_ids=frozenset() if eos is None else frozenset([int(eos)]),
    )


# --- tiktoken, tekken, SentencePiece ---------------------------------------------------------------------


def _from_tiktoken(encoding: Any) -> TokenizerSource:
    special = {text: encoding.encode_single_token(text) for text in encoding.special_tokens_set}
    eos = special.get("<|endoftext|>", special.get("<|end_of_text|>"))

    def piece(token_id: int) -> bytes:
        try:
            return bytes(encoding.decode_single_token_bytes(token_id))
        except KeyError:  # a hole in the table of ids
            return b""

    return TokenizerSource(
        size=encoding.n_vocab,
        piece=piece,
        encode_text=encoding.encode_ordinary,
        encode_prompt=lambda text: list(encoding.encode(text, allowed_special="all")),
        added=special,
        eos_ids=frozenset() if eos is None else frozenset([eos]),
    )


def _from_tekken(tekken: Any) -> TokenizerSource:
    special_ids = sorted(tekken.special_ids)
    special = {str(tekken.id_to_piece(token_id)): token_id for token_id in special_ids}
    text_of = {token_id: text for text, token_id in special.items()}

    def piece(token_id: int) -> bytes:
        if token_id in text_of:
            return text_of[token_id].encode()
        if token_id >= tekken.n_words:
            return b""
        return bytes(tekken.id_to_byte_piece(token_id))

    return TokenizerSource(
        size=tekken.n_words,
        piece=piece,
        encode_text=lambda text: list(tekken.encode(text, bos=False, eos=False)),
        encode_prompt=lambda text: list(tekken.encode(text, bos=True, eos=False)),
        added=special,
        eos_ids=frozenset([tekken.eos_id]),
    )


def _sentencepiece_piece(processor: Any, token_id: int) -> bytes:
    if token_id >= processor.get_piece_size():
        return b""
    token: str = processor.id_to_piece(token_id)
    if processor.is_byte(token_id):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()


def _sentencepiece_model(processor: Any) -> Any:
    try:
        from sentencepiece.sentencepiece_model_pb2 import ModelProto
    except ImportError as error:
        raise TokenizerError(f"a SentencePiece tokenizer needs protobuf installed ({error})") from error
    return ModelProto.FromString(processor.serialized_model_proto())


def _sentencepiece_plain_encoder(processor: Any) -> Callable[[str], list[int]]:
    """A copy of the model that puts no space in front and finds no user-defined piece in a text."""
    model = _sentencepiece_model(processor)
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    for entry in model.pieces:
        if entry.type == entry.USER_DEFINED and not _is_plain(entry.piece):
            entry.type = entry.UNUSED
    plain = type(processor)(model_proto=model.SerializeToString())
    return lambda text: list(plain.encode(text, out_type=int))


def _from_sentencepiece(processor: Any) -> TokenizerSource:
    pieces = _sentencepiece_model(processor).pieces
    added = {
        entry.piece: token_id
        for token_id, entry in enumerate(pieces)
        if entry.type in (entry.CONTROL, entry.USER_DEFINED)
    }
    eos, bos = processor.eos_id(), processor.bos_id()
    return TokenizerSource(
        size=len(pieces),
        piece=lambda token_id: _sentencepiece_piece(processor, token_id),
        encode_text=_sentencepiece_plain_encoder(processor),
        encode_prompt=lambda text: [*([bos] if bos >= 0 else []), *processor.encode(text, out_type=int)],
        added=added,
        eos_ids=frozenset([eos]) if eos >= 0 else frozenset(),
        plain=frozenset(token_id for piece, token_id in added.items() if _is_plain(piece)),
    )


def _from_transformers_sentencepiece(tokenizer: Any) -> TokenizerSource:
    # transformers may number the pieces otherwise than the model does, so ids go through the pieces' names
    model = tokenizer.sp_model
    base = _from_sentencepiece(model)
    added_texts: dict[int, str] = {int(i): str(token) for i, token in tokenizer.added_tokens_decoder.items()}

    def piece(token_id: int) -> bytes:
        if token_id in added_texts:
            return added_texts[token_id].encode()
        return base.piece(model.piece_to_id(tokenizer.convert_ids_to_tokens(token_id)))

    def encode_text(text: str) -> list[int]:
        return [tokenizer.convert_tokens_to_ids(model.id_to_piece(i)) for i in base.encode_text(text)]

    source = TokenizerSource(
        size=max(base.size, max(added_texts, default=-1) + 1),
        piece=piece,
        encode_text=encode_text,
        encode_prompt=lambda text: list(tokenizer.encode(text)),
        added={text: i for i, text in added_texts.items()},
        plain=frozenset(i for i, text in added_texts.items() if _is_plain(text) or i == tokenizer.unk_token_id),
    )
    return _with_transformers_extras(tokenizer, source)
