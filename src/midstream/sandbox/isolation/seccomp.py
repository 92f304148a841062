"""The system call filter: a list of what a session may ask of the kernel; all else is refused with EPERM.

A call of another architecture, and the x32 calls, kill the process. The filter is classic BPF over the
kernel's ``struct seccomp_data``; conditions look at both halves of 64-bit arguments where both count.
"""

from __future__ import annotations

import ctypes
import errno
import struct

from midstream.sandbox.isolation import kernel

ALLOW = 0x7FFF0000
NOTIFY = 0x7FC00000
KILL_PROCESS = 0x80000000
_ERRNO = 0x00050000

_SET_MODE_FILTER = 1

_LOAD = 0x20
_JUMP_EQUAL = 0x15
_JUMP_AT_LEAST = 0x35
_JUMP_ANY_BIT = 0x45
_AND = 0x54
_RETURN = 0x06

_NUMBER_OFFSET = 0
_ARCHITECTURE_OFFSET = 4
_X32_BIT = 0x40000000

_CLONE_THREAD_BITS = 0x00010100  # CLONE_VM | CLONE_THREAD
_CLONE_FORBIDDEN_BITS = 0x7E022000  # every CLONE_NEW*, and CLONE_PTRACE
_FORK_FLAGS = 0x01200011  # what libc's fork() asks clone for
SUPERVISED = ("capget", "capset", "chroot", "landlock_restrict_self", "kill", "tgkill")
"""Calls that a process which may be cloned makes only with its supervisor's leave, beside the clone itself."""
_O_TRUNC = 0o1000
_O_ACCESS_MODE = 0o3
_AF_UNIX = 1
_SOCK_STREAM = 1
_SOCK_TYPE_MASK = 0xF
# Terminal questions that Python asks of a descriptor: they get ENOTTY, "this is no terminal".
_TERMINAL_QUESTIONS = (0x5401, 0x5413, 0x802C542A)
_HARMLESS_IOCTLS = (0x5450, 0x5451, 0x5421, 0x541B)  # FIONCLEX, FIOCLEX, FIONBIO, FIONREAD
# All but those that make the kernel send signals for the caller (F_SETOWN, F_SETSIG, F_NOTIFY, leases).
_HARMLESS_FCNTLS = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032)

_ALLOWED = """
read write readv writev pread64 pwrite64 preadv pwritev close fstat stat lstat newfstatat statx statfs fstatfs
lseek mmap munmap mprotect mremap brk madvise mincore msync
rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack rt_sigtimedwait rt_sigpending
access faccessat faccessat2 getcwd chdir fchdir mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2
readlink readlinkat getdents64 ftruncate fallocate fsync fdatasync fadvise64 dup dup2 dup3 pipe pipe2
poll ppoll select pselect6 epoll_create1 epoll_ctl epoll_wait epoll_pwait eventfd2
futex set_robust_list get_robust_list rseq sched_yield sched_getaffinity nanosleep clock_nanosleep
clock_gettime gettimeofday time clock_getres getpid gettid getppid getuid geteuid getgid getegid getresuid
getresgid getgroups getpgrp getpgid getsid getrandom getrusage sysinfo uname getrlimit times
exit exit_group restart_syscall setitimer getitimer alarm membarrier umask flock copy_file_range sendfile
set_tid_address recvfrom shutdown getsockname getpeername getsockopt getpriority
"""


def _statement(code: int, value: int) -> bytes:
    return struct.pack("=HBBI", code, 0, 0, value & 0xFFFFFFFF)


def _jump(code: int, value: int, if_true: int, if_false: int) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value & 0xFFFFFFFF)


def refuse(number: int) -> int:
    """The filter's answer that fails a call with this errno."""
    return _ERRNO | number


class Program:
    """A filter under construction: for each call, what becomes of it; for the rest, ``default``."""

    def __init__(self, default: int) -> None:
        self._calls = kernel.SYSTEM_CALLS[kernel.machine()]
        self._default = default
        self._instructions = [
            _statement(_LOAD, _ARCHITECTURE_OFFSET),
            _jump(_JUMP_EQUAL, kernel.AUDIT_ARCHITECTURES[kernel.machine()], 1, 0),
            _statement(_RETURN, KILL_PROCESS),
            _statement(_LOAD, _NUMBER_OFFSET),
        ]
        if kernel.machine() == "x86_64":
            self._instructions += [_jump(_JUMP_AT_LEAST, _X32_BIT, 0, 1), _statement(_RETURN, KILL_PROCESS)]

    def answer(self, names: list[str], action: int) -> None:
        """Every call of ``names`` gets ``action``. Names that this architecture lacks are skipped."""
        for name in names:
            if name in self._calls:
                self._instructions += [
                    _jump(_JUMP_EQUAL, self._calls[name], 0, 1),
                    _statement(_RETURN, action),
                ]

    def decide(self, name: str, body: list[bytes]) -> None:
        """For ``name``, run ``body``, which returns on every path."""
        if name in self._calls:
            self._instructions += [_jump(_JUMP_EQUAL, self._calls[name], 0, len(body)), *body]

    def assemble(self) -> bytes:
        return b"".join([*self._instructions, _statement(_RETURN, self._default)])


def _low(argument: int) -> bytes:
    return _statement(_LOAD, 16 + 8 * argument)


def _high(argument: int) -> bytes:
    return _statement(_LOAD, 20 + 8 * argument)


