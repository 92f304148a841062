"""What every retriever is: texts found for queries, many queries at once."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from midstream.errors import ConfigurationError
from midstream.tools.retrieval.documents import Documents
from midstream.tools.tool import Tool

if TYPE_CHECKING:
    import numpy as np

    Scores = np.ndarray[tuple[int], np.dtype[np.float32]]

SETTINGS = "retriever.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Hit:
    """One passage that was found: its text, where it came from, its position among all, and its score."""

    text: str
    source: str | None
    index: int
    score: float


class Searcher(ABC):
    """Searches ``documents`` and answers with at most ``num_results`` passages, the best first."""

    kind: str

    def __init__(self, documents: Documents, num_results: int) -> None:
        check_count("num_results", num_results)
        self.documents = documents
        self.num_results = num_results

    @abstractmethod
    def _best(self, queries: Sequence[str], count: int) -> Iterator[list[tuple[int, float]]]:
        """For each query up to ``count`` pairs of a passage's position and its score, the best first."""

    def search(self, queries: Sequence[str], num_results: int | None = None) -> list[list[Hit]]:
        """For each of ``queries`` its hits, the best first; of equal ones, the earlier passage first."""
        if isinstance(queries, str):
            raise ConfigurationError(f"queries={queries!r}: must be several texts; put one into a list")
        if num_results is not None:
            check_count("num_results", num_results)
        count = min(self.num_results if num_results is None else num_results, len(self.documents))
        for query in queries:
            if not isinstance(query, str):
                raise TypeError(f"query must be a str, not {type(query).__name__}: {query!r:.100}")
        found = []
        for best in self._best(queries, count):
            passages = ((index, self.documents[index], score) for index, score in best)
            found.append([Hit(passage.text, passage.source, index, score) for index, passage, score in passages])
        return found

    def __call__(self, query: str) -> list[str]:
        """The texts that fit ``query`` best, the best first."""
        return self.retrieve(query)

    def retrieve(self, query: str) -> list[str]:
        """Search the documents for a query.

        Args:
            query: What to look for, in plain words.

        Returns:
            The texts that fit best, the best first.
        """
        return [hit.text for hit in self.search([query])[0]]

    def as_tool(self) -> Tool:
        """What ``tools=[retriever]`` makes of it: ``retrieve``, batched, and remembered for equal queries."""
        return Tool("retrieve", self.retrieve, batched=self.answer, pure=True)

    def answer(self, queries: Sequence[str]) -> list[list[str]]:
        """The texts for each of ``queries``: what calling gives, for many at once."""
        return [[hit.text for hit in hits] for hits in self.search(queries)]


def ranked(scores: Scores, count: int, *, above: float | None = None) -> list[tuple[int, float]]:
    """The positions and values of the ``count`` greatest scores, ``[passages]``, of equal ones the first ones.

    With ``above``, only of those that are greater than it.
    """
    import numpy as np

    found = np.arange(len(scores)) if above is None else np.flatnonzero(scores > above)
    if len(found) > count:
        # All that tie with the last that counts are kept, so that the order settles which of them it is.
        least = np.partition(scores[found], len(found) - count)[len(found) - count]
        found = found[scores[found] >= least]
    order = np.lexsort((found, -scores[found]))[:count]
    return [(int(index), float(scores[index])) for index in found[order]]


def check_count(field: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{field}={value!r}: must be a whole number of at least 1")


@contextmanager
def new_folder(folder: Path, kind: str, settings: Mapping[str, Any]) -> Iterator[Path]:
    """A folder to fill that takes ``folder``'s name when all of it is written, and is gone if that fails."""
    if folder.exists():
        raise ConfigurationError(f"folder={str(folder)!r}: exists already; give a name that is free")
    folder.parent.mkdir(parents=True, exist_ok=True)
    filling = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield filling
        (filling / SETTINGS).write_text(json.dumps({"format": FORMAT, "kind": kind, **settings}, indent=1) + "\n")
        filling.chmod(0o777 & ~_umask())
        os.rename(filling, folder)
    except BaseException:
        shutil.rmtree(filling, ignore_errors=True)
        raise


def saved_settings(folder: Path, kind: str) -> dict[str, Any]:
    """What ``new_folder`` wrote down. Raises ConfigurationError for a folder that holds something else."""
    try:
        settings = json.loads((folder / SETTINGS).read_text())
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"folder={str(folder)!r}: holds no saved retriever ({error})") from error
    if not isinstance(settings, dict) or settings.get("format") != FORMAT or settings.get("kind") != kind:
        found = settings if not isinstance(settings, dict) else {key: settings.get(key) for key in ("format", "kind")}
        raise ConfigurationError(
            f"folder={str(folder)!r}: must hold a {kind} retriever of format {FORMAT}, not {found}"
        )
    return settings


def _umask() -> int:
    # The mask can only be read by setting it: /proc tells it without a moment in which it is another.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    return 0o022
