"""One tokenizer, as midstream needs it: the bytes of every id, and text to ids with nothing parsed.

Tokenizers differ in what they add, strip and recognise. A :class:`Vocabulary` hides that behind three
operations: ``piece`` (id to bytes), ``encode_text`` (plain text to ids: no special tokens added, no space
put in front, no special or other added token recognised in the text) and ``encode_prompt`` (a prompt, as
the tokenizer itself would).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from midstream.errors import PromptError, TokenizerError
from midstream.types import Message, Prompt

_KEPT = 8
_known: dict[int, tuple[Any, Vocabulary]] = {}
"""The last tokenizers that were asked for, by identity: some can neither be hashed nor referred to weakly."""


@dataclass(frozen=True, eq=False, slots=True)
class TokenizerSource:
    """What a :class:`Vocabulary` is made from. Build one to bring a tokenizer that midstream does not know.

    - ``size``: ids are under it. ``piece``: the bytes of an id; an added token's are its text in UTF-8.
    - ``encode_text``: plain text to ids, as :meth:`Vocabulary.encode_text` describes.
    - ``encode_prompt``: a prompt's text to ids. ``encode_messages``: a chat to ids, or None.
    - ``added``: the special and other added tokens by their text: ids that no plain text may become,
      save those in ``plain`` (the unknown token; runs of spaces that some vocabularies list as added).
    - ``eos_ids``: the tokenizer's own end-of-sequence ids.
    """

    size: int
    piece: Callable[[int], bytes]
    encode_text: Callable[[str], list[int]]
    encode_prompt: Callable[[str], list[int]]
    encode_messages: Callable[[Sequence[Message]], list[int]] | None = None
    added: Mapping[str, int] = field(default_factory=dict)
    eos_ids: frozenset[int] = frozenset()
    plain: frozenset[int] = frozenset()


class Vocabulary:
    """The ids of one tokenizer and what they stand for."""

    def __init__(self, source: TokenizerSource) -> None:
        self._source = source
        self._pieces: dict[int, bytes] = {}
        self._texts: dict[int, str | None] = {}
        self._forbidden = frozenset(source.added.values()) - source.plain

    @classmethod
    def of(cls, tokenizer: Any) -> Vocabulary:
        """The vocabulary of a tokenizer; made once for each tokenizer object.

        Takes a ``Vocabulary``, a :class:`TokenizerSource`, and the tokenizers of transformers (fast, and those on
        SentencePiece), ``tokenizers.Tokenizer``, ``tiktoken.Encoding``,
        ``sentencepiece.SentencePieceProcessor`` and mistral-common.

        Raises :class:`TokenizerError` for any other, and for one whose tokens do not map to text alone.
        """
        if isinstance(tokenizer, Vocabulary):
            return tokenizer
        if isinstance(tokenizer, TokenizerSource):
            return cls(tokenizer)
        known = _known.get(id(tokenizer))
        if known is None:
            from midstream.tokenizer_kinds import source_of

            known = tokenizer, cls(source_of(tokenizer))
            for oldest in list(_known)[: max(0, len(_known) - _KEPT + 1)]:
                _known.pop(oldest, None)
            _known[id(tokenizer)] = known
        return known[1]

    @property
    def size(self) -> int:
        return self._source.size

    @property
    def eos_ids(self) -> frozenset[int]:
        return self._source.eos_ids

    def piece(self, token_id: int) -> bytes:
        """The bytes of an id; may be a part of a character. Ids that stand for nothing give b""."""
        try:
            return self._pieces[token_id]
        except KeyError:
            if token_id < 0:
                raise TokenizerError(f"token id {token_id}: ids start at 0") from None
            piece = self._source.piece(token_id)
            self._pieces[token_id] = piece
            return piece

    def piece_text(self, token_id: int) -> str | None:
        """The text of an id, or None where its bytes are no whole characters."""
        try:
            return self._texts[token_id]
        except KeyError:
            try:
                text: str | None = self.piece(token_id).decode()
            except UnicodeDecodeError:
                text = None
            self._texts[token_id] = text
            return text

    def encode_text(self, text: str) -> list[int]:
        """Plain text to ids: nothing added in front or behind, no added token recognised.

        Characters that no UTF-8 text can hold (lone surrogates) become U+FFFD first.
        """
        text = replace_surrogates(text)
        if not text:
            return []
        ids = self._source.encode_text(text)
        if not self._forbidden.isdisjoint(ids):
            # The tokenizer's model itself spells an added token. One character never does.
            ids = [i for character in text for i in self._source.encode_text(character)]
        return ids

    def encode_prompt(self, prompt: Prompt) -> tuple[int, ...]:
        """The ids of a prompt, each form encoded once.

        Raises :class:`PromptError` where the prompt is empty, holds ids outside the vocabulary, or is a
        chat and the tokenizer has no chat template.
        """
        if prompt.ids is not None:
            ids = prompt.ids
        elif prompt.text is not None:
            ids = tuple(self._source.encode_prompt(prompt.text))
        else:
            if self._source.encode_messages is None:
                raise PromptError("Prompt.messages: this tokenizer has no chat template; give text or ids")
            ids = tuple(self._source.encode_messages(prompt.messages or ()))
        name = f"prompt {prompt.id!r}" if prompt.id is not None else "a prompt"
        if not ids:
            raise PromptError(f"{name} is empty: it must hold at least one token id")
        highest, lowest = max(ids), min(ids)
        if lowest < 0:
            raise PromptError(f"{name} holds id {lowest}: ids must not be negative")
        if highest >= self.size:
            raise PromptError(f"{name} holds id {highest}: this tokenizer's ids are under {self.size}")
        return ids

    @property
    def added_ids(self) -> frozenset[int]:
        """The ids of special and other added tokens: no plain text may become one of them."""
        return self._forbidden

    def has_added(self, text: str) -> bool:
        """Whether there is a special or other added token of this text."""
        return text in self._source.added

    def added_id(self, text: str) -> int:
        """The id of a special or other added token, by its text. Raises :class:`TokenizerError`."""
        try:
            return self._source.added[text]
        except KeyError:
            raise TokenizerError(f"this tokenizer has no added token {text!r}") from None


def replace_surrogates(text: str) -> str:
    """Lone surrogates, which no UTF-8 text can hold, become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
