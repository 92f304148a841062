"""Search over documents, as tools: by words (BM25) and by vectors."""

from midstream.tools.retrieval.bm25 import Retriever
from midstream.tools.retrieval.dense import DenseRetriever
from midstream.tools.retrieval.documents import Documents, Passage
from midstream.tools.retrieval.search import Hit

__all__ = ["DenseRetriever", "Documents", "Hit", "Passage", "Retriever"]
