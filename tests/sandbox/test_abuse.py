"""What hostile code may try, at every level of isolation: the numbers are those of the list in docs/sandbox.md."""

from __future__ import annotations

import os
import re
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from midstream.sandbox import SandboxPool, Session
from tests.sandbox.inner import FIND_WORKER

Shown = Callable[[str], str]

DENIED = (
    "PermissionError",
    "FileNotFoundError",
    "NotADirectoryError",
    "OSError(30, 'Read-only file system')",
    "OSError(18, 'Invalid cross-device link')",
)


def refused(text: str) -> bool:
    return text.startswith(DENIED)


@pytest.fixture
def canary() -> Iterator[Path]:
    """A file that file permissions alone would let anyone read and write."""
    with tempfile.NamedTemporaryFile(prefix="canary-", mode="w") as file:
        file.write("canary")
        file.flush()
        os.chmod(file.name, 0o666)
        yield Path(file.name)


SYSCALL = """
import ctypes, os, platform
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
def syscall(x86, arm, *arguments):
    number = x86 if platform.machine() == "x86_64" else arm
    if number is None: return "EPERM"
    ctypes.set_errno(0)
    result = _libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments])
    return "done" if result >= 0 else __import__("errno").errorcode[ctypes.get_errno()]
"""


@pytest.fixture
def syscall(short: Session) -> Callable[..., str]:
    short.run(SYSCALL)
    return lambda *arguments: short.run(f"syscall{arguments!r}").text.strip("'")


class TestFiles:
    @pytest.mark.parametrize(
        "path", ["/etc/passwd", "/etc/shadow", "/root/.ssh/id_rsa", "/proc/1/environ", "/proc/{host}/cmdline"]
    )
    def test_01_reading_the_hosts_files(self, short: Session, path: str) -> None:
        path = path.format(host=os.getpid())
        assert refused(short.run(f"open({path!r}, 'rb').read()").text)

    def test_01_reading_a_canary(self, short: Session, canary: Path) -> None:
        assert refused(short.run(f"open({str(canary)!r}).read()").text)
        assert refused(short.run(f"import os; os.listdir({str(canary.parent)!r})").text)
        assert refused(short.run("os.listdir('/')").text) or "canary" not in short.run("os.listdir('/tmp')").text

    def test_01_environments_of_processes(self, short: Session) -> None:
        text = short.run("import os\n[p for p in os.listdir('/proc') if p.isdigit()]").text
        assert refused(text) or text in ("[]", "['1']")
        assert refused(short.run(f"open('/proc/{os.getpid()}/environ').read()").text)

    @pytest.mark.parametrize("folder", ["/usr", "/tmp", "/dev/shm", "/", "/var/tmp", os.path.dirname(os.__file__)])
    def test_02_writing_elsewhere(self, short: Session, folder: str) -> None:
        name = f"{folder}/midstream-abuse-{os.getpid()}"
        assert refused(short.run(f"open({name!r}, 'w')").text)
        assert refused(short.run(f"import os; os.mkdir({name!r})").text)
        assert not os.path.exists(name)

    def test_02_writing_and_truncating_a_canary(self, short: Session, canary: Path) -> None:
        path = str(canary)
        for code in (f"open({path!r}, 'a')", f"import os; os.truncate({path!r}, 0)", f"os.open({path!r}, os.O_TRUNC)"):
            assert refused(short.run(code).text)
        assert refused(short.run(f"os.unlink({path!r})").text)
        assert refused(short.run(f"os.rename({path!r}, 'mine')").text)
        assert canary.read_text() == "canary"

    def test_02_truncating_what_may_be_read(self, short: Session) -> None:
        target = os.__file__
        size = os.path.getsize(target)
        assert refused(short.run("import os; os.open(os.__file__, os.O_RDONLY | os.O_TRUNC)").text)
        assert refused(short.run("os.truncate(os.__file__, 0)").text)
        assert refused(short.run("open(os.__file__, 'r+')").text)
        assert os.path.getsize(target) == size

    def test_03_links_and_nodes(self, short: Session, canary: Path) -> None:
        path = str(canary)
        short.run("import os, stat")
        assert refused(short.run(f"os.symlink({path!r}, 'link'); open('link').read()").text)
        assert refused(short.run(f"os.link({path!r}, 'hard')").text)
        assert refused(short.run("os.mknod('node', stat.S_IFCHR | 0o666, os.makedev(1, 3))").text)
        assert refused(short.run("os.mkfifo('fifo')").text)
        assert refused(short.run(f"open('../../../..' + {path!r}).read()").text)

    def test_04_other_sessions_files(self, short_pool: SandboxPool) -> None:
        with short_pool.session() as one, short_pool.session() as other:
            folder = one.run(
                "import os\nopen('secret', 'w').write('s')\nos.chmod if 0 else None\nprint(os.getcwd())"
            ).stdout.strip()
            assert one.run("open('secret').read()").text == "'s'"
            assert refused(other.run(f"open({folder + '/secret'!r}).read()").text)
            assert (
                refused(other.run(f"import os\nos.listdir(os.path.dirname({folder!r}))").text) or folder == "/sandbox"
            )

    def test_05_finding_out_whether_a_path_exists(self, short: Session, canary: Path, level: str) -> None:
        short.run("import os")
        looks = (
            "os.stat({0!r}).st_size",
            "os.lstat({0!r}).st_size",
            "os.access({0!r}, os.F_OK)",
            "os.path.exists({0!r})",
        )
        seen = [short.run(look.format(str(canary))).text for look in looks]
        if level == "full":
            assert all(refused(text) or text == "False" for text in seen), seen
            assert refused(short.run(f"os.stat({str(canary.parent / 'none')!r})").text)
        else:  # as docs/sandbox.md says; what is in it stays out of reach
            assert seen == ["6", "6", "True", "True"]
        assert refused(short.run(f"open({str(canary)!r}).read()").text)

    def test_06_changing_modes_owners_and_times(self, short: Session) -> None:
        short.run("import os")
        for code in (
            "os.chmod('/dev/null', 0)",
            "os.chown('/dev/null', 0, 0)",
            "os.utime('/dev/null')",
            "os.chmod(os.__file__, 0)",
        ):
            assert refused(short.run(code).text), code
        short.run("f = open('mine', 'w')")
        assert refused(short.run("os.fchmod(f.fileno(), 0o777)").text)


