"""Bodies of requests: what may stand in them, and what rows they ask for.

The fields are those of OpenAI's ``POST /v1/completions`` and ``POST /v1/chat/completions``. One that cannot be
honoured is refused by its name, unless its value asks for what happens anyway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import msgspec

from midstream.errors import MidstreamError
from midstream.records.schema import explain
from midstream.serve.refusals import Refused, bad_field
from midstream.types import Limits, Message, Prompt, Sampling

MOST_STOPS = 16
"""Stop strings of a request."""


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool = False
    include_obfuscation: bool = False


class Extension(msgspec.Struct, forbid_unknown_fields=True):
    """The field ``midstream``, which is not OpenAI's.

    ``session``: names the interpreter that the client's earlier requests with this name left behind. ``include``: what
    the answer is to have besides. ``max_tool_calls``: blocks that are run.
    """

    session: Annotated[str, msgspec.Meta(min_length=1, max_length=128)] | None = None
    include: list[Literal["ids"]] = []
    max_tool_calls: Annotated[int, msgspec.Meta(ge=0)] | None = None


_Count = Annotated[int, msgspec.Meta(ge=1)]
_COMMON: dict[str, Any] = {
    "model": str,
    "max_tokens": _Count,
    "n": _Count,
    "temperature": Annotated[float, msgspec.Meta(ge=0, le=100)],
    "top_p": Annotated[float, msgspec.Meta(gt=0, le=1)],
    "top_k": Annotated[int, msgspec.Meta(ge=-1)],
    "min_p": Annotated[float, msgspec.Meta(ge=0, lt=1)],
    "seed": int,
    "stop": str | list[str],
    "stream": bool,
    "stream_options": StreamOptions,
    "user": str,
    "metadata": dict[str, str],
    "midstream": Extension,
}
CHAT: dict[str, Any] = {
    **_COMMON,
    "messages": Annotated[list[dict[str, Any]], msgspec.Meta(min_length=1)],
    "max_completion_tokens": _Count,
    "logprobs": bool,
    "top_logprobs": Annotated[int, msgspec.Meta(ge=0)],
}
COMPLETIONS: dict[str, Any] = {
    **_COMMON,
    "prompt": str | list[Any],
    "max_tokens": Annotated[int, msgspec.Meta(ge=0)],
    "logprobs": Annotated[int, msgspec.Meta(ge=0)],
    "echo": bool,
}
"""The fields that a request may have, and their types; null is as if the field were not there."""

_TOOLS = "the model's calls are run here, with the server's own tools; a client's tools cannot be called mid-answer"
_ANYWAY: dict[str, tuple[tuple[Any, ...], str]] = {
    "frequency_penalty": ((0,), "penalties are not supported; leave it out, or give 0"),
    "presence_penalty": ((0,), "penalties are not supported; leave it out, or give 0"),
    "repetition_penalty": ((1,), "penalties are not supported; leave it out, or give 1"),
    "logit_bias": (({},), "is not supported; leave it out"),
    "suffix": (("",), "text is generated at the end alone; leave it out"),
    "echo": ((False,), "chats are not scored; leave it out"),
    "best_of": ((1,), "is not supported; ask for n answers"),
    "response_format": (({"type": "text"},), "answers are text; leave it out"),
    "tools": (([],), _TOOLS),
    "tool_choice": (("none", "auto"), _TOOLS),
    "parallel_tool_calls": ((True, False), _TOOLS),
    "functions": (([],), _TOOLS),
    "function_call": (("none", "auto"), _TOOLS),
    "store": ((False,), "answers are not kept for clients; leave it out"),
    "modalities": ((["text"],), "answers are text; leave it out"),
    "service_tier": (("auto", "default"), "there is one tier; leave it out"),
}
"""Known fields that are not supported, with the values that ask for nothing."""

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks for: ``n`` rows of each of ``prompts``, which have neither ids nor limits yet."""

    chat: bool
    prompts: tuple[Prompt, ...]
    n: int
    limits: Limits
    sampling: Sampling
    seed: int | None
    stream: bool
    include_usage: bool
    logprobs: bool
    include_ids: bool
    session: str | None
    model: str | None
    metadata: Mapping[str, Any]

    @property
    def rows(self) -> int:
        return len(self.prompts) * self.n


