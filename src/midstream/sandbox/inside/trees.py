"""Places of a family's processes where there are no namespaces: folders, and Landlock between them.

What Landlock has once let a process have it can only take away. So a process starts with a tree that is deep
from the beginning, its working directory at the very bottom. When it is cloned, its clones' trees are put into
the topmost folder that it still has; and before that, it is fenced into the next one below, and each clone
into the tree that will be its own. Nobody's path changes by that but the clones'.

    family/ top/ d/ d/ ... files        a process that was never cloned has top, and all in it
    family/ top/ d/ d/ ... files        after the first time it has the next; and in top there are
                 3f6c.../ d/ ... files  its clones' trees, each with one folder less

Each time takes a layer of Landlock, of which the kernel gives a process and its descendants sixteen.
The warden, which is bound by none of this, moves the folders. It looks into the processes of the family with
their user id, if they have one of their own, and answers for all descendants of the family as their reaper.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
from collections.abc import Callable, Collection

from midstream.sandbox.inside import folders, inspection
from midstream.sandbox.inside.grounds import Refused
from midstream.sandbox.isolation import identity
from midstream.sandbox.isolation.landlock import Ruleset
from midstream.sandbox.isolation.supervision import Listener, Waiting

# Nobody can list the folders above a working directory, nor put anything into them.
_CLOSED = 0o111
_OPEN = 0o711
_BELOW = "d"


class Tree:
    """The folders of one process. ``levels``: how often it, and with it its clones, can be cloned."""

    def __init__(self, top: str, final: str, levels: int, owner: int | None) -> None:
        self.levels = levels
        self.fence: str | None = top  # what it is to be fenced into, unless it is
        self.depth = 0
        self._top, self._final = top, final
        self._down = [f"/{_BELOW}" * depth for depth in range(levels + 1)]
        for down in self._down:
            os.mkdir(top + down, _OPEN)
        os.mkdir(self.files, 0o700)
        if owner is not None:
            os.chown(self.files, owner, owner)
        for down in reversed(self._down[1:]):
            os.chmod(top + down, _CLOSED)

    @property
    def files(self) -> str:
        return f"{self._top}{self._down[-1]}/files"

    @property
    def home(self) -> str:
        return f"{self._final}{self._down[-1]}/files"

    @property
    def shared(self) -> str | None:
        return self.home

    @property
    def own(self) -> str:
        """The topmost folder that its process still has."""
        return self._top + self._down[self.depth]

    def open(self) -> int:
        return os.open(self.files, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def open_up(self) -> None:
        """Move it to where its process may work in it."""
        if self._top != self._final:
            above = os.path.dirname(self._final)
            os.chmod(above, _OPEN)
            try:
                os.rename(self._top, self._final)
            finally:
                os.chmod(above, _CLOSED)
            self._top = self._final
        os.chmod(self._top, _CLOSED)

    def remove(self) -> None:
        """What lies in it. The folders above stay: trees of its clones may hang from them."""
        folders.remove_tree(self.files)

    def discard(self) -> None:
        folders.remove_tree(self._top)


class Backup:
    """The files of a process that stands still, while its copy works in its tree, with its paths."""

    def __init__(self, path: str, tree: Tree, owner: int | None) -> None:
        self.files, self._tree, self.home, self.shared = path, tree, tree.home, tree.shared
        os.mkdir(path, 0o700)
        if owner is not None:
            os.chown(path, owner, owner)

    def open(self) -> int:
        raise AssertionError("nobody moves in here")

    def take_back(self) -> Tree:
        """Put them where the copy's files are."""
        where, away = self._tree.files, f"{self.files}-old"
        above = os.path.dirname(where)
        os.chmod(above, _OPEN)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.rename(where, away)
            os.rename(self.files, where)
        finally:
            os.chmod(above, _CLOSED)
        folders.remove_tree(away)
        return self._tree

    def remove(self) -> None:
        folders.remove_tree(self.files)

    discard = remove


