"""The host's side of running one block, without any input or output of its own.

Bytes from the session go in, events come out, and the clock is passed in with every call. A driver (see
:mod:`~midstream.sandbox.drivers`) moves the bytes, waits until :attr:`Conversation.deadline`, and does what
the events say. Whatever the session sends, a conversation raises nothing but
:class:`~midstream.errors.SandboxProtocolError`; after that the session can only be killed.
"""

from __future__ import annotations

import base64
import enum
import json
import secrets
import signal
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from midstream.crossing.values import LONGEST_ANSWER
from midstream.errors import SandboxProtocolError
from midstream.sandbox import protocol
from midstream.sandbox.limits import SandboxLimits
from midstream.sandbox.text import cut_middle, printable, too_long
from midstream.types import IMAGE_SIGNATURES, ExecutionError, Media, ToolCall

_INTERRUPTS_PER_GRACE = 4
_LIMITS_THAT_KILL = {
    "memory": "there was no more memory for it",
    "cpu_time": "the session had used up its processor time",
    "block_cpu_time": "the code had used up its processor time",
}


@dataclass(frozen=True, slots=True)
class ToolRequested:
    """The code calls a tool; answer with :meth:`Conversation.answer` or :meth:`Conversation.fail`."""

    name: str
    arguments: list[Any]
    keyword_arguments: dict[str, Any]


class StaleFrame(SandboxProtocolError):
    """A frame that belongs to no request of this block: likely an earlier block's, come too late."""


class Ending(enum.Enum):
    """How a block came to its end."""

    RESULT = "result"
    INTERRUPTED = "interrupted"
    KILLED = "killed"  # it ran for too long and would not stop
    DIED = "died"  # the interpreter ended by itself
    VIOLATION = "violation"  # what it sent broke the protocol
    PAUSED = "paused"  # not at its end: it waits to be told more (see midstream.sandbox.feeding)


@dataclass(frozen=True, slots=True)
class Finished:
    """The block is over. ``alive``: the interpreter can take the next one.

    ``stale``: the violation is likely an earlier block's.
    """

    ending: Ending
    stdout: str = ""
    value: str | None = None
    error: ExecutionError | None = None
    shown_error: str = ""
    truncated: bool = False
    breached: str | None = None
    threads: int = 0
    images: tuple[Media, ...] = ()
    exit_status: int | None = None
    stale: bool = False

    @property
    def alive(self) -> bool:
        return self.ending in (Ending.RESULT, Ending.INTERRUPTED, Ending.PAUSED)


Event = ToolRequested | Finished


class Alarm(enum.Enum):
    """What is due when the deadline has come."""

    INTERRUPT = "interrupt"
    KILL = "kill"
    TOOL = "tool"  # the tool took too long: fail the call with a TimeoutError


class _Phase(enum.Enum):
    RUNNING = 1
    IN_TOOL = 2
    OVER = 3


@dataclass(slots=True)
class _OpenCall:
    number: int
    request: ToolRequested
    since: float


