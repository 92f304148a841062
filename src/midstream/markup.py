"""How what a model asks to be run looks in generated text, and how its result looks.

A markup is data: the texts that open and close a block, what stands in it, and the frames around a result. It
says nothing of tokens; :mod:`midstream.row` finds the tags in the decoded text and encodes the results. The
markups of models that call tools in JSON are in :mod:`midstream.families`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

from midstream.call_text import Holds
from midstream.errors import MarkupError


@dataclass(frozen=True, slots=True)
class Special:
    """An added token of the tokenizer that a markup itself means, such as ``<|tool_response|>``, by its text.

    Unless it is ``required``, a vocabulary that has no such token has the plain text in its place.
    """

    text: str
    required: bool = True


class Slot(NamedTuple):
    """A place in a result's frame for something of the call that it answers: the tool's name, or the call's id.

    The id is the model's own, or one like ``call00003`` made from the call's index.
    """

    holds: Literal["name", "id"]


Part = str | Special
"""A piece of a rendered result: plain text, or a special token."""

Payload = Literal["text", "string", "value"]
"""How a result's text stands in its frame: as it is; as a JSON string; or, where it is JSON, as that."""


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands before and after a result's text."""

    before: tuple[Part | Slot, ...]
    after: tuple[Part | Slot, ...]


@dataclass(frozen=True, slots=True)
class Turn:
    """What stands around the results of all calls of a turn: from the id that ended the model's turn, which
    stays, up to where its next turn begins."""

    before: tuple[Part, ...] = ()
    after: tuple[Part, ...] = ()


@dataclass(frozen=True, slots=True)
class Markup:
    """The tags of blocks and the frames of results.

    - ``start``, ``end``: the texts that open and close a block. The first ``start`` in generated text opens,
      the next ``end`` closes; a ``start`` inside a block is part of its code. Without an ``end`` (None) only
      a closing token closes.
    - ``at_line_start``: both count only where a line begins (fences). The place where generation starts
      counts as the start of a line, unless the prompt ends inside an open block.
    - ``at_turn_start``: ``start`` counts only where the model's turn begins (where generation starts, and behind
      the results of a turn), whitespace aside, and is itself part of what the block holds.
    - ``inline``: the frame where neither the code nor the result has a newline, or None to use ``block``
      always. ``block``: the frame otherwise.
    - ``closing_tokens``: added tokens (end-of-turn ids such as ``<|eom_id|>``) that close an open block in
      place of ``end``; they then end the turn, not the row.
    - ``inject_empty``: inject a result also for a block that shows nothing.
    - ``holds``: what stands in a block (:data:`midstream.call_text.Holds`): code for the sandbox, or calls of tools.
    - ``payload``: how a result's text is written into its frame.
    - ``turn``: calls are not run where their block closes but where a closing token ends the turn, together,
      and their results come within these. A turn's calls are always answered.
    - ``others``: further markups whose blocks live in the same text. Use :meth:`either`.

    Raises :class:`~midstream.errors.MarkupError` where the tags cannot work.
    """

    start: str
    end: str | None
    inline: Frame | None
    block: Frame
    at_line_start: bool = False
    closing_tokens: tuple[str, ...] = ()
    inject_empty: bool = False
    at_turn_start: bool = False
    holds: Holds = "code"
    payload: Payload = "text"
    turn: Turn | None = None
    others: tuple[Markup, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.start, str) or not self.start:
            raise MarkupError(f"Markup.start={self.start!r}: must be a non-empty string")
        if self.end is not None and (not isinstance(self.end, str) or not self.end):
            raise MarkupError(f"Markup.end={self.end!r}: must be a non-empty string, or None")
        if self.start == self.end:
            raise MarkupError(f"Markup.start={self.start!r}: must differ from end")
        for name, allowed in (("holds", Holds), ("payload", Payload)):
            if getattr(self, name) not in get_args(allowed):
                raise MarkupError(
                    f"Markup.{name}={getattr(self, name)!r}: must be one of {', '.join(get_args(allowed))}"
                )
        if not self.closing_tokens and (self.end is None or self.turn is not None):
            what = "turn" if self.turn is not None else "end=None"
            raise MarkupError(f"Markup.closing_tokens=(): {what} needs a token that closes")
        if self.turn is not None and self.inline is not None:
            raise MarkupError(f"Markup.inline={self.inline!r}: results of a turn have one frame, block")
        if self.holds == "json_answer" and self.turn is None:
            raise MarkupError("Markup.holds='json_answer': only the end of a turn can tell an answer from a call")
        self._check_others()

    def _check_others(self) -> None:
        for form in self.others:
            if form.others:
                raise MarkupError("Markup.others: hold no others of their own; use Markup.either")
            if form.start in [other.start for other in self.forms if other is not form]:
                raise MarkupError(f"Markup.others: two markups have the start tag {form.start!r}")
        in_turns = {token for form in self.forms if form.turn is not None for token in form.closing_tokens}
        for form in self.forms:
            shared = in_turns.intersection(form.closing_tokens)
            if form.turn is None and shared:
                raise MarkupError(
                    f"Markup.closing_tokens={form.closing_tokens}: {min(shared)!r} ends turns in the markup beside it"
                )

    @classmethod
    def either(cls, *markups: Markup) -> Markup:
        """Several markups in one text: each block is of the one whose start tag opened it.

        >>> Markup.either(CODE_TAGS, Markup.tags("<tool>", "<answer>", holds="json")).forms[1].start
        '<tool>'
        """
        if not markups:
            raise MarkupError("Markup.either(): give at least one markup")
        first, *others = [form for markup in markups for form in markup.forms]
        return replace(first, others=tuple(others))

    @property
    def forms(self) -> tuple[Markup, ...]:
        """This markup and :attr:`others`, each alone."""
        return (replace(self, others=()), *self.others) if self.others else (self,)

    @property
    def runs_code(self) -> bool:
        """Whether a block of it may be code for the sandbox."""
        return any(form.holds in ("code", "code_or_json") for form in self.forms)

    @classmethod
    def tags(
        cls,
        start: str = "<code>",
        result: str = "<result>",
        *,
        end: str | None = None,
        result_end: str | None = None,
        special_result: bool = False,
        closing_tokens: tuple[str, ...] = (),
        inject_empty: bool = False,
        holds: Holds = "code",
    ) -> Markup:
        """A pair of tags for code (or for what else it ``holds``) and a pair for results.

        An end tag that is not given is made from its start tag: ``<code>`` gives ``</code>``, ``<|code|>``
        gives ``<|/code|>``. ``special_result``: the result's tags are added tokens of the vocabulary,
        to be injected as their ids.

        >>> Markup.tags("<python>", "<output>").end
        '</python>'
        """
        opening: Part = Special(result) if special_result else result
        closing_text = result_end if result_end is not None else _closing(result, "result")
        closing: Part = Special(closing_text) if special_result else closing_text
        return cls(
            start=start,
            end=end if end is not None else _closing(start, "start"),
            inline=Frame((opening,), (closing,)),
            block=Frame(("\n\n", opening, "\n"), ("\n", closing)),
            closing_tokens=closing_tokens,
            inject_empty=inject_empty,
            holds=holds,
        )

    @classmethod
    def fenced(cls, language: str = "python", output: str = "output", *, inject_empty: bool = False) -> Markup:
        """Markdown fences: code in ```` ```python ````, its result in ```` ```output ````."""
        frame = Frame((f"\n```{output}\n",), ("\n```\n",))
        return cls(
            start=f"```{language}\n",
            end="```",
            inline=None,
            block=frame,
            at_line_start=True,
            inject_empty=inject_empty,
        )

    @property
    def special_texts(self) -> tuple[str, ...]:
        """The texts of the special tokens that results hold, each once."""
        return tuple(dict.fromkeys(part.text for part in self._parts() if isinstance(part, Special)))

    @property
    def required_texts(self) -> tuple[str, ...]:
        """Those of them without which it cannot be used."""
        required = (part.text for part in self._parts() if isinstance(part, Special) and part.required)
        return tuple(dict.fromkeys(required))

    def _parts(self) -> Iterator[Part | Slot]:
        for form in self.forms:
            for frame in (form.inline, form.block, form.turn):
                if frame is not None:
                    yield from (*frame.before, *frame.after)

    def render(self, code: str, text: str, *, name: str = "", call_id: str = "") -> tuple[Part, ...]:
        """The result of ``code`` that shows ``text``, as parts in order; adjacent texts are joined.

        ``name`` and ``call_id`` fill the frame's slots. What surrounds all results of a turn is not in it.
        """
        inline = self.inline if "\n" not in code and "\n" not in text else None
        frame = inline or self.block
        slots = {"name": name, "id": call_id}
        filled = [
            self._written_slot(slots[part.holds]) if isinstance(part, Slot) else part
            for part in (*frame.before, self._written(text), *frame.after)
        ]
        return join_texts(filled)

    def _written(self, text: str) -> str:
        match self.payload:
            case "text":
                return text
            case "string":
                return json.dumps(text, ensure_ascii=False)
            case "value":
                return _as_json(text)

    def _written_slot(self, text: str) -> str:
        return text if self.payload == "text" else json.dumps(text, ensure_ascii=False)


