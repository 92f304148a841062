"""What may be given as a prompt, and what it must be before a row can start from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from midstream.errors import CapabilityError, ConfigurationError, PromptError
from midstream.types import Prompt, Trajectory

PromptLike = Prompt | str | Mapping[str, Any]
"""A prompt; a text; or a mapping of a :class:`~midstream.types.Prompt`'s fields."""


def named_prompts(prompts: Sequence[PromptLike | Trajectory], *, media: bool) -> list[Prompt | Trajectory]:
    """Prompts that all have an id, by default their place, and paused trajectories as they are.

    ``media``: whether the engine takes images. Raises :class:`ConfigurationError` where these are no prompts, or
    a trajectory is none that can be gone on with.
    """
    if isinstance(prompts, str | Mapping | Prompt | Trajectory):
        raise ConfigurationError("prompts: must be a sequence of prompts, not one")
    if not isinstance(prompts, Iterable):
        raise ConfigurationError(f"prompts={prompts!r}: must be a sequence of prompts")
    named: list[Prompt | Trajectory] = []
    taken: set[str] = set()
    for place, item in enumerate(prompts):
        if isinstance(item, Trajectory):
            if not item.stop.resumable:
                raise ConfigurationError(f"prompts[{place}]: this trajectory has stopped ({item.stop})")
            named.append(item)
            continue
        prompt = as_prompt(item)
        prompt = prompt if prompt.id is not None else replace(prompt, id=str(place))
        if prompt.id in taken:
            raise PromptError(f"prompts[{place}].id={prompt.id!r}: another prompt has this id")
        taken.add(str(prompt.id))
        if prompt.media and not media:
            raise CapabilityError(f"prompts[{place}].media: this engine takes no images")
        named.append(prompt)
    return named


def as_prompt(item: PromptLike) -> Prompt:
    """A prompt from a text or a mapping of its fields. Raises :class:`PromptError` naming a bad field."""
    if isinstance(item, Prompt):
        return item
    if isinstance(item, str):
        return Prompt(text=item)
    if not isinstance(item, Mapping):
        raise PromptError(f"prompt={item!r}: must be a Prompt, a text, or a mapping of a prompt's fields")
    unknown = sorted(set(item) - set(Prompt.__dataclass_fields__), key=str)
    if unknown:
        known = ", ".join(Prompt.__dataclass_fields__)
        raise PromptError(f"prompt: unknown field {unknown[0]!r}; the fields are {known}")
    return Prompt(**item)
