"""What a session's work takes, step by step, and two drivers of it: one that blocks, one for asyncio.

The work is written once, as generators that yield what is to be done and are sent what came of it.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from midstream.errors import SandboxFileError
from midstream.sandbox.clones import freeze, freeze_async
from midstream.sandbox.conversation import Conversation, Finished
from midstream.sandbox.drivers import Answer, converse, converse_async
from midstream.sandbox.process import CloneRefused, SessionProcess

if TYPE_CHECKING:
    from midstream.sandbox.interpreter import Interpreter

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Start:
    """Do: start a process."""


@dataclass(frozen=True, slots=True)
class Freeze:
    """Do: let the process stand still, and make an exact copy of it."""


@dataclass(frozen=True, slots=True)
class Converse:
    """Do: hold a conversation with the process, to its end."""

    conversation: Conversation
    recorded: Answer


Step = Start | Freeze | Converse
Outcome = SessionProcess | CloneRefused | Finished
Steps = Generator[Step, Outcome, _T]


def drive(interpreter: Interpreter, steps: Steps[_T]) -> _T:
    """Do what ``steps`` yield, one after another; what they return."""
    try:
        step = next(steps)
        while True:
            step = steps.send(_do(interpreter, step))
    except StopIteration as end:
        result: _T = end.value
        return result
    except SandboxFileError:
        raise  # a file's fault, not the interpreter's
    except BaseException:
        interpreter.recover()
        raise


async def drive_async(interpreter: Interpreter, steps: Steps[_T]) -> _T:
    """The same on the running asyncio loop."""
    try:
        step = next(steps)
        while True:
            step = steps.send(await _do_async(interpreter, step))
    except StopIteration as end:
        result: _T = end.value
        return result
    except SandboxFileError:
        raise  # a file's fault, not the interpreter's
    except BaseException:
        interpreter.recover()
        raise


def _do(interpreter: Interpreter, step: Step) -> Outcome:
    if isinstance(step, Start):
        return interpreter.start()
    if isinstance(step, Freeze):
        try:
            return freeze(interpreter.living)
        except CloneRefused as refusal:
            return refusal
    return converse(interpreter.living, step.conversation, step.recorded, interpreter.call_tool)


async def _do_async(interpreter: Interpreter, step: Step) -> Outcome:
    if isinstance(step, Start):
        return await interpreter.start_async()
    if isinstance(step, Freeze):
        try:
            return await freeze_async(interpreter.living)
        except CloneRefused as refusal:
            return refusal
    return await converse_async(interpreter.living, step.conversation, step.recorded, interpreter.call_tool)
