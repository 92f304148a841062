"""Blocks of code: how their text is read, how they run, how their values and errors are told."""

from __future__ import annotations
import __future__ as future_features

import ast
import errno
import io
import linecache
import os
import re
import tokenize
import traceback
import types
from collections.abc import Callable
from typing import Any

FILENAME = "<code>"
_OWN_FILES = "<sandbox "
_ASSIGNMENT = re.compile(r"[\w.\[\], ]+=(?!=)")
_READ_AS_A_WHOLE = re.compile(r"\\[^\n'\"\\abfnrtv0-7xNuU]|\r|__future__")
"""What is warned of when it is read, a line's end of another kind, what changes the language from there on."""
FUTURE_FLAGS = sum(getattr(future_features, name).compiler_flag for name in future_features.all_feature_names)
_BREACHED_ERRNOS = {
    errno.EFBIG: "file_size",
    errno.ENOSPC: "working_directory",
    errno.EDQUOT: "working_directory",
    errno.EMFILE: "open_files",
}


def as_written(code: str) -> str:
    """The code without what is not part of it.

    Blank lines around it, the spaces around a one-line block, and an indentation that all of it shares.
    """
    if code and not code[0].isspace() and not code[-1].isspace():
        return code
    lines = _lines(code)
    while lines and not lines[0].strip():
        del lines[0]
    while lines and not lines[-1].strip():
        del lines[-1]
    if len(lines) == 1:
        return lines[0].strip()
    if not lines or not lines[0][0].isspace():
        return "".join(lines)
    return _dedented(lines)


def _lines(code: str) -> list[str]:
    # Not str.splitlines: that also splits at characters that may stand inside a string.
    return io.StringIO(code).readlines()


def _dedented(lines: list[str]) -> str:
    first = lines[0]
    margin = first[: len(first) - len(first.lstrip())]
    kept = [number for number, line in enumerate(lines, 1) if line.strip() and not line.startswith(margin)]
    text = "".join(line.removeprefix(margin) for line in lines)
    # Lines that lack the indentation may only be the inside of strings, brackets or comments.
    if kept and _starts_of_statements(text) & set(kept):
        return "".join(lines)
    return text


def _starts_of_statements(text: str) -> set[int]:
    starts: set[int] = set()
    at_start = True
    silent = (tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING)
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.NEWLINE:
                at_start = True
            elif at_start and token.type not in silent:
                starts.add(token.start[0])
                at_start = False
    except (tokenize.TokenError, SyntaxError):
        return set(range(1, text.count("\n") + 2))
    return starts


