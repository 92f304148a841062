"""The markups of models that call tools in JSON, family by family.

Each says how a family writes its calls, which id ends its turn, and how its own chat template shows results:
the ids of a row are then those that the family's template gives for the same conversation, without any part
of the row being rendered again. docs/markups.md has each format, and where a template is not exact.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from midstream.errors import MarkupError
from midstream.markup import CODE_TAGS, FENCED_PYTHON, Frame, Markup, Payload, Slot, Special, Turn

_IM_START, _IM_END = Special("<|im_start|>"), Special("<|im_end|>")
_RESPONSE, _RESPONSE_END = Special("<tool_response>", required=False), Special("</tool_response>", required=False)
_THINK, _THINK_END = Special("<think>", required=False), Special("</think>", required=False)


def qwen_tool_calls(*, thinking: bool = True) -> Markup:
    """Qwen 2.5's and Qwen 3's: ``<tool_call>{…}</tool_call>``, answered by one turn of the user's.

    ``thinking``: off, each turn of the model's begins with an empty thought, as Qwen 3's template writes it
    with ``enable_thinking=False``.
    """
    empty_thought = () if thinking else (_THINK, "\n\n", _THINK_END, "\n\n")
    return Markup(
        start="<tool_call>",
        end="</tool_call>",
        inline=None,
        block=Frame(("\n", _RESPONSE, "\n"), ("\n", _RESPONSE_END)),
        closing_tokens=("<|im_end|>",),
        holds="json",
        turn=Turn(
            ("\n", _IM_START, "user"),
            (_IM_END, "\n", _IM_START, "assistant\n", *empty_thought),
        ),
    )


def hermes_tool_calls() -> Markup:
    """Hermes 2 Pro and 3: as Qwen's, answered by a turn of the tool's, each result with its tool's name."""
    return Markup(
        start="<tool_call>",
        end="</tool_call>",
        inline=None,
        block=Frame(
            (_RESPONSE, '\n{"name": ', Slot("name"), ', "content": '),
            ("}\n", _RESPONSE_END, "\n"),
        ),
        closing_tokens=("<|im_end|>",),
        holds="json",
        payload="value",
        turn=Turn(("\n", _IM_START, "tool\n"), (_IM_END, "\n", _IM_START, "assistant\n")),
    )


def llama3_tool_calls(*, payload: Payload = "text") -> Markup:
    """Llama 3.1's to 3.3's: a turn that is a call in JSON, or what stands behind ``<|python_tag|>``.

    Behind the tag comes JSON, ``name.call(query="…")``, or Python, which runs in the sandbox. Each result is
    a turn of ``ipython``. ``payload``: ``"text"`` is Meta's own format; the templates on the Hugging Face hub
    write a result that is a text as a JSON string (``"string"``).
    """
    header, header_end = Special("<|start_header_id|>"), Special("<|end_header_id|>")
    answer = Markup(
        start="{",
        end=None,
        inline=None,
        block=Frame((header, "ipython", header_end, "\n\n"), (Special("<|eot_id|>"),)),
        at_turn_start=True,
        closing_tokens=("<|eot_id|>", "<|eom_id|>"),
        holds="json_answer",
        payload=payload,
        turn=Turn((), (header, "assistant", header_end, "\n\n")),
    )
    tagged = replace(answer, start="<|python_tag|>", at_turn_start=False, holds="code_or_json")
    return Markup.either(tagged, answer)


def mistral_tool_calls(version: Literal[3, 7, 11, 13], *, sentencepiece: bool = False) -> Markup:
    """Mistral's, by the version of its tokenizer (mistral-common has it; so does ``tekken.json``).

    - 3: ``[TOOL_CALLS][{…}, {…}]``; results as JSON with the call's id. 7: the same; results as text behind
      ``id[TOOL_CONTENT]``.
    - 11: ``[TOOL_CALLS]name[CALL_ID]id[ARGS]{…}`` for each call; results as those of 7. 13: no ids.

    ``sentencepiece``: of versions 3 and 7, the tokenizer is a SentencePiece model, with which a space stands
    behind each special token.
    """
    if version not in (3, 7, 11, 13):
        raise MarkupError(f"version={version!r}: must be 3, 7, 11 or 13")
    if sentencepiece and version > 7:
        raise MarkupError(f"sentencepiece=True: version {version} has no SentencePiece model")
    space = " " if sentencepiece else ""
    opening, closing = Special("[TOOL_RESULTS]"), Special("[/TOOL_RESULTS]")
    if version == 3:
        frame = Frame((opening, space + '{"content": '), (', "call_id": ', Slot("id"), "}", closing))
    elif version == 13:
        frame = Frame((opening,), (closing,))
    else:
        frame = Frame((opening, space, Slot("id"), Special("[TOOL_CONTENT]"), space), (closing,))
    return Markup(
        start="[TOOL_CALLS]",
        end=None,
        inline=None,
        block=frame,
        closing_tokens=("</s>",),
        holds="json" if version <= 7 else "named",
        payload="value" if version == 3 else "text",
        turn=Turn(),
    )


QWEN_TOOL_CALLS = qwen_tool_calls()
"""``<tool_call>{"name": …, "arguments": …}</tool_call>``, answered in ``<tool_response>``."""

HERMES_TOOL_CALLS = hermes_tool_calls()
"""The same calls, answered by the role ``tool``."""

LLAMA3_TOOL_CALLS = llama3_tool_calls()
"""``{"name": …, "parameters": …}`` as a turn, answered by the role ``ipython``."""

MISTRAL_TOOL_CALLS = mistral_tool_calls(13)
"""``[TOOL_CALLS]name[ARGS]{…}``, answered in ``[TOOL_RESULTS]…[/TOOL_RESULTS]``."""

NAMED: dict[str, Markup] = {
    "code": CODE_TAGS,
    "fenced": FENCED_PYTHON,
    "qwen": QWEN_TOOL_CALLS,
    "qwen-nothink": qwen_tool_calls(thinking=False),
    "hermes": HERMES_TOOL_CALLS,
    "llama3": LLAMA3_TOOL_CALLS,
    "mistral": MISTRAL_TOOL_CALLS,
    "mistral3": mistral_tool_calls(3),
    "mistral3-sentencepiece": mistral_tool_calls(3, sentencepiece=True),
    "mistral7": mistral_tool_calls(7),
    "mistral7-sentencepiece": mistral_tool_calls(7, sentencepiece=True),
    "mistral11": mistral_tool_calls(11),
}
"""The markups that have a name, for the command line and for settings."""


def named_markup(name: str) -> Markup:
    """A markup by its name in :data:`NAMED`; ``"code+qwen"`` is both in one text; any other name is a tag.

    >>> named_markup("<python>").end
    '</python>'

    Raises :class:`~midstream.errors.MarkupError` where it is neither.
    """
    if name in NAMED:
        return NAMED[name]
    if "+" in name:
        return Markup.either(*(named_markup(part) for part in name.split("+")))
    try:
        return Markup.tags(name)
    except MarkupError as error:
        raise MarkupError(f"markup={name!r}: no tag, and none of {', '.join(NAMED)} ({error})") from None
