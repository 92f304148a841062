"""The passages that are searched: where they come from, and how they are kept on disk.

A saved collection is two files: ``passages.jsonl``, one object a line, and ``offsets.npy``, where each line
begins. It is mapped, not read, so millions of passages open at once and are shared between processes.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from midstream.errors import ConfigurationError

PASSAGES = "passages.jsonl"
OFFSETS = "offsets.npy"
TEXT_SUFFIXES = (".txt", ".md", ".rst")


@dataclass(frozen=True, slots=True)
class Passage:
    """One text that can be found. ``source`` says where it came from: a file's path or a line, or nothing."""

    text: str
    source: str | None = None


class Documents(Sequence[Passage]):
    """What a retriever searches.

    ``documents`` is one of:

    - texts, or mappings that hold a text under ``text_field``,
    - the path of a ``.jsonl`` file with one such mapping a line,
    - the path of a folder: every file below it whose name ends in ``suffixes``, as UTF-8.

    With ``passage_words``, longer documents are cut into passages of at most that many words; the words of
    a passage are joined as they stood, line breaks included.

    Raises ConfigurationError where there is no document at all, or one has no text; it names the place.
    """

    def __init__(
        self,
        documents: Documents | str | Path | Iterable[str | Mapping[str, Any]],
        *,
        text_field: str = "text",
        passage_words: int | None = None,
        suffixes: Sequence[str] = TEXT_SUFFIXES,
    ) -> None:
        whole_number = isinstance(passage_words, int) and not isinstance(passage_words, bool)
        if passage_words is not None and not (whole_number and passage_words >= 1):
            raise ConfigurationError(
                f"passage_words={passage_words!r}: must be a whole number, at least 1, or None for whole documents"
            )
        several = isinstance(suffixes, Sequence) and not isinstance(suffixes, str | bytes)
        if not several or not all(isinstance(suffix, str) for suffix in suffixes):
            raise ConfigurationError(f"suffixes={suffixes!r}: must be several ends of names, such as ['.md']")
        whole = _read(documents, text_field, tuple(suffixes))
        self._passages: Sequence[Passage] = [
            Passage(text, passage.source) for passage in whole for text in _cut(passage.text, passage_words)
        ]
        if not self._passages:
            shown = documents if isinstance(documents, str | Path) else type(documents).__name__
            raise ConfigurationError(f"documents={str(shown)!r}: holds no text to search")

    @overload
    def __getitem__(self, index: int) -> Passage: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Passage]: ...
    def __getitem__(self, index: int | slice) -> Passage | Sequence[Passage]:
        return self._passages[index]

    def __len__(self) -> int:
        return len(self._passages)

    def texts(self) -> list[str]:
        """Every passage's text, in order."""
        return [passage.text for passage in self._passages]

    def save(self, folder: Path) -> None:
        """Write the two files into ``folder``, which exists."""
        import numpy as np

        offsets = np.zeros(len(self) + 1, dtype=np.int64)
        with (folder / PASSAGES).open("wb") as file:
            for index, passage in enumerate(self):
                entry = {"text": passage.text} | ({} if passage.source is None else {"source": passage.source})
                # A lone surrogate is legal in a Python text and not in UTF-8: JSON's escapes carry both.
                file.write(json.dumps(entry).encode("ascii") + b"\n")
                offsets[index + 1] = file.tell()
        np.save(folder / OFFSETS, offsets, allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> Documents:
        """Open what ``save`` wrote, without reading it.

        Raises ConfigurationError where the files are missing or do not belong together.
        """
        loaded = cls.__new__(cls)
        loaded._passages = _Mapped(folder)
        return loaded


class _Mapped(Sequence[Passage]):
    def __init__(self, folder: Path) -> None:
        import numpy as np

        try:
            self._offsets = np.load(folder / OFFSETS, mmap_mode="r", allow_pickle=False)
            with (folder / PASSAGES).open("rb") as file:
                # Read by slices, never by seeking: many threads look things up at once.
                self._lines = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"folder={str(folder)!r}: holds no saved documents ({error})") from error
        if len(self._offsets) < 2 or int(self._offsets[-1]) != len(self._lines):
            raise ConfigurationError(f"folder={str(folder)!r}: {PASSAGES} and {OFFSETS} do not belong together")

    @overload
    def __getitem__(self, index: int) -> Passage: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Passage]: ...
    def __getitem__(self, index: int | slice) -> Passage | Sequence[Passage]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"passage {index} of {len(self)}")
        position = index % len(self)
        entry = json.loads(self._lines[int(self._offsets[position]) : int(self._offsets[position + 1])])
        return Passage(entry["text"], entry.get("source"))

    def __len__(self) -> int:
        return len(self._offsets) - 1


def _read(
    documents: Documents | str | Path | Iterable[str | Mapping[str, Any]], text_field: str, suffixes: tuple[str, ...]
) -> Iterable[Passage]:
    if isinstance(documents, Documents):
        return documents
    if isinstance(documents, str | Path):
        path = Path(documents)
        if path.is_dir():
            return _folder(path, suffixes)
        if path.suffix == ".jsonl" and path.is_file():
            return _lines(path, text_field)
        raise ConfigurationError(f"documents={str(path)!r}: must be a folder, or a file whose name ends in .jsonl")
    if not isinstance(documents, Iterable):
        raise ConfigurationError(f"documents={documents!r}: must be several texts, a .jsonl file or a folder")
    return (_passage(entry, text_field, None, f"documents[{index}]") for index, entry in enumerate(documents))


def _folder(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Passage]:
    for path in sorted(path for path in folder.rglob("*") if path.name.endswith(suffixes) and path.is_file()):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigurationError(f"documents: {str(path)!r} is not UTF-8 ({error})") from error
        if text.strip():
            yield Passage(text, str(path.relative_to(folder)))


def _lines(path: Path, text_field: str) -> Iterator[Passage]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"documents: {str(path)!r}, line {number}"
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise ConfigurationError(f"{place}: is not JSON ({error})") from error
            yield _passage(entry, text_field, f"{path.name}:{number}", place)


def _passage(entry: object, text_field: str, source: str | None, place: str) -> Passage:
    text = entry.get(text_field) if isinstance(entry, Mapping) else entry
    if not isinstance(text, str) or not text.strip():
        raise ConfigurationError(f"{place}: must be a text, or hold a text under {text_field!r}")
    return Passage(text, source)


def _cut(text: str, words: int | None) -> Iterator[str]:
    """``text`` in passages of at most ``words`` words, white space between the words kept."""
    if words is None:
        yield text
        return
    start = seen = 0
    inside = False
    for position, character in enumerate(text):
        if character.isspace():
            inside = False
        elif not inside:
            inside = True
            if seen == words:
                yield text[start:position].strip()
                start, seen = position, 0
            seen += 1
    if seen:
        yield text[start:].strip()
