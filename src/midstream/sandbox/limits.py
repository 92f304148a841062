"""What bounds a session and each of its blocks."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from midstream.errors import ConfigurationError

MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class SandboxLimits:
    """What bounds a session and each of its blocks. ``None`` means no bound of its own.

    Of each block:

    - ``wall_time``: seconds after which the code is interrupted; time that it waits for tools does not
      count. ``grace``: seconds that it then has to come to rest before its interpreter is killed.
    - ``block_cpu_time``: seconds of processor time, all threads together, after which the code is interrupted
      likewise. It matters where the machine is busy, or where code has threads.
    - ``tool_time``: seconds that one call of a tool may take before the code gets a ``TimeoutError``.
    - ``tool_calls``: calls of tools that a block may make before the next one raises ``RuntimeError``.
    - ``output_characters``: characters of output, of a value and of an error that come back; longer ones
      are cut in the middle.
    - ``argument_characters``: characters of the JSON of one tool call's arguments.
    - ``image_bytes``: bytes of the images that it shows, as files; those beyond are named and not kept.

    Of the session:

    - ``cpu_time``: seconds of processor time over all its blocks.
    - ``memory``: bytes of address space, on top of what the interpreter and the preloaded modules take.
    - ``resident_memory``: bytes of memory that it has really in use, files in a working directory in memory and
      what the kernel keeps for it included. It takes a memory cgroup, which may be made only where one is delegated
      (``midstream doctor`` says); elsewhere the pool does not start. Beyond it the interpreter is killed.
    - ``threads``: threads at a time. The kernel can count them per session only where the session has a
      user id of its own; elsewhere ``memory`` bounds them.
    - ``open_files``: open file descriptors. ``file_size``: bytes of one file.
    - ``working_directory``: bytes of all its files together, and ``files``: the number of files and folders.
      Where the session has no file system of its own, the host looks, and what is too much is found a moment late.
    """

    wall_time: float = 10.0
    grace: float = 1.0
    block_cpu_time: float | None = None
    tool_time: float | None = 60.0
    tool_calls: int = 1000
    output_characters: int = 65_536
    argument_characters: int = 262_144
    image_bytes: int = 4 * MIB
    cpu_time: float | None = 3600.0
    memory: int | None = 4 * GIB
    resident_memory: int | None = None
    threads: int | None = 64
    open_files: int = 64
    file_size: int | None = 64 * MIB
    working_directory: int = 256 * MIB
    files: int = 10_000

    def __post_init__(self) -> None:
        for name in ("wall_time", "grace", "block_cpu_time", "tool_time", "cpu_time"):
            value = getattr(self, name)
            if value is None and name in ("block_cpu_time", "tool_time", "cpu_time"):
                continue
            if not _is_number(value) or not math.isfinite(value) or value <= 0:
                raise ConfigurationError(f"SandboxLimits.{name}={value!r}: must be a number of seconds over 0")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is None and name in ("memory", "resident_memory", "threads", "file_size"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigurationError(f"SandboxLimits.{name}={value!r}: must be an integer of at least {least}")

    @property
    def frame_bytes(self) -> int:
        """The longest frame that a session may send: every field at its longest, every character as ``\\u0000``."""
        images = 4 * (self.image_bytes // 3 + 1)  # in base64
        return 6 * (4 * self.output_characters + self.argument_characters) + images + 65_536

    def as_dict(self) -> dict[str, int | float | None]:
        return asdict(self)


# Below these an interpreter cannot work, or a result cannot say what happened.
_LEAST = {
    "tool_calls": 0,
    "output_characters": 256,
    "argument_characters": 256,
    "image_bytes": 0,
    "memory": 32 * MIB,
    "resident_memory": 32 * MIB,
    "threads": 1,
    "open_files": 16,
    "file_size": 4096,
    "working_directory": 64 * 1024,
    "files": 16,
}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
