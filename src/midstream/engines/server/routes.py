"""The routes of servers: how each is asked, and how its answers read.

Shapes are those of vLLM 0.32 (``vllm/entrypoints/openai/completion/protocol.py`` and
``vllm/entrypoints/scale_out/token_in_token_out/protocol.py``) and of SGLang's ``GenerateReqInput`` and
``SamplingParams``. Every field that a server could fill from a model's generation config is sent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

from midstream.decoding import decode
from midstream.engines.server.asks import Ask, Fault, FaultKind, Finish, Lacking, Piece, finish_of, refuse_errors
from midstream.types import Sampling
from midstream.vocabulary import Vocabulary


class Reader(Protocol):
    """Reads one answer, event by event."""

    def read(self, event: Any) -> list[Piece]:
        """The pieces of an event. Raises :class:`Fault` for an error in it, :class:`Lacking` for what it lacks."""


class Route(Protocol):
    """``seeded``: a request with the same ids and seed gets the same answer. ``exact``: ids and logprobs come back."""

    path: str
    seeded: bool
    exact: bool

    def body(self, ask: Ask) -> dict[str, Any]: ...
    def reader(self, ask: Ask) -> Reader: ...


class VLLMCompletions:
    """vLLM's ``POST /v1/completions``, with ids as the prompt and ``return_token_ids``."""

    path = "/v1/completions"
    seeded = True
    exact = True

    def __init__(self, model: str | None) -> None:
        self._model = model

    def body(self, ask: Ask) -> dict[str, Any]:
        sampling = ask.sampling
        body = {
            "prompt": list(ask.ids),
            "max_tokens": ask.most,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            **_NO_PENALTIES,
            "logprobs": ask.alternatives,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "stop": list(ask.stop_strings),
            "stop_token_ids": list(ask.stop_ids),
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,  # else a stop string made of special tokens is never seen
            "spaces_between_special_tokens": False,
            "stream": ask.stream,
        }
        return body | _optional(model=self._model, seed=ask.seed)

    def reader(self, ask: Ask) -> Reader:
        return _CompletionsReader(ask)


class _CompletionsReader:
    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    def read(self, event: Any) -> list[Piece]:
        choice = _choice(event)
        if choice is None:
            return []
        echoed = choice.get("prompt_token_ids")
        if echoed is not None and tuple(echoed) != self._ask.ids:
            raise Fault(FaultKind.FINAL, "the server answered to other prompt ids than it was given")
        reason, cause = choice.get("finish_reason"), choice.get("stop_reason")
        if not choice.get("token_ids") and not choice.get("text") and reason is not None:
            return [Piece(finish=finish_of(self._ask, reason, cause, None))]
        found = choice.get("logprobs")
        logprobs = found if isinstance(found, dict) else {}
        ids = choice.get("token_ids")
        if ids is None:  # before vLLM 0.10.2 they are in the names of the tokens alone
            ids = _ids_in_names(logprobs.get("tokens"))
        if ids is None:
            raise Lacking("token ids (choices[0].token_ids, which vLLM gives for return_token_ids)")
        values = logprobs.get("token_logprobs")
        if values is None:
            raise Lacking("logprobs (choices[0].logprobs.token_logprobs)")
        alternatives = logprobs.get("top_logprobs") or [None]
        return [
            Piece(
                _ids(ids),
                _logprobs(values, len(ids)),
                _text(choice),
                finish_of(self._ask, reason, cause, _last(ids)),
                likeliest=_falling((alternatives[0] or {}).values()) if self._ask.alternatives else (),
            )
        ]


class VLLMGenerate:
    """vLLM's ``POST /inference/v1/generate``: ids in, ids out, no text."""

    path = "/inference/v1/generate"
    seeded = True
    exact = True

    def __init__(self, model: str | None) -> None:
        self._model = model

    def body(self, ask: Ask) -> dict[str, Any]:
        sampling = ask.sampling
        params = {
            "max_tokens": ask.most,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            **_NO_PENALTIES,
            "logprobs": ask.alternatives,
            "stop": list(ask.stop_strings),
            "stop_token_ids": list(ask.stop_ids),
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
        }
        body = {"token_ids": list(ask.ids), "sampling_params": params | _optional(seed=ask.seed), "stream": ask.stream}
        return body | _optional(model=self._model)

    def reader(self, ask: Ask) -> Reader:
        return _GenerateReader(ask)


