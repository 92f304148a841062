"""Search by words, beside another library's, over documentation that every installation has.

The corpus is what Python's ``help()`` knows of the language (``pydoc_data.topics``) and the descriptions of the
installed packages, in passages of 100 words; the queries are runs of words out of it and words drawn from it. The
ranking is compared with that of ``rank_bm25.BM25Okapi``, which weighs frequent words otherwise (it floors the weight
of words that most passages hold), so the best ten need not be the same ten.

    python -m benchmarks.retrieval [--queries 1000] [--json benchmarks/results/retrieval.json]
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import random
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from rank_bm25 import BM25Okapi
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from midstream.tools.retrieval import Documents, Retriever

PASSAGE_WORDS = 100
NUM_RESULTS = 10


def corpus() -> Documents:
    """Python's topics and the installed packages' descriptions, cut into passages."""
    texts = list(pydoc_data.topics.topics.values())
    for distribution in sorted(metadata.distributions(), key=lambda found: found.metadata["Name"].lower()):
        description = distribution.metadata.get("Description") or distribution.metadata.get_payload()  # type: ignore[attr-defined]
        if isinstance(description, str) and description.strip():
            texts.append(description)
    return Documents(texts, passage_words=PASSAGE_WORDS)


def queries(documents: Documents, count: int) -> list[str]:
    """Half of them four words that follow each other somewhere, half four words from anywhere."""
    source = random.Random(0)
    texts = [text.split() for text in documents.texts()]
    found = []
    for index in range(count):
        if index % 2:
            found.append(" ".join(source.choice(source.choice(texts)) for _ in range(4)))
        else:
            words = source.choice(texts)
            start = source.randrange(max(1, len(words) - 4))
            found.append(" ".join(words[start : start + 4]))
    return found


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(count: int) -> dict[str, Any]:
    documents = corpus()
    asked = queries(documents, count)
    build = seconds(lambda: Retriever(documents))
    retriever = Retriever(documents, num_results=NUM_RESULTS)
    tokens = retriever._tokens(documents.texts())  # the same words for both
    other = BM25Okapi(tokens, k1=1.5, b=0.75)
    words = retriever._tokens(asked)
    with tempfile.TemporaryDirectory() as folder:
        retriever.save(Path(folder) / "index")
        load = seconds(lambda: Retriever.load(Path(folder) / "index"))
    batched = seconds(lambda: retriever.answer(asked))
    single = seconds(lambda: [retriever(query) for query in asked])
    rival_count = max(1, count // 10)
    rival = seconds(lambda: [other.get_top_n(each, documents, NUM_RESULTS) for each in words[:rival_count]])
    overlaps, first = [], []
    for hits, each in zip(retriever.search(asked[:rival_count]), words[:rival_count], strict=True):
        if not hits:
            continue
        scores = other.get_scores(each)
        best = sorted(range(len(scores)), key=lambda index, scores=scores: (-scores[index], index))[: len(hits)]
        overlaps.append(len({hit.index for hit in hits} & set(best)) / len(hits))
        first.append(hits[0].index == best[0])
    return {
        "passages": len(documents),
        "words": sum(map(len, tokens)),
        "build_seconds": build,
        "load_seconds": load,
        "queries_per_second_in_one_batch": count / batched,
        "queries_per_second_one_by_one": count / single,
        "queries_per_second_rank_bm25": rival_count / rival,
        "times_faster_than_rank_bm25": (count / batched) / (rival_count / rival),
        "share_of_best_ten_in_common": sum(overlaps) / len(overlaps),
        "same_best_passage": sum(first) / len(first),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments.queries)
    table = Table("", "value", title="Retrieval by BM25")
    for name, value in result.items():
        table.add_row(name.replace("_", " "), f"{value:,.3g}" if isinstance(value, float) else f"{value:,}")
    Console().print(table)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        recorded = {"machine": machine.description(), "load": machine.load(), **result}
        arguments.json.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main()
