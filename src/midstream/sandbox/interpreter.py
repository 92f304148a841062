"""A session's interpreter over its whole life, which may take several processes.

Blocks and files that it was given are remembered, and given again to a process that has to take the place of
another. Nothing here waits or moves bytes: see :mod:`~midstream.sandbox.steps`.
"""

from __future__ import annotations

import errno
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from midstream.crossing import Offer
from midstream.errors import SandboxDied, SandboxFileError
from midstream.sandbox.clones import roll_back
from midstream.sandbox.conversation import Conversation, Ending, Finished
from midstream.sandbox.drivers import CallTool
from midstream.sandbox.feeding import FedConversation
from midstream.sandbox.files import Moves, fetching, sending
from midstream.sandbox.process import CloneRefused, SessionProcess
from midstream.sandbox.replay import PastBlock, RecordedAnswers, comparable, live
from midstream.sandbox.results import result_of
from midstream.sandbox.state_key import StateKey
from midstream.sandbox.steps import Converse, Freeze, Start, Steps
from midstream.types import ExecutionResult, ToolCall

if TYPE_CHECKING:
    from midstream.sandbox.pool import SandboxPool

_LOST = (
    "[The interpreter was restarted. The earlier blocks were run again, but what they gave was not the same: "
    "names and files that they made may be missing or different.]"
)
_GONE = (
    "[The interpreter was restarted, and the earlier blocks could not be run again: "
    "names and files that they made are gone.]"
)
_FILE_ENDINGS = {
    Ending.KILLED: "the interpreter gave no answer in time and was ended",
    Ending.DIED: "the interpreter ended meanwhile",
    Ending.VIOLATION: "the interpreter sent what it may not and was ended",
}


