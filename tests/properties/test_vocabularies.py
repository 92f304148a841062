"""Texts to ids and back, with every vocabulary and with random texts."""

from __future__ import annotations

import codecs
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from midstream.decoding import TextDecoder, decode
from tests.properties import examples
from tests.spoken import spoken
from tests.vocabularies import ALL, BYTE_LEVEL, own_decoding, vocabulary

SNIPPETS = [
    "<code>",
    "</code>",
    "\n",
    "\n\n",
    "  ",
    "\t",
    "x = 1",
    "é",
    "数学",
    "🙂",
    "👩‍👩‍👧",
    "</s>",
    "<s>",
    "<unk>",
    "<|im_end|>",
]
SNIPPETS += ["<tool_call>", "def f(x):\n    return x", "1234567", " the", "\u200b", "\u0301", "…", "\\", "�"]

# SentencePiece's sign for a space, which no vocabulary of its kind can tell from one, and U+0000, at which some of
# them end a text.
PLAIN = st.characters(exclude_categories=("Cs",), exclude_characters="\u2581\x00")
TEXTS = st.lists(st.sampled_from(SNIPPETS) | st.text(PLAIN, max_size=6), max_size=12).map("".join)


def normalised(name: str, text: str) -> str:
    """A text as the tokenizer's own normalisation leaves it."""
    return unicodedata.normalize("NFKC", text) if name == "anthropic" else text


@pytest.mark.parametrize("name", ALL)
@given(text=TEXTS)
@example(text="")
@example(text="\n")
@example(text=" ")
@example(text="x" * 600)
@examples(60)
def test_a_text_comes_back_from_its_ids(name: str, text: str) -> None:
    known = vocabulary(name)
    ids = known.encode_text(text)
    assert decode(known, ids) == normalised(name, text)
    assert known.added_ids.isdisjoint(ids)
    assert all(0 <= token_id < known.size for token_id in ids)


@pytest.mark.parametrize("name", ALL)
@given(text=TEXTS)
@examples(40)
def test_ids_decode_as_the_tokenizer_itself_decodes_them(name: str, text: str) -> None:
    known = vocabulary(name)
    # Behind a word, so that nothing is stripped from the front of a text that is none.
    ids = [*known.encode_text("So"), *spoken(name, text)]
    assert decode(known, ids) == own_decoding(name, ids)


@pytest.mark.parametrize("name", ALL)
def test_special_and_other_added_tokens_decode_as_the_tokenizer_decodes_them(name: str) -> None:
    known = vocabulary(name)
    front = known.encode_text("So")
    for token_id in sorted(known.added_ids)[:300]:
        text = known.piece(token_id).decode()
        assert text
        if name in ("mistral1", "mistral3", "tekken", "unigram") and text not in ("<code>", "</code>"):
            continue  # they leave their control tokens out
        assert own_decoding(name, [*front, token_id, *front]) == f"So{text}So"


@pytest.mark.parametrize("name", ALL)
@given(text=TEXTS)
@examples(40)
def test_pieces_are_the_bytes_of_the_text_and_ends_say_which_id_completed_what(name: str, text: str) -> None:
    known = vocabulary(name)
    ids = spoken(name, text)
    raw = [known.piece(token_id) for token_id in ids]
    assert b"".join(raw) == normalised(name, text).encode()
    decoder = TextDecoder(known)
    said = [decoder.feed(token_id) for token_id in ids]
    assert "".join(said) == decoder.text == normalised(name, text)
    assert decoder.flush() == ""
    for count in range(len(ids) + 1):
        complete = codecs.getincrementaldecoder("utf-8")().decode(b"".join(raw[:count]))
        assert ([0, *decoder.ends])[count] == len(complete) == len("".join(said[:count]))


@given(pieces=st.lists(st.binary(min_size=1, max_size=4) | st.sampled_from([p.encode() for p in "é数🙂"]), max_size=12))
@examples(300)
def test_bytes_that_are_no_text_decode_as_a_whole_however_they_are_cut(pieces: list[bytes]) -> None:
    from tests.synthetic import Cutter

    cutter = Cutter()
    ids = cutter.cut(*pieces)
    whole = b"".join(pieces).decode(errors="replace")
    assert decode(cutter.vocabulary, ids) == whole
    decoder = TextDecoder(cutter.vocabulary)
    said = ""
    for token_id in ids:
        branch = decoder.copy()
        assert branch.text == said
        said += decoder.feed(token_id)
        branch.feed(token_id)
        assert (branch.text, branch.ends, branch.length) == (decoder.text, decoder.ends, decoder.length)
    assert said + decoder.flush() == whole
    assert decoder.ends == sorted(decoder.ends)
    assert not decoder.ends or decoder.ends[-1] == decoder.length == len(whole)


@pytest.mark.parametrize("name", BYTE_LEVEL)
@given(text=st.text(max_size=30))
@examples(60)
def test_byte_level_vocabularies_hold_any_text_at_all(name: str, text: str) -> None:
    known = vocabulary(name)
    expected = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert decode(known, known.encode_text(text)) == expected
