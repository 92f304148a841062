"""BM25: passages ranked by the words that they share with a query, the rare ones counting most.

The index is that of `bm25s <https://bm25s.github.io>`_: scores are computed when the index is built, in
Lucene's form (Kamphuis et al., "Which BM25 do you mean?", ECIR 2020), and kept in sparse arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from midstream.errors import ConfigurationError
from midstream.tools.retrieval.documents import Documents
from midstream.tools.retrieval.search import Searcher, check_count, new_folder, ranked, saved_settings

Tokenize = Callable[[str], Sequence[str]]


class Retriever(Searcher):
    """A tool that finds texts by words: ``retrieve = Retriever(documents)``, ``retrieve("Jen-Hsun Huang")``.

    ``documents`` are texts, a ``.jsonl`` file, a folder, or :class:`Documents`, which take more options.
    ``k1`` (0 or more) says how much a word's repetition counts, ``b`` (0 to 1) how much a passage's length
    does. ``tokenize`` turns a text into words; without it, words are lower-cased runs of two letters or
    digits and more, and English stop words are left out. A query none of whose words occur finds nothing.

    With ``progress``, bars are shown while the index is built. Raises ConfigurationError for documents
    without a word, and for options out of range.
    """

    kind = "bm25"

    def __init__(
        self,
        documents: Documents | str | Path | Iterable[str | Mapping[str, Any]],
        *,
        num_results: int = 3,
        k1: float = 1.5,
        b: float = 0.75,
        tokenize: Tokenize | None = None,
        progress: bool = False,
    ) -> None:
        _check_numbers(k1, b)
        check_count("num_results", num_results)
        # Before the documents are read, which may take long: this says so where bm25s is not installed.
        self._index = _bm25s().BM25(k1=k1, b=b, method="lucene", backend="numpy")
        super().__init__(documents if isinstance(documents, Documents) else Documents(documents), num_results)
        self.k1, self.b = k1, b
        self._tokenize = tokenize
        tokens = self._tokens(self.documents.texts(), progress)
        if not any(tokens):
            raise ConfigurationError("documents: not one word in them; give another tokenize for this language")
        self._index.index(tokens, create_empty_token=False, show_progress=progress)

    def _tokens(self, texts: Sequence[str], progress: bool = False) -> list[list[str]]:
        if self._tokenize is not None:
            return [list(self._tokenize(text)) for text in texts]
        tokens = _bm25s().tokenize(
            list(texts), stopwords="english", return_ids=False, show_progress=progress, allow_empty=False
        )
        return [[word for word in words if word] for words in tokens]

    def _best(self, queries: Sequence[str], count: int) -> Iterator[list[tuple[int, float]]]:
        for words in self._tokens(queries):
            known = self._index.get_tokens_ids(words)
            yield ranked(self._index.get_scores_from_ids(known), count, above=0) if known else []

    def save(self, folder: str | Path) -> None:
        """Write the index and the passages into ``folder``, which must not exist yet."""
        settings = {"k1": self.k1, "b": self.b, "own_tokenize": self._tokenize is not None}
        with new_folder(Path(folder), self.kind, {**settings, "num_results": self.num_results}) as filling:
            self.documents.save(filling)
            self._index.save(str(filling / "index"), show_progress=False)

    @classmethod
    def load(cls, folder: str | Path, *, num_results: int | None = None, tokenize: Tokenize | None = None) -> Retriever:
        """Open what ``save`` wrote; the arrays are mapped, not read.

        ``num_results`` takes the place of the saved one. A retriever that was built with a ``tokenize`` of
        its own needs it again, since functions are not saved. Raises ConfigurationError otherwise, and for
        a folder that does not hold a saved retriever.
        """
        folder = Path(folder)
        settings = saved_settings(folder, cls.kind)
        count = settings["num_results"] if num_results is None else num_results
        if settings["own_tokenize"] != (tokenize is not None):
            need = "was built with a tokenize of its own: give it" if tokenize is None else "was built without one"
            raise ConfigurationError(f"tokenize: the retriever in {str(folder)!r} {need}")
        loaded = cls.__new__(cls)
        Searcher.__init__(loaded, Documents.load(folder), count)
        loaded.k1, loaded.b, loaded._tokenize = settings["k1"], settings["b"], tokenize
        loaded._index = _bm25s().BM25.load(str(folder / "index"), mmap=True, show_progress=False)
        return loaded


def _check_numbers(k1: float, b: float) -> None:
    if not _is_number(k1, 0):
        raise ConfigurationError(f"k1={k1!r}: must be a number, 0 or more")
    if not _is_number(b, 0) or b > 1:
        raise ConfigurationError(f"b={b!r}: must be a number from 0 to 1")


def _is_number(value: object, least: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value < float("inf")


def _bm25s() -> Any:
    try:
        import bm25s
    except ImportError as error:
        raise ConfigurationError("a Retriever needs bm25s: pip install 'midstream[retrieval]'") from error
    return bm25s
