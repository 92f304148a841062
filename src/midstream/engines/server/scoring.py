"""Texts that are scored: what a server says of ids that it is given, by ``POST /v1/completions`` with ``echo``.

The answer is OpenAI's, as vLLM 0.32 gives it: the logprobs of all ids of the prompt, None for the first, and of those
that were sampled behind it. Servers that do not know ``echo`` answer all the same, with what they sampled alone. That
would be taken for scores, so each answer is held to the number of its ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from midstream.engines.server.asks import Lacking, refuse_errors

PATH = "/v1/completions"


@dataclass(frozen=True, slots=True)
class Scored:
    """What a server said of one prompt. ``choice``: as it came. The others count ids, as the server does."""

    choice: dict[str, Any]
    prompt_tokens: int
    completion_tokens: int


def score_body(model: str | None, prompt: str | Sequence[int], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The request for one prompt, with ``fields`` as they are."""
    named = {} if model is None else {"model": model}
    return {**fields, **named, "prompt": prompt if isinstance(prompt, str) else list(prompt), "echo": True}


def read_scored(answer: Any, prompt: str | Sequence[int], most: int) -> Scored:
    """Raises :class:`Lacking` for an answer that does not score the prompt; it may have ``most`` ids behind it."""
    refuse_errors(answer)
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise Lacking("choices")
    usage = answer.get("usage")
    prompt_tokens, completion_tokens = (_count(usage, name, "usage") for name in ("prompt_tokens", "completion_tokens"))
    if not isinstance(prompt, str) and prompt_tokens != len(prompt):
        raise Lacking(f"scores of the ids that were given: they are {len(prompt)}, and it counts {prompt_tokens}")
    logprobs = choices[0].get("logprobs")
    found = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    if not isinstance(found, list):
        raise Lacking("logprobs (choices[0].logprobs.token_logprobs)")
    if not prompt_tokens <= len(found) <= prompt_tokens + most or found[:1] not in ([], [None]):
        raise Lacking(
            f"logprobs of the prompt: it has {len(found)} for a prompt of {prompt_tokens} ids, so this server does not "
            "know echo"
        )
    return Scored(choices[0], prompt_tokens, completion_tokens)


def _count(counts: Any, name: str, place: str) -> int:
    found = counts.get(name) if isinstance(counts, dict) else None
    if not isinstance(found, int) or isinstance(found, bool) or found < 0:
        raise Lacking(f"count of ids ({place}.{name})")
    return found