def _only_values(argument: int, values: tuple[int, ...], action: int, otherwise: int) -> list[bytes]:
    body = [_low(argument)]
    for value in values:
        body += [_jump(_JUMP_EQUAL, value, 0, 1), _statement(_RETURN, action)]
    return [*body, _statement(_RETURN, otherwise)]


def _only_null(argument: int, denied: int) -> list[bytes]:
    return [
        _low(argument),
        _jump(_JUMP_EQUAL, 0, 0, 3),
        _high(argument),
        _jump(_JUMP_EQUAL, 0, 0, 1),
        _statement(_RETURN, ALLOW),
        _statement(_RETURN, denied),
    ]


def _opening(flags_argument: int, denied: int) -> list[bytes]:
    # Before ABI 3 Landlock does not see that opening for reading with O_TRUNC empties the file.
    return [
        _low(flags_argument),
        _jump(_JUMP_ANY_BIT, _O_TRUNC, 0, 3),
        _statement(_AND, _O_ACCESS_MODE),
        _jump(_JUMP_EQUAL, 0, 0, 1),
        _statement(_RETURN, denied),
        _statement(_RETURN, ALLOW),
    ]


def supervising_filter() -> bytes:
    """The program whose notifications a supervisor answers; whatever it lets pass, other filters still decide."""
    program = Program(default=ALLOW)
    program.answer(list(SUPERVISED), NOTIFY)
    program.decide("clone", _when_forking(NOTIFY, [_statement(_RETURN, ALLOW)]))
    return program.assemble()


def _when_forking(action: int, otherwise: list[bytes]) -> list[bytes]:
    return [
        _high(0),
        _jump(_JUMP_EQUAL, 0, 0, 3),
        _low(0),
        _jump(_JUMP_EQUAL, _FORK_FLAGS, 0, 1),
        _statement(_RETURN, action),
        *otherwise,
    ]


def session_filter(process: int | None, landlock_abi: int) -> bytes:
    """The program for a session whose process id, as it sees itself, is ``process``.

    None: for one that :func:`supervising_filter` binds, too. What that asks the supervisor about passes here.
    """
    denied = refuse(errno.EPERM)
    program = Program(default=denied)
    program.answer(_ALLOWED.split(), ALLOW)
    program.answer(["clone3"], refuse(errno.ENOSYS))  # its flags are in memory: libc falls back to clone
    program.answer(["fork", "vfork"], refuse(errno.EAGAIN))
    cloning = [
        _high(0),
        _jump(_JUMP_EQUAL, 0, 1, 0),
        _statement(_RETURN, denied),
        _low(0),
        _jump(_JUMP_ANY_BIT, _CLONE_FORBIDDEN_BITS, 0, 1),
        _statement(_RETURN, denied),
        _statement(_AND, _CLONE_THREAD_BITS),
        _jump(_JUMP_EQUAL, _CLONE_THREAD_BITS, 0, 1),
        _statement(_RETURN, ALLOW),
        _statement(_RETURN, refuse(errno.EAGAIN)),
    ]
    program.decide("clone", _when_forking(ALLOW, cloning) if process is None else cloning)
    program.decide("open", _opening(1, denied))
    program.decide("openat", _opening(2, denied))
    if landlock_abi >= 3:
        program.answer(["truncate"], ALLOW)
    program.decide("prlimit64", _only_null(2, denied))
    if process is None:
        program.answer([*SUPERVISED, "wait4"], ALLOW)  # copies that have ended are waited for
    else:
        for name in ("kill", "tgkill"):
            program.decide(name, _only_values(0, (process,), ALLOW, denied))
    program.decide("fcntl", _only_values(1, _HARMLESS_FCNTLS, ALLOW, refuse(errno.EPERM)))
    ioctl = [_low(1)]
    for question in _TERMINAL_QUESTIONS:
        ioctl += [_jump(_JUMP_EQUAL, question, 0, 1), _statement(_RETURN, refuse(errno.ENOTTY))]
    program.decide("ioctl", ioctl + _only_values(1, _HARMLESS_IOCTLS, ALLOW, denied)[1:])
    # A connected pair of streams is what asyncio wakes its loop with. It reaches nobody else: datagrams
    # could name another address, and sendto with an address is refused.
    program.decide(
        "socketpair",
        [
            _low(0),
            _jump(_JUMP_EQUAL, _AF_UNIX, 0, 4),
            _low(1),
            _statement(_AND, _SOCK_TYPE_MASK),
            _jump(_JUMP_EQUAL, _SOCK_STREAM, 0, 1),
            _statement(_RETURN, ALLOW),
            _statement(_RETURN, denied),
        ],
    )
    program.decide("sendto", _only_null(4, denied))
    return program.assemble()


_ANY_PROCESS = 0x7FED1234


def filter_template(landlock_abi: int) -> bytes:
    """The program of :func:`session_filter` for any process: putting it together takes a while."""
    return session_filter(_ANY_PROCESS, landlock_abi)


def filter_from(template: bytes, process: int) -> bytes:
    """The program for ``process``."""
    return template.replace(struct.pack("=I", _ANY_PROCESS), struct.pack("=I", process))


class _FilterProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def install(program: bytes, flags: int = 0) -> int:
    """Bind the calling thread, and whatever it starts, to the filter for good. Needs ``no_new_privs``."""
    instructions = ctypes.create_string_buffer(program, len(program))
    header = _FilterProgram(len(program) // 8, ctypes.addressof(instructions))
    buffer = ctypes.create_string_buffer(bytes(header), ctypes.sizeof(header))
    return kernel.system_call("seccomp", _SET_MODE_FILTER, flags, buffer)
