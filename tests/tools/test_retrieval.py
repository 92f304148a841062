"""Retrievers: what they find, in which order, from which documents, and after being saved."""

from __future__ import annotations

import json
import math
import os
import pydoc_data.topics
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import midstream as ms
from midstream.errors import ConfigurationError
from midstream.tools import DenseRetriever, Documents, Retriever, ToolSet

FOUNDERS = [
    "Nvidia was established in 1993 by Jen-Hsun Huang, Curtis Priem, and Chris Malachowsky.",
    "Intel was founded in 1968 by Gordon Moore and Robert Noyce.",
    "Apple was founded in 1976 by Steve Jobs, Steve Wozniak and Ronald Wayne.",
]
WORDS = ["alpha", "beta", "gamma", "delta", "rare"]


def split(text: str) -> list[str]:
    return text.split()


def reference(documents: list[str], query: str, k1: float, b: float) -> list[float]:
    """Lucene's BM25, word by word as Kamphuis et al. print it."""
    counts = [Counter(document.split()) for document in documents]
    lengths = [sum(count.values()) for count in counts]
    average = sum(lengths) / len(lengths)
    scores = []
    for count, length in zip(counts, lengths, strict=True):
        score = 0.0
        for word in query.split():
            holding = sum(word in other for other in counts)
            rarity = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
            if count[word]:
                score += rarity * count[word] / (count[word] + k1 * (1 - b + b * length / average))
        scores.append(score)
    return scores


texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join)


@settings(deadline=None)
@given(
    documents=st.lists(texts, min_size=1, max_size=8),
    queries=st.lists(texts, min_size=1, max_size=4),
    k1=st.sampled_from([0.0, 0.9, 1.5]),
    b=st.sampled_from([0.0, 0.4, 0.75, 1.0]),
    count=st.integers(1, 10),
)
def test_scores_are_those_of_bm25(documents: list[str], queries: list[str], k1: float, b: float, count: int) -> None:
    retriever = Retriever(documents, k1=k1, b=b, num_results=count, tokenize=split)
    for query, hits in zip(queries, retriever.search(queries), strict=True):
        expected = reference(documents, query, k1, b)
        matching = sum(score > 0 for score in expected)
        assert len(hits) == min(count, matching)
        assert [hit.text for hit in hits] == [documents[hit.index] for hit in hits]
        assert [hit.score for hit in hits] == pytest.approx(sorted(expected, reverse=True)[: len(hits)], rel=1e-5)
        assert [hit.score for hit in hits] == pytest.approx([expected[hit.index] for hit in hits], rel=1e-5)
        order = [(-hit.score, hit.index) for hit in hits]
        assert order == sorted(order)


def test_the_ranking_is_that_of_rank_bm25() -> None:
    """The same order as another library's on a real corpus, once both weigh a rare word alike."""
    from rank_bm25 import BM25Okapi

    class Okapi(BM25Okapi):  # type: ignore[misc]
        def _calc_idf(self, nd: dict[str, int]) -> None:
            self.idf = {word: math.log(1 + (self.corpus_size - n + 0.5) / (n + 0.5)) for word, n in nd.items()}

    def words(text: str) -> list[str]:
        return text.lower().split()

    documents = Documents(pydoc_data.topics.topics.values(), passage_words=100)
    retriever = Retriever(documents, num_results=10, tokenize=words)
    other = Okapi([words(text) for text in documents.texts()], k1=1.5, b=0.75)
    queries = ["the with statement", "raise an exception from another", "slices of a sequence", "yield expression"]
    queries += [" ".join(text.split()[20:30]) for text in documents.texts()[::25]]
    for query, hits in zip(queries, retriever.search(queries), strict=True):
        # Theirs multiplies by k1 + 1 throughout, which orders nothing otherwise.
        scores = other.get_scores(words(query)) / 2.5
        best = np.sort(scores)[::-1][: len(hits)]
        assert [hit.score for hit in hits] == pytest.approx(best, rel=1e-4)
        assert [scores[hit.index] for hit in hits] == pytest.approx(best, rel=1e-4)


def test_it_answers_as_a_tool_does() -> None:
    retrieve = Retriever(FOUNDERS)
    assert retrieve("Jen-Hsun Huang") == [FOUNDERS[0]]
    assert retrieve("founded")[0] in FOUNDERS[1:]
    assert retrieve("nothing that occurs") == []
    assert retrieve("") == []
    assert retrieve.answer(["Jen-Hsun Huang", "", "Gordon Moore"]) == [[FOUNDERS[0]], [], [FOUNDERS[1]]]
    assert retrieve.search([]) == []


