"""Runs inside the session: a command as a program of its own, with its streams, in the session's interpreter.

Standard library alone. Commands share the interpreter, so what one changes is put back as far as a next one would see
it: ``__main__``, streams, arguments, environment, folder, imports from the working directory, handlers of logs.
"""

from __future__ import annotations

import base64
import builtins
import io
import json
import logging
import os
import runpy
import shutil
import sys
import time
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

_OWN_FILES = (__file__ if "__file__" in globals() else "<midstream>", runpy.__file__, "<frozen runpy>")


class _Capped(io.BytesIO):
    """Keeps so many bytes and one more, which tells that there were more; also where a command closes its stream."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def write(self, data: Any, /) -> int:
        data = bytes(data)
        super().write(data[: max(0, self._most + 1 - self.tell())])
        return len(data)

    def close(self) -> None:
        self.flush()


def run(request: dict[str, Any]) -> None:
    """Run a command and leave what it gave in the file ``request["output"]``, as JSON."""
    base = os.getcwd()
    with suppress(FileNotFoundError):
        os.unlink(request["output"])
    given = b""
    if request["input"] is not None:
        with open(request["input"], "rb") as file:
            given = file.read()
        os.unlink(request["input"])
    output, errors = _Capped(request["most"]), _Capped(request["most"])
    with _own_world(base, given, output, errors, request["environment"]):
        status = _status(request)
    gave = {
        "nonce": request["nonce"],
        "returncode": status,
        "stdout": base64.b64encode(output.getvalue()).decode("ascii"),
        "stderr": base64.b64encode(errors.getvalue()).decode("ascii"),
        "folder": base,
    }
    with open(request["output"], "w", encoding="ascii") as file:
        json.dump(gave, file)


@contextmanager
def _own_world(
    base: str, given: bytes, output: io.BytesIO, errors: io.BytesIO, added: dict[str, str]
) -> Iterator[None]:
    streams = sys.stdin, sys.stdout, sys.stderr
    main, modules = sys.modules.get("__main__"), set(sys.modules)
    arguments, path, environment = sys.argv, list(sys.path), dict(os.environ)
    handlers, level, filters = list(logging.root.handlers), logging.root.level, list(warnings.filters)
    sys.stdin = io.TextIOWrapper(io.BytesIO(given), encoding="utf-8", errors="surrogateescape")
    own = (
        io.TextIOWrapper(output, encoding="utf-8", errors="surrogateescape", write_through=True),
        io.TextIOWrapper(errors, encoding="utf-8", errors="backslashreplace", write_through=True),
    )
    sys.stdout, sys.stderr = own
    os.environ.update(added)
    try:
        yield
    finally:
        sys.stdin, sys.stdout, sys.stderr = streams
        os.chdir(base)
        for stream in own:
            with suppress(ValueError):  # closed by the command
                stream.detach()  # a stream that is collected would close what is still to be read
        sys.argv, sys.path[:] = arguments, path
        os.environ.clear()
        os.environ.update(environment)
        logging.root.handlers[:] = handlers
        warnings.filters[:] = filters  # type: ignore[index]  # it is a list
        logging.root.setLevel(level)
        if main is not None:
            sys.modules["__main__"] = main
        for name in set(sys.modules) - modules:
            # Extension modules cannot be loaded twice, and those of the command itself may have changed by then.
            origin = getattr(sys.modules[name], "__file__", None)
            if isinstance(origin, str) and os.path.abspath(origin).startswith(base + os.sep):
                del sys.modules[name]


def _status(request: dict[str, Any]) -> int:
    """Run the command; its exit status."""
    try:
        os.chdir(request["folder"])
        _KINDS[request["kind"]](request)
    except SystemExit as exit_:
        if exit_.code is None or isinstance(exit_.code, int):
            return (exit_.code or 0) & 0xFF
        print(exit_.code, file=sys.stderr)
        return 1
    except BaseException as error:
        kind = type(error)
        if kind.__module__ == "builtins" and not hasattr(builtins, kind.__name__):
            raise  # the session's own: the command's time is over
        frames = error.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename in _OWN_FILES:
            frames = frames.tb_next
        traceback.print_exception(type(error), error, frames)
        return 1
    return 0


def _code(request: dict[str, Any]) -> None:
    _execute(request["source"], "<string>", request["arguments"], "")


def _stdin(request: dict[str, Any]) -> None:
    _execute(sys.stdin.read(), "<stdin>", request["arguments"], "")


def _script(request: dict[str, Any]) -> None:
    name = request["source"]
    try:
        with open(name, "rb") as file:
            source = file.read()
    except OSError as error:
        print(f"python: can't open file {name!r}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    _execute(source, name, request["arguments"], os.path.dirname(os.path.abspath(name)))


def _module(request: dict[str, Any]) -> None:
    sys.argv, sys.path[:0] = list(request["arguments"]), [""]
    runpy.run_module(request["source"], run_name="__main__", alter_sys=True)


def _execute(source: str | bytes, name: str, arguments: list[str], folder: str) -> None:
    main = types.ModuleType("__main__")
    main.__dict__["__file__" if folder else "__loader__"] = name if folder else None
    sys.modules["__main__"] = main
    sys.argv, sys.path[:0] = list(arguments), [folder]
    exec(compile(source, name, "exec", dont_inherit=True), main.__dict__)  # noqa: S102  # this is what it is for


_KINDS: dict[str, Callable[[dict[str, Any]], None]] = {
    "code": _code,
    "stdin": _stdin,
    "script": _script,
    "module": _module,
    "file": lambda request: FILE_COMMANDS[request["source"]](*_options(request["arguments"])),
}


# --- commands for files


def _options(words: list[str]) -> tuple[set[str], list[str]]:
    """The letters of short options, and the operands."""
    options: set[str] = set()
    for place, word in enumerate(words):
        if word == "--":
            return options, words[place + 1 :]
        if not word.startswith("-") or word == "-":
            return options, words[place:]
        options |= set(word[1:])
    return options, []


def _each(action: Callable[[str], None], operands: list[str], *, ignore_missing: bool = False) -> None:
    failed = False
    for operand in operands:
        try:
            action(operand)
        except OSError as error:
            if not (ignore_missing and isinstance(error, FileNotFoundError)):
                print(f"{operand}: {error.strerror}", file=sys.stderr)
                failed = True
    if failed:
        raise SystemExit(1)


def _allowed(options: set[str], allowed: str) -> None:
    if options - set(allowed):
        print(
            f"unknown option -{min(options - set(allowed))}; there are {' '.join(allowed) or 'none'}", file=sys.stderr
        )
        raise SystemExit(2)


def _rm(options: set[str], operands: list[str]) -> None:
    _allowed(options, "rf")
    recursive = "r" in options

    def remove(path: str) -> None:
        (shutil.rmtree if recursive and os.path.isdir(path) and not os.path.islink(path) else os.unlink)(path)

    _each(remove, operands, ignore_missing="f" in options)


def _mkdir(options: set[str], operands: list[str]) -> None:
    _allowed(options, "p")
    _each(lambda path: os.makedirs(path, exist_ok=True) if "p" in options else os.mkdir(path), operands)


def _rmdir(options: set[str], operands: list[str]) -> None:
    _allowed(options, "")
    _each(os.rmdir, operands)


def _touch(options: set[str], operands: list[str]) -> None:
    _allowed(options, "")

    def touch(path: str) -> None:
        with open(path, "ab"):
            pass

    _each(touch, operands)


def _ls(options: set[str], operands: list[str]) -> None:
    _allowed(options, "1a")

    def show(path: str) -> None:
        names = sorted(os.listdir(path)) if os.path.isdir(path) else [path]
        for name in names:
            if "a" in options or not name.startswith("."):
                print(name)

    _each(show, operands or ["."])


def _cat(options: set[str], operands: list[str]) -> None:
    _allowed(options, "")

    def show(path: str) -> None:
        if path == "-":
            sys.stdout.buffer.write(sys.stdin.buffer.read())
            return
        with open(path, "rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)

    _each(show, operands or ["-"])


def _wc(options: set[str], operands: list[str]) -> None:
    """Bytes alone."""
    _allowed(options, "c")

    def count(path: str) -> None:
        if path == "-":
            print(len(sys.stdin.buffer.read()))
        else:
            with open(path, "rb") as file:
                print(len(file.read()), path)

    _each(count, operands or ["-"])


def _echo(options: set[str], operands: list[str]) -> None:
    print(*operands, end="" if "n" in options else "\n")


def _sleep(options: set[str], operands: list[str]) -> None:
    _allowed(options, "")
    time.sleep(float(operands[0]))


def _pwd(options: set[str], operands: list[str]) -> None:
    _allowed(options, "")
    del operands
    print(os.getcwd())


FILE_COMMANDS: dict[str, Callable[[set[str], list[str]], None]] = {
    "cat": _cat,
    "echo": _echo,
    "ls": _ls,
    "mkdir": _mkdir,
    "pwd": _pwd,
    "rm": _rm,
    "rmdir": _rmdir,
    "sleep": _sleep,
    "touch": _touch,
    "wc": _wc,
}
