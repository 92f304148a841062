"""Commands, files and samples, as evaluations use them; and an evaluation of Inspect's own, from end to end."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("inspect_ai", reason="Inspect AI is not installed: make test-inspect")

from inspect_ai import Task, eval_async
from inspect_ai.dataset import Sample
from inspect_ai.model import ModelOutput, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import bash, python
from inspect_ai.util import OutputLimitExceededError, SandboxEnvironmentSpec, SandboxUserUnsupportedError
from inspect_ai.util._sandbox.limits import override_max_exec_output_size
from inspect_ai.util._sandbox.registry import registry_find_sandboxenv

from midstream.errors import ConfigurationError, ProtocolError
from midstream.integrations.inspect import MidstreamSandboxEnvironment, SandboxConfig, environment

CONFIG = SandboxConfig(preload=())


@pytest.fixture(params=["auto", "container"], scope="module")
def config(request: pytest.FixtureRequest) -> SandboxConfig:
    return SandboxConfig(preload=(), isolation=request.param)


@pytest.fixture
async def pair(config: SandboxConfig) -> AsyncIterator[list[MidstreamSandboxEnvironment]]:
    """The sandboxes of two samples."""
    cls = MidstreamSandboxEnvironment
    await cls.task_init("task", config)
    try:
        samples = [await cls.sample_init("task", config, {}) for _ in range(2)]
        yield [sample["default"].as_type(cls) for sample in samples]
        for sample in samples:
            await cls.sample_cleanup("task", config, sample, False)
    finally:
        await cls.task_cleanup("task", config, True)
    assert not environment._pools


@pytest.fixture
def box(pair: list[MidstreamSandboxEnvironment]) -> MidstreamSandboxEnvironment:
    return pair[0]


async def test_code_is_a_program(box: MidstreamSandboxEnvironment) -> None:
    result = await box.exec(["python3", "-c", "import sys; print(sys.argv, __name__); sys.exit(3)", "a", "b c"])
    assert (result.success, result.returncode) == (False, 3)
    assert result.stdout == "['-c', 'a', 'b c'] __main__\n"
    result = await box.exec(["python", "-"], input="import sys\nprint('out')\nprint('err', file=sys.stderr)\n1 + 1")
    assert (result.success, result.stdout, result.stderr) == (True, "out\n", "err\n")
    result = await box.exec(["bash", "--login", "-c", "python3 -"], input="print(6 * 7)")  # as Inspect's python tool
    assert (result.stdout, result.stderr) == ("42\n", "")


async def test_an_error_is_told_as_python_does(box: MidstreamSandboxEnvironment) -> None:
    result = await box.exec(["python3", "-"], input="def f():\n    return 1 / 0\n\nf()\n")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith('Traceback (most recent call last):\n  File "<stdin>", line 4, in <module>\n')
    assert result.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert "midstream" not in result.stderr
    assert "SyntaxError" in (await box.exec(["python3", "-c", "1 +"])).stderr
    assert (await box.exec(["python3", "-c", "raise SystemExit('so it is')"])).stderr == "so it is\n"
    missing = await box.exec(["python3", "none.py"])
    assert (missing.returncode, "none.py" in missing.stderr) == (2, True)


async def test_nothing_but_files_is_left_for_the_next_command(box: MidstreamSandboxEnvironment) -> None:
    await box.write_file("helper.py", "value = 1")
    change = "import helper, os, sys, logging; os.environ['X'] = '1'; os.mkdir('d'); os.chdir('d'); name = helper.value"
    change += "; logging.basicConfig(level=10); sys.argv.append('more'); sys.path.append('/x'); print(name)"
    assert (await box.exec(["python3", "-c", change])).stdout == "1\n"
    await box.write_file("helper.py", "value = 'changed'")
    look = "import helper, os, sys, logging; print(helper.value, os.environ.get('X'), 'name' in globals(), sys.argv)"
    look += "; print(os.listdir(), '/x' in sys.path, logging.root.handlers)"
    result = await box.exec(["python3", "-c", look])
    first, second = result.stdout.splitlines()
    assert first == "changed None False ['-c']"
    assert second.endswith(" False []")
    assert "'d'" in second
    assert "midstream" not in second  # nor what carries input and output


async def test_scripts_modules_and_folders(box: MidstreamSandboxEnvironment) -> None:
    await box.write_file("package/__init__.py", "")
    await box.write_file("package/tool.py", "import sys\nprint(__name__, sys.argv[1:])")
    await box.write_file("package/beside.py", "from tool import *\nprint(__file__)")
    assert (await box.exec(["python3", "-m", "package.tool", "x"])).stdout == "__main__ ['x']\n"
    assert (await box.exec(["python3", "package/tool.py", "y"])).stdout == "__main__ ['y']\n"
    assert (await box.exec(["python3", "beside.py"], cwd="package")).stdout == "tool []\nbeside.py\n"
    where = (await box.exec(["pwd"])).stdout.strip()
    assert (await box.exec(["ls"], cwd=f"{where}/package")).stdout.split() == ["__init__.py", "beside.py", "tool.py"]
    assert await box.read_file(f"{where}/package/__init__.py") == ""
    gone = await box.exec(["ls"], cwd="nowhere")
    assert (gone.success, "FileNotFoundError" in gone.stderr) == (False, True)


async def test_input_environment_and_bytes(box: MidstreamSandboxEnvironment) -> None:
    code = "import os, sys; print(os.environ['A']); sys.stdout.buffer.write(sys.stdin.buffer.read()[::-1])"
    result = await box.exec(["python3", "-c", code], input=b"\xff\x00abc", env={"A": "é"})
    assert result.stdout == "é\ncba\x00�"
    low = await box.exec(["python3", "-c", "import os; print('a'); os.write(1, b'b\\n')"])
    assert low.stdout.split() == ["a", "b"]
    assert (await box.exec(["python3", "-c", "import sys; sys.stdout.close()"])).returncode == 0


async def test_samples_share_nothing(pair: list[MidstreamSandboxEnvironment]) -> None:
    one, other = pair
    await one.write_file("secret.txt", "mine")
    with pytest.raises(FileNotFoundError):
        await other.read_file("secret.txt")
    where = (await one.exec(["pwd"])).stdout.strip()
    peek = await other.exec(["python3", "-c", f"print(open({where + '/secret.txt'!r}).read())"])
    assert "mine" not in peek.stdout
    host = await one.exec(["python3", "-c", "open('/etc/passwd')"])
    assert not host.success
    assert not (await one.exec(["python3", "-c", "import socket; socket.socket()"])).success


async def test_commands_at_once_take_turns(pair: list[MidstreamSandboxEnvironment]) -> None:
    code = "import os\nnames = os.listdir()\nopen(f'{len(names)}.txt', 'w').close()\nprint(len(names))"
    results = await asyncio.gather(*(box.exec(["python3", "-c", code]) for box in pair for _ in range(5)))
    assert [result.stdout for result in results] == [f"{n}\n" for n in range(5)] * 2


STUBBORN = """
import time
while True:
    try:
        time.sleep(9)
    except BaseException:
        pass