def test_models_find_what_they_ask_for_and_ask_together(sandboxes: ms.SandboxPool) -> None:
    from tests.vocabularies import tokenizer

    asked: list[int] = []

    class Counting(Retriever):
        def answer(self, queries: Sequence[str]) -> list[list[str]]:
            asked.append(len(queries))
            return super().answer(queries)

    retriever = Counting(FOUNDERS, num_results=1)
    said = {f"{i}": f"<code>retrieve('Jen-Hsun Huang {i % 4}')</code> Nvidia." for i in range(12)}
    engine = ms.ScriptedEngine(tokenizer("o200k"), said)
    with ms.Generator(engine, pool=sandboxes, tools=[retriever]) as generator:
        batch = generator.generate([ms.Prompt(text=text) for text in said])
    for trajectory in batch:
        assert "['Nvidia was established in 1993 by Jen-Hsun Huang" in trajectory.text
    assert sum(asked) == 4  # equal queries are asked once
    (call,) = batch[0].calls[0].result.tool_calls
    assert (call.name, call.arguments, call.value) == ("retrieve", ("Jen-Hsun Huang 0",), [FOUNDERS[0]])


def test_what_a_model_is_told_of_it() -> None:
    text = ToolSet([Retriever(FOUNDERS)]).describe("stubs")
    assert "def retrieve(query: str) -> list[str]:" in text
    assert "What to look for, in plain words." in text
    assert ToolSet({"search": Retriever(FOUNDERS)}).names == ("search",)


def test_of_equal_passages_the_first_comes_first() -> None:
    retriever = Retriever(["same words here"] * 50 + ["other words"], num_results=3)
    assert [hit.index for hit in retriever.search(["same"])[0]] == [0, 1, 2]


def test_answers_do_not_depend_on_what_else_is_asked_nor_on_threads() -> None:
    retriever = Retriever(Documents(pydoc_data.topics.topics.values(), passage_words=50), num_results=5)
    queries = [f"{name} statement" for name in sorted(pydoc_data.topics.topics)]
    alone = [retriever(query) for query in queries]
    assert retriever.answer(queries) == alone
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(retriever, queries)) == alone


# --- documents


def test_documents_come_from_lists_lines_and_folders(tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"body": text}) + "\n\n" for text in FOUNDERS))
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "b.md").write_text(FOUNDERS[1])
    (tmp_path / "folder" / "deep" / "a.txt").write_text(FOUNDERS[0])
    (tmp_path / "folder" / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "folder" / "empty.txt").write_text(" \n")
    from_list = Documents([{"text": FOUNDERS[0], "year": 1993}, FOUNDERS[1], {"text": FOUNDERS[2]}])
    from_lines = Documents(tmp_path / "lines.jsonl", text_field="body")
    from_folder = Documents(str(tmp_path / "folder"))
    assert from_list.texts() == from_lines.texts() == FOUNDERS
    assert [passage.source for passage in from_lines] == ["lines.jsonl:1", "lines.jsonl:3", "lines.jsonl:5"]
    assert [(passage.source, passage.text) for passage in from_folder] == [
        ("b.md", FOUNDERS[1]),
        ("deep/a.txt", FOUNDERS[0]),
    ]
    assert Retriever(tmp_path / "folder").search(["Huang"])[0][0].source == "deep/a.txt"


@given(text=st.text(alphabet=st.sampled_from("ab \n\t\u00a0é"), max_size=60), words=st.integers(1, 5))
def test_passages_hold_all_words_in_order(text: str, words: int) -> None:
    if not text.strip():
        return
    passages = Documents([text], passage_words=words).texts()
    assert [word for passage in passages for word in passage.split()] == text.split()
    assert all(1 <= len(passage.split()) <= words for passage in passages)
    assert all(len(passage.split()) == words for passage in passages[:-1])
    assert all(passage in text for passage in passages)


