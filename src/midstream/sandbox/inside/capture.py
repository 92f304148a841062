"""What a block prints, whoever prints it: Python's streams, and C code that writes to descriptors 1 and 2."""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import fcntl
import io
import os
import select
import threading
from collections.abc import Iterable, Iterator

from midstream.sandbox.text import omission

_READ_BYTES = 1 << 16


class Capture:
    """The output of one block, bounded: its head and its tail are kept, the middle is counted."""

    def __init__(self, maximum_characters: int) -> None:
        self._maximum = maximum_characters
        self._half = maximum_characters // 2
        self._lock = threading.Lock()
        self._pipe = DescriptorPipe()
        self.clear()

    def clear(self) -> None:
        """Begin a block. What threads of an earlier one printed since belongs to this one."""
        self._head = ""
        self._parts: list[str] = []
        self._length = 0
        self._dropped = 0

    def connect(self) -> None:
        """Catch what this process writes to descriptors 1 and 2, which lead nowhere so far."""
        self._pipe.close()
        self._pipe = DescriptorPipe()
        self._pipe.open()

    def write(self, text: str) -> None:
        # "\n" is what print() writes last: asking the pipe once for each print is enough.
        if text != "\n" and self._pipe.waiting():
            self._add(self._pipe.drain())
        self._add(text)

    def write_line(self, text: str) -> None:
        """A line of its own, whatever was printed before."""
        if self._pipe.waiting():
            self._add(self._pipe.drain())
        begun = self._parts[-1] if self._parts else self._head
        self._add(f"{text}\n" if not begun or begun.endswith("\n") else f"\n{text}\n")

    def _add(self, text: str) -> None:
        if not text:
            return
        with self._lock:
            self._parts.append(text)
            self._length += len(text)
            if self._length > 2 * self._maximum:
                self._compact()

    def _compact(self) -> None:
        text = "".join(self._parts)
        if not self._head:
            self._head, text = text[: self._half], text[self._half :]
        tail = self._maximum - self._half
        self._dropped += max(0, len(text) - tail)
        text = text[-tail:]
        self._parts, self._length = [text], len(text)

    def finish(self) -> tuple[str, bool]:
        """All that was printed, and whether some of it is missing."""
        _flush_c_streams()
        if self._pipe.waiting():
            self._add(self._pipe.drain())
        with self._lock:
            if len(self._head) + self._length > self._maximum:
                self._compact()
            text = "".join(self._parts)
            gap = omission(self._dropped) if self._dropped else ""
            text = self._head + gap + text
        return text, self._dropped > 0 or self._pipe.take_overflow()


class DescriptorPipe:
    """Stands behind descriptors 1 and 2. Full, it refuses more instead of stopping the writer for good."""

    def __init__(self) -> None:
        self._source = -1
        self._capacity = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._poll = select.poll()
        self._overflow = False

    def open(self) -> None:
        """Take the place of both descriptors."""
        self._source, sink = os.pipe()
        os.set_blocking(self._source, False)
        os.set_blocking(sink, False)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        os.close(sink)
        self._capacity = fcntl.fcntl(self._source, 1032)  # F_GETPIPE_SZ
        self._poll.register(self._source, select.POLLIN)

    def close(self) -> None:
        """Give the reading end back."""
        with contextlib.suppress(OSError):
            os.close(self._source)

    def waiting(self) -> bool:
        try:
            return bool(self._poll.poll(0))
        except OSError:
            return False

    def drain(self) -> str:
        text, size = "", 0
        while size < self._capacity:
            try:
                data = os.read(self._source, _READ_BYTES)
            except OSError:  # empty, or closed by the code
                break
            if not data:
                break
            size += len(data)
            text += self._decoder.decode(data)
        self._overflow = self._overflow or size >= self._capacity
        return text

    def take_overflow(self) -> bool:
        overflow, self._overflow = self._overflow, False
        return overflow


class OutputStream(io.TextIOBase):
    """``sys.stdout`` or ``sys.stderr`` of a session."""

    mode = "w"
    line_buffering = True

    def __init__(self, capture: Capture, descriptor: int, name: str) -> None:
        self._capture = capture
        self._descriptor = descriptor
        self.name = name
        self._bytes = _ByteStream(self)

    @property
    def encoding(self) -> str:  # type: ignore[override]  # typeshed has attributes, io has properties
        return "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        return "backslashreplace"

    @property
    def buffer(self) -> _ByteStream:
        return self._bytes

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        self._capture.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:  # type: ignore[override]
        for line in lines:
            self.write(line)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return False

    def reconfigure(self, **settings: object) -> None:
        """Accepted and ignored: the text goes to the host as it is."""

    def close(self) -> None:
        """Ignored: the stream outlives what the code does to it."""


class _ByteStream(io.RawIOBase):
    """``sys.stdout.buffer``."""

    def __init__(self, stream: OutputStream) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def write(self, data: object) -> int:
        view = memoryview(data)  # type: ignore[arg-type]  # what is no buffer raises the right TypeError
        self._stream.write(self._decoder.decode(bytes(view)))
        return view.nbytes

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._stream.fileno()

    def close(self) -> None:
        """Ignored, as for the stream itself."""


class NoInput(io.TextIOBase):
    """``sys.stdin`` of a session: at its end from the start, so that ``input()`` raises EOFError."""

    name = "<stdin>"
    mode = "r"

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"

    def read(self, _size: int | None = -1, /) -> str:
        return ""

    def readline(self, _size: int = -1, /) -> str:  # type: ignore[override]
        return ""

    def __iter__(self) -> Iterator[str]:  # type: ignore[override]
        return iter(())

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 0

    def isatty(self) -> bool:
        return False

    def close(self) -> None:
        """Ignored: ``exit()`` closes the input on its way."""


_fflush = ctypes.CDLL(None).fflush


def _flush_c_streams() -> None:
    _fflush(None)