@dataclass(slots=True)
class Conversation:
    """One block's run. ``now`` is any monotonic clock in seconds."""

    code: str
    limits: SandboxLimits
    tools: Collection[str]
    now: float
    tool_calls: list[ToolCall] = field(default_factory=list)
    nonce: str = field(default_factory=lambda: secrets.token_hex(8))
    deadline: float | None = None
    tool_seconds: float = 0.0
    exit_status: int | None = None
    exhausted: str = "wall_time"
    """The limit for which the code is interrupted, or was."""
    over_quota: str | None = None
    """The limit of the working directory that was exceeded when the block was over."""
    cpu_time: float | None = None
    """Seconds of processor time that it took, as far as its driver could see."""
    _exit_breached: str | None = None
    _started: float = 0.0
    _phase: _Phase = _Phase.RUNNING
    _interrupts: int = 0
    _remaining: float = 0.0
    _call: _OpenCall | None = None
    _limits_told: dict[tuple[str, str], str] = field(default_factory=dict)
    _reader: protocol.FrameReader = field(init=False)

    def __post_init__(self) -> None:
        self._reader = protocol.FrameReader(self.limits.frame_bytes)
        self._started = self.now
        self.deadline = self.now + self.limits.wall_time

    def opening(self) -> bytes:
        """The request, to be sent first."""
        return protocol.encode({"nonce": self.nonce, "code": self.code, **self._messages()})

    def _messages(self) -> dict[str, str]:
        """What the code is told when its time is up."""
        seconds = self.limits.wall_time
        messages = {"time_limit_message": f"the code ran longer than {seconds:g} seconds and was interrupted"}
        if self.limits.block_cpu_time is not None:
            seconds = self.limits.block_cpu_time
            told = f"the code used more than {seconds:g} seconds of processor time and was interrupted"
            messages["cpu_limit_message"] = told
        return messages

    # -- what the session sends

    def receive(self, data: bytes, now: float) -> Event | None:
        """Take bytes from the session; the event they complete, if they do.

        Raises :class:`~midstream.errors.SandboxProtocolError` for what it may not send.
        """
        self._reader.feed(data)
        event: Event | None = None
        while (frame := self._reader.next_frame()) is not None:
            if event is not None or self._phase is not _Phase.RUNNING:
                if "exited" in frame:
                    self._exited(frame)
                    continue
                raise SandboxProtocolError("a frame out of turn")
            event = self._event(frame, now)
        if isinstance(event, Finished) and self._reader.pending:
            raise SandboxProtocolError("bytes after the result")
        return event

    def _event(self, frame: dict[str, Any], now: float) -> Event | None:
        if "exited" in frame:
            self._exited(frame)
            return None
        nonce = frame.get("nonce")
        if nonce != self.nonce:
            kind = StaleFrame if isinstance(nonce, str) else SandboxProtocolError
            raise kind("a frame that answers no request of this block")
        if "call" in frame:
            return self._called(frame, now)
        return self._finished(frame)

    def _exited(self, frame: dict[str, Any]) -> None:
        # Sent by the fork server. Code may forge it, and so misstate how its own interpreter died.
        status = frame["exited"]
        self.exit_status = status if isinstance(status, int) and 0 <= status < 1 << 16 else None
        breached = frame.get("breached")
        self._exit_breached = breached if breached in ("cpu_time", "memory") else None

    def _called(self, frame: dict[str, Any], now: float) -> ToolRequested:
        number, name, body = frame["call"], frame.get("tool"), frame.get("arguments")
        if not isinstance(name, str) or name not in self.tools:
            raise SandboxProtocolError("a call of a tool that was not offered")
        if not isinstance(number, int) or not isinstance(body, str):
            raise SandboxProtocolError("a malformed tool call")
        if len(body) > self.limits.argument_characters:
            raise SandboxProtocolError("a tool call with too long arguments")
        # Parsed as a frame of its own, so that its depth is bounded likewise.
        parsed = protocol.parse(b'{"a":' + body.encode("utf-8", "backslashreplace") + b"}").get("a")
        if not (isinstance(parsed, list) and len(parsed) == 2):
            raise SandboxProtocolError("a malformed tool call")
        arguments, keyword_arguments = parsed
        if not isinstance(arguments, list) or not isinstance(keyword_arguments, dict):
            raise SandboxProtocolError("a malformed tool call")
        request = ToolRequested(name, arguments, keyword_arguments)
        self._phase = _Phase.IN_TOOL
        self._call = _OpenCall(number, request, now)
        self._remaining = (self.deadline or now) - now
        self.deadline = None if self.limits.tool_time is None else now + self.limits.tool_time
        return request

    def _finished(self, frame: dict[str, Any]) -> Finished:
        limit = self.limits.output_characters
        slack = 200  # for the notice of what was left out
        value = frame.get("value")
        error, shown, breached = _error(frame.get("error"), limit)
        interrupted = frame.get("interrupted") is True and self._interrupts > 0
        if interrupted:
            breached = self.exhausted
            if breached in QUOTAS:
                error = ExecutionError("OutOfSpace", quota_message(breached, self.limits))
                shown = f"OutOfSpace({error.message!r})"
        elif frame.get("breached") == "cpu_time":
            breached = "cpu_time"
        elif breached is None and error is not None:
            breached = self._limit_behind(error)
        threads = frame.get("threads")
        self._over()
        return Finished(
            ending=Ending.INTERRUPTED if interrupted else Ending.RESULT,
            stdout=_text(frame.get("stdout"), limit + slack),
            value=None if value is None else _text(value, limit + slack),
            error=error,
            shown_error=shown,
            truncated=frame.get("truncated") is True,
            breached=breached,
            threads=threads if isinstance(threads, int) else 0,
            images=_images(frame.get("images"), self.limits.image_bytes),
        )

    def _limit_behind(self, error: ExecutionError) -> str | None:
        """The limit of tool calls that code was told of and let end it."""
        # Told by the session itself, before any call is made.
        told = {("ValueError", too_long(name, self.limits.argument_characters)) for name in self.tools}
        if (error.type, error.message) in told:
            return "argument_characters"
        return self._limits_told.get((error.type, error.message))

    def end_of_stream(self) -> Finished:
        """The session's end of the channel is closed: the interpreter is gone."""
        self._over()
        breached = self._exit_breached
        if self._interrupts and self.exhausted == "block_cpu_time" and breached == "cpu_time":
            breached = self.exhausted  # the very signal that should have interrupted it
        return Finished(Ending.DIED, exit_status=self.exit_status, breached=breached)

    def _over(self) -> None:
        self._phase = _Phase.OVER
        self.deadline = None

    # -- tools

    def answer(self, value: Any, now: float, cached: bool = False, batched: int = 1) -> bytes:
        """The answer to the open call: its value. What is not JSON becomes a TypeError in the code."""
        try:
            frame = protocol.encode({"value": value})
        except (TypeError, ValueError, RecursionError) as error:
            name = self._open_call().request.name
            return self.fail("TypeError", f"{name}() returned what is not JSON: {error}", now)
        if len(frame) > LONGEST_ANSWER:
            name = self._open_call().request.name
            return self.fail("ValueError", f"{name}() returned more than {LONGEST_ANSWER} bytes", now)
        # Recorded as it crossed: a tuple as a list, and no object that the tool goes on changing.
        self._record(now, value=json.loads(frame[4:])["value"], cached=cached, batched=batched)
        return self._resume(frame, now)

    def fail(
        self, kind: str, message: str, now: float, breached: str | None = None, base: str = "", batched: int = 1
    ) -> bytes:
        """The answer to the open call: an exception of this type and message, raised in the code.

        ``breached``: the limit that it comes from, if it does. ``base``: the built-in type below which ``kind`` is.
        """
        message = cut_middle(message, self.limits.output_characters)
        if breached is not None:
            self._limits_told[kind, message] = breached
        self._record(now, error=ExecutionError(kind, message, base=base), batched=batched)
        return self._resume(protocol.encode({"error": {"type": kind, "message": message, "base": base}}), now)

    def _open_call(self) -> _OpenCall:
        if self._call is None:
            raise SandboxProtocolError("no tool call is open")
        return self._call

    def _record(self, now: float, value: Any = None, error: ExecutionError | None = None, **how: Any) -> None:
        call = self._open_call()
        self.tool_calls.append(
            ToolCall(
                name=call.request.name,
                arguments=tuple(call.request.arguments),
                keyword_arguments=call.request.keyword_arguments,
                value=value,
                error=error,
                started=call.since - self._started,
                duration=now - call.since,
                **how,
            )
        )

    def _resume(self, frame: bytes, now: float) -> bytes:
        self.tool_seconds += now - self._open_call().since
        self._call = None
        self._phase = _Phase.RUNNING
        self.deadline = now + max(0.0, self._remaining)
        if self._interrupts:
            return protocol.encode({"time_is_up": self.exhausted})
        return frame

    # -- time

    def alarm(self, now: float) -> Alarm | None:
        """What to do now, if the deadline has come; sets the next deadline."""
        if self.deadline is None or now < self.deadline:
            return None
        if self._phase is _Phase.IN_TOOL:
            return Alarm.TOOL
        if self._interrupts < _INTERRUPTS_PER_GRACE:
            # More than one: the first may be swallowed by a bare except, or hit a __del__.
            self._interrupts += 1
            self.deadline = now + self.limits.grace / _INTERRUPTS_PER_GRACE
            return Alarm.INTERRUPT
        self._over()
        return Alarm.KILL

    @property
    def cpu_time_left(self) -> float | None:
        """Seconds of processor time that the code may take from now on, or None for any."""
        return self.limits.block_cpu_time

    def took(self, cpu_time: float | None) -> None:
        """The code has taken so many seconds of processor time; None where that could not be seen."""
        self.cpu_time = cpu_time

    def exhaust_cpu_time(self, now: float) -> None:
        """The code has used up its processor time: it is to be interrupted now."""
        if self._phase is _Phase.OVER or self._interrupts:
            return
        self.exhausted = "block_cpu_time"
        if self._phase is _Phase.RUNNING:
            self.deadline = now
        else:
            self._interrupts = 1  # told with the tool's answer

    def exceed_quota(self, limit: str, now: float) -> None:
        """The code's files have become too large, or too many: it is to be interrupted now."""
        if self._phase is _Phase.RUNNING and not self._interrupts:
            self.exhausted = limit
            self.deadline = now

    def seconds_in_sandbox(self, now: float) -> float:
        """Wall time since the start, without the time of tools."""
        return max(0.0, now - self._started - self.tool_seconds)


