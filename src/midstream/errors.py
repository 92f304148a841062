"""Every error that midstream raises on purpose.

::

    MidstreamError
    ├── ConfigurationError (ValueError)   what the caller asked for is impossible; nothing was started
    │   ├── MarkupError                   a markup whose tags cannot work
    │   ├── TokenizerError                a tokenizer whose tokens cannot be mapped to text
    │   └── PromptError                   a prompt that cannot be generated from
    ├── ProtocolError (RuntimeError)      an object was driven out of turn (a bug in the caller or an engine)
    ├── EngineError (RuntimeError)        the engine failed, or lacks what was asked of it
    │   └── CapabilityError               the engine cannot do this; the message says which engine can
    ├── SandboxError (RuntimeError)       the sandbox's machinery failed; never what code in it did
    │   ├── IsolationError                a layer of isolation that was asked for does not hold here
    │   ├── SandboxDied                   the interpreter is gone
    │   └── SandboxProtocolError          the interpreter's side of the channel sent what it may not
    ├── SandboxFileError (OSError)        a file of a session cannot be put or got; ``errno`` says why
    └── RecordError (ValueError)          a record file that cannot be read; names the file and the line

``ConfigurationError`` is raised before any work starts, and its message names the field, the value and
what would be right. What a model's code does (exceptions, timeouts, exhausted memory) is never raised:
it is data, in an :class:`~midstream.types.ExecutionResult`.
"""

from __future__ import annotations


class MidstreamError(Exception):
    """The root of the errors that midstream raises on purpose."""


class ConfigurationError(MidstreamError, ValueError):
    """What the caller asked for is impossible. Raised before any work starts."""


class MarkupError(ConfigurationError):
    """A markup whose tags cannot work, such as an empty end tag."""


class TokenizerError(ConfigurationError):
    """A tokenizer whose tokens cannot be mapped to text, or that cannot encode a result as plain text."""


class PromptError(ConfigurationError):
    """A prompt that cannot be generated from, such as an empty one or one that fills the context."""


class ProtocolError(MidstreamError, RuntimeError):
    """An object was driven out of turn, such as a row that is given ids while its code runs."""


class EngineError(MidstreamError, RuntimeError):
    """The engine failed, or returned what it may not."""


class CapabilityError(EngineError):
    """The engine declares that it cannot do what was asked."""


class SandboxError(MidstreamError, RuntimeError):
    """The machinery of the sandbox failed. What code in it did is never raised."""


class IsolationError(SandboxError):
    """A layer of isolation that was asked for does not hold on this machine."""


class SandboxDied(SandboxError):
    """The interpreter, or the process that starts interpreters, is gone."""


class SandboxProtocolError(SandboxError):
    """The interpreter's side of the channel sent what it may not; the session was killed."""


class SandboxFileError(MidstreamError, OSError):
    """A file cannot be put into a session, or got out of it. ``errno`` and ``filename`` as of any OSError."""


class RecordError(MidstreamError, ValueError):
    """A file of records that cannot be read. The message names the file and the line."""
