"""Passages ranked by the closeness of vectors that an encoder gives for them and for a query."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from midstream.errors import ConfigurationError
from midstream.tools.retrieval.documents import Documents
from midstream.tools.retrieval.search import Searcher, check_count, new_folder, ranked, saved_settings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike

    Vectors = np.ndarray[tuple[int, int], np.dtype[np.float32]]

Encode = Callable[[list[str]], "ArrayLike"]
Search = Literal["numpy", "faiss"]
Similarity = Literal["cosine", "dot"]


class DenseRetriever(Searcher):
    """A tool that finds texts by meaning, as far as ``encode`` knows it.

    ``encode`` takes a list of texts and gives a float array ``[texts, dimensions]``, rows finite; it is
    given at most ``batch_size`` texts at a time. ``similarity`` is the cosine of the angle between two
    vectors, or their plain dot product. The search is exact: in numpy, or by a flat index of faiss where
    that is installed and asked for. ``query_encode`` is for encoders that take queries otherwise.

    Raises ConfigurationError for options out of range and for an encoder whose answer has another shape.
    """

    kind = "dense"

    def __init__(
        self,
        documents: Documents | str | Path | Iterable[str | Mapping[str, Any]],
        encode: Encode,
        *,
        query_encode: Encode | None = None,
        num_results: int = 3,
        similarity: Similarity = "cosine",
        search: Search = "numpy",
        batch_size: int = 256,
        progress: bool = False,
    ) -> None:
        check_count("num_results", num_results)
        check_count("batch_size", batch_size)
        for field, function in (("encode", encode), ("query_encode", query_encode or encode)):
            if not callable(function):
                raise ConfigurationError(f"{field}={function!r}: must be a function from texts to vectors")
        if similarity not in ("cosine", "dot"):
            raise ConfigurationError(f"similarity={similarity!r}: must be 'cosine' or 'dot'")
        super().__init__(documents if isinstance(documents, Documents) else Documents(documents), num_results)
        self.similarity: Similarity = similarity
        self._encode = query_encode or encode
        self._vectors = _encode_all(self.documents.texts(), encode, similarity, batch_size, progress)
        self._dot = _dot_product(self._vectors, search)

    def _best(self, queries: Sequence[str], count: int) -> Iterator[list[tuple[int, float]]]:
        if not queries:
            return
        vectors = _encoded(list(queries), self._encode, self.similarity)
        if vectors.shape[1] != self._vectors.shape[1]:
            raise ConfigurationError(
                f"encode: gave {vectors.shape[1]} dimensions for a query, {self._vectors.shape[1]} for the documents"
            )
        yield from self._dot(vectors, count)

    def save(self, folder: str | Path) -> None:
        """Write the vectors and the passages into ``folder``, which must not exist yet."""
        import numpy as np

        settings = {"similarity": self.similarity, "num_results": self.num_results}
        with new_folder(Path(folder), self.kind, settings) as filling:
            self.documents.save(filling)
            np.save(filling / "vectors.npy", self._vectors, allow_pickle=False)

    @classmethod
    def load(
        cls, folder: str | Path, encode: Encode, *, num_results: int | None = None, search: Search = "numpy"
    ) -> DenseRetriever:
        """Open what ``save`` wrote; the vectors are mapped, not read. ``encode`` is the one for queries.

        Raises ConfigurationError for a folder that does not hold a saved retriever.
        """
        import numpy as np

        folder = Path(folder)
        settings = saved_settings(folder, cls.kind)
        count = settings["num_results"] if num_results is None else num_results
        loaded = cls.__new__(cls)
        Searcher.__init__(loaded, Documents.load(folder), count)
        loaded.similarity, loaded._encode = settings["similarity"], encode
        loaded._vectors = np.load(folder / "vectors.npy", mmap_mode="r", allow_pickle=False)
        if len(loaded._vectors) != len(loaded.documents):
            raise ConfigurationError(f"folder={str(folder)!r}: its vectors and its passages do not belong together")
        loaded._dot = _dot_product(loaded._vectors, search)
        return loaded


def _encode_all(texts: list[str], encode: Encode, similarity: Similarity, batch_size: int, progress: bool) -> Vectors:
    import numpy as np
    from rich.progress import track

    starts = range(0, len(texts), batch_size)
    batches: Iterable[int] = track(starts, "Encoding documents") if progress else starts
    return np.concatenate([_encoded(texts[start : start + batch_size], encode, similarity) for start in batches])


def _encoded(texts: list[str], encode: Encode, similarity: Similarity) -> Vectors:
    import numpy as np

    vectors = np.asarray(encode(texts), dtype=np.float32)
    if vectors.ndim != 2 or len(vectors) != len(texts) or vectors.shape[1] == 0:
        raise ConfigurationError(f"encode: gave shape {vectors.shape}, it must be [{len(texts)}, dimensions]")
    if not np.isfinite(vectors).all():
        raise ConfigurationError("encode: gave a vector that is not finite")
    if similarity == "cosine":
        length = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors = np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0)
    return vectors


def _dot_product(vectors: Vectors, search: Search) -> Callable[[Vectors, int], Iterator[list[tuple[int, float]]]]:
    """An exact search for the vectors with the greatest dot product, the best first."""
    if search not in ("numpy", "faiss"):
        raise ConfigurationError(f"search={search!r}: must be 'numpy' or 'faiss'")
    return _by_faiss(vectors) if search == "faiss" else _by_numpy(vectors)


def _by_numpy(vectors: Vectors) -> Callable[[Vectors, int], Iterator[list[tuple[int, float]]]]:
    def best(queries: Vectors, count: int) -> Iterator[list[tuple[int, float]]]:
        # A query at a time: the product of many queries with millions of vectors would not fit in memory,
        # and its rounding would depend on what other queries stand beside one.
        for query in queries:
            yield ranked(vectors @ query, count)

    return best


def _by_faiss(vectors: Vectors) -> Callable[[Vectors, int], Iterator[list[tuple[int, float]]]]:
    import numpy as np

    try:
        import faiss
    except ImportError as error:
        raise ConfigurationError("search='faiss' needs faiss: pip install faiss-cpu") from error
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(np.ascontiguousarray(vectors))

    def best(queries: Vectors, count: int) -> Iterator[list[tuple[int, float]]]:
        for scores, positions in zip(*index.search(np.ascontiguousarray(queries), count), strict=True):
            pairs = zip(positions.tolist(), scores.tolist(), strict=True)
            yield sorted(pairs, key=lambda pair: (-pair[1], pair[0]))

    return best