def _as_json(text: str) -> str:
    """A text that is JSON already, written anew; any other as a JSON string."""

    def finite(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise ValueError(digits)
        return value

    try:
        return json.dumps(json.loads(text, parse_float=finite, parse_constant=finite), ensure_ascii=False)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)


def _closing(tag: str, name: str) -> str:
    for opening in ("<|", "<", "["):
        if tag.startswith(opening) and len(tag) > len(opening):
            return f"{opening}/{tag[len(opening) :]}"
    raise MarkupError(f"Markup.tags({name}={tag!r}): give its end tag too; it can only be made from <…>, <|…|> or […]")


def trim_lookahead(parts: tuple[Part, ...], lookahead: str) -> tuple[Part, ...]:
    """Leave out of a rendered result what the model already wrote of it.

    If the result's text starts with ``lookahead`` (what the closing token holds after the end tag), that
    part is dropped; otherwise nothing is.
    """
    if not lookahead or not parts or not isinstance(parts[0], str) or not parts[0].startswith(lookahead):
        return parts
    rest = parts[0][len(lookahead) :]
    return (rest, *parts[1:]) if rest else parts[1:]


def join_texts(parts: Iterable[Part]) -> tuple[Part, ...]:
    """The same parts with adjacent texts joined and empty ones left out."""
    joined: list[Part] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        elif part != "":
            joined.append(part)
    return tuple(joined)


def text_of(parts: tuple[Part, ...]) -> str:
    """A rendered result as one text, special tokens by theirs."""
    return "".join(part if isinstance(part, str) else part.text for part in parts)


CODE_TAGS = Markup.tags("<code>", "<result>")
"""``<code>x + y</code>`` answered by ``<result>7</result>``."""

FENCED_PYTHON = Markup.fenced("python", "output")
"""A ```` ```python ```` fence answered by an ```` ```output ```` fence."""
