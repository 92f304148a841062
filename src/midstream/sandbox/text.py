"""Text that is too long, and text that cannot be encoded."""

from __future__ import annotations


def cut_middle(text: str, characters: int) -> str:
    """``text``, or its head and tail of ``characters`` in all, with a notice of how much is gone between."""
    if len(text) <= characters:
        return text
    head = characters // 2
    tail = characters - head
    return text[:head] + omission(len(text) - characters) + text[len(text) - tail :]


def omission(characters: int) -> str:
    """The notice that stands where ``characters`` characters were."""
    return f"\n[... {characters} characters left out ...]\n"


def printable(text: str) -> str:
    """``text`` with lone surrogates, which no tokenizer can encode, written as ``\\udc00``."""
    if text.isascii():
        return text
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def too_long(tool: str, characters: int) -> str:
    """What code is told whose arguments of a tool are longer than they may be."""
    return f"the arguments of {tool}() are longer than {characters} characters"
