"""Where public data sets lie that are not part of this repository."""

from __future__ import annotations

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


class DataMissing(Exception):
    """A data set is not on this machine; the message says which, and where it was looked for."""


def data_file(name: str) -> Path:
    """The file of that name in the folder that MIDSTREAM_DATA names, by default ``../shared/data``.

    Raises :class:`DataMissing` where it is not there.
    """
    folder = Path(os.environ.get("MIDSTREAM_DATA") or REPOSITORY.parent / "shared" / "data")
    path = folder / name
    if not path.is_file():
        raise DataMissing(f"{name} is not in {folder} (MIDSTREAM_DATA names the folder)")
    return path
