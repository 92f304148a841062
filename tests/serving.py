"""A small server that speaks vLLM's and SGLang's routes, says what it is told, and goes wrong on command.

Its model is a function of the ids before: it goes on along one of the rows that it knows, and where such a row holds
a result, or leaves off, it writes nonsense as a model does whose result is not put in. A sampled answer is a function
of the request's seed.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from midstream.decoding import decode
from midstream.engines.noise import uniform
from midstream.testing.steering import PERIOD, next_id, next_logprobs
from midstream.types import Trajectory
from midstream.vocabulary import Vocabulary
from tests.scores import scores

BEFORE = ("429", "500", "503", "504", "drop", "garbage")
AMIDST = ("cut", "unfinished", "garbage event", "error event", "stall")
"""``drop``: the connection is closed without a word; ``cut``: in the middle of an answer; ``unfinished``: an answer
ends without its finish reason; ``stall``: nothing comes any more. Those amidst happen after some ids where the answer
is streamed, else in place of it."""


@dataclass(frozen=True)
class Trouble:
    """A fault of one request. ``after``: how many ids come before it, where it happens in the middle."""

    kind: str
    after: int = 0


@dataclass
class Behaviour:
    """How a server is.

    - ``speaks``: ``completions``, ``generate``, ``sglang``, ``sglang incremental``, or ``text``.
    - ``lacks``: fields that it leaves out. ``overrides``: what stands in its answers in place of what it would say.
    - ``pace``: seconds before each id. ``forgets_seeds``: it draws anew each time.
    - ``shift``: its tokenizer is another, whose ids stand for the texts of ids so much higher.
    - ``processed``: its logprobs move with the temperature. ``versions``: the label of its weights, or of two in a row.
    - ``steered``: its model is that of :mod:`midstream.testing.steering`.
    - ``own_stop``: an id that ends answers besides the model's EOS.
    - ``scores``: it knows ``echo``; otherwise it answers to requests with it as to any other.
    """

    speaks: str = "completions"
    lacks: frozenset[str] = frozenset()
    api_key: str | None = None
    pace: float = 0.0
    shift: int = 0
    processed: bool = False
    retry_after: str | None = "0"
    own_stop: int | None = None
    versions: Any = "default"
    deterministic: bool = True
    context_length: int | None = 1000
    forgets_seeds: bool = False
    steered: bool = False
    scores: bool = False
    models: tuple[str, ...] = ("small",)
    overrides: dict[str, Any] = field(default_factory=dict)


class FakeServer:
    """Serves on a port of its own until ``close``. ``troubles`` happen to requests for ids, one each, in order."""

    def __init__(self, vocabulary: Vocabulary, rows: Sequence[Trajectory] = (), **behaviour: Any) -> None:
        self.vocabulary = vocabulary
        self.rows = list(rows)
        self.behaviour = Behaviour(**behaviour)
        self.troubles: list[Trouble] = []
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.connections = self.under_way = self.most_under_way = self.broken_off = self._drawn = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._connected, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self._thread = threading.Thread(target=self._loop.run_forever, name="fake-server")
        self._thread.start()

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- HTTP

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            while await self._one_request(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async def _one_request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:])}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        self.headers.append(headers)
        key = self.behaviour.api_key
        if key is not None and headers.get("authorization") != f"Bearer {key}":
            return await _reply(writer, 401, {"error": "Unauthorized"})
        if method == "GET":
            return await _reply(writer, *self._about(path))
        request = json.loads(body)
        if path == "/detokenize" and self.behaviour.speaks != "text":
            return await _reply(writer, 200, {"prompt": self._text(request["tokens"])})
        if path != _PATHS[self.behaviour.speaks.split()[0]]:
            return await _reply(writer, 404, {"detail": "Not Found"})
        if self.behaviour.speaks in ("completions", "text") and request.get("model") not in self.behaviour.models:
            return await _reply(writer, 404, {"error": {"message": "no such model", "code": 404}})
        self.requests.append(request)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            return await self._generate(request, reader, writer)
        except (ConnectionError, asyncio.CancelledError):
            self.broken_off += 1
            raise
        finally:
            self.under_way -= 1

    def _about(self, path: str) -> tuple[int, Any]:
        sglang = self.behaviour.speaks.startswith("sglang")
        if path == "/v1/models":
            length = {} if self.behaviour.context_length is None else {"max_model_len": self.behaviour.context_length}
            return 200, {"object": "list", "data": [{"id": name, **length} for name in self.behaviour.models]}
        if path == "/get_model_info" and sglang:
            return 200, {"model_path": "small", "is_generation": True}
        if path == "/get_server_info" and sglang:
            return 200, {"enable_deterministic_inference": self.behaviour.deterministic, "context_length": None}
        return 404, {"detail": "Not Found"}

    async def _generate(
        self, request: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        trouble = self.troubles.pop(0) if self.troubles else Trouble("")
        if trouble.kind in BEFORE:
            return await self._fail(trouble.kind, writer)
        if request.get("echo") and self.behaviour.scores:
            await _stay(reader, self.behaviour.pace)
            return await _reply(writer, 200, self._scores(request))
        events = self._events(request)
        if not request.get("stream"):
            if trouble.kind:
                return await self._fail_amidst(trouble.kind, writer, streamed=False)
            *_, whole = events
            await asyncio.sleep(self.behaviour.pace * whole[1])
            return await _reply(writer, 200, whole[0])
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for event, count in events:
            if trouble.kind and count > trouble.after:
                return await self._fail_amidst(trouble.kind, writer, streamed=True)
            await asyncio.sleep(self.behaviour.pace)
            _chunk(writer, b": a comment\n\n" + _sse(event))
            await writer.drain()
        _chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    async def _fail(self, kind: str, writer: asyncio.StreamWriter) -> bool:
        if kind == "drop":
            return False
        if kind == "garbage":
            return await _send(writer, 200, b"<html>not what was asked for</html>", "application/json")
        after = self.behaviour.retry_after
        headers = {} if after is None else {"retry-after": after}
        return await _reply(writer, int(kind), {"error": {"message": f"trouble {kind}", "code": int(kind)}}, headers)

    async def _fail_amidst(self, kind: str, writer: asyncio.StreamWriter, *, streamed: bool) -> bool:
        if kind == "stall":
            await asyncio.sleep(60)
        if not streamed:
            writer.write(
                b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 900\r\n\r\n{"choices": ['
            )
            await writer.drain()
            return False
        if kind == "garbage event":
            _chunk(writer, b'data: {"choices": [{"ind\n\n')
        if kind == "error event":
            _chunk(writer, _sse({"error": {"message": "the engine is dead", "code": 500}}))
        if kind != "cut":
            writer.write(b"0\r\n\r\n")
        await writer.drain()
        return kind != "cut"

    # --- the model

    def _events(self, request: dict[str, Any]) -> Iterator[tuple[Any, int]]:
        """Events as their JSON, with how many ids have come with them; of a whole answer the last one counts."""
        params = request.get("sampling_params", request)
        prompt = request.get("input_ids", request.get("token_ids", request.get("prompt")))
        if isinstance(prompt, str):
            prompt = self._prefix_of_text(prompt)
        most = params.get("max_new_tokens", params.get("max_tokens"))
        answer: list[int] = []
        streamed = bool(request.get("stream"))
        finish, cause = None, None
        while finish is None:
            answer.append(self._next(prompt, answer, params))
            finish, cause = self._ended(answer, params, most)
            if streamed or finish:
                new = answer[-1:] if streamed else answer
                yield self._event(request, prompt, answer, new, finish, cause), len(answer)

    def _scores(self, request: dict[str, Any]) -> dict[str, Any]:
        given = request["prompt"]
        prompt = self.vocabulary.encode_text(given) if isinstance(given, str) else given
        sampled = [self._next(prompt, [], request)] if request["max_tokens"] else []
        logprobs = self._logprobs(prompt, sampled, len(prompt) + len(sampled) - 1, request.get("temperature", 0.0))
        found = scores(self.vocabulary, request, prompt, sampled, logprobs)
        return _without({**found, **self.behaviour.overrides}, self.behaviour.lacks)

    def _next(self, prompt: Sequence[int], answer: Sequence[int], params: dict[str, Any]) -> int:
        seed = params.get("seed", params.get("sampling_seed"))
        if self.behaviour.steered and len(prompt) >= PERIOD:
            known = [*prompt, *answer]
            likely = next_logprobs(known)
            return max(likely, key=likely.__getitem__) if seed is None else next_id(known, uniform(seed, len(answer)))
        if params.get("temperature"):
            if self.behaviour.forgets_seeds or seed is None:
                self._drawn += 1
                seed = f"drawn {self._drawn}"
            return self._nonsense(seed, len(answer))
        known = [*prompt, *answer]
        for row in self.rows:
            ids, mask = row.ids, row.mask
            if len(ids) > len(known) and ids[: len(known)] == known and mask[len(known)]:
                return ids[len(known)]
        return self._nonsense(*known[-8:])

    def _nonsense(self, *key: object) -> int:
        """An id from the lower half of the vocabulary, the first few left out: those may be special."""
        size = self.vocabulary.size
        return size // 200 + 1 + _digest(*key) % (size // 2)

    def _ended(self, answer: Sequence[int], params: dict[str, Any], most: int) -> tuple[str | None, int | str | None]:
        if answer[-1] in self.vocabulary.eos_ids or answer[-1] == self.behaviour.own_stop:
            return "stop", None
        if answer[-1] in params.get("stop_token_ids", ()):
            return "stop", answer[-1]
        text = decode(self.vocabulary, answer)
        for stop in params.get("stop", ()):
            if stop in text:
                return "stop", stop
        return ("length", None) if len(answer) >= most else (None, None)

    def _text(self, ids: Sequence[int]) -> str:
        return decode(self.vocabulary, [i + self.behaviour.shift for i in ids])

    def _prefix_of_text(self, text: str) -> list[int]:
        """The ids of a known row that a text is the beginning of."""
        for row in self.rows:
            for length in range(len(row.prompt_ids), row.total_length):
                if decode(self.vocabulary, row.ids[:length]) == text:
                    return row.ids[:length]
        return self.vocabulary.encode_text(text)

    # --- how it is told

    def _logprobs(self, prompt: Sequence[int], answer: Sequence[int], count: int, temperature: float) -> list[float]:
        places = range(len(prompt) + len(answer) - count, len(prompt) + len(answer))
        moved = temperature if self.behaviour.processed and temperature else 1.0
        known = [*prompt, *answer]
        if self.behaviour.steered and len(prompt) >= PERIOD:
            return [next_logprobs(known[:place])[known[place]] for place in places]
        return [-(1 + _digest(place, known[place]) % 4096) / 1024 / moved for place in places]

    def _event(
        self,
        request: dict[str, Any],
        prompt: Sequence[int],
        answer: Sequence[int],
        new: Sequence[int],
        finish: str | None,
        cause: int | str | None,
    ) -> Any:
        speaks = self.behaviour.speaks
        params = request.get("sampling_params", request)
        values = self._logprobs(prompt, answer, len(new), params.get("temperature", 0.0))
        tops = [[(value, i), (value - 1, i + 1)] for value, i in zip(values, new, strict=True)]
        if speaks.startswith("sglang"):
            if speaks == "sglang":
                new = list(answer)
                values = self._logprobs(prompt, answer, len(new), params.get("temperature", 0.0))
            matched = answer[-1] if finish == "stop" and cause is None else cause
            event: dict[str, Any] = {
                "text": self._text(new),
                "output_ids": list(new),
                "meta_info": {
                    "finish_reason": finish and {"type": finish, "matched": matched},
                    "completion_tokens": len(answer),
                    "weight_version": self.behaviour.versions,
                    "output_token_logprobs": [[value, i, None] for value, i in zip(values, new, strict=True)],
                    "output_top_logprobs": [[[value, i, None] for value, i in top] for top in tops],
                },
            }
            return _without({**event, **self.behaviour.overrides}, self.behaviour.lacks)
        choice: dict[str, Any] = {
            "index": 0,
            "finish_reason": finish,
            "stop_reason": cause,
            "token_ids": list(new),
            "text": self._text(new),
        }
        if speaks == "generate":
            del choice["text"]
            choice["logprobs"] = {
                "content": [
                    {
                        "token_id": i,
                        "logprob": value,
                        "top_logprobs": [{"token_id": j, "logprob": other} for other, j in top],
                    }
                    for value, i, top in zip(values, new, tops, strict=True)
                ]
            }
            if finish:
                choice["weight_versions"] = self._spans(len(answer))
        elif speaks == "text":
            choice = {"index": 0, "finish_reason": finish, "text": self._text([i for i in new if not self._is_eos(i)])}
        else:
            choice["prompt_token_ids"] = list(prompt) if len(new) == len(answer) else None
            choice["logprobs"] = {
                "tokens": [f"token_id:{i}" for i in new],
                "token_logprobs": values,
                "top_logprobs": [{f"token_id:{i}": value for value, i in top} for top in tops],
            }
        return {"id": "x", "choices": [_without({**choice, **self.behaviour.overrides}, self.behaviour.lacks)]}

    def _is_eos(self, token_id: int) -> bool:
        return token_id in self.vocabulary.eos_ids

    def _spans(self, count: int) -> list[dict[str, Any]]:
        versions = self.behaviour.versions
        if isinstance(versions, str):
            return [{"version": versions, "start": 0, "end": count}]
        middle = min(count, 2)
        return [
            {"version": version, "start": start, "end": end}
            for version, start, end in ((versions[0], 0, middle), (versions[1], middle, count))
            if end > start
        ]


_PATHS = {
    "completions": "/v1/completions",
    "text": "/v1/completions",
    "generate": "/inference/v1/generate",
    "sglang": "/generate",
}


def _digest(*items: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(items).encode(), digest_size=6).digest(), "little")


def _without(fields: dict[str, Any], lacks: frozenset[str]) -> dict[str, Any]:
    return {
        name: _without(value, lacks) if isinstance(value, dict) else value
        for name, value in fields.items()
        if name not in lacks
    }


def _sse(event: Any) -> bytes:
    return b"data: " + json.dumps(event).encode() + b"\n\n"


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


async def _stay(reader: asyncio.StreamReader, seconds: float) -> None:
    """Sleep, unless the client closes its connection."""
    with suppress(TimeoutError):
        await asyncio.wait_for(reader.read(1), seconds)
        raise ConnectionResetError


async def _reply(
    writer: asyncio.StreamWriter, status: int, content: Any, headers: dict[str, str] | None = None
) -> bool:
    return await _send(writer, status, json.dumps(content).encode(), "application/json", headers)


async def _send(
    writer: asyncio.StreamWriter, status: int, body: bytes, kind: str, headers: dict[str, str] | None = None
) -> bool:
    lines = {"content-type": kind, "content-length": str(len(body)), **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    writer.write(f"HTTP/1.1 {status} -\r\n{head}\r\n".encode() + body)
    await writer.drain()
    return True