"""


@pytest.mark.parametrize("code", ["while True: pass", STUBBORN])
async def test_a_command_whose_time_is_over_is_undone(box: MidstreamSandboxEnvironment, code: str) -> None:
    await box.write_file("kept.txt", "kept")
    with pytest.raises(TimeoutError):
        await box.exec(["python3", "-c", "open('half.txt', 'w').close()\n" + code], timeout=1)
    result = await box.exec(["ls"])
    assert result.stdout == "kept.txt\n"


async def test_a_command_that_dies_is_not_the_sandbox(box: MidstreamSandboxEnvironment) -> None:
    await box.write_file("kept.txt", "kept")
    died = await box.exec(["python3", "-c", "import os; os._exit(0)"])
    assert (died.success, died.returncode) == (False, 137)
    assert await box.read_file("kept.txt") == "kept"


async def test_without_checkpoints(pair: Any) -> None:
    config = SandboxConfig(preload=(), checkpoint=False, limits={"wall_time": 10.0})
    cls = MidstreamSandboxEnvironment
    await cls.task_init("task", config)
    try:
        sample = await cls.sample_init("task", config, {})
        box = sample["default"].as_type(cls)
        await box.exec(["python3", "-c", "open('made.txt', 'w').write('once')"])
        with pytest.raises(TimeoutError, match="10 seconds"):
            await box.exec(["python3", "-c", "while True: pass"])
        assert (await box.exec(["python3", "-c", "import os; os._exit(1)"])).returncode == 137
        assert await box.read_file("made.txt") == "once"
        await cls.sample_cleanup("task", config, sample, False)
        with pytest.raises(ProtocolError, match="closed"):
            await box.exec(["ls"])
    finally:
        await cls.task_cleanup("task", config, True)


async def test_too_much_output(box: MidstreamSandboxEnvironment) -> None:
    with override_max_exec_output_size(1000), pytest.raises(OutputLimitExceededError) as raised:
        await box.exec(["python3", "-c", "print('x' * 100_000)"])
    assert raised.value.truncated_output == "x" * 1001
    assert (await box.exec(["python3", "-c", "print('x' * 100_000)"])).stdout == "x" * 100_000 + "\n"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["bash", "-c", "ls | wc"], "no shell"),
        (["sh", "-c", "echo $HOME"], "no shell"),
        (["bash", "-c", "X=1 python3 -"], "no shell"),
        (["bash", "script.sh"], "no shell"),
        (["gcc", "x.c"], "runs Python alone"),
        (["python3", "-i"], "there are -c, -m"),
    ],
)
async def test_what_cannot_be_done_is_raised(box: MidstreamSandboxEnvironment, command: list[str], says: str) -> None:
    with pytest.raises(NotImplementedError, match=says):
        await box.exec(command)


async def test_users_and_places_are_refused(box: MidstreamSandboxEnvironment) -> None:
    with pytest.raises(SandboxUserUnsupportedError, match="root"):
        await box.exec(["ls"], user="root")
    for path in ("/etc/passwd", "../up.txt", "a/../../up.txt"):
        with pytest.raises(PermissionError, match="working directory"):
            await box.write_file(path, "x")
        with pytest.raises(PermissionError, match="working directory"):
            await box.read_file(path)
    with pytest.raises(NotImplementedError):
        await box.connection()


async def test_spoilt_results_are_taken_for_what_they_are(box: MidstreamSandboxEnvironment) -> None:
    for left in ("'garbage'", "'[' * 100_000", "'{}'"):
        code = f"import atexit, json, sys\ndef spoil(value, file): file.write({left})\njson.dump = spoil"
        result = await box.exec(["python3", "-c", code])
        assert (result.success, result.returncode) == (False, 137)
        assert "spoilt" in result.stderr


async def test_configurations(tmp_path: Path) -> None:
    file = tmp_path / "sandbox.toml"
    file.write_text("preload = []\nmax_sessions = 3\n[limits]\nmemory = 1073741824\n")
    config = SandboxConfig.of(str(file))
    assert (config.max_sessions, config.limits) == (3, {"memory": 1 << 30})
    assert MidstreamSandboxEnvironment.config_deserialize(config.model_dump()) == config
    with pytest.raises(ConfigurationError, match="'memmory'"):
        SandboxConfig(limits={"memmory": 1}).pool()
    with pytest.raises(ValueError, match="isolated"):
        SandboxConfig(isolated=True)  # type: ignore[call-arg]
    with pytest.raises(ConfigurationError, match="task_init comes first"):
        await MidstreamSandboxEnvironment.sample_init("task", CONFIG, {})


@pytest.fixture
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inspect estimates tokens by a vocabulary that it would download."""
    from inspect_ai.model import ModelAPI

    async def count(_self: Any, text: str) -> int:
        return len(text)

    monkeypatch.setattr(ModelAPI, "count_text_tokens", count)