class _GenerateReader:
    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    def read(self, event: Any) -> list[Piece]:
        choice = _choice(event)
        if choice is None:
            return []
        reason, cause = choice.get("finish_reason"), choice.get("stop_reason")
        ids = choice.get("token_ids")
        if ids is None:
            raise Lacking("token ids (choices[0].token_ids)")
        if not ids:
            return [Piece(finish=finish_of(self._ask, reason, cause, None))]
        content = (choice.get("logprobs") or {}).get("content")
        if content is None:
            raise Lacking("logprobs (choices[0].logprobs.content)")
        logprobs = _logprobs([entry["logprob"] for entry in content], len(ids))
        if self._ask.alternatives:
            likeliest = _falling(entry["logprob"] for entry in content[0].get("top_logprobs", ()))
        else:
            likeliest = ()
        finish = finish_of(self._ask, reason, cause, _last(ids))
        spans = [(_number(span["version"]), span["start"], span["end"]) for span in choice.get("weight_versions") or ()]
        if self._ask.stream:
            self._check_versions(version for version, _, _ in spans)
            spans = spans[-1:]
        whole = _ids(ids)
        if len(spans) < 2:
            return [Piece(whole, logprobs, None, finish, spans[0][0] if spans else None, likeliest)]
        parts = [Piece(whole[start:end], logprobs[start:end], None, None, version) for version, start, end in spans]
        return [*parts[:-1], Piece(parts[-1].ids, parts[-1].logprobs, None, finish, parts[-1].version)]

    def _check_versions(self, versions: Any) -> None:
        """A stream tells the versions of its weights at its end, when its ids have their numbers already."""
        given = self._ask.weight_version
        for version in versions:
            if None not in (given, version) and version != given:
                raise Fault(
                    FaultKind.FINAL,
                    f"ids that were given weight version {given} are of version {version}: set weight_version when "
                    "the server's weights change, or ask with stream=False, where each id's version is told",
                )


class SGLangGenerate:
    """SGLang's ``POST /generate``, with ``input_ids`` and ``return_logprob``.

    ``seeded``: the server runs with ``--enable-deterministic-inference``; else it does not look at seeds.
    """

    path = "/generate"
    exact = True

    def __init__(self, *, seeded: bool) -> None:
        self.seeded = seeded

    def body(self, ask: Ask) -> dict[str, Any]:
        sampling = ask.sampling
        params = {
            "max_new_tokens": ask.most,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k or -1,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            **_NO_PENALTIES,
            "stop": list(ask.stop_strings),
            "stop_token_ids": list(ask.stop_ids),
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            "no_stop_trim": True,
        }
        if self.seeded and ask.seed is not None:
            params["sampling_seed"] = ask.seed & 0x7FFFFFFF  # held in 32 bits there
        return {
            "input_ids": list(ask.ids),
            "sampling_params": params,
            "return_logprob": True,
            "logprob_start_len": -1,
            "top_logprobs_num": ask.alternatives,
            "stream": ask.stream,
        }

    def reader(self, ask: Ask) -> Reader:
        return _SGLangReader(ask)


class _SGLangReader:
    """An event of a stream holds the whole answer so far, or, where the server streams incrementally, what is new.

    ``completion_tokens`` counts the answer so far in either case, and so tells one from the other.
    """

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._known = 0
        self._told = ""

    def read(self, event: Any) -> list[Piece]:
        refuse_errors(event)
        meta = event.get("meta_info") if isinstance(event, dict) else None
        if not isinstance(meta, dict):
            raise Lacking("meta_info")
        entries = meta.get("output_token_logprobs")
        reason = meta.get("finish_reason") or {}
        if entries is None:
            raise Lacking("logprobs (meta_info.output_token_logprobs, which SGLang gives for return_logprob)")
        if reason.get("matched") == "NaN happened":
            raise Fault(FaultKind.FINAL, "the server's model gave logits that are no numbers")
        counted = meta.get("completion_tokens", len(entries))
        text = _text(event)
        if self._known and len(entries) == counted:  # the whole answer so far
            entries = entries[self._known :]
            text = text and text[len(self._told) :]
        if self._known + len(entries) != counted:
            raise Fault(FaultKind.LOST, f"{counted} ids were announced, {self._known + len(entries)} have come")
        told = event.get("output_ids")
        ids = _ids([entry[1] for entry in entries])
        if told is not None and ids and tuple(told[-len(ids) :]) != ids:
            raise Fault(FaultKind.FINAL, "output_ids and output_token_logprobs hold other ids")
        self._known = counted
        self._told += text or ""
        alternatives = (meta.get("output_top_logprobs") or [None])[0]
        return [
            Piece(
                ids,
                _logprobs([entry[0] for entry in entries], len(ids)),
                text,
                finish_of(self._ask, reason.get("type"), reason.get("matched"), _last(ids)),
                _number(meta.get("weight_version")),
                _falling(entry[0] for entry in alternatives or ()) if self._ask.alternatives else (),
            )
        ]