class Interpreter:
    """The present process of one session, and the past that another can be brought to its state by."""

    def __init__(
        self,
        pool: SandboxPool,
        *,
        tools: Mapping[str, Offer],
        call_tool: CallTool,
        seed: int,
        past: Sequence[PastBlock] = (),
        notice: str = "",
    ) -> None:
        self._pool = pool
        self._tools = tools
        self._seed = seed
        self.call_tool = call_tool
        self.process: SessionProcess | None = None
        self.checkpoint: SessionProcess | None = None
        """Stands still in the state before the block that now runs in ``process``, a copy of it."""
        self._had_process = False
        self.past = list(past)
        self.notice = notice
        """What the next result has to say on what was lost."""
        self._mark = secrets.token_hex(8)
        told = {name: offer.as_json() for name, offer in tools.items()}
        self._key = StateKey([pool.beginning, seed, told], self.past)
        self.leftover_threads = 0

    def snapshot_key(self) -> str:
        """A name for the state that the last block has left."""
        if self.process is None:  # nobody knows yet whether another can be brought to that
            return self._key.apart(self._mark)
        return self._key.text

    def go_on_from(self, other: Interpreter) -> None:
        """Be a copy of another, which has run what this one is to remember."""
        self.past, self.notice, self._key = list(other.past), other.notice, other._key.copy()

    @property
    def living(self) -> SessionProcess:
        """The process, where there must be one."""
        assert self.process is not None
        return self.process

    def start(self) -> SessionProcess:
        return self._pool.start_process(self._tools, self._seed, replacement=self._had_process)

    async def start_async(self) -> SessionProcess:
        return await self._pool.start_process_async(self._tools, self._seed, replacement=self._had_process)

    def kill(self) -> None:
        """Kill what runs, from any thread."""
        for process in (self.process, self.checkpoint):
            if process is not None:
                process.kill()

    def drop(self) -> None:
        """Kill the process, and the one that stands still for it, and let go of them."""
        self._had_process = self._had_process or self.process is not None
        for process in (self.process, self.checkpoint):
            if process is not None:
                process.close()
        self.process = self.checkpoint = None

    def recover(self) -> None:
        """A block was broken off: go back to the state before it, or let the next one rebuild that."""
        if not self.roll_back():
            self.drop()

    def roll_back(self) -> bool:
        """Go back to the checkpoint, if there is one. Whether that has brought the interpreter back."""
        before = self.checkpoint
        if before is None or self.process is None:
            return False
        self.process.close()
        self.process, self.checkpoint = before, None
        roll_back(before)
        return not before.disturbed()

    def commit(self) -> None:
        """Go on from here: there is no way back to the checkpoint."""
        if self.checkpoint is not None:
            self.checkpoint.close()
            self.checkpoint = None

    # -- blocks

    def run(self, code: str, *, checkpoint: bool = False, made: tuple[ToolCall, ...] = ()) -> Steps[ExecutionResult]:
        """Run a block, in the state in which the earlier ones left the interpreter.

        ``checkpoint``: in a copy, so that there is a way back from whatever it does. ``made``: calls of tools that
        it has made in an attempt before, which are not made again.
        """
        for attempt in (1, 2):
            try:
                yield from self.prepare()
                unprotected = (yield from self.freeze()) if checkpoint else None
                answers = RecordedAnswers(made, then_live=True) if made else live
                conversation = self._conversation(code)
                finished = yield Converse(conversation, answers)
                assert isinstance(finished, Finished)
                if not self.lost_the_fork_server(finished):
                    return self.conclude(code, conversation, finished, unprotected)
                made = tuple(conversation.tool_calls)
                raise SandboxDied("the fork server died, and its sessions with it")
            except SandboxDied:
                self.drop()
                if attempt == 2:
                    raise
        raise AssertionError("unreachable")

    def freeze(self) -> Steps[str | None]:
        """Make a checkpoint. None, or why there can be none."""
        copy = yield Freeze()
        if isinstance(copy, CloneRefused):
            yield from self.prepare()  # whose clone could not be led to its end may have been killed
            return copy.reason
        assert isinstance(copy, SessionProcess)
        self.process, self.checkpoint = copy, self.process
        return None

    def fed_conversation(self) -> FedConversation:
        """For a block that arrives piece by piece."""
        return FedConversation("", self._pool.limits, self._tools, time.monotonic())

    def _conversation(self, code: str) -> Conversation:
        return Conversation(code, self._pool.limits, self._tools, time.monotonic())

    def lost_the_fork_server(self, finished: Finished) -> bool:
        """Whether an end is none of the code's, but that of the process that all sessions are forked from."""
        died_untold = finished.ending is Ending.DIED and finished.exit_status is None
        return died_untold and self.process is not None and self.process.orphaned()

    def conclude(
        self, code: str, conversation: Conversation, finished: Finished, unprotected: str | None = None
    ) -> ExecutionResult:
        """The result of a block that has come to its end, and what follows from it for the session."""
        notice, self.notice = self.notice, ""
        rolled_back = False
        if finished.alive:
            self.commit()
        else:
            rolled_back = self.roll_back()
            if not rolled_back:
                self.drop()
        result = self._result(conversation, finished, notice, rolled_back=rolled_back, unprotected=unprotected)
        if finished.alive:
            self._remember(PastBlock.of(code, result))
            self.leftover_threads = finished.threads
        elif finished.stale and not rolled_back:
            self._blame_last_block()
        if not rolled_back and _unknowable(result, finished):
            self._key.lose()
        return result

    def _remember(self, block: PastBlock) -> None:
        self.past.append(block)
        self._key.add(block)

    def _result(
        self,
        conversation: Conversation,
        finished: Finished,
        notice: str = "",
        *,
        rolled_back: bool = False,
        unprotected: str | None = None,
    ) -> ExecutionResult:
        return result_of(
            conversation,
            finished,
            error_style=self._pool.error_style,
            notice=notice,
            has_past=bool(self.past),
            rolled_back=rolled_back,
            no_checkpoint=unprotected,
        )

    # -- the state of earlier blocks

    def prepare(self) -> Steps[None]:
        """See to it that there is a process, in the state in which the earlier blocks left it."""
        if self.process is not None and self.process.disturbed():
            orphaned = self.process.orphaned()
            self.drop()  # not the next block's doing
            if not orphaned:
                self._blame_last_block()
        if self.process is None:
            yield from self._rebuild()

    def _blame_last_block(self) -> None:
        """What came too late to be of the present block is likely the last one's: it is not run again."""
        for index in reversed(range(len(self.past))):
            if self.past[index].file is None:
                self.past[index] = replace(self.past[index], repeatable=False)
                break

    def _rebuild(self) -> Steps[None]:
        """Start a process and run the earlier blocks in it."""
        yield from self._begin()
        if any(not block.repeatable for block in self.past):
            self._lose(_LOST)
        for block in self.past:
            if not block.repeatable:
                continue
            if block.file is not None:
                if (yield from self._put_again(*block.file)):
                    continue
                yield from self._begin_without_past()
                return
            conversation = self._conversation(block.code)
            answers = RecordedAnswers(block.tool_calls)
            finished = yield Converse(conversation, answers)
            assert isinstance(finished, Finished)
            if self.lost_the_fork_server(finished):
                raise SandboxDied("the fork server died, and its sessions with it")
            if not finished.alive:
                yield from self._begin_without_past()
                return
            text = comparable(self._result(conversation, finished).text)
            if answers.diverged or text != block.text:
                self._lose(_LOST)

    def _lose(self, notice: str) -> None:
        self.notice = notice
        self._key.lose()

    def _begin(self) -> Steps[None]:
        process = yield Start()
        assert isinstance(process, SessionProcess)
        self.process = process

    def _begin_without_past(self) -> Steps[None]:
        self.drop()
        self.past.clear()
        self._lose(_GONE)
        yield from self._begin()

    # -- files

    def put(self, path: str, data: bytes) -> Steps[None]:
        """Write a file, and remember it."""
        try:
            yield from self._file_steps(lambda: sending(path, data, self._pool.limits), path)
        except SandboxFileError:
            self._key.lose()  # folders on its way, or an older file of its name
            raise
        self._remember(PastBlock.of_file(path, data))

    def get(self, path: str) -> Steps[bytes]:
        """Read a file."""
        return (yield from self._file_steps(lambda: fetching(path, self._pool.limits), path))

    def _put_again(self, path: str, data: bytes) -> Steps[bool]:
        """Whether the interpreter lives on."""
        try:
            yield from self._move(sending(path, data, self._pool.limits), path)
        except SandboxFileError:
            self._lose(_LOST)
        return self.process is not None

    def _file_steps(self, begin: Callable[[], Moves], path: str) -> Steps[bytes]:
        for attempt in (1, 2):
            try:
                yield from self.prepare()
                return (yield from self._move(begin(), path))
            except SandboxDied:
                self.drop()
                if attempt == 2:
                    raise
        raise AssertionError("unreachable")

    def _move(self, moves: Moves, path: str) -> Steps[bytes]:
        """Move one file, a piece at a time."""
        try:
            transfer = next(moves)
            while True:
                finished = yield Converse(transfer, live)
                assert isinstance(finished, Finished)
                if self.lost_the_fork_server(finished):
                    raise SandboxDied("the fork server died, and its sessions with it")
                if not finished.alive:
                    self.drop()
                    self._blame_last_block()  # this request runs nothing of the code's
                    raise SandboxFileError(errno.EIO, _FILE_ENDINGS[finished.ending], path)
                transfer = moves.send(finished)
        except StopIteration as end:
            content: bytes = end.value
            return content


def _unknowable(result: ExecutionResult, finished: Finished) -> bool:
    """Whether the state that a block has left does not follow from what it was and gave."""
    by_chance = finished.ending is Ending.INTERRUPTED or result.breached in ("cpu_time", "memory", "threads")
    return by_chance or result.state_lost or finished.threads > 0
