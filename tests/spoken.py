"""The ids that a model of some vocabulary would sample to write a text."""

from __future__ import annotations

import re

from midstream.errors import TokenizerError
from tests.vocabularies import vocabulary

_TAGS = ("<code>", "</code>", "<result>", "</result>", "<tool_call>", "</tool_call>")


def spoken(name: str, text: str) -> list[int]:
    """``text`` cut as the vocabulary of that name really cuts it; tags that it has as tokens are those tokens."""
    known = vocabulary(name)
    single: dict[str, int] = {}
    for tag in _TAGS:
        try:
            single[tag] = known.added_id(tag)
        except TokenizerError:
            continue
    if not single:
        return known.encode_text(text)
    ids: list[int] = []
    for part in re.split(f"({'|'.join(map(re.escape, single))})", text):
        ids += [single[part]] if part in single else known.encode_text(part)
    return ids