class TextCompletions:
    """``POST /v1/completions`` of any server, with text in and out: for evaluation.

    The prompt is what the ids decode to, and ids are made here of each text that comes.
    """

    path = "/v1/completions"
    seeded = False
    exact = False

    def __init__(self, model: str | None, vocabulary: Vocabulary, eos_ids: frozenset[int]) -> None:
        self._model = model
        self._vocabulary = vocabulary
        self._eos_ids = eos_ids

    def body(self, ask: Ask) -> dict[str, Any]:
        body = {
            "prompt": decode(self._vocabulary, ask.ids),
            "max_tokens": ask.most,
            "temperature": ask.sampling.temperature,
            "top_p": ask.sampling.top_p,
            "stream": True,
        }
        return body | _optional(model=self._model, seed=None if ask.seed is None else ask.seed & 0x7FFFFFFF)

    def reader(self, ask: Ask) -> Reader:
        del ask
        return _TextReader(self._vocabulary, self._eos_ids)


class _TextReader:
    def __init__(self, vocabulary: Vocabulary, eos_ids: frozenset[int]) -> None:
        self._vocabulary = vocabulary
        self._eos_ids = eos_ids

    def read(self, event: Any) -> list[Piece]:
        choice = _choice(event)
        if choice is None:
            return []
        text = _text(choice)
        if text is None:
            raise Lacking("text (choices[0].text)")
        ids = self._vocabulary.encode_text(text)
        reason = choice.get("finish_reason")
        if reason == "stop":  # no stop string was asked for, so this is the end of the sequence
            ids += sorted(self._eos_ids)[:1]
        elif reason not in (None, "length"):
            raise Fault(FaultKind.LOST, f"the server ended the answer with {reason!r}")
        finish: Finish | None = None if reason is None else "length" if reason == "length" else "own"
        return [Piece(tuple(ids), (0.0,) * len(ids), text, finish)]


def unsupported(sampling: Sampling, route: Route) -> str | None:
    """Why a route cannot sample so, or None."""
    if not route.exact and (sampling.top_k or sampling.min_p):
        return "a server that gives only text takes temperature and top_p alone"
    if isinstance(route, VLLMCompletions | VLLMGenerate) and sampling.min_p > 0 and sampling.top_p < 1:
        return "vLLM applies min_p before top_p, midstream after it; use one of them"
    return None


_NO_PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
_LEAST = -9999.0
"""What vLLM sends in place of logprobs that are -inf or no number."""


def _optional(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _choice(event: Any) -> dict[str, Any] | None:
    """The one choice of an event; None in one that brings none, such as the count of tokens at the end."""
    refuse_errors(event)
    choices = event.get("choices") if isinstance(event, dict) else None
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices) or len(choices) > 1:
        raise Lacking("choices")
    return choices[0] if choices else None


def _text(choice: dict[str, Any]) -> str | None:
    text = choice.get("text")
    return text if isinstance(text, str) else None


def _ids(values: Sequence[Any]) -> tuple[int, ...]:
    if not all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values):
        raise Fault(FaultKind.FINAL, f"the server gave ids that are none: {list(values)[:8]}")
    return tuple(values)


def _logprobs(values: Sequence[Any], count: int) -> tuple[float, ...]:
    if len(values) != count:
        raise Fault(FaultKind.FINAL, f"the server gave {count} ids but {len(values)} logprobs")
    if not all(isinstance(value, int | float) and math.isfinite(value) and value > _LEAST for value in values):
        raise Fault(FaultKind.FINAL, "the server gave logprobs that are not finite")
    return tuple(map(float, values))


def _ids_in_names(names: Any) -> list[int] | None:
    """The ids that vLLM's names of tokens hold for ``return_tokens_as_token_ids``: ``token_id:42``."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    numbers = [name.removeprefix("token_id:") for name in names]
    found = all(number != name and number.isdecimal() for number, name in zip(numbers, names, strict=True))
    return [int(number) for number in numbers] if found else None


def _last(ids: Sequence[int]) -> int | None:
    return ids[-1] if ids else None


def _falling(values: Any) -> tuple[float, ...]:
    return tuple(sorted(values, reverse=True))


def _number(version: Any) -> int | None:
    """A version of weights that is a number; servers begin with names such as ``default``."""
    return int(version) if isinstance(version, str) and version.isdecimal() else None
