"""The interpreter of one session: reads requests, runs blocks, calls tools through the host.

It lives in the same process as the code that it runs, so nothing here is a defence: the code can read and
change all of it. What the host relies on is the isolation of the process, and that it believes nothing.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # typeshed knows signal only
import builtins
import contextlib
import json
import mmap
import os
import pprint
import resource
import shutil
import signal
import struct
import sys
import threading
import time
import types
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from midstream.crossing.faults import exception_of
from midstream.crossing.signatures import Offer, annotations_of, checker
from midstream.crossing.texts import CrossingError
from midstream.crossing.values import from_json, to_json
from midstream.sandbox.inside import files
from midstream.sandbox.inside.blocks import Blocks
from midstream.sandbox.inside.capture import Capture, NoInput, OutputStream
from midstream.sandbox.inside.cloning import Cloning
from midstream.sandbox.inside.feeding import FedBlock
from midstream.sandbox.inside.guardrails import guarded_builtins
from midstream.sandbox.inside.pictures import Pictures
from midstream.sandbox.inside.seeding import seed_everything
from midstream.sandbox.text import cut_middle, too_long

_T = TypeVar("_T")

CHANNEL = 3
"""The descriptor of the channel to the host, in every session."""

_READ_BYTES = 1 << 16
_INTERRUPTS_APART = 0.05
_BALLAST_BYTES = 16 << 20
_LARGEST_VALUE = 256 << 20
_SESSION_CPU_MESSAGE = "this session has used up its processor time"


class Timeout(BaseException):
    """Raised in code that runs for too long. Not an Exception: ``except Exception`` must not stop it."""

    __module__ = "builtins"  # tracebacks then call it just by its name


class Channel:
    """Frames to and from the host."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._buffer = bytearray()
        self._encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
        self._encode_value = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode
        self._decode = json.JSONDecoder().decode

    def encode_value(self, value: object) -> str:
        return self._encode_value(value)

    def send(self, frame: dict[str, Any]) -> None:
        # A lone surrogate, which UTF-8 has no bytes for, becomes its JSON escape.
        body = self._encode(frame).encode("utf-8", "backslashreplace")
        view = memoryview(struct.pack("<I", len(body)) + body)
        while view:
            view = view[os.write(self._descriptor, view) :]

    def receive(self) -> dict[str, Any]:
        (length,) = struct.unpack("<I", self._take(4))
        frame = self._decode(self._take(length).decode("utf-8"))
        assert isinstance(frame, dict)
        return frame

    def _take(self, size: int) -> bytes:
        while len(self._buffer) < size:
            data = os.read(self._descriptor, _READ_BYTES)
            if not data:
                os._exit(0)  # the host is gone
            self._buffer += data
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken


class Interrupts:
    """Turns the host's SIGINT into an exception, while code of a block runs in the main thread."""

    def __init__(self) -> None:
        self.armed = False
        self.message = ""
        self.cpu_message = ""
        self._last = float("-inf")

    def install(self) -> None:
        # Of _signal: signal.getsignal looks for an enumeration's member first, which takes longer than all else here.
        if _signal.getsignal(signal.SIGINT) != self._interrupt:
            signal.signal(signal.SIGINT, self._interrupt)
        if _signal.getsignal(signal.SIGXCPU) != self._out_of_cpu_time:
            signal.signal(signal.SIGXCPU, self._out_of_cpu_time)

    def _interrupt(self, _number: int, _frame: object) -> None:
        # The host repeats the signal, for code that swallows the exception; never so fast that a second
        # one could hit the handling of the first.
        now = time.monotonic()
        if self.armed and now - self._last > _INTERRUPTS_APART:
            self._last = now
            raise Timeout(self.message)

    def _out_of_cpu_time(self, _number: int, _frame: object) -> None:
        # From the kernel once the session has used up its time, each second; before that from the host.
        now = time.monotonic()
        if self.armed and now - self._last > _INTERRUPTS_APART:
            self._last = now
            soft, _ = resource.getrlimit(resource.RLIMIT_CPU)
            of_block = soft == resource.RLIM_INFINITY or time.process_time() < soft
            raise OutOfProcessorTime(self.cpu_message if of_block and self.cpu_message else _SESSION_CPU_MESSAGE)

    def out_of_time(self, limit: str) -> Timeout:
        """What to raise for a limit that was reached while the code waited for a tool."""
        return OutOfProcessorTime(self.cpu_message) if limit == "block_cpu_time" else Timeout(self.message)


class OutOfProcessorTime(Timeout):
    """Raised in code when the session, or the block, has used up its processor time."""

    __module__ = "builtins"


