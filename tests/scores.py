"""What a server answers to a prompt that it is to score: OpenAI's form, as vLLM gives it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from midstream.decoding import decode
from midstream.vocabulary import Vocabulary


def scores(
    vocabulary: Vocabulary,
    request: dict[str, Any],
    prompt: Sequence[int],
    sampled: Sequence[int],
    logprobs: Sequence[float],
) -> dict[str, Any]:
    """``logprobs``: of all ids but the first, those that were sampled behind the prompt among them."""
    ids = [*prompt, *sampled]
    names = [decode(vocabulary, [token_id]) for token_id in ids]
    others = [f"other {place}" for place in range(request["logprobs"])]
    tops = [{name: value, **dict.fromkeys(others, value - 1)} for name, value in zip(names[1:], logprobs, strict=True)]
    choice = {
        "index": 0,
        "text": decode(vocabulary, ids),
        "logprobs": {
            "tokens": names,
            "token_logprobs": [None, *logprobs],
            "top_logprobs": [None, *tops],
            "text_offset": [len(decode(vocabulary, ids[:place])) for place in range(len(ids))],
        },
        "finish_reason": "length",
        "stop_reason": None,
    }
    usage = {"prompt_tokens": len(prompt), "completion_tokens": len(sampled), "total_tokens": len(ids)}
    return {"id": "x", "object": "text_completion", "choices": [choice], "usage": usage}
