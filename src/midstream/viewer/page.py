"""Writes the page: a fixed program, a fixed style, and the records as data that is never run.

A rollout is text that a model wrote, so it is not trusted. It stands in the file as compressed data in base64,
which has no character that HTML reads; the page puts it on the screen as text nodes alone, never as markup; and
the page's Content-Security-Policy lets nothing run but this one script, by its hash, and nothing be fetched.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import os
import tempfile
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import IO, Any

import msgspec

from midstream.records import Record, verify
from midstream.viewer.entries import SUMMARY_COLUMNS, detail, summary

SCRIPTS = ("data.js", "highlight.js", "list.js", "rollout.js", "siblings.js", "main.js")
STYLE = "viewer.css"
BODY = "viewer.html"
CHUNK_BYTES = 2**18
"""How much detail is compressed together, before compression: opened at once, and small beside a thousand rollouts."""


def write_page(
    records: Iterable[Record], path: str | os.PathLike[str], *, title: str = "rollouts", check: bool = True
) -> int:
    """Write one HTML file that shows ``records``; gives how many there were.

    ``check`` verifies each record and shows what is wrong with it. Records are taken one at a time, so there
    may be more than memory holds. The file takes its name when it is whole.

    Raises OSError where the file cannot be written.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            count = _write(file, records, title, check)
        mask = os.umask(0o022)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return count


def _write(file: IO[str], records: Iterable[Record], title: str, check: bool) -> int:
    script = "\n".join(["'use strict';", "(() => {", *map(_asset, SCRIPTS), "})();"])
    style = _asset(STYLE)
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:;"
        " base-uri 'none'; form-action 'none'"
    )
    file.write("<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n")
    file.write(f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n')
    file.write(
        '<meta name=viewport content="width=device-width, initial-scale=1">\n<meta name=referrer content=no-referrer>\n'
    )
    file.write(f"<title>{html.escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n{_asset(BODY)}")
    summaries: list[list[Any]] = []
    sizes = []
    for number, chunk in enumerate(_chunks(records, summaries, check)):
        sizes.append(len(chunk))
        file.write(_data(f"chunk-{number}", chunk))
    index = {"title": title, "checked": check, "columns": SUMMARY_COLUMNS, "chunks": sizes, "rows": summaries}
    file.write(_data("index", index))
    file.write(f"<script>{script}</script>\n</body>\n</html>\n")
    return len(summaries)


def _chunks(records: Iterable[Record], summaries: list[list[Any]], check: bool) -> Iterator[list[msgspec.Raw]]:
    """Details by the chunk, their lines added to ``summaries``."""
    chunk: list[msgspec.Raw] = []
    size = 0
    for record in records:
        violations = list(verify(record)) if check else []
        summaries.append(summary(record, violations))
        encoded = msgspec.json.encode(detail(record, violations))
        chunk.append(msgspec.Raw(encoded))
        size += len(encoded)
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _data(name: str, value: Any) -> str:
    compressed = gzip.compress(msgspec.json.encode(value), compresslevel=6, mtime=0)
    return f"<script type=application/octet-stream id={name}>{base64.b64encode(compressed).decode()}</script>\n"


def _asset(name: str) -> str:
    return resources.files("midstream.viewer").joinpath("assets", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
