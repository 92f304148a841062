"""System calls that wait for another process's word: seccomp's user notifications.

A filter with a listener stops the caller of certain system calls until whoever holds the listener has
answered for the kernel, or told it to go on (``Documentation/userspace-api/seccomp_filter.rst``). Going on is
safe only for calls whose arguments are in registers: memory may change between the look and the call.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import struct
from dataclasses import dataclass

from midstream.sandbox.isolation import kernel, seccomp

# The kernel's linux/seccomp.h.
_NEW_LISTENER = 1 << 3
_WAIT_KILLABLE_RECV = 1 << 5
_RECEIVE = 0xC0502100
_SEND = 0xC0182101
_ADD_DESCRIPTOR = 0x40182103
_CONTINUE = 1
_AT_NUMBER = 1


@dataclass(frozen=True, slots=True)
class Waiting:
    """A thread that waits for its system call's answer. ``process``: its thread id."""

    key: int
    process: int
    number: int
    arguments: tuple[int, ...]

    def calls(self, name: str) -> bool:
        return self.number == kernel.SYSTEM_CALLS[kernel.machine()][name]


def supervise(program: bytes) -> int:
    """Install a filter whose notifications come to the descriptor that this returns.

    A caller that has been received can only be killed meanwhile, not interrupted. Raises :class:`OSError`
    with EINVAL before Linux 5.19, and with EBUSY where the process is supervised already.
    """
    return seccomp.install(program, _NEW_LISTENER | _WAIT_KILLABLE_RECV)


class Listener:
    """Answers the supervised system calls of a family of processes."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)

    def receive(self, seconds: float) -> Waiting | None:
        """The next waiting thread, or None if none comes in time or it is gone again."""
        ready = self._poll.poll(seconds * 1000)
        if not ready or not ready[0][1] & select.POLLIN:
            return None
        buffer = bytearray(80)
        try:
            fcntl.ioctl(self.descriptor, _RECEIVE, buffer)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR):
                return None
            raise
        key, process, _flags, number, _architecture, _pointer, *arguments = struct.unpack_from("=QIIiIQ6Q", buffer)
        return Waiting(key, process, number, tuple(arguments))

    def answer(self, waiting: Waiting, value: int = 0, error: int = 0) -> None:
        """Let the call return ``value``, or fail with the errno ``error``."""
        self._send(struct.pack("=QqiI", waiting.key, value, -error, 0))

    def proceed(self, waiting: Waiting) -> None:
        """Let the kernel do the call."""
        self._send(struct.pack("=QqiI", waiting.key, 0, 0, _CONTINUE))

    def _send(self, response: bytes) -> None:
        try:
            fcntl.ioctl(self.descriptor, _SEND, response)
        except OSError as error:
            if error.errno != errno.ENOENT:  # killed meanwhile
                raise

    def give(self, waiting: Waiting, descriptor: int, target: int | None = None) -> int:
        """Open ``descriptor`` in the waiting process too, as ``target`` or at the lowest free number."""
        flags = 0 if target is None else _AT_NUMBER
        request = struct.pack("=QIIII", waiting.key, flags, descriptor, target or 0, os.O_CLOEXEC)
        buffer = ctypes.create_string_buffer(request, len(request))
        return kernel.checked(kernel.libc().ioctl(self.descriptor, ctypes.c_ulong(_ADD_DESCRIPTOR), buffer))