QUOTAS = ("working_directory", "files")
"""Limits of the working directory as a whole."""


def quota_message(limit: str, limits: SandboxLimits) -> str:
    if limit == "files":
        return f"the working directory holds more than {limits.files} files"
    return f"the files in the working directory take more than {limits.working_directory} bytes"


def _text(value: object, limit: int) -> str:
    if not isinstance(value, str):
        raise SandboxProtocolError("a result whose text is no string")
    return printable(cut_middle(value, limit))


def _images(told: object, maximum_bytes: int) -> tuple[Media, ...]:
    """What was shown. It is not read here: whoever shows it takes it for an attacker's."""
    if told is None:
        return ()
    if not isinstance(told, list):
        raise SandboxProtocolError("images that are no list")
    images = tuple(map(_image, told))
    if sum(len(image.data) for image in images) > maximum_bytes:
        raise SandboxProtocolError("more images than were allowed")
    return images


def _image(told: object) -> Media:
    mime, data = (told.get("mime"), told.get("data")) if isinstance(told, dict) else (None, None)
    signature = IMAGE_SIGNATURES.get(mime) if isinstance(mime, str) else None
    if not isinstance(mime, str) or signature is None or not isinstance(data, str):
        raise SandboxProtocolError("a malformed image")
    try:
        content = base64.b64decode(data, validate=True)
    except ValueError:
        raise SandboxProtocolError("an image that is not base64") from None
    if not content.startswith(signature):
        raise SandboxProtocolError("an image that is none")
    return Media(mime, content)