class TestProcesses:
    @pytest.mark.parametrize(
        "code",
        [
            "os.execv('/bin/true', ['true'])",
            "os.execve(sys.executable, ['python'], {})",
            "subprocess.run(['/bin/true'])",
            "os.posix_spawn('/bin/true', ['true'], {})",
            "os.popen('true').read()",
            "import multiprocessing as m; p = m.get_context('fork').Process(target=print); p.start()",
        ],
    )
    def test_07_starting_programs(self, short: Session, code: str) -> None:
        result = short.run(f"import os, sys, subprocess\n{code}")
        assert result.error is not None
        assert result.error.type in ("PermissionError", "BlockingIOError", "FileNotFoundError")
        assert not result.state_lost

    def test_07_system(self, short: Session) -> None:
        assert short.run("import os\nos.system('true') == 0").text == "False"

    def test_08_forking(self, short: Session, syscall: Callable[..., str]) -> None:
        assert short.run("import os\nos.fork()").text == "BlockingIOError(11, 'Resource temporarily unavailable')"
        assert syscall(58, None) in ("EAGAIN", "EPERM")  # vfork
        assert syscall(435, 435, 0, 88) == "ENOSYS"  # clone3
        assert syscall(56, 220, 17, 0, 0, 0, 0) == "EAGAIN"  # clone(SIGCHLD)
        assert syscall(56, 220, 0x8000 | 17, 0, 0, 0, 0) == "EAGAIN"  # clone(CLONE_PARENT)
        assert syscall(56, 220, 0x10000000 | 17, 0, 0, 0, 0) == "EPERM"  # clone(CLONE_NEWUSER)
        assert syscall(56, 220, 1 << 32 | 0x10100, 0, 0, 0, 0) == "EPERM"  # what is in the upper half

    def test_19_fork_bombs(self, short: Session) -> None:
        bomb = (
            "import os, threading\nmade = []\n"
            "def fork():\n    for _ in range(300):\n        try: made.append(os.fork())\n"
            "        except OSError as e: last = e\n    refusals.append(last.errno)\nrefusals = []\n"
            "threads = [threading.Thread(target=fork) for _ in range(8)]\n"
            "for t in threads: t.start()\nfor t in threads: t.join()\nmade, set(refusals)"
        )
        assert short.run(bomb).text == "([], {11})"
        assert short.run("while True:\n    try: os.fork()\n    except OSError: pass").timed_out
        assert short.run("made").text == "[]"

    def test_10_signalling_others(self, short_pool: SandboxPool) -> None:
        with short_pool.session() as one, short_pool.session() as sibling:
            one.run("import os, signal")
            targets = ["-1", "0", "os.getppid()", str(sibling.process_id), str(os.getpid()), "-os.getpid()"]
            for target in targets:
                # In a process namespace of its own, a session's own id may be that of others elsewhere.
                if sibling.process_id == one.process_id and target == str(sibling.process_id):
                    continue
                text = one.run(f"os.kill({target}, signal.SIGKILL)").text
                assert text.startswith(("PermissionError", "ProcessLookupError")), target
            assert one.run("os.killpg(0, signal.SIGKILL)").text.startswith(("PermissionError", "ProcessLookupError"))
            assert sibling.run("1").text == "1"

    def test_10_signals_by_way_of_descriptors(self, short: Session) -> None:
        code = "import fcntl, socket\na, b = socket.socketpair()\nfcntl.fcntl(a, {0}, 1)"
        for command in (8, 10, 15, 1024, 1026):  # F_SETOWN, F_SETSIG, F_SETOWN_EX, F_SETLEASE, F_NOTIFY
            assert refused(short.run(code.format(command)).text)

    def test_11_looking_into_others(self, syscall: Callable[..., str]) -> None:
        assert syscall(101, 117, 16, os.getppid(), 0, 0) == "EPERM"  # ptrace(ATTACH)
        assert syscall(310, 270, os.getpid(), 0, 0, 0, 0, 0) == "EPERM"  # process_vm_readv
        assert syscall(311, 271, os.getpid(), 0, 0, 0, 0, 0) == "EPERM"  # process_vm_writev
        assert syscall(434, 434, os.getpid(), 0) == "EPERM"  # pidfd_open
        assert syscall(438, 438, 3, 0, 0) == "EPERM"  # pidfd_getfd

    def test_12_dark_corners_of_the_kernel(self, syscall: Callable[..., str]) -> None:
        for numbers in [
            (425, 425),  # io_uring_setup
            (321, 280),  # bpf
            (323, 282),  # userfaultfd
            (250, 219),  # keyctl
            (319, 279),  # memfd_create
            (165, 40),  # mount
            (166, 39),  # umount2
            (272, 97),  # unshare
            (308, 268),  # setns
            (155, 41),  # pivot_root
            (161, 51),  # chroot
            (298, 241),  # perf_event_open
            (157, 167),  # prctl
            (317, 277),  # seccomp
            (446, 446),  # landlock_restrict_self
            (304, 265),  # open_by_handle_at
            (437, 437),  # openat2
            (105, 146),  # setuid
            (126, 91),  # capset
            (169, 142),  # reboot
            (246, 104),  # kexec_load
            (175, 105),  # init_module
            (29, 194),  # shmget
            (240, 180),  # mq_open
            (141, 140),  # setpriority
            (203, 122),  # sched_setaffinity
        ]:
            assert syscall(*numbers, 0, 0, 0, 0, 0) == "EPERM", numbers

    @pytest.mark.skipif(os.uname().machine != "x86_64", reason="these ways in exist on x86-64 only")
    def test_13_other_architectures(self, short: Session, syscall: Callable[..., str]) -> None:
        assert "SIGSYS" in syscall(0x40000000 + 39, None)  # getpid of x32
        # int 0x80 with eax = 20, getpid of i386.
        code = (
            "import ctypes, mmap\nm = mmap.mmap(-1, 4096, prot=7)\nm.write(bytes.fromhex('b814000000cd80c3'))\n"
            "ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()"
        )
        result = short.run(code)
        assert result.state_lost
        assert short.run("1").text == "1"