def _broken(kind: str, folder: Path) -> object:
    if kind == "not JSON":
        (folder / "d.jsonl").write_text('{"text": "a"}\n{"text": \n')
        return folder / "d.jsonl"
    if kind == "no text":
        (folder / "d.jsonl").write_text('{"text": "a"}\n{"title": "b"}\n')
        return folder / "d.jsonl"
    if kind == "not UTF-8":
        (folder / "a.txt").write_bytes(b"\xff\xfe")
        return folder
    if kind == "an empty folder":
        return folder
    return {"no file": folder / "missing.jsonl", "nothing": [], "a number": 5, "numbers": ["a", 5], "blank": [" "]}[
        kind
    ]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("not JSON", r"line 2: is not JSON"),
        ("no text", r"line 2: must be a text, or hold a text under 'text'"),
        ("not UTF-8", r"a\.txt' is not UTF-8"),
        ("an empty folder", "holds no text"),
        ("no file", r"missing\.jsonl': must be a folder, or a file"),
        ("nothing", "holds no text"),
        ("a number", "documents=5"),
        ("numbers", r"documents\[1\]: must be a text"),
        ("blank", r"documents\[0\]: must be a text"),
    ],
)
def test_documents_that_cannot_be_read_are_named(kind: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Retriever(_broken(kind, tmp_path))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_results": 0}, "num_results=0"),
        ({"num_results": True}, "num_results=True"),
        ({"k1": -0.1}, "k1=-0.1"),
        ({"k1": float("nan")}, "k1=nan"),
        ({"b": 1.1}, "b=1.1"),
        ({"tokenize": lambda _: []}, "not one word"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Retriever(FOUNDERS, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Documents(["a b"], passage_words=1.5), "passage_words=1.5: must be a whole number"),
        (lambda: Documents(["a b"], suffixes="md"), "suffixes='md': must be several"),
        (lambda: Retriever(["aa bb"], k1="x"), "k1='x': must be a number"),
        (lambda: Retriever(["aa bb"], b=None), "b=None: must be a number"),
        (lambda: DenseRetriever(["aa"], encode=3), "encode=3: must be a function"),
    ],
)
def test_options_of_other_types_are_named(make: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_no_number_of_results_is_not_the_saved_one(tmp_path: Path) -> None:
    Retriever(["aa bb"]).save(tmp_path / "index")
    with pytest.raises(ConfigurationError, match="num_results=0"):
        Retriever.load(tmp_path / "index", num_results=0)


def test_a_query_is_a_text() -> None:
    with pytest.raises(TypeError, match="query must be a str, not int: 3"):
        Retriever(["aa bb"])(3)  # type: ignore[arg-type]


def test_documents_of_stop_words_alone_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="not one word"):
        Retriever(["the", "of a"])


def test_one_query_is_not_several() -> None:
    with pytest.raises(ConfigurationError, match="put one into a list"):
        Retriever(FOUNDERS).search("Huang")


# --- saved and opened again


def test_what_is_saved_answers_the_same(tmp_path: Path) -> None:
    documents = Documents([*FOUNDERS, "Grüße, 你好 \ud800 \u2028 line\nbreaks"])
    built = Retriever(documents, num_results=2, k1=1.2, b=0.3)
    built.save(tmp_path / "deep" / "index")
    loaded = Retriever.load(tmp_path / "deep" / "index")
    queries = ["founded by Steve", "grüße", "Huang", "1976", "nothing"]
    assert loaded.search(queries) == built.search(queries)
    assert (loaded.k1, loaded.b, loaded.num_results) == (1.2, 0.3, 2)
    assert Retriever.load(tmp_path / "deep" / "index", num_results=1).search(["founded"])[0][0].index in (1, 2)
    assert list(loaded.documents) == list(documents)
    assert loaded.documents[-1] == documents[3]
    assert loaded.documents[1:3] == documents[1:3]
    with pytest.raises(IndexError):
        loaded.documents[4]
    assert os.listdir(tmp_path / "deep") == ["index"]


