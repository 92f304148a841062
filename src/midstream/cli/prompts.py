"""Prompts from JSON Lines: one prompt a line."""

from __future__ import annotations

import codecs
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec

from midstream.errors import ConfigurationError, PromptError
from midstream.records.schema import explain
from midstream.types import Limits, Prompt


class _LimitsLine(msgspec.Struct, forbid_unknown_fields=True):
    """Limits of one prompt: what is given goes before the command line's."""

    max_new_tokens: int | msgspec.UnsetType | None = msgspec.UNSET
    max_total_tokens: int | msgspec.UnsetType | None = msgspec.UNSET
    max_tool_calls: int | msgspec.UnsetType | None = msgspec.UNSET
    at_tool_call_limit: Literal["tell", "stop"] | msgspec.UnsetType = msgspec.UNSET
    max_result_tokens: int | msgspec.UnsetType = msgspec.UNSET
    max_result_characters: int | msgspec.UnsetType = msgspec.UNSET
    reserve_tokens: int | msgspec.UnsetType = msgspec.UNSET
    count_injected: bool | msgspec.UnsetType = msgspec.UNSET
    time_limit: float | msgspec.UnsetType | None = msgspec.UNSET
    stop_strings: list[str] | msgspec.UnsetType = msgspec.UNSET
    stop_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    ignore_eos: bool | msgspec.UnsetType = msgspec.UNSET


class _PromptLine(msgspec.Struct, forbid_unknown_fields=True):
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    ids: list[int] | None = None
    id: str | int | None = None
    group: str | int | None = None
    metadata: dict[str, Any] = {}
    seed: int | None = None
    limits: _LimitsLine | None = None
    open_block: bool = False


FIELDS = ", ".join(_PromptLine.__struct_fields__)


@dataclass(frozen=True, slots=True)
class PromptOfFile:
    """A prompt, which has an id, and where it stands (``prompts.jsonl:3``)."""

    prompt: Prompt
    place: str


def read_prompts(path: str, limits: Limits) -> list[PromptOfFile]:
    """The prompts of a file. A prompt without an id gets the number of its line, from 0.

    Raises :class:`~midstream.errors.PromptError`, naming file, line and field, for anything that is no prompt.
    """
    prompts: list[PromptOfFile] = []
    places: dict[str, str] = {}
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                place = f"{path}:{number}"
                prompt = _prompt(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, place, limits)
                if prompt.id is None:
                    prompt = replace(prompt, id=str(number - 1))
                first = places.setdefault(str(prompt.id), place)
                if first != place:
                    raise PromptError(f"{place}: id {prompt.id!r} is that of {first} already")
                prompts.append(PromptOfFile(prompt, place))
    except OSError as error:
        raise PromptError(f"{path}: cannot be read ({error.strerror})") from error
    if not prompts:
        raise PromptError(f"{path}: is empty; it must hold a prompt a line, as JSON")
    return prompts


def _prompt(line: bytes, place: str, limits: Limits) -> Prompt:
    if not line.strip():
        raise PromptError(f"{place}: the line is empty; each line must be a prompt, as JSON")
    try:
        given = msgspec.json.decode(line, type=_PromptLine)
        own = msgspec.to_builtins(given.limits) if given.limits is not None else None
        return Prompt(
            ids=None if given.ids is None else tuple(given.ids),
            text=given.text,
            messages=None if given.messages is None else tuple(given.messages),  # type: ignore[arg-type]  # mappings too
            id=None if given.id is None else str(given.id),
            group=None if given.group is None else str(given.group),
            metadata=given.metadata,
            seed=given.seed,
            limits=None if own is None else replace(limits, **own),
            open_block=given.open_block,
        )
    except msgspec.ValidationError as error:
        message = explain(error)
        hint = f" (a prompt's fields are {FIELDS})" if "unknown field" in message else ""
        raise PromptError(f"{place}: {message}{hint}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise PromptError(f"{place}: not JSON: {error}") from error
    except RecursionError as error:
        raise PromptError(f"{place}: nested too deeply") from error
    except ConfigurationError as error:
        raise PromptError(f"{place}: {error}") from error
