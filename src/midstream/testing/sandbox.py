"""What any sandbox must do, and must not let code do, tried on the sandbox itself.

::

    check_sandbox(lambda limits: MyRemotePool(limits=limits))
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from midstream.sandbox.limits import SandboxLimits
from midstream.testing.outcomes import CheckFailed, CheckOutcome, Wrong, run_checks
from midstream.types import ExecutionResult

MIB = 1 << 20
LIMITS = SandboxLimits(
    wall_time=1.0,
    grace=1.0,
    memory=512 * MIB,
    output_characters=4096,
    tool_calls=50,
    working_directory=16 * MIB,
)
"""What :func:`check_sandbox` asks its pool to hold sessions to."""


class CheckedSession(Protocol):
    """What the checks use of a session."""

    def run(self, code: str) -> ExecutionResult: ...

    def close(self) -> None: ...


class CheckedPool(Protocol):
    """What the checks use of a pool: as of :class:`~midstream.sandbox.SandboxPool`."""

    def session(
        self,
        *,
        tools: Mapping[str, str] = ...,
        call_tool: Callable[[str, list[Any], dict[str, Any]], Any] | None = ...,
        seed: int | None = ...,
    ) -> CheckedSession: ...

    def close(self) -> None: ...


def check_sandbox(make_pool: Callable[[SandboxLimits], CheckedPool]) -> tuple[CheckOutcome, ...]:
    """Hold a sandbox to what ours are held to; returns what was checked.

    ``make_pool`` is given :data:`LIMITS` and returns a pool whose sessions are bounded by them; it is closed
    at the end. Raises :class:`CheckFailed`, which names every check that failed and how. Files of this
    machine that anyone may read serve as canaries; nothing that the checks try does harm where it works.
    """
    pool = make_pool(LIMITS)
    try:
        outcomes = run_checks(CHECKS, pool)
    finally:
        pool.close()
    if not all(outcome.passed for outcome in outcomes):
        raise CheckFailed(outcomes)
    return outcomes


def _expect(true: bool, what: str, result: ExecutionResult | None = None) -> None:
    if not true:
        raise Wrong(what if result is None else f"{what}; it gave {result.text[:200]!r}")


def _ended(result: ExecutionResult) -> bool:
    return result.state_lost or result.rolled_back


class _Run:
    """A session for one check."""

    def __init__(self, pool: CheckedPool, **settings: Any) -> None:
        self._session = pool.session(**settings)

    def __call__(self, code: str) -> ExecutionResult:
        return self._session.run(code)

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()


def state_lives_on(pool: CheckedPool) -> None:
    with _Run(pool) as run:
        run("x = 3\ndef f(n): return n * x")
        result = run("f(14)")
        _expect((result.text, result.value, result.error) == ("42", "42", None), "names did not live on", result)


def output_comes_before_the_value(pool: CheckedPool) -> None:
    with _Run(pool) as run:
        result = run("print('a', end='')\n5")
        _expect((result.text, result.stdout, result.value) == ("a\n5", "a", "5"), "output and value", result)


def errors_are_results(pool: CheckedPool) -> None:
    with _Run(pool) as run:
        for code, kind in (("1/0", "ZeroDivisionError"), ("x x", "SyntaxError"), ("raise SystemExit", "SystemExit")):
            result = run(code)
            _expect(result.error is not None and result.error.type == kind, f"{code!r} is no {kind}", result)
            _expect(not result.state_lost, f"{code!r} cost the session its state", result)


def sessions_share_nothing(pool: CheckedPool) -> None:
    with _Run(pool) as one, _Run(pool) as other:
        one("import builtins, os\nsecret = builtins.secret = 1\nopen('secret', 'w').write('s')\nos.environ['S'] = '1'")
        result = other("import os\n'secret' in dir() or 'secret' in dir(__builtins__), os.listdir(), 'S' in os.environ")
        _expect(result.text == "(False, [], False)", "one session saw what another did", result)


def a_seed_gives_the_same_numbers(pool: CheckedPool) -> None:
    code = "import random\nrandom.random(), hash('a')"
    with _Run(pool, seed=1) as one, _Run(pool, seed=1) as same, _Run(pool, seed=2) as other:
        first, second, third = one(code), same(code), other(code)
        _expect(first.text == second.text, "the same seed gave other numbers", second)
        _expect(first.text != third.text, "another seed gave the same numbers", third)


def files_of_the_host_are_out_of_reach(pool: CheckedPool) -> None:
    with tempfile.NamedTemporaryFile("w", prefix="canary-") as canary, _Run(pool) as run:
        canary.write("canary")
        canary.flush()
        os.chmod(canary.name, 0o666)  # noqa: S103  # permissions alone must not be what protects it
        for path in (canary.name, "../../../../../.." + canary.name):
            result = run(f"import pathlib\npathlib.Path({path!r}).read_text()")
            _expect(result.error is not None, "code read a file of the host", result)
        run(f"open({canary.name!r}, 'w').write('x')")
        run(f"import os; os.unlink({canary.name!r})")
        with open(canary.name) as file:
            _expect(file.read() == "canary", "code changed a file of the host")


def folders_of_the_host_are_out_of_reach(pool: CheckedPool) -> None:
    with tempfile.TemporaryDirectory(prefix="canary-") as folder, _Run(pool) as run:
        os.chmod(folder, 0o777)  # noqa: S103  # as above
        with open(os.path.join(folder, "canary"), "w") as file:
            file.write("canary")
        os.chmod(file.name, 0o666)  # noqa: S103
        for code in (
            f"open({folder + '/mine'!r}, 'w').write('x')",
            f"os.mkdir({folder + '/mine'!r})",
            f"os.symlink({file.name!r}, 'link') or open('link').read()",
            f"os.link({file.name!r}, 'hard') or open('hard').read()",
            f"os.rename({file.name!r}, 'moved') or open('moved').read()",
            f"os.chmod({file.name!r}, 0)",
        ):
            run(f"import os\n{code}")
            state = sorted(os.listdir(folder)), os.stat(file.name).st_mode & 0o777, os.stat(file.name).st_nlink
            _expect(state == (["canary"], 0o666, 1), f"{code} changed a folder of the host")
        for name in ("link", "hard", "moved"):
            _expect(run(f"open({name!r}).read()").error is not None, "code read a file of the host by a link")


def the_hosts_environment_is_hidden(pool: CheckedPool) -> None:
    with _Run(pool) as run:
        own = {name for name, value in os.environ.items() if name.isidentifier() and len(value) > 8}
        for name in sorted(own - {"PATH", "HOME", "PWD", "TMPDIR", "LANG", "PYTHONHOME", "LD_LIBRARY_PATH"}):
            result = run(f"import os\nos.environ.get({name!r}) == {os.environ[name]!r}")
            _expect(result.text == "False", f"code saw the host's environment variable {name}", result)


def there_is_no_network(pool: CheckedPool) -> None:
    attempts = (
        "socket.create_connection(('127.0.0.1', 9), 1)",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()",
    )
    with _Run(pool) as run:
        for code in attempts:
            error = run(f"import socket\n{code}").error
            _expect(error is not None and error.type != "ConnectionRefusedError", f"{code} reached the network")


def programs_cannot_be_started(pool: CheckedPool) -> None:
    with _Run(pool) as run:
        for code in ("os.fork() and 1", "subprocess.run(['/bin/true']) and 1", "os.posix_spawn('/bin/true', [''], {})"):
            result = run(f"import os, subprocess\n{code}")
            _expect(result.error is not None, f"{code} worked", result)
        _expect(run("import os\nos.system('true') == 0").text == "False", "os.system worked")


def others_cannot_be_signalled(pool: CheckedPool) -> None:
    with _Run(pool) as run:
        for target in (str(os.getpid()), "os.getppid() or -1"):
            result = run(f"import os\nos.kill({target}, 0)")
            _expect(result.error is not None, f"code could signal {target}", result)


def others_cannot_be_looked_into(pool: CheckedPool) -> None:
    with _Run(pool) as run:
        for name in ("environ", "maps"):
            result = run(f"import pathlib\npathlib.Path('/proc/{os.getpid()}/{name}').read_bytes()")
            _expect(result.error is not None, f"code read the {name} of a process of the host", result)
        result = run(f"import ctypes\nctypes.CDLL(None).ptrace(16, {os.getpid()}, 0, 0)")
        _expect(result.error is not None or result.text == "-1", "code could trace a process of the host", result)


def limits_cannot_be_raised(pool: CheckedPool) -> None:
    with _Run(pool) as run:
        for name in ("AS", "CPU", "FSIZE", "NOFILE"):
            given = run(f"import resource\nresource.getrlimit(resource.RLIMIT_{name})[1]")
            if given.error is None and given.text != "-1":  # it is bounded in this way
                code = f"resource.setrlimit(resource.RLIMIT_{name}, (int({given.text}) + 4096,) * 2)"
                _expect(run(code).error is not None, f"code could raise RLIMIT_{name}")


def loops_are_interrupted_and_state_kept(pool: CheckedPool) -> None:
    with _Run(pool) as run:
        run("x = 41")
        result = run("x += 1\nwhile True: pass")
        _expect(result.timed_out and result.breached == "wall_time", "an endless loop is no time-out", result)
        _expect(result.state_lost or run("x").text == "42", "the state was lost, and that was not said")


def what_cannot_be_interrupted_is_killed(pool: CheckedPool) -> None:
    with _Run(pool) as run:
        result = run("import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nsum(range(10**12))")
        _expect(result.timed_out and _ended(result), "a loop in C did not end, or that was not said", result)
        _expect(run("1 + 1").text.endswith("2"), "the session did not go on")


def memory_is_bounded(pool: CheckedPool) -> None:
    with _Run(pool) as run:
        result = run("kept = bytearray(8 << 30)")
        _expect(result.breached == "memory" or _ended(result), "code got 8 GiB", result)
        _expect(run("1 + 1").text.endswith("2"), "the session did not go on")


def files_are_bounded(pool: CheckedPool) -> None:
    with _Run(pool) as run:
        result = run("for n in range(64):\n    with open(f'f{n}', 'wb') as file: file.write(bytes(1 << 20))")
        _expect(result.breached is not None or result.error is not None, "code got 64 MiB of files", result)
        _expect(
            run("import os\nfor name in os.listdir(): os.remove(name)\n1 + 1").text == "2", "the session did not go on"
        )


def descriptors_and_threads_are_bounded(pool: CheckedPool) -> None:
    threads = "for _ in range(5000): threading.Thread(target=go.wait, daemon=True).start()"
    for code in (
        "kept = []\nfor _ in range(5000): kept.append(open('f', 'w'))",
        f"import threading\ngo = threading.Event()\n{threads}",
    ):
        with _Run(pool) as run:
            result = run(code)
            _expect(result.error is not None, f"{code} worked", result)


def output_is_bounded(pool: CheckedPool) -> None:
    most = LIMITS.output_characters + 500
    with _Run(pool) as run:
        for code in ("print('x' * (50 << 20))", "'y' * (1 << 20)", "raise ValueError('z' * (1 << 20))"):
            result = run(code)
            _expect(len(result.text) <= most and len(result.stdout) <= most, f"{code} came out whole")


def what_shows_itself_badly_is_an_error(pool: CheckedPool) -> None:
    with _Run(pool) as run:
        run("x = 41\nclass Shown:\n    def __init__(self, show): type(self).__repr__ = lambda self: show()")
        for show in ("lambda: 1 / 0", "lambda: 5", "lambda: exit()"):
            result = run(f"Shown({show})")
            _expect(result.error is not None and not _ended(result), f"a repr of {show} is no error", result)
        _expect(run("x").text == "41", "the state was lost")


def recursion_without_end_is_an_error(pool: CheckedPool) -> None:
    with _Run(pool) as run:
        result = run("x = 41\ndef down(): down()\ndown()")
        _expect(result.error is not None and result.error.type == "RecursionError", "no RecursionError", result)
        _expect(run("x").text == "41", "the state was lost")


def a_saboteur_harms_only_itself(pool: CheckedPool) -> None:
    with _Run(pool) as run, _Run(pool) as other:
        run("import builtins, json, os, sys\nsys.stdout = json.dumps = os.write = builtins.repr = builtins.len = None")
        run("len('')")  # whatever it gives, nothing is raised here
        _expect(other("import json\njson.dumps(len('ab'))").text == "'2'", "another session was harmed")


def a_death_is_said(pool: CheckedPool) -> None:
    with _Run(pool) as run:
        result = run("import os; os._exit(3)")
        _expect(_ended(result) and result.error is not None, "the death of an interpreter was not said", result)
        _expect(run("1 + 1").text.endswith("2"), "the session did not go on")


def tools_are_called_and_their_errors_raised(pool: CheckedPool) -> None:
    answered = 0

    def call(name: str, arguments: list[Any], keyword_arguments: dict[str, Any]) -> Any:
        nonlocal answered
        answered += 1
        if arguments == [0]:
            raise KeyError("none")
        return [name, arguments, keyword_arguments]

    with _Run(pool, tools={"look_up": ""}, call_tool=call) as run:
        result = run("look_up(1, key=[2])")
        _expect(result.text == "['look_up', [1], {'key': [2]}]", "a tool's value", result)
        _expect([each.name for each in result.tool_calls] == ["look_up"], "the call is not in the result")
        result = run("try: look_up(0)\nexcept KeyError as error: print(error)")
        _expect(result.text == "'none'", "a tool's exception", result)
        answered = 0
        result = run("for _ in range(60): look_up(1)")
        _expect(result.error is not None and answered <= LIMITS.tool_calls, "the calls are not bounded", result)


def what_is_no_plain_data_reaches_no_tool(pool: CheckedPool) -> None:
    given: list[Any] = []

    def call(name: str, arguments: list[Any], keyword_arguments: dict[str, Any]) -> Any:
        given.append((name, arguments, keyword_arguments))

    code = "class Evil:\n    def __reduce__(self): return (print, ('unpickled',))"
    with _Run(pool, tools={"look_up": ""}, call_tool=call) as run:
        run(code)
        for argument in ("Evil()", "[Evil()]", "lambda: 1", "open('f', 'w')", "object()"):
            result = run(f"look_up({argument})")
            _expect(result.error is not None, f"a tool was called with {argument}", result)
    _expect(given == [], f"a tool was given {given!r:.200}")


CHECKS: tuple[Callable[[CheckedPool], None], ...] = (
    state_lives_on,
    output_comes_before_the_value,
    errors_are_results,
    sessions_share_nothing,
    a_seed_gives_the_same_numbers,
    files_of_the_host_are_out_of_reach,
    folders_of_the_host_are_out_of_reach,
    the_hosts_environment_is_hidden,
    there_is_no_network,
    programs_cannot_be_started,
    others_cannot_be_signalled,
    others_cannot_be_looked_into,
    limits_cannot_be_raised,
    loops_are_interrupted_and_state_kept,
    what_cannot_be_interrupted_is_killed,
    memory_is_bounded,
    files_are_bounded,
    descriptors_and_threads_are_bounded,
    output_is_bounded,
    what_shows_itself_badly_is_an_error,
    recursion_without_end_is_an_error,
    a_saboteur_harms_only_itself,
    a_death_is_said,
    tools_are_called_and_their_errors_raised,
    what_is_no_plain_data_reaches_no_tool,
)
