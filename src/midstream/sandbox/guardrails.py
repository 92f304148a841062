"""What a model is plainly told not to do. Not the isolation: that holds without any of this."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from midstream.errors import ConfigurationError

_NAMES = """
os posix sys subprocess shutil signal pty fcntl resource ctypes _ctypes multiprocessing _posixsubprocess
importlib imp builtins gc inspect runpy code codeop
socket _socket ssl select selectors http urllib ftplib smtplib poplib imaplib telnetlib xmlrpc socketserver
asyncio webbrowser requests httpx aiohttp urllib3 paramiko
"""

SYSTEM_AND_NETWORK_MODULES = frozenset(_NAMES.split())
"""Modules of the operating system and the network, and such as give them away."""


@dataclass(frozen=True, slots=True)
class Guardrails:
    """Modules that code may not import, and paths that its ``open`` may not touch.

    They meet code with a clear ``PermissionError`` where it would otherwise meet some error of the operating
    system. They bind the code of blocks alone: what modules import and open for themselves is not touched.
    And they are easily got around on purpose, which gains nothing, since the isolation does not rest on them.

    - ``blocked_modules``: their names; what lies below one is blocked with it.
    - ``working_directory_only``: whether ``open`` is confined to the working directory.
    """

    blocked_modules: Collection[str] = SYSTEM_AND_NETWORK_MODULES
    working_directory_only: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.blocked_modules, str) or not isinstance(self.blocked_modules, Collection):
            raise ConfigurationError(
                f"Guardrails.blocked_modules={self.blocked_modules!r}: must be a set of module names"
            )
        for name in self.blocked_modules:
            if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
                raise ConfigurationError(f"Guardrails.blocked_modules={name!r}: must be a module's name")
        if not isinstance(self.working_directory_only, bool):
            raise ConfigurationError(
                f"Guardrails.working_directory_only={self.working_directory_only!r}: must be True or False"
            )

    def as_dict(self) -> dict[str, Any]:
        return {
            "blocked_modules": sorted(self.blocked_modules),
            "working_directory_only": self.working_directory_only,
        }
