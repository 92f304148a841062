"""A root of its own for each process of a family that shares one mount namespace.

A process can leave a mount namespace only by itself, and never once it is confined; its root it can be
given. So the processes of a family see the same read-only files as every session, through roots that differ
in the working directory alone, and no root can be reached from another.
"""

from __future__ import annotations

import os

from midstream.sandbox.isolation import namespaces

# One level below the folder that is the same in all roots: Landlock takes no notice of a rule on the very
# folder that something is mounted on, but of rules on the folders above.
WORKING_DIRECTORY = namespaces.WORKING_DIRECTORY + "/files"

_TEMPLATE = namespaces.FAMILY + "/template"


def prepare() -> None:
    """In process 1 of a new process namespace: enter a mount namespace, and make a root to make others from.

    ``/proc`` is then that of the process namespace. Raises :class:`OSError` where that cannot be had.
    """
    namespaces.unshare_mounts()
    namespaces.mount_memory(namespaces.FAMILY, "size=1m,mode=700")
    os.mkdir(_TEMPLATE, 0o755)
    namespaces.bind("/", _TEMPLATE)
    namespaces.unmount(_TEMPLATE + namespaces.FAMILY)
    namespaces.mount_memory(_TEMPLATE + "/proc", "size=4k,nr_inodes=1,mode=755")
    namespaces.mount_memory(_TEMPLATE + namespaces.WORKING_DIRECTORY, "size=16k,nr_inodes=4,mode=755")
    os.mkdir(_TEMPLATE + WORKING_DIRECTORY, 0o755)
    for path in ("/proc", namespaces.WORKING_DIRECTORY):
        namespaces.make_read_only(_TEMPLATE + path)
    namespaces.mount_processes("/proc")


class Root:
    """The root of one process, with the working directory ``files`` in it, on ``device``.

    It is mounted nowhere: who stands in it finds no folder above it, and so no other root. ``descriptor``
    holds it together.
    """

    def __init__(self, number: int | None, size: int, files: int) -> None:
        building = f"{namespaces.FAMILY}/new"
        os.makedirs(building, 0o755, exist_ok=True)
        namespaces.bind(_TEMPLATE, building)
        try:
            namespaces.mount_working_directory(building + WORKING_DIRECTORY, number, size, files)
            self.descriptor = namespaces.detached_copy(building)
        finally:
            namespaces.unmount(building)
        self.path = f"/proc/self/fd/{self.descriptor}"
        self.files = self.path + WORKING_DIRECTORY
        self.home = WORKING_DIRECTORY
        self.shared: str | None = None
        self.device = os.stat(self.files).st_dev

    def open(self) -> int:
        """A descriptor to reach it by."""
        return os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def remove(self) -> None:
        """Let go of it. What lies in it is gone as soon as no process looks at it any more."""
        os.close(self.descriptor)
