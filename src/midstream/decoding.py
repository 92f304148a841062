"""Token ids to text: incremental, lossless, with the map between ids and characters.

Ids are turned into bytes by their :class:`~midstream.vocabulary.Vocabulary` and the bytes into characters
by an incremental UTF-8 decoder, so a character may span tokens and nothing is cleaned up, stripped or
skipped. Bytes that are no UTF-8 become U+FFFD, as Unicode recommends (one for each maximal part of a
sequence); the ids stay the truth.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from midstream.vocabulary import Vocabulary

_new_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class TextDecoder:
    """Decodes one stretch of ids. ``feed`` costs time in the length of the new piece alone.

    ``ends[i]`` is the count of characters that are complete after id ``i``: character ``c`` was completed
    by the first id whose end is over ``c``.
    """

    __slots__ = ("_bytes_decoder", "_pending", "_pieces", "_vocabulary", "ends", "length")

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._bytes_decoder = _new_utf8_decoder(errors="replace")
        self._pending = False
        self._pieces: list[str] = []
        self.ends: list[int] = []
        self.length = 0

    def feed(self, token_id: int) -> str:
        """Add an id and return the characters that it completes (there may be none)."""
        text = None if self._pending else self._vocabulary.piece_text(token_id)
        if text is None:
            text = self._bytes_decoder.decode(self._vocabulary.piece(token_id))
            self._pending = bool(self._bytes_decoder.getstate()[0])
        self._append(text)
        self.ends.append(self.length)
        return text

    def flush(self) -> str:
        """Give up on an unfinished character: returns U+FFFD for it, or nothing.

        The last id is then taken to have completed it.
        """
        if not self._pending:
            return ""
        text = self._bytes_decoder.decode(b"", final=True)
        self._bytes_decoder.reset()
        self._pending = False
        self._append(text)
        self.ends[-1] = self.length
        return text

    @property
    def text(self) -> str:
        """The characters that are complete so far."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    def copy(self) -> TextDecoder:
        """A decoder in the same state, separate from here on."""
        other = TextDecoder(self._vocabulary)
        other._bytes_decoder.setstate(self._bytes_decoder.getstate())
        other._pending = self._pending
        other._pieces = list(self._pieces)
        other.ends = list(self.ends)
        other.length = self.length
        return other

    def _append(self, text: str) -> None:
        if text:
            self._pieces.append(text)
            self.length += len(text)


def decode(vocabulary: Vocabulary, ids: Iterable[int]) -> str:
    """The text of a whole stretch of ids, unfinished characters at its end included."""
    decoder = TextDecoder(vocabulary)
    for token_id in ids:
        decoder.feed(token_id)
    decoder.flush()
    return decoder.text
