"""Where the processes of a family work, each in a place of its own, as their warden sees it.

With namespaces the places are roots (:class:`Roots`), without them folders (:mod:`midstream.sandbox.inside.trees`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection
from typing import Protocol, TypeVar

from midstream.sandbox.inside import inspection
from midstream.sandbox.isolation.roots import WORKING_DIRECTORY, Root
from midstream.sandbox.isolation.supervision import Listener, Waiting


class Refused(Exception):
    """A clone cannot be; the message says why."""


class Place(Protocol):
    """The place of one process.

    ``files``: its working directory, as the warden finds it. ``home``: the same, as the process does. ``shared``:
    the same, as the host does, where it lies on a disk that it shares with others.
    """

    @property
    def files(self) -> str: ...

    @property
    def home(self) -> str: ...

    @property
    def shared(self) -> str | None: ...

    def open(self) -> int:
        """A descriptor, to be closed by the caller, of what a clone moves into."""
        ...

    def remove(self) -> None:
        """Its process is gone."""
        ...


P = TypeVar("P", bound=Place)


class Ground(Protocol[P]):
    """All places of one family, and the way from one into another."""

    follows: bool
    """Whether a parent has to move too, out of reach of its clones' places, before they go on."""

    def first(self) -> P:
        """The place of the family's first process."""
        ...

    def prepare(self, parent: P, /) -> P:
        """An empty place for a clone of the process at ``parent``. Raises Refused."""
        ...

    def stand_in(self, parent: P, /) -> tuple[P, P]:
        """Places for an exact copy of the process at ``parent``, and for that while it stands still.

        One of the two is ``parent``, the other one empty.
        """
        ...

    def take_back(self, still: P, /) -> tuple[P, bool]:
        """The copy is gone: the place of the process that stood still, and whether its open files have moved."""
        ...

    def discard(self, place: P, /) -> None:
        """Remove a place in which no process has come to live."""
        ...

    def part(self, parent: P, /) -> None:
        """The process at ``parent`` is about to move on."""
        ...

    def lead(self, listener: Listener, waiting: Waiting, place: P, /) -> bool:
        """Grant a system call that a process makes on its way to ``place``; whether it is one of these."""
        ...

    def has_arrived(self, process: int, place: P, /) -> bool:
        """Whether a clone, stopped, is in its place and nowhere else."""
        ...

    def has_parted(self, process: int, parent: P, /) -> bool:
        """Whether a parent, stopped, has moved on."""
        ...

    def outside(self, process: int, place: P, /) -> list[int]:
        """Its open descriptors that lead to others' places."""
        ...

    def open_up(self, place: P, /) -> None:
        """Everybody has moved: make a clone's place usable."""
        ...

    def acting(self) -> contextlib.AbstractContextManager[None]:
        """Within this the warden may look into its family's processes, and change their limits."""
        ...

    def is_written_to(self, device: int, path: str, /) -> bool:
        """Whether processes of the family can write to the file ``path``, on ``device``, that one has mapped."""
        ...

    def strangers(self, members: Collection[int], /) -> set[int]:
        """Processes that came from ``members`` and are none of them."""
        ...

    def close(self) -> None:
        """The warden ends: leave no process and no folder."""
        ...


class Roots:
    """A root for each, in a mount namespace that they share; there is a process namespace around them."""

    follows = False

    def __init__(self, number: int | None, size: int, files: int) -> None:
        self._shape = (number, size, files)
        self._devices: set[int] = set()

    def first(self) -> Root:
        root = Root(*self._shape)
        # A number that is free again and taken by another file system makes for a refusal at the worst.
        self._devices.add(root.device)
        return root

    def prepare(self, _parent: Root) -> Root:
        return self.first()

    def stand_in(self, parent: Root) -> tuple[Root, Root]:
        return self.first(), parent

    def take_back(self, still: Root) -> tuple[Root, bool]:
        return still, False

    def discard(self, place: Root) -> None:
        place.remove()

    def part(self, _parent: Root) -> None:
        raise AssertionError("parents stay in their roots")

    def lead(self, listener: Listener, waiting: Waiting, _place: Root) -> bool:
        if waiting.calls("capset") or waiting.calls("chroot"):
            listener.proceed(waiting)
            return True
        return False

    def has_arrived(self, process: int, place: Root) -> bool:
        return (
            os.stat(f"/proc/{process}/cwd").st_dev == place.device
            and os.stat(f"/proc/{process}/root{WORKING_DIRECTORY}").st_dev == place.device
        )

    def has_parted(self, _process: int, _parent: Root) -> bool:
        raise AssertionError("parents stay in their roots")

    def outside(self, _process: int, _place: Root) -> list[int]:
        return []

    def open_up(self, _place: Root) -> None:
        """It is."""

    def acting(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def is_written_to(self, device: int, _path: str) -> bool:
        return device in self._devices

    def strangers(self, members: Collection[int]) -> set[int]:
        return inspection.processes() - set(members)

    def close(self) -> None:
        """The namespaces end with the warden, which is process 1, and all that is in them."""