class Trees:
    """The trees of a family, in ``folder``. ``ruleset``: what a process may open that works in a folder."""

    follows = True

    def __init__(self, folder: str, number: int | None, levels: int, ruleset: Callable[[str], Ruleset]) -> None:
        self._folder = os.path.realpath(folder)  # as the kernel tells paths
        self._number = number
        self._levels = levels
        self._ruleset = ruleset

    def first(self) -> Tree:
        top = f"{self._folder}/top"
        tree = Tree(top, top, self._levels, self._number)
        tree.open_up()
        tree.fence = None  # it puts that on itself, before any of the code's
        return tree

    def prepare(self, parent: Tree) -> Tree:
        if parent.depth == parent.levels:
            raise Refused(
                f"without namespaces, a session and what it was forked from can be forked {self._levels} times together"
            )
        name = secrets.token_hex(8)  # siblings could look whether a file exists whose path they know
        return Tree(f"{self._folder}/{name}", f"{parent.own}/{name}", parent.levels - parent.depth - 1, self._number)

    def stand_in(self, parent: Tree) -> tuple[Tree, Backup]:
        return parent, Backup(f"{self._folder}/{secrets.token_hex(8)}", parent, self._number)

    def take_back(self, still: Tree | Backup) -> tuple[Tree, bool]:
        return (still.take_back(), True) if isinstance(still, Backup) else (still, False)

    def discard(self, place: Tree | Backup) -> None:
        place.discard()

    def part(self, parent: Tree) -> None:
        parent.depth += 1
        parent.fence = parent.own

    def lead(self, listener: Listener, waiting: Waiting, place: Tree) -> bool:
        """Have it fenced. It names a descriptor, and what it names is replaced by a ruleset of the warden's.

        Nobody can change that any more if the thread that asks, which waits, is the only one.
        """
        descriptor, flags, *_ = waiting.arguments
        if not waiting.calls("landlock_restrict_self") or flags:
            return False
        if place.fence is None:  # an exact copy has no other's place to be kept from
            listener.answer(waiting)
            return True
        if _threads(waiting.process) > 1:
            raise Refused("its code has threads running")
        ruleset = self._ruleset(place.fence)
        try:
            listener.give(waiting, ruleset.descriptor, descriptor)
        finally:
            os.close(ruleset.descriptor)
        place.fence = None
        listener.proceed(waiting)
        return True

    def has_arrived(self, process: int, place: Tree) -> bool:
        with self.acting():
            found = os.stat(f"/proc/{process}/cwd")
        return place.fence is None and os.path.samestat(found, os.stat(place.files))

    def has_parted(self, process: int, parent: Tree) -> bool:
        return parent.fence is None and _threads(process) == 1

    def outside(self, process: int, place: Tree) -> list[int]:
        """Descriptors of folders above: the names in them could be read by way of these."""
        found = []
        with self.acting():
            for number in inspection.open_files(process):
                target = os.readlink(f"/proc/{process}/fd/{number}")
                if f"{target}/".startswith(f"{self._folder}/") and not f"{target}/".startswith(f"{place.files}/"):
                    found.append(number)
        return found

    def open_up(self, place: Tree) -> None:
        place.open_up()

    def acting(self) -> contextlib.AbstractContextManager[None]:
        return identity.acting_as(self._number)

    def is_written_to(self, _device: int, path: str) -> bool:
        return path.startswith(f"{self._folder}/")

    def strangers(self, members: Collection[int]) -> set[int]:
        families = (*members, os.getpid())
        return {child for member in families for child in inspection.children(member)} - set(members)

    def close(self) -> None:
        """Kill everybody, as often as that brings forth descendants that were others' children; then clear up."""
        while True:
            for process in inspection.children(os.getpid()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                break
        folders.remove_tree(self._folder)


def _threads(process: int) -> int:
    return int(inspection.status(process)["Threads"])
