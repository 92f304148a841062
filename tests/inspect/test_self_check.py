"""Inspect's own check of sandboxes, held to ours. What a sandbox without shell, programs and users cannot is named."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

pytest.importorskip("inspect_ai", reason="Inspect AI is not installed: make test-inspect")

from inspect_ai.util._sandbox import self_check

from midstream.integrations.inspect import MidstreamSandboxEnvironment, SandboxConfig

SHELL = "needs a shell or programs, and there is Python alone"
ELSEWHERE = "needs files outside the working directory"
MODES = "needs the modes of files changed, which code may not"
CANNOT = {
    "test_exec_env_vars": SHELL,
    "test_exec_input_binary": SHELL,
    "test_exec_large_command": SHELL,
    "test_exec_output": SHELL,
    "test_exec_output_utf": SHELL,
    "test_exec_permission_error": SHELL,
    "test_exec_returncode": SHELL,
    "test_exec_stderr": SHELL,
    "test_exec_stderr_utf": SHELL,
    "test_exec_timeout_kills_child_processes": SHELL,
    "test_exec_timeout_kills_process": SHELL,
    "test_exec_timeout_not_raised_on_fast_signal_death": SHELL,
    "test_cwd_absolute": ELSEWHERE,
    "test_cwd_custom": ELSEWHERE,
    "test_read_and_write_file_including_directory_absolute": ELSEWHERE,
    "test_read_file_is_directory": ELSEWHERE,
    "test_write_binary_file_is_directory": ELSEWHERE,
    "test_write_text_file_is_directory": ELSEWHERE,
    "test_read_file_not_allowed": MODES,
    "test_write_binary_file_without_permissions": MODES,
    "test_write_text_file_without_permissions": MODES,
}
# test_exec_as_user is left out: it adds a user to the system that it finds itself on.
CHECKS = sorted(set(self_check.__all__) - {"test_exec_as_user"})


@pytest.fixture
async def sandbox_env() -> AsyncIterator[MidstreamSandboxEnvironment]:
    config = SandboxConfig(preload=())
    await MidstreamSandboxEnvironment.task_init("check", config)
    try:
        environments = await MidstreamSandboxEnvironment.sample_init("check", config, {})
        yield environments["default"]
        await MidstreamSandboxEnvironment.sample_cleanup("check", config, environments, False)
    finally:
        await MidstreamSandboxEnvironment.task_cleanup("check", config, True)


@pytest.mark.parametrize("name", CHECKS)
async def test_inspects_own(sandbox_env: MidstreamSandboxEnvironment, name: str) -> None:
    check = getattr(self_check, name)
    if name not in CANNOT:
        await check(sandbox_env)
        return
    # Nothing of it may pass by chance, and what is lacking is an exception that says so, or a path that is refused.
    with pytest.raises((NotImplementedError, PermissionError, AssertionError)):
        await check(sandbox_env)


def test_the_list_names_checks_that_there_are() -> None:
    assert CANNOT.keys() <= set(CHECKS)