class TestNetwork:
    @pytest.mark.parametrize(
        "code",
        [
            "socket.socket()",
            "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
            "socket.socket(socket.AF_INET6)",
            "socket.socket(socket.AF_UNIX)",
            "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
            "socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)",
            "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
            "socket.socket(40, socket.SOCK_STREAM)",
            "socket.create_connection(('127.0.0.1', 80))",
            "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
            "import urllib.request; urllib.request.urlopen('http://127.0.0.1/')",
        ],
    )
    def test_09_sockets(self, short: Session, code: str) -> None:
        error = short.run(f"import socket\n{code}").error
        assert error is not None
        assert error.type in ("PermissionError", "URLError", "gaierror")

    def test_09_names(self, short: Session) -> None:
        error = short.run("import socket\nsocket.getaddrinfo('example.com', 80)").error
        assert error is not None
        assert error.type in ("gaierror", "PermissionError")

    def test_09_a_local_socket_of_the_host(self, short: Session, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("\0midstream-abuse")
            server.listen()
            server.setblocking(False)
            code = "import socket\na, b = socket.socketpair()\na.sendto(b'x', '\\0midstream-abuse')"
            assert refused(short.run(code).text)
            assert refused(short.run("a.sendmsg([b'x'])").text)
            with pytest.raises(BlockingIOError):
                server.accept()


class TestWhatIsShown:
    @pytest.mark.parametrize(
        "code",
        [
            "def f(n): return f(n + 1)\nf(0)",
            "x = []\nfor _ in range(100_000): x = [x]\nx",
            "class R:\n    def __repr__(self): return repr(self)\nR()",
            "class E(Exception):\n    def __str__(self): return str(self)\nstr(E())",
            "x = {}\nfor _ in range(100_000): x = {1: x}\nimport json; json.dumps(x)",
        ],
    )
    def test_23_recursion_without_end(self, short: Session, code: str) -> None:
        short.run("kept = 7")
        result = short.run(code)
        assert result.error is not None
        assert (result.error.type, result.state_lost) == ("RecursionError", False)
        assert short.run("del x if 'x' in globals() else None\nkept" if 0 else "x = None; kept").text == "7"

    @pytest.mark.parametrize(
        ("body", "kind"),
        [
            ("raise ValueError('no')", "ValueError"),
            ("while True: pass", "Timeout"),
            ("return 5", "TypeError"),
            ("return 'r' * (1 << 30)", "MemoryError"),
            ("raise SystemExit", "SystemExit"),
            ("return '\\ud800' * 100_000", None),
        ],
    )
    def test_25_values_that_cannot_be_shown(self, short: Session, body: str, kind: str | None) -> None:
        short.run(f"class R:\n    def __repr__(self):\n        {body}\n    __str__ = __repr__")
        result = short.run("R()")
        assert (result.error.type if result.error is not None else None) == kind
        assert not result.state_lost
        assert len(result.text) < 4096 + 300
        assert short.run("[R()]" if kind != "Timeout" else "1").state_lost is False
        assert short.run("40 + 2").text == "42"


class TestChannel:
    """The channel to the host is in the code's reach: what it sends there is believed in nothing."""

    FORGE = "import os, json, struct\ndef forge(b): os.write(3, struct.pack('<I', len(b)) + b)\n"

    @pytest.mark.parametrize(
        "frame",
        [
            "os.urandom(4000)",
            "b'\\xff\\xff\\xff\\xff'",
            "b'\\0\\0'",
            "struct.pack('<I', 10) + b'x'",
            "struct.pack('<I', 0)",
            "struct.pack('<I', 2) + b'[]'",
            "struct.pack('<I', 2) + b'{}'",
            "struct.pack('<I', 200_000) + b'[' * 200_000",
            "struct.pack('<I', 600_000) + b'{\"a\":' * 120_000",
            "struct.pack('<I', 5) + b'{\"a\":'",
            "struct.pack('<I', 100_001) + b'9' * 100_001",
        ],
    )
    def test_26_garbage_kills_that_session_only(self, short_pool: SandboxPool, frame: str) -> None:
        with short_pool.session() as other, short_pool.session() as session:
            session.run("kept = 7")
            result = session.run(f"import os, struct, time\nos.write(3, {frame})\ntime.sleep(0.2)\n'mine'")
            assert result.state_lost or result.text == "'mine'"
            assert session.run("kept").text == "7"
            assert other.run("1").text == "1"

    def test_27_a_forged_result_does_not_garble_the_next(self, short: Session) -> None:
        code = self.FORGE + (
            FIND_WORKER
            + "forge(json.dumps({'nonce': worker._nonce, 'stdout': 'forged', 'value': None, 'error': None}).encode())\n"
            "print('true')"
        )
        short.run("kept = 7")
        first = short.run(code)
        assert first.text in ("forged", "true") or first.state_lost
        results = [short.run(f"kept + {number}") for number in range(5)]
        # The true result, come too late, is never taken for another block's.
        for number, result in enumerate(results):
            assert result.text.endswith(f"{7 + number}") or result.state_lost
            assert "true" not in result.text
        assert results[-1].text == "11"

    def test_27_a_tool_that_was_not_offered_is_never_called(self, short_pool: SandboxPool) -> None:
        called: list[Any] = []
        with short_pool.session(tools=["good"], call_tool=lambda *call: called.append(call)) as session:
            code = self.FORGE + FIND_WORKER + "worker._call('os.system', ('true',), {})"
            result = session.run(code)
            assert result.state_lost
            assert "interfered with the interpreter's connection" in result.text
            assert called == []
            assert session.run("good()").text == ""
            assert [name for name, *_ in called] == ["good"]

    def test_28_a_closed_channel(self, short: Session) -> None:
        short.run("kept = 7")
        result = short.run("import os; os.close(3)")
        assert result.state_lost
        assert short.run("kept").text == "7"

    def test_28_a_channel_stolen_by_a_thread(self, short: Session) -> None:
        short.run("kept = 7")
        short.run(
            "import threading, os\ndef steal():\n    while True: os.read(3, 100)\n"
            "threading.Thread(target=steal, daemon=True).start()"
        )
        assert short.leftover_threads == 1
        for _ in range(3):
            result = short.run("kept")
            assert result.text == "7" or result.state_lost

    def test_28_shut_down(self, short: Session) -> None:
        result = short.run(
            "import socket\nsocket.socket(fileno=3).shutdown(socket.SHUT_RDWR)\nimport time; time.sleep(5)"
        )
        assert result.state_lost
        assert short.run("1").text == "1"

    def test_30_sabotage_stays_in_its_session(self, short_pool: SandboxPool) -> None:
        with short_pool.session() as other, short_pool.session() as session:
            session.run(
                "import builtins, json, sys, os, linecache, ast, pprint\n"
                "for m in (json, os, linecache, ast, pprint):\n"
                "    for n in list(vars(m)):\n"
                "        if not n.startswith('__'): setattr(m, n, None)\n"
                "for n in ('len', 'isinstance', 'str', 'dict', 'print', 'memoryview'): setattr(builtins, n, None)"
            )
            result = session.run("1 + 1")
            assert result.text == "2" or result.error is not None
            assert other.run("import json\njson.dumps([len('abc')])").text == "'[3]'"


class TestWhatIsThere:
    def test_31_environment_and_descriptors(self, short: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        names = set(short.run("import os\nprint(*sorted(os.environ))").text.split())
        assert names <= {
            "HOME", "LANG", "LC_CTYPE", "LD_LIBRARY_PATH", "MALLOC_ARENA_MAX", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS",
            "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PATH", "PWD", "PYTHONHASHSEED", "PYTHONHOME", "PYTHONUTF8",
            "TMPDIR", "TZ",
        }  # fmt: skip
        code = (
            "def there(n):\n    try: os.fstat(n)\n    except OSError: return False\n    return True\n"
            "[n for n in range(4096) if there(n)]"
        )
        # 3 is the channel, and the last the end of the pipe from which its own output is read.
        assert short.run(code).text == "[0, 1, 2, 3, 5]"
        assert short.run("import stat\nstat.S_ISFIFO(os.fstat(5).st_mode)").text == "True"

    def test_31_nothing_of_the_host_in_memory(self, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
        secret = f"secret-{time.time_ns()}"
        monkeypatch.setenv("MIDSTREAM_TEST_SECRET", secret)
        with SandboxPool(isolation=level, preload=[]) as pool, pool.session() as session:  # type: ignore[arg-type]
            code = (
                "import gc\nplain = [o for o in gc.get_objects() if isinstance(o, (dict, list)) and len(o) < 1000]\n"
                "any('secret' + '-' + {0!r} in str(o) for o in plain if o is not plain)"
            )
            assert session.run(code.format(secret.removeprefix("secret-"))).text == "False"
            assert session.run("import sys\n[n for n in sys.modules if 'midstream' in n]").text == "[]"

    def test_extra_environment_and_folders(self, level: str, tmp_path: Path) -> None:
        (tmp_path / "data.txt").write_text("given")
        for folder in (tmp_path, *tmp_path.parents):
            if folder != Path(tempfile.gettempdir()) and str(folder).startswith(tempfile.gettempdir()):
                folder.chmod(0o755)
        pool = SandboxPool(isolation=level, preload=[], environment={"GIVEN": "1"}, readable=[str(tmp_path)])  # type: ignore[arg-type]
        with pool, pool.session() as session:
            assert (
                session.run(f"import os\nos.environ['GIVEN'], open({str(tmp_path / 'data.txt')!r}).read()").text
                == "('1', 'given')"
            )
            assert refused(session.run(f"open({str(tmp_path / 'data.txt')!r}, 'a')").text)

    def test_identity(self, short: Session) -> None:
        text = short.run("import os\nos.getuid() == os.geteuid(), os.getgroups()").text
        assert text.startswith("(True")
        assert re.fullmatch(r"\(True, \[.*\]\)", text)


def test_every_attempt_of_the_list_is_made() -> None:
    page = (Path(__file__).parents[2] / "docs" / "sandbox.md").read_text()
    table = page.partition("## What it is tried against")[2].partition("\n## ")[0]
    listed = {
        int(number)
        for cell in re.findall(r"^\| (\d+(?:, \d+)*) \|", table, re.MULTILINE)
        for number in cell.split(", ")
    }
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert listed == {int(number) for number in re.findall(r"def test_(\d\d)_", tests)} == set(range(1, 35))
