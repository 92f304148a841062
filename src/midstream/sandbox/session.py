"""One row's interpreter, as its user sees it."""

from __future__ import annotations

import contextlib
import keyword
import os
import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from midstream import checks
from midstream.crossing import Offer
from midstream.errors import ConfigurationError, ProtocolError, SandboxError
from midstream.observing import SessionRan
from midstream.sandbox.clones import clone, clone_async
from midstream.sandbox.drivers import CallTool
from midstream.sandbox.feeding import OpenBlock
from midstream.sandbox.files import checked_data, checked_path
from midstream.sandbox.interpreter import Interpreter
from midstream.sandbox.process import SessionProcess
from midstream.sandbox.replay import History, past_blocks
from midstream.sandbox.steps import drive, drive_async
from midstream.types import ExecutionResult

if TYPE_CHECKING:
    from midstream.sandbox.places import Place
    from midstream.sandbox.pool import SandboxPool


class Session:
    """A stateful interpreter: what one block defines, the next ones find.

    Made by :meth:`SandboxPool.session`. Blocks run one at a time. When its process dies, by whatever the
    code did, the next block gets a new one in which the earlier blocks are run again (never the one that
    killed it), with the tool results that they had.
    """

    def __init__(
        self,
        pool: SandboxPool,
        *,
        tools: Mapping[str, str | Offer] | Sequence[str] = (),
        call_tool: CallTool | None = None,
        seed: int | None = None,
        history: History = (),
    ) -> None:
        self._pool = pool
        self.tools = tool_offers(tools, call_tool)
        self.seed = secrets.randbits(63) if seed is None else checks.integer("seed", seed, 0, optional=True)
        self._interpreter = Interpreter(
            pool,
            tools=self.tools,
            call_tool=call_tool or _no_tool,
            seed=self.seed,
            past=past_blocks(history),
        )
        self._fed: OpenBlock | None = None
        self._busy = threading.Lock()
        self._closed = False

    def serve(self, call_tool: CallTool) -> None:
        """Have calls of tools run by another function, from the next block on."""
        self._interpreter.call_tool = call_tool

    def attach(self, process: SessionProcess) -> None:
        """Take over a process that was started for this session."""
        self._interpreter.process = process

    @property
    def leftover_threads(self) -> int:
        """Threads of the code that were alive when its last block ended."""
        return self._interpreter.leftover_threads

    @property
    def alive(self) -> bool:
        """Whether it has a process now. Without one it still works: the next block gets a new one."""
        return self._interpreter.process is not None and not self._closed

    @property
    def process_id(self) -> int | None:
        """The process's id where the fork server lives, which may be a process namespace of its own."""
        process = self._interpreter.process
        return process.number if process is not None else None

    def run(self, code: str, *, checkpoint: bool | None = None) -> ExecutionResult:
        """Run a block and return what it gave, whatever that is.

        ``checkpoint``: whether it runs in a copy of the interpreter, for which the original stands by: where
        the copy is killed, by whatever the code did, the session goes on from before the block, with all
        names and files, and the result says so (``rolled_back``). Where there can be no copy, for the
        reasons that :meth:`fork` is refused for or since the code holds pipes or sockets open, the block runs
        without, and the result says why (``no_checkpoint``). None: as the pool was told.

        Raises :class:`~midstream.errors.SandboxError` where the sandbox itself failed, and
        :class:`~midstream.errors.ProtocolError` if the session is closed or runs another block.
        """
        _check_code("code", code)
        checkpoint = self._protects(checkpoint)
        with self._turn():
            return self._told(drive(self._interpreter, self._interpreter.run(code, checkpoint=checkpoint)))

    async def run_async(self, code: str, *, checkpoint: bool | None = None) -> ExecutionResult:
        """The same on the running asyncio loop.

        Cancelled, it goes back to the checkpoint; without one it kills the process, and the next block rebuilds it.
        """
        _check_code("code", code)
        checkpoint = self._protects(checkpoint)
        with self._turn():
            return self._told(await drive_async(self._interpreter, self._interpreter.run(code, checkpoint=checkpoint)))

    def _told(self, result: ExecutionResult) -> ExecutionResult:
        self._pool.observers(SessionRan(result))
        return result

    def _protects(self, checkpoint: bool | None) -> bool:
        if checkpoint is None:
            return self._pool.checkpoint
        check_checkpoint(checkpoint, self._pool.forkable)
        return checkpoint

    def snapshot_key(self) -> str:
        """A name for the state that the session is in: 64 hexadecimal digits.

        Two sessions have the same only if they began alike (seed, preloaded modules, environment, limits,
        guardrails, tools; the level of isolation does not count), and have run the same blocks and been given
        the same files in the same order, with the same results from their tools and the same results; so
        one stands for the other. A copy has its original's until it runs something, and a block that was undone
        changes nothing. After a block that was interrupted or killed, that ran out of memory, that left threads
        running, or that cost the session its state, the key is one that no other session has; so is that of a
        session whose interpreter has still to be rebuilt, until it is. What code takes from the clock, its
        process's id or the like, and does not show, a key cannot know.
        """
        return self._interpreter.snapshot_key()

    # -- a block that arrives piece by piece

    def feed(self, piece: str) -> bool:
        """Take the next piece of a block that is still being written, and run the statements that it completes.

        The pieces, one after another, are the text of the block; best are whole statements, each with the end of
        its line. They run in a copy of the interpreter: nothing of it is seen by anybody before :meth:`commit`,
        and :meth:`abort` takes it all back. A call of a tool waits, and with it the block, until it is
        committed. Returns whether what came so far has been run, as far as that could be, and more would be: False
        where the rest waits for :meth:`commit`. Until the block is closed nothing else can be asked of the session.

        Raises :class:`~midstream.errors.ConfigurationError` unless the pool was made with ``forkable=True``.
        """
        self._check_feed(piece)
        with self._turn(feeding=True):
            return drive(self._interpreter, self._open_block().feed(piece))

    async def feed_async(self, piece: str) -> bool:
        """The same on the running asyncio loop. Cancelled, it leaves the block to run as a whole, at its end."""
        self._check_feed(piece)
        with self._turn(feeding=True):
            return await drive_async(self._interpreter, self._open_block().feed(piece))

    def commit(self) -> ExecutionResult:
        """Close the block that was fed: its result, which is that of ``run(block, checkpoint=True)``.

        Raises :class:`~midstream.errors.ProtocolError` if no block is open.
        """
        with self._turn(feeding=True):
            return self._told(drive(self._interpreter, self._taken_block().commit()))

    async def commit_async(self) -> ExecutionResult:
        """The same on the running asyncio loop. Cancelled, it takes the block back."""
        with self._turn(feeding=True):
            return self._told(await drive_async(self._interpreter, self._taken_block().commit()))

    def abort(self) -> None:
        """Drop the block that was fed: it was never run. Never waits, so asyncio can call it too.

        Raises :class:`~midstream.errors.ProtocolError` if no block is open.
        """
        with self._turn(feeding=True):
            self._taken_block().abort()

    def _check_feed(self, piece: object) -> None:
        _check_code("piece", piece)
        if not self._pool.forkable:
            raise ConfigurationError("feed: blocks can be fed where the pool was made with forkable=True")

    def _open_block(self) -> OpenBlock:
        if self._fed is None:
            self._fed = OpenBlock(self._interpreter)
        return self._fed

    def _taken_block(self) -> OpenBlock:
        block, self._fed = self._fed, None
        if block is None:
            raise ProtocolError("no block is open: nothing has been fed")
        return block

    # -- copies

    def fork(self, n: int = 1) -> list[Session]:
        """``n`` sessions that go on from where this one is, each on its own; this one goes on as well.

        Each is a copy-on-write copy of the live interpreter and of its files: names, values, open files with
        their offsets, and the state of ``random``, so that all draw the same numbers unless their code
        seeds anew. Pipes and sockets that the code has open lead nowhere in a copy. The blocks that this
        session has run are the copies' past as well. Each takes one of the pool's ``max_sessions``. At the
        level *container* a copy's working directory has another path, and absolute paths that the code has
        kept do not lead there.

        Raises :class:`~midstream.errors.SandboxError` where the interpreter cannot be copied, since its code
        has threads running, shares memory, or maps or has deleted a file that it has open, or since, at the
        level *container*, it and its ancestors have been forked fifteen times; and
        :class:`~midstream.errors.ConfigurationError` unless the pool was made with ``forkable=True``.
        """
        self._check_fork(n)
        places = self._pool.take_places(n)
        try:
            self._take_turn()
            try:
                drive(self._interpreter, self._interpreter.prepare())
                copies = clone(self._interpreter.living, n)
            finally:
                self._end_turn()
        except BaseException:
            for place in places:
                place.release()
            raise
        return [self._copy(process, place) for process, place in zip(copies, places, strict=True)]

    async def fork_async(self, n: int = 1) -> list[Session]:
        """The same on the running asyncio loop."""
        self._check_fork(n)
        places = await self._pool.take_places_async(n)
        try:
            self._take_turn()
            try:
                await drive_async(self._interpreter, self._interpreter.prepare())
                copies = await clone_async(self._interpreter.living, n)
            finally:
                self._end_turn()
        except BaseException:
            for place in places:
                place.release()
            raise
        return [self._copy(process, place) for process, place in zip(copies, places, strict=True)]

    def _check_fork(self, n: int) -> None:
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise ConfigurationError(f"n={n!r}: must be an integer of at least 1")
        if not self._pool.forkable:
            raise ConfigurationError("fork: sessions can be forked where the pool was made with forkable=True")

    def _copy(self, process: SessionProcess, place: Place) -> Session:
        copy = Session(self._pool, tools=self.tools, call_tool=self._interpreter.call_tool, seed=self.seed)
        copy._interpreter.go_on_from(self._interpreter)
        copy.attach(process)
        self._pool.admit(copy, place)
        return copy

    # -- files

    def put(self, path: str | os.PathLike[str], data: bytes | bytearray | memoryview) -> None:
        """Write a file into the working directory. Missing folders on its way are made.

        ``path`` is relative to the working directory and has no ``..`` in it; ``data`` has at most
        ``SandboxLimits.file_size`` bytes. The content is kept, to be put again where the interpreter has to
        be rebuilt. Raises :class:`~midstream.errors.SandboxFileError` where the file cannot be written, with
        the ``errno`` of the reason.
        """
        path, content = checked_path(path), checked_data(data, self._pool.limits)
        with self._turn():
            drive(self._interpreter, self._interpreter.put(path, content))

    async def put_async(self, path: str | os.PathLike[str], data: bytes | bytearray | memoryview) -> None:
        """The same on the running asyncio loop."""
        path, content = checked_path(path), checked_data(data, self._pool.limits)
        with self._turn():
            await drive_async(self._interpreter, self._interpreter.put(path, content))

    def get(self, path: str | os.PathLike[str]) -> bytes:
        """The content of a file in the working directory, of at most ``SandboxLimits.file_size`` bytes.

        Symbolic links are not followed. What it holds is the code's: it proves nothing. Raises
        :class:`~midstream.errors.SandboxFileError` where the file cannot be read.
        """
        path = checked_path(path)
        with self._turn():
            return drive(self._interpreter, self._interpreter.get(path))

    async def get_async(self, path: str | os.PathLike[str]) -> bytes:
        """The same on the running asyncio loop."""
        path = checked_path(path)
        with self._turn():
            return await drive_async(self._interpreter, self._interpreter.get(path))

    def _take_turn(self, *, feeding: bool = False) -> None:
        if self._closed:
            raise ProtocolError("this session is closed")
        if not self._busy.acquire(blocking=False):
            raise ProtocolError("this session runs another block")
        if self._fed is not None and not feeding:
            self._busy.release()
            raise ProtocolError("this session has a block open: commit() or abort() comes first")

    @contextlib.contextmanager
    def _turn(self, *, feeding: bool = False) -> Iterator[None]:
        self._take_turn(feeding=feeding)
        try:
            yield
        finally:
            self._end_turn()

    def _end_turn(self) -> None:
        if self._closed:  # meanwhile, by another thread or task
            self._interpreter.drop()
        self._busy.release()

    # -- the end

    def kill(self) -> None:
        """End the process at once, a running block's too. The session can go on with a new one."""
        self._interpreter.kill()
        if self._busy.acquire(blocking=False):
            self._interpreter.drop()
            self._busy.release()

    def close(self) -> None:
        """End the session for good, a running block's process too. May be called twice."""
        self._closed = True
        self.kill()
        self._pool.forget(self)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_checkpoint(checkpoint: object, forkable: bool) -> None:
    """Raise ConfigurationError unless blocks can be asked to run with, or without, a checkpoint."""
    if not isinstance(checkpoint, bool):
        raise ConfigurationError(f"checkpoint={checkpoint!r}: must be True or False")
    if checkpoint and not forkable:
        raise ConfigurationError("checkpoint=True: needs a pool that was made with forkable=True")


