"""All layers of isolation of a session, in the one order in which they can be put on."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import sysconfig
from collections.abc import Iterable
from typing import Any

from midstream.sandbox.inside import folders, trees
from midstream.sandbox.isolation import (
    cgroups,
    identity,
    kernel,
    landlock,
    limits,
    namespaces,
    roots,
    seccomp,
    supervision,
)

_READABLE_FOLDERS = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo")
_READABLE_FILES = ("/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/dev/zero")


_MOST_GENERATIONS = 32
_NO_LISTENER = {
    errno.EBUSY: "this process is under a system call filter with a listener already, and the kernel takes but one",
    errno.EINVAL: "it needs Linux 5.19 or newer",
}


class LayerMissing(Exception):
    """A layer that was not declared dispensable does not hold here. The message names it."""


class ClonesImpossible(Exception):
    """Sessions cannot be cloned here. The message says why."""


class Confinement:
    """What the fork server finds out and enters once, and each session then puts on."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._limits = settings["limits"]
        self._landlock = landlock.abi()
        if kernel.machine() not in kernel.SYSTEM_CALLS:
            raise LayerMissing(f"syscalls: no table of system calls for {kernel.machine()} (x86-64 and aarch64 are)")
        # While the host's /proc, and its cgroups, are still to be seen.
        self.groups, self._memory_told = self._open_groups()
        base_memory = limits.address_space_in_use()
        readable = readable_paths(settings["readable"])
        ids = identity.free_ids()
        self._own_namespace, self._no_namespaces = self._enter_namespaces(settings, readable, ids)
        if not self._landlock and not self.namespaces and "filesystem" not in settings["allow_missing"]:
            raise LayerMissing(
                "filesystem: this kernel has no Landlock (it needs Linux 5.13 or newer, enabled at boot), "
                f"and there are no namespaces here ({self._no_namespaces})"
            )
        self._zygote = 0 if self.namespaces else os.getpid()
        self._readable = [os.open(path, os.O_PATH | os.O_CLOEXEC) for path in _outermost(readable)]
        self._filter = self._usable_filter(set(settings["allow_missing"]))
        self._null = os.open(os.devnull, os.O_PATH | os.O_CLOEXEC)
        self.clones: bool = settings["clones"]
        self.generations = 0
        if self.clones:
            self._prepare_clones()
        self.identity = identity.choose(
            ids, python_paths(), None if self.namespaces else settings["folder"], landlock=bool(self._landlock)
        )
        # What is the same for every session is put together once: each of them would wait for it.
        self._rules = self._common_rules()
        self._resources = limits.of_session(
            self._limits, base_memory=base_memory, own_identity=self.identity.own, family=self.clones
        )

    def _common_rules(self) -> list[bytes]:
        if not self._landlock:
            return []
        rules = [landlock.rule(self._landlock, descriptor, landlock.READ) for descriptor in self._readable]
        both = landlock.READ_FILE | landlock.WRITE_FILE
        return [*rules, landlock.rule(self._landlock, self._null, both)]

    def _open_groups(self) -> tuple[cgroups.Groups | None, str]:
        """Where to make memory cgroups, if that was asked for, and what there is to say of them."""
        try:
            groups = cgroups.open_groups()
        except (cgroups.NotDelegated, OSError) as error:
            if self._limits["resident_memory"] is not None:
                raise LayerMissing(f"resident_memory: no memory cgroup can be made here ({error})") from None
            return None, f"none can be made: {error}"
        if self._limits["resident_memory"] is None:
            groups.close()
            return None, ""
        return groups, ""

    def _prepare_clones(self) -> None:
        if self._filter is None:
            raise ClonesImpossible("this kernel takes no system call filters (seccomp)")
        self._supervising = seccomp.supervising_filter()
        self._supervised = seccomp.session_filter(None, self._landlock)

        def supervise() -> int:
            kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
            try:
                supervision.supervise(self._supervising)
            except OSError as error:
                return error.errno or errno.EPERM
            return 0

        number = kernel.count_in_child(supervise)
        if number:
            raise ClonesImpossible(
                _NO_LISTENER.get(number, f"system calls cannot be supervised: {os.strerror(number)}")
            )
        if not self.namespaces:
            if not self._landlock:
                raise ClonesImpossible("without namespaces, it needs Landlock")
            if not os.path.exists(f"/proc/self/task/{os.getpid()}/children"):
                raise ClonesImpossible("without namespaces, it needs a /proc that lists a process's children")
            # One is every session's own. Each folder of a deep tree takes its part of every path.
            self.generations = min(landlock.layers_left(self._landlock) - 1, _MOST_GENERATIONS)
            if self.generations < 1:
                raise ClonesImpossible("this process is under too many layers of Landlock already")

    def _usable_filter(self, allowed: set[str]) -> bytes | None:
        template = seccomp.filter_template(self._landlock)

        def install() -> None:
            kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
            seccomp.install(seccomp.filter_from(template, os.getpid()))

        if kernel.succeeds_in_child(install):
            return template
        lost = ("network", "processes", "signals")
        if not allowed.issuperset(lost):
            raise LayerMissing(f"{', '.join(lost)}: this kernel takes no system call filters (seccomp)")
        return None

    def _enter_namespaces(
        self, settings: dict[str, Any], readable: list[str], ids: tuple[int, int] | None
    ) -> tuple[int | None, str]:
        """A descriptor of this process's own namespace of processes, or None and why not."""
        if settings["isolation"] == "container":
            return None, "not asked for"
        folder, paths = settings["folder"], [*readable, os.devnull]
        reason = namespaces.works(folder, paths, ids)
        if reason is None:
            namespaces.enter(folder, paths, ids, lambda: folders.remove_tree(folder))
            return os.pidfd_open(os.getpid()), ""
        if settings["isolation"] == "full":
            raise LayerMissing(f"namespaces: {reason}")
        return None, reason

    @property
    def namespaces(self) -> bool:
        """Whether sessions have namespaces of their own, and with them their own working directories."""
        return self._own_namespace is not None

    def report(self) -> dict[str, Any]:
        """What the layers are made of here; what they are worth is found by trying."""
        return {
            "landlock": self._landlock,
            "filter": self._filter is not None,
            "namespaces": self.namespaces,
            "no_namespaces": self._no_namespaces,
            "no_memory_cgroup": self._memory_told,
            "memory_cgroups": self.groups is not None,
            "identity": self.identity.kind,
            "identity_detail": self.identity.detail,
        }

    def fork(self) -> int:
        """Fork a session's process: its id, and 0 in it."""
        if self._own_namespace is None:
            return os.fork()
        return namespaces.fork_apart(self._own_namespace)

    def enter_folder(self, folder: str | None, number: int | None) -> str:
        """Make the session's working directory the present one; its path, as the session sees it."""
        if folder is None:
            namespaces.enter_session(number, self._limits["working_directory"], self._limits["files"])
            folder = namespaces.WORKING_DIRECTORY
        os.chdir(folder)
        return folder

    def enter_place(self, place: roots.Root | trees.Tree) -> str:
        """The same in the first member of a family."""
        if isinstance(place, roots.Root):
            os.chroot(place.path)
        os.chdir(place.home)
        return place.home

    def working_area(self, home: str, place: roots.Root | trees.Tree | None) -> str:
        """The folder for the ruleset of a session that works in ``home``."""
        if isinstance(place, trees.Tree):
            return place.own
        # With a root, the folder above: it is in all roots of the family the same, and read-only.
        return home if place is None else os.path.dirname(home)

    @property
    def capabilities(self) -> frozenset[int]:
        """What sessions have in effect."""
        return identity.effective(self.identity.kind == "own, reading as root")

    @property
    def dormant(self) -> frozenset[int]:
        """What sessions that can be cloned could bring into effect, if their warden let them."""
        return frozenset({kernel.CAP_SYS_CHROOT}) if self.clones and self.namespaces else frozenset()

    def fence(self, folder: str) -> landlock.Ruleset:
        """The same, where it is known that there is Landlock."""
        ruleset = self.ruleset(folder)
        assert ruleset is not None
        return ruleset

    @property
    def descriptors(self) -> set[int]:
        """What :meth:`fence` needs open."""
        return {*self._readable, self._null}

    def ruleset(self, folder: str) -> landlock.Ruleset | None:
        """What a session that works in ``folder`` may open; to be made before descriptors are closed."""
        if not self._landlock:
            return None
        ruleset = landlock.Ruleset(self._landlock)
        ruleset.add(self._rules)
        ruleset.allow_working_in(folder)
        if self.namespaces:
            own = os.open("/proc", os.O_PATH | os.O_CLOEXEC)
            ruleset.allow(own, landlock.READ)
            os.close(own)
        return ruleset

    def enforce(
        self,
        ruleset: landlock.Ruleset | None,
        number: int | None,
        warden: socket.socket | None = None,
        its_warden: int = 0,
    ) -> None:
        """Put every layer on the calling process, for good.

        ``warden``: where to send the listener to; ``its_warden``: the process at the other end.
        """
        limits.enforce(self._resources)
        identity.become(number, reading=bool(self.capabilities), dormant=self.dormant)
        # After the change of user, which undoes both.
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        # The warden must be able to look into its family. Others do not see it, or Landlock keeps them out.
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0 if warden is None else 1)
        if os.getppid() != (self._zygote if warden is None else its_warden):
            os._exit(0)
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        if ruleset is not None:
            ruleset.enforce()
        if warden is not None:
            with warden:
                listener = supervision.supervise(self._supervising)
                socket.send_fds(warden, [b"listener"], [listener])
                os.close(listener)
            seccomp.install(self._supervised)
        elif self._filter is not None:
            seccomp.install(seccomp.filter_from(self._filter, os.getpid()))


def python_paths() -> list[str]:
    """Folders of the interpreter's own modules."""
    keys = ("stdlib", "platstdlib", "purelib", "platlib")
    found = [sysconfig.get_path(key) for key in keys] + sys.path
    return _existing(path for path in found if path)


def readable_paths(extra: list[str]) -> list[str]:
    """All that a session may read: Python, its modules, the libraries they load, and what the caller adds."""
    libraries = [os.path.dirname(path) for path in _mapped_files() if ".so" in os.path.basename(path)]
    searched = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    return _existing(
        [*python_paths(), *libraries, *filter(None, searched), *_READABLE_FOLDERS, *_READABLE_FILES, *extra]
    )


def _mapped_files() -> list[str]:
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as table:
        return [line.split(maxsplit=5)[5].rstrip("\n") for line in table if "/" in line]


def _existing(paths: Iterable[str]) -> list[str]:
    return sorted({os.path.abspath(path) for path in paths if path and os.path.exists(path)} - {"/"})


def _outermost(paths: Iterable[str]) -> list[str]:
    """Without what lies below another."""
    kept: list[str] = []
    for path in sorted({os.path.realpath(path) for path in paths}):
        if not any(path.startswith(other + "/") for other in kept):
            kept.append(path)
    return kept
