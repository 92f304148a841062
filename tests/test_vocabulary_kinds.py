"""What a vocabulary takes, what it refuses, and what it keeps."""

from __future__ import annotations

import gc
import io
import weakref
from pathlib import Path
from typing import Any

import pytest

from midstream.decoding import decode
from midstream.errors import TokenizerError
from midstream.vocabulary import TokenizerSource, Vocabulary
from tests.vocabularies import ALL, TRAINING_TEXT, mistral_file, tokenizer, unigram_model, vocabulary


@pytest.mark.parametrize("name", ALL)
def test_a_tokenizer_is_read_once(name: str) -> None:
    own = tokenizer(name)
    first = Vocabulary.of(own)
    assert Vocabulary.of(own) is first
    assert Vocabulary.of(first) is first


def test_only_the_last_tokenizers_are_kept() -> None:
    class Own(str):
        __slots__ = ("__weakref__", "decode_single_token_bytes")
        special_tokens_set = frozenset[str]()
        n_vocab = 1
        encode = encode_ordinary = None

    def make() -> Any:
        own = Own()
        own.decode_single_token_bytes = lambda token_id: b"x"
        return own

    first = make()
    gone = weakref.ref(first)
    Vocabulary.of(first)
    del first
    for _ in range(20):
        Vocabulary.of(make())
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("name", ALL)
def test_ids_beyond_the_vocabulary_stand_for_nothing(name: str) -> None:
    # Models' output layers are often padded to more ids than the tokenizer has.
    known = vocabulary(name)
    for token_id in (known.size, known.size + 1, known.size + 100_000):
        assert known.piece(token_id) == b""
        assert known.piece_text(token_id) == ""
    with pytest.raises(TokenizerError, match="ids start at 0"):
        known.piece(-1)


@pytest.mark.parametrize("name", ["cl100k", "tekken", "mistral1", "llama_fast", "tagged", "metaspace", "unigram_fast"])
def test_every_byte_is_some_ids_piece(name: str) -> None:
    known = vocabulary(name)
    single = {known.piece(token_id) for token_id in range(known.size)}
    assert {bytes([byte]) for byte in range(256)} <= single


def test_added_tokens_go_through_the_decoder_like_any_other() -> None:
    known = vocabulary("metaspace")
    added = dict(known._source.added)
    assert known.piece(added["▁▁"]) == b"  "  # as its tokenizer decodes it: spaces, in which Python is indented
    assert known.piece(added["<tool_call>"]) == b"<tool_call>"


def test_a_source_of_ones_own() -> None:
    source = TokenizerSource(3, lambda i: b"abc"[i : i + 1], lambda text: ["abc".index(c) for c in text], lambda _: [0])
    known = Vocabulary.of(source)
    assert decode(known, known.encode_text("cab")) == "cab"


def test_a_source_that_spells_an_added_token_is_asked_for_single_characters() -> None:
    source = TokenizerSource(
        size=300,
        piece=lambda i: b"<s>" if i == 256 else bytes([i]),
        encode_text=lambda text: [256] if text == "<s>" else list(text.encode()),
        encode_prompt=lambda text: list(text.encode()),
        added={"<s>": 256},
    )
    assert Vocabulary(source).encode_text("<s>") == list(b"<s>")


@pytest.mark.parametrize("name", ALL)
def test_a_text_with_added_tokens_in_it_is_encoded_in_one_call_all_the_same(name: str) -> None:
    known = vocabulary(name)
    added = [known.piece(token_id).decode() for token_id in sorted(known.added_ids)]
    for token in [*added[:3], *added[-3:]]:
        front, behind = "The sum of 3 and 4 is ", " the lines go on"
        one_by_one = sum(len(known.encode_text(character)) for character in token)
        ids = known.encode_text(front + token + behind)
        assert len(ids) <= len(known.encode_text(front)) + one_by_one + len(known.encode_text(behind)), token


def test_wrappers_are_looked_into() -> None:
    class Wrapper:
        def __init__(self, inner: Any) -> None:
            self.tokenizer = inner

    class Mistral:
        def __init__(self, inner: Any) -> None:
            self.instruct_tokenizer = Wrapper(inner)

    common = pytest.importorskip("mistral_common.tokens.tokenizers.sentencepiece")
    real = common.SentencePieceTokenizer(mistral_file(3))
    assert Vocabulary.of(real).encode_text("a <s>\n") == vocabulary("mistral3").encode_text("a <s>\n")
    for name in ("mistral3", "tekken", "tagged"):
        inner = tokenizer(name)
        for wrapped in (Wrapper(inner), Mistral(inner)):
            assert Vocabulary.of(wrapped).encode_text("a <s>\n") == vocabulary(name).encode_text("a <s>\n")


def test_the_sentencepiece_tokenizers_of_transformers(tmp_path: Path) -> None:
    from transformers import BertGenerationTokenizer

    file = tmp_path / "spiece.model"
    file.write_bytes(unigram_model())
    own = BertGenerationTokenizer(str(file), pad_token="<unk>", sep_token="</s>")
    own.add_tokens(["<tool_call>"])
    known = Vocabulary.of(own)
    for text in ("The sum of 3", "  <code>x</code>\n数 🙂", "<tool_call></s><s><unk>"):
        ids = known.encode_text(text)
        assert decode(known, ids) == text
        assert known.added_ids.isdisjoint(ids)
    assert known.piece(known.added_id("<tool_call>")) == b"<tool_call>"
    assert known.eos_ids == frozenset([own.eos_token_id])


def test_a_user_defined_symbol_of_a_sentencepiece_model_of_pairs_is_not_found_in_text() -> None:
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINING_TEXT.splitlines() * 5),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        user_defined_symbols=["<call>", "\n"],
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    known = Vocabulary.of(SentencePieceProcessor(model_proto=model.getvalue()))
    text = "we <call>  it\n   so  "  # the model itself would drop spaces
    ids = known.encode_text(text)
    assert decode(known, ids) == text
    assert known.added_id("<call>") not in ids
    assert known.piece(known.added_id("<call>")) == b"<call>"
    assert known.added_id("\n") in ids


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        ("WordPiece", "makes a token's text depend on its neighbours"),
        (None, "does not say how tokens join"),
        ("Pattern", "replaces by a pattern"),
    ],
)
def test_tokenizers_whose_tokens_are_no_text_are_refused(decoder: str | None, message: str) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models

    own = Tokenizer(models.BPE({"a": 0}, []))
    if decoder == "WordPiece":
        own.decoder = decoders.WordPiece()
    elif decoder == "Pattern":
        own.decoder = decoders.Replace(Regex("▁+"), " ")
    with pytest.raises(TokenizerError, match=message):
        Vocabulary.of(own)


def test_what_is_no_tokenizer_is_refused() -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer=builtins\.object: not a kind that midstream knows"):
        Vocabulary.of(object())


def test_holes_in_the_ids_do_not_shift_the_size() -> None:
    from tokenizers import Tokenizer, decoders, models

    own = Tokenizer(models.BPE({"a": 0, "b": 50}, []))
    own.decoder = decoders.ByteLevel()
    known = Vocabulary.of(own)
    assert known.size == 51
    assert (known.piece(0), known.piece(7), known.piece(50)) == (b"a", b"", b"b")