def test_saving_takes_no_name_that_is_taken_and_leaves_nothing_when_it_fails(tmp_path: Path) -> None:
    retriever = Retriever(FOUNDERS)
    retriever.save(tmp_path / "index")
    with pytest.raises(ConfigurationError, match="exists already"):
        retriever.save(tmp_path / "index")
    retriever.documents = None  # type: ignore[assignment]
    with pytest.raises(AttributeError):
        retriever.save(tmp_path / "other")
    assert os.listdir(tmp_path) == ["index"]


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    Retriever(FOUNDERS, tokenize=split).save(tmp_path / "own")
    with pytest.raises(ConfigurationError, match="was built with a tokenize of its own"):
        Retriever.load(tmp_path / "own")
    assert Retriever.load(tmp_path / "own", tokenize=split)("1968") == [FOUNDERS[1]]
    Retriever(FOUNDERS).save(tmp_path / "plain")
    with pytest.raises(ConfigurationError, match="was built without one"):
        Retriever.load(tmp_path / "plain", tokenize=split)
    with pytest.raises(ConfigurationError, match="must hold a dense retriever"):
        DenseRetriever.load(tmp_path / "plain", letters)
    with pytest.raises(ConfigurationError, match="holds no saved retriever"):
        Retriever.load(tmp_path)
    with (tmp_path / "plain" / "passages.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(ConfigurationError, match="do not belong together"):
        Retriever.load(tmp_path / "plain")


def test_building_and_searching_leave_no_thread() -> None:
    threads = set(threading.enumerate())
    Retriever(FOUNDERS)("Huang")
    assert set(threading.enumerate()) == threads


# --- by vectors


def letters(texts: list[str]) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """How often each letter occurs: an encoder that anyone can check."""
    return np.array([[text.lower().count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts], float)


@settings(deadline=None)
@given(
    documents=st.lists(st.text("abc ", min_size=1).filter(str.strip), min_size=1, max_size=9),
    queries=st.lists(st.text("abc "), max_size=4),
    similarity=st.sampled_from(["cosine", "dot"]),
    count=st.integers(1, 12),
    batch_size=st.integers(1, 4),
)
def test_vectors_are_searched_exactly(
    documents: list[str], queries: list[str], similarity: str, count: int, batch_size: int
) -> None:
    sizes: list[int] = []

    def encode(texts: list[str]) -> object:
        sizes.append(len(texts))
        return letters(texts)

    retriever = DenseRetriever(
        documents,
        encode,
        num_results=count,
        similarity=similarity,
        batch_size=batch_size,  # type: ignore[arg-type]
    )
    assert max(sizes) <= batch_size
    assert sum(sizes) == len(documents)
    for query, hits in zip(queries, retriever.search(queries), strict=True):
        scores = letters(documents) @ letters([query])[0]
        if similarity == "cosine":
            lengths = np.linalg.norm(letters(documents), axis=1) * np.linalg.norm(letters([query])[0])
            scores = np.divide(scores, lengths, out=np.zeros_like(scores), where=lengths > 0)
        assert [hit.score for hit in hits] == pytest.approx(sorted(scores, reverse=True)[:count], abs=1e-5)
        assert [hit.score for hit in hits] == pytest.approx([scores[hit.index] for hit in hits], abs=1e-5)
        assert [hit.text for hit in hits] == [documents[hit.index] for hit in hits]


def test_vectors_are_saved_too(tmp_path: Path) -> None:
    built = DenseRetriever(FOUNDERS, letters, num_results=2)
    built.save(tmp_path / "index")
    loaded = DenseRetriever.load(tmp_path / "index", letters)
    assert loaded.search(FOUNDERS) == built.search(FOUNDERS)
    assert [hits[0].text for hits in loaded.search(FOUNDERS)] == FOUNDERS


def test_faiss_finds_the_same() -> None:
    pytest.importorskip("faiss", reason="faiss is not installed: pip install faiss-cpu")
    queries = ["founded", "Huang", "zzz"]
    exact = DenseRetriever(FOUNDERS, letters).search(queries)
    found = DenseRetriever(FOUNDERS, letters, search="faiss").search(queries)
    assert [[hit.index for hit in hits] for hits in found] == [[hit.index for hit in hits] for hits in exact]


def _shapes(shape: tuple[int, ...]) -> object:
    return lambda _: np.ones(shape)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encode": _shapes((3,))}, r"gave shape \(3,\)"),
        ({"encode": _shapes((2, 4))}, r"it must be \[3, dimensions\]"),
        ({"encode": _shapes((3, 0))}, r"gave shape \(3, 0\)"),
        ({"encode": lambda texts: np.full((len(texts), 2), np.nan)}, "not finite"),
        ({"similarity": "euclid"}, "similarity='euclid'"),
        ({"search": "annoy"}, "search='annoy'"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_encoders_and_options_that_cannot_serve_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DenseRetriever(FOUNDERS, **({"encode": letters} | options))  # type: ignore[arg-type]


def test_queries_of_other_dimensions_are_refused() -> None:
    retriever = DenseRetriever(FOUNDERS, letters, query_encode=lambda texts: np.ones((len(texts), 3)))
    with pytest.raises(ConfigurationError, match="gave 3 dimensions for a query, 26 for the documents"):
        retriever("founded")
