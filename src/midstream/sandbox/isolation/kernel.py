"""The kernel's calls that Python has no function for, by ctypes: raw system calls, prctl, capabilities.

Everything here raises :class:`OSError` with the kernel's errno. System call numbers are from the kernel's
``asm/unistd_64.h`` (x86-64) and ``asm-generic/unistd.h`` (aarch64); a name that an architecture lacks, such
as ``open`` on aarch64, is absent from its table.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import struct
from collections.abc import Callable

_X86_64 = """
read=0 write=1 readv=19 writev=20 pread64=17 pwrite64=18 preadv=295 pwritev=296 close=3 fstat=5 stat=4 lstat=6
newfstatat=262 statx=332 statfs=137 fstatfs=138 lseek=8 mmap=9 munmap=11 mprotect=10 mremap=25 brk=12 madvise=28
mincore=27 msync=26 rt_sigaction=13 rt_sigprocmask=14 rt_sigreturn=15 sigaltstack=131 rt_sigtimedwait=128
rt_sigpending=127 open=2 openat=257 access=21 faccessat=269 faccessat2=439 getcwd=79 chdir=80 fchdir=81 mkdir=83
mkdirat=258 rmdir=84 unlink=87 unlinkat=263 rename=82 renameat=264 renameat2=316 readlink=89 readlinkat=267
getdents64=217 ftruncate=77 truncate=76 fallocate=285 fsync=74 fdatasync=75 fadvise64=221 kill=62 fcntl=72 dup=32
dup2=33 dup3=292 pipe=22 pipe2=293 poll=7 ppoll=271 select=23 pselect6=270 epoll_create1=291 epoll_ctl=233
epoll_wait=232 epoll_pwait=281 eventfd2=290 futex=202 set_robust_list=273 get_robust_list=274 rseq=334
sched_yield=24 sched_getaffinity=204 nanosleep=35 clock_nanosleep=230 clock_gettime=228 gettimeofday=96 time=201
clock_getres=229 getpid=39 gettid=186 getppid=110 getuid=102 geteuid=107 getgid=104 getegid=108 getresuid=118
getresgid=120 getgroups=115 getpgrp=111 getpgid=121 getsid=124 getrandom=318 getrusage=98 sysinfo=99 uname=63
getrlimit=97 times=100 exit=60 exit_group=231 restart_syscall=219 setitimer=38 getitimer=36 alarm=37 membarrier=324
umask=95 flock=73 copy_file_range=326 sendfile=40 set_tid_address=218 socketpair=53 sendto=44 recvfrom=45
shutdown=48 getsockname=51 getpeername=52 getsockopt=55 getpriority=140 clone=56 clone3=435 fork=57 vfork=58
prlimit64=302 ioctl=16 tgkill=234 landlock_create_ruleset=444 landlock_add_rule=445 landlock_restrict_self=446
seccomp=317 capset=126 capget=125 chroot=161 pivot_root=155 close_range=436 open_tree=428 mount_setattr=442
wait4=61 kcmp=312
"""

_AARCH64 = """
read=63 write=64 readv=65 writev=66 pread64=67 pwrite64=68 preadv=69 pwritev=70 close=57 fstat=80 newfstatat=79
statx=291 statfs=43 fstatfs=44 lseek=62 mmap=222 munmap=215 mprotect=226 mremap=216 brk=214 madvise=233 mincore=232
msync=227 rt_sigaction=134 rt_sigprocmask=135 rt_sigreturn=139 sigaltstack=132 rt_sigtimedwait=137 rt_sigpending=136
openat=56 faccessat=48 faccessat2=439 getcwd=17 chdir=49 fchdir=50 mkdirat=34 unlinkat=35 renameat=38 renameat2=276
readlinkat=78 getdents64=61 ftruncate=46 truncate=45 fallocate=47 fsync=82 fdatasync=83 fadvise64=223 kill=129
fcntl=25 dup=23 dup3=24 pipe2=59 ppoll=73 pselect6=72 epoll_create1=20 epoll_ctl=21 epoll_pwait=22 eventfd2=19
futex=98 set_robust_list=99 get_robust_list=100 rseq=293 sched_yield=124 sched_getaffinity=123 nanosleep=101
clock_nanosleep=115 clock_gettime=113 gettimeofday=169 clock_getres=114 getpid=172 gettid=178 getppid=173 getuid=174
geteuid=175 getgid=176 getegid=177 getresuid=148 getresgid=150 getgroups=158 getpgid=155 getsid=156 getrandom=278
getrusage=165 sysinfo=179 uname=160 getrlimit=163 times=153 exit=93 exit_group=94 restart_syscall=128 setitimer=103
getitimer=102 membarrier=283 umask=166 flock=32 copy_file_range=285 sendfile=71 set_tid_address=96 socketpair=199
sendto=206 recvfrom=207 shutdown=210 getsockname=204 getpeername=205 getsockopt=209 getpriority=141 clone=220
clone3=435 prlimit64=261 ioctl=29 tgkill=131 landlock_create_ruleset=444 landlock_add_rule=445
landlock_restrict_self=446 seccomp=277 capset=91 capget=90 chroot=51 pivot_root=41 close_range=436
open_tree=428 mount_setattr=442 wait4=260 kcmp=272
"""

AUDIT_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def _table(text: str) -> dict[str, int]:
    return {name: int(number) for name, _, number in (item.partition("=") for item in text.split())}


SYSTEM_CALLS = {"x86_64": _table(_X86_64), "aarch64": _table(_AARCH64)}

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38

CAP_DAC_READ_SEARCH = 2
CAP_SYS_CHROOT = 18
CAP_SYS_PTRACE = 19
CAP_SYS_RESOURCE = 24

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


@functools.cache
def machine() -> str:
    """The architecture's name as the tables here spell it."""
    name = platform.machine()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name.lower(), name)


