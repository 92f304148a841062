"""Names for the states of sessions, by what led to them."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable

from midstream.sandbox.replay import PastBlock
from midstream.types import ToolCall


class StateKey:
    """A chain of hashes over what a session began with and all that it has run.

    Equal only where all of that was equal, and never where what ran need not have led to the same state:
    from then on it is one that no other session has, but for copies that are made of this one.
    """

    def __init__(self, beginning: object, past: Iterable[PastBlock] = ()) -> None:
        self._digest = _hash("beginning", beginning)
        for block in past:
            self.add(block)

    @property
    def text(self) -> str:
        return self._digest.hex()

    def apart(self, mark: str) -> str:
        """The key of a state that is not known to be this one. ``mark``: of whose it is."""
        return _hash("apart", self.text, mark).hex()

    def add(self, block: PastBlock) -> None:
        """A block has run, or a file was put."""
        if not block.repeatable:
            self.lose()
        elif block.file is not None:
            path, data = block.file
            self._digest = _hash("file", self.text, path, hashlib.sha256(data).hexdigest())
        else:
            self._digest = _hash("block", self.text, block.code, block.text, [_told(call) for call in block.tool_calls])

    def lose(self) -> None:
        """What the state is cannot be known any more."""
        self._digest = secrets.token_bytes(32)

    def copy(self) -> StateKey:
        other = StateKey(None)
        other._digest = self._digest
        return other


def _told(call: ToolCall) -> list[object]:
    """What code got to know of a call."""
    error = call.error
    arguments = [list(call.arguments), list(call.keyword_arguments.items())]
    return [call.name, arguments, call.value, None if error is None else [error.type, error.message]]


def _hash(*parts: object) -> bytes:
    # In JSON no two different lists of parts look the same. Texts of code may hold lone surrogates.
    text = json.dumps(parts, default=repr, ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).digest()
