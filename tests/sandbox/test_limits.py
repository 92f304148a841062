"""Limits hold, a breach is a result, and a session goes on wherever it can."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import pytest

from midstream.errors import ConfigurationError
from midstream.sandbox import SandboxLimits, SandboxPool, Session
from midstream.sandbox.quota import Quota
from midstream.types import ExecutionResult
from tests.sandbox.inner import FIND_WORKER
from tests.sandbox.leftovers import eventually


class TestTime:
    @pytest.mark.parametrize(
        "code",
        [
            "while True: pass",
            "10 ** 10 ** 9",
            "import re; re.match('(a*)*b', 'a' * 40)",
            "import time; time.sleep(60)",
            "import threading; threading.Event().wait()",
            "class R:\n    def __repr__(self):\n        while True: pass\nR()",
            "while True:\n    try: raise ValueError\n    except Exception: pass",
        ],
    )
    def test_20_what_can_be_interrupted_keeps_its_state(self, short: Session, code: str) -> None:
        short.run("x = 41")
        result = short.run("x += 1\nprint('begun')\n" + code)
        assert result.timed_out
        assert not result.state_lost
        assert result.breached == "wall_time"
        assert result.error is not None
        assert result.error.type == "Timeout"
        assert result.text == "begun\nTimeout('the code ran longer than 1 seconds and was interrupted')"
        assert short.run("x").text == "42"

    @pytest.mark.parametrize(
        "code",
        [
            "sum(range(10**13))",
            "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass",
            "import time\nwhile True:\n    try: time.sleep(0.01)\n    except BaseException: pass",
            "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))\nwhile True: pass",
        ],
    )
    def test_21_what_cannot_be_is_killed_and_the_earlier_blocks_run_again(self, short: Session, code: str) -> None:
        short.run("x = 41")
        result = short.run("x += 1\n" + code)
        assert (result.timed_out, result.state_lost, result.breached) == (True, True, "wall_time")
        assert result.error is not None
        assert result.error.type == "Killed"
        assert result.text == (
            "Killed: the code ran longer than 1 seconds and could not be interrupted. "
            "What this block did is lost; the earlier blocks will be run again before the next one."
        )
        after = short.run("x")
        assert (after.text, after.state_lost) == ("41", False)

    @pytest.mark.parametrize("method", ["__repr__", "__str__"])
    def test_an_error_that_never_ends_being_shown(self, short: Session, method: str) -> None:
        short.run("x = 41")
        result = short.run(f"class E(Exception):\n    def {method}(self):\n        while True: pass\nraise E")
        assert (result.timed_out, result.state_lost, result.breached) == (True, False, "wall_time")
        assert result.text == "E(<Timeout while it was shown>)"
        assert short.run("x").text == "41"

    def test_an_interrupt_that_is_swallowed_once_is_repeated(self, short: Session) -> None:
        result = short.run("import time\ntry: time.sleep(9)\nexcept BaseException as e: first = e\ntime.sleep(9)")
        assert (result.timed_out, result.state_lost) == (True, False)
        assert short.run("type(first).__name__").text == "'Timeout'"


class TestProcessorTime:
    """Of a session the kernel counts it, of a block the host: neither asks the code."""

    SESSION = SandboxLimits(cpu_time=1.0, wall_time=60.0)
    BLOCK = SandboxLimits(block_cpu_time=0.3, wall_time=60.0, grace=1.0)
    MORE = SandboxLimits(block_cpu_time=1.0, wall_time=120.0, grace=1.0)
    LOOP_IN_C = "sum(range(10**13))"

    def run(self, level: str, limits: SandboxLimits, *blocks: str, **settings: Any) -> list[ExecutionResult]:
        pool = SandboxPool(isolation=level, preload=[], limits=limits, **settings)  # type: ignore[arg-type]
        with pool, pool.session() as session:
            return [session.run(block) for block in blocks]

    def test_a_session_that_has_used_it_up_is_told(self, level: str) -> None:
        (result,) = self.run(level, self.SESSION, "while True: pass")
        assert (result.breached, result.timed_out, result.state_lost) == ("cpu_time", False, False)
        assert result.text == "OutOfProcessorTime('this session has used up its processor time')"

    @pytest.mark.slow
    def test_one_that_does_not_listen_is_killed_and_it_is_said_for_what(self, level: str) -> None:
        result, after = self.run(level, self.SESSION, self.LOOP_IN_C, "5")
        assert (result.breached, result.timed_out, result.state_lost) == ("cpu_time", False, True)
        assert result.text.startswith("Killed: the interpreter was ended, since the session had used up its processor")
        assert after.text == "5"

    def test_a_block_that_has_used_it_up_keeps_its_state(self, level: str) -> None:
        results = self.run(level, self.BLOCK, "x = 41", "x += 1\nwhile True: pass", "x")
        result = results[1]
        assert (result.breached, result.timed_out, result.state_lost) == ("block_cpu_time", False, False)
        assert result.error is not None
        assert result.error.type == "OutOfProcessorTime"
        message = "the code used more than 0.3 seconds of processor time and was interrupted"
        assert result.text == f"OutOfProcessorTime({message!r})"
        assert result.cpu_time is not None
        assert result.cpu_time >= 0.3
        assert results[2].text == "42"

    def test_it_is_each_blocks_own(self, level: str) -> None:
        busy = "import time\nuntil = time.process_time() + 0.4\nwhile time.process_time() < until: pass\n'done'"
        results = self.run(level, self.MORE, *[busy] * 4)
        assert [result.text for result in results] == ["'done'"] * 4
        assert all(result.cpu_time is not None and 0.4 <= result.cpu_time < 1.0 for result in results)

    def test_waiting_takes_none(self, level: str) -> None:
        (result,) = self.run(level, self.BLOCK, "import time; time.sleep(0.8)")
        assert (result.error, result.breached) == (None, None)
        assert result.cpu_time is not None
        assert result.cpu_time < 0.3

    def test_threads_count_together(self, level: str) -> None:
        code = (
            "import threading, time\nuntil = time.thread_time\n"
            "def work():\n    while time.thread_time() < 0.2: pass\n"
            "threads = [threading.Thread(target=work) for _ in range(4)]\n"
            "for thread in threads: thread.start()\nfor thread in threads: thread.join()"
        )
        (result,) = self.run(level, self.BLOCK, code)
        assert result.breached == "block_cpu_time"

    @pytest.mark.parametrize(
        "code",
        [
            LOOP_IN_C,
            "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
            "while True:\n    try: sum(range(10**6))\n    except BaseException: pass",
        ],
    )
    def test_a_block_that_does_not_listen_is_killed(self, level: str, code: str) -> None:
        _, result, after = self.run(level, self.BLOCK, "x = 41", code, "x")
        assert (result.breached, result.timed_out, result.state_lost) == ("block_cpu_time", False, True)
        assert result.text.startswith("Killed: the code used more than 0.3 seconds of processor time and could not be")
        assert after.text == "41"

    def test_a_block_that_lets_the_signal_end_it(self, level: str) -> None:
        code = "import signal; signal.signal(signal.SIGXCPU, signal.SIG_DFL)\nwhile True: pass"
        (result,) = self.run(level, self.BLOCK, code)
        assert (result.breached, result.state_lost) == ("block_cpu_time", True)

    def test_a_session_that_can_be_cloned_too(self, level: str) -> None:
        limits = SandboxLimits(cpu_time=1.0, block_cpu_time=0.3, wall_time=60.0)
        result, after = self.run(level, limits, "while True: pass", "5", forkable=True)
        assert (result.breached, after.text) == ("block_cpu_time", "5")

    def test_while_a_tool_runs(self, level: str) -> None:
        """The threads of the code go on; it is told as soon as the tool is done."""
        limits = SandboxLimits(block_cpu_time=0.1, wall_time=60.0, tool_time=None)

        async def main() -> ExecutionResult:
            async def nap(_name: str, _arguments: list[Any], _keywords: dict[str, Any]) -> int:
                process = session._interpreter.process
                assert process is not None
                begun = process.processor_time()
                assert begun is not None
                while (process.processor_time() or 0.0) < begun + 0.2:
                    await asyncio.sleep(0.01)
                return 1

            pool = SandboxPool(isolation=level, preload=[], limits=limits)  # type: ignore[arg-type]
            with pool, await pool.session_async(tools=["nap"], call_tool=nap) as session:
                await session.run_async("import threading\nbusy = True\ndef work():\n    while busy: pass")
                result = await session.run_async("threading.Thread(target=work, daemon=True).start()\nnap()")
                await session.run_async("busy = False")
                return result

        assert asyncio.run(main()).breached == "block_cpu_time"


class TestMemory:
    def test_15_a_large_block_of_memory(self, short: Session) -> None:
        short.run("x = 1")
        result = short.run("b = bytearray(8 << 30)")
        assert (result.text, result.breached, result.state_lost) == ("MemoryError()", "memory", False)
        assert short.run("x").text == "1"

    def test_16_small_ones_without_end(self, level: str) -> None:
        limits = SandboxLimits(memory=128 << 20)
        with SandboxPool(isolation=level, preload=[], limits=limits) as pool, pool.session() as session:  # type: ignore[arg-type]
            session.run("x = 1")
            result = session.run("kept = []\nwhile True: kept.append('%d' % len(kept) * 50)")
            assert (result.text, result.breached, result.state_lost) == ("MemoryError()", "memory", False)
            assert session.run("del kept\nx").text == "1"

    def test_arrays_of_numpy(self, pool: SandboxPool) -> None:
        with pool.session() as session:
            text = session.run("import numpy as np\nnp.ones((10**5, 10**5))").text
            assert text.startswith("_ArrayMemoryError") or "MemoryError" in text
            assert session.run("float(np.ones((500, 500)).dot(np.ones(500))[0])").text == "500.0"


class TestOutput:
    def test_24_a_flood_is_cut_in_the_middle(self, short: Session) -> None:
        result = short.run("for i in range(20_000): print(i)")
        assert result.truncated
        assert result.text.startswith("0\n1\n2\n")
        assert result.text.endswith("\n19998\n19999")
        assert "characters left out ...]" in result.text
        assert len(result.text) < 4096 + 200
        assert len(result.stdout) < 4096 + 300
        assert result.breached == "output_characters"

    @pytest.mark.parametrize(
        "code",
        [
            "print('x' * (100 << 20))",
            "'y' * (1 << 20)",
            "import os\nfor _ in range(1000):\n    try: os.write(1, b'x' * 65536)\n    except BlockingIOError: pass",
            "import sys\nsys.stderr.write('é' * (10 << 20))\nNone",
            "raise ValueError('z' * (10 << 20))",
            "class R:\n    def __repr__(self): return 'r' * (50 << 20)\nR()",
        ],
    )
    def test_24_every_way_out_is_bounded(self, short: Session, code: str) -> None:
        result = short.run(code)
        assert len(result.text) < 4096 + 200
        assert not result.state_lost
        assert short.run("1 + 1").text == "2"

    def test_what_is_short_enough_is_whole(self, short: Session) -> None:
        result = short.run("print('a' * 4000)")
        assert (result.text, result.truncated, result.breached) == ("a" * 4000, False, None)


class TestToolLimitsByName:
    """What the library told the code is known again when the code lets it end the block."""

    def run(self, level: str, code: str) -> Any:
        limits = SandboxLimits(tool_calls=2, tool_time=0.3, argument_characters=300)

        def call(_name: str, arguments: list[Any], _keywords: dict[str, Any]) -> int:
            time.sleep(float(arguments[0]))
            return 1

        pool = SandboxPool(isolation=level, preload=[], limits=limits)  # type: ignore[arg-type]
        with pool, pool.session(tools=["nap"], call_tool=call) as session:
            result = session.run(code)
            assert not result.state_lost
            return result

    def test_too_many_calls(self, level: str) -> None:
        result = self.run(level, "for _ in range(3): nap(0)")
        assert (result.error.type, result.breached) == ("RuntimeError", "tool_calls")

    def test_a_slow_one(self, level: str) -> None:
        result = self.run(level, "nap(1)")
        assert (result.error.type, result.breached) == ("TimeoutError", "tool_time")

    def test_long_arguments(self, level: str) -> None:
        result = self.run(level, "nap(0, 'x' * 400)")
        assert (result.error.type, result.breached) == ("ValueError", "argument_characters")

    def test_what_the_code_handled_is_no_breach(self, level: str) -> None:
        result = self.run(level, "try: nap(0, 'x' * 400)\nexcept ValueError: pass\n1/0")
        assert (result.error.type, result.breached) == ("ZeroDivisionError", None)


class TestFilesAndThreads:
    def test_a_file_that_grows_too_large(self, level: str) -> None:
        limits = SandboxLimits(file_size=1 << 20)
        with SandboxPool(isolation=level, preload=[], limits=limits) as pool, pool.session() as session:  # type: ignore[arg-type]
            result = session.run("f = open('f', 'wb', 0)\nfor _ in range(64): f.write(b'x' * 65536)")
            assert (result.breached, result.state_lost) == ("file_size", False)
            assert session.run("f.close(); import os; os.path.getsize('f')").text == str(1 << 20)

    def test_17_the_working_directory_has_a_size(self, level: str) -> None:
        if level != "full":
            pytest.skip("only a file system of its own refuses what is too much; see TestQuota for the other level")
        limits = SandboxLimits(working_directory=1 << 20, files=100)
        with SandboxPool(isolation="full", preload=[], limits=limits) as pool, pool.session() as session:
            result = session.run("for n in range(99): open(f'f{n}', 'wb').write(b'x' * 50_000)")
            assert (result.breached, result.state_lost) == ("working_directory", False)
            session.run("import os\nfor name in os.listdir(): os.unlink(name)")
            result = session.run("for n in range(200): open(f'f{n}', 'wb').close()")
            assert (result.breached, result.state_lost) == ("files", False)

    def test_18_too_many_open_files(self, short: Session) -> None:
        result = short.run("kept = []\nwhile True: kept.append(open('f', 'a'))")
        assert (result.breached, result.state_lost) == ("open_files", False)
        assert short.run("n = len(kept)\nfor f in kept: f.close()\nn < 64").text == "True"

    def test_18_too_many_threads(self, short: Session) -> None:
        code = (
            "import threading\nstop = threading.Event()\nthreading.stack_size(32 << 20)\n"
            "while True: threading.Thread(target=stop.wait, daemon=True).start()"
        )
        result = short.run(code)
        assert (result.breached, result.state_lost) == ("threads", False)
        assert 0 < short.leftover_threads < 64
        assert short.run("stop.set()\n5").text == "5"

    def test_14_limits_cannot_be_raised(self, short: Session) -> None:
        code = "import resource as r\nr.setrlimit(r.RLIMIT_{0}, (r.RLIM_INFINITY, r.RLIM_INFINITY))"
        for name in ("AS", "NOFILE", "CPU", "FSIZE"):
            assert short.run(code.format(name)).error is not None
        assert short.run("r.getrlimit(r.RLIMIT_CORE)").text == "(0, 0)"


class TestQuota:
    """Where the working directory lies on the host's disk, the host looks at what is in it."""

    LIMITS = SandboxLimits(working_directory=1 << 20, files=100, wall_time=30.0, grace=1.0)
    TOO_MUCH = "for n in range(3): open(f'f{n}', 'wb').write(b'x' * (1 << 19))"
    TOO_MANY = "for n in range(60): open(f'f{n}', 'w').close(); os.mkdir(f'd{n}')"

    def run(self, *blocks: str, limits: SandboxLimits = LIMITS, **settings: Any) -> list[ExecutionResult]:
        pool = SandboxPool(isolation="container", preload=[], limits=limits, **settings)
        with pool, pool.session() as session:
            return [session.run("import os\n" + block) for block in blocks]

    @pytest.mark.parametrize(
        ("code", "limit", "told"),
        [
            (TOO_MUCH, "working_directory", "The files in the working directory take more than 1048576 bytes"),
            (TOO_MANY, "files", "The working directory holds more than 100 files"),
        ],
    )
    def test_17_what_is_too_much_is_told_and_may_be_removed(self, code: str, limit: str, told: str) -> None:
        clean = "import shutil\nfor e in os.scandir(): shutil.rmtree(e) if e.is_dir() else os.unlink(e)\n'clean'"
        over, after, later = self.run(code + "\n'done'", clean, "1 + 1")
        assert (over.breached, over.state_lost, over.error) == (limit, False, None)
        assert over.text == f"[{told}: remove some before you write more.]\n'done'"
        assert (after.text, after.breached) == ("'clean'", None)
        assert (later.text, later.breached) == ("2", None)

    def test_code_that_goes_on_writing_is_interrupted(self) -> None:
        code = (
            "x = 1\nf = open('f', 'wb', 0)\nimport time\nwhile True:\n    f.write(b'x' * 4096)\n    time.sleep(0.001)"
        )
        result, after = self.run(code, "f.close(); os.unlink('f'); x")
        assert (result.breached, result.timed_out, result.state_lost) == ("working_directory", False, False)
        assert result.error is not None
        assert result.error.type == "OutOfSpace"
        assert "take more than 1048576 bytes" in result.text
        assert (after.text, after.breached) == ("1", None)

    def test_who_leaves_it_so_is_ended_and_the_files_with_it(self) -> None:
        first, second, third = self.run(self.TOO_MUCH, "1", "os.listdir()")
        assert (first.state_lost, second.state_lost) == (False, True)
        assert second.breached == "working_directory"
        assert second.text.startswith("Killed: the files in the working directory take more than 1048576 bytes, as")
        assert third.breached in ("working_directory", None)

    def test_a_tree_that_no_path_leads_to_the_end_of(self) -> None:
        deep = "for _ in range(300): os.mkdir('d' * 200); os.chdir('d' * 200)"
        limits = SandboxLimits(working_directory=64 << 20, files=1000, wall_time=30.0)
        (result,) = self.run(deep, limits=limits)
        assert result.breached == "files"

    def test_links_out_of_it_are_not_followed(self, tmp_path: Path) -> None:
        (tmp_path / "large").write_bytes(b"x" * (4 << 20))
        (result,) = self.run(f"os.symlink({str(tmp_path)!r}, 'link')")
        assert result.breached is None

    def test_what_is_put_counts_with_the_next_block(self) -> None:
        with SandboxPool(isolation="container", preload=[], limits=self.LIMITS) as pool, pool.session() as session:
            for number in range(3):
                session.put(f"folder/{number}", b"x" * (1 << 19))
            assert session.run("1").breached == "working_directory"

    def test_without_files_nobody_looks_twice(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        quota = Quota(str(tmp_path), self.LIMITS)
        assert quota.end() == (None, False)
        monkeypatch.setattr(Quota, "_walk", lambda _self: pytest.fail("looked again"))
        assert quota.end() == (None, False)
        monkeypatch.undo()
        for number in range(101):
            (tmp_path / str(number)).touch()
        assert quota.end() == ("files", False)
        assert quota.end() == ("files", True)

    def test_a_folder_that_is_gone(self, tmp_path: Path) -> None:
        assert Quota(str(tmp_path / "gone"), self.LIMITS).end() == (None, False)


class TestDeath:
    @pytest.mark.parametrize(
        ("code", "how"),
        [
            ("import os; os._exit(7)", "exited with status 7"),
            ("import os; os.abort()", "was ended by SIG"),
            ("import ctypes; ctypes.string_at(0)", "was ended by SIGSEGV (segmentation fault)"),
            (
                "import sys; sys.setrecursionlimit(10**9)\ndef f(x): return sorted([x], key=f)\nf(0)",
                "was ended by SIGSEGV",
            ),
        ],
    )
    def test_22_it_is_said_and_the_earlier_blocks_run_again(self, short: Session, code: str, how: str) -> None:
        short.run("import os\nx = [1]\nopen('file', 'w').write('kept')")
        result = short.run("x.append(2)\nprint('lost')\n" + code)
        assert result.state_lost
        assert not result.timed_out
        assert result.error is not None
        assert result.error.type == "Killed"
        assert f"Killed: the interpreter {how}" in result.text
        after = short.run("x, open('file').read()")
        assert (after.text, after.state_lost) == ("([1], 'kept')", False)

    def test_killing_itself(self, short: Session, level: str) -> None:
        result = short.run("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
        if level == "full":  # process 1 of a namespace is spared the signals of its own namespace
            assert (result.text, result.state_lost) == ("", False)
        else:
            assert "was ended by SIGKILL (killed)" in result.text

    def test_in_the_first_block_nothing_is_promised(self, short: Session) -> None:
        assert short.run("import os; os._exit(0)").text == (
            "Killed: the interpreter exited with status 0. What this block did is lost."
        )
        assert short.run("1").text == "1"

    def test_what_differs_when_run_again_is_said(self, short: Session) -> None:
        short.run("import time\nt = time.time_ns()\nt")
        short.run("import os; os._exit(0)")
        result = short.run("t > 0")
        assert result.state_lost
        assert result.text.startswith("[The interpreter was restarted. The earlier blocks were run again, but")
        assert result.text.endswith("\nTrue")
        assert not short.run("t > 0").state_lost

    def test_what_was_interrupted_is_not_run_again_and_that_is_said(self, short: Session) -> None:
        short.run("n = 0\nwhile True: n += 1")
        short.run("import os; os._exit(0)")
        result = short.run("'n' in globals()")
        assert result.state_lost
        assert result.text.endswith("\nFalse")

    def test_addresses_do_not_count_as_a_difference(self, short: Session) -> None:
        short.run("import os\nclass C: pass\nkept = [C() for _ in range(1000)]\nkept[-1], os.getpid() and C()")
        short.run("os._exit(0)")
        assert not short.run("len(kept)").state_lost

    def test_tools_are_not_called_again(self, short_pool: SandboxPool) -> None:
        calls: list[Any] = []

        def call(_name: str, arguments: list[Any], _keywords: dict[str, Any]) -> int:
            calls.append(arguments)
            return len(calls)

        with short_pool.session(tools=["count"], call_tool=call) as session:
            assert session.run("a = count('a'), count('b')\na").text == "(1, 2)"
            session.run("import os; os.abort()")
            assert session.run("a").text == "(1, 2)"
            assert calls == [["a"], ["b"]]
            assert session.run("count('c')").text == "3"

    def test_earlier_blocks_that_cannot_run_again_are_said_to_be_gone(self, level: str, tmp_path: Path) -> None:
        os.chmod(tmp_path, 0o755)
        pool = SandboxPool(isolation=level, preload=[], readable=[str(tmp_path)])  # type: ignore[arg-type]
        with pool, pool.session() as session:
            # The block survives until the host does something.
            session.run(f"import os\nif os.listdir({str(tmp_path)!r}): os._exit(1)\nkept = 1")
            (tmp_path / "something").touch()
            session.run("os._exit(2)")
            result = session.run("'kept' in globals()")
        assert result.state_lost
        assert result.text.startswith("[The interpreter was restarted, and the earlier blocks could not be run again")
        assert result.text.endswith("\nFalse")

    def test_killed_between_two_blocks_it_goes_on(self, short: Session) -> None:
        short.run("x = 4")
        short.kill()
        assert not short.alive
        result = short.run("x")
        assert (result.text, result.state_lost) == ("4", False)

    def test_dying_between_two_blocks_is_not_the_next_ones_doing(self, short: Session) -> None:
        short.run("x = 4")
        # When the block is over, however long that takes.
        code = FIND_WORKER + "import os, threading, time\n"
        code += "def end():\n    while worker._nonce: time.sleep(0.01)\n    os._exit(0)\n"
        short.run(code + "threading.Thread(target=end).start() if x else None")
        process = short._interpreter.process
        assert process is not None
        assert eventually(process.disturbed)
        result = short.run("x")
        # The block that set the timer is not run again, and so cannot end it a second time.
        assert result.state_lost
        assert result.text.endswith("\n4")
        time.sleep(0.5)
        assert short.run("x").text == "4"


class TestValidation:
    @pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(SandboxLimits)])
    @pytest.mark.parametrize("value", [-1, "5", True, float("nan")])
    def test_impossible_values_are_refused_by_name(self, field: str, value: Any) -> None:
        with pytest.raises(ConfigurationError, match=f"SandboxLimits.{field}="):
            SandboxLimits(**{field: value})

    def test_unknown_ones_too(self) -> None:
        with pytest.raises(TypeError):
            SandboxLimits(wall_clock=3)  # type: ignore[call-arg]

    @pytest.mark.parametrize(
        ("settings", "named"),
        [
            ({"isolation": "none"}, "isolation"),
            ({"error_style": "long"}, "error_style"),
            ({"limits": 5}, "limits"),
            ({"preload": "numpy"}, "preload"),
            ({"preload": ["no_such_module"]}, "preload"),
            ({"preload": ["a b"]}, "preload"),
            ({"environment": {"A=B": "x"}}, "environment"),
            ({"environment": {"A": 1}}, "environment"),
            ({"readable": "/usr"}, "readable"),
            ({"readable": ["/no/such/folder"]}, "readable"),
            ({"readable": ["relative"]}, "readable"),
            ({"allow_missing": "filesystem"}, "allow_missing"),
            ({"allow_missing": {"everything"}}, "allow_missing"),
        ],
    )
    def test_pools_refuse_what_cannot_be(self, settings: Any, named: str) -> None:
        with pytest.raises(ConfigurationError, match=named):
            SandboxPool(**settings)

    def test_a_preload_that_fails_is_named(self, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "fails_on_import.py").write_text("1/0")
        monkeypatch.syspath_prepend(str(tmp_path))
        pool = SandboxPool(preload=["fails_on_import"], environment={"PYTHONPATH": str(tmp_path)})
        with pytest.raises(ConfigurationError, match=r"fails_on_import.*ZeroDivisionError"):
            pool.start()

    def test_code_must_be_text(self, short: Session) -> None:
        with pytest.raises(ConfigurationError, match="code"):
            short.run(b"1")  # type: ignore[arg-type]
        assert short.run("1").text == "1"

    @pytest.mark.parametrize("seed", ["1", 1.5, True])
    def test_seeds_must_be_integers(self, short_pool: SandboxPool, seed: Any) -> None:
        with pytest.raises(ConfigurationError, match="seed"):
            short_pool.session(seed=seed)
