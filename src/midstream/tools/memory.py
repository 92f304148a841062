"""Answers of pure tools, kept for the next equal call."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any


class Memory:
    """The latest answers, as JSON texts, within a number of entries and of characters in all."""

    def __init__(self, entries: int, characters: int) -> None:
        self._entries = entries
        self._characters = characters
        self._held: OrderedDict[Any, str] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def get(self, key: Any) -> str | None:
        with self._lock:
            text = self._held.get(key)
            if text is not None:
                self._held.move_to_end(key)
            return text

    def put(self, key: Any, text: str) -> None:
        """Keep an answer; the ones that were asked for the longest ago make room. One too long is not kept."""
        with self._lock:
            self._drop(key)
            self._held[key] = text
            self._size += len(text)
            while self._size > self._characters or len(self._held) > self._entries:
                self._drop(next(iter(self._held)))

    def __len__(self) -> int:
        return len(self._held)

    def _drop(self, key: Any) -> None:
        text = self._held.pop(key, None)
        if text is not None:
            self._size -= len(text)