def _error(told: object, limit: int) -> tuple[ExecutionError | None, str, str | None]:
    """The error, how it is shown by default, and the limit that it comes from."""
    if told is None:
        return None, "", None
    if not isinstance(told, dict):
        raise SandboxProtocolError("a malformed error")
    line, breached = told.get("line"), told.get("breached")
    error = ExecutionError(
        type=_text(told.get("type"), limit),
        message=_text(told.get("message"), limit),
        line=line if isinstance(line, int) else None,
        traceback=_text(told.get("traceback"), limit),
    )
    known = breached in ("memory", "file_size", "working_directory", "files", "open_files", "threads")
    return error, _text(told.get("repr"), limit), str(breached) if known else None


def death(status: int | None, breached: str | None = None) -> str:
    """In words, how an interpreter ended: ``status`` as of ``waitpid``, and the limit that ended it, if one did."""
    if breached in _LIMITS_THAT_KILL:
        return f"was ended, since {_LIMITS_THAT_KILL[breached]}"
    if status is None:
        return "ended"
    number = status & 0x7F
    if number == 0:
        return f"exited with status {status >> 8 & 0xFF}"
    try:
        name, described = signal.Signals(number).name, signal.strsignal(number)
    except ValueError:  # forged, or a real-time signal
        name, described = f"signal {number}", None
    return f"was ended by {name}" + (f" ({described.lower()})" if described else "")