def calls(*codes: str, tool: str = "python", argument: str = "code") -> list[ModelOutput]:
    asked = [ModelOutput.for_tool_call("mockllm/model", tool, {argument: code}) for code in codes]
    return [*asked, ModelOutput.from_content("mockllm/model", "The answer is 42.")]


async def run_task(tmp_path: Path, outputs: list[ModelOutput], tool: Any, **sample: Any) -> Any:
    task = Task(
        dataset=[Sample(input="What is it?", target="42", **sample)],
        solver=[use_tools(tool), generate()],
        scorer=includes(),
        sandbox=SandboxEnvironmentSpec("midstream", CONFIG),
    )
    model = get_model("mockllm/model", custom_outputs=outputs, memoize=False)
    (log,) = await eval_async(task, model=model, log_dir=str(tmp_path), log_samples=True)
    return log


@pytest.mark.usefixtures("_no_network")
@pytest.mark.filterwarnings("ignore")  # Inspect's own
async def test_an_evaluation(tmp_path: Path) -> None:
    outputs = calls(
        "print(open('given.txt').read())\nopen('made.txt', 'w').write('7')",
        "print(6 * int(open('made.txt').read()))",
        "x",
    )
    log = await run_task(tmp_path, outputs, python(), files={"given.txt": "a given file"})
    assert log.status == "success", log.error
    assert log.results.scores[0].metrics["accuracy"].value == 1.0
    results = [message.content for message in log.samples[0].messages if message.role == "tool"]
    assert results[0].strip() == "a given file"
    assert results[1].strip() == "42"
    assert "NameError" in results[2]
    assert not environment._pools
    assert registry_find_sandboxenv("midstream") is MidstreamSandboxEnvironment


@pytest.mark.usefixtures("_no_network")
@pytest.mark.filterwarnings("ignore")
async def test_a_tool_that_needs_a_shell_ends_the_sample_and_is_not_shown(tmp_path: Path) -> None:
    log = await run_task(tmp_path, calls("ls | wc", tool="bash", argument="command"), bash())
    assert log.status == "error"
    assert "no shell" in log.error.message
    assert not environment._pools


def test_it_is_found_by_its_name_alone() -> None:
    """In a fresh process, by the entry point of the package."""
    import subprocess
    import sys

    code = "from inspect_ai.util._sandbox.registry import registry_find_sandboxenv as f; print(f('midstream').__name__)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ})
    assert ran.stdout.strip() == "MidstreamSandboxEnvironment", ran.stderr