def system_call(name: str, *arguments: int | bytes | ctypes.Array[ctypes.c_char]) -> int:
    """Call the kernel directly. ``bytes`` and buffers are passed by address."""
    number = SYSTEM_CALLS[machine()][name]
    converted = [ctypes.c_long(item) if isinstance(item, int) else item for item in arguments]
    return checked(_libc.syscall(ctypes.c_long(number), *converted))


def prctl(option: int, value: int = 0) -> int:
    zero = ctypes.c_ulong(0)
    return checked(_libc.prctl(ctypes.c_int(option), ctypes.c_ulong(value), zero, zero, zero))


def checked(returned: int) -> int:
    """What a function of libc returned, or the :class:`OSError` that its -1 stands for."""
    if returned < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return returned


def succeeds_in_child(action: Callable[[], object]) -> bool:
    """Whether ``action`` raises nothing, tried in a child, so that what it changes is gone with that."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:  # noqa: BLE001  # whatever it is, the answer is no
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def count_in_child(count: Callable[[], int]) -> int:
    """What ``count`` returns in a child, from 0 to 255."""
    child = os.fork()
    if child == 0:
        number = 0
        try:
            number = count()
        finally:
            os._exit(number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def libc() -> ctypes.CDLL:
    return _libc


def set_capabilities(capabilities: frozenset[int] = frozenset(), dormant: frozenset[int] = frozenset()) -> None:
    """Keep just these capabilities, effective and permitted; nothing is inheritable.

    ``dormant``: those that are permitted too, but count for nothing until they are made effective.
    """
    effective = sum(1 << capability for capability in capabilities)
    permitted = effective | sum(1 << capability for capability in dormant - capabilities)
    header = struct.pack("=Ii", 0x20080522, 0)
    low, high = 0xFFFFFFFF, 32
    halves = (effective & low, permitted & low, 0, effective >> high, permitted >> high, 0)
    system_call("capset", header, struct.pack("=6I", *halves))


def effective_capabilities() -> int:
    """The bit mask of this process's effective capabilities."""
    return _capability_sets()[0]


def put_in_effect(effective: int) -> None:
    """Give this process these effective capabilities, as a bit mask; what it is permitted stays."""
    permitted = _capability_sets()[1]
    header = struct.pack("=Ii", 0x20080522, 0)
    low, high = 0xFFFFFFFF, 32
    halves = (effective & low, permitted & low, 0, effective >> high, permitted >> high, 0)
    system_call("capset", header, struct.pack("=6I", *halves))


def _capability_sets() -> tuple[int, int]:
    """Bit masks of the effective and the permitted capabilities."""
    header = struct.pack("=Ii", 0x20080522, 0)
    buffer = ctypes.create_string_buffer(24)
    system_call("capget", header, buffer)
    fields: tuple[int, ...] = struct.unpack("=6I", buffer.raw)
    return fields[0] | fields[3] << 32, fields[1] | fields[4] << 32
