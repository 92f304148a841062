"""What a session's files take together, where its working directory lies on a disk that it shares with others.

Nothing in the kernel bounds that there, so the host looks: while a block runs, now and then, and when it is over.
A look goes no further than the limits, however much there is.
"""

from __future__ import annotations

import os
import time

from midstream.sandbox.limits import SandboxLimits

_SECONDS_BETWEEN = 0.5
_SHARE = 50
"""Looking takes at most one part in so many of the time."""

_BLOCK = 512


class Quota:
    """Watches one working directory. Whatever its code does meanwhile, it can only misstate its own use."""

    def __init__(self, folder: str, limits: SandboxLimits) -> None:
        self._folder = folder
        self._limits = limits
        self._bytes = limits.working_directory
        self._files = limits.files
        self._empty_since: int | None = None
        self._over = False
        self.next_look = 0.0

    def for_copy(self, folder: str) -> Quota:
        """That of a copy of the session, which has gone as far as this one."""
        quota = Quota(folder, self._limits)
        quota._over = self._over
        return quota

    def begin(self, now: float) -> None:
        """A block begins."""
        self.next_look = now + _SECONDS_BETWEEN

    def look_if_due(self, now: float) -> str | None:
        """The limit that is exceeded, ``working_directory`` or ``files``, if it is time to look."""
        if now < self.next_look:
            return None
        limit = self._look()
        took = time.monotonic() - now
        self.next_look = now + max(_SECONDS_BETWEEN, _SHARE * took)
        return limit

    def end(self) -> tuple[str | None, bool]:
        """A block is over: the limit that is exceeded, and whether one was when the block before it was over."""
        before, limit = self._over, self._look()
        self._over = limit is not None
        return limit, before and self._over

    def _look(self) -> str | None:
        try:
            changed = os.stat(self._folder).st_mtime_ns
        except OSError:
            return None
        if changed == self._empty_since:
            return None
        files, taken, whole = self._walk()
        self._empty_since = changed if whole and not files else None
        if taken > self._bytes:
            return "working_directory"
        return None if whole else "files"

    def _walk(self) -> tuple[int, int, bool]:
        """Files and folders, bytes on disk, and whether that is all; no further than the limits."""
        files, taken = 0, 0
        waiting = [self._folder]
        while waiting:
            try:
                with os.scandir(waiting.pop()) as entries:
                    for entry in entries:
                        files += 1
                        taken += _bytes_of(entry)
                        if entry.is_dir(follow_symlinks=False):
                            waiting.append(entry.path)
                        if files > self._files or taken > self._bytes:
                            return files, taken, False
            except PermissionError:
                continue  # closed to its own code as well
            except FileNotFoundError:
                continue  # removed meanwhile
            except OSError:  # deeper than a path is long
                return files, taken, False
        return files, taken, True


def _bytes_of(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat(follow_symlinks=False).st_blocks * _BLOCK
    except OSError:
        return 0
