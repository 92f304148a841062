"""Answers in OpenAI's form: whole ones, and the chunks of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from midstream.engines.server.scoring import Scored
from midstream.serve.choices import Choice, Part, TokenLogprob
from midstream.types import CallRecord, ExecutionError


@dataclass(frozen=True, slots=True)
class Usage:
    """Ids: of the prompts, and behind them. ``injected``: those of results, which are among the latter."""

    prompt: int
    completion: int
    injected: int

    @classmethod
    def of(cls, choices: Sequence[Choice], n: int) -> Usage:
        """Each prompt counts once, for its ``n`` answers."""
        rows = [choice.trajectory for choice in choices if choice.trajectory is not None]
        injected = [len(s.ids) for row in rows for s in row.segments if s.origin == "injected"]
        prompt = sum(len(row.prompt_ids) for row in rows[::n])
        return cls(prompt, sum(row.generation_length for row in rows), sum(injected))

    @property
    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "midstream": {"injected_tokens": self.injected},
        }


@dataclass(frozen=True, slots=True)
class Form:
    """How one request is answered. ``ids``: whether ids are wanted besides."""

    chat: bool
    id: str
    created: int
    model: str
    n: int = 1
    logprobs: bool = False
    ids: bool = False
    include_usage: bool = False
    session: dict[str, Any] | None = None

    # --- whole

    def whole(self, choices: Sequence[Choice], parts: Sequence[Sequence[Part]]) -> dict[str, Any]:
        kind = "chat.completion" if self.chat else "text_completion"
        found = [self._choice(index, *pair) for index, pair in enumerate(zip(choices, parts, strict=True))]
        return {**self._head(kind), "choices": found, "usage": Usage.of(choices, self.n).body}

    def _choice(self, index: int, choice: Choice, parts: Sequence[Part]) -> dict[str, Any]:
        text = "".join(part.text for part in parts)
        tokens = [token for part in parts for token in part.tokens]
        content = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        return {
            "index": index,
            **content,
            "logprobs": self._logprobs(tokens),
            "finish_reason": choice.finish_reason,
            "midstream": self._provenance(choice),
        }

    def scored(self, found: Sequence[Scored]) -> dict[str, Any]:
        """Texts as the server behind this one scored them, one choice each."""
        choices = [{**one.choice, "index": index} for index, one in enumerate(found)]
        usage = Usage(sum(one.prompt_tokens for one in found), sum(one.completion_tokens for one in found), 0)
        return {**self._head("text_completion"), "choices": choices, "usage": usage.body}

    # --- chunks

    def opening(self, index: int) -> dict[str, Any] | None:
        """What stands before a choice's first text; None where nothing does."""
        if not self.chat:
            return None
        return self._chunk(index, {"role": "assistant", "content": ""}, (), None)

    def part(self, index: int, part: Part) -> dict[str, Any]:
        return self._chunk(index, {"content": part.text}, part.tokens, None, midstream={"origin": part.origin})

    def closing(self, index: int, choice: Choice) -> dict[str, Any]:
        return self._chunk(index, {}, (), choice.finish_reason, midstream=self._provenance(choice))

    def usage(self, choices: Sequence[Choice]) -> dict[str, Any] | None:
        """The chunk behind all others, where it is wanted."""
        if not self.include_usage:
            return None
        return {**self._head(self._chunk_kind), "choices": [], "usage": Usage.of(choices, self.n).body}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(
        self, index: int, delta: dict[str, Any], tokens: Sequence[TokenLogprob], finish: str | None, **more: Any
    ) -> dict[str, Any]:
        content = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        logprobs = self._logprobs(tokens) if tokens else None
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish, **more}
        usage = {"usage": None} if self.include_usage else {}
        return {**self._head(self._chunk_kind), "choices": [choice], **usage}

    # --- both

    def _head(self, kind: str) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return head if self.session is None else {**head, "midstream": {"session": self.session}}

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        if self.chat:
            entries = [
                {"token": t.token, "logprob": t.logprob, "bytes": list(t.piece), "top_logprobs": []} for t in tokens
            ]
            return {"content": entries, "refusal": None}
        return {
            "tokens": [t.token for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": None,
            "text_offset": [t.offset for t in tokens],
        }

    def _provenance(self, choice: Choice) -> dict[str, Any]:
        """What stands in the field ``midstream`` of a choice that is over."""
        row = choice.trajectory
        assert row is not None
        found: dict[str, Any] = {
            "stop": asdict(row.stop),
            "calls": [_call(record) for record in row.calls],
            "spans": [asdict(span) for span in choice.spans],
            "fit_for_training": row.fit_for_training,
        }
        if self.ids:
            begin = len(row.prompt_ids)
            found["prompt_ids"] = list(row.prompt_ids)
            found["ids"] = row.ids[begin:]
            found["mask"] = row.mask[begin:]
            found["logprobs"] = row.logprobs[begin:]
            found["weight_versions"] = row.weight_versions[begin:]
        return found


def _call(record: CallRecord) -> dict[str, Any]:
    call, result = record.call, record.result
    if result is None:
        return {"code": call.code, "kind": call.kind, "result": None}
    return {
        "code": call.code,
        "kind": call.kind,
        "result": result.text,
        "error": _error(result.error),
        "duration": result.duration,
        "tools": [
            {
                "name": tool.name,
                "arguments": tool.arguments,
                "keyword_arguments": tool.keyword_arguments,
                "value": tool.value,
                "error": _error(tool.error),
                "duration": tool.duration,
            }
            for tool in result.tool_calls
        ],
    }


def _error(error: ExecutionError | None) -> dict[str, Any] | None:
    return None if error is None else {"type": error.type, "message": error.message}