class Ballast:
    """Address space held back, so that a result can still be told when the code has used up the rest."""

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None

    def take(self) -> None:
        if self._memory is None:
            with contextlib.suppress(OSError):
                self._memory = mmap.mmap(-1, _BALLAST_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def drop(self) -> None:
        if self._memory is not None:
            self._memory.close()
            self._memory = None


class Worker:
    """Serves one session. Made in the process that sessions are forked from, so that none of them has to wait for it.

    ``options``: ``output_characters``, ``argument_characters``, ``image_bytes``, ``capabilities``, and whether it is
    ``rooted``.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._channel = Channel(CHANNEL)
        self._folder = ""
        self._lock = threading.RLock()
        self._nonce: str | None = None
        self._calls = 0
        self._output_characters: int = options["output_characters"]
        self._argument_characters: int = options["argument_characters"]
        self._interrupts = Interrupts()
        self._ballast = Ballast()
        self._cloning = Cloning(options["capabilities"], rooted=options["rooted"])
        self._capture = Capture(self._output_characters)
        self._pictures = Pictures(self._capture, options["image_bytes"])
        self._pictures.watch()
        streams = (
            NoInput(),
            OutputStream(self._capture, 1, "<stdout>"),
            OutputStream(self._capture, 2, "<stderr>"),
        )
        plain = dict(zip(("stdin", "stdout", "stderr"), streams, strict=True))
        self._streams = plain | {f"__{name}__": stream for name, stream in plain.items()}
        main = types.ModuleType("__main__")
        main.__dict__["__builtins__"] = builtins
        sys.modules["__main__"] = main
        self._namespace = main.__dict__
        self._blocks = Blocks(self._namespace, self._shown)
        self._fed: FedBlock | None = None

    def open(self) -> None:
        """Take the present working directory, what is written to descriptors 1 and 2, and memory of its own."""
        self._folder = self._cloning.home = os.getcwd()
        self._capture.connect()
        self._ballast.take()

    def serve(self) -> NoReturn:
        """Answer the host's requests until it goes."""
        self._channel.send({"ready": True})
        while True:
            request = self._channel.receive()
            if "lease" in request:
                self._lease(request["lease"])
            elif "clones" in request:
                if self._cloning.fork(request["clones"]):
                    self._folder = self._cloning.home
                    self._capture.connect()
                    self._channel.send({"ready": True})
            elif "feed" in request:
                self._feed(request)
            elif "check" in request:
                self._check(request)
            elif "close" in request:
                self._close(request)
            elif "file" in request:
                self._channel.send({"nonce": request["nonce"], "file": files.answer(self._folder, request["file"])})
            else:
                self._run(request)

    def _lease(self, terms: dict[str, Any]) -> None:
        """Become somebody's: it may have been started long before, for nobody in particular."""
        seed_everything(terms["seed"])
        if terms["guardrails"] is not None:
            guarded = guarded_builtins(terms["guardrails"], lambda: self._folder)
            self._namespace["__builtins__"] = guarded
        for name, told in terms["tools"].items():
            self._namespace[name] = self._tool(name, Offer.from_json(told))

    def _run(self, request: dict[str, Any]) -> None:
        self._begin(request)
        self._nonce = request["nonce"]
        value, error = self._guarded(self._blocks.run, request["code"])
        error = self._show_figures(error)
        outcome = self._described(error)
        error = None  # lets go of the frames, and of what they hold, before the text is put together
        self._tell(value, outcome)

    def _begin(self, request: dict[str, Any]) -> None:
        for name, stream in self._streams.items():
            setattr(sys, name, stream)
        self._interrupts.install()
        self._interrupts.message = request["time_limit_message"]
        self._interrupts.cpu_message = request.get("cpu_limit_message", "")
        self._calls = 0
        self._pictures.clear()

    def _shown(self, value: object) -> str | None:
        if value is None:
            return None
        picture = self._pictures.text_of(value)
        return pprint.pformat(value) if picture is None else picture

    def _show_figures(self, error: BaseException | None) -> BaseException | None:
        """Show what the code has left open. The error that the block ends with: its own, or that of the drawing."""
        if self._pictures.open and not isinstance(error, Timeout):
            _, trouble = self._guarded(self._pictures.show_open)
            return error or trouble
        return error

    def _described(self, error: BaseException | None) -> dict[str, Any]:
        """The parts of a result that are about its error."""
        told = trouble = None
        if error is not None:
            if isinstance(error, MemoryError):
                self._ballast.drop()
            told, trouble = self._guarded(self._blocks.describe, error, self._output_characters)
            if trouble is not None:
                told, _ = self._guarded(self._blocks.describe_shortly, error, trouble)
            if told is not None:
                note = self._cloning.note(error)
                told |= {key: told[key] + note for key in ("message", "repr", "traceback")}
        ends = (error, trouble)  # the error's own __repr__ and __str__ may have taken the time that was left
        return {
            "error": told,
            "interrupted": any(isinstance(each, Timeout) for each in ends),
            "breached": "cpu_time" if any(isinstance(each, OutOfProcessorTime) for each in ends) else None,
        }

    def _tell(self, value: str | None, outcome: dict[str, Any]) -> None:
        stdout, truncated = self._capture.finish()
        if value is not None and len(value) > self._output_characters:
            value, truncated = cut_middle(value, self._output_characters), True
        result = {"stdout": stdout, "value": value, "truncated": truncated, **outcome}
        if images := self._pictures.take():
            result["images"] = images
        self._answer({**result, "threads": threading.active_count() - 1})
        self._capture.clear()
        self._ballast.take()

    def _answer(self, frame: dict[str, Any]) -> None:
        with self._lock:  # a thread of the code that waits for a tool gets its answer first
            nonce, self._nonce = self._nonce, None
            self._channel.send({"nonce": nonce, **frame})

    # -- a block that arrives piece by piece

    def _feed(self, request: dict[str, Any]) -> None:
        if self._fed is None:
            self._begin(request)
            self._fed = FedBlock(self._blocks)
        self._nonce = request["nonce"]
        _, error = self._guarded(self._fed.extend, request["feed"])
        if error is not None:
            self._fed.outcome = self._described(error)
            error = None
        self._answer({"fed": self._fed.state.value})

    def _check(self, request: dict[str, Any]) -> None:
        fed = self._fed or FedBlock(self._blocks)
        self._channel.send({"nonce": request["nonce"], "checked": fed.agrees(request["check"], request["ran"])})

    def _close(self, request: dict[str, Any]) -> None:
        fed, self._fed = self._fed or FedBlock(self._blocks), None
        self._nonce, value = request["nonce"], None
        if fed.outcome is None:
            value, error = self._guarded(fed.extend, request["close"], True)
            error = self._show_figures(error)
            fed.outcome = self._described(error)
            error = None
        else:
            self._show_figures(None)
        self._tell(value, fed.outcome)

    def _guarded(self, function: Callable[..., _T], *arguments: Any) -> tuple[_T | None, BaseException | None]:
        """Call what runs the code of a block: its value or its error, and no interrupt after it is over."""
        interrupts, value, error = self._interrupts, None, None
        try:
            try:
                interrupts.armed = True
                value = function(*arguments)
            except BaseException as caught:  # noqa: BLE001  # SystemExit and the rest are results too
                error = caught
            interrupts.armed = False
        except Timeout as late:  # it came just when the code had ended
            interrupts.armed = False
            error = error or late
        return value, error

    # -- tools

    def _tool(self, name: str, offer: Offer) -> Callable[..., Any]:
        check = checker(name, offer.signature)

        def tool(*arguments: Any, **keyword_arguments: Any) -> Any:
            check(*arguments, **keyword_arguments)
            return self._call(name, arguments, keyword_arguments)

        tool.__name__ = tool.__qualname__ = name
        tool.__doc__ = offer.description or None
        tool.__module__ = "__main__"
        tool.__annotations__ = {}
        if offer.signature is not None:
            tool.__signature__ = offer.signature  # type: ignore[attr-defined]
            tool.__annotations__ = annotations_of(offer.signature)
        return tool

    def _call(self, name: str, arguments: tuple[Any, ...], keyword_arguments: dict[str, Any]) -> Any:
        try:
            keywords = {key: to_json(value) for key, value in keyword_arguments.items()}
            body = self._channel.encode_value([to_json(list(arguments)), keywords])
        except (CrossingError, RecursionError) as error:
            raise TypeError(f"{name}() cannot take these arguments: {error}") from None
        if len(body) > self._argument_characters:
            raise ValueError(too_long(name, self._argument_characters))
        with self._lock:
            if self._nonce is None:
                raise RuntimeError(f"{name}() can be called only while a block runs")
            main_thread = threading.current_thread() is threading.main_thread()
            # An exception in the middle of a frame would garble all that follows. The host does not count
            # the time of a call, and repeats an interrupt that is missed here.
            armed = self._interrupts.armed
            try:
                if main_thread:
                    self._interrupts.armed = False
                self._calls += 1
                call = {"nonce": self._nonce, "call": self._calls, "tool": name, "arguments": body}
                self._channel.send(call)
                answer = self._channel.receive()
                while "check" in answer or "again" in answer:  # the call waits for the rest of its block
                    if "check" in answer:
                        self._check(answer)
                    else:
                        self._channel.send(call)
                    answer = self._channel.receive()
            finally:
                if main_thread:
                    self._interrupts.armed = armed
        if answer.get("time_is_up"):
            raise self._interrupts.out_of_time(answer["time_is_up"])
        failure = answer.get("error")
        if failure is not None:
            raise exception_of(failure["type"], failure["message"], failure["base"])
        try:
            return from_json(answer["value"], records=True, maximum_bytes=_LARGEST_VALUE)
        except CrossingError as error:
            raise TypeError(f"{name}() gave what this interpreter cannot read: {error}") from None


def adapt_standard_library() -> None:
    """Let copying files work where changing permissions and times is refused."""
    shutil.copymode = _copy_nothing
    shutil.copystat = _copy_nothing


def _copy_nothing(*_: object, **__: object) -> None:
    """Permissions and times are not copied in a sandbox."""
