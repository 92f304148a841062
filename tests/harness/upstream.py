"""A server of a small real model: vLLM's ``/v1/completions``, as far as evaluations and midstream ask for it.

Greedy ids and logprobs are the model's under transformers; a sampled id is a function of the request's seed.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

NAME = "small"


class Upstream:
    """``requests``: the bodies that have come."""

    def __init__(self, model: Any, tokenizer: Any, context_length: int) -> None:
        self.requests: list[dict[str, Any]] = []
        self._model = model
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._one_at_a_time = threading.Lock()
        self.app = Starlette(
            routes=[
                Route("/v1/models", self._models, methods=["GET"]),
                Route("/v1/completions", self._completions, methods=["POST"]),
            ]
        )

    async def _models(self, request: Request) -> JSONResponse:
        del request
        return JSONResponse({"data": [{"id": NAME, "max_model_len": self._context_length}]})

    async def _completions(self, request: Request) -> JSONResponse:
        body = await request.json()
        if body.get("model") != NAME:
            return JSONResponse({"error": {"message": "no such model", "code": 404}}, 404)
        self.requests.append(body)
        return JSONResponse(await run_in_threadpool(self._answer, body))

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        given = body["prompt"]
        prompts = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
        with self._one_at_a_time, torch.inference_mode():
            choices = [self._choice(body, self._ids(prompt)) for prompt in prompts]
        prompt_tokens = sum(len(self._ids(prompt)) for prompt in prompts)
        completion_tokens = sum(len(choice["token_ids"]) for choice in choices)
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
        return {"choices": [{**choice, "index": at} for at, choice in enumerate(choices)], "usage": usage}

    def _ids(self, prompt: str | list[int]) -> list[int]:
        return self._tokenizer.encode(prompt) if isinstance(prompt, str) else prompt

    def _choice(self, body: dict[str, Any], prompt: list[int]) -> dict[str, Any]:
        most = min(body["max_tokens"], self._context_length - len(prompt))
        sampled, tables, finish, cause = self._sample(body, prompt, most)
        if body.get("echo"):
            ids, rows = [*prompt, *sampled], torch.cat([self._logprobs(prompt)[:-1], *tables])
        else:
            ids, rows = sampled, torch.cat(tables)
        text = self._tokenizer.decode(ids)
        if isinstance(cause, str) and not body.get("include_stop_str_in_output"):
            text = text[: text.index(cause)]
        return {
            "text": text,
            "token_ids": sampled,
            "finish_reason": finish,
            "stop_reason": cause,
            "logprobs": self._told(body, ids, rows, unknown=len(ids) - len(rows)),
        }

    def _sample(
        self, body: dict[str, Any], prompt: list[int], most: int
    ) -> tuple[list[int], list[torch.Tensor], str, int | str | None]:
        sampled: list[int] = []
        tables: list[torch.Tensor] = []
        noise = torch.Generator().manual_seed(body.get("seed") or 0)
        cache, new = None, prompt
        while len(sampled) < most:
            out = self._model(torch.tensor([new]), past_key_values=cache, use_cache=True)
            cache, logits = out.past_key_values, out.logits[0, -1:]
            tables.append(logits.log_softmax(-1))
            temperature = body.get("temperature", 1.0)
            drawn = torch.multinomial((logits / temperature).softmax(-1), 1, generator=noise) if temperature else None
            sampled.append(int(logits.argmax() if drawn is None else drawn))
            new = sampled[-1:]
            if new[0] == self._tokenizer.eos_token_id:
                return sampled, tables, "stop", None
            if new[0] in body.get("stop_token_ids", ()):
                return sampled, tables, "stop", new[0]
            text = self._tokenizer.decode(sampled)
            for stop in body.get("stop") or ():
                if stop in text:
                    return sampled, tables, "stop", stop
        return sampled, tables, "length", None

    def _logprobs(self, ids: list[int]) -> torch.Tensor:
        found: torch.Tensor = self._model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return found

    def _told(
        self, body: dict[str, Any], ids: Sequence[int], rows: torch.Tensor, *, unknown: int
    ) -> dict[str, Any] | None:
        count = body.get("logprobs")
        if count is None:
            return None
        names = [self._tokenizer.decode([token_id]) for token_id in ids]
        values: list[float | None] = [None] * unknown
        tops: list[dict[str, float] | None] = [None] * unknown
        for token_id, name, row in zip(ids[unknown:], names[unknown:], rows, strict=True):
            values.append(float(row[token_id]))
            best = row.topk(count)
            likeliest = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            tops.append({**{self._tokenizer.decode([i]): value for i, value in likeliest}, name: float(row[token_id])})
        return {"tokens": names, "token_logprobs": values, "top_logprobs": tops}