@dataclass(frozen=True, slots=True)
class ToScore:
    """Texts whose logprobs are asked for. ``fields``: those of the request that are for the server that scores them."""

    prompts: tuple[Prompt, ...]
    fields: Mapping[str, Any]
    model: str | None

    @property
    def max_tokens(self) -> int:
        """Ids that are sampled behind each: one, or none."""
        found: int = self.fields["max_tokens"]
        return found


def read_request(body: bytes, *, chat: bool, limits: Limits, sampling: Sampling) -> Asked | ToScore:
    """What ``body`` asks for, within the server's ``limits``; ``sampling`` is what it does not say.

    Raises :class:`Refused`, naming the field, for what cannot be.
    """
    fields = _fields(body, CHAT if chat else COMPLETIONS)
    if fields.get("echo"):
        return _to_score(fields)
    stream = fields.get("stream", False)
    if "stream_options" in fields and not stream:
        raise bad_field("stream_options", "is for stream=true alone")
    extension: Extension = fields.get("midstream") or Extension()
    if fields.get("top_logprobs"):
        raise bad_field("top_logprobs", "logprobs are of the sampled tokens alone; leave it out, or give 0")
    logprobs = fields.get("logprobs", False if chat else None)
    if not chat and logprobs:
        raise bad_field("logprobs", f"{logprobs} alternatives are not to be had; 0 gives those of the sampled tokens")
    asked = Asked(
        chat=chat,
        prompts=(_chat(fields),) if chat else _prompts(fields),
        n=fields.get("n", 1),
        limits=_limits(fields, extension, limits),
        sampling=_sampling(fields, sampling),
        seed=fields.get("seed"),
        stream=stream,
        include_usage=stream and fields.get("stream_options", StreamOptions()).include_usage,
        logprobs=bool(logprobs) if chat else logprobs is not None,
        include_ids="ids" in extension.include,
        session=extension.session,
        model=fields.get("model"),
        metadata={name: fields[name] for name in ("user", "metadata") if name in fields},
    )
    if asked.session is not None and asked.rows != 1:
        raise bad_field("midstream.session", f"takes one answer at a time; this request asks for {asked.rows}")
    return asked


_SCORED = ("max_tokens", "logprobs", "temperature", "top_p", "top_k", "min_p", "seed", "stop")


def _to_score(fields: Mapping[str, Any]) -> ToScore:
    if fields.get("max_tokens") not in (0, 1) or "logprobs" not in fields:
        message = (
            "gives the logprobs of texts, for max_tokens 0 or 1 and logprobs; answers never begin with their prompt"
        )
        raise bad_field("echo", message, "unsupported_parameter")
    for name in ("stream", "midstream"):
        if fields.get(name):
            raise bad_field(name, "scores (echo) come whole, and nothing is run for them", "unsupported_parameter")
    if fields.get("n", 1) != 1:
        raise bad_field("n", f"{fields['n']} scores of one text would be the same; give 1", "invalid_value")
    given = {name: fields[name] for name in _SCORED if name in fields}
    return ToScore(_prompts(fields), given, fields.get("model"))


def _fields(body: bytes, known: Mapping[str, Any]) -> dict[str, Any]:
    try:
        given = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(400, f"the body is no JSON: {error}") from error
    if not isinstance(given, dict):
        raise Refused(400, "the body must be a JSON object")
    fields = {}
    for name, value in given.items():
        if value is None:
            continue
        if name in known:
            fields[name] = _converted(name, value, known[name])
        elif name not in _ANYWAY:
            raise bad_field(name, "this field is not known here", "unknown_parameter")
        elif value not in _ANYWAY[name][0]:
            raise bad_field(name, _ANYWAY[name][1], "unsupported_parameter")
    return fields