class _Sources(dict[Any, Any]):
    """``linecache.cache``, where each block has its own entry although all are called ``<code>``.

    A code object keeps the very string that it was compiled with, so a block is known by the identity of
    its file name.
    """

    def __init__(self, entries: dict[Any, Any]) -> None:
        super().__init__(entries)
        self._blocks: dict[int, tuple[str, str]] = {}
        self._last = FILENAME

    def add(self, filename: str, code: str) -> None:
        self._blocks[id(filename)] = (filename, code)
        self._last = filename
        super().__setitem__(FILENAME, None)

    def __getitem__(self, key: Any) -> Any:
        if id(key) in self._blocks:
            return self._entry(key)
        known = super().__getitem__(key)
        return self._entry(self._last) if known is None else known

    def get(self, key: Any, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default

    def _entry(self, filename: str) -> tuple[int, None, list[str], str]:
        """Put together only when it is asked for: of most blocks nobody ever asks."""
        code = self._blocks[id(filename)][1]
        lines = _lines(code)
        if lines and not lines[-1].endswith("\n"):
            lines[-1] += "\n"
        return len(code), None, lines, filename


_Parts = tuple[types.CodeType | None, types.CodeType | None]
"""What is run before the last expression, and that."""


class Blocks:
    """Runs blocks one after another in one namespace, as at a prompt."""

    def __init__(self, namespace: dict[str, Any], shown: Callable[[object], str | None]) -> None:
        """``shown``: what is told of the value of a block's last expression, or None for nothing."""
        self.namespace = namespace
        self.shown = shown
        self.flags = 0
        self._sources = _Sources(linecache.cache)
        linecache.cache = self._sources
        self._filename = FILENAME

    def run(self, code: str) -> str | None:
        """Run a block; the text of its last expression's value, None for no value. Raises what it raises."""
        code = as_written(code)
        self.begin()
        self.add_source(code)
        parts = self._split(code)
        if parts is None:
            parts = self._split_tree(code)
        head, last = parts
        if head is not None:
            exec(head, self.namespace)  # noqa: S102  # this is what a sandbox is for
        return None if last is None else self.shown(eval(last, self.namespace))  # noqa: S307

    def _split(self, code: str) -> _Parts | None:
        """A block that ends with an expression on a line of its own, without its tree. None: see for yourself.

        Where all before the last line is whole by itself, and the last line is an expression by itself, that is what
        they are together: brackets, strings and clauses that the last line could belong to would be open.
        """
        head, _, last = code.rpartition("\n")
        # An assignment would only take the time of a syntax error.
        if last[:1].isspace() or _ASSIGNMENT.match(last) or _READ_AS_A_WHOLE.search(code):
            return None
        try:
            value = compile("\n" * code.count("\n") + last, self._filename, "eval", self.flags, True)
            return (compile(head, self._filename, "exec", self.flags, True) if head else None), value
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None  # as a whole it may be right; if not, that is told there

    def _split_tree(self, code: str) -> _Parts:
        tree = compile(code, self._filename, "exec", self.flags | ast.PyCF_ONLY_AST, dont_inherit=True)
        assert isinstance(tree, ast.Module)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        head = self.compiled(tree, "exec") if tree.body else None
        if not isinstance(last, ast.Expr):
            return head, None
        return head, self.compiled(ast.Expression(last.value), "eval")

    def begin(self) -> None:
        """What is compiled from now on is of another block."""
        self._filename = "".join((FILENAME[:1], FILENAME[1:]))  # a new string, equal to all the others

    def add_source(self, code: str) -> None:
        """The text of the present block, for tracebacks."""
        self._sources.add(self._filename, code)

    def compiled(self, tree: ast.AST, mode: str) -> types.CodeType:
        """The code of a part of the present block."""
        code: types.CodeType = compile(tree, self._filename, mode, self.flags, dont_inherit=True)  # type: ignore[call-overload]
        self.flags |= code.co_flags & FUTURE_FLAGS
        return code

    def describe(self, error: BaseException, maximum_characters: int) -> dict[str, Any]:
        """An error as data. Runs the error's own ``__repr__`` and ``__str__``."""
        try:
            shown = repr(error)
        except Exception:  # noqa: BLE001  # an error that cannot be shown is still an error
            shown = f"{type(error).__name__}(<exception repr() failed>)"
        try:
            message = str(error)
        except Exception:  # noqa: BLE001
            message = "<exception str() failed>"
        return {
            "type": str(type(error).__name__)[:200],
            "message": message[:maximum_characters],
            "repr": shown[: 2 * maximum_characters],
            "line": self._line(error),
            "traceback": self._traceback(error)[-maximum_characters:],
            "breached": _breached(error),
        }

    def describe_shortly(self, error: BaseException, trouble: BaseException) -> dict[str, Any]:
        """An error whose description itself failed with ``trouble``; runs nothing of the code's."""
        name, why = type(error).__name__[:200], type(trouble).__name__[:200]
        return {
            "type": name,
            "message": "",
            "repr": f"{name}(<{why} while it was shown>)",
            "line": None,
            "traceback": "",
            "breached": None,
        }

    def _line(self, error: BaseException) -> int | None:
        line = None
        step = error.__traceback__
        while step is not None:
            if step.tb_frame.f_code.co_filename is self._filename:
                line = step.tb_lineno
            step = step.tb_next
        if line is None and isinstance(error, SyntaxError) and error.filename == FILENAME:
            return error.lineno
        return line

    def _traceback(self, error: BaseException) -> str:
        told = traceback.TracebackException(type(error), error, error.__traceback__, compact=True)
        _leave_out_own_frames(told)
        return "".join(told.format()).rstrip("\n")


def _leave_out_own_frames(told: traceback.TracebackException) -> None:
    waiting = [told]
    while waiting:
        item = waiting.pop()
        item.stack[:] = [frame for frame in item.stack if not frame.filename.startswith(_OWN_FILES)]
        waiting += [part for part in (item.__cause__, item.__context__) if part is not None]
        waiting += item.exceptions or []


def _breached(error: BaseException) -> str | None:
    if isinstance(error, MemoryError):
        return "memory"
    if isinstance(error, OSError):
        if error.errno == errno.ENOSPC and os.statvfs(".").f_favail == 0:
            return "files"
        return _BREACHED_ERRNOS.get(error.errno or 0)
    if isinstance(error, RuntimeError) and str(error) == "can't start new thread":
        return "threads"
    return None