def tool_offers(tools: Mapping[str, str | Offer] | Sequence[str], call_tool: CallTool | None) -> dict[str, Offer]:
    """What code is told of its tools, checked."""
    if isinstance(tools, str) or not isinstance(tools, Iterable):
        raise ConfigurationError(f"tools={tools!r}: must be a mapping or a sequence of names, not one string")
    if call_tool is not None and not callable(call_tool):
        raise ConfigurationError(f"call_tool={call_tool!r}: must be a function that runs tools, or None")
    described = dict(tools) if isinstance(tools, Mapping) else dict.fromkeys(tools, "")
    offers = {}
    for name, told in described.items():
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
            raise ConfigurationError(f"tools={name!r}: a tool's name must be a Python identifier")
        if not isinstance(told, str | Offer):
            raise ConfigurationError(f"tools[{name!r}]={told!r}: must be a description, or an Offer")
        offers[name] = Offer(told) if isinstance(told, str) else told
    if described and call_tool is None:
        raise ConfigurationError(f"tools={sorted(described)}: tools need call_tool, which runs them")
    return offers


def _check_code(name: str, code: object) -> None:
    if not isinstance(code, str):
        raise ConfigurationError(f"{name}={code!r}: must be a string")


def _no_tool(name: str, _arguments: list[object], _keyword_arguments: dict[str, object]) -> object:
    raise SandboxError(f"{name}: this session has no tools")