def _converted(name: str, value: Any, kind: Any) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise bad_field(name, explain(error), "invalid_value") from error


# --- prompts


def _chat(fields: Mapping[str, Any]) -> Prompt:
    if "messages" not in fields:
        raise bad_field("messages", "is required", "missing_required_parameter")
    return Prompt(messages=tuple(_message(f"messages[{place}]", item) for place, item in enumerate(fields["messages"])))


def _message(place: str, item: Mapping[str, Any]) -> Message:
    given = {name: value for name, value in item.items() if value is not None}
    unknown = sorted(set(given) - {"role", "content"})
    if unknown:
        raise bad_field(f"{place}.{unknown[0]}", "a message has just role and content here", "unsupported_parameter")
    named = given.get("role")
    role = _ROLES.get(named) if isinstance(named, str) else None
    if role is None:
        raise bad_field(f"{place}.role", f"{named!r} is none of {', '.join(_ROLES)}", "invalid_value")
    return Message(role, _content(f"{place}.content", given.get("content")))  # type: ignore[arg-type]  # one of theirs


def _content(place: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_field(place, "must be a text, or a list of parts", "invalid_value")
    texts = []
    for number, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise bad_field(f"{place}[{number}]", 'must be {"type": "text", "text": ...}', "invalid_value")
        texts.append(part["text"])
    return "".join(texts)


def _prompts(fields: Mapping[str, Any]) -> tuple[Prompt, ...]:
    given = fields.get("prompt")
    if given is None:
        raise bad_field("prompt", "is required", "missing_required_parameter")
    if isinstance(given, str):
        return (Prompt(text=given),)
    if given and all(_is_id(item) for item in given):
        return (Prompt(ids=tuple(given)),)
    if given and all(isinstance(item, str) for item in given):
        return tuple(Prompt(text=item) for item in given)
    if given and all(isinstance(item, list) and item and all(map(_is_id, item)) for item in given):
        return tuple(Prompt(ids=tuple(item)) for item in given)
    raise bad_field("prompt", "must be a text, a list of texts, token ids, or a list of lists of them", "invalid_value")


def _is_id(item: Any) -> bool:
    return isinstance(item, int) and not isinstance(item, bool)


# --- limits and sampling


def _limits(fields: Mapping[str, Any], extension: Extension, limits: Limits) -> Limits:
    if "max_tokens" in fields and "max_completion_tokens" in fields:
        raise bad_field("max_tokens", "means the same as max_completion_tokens; give one of them", "invalid_value")
    stop = fields.get("stop", [])
    stops: Sequence[str] = [stop] if isinstance(stop, str) else stop
    if len(stops) > MOST_STOPS:
        raise bad_field("stop", f"has {len(stops)} strings; {MOST_STOPS} are the most", "invalid_value")
    if "" in stops:
        raise bad_field("stop", "holds an empty string", "invalid_value")
    most = fields.get("max_tokens", fields.get("max_completion_tokens"))
    if most == 0:
        raise bad_field("max_tokens", "is 0, which is for scores (echo) alone; give at least 1", "invalid_value")
    return replace(
        limits,
        max_new_tokens=_least(most, limits.max_new_tokens),
        max_tool_calls=_least(extension.max_tool_calls, limits.max_tool_calls),
        stop_strings=(*limits.stop_strings, *stops),
    )


def _least(asked: int | None, most: int | None) -> int | None:
    return min((value for value in (asked, most) if value is not None), default=None)


def _sampling(fields: Mapping[str, Any], sampling: Sampling) -> Sampling:
    given = {name: fields[name] for name in ("temperature", "top_p", "min_p") if name in fields}
    if "top_k" in fields:
        given["top_k"] = max(0, fields["top_k"])  # -1 is another word for all of them
    try:
        return replace(sampling, **given)
    except MidstreamError as error:
        raise bad_field(next(iter(given)), str(error), "invalid_value") from error
