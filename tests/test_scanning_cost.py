"""What it costs to find tags: a bounded look at each new token, however long the text already is."""

from __future__ import annotations

import pytest

from midstream.decoding import TextDecoder
from midstream.families import LLAMA3_TOOL_CALLS, QWEN_TOOL_CALLS
from midstream.markup import CODE_TAGS, FENCED_PYTHON, Markup
from midstream.scanning import Closed, Code, Scanner
from midstream.vocabulary import Vocabulary
from tests.spoken import spoken
from tests.synthetic import Cutter
from tests.vocabularies import vocabulary

STOP_STRINGS = ("</answer>", "STOP")
LONGEST = len("```python\n")

PLAIN = "Some text with < and ` and S in it, over and over.\n"
NEARLY = "</cod <co ``` `` </ STO </answe <code <cod\n"


class CountingScanner(Scanner):
    """Counts the characters that each feed may look at."""

    __slots__ = ("looked_at",)

    def __init__(self, markup: Markup | None, stop_strings: tuple[str, ...] = ()) -> None:
        super().__init__(markup, stop_strings)
        self.looked_at: list[int] = []

    def feed(self, text: str) -> list[object]:
        self.looked_at.append(len(self._window) + len(text))
        return list(super().feed(text))


@pytest.mark.parametrize("text", [PLAIN, NEARLY, "<" * 40, "`" * 40, "<code" * 8, "\n" * 40])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("markup", [CODE_TAGS, FENCED_PYTHON, None])
def test_each_piece_is_looked_at_with_no_more_than_a_pattern_of_what_came_before(
    markup: Markup | None, inside: bool, text: str
) -> None:
    scanner = CountingScanner(markup, STOP_STRINGS)
    if inside and markup is not None:
        scanner.feed(markup.start + "x")
        scanner.looked_at.clear()
    pieces = [text[i : i + 3] for i in range(0, len(text), 3)]
    for _ in range(500):
        for piece in pieces:
            scanner.feed(piece)
    patterns = [*STOP_STRINGS, *([markup.start, markup.end] if markup else [])]
    assert max(scanner.looked_at) <= 3 + max(map(len, patterns)) - 1
    total = 500 * len(text)
    assert sum(scanner.looked_at) <= total * (1 + max(map(len, patterns)) / 3) + len(scanner.looked_at) * LONGEST


@pytest.mark.parametrize("text", [PLAIN, NEARLY, " \n" * 20, "{<|py" * 8, "[TOOL_CALL" * 8])
def test_several_markups_side_by_side_cost_no_more_than_their_longest_tag(text: str) -> None:
    markup = Markup.either(CODE_TAGS, QWEN_TOOL_CALLS, LLAMA3_TOOL_CALLS)
    scanner = CountingScanner(markup, STOP_STRINGS)
    pieces = [text[i : i + 3] for i in range(0, len(text), 3)]
    for _ in range(300):
        for piece in pieces:
            scanner.feed(piece)
    tags = [tag for form in markup.forms for tag in (form.start, form.end) if tag is not None]
    assert max(scanner.looked_at) <= 3 + max(map(len, (*STOP_STRINGS, *tags))) - 1


def test_an_open_block_is_never_read_again_while_it_grows() -> None:
    scanner = CountingScanner(CODE_TAGS)
    scanner.feed("<code>")
    for line in range(20_000):
        found = scanner.feed(f"x = {line}\n")
        assert all(isinstance(item, Code) and len(item.text) < 20 for item in found)
    assert max(scanner.looked_at) < 40
    (*_, closed) = scanner.feed("</code>")
    assert isinstance(closed, Closed)
    assert closed.code.count("\n") == 20_000


def test_a_long_prefilled_block_is_reported_once() -> None:
    scanner = CountingScanner(CODE_TAGS)
    scanner.open("x = 1\n" * 10_000)
    sizes = [sum(len(item.text) for item in scanner.feed("y\n") if isinstance(item, Code)) for _ in range(100)]
    assert sizes[0] > 60_000
    assert max(sizes[1:]) <= 10
    assert max(scanner.looked_at) < 40


def test_a_long_text_is_decoded_piece_by_piece() -> None:
    cutter = Cutter()
    sizes: list[int] = []

    class Counting(Vocabulary):
        def piece_text(self, token_id: int) -> str | None:
            text = super().piece_text(token_id)
            sizes.append(len(text or ""))
            return text

    counting = Counting(cutter.vocabulary._source)
    decoder = TextDecoder(counting)
    ids = cutter.cut(*["ab", "é", "🙂"] * 5_000)
    assert [len(decoder.feed(token_id)) for token_id in ids] == sizes
    assert decoder.length == 4 * 5_000


def test_real_tokens_too() -> None:
    known = vocabulary("o200k")
    ids = spoken("o200k", (PLAIN + NEARLY) * 200)
    scanner = CountingScanner(CODE_TAGS, STOP_STRINGS)
    longest = max(len(known.piece(token_id)) for token_id in ids)
    decoder = TextDecoder(known)
    for token_id in ids:
        scanner.feed(decoder.feed(token_id))
    assert max(scanner.looked_at) <= longest + len("</answer>") - 1
