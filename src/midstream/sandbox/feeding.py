"""Blocks that arrive piece by piece: they run ahead in a copy of the interpreter, seen by nobody until they are closed.

A closed block gives what it would have given had it come whole. That is made sure of: the copy compares what it
has run with the whole block, and where the two could differ, it is thrown away, and the block runs as a whole.
Nothing has come of it then, for a tool that a block calls is not called before the block is closed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from midstream.errors import SandboxDied, SandboxProtocolError
from midstream.sandbox import protocol
from midstream.sandbox.conversation import Alarm, Conversation, Ending, Event, Finished
from midstream.sandbox.replay import live
from midstream.sandbox.steps import Converse, Steps
from midstream.types import ExecutionResult

if TYPE_CHECKING:
    from midstream.sandbox.interpreter import Interpreter
    from midstream.sandbox.process import SessionProcess

_CHECK_SECONDS = 30.0


@dataclass(slots=True)
class FedConversation(Conversation):
    """A conversation over a block of which :attr:`code` has been said so far, in turns.

    Each turn begins with one of the methods below and ends with ``Ending.PAUSED``, but for the last. Only while
    code runs does its time run.
    """

    runs_on: bool = True
    """Whether what else is fed will run ahead."""

    in_call: bool = False
    """Whether the code waits for a tool, which is not called before the block is closed."""

    agreed: bool = False
    _frame: dict[str, Any] = field(default_factory=dict)
    _left: float = 0.0
    _paused: float = 0.0
    _closing: bool = False

    def begin(self) -> None:
        """To be called once, before all else."""
        self._left, self._paused = self.limits.wall_time, self.now
        self._over()

    def feed(self, piece: str, now: float) -> FedConversation:
        """Say a piece more."""
        self.code += piece
        return self._turn({"feed": piece, **self._messages()}, now)

    def check(self, whole: str, ran: str | None, now: float) -> FedConversation:
        """Ask whether the block, now that it is whole, begins with what has run (``ran``: in another process)."""
        self._turn({"check": whole, "ran": ran}, now)
        self.deadline = now + max(_CHECK_SECONDS, self.limits.wall_time)
        return self

    def go_on(self, now: float) -> FedConversation:
        """Have the code make its call again, and run what has been said so far."""
        self._closing, self.in_call = True, False
        return self._turn({"again": True}, now)

    def close(self, rest: str, now: float) -> FedConversation:
        """Say what is left, and ask for the result."""
        self.code += rest
        self._closing = True
        return self._turn({"close": rest}, now)

    def _turn(self, frame: dict[str, Any], now: float) -> FedConversation:
        self._frame = frame
        self._started += now - self._paused
        self.now = now
        self.deadline = now + max(0.0, self._left)
        self._phase = type(self._phase).RUNNING
        return self

    @property
    def cpu_time_left(self) -> float | None:
        limit = self.limits.block_cpu_time
        return None if limit is None else limit - (self.cpu_time or 0.0)

    def took(self, cpu_time: float | None) -> None:
        self.cpu_time = None if cpu_time is None else (self.cpu_time or 0.0) + cpu_time

    def opening(self) -> bytes:
        return protocol.encode({"nonce": self.nonce, **self._frame})

    def _event(self, frame: dict[str, Any], now: float) -> Event | None:
        event = Conversation._event(self, frame, now)
        if event is None or (isinstance(event, Finished) and event.ending is not Ending.PAUSED):
            return event
        if isinstance(event, Finished):
            if "check" not in self._frame:
                self._left = (self.deadline or now) - now
        elif self._closing:
            return event
        else:
            self._left, self._call, self.in_call = self._remaining, None, True
        self._paused = now
        self._over()
        return Finished(Ending.PAUSED)

    def _finished(self, frame: dict[str, Any]) -> Finished:
        if "close" in self._frame:
            return Conversation._finished(self, frame)
        if "check" in self._frame:
            self.agreed = frame.get("checked") is True
        elif frame.get("fed") in ("running", "over", "unsure"):
            self.runs_on = frame["fed"] == "running"
        else:
            raise SandboxProtocolError("an answer to a piece of a block that is none")
        return Finished(Ending.PAUSED)

    def alarm(self, now: float) -> Alarm | None:
        if "check" in self._frame:  # no code runs that could be interrupted
            return Alarm.KILL if self.deadline is not None and now >= self.deadline else None
        return Conversation.alarm(self, now)


class OpenBlock:
    """A session's block while it arrives."""

    def __init__(self, interpreter: Interpreter) -> None:
        self._interpreter = interpreter
        self._text = ""
        self._begun = False
        self._conversation: FedConversation | None = None
        self._copy: SessionProcess | None = None
        self._ended: Finished | None = None

    def feed(self, piece: str) -> Steps[bool]:
        """Take the next piece. Whether all that came so far has been taken up, and more would be."""
        self._text += piece
        if not self._begun:
            self._begun = True
            yield from self._begin()
        conversation = self._conversation
        if conversation is None or not self._runs_ahead():
            return False
        finished = yield Converse(conversation.feed(piece, time.monotonic()), live)
        assert isinstance(finished, Finished)
        if not finished.alive:
            self._ended = finished
            if not self._interpreter.roll_back():
                self._interpreter.drop()
                self._ended = None  # nothing is left to go back to: it has to run as a whole
        return self._runs_ahead()

    def _begin(self) -> Steps[None]:
        interpreter = self._interpreter
        try:
            yield from interpreter.prepare()
            if (yield from interpreter.freeze()) is not None:
                return
        except SandboxDied:  # told by the block's end, if it is not made good by then
            interpreter.drop()
            return
        self._copy = interpreter.process
        self._conversation = self._new_conversation()

    def _new_conversation(self) -> FedConversation:
        conversation = self._interpreter.fed_conversation()
        conversation.begin()
        return conversation

    def _runs_ahead(self) -> bool:
        conversation = self._conversation
        return self._stands() and conversation is not None and conversation.runs_on and not conversation.in_call

    def _stands(self) -> bool:
        """Whether the copy is there, in which the block has run so far."""
        return self._copy is not None and self._interpreter.process is self._copy

    def abort(self) -> None:
        """Take it all back."""
        if self._stands():
            self._interpreter.recover()

    def commit(self) -> Steps[ExecutionResult]:
        """The result of the whole block."""
        interpreter = self._interpreter
        result = None
        if self._stands():
            result = yield from self._commit_copy()
        elif self._ended is not None:
            result = yield from self._commit_end(self._ended)
        if result is not None:
            return result
        return (yield from interpreter.run(self._text, checkpoint=True))

    def _commit_copy(self) -> Steps[ExecutionResult | None]:
        """The result, if what has run is what would have run."""
        conversation = self._conversation
        assert conversation is not None
        finished = yield Converse(conversation.check(self._text, None, time.monotonic()), live)
        assert isinstance(finished, Finished)
        if not (finished.alive and conversation.agreed):
            self._interpreter.recover()
            return None
        if conversation.in_call:
            finished = yield Converse(conversation.go_on(time.monotonic()), live)
            assert isinstance(finished, Finished)
        if finished.alive:
            rest = self._text[len(conversation.code) :]
            finished = yield Converse(conversation.close(rest, time.monotonic()), live)
            assert isinstance(finished, Finished)
        if self._interpreter.lost_the_fork_server(finished):
            self._interpreter.drop()
            return (yield from self._interpreter.run(self._text, checkpoint=True, made=tuple(conversation.tool_calls)))
        return self._interpreter.conclude(self._text, conversation, finished)

    def _commit_end(self, ended: Finished) -> Steps[ExecutionResult | None]:
        """The result of a block that killed its copy, if the whole of it would have begun like that."""
        ran = self._conversation
        assert ran is not None
        if (yield from self._interpreter.freeze()) is not None:
            return None
        conversation = self._new_conversation()
        finished = yield Converse(conversation.check(self._text, ran.code, time.monotonic()), live)
        assert isinstance(finished, Finished)
        if finished.alive and conversation.agreed:
            return self._interpreter.conclude(self._text, ran, ended)
        self._interpreter.recover()
        return None
