"""Landlock: what a process may open, however it names it.

The rules are those of ``Documentation/userspace-api/landlock.rst`` in the kernel. Landlock says nothing on
``stat``, ``chmod``, ``chown`` and ``utime``, before ABI 3 on truncation, and before ABI 4 on sockets: the
system call filter denies those.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
from collections.abc import Iterable

from midstream.sandbox.isolation import kernel

EXECUTE = 1 << 0
WRITE_FILE = 1 << 1
READ_FILE = 1 << 2
READ_DIRECTORY = 1 << 3
MAKE_CHARACTER_DEVICE = 1 << 6
MAKE_SOCKET = 1 << 9
MAKE_FIFO = 1 << 10
MAKE_BLOCK_DEVICE = 1 << 11
MAKE_SYMLINK = 1 << 12
TRUNCATE = 1 << 14
IOCTL_DEVICE = 1 << 15

# How many access rights each ABI knows. Later ABIs know more of them than are used here.
_RIGHTS_BY_ABI = {1: 13, 2: 14, 3: 15, 4: 15}
_ALL_RIGHTS = 16

_MANY_LAYERS = 64  # the kernel's own bound is 16 so far

_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1
_NETWORK_RIGHTS = 0b11
_SCOPES = 0b11

_ON_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEVICE
_NEVER = EXECUTE | MAKE_CHARACTER_DEVICE | MAKE_SOCKET | MAKE_FIFO | MAKE_BLOCK_DEVICE | MAKE_SYMLINK | IOCTL_DEVICE

READ = READ_FILE | READ_DIRECTORY


def abi() -> int:
    """The version of Landlock here, 0 where there is none."""
    try:
        return kernel.system_call("landlock_create_ruleset", 0, 0, _CREATE_RULESET_VERSION)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
            return 0
        raise


def layers_left(version: int) -> int:
    """How many rulesets could be enforced on this process, one after another: found by doing so in a child."""

    def pile() -> int:
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        ruleset = Ruleset(version)
        for count in range(_MANY_LAYERS):
            try:
                kernel.system_call("landlock_restrict_self", ruleset.descriptor, 0)
            except OSError:
                return count
        return _MANY_LAYERS

    return kernel.count_in_child(pile)


def handled(version: int) -> int:
    """The rights that a ruleset of this ABI takes away unless a rule gives them."""
    return int((1 << _RIGHTS_BY_ABI.get(version, _ALL_RIGHTS)) - 1)


def rule(version: int, descriptor: int, rights: int) -> bytes:
    """Gives ``rights`` on what an (``O_PATH``) descriptor names, and beneath it, in a ruleset of this ABI."""
    return _rule(handled(version), descriptor, rights)


def _rule(known: int, descriptor: int, rights: int) -> bytes:
    rights &= known
    if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
        rights &= _ON_FILES
    return struct.pack("=Qi", rights, descriptor)


class Ruleset:
    """A set of allowed folders and files, and then the point of no return."""

    def __init__(self, version: int) -> None:
        self._rights = handled(version)
        attributes = struct.pack(
            "=QQQ", self._rights, _NETWORK_RIGHTS if version >= 4 else 0, _SCOPES if version >= 6 else 0
        )
        size = 24 if version >= 6 else 16 if version >= 4 else 8
        buffer = ctypes.create_string_buffer(attributes, len(attributes))
        self.descriptor = kernel.system_call("landlock_create_ruleset", buffer, size, 0)

    def add(self, rules: Iterable[bytes]) -> None:
        """Give what these :func:`rule` s give."""
        for one in rules:
            kernel.system_call("landlock_add_rule", self.descriptor, _RULE_PATH_BENEATH, one, 0)

    def allow(self, descriptor: int, rights: int) -> None:
        """Give ``rights`` on what an (``O_PATH``) descriptor names, and beneath it."""
        self.add([_rule(self._rights, descriptor, rights)])

    def allow_working_in(self, path: str) -> None:
        """Everything but programs, devices, sockets, FIFOs and symbolic links."""
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            self.allow(descriptor, self._rights & ~_NEVER)
        finally:
            os.close(descriptor)

    def enforce(self) -> None:
        """Bind the calling thread, and whatever it starts, for good. Needs ``no_new_privs``."""
        try:
            kernel.system_call("landlock_restrict_self", self.descriptor, 0)
        finally:
            os.close(self.descriptor)
