"""A vocabulary whose tokens are cut wherever a test wants them, in the middle of characters too."""

from __future__ import annotations

from midstream.vocabulary import TokenizerSource, Vocabulary

EOS, EOM, OPEN, CLOSE, CALL, PAD = range(256, 262)
ADDED = {"<eos>": EOS, "<|eom|>": EOM, "<|result|>": OPEN, "<|/result|>": CLOSE, "<|call|>": CALL, "<pad>": PAD}


class Cutter:
    """Ids 0-255 are the single bytes, :data:`ADDED` follow, and any other piece gets an id when it is first used.

    Its own encoding of a text is one id per byte, so what is injected is easily told from what is generated; or,
    if ``whole``, one id for all of the text, so that it shows what was encoded in one call.
    """

    def __init__(self, *, whole: bool = False) -> None:
        self._pieces: list[bytes] = [bytes([byte]) for byte in range(256)] + [text.encode() for text in ADDED]
        self._ids: dict[bytes, int] = {}
        self.vocabulary = Vocabulary(
            TokenizerSource(
                size=1_000_000,
                piece=lambda token_id: self._pieces[token_id],
                encode_text=lambda text: self.cut(text) if whole else list(text.encode()),
                encode_prompt=lambda text: list(text.encode()),
                added=ADDED,
                eos_ids=frozenset([EOS]),
            )
        )

    def token(self, piece: str | bytes) -> int:
        """The id of a piece of text."""
        raw = piece.encode() if isinstance(piece, str) else piece
        if raw not in self._ids:
            self._ids[raw] = len(self._pieces)
            self._pieces.append(raw)
        return self._ids[raw]

    def cut(self, *pieces: str | bytes | int) -> list[int]:
        """One id for each piece; ids stand for themselves."""
        return [piece if isinstance(piece, int) else self.token(piece) for piece in pieces]

    def bytewise(self, text: str) -> list[int]:
        """One id for each byte."""
        return list(text.encode())
