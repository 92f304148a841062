"""A block that arrives piece by piece, and runs as far as it can as though it had come whole.

What it does is kept only if it is what the whole block would have done, so wherever the two could differ this
stops, and says so: the host then throws the process away, and runs the block as a whole in another.
"""

from __future__ import annotations

import _thread
import ast
import contextlib
import enum
import math
import types
import warnings
from collections.abc import Iterator
from typing import Any

from midstream.sandbox.inside import blocks

_UNREADABLE = (SyntaxError, ValueError, OverflowError, MemoryError, RecursionError)


class State(enum.Enum):
    """How far a block has come."""

    RUNNING = "running"  # as far as the text goes
    OVER = "over"  # an exception has ended it
    UNSURE = "unsure"  # as a whole it could do something else


class FedBlock:
    """Runs the statements of one block as they come."""

    def __init__(self, of: blocks.Blocks) -> None:
        self._blocks = of
        self._flags = of.flags
        self._text = ""
        self._ran: list[str] = []
        self._value: object = None
        self._waiting: types.CodeType | None = None
        self._constants = _Constants()
        self._unsure = False
        self.outcome: dict[str, Any] | None = None
        """What is told of the exception that has ended it."""
        of.begin()

    @property
    def state(self) -> State:
        if self._unsure or _thread._count() > 0:  # threads go on between two statements
            return State.UNSURE
        return State.RUNNING if self.outcome is None else State.OVER

    def extend(self, text: str, final: bool = False) -> str | None:
        """Take the next piece, and run the statements that it completes. Raises what they raise.

        ``final``: there is no other. Then the text of the last expression's value is returned, as by
        :meth:`~midstream.sandbox.inside.blocks.Blocks.run`. What runs does so at the same depth of the stack.
        """
        self._text += text
        statements = self._statements()
        for statement in statements[len(self._ran) :]:
            code = self._next(statement, last=statement is statements[-1], final=final)
            if code is None:
                return None
            # An expression's value is kept for as long as no other statement follows.
            self._value = None
            self._ran.append(_dump(statement))
            self._value = eval(code, self._blocks.namespace)  # noqa: S307  # this is what a sandbox is for
        if not final:
            return None
        value, self._value = self._value, None
        return self._blocks.shown(value)

    def _statements(self) -> list[ast.stmt]:
        """Those of the text so far; none where it is not whole."""
        code = blocks.as_written(self._text)
        with _noticing() as noticed:
            try:
                statements = self._parsed(code).body
            except SyntaxError:
                return []  # more of it may come; if not, the host finds out
            except _UNREADABLE:
                self._unsure = True
                return []
        # What is read anew may turn out as something else than what has run.
        if noticed or self._ran != [_dump(statement) for statement in statements[: len(self._ran)]]:
            self._unsure = True
        if self._unsure:
            return []
        self._blocks.add_source(code)
        return statements

    def _parsed(self, code: str) -> ast.Module:
        tree = compile(code, blocks.FILENAME, "exec", self._flags | ast.PyCF_ONLY_AST, dont_inherit=True)
        assert isinstance(tree, ast.Module)
        return tree

    def _next(self, statement: ast.stmt, *, last: bool, final: bool) -> types.CodeType | None:
        """The code of the next statement, or None if it has to wait for what comes after it."""
        expression = isinstance(statement, ast.Expr)
        first_text = not self._ran and _is_text(statement)
        if first_text and last and not final:
            return None  # followed by others it would be the block's documentation
        if self._ran and _annotates(statement):
            self._unsure = True  # a block prepares for its annotations when it begins
            return None
        if self._waiting is not None:
            self._constants.merged(self._waiting)
            self._waiting = None
        with _noticing() as noticed:
            try:
                if isinstance(statement, ast.Expr) and (last or not first_text):
                    code = self._blocks.compiled(ast.Expression(statement.value), "eval")
                else:
                    code = self._blocks.compiled(ast.Module([statement], []), "exec")
            except _UNREADABLE:
                noticed.append(True)
        if noticed:
            self._unsure = True
            return None
        if not (expression and last):
            return self._constants.merged(code)
        if final:
            return code
        # The last expression of a block shares no constants with the rest, as any other does.
        if self._constants.meet(code):
            return None
        self._waiting = code
        return code

    def agrees(self, whole: str, ran: str | None = None) -> bool:
        """Whether the block, now that all of it is known, would have begun with what has run.

        ``ran``: the text that ran in another process; None for this one's.
        """
        if self.state is State.UNSURE:
            return False
        with _noticing() as noticed:
            try:
                before = self._ran
                if ran is not None:
                    before = [_dump(statement) for statement in self._parsed(blocks.as_written(ran)).body]
                statements = self._parsed(blocks.as_written(whole)).body
                same = before == [_dump(statement) for statement in statements[: len(before)]]
                same = same and not any(map(_annotates, statements[1:]))
                last = statements.pop() if statements and isinstance(statements[-1], ast.Expr) else None
                rest = compile(ast.Module(statements, []), blocks.FILENAME, "exec", self._flags, dont_inherit=True)
                if isinstance(last, ast.Expr):
                    flags = self._flags | rest.co_flags & blocks.FUTURE_FLAGS
                    compile(ast.Expression(last.value), blocks.FILENAME, "eval", flags, dont_inherit=True)
            except _UNREADABLE:
                return False
        return same and not noticed


