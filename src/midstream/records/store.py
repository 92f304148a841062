"""Trajectories in a file: JSON Lines, one finished trajectory a line, each durable as soon as it is written.

A process may be killed at any moment. What it leaves is whole lines and perhaps the beginning of one more;
:class:`RecordWriter` cuts that off when it opens the file again, and says what is done already.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO

from midstream.errors import RecordError
from midstream.records.schema import FIRST_BYTES, Record, decode_record

logger = logging.getLogger(__name__)

Key = tuple[str | None, int]
"""A prompt's id and a sample's number."""


def read_records(path: str | os.PathLike[str]) -> Iterator[Record]:
    """The records of a file, one after the other; line ``n`` (from 1) is the ``n``-th.

    Raises :class:`~midstream.errors.RecordError`, naming file, line and field, at the first line that is no
    record, and where the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            yield from _records(os.fspath(path), file)
    except OSError as error:
        raise RecordError(f"{os.fspath(path)}: cannot be read ({error.strerror})") from error


def _records(name: str, file: IO[bytes]) -> Iterator[Record]:
    for number, line in enumerate(file, start=1):
        try:
            yield decode_record(line.rstrip(b"\r\n"))
        except RecordError as error:
            if not line.endswith(b"\n") and is_torn(line):
                raise RecordError(
                    f"{name}:{number}: the last line is unfinished: its writer was stopped, or is still writing"
                ) from error
            raise RecordError(f"{name}:{number}: {error}") from error


def is_torn(line: bytes) -> bool:
    """Whether ``line``, the end of a file, may be the beginning of a record that was never finished.

    A power failure may leave zeros where the bytes never reached the disk.
    """
    first = line[: len(FIRST_BYTES)].rstrip(b"\0")
    return FIRST_BYTES.startswith(first)


class RecordWriter:
    """Appends records to a file that may exist already, each durable when :meth:`append` returns.

    Opening locks the file against every other writer, cuts off the beginning of a record that a killed
    writer left at the end, and gives each record that is there to ``known`` (which may refuse it by raising:
    then nothing is changed). Records of which ``again`` says that they are to be made again are taken out;
    :attr:`taken_out` holds their keys, :attr:`done` those of all records in the file. A file that holds
    anything but records is left as it is.

    Raises :class:`~midstream.errors.RecordError` where another writer has the file, where a line is no
    record, and where the file cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        known: Callable[[Record], None] | None = None,
        again: Callable[[Record], bool] | None = None,
    ) -> None:
        self.path = Path(path)
        self.done: set[Key] = set()
        self.taken_out: set[Key] = set()
        self._file = -1
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._lock()
            self._read(known, again)
            if self.taken_out:
                self._keep_done()
            self._sync_folder()
        except OSError as error:
            self.close()
            raise RecordError(f"{self.path}: cannot be written ({error.strerror})") from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def append(self, record: Record) -> None:
        """Write one record and wait until the disk has it.

        Raises :class:`~midstream.errors.RecordError` where its key is in the file already, and where the
        disk does not take it whole; then nothing of it stays in the file.
        """
        if self._file < 0:
            raise RecordError(f"{self.path}: the writer is closed")
        if record.prompt.id is not None and record.key in self.done:
            raise RecordError(f"{self.path}: prompt {record.prompt.id!r} sample {record.sample} is there already")
        line = record.encode() + b"\n"
        end = os.fstat(self._file).st_size
        try:
            # One call for all of it, so that a kill seldom leaves half a line. A full disk may take a part.
            written = os.write(self._file, line)
            while written < len(line):
                written += os.write(self._file, line[written:])
            os.fsync(self._file)
        except OSError as error:
            self._cut_back(end)
            raise RecordError(f"{self.path}: a record could not be written ({error.strerror})") from error
        except BaseException:  # an interrupt: what is whole stays
            if os.fstat(self._file).st_size < end + len(line):
                self._cut_back(end)
            raise
        self.done.add(record.key)

    def close(self) -> None:
        """Give the file back. May be called twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _lock(self) -> None:
        self._lock_file()
        if not os.path.samestat(os.fstat(self._file), os.stat(self.path)):  # replaced while we came for the lock
            raise RecordError(f"{self.path}: another process is writing this file")

    def _lock_file(self) -> None:
        import fcntl  # not on every platform; the package imports on all

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise RecordError(f"{self.path}: another process is writing this file") from error

    def _read(self, known: Callable[[Record], None] | None, again: Callable[[Record], bool] | None) -> None:
        """Take in what is there; finish or cut off its last line where a writer was stopped within it."""
        end = 0
        line = b"\n"  # of an empty file
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    record = decode_record(line.rstrip(b"\r\n"))
                except RecordError as error:
                    if line.endswith(b"\n") or not is_torn(line):
                        raise RecordError(f"{self.path}:{number}: {error}") from error
                    logger.warning("%s:%d: cut off an unfinished record of %d bytes", self.path, number, len(line))
                    os.ftruncate(self._file, end)
                    os.fsync(self._file)
                    return
                if known is not None:
                    known(record)
                (self.taken_out if again is not None and again(record) else self.done).add(record.key)
                end += len(line)
        if not line.endswith(b"\n"):  # all of the record but its newline was written
            os.write(self._file, b"\n")
            os.fsync(self._file)

    def _keep_done(self) -> None:
        """Put a file in this one's place that lacks what was taken out: all at once, whenever we are killed."""
        place = self.path.resolve()  # behind a link, where there is one
        new = place.with_name(f".{place.name}.new")  # ours alone, by the lock
        file = os.open(new, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        old, self._file = self._file, file
        try:
            self._lock_file()
            with open(self.path, "rb") as lines, open(file, "ab", closefd=False) as kept:
                for line in lines:
                    if decode_record(line.rstrip(b"\r\n")).key in self.done:
                        kept.write(line)
            os.fchmod(file, stat.S_IMODE(os.fstat(old).st_mode))
            os.fsync(file)
            os.replace(new, place)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
        finally:
            os.close(old)

    def _cut_back(self, end: int) -> None:
        try:
            os.ftruncate(self._file, end)
        except OSError:  # the next writer repairs it; the error that led here is the one to tell
            logger.warning("%s: the beginning of an unwritten record stays at its end", self.path)

    def _sync_folder(self) -> None:
        """Make the file's name durable: a new file is lost with its folder's entry."""
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
