"""The sandbox environment that Inspect AI is given: a session for each sample, from a pool for each configuration."""

from __future__ import annotations

import asyncio
import base64
import binascii
import errno
import json
import os
import secrets
import tomllib
from pathlib import Path
from typing import Any, Literal, Self, overload

from inspect_ai.util import (
    ExecResult,
    OutputLimitExceededError,
    SandboxEnvironment,
    SandboxEnvironmentLimits,
    SandboxUserUnsupportedError,
    sandboxenv,
)
from pydantic import BaseModel, ConfigDict, Field

from midstream.errors import ConfigurationError, SandboxFileError
from midstream.integrations.inspect import inside
from midstream.integrations.inspect.commands import parse
from midstream.sandbox import SandboxLimits, SandboxPool, Session
from midstream.types import ExecutionResult

_INPUT, _OUTPUT = ".midstream-input", ".midstream-output"

_PREPARE = """
import os, sys, types
_module = types.ModuleType("midstream_commands")
exec(compile({source!r}, "<midstream>", "exec"), _module.__dict__)
sys.modules["midstream_commands"] = _module
del _module
os.getcwd()
"""

_RUN = "sys.modules['midstream_commands'].run({request!r})"

KILLED = 137
"""The exit status of a command whose interpreter died."""


class SandboxConfig(BaseModel):
    """What :class:`~midstream.SandboxPool` takes, for one evaluation: ``sandbox=("midstream", "sandbox.toml")`` or
    ``SandboxEnvironmentSpec("midstream", SandboxConfig(...))``.

    - ``limits``: fields of :class:`~midstream.SandboxLimits`. ``wall_time`` is of a command that has no timeout of its
      own, 600 seconds by default; a file may have 100 MiB, and all files of a sample 512 MiB.
    - ``checkpoint``: whether a command that is killed, or whose time is over, is undone, files and all. Without it the
      interpreter is built again by running the earlier commands again.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    isolation: Literal["auto", "full", "container"] = "auto"
    preload: tuple[str, ...] | None = None
    environment: dict[str, str] = Field(default_factory=dict)
    readable: tuple[str, ...] = ()
    allow_missing: tuple[str, ...] = ()
    limits: dict[str, float | int | None] = Field(default_factory=dict)
    warm: int = 0
    max_sessions: int | None = None
    checkpoint: bool = True

    def __hash__(self) -> int:
        """Inspect keeps configurations as keys."""
        return hash(self.model_dump_json())

    @classmethod
    def of(cls, config: BaseModel | str | None) -> Self:
        """From what Inspect hands over: a file in TOML, a model, or nothing."""
        if config is None:
            return cls()
        if isinstance(config, cls):
            return config
        if isinstance(config, str):
            with open(config, "rb") as file:
                return cls.model_validate(tomllib.load(file))
        raise ConfigurationError(f"config={config!r}: must be a SandboxConfig, or the path of such a file in TOML")

    def pool(self) -> SandboxPool:
        options = self.model_dump(exclude={"limits", "checkpoint"})
        options["allow_missing"] = frozenset(self.allow_missing)
        limits: dict[str, Any] = {
            "wall_time": 600.0,
            "file_size": 100 << 20,
            "working_directory": 512 << 20,
            **self.limits,
        }
        unknown = sorted(limits.keys() - SandboxLimits.__dataclass_fields__.keys())
        if unknown:
            raise ConfigurationError(f"limits: unknown field {unknown[0]!r} of SandboxLimits")
        return SandboxPool(
            **options, limits=SandboxLimits(**limits), forkable=self.checkpoint, checkpoint=self.checkpoint
        )


_pools: dict[str, SandboxPool] = {}
_tasks: dict[str, int] = {}
"""How many tasks use each pool, by the configuration."""


@sandboxenv(name="midstream")
class MidstreamSandboxEnvironment(SandboxEnvironment):  # type: ignore[misc]  # it may not be installed
    """A Python interpreter of its own for each sample, isolated as :class:`~midstream.SandboxPool` isolates.

    ``exec`` runs ``python`` with code, a script, a module or its standard input; the same as a plain command of a
    shell, as Inspect's ``python`` tool sends it; and a few commands for files. Each runs as a program of its own, one
    after the other, with streams, arguments and an exit status; only the interpreter is one and the same, so a command
    may still find modules changed that an earlier one has changed. Anything else (shells, other programs, other users)
    is refused by an exception: nothing of what this sandbox lacks is shown to a model as a failure of its own.

    Files are those of the working directory. A fault of the sandbox itself is raised.
    """

    def __init__(self, session: Session, folder: str, wall_time: float) -> None:
        super().__init__()
        self._session = session
        self._wall_time = wall_time
        self._folder = folder
        self._one_at_a_time = asyncio.Lock()

    # --- its life

    @classmethod
    async def task_init(cls, task_name: str, config: BaseModel | str | None) -> None:
        del task_name
        settings = SandboxConfig.of(config)
        key = settings.model_dump_json()
        _tasks[key] = _tasks.get(key, 0) + 1
        if key not in _pools:
            _pools[key] = settings.pool()
        await asyncio.to_thread(_pools[key].start)  # a machine that cannot isolate is refused here

    @classmethod
    async def task_cleanup(cls, task_name: str, config: BaseModel | str | None, cleanup: bool) -> None:
        """The last task ends the pool. Nothing is left of a sandbox that could be kept (``cleanup=False``)."""
        del task_name, cleanup
        key = SandboxConfig.of(config).model_dump_json()
        _tasks[key] = _tasks.get(key, 1) - 1
        if _tasks[key] <= 0:
            del _tasks[key]
            pool = _pools.pop(key, None)
            if pool is not None:
                await asyncio.to_thread(pool.close)

    @classmethod
    async def sample_init(
        cls, task_name: str, config: BaseModel | str | None, metadata: dict[str, str]
    ) -> dict[str, SandboxEnvironment]:
        del task_name, metadata
        settings = SandboxConfig.of(config)
        pool = _pools.get(settings.model_dump_json())
        if pool is None:
            raise ConfigurationError("sample_init: task_init comes first")
        session = await pool.session_async()
        try:
            source = Path(inside.__file__).read_text()
            prepared = await session.run_async(_PREPARE.format(source=source), checkpoint=False)
            if prepared.error is not None or prepared.value is None:
                raise ConfigurationError(f"the limits leave no room for commands to run: {prepared.text}")
        except BaseException:
            session.close()
            raise
        return {"default": cls(session, prepared.value.strip("'"), pool.limits.wall_time)}

    @classmethod
    async def sample_cleanup(
        cls,
        task_name: str,
        config: BaseModel | str | None,
        environments: dict[str, SandboxEnvironment],
        interrupted: bool,
    ) -> None:
        del task_name, config, interrupted
        for environment in environments.values():
            environment.as_type(cls)._session.close()

    @classmethod
    def config_files(cls) -> list[str]:
        return []

    @classmethod
    def config_deserialize(cls, config: dict[str, Any]) -> BaseModel:
        return SandboxConfig(**config)

    # --- commands

    async def exec(
        self,
        cmd: list[str],
        input: str | bytes | None = None,  # noqa: A002  # Inspect's name
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        user: str | None = None,
        timeout: int | None = None,  # Inspect's name
        timeout_retry: bool = True,
        concurrency: bool = True,
    ) -> ExecResult[str]:
        """Run a command. A second one waits until the first is over; its ``timeout`` counts from when it begins.

        A command whose ``timeout`` is over is undone, and ``TimeoutError`` raised; it is not tried again. The exit
        status of one whose interpreter died is 137. Raises ``NotImplementedError`` for what takes a shell or another
        program, ``SandboxUserUnsupportedError`` for any ``user``, and ``OutputLimitExceededError`` for too much output.
        """
        del timeout_retry, concurrency
        if user is not None:
            raise SandboxUserUnsupportedError(f"user={user!r}: this sandbox has one user for each sample, and no names")
        command = parse(cmd)
        request = {
            **command.as_dict(),
            "folder": "." if cwd is None else cwd,
            "environment": dict(env or {}),
            "input": None if input is None else _INPUT,
            "output": _OUTPUT,
            "most": SandboxEnvironmentLimits.MAX_EXEC_OUTPUT_SIZE,
            "nonce": secrets.token_hex(
                8
            ),  # where an interpreter is rebuilt, what an earlier command left is there again
        }
        async with self._one_at_a_time:
            if input is not None:
                await self._session.put_async(_INPUT, input.encode() if isinstance(input, str) else input)
            async with asyncio.timeout(timeout):
                result = await self._session.run_async(_RUN.format(request=request))
            if result.timed_out:
                raise TimeoutError(f"the command took longer than {self._wall_time:g} seconds")
            try:
                gave = await self._session.get_async(_OUTPUT)
            except SandboxFileError:
                gave = b""
        return self._outcome(gave, result, request["nonce"])

    def _outcome(self, gave: bytes, result: ExecutionResult, nonce: str) -> ExecResult[str]:
        """What the command left: as little to be believed as all that comes from inside."""
        try:
            told = json.loads(gave)
            if told["nonce"] != nonce:
                raise ValueError("another command's")
            status, folder = int(told["returncode"]), str(told["folder"])
            outputs = [base64.b64decode(told[name], validate=True) for name in ("stdout", "stderr")]
        except (ValueError, KeyError, TypeError, RecursionError, binascii.Error):
            return ExecResult(False, KILLED, "", result.text or "the command spoilt what tells of its result")
        self._folder = folder
        for output in outputs:
            if len(output) > SandboxEnvironmentLimits.MAX_EXEC_OUTPUT_SIZE:
                raise OutputLimitExceededError(
                    SandboxEnvironmentLimits.MAX_EXEC_OUTPUT_SIZE_STR, output.decode("utf-8", "replace")
                )
        stdout, stderr = (output.decode("utf-8", "replace") for output in outputs)
        # What C code wrote stands behind what Python wrote.
        return ExecResult(status == 0, status, stdout + result.stdout, stderr)

    # --- files

    async def write_file(self, file: str, contents: str | bytes) -> None:
        """Write a file of the working directory. Raises as Inspect has it, and ``PermissionError`` for other places."""
        data = contents.encode() if isinstance(contents, str) else contents
        async with self._one_at_a_time:
            try:
                await self._session.put_async(self._path(file), data)
            except SandboxFileError as error:
                raise _as_it_is(error, file) from error

    @overload
    async def read_file(self, file: str, text: Literal[True] = True) -> str: ...
    @overload
    async def read_file(self, file: str, text: Literal[False]) -> bytes: ...
    async def read_file(self, file: str, text: bool = True) -> str | bytes:
        """Read a file of the working directory. Raises as Inspect has it, and ``PermissionError`` for other places."""
        most = SandboxEnvironmentLimits.MAX_READ_FILE_SIZE
        async with self._one_at_a_time:
            try:
                data = await self._session.get_async(self._path(file))
            except SandboxFileError as error:
                if error.errno == errno.EFBIG:
                    raise OutputLimitExceededError(SandboxEnvironmentLimits.MAX_READ_FILE_SIZE_STR, None) from error
                raise _as_it_is(error, file) from error
        if len(data) > most:
            raise OutputLimitExceededError(SandboxEnvironmentLimits.MAX_READ_FILE_SIZE_STR, None)
        return data.decode("utf-8") if text else data

    def _path(self, file: str) -> str:
        path = os.path.normpath(os.path.join(self._folder, file))
        relative = os.path.relpath(path, self._folder)
        if relative == ".":
            raise IsADirectoryError(errno.EISDIR, "is the working directory", file)
        if relative.startswith("../"):
            raise PermissionError(errno.EACCES, f"lies outside the sample's working directory {self._folder}", file)
        return relative


def _as_it_is(error: SandboxFileError, file: str) -> OSError:
    """The exception that Python has for an error's number."""
    return OSError(error.errno, error.strerror or str(error), file)
