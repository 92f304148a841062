"""Results to token ids, within a budget of tokens.

The payload of a result is cut in the middle, at characters, until the whole, tags and a notice of the cut
included, encodes within its budget. Adjacent text is encoded in one call: a frame and its payload encoded
apart would give other ids than a tokenizer gives for them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from midstream.call_text import shown_name_and_id
from midstream.markup import Markup, Part, Special, join_texts, text_of, trim_lookahead
from midstream.types import Call, Limits
from midstream.vocabulary import Vocabulary, replace_surrogates


@dataclass(frozen=True, slots=True)
class FittedResults:
    """Results as they are injected: all ids; then for each result its text and how many characters were cut."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    cuts: tuple[int, ...]


def cut_middle(text: str, keep: int) -> tuple[str, int]:
    """Keep ``keep`` characters of a longer text, half at each end, with a notice of how many are cut.

    Returns the text and the count of characters that were cut (0 where it fits as it is).
    """
    if len(text) <= keep:
        return text, 0
    cut = len(text) - keep
    head, tail = (keep + 1) // 2, keep // 2
    return f"{text[:head]}…[{cut} characters cut]…{text[len(text) - tail :]}", cut


def encode_parts(vocabulary: Vocabulary, parts: Sequence[Part]) -> list[int]:
    """Ids of rendered parts: special tokens as their ids, each run of adjacent texts in one call."""
    ids: list[int] = []
    text = ""
    for part in parts:
        if isinstance(part, Special) and (part.required or vocabulary.has_added(part.text)):
            ids += vocabulary.encode_text(text)
            ids.append(vocabulary.added_id(part.text))
            text = ""
        else:
            text += part if isinstance(part, str) else part.text
    return ids + vocabulary.encode_text(text)


def render_results(markup: Markup, calls: Sequence[Call], texts: Sequence[str]) -> list[tuple[Part, ...]]:
    """The results of calls that one token closed, as they stand one after the other.

    What surrounds the results of a turn is in the first and in the last of them.
    """
    forms = markup.forms
    rendered = []
    for call, text in zip(calls, texts, strict=True):
        name, call_id = shown_name_and_id(call.kind, call.code, call.index)
        rendered.append(forms[call.form].render(call.code, text, name=name, call_id=call_id))
    turn = forms[calls[0].form].turn
    if turn is not None:
        rendered[0] = join_texts((*turn.before, *rendered[0]))
        rendered[-1] = join_texts((*rendered[-1], *turn.after))
    # Only the first stands directly behind the closing token.
    rendered[0] = trim_lookahead(rendered[0], calls[0].lookahead)
    return rendered


def fit_results(
    markup: Markup,
    vocabulary: Vocabulary,
    results: Sequence[tuple[Call, str]],
    limits: Limits,
    room: int | None,
) -> FittedResults | None:
    """The results of calls that one token closed, to be injected one after the other.

    Each encodes within ``limits.max_result_tokens`` (a turn's as if it were the only one of the turn), all
    together within ``room`` (None: no bound). Returns None where not even empty results fit.
    """
    texts = [replace_surrogates(text) for _, text in results]
    calls = [call for call, _ in results]

    def attempt(keep: int, *, notice: bool = True) -> FittedResults | None:
        cut = [cut_middle(text, keep) if notice else ("", len(text)) for text in texts]
        shown = [text for text, _ in cut]
        rendered = render_results(markup, calls, shown)
        ids = encode_parts(vocabulary, [part for parts in rendered for part in parts])
        alone = [ids] if len(calls) == 1 else list(map(encoded_alone, range(len(calls)), shown))
        if any(len(one) > limits.max_result_tokens for one in alone) or (room is not None and len(ids) > room):
            return None
        return FittedResults(tuple(ids), tuple(text_of(parts) for parts in rendered), tuple(n for _, n in cut))

    def encoded_alone(index: int, text: str) -> list[int]:
        call = calls[index] if index == 0 else replace(calls[index], lookahead="")
        return encode_parts(vocabulary, render_results(markup, [call], [text])[0])

    most = min(max(len(text) for text in texts), limits.max_result_characters)
    fitted = attempt(most)
    if fitted is not None:
        return fitted
    low, high = -1, most  # the longest kept length that is known to fit, the shortest known not to
    best: FittedResults | None = None
    while high - low > 1:
        middle = (low + high) // 2
        fitted = attempt(middle)
        if fitted is None:
            high = middle
        else:
            low, best = middle, fitted
    return best if best is not None else attempt(0, notice=False)