def _dump(statement: ast.stmt) -> str:
    return ast.dump(statement, include_attributes=True)


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _annotates(statement: ast.stmt) -> bool:
    """Whether it annotates a name of the block itself."""
    waiting: list[ast.AST] = [statement]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.AnnAssign):
            return True
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)
    return False


@contextlib.contextmanager
def _noticing() -> Iterator[list[Any]]:
    """What the compiler warns of, which nobody is to see yet."""
    noticed: list[Any] = []
    show = getattr(warnings, "_showwarnmsg", None)
    warnings._showwarnmsg = noticed.append  # type: ignore[attr-defined]  # where the interpreter looks for it
    try:
        yield noticed
    finally:
        warnings._showwarnmsg = show  # type: ignore[attr-defined]


class _Constants:
    """The constants of a block: where the compiler sees it whole, equal ones are one object."""

    def __init__(self) -> None:
        self._known: dict[object, object] = {}

    def merged(self, code: types.CodeType) -> types.CodeType:
        """The code with constants of the statements before it in place of its own."""
        constants = tuple(self._of_all(constant) for constant in code.co_consts)
        if all(new is old for new, old in zip(constants, code.co_consts, strict=True)):
            return code
        return code.replace(co_consts=constants)

    def _of_all(self, constant: object) -> object:
        if isinstance(constant, types.CodeType):
            constant = self.merged(constant)
        elif type(constant) is tuple:
            items = tuple(self._of_all(item) for item in constant)
            if any(new is not old for new, old in zip(items, constant, strict=True)):
                constant = items
        return self._known.setdefault(_key(constant), constant)

    def meet(self, code: types.CodeType) -> bool:
        """Whether a constant of the code is equal to a known one, but not that."""
        return any(self._meets(constant) for constant in code.co_consts)

    def _meets(self, constant: object) -> bool:
        if isinstance(constant, types.CodeType) and self.meet(constant):
            return True
        if type(constant) is tuple and any(self._meets(item) for item in constant):
            return True
        return self._known.get(_key(constant), constant) is not constant


def _key(constant: object) -> object:
    """Equal for those constants that the compiler makes one."""
    if isinstance(constant, float):
        return float, constant, math.copysign(1.0, constant)
    if isinstance(constant, complex):
        return complex, _key(constant.real), _key(constant.imag)
    if isinstance(constant, tuple):
        return tuple, *map(_key, constant)
    if isinstance(constant, frozenset):
        return frozenset, frozenset(map(_key, constant))
    return type(constant), constant
