"""From closed blocks to the calls that are to be run: where each closes, or all together where their turn ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from midstream.call_text import split_block
from midstream.markup import Markup
from midstream.scanning import Closed, Found, Scanner
from midstream.types import CallKind
from midstream.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class Asked:
    """What a block asks for: a call of ``form``'s. ``lookahead``: what its closing id holds behind the end tag."""

    form: int
    kind: CallKind
    code: str
    lookahead: str = ""


class Turns:
    """The calls of a row's turn that wait for its end, and the closing ids that bring it.

    ``ended``: the last id that was taken ended a turn, and what comes next begins one.
    """

    __slots__ = ("_closing", "_forms", "_waiting", "ended")

    def __init__(self, forms: Sequence[Markup], vocabulary: Vocabulary) -> None:
        self._forms = forms
        self._closing: dict[int, frozenset[int]] = {}  # for each closing id the forms whose blocks it closes
        for index, form in enumerate(forms):
            for text in form.closing_tokens:
                token_id = vocabulary.added_id(text)
                self._closing[token_id] = self._closing.get(token_id, frozenset()) | {index}
        self._waiting: list[Asked] = []
        self.ended = False

    def closes(self, token_id: int, open_form: int | None) -> bool:
        """Whether this id, as the next one, would close a block or end a turn with calls."""
        forms = self._closing.get(token_id, frozenset())
        return open_form in forms or (bool(self._waiting) and any(self._forms[i].turn for i in forms))

    def close(self, token_id: int, scanner: Scanner) -> list[Found] | None:
        """What a closing id closes, or None where it is none here."""
        if not self.closes(token_id, scanner.form):
            return None
        forms = self._closing[token_id]
        self.ended = any(self._forms[index].turn is not None for index in forms)
        if scanner.form in forms:
            return scanner.close()
        scanner.abandon()  # a block of another kind that was left open when the turn ended
        return []

    def take(self, closed: Closed, text: str) -> list[Asked]:
        """The calls of a closed block that are to be run now. ``text``: the piece that closed it."""
        form = self._forms[closed.form]
        # A closing token is no text: nothing is behind it.
        lookahead = text[closed.after :] if closed.after and form.turn is None else ""
        asked = [Asked(closed.form, kind, code, lookahead) for kind, code in split_block(form.holds, closed.code)]
        if form.turn is None:
            return asked
        self._waiting += asked
        return []

    def finish(self) -> list[Asked]:
        """The calls of the turn that has ended. Without one it has not ended after all."""
        asked, self._waiting = self._waiting, []
        self.ended = bool(asked)
        return asked

    def copy(self) -> Turns:
        other = object.__new__(Turns)
        other._forms, other._closing, other.ended = self._forms, self._closing, self.ended
        other._waiting = list(self._waiting)
        return other
